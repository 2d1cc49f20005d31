//! Frames of the simulated clients and servers: UDP, and TCP as far as a NAT looks at it. Each carries its number.

use std::net::Ipv4Addr;

use flow::Protocol;
use flow::steer::Tag;

/// An address and a port.
pub(crate) type End = (Ipv4Addr, u16);

/// Bytes of Ethernet addresses and type.
const ETHERNET: usize = 14;
/// Bytes of the tag between switch and worker.
const TAG: usize = 4;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) protocol: Protocol,
    pub(crate) source: End,
    pub(crate) destination: End,
    /// The number of the packet.
    pub(crate) number: u64,
}

/// An untagged frame.
pub(crate) fn frame(protocol: Protocol, source: End, destination: End, flags: u8, number: u64) -> Vec<u8> {
    let mut payload = Vec::with_capacity(28);
    payload.extend_from_slice(&source.1.to_be_bytes());
    payload.extend_from_slice(&destination.1.to_be_bytes());
    if protocol == Protocol::Tcp {
        payload.extend_from_slice(&[0; 8]);
        payload.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        // A checksum of 0: the sender made none.
        payload.extend_from_slice(&[0, 16, 0, 0]);
    }
    payload.extend_from_slice(&number.to_be_bytes());
    let (from, to) = (source.0.into(), destination.0.into());
    let mut frame = dataplane::packet::build_ip(Tag::ToOutside, protocol.number(), from, to, &payload);
    frame.drain(12..12 + TAG);
    frame
}

/// The tag of a frame between switch and worker.
pub(crate) fn tag(frame: &[u8]) -> Option<Tag> {
    if frame.get(12..14)? != [0x81, 0x00] {
        return None;
    }
    Tag::from_vlan(u16::from_be_bytes([*frame.get(14)?, *frame.get(15)?]) & 0xfff)
}

/// Reads a frame, tagged or not; nothing for markers and errors.
pub(crate) fn read(frame: &[u8]) -> Option<Seen> {
    let tagged = frame.get(12..14)? == [0x81, 0x00];
    let ip = frame.get(ETHERNET + if tagged { TAG } else { 0 }..)?;
    let protocol = Protocol::from_number(*ip.get(9)?)?;
    let data = match protocol {
        Protocol::Udp => 28,
        Protocol::Tcp => 40,
        Protocol::Icmp | Protocol::Icmp6 => return None,
    };
    let address = |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?));
    let port = |at: usize| Some(u16::from_be_bytes(*ip.get(at..)?.first_chunk()?));
    Some(Seen {
        protocol,
        source: (address(12)?, port(20)?),
        destination: (address(16)?, port(22)?),
        number: u64::from_be_bytes(*ip.get(data..)?.first_chunk()?),
    })
}

/// The move whose marker (or cut) a frame is.
pub(crate) fn is_marker(frame: &[u8]) -> bool {
    let tagged = frame.get(12..14) == Some(&[0x81, 0x00]);
    frame.get(ETHERNET + if tagged { TAG } else { 0 } + 9) == Some(&flow::steer::MARKER_PROTOCOL)
}

/// Changes the source port, as a worker with a fault would.
pub(crate) fn bend_source_port(frame: &mut [u8]) {
    if let Some(low) = frame.get_mut(ETHERNET + TAG + 21) {
        *low ^= 1;
    }
}
