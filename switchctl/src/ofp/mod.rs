//! OpenFlow 1.4 (version 5 on the wire): the messages that Limosa's driver and switch exchange, both ways.
//!
//! Decoding is bounded by the length of the message (at most 65,535 bytes) and never panics. What is legal
//! OpenFlow and not used here is [`DecodeError::Unsupported`]. Masks on TCP and UDP ports and clearing the
//! input port are extensions that Open vSwitch accepts.
//!
//! Source: OpenFlow Switch Specification 1.4.0 (ONF TS-012), section 7.

pub mod error;
mod features;
mod multipart;
mod oxm;
mod settings;
mod wire;

pub use multipart::{
    Absent, Aggregate, Description, FlowQuery, FlowStats, PortDesc, PortStats, Reply, Request, TableFeatures,
    TableStats, split_reply,
};
pub(crate) use settings::{ADD, DELETE, MODIFY};
pub use settings::{AsyncConfig, GroupMod, MeterMod, PortMod, TableMod};

use crate::core::rules::{Action, Field, Match, PacketIn, PacketOut, PortNo, Rule, RuleKey};
use oxm::{
    put_actions, put_instructions, put_match, skip_match, take_actions, take_instructions, take_match,
};
use wire::{Reader, Writer};

/// The version byte of OpenFlow 1.4.
pub const VERSION: u8 = 5;
/// Bytes of every message's header.
pub const HEADER_LEN: usize = 8;
/// Longest message.
pub const MESSAGE_LEN_MAX: usize = u16::MAX as usize;
/// A packet was sent to the controller by an action (`OFPR_APPLY_ACTION`).
const REASON_ACTION: u8 = 1;
/// No packet is buffered in the switch.
const NO_BUFFER: u32 = u32::MAX;

/// Legal OpenFlow that this codec does not carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// A match field.
    #[error("match field {number} of class {class:#06x}")]
    Field {
        /// Its class.
        class: u16,
        /// Its number in the class.
        number: u8,
    },
    /// An action.
    #[error("action {0}")]
    Action(u16),
    /// An action of somebody's own.
    #[error("action of experimenter {0:#x}")]
    ExperimenterAction(u32),
    /// An instruction.
    #[error("instruction {0}")]
    Instruction(u16),
    /// Pushing a tag of another kind.
    #[error("pushing a tag of type {0:#06x}")]
    EtherType(u16),
    /// Setting a field.
    #[error("setting field {0}")]
    SetField(u8),
    /// Setting some bits of a field.
    #[error("setting some bits of field {0}")]
    SetMasked(u8),
    /// A message type.
    #[error("message type {0}")]
    Message(u8),
    /// A multipart type.
    #[error("multipart type {0}")]
    Multipart(u16),
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends early.
    #[error("{needed} bytes are needed and {given} are left")]
    Short {
        /// What was to be read.
        needed: usize,
        /// What there is.
        given: usize,
    },
    /// The header's length is not that of the message.
    #[error("the header says {said} bytes and there are {given}")]
    Length {
        /// In the header.
        said: usize,
        /// Of the slice.
        given: usize,
    },
    /// Not OpenFlow 1.4.
    #[error("version {0} on the wire, only 5 (OpenFlow 1.4) is spoken")]
    Version(u8),
    /// A match that is not a list of fields, or too short.
    #[error("match of type {kind} with length {len}")]
    Match {
        /// Its type.
        kind: u16,
        /// Its length.
        len: usize,
    },
    /// A match field with a wrong length.
    #[error("match field {number} has length {len}")]
    FieldLength {
        /// Its number.
        number: u8,
        /// Its length.
        len: usize,
    },
    /// A value with bits where its mask has none.
    #[error("match field {number} has value bits outside its mask")]
    BitsOutsideMask {
        /// Its number.
        number: u8,
    },
    /// A field that was there already.
    #[error("match field {number} appears twice")]
    FieldTwice {
        /// Its number.
        number: u8,
    },
    /// A field whose EtherType or IP protocol is not there before it.
    #[error("{0:?} is matched without the EtherType or IP protocol that it depends on before it")]
    Needs(Field),
    /// An action with a wrong length.
    #[error("action {kind} has length {len}")]
    ActionLength {
        /// Its type.
        kind: u16,
        /// Its length.
        len: usize,
    },
    /// An action that sets a field has a wrong length for it.
    #[error("the field to be set has length {0}")]
    SetLength(usize),
    /// An instruction with a wrong length.
    #[error("instruction {kind} has length {len}")]
    InstructionLength {
        /// Its type.
        kind: u16,
        /// Its length.
        len: usize,
    },
    /// An instruction that was there already.
    #[error("instruction {0} appears twice")]
    InstructionTwice(u16),
    /// A mask on a field that has none in OpenFlow.
    #[error("match field {number} cannot have a mask")]
    MaskOnField {
        /// Its number.
        number: u8,
    },
    /// Bytes behind the end of what the message's type has.
    #[error("{0} bytes behind the end of the message")]
    Trailing(usize),
    /// A record inside a list with a wrong length.
    #[error("record with length {0}")]
    RecordLength(usize),
    /// A number without meaning.
    #[error("{field} is {value}")]
    Value {
        /// Which.
        field: &'static str,
        /// What it was.
        value: u32,
        /// The error that answers it.
        code: error::Code,
    },
    /// Legal, but not carried here.
    #[error("{0} is not supported")]
    Unsupported(#[from] Unsupported),
}

impl DecodeError {
    /// Error type and code that a switch answers with (OpenFlow 1.4, section 7.5.4).
    #[must_use]
    pub fn reply(&self) -> error::Code {
        match self {
            Self::Version(_) => error::BAD_VERSION,
            Self::Match { kind, .. } if *kind != 1 => error::MATCH_BAD_TYPE,
            Self::Match { .. } | Self::FieldLength { .. } => error::MATCH_BAD_LEN,
            Self::BitsOutsideMask { .. } => error::MATCH_BAD_WILDCARDS,
            Self::FieldTwice { .. } => error::MATCH_DUP_FIELD,
            Self::MaskOnField { .. } => error::MATCH_BAD_MASK,
            Self::Needs(_) => error::MATCH_BAD_PREREQ,
            Self::ActionLength { .. } => error::ACTION_BAD_LEN,
            Self::SetLength(_) => error::BAD_SET_LEN,
            Self::InstructionLength { .. } => error::INSTRUCTION_BAD_LEN,
            Self::InstructionTwice(_) => error::INSTRUCTION_DUP,
            Self::Short { .. } | Self::Length { .. } | Self::RecordLength(_) | Self::Trailing(_) => {
                error::BAD_LEN
            }
            Self::Value { code, .. } => *code,
            Self::Unsupported(what) => what.reply(),
        }
    }
}

impl Unsupported {
    fn reply(self) -> error::Code {
        match self {
            Self::Field { .. } => error::MATCH_BAD_FIELD,
            Self::Action(_) => error::ACTION_BAD_TYPE,
            Self::ExperimenterAction(_) => error::ACTION_BAD_EXPERIMENTER,
            Self::Instruction(number) => instruction_error(number),
            Self::EtherType(_) | Self::SetMasked(_) => error::ACTION_BAD_ARGUMENT,
            Self::SetField(_) => error::BAD_SET_TYPE,
            Self::Message(kind::EXPERIMENTER) | Self::Multipart(u16::MAX) => error::BAD_EXPERIMENTER,
            Self::Message(_) => error::BAD_TYPE,
            Self::Multipart(_) => error::BAD_MULTIPART,
        }
    }
}

/// Instructions of OpenFlow 1.4 that are not carried here, and numbers that are none.
fn instruction_error(number: u16) -> error::Code {
    match number {
        2 => error::INSTRUCTION_UNSUPPORTED_METADATA,
        3..=6 => error::INSTRUCTION_UNSUPPORTED,
        u16::MAX => error::INSTRUCTION_BAD_EXPERIMENTER,
        _ => error::INSTRUCTION_UNKNOWN,
    }
}

/// What every message starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version on the wire.
    pub version: u8,
    /// Message type.
    pub kind: u8,
    /// Bytes of the message with this header.
    pub len: usize,
    /// Transaction id: an answer carries that of its request.
    pub xid: u32,
}

impl Header {
    /// Reads a header; `None` until eight bytes are there.
    #[must_use]
    pub fn peek(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_LEN] = bytes.first_chunk()?;
        Some(Self {
            version: bytes[0],
            kind: bytes[1],
            len: usize::from(u16::from_be_bytes([bytes[2], bytes[3]])),
            xid: u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
    }
}

/// What a flow mod does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Adds, or replaces what has the same key.
    Add,
    /// Changes the actions of all that the match covers.
    Modify,
    /// Changes the actions of exactly this rule.
    ModifyStrict,
    /// Removes all that the match covers.
    Delete,
    /// Removes exactly this rule.
    DeleteStrict,
}

/// A change of rules on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowModMsg {
    /// What to do.
    pub command: Command,
    /// Table, priority and match; table 255 is all tables, for deletion.
    pub key: RuleKey,
    /// Cookie, actions and goto.
    pub rule: Rule,
    /// For changes and deletion: which cookie bits must be equal.
    pub cookie_mask: u64,
    /// Seconds; 0 for never.
    pub idle_timeout: u16,
    /// Seconds; 0 for never.
    pub hard_timeout: u16,
    /// Deletion of rules with this output only; [`PortNo::ANY`] for all.
    pub out_port: PortNo,
    /// Deletion of rules with this group only; [`GROUP_ANY`] for all.
    pub out_group: u32,
    /// `OFPFF_*` bits.
    pub flags: u16,
    /// What eviction would go by: lower ones first.
    pub importance: u16,
}

/// Any group, or none (`OFPG_ANY`).
pub const GROUP_ANY: u32 = u32::MAX;
/// All groups, for deletion and statistics (`OFPG_ALL`).
pub const GROUP_ALL: u32 = 0xffff_fffc;
/// Flow mod flag: tell when the rule ends (`OFPFF_SEND_FLOW_REM`).
pub const FLAG_SEND_REMOVED: u16 = 1;
/// Flow mod flag: refuse a rule that overlaps another of its priority (`OFPFF_CHECK_OVERLAP`).
pub const FLAG_CHECK_OVERLAP: u16 = 2;
/// Flow mod flag: the counters begin at zero (`OFPFF_RESET_COUNTS`).
pub const FLAG_RESET_COUNTS: u16 = 4;
/// All flow mod flags of OpenFlow 1.4; the last two allow that packets and bytes are not counted.
pub const FLAGS_ALL: u16 = 0x1f;

impl FlowModMsg {
    /// All tables.
    pub const ALL_TABLES: u8 = 255;

    /// A flow mod without anything special.
    #[must_use]
    pub fn new(command: Command, key: RuleKey, rule: Rule) -> Self {
        Self {
            command,
            key,
            rule,
            cookie_mask: 0,
            idle_timeout: 0,
            hard_timeout: 0,
            out_port: PortNo::ANY,
            out_group: GROUP_ANY,
            flags: 0,
            importance: 0,
        }
    }
}

/// Requests and answers about a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub enum BundleControl {
    OpenRequest,
    OpenReply,
    CloseRequest,
    CloseReply,
    CommitRequest,
    CommitReply,
    DiscardRequest,
    DiscardReply,
}

impl BundleControl {
    const ALL: [Self; 8] = [
        Self::OpenRequest,
        Self::OpenReply,
        Self::CloseRequest,
        Self::CloseReply,
        Self::CommitRequest,
        Self::CommitReply,
        Self::DiscardRequest,
        Self::DiscardReply,
    ];
}

/// Bundle flag: all or nothing.
pub const BUNDLE_ATOMIC: u16 = 1;
/// Bundle flag: in the order of the messages.
pub const BUNDLE_ORDERED: u16 = 2;

/// A message without its transaction id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First message of both sides, with a bitmap of versions (bit 5 is 1.4) if there is one.
    Hello {
        /// The header's version: the highest spoken.
        version: u8,
        /// Versions 0 to 31.
        versions: Option<u32>,
    },
    /// A request was refused.
    Error {
        /// Type.
        kind: u16,
        /// Code of the type.
        code: u16,
        /// At least 64 bytes of the request.
        data: Vec<u8>,
    },
    /// Are you there?
    EchoRequest(Vec<u8>),
    /// Yes, with the same bytes.
    EchoReply(Vec<u8>),
    /// Who are you?
    FeaturesRequest,
    /// Answer.
    FeaturesReply {
        /// Datapath id.
        datapath: u64,
        /// Packets that the switch can buffer.
        buffers: u32,
        /// Number of tables.
        tables: u8,
        /// `OFPC_*` bits.
        capabilities: u32,
    },
    /// How is the switch set?
    GetConfigRequest,
    /// Answer: flags, bytes of a packet for the controller.
    GetConfigReply(u16, u16),
    /// Set it.
    SetConfig(u16, u16),
    /// A status change, which nobody here reads: its type.
    Async(u8),
    /// A packet for the controller. What else the switch says of it is left out.
    PacketIn(PacketIn),
    /// A packet from the controller.
    PacketOut(PacketOut),
    /// A change of rules.
    FlowMod(FlowModMsg),
    /// Asks for statistics or descriptions.
    MultipartRequest(Request),
    /// A part of the answer.
    MultipartReply {
        /// This part.
        reply: Reply,
        /// Whether another follows.
        more: bool,
    },
    /// Answered when everything before it was done.
    BarrierRequest,
    /// Answer.
    BarrierReply,
    /// Role of the controller: number and generation.
    RoleRequest(u32, u64),
    /// Answer.
    RoleReply(u32, u64),
    /// Which asynchronous messages are wanted?
    GetAsyncRequest,
    /// Answer.
    GetAsyncReply(AsyncConfig),
    /// Sets which are wanted; what is left out stays.
    SetAsync(AsyncConfig),
    /// The controller's role was changed by somebody else: role, reason, generation.
    RoleStatus(u32, u8, u64),
    /// A change of groups.
    GroupMod(GroupMod),
    /// A change of a port.
    PortMod(PortMod),
    /// A change of a table.
    TableMod(TableMod),
    /// A change of meters.
    MeterMod(MeterMod),
    /// About a bundle.
    BundleControl {
        /// Its id.
        bundle: u32,
        /// What.
        control: BundleControl,
        /// [`BUNDLE_ATOMIC`] and [`BUNDLE_ORDERED`].
        flags: u16,
    },
    /// Adds a message to a bundle. The transaction ids of both are the same.
    BundleAdd {
        /// Its id.
        bundle: u32,
        /// As when it was opened.
        flags: u16,
        /// What to add.
        message: Box<Message>,
    },
}

/// Message types.
pub(crate) mod kind {
    pub(crate) const HELLO: u8 = 0;
    pub(crate) const ERROR: u8 = 1;
    pub(crate) const ECHO_REQUEST: u8 = 2;
    pub(crate) const ECHO_REPLY: u8 = 3;
    pub(crate) const EXPERIMENTER: u8 = 4;
    pub(crate) const FEATURES_REQUEST: u8 = 5;
    pub(crate) const FEATURES_REPLY: u8 = 6;
    pub(crate) const GET_CONFIG_REQUEST: u8 = 7;
    pub(crate) const GET_CONFIG_REPLY: u8 = 8;
    pub(crate) const SET_CONFIG: u8 = 9;
    pub(crate) const PACKET_IN: u8 = 10;
    pub(crate) const FLOW_REMOVED: u8 = 11;
    pub(crate) const PORT_STATUS: u8 = 12;
    pub(crate) const PACKET_OUT: u8 = 13;
    pub(crate) const FLOW_MOD: u8 = 14;
    pub(crate) const GROUP_MOD: u8 = 15;
    pub(crate) const PORT_MOD: u8 = 16;
    pub(crate) const TABLE_MOD: u8 = 17;
    pub(crate) const MULTIPART_REQUEST: u8 = 18;
    pub(crate) const MULTIPART_REPLY: u8 = 19;
    pub(crate) const BARRIER_REQUEST: u8 = 20;
    pub(crate) const BARRIER_REPLY: u8 = 21;
    pub(crate) const ROLE_REQUEST: u8 = 24;
    pub(crate) const ROLE_REPLY: u8 = 25;
    pub(crate) const GET_ASYNC_REQUEST: u8 = 26;
    pub(crate) const GET_ASYNC_REPLY: u8 = 27;
    pub(crate) const SET_ASYNC: u8 = 28;
    pub(crate) const METER_MOD: u8 = 29;
    pub(crate) const ROLE_STATUS: u8 = 30;
    pub(crate) const TABLE_STATUS: u8 = 31;
    pub(crate) const BUNDLE_CONTROL: u8 = 33;
    pub(crate) const BUNDLE_ADD: u8 = 34;
}

impl Message {
    /// The hello of this implementation: OpenFlow 1.4 alone.
    #[must_use]
    pub fn hello() -> Self {
        Self::Hello { version: VERSION, versions: Some(1 << VERSION) }
    }

    /// An error answer that carries the start of the request.
    #[must_use]
    pub fn error((kind, code): error::Code, request: &[u8]) -> Self {
        Self::Error { kind, code, data: request[..request.len().min(64)].to_vec() }
    }

    /// Whether a hello allows OpenFlow 1.4.
    #[must_use]
    pub fn speaks_us(version: u8, versions: Option<u32>) -> bool {
        versions.map_or(version >= VERSION, |bitmap| bitmap & 1 << VERSION != 0)
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Hello { .. } => kind::HELLO,
            Self::Error { .. } => kind::ERROR,
            Self::EchoRequest(_) => kind::ECHO_REQUEST,
            Self::EchoReply(_) => kind::ECHO_REPLY,
            Self::FeaturesRequest => kind::FEATURES_REQUEST,
            Self::FeaturesReply { .. } => kind::FEATURES_REPLY,
            Self::GetConfigRequest => kind::GET_CONFIG_REQUEST,
            Self::GetConfigReply(..) => kind::GET_CONFIG_REPLY,
            Self::SetConfig(..) => kind::SET_CONFIG,
            Self::Async(kind) => *kind,
            Self::PacketIn(_) => kind::PACKET_IN,
            Self::PacketOut(_) => kind::PACKET_OUT,
            Self::FlowMod(_) => kind::FLOW_MOD,
            Self::MultipartRequest(_) => kind::MULTIPART_REQUEST,
            Self::MultipartReply { .. } => kind::MULTIPART_REPLY,
            Self::BarrierRequest => kind::BARRIER_REQUEST,
            Self::BarrierReply => kind::BARRIER_REPLY,
            Self::RoleRequest(..) => kind::ROLE_REQUEST,
            Self::RoleReply(..) => kind::ROLE_REPLY,
            Self::GetAsyncRequest => kind::GET_ASYNC_REQUEST,
            Self::GetAsyncReply(_) => kind::GET_ASYNC_REPLY,
            Self::SetAsync(_) => kind::SET_ASYNC,
            Self::RoleStatus(..) => kind::ROLE_STATUS,
            Self::GroupMod(_) => kind::GROUP_MOD,
            Self::PortMod(_) => kind::PORT_MOD,
            Self::TableMod(_) => kind::TABLE_MOD,
            Self::MeterMod(_) => kind::METER_MOD,
            Self::BundleControl { .. } => kind::BUNDLE_CONTROL,
            Self::BundleAdd { .. } => kind::BUNDLE_ADD,
        }
    }
}

/// The bytes of a message. A multipart reply that could exceed [`MESSAGE_LEN_MAX`] goes through
/// [`split_reply`] first; all other messages that this crate makes are far shorter.
#[must_use]
pub fn encode(xid: u32, message: &Message) -> Vec<u8> {
    let mut w = Writer(Vec::with_capacity(128));
    put_message(&mut w, xid, message);
    w.0
}

fn put_message(w: &mut Writer, xid: u32, message: &Message) {
    let start = w.len();
    let version = if let Message::Hello { version, .. } = message { *version } else { VERSION };
    w.u8(version);
    w.u8(message.kind());
    w.u16(0);
    w.u32(xid);
    put_body(w, xid, message);
    let len = w.len() - start;
    debug_assert!(len <= MESSAGE_LEN_MAX, "a message of {len} bytes");
    w.set_u16(start + 2, len);
}

fn put_body(w: &mut Writer, xid: u32, message: &Message) {
    match message {
        Message::Hello { versions: None, .. }
        | Message::FeaturesRequest
        | Message::GetConfigRequest
        | Message::BarrierRequest
        | Message::BarrierReply
        | Message::GetAsyncRequest
        | Message::Async(_) => {}
        Message::Hello { versions: Some(bitmap), .. } => {
            w.u16(1);
            w.u16(8);
            w.u32(*bitmap);
        }
        Message::Error { kind, code, data } => {
            w.u16(*kind);
            w.u16(*code);
            w.bytes(data);
        }
        Message::EchoRequest(data) | Message::EchoReply(data) => w.bytes(data),
        Message::GetAsyncReply(config) | Message::SetAsync(config) => settings::put_async(w, config),
        Message::RoleStatus(role, reason, generation) => {
            w.u32(*role);
            w.u8(*reason);
            w.zeros(3);
            w.u64(*generation);
        }
        Message::GroupMod(change) => settings::put_group_mod(w, *change),
        Message::PortMod(change) => settings::put_port_mod(w, change),
        Message::TableMod(change) => settings::put_table_mod(w, *change),
        Message::MeterMod(change) => settings::put_meter_mod(w, *change),
        Message::FeaturesReply { datapath, buffers, tables, capabilities } => {
            w.u64(*datapath);
            w.u32(*buffers);
            w.u8(*tables);
            w.zeros(3);
            w.u32(*capabilities);
            w.zeros(4);
        }
        Message::GetConfigReply(flags, miss) | Message::SetConfig(flags, miss) => {
            w.u16(*flags);
            w.u16(*miss);
        }
        Message::PacketIn(packet) => put_packet_in(w, packet),
        Message::PacketOut(packet) => put_packet_out(w, packet),
        Message::FlowMod(change) => put_flow_mod(w, change),
        Message::MultipartRequest(request) => multipart::put_request(w, request),
        Message::MultipartReply { reply, more } => multipart::put_reply(w, reply, *more),
        Message::RoleRequest(role, generation) | Message::RoleReply(role, generation) => {
            w.u32(*role);
            w.zeros(4);
            w.u64(*generation);
        }
        Message::BundleControl { bundle, control, flags } => {
            w.u32(*bundle);
            w.u16(*control as u16);
            w.u16(*flags);
        }
        Message::BundleAdd { bundle, flags, message } => {
            w.u32(*bundle);
            w.zeros(2);
            w.u16(*flags);
            put_message(w, xid, message);
        }
    }
}

fn put_packet_in(w: &mut Writer, packet: &PacketIn) {
    w.u32(NO_BUFFER);
    w.u16(packet.bytes.len() as u16);
    w.u8(REASON_ACTION);
    w.u8(packet.table);
    w.u64(packet.cookie);
    put_match(w, &Match::ANY);
    w.zeros(2);
    w.bytes(&packet.bytes);
}

fn take_packet_in(r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    // Buffer, length of the whole frame, reason.
    r.take(7)?;
    let (table, cookie) = (r.u8()?, r.u64()?);
    // Fields that a switch tells of a packet may be of any class.
    skip_match(r)?;
    r.take(2)?;
    Ok(Message::PacketIn(PacketIn { cookie, table, bytes: r.rest().to_vec() }))
}

fn put_packet_out(w: &mut Writer, packet: &PacketOut) {
    w.u32(NO_BUFFER);
    w.u32(packet.in_port.0);
    let at = w.len();
    w.u16(0);
    w.zeros(6);
    put_actions(w, &packet.actions);
    let len = w.len() - at - 8;
    w.set_u16(at, len);
    w.bytes(&packet.bytes);
}

fn put_flow_mod(w: &mut Writer, change: &FlowModMsg) {
    w.u64(change.rule.cookie);
    w.u64(change.cookie_mask);
    w.u8(change.key.table);
    w.u8(change.command as u8);
    w.u16(change.idle_timeout);
    w.u16(change.hard_timeout);
    w.u16(change.key.priority);
    w.u32(NO_BUFFER);
    w.u32(change.out_port.0);
    w.u32(change.out_group);
    w.u16(change.flags);
    w.u16(change.importance);
    put_match(w, &change.key.matches);
    put_instructions(w, &change.rule);
}

/// Reads one whole message.
///
/// # Errors
/// [`DecodeError`]; a switch answers [`DecodeError::reply`], a controller closes the connection.
pub fn decode(bytes: &[u8]) -> Result<(u32, Message), DecodeError> {
    decode_nested(bytes, true)
}

fn decode_nested(bytes: &[u8], may_bundle: bool) -> Result<(u32, Message), DecodeError> {
    let header = Header::peek(bytes).ok_or(DecodeError::Short { needed: HEADER_LEN, given: bytes.len() })?;
    if header.len != bytes.len() {
        return Err(DecodeError::Length { said: header.len, given: bytes.len() });
    }
    let mut r = Reader::new(&bytes[HEADER_LEN..]);
    if header.kind == kind::HELLO {
        let versions = take_versions(r)?;
        return Ok((header.xid, Message::Hello { version: header.version, versions }));
    }
    // An older peer may refuse our hello in its own version.
    if header.version != VERSION && header.kind != kind::ERROR {
        return Err(DecodeError::Version(header.version));
    }
    let message = match header.kind {
        kind::BUNDLE_ADD if may_bundle => take_bundle_add(header.xid, &mut r)?,
        kind::BUNDLE_ADD => return Err(not_bundled(header.kind)),
        other => take_body(other, &mut r)?,
    };
    Ok((header.xid, message))
}

fn not_bundled(kind: u8) -> DecodeError {
    DecodeError::Value {
        field: "type of a bundled message",
        value: kind.into(),
        code: error::BUNDLE_UNSUPPORTED,
    }
}

fn take_versions(mut r: Reader<'_>) -> Result<Option<u32>, DecodeError> {
    while r.len() >= 4 {
        let (kind, len) = (r.u16()?, usize::from(r.u16()?));
        let body = len.checked_sub(4).ok_or(DecodeError::RecordLength(len))?;
        let mut element = r.sub(body)?;
        if kind == 1 && body >= 4 {
            return element.u32().map(Some);
        }
        r.take((len.next_multiple_of(8) - len).min(r.len()))?;
    }
    Ok(None)
}

fn take_body(message: u8, r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    Ok(match message {
        kind::ERROR => Message::Error { kind: r.u16()?, code: r.u16()?, data: r.rest().to_vec() },
        kind::ECHO_REQUEST => Message::EchoRequest(r.rest().to_vec()),
        kind::ECHO_REPLY => Message::EchoReply(r.rest().to_vec()),
        kind::FEATURES_REQUEST => alone(r, Message::FeaturesRequest)?,
        kind::FEATURES_REPLY => take_features(r)?,
        kind::GET_CONFIG_REQUEST => alone(r, Message::GetConfigRequest)?,
        kind::GET_CONFIG_REPLY => Message::GetConfigReply(r.u16()?, r.u16()?),
        kind::SET_CONFIG => {
            let (flags, miss) = (r.u16()?, r.u16()?);
            alone(r, Message::SetConfig(flags, miss))?
        }
        kind::PACKET_IN => take_packet_in(r)?,
        kind::FLOW_REMOVED | kind::PORT_STATUS | kind::TABLE_STATUS => Message::Async(message),
        kind::ROLE_STATUS => {
            let (role, reason) = (r.u32()?, r.u8()?);
            r.take(3)?;
            Message::RoleStatus(role, reason, r.u64()?)
        }
        kind::PACKET_OUT => Message::PacketOut(take_packet_out(r)?),
        kind::FLOW_MOD => Message::FlowMod(take_flow_mod(r)?),
        kind::MULTIPART_REQUEST => Message::MultipartRequest(multipart::take_request(r)?),
        kind::MULTIPART_REPLY => multipart::take_reply(r)?,
        kind::BARRIER_REQUEST => alone(r, Message::BarrierRequest)?,
        kind::BARRIER_REPLY => Message::BarrierReply,
        kind::ROLE_REQUEST => {
            let (role, generation) = take_role(r)?;
            alone(r, Message::RoleRequest(role, generation))?
        }
        kind::ROLE_REPLY => take_role(r).map(|(role, generation)| Message::RoleReply(role, generation))?,
        kind::GET_ASYNC_REQUEST => alone(r, Message::GetAsyncRequest)?,
        kind::GET_ASYNC_REPLY => Message::GetAsyncReply(settings::take_async(r)?),
        kind::SET_ASYNC => Message::SetAsync(settings::take_async(r)?),
        kind::GROUP_MOD => Message::GroupMod(settings::take_group_mod(r)?),
        kind::PORT_MOD => Message::PortMod(settings::take_port_mod(r)?),
        kind::TABLE_MOD => Message::TableMod(settings::take_table_mod(r)?),
        kind::METER_MOD => Message::MeterMod(settings::take_meter_mod(r)?),
        kind::BUNDLE_CONTROL => take_bundle_control(r)?,
        other => return Err(Unsupported::Message(other).into()),
    })
}

/// A message of which nothing is left to be read.
fn alone(r: &Reader<'_>, message: Message) -> Result<Message, DecodeError> {
    if r.is_empty() { Ok(message) } else { Err(DecodeError::Trailing(r.len())) }
}

fn take_features(r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    let (datapath, buffers, tables) = (r.u64()?, r.u32()?, r.u8()?);
    r.take(3)?;
    Ok(Message::FeaturesReply { datapath, buffers, tables, capabilities: r.u32()? })
}

fn take_role(r: &mut Reader<'_>) -> Result<(u32, u64), DecodeError> {
    let role = r.u32()?;
    r.take(4)?;
    Ok((role, r.u64()?))
}

fn take_bundle_control(r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    let (bundle, number, flags) = (r.u32()?, r.u16()?, r.u16()?);
    let control = *BundleControl::ALL.get(usize::from(number)).ok_or(DecodeError::Value {
        field: "bundle control type",
        value: number.into(),
        code: error::BUNDLE_BAD_TYPE,
    })?;
    bundle_flags(flags)?;
    settings::no_properties(r)?;
    Ok(Message::BundleControl { bundle, control, flags })
}

/// The bundle that a message is to be added to, and the flags that it names, also of a message that is refused.
pub(crate) fn bundle_of(bytes: &[u8]) -> Option<(u32, u16)> {
    let header = Header::peek(bytes)?;
    let mut r = Reader::new(&bytes[HEADER_LEN..]);
    let bundle = r.u32().ok()?;
    let flags = r.take(2).and_then(|_| r.u16()).unwrap_or(0) & (BUNDLE_ATOMIC | BUNDLE_ORDERED);
    (header.version == VERSION && header.kind == kind::BUNDLE_ADD).then_some((bundle, flags))
}

fn bundle_flags(flags: u16) -> Result<(), DecodeError> {
    let unknown = flags & !(BUNDLE_ATOMIC | BUNDLE_ORDERED);
    let refused =
        DecodeError::Value { field: "bundle flags", value: flags.into(), code: error::BUNDLE_BAD_FLAGS };
    if unknown == 0 { Ok(()) } else { Err(refused) }
}

fn take_bundle_add(outer: u32, r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    let bundle = r.u32()?;
    r.take(2)?;
    let flags = r.u16()?;
    bundle_flags(flags)?;
    let rest = r.rest();
    let header = Header::peek(rest).filter(|header| header.len >= HEADER_LEN);
    let inner = header.and_then(|header| rest.split_at_checked(header.len));
    let (Some(header), Some((bytes, behind))) = (header, inner) else {
        let value = header.map_or(rest.len(), |header| header.len) as u32;
        return Err(DecodeError::Value {
            field: "length of a bundled message",
            value,
            code: error::BUNDLE_MSG_BAD_LEN,
        });
    };
    if header.xid != outer {
        let (field, value) = ("transaction id of a bundled message", header.xid);
        return Err(DecodeError::Value { field, value, code: error::BUNDLE_BAD_XID });
    }
    // Properties are at a multiple of eight bytes behind the message.
    let padding = header.len.next_multiple_of(8) - header.len;
    settings::no_properties(&Reader::new(behind.get(padding..).unwrap_or(&[])))?;
    let (_, message) = decode_nested(bytes, false)?;
    Ok(Message::BundleAdd { bundle, flags, message: Box::new(message) })
}

fn take_packet_out(r: &mut Reader<'_>) -> Result<PacketOut, DecodeError> {
    let (buffer, in_port, len) = (r.u32()?, PortNo(r.u32()?), usize::from(r.u16()?));
    if buffer != NO_BUFFER {
        return Err(no_buffer(buffer));
    }
    r.take(6)?;
    let given = r.len();
    let actions = r.sub(len).map_err(|_| DecodeError::ActionLength { kind: 0, len: given })?;
    let actions = take_actions(actions)?;
    Ok(PacketOut { in_port, actions, bytes: r.rest().to_vec() })
}

fn no_buffer(value: u32) -> DecodeError {
    DecodeError::Value { field: "buffer id", value, code: error::BUFFER_UNKNOWN }
}

fn take_flow_mod(r: &mut Reader<'_>) -> Result<FlowModMsg, DecodeError> {
    let (cookie, cookie_mask, table) = (r.u64()?, r.u64()?, r.u8()?);
    let command = match r.u8()? {
        0 => Command::Add,
        1 => Command::Modify,
        2 => Command::ModifyStrict,
        3 => Command::Delete,
        4 => Command::DeleteStrict,
        other => {
            let (field, value) = ("flow mod command", other.into());
            return Err(DecodeError::Value { field, value, code: error::FLOW_BAD_COMMAND });
        }
    };
    let (idle_timeout, hard_timeout, priority) = (r.u16()?, r.u16()?, r.u16()?);
    let buffer = r.u32()?;
    // Deletions may leave the buffer at any value (OpenFlow 1.4, section 7.3.4.1).
    if buffer != NO_BUFFER && matches!(command, Command::Add | Command::Modify | Command::ModifyStrict) {
        return Err(no_buffer(buffer));
    }
    let (out_port, out_group) = (PortNo(r.u32()?), r.u32()?);
    let (flags, importance) = (r.u16()?, r.u16()?);
    let matches = take_match(r)?;
    let (actions, goto) = take_instructions(*r)?;
    Ok(FlowModMsg {
        command,
        key: RuleKey { table, priority, matches },
        rule: Rule { cookie, actions, goto },
        cookie_mask,
        idle_timeout,
        hard_timeout,
        out_port,
        out_group,
        flags,
        importance,
    })
}

/// The ports that actions name. The port that the packet came in by has a number of its own.
pub(crate) fn outputs(actions: &[Action]) -> impl Iterator<Item = PortNo> + '_ {
    actions.iter().filter_map(|action| match action {
        Action::Output(port) => Some(*port),
        Action::OutputInPort => Some(PortNo::IN_PORT),
        Action::PushVlan(_)
        | Action::PushTag
        | Action::PopVlan
        | Action::SetVlan(_)
        | Action::SetTunnel(_)
        | Action::SetTunnelDst(_)
        | Action::ClearInPort => None,
    })
}
