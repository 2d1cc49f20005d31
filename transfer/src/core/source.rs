//! The side that gives a group away.
//!
//! ```text
//! Offering ─Accept→ Copying ─small→ (Switch proposed) ─Switching→ Draining ─Cut→ HandedOver ─Ended→ over
//!     └──────── refused or too long: abort is proposed; after Switching: Disarming, then taken back ────┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use flow::{Batch, Epoch, Micros, SiteId, Token};

use super::{Ending, MoveSpec, Proof, ToSource, ToTarget};

/// Records per chunk: from here on larger chunks gain less than 1 %.
const CHUNK_RECORDS: usize = 16_384;
/// A dirty set this small fits a few packets, so the flip is proposed.
const DIRTY_SMALL: u64 = 256;
/// Rounds before the flip is proposed even though the dirty set does not shrink.
const ROUNDS_MAX: u32 = 8;
/// Chunks under way when the flip is proposed: more would make the final delta queue behind them.
const BACKLOG_SMALL: usize = 1;
/// Between two rounds while the flip is being committed.
const ROUND_INTERVAL: Micros = Micros(25_000);
/// How long the target may stay away before switching: then the move is aborted.
const PREPARE_BOUND: Micros = Micros(30_000_000);
/// How long the target may stay away after switching while the source has not cut: then it is taken back.
const TAKE_BACK_BOUND: Micros = Micros(10_000_000);
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
    /// The worker will not cut any more, or had cut.
    Disarmed {
        /// It had cut.
        cut: bool,
    },
    /// The worker refused what it was asked.
    Refused(String),
    /// The log says: switching, with these ingresses.
    Switching(Vec<SiteId>),
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
    /// Worker: cut when these ingresses' markers are in; if it has cut, export once more.
    Arm(Vec<SiteId>),
    /// Worker: do not cut.
    Disarm,
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
    state: State,
    session: u64,
    peer: bool,
    accepted: bool,
    /// The worker has cut: its table is frozen, and a new session exports it whole.
    frozen: bool,
    switching: Option<Vec<SiteId>>,
    switch_proposed: bool,
    flows: u64,
    rounds: u32,
    started_at: Micros,
    /// Since when the target has been away.
    away_since: Option<Micros>,
    offer_at: Option<Micros>,
    pending: Batch,
    next_sequence: u64,
    unacked: VecDeque<(u64, Arc<Batch>)>,
    handover: Option<ToTarget>,
    actions: VecDeque<SourceAction>,
}

impl Source {
    /// A machine for a move that the log has in preparation or (then with [`SourceInput::Switching`] to follow) in
    /// switching. `incarnation` differs with every start of the agent, so that sessions of two lives are not taken
    /// for one. `frozen`: the worker says that it has cut.
    #[must_use]
    pub fn new(spec: MoveSpec, incarnation: u32, flows: u64, frozen: bool, now: Micros) -> Self {
        Self {
            spec,
            state: State::Offering,
            session: u64::from(incarnation) << 16,
            peer: false,
            accepted: false,
            frozen,
            switching: None,
            switch_proposed: false,
            flows,
            rounds: 0,
            started_at: now,
            away_since: Some(now),
            offer_at: None,
            pending: Batch::default(),
            next_sequence: 0,
            unacked: VecDeque::new(),
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
            SourceInput::PeerDown => self.peer_down(now),
            SourceInput::Peer(message) => self.peer_said(message, now),
            SourceInput::Records(batch) => self.collect(batch),
            SourceInput::RoundEnd { dirty, flows } => self.round_ended(dirty, flows, now),
            SourceInput::Cut { token, missing } => self.cut(token, missing, now),
            SourceInput::Disarmed { cut } => self.disarmed(cut),
            SourceInput::Refused(reason) => self.give_up(&reason, false),
            SourceInput::Switching(ingresses) => self.switching(ingresses),
            SourceInput::Ended(ending) => self.ended(ending),
        }
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Micros) {
        if let State::Resting { next_round_at } = self.state
            && next_round_at <= now
        {
            self.state = State::Copying;
            self.actions.push_back(SourceAction::CopyRound);
        }
        if self.offer_at.is_some_and(|at| at <= now) {
            self.offer();
        }
        if self.away_bound().is_some_and(|at| at <= now) {
            self.give_up("the target site was not reachable", false);
        }
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Micros> {
        let round =
            if let State::Resting { next_round_at } = self.state { Some(next_round_at) } else { None };
        [round, self.offer_at, self.away_bound()].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When a target that stays away is given up; never once it may have the token.
    fn away_bound(&self) -> Option<Micros> {
        match self.state {
            State::HandedOver | State::Disarming { .. } | State::Deciding | State::Over => None,
            State::Offering | State::Copying | State::Resting { .. } | State::Draining => {
                let bound = if self.switching.is_some() { TAKE_BACK_BOUND } else { PREPARE_BOUND };
                self.away_since.filter(|_| !self.frozen).map(|since| since.plus(bound))
            }
        }
    }

    fn peer_up(&mut self) {
        self.peer = true;
        self.accepted = false;
        self.offer();
    }

    fn peer_down(&mut self, now: Micros) {
        self.peer = false;
        self.accepted = false;
        self.offer_at = None;
        self.away_since.get_or_insert(now);
    }

    fn offer(&mut self) {
        self.offer_at = None;
        if self.peer && !matches!(self.state, State::Disarming { .. } | State::Deciding) {
            self.send(ToTarget::Offer { session: self.session, flows: self.flows });
        }
    }

    fn peer_said(&mut self, message: ToSource, now: Micros) {
        match message {
            ToSource::Unknown => self.offer_at = Some(now.plus(OFFER_INTERVAL)),
            ToSource::Accept { session, next } if session == self.session => self.accepted(next),
            ToSource::Ack { session, next } if session == self.session => self.acknowledged(next),
            ToSource::Mismatch { session } if session == self.session => self.restart(),
            ToSource::Refuse { reason } => self.give_up(&reason, true),
            // About a session that is over, or told for information: the log will say the same.
            ToSource::Accept { .. } | ToSource::Ack { .. } | ToSource::Mismatch { .. } | ToSource::Joined => {
            }
        }
    }

    fn accepted(&mut self, next: u64) {
        self.accepted = true;
        self.away_since = None;
        if self.state == State::Offering {
            return self.begin();
        }
        self.acknowledged(next);
        let first = self.unacked.front().map_or(self.next_sequence, |&(sequence, _)| sequence);
        if first != next {
            return self.restart();
        }
        for (sequence, batch) in self.unacked.clone() {
            self.send(ToTarget::Chunk { session: self.session, sequence, batch });
        }
        if let Some(handover) = self.handover.clone() {
            self.send(handover);
        }
    }

    fn acknowledged(&mut self, next: u64) {
        while self.unacked.front().is_some_and(|&(sequence, _)| sequence < next) {
            self.unacked.pop_front();
        }
    }

    /// The first export of a session: everything.
    fn begin(&mut self) {
        if self.frozen {
            self.state = State::Draining;
            self.actions.push_back(SourceAction::Arm(self.switching.clone().unwrap_or_default()));
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
        self.handover = None;
        self.offer();
    }

    fn collect(&mut self, mut batch: Batch) {
        if !matches!(self.state, State::Copying | State::Draining) {
            return;
        }
        self.pending.upserts.append(&mut batch.upserts);
        self.pending.removals.append(&mut batch.removals);
        if self.pending.len() >= CHUNK_RECORDS {
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
        if let Some(ingresses) = self.switching.clone() {
            self.state = State::Draining;
            return self.actions.push_back(SourceAction::Arm(ingresses));
        }
        let small = dirty <= DIRTY_SMALL || self.rounds >= ROUNDS_MAX;
        if small && self.unacked.len() <= BACKLOG_SMALL && !self.switch_proposed {
            self.switch_proposed = true;
            self.actions.push_back(SourceAction::ProposeSwitch);
        }
        if small {
            self.state = State::Resting { next_round_at: now.plus(ROUND_INTERVAL) };
        } else {
            self.actions.push_back(SourceAction::CopyRound);
        }
    }

    fn switching(&mut self, ingresses: Vec<SiteId>) {
        if self.switching.is_some() {
            return;
        }
        self.switching = Some(ingresses.clone());
        if let State::Resting { .. } = self.state {
            self.state = State::Draining;
            self.actions.push_back(SourceAction::Arm(ingresses));
        }
        // The bound for a target that is away starts anew: it is another, shorter one.
    }

    fn cut(&mut self, token: Token, missing: Vec<SiteId>, now: Micros) {
        self.frozen = true;
        if self.state != State::Draining {
            // The worker had been armed in another life or session: this session exports it once more.
            return if self.state == State::Copying {
                self.restart()
            };
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
        self.send_if_accepted(handover);
    }

    /// The target will not take the group (`refused`: by its own word), or was away for too long.
    fn give_up(&mut self, reason: &str, refused: bool) {
        match (&self.switching, self.state) {
            (_, State::Disarming { .. } | State::Deciding | State::Over) => {}
            (None, _) => {
                self.state = State::Deciding;
                self.actions.push_back(SourceAction::ProposeAbort(reason.to_owned()));
            }
            (Some(_), _) => {
                self.state = State::Disarming { refused };
                self.actions.push_back(SourceAction::Disarm);
            }
        }
    }

    fn disarmed(&mut self, cut: bool) {
        let State::Disarming { refused } = self.state else { return };
        self.frozen = cut;
        match (cut, refused) {
            (false, _) => self.propose_take_back(Proof::NeverCut),
            (true, true) => self.propose_take_back(Proof::NeverAccepted),
            // It cut in the meantime, and the target may have the token: only the target can tell.
            (true, false) => self.restart_after_cut(),
        }
    }

    fn restart_after_cut(&mut self) {
        self.state = State::Offering;
        self.restart();
    }

    fn propose_take_back(&mut self, proof: Proof) {
        self.state = State::Deciding;
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

    fn offer(session: u64) -> SourceAction {
        SourceAction::Send(ToTarget::Offer { session, flows: 3 })
    }

    fn chunk(sequence: u64, batch: Batch) -> SourceAction {
        SourceAction::Send(ToTarget::Chunk { session: SESSION, sequence, batch: Arc::new(batch) })
    }

    fn offered() -> Source {
        let mut source = Source::new(spec(), 7, 3, false, NOW);
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
        let inputs = [
            SourceInput::Switching(vec![SiteId(1)]),
            SourceInput::Cut { token: token(), missing: Vec::new() },
        ];
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
    fn rounds_go_on_until_the_dirty_set_is_small() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::CopyRound]);
        assert_eq!(feed(&mut source, [round(DIRTY_SMALL)]), [SourceAction::ProposeSwitch]);
    }

    #[test]
    fn a_dirty_set_that_never_shrinks_is_switched_after_the_last_round() {
        let mut source = offered();
        feed(&mut source, [accept(0)]);
        for _ in 1..ROUNDS_MAX {
            assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::CopyRound]);
        }
        assert_eq!(feed(&mut source, [round(10_000)]), [SourceAction::ProposeSwitch]);
    }

    #[test]
    fn a_round_in_hand_ends_before_the_worker_is_armed() {
        let mut source = offered();
        feed(&mut source, [accept(0), round(10_000)]);
        assert_eq!(feed(&mut source, [SourceInput::Switching(vec![SiteId(1)])]), []);
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
        assert_eq!(feed(&mut source, [accept]), [SourceAction::Arm(vec![SiteId(1)])]);
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
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true }]), proposed);
    }

    #[test]
    fn a_worker_that_refuses_to_cut_leaves_the_group_with_the_source() {
        let mut source = resting();
        feed(&mut source, [SourceInput::Switching(vec![SiteId(1)])]);
        assert_eq!(feed(&mut source, [SourceInput::Refused("why".into())]), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverCut)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: false }]), proposed);
    }

    #[test]
    fn a_target_that_is_away_is_given_up_only_without_the_token() {
        let mut source = resting();
        feed(&mut source, [SourceInput::Switching(vec![SiteId(1)]), SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(TAKE_BACK_BOUND));
        assert_eq!(actions(&mut source), [SourceAction::Disarm]);
        let proposed = [SourceAction::ProposeTakeBack(Proof::NeverCut)];
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: false }]), proposed);

        let mut source = handed_over();
        feed(&mut source, [SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(Micros::from_secs(3_600)));
        assert_eq!(actions(&mut source), []);
    }

    #[test]
    fn a_cut_that_won_the_race_against_disarming_is_handed_over_after_all() {
        let mut source = resting();
        feed(&mut source, [SourceInput::Switching(vec![SiteId(1)]), SourceInput::PeerDown]);
        source.handle_timeout(NOW.plus(TAKE_BACK_BOUND));
        actions(&mut source);
        assert_eq!(feed(&mut source, [SourceInput::Disarmed { cut: true }]), []);
        assert_eq!(feed(&mut source, [SourceInput::PeerUp]), [offer(SESSION + 1)]);
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
        let full = Batch { upserts: vec![record; CHUNK_RECORDS], removals: Vec::new() };
        let did = feed(&mut source, [SourceInput::Records(full.clone()), SourceInput::Records(batch(1))]);
        assert_eq!(did, [chunk(0, full)]);
    }
}
