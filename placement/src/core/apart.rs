//! Groups of different labels that are never in one failure domain: `separate` rules.
//!
//! Each domain belongs to one label of a rule. One where groups of a single label are stays theirs until they have left;
//! others go to the label that loses most without, as long as every group of every label keeps a site that it may have. So
//! nobody waits for a place that another holds while that one waits for the first.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use flow::{GroupId, Prefix, SiteId};

use super::model::{Cluster, Site};
use super::policy::{Kind, Policy, Rule};
use super::rules::SiteSet;

/// Ways that are tried before the answer is left open.
const TRIES_MAX: u32 = 20_000;

/// The rules with their labels.
pub(super) struct Apart<'a> {
    policy: &'a Policy,
    rules: Vec<(&'a Rule, Vec<&'a str>)>,
}

/// A label of a rule, with what its groups want. Domains by index.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Side {
    /// Sites that groups may have; each set that occurs, once.
    pub(super) needs: BTreeSet<SiteSet>,
    /// Groups in each domain.
    pub(super) held: Vec<usize>,
    /// What it would lose without the domain.
    pub(super) worth: Vec<f64>,
}

impl<'a> Apart<'a> {
    pub(super) fn new(policy: &'a Policy) -> Self {
        let labels = |rule: &'a Rule| {
            let Kind::Separate(labels) = &rule.kind else { return None };
            Some((rule, labels.iter().map(String::as_str).collect()))
        };
        Self { policy, rules: policy.rules.iter().filter_map(labels).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rules by number here, with how many labels each has.
    pub(super) fn rules(&self) -> impl Iterator<Item = (&'a Rule, usize)> {
        self.rules.iter().map(|(rule, labels)| (*rule, labels.len()))
    }

    /// In which rules a group has a label, and which.
    pub(super) fn sides(&self, group: &GroupId) -> Vec<(usize, usize)> {
        let within = |label: &&str| self.prefixes(label).iter().any(|prefix| prefix.covers(&group.prefix));
        let side = |(rule, (_, labels)): (usize, &(&Rule, Vec<&str>))| {
            Some((rule, labels.iter().position(&within)?))
        };
        self.rules.iter().enumerate().filter_map(side).collect()
    }

    fn prefixes(&self, label: &str) -> &'a [Prefix] {
        self.policy.labels.get(label).map_or(&[], Vec::as_slice)
    }

    /// The rule against a group at a site: groups of another of its labels are in that domain, or on their way there, and
    /// none of the group's own.
    pub(super) fn forbidding(&self, cluster: &Cluster, group: &GroupId, to: SiteId) -> Option<&'a Rule> {
        self.forbidding_with(cluster, &BTreeMap::new(), group, to)
    }

    /// The same when some groups are about to go elsewhere.
    pub(super) fn forbidding_with(
        &self,
        cluster: &Cluster,
        going: &BTreeMap<GroupId, SiteId>,
        group: &GroupId,
        to: SiteId,
    ) -> Option<&'a Rule> {
        let domain = cluster.sites.get(&to).map(Site::domain)?;
        let there = |site: SiteId| cluster.sites.get(&site).is_some_and(|site| site.domain() == domain);
        let against = |(rule, own): &(usize, usize)| {
            let (_, labels) = &self.rules[*rule];
            let holds = |label: &str| {
                self.members(cluster, label).any(|member| {
                    let moving = || cluster.move_of(&member).map(|present| present.to);
                    let target = going.get(&member).copied().or_else(moving);
                    let owner = cluster.groups.get(&member).map(|group| group.owner);
                    member != *group && target.or(owner).is_some_and(there)
                })
            };
            let other = |(n, label): (usize, &&str)| n != *own && holds(label);
            labels.iter().enumerate().any(other) && !holds(labels[*own])
        };
        self.sides(group).iter().find(|side| against(side)).map(|(rule, _)| self.rules[*rule].0)
    }

    /// The groups of a label.
    fn members<'c>(&self, cluster: &'c Cluster, label: &str) -> impl Iterator<Item = GroupId> + use<'c, 'a> {
        let services = cluster.services.keys().copied();
        self.prefixes(label).iter().flat_map(move |&prefix| {
            services.clone().flat_map(move |service| {
                let first = GroupId { service, prefix };
                let range = cluster.groups.range((Bound::Included(first), Bound::Unbounded));
                let within = move |id: &&GroupId| id.service == service && prefix.covers(&id.prefix);
                range.map(|(id, _)| id).take_while(within).copied()
            })
        })
    }
}

/// Which label gets each domain; `sides` are the labels. Every group keeps a site where that can be.
pub(super) fn share_out(domains: &[SiteSet], sides: &[Side]) -> Vec<usize> {
    let mut owner: Vec<Option<usize>> = (0..domains.len()).map(|domain| holder(domain, sides)).collect();
    let mut owned = sides_of(domains, &owner, sides.len());
    if !all_met(&owned, sides) {
        // What is held may stand in the way; then the groups that stand there have to go.
        let mut tries = TRIES_MAX;
        let needs: Vec<(usize, SiteSet)> = needs(sides);
        let mut found = owner.clone();
        let mut free = vec![None; domains.len()];
        if search(domains, sides, &needs, &mut found, &mut tries) {
            owner = found;
        } else if search(domains, sides, &needs, &mut free, &mut tries) {
            owner = free;
        }
        owned = sides_of(domains, &owner, sides.len());
    }
    for domain in 0..domains.len() {
        if owner[domain].is_none() {
            let best = best(domain, sides, &owned);
            owner[domain] = Some(best);
            owned[best] = owned[best].or(domains[domain]);
        }
    }
    owner.into_iter().map(|side| side.unwrap_or(0)).collect()
}

/// The label whose groups are in a domain; where several are, the one that loses most.
fn holder(domain: usize, sides: &[Side]) -> Option<usize> {
    let holding = (0..sides.len()).filter(|&side| sides[side].held[domain] > 0);
    holding.max_by(|&a, &b| {
        let (one, other) = (&sides[a], &sides[b]);
        one.worth[domain]
            .total_cmp(&other.worth[domain])
            .then(one.held[domain].cmp(&other.held[domain]))
            .then(b.cmp(&a))
    })
}

/// The label that wants a free domain most; where none does, the one with the fewest sites.
fn best(domain: usize, sides: &[Side], owned: &[SiteSet]) -> usize {
    let order = |&a: &usize, &b: &usize| {
        let worth = sides[a].worth[domain].total_cmp(&sides[b].worth[domain]);
        worth.then(owned[b].len().cmp(&owned[a].len())).then(b.cmp(&a))
    };
    (0..sides.len()).max_by(order).unwrap_or(0)
}

fn sides_of(domains: &[SiteSet], owner: &[Option<usize>], sides: usize) -> Vec<SiteSet> {
    let mut owned = vec![SiteSet::NONE; sides];
    for (domain, side) in domains.iter().zip(owner) {
        if let Some(side) = side {
            owned[*side] = owned[*side].or(*domain);
        }
    }
    owned
}

fn all_met(owned: &[SiteSet], sides: &[Side]) -> bool {
    sides.iter().zip(owned).all(|(side, owned)| side.needs.iter().all(|need| !need.and(*owned).is_empty()))
}

/// What has to be met, the narrowest first.
fn needs(sides: &[Side]) -> Vec<(usize, SiteSet)> {
    let all = sides.iter().enumerate().flat_map(|(n, side)| side.needs.iter().map(move |need| (n, *need)));
    let mut needs: Vec<(usize, SiteSet)> = all.collect();
    needs.sort_by_key(|(side, need)| (need.len(), *side, *need));
    needs
}

/// Gives free domains to labels until every need is met, the dearest first; false when there is no way, or none was found
/// within the tries.
fn search(
    domains: &[SiteSet],
    sides: &[Side],
    needs: &[(usize, SiteSet)],
    owner: &mut Vec<Option<usize>>,
    tries: &mut u32,
) -> bool {
    let Some((&(side, need), rest)) = needs.split_first() else { return true };
    let met = |domain: usize| !need.and(domains[domain]).is_empty();
    if (0..domains.len()).any(|domain| owner[domain] == Some(side) && met(domain)) {
        return search(domains, sides, rest, owner, tries);
    }
    let mut options: Vec<usize> =
        (0..domains.len()).filter(|&domain| owner[domain].is_none() && met(domain)).collect();
    let worth = |domain: usize| sides[side].worth[domain];
    options.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(a.cmp(&b)));
    for domain in options {
        if *tries == 0 {
            return false;
        }
        *tries -= 1;
        owner[domain] = Some(side);
        if search(domains, sides, rest, owner, tries) {
            return true;
        }
        owner[domain] = None;
    }
    false
}

/// Whether every group of every label could have a site; also true where that is not known after many tries.
pub(super) fn is_possible(domains: &[SiteSet], sides: &[Side]) -> bool {
    let mut tries = TRIES_MAX;
    let mut owner = vec![None; domains.len()];
    search(domains, sides, &needs(sides), &mut owner, &mut tries) || tries == 0
}

impl Side {
    /// Of a label that nobody has seen yet, in so many domains.
    pub(super) fn new(domains: usize) -> Self {
        Self { needs: BTreeSet::new(), held: vec![0; domains], worth: vec![0.0; domains] }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(bits: u8) -> SiteSet {
        SiteSet::of((0..8).map(SiteId).filter(|site| bits & 1 << site.0 != 0).collect::<Vec<_>>().iter())
    }

    fn side(needs: &[u8], held: [usize; 4], worth: [f64; 4]) -> Side {
        let needs = needs.iter().map(|&need| set(need)).collect();
        Side { needs, held: held.to_vec(), worth: worth.to_vec() }
    }

    fn four() -> Vec<SiteSet> {
        (0..4).map(|n| set(1 << n)).collect()
    }

    #[test]
    fn a_domain_stays_with_those_who_are_there() {
        let a = side(&[15], [3, 0, 0, 0], [1.0, 9.0, 0.0, 0.0]);
        let b = side(&[15], [0, 2, 0, 0], [9.0, 1.0, 5.0, 0.0]);
        assert_eq!(share_out(&four(), &[a, b]), [0, 1, 1, 0]);
    }

    #[test]
    fn who_loses_most_gets_what_both_are_in() {
        let a = side(&[15], [3, 0, 0, 0], [1.0, 0.0, 0.0, 0.0]);
        let b = side(&[15], [1, 0, 0, 0], [9.0, 0.0, 0.0, 0.0]);
        assert_eq!(share_out(&four(), &[a, b])[0], 1);
    }

    #[test]
    fn nobody_is_left_without_a_site_though_another_holds_it() {
        let a = side(&[15], [3, 0, 0, 0], [9.0, 0.0, 0.0, 0.0]);
        let b = side(&[1], [0, 2, 0, 0], [0.0; 4]);
        let owner = share_out(&four(), &[a, b]);
        assert_eq!(owner[0], 1);
        assert!(owner.contains(&0));
    }

    proptest! {
        /// Against all ways to share four domains out.
        #[test]
        fn every_need_is_met_exactly_when_there_is_a_way(
            sides in proptest::collection::vec(
                (proptest::collection::vec(1_u8..16, 0..3), [0_usize..2, 0..2, 0..2, 0..2], [0_u8..9, 0..9, 0..9, 0..9]),
                2..4,
            ),
        ) {
            let sides: Vec<Side> =
                sides.into_iter().map(|(needs, held, worth)| side(&needs, held, worth.map(f64::from))).collect();
            let domains = four();
            let ways = sides.len().pow(4);
            let possible = (0..ways).any(|way| {
                let owner: Vec<Option<usize>> =
                    (0..4).map(|domain| Some(way / sides.len().pow(domain) % sides.len())).collect();
                all_met(&sides_of(&domains, &owner, sides.len()), &sides)
            });
            prop_assert_eq!(is_possible(&domains, &sides), possible);
            let owner: Vec<Option<usize>> = share_out(&domains, &sides).into_iter().map(Some).collect();
            prop_assert_eq!(all_met(&sides_of(&domains, &owner, sides.len()), &sides), possible);
        }
    }
}
