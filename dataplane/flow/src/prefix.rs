//! Address prefixes of both families, and the flow group that one of them names.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ServiceId;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4, 32 bits.
    V4,
    /// IPv6, 128 bits.
    V6,
}

impl Family {
    /// Bits of an address.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// A prefix whose host bits are zero. Ordered by family, then address, then length, so that a prefix
/// comes before everything inside it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    family: Family,
    /// The address, in the low bits for IPv4.
    bits: u128,
    len: u8,
}

/// Why a text or a pair is not a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not `ADDRESS/LENGTH`.
    #[error("{0:?} is not a prefix: write ADDRESS/LENGTH, for example 100.64.0.0/16")]
    Syntax(String),
    /// The length is longer than an address of the family.
    #[error("prefix length {len} is above {max}")]
    Length {
        /// What was given.
        len: u8,
        /// The longest for this family.
        max: u8,
    },
    /// Bits below the prefix length are set; the message names the prefix that was probably meant.
    #[error("{given} has bits set below its length: {meant} was probably meant")]
    HostBits {
        /// What was given.
        given: String,
        /// The same with the host bits cleared.
        meant: String,
    },
}

fn bits_of(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn address_of(family: Family, bits: u128) -> IpAddr {
    match family {
        #[expect(clippy::cast_possible_truncation, reason = "an IPv4 address lives in the low 32 bits")]
        Family::V4 => IpAddr::V4(Ipv4Addr::from(bits as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(bits)),
    }
}

impl Prefix {
    /// A prefix from an address whose host bits are zero.
    ///
    /// # Errors
    /// [`PrefixError::Length`] or [`PrefixError::HostBits`].
    pub fn new(address: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let prefix = Self::containing(address, len)?;
        if bits_of(address) == prefix.bits {
            Ok(prefix)
        } else {
            Err(PrefixError::HostBits { given: format!("{address}/{len}"), meant: prefix.to_string() })
        }
    }

    /// The prefix of this length that contains the address.
    ///
    /// # Errors
    /// [`PrefixError::Length`].
    pub fn containing(address: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let family = Family::of(address);
        if len > family.bits() {
            return Err(PrefixError::Length { len, max: family.bits() });
        }
        Ok(Self { family, bits: bits_of(address) & !host_mask(family, len), len })
    }

    /// The single address as a prefix.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        let family = Family::of(address);
        Self { family, bits: bits_of(address), len: family.bits() }
    }

    /// The family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.family
    }

    /// The length in bits.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a prefix length, not a container")]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// The first address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        address_of(self.family, self.bits)
    }

    /// The netmask, as an address.
    #[must_use]
    pub fn mask(&self) -> IpAddr {
        let all = if self.family == Family::V4 { u128::from(u32::MAX) } else { u128::MAX };
        address_of(self.family, all & !host_mask(self.family, self.len))
    }

    /// Number of addresses; saturates for `::/0`.
    #[must_use]
    pub fn size(&self) -> u128 {
        1u128.checked_shl(u32::from(self.family.bits() - self.len)).unwrap_or(u128::MAX)
    }

    /// The address at an offset from the first, if it is inside.
    #[must_use]
    pub fn nth(&self, offset: u128) -> Option<IpAddr> {
        (offset <= host_mask(self.family, self.len)).then(|| address_of(self.family, self.bits | offset))
    }

    /// How far an address is behind the first one, if it is inside.
    #[must_use]
    pub fn offset(&self, address: IpAddr) -> Option<u128> {
        self.contains(address).then(|| bits_of(address) - self.bits)
    }

    /// Whether the address is inside.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family
            && bits_of(address) & !host_mask(self.family, self.len) == self.bits
    }

    /// Whether the other prefix is this one or inside it.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.family == other.family
            && self.len <= other.len
            && other.bits & !host_mask(self.family, self.len) == self.bits
    }

    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The two halves, unless it is a single address.
    #[must_use]
    pub fn halves(&self) -> Option<(Self, Self)> {
        if self.len == self.family.bits() {
            return None;
        }
        let len = self.len + 1;
        let low = Self { len, ..*self };
        let high = Self { len, bits: self.bits | bit(self.family, self.len), ..*self };
        Some((low, high))
    }

    /// The prefix one bit shorter, unless it is of length zero.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let len = self.len.checked_sub(1)?;
        Some(Self { family: self.family, bits: self.bits & !host_mask(self.family, len), len })
    }

    /// The other half of the parent, unless it is of length zero.
    #[must_use]
    pub fn sibling(&self) -> Option<Self> {
        let len = self.len.checked_sub(1)?;
        Some(Self { bits: self.bits ^ bit(self.family, len), ..*self })
    }

    /// The bit of an address of this family at a depth, counted from the top. For walks of a trie.
    pub(crate) fn bit_at(address: IpAddr, depth: u8) -> bool {
        bits_of(address) & bit(Family::of(address), depth) != 0
    }
}

/// The bit at a depth, counted from the top.
fn bit(family: Family, depth: u8) -> u128 {
    1u128 << (family.bits() - 1 - depth)
}

fn host_mask(family: Family, len: u8) -> u128 {
    let host = family.bits() - len;
    if host == 128 { u128::MAX } else { (1u128 << host) - 1 }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let syntax = || PrefixError::Syntax(text.to_owned());
        let (address, len) = text.split_once('/').ok_or_else(syntax)?;
        let address = address.parse().map_err(|_| syntax())?;
        Self::new(address, len.parse().map_err(|_| syntax())?)
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            (self.address(), self.len).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
        } else {
            let (address, len) = <(IpAddr, u8)>::deserialize(deserializer)?;
            Self::new(address, len).map_err(D::Error::custom)
        }
    }
}

/// The unit of placement: one client prefix of one service. Written `SERVICE:PREFIX`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId {
    /// The service.
    pub service: ServiceId,
    /// The client addresses.
    pub prefix: Prefix,
}

/// Why a text does not name a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a group: {why}")]
pub struct GroupIdError {
    /// The text.
    pub text: String,
    /// What is wrong, and what would be right.
    pub why: String,
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.prefix)
    }
}

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for GroupId {
    type Err = GroupIdError;
    fn from_str(text: &str) -> Result<Self, GroupIdError> {
        let error = |why: String| GroupIdError { text: text.to_owned(), why };
        let form = || error("write SERVICE:PREFIX, for example 1:100.64.3.0/24".to_owned());
        let (service, prefix) = text.split_once(':').ok_or_else(form)?;
        let service = service.parse::<u8>().map_err(|_| form())?;
        let service = ServiceId::new(service).map_err(|above| error(above.to_string()))?;
        Ok(Self { service, prefix: prefix.parse().map_err(|wrong: PrefixError| error(wrong.to_string()))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn a_text_that_is_no_group_says_what_is_wrong_with_it() {
        let why = |text: &str| text.parse::<GroupId>().unwrap_err().to_string();
        let form = "write SERVICE:PREFIX, for example 1:100.64.3.0/24";
        for text in ["", "1", "x:10.0.0.0/24", "999:10.0.0.0/24"] {
            assert_eq!(why(text), format!("{text:?} is not a group: {form}"));
        }
        assert_eq!(
            why("99:10.0.0.0/24"),
            "\"99:10.0.0.0/24\" is not a group: service id 99 is not in 0..=63"
        );
        let meant = "10.0.0.1/24 has bits set below its length: 10.0.0.0/24 was probably meant";
        assert_eq!(why("1:10.0.0.1/24"), format!("\"1:10.0.0.1/24\" is not a group: {meant}"));
    }

    #[test]
    fn host_bits_are_refused_and_the_prefix_that_was_meant_is_named() {
        let error = "10.0.0.1/24".parse::<Prefix>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "10.0.0.1/24 has bits set below its length: 10.0.0.0/24 was probably meant"
        );
        assert!("10.0.0.0/33".parse::<Prefix>().is_err());
        assert!("10.0.0.0".parse::<Prefix>().is_err());
        assert!("::/129".parse::<Prefix>().is_err());
    }

    #[test]
    fn a_group_is_read_as_it_is_written() {
        for text in ["1:100.64.3.0/24", "63:2001:db8::/32", "0:0.0.0.0/0", "0:::/0"] {
            assert_eq!(text.parse::<GroupId>().unwrap().to_string(), text);
        }
        assert!("64:10.0.0.0/8".parse::<GroupId>().is_err());
    }

    #[test]
    fn whole_families_have_halves_but_no_parent() {
        let (low, high) = prefix("::/0").halves().unwrap();
        assert_eq!((low, high), (prefix("::/1"), prefix("8000::/1")));
        assert_eq!(prefix("0.0.0.0/0").parent(), None);
        assert_eq!(prefix("10.0.0.1/32").halves(), None);
    }

    proptest! {
        #[test]
        fn halves_partition_and_lead_back(bits: u128, len in 0u8..128, v4: bool) {
            let address = if v4 { address_of(Family::V4, bits >> 96) } else { address_of(Family::V6, bits) };
            let len = if v4 { len / 4 } else { len };
            let whole = Prefix::containing(address, len).unwrap();
            let (low, high) = whole.halves().unwrap();
            prop_assert!(low.contains(address) ^ high.contains(address));
            prop_assert_eq!(low.parent(), Some(whole));
            prop_assert_eq!(high.parent(), Some(whole));
            prop_assert_eq!(low.sibling(), Some(high));
            prop_assert!(whole.covers(&low) && whole.covers(&high) && !low.overlaps(&high));
            let offset = whole.offset(address).unwrap();
            prop_assert_eq!(whole.nth(offset), Some(address));
        }

        #[test]
        fn text_and_json_lead_back(bits: u32, len in 0u8..=32) {
            let prefix = Prefix::containing(IpAddr::V4(bits.into()), len).unwrap();
            prop_assert_eq!(prefix.to_string().parse::<Prefix>().unwrap(), prefix);
            let json = serde_json::to_string(&prefix).unwrap();
            prop_assert_eq!(serde_json::from_str::<Prefix>(&json).unwrap(), prefix);
        }
    }
}
