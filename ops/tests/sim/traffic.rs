//! Clients that send to servers, servers that answer, links between, and who has got what.

use std::net::Ipv4Addr;

use flow::steer::Tag;
use flow::{GroupId, Protocol, SiteId, WorkerId};
use switchctl::{PortNo, Ports};

use crate::mutation::Mutation;
use crate::packet::{self, End};
use crate::slow::Part;
use crate::switch::{Sent, worker_of};
use crate::world::{Checked, Happening, Queue, SITES, World};

/// Who finds packets too long.
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A connection that is not closed after so long will not be.
const CLOSING_MAX: u64 = 2_000_000;

/// Flows of a group: enough for several chunks.
const FLOWS: u32 = 10;
/// Those of them that send often.
const LIVELY: u32 = 3;

/// So long a flow without a packet lives at least, in microseconds: the shortest of the services' timeouts, but for a second in which
/// packets wait.
pub(crate) const LIVE: u64 = (crate::log::TIMEOUT_S as u64 - 1) * 1_000_000;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Out,
    In,
}

/// One conversation.
#[derive(Clone, Debug)]
pub(crate) struct Talk {
    pub(crate) group: GroupId,
    pub(crate) protocol: Protocol,
    pub(crate) client: End,
    pub(crate) server: End,
    /// Where the client's packets come in.
    pub(crate) ingress: SiteId,
    /// Where the server's answers come in.
    pub(crate) server_ingress: SiteId,
    pub(crate) period: u64,
    /// The client as the server knows it.
    pub(crate) known_as: Option<End>,
    /// The server sends by itself.
    pub(crate) served: bool,
    /// TCP: the handshake is done.
    pub(crate) open: bool,
    /// Who began to close the connection, and when.
    pub(crate) closing: Option<(Way, u64)>,
    /// The client has done with it, and sends nothing any more.
    pub(crate) over: bool,
    /// When a packet of it was translated last: after [`LIVE`] without one the flow may have expired.
    pub(crate) translated: u64,
    /// No order is expected between packets of two stretches, as the client has roamed.
    pub(crate) stretch: u32,
}

/// One packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sending {
    pub(crate) talk: usize,
    pub(crate) way: Way,
    /// Of TCP.
    pub(crate) flags: u8,
    /// An ICMP message: it may take another path than the flow.
    pub(crate) icmp: bool,
    /// The flow may have expired when it was sent: then it opens no other.
    pub(crate) stale: bool,
    pub(crate) stretch: u32,
    pub(crate) at: u64,
    pub(crate) arrived: u32,
    pub(crate) excused: bool,
    /// It went by rules that were older than old owners relay.
    pub(crate) outdated: bool,
}

#[derive(Default)]
pub(crate) struct Traffic {
    pub(crate) talks: Vec<Talk>,
    pub(crate) sendings: Vec<Sending>,
    pub(crate) stopped: bool,
}

impl Traffic {
    /// The packet was in a process that died.
    pub(crate) fn excuse(&mut self, number: u64) {
        if let Some(sending) = self.sendings.get_mut(number as usize) {
            sending.excused = true;
        }
    }

    fn sending(&mut self, number: u64) -> Option<&mut Sending> {
        self.sendings.get_mut(number as usize)
    }

    pub(crate) fn of(&self, number: u64) -> Option<(Sending, &Talk)> {
        let sending = *self.sendings.get(number as usize)?;
        Some((sending, &self.talks[sending.talk]))
    }

    fn send(&mut self, talk: usize, way: Way, flags: u8, at: u64) -> u64 {
        let Talk { stretch, translated, protocol, .. } = self.talks[talk];
        let (icmp, stale) = (protocol == Protocol::Icmp, at.saturating_sub(translated) >= LIVE);
        self.sendings.push(Sending {
            talk,
            way,
            flags,
            icmp,
            stale,
            stretch,
            at,
            arrived: 0,
            excused: false,
            outdated: false,
        });
        self.sendings.len() as u64 - 1
    }
}

impl World {
    pub(crate) fn start_traffic(&mut self) {
        let groups: Vec<_> = self.log.cluster.groups.keys().copied().collect();
        for group in groups {
            for number in 0..FLOWS {
                self.start_talk(group, number < LIVELY);
            }
        }
    }

    fn start_talk(&mut self, group: GroupId, lively: bool) {
        let Some(std::net::IpAddr::V4(client)) = group.prefix.nth(u128::from(self.rng.below(32))) else {
            return;
        };
        let protocol = self.pick(&[
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Udp,
            Protocol::Udp,
            Protocol::Icmp,
        ]);
        let (port, server) = (self.between(2_000, 60_000) as u16, self.between(1, 200) as u8);
        let talk = Talk {
            group,
            protocol,
            client: (client, port),
            server: (Ipv4Addr::new(203, 0, 113, server), if protocol == Protocol::Icmp { 0 } else { 443 }),
            ingress: self.pick(&SITES),
            server_ingress: self.pick(&SITES),
            period: if lively { 20_000 } else { 300_000 } + self.rng.log_uniform(150_000),
            known_as: None,
            served: false,
            open: protocol != Protocol::Tcp,
            closing: None,
            over: false,
            translated: self.now,
            stretch: 0,
        };
        let number = self.traffic.talks.len();
        self.traffic.talks.push(talk);
        // New flows appear all through the run.
        let start = if self.one_in(2) { self.between(0, 50_000) } else { self.between(0, 2_500_000) };
        self.after(start, Happening::Client(number));
        if self.one_in(8) {
            let when = self.between(200_000, 3_000_000);
            self.after(when, Happening::Roam(number));
        }
    }

    /// The client is at another site from now on.
    pub(crate) fn roam(&mut self, number: usize) {
        let to = self.pick(&SITES);
        if self.is_lost(to) {
            return;
        }
        let talk = &mut self.traffic.talks[number];
        talk.ingress = to;
        talk.stretch += 1;
    }

    pub(crate) fn client_sends(&mut self, number: usize) -> Checked {
        if self.traffic.stopped || self.traffic.talks[number].over {
            return Ok(());
        }
        self.rest(number);
        let talk = self.traffic.talks[number].clone();
        let slow = if self.now > self.busy_until { 20 } else { 1 };
        let period = (talk.period + self.rng.below(talk.period)) * slow;
        let period = if talk.open { period } else { 400_000 };
        self.after(period, Happening::Client(number));
        if talk.open && talk.known_as.is_some() && self.one_in(30) {
            self.client_complains(number)?;
        }
        if let Some((_, since)) = talk.closing {
            // A packet of it was lost.
            if since + CLOSING_MAX < self.now {
                self.begin_anew(number);
            }
            return Ok(());
        }
        let closing = talk.protocol == Protocol::Tcp && talk.open && self.one_in(40);
        let flags = if closing {
            self.close(number, Way::Out)
        } else if talk.open {
            packet::ACK
        } else {
            packet::SYN
        };
        self.client_says(number, flags)
    }

    fn client_says(&mut self, number: usize, flags: u8) -> Checked {
        let talk = self.traffic.talks[number].clone();
        let id = self.traffic.send(number, Way::Out, flags, self.now);
        let frame = packet::frame(talk.protocol, talk.client, talk.server, flags, id);
        self.trace(|| {
            format!("packet {id} out of talk {number} {:?} at {} flags {flags:#x}", talk.client, talk.ingress)
        });
        self.switch(talk.ingress, Ports::INSIDE, 0, &frame)
    }

    /// When the flow may have expired the server is to hear from the client first.
    fn rest(&mut self, number: usize) {
        let (now, talk) = (self.now, &mut self.traffic.talks[number]);
        if now.saturating_sub(talk.translated) >= LIVE && talk.known_as.take().is_some() {
            self.counts.add("flows that rested until they may expire", 1);
        }
    }

    /// One side begins to end a TCP connection, in the one way or the other.
    fn close(&mut self, number: usize, by: Way) -> u8 {
        let (now, talk) = (self.now, &mut self.traffic.talks[number]);
        (talk.open, talk.closing) = (false, Some((by, now)));
        if self.one_in(2) { packet::FIN | packet::ACK } else { packet::RST }
    }

    /// What ends a connection arrives. The client uses its port again only when both sides have done with the old connection and nothing
    /// of it is on its way, as TCP does.
    fn closes(&mut self, number: usize, sending: &Sending) -> Checked {
        let Some((by, _)) = self.traffic.talks[number].closing else { return Ok(()) };
        if sending.flags & packet::RST != 0 {
            self.counts.add("connections reset", 1);
        } else if by != sending.way {
            self.counts.add("connections closed", 1);
        } else {
            let fin = packet::FIN | packet::ACK;
            return if by == Way::Out { self.answer(number, fin) } else { self.client_says(number, fin) };
        }
        self.traffic.talks[number].closing = None;
        if self.one_in(2) {
            self.begin_anew(number);
        }
        Ok(())
    }

    /// Another flow takes the place of one.
    fn begin_anew(&mut self, number: usize) {
        let group = self.traffic.talks[number].group;
        self.traffic.talks[number].over = true;
        let lively = self.one_in(2);
        self.start_talk(group, lively);
    }

    /// The client cannot take a packet of the server in one piece.
    fn client_complains(&mut self, number: usize) -> Checked {
        let talk = self.traffic.talks[number].clone();
        let id = self.complaint(number, Way::Out);
        let about = (talk.server, talk.client);
        let frame = packet::error(talk.client.0, talk.server.0, talk.protocol, about, id);
        self.trace(|| format!("error {id} out of talk {number} {:?} at {}", talk.client, talk.ingress));
        self.switch(talk.ingress, Ports::INSIDE, 0, &frame)
    }

    /// A router on the way to the server cannot.
    fn world_complains(&mut self, number: usize) -> Checked {
        let talk = self.traffic.talks[number].clone();
        let Some(known_as) = talk.known_as else { return Ok(()) };
        let id = self.complaint(number, Way::In);
        let about = (known_as, talk.server);
        let frame = packet::error(ROUTER, known_as.0, talk.protocol, about, id);
        self.trace(|| format!("error {id} in of talk {number} to {known_as:?} at {}", talk.server_ingress));
        self.switch(talk.server_ingress, Ports::OUTSIDE, 0, &frame)
    }

    fn complaint(&mut self, number: usize, way: Way) -> u64 {
        let id = self.traffic.send(number, way, 0, self.now);
        if let Some(sending) = self.traffic.sendings.get_mut(id as usize) {
            sending.icmp = true;
        }
        self.counts.add("ICMP errors", 1);
        id
    }

    pub(crate) fn server_sends(&mut self, number: usize) -> Checked {
        if self.traffic.stopped || self.traffic.talks[number].over {
            return Ok(());
        }
        self.rest(number);
        let talk = self.traffic.talks[number].clone();
        let slow = if self.now > self.busy_until { 20 } else { 1 };
        let period = (talk.period + self.rng.below(talk.period)) * slow;
        self.after(period, Happening::Server(number));
        self.knock(&talk)?;
        if !talk.open {
            return Ok(());
        }
        if self.one_in(30) {
            self.world_complains(number)?;
        }
        let closing = talk.protocol == Protocol::Tcp && self.one_in(40);
        let flags = if closing { self.close(number, Way::In) } else { packet::ACK };
        self.answer(number, flags)
    }

    /// A stranger tries a port beside one that is open.
    fn knock(&mut self, talk: &Talk) -> Checked {
        let Some(open) = talk.known_as.filter(|_| talk.protocol != Protocol::Icmp) else { return Ok(()) };
        let Some((number, target)) = self.checks.closed.probe(&self.traffic.talks, talk.protocol, open)
        else {
            return Ok(());
        };
        let target = if self.mutation == Some(Mutation::DoorOpen) { open } else { target };
        let frame = packet::frame(talk.protocol, talk.server, target, packet::ACK, number);
        self.switch(talk.server_ingress, Ports::OUTSIDE, 0, &frame)
    }

    fn answer(&mut self, number: usize, flags: u8) -> Checked {
        let talk = self.traffic.talks[number].clone();
        let Some(known_as) = talk.known_as else { return Ok(()) };
        let id = self.traffic.send(number, Way::In, flags, self.now);
        let frame = packet::frame(talk.protocol, talk.server, known_as, flags, id);
        self.trace(|| format!("packet {id} in of talk {number} to {known_as:?} at {}", talk.server_ingress));
        self.switch(talk.server_ingress, Ports::OUTSIDE, 0, &frame)
    }

    /// A frame comes to a port of a switch.
    pub(crate) fn switch(&mut self, site: SiteId, port: PortNo, tunnel: u64, frame: &[u8]) -> Checked {
        let now = self.now;
        let Some(state) = self.sites.get_mut(&site) else { return Ok(()) };
        if !state.switch.is_stopped(now) {
            return self.forward(site, port, tunnel, frame);
        }
        if let Some(lost) = state.switch.wait(port, frame.to_vec(), tunnel) {
            self.counts.add("frames that a stopped switch had no room for", 1);
            self.excuse_frame(&lost);
        }
        Ok(())
    }

    /// The packet was lost with a process, or with a socket.
    pub(crate) fn excuse_frame(&mut self, frame: &[u8]) {
        if let Some(seen) = packet::read(frame) {
            self.traffic.excuse(seen.number);
        }
    }

    /// A switch takes a frame from a port to where its rules say.
    pub(crate) fn forward(&mut self, site: SiteId, port: PortNo, tunnel: u64, frame: &[u8]) -> Checked {
        self.takes_turn(site, Part::Switch);
        if worker_of(port).is_some() {
            self.check_order(frame)?;
        }
        let now = self.now;
        let Some(state) = self.sites.get_mut(&site) else { return Ok(()) };
        let sent = state.switch.process(frame, port, tunnel, now);
        let (excused, outdated) = (state.forgetful || state.lost, state.outdated);
        if let Some(sending) = packet::read(frame).and_then(|seen| self.traffic.sending(seen.number)) {
            sending.outdated |= outdated;
            sending.excused |= sent.is_empty() && (excused || sending.outdated);
        }
        if sent.is_empty() {
            let number = packet::read(frame).map(|seen| seen.number);
            self.trace(|| {
                let tag = packet::tag(frame);
                format!("switch {site} has no rule for packet {number:?} of port {port} key {tunnel:#x} tag {tag:?}")
            });
        }
        self.leave(site, sent)
    }

    /// What a switch sends arrives somewhere.
    pub(crate) fn leave(&mut self, site: SiteId, sent: Vec<Sent>) -> Checked {
        for (port, frame, key) in sent {
            if port == Ports::INSIDE {
                self.arrives_at_client(&frame)?;
            } else if port == Ports::OUTSIDE {
                self.arrives_at_server(&frame)?;
            } else if port.0 >= 1_000 {
                self.into_tunnel(site, SiteId((port.0 - 1_000) as u8), key, frame);
            } else if let Some(worker) = worker_of(port) {
                self.into_worker(site, worker, frame);
            }
        }
        Ok(())
    }

    fn into_tunnel(&mut self, from: SiteId, to: SiteId, key: u64, frame: Vec<u8>) {
        let delay = self.delay(from, to);
        let what = Happening::Tunnel { from, to, key, frame };
        if !self.mode.lossy {
            return self.in_order(Queue::Tunnel(from, to), delay, what);
        }
        if self.one_in(50) {
            return;
        }
        let more = if self.one_in(10) { self.between(0, 20_000) } else { 0 };
        self.after(delay + more, what);
    }

    pub(crate) fn tunnel_arrives(&mut self, from: SiteId, to: SiteId, key: u64, frame: &[u8]) -> Checked {
        self.switch(to, Ports::tunnel(from), key, frame)
    }

    fn into_worker(&mut self, site: SiteId, worker: WorkerId, frame: Vec<u8>) {
        let place = self.sites.get(&site).and_then(|state| state.workers.get(&worker));
        let Some(boot) = place.and_then(|place| place.process.as_ref()).map(|process| process.boot) else {
            if let Some(seen) = packet::read(&frame) {
                self.traffic.excuse(seen.number);
            }
            return;
        };
        if packet::is_marker(&frame) {
            self.trace(|| format!("worker {site}/{worker} gets {:?}", packet::tag(&frame)));
        }
        let delay = self.between(5, 60);
        self.in_order(Queue::ToWorker(site, worker), delay, Happening::ToWorker(site, worker, boot, frame));
    }

    /// What a worker sent leaves its switch.
    fn check_order(&mut self, frame: &[u8]) -> Checked {
        if matches!(packet::tag(frame), Some(Tag::ToOutside | Tag::ToClient(_)))
            && let Some(seen) = packet::read(frame)
            && let Some((sending, talk)) = self.traffic.of(seen.number)
        {
            let strict = !self.mode.lossy
                && !self.log.is_relaxed(&talk.group)
                && !self.excuses.may_shuffle(&talk.group)
                && self.excuses.is_watched_since(&talk.group, sending.at);
            let ingress = if sending.way == Way::Out { talk.ingress } else { talk.server_ingress };
            // An error or echo may go by port, through a worker that its flow has nothing to do with.
            if strict && !sending.icmp && !seen.by_port && !self.dead_once.contains(&ingress) {
                self.checks.order.leaves(seen.number, &sending)?;
            }
        }
        Ok(())
    }

    fn arrives_at_server(&mut self, frame: &[u8]) -> Checked {
        let Some(seen) = packet::read(frame) else { return Ok(()) };
        let Some(sending) = self.traffic.sendings.get_mut(seen.number as usize) else { return Ok(()) };
        sending.arrived += 1;
        let (number, arrived) = (sending.talk, *sending);
        self.checks.once.arrives(seen.number, &arrived)?;
        let talk = &mut self.traffic.talks[number];
        if seen.quoted.is_some() {
            self.counts.add("ICMP errors that arrived", 1);
            return Ok(());
        }
        talk.known_as = Some(seen.source);
        if talk.over {
            return Ok(());
        }
        if talk.closing.is_some() {
            return if arrived.flags & (packet::FIN | packet::RST) == 0 {
                Ok(())
            } else {
                self.closes(number, &arrived)
            };
        }
        if talk.protocol == Protocol::Tcp && !talk.open {
            return self.answer(number, packet::SYN | packet::ACK);
        }
        if !std::mem::replace(&mut talk.served, true) {
            self.after(5_000, Happening::Server(number));
        }
        Ok(())
    }

    fn arrives_at_client(&mut self, frame: &[u8]) -> Checked {
        let Some(seen) = packet::read(frame) else { return Ok(()) };
        self.checks.closed.arrives(&seen, &self.traffic.talks)?;
        let Some(sending) = self.traffic.sendings.get_mut(seen.number as usize) else { return Ok(()) };
        sending.arrived += 1;
        let (number, arrived) = (sending.talk, *sending);
        self.checks.once.arrives(seen.number, &arrived)?;
        let talk = &mut self.traffic.talks[number];
        if let Some((about, _)) = seen.quoted {
            self.counts.add("ICMP errors that arrived", 1);
            // Ports may be another flow's since flows were lost, or when the error waited in a switch that was stopped for longer than a
            // flow lives; addresses never are another client's.
            let same = !self.excuses.may_lose(&talk.group)
                && self.excuses.is_watched_since(&talk.group, arrived.at)
                && self.now - arrived.at < LIVE;
            return crate::invariant_2::quoted(talk.client, seen.destination, about, same);
        }
        if talk.over {
            return Ok(());
        }
        if talk.closing.is_some() {
            return if arrived.flags & (packet::FIN | packet::RST) == 0 {
                Ok(())
            } else {
                self.closes(number, &arrived)
            };
        }
        if talk.protocol == Protocol::Tcp && !talk.open && arrived.flags & packet::SYN == 0 {
            // What was on its way when the old connection was reset opens no new one.
            return Ok(());
        }
        let echo = talk.protocol == Protocol::Icmp;
        talk.open = true;
        self.counts.add("echo replies that arrived", u64::from(echo));
        let talk = &mut self.traffic.talks[number];
        if !std::mem::replace(&mut talk.served, true) {
            self.after(5_000, Happening::Server(number));
        }
        Ok(())
    }
}
