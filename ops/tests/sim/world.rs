//! The whole system in one thread: sites with real agents, workers, drivers and switch pipelines, one replicated log,
//! links, traffic and faults. Everything that happens is an event of one schedule, drawn from one seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dataplane::control::{Event, GroupStatus, Request};
use dataplane::worker::Worker;
use flow::nat::NatSlices;
use flow::sample::Seeded;
use flow::{GroupId, Micros, MoveId, ServiceId, SiteId, WorkerId};
use limosa::site::core::{Agent, Input};
use placement::core::{Command, Proposal};
use switchctl::Ports;
use switchctl::core::driver::Driver;
use switchctl::ofp::Message;
use transfer::core::{ToSource, ToTarget};

use crate::checks::Checks;
use crate::counts::Counts;
use crate::excuse::Excuses;
use crate::fault::{Fault, Plan};
use crate::links::{Dial, Link};
use crate::log::{Asked, Log};
use crate::mutation::Mutation;
use crate::schedule::Schedule;
use crate::slow::Part;
use crate::switch::Switch;
use crate::traffic::Traffic;

/// Between two looks at what waits in workers.
const DELAYS_INTERVAL: u64 = 50_000;

/// Silence after which a stream breaks.
pub(crate) const IDLE: u64 = 800_000;

/// A group can go from one to another and on to a third while a fourth, which has no part in that, has not flipped.
pub(crate) const SITES: [SiteId; 4] = [SiteId(1), SiteId(2), SiteId(3), SiteId(4)];

/// What happens.
#[derive(Debug)]
pub(crate) enum Happening {
    AgentStart(SiteId),
    AgentInput(SiteId, u32, Input),
    AgentTimer(SiteId, u32),
    /// Behind all that an agent which was stopped finds when it wakes.
    AgentSettle(SiteId, u32),
    SwitchConnect(SiteId, u32),
    ToSwitch(SiteId, u64, u32, Message),
    FromSwitch(SiteId, u64, u32, Message),
    SwitchTimer(SiteId, u32),
    /// As that, when the agent was stopped: what has come counts before time does.
    SwitchTimerLate(SiteId, u32),
    TurnEnds(SiteId, Part),
    SwitchWakes(SiteId),
    Settled(SiteId, u64, u64),
    WorkerStart(SiteId, WorkerId),
    WorkerConnect(SiteId, u32, WorkerId),
    WorkerTurn(SiteId, WorkerId, u64),
    Asked(SiteId, WorkerId, u64, Request),
    Said(SiteId, WorkerId, u64, Event),
    ToWorker(SiteId, WorkerId, u64, Vec<u8>),
    FromWorker(SiteId, WorkerId, Vec<u8>),
    Tunnel {
        from: SiteId,
        to: SiteId,
        key: u64,
        frame: Vec<u8>,
    },
    LinkDial(Dial),
    LinkUp(Dial, u32),
    LinkIdle(SiteId, SiteId, u64),
    /// With when it began to wait for a connection.
    StreamOpen(MoveId, u64, u64),
    StreamBroken(MoveId),
    ToTarget(MoveId, u64, ToTarget),
    ToSource(MoveId, u64, ToSource),
    Propose(Box<Asked>),
    Commit(u64),
    LeaderChange,
    Retry(u64),
    Watch(SiteId, u32),
    Report(SiteId),
    Brain,
    Operator,
    Client(usize),
    Server(usize),
    Roam(usize),
    Fault(Fault),
    Heal(Fault),
    StreamIdle(MoveId, u64),
    Elastic(SiteId),
    AskStats(SiteId),
    FailOver(SiteId),
}

/// Queues that keep the order of what is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Queue {
    Tunnel(SiteId, SiteId),
    ToWorker(SiteId, WorkerId),
    FromWorker(SiteId, WorkerId),
    Asked(SiteId, WorkerId),
    Said(SiteId, WorkerId),
    ToSwitch(SiteId),
    FromSwitch(SiteId),
    ToTarget(MoveId, u64),
    ToSource(MoveId, u64),
    Watch(SiteId),
    Commit,
}

pub(crate) struct Process {
    pub(crate) worker: Worker<Vec<u8>>,
    pub(crate) boot: u64,
    /// What the switch has delivered and the process has not taken.
    pub(crate) socket: Vec<Vec<u8>>,
    pub(crate) turn_at: u64,
    pub(crate) status: BTreeMap<GroupId, GroupStatus>,
    /// Of these, what it serves.
    pub(crate) serving: Vec<GroupId>,
}

/// A worker's place: the process, if it runs, and the agent's connection to it (0: none).
#[derive(Default)]
pub(crate) struct Place {
    pub(crate) process: Option<Process>,
    pub(crate) connection: u64,
    /// The process does nothing until then.
    pub(crate) stopped_until: u64,
    /// Each of its turns takes long until then.
    pub(crate) slow_until: u64,
    /// It is there because of the load, and may be ended when it is empty.
    pub(crate) extra: bool,
}

pub(crate) struct Life {
    pub(crate) agent: Agent,
    pub(crate) driver: Driver,
    /// Which start of the agent this is.
    pub(crate) number: u32,
    /// The connection to the switch (0: none), and since when it is there.
    pub(crate) connection: u64,
    pub(crate) connected_at: u64,
    /// Before the next attempt to connect to the switch.
    pub(crate) pause: u64,
    pub(crate) switch_timer_at: u64,
    pub(crate) timer_at: u64,
    pub(crate) watched: usize,
    pub(crate) fresh: bool,
    /// It is stopped, and the answer that it had asked for waits for it until then: the next one it has to ask for.
    pub(crate) answered_until: u64,
    /// It wants an answer, be there news or not.
    pub(crate) catches_up: bool,
}

#[derive(Default)]
pub(crate) struct SiteState {
    pub(crate) life: Option<Life>,
    pub(crate) lives: u32,
    pub(crate) switch: Switch,
    pub(crate) workers: BTreeMap<WorkerId, Place>,
    /// Placement is not reached until then.
    pub(crate) cut_off_until: u64,
    /// The agent does nothing until then.
    pub(crate) stopped_until: u64,
    /// Each of its turns takes long until then.
    pub(crate) slow_until: u64,
    /// Nobody listens at the switch's control socket until then.
    pub(crate) unreachable_until: u64,
    /// Connections to the switch of which nothing arrives any more.
    pub(crate) severed: BTreeSet<u64>,
    /// The switch lost its rules, and does not follow the agent's yet.
    pub(crate) forgetful: bool,
    /// Since when nothing arrives on the connection to the switch, though it has not ended.
    pub(crate) muted_at: Option<u64>,
    /// The switch did not follow its agent for longer than old owners relay, and does not yet: by its own rules it may send to those who
    /// have forgotten.
    pub(crate) outdated: bool,
    /// Gone for good.
    pub(crate) lost: bool,
}

/// A stream that is open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub(crate) number: u64,
    /// The connection that it is of.
    pub(crate) link: u64,
    /// The target agent's life.
    pub(crate) life: u32,
}

/// A stream of a move, from source to target.
pub(crate) struct Stream {
    pub(crate) from: SiteId,
    pub(crate) to: SiteId,
    /// The source agent's life.
    pub(crate) life: u32,
    pub(crate) open: Option<Open>,
    /// The attempt to open it that counts.
    pub(crate) attempt: u64,
    /// Nothing arrives before.
    pub(crate) stalled_until: u64,
    /// The copy that was offered last.
    pub(crate) session: u64,
    /// Chunks of it of which the source knows that they are installed.
    pub(crate) acked: u64,
    /// Records of each that is sent and not acknowledged.
    pub(crate) under_way: VecDeque<u64>,
}

/// What makes runs differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Tunnels lose and reorder.
    pub(crate) lossy: bool,
    /// Faults happen.
    pub(crate) faults: bool,
    /// Workers hold few packets.
    pub(crate) tight: bool,
    /// Print what happens.
    pub(crate) trace: bool,
}

impl Mode {
    /// Packets and bytes that a worker may hold.
    pub(crate) fn hold_max(self) -> (usize, usize) {
        if self.tight { (12, 1_000) } else { (4_096, 1 << 20) }
    }
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Seeded,
    pub(crate) mode: Mode,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) schedule: Schedule<Happening>,
    queues: BTreeMap<Queue, u64>,
    pub(crate) sites: BTreeMap<SiteId, SiteState>,
    pub(crate) links: BTreeMap<(SiteId, SiteId), Link>,
    pub(crate) streams: BTreeMap<MoveId, Stream>,
    pub(crate) counts: Counts,
    /// What was found where nothing can be returned.
    pub(crate) found: Option<Violation>,
    /// When it is looked next at what waits in workers.
    delays_at: u64,
    pub(crate) delays: BTreeMap<(SiteId, SiteId), u64>,
    pub(crate) burst_until: u64,
    pub(crate) log: Log,
    pub(crate) services: BTreeMap<ServiceId, NatSlices>,
    pub(crate) traffic: Traffic,
    pub(crate) plan: Plan,
    pub(crate) checks: Checks,
    /// The operator acts and faults happen until then.
    pub(crate) busy_until: u64,
    pub(crate) counter: u64,
    pub(crate) excuses: Excuses,
    /// Sites whose lease ended: moves do not wait for their markers, so order is not kept for what enters there.
    pub(crate) dead_once: BTreeSet<SiteId>,
}

/// What broke which rule.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) invariant: u8,
    pub(crate) what: String,
}

impl Violation {
    pub(crate) fn new(invariant: u8, what: impl Into<String>) -> Self {
        Self { invariant, what: what.into() }
    }
}

pub(crate) type Checked = Result<(), Violation>;

impl World {
    pub(crate) fn new(seed: u64, mode: Mode, mutation: Option<Mutation>) -> Self {
        let mut rng = Seeded::new(seed ^ 0x6c69_6d6f_7361);
        let mut delays = BTreeMap::new();
        for a in SITES {
            for b in SITES.into_iter().filter(|b| *b > a) {
                let delay = 500 + rng.log_uniform(30_000);
                delays.insert((a, b), delay);
                delays.insert((b, a), delay);
            }
        }
        let plan = Plan::new(seed, mode, &mut rng);
        let mut world = Self {
            now: 0,
            mode,
            mutation,
            schedule: Schedule::default(),
            queues: BTreeMap::new(),
            sites: SITES.into_iter().map(|site| (site, SiteState::default())).collect(),
            links: BTreeMap::new(),
            streams: BTreeMap::new(),
            counts: Counts::default(),
            found: None,
            delays_at: 0,
            delays,
            burst_until: 0,
            log: Log::new([0, 30, 300][(seed % 3) as usize]),
            services: crate::log::services(),
            traffic: Traffic::default(),
            plan,
            checks: Checks::default(),
            busy_until: 0,
            counter: 0,
            excuses: Excuses::default(),
            dead_once: BTreeSet::new(),
            rng,
        };
        world.start();
        world
    }

    fn start(&mut self) {
        for site in SITES {
            for worker in 0..2 + u16::from(site == SiteId(2)) {
                self.sites.entry(site).or_default().workers.insert(WorkerId(worker), Place::default());
                self.after(0, Happening::WorkerStart(site, WorkerId(worker)));
            }
            self.after(100, Happening::AgentStart(site));
            self.after(1_000, Happening::Report(site));
            self.after(150_000, Happening::Elastic(site));
            self.after(500_000, Happening::AskStats(site));
        }
        self.after(50_000, Happening::Brain);
    }

    pub(crate) fn micros(&self) -> Micros {
        Micros(self.now)
    }

    pub(crate) fn after(&mut self, delay: u64, what: Happening) {
        self.schedule.at(self.now + delay, what);
    }

    /// As [`Self::after`], but never before what was put into the queue earlier.
    pub(crate) fn in_order(&mut self, queue: Queue, delay: u64, what: Happening) {
        let last = self.queues.entry(queue).or_default();
        *last = (*last).max(self.now + delay);
        self.schedule.at(*last, what);
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.rng.below(high - low + 1)
    }

    /// One in so many.
    pub(crate) fn one_in(&mut self, many: u64) -> bool {
        self.rng.below(many) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.below(from.len() as u64) as usize]
    }

    pub(crate) fn trace(&self, what: impl FnOnce() -> String) {
        if self.mode.trace {
            eprintln!("{:>12} {}", self.now, what());
        }
    }

    /// One-way delay of the underlay, with what a burst adds.
    pub(crate) fn delay(&mut self, from: SiteId, to: SiteId) -> u64 {
        let base = self.delays.get(&(from, to)).copied().unwrap_or(200);
        let burst = if self.now < self.burst_until { self.between(0, 60_000) } else { 0 };
        base + self.between(0, base / 8) + burst
    }

    pub(crate) fn propose(&mut self, actor: &str, command: Command, origin: Option<(SiteId, u32)>) {
        let proposal = Proposal { actor: actor.to_owned(), at_ms: self.now / 1_000, command };
        let ticket = self.number();
        self.log.tickets.insert(ticket, crate::log::Ticket { proposal, origin, tries: 0 });
        self.submit(ticket);
    }

    /// Runs until the end of the seed, then checks what is left behind.
    pub(crate) fn run(&mut self) -> Checked {
        self.converge(20_000_000, "the start")?;
        self.busy_until = self.now + 2_500_000 + self.rng.below(2_500_000);
        self.start_traffic();
        self.after(50_000, Happening::Operator);
        self.run_until(self.busy_until)?;
        self.heal();
        self.converge(60_000_000, "healing")?;
        self.traffic.stopped = true;
        let quiet = self.now + 9_000_000;
        self.run_until(quiet)?;
        // The workers may still be spreading their groups, and each such move leaves a tombstone for a while.
        for _ in 0..8 {
            self.converge(20_000_000, "the end")?;
            if self.check_end().is_ok() {
                return Ok(());
            }
            let later = self.now + 3_000_000;
            self.run_until(later)?;
        }
        self.check_end()
    }

    fn converge(&mut self, most: u64, after: &str) -> Checked {
        let until = self.now + most;
        let mut next = self.now;
        while self.now < until {
            next += 50_000;
            self.run_until(next)?;
            if self.unsettled().is_none() {
                return Ok(());
            }
        }
        let what = self.unsettled().unwrap_or_default();
        Err(Violation::new(8, format!("{} s after {after}: {what}", most / 1_000_000)))
    }

    fn run_until(&mut self, until: u64) -> Checked {
        // What lies beyond stays where it is: put back, it would come after others of the same time.
        while self.schedule.next_at().is_some_and(|at| at <= until)
            && let Some((at, happening)) = self.schedule.pop()
        {
            self.now = at;
            self.happen(happening)?;
        }
        self.now = until;
        Ok(())
    }

    fn happen(&mut self, what: Happening) -> Checked {
        use Happening as H;
        match what {
            H::AgentStart(site) => self.agent_start(site),
            H::AgentInput(site, life, input) => self.agent_input(site, life, input),
            H::AgentTimer(site, life) => self.agent_timer(site, life),
            H::AgentSettle(site, life) => self.agent_settle(site, life),
            H::SwitchConnect(site, life) => self.switch_connect(site, life),
            H::ToSwitch(site, connection, xid, message) => self.to_switch(site, connection, xid, message)?,
            H::FromSwitch(site, connection, xid, message) => self.from_switch(site, connection, xid, message),
            H::SwitchTimer(site, life) => self.switch_timer(site, life),
            H::SwitchTimerLate(site, life) => self.after(0, H::SwitchTimer(site, life)),
            H::TurnEnds(site, part) => self.turn_ends(site, part),
            H::SwitchWakes(site) => self.switch_wakes(site)?,
            H::Settled(site, connection, number) => self.settled(site, connection, number),
            H::WorkerStart(site, worker) => self.worker_start(site, worker),
            H::WorkerConnect(site, life, worker) => self.worker_connect(site, life, worker),
            H::WorkerTurn(site, worker, boot) => self.worker_timer(site, worker, boot)?,
            H::Asked(site, worker, connection, request) => self.asked(site, worker, connection, request)?,
            H::Said(site, worker, connection, event) => self.said(site, worker, connection, event),
            H::ToWorker(site, worker, boot, frame) => self.to_worker(site, worker, boot, frame)?,
            H::FromWorker(site, worker, frame) => self.switch(site, Ports::worker(worker), 0, &frame)?,
            H::Tunnel { from, to, key, frame } => self.tunnel_arrives(from, to, key, &frame)?,
            H::LinkDial(dial) => self.link_dial(dial),
            H::LinkUp(dial, peer) => self.link_up(dial, peer),
            H::LinkIdle(from, to, number) => self.link_ends(from, to, number),
            H::StreamOpen(id, number, since) => self.stream_open(id, number, since),
            H::StreamBroken(id) => self.stream_broken(id),
            H::ToTarget(id, number, message) => self.to_target(id, number, message),
            H::ToSource(id, number, message) => self.to_source(id, number, message),
            H::Propose(asked) => self.proposed(*asked),
            H::Commit(number) => self.commit(number)?,
            H::LeaderChange => {
                self.leader_change();
            }
            H::Retry(ticket) => self.retry(ticket),
            H::Watch(site, life) => self.watch(site, life),
            H::Report(site) => self.report(site),
            H::Brain => self.brain(),
            H::Operator => self.operator(),
            H::Client(flow) => self.client_sends(flow)?,
            H::Server(flow) => self.server_sends(flow)?,
            H::Roam(flow) => self.roam(flow),
            H::StreamIdle(id, number) => self.stream_idle(id, number),
            H::Elastic(site) => self.elastic(site),
            H::AskStats(site) => self.ask_stats(site),
            H::FailOver(site) => self.fail_over(site),
            H::Fault(fault) => self.strike(fault),
            H::Heal(fault) => self.recover(fault),
        }
        self.notice_phases();
        if self.now >= self.delays_at {
            self.delays_at = self.now + DELAYS_INTERVAL;
            self.checks.delays.check(self.now)?;
        }
        self.found.take().map_or(Ok(()), Err)
    }
}
