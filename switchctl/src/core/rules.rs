//! The rule model: what a switch matches and does, a set of rules, and the difference between two sets.
//!
//! A match is held as the words of a packet's header fields with a mask, so that two matches that mean the
//! same are equal, and so that the embedded switch can classify with them as they are.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use flow::{Family, Prefix};
use imbl::ordmap::DiffItem;

/// A port number of a switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortNo(pub u32);

impl PortNo {
    /// The port that a packet came in by (`OFPP_IN_PORT`).
    pub const IN_PORT: Self = Self(0xffff_fff8);
    /// The tables, for a packet of a controller (`OFPP_TABLE`).
    pub const TABLE: Self = Self(0xffff_fff9);
    /// The controller (`OFPP_CONTROLLER`).
    pub const CONTROLLER: Self = Self(0xffff_fffd);
    /// Any port, or none (`OFPP_ANY`).
    pub const ANY: Self = Self(0xffff_ffff);
    /// The largest number of a real port (`OFPP_MAX`).
    pub const MAX: Self = Self(0xffff_ff00);
}

impl fmt::Display for PortNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// EtherType of IPv4.
pub const ETH_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETH_IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const ETH_VLAN: u16 = 0x8100;
/// IP protocol of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// IP protocol of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol of UDP.
pub const PROTO_UDP: u8 = 17;
/// IP protocol of ICMPv6.
pub const PROTO_ICMPV6: u8 = 58;

/// The bit of a VLAN field that says that there is a tag (`OFPVID_PRESENT`).
pub const VLAN_PRESENT: u16 = 0x1000;

/// Words of all header fields.
pub const WORDS: usize = 8;

/// A header field: a run of bits in one word, or an address in two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    /// Port that the packet came in by, 32 bits.
    InPort,
    /// VLAN id with [`VLAN_PRESENT`], 13 bits.
    Vlan,
    /// EtherType behind the tag, 16 bits.
    EthType,
    /// Tunnel key, 64 bits.
    TunnelId,
    /// IPv4 source address of the tunnel that the packet came by, 32 bits. An extension of Open vSwitch: with
    /// flow-based tunnels one port serves all peers, and this says which one sent the packet.
    TunnelSrc,
    /// IPv4 (low 32 bits) or IPv6 source address.
    IpSrc,
    /// IPv4 (low 32 bits) or IPv6 destination address.
    IpDst,
    /// IP protocol, 8 bits.
    IpProto,
    /// TCP or UDP source port, or ICMP type; 0 in later fragments.
    TpSrc,
    /// TCP or UDP destination port, or ICMP code; 0 in later fragments.
    TpDst,
}

impl Field {
    /// First word, number of words, lowest bit, width.
    const fn place(self) -> (usize, usize, u32, u32) {
        match self {
            Self::InPort => (0, 1, 32, 32),
            Self::Vlan => (0, 1, 16, 16),
            Self::EthType => (0, 1, 0, 16),
            Self::TunnelId => (1, 1, 0, 64),
            Self::TunnelSrc => (7, 1, 0, 32),
            Self::IpSrc => (2, 2, 0, 128),
            Self::IpDst => (4, 2, 0, 128),
            Self::IpProto => (6, 1, 32, 8),
            Self::TpSrc => (6, 1, 16, 16),
            Self::TpDst => (6, 1, 0, 16),
        }
    }

    /// Reads the field from words.
    #[must_use]
    #[inline]
    pub fn read(self, words: &[u64; WORDS]) -> u128 {
        let (word, count, shift, width) = self.place();
        if count == 2 {
            return u128::from(words[word]) << 64 | u128::from(words[word + 1]);
        }
        u128::from(words[word] >> shift & ones(width))
    }

    /// Writes the field into words; bits above its width are ignored.
    #[inline]
    pub fn write(self, words: &mut [u64; WORDS], value: u128) {
        let (word, count, shift, width) = self.place();
        if count == 2 {
            words[word] = (value >> 64) as u64;
            words[word + 1] = value as u64;
            return;
        }
        words[word] = words[word] & !(ones(width) << shift) | (value as u64 & ones(width)) << shift;
    }
}

const fn ones(width: u32) -> u64 {
    if width >= 64 { u64::MAX } else { (1 << width) - 1 }
}

/// What a match says about a VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vlan {
    /// There is none.
    Absent,
    /// There is one, whatever its id.
    Present,
    /// There is one with this id.
    Tag(u16),
}

/// Which packets a rule is for: each field's value where its mask has ones.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Match {
    value: [u64; WORDS],
    mask: [u64; WORDS],
}

impl Match {
    /// Every packet.
    pub const ANY: Self = Self { value: [0; WORDS], mask: [0; WORDS] };

    /// Every packet.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// From words as [`Match::value`] and [`Match::mask`] give them.
    #[must_use]
    pub fn from_words(value: [u64; WORDS], mask: [u64; WORDS]) -> Self {
        Self { value: std::array::from_fn(|i| value[i] & mask[i]), mask }
    }

    /// Adds a field with a mask. Value bits outside the mask are cleared.
    #[must_use]
    pub fn masked(mut self, field: Field, value: u128, mask: u128) -> Self {
        field.write(&mut self.value, value & mask);
        field.write(&mut self.mask, mask);
        self
    }

    /// Adds a field of which every bit counts, up to 64 bits wide.
    #[must_use]
    pub fn exact(self, field: Field, value: u64) -> Self {
        let (_, _, _, width) = field.place();
        let mask = if field == Field::Vlan { 0x1fff } else { ones(width) };
        self.masked(field, u128::from(value), u128::from(mask))
    }

    /// Packets from a port.
    #[must_use]
    pub fn in_port(self, port: PortNo) -> Self {
        self.exact(Field::InPort, u64::from(port.0))
    }

    /// Packets with such a VLAN tag.
    #[must_use]
    pub fn vlan(self, vlan: Vlan) -> Self {
        let present = u128::from(VLAN_PRESENT);
        match vlan {
            Vlan::Absent => self.masked(Field::Vlan, 0, 0x1fff),
            Vlan::Present => self.masked(Field::Vlan, present, present),
            Vlan::Tag(id) => self.masked(Field::Vlan, u128::from(id & 0xfff) | present, 0x1fff),
        }
    }

    /// Packets of which some bits of the tunnel key are so.
    #[must_use]
    pub fn tunnel_id(self, value: u64, mask: u64) -> Self {
        self.masked(Field::TunnelId, value.into(), mask.into())
    }

    /// Packets that a tunnel brought from this address.
    #[must_use]
    pub fn tunnel_src(self, address: Ipv4Addr) -> Self {
        self.exact(Field::TunnelSrc, u32::from(address).into())
    }

    /// Packets of an EtherType.
    #[must_use]
    pub fn eth_type(self, eth_type: u16) -> Self {
        self.exact(Field::EthType, eth_type.into())
    }

    /// Packets of an IP protocol; the caller adds the EtherType.
    #[must_use]
    pub fn ip_proto(self, protocol: u8) -> Self {
        self.exact(Field::IpProto, protocol.into())
    }

    /// IP packets from a prefix; adds the EtherType.
    #[must_use]
    pub fn ip_src(self, prefix: &Prefix) -> Self {
        self.address(Field::IpSrc, prefix)
    }

    /// IP packets to a prefix; adds the EtherType.
    #[must_use]
    pub fn ip_dst(self, prefix: &Prefix) -> Self {
        self.address(Field::IpDst, prefix)
    }

    /// Packets of which some bits of the TCP or UDP destination port are so; the caller adds the protocol.
    #[must_use]
    pub fn tp_dst(self, port: u16, mask: u16) -> Self {
        self.masked(Field::TpDst, port.into(), mask.into())
    }

    /// Packets of which some bits of the TCP or UDP source port are so; the caller adds the protocol.
    #[must_use]
    pub fn tp_src(self, port: u16, mask: u16) -> Self {
        self.masked(Field::TpSrc, port.into(), mask.into())
    }

    fn address(self, field: Field, prefix: &Prefix) -> Self {
        let bits = |address| match address {
            IpAddr::V4(a) => u128::from(u32::from(a)),
            IpAddr::V6(a) => u128::from(a),
        };
        let eth_type = if prefix.family() == Family::V4 { ETH_IPV4 } else { ETH_IPV6 };
        self.eth_type(eth_type).masked(field, bits(prefix.address()), bits(prefix.mask()))
    }

    /// Value and mask of a field, unless it does not count at all.
    #[must_use]
    pub fn field(&self, field: Field) -> Option<(u128, u128)> {
        let mask = field.read(&self.mask);
        (mask != 0).then(|| (field.read(&self.value), mask))
    }

    /// The value of a field whose bits all count.
    #[must_use]
    pub fn exact_value(&self, field: Field) -> Option<u64> {
        let (_, _, _, width) = field.place();
        let (value, mask) = self.field(field)?;
        (mask == u128::from(ones(width))).then(|| u64::try_from(value).ok())?
    }

    /// The words that must be equal, under [`Match::mask`].
    #[must_use]
    pub fn value(&self) -> &[u64; WORDS] {
        &self.value
    }

    /// The bits that count.
    #[must_use]
    pub fn mask(&self) -> &[u64; WORDS] {
        &self.mask
    }

    /// Whether a packet with these header words is meant.
    #[must_use]
    pub fn matches(&self, words: &[u64; WORDS]) -> bool {
        (0..WORDS).all(|i| words[i] & self.mask[i] == self.value[i])
    }

    /// Whether every packet of the other match is a packet of this one.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        (0..WORDS)
            .all(|i| self.mask[i] & !other.mask[i] == 0 && other.value[i] & self.mask[i] == self.value[i])
    }

    /// Whether a packet can be of both matches.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        (0..WORDS).all(|i| (self.value[i] ^ other.value[i]) & self.mask[i] & other.mask[i] == 0)
    }
}

impl fmt::Debug for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Field::{EthType, InPort, IpDst, IpProto, IpSrc, TpDst, TpSrc, TunnelId, TunnelSrc, Vlan};
        let mut map = f.debug_map();
        for field in [InPort, Vlan, EthType, TunnelId, TunnelSrc, IpSrc, IpDst, IpProto, TpSrc, TpDst] {
            if let Some((value, mask)) = self.field(field) {
                map.entry(&field, &format_args!("{value:#x}/{mask:#x}"));
            }
        }
        map.finish()
    }
}

/// What a switch does to a packet, in the order of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Adds an 802.1Q tag with this id, and the priority of the tag behind it.
    PushVlan(u16),
    /// Adds an 802.1Q tag that is as the one behind it, or zero (OpenFlow 1.4, section 5.12.1).
    PushTag,
    /// Removes the outer tag.
    PopVlan,
    /// Changes the id of the outer tag.
    SetVlan(u16),
    /// Sets the tunnel key of what leaves by a tunnel.
    SetTunnel(u64),
    /// Sets where a flow-based tunnel leads. An extension of Open vSwitch.
    SetTunnelDst(Ipv4Addr),
    /// Forgets which port the packet came by, so that it may leave by that port too, which switches refuse
    /// otherwise. An extension of Open vSwitch.
    ClearInPort,
    /// Sends a copy by a port. Nothing happens when it is the one the packet came in by.
    Output(PortNo),
    /// Sends a copy by the port it came in by.
    OutputInPort,
}

/// The identity of a rule in a switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    /// Table.
    pub table: u8,
    /// The largest that matches wins.
    pub priority: u16,
    /// Which packets.
    pub matches: Match,
}

/// What a rule does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Says for whom the rule is; see [`crate::core::compile::cookie`].
    pub cookie: u64,
    /// Done at once.
    pub actions: Vec<Action>,
    /// Where to go on; must be a later table.
    pub goto: Option<u8>,
}

/// All rules of a switch. Copies share what they have in common, so a set can be kept, compared and changed in proportion to its
/// differences.
pub type RuleSet = imbl::OrdMap<RuleKey, Rule>;

/// One change of a switch's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowMod {
    /// Adds a rule, or replaces the one with the same key.
    Add(RuleKey, Rule),
    /// Removes exactly this rule.
    Delete(RuleKey),
    /// Removes all rules of all tables.
    Clear,
}

/// A packet that the switch sent to the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketIn {
    /// Of the rule that sent it.
    pub cookie: u64,
    /// The table of that rule.
    pub table: u8,
    /// The start of the frame.
    pub bytes: Vec<u8>,
}

/// A packet that the controller sends through the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketOut {
    /// The Ethernet frame.
    pub bytes: Vec<u8>,
    /// Which port it pretends to come from; [`PortNo::CONTROLLER`] for none.
    pub in_port: PortNo,
    /// What to do with it.
    pub actions: Vec<Action>,
}

/// The fewest changes that turn `present` into `wanted`: one per rule that is missing, differs or is extra. Work is that of the
/// differences where one set was made from the other: what they have in common is left out.
#[must_use]
pub fn diff(present: &RuleSet, wanted: &RuleSet) -> Vec<FlowMod> {
    let change = |item: DiffItem<'_, '_, RuleKey, Rule>| match item {
        DiffItem::Add(key, rule) | DiffItem::Update { new: (key, rule), .. } => {
            FlowMod::Add(*key, rule.clone())
        }
        DiffItem::Remove(key, _) => FlowMod::Delete(*key),
    };
    present.diff(wanted).map(change).collect()
}

/// Applies changes to a set, as a switch does.
pub fn apply(rules: &mut RuleSet, mods: &[FlowMod]) {
    for change in mods {
        match change {
            FlowMod::Add(key, rule) => drop(rules.insert(*key, rule.clone())),
            FlowMod::Delete(key) => drop(rules.remove(key)),
            FlowMod::Clear => rules.clear(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(entries: &[(u8, u64)]) -> RuleSet {
        entries
            .iter()
            .map(|&(priority, cookie)| {
                let key = RuleKey { table: 0, priority: priority.into(), matches: Match::any() };
                (key, Rule { cookie, ..Rule::default() })
            })
            .collect()
    }

    #[test]
    fn fields_do_not_touch_one_another() {
        let m =
            Match::any().in_port(PortNo(7)).vlan(Vlan::Tag(5)).eth_type(0x800).ip_proto(6).tp_dst(80, 0xffff);
        assert_eq!(m.exact_value(Field::InPort), Some(7));
        assert_eq!(m.field(Field::Vlan), Some((0x1005, 0x1fff)));
        assert_eq!(m.exact_value(Field::EthType), Some(0x800));
        assert_eq!(m.exact_value(Field::IpProto), Some(6));
        assert_eq!(m.exact_value(Field::TpDst), Some(80));
        assert_eq!(m.field(Field::TpSrc), None);
    }

    proptest! {
        #[test]
        fn the_difference_leads_there_with_one_change_per_rule_that_differs(
            a in proptest::collection::btree_map(any::<u8>(), 0u64..3, 0..40),
            b in proptest::collection::btree_map(any::<u8>(), 0u64..3, 0..40),
        ) {
            let a = set(&a.into_iter().collect::<Vec<_>>());
            let b = set(&b.into_iter().collect::<Vec<_>>());
            let mods = diff(&a, &b);
            let changed = a.keys().chain(b.keys()).collect::<std::collections::BTreeSet<_>>()
                .into_iter().filter(|key| a.get(*key) != b.get(*key)).count();
            prop_assert_eq!(mods.len(), changed);
            let mut reached = a;
            apply(&mut reached, &mods);
            prop_assert_eq!(reached, b);
        }
    }
}
