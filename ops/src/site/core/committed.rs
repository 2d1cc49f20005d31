//! What placement has committed, and what follows from it at this site.

use std::collections::BTreeSet;

use dataplane::control::Request;
use flow::nat::NatSlices;
use flow::{Epoch, GroupId, Micros, MoveId, SiteId, WorkerId};
use placement::core::{Change, Group, Move, MoveOutcome, MovePhase, Service};
use switchctl::OldPath;
use transfer::core::{Ending, Found, Source, SourceInput, Target, TargetInput, ToSource};

use super::{Agent, Incoming, Marker, Outgoing, Output, service_spec, spec_of};

/// Moves of a group that its ingress did not hear of, for which markers are sent: the latest ones.
const UNHEARD_MAX: u64 = 4;

/// Where the rules lead a group, under which epoch, and the move that leads it away from there and has not flipped.
#[derive(Clone, Copy, Debug)]
struct Way {
    group: GroupId,
    to: SiteId,
    epoch: Epoch,
    unflipped: Option<MoveId>,
}

impl Agent {
    pub(super) fn placement(&mut self, reset: bool, changes: Vec<Change>, now: Micros) {
        let ways = if reset { self.ways() } else { Vec::new() };
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
                Change::SiteGone(id) => {
                    self.sites.remove(&id);
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
            self.forget_gone();
            self.end_missing(now);
            self.owe_unheard(&ways);
            self.resync(now);
        }
        self.reshape(now);
    }

    /// By which ways the rules lead, or will once those that were made are in force.
    fn ways(&self) -> Vec<Way> {
        let flipped = |mv: &&Move| mv.phase == MovePhase::Switching && !self.flips.contains_key(&mv.id);
        let way = |(id, group): (&GroupId, &Group)| {
            let steer = *self.steer.get(id)?;
            let moving = group.move_id.and_then(|id| self.moves.get(&id));
            let flipped = moving.filter(flipped);
            let unflipped = moving.filter(|mv| flipped.is_none() && mv.from == steer).map(|mv| mv.id);
            Some(Way { group: *id, to: steer, epoch: flipped.map_or(group.epoch, |mv| mv.epoch), unflipped })
        };
        self.groups.iter().filter_map(way).collect()
    }

    /// A snapshot says where groups are, not by which moves they went there while this agent heard nothing. Whoever took them over waits
    /// for its marker: one for each of these moves goes down the way that the rules led until now, from owner to owner.
    fn owe_unheard(&mut self, ways: &[Way]) {
        for way in ways {
            let Some(group) = self.groups.get(&way.group) else { continue };
            // To this site no group comes without this agent, and what began here, a worker here ends.
            if way.to == self.site || self.steer.get(&way.group) == Some(&way.to) {
                continue;
            }
            let last = group.epoch.0;
            let first = (way.epoch.0 + 1).max(last.saturating_sub(UNHEARD_MAX - 1));
            for epoch in first..=last {
                let heard = way.unflipped.filter(|_| epoch == way.epoch.0 + 1);
                let (epoch, old) = (Epoch(epoch), OldPath::Remote(way.to));
                let marker = Marker { group: way.group, epoch, old, tag: self.tag + 1, at: None };
                self.unheard.push((heard.unwrap_or(MoveId::UNHEARD), marker));
            }
            self.plan_dirty = true;
        }
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
        self.sites.clear();
        self.moves.retain(|id, _| moves.contains(id));
        // A flip that is not in force yet still owes its marker, whatever became of its move.
        self.markers.retain(|id, marker| moves.contains(id) || id.is_local() || marker.at.is_none());
        self.flips.retain(|id, _| moves.contains(id));
        self.voided.retain(|id| moves.contains(id));
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
        // Outside slices and guards of pools follow from the service.
        self.compiled = None;
        self.plan_dirty = true;
    }

    pub(super) fn group(&mut self, group: Group) {
        if self.must_wait(&group) {
            return;
        }
        let switching = group.move_id.and_then(|id| self.moves.get(&id));
        let switching =
            switching.filter(|m| m.phase == MovePhase::Switching && !self.flips.contains_key(&m.id));
        let steer = switching.map_or(group.owner, |m| m.to);
        // Rules and their tunnel keys name the epoch, which a move that was taken back before its flip changes too.
        let before = self.groups.insert(group.id, group);
        self.plan_dirty |= before.is_some_and(|before| before.epoch != group.epoch);
        self.set_steer(group.id, steer);
        self.place(group.id);
    }

    pub(super) fn set_steer(&mut self, group: GroupId, site: SiteId) {
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

    pub(super) fn flip_due(&mut self, now: Micros) {
        let due: Vec<_> = self.flips.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.flips.remove(&id);
            if let Some(mv) = self.moves.get(&id).cloned() {
                self.flip(&mv);
            }
        }
    }

    /// The ingress part: steer to the target, then send a marker down the old path.
    pub(super) fn flip(&mut self, mv: &Move) {
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
    pub(super) fn drive(&mut self, mv: &Move, now: Micros) {
        // A move between workers ends first: then this one is begun from the worker that has the group.
        // So does a split or a merge.
        if !self.is_settled() || self.is_moving_locally(&mv.group) || self.wanted.contains_key(&mv.group) {
            return;
        }
        let begins = !self.stopping || mv.phase == MovePhase::Switching;
        let may_leave = !self.is_being_parted(&mv.group) && !self.voided.contains(&mv.id);
        if begins && mv.from == self.site && !self.outgoing.contains_key(&mv.id) && may_leave {
            self.start_source(mv, now);
        }
        if begins && mv.to == self.site && !self.incoming.contains_key(&mv.id) {
            self.start_target(mv, now);
        }
        if mv.phase == MovePhase::Switching {
            let flip_in = self.flips.get(&mv.id).map_or(Micros(0), |at| at.since(now));
            self.feed_source(mv.id, SourceInput::Switching { ingresses: mv.ingresses.clone(), flip_in }, now);
            self.feed_target(mv.id, TargetInput::Switching, now);
        }
        if mv.take_over {
            self.feed_target(mv.id, TargetInput::TakeOver, now);
        }
    }

    /// A worker that was told to serve the group, or its other half, has not said yet that it does: it may still serve the whole that the
    /// two come from, and would go on with it for the half that stays.
    fn is_being_parted(&self, id: &GroupId) -> bool {
        let other = id.prefix.sibling().map(|prefix| GroupId { prefix, ..*id });
        self.unserved.contains_key(id) || other.is_some_and(|other| self.unserved.contains_key(&other))
    }

    /// A move of the group, or of its other half, may have waited until its worker serves it.
    pub(super) fn drive_half(&mut self, id: &GroupId, now: Micros) {
        let waits = |mv: &&Move| {
            mv.group == *id || mv.group.service == id.service && mv.group.prefix.sibling() == Some(id.prefix)
        };
        let waiting: Vec<_> = self.moves.values().filter(waits).cloned().collect();
        waiting.iter().for_each(|mv| self.drive(mv, now));
    }

    fn start_source(&mut self, mv: &Move, now: Micros) {
        // Without a worker the one that had the group died, perhaps after its cut: the target may serve. Only when it
        // accepts a copy from nothing is it known that it does not, and another worker may serve meanwhile.
        let lost = mv.phase == MovePhase::Switching && !self.local.contains_key(&mv.group);
        let worker = if lost { self.least_loaded() } else { self.local.get(&mv.group).copied() };
        let Some(worker) = worker else { return };
        let found = if lost { Found::Lost } else { Found::Serving };
        let flows = self.loads.get(&mv.group).map_or(0, |load| load.flows);
        let (waits, pace) = (self.bounds.waits(), self.bounds.pace);
        let machine = Source::new(spec_of(mv), waits, pace, self.next_incarnation(), flows, found, now);
        self.add_source(mv.id, machine, worker, mv.to);
        if let Some(out) = self.outgoing.get_mut(&mv.id) {
            out.lost = lost;
        }
    }

    pub(super) fn add_source(&mut self, id: MoveId, machine: Source, worker: WorkerId, to: SiteId) {
        self.outgoing.insert(id, Outgoing { machine, worker, lost: false });
        if !id.is_local() {
            self.outputs.push_back(Output::Connect(id, to));
        }
    }

    fn start_target(&mut self, mv: &Move, now: Micros) {
        // A worker that still relays for the group gets stragglers: they must not meet one that knows nothing yet.
        // One that does not answer for a moment may have joined already, so nobody else gets its part meanwhile.
        let known = self.local.get(&mv.group).copied().or_else(|| self.relays_part_of(&mv.group));
        let worker = match known {
            Some(worker) if self.is_ready(worker) => Some(worker),
            Some(worker) if self.workers.contains_key(&worker) => None,
            _ => self.least_loaded(),
        };
        let Some(worker) = worker else { return };
        self.add_target(mv.id, Target::new(spec_of(mv), None), worker, now);
    }

    pub(super) fn add_target(&mut self, id: MoveId, machine: Target, worker: WorkerId, now: Micros) {
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
        self.voided.remove(&id);
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
    pub(super) fn place(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id).copied() else { return };
        if group.owner != self.site || !self.is_settled() {
            return;
        }
        let flipped = |id: MoveId| self.moves.get(&id).is_some_and(|mv| mv.phase == MovePhase::Switching);
        if group.move_id.is_some_and(flipped) {
            // The target may serve by now: see [`Self::start_source`].
            return;
        }
        if let Some(&worker) = self.local.get(&id) {
            // It may only relay: the group was given away, and came back without a move.
            if self.served.get(&id) != Some(&group.epoch) && self.is_idle(&id) && self.is_ready(worker) {
                self.serve(worker, id, group.epoch);
            }
            return;
        }
        // A move that ends here has its worker: that one is told when the machine hears of the end.
        if self.is_moving(&id) {
            return;
        }
        if let Some(worker) = self.least_loaded() {
            self.set_local(id, Some(worker));
            self.serve(worker, id, group.epoch);
        }
    }

    /// Nothing is being done about the group at this site.
    fn is_idle(&self, id: &GroupId) -> bool {
        let moves = self.groups.get(id).is_some_and(|group| group.move_id.is_some());
        !moves && !self.is_moving(id) && !self.is_to_change(id)
    }

    /// Tells a worker to serve; the site is not ready before it has said that it does.
    pub(super) fn serve(&mut self, worker: WorkerId, group: GroupId, epoch: Epoch) {
        self.unserved.insert(group, worker);
        self.outputs.push_back(Output::Worker(worker, Request::Serve { group, epoch }));
    }
}
