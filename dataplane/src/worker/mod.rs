//! The worker's core: packets, requests and time in; packets and events out. No socket, thread or clock.
//!
//! Call [`Worker::burst`] with what came in, [`Worker::handle`] with what the agent asks, [`Worker::slice`]
//! after each of them and when time passes, and then [`Worker::poll_event`] until it is empty. Work per call
//! is bounded: a burst by its packets, a slice by [`SLICE_LEN`] steps.

mod requests;
mod reshape;
mod serve;
mod slices;

pub(crate) use serve::RELAYED_HOLD_FACTOR;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use flow::steer::{Side, Tag};
use flow::{Batch, Epoch, GroupId, Micros, MoveId, Protocol, SiteId, WorkerId};

use crate::control::{Counters, Event};
use crate::group::{Group, Mode, State};
use crate::io::{Drops, PacketBuf};
use crate::nat::{self, Service};
use crate::packet::{self, Content, Headers, IcmpError, Parsed, Reject, by_port};
use crate::rtt::RoundTrips;
use crate::table::{NIL, Table, Tuple};

/// Most packets that are looked up together.
pub const BURST_LEN: usize = 32;

/// Steps of one slice: records exported or installed, flows expired or removed, held packets served.
pub const SLICE_LEN: usize = 64;

/// Events that may wait for the agent before exports pause.
const EVENTS_MAX: usize = 64;

/// Records of one [`Event::Records`]: large enough that a message costs little, and encoded in some ten microseconds.
const EXPORT_BATCH_LEN: usize = 512;

/// What a worker is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its site.
    pub site: SiteId,
    /// Its number.
    pub worker: WorkerId,
    /// Flows that fit.
    pub flow_capacity: usize,
    /// Packets that may be held, over all groups, before holds open early; those that the source relays may go over this by
    /// [`RELAYED_HOLD_FACTOR`].
    pub hold_packets_max: usize,
    /// Bytes of memory that held packets may take, over all groups. Direct packets open holds early at half of it.
    pub hold_bytes_max: usize,
    /// Records of one [`Event::Records`].
    pub export_batch_len: usize,
    /// Random words that key the hash.
    pub keys: [u64; 2],
    /// Changes with every start.
    pub boot: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            site: SiteId(0),
            worker: WorkerId(0),
            flow_capacity: 1 << 20,
            hold_packets_max: 65_536,
            hold_bytes_max: 128 << 20,
            export_batch_len: EXPORT_BATCH_LEN,
            keys: [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344],
            boot: 0,
        }
    }
}

/// Packets that leave the worker: to the switch, in this order, and those that are done with.
#[derive(Debug)]
pub struct Output<B: PacketBuf> {
    /// To the switch.
    pub tx: Vec<B>,
    /// To be used again.
    pub free: Vec<B>,
    /// For packets that the worker makes itself.
    pool: B::Pool,
}

impl<B: PacketBuf> Output<B> {
    /// Empty; new packets come from `pool`.
    #[must_use]
    pub fn new(pool: B::Pool) -> Self {
        Self { tx: Vec::new(), free: Vec::new(), pool }
    }
}

impl<B: PacketBuf<Pool: Default>> Default for Output<B> {
    fn default() -> Self {
        Self::new(B::Pool::default())
    }
}

/// How soon [`Worker::slice`] is wanted when nothing else happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// At once: there is work.
    Now,
    /// Within a millisecond: a bound of a move is running.
    Soon,
    /// Within a tenth of a second.
    Idle,
}

/// A batch that waits to be installed.
#[derive(Debug)]
struct Install {
    group: u32,
    move_id: MoveId,
    sequence: u64,
    batch: Batch,
    more: bool,
    at: usize,
}

/// What was learnt about a packet before it is acted upon.
#[derive(Clone, Copy, Debug)]
struct Look {
    parsed: Parsed,
    side: Side,
    tuple: Tuple,
    hash: u32,
    flow: u32,
}

/// A group's fence: what is remembered of it even when it is gone.
#[derive(Clone, Copy, Debug, Default)]
struct Fence {
    epoch: Epoch,
    cut: Option<MoveId>,
}

/// The worker.
#[derive(Debug)]
pub struct Worker<B> {
    settings: Settings,
    table: Table,
    services: Vec<Service>,
    groups: Vec<Group<B>>,
    groups_free: Vec<u32>,
    by_id: BTreeMap<GroupId, u32>,
    /// Groups by prefix length, then address.
    by_prefix: [Option<HashMap<u32, u32>>; 33],
    fences: HashMap<GroupId, Fence>,
    active: Vec<u32>,
    /// Tombstones that are over but for ingresses that have not flipped: not looked at in each slice.
    staying: BTreeSet<u32>,
    /// The first of them that is looked at next.
    stay_next: u32,
    installs: VecDeque<Install>,
    events: VecDeque<Event>,
    counters: Counters,
    held: usize,
    held_bytes: usize,
    reserved: u64,
    icmp_left: u32,
    icmp_second: u64,
    round_trips: RoundTrips,
    idle: Micros,
    link_down: bool,
    reported: Micros,
    /// When packets were last asked for.
    asked: Micros,
    /// When it found that it had stood still, until its agent is heard.
    woke: Option<Micros>,
    /// Of the present slice.
    tick: u32,
    looks: Vec<Option<Look>>,
}

/// ICMP errors of our own that may be sent in a second (RFC 1812, section 4.3.2.8).
const ICMP_PER_SECOND: u32 = 100;

/// How long an old owner relays after the last packet of an ingress that has not flipped, be it by way of an older owner.
const STRAGGLERS: Micros = Micros(5_000_000);

/// A worker that stood still for so long may be taken for dead, and others may have what it had: an agent waits half a second longer for
/// one whose connection broke, and longer still for one that only says nothing.
const STOOD_STILL: Micros = Micros(2_500_000);
/// How long a worker that wakes waits for its agent: it asks twice a second, connects again every 100 ms, and is not to be missed for long.
const WAKING_BOUND: Micros = Micros(1_500_000);
/// What an agent asked while the worker stood still was in the socket, and is read sooner than this.
const OLD_REQUESTS: Micros = Micros(100_000);

/// Ticks of 100 ms.
fn tick(now: Micros) -> u32 {
    (now.0 / 100_000) as u32
}

impl<B: PacketBuf> Worker<B> {
    /// A worker without services or groups.
    #[must_use]
    pub fn new(settings: Settings, now: Micros) -> Self {
        Self {
            table: Table::new(settings.flow_capacity, settings.keys, tick(now)),
            settings,
            services: Vec::new(),
            groups: Vec::new(),
            groups_free: Vec::new(),
            by_id: BTreeMap::new(),
            by_prefix: [const { None }; 33],
            fences: HashMap::new(),
            active: Vec::new(),
            staying: BTreeSet::new(),
            stay_next: 0,
            installs: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
            held: 0,
            held_bytes: 0,
            reserved: 0,
            icmp_left: ICMP_PER_SECOND,
            icmp_second: 0,
            round_trips: RoundTrips::default(),
            idle: Micros(0),
            link_down: false,
            reported: now,
            asked: now,
            woke: None,
            tick: tick(now),
            looks: Vec::with_capacity(BURST_LEN),
        }
    }

    /// The next event for the agent.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Counters since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            flows: self.table.live() as u64,
            held_now: self.held as u64,
            held_bytes_now: self.held_bytes as u64,
            ..self.counters.clone()
        }
    }

    /// Notes time spent waiting, for the share of it in the reports.
    pub fn note_idle(&mut self, span: Micros) {
        self.idle = self.idle.plus(span);
    }

    /// Notes whether the switch is there, for the reports.
    pub fn note_link(&mut self, is_up: bool) {
        self.link_down = !is_up;
    }

    /// Notes packets that the link lost.
    pub fn note_drops(&mut self, drops: &Drops) {
        let counters = &mut self.counters;
        counters.dropped_tx_full += drops.tx_full;
        counters.dropped_tx_error += drops.tx_error;
        counters.dropped_link_down += drops.link_down;
        counters.dropped_no_buffer += drops.no_buffer;
        counters.dropped_oversize += drops.oversize;
        counters.dropped_rx_missed += drops.rx_missed;
        counters.dropped_rx_error += drops.rx_error;
    }

    /// Whether there is something to tell the agent.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Its site.
    #[must_use]
    pub fn site(&self) -> SiteId {
        self.settings.site
    }

    /// Whether so many batches wait that no more requests should be read.
    #[must_use]
    pub fn is_backlogged(&self) -> bool {
        self.installs.len() >= 8
    }

    /// An agent has come, perhaps another one than before: what waited for the old one is forgotten, and
    /// exports in hand stop until it asks again.
    pub fn agent_connected(&mut self) {
        self.events.clear();
        for group in &mut self.groups {
            if let Some(export) = &mut group.export {
                // The flows whose records are lost are clean now: only a full copy makes them good.
                export.running = false;
                export.walking = true;
                export.batch = Batch::default();
                group.flows.rewind();
            }
        }
    }

    /// Whether packets may be taken from the switch now; asked before each burst, whether or not there is one.
    ///
    /// Not at first after the worker stood still for 2.5 s or more: others may have its groups by then, and what waits for it in its
    /// socket must not be translated by what it knew. It goes on when its agent has asked for statistics, before which it says who is to
    /// serve what, or after 1.5 s: without an agent it serves what it has.
    pub fn takes_packets(&mut self, now: Micros) -> bool {
        let still = now.since(self.asked);
        self.asked = now;
        if still >= STOOD_STILL {
            tracing::warn!(ms = still.0 / 1_000, "stood still: packets wait until the agent is heard");
            self.woke = Some(now);
        }
        self.woke = self.woke.filter(|woke| now < woke.plus(WAKING_BOUND));
        self.woke.is_none()
    }

    /// Whether packets wait until the agent is heard.
    #[must_use]
    pub fn is_waking(&self) -> bool {
        self.woke.is_some()
    }

    /// Handles what came from the switch, in order; leaves `packets` empty.
    pub fn burst(&mut self, packets: &mut Vec<B>, now: Micros, out: &mut Output<B>) {
        let mut rest = packets.drain(..);
        loop {
            let chunk: [Option<B>; BURST_LEN] = std::array::from_fn(|_| rest.next());
            if chunk[0].is_none() {
                return;
            }
            self.chunk(chunk, now, out);
        }
    }

    /// Three passes, so that the memory accesses of different packets overlap: index, flow, packet.
    fn chunk(&mut self, chunk: [Option<B>; BURST_LEN], now: Micros, out: &mut Output<B>) {
        let mut looks = std::mem::take(&mut self.looks);
        looks.clear();
        for packet in chunk.iter().flatten() {
            let look = self.look(packet.data());
            looks.push(look);
        }
        for look in looks.iter_mut().flatten().filter(|look| matches!(look.parsed.content, Content::Flow(_)))
        {
            look.flow = self.table.candidate(look.side == Side::Inside, look.hash).unwrap_or(NIL);
        }
        for look in looks.iter_mut().flatten().filter(|look| look.flow != NIL) {
            if !self.table.is(look.side == Side::Inside, look.flow, &look.tuple) {
                look.flow = NIL;
            }
        }
        for (packet, look) in chunk.into_iter().flatten().zip(&looks) {
            match look {
                Some(look) => self.dispatch(packet, look, now, out),
                None => out.free.push(packet),
            }
        }
        self.looks = looks;
    }

    /// Parses and hashes; counts what is refused.
    fn look(&mut self, frame: &[u8]) -> Option<Look> {
        self.counters.received += 1;
        match packet::parse(frame) {
            Ok(parsed) => self.look_at(parsed),
            Err(reject) => {
                self.count_reject(reject);
                None
            }
        }
    }

    fn count_reject(&mut self, reject: Reject) {
        match reject {
            Reject::Malformed => self.counters.dropped_malformed += 1,
            Reject::Unsupported => self.counters.dropped_unsupported += 1,
            Reject::Checksum => self.counters.dropped_bad_checksum += 1,
        }
    }

    fn look_at(&mut self, parsed: Parsed) -> Option<Look> {
        let none = Tuple { protocol: Protocol::Udp, client: 0, port: 0, remote: 0, remote_port: 0 };
        let side = match (parsed.tag, parsed.content) {
            (Tag::Direct(side, _) | Tag::Relayed(side, _), Content::Flow(_) | Content::Error(_)) => side,
            (_, Content::Marker(..)) => {
                return Some(Look { parsed, side: Side::Inside, tuple: none, hash: 0, flow: NIL });
            }
            _ => {
                self.counters.dropped_malformed += 1;
                return None;
            }
        };
        let tuple = match parsed.content {
            Content::Flow(headers) => self.tuple(side, &headers),
            Content::Error(error) => self.error_tuple(side, &error),
            Content::Marker(..) => None,
        };
        let Some(tuple) = tuple else {
            self.counters.dropped_no_mapping += 1;
            return None;
        };
        let hash = self.table.hash_of(side == Side::Inside, &tuple);
        Some(Look { parsed, side, tuple, hash, flow: NIL })
    }

    fn tuple(&self, side: Side, headers: &Headers) -> Option<Tuple> {
        let icmp = headers.protocol == Protocol::Icmp;
        match side {
            Side::Inside => Some(Tuple {
                protocol: headers.protocol,
                client: headers.source,
                port: headers.source_port,
                remote: headers.destination,
                remote_port: if icmp { 0 } else { headers.destination_port },
            }),
            Side::Outside => Some(Tuple {
                protocol: headers.protocol,
                client: nat::owner(&self.services, headers.destination, headers.destination_port)?.client,
                port: headers.destination_port,
                remote: headers.source,
                remote_port: if icmp { 0 } else { headers.source_port },
            }),
        }
    }

    /// The tuple of the packet that an error is about: it went the other way.
    fn error_tuple(&self, side: Side, error: &IcmpError) -> Option<Tuple> {
        let Headers { source, destination, source_port, destination_port, .. } = error.inner;
        let turned = Headers {
            source: destination,
            destination: source,
            source_port: destination_port,
            destination_port: source_port,
            ..error.inner
        };
        self.tuple(side, &turned)
    }

    /// The group of a client: the longest prefix that is here.
    fn group_of(&self, client: u32) -> Option<u32> {
        (0..=32u8).rev().find_map(|len| {
            let prefixes = self.by_prefix[usize::from(len)].as_ref()?;
            prefixes.get(&(client & mask(len))).copied()
        })
    }

    /// Sends the packet where its group's mode says.
    fn dispatch(&mut self, packet: B, look: &Look, now: Micros, out: &mut Output<B>) {
        if let Content::Marker(body, source) = look.parsed.content {
            self.marker(packet, look.parsed.tag, body, source, now, out);
            return;
        }
        let known = if look.flow == NIL { None } else { Some(self.table.flow(look.flow).group) };
        let Some(number) = known.or_else(|| self.group_of(look.tuple.client)) else {
            return self.pass_on(packet, look, out);
        };
        let number = if known.is_some() && self.groups[number as usize].parting {
            self.rehome(look.flow, number)
        } else {
            number
        };
        let mode = self.groups[number as usize].mode;
        let packet = if !matches!(mode, Mode::Serve) && self.is_here_by_address(number, look) {
            match self.send_by_port(packet, look, out) {
                Ok(()) => return,
                Err(packet) => packet,
            }
        } else {
            packet
        };
        self.note_direct(number, look);
        match self.groups[number as usize].mode {
            Mode::Serve => self.serve(packet, number, look, now, out),
            Mode::Relay(site) => {
                self.keep_relaying(number, look, now);
                self.relay(packet, look.side, site, out);
            }
            Mode::Hold => self.hold(packet, number, look, now, out),
            Mode::Queue => {
                self.keep_relaying(number, look, now);
                self.queue(packet, number, look, now, out);
            }
        }
    }

    fn note_direct(&mut self, number: u32, look: &Look) {
        let group = &mut self.groups[number as usize];
        let Tag::Direct(side, site) = look.parsed.tag else { return };
        match side {
            Side::Inside => {
                group.ingress = Some(site);
                crate::group::count_site(&mut group.load.inside, site);
            }
            Side::Outside => crate::group::count_site(&mut group.load.outside, site),
        }
    }

    /// An ingress that still sends here has not flipped: its agent may be gone for long. So may that of one whose packets another old owner
    /// relays to here, which had the group before. Nothing circles: each has it from one with a smaller epoch; only what comes from the
    /// very site that it goes to, or from this one, may be on its way back.
    ///
    /// Both are remembered: the group does not come back to here meanwhile. A target would hold what has to be relayed, for as long as the
    /// copy takes.
    fn keep_relaying(&mut self, number: u32, look: &Look, now: Micros) {
        let own = self.settings.site;
        let State::Tombstone { to, until, behind, relaying, stay } = &mut self.groups[number as usize].state
        else {
            return;
        };
        let (known, from) = match serve::origin(look.parsed.tag) {
            Some((true, from)) => (behind, from),
            Some((false, from)) if from != *to && from != own => (relaying, from),
            Some((false, _)) | None => return,
        };
        *until = (*until).max(now.plus(STRAGGLERS));
        stay.until = stay.until.max(now.plus(stay.span));
        // A worker that yields relays to another of its site: no path ends here.
        if *to != own && !known.contains(&from) {
            known.push(from);
        }
        if self.staying.remove(&number) {
            self.activate(number);
        }
    }

    /// A packet for a group that is not here. Of what came to an outside address that several groups share, the switch can lead ICMP
    /// only to one of them: from here it goes on by port. The rest came by a rule that is no more.
    fn pass_on(&mut self, packet: B, look: &Look, out: &mut Output<B>) {
        if let Err(packet) = self.send_by_port(packet, look, out) {
            self.counters.dropped_no_group += 1;
            out.free.push(packet);
        }
    }

    /// Gives a packet back to the switch, to be led by port; what cannot be comes back.
    fn send_by_port(&mut self, packet: B, look: &Look, out: &mut Output<B>) -> Result<(), B> {
        let wrapped = self.by_port(packet.data(), look);
        let Some(mut wrapped) = wrapped.and_then(|bytes| B::from_bytes(&out.pool, &bytes)) else {
            return Err(packet);
        };
        packet::set_tag(wrapped.data_mut(), Tag::ToOutside);
        self.counters.icmp_by_port += 1;
        self.send(wrapped, out);
        out.free.push(packet);
        Ok(())
    }

    /// Whether the switch has led a packet here for its address alone, which says nothing of where the group is by now: a target would
    /// hold it before the flip, an old owner would take its ingress for one that has not flipped, and who waits for a late ingress
    /// for one that has, so that the wait would be over before that flips.
    fn is_here_by_address(&self, number: u32, look: &Look) -> bool {
        let address = match (look.parsed.tag, look.parsed.content) {
            (Tag::Direct(Side::Outside, _), Content::Flow(headers)) if headers.protocol == Protocol::Icmp => {
                headers.destination
            }
            (Tag::Direct(Side::Outside, _), Content::Error(error)) => error.outer.destination,
            _ => return false,
        };
        self.is_shared(number, address)
    }

    fn by_port(&self, frame: &[u8], look: &Look) -> Option<Vec<u8>> {
        let headers = match look.parsed.content {
            Content::Flow(headers) if headers.protocol == Protocol::Icmp => headers,
            // The rule for the quoted endpoint is looked for under the address that the error goes to.
            Content::Error(error) if error.inner.source == error.outer.destination => error.outer,
            Content::Flow(_) | Content::Error(_) | Content::Marker(..) => return None,
        };
        if look.side != Side::Outside {
            return None;
        }
        let seal = self.seal(&headers, look.tuple.port)?;
        by_port::wrap(frame, &headers, look.tuple.port, seal)
    }

    fn relayed_by_port(&self, frame: &[u8]) -> Option<Vec<u8>> {
        if packet::ip_bytes(frame)?.get(9) != Some(&Protocol::Icmp.number()) {
            return None;
        }
        let parsed = packet::parse(frame).ok()?;
        let (side, address) = (Side::Outside, packet::destination(frame)?);
        let tuple = match parsed.content {
            Content::Flow(headers) => self.tuple(side, &headers),
            Content::Error(error) => self.error_tuple(side, &error),
            Content::Marker(..) => None,
        }?;
        let is_shared = self.group_of(tuple.client).is_none_or(|number| self.is_shared(number, address));
        let look = Look { parsed, side, tuple, hash: 0, flow: NIL };
        is_shared.then(|| self.by_port(frame, &look)).flatten()
    }

    /// Whether an outside address may have blocks of other groups: its first or its last one is no client's of this group.
    fn is_shared(&self, number: u32, address: u32) -> bool {
        let id = self.groups[number as usize].id;
        let Some(service) = self.services.iter().find(|known| known.spec.service == id.service) else {
            return true;
        };
        let spec = service.slices.spec();
        let rest =
            (u32::from(u16::MAX) + 1 - u32::from(spec.first_port)) % u32::from(spec.ports_per_subscriber);
        let ours = |port| {
            let owner = service.slices.owner(address.into(), port);
            let client = owner.and_then(|subscriber| service.slices.client(subscriber));
            client.is_some_and(|client| id.prefix.contains(client.into()))
        };
        #[expect(clippy::cast_possible_truncation, reason = "less than a block")]
        let last = u16::MAX - rest as u16;
        !(ours(spec.first_port) && ours(last))
    }

    /// What a message by port to this outside endpoint is sealed with.
    fn seal(&self, headers: &Headers, port: u16) -> Option<u32> {
        let owner = nat::owner(&self.services, headers.destination, port)?;
        Some(self.services.get(owner.service)?.slices.seal(headers.source, headers.destination, port))
    }

    /// Passes a packet on to another worker. The switch there, which may be our own, leads ICMP to a shared address to the worker of the
    /// lowest block, which may be this one: so it goes by port.
    fn relay(&mut self, mut packet: B, side: Side, site: SiteId, out: &mut Output<B>) {
        if side == Side::Outside
            && let Some(bytes) = self.relayed_by_port(packet.data())
            && let Some(wrapped) = B::from_bytes(&out.pool, &bytes)
        {
            self.counters.icmp_by_port += 1;
            out.free.push(std::mem::replace(&mut packet, wrapped));
        }
        packet::set_tag(packet.data_mut(), Tag::Relay(side, site));
        self.counters.relayed += 1;
        self.send(packet, out);
    }

    fn send(&mut self, packet: B, out: &mut Output<B>) {
        self.counters.sent += 1;
        out.tx.push(packet);
    }

    /// Sends a packet of our own.
    fn send_made(&mut self, bytes: &[u8], out: &mut Output<B>) -> bool {
        let packet = B::from_bytes(&out.pool, bytes);
        let made = packet.is_some();
        match packet {
            Some(packet) => {
                self.counters.made += 1;
                self.send(packet, out);
            }
            None => self.counters.dropped_no_buffer += 1,
        }
        made
    }

    /// Puts a group on the list of those with work to do.
    fn activate(&mut self, number: u32) {
        let group = &mut self.groups[number as usize];
        if !group.active {
            group.active = true;
            self.active.push(number);
        }
    }
}

/// The network mask of a prefix length.
fn mask(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

#[cfg(test)]
#[path = "../tests/worker.rs"]
mod tests;
