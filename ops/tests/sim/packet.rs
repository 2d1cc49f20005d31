//! Frames of the simulated clients and servers: UDP, ICMP, and TCP as far as a NAT looks at it. Each carries its number.

use std::net::Ipv4Addr;

use flow::Protocol;
use flow::steer::Tag;

/// An address and a port.
pub(crate) type End = (Ipv4Addr, u16);

/// Bytes of Ethernet addresses and type.
const ETHERNET: usize = 14;
/// Bytes of the tag between switch and worker.
const TAG: usize = 4;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// Bytes of an IPv4 header without options.
const IP_LEN: usize = 20;
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
/// Of [`UNREACHABLE`].
const FRAGMENTATION_NEEDED: u8 = 4;
/// What goes by port has so much around the message: see `dataplane::packet::by_port`.
const BY_PORT_LEN: usize = 12;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) protocol: Protocol,
    /// For ICMP, the identifier is the client's port.
    pub(crate) source: End,
    pub(crate) destination: End,
    /// The number of the packet.
    pub(crate) number: u64,
    /// Of an error: the packet that it quotes.
    pub(crate) quoted: Option<(End, End)>,
    /// An ICMP message that goes by port from one worker to another.
    pub(crate) by_port: bool,
}

/// A packet of a flow.
fn transport(protocol: Protocol, source: End, destination: End, flags: u8, number: u64) -> Vec<u8> {
    let mut payload = Vec::with_capacity(28);
    if protocol == Protocol::Icmp {
        // A server's ports are below those of clients.
        let reply = source.1 < destination.1;
        let (kind, identifier) = if reply { (ECHO_REPLY, destination.1) } else { (ECHO_REQUEST, source.1) };
        payload.extend_from_slice(&[kind, 0, 0, 0]);
        payload.extend_from_slice(&identifier.to_be_bytes());
        payload.extend_from_slice(&[0; 2]);
        payload.extend_from_slice(&number.to_be_bytes());
        return checked(payload);
    }
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
    payload
}

/// An ICMP message with its checksum.
fn checked(mut message: Vec<u8>) -> Vec<u8> {
    let sum = !dataplane::packet::ones_complement(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An untagged frame.
pub(crate) fn frame(protocol: Protocol, source: End, destination: End, flags: u8, number: u64) -> Vec<u8> {
    ip(protocol, source.0, destination.0, &transport(protocol, source, destination, flags, number))
}

/// "Fragmentation needed" about a packet, from a router or a host.
pub(crate) fn error(
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: Protocol,
    about: (End, End),
    number: u64,
) -> Vec<u8> {
    let (source, destination) = about;
    let quoted =
        ip(protocol, source.0, destination.0, &transport(protocol, source, destination, ACK, number));
    let mut message = vec![UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0, 0x05, 0x14];
    message.extend_from_slice(&quoted[ETHERNET..]);
    ip(Protocol::Icmp, from, to, &checked(message))
}

fn ip(protocol: Protocol, from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let number = protocol.number();
    let mut frame = dataplane::packet::build_ip(Tag::ToOutside, number, from.into(), to.into(), payload);
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

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(*bytes.get(at..)?.first_chunk::<4>()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a frame, tagged or not; nothing for markers.
pub(crate) fn read(frame: &[u8]) -> Option<Seen> {
    let tagged = frame.get(12..14)? == [0x81, 0x00];
    let ip = frame.get(ETHERNET + if tagged { TAG } else { 0 }..)?;
    let seen = read_ip(ip)?;
    if seen.protocol != Protocol::Udp || seen.source.1 != 0 {
        return Some(seen);
    }
    let mut message = ip.to_vec();
    message.drain(IP_LEN..IP_LEN + BY_PORT_LEN);
    message[9] = Protocol::Icmp.number();
    Some(Seen { by_port: true, ..read_ip(&message)? })
}

fn read_ip(ip: &[u8]) -> Option<Seen> {
    let protocol = Protocol::from_number(*ip.get(9)?)?;
    let (from, to) = (address(ip, 12)?, address(ip, 16)?);
    let seen = |source, destination, number| Seen {
        protocol,
        source: (from, source),
        destination: (to, destination),
        number,
        quoted: None,
        by_port: false,
    };
    let ports = (word(ip, IP_LEN)?, word(ip, IP_LEN + 2)?);
    match (protocol, ip.get(IP_LEN)?) {
        (Protocol::Udp, _) => Some(seen(ports.0, ports.1, number(ip, 28)?)),
        (Protocol::Tcp, _) => Some(seen(ports.0, ports.1, number(ip, 40)?)),
        (Protocol::Icmp, &ECHO_REQUEST) => Some(seen(word(ip, 24)?, 0, number(ip, 28)?)),
        (Protocol::Icmp, &ECHO_REPLY) => Some(seen(0, word(ip, 24)?, number(ip, 28)?)),
        (Protocol::Icmp, &UNREACHABLE) => {
            let inner = read_ip(ip.get(28..)?)?;
            let quoted = Some((inner.source, inner.destination));
            Some(Seen { quoted, ..seen(0, 0, inner.number) })
        }
        (Protocol::Icmp | Protocol::Icmp6, _) => None,
    }
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

/// Gives every packet of a flow the same other source port.
pub(crate) fn map_source_port(frame: &mut [u8], map: impl Fn(u16) -> u16) {
    let at = ETHERNET + TAG + IP_LEN;
    if let Some(port) = word(frame, at) {
        frame[at..at + 2].copy_from_slice(&map(port).to_be_bytes());
    }
}

/// Whether it is TCP or UDP of a flow.
pub(crate) fn has_ports(frame: &[u8]) -> bool {
    read(frame).is_some_and(|seen| seen.protocol != Protocol::Icmp && !seen.by_port)
}
