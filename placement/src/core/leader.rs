//! What the leader does by itself: leases, the fate of moves whose parties die, drains and rounds of the solver.
//!
//! Sans-IO. Calls: [`Brain::new`] when a node becomes leader, [`Brain::handle_report`] for each report,
//! [`Brain::poll`] every so often with the present state; what it returns is proposed. Everything it wants is
//! derived from the state again each time, so nothing is lost when a proposal is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use flow::{GroupId, Micros, MoveId, SiteId};

use super::command::Command;
use super::delay::{Demand, Locate, Model};
use super::explain::{self, Explanation};
use super::kept::Kept;
use super::model::{Cluster, Move, MoveOutcome, MovePhase, MoveReason, Round};
use super::plan::{self, Plan, Readiness};
use super::report::{PROBES_MAX, Probe, SiteReport};
use super::shape::{Known, Shaper};
use super::stay::Stays;

/// How long the leader waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrainTimings {
    /// A site without a report for so long is dead.
    pub lease: Micros,
    /// A move that prepares for longer is aborted.
    pub preparing_max: Micros,
    /// Time between rounds of the solver.
    pub round: Micros,
    /// A group whose move failed is left alone for so long.
    pub retry: Micros,
}

impl Default for BrainTimings {
    fn default() -> Self {
        Self {
            lease: Micros::from_secs(3),
            preparing_max: Micros::from_secs(60),
            round: Micros::from_secs(1),
            retry: Micros::from_secs(10),
        }
    }
}

/// The leader's own memory. A new leader starts with none but of delays and loads, which all nodes hear of: each site gets a
/// whole lease, each move and each stay starts anew.
pub struct Brain {
    timings: BrainTimings,
    started: Micros,
    reported: BTreeMap<SiteId, Micros>,
    /// When this leader first saw each move, and of which group it is.
    moves: BTreeMap<MoveId, (GroupId, Micros)>,
    /// Groups whose last move failed, and until when they are left alone.
    failed: BTreeMap<GroupId, Micros>,
    stays: Stays,
    model: Model,
    next_round: Micros,
    /// Of the last round over all groups.
    kept: Option<Kept>,
    /// The next round over all groups is not before.
    next_whole: Micros,
    /// The last round was one over all groups.
    was_whole: bool,
    /// Groups that may be moved again since the last round.
    released: BTreeSet<GroupId>,
    /// What calls for a round at once when it differs: the policy, and which sites take groups.
    shape: (u64, Vec<SiteId>),
    published: Option<Micros>,
    /// Moves that were wished for within the last minute.
    recent: VecDeque<(Micros, SiteId, MoveReason)>,
    wall_ms: Option<u64>,
    probes: Probes,
    shaper: Shaper,
}

/// What sites are asked to measure.
#[derive(Default)]
struct Probes {
    /// By site, the most worth first.
    wishes: BTreeMap<SiteId, VecDeque<Probe>>,
    /// What each site may still be asked for, and when that was last.
    left: BTreeMap<SiteId, (f64, Micros)>,
}

/// Most probes per second of a site, whatever it is willing to send.
const PROBES_PER_S_MAX: u16 = 100;
/// Seconds' worth of probes that a site may be asked for at once.
const PROBE_BURST_S: f64 = 2.0;

impl Probes {
    fn wish(&mut self, wishes: &[(SiteId, Probe)]) {
        for (site, probe) in wishes {
            let queue = self.wishes.entry(*site).or_default();
            if queue.len() < PROBES_MAX && !queue.contains(probe) {
                queue.push_back(*probe);
            }
        }
    }

    /// As many as the site is willing to send by now.
    fn take(&mut self, site: SiteId, per_s: u16, now: Micros) -> Vec<Probe> {
        let rate = f64::from(per_s.min(PROBES_PER_S_MAX));
        let (left, at) = self.left.entry(site).or_insert((rate, now));
        let gained = rate * now.since(*at).0 as f64 / 1e6;
        (*left, *at) = ((*left + gained).min(PROBE_BURST_S * rate), now);
        let Some(queue) = self.wishes.get_mut(&site) else { return Vec::new() };
        let count = (*left as usize).min(queue.len());
        *left -= count as f64;
        queue.drain(..count).collect()
    }
}

const MINUTE: Micros = Micros(60_000_000);

/// A group neither splits nor merges for so long after it has moved: its load is still being measured.
const SHAPE_REST: Micros = MINUTE;

/// A round that brings nothing new is published again after so long, as a sign of life.
const PUBLISH_AFTER: Micros = Micros(30_000_000);
/// Of the leader's time, rounds over all groups take at most one part in so many, and those over few as much again; of a follower's,
/// looking at them.
pub const ROUND_SHARE: u64 = 10;

impl Brain {
    /// At the start of a term of office, knowing nothing.
    #[must_use]
    pub fn new(timings: BrainTimings, geography: Option<Arc<dyn Locate>>, now: Micros) -> Self {
        Self::knowing(timings, Model::new(geography), now)
    }

    /// At the start of a term of office, with what the node has heard before it led.
    #[must_use]
    pub fn knowing(timings: BrainTimings, model: Model, now: Micros) -> Self {
        Self {
            timings,
            started: now,
            reported: BTreeMap::new(),
            moves: BTreeMap::new(),
            failed: BTreeMap::new(),
            stays: Stays::default(),
            model,
            // Reports must come in before anything is judged by them.
            next_round: now.plus(timings.lease),
            kept: None,
            next_whole: now,
            was_whole: false,
            released: BTreeSet::new(),
            shape: (0, Vec::new()),
            published: None,
            recent: VecDeque::new(),
            wall_ms: None,
            probes: Probes::default(),
            shaper: Shaper::default(),
        }
    }

    /// A site is alive, and says what it has seen.
    pub fn handle_report(&mut self, report: &SiteReport, now: Micros) {
        self.reported.insert(report.site, now);
        self.model.handle_report(report, now);
    }

    /// What the wall clock says, in milliseconds since 1970: drains with a deadline go by it.
    pub fn handle_wall_clock(&mut self, wall_ms: u64) {
        self.wall_ms = Some(wall_ms);
    }

    /// What the site of a report is asked to measure, within what it is willing to send. To be called once per report, after
    /// [`Brain::handle_report`].
    pub fn probes(&mut self, report: &SiteReport, now: Micros) -> Vec<Probe> {
        let probes = self.probes.take(report.site, report.probes_per_s, now);
        probes.iter().for_each(|probe| self.model.remember_asked(report.site, probe.prefix, now));
        probes
    }

    /// Looks which sites there are: see [`Model::note_sites`]. To be called before reports are heard, or a site that was added since the
    /// last look is forgotten again with the next.
    pub fn note_sites(&mut self, cluster: &Cluster) {
        self.model.note_sites(cluster).into_iter().for_each(|site| self.forget_site(site));
    }

    /// What the leader wants now. Work is bounded by the number of sites and moves, once per round by that of the groups that differ from
    /// what they were, beside a look at each, and in every eighth round or so by that of all groups.
    pub fn poll(&mut self, cluster: &Cluster, now: Micros) -> Vec<Command> {
        self.note_sites(cluster);
        let mut commands = self.leases(cluster, now);
        self.remember_moves(cluster, now);
        for present in cluster.moves.values() {
            commands.extend(self.care(cluster, present, now));
        }
        let takers = cluster.sites.values().filter(|site| site.takes_groups()).map(|site| site.id);
        let shape = (cluster.policy_version, takers.collect());
        let settled = now >= self.started.plus(self.timings.lease);
        if now >= self.next_round || (settled && shape != self.shape) {
            let reshaped = shape != self.shape;
            self.shape = shape;
            self.next_round = now.plus(self.timings.round);
            commands.extend(self.round(cluster, reshaped, now));
        }
        commands
    }

    /// What is due by the wall clock: a policy that nobody confirmed returns to the former, rules end.
    #[must_use]
    pub fn due(cluster: &Cluster, wall_ms: u64) -> Option<Command> {
        if let Some(trial) = cluster.trial.as_ref().filter(|trial| trial.until_ms <= wall_ms) {
            return Some(Command::RevertPolicy { version: trial.version });
        }
        let (_, rules) = cluster.policy.without_ended(wall_ms)?;
        Some(Command::EndRules { version: cluster.policy_version, rules })
    }

    /// The last poll took so long: where rounds are long, they are seldom. Those over all groups count by themselves, so that the
    /// others can go on between them.
    pub fn spent(&mut self, took: Micros, now: Micros) {
        let rested = now.plus(Micros(took.0.saturating_mul(ROUND_SHARE - 1)));
        let next = if self.was_whole { &mut self.next_whole } else { &mut self.next_round };
        *next = rested.max(*next);
    }

    /// The candidates of a group with the terms of their delay.
    #[must_use]
    pub fn explain(&self, cluster: &Cluster, group: &GroupId, now: Micros) -> Option<Explanation> {
        explain::explain(cluster, &self.model, group, now)
    }

    /// What is known of delays and loads.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// At the end of a term of office: what is known goes on to be.
    #[must_use]
    pub fn into_model(self) -> Model {
        self.model
    }

    /// What is known of a group's traffic.
    #[must_use]
    pub fn demand(&self, group: &GroupId) -> Option<&Demand> {
        self.model.demand(group)
    }

    /// What it knows by a site's number is of a site that is no more.
    fn forget_site(&mut self, site: SiteId) {
        self.reported.remove(&site);
        self.recent.retain(|(_, from, _)| *from != site);
        self.probes.wishes.remove(&site);
        self.probes.left.remove(&site);
    }

    fn leases(&self, cluster: &Cluster, now: Micros) -> Vec<Command> {
        let changed = cluster.sites.values().filter_map(|site| {
            let last = self.reported.get(&site.id).copied();
            // A site that has never reported to this leader has until a lease after its start.
            let holds = now.since(last.unwrap_or(self.started)) < self.timings.lease;
            let alive = if last.is_some() { holds } else { holds && site.alive };
            (alive != site.alive).then_some(Command::SetAlive { site: site.id, alive })
        });
        changed.collect()
    }

    fn remember_moves(&mut self, cluster: &Cluster, now: Micros) {
        let ended = self.moves.iter().filter(|(id, _)| !cluster.moves.contains_key(id));
        for (id, (group, _)) in ended {
            if cluster.finished(*id).is_some_and(|finished| finished.outcome != MoveOutcome::Done) {
                self.failed.insert(*group, now.plus(self.timings.retry));
            }
        }
        self.released.extend(self.failed.iter().filter(|(_, until)| now >= **until).map(|(group, _)| *group));
        self.failed.retain(|_, until| now < *until);
        self.moves.retain(|id, _| cluster.moves.contains_key(id));
        for present in cluster.moves.values() {
            self.moves.entry(present.id).or_insert((present.group, now));
        }
    }

    /// Ends or takes over a move whose party is dead. Only what is committed counts as dead.
    fn care(&self, cluster: &Cluster, present: &Move, now: Micros) -> Option<Command> {
        let dead = |site: SiteId| !cluster.sites.get(&site).is_some_and(|site| site.alive);
        match present.phase {
            MovePhase::Switching if dead(present.from) && !present.take_over => {
                Some(Command::TakeOver { move_id: present.id })
            }
            MovePhase::Switching => None,
            MovePhase::Preparing => {
                let since = self.moves.get(&present.id).map_or(now, |(_, since)| *since);
                let reason = if dead(present.from) {
                    format!("source site {} is dead", present.from)
                } else if dead(present.to) {
                    format!("target site {} is dead", present.to)
                } else if now.since(since) >= self.timings.preparing_max {
                    format!("not ready after {} s", self.timings.preparing_max.0 / 1_000_000)
                } else {
                    return None;
                };
                Some(Command::Abort { move_id: present.id, by: None, reason })
            }
        }
    }

    fn round(&mut self, cluster: &Cluster, reshaped: bool, now: Micros) -> Vec<Command> {
        self.recent.retain(|(at, _, _)| now.since(*at) < MINUTE);
        let may_be_whole = reshaped || now >= self.next_whole;
        let kept = self.kept.take().filter(|kept| kept.holds(cluster));
        let due = kept.as_ref().is_none_or(|kept| kept.is_due(now));
        self.was_whole = false;
        if let Some(mut kept) = kept.filter(|_| !(may_be_whole && due)) {
            let plan = self.round_of_few(cluster, &mut kept, may_be_whole, now);
            self.kept = Some(kept);
            if let Some(plan) = plan {
                return self.wishes(cluster, plan, now);
            }
        }
        if !may_be_whole {
            return Vec::new();
        }
        self.round_of_all(cluster, now)
    }

    /// Over the groups that differ from what the last round saw; `None` when one over all is called for.
    fn round_of_few(
        &mut self,
        cluster: &Cluster,
        kept: &mut Kept,
        may_be_whole: bool,
        now: Micros,
    ) -> Option<Plan> {
        self.release(cluster, now);
        let differences = kept.differences(cluster, &self.model, &self.released, now)?;
        let groups = kept.ids(&differences).filter_map(|id| cluster.groups.get(&id));
        groups.for_each(|group| self.stays.look(cluster, group, now));
        let plan = self
            .with_ready(|ready| kept.round((cluster, &self.model), differences, ready, may_be_whole, now));
        if let Some(plan) = &plan {
            self.released.clear();
            self.probes.wish(&plan.probes);
        }
        plan
    }

    fn round_of_all(&mut self, cluster: &Cluster, now: Micros) -> Vec<Command> {
        self.was_whole = true;
        self.stays.forget(cluster);
        cluster.groups.values().for_each(|group| self.stays.look(cluster, group, now));
        self.release(cluster, now);
        self.released.clear();
        self.model.forget(cluster, now);
        let shapes = self.shapes(cluster, now);
        let whole = self.with_ready(|ready| plan::whole(cluster, &self.model, ready, now));
        let (plan, kept) = whole.map_or((Plan::default(), None), |(plan, kept)| (plan, Some(kept)));
        self.kept = kept;
        // What is not worth it any more is not asked for.
        self.probes.wishes.clear();
        self.probes.wish(&plan.probes);
        // What is to split or merge must not begin to move: the log refuses whichever comes second.
        shapes.into_iter().chain(self.wishes(cluster, plan, now)).collect()
    }

    fn shapes(&mut self, cluster: &Cluster, now: Micros) -> Vec<Command> {
        let calm = |group: &GroupId| self.stays.age(group, now).is_none_or(|age| age >= SHAPE_REST);
        let demand = |group: &GroupId| self.model.demand(group).cloned();
        let rested = |group: &GroupId| calm(group) && !self.failed.contains_key(group);
        self.shaper.wishes(cluster, &Known { demand: &demand, rested: &rested }, now)
    }

    /// Which groups may be moved now.
    fn with_ready<T>(&self, then: impl FnOnce(&Readiness<'_>) -> T) -> T {
        let recent: Vec<_> = self.recent.iter().map(|&(_, from, reason)| (from, reason)).collect();
        then(&Readiness {
            free: &|group| !self.failed.contains_key(group),
            rested: &|group| !self.stays.rests(group),
            recent: &recent,
            wall_ms: self.wall_ms,
        })
    }

    /// Groups that have rested may be moved again.
    fn release(&mut self, cluster: &Cluster, now: Micros) {
        self.released.extend(self.stays.release(cluster, now));
    }

    /// What a plan comes to: moves, and what is published.
    fn wishes(&mut self, cluster: &Cluster, plan: Plan, now: Micros) -> Vec<Command> {
        for command in &plan.commands {
            if let Command::StartMoves { moves, reason } = command {
                let from = moves.iter().filter_map(|(group, _)| Some(cluster.groups.get(group)?.owner));
                self.recent.extend(from.map(|from| (now, from, *reason)));
            }
        }
        let vain = self.stays.vain(now);
        let round = plan.round.map(|round| Round { vain, ..round });
        let due = self.published.is_none_or(|at| now.since(at) >= PUBLISH_AFTER);
        let published = round.filter(|round| due || round.tells_more(cluster.round.as_ref()));
        if published.is_some() {
            self.published = Some(now);
        }
        plan.commands.into_iter().chain(published.map(|round| Command::Publish(Box::new(round)))).collect()
    }
}
