//! Work between bursts, a bounded part at a time: timers, exports, installs, joins, removals.

use flow::steer::{MARKER_PROTOCOL, MarkerBody, Tag};
use flow::{Batch, Fixed, FlowRecord, HoldTimes, Micros, Token};

use super::{EVENTS_MAX, Install, Output, SLICE_LEN, Wait, Worker, tick};
use crate::control::{Event, Ordering};
use crate::group::{Export, Given, State};
use crate::io::PacketBuf;
use crate::packet;
use crate::table::mapping::BindError;
use crate::table::{NIL, NewFlow, flags, tuple_of};

/// When no slice ran for so many ticks the process was stopped, and nobody could refresh a flow: that time
/// does not count.
const STALL_TICKS: u32 = 100;

/// A flow whose group's clock stands still is looked at again after so many ticks.
const FROZEN_TICKS: u32 = 50;

/// Ticks after the first round of a copy in which flows of its group do not end. A relaxed target serves mappings of that copy:
/// one that ended here meanwhile would free a port that is in use there. Longer than a flip and its markers take; a timer that ends
/// later by this is in order (RFC 4787, REQ-5 and RFC 5382, REQ-5 give least times).
const KEPT_TICKS: u32 = 300;

/// Tombstones that stay for late ingresses are looked at in turn, so many in a tick: a site that gave everything away has thousands.
const STAYS_PER_TICK: usize = 128;

impl<B: PacketBuf> Worker<B> {
    /// Does some of the work that waits, at most [`SLICE_LEN`] steps of each kind. When no call came for ten
    /// seconds the process was stopped: that time does not count against flows.
    pub fn slice(&mut self, now: Micros, out: &mut Output<B>) {
        let ticked = self.skip_stall(now);
        if ticked {
            self.end_stays(now);
        }
        self.expire(now);
        self.install_some(now);
        let mut budget = SLICE_LEN;
        for _ in 0..self.active.len() {
            let Some(number) = (!self.active.is_empty()).then(|| self.active.remove(0)) else { break };
            let more = self.work(number, &mut budget, now, out);
            if more {
                self.active.push(number);
            } else {
                self.groups[number as usize].active = false;
            }
            if budget == 0 {
                break;
            }
        }
    }

    /// Says whether a tick began.
    fn skip_stall(&mut self, now: Micros) -> bool {
        let passed = tick(now).saturating_sub(std::mem::replace(&mut self.tick, tick(now)));
        if passed > STALL_TICKS {
            for group in self.groups.iter_mut().filter(|group| group.frozen.is_none()) {
                group.offset += passed;
            }
        }
        passed > 0
    }

    /// Looks at some of the tombstones that are over but for ingresses that have not flipped, each in turn.
    fn end_stays(&mut self, now: Micros) {
        let behind = self.staying.range(self.stay_next..);
        let some: Vec<u32> = behind.take(STAYS_PER_TICK).copied().collect();
        self.stay_next = some.last().filter(|_| some.len() == STAYS_PER_TICK).map_or(0, |last| last + 1);
        for number in some {
            let group = &self.groups[number as usize];
            // One with work is looked at when that is done.
            if !group.active && !group.stays(now) {
                self.drop_group(number);
            }
        }
    }

    /// How soon the next slice is wanted.
    #[must_use]
    pub fn wait(&self) -> Wait {
        if !self.installs.is_empty() {
            return Wait::Now;
        }
        let wants = |number: &u32| {
            let group = &self.groups[*number as usize];
            let exporting = group.export.as_ref().is_some_and(|export| export.running);
            let exports = exporting && self.events.len() < EVENTS_MAX && !group.credit.is_spent();
            let backlog = group.hold.has_backlog() && group.state != State::Shadow;
            if backlog || group.purging || group.parting || exports {
                return Wait::Now;
            }
            // How exactly a tombstone ends does not matter.
            if matches!(group.state, State::Tombstone { .. }) { Wait::Idle } else { Wait::Soon }
        };
        self.active.iter().map(wants).min().unwrap_or(Wait::Idle)
    }

    fn expire(&mut self, now: Micros) {
        for _ in 0..SLICE_LEN {
            let Some(flow) = self.table.due(tick(now)) else { return };
            let entry = *self.table.flow(flow);
            let group = &self.groups[entry.group as usize];
            let frozen = group.frozen.is_some() || !group.serves() || group.state == State::Open;
            let kept = group.keeps_flows(tick(now));
            let clock = group.clock(tick(now));
            if frozen || kept && entry.expires <= clock {
                self.table.rearm(flow, tick(now) + FROZEN_TICKS);
            } else if entry.expires > clock {
                self.table.rearm(flow, tick(now) + (entry.expires - clock));
            } else {
                self.counters.flows_expired += 1;
                self.remove_flow(flow);
            }
        }
    }

    /// Removes a flow wherever it is known, and queues the removal for export.
    fn remove_flow(&mut self, flow: u32) {
        let entry = *self.table.flow(flow);
        let group = &mut self.groups[entry.group as usize];
        if group.flows.tracking {
            group.flows.removals.push_back(self.table.key(flow));
        }
        if entry.flags & flags::HANDSHAKE != 0 {
            self.round_trips.forget(flow);
        }
        self.table.remove(flow, &mut group.flows);
    }

    /// All that a group waits for; says whether it is to be looked at again.
    fn work(&mut self, number: u32, budget: &mut usize, now: Micros, out: &mut Output<B>) -> bool {
        if self.groups[number as usize].parting && self.part(number, budget) {
            return false;
        }
        if self.groups[number as usize].purging {
            self.purge(number, *budget);
        }
        self.try_open(number);
        self.try_join(number, now);
        self.work_hold(number, budget, now, out);
        self.try_cut(number, now, out);
        self.export_some(number, budget);
        self.try_end(number, now)
    }

    /// Removes flows of a group that is being forgotten.
    pub(super) fn purge(&mut self, number: u32, most: usize) {
        for _ in 0..most {
            let Some(flow) = self.groups[number as usize].flows.first() else { break };
            self.remove_flow(flow);
        }
        if self.groups[number as usize].flows.count == 0 {
            self.end_purge(number);
        }
    }

    fn end_purge(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        group.purging = false;
        if let (State::Shadow, Some(move_id)) = (&group.state, group.move_id) {
            let event = Event::Prepared { group: group.id, move_id };
            self.events.push_back(event);
        }
    }

    fn work_hold(&mut self, number: u32, budget: &mut usize, now: Micros, out: &mut Output<B>) {
        let group = &mut self.groups[number as usize];
        if matches!(group.state, State::Shadow) {
            return;
        }
        self.counters.hold_without_marker += group.hold.release_due(now) as u64;
        if group.hold.has_backlog() {
            let served = self.serve_backlog(number, *budget, now, out);
            *budget = budget.saturating_sub(served);
        }
        let group = &mut self.groups[number as usize];
        group.refresh_mode();
        if !group.hold.has_backlog() && std::mem::take(&mut group.report_join) {
            self.report_join(number);
        }
    }

    /// Tells the agent that the group is served.
    pub(super) fn report_join(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        let Some(move_id) = group.joined else { return };
        self.events.push_back(Event::Joined {
            group: group.id,
            move_id,
            flows: group.flows.count,
            hold: HoldTimes::of(&mut group.hold.times_us),
            opened_early: group.hold.opened_early,
        });
    }

    /// Relaxed: serves the shadow when what came before the request is installed.
    fn try_open(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        if group.state == State::Shadow
            && !group.purging
            && group.arrival.as_ref().is_some_and(|arrival| arrival.opening && arrival.installing == 0)
        {
            group.state = State::Open;
            group.refresh_mode();
        }
    }

    /// Serves the shadow when token and cut are there.
    fn try_join(&mut self, number: u32, now: Micros) {
        let group = &self.groups[number as usize];
        let Some(arrival) = &group.arrival else { return };
        let Some(joining) = arrival.joining.clone() else { return };
        if arrival.installing > 0 || group.purging {
            return;
        }
        let have = group.have();
        if let Some(token) = joining.token {
            if token != have {
                return self.refuse_join(number, have);
            }
            if !arrival.cut_seen {
                if now < joining.cut_deadline {
                    return;
                }
                self.counters.hold_without_cut += 1;
                self.groups[number as usize].hold.opened_early = true;
            }
        }
        self.join(number, &joining.missing, joining.late_bound, now);
    }

    fn refuse_join(&mut self, number: u32, have: Token) {
        let group = &mut self.groups[number as usize];
        if let Some(arrival) = &mut group.arrival {
            arrival.joining = None;
        }
        if let Some(move_id) = group.move_id {
            self.events.push_back(Event::Mismatch { group: group.id, move_id, have });
        }
    }

    fn join(&mut self, number: u32, missing: &[flow::SiteId], late_bound: Micros, now: Micros) {
        let group = &mut self.groups[number as usize];
        let Some(move_id) = group.move_id.take() else { return };
        // By epoch: after a move between workers it is that of the move between the sites, and an ingress whose agent heard of the move
        // only when it was over does not know its number.
        let mut late = group.markers.missing_of_epoch(group.epoch, missing);
        if let Some(arrival) = group.arrival.take() {
            self.reserved -= arrival.reserved;
            if arrival.ordering == Ordering::Relaxed {
                late.clear();
            }
        }
        group.unfreeze(tick(now));
        group.state = State::Serving;
        group.joined = Some(move_id);
        group.report_join = true;
        group.hold.unpark();
        group.hold.set_late(&late, late_bound, now);
        group.refresh_mode();
    }

    /// Stops serving when all markers are in or the bound has passed, and nothing older waits.
    fn try_cut(&mut self, number: u32, now: Micros, out: &mut Output<B>) {
        let group = &self.groups[number as usize];
        let State::Draining(armed) = &group.state else { return };
        let Some(move_id) = group.move_id else { return };
        let missing = group.markers.missing(move_id, &armed.awaited);
        if !missing.is_empty() && now < armed.deadline {
            return;
        }
        // A late ingress that has sent nothing holds nothing up: it may never send its marker.
        if group.hold.has_backlog() || group.hold.late.iter().any(|late| !late.queue.is_empty()) {
            return;
        }
        let (epoch, target) = (armed.epoch, armed.target);
        let group = &mut self.groups[number as usize];
        // Who is late for us is late for the next worker of this site, which gets what it sends.
        let late = group.hold.late.iter().map(|late| late.site);
        let missing = if move_id.is_local() { late.collect() } else { missing };
        let token = Token { epoch, flows: group.flows.count, digest: group.flows.digest };
        group.state = State::Relaying(Given { target, token, missing });
        group.freeze(tick(now));
        group.refresh_mode();
        self.begin_last_round(number);
        let fence = self.fences.entry(self.groups[number as usize].id).or_default();
        (fence.epoch, fence.cut) = (fence.epoch.max(epoch), Some(move_id));
        self.send_cut(number, out);
    }

    /// The round that ends with the cut: what is dirty, and everything when there was no full copy.
    fn begin_last_round(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        match &mut group.export {
            Some(export) => {
                export.round += u32::from(export.running);
                export.running = true;
                export.last = true;
                export.left = group.flows.dirty.len();
            }
            None => self.begin_full(number, true),
        }
    }

    /// Begins with everything; `last` ends with the cut.
    pub(super) fn begin_full(&mut self, number: u32, last: bool) {
        let group = &mut self.groups[number as usize];
        group.flows.rewind();
        group.flows.dirty.clear();
        group.flows.removals.clear();
        group.flows.track(true);
        let batch = Batch::default();
        group.export = Some(Export { round: 0, walking: true, left: 0, batch, running: true, last });
        group.version = group.version.wrapping_add(1);
        self.activate(number);
    }

    fn send_cut(&mut self, number: u32, out: &mut Output<B>) {
        let group = &self.groups[number as usize];
        let (State::Relaying(given), Some(move_id)) = (&group.state, group.move_id) else { return };
        let std::net::IpAddr::V4(first) = group.id.prefix.address() else { return };
        let body = MarkerBody {
            move_id,
            epoch: given.token.epoch,
            service: group.id.service,
            prefix_len: group.id.prefix.len(),
            from: self.settings.site,
        };
        // Marker and cut go to the remote side in name only: switches steer them by tag and source.
        let tag = Tag::SendCut(given.target);
        let frame = packet::build_ip(tag, MARKER_PROTOCOL, first.into(), first.into(), &body.encode());
        // Without it the target waits for its bound.
        self.send_made(&frame, out);
    }

    /// Exports some records. Pauses while the agent is slow to take what there is, or the target is.
    fn export_some(&mut self, number: u32, budget: &mut usize) {
        let batch_len = self.settings.export_batch_len;
        while *budget > 0 && self.events.len() < EVENTS_MAX {
            let group = &self.groups[number as usize];
            if !group.export.as_ref().is_some_and(|export| export.running) {
                return;
            }
            *budget -= 1;
            match self.export_one(number) {
                Step::Done => {}
                Step::NoCredit => return self.flush(number),
                Step::Over => return self.end_round(number),
            }
            let full = |export: &Export| export.batch.len() >= batch_len;
            if self.groups[number as usize].export.as_ref().is_some_and(full) {
                self.flush(number);
            }
        }
    }

    /// Takes one step of the export. In a batch, removals are older than upserts, so that a receiver who takes them in this
    /// order is never wrong.
    fn export_one(&mut self, number: u32) -> Step {
        let group = &mut self.groups[number as usize];
        let no_credit = group.credit.is_spent();
        let Some(export) = &mut group.export else { return Step::Over };
        if let Some(&key) = group.flows.removals.front() {
            if no_credit {
                return Step::NoCredit;
            }
            if !export.batch.upserts.is_empty() {
                self.flush(number);
                return Step::Done;
            }
            group.flows.removals.pop_front();
            export.batch.removals.push((key, group.version));
            group.credit.spend();
            return Step::Done;
        }
        if export.walking {
            let flow = group.flows.cursor;
            if flow != NIL {
                if no_credit {
                    return Step::NoCredit;
                }
                group.flows.cursor = self.table.next(flow);
                self.table.mark_clean(flow, &mut group.flows);
                self.export_flow(number, flow);
                return Step::Done;
            }
            export.walking = false;
        }
        if export.left == 0 {
            return Step::Over;
        }
        if no_credit {
            return Step::NoCredit;
        }
        export.left -= 1;
        let Some(flow) = group.flows.dirty.pop_front() else { return Step::Over };
        // The flow may have ended, or its place may have a newer one that is clean or of another group.
        if self.table.flow(flow).group == number && self.table.mark_clean(flow, &mut group.flows) {
            self.export_flow(number, flow);
        }
        Step::Done
    }

    fn export_flow(&mut self, number: u32, flow: u32) {
        let group = &mut self.groups[number as usize];
        self.table.flow_mut(flow).version = group.version;
        let clock = group.clock(self.tick);
        let record = self.table.record(flow, clock);
        if let Some(export) = &mut group.export {
            export.batch.upserts.push(record);
        }
        group.credit.spend();
        self.counters.flows_exported += 1;
    }

    fn flush(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        group.version = group.version.wrapping_add(1);
        let (Some(export), Some(move_id)) = (&mut group.export, group.move_id) else { return };
        if export.batch.is_empty() {
            return;
        }
        let (round, batch) = (export.round, std::mem::take(&mut export.batch));
        let session = group.credit.session;
        self.events.push_back(Event::Records { group: group.id, move_id, session, round, batch });
    }

    fn end_round(&mut self, number: u32) {
        self.flush(number);
        let group = &mut self.groups[number as usize];
        group.keep_flows(self.tick + KEPT_TICKS);
        let (Some(export), Some(move_id)) = (&mut group.export, group.move_id) else { return };
        export.running = false;
        let session = group.credit.session;
        let event = if let (State::Relaying(given), true) = (&group.state, export.last) {
            let (token, missing) = (given.token, given.missing.clone());
            Event::Cut { group: group.id, move_id, session, token, missing }
        } else {
            Event::RoundEnd {
                group: group.id,
                move_id,
                session,
                round: export.round,
                dirty: group.flows.dirty_count + group.flows.removals.len() as u64,
                flows: group.flows.count,
            }
        };
        self.events.push_back(event);
    }

    /// Ends a tombstone whose time has come; says whether the group still has work.
    fn try_end(&mut self, number: u32, now: Micros) -> bool {
        let group = &self.groups[number as usize];
        let exporting = group.export.as_ref().is_some_and(|export| export.running);
        let waits = group.hold.has_backlog() || !group.hold.late.is_empty();
        let relayed_all = group.hold.is_empty();
        let joining = group.arrival.as_ref().is_some_and(|arrival| arrival.joining.is_some());
        match group.state {
            State::Tombstone { until, .. } if until <= now && !group.purging && relayed_all => {
                if group.stays(now) {
                    self.staying.insert(number);
                } else {
                    self.drop_group(number);
                }
                false
            }
            State::Tombstone { .. } | State::Draining(_) => true,
            State::Shadow => {
                group.purging || joining || group.arrival.as_ref().is_some_and(|arrival| arrival.opening)
            }
            State::Serving | State::Copying | State::Relaying(_) | State::Open => {
                exporting || waits || group.purging || group.parting || joining || group.report_join
            }
        }
    }

    pub(super) fn drop_group(&mut self, number: u32) {
        let group = &self.groups[number as usize];
        if let Some(move_id) = group.move_id {
            self.events.push_back(Event::Gone { group: group.id, move_id });
        }
        self.staying.remove(&number);
        self.unlink_group(number);
    }

    fn install_some(&mut self, now: Micros) {
        // To put a record into the table takes some ten times as long as to take one out.
        let mut budget = SLICE_LEN / 2;
        while let Some(install) = self.installs.front_mut() {
            let number = install.group;
            let len = install.batch.len();
            while install.at < len && budget > 0 {
                let at = install.at;
                install.at += 1;
                budget -= 1;
                let removals = install.batch.removals.len();
                if at < removals {
                    let (key, version) = install.batch.removals[at];
                    Self::install_removal(&mut self.table, &mut self.groups[number as usize], &key, version);
                } else {
                    let record = install.batch.upserts[at - removals];
                    let context = InstallContext { now, number };
                    if install_record(
                        &mut self.table,
                        &mut self.groups[number as usize],
                        &self.services,
                        &record,
                        context,
                    ) {
                        self.counters.flows_imported += 1;
                        if let Some(arrival) = &mut self.groups[number as usize].arrival
                            && arrival.reserved > 0
                        {
                            arrival.reserved -= 1;
                            self.reserved -= 1;
                        }
                    }
                }
            }
            if install.at < len {
                return;
            }
            self.end_install();
        }
    }

    fn end_install(&mut self) {
        let Some(Install { group, move_id, sequence, more, .. }) = self.installs.pop_front() else { return };
        let entry = &mut self.groups[group as usize];
        if let Some(arrival) = &mut entry.arrival {
            arrival.installing = arrival.installing.saturating_sub(1);
        }
        if !more {
            self.events.push_back(Event::Installed { group: entry.id, move_id, sequence });
        }
        self.activate(group);
    }

    fn install_removal(
        table: &mut crate::table::Table,
        group: &mut crate::group::Group<B>,
        key: &flow::FlowKey,
        version: u32,
    ) {
        let Some(tuple) = tuple_of(key) else { return };
        let Some(arrival) = &mut group.arrival else { return };
        let known = arrival.removed.entry(*key).or_insert(version);
        *known = (*known).max(version);
        if let Some(digest) = arrival.clashes.remove(key) {
            arrival.shadow = (arrival.shadow.0 - 1, arrival.shadow.1.wrapping_sub(digest));
            return;
        }
        let Some(flow) = table.find(true, &tuple) else { return };
        let entry = *table.flow(flow);
        if entry.flags & flags::IMPORTED == 0 || entry.version >= version {
            return;
        }
        let digest = flow::digest(key, &Fixed::Nat44 { outside_port: entry.outside_port });
        arrival.shadow = (arrival.shadow.0 - 1, arrival.shadow.1.wrapping_sub(digest));
        if entry.flags & flags::TOUCHED != 0 {
            // It ended there, but is in use here.
            table.flow_mut(flow).flags &= !flags::IMPORTED;
            return;
        }
        table.remove(flow, &mut group.flows);
    }
}

/// What came of one step of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There may be more.
    Done,
    /// The round has nothing left.
    Over,
    /// There is more than the agent has asked for.
    NoCredit,
}

/// When and for whom a record is installed.
#[derive(Clone, Copy, Debug)]
struct InstallContext {
    now: Micros,
    number: u32,
}

/// Puts a record into a shadow; says whether a flow is new here. Older records than what is known are
/// ignored.
fn install_record<B>(
    table: &mut crate::table::Table,
    group: &mut crate::group::Group<B>,
    services: &[crate::nat::Service],
    record: &FlowRecord,
    context: InstallContext,
) -> bool {
    let Some(tuple) = tuple_of(&record.key) else { return false };
    let clock = group.clock(tick(context.now));
    let Some(arrival) = &mut group.arrival else { return false };
    if arrival.removed.get(&record.key).is_some_and(|removed| *removed > record.version) {
        return false;
    }
    let Fixed::Nat44 { outside_port } = record.fixed;
    group.version = group.version.max(record.version);
    let mut found = table.find(true, &tuple);
    if let Some(flow) = found {
        let entry = *table.flow(flow);
        if entry.flags & flags::IMPORTED != 0 && entry.version > record.version {
            return false;
        }
        if entry.outside_port != outside_port && !group.open {
            let gone = flow::digest(&record.key, &Fixed::Nat44 { outside_port: entry.outside_port });
            arrival.shadow = (arrival.shadow.0 - 1, arrival.shadow.1.wrapping_sub(gone));
            table.remove(flow, &mut group.flows);
            found = None;
        }
    }
    if arrival.clashes.contains_key(&record.key) {
        return false;
    }
    let known = found.is_some_and(|flow| table.flow(flow).flags & flags::IMPORTED != 0);
    if !known {
        arrival.shadow = (arrival.shadow.0 + 1, arrival.shadow.1.wrapping_add(record.digest()));
    }
    if found.is_some_and(|flow| table.flow(flow).outside_port != outside_port) {
        // Relaxed: a flow that was opened here meanwhile keeps its port.
        arrival.clashes.insert(record.key, record.digest());
        return false;
    }
    let Some(flow) = found else {
        let new = insert_record(table, group, services, record, clock, context);
        if let Some(arrival) = group.arrival.as_mut().filter(|_| group.open && !new) {
            arrival.clashes.insert(record.key, record.digest());
        }
        return new;
    };
    let joined = if group.open && (!known || table.flow(flow).flags & flags::TOUCHED != 0) {
        let base = arrival.bases.insert(flow, record.joined).unwrap_or_default();
        let is_renewed = table.flow(flow).flags & flags::RENEWED != 0;
        table.joined(flow, clock).join(&base, &record.joined, is_renewed)
    } else {
        record.joined
    };
    table.set_joined(flow, &joined, clock);
    let entry = table.flow_mut(flow);
    entry.version = record.version;
    entry.flags |= flags::IMPORTED | if group.open && !known { flags::TOUCHED } else { 0 };
    false
}

fn insert_record<B>(
    table: &mut crate::table::Table,
    group: &mut crate::group::Group<B>,
    services: &[crate::nat::Service],
    record: &FlowRecord,
    clock: u32,
    context: InstallContext,
) -> bool {
    let Some(tuple) = tuple_of(&record.key) else { return false };
    let Fixed::Nat44 { outside_port } = record.fixed;
    let Some(service) = services.iter().find(|known| known.spec.service == group.id.service) else {
        return false;
    };
    let block = service.slices.subscriber(tuple.client.into()).and_then(|s| service.slices.block(s));
    let Some(block) = block else { return false };
    // A conflict leaves the digest short of the token: the join is refused and the copy made again.
    let bound = table.mappings.bind_exactly(tuple.protocol, tuple.client, tuple.port, outside_port);
    let mapping = match bound {
        Ok(mapping) => mapping,
        Err(BindError::Conflict | BindError::Exhausted) => return false,
    };
    let life = record.joined.remaining_s.saturating_mul(crate::table::TICKS_PER_SECOND);
    let new = NewFlow {
        tuple,
        outside: block.address.into(),
        group: context.number,
        mapping,
        expires: clock.saturating_add(life),
        expires_wall: tick(context.now).saturating_add(life),
        tcp: record.joined.tcp,
        ingress: record.joined.ingress.0,
        flags: flags::IMPORTED | if crate::nat::in_pool(services, tuple.remote) { flags::HAIRPIN } else { 0 },
    };
    table.mappings.set_ingress(mapping, record.joined.ingress.0);
    let Some(flow) = table.insert(new, &mut group.flows) else {
        table.mappings.remove_unused(mapping);
        return false;
    };
    table.set_joined(flow, &record.joined, clock);
    table.flow_mut(flow).version = record.version;
    true
}
