//! Why a group is where it is: all its candidates, the terms of their delay, and what stands against each.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};
use serde::Serialize;

use super::apart::Apart;
use super::delay::{Delays, Demand, Mesh, Model, Terms, Tested};
use super::model::{Admin, Cluster, Group, Site};
use super::policy::Policy;
use super::rules::{Effect, Rules, capacity};
use super::spread::{self, Spreading};
use crate::solver::Resource;

/// Why a site cannot have a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// No lease.
    Dead,
    /// Cordoned by the operator.
    Cordoned,
    /// Being emptied.
    Draining,
    /// A hard rule of the policy, by name.
    Rule(String),
    /// It would have more load than its capacity less the headroom.
    Full,
}

/// A site for a group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The site.
    pub site: SiteId,
    /// Sum of the terms and of what rules add, in milliseconds.
    pub total_ms: f64,
    /// The terms.
    pub terms: Terms,
    /// What soft rules add, in milliseconds.
    pub rules_ms: f64,
    /// What it has to promise beyond the owner since it is less surely known, in milliseconds.
    pub doubt_ms: f64,
    /// What its room is worth by the last round, in milliseconds of each packet; 0 where room is left.
    pub price_ms: f64,
    /// Load as a share of capacity with the group there.
    pub fill: f64,
    /// Why it cannot be chosen, if it cannot.
    pub blocked: Option<Blocked>,
}

/// Why a group is where it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The group.
    pub group: GroupId,
    /// Its owner.
    pub owner: SiteId,
    /// The site that is to get it when its owner is lost, if a rule wants one.
    pub standby: Option<SiteId>,
    /// The best site that it could have.
    pub best: Option<SiteId>,
    /// The one after it, and by how many milliseconds it is worse.
    pub runner_up: Option<(SiteId, f64)>,
    /// The rules that speak of it, by name.
    pub rules: Vec<String>,
    /// What moving there would gain, in milliseconds.
    pub gain_ms: f64,
    /// The gain that a move has to have: what the policy charges it.
    pub min_gain_ms: f64,
    /// What is known of its traffic.
    pub demand: Option<Demand>,
    /// All sites, best first.
    pub candidates: Vec<Candidate>,
    /// How many estimates of ways that nobody had measured were tested since, and held.
    pub tested: Tested,
}

/// Loads of the sites, packets per second, with moves in hand counted at their target.
struct Loads(BTreeMap<SiteId, f64>);

impl Loads {
    fn of(cluster: &Cluster, model: &Model) -> Self {
        let mut loads = Self(cluster.sites.keys().map(|&id| (id, 0.0)).collect());
        for group in cluster.groups.values() {
            let site = cluster.move_of(&group.id).map_or(group.owner, |present| present.to);
            loads.add(site, model.load(&group.id));
        }
        loads
    }

    fn add(&mut self, site: SiteId, load: f64) {
        *self.0.entry(site).or_insert(0.0) += load;
    }

    fn fill(&self, policy: &Policy, site: &Site, more: f64) -> f64 {
        let (capacity, _) = capacity(policy, site);
        (self.0.get(&site.id).copied().unwrap_or(0.0) + more) / capacity[Resource::Packets as usize].max(1.0)
    }
}

/// The candidates of a group with the terms of their delay, best first.
#[must_use]
pub fn explain(cluster: &Cluster, model: &Model, id: &GroupId, now: Micros) -> Option<Explanation> {
    let group = cluster.groups.get(id)?;
    let (rules, mut covering) = (Rules::new(&cluster.policy), Vec::new());
    rules.covering(id, &mut covering);
    let effect = rules.effect(&covering);
    let wanted_ms = effect.charge_ms(&cluster.policy, model.demand(id), now);
    let mesh = Mesh::of(cluster, model, id, now);
    let mut delays = Delays::default();
    mesh.delays(model, id, model.known(id), now, &mut delays);
    let look = Look {
        cluster,
        model,
        mesh,
        delays,
        loads: Loads::of(cluster, model),
        effect,
        apart: Apart::new(&cluster.policy),
        spreads: spread::spreadings(cluster),
    };
    let candidates = look.candidates(group);
    let at = |site: SiteId| candidates.iter().find(|candidate| candidate.site == site);
    let mut open = candidates.iter().filter(|candidate| candidate.blocked.is_none());
    let (first, second) = (open.next(), open.next());
    let best = first.map(|best| best.site);
    let runner_up = first.zip(second).map(|(first, second)| (second.site, second.total_ms - first.total_ms));
    let policy = &cluster.policy;
    let rules = policy.rules.iter().filter(|rule| policy.covers(rule, id)).map(|rule| rule.name.clone());
    let gain_ms = best.and_then(|best| Some(at(group.owner)?.total_ms - at(best)?.total_ms)).unwrap_or(0.0);
    Some(Explanation {
        group: *id,
        owner: group.owner,
        standby: group.standby,
        best,
        runner_up,
        rules: rules.collect(),
        gain_ms,
        min_gain_ms: wanted_ms,
        demand: model.demand(id).cloned(),
        candidates,
        tested: model.tested().iter().fold(Tested::default(), |sum, of| Tested {
            tested: sum.tested + of.tested,
            held: sum.held + of.held,
        }),
    })
}

struct Look<'a> {
    cluster: &'a Cluster,
    model: &'a Model,
    mesh: Mesh<'a>,
    delays: Delays,
    loads: Loads,
    effect: Effect,
    apart: Apart<'a>,
    spreads: Vec<Spreading>,
}

impl Look<'_> {
    /// All sites for a group, best first.
    fn candidates(&self, group: &Group) -> Vec<Candidate> {
        let sites = self.cluster.sites.values();
        let mut candidates: Vec<Candidate> = sites.map(|site| self.candidate(group, site)).collect();
        candidates.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms).then(a.site.cmp(&b.site)));
        candidates
    }

    fn candidate(&self, group: &Group, site: &Site) -> Candidate {
        let here = group.owner == site.id;
        let more = if here { 0.0 } else { self.model.load(&group.id) };
        let fill = self.loads.fill(&self.cluster.policy, site, more);
        let terms = self.mesh.terms(&group.id, site.id, fill);
        let blocked = self.blocked(group, site, fill, here);
        let delay_ms = terms.total_ms() - terms.queue_ms;
        let rules_ms = self.effect.cost_ms(&group.id, site.id, delay_ms) - delay_ms;
        let prices = self.cluster.round.iter().flat_map(|round| &round.prices);
        let price_ms = prices.filter(|price| price.site == site.id).map(|price| price.packets).sum();
        let total_ms = terms.total_ms() + rules_ms;
        let at = |site: SiteId| self.mesh.index[usize::from(site.0)];
        let doubt = at(group.owner).zip(at(site.id)).map(|(owner, site)| self.delays.doubt_ms(owner, site));
        let doubt_ms = f64::from(doubt.unwrap_or(0.0));
        Candidate { site: site.id, total_ms, terms, rules_ms, doubt_ms, price_ms, fill, blocked }
    }

    /// The rule by which other groups leave no place at a site.
    fn crowd(&self, group: &Group, site: &Site, here: bool) -> Option<String> {
        let policy = &self.cluster.policy;
        if let Some(rule) = self.apart.forbidding(self.cluster, &group.id, site.id) {
            return Some(rule.name.clone());
        }
        let rule = self.effect.spread?;
        let spread = self.spreads.iter().find(|spread| spread.rule == rule)?;
        let owner = spread.place(group.owner) == spread.place(site.id);
        let blocked = if here { spread.is_over(site.id) } else { !owner && !spread.has_room(site.id) };
        blocked.then(|| policy.rules[usize::from(spread.rule)].name.clone())
    }

    fn blocked(&self, group: &Group, site: &Site, fill: f64, here: bool) -> Option<Blocked> {
        let policy = &self.cluster.policy;
        if !site.alive {
            return Some(Blocked::Dead);
        }
        match site.admin {
            Admin::Draining => return Some(Blocked::Draining),
            Admin::Cordoned if !here => return Some(Blocked::Cordoned),
            Admin::Cordoned | Admin::Active => {}
        }
        if let Some(rule) = policy.forbidding(&group.id, site.id) {
            return Some(Blocked::Rule(rule.name.clone()));
        }
        if let Some(rule) = self.crowd(group, site, here) {
            return Some(Blocked::Rule(rule));
        }
        (!here && fill > 1.0 - capacity(policy, site).1).then_some(Blocked::Full)
    }
}
