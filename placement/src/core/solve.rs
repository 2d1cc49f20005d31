//! Which groups should move where. A plain greedy solver, deterministic; a fuller one keeps its interface.
//!
//! One round, within the budget of moves: first groups leave draining sites; then groups whose pin or deny rule
//! says so; then sites above their capacity give away the groups that lose least by it; then groups move that
//! gain most. Cordoned, draining and dead sites get nothing; groups of dead owners are not for moving.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};
use serde::Serialize;

use super::command::{Command, MOVES_PER_COMMAND_MAX};
use super::delay::{Demand, Model, Terms};
use super::model::{Admin, Cluster, Group, MoveReason, Site};

/// Why a site cannot have a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// No lease.
    Dead,
    /// Cordoned by the operator.
    Cordoned,
    /// Being emptied.
    Draining,
    /// Pinned elsewhere.
    Pinned,
    /// Denied here.
    Denied,
    /// It would have more load than its capacity less the headroom.
    Full,
}

/// A site for a group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The site.
    pub site: SiteId,
    /// Sum of the terms, in milliseconds.
    pub total_ms: f64,
    /// The terms.
    pub terms: Terms,
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
    /// The best site that it could have.
    pub best: Option<SiteId>,
    /// What moving there would gain, in milliseconds.
    pub gain_ms: f64,
    /// The gain that the policy demands.
    pub min_gain_ms: f64,
    /// What is known of its traffic.
    pub demand: Option<Demand>,
    /// All sites, best first.
    pub candidates: Vec<Candidate>,
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

    fn shift(&mut self, load: f64, from: SiteId, to: SiteId) {
        self.add(from, -load);
        self.add(to, load);
    }

    fn fill(&self, site: &Site, more: f64) -> f64 {
        (self.0.get(&site.id).copied().unwrap_or(0.0) + more) / site.capacity_pps.max(1) as f64
    }
}

/// Which groups may be moved now.
pub struct Readiness<'a> {
    /// Whether a group may be moved at all: not when its last move has just failed.
    pub free: &'a dyn Fn(&GroupId) -> bool,
    /// Whether it has been at its owner for long enough to be moved for its gain.
    pub rested: &'a dyn Fn(&GroupId) -> bool,
}

/// One round: what to move now.
#[must_use]
pub fn solve(cluster: &Cluster, model: &Model, ready: &Readiness<'_>, now: Micros) -> Vec<Command> {
    let budget = (cluster.policy.moves_in_flight_max as usize).saturating_sub(cluster.moves.len());
    let mut round = Round {
        cluster,
        model,
        free: ready.free,
        now,
        loads: Loads::of(cluster, model),
        budget: budget.min(MOVES_PER_COMMAND_MAX),
        chosen: BTreeMap::new(),
    };
    round.forced();
    if cluster.policy.automatic {
        round.surges(ready.rested);
        round.gains(ready.rested);
    }
    round.commands()
}

/// The candidates of a group with the terms of their delay, best first.
#[must_use]
pub fn explain(cluster: &Cluster, model: &Model, id: &GroupId, now: Micros) -> Option<Explanation> {
    let group = cluster.groups.get(id)?;
    let round = Round::looking(cluster, model, now);
    let candidates = round.candidates(group);
    let at = |site: SiteId| candidates.iter().find(|candidate| candidate.site == site);
    let best = candidates.iter().find(|candidate| candidate.blocked.is_none()).map(|best| best.site);
    let gain_ms = best.and_then(|best| Some(at(group.owner)?.total_ms - at(best)?.total_ms)).unwrap_or(0.0);
    Some(Explanation {
        group: *id,
        owner: group.owner,
        best,
        gain_ms,
        min_gain_ms: cluster.policy.min_gain_ms,
        demand: model.demand(id).cloned(),
        candidates,
    })
}

pub(super) struct Round<'a> {
    cluster: &'a Cluster,
    model: &'a Model,
    free: &'a dyn Fn(&GroupId) -> bool,
    now: Micros,
    loads: Loads,
    budget: usize,
    chosen: BTreeMap<GroupId, (SiteId, MoveReason)>,
}

impl<'a> Round<'a> {
    /// One that chooses nothing.
    pub(super) fn looking(cluster: &'a Cluster, model: &'a Model, now: Micros) -> Self {
        let (loads, chosen) = (Loads::of(cluster, model), BTreeMap::new());
        Self { cluster, model, free: &|_| true, now, loads, budget: 0, chosen }
    }
}

impl Round<'_> {
    /// Groups that must leave their site: drains, pins and denies. Neither gain nor dwell counts.
    fn forced(&mut self) {
        for group in self.cluster.groups.values() {
            if self.budget == 0 {
                return;
            }
            let Some(owner) = self.movable(group) else { continue };
            let reason = if owner.admin == Admin::Draining {
                MoveReason::Drain
            } else if self.rule_against(&group.id, owner.id) {
                MoveReason::Operator
            } else {
                continue;
            };
            // A full site is better than one that goes away.
            let candidates = self.candidates(group);
            let open = |full_too: bool| {
                candidates.iter().find(move |candidate| match candidate.blocked {
                    None => true,
                    Some(Blocked::Full) => full_too,
                    Some(_) => false,
                })
            };
            if let Some(to) = open(false).or_else(|| open(true)).map(|best| best.site) {
                self.choose(group, to, reason);
            }
        }
    }

    /// Sites above their capacity give away groups, those first that lose least per packet.
    fn surges(&mut self, rested: &dyn Fn(&GroupId) -> bool) {
        let cluster = self.cluster;
        for site in cluster.sites.values() {
            if self.loads.fill(site, 0.0) <= 1.0 || self.budget == 0 {
                continue;
            }
            let groups = cluster.groups.values().filter(|group| group.owner == site.id && rested(&group.id));
            let mut offers: Vec<(f64, &Group, SiteId)> = groups
                .filter(|group| self.model.load(&group.id) > 0.0)
                .filter_map(|group| self.offer(group).map(|(gain, to)| (gain, group, to)))
                .collect();
            offers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.id.cmp(&b.1.id)));
            for (_, group, _) in offers {
                if self.loads.fill(site, 0.0) <= self.limit() || self.budget == 0 {
                    break;
                }
                // Asked again: the best site of the first may be full by now.
                if let Some((_, to)) = self.offer(group) {
                    self.choose(group, to, MoveReason::Load);
                }
            }
        }
    }

    /// Groups that gain enough, most traffic times gain first.
    fn gains(&mut self, rested: &dyn Fn(&GroupId) -> bool) {
        if self.budget == 0 {
            return;
        }
        let min = self.cluster.policy.min_gain_ms;
        let cluster = self.cluster;
        let groups = cluster.groups.values().filter(|group| rested(&group.id));
        let mut offers: Vec<(f64, &Group)> = groups
            .filter(|group| self.model.load(&group.id) > 0.0)
            .filter_map(|group| {
                let (gain, _) = self.offer(group).filter(|(gain, _)| *gain >= min && *gain > 0.0)?;
                Some((gain * self.model.load(&group.id), group))
            })
            .collect();
        offers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.id.cmp(&b.1.id)));
        for (_, group) in offers {
            if self.budget == 0 {
                return;
            }
            if let Some((gain, to)) = self.offer(group)
                && gain >= min
            {
                self.choose(group, to, MoveReason::Delay);
            }
        }
    }

    /// The best other site and the gain there.
    fn offer(&self, group: &Group) -> Option<(f64, SiteId)> {
        self.movable(group)?;
        let candidates = self.candidates(group);
        let present = candidates.iter().find(|candidate| candidate.site == group.owner)?;
        let best = candidates.iter().find(|c| c.site != group.owner && c.blocked.is_none())?;
        Some((present.total_ms - best.total_ms, best.site))
    }

    /// The owner, if the group could move now.
    fn movable(&self, group: &Group) -> Option<&Site> {
        let idle = group.move_id.is_none() && !self.chosen.contains_key(&group.id) && (self.free)(&group.id);
        self.cluster.sites.get(&group.owner).filter(|owner| idle && owner.alive)
    }

    fn rule_against(&self, group: &GroupId, site: SiteId) -> bool {
        let policy = &self.cluster.policy;
        policy.pin(group).is_some_and(|pin| pin != site) || policy.denies(group, site)
    }

    fn limit(&self) -> f64 {
        1.0 - self.cluster.policy.headroom
    }

    /// All sites for a group, best first.
    pub(super) fn candidates(&self, group: &Group) -> Vec<Candidate> {
        let sites = self.cluster.sites.values();
        let mut candidates: Vec<Candidate> = sites.map(|site| self.candidate(group, site)).collect();
        candidates.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms).then(a.site.cmp(&b.site)));
        candidates
    }

    fn candidate(&self, group: &Group, site: &Site) -> Candidate {
        let here = group.owner == site.id;
        let more = if here { 0.0 } else { self.model.load(&group.id) };
        let fill = self.loads.fill(site, more);
        let terms = self.model.terms(self.cluster, &group.id, site, fill, self.now);
        let blocked = self.blocked(group, site, fill, here);
        Candidate { site: site.id, total_ms: terms.total_ms(), terms, fill, blocked }
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
        if policy.pin(&group.id).is_some_and(|pin| pin != site.id) {
            return Some(Blocked::Pinned);
        }
        if policy.denies(&group.id, site.id) {
            return Some(Blocked::Denied);
        }
        (!here && fill > self.limit()).then_some(Blocked::Full)
    }

    fn choose(&mut self, group: &Group, to: SiteId, reason: MoveReason) {
        if to == group.owner {
            return;
        }
        self.loads.shift(self.model.load(&group.id), group.owner, to);
        self.chosen.insert(group.id, (to, reason));
        self.budget -= 1;
    }

    fn commands(self) -> Vec<Command> {
        let mut by_reason: Vec<(MoveReason, Vec<(GroupId, SiteId)>)> = Vec::new();
        for (group, (to, reason)) in self.chosen {
            match by_reason.iter_mut().find(|(present, _)| *present == reason) {
                Some((_, moves)) => moves.push((group, to)),
                None => by_reason.push((reason, vec![(group, to)])),
            }
        }
        by_reason.into_iter().map(|(reason, moves)| Command::StartMoves { moves, reason }).collect()
    }
}
