//! Workers come, go, and say what they have.

use std::collections::BTreeSet;

use dataplane::control::{Event, GroupStatus, Phase, Request, Stats};
use flow::{Epoch, GroupId, Micros, MoveId, WorkerId};
use placement::core::Command;
use transfer::core::{MoveSpec, SourceInput, TargetInput};

use super::{Agent, Incoming, Outgoing, Output, Worker, service_spec};

impl Agent {
    pub(super) fn worker_up(&mut self, id: WorkerId, boot: u64, now: Micros) {
        let worker = self.workers.entry(id).or_default();
        let reborn = worker.boot != boot && worker.boot != 0;
        *worker = Worker { up: true, boot, load: worker.load, up_since: Some(now), ..Worker::default() };
        if reborn {
            self.worker_lost(id);
        }
        self.drop_machines_of(id);
        let services: Vec<_> = self.services.values().map(service_spec).collect();
        self.outputs.push_back(Output::Worker(id, Request::Services(services)));
        self.ask_status();
    }

    /// Asks every worker what it has; until all have answered nothing is placed or begun.
    pub(super) fn ask_status(&mut self) {
        for (id, worker) in self.workers.iter_mut().filter(|(_, worker)| worker.up) {
            worker.fresh = false;
            self.outputs.push_back(Output::Worker(*id, Request::Status));
        }
    }

    /// Placement was heard, and every worker that is there has said what it has.
    pub(super) fn is_settled(&self) -> bool {
        self.synced && self.workers.values().all(|worker| worker.fresh || !worker.up)
    }

    /// Asks those once more who said what cannot have been true any more when it was heard.
    pub(super) fn ask_unexplained(&mut self) {
        for id in std::mem::take(&mut self.unexplained) {
            self.ask_status_of(id);
        }
    }

    fn ask_status_of(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id).filter(|worker| worker.up) {
            worker.fresh = false;
            self.outputs.push_back(Output::Worker(id, Request::Status));
        }
    }

    /// The connection to the worker broke, and what it said meanwhile is lost: its machines are made anew from its
    /// next status. Of a move between workers whose target it was the source still has its part.
    pub(super) fn drop_machines_of(&mut self, worker: WorkerId) {
        let stale: Vec<_> = (self.outgoing.iter().filter(|(_, o)| o.worker == worker).map(|(id, _)| *id))
            .chain(self.incoming.iter().filter(|(_, i)| i.worker == worker).map(|(id, _)| *id))
            .collect();
        for id in stale {
            if let Some(out) = self.outgoing.remove(&id) {
                self.outputs.push_back(Output::Hangup(id));
                self.note_voided(id, &out);
                if id.is_local() {
                    // Whether it still serves, or the other one will, the source has to say itself.
                    self.doubts.insert(id, (out.machine.spec().group, out.worker));
                    if out.worker != worker {
                        self.ask_status_of(out.worker);
                    }
                }
            }
            self.incoming.remove(&id);
            if id.is_local() {
                self.markers.remove(&id);
            }
        }
    }

    pub(super) fn worker_down(&mut self, id: WorkerId, now: Micros) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        *worker = Worker { up: false, ready: false, fresh: false, down_since: Some(now), ..*worker };
        self.drop_machines_of(id);
        // It may have been the last whose answer was waited for.
        self.resync(now);
    }

    /// The process is another one: what it had is gone.
    pub(super) fn worker_lost(&mut self, id: WorkerId) {
        self.local.retain(|_, worker| *worker != id);
        self.unserved.retain(|_, worker| *worker != id);
        self.doubts.retain(|_, (_, worker)| *worker != id);
        let lost = |machine_worker: WorkerId| machine_worker == id;
        let ended: Vec<_> = self.outgoing.iter().filter(|(_, o)| lost(o.worker)).map(|(id, _)| *id).collect();
        for move_id in ended {
            let Some(out) = self.outgoing.remove(&move_id) else { continue };
            self.outputs.push_back(Output::Hangup(move_id));
            if move_id.is_local() {
                self.incoming.remove(&move_id);
            } else if !self.note_voided(move_id, &out) {
                let reason = format!("worker {id} of the source is gone, or was restarted");
                let abort = Command::Abort { move_id, by: Some(self.site), reason };
                self.outputs.push_back(Output::Propose(abort));
            }
        }
        self.incoming.retain(|_, incoming| !lost(incoming.worker));
        self.plan_dirty = true;
    }

    /// The proposal to take the group back outlives the machine and the worker that withdrew the token: another worker must not give one
    /// to the target meanwhile. The same worker, when it is back, knows by itself.
    fn note_voided(&mut self, id: MoveId, out: &Outgoing) -> bool {
        let voided = !id.is_local() && out.machine.is_voided() && self.moves.contains_key(&id);
        if voided {
            self.voided.insert(id);
        }
        voided
    }

    pub(super) fn worker_said(&mut self, worker: WorkerId, event: Event, now: Micros) {
        match event {
            Event::Status { groups, .. } => self.status(worker, groups, now),
            Event::Stats(stats) => self.stats(worker, *stats, now),
            Event::Records { move_id, session, batch, .. } => {
                if self.is_session(move_id, session) {
                    self.feed_source_of(worker, move_id, SourceInput::Records(batch), now);
                }
            }
            Event::RoundEnd { move_id, session, dirty, flows, .. } => {
                if self.is_session(move_id, session) {
                    self.feed_source_of(worker, move_id, SourceInput::RoundEnd { dirty, flows }, now);
                }
            }
            Event::Cut { move_id, session, token, missing, .. } => {
                let present = self.is_session(move_id, session);
                let cut = if present { SourceInput::Cut { token, missing } } else { SourceInput::CutBefore };
                self.feed_source_of(worker, move_id, cut, now);
            }
            Event::Disarmed { move_id, cut, withdrawn, .. } => {
                self.feed_source_of(worker, move_id, SourceInput::Disarmed { cut, withdrawn }, now);
            }
            Event::Prepared { move_id, .. } => self.prepared(worker, move_id),
            Event::Refused { group, move_id, reason } => {
                self.worker_refused(worker, group, move_id, reason, now)
            }
            Event::Installed { move_id, sequence, .. } => {
                self.feed_target_of(worker, move_id, TargetInput::Installed(sequence), now);
            }
            Event::Joined { group, move_id, flows, hold, .. } => {
                self.counts.hold_us_max = self.counts.hold_us_max.max(hold.us_max);
                if let Some(incoming) = self.incoming.get(&move_id) {
                    let MoveSpec { group, epoch, .. } = *incoming.machine.spec();
                    self.served.insert(group, epoch);
                } else if let Some(own) = self.groups.get(&group).filter(|group| group.owner == self.site) {
                    // It took over a copy that a move between workers had left behind.
                    self.note_served(worker, group, own.epoch);
                }
                self.feed_target_of(worker, move_id, TargetInput::Joined { flows, hold }, now);
            }
            Event::Mismatch { move_id, .. } => {
                self.feed_target_of(worker, move_id, TargetInput::Mismatch, now)
            }
            Event::Gone { group, .. } => self.gone(worker, group),
            Event::Serving { group, epoch } => {
                self.note_served(worker, group, epoch);
                if self.unserved.get(&group) == Some(&worker) {
                    self.unserved.remove(&group);
                    self.drive_half(&group, now);
                }
            }
            Event::Abandoned { group, move_id, joined: true } => self.joined_in_vain(worker, group, move_id),
            Event::Hello { .. } | Event::Abandoned { joined: false, .. } | Event::ServicesSet => {}
        }
    }

    /// What was exported for a copy that was given up says nothing about the one in hand.
    fn is_session(&self, id: MoveId, session: u64) -> bool {
        self.outgoing.get(&id).is_some_and(|out| out.machine.session() == session)
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

    /// A worker relays no longer: the switch need not deliver to it any more, unless it got a new task. What another worker is still to
    /// give up is none.
    fn gone(&mut self, worker: WorkerId, group: GroupId) {
        let owned = self.groups.get(&group).is_some_and(|g| g.owner == self.site);
        let is_task =
            |incoming: &Incoming| incoming.worker == worker && incoming.machine.spec().group == group;
        let coming = self.incoming.values().any(is_task);
        if !owned && !coming && self.local.get(&group) == Some(&worker) {
            self.set_local(group, None);
        }
    }

    fn note_served(&mut self, worker: WorkerId, group: GroupId, epoch: Epoch) {
        if self.local.get(&group) == Some(&worker) {
            self.served.insert(group, epoch);
        }
    }

    /// The worker serves what was taken back meanwhile: an operator said that this site was fenced. It forgets that.
    fn joined_in_vain(&mut self, worker: WorkerId, id: GroupId, move_id: MoveId) {
        if let Some(group) = self.groups.get(&id).filter(|group| group.owner != self.site) {
            let forget = self.forget_request(id, move_id, group.epoch, group.owner);
            self.outputs.push_back(Output::Worker(worker, forget));
        }
    }

    fn stats(&mut self, worker: WorkerId, stats: Stats, now: Micros) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.load = stats.groups.iter().map(|load| load.packets).sum();
            worker.said = Some((now, stats.busy, stats.groups_known));
            worker.note_link(stats.link_down, now);
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
        self.doubts.retain(|_, (_, source)| *source != worker);
        self.drop_stale_local(worker, &groups);
        self.serve_again(worker, &groups);
        for status in groups {
            // Whoever serves or may serve comes before whoever only relays.
            let relays = matches!(status.phase, Phase::Relaying | Phase::Tombstone);
            if self.is_local_move_known(status.move_id) || self.adopt(worker, &status) {
                continue;
            }
            if self.abandons(worker, &status) || self.forgets(worker, &status) {
                continue;
            }
            if self.is_taken_over(worker, &status) {
                self.take_away(worker, &status);
                continue;
            }
            if let (Some(group), true) = (self.gone_since(&status), self.synced) {
                self.align(worker, status, group);
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
            if matches!(status.phase, Phase::Serving | Phase::Copying | Phase::Draining) {
                self.note_served(worker, status.group, status.epoch);
            }
            if self.synced {
                self.reconcile(worker, status, now);
            }
        }
        self.try_sync(now);
        self.resync(now);
    }

    /// The worker serves a group that another serves too, or was told to, or that a move brings to another: it was taken for dead
    /// meanwhile. Or it has its part of a move between two workers of which one was, so that a third has the group.
    fn is_taken_over(&self, worker: WorkerId, status: &GroupStatus) -> bool {
        let serves = matches!(status.phase, Phase::Serving | Phase::Copying | Phase::Draining);
        let in_local_move = status.move_id.is_some_and(MoveId::is_local) && status.phase != Phase::Tombstone;
        (serves || in_local_move) && self.is_had_by_another(worker, status)
            || serves && self.comes_to_another(worker, status)
            || serves && self.leaves_another(worker, &status.group)
    }

    /// While the worker had its part of a move between workers, the group went to another site: it is as that has it.
    fn gone_since(&self, status: &GroupStatus) -> Option<placement::core::Group> {
        let in_local_move = status.move_id.is_some_and(MoveId::is_local) && status.phase != Phase::Tombstone;
        let group = self.groups.get(&status.group).filter(|_| in_local_move)?;
        let is_gone = group.owner != self.site && group.epoch > status.epoch && group.move_id.is_none();
        is_gone.then_some(*group)
    }

    /// A move to another site has begun from another worker.
    pub(super) fn leaves_another(&self, worker: WorkerId, group: &GroupId) -> bool {
        self.outgoing
            .iter()
            .any(|(id, part)| !id.is_local() && part.worker != worker && part.machine.spec().group == *group)
    }

    /// The worker gives up what others have, and passes on what still comes.
    pub(super) fn take_away(&mut self, worker: WorkerId, status: &GroupStatus) {
        let (group, relay_us) = (status.group, self.bounds.relay_us);
        let move_id = status.move_id.unwrap_or_default();
        let request = match status.phase {
            Phase::Serving | Phase::Copying | Phase::Draining => Request::Yield { group, relay_us },
            Phase::Shadow | Phase::Open => self.abandon_request(group, move_id, status.epoch),
            Phase::Relaying => self.forget_request(group, move_id, status.epoch, self.site),
            Phase::Tombstone => return,
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    /// Another worker serves what this one speaks of, or was told to.
    fn is_had_by_another(&self, worker: WorkerId, status: &GroupStatus) -> bool {
        let other = self.local.get(&status.group).filter(|other| **other != worker && self.is_ready(**other));
        let served = self.served.get(&status.group).is_some_and(|epoch| *epoch >= status.epoch);
        let was_told = self.unserved.get(&status.group) == other;
        other.is_some() && (served || was_told || self.moves_between_others(worker, &status.group))
    }

    /// Two other workers of this site move the group.
    pub(super) fn moves_between_others(&self, worker: WorkerId, group: &GroupId) -> bool {
        let goes_to_another = |id: &MoveId| self.incoming.get(id).is_some_and(|part| part.worker != worker);
        self.outgoing.iter().any(|(id, part)| {
            id.is_local()
                && part.machine.spec().group == *group
                && part.worker != worker
                && goes_to_another(id)
        })
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
            let owned = match self.groups.get(&group) {
                Some(known) => known.owner == self.site,
                // What is no more is relayed, or waits for what placement wants.
                None => !self.known || self.is_to_change(&group),
            };
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
    pub(super) fn ask_again(&mut self) {
        for worker in self.ready_workers().collect::<Vec<_>>() {
            self.serve_again(worker, &[]);
        }
    }

    /// What was cut is given away from another worker by now, because this one was taken for dead.
    fn forgets(&mut self, worker: WorkerId, status: &GroupStatus) -> bool {
        let Some(move_id) = status.move_id.filter(|_| status.phase == Phase::Relaying) else { return false };
        let machine = self.outgoing.get(&move_id).filter(|out| !move_id.is_local() && out.worker != worker);
        let Some(spec) = machine.map(|out| *out.machine.spec()) else { return false };
        let forget = self.forget_request(status.group, move_id, spec.epoch, spec.to);
        self.outputs.push_back(Output::Worker(worker, forget));
        true
    }

    /// A later move brings the group to another worker.
    fn comes_to_another(&self, worker: WorkerId, status: &GroupStatus) -> bool {
        let of_group = |(id, incoming): &(&MoveId, &Incoming)| {
            !id.is_local() && incoming.machine.spec().group == status.group
        };
        self.incoming.iter().filter(of_group).any(|(_, incoming)| incoming.worker != worker)
    }

    /// A shadow whose move was given to another worker while this one was away is of no use, also when that has served it since.
    fn abandons(&mut self, worker: WorkerId, status: &GroupStatus) -> bool {
        let Some(move_id) = status.move_id.filter(|_| matches!(status.phase, Phase::Shadow | Phase::Open))
        else {
            return false;
        };
        let is_elsewhere = match self.incoming.get(&move_id) {
            Some(incoming) => incoming.worker != worker,
            None => {
                !move_id.is_local()
                    && (self.is_had_by_another(worker, status) || self.comes_to_another(worker, status))
            }
        };
        if !is_elsewhere {
            return false;
        }
        let abandon = self.abandon_request(status.group, move_id, status.epoch);
        self.outputs.push_back(Output::Worker(worker, abandon));
        true
    }

    fn is_local_move_known(&self, id: Option<MoveId>) -> bool {
        id.is_some_and(|id| id.is_local() && self.outgoing.contains_key(&id))
    }
}
