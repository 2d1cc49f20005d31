//! Groups that split and merge here: a group that is a part of one that is served, or that covers such ones, takes over their flows.
//!
//! The new group serves at once: new flows are its own, and a flow that is still filed under the old one changes over with its
//! next packet, or when a walk in slices comes by. Mappings, counters and timers are those of the flow and stay. A group that has
//! lost its whole prefix has no name any more, and ends with its last flow.

use flow::{Epoch, GroupId};

use super::Worker;
use super::requests::Refusal;
use crate::control::Event;
use crate::group::{Group, Mode, State};
use crate::io::PacketBuf;
use crate::table::NIL;

impl<B: PacketBuf> Worker<B> {
    /// Makes the group from those that it overlaps; if there are none, nothing happens. Costs as much as there are groups. What
    /// was forgotten here and only relays is no obstacle: whoever is told to serve relays nothing of that any more, and a whole
    /// that still relays does so for the other half.
    ///
    /// An ingress that is late for one of them is late for the new group.
    ///
    /// # Errors
    /// When one of them moves, is relayed or has packets that wait, is of another service, or has a greater epoch.
    pub(super) fn reshape(&mut self, id: GroupId, epoch: Epoch) -> Result<(), Refusal> {
        let relays = |number: &u32| {
            let group = &self.groups[*number as usize];
            matches!(group.state, State::Tombstone { .. })
                && matches!(group.mode, Mode::Relay(_))
                && group.id.service == id.service
        };
        let known = self.by_id.get(&id);
        if known.is_some_and(|number| !relays(number)) {
            return Ok(());
        }
        let overlapping = self.by_id.iter().filter(|(known, _)| known.prefix.overlaps(&id.prefix));
        let touching: Vec<u32> = overlapping.map(|(_, number)| *number).collect();
        // What was forgotten may be the group itself, whose parts are served here since.
        if touching.len() == usize::from(known.is_some()) {
            return Ok(());
        }
        self.check_prefix(&id)?;
        let (buried, touching): (Vec<u32>, Vec<u32>) = touching.into_iter().partition(relays);
        for number in &touching {
            let group = &self.groups[*number as usize];
            let settled = group.state == State::Serving && group.hold.is_empty();
            if !settled || group.id.service != id.service || group.epoch > epoch {
                let (known, phase) = (group.id, group.phase());
                return Err(format!(
                    "group {id} overlaps {known}, which is {phase:?} under epoch {}",
                    group.epoch
                ));
            }
        }
        for number in buried {
            if id.prefix.covers(&self.groups[number as usize].id.prefix) {
                self.finish_purge(number);
                self.active.retain(|other| *other != number);
                self.drop_group(number);
            }
        }
        let number = self.add_group(id, epoch)?;
        for from in touching {
            self.begin_parting(from, number);
        }
        Ok(())
    }

    fn begin_parting(&mut self, from: u32, to: u32) {
        let covered = self.is_covered(from, to);
        if let Ok([old, new]) = self.groups.get_disjoint_mut([from as usize, to as usize]) {
            new.ingress = new.ingress.or(old.ingress);
            new.version = new.version.max(old.version);
            new.hold.wait_as(&old.hold);
            new.refresh_mode();
            if covered {
                new.load.add(std::mem::take(&mut old.load));
            }
            old.parting = true;
            old.flows.rewind();
        }
        if covered {
            self.unname_group(from);
        }
        self.activate(from);
    }

    /// Whether groups that are here leave nothing of this one.
    fn is_covered(&self, number: u32, by: u32) -> bool {
        let (whole, by) = (self.groups[number as usize].id.prefix, self.groups[by as usize].id.prefix);
        if by.covers(&whole) {
            return true;
        }
        let inside = self.by_id.keys().map(|known| known.prefix).filter(|known| whole.covers(known));
        // A prefix comes right before those that it covers, which count with it.
        let (mut last, mut covered) = (whole, 0);
        for part in inside.filter(|part| *part != whole) {
            if last == whole || !last.covers(&part) {
                (last, covered) = (part, covered + part.size());
            }
        }
        covered == whole.size()
    }

    /// Files a flow under the group that its client belongs to now, and says which that is.
    pub(super) fn rehome(&mut self, flow: u32, from: u32) -> u32 {
        let Some(to) = self.group_of(self.table.flow(flow).client) else { return from };
        let Ok([old, new]) = self.groups.get_disjoint_mut([from as usize, to as usize]) else { return from };
        let shift = i64::from(old.offset) - i64::from(new.offset);
        self.table.regroup(flow, &mut old.flows, &mut new.flows, to, shift);
        to
    }

    /// Walks on through the flows of a group that parts. Says whether the group is no more.
    pub(super) fn part(&mut self, number: u32, budget: &mut usize) -> bool {
        while *budget > 0 {
            let flow = self.groups[number as usize].flows.cursor;
            if flow == NIL {
                return self.end_parting(number);
            }
            self.groups[number as usize].flows.cursor = self.table.next(flow);
            self.rehome(flow, number);
            *budget -= 1;
        }
        false
    }

    fn end_parting(&mut self, number: u32) -> bool {
        let group = &mut self.groups[number as usize];
        group.parting = false;
        let gone = self.by_id.get(&group.id) != Some(&number);
        if gone {
            self.active.retain(|other| *other != number);
            self.groups_free.push(number);
        }
        let waits = self.by_id.values().filter(|number| self.groups[**number as usize].report_serving);
        for number in waits.copied().collect::<Vec<_>>() {
            self.report_serving(number);
        }
        gone
    }

    /// Ends the walks that a group gets flows from at once, because it must be whole: it moves. Costs what they have.
    pub(super) fn finish_parting(&mut self, id: &GroupId) {
        for number in self.parting(id) {
            let mut budget = usize::MAX;
            self.part(number, &mut budget);
        }
    }

    /// Groups that part and may have flows of this one.
    fn parting(&self, id: &GroupId) -> Vec<u32> {
        let parts = |number: &&u32| {
            let group = &self.groups[**number as usize];
            group.parting && group.id.prefix.overlaps(&id.prefix)
        };
        self.active.iter().filter(parts).copied().collect()
    }

    /// Says that the group is served, once it has all its flows.
    pub(super) fn report_serving(&mut self, number: u32) {
        let Group { id, epoch, .. } = self.groups[number as usize];
        let whole = self.parting(&id).is_empty();
        self.groups[number as usize].report_serving = !whole;
        if whole {
            self.events.push_back(Event::Serving { group: id, epoch });
        }
    }
}
