//! The agent of a site as a sans-IO core: what placement decided, what workers, switch and peers report goes in; what
//! to tell each of them comes out. The move machines of `transfer` run inside; the rules come from `switchctl`.
//!
//! The core can be made anew at any time: placement sends what is committed, each worker says what it has, the
//! switch keeps its rules until the core has heard both. Nothing that only this core knew is needed to go on.

mod committed;
mod local;
mod machines;
mod recovery;
mod reshape;
mod switching;
#[cfg(test)]
mod tests;
mod tracked;
mod workers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use dataplane::control::{Event, Function, GroupLoad, GroupStatus, Request, ServiceSpec};
use flow::nat::NatSlices;
use flow::{Epoch, GroupId, HoldTimes, Micros, MoveId, ServiceId, SiteId, WorkerId};
use placement::core::{Change, Command, Group, Move, Service, Site};
use switchctl::{Compiled, OldPath, PacketOut, Ports, RuleSet};
use tracked::Tracked;
use transfer::core::{MoveSpec, Pace, Source, SourceInput, Target, ToSource, ToTarget, Waits};

/// How long an agent that just started waits for workers that do not answer before it gives their groups to others.
const GATHER_BOUND: Micros = Micros(3_000_000);
/// Between two looks at how groups are spread over the workers.
const BALANCE_INTERVAL: Micros = Micros(1_000_000);

/// An agent is called at each look at its workers, and one that is late for that by half a second more was stopped, or starved.
const STALL: Micros = Micros(BALANCE_INTERVAL.0 + 500_000);

/// How long the rules of an agent that woke wait for what was decided meanwhile. Placement nodes that hang are asked one after the
/// other, for a second each; without any, what is known has to do.
const CATCH_UP_BOUND: Micros = Micros(4_000_000);

/// Bounds that an operator may set; each is documented in the configuration reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Longest wait for markers at the source.
    pub marker_us: u64,
    /// How long a source waits for a target that is silent: then it takes the group back, unless the target may serve it.
    pub take_back_us: u64,
    /// Longest wait for the cut along the data path at the target.
    pub cut_us: u64,
    /// Longest hold of a late ingress's packets at the target.
    pub late_us: u64,
    /// How long an old owner relays.
    pub relay_us: u64,
    /// How long it relays after the last packet by the old path as long as an ingress has not flipped.
    pub relay_late_us: u64,
    /// How copies are cut up; no operator sets it.
    pub pace: Pace,
}

/// A target that was not heard of for so long before the flip is committed: the move is aborted. The leader's own bound for the
/// preparation is longer, so who is there is told why.
const PREPARE_BOUND: Micros = Micros(30_000_000);

impl Bounds {
    /// What a source waits for.
    pub(super) fn waits(&self) -> Waits {
        Waits { marker: Micros(self.marker_us), prepare: PREPARE_BOUND, take_back: Micros(self.take_back_us) }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            marker_us: 2_000_000,
            take_back_us: 3_000_000,
            cut_us: 500_000,
            late_us: 2_000_000,
            relay_us: 10_000_000,
            relay_late_us: 300_000_000,
            pace: Pace::default(),
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Placement's changes, in order; `reset` when they are all there is.
    Placement {
        /// When they were asked for, by this agent's clock.
        asked_at: Micros,
        /// There were more when this was answered, which come next.
        more: bool,
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
    /// The switch has other ports from now on, such as tunnels to other sites.
    Ports(Ports),
    /// This agent is to end: no move is begun any more. Those of the log wait for the next one.
    Stop,
}

/// What is to be done, in this order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Tell a worker.
    Worker(WorkerId, Request),
    /// Ask placement at once what there is, and say so also if there is nothing new.
    CatchUp,
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
    /// End the connection to a worker that does not answer: when it does again it is greeted anew.
    Disconnect(WorkerId),
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
    up_since: Option<Micros>,
    down_since: Option<Micros>,
    /// Its link to the switch is there, or is not, since then.
    linked_since: Option<Micros>,
    unlinked_since: Option<Micros>,
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
    /// When it was called last.
    awake_at: Option<Micros>,
    /// Since then it knows that it does not know all that was decided: it was stopped, or has a part of a long answer.
    behind_since: Option<Micros>,
    synced: bool,
    known: bool,
    revision: u64,
    /// When placement said something last.
    wall_ms: u64,
    sites: BTreeMap<SiteId, Site>,
    services: BTreeMap<ServiceId, Service>,
    slices: BTreeMap<ServiceId, NatSlices>,
    groups: Tracked<Group>,
    /// Groups that wait until what they are made from is ready; see `reshape`.
    wanted: BTreeMap<GroupId, Group>,
    moves: BTreeMap<MoveId, Move>,
    steer: Tracked<SiteId>,
    workers: BTreeMap<WorkerId, Worker>,
    /// Those that are to have no groups.
    retiring: BTreeSet<WorkerId>,
    /// The worker that gets a group's packets at this site: its owner, or one that holds or relays.
    local: Tracked<WorkerId>,
    /// Groups that a worker was told to serve and has not said that it does.
    unserved: BTreeMap<GroupId, WorkerId>,
    /// Groups that a worker said that it serves, with the epoch.
    served: BTreeMap<GroupId, Epoch>,
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
    /// Of moves that were over when this agent heard of them: each is sent once.
    unheard: Vec<(MoveId, Marker)>,
    /// Moves between workers that were given up after their flip: the target relays from when this tag is in force.
    withdrawn: BTreeMap<MoveId, u64>,
    /// Moves that were proposed to be taken back as their token never left, and whose worker, which knew that, may be gone.
    voided: BTreeSet<MoveId>,
    /// It was told to stop.
    stopping: bool,
    local_moves: u64,
    local_log: VecDeque<LocalMove>,
    /// Local moves that were found half done; see [`Agent::recover_local`].
    orphans: BTreeMap<MoveId, BTreeMap<WorkerId, GroupStatus>>,
    /// Moves between workers one of which is away, until the source says what it has: with the group and the source.
    doubts: BTreeMap<MoveId, (GroupId, WorkerId)>,
    /// Who says that it has what was split or merged since: an older answer, or one that others will have made untrue in a moment.
    unexplained: BTreeSet<WorkerId>,
    plan_dirty: bool,
    /// The rules that the switch was given, kept up with what changes.
    compiled: Option<Compiled>,
    /// Groups that are no more and that a worker relays for, and what took their place, when rules were made last.
    relay_scope: BTreeSet<GroupId>,
    /// Groups that have a worker here and are no more, as of then.
    strays: BTreeSet<GroupId>,
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
            awake_at: None,
            behind_since: None,
            synced: false,
            known: false,
            revision: 0,
            wall_ms: 0,
            sites: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            groups: Tracked::default(),
            wanted: BTreeMap::new(),
            moves: BTreeMap::new(),
            steer: Tracked::default(),
            workers: BTreeMap::new(),
            retiring: BTreeSet::new(),
            local: Tracked::default(),
            unserved: BTreeMap::new(),
            served: BTreeMap::new(),
            loads: BTreeMap::new(),
            means: BTreeMap::new(),
            settled_at: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            flips: BTreeMap::new(),
            markers: BTreeMap::new(),
            unheard: Vec::new(),
            withdrawn: BTreeMap::new(),
            voided: BTreeSet::new(),
            stopping: false,
            local_moves: 0,
            local_log: VecDeque::new(),
            orphans: BTreeMap::new(),
            doubts: BTreeMap::new(),
            unexplained: BTreeSet::new(),
            plan_dirty: false,
            compiled: None,
            relay_scope: BTreeSet::new(),
            strays: BTreeSet::new(),
            tag: 0,
            in_force: 0,
            balance_at: Micros(0),
            counts: Counts::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Notes that time passes. When it did so for longer than this agent ever waits, its process was stopped: an answer that came before
    /// then says where groups were, and who had one may relay for it no more by now, so that what is sent there would be lost. So rules wait
    /// for what was decided meanwhile.
    fn wake(&mut self, now: Micros) {
        self.behind_since = self.behind_since.filter(|since| now < since.plus(CATCH_UP_BOUND));
        let slept = now.since(self.awake_at.replace(now).unwrap_or(now));
        if slept > STALL {
            self.outgoing.values_mut().for_each(|out| out.machine.stood_still(slept));
            self.workers.values_mut().for_each(|worker| worker.stood_still(slept));
            self.behind_since = Some(now);
            self.outputs.push_back(Output::CatchUp);
        }
    }

    fn caught_up(&mut self, asked_at: Micros, more: bool) {
        if self.behind_since.is_none_or(|since| asked_at >= since) {
            self.behind_since = more.then_some(asked_at);
        }
    }

    /// Takes one input. When no other is at hand, [`Self::settle`] makes the rules that follow.
    pub fn handle(&mut self, input: Input, now: Micros) {
        self.started.get_or_insert(now);
        self.wake(now);
        match input {
            Input::Placement { asked_at, more, revision, wall_ms, reset, changes } => {
                self.revision = revision;
                self.wall_ms = wall_ms;
                self.placement(reset, changes, now);
                self.caught_up(asked_at, more);
            }
            Input::WorkerUp { worker, boot } => self.worker_up(worker, boot, now),
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
            Input::Ports(ports) => self.set_ports(ports),
            Input::Stop => self.stopping = true,
        }
        self.try_sync(now);
    }

    /// Lets time pass; [`Self::settle`] as after an input.
    pub fn handle_timeout(&mut self, now: Micros) {
        self.wake(now);
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
            let groups = &self.groups;
            self.settled_at.retain(|id, _| groups.contains_key(id));
            self.replace_dead_workers(now);
            self.replace_hung_workers(now);
            self.ask_again();
            self.ask_unexplained();
            self.reshape(now);
            self.evacuate(now);
            self.balance(now);
        }
        self.try_sync(now);
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        let machines = self.outgoing.values().filter_map(|out| out.machine.poll_timeout());
        let markers =
            self.markers.values().filter(|m| m.tag <= self.in_force).map(|m| m.at.unwrap_or(Micros(0)));
        let gather = self.started.filter(|_| !self.synced).map(|at| at.plus(GATHER_BOUND));
        let balance = self.synced.then_some(self.balance_at);
        let behind = self.behind_since.map(|since| since.plus(CATCH_UP_BOUND));
        let flips = self.flips.values().copied();
        machines.chain(markers).chain(flips).chain(behind).chain(gather).chain(balance).min()
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

    /// The ports of its switch, as the configuration says.
    #[must_use]
    pub fn ports(&self) -> &Ports {
        &self.ports
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

    /// Whether every group of this site has a worker that is connected, and none was told to serve one and has not said that it does.
    /// A worker that is gone keeps its groups until others get them, and may serve none of them.
    #[must_use]
    pub fn is_serving_all(&self) -> bool {
        let is_up = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.up);
        let owned = self.groups.values().filter(|group| group.owner == self.site);
        self.unserved.is_empty()
            && owned.into_iter().all(|group| self.local.get(&group.id).is_some_and(is_up))
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

    /// How many groups of this site have a worker, and for how many that are not the site's, and do not come to it, one still relays.
    #[must_use]
    pub fn count_local(&self) -> (usize, usize) {
        let coming: BTreeSet<_> = self.incoming.values().map(|part| part.machine.spec().group).collect();
        self.local.keys().fold((0, 0), |(own, relayed), id| {
            if self.groups.get(id).is_some_and(|group| group.owner == self.site) {
                (own + 1, relayed)
            } else {
                (own, relayed + usize::from(!coming.contains(id)))
            }
        })
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

    /// What is kept although no move, split or merge is in hand and no worker relays; nothing may be.
    #[must_use]
    pub fn leftovers(&self) -> Vec<&'static str> {
        let known = |id: &GroupId| self.groups.contains_key(id);
        let kept = [
            ("moves from here", !self.outgoing.is_empty()),
            ("moves to here", !self.incoming.is_empty()),
            ("moves of the log", !self.moves.is_empty()),
            ("flips", !self.flips.is_empty()),
            ("markers", !self.markers.is_empty() || !self.unheard.is_empty()),
            ("moves between workers that were given up", !self.withdrawn.is_empty()),
            ("moves whose token was withdrawn", !self.voided.is_empty()),
            ("moves that were found half done", !self.orphans.is_empty()),
            ("moves between workers in doubt", !self.doubts.is_empty()),
            ("workers that are to be asked again", !self.unexplained.is_empty()),
            ("groups that were told to be served", !self.unserved.is_empty()),
            ("groups that are said to be served", !self.served.keys().all(known)),
            ("groups to split or merge", !self.wanted.is_empty()),
            ("workers of groups that are no more", !self.local.keys().all(known)),
            ("steering of groups that are no more", !self.steer.keys().all(known)),
            ("loads of groups that are no more", !self.loads.keys().chain(self.means.keys()).all(known)),
            ("stays of groups that are no more", !self.settled_at.keys().all(known)),
        ];
        kept.into_iter().filter(|(_, kept)| *kept).map(|(what, _)| what).collect()
    }

    /// Whether a move of the log names this peer as source and this site as target.
    #[must_use]
    pub fn expects(&self, id: MoveId, from: SiteId) -> bool {
        self.moves.get(&id).is_some_and(|m| m.from == from && m.to == self.site)
    }

    /// The source of each move to here that the log knows: who may speak about it, and is answered.
    pub fn sources(&self) -> impl Iterator<Item = (MoveId, SiteId)> {
        self.moves.values().filter(|m| m.to == self.site).map(|m| (m.id, m.from))
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
