//! Controllers' connections to the embedded switch.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use flow::Micros;
use nix::poll::PollFlags;
use socket2::Socket;

use super::packet::{Packet, TABLES};
use super::pipeline::{Pipeline, RULES_MAX};
use super::{Datapath, HELLO_BOUND, SILENCE_BOUND};
use crate::core::rules::{PacketOut, PortNo};
use crate::ofp::{
    self, ADD, Absent, Aggregate, AsyncConfig, BundleControl, DELETE, Description, FlowModMsg, FlowQuery,
    GroupMod, HEADER_LEN, Header, MODIFY, Message, MeterMod, PortDesc, PortMod, Reply, Request,
    TableFeatures, TableMod, error, kind,
};

/// Bytes read from one controller before others have their turn.
const READ_MAX: usize = 256 << 10;
/// Bytes that wait for one controller. One that asks and never reads is dropped beyond that.
const OUTPUT_MAX: usize = 256 << 20;
/// Open bundles of one connection.
const BUNDLES_MAX: usize = 16;
/// Changes in one bundle.
const BUNDLE_LEN_MAX: usize = 4 << 20;
/// `OFPC_FLOW_STATS`, `OFPC_TABLE_STATS`, `OFPC_PORT_STATS`.
const CAPABILITIES: u32 = 0b111;

/// The fragment handling of `OFPC_FRAG_NORMAL`, the only one: each is taken as it is.
const FRAGMENTS_NORMAL: u16 = 0;
/// All groups, ports, queues or meters.
const ALL: u32 = u32::MAX;
/// Requests that a slave must not make (OpenFlow 1.4, section 6.3.6). What can be bundled are such requests.
const FOR_MASTERS: [u8; 7] = [
    kind::PACKET_OUT,
    kind::FLOW_MOD,
    kind::GROUP_MOD,
    kind::PORT_MOD,
    kind::TABLE_MOD,
    kind::METER_MOD,
    kind::BUNDLE_ADD,
];
/// `OFPCRR_MASTER_REQUEST`: another controller became master.
const ROLE_REASON_MASTER: u8 = 0;

/// What a controller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Equal,
    Master,
    Slave,
}

impl Role {
    fn number(self) -> u32 {
        match self {
            Self::Equal => 1,
            Self::Master => 2,
            Self::Slave => 3,
        }
    }
}

/// What controllers share of their roles: at most one is master.
#[derive(Debug, Default)]
pub(super) struct Roles {
    /// The number of its connection.
    master: Option<u64>,
    /// The newest that a master or slave came with.
    generation: Option<u64>,
}

struct Bundle {
    /// As it was opened.
    flags: u16,
    closed: bool,
    /// A message was refused, so it is never committed: what was to be all or nothing would be without it.
    failed: bool,
    /// It was opened, or had a message that was accepted.
    known: bool,
    changes: Vec<FlowModMsg>,
}

impl Bundle {
    fn new(flags: u16) -> Self {
        Self { flags, closed: false, failed: false, known: false, changes: Vec::new() }
    }
}

/// One controller.
pub(super) struct Connection {
    number: u64,
    socket: Socket,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that are sent.
    sent: usize,
    open: bool,
    /// It is closed when its output is sent.
    leaving: bool,
    config: (u16, u16),
    role: Role,
    wants: AsyncConfig,
    bundles: BTreeMap<u32, Bundle>,
    /// It has said hello.
    greeted: bool,
    came_at: Micros,
    /// When it said something last.
    heard_at: Micros,
}

impl Connection {
    /// Greets a controller.
    pub(super) fn new(number: u64, socket: Socket, now: Micros) -> Option<Self> {
        socket.set_nonblocking(true).ok()?;
        let output = ofp::encode(0, &Message::hello());
        Some(Self {
            number,
            socket,
            input: Vec::new(),
            output,
            sent: 0,
            open: true,
            leaving: false,
            config: (FRAGMENTS_NORMAL, 128),
            role: Role::Equal,
            wants: AsyncConfig::initial(),
            bundles: BTreeMap::new(),
            greeted: false,
            came_at: now,
            heard_at: now,
        })
    }

    /// Ends the connection at the end of this turn.
    pub(super) fn close(&mut self) {
        self.open = false;
    }

    /// Who says no hello is no controller. Only a hello counts, so that other bytes do not keep a place.
    pub(super) fn leave_if_no_hello(&mut self, now: Micros) {
        if !self.greeted && now.since(self.came_at) > HELLO_BOUND {
            tracing::debug!("a controller said no hello and is left");
            self.open = false;
        }
    }

    /// Where it stands among those that may be closed to make room, the least first; `None` for one that is well.
    pub(super) fn silence_rank(&self, now: Micros) -> Option<(bool, Micros)> {
        match self.greeted {
            _ if !self.open => None,
            false => Some((false, self.came_at)),
            true => (now.since(self.heard_at) > SILENCE_BOUND).then_some((true, self.heard_at)),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Whether it is listened to. Who says no more can always be read from, and what comes is nothing.
    pub(super) fn is_heard(&self) -> bool {
        !self.leaving
    }

    pub(super) fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Reads what there is, executes whole messages in their order, sends answers.
    pub(super) fn turn(
        &mut self,
        events: PollFlags,
        now: Micros,
        datapath: &mut Datapath,
        packet: &mut Packet,
    ) {
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.read(now);
            self.execute(datapath, packet);
        }
        self.write();
    }

    fn read(&mut self, now: Micros) {
        let start = self.input.len();
        self.input.resize(start + READ_MAX, 0);
        let result = self.socket.read(&mut self.input[start..]);
        self.input.truncate(start + *result.as_ref().unwrap_or(&0));
        match result {
            // It says no more, and may still read what it asked for.
            Ok(0) => self.leaving = true,
            Ok(_) => self.heard_at = now,
            Err(error) if !is_temporary(&error) => self.open = false,
            _ => {}
        }
    }

    fn execute(&mut self, datapath: &mut Datapath, packet: &mut Packet) {
        let input = std::mem::take(&mut self.input);
        if self.leaving {
            // Whatever it still says is not kept.
            return;
        }
        let mut at = 0;
        while let Some(header) = Header::peek(&input[at..]).filter(|_| !self.leaving) {
            if header.len < HEADER_LEN {
                // Where the next message begins is unknown.
                self.answer(header.xid, &Message::error(error::BAD_LEN, &input[at..at + HEADER_LEN]));
                self.leaving = true;
                return;
            }
            let Some(bytes) = input.get(at..at + header.len) else { break };
            self.message(header, bytes, datapath, packet);
            at += header.len;
        }
        self.input = input;
        self.input.drain(..at);
    }

    fn write(&mut self) {
        while self.open && self.has_output() {
            match self.socket.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if is_temporary(&error) => break,
                Err(_) => self.open = false,
            }
        }
        if !self.has_output() {
            self.output.clear();
            self.sent = 0;
            self.open &= !self.leaving;
        } else if self.output.len() - self.sent > OUTPUT_MAX {
            tracing::warn!("a controller does not read its answers and is dropped");
            self.open = false;
        }
    }

    fn answer(&mut self, xid: u32, message: &Message) {
        self.output.extend_from_slice(&ofp::encode(xid, message));
    }

    fn message(&mut self, header: Header, bytes: &[u8], datapath: &mut Datapath, packet: &mut Packet) {
        self.hear_of_roles(&datapath.roles);
        let outcome = if self.role == Role::Slave && FOR_MASTERS.contains(&header.kind) {
            Err(error::IS_SLAVE)
        } else {
            match ofp::decode(bytes) {
                Ok((xid, message)) => self.handle(xid, message, datapath, packet),
                Err(error) => {
                    tracing::debug!(%error, kind = header.kind, "a controller's message was refused");
                    Err(error.reply())
                }
            }
        };
        match outcome {
            Ok(()) => {}
            Err(error::HELLO_INCOMPATIBLE) => {
                // The data of this error is a text (OpenFlow 1.4, section 7.5.4.1).
                let data = b"only OpenFlow 1.4 (version 5 on the wire) is spoken here".to_vec();
                let (kind, code) = error::HELLO_INCOMPATIBLE;
                self.answer(header.xid, &Message::Error { kind, code, data });
                self.leaving = true;
            }
            Err(code) => {
                if let Some((bundle, flags)) = ofp::bundle_of(bytes) {
                    self.fail_bundle(bundle, flags);
                }
                self.answer(header.xid, &Message::error(code, bytes));
            }
        }
    }

    /// A message of a bundle was refused. A bundle that it would have opened is known as failed too, else those that
    /// follow would open it, and be committed without the first.
    fn fail_bundle(&mut self, id: u32, flags: u16) {
        if !self.bundles.contains_key(&id) && self.bundles.len() >= BUNDLES_MAX {
            return;
        }
        let bundle = self.bundles.entry(id).or_insert_with(|| Bundle::new(flags));
        bundle.failed = true;
        bundle.changes = Vec::new();
    }

    fn handle(
        &mut self,
        xid: u32,
        message: Message,
        datapath: &mut Datapath,
        packet: &mut Packet,
    ) -> Result<(), error::Code> {
        match message {
            Message::Hello { version, versions } if !Message::speaks_us(version, versions) => {
                return Err(error::HELLO_INCOMPATIBLE);
            }
            Message::Hello { .. } => self.greeted = true,
            Message::EchoRequest(data) => self.answer(xid, &Message::EchoReply(data)),
            Message::FeaturesRequest => self.answer(xid, &features(datapath)),
            Message::GetConfigRequest => {
                self.answer(xid, &Message::GetConfigReply(self.config.0, self.config.1))
            }
            Message::SetConfig(flags, miss) => {
                if flags != FRAGMENTS_NORMAL {
                    return Err(error::CONFIG_BAD_FLAGS);
                }
                self.config = (flags, miss);
            }
            Message::BarrierRequest => self.answer(xid, &Message::BarrierReply),
            Message::RoleRequest(role, generation) => {
                self.set_role(role, generation, &mut datapath.roles)?;
                let generation = datapath.roles.generation.unwrap_or(u64::MAX);
                self.answer(xid, &Message::RoleReply(self.role.number(), generation));
            }
            Message::GetAsyncRequest => self.answer(xid, &Message::GetAsyncReply(self.wants)),
            Message::SetAsync(wants) => self.wants.update(&wants),
            Message::PacketOut(out) => send(&out, datapath, packet)?,
            Message::FlowMod(change) => datapath.pipeline.apply(&change)?,
            Message::GroupMod(change) => change_group(change)?,
            Message::PortMod(change) => change_port(&change, datapath)?,
            Message::TableMod(change) => change_table(change)?,
            Message::MeterMod(change) => change_meter(change)?,
            Message::MultipartRequest(request) => {
                if request == (Request::TableFeatures { set: true }) && self.role == Role::Slave {
                    return Err(error::IS_SLAVE);
                }
                let reply = statistics(&request, datapath)?;
                ofp::split_reply(reply).iter().for_each(|part| self.answer(xid, part));
            }
            Message::BundleControl { bundle, control, flags } => {
                let done = self.bundle(bundle, control, flags, datapath)?;
                self.answer(xid, &Message::BundleControl { bundle, control: done, flags });
            }
            Message::BundleAdd { bundle, message, flags } => {
                self.bundle_add(bundle, flags, *message, &datapath.pipeline)?
            }
            Message::Error { .. } | Message::EchoReply(_) => {}
            Message::FeaturesReply { .. }
            | Message::GetConfigReply(..)
            | Message::MultipartReply { .. }
            | Message::BarrierReply
            | Message::RoleReply(..)
            | Message::RoleStatus(..)
            | Message::Async(_)
            | Message::PacketIn(_)
            | Message::GetAsyncReply(_) => return Err(error::BAD_TYPE),
        }
        Ok(())
    }

    /// OpenFlow 1.4, section 6.3.6: who comes with an older generation than others came with is a master that was replaced.
    fn set_role(&mut self, role: u32, generation: u64, roles: &mut Roles) -> Result<(), error::Code> {
        let role = match role {
            0 => return Ok(()),
            1 => Role::Equal,
            2 => Role::Master,
            3 => Role::Slave,
            _ => return Err(error::ROLE_BAD_ROLE),
        };
        if role != Role::Equal {
            let newest = roles.generation.unwrap_or(generation);
            // Generations go around.
            if generation.wrapping_sub(newest).cast_signed() < 0 {
                return Err(error::ROLE_STALE);
            }
            roles.generation = Some(generation);
        }
        self.role = role;
        if role == Role::Master {
            roles.master = Some(self.number);
        } else if roles.master == Some(self.number) {
            roles.master = None;
        }
        Ok(())
    }

    /// A master is a slave from when another became master.
    pub(super) fn hear_of_roles(&mut self, roles: &Roles) {
        if self.role != Role::Master || roles.master == Some(self.number) {
            return;
        }
        self.role = Role::Slave;
        let reasons = self.wants.0[AsyncConfig::ROLE_STATUS_SLAVE].unwrap_or(0);
        if reasons & 1 << ROLE_REASON_MASTER != 0 {
            let generation = roles.generation.unwrap_or(u64::MAX);
            self.answer(0, &Message::RoleStatus(self.role.number(), ROLE_REASON_MASTER, generation));
        }
    }

    /// Does what is asked of a bundle, and says what was done.
    fn bundle(
        &mut self,
        id: u32,
        control: BundleControl,
        flags: u16,
        datapath: &mut Datapath,
    ) -> Result<BundleControl, error::Code> {
        let same_flags = |bundle: &Bundle| bundle.flags == flags;
        if !self.bundles.get(&id).is_none_or(same_flags) && control != BundleControl::OpenRequest {
            return Err(error::BUNDLE_BAD_FLAGS);
        }
        match control {
            BundleControl::OpenRequest => self.open_bundle(id, flags),
            BundleControl::CloseRequest => {
                let bundle = self.bundles.get_mut(&id).ok_or(error::BUNDLE_BAD_ID)?;
                let closed = std::mem::replace(&mut bundle.closed, true);
                if closed { Err(error::BUNDLE_CLOSED) } else { Ok(BundleControl::CloseReply) }
            }
            BundleControl::CommitRequest if self.role == Role::Slave => Err(error::IS_SLAVE),
            BundleControl::CommitRequest => {
                let bundle = self.bundles.remove(&id).ok_or(error::BUNDLE_BAD_ID)?;
                if bundle.failed {
                    return Err(error::BUNDLE_FAILED);
                }
                commit(&bundle.changes, &mut datapath.pipeline).map(|()| BundleControl::CommitReply)
            }
            BundleControl::DiscardRequest => {
                self.bundles.remove(&id).map(|_| BundleControl::DiscardReply).ok_or(error::BUNDLE_BAD_ID)
            }
            BundleControl::OpenReply
            | BundleControl::CloseReply
            | BundleControl::CommitReply
            | BundleControl::DiscardReply => Err(error::BUNDLE_BAD_TYPE),
        }
    }

    fn open_bundle(&mut self, id: u32, flags: u16) -> Result<BundleControl, error::Code> {
        match self.bundles.get(&id) {
            // Nothing of it was ever accepted: it is there only to be refused.
            Some(bundle) if !bundle.known => {}
            Some(_) => return Err(error::BUNDLE_EXISTS),
            None if self.bundles.len() >= BUNDLES_MAX => return Err(error::BUNDLE_TOO_MANY),
            None => {}
        }
        self.bundles.insert(id, Bundle { known: true, ..Bundle::new(flags) });
        Ok(BundleControl::OpenReply)
    }

    fn bundle_add(
        &mut self,
        id: u32,
        flags: u16,
        message: Message,
        pipeline: &Pipeline,
    ) -> Result<(), error::Code> {
        // As the specification allows, the first message may open the bundle.
        if !self.bundles.contains_key(&id) && self.bundles.len() >= BUNDLES_MAX {
            return Err(error::BUNDLE_TOO_MANY);
        }
        let Message::FlowMod(change) = message else { return Err(error::BUNDLE_UNSUPPORTED) };
        let bundle = self.bundles.entry(id).or_insert_with(|| Bundle::new(flags));
        if bundle.flags != flags {
            return Err(error::BUNDLE_BAD_FLAGS);
        }
        if bundle.closed {
            return Err(error::BUNDLE_CLOSED);
        }
        if bundle.changes.len() >= BUNDLE_LEN_MAX {
            return Err(error::BUNDLE_FULL);
        }
        // Whether it overlaps with another is known when those before it are there.
        let alone = FlowModMsg { flags: change.flags & !ofp::FLAG_CHECK_OVERLAP, ..change.clone() };
        pipeline.check(&alone)?;
        bundle.known = true;
        if !bundle.failed {
            bundle.changes.push(change);
        }
        Ok(())
    }
}

/// All or nothing: everything is checked before the first change, and what was checked cannot fail. Whether a rule overlaps
/// with others depends on the changes before it, so where that is to be checked the changes are tried on a copy.
fn commit(changes: &[FlowModMsg], pipeline: &mut Pipeline) -> Result<(), error::Code> {
    let room = pipeline.len().saturating_add(changes.len()) <= RULES_MAX;
    if !room {
        return Err(error::BUNDLE_FAILED);
    }
    let tried = changes.iter().any(|change| change.flags & ofp::FLAG_CHECK_OVERLAP != 0);
    let mut copy = tried.then(|| pipeline.clone());
    let sound = match &mut copy {
        Some(copy) => changes.iter().all(|change| copy.apply(change).is_ok()),
        None => changes.iter().all(|change| pipeline.check(change).is_ok()),
    };
    match copy {
        _ if !sound => return Err(error::BUNDLE_FAILED),
        Some(copy) => *pipeline = copy,
        None => changes.iter().try_for_each(|change| pipeline.apply(change))?,
    }
    Ok(())
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn send(out: &PacketOut, datapath: &mut Datapath, packet: &mut Packet) -> Result<(), error::Code> {
    let none = out.in_port == PortNo::CONTROLLER || out.in_port == PortNo::ANY;
    if !none && datapath.ports_of(out.in_port).next().is_none() {
        return Err(error::BAD_PORT);
    }
    if !packet.load(&out.bytes) {
        return Err(error::BAD_PACKET);
    }
    let ports = &mut datapath.ports;
    let mut deliver = |port: PortNo, packet: &mut Packet, key| ports.send(port, packet, key);
    datapath.pipeline.packet_out(packet, out.in_port, &out.actions, &mut deliver)
}

/// `OFPG_MAX` and `OFPM_MAX`: those beyond have a meaning of their own.
const GROUP_MAX: u32 = 0xffff_ff00;
const METER_MAX: u32 = 0xffff_0000;

/// There are no groups, and there is no room for any; to remove what is not there is no error.
fn change_group(change: GroupMod) -> Result<(), error::Code> {
    match change.command {
        ADD if change.group > GROUP_MAX => Err(error::GROUP_INVALID),
        ADD => Err(error::GROUP_NO_ROOM),
        MODIFY => Err(error::GROUP_UNKNOWN),
        DELETE => Ok(()),
        _ => Err(error::GROUP_BAD_COMMAND),
    }
}

/// As with groups.
fn change_meter(change: MeterMod) -> Result<(), error::Code> {
    match change.command {
        ADD if !(1..=METER_MAX).contains(&change.meter) => Err(error::METER_INVALID),
        ADD => Err(error::METER_NO_ROOM),
        MODIFY => Err(error::METER_UNKNOWN),
        DELETE => Ok(()),
        _ => Err(error::METER_BAD_COMMAND),
    }
}

/// Ports have no settings, so that only what says nothing can be done.
fn change_port(change: &PortMod, datapath: &Datapath) -> Result<(), error::Code> {
    let port = datapath.ports_of(change.port).next().filter(|_| change.port != PortNo::ANY);
    let port = describe(port.ok_or(error::PORT_BAD_PORT)?);
    if port.mac != change.mac {
        return Err(error::PORT_BAD_ADDRESS);
    }
    if change.config & change.mask != 0 {
        return Err(error::PORT_BAD_CONFIG);
    }
    if change.advertise == 0 { Ok(()) } else { Err(error::PORT_BAD_ADVERTISE) }
}

/// Tables have no settings either.
fn change_table(change: TableMod) -> Result<(), error::Code> {
    if change.table >= TABLES && change.table != FlowModMsg::ALL_TABLES {
        return Err(error::TABLE_BAD_TABLE);
    }
    if change.config == 0 { Ok(()) } else { Err(error::TABLE_BAD_CONFIG) }
}

fn features(datapath: &Datapath) -> Message {
    Message::FeaturesReply { datapath: datapath.id, buffers: 0, tables: TABLES, capabilities: CAPABILITIES }
}

fn statistics(request: &Request, datapath: &Datapath) -> Result<Reply, error::Code> {
    Ok(match request {
        Request::Description => Reply::Description(Box::new(Description {
            manufacturer: "Limosa".into(),
            hardware: "embedded switch".into(),
            software: env!("CARGO_PKG_VERSION").into(),
            serial: String::new(),
            datapath: datapath.name.clone(),
        })),
        Request::Flows(query) | Request::Aggregate(query)
            if query.table >= TABLES && query.table != FlowModMsg::ALL_TABLES =>
        {
            return Err(error::BAD_TABLE_ID);
        }
        Request::Flows(query) => Reply::Flows(datapath.pipeline.flows(query)),
        Request::Aggregate(query) => Reply::Aggregate(aggregate(query, &datapath.pipeline)),
        Request::Tables => Reply::Tables(datapath.pipeline.table_stats()),
        Request::PortStats(port) => {
            let list: Vec<_> = datapath.ports_of(*port).map(super::Port::stats).collect();
            if list.is_empty() && *port != PortNo::ANY {
                return Err(error::BAD_PORT);
            }
            Reply::PortStats(list)
        }
        Request::PortDesc => Reply::PortDesc(datapath.ports_of(PortNo::ANY).map(describe).collect()),
        Request::TableFeatures { set: true } => return Err(error::TABLE_FEATURES_EPERM),
        Request::TableFeatures { set: false } => {
            let rules_max = u32::try_from(RULES_MAX).unwrap_or(u32::MAX);
            let features = |table| TableFeatures { table, tables: TABLES, rules_max };
            Reply::TableFeatures((0..TABLES).map(features).collect())
        }
        Request::TableDesc => Reply::TableDesc((0..TABLES).collect()),
        Request::Absent { kind, of, queue } => absent(*kind, *of, *queue, datapath)?,
    })
}

/// Asked for all, there are none; asked for one, it is not there.
fn absent(kind: Absent, of: u32, queue: u32, datapath: &Datapath) -> Result<Reply, error::Code> {
    match kind {
        Absent::QueueStats | Absent::QueueDesc if datapath.ports_of(PortNo(of)).next().is_none() => {
            Err(error::QUEUE_BAD_PORT)
        }
        Absent::QueueStats | Absent::QueueDesc if queue != ALL => Err(error::QUEUE_BAD_QUEUE),
        Absent::MeterStats | Absent::MeterConfig if of != ALL => Err(error::METER_UNKNOWN),
        Absent::QueueStats
        | Absent::QueueDesc
        | Absent::GroupStats
        | Absent::GroupDesc
        | Absent::GroupFeatures
        | Absent::MeterStats
        | Absent::MeterConfig
        | Absent::MeterFeatures => Ok(Reply::Absent(kind)),
    }
}

fn aggregate(query: &FlowQuery, pipeline: &Pipeline) -> Aggregate {
    pipeline.flows(query).iter().fold(Aggregate::default(), |sum, flow| Aggregate {
        packets: sum.packets + flow.packets,
        bytes: sum.bytes + flow.bytes,
        flows: sum.flows + 1,
    })
}

fn describe(port: &super::Port) -> PortDesc {
    let number = port.number().0.to_be_bytes();
    let mac = [0x02, 0x4c, number[0], number[1], number[2], number[3]];
    PortDesc { port: port.number(), name: port.name().to_owned(), mac, up: port.is_up() }
}
