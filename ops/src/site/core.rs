//! The agent of a site as a sans-IO core: what placement decided, what workers, switch and peers report goes in; what
//! to tell each of them comes out. The move machines of `transfer` run inside; the rules come from `switchctl`.
//!
//! The core can be made anew at any time: placement sends what is committed, each worker says what it has, the
//! switch keeps its rules until the core has heard both. Nothing that only this core knew is needed to go on.

mod reshape;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use dataplane::control::{
    Event, Function, GroupLoad, GroupStatus, Ordering, Phase, Request, ServiceSpec, Stats,
};
use flow::nat::NatSlices;
use flow::{Epoch, GroupId, HoldTimes, Micros, MoveId, ServiceId, SiteId, WorkerId};
use placement::core::{Change, Command, Group, Move, MoveOutcome, MovePhase, MoveSummary, Service, Site};
use switchctl::{GroupPlan, OldPath, PacketOut, Ports, RuleSet, SitePlan, marker_out};
use transfer::core::{
    Ending, MoveSpec, Proof, Source, SourceAction, SourceInput, Target, TargetAction, TargetInput, ToSource,
    ToTarget,
};

use super::elastic::{Views, WorkerView};

/// How long an agent that just started waits for workers that do not answer before it gives their groups to others.
const GATHER_BOUND: Micros = Micros(3_000_000);
/// The same for a worker that went away later.
const WORKER_BOUND: Micros = Micros(3_000_000);
/// Markers are sent again this often while the move is switching: a tunnel may lose one.
const MARKER_INTERVAL: Micros = Micros(250_000);
/// Between two looks at how groups are spread over the workers.
const BALANCE_INTERVAL: Micros = Micros(1_000_000);
/// Moves between workers that are remembered for those who ask.
const LOCAL_LOG_LEN: usize = 256;
/// A gap between the most and the least loaded worker counts when it is above the mean by this, as a divisor.
const GAP_SHARE: u64 = 3;
/// Shortest stay of a group at a worker.
const LOCAL_DWELL: Micros = Micros(10_000_000);
/// Moves between workers at a time.
const LOCAL_MOVES_MAX: usize = 4;
/// What a worker said about itself counts for so long: six reports.
const STATS_FRESH: Micros = Micros(3_000_000);

/// Bounds that an operator may set; each is documented in the configuration reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Longest wait for markers at the source.
    pub marker_us: u64,
    /// Longest wait for the cut along the data path at the target.
    pub cut_us: u64,
    /// Longest hold of a late ingress's packets at the target.
    pub late_us: u64,
    /// How long an old owner relays.
    pub relay_us: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { marker_us: 2_000_000, cut_us: 500_000, late_us: 2_000_000, relay_us: 10_000_000 }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Placement's changes, in order; `reset` when they are all there is.
    Placement {
        /// Of the log, with these changes.
        revision: u64,
        /// The wall clock, in milliseconds since 1970: flips are agreed by it.
        wall_ms: u64,
        /// Forget what was known before.
        reset: bool,
        /// What is different.
        changes: Vec<Change>,
    },
    /// A worker's control socket answers.
    WorkerUp {
        /// Which.
        worker: WorkerId,
        /// Differs with every start of its process.
        boot: u64,
    },
    /// It is gone.
    WorkerDown(WorkerId),
    /// A worker said something.
    Worker(WorkerId, Event),
    /// The switch follows all rules up to this tag.
    InForce(u64),
    /// A stream to the target of a move is there.
    PeerUp(MoveId),
    /// It is gone.
    PeerDown(MoveId),
    /// The target of a move from here said something.
    FromTarget(MoveId, ToSource),
    /// The source of a move to here said something.
    FromSource {
        /// The move.
        move_id: MoveId,
        /// The peer's site, by its certificate.
        from: SiteId,
        /// What.
        message: ToTarget,
        /// Bytes that it took.
        wire_len: u64,
    },
    /// Move a group to another worker of this site.
    MoveLocally(GroupId, WorkerId),
    /// Move all groups of a worker to the others, and give it none.
    Retire(WorkerId),
    /// The worker is one like the others again; or it is gone for good, and was to go.
    Recall(WorkerId),
}

/// What is to be done, in this order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Tell a worker.
    Worker(WorkerId, Request),
    /// These are the rules from now on; report when the switch follows them.
    Rules(Arc<RuleSet>, u64),
    /// Send a packet through the switch, behind the rules before it.
    PacketOut(PacketOut),
    /// Keep a stream open to the target of a move, until [`Output::Hangup`].
    Connect(MoveId, SiteId),
    /// No longer.
    Hangup(MoveId),
    /// Tell the target.
    ToTarget(MoveId, ToTarget),
    /// Tell the source.
    ToSource(MoveId, ToSource),
    /// Ask the log, until it answers or the move is over.
    Propose(Command),
}

/// Counts for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is a count of what its name says")]
pub struct Counts {
    pub moves_done_out: u64,
    pub moves_done_in: u64,
    pub moves_aborted: u64,
    pub moves_taken_back: u64,
    pub moves_local: u64,
    pub flows_in: u64,
    pub bytes_in: u64,
    pub hold_us_max: u64,
    pub refused: u64,
}

/// A move between workers that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LocalMove {
    /// Counts from the start of the agent.
    pub number: u64,
    /// What moved, as `SERVICE:PREFIX`.
    #[serde(serialize_with = "as_text")]
    pub group: GroupId,
    /// From this worker.
    pub from: WorkerId,
    /// To this one.
    pub to: WorkerId,
    /// Flows moved.
    pub flows: u64,
    /// Time of the copy before the flip, in microseconds.
    pub precopy_us: u64,
    /// How long packets were held.
    pub hold: HoldTimes,
}

#[derive(Debug, Default)]
struct Worker {
    up: bool,
    boot: u64,
    /// Its status has come since it was up.
    ready: bool,
    /// No status is awaited.
    fresh: bool,
    down_since: Option<Micros>,
    load: u64,
    /// Its last statistics: when they came, how busy it was, and how many groups it knew.
    said: Option<(Micros, f64, u64)>,
}

#[derive(Debug)]
struct Outgoing {
    machine: Source,
    worker: WorkerId,
    /// The worker that had the group died after the flip; this one does not serve it yet.
    lost: bool,
}

#[derive(Debug)]
struct Incoming {
    machine: Target,
    worker: WorkerId,
    /// The worker is prepared, but the switch does not deliver to it before this tag is in force.
    prepared_at: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Marker {
    group: GroupId,
    epoch: Epoch,
    old: OldPath,
    /// Not before this tag is in force.
    tag: u64,
    at: Option<Micros>,
}

/// The agent of one site.
#[derive(Debug)]
pub struct Agent {
    site: SiteId,
    incarnation: u32,
    bounds: Bounds,
    ports: Ports,
    expected: BTreeSet<WorkerId>,
    started: Option<Micros>,
    synced: bool,
    known: bool,
    revision: u64,
    /// When placement said something last.
    wall_ms: u64,
    sites: BTreeMap<SiteId, Site>,
    services: BTreeMap<ServiceId, Service>,
    slices: BTreeMap<ServiceId, NatSlices>,
    groups: BTreeMap<GroupId, Group>,
    /// Groups that wait until what they are made from is ready; see `reshape`.
    wanted: BTreeMap<GroupId, Group>,
    moves: BTreeMap<MoveId, Move>,
    steer: BTreeMap<GroupId, SiteId>,
    workers: BTreeMap<WorkerId, Worker>,
    /// Those that are to have no groups.
    retiring: BTreeSet<WorkerId>,
    /// The worker that gets a group's packets at this site: its owner, or one that holds or relays.
    local: BTreeMap<GroupId, WorkerId>,
    /// Groups that a worker was told to serve and has not said that it does.
    unserved: BTreeMap<GroupId, WorkerId>,
    loads: BTreeMap<GroupId, GroupLoad>,
    /// Running means of packets per report: a group is not moved for one burst.
    means: BTreeMap<GroupId, u64>,
    /// When a group changed its worker last.
    settled_at: BTreeMap<GroupId, Micros>,
    outgoing: BTreeMap<MoveId, Outgoing>,
    incoming: BTreeMap<MoveId, Incoming>,
    /// Moves that are switched, with the time of their flip here.
    flips: BTreeMap<MoveId, Micros>,
    markers: BTreeMap<MoveId, Marker>,
    local_moves: u64,
    local_log: VecDeque<LocalMove>,
    /// Local moves that were found half done; see [`Agent::recover_local`].
    orphans: BTreeMap<MoveId, BTreeMap<WorkerId, GroupStatus>>,
    plan_dirty: bool,
    tag: u64,
    in_force: u64,
    balance_at: Micros,
    counts: Counts,
    outputs: VecDeque<Output>,
}

impl Agent {
    /// An agent that knows nothing yet. `expected` are the workers that should be there: their groups are
    /// not given to others before they had time to answer. `incarnation` differs with every start.
    #[must_use]
    pub fn new(
        site: SiteId,
        incarnation: u32,
        ports: Ports,
        expected: impl IntoIterator<Item = WorkerId>,
        bounds: Bounds,
    ) -> Self {
        Self {
            site,
            incarnation,
            bounds,
            ports,
            expected: expected.into_iter().collect(),
            started: None,
            synced: false,
            known: false,
            revision: 0,
            wall_ms: 0,
            sites: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            groups: BTreeMap::new(),
            wanted: BTreeMap::new(),
            moves: BTreeMap::new(),
            steer: BTreeMap::new(),
            workers: BTreeMap::new(),
            retiring: BTreeSet::new(),
            local: BTreeMap::new(),
            unserved: BTreeMap::new(),
            loads: BTreeMap::new(),
            means: BTreeMap::new(),
            settled_at: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            flips: BTreeMap::new(),
            markers: BTreeMap::new(),
            local_moves: 0,
            local_log: VecDeque::new(),
            orphans: BTreeMap::new(),
            plan_dirty: false,
            tag: 0,
            in_force: 0,
            balance_at: Micros(0),
            counts: Counts::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, input: Input, now: Micros) {
        self.started.get_or_insert(now);
        match input {
            Input::Placement { revision, wall_ms, reset, changes } => {
                self.revision = revision;
                self.wall_ms = wall_ms;
                self.placement(reset, changes, now);
            }
            Input::WorkerUp { worker, boot } => self.worker_up(worker, boot),
            Input::WorkerDown(worker) => self.worker_down(worker, now),
            Input::Worker(worker, event) => self.worker_said(worker, event, now),
            Input::InForce(tag) => self.in_force = self.in_force.max(tag),
            Input::PeerUp(id) => self.feed_source(id, SourceInput::PeerUp, now),
            Input::PeerDown(id) => self.feed_source(id, SourceInput::PeerDown, now),
            Input::FromTarget(id, message) => self.feed_source(id, SourceInput::Peer(message), now),
            Input::FromSource { move_id, from, message, wire_len } => {
                self.from_source(move_id, from, message, wire_len, now);
            }
            Input::MoveLocally(group, to) => self.move_locally(group, to, now),
            Input::Retire(worker) => {
                self.retiring.insert(worker);
                self.evacuate(now);
            }
            Input::Recall(worker) => self.recall(worker),
        }
        self.settle(now);
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Micros) {
        let due = |(id, out): (&MoveId, &Outgoing)| (out.machine.poll_timeout()? <= now).then_some(*id);
        let due: Vec<_> = self.outgoing.iter().filter_map(due).collect();
        for id in due {
            if let Some(out) = self.outgoing.get_mut(&id) {
                out.machine.handle_timeout(now);
            }
            self.drain_source(id, now);
        }
        self.flip_due(now);
        if self.synced && self.balance_at <= now {
            self.balance_at = now.plus(BALANCE_INTERVAL);
            self.replace_dead_workers(now);
            self.ask_again();
            self.reshape(now);
            self.evacuate(now);
            self.balance(now);
        }
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        let machines = self.outgoing.values().filter_map(|out| out.machine.poll_timeout());
        let markers =
            self.markers.values().filter(|m| m.tag <= self.in_force).map(|m| m.at.unwrap_or(Micros(0)));
        let gather = self.started.filter(|_| !self.synced).map(|at| at.plus(GATHER_BOUND));
        let balance = self.synced.then_some(self.balance_at);
        let flips = self.flips.values().copied();
        machines.chain(markers).chain(flips).chain(gather).chain(balance).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Counts since the start.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The site.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// Whether placement and workers were heard, so that the switch follows this agent.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether the switch follows the newest rules.
    #[must_use]
    pub fn is_in_force(&self) -> bool {
        self.synced && !self.plan_dirty && self.in_force >= self.tag
    }

    /// Whether every group of this site has a worker, and none was told to serve one and has not said that it does.
    #[must_use]
    pub fn is_serving_all(&self) -> bool {
        let owned = self.groups.values().filter(|group| group.owner == self.site);
        self.unserved.is_empty() && owned.into_iter().all(|group| self.local.contains_key(&group.id))
    }

    /// The revision of the log that this agent follows.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The last moves between workers, oldest first.
    #[must_use]
    pub fn local_log(&self) -> &VecDeque<LocalMove> {
        &self.local_log
    }

    /// Moves in hand: from here, to here.
    #[must_use]
    pub fn moves_in_hand(&self) -> (usize, usize) {
        (self.outgoing.len(), self.incoming.len())
    }

    /// The worker of each group that has one here.
    #[must_use]
    pub fn local(&self) -> &BTreeMap<GroupId, WorkerId> {
        &self.local
    }

    /// Group loads of the last report of each worker.
    #[must_use]
    pub fn loads(&self) -> &BTreeMap<GroupId, GroupLoad> {
        &self.loads
    }

    /// Peers as placement knows them.
    #[must_use]
    pub fn sites(&self) -> &BTreeMap<SiteId, Site> {
        &self.sites
    }

    /// The outside slices of a group's service, for the codec.
    #[must_use]
    pub fn slices(&self, service: ServiceId) -> Option<&NatSlices> {
        self.slices.get(&service)
    }

    /// The group and epoch of a move in hand, for the codec.
    #[must_use]
    pub fn move_spec(&self, id: MoveId) -> Option<MoveSpec> {
        let from = self.outgoing.get(&id).map(|out| *out.machine.spec());
        from.or_else(|| self.incoming.get(&id).map(|inc| *inc.machine.spec()))
    }

    /// Whether a move of the log names this peer as source and this site as target.
    #[must_use]
    pub fn expects(&self, id: MoveId, from: SiteId) -> bool {
        self.moves.get(&id).is_some_and(|m| m.from == from && m.to == self.site)
    }

    // ---- placement ------------------------------------------------------------------------------------

    fn placement(&mut self, reset: bool, changes: Vec<Change>, now: Micros) {
        if reset {
            self.forget_placement(&changes);
        }
        self.known = true;
        let gone = if reset { self.missing_in(&changes) } else { Vec::new() };
        for change in changes {
            match change {
                Change::Site(site) => {
                    self.sites.insert(site.id, site);
                }
                Change::Service(service) => self.service(service),
                Change::Group(group) => self.group(group),
                Change::GroupGone(id) => self.group_gone(id),
                Change::Move(mv) => self.move_changed(mv, now),
                Change::MoveEnded { id, group, outcome } => self.move_ended(id, group, &outcome, now),
                Change::Policy { .. } => {}
            }
        }
        if reset {
            self.drop_gone(&gone);
            self.end_missing(now);
            self.resync(now);
        }
        self.reshape(now);
    }

    /// Ends the machines of moves that a snapshot no longer has, as the owner and the epoch of the group say. That is not
    /// ambiguous: a later move of the group to or from this site could not have ended without this agent.
    fn end_missing(&mut self, now: Micros) {
        let machines = self.outgoing.values().map(|out| *out.machine.spec());
        let specs = machines.chain(self.incoming.values().map(|incoming| *incoming.machine.spec()));
        let missing: Vec<_> =
            specs.filter(|spec| !spec.id.is_local() && !self.moves.contains_key(&spec.id)).collect();
        for spec in missing {
            let Some(group) = self.heir(&spec.group) else { continue };
            let outcome = if group.epoch < spec.epoch || (spec.to == self.site && group.owner != spec.to) {
                MoveOutcome::Aborted { reason: String::new() }
            } else if group.owner == spec.from {
                MoveOutcome::TakenBack
            } else {
                MoveOutcome::Done
            };
            self.move_ended(spec.id, spec.group, &outcome, now);
        }
    }

    /// A snapshot replaces everything; moves that it no longer has are over, as the groups will say.
    fn forget_placement(&mut self, changes: &[Change]) {
        let moves: BTreeSet<_> = changes
            .iter()
            .filter_map(|change| if let Change::Move(mv) = change { Some(mv.id) } else { None })
            .collect();
        self.moves.retain(|id, _| moves.contains(id));
        self.markers.retain(|id, _| moves.contains(id) || id.is_local());
        self.flips.retain(|id, _| moves.contains(id));
        // What workers here have is acted on until it has become what took its place.
        let held = self.held();
        self.groups.clear();
        self.wanted.clear();
        self.steer.clear();
        for group in held {
            self.groups.insert(group.id, group);
            self.set_steer(group.id, group.owner);
        }
        self.plan_dirty = true;
    }

    fn service(&mut self, service: Service) {
        match NatSlices::new(service.nat.clone()) {
            Ok(slices) => {
                self.slices.insert(service.id, slices);
            }
            Err(error) => tracing::error!(service = %service.id, %error, "service of the log is not usable"),
        }
        let request = Request::Services(vec![service_spec(&service)]);
        self.services.insert(service.id, service);
        for worker in self.up_workers() {
            self.outputs.push_back(Output::Worker(worker, request.clone()));
        }
        self.plan_dirty = true;
    }

    fn group(&mut self, group: Group) {
        if self.must_wait(&group) {
            return;
        }
        let switching = group.move_id.and_then(|id| self.moves.get(&id));
        let switching =
            switching.filter(|m| m.phase == MovePhase::Switching && !self.flips.contains_key(&m.id));
        let steer = switching.map_or(group.owner, |m| m.to);
        self.groups.insert(group.id, group);
        self.set_steer(group.id, steer);
        self.place(group.id);
    }

    fn set_steer(&mut self, group: GroupId, site: SiteId) {
        self.plan_dirty |= self.steer.insert(group, site) != Some(site);
    }

    fn move_changed(&mut self, mv: Move, now: Micros) {
        let before = self.moves.insert(mv.id, mv.clone());
        let flipped = mv.phase == MovePhase::Switching;
        if flipped && before.as_ref().is_none_or(|b| b.phase == MovePhase::Preparing) {
            self.plan_flip(&mv, now);
        }
        self.drive(&mv, now);
    }

    /// All ingresses flip at one time, or packets of the early ones would wait for the markers of the late ones.
    fn plan_flip(&mut self, mv: &Move, now: Micros) {
        let wait_ms =
            mv.flip.map_or(0, |flip| flip.at_ms.saturating_sub(self.wall_ms).min(flip.lead_ms.into()));
        if wait_ms == 0 {
            return self.flip(mv);
        }
        self.flips.insert(mv.id, now.plus(Micros(wait_ms * 1_000)));
    }

    fn flip_due(&mut self, now: Micros) {
        let due: Vec<_> = self.flips.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.flips.remove(&id);
            if let Some(mv) = self.moves.get(&id).cloned() {
                self.flip(&mv);
            }
        }
    }

    /// The ingress part: steer to the target, then send a marker down the old path.
    fn flip(&mut self, mv: &Move) {
        let old = if mv.from == self.site {
            self.local.get(&mv.group).map(|&worker| OldPath::Local(worker))
        } else {
            Some(OldPath::Remote(mv.from))
        };
        self.set_steer(mv.group, mv.to);
        self.plan_dirty = true;
        if let Some(old) = old {
            let marker = Marker { group: mv.group, epoch: mv.epoch, old, tag: self.tag + 1, at: None };
            self.markers.insert(mv.id, marker);
        }
    }

    /// The source's and the target's part.
    fn drive(&mut self, mv: &Move, now: Micros) {
        // A move between workers ends first: then this one is begun from the worker that has the group.
        // So does a split or a merge.
        if !self.is_settled() || self.is_moving_locally(&mv.group) || self.wanted.contains_key(&mv.group) {
            return;
        }
        if mv.from == self.site && !self.outgoing.contains_key(&mv.id) {
            self.start_source(mv, now);
        }
        if mv.to == self.site && !self.incoming.contains_key(&mv.id) {
            self.start_target(mv, now);
        }
        if mv.phase == MovePhase::Switching {
            self.feed_source(mv.id, SourceInput::Switching(mv.ingresses.clone()), now);
            self.feed_target(mv.id, TargetInput::Switching, now);
        }
        if mv.take_over {
            self.feed_target(mv.id, TargetInput::TakeOver, now);
        }
    }

    fn start_source(&mut self, mv: &Move, now: Micros) {
        // Without a worker the one that had the group died, perhaps after its cut: the target may serve. Only when it
        // accepts a copy from nothing is it known that it does not, and another worker may serve meanwhile.
        let lost = mv.phase == MovePhase::Switching && !self.local.contains_key(&mv.group);
        let worker = if lost { self.least_loaded() } else { self.local.get(&mv.group).copied() };
        let Some(worker) = worker else { return };
        let flows = self.loads.get(&mv.group).map_or(0, |load| load.flows);
        let machine = Source::new(spec_of(mv), self.next_incarnation(), flows, lost, now);
        self.add_source(mv.id, machine, worker, mv.to);
        if let Some(out) = self.outgoing.get_mut(&mv.id) {
            out.lost = lost;
        }
    }

    fn add_source(&mut self, id: MoveId, machine: Source, worker: WorkerId, to: SiteId) {
        self.outgoing.insert(id, Outgoing { machine, worker, lost: false });
        if !id.is_local() {
            self.outputs.push_back(Output::Connect(id, to));
        }
    }

    fn start_target(&mut self, mv: &Move, now: Micros) {
        // A worker that still relays for the group gets stragglers: they must not meet one that knows nothing yet.
        // One that does not answer for a moment may have joined already, so nobody else gets its part meanwhile.
        let worker = match self.local.get(&mv.group).copied() {
            Some(worker) if self.is_ready(worker) => Some(worker),
            Some(worker) if self.workers.contains_key(&worker) => None,
            _ => self.least_loaded(),
        };
        let Some(worker) = worker else { return };
        self.add_target(mv.id, Target::new(spec_of(mv), None), worker, now);
    }

    fn add_target(&mut self, id: MoveId, machine: Target, worker: WorkerId, now: Micros) {
        let group = machine.spec().group;
        if !id.is_local() {
            self.set_local(group, Some(worker));
        }
        if !id.is_local() && !machine.is_prepared() {
            // The source may have offered, and sent, to a machine that is no more.
            self.outputs.push_back(Output::ToSource(id, ToSource::Unknown));
        }
        self.incoming.insert(id, Incoming { machine, worker, prepared_at: None });
        self.drain_target(id, now);
    }

    fn move_ended(&mut self, id: MoveId, group: GroupId, outcome: &MoveOutcome, now: Micros) {
        if self.flips.remove(&id).is_some()
            && *outcome == MoveOutcome::Done
            && let Some(mv) = self.moves.get(&id).cloned()
        {
            self.flip(&mv);
        }
        let switching = self.moves.remove(&id).is_some_and(|m| m.phase == MovePhase::Switching);
        // A flip that is not in force yet still owes its marker: the target waits for it.
        let owed = self.markers.get(&id).is_some_and(|marker| marker.at.is_none());
        if *outcome != MoveOutcome::Done || !switching || !owed {
            self.markers.remove(&id);
        }
        let epoch = self.groups.get(&group).map_or(Epoch(0), |g| g.epoch);
        let ending = match outcome {
            MoveOutcome::Done => Ending::Done,
            MoveOutcome::Aborted { .. } => Ending::Aborted,
            MoveOutcome::TakenBack => Ending::TakenBack(epoch),
        };
        if let Some(owner) = self.groups.get(&group).map(|g| g.owner) {
            self.set_steer(group, owner);
        }
        self.count_ending(id, ending);
        self.feed_source(id, SourceInput::Ended(ending), now);
        self.feed_target(id, TargetInput::Ended(ending), now);
        self.place(group);
    }

    fn count_ending(&mut self, id: MoveId, ending: Ending) {
        let (out, inc) = (self.outgoing.contains_key(&id), self.incoming.contains_key(&id));
        match ending {
            Ending::Done => {
                self.counts.moves_done_out += u64::from(out);
                self.counts.moves_done_in += u64::from(inc);
            }
            Ending::Aborted => self.counts.moves_aborted += u64::from(out),
            Ending::TakenBack(_) => self.counts.moves_taken_back += u64::from(out),
        }
    }

    /// A group of this site that no worker has gets one.
    fn place(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id).copied() else { return };
        if group.owner != self.site || self.local.contains_key(&id) || !self.is_settled() {
            return;
        }
        let flipped = |id: MoveId| self.moves.get(&id).is_some_and(|mv| mv.phase == MovePhase::Switching);
        if group.move_id.is_some_and(flipped) {
            // The target may serve by now: see [`Self::start_source`].
            return;
        }
        if let Some(worker) = self.least_loaded() {
            self.set_local(id, Some(worker));
            self.serve(worker, id, group.epoch);
        }
    }

    /// Tells a worker to serve; the site is not ready before it has said that it does.
    fn serve(&mut self, worker: WorkerId, group: GroupId, epoch: Epoch) {
        self.unserved.insert(group, worker);
        self.outputs.push_back(Output::Worker(worker, Request::Serve { group, epoch }));
    }

    // ---- workers --------------------------------------------------------------------------------------

    fn worker_up(&mut self, id: WorkerId, boot: u64) {
        let worker = self.workers.entry(id).or_default();
        let reborn = worker.boot != boot && worker.boot != 0;
        *worker = Worker { up: true, boot, load: worker.load, ..Worker::default() };
        if reborn {
            self.worker_lost(id);
        }
        self.drop_machines_of(id);
        let services: Vec<_> = self.services.values().map(service_spec).collect();
        self.outputs.push_back(Output::Worker(id, Request::Services(services)));
        self.ask_status();
    }

    /// Asks every worker what it has; until all have answered nothing is placed or begun.
    fn ask_status(&mut self) {
        for (id, worker) in self.workers.iter_mut().filter(|(_, worker)| worker.up) {
            worker.fresh = false;
            self.outputs.push_back(Output::Worker(*id, Request::Status));
        }
    }

    /// Placement was heard, and every worker that is there has said what it has.
    fn is_settled(&self) -> bool {
        self.synced && self.workers.values().all(|worker| worker.fresh || !worker.up)
    }

    /// The connection to the worker broke, and what it said meanwhile is lost: its machines are made anew from its
    /// next status.
    fn drop_machines_of(&mut self, worker: WorkerId) {
        let stale: Vec<_> = (self.outgoing.iter().filter(|(_, o)| o.worker == worker).map(|(id, _)| *id))
            .chain(self.incoming.iter().filter(|(_, i)| i.worker == worker).map(|(id, _)| *id))
            .collect();
        for id in stale {
            if self.outgoing.remove(&id).is_some() {
                self.outputs.push_back(Output::Hangup(id));
            }
            self.incoming.remove(&id);
            if id.is_local() {
                self.markers.remove(&id);
            }
        }
    }

    fn worker_down(&mut self, id: WorkerId, now: Micros) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        *worker = Worker { up: false, ready: false, fresh: false, down_since: Some(now), ..*worker };
        self.drop_machines_of(id);
    }

    /// The process is another one: what it had is gone.
    fn worker_lost(&mut self, id: WorkerId) {
        self.local.retain(|_, worker| *worker != id);
        self.unserved.retain(|_, worker| *worker != id);
        let lost = |machine_worker: WorkerId| machine_worker == id;
        let ended: Vec<_> = self.outgoing.iter().filter(|(_, o)| lost(o.worker)).map(|(id, _)| *id).collect();
        for move_id in ended {
            self.outgoing.remove(&move_id);
            self.outputs.push_back(Output::Hangup(move_id));
            if move_id.is_local() {
                self.incoming.remove(&move_id);
            } else {
                let reason = format!("worker {id} of the source was restarted");
                let abort = Command::Abort { move_id, by: Some(self.site), reason };
                self.outputs.push_back(Output::Propose(abort));
            }
        }
        self.incoming.retain(|_, incoming| !lost(incoming.worker));
        self.plan_dirty = true;
    }

    fn worker_said(&mut self, worker: WorkerId, event: Event, now: Micros) {
        match event {
            Event::Status { groups, .. } => self.status(worker, groups, now),
            Event::Stats(stats) => self.stats(worker, *stats, now),
            Event::Records { move_id, batch, .. } => {
                self.feed_source_of(worker, move_id, SourceInput::Records(batch), now);
            }
            Event::RoundEnd { move_id, dirty, flows, .. } => {
                self.feed_source_of(worker, move_id, SourceInput::RoundEnd { dirty, flows }, now);
            }
            Event::Cut { move_id, token, missing, .. } => {
                self.feed_source_of(worker, move_id, SourceInput::Cut { token, missing }, now);
            }
            Event::Disarmed { move_id, cut, .. } => {
                self.feed_source_of(worker, move_id, SourceInput::Disarmed { cut }, now);
            }
            Event::Prepared { move_id, .. } => self.prepared(worker, move_id),
            Event::Refused { group, move_id, reason } => {
                self.worker_refused(worker, group, move_id, reason, now)
            }
            Event::Installed { move_id, sequence, .. } => {
                self.feed_target_of(worker, move_id, TargetInput::Installed(sequence), now);
            }
            Event::Joined { move_id, flows, hold, .. } => {
                self.counts.hold_us_max = self.counts.hold_us_max.max(hold.us_max);
                self.feed_target_of(worker, move_id, TargetInput::Joined { flows, hold }, now);
            }
            Event::Mismatch { move_id, .. } => {
                self.feed_target_of(worker, move_id, TargetInput::Mismatch, now)
            }
            Event::Gone { group, move_id } => self.gone(worker, group, move_id),
            Event::Serving { group, .. } => {
                if self.unserved.get(&group) == Some(&worker) {
                    self.unserved.remove(&group);
                }
            }
            Event::Hello { .. } | Event::Abandoned { .. } | Event::ServicesSet => {}
        }
    }

    fn worker_refused(
        &mut self,
        worker: WorkerId,
        group: GroupId,
        move_id: Option<MoveId>,
        reason: String,
        now: Micros,
    ) {
        self.counts.refused += 1;
        tracing::warn!(%worker, %group, %reason, "the worker refused");
        if let Some(id) = move_id {
            self.feed_source_of(worker, id, SourceInput::Refused(reason.clone()), now);
            self.feed_target_of(worker, id, TargetInput::Refused(reason), now);
        }
    }

    /// The worker has room; the machine hears of it once the switch delivers to that worker.
    fn prepared(&mut self, worker: WorkerId, id: MoveId) {
        let tag = if self.plan_dirty { self.tag + 1 } else { self.tag };
        if let Some(incoming) = self.incoming.get_mut(&id).filter(|incoming| incoming.worker == worker) {
            incoming.prepared_at = Some(tag);
        }
    }

    /// A worker relays no longer: the switch need not deliver to it any more, unless it got a new task.
    fn gone(&mut self, worker: WorkerId, group: GroupId, _id: MoveId) {
        let owned = self.groups.get(&group).is_some_and(|g| g.owner == self.site);
        let coming = self.incoming.values().any(|incoming| incoming.machine.spec().group == group);
        if !owned && !coming && self.local.get(&group) == Some(&worker) {
            self.set_local(group, None);
        }
    }

    fn stats(&mut self, worker: WorkerId, stats: Stats, now: Micros) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.load = stats.groups.iter().map(|load| load.packets).sum();
            worker.said = Some((now, stats.busy, stats.groups_known));
        }
        for load in stats.groups {
            if self.local.get(&load.group) == Some(&worker) {
                let mean = self.means.entry(load.group).or_insert(load.packets);
                *mean = (*mean * 7 + load.packets) / 8;
                self.loads.insert(load.group, load);
            }
        }
        let local = &self.local;
        self.loads.retain(|group, _| local.contains_key(group));
        self.means.retain(|group, _| local.contains_key(group));
    }

    fn status(&mut self, worker: WorkerId, groups: Vec<GroupStatus>, now: Micros) {
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.ready = true;
            entry.fresh = true;
        }
        self.drop_stale_local(worker, &groups);
        self.serve_again(worker, &groups);
        for status in groups {
            // Whoever serves or may serve comes before whoever only relays.
            let relays = matches!(status.phase, Phase::Relaying | Phase::Tombstone);
            if self.is_local_move_known(status.move_id) || self.adopt(worker, &status) {
                continue;
            }
            if self.abandons(worker, &status) {
                continue;
            }
            if let Some(id) = status.move_id.filter(|id| id.is_local()) {
                // A tombstone of a move between workers relays to whichever worker has the group now.
                if status.phase != Phase::Tombstone {
                    self.orphans.entry(id).or_default().insert(worker, status);
                    self.point_at_orphan(id);
                }
                continue;
            }
            if !relays || !self.local.contains_key(&status.group) {
                self.set_local(status.group, Some(worker));
            }
            if self.synced {
                self.reconcile(worker, status, now);
            }
        }
        self.try_sync(now);
        self.resync(now);
    }

    /// Where the switch delivers while a move between workers is half done: to the target once the flip was ordered, and it was
    /// when the source drains. To turn back would let packets pass those that the target holds.
    fn point_at_orphan(&mut self, id: MoveId) {
        let Some(parts) = self.orphans.get(&id) else { return };
        let find = |phases: &[Phase]| parts.iter().find(|(_, s)| phases.contains(&s.phase));
        let copying = find(&[Phase::Copying]);
        let flipped = find(&[Phase::Draining, Phase::Relaying]);
        let shadow = find(&[Phase::Shadow, Phase::Open]);
        let Some((&worker, status)) = copying.or(shadow).or(flipped) else { return };
        let is_known = self.local.contains_key(&status.group);
        if !is_known || copying.is_some() || flipped.is_some() && shadow.is_some() {
            self.set_local(status.group, Some(worker));
        }
    }

    /// That a relay ended may have been said while nobody listened. Groups of this site are left alone: what gives them
    /// to the worker may have been sent after the question that this answers.
    fn drop_stale_local(&mut self, worker: WorkerId, groups: &[GroupStatus]) {
        let has: BTreeSet<_> = groups.iter().map(|status| status.group).collect();
        let stale = self.local.iter().filter(|(group, at)| **at == worker && !has.contains(group));
        let stale: Vec<_> = stale.map(|(group, _)| *group).collect();
        for group in stale {
            let owned = self.groups.get(&group).is_none_or(|g| g.owner == self.site);
            if !owned && !self.is_moving(&group) {
                self.set_local(group, None);
            }
        }
    }

    /// What told the worker to serve was lost with its connection, or is still on its way: then twice does no harm.
    fn serve_again(&mut self, worker: WorkerId, groups: &[GroupStatus]) {
        let has: BTreeSet<_> = groups.iter().map(|status| status.group).collect();
        let missing = self.unserved.iter().filter(|(group, at)| **at == worker && !has.contains(group));
        let owned = missing.filter_map(|(group, _)| self.groups.get(group)).filter(|g| g.owner == self.site);
        let requests = owned.map(|group| Request::Serve { group: group.id, epoch: group.epoch });
        self.outputs.extend(requests.map(|request| Output::Worker(worker, request)).collect::<Vec<_>>());
    }

    /// A worker may have refused to serve what overlaps something that it still relayed.
    fn ask_again(&mut self) {
        for worker in self.ready_workers().collect::<Vec<_>>() {
            self.serve_again(worker, &[]);
        }
    }

    /// A shadow whose move was given to another worker while this one was away is of no use.
    fn abandons(&mut self, worker: WorkerId, status: &GroupStatus) -> bool {
        let Some(move_id) = status.move_id.filter(|_| matches!(status.phase, Phase::Shadow | Phase::Open))
        else {
            return false;
        };
        if self.incoming.get(&move_id).is_none_or(|incoming| incoming.worker == worker) {
            return false;
        }
        let abandon = Request::Abandon { group: status.group, move_id, relay_us: self.bounds.relay_us };
        self.outputs.push_back(Output::Worker(worker, abandon));
        true
    }

    fn is_local_move_known(&self, id: Option<MoveId>) -> bool {
        id.is_some_and(|id| id.is_local() && self.outgoing.contains_key(&id))
    }

    // ---- coming up ------------------------------------------------------------------------------------

    /// Goes ahead when placement and all workers were heard, or the others had their time.
    fn try_sync(&mut self, now: Micros) {
        if self.synced || !self.known {
            return;
        }
        let ready = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.ready);
        let all = self.expected.iter().all(ready);
        let waited = self.started.is_some_and(|at| at.plus(GATHER_BOUND) <= now);
        let some = self.workers.values().any(|worker| worker.ready);
        if !(all || waited && some) {
            return;
        }
        self.synced = true;
        self.plan_dirty = true;
        self.balance_at = now.plus(BALANCE_INTERVAL);
        // What came before may be old by now: machines start from what the workers say next.
        self.orphans.clear();
        self.ask_status();
    }

    /// What no worker knew of yet: moves to here, groups without a worker, moves between workers that a former
    /// agent left half done.
    fn resync(&mut self, now: Micros) {
        if !self.is_settled() {
            return;
        }
        for (id, parts) in std::mem::take(&mut self.orphans) {
            self.recover_local(id, &parts, now);
        }
        let ids: Vec<_> = self.groups.keys().copied().collect();
        for id in ids {
            self.place(id);
        }
        self.reshape(now);
        self.drive_all(now);
    }

    /// Brings one group of a worker in line with the log.
    fn reconcile(&mut self, worker: WorkerId, status: GroupStatus, now: Micros) {
        if let Some(mv) = status.move_id.and_then(|id| self.moves.get(&id)).cloned() {
            return self.resume(worker, &status, &mv, now);
        }
        let Some(group) = self.groups.get(&status.group).copied() else { return };
        let mv = group.move_id.and_then(|id| self.moves.get(&id)).cloned();
        let serves = matches!(status.phase, Phase::Serving | Phase::Copying | Phase::Draining);
        match mv {
            Some(mv) if mv.from == self.site && serves => self.resume(worker, &status, &mv, now),
            Some(mv) if mv.to == self.site && serves && status.epoch == mv.epoch => {
                self.resume(worker, &status, &mv, now);
            }
            // What is left of an earlier move ends first, or the worker would refuse its part of this one.
            _ => self.align(worker, status, group),
        }
    }

    /// No move is in hand: the group is served here, or not at all.
    fn align(&mut self, worker: WorkerId, status: GroupStatus, group: Group) {
        let mine = group.owner == self.site && self.local.get(&group.id) == Some(&worker);
        let move_id = status.move_id.unwrap_or_default();
        let request = match (mine, status.phase) {
            (true, Phase::Serving) if status.epoch == group.epoch => return,
            (true, Phase::Shadow | Phase::Open) => Request::TakeOver { group: group.id, move_id },
            (true, Phase::Copying | Phase::Draining) if status.epoch == group.epoch => {
                Request::Disarm { group: group.id, move_id }
            }
            (true, _) => Request::Serve { group: group.id, epoch: group.epoch },
            (false, Phase::Tombstone) => return,
            (false, Phase::Shadow | Phase::Open) => {
                Request::Abandon { group: group.id, move_id, relay_us: self.bounds.relay_us }
            }
            (false, Phase::Serving | Phase::Copying | Phase::Draining | Phase::Relaying) => Request::Forget {
                group: group.id,
                move_id,
                epoch: group.epoch,
                target: group.owner,
                relay_us: self.bounds.relay_us,
            },
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    /// A move goes on with a new machine, from what the worker says that it does.
    fn resume(&mut self, worker: WorkerId, status: &GroupStatus, mv: &Move, now: Micros) {
        if mv.from == self.site && !self.outgoing.contains_key(&mv.id) {
            let frozen = status.phase == Phase::Relaying;
            let machine = Source::new(spec_of(mv), self.next_incarnation(), status.flows, frozen, now);
            self.set_local(mv.group, Some(worker));
            self.add_source(mv.id, machine, worker, mv.to);
            let flipped = self.markers.contains_key(&mv.id) || self.flips.contains_key(&mv.id);
            if mv.phase == MovePhase::Switching && !flipped {
                self.flip(mv);
            }
            self.drive(mv, now);
        } else if mv.to == self.site && !self.incoming.contains_key(&mv.id) {
            let serving =
                (status.phase == Phase::Serving && status.epoch == mv.epoch).then_some(status.flows);
            self.add_target(mv.id, Target::new(spec_of(mv), serving), worker, now);
            self.drive(mv, now);
        }
    }

    /// Each machine gets another session number, also within one life of the agent.
    fn next_incarnation(&mut self) -> u32 {
        self.incarnation = self.incarnation.wrapping_add(1);
        self.incarnation
    }

    /// A move between workers that a former agent began: no log knows it, the two workers do. If both have their
    /// part it goes forward; if one has nothing, the other serves what it has.
    fn recover_local(&mut self, id: MoveId, parts: &BTreeMap<WorkerId, GroupStatus>, now: Micros) {
        let find =
            |phases: &[Phase]| parts.iter().find(|(_, s)| phases.contains(&s.phase)).map(|(w, s)| (*w, *s));
        let serves = find(&[Phase::Copying, Phase::Draining]);
        let relays = find(&[Phase::Relaying]);
        let joined = find(&[Phase::Serving]);
        let shadow = find(&[Phase::Shadow, Phase::Open]);
        match (serves.or(relays), joined, shadow) {
            (source, Some((to, status)), _) => {
                self.set_local(status.group, Some(to));
                let forget = self.forget_request(status.group, id, status.epoch, self.site);
                self.outputs.extend(source.map(|(from, _)| Output::Worker(from, forget)));
            }
            (Some((from, status)), None, Some((to, _))) => {
                let incarnation = self.next_incarnation();
                let spec = self.local_spec(status.group, id, status.epoch);
                let machine = Source::new(spec, incarnation, status.flows, relays.is_some(), now);
                self.add_source(id, machine, from, self.site);
                self.add_target(id, Target::new(spec, None), to, now);
                self.feed_source(id, SourceInput::PeerUp, now);
                self.commit_local(id, now);
            }
            // The target is away for a moment, and may have joined.
            (Some((from, status)), None, None) if self.is_elsewhere(&status.group, from, false) => {
                self.orphans.insert(id, parts.clone());
            }
            // A worker that has joined says no more that there was a move.
            (Some((from, status)), None, None) if self.is_elsewhere(&status.group, from, true) => {
                let forget = self.forget_request(status.group, id, status.epoch, self.site);
                self.outputs.push_back(Output::Worker(from, forget));
            }
            (Some((from, status)), None, None) => {
                let group = status.group;
                self.set_local(group, Some(from));
                let request = match relays {
                    Some(_) => Request::Serve { group, epoch: status.epoch },
                    None => Request::Disarm { group, move_id: id },
                };
                self.outputs.push_back(Output::Worker(from, request));
            }
            // The source has not heard of it, or is away for a moment.
            (None, None, Some((to, status))) if self.is_elsewhere(&status.group, to, true) => {
                let relay_us = self.bounds.relay_us;
                let abandon = Request::Abandon { group: status.group, move_id: id, relay_us };
                self.outputs.push_back(Output::Worker(to, abandon));
            }
            (None, None, Some((to, status))) if self.is_elsewhere(&status.group, to, false) => {
                self.orphans.insert(id, parts.clone());
            }
            // The source is another process now, and its flows are gone with it: what was copied is best.
            (None, None, Some((to, status))) => {
                self.set_local(status.group, Some(to));
                self.outputs
                    .push_back(Output::Worker(to, Request::TakeOver { group: status.group, move_id: id }));
            }
            (None, None, None) => {}
        }
    }

    /// Another worker than this one has the group, and answers or not.
    fn is_elsewhere(&self, group: &GroupId, than: WorkerId, answers: bool) -> bool {
        self.local.get(group).is_some_and(|worker| *worker != than && self.is_ready(*worker) == answers)
    }

    // ---- moves between workers --------------------------------------------------------------------------

    /// Always strict: inside a site that costs next to nothing, and a relaxed target relays what it cannot place to the site of
    /// the source, where the switch would give it back to the target.
    fn local_spec(&self, group: GroupId, id: MoveId, epoch: Epoch) -> MoveSpec {
        MoveSpec { id, group, from: self.site, to: self.site, epoch, relaxed: false }
    }

    fn move_locally(&mut self, group: GroupId, to: WorkerId, now: Micros) {
        let Some(&from) = self.local.get(&group) else { return };
        let Some(state) = self.groups.get(&group).copied() else { return };
        let idle = state.owner == self.site && state.move_id.is_none() && !self.is_moving(&group);
        let fit = from != to && self.is_ready(from) && self.is_ready(to);
        if !self.is_settled() || !idle || !fit {
            return;
        }
        self.local_moves += 1;
        let id = MoveId::local(u64::from(self.incarnation) << 24 | self.local_moves);
        let spec = self.local_spec(group, id, state.epoch);
        let flows = self.loads.get(&group).map_or(0, |load| load.flows);
        let incarnation = self.next_incarnation();
        self.add_source(id, Source::new(spec, incarnation, flows, false, now), from, self.site);
        self.add_target(id, Target::new(spec, None), to, now);
        self.feed_source(id, SourceInput::PeerUp, now);
    }

    fn is_moving_locally(&self, group: &GroupId) -> bool {
        self.outgoing.iter().any(|(id, out)| id.is_local() && out.machine.spec().group == *group)
    }

    fn is_moving(&self, group: &GroupId) -> bool {
        self.outgoing.values().any(|out| out.machine.spec().group == *group)
            || self.incoming.values().any(|incoming| incoming.machine.spec().group == *group)
    }

    fn is_ready(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| worker.up && worker.ready)
    }

    /// Inside a site the agent is the log.
    fn commit_local(&mut self, id: MoveId, now: Micros) {
        let (Some(out), Some(incoming)) = (self.outgoing.get(&id), self.incoming.get(&id)) else { return };
        let (spec, old, to) = (*out.machine.spec(), out.worker, incoming.worker);
        self.set_local(spec.group, Some(to));
        self.plan_dirty = true;
        let old = OldPath::Local(old);
        self.markers
            .insert(id, Marker { group: spec.group, epoch: spec.epoch, old, tag: self.tag + 1, at: None });
        self.feed_source(id, SourceInput::Switching(vec![self.site]), now);
        self.feed_target(id, TargetInput::Switching, now);
    }

    fn log_local(&mut self, id: MoveId, summary: transfer::core::Summary) {
        let (Some(out), Some(incoming)) = (self.outgoing.get(&id), self.incoming.get(&id)) else { return };
        let (group, from, to) = (incoming.machine.spec().group, out.worker, incoming.worker);
        let transfer::core::Summary { flows, precopy_us, hold, .. } = summary;
        let number = self.counts.moves_local + 1;
        self.local_log.push_back(LocalMove { number, group, from, to, flows, precopy_us, hold });
        if self.local_log.len() > LOCAL_LOG_LEN {
            self.local_log.pop_front();
        }
    }

    fn end_local(&mut self, id: MoveId, ending: Ending, now: Micros) {
        self.counts.moves_local += u64::from(ending == Ending::Done);
        if let (Some(out), true) = (self.outgoing.get(&id), ending != Ending::Done) {
            let (group, worker) = (out.machine.spec().group, out.worker);
            self.set_local(group, Some(worker));
        }
        self.markers.remove(&id);
        self.feed_source(id, SourceInput::Ended(ending), now);
        self.feed_target(id, TargetInput::Ended(ending), now);
        self.resync(now);
        if ending == Ending::Done {
            // What was refused is tried again at the next look at the loads.
            self.evacuate(now);
        }
    }

    /// Spreads groups over the workers: from the one with most packets to the one with fewest, one group at a time,
    /// while that narrows the gap well. A small gap is left alone, and a group stays for a while where it is, so loads that
    /// wobble do not move groups back and forth.
    fn balance(&mut self, now: Micros) {
        let mut loads = self.worker_loads();
        if loads.len() < 2 {
            return;
        }
        for _ in self.local_moves_in_hand()..LOCAL_MOVES_MAX {
            let Some((group, from, to, weight)) = self.best_move(&loads, now) else { return };
            self.settled_at.insert(group, now);
            self.move_locally(group, to, now);
            *loads.entry(from).or_default() -= weight;
            *loads.entry(to).or_default() += weight;
        }
    }

    fn local_moves_in_hand(&self) -> usize {
        self.outgoing.keys().filter(|id| id.is_local()).count()
    }

    /// The load of each worker that may get groups, by the groups that it has.
    fn worker_loads(&self) -> BTreeMap<WorkerId, u64> {
        let mut loads: BTreeMap<WorkerId, u64> =
            self.ready_workers().filter(|id| !self.retiring.contains(id)).map(|id| (id, 0)).collect();
        for (group, worker) in &self.local {
            if let Some(load) = loads.get_mut(worker) {
                *load += self.weight(group);
            }
        }
        loads
    }

    /// Groups of workers that retire go to the least loaded others, heaviest first, as many at a time as other moves between
    /// workers. How long a group has been there does not matter.
    fn evacuate(&mut self, now: Micros) {
        if self.retiring.is_empty() {
            return;
        }
        let mut loads = self.worker_loads();
        for (id, incoming) in self.incoming.iter().filter(|(id, _)| id.is_local()) {
            // On its way to that worker, and not among its groups before the flip.
            let group = incoming.machine.spec().group;
            let from = self.outgoing.get(id).map(|out| out.worker);
            if let Some(load) =
                loads.get_mut(&incoming.worker).filter(|_| self.local.get(&group).copied() == from)
            {
                *load += self.weight(&group);
            }
        }
        let leave = self.local.iter().filter(|(group, worker)| {
            self.retiring.contains(worker)
                && self.groups.get(group).is_some_and(|g| g.owner == self.site && g.move_id.is_none())
                && !self.is_moving(group)
        });
        let mut leave: Vec<_> = leave.map(|(group, _)| (self.weight(group), *group)).collect();
        leave.sort_unstable_by_key(|(weight, group)| (std::cmp::Reverse(*weight), *group));
        let room = LOCAL_MOVES_MAX.saturating_sub(self.local_moves_in_hand());
        for (weight, group) in leave.into_iter().take(room) {
            let Some((_, to)) = loads.iter().map(|(id, load)| (*load, *id)).min() else { return };
            self.settled_at.insert(group, now);
            self.move_locally(group, to, now);
            *loads.entry(to).or_default() += weight;
        }
    }

    fn recall(&mut self, worker: WorkerId) {
        let gone = self.workers.get(&worker).is_some_and(|known| !known.up);
        let has_groups = self.local.values().any(|at| *at == worker);
        if self.retiring.remove(&worker) && gone && !has_groups {
            // It was to go: nobody waits for it.
            self.workers.remove(&worker);
        }
    }

    /// The workers that answer, for the decision how many there should be; nothing before all were heard.
    #[must_use]
    pub fn worker_views(&self, now: Micros) -> Option<Views> {
        let views = self.ready_workers().map(|id| {
            let said = self.workers.get(&id).and_then(|worker| worker.said);
            let said = said.filter(|(at, ..)| at.plus(STATS_FRESH) > now);
            let knows_none = said.is_some_and(|(.., groups)| groups == 0);
            let view = WorkerView {
                busy: said.map(|(_, busy, _)| busy),
                is_empty: knows_none && !self.has_task(id),
            };
            (id, view)
        });
        self.is_settled().then(|| views.collect())
    }

    /// It has a group, or was told to do something with one.
    fn has_task(&self, id: WorkerId) -> bool {
        self.local.values().chain(self.unserved.values()).any(|worker| *worker == id)
            || self.outgoing.values().any(|out| out.worker == id)
            || self.incoming.values().any(|incoming| incoming.worker == id)
    }

    /// Whether the worker is to have no groups.
    #[must_use]
    pub fn is_retiring(&self, worker: WorkerId) -> bool {
        self.retiring.contains(&worker)
    }

    /// How many groups a worker has.
    #[must_use]
    pub fn groups_of(&self, worker: WorkerId) -> usize {
        self.local.values().filter(|at| **at == worker).count()
    }

    /// Packets of the last report, and something for a group that is idle, so that those spread too.
    fn weight(&self, group: &GroupId) -> u64 {
        1 + self.means.get(group).copied().unwrap_or(0)
            + self.loads.get(group).map_or(0, |load| load.flows / 16)
    }

    fn best_move(
        &self,
        loads: &BTreeMap<WorkerId, u64>,
        now: Micros,
    ) -> Option<(GroupId, WorkerId, WorkerId, u64)> {
        let (&from, &most) = loads.iter().max_by_key(|(id, load)| (**load, **id))?;
        let (&to, &least) = loads.iter().min_by_key(|(id, load)| (**load, **id))?;
        let mean = loads.values().sum::<u64>() / loads.len() as u64;
        let gap = most - least;
        if gap * GAP_SHARE <= mean.max(GAP_SHARE) {
            return None;
        }
        let movable = |group: &GroupId| {
            let rested = self.settled_at.get(group).is_none_or(|at| at.plus(LOCAL_DWELL) <= now);
            rested
                && self.groups.get(group).is_some_and(|g| g.owner == self.site && g.move_id.is_none())
                && !self.is_moving(group)
                && !self.is_to_change(group)
        };
        self.local
            .iter()
            .filter(|(group, worker)| **worker == from && movable(group))
            .map(|(group, _)| (*group, self.weight(group)))
            .filter(|(_, weight)| gap.abs_diff(2 * *weight) <= gap / 2)
            .min_by_key(|(group, weight)| ((gap / 2).abs_diff(*weight), *group))
            .map(|(group, weight)| (group, from, to, weight))
    }

    /// Groups of a worker that stays away go to others; their flows stay with it.
    fn replace_dead_workers(&mut self, now: Micros) {
        let dead = |worker: &Worker| worker.down_since.is_some_and(|at| at.plus(WORKER_BOUND) <= now);
        let dead: Vec<_> = self.workers.iter().filter(|(_, w)| dead(w)).map(|(id, _)| *id).collect();
        for id in dead {
            tracing::warn!(worker = %id, "the worker stays away; its groups go to others");
            self.workers.remove(&id);
            self.worker_lost(id);
            self.resync(now);
        }
    }

    /// One that retires only if there is no other.
    fn least_loaded(&self) -> Option<WorkerId> {
        let load = |id: WorkerId| self.workers.get(&id).map_or(0, |worker| worker.load);
        let rank = |id: WorkerId| (self.retiring.contains(&id), load(id), self.groups_of(id), id);
        self.ready_workers().min_by_key(|id| rank(*id))
    }

    fn ready_workers(&self) -> impl Iterator<Item = WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.up && worker.ready).map(|(id, _)| *id)
    }

    fn up_workers(&self) -> Vec<WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.up).map(|(id, _)| *id).collect()
    }

    fn set_local(&mut self, group: GroupId, worker: Option<WorkerId>) {
        let before = match worker {
            Some(worker) => self.local.insert(group, worker),
            None => self.local.remove(&group),
        };
        self.plan_dirty |= before != worker;
        self.unserved.remove(&group);
    }

    // ---- machines ---------------------------------------------------------------------------------------

    fn from_source(&mut self, id: MoveId, from: SiteId, message: ToTarget, wire_len: u64, now: Micros) {
        if !self.expects(id, from) || !self.incoming.contains_key(&id) {
            // Not heard of it yet, or long over: the source offers again or hears of the end.
            return self.outputs.push_back(Output::ToSource(id, ToSource::Unknown));
        }
        self.feed_target(id, TargetInput::Peer { message, wire_len }, now);
    }

    fn feed_source_of(&mut self, worker: WorkerId, id: MoveId, input: SourceInput, now: Micros) {
        if self.outgoing.get(&id).is_some_and(|out| out.worker == worker) {
            self.feed_source(id, input, now);
        }
    }

    fn feed_target_of(&mut self, worker: WorkerId, id: MoveId, input: TargetInput, now: Micros) {
        if self.incoming.get(&id).is_some_and(|incoming| incoming.worker == worker) {
            self.feed_target(id, input, now);
        }
    }

    fn feed_source(&mut self, id: MoveId, input: SourceInput, now: Micros) {
        if let Some(out) = self.outgoing.get_mut(&id) {
            out.machine.handle(input, now);
            self.drain_source(id, now);
        }
    }

    fn feed_target(&mut self, id: MoveId, input: TargetInput, now: Micros) {
        if let Some(incoming) = self.incoming.get_mut(&id) {
            incoming.machine.handle(input, now);
            self.drain_target(id, now);
        }
    }

    fn drain_source(&mut self, id: MoveId, now: Micros) {
        while let Some(action) = self.outgoing.get_mut(&id).and_then(|out| out.machine.poll_action()) {
            self.do_source(id, action, now);
        }
        if self.outgoing.get(&id).is_some_and(|out| out.machine.is_over()) {
            self.outgoing.remove(&id);
            if !id.is_local() {
                self.outputs.push_back(Output::Hangup(id));
            }
        }
    }

    fn drain_target(&mut self, id: MoveId, now: Micros) {
        while let Some(action) =
            self.incoming.get_mut(&id).and_then(|incoming| incoming.machine.poll_action())
        {
            self.do_target(id, action, now);
        }
        if self.incoming.get(&id).is_some_and(|incoming| incoming.machine.is_over()) {
            self.incoming.remove(&id);
        }
    }

    fn do_source(&mut self, id: MoveId, action: SourceAction, now: Micros) {
        let Some(out) = self.outgoing.get(&id) else { return };
        let (worker, spec) = (out.worker, *out.machine.spec());
        let group = spec.group;
        let request = match action {
            SourceAction::Send(message) => return self.send_to_target(id, message, now),
            SourceAction::ProposeSwitch => return self.propose_switch(id, now),
            SourceAction::ProposeAbort(reason) => return self.propose_abort(id, reason, now),
            SourceAction::ProposeTakeBack(proof) => return self.propose_take_back(id, &spec, proof, now),
            SourceAction::CopyStart => Request::CopyStart { group, move_id: id },
            SourceAction::CopyRound => Request::CopyRound { group, move_id: id },
            SourceAction::Arm(awaited) => {
                self.serve_lost(id, worker, group);
                let bound_us = self.bounds.marker_us + self.flips.get(&id).map_or(0, |at| at.since(now).0);
                Request::Arm { group, move_id: id, epoch: spec.epoch, target: spec.to, awaited, bound_us }
            }
            SourceAction::Disarm => Request::Disarm { group, move_id: id },
            SourceAction::Forget => self.forget_request(group, id, spec.epoch, spec.to),
            SourceAction::Serve(epoch) => Request::Serve { group, epoch },
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    /// The target has accepted a copy from nothing, so it does not serve: this site goes on under its epoch.
    fn serve_lost(&mut self, id: MoveId, worker: WorkerId, group: GroupId) {
        let lost = self.outgoing.get_mut(&id).is_some_and(|out| std::mem::take(&mut out.lost));
        if let Some(epoch) = self.groups.get(&group).filter(|_| lost).map(|g| g.epoch) {
            self.set_local(group, Some(worker));
            self.serve(worker, group, epoch);
        }
    }

    fn forget_request(&self, group: GroupId, move_id: MoveId, epoch: Epoch, target: SiteId) -> Request {
        Request::Forget { group, move_id, epoch, target, relay_us: self.bounds.relay_us }
    }

    fn send_to_target(&mut self, id: MoveId, message: ToTarget, now: Micros) {
        if id.is_local() {
            self.feed_target(id, TargetInput::Peer { message, wire_len: 0 }, now);
        } else {
            self.outputs.push_back(Output::ToTarget(id, message));
        }
    }

    fn propose_switch(&mut self, id: MoveId, now: Micros) {
        if id.is_local() {
            return self.commit_local(id, now);
        }
        self.outputs.push_back(Output::Propose(Command::Switch { move_id: id, by: self.site }));
    }

    fn propose_abort(&mut self, id: MoveId, reason: String, now: Micros) {
        if id.is_local() {
            return self.end_local(id, Ending::Aborted, now);
        }
        self.outputs.push_back(Output::Propose(Command::Abort { move_id: id, by: Some(self.site), reason }));
    }

    fn propose_take_back(&mut self, id: MoveId, spec: &MoveSpec, proof: Proof, now: Micros) {
        if id.is_local() {
            return self.end_local(id, Ending::TakenBack(spec.epoch), now);
        }
        let proof = match proof {
            Proof::NeverCut => placement::core::Proof::NeverCut,
            Proof::NeverAccepted => placement::core::Proof::NeverAccepted,
        };
        self.outputs.push_back(Output::Propose(Command::TakeBack { move_id: id, by: self.site, proof }));
    }

    fn do_target(&mut self, id: MoveId, action: TargetAction, now: Micros) {
        let Some(incoming) = self.incoming.get(&id) else { return };
        let (worker, spec) = (incoming.worker, *incoming.machine.spec());
        let group = spec.group;
        let request = match action {
            TargetAction::Send(message) => return self.send_to_source(id, message, now),
            TargetAction::ProposeServed(summary) => return self.propose_served(id, summary, now),
            TargetAction::Prepare { flows } => {
                let ordering = if spec.relaxed { Ordering::Relaxed } else { Ordering::Strict };
                Request::Prepare { group, move_id: id, epoch: spec.epoch, source: spec.from, flows, ordering }
            }
            TargetAction::Install(sequence, batch) => {
                let pieces = Request::install(group, id, sequence, &batch);
                self.outputs.extend(pieces.into_iter().map(|piece| Output::Worker(worker, piece)));
                return;
            }
            TargetAction::Open => Request::Open { group, move_id: id },
            TargetAction::Join { token, missing } => {
                let Bounds { cut_us: cut_bound_us, late_us: late_bound_us, .. } = self.bounds;
                Request::Join { group, move_id: id, token, missing, late_bound_us, cut_bound_us }
            }
            TargetAction::TakeOver => Request::TakeOver { group, move_id: id },
            TargetAction::Serve => return self.serve(worker, group, spec.epoch),
            TargetAction::Abandon => Request::Abandon { group, move_id: id, relay_us: self.bounds.relay_us },
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    fn send_to_source(&mut self, id: MoveId, message: ToSource, now: Micros) {
        if id.is_local() {
            self.feed_source(id, SourceInput::Peer(message), now);
        } else {
            self.outputs.push_back(Output::ToSource(id, message));
        }
    }

    fn propose_served(&mut self, id: MoveId, summary: transfer::core::Summary, now: Micros) {
        if id.is_local() {
            self.log_local(id, summary);
            return self.end_local(id, Ending::Done, now);
        }
        self.counts.flows_in += summary.flows;
        self.counts.bytes_in += summary.bytes_on_wire;
        let summary = MoveSummary {
            flows: summary.flows,
            bytes_on_wire: summary.bytes_on_wire,
            bytes_raw: summary.flows * size_of::<flow::FlowRecord>() as u64,
            precopy_us: summary.precopy_us,
            hold: summary.hold,
            rounds: summary.rounds,
        };
        self.outputs.push_back(Output::Propose(Command::Served { move_id: id, by: self.site, summary }));
    }

    // ---- the switch -------------------------------------------------------------------------------------

    /// What follows from the inputs taken: rules, then what waited for rules.
    fn settle(&mut self, now: Micros) {
        self.try_sync(now);
        if self.plan_dirty && self.synced && (self.is_settled() || !self.has_strays()) {
            self.plan_dirty = false;
            self.tag += 1;
            let rules = switchctl::compile(&self.plan());
            self.outputs.push_back(Output::Rules(Arc::new(rules), self.tag));
        }
        self.release_prepared(now);
        self.send_markers(now);
    }

    fn release_prepared(&mut self, now: Micros) {
        let in_force = self.in_force;
        let ready = |incoming: &Incoming| incoming.prepared_at.is_some_and(|tag| tag <= in_force);
        let ids: Vec<_> = self.incoming.iter().filter(|(_, i)| ready(i)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(incoming) = self.incoming.get_mut(&id) {
                incoming.prepared_at = None;
            }
            self.feed_target(id, TargetInput::Prepared, now);
        }
    }

    fn send_markers(&mut self, now: Micros) {
        let due = |m: &Marker| m.tag <= self.in_force && m.at.is_none_or(|at| at <= now);
        let due: Vec<_> = self.markers.iter().filter(|(_, m)| due(m)).map(|(id, m)| (*id, *m)).collect();
        if due.is_empty() {
            return;
        }
        let plan = self.ports_plan();
        for (id, marker) in due {
            match marker_out(&plan, marker.old, &marker.group, id, marker.epoch) {
                Ok(packet) => self.outputs.push_back(Output::PacketOut(packet)),
                Err(error) => tracing::warn!(%error, group = %marker.group, "no marker can be sent"),
            }
            // The move may be over by now (its end can be heard before the flip is in force): then once is enough.
            if self.moves.contains_key(&id) || id.is_local() {
                if let Some(marker) = self.markers.get_mut(&id) {
                    marker.at = Some(now.plus(MARKER_INTERVAL));
                }
            } else {
                self.markers.remove(&id);
            }
        }
    }

    fn ports_plan(&self) -> SitePlan {
        SitePlan {
            site: self.site,
            ports: self.ports.clone(),
            services: BTreeMap::new(),
            groups: BTreeMap::new(),
        }
    }

    /// What the switch of this site is to do.
    #[must_use]
    pub fn plan(&self) -> SitePlan {
        let group = |(id, state): (&GroupId, &Group)| {
            let steer = self.steer.get(id).copied().unwrap_or(state.owner);
            let epoch = if steer == state.owner { state.epoch } else { state.epoch.next() };
            (*id, GroupPlan { epoch, steer, local: self.local.get(id).copied() })
        };
        SitePlan {
            site: self.site,
            ports: self.ports.clone(),
            services: self.slices.clone(),
            groups: self.groups.iter().map(group).collect(),
        }
    }
}

fn as_text<S: serde::Serializer>(group: &GroupId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(group)
}

fn spec_of(mv: &Move) -> MoveSpec {
    let relaxed = mv.ordering == placement::core::Ordering::Relaxed;
    MoveSpec { id: mv.id, group: mv.group, from: mv.from, to: mv.to, epoch: mv.epoch, relaxed }
}

fn service_spec(service: &Service) -> ServiceSpec {
    let t = service.timeouts;
    ServiceSpec {
        service: service.id,
        function: Function::Nat44(service.nat.clone()),
        timeouts: dataplane::control::Timeouts {
            udp_s: t.udp_s,
            tcp_established_s: t.tcp_established_s,
            tcp_transitory_s: t.tcp_transitory_s,
            icmp_s: t.icmp_s,
        },
    }
}
