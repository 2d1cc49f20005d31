//! The side that gives a group away.
//!
//! ```text
//! Offering ─Accept→ Copying ─small→ (Switch proposed) ─Switching→ Draining ─Cut→ HandedOver ─Ended→ over
//!     └──────── refused or too long: abort is proposed; after Switching: Disarming, then taken back ────┘
//! ```
//!
//! The token goes only to a target that is there: the flip is proposed, and a cut without all markers asked for, when the target
//! was heard of a moment ago. Who stays silent is given up; only a target that may have the token is waited for.

use std::collections::VecDeque;
use std::sync::Arc;

use flow::{Batch, Epoch, Micros, SiteId, Token};

use super::{Ending, Found, MoveSpec, Pace, Proof, ToSource, ToTarget, Waits};

/// Chunks under way when the flip is proposed: more would make the final delta queue behind them.
const BACKLOG_SMALL: usize = 1;
/// Between two rounds while the flip is being committed.
const ROUND_INTERVAL: Micros = Micros(25_000);
/// Between two probes whether the target is there.
const PROBE_INTERVAL: Micros = Micros(250_000);
/// A target is there when it was heard of for so long ago at most: three probes may be lost.
const THERE_BOUND: Micros = Micros(1_000_000);
/// Between two offers to a target that has not heard of the move.
const OFFER_INTERVAL: Micros = Micros(50_000);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceInput {
    /// A connection to the target is there; what was sent before may be lost.
    PeerUp,
    /// It is gone.
    PeerDown,
    /// The target said something.
    Peer(ToSource),
    /// The worker exported records.
    Records(Batch),
    /// The worker finished a round; so many flows are dirty, so many there are.
    RoundEnd {
        /// Dirty flows.
        dirty: u64,
        /// All flows.
        flows: u64,
    },
    /// The worker stopped serving.
    Cut {
        /// The proof of completeness.
        token: Token,
        /// Ingresses whose marker had not come.
        missing: Vec<SiteId>,
    },
    /// The worker stopped serving, and what it exported before was for a copy that was given up.
    CutBefore,
    /// The worker will not cut any more, or had cut.
    Disarmed {
        /// It had cut.
        cut: bool,
        /// And the token, which had not left, was withdrawn.
        withdrawn: bool,
    },
    /// The worker refused what it was asked.
    Refused(String),
    /// The log says: switching.
    Switching {
        /// Whose markers are awaited.
        ingresses: Vec<SiteId>,
        /// When they flip, from now.
        flip_in: Micros,
    },
    /// The log says: over.
    Ended(Ending),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceAction {
    /// Say this to the target.
    Send(ToTarget),
    /// Worker: export everything and track changes.
    CopyStart,
    /// Worker: export what changed.
    CopyRound,
    /// Worker: export no more records than this in all; see [`Source::credit`].
    Credit(u64),
    /// Worker: cut when these ingresses' markers are in, however long that takes.
    Arm(Vec<SiteId>),
    /// Worker: it has cut; export everything once more.
    ArmAgain(Vec<SiteId>),
    /// Worker: cut now, whichever of these markers are missing.
    CutLate(Vec<SiteId>),
    /// Worker: do not cut.
    Disarm,
    /// Worker: do not cut; and if it has, this must never be exported again. The token has not left.
    Withdraw,
    /// Worker: forget the flows, relay for a while.
    Forget,
    /// Worker: serve under this epoch again.
    Serve(Epoch),
    /// Log: commit the flip.
    ProposeSwitch,
    /// Log: abort.
    ProposeAbort(String),
    /// Log: take the group back.
    ProposeTakeBack(Proof),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No full copy has begun in this session.
    Offering,
    /// The worker is exporting a round.
    Copying,
    /// Between two rounds.
    Resting { next_round_at: Micros },
    /// The worker is to cut, or to export once more after the cut.
    Draining,
    /// The token is on its way, or there.
    HandedOver,
    /// The worker was asked not to cut, so that the group can be taken back.
    Disarming { refused: bool },
    /// What is to be proposed was; the log decides.
    Deciding,
    /// The log has spoken.
    Over,
}

/// The machine. One per move at the source's site.
#[derive(Debug)]
pub struct Source {
    spec: MoveSpec,
    waits: Waits,
    pace: Pace,
    state: State,
    session: u64,
    peer: bool,
    accepted: bool,
    /// The worker has cut: its table is frozen, and a new session exports it whole.
    frozen: bool,
    /// The worker died: see [`Found::Lost`].
    lost: bool,
    /// The token may be with the target.
    given: bool,
    switching: Option<Vec<SiteId>>,
    /// When the ingresses flip, or have.
    flip_at: Micros,
    switch_proposed: bool,
    voided: bool,
    /// The target does not take the group, by its own word.
    refused: bool,
    /// Cut without the missing markers then, if the target is there.
    cut_late_at: Option<Micros>,
    flows: u64,
    rounds: u32,
    started_at: Micros,
    /// When the target was heard of last, or the machine was made.
    heard: Micros,
    /// It has been heard of.
    known_there: bool,
    /// The bound for a silent target counts from then at the earliest.
    waiting_since: Micros,
    probe_at: Option<Micros>,
    offer_at: Option<Micros>,
    pending: Batch,
    next_sequence: u64,
    unacked: VecDeque<(u64, Arc<Batch>)>,
    /// Records of this session that the target has.
    installed: u64,
    /// Chunks of the first round of this session: all flows.
    copied: Option<u64>,
    handover: Option<ToTarget>,
    actions: VecDeque<SourceAction>,
}

impl Source {
    /// A machine for a move that the log has in preparation or (then with [`SourceInput::Switching`] to follow) in
    /// switching. `incarnation` differs with every start of the agent, so that sessions of two lives are not taken
    /// for one.
    #[must_use]
    pub fn new(
        spec: MoveSpec,
        waits: Waits,
        pace: Pace,
        incarnation: u32,
        flows: u64,
        found: Found,
        now: Micros,
    ) -> Self {
        Self {
            spec,
            waits,
            pace,
            state: State::Offering,
            session: u64::from(incarnation) << 16,
            peer: false,
            accepted: false,
            frozen: found == Found::Cut,
            lost: found == Found::Lost,
            given: found != Found::Serving,
            switching: None,
            flip_at: now,
            switch_proposed: false,
            voided: false,
            refused: false,
            cut_late_at: None,
            flows,
            rounds: 0,
            started_at: now,
            heard: now,
            known_there: false,
            waiting_since: now,
            probe_at: None,
            offer_at: None,
            pending: Batch::default(),
            next_sequence: 0,
            unacked: VecDeque::new(),
            installed: 0,
            copied: None,
            handover: None,
            actions: VecDeque::new(),
        }
    }

    /// The move.
    #[must_use]
    pub fn spec(&self) -> &MoveSpec {
        &self.spec
    }

    /// Whether the log has spoken; nothing more will come out once the actions are taken.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Takes one input.
    pub fn handle(&mut self, input: SourceInput, now: Micros) {
        if self.state == State::Over {
            return;
        }
        match input {
            SourceInput::PeerUp => self.peer_up(),
            SourceInput::PeerDown => self.peer_down(),
            SourceInput::Peer(message) => self.peer_said(message, now),
            SourceInput::Records(batch) => self.collect(batch),
            SourceInput::RoundEnd { dirty, flows } => self.round_ended(dirty, flows, now),
            SourceInput::Cut { token, missing } => self.cut(token, missing, now),
            SourceInput::CutBefore => self.cut_before(),
            SourceInput::Disarmed { cut, withdrawn } => self.disarmed(cut, withdrawn, now),
            SourceInput::Refused(reason) => self.give_up(&reason, false, now),
            SourceInput::Switching { ingresses, flip_in } => {
                self.switching(ingresses, now.plus(flip_in), now)
            }
            SourceInput::Ended(ending) => self.ended(ending),
        }
        self.cut_late_if_there(now);
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Micros) {
        if let State::Resting { next_round_at } = self.state
            && next_round_at <= now
        {
            self.next_round(now);
        }
        if self.offer_at.is_some_and(|at| at <= now) {
            self.offer();
        }
        if self.probe_at.is_some_and(|at| at <= now) {
            self.probe(now);
        }
        self.cut_late_if_there(now);
        if self.silent_bound().is_some_and(|at| at <= now) {
            self.give_up("the target site was not reachable", false, now);
        }
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        let round =
            if let State::Resting { next_round_at } = self.state { Some(next_round_at) } else { None };
        // A target that is not there is looked at again when it was heard.
        let cut = self.cut_late_at.filter(|at| self.is_there(*at));
        [round, self.offer_at, self.probe_at, cut, self.silent_bound()].into_iter().flatten().min()
    }

    /// How long a target that may have the token has been silent, when that is what the move waits for.
    #[must_use]
    pub fn silent_with_token(&self, now: Micros) -> Option<Micros> {
        let waits = self.given && !matches!(self.state, State::Deciding | State::Over);
        let silent = now.since(self.heard);
        (waits && silent >= self.waits.take_back).then_some(silent)
    }

    /// How long ago the log said that it switches; it has not said yet how that ended.
    #[must_use]
    pub fn switching_for(&self, now: Micros) -> Option<Micros> {
        let switches = self.switching.is_some() && self.state != State::Over;
        switches.then(|| now.since(self.waiting_since))
    }

    /// This site did nothing for so long: the target could not be heard of meanwhile, and is not to blame.
    pub fn stood_still(&mut self, span: Micros) {
        self.heard = self.heard.plus(span);
        self.waiting_since = self.waiting_since.plus(span);
    }

    /// It has proposed to take the group back because the token never left: from then on it never may, whatever becomes of this machine.
    #[must_use]
    pub fn is_voided(&self) -> bool {
        self.voided
    }

    /// The copy in hand: what a worker exports for another is of no use.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }

    /// So many records of this session may be exported in all: those that the target has, and what may be under way. So a target
    /// that is slow, or a path that is, leaves the rest in the worker's table instead of in memory here.
    #[must_use]
    pub fn credit(&self) -> u64 {
        let under_way = self.pace.chunk_records.saturating_mul(self.pace.window_chunks);
        self.installed.saturating_add(under_way as u64)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When a target that is silent is given up; never once it may have the token.
    fn silent_bound(&self) -> Option<Micros> {
        match self.state {
            State::Disarming { .. } | State::Deciding | State::Over => None,
            State::Offering
            | State::Copying
            | State::Resting { .. }
            | State::Draining
            | State::HandedOver => {
                let bound = if self.switching.is_some() { self.waits.take_back } else { self.waits.prepare };
                (!self.given).then(|| self.heard.max(self.waiting_since).plus(bound))
            }
        }
    }

    /// Whether the target was heard of a moment ago.
    fn is_there(&self, now: Micros) -> bool {
        self.peer && self.accepted && self.known_there && now.since(self.heard) <= THERE_BOUND
    }

    fn probe(&mut self, now: Micros) {
        self.probe_at = None;
        if self.peer && self.accepted && !matches!(self.state, State::Disarming { .. } | State::Deciding) {
            self.probe_at = Some(now.plus(PROBE_INTERVAL));
            self.send(ToTarget::Probe);
        }
    }

    /// Some ingress has not flipped in time: its agent may be dead, so its marker is not waited for any longer.
    fn cut_late_if_there(&mut self, now: Micros) {
        if self.cut_late_at.is_some_and(|at| at <= now) && self.is_there(now) {
            self.cut_late_at = None;
            let ingresses = self.switching.clone().unwrap_or_default();
            self.actions.push_back(SourceAction::CutLate(ingresses));
        }
    }

    fn peer_up(&mut self) {
        self.peer = true;
        self.accepted = false;
        self.offer();
    }

    fn peer_down(&mut self) {
        self.peer = false;
        self.accepted = false;
        self.offer_at = None;
        self.probe_at = None;
    }

    fn offer(&mut self) {
        self.offer_at = None;
        if self.peer && !matches!(self.state, State::Disarming { .. } | State::Deciding) {
            self.send(ToTarget::Offer { session: self.session, flows: self.flows });
        }
    }

    fn peer_said(&mut self, message: ToSource, now: Micros) {
        // Who has not heard of the move yet is no target.
        if message != ToSource::Unknown {
            (self.heard, self.known_there) = (now, true);
        }
        match message {
            ToSource::Unknown => self.offer_at = Some(now.plus(OFFER_INTERVAL)),
            ToSource::Accept { session, next } if session == self.session => self.accepted(next, now),
            ToSource::Ack { session, next } if session == self.session => self.acknowledged(next),
            ToSource::Mismatch { session } if session == self.session => self.restart(),
            ToSource::Refuse { reason } => self.give_up(&reason, true, now),
            // About a session that is over, or told for information: the log will say the same.
            ToSource::Accept { .. }
            | ToSource::Ack { .. }
            | ToSource::Mismatch { .. }
            | ToSource::Joined
            | ToSource::Alive => {}
        }
    }

    fn accepted(&mut self, next: u64, now: Micros) {
        self.accepted = true;
        self.probe_at.get_or_insert(now.plus(PROBE_INTERVAL));
        if matches!(self.state, State::Disarming { .. } | State::Deciding) {
            // It is being given up: from here on the token must not leave.
            return;
        }
        if self.state == State::Offering {
            // What the target has was copied by another machine that drew the same number.
            return if next == 0 { self.begin(now) } else { self.restart() };
        }
        self.acknowledged(next);
        let first = self.unacked.front().map_or(self.next_sequence, |&(sequence, _)| sequence);
        if first != next {
            return self.restart();
        }
        for (sequence, batch) in self.unacked.clone() {
            self.send(ToTarget::Chunk { session: self.session, sequence, batch });
        }
        self.say_copied();
        if let Some(handover) = self.handover.clone() {
            self.hand_over(handover);
        }
    }

    fn acknowledged(&mut self, next: u64) {
        let before = self.installed;
        while self.unacked.front().is_some_and(|&(sequence, _)| sequence < next) {
            let records = self.unacked.pop_front().map_or(0, |(_, batch)| batch.len());
            self.installed += records as u64;
        }
        let exports = matches!(self.state, State::Copying | State::Resting { .. } | State::Draining);
        if exports && self.installed > before {
            self.actions.push_back(SourceAction::Credit(self.credit()));
        }
    }

    /// The first export of a session: everything.
    fn begin(&mut self, now: Micros) {
        if std::mem::take(&mut self.lost) {
            self.given = false;
            let ingresses = self.switching.clone().unwrap_or_default();
            self.drain(ingresses, now);
        } else if self.frozen {
            // It exports once more, whenever that is: there is nothing left to wait for.
            self.state = State::Draining;
            self.actions.push_back(SourceAction::ArmAgain(self.switching.clone().unwrap_or_default()));
        } else {
            self.state = State::Copying;
            self.actions.push_back(SourceAction::CopyStart);
        }
    }

    /// What the target has is of no use: a new session from nothing.
    fn restart(&mut self) {
        if matches!(self.state, State::Disarming { .. } | State::Deciding) {
            return;
        }
        self.session += 1;
        self.state = State::Offering;
        self.accepted = false;
        self.next_sequence = 0;
        self.rounds = 0;
        self.pending = Batch::default();
        self.unacked.clear();
        self.installed = 0;
        self.copied = None;
        self.handover = None;
        self.cut_late_at = None;
        self.offer();
    }

    fn collect(&mut self, mut batch: Batch) {
        if !matches!(self.state, State::Copying | State::Draining) {
            return;
        }
        self.pending.upserts.append(&mut batch.upserts);
        self.pending.removals.append(&mut batch.removals);
        if self.pending.len() >= self.pace.chunk_records {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let batch = Arc::new(std::mem::take(&mut self.pending));
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.unacked.push_back((sequence, batch.clone()));
        self.send_if_accepted(ToTarget::Chunk { session: self.session, sequence, batch });
    }

    fn round_ended(&mut self, dirty: u64, flows: u64, now: Micros) {
        if self.state != State::Copying {
            return;
        }
        self.flush();
        self.flows = flows;
        self.rounds += 1;
        if self.copied.is_none() {
            self.copied = Some(self.next_sequence);
            self.say_copied();
        }
        if let Some(ingresses) = self.switching.clone() {
            return self.drain(ingresses, now);
        }
        let small = dirty <= self.pace.dirty_small || self.rounds >= self.pace.rounds_max;
        if small && self.unacked.len() <= BACKLOG_SMALL && !self.switch_proposed && self.is_there(now) {
            self.switch_proposed = true;
            self.actions.push_back(SourceAction::ProposeSwitch);
        }
        if small {
            self.state = State::Resting { next_round_at: now.plus(ROUND_INTERVAL) };
        } else {
            self.next_round(now);
        }
    }

    /// Exports what is dirty, unless the target has yet to take what was exported before: then later.
    fn next_round(&mut self, now: Micros) {
        if self.unacked.len() >= self.pace.window_chunks {
            self.state = State::Resting { next_round_at: now.plus(ROUND_INTERVAL) };
            return;
        }
        self.state = State::Copying;
        self.actions.push_back(SourceAction::CopyRound);
    }

    fn switching(&mut self, ingresses: Vec<SiteId>, flip_at: Micros, now: Micros) {
        if self.switching.is_some() {
            return;
        }
        self.switching = Some(ingresses.clone());
        self.flip_at = flip_at;
        // Another, shorter bound begins.
        self.waiting_since = now;
        match self.state {
            State::Resting { .. } => self.drain(ingresses, now),
            // The flip was committed before the abort that was proposed: so it is taken back.
            State::Deciding => self.disarm(self.refused, now),
            State::Offering
            | State::Copying
            | State::Draining
            | State::HandedOver
            | State::Disarming { .. }
            | State::Over => {}
        }
    }

    /// That the token has not left is what the taking back will be proposed with, and the proposal may be committed long after this
    /// machine: so the worker has to remember it. When the target is there, it may yet take a cut that came in between.
    fn disarm(&mut self, refused: bool, now: Micros) {
        self.state = State::Disarming { refused };
        let may_leave = self.given || self.is_there(now);
        self.actions.push_back(if may_leave { SourceAction::Disarm } else { SourceAction::Withdraw });
    }

    fn drain(&mut self, ingresses: Vec<SiteId>, now: Micros) {
        self.state = State::Draining;
        self.cut_late_at = Some(self.flip_at.max(now).plus(self.waits.marker));
        self.actions.push_back(SourceAction::Arm(ingresses));
    }

    fn cut(&mut self, token: Token, missing: Vec<SiteId>, now: Micros) {
        self.frozen = true;
        self.cut_late_at = None;
        if self.state != State::Draining {
            return self.cut_before();
        }
        self.flush();
        self.state = State::HandedOver;
        let handover = ToTarget::Handover {
            session: self.session,
            chunks: self.next_sequence,
            token,
            missing,
            precopy_us: now.since(self.started_at).0,
            rounds: self.rounds,
        };
        self.handover = Some(handover.clone());
        if self.peer && self.accepted {
            self.hand_over(handover);
        }
    }

    /// The worker had been armed in another life or session: this session exports it once more.
    fn cut_before(&mut self) {
        self.frozen = true;
        if self.state == State::Copying {
            self.restart();
        }
    }

    /// A strict target serves nothing before it joins, and need not know.
    fn say_copied(&mut self) {
        if let Some(chunks) = self.copied.filter(|_| self.spec.relaxed) {
            self.send_if_accepted(ToTarget::Copied { session: self.session, chunks });
        }
    }

    fn hand_over(&mut self, handover: ToTarget) {
        self.given = true;
        self.send(handover);
    }

    /// The target will not take the group (`refused`: by its own word), or was away for too long.
    fn give_up(&mut self, reason: &str, refused: bool, now: Micros) {
        match (&self.switching, self.state) {
            (_, State::Disarming { .. } | State::Deciding | State::Over) => {}
            (None, _) => {
                self.state = State::Deciding;
                self.refused = refused;
                self.actions.push_back(SourceAction::ProposeAbort(reason.to_owned()));
            }
            (Some(_), _) => self.disarm(refused, now),
        }
    }

    fn disarmed(&mut self, cut: bool, withdrawn: bool, now: Micros) {
        let State::Disarming { refused } = self.state else { return };
        self.frozen = cut;
        if !cut || withdrawn {
            self.propose_take_back(Proof::NeverGiven);
        } else if refused {
            self.propose_take_back(Proof::NeverAccepted);
        } else if self.given || self.is_there(now) {
            // The target may have the token, and only it can tell; or, as the worker had cut already, it is there to take it.
            self.restart_after_cut();
        } else {
            // It has gone meanwhile.
            self.actions.push_back(SourceAction::Withdraw);
        }
    }

    fn restart_after_cut(&mut self) {
        self.state = State::Offering;
        self.restart();
    }

    fn propose_take_back(&mut self, proof: Proof) {
        self.state = State::Deciding;
        self.voided = proof == Proof::NeverGiven;
        self.actions.push_back(SourceAction::ProposeTakeBack(proof));
    }

    fn ended(&mut self, ending: Ending) {
        self.state = State::Over;
        self.unacked.clear();
        self.actions.push_back(match ending {
            Ending::Done => SourceAction::Forget,
            Ending::Aborted => SourceAction::Disarm,
            Ending::TakenBack(epoch) => SourceAction::Serve(epoch),
        });
    }

    fn send(&mut self, message: ToTarget) {
        self.actions.push_back(SourceAction::Send(message));
    }

    fn send_if_accepted(&mut self, message: ToTarget) {
        if self.peer && self.accepted {
            self.send(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Micros = Micros(1_000);
    const SESSION: u64 = 7 << 16;
    const WAITS: Waits =
        Waits { marker: Micros(2_000_000), prepare: Micros(30_000_000), take_back: Micros(3_000_000) };

    fn spec() -> MoveSpec {
        MoveSpec {
            id: flow::MoveId(1),
            group: "1:100.64.0.0/24".parse().unwrap(),
            from: SiteId(1),
            to: SiteId(2),
            epoch: Epoch(2),
            relaxed: false,
        }
    }

    fn batch(count: u32) -> Batch {
        let slices = flow::sample::service(4).unwrap();
        Batch { upserts: flow::sample::flows(&slices, count as usize, 1), removals: Vec::new() }
    }

    fn token() -> Token {
        Token { epoch: Epoch(2), flows: 3, digest: 9 }
    }

    fn actions(source: &mut Source) -> Vec<SourceAction> {
        std::iter::from_fn(|| source.poll_action()).collect()
    }

    fn feed(source: &mut Source, inputs: impl IntoIterator<Item = SourceInput>) -> Vec<SourceAction> {
        for input in inputs {
            source.handle(input, NOW);
        }
        actions(source)
    }

    fn accept(next: u64) -> SourceInput {
        SourceInput::Peer(ToSource::Accept { session: SESSION, next })
    }

    fn round(dirty: u64) -> SourceInput {
        SourceInput::RoundEnd { dirty, flows: 3 }
    }

    fn switching() -> SourceInput {
        SourceInput::Switching { ingresses: vec![SiteId(1)], flip_in: Micros(0) }
    }

    fn offer(session: u64) -> SourceAction {
        SourceAction::Send(ToTarget::Offer { session, flows: 3 })
    }

    fn chunk(sequence: u64, batch: Batch) -> SourceAction {
        SourceAction::Send(ToTarget::Chunk { session: SESSION, sequence, batch: Arc::new(batch) })
    }

    fn offered() -> Source {
        let mut source = Source::new(spec(), WAITS, Pace::default(), 7, 3, Found::Serving, NOW);
        assert_eq!(feed(&mut source, [SourceInput::PeerUp]), [offer(SESSION)]);
        source
    }

    fn resting() -> Source {
        let mut source = offered();
        let inputs = [accept(0), SourceInput::Records(batch(3)), round(0)];
        let expected = [SourceAction::CopyStart, chunk(0, batch(3)), SourceAction::ProposeSwitch];
        assert_eq!(feed(&mut source, inputs), expected);
        source
    }

    fn handed_over() -> Source {
        let mut source = resting();
        let inputs = [switching(), SourceInput::Cut { token: token(), missing: Vec::new() }];
        let did = feed(&mut source, inputs);
        assert_eq!(did[0], SourceAction::Arm(vec![SiteId(1)]));
        assert!(matches!(did[1], SourceAction::Send(ToTarget::Handover { chunks: 1, .. })));
        source
    }

    #[test]
    fn nothing_is_exported_before_the_target_accepts() {
        let mut source = offered();
        assert_eq!(feed(&mut source, [SourceInput::Peer(ToSource::Unknown)]), []);
        source.handle_timeout(NOW.plus(OFFER_INTERVAL));
        assert_eq!(actions(&mut source), [offer(SESSION)]);
    }

    #[test]
    fn a_target_that_has_chunks_of_a_copy_that_has_not_begun_gets_another_session() {
        assert_eq!(feed(&mut offered(), [accept(5)]), [offer(SESSION + 1)]);
    }

    #[test]
    fn rounds_go_on_until_the_dirty_set_is_small() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::CopyRound]);
        assert_eq!(feed(&mut source, [round(Pace::default().dirty_small)]), [SourceAction::ProposeSwitch]);
    }

    #[test]
    fn a_relaxed_target_is_told_after_the_first_round_that_the_copy_is_whole_and_again_on_a_new_connection() {
        let spec = MoveSpec { relaxed: true, ..spec() };
        let copied = SourceAction::Send(ToTarget::Copied { session: SESSION, chunks: 1 });
        let mut source = Source::new(spec, WAITS, Pace::default(), 7, 3, Found::Serving, NOW);
        feed(&mut source, [SourceInput::PeerUp, accept(0)]);
        let first = [SourceInput::Records(batch(3)), round(10_000)];
        assert_eq!(feed(&mut source, first), [chunk(0, batch(3)), copied.clone(), SourceAction::CopyRound]);
        let second = [SourceInput::Records(batch(2)), round(10_000)];
        assert_eq!(feed(&mut source, second), [chunk(1, batch(2)), SourceAction::CopyRound]);
        let again = feed(&mut source, [SourceInput::PeerDown, SourceInput::PeerUp, accept(1)]);
        assert!(again.ends_with(&[chunk(1, batch(2)), copied]));
    }

    #[test]
    fn a_dirty_set_that_never_shrinks_is_switched_after_the_last_round() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        for _ in 1..Pace::default().rounds_max {
            assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::CopyRound]);
        }
        assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::ProposeSwitch]);
    }

    #[test]
    fn a_round_in_hand_ends_before_the_worker_is_armed() {
        let mut source = offered();
        feed(&mut source, [accept(0), round(10_000)]);
        assert_eq!(feed(&mut source, [switching()]), []);
        assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::Arm(vec![SiteId(1)])]);
    }

    #[test]
    fn a_new_connection_goes_on_at_the_first_chunk_that_the_target_lacks() {
        let mut source = resting();
        assert_eq!(feed(&mut source, [SourceInput::PeerDown, SourceInput::PeerUp]), [offer(SESSION)]);
        assert_eq!(feed(&mut source, [accept(0)]), [chunk(0, batch(3))]);
        feed(&mut source, [SourceInput::Peer(ToSource::Ack { session: SESSION, next: 1 })]);
        feed(&mut source, [SourceInput::PeerDown, SourceInput::PeerUp]);
        assert_eq!(feed(&mut source, [accept(1)]), []);
    }

    #[test]
    fn a_target_that_lost_acknowledged_chunks_gets_a_new_session() {
        let mut source = resting();
        feed(&mut source, [SourceInput::Peer(ToSource::Ack { session: SESSION, next: 1 })]);
        feed(&mut source, [SourceInput::PeerDown, SourceInput::PeerUp]);
        assert_eq!(feed(&mut source, [accept(0)]), [offer(SESSION + 1)]);
    }

    #[test]
    fn a_mismatch_after_the_cut_exports_the_frozen_table_again() {
        let mut source = handed_over();
        let mismatch = SourceInput::Peer(ToSource::Mismatch { session: SESSION });
        assert_eq!(feed(&mut source, [mismatch]), [offer(SESSION + 1)]);
        let accept = SourceInput::Peer(ToSource::Accept { session: SESSION + 1, next: 0 });
        assert_eq!(feed(&mut source, [accept]), [SourceAction::ArmAgain(vec![SiteId(1)])]);
    }

    #[test]
    fn a_refusal_before_switching_aborts() {
        let mut source = offered();
        let refuse = SourceInput::Peer(ToSource::Refuse { reason: "no room".into() });
        assert_eq!(feed(&mut source, [refuse]), [SourceAction::ProposeAbort("no room".into())]);
    }

    #[test]
    fn a_refusal_after_the_cut_is_the_proof_for_taking_back() {
        let mut source = handed_over();
        let refuse = SourceInput::Peer(ToSource::Refuse { reason: "no room".into() });
        assert_eq!(feed(&mut source, [refuse]), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverAccepted)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: false }]), proposed);
    }

    #[test]
    fn a_worker_that_refuses_to_cut_leaves_the_group_with_the_source() {
        let mut source = resting();
        feed(&mut source, [switching()]);
        assert_eq!(feed(&mut source, [SourceInput::Refused("why".into())]), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: false, withdrawn: false }]), proposed);
    }

    #[test]
    fn a_target_that_is_away_is_given_up_only_without_the_token() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(WAITS.take_back));
        assert_eq!(actions(&mut source), [SourceAction::Withdraw]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: false, withdrawn: false }]), proposed);

        let mut source = handed_over();
        feed(&mut source, [SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(Micros::from_secs(3_600)));
        assert_eq!(actions(&mut source), []);
    }

    fn alive() -> SourceInput {
        SourceInput::Peer(ToSource::Alive)
    }

    #[test]
    fn a_cut_without_all_markers_needs_a_target_that_is_there() {
        let mut source = resting();
        feed(&mut source, [switching()]);
        let late = NOW.plus(WAITS.marker);
        source.handle_timeout(late);
        assert!(!actions(&mut source).contains(&SourceAction::CutLate(vec![SiteId(1)])));
        source.handle(alive(), late);
        assert_eq!(actions(&mut source), [SourceAction::CutLate(vec![SiteId(1)])]);
        source.handle(alive(), late);
        assert_eq!(actions(&mut source), [], "it is asked for once");
    }

    #[test]
    fn a_target_that_falls_silent_after_the_flip_never_gets_the_token() {
        let mut source = resting();
        feed(&mut source, [switching()]);
        let mut at = NOW;
        let mut did = Vec::new();
        while let Some(next) = source.poll_timeout().filter(|next| *next <= NOW.plus(WAITS.take_back)) {
            at = at.max(next);
            source.handle_timeout(at);
            did.extend(actions(&mut source));
        }
        let probes = did.iter().filter(|did| **did == SourceAction::Send(ToTarget::Probe)).count();
        assert!(probes >= 8, "{probes}");
        assert_eq!(did.last(), Some(&SourceAction::Withdraw));
        assert!(!did.iter().any(|did| matches!(did, SourceAction::CutLate(_))));
    }

    #[test]
    fn the_flip_is_proposed_to_a_target_that_is_there_only() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        let later = NOW.plus(Micros(THERE_BOUND.0 + 1));
        source.handle(round(0), later);
        assert_eq!(actions(&mut source), []);
        source.handle(alive(), later);
        source.handle_timeout(later.plus(ROUND_INTERVAL));
        source.handle(round(0), later.plus(ROUND_INTERVAL));
        assert!(actions(&mut source).contains(&SourceAction::ProposeSwitch));
    }

    #[test]
    fn a_token_that_never_left_is_no_reason_to_wait_for_the_target() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::PeerDown]);
        let cut = SourceInput::Cut { token: token(), missing: Vec::new() };
        assert_eq!(feed(&mut source, [cut]), []);
        source.handle_timeout(NOW.plus(WAITS.take_back));
        assert_eq!(actions(&mut source), [SourceAction::Withdraw]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: true }]), proposed);
    }

    #[test]
    fn a_source_says_for_how_long_it_has_been_switching() {
        let later = NOW.plus(Micros(70_000_000));
        assert_eq!(resting().switching_for(later), None);
        let mut source = handed_over();
        assert_eq!(source.switching_for(later), Some(Micros(70_000_000)));
        feed(&mut source, [SourceInput::Ended(Ending::Done)]);
        assert_eq!(source.switching_for(later), None);
    }

    #[test]
    fn a_source_that_waits_for_a_silent_target_with_the_token_says_so() {
        let source = handed_over();
        assert_eq!(source.silent_with_token(NOW), None);
        let later = NOW.plus(WAITS.take_back);
        assert_eq!(source.silent_with_token(later), Some(WAITS.take_back));
    }

    #[test]
    fn a_group_whose_worker_died_is_served_again_when_the_target_accepts_a_copy_from_nothing() {
        let mut source = Source::new(spec(), WAITS, Pace::default(), 7, 3, Found::Lost, NOW);
        feed(&mut source, [switching(), SourceInput::PeerUp]);
        assert_eq!(feed(&mut source, [accept(0)]), [SourceAction::Arm(vec![SiteId(1)])]);
        source.handle(alive(), NOW.plus(WAITS.marker));
        source.handle_timeout(NOW.plus(WAITS.marker));
        assert!(actions(&mut source).contains(&SourceAction::CutLate(vec![SiteId(1)])));
    }

    #[test]
    fn a_cut_that_won_the_race_against_disarming_is_taken_back_if_its_token_never_left() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(WAITS.take_back));
        actions(&mut source);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: true }]), proposed);
    }

    #[test]
    fn a_group_that_is_being_taken_back_is_not_handed_over_any_more() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::PeerDown]);
        feed(&mut source, [SourceInput::Cut { token: token(), missing: Vec::new() }]);
        source.handle_timeout(NOW.plus(WAITS.take_back));
        actions(&mut source);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: true }]), proposed);
        assert_eq!(feed(&mut source, [SourceInput::PeerUp, accept(1)]), []);
    }

    #[test]
    fn a_target_that_is_back_after_the_token_was_withdrawn_does_not_get_it() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::PeerDown]);
        feed(&mut source, [SourceInput::Cut { token: token(), missing: Vec::new() }]);
        source.handle_timeout(NOW.plus(WAITS.take_back));
        actions(&mut source);
        assert_eq!(feed(&mut source, [SourceInput::PeerUp, accept(1)]), []);
        assert_eq!(
            feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: true }]),
            [SourceAction::ProposeTakeBack(Proof::NeverGiven)]
        );
    }

    #[test]
    fn an_abort_that_came_after_the_flip_was_committed_becomes_a_taking_back() {
        let mut source = resting();
        let aborted = [SourceAction::ProposeAbort("why".into())];
        assert_eq!(feed(&mut source, [SourceInput::Refused("why".into())]), aborted);
        assert_eq!(feed(&mut source, [switching()]), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: false, withdrawn: false }]), proposed);
    }

    #[test]
    fn a_source_that_stood_still_does_not_blame_its_target() {
        let mut source = resting();
        feed(&mut source, [switching()]);
        let later = NOW.plus(WAITS.take_back);
        source.stood_still(WAITS.take_back);
        source.handle_timeout(later);
        assert!(!actions(&mut source).contains(&SourceAction::Disarm));
    }

    #[test]
    fn a_cut_that_won_the_race_against_disarming_is_handed_over_to_a_target_that_is_there() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::Refused("why".into())]);
        assert_eq!(
            feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: false }]),
            [offer(SESSION + 1)]
        );
    }

    #[test]
    fn a_cut_of_another_life_is_handed_over_after_all() {
        let mut source = Source::new(spec(), WAITS, Pace::default(), 7, 3, Found::Cut, NOW);
        feed(&mut source, [switching(), SourceInput::PeerUp, accept(0)]);
        assert_eq!(feed(&mut source, [SourceInput::Refused("why".into())]), [SourceAction::Disarm]);
        assert_eq!(
            feed(&mut source, [SourceInput::Disarmed { cut: true, withdrawn: false }]),
            [offer(SESSION + 1)]
        );
    }

    #[test]
    fn each_ending_says_what_the_worker_does_next() {
        let ended = |ending| feed(&mut handed_over(), [SourceInput::Ended(ending)]);
        assert_eq!(ended(Ending::Done), [SourceAction::Forget]);
        assert_eq!(ended(Ending::Aborted), [SourceAction::Disarm]);
        assert_eq!(ended(Ending::TakenBack(Epoch(3))), [SourceAction::Serve(Epoch(3))]);
    }

    #[test]
    fn large_exports_are_cut_into_chunks() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        let record = batch(1).upserts[0];
        let full = Batch { upserts: vec![record; Pace::default().chunk_records], removals: Vec::new() };
        let did = feed(&mut source, [SourceInput::Records(full.clone()), SourceInput::Records(batch(1))]);
        assert_eq!(did, [chunk(0, full)]);
    }

    const SMALL: Pace = Pace { chunk_records: 2, window_chunks: 3, dirty_small: 1, rounds_max: 4 };

    fn ack(next: u64) -> SourceInput {
        SourceInput::Peer(ToSource::Ack { session: SESSION, next })
    }

    #[test]
    fn records_are_exported_only_while_few_chunks_wait_for_the_target() {
        let mut source = Source::new(spec(), WAITS, SMALL, 7, 3, Found::Serving, NOW);
        feed(&mut source, [SourceInput::PeerUp, accept(0)]);
        assert_eq!(source.credit(), 6, "three chunks of two records");
        for sequence in 0..3 {
            assert_eq!(feed(&mut source, [SourceInput::Records(batch(2))]), [chunk(sequence, batch(2))]);
        }
        assert_eq!(source.credit(), 6, "nothing is installed");
        assert_eq!(feed(&mut source, [ack(1)]), [SourceAction::Credit(8)]);
        assert_eq!(feed(&mut source, [ack(1)]), [], "said once");
        assert_eq!(feed(&mut source, [ack(3)]), [SourceAction::Credit(12)]);
    }

    #[test]
    fn no_round_begins_while_the_window_is_full() {
        let mut source = Source::new(spec(), WAITS, SMALL, 7, 3, Found::Serving, NOW);
        feed(&mut source, [SourceInput::PeerUp, accept(0)]);
        let records = || SourceInput::Records(batch(2));
        feed(&mut source, [records(), records(), records()]);
        assert_eq!(feed(&mut source, [round(9)]), []);
        let later = NOW.plus(ROUND_INTERVAL);
        source.handle_timeout(later);
        assert_eq!(actions(&mut source), [], "the target has nothing yet");
        assert_eq!(feed(&mut source, [ack(1)]), [SourceAction::Credit(8)]);
        source.handle_timeout(later.plus(ROUND_INTERVAL));
        assert_eq!(actions(&mut source), [SourceAction::CopyRound]);
    }

    #[test]
    fn a_new_session_begins_with_the_credit_of_its_first_chunks() {
        let mut source = Source::new(spec(), WAITS, SMALL, 7, 3, Found::Serving, NOW);
        feed(&mut source, [SourceInput::PeerUp, accept(0), SourceInput::Records(batch(2)), ack(1)]);
        assert_eq!(source.credit(), 8);
        feed(&mut source, [SourceInput::Peer(ToSource::Mismatch { session: SESSION })]);
        assert_eq!(source.credit(), 6);
    }

    #[test]
    fn a_cut_for_a_copy_that_was_given_up_is_exported_once_more() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        assert_eq!(feed(&mut source, [SourceInput::CutBefore]), [offer(SESSION + 1)]);
        let accept = SourceInput::Peer(ToSource::Accept { session: SESSION + 1, next: 0 });
        assert_eq!(feed(&mut source, [accept]), [SourceAction::ArmAgain(Vec::new())]);
    }

    /// The proposal of the former life may be committed yet.
    #[test]
    fn a_cut_of_another_life_whose_token_was_withdrawn_is_taken_back() {
        let mut source = Source::new(spec(), WAITS, Pace::default(), 7, 3, Found::Cut, NOW);
        feed(&mut source, [switching(), SourceInput::PeerUp, accept(0)]);
        assert_eq!(feed(&mut source, [SourceInput::Refused("withdrawn".into())]), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        let withdrawn = SourceInput::Disarmed { cut: true, withdrawn: true };
        assert_eq!(feed(&mut source, [withdrawn]), proposed);
    }

    #[test]
    fn a_target_that_goes_while_its_source_is_disarmed_has_the_token_withdrawn() {
        let mut source = resting();
        feed(&mut source, [switching(), SourceInput::Refused("why".into()), SourceInput::PeerDown]);
        let disarmed = |withdrawn| SourceInput::Disarmed { cut: true, withdrawn };
        assert_eq!(feed(&mut source, [disarmed(false)]), [SourceAction::Withdraw]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverGiven)];
        assert_eq!(feed(&mut source, [disarmed(true)]), proposed);
    }
}
