//! Peers that are alive, as placement hears of them, and that this agent has no connection to: the path between the two is cut, or
//! one of them refuses the other.

use std::collections::{BTreeMap, BTreeSet};

use flow::{Micros, SiteId};

/// A peer that comes back is connected to within five seconds for an attempt that began before, and three of pause.
const UNREACHED_MIN: Micros = Micros(10_000_000);

/// Since when which peers have not been reached.
#[derive(Debug, Default)]
pub(super) struct Unreached {
    since: BTreeMap<SiteId, Micros>,
}

impl Unreached {
    /// Takes the sites that are alive and not connected to; gives those that have been so for too long, and for how long.
    pub(super) fn look(&mut self, away: &BTreeSet<SiteId>, now: Micros) -> Vec<(SiteId, Micros)> {
        self.since.retain(|site, _| away.contains(site));
        for site in away {
            self.since.entry(*site).or_insert(now);
        }
        let spans = self.since.iter().map(|(site, since)| (*site, now.since(*since)));
        spans.filter(|(_, span)| *span >= UNREACHED_MIN).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEERS: [SiteId; 2] = [SiteId(2), SiteId(3)];

    fn at(ms: u64) -> Micros {
        Micros(5_000_000 + ms * 1_000)
    }

    #[test]
    fn a_peer_that_is_alive_and_not_connected_to_for_ten_seconds_is_told_until_it_is() {
        let mut unreached = Unreached::default();
        let both = BTreeSet::from(PEERS);
        assert_eq!(unreached.look(&both, at(0)), []);
        assert_eq!(unreached.look(&both, at(9_999)), []);
        let one = BTreeSet::from([PEERS[1]]);
        assert_eq!(unreached.look(&one, at(10_000)), [(PEERS[1], Micros(10_000_000))]);
        assert_eq!(unreached.look(&both, at(12_500)), [(PEERS[1], Micros(12_500_000))], "the other anew");
        assert_eq!(unreached.look(&BTreeSet::new(), at(13_000)), []);
        assert_eq!(unreached.look(&both, at(14_000)), []);
    }
}
