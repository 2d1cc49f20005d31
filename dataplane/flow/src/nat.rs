//! NAT slices: which outside address and ports each subscriber owns, and who owns an outside port.
//!
//! A pure function of the service's configuration (RFC 7422, deterministic CGN). Subscribers are numbered
//! through the client prefixes in their order. Each outside address holds as many blocks of
//! `ports_per_subscriber` as fit from `first_port` to 65535; blocks are handed out in the order of
//! subscribers and of pool addresses. So a flow group, being a range of subscribers, owns a contiguous
//! slice of the pool, and a move renumbers nothing.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::record::mix;
use crate::{Family, Prefix, Protocol};

/// What an operator writes for a `nat44` service; [`NatSlices::new`] checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatSpec {
    /// Client prefixes, IPv4, not overlapping.
    pub clients: Vec<Prefix>,
    /// Outside prefixes, IPv4, not overlapping; every address of them is used.
    pub pool: Vec<Prefix>,
    /// Ports (and ICMP identifiers) that each subscriber owns, per protocol.
    pub ports_per_subscriber: u16,
    /// The first port handed out. System ports stay free by default (RFC 6335, section 6).
    #[serde(default = "first_port_default")]
    pub first_port: u16,
    /// Secret that scatters ports inside a block (RFC 6056, section 3.3.3). The same at all sites.
    #[serde(default)]
    pub port_key: u64,
}

/// 1024: system ports are left out.
#[must_use]
pub fn first_port_default() -> u16 {
    1024
}

/// A subscriber's number: its place in the client prefixes, counted through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subscriber(pub u32);

/// The ports of one subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortBlock {
    /// The outside address.
    pub address: Ipv4Addr,
    /// The first port.
    pub first: u16,
    /// How many.
    pub count: u16,
}

/// Outside addresses and ports as one masked match: `address` by prefix, `port & mask == value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OutsideMatch {
    /// Outside addresses.
    pub addresses: Prefix,
    /// Port bits that must be equal.
    pub port: u16,
    /// Which port bits count; 0 for any port.
    pub port_mask: u16,
}

impl OutsideMatch {
    /// Whether the endpoint is meant.
    #[must_use]
    pub fn matches(&self, address: Ipv4Addr, port: u16) -> bool {
        self.addresses.contains(IpAddr::V4(address)) && port & self.port_mask == self.port
    }
}

/// Why a NAT service cannot work. Each message names the values and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// Nobody to serve, or nothing to serve them with.
    #[error("{field} is empty: give at least one IPv4 prefix")]
    Empty {
        /// `clients` or `pool`.
        field: &'static str,
    },
    /// NAT44 is for IPv4.
    #[error("{field}: {prefix} is not IPv4")]
    NotIpv4 {
        /// `clients` or `pool`.
        field: &'static str,
        /// The offending prefix.
        prefix: Prefix,
    },
    /// Two prefixes share addresses.
    #[error("{a} and {b} overlap: each address may appear once in clients and pool together")]
    Overlap {
        /// One of them.
        a: Prefix,
        /// The other.
        b: Prefix,
    },
    /// A prefix with more than 2^24 addresses.
    #[error("{field}: {prefix} is larger than /8; split the service")]
    TooLarge {
        /// `clients` or `pool`.
        field: &'static str,
        /// The offending prefix.
        prefix: Prefix,
    },
    /// No whole block fits an address.
    #[error(
        "ports_per_subscriber is {ports}, but {room} ports are free from first_port {first}: use 1 to {room}"
    )]
    Block {
        /// What was given.
        ports: u16,
        /// The first port.
        first: u16,
        /// Ports from there.
        room: u32,
    },
    /// More subscribers than blocks.
    #[error(
        "pool too small: {subscribers} subscribers with {ports} ports each need {needed} outside addresses, \
         pool has {given}; add {} or lower ports_per_subscriber", needed - given
    )]
    PoolTooSmall {
        /// Client addresses.
        subscribers: u64,
        /// Ports of each.
        ports: u16,
        /// Outside addresses that would do.
        needed: u64,
        /// Outside addresses in the pool.
        given: u64,
    },
}

/// A checked [`NatSpec`] with both directions of the mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatSlices {
    spec: NatSpec,
    /// First subscriber number of each client prefix.
    client_starts: Vec<u32>,
    /// First pool index of each outside prefix.
    pool_starts: Vec<u32>,
    blocks_per_address: u32,
    subscribers: u32,
}

impl NatSlices {
    /// Checks the configuration.
    ///
    /// # Errors
    /// One [`SliceError`] per misdeed, the first that is found.
    pub fn new(spec: NatSpec) -> Result<Self, SliceError> {
        check_prefixes("clients", &spec.clients)?;
        check_prefixes("pool", &spec.pool)?;
        check_overlap(&spec)?;
        let room = 65_536 - u32::from(spec.first_port);
        let ports = spec.ports_per_subscriber;
        if ports == 0 || u32::from(ports) > room {
            return Err(SliceError::Block { ports, first: spec.first_port, room });
        }
        let blocks_per_address = room / u32::from(ports);
        let (client_starts, subscribers) = starts(&spec.clients);
        let (pool_starts, given) = starts(&spec.pool);
        let needed = u64::from(subscribers.div_ceil(blocks_per_address));
        let given = u64::from(given);
        if needed > given {
            return Err(SliceError::PoolTooSmall { subscribers: subscribers.into(), ports, needed, given });
        }
        Ok(Self { spec, client_starts, pool_starts, blocks_per_address, subscribers })
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &NatSpec {
        &self.spec
    }

    /// Number of subscribers.
    #[must_use]
    pub fn subscribers(&self) -> u32 {
        self.subscribers
    }

    /// The subscriber with this inside address.
    #[must_use]
    pub fn subscriber(&self, address: Ipv4Addr) -> Option<Subscriber> {
        index_of(&self.spec.clients, &self.client_starts, address).map(Subscriber)
    }

    /// The inside address of a subscriber.
    #[must_use]
    pub fn client(&self, subscriber: Subscriber) -> Option<Ipv4Addr> {
        (subscriber.0 < self.subscribers)
            .then(|| address_at(&self.spec.clients, &self.client_starts, subscriber.0))
    }

    /// The ports of a subscriber.
    #[must_use]
    pub fn block(&self, subscriber: Subscriber) -> Option<PortBlock> {
        if subscriber.0 >= self.subscribers {
            return None;
        }
        let address = address_at(&self.spec.pool, &self.pool_starts, subscriber.0 / self.blocks_per_address);
        Some(PortBlock {
            address,
            first: self.block_start(subscriber.0 % self.blocks_per_address),
            count: self.spec.ports_per_subscriber,
        })
    }

    /// Who owns an outside port. Ports below the first, beyond the last whole block, or of blocks that no
    /// subscriber has, belong to nobody.
    #[must_use]
    pub fn owner(&self, address: Ipv4Addr, port: u16) -> Option<Subscriber> {
        let index = index_of(&self.spec.pool, &self.pool_starts, address)?;
        let block =
            u32::from(port.checked_sub(self.spec.first_port)?) / u32::from(self.spec.ports_per_subscriber);
        if block >= self.blocks_per_address {
            return None;
        }
        let subscriber = index.checked_mul(self.blocks_per_address)?.checked_add(block)?;
        (subscriber < self.subscribers).then_some(Subscriber(subscriber))
    }

    /// Where in its block a mapping is tried first: a keyed hash of protocol, subscriber and port, so that
    /// an outsider cannot guess it, and both ends of a move can leave it out of the record.
    /// Source: RFC 6056, section 3.3.3.
    #[must_use]
    pub fn preferred_offset(&self, subscriber: Subscriber, protocol: Protocol, client_port: u16) -> u16 {
        let word = u64::from(subscriber.0) << 32 | u64::from(client_port) << 8 | u64::from(protocol.number());
        let hash = mix(mix(word ^ self.spec.port_key).wrapping_add(self.spec.port_key));
        #[expect(clippy::cast_possible_truncation, reason = "a remainder of a 16-bit divisor")]
        {
            (hash % u64::from(self.spec.ports_per_subscriber)) as u16
        }
    }

    /// What all sites of the service know about a packet from a remote to an outside endpoint, and nobody else while `port_key` is
    /// secret.
    #[must_use]
    pub fn seal(&self, remote: u32, outside: u32, port: u16) -> u32 {
        let word = u64::from(remote) << 32 | u64::from(outside);
        let hash = mix(mix(word ^ self.spec.port_key).wrapping_add(self.spec.port_key) ^ u64::from(port));
        (hash >> 32) as u32
    }

    /// The outside slice of a client prefix as masked matches that do not overlap, in the order of the
    /// pool. A whole address matches any port. Empty when the prefix is not inside the clients.
    #[must_use]
    pub fn slice(&self, clients: &Prefix) -> Vec<OutsideMatch> {
        let IpAddr::V4(first) = clients.address() else { return Vec::new() };
        let Some(Subscriber(first)) = self.subscriber(first) else { return Vec::new() };
        if !self.spec.clients.iter().any(|whole| whole.covers(clients)) {
            return Vec::new();
        }
        let end = u64::from(first) + u64::try_from(clients.size()).unwrap_or(u64::MAX);
        let mut matches = Vec::new();
        let mut at = u64::from(first);
        while at < end {
            let (next, last_whole) = self.next_step(at, end);
            match last_whole {
                Some(addresses) => self.whole_addresses(at, addresses, &mut matches),
                None => self.part_of_address(at, next, &mut matches),
            }
            at = next;
        }
        matches
    }

    /// The next subscriber after a step that starts at `at`: a run of whole addresses (with their number),
    /// or a part of one.
    fn next_step(&self, at: u64, end: u64) -> (u64, Option<u32>) {
        let per_address = u64::from(self.blocks_per_address);
        // The last address in use may have blocks that nobody owns; they count as part of it.
        let end_whole =
            if end == u64::from(self.subscribers) { end.next_multiple_of(per_address) } else { end };
        let whole = (end_whole - at) / per_address;
        if at.is_multiple_of(per_address) && whole > 0 {
            let addresses = u32::try_from(whole).unwrap_or(u32::MAX);
            return (at + whole * per_address, Some(addresses));
        }
        (end.min((at / per_address + 1) * per_address), None)
    }

    fn whole_addresses(&self, at: u64, count: u32, matches: &mut Vec<OutsideMatch>) {
        let mut index = u32::try_from(at / u64::from(self.blocks_per_address)).unwrap_or(u32::MAX);
        let end = index + count;
        while index < end {
            let address = address_at(&self.spec.pool, &self.pool_starts, index);
            let place = place_of(&self.pool_starts, index);
            let room = (end - index).min(self.pool_end(place) - index);
            // The largest aligned run that fits: bounded by the alignment of the address and the room left.
            let aligned = u32::from(address).trailing_zeros().min(31);
            let bits = aligned.min(room.ilog2());
            let addresses = Prefix::containing(IpAddr::V4(address), 32 - bits as u8).ok();
            matches.extend(addresses.map(|addresses| OutsideMatch { addresses, port: 0, port_mask: 0 }));
            index += 1 << bits;
        }
    }

    fn part_of_address(&self, at: u64, next: u64, matches: &mut Vec<OutsideMatch>) {
        let Some(first) = u32::try_from(at).ok().and_then(|at| self.block(Subscriber(at))) else { return };
        let ports = (next - at) * u64::from(self.spec.ports_per_subscriber);
        let addresses = Prefix::host(IpAddr::V4(first.address));
        let mut port = u32::from(first.first);
        let end = port + u32::try_from(ports).unwrap_or(u32::MAX);
        while port < end {
            let bits = port.trailing_zeros().min((end - port).ilog2());
            #[expect(clippy::cast_possible_truncation, reason = "ports end at 65535")]
            matches.push(OutsideMatch { addresses, port: port as u16, port_mask: (u32::MAX << bits) as u16 });
            port += 1 << bits;
        }
    }

    fn pool_end(&self, place: usize) -> u32 {
        self.pool_starts[place] + u32::try_from(self.spec.pool[place].size()).unwrap_or(u32::MAX)
    }

    fn block_start(&self, block: u32) -> u16 {
        let start = u32::from(self.spec.first_port) + block * u32::from(self.spec.ports_per_subscriber);
        u16::try_from(start).unwrap_or(u16::MAX)
    }
}

fn check_prefixes(field: &'static str, prefixes: &[Prefix]) -> Result<(), SliceError> {
    if prefixes.is_empty() {
        return Err(SliceError::Empty { field });
    }
    for &prefix in prefixes {
        if prefix.family() != Family::V4 {
            return Err(SliceError::NotIpv4 { field, prefix });
        }
        if prefix.len() < 8 {
            return Err(SliceError::TooLarge { field, prefix });
        }
    }
    Ok(())
}

/// RFC 4787, REQ-7: inside and outside that overlap are refused here rather than half supported.
fn check_overlap(spec: &NatSpec) -> Result<(), SliceError> {
    let mut all: Vec<Prefix> = spec.clients.iter().chain(&spec.pool).copied().collect();
    // A prefix sorts before everything inside it, so an overlap is between neighbours.
    all.sort_unstable();
    match all.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
        Some(pair) => Err(SliceError::Overlap { a: pair[0], b: pair[1] }),
        None => Ok(()),
    }
}

/// Running number of the first address of each prefix, and the number of all addresses.
fn starts(prefixes: &[Prefix]) -> (Vec<u32>, u32) {
    let mut total = 0u32;
    let starts = prefixes
        .iter()
        .map(|prefix| {
            let start = total;
            total = total.saturating_add(u32::try_from(prefix.size()).unwrap_or(u32::MAX));
            start
        })
        .collect();
    (starts, total)
}

/// The prefix that an index falls into.
fn place_of(starts: &[u32], index: u32) -> usize {
    starts.partition_point(|&start| start <= index) - 1
}

fn address_at(prefixes: &[Prefix], starts: &[u32], index: u32) -> Ipv4Addr {
    let place = place_of(starts, index);
    let IpAddr::V4(first) = prefixes[place].address() else { return Ipv4Addr::UNSPECIFIED };
    Ipv4Addr::from(u32::from(first) + (index - starts[place]))
}

fn index_of(prefixes: &[Prefix], starts: &[u32], address: Ipv4Addr) -> Option<u32> {
    prefixes.iter().zip(starts).find_map(|(prefix, start)| {
        let offset = prefix.offset(IpAddr::V4(address))?;
        Some(start + u32::try_from(offset).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(clients: &[&str], pool: &[&str], ports: u16) -> NatSpec {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        NatSpec {
            clients: parse(clients),
            pool: parse(pool),
            ports_per_subscriber: ports,
            first_port: 1024,
            port_key: 7,
        }
    }

    #[test]
    fn each_misdeed_is_named_with_its_values() {
        let error = |spec| NatSlices::new(spec).unwrap_err().to_string();
        assert_eq!(
            error(spec(&[], &["192.0.2.0/24"], 512)),
            "clients is empty: give at least one IPv4 prefix"
        );
        assert!(error(spec(&["2001:db8::/64"], &["192.0.2.0/24"], 512)).contains("not IPv4"));
        assert!(error(spec(&["10.0.0.0/8", "10.1.0.0/16"], &["192.0.2.0/24"], 512)).contains("overlap"));
        assert!(error(spec(&["10.0.0.0/24"], &["10.0.0.0/30"], 512)).contains("overlap"));
        assert!(error(spec(&["10.0.0.0/7"], &["192.0.2.0/24"], 512)).contains("larger than /8"));
        assert!(error(spec(&["10.0.0.0/24"], &["192.0.2.0/24"], 0)).contains("use 1 to 64512"));
        assert_eq!(
            error(spec(&["100.64.0.0/16"], &["192.0.2.0/24"], 512)),
            "pool too small: 65536 subscribers with 512 ports each need 521 outside addresses, pool has 256; \
             add 265 or lower ports_per_subscriber"
        );
    }

    /// RFC 7422: a sharing ratio of 1024 over the 64,512 ports above the system ports gives 63 ports.
    #[test]
    fn the_example_of_rfc_7422_gives_63_ports() {
        let slices = NatSlices::new(spec(&["100.64.0.0/22"], &["192.0.2.1/32"], 63)).unwrap();
        assert_eq!(slices.blocks_per_address, 1024);
        let last = slices.block(Subscriber(1023)).unwrap();
        assert_eq!(u32::from(last.first) + u32::from(last.count) - 1, 65_535);
    }

    #[test]
    fn a_whole_address_is_one_match_on_any_port() {
        let slices = NatSlices::new(spec(&["100.64.0.0/24"], &["192.0.2.0/29"], 2016)).unwrap();
        let slice = slices.slice(&"100.64.0.0/24".parse().unwrap());
        let expected = OutsideMatch { addresses: "192.0.2.0/29".parse().unwrap(), port: 0, port_mask: 0 };
        assert_eq!(slice, [expected]);
    }

    #[test]
    fn prefixes_outside_the_clients_own_nothing() {
        let slices = NatSlices::new(spec(&["100.64.0.0/24"], &["192.0.2.0/29"], 1024)).unwrap();
        assert!(slices.slice(&"100.64.0.0/23".parse().unwrap()).is_empty());
        assert!(slices.slice(&"10.0.0.0/24".parse().unwrap()).is_empty());
        assert_eq!(slices.subscriber(Ipv4Addr::new(100, 64, 1, 0)), None);
        assert_eq!(slices.block(Subscriber(256)), None);
    }

    /// One to three client and pool prefixes of any length from /22 to /32, and any block size.
    fn any_slices() -> impl Strategy<Value = NatSlices> {
        let clients = proptest::collection::vec(22u8..=32, 1..4);
        let pool = proptest::collection::vec(24u8..=32, 1..4);
        (clients, pool, 1u16..=64_512, any::<u64>()).prop_map(|(clients, pool, ports, port_key)| {
            let at = |base: u32, i: usize, len| {
                Prefix::containing(IpAddr::V4((base + ((i as u32) << 16)).into()), len).unwrap()
            };
            let clients: Vec<_> =
                clients.iter().enumerate().map(|(i, &len)| at(0x6440_0000, i, len)).collect();
            let pool = pool.iter().enumerate().map(|(i, &len)| at(0xc633_0000, i, len)).collect();
            let mut spec = NatSpec { clients, pool, ports_per_subscriber: ports, first_port: 1024, port_key };
            loop {
                match NatSlices::new(spec.clone()) {
                    Ok(slices) => return slices,
                    // Smaller blocks until the pool is large enough for the clients.
                    Err(SliceError::PoolTooSmall { .. }) => {
                        if spec.ports_per_subscriber == 1 {
                            spec.clients.pop();
                        }
                        spec.ports_per_subscriber = (spec.ports_per_subscriber / 2).max(1);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn both_directions_agree_and_blocks_never_overlap(slices in any_slices(), pick: u32, port_pick: u16) {
            let subscriber = Subscriber(pick % slices.subscribers());
            let client = slices.client(subscriber).unwrap();
            prop_assert_eq!(slices.subscriber(client), Some(subscriber));
            let block = slices.block(subscriber).unwrap();
            let port = block.first + port_pick % block.count;
            prop_assert!(port >= 1024);
            // Every port of a block leads back to its one subscriber: so no two blocks share a port.
            prop_assert_eq!(slices.owner(block.address, port), Some(subscriber));
        }

        #[test]
        fn a_slice_is_exactly_the_blocks_of_its_subscribers(
            slices in any_slices(), len in 22u8..=32, pick: u32, port: u16, probe: u32,
        ) {
            let client = slices.client(Subscriber(pick % slices.subscribers())).unwrap();
            let group = Prefix::containing(IpAddr::V4(client), len).unwrap();
            prop_assume!(slices.spec().clients.iter().any(|whole| whole.covers(&group)));
            let slice = slices.slice(&group);
            // Any subscriber's any port is matched once if it is of the group, else never.
            let other = Subscriber(probe % slices.subscribers());
            let block = slices.block(other).unwrap();
            let port = block.first + port % block.count;
            let hits = slice.iter().filter(|m| m.matches(block.address, port)).count();
            let inside = group.contains(IpAddr::V4(slices.client(other).unwrap()));
            prop_assert_eq!(hits, usize::from(inside));
        }

        #[test]
        fn the_preferred_offset_lies_in_the_block(slices in any_slices(), pick: u32, port: u16) {
            let offset = slices.preferred_offset(Subscriber(pick % slices.subscribers()), Protocol::Udp, port);
            prop_assert!(offset < slices.spec().ports_per_subscriber);
        }
    }
}
