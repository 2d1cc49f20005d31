//! The rules of a policy, ready for many groups: which cover a group, and what they say together.

use std::collections::{BTreeMap, BTreeSet};

use flow::{GroupId, Micros, Prefix, ServiceId, SiteId};

use super::apart::{self, Apart, Side};
use super::delay::Demand;
use super::model::{Cluster, Site};
use super::policy::{Capacity, Charge, HARD_SLO_MS, Kind, Place, Policy, PolicyError, Rule, lot};
use super::spread;
use crate::solver::{PerResource, RESOURCES, Resource};

/// Sets of rules that are tried for the smallest that cannot hold; beyond, one that cannot be made smaller is named.
const SMALLEST_LEN_MAX: usize = 3;

/// Groups that the same rules leave the same sites.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sort {
    covering: Vec<u16>,
    /// Sites that hard dials take away.
    out: SiteSet,
}

/// Groups that have to do with one another: those of a spread rule with how many there are of each sort, and of a label of a
/// `separate` rule.
#[derive(Default)]
struct Together {
    spreads: BTreeMap<u16, (GroupId, BTreeMap<Sort, usize>)>,
    sides: BTreeMap<(usize, usize), BTreeSet<Sort>>,
    /// The first group of each `separate` rule.
    firsts: BTreeMap<usize, GroupId>,
}

impl Together {
    fn add(&mut self, group: &GroupId, sort: Sort, spread: Option<u16>, sides: &[(usize, usize)]) {
        for &(rule, label) in sides {
            self.firsts.entry(rule).or_insert(*group);
            self.sides.entry((rule, label)).or_default().insert(sort.clone());
        }
        if let Some(rule) = spread {
            let (_, sorts) = self.spreads.entry(rule).or_insert_with(|| (*group, BTreeMap::new()));
            *sorts.entry(sort).or_insert(0) += 1;
        }
    }
}

/// Rules by where they are looked for.
pub(super) struct Rules<'a> {
    policy: &'a Policy,
    everywhere: Vec<u16>,
    by_service: BTreeMap<ServiceId, Vec<u16>>,
    by_prefix: BTreeMap<Prefix, Vec<u16>>,
    /// Lengths of the prefixes, each once.
    lens: BTreeSet<u8>,
}

/// What the rules of a group say together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Effect {
    /// Sites that no hard rule forbids, dials aside.
    pub(super) allowed: SiteSet,
    /// Sites that the group is to leave because of a drain.
    pub(super) drained: SiteSet,
    /// Milliseconds that a site costs more.
    pub(super) added_ms: BTreeMap<SiteId, f64>,
    pub(super) dials: Vec<Dialled>,
    /// A delay, and what one above it costs more.
    pub(super) slo: Option<(f64, f64)>,
    pub(super) charge: Option<Charge>,
    /// Sites that its standby may be at, if it is to have one.
    pub(super) standby: Option<SiteSet>,
    /// Number of the rule by which it is spread.
    pub(super) spread: Option<u16>,
}

/// A dial that covers a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Dialled {
    pub(super) site: SiteId,
    pub(super) share: f64,
    /// Hard without one.
    pub(super) price_ms: Option<f64>,
}

impl Dialled {
    /// Whether the group is not of those that may be there.
    pub(super) fn is_out(&self, group: &GroupId) -> bool {
        lot(group, self.site) >= self.share
    }
}

/// Sites by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SiteSet([u64; 4]);

impl SiteSet {
    pub(super) const NONE: Self = Self([0; 4]);
    pub(super) const ALL: Self = Self([u64::MAX; 4]);

    pub(super) fn of<'a>(sites: impl IntoIterator<Item = &'a SiteId>) -> Self {
        let mut set = Self::NONE;
        sites.into_iter().for_each(|site| set.0[usize::from(site.0 / 64)] |= 1 << (site.0 % 64));
        set
    }

    pub(super) fn contains(self, site: SiteId) -> bool {
        self.0[usize::from(site.0 / 64)] & (1 << (site.0 % 64)) != 0
    }

    pub(super) fn len(self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] & other.0[n]))
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] | other.0[n]))
    }

    fn not(self) -> Self {
        Self(self.0.map(|word| !word))
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::NONE
    }
}

impl<'a> Rules<'a> {
    pub(super) fn new(policy: &'a Policy) -> Self {
        let mut rules = Self {
            policy,
            everywhere: Vec::new(),
            by_service: BTreeMap::new(),
            by_prefix: BTreeMap::new(),
            lens: BTreeSet::new(),
        };
        for (rule, n) in policy.rules.iter().zip(0..=u16::MAX) {
            let label = rule.scope.label.as_ref().and_then(|label| policy.labels.get(label));
            match (rule.scope.clients, label, rule.scope.service) {
                (Some(clients), _, _) => rules.file(clients, n),
                (None, Some(label), _) => label.iter().for_each(|prefix| rules.file(*prefix, n)),
                (None, None, Some(service)) => rules.by_service.entry(service).or_default().push(n),
                (None, None, None) => rules.everywhere.push(n),
            }
        }
        rules
    }

    fn file(&mut self, prefix: Prefix, rule: u16) {
        self.by_prefix.entry(prefix).or_default().push(rule);
        self.lens.insert(prefix.len());
    }

    fn rule(&self, n: u16) -> &'a Rule {
        &self.policy.rules[usize::from(n)]
    }

    /// The rules of a group by number, in order.
    pub(super) fn covering(&self, group: &GroupId, found: &mut Vec<u16>) {
        found.clear();
        found.extend(&self.everywhere);
        found.extend(self.by_service.get(&group.service).into_iter().flatten());
        for &len in self.lens.iter().take_while(|&&len| len <= group.prefix.len()) {
            let prefix = Prefix::containing(group.prefix.address(), len).ok();
            let here = prefix.and_then(|prefix| self.by_prefix.get(&prefix)).into_iter().flatten();
            // What is filed under one part of a scope may have others.
            found.extend(here.filter(|&&n| self.policy.covers(self.rule(n), group)));
        }
        found.sort_unstable();
        found.dedup();
    }

    /// What rules say together.
    pub(super) fn effect(&self, covering: &[u16]) -> Effect {
        let mut effect = Effect {
            allowed: SiteSet::ALL,
            drained: SiteSet::NONE,
            added_ms: BTreeMap::new(),
            dials: Vec::new(),
            slo: None,
            charge: None,
            standby: None,
            spread: self.spread_of(covering),
        };
        for rule in self.holding(covering) {
            Self::add(&mut effect, rule);
        }
        effect
    }

    /// The spread rule that holds: of the most specific the first.
    pub(super) fn spread_of(&self, covering: &[u16]) -> Option<u16> {
        let spreads = covering.iter().rev().filter(|&&n| matches!(self.rule(n).kind, Kind::Spread(_)));
        spreads.max_by_key(|&&n| self.rule(n).scope.rank()).copied()
    }

    /// The rules that hold: of those that set the same thing the most specific, the first of equals.
    fn holding(&self, covering: &[u16]) -> Vec<&'a Rule> {
        let mut set: BTreeMap<(&str, Option<SiteId>), &Rule> = BTreeMap::new();
        let mut holding = Vec::new();
        for rule in covering.iter().map(|&n| self.rule(n)) {
            match rule.kind.sets() {
                None => holding.push(rule),
                Some(thing) if set.get(&thing).is_none_or(|other| other.scope.rank() < rule.scope.rank()) => {
                    set.insert(thing, rule);
                }
                Some(_) => {}
            }
        }
        holding.extend(set.into_values());
        holding
    }

    /// Two rules that set the same thing, neither more specific than the other.
    fn clash(&self, covering: &[u16]) -> Option<(&'a Rule, &'a Rule)> {
        let all = || covering.iter().map(|&n| self.rule(n));
        all().find_map(|a| {
            let rivals = |b: &&Rule| a.kind.sets().is_some() && a.kind.sets() == b.kind.sets();
            let equals = |b: &&Rule| a.name != b.name && a.scope.rank() == b.scope.rank();
            // Below a rule that is more specific than both they may differ.
            let tops = all().filter(rivals).map(|rule| rule.scope.rank()).max() == Some(a.scope.rank());
            all().filter(rivals).find(equals).filter(|_| tops).map(|b| (a, b))
        })
    }

    fn add(effect: &mut Effect, rule: &Rule) {
        let sites = || SiteSet::of(&rule.kind.sites());
        match (&rule.kind, rule.price_ms) {
            (Kind::Allow(_) | Kind::Pin(_), None) => effect.allowed = effect.allowed.and(sites()),
            (Kind::Deny(_), None) => effect.allowed = effect.allowed.and(sites().not()),
            (Kind::Drain(_), _) => {
                effect.allowed = effect.allowed.and(sites().not());
                effect.drained = effect.drained.or(sites());
            }
            (Kind::Allow(_) | Kind::Pin(_) | Kind::Prefer(_), price) => {
                effect.charge_sites(sites().not(), price.unwrap_or(0.0));
            }
            (Kind::Deny(_) | Kind::Cost(_), price) => effect.charge_sites(sites(), price.unwrap_or(0.0)),
            (Kind::Dial(dial), price_ms) => {
                effect.dials.push(Dialled { site: dial.site, share: dial.share, price_ms });
            }
            (Kind::Slo(slo), price) => effect.slo = Some((slo.delay_ms, price.unwrap_or(HARD_SLO_MS))),
            (Kind::Charge(charge), _) => effect.charge = Some(*charge),
            (Kind::Standby(named), _) => {
                effect.standby = Some(if named.is_empty() { SiteSet::ALL } else { sites() });
            }
            (
                Kind::Capacity(_) | Kind::Budget(_) | Kind::Ordering(_) | Kind::Spread(_) | Kind::Separate(_),
                _,
            ) => {}
        }
    }

    /// Whether the rules can all hold for the groups of a cluster.
    ///
    /// # Errors
    /// [`PolicyError::Contradiction`] with a smallest set of rules that cannot, or [`PolicyError::Rule`] for a scope that
    /// would cut a group in two.
    pub(super) fn check(&self, cluster: &Cluster) -> Result<(), PolicyError> {
        self.check_sizes(cluster)?;
        let sites = SiteSet::of(cluster.sites.keys());
        let (apart, domains) = (Apart::new(self.policy), spread::places(cluster, Place::Domain));
        let mut together = Together::default();
        let mut known: BTreeMap<Vec<u16>, Effect> = BTreeMap::new();
        let mut covering = Vec::new();
        for group in cluster.groups.keys() {
            self.covering(group, &mut covering);
            if !known.contains_key(&covering) {
                if let Some((a, b)) = self.clash(&covering) {
                    return Err(PolicyError::Contradiction {
                        rules: vec![a.name.clone(), b.name.clone()],
                        group: group.to_string(),
                        reason: format!("both set {}, and neither scope is more specific", a.kind.name()),
                    });
                }
                known.insert(covering.clone(), self.effect(&covering));
            }
            let effect = &known[&covering];
            let out = |dial: &&Dialled| dial.price_ms.is_none() && dial.is_out(group);
            let out = SiteSet::of(effect.dials.iter().filter(out).map(|dial| &dial.site));
            if !cluster.sites.is_empty() && effect.allowed.and(out.not()).and(sites).is_empty() {
                return Err(PolicyError::Contradiction {
                    rules: self.smallest(group, &covering, sites),
                    group: group.to_string(),
                    reason: "they leave it no site".to_owned(),
                });
            }
            let may = effect.allowed.and(out.not()).and(sites);
            if let Some(standbys) = effect.standby
                && !has_room_beside(may, standbys, &domains)
                && has_room_beside(sites, standbys, &domains)
            {
                return Err(self.no_standby(group, Sort { covering, out }, standbys, sites, &domains));
            }
            let sides = if apart.is_empty() { Vec::new() } else { apart.sides(group) };
            if effect.spread.is_some() || !sides.is_empty() {
                together.add(group, Sort { covering: covering.clone(), out }, effect.spread, &sides);
            }
        }
        if cluster.sites.is_empty() { Ok(()) } else { self.check_together(cluster, &apart, &together) }
    }

    /// The rules that leave the standby of a group no site. With all sites it had one: where there are too few, no rule is at fault.
    fn no_standby(
        &self,
        group: &GroupId,
        sort: Sort,
        standbys: SiteSet,
        sites: SiteSet,
        domains: &[SiteSet],
    ) -> PolicyError {
        let fails = |kept: &[u16]| !has_room_beside(self.allowed(&sort, kept).and(sites), standbys, domains);
        let mut rules = self.fewest(std::iter::once(&sort), &fails).unwrap_or_default();
        let holding = self.holding(&sort.covering);
        let standby = holding.iter().find(|rule| matches!(rule.kind, Kind::Standby(_)));
        rules.extend(standby.map(|rule| rule.name.clone()));
        PolicyError::Contradiction {
            rules,
            group: group.to_string(),
            reason: "they leave its standby no site in another failure domain than its owner's".to_owned(),
        }
    }

    /// Whether groups can be spread and kept apart, all of them together.
    fn check_together(
        &self,
        cluster: &Cluster,
        apart: &Apart<'_>,
        together: &Together,
    ) -> Result<(), PolicyError> {
        let sites = SiteSet::of(cluster.sites.keys());
        let contradiction = |mut rules: Vec<String>, rule: &Rule, first: &GroupId, reason: String| {
            rules.push(rule.name.clone());
            Err(PolicyError::Contradiction { rules, group: format!("{first} and others"), reason })
        };
        for (&number, (first, sorts)) in &together.spreads {
            let rule = self.rule(number);
            let Kind::Spread(spread) = &rule.kind else { continue };
            let places = spread::places(cluster, spread.by);
            let groups = sorts.values().sum();
            let limit = spread.limit(groups);
            let fails = |kept: &[u16]| {
                let allowed = |(sort, count): (&Sort, &usize)| (self.allowed(sort, kept).and(sites), *count);
                !spread::fits(&places, limit, &sorts.iter().map(allowed).collect::<Vec<_>>())
            };
            if let Some(others) = self.fewest(sorts.keys(), &fails) {
                let reason = format!(
                    "each place may have {limit} of {groups} groups, and they have too few places that they may be in"
                );
                return contradiction(others, rule, first, reason);
            }
        }
        let domains = spread::places(cluster, Place::Domain);
        for (number, (rule, labels)) in apart.rules().enumerate() {
            let Some(first) = together.firsts.get(&number) else { continue };
            let sorts = |label: usize| together.sides.get(&(number, label)).into_iter().flatten();
            let fails = |kept: &[u16]| {
                let side = |label: usize| {
                    let needs = sorts(label).map(|sort| self.allowed(sort, kept).and(sites));
                    Side { needs: needs.collect(), ..Side::new(domains.len()) }
                };
                !apart::is_possible(&domains, &(0..labels).map(side).collect::<Vec<_>>())
            };
            if let Some(others) = self.fewest((0..labels).flat_map(sorts), &fails) {
                let reason = "its labels have too few failure domains to be kept apart in".to_owned();
                return contradiction(others, rule, first, reason);
            }
        }
        Ok(())
    }

    /// Sites that some of the rules leave groups of a sort.
    fn allowed(&self, sort: &Sort, kept: &[u16]) -> SiteSet {
        let covering: Vec<u16> = sort.covering.iter().copied().filter(|n| kept.contains(n)).collect();
        self.effect(&covering).allowed.and(sort.out.not())
    }

    /// Names of rules that restrict groups of these sorts such that something fails, none of which could be left out; nothing
    /// if it does not fail with all of them.
    fn fewest<'s>(
        &self,
        sorts: impl Iterator<Item = &'s Sort>,
        fails: &dyn Fn(&[u16]) -> bool,
    ) -> Option<Vec<String>> {
        let restricts = |n: &u16| {
            matches!(
                (&self.rule(*n).kind, self.rule(*n).price_ms),
                (Kind::Allow(_) | Kind::Deny(_) | Kind::Pin(_), None) | (Kind::Drain(_), _)
            )
        };
        let all: BTreeSet<u16> =
            sorts.flat_map(|sort| sort.covering.iter().copied()).filter(restricts).collect();
        let mut set: Vec<u16> = all.into_iter().collect();
        if !fails(&set) {
            return None;
        }
        let mut at = 0;
        while at < set.len() {
            let mut without = set.clone();
            without.remove(at);
            if fails(&without) { set = without } else { at += 1 }
        }
        Some(set.into_iter().map(|n| self.rule(n).name.clone()).collect())
    }

    /// A rule for a part of a group would hold for none.
    fn check_sizes(&self, cluster: &Cluster) -> Result<(), PolicyError> {
        for (prefix, rules) in &self.by_prefix {
            for service in cluster.services.values() {
                let around =
                    (0..prefix.len()).filter_map(|len| Prefix::containing(prefix.address(), len).ok());
                let ids = around.map(|prefix| GroupId { service: service.id, prefix });
                if let Some(group) = ids.into_iter().find(|id| cluster.groups.contains_key(id)) {
                    let reason = format!(
                        "{prefix} is a part of group {group}, and groups are not cut: give {} or a shorter prefix",
                        group.prefix
                    );
                    let rule = rules.first().map_or(String::new(), |&n| self.rule(n).name.clone());
                    return Err(PolicyError::Rule { rule, reason });
                }
            }
        }
        Ok(())
    }

    /// Names of a smallest set of rules that leave a group no site.
    fn smallest(&self, group: &GroupId, covering: &[u16], sites: SiteSet) -> Vec<String> {
        let holding = self.holding(covering);
        let leaves = |rule: &&'a Rule| {
            let named = || SiteSet::of(&rule.kind.sites());
            let left = match (&rule.kind, rule.price_ms) {
                (Kind::Allow(_) | Kind::Pin(_), None) => named(),
                (Kind::Deny(_), None) | (Kind::Drain(_), _) => named().not(),
                (Kind::Dial(dial), None) if lot(group, dial.site) >= dial.share => named().not(),
                _ => return None,
            };
            Some((*rule, left))
        };
        let restricting: Vec<(&Rule, SiteSet)> = holding.iter().filter_map(leaves).collect();
        let none = |set: &[usize]| set.iter().fold(sites, |left, &n| left.and(restricting[n].1)).is_empty();
        let name = |set: &[usize]| set.iter().map(|&n| restricting[n].0.name.clone()).collect();
        let all: Vec<usize> = (0..restricting.len()).collect();
        for len in 1..=SMALLEST_LEN_MAX.min(all.len()) {
            if let Some(set) = find_subset(&all, len, &mut Vec::new(), &none) {
                return name(&set);
            }
        }
        // What can be left out is left out: no part of what remains would do.
        let mut set = all;
        let mut at = 0;
        while at < set.len() {
            let mut without = set.clone();
            without.remove(at);
            if none(&without) { set = without } else { at += 1 }
        }
        name(&set)
    }
}

/// Whether a group that may be at these sites can be at one, and its standby at one of `standbys` in another failure domain.
fn has_room_beside(may: SiteSet, standbys: SiteSet, domains: &[SiteSet]) -> bool {
    let is_beside =
        |domain: &SiteSet| !may.and(standbys).and(*domain).is_empty() && !may.and(domain.not()).is_empty();
    domains.iter().any(is_beside)
}

/// The first subset of this length that fulfils a condition, in order.
fn find_subset(
    of: &[usize],
    len: usize,
    begun: &mut Vec<usize>,
    wanted: &dyn Fn(&[usize]) -> bool,
) -> Option<Vec<usize>> {
    if begun.len() == len {
        return wanted(begun).then(|| begun.clone());
    }
    for (at, &next) in of.iter().enumerate() {
        begun.push(next);
        let found = find_subset(&of[at + 1..], len, begun, wanted);
        begun.pop();
        if found.is_some() {
            return found;
        }
    }
    None
}

impl Effect {
    /// Sites cost a group more; those that cost nothing are not filed.
    fn charge_sites(&mut self, sites: SiteSet, ms: f64) {
        for site in (0..=u8::MAX).map(SiteId).filter(|site| ms > 0.0 && sites.contains(*site)) {
            *self.added_ms.entry(site).or_insert(0.0) += ms;
        }
    }

    /// Whether no hard rule is against it.
    pub(super) fn allows(&self, group: &GroupId, site: SiteId) -> bool {
        let out = |dial: &Dialled| dial.site == site && dial.price_ms.is_none() && dial.is_out(group);
        self.allowed.contains(site) && !self.dials.iter().any(out)
    }

    /// What a move of a group is charged, in milliseconds of each of its packets.
    pub(super) fn charge_ms(&self, policy: &Policy, demand: Option<&Demand>, now: Micros) -> f64 {
        let (flows, age) = demand.map_or((0, Micros(0)), |demand| (demand.flows, now.since(demand.since)));
        self.charge.map_or(policy.min_gain_ms, |charge| charge.of(flows, age.0 as f64 / 1e6))
    }

    /// What a site costs a group, in milliseconds, if its delay there is as given.
    pub(super) fn cost_ms(&self, group: &GroupId, site: SiteId, delay_ms: f64) -> f64 {
        let added = self.added_ms.get(&site).copied().unwrap_or(0.0);
        let out = |dial: &&Dialled| dial.site == site && dial.is_out(group);
        let dials: f64 = self.dials.iter().filter(out).filter_map(|dial| dial.price_ms).sum();
        let slo = self.slo.filter(|(most, _)| delay_ms > *most).map_or(0.0, |(_, price)| price);
        delay_ms + added + dials + slo
    }
}

/// What a site has of each resource, infinite where there is no limit, and the share that is left free.
pub(super) fn capacity(policy: &Policy, site: &Site) -> (PerResource<f64>, f64) {
    let rule = policy.rules.iter().find_map(|rule| {
        let Kind::Capacity(capacity) = &rule.kind else { return None };
        (capacity.site == site.id).then_some(*capacity)
    });
    let limit = |of: fn(&Capacity) -> Option<u64>, own: Option<u64>| {
        rule.as_ref().and_then(of).or(own).map_or(f64::INFINITY, |limit| limit as f64)
    };
    let mut capacity = [0.0; RESOURCES];
    capacity[Resource::Packets as usize] = limit(|rule| rule.packets_per_s, Some(site.capacity_pps));
    capacity[Resource::Flows as usize] = limit(|rule| rule.flows, site.capacity_flows);
    capacity[Resource::Bits as usize] = limit(|rule| rule.bits_per_s, site.capacity_bps);
    (capacity, rule.and_then(|rule| rule.headroom).unwrap_or(policy.headroom))
}
