//! What another policy, other capacities, a new or a lost site would bring, by the traffic and delays that are known now.
//!
//! Nothing is changed: the question is put to the solver with a copy of the state. What is found is where groups would end
//! up, whatever the budget of moves; how fast they get there is for the leader's rounds.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::apart::Apart;
use super::delay::Model;
use super::model::{Admin, Cluster, Site, SiteSpec};
use super::plan::{self, Readiness};
use super::policy::Policy;
use super::problem::{Problem, Purpose};
use super::spread::Spreading;
use crate::solver::{InstanceError, Resource, Start};

/// What is to be different.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    /// Another policy, checked before.
    pub policy: Option<Policy>,
    /// Sites that are added, or known by their number and described otherwise; they are alive and active.
    pub sites: Vec<SiteSpec>,
    /// Sites that are lost.
    pub lost: Vec<SiteId>,
    /// Traffic of all groups times this; nothing for 1.
    pub demand: Option<f64>,
}

/// Delays of groups, weighted by their packets, one way, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Delays {
    /// Mean.
    pub mean_ms: f64,
    /// Half of the packets have no more.
    pub p50_ms: f64,
    /// 95 of 100 packets have no more.
    pub p95_ms: f64,
}

/// A group that would move.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Which.
    pub group: GroupId,
    /// Its owner now.
    pub from: SiteId,
    /// Its owner then.
    pub to: SiteId,
    /// By how much its delay would shrink.
    pub gain_ms: f64,
    /// Its packets per second; 0 where nothing is known.
    pub packets_per_s: f64,
    /// Its flows.
    pub flows: u64,
    /// The hard rule that sends it away, if one does.
    pub rule: Option<String>,
}

/// Before and after, for the clients that come in at one site.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    /// The site.
    pub ingress: SiteId,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Now.
    pub before: Delays,
    /// Then.
    pub after: Delays,
}

/// A site before and after.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Which.
    pub site: SiteId,
    /// Packets per second now.
    pub before: f64,
    /// Packets per second then.
    pub after: f64,
    /// What it may carry then.
    pub room: f64,
    /// What one more packet per second of room would save then, in milliseconds.
    pub price_ms: f64,
}

/// Why groups would not be at the site that is nearest to them.
#[derive(Clone, Debug, PartialEq)]
pub struct Binding {
    /// A rule's name, or nothing when the nearest site is full or a move there gains too little.
    pub rule: Option<String>,
    /// The nearest site.
    pub site: SiteId,
    /// Groups.
    pub groups: u64,
    /// What it costs all their packets, as a mean over all packets, in milliseconds.
    pub costs_ms: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct WhatIf {
    /// Groups with known traffic, and those that have to leave.
    pub groups: u64,
    /// Now.
    pub before: Delays,
    /// Then.
    pub after: Delays,
    /// What prices of rules, those of then, add to the mean now.
    pub before_rules_ms: f64,
    /// What they add then.
    pub after_rules_ms: f64,
    /// The mean that no placement can beat then, prices of rules included.
    pub bound_ms: f64,
    /// By how much the placement may be worse than the best, as a share; nothing when capacities are exceeded.
    pub gap: Option<f64>,
    /// Groups that no site may have then.
    pub stranded: Vec<GroupId>,
    /// Groups that would have no standby though they are to have one: nowhere is room for them when their domain is lost.
    pub unprotected: u64,
    /// Sites that would carry more than their room.
    pub exceeded: Vec<SiteId>,
    /// Groups that would move, those with most packets first.
    pub moves: Vec<Moved>,
    /// By where clients come in.
    pub regions: Vec<Region>,
    /// All sites.
    pub loads: Vec<Load>,
    /// What keeps groups from their nearest site, what costs most first.
    pub bindings: Vec<Binding>,
}

/// What would be if something were different; nothing without sites.
///
/// # Errors
/// When a number cannot be used, such as a demand that is not finite; the message names it.
pub fn what_if(
    cluster: &Cluster,
    model: &Model,
    difference: &Difference,
    now: Micros,
) -> Result<Option<WhatIf>, InstanceError> {
    let mut then = cluster.clone();
    difference.apply(&mut then);
    let mut scaled = model.apart();
    if let Some(factor) = difference.demand {
        scaled.scale(factor);
    }
    let ready = Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };
    // Who asks about sites wants to know where groups belong, not whether a move pays.
    let policy_only =
        difference.sites.is_empty() && difference.lost.is_empty() && difference.demand.is_none();
    let purpose = if policy_only { Purpose::Plan(&ready) } else { Purpose::Assess };
    let Some(mut problem) = Problem::new(&then, &scaled, purpose, now)? else { return Ok(None) };
    let (certificate, standbys) = plan::solve(&mut problem, Start::Cold);
    let apart = Apart::new(&then.policy);
    let found = Found { then: &then, apart: &apart, model: &scaled, problem: &problem };
    let mut exceeded: Vec<SiteId> =
        certificate.exceeded.iter().map(|(site, _, _)| problem.sites[usize::from(*site)]).collect();
    exceeded.dedup();
    Ok(Some(WhatIf {
        groups: problem.groups.len() as u64,
        before: found.delays(|_| true, |at| found.before_ms(at)),
        after: found.delays(|_| true, |at| found.after_ms(at)),
        before_rules_ms: problem.mean(problem.present_cost - problem.present),
        after_rules_ms: problem.mean(found.after_rules()),
        bound_ms: problem.mean(certificate.bound),
        gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
        stranded: problem.stranded.clone(),
        unprotected: standbys.map_or(0, |standbys| standbys.unprotected.len() as u64),
        exceeded,
        moves: found.moves(),
        regions: found.regions(),
        loads: found.loads(),
        bindings: found.bindings(),
    }))
}

impl Difference {
    fn apply(&self, cluster: &mut Cluster) {
        if let Some(policy) = &self.policy {
            cluster.policy = policy.clone();
            cluster.policy_version += 1;
        }
        for spec in &self.sites {
            cluster.sites.insert(spec.id, site(spec));
        }
        for id in &self.lost {
            if let Some(site) = cluster.sites.get_mut(id) {
                site.alive = false;
            }
        }
    }
}

fn site(spec: &SiteSpec) -> Site {
    Site {
        id: spec.id,
        name: spec.name.clone(),
        latitude: spec.latitude,
        longitude: spec.longitude,
        endpoint: spec.endpoint.clone(),
        capacity_pps: spec.capacity_pps,
        capacity_flows: spec.capacity_flows,
        capacity_bps: spec.capacity_bps,
        failure_domain: spec.failure_domain.clone(),
        admin: Admin::Active,
        alive: true,
    }
}

/// A solved question. Groups are meant by index.
struct Found<'a> {
    then: &'a Cluster,
    apart: &'a Apart<'a>,
    model: &'a Model,
    problem: &'a Problem,
}

impl Found<'_> {
    fn before_ms(&self, group: usize) -> f64 {
        f64::from(self.problem.groups[group].here_ms)
    }

    fn after_ms(&self, group: usize) -> f64 {
        let at = self.problem.solver.site(group).and_then(|site| self.problem.at(group, site));
        at.map_or_else(|| self.before_ms(group), |(_, delay_ms)| f64::from(delay_ms))
    }

    /// Weight x ms of what rules add at the sites of then.
    fn after_rules(&self) -> f64 {
        let added = |group: usize| {
            let at = self.problem.solver.site(group).and_then(|site| self.problem.at(group, site));
            self.weight(group) * at.map_or(0.0, |(cost_ms, delay_ms)| f64::from(cost_ms - delay_ms))
        };
        (0..self.problem.groups.len()).map(added).sum()
    }

    fn weight(&self, group: usize) -> f64 {
        f64::from(self.problem.instance().weight(group))
    }

    fn delays(&self, of: impl Fn(usize) -> bool, ms: impl Fn(usize) -> f64) -> Delays {
        let groups = (0..self.problem.groups.len()).filter(|&group| of(group));
        let mut all: Vec<(f64, f64)> = groups.map(|group| (ms(group), self.weight(group))).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        let quantile = |share: f64| {
            let mut below = 0.0;
            let reaches = |(_, weight): &&(f64, f64)| {
                below += weight;
                below >= share * total
            };
            all.iter().find(reaches).or(all.last()).map_or(0.0, |(ms, _)| *ms)
        };
        let sum: f64 = all.iter().map(|(ms, weight)| ms * weight).sum();
        let mean_ms = if total > 0.0 { sum / total } else { 0.0 };
        Delays { mean_ms, p50_ms: quantile(0.5), p95_ms: quantile(0.95) }
    }

    fn moves(&self) -> Vec<Moved> {
        let moved = |(group, entry): (usize, &super::problem::Entry)| {
            let to = self.problem.solver.site(group).filter(|&to| to != entry.owner)?;
            let from = self.problem.sites[usize::from(entry.owner)];
            let demand = self.model.demand(&entry.id);
            Some(Moved {
                group: entry.id,
                from,
                to: self.problem.sites[usize::from(to)],
                gain_ms: self.before_ms(group) - self.after_ms(group),
                packets_per_s: demand.map_or(0.0, |demand| demand.packets_per_s),
                flows: demand.map_or(0, |demand| demand.flows),
                rule: self.rule_against(group, from, Spreading::is_over),
            })
        };
        let mut moves: Vec<Moved> = self.problem.groups.iter().enumerate().filter_map(moved).collect();
        moves.sort_by(|a, b| b.packets_per_s.total_cmp(&a.packets_per_s).then(a.group.cmp(&b.group)));
        moves
    }

    /// The name of the hard rule that keeps a group from a site; `full` says whether it has no place there with those that
    /// it is spread with.
    fn rule_against(
        &self,
        group: usize,
        site: SiteId,
        full: impl Fn(&Spreading, SiteId) -> bool,
    ) -> Option<String> {
        let (id, policy) = (&self.problem.groups[group].id, &self.then.policy);
        let spread = || {
            let spread = &self.problem.spreads[usize::from(self.problem.class[group]?)];
            full(spread, site).then(|| &policy.rules[usize::from(spread.rule)])
        };
        let apart = || self.apart.forbidding(self.then, id, site);
        policy.forbidding(id, site).or_else(apart).or_else(spread).map(|rule| rule.name.clone())
    }

    /// Where most packets of a group's clients come in.
    fn ingress(&self, group: usize) -> Option<SiteId> {
        let demand = self.model.demand(&self.problem.groups[group].id)?;
        let most = demand.inside.iter().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(a.0)));
        most.map(|(site, _)| *site)
    }

    fn regions(&self) -> Vec<Region> {
        let mut weight: BTreeMap<SiteId, f64> = BTreeMap::new();
        let ingress: Vec<Option<SiteId>> =
            (0..self.problem.groups.len()).map(|group| self.ingress(group)).collect();
        for (group, site) in ingress.iter().enumerate().filter_map(|(group, site)| Some((group, (*site)?))) {
            *weight.entry(site).or_insert(0.0) += self.weight(group);
        }
        let region = |(&site, &packets_per_s): (&SiteId, &f64)| Region {
            ingress: site,
            packets_per_s,
            before: self.delays(|group| ingress[group] == Some(site), |group| self.before_ms(group)),
            after: self.delays(|group| ingress[group] == Some(site), |group| self.after_ms(group)),
        };
        weight.iter().map(region).collect()
    }

    fn loads(&self) -> Vec<Load> {
        let packets = Resource::Packets as usize;
        let prices = self.problem.solver.prices();
        let sites = self.problem.sites.iter().zip(&self.problem.load).zip(0..=u8::MAX);
        let load = |((&site, before), n): ((&SiteId, &[f64; crate::solver::RESOURCES]), u8)| Load {
            site,
            before: before[packets],
            after: self.problem.solver.load(n)[packets],
            room: self.problem.instance().room(n)[packets],
            price_ms: prices[usize::from(n)][packets],
        };
        sites.map(load).collect()
    }

    fn bindings(&self) -> Vec<Binding> {
        let mut found: BTreeMap<(Option<String>, SiteId), (u64, f64)> = BTreeMap::new();
        for (group, entry) in self.problem.groups.iter().enumerate() {
            let Some(nearest) =
                entry.nearest.filter(|nearest| self.problem.solver.site(group) != Some(*nearest))
            else {
                continue;
            };
            let site = self.problem.sites[usize::from(nearest)];
            let full = |spread: &Spreading, site| !spread.has_room(site);
            let rule = self.rule_against(group, site, full);
            let costs = self.weight(group) * (self.after_ms(group) - f64::from(entry.nearest_ms));
            let sums = found.entry((rule, site)).or_insert((0, 0.0));
            *sums = (sums.0 + 1, sums.1 + costs);
        }
        let binding = |((rule, site), (groups, costs)): ((Option<String>, SiteId), (u64, f64))| Binding {
            rule,
            site,
            groups,
            costs_ms: self.problem.mean(costs),
        };
        let mut bindings: Vec<Binding> = found.into_iter().map(binding).collect();
        bindings.sort_by(|a, b| b.costs_ms.total_cmp(&a.costs_ms).then(a.site.cmp(&b.site)));
        bindings
    }
}
