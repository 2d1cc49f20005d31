//! The columnar record codec: a chunk of flow records as sorted, delta-coded columns under zstd.
//!
//! A chunk is a fixed header (see [`HEADER_LEN`]), then one zstd frame. The header states the schema, whose
//! flows these are, how many, and how large the columns are when decompressed; the last four bytes of the header
//! are a CRC-32C of everything else. Inside the frame each column is a varint length and its bytes.
//!
//! What makes it small: records are sorted by client, protocol and port, so those columns are small deltas; remote
//! endpoints become ranks in a dictionary sorted by use; an outside port is stored as its distance from the place where
//! the service's keyed hash tries first ([`NatSlices::preferred_offset`]), which is nearly always 0; byte counts are
//! stored beside what their packet counts predict; 16-bit values are split into planes of high and low bytes.
//!
//! [`NatSlices::preferred_offset`]: flow::nat::NatSlices::preferred_offset

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flow::nat::NatSlices;
use flow::{
    Batch, Endpoint, Epoch, Family, Fixed, FlowKey, FlowRecord, GroupId, Joinable, Prefix, Protocol,
    ServiceId, SiteId, TcpState,
};

use crate::columns::{Reader, put_signed, put_varint, split_planes};

/// The schema that this version writes.
pub const SCHEMA: u16 = 1;
/// The oldest schema that this version reads.
pub const SCHEMA_MIN: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 56;
/// Most records, upserts and removals together, in one chunk.
pub const RECORDS_MAX: usize = 65_536;
/// Most bytes of one chunk on the wire.
pub const CHUNK_LEN_MAX: usize = 8 << 20;
/// Most bytes that one record's columns may take when decompressed. The largest legal record needs 100.
const RECORD_LEN_MAX: usize = 160;
/// Room for the columns' lengths.
const COLUMNS_OVERHEAD: usize = 1_024;
const MAGIC: [u8; 4] = *b"LMSC";
/// Level 3 is the knee: level 9 saves 2 % more at a fifth of the speed.
const ZSTD_LEVEL: i32 = 3;

/// What a chunk says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whose flows these are.
    pub group: GroupId,
    /// The epoch that they move to.
    pub epoch: Epoch,
    /// The chunk's number in its session.
    pub sequence: u64,
}

/// Why bytes are not a chunk. The peer is at fault; ask for the chunk again, and after three failures give up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Fewer bytes than a header, or than the header says.
    #[error("chunk of {have} bytes ends before byte {need}")]
    Truncated {
        /// Bytes present.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// Not a chunk at all.
    #[error("chunk does not start with {MAGIC:?}")]
    Magic,
    /// Written by a version that is too new or too old.
    #[error("chunk has schema {theirs}; this version reads {SCHEMA_MIN} to {SCHEMA}")]
    Schema {
        /// The chunk's schema.
        theirs: u16,
    },
    /// A bit was flipped on the way.
    #[error("chunk checksum is {computed:08x}, header says {stated:08x}")]
    Checksum {
        /// In the header.
        stated: u32,
        /// Over the bytes.
        computed: u32,
    },
    /// More than the limits allow; nothing was allocated for it.
    #[error("{what} is {value}, at most {max} is allowed")]
    TooLarge {
        /// Which count.
        what: &'static str,
        /// Stated.
        value: usize,
        /// Limit.
        max: usize,
    },
    /// A value that no encoder writes.
    #[error("column {column} is malformed")]
    Column {
        /// Its name.
        column: &'static str,
    },
    /// zstd refused the frame.
    #[error("chunk does not decompress to the {stated} bytes that its header states")]
    Compression {
        /// In the header.
        stated: usize,
    },
}

/// Encodes chunks; keeps its buffers from chunk to chunk.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    columns: Vec<u8>,
}

/// Decodes chunks; keeps its buffers from chunk to chunk.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Encoder {
    /// An encoder.
    ///
    /// # Errors
    /// When zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, columns: Vec::new() })
    }

    /// Encodes a batch, which gets sorted on the way. `slices` predicts outside ports and must be the same on
    /// the other side; the token's digest covers the ports, so a difference cannot go unnoticed.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`] for more than [`RECORDS_MAX`] records.
    pub fn encode(
        &mut self,
        header: &ChunkHeader,
        batch: &mut Batch,
        slices: Option<&NatSlices>,
    ) -> Result<Vec<u8>, CodecError> {
        at_most("records", batch.len(), RECORDS_MAX)?;
        batch.upserts.sort_unstable_by_key(|record| record.key);
        batch.removals.sort_unstable();
        self.columns.clear();
        write_columns(&mut self.columns, header.group.prefix, batch, slices);
        let body = self
            .zstd
            .compress(&self.columns)
            .map_err(|_| CodecError::Compression { stated: self.columns.len() })?;
        Ok(assemble(header, batch, self.columns.len(), &body))
    }

    /// Bytes of the last chunk's columns before compression.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.columns.len()
    }
}

impl Decoder {
    /// A decoder.
    ///
    /// # Errors
    /// When zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()? })
    }

    /// Decodes one chunk. Never panics; allocates no more than the limits allow.
    ///
    /// # Errors
    /// A [`CodecError`] that says what is wrong.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        slices: Option<&NatSlices>,
    ) -> Result<(ChunkHeader, Batch), CodecError> {
        let parsed = parse_header(bytes)?;
        let columns = self
            .zstd
            .decompress(&bytes[HEADER_LEN..], parsed.raw_len)
            .ok()
            .filter(|columns| columns.len() == parsed.raw_len)
            .ok_or(CodecError::Compression { stated: parsed.raw_len })?;
        let mut reader = Reader::new(&columns);
        let batch = read_columns(&mut reader, &parsed, slices)?;
        Ok((parsed.header, batch))
    }
}

struct Parsed {
    header: ChunkHeader,
    upserts: usize,
    removals: usize,
    raw_len: usize,
}

fn at_most(what: &'static str, value: usize, max: usize) -> Result<(), CodecError> {
    if value > max { Err(CodecError::TooLarge { what, value, max }) } else { Ok(()) }
}

/// Header: magic 4, schema 2, service 1, family 1, prefix length 1, 3 zero, address 16, epoch 8, sequence 8,
/// upserts 2+, removals 2+ (as `u16` would not hold 65,536, both are `u16` beside a carry), raw length 4, CRC 4.
fn assemble(header: &ChunkHeader, batch: &Batch, raw_len: usize, body: &[u8]) -> Vec<u8> {
    let prefix = header.group.prefix;
    let mut out = Vec::with_capacity(HEADER_LEN + body.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&SCHEMA.to_le_bytes());
    out.push(header.group.service.get());
    out.push(if prefix.family() == Family::V4 { 4 } else { 6 });
    out.push(prefix.len());
    for count in [batch.upserts.len(), batch.removals.len()] {
        out.extend_from_slice(&u32_of(count).to_le_bytes()[..3]);
    }
    out.push(0);
    out.extend_from_slice(&address_bits(prefix.address()).to_le_bytes());
    out.extend_from_slice(&header.epoch.0.to_le_bytes());
    out.extend_from_slice(&header.sequence.to_le_bytes());
    out.extend_from_slice(&u32_of(raw_len).to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&out), body);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(body);
    out
}

fn u32_of(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn count_at(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) | usize::from(bytes[at + 1]) << 8 | usize::from(bytes[at + 2]) << 16
}

fn parse_header(bytes: &[u8]) -> Result<Parsed, CodecError> {
    if bytes.len() < HEADER_LEN {
        return Err(CodecError::Truncated { have: bytes.len(), need: HEADER_LEN });
    }
    at_most("chunk bytes", bytes.len(), CHUNK_LEN_MAX)?;
    if bytes[..4] != MAGIC {
        return Err(CodecError::Magic);
    }
    let theirs = u16::from_le_bytes(field(bytes, 4));
    if !(SCHEMA_MIN..=SCHEMA).contains(&theirs) {
        return Err(CodecError::Schema { theirs });
    }
    let stated = u32::from_le_bytes(field(bytes, HEADER_LEN - 4));
    let computed = crc32c::crc32c_append(crc32c::crc32c(&bytes[..HEADER_LEN - 4]), &bytes[HEADER_LEN..]);
    if stated != computed {
        return Err(CodecError::Checksum { stated, computed });
    }
    let service = ServiceId::new(bytes[6]).map_err(|_| CodecError::Column { column: "service" })?;
    let prefix = prefix_of(bytes[7], u128::from_le_bytes(field(bytes, 16)), bytes[8])?;
    let (upserts, removals) = (count_at(bytes, 9), count_at(bytes, 12));
    at_most("records", upserts + removals, RECORDS_MAX)?;
    let raw_len = u32::from_le_bytes(field(bytes, 48)) as usize;
    at_most("decompressed bytes", raw_len, (upserts + removals) * RECORD_LEN_MAX + COLUMNS_OVERHEAD)?;
    let header = ChunkHeader {
        group: GroupId { service, prefix },
        epoch: Epoch(u64::from_le_bytes(field(bytes, 32))),
        sequence: u64::from_le_bytes(field(bytes, 40)),
    };
    Ok(Parsed { header, upserts, removals, raw_len })
}

fn prefix_of(family: u8, bits: u128, len: u8) -> Result<Prefix, CodecError> {
    let malformed = CodecError::Column { column: "prefix" };
    let address = match family {
        4 => address_from(Family::V4, bits),
        6 => address_from(Family::V6, bits),
        _ => None,
    };
    address.and_then(|address| Prefix::new(address, len).ok()).ok_or(malformed)
}

fn address_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn address_from(family: Family, bits: u128) -> Option<IpAddr> {
    match family {
        Family::V4 => Some(IpAddr::V4(Ipv4Addr::from(u32::try_from(bits).ok()?))),
        Family::V6 => Some(IpAddr::V6(Ipv6Addr::from(bits))),
    }
}

/// Remote endpoints in the order of how often they occur, and the rank of each.
struct Remotes {
    order: Vec<Endpoint>,
    ranks: HashMap<Endpoint, usize>,
}

impl Remotes {
    fn of<'a>(keys: impl Iterator<Item = &'a FlowKey>) -> Self {
        let mut counts: HashMap<Endpoint, u32> = HashMap::new();
        for key in keys {
            *counts.entry(key.remote).or_default() += 1;
        }
        let mut order: Vec<_> = counts.into_iter().collect();
        // Frequent ones get small ranks, and one class of frequency is sorted by address for small deltas.
        order.sort_unstable_by_key(|&(remote, count)| (u32::MAX - count, remote));
        let order: Vec<_> = order.into_iter().map(|(remote, _)| remote).collect();
        let ranks = order.iter().enumerate().map(|(rank, &remote)| (remote, rank)).collect();
        Self { order, ranks }
    }
}

fn write_columns(out: &mut Vec<u8>, group: Prefix, batch: &Batch, slices: Option<&NatSlices>) {
    let keys = || batch.upserts.iter().map(|r| &r.key).chain(batch.removals.iter().map(|(key, _)| key));
    let remotes = Remotes::of(keys());
    write_remotes(out, &remotes.order);
    write_keys(out, group, keys(), &remotes);
    let versions =
        batch.upserts.iter().map(|r| r.version).chain(batch.removals.iter().map(|&(_, version)| version));
    column(out, |c| versions.for_each(|version| put_varint(c, version.into())));
    write_values(out, &batch.upserts, slices);
}

fn column(out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = Vec::new();
    fill(&mut bytes);
    put_varint(out, bytes.len() as u128);
    out.append(&mut bytes);
}

fn write_remotes(out: &mut Vec<u8>, order: &[Endpoint]) {
    put_varint(out, order.len() as u128);
    column(out, |c| c.extend(order.iter().map(|remote| u8::from(remote.address.is_ipv6()))));
    column(out, |c| {
        let mut last = 0u128;
        for remote in order {
            let bits = address_bits(remote.address);
            put_signed(c, last, bits);
            last = bits;
        }
    });
    column(out, |c| split_planes(c, order.iter().map(|remote| remote.port)));
}

fn write_keys<'a>(
    out: &mut Vec<u8>,
    group: Prefix,
    keys: impl Iterator<Item = &'a FlowKey> + Clone,
    remotes: &Remotes,
) {
    let base = address_bits(group.address());
    column(out, |c| {
        let mut last = base;
        for key in keys.clone() {
            let bits = address_bits(key.client.address);
            put_signed(c, last, bits);
            last = bits;
        }
    });
    column(out, |c| c.extend(keys.clone().map(|key| key.protocol.number())));
    // Within one client and protocol ports ascend, so their differences are small; 0 starts anew.
    column(out, |c| {
        let mut last: Option<&FlowKey> = None;
        let deltas = keys.clone().map(|key| {
            let base = last.filter(|l| same_run(l, key)).map_or(0, |l| l.client.port);
            last = Some(key);
            key.client.port.wrapping_sub(base)
        });
        split_planes(c, deltas);
    });
    column(out, |c| {
        let ranks = keys.clone().map(|key| remotes.ranks.get(&key.remote).copied().unwrap_or(0));
        #[expect(clippy::cast_possible_truncation, reason = "at most 65,536 records, so ranks fit 16 bits")]
        split_planes(c, ranks.map(|rank| rank as u16));
    });
}

fn same_run(a: &FlowKey, b: &FlowKey) -> bool {
    a.protocol == b.protocol && a.client.address == b.client.address
}

fn write_values(out: &mut Vec<u8>, records: &[FlowRecord], slices: Option<&NatSlices>) {
    column(out, |c| {
        split_planes(
            c,
            records.iter().map(|r| {
                let Fixed::Nat44 { outside_port } = r.fixed;
                outside_port.wrapping_sub(predicted_port(&r.key, slices))
            }),
        );
    });
    column(out, |c| c.extend(records.iter().map(|r| r.joined.tcp as u8)));
    column(out, |c| c.extend(records.iter().map(|r| r.joined.ingress.0)));
    column(out, |c| records.iter().for_each(|r| put_varint(c, r.joined.remaining_s.into())));
    column(out, |c| records.iter().for_each(|r| put_varint(c, r.joined.packets_out.into())));
    column(out, |c| {
        records.iter().for_each(|r| put_signed(c, r.joined.packets_out.into(), r.joined.packets_in.into()))
    });
    let counts = |count: fn(&Joinable) -> (u64, u64)| {
        let mut sizes = PacketSizes::default();
        records.iter().map(move |r| {
            let (packets, bytes) = count(&r.joined);
            (sizes.predict_then_learn(&r.key, packets, |_| Some(bytes)).unwrap_or((0, 0)), bytes)
        })
    };
    column(out, |c| {
        counts(|j| (j.packets_out, j.bytes_out)).for_each(|((p, _), b)| put_signed(c, p.into(), b.into()))
    });
    column(out, |c| {
        counts(|j| (j.packets_in, j.bytes_in)).for_each(|((p, _), b)| put_signed(c, p.into(), b.into()))
    });
}

/// Predicts a flow's bytes from its packets and the mean packet size of such flows so far. Both sides
/// learn from the same records in the same order, so they predict the same.
#[derive(Default)]
struct PacketSizes {
    seen: HashMap<(Protocol, u16), (u64, u64)>,
}

impl PacketSizes {
    /// The prediction, and the bytes that `actual` makes of it, which are then learned.
    fn predict_then_learn(
        &mut self,
        key: &FlowKey,
        packets: u64,
        actual: impl FnOnce(u64) -> Option<u64>,
    ) -> Option<(u64, u64)> {
        let (bytes_seen, packets_seen) = self.seen.entry((key.protocol, key.remote.port)).or_default();
        let mean = bytes_seen.checked_div(*packets_seen).unwrap_or(0);
        let predicted = packets.saturating_mul(mean);
        let bytes = actual(predicted)?;
        *bytes_seen = bytes_seen.saturating_add(bytes);
        *packets_seen = packets_seen.saturating_add(packets);
        Some((predicted, bytes))
    }
}

fn predicted_port(key: &FlowKey, slices: Option<&NatSlices>) -> u16 {
    let (Some(slices), IpAddr::V4(client)) = (slices, key.client.address) else { return 0 };
    let Some(subscriber) = slices.subscriber(client) else { return 0 };
    let first = slices.block(subscriber).map_or(0, |block| block.first);
    first.wrapping_add(slices.preferred_offset(subscriber, key.protocol, key.client.port))
}

fn read_columns(
    reader: &mut Reader<'_>,
    parsed: &Parsed,
    slices: Option<&NatSlices>,
) -> Result<Batch, CodecError> {
    let total = parsed.upserts + parsed.removals;
    let remotes = read_remotes(reader, total)?;
    let keys = read_keys(reader, parsed.header.group.prefix, total, &remotes)?;
    let versions = read_numbers(reader, "version", total)?;
    let values = read_values(reader, &keys[..parsed.upserts], slices)?;
    if !reader.is_empty() {
        return Err(CodecError::Column { column: "end" });
    }
    let upserts = keys
        .iter()
        .zip(&versions)
        .zip(values)
        .map(|((&key, &version), (fixed, joined))| FlowRecord { key, fixed, joined, version })
        .collect();
    let removals = keys.into_iter().zip(versions).skip(parsed.upserts).collect();
    Ok(Batch { upserts, removals })
}

fn read_remotes(reader: &mut Reader<'_>, total: usize) -> Result<Vec<Endpoint>, CodecError> {
    let error = CodecError::Column { column: "remote" };
    let count = reader
        .varint()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or(CodecError::Column { column: "remote" })?;
    at_most("remote endpoints", count, total)?;
    let families =
        reader.column().filter(|c| c.len() == count).ok_or(CodecError::Column { column: "family" })?;
    let mut addresses = reader.column().map(Reader::new).ok_or(CodecError::Column { column: "remote" })?;
    let ports =
        reader.column().filter(|c| c.len() == 2 * count).ok_or(CodecError::Column { column: "port" })?;
    let mut last = 0u128;
    let mut remotes = Vec::with_capacity(count);
    for (i, &family) in families.iter().enumerate() {
        last = addresses.signed(last).ok_or(CodecError::Column { column: "remote" })?;
        let family = if family == 0 { Family::V4 } else { Family::V6 };
        let address = address_from(family, last).ok_or(CodecError::Column { column: "remote" })?;
        remotes.push(Endpoint { address, port: plane(ports, i) });
    }
    if addresses.is_empty() { Ok(remotes) } else { Err(error) }
}

fn plane(planes: &[u8], i: usize) -> u16 {
    u16::from_be_bytes([planes[i], planes[planes.len() / 2 + i]])
}

fn read_keys(
    reader: &mut Reader<'_>,
    group: Prefix,
    total: usize,
    remotes: &[Endpoint],
) -> Result<Vec<FlowKey>, CodecError> {
    let mut clients = reader.column().map(Reader::new).ok_or(CodecError::Column { column: "client" })?;
    let protocols =
        reader.column().filter(|c| c.len() == total).ok_or(CodecError::Column { column: "protocol" })?;
    let ports = reader
        .column()
        .filter(|c| c.len() == 2 * total)
        .ok_or(CodecError::Column { column: "client port" })?;
    let ranks =
        reader.column().filter(|c| c.len() == 2 * total).ok_or(CodecError::Column { column: "remote" })?;
    let mut keys: Vec<FlowKey> = Vec::with_capacity(total);
    let mut bits = address_bits(group.address());
    for (i, &protocol) in protocols.iter().enumerate() {
        bits = clients.signed(bits).ok_or(CodecError::Column { column: "client" })?;
        let address = address_from(group.family(), bits).ok_or(CodecError::Column { column: "client" })?;
        let protocol = Protocol::from_number(protocol).ok_or(CodecError::Column { column: "protocol" })?;
        let remote =
            *remotes.get(usize::from(plane(ranks, i))).ok_or(CodecError::Column { column: "remote" })?;
        let mut key = FlowKey { protocol, client: Endpoint { address, port: plane(ports, i) }, remote };
        if let Some(last) = keys.last().filter(|last| same_run(last, &key)) {
            key.client.port = key.client.port.wrapping_add(last.client.port);
        }
        keys.push(key);
    }
    if clients.is_empty() { Ok(keys) } else { Err(CodecError::Column { column: "client" }) }
}

fn read_numbers(reader: &mut Reader<'_>, column: &'static str, count: usize) -> Result<Vec<u32>, CodecError> {
    let mut numbers = reader.column().map(Reader::new).ok_or(CodecError::Column { column })?;
    let read: Option<Vec<u32>> =
        (0..count).map(|_| numbers.varint().and_then(|n| u32::try_from(n).ok())).collect();
    read.filter(|_| numbers.is_empty()).ok_or(CodecError::Column { column })
}

fn read_values(
    reader: &mut Reader<'_>,
    keys: &[FlowKey],
    slices: Option<&NatSlices>,
) -> Result<Vec<(Fixed, Joinable)>, CodecError> {
    let count = keys.len();
    let ports = reader
        .column()
        .filter(|c| c.len() == 2 * count)
        .ok_or(CodecError::Column { column: "outside port" })?;
    let tcp = reader.column().filter(|c| c.len() == count).ok_or(CodecError::Column { column: "tcp" })?;
    let ingress =
        reader.column().filter(|c| c.len() == count).ok_or(CodecError::Column { column: "ingress" })?;
    let remaining = read_numbers(reader, "remaining", count)?;
    let mut counters = Vec::with_capacity(4);
    for _ in 0..4 {
        counters.push(reader.column().map(Reader::new).ok_or(CodecError::Column { column: "counters" })?);
    }
    let mut sizes = (PacketSizes::default(), PacketSizes::default());
    let mut values = Vec::with_capacity(count);
    for (i, key) in keys.iter().enumerate() {
        let outside_port = plane(ports, i).wrapping_add(predicted_port(key, slices));
        let joined = Joinable {
            remaining_s: remaining[i],
            tcp: TcpState::from_number(tcp[i]).ok_or(CodecError::Column { column: "tcp" })?,
            ingress: SiteId(ingress[i]),
            ..read_counters(&mut counters, key, &mut sizes)
                .ok_or(CodecError::Column { column: "counters" })?
        };
        values.push((Fixed::Nat44 { outside_port }, joined));
    }
    if counters.iter().all(Reader::is_empty) {
        Ok(values)
    } else {
        Err(CodecError::Column { column: "counters" })
    }
}

/// The four counters of a record; the other fields stay at their default.
fn read_counters(
    counters: &mut [Reader<'_>],
    key: &FlowKey,
    sizes: &mut (PacketSizes, PacketSizes),
) -> Option<Joinable> {
    let [packets_out, packets_in, bytes_out, bytes_in] = counters else { return None };
    let out = u64::try_from(packets_out.varint()?).ok()?;
    let back = u64::try_from(packets_in.signed(out.into())?).ok()?;
    let bytes = |reader: &mut Reader<'_>, sizes: &mut PacketSizes, packets| {
        let read = |predicted: u64| u64::try_from(reader.signed(predicted.into())?).ok();
        Some(sizes.predict_then_learn(key, packets, read)?.1)
    };
    Some(Joinable {
        packets_out: out,
        packets_in: back,
        bytes_out: bytes(bytes_out, &mut sizes.0, out)?,
        bytes_in: bytes(bytes_in, &mut sizes.1, back)?,
        ..Joinable::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(group: &str) -> ChunkHeader {
        ChunkHeader { group: group.parse().unwrap(), epoch: Epoch(7), sequence: 3 }
    }

    fn sample(count: usize) -> (NatSlices, Batch) {
        let slices = flow::sample::service(u32::try_from(count / 40 + 1).unwrap()).unwrap();
        let upserts = flow::sample::flows(&slices, count, 1);
        let removals = upserts.iter().step_by(7).map(|r| (r.key, r.version + 1)).collect();
        (slices, Batch { upserts, removals })
    }

    fn encode(batch: &mut Batch, slices: &NatSlices) -> Vec<u8> {
        Encoder::new().unwrap().encode(&header("1:100.64.0.0/16"), batch, Some(slices)).unwrap()
    }

    #[test]
    fn a_table_of_10_000_flows_is_below_11_bytes_a_flow() {
        let (slices, mut batch) = sample(10_000);
        batch.removals.clear();
        let bytes = encode(&mut batch, &slices).len();
        assert!(bytes < 110_000, "{bytes} bytes for 10,000 flows");
    }

    #[test]
    fn another_schema_is_refused_with_both_versions_named() {
        let (slices, mut batch) = sample(10);
        let mut bytes = encode(&mut batch, &slices);
        bytes[4] = 9;
        let error = Decoder::new().unwrap().decode(&bytes, Some(&slices)).unwrap_err();
        assert_eq!(error.to_string(), "chunk has schema 9; this version reads 1 to 1");
    }

    #[test]
    fn a_stated_size_beyond_the_bound_is_refused_before_anything_is_allocated() {
        let (slices, mut batch) = sample(10);
        let mut bytes = encode(&mut batch, &slices);
        bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..52]), &bytes[56..]);
        bytes[52..56].copy_from_slice(&checksum.to_le_bytes());
        let error = Decoder::new().unwrap().decode(&bytes, Some(&slices)).unwrap_err();
        assert!(matches!(error, CodecError::TooLarge { what: "decompressed bytes", .. }), "{error}");
    }

    #[test]
    fn more_records_than_a_chunk_holds_are_refused() {
        let (slices, batch) = sample(1);
        let mut batch = Batch { upserts: vec![batch.upserts[0]; RECORDS_MAX + 1], removals: Vec::new() };
        let error = Encoder::new().unwrap().encode(&header("1:100.64.0.0/16"), &mut batch, Some(&slices));
        assert!(matches!(error, Err(CodecError::TooLarge { what: "records", .. })));
    }

    #[test]
    fn the_largest_values_of_every_field_fit_the_bound() {
        let endpoint =
            Endpoint { address: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(), port: 65_535 };
        let other = Endpoint { address: "::1".parse().unwrap(), port: 1 };
        let record = |client, remote| FlowRecord {
            key: FlowKey { protocol: Protocol::Icmp6, client, remote },
            fixed: Fixed::Nat44 { outside_port: 65_535 },
            joined: Joinable {
                packets_out: u64::MAX,
                packets_in: 0,
                bytes_out: u64::MAX,
                bytes_in: u64::MAX,
                remaining_s: u32::MAX,
                tcp: TcpState::Transitory,
                ingress: SiteId(255),
            },
            version: u32::MAX,
        };
        let mut batch = Batch {
            upserts: vec![record(other, endpoint), record(endpoint, other)],
            removals: vec![(record(endpoint, endpoint).key, u32::MAX)],
        };
        let bytes = Encoder::new().unwrap().encode(&header("1:::/0"), &mut batch, None).unwrap();
        assert_eq!(Decoder::new().unwrap().decode(&bytes, None).unwrap().1, batch);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_encoded_decodes_to_the_same(count in 0usize..600, seed: u64, with_slices: bool) {
            let slices = flow::sample::service(64).unwrap();
            let upserts = flow::sample::flows(&slices, count, seed);
            let removals = flow::sample::flows(&slices, count / 3, !seed).iter().map(|r| (r.key, 5)).collect();
            let mut batch = Batch { upserts, removals };
            let slices = with_slices.then_some(&slices);
            let bytes = Encoder::new().unwrap().encode(&header("1:100.64.0.0/16"), &mut batch, slices).unwrap();
            let (read, decoded) = Decoder::new().unwrap().decode(&bytes, slices).unwrap();
            prop_assert_eq!(read, header("1:100.64.0.0/16"));
            prop_assert_eq!(decoded, batch);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>, at in 0usize..2000, value: u8, fix_checksum: bool) {
            let mut decoder = Decoder::new().unwrap();
            prop_assert!(decoder.decode(&bytes, None).is_err());
            let (slices, mut batch) = sample(50);
            let mut good = encode(&mut batch, &slices);
            let at = at % good.len();
            good[at] ^= value;
            if fix_checksum {
                let checksum = crc32c::crc32c_append(crc32c::crc32c(&good[..52]), &good[56..]);
                good[52..56].copy_from_slice(&checksum.to_le_bytes());
            }
            let result = decoder.decode(&good, Some(&slices));
            prop_assert!(fix_checksum || value == 0 || result.is_err());
        }

        #[test]
        fn hostile_columns_under_a_good_header_never_panic(columns in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (_, batch) = sample(8);
            let body = zstd::bulk::compress(&columns, 1).unwrap();
            let bytes = assemble(&header("1:100.64.0.0/16"), &batch, columns.len(), &body);
            let _ = Decoder::new().unwrap().decode(&bytes, None);
        }
    }
}
