//! Ethernet, 802.1Q, IPv4, ICMP, TCP and UDP headers: bounds-checked parsing, and rewriting in place.
//!
//! Addresses and ports are plain numbers in host byte order. Checksums are updated incrementally
//! (RFC 1624, equation 3), so a packet that was damaged before stays damaged. Nothing here allocates.

pub mod by_port;

use flow::Protocol;
use flow::steer::{MARKER_PROTOCOL, MarkerBody, Tag};

/// Where the 802.1Q tag control information is in a frame.
const TCI: usize = 14;
/// Where the IP header starts: behind Ethernet addresses, tag and type.
pub const IP: usize = 18;
/// IPv4 header without options.
pub const IPV4_LEN: usize = 20;

const TYPE_VLAN: u16 = 0x8100;
const TYPE_IPV4: u16 = 0x0800;

/// TCP flags that matter to session tracking.
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Opens.
    pub const SYN: u8 = 0x02;
    /// Resets.
    pub const RST: u8 = 0x04;
    /// Acknowledges.
    pub const ACK: u8 = 0x10;
}

/// Why a frame cannot be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Too short, or a field contradicts another.
    Malformed,
    /// A protocol, fragment or message type that this network function does not carry.
    Unsupported,
    /// A checksum over a header that we must trust is wrong.
    Checksum,
}

/// Addresses, ports and offsets of one IPv4 packet. For ICMP queries both ports are the identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// TCP, UDP or ICMP.
    pub protocol: Protocol,
    /// Source address.
    pub source: u32,
    /// Destination address.
    pub destination: u32,
    /// Source port, or the identifier.
    pub source_port: u16,
    /// Destination port, or the identifier.
    pub destination_port: u16,
    /// Total length by the IP header.
    pub ip_len: u16,
    /// Where the transport header starts in the frame.
    pub transport: u16,
    /// Time to live.
    pub ttl: u8,
    /// TCP flags, 0 for others.
    pub tcp_flags: u8,
}

/// An ICMP error: its own IP header, and the packet it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Of the error itself; ports are 0.
    pub outer: Headers,
    /// Of the packet it is about, as far as it is quoted.
    pub inner: Headers,
    /// Where the quoted IP header starts in the frame.
    pub inner_ip: u16,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A packet of a flow.
    Flow(Headers),
    /// An ICMP error about a packet of a flow.
    Error(IcmpError),
    /// A marker or a cut, by the tag.
    Marker(MarkerBody, u32),
}

/// A frame from the switch, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What the switch says about it.
    pub tag: Tag,
    /// What is in it.
    pub content: Content,
}

/// Which end of a packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Source address and port.
    Source,
    /// Destination address and port.
    Destination,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// Reads a tagged frame.
///
/// # Errors
/// [`Reject`]; the frame is to be counted and dropped.
pub fn parse(frame: &[u8]) -> Result<Parsed, Reject> {
    if u16_at(frame, 12) != Some(TYPE_VLAN) {
        return Err(Reject::Malformed);
    }
    let tag = u16_at(frame, TCI).and_then(Tag::from_vlan).ok_or(Reject::Malformed)?;
    if u16_at(frame, 16) != Some(TYPE_IPV4) {
        return Err(Reject::Unsupported);
    }
    let ip = parse_ip(frame, IP, true)?;
    if ones_complement(&frame[IP..usize::from(ip.transport)]) != 0xffff {
        return Err(Reject::Checksum);
    }
    Ok(Parsed { tag, content: parse_content(frame, ip)? })
}

/// What an IP header says.
struct Ip {
    protocol: u8,
    source: u32,
    destination: u32,
    len: u16,
    transport: u16,
    ttl: u8,
}

/// Reads an IPv4 header. A `whole` packet must lie in the frame; of a quoted one only the beginning must.
fn parse_ip(frame: &[u8], at: usize, whole: bool) -> Result<Ip, Reject> {
    let header: &[u8; IPV4_LEN] = frame.get(at..).and_then(<[u8]>::first_chunk).ok_or(Reject::Malformed)?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    let len = u16::from_be_bytes([header[2], header[3]]);
    if header[0] >> 4 != 4 || header_len < IPV4_LEN || usize::from(len) < header_len {
        return Err(Reject::Malformed);
    }
    let end = if whole { usize::from(len) } else { header_len };
    if frame.len() < at + end {
        return Err(Reject::Malformed);
    }
    // Any fragment, the first one too: only reassembly could give each its ports.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0
        && (whole || header[7] != 0 || header[6] & 0x1f != 0)
    {
        return Err(Reject::Unsupported);
    }
    Ok(Ip {
        protocol: header[9],
        source: u32::from_be_bytes([header[12], header[13], header[14], header[15]]),
        destination: u32::from_be_bytes([header[16], header[17], header[18], header[19]]),
        len,
        transport: u16::try_from(at + header_len).map_err(|_| Reject::Malformed)?,
        ttl: header[8],
    })
}

fn parse_content(frame: &[u8], ip: Ip) -> Result<Content, Reject> {
    let end = IP + usize::from(ip.len);
    let payload = &frame[usize::from(ip.transport)..end];
    if ip.protocol == MARKER_PROTOCOL {
        let body = MarkerBody::decode(payload).ok_or(Reject::Unsupported)?;
        return Ok(Content::Marker(body, ip.source));
    }
    let protocol = Protocol::from_number(ip.protocol).ok_or(Reject::Unsupported)?;
    match protocol {
        Protocol::Icmp => parse_icmp(frame, payload, &ip),
        Protocol::Tcp if payload.len() < 20 => Err(Reject::Malformed),
        Protocol::Tcp | Protocol::Udp => ports(payload, &ip, protocol).map(Content::Flow),
        Protocol::Icmp6 => Err(Reject::Unsupported),
    }
}

/// Ports of a transport header of which at least eight bytes are there.
fn ports(payload: &[u8], ip: &Ip, protocol: Protocol) -> Result<Headers, Reject> {
    let first: &[u8; 8] = payload.first_chunk().ok_or(Reject::Malformed)?;
    let (source_port, destination_port) = match protocol {
        Protocol::Icmp | Protocol::Icmp6 => {
            let id = u16::from_be_bytes([first[4], first[5]]);
            (id, id)
        }
        Protocol::Tcp | Protocol::Udp => {
            (u16::from_be_bytes([first[0], first[1]]), u16::from_be_bytes([first[2], first[3]]))
        }
    };
    let tcp_flags = if protocol == Protocol::Tcp { payload.get(13).copied().unwrap_or(0) } else { 0 };
    Ok(Headers {
        protocol,
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        ip_len: ip.len,
        transport: ip.transport,
        ttl: ip.ttl,
        tcp_flags,
    })
}

fn parse_icmp(frame: &[u8], payload: &[u8], ip: &Ip) -> Result<Content, Reject> {
    let kind = *payload.first().ok_or(Reject::Malformed)?;
    match kind {
        0 | 8 | 13 | 14 => ports(payload, ip, Protocol::Icmp).map(Content::Flow),
        3 | 11 | 12 => parse_error(frame, payload, ip).map(Content::Error),
        _ => Err(Reject::Unsupported),
    }
}

fn parse_error(frame: &[u8], payload: &[u8], ip: &Ip) -> Result<IcmpError, Reject> {
    // RFC 5508, REQ-3: an error with a bad checksum of its own or of the quoted IP header is dropped.
    if ones_complement(payload) != 0xffff {
        return Err(Reject::Checksum);
    }
    let outer = Headers { source_port: 0, destination_port: 0, ..ports(payload, ip, Protocol::Icmp)? };
    let inner_ip = usize::from(ip.transport) + 8;
    let bounded = &frame[..IP + usize::from(ip.len)];
    let quoted = parse_ip(bounded, inner_ip, false)?;
    if ones_complement(&frame[inner_ip..usize::from(quoted.transport)]) != 0xffff {
        return Err(Reject::Checksum);
    }
    let protocol = Protocol::from_number(quoted.protocol).ok_or(Reject::Unsupported)?;
    let rest = &bounded[usize::from(quoted.transport)..];
    // An error about an error is never answered nor carried (RFC 1122, section 3.2.2), nor is ICMPv6 in IPv4.
    let carried = match protocol {
        Protocol::Icmp => matches!(rest.first(), Some(0 | 8 | 13 | 14)),
        Protocol::Icmp6 => false,
        Protocol::Tcp | Protocol::Udp => true,
    };
    if !carried {
        return Err(Reject::Unsupported);
    }
    let inner = ports(rest, &quoted, protocol)?;
    Ok(IcmpError { outer, inner, inner_ip: ip.transport + 8 })
}

/// The ones' complement sum of 16-bit words; an odd last byte counts as the high half.
#[must_use]
pub fn ones_complement(bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks::<2>();
    let mut sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    if let [last] = rest {
        sum += u32::from(*last) << 8;
    }
    fold(sum)
}

fn fold(mut sum: u32) -> u16 {
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// A change of words under a checksum. Source: RFC 1624, section 3, equation 3.
#[derive(Clone, Copy, Debug, Default)]
struct Delta(u32);

impl Delta {
    fn word(self, old: u16, new: u16) -> Self {
        Self(self.0 + u32::from(!old) + u32::from(new))
    }

    fn long(self, old: u32, new: u32) -> Self {
        self.word((old >> 16) as u16, (new >> 16) as u16).word(old as u16, new as u16)
    }

    fn apply(self, checksum: u16) -> u16 {
        !fold(u32::from(!checksum) + self.0)
    }
}

/// Sets the tag, leaving its priority bits.
pub fn set_tag(frame: &mut [u8], tag: Tag) {
    let priority = u16_at(frame, TCI).unwrap_or(0) & 0xf000;
    put_u16(frame, TCI, priority | tag.vlan());
}

/// Rewrites one end of a packet of a flow and takes one hop from its time to live.
///
/// `headers` must come from [`parse`] of this frame and have a time to live above 1.
pub fn translate(frame: &mut [u8], headers: &Headers, end: End, address: u32, port: u16) {
    let (old_address, old_port) = match end {
        End::Source => (headers.source, headers.source_port),
        End::Destination => (headers.destination, headers.destination_port),
    };
    rewrite_ip(frame, IP, end, old_address, address, true);
    rewrite_transport(frame, headers, end, Delta::default().long(old_address, address), old_port, port);
}

/// Rewrites an ICMP error: `outer_end` of the error gets `outer_address`; of the quoted packet, the end
/// opposite to the direction of the error gets `address` and `port`.
pub fn translate_error(
    frame: &mut [u8],
    error: &IcmpError,
    outer_end: End,
    outer_address: u32,
    to: (u32, u16),
) {
    let (old_outer, inner_end) = match outer_end {
        End::Source => (error.outer.source, End::Destination),
        End::Destination => (error.outer.destination, End::Source),
    };
    let (old_address, old_port) = match inner_end {
        End::Source => (error.inner.source, error.inner.source_port),
        End::Destination => (error.inner.destination, error.inner.destination_port),
    };
    rewrite_ip(frame, IP, outer_end, old_outer, outer_address, true);
    rewrite_ip(frame, usize::from(error.inner_ip), inner_end, old_address, to.0, false);
    let end = IP + usize::from(error.outer.ip_len);
    // Only what is quoted may be touched: Ethernet padding behind it is not part of the packet.
    let quoted = &mut frame[..end];
    rewrite_transport(
        quoted,
        &error.inner,
        inner_end,
        Delta::default().long(old_address, to.0),
        old_port,
        to.1,
    );
    let icmp = usize::from(error.outer.transport);
    put_u16(quoted, icmp + 2, 0);
    let sum = !ones_complement(&quoted[icmp..]);
    put_u16(quoted, icmp + 2, sum);
}

fn rewrite_ip(frame: &mut [u8], at: usize, end: End, old: u32, new: u32, hop: bool) {
    let mut delta = Delta::default().long(old, new);
    let place = match end {
        End::Source => at + 12,
        End::Destination => at + 16,
    };
    put_u32(frame, place, new);
    if hop {
        let word = u16_at(frame, at + 8).unwrap_or(0);
        let less = word.wrapping_sub(0x0100);
        put_u16(frame, at + 8, less);
        delta = delta.word(word, less);
    }
    if let Some(sum) = u16_at(frame, at + 10) {
        put_u16(frame, at + 10, delta.apply(sum));
    }
}

fn rewrite_transport(frame: &mut [u8], headers: &Headers, end: End, addresses: Delta, old: u16, new: u16) {
    let at = usize::from(headers.transport);
    let (port_at, sum_at, delta) = match (headers.protocol, end) {
        // The identifier is the port, and the checksum knows no addresses.
        (Protocol::Icmp, _) => (at + 4, at + 2, Delta::default()),
        (Protocol::Tcp, End::Source) => (at, at + 16, addresses),
        (Protocol::Tcp, End::Destination) => (at + 2, at + 16, addresses),
        (Protocol::Udp | Protocol::Icmp6, End::Source) => (at, at + 6, addresses),
        (Protocol::Udp | Protocol::Icmp6, End::Destination) => (at + 2, at + 6, addresses),
    };
    put_u16(frame, port_at, new);
    let Some(sum) = u16_at(frame, sum_at) else { return };
    let udp = headers.protocol == Protocol::Udp;
    if udp && sum == 0 {
        return; // The sender made no checksum.
    }
    let mut updated = delta.word(old, new).apply(sum);
    if udp && updated == 0 {
        updated = 0xffff; // RFC 768: a computed zero is sent as all ones.
    }
    put_u16(frame, sum_at, updated);
}

/// Makes the checksum of a TCP or UDP packet whose sender left it to the network card: it holds the sum of the pseudo
/// header alone. Another checksum is left as it is, and one that is right although it looks so comes out the same.
pub fn complete_checksum(frame: &mut [u8]) {
    if u16_at(frame, 12) != Some(TYPE_VLAN) || u16_at(frame, 16) != Some(TYPE_IPV4) {
        return;
    }
    let Ok(ip) = parse_ip(frame, IP, true) else { return };
    let (transport, end) = (usize::from(ip.transport), IP + usize::from(ip.len));
    let offset = match Protocol::from_number(ip.protocol) {
        Some(Protocol::Tcp) => 16,
        Some(Protocol::Udp) => 6,
        _ => return,
    };
    let len = end - transport;
    if len < offset + 2 {
        return;
    }
    let address_sum = u32::from(ones_complement(&frame[IP + 12..IP + 20]));
    let pseudo = fold(address_sum + u32::from(ip.protocol) + len as u32);
    let at = transport + offset;
    if u16_at(frame, at) != Some(pseudo) {
        return;
    }
    let sum = !ones_complement(&frame[transport..end]);
    put_u16(frame, at, if sum == 0 { 0xffff } else { sum });
}

/// A complete tagged frame with an IPv4 packet, for what the worker sends of its own.
#[must_use]
pub fn build_ip(tag: Tag, protocol: u8, source: u32, destination: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; IP + IPV4_LEN + payload.len()];
    // Locally administered addresses; the switch sets the real ones.
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    put_u16(&mut frame, 12, TYPE_VLAN);
    put_u16(&mut frame, TCI, tag.vlan());
    put_u16(&mut frame, 16, TYPE_IPV4);
    frame[IP] = 0x45;
    put_u16(&mut frame, IP + 2, u16::try_from(IPV4_LEN + payload.len()).unwrap_or(u16::MAX));
    put_u16(&mut frame, IP + 6, 0x4000);
    frame[IP + 8] = 64;
    frame[IP + 9] = protocol;
    put_u32(&mut frame, IP + 12, source);
    put_u32(&mut frame, IP + 16, destination);
    let sum = !ones_complement(&frame[IP..IP + IPV4_LEN]);
    put_u16(&mut frame, IP + 10, sum);
    frame[IP + IPV4_LEN..].copy_from_slice(payload);
    frame
}

/// An ICMP destination unreachable, code host (1), that quotes as much of the packet as RFC 792 asks for.
#[must_use]
pub fn build_unreachable(tag: Tag, source: u32, offender: &[u8], headers: &Headers) -> Vec<u8> {
    let quoted_end = (usize::from(headers.transport) + 8).min(offender.len());
    let mut icmp = vec![3, 1, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&offender[IP.min(quoted_end)..quoted_end]);
    let sum = !ones_complement(&icmp);
    put_u16(&mut icmp, 2, sum);
    build_ip(tag, Protocol::Icmp.number(), source, headers.source, &icmp)
}

/// The longest prefix of the frame that is Ethernet and IP, without padding.
#[must_use]
pub fn ip_bytes(frame: &[u8]) -> Option<&[u8]> {
    let len = usize::from(u16_at(frame, IP + 2)?);
    frame.get(IP..IP + len)
}

/// The destination address of a frame that carries IPv4.
#[must_use]
pub fn destination(frame: &[u8]) -> Option<u32> {
    u32_at(frame, IP + 16)
}

#[cfg(test)]
#[path = "tests/packet.rs"]
mod tests;
