//! The side that takes a group.
//!
//! ```text
//! Idle ─Offer→ Preparing ─Prepared→ Shadow ─all installed, Handover→ Joining ─Joined→ Serving ─Ended→ over
//!                  └─ refused by the worker: Refused for the rest of the move
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use flow::{Batch, HoldTimes, Micros, SiteId, Token};

use super::{Ending, MoveSpec, Summary, ToSource, ToTarget};

/// Copies that did not match their token before the target gives up: one is a bug or a flipped bit, three are a
/// difference in configuration.
const MISMATCHES_MAX: u32 = 3;

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetInput {
    /// The source said something; `wire_len` is what it took on the wire.
    Peer {
        /// The message.
        message: ToTarget,
        /// Bytes on the wire.
        wire_len: u64,
    },
    /// The worker holds packets and has room.
    Prepared,
    /// The worker refused.
    Refused(String),
    /// The worker has installed this chunk.
    Installed(u64),
    /// The worker serves.
    Joined {
        /// Flows that it serves.
        flows: u64,
        /// How long packets were held.
        hold: HoldTimes,
    },
    /// The worker's shadow is not what the token says.
    Mismatch,
    /// The log says: switching.
    Switching,
    /// The log says: the source is dead, serve the shadow.
    TakeOver,
    /// The log says: over.
    Ended(Ending),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetAction {
    /// Say this to the source.
    Send(ToSource),
    /// Worker: make room, hold packets, start from an empty shadow.
    Prepare {
        /// Flows to make room for.
        flows: u64,
    },
    /// Worker: put the chunk with this number into the shadow.
    Install(u64, Arc<Batch>),
    /// Worker (relaxed): serve the shadow, which is a whole copy.
    Open,
    /// Worker: serve if the shadow is what the token says.
    Join {
        /// The token.
        token: Token,
        /// Ingresses whose marker is still to come.
        missing: Vec<SiteId>,
    },
    /// Worker: serve the shadow as it is.
    TakeOver,
    /// Worker: serve, with whatever flows are there.
    Serve,
    /// Worker: give the shadow up and relay to the source.
    Abandon,
    /// Log: the target serves.
    ProposeServed(Summary),
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Idle,
    Preparing,
    Shadow,
    Joining,
    Serving,
    Refused(String),
    Over,
}

#[derive(Clone, Debug, PartialEq)]
struct Handover {
    chunks: u64,
    token: Token,
    missing: Vec<SiteId>,
}

/// The machine. One per move at the target's site.
#[derive(Debug)]
pub struct Target {
    spec: MoveSpec,
    state: State,
    session: Option<u64>,
    received: u64,
    installed: u64,
    handover: Option<Handover>,
    /// So many chunks are a whole copy.
    copied: Option<u64>,
    switching: bool,
    opened: bool,
    taking_over: bool,
    mismatches: u32,
    summary: Summary,
    actions: VecDeque<TargetAction>,
}

impl Target {
    /// A machine for a move that the log has in hand. `serving`: the worker says that it has joined already, and
    /// only the report was lost.
    #[must_use]
    pub fn new(spec: MoveSpec, serving: Option<u64>) -> Self {
        let mut target = Self {
            spec,
            state: State::Idle,
            session: None,
            received: 0,
            installed: 0,
            handover: None,
            copied: None,
            switching: false,
            opened: false,
            taking_over: false,
            mismatches: 0,
            summary: Summary::default(),
            actions: VecDeque::new(),
        };
        if let Some(flows) = serving {
            target.joined(flows, HoldTimes::default());
        }
        target
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

    /// Whether the worker holds packets for the group, so that the switch may deliver to it.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(self.state, State::Shadow | State::Joining | State::Serving)
    }

    /// Takes one input. Time plays no part: who waits is the source, and the worker's holds have their own bounds.
    pub fn handle(&mut self, input: TargetInput, _now: Micros) {
        if self.state == State::Over {
            return;
        }
        match input {
            TargetInput::Peer { message, wire_len } => self.peer_said(message, wire_len),
            TargetInput::Prepared => self.prepared(),
            TargetInput::Refused(reason) => self.refused(reason),
            TargetInput::Installed(sequence) => self.installed(sequence),
            TargetInput::Joined { flows, hold } => self.joined(flows, hold),
            TargetInput::Mismatch => self.mismatch(),
            TargetInput::Switching => self.switching(),
            TargetInput::TakeOver => self.take_over(),
            TargetInput::Ended(ending) => self.ended(ending),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    fn peer_said(&mut self, message: ToTarget, wire_len: u64) {
        match message {
            ToTarget::Offer { session, flows } => self.offered(session, flows),
            ToTarget::Chunk { session, sequence, batch } => self.chunk(session, sequence, batch, wire_len),
            ToTarget::Copied { session, chunks } => {
                if self.session == Some(session) && self.state == State::Shadow {
                    self.copied = Some(chunks);
                    self.open_when_copied();
                }
            }
            ToTarget::Handover { session, chunks, token, missing, precopy_us, rounds } => {
                if self.session == Some(session) && self.state == State::Shadow {
                    self.summary = Summary { precopy_us, rounds, ..self.summary };
                    self.handover = Some(Handover { chunks, token, missing });
                    self.join_when_complete();
                }
            }
            ToTarget::Probe => {
                if self.is_prepared() {
                    self.send(ToSource::Alive);
                }
            }
        }
    }

    fn offered(&mut self, session: u64, flows: u64) {
        match &self.state {
            State::Serving => self.send(ToSource::Joined),
            State::Refused(reason) => {
                let reason = reason.clone();
                self.send(ToSource::Refuse { reason });
            }
            State::Shadow | State::Joining if self.session == Some(session) => self.accept(),
            State::Idle | State::Preparing | State::Shadow | State::Joining => {
                self.session = Some(session);
                self.state = State::Preparing;
                self.received = 0;
                self.installed = 0;
                self.handover = None;
                self.copied = None;
                self.opened = false;
                self.summary = Summary::default();
                self.actions.push_back(TargetAction::Prepare { flows });
            }
            State::Over => {}
        }
    }

    fn accept(&mut self) {
        if let Some(session) = self.session {
            self.send(ToSource::Accept { session, next: self.received });
        }
    }

    fn prepared(&mut self) {
        if self.state == State::Preparing {
            self.state = State::Shadow;
            self.accept();
        }
    }

    /// The source is dead and there is no shadow: the flows are lost, but not the group.
    fn serve_without_flows(&mut self) {
        self.state = State::Serving;
        self.actions.push_back(TargetAction::Serve);
        self.actions.push_back(TargetAction::ProposeServed(self.summary));
    }

    fn refused(&mut self, reason: String) {
        if self.taking_over && self.state != State::Serving {
            return self.serve_without_flows();
        }
        if matches!(self.state, State::Preparing | State::Shadow | State::Joining) {
            self.send(ToSource::Refuse { reason: reason.clone() });
            self.state = State::Refused(reason);
        }
    }

    fn chunk(&mut self, session: u64, sequence: u64, batch: Arc<Batch>, wire_len: u64) {
        if self.state != State::Shadow || self.session != Some(session) || sequence < self.received {
            return;
        }
        if sequence > self.received {
            // Asks again from the first that is missing.
            return self.accept();
        }
        self.received += 1;
        self.summary.bytes_on_wire += wire_len;
        self.actions.push_back(TargetAction::Install(sequence, batch));
    }

    fn installed(&mut self, sequence: u64) {
        // While a new session is being prepared, answers of the old one still come.
        if self.state != State::Shadow || sequence != self.installed {
            return;
        }
        self.installed += 1;
        if let Some(session) = self.session {
            self.send(ToSource::Ack { session, next: self.installed });
        }
        self.open_when_copied();
        self.join_when_complete();
    }

    /// A session that begins anew after the flip starts from an empty shadow: what is held waits for all flows to be there again.
    fn open_when_copied(&mut self) {
        let is_copied = self.copied.is_some_and(|chunks| chunks <= self.installed);
        if self.spec.relaxed && self.switching && self.state == State::Shadow && is_copied && !self.opened {
            self.opened = true;
            self.actions.push_back(TargetAction::Open);
        }
    }

    fn join_when_complete(&mut self) {
        let Some(Handover { chunks, token, missing }) = self.handover.clone() else { return };
        if chunks < self.received {
            // Others were before these, of a machine that drew the same number.
            self.state = State::Joining;
            return self.mismatch();
        }
        if chunks != self.installed {
            return;
        }
        self.state = State::Joining;
        self.actions.push_back(TargetAction::Join { token, missing });
    }

    fn joined(&mut self, flows: u64, hold: HoldTimes) {
        if self.state == State::Serving {
            return;
        }
        self.state = State::Serving;
        self.summary = Summary { flows, hold, ..self.summary };
        self.send(ToSource::Joined);
        self.actions.push_back(TargetAction::ProposeServed(self.summary));
    }

    fn mismatch(&mut self) {
        let (State::Joining, Some(session)) = (&self.state, self.session) else { return };
        self.mismatches += 1;
        if self.mismatches >= MISMATCHES_MAX {
            return self.refused(format!("{MISMATCHES_MAX} copies did not match their token"));
        }
        self.state = State::Idle;
        self.session = None;
        self.send(ToSource::Mismatch { session });
    }

    fn switching(&mut self) {
        self.switching = true;
        self.open_when_copied();
    }

    fn take_over(&mut self) {
        if self.state == State::Serving || std::mem::replace(&mut self.taking_over, true) {
            return;
        }
        if matches!(self.state, State::Refused(_)) {
            return self.serve_without_flows();
        }
        self.actions.push_back(TargetAction::TakeOver);
    }

    fn ended(&mut self, ending: Ending) {
        if ending != Ending::Done {
            self.actions.push_back(TargetAction::Abandon);
        } else if self.state != State::Serving {
            // The worker that joined died before this machine was made: its flows are lost, but not its group.
            self.actions.push_back(TargetAction::Serve);
        }
        self.state = State::Over;
    }

    fn send(&mut self, message: ToSource) {
        self.actions.push_back(TargetAction::Send(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flow::Epoch;

    fn target(relaxed: bool) -> Target {
        let spec = MoveSpec {
            id: flow::MoveId(1),
            group: "1:100.64.0.0/24".parse().unwrap(),
            from: SiteId(1),
            to: SiteId(2),
            epoch: Epoch(2),
            relaxed,
        };
        Target::new(spec, None)
    }

    fn feed(target: &mut Target, inputs: impl IntoIterator<Item = TargetInput>) -> Vec<TargetAction> {
        for input in inputs {
            target.handle(input, Micros(0));
        }
        std::iter::from_fn(|| target.poll_action()).collect()
    }

    fn peer(message: ToTarget) -> TargetInput {
        TargetInput::Peer { message, wire_len: 10 }
    }

    fn offer(session: u64) -> TargetInput {
        peer(ToTarget::Offer { session, flows: 3 })
    }

    fn chunk(sequence: u64) -> TargetInput {
        peer(ToTarget::Chunk { session: 5, sequence, batch: Arc::default() })
    }

    fn copied(chunks: u64) -> TargetInput {
        peer(ToTarget::Copied { session: 5, chunks })
    }

    fn token() -> Token {
        Token { epoch: Epoch(2), flows: 3, digest: 9 }
    }

    fn handover(chunks: u64) -> TargetInput {
        let (token, missing) = (token(), vec![SiteId(3)]);
        peer(ToTarget::Handover { session: 5, chunks, token, missing, precopy_us: 1, rounds: 2 })
    }

    fn accept(next: u64) -> TargetAction {
        TargetAction::Send(ToSource::Accept { session: 5, next })
    }

    fn ack(next: u64) -> TargetAction {
        TargetAction::Send(ToSource::Ack { session: 5, next })
    }

    fn join() -> TargetAction {
        TargetAction::Join { token: token(), missing: vec![SiteId(3)] }
    }

    fn shadow() -> Target {
        let mut target = target(false);
        let expected = [TargetAction::Prepare { flows: 3 }, accept(0)];
        assert_eq!(feed(&mut target, [offer(5), TargetInput::Prepared]), expected);
        target
    }

    fn joining() -> Target {
        let mut target = shadow();
        let did = feed(&mut target, [chunk(0), handover(1), TargetInput::Installed(0)]);
        assert_eq!(did, [TargetAction::Install(0, Arc::default()), ack(1), join()]);
        target
    }

    #[test]
    fn it_joins_only_when_every_chunk_before_the_token_is_installed() {
        let mut target = shadow();
        assert_eq!(feed(&mut target, [handover(1)]), []);
        assert_eq!(feed(&mut target, [chunk(0)]), [TargetAction::Install(0, Arc::default())]);
        assert_eq!(feed(&mut target, [TargetInput::Installed(0)]), [ack(1), join()]);
    }

    #[test]
    fn more_chunks_than_the_source_has_sent_are_copied_once_more() {
        let mut target = shadow();
        feed(&mut target, [chunk(0), chunk(1)]);
        let mismatch = TargetAction::Send(ToSource::Mismatch { session: 5 });
        assert_eq!(feed(&mut target, [handover(1)]), [mismatch]);
    }

    #[test]
    fn an_empty_group_joins_on_the_token_alone() {
        assert_eq!(feed(&mut shadow(), [handover(0)]), [join()]);
    }

    #[test]
    fn the_report_carries_what_the_move_was_like() {
        let hold = HoldTimes { held: 4, us_max: 50, ..HoldTimes::default() };
        let joined = TargetInput::Joined { flows: 3, hold };
        let summary = Summary { flows: 3, bytes_on_wire: 10, precopy_us: 1, rounds: 2, hold };
        let expected = [TargetAction::Send(ToSource::Joined), TargetAction::ProposeServed(summary)];
        assert_eq!(feed(&mut joining(), [joined]), expected);
    }

    #[test]
    fn chunks_twice_or_of_another_session_are_ignored_and_gaps_asked_again() {
        let mut target = shadow();
        feed(&mut target, [chunk(0)]);
        assert_eq!(feed(&mut target, [chunk(0)]), []);
        assert_eq!(feed(&mut target, [chunk(2)]), [accept(1)]);
        let stranger = peer(ToTarget::Chunk { session: 6, sequence: 1, batch: Arc::default() });
        assert_eq!(feed(&mut target, [stranger]), []);
    }

    #[test]
    fn the_same_session_resumes_and_another_starts_from_an_empty_shadow() {
        let mut target = shadow();
        feed(&mut target, [chunk(0)]);
        assert_eq!(feed(&mut target, [offer(5)]), [accept(1)]);
        assert_eq!(feed(&mut target, [offer(6)]), [TargetAction::Prepare { flows: 3 }]);
        // An answer about the old shadow must not count for the new one.
        assert_eq!(feed(&mut target, [TargetInput::Installed(0)]), []);
    }

    #[test]
    fn a_refusal_holds_for_the_rest_of_the_move() {
        let mut target = target(false);
        let refuse = TargetAction::Send(ToSource::Refuse { reason: "full".into() });
        let did = feed(&mut target, [offer(5), TargetInput::Refused("full".into())]);
        assert_eq!(did, [TargetAction::Prepare { flows: 3 }, refuse.clone()]);
        assert_eq!(feed(&mut target, [offer(6)]), [refuse]);
    }

    #[test]
    fn the_third_mismatch_refuses() {
        let mut target = joining();
        let mismatch = TargetAction::Send(ToSource::Mismatch { session: 5 });
        assert_eq!(feed(&mut target, [TargetInput::Mismatch]), [mismatch]);
        for _ in 1..MISMATCHES_MAX {
            feed(&mut target, [offer(5), TargetInput::Prepared, handover(0), TargetInput::Mismatch]);
        }
        assert!(matches!(target.state, State::Refused(_)));
    }

    #[test]
    fn one_that_serves_already_says_so() {
        let mut serving = joining();
        feed(&mut serving, [TargetInput::Joined { flows: 3, hold: HoldTimes::default() }]);
        assert_eq!(feed(&mut serving, [offer(9)]), [TargetAction::Send(ToSource::Joined)]);
        let mut reborn = Target::new(*serving.spec(), Some(3));
        let summary = Summary { flows: 3, ..Summary::default() };
        let expected = [TargetAction::Send(ToSource::Joined), TargetAction::ProposeServed(summary)];
        assert_eq!(feed(&mut reborn, []), expected);
    }

    #[test]
    fn relaxed_opens_at_the_flip_once_all_flows_are_there_whichever_comes_first() {
        let copy = || [offer(5), TargetInput::Prepared, chunk(0), copied(1)];
        let mut early = target(true);
        feed(&mut early, [TargetInput::Switching]);
        assert!(!feed(&mut early, copy()).contains(&TargetAction::Open));
        assert_eq!(feed(&mut early, [TargetInput::Installed(0)]), [ack(1), TargetAction::Open]);
        let mut late = target(true);
        feed(&mut late, copy());
        assert_eq!(feed(&mut late, [TargetInput::Installed(0)]), [ack(1)]);
        assert_eq!(feed(&mut late, [TargetInput::Switching, TargetInput::Switching]), [TargetAction::Open]);
        let mut empty = target(true);
        feed(&mut empty, [TargetInput::Switching, offer(5), TargetInput::Prepared]);
        assert_eq!(feed(&mut empty, [copied(0), copied(0)]), [TargetAction::Open]);
    }

    #[test]
    fn relaxed_that_begins_anew_after_the_flip_opens_when_all_flows_are_there_again() {
        let mut opened = target(true);
        feed(&mut opened, [offer(6), TargetInput::Prepared, TargetInput::Switching]);
        let did = feed(&mut opened, [offer(5), TargetInput::Prepared]);
        assert_eq!(did, [TargetAction::Prepare { flows: 3 }, accept(0)]);
        // The copy before had been whole.
        assert_eq!(feed(&mut opened, [peer(ToTarget::Copied { session: 6, chunks: 0 })]), []);
        feed(&mut opened, [chunk(0), chunk(1), copied(2)]);
        assert_eq!(feed(&mut opened, [TargetInput::Installed(0)]), [ack(1)]);
        assert_eq!(feed(&mut opened, [TargetInput::Installed(1)]), [ack(2), TargetAction::Open]);
    }

    #[test]
    fn strict_never_opens_before_it_joins() {
        let mut target = shadow();
        assert_eq!(feed(&mut target, [TargetInput::Switching, copied(0)]), []);
    }

    #[test]
    fn an_ending_without_the_group_gives_the_shadow_up() {
        assert_eq!(feed(&mut shadow(), [TargetInput::Ended(Ending::Aborted)]), [TargetAction::Abandon]);
        assert_eq!(
            feed(&mut shadow(), [TargetInput::Ended(Ending::TakenBack(Epoch(3)))]),
            [TargetAction::Abandon]
        );
    }

    #[test]
    fn an_ending_as_done_is_served_also_when_another_machine_joined() {
        let done = || TargetInput::Ended(Ending::Done);
        let mut serving = joining();
        feed(&mut serving, [TargetInput::Joined { flows: 3, hold: HoldTimes::default() }]);
        assert_eq!(feed(&mut serving, [done()]), []);
        for mut other in [target(false), shadow(), joining()] {
            assert_eq!(feed(&mut other, [done()]), [TargetAction::Serve]);
        }
    }

    #[test]
    fn a_dead_source_is_taken_over() {
        assert_eq!(feed(&mut shadow(), [TargetInput::TakeOver]), [TargetAction::TakeOver]);
    }
    #[test]
    fn the_group_of_a_dead_source_is_served_even_when_there_is_no_shadow_of_it() {
        let served = [TargetAction::Serve, TargetAction::ProposeServed(Summary::default())];
        let mut lost = target(false);
        assert_eq!(feed(&mut lost, [TargetInput::TakeOver]), [TargetAction::TakeOver]);
        assert_eq!(feed(&mut lost, [TargetInput::Refused("not here".into())]), served);
        let mut refused = target(false);
        feed(&mut refused, [offer(5), TargetInput::Refused("full".into())]);
        assert_eq!(feed(&mut refused, [TargetInput::TakeOver]), served);
    }
}
