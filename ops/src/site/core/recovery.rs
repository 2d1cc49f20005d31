//! A new agent, or one whose worker is back, takes up what it finds.

use std::collections::BTreeMap;

use dataplane::control::{GroupStatus, Phase, Request};
use flow::{GroupId, Micros, MoveId, WorkerId};
use placement::core::{Group, Move, MovePhase};
use transfer::core::{Found, Source, SourceInput, Target};

use super::{Agent, BALANCE_INTERVAL, GATHER_BOUND, Output, spec_of};

impl Agent {
    /// Goes ahead when placement and all workers were heard, or the others had their time.
    pub(super) fn try_sync(&mut self, now: Micros) {
        if self.synced || !self.known {
            return;
        }
        let ready = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.ready);
        let all = self.expected.iter().all(ready) && self.workers.values().all(|w| w.ready || !w.up);
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
    pub(super) fn resync(&mut self, now: Micros) {
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
    pub(super) fn reconcile(&mut self, worker: WorkerId, status: GroupStatus, now: Micros) {
        if let Some(mv) = status.move_id.and_then(|id| self.moves.get(&id)).cloned() {
            return self.resume(worker, &status, &mv, now);
        }
        let Some(group) = self.groups.get(&status.group).copied() else { return };
        let mv = group.move_id.and_then(|id| self.moves.get(&id)).cloned();
        let serves = matches!(status.phase, Phase::Serving | Phase::Copying | Phase::Draining);
        match mv {
            Some(mv) if mv.from == self.site && serves => {
                self.disarm_earlier(worker, &status);
                self.resume(worker, &status, &mv, now);
            }
            Some(mv) if mv.to == self.site && serves && status.epoch == mv.epoch => {
                self.resume(worker, &status, &mv, now);
            }
            // What is left of an earlier move ends first, or the worker would refuse its part of this one.
            _ => self.align(worker, status, group),
        }
    }

    /// What the worker still does for a move that is over ends, also if the present one does before anything of it has begun.
    fn disarm_earlier(&mut self, worker: WorkerId, status: &GroupStatus) {
        if let (Some(move_id), Phase::Copying | Phase::Draining) = (status.move_id, status.phase) {
            let request = Request::Disarm { group: status.group, move_id, withdraw: false };
            self.outputs.push_back(Output::Worker(worker, request));
        }
    }

    /// No move is in hand: the group is served here, or not at all.
    pub(super) fn align(&mut self, worker: WorkerId, status: GroupStatus, group: Group) {
        let mine = group.owner == self.site && self.local.get(&group.id) == Some(&worker);
        let move_id = status.move_id.unwrap_or_default();
        let request = match (mine, status.phase) {
            (true, Phase::Serving) if status.epoch == group.epoch => return,
            (true, Phase::Shadow | Phase::Open) => Request::TakeOver { group: group.id, move_id },
            (true, Phase::Copying | Phase::Draining) if status.epoch == group.epoch => {
                Request::Disarm { group: group.id, move_id, withdraw: false }
            }
            (true, _) => Request::Serve { group: group.id, epoch: group.epoch },
            (false, Phase::Tombstone) => return,
            (false, Phase::Shadow | Phase::Open) => self.abandon_request(group.id, move_id, status.epoch),
            (false, Phase::Serving | Phase::Copying | Phase::Draining | Phase::Relaying) => {
                self.forget_request(group.id, move_id, group.epoch, group.owner)
            }
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    /// A move goes on with a new machine, from what the worker says that it does.
    fn resume(&mut self, worker: WorkerId, status: &GroupStatus, mv: &Move, now: Micros) {
        // A move between workers ends first, also one of which its source has not heard yet.
        if self.is_moving_locally(&mv.group) {
            return;
        }
        if mv.from == self.site && !self.outgoing.contains_key(&mv.id) {
            let frozen = status.phase == Phase::Relaying;
            let machine = Source::new(
                spec_of(mv),
                self.bounds.waits(),
                self.bounds.pace,
                self.next_incarnation(),
                status.flows,
                found(frozen),
                now,
            );
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
    pub(super) fn next_incarnation(&mut self) -> u32 {
        self.incarnation = self.incarnation.wrapping_add(1);
        self.incarnation
    }

    /// A move between workers that a former agent began: no log knows it, the two workers do. If both have their
    /// part it goes forward; if one has nothing, the other serves what it has.
    pub(super) fn recover_local(&mut self, id: MoveId, parts: &BTreeMap<WorkerId, GroupStatus>, now: Micros) {
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
                let machine = Source::new(
                    spec,
                    self.local_waits(),
                    self.bounds.pace,
                    incarnation,
                    status.flows,
                    found(relays.is_some()),
                    now,
                );
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
                    None => Request::Disarm { group, move_id: id, withdraw: false },
                };
                self.outputs.push_back(Output::Worker(from, request));
            }
            (None, None, Some(_)) if self.doubts.contains_key(&id) => {
                self.orphans.insert(id, parts.clone());
            }
            // The source has not heard of it, or is away for a moment.
            (None, None, Some((to, status))) if self.is_elsewhere(&status.group, to, true) => {
                let abandon = self.abandon_request(status.group, id, status.epoch);
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
}

/// What a worker that relays has done.
fn found(relays: bool) -> Found {
    if relays { Found::Cut } else { Found::Serving }
}
