//! The leader's round: where groups should be by the solver, and which of them set out now.
//!
//! Nothing is kept between rounds but what is replicated: the prices of the last published round are where the next one
//! begins, at the same leader or another. Same state, same reports, same answer.
//!
//! A move has to pay its charge, so a placement is left alone unless another is better by that; and no move is
//! started towards a site that has no room for it now, since those that are to make room may still be on their way.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::command::{Command, MOVES_PER_COMMAND_MAX};
use super::delay::Model;
use super::model::{Cluster, MoveReason, Round, SitePrices};
use super::policy::{Drain, Kind};
use super::problem::{Entry, Problem, Purpose, Stand};
use crate::solver::{Certificate, PerResource, RESOURCES, Resource, Solver, Start};

/// Which groups may be moved now.
pub struct Readiness<'a> {
    /// Whether a group may be moved at all: not when its last move has just failed.
    pub free: &'a dyn Fn(&GroupId) -> bool,
    /// Whether it has been at its owner for long enough to be moved for its gain.
    pub rested: &'a dyn Fn(&GroupId) -> bool,
    /// Moves that were started within the last minute: from where, and why.
    pub recent: &'a [(SiteId, MoveReason)],
}

/// What a round brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Moves to start.
    pub commands: Vec<Command>,
    /// What it achieved; nothing without sites.
    pub round: Option<Round>,
}

/// One round: what to move now.
#[must_use]
pub fn plan(cluster: &Cluster, model: &Model, ready: &Readiness<'_>, now: Micros) -> Plan {
    // Demand is made finite where reports are taken: what is left cannot be wrong, and a round without moves is the answer.
    let Ok(Some(problem)) = Problem::new(cluster, model, Purpose::Plan(ready), now) else {
        return Plan::default();
    };
    let mut solver = Solver::new(problem.instance.clone());
    let start = resume(&mut solver, cluster, &problem);
    let certificate = solver.solve(start);
    let wishes = wishes(&problem, &solver, &certificate, cluster.policy.min_gain_ms);
    let wanted = wishes.len();
    let budget = (cluster.policy.moves_in_flight_max as usize).saturating_sub(cluster.moves.len());
    let quotas = Quotas::new(cluster, ready.recent);
    let chosen = choose(&problem, wishes, budget.min(MOVES_PER_COMMAND_MAX), quotas);
    let mut round = publish(cluster, &problem, &solver, &certificate);
    (round.moves, round.started) = (wanted as u64, chosen.len() as u64);
    Plan { commands: commands(&problem, &chosen), round: Some(round) }
}

/// Gives the solver the prices of the last round.
fn resume(solver: &mut Solver, cluster: &Cluster, problem: &Problem) -> Start {
    let Some(last) = &cluster.round else { return Start::Cold };
    let known: BTreeMap<SiteId, &SitePrices> = last.prices.iter().map(|price| (price.site, price)).collect();
    let prices = problem.sites.iter().map(|site| known.get(site).map_or([0.0; RESOURCES], |p| p.values()));
    solver.set_prices(&prices.collect::<Vec<_>>());
    let same = |site: &SiteId| {
        known.get(site).map(|price| price.open)
            == cluster.sites.get(site).map(super::model::Site::takes_groups)
    };
    if last.policy_version != cluster.policy_version || !problem.sites.iter().all(same) {
        solver.reshape();
    }
    Start::Warm
}

/// A group that should be elsewhere.
struct Wish {
    /// Index of the group.
    group: usize,
    /// Index of the site.
    to: u8,
    reason: MoveReason,
    /// What comes first has less.
    key: f64,
}

fn rank(reason: MoveReason) -> u8 {
    match reason {
        MoveReason::Drain => 0,
        MoveReason::Operator => 1,
        MoveReason::Load => 2,
        MoveReason::Delay => 3,
    }
}

fn wishes(problem: &Problem, solver: &Solver, certificate: &Certificate, min_gain_ms: f64) -> Vec<Wish> {
    let over: Vec<bool> = (0..problem.sites.len()).map(|site| exceeds(problem, site)).collect();
    let fits = certificate.exceeded.is_empty();
    // Prices leave a rest of a permille; it must not move groups to and fro.
    let leaving = problem.groups.iter().any(|entry| matches!(entry.stand, Stand::Leaving(_)));
    let better = fits && (leaving || over.contains(&true) || certificate.cost < staying(problem));
    let mut wishes = Vec::new();
    for (group, entry) in problem.groups.iter().enumerate() {
        let Some(to) = solver.site(group).filter(|&to| to != entry.owner) else { continue };
        let gain_ms = f64::from(entry.here_cost_ms - cost_ms(problem, group, to));
        let weight = f64::from(problem.instance.weight(group));
        let reason = match entry.stand {
            Stand::Fixed(_) => continue,
            Stand::Leaving(reason) => reason,
            Stand::Open if over[usize::from(entry.owner)] => MoveReason::Load,
            // Where not all fits, only what gains by itself is worth a move.
            Stand::Open if better || (!fits && gain_ms >= min_gain_ms && gain_ms > 0.0) => MoveReason::Delay,
            Stand::Open => continue,
        };
        let key = match reason {
            // Those first that lose least by each packet.
            MoveReason::Load => -gain_ms,
            MoveReason::Delay => -gain_ms * weight,
            MoveReason::Drain | MoveReason::Operator => 0.0,
        };
        wishes.push(Wish { group, to, reason, key });
    }
    wishes.sort_by(|a, b| {
        rank(a.reason).cmp(&rank(b.reason)).then(a.key.total_cmp(&b.key)).then(a.group.cmp(&b.group))
    });
    wishes
}

/// What it costs when nobody leaves. Moves in hand count at their target, as they do for the solver.
fn staying(problem: &Problem) -> f64 {
    let cost = |(group, entry): (usize, &Entry)| {
        let ms = match entry.stand {
            Stand::Fixed(_) => problem.instance.candidates(group).map(|only| only.cost_ms).sum(),
            Stand::Open | Stand::Leaving(_) => entry.here_cost_ms,
        };
        f64::from(problem.instance.weight(group)) * f64::from(ms)
    };
    problem.groups.iter().enumerate().map(cost).sum()
}

fn cost_ms(problem: &Problem, group: usize, site: u8) -> f32 {
    problem.at(group, site).map_or(f32::INFINITY, |(cost_ms, _)| cost_ms)
}

fn exceeds(problem: &Problem, site: usize) -> bool {
    let room = problem.instance.room(site as u8);
    (0..RESOURCES).any(|r| problem.load[site][r] > room[r])
}

/// As many as the budget allows, first wishes first, each only where there is room now. Groups that have to leave, or whose
/// site has too much, may use the headroom too, which else stays free; and who has to leave goes to a full site rather
/// than not at all.
fn choose(problem: &Problem, wishes: Vec<Wish>, budget: usize, quotas: Quotas) -> Vec<Wish> {
    let mut choice = Choice { problem, load: problem.load.clone(), budget, quotas, chosen: Vec::new() };
    let waiting = choice.start(wishes, |choice, wish| choice.fits(wish, problem.instance.room(wish.to)));
    let waiting = choice.start(waiting, |choice, wish| {
        wish.reason != MoveReason::Delay && choice.fits(wish, problem.capacity[usize::from(wish.to)])
    });
    choice.start(waiting, |_, wish| rank(wish.reason) < rank(MoveReason::Load));
    for site in 0..problem.sites.len() {
        choice.relieve(site);
    }
    choice.chosen
}

/// Moves that are chosen, and what sites carry when these are done.
struct Choice<'a> {
    problem: &'a Problem,
    load: Vec<PerResource<f64>>,
    budget: usize,
    quotas: Quotas,
    chosen: Vec<Wish>,
}

/// What rules leave of moves in this minute.
struct Quotas {
    /// For delay or load.
    voluntary: usize,
    /// By the site that is drained.
    drains: BTreeMap<SiteId, usize>,
}

impl Quotas {
    fn new(cluster: &Cluster, recent: &[(SiteId, MoveReason)]) -> Self {
        let willing = |reason: MoveReason| matches!(reason, MoveReason::Delay | MoveReason::Load);
        let mut quotas = Self { voluntary: usize::MAX, drains: BTreeMap::new() };
        for rule in &cluster.policy.rules {
            if let Kind::Budget(budget) = &rule.kind {
                let spent = recent.iter().filter(|(_, reason)| willing(*reason)).count();
                quotas.voluntary = (budget.moves_per_minute as usize).saturating_sub(spent);
            }
            if let Kind::Drain(Drain { site, moves_per_minute: Some(rate) }) = &rule.kind {
                let left = recent.iter().filter(|start| **start == (*site, MoveReason::Drain)).count();
                let rest = (*rate as usize).saturating_sub(left);
                quotas.drains.entry(*site).and_modify(|least| *least = rest.min(*least)).or_insert(rest);
            }
        }
        quotas
    }

    /// What is left for a move like this.
    fn left(&mut self, from: SiteId, reason: MoveReason) -> Option<&mut usize> {
        match reason {
            MoveReason::Delay | MoveReason::Load => Some(&mut self.voluntary),
            MoveReason::Drain => self.drains.get_mut(&from),
            MoveReason::Operator => None,
        }
    }
}

impl Choice<'_> {
    /// Chooses what may start, again and again, since each move makes room where it leaves; returns the rest.
    fn start(&mut self, mut waiting: Vec<Wish>, may: impl Fn(&Self, &Wish) -> bool) -> Vec<Wish> {
        loop {
            let before = self.chosen.len();
            let mut rest = Vec::new();
            for wish in waiting {
                if self.allowed(&wish) && may(self, &wish) {
                    self.take(wish);
                } else {
                    rest.push(wish);
                }
            }
            if self.budget == 0 || self.chosen.len() == before {
                return rest;
            }
            waiting = rest;
        }
    }

    fn from(&self, wish: &Wish) -> SiteId {
        self.problem.sites[usize::from(self.problem.groups[wish.group].owner)]
    }

    fn allowed(&mut self, wish: &Wish) -> bool {
        let from = self.from(wish);
        self.budget > 0 && self.quotas.left(from, wish.reason).is_none_or(|left| *left > 0)
    }

    fn take(&mut self, wish: Wish) {
        let from = self.from(&wish);
        self.budget -= 1;
        if let Some(left) = self.quotas.left(from, wish.reason) {
            *left -= 1;
        }
        shift(self.problem, &mut self.load, &wish);
        self.chosen.push(wish);
    }

    /// A site above its capacity from which nothing leaves, since those wait that are to make room, gives away the group that
    /// loses least by each packet, to where it fits.
    fn relieve(&mut self, site: usize) {
        let here = |wish: &Wish| usize::from(self.problem.groups[wish.group].owner) == site;
        let over = (0..RESOURCES).any(|r| self.load[site][r] > self.problem.capacity[site][r]);
        if self.budget == 0 || self.quotas.voluntary == 0 || !over || self.chosen.iter().any(here) {
            return;
        }
        let offers = self
            .problem
            .groups
            .iter()
            .enumerate()
            .filter(|(_, entry)| usize::from(entry.owner) == site && entry.stand == Stand::Open);
        let offers = offers.flat_map(|(group, entry)| {
            let elsewhere = self.problem.instance.candidates(group).filter(|there| there.site != entry.owner);
            elsewhere.map(move |there| Wish {
                group,
                to: there.site,
                reason: MoveReason::Load,
                key: f64::from(there.cost_ms - entry.here_cost_ms),
            })
        });
        let helps = |wish: &Wish| {
            let demand = self.problem.instance.demand(wish.group);
            let fits = self.fits(wish, self.problem.capacity[usize::from(wish.to)]);
            fits && (0..RESOURCES)
                .any(|r| demand[r] > 0.0 && self.load[site][r] > self.problem.capacity[site][r])
        };
        if let Some(best) = offers.filter(helps).min_by(|a, b| a.key.total_cmp(&b.key)) {
            self.take(best);
        }
    }

    fn fits(&self, wish: &Wish, limit: PerResource<f64>) -> bool {
        let demand = self.problem.instance.demand(wish.group);
        let load = self.load[usize::from(wish.to)];
        // Sums of floats are right to some digits only.
        (0..RESOURCES).all(|r| demand[r] == 0.0 || load[r] + f64::from(demand[r]) <= limit[r] * (1.0 + 1e-9))
    }
}

fn shift(problem: &Problem, load: &mut [PerResource<f64>], wish: &Wish) {
    let demand = problem.instance.demand(wish.group);
    let from = problem.groups[wish.group].owner;
    for (r, demand) in demand.iter().enumerate() {
        load[usize::from(from)][r] -= f64::from(*demand);
        load[usize::from(wish.to)][r] += f64::from(*demand);
    }
}

fn commands(problem: &Problem, chosen: &[Wish]) -> Vec<Command> {
    let mut by_reason: BTreeMap<u8, (MoveReason, Vec<(GroupId, SiteId)>)> = BTreeMap::new();
    for wish in chosen {
        let (_, moves) = by_reason.entry(rank(wish.reason)).or_insert_with(|| (wish.reason, Vec::new()));
        moves.push((problem.groups[wish.group].id, problem.sites[usize::from(wish.to)]));
    }
    let start = |(reason, mut moves): (MoveReason, Vec<(GroupId, SiteId)>)| {
        moves.sort_unstable();
        Command::StartMoves { moves, reason }
    };
    by_reason.into_values().map(start).collect()
}

fn publish(cluster: &Cluster, problem: &Problem, solver: &Solver, certificate: &Certificate) -> Round {
    let placed = |(group, _): (usize, &Entry)| {
        let (_, delay_ms) = problem.at(group, solver.site(group)?)?;
        Some(f64::from(problem.instance.weight(group)) * f64::from(delay_ms))
    };
    let planned: f64 = problem.groups.iter().enumerate().filter_map(placed).sum();
    let price = |(&site, values): (&SiteId, &PerResource<f64>)| SitePrices {
        site,
        open: cluster.sites.get(&site).is_some_and(super::model::Site::takes_groups),
        packets: values[Resource::Packets as usize],
        flows: values[Resource::Flows as usize],
        bits: values[Resource::Bits as usize],
    };
    let mut exceeded: Vec<SiteId> =
        certificate.exceeded.iter().map(|(site, _, _)| problem.sites[usize::from(*site)]).collect();
    exceeded.dedup();
    Round {
        policy_version: cluster.policy_version,
        groups: problem.groups.len() as u64,
        packets_per_s: problem.weight,
        delay_ms: problem.mean(problem.present),
        planned_ms: problem.mean(planned),
        objective_ms: problem.mean(certificate.cost),
        bound_ms: problem.mean(certificate.bound),
        unconstrained_ms: problem.mean(certificate.unconstrained),
        light_ms: problem.mean(problem.light),
        gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
        moves: 0,
        started: 0,
        stranded: problem.stranded.len() as u64,
        exceeded,
        prices: problem.sites.iter().zip(&solver.prices()).map(price).collect(),
        solve_us: 0,
        at_ms: 0,
    }
}
