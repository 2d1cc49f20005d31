//! Sites that are not where their configuration says: what was measured between them and others cannot be, or hardly can.
//!
//! The way between two sites is measured all the time. Nothing is faster than light on the great circle; and what is usual is known with
//! its spread (the line of [`super::prior`]). One odd way may be a detour, and a site all of whose ways are longer by the same is connected
//! badly; one whose ways are odd otherwise, while the others agree without it, is somewhere else: a sign is wrong, latitude and longitude
//! are exchanged, or the lines of another site were copied.

use std::collections::BTreeMap;

use flow::{Micros, SiteId};

use super::prior::{LIGHT_KM_PER_MS, LINE_SD_SHARE, great_circle_km};
use super::{Model, pair};
use crate::core::model::Site;
use crate::likeness::{Line, OFFSET_MS};

/// Mean of the squares of a site's deviations from the line, in variances, above which its position is not believed; the more ways it has, the
/// less of it may be chance. By chance alone it is 1; at 3.5 ways are 1.7 times as long as usual or as short.
const ODD_MEAN: f64 = 3.5;
const ODD_MEAN_BY_WAYS: f64 = 3.0;
/// Ways that say so, at least; one alone says so only if it cannot be.
const ODD_WAYS: usize = 2;
/// What counts for a way that cannot be.
const IMPOSSIBLE: f64 = 100.0;
/// Positions are given to some kilometres, and clocks to some microseconds: below light by more than this, round trip in milliseconds.
const LIGHT_SLACK_MS: f64 = 1.0;

/// A site whose position what was measured contradicts.
#[derive(Clone, Debug, PartialEq)]
pub struct Misplaced {
    /// The site.
    pub site: SiteId,
    /// The other end of the way that contradicts most.
    pub peer: SiteId,
    /// The round trip that was measured between the two, in milliseconds.
    pub measured_ms: f64,
    /// The round trip that is usual for their distance, in milliseconds.
    pub usual_ms: f64,
    /// The round trip of light on the great circle, in milliseconds: no real one is less.
    pub least_ms: f64,
    /// It may be the peer whose position is wrong: only this way says so.
    pub or_peer: bool,
}

impl Misplaced {
    /// Whose position may be wrong.
    pub fn suspects(&self) -> impl Iterator<Item = SiteId> + use<> {
        std::iter::once(self.site).chain(self.or_peer.then_some(self.peer))
    }

    /// What contradicts what, for people.
    #[must_use]
    pub fn describe(&self, sites: &BTreeMap<SiteId, Site>) -> String {
        let name = |id: SiteId| sites.get(&id).map_or_else(|| id.to_string(), |site| site.name.clone());
        let (site, peer) = (name(self.site), name(self.peer));
        let who = if self.or_peer { format!("{site} or {peer}") } else { site.clone() };
        let Self { measured_ms, usual_ms, least_ms, .. } = self;
        let wanted = if measured_ms < least_ms {
            format!("light needs {least_ms:.1} ms for their distance")
        } else {
            format!("{usual_ms:.1} ms are usual for their distance")
        };
        format!(
            "{who} seems not to be where the latitude and longitude say: the round trip between {site} and {peer} is {measured_ms:.1} ms, \
             and {wanted}"
        )
    }
}

/// A measured way between two sites with positions.
struct Way {
    ends: (SiteId, SiteId),
    measured_ms: f64,
    usual_ms: f64,
    least_ms: f64,
    odd: f64,
}

impl Way {
    fn new(a: &Site, b: &Site, measured_ms: f64) -> Option<Self> {
        let km = great_circle_km(a.coordinates()?, b.coordinates()?);
        let (usual_ms, least_ms) = (f64::from(Line.ms(km as f32)), 2.0 * km / LIGHT_KM_PER_MS);
        Some(Self { ends: (a.id, b.id), measured_ms, usual_ms, least_ms, odd: 0.0 })
    }

    /// How odd it is, when it may be longer at either end by what all ways there are.
    fn judge(&mut self, longer: &BTreeMap<SiteId, f64>) {
        let [a, b] = [self.ends.0, self.ends.1].map(|end| longer.get(&end).copied().unwrap_or(0.0));
        let offset = f64::from(OFFSET_MS);
        let odd = |more: f64| {
            let off = ((self.measured_ms + offset) / (self.usual_ms + more + offset)).ln() / LINE_SD_SHARE;
            off * off
        };
        let least = [0.0, a, b, a + b].map(odd).into_iter().fold(IMPOSSIBLE, f64::min);
        self.odd = if self.measured_ms + LIGHT_SLACK_MS < self.least_ms { IMPOSSIBLE } else { least };
    }

    fn other(&self, site: SiteId) -> Option<SiteId> {
        let (a, b) = self.ends;
        if a == site { Some(b) } else { (b == site).then_some(a) }
    }
}

impl Model {
    /// Sites whose positions what was measured between them and others contradicts. Work grows with the pairs of sites.
    #[must_use]
    pub fn misplaced(&self, sites: &BTreeMap<SiteId, Site>, now: Micros) -> Vec<Misplaced> {
        let measured = |a: &Site, b: &Site| {
            let (guess, _) = self.between.get(&pair(a.id, b.id))?.guess(now)?;
            Way::new(a, b, guess.ms)
        };
        let later = |a: &Site| sites.range((std::ops::Bound::Excluded(a.id), std::ops::Bound::Unbounded));
        let ways = sites.values().flat_map(|a| later(a).filter_map(move |(_, b)| measured(a, b)));
        let mut ways: Vec<Way> = ways.collect();
        let longer = longer(&ways);
        ways.iter_mut().for_each(|way| way.judge(&longer));
        contradicted(ways)
    }
}

/// By how many milliseconds half of the ways of each site, or more, are longer than usual.
fn longer(ways: &[Way]) -> BTreeMap<SiteId, f64> {
    let mut excess: BTreeMap<SiteId, Vec<f64>> = BTreeMap::new();
    for way in ways {
        for end in [way.ends.0, way.ends.1] {
            excess.entry(end).or_default().push(way.measured_ms - way.usual_ms);
        }
    }
    let median = |mut all: Vec<f64>| {
        all.sort_unstable_by(f64::total_cmp);
        all.get((all.len() - 1) / 2).map_or(0.0, |median| median.max(0.0))
    };
    excess.into_iter().map(|(site, all)| (site, median(all))).collect()
}

/// Of each site the sum over its ways of how odd they are, and how many they are.
type Sums = BTreeMap<SiteId, (f64, usize)>;

/// The site with the oddest ways, then that of the rest, until the others agree.
fn contradicted(mut ways: Vec<Way>) -> Vec<Misplaced> {
    let (mut found, mut sums) = (Vec::new(), Sums::new());
    for way in &ways {
        for end in [way.ends.0, way.ends.1] {
            let (sum, count) = sums.get(&end).copied().unwrap_or_default();
            sums.insert(end, (sum + way.odd, count + 1));
        }
    }
    while let Some((site, alone)) = oddest(&sums) {
        let of_site = ways.iter().filter_map(|way| Some((way, way.other(site)?)));
        let Some((worst, peer)) = of_site.clone().max_by(|(a, _), (b, _)| a.odd.total_cmp(&b.odd)) else {
            break;
        };
        let Way { measured_ms, usual_ms, least_ms, .. } = *worst;
        found.push(Misplaced { site, peer, measured_ms, usual_ms, least_ms, or_peer: alone });
        for (way, peer) in of_site {
            if let Some(sum) = sums.get_mut(&peer) {
                *sum = (sum.0 - way.odd, sum.1 - 1);
            }
        }
        sums.retain(|id, (_, count)| *id != site && *count > 0);
        ways.retain(|way| way.other(site).is_none());
    }
    found
}

/// The site whose ways are oddest, if they are too odd, and whether it has only one.
fn oddest(sums: &Sums) -> Option<(SiteId, bool)> {
    let is_odd = |(sum, count): (f64, usize)| {
        sum > ODD_MEAN * count as f64 + ODD_MEAN_BY_WAYS && (count >= ODD_WAYS || sum >= IMPOSSIBLE)
    };
    let odd = sums.iter().filter(|(_, sum)| is_odd(**sum));
    let first = |(a, one): &(&SiteId, &(f64, usize)), (b, other): &(&SiteId, &(f64, usize))| {
        mean(**one).total_cmp(&mean(**other)).then(b.cmp(a))
    };
    let (site, (_, count)) = odd.max_by(first)?;
    Some((*site, *count < ODD_WAYS))
}

fn mean((sum, count): (f64, usize)) -> f64 {
    sum / count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::Admin;
    use crate::core::report::{PeerRtt, SiteReport};

    const AMSTERDAM: (f64, f64) = (52.4, 4.9);
    const VIRGINIA: (f64, f64) = (38.9, -77.5);
    const SINGAPORE: (f64, f64) = (1.3, 103.8);
    const SYDNEY: (f64, f64) = (-33.9, 151.2);

    fn site(id: u8, at: Option<(f64, f64)>) -> Site {
        Site {
            id: SiteId(id),
            name: format!("site-{id}"),
            latitude: at.map(|at| at.0),
            longitude: at.map(|at| at.1),
            endpoint: "x:1".into(),
            capacity_pps: 1,
            capacity_flows: None,
            capacity_bps: None,
            failure_domain: None,
            admin: Admin::Active,
            alive: true,
        }
    }

    /// Sites at these places whose configurations say that they are at those; what is measured between them is `ms` of the way.
    fn found(truth: &[(f64, f64)], said: &[Option<(f64, f64)>], ms: impl Fn(f64) -> f64) -> Vec<Misplaced> {
        let mut model = Model::new(None);
        for (a, from) in (0..).zip(truth) {
            let others = (0..).zip(truth).filter(|(b, _)| *b != a);
            let rtt = |to: &(f64, f64)| (ms(great_circle_km(*from, *to)) * 1_000.0) as u32;
            let peers = others.map(|(b, to)| PeerRtt { site: SiteId(b), rtt_us: rtt(to) }).collect();
            model.handle_report(&SiteReport { site: SiteId(a), peers, ..SiteReport::default() }, Micros(0));
        }
        let sites = (0..).zip(said).map(|(id, at)| (SiteId(id), site(id, *at))).collect();
        model.misplaced(&sites, Micros(0))
    }

    fn usual(km: f64) -> f64 {
        Line.ms(km as f32).into()
    }

    fn named(found: &[Misplaced]) -> Vec<(u8, bool)> {
        found.iter().map(|one| (one.site.0, one.or_peer)).collect()
    }

    #[test]
    fn sites_where_their_configurations_say_are_believed_on_usual_ways_and_on_long_ones() {
        let truth = [AMSTERDAM, VIRGINIA, SINGAPORE, SYDNEY];
        let said = truth.map(Some);
        for share in [0.7, 1.0, 1.7] {
            assert_eq!(found(&truth, &said, |km| usual(km) * share), [], "{share}");
        }
    }

    #[test]
    fn a_site_with_the_position_of_another_or_on_the_other_side_of_the_earth_is_found() {
        let truth = [AMSTERDAM, VIRGINIA, SINGAPORE];
        for wrong in [SINGAPORE, (-VIRGINIA.0, -VIRGINIA.1)] {
            let said = [Some(AMSTERDAM), Some(wrong), Some(SINGAPORE)];
            let found = found(&truth, &said, usual);
            assert_eq!(named(&found), [(1, false)], "{wrong:?}: {found:?}");
        }
    }

    #[test]
    fn two_that_are_wrong_are_both_found_where_enough_are_right() {
        let tokyo = (35.7, 139.7);
        let truth = [AMSTERDAM, VIRGINIA, SINGAPORE, SYDNEY, tokyo, (-23.5, -46.6)];
        let said =
            [Some(SYDNEY), Some(VIRGINIA), Some(SINGAPORE), Some(SYDNEY), Some(VIRGINIA), Some(truth[5])];
        let mut found = named(&found(&truth, &said, usual));
        found.sort_unstable();
        assert_eq!(found, [(0, false), (4, false)]);
    }

    #[test]
    fn of_two_sites_either_may_be_wrong_and_only_what_cannot_be_says_so() {
        let said = [Some(AMSTERDAM), Some(SYDNEY)];
        let found_with = |ms: f64| found(&[AMSTERDAM, VIRGINIA], &said, |_| ms);
        assert_eq!(named(&found_with(80.0)), [(0, true)]);
        assert_eq!(found_with(900.0), []);
        let Misplaced { peer, measured_ms, least_ms, .. } = found_with(80.0)[0].clone();
        assert_eq!((peer, measured_ms), (SiteId(1), 80.0));
        assert!((110.0..112.0).contains(&least_ms), "{least_ms}");
        let sites = [(SiteId(0), site(0, said[0])), (SiteId(1), site(1, said[1]))].into();
        let what = found_with(80.0)[0].describe(&sites);
        assert!(what.starts_with("site-0 or site-1 seems not to be where"), "{what}");
        assert!(what.contains("is 80.0 ms, and light needs 111."), "{what}");
    }

    #[test]
    fn a_site_without_a_position_is_not_wrong() {
        assert_eq!(found(&[AMSTERDAM, VIRGINIA], &[Some(AMSTERDAM), None], |_| 0.1), []);
    }
}
