//! The driver of one switch: turns a wanted set of rules into the fewest changes, as atomic bundles, and says
//! when they are in force.
//!
//! Sans-IO. The caller reports with `handle_*` ([`Driver::handle_connected`], [`Driver::handle_disconnected`],
//! [`Driver::handle_message`], [`Driver::handle_settled`], [`Driver::handle_timeout`]), commands with
//! [`Driver::set_rules`], [`Driver::packet_out`] and [`Driver::query`], and after each of them drains
//! [`Driver::poll_output`] and looks at [`Driver::poll_timeout`].
//!
//! ```text
//! Disconnected ── hello, features ── Reading ── Idle ── Adding ── Committing ── Settling ── Idle
//!                                      ^                 │ error: discard
//!                                      └─────────────────┴── Failed, retried later
//! ```
//!
//! A bundle commits only if every change was accepted: Open vSwitch applies the rest of a bundle of which a
//! change was refused. And an answered barrier does not mean that its datapath cache follows the new rules:
//! so the driver settles the datapath before it says that a rule is in force, as [`Proof`] says.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use flow::Micros;

use super::rules::{Action, FlowMod, Match, PacketOut, PortNo, Rule, RuleKey, RuleSet, apply, diff};
use crate::ofp::{
    BUNDLE_ATOMIC, BUNDLE_ORDERED, BundleControl, Command, FlowModMsg, FlowQuery, FlowStats, Message,
    PortStats, Reply, Request, TableStats,
};

/// How long the switch may be silent while it owes an answer. A bundle of 100,000 rules takes below a second.
const ANSWER_TIMEOUT: Micros = Micros(10_000_000);
/// How long a quiet connection is trusted before the switch is asked whether it is there: an echo costs it microseconds,
/// and a switch that hangs is to be known within two seconds.
const ECHO_INTERVAL: Micros = Micros(500_000);
/// How long an echo may be unanswered before the switch counts as silent. The main thread of `ovs-vswitchd` answers it
/// between other work, of which a bundle of 100,000 rules is the longest and takes below a second. Nothing but the
/// event comes of it: the connection is given up much later, since a new one costs all rules to be read.
const ECHO_BOUND: Micros = Micros(1_000_000);
/// How long nothing is heard of a switch before [`Event::Silent`] says so.
pub const SILENCE_BOUND: Micros = Micros(ECHO_INTERVAL.0 + ECHO_BOUND.0);
/// When a refused set of rules is tried again, with the switch's rules read anew.
const RETRY_DELAY: Micros = Micros(1_000_000);
/// Packets that wait for rules; more are dropped, the newest first, and reported.
const PACKETS_MAX: usize = 65_536;

/// Where the sentinel of [`Proof::Sweeps`] is: a table that nothing leads to.
pub const SENTINEL_SWEEPS: RuleKey = RuleKey { table: 7, priority: 0, matches: Match::ANY };
/// A probe that has not come back is sent again after this.
const PROBE_INTERVAL: Micros = Micros(2_000);
/// When the sentinel changes again if no sweep has ended: the one that its change began may have ended before the daemon was
/// asked. Doubles each time, since each sweep of a full cache costs the daemon dear.
const NUDGE_INTERVAL: Micros = Micros(5_000);
/// When probes that do not come back are given up.
const PROBE_BOUND: Micros = Micros(3_000_000);
/// How often the sentinel changes; see [`Proof::Probe`].
const PROBE_ROUNDS: u8 = 4;

/// A frame of the EtherType for local experiments (IEEE 802, section 9.2.4), as short as Ethernet allows. All are equal,
/// so that the cache has one entry for them.
const PROBE_FRAME: [u8; 60] = {
    let mut frame = [0; 60];
    // Both addresses are locally administered: 02:4c:6d:00:00:03 and :04.
    let head = [0x02, 0x4c, 0x6d, 0, 0, 3, 0x02, 0x4c, 0x6d, 0, 0, 4, 0x88, 0xb5];
    let mut at = 0;
    while at < head.len() {
        frame[at] = head[at];
        at += 1;
    }
    frame
};

/// What proves that the datapath follows the rules.
///
/// Open vSwitch forwards by a cache that revalidator threads sweep after each change of the tables. A sweep that ran
/// when the change came may end without having seen it, so one end of a sweep proves nothing, and the end of a sweep
/// that began after another had ended does. What makes a sweep begin at once is a change: of the *sentinel*, a rule that
/// no packet of a group meets. Without one the daemon sweeps twice a second. The sentinel is the driver's own and never
/// part of a difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proof {
    /// The barrier: there is no cache. The caller is asked to settle once, and may say at once that it is done.
    #[default]
    Barrier,
    /// The ends of two sweeps, one after the other. The caller is asked to settle twice, and says each time when a sweep
    /// has ended that had not when it was asked; meanwhile the sentinel changes, so that there is one soon.
    Sweeps,
    /// Packets: each leaves by one port and comes in by another, through the cache, to a sentinel that sends it to the
    /// controller with its cookie. Four cookies, each set when the one before was seen: the first fills the cache, and the
    /// sweep that brought the fourth began after the one that brought the third, so the one that brought the third has
    /// ended, and it began after the one that brought the second, which came after the rules.
    Probe {
        /// Where probes leave.
        out: PortNo,
        /// Where they come in: the other end of the same link.
        back: PortNo,
    },
}

impl Proof {
    /// The rule that the driver keeps for itself.
    #[must_use]
    pub fn sentinel(self) -> Option<RuleKey> {
        match self {
            Self::Barrier => None,
            Self::Sweeps => Some(SENTINEL_SWEEPS),
            Self::Probe { back, .. } => {
                Some(RuleKey { table: 0, priority: u16::MAX, matches: Match::any().in_port(back) })
            }
        }
    }
}

/// What a caller asks for; answered by [`Event::Answer`] with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryId(pub u64);

/// Which statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// Counters of all ports.
    Ports,
    /// All rules with counters.
    Flows,
    /// Counters of all tables.
    Tables,
}

/// Statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Counters of all ports.
    Ports(Vec<PortStats>),
    /// All rules with counters.
    Flows(Vec<FlowStats>),
    /// Counters of all tables.
    Tables(Vec<TableStats>),
    /// The switch has again what is wanted; so many rules were not.
    Resynced(usize),
    /// The connection ended, or the switch refused.
    Unavailable,
}

/// What went wrong at the switch. The driver goes on; the caller tells people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The switch refused a change, so none of the set was applied. It is tried again every second, with the
    /// switch's rules read anew, and at once when the caller sets other rules.
    #[error("the switch refused rules {tag} with error type {kind} code {code}: nothing was changed")]
    RulesRefused {
        /// Of the refused set.
        tag: u64,
        /// OpenFlow error type.
        kind: u16,
        /// Code of the type.
        code: u16,
    },
    /// The switch refused something else, a packet for example.
    #[error("the switch refused a message with error type {kind} code {code}")]
    Refused {
        /// OpenFlow error type.
        kind: u16,
        /// Code of the type.
        code: u16,
    },
    /// More packets wait than are kept. Send them again when rules are in force.
    #[error("{0} packets were not sent: too many wait for rules")]
    PacketsDropped(usize),
    /// The peer does not speak OpenFlow 1.4. The connection is closed and tried again.
    #[error("the switch does not speak OpenFlow 1.4; its hello has version {0}")]
    Version(u8),
    /// Probes do not come back, so the rules count as in force without proof. Look at the two ports of the probe.
    #[error("probes from port {out} do not come in by port {back}: rules count as in force without proof")]
    ProbeLost {
        /// Where probes leave.
        out: PortNo,
        /// Where they should come in.
        back: PortNo,
    },
    /// The switch does not answer. The connection is closed and tried again.
    #[error("the switch did not answer for {} s", .0.0 / 1_000_000)]
    Silent(Micros),
}

/// What the caller should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The switch is there and its rules are read. Packets sent before are not known to have arrived.
    Connected {
        /// Datapath id.
        datapath: u64,
        /// Rules that it had.
        rules: usize,
    },
    /// The switch is gone; it keeps its rules.
    Disconnected,
    /// Nothing was heard of a connected switch for so long, though it was asked. Told at [`SILENCE_BOUND`], and again twice a
    /// second until [`Event::Answering`] or [`Event::Disconnected`].
    Silent(Micros),
    /// A switch that was silent is heard again.
    Answering,
    /// The datapath follows the rules with this tag, and so all that were set before.
    InForce {
        /// As it was set.
        tag: u64,
        /// How many rules had to change.
        changes: usize,
    },
    /// Something was refused.
    Error(DriverError),
    /// Statistics that were asked for.
    Answer(QueryId, Answer),
}

/// What the caller must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this message.
    Send(u32, Message),
    /// Wait until the datapath follows the rules, then call [`Driver::handle_settled`] with the same number.
    Settle(u64),
    /// Close the connection, then call [`Driver::handle_disconnected`].
    Close,
    /// Tell.
    Event(Event),
}

/// A set of rules with its place in the order of commands.
#[derive(Clone, Debug)]
struct Wanted {
    generation: u64,
    tag: u64,
    rules: Arc<RuleSet>,
}

/// A bundle on its way.
#[derive(Clone, Debug)]
struct Flight {
    wanted: Wanted,
    changes: Vec<FlowMod>,
    bundle: u32,
    /// The transaction ids of this bundle are those from here on.
    first_xid: u32,
    /// The answer that is awaited next.
    awaited: u32,
    refused: Option<(u16, u16)>,
}

/// Named after what is awaited.
#[derive(Debug)]
enum State {
    Disconnected,
    Hello,
    Features,
    /// The parts of the rule list. The datapath id is there when the connection is new.
    Reading {
        xid: u32,
        rules: RuleSet,
        datapath: Option<u64>,
    },
    Idle,
    /// The barrier behind the changes.
    Adding(Flight),
    /// The answer to the commit, or to the discard.
    Committing(Flight),
    /// The barrier behind the commit.
    Committed(Flight),
    /// The proof that the datapath follows.
    Settling {
        wanted: Wanted,
        changes: usize,
        step: Step,
    },
    /// Time.
    Failed {
        retry_at: Micros,
    },
}

/// What the proof awaits.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The caller's word for a number.
    Word { number: u64, last: bool, nudge: Option<Nudge> },
    /// A probe with the sentinel's present cookie, and after it `left` changes of it.
    Probe { left: u8, resend_at: Micros, give_up_at: Micros },
}

/// When the sentinel changes again.
#[derive(Clone, Copy, Debug)]
struct Nudge {
    at: Micros,
    next: Micros,
}

#[derive(Debug)]
struct Asked {
    id: QueryId,
    answer: Answer,
}

/// See the module.
#[derive(Debug)]
pub struct Driver {
    proof: Proof,
    /// The sentinel's cookie: grows with each change, also over connections.
    sentinel: u64,
    /// Who waits for the switch's rules to be read anew.
    resyncs: Vec<QueryId>,
    /// They were read after all of `resyncs` had asked.
    reread: bool,
    state: State,
    /// The rules that the switch is known to have.
    present: RuleSet,
    /// The newest that are wanted and not on their way.
    wanted: Option<Wanted>,
    /// What was wanted last, whether or not it is in force: a new connection compares with it.
    newest: Option<Wanted>,
    /// Number of the last command that set rules.
    generation: u64,
    /// The last of them in force on this connection.
    in_force: u64,
    packets: VecDeque<(u64, PacketOut)>,
    queries: BTreeMap<u32, Asked>,
    outputs: VecDeque<Output>,
    next_xid: u32,
    next_bundle: u32,
    next_settle: u64,
    heard_at: Micros,
    /// Since when the switch owes an answer, if it does.
    owes_since: Micros,
    /// When it was asked whether it is there, if nothing was heard since.
    echo_at: Option<Micros>,
    /// When it was last said to be silent, if it still is.
    silent_at: Option<Micros>,
}

impl Default for Driver {
    fn default() -> Self {
        Self {
            proof: Proof::Barrier,
            sentinel: 0,
            resyncs: Vec::new(),
            reread: false,
            state: State::Disconnected,
            present: RuleSet::new(),
            wanted: None,
            newest: None,
            generation: 0,
            in_force: 0,
            packets: VecDeque::new(),
            queries: BTreeMap::new(),
            outputs: VecDeque::new(),
            next_xid: 1,
            next_bundle: 1,
            next_settle: 0,
            heard_at: Micros(0),
            owes_since: Micros(0),
            echo_at: None,
            silent_at: None,
        }
    }
}

impl Driver {
    /// A driver of a switch of which rules are in force as `proof` says.
    #[must_use]
    pub fn new(proof: Proof) -> Self {
        Self { proof, ..Self::default() }
    }

    /// What to do next, if anything.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Driver::handle_timeout`] at the latest.
    #[must_use]
    #[expect(clippy::wildcard_enum_match_arm, reason = "every other state waits for the switch")]
    pub fn poll_timeout(&self) -> Option<Micros> {
        match self.state {
            State::Disconnected => None,
            State::Failed { retry_at } => Some(retry_at.min(self.silence_due())),
            State::Settling { step: Step::Word { nudge: Some(Nudge { at, .. }), .. }, .. } => {
                Some(at.min(self.silence_due()))
            }
            State::Settling { step: Step::Probe { resend_at, .. }, .. } => {
                Some(resend_at.min(self.silence_due()))
            }
            _ => Some(self.silence_due()),
        }
    }

    /// Sets the whole set of wanted rules. Sets that are not yet on their way are replaced.
    pub fn set_rules(&mut self, rules: Arc<RuleSet>, tag: u64, now: Micros) {
        self.generation += 1;
        let wanted = Wanted { generation: self.generation, tag, rules };
        self.newest = Some(wanted.clone());
        self.wanted = Some(wanted);
        if matches!(self.state, State::Failed { .. }) {
            self.read_rules(None, now);
        }
        self.advance(now);
    }

    /// Sends packets once the rules that were set before are in force, in order.
    pub fn packet_out(&mut self, packets: Vec<PacketOut>, now: Micros) {
        let room = PACKETS_MAX - self.packets.len();
        if packets.len() > room {
            self.event(Event::Error(DriverError::PacketsDropped(packets.len() - room)));
        }
        let generation = self.generation;
        self.packets.extend(packets.into_iter().take(room).map(|packet| (generation, packet)));
        self.advance(now);
    }

    /// Asks for statistics.
    pub fn query(&mut self, id: QueryId, query: Query) {
        if matches!(self.state, State::Disconnected | State::Hello | State::Features) {
            return self.event(Event::Answer(id, Answer::Unavailable));
        }
        let (request, answer) = match query {
            Query::Ports => (Request::PortStats(PortNo::ANY), Answer::Ports(Vec::new())),
            Query::Flows => (Request::Flows(FlowQuery::default()), Answer::Flows(Vec::new())),
            Query::Tables => (Request::Tables, Answer::Tables(Vec::new())),
        };
        let xid = self.send(Message::MultipartRequest(request));
        self.queries.insert(xid, Asked { id, answer });
    }

    /// Reads the switch's rules anew and mends what is not as wanted; answered by [`Answer::Resynced`] when that is in
    /// force.
    pub fn resync(&mut self, id: QueryId, now: Micros) {
        if matches!(self.state, State::Disconnected) || self.newest.is_none() {
            return self.event(Event::Answer(id, Answer::Unavailable));
        }
        self.resyncs.push(id);
        self.reread = false;
        self.advance(now);
    }

    /// A connection is there.
    pub fn handle_connected(&mut self, now: Micros) {
        self.heard_at = now;
        self.owes_since = now;
        self.echo_at = None;
        self.silent_at = None;
        self.send(Message::hello());
        self.state = State::Hello;
    }

    /// The connection is gone. Rules and packets that wait are kept for the next one.
    pub fn handle_disconnected(&mut self) {
        if matches!(self.state, State::Disconnected) {
            return;
        }
        let was_up = !matches!(self.state, State::Hello | State::Features);
        self.state = State::Disconnected;
        // What waited to be sent to this connection must not reach the next.
        self.outputs.retain(|output| matches!(output, Output::Event(_)));
        for asked in std::mem::take(&mut self.queries).into_values() {
            self.event(Event::Answer(asked.id, Answer::Unavailable));
        }
        self.answer_resyncs(&Answer::Unavailable);
        self.in_force = 0;
        self.silent_at = None;
        self.wanted.clone_from(&self.newest);
        if was_up {
            self.event(Event::Disconnected);
        }
    }

    /// What was asked for with [`Output::Settle`] is so. Numbers that are not awaited are ignored.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "in every other state nothing is awaited of the caller"
    )]
    pub fn handle_settled(&mut self, number: u64, now: Micros) {
        match self.state {
            State::Settling { step: Step::Word { number: awaited, last, .. }, .. } if awaited == number => {
                if last {
                    return self.proven(now);
                }
                let step = self.ask_word(true, now);
                self.step(step);
            }
            _ => {}
        }
    }

    /// The rules on which the proof was made are in force.
    fn proven(&mut self, now: Micros) {
        let State::Settling { wanted, changes, .. } = &self.state else { return };
        let (tag, changes) = (wanted.tag, *changes);
        self.in_force = wanted.generation;
        self.state = State::Idle;
        self.event(Event::InForce { tag, changes });
        if self.reread {
            self.answer_resyncs(&Answer::Resynced(changes));
        }
        self.advance(now);
    }

    fn answer_resyncs(&mut self, answer: &Answer) {
        for id in std::mem::take(&mut self.resyncs) {
            self.event(Event::Answer(id, answer.clone()));
        }
    }

    fn step(&mut self, next: Step) {
        if let State::Settling { step, .. } = &mut self.state {
            *step = next;
        }
    }

    fn change_sentinel(&mut self, actions: Vec<Action>) {
        let Some(key) = self.proof.sentinel() else { return };
        self.sentinel = self.sentinel.wrapping_add(1);
        let rule = Rule { cookie: self.sentinel, actions, goto: None };
        self.send(Message::FlowMod(FlowModMsg::new(Command::Add, key, rule)));
    }

    fn probe_round(&mut self, left: u8, now: Micros) {
        self.change_sentinel(vec![Action::Output(PortNo::CONTROLLER)]);
        self.step(Step::Probe {
            left,
            resend_at: now.plus(PROBE_INTERVAL),
            give_up_at: now.plus(PROBE_BOUND),
        });
        self.send_probe();
    }

    fn send_probe(&mut self) {
        let Proof::Probe { out, .. } = self.proof else { return };
        let packet = PacketOut {
            bytes: PROBE_FRAME.to_vec(),
            in_port: PortNo::CONTROLLER,
            actions: vec![Action::Output(out)],
        };
        self.send(Message::PacketOut(packet));
    }

    fn probe_seen(&mut self, cookie: u64, frame: &[u8], now: Micros) {
        let State::Settling { step: Step::Probe { left, .. }, .. } = self.state else { return };
        // Another frame that came in there has a place of its own in the cache, and proves nothing.
        if cookie != self.sentinel || !frame.starts_with(&PROBE_FRAME[..14]) {
            return;
        }
        match left.checked_sub(1) {
            Some(left) => self.probe_round(left, now),
            None => self.proven(now),
        }
    }

    fn probe_timeout(&mut self, now: Micros) {
        let State::Settling { step: Step::Probe { left, resend_at, give_up_at }, .. } = self.state else {
            return;
        };
        if give_up_at <= now {
            if let Proof::Probe { out, back } = self.proof {
                self.event(Event::Error(DriverError::ProbeLost { out, back }));
            }
            self.proven(now);
        } else if resend_at <= now {
            self.step(Step::Probe { left, resend_at: now.plus(PROBE_INTERVAL), give_up_at });
            self.send_probe();
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Micros) {
        if let State::Failed { retry_at } = self.state
            && retry_at <= now
        {
            if self.wanted.is_none() {
                self.wanted.clone_from(&self.newest);
            }
            self.read_rules(None, now);
        }
        self.nudge(now);
        self.probe_timeout(now);
        if !matches!(self.state, State::Disconnected) && now >= self.silence_due() {
            self.silence(now);
        }
    }

    /// Asks a quiet switch whether it is there, says that it is silent, and gives it up.
    fn silence(&mut self, now: Micros) {
        if self.given_up_at().is_some_and(|at| at <= now) {
            self.event(Event::Error(DriverError::Silent(now.since(self.heard_at))));
            self.outputs.push_back(Output::Close);
            // Once is enough.
            self.owes_since = now;
            self.echo_at = self.echo_at.map(|_| now);
        } else if self.echo_at.is_some() {
            self.silent_at = Some(now);
            self.event(Event::Silent(now.since(self.heard_at)));
        } else {
            self.echo_at = Some(now);
            self.send(Message::EchoRequest(Vec::new()));
        }
    }

    fn heard(&mut self, now: Micros) {
        self.heard_at = now;
        self.echo_at = None;
        if self.silent_at.take().is_some() {
            self.event(Event::Answering);
        }
    }

    /// A message from the switch.
    #[expect(clippy::wildcard_enum_match_arm, reason = "what is not awaited is ignored, whatever it is")]
    pub fn handle_message(&mut self, xid: u32, message: Message, now: Micros) {
        self.heard(now);
        match message {
            Message::EchoRequest(data) => self.outputs.push_back(Output::Send(xid, Message::EchoReply(data))),
            Message::Hello { version, versions } => self.hello(version, versions),
            Message::FeaturesReply { datapath, .. } if matches!(self.state, State::Features) => {
                if matches!(self.proof, Proof::Probe { .. }) {
                    // Without a length of its own Open vSwitch sends no packets to controllers that it did not call.
                    self.send(Message::SetConfig(0, PROBE_FRAME.len() as u16));
                }
                self.read_rules(Some(datapath), now);
            }
            Message::PacketIn(packet) => self.probe_seen(packet.cookie, &packet.bytes, now),
            Message::MultipartReply { reply, more } => self.multipart(xid, reply, more, now),
            Message::BarrierReply => self.barrier(xid, now),
            Message::BundleControl { control: BundleControl::CommitReply, .. } => self.committed(xid),
            Message::BundleControl { control: BundleControl::DiscardReply, .. } => self.discarded(xid, now),
            Message::Error { kind, code, .. } => self.error(xid, kind, code, now),
            _ => {}
        }
    }

    /// The rules that were read cannot be understood: all are replaced. The caller decides this when the
    /// answer to the rule list cannot be decoded.
    pub fn handle_unreadable(&mut self, xid: u32, now: Micros) {
        self.heard(now);
        if let State::Reading { xid: awaited, datapath, .. } = &self.state
            && *awaited == xid
        {
            let datapath = *datapath;
            let unknown = RuleKey { table: FlowModMsg::ALL_TABLES, priority: 0, matches: Match::any() };
            self.rules_known(RuleSet::unit(unknown, Rule::default()), datapath, now);
        }
        if let Some(asked) = self.queries.remove(&xid) {
            self.event(Event::Answer(asked.id, Answer::Unavailable));
        }
    }

    /// When something is to be done about a switch that is not heard. Silence counts from when the switch was asked, so
    /// that a driver that stood still itself does not blame it.
    fn silence_due(&self) -> Micros {
        let given_up = self.given_up_at().unwrap_or(Micros(u64::MAX));
        let next = match (self.is_known(), self.echo_at, self.silent_at) {
            (false, ..) => return given_up,
            (true, None, _) => self.heard_at.plus(ECHO_INTERVAL),
            (true, Some(asked), None) => asked.plus(ECHO_BOUND),
            (true, Some(_), Some(told)) => told.plus(ECHO_INTERVAL),
        };
        next.min(given_up)
    }

    /// When the connection is given up if nothing is heard.
    fn given_up_at(&self) -> Option<Micros> {
        let since = if self.owes_answer() { Some(self.owes_since.max(self.heard_at)) } else { self.echo_at };
        since.map(|since| since.plus(ANSWER_TIMEOUT))
    }

    /// Whether the switch has said who it is: until then there is nobody to be silent.
    fn is_known(&self) -> bool {
        !matches!(self.state, State::Disconnected | State::Hello | State::Features)
    }

    fn owes_answer(&self) -> bool {
        !matches!(
            self.state,
            State::Idle | State::Settling { .. } | State::Failed { .. } | State::Disconnected
        )
    }

    fn event(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    fn send(&mut self, message: Message) -> u32 {
        let xid = self.next_xid;
        self.next_xid = self.next_xid.wrapping_add(1).max(1);
        self.outputs.push_back(Output::Send(xid, message));
        xid
    }

    fn hello(&mut self, version: u8, versions: Option<u32>) {
        if !matches!(self.state, State::Hello) {
            return;
        }
        if Message::speaks_us(version, versions) {
            self.state = State::Features;
            self.send(Message::FeaturesRequest);
        } else {
            self.event(Event::Error(DriverError::Version(version)));
            self.outputs.push_back(Output::Close);
        }
    }

    /// Starts to read the switch's rules.
    fn read_rules(&mut self, datapath: Option<u64>, now: Micros) {
        if !self.owes_answer() {
            // The wait for the answer begins now, not when the switch was last heard.
            self.owes_since = now;
        }
        let xid = self.send(Message::MultipartRequest(Request::Flows(FlowQuery::default())));
        self.state = State::Reading { xid, rules: RuleSet::new(), datapath };
    }

    fn multipart(&mut self, xid: u32, reply: Reply, more: bool, now: Micros) {
        if let Some(asked) = self.queries.get_mut(&xid) {
            match (&mut asked.answer, reply) {
                (Answer::Ports(list), Reply::PortStats(part)) => list.extend(part),
                (Answer::Flows(list), Reply::Flows(part)) => list.extend(part),
                (Answer::Tables(list), Reply::Tables(part)) => list.extend(part),
                _ => {}
            }
            if !more && let Some(Asked { id, answer }) = self.queries.remove(&xid) {
                self.event(Event::Answer(id, answer));
            }
            return;
        }
        let State::Reading { xid: awaited, rules, datapath } = &mut self.state else { return };
        let Reply::Flows(part) = reply else { return };
        if *awaited != xid {
            return;
        }
        rules.extend(part.into_iter().map(|flow| (flow.key, flow.rule)));
        if !more {
            let (rules, datapath) = (std::mem::take(rules), *datapath);
            self.rules_known(rules, datapath, now);
        }
    }

    fn rules_known(&mut self, mut rules: RuleSet, datapath: Option<u64>, now: Micros) {
        if let Some(rule) = self.proof.sentinel().and_then(|key| rules.remove(&key)) {
            // A cookie that the cache may still have must not come again.
            self.sentinel = self.sentinel.max(rule.cookie);
        }
        self.present = rules;
        self.state = State::Idle;
        if let Some(datapath) = datapath {
            self.event(Event::Connected { datapath, rules: self.present.len() });
        }
        self.advance(now);
    }

    /// Does what can be done while nothing is on its way: packets first, as far as their rules are in force.
    fn advance(&mut self, now: Micros) {
        if !matches!(self.state, State::Disconnected | State::Hello | State::Features | State::Reading { .. })
        {
            while let Some((_, packet)) =
                self.packets.pop_front_if(|(generation, _)| *generation <= self.in_force)
            {
                self.send(Message::PacketOut(packet));
            }
        }
        if matches!(self.state, State::Idle) && !self.resyncs.is_empty() && !self.reread {
            self.reread = true;
            if self.wanted.is_none() {
                self.wanted.clone_from(&self.newest);
            }
            return self.read_rules(None, now);
        }
        if matches!(self.state, State::Idle)
            && let Some(wanted) = self.wanted.take()
        {
            self.install(wanted, now);
        }
    }

    fn install(&mut self, wanted: Wanted, now: Micros) {
        let unreadable = self.present.keys().any(|key| key.table == FlowModMsg::ALL_TABLES);
        let changes = if unreadable {
            let mut changes = vec![FlowMod::Clear];
            changes.extend(diff(&RuleSet::new(), &wanted.rules));
            changes
        } else {
            diff(&self.present, &wanted.rules)
        };
        self.owes_since = now;
        if changes.is_empty() {
            // What the switch already had may have been set a moment ago by a connection that is gone, so the
            // datapath is settled all the same.
            return self.settle(wanted, 0, now);
        }
        let bundle = self.next_bundle;
        self.next_bundle = self.next_bundle.wrapping_add(1).max(1);
        let first_xid = self.control(bundle, BundleControl::OpenRequest);
        for change in &changes {
            let message = Box::new(Message::FlowMod(flow_mod(change)));
            self.send(Message::BundleAdd { bundle, flags: BUNDLE_ATOMIC | BUNDLE_ORDERED, message });
        }
        let awaited = self.send(Message::BarrierRequest);
        self.state = State::Adding(Flight { wanted, changes, bundle, first_xid, awaited, refused: None });
    }

    fn control(&mut self, bundle: u32, control: BundleControl) -> u32 {
        self.send(Message::BundleControl { bundle, control, flags: BUNDLE_ATOMIC | BUNDLE_ORDERED })
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "every other state stays as it is")]
    fn barrier(&mut self, xid: u32, now: Micros) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Adding(mut flight) if flight.awaited == xid => {
                let control = match flight.refused {
                    None => BundleControl::CommitRequest,
                    Some(_) => BundleControl::DiscardRequest,
                };
                flight.awaited = self.control(flight.bundle, control);
                self.state = State::Committing(flight);
            }
            State::Committed(flight) if flight.awaited == xid => {
                apply(&mut self.present, &flight.changes);
                self.settle(flight.wanted, flight.changes.len(), now);
            }
            other => self.state = other,
        }
    }

    fn settle(&mut self, wanted: Wanted, changes: usize, now: Micros) {
        if matches!(self.proof, Proof::Probe { .. }) {
            let step = Step::Probe { left: 0, resend_at: now, give_up_at: now };
            self.state = State::Settling { wanted, changes, step };
            return self.probe_round(PROBE_ROUNDS - 1, now);
        }
        let step = self.ask_word(self.proof == Proof::Barrier, now);
        self.state = State::Settling { wanted, changes, step };
    }

    fn ask_word(&mut self, last: bool, now: Micros) -> Step {
        self.next_settle += 1;
        let number = self.next_settle;
        self.outputs.push_back(Output::Settle(number));
        let nudge = (self.proof == Proof::Sweeps).then(|| {
            self.change_sentinel(Vec::new());
            Nudge { at: now.plus(NUDGE_INTERVAL), next: Micros(2 * NUDGE_INTERVAL.0) }
        });
        Step::Word { number, last, nudge }
    }

    fn nudge(&mut self, now: Micros) {
        if let State::Settling { step: Step::Word { nudge: Some(nudge), .. }, .. } = &mut self.state
            && nudge.at <= now
        {
            *nudge = Nudge { at: now.plus(nudge.next), next: Micros(2 * nudge.next.0) };
            self.change_sentinel(Vec::new());
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "every other state stays as it is")]
    fn committed(&mut self, xid: u32) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Committing(mut flight) if flight.awaited == xid && flight.refused.is_none() => {
                flight.awaited = self.send(Message::BarrierRequest);
                self.state = State::Committed(flight);
            }
            other => self.state = other,
        }
    }

    fn discarded(&mut self, xid: u32, now: Micros) {
        if matches!(&self.state, State::Committing(flight) if flight.awaited == xid) {
            self.fail(now);
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "in every other state the error is about a packet")]
    fn error(&mut self, xid: u32, kind: u16, code: u16, now: Micros) {
        if let Some(asked) = self.queries.remove(&xid) {
            return self.event(Event::Answer(asked.id, Answer::Unavailable));
        }
        match &mut self.state {
            State::Adding(flight) if in_range(flight, xid) => flight.refused = Some((kind, code)),
            State::Committing(flight) if flight.awaited == xid => {
                // A refused commit changed nothing; a refused discard has nothing to discard.
                flight.refused.get_or_insert((kind, code));
                self.fail(now);
            }
            State::Hello | State::Features | State::Reading { .. } => {
                self.event(Event::Error(DriverError::Refused { kind, code }));
                self.outputs.push_back(Output::Close);
            }
            _ => self.event(Event::Error(DriverError::Refused { kind, code })),
        }
    }

    /// Nothing of the set was applied: tells, and tries again later unless something newer is wanted.
    fn fail(&mut self, now: Micros) {
        let State::Committing(flight) = &self.state else { return };
        let (kind, code) = flight.refused.unwrap_or_default();
        let tag = flight.wanted.tag;
        self.state = State::Failed { retry_at: now.plus(RETRY_DELAY) };
        self.event(Event::Error(DriverError::RulesRefused { tag, kind, code }));
        self.answer_resyncs(&Answer::Unavailable);
        if self.wanted.is_some() {
            self.read_rules(None, now);
        }
    }
}

/// Whether an id is of the bundle's own messages, also when ids wrapped around.
fn in_range(flight: &Flight, xid: u32) -> bool {
    xid.wrapping_sub(flight.first_xid) <= flight.awaited.wrapping_sub(flight.first_xid)
}

fn flow_mod(change: &FlowMod) -> FlowModMsg {
    match change {
        FlowMod::Add(key, rule) => FlowModMsg::new(Command::Add, *key, rule.clone()),
        FlowMod::Delete(key) => FlowModMsg::new(Command::DeleteStrict, *key, Rule::default()),
        FlowMod::Clear => {
            let key = RuleKey { table: FlowModMsg::ALL_TABLES, priority: 0, matches: Match::any() };
            FlowModMsg::new(Command::Delete, key, Rule::default())
        }
    }
}
