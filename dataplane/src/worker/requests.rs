//! What the agent asks.

use flow::nat::NatSlices;
use flow::{Batch, Epoch, GroupId, Micros, MoveId, SiteId, Token};

use super::{Install, OLD_REQUESTS, Worker, mask, tick};
use crate::control::{
    BATCH_LEN_MAX, Event, Function, GroupLoad, GroupStatus, Ordering, Request, ServiceSpec, Stats, VERSION,
};
use crate::group::{Armed, Arrival, Credit, Group, Joining, Sites, State, Stay};
use crate::io::PacketBuf;
use crate::nat::{Service, check_record};
use crate::table::{NIL, flags};

/// Why a request was refused, for people.
pub(super) type Refusal = String;

impl<B: PacketBuf> Worker<B> {
    /// Handles a request; what comes of it is polled with [`Worker::poll_event`], some of it after slices.
    pub fn handle(&mut self, request: Request, now: Micros) {
        let about = subject(&request);
        if let Err(reason) = self.answer(request, now)
            && let Some((group, move_id)) = about
        {
            self.events.push_back(Event::Refused { group, move_id, reason });
        }
    }

    fn answer(&mut self, request: Request, now: Micros) -> Result<(), Refusal> {
        match request {
            Request::Hello { .. } => {
                self.hello();
                Ok(())
            }
            Request::Services(specs) => self.set_services(specs),
            Request::Status => {
                self.status();
                Ok(())
            }
            Request::Stats => {
                self.stats(now);
                Ok(())
            }
            Request::Serve { group, epoch } => self.serve_group(group, epoch, now),
            Request::CopyStart { group, move_id, session, credit } => {
                self.copy_start(group, move_id, Credit::new(session, credit), now)
            }
            Request::CopyRound { group, move_id } => self.copy_round(group, move_id),
            Request::Arm { group, move_id, epoch, target, awaited, bound_us, session, credit, again } => {
                let deadline = now.plus(Micros(bound_us));
                let armed = Armed { epoch, target, awaited, deadline };
                self.arm(group, move_id, armed, Wanted { credit: Credit::new(session, credit), again })
            }
            Request::Credit { group, move_id, session, credit } => {
                self.grant(&group, move_id, Credit::new(session, credit));
                Ok(())
            }
            Request::Disarm { group, move_id, withdraw } => {
                self.disarm(group, move_id, withdraw);
                Ok(())
            }
            Request::Forget { group, move_id, epoch, target, relay_us, ingresses, relay_late_us } => {
                let stay = Stay::new(ingresses.into_iter().collect(), Micros(relay_late_us), now);
                let burial = Burial { move_id, to: target, until: now.plus(Micros(relay_us)), stay };
                self.forget(group, epoch, burial)
            }
            Request::Prepare { group, move_id, epoch, source, flows, ordering } => {
                self.prepare(group, move_id, epoch, Reservation { source, flows, ordering }, now)
            }
            Request::Open { group, move_id } => self.open_shadow(group, move_id),
            Request::Install { group, move_id, sequence, batch, more } => {
                self.install(group, move_id, sequence, batch, more)
            }
            Request::Join { group, move_id, token, missing, late_bound_us, cut_bound_us } => {
                let cut_deadline = now.plus(Micros(cut_bound_us));
                let late_bound = Micros(late_bound_us);
                let joining = Joining { token: Some(token), missing, late_bound, cut_deadline };
                self.ask_join(group, move_id, joining, now)
            }
            Request::TakeOver { group, move_id } => {
                let joining =
                    Joining { token: None, missing: Vec::new(), late_bound: Micros(0), cut_deadline: now };
                self.ask_join(group, move_id, joining, now)
            }
            Request::Abandon { group, move_id, relay_us, relay_late_us } => {
                let stay = Stay::new(Sites::ALL, Micros(relay_late_us), now);
                self.abandon(group, move_id, now.plus(Micros(relay_us)), stay)
            }
            Request::Yield { group, relay_us } => {
                self.yield_group(group, now.plus(Micros(relay_us)));
                Ok(())
            }
        }
    }

    fn hello(&mut self) {
        self.events.push_back(Event::Hello {
            version: VERSION,
            worker: self.settings.worker,
            capacity: self.table.capacity() as u64,
            boot: self.settings.boot,
        });
    }

    fn set_services(&mut self, specs: Vec<ServiceSpec>) -> Result<(), Refusal> {
        let mut fresh = Vec::new();
        for spec in specs {
            let Function::Nat44(nat) = &spec.function;
            let slices = NatSlices::new(nat.clone()).map_err(|error| error.to_string());
            let slices = match slices {
                Ok(slices) => slices,
                Err(reason) => return self.refuse_service(&spec, reason),
            };
            let known = self.services.iter().find(|known| known.spec.service == spec.service);
            let in_use = self.by_id.keys().any(|id| id.service == spec.service);
            if known.is_some_and(|known| known.spec.function != spec.function) && in_use {
                let reason = format!("service {} has groups here: its addresses cannot change", spec.service);
                return self.refuse_service(&spec, reason);
            }
            fresh.push(Service { spec, slices });
        }
        for service in fresh {
            match self.services.iter_mut().find(|known| known.spec.service == service.spec.service) {
                Some(known) => *known = service,
                None => self.services.push(service),
            }
        }
        self.events.push_back(Event::ServicesSet);
        Ok(())
    }

    /// A refusal that is about a service names its first client prefix as the group.
    fn refuse_service(&mut self, spec: &ServiceSpec, reason: Refusal) -> Result<(), Refusal> {
        let Function::Nat44(nat) = &spec.function;
        let Some(prefix) = nat.clients.first().copied().or_else(|| "0.0.0.0/0".parse().ok()) else {
            return Ok(());
        };
        let group = GroupId { service: spec.service, prefix };
        self.events.push_back(Event::Refused { group, move_id: None, reason });
        Ok(())
    }

    fn status(&mut self) {
        let services = self.services.iter().map(|known| known.spec.service).collect();
        let status = |number: &u32| {
            let group = &self.groups[*number as usize];
            GroupStatus {
                group: group.id,
                epoch: group.epoch,
                move_id: group.move_id,
                phase: group.phase(),
                flows: group.flows.count,
            }
        };
        let groups = self.by_id.values().map(status).collect();
        self.events.push_back(Event::Status { services, groups });
    }

    fn stats(&mut self, now: Micros) {
        // One that came sooner had waited in the socket.
        self.woke = self.woke.filter(|woke| now < woke.plus(OLD_REQUESTS));
        let mut groups = Vec::new();
        for &number in self.by_id.values() {
            let group = &mut self.groups[number as usize];
            let load = std::mem::take(&mut group.load);
            if load.packets > 0
                || group.flows.count > 0
                || !load.inside.is_empty()
                || !load.outside.is_empty()
            {
                groups.push(GroupLoad {
                    group: group.id,
                    flows: group.flows.count,
                    packets: load.packets,
                    bytes: load.bytes,
                    inside_ingress: load.inside,
                    outside_ingress: load.outside,
                });
            }
        }
        let span = now.since(std::mem::replace(&mut self.reported, now)).0;
        let idle = std::mem::take(&mut self.idle).0.min(span);
        let busy = if span == 0 { 0.0 } else { 1.0 - idle as f64 / span as f64 };
        let (round_trips, talks) = (self.round_trips.take(), self.round_trips.take_talks());
        let groups_known = self.by_id.len() as u64;
        let link_down = self.link_down;
        let counters = self.counters();
        let stats = Stats { counters, groups, round_trips, talks, busy, groups_known, link_down };
        self.events.push_back(Event::Stats(Box::new(stats)));
    }

    fn number(&self, id: &GroupId) -> Result<u32, Refusal> {
        self.by_id.get(id).copied().ok_or_else(|| format!("group {id} is not on this worker"))
    }

    fn check_epoch(&self, id: &GroupId, epoch: Epoch) -> Result<(), Refusal> {
        let had = self.fences.get(id).map_or(Epoch(0), |fence| fence.epoch);
        if epoch < had {
            Err(format!("epoch {epoch} of group {id} is below {had}, which was seen"))
        } else {
            Ok(())
        }
    }

    fn raise_epoch(&mut self, id: GroupId, epoch: Epoch) {
        let fence = self.fences.entry(id).or_default();
        fence.epoch = fence.epoch.max(epoch);
    }

    /// The group's number; made as a served one when it is not here.
    fn make_group(&mut self, id: GroupId, epoch: Epoch) -> Result<u32, Refusal> {
        if let Some(&number) = self.by_id.get(&id) {
            self.staying.remove(&number);
            return Ok(number);
        }
        self.check_prefix(&id)?;
        let overlaps = |(known, _): &(&GroupId, &u32)| known.prefix.overlaps(&id.prefix);
        let overlapping = self.by_id.iter().filter(overlaps);
        let (staying, others): (Vec<_>, Vec<_>) =
            overlapping.partition(|(_, number)| self.staying.contains(number));
        if let Some((known, _)) = others.first() {
            return Err(format!("group {id} overlaps {known}, which is on this worker"));
        }
        // A whole that still relays does so for the other half.
        let parts = staying.into_iter().filter(|(known, _)| id.prefix.covers(&known.prefix));
        for number in parts.map(|(_, number)| *number).collect::<Vec<_>>() {
            self.active.retain(|other| *other != number);
            self.drop_group(number);
        }
        self.add_group(id, epoch)
    }

    pub(super) fn add_group(&mut self, id: GroupId, epoch: Epoch) -> Result<u32, Refusal> {
        let group = Group::new(id, epoch);
        let number = match self.groups_free.pop() {
            Some(number) => {
                self.groups[number as usize] = group;
                number
            }
            None => {
                self.groups.push(group);
                u32::try_from(self.groups.len() - 1).map_err(|_| "too many groups".to_owned())?
            }
        };
        self.by_id.insert(id, number);
        let std::net::IpAddr::V4(address) = id.prefix.address() else { return Err("not IPv4".to_owned()) };
        let len = id.prefix.len();
        let prefixes = self.by_prefix[usize::from(len)].get_or_insert_default();
        prefixes.insert(u32::from(address) & mask(len), number);
        Ok(number)
    }

    pub(super) fn check_prefix(&self, id: &GroupId) -> Result<(), Refusal> {
        let service = self.services.iter().find(|known| known.spec.service == id.service);
        let service = service.ok_or_else(|| format!("service {} is not known here", id.service))?;
        if !service.slices.spec().clients.iter().any(|clients| clients.covers(&id.prefix)) {
            return Err(format!("group {id} is not inside the clients of service {}", id.service));
        }
        Ok(())
    }

    /// Takes a group without flows out of everything.
    pub(super) fn unlink_group(&mut self, number: u32) {
        self.unname_group(number);
        self.groups_free.push(number);
    }

    /// No packet or request finds the group any more.
    pub(super) fn unname_group(&mut self, number: u32) {
        let id = self.groups[number as usize].id;
        self.by_id.remove(&id);
        if let std::net::IpAddr::V4(address) = id.prefix.address()
            && let Some(prefixes) = &mut self.by_prefix[usize::from(id.prefix.len())]
        {
            prefixes.remove(&u32::from(address));
            if prefixes.is_empty() {
                self.by_prefix[usize::from(id.prefix.len())] = None;
            }
        }
    }

    fn serve_group(&mut self, id: GroupId, epoch: Epoch, now: Micros) -> Result<(), Refusal> {
        self.check_epoch(&id, epoch)?;
        self.reshape(id, epoch)?;
        let number = self.make_group(id, epoch)?;
        self.finish_purge(number);
        self.raise_epoch(id, epoch);
        self.drop_arrival(number);
        let group = &mut self.groups[number as usize];
        let in_move = matches!(group.state, State::Copying | State::Draining(_)) && group.epoch == epoch;
        group.epoch = epoch;
        group.hold.unpark();
        if !in_move {
            group.stop_export();
            group.unfreeze(tick(now));
            group.state = State::Serving;
            group.move_id = None;
        }
        group.refresh_mode();
        self.activate(number);
        self.report_serving(number);
        Ok(())
    }

    fn drop_arrival(&mut self, number: u32) {
        if let Some(arrival) = self.groups[number as usize].arrival.take() {
            self.reserved -= arrival.reserved;
        }
        self.installs.retain(|install| install.group != number);
    }

    /// Removes what is left of a group's flows at once, because the group is wanted again.
    pub(super) fn finish_purge(&mut self, number: u32) {
        if self.groups[number as usize].purging {
            self.purge(number, usize::MAX);
        }
    }

    fn copy_start(
        &mut self,
        id: GroupId,
        move_id: MoveId,
        credit: Credit,
        now: Micros,
    ) -> Result<(), Refusal> {
        self.finish_parting(&id);
        let number = self.number(&id)?;
        let group = &mut self.groups[number as usize];
        match group.state {
            State::Serving | State::Copying => {}
            State::Draining(_) if group.move_id == Some(move_id) => {}
            State::Draining(_)
            | State::Relaying(_)
            | State::Tombstone { .. }
            | State::Shadow
            | State::Open => {
                return Err(format!("group {id} is {:?}: it cannot be copied", group.phase()));
            }
        }
        // The switch of the site would lead what its old owner still relays, and its marker, to the next worker, past what waits here.
        if let Some(site) = group.hold.awaited(now).filter(|_| move_id.is_local()) {
            return Err(format!(
                "group {id} waits for ingress {site} to flip: it goes to no other worker before"
            ));
        }
        group.move_id = Some(move_id);
        if !matches!(group.state, State::Draining(_)) {
            group.state = State::Copying;
        }
        group.refresh_mode();
        group.credit = credit;
        self.begin_full(number, false);
        Ok(())
    }

    /// The target has room for more.
    fn grant(&mut self, id: &GroupId, move_id: MoveId, credit: Credit) {
        let Ok(number) = self.number(id) else { return };
        let group = &mut self.groups[number as usize];
        if group.move_id == Some(move_id) {
            group.credit.raise(credit);
            self.activate(number);
        }
    }

    fn copy_round(&mut self, id: GroupId, move_id: MoveId) -> Result<(), Refusal> {
        let number = self.number(&id)?;
        let group = &mut self.groups[number as usize];
        let serving = matches!(group.state, State::Copying | State::Draining(_));
        let Some(export) = group.export.as_mut().filter(|_| serving && group.move_id == Some(move_id)) else {
            return Err(format!("group {id} has no copy of move {move_id} in hand: start one"));
        };
        if !export.running {
            export.running = true;
            export.round += 1;
            export.left = group.flows.dirty.len();
        }
        self.activate(number);
        Ok(())
    }

    fn arm(&mut self, id: GroupId, move_id: MoveId, armed: Armed, wanted: Wanted) -> Result<(), Refusal> {
        let Wanted { credit, again } = wanted;
        self.finish_parting(&id);
        let number = self.number(&id)?;
        let fence = self.fences.get(&id).map_or(Epoch(0), |fence| fence.epoch);
        let group = &mut self.groups[number as usize];
        if group.disarmed == Some(move_id) {
            return Err(format!("move {move_id} of group {id} was disarmed: it can no longer cut"));
        }
        match &mut group.state {
            State::Relaying(_) if group.move_id == Some(move_id) && !again => group.credit.raise(credit),
            State::Relaying(_) if group.move_id == Some(move_id) => {
                group.credit = credit;
                self.begin_full(number, true);
            }
            State::Draining(present) if group.move_id == Some(move_id) => {
                let deadline = present.deadline.min(armed.deadline);
                *present = Armed { deadline, ..armed };
                group.credit.raise(credit);
            }
            State::Serving | State::Copying => {
                // Between two workers of a site the owner stays the same, and so does the epoch.
                let lowest = if move_id.is_local() { group.epoch } else { group.epoch.next() };
                if armed.epoch < lowest.max(fence) {
                    return Err(format!(
                        "epoch {} of group {id} is below {}",
                        armed.epoch,
                        lowest.max(fence)
                    ));
                }
                if group.move_id != Some(move_id) {
                    group.stop_export();
                    group.credit = credit;
                }
                group.credit.raise(credit);
                group.move_id = Some(move_id);
                group.state = State::Draining(armed);
                group.refresh_mode();
            }
            State::Draining(_)
            | State::Relaying(_)
            | State::Tombstone { .. }
            | State::Shadow
            | State::Open => {
                return Err(format!(
                    "group {id} is {:?}: it cannot be armed for move {move_id}",
                    group.phase()
                ));
            }
        }
        self.activate(number);
        Ok(())
    }

    fn disarm(&mut self, id: GroupId, move_id: MoveId, withdraw: bool) {
        let mut withdrawn = false;
        let mut cut = self.fences.get(&id).is_some_and(|fence| fence.cut == Some(move_id));
        if let Ok(number) = self.number(&id) {
            let group = &mut self.groups[number as usize];
            match group.state {
                State::Copying | State::Draining(_) if group.move_id == Some(move_id) => {
                    group.stop_export();
                    group.state = State::Serving;
                    group.move_id = None;
                    group.refresh_mode();
                }
                State::Tombstone { .. } if group.move_id == Some(move_id) => cut = true,
                State::Serving
                | State::Copying
                | State::Draining(_)
                | State::Relaying(_)
                | State::Tombstone { .. }
                | State::Shadow
                | State::Open => {}
            }
            let relays = matches!(group.state, State::Relaying(_)) && group.move_id == Some(move_id);
            if !cut || relays && withdraw {
                group.disarmed = Some(move_id);
            }
            withdrawn = relays && group.disarmed == Some(move_id);
        }
        self.events.push_back(Event::Disarmed { group: id, move_id, cut, withdrawn });
    }

    fn forget(&mut self, id: GroupId, epoch: Epoch, burial: Burial) -> Result<(), Refusal> {
        let move_id = burial.move_id;
        let Ok(number) = self.number(&id) else {
            self.events.push_back(Event::Gone { group: id, move_id });
            return Ok(());
        };
        self.check_epoch(&id, epoch)?;
        let group = &self.groups[number as usize];
        let given = group.move_id == Some(move_id)
            && matches!(group.state, State::Relaying(_) | State::Tombstone { .. });
        if !given && epoch <= group.epoch {
            return Err(format!("group {id} is served under epoch {}, not below {epoch}", group.epoch));
        }
        self.raise_epoch(id, epoch);
        self.finish_parting(&id);
        self.bury(number, burial);
        Ok(())
    }

    /// What is given away already goes on as it is.
    fn yield_group(&mut self, id: GroupId, until: Micros) {
        let Ok(number) = self.number(&id) else { return };
        let state = &self.groups[number as usize].state;
        if !matches!(state, State::Serving | State::Copying | State::Draining(_)) {
            return;
        }
        self.finish_parting(&id);
        let site = self.settings.site;
        let stay = Stay::default();
        self.bury(number, Burial { move_id: MoveId::default(), to: site, until, stay });
    }

    /// Relays for a while, and forgets the flows meanwhile.
    fn bury(&mut self, number: u32, burial: Burial) {
        let Burial { move_id, to, until, stay } = burial;
        self.drop_arrival(number);
        self.staying.remove(&number);
        let group = &mut self.groups[number as usize];
        let behind = if group.move_id == Some(move_id) { group.behind() } else { Vec::new() };
        group.stop_export();
        group.move_id = Some(move_id);
        group.hold.unpark();
        group.report_join = false;
        group.state = State::Tombstone { to, until, behind, relaying: Vec::new(), stay };
        group.purging = true;
        group.refresh_mode();
        self.activate(number);
    }

    fn prepare(
        &mut self,
        id: GroupId,
        move_id: MoveId,
        epoch: Epoch,
        wanted: Reservation,
        now: Micros,
    ) -> Result<(), Refusal> {
        self.check_epoch(&id, epoch)?;
        if let Ok(number) = self.number(&id) {
            let group = &self.groups[number as usize];
            if group.joined == Some(move_id) && group.serves() {
                // An agent that is new does not know; to refuse would say that the target never served.
                if !group.report_join {
                    self.report_join(number);
                }
                return Ok(());
            }
            if group.state == State::Open && group.move_id == Some(move_id) {
                return self.reopen(number, wanted.flows, now);
            }
            if group.serves() || matches!(group.state, State::Relaying(_)) {
                return Err(format!("group {id} is {:?} here: it cannot be a target", group.phase()));
            }
            if !self.staying.contains(&number) {
                check_return(group)?;
            }
        }
        let of_this = self.number(&id).map_or(0, |number| {
            let group = &self.groups[number as usize];
            group.flows.count + group.arrival.as_ref().map_or(0, |arrival| arrival.reserved)
        });
        let room = (self.table.room() as u64).saturating_sub(self.reserved) + of_this;
        if wanted.flows > room {
            return Err(format!("{} flows wanted, room for {room}", wanted.flows));
        }
        let number = self.make_group(id, epoch)?;
        self.raise_epoch(id, epoch);
        self.drop_arrival(number);
        self.reserved += wanted.flows;
        let group = &mut self.groups[number as usize];
        if group.move_id != Some(move_id) {
            group.hold.renew();
        }
        let cut_seen = group.move_id == Some(move_id) && group.frozen.is_some();
        group.stop_export();
        (group.epoch, group.move_id, group.joined, group.state) = (epoch, Some(move_id), None, State::Shadow);
        group.version = 0;
        if !cut_seen {
            (group.offset, group.frozen) = (0, None);
        }
        group.arrival = Some(Arrival::new(wanted.source, wanted.ordering, wanted.flows, cut_seen));
        group.refresh_mode();
        group.purging = true;
        self.purge(number, 0);
        self.activate(number);
        Ok(())
    }

    /// Relaxed: another copy comes for a group that is served already. What is here stays, with what it was imported
    /// with as the base of the next join.
    fn reopen(&mut self, number: u32, flows: u64, now: Micros) -> Result<(), Refusal> {
        self.installs.retain(|install| install.group != number);
        let room = (self.table.room() as u64).saturating_sub(self.reserved);
        let group = &mut self.groups[number as usize];
        let (id, move_id, clock) = (group.id, group.move_id, group.clock(tick(now)));
        let Some(arrival) = &mut group.arrival else { return Ok(()) };
        let mut flow = group.flows.first();
        while let Some(number) = flow.filter(|number| *number != NIL) {
            let known = self.table.flow(number).flags;
            if known & (flags::IMPORTED | flags::TOUCHED) == flags::IMPORTED {
                arrival.bases.insert(number, self.table.joined(number, clock));
            }
            let entry = self.table.flow_mut(number);
            entry.flags = (entry.flags | flags::TOUCHED) & !flags::IMPORTED;
            flow = Some(self.table.next(number));
        }
        let more = flows.saturating_sub(group.flows.count).min(room + arrival.reserved);
        self.reserved = self.reserved - arrival.reserved + more;
        arrival.reserved = more;
        (arrival.shadow, arrival.installing, arrival.joining) = ((0, 0), 0, None);
        arrival.removed.clear();
        arrival.clashes.clear();
        self.events.extend(move_id.map(|move_id| Event::Prepared { group: id, move_id }));
        Ok(())
    }

    /// The group, when it is the target of this move and has not joined.
    fn arriving(&self, id: &GroupId, move_id: MoveId) -> Result<u32, Refusal> {
        let number = self.number(id)?;
        let group = &self.groups[number as usize];
        if group.move_id == Some(move_id) && group.arrival.is_some() {
            Ok(number)
        } else {
            Err(format!("group {id} is {:?} and does not await move {move_id}", group.phase()))
        }
    }

    fn open_shadow(&mut self, id: GroupId, move_id: MoveId) -> Result<(), Refusal> {
        if let Ok(number) = self.number(&id)
            && self.groups[number as usize].joined == Some(move_id)
        {
            return Ok(());
        }
        let number = self.arriving(&id, move_id)?;
        if !self.is_relaxed(number) {
            return Err(format!("move {move_id} of group {id} is strict: it opens by its token only"));
        }
        let group = &mut self.groups[number as usize];
        if let Some(arrival) = &mut group.arrival {
            arrival.opening = true;
        }
        self.activate(number);
        Ok(())
    }

    fn install(
        &mut self,
        id: GroupId,
        move_id: MoveId,
        sequence: u64,
        batch: Batch,
        more: bool,
    ) -> Result<(), Refusal> {
        if let Ok(number) = self.number(&id)
            && self.groups[number as usize].joined == Some(move_id)
        {
            // Sent again after the join: everything is here.
            if !more {
                self.events.push_back(Event::Installed { group: id, move_id, sequence });
            }
            return Ok(());
        }
        let number = self.arriving(&id, move_id)?;
        self.finish_purge(number);
        if batch.len() > BATCH_LEN_MAX {
            return Err(format!("a batch of {} records is above {BATCH_LEN_MAX}", batch.len()));
        }
        let service = self.services.iter().find(|known| known.spec.service == id.service);
        let service = service.ok_or_else(|| format!("service {} is not known here", id.service))?;
        for record in &batch.upserts {
            check_record(&service.slices, &id, record)?;
        }
        if let Some((key, _)) = batch.removals.iter().find(|(key, _)| !id.prefix.contains(key.client.address))
        {
            return Err(format!("client {} is outside the group {id}", key.client.address));
        }
        if let Some(arrival) = &mut self.groups[number as usize].arrival {
            arrival.installing += 1;
        }
        self.installs.push_back(Install { group: number, move_id, sequence, batch, more, at: 0 });
        Ok(())
    }

    fn ask_join(
        &mut self,
        id: GroupId,
        move_id: MoveId,
        joining: Joining,
        now: Micros,
    ) -> Result<(), Refusal> {
        if let Ok(number) = self.number(&id)
            && self.groups[number as usize].joined == Some(move_id)
        {
            if !self.groups[number as usize].report_join {
                self.report_join(number);
            }
            return Ok(());
        }
        let number = self.arriving(&id, move_id)?;
        let group = &mut self.groups[number as usize];
        if let Some(Token { epoch, .. }) = joining.token
            && epoch != group.epoch
        {
            return Err(format!("the token's epoch {epoch} is not {}, which was prepared", group.epoch));
        }
        // The source has cut: from here on the flows' time stands still until they are served.
        group.freeze(tick(now));
        if let Some(arrival) = &mut group.arrival {
            arrival.joining = Some(joining);
        }
        self.activate(number);
        Ok(())
    }

    fn abandon(&mut self, id: GroupId, move_id: MoveId, until: Micros, stay: Stay) -> Result<(), Refusal> {
        let joined =
            self.number(&id).is_ok_and(|number| self.groups[number as usize].joined == Some(move_id));
        if !joined && let Ok(number) = self.arriving(&id, move_id) {
            let group = &self.groups[number as usize];
            let source = group.arrival.as_ref().map_or(self.settings.site, |arrival| arrival.source);
            self.bury(number, Burial { move_id, to: source, until, stay });
        }
        self.events.push_back(Event::Abandoned { group: id, move_id, joined });
        if self.number(&id).is_err() {
            // Nothing had come of the move here, so nothing relays.
            self.events.push_back(Event::Gone { group: id, move_id });
        }
        Ok(())
    }
}

/// What is to be exported with a cut.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    credit: Credit,
    again: bool,
}

/// How a group is given away: to whom, by which move, and for how long it is relayed.
#[derive(Clone, Copy, Debug)]
struct Burial {
    move_id: MoveId,
    to: SiteId,
    until: Micros,
    stay: Stay,
}

/// Whether a group that was given away may come back: what is relayed for it and what a new move would hold look the same.
fn check_return<B>(group: &Group<B>) -> Result<(), Refusal> {
    let id = group.id;
    if let Some(site) = group.behind().first() {
        return Err(format!("ingress {site} still sends packets of {id} by an old path to here"));
    }
    if let State::Tombstone { relaying, .. } = &group.state
        && let Some(site) = relaying.first()
    {
        return Err(format!("site {site} still relays packets of {id} to here by an old path"));
    }
    Ok(())
}

/// What a target makes room for.
#[derive(Clone, Copy, Debug)]
struct Reservation {
    source: SiteId,
    flows: u64,
    ordering: Ordering,
}

/// The group and move that a refusal of this request is about.
fn subject(request: &Request) -> Option<(GroupId, Option<MoveId>)> {
    match request {
        Request::Hello { .. } | Request::Services(_) | Request::Status | Request::Stats => None,
        Request::Serve { group, .. } | Request::Yield { group, .. } => Some((*group, None)),
        Request::CopyStart { group, move_id, .. }
        | Request::CopyRound { group, move_id }
        | Request::Arm { group, move_id, .. }
        | Request::Disarm { group, move_id, .. }
        | Request::Forget { group, move_id, .. }
        | Request::Prepare { group, move_id, .. }
        | Request::Open { group, move_id }
        | Request::Install { group, move_id, .. }
        | Request::Credit { group, move_id, .. }
        | Request::Join { group, move_id, .. }
        | Request::TakeOver { group, move_id }
        | Request::Abandon { group, move_id, .. } => Some((*group, Some(*move_id))),
    }
}
