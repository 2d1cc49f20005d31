//! A made-up but plausible NAT table, for benchmarks and tests. The same seed gives the same flows.
//!
//! Shape: servers by a Zipf-like law over `flows / 4` addresses of which the popular ones get most flows; 62 %
//! TCP to 443, 8 % TCP to 80, 20 % UDP to 443, 10 % DNS; most flows short, few long (log-uniform packets);
//! idle times uniform over 60 seconds. Ports are those that the service hands out.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use crate::nat::{NatSlices, NatSpec, SliceError, Subscriber};
use crate::record::mix;
use crate::{Endpoint, Fixed, FlowKey, FlowRecord, Joinable, Prefix, Protocol, SiteId, TcpState};

/// A seeded generator of 64-bit words (`SplitMix64`). Not for secrets.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// Starts at a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.word() % end
    }

    /// A fraction in `0..1`.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    pub fn fraction(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Log-uniform in `1..=end`: each decade is as likely as any other.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a sample"
    )]
    pub fn log_uniform(&mut self, end: u64) -> u64 {
        ((end as f64).ln() * self.fraction()).exp() as u64
    }
}

/// A service whose one client prefix is large enough for `subscribers`, with 64 flows or fewer of each
/// fitting its block of 504 ports.
///
/// # Errors
/// [`SliceError`] when there are more than 2^16 subscribers.
pub fn service(subscribers: u32) -> Result<NatSlices, SliceError> {
    let bits = subscribers.next_power_of_two().ilog2().min(16);
    let clients = Prefix::containing(IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 32 - bits as u8);
    let pool = Prefix::containing(IpAddr::V4(Ipv4Addr::new(198, 18, 0, 0)), 22);
    NatSlices::new(NatSpec {
        clients: clients.into_iter().collect(),
        pool: pool.into_iter().collect(),
        ports_per_subscriber: 504,
        first_port: 1024,
        port_key: 0x11d0_5a5e,
    })
}

/// `count` distinct flows of the service's subscribers, about 40 each.
#[must_use]
pub fn flows(slices: &NatSlices, count: usize, seed: u64) -> Vec<FlowRecord> {
    let mut rng = Seeded::new(seed);
    let mut flows = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    let mut taken = HashSet::with_capacity(count);
    let subscribers = u64::from(slices.subscribers()).min((count as u64).div_ceil(40));
    while flows.len() < count {
        #[expect(clippy::cast_possible_truncation, reason = "below the number of subscribers")]
        let subscriber = Subscriber(rng.below(subscribers) as u32);
        let Some(mut record) = flow(slices, subscriber, count as u64 / 4 + 1, &mut rng) else { continue };
        let mapping = (record.key.protocol, record.key.client);
        if seen.contains(&mapping) {
            continue;
        }
        let protocol = record.key.protocol;
        let Some(port) = free_port(slices, subscriber, record.fixed, |port| {
            !taken.contains(&(protocol, subscriber, port))
        }) else {
            continue;
        };
        seen.insert(mapping);
        taken.insert((protocol, subscriber, port));
        record.fixed = Fixed::Nat44 { outside_port: port };
        flows.push(record);
    }
    flows
}

/// The wanted outside port, or the next free one of the subscriber's block, as a worker gives them.
fn free_port(
    slices: &NatSlices,
    subscriber: Subscriber,
    wanted: Fixed,
    is_free: impl Fn(u16) -> bool,
) -> Option<u16> {
    let Fixed::Nat44 { outside_port: wanted } = wanted;
    let block = slices.block(subscriber)?;
    let offset = wanted.checked_sub(block.first)?;
    (offset..block.count).chain(0..offset).map(|offset| block.first + offset).find(|&port| is_free(port))
}

fn flow(slices: &NatSlices, subscriber: Subscriber, servers: u64, rng: &mut Seeded) -> Option<FlowRecord> {
    let (protocol, remote_port) = match rng.below(100) {
        0..62 => (Protocol::Tcp, 443),
        62..70 => (Protocol::Tcp, 80),
        70..90 => (Protocol::Udp, 443),
        _ => (Protocol::Udp, 53),
    };
    #[expect(clippy::cast_possible_truncation, reason = "a port; an address")]
    let (client_port, server) = ((32_768 + rng.below(28_232)) as u16, mix(rng.log_uniform(servers)) as u32);
    let block = slices.block(subscriber)?;
    let outside_port = block.first + slices.preferred_offset(subscriber, protocol, client_port);
    let dns = remote_port == 53;
    let packets_out = if dns { 1 } else { 1 + rng.log_uniform(2_000) };
    let packets_in = if dns { 1 } else { packets_out + rng.log_uniform(packets_out) - 1 };
    Some(FlowRecord {
        key: FlowKey {
            protocol,
            client: Endpoint { address: IpAddr::V4(slices.client(subscriber)?), port: client_port },
            remote: Endpoint { address: IpAddr::V4(Ipv4Addr::from(server)), port: remote_port },
        },
        fixed: Fixed::Nat44 { outside_port },
        joined: Joinable {
            packets_out,
            packets_in,
            bytes_out: packets_out * 60 + rng.below(30),
            bytes_in: packets_in * if dns { 120 } else { 900 } + rng.below(500),
            remaining_s: idle_limit(protocol) - u32::try_from(rng.below(60)).unwrap_or(0),
            tcp: if protocol == Protocol::Tcp { TcpState::Established } else { TcpState::None },
            ingress: SiteId(1),
        },
        version: 1,
    })
}

fn idle_limit(protocol: Protocol) -> u32 {
    if protocol == Protocol::Tcp { 7_440 } else { 300 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_mappings_of_a_subscriber_share_an_outside_port() {
        let slices = service(256).unwrap();
        let mut seen = HashSet::new();
        for record in flows(&slices, 10_000, 1) {
            let Fixed::Nat44 { outside_port } = record.fixed;
            assert!(seen.insert((record.key.protocol, record.key.client.address, outside_port)));
        }
        assert_eq!(seen.len(), 10_000);
    }
}
