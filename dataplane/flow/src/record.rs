//! Flow keys and the records that travel from site to site.
//!
//! A record has a key, a fixed part that never changes while the flow lives, a joinable part that two
//! sites may both have advanced, and a version that never goes backwards on import.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::SiteId;

/// An IP protocol number that flows are kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Protocol {
    /// ICMP echo; the port of the client is the identifier, that of the remote is 0.
    Icmp = 1,
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// ICMPv6 echo; ports as for ICMP.
    Icmp6 = 58,
}

impl Protocol {
    /// From the number in the IP header.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Icmp),
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            58 => Some(Self::Icmp6),
            _ => None,
        }
    }

    /// The number in the IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// An address and a port in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port, or the identifier of an ICMP echo.
    pub port: u16,
}

/// The 5-tuple of a flow as the client sees it, of either family. Both directions have this one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FlowKey {
    /// The protocol.
    pub protocol: Protocol,
    /// The subscriber's own endpoint, before translation.
    pub client: Endpoint,
    /// The other end.
    pub remote: Endpoint,
}

/// What never changes while the flow lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Fixed {
    /// NAT44: the outside port. The outside address is a pure function of the subscriber.
    Nat44 {
        /// In host byte order; it lies in the subscriber's block.
        outside_port: u16,
    },
}

/// The TCP session machine of RFC 6146, section 3.5.2, as seen from a NAT44.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum TcpState {
    /// Not a TCP flow.
    #[default]
    None = 0,
    /// The client's SYN was seen (`V6 INIT` there).
    ClientInit = 1,
    /// The remote's SYN was seen first (`V4 INIT` there).
    RemoteInit = 2,
    /// A SYN was seen from each side.
    Established = 3,
    /// The client sent FIN.
    ClientFin = 4,
    /// The remote sent FIN.
    RemoteFin = 5,
    /// Both sent FIN.
    BothFin = 6,
    /// RST was seen; any other packet leads back to `Established`.
    Transitory = 7,
}

impl TcpState {
    /// From its number on the wire.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::None,
            1 => Self::ClientInit,
            2 => Self::RemoteInit,
            3 => Self::Established,
            4 => Self::ClientFin,
            5 => Self::RemoteFin,
            6 => Self::BothFin,
            7 => Self::Transitory,
            _ => return None,
        })
    }

    /// Whether neither side can send new data: such a flow only waits for late packets.
    #[must_use]
    pub fn is_closing(self) -> bool {
        matches!(self, Self::BothFin | Self::Transitory)
    }
}

/// What both sites of a move may advance. Two values join to one that has lost nothing of either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Joinable {
    /// Packets from the client.
    pub packets_out: u64,
    /// Packets to the client.
    pub packets_in: u64,
    /// IP bytes from the client.
    pub bytes_out: u64,
    /// IP bytes to the client.
    pub bytes_in: u64,
    /// Seconds until the flow expires if no packet comes, rounded up. A span, so that it is right after
    /// the move whatever the clocks say.
    pub remaining_s: u32,
    /// The TCP session machine.
    pub tcp: TcpState,
    /// The site where the client's packets come in, for the way back to it.
    pub ingress: SiteId,
}

impl Joinable {
    /// Joins what `other` counted beyond `base` into this: counters by sum, lifetime by maximum, TCP by
    /// what either side saw. `base` is the value that both started from. `ingress` stays: the party that
    /// serves now knows better. `is_renewed` says that this side has seen a new session begin since `base`
    /// on the ports of the one before.
    #[must_use]
    pub fn join(&self, base: &Self, other: &Self, is_renewed: bool) -> Self {
        Self {
            packets_out: self.packets_out + other.packets_out.saturating_sub(base.packets_out),
            packets_in: self.packets_in + other.packets_in.saturating_sub(base.packets_in),
            bytes_out: self.bytes_out + other.bytes_out.saturating_sub(base.bytes_out),
            bytes_in: self.bytes_in + other.bytes_in.saturating_sub(base.bytes_in),
            remaining_s: self.remaining_s.max(other.remaining_s),
            tcp: if is_renewed { join_renewed(base, self, other) } else { join_tcp(base, self, other) },
            ingress: self.ingress,
        }
    }

    fn has_packets_since(&self, base: &Self) -> bool {
        self.packets_out > base.packets_out || self.packets_in > base.packets_in
    }
}

/// The state that two sides together saw, each from `base` on. A side that saw nothing new has no say: its
/// state may be that of an older connection on the same ports.
fn join_tcp(base: &Joinable, a: &Joinable, b: &Joinable) -> TcpState {
    use TcpState::{BothFin, ClientFin, ClientInit, Established, RemoteFin, RemoteInit, Transitory};
    let was_open = base.tcp >= Established;
    match (a.tcp, b.tcp) {
        (x, y) if x == y => x,
        // One side may have seen only one FIN or SYN and the other the other.
        (ClientFin, RemoteFin) | (RemoteFin, ClientFin) => BothFin,
        (ClientInit, RemoteInit) | (RemoteInit, ClientInit) => Established,
        // The ports are used again, and the answer may have passed the side that knows the old connection
        // only: the next packet of either direction shows that the new one is established.
        (ClientInit | RemoteInit, old) if (was_open || old.is_closing()) && b.has_packets_since(base) => {
            Transitory
        }
        (old, ClientInit | RemoteInit) if (was_open || old.is_closing()) && a.has_packets_since(base) => {
            Transitory
        }
        (x, y) if x == base.tcp => y,
        (x, y) if y == base.tcp => x,
        (x, y) => x.max(y),
    }
}

/// The state of a session that began anew at the one side, which is not told by its state alone: it may be
/// established by now, as the one before was. What the other side saw end may have been either; the next
/// packet of either direction shows that the new one lives.
fn join_renewed(base: &Joinable, new: &Joinable, other: &Joinable) -> TcpState {
    use TcpState::{BothFin, ClientFin, Established, RemoteFin};
    match (new.tcp, other.tcp) {
        (x, y) if x == y => x,
        (x, _) if !other.has_packets_since(base) => x,
        // Both ends of the new one, or one end, and of the old one nothing that could be mistaken for the other.
        (BothFin, _) => BothFin,
        (x @ (ClientFin | RemoteFin), Established) => x,
        _ => TcpState::Transitory,
    }
}

/// One flow as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRecord {
    /// Who talks to whom.
    pub key: FlowKey,
    /// What a move must not change.
    pub fixed: Fixed,
    /// What both sites may advance.
    pub joined: Joinable,
    /// Grows each time the record is exported again; an import with a smaller one is ignored.
    pub version: u32,
}

impl FlowRecord {
    /// This flow's part of the digest of its group.
    #[must_use]
    pub fn digest(&self) -> u64 {
        digest(&self.key, &self.fixed)
    }
}

/// What an export carries: flows that are new or changed, and flows that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// New or changed.
    pub upserts: Vec<FlowRecord>,
    /// Ended since the last export, with the version that must not be overtaken.
    pub removals: Vec<(FlowKey, u32)>,
}

impl Batch {
    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removals.is_empty()
    }

    /// Upserts and removals together.
    #[must_use]
    pub fn len(&self) -> usize {
        self.upserts.len() + self.removals.len()
    }
}

/// How long packets were held by a move, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HoldTimes {
    /// Packets that were held.
    pub held: u64,
    /// Median.
    pub us_p50: u64,
    /// 99 of 100 were held no longer.
    pub us_p99: u64,
    /// 999 of 1,000 were held no longer.
    pub us_p999: u64,
    /// Longest.
    pub us_max: u64,
}

impl HoldTimes {
    /// From the times of single packets, which get sorted.
    #[must_use]
    pub fn of(times_us: &mut [u64]) -> Self {
        times_us.sort_unstable();
        let Some(&us_max) = times_us.last() else { return Self::default() };
        let at = |per_mille: usize| times_us[(times_us.len() * per_mille).div_ceil(1_000).saturating_sub(1)];
        Self { held: times_us.len() as u64, us_p50: at(500), us_p99: at(990), us_p999: at(999), us_max }
    }
}

/// What hands a group over: whoever installs a table that matches it owns the group under its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token {
    /// The epoch of the new owner.
    pub epoch: crate::Epoch,
    /// Live flows of the group.
    pub flows: u64,
    /// Wrapping sum of [`digest`] over them.
    pub digest: u64,
}

/// Digest of what must be equal on both sides of a move. Summed with wrapping over the flows of a group,
/// so it can be kept up to date as flows come and go. Not a defence against an adversary: the peer is
/// authenticated.
#[must_use]
pub fn digest(key: &FlowKey, fixed: &Fixed) -> u64 {
    let (client_high, client_low) = words(key.client.address);
    let (remote_high, remote_low) = words(key.remote.address);
    let Fixed::Nat44 { outside_port } = *fixed;
    let ports = u64::from(key.client.port) << 48
        | u64::from(key.remote.port) << 32
        | u64::from(outside_port) << 16
        | u64::from(key.protocol.number());
    let mut hash = mix(ports ^ 0x9e37_79b9_7f4a_7c15);
    for word in [client_high, client_low, remote_high, remote_low] {
        hash = mix(hash ^ word);
    }
    hash
}

fn words(address: IpAddr) -> (u64, u64) {
    match address {
        IpAddr::V4(a) => (4, u64::from(u32::from(a))),
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of 128 bits")]
        IpAddr::V6(a) => ((u128::from(a) >> 64) as u64, u128::from(a) as u64),
    }
}

/// The finaliser of `SplitMix64`: every input bit changes every output bit.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counted(packets_out: u64, remaining_s: u32, tcp: TcpState) -> Joinable {
        Joinable { packets_out, remaining_s, tcp, ..Joinable::default() }
    }

    #[test]
    fn hold_times_are_by_nearest_rank() {
        assert_eq!(HoldTimes::of(&mut []), HoldTimes::default());
        let mut times: Vec<u64> = (1..=1_000).rev().collect();
        let expected = HoldTimes { held: 1_000, us_p50: 500, us_p99: 990, us_p999: 999, us_max: 1_000 };
        assert_eq!(HoldTimes::of(&mut times), expected);
        assert_eq!(
            HoldTimes::of(&mut [7]),
            HoldTimes { held: 1, us_p50: 7, us_p99: 7, us_p999: 7, us_max: 7 }
        );
    }

    #[test]
    fn two_half_closes_join_to_a_full_close() {
        let base = counted(5, 7440, TcpState::Established);
        let here = counted(6, 7440, TcpState::ClientFin);
        let there = counted(9, 7000, TcpState::RemoteFin);
        assert_eq!(here.join(&base, &there, false), counted(10, 7440, TcpState::BothFin));
    }

    #[test]
    fn a_connection_opened_again_is_not_closed_by_who_saw_the_old_one() {
        use TcpState::{BothFin, ClientInit, Established, Transitory};
        let base = counted(5, 4, BothFin);
        let joined = |here: Joinable, there: Joinable| {
            let (one, other) = (here.join(&base, &there, false), there.join(&base, &here, false));
            assert_eq!(one.tcp, other.tcp);
            one.tcp
        };
        assert_eq!(joined(counted(6, 4, ClientInit), counted(5, 3, BothFin)), ClientInit);
        assert_eq!(joined(counted(7, 7440, Established), counted(5, 3, BothFin)), Established);
        // The SYN went through one side, its answer through the other.
        assert_eq!(joined(counted(6, 4, ClientInit), counted(6, 3, BothFin)), Transitory);
    }

    #[test]
    fn a_connection_that_ended_on_one_side_and_began_anew_on_the_other_goes_on() {
        use TcpState::{BothFin, ClientFin, ClientInit, Established, RemoteFin, Transitory};
        let base = counted(5, 7440, Established);
        // The client's packets go by one side already and the server's still by the other: each saw one FIN and one SYN, or one saw both
        // FINs and the other the SYN that followed.
        for old in [BothFin, ClientFin, RemoteFin, Established] {
            let (here, there) = (counted(6, 240, ClientInit), counted(8, 240, old));
            assert_eq!(here.join(&base, &there, false).tcp, Transitory, "{old:?}");
            assert_eq!(there.join(&base, &here, false).tcp, Transitory, "{old:?}");
        }
        // Who has seen nothing since knows the old connection only.
        assert_eq!(counted(6, 240, ClientInit).join(&base, &base, false).tcp, ClientInit);
    }

    #[test]
    fn a_session_that_began_anew_here_and_is_established_is_not_closed_by_the_end_of_the_old_one() {
        use TcpState::{BothFin, ClientFin, ClientInit, Established, RemoteFin, Transitory};
        let base = counted(5, 7440, Established);
        let joined = |new, old| counted(8, 7440, new).join(&base, &counted(7, 240, old), true).tcp;
        for old in [BothFin, ClientFin, RemoteFin, Transitory] {
            assert_eq!(joined(Established, old), Transitory, "{old:?}");
            assert_eq!(joined(ClientInit, old), Transitory, "{old:?}");
        }
        assert_eq!(joined(ClientInit, Established), Transitory, "its answer may have passed there");
        assert_eq!(joined(ClientFin, Established), ClientFin);
        assert_eq!(joined(BothFin, ClientFin), BothFin);
        // Nothing has passed there since.
        let silent = Joinable { tcp: BothFin, ..base };
        assert_eq!(counted(8, 7440, Established).join(&base, &silent, true).tcp, Established);
    }

    #[test]
    fn a_syn_on_each_side_is_an_established_connection() {
        let (here, there) = (counted(1, 4, TcpState::ClientInit), counted(1, 4, TcpState::RemoteInit));
        assert_eq!(here.join(&Joinable::default(), &there, false).tcp, TcpState::Established);
    }

    #[test]
    fn the_digest_sees_every_part_that_must_not_change() {
        let endpoint = |a: [u8; 4], port| Endpoint { address: IpAddr::from(a), port };
        let key = FlowKey {
            protocol: Protocol::Udp,
            client: endpoint([100, 64, 0, 1], 5000),
            remote: endpoint([203, 0, 113, 9], 53),
        };
        let fixed = Fixed::Nat44 { outside_port: 2000 };
        let all = [
            digest(&key, &fixed),
            digest(&key, &Fixed::Nat44 { outside_port: 2001 }),
            digest(&FlowKey { protocol: Protocol::Tcp, ..key }, &fixed),
            digest(&FlowKey { client: endpoint([100, 64, 0, 1], 5001), ..key }, &fixed),
            digest(&FlowKey { client: endpoint([100, 64, 0, 2], 5000), ..key }, &fixed),
            digest(&FlowKey { remote: endpoint([203, 0, 113, 9], 54), ..key }, &fixed),
            digest(&FlowKey { remote: endpoint([203, 0, 113, 8], 53), ..key }, &fixed),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    proptest! {
        #[test]
        fn joining_counts_what_each_side_saw_once(base in 0u64..1000, here in 0u64..1000, there in 0u64..1000) {
            let start = counted(base, 100, TcpState::None);
            let a = counted(base + here, 100, TcpState::None);
            let b = counted(base + there, 100, TcpState::None);
            prop_assert_eq!(a.join(&start, &b, false).packets_out, base + here + there);
            prop_assert_eq!(a.join(&start, &b, false), b.join(&start, &a, false));
        }

        #[test]
        fn it_does_not_matter_which_side_joins(
            base in (0u64..3, 0u8..8), here in (0u64..3, 0u8..8), there in (0u64..3, 0u8..8),
        ) {
            let of = |(packets, tcp): (u64, u8)| counted(packets, 100, TcpState::from_number(tcp).unwrap());
            let start = of(base);
            let (a, b) = (of((base.0 + here.0, here.1)), of((base.0 + there.0, there.1)));
            prop_assert_eq!(a.join(&start, &b, false), b.join(&start, &a, false));
        }
    }
}
