//! The leader's round: where groups should be by the solver, and which of them set out now.
//!
//! A round over all groups begins from what is replicated, the prices of the last published round, at the same leader or another:
//! same state, same reports, same answer. Between such rounds a leader looks only at the groups that differ (`core/kept.rs`).
//!
//! A move has to pay its charge, so a placement is left alone unless another is better by that; and no move is
//! started towards a site that has no room for it now, since those that are to make room may still be on their way.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::apart::Apart;
use super::command::{Command, MOVES_PER_COMMAND_MAX};
use super::delay::{self, Model};
use super::kept::Kept;
use super::model::{Cluster, Group, MoveReason, Round, SitePrices};
use super::policy::{Drain, Kind, Rule};
use super::problem::{Classes, Entry, Problem, Purpose, Stand};
use super::report::Probe;
use super::spread::Spreading;
use crate::solver::survive::{Among, Needs, Standbys};
use crate::solver::{Certificate, PerResource, Prices, RESOURCES, Resource, Start};

/// Which groups may be moved now.
pub struct Readiness<'a> {
    /// Whether a group may be moved at all: not when its last move has just failed.
    pub free: &'a dyn Fn(&GroupId) -> bool,
    /// Whether it has been at its owner for long enough to be moved for its gain.
    pub rested: &'a dyn Fn(&GroupId) -> bool,
    /// Moves that were started within the last minute: from where, and why.
    pub recent: &'a [(SiteId, MoveReason)],
    /// The wall clock, in milliseconds since 1970, for drains with a deadline; `None` where nobody knows it.
    pub wall_ms: Option<u64>,
}

/// What a round brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Moves to start.
    pub commands: Vec<Command>,
    /// What it achieved; nothing without sites.
    pub round: Option<Round>,
    /// What is worth measuring, and from where, the most worth first. A round over few groups goes on with what the last one over
    /// all was in doubt about.
    pub probes: Vec<(SiteId, Probe)>,
}

/// One round over all groups: what to move now.
#[must_use]
pub fn plan(cluster: &Cluster, model: &Model, ready: &Readiness<'_>, now: Micros) -> Plan {
    whole(cluster, model, ready, now).map_or_else(Plan::default, |(plan, _)| plan)
}

/// The same, with what can be kept for rounds over few groups.
pub(super) fn whole(
    cluster: &Cluster,
    model: &Model,
    ready: &Readiness<'_>,
    now: Micros,
) -> Option<(Plan, Kept)> {
    // Demand is made finite where reports are taken: what is left cannot be wrong, and a round without moves is the answer.
    let (mut problem, frame) =
        Problem::with_frame(cluster, model, Purpose::Plan(ready), now).ok().flatten()?;
    let start = resume(cluster, &mut problem);
    let (certificate, standbys) = solve(&mut problem, start);
    let unprotected = standbys.as_ref().map_or(0, |standbys| unprotected(&problem, standbys));
    let (mut commands, mut round) = decide(cluster, &problem, &certificate, ready);
    round.unprotected = unprotected;
    round.touched = round.groups;
    commands.extend(standby_changes(cluster, &problem, standbys.as_ref()));
    let probes = probes(model, &mut problem, now);
    let kept = Kept::new(cluster, model, (problem, frame), (&certificate, unprotected), now);
    Some((Plan { commands, round: Some(round), probes }, kept))
}

/// What to move, and what there is to say of a solved problem.
pub(super) fn decide(
    cluster: &Cluster,
    problem: &Problem,
    certificate: &Certificate,
    ready: &Readiness<'_>,
) -> (Vec<Command>, Round) {
    let wishes = wishes(problem, certificate, cluster.policy.min_gain_ms);
    let wanted = wishes.len();
    let budget = (cluster.policy.moves_in_flight_max as usize).saturating_sub(cluster.moves.len());
    let quotas = Quotas::new(cluster, ready);
    let chosen = choose(cluster, problem, wishes, budget.min(MOVES_PER_COMMAND_MAX), quotas);
    let mut round = publish(cluster, problem, certificate);
    (round.moves, round.started) = (wanted as u64, chosen.len() as u64);
    (commands(problem, &chosen), round)
}

/// Solves, with room for the loss of any one domain where that is wanted.
pub(super) fn solve(problem: &mut Problem, start: Start) -> (Certificate, Option<Standbys>) {
    let Problem { solver, standby, capacity, domain, .. } = problem;
    if !standby.wanted.contains(&true) {
        return (solver.solve(start), None);
    }
    let among = (!standby.sets.is_empty()).then_some(Among { sets: &standby.sets, of: &standby.among });
    let needs = Needs {
        capacity,
        domain,
        standby: &standby.present,
        wanted: &standby.wanted,
        among,
        beside: Some(&standby.beside),
    };
    match solver.solve_to_survive(start, &needs) {
        Ok((certificate, standbys)) => (certificate, Some(standbys)),
        // Needs are made beside the instance, of the same length; without them the placement is still right.
        Err(_) => (solver.solve(start), None),
    }
}

/// Standbys that a rule wants known and that are others than before.
fn standby_changes(cluster: &Cluster, problem: &Problem, standbys: Option<&Standbys>) -> Option<Command> {
    let wanted: BTreeMap<GroupId, Option<SiteId>> = (0..problem.groups.len())
        .filter(|&group| problem.standby.named[group])
        .map(|group| {
            let site = standbys.and_then(|standbys| standby_for_now(problem, group, standbys.sites[group]?));
            (problem.groups[group].id, site.map(|site| problem.sites[usize::from(site)]))
        })
        .collect();
    let mut rules = Classes::new(&cluster.policy);
    let mut change = |group: &Group| {
        let site = match wanted.get(&group.id) {
            Some(site) => *site,
            // Groups without traffic keep theirs, as long as a rule wants one.
            None if group.standby.is_some() && rules.effect(&group.id).standby.is_none() => None,
            None => group.standby,
        };
        (site != group.standby).then_some((group.id, site))
    };
    let concerned = |group: &&Group| group.standby.is_some() || wanted.contains_key(&group.id);
    let changes: Vec<(GroupId, Option<SiteId>)> = cluster
        .groups
        .values()
        .filter(concerned)
        .filter_map(&mut change)
        .take(MOVES_PER_COMMAND_MAX)
        .collect();
    (!changes.is_empty()).then_some(Command::SetStandbys { standbys: changes })
}

/// Groups that have no standby where they are to be, or none where they are.
fn unprotected(problem: &Problem, standbys: &Standbys) -> u64 {
    let lacks = |&group: &usize| {
        let planned = standbys.sites[group];
        problem.standby.named[group]
            && planned.is_some_and(|site| standby_for_now(problem, group, site).is_none())
    };
    (standbys.unprotected.len() + (0..problem.groups.len()).filter(lacks).count()) as u64
}

/// The standby of a group where it is now. That of its planned place may be in the domain of its owner: until the group has moved,
/// if ever it does, the present standby stays, or else the planned place, which has room for it, is its standby.
fn standby_for_now(problem: &Problem, group: usize, planned: u8) -> Option<u8> {
    let Problem { standby, domain, groups, solver, .. } = problem;
    let domain = |site: u8| domain[usize::from(site)];
    let elsewhere = |site: &u8| domain(*site) != domain(groups[group].owner);
    let holds = |site: &u8| elsewhere(site) && standby.may_be_at(group, *site);
    let present = || standby.present[group].filter(holds);
    Some(planned).filter(elsewhere).or_else(present).or_else(|| solver.site(group).filter(holds))
}

/// What is worth measuring.
pub(super) fn probes(model: &Model, problem: &mut Problem, now: Micros) -> Vec<(SiteId, Probe)> {
    let Problem { doubts, groups, sites, .. } = problem;
    delay::probes::choose(model, doubts, |group| groups[group as usize].id, sites, groups.len(), now)
}

/// Gives the solver the prices of the last round.
fn resume(cluster: &Cluster, problem: &mut Problem) -> Start {
    let Some(last) = &cluster.round else { return Start::Cold };
    let known: BTreeMap<SiteId, &SitePrices> = last.prices.iter().map(|price| (price.site, price)).collect();
    let prices = problem.sites.iter().map(|site| known.get(site).map_or([0.0; RESOURCES], |p| p.values()));
    let classes = last.spread_prices.clone();
    let prices = Prices { sites: prices.collect(), classes };
    problem.solver.set_all_prices(&prices);
    let same = |site: &SiteId| {
        known.get(site).map(|price| price.open)
            == cluster.sites.get(site).map(super::model::Site::takes_groups)
    };
    if last.policy_version != cluster.policy_version || !problem.sites.iter().all(same) {
        problem.solver.reshape();
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

/// As many as [`rank`] has.
const RANKS: usize = 4;

fn rank(reason: MoveReason) -> u8 {
    match reason {
        MoveReason::Drain => 0,
        MoveReason::Operator => 1,
        MoveReason::Load => 2,
        MoveReason::Delay => 3,
    }
}

fn wishes(problem: &Problem, certificate: &Certificate, min_gain_ms: f64) -> Vec<Wish> {
    let over: Vec<bool> = (0..problem.sites.len()).map(|site| exceeds(problem, site)).collect();
    let fits = certificate.exceeded.is_empty() && certificate.crowded.is_empty();
    let crowded = |group: usize, entry: &Entry| {
        let class = problem.class[group].map(|class| &problem.spreads[usize::from(class)]);
        class.is_some_and(|class| class.is_over(problem.sites[usize::from(entry.owner)]))
    };
    // Prices leave a rest of a permille; it must not move groups to and fro.
    let leaving = problem.groups.iter().any(|entry| matches!(entry.stand, Stand::Leaving(_)));
    let presses = leaving
        || over.contains(&true)
        || problem.groups.iter().enumerate().any(|(group, entry)| crowded(group, entry));
    let better = fits && (presses || certificate.cost < staying(problem));
    let mut wishes = Vec::new();
    for (group, entry) in problem.groups.iter().enumerate() {
        let Some(to) = problem.solver.site(group).filter(|&to| to != entry.owner) else { continue };
        let gain_ms = f64::from(entry.here_cost_ms - cost_ms(problem, group, to));
        let weight = f64::from(problem.instance().weight(group));
        let reason = match entry.stand {
            Stand::Fixed(_) => continue,
            Stand::Leaving(reason) => reason,
            Stand::Open if crowded(group, entry) => MoveReason::Operator,
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
            Stand::Fixed(_) => problem.instance().candidates(group).map(|only| only.cost_ms).sum(),
            Stand::Open | Stand::Leaving(_) => entry.here_cost_ms,
        };
        f64::from(problem.instance().weight(group)) * f64::from(ms)
    };
    problem.groups.iter().enumerate().map(cost).sum()
}

fn cost_ms(problem: &Problem, group: usize, site: u8) -> f32 {
    problem.at(group, site).map_or(f32::INFINITY, |(cost_ms, _)| cost_ms)
}

fn exceeds(problem: &Problem, site: usize) -> bool {
    let room = problem.instance().room(site as u8);
    (0..RESOURCES).any(|r| problem.load[site][r] > room[r])
}

/// As many as the budget allows, first wishes first, each only where there is room now. Groups that have to leave, or whose
/// site has too much, may use the headroom too, which else stays free; and who has to leave goes to a full site rather
/// than not at all.
fn choose(
    cluster: &Cluster,
    problem: &Problem,
    wishes: Vec<Wish>,
    budget: usize,
    quotas: Quotas,
) -> Vec<Wish> {
    let mut choice = Choice {
        cluster,
        apart: Apart::new(&cluster.policy),
        problem,
        load: problem.load.clone(),
        spreads: std::array::from_fn(|_| problem.spreads.clone()),
        budget,
        quotas,
        chosen: Vec::new(),
    };
    let waiting = choice.start(wishes, |choice, wish| choice.fits(wish, problem.instance().room(wish.to)));
    let waiting = choice.start(waiting, |choice, wish| {
        wish.reason != MoveReason::Delay && choice.fits(wish, problem.capacity[usize::from(wish.to)])
    });
    let waiting = choice.start(waiting, |_, wish| rank(wish.reason) < rank(MoveReason::Load));
    choice.exchange(waiting);
    for site in 0..problem.sites.len() {
        choice.relieve(site);
    }
    choice.keep_apart();
    choice.chosen
}

/// Moves that are chosen, and what sites carry when these are done.
struct Choice<'a> {
    cluster: &'a Cluster,
    apart: Apart<'a>,
    problem: &'a Problem,
    load: Vec<PerResource<f64>>,
    /// Who is where of those that are spread, as the commands see it that start moves of each rank: those of a later one have
    /// not left yet.
    spreads: [Vec<Spreading>; RANKS],
    budget: usize,
    quotas: Quotas,
    chosen: Vec<Wish>,
}

/// Where groups are that are spread, and where chosen ones go.
struct Seen {
    spreads: Vec<Spreading>,
    going: BTreeMap<GroupId, SiteId>,
}

/// What rules leave of moves in this minute.
struct Quotas {
    /// For delay or load.
    voluntary: usize,
    /// By the site that is drained.
    drains: BTreeMap<SiteId, usize>,
}

impl Quotas {
    fn new(cluster: &Cluster, ready: &Readiness<'_>) -> Self {
        let recent = ready.recent;
        let willing = |reason: MoveReason| matches!(reason, MoveReason::Delay | MoveReason::Load);
        let mut quotas = Self { voluntary: usize::MAX, drains: BTreeMap::new() };
        for rule in &cluster.policy.rules {
            if let Kind::Budget(budget) = &rule.kind {
                let spent = recent.iter().filter(|(_, reason)| willing(*reason)).count();
                quotas.voluntary = (budget.moves_per_minute as usize).saturating_sub(spent);
            }
            if let Kind::Drain(drain) = &rule.kind
                && let Some(rate) = drain_rate(cluster, rule, drain, ready.wall_ms)
            {
                let left = recent.iter().filter(|start| **start == (drain.site, MoveReason::Drain)).count();
                let rest = rate.saturating_sub(left);
                quotas.drains.entry(drain.site).and_modify(|least| *least = rest.min(*least)).or_insert(rest);
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

/// Groups that may leave in a minute by a drain rule: what it says, or as few as it takes to be done by its deadline.
fn drain_rate(cluster: &Cluster, rule: &Rule, drain: &Drain, wall_ms: Option<u64>) -> Option<usize> {
    let fixed = drain.moves_per_minute.map(|rate| rate as usize);
    let (Some(deadline), Some(now)) = (drain.deadline_ms, wall_ms) else { return fixed };
    // The last minute is for those that are late.
    let minutes = (deadline.saturating_sub(now) / 60_000) as usize;
    if minutes == 0 {
        return fixed;
    }
    let leaves = |group: &&Group| group.owner == drain.site && cluster.policy.covers(rule, &group.id);
    let even = cluster.groups.values().filter(leaves).count().div_ceil(minutes);
    Some(fixed.map_or(even, |fixed| fixed.min(even)))
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
        self.budget > 0
            && self.quotas.left(from, wish.reason).is_none_or(|left| *left > 0)
            && self.may_enter(wish)
    }

    /// Whether those that a group is kept apart from, or spread with, leave it the place now. They may be on their way out.
    fn may_enter(&self, wish: &Wish) -> bool {
        let (from, to) = (self.from(wish), self.problem.sites[usize::from(wish.to)]);
        let spreads = &self.spreads[usize::from(rank(wish.reason))];
        let spread = self.problem.class[wish.group].map(|class| &spreads[usize::from(class)]);
        spread.is_none_or(|spread| spread.has_room(to) || spread.place(from) == spread.place(to))
            && self.apart.forbidding(self.cluster, &self.problem.groups[wish.group].id, to).is_none()
    }

    fn take(&mut self, wish: Wish) {
        let from = self.from(&wish);
        if let Some(class) = self.problem.class[wish.group] {
            let to = self.problem.sites[usize::from(wish.to)];
            for (rank_of, spreads) in self.spreads.iter_mut().enumerate() {
                let leaves = rank_of >= usize::from(rank(wish.reason));
                spreads[usize::from(class)].shift(leaves.then_some(from), Some(to));
            }
        }
        self.budget -= 1;
        if let Some(left) = self.quotas.left(from, wish.reason) {
            *left -= 1;
        }
        shift(self.problem, &mut self.load, &wish);
        self.chosen.push(wish);
    }

    /// Leaves out what would break a rule about groups together, as the log will see it: each command with those before it
    /// done. One that was chosen later may have taken away what an earlier one relied on.
    fn keep_apart(&mut self) {
        while !self.apart.is_empty() {
            let seen: [Seen; RANKS] = std::array::from_fn(|rank| self.seen(rank));
            let Some(at) = self.chosen.iter().position(|wish| self.is_against(wish, &seen)) else { return };
            self.chosen.remove(at);
        }
    }

    /// What the log has when the commands up to a rank are done.
    fn seen(&self, up_to: usize) -> Seen {
        let mut seen = Seen { spreads: self.problem.spreads.clone(), going: BTreeMap::new() };
        for wish in self.chosen.iter().filter(|wish| usize::from(rank(wish.reason)) <= up_to) {
            let to = self.problem.sites[usize::from(wish.to)];
            seen.going.insert(self.problem.groups[wish.group].id, to);
            if let Some(class) = self.problem.class[wish.group] {
                seen.spreads[usize::from(class)].shift(Some(self.from(wish)), Some(to));
            }
        }
        seen
    }

    fn is_against(&self, wish: &Wish, seen: &[Seen; RANKS]) -> bool {
        let Seen { spreads, going } = &seen[usize::from(rank(wish.reason))];
        let (from, to) = (self.from(wish), self.problem.sites[usize::from(wish.to)]);
        let spread = self.problem.class[wish.group].map(|class| &spreads[usize::from(class)]);
        let id = &self.problem.groups[wish.group].id;
        spread.is_some_and(|spread| spread.is_over(to) && spread.place(from) != spread.place(to))
            || self.apart.forbidding_with(self.cluster, going, id, to).is_some()
    }

    /// Groups that wait for one another's places go together, in one command, for the most urgent reason of them: those that
    /// are spread where the places are full, and those that are kept apart. The placement that they go to keeps all limits, so
    /// where all can go, they do.
    fn exchange(&mut self, waiting: Vec<Wish>) {
        let mut together: Vec<Wish> = waiting.into_iter().filter(|wish| !self.may_enter(wish)).collect();
        loop {
            // Those that leave later do not count here: all of these leave at once.
            let mut spreads = self.spreads[0].clone();
            let to = |wish: &Wish| self.problem.sites[usize::from(wish.to)];
            let class = |wish: &Wish| self.problem.class[wish.group].map(usize::from);
            let id = |wish: &Wish| self.problem.groups[wish.group].id;
            let going: BTreeMap<GroupId, SiteId> = together.iter().map(|wish| (id(wish), to(wish))).collect();
            for wish in &together {
                if let Some(class) = class(wish) {
                    spreads[class].shift(Some(self.from(wish)), Some(to(wish)));
                }
            }
            let all = together.len();
            together.retain(|wish| {
                class(wish).is_none_or(|class| !spreads[class].is_over(to(wish)))
                    && self.fits(wish, self.problem.capacity[usize::from(wish.to)])
                    && self.apart.forbidding_with(self.cluster, &going, &id(wish), to(wish)).is_none()
            });
            if together.len() == all {
                break;
            }
        }
        let reason = together.iter().map(|wish| wish.reason).min_by_key(|reason| rank(*reason));
        if let Some(reason) = reason.filter(|_| together.len() <= self.quotas.voluntary.min(self.budget)) {
            together.into_iter().for_each(|wish| self.take(Wish { reason, ..wish }));
        }
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
            let elsewhere =
                self.problem.instance().candidates(group).filter(|there| there.site != entry.owner);
            elsewhere.map(move |there| Wish {
                group,
                to: there.site,
                reason: MoveReason::Load,
                key: f64::from(there.cost_ms - entry.here_cost_ms),
            })
        });
        let helps = |wish: &Wish| {
            let demand = self.problem.instance().demand(wish.group);
            let fits = self.fits(wish, self.problem.capacity[usize::from(wish.to)]);
            fits && self.may_enter(wish)
                && (0..RESOURCES)
                    .any(|r| demand[r] > 0.0 && self.load[site][r] > self.problem.capacity[site][r])
        };
        if let Some(best) = offers.filter(helps).min_by(|a, b| a.key.total_cmp(&b.key)) {
            self.take(best);
        }
    }

    fn fits(&self, wish: &Wish, limit: PerResource<f64>) -> bool {
        let demand = self.problem.instance().demand(wish.group);
        let load = self.load[usize::from(wish.to)];
        // Sums of floats are right to some digits only.
        (0..RESOURCES).all(|r| demand[r] == 0.0 || load[r] + f64::from(demand[r]) <= limit[r] * (1.0 + 1e-9))
    }
}

fn shift(problem: &Problem, load: &mut [PerResource<f64>], wish: &Wish) {
    let demand = problem.instance().demand(wish.group);
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

fn publish(cluster: &Cluster, problem: &Problem, certificate: &Certificate) -> Round {
    let solver = &problem.solver;
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
        planned_ms: problem.mean(problem.planned()),
        objective_ms: problem.mean(certificate.cost),
        bound_ms: problem.mean(certificate.bound),
        priced_ms: Some(problem.mean(certificate.priced)),
        unconstrained_ms: problem.mean(certificate.unconstrained),
        light_ms: problem.mean(problem.light),
        gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
        moves: 0,
        started: 0,
        touched: 0,
        stranded: problem.stranded.len() as u64,
        unprotected: 0,
        vain: 0,
        exceeded,
        spread_prices: solver.all_prices().classes,
        prices: problem.sites.iter().zip(&solver.prices()).map(price).collect(),
        solve_us: 0,
        at_ms: 0,
    }
}
