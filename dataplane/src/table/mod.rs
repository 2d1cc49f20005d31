//! The flow table: fixed in size at the start, found by either direction's key in one or two cache lines.
//!
//! Flows are chained per group, so that work on a group costs what the group has, and what changed since
//! its last export is queued per group. Counters sit in the flow's own cache line as small numbers and
//! spill into a colder array before they overflow.

pub mod index;
pub mod mapping;
mod resident;
pub mod wheel;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};

use flow::{Endpoint, Fixed, FlowKey, FlowRecord, Joinable, Protocol, SiteId, TcpState, digest};

use index::{Hasher, Index};
use mapping::Mappings;
use resident::room_for;
use wheel::Wheel;

/// No flow.
pub const NIL: u32 = u32::MAX;

/// Ticks of 100 ms in a second.
pub const TICKS_PER_SECOND: u32 = 10;

/// What is true of a flow, as bits.
pub mod flags {
    /// Changed since its last export.
    pub const DIRTY: u8 = 1;
    /// Its remote is an outside address of a pool.
    pub const HAIRPIN: u8 = 2;
    /// The source of the move in hand has it.
    pub const IMPORTED: u8 = 4;
    /// Was served before the last changes of the source came.
    pub const TOUCHED: u8 = 8;
    /// Its handshake is being timed.
    pub const HANDSHAKE: u8 = 16;
    /// Some of its counters are in the cold part.
    pub const SPILLED: u8 = 32;
    /// While another site sees a part of its packets, a new TCP session began here on the ports of one before.
    pub const RENEWED: u8 = 64;
}

/// Both directions' key, with outside addresses left out: they follow from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// The protocol.
    pub protocol: Protocol,
    /// The client.
    pub client: u32,
    /// The client's port when it comes from inside, the outside port when it comes from the world.
    pub port: u16,
    /// The other end.
    pub remote: u32,
    /// Its port.
    pub remote_port: u16,
}

/// One flow: what each packet needs, in one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Flow {
    /// The client's address.
    pub client: u32,
    /// The other end's address.
    pub remote: u32,
    /// The outside address.
    pub outside: u32,
    /// The group, by its number in the worker.
    pub group: u32,
    /// When it expires, in ticks of the group's own clock.
    pub expires: u32,
    /// The mapping.
    pub mapping: u32,
    /// Version at the last export or import.
    pub version: u32,
    bytes_out: u32,
    bytes_in: u32,
    prev: u32,
    next: u32,
    packets_out: u16,
    packets_in: u16,
    /// The client's port.
    pub client_port: u16,
    /// The other end's port.
    pub remote_port: u16,
    /// The outside port.
    pub outside_port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The TCP session machine.
    pub tcp: TcpState,
    /// Where the client's packets come in.
    pub ingress: u8,
    /// See [`flags`].
    pub flags: u8,
}

impl Flow {
    /// Of nobody yet.
    const VACANT: Self = Self {
        client: 0,
        remote: 0,
        outside: 0,
        group: 0,
        expires: 0,
        mapping: 0,
        version: 0,
        bytes_out: 0,
        bytes_in: 0,
        prev: NIL,
        next: NIL,
        packets_out: 0,
        packets_in: 0,
        client_port: 0,
        remote_port: 0,
        outside_port: 0,
        protocol: Protocol::Udp,
        tcp: TcpState::None,
        ingress: 0,
        flags: 0,
    };
}

/// What only timers, exports and busy flows need.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cold {
    packets_out: u64,
    packets_in: u64,
    bytes_out: u64,
    bytes_in: u64,
    wheel_prev: u32,
    wheel_next: u32,
    bucket: u16,
}

/// A group's part of the table.
#[derive(Debug)]
pub struct GroupFlows {
    head: u32,
    /// Live flows.
    pub count: u64,
    /// Wrapping sum of their digests.
    pub digest: u64,
    /// Next flow of a walk that deletions respect.
    pub cursor: u32,
    /// Changes are being queued.
    pub tracking: bool,
    /// Flows that changed; some may be gone or clean again.
    pub dirty: VecDeque<u32>,
    /// Flows that are dirty now.
    pub dirty_count: u64,
    /// Flows that ended and may be known to the target.
    pub removals: VecDeque<FlowKey>,
}

impl Default for GroupFlows {
    fn default() -> Self {
        Self {
            head: NIL,
            count: 0,
            digest: 0,
            cursor: NIL,
            tracking: false,
            dirty: VecDeque::new(),
            dirty_count: 0,
            removals: VecDeque::new(),
        }
    }
}

impl GroupFlows {
    /// Sets the walk to the first flow.
    pub fn rewind(&mut self) {
        self.cursor = self.head;
    }

    /// The first flow.
    #[must_use]
    pub fn first(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    /// Begins or ends the tracking of changes. What was queued is forgotten; flags stay and are cleared
    /// when the flow is next exported.
    pub fn track(&mut self, on: bool) {
        self.tracking = on;
        if !on {
            self.removals.clear();
        }
    }
}

/// What a new flow is made from.
#[derive(Clone, Copy, Debug)]
pub struct NewFlow {
    /// Seen from inside: `port` is the client's.
    pub tuple: Tuple,
    /// The outside address.
    pub outside: u32,
    /// The group's number.
    pub group: u32,
    /// The mapping.
    pub mapping: u32,
    /// When it expires, in ticks of the group's clock.
    pub expires: u32,
    /// The same on the worker's clock.
    pub expires_wall: u32,
    /// The TCP session machine.
    pub tcp: TcpState,
    /// Where the client's packets come in.
    pub ingress: u8,
    /// First flags.
    pub flags: u8,
}

/// All flows of a worker.
#[derive(Debug)]
pub struct Table {
    flows: Vec<Flow>,
    cold: Vec<Cold>,
    free: Vec<u32>,
    capacity: usize,
    live: usize,
    out: Index,
    back: Index,
    hasher: Hasher,
    /// The mappings that the flows share.
    pub mappings: Mappings,
    wheel: Wheel,
}

const OUT: u64 = 0;
const BACK: u64 = 1;

impl Table {
    /// Room for `capacity` flows; `keys` are random.
    #[must_use]
    pub fn new(capacity: usize, keys: [u64; 2], tick: u32) -> Self {
        let hasher = Hasher::new(keys);
        Self {
            flows: room_for(capacity, Flow::VACANT),
            cold: room_for(capacity, Cold::default()),
            free: room_for(capacity, NIL),
            capacity,
            live: 0,
            out: Index::new(capacity),
            back: Index::new(capacity),
            hasher,
            mappings: Mappings::new(capacity, hasher),
            wheel: Wheel::new(tick),
        }
    }

    /// Flows in it.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live
    }

    /// Flows that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity - self.live
    }

    /// Flows that fit in all.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn hash(&self, side: u64, tuple: &Tuple) -> u32 {
        let a = u64::from(tuple.client) << 32 | u64::from(tuple.remote);
        let b = u64::from(tuple.port) << 48
            | u64::from(tuple.remote_port) << 32
            | u64::from(tuple.protocol.number()) << 8
            | side;
        self.hasher.hash(a, b)
    }

    /// Hash of a packet's tuple; `inside` says where it comes from.
    #[must_use]
    pub fn hash_of(&self, inside: bool, tuple: &Tuple) -> u32 {
        self.hash(if inside { OUT } else { BACK }, tuple)
    }

    /// First step of a lookup: touches the index only.
    #[must_use]
    pub fn candidate(&self, inside: bool, hash: u32) -> Option<u32> {
        if inside { self.out.candidate(hash) } else { self.back.candidate(hash) }
    }

    /// Second step: touches the flow.
    #[must_use]
    pub fn is(&self, inside: bool, number: u32, tuple: &Tuple) -> bool {
        let flow = &self.flows[number as usize];
        let port = if inside { flow.client_port } else { flow.outside_port };
        flow.client == tuple.client
            && flow.remote == tuple.remote
            && port == tuple.port
            && flow.remote_port == tuple.remote_port
            && flow.protocol == tuple.protocol
    }

    /// Both steps.
    #[must_use]
    pub fn find(&self, inside: bool, tuple: &Tuple) -> Option<u32> {
        let hash = self.hash_of(inside, tuple);
        let index = if inside { &self.out } else { &self.back };
        index.find(hash, |number| self.is(inside, number, tuple))
    }

    /// A flow.
    #[must_use]
    pub fn flow(&self, number: u32) -> &Flow {
        &self.flows[number as usize]
    }

    /// A flow, to be changed; its key and group must stay.
    pub fn flow_mut(&mut self, number: u32) -> &mut Flow {
        &mut self.flows[number as usize]
    }

    /// Adds a flow that is not there yet; `None` when the table is full.
    pub fn insert(&mut self, new: NewFlow, group: &mut GroupFlows) -> Option<u32> {
        if self.live >= self.capacity {
            return None;
        }
        let outside_port = self.mappings.get(new.mapping).outside_port;
        let flow = Flow {
            client: new.tuple.client,
            remote: new.tuple.remote,
            outside: new.outside,
            group: new.group,
            expires: new.expires,
            mapping: new.mapping,
            client_port: new.tuple.port,
            remote_port: new.tuple.remote_port,
            outside_port,
            protocol: new.tuple.protocol,
            tcp: new.tcp,
            ingress: new.ingress,
            flags: new.flags,
            ..Flow::VACANT
        };
        let number = self.place(flow);
        self.live += 1;
        self.mappings.hold(new.mapping);
        self.out.insert(self.hash(OUT, &new.tuple), number);
        self.back.insert(self.hash(BACK, &Tuple { port: outside_port, ..new.tuple }), number);
        self.chain(number, group);
        group.count += 1;
        group.digest = group.digest.wrapping_add(self.digest(number));
        self.wheel.arm(&mut self.cold, number, new.expires_wall);
        Some(number)
    }

    fn place(&mut self, flow: Flow) -> u32 {
        if let Some(number) = self.free.pop() {
            self.flows[number as usize] = flow;
            self.cold[number as usize] = Cold::default();
            return number;
        }
        self.flows.push(flow);
        self.cold.push(Cold::default());
        u32::try_from(self.flows.len() - 1).unwrap_or(NIL)
    }

    /// Removes a flow, and its mapping with the last one. The caller queues the removal for export.
    pub fn remove(&mut self, number: u32, group: &mut GroupFlows) {
        let flow = self.flows[number as usize];
        group.digest = group.digest.wrapping_sub(self.digest(number));
        group.count -= 1;
        if flow.flags & flags::DIRTY != 0 {
            group.dirty_count -= 1;
        }
        self.unchain(number, group);
        let tuple = Self::tuple(&flow);
        self.out.remove(self.hash(OUT, &tuple), number);
        self.back.remove(self.hash(BACK, &Tuple { port: flow.outside_port, ..tuple }), number);
        self.wheel.disarm(&mut self.cold, number);
        self.mappings.release(flow.mapping);
        self.flows[number as usize].group = NIL;
        self.flows[number as usize].flags = 0;
        self.free.push(number);
        self.live -= 1;
    }

    fn tuple(flow: &Flow) -> Tuple {
        Tuple {
            protocol: flow.protocol,
            client: flow.client,
            port: flow.client_port,
            remote: flow.remote,
            remote_port: flow.remote_port,
        }
    }

    /// Moves a flow to another group, whose clock is `shift` ticks ahead.
    pub fn regroup(
        &mut self,
        number: u32,
        from: &mut GroupFlows,
        to: &mut GroupFlows,
        group: u32,
        shift: i64,
    ) {
        self.mark_clean(number, from);
        let digest = self.digest(number);
        self.unchain(number, from);
        from.digest = from.digest.wrapping_sub(digest);
        from.count -= 1;
        self.chain(number, to);
        to.digest = to.digest.wrapping_add(digest);
        to.count += 1;
        let flow = &mut self.flows[number as usize];
        flow.group = group;
        flow.expires = u32::try_from(i64::from(flow.expires) + shift).unwrap_or(0);
    }

    fn chain(&mut self, number: u32, group: &mut GroupFlows) {
        if group.head != NIL {
            self.flows[group.head as usize].prev = number;
        }
        let flow = &mut self.flows[number as usize];
        (flow.prev, flow.next) = (NIL, group.head);
        group.head = number;
    }

    fn unchain(&mut self, number: u32, group: &mut GroupFlows) {
        let Flow { prev, next, .. } = self.flows[number as usize];
        if group.cursor == number {
            group.cursor = next;
        }
        if prev == NIL {
            group.head = next;
        } else {
            self.flows[prev as usize].next = next;
        }
        if next != NIL {
            self.flows[next as usize].prev = prev;
        }
    }

    /// The flow behind another in its group.
    #[must_use]
    pub fn next(&self, number: u32) -> u32 {
        self.flows[number as usize].next
    }

    /// Queues a flow for the next export, once.
    pub fn mark_dirty(&mut self, number: u32, group: &mut GroupFlows) {
        let flow = &mut self.flows[number as usize];
        if group.tracking && flow.flags & flags::DIRTY == 0 {
            flow.flags |= flags::DIRTY;
            group.dirty.push_back(number);
            group.dirty_count += 1;
        }
    }

    /// Takes the mark away, and says whether it was there.
    pub fn mark_clean(&mut self, number: u32, group: &mut GroupFlows) -> bool {
        let flow = &mut self.flows[number as usize];
        let was = flow.flags & flags::DIRTY != 0;
        if was {
            flow.flags &= !flags::DIRTY;
            group.dirty_count -= 1;
        }
        was
    }

    /// The key as it travels.
    #[must_use]
    pub fn key(&self, number: u32) -> FlowKey {
        key_of(&self.flows[number as usize])
    }

    fn digest(&self, number: u32) -> u64 {
        let flow = &self.flows[number as usize];
        digest(&key_of(flow), &Fixed::Nat44 { outside_port: flow.outside_port })
    }

    /// The flow as it travels; `clock` is the group's, in ticks.
    #[must_use]
    pub fn record(&self, number: u32, clock: u32) -> FlowRecord {
        let flow = &self.flows[number as usize];
        FlowRecord {
            key: key_of(flow),
            fixed: Fixed::Nat44 { outside_port: flow.outside_port },
            joined: self.joined(number, clock),
            version: flow.version,
        }
    }

    /// What a move may join.
    #[must_use]
    pub fn joined(&self, number: u32, clock: u32) -> Joinable {
        let flow = &self.flows[number as usize];
        let spilled = flow.flags & flags::SPILLED != 0;
        let cold = if spilled { self.cold[number as usize] } else { Cold::default() };
        Joinable {
            packets_out: cold.packets_out + u64::from(flow.packets_out),
            packets_in: cold.packets_in + u64::from(flow.packets_in),
            bytes_out: cold.bytes_out + u64::from(flow.bytes_out),
            bytes_in: cold.bytes_in + u64::from(flow.bytes_in),
            remaining_s: flow.expires.saturating_sub(clock).div_ceil(TICKS_PER_SECOND),
            tcp: flow.tcp,
            ingress: SiteId(flow.ingress),
        }
    }

    /// Sets what a move may join; `clock` is the group's, in ticks.
    pub fn set_joined(&mut self, number: u32, joined: &Joinable, clock: u32) {
        let flow = &mut self.flows[number as usize];
        flow.expires = clock.saturating_add(joined.remaining_s.saturating_mul(TICKS_PER_SECOND));
        flow.tcp = joined.tcp;
        flow.ingress = joined.ingress.0;
        (flow.packets_out, flow.packets_in, flow.bytes_out, flow.bytes_in) = (0, 0, 0, 0);
        let cold = &mut self.cold[number as usize];
        cold.packets_out = joined.packets_out;
        cold.packets_in = joined.packets_in;
        cold.bytes_out = joined.bytes_out;
        cold.bytes_in = joined.bytes_in;
        flow.flags |= flags::SPILLED;
    }

    /// Counts a packet. Small counters spill before they overflow: 65,535 packets of 65,535 bytes fit.
    #[inline]
    pub fn count(&mut self, number: u32, inside: bool, bytes: u16) {
        let flow = &mut self.flows[number as usize];
        if inside {
            flow.packets_out += 1;
            flow.bytes_out += u32::from(bytes);
        } else {
            flow.packets_in += 1;
            flow.bytes_in += u32::from(bytes);
        }
        if flow.packets_out == u16::MAX || flow.packets_in == u16::MAX {
            self.spill(number);
        }
    }

    fn spill(&mut self, number: u32) {
        let (flow, cold) = (&mut self.flows[number as usize], &mut self.cold[number as usize]);
        cold.packets_out += u64::from(std::mem::take(&mut flow.packets_out));
        cold.packets_in += u64::from(std::mem::take(&mut flow.packets_in));
        cold.bytes_out += u64::from(std::mem::take(&mut flow.bytes_out));
        cold.bytes_in += u64::from(std::mem::take(&mut flow.bytes_in));
        flow.flags |= flags::SPILLED;
    }

    /// The next flow whose timer came up by the worker's clock; the caller removes or arms it.
    pub fn due(&mut self, tick: u32) -> Option<u32> {
        self.wheel.due(tick)
    }

    /// Lets the timer of a flow come up at another tick of the worker's clock.
    pub fn rearm(&mut self, number: u32, tick: u32) {
        self.wheel.disarm(&mut self.cold, number);
        self.wheel.arm(&mut self.cold, number, tick);
    }
}

fn key_of(flow: &Flow) -> FlowKey {
    let endpoint = |address: u32, port| Endpoint { address: IpAddr::V4(Ipv4Addr::from(address)), port };
    FlowKey {
        protocol: flow.protocol,
        client: endpoint(flow.client, flow.client_port),
        remote: endpoint(flow.remote, flow.remote_port),
    }
}

/// The tuple of a key, seen from inside; `None` for IPv6.
#[must_use]
pub fn tuple_of(key: &FlowKey) -> Option<Tuple> {
    let (IpAddr::V4(client), IpAddr::V4(remote)) = (key.client.address, key.remote.address) else {
        return None;
    };
    Some(Tuple {
        protocol: key.protocol,
        client: client.into(),
        port: key.client.port,
        remote: remote.into(),
        remote_port: key.remote.port,
    })
}
