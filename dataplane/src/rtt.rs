//! Round trips read from TCP handshakes on the way: SYN to SYN-ACK for the remote side, SYN-ACK to ACK for
//! the client side. A retransmission makes a sample ambiguous, so it is left out (Karn's rule); so is what an old owner
//! relayed, which took a detour. Nothing is counted for packets of other flows.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use flow::{GroupId, Micros, Prefix, SiteId};

use crate::control::{RoundTrip, TALK_LEN_MAX, Talk, server_prefix};
use crate::packet::tcp_flags::{ACK, RST, SYN};

/// Handshakes timed at once; more are not timed.
const HANDSHAKES_MAX: usize = 65_536;
/// Prefixes in one report; more are left out.
const PREFIXES_MAX: usize = 8_192;
/// Pairs of a group and a server prefix that are counted for one report; more are left out.
const TALKS_MAX: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Handshake {
    syn: Micros,
    /// When the answer passed.
    syn_ack: Option<Micros>,
}

/// Who is at the other end of a round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Clients(GroupId),
    Servers(Prefix),
}

#[derive(Clone, Copy, Debug)]
struct Sum {
    count: u32,
    min_us: u32,
    sum_us: u64,
    answered: Option<SocketAddr>,
}

/// A packet of a timed flow.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    /// It came from the client.
    pub inside: bool,
    /// TCP flags.
    pub flags: u8,
    /// The group.
    pub group: GroupId,
    /// The remote address and port.
    pub remote: (u32, u16),
    /// The site where it came in; `None` when an old owner relayed it.
    pub ingress: Option<SiteId>,
}

/// Handshakes in hand, and round trips since the last report.
#[derive(Debug, Default)]
pub struct RoundTrips {
    open: HashMap<u32, Handshake>,
    sums: BTreeMap<(End, SiteId), Sum>,
    talks: BTreeMap<(GroupId, Prefix), u32>,
}

impl RoundTrips {
    /// The SYN of a new flow has passed; false when it is not timed.
    pub fn begin(&mut self, flow: u32, now: Micros) -> bool {
        if self.open.len() >= HANDSHAKES_MAX {
            return false;
        }
        self.open.insert(flow, Handshake { syn: now, syn_ack: None });
        true
    }

    /// The flow is gone.
    pub fn forget(&mut self, flow: u32) {
        self.open.remove(&flow);
    }

    /// A packet of a timed flow; true when its timing is over.
    pub fn packet(&mut self, flow: u32, packet: &Timed, now: Micros) -> bool {
        let Some(handshake) = self.open.get_mut(&flow) else { return true };
        let Handshake { syn, syn_ack } = *handshake;
        let Timed { inside, flags, group, remote: (address, port), ingress } = *packet;
        match (inside, flags & (SYN | ACK), syn_ack, ingress) {
            (false, both, None, Some(ingress)) if both == SYN | ACK && flags & RST == 0 => {
                handshake.syn_ack = Some(now);
                let address = IpAddr::V4(address.into());
                if let Some(server) = server_prefix(address) {
                    let answered = Some(SocketAddr::new(address, port));
                    self.add(End::Servers(server), ingress, now.since(syn), answered);
                    self.talk(group, server);
                }
                return false;
            }
            (true, ACK, Some(syn_ack), Some(ingress)) if flags & RST == 0 => {
                self.add(End::Clients(group), ingress, now.since(syn_ack), None);
            }
            // A second SYN or SYN-ACK, a reset, data out of turn, or a detour.
            _ => {}
        }
        self.open.remove(&flow);
        true
    }

    fn add(&mut self, end: End, ingress: SiteId, span: Micros, answered: Option<SocketAddr>) {
        let us = u32::try_from(span.0).unwrap_or(u32::MAX);
        if self.sums.len() >= PREFIXES_MAX && !self.sums.contains_key(&(end, ingress)) {
            return;
        }
        let none = Sum { count: 0, min_us: us, sum_us: 0, answered };
        let sum = self.sums.entry((end, ingress)).or_insert(none);
        sum.count = sum.count.saturating_add(1);
        sum.min_us = sum.min_us.min(us);
        sum.sum_us += u64::from(us);
        sum.answered = answered;
    }

    fn talk(&mut self, group: GroupId, server: Prefix) {
        if self.talks.len() < TALKS_MAX || self.talks.contains_key(&(group, server)) {
            let count = self.talks.entry((group, server)).or_insert(0);
            *count = count.saturating_add(1);
        }
    }

    /// What was seen since the last call.
    pub fn take(&mut self) -> Vec<RoundTrip> {
        let sums = std::mem::take(&mut self.sums);
        let mean = |sum: &Sum| u32::try_from(sum.sum_us / u64::from(sum.count.max(1))).unwrap_or(u32::MAX);
        sums.into_iter()
            .map(|((end, ingress), sum)| {
                let (prefix, remote, group) = match end {
                    End::Clients(group) => (group.prefix, false, Some(group)),
                    End::Servers(prefix) => (prefix, true, None),
                };
                let Sum { count, min_us, answered, .. } = sum;
                RoundTrip { prefix, remote, group, ingress, answered, count, min_us, mean_us: mean(&sum) }
            })
            .collect()
    }

    /// Whom groups have talked to since the last call.
    pub fn take_talks(&mut self) -> Vec<Talk> {
        let mut talks: Vec<Talk> = Vec::new();
        for ((group, server), count) in std::mem::take(&mut self.talks) {
            match talks.last_mut().filter(|last| last.group == group) {
                Some(last) => last.servers.push((server, count)),
                None => talks.push(Talk { group, servers: vec![(server, count)] }),
            }
        }
        for talk in &mut talks {
            talk.servers.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
            talk.servers.truncate(TALK_LEN_MAX);
        }
        talks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(n: u8) -> GroupId {
        format!("1:100.64.{n}.0/24").parse().unwrap()
    }

    /// A whole handshake of a flow with server number `n`, both answers from the same kind of way.
    fn shake(trips: &mut RoundTrips, flow: u32, n: u32, ingress: Option<SiteId>) {
        let packet = Timed {
            inside: false,
            flags: SYN | ACK,
            group: group(1),
            remote: (0xcb00_7100 + (n << 8), 443),
            ingress,
        };
        assert!(trips.begin(flow, Micros(0)));
        let over = trips.packet(flow, &packet, Micros(20_000));
        assert_eq!(over, ingress.is_none());
        trips.packet(flow, &Timed { inside: true, flags: ACK, ..packet }, Micros(25_000));
    }

    #[test]
    fn round_trips_are_told_apart_by_where_the_answer_came_in() {
        let mut trips = RoundTrips::default();
        shake(&mut trips, 1, 0, Some(SiteId(0)));
        shake(&mut trips, 2, 0, Some(SiteId(1)));
        shake(&mut trips, 3, 0, Some(SiteId(1)));
        let seen: Vec<_> =
            trips.take().iter().map(|trip| (trip.remote, trip.ingress.0, trip.count)).collect();
        assert_eq!(seen, [(false, 0, 1), (false, 1, 2), (true, 0, 1), (true, 1, 2)]);
        assert_eq!(trips.take(), []);
    }

    #[test]
    fn what_an_old_owner_relayed_is_not_timed() {
        let mut trips = RoundTrips::default();
        shake(&mut trips, 1, 0, None);
        assert_eq!((trips.take(), trips.take_talks()), (vec![], vec![]));
        assert!(trips.open.is_empty());
    }

    #[test]
    fn of_the_servers_of_a_group_those_with_most_handshakes_are_told() {
        let mut trips = RoundTrips::default();
        for n in 0..12 {
            (0..=n).for_each(|flow| shake(&mut trips, flow, n, Some(SiteId(0))));
        }
        let talks = trips.take_talks();
        assert_eq!((talks.len(), talks[0].group, talks[0].servers.len()), (1, group(1), TALK_LEN_MAX));
        assert_eq!(talks[0].servers[0], ("203.0.124.0/24".parse().unwrap(), 12));
        assert!(talks[0].servers.iter().all(|(_, count)| *count > 4));
        let answered = trips.take().iter().filter_map(|trip| trip.answered).next_back();
        assert_eq!(answered, Some("203.0.124.0:443".parse().unwrap()));
    }
}
