//! Messages about what a switch may have beside rules: groups, meters, settings of ports, tables and connections.

use super::error::{self, Code};
use super::wire::{Reader, Writer};
use super::{DecodeError, PortNo};

/// Commands of group and meter mods.
pub(crate) const ADD: u16 = 0;
pub(crate) const MODIFY: u16 = 1;
pub(crate) const DELETE: u16 = 2;

/// A change of groups, without its buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMod {
    /// 0 to add, 1 to modify, 2 to delete.
    pub command: u16,
    /// Which.
    pub group: u32,
}

/// A change of meters, without its bands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeterMod {
    /// 0 to add, 1 to modify, 2 to delete.
    pub command: u16,
    /// Which.
    pub meter: u32,
}

/// A change of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMod {
    /// Which.
    pub port: PortNo,
    /// Its hardware address, as a check.
    pub mac: [u8; 6],
    /// `OFPPC_*` bits.
    pub config: u32,
    /// Those of them that are to be set.
    pub mask: u32,
    /// What it is to advertise.
    pub advertise: u32,
}

/// A change of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableMod {
    /// Which; 255 for all.
    pub table: u8,
    /// `OFPTC_*` bits.
    pub config: u32,
}

/// Which asynchronous messages a controller wants: for each property of OpenFlow 1.4 (section 7.3.10) the reasons, if
/// they are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AsyncConfig(pub [Option<u32>; AsyncConfig::LEN]);

impl AsyncConfig {
    /// Properties that are known.
    pub const LEN: usize = 12;
    /// Reasons that each of them can have. Even ones are for slaves, odd ones for the others.
    const REASONS: [u32; Self::LEN] =
        [0x3f, 0x3f, 0b111, 0b111, 0x3f, 0x3f, 0b111, 0b111, 0x18, 0x18, 0b11, 0b11];
    /// The property about changes of role, of slaves.
    pub const ROLE_STATUS_SLAVE: usize = 6;

    /// What holds until a controller says otherwise: all for masters, and slaves hear of ports and roles.
    #[must_use]
    pub fn initial() -> Self {
        let slave = |at| matches!(at, 2 | Self::ROLE_STATUS_SLAVE);
        Self(std::array::from_fn(|at| Some(if at % 2 == 1 || slave(at) { Self::REASONS[at] } else { 0 })))
    }

    /// Takes what another says.
    pub fn update(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, new)| *mine = new.or(*mine));
    }
}

pub(super) fn put_async(w: &mut Writer, config: &AsyncConfig) {
    for (number, mask) in (0u16..).zip(config.0) {
        let Some(mask) = mask else { continue };
        w.u16(number);
        w.u16(8);
        w.u32(mask);
    }
}

pub(super) fn take_async(r: &mut Reader<'_>) -> Result<AsyncConfig, DecodeError> {
    let mut config = AsyncConfig::default();
    while let Some((kind, mut body)) = take_property(r)? {
        let refused = |code| property(kind, code);
        let at = usize::from(kind);
        let place = config.0.get_mut(at).ok_or(refused(error::ASYNC_UNSUPPORTED))?;
        if body.len() != 4 {
            return Err(refused(error::PROPERTY_BAD_LEN));
        }
        let mask = body.u32()?;
        if mask & !AsyncConfig::REASONS[at] != 0 {
            return Err(refused(error::ASYNC_INVALID));
        }
        if place.replace(mask).is_some() {
            return Err(refused(error::PROPERTY_DUP));
        }
    }
    Ok(config)
}

fn property(kind: u16, code: Code) -> DecodeError {
    DecodeError::Value { field: "property type", value: kind.into(), code }
}

/// The next property, if there is one. Those of experimenters are all unknown.
fn take_property<'a>(r: &mut Reader<'a>) -> Result<Option<(u16, Reader<'a>)>, DecodeError> {
    if r.is_empty() {
        return Ok(None);
    }
    let (kind, len) = (r.u16()?, usize::from(r.u16()?));
    let bad_len = property(kind, error::PROPERTY_BAD_LEN);
    let body = len.checked_sub(4).and_then(|len| r.sub(len).ok()).ok_or(bad_len)?;
    // The padding of the last one may be missing.
    r.take((len.next_multiple_of(8) - len).min(r.len()))?;
    if kind >= 0xfffe {
        Err(property(kind, error::PROPERTY_BAD_EXPERIMENTER))
    } else {
        Ok(Some((kind, body)))
    }
}

/// Where no property is known.
pub(super) fn no_properties(r: &Reader<'_>) -> Result<(), DecodeError> {
    let mut rest = *r;
    take_property(&mut rest)?.map_or(Ok(()), |(kind, _)| Err(property(kind, error::PROPERTY_BAD_TYPE)))
}

pub(super) fn put_group_mod(w: &mut Writer, change: GroupMod) {
    w.u16(change.command);
    w.zeros(2);
    w.u32(change.group);
}

/// The last of the four types of groups (`OFPGT_FF`).
const GROUP_FAST_FAILOVER: u8 = 3;

pub(super) fn take_group_mod(r: &mut Reader<'_>) -> Result<GroupMod, DecodeError> {
    let (command, kind) = (r.u16()?, r.u8()?);
    r.take(1)?;
    let group = r.u32()?;
    if matches!(command, ADD | MODIFY) && kind > GROUP_FAST_FAILOVER {
        let (field, value) = ("type of a group", kind.into());
        return Err(DecodeError::Value { field, value, code: error::GROUP_BAD_TYPE });
    }
    whole_records(r, 0)?;
    Ok(GroupMod { command, group })
}

pub(super) fn put_meter_mod(w: &mut Writer, change: MeterMod) {
    w.u16(change.command);
    w.zeros(2);
    w.u32(change.meter);
}

/// `OFPMF_KBPS`, `OFPMF_PKTPS`, `OFPMF_BURST`, `OFPMF_STATS`.
const METER_FLAGS: u16 = 0xf;

/// To delete a meter its number is enough: what flags and bands say then is nobody's concern (OpenFlow 1.4, "Meter
/// Modification Message").
pub(super) fn take_meter_mod(r: &mut Reader<'_>) -> Result<MeterMod, DecodeError> {
    let (command, flags, meter) = (r.u16()?, r.u16()?, r.u32()?);
    whole_records(r, 2)?;
    if matches!(command, ADD | MODIFY) && flags & !METER_FLAGS != 0 {
        let (field, value) = ("flags of a meter", flags.into());
        return Err(DecodeError::Value { field, value, code: error::METER_BAD_FLAGS });
    }
    Ok(MeterMod { command, meter })
}

/// Bytes of a bucket without actions, and of a meter's band.
const RECORD_LEN_MIN: usize = 16;

/// Reads over the buckets of a group or the bands of a meter, which have to fill the message. The length of each is at
/// this offset in it.
fn whole_records(r: &mut Reader<'_>, length_at: usize) -> Result<(), DecodeError> {
    while !r.is_empty() {
        let mut head = *r;
        head.take(length_at)?;
        let len = usize::from(head.u16()?);
        if len < RECORD_LEN_MIN || !len.is_multiple_of(8) {
            return Err(DecodeError::RecordLength(len));
        }
        r.take(len)?;
    }
    Ok(())
}

/// `OFPPMPT_ETHERNET`.
const PORT_ETHERNET: u16 = 0;

pub(super) fn put_port_mod(w: &mut Writer, change: &PortMod) {
    w.u32(change.port.0);
    w.zeros(4);
    w.bytes(&change.mac);
    w.zeros(2);
    w.u32(change.config);
    w.u32(change.mask);
    w.u16(PORT_ETHERNET);
    w.u16(8);
    w.u32(change.advertise);
}

pub(super) fn take_port_mod(r: &mut Reader<'_>) -> Result<PortMod, DecodeError> {
    let port = PortNo(r.u32()?);
    r.take(4)?;
    let mut mac = [0; 6];
    mac.copy_from_slice(r.take(6)?);
    r.take(2)?;
    let (config, mask) = (r.u32()?, r.u32()?);
    let mut advertise = None;
    while let Some((kind, mut body)) = take_property(r)? {
        let code = match (kind, body.len(), advertise) {
            (PORT_ETHERNET, 4, None) => {
                advertise = Some(body.u32()?);
                continue;
            }
            (PORT_ETHERNET, 4, Some(_)) => error::PROPERTY_DUP,
            (PORT_ETHERNET, ..) => error::PROPERTY_BAD_LEN,
            _ => error::PROPERTY_BAD_TYPE,
        };
        return Err(property(kind, code));
    }
    Ok(PortMod { port, mac, config, mask, advertise: advertise.unwrap_or(0) })
}

/// `OFPTMPT_EVICTION` and `OFPTMPT_VACANCY`.
const TABLE_PROPERTIES: std::ops::RangeInclusive<u16> = 2..=3;

pub(super) fn put_table_mod(w: &mut Writer, change: TableMod) {
    w.u8(change.table);
    w.zeros(3);
    w.u32(change.config);
}

pub(super) fn take_table_mod(r: &mut Reader<'_>) -> Result<TableMod, DecodeError> {
    let table = r.u8()?;
    r.take(3)?;
    let config = r.u32()?;
    match take_property(r)? {
        None => Ok(TableMod { table, config }),
        // Both are about what the configuration bits would switch on.
        Some((kind, _)) if TABLE_PROPERTIES.contains(&kind) => Err(property(kind, error::TABLE_BAD_CONFIG)),
        Some((kind, _)) => Err(property(kind, error::PROPERTY_BAD_TYPE)),
    }
}
