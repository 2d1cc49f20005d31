//! Moves between the workers of the site, for load or because one is to end.

use std::collections::{BTreeMap, BTreeSet};

use flow::{Epoch, GroupId, Micros, MoveId, WorkerId};
use switchctl::OldPath;
use transfer::core::{Ending, Found, MoveSpec, Source, SourceInput, Target, TargetInput, ToTarget, Waits};

use super::super::elastic::{Views, WorkerView};
use super::{Agent, LocalMove, Marker, Outgoing, Output, Worker};

/// How long the groups of a worker that went away wait for it before others get them.
const WORKER_BOUND: Micros = Micros(3_000_000);
/// Moves between workers that are remembered for those who ask.
const LOCAL_LOG_LEN: usize = 256;
/// A gap between the most and the least loaded worker counts when it is above the mean by this, as a divisor.
const GAP_SHARE: u64 = 3;
/// Shortest stay of a group at a worker.
const LOCAL_DWELL: Micros = Micros(10_000_000);
/// Moves between workers at a time.
const LOCAL_MOVES_MAX: usize = 4;
/// A worker that has not answered for so long is said to be silent: three reports.
const SILENT_BOUND: Micros = Micros(1_500_000);
/// A worker that has not answered for so long is taken for dead, if another answers: longer than a busy machine keeps a process from
/// running, and two seconds longer than a worker whose connection broke, which is surer evidence.
const HUNG_BOUND: Micros = Micros(5_000_000);
/// A move that switches ends within seconds. One that takes so long does not go on by itself.
const SWITCHING_BOUND: Micros = Micros(60_000_000);
/// What a worker said about itself counts for so long: six reports.
const STATS_FRESH: Micros = Micros(3_000_000);

impl Worker {
    fn is_silent(&self, now: Micros) -> bool {
        self.said.is_some_and(|(at, ..)| at.plus(SILENT_BOUND) <= now)
    }

    /// It answers nothing, though its connection is there.
    fn is_hung(&self, now: Micros) -> bool {
        let last = self.said.map(|(at, ..)| at).or(self.up_since.filter(|_| !self.ready));
        self.up && last.is_some_and(|at| at.plus(HUNG_BOUND) <= now)
    }

    pub(super) fn note_link(&mut self, is_down: bool, now: Micros) {
        let (since, other) = if is_down {
            (&mut self.unlinked_since, &mut self.linked_since)
        } else {
            (&mut self.linked_since, &mut self.unlinked_since)
        };
        since.get_or_insert(now);
        *other = None;
    }

    /// Its link to the switch has been gone for longer than a worker may be away.
    fn is_cut_off(&self, now: Micros) -> bool {
        self.unlinked_since.is_some_and(|at| at.plus(WORKER_BOUND) <= now)
    }

    /// It can serve what another had: it answers, and its link has been there for as long as the other's may be gone. When the switch
    /// itself was away workers find it again one after another.
    fn is_sound(&self, now: Micros) -> bool {
        self.up
            && self.ready
            && !self.is_silent(now)
            && self.linked_since.is_some_and(|at| at.plus(WORKER_BOUND) <= now)
    }

    /// It may get groups.
    fn is_fit(&self, now: Micros) -> bool {
        !self.is_silent(now) && self.linked_since.is_some()
    }

    /// The agent was stopped for so long, and heard nobody meanwhile.
    pub(super) fn stood_still(&mut self, span: Micros) {
        let times =
            [&mut self.up_since, &mut self.down_since, &mut self.linked_since, &mut self.unlinked_since];
        let said = self.said.as_mut().map(|(at, ..)| at);
        for at in times.into_iter().filter_map(Option::as_mut).chain(said) {
            *at = at.plus(span);
        }
    }
}

impl Agent {
    /// Always strict: inside a site that costs next to nothing, and a relaxed target relays what it cannot place to the site of
    /// the source, where the switch would give it back to the target.
    pub(super) fn local_spec(&self, group: GroupId, id: MoveId, epoch: Epoch) -> MoveSpec {
        MoveSpec { id, group, from: self.site, to: self.site, epoch, relaxed: false }
    }

    /// Inside a site the only marker is that of its own switch. Before it has come the switch still delivers to the old worker, which
    /// would get its own relayed packets back; so it is waited for, however long.
    pub(super) fn local_waits(&self) -> Waits {
        Waits { marker: Micros(u64::MAX), ..self.bounds.waits() }
    }

    pub(super) fn move_locally(&mut self, group: GroupId, to: WorkerId, now: Micros) {
        let Some(&from) = self.local.get(&group) else { return };
        let Some(state) = self.groups.get(&group).copied() else { return };
        let idle = state.owner == self.site && state.move_id.is_none() && !self.is_moving(&group);
        let fit = from != to && self.is_ready(from) && self.is_ready(to);
        if !self.is_settled() || !idle || !fit || self.stopping {
            return;
        }
        self.local_moves += 1;
        let id = MoveId::local(u64::from(self.incarnation) << 24 | self.local_moves);
        let spec = self.local_spec(group, id, state.epoch);
        let flows = self.loads.get(&group).map_or(0, |load| load.flows);
        let incarnation = self.next_incarnation();
        self.add_source(
            id,
            Source::new(spec, self.local_waits(), self.bounds.pace, incarnation, flows, Found::Serving, now),
            from,
            self.site,
        );
        self.add_target(id, Target::new(spec, None), to, now);
        self.feed_source(id, SourceInput::PeerUp, now);
    }

    pub(super) fn is_moving_locally(&self, group: &GroupId) -> bool {
        self.outgoing.iter().any(|(id, out)| id.is_local() && out.machine.spec().group == *group)
            || self.is_in_doubt(group)
    }

    /// It was about to move between two workers when one of them went away. Nothing is done with it before the one that had it has said
    /// what it has, or is taken for dead: the other may serve it only then, and a copy that goes on would be in the way of a split.
    fn is_in_doubt(&self, group: &GroupId) -> bool {
        self.doubts.values().any(|(doubted, _)| doubted == group) || self.is_orphan(group)
    }

    /// One of the two workers has said its part of the move, and the other, which may have joined, does not answer.
    fn is_orphan(&self, group: &GroupId) -> bool {
        self.orphans.values().flat_map(BTreeMap::values).any(|part| part.group == *group)
    }

    pub(super) fn is_moving(&self, group: &GroupId) -> bool {
        self.outgoing.values().any(|out| out.machine.spec().group == *group)
            || self.incoming.values().any(|incoming| incoming.machine.spec().group == *group)
            || self.is_in_doubt(group)
    }

    pub(super) fn is_ready(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| worker.up && worker.ready)
    }

    /// Inside a site the agent is the log.
    pub(super) fn commit_local(&mut self, id: MoveId, now: Micros) {
        let (Some(out), Some(incoming)) = (self.outgoing.get(&id), self.incoming.get(&id)) else { return };
        let (spec, old, to) = (*out.machine.spec(), out.worker, incoming.worker);
        self.set_local(spec.group, Some(to));
        self.plan_dirty = true;
        let old = OldPath::Local(old);
        self.markers
            .insert(id, Marker { group: spec.group, epoch: spec.epoch, old, tag: self.tag + 1, at: None });
        self.feed_source(id, SourceInput::Switching { ingresses: vec![self.site], flip_in: Micros(0) }, now);
        self.feed_target(id, TargetInput::Switching, now);
    }

    pub(super) fn log_local(&mut self, id: MoveId, summary: transfer::core::Summary) {
        let (Some(out), Some(incoming)) = (self.outgoing.get(&id), self.incoming.get(&id)) else { return };
        let (group, from, to) = (incoming.machine.spec().group, out.worker, incoming.worker);
        let transfer::core::Summary { flows, precopy_us, hold, .. } = summary;
        let number = self.counts.moves_local + 1;
        self.local_log.push_back(LocalMove { number, group, from, to, flows, precopy_us, hold });
        if self.local_log.len() > LOCAL_LOG_LEN {
            self.local_log.pop_front();
        }
    }

    pub(super) fn end_local(&mut self, id: MoveId, ending: Ending, now: Micros) {
        self.counts.moves_local += u64::from(ending == Ending::Done);
        if let (Some(out), true) = (self.outgoing.get(&id), ending != Ending::Done) {
            let (group, worker) = (out.machine.spec().group, out.worker);
            self.set_local(group, Some(worker));
        }
        let flipped = self.markers.remove(&id).is_some();
        self.feed_source(id, SourceInput::Ended(ending), now);
        if flipped && ending != Ending::Done {
            // What the target gives back goes through the switch, which must not deliver it to the target again.
            self.withdrawn.insert(id, self.tag + 1);
            self.plan_dirty = true;
        } else {
            self.feed_target(id, TargetInput::Ended(ending), now);
        }
        self.resync(now);
        if ending == Ending::Done {
            // What was refused is tried again at the next look at the loads.
            self.evacuate(now);
        }
    }

    /// Spreads groups over the workers: from the one with most packets to the one with fewest, one group at a time,
    /// while that narrows the gap well. A small gap is left alone, and a group stays for a while where it is, so loads that
    /// wobble do not move groups back and forth.
    pub(super) fn balance(&mut self, now: Micros) {
        let mut loads = self.worker_loads();
        if loads.len() < 2 {
            return;
        }
        for _ in self.local_moves_in_hand()..LOCAL_MOVES_MAX {
            let Some((group, from, to, weight)) = self.best_move(&loads, now) else { return };
            self.settled_at.insert(group, now);
            self.move_locally(group, to, now);
            *loads.entry(from).or_default() -= weight;
            *loads.entry(to).or_default() += weight;
        }
    }

    fn local_moves_in_hand(&self) -> usize {
        self.outgoing.keys().filter(|id| id.is_local()).count()
    }

    /// The load of each worker that may get groups, by the groups that it has.
    fn worker_loads(&self) -> BTreeMap<WorkerId, u64> {
        let mut loads: BTreeMap<WorkerId, u64> = self
            .ready_workers()
            .filter(|id| !self.retiring.contains(id) && self.is_fit(*id))
            .map(|id| (id, 0))
            .collect();
        for (group, worker) in self.local.iter() {
            if let Some(load) = loads.get_mut(worker) {
                *load += self.weight(group);
            }
        }
        loads
    }

    /// Groups of workers that retire go to the least loaded others, heaviest first, as many at a time as other moves between
    /// workers. How long a group has been there does not matter.
    pub(super) fn evacuate(&mut self, now: Micros) {
        if self.retiring.is_empty() {
            return;
        }
        let mut loads = self.worker_loads();
        for (id, incoming) in self.incoming.iter().filter(|(id, _)| id.is_local()) {
            // On its way to that worker, and not among its groups before the flip.
            let group = incoming.machine.spec().group;
            let from = self.outgoing.get(id).map(|out| out.worker);
            if let Some(load) =
                loads.get_mut(&incoming.worker).filter(|_| self.local.get(&group).copied() == from)
            {
                *load += self.weight(&group);
            }
        }
        let leave = self.local.iter().filter(|(group, worker)| {
            self.retiring.contains(worker)
                && self.groups.get(group).is_some_and(|g| g.owner == self.site && g.move_id.is_none())
                && !self.is_moving(group)
        });
        let mut leave: Vec<_> = leave.map(|(group, _)| (self.weight(group), *group)).collect();
        leave.sort_unstable_by_key(|(weight, group)| (std::cmp::Reverse(*weight), *group));
        let room = LOCAL_MOVES_MAX.saturating_sub(self.local_moves_in_hand());
        for (weight, group) in leave.into_iter().take(room) {
            let Some((_, to)) = loads.iter().map(|(id, load)| (*load, *id)).min() else { return };
            self.settled_at.insert(group, now);
            self.move_locally(group, to, now);
            *loads.entry(to).or_default() += weight;
        }
    }

    pub(super) fn recall(&mut self, worker: WorkerId) {
        let gone = self.workers.get(&worker).is_some_and(|known| !known.up);
        let has_groups = self.local.values().any(|at| *at == worker);
        if self.retiring.remove(&worker) && gone && !has_groups {
            // It was to go: nobody waits for it.
            self.workers.remove(&worker);
        }
    }

    /// The workers that answer, for the decision how many there should be; nothing before all were heard.
    #[must_use]
    pub fn worker_views(&self, now: Micros) -> Option<Views> {
        let views = self.ready_workers().map(|id| {
            let said = self.workers.get(&id).and_then(|worker| worker.said);
            let said = said.filter(|(at, ..)| at.plus(STATS_FRESH) > now);
            let knows_none = said.is_some_and(|(.., groups)| groups == 0);
            let view = WorkerView {
                busy: said.map(|(_, busy, _)| busy),
                is_empty: knows_none && !self.has_task(id),
            };
            (id, view)
        });
        self.is_settled().then(|| views.collect())
    }

    /// Workers whose connection is there and that have not answered for [`SILENT_BOUND`]: stopped, or hung.
    #[must_use]
    pub fn silent_workers(&self, now: Micros) -> Vec<WorkerId> {
        self.workers
            .iter()
            .filter(|(_, worker)| worker.up && worker.is_silent(now))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Workers that there is a connection to.
    #[must_use]
    pub fn connected_workers(&self) -> BTreeSet<WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.up).map(|(id, _)| *id).collect()
    }

    /// Workers that answer and have no link to the switch.
    #[must_use]
    pub fn unlinked_workers(&self) -> Vec<WorkerId> {
        let gone = self.workers.iter().filter(|(_, worker)| worker.up && worker.unlinked_since.is_some());
        gone.map(|(id, _)| *id).collect()
    }

    /// Whether the worker may get groups, as far as is known.
    fn is_fit(&self, id: WorkerId) -> bool {
        let now = self.awake_at.unwrap_or_default();
        self.workers.get(&id).is_some_and(|worker| worker.is_fit(now))
    }

    /// Whether a probe of the move's source is to be left without an answer: the worker that takes the group gives none.
    pub(super) fn is_deaf(&self, id: MoveId, message: &ToTarget, now: Micros) -> bool {
        let incoming = self.incoming.get(&id).filter(|_| *message == ToTarget::Probe);
        let worker = incoming.and_then(|incoming| self.workers.get(&incoming.worker));
        incoming.is_some() && worker.is_none_or(|worker| !worker.up || !worker.ready || worker.is_silent(now))
    }

    /// Moves from here that wait for a target which may have the token and has been silent, with for how long.
    #[must_use]
    pub fn waiting_moves(&self, now: Micros) -> Vec<(MoveId, Micros)> {
        let waits = |(id, out): (&MoveId, &Outgoing)| Some((*id, out.machine.silent_with_token(now)?));
        self.outgoing.iter().filter_map(waits).collect()
    }

    /// Moves from here that have been switching for too long, though their target may answer, with for how long.
    #[must_use]
    pub fn overdue_moves(&self, now: Micros) -> Vec<(MoveId, Micros)> {
        let since = |(id, out): (&MoveId, &Outgoing)| Some((*id, out.machine.switching_for(now)?));
        self.outgoing.iter().filter_map(since).filter(|(_, since)| *since >= SWITCHING_BOUND).collect()
    }

    /// It has a group, or was told to do something with one, or may have one of a move that another worker went away from.
    fn has_task(&self, id: WorkerId) -> bool {
        self.local.values().chain(self.unserved.values()).any(|worker| *worker == id)
            || self.doubts.values().any(|(_, source)| *source == id)
            || self.orphans.values().any(|parts| parts.contains_key(&id))
            || self.outgoing.values().any(|out| out.worker == id)
            || self.incoming.values().any(|incoming| incoming.worker == id)
    }

    /// Whether the worker is to have no groups.
    #[must_use]
    pub fn is_retiring(&self, worker: WorkerId) -> bool {
        self.retiring.contains(&worker)
    }

    /// How many groups a worker has.
    #[must_use]
    pub fn groups_of(&self, worker: WorkerId) -> usize {
        self.local.values().filter(|at| **at == worker).count()
    }

    /// Packets of the last report, and something for a group that is idle, so that those spread too.
    fn weight(&self, group: &GroupId) -> u64 {
        1 + self.means.get(group).copied().unwrap_or(0)
            + self.loads.get(group).map_or(0, |load| load.flows / 16)
    }

    fn best_move(
        &self,
        loads: &BTreeMap<WorkerId, u64>,
        now: Micros,
    ) -> Option<(GroupId, WorkerId, WorkerId, u64)> {
        let (&from, &most) = loads.iter().max_by_key(|(id, load)| (**load, **id))?;
        let (&to, &least) = loads.iter().min_by_key(|(id, load)| (**load, **id))?;
        let mean = loads.values().sum::<u64>() / loads.len() as u64;
        let gap = most - least;
        if gap * GAP_SHARE <= mean.max(GAP_SHARE) {
            return None;
        }
        let movable = |group: &GroupId| {
            let rested = self.settled_at.get(group).is_none_or(|at| at.plus(LOCAL_DWELL) <= now);
            rested
                && self.groups.get(group).is_some_and(|g| g.owner == self.site && g.move_id.is_none())
                && !self.is_moving(group)
                && !self.is_to_change(group)
        };
        self.local
            .iter()
            .filter(|(group, worker)| **worker == from && movable(group))
            .map(|(group, _)| (*group, self.weight(group)))
            .filter(|(_, weight)| gap.abs_diff(2 * *weight) <= gap / 2)
            .min_by_key(|(group, weight)| ((gap / 2).abs_diff(*weight), *group))
            .map(|(group, weight)| (group, from, to, weight))
    }

    /// Groups of a worker that stays away go to others; their flows stay with it.
    pub(super) fn replace_dead_workers(&mut self, now: Micros) {
        let dead = |worker: &Worker| worker.down_since.is_some_and(|at| at.plus(WORKER_BOUND) <= now);
        let dead: Vec<_> = self.workers.iter().filter(|(_, w)| dead(w)).map(|(id, _)| *id).collect();
        for id in dead {
            tracing::warn!(worker = %id, "the worker stays away; its groups go to others");
            self.workers.remove(&id);
            self.worker_lost(id);
            self.ask_status();
            self.resync(now);
        }
    }

    /// Groups of a worker that does not answer, or has no link to the switch, go to others like those of one that stays away, if
    /// there is another: where all are silent it is the agent, or the machine, that stood still.
    pub(super) fn replace_hung_workers(&mut self, now: Micros) {
        let sound = |(_, worker): &(&WorkerId, &Worker)| worker.is_sound(now);
        if !self.workers.iter().any(|worker| sound(&worker)) {
            return;
        }
        let hung: Vec<_> = self.workers.iter().filter(|(_, w)| w.is_hung(now)).map(|(id, _)| *id).collect();
        for id in hung {
            tracing::warn!(worker = %id, "the worker does not answer; its groups go to others");
            self.take_for_dead(id, now);
        }
        let cut_off = self.workers.iter().filter(|(_, w)| w.up && w.is_cut_off(now)).map(|(id, _)| *id);
        for id in cut_off.filter(|id| self.has_task(*id)).collect::<Vec<_>>() {
            tracing::warn!(worker = %id, "the worker has no link to the switch; its groups go to others");
            self.take_for_dead(id, now);
        }
    }

    /// When it is heard again it is one that wakes: it says what it has, and is told to give up what others have by then.
    fn take_for_dead(&mut self, id: WorkerId, now: Micros) {
        self.outputs.push_back(Output::Disconnect(id));
        self.workers.remove(&id);
        self.drop_machines_of(id);
        self.worker_lost(id);
        // Of a move between it and another, that one may have the flows.
        self.ask_status();
        self.resync(now);
    }

    /// One that retires only if there is no other.
    pub(super) fn least_loaded(&self) -> Option<WorkerId> {
        let load = |id: WorkerId| self.workers.get(&id).map_or(0, |worker| worker.load);
        let rank =
            |id: WorkerId| (!self.is_fit(id), self.retiring.contains(&id), load(id), self.groups_of(id), id);
        self.ready_workers().min_by_key(|id| rank(*id))
    }

    pub(super) fn ready_workers(&self) -> impl Iterator<Item = WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.up && worker.ready).map(|(id, _)| *id)
    }

    pub(super) fn up_workers(&self) -> Vec<WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.up).map(|(id, _)| *id).collect()
    }

    pub(super) fn set_local(&mut self, group: GroupId, worker: Option<WorkerId>) {
        let before = match worker {
            Some(worker) => self.local.insert(group, worker),
            None => self.local.remove(&group),
        };
        self.plan_dirty |= before != worker;
        self.unserved.remove(&group);
        if before != worker {
            self.served.remove(&group);
        }
    }
}
