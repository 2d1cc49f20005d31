//! A frame with room in front, and the header fields that rules match.

use crate::core::rules::{
    ETH_IPV4, ETH_IPV6, ETH_VLAN, Field, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, PortNo,
    VLAN_PRESENT, WORDS,
};

/// Longest frame. Longer ones are dropped and counted.
pub const FRAME_LEN_MAX: usize = 9_216;
/// Number of tables.
pub const TABLES: u8 = 8;
/// Tags that one list of actions may push.
pub const PUSHES_MAX: usize = 4;
/// Room in front for the VXLAN header and all tags that a controller's own actions and those of each table may push.
const HEADROOM: usize = VXLAN_LEN + TAG_LEN * PUSHES_MAX * (TABLES as usize + 1);
/// Bytes of both Ethernet addresses.
const MACS_LEN: usize = 12;
/// Bytes of an 802.1Q tag.
const TAG_LEN: usize = 4;
/// Bytes of a VXLAN header (RFC 7348, section 5).
pub const VXLAN_LEN: usize = 8;

/// One Ethernet frame in a buffer that is used again for the next.
#[derive(Clone, Debug)]
pub struct Packet {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for Packet {
    fn default() -> Self {
        Self { buffer: vec![0; HEADROOM + VXLAN_LEN + FRAME_LEN_MAX + 1], start: HEADROOM, end: HEADROOM }
    }
}

impl Packet {
    /// Where to receive into: one byte more than the longest frame (with a VXLAN header), so that a longer one shows.
    pub fn receive_buffer(&mut self) -> &mut [u8] {
        &mut self.buffer[HEADROOM..]
    }

    /// Takes what was received: `len` bytes, the first `skip` of which are not of the frame. A tag with VLAN id 0 only has a
    /// priority and names no VLAN (IEEE 802.1Q, section 9.6), so the frame goes on without it.
    /// False when it is no frame that can be handled.
    #[must_use]
    pub fn received(&mut self, len: usize, skip: usize) -> bool {
        self.start = HEADROOM + skip;
        self.end = HEADROOM + len;
        let fits = (skip + MACS_LEN + 2..=skip + FRAME_LEN_MAX).contains(&len);
        while fits && self.has_priority_tag() {
            self.pop_vlan();
        }
        fits
    }

    /// Copies a frame in; false when it is too short or too long.
    #[must_use]
    pub fn load(&mut self, frame: &[u8]) -> bool {
        let Some(room) = self.receive_buffer().get_mut(..frame.len()) else { return false };
        room.copy_from_slice(frame);
        self.received(frame.len(), 0)
    }

    /// The frame.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The frame behind a VXLAN header with this network identifier (RFC 7348, section 5).
    #[must_use]
    pub fn encapsulated(&mut self, vni: u32) -> &[u8] {
        let header = &mut self.buffer[self.start - VXLAN_LEN..self.start];
        header.fill(0);
        header[0] = 0x08;
        header[4..7].copy_from_slice(&vni.to_be_bytes()[1..]);
        &self.buffer[self.start - VXLAN_LEN..self.end]
    }

    /// Adds a tag that is as the outer one, or zero, if there is room.
    pub fn push_tag(&mut self) {
        if self.start < TAG_LEN + VXLAN_LEN {
            return;
        }
        let tag = if self.has_tag() { be16(self.frame(), MACS_LEN + 2) } else { 0 };
        let from = self.start;
        self.start -= TAG_LEN;
        self.buffer.copy_within(from..from + MACS_LEN, self.start);
        let at = self.start + MACS_LEN;
        self.buffer[at..at + 2].copy_from_slice(&ETH_VLAN.to_be_bytes());
        self.buffer[at + 2..at + 4].copy_from_slice(&tag.to_be_bytes());
    }

    /// Removes the outer tag, if there is one.
    pub fn pop_vlan(&mut self) {
        if self.has_tag() {
            self.buffer.copy_within(self.start..self.start + MACS_LEN, self.start + TAG_LEN);
            self.start += TAG_LEN;
        }
    }

    /// Changes the id of the outer tag, if there is one; its priority stays.
    pub fn set_vlan(&mut self, id: u16) {
        if self.has_tag() {
            let tag = be16(self.frame(), MACS_LEN + 2) & !0xfff | id & 0xfff;
            let at = self.start + MACS_LEN + 2;
            self.buffer[at..at + 2].copy_from_slice(&tag.to_be_bytes());
        }
    }

    /// The id of the outer tag with [`VLAN_PRESENT`], or 0.
    #[must_use]
    pub fn vlan(&self) -> u16 {
        if self.has_tag() { be16(self.frame(), MACS_LEN + 2) & 0xfff | VLAN_PRESENT } else { 0 }
    }

    fn has_tag(&self) -> bool {
        let frame = self.frame();
        frame.len() >= MACS_LEN + TAG_LEN + 2 && frame[MACS_LEN..MACS_LEN + 2] == ETH_VLAN.to_be_bytes()
    }

    fn has_priority_tag(&self) -> bool {
        self.has_tag() && be16(self.frame(), MACS_LEN + 2) & 0xfff == 0
    }

    /// The header fields. What a frame is too short for is zero.
    #[must_use]
    pub fn fields(&self, in_port: PortNo, tunnel_id: u64) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        Field::InPort.write(&mut words, in_port.0.into());
        Field::TunnelId.write(&mut words, tunnel_id.into());
        let frame = self.frame();
        let mut at = MACS_LEN;
        Field::Vlan.write(&mut words, self.vlan().into());
        if self.has_tag() {
            at += TAG_LEN;
        }
        let eth_type = be16(frame, at);
        Field::EthType.write(&mut words, eth_type.into());
        let payload = frame.get(at + 2..).unwrap_or(&[]);
        match eth_type {
            ETH_IPV4 => ipv4_fields(payload, &mut words),
            ETH_IPV6 => ipv6_fields(payload, &mut words),
            _ => {}
        }
        words
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |pair| u16::from_be_bytes([pair[0], pair[1]]))
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u128::from(byte))
}

fn ipv4_fields(ip: &[u8], words: &mut [u64; WORDS]) {
    let header = usize::from(ip.first().copied().unwrap_or(0) & 0xf) * 4;
    if ip.len() < header || header < 20 {
        return;
    }
    Field::IpSrc.write(words, number(&ip[12..16]));
    Field::IpDst.write(words, number(&ip[16..20]));
    Field::IpProto.write(words, ip[9].into());
    // Later fragments have no ports.
    if be16(ip, 6) & 0x1fff == 0 {
        transport_fields(ip[9], &ip[header..], words);
    }
}

/// Longest chain of extension headers that is followed.
const EXTENSIONS_MAX: usize = 8;

fn ipv6_fields(ip: &[u8], words: &mut [u64; WORDS]) {
    if ip.len() < 40 {
        return;
    }
    Field::IpSrc.write(words, number(&ip[8..24]));
    Field::IpDst.write(words, number(&ip[24..40]));
    let (mut protocol, mut rest) = (ip[6], &ip[40..]);
    for _ in 0..EXTENSIONS_MAX {
        // Hop-by-hop, routing, fragment, destination options (RFC 8200, section 4).
        let len = match protocol {
            0 | 43 | 60 if rest.len() >= 8 => (usize::from(rest[1]) + 1) * 8,
            44 if rest.len() >= 8 => 8,
            _ => break,
        };
        let later_fragment = protocol == 44 && be16(rest, 2) & 0xfff8 != 0;
        protocol = rest[0];
        rest = rest.get(len..).unwrap_or(&[]);
        if later_fragment {
            Field::IpProto.write(words, protocol.into());
            return;
        }
    }
    Field::IpProto.write(words, protocol.into());
    transport_fields(protocol, rest, words);
}

fn transport_fields(protocol: u8, payload: &[u8], words: &mut [u64; WORDS]) {
    let (first, second) = match (protocol, payload) {
        (PROTO_TCP | PROTO_UDP, [a, b, c, d, ..]) => {
            (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))
        }
        (PROTO_ICMP | PROTO_ICMPV6, [kind, code, ..]) => (u16::from(*kind), u16::from(*code)),
        _ => return,
    };
    Field::TpSrc.write(words, first.into());
    Field::TpDst.write(words, second.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_have_fields_and_can_be_tagged(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut packet = Packet::default();
            if packet.load(&bytes) {
                let before = packet.fields(PortNo(1), 2);
                let outer = packet.vlan();
                packet.push_tag();
                prop_assert_eq!(packet.vlan(), outer | VLAN_PRESENT);
                packet.set_vlan(0x123);
                let tagged = packet.fields(PortNo(1), 2);
                prop_assert_eq!(Field::Vlan.read(&tagged), 0x1123);
                packet.set_vlan(0x456);
                prop_assert_eq!(Field::Vlan.read(&packet.fields(PortNo(1), 2)), 0x1456);
                packet.pop_vlan();
                prop_assert_eq!(packet.fields(PortNo(1), 2), before);
                prop_assert!(bytes.ends_with(&packet.frame()[MACS_LEN..]));
                prop_assert_eq!(&packet.encapsulated(0x01_0203)[..8], &[8, 0, 0, 0, 1, 2, 3, 0]);
            }
        }

        /// OpenFlow 1.4, section 5.12.1: what is not set is as in the tag behind.
        #[test]
        fn a_tag_that_is_pushed_has_the_priority_of_the_one_behind_it(tag: u16, id in 0_u16..4096) {
            let mut frame = vec![0; 12];
            frame.extend([[0x81, 0], tag.to_be_bytes(), [8, 0]].concat());
            let mut packet = Packet::default();
            prop_assert!(packet.load(&frame));
            packet.push_tag();
            prop_assert_eq!(be16(packet.frame(), MACS_LEN + 2), tag);
            packet.set_vlan(id);
            prop_assert_eq!(be16(packet.frame(), MACS_LEN + 2), tag & 0xf000 | id);
            prop_assert_eq!(&packet.frame()[MACS_LEN + TAG_LEN..], &frame[MACS_LEN..]);
        }

        #[test]
        fn ip_packets_of_any_content_are_read_within_bounds(
            v6: bool, bytes in proptest::collection::vec(any::<u8>(), 0..120),
        ) {
            let mut frame = vec![0; 12];
            frame.extend_from_slice(&if v6 { ETH_IPV6 } else { ETH_IPV4 }.to_be_bytes());
            frame.extend_from_slice(&bytes);
            let mut packet = Packet::default();
            if packet.load(&frame) {
                let _ = packet.fields(PortNo(1), 0);
            }
        }
    }
}
