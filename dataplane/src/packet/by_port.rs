//! ICMP by port. A switch steers TCP and UDP to an outside address that several groups share by port, but cannot see whom an ICMP
//! message is for: the identifier, or the port in the packet that an error quotes. It sends all of them to one worker. That worker
//! puts a message for a group that it does not have into a UDP packet to the very port, and gives it back to the switch, whose rules
//! then lead it where they lead the group's UDP, through moves and all. The worker that serves the group takes it out again.
//!
//! What takes it out acts on it as on an ICMP message from the same remote, which whoever can forge the one could have sent
//! in the first place. The seal keeps other UDP from port 0 from being taken for it.

use flow::Protocol;

use super::{Content, Headers, IP, IPV4_LEN, Ip, Parsed, ones_complement, parse_content, put_u16, u32_at};

/// A UDP header, and the seal.
pub const EXTRA_LEN: usize = 12;

/// RFC 768: no port to answer to. So no flow that a client opened has it.
const FROM_PORT: u16 = 0;

/// The ICMP message of a frame with these headers, in a UDP packet to `port`. `None` when it would be longer than an IP packet may be.
#[must_use]
pub fn wrap(frame: &[u8], headers: &Headers, port: u16, seal: u32) -> Option<Vec<u8>> {
    let (transport, end) = (usize::from(headers.transport), IP + usize::from(headers.ip_len));
    let len = u16::try_from(usize::from(headers.ip_len) + EXTRA_LEN).ok()?;
    let message = frame.get(transport..end)?;
    let udp_len = u16::try_from(message.len() + EXTRA_LEN).ok()?;
    let mut wrapped = Vec::with_capacity(end + EXTRA_LEN);
    wrapped.extend_from_slice(&frame[..transport]);
    // The sender makes no checksum: that of the message stays what it is.
    for word in [FROM_PORT, port, udp_len, 0] {
        wrapped.extend(word.to_be_bytes());
    }
    wrapped.extend(seal.to_be_bytes());
    wrapped.extend_from_slice(message);
    set_ip(&mut wrapped, transport, len, Protocol::Udp);
    Some(wrapped)
}

/// The seal of a packet that may be a wrapped message.
#[must_use]
pub fn seal_of(frame: &[u8], headers: &Headers) -> Option<u32> {
    let is_candidate = headers.protocol == Protocol::Udp && headers.source_port == FROM_PORT;
    is_candidate.then(|| u32_at(frame, usize::from(headers.transport) + 8)).flatten()
}

/// The message that is wrapped in a frame, with its places in that frame. `None` when it is none that is carried.
#[must_use]
pub fn peek(frame: &[u8], parsed: &Parsed, headers: &Headers) -> Option<Parsed> {
    let transport = headers.transport.checked_add(u16::try_from(EXTRA_LEN).ok()?)?;
    if usize::from(transport) > IP + usize::from(headers.ip_len) {
        return None;
    }
    let ip = Ip {
        protocol: Protocol::Icmp.number(),
        source: headers.source,
        destination: headers.destination,
        len: headers.ip_len,
        transport,
        ttl: headers.ttl,
    };
    let content = parse_content(frame, ip).ok()?;
    let port = match content {
        Content::Flow(message) => message.destination_port,
        Content::Error(error) if error.inner.source == headers.destination => error.inner.source_port,
        Content::Error(_) | Content::Marker(..) => return None,
    };
    (port == headers.destination_port).then_some(Parsed { tag: parsed.tag, content })
}

/// Takes the message out, in place. Gives the length of the frame that is left.
#[must_use]
pub fn unwrap(frame: &mut [u8], headers: &Headers) -> usize {
    let (transport, end) = (usize::from(headers.transport), IP + usize::from(headers.ip_len));
    frame.copy_within(transport + EXTRA_LEN..end, transport);
    #[expect(clippy::cast_possible_truncation, reason = "12")]
    set_ip(frame, transport, headers.ip_len - EXTRA_LEN as u16, Protocol::Icmp);
    end - EXTRA_LEN
}

fn set_ip(frame: &mut [u8], transport: usize, len: u16, protocol: Protocol) {
    debug_assert!(transport >= IP + IPV4_LEN, "headers come from a parsed frame");
    put_u16(frame, IP + 2, len);
    frame[IP + 9] = protocol.number();
    put_u16(frame, IP + 10, 0);
    let sum = !ones_complement(&frame[IP..transport]);
    put_u16(frame, IP + 10, sum);
}
