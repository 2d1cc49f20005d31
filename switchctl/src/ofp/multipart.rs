//! Multipart requests and replies: descriptions and statistics.

use std::time::Duration;

use super::oxm::{put_instructions, put_match, take_instructions, take_match};
use super::wire::{Reader, Writer};
use super::{DecodeError, GROUP_ANY, MESSAGE_LEN_MAX, Message, Unsupported, error, features};
use crate::core::rules::{Match, PortNo, Rule, RuleKey};

const DESC: u16 = 0;
const FLOW: u16 = 1;
const AGGREGATE: u16 = 2;
const TABLE: u16 = 3;
const PORT_STATS: u16 = 4;
const QUEUE_STATS: u16 = 5;
const GROUP_STATS: u16 = 6;
const GROUP_DESC: u16 = 7;
const GROUP_FEATURES: u16 = 8;
const METER_STATS: u16 = 9;
const METER_CONFIG: u16 = 10;
const METER_FEATURES: u16 = 11;
const TABLE_FEATURES: u16 = 12;
const PORT_DESC: u16 = 13;
const TABLE_DESC: u16 = 14;
const QUEUE_DESC: u16 = 15;

/// Another part follows, or belongs to this request.
const MORE: u16 = 1;

/// Which rules a query is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowQuery {
    /// Table; 255 for all.
    pub table: u8,
    /// Rules with this output; [`PortNo::ANY`] for all.
    pub out_port: PortNo,
    /// Rules with this group only; [`GROUP_ANY`] for all.
    pub out_group: u32,
    /// Cookie bits, under the mask.
    pub cookie: u64,
    /// Which cookie bits count.
    pub cookie_mask: u64,
    /// Rules that this match covers.
    pub matches: Match,
}

impl Default for FlowQuery {
    fn default() -> Self {
        let (out_port, out_group) = (PortNo::ANY, GROUP_ANY);
        Self { table: 255, out_port, out_group, cookie: 0, cookie_mask: 0, matches: Match::any() }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Maker and names.
    Description,
    /// Rules with counters.
    Flows(FlowQuery),
    /// Sums over rules.
    Aggregate(FlowQuery),
    /// Counters per table.
    Tables,
    /// Counters of a port; [`PortNo::ANY`] for all.
    PortStats(PortNo),
    /// The ports.
    PortDesc,
    /// What tables can do, or, with a body, that they do something else.
    TableFeatures {
        /// Whether there is a body.
        set: bool,
    },
    /// Settings of tables.
    TableDesc,
    /// What the embedded switch has none of.
    Absent {
        /// Of what.
        kind: Absent,
        /// Port, group or meter; all ones for all, where one is asked for.
        of: u32,
        /// Queue of the port; all ones for all.
        queue: u32,
    },
}

/// What the embedded switch has none of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub enum Absent {
    QueueStats,
    QueueDesc,
    GroupStats,
    GroupDesc,
    GroupFeatures,
    MeterStats,
    MeterConfig,
    MeterFeatures,
}

impl Absent {
    const ALL: [Self; 8] = [
        Self::QueueStats,
        Self::QueueDesc,
        Self::GroupStats,
        Self::GroupDesc,
        Self::GroupFeatures,
        Self::MeterStats,
        Self::MeterConfig,
        Self::MeterFeatures,
    ];

    /// Its number, how many bytes say of which, and bytes of an answer that there is nothing.
    fn place(self) -> (u16, usize, usize) {
        match self {
            Self::QueueStats => (QUEUE_STATS, 8, 0),
            Self::QueueDesc => (QUEUE_DESC, 8, 0),
            Self::GroupStats => (GROUP_STATS, 8, 0),
            Self::GroupDesc => (GROUP_DESC, 0, 0),
            Self::GroupFeatures => (GROUP_FEATURES, 0, 40),
            Self::MeterStats => (METER_STATS, 8, 0),
            Self::MeterConfig => (METER_CONFIG, 8, 0),
            Self::MeterFeatures => (METER_FEATURES, 0, 16),
        }
    }

    fn of_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|absent| absent.place().0 == number)
    }
}

/// What a table can do: all tables of the embedded switch can do the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableFeatures {
    /// Which.
    pub table: u8,
    /// How many tables there are.
    pub tables: u8,
    /// Most rules.
    pub rules_max: u32,
}

/// Maker and names of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub struct Description {
    pub manufacturer: String,
    pub hardware: String,
    pub software: String,
    pub serial: String,
    pub datapath: String,
}

/// A rule with its counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowStats {
    /// Its identity.
    pub key: RuleKey,
    /// What it does.
    pub rule: Rule,
    /// Packets that matched.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// For how long it has been there.
    pub age: Duration,
    /// `OFPFF_*` bits that it was added with.
    pub flags: u16,
    /// What eviction would go by.
    pub importance: u16,
}

/// Sums over rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aggregate {
    /// Packets that matched.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Rules.
    pub flows: u32,
}

/// Counters of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Which.
    pub table: u8,
    /// Rules in it.
    pub active: u32,
    /// Packets that were looked up.
    pub lookups: u64,
    /// Packets that matched a rule.
    pub matched: u64,
}

/// Counters of a port, as seen from the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Which.
    pub port: PortNo,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets received and dropped at once.
    pub rx_dropped: u64,
    /// Packets that were to be sent and were not.
    pub tx_dropped: u64,
}

/// A port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortDesc {
    /// Its number.
    pub port: PortNo,
    /// Its name, at most 15 bytes on the wire.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether the link is up.
    pub up: bool,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the answer to the request of that name")]
pub enum Reply {
    Description(Box<Description>),
    Flows(Vec<FlowStats>),
    Aggregate(Aggregate),
    Tables(Vec<TableStats>),
    PortStats(Vec<PortStats>),
    PortDesc(Vec<PortDesc>),
    TableFeatures(Vec<TableFeatures>),
    TableDesc(Vec<u8>),
    Absent(Absent),
}

/// Splits an answer into messages that are short enough, each but the last saying that another follows.
#[must_use]
pub fn split_reply(reply: Reply) -> Vec<Message> {
    // The longest record that a switch of ours holds is a rule: below 48 + 160 + 200 bytes. 100 rules, or
    // 300 of anything else, are far below the longest message.
    const _: () = assert!(100 * 408 < MESSAGE_LEN_MAX && 300 * 112 < MESSAGE_LEN_MAX);
    let parts: Vec<Reply> = match reply {
        Reply::Flows(list) => split_flows(list),
        Reply::Tables(list) => chunks(&list, 300).map(Reply::Tables).collect(),
        Reply::PortStats(list) => chunks(&list, 300).map(Reply::PortStats).collect(),
        Reply::PortDesc(list) => chunks(&list, 300).map(Reply::PortDesc).collect(),
        // Tables are at most 255, with some 700 bytes for the features of each.
        Reply::TableFeatures(list) => chunks(&list, 80).map(Reply::TableFeatures).collect(),
        single @ (Reply::Description(_) | Reply::Aggregate(_) | Reply::TableDesc(_) | Reply::Absent(_)) => {
            vec![single]
        }
    };
    let last = parts.len() - 1;
    parts
        .into_iter()
        .enumerate()
        .map(|(i, reply)| Message::MultipartReply { reply, more: i < last })
        .collect()
}

/// Rules vary in length, so they are cut by bytes: actions are at most 32 bytes each.
fn split_flows(list: Vec<FlowStats>) -> Vec<Reply> {
    let mut parts = vec![Vec::new()];
    let mut room = MESSAGE_LEN_MAX - 64;
    for flow in list {
        let len = 256 + 32 * flow.rule.actions.len();
        if len > room {
            parts.push(Vec::new());
            room = MESSAGE_LEN_MAX - 64;
        }
        room = room.saturating_sub(len);
        if let Some(part) = parts.last_mut() {
            part.push(flow);
        }
    }
    parts.into_iter().map(Reply::Flows).collect()
}

/// Like `chunks`, with one empty chunk for an empty list.
fn chunks<T: Clone>(list: &[T], size: usize) -> impl Iterator<Item = Vec<T>> + '_ {
    let empty = list.is_empty().then(Vec::new);
    empty.into_iter().chain(list.chunks(size).map(<[T]>::to_vec))
}

pub(super) fn put_request(w: &mut Writer, request: &Request) {
    let kind = match request {
        Request::Description => DESC,
        Request::Flows(_) => FLOW,
        Request::Aggregate(_) => AGGREGATE,
        Request::Tables => TABLE,
        Request::PortStats(_) => PORT_STATS,
        Request::PortDesc => PORT_DESC,
        Request::TableFeatures { .. } => TABLE_FEATURES,
        Request::TableDesc => TABLE_DESC,
        Request::Absent { kind, .. } => kind.place().0,
    };
    w.u16(kind);
    w.zeros(6);
    match request {
        Request::Flows(query) | Request::Aggregate(query) => put_query(w, query),
        Request::PortStats(port) => {
            w.u32(port.0);
            w.zeros(4);
        }
        Request::Absent { kind, of, queue } if kind.place().1 > 0 => {
            w.u32(*of);
            w.u32(*queue);
        }
        // What it would be set to is not read.
        Request::TableFeatures { set: true } => w.zeros(features::EMPTY_LEN),
        Request::Description
        | Request::Tables
        | Request::PortDesc
        | Request::TableFeatures { set: false }
        | Request::TableDesc
        | Request::Absent { .. } => {}
    }
}

fn put_query(w: &mut Writer, query: &FlowQuery) {
    w.u8(query.table);
    w.zeros(3);
    w.u32(query.out_port.0);
    w.u32(query.out_group);
    w.zeros(4);
    w.u64(query.cookie);
    w.u64(query.cookie_mask);
    put_match(w, &query.matches);
}

pub(super) fn take_request(r: &mut Reader<'_>) -> Result<Request, DecodeError> {
    let kind = r.u16()?;
    let flags = r.u16()?;
    r.take(4)?;
    if flags & MORE != 0 {
        let (field, value) = ("flags of a multipart request", flags.into());
        return Err(DecodeError::Value { field, value, code: error::MULTIPART_OVERFLOW });
    }
    // Bits that are reserved are refused, and of the codes of bad requests this one is about such a request.
    if flags != 0 {
        let (field, value) = ("flags of a multipart request", flags.into());
        return Err(DecodeError::Value { field, value, code: error::BAD_MULTIPART });
    }
    let request = match kind {
        DESC => Request::Description,
        FLOW => Request::Flows(take_query(r)?),
        AGGREGATE => Request::Aggregate(take_query(r)?),
        TABLE => Request::Tables,
        PORT_STATS => {
            let port = PortNo(r.u32()?);
            r.take(4)?;
            Request::PortStats(port)
        }
        PORT_DESC => Request::PortDesc,
        TABLE_FEATURES => {
            let set = !r.is_empty();
            r.take(r.len())?;
            Request::TableFeatures { set }
        }
        TABLE_DESC => Request::TableDesc,
        other => take_absent(other, r)?,
    };
    if r.is_empty() { Ok(request) } else { Err(DecodeError::Trailing(r.len())) }
}

fn take_absent(number: u16, r: &mut Reader<'_>) -> Result<Request, DecodeError> {
    let kind = Absent::of_number(number).ok_or(Unsupported::Multipart(number))?;
    let (of, queue) = if kind.place().1 > 0 { (r.u32()?, r.u32()?) } else { (0, 0) };
    Ok(Request::Absent { kind, of, queue })
}

fn take_query(r: &mut Reader<'_>) -> Result<FlowQuery, DecodeError> {
    let table = r.u8()?;
    r.take(3)?;
    let (out_port, out_group) = (PortNo(r.u32()?), r.u32()?);
    r.take(4)?;
    let (cookie, cookie_mask) = (r.u64()?, r.u64()?);
    Ok(FlowQuery { table, out_port, out_group, cookie, cookie_mask, matches: take_match(r)? })
}

pub(super) fn put_reply(w: &mut Writer, reply: &Reply, more: bool) {
    let kind = match reply {
        Reply::Description(_) => DESC,
        Reply::Flows(_) => FLOW,
        Reply::Aggregate(_) => AGGREGATE,
        Reply::Tables(_) => TABLE,
        Reply::PortStats(_) => PORT_STATS,
        Reply::PortDesc(_) => PORT_DESC,
        Reply::TableFeatures(_) => TABLE_FEATURES,
        Reply::TableDesc(_) => TABLE_DESC,
        Reply::Absent(kind) => kind.place().0,
    };
    w.u16(kind);
    w.u16(if more { MORE } else { 0 });
    w.zeros(4);
    match reply {
        Reply::Description(description) => put_description(w, description),
        Reply::Flows(list) => list.iter().for_each(|flow| put_flow(w, flow)),
        Reply::Aggregate(sum) => {
            w.u64(sum.packets);
            w.u64(sum.bytes);
            w.u32(sum.flows);
            w.zeros(4);
        }
        Reply::Tables(list) => list.iter().for_each(|table| put_table(w, table)),
        Reply::PortStats(list) => list.iter().for_each(|port| put_port_stats(w, port)),
        Reply::PortDesc(list) => list.iter().for_each(|port| put_port_desc(w, port)),
        Reply::TableFeatures(list) => list.iter().for_each(|table| features::put(w, table)),
        Reply::TableDesc(list) => list.iter().for_each(|table| put_table_desc(w, *table)),
        Reply::Absent(kind) => w.zeros(kind.place().2),
    }
}

/// A text in a field of fixed size that ends with a zero byte.
fn put_text(w: &mut Writer, text: &str, size: usize) {
    let len = text.floor_char_boundary(size - 1);
    w.bytes(&text.as_bytes()[..len]);
    w.zeros(size - len);
}

fn take_text(r: &mut Reader<'_>, size: usize) -> Result<String, DecodeError> {
    let bytes = r.take(size)?;
    let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(size);
    Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

fn put_description(w: &mut Writer, description: &Description) {
    put_text(w, &description.manufacturer, 256);
    put_text(w, &description.hardware, 256);
    put_text(w, &description.software, 256);
    put_text(w, &description.serial, 32);
    put_text(w, &description.datapath, 256);
}

fn put_flow(w: &mut Writer, flow: &FlowStats) {
    let start = w.len();
    w.u16(0);
    w.u8(flow.key.table);
    w.zeros(1);
    w.u32(u32::try_from(flow.age.as_secs()).unwrap_or(u32::MAX));
    w.u32(flow.age.subsec_nanos());
    w.u16(flow.key.priority);
    // Neither timeout.
    w.zeros(2 + 2);
    w.u16(flow.flags);
    w.u16(flow.importance);
    w.zeros(2);
    w.u64(flow.rule.cookie);
    w.u64(flow.packets);
    w.u64(flow.bytes);
    put_match(w, &flow.key.matches);
    put_instructions(w, &flow.rule);
    let len = w.len() - start;
    w.set_u16(start, len);
}

fn put_table(w: &mut Writer, table: &TableStats) {
    w.u8(table.table);
    w.zeros(3);
    w.u32(table.active);
    w.u64(table.lookups);
    w.u64(table.matched);
}

/// No setting is other than it was.
fn put_table_desc(w: &mut Writer, table: u8) {
    w.u16(8);
    w.u8(table);
    w.zeros(1 + 4);
}

fn put_port_stats(w: &mut Writer, port: &PortStats) {
    w.u16(80);
    w.zeros(2);
    w.u32(port.port.0);
    w.zeros(8);
    for counter in
        [port.rx_packets, port.tx_packets, port.rx_bytes, port.tx_bytes, port.rx_dropped, port.tx_dropped]
    {
        w.u64(counter);
    }
    w.zeros(16);
}

fn put_port_desc(w: &mut Writer, port: &PortDesc) {
    w.u32(port.port.0);
    w.u16(40);
    w.zeros(2);
    w.bytes(&port.mac);
    w.zeros(2);
    put_text(w, &port.name, 16);
    w.u32(0);
    w.u32(u32::from(!port.up));
}

pub(super) fn take_reply(r: &mut Reader<'_>) -> Result<Message, DecodeError> {
    let kind = r.u16()?;
    let more = r.u16()? & MORE != 0;
    r.take(4)?;
    let reply = match kind {
        DESC => Reply::Description(Box::new(take_description(r)?)),
        FLOW => Reply::Flows(take_all(r, take_flow)?),
        AGGREGATE => Reply::Aggregate(Aggregate { packets: r.u64()?, bytes: r.u64()?, flows: r.u32()? }),
        TABLE => Reply::Tables(take_all(r, take_table)?),
        PORT_STATS => Reply::PortStats(take_all(r, take_port_stats)?),
        PORT_DESC => Reply::PortDesc(take_all(r, take_port_desc)?),
        other => return Err(Unsupported::Multipart(other).into()),
    };
    Ok(Message::MultipartReply { reply, more })
}

fn take_all<T>(
    r: &mut Reader<'_>,
    take: impl Fn(&mut Reader<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let mut list = Vec::new();
    while !r.is_empty() {
        list.push(take(r)?);
    }
    Ok(list)
}

fn take_description(r: &mut Reader<'_>) -> Result<Description, DecodeError> {
    Ok(Description {
        manufacturer: take_text(r, 256)?,
        hardware: take_text(r, 256)?,
        software: take_text(r, 256)?,
        serial: take_text(r, 32)?,
        datapath: take_text(r, 256)?,
    })
}

fn take_flow(r: &mut Reader<'_>) -> Result<FlowStats, DecodeError> {
    let len = usize::from(r.u16()?);
    let mut r = r.sub(len.checked_sub(2).ok_or(DecodeError::RecordLength(len))?)?;
    let table = r.u8()?;
    r.take(1)?;
    let (seconds, nanos, priority) = (r.u32()?, r.u32()?, r.u16()?);
    r.take(2 + 2)?;
    let (flags, importance) = (r.u16()?, r.u16()?);
    r.take(2)?;
    let (cookie, packets, bytes) = (r.u64()?, r.u64()?, r.u64()?);
    let matches = take_match(&mut r)?;
    let (actions, goto) = take_instructions(r)?;
    let key = RuleKey { table, priority, matches };
    let rule = Rule { cookie, actions, goto };
    // Whatever the switch says, a part of a second is less than one.
    let age = Duration::new(seconds.into(), nanos.min(999_999_999));
    Ok(FlowStats { key, rule, packets, bytes, age, flags, importance })
}

fn take_table(r: &mut Reader<'_>) -> Result<TableStats, DecodeError> {
    let table = r.u8()?;
    r.take(3)?;
    Ok(TableStats { table, active: r.u32()?, lookups: r.u64()?, matched: r.u64()? })
}

fn take_port_stats(r: &mut Reader<'_>) -> Result<PortStats, DecodeError> {
    let len = usize::from(r.u16()?);
    let mut r = r.sub(len.checked_sub(2).ok_or(DecodeError::RecordLength(len))?)?;
    r.take(2)?;
    let port = PortNo(r.u32()?);
    r.take(8)?;
    Ok(PortStats {
        port,
        rx_packets: r.u64()?,
        tx_packets: r.u64()?,
        rx_bytes: r.u64()?,
        tx_bytes: r.u64()?,
        rx_dropped: r.u64()?,
        tx_dropped: r.u64()?,
    })
}

fn take_port_desc(r: &mut Reader<'_>) -> Result<PortDesc, DecodeError> {
    let port = PortNo(r.u32()?);
    let len = usize::from(r.u16()?);
    let mut r = r.sub(len.checked_sub(6).ok_or(DecodeError::RecordLength(len))?)?;
    r.take(2)?;
    let mut mac = [0; 6];
    mac.copy_from_slice(r.take(6)?);
    r.take(2)?;
    let name = take_text(&mut r, 16)?;
    r.take(4)?;
    let up = r.u32()? & 1 == 0;
    Ok(PortDesc { port, name, mac, up })
}
