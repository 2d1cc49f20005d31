//! Groups that are not to be all in one place: which rule speaks of which group, how many each place may have, and who is there.
//!
//! Of `spread` rules the most specific holds, so a group counts for one at most. A group that moves counts at its target.

use std::collections::BTreeMap;

use flow::{GroupId, SiteId};

use super::model::{Cluster, Domain};
use super::policy::{Kind, Place, Policy};
use super::rules::{Rules, SiteSet};

/// The groups of a rule, by the place where they are.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Spreading {
    /// Number of the rule in the policy.
    pub(super) rule: u16,
    /// Sites of each place.
    pub(super) places: Vec<SiteSet>,
    /// Groups in each place.
    pub(super) present: Vec<usize>,
    /// How many each may have.
    pub(super) limit: usize,
}

impl Spreading {
    /// The place of a site; none for a site that is not known.
    pub(super) fn place(&self, site: SiteId) -> Option<usize> {
        self.places.iter().position(|place| place.contains(site))
    }

    /// Whether one more group may come to a site.
    pub(super) fn has_room(&self, site: SiteId) -> bool {
        self.place(site).is_some_and(|place| self.present[place] < self.limit)
    }

    /// Whether there are more groups where a site is than there may be.
    pub(super) fn is_over(&self, site: SiteId) -> bool {
        self.place(site).is_some_and(|place| self.present[place] > self.limit)
    }

    /// A group goes from one site to another.
    pub(super) fn shift(&mut self, from: Option<SiteId>, to: Option<SiteId>) {
        for (site, by) in [(from, -1), (to, 1)] {
            if let Some(place) = site.and_then(|site| self.place(site)) {
                self.present[place] = self.present[place].saturating_add_signed(by);
            }
        }
    }
}

/// All spread rules with their groups; empty without such rules. One pass over the groups.
pub(super) fn spreadings(cluster: &Cluster) -> Vec<Spreading> {
    let policy = &cluster.policy;
    let numbered = (0..).zip(&policy.rules);
    let of = |(rule, kind): (u16, &Kind)| {
        let Kind::Spread(spread) = kind else { return None };
        Some((rule, spread.by))
    };
    let wanted: Vec<(u16, Place)> = numbered.filter_map(|(n, rule)| of((n, &rule.kind))).collect();
    let mut found: Vec<Spreading> = wanted
        .into_iter()
        .map(|(rule, by)| {
            let places = places(cluster, by);
            Spreading { rule, present: vec![0; places.len()], places, limit: usize::MAX }
        })
        .collect();
    if found.is_empty() {
        return found;
    }
    let mut members = vec![0; found.len()];
    let index = Index::new(policy);
    for group in cluster.groups.values() {
        let Some(at) = index.of(&group.id, &found) else { continue };
        members[at] += 1;
        let site = cluster.move_of(&group.id).map_or(group.owner, |present| present.to);
        if let Some(place) = found[at].place(site) {
            found[at].present[place] += 1;
        }
    }
    for (spreading, members) in found.iter_mut().zip(members) {
        if let Kind::Spread(spread) = &policy.rules[usize::from(spreading.rule)].kind {
            spreading.limit = spread.limit(members);
        }
    }
    found
}

/// Looks for the spread rule of a group.
pub(super) struct Index<'a> {
    rules: Rules<'a>,
}

impl<'a> Index<'a> {
    pub(super) fn new(policy: &'a Policy) -> Self {
        Self { rules: Rules::new(policy) }
    }

    /// Which of the spreadings a group counts for.
    pub(super) fn of(&self, group: &GroupId, all: &[Spreading]) -> Option<usize> {
        let mut covering = Vec::new();
        self.rules.covering(group, &mut covering);
        let rule = self.rules.spread_of(&covering)?;
        all.iter().position(|spreading| spreading.rule == rule)
    }
}

/// The sites of each place, in the order of the first site of each.
pub(super) fn places(cluster: &Cluster, by: Place) -> Vec<SiteSet> {
    let mut places: Vec<SiteSet> = Vec::new();
    let mut known: BTreeMap<Domain<'_>, usize> = BTreeMap::new();
    for site in cluster.sites.values() {
        let name = match by {
            Place::Site => Domain::Own(site.id),
            Place::Domain => site.domain(),
        };
        let at = *known.entry(name).or_insert_with(|| {
            places.push(SiteSet::NONE);
            places.len() - 1
        });
        places[at] = places[at].or(SiteSet::of([&site.id]));
    }
    places
}

/// Whether so many groups fit into places of so many each, when the groups of a kind may only be in some of them: `kinds` has the
/// sites that each kind may have, and how many groups it has. By augmenting paths.
pub(super) fn fits(places: &[SiteSet], limit: usize, kinds: &[(SiteSet, usize)]) -> bool {
    let mut taken: Vec<Vec<usize>> = vec![vec![0; places.len()]; kinds.len()];
    for kind in 0..kinds.len() {
        let mut left = kinds[kind].1;
        while left > 0 {
            let sent = augment(places, limit, kinds, &mut taken, (kind, left));
            if sent == 0 {
                return false;
            }
            left -= sent;
        }
    }
    true
}

/// Sends up to so many groups of a kind to places along the shortest way, others making way; returns how many.
fn augment(
    places: &[SiteSet],
    limit: usize,
    kinds: &[(SiteSet, usize)],
    taken: &mut [Vec<usize>],
    (start, wanted): (usize, usize),
) -> usize {
    // How a place was reached: by which kind, and from which place that kind makes way.
    let mut reached: Vec<Option<(usize, Option<usize>)>> = vec![None; places.len()];
    let mut queue = std::collections::VecDeque::from([(start, None)]);
    while let Some((kind, from)) = queue.pop_front() {
        for place in 0..places.len() {
            if reached[place].is_some() || kinds[kind].0.and(places[place]).is_empty() {
                continue;
            }
            reached[place] = Some((kind, from));
            let used: usize = taken.iter().map(|by| by[place]).sum();
            if used < limit {
                return follow(&reached, taken, place, wanted.min(limit - used));
            }
            queue.extend((0..kinds.len()).filter(|&k| taken[k][place] > 0).map(|k| (k, Some(place))));
        }
    }
    0
}

fn follow(
    reached: &[Option<(usize, Option<usize>)>],
    taken: &mut [Vec<usize>],
    end: usize,
    most: usize,
) -> usize {
    let mut way = Vec::new();
    let mut at = Some(end);
    let mut sent = most;
    while let Some(place) = at
        && let Some((kind, from)) = reached[place]
    {
        if let Some(from) = from {
            sent = sent.min(taken[kind][from]);
        }
        way.push((kind, from, place));
        at = from;
    }
    for (kind, from, to) in way {
        taken[kind][to] += sent;
        if let Some(from) = from {
            taken[kind][from] -= sent;
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(bits: u8) -> SiteSet {
        SiteSet::of((0..8).map(SiteId).filter(|site| bits & 1 << site.0 != 0).collect::<Vec<_>>().iter())
    }

    /// Every way to put groups of kinds into four places.
    fn fits_by_trying(limit: usize, kinds: &[(u8, usize)], used: &mut [usize; 4]) -> bool {
        let Some((&(may, count), rest)) = kinds.split_first() else { return true };
        if count == 0 {
            return fits_by_trying(limit, rest, used);
        }
        let less: Vec<(u8, usize)> = std::iter::once((may, count - 1)).chain(rest.iter().copied()).collect();
        (0..4).any(|place| {
            if may & 1 << place == 0 || used[place] == limit {
                return false;
            }
            used[place] += 1;
            let fits = fits_by_trying(limit, &less, used);
            used[place] -= 1;
            fits
        })
    }

    proptest! {
        #[test]
        fn groups_fit_exactly_when_there_is_a_way(
            limit in 1usize..3,
            kinds in proptest::collection::vec((0_u8..16, 0usize..4), 1..4),
        ) {
            let places: Vec<SiteSet> = (0..4).map(|n| set(1 << n)).collect();
            let sets: Vec<(SiteSet, usize)> = kinds.iter().map(|&(may, n)| (set(may), n)).collect();
            prop_assert_eq!(fits(&places, limit, &sets), fits_by_trying(limit, &kinds, &mut [0; 4]));
        }
    }
}
