//! The table of groups in a few bytes per group: for snapshots, and for watchers that start from nothing.
//!
//! Groups are sorted, so a column of each field has long runs and small steps: families, lengths and services by runs,
//! addresses by the gap after the group before, owners and standbys as they are, epochs and revisions by difference; moves as a
//! list of the few that have one. zstd over all. The first byte is the version of the layout.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::IpAddr;

use bytes::Bytes;
use flow::{Epoch, Family, GroupId, MoveId, Prefix, ServiceId, SiteId};

use crate::core::Group;

/// The layout that this code writes.
const LAYOUT: u8 = 1;
/// Groups in one table: 64 services of as many as one may have.
const GROUPS_MAX: u64 = 1 << 26;
/// Bytes that a table may have when it is unpacked, per group and beside: what the widest values of all columns take.
const PER_GROUP_MAX: u64 = 128;
const BESIDE_MAX: u64 = 1 << 10;
/// Bytes that a group has at least: one in each column that all groups are in.
const PER_GROUP_MIN: usize = 5;
const ZSTD_LEVEL: i32 = 3;
/// What a frame may make its reader remember: eight times what the level above makes it remember.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// Why bytes are no table of groups. They are damaged, or of a later release.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Another layout.
    #[error("table of groups has layout {0}, this node knows {LAYOUT}: upgrade it")]
    Layout(u8),
    /// More groups than there can be.
    #[error("table of {0} groups: at most {GROUPS_MAX} are allowed")]
    Groups(u64),
    /// A column ends early, or there is something behind the last.
    #[error("table of groups is cut or too long at {0}")]
    Length(&'static str),
    /// A value that cannot be.
    #[error("table of groups has a bad {0}")]
    Value(&'static str),
}

/// The table in bytes.
#[must_use]
pub fn pack(groups: &BTreeMap<GroupId, Group>) -> Bytes {
    let columns = columns(groups);
    // Zstandard fails only for want of memory, and what is written as it is can be read just as well.
    let (squeezed, body) = match zstd::bulk::compress(&columns, ZSTD_LEVEL) {
        Ok(squeezed) => (1, squeezed),
        Err(_) => (0, columns),
    };
    let mut bytes = vec![LAYOUT, squeezed];
    put(&mut bytes, groups.len() as u128);
    bytes.extend(body);
    bytes.into()
}

fn columns(groups: &BTreeMap<GroupId, Group>) -> Vec<u8> {
    let mut out = Vec::with_capacity(groups.len() * 6);
    let kind = |group: &Group| (group.id.service, group.id.prefix.family(), group.id.prefix.len());
    let mut runs: Vec<((ServiceId, Family, u8), u128)> = Vec::new();
    for group in groups.values() {
        match runs.last_mut().filter(|(last, _)| *last == kind(group)) {
            Some((_, count)) => *count += 1,
            None => runs.push((kind(group), 1)),
        }
    }
    put(&mut out, runs.len() as u128);
    for ((service, family, len), count) in runs {
        out.extend([service.get(), u8::from(family == Family::V6), len]);
        put(&mut out, count);
    }
    let mut next = 0_u128;
    for group in groups.values() {
        let start = bits(group.id.prefix.address());
        // Another service or family begins anew, and then the difference wraps.
        put(&mut out, start.wrapping_sub(next));
        next = start.wrapping_add(group.id.prefix.size());
    }
    out.extend(groups.values().map(|group| group.owner.0));
    for group in groups.values() {
        put(&mut out, group.standby.map_or(0, |site| u128::from(site.0) + 1));
    }
    let mut last = 0;
    for group in groups.values() {
        put(&mut out, zigzag(group.epoch.0.wrapping_sub(last)).into());
        last = group.epoch.0;
    }
    let mut last = 0;
    for group in groups.values() {
        put(&mut out, zigzag(group.changed.wrapping_sub(last)).into());
        last = group.changed;
    }
    let moving = || groups.values().zip(0_u128..).filter_map(|(group, at)| Some((at, group.move_id?)));
    put(&mut out, moving().count() as u128);
    for (at, id) in moving() {
        put(&mut out, at);
        put(&mut out, id.0.into());
    }
    out
}

/// The table of bytes.
///
/// # Errors
/// [`PackError`]; arbitrary bytes never panic. They take no more memory than their stated number of groups wants, and little
/// until that many groups are there.
pub fn unpack(bytes: &[u8]) -> Result<BTreeMap<GroupId, Group>, PackError> {
    let [layout, squeezed, rest @ ..] = bytes else { return Err(PackError::Length("head")) };
    if *layout != LAYOUT {
        return Err(PackError::Layout(*layout));
    }
    let mut head = Reader(rest);
    let len = head.number("number of groups")?;
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    if len > GROUPS_MAX {
        return Err(PackError::Groups(len));
    }
    let room = usize::try_from(len * PER_GROUP_MAX + BESIDE_MAX).unwrap_or(usize::MAX);
    let columns = match squeezed {
        0 => head.0.to_vec(),
        1 => unsqueezed(head.0, room).ok_or(PackError::Length("body"))?,
        _ => return Err(PackError::Value("compression")),
    };
    table(&columns, len as usize)
}

/// What a frame holds, up to a bound. It grows with what is read: what a frame or a head state may be anything.
fn unsqueezed(frame: &[u8], len_max: usize) -> Option<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).ok()?;
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).ok()?;
    let mut columns = Vec::new();
    decoder.take(len_max as u64 + 1).read_to_end(&mut columns).ok()?;
    (columns.len() <= len_max).then_some(columns)
}

fn table(columns: &[u8], len: usize) -> Result<BTreeMap<GroupId, Group>, PackError> {
    if columns.len() / PER_GROUP_MIN < len {
        return Err(PackError::Length("groups"));
    }
    let mut reader = Reader(columns);
    let ids = ids(&mut reader, len)?;
    let owners = reader.take(len, "owners")?;
    let mut groups = Vec::with_capacity(len);
    for (id, &owner) in ids.into_iter().zip(owners) {
        let standby = match reader.number("standbys")? {
            0 => None,
            site => Some(SiteId(u8::try_from(site - 1).map_err(|_| PackError::Value("standby"))?)),
        };
        let (epoch, changed) = (Epoch(0), 0);
        groups.push(Group { id, owner: SiteId(owner), epoch, move_id: None, changed, standby });
    }
    let mut last = 0_u64;
    for group in &mut groups {
        let step = u64::try_from(reader.number("epochs")?).map_err(|_| PackError::Value("epoch"))?;
        last = last.wrapping_add(unzigzag(step));
        group.epoch = Epoch(last);
    }
    let mut last = 0_u64;
    for group in &mut groups {
        let step = u64::try_from(reader.number("revisions")?).map_err(|_| PackError::Value("revision"))?;
        last = last.wrapping_add(unzigzag(step));
        group.changed = last;
    }
    for _ in 0..reader.number("moves")? {
        let at = usize::try_from(reader.number("moves")?).map_err(|_| PackError::Value("move"))?;
        let id = u64::try_from(reader.number("moves")?).map_err(|_| PackError::Value("move"))?;
        groups.get_mut(at).ok_or(PackError::Value("move"))?.move_id = Some(MoveId(id));
    }
    if !reader.0.is_empty() {
        return Err(PackError::Length("end"));
    }
    let table: BTreeMap<GroupId, Group> = groups.into_iter().map(|group| (group.id, group)).collect();
    if table.len() != len { Err(PackError::Value("group, which is there twice")) } else { Ok(table) }
}

fn ids(reader: &mut Reader<'_>, len: usize) -> Result<Vec<GroupId>, PackError> {
    let runs = reader.number("runs")?;
    let mut kinds = Vec::new();
    for _ in 0..runs {
        let [service, family, prefix_len] = reader.take(3, "runs")? else {
            return Err(PackError::Length("runs"));
        };
        let service = ServiceId::new(*service).map_err(|_| PackError::Value("service"))?;
        let count = usize::try_from(reader.number("runs")?).map_err(|_| PackError::Value("run"))?;
        if count == 0 || count > len - kinds.len() {
            return Err(PackError::Value("run"));
        }
        kinds.extend(std::iter::repeat_n((service, *family != 0, *prefix_len), count));
    }
    if kinds.len() != len {
        return Err(PackError::Value("run"));
    }
    let mut next = 0_u128;
    let mut ids = Vec::with_capacity(len);
    for (service, is_v6, prefix_len) in kinds {
        let start = next.wrapping_add(reader.number("addresses")?);
        let address = if is_v6 {
            IpAddr::V6(start.into())
        } else {
            IpAddr::V4(u32::try_from(start).map_err(|_| PackError::Value("address"))?.into())
        };
        let prefix = Prefix::new(address, prefix_len).map_err(|_| PackError::Value("prefix"))?;
        next = start.wrapping_add(prefix.size());
        ids.push(GroupId { service, prefix });
    }
    Ok(ids)
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Small numbers of either sign as small ones without.
fn zigzag(value: u64) -> u64 {
    (value << 1) ^ ((value as i64 >> 63) as u64)
}

fn unzigzag(value: u64) -> u64 {
    (value >> 1) ^ (value & 1).wrapping_neg()
}

/// Seven bits per byte, low ones first; the high bit says that more follow (LEB128).
fn put(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], PackError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(PackError::Length(what))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, what: &'static str) -> Result<u128, PackError> {
        let mut value = 0_u128;
        for shift in (0..128).step_by(7) {
            let byte = self.take(1, what)?[0];
            value |= u128::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(PackError::Value(what))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_group() -> impl Strategy<Value = Group> {
        let prefix = prop_oneof![
            (any::<u32>(), 8_u8..=32).prop_map(|(bits, len)| (IpAddr::V4(bits.into()), len)),
            (any::<u128>(), 8_u8..=128).prop_map(|(bits, len)| (IpAddr::V6(bits.into()), len)),
        ];
        let rest = (any::<u8>(), any::<Option<u8>>(), any::<u64>(), any::<u64>(), any::<Option<u64>>());
        (0_u8..64, prefix, rest).prop_map(
            |(service, (address, len), (owner, standby, epoch, changed, id))| {
                let prefix = Prefix::containing(address, len).unwrap();
                Group {
                    id: GroupId { service: ServiceId::new(service).unwrap(), prefix },
                    owner: SiteId(owner),
                    epoch: Epoch(epoch),
                    move_id: id.map(MoveId),
                    changed,
                    standby: standby.map(SiteId),
                }
            },
        )
    }

    fn table_of(groups: Vec<Group>) -> BTreeMap<GroupId, Group> {
        groups.into_iter().map(|group| (group.id, group)).collect()
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(groups in proptest::collection::vec(any_group(), 0..60)) {
            let groups = table_of(groups);
            prop_assert_eq!(unpack(&pack(&groups)), Ok(groups));
        }

        #[test]
        fn arbitrary_and_damaged_bytes_are_refused_without_panic(
            bytes: Vec<u8>,
            groups in proptest::collection::vec(any_group(), 1..20),
            at: prop::sample::Index,
            with: u8,
        ) {
            let _ = unpack(&bytes);
            let _ = table(&bytes, bytes.len());
            let groups = table_of(groups);
            let mut damaged = columns(&groups);
            let at = at.index(damaged.len());
            damaged[at] ^= with;
            if let Ok(other) = table(&damaged, groups.len()) {
                prop_assert_eq!(other.len(), groups.len());
            }
            prop_assert!(table(&damaged[..at], groups.len()).is_err());
        }
    }

    #[test]
    fn a_table_takes_few_bytes_for_each_group() {
        let mut random = flow::sample::Seeded::new(7);
        let service = ServiceId::new(1).unwrap();
        let group = |n: u32| {
            let prefix = Prefix::new(IpAddr::V4((0x0a00_0000 + n * 256).into()), 24).unwrap();
            // Neighbours are often at one site, and what has moved did so at any time.
            let moved = random.below(4) == 0;
            Group {
                id: GroupId { service, prefix },
                owner: SiteId((n / 16 % 100) as u8 + u8::from(moved)),
                epoch: Epoch(1 + u64::from(moved) * random.below(5)),
                move_id: None,
                changed: if moved { random.below(1_000_000) } else { 17 },
                standby: None,
            }
        };
        let groups = table_of((0..50_000).map(group).collect());
        let packed = pack(&groups);
        assert!(packed.len() < 3 * groups.len(), "{} bytes", packed.len());
        assert_eq!(unpack(&packed), Ok(groups));
    }

    #[test]
    fn a_stated_number_of_groups_bounds_the_memory() {
        let mut bytes = vec![LAYOUT, 1];
        put(&mut bytes, u128::from(GROUPS_MAX) + 1);
        assert_eq!(unpack(&bytes), Err(PackError::Groups(GROUPS_MAX + 1)));
        // Groups that are not there.
        let mut bytes = vec![LAYOUT, 0];
        put(&mut bytes, GROUPS_MAX.into());
        bytes.extend([1, 1, 0, 32]);
        put(&mut bytes, GROUPS_MAX.into());
        assert_eq!(unpack(&bytes), Err(PackError::Length("groups")));
        // A bomb: much more than one group can take.
        let mut bytes = vec![LAYOUT, 1];
        put(&mut bytes, 1);
        bytes.extend(zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap());
        assert_eq!(unpack(&bytes), Err(PackError::Length("body")));
        assert_eq!(unpack(&[LAYOUT + 1, 0, 0]), Err(PackError::Layout(LAYOUT + 1)));
    }
}
