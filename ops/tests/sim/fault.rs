//! Faults: what can break, for whom, and in which phase of a move.

use std::collections::{BTreeMap, BTreeSet};

use dataplane::control::Phase;
use flow::sample::Seeded;
use flow::{GroupId, MoveId, SiteId, WorkerId};
use placement::core::{Command, Move, MovePhase, MoveReason};

use crate::log::root;
use crate::lost::FENCED_AFTER;
use crate::session::{AWAY_MAX, HALF_OPEN_MAX};
use crate::slow::Part;
use crate::world::{Happening, IDLE, Mode, SITES, World};

/// For how long processes are slow.
const SLOW_MIN: u64 = 200_000;
const SLOW_MAX: u64 = 3_000_000;
/// A path between agent and switch is cut for so long: a group may go on from site to site meanwhile.
const AWAY_LONG: u64 = 6_000_000;

/// How far a move is, as nobody in the system can see it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Preparing is committed.
    Preparing,
    /// Some chunks are on their way, and more may follow.
    Chunks,
    /// Switching is committed, the source serves.
    Switching,
    /// The source has cut, the target does not serve yet.
    Cut,
    /// The target serves, the log does not know.
    Joined,
}

pub(crate) const STAGES: [Stage; 5] =
    [Stage::Preparing, Stage::Chunks, Stage::Switching, Stage::Cut, Stage::Joined];

/// Whose part breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    Source,
    Target,
    /// A site that is only an ingress.
    Other,
}

const ROLES: [Role; 3] = [Role::Source, Role::Target, Role::Other];

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Agent(Role),
    /// For longer than its lease.
    AgentLong(Role),
    Worker(Role),
    Control(Role),
    Switch(Role),
    Placement(Role),
    Reset(Role),
    Leader,
    /// The leader is cut off from the others, goes on accepting for a while, and is gone.
    LeaderAlone,
    /// A placement node that does not lead is stopped, with what it was asked; then it goes on.
    NodeStopped,
    Stream,
    /// Between the agents of source and target.
    Partition,
    Burst,
    Abort,
    Again,
    /// Stopped for a while, then it goes on where it was.
    AgentStopped(Role),
    WorkerStopped(Role),
    /// Each turn takes long for a while.
    AgentSlow(Role),
    WorkerSlow(Role),
    SwitchSlow(Role),
    /// Stopped for longer than an agent waits for it: then it wakes, and finds that others have what it had.
    WorkerHung(Role),
    /// The move's stream brings nothing for a while, or breaks after its idle time.
    Stall,
    /// For less than the agent waits for an answer of it.
    SwitchStopped(Role),
    /// For longer: the agent gives up the connection, and makes another.
    SwitchHung(Role),
    /// Nothing arrives on the connection to the switch any more, and nobody is told.
    SwitchHalfOpen(Role),
    /// The switch comes back without rules.
    SwitchForgets(Role),
    /// The whole site is gone for good, until an operator says that it is.
    Lost(Role),
}

impl Kind {
    /// Whose part it breaks, if only one's.
    fn role(self) -> Option<Role> {
        match self {
            Self::Agent(role)
            | Self::AgentLong(role)
            | Self::Worker(role)
            | Self::Control(role)
            | Self::Switch(role)
            | Self::Placement(role)
            | Self::Reset(role)
            | Self::AgentStopped(role)
            | Self::WorkerStopped(role)
            | Self::WorkerHung(role)
            | Self::AgentSlow(role)
            | Self::WorkerSlow(role)
            | Self::SwitchSlow(role)
            | Self::SwitchStopped(role)
            | Self::SwitchHung(role)
            | Self::SwitchHalfOpen(role)
            | Self::SwitchForgets(role)
            | Self::Lost(role) => Some(role),
            Self::Leader
            | Self::LeaderAlone
            | Self::NodeStopped
            | Self::Stream
            | Self::Stall
            | Self::Partition
            | Self::Burst
            | Self::Abort
            | Self::Again => None,
        }
    }
}

pub(crate) fn kinds() -> Vec<Kind> {
    let all = ROLES.into_iter().flat_map(|role| {
        [
            Kind::Agent(role),
            Kind::AgentLong(role),
            Kind::Control(role),
            Kind::Switch(role),
            Kind::Placement(role),
            Kind::Reset(role),
            Kind::AgentStopped(role),
            Kind::WorkerStopped(role),
            Kind::WorkerHung(role),
            Kind::AgentSlow(role),
            Kind::WorkerSlow(role),
            Kind::SwitchSlow(role),
            Kind::SwitchStopped(role),
            Kind::SwitchHung(role),
            Kind::SwitchHalfOpen(role),
            Kind::SwitchForgets(role),
            Kind::Lost(role),
        ]
    });
    let workers = [Kind::Worker(Role::Source), Kind::Worker(Role::Target)];
    let rest = [
        Kind::Leader,
        Kind::LeaderAlone,
        Kind::NodeStopped,
        Kind::Stream,
        Kind::Stall,
        Kind::Partition,
        Kind::Burst,
        Kind::Abort,
        Kind::Again,
    ];
    all.chain(workers).chain(rest).collect()
}

/// A fault on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) stage: Stage,
    pub(crate) id: MoveId,
    pub(crate) from: SiteId,
    pub(crate) to: SiteId,
}

/// The faults of a seed, and where things are.
#[derive(Default)]
pub(crate) struct Plan {
    pending: Vec<(Kind, Stage)>,
    stages: BTreeMap<MoveId, Stage>,
    partitions: BTreeMap<(SiteId, SiteId), u64>,
    pub(crate) hits: BTreeMap<(Stage, Kind), u64>,
}

impl Plan {
    /// One to four faults. The first goes through all kinds and stages from seed to seed, so that two thousand seeds, wherever they
    /// begin, have each.
    pub(crate) fn new(seed: u64, mode: Mode, rng: &mut Seeded) -> Self {
        let kinds = kinds();
        let mut plan = Self::default();
        if !mode.faults {
            return plan;
        }
        let cell = (seed % (kinds.len() * STAGES.len()) as u64) as usize;
        plan.pending.push((kinds[cell / STAGES.len()], STAGES[cell % STAGES.len()]));
        for _ in 0..rng.below(4) {
            let kind = kinds[rng.below(kinds.len() as u64) as usize];
            // Losing flows or a site makes the rest of the run easier to excuse, so it is rarer.
            let rare =
                matches!(kind, Kind::Worker(_) | Kind::WorkerHung(_) | Kind::AgentLong(_) | Kind::Lost(_))
                    && rng.below(2) == 0;
            let stage = STAGES[rng.below(STAGES.len() as u64) as usize];
            if !rare {
                plan.pending.push((kind, stage));
            }
        }
        plan
    }

    pub(crate) fn is_partitioned(&self, a: SiteId, b: SiteId, now: u64) -> bool {
        self.partitions.get(&(a.min(b), a.max(b))).is_some_and(|until| *until > now)
    }
}

impl World {
    /// Looks how far each move is; faults that wait for a stage strike soon after it begins.
    pub(crate) fn notice_phases(&mut self) {
        if !self.mode.faults || self.log.cluster.moves.is_empty() || self.now >= self.busy_until {
            return;
        }
        let moves: Vec<Move> = self.log.cluster.moves.values().cloned().collect();
        for mv in moves {
            let stage = self.stage(&mv);
            if self.plan.stages.insert(mv.id, stage) == Some(stage) {
                continue;
            }
            while let Some(at) = self.plan.pending.iter().position(|(_, wanted)| *wanted == stage) {
                let (kind, stage) = self.plan.pending.remove(at);
                let fault = Fault { kind, stage, id: mv.id, from: mv.from, to: mv.to };
                let wait = if self.one_in(2) { 0 } else { self.rng.log_uniform(60_000) };
                self.after(wait, Happening::Fault(fault));
                if self.one_in(2) {
                    break;
                }
            }
        }
    }

    fn stage(&self, mv: &Move) -> Stage {
        if mv.phase == MovePhase::Preparing {
            let under_way = self.streams.get(&mv.id).is_some_and(|stream| !stream.under_way.is_empty());
            return if under_way { Stage::Chunks } else { Stage::Preparing };
        }
        let phases = |site: SiteId| {
            let places = self.sites.get(&site).into_iter().flat_map(|state| state.workers.values());
            places.filter_map(|place| place.process.as_ref()?.status.get(&mv.group)).collect::<Vec<_>>()
        };
        let serves = |phase: Phase| matches!(phase, Phase::Serving | Phase::Copying | Phase::Draining);
        if phases(mv.to).iter().any(|status| serves(status.phase) && status.epoch == mv.epoch) {
            Stage::Joined
        } else if phases(mv.from).iter().any(|status| serves(status.phase)) {
            Stage::Switching
        } else {
            Stage::Cut
        }
    }

    fn site_of(&self, fault: &Fault, role: Role) -> SiteId {
        match role {
            Role::Source => fault.from,
            Role::Target => fault.to,
            Role::Other => {
                SITES.into_iter().find(|s| *s != fault.from && *s != fault.to).unwrap_or(fault.from)
            }
        }
    }

    /// The worker that has anything of the move's group.
    fn worker_of(&self, fault: &Fault, site: SiteId) -> Option<WorkerId> {
        let group = self.log.cluster.moves.get(&fault.id)?.group;
        let workers = &self.sites.get(&site)?.workers;
        let has = |id: &&WorkerId| {
            workers
                .get(*id)
                .and_then(|place| place.process.as_ref())
                .is_some_and(|p| p.status.contains_key(&group))
        };
        workers.keys().find(has).or_else(|| workers.keys().next()).copied()
    }

    /// Until when the process that the fault is to stop does nothing anyhow.
    fn is_stopped_until(&self, fault: &Fault) -> Option<u64> {
        let until = match fault.kind {
            Kind::AgentStopped(role) => self.stopped(self.site_of(fault, role))?,
            Kind::WorkerStopped(role) | Kind::WorkerHung(role) => {
                let site = self.site_of(fault, role);
                let worker = self.worker_of(fault, site)?;
                self.sites.get(&site)?.workers.get(&worker)?.stopped_until
            }
            Kind::SwitchStopped(role) | Kind::SwitchHung(role) => {
                self.switch_stopped(self.site_of(fault, role))?
            }
            _ => return None,
        };
        Some(until).filter(|until| *until > self.now)
    }

    /// Something breaks.
    pub(crate) fn strike(&mut self, fault: Fault) {
        if let Some(until) = self.is_stopped_until(&fault) {
            // What waits for the process keeps its order only if one stop begins when the other is over.
            if until < self.busy_until {
                self.schedule.at(until, Happening::Fault(fault));
            }
            return;
        }
        let now_at = self.log.cluster.moves.get(&fault.id).cloned().map(|mv| self.stage(&mv));
        let stage = now_at.unwrap_or(fault.stage);
        *self.plan.hits.entry((stage, fault.kind)).or_default() += 1;
        self.trace(|| format!("FAULT {:?} of move {} at {now_at:?}", fault.kind, fault.id));
        let mut heal_after = 0;
        // What does not last breaks off something that is made anew.
        let mut lasts = 0;
        match fault.kind {
            Kind::Agent(role) => {
                self.agent_crash(self.site_of(&fault, role));
                heal_after = self.between(1_000, 600_000);
            }
            Kind::AgentLong(role) => {
                self.agent_crash(self.site_of(&fault, role));
                heal_after = self.between(1_500_000, 3_000_000);
            }
            Kind::Worker(role) => {
                let site = self.site_of(&fault, role);
                if let Some(worker) = self.worker_of(&fault, site) {
                    self.worker_crash(site, worker);
                    lasts = self.between(1_000, 700_000);
                    self.after(lasts, Happening::WorkerStart(site, worker));
                }
            }
            Kind::Control(role) => {
                let site = self.site_of(&fault, role);
                if let Some(worker) = self.worker_of(&fault, site) {
                    self.worker_cut(site, worker);
                }
            }
            Kind::Switch(role) => {
                let site = self.site_of(&fault, role);
                lasts = if self.one_in(2) { AWAY_LONG } else { AWAY_MAX };
                lasts = self.between(0, lasts);
                let until = self.now + lasts;
                if let Some(state) = self.sites.get_mut(&site) {
                    state.unreachable_until = until;
                }
                self.switch_loss(site);
            }
            Kind::SwitchStopped(role) => {
                lasts = self.between(20_000, 2_500_000);
                self.switch_stops(self.site_of(&fault, role), lasts);
            }
            Kind::SwitchHung(role) => {
                lasts = self.between(10_500_000, 14_000_000);
                self.switch_stops(self.site_of(&fault, role), lasts);
            }
            Kind::Placement(role) => {
                lasts = self.between(50_000, 1_200_000);
                let until = self.now + lasts;
                let site = self.site_of(&fault, role);
                if let Some(state) = self.sites.get_mut(&site) {
                    state.cut_off_until = until;
                }
            }
            Kind::Reset(role) => {
                let site = self.site_of(&fault, role);
                if let Some(life) = self.sites.get_mut(&site).and_then(|state| state.life.as_mut()) {
                    life.fresh = true;
                }
                self.poke_watch(site);
                self.poke_watch(site);
            }
            Kind::Leader => lasts = self.leader_change(),
            Kind::NodeStopped => {
                lasts = self.between(50_000, 3_000_000);
                self.log.node_stopped_until = self.log.node_stopped_until.max(self.now + lasts);
            }
            Kind::LeaderAlone => lasts = self.leader_alone(),
            Kind::Stream => self.break_stream(fault.id),
            Kind::Partition => {
                lasts = self.between(50_000, 2_000_000);
                let until = self.now + lasts;
                self.plan.partitions.insert((fault.from.min(fault.to), fault.from.max(fault.to)), until);
                self.stall_links(fault.from, fault.to, lasts);
            }
            Kind::AgentStopped(role) => {
                lasts = self.between(20_000, 2_500_000);
                let (site, until) = (self.site_of(&fault, role), self.now + lasts);
                if let Some(state) = self.sites.get_mut(&site) {
                    state.stopped_until = until;
                }
                SITES.into_iter().for_each(|other| self.stall_links(site, other, lasts));
            }
            Kind::AgentSlow(role) => {
                lasts = self.between(SLOW_MIN, SLOW_MAX);
                self.slows(self.site_of(&fault, role), Part::Agent, lasts);
            }
            Kind::WorkerSlow(role) => {
                lasts = self.between(SLOW_MIN, SLOW_MAX);
                let site = self.site_of(&fault, role);
                if let Some(worker) = self.worker_of(&fault, site) {
                    self.slows(site, Part::Worker(worker), lasts);
                }
            }
            Kind::SwitchSlow(role) => {
                lasts = self.between(SLOW_MIN, SLOW_MAX);
                self.slows(self.site_of(&fault, role), Part::Switch, lasts);
            }
            Kind::WorkerStopped(role) => {
                lasts = self.between(20_000, 1_500_000);
                let (site, until) = (self.site_of(&fault, role), self.now + lasts);
                if let Some(worker) = self.worker_of(&fault, site)
                    && let Some(place) =
                        self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker))
                {
                    // What waits in it is relayed when others have given up waiting for it.
                    let known = place.process.iter().flat_map(|process| process.status.keys());
                    known.for_each(|group| self.excuses.shuffle(*group));
                    place.stopped_until = until;
                }
            }
            Kind::SwitchHalfOpen(role) => {
                lasts = HALF_OPEN_MAX;
                self.switch_mutes(self.site_of(&fault, role));
            }
            Kind::WorkerHung(role) => {
                lasts = self.between(4_500_000, 9_000_000);
                let (site, until) = (self.site_of(&fault, role), self.now + lasts);
                if let Some(worker) = self.worker_of(&fault, site) {
                    self.worker_hangs(site, worker, until);
                }
            }
            Kind::Stall => {
                lasts = self.between(50_000, 2 * IDLE);
                self.stall_stream(fault.id, lasts);
            }
            Kind::SwitchForgets(role) => {
                lasts = AWAY_MAX;
                self.switch_restarts(self.site_of(&fault, role));
            }
            Kind::Lost(role) => {
                // Then an operator makes sure that it is, and says so.
                lasts = 2 * FENCED_AFTER;
                self.lose_site(self.site_of(&fault, role));
            }
            Kind::Burst => {
                lasts = self.between(20_000, 400_000);
                self.burst_until = self.now + lasts;
            }
            Kind::Abort => {
                let reason = "the operator changed his mind".to_owned();
                self.propose("operator", Command::Abort { move_id: fault.id, by: None, reason }, None);
            }
            Kind::Again => {
                if let Some(group) = self.log.cluster.moves.get(&fault.id).map(|mv| mv.group) {
                    let moves = vec![(group, fault.to)];
                    self.propose(
                        "operator",
                        Command::StartMoves { moves, reason: MoveReason::Operator },
                        None,
                    );
                }
            }
        }
        let at = fault.kind.role().map(|role| self.site_of(&fault, role));
        let at = at.map(|site| (site, self.groups_at(site)));
        self.checks.delays.broken(self.now, lasts.max(heal_after), at);
        if heal_after > 0 {
            self.after(heal_after, Happening::Heal(fault));
        }
    }

    /// Groups that the site has or moves.
    fn groups_at(&self, site: SiteId) -> BTreeSet<GroupId> {
        let moves = self.log.cluster.moves.values().filter(|mv| mv.from == site || mv.to == site);
        let owned = self.log.cluster.groups.values().filter(|group| group.owner == site);
        moves.map(|mv| mv.group).chain(owned.map(|group| group.id)).map(root).collect()
    }

    /// What was broken comes back by itself.
    pub(crate) fn recover(&mut self, fault: Fault) {
        if let Kind::Agent(role) | Kind::AgentLong(role) = fault.kind {
            self.agent_start(self.site_of(&fault, role));
        }
    }

    /// Everything works again.
    pub(crate) fn heal(&mut self) {
        self.trace(|| "HEAL".into());
        self.plan.partitions.clear();
        self.burst_until = 0;
        for site in SITES.into_iter().filter(|site| !self.is_lost(*site)).collect::<Vec<_>>() {
            if let Some(state) = self.sites.get_mut(&site) {
                state.cut_off_until = 0;
            }
            self.agent_start(site);
            let workers: Vec<_> =
                self.sites.get(&site).map(|s| s.workers.keys().copied().collect()).unwrap_or_default();
            let ended = |world: &Self, worker: &WorkerId| {
                let place = world.sites.get(&site).and_then(|state| state.workers.get(worker));
                place.is_some_and(|place| place.extra && place.process.is_none())
            };
            for worker in workers {
                if !ended(self, &worker) {
                    self.worker_start(site, worker);
                }
            }
            self.poke_watch(site);
        }
        self.activate_sites();
    }
}
