//! Controllers' connections to the embedded switch.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::PollFlags;
use socket2::Socket;

use super::Datapath;
use super::packet::Packet;
use super::pipeline::{Pipeline, TABLES};
use crate::core::rules::{PacketOut, PortNo};
use crate::ofp::{
    self, Aggregate, BundleControl, Description, FlowModMsg, FlowQuery, HEADER_LEN, Header, Message,
    PortDesc, Reply, Request, error,
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

#[derive(Default)]
struct Bundle {
    closed: bool,
    changes: Vec<FlowModMsg>,
}

/// One controller.
pub(super) struct Connection {
    socket: Socket,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that are sent.
    sent: usize,
    open: bool,
    config: (u16, u16),
    role: (u32, u64),
    bundles: BTreeMap<u32, Bundle>,
}

impl Connection {
    /// Greets a controller.
    pub(super) fn new(socket: Socket) -> Option<Self> {
        socket.set_nonblocking(true).ok()?;
        let output = ofp::encode(0, &Message::hello());
        Some(Self {
            socket,
            input: Vec::new(),
            output,
            sent: 0,
            open: true,
            config: (0, 128),
            role: (1, 0),
            bundles: BTreeMap::new(),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    pub(super) fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Reads what there is, executes whole messages in their order, sends answers.
    pub(super) fn turn(&mut self, events: PollFlags, datapath: &mut Datapath, packet: &mut Packet) {
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.read();
            self.execute(datapath, packet);
        }
        self.write();
    }

    fn read(&mut self) {
        let start = self.input.len();
        self.input.resize(start + READ_MAX, 0);
        let result = self.socket.read(&mut self.input[start..]);
        self.input.truncate(start + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => self.open = false,
            Err(error) if !is_temporary(&error) => self.open = false,
            _ => {}
        }
    }

    fn execute(&mut self, datapath: &mut Datapath, packet: &mut Packet) {
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        while let Some(header) = Header::peek(&input[at..]) {
            if header.len < HEADER_LEN {
                self.open = false;
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
        } else if self.output.len() - self.sent > OUTPUT_MAX {
            tracing::warn!("a controller does not read its answers and is dropped");
            self.open = false;
        }
    }

    fn answer(&mut self, xid: u32, message: &Message) {
        self.output.extend_from_slice(&ofp::encode(xid, message));
    }

    fn message(&mut self, header: Header, bytes: &[u8], datapath: &mut Datapath, packet: &mut Packet) {
        let outcome = match ofp::decode(bytes) {
            Ok((xid, message)) => self.handle(xid, message, datapath, packet),
            Err(error) => {
                tracing::debug!(%error, kind = header.kind, "a controller's message was refused");
                Err(error.reply())
            }
        };
        if let Err(code) = outcome {
            self.answer(header.xid, &Message::error(code, bytes));
        }
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
                self.open = false;
                return Err(error::HELLO_INCOMPATIBLE);
            }
            Message::EchoRequest(data) => self.answer(xid, &Message::EchoReply(data)),
            Message::FeaturesRequest => self.answer(xid, &features(datapath)),
            Message::GetConfigRequest => {
                self.answer(xid, &Message::GetConfigReply(self.config.0, self.config.1))
            }
            Message::SetConfig(flags, miss) => self.config = (flags, miss),
            Message::BarrierRequest => self.answer(xid, &Message::BarrierReply),
            Message::RoleRequest(role, generation) => self.role(xid, role, generation),
            // Nothing is ever sent unasked, so nothing needs to be remembered.
            Message::GetAsyncRequest => self.answer(xid, &Message::GetAsyncReply(Vec::new())),
            Message::PacketOut(out) => send(&out, datapath, packet)?,
            Message::FlowMod(change) => datapath.pipeline.apply(&change)?,
            Message::MultipartRequest(request) => {
                let reply = statistics(&request, datapath);
                ofp::split_reply(reply).iter().for_each(|part| self.answer(xid, part));
            }
            Message::BundleControl { bundle, control, flags } => {
                self.bundle(bundle, control, datapath)?;
                let control = match control {
                    BundleControl::OpenRequest => BundleControl::OpenReply,
                    BundleControl::CloseRequest => BundleControl::CloseReply,
                    BundleControl::CommitRequest => BundleControl::CommitReply,
                    // Replies were refused above, so this is a discard.
                    BundleControl::DiscardRequest
                    | BundleControl::OpenReply
                    | BundleControl::CloseReply
                    | BundleControl::CommitReply
                    | BundleControl::DiscardReply => BundleControl::DiscardReply,
                };
                self.answer(xid, &Message::BundleControl { bundle, control, flags });
            }
            Message::BundleAdd { bundle, message, .. } => {
                self.bundle_add(bundle, *message, &datapath.pipeline)?
            }
            Message::Hello { .. }
            | Message::Error { .. }
            | Message::EchoReply(_)
            | Message::SetAsync(_)
            | Message::Async(_) => {}
            Message::FeaturesReply { .. }
            | Message::GetConfigReply(..)
            | Message::MultipartReply { .. }
            | Message::BarrierReply
            | Message::RoleReply(..)
            | Message::PacketIn(_)
            | Message::GetAsyncReply(_) => return Err(error::BAD_TYPE),
        }
        Ok(())
    }

    /// Role 0 asks; any other is granted, because nothing differs between roles here.
    fn role(&mut self, xid: u32, role: u32, generation: u64) {
        if role != 0 {
            self.role = (role, generation);
        }
        self.answer(xid, &Message::RoleReply(self.role.0, self.role.1));
    }

    fn bundle(
        &mut self,
        id: u32,
        control: BundleControl,
        datapath: &mut Datapath,
    ) -> Result<(), error::Code> {
        match control {
            BundleControl::OpenRequest if self.bundles.contains_key(&id) => Err(error::BUNDLE_EXISTS),
            BundleControl::OpenRequest if self.bundles.len() >= BUNDLES_MAX => Err(error::BUNDLE_TOO_MANY),
            BundleControl::OpenRequest => {
                self.bundles.insert(id, Bundle::default());
                Ok(())
            }
            BundleControl::CloseRequest => {
                let bundle = self.bundles.get_mut(&id).ok_or(error::BUNDLE_BAD_ID)?;
                if std::mem::replace(&mut bundle.closed, true) { Err(error::BUNDLE_CLOSED) } else { Ok(()) }
            }
            BundleControl::CommitRequest => {
                let bundle = self.bundles.remove(&id).ok_or(error::BUNDLE_BAD_ID)?;
                commit(&bundle.changes, &mut datapath.pipeline)
            }
            BundleControl::DiscardRequest => self.bundles.remove(&id).map(drop).ok_or(error::BUNDLE_BAD_ID),
            BundleControl::OpenReply
            | BundleControl::CloseReply
            | BundleControl::CommitReply
            | BundleControl::DiscardReply => Err(error::BUNDLE_BAD_TYPE),
        }
    }

    fn bundle_add(&mut self, id: u32, message: Message, pipeline: &Pipeline) -> Result<(), error::Code> {
        // As the specification allows, the first message may open the bundle.
        if !self.bundles.contains_key(&id) && self.bundles.len() >= BUNDLES_MAX {
            return Err(error::BUNDLE_TOO_MANY);
        }
        let bundle = self.bundles.entry(id).or_default();
        let Message::FlowMod(change) = message else { return Err(error::BUNDLE_UNSUPPORTED) };
        if bundle.closed {
            return Err(error::BUNDLE_CLOSED);
        }
        if bundle.changes.len() >= BUNDLE_LEN_MAX {
            return Err(error::BUNDLE_FULL);
        }
        pipeline.check(&change)?;
        bundle.changes.push(change);
        Ok(())
    }
}

/// All or nothing: everything is checked before the first change, and what was checked cannot fail.
fn commit(changes: &[FlowModMsg], pipeline: &mut Pipeline) -> Result<(), error::Code> {
    let room = pipeline.len().saturating_add(changes.len()) <= super::pipeline::RULES_MAX;
    if !room || changes.iter().any(|change| pipeline.check(change).is_err()) {
        return Err(error::BUNDLE_FAILED);
    }
    changes.iter().try_for_each(|change| pipeline.apply(change))
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn send(out: &PacketOut, datapath: &mut Datapath, packet: &mut Packet) -> Result<(), error::Code> {
    if !packet.load(&out.bytes) {
        return Err(error::BAD_LEN);
    }
    let ports = &mut datapath.ports;
    let mut deliver = |port: PortNo, packet: &mut Packet, key| ports.send(port, packet, key);
    Pipeline::packet_out(packet, out.in_port, &out.actions, &mut deliver);
    Ok(())
}

fn features(datapath: &Datapath) -> Message {
    Message::FeaturesReply { datapath: datapath.id, buffers: 0, tables: TABLES, capabilities: CAPABILITIES }
}

fn statistics(request: &Request, datapath: &Datapath) -> Reply {
    match request {
        Request::Description => Reply::Description(Box::new(Description {
            manufacturer: "Limosa".into(),
            hardware: "embedded switch".into(),
            software: env!("CARGO_PKG_VERSION").into(),
            serial: String::new(),
            datapath: datapath.name.clone(),
        })),
        Request::Flows(query) => Reply::Flows(datapath.pipeline.flows(query)),
        Request::Aggregate(query) => Reply::Aggregate(aggregate(query, &datapath.pipeline)),
        Request::Tables => Reply::Tables(datapath.pipeline.table_stats()),
        Request::PortStats(port) => {
            Reply::PortStats(datapath.ports_of(*port).map(super::Port::stats).collect())
        }
        Request::PortDesc => Reply::PortDesc(datapath.ports_of(PortNo::ANY).map(describe).collect()),
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
