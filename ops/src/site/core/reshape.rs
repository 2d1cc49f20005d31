//! Groups that were split or merged by placement, at the site that has them.
//!
//! At other sites what is new replaces what is gone at once. Where a worker has the group, this happens when no move between workers
//! is in hand; until then the agent acts on the groups as its workers have them, and what placement wants waits. A worker divides or
//! joins its part when it is told to serve what is wanted. Halves at two workers are brought together first.
//!
//! Nothing of this is remembered: what the workers of a new agent say that they serve tells what is still to be done.

use std::collections::BTreeSet;
use std::ops::Bound;

use dataplane::control::{GroupStatus, Phase, Request};
use flow::{Epoch, GroupId, Micros, WorkerId};
use placement::core::{Change, Group};
use switchctl::SitePlan;

use super::{Agent, Output};

impl Agent {
    /// How many groups are not yet as placement wants them.
    #[must_use]
    pub fn reshaping(&self) -> usize {
        self.wanted.len()
    }

    /// Placement has split or merged the group.
    pub(super) fn group_gone(&mut self, id: GroupId) {
        if self.wanted.remove(&id).is_none() && !self.is_held(&id) {
            self.leave_group(&id);
        }
    }

    /// Whether what placement says of a group has to wait; it is kept then.
    pub(super) fn must_wait(&mut self, group: &Group) -> bool {
        // What overlaps something that is acted on waits for that to become it, also when the worker that had it is gone meanwhile.
        let waits = self.wanted.contains_key(&group.id)
            || (!self.groups.contains_key(&group.id) && !self.overlapping(&group.id).is_empty());
        if waits {
            self.wanted.insert(group.id, *group);
        }
        waits
    }

    /// A worker of this site has the group of this site.
    fn is_held(&self, id: &GroupId) -> bool {
        self.local.contains_key(id) && self.groups.get(id).is_some_and(|group| group.owner == self.site)
    }

    /// The group is no more. A worker that still relays for it keeps its place, or the switch would drop what comes by old paths.
    fn leave_group(&mut self, id: &GroupId) {
        let relays = self.local.get(id).copied();
        self.drop_group(id);
        self.set_local(*id, relays);
    }

    /// Who relays for groups that are no more, with the groups.
    pub(super) fn relayed(&self) -> impl Iterator<Item = (GroupId, WorkerId)> {
        let gone = self.local.iter().filter(|(id, _)| !self.groups.contains_key(*id));
        gone.map(|(id, worker)| (*id, *worker))
    }

    /// The worker that relays for a group of before which has clients in common with this one.
    pub(super) fn relays_part_of(&self, id: &GroupId) -> Option<WorkerId> {
        let overlaps =
            |(gone, _): &(GroupId, WorkerId)| gone.service == id.service && gone.prefix.overlaps(&id.prefix);
        self.relayed().find(overlaps).map(|(_, worker)| worker)
    }

    /// Delivers stragglers of groups that are no more to the workers that relay for them. Where something that took their place has a
    /// worker here too, the rules of the two would be of one priority; then only what has none gets that of before.
    pub(super) fn plan_relayed(
        &self,
        plan: &mut SitePlan,
        relayed: impl Iterator<Item = (GroupId, WorkerId)>,
    ) {
        for (gone, worker) in relayed {
            let heirs = self.overlapping(&gone);
            let has_worker = |id: &GroupId| plan.groups.get(id).is_some_and(|heir| heir.local.is_some());
            if !heirs.iter().any(has_worker) {
                plan.relayed.insert(gone, worker);
                continue;
            }
            for part in heirs.iter().filter(|heir| gone.prefix.covers(&heir.prefix)) {
                if let Some(plan) = plan.groups.get_mut(part) {
                    plan.local.get_or_insert(worker);
                }
            }
        }
    }

    fn drop_group(&mut self, id: &GroupId) {
        self.groups.remove(id);
        self.steer.remove(id);
        self.set_local(*id, None);
        self.served.remove(id);
        self.loads.remove(id);
        self.means.remove(id);
        self.settled_at.remove(id);
        self.plan_dirty = true;
    }

    /// Groups that the agent acts on and that cover this one or are parts of it. A prefix comes right before its parts.
    pub(super) fn overlapping(&self, id: &GroupId) -> Vec<GroupId> {
        let above = std::iter::successors(id.prefix.parent(), flow::Prefix::parent);
        let above =
            above.map(|prefix| GroupId { prefix, ..*id }).filter(|above| self.groups.contains_key(above));
        let below = self.groups.range((Bound::Excluded(*id), Bound::Unbounded)).map(|(id, _)| *id);
        let below = below.take_while(|below| below.service == id.service && id.prefix.covers(&below.prefix));
        above.chain(below).collect()
    }

    /// The group as placement has it, or, if it was split or merged since, what has any of it.
    pub(super) fn heir(&self, id: &GroupId) -> Option<Group> {
        let overlaps = |wanted: &&GroupId| wanted.service == id.service && wanted.prefix.overlaps(&id.prefix);
        let wanted = self.wanted.keys().find(overlaps).and_then(|id| self.wanted.get(id));
        let acted_on = self.groups.get(id).or_else(|| self.groups.get(self.overlapping(id).first()?));
        wanted.or(acted_on).copied()
    }

    /// Something of the group is to become something else: it must not move meanwhile.
    pub(super) fn is_to_change(&self, id: &GroupId) -> bool {
        self.wanted.keys().any(|wanted| wanted.service == id.service && wanted.prefix.overlaps(&id.prefix))
    }

    /// Workers have something of groups that placement has split or merged. While these wait for what workers say, the rules of
    /// before are right.
    pub(super) fn has_strays(&self) -> bool {
        let stray = |id: &&GroupId| !self.groups.contains_key(id) && !self.overlapping(id).is_empty();
        !self.wanted.is_empty() || self.local.keys().any(|id| stray(&id))
    }

    /// Does what can be done now.
    pub(super) fn reshape(&mut self, now: Micros) {
        if self.wanted.is_empty() || !self.is_settled() {
            return;
        }
        let wanted: Vec<_> = self.wanted.keys().copied().collect();
        for id in wanted {
            if self.wanted.contains_key(&id) {
                self.reshape_one(id, now);
            }
        }
    }

    fn reshape_one(&mut self, id: GroupId, now: Micros) {
        let parts = self.overlapping(&id);
        if parts.iter().any(|part| self.is_moving(part) || self.unserved.contains_key(part)) {
            return;
        }
        let workers: BTreeSet<_> = parts.iter().filter_map(|part| self.local.get(part).copied()).collect();
        if workers.iter().any(|worker| !self.is_ready(*worker)) {
            return;
        }
        let workers: Vec<_> = workers.into_iter().collect();
        match (parts.as_slice(), workers.as_slice()) {
            (parts, [first, _, ..]) => self.gather(parts, *first, now),
            ([whole], workers) if whole.prefix.covers(&id.prefix) => {
                let (whole, worker) = (*whole, workers.first().copied());
                let inside = |id: &&GroupId| id.service == whole.service && whole.prefix.covers(&id.prefix);
                let halves: Vec<_> = self.wanted.keys().filter(inside).copied().collect();
                let epoch = self.groups.get(&whole).map_or(Epoch(0), |group| group.epoch);
                self.drop_group(&whole);
                halves.into_iter().for_each(|half| self.take_place(half, worker, epoch));
                self.drive_all(now);
            }
            (parts, workers) => {
                let epochs = parts.iter().filter_map(|part| self.groups.get(part)).map(|group| group.epoch);
                let epoch = epochs.max().unwrap_or(Epoch(0));
                parts.iter().for_each(|part| self.drop_group(part));
                self.take_place(id, workers.first().copied(), epoch);
                self.drive_all(now);
            }
        }
    }

    /// Parts at several workers go to one of them.
    fn gather(&mut self, parts: &[GroupId], first: WorkerId, now: Micros) {
        let at = |part: &GroupId| self.local.get(part).copied();
        let stays = |worker: &WorkerId| !self.retiring.contains(worker);
        let to = parts.iter().filter_map(at).find(stays).unwrap_or(first);
        for part in parts
            .iter()
            .filter(|part| at(part).is_some_and(|worker| worker != to))
            .copied()
            .collect::<Vec<_>>()
        {
            self.settled_at.insert(part, now);
            self.move_locally(part, to, now);
        }
    }

    /// What was wanted is there now, at the worker that had what it is made from, under this epoch.
    fn take_place(&mut self, id: GroupId, worker: Option<WorkerId>, epoch: Epoch) {
        let Some(group) = self.wanted.remove(&id) else { return };
        let Some(worker) = worker else { return self.group(group) };
        if group.owner == self.site {
            self.set_local(id, Some(worker));
            self.group(group);
            return self.serve(worker, id, group.epoch);
        }
        // Somebody else has this part by now: it is divided from the rest, and forgotten.
        self.group(group);
        self.outputs.push_back(Output::Worker(worker, Request::Serve { group: id, epoch }));
        let forget = self.forget_request(id, flow::MoveId::default(), group.epoch, group.owner);
        self.outputs.push_back(Output::Worker(worker, forget));
    }

    /// A worker has a group that placement has split or merged while nobody listened: it is acted on as it is. Says whether
    /// the status is dealt with.
    pub(super) fn adopt(&mut self, worker: WorkerId, status: &GroupStatus) -> bool {
        let id = status.group;
        if !self.known || self.groups.contains_key(&id) {
            return false;
        }
        if self.wanted.contains_key(&id) {
            // What it is to be made from is at others, which were given it while this one hung.
            let is_had = self.is_all_had_by_others(worker, &self.overlapping(&id));
            if is_had {
                self.take_away(worker, status);
            }
            return is_had;
        }
        let in_local_move =
            status.move_id.is_some_and(|id| id.is_local()) && status.phase != Phase::Tombstone;
        let serves = matches!(status.phase, Phase::Serving | Phase::Copying | Phase::Draining);
        if status.phase == Phase::Relaying && !in_local_move {
            self.adopt_relayed(worker, status);
            return false;
        }
        if !serves && !in_local_move {
            self.abandon_gone(worker, status);
            return false;
        }
        let over = self.overlapping(&id);
        if over.iter().any(|id| self.is_held(id)) {
            // It answers an older question: the split or merge has been asked for since. Unless others have it all: it was taken for dead.
            if self.is_all_had_by_others(worker, &over) {
                self.take_away(worker, status);
            } else if in_local_move && matches!(status.phase, Phase::Copying | Phase::Draining) {
                // Nor can it be split or merged while it is copied to a worker that is gone.
                let move_id = status.move_id.unwrap_or_default();
                let disarm = Request::Disarm { group: id, move_id, withdraw: false };
                self.outputs.push_back(Output::Worker(worker, disarm));
            } else {
                self.unexplained.insert(worker);
            }
            return true;
        }
        let owned = |id: &GroupId| self.groups.get(id).is_some_and(|group| group.owner == self.site);
        if over.iter().any(owned) || self.is_to_change(&id) {
            self.act_on(id, status.epoch);
            return false;
        }
        let others = over.iter().filter_map(|id| self.groups.get(id));
        let Some(other) = others.max_by_key(|group| group.epoch).copied() else { return false };
        if other.epoch > status.epoch {
            self.give_to(other, worker, status);
        }
        true
    }

    /// Another site has the group by now, under another name: what a worker has of it is of no use any more.
    fn give_to(&mut self, other: Group, worker: WorkerId, status: &GroupStatus) {
        let group = status.group;
        let move_id = status.move_id.unwrap_or_default();
        let request = match status.phase {
            Phase::Shadow | Phase::Open => self.abandon_request(group, move_id, status.epoch),
            Phase::Serving | Phase::Copying | Phase::Draining | Phase::Relaying => {
                self.forget_request(group, move_id, other.epoch, other.owner)
            }
            Phase::Tombstone => return,
        };
        self.outputs.push_back(Output::Worker(worker, request));
    }

    /// Other workers of this site have some of these, and other sites the rest.
    fn is_all_had_by_others(&self, worker: WorkerId, ids: &[GroupId]) -> bool {
        let had = |id: &&GroupId| {
            let other = self.local.get(*id).filter(|other| **other != worker && self.is_ready(**other));
            let served = self.served.contains_key(*id) || self.unserved.get(*id) == other;
            let moves = self.moves_between_others(worker, id) || self.leaves_another(worker, id);
            other.is_some() && (served || moves)
        };
        let is_here = |id: &&GroupId| self.groups.get(*id).is_some_and(|group| group.owner == self.site);
        let mut here = ids.iter().filter(is_here).peekable();
        here.peek().is_some() && here.all(|id| had(&id))
    }

    /// What is left of a move that ended before the group was split or merged: the copy is of no use any more.
    fn abandon_gone(&mut self, worker: WorkerId, status: &GroupStatus) {
        let over = status.move_id.filter(|id| !self.moves.contains_key(id));
        if let (Some(move_id), Phase::Shadow | Phase::Open) = (over, status.phase) {
            let abandon = self.abandon_request(status.group, move_id, status.epoch);
            self.outputs.push_back(Output::Worker(worker, abandon));
        }
    }

    /// A worker gave the group away, and it was split or merged since: it is taken back if it is this site's, or forgotten.
    fn adopt_relayed(&mut self, worker: WorkerId, status: &GroupStatus) {
        if status.move_id.is_some_and(|id| self.moves.contains_key(&id)) {
            return;
        }
        let over = self.overlapping(&status.group);
        let heirs = || over.iter().filter_map(|id| self.groups.get(id));
        let Some(epoch) = heirs().map(|heir| heir.epoch).max() else { return };
        let owner = heirs().map(|heir| heir.owner).find(|owner| *owner != self.site).unwrap_or(self.site);
        if owner == self.site && !over.iter().any(|id| self.is_held(id)) {
            return self.act_on(status.group, epoch);
        }
        let forget = self.forget_request(status.group, status.move_id.unwrap_or_default(), epoch, owner);
        self.outputs.push_back(Output::Worker(worker, forget));
    }

    /// The group as a worker has it takes the place of what placement wants, which waits.
    fn act_on(&mut self, id: GroupId, epoch: Epoch) {
        for over in self.overlapping(&id) {
            if let Some(group) = self.groups.get(&over).copied() {
                self.drop_group(&over);
                self.wanted.insert(over, group);
            }
        }
        let group = Group { id, owner: self.site, epoch, move_id: None, changed: 0, standby: None };
        self.groups.insert(id, group);
        self.set_steer(id, self.site);
    }

    /// Groups that are acted on and that a snapshot does not have.
    pub(super) fn missing_in(&self, snapshot: &[Change]) -> Vec<GroupId> {
        let named = |change: &Change| if let Change::Group(group) = change { Some(group.id) } else { None };
        let named: BTreeSet<_> = snapshot.iter().filter_map(named).collect();
        self.groups.keys().filter(|id| !named.contains(id)).copied().collect()
    }

    /// After a snapshot: what nothing took the place of.
    pub(super) fn drop_gone(&mut self, gone: &[GroupId]) {
        for id in gone {
            if !self.is_to_change(id) {
                self.leave_group(id);
            }
        }
    }

    /// After a snapshot: what was known of groups that it does not have. Their workers may still relay for them.
    pub(super) fn forget_gone(&mut self) {
        let groups = &self.groups;
        self.served.retain(|id, _| groups.contains_key(id));
        self.loads.retain(|id, _| groups.contains_key(id));
        self.means.retain(|id, _| groups.contains_key(id));
        self.settled_at.retain(|id, _| groups.contains_key(id));
    }

    /// The groups that workers of this site have.
    pub(super) fn held(&self) -> Vec<Group> {
        self.groups.values().filter(|group| self.is_held(&group.id)).copied().collect()
    }

    pub(super) fn drive_all(&mut self, now: Micros) {
        let moves: Vec<_> = self.moves.values().cloned().collect();
        for mv in moves {
            self.drive(&mv, now);
        }
    }
}
