//! The processes of a site: agent with its driver, workers, and the sockets between them.

use std::collections::VecDeque;

use dataplane::control::{Event, Request};
use dataplane::worker::{Output as Sent, Settings, Wait, Worker};
use flow::steer::Tag;
use flow::{MoveId, Protocol, SiteId, WorkerId};
use limosa::site::core::{Agent, Bounds, Input, Output};
use placement::core::MovePhase;
use switchctl::Ports;
use switchctl::core::driver::Driver;
use switchctl::ofp::Message;
use transfer::core::{Pace, ToSource, ToTarget};

use crate::checks::serves;
use crate::links::State;
use crate::log::{BLOCK_LEN, FIRST_PORT};
use crate::mutation::Mutation;
use crate::packet;
use crate::slow::Part;
use crate::traffic::{LIVE, Sending, Way};
use crate::world::{Checked, Happening, IDLE, Life, Open, Place, Process, Queue, SITES, Stream, World};

/// The worker that comes and goes with the load.
pub(crate) const EXTRA: WorkerId = WorkerId(3);

/// Short, so that a seed takes a few virtual seconds, and above three times the longest delay. Old owners relay for longer than any agent or
/// switch is away.
pub(crate) const BOUNDS: Bounds = Bounds {
    marker_us: 400_000,
    take_back_us: 1_200_000,
    cut_us: 300_000,
    late_us: 600_000,
    relay_us: 4_000_000,
    relay_late_us: 7_000_000,
    pace: PACE,
};

/// Between two attempts to open a stream.
const STREAM_RETRY: u64 = 40_000;
/// How long a stream waits for a connection that is being made, and how often it looks.
const CONNECTION_WAIT: u64 = 400_000;
const CONNECTION_LOOK: u64 = 5_000;

/// So that groups of a dozen flows take several chunks, the window fills, and there are several rounds.
pub(crate) const PACE: Pace = Pace { chunk_records: 2, window_chunks: 2, dirty_small: 1, rounds_max: 4 };

impl World {
    pub(crate) fn life(&mut self, site: SiteId, number: u32) -> Option<&mut Life> {
        self.sites.get_mut(&site)?.life.as_mut().filter(|life| life.number == number)
    }

    // ---- agent ----------------------------------------------------------------------------------------

    pub(crate) fn agent_start(&mut self, site: SiteId) {
        let Some(state) = self.sites.get_mut(&site) else { return };
        if state.life.is_some() || state.lost {
            return;
        }
        state.lives += 1;
        let number = state.lives;
        let workers: Vec<_> = state.workers.keys().copied().collect();
        let ports =
            Ports::conventional(SITES.into_iter().filter(|peer| *peer != site), (0..=EXTRA.0).map(WorkerId));
        // Those that came with the load are in no configuration, but their control sockets are found.
        let there = |place: &Place| !place.extra || place.process.is_some();
        let expected = state.workers.iter().filter(|(_, place)| there(place)).map(|(id, _)| *id);
        let agent = Agent::new(site, number << 8, ports, expected, BOUNDS);
        let driver = Driver::default();
        state.life = Some(Life {
            agent,
            driver,
            number,
            connection: 0,
            connected_at: 0,
            pause: crate::session::pause_min(),
            switch_timer_at: u64::MAX,
            timer_at: u64::MAX,
            watched: 0,
            fresh: true,
            answered_until: 0,
            catches_up: false,
        });
        self.trace(|| format!("agent {site} starts, life {number}"));
        let wait = self.between(100, 5_000);
        self.after(wait, Happening::SwitchConnect(site, number));
        for worker in workers {
            let wait = self.between(100, 20_000);
            self.after(wait, Happening::WorkerConnect(site, number, worker));
        }
        self.links_start(site, number);
        self.poke_watch(site);
        self.after(1, Happening::AgentTimer(site, number));
    }

    pub(crate) fn agent_crash(&mut self, site: SiteId) {
        self.switch_severed(site);
        let Some(state) = self.sites.get_mut(&site) else { return };
        state.life = None;
        state.stopped_until = 0;
        for place in state.workers.values_mut() {
            place.connection = 0;
        }
        self.trace(|| format!("agent {site} crashes"));
        self.streams.retain(|_, stream| stream.from != site);
        self.links_end(site);
    }

    pub(crate) fn agent_input(&mut self, site: SiteId, number: u32, input: Input) {
        if let Some(until) = self.stopped(site) {
            // In the order of asking, also behind what had to wait before.
            return self.schedule.put_off(until, Happening::AgentInput(site, number, input));
        }
        let now = self.micros();
        self.trace(|| format!("agent {site} < {}", short(&format!("{input:?}"))));
        let Some(life) = self.life(site, number) else { return };
        life.agent.handle(input, now);
        self.carry_out(site, number);
        self.settle_agent(site, number);
    }

    /// As the shell does: once no more inputs are at hand, and one that was stopped has many.
    fn settle_agent(&mut self, site: SiteId, number: u32) {
        let wakes = self.sites.get(&site).is_some_and(|state| state.stopped_until == self.now);
        if wakes {
            return self.schedule.at(self.now, Happening::AgentSettle(site, number));
        }
        self.agent_settle(site, number);
    }

    pub(crate) fn agent_settle(&mut self, site: SiteId, number: u32) {
        let now = self.micros();
        let Some(life) = self.life(site, number) else { return };
        life.agent.settle(now);
        self.carry_out(site, number);
        self.takes_turn(site, Part::Agent);
    }

    /// Until when the agent does nothing, if it is stopped.
    pub(crate) fn stopped(&self, site: SiteId) -> Option<u64> {
        self.sites.get(&site).map(|state| state.stopped_until).filter(|until| *until > self.now)
    }

    pub(crate) fn agent_timer(&mut self, site: SiteId, number: u32) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.at(until, Happening::AgentTimer(site, number));
        }
        let now = self.micros();
        let Some(life) = self.life(site, number) else { return };
        if life.timer_at > now.0 && life.timer_at != u64::MAX {
            return;
        }
        life.timer_at = u64::MAX;
        life.agent.handle_timeout(now);
        self.settle_agent(site, number);
    }

    fn carry_out(&mut self, site: SiteId, number: u32) {
        while let Some(output) = self.life(site, number).and_then(|life| life.agent.poll_output()) {
            self.trace(|| format!("agent {site} > {}", short(&format!("{output:?}"))));
            self.agent_output(site, number, output);
        }
        let now = self.now;
        let Some(life) = self.life(site, number) else { return };
        if let Some(at) = life.agent.poll_timeout().map(|at| at.0.max(now + 1))
            && at < life.timer_at
        {
            life.timer_at = at;
            self.schedule.at(at, Happening::AgentTimer(site, number));
        }
    }

    fn agent_output(&mut self, site: SiteId, number: u32, output: Output) {
        let now = self.micros();
        match output {
            Output::Worker(worker, request) => {
                if let Request::Disarm { group, move_id, withdraw: true } = &request
                    && move_id.is_local()
                {
                    // The log tells of moves that are taken back; of those between workers only the agent does.
                    self.excuses.shuffle(*group);
                }
                self.ask(site, worker, request);
            }
            Output::CatchUp => {
                if let Some(life) = self.life(site, number) {
                    life.catches_up = true;
                }
                self.poke_watch(site);
            }
            Output::Rules(rules, tag) => {
                let eager = self.mutation == Some(Mutation::MarkerBeforeFlip);
                if eager {
                    self.after(1, Happening::AgentInput(site, number, Input::InForce(tag)));
                }
                if self.mutation == Some(Mutation::RulesLost) && tag > 3 {
                    return self.after(1, Happening::AgentInput(site, number, Input::InForce(tag)));
                }
                if let Some(life) = self.life(site, number) {
                    life.driver.set_rules(rules, tag, now);
                }
                self.drive_switch(site, number);
            }
            Output::PacketOut(out) => {
                if self.mutation == Some(Mutation::MarkerBeforeFlip) {
                    let connection = self.life(site, number).map_or(0, |life| life.connection);
                    // Not behind the rules, which are still on their way.
                    let marker = Happening::ToSwitch(site, connection, 0, Message::PacketOut(out));
                    return self.after(1, marker);
                }
                if let Some(life) = self.life(site, number) {
                    life.driver.packet_out(vec![out], now);
                }
                self.drive_switch(site, number);
            }
            Output::Connect(id, to) => {
                let stream = Stream {
                    from: site,
                    to,
                    life: number,
                    open: None,
                    attempt: 0,
                    stalled_until: 0,
                    session: 0,
                    acked: 0,
                    under_way: VecDeque::new(),
                };
                self.streams.insert(id, stream);
                self.retry_stream(id, 0);
            }
            Output::Hangup(id) => {
                self.streams.remove(&id);
            }
            Output::ToTarget(id, message) => self.send_to_target(id, message),
            Output::ToSource(id, message) => self.send_to_source(id, message),
            Output::Disconnect(worker) => self.worker_cut(site, worker),
            Output::Propose(command) => self.propose(&format!("site {site}"), command, Some((site, number))),
        }
    }

    // ---- streams --------------------------------------------------------------------------------------

    fn retry_stream(&mut self, id: MoveId, wait: u64) {
        let (number, since) = (self.number(), self.now + wait);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.attempt = number;
        self.after(wait, Happening::StreamOpen(id, number, since));
    }

    /// As a task of the agent does it for each move.
    pub(crate) fn stream_open(&mut self, id: MoveId, number: u64, since: u64) {
        let Some(stream) = self.streams.get(&id).filter(|stream| stream.attempt == number) else { return };
        let (from, to, life) = (stream.from, stream.to, stream.life);
        if let Some(until) = self.stopped(from) {
            return self.schedule.at(until, Happening::StreamOpen(id, number, since.max(until)));
        }
        let Some(state) = self.links.get(&(from, to)).map(|link| link.state) else { return };
        let waits = state == State::Dialling && self.now - since < CONNECTION_WAIT;
        if waits {
            return self.after(CONNECTION_LOOK, Happening::StreamOpen(id, number, since));
        }
        let State::Up(link, peer, _) = state else {
            self.counts.add("streams that found no connection", 1);
            self.agent_input(from, life, Input::PeerDown(id));
            return self.retry_stream(id, STREAM_RETRY);
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            (stream.open, stream.stalled_until) = (Some(Open { number, link, life: peer }), 0);
        }
        self.agent_input(from, life, Input::PeerUp(id));
    }

    /// The stream breaks; the source hears of it a moment later and opens another.
    pub(crate) fn break_stream(&mut self, id: MoveId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.open.take().is_none() {
            return;
        }
        let wait = self.between(100, 30_000);
        self.after(wait, Happening::StreamBroken(id));
    }

    /// Nothing arrives for so long; beyond the idle time the connection is given up.
    pub(crate) fn stall_stream(&mut self, id: MoveId, span: u64) {
        let now = self.now;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some(Open { number, .. }) = stream.open else { return };
        stream.stalled_until = now.saturating_add(span);
        if span >= IDLE {
            self.after(IDLE, Happening::StreamIdle(id, number));
        }
    }

    pub(crate) fn stream_idle(&mut self, id: MoveId, number: u64) {
        if self.streams.get(&id).is_some_and(|stream| stream.open.is_some_and(|open| open.number == number)) {
            self.break_stream(id);
        }
    }

    pub(crate) fn stream_broken(&mut self, id: MoveId) {
        // One that was hung up and opened anew meanwhile is another.
        let stream = self.streams.get(&id).filter(|stream| stream.open.is_none());
        let Some((from, life)) = stream.map(|stream| (stream.from, stream.life)) else { return };
        self.agent_input(from, life, Input::PeerDown(id));
        self.retry_stream(id, STREAM_RETRY);
    }

    /// For how long nothing of the stream arrives, if it or its connection is stalled.
    fn stalled_for(&self, id: MoveId) -> Option<u64> {
        let stream = self.streams.get(&id)?;
        let link = self.links.get(&(stream.from, stream.to)).map_or(0, |link| link.stalled_until);
        link.max(stream.stalled_until).checked_sub(self.now).filter(|wait| *wait > 0)
    }

    fn send_to_target(&mut self, id: MoveId, message: ToTarget) {
        let Some((from, to, open)) = self.streams.get(&id).map(|s| (s.from, s.to, s.open)) else { return };
        let Some(Open { number, .. }) = open else { return };
        self.note_chunk(id, &message);
        let delay = self.delay(from, to);
        self.in_order(Queue::ToTarget(id, number), delay, Happening::ToTarget(id, number, message));
    }

    fn send_to_source(&mut self, id: MoveId, message: ToSource) {
        let Some((from, to, open)) = self.streams.get(&id).map(|s| (s.from, s.to, s.open)) else { return };
        let Some(Open { number, .. }) = open else { return };
        let delay = self.delay(to, from);
        self.in_order(Queue::ToSource(id, number), delay, Happening::ToSource(id, number, message));
    }

    /// What the source has sent and not heard of is bounded, as it lies in the agent's memory.
    fn note_chunk(&mut self, id: MoveId, message: &ToTarget) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        match message {
            ToTarget::Offer { session, .. } => {
                if stream.session != *session {
                    (stream.session, stream.acked, stream.under_way) = (*session, 0, VecDeque::new());
                }
            }
            ToTarget::Chunk { sequence, batch, .. } => {
                // What is sent again on a new connection was counted.
                if *sequence >= stream.acked + stream.under_way.len() as u64 {
                    stream.under_way.push_back(batch.len() as u64);
                }
                let records = stream.under_way.iter().sum();
                self.counts.add("chunks", 1);
                self.counts.most("most records under way", records);
                if let Err(found) = crate::invariant_9::check_window(id, records) {
                    self.found = Some(found);
                }
            }
            ToTarget::Handover { chunks, rounds, .. } => {
                self.counts.add("handovers after several chunks", u64::from(*chunks > 2));
                self.counts.add("handovers after several rounds", u64::from(*rounds > 1));
            }
            ToTarget::Copied { .. } | ToTarget::Probe => {}
        }
    }

    fn note_ack(&mut self, id: MoveId, message: &ToSource) {
        let (ToSource::Ack { session, next } | ToSource::Accept { session, next }) = message else { return };
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.session == *session) else {
            return;
        };
        while stream.acked < *next && stream.under_way.pop_front().is_some() {
            stream.acked += 1;
        }
    }

    pub(crate) fn to_target(&mut self, move_id: MoveId, number: u64, message: ToTarget) {
        let Some(stream) = self.streams.get(&move_id) else { return };
        let (from, to) = (stream.from, stream.to);
        let Some(Open { life, .. }) = stream.open.filter(|open| open.number == number) else { return };
        if let Some(wait) = self.stalled_for(move_id) {
            let what = Happening::ToTarget(move_id, number, message);
            return self.in_order(Queue::ToTarget(move_id, number), wait, what);
        }
        self.agent_input(to, life, Input::FromSource { move_id, from, message, wire_len: 100 });
    }

    pub(crate) fn to_source(&mut self, id: MoveId, number: u64, message: ToSource) {
        let Some(stream) = self.streams.get(&id) else { return };
        let (from, life) = (stream.from, stream.life);
        if stream.open.is_none_or(|open| open.number != number) {
            return;
        }
        if let Some(wait) = self.stalled_for(id) {
            return self.in_order(
                Queue::ToSource(id, number),
                wait,
                Happening::ToSource(id, number, message),
            );
        }
        self.note_ack(id, &message);
        self.agent_input(from, life, Input::FromTarget(id, message));
    }

    // ---- workers --------------------------------------------------------------------------------------

    pub(crate) fn worker_start(&mut self, site: SiteId, worker: WorkerId) {
        let (boot, now) = (self.number(), self.micros());
        let keys = [self.rng.word(), self.rng.word()];
        let (lost, mode, mutation) = (self.is_lost(site), self.mode, self.mutation);
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return;
        };
        if place.process.is_some() || lost {
            return;
        }
        let (mut hold_packets_max, mut hold_bytes_max) = mode.hold_max();
        if mutation == Some(Mutation::HoldsAll) {
            (hold_packets_max, hold_bytes_max) = (1 << 20, 1 << 30);
        }
        let settings = Settings {
            site,
            worker,
            flow_capacity: 256,
            hold_packets_max,
            hold_bytes_max,
            export_batch_len: 2,
            keys,
            boot,
        };
        let status = std::collections::BTreeMap::new();
        let (core, socket) = (Worker::new(settings, now), Vec::new());
        let serving = Vec::new();
        place.process = Some(Process { worker: core, boot, socket, turn_at: u64::MAX, status, serving });
        self.wake_worker(site, worker, 100_000);
    }

    pub(crate) fn worker_crash(&mut self, site: SiteId, worker: WorkerId) {
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return;
        };
        let Some(process) = place.process.take() else { return };
        let waiting = process.socket.iter().filter_map(|frame| Some(packet::read(frame)?.number));
        waiting.for_each(|number| self.traffic.excuse(number));
        place.stopped_until = 0;
        self.checks.delays.forget((site, worker));
        self.trace(|| format!("worker {site}/{worker} crashes"));
        process.status.keys().for_each(|group| self.excuses.lose(*group));
        self.worker_cut(site, worker);
        self.excuse_moving(site);
    }

    /// It does nothing until then. Another may have been given its groups, without their flows.
    pub(crate) fn worker_hangs(&mut self, site: SiteId, worker: WorkerId, until: u64) {
        let place = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker));
        let Some(place) = place else { return };
        place.stopped_until = until;
        let known = place.process.iter().flat_map(|process| process.status.keys());
        known.for_each(|group| self.excuses.lose(*group));
        self.excuse_moving(site);
        self.trace(|| format!("worker {site}/{worker} hangs until {until}"));
    }

    /// Wherever a worker of a moving group dies its packets may be in it.
    fn excuse_moving(&mut self, site: SiteId) {
        let moving = self.log.cluster.moves.values().filter(|m| m.from == site || m.to == site);
        let moving: Vec<_> = moving.map(|m| m.group).collect();
        moving.into_iter().for_each(|group| self.excuses.lose(group));
    }

    /// The control connection breaks, and is made anew.
    pub(crate) fn worker_cut(&mut self, site: SiteId, worker: WorkerId) {
        let Some(state) = self.sites.get_mut(&site) else { return };
        let Some(place) = state.workers.get_mut(&worker) else { return };
        if std::mem::take(&mut place.connection) == 0 {
            return;
        }
        let Some(number) = state.life.as_ref().map(|life| life.number) else { return };
        let wait = self.between(10, 5_000);
        self.after(wait, Happening::AgentInput(site, number, Input::WorkerDown(worker)));
        let again = wait + self.between(10, 100_000);
        self.after(again, Happening::WorkerConnect(site, number, worker));
    }

    pub(crate) fn worker_connect(&mut self, site: SiteId, number: u32, worker: WorkerId) {
        let connection = self.number();
        if self.life(site, number).is_none() {
            return;
        }
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return;
        };
        if place.extra && place.process.is_none() {
            return;
        }
        let Some(process) = place.process.as_mut() else {
            return self.after(20_000, Happening::WorkerConnect(site, number, worker));
        };
        if place.connection != 0 {
            return;
        }
        if place.stopped_until > self.now {
            // It answers when it wakes.
            let until = place.stopped_until;
            return self.schedule.at(until, Happening::WorkerConnect(site, number, worker));
        }
        process.worker.agent_connected();
        place.connection = connection;
        let boot = process.boot;
        let wait = self.between(50, 1_000);
        self.in_order(
            Queue::Said(site, worker),
            wait,
            Happening::AgentInput(site, number, Input::WorkerUp { worker, boot }),
        );
    }

    pub(crate) fn ask(&mut self, site: SiteId, worker: WorkerId, mut request: Request) {
        match (self.mutation, &mut request) {
            (Some(Mutation::NeverJoined | Mutation::HoldsAll), Request::Join { .. }) => return,
            (
                Some(Mutation::Windowless),
                Request::CopyStart { credit, .. }
                | Request::Arm { credit, .. }
                | Request::Credit { credit, .. },
            ) => *credit = u64::MAX,
            _ => {}
        }
        let place = self.sites.get(&site).and_then(|state| state.workers.get(&worker));
        let connection = place.map_or(0, |place| place.connection);
        if connection == 0 {
            return;
        }
        let delay = self.between(20, 500);
        self.in_order(Queue::Asked(site, worker), delay, Happening::Asked(site, worker, connection, request));
    }

    pub(crate) fn asked(
        &mut self,
        site: SiteId,
        worker: WorkerId,
        connection: u64,
        request: Request,
    ) -> Checked {
        let now = self.micros();
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return Ok(());
        };
        if place.stopped_until > now.0 {
            let until = place.stopped_until;
            self.schedule.put_off(until, Happening::Asked(site, worker, connection, request));
            return Ok(());
        }
        let Some(process) = place.process.as_mut().filter(|_| place.connection == connection) else {
            return Ok(());
        };
        process.worker.handle(request, now);
        self.worker_turn(site, worker, Vec::new())
    }

    pub(crate) fn said(&mut self, site: SiteId, worker: WorkerId, connection: u64, event: Event) {
        let Some(state) = self.sites.get(&site) else { return };
        let same = state.workers.get(&worker).is_some_and(|place| place.connection == connection);
        let Some(number) = state.life.as_ref().map(|life| life.number).filter(|_| same) else { return };
        self.agent_input(site, number, Input::Worker(worker, event));
    }

    pub(crate) fn to_worker(&mut self, site: SiteId, worker: WorkerId, boot: u64, frame: Vec<u8>) -> Checked {
        let place = self.sites.get(&site).and_then(|state| state.workers.get(&worker));
        if place.and_then(|place| place.process.as_ref()).is_none_or(|process| process.boot != boot) {
            if let Some(seen) = packet::read(&frame) {
                self.traffic.excuse(seen.number);
            }
            return Ok(());
        }
        if let Some(until) = place.map(|place| place.stopped_until).filter(|until| *until > self.now) {
            self.schedule.put_off(until, Happening::ToWorker(site, worker, boot, frame));
            return Ok(());
        }
        if let Some(seen) = packet::read(&frame) {
            // ICMP that goes by port may be in a worker of another group.
            let group =
                self.traffic.of(seen.number).filter(|(sending, _)| !sending.icmp).map(|(_, talk)| talk.group);
            self.checks.delays.enters((site, worker), seen.number, group, self.now);
        }
        self.worker_turn(site, worker, vec![frame])
    }

    pub(crate) fn worker_timer(&mut self, site: SiteId, worker: WorkerId, boot: u64) -> Checked {
        let now = self.now;
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return Ok(());
        };
        let Some(process) = place.process.as_mut() else { return Ok(()) };
        if process.boot != boot || process.turn_at > now {
            return Ok(());
        }
        if place.stopped_until > now {
            process.turn_at = place.stopped_until;
            let until = place.stopped_until;
            self.schedule.at(until, Happening::WorkerTurn(site, worker, boot));
            return Ok(());
        }
        process.turn_at = u64::MAX;
        self.worker_turn(site, worker, Vec::new())
    }

    /// One burst, one slice, and what comes of it.
    fn worker_turn(&mut self, site: SiteId, worker: WorkerId, mut burst: Vec<Vec<u8>>) -> Checked {
        let (now, mutation) = (self.micros(), self.mutation);
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return Ok(());
        };
        let Some(process) = place.process.as_mut() else { return Ok(()) };
        let mut out = Sent::default();
        let before = process.worker.counters();
        process.socket.append(&mut burst);
        if process.worker.takes_packets(now) {
            process.worker.burst(&mut process.socket, now, &mut out);
        }
        process.worker.slice(now, &mut out);
        let events: Vec<Event> = std::iter::from_fn(|| process.worker.poll_event()).collect();
        for request in events.iter().filter_map(|event| mutated(mutation, event)) {
            process.worker.handle(request, now);
            process.worker.slice(now, &mut out);
        }
        while process.worker.poll_event().is_some_and(|_| mutation.is_some()) {}
        process.worker.handle(Request::Status, now);
        if let Some(Event::Status { groups, .. }) = process.worker.poll_event()
            && !groups.iter().eq(process.status.values())
        {
            let serving = groups.iter().filter(|status| serves(status.phase));
            process.serving = serving.map(|status| status.group).collect();
            process.status = groups.into_iter().map(|status| (status.group, status)).collect();
        }
        let mut after = process.worker.counters();
        if mutation == Some(Mutation::Miscounted) {
            after.sent = after.sent.saturating_sub(1);
        }
        let opened_early = after.hold_opened_early > before.hold_opened_early;
        let open: Vec<_> = process.status.keys().filter(|_| opened_early).copied().collect();
        let wait = match process.worker.wait() {
            Wait::Now => 20,
            Wait::Soon => 500,
            Wait::Idle => 100_000,
        };
        let connection = place.connection;
        let freed: Vec<_> = out.free.iter().filter_map(|frame| Some(packet::read(frame)?.number)).collect();
        let full = after.dropped_hold_full > before.dropped_hold_full;
        for number in freed {
            self.checks.delays.leaves((site, worker), number, now.0);
            self.trace(|| format!("worker {site}/{worker} drops packet {number}"));
            self.excuse_relaxed(site, number);
            self.excuse_expired(number);
            if full || self.traffic.of(number).is_some_and(|(sending, _)| sending.outdated) {
                self.traffic.excuse(number);
            }
        }
        // What was opened early goes past what waits.
        open.into_iter().for_each(|group| self.excuses.shuffle(group));
        crate::invariant_9::check(site, worker, &after, self.mode.hold_max().1)?;
        self.check_states(site, worker)?;
        for frame in out.tx {
            if let Some(seen) = packet::read(&frame) {
                let took = self.checks.delays.leaves((site, worker), seen.number, now.0);
                let what = if self.mode.faults {
                    "most added delay, us"
                } else {
                    "most added delay without faults, us"
                };
                self.counts.most(what, took);
            }
            self.worker_sends(site, worker, frame)?;
        }
        for event in events.into_iter().filter(|_| connection != 0) {
            let delay = self.between(20, 500);
            self.in_order(Queue::Said(site, worker), delay, Happening::Said(site, worker, connection, event));
        }
        self.wake_worker(site, worker, wait);
        self.takes_turn(site, Part::Worker(worker));
        Ok(())
    }

    /// The known gap of relaxed moves: the target opens a TCP session on a known mapping before the source has heard of the flip, and
    /// what follows still comes in where the old rules are, or the client roams there. The source cannot tell it from a packet of no
    /// session.
    fn excuse_relaxed(&mut self, site: SiteId, number: u64) {
        let Some((sending, talk)) = self.traffic.of(number) else { return };
        let leaf = self.log.leaf(&talk.group, talk.client.0);
        let flipped = self.log.cluster.move_of(&leaf).is_some_and(|mv| {
            mv.from == site
                && mv.phase == MovePhase::Switching
                && mv.ordering == placement::core::Ordering::Relaxed
        });
        if flipped && talk.protocol == Protocol::Tcp && makes_no_flow(&sending) {
            self.traffic.excuse(number);
        }
    }

    /// A packet from the world opens no flow, and its flow may have expired.
    fn excuse_expired(&mut self, number: u64) {
        let Some((sending, talk)) = self.traffic.of(number) else { return };
        let expired = sending.stale || self.now.saturating_sub(talk.translated) >= LIVE;
        if expired && makes_no_flow(&sending) {
            self.traffic.excuse(number);
        }
    }

    /// Flows that expired in workers that still run.
    pub(crate) fn expired(&self) -> u64 {
        let places = self.sites.values().flat_map(|state| state.workers.values());
        places
            .filter_map(|place| place.process.as_ref())
            .map(|process| process.worker.counters().flows_expired)
            .sum()
    }

    fn wake_worker(&mut self, site: SiteId, worker: WorkerId, wait: u64) {
        let at = self.now + wait;
        let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) else {
            return;
        };
        let Some(process) = place.process.as_mut().filter(|process| process.turn_at > at) else { return };
        process.turn_at = at;
        let boot = process.boot;
        self.schedule.at(at, Happening::WorkerTurn(site, worker, boot));
    }

    fn worker_sends(&mut self, site: SiteId, worker: WorkerId, mut frame: Vec<u8>) -> Checked {
        let mut copies = 1;
        if matches!(packet::tag(&frame), Some(Tag::ToOutside | Tag::ToClient(_)))
            && packet::read(&frame).is_some()
        {
            bend_ports(self.mutation, &mut frame);
            match self.mutation.filter(|_| self.rng.below(200) == 0) {
                Some(Mutation::OutputLost) => return Ok(()),
                Some(Mutation::OutputTwice) => copies = 2,
                Some(Mutation::PortBent) if packet::has_ports(&frame) => packet::bend_source_port(&mut frame),
                _ => {}
            }
            self.check_egress(site, worker, &frame)?;
        }
        for _ in 0..copies {
            let delay = self.between(5, 60);
            self.in_order(
                Queue::FromWorker(site, worker),
                delay,
                Happening::FromWorker(site, worker, frame.clone()),
            );
        }
        Ok(())
    }
}

/// What comes from the world, errors and resets find a flow or nothing; other packets of a client make one.
fn makes_no_flow(sending: &Sending) -> bool {
    sending.way == Way::In || sending.icmp || sending.flags & packet::RST != 0
}

/// As a worker would that divides ports among flows wrongly, but always in the same way.
fn bend_ports(mutation: Option<Mutation>, frame: &mut [u8]) {
    if packet::tag(frame) != Some(Tag::ToOutside) || !packet::has_ports(frame) {
        return;
    }
    match mutation {
        Some(Mutation::BlockBent) => packet::map_source_port(frame, |port| port.wrapping_add(BLOCK_LEN)),
        Some(Mutation::PortShared) => {
            packet::map_source_port(frame, |port| port - (port - FIRST_PORT) % BLOCK_LEN);
        }
        _ => {}
    }
}

/// What a broken agent would ask at once when it hears this.
fn mutated(mutation: Option<Mutation>, event: &Event) -> Option<Request> {
    match (mutation?, event) {
        (Mutation::TwoOwners, Event::Cut { group, token, .. }) => {
            Some(Request::Serve { group: *group, epoch: token.epoch })
        }
        (Mutation::EarlyTarget, Event::Installed { group, move_id, .. }) if !move_id.is_local() => {
            Some(Request::TakeOver { group: *group, move_id: *move_id })
        }
        _ => None,
    }
}

/// The beginning of a long text.
fn short(text: &str) -> String {
    text.chars().take(240).collect()
}
