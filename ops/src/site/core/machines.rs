//! What the machines of moves want done, and what is said to them.

use dataplane::control::{Ordering, Request};
use flow::{Epoch, GroupId, Micros, MoveId, SiteId, WorkerId};
use placement::core::{Command, MoveSummary};
use transfer::core::{
    Ending, MoveSpec, Proof, SourceAction, SourceInput, TargetAction, TargetInput, ToSource, ToTarget,
};

use super::{Agent, Bounds, Output};

impl Agent {
    pub(super) fn from_source(
        &mut self,
        id: MoveId,
        from: SiteId,
        message: ToTarget,
        wire_len: u64,
        now: Micros,
    ) {
        // A target whose worker does not answer is not there.
        if self.is_deaf(id, &message, now) {
            return;
        }
        if !self.expects(id, from) || !self.incoming.contains_key(&id) {
            // Not heard of it yet, or long over: the source offers again or hears of the end.
            return self.outputs.push_back(Output::ToSource(id, ToSource::Unknown));
        }
        self.feed_target(id, TargetInput::Peer { message, wire_len }, now);
    }

    pub(super) fn feed_source_of(&mut self, worker: WorkerId, id: MoveId, input: SourceInput, now: Micros) {
        if self.outgoing.get(&id).is_some_and(|out| out.worker == worker) {
            self.feed_source(id, input, now);
        }
    }

    pub(super) fn feed_target_of(&mut self, worker: WorkerId, id: MoveId, input: TargetInput, now: Micros) {
        if self.incoming.get(&id).is_some_and(|incoming| incoming.worker == worker) {
            self.feed_target(id, input, now);
        }
    }

    pub(super) fn feed_source(&mut self, id: MoveId, input: SourceInput, now: Micros) {
        if let Some(out) = self.outgoing.get_mut(&id) {
            out.machine.handle(input, now);
            self.drain_source(id, now);
        }
    }

    pub(super) fn feed_target(&mut self, id: MoveId, input: TargetInput, now: Micros) {
        if let Some(incoming) = self.incoming.get_mut(&id) {
            incoming.machine.handle(input, now);
            self.drain_target(id, now);
        }
    }

    pub(super) fn drain_source(&mut self, id: MoveId, now: Micros) {
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

    pub(super) fn drain_target(&mut self, id: MoveId, now: Micros) {
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
        let (group, session, credit) = (spec.group, out.machine.session(), out.machine.credit());
        let request = match action {
            SourceAction::Send(message) => return self.send_to_target(id, message, now),
            SourceAction::ProposeSwitch => return self.propose_switch(id, now),
            SourceAction::ProposeAbort(reason) => return self.propose_abort(id, reason, now),
            SourceAction::ProposeTakeBack(proof) => return self.propose_take_back(id, &spec, proof, now),
            SourceAction::CopyStart => Request::CopyStart { group, move_id: id, session, credit },
            SourceAction::Credit(credit) => Request::Credit { group, move_id: id, session, credit },
            SourceAction::CopyRound => Request::CopyRound { group, move_id: id },
            SourceAction::Arm(awaited) => {
                self.serve_lost(id, worker, group);
                self.arm_request(
                    id,
                    &spec,
                    Arming { awaited, session, credit, bound_us: u64::MAX, again: false },
                )
            }
            SourceAction::ArmAgain(awaited) => self.arm_request(
                id,
                &spec,
                Arming { awaited, session, credit, bound_us: u64::MAX, again: true },
            ),
            SourceAction::CutLate(awaited) => {
                self.arm_request(id, &spec, Arming { awaited, session, credit, bound_us: 0, again: false })
            }
            SourceAction::Disarm => Request::Disarm { group, move_id: id, withdraw: false },
            SourceAction::Withdraw => Request::Disarm { group, move_id: id, withdraw: true },
            SourceAction::Forget => self.forget_request(group, id, spec.epoch, spec.to),
            SourceAction::Serve(epoch) => {
                self.set_local(group, Some(worker));
                return self.serve(worker, group, epoch);
            }
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    fn arm_request(&self, move_id: MoveId, spec: &MoveSpec, arming: Arming) -> Request {
        let MoveSpec { group, epoch, to: target, .. } = *spec;
        let Arming { awaited, bound_us, session, credit, again } = arming;
        Request::Arm { group, move_id, epoch, target, awaited, bound_us, session, credit, again }
    }

    /// The target has accepted a copy from nothing, so it does not serve: this site goes on under its epoch.
    fn serve_lost(&mut self, id: MoveId, worker: WorkerId, group: GroupId) {
        let lost = self.outgoing.get_mut(&id).is_some_and(|out| std::mem::take(&mut out.lost));
        if let Some(epoch) = self.groups.get(&group).filter(|_| lost).map(|g| g.epoch) {
            self.set_local(group, Some(worker));
            self.serve(worker, group, epoch);
        }
    }

    pub(super) fn forget_request(
        &self,
        group: GroupId,
        move_id: MoveId,
        epoch: Epoch,
        target: SiteId,
    ) -> Request {
        let Bounds { relay_us, relay_late_us, .. } = self.bounds;
        // To another worker of this site no old path leads.
        let ingresses = if target == self.site { Vec::new() } else { self.sites.keys().copied().collect() };
        Request::Forget { group, move_id, epoch, target, relay_us, ingresses, relay_late_us }
    }

    /// For a target that was to serve under this epoch.
    pub(super) fn abandon_request(&self, group: GroupId, move_id: MoveId, epoch: Epoch) -> Request {
        let Bounds { relay_us, relay_late_us, .. } = self.bounds;
        // A move that was taken back leaves a greater epoch. Before its flip was committed no ingress has led here.
        let led_here =
            !move_id.is_local() && self.groups.get(&group).is_none_or(|known| known.epoch >= epoch);
        let relay_late_us = if led_here { relay_late_us } else { 0 };
        Request::Abandon { group, move_id, relay_us, relay_late_us }
    }

    fn send_to_target(&mut self, id: MoveId, message: ToTarget, now: Micros) {
        if id.is_local() {
            if !self.is_deaf(id, &message, now) {
                self.feed_target(id, TargetInput::Peer { message, wire_len: 0 }, now);
            }
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
            Proof::NeverGiven => placement::core::Proof::NeverGiven,
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
            TargetAction::Abandon => self.abandon_request(group, id, spec.epoch),
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
}

/// How a worker is to cut.
struct Arming {
    awaited: Vec<SiteId>,
    bound_us: u64,
    session: u64,
    credit: u64,
    again: bool,
}
