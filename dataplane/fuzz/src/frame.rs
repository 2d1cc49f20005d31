//! Frames from the switch: parsing and rewriting, against checksums that are made by full computation.

use dataplane::packet::{
    self, Content, End, Headers, IP, IPV4_LEN, IcmpError, Parsed, complete_checksum, ones_complement, parse,
    set_tag, translate, translate_error,
};
use flow::steer::{Side, Tag};
use flow::{Protocol, SiteId};

/// What is rewritten to.
const TO: (u32, u16) = (0xc633_6407, 4_711);

/// The first byte says what is mended before the frame is looked at, so that inputs get past checksums.
pub fn packet(bytes: &[u8]) {
    let Some((&how, frame)) = bytes.split_first() else { return };
    let mut frame = frame.to_vec();
    if how & 1 != 0 {
        mend_head(&mut frame);
    }
    if how & 2 != 0 {
        mend_checksums(&mut frame);
    }
    let end = if how & 4 == 0 { End::Source } else { End::Destination };
    complete(&frame);
    let Ok(parsed) = parse(&frame) else { return };
    retag(&frame, &parsed);
    match parsed.content {
        Content::Flow(headers) if headers.ttl > 1 => {
            rewrite(&frame, &headers, end);
            explain(&frame, &headers);
        }
        Content::Error(error) if error.outer.ttl > 1 => rewrite_error(&frame, &error, end),
        Content::Marker(body, _) => assert_eq!(flow::steer::MarkerBody::decode(&body.encode()), Some(body)),
        Content::Flow(_) | Content::Error(_) => {}
    }
}

/// A tag and the type of IPv4.
pub(crate) fn mend_head(frame: &mut Vec<u8>) {
    if frame.len() < IP {
        frame.resize(IP, 0);
    }
    let tag = Tag::Direct(if frame[0] & 1 == 0 { Side::Inside } else { Side::Outside }, SiteId(frame[1]));
    frame[12..14].copy_from_slice(&[0x81, 0]);
    frame[14..16].copy_from_slice(&tag.vlan().to_be_bytes());
    frame[16..18].copy_from_slice(&[8, 0]);
}

/// Makes the checksums of the IP header, of TCP, UDP and ICMP, and of a quoted IP header right, where these are.
pub(crate) fn mend_checksums(frame: &mut [u8]) {
    let Some(transport) = mend_ip(frame, IP) else { return };
    let len = usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]));
    let Some(place) = checksum_place(frame[IP + 9]).map(|at| transport + at) else { return };
    if place + 2 > IP + len || IP + len > frame.len() {
        return;
    }
    if frame[IP + 9] == 1 && matches!(frame[transport], 3 | 11 | 12) && transport + 8 < frame.len() {
        mend_ip(frame, transport + 8);
    }
    frame[place..place + 2].fill(0);
    if let Some(sum) = transport_sum(frame) {
        frame[place..place + 2].copy_from_slice(&(!sum).to_be_bytes());
    }
}

/// Where the transport header is, if the IP header is whole.
fn mend_ip(frame: &mut [u8], at: usize) -> Option<usize> {
    let header_len = usize::from(frame.get(at)? & 0xf) * 4;
    let header = frame.get_mut(at..at + header_len).filter(|header| header.len() >= IPV4_LEN)?;
    header[10..12].fill(0);
    let sum = !ones_complement(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    Some(at + header_len)
}

fn checksum_place(protocol: u8) -> Option<usize> {
    match protocol {
        1 => Some(2),
        6 => Some(16),
        17 => Some(6),
        _ => None,
    }
}

/// The sum over transport header, payload and, but for ICMP, pseudo header; all ones when the checksum is right.
fn transport_sum(frame: &[u8]) -> Option<u16> {
    let ip = packet::ip_bytes(frame)?;
    let header_len = usize::from(ip.first()? & 0xf) * 4;
    let mut bytes = ip.get(header_len..)?.to_vec();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    if ip[9] != 1 {
        bytes.extend_from_slice(ip.get(12..20)?);
        bytes.extend([0, ip[9]]);
        bytes.extend(((ip.len() - header_len) as u16).to_be_bytes());
    }
    Some(ones_complement(&bytes))
}

/// Whether the receiver of a frame would find its transport checksum right; UDP may go without.
pub(crate) fn transport_is_right(frame: &[u8], headers: &Headers) -> bool {
    let at = usize::from(headers.transport);
    let none = headers.protocol == Protocol::Udp && frame[at + 6..at + 8] == [0, 0];
    none || transport_sum(frame) == Some(0xffff)
}

fn complete(frame: &[u8]) {
    let before = parse(frame);
    let mut completed = frame.to_vec();
    complete_checksum(&mut completed);
    assert_eq!(parse(&completed).map(|parsed| parsed.content), before.map(|parsed| parsed.content));
    if let Ok(Parsed { content: Content::Flow(headers), .. }) = before {
        let (was, is) = (transport_is_right(frame, &headers), transport_is_right(&completed, &headers));
        assert!(is || !was, "a right checksum became wrong");
        assert!(is || completed == frame, "a checksum was completed and is wrong");
    }
}

fn retag(frame: &[u8], parsed: &Parsed) {
    let mut other = frame.to_vec();
    set_tag(&mut other, Tag::ToClient(SiteId(9)));
    assert_eq!(parse(&other), Ok(Parsed { tag: Tag::ToClient(SiteId(9)), content: parsed.content }));
}

fn rewrite(frame: &[u8], headers: &Headers, end: End) {
    let mut rewritten = frame.to_vec();
    translate(&mut rewritten, headers, end, TO.0, TO.1);
    let mut expected = Headers { ttl: headers.ttl - 1, ..*headers };
    let icmp = headers.protocol == Protocol::Icmp;
    if matches!(end, End::Source) {
        expected.source = TO.0;
    } else {
        expected.destination = TO.0;
    }
    if matches!(end, End::Source) || icmp {
        expected.source_port = TO.1;
    }
    if matches!(end, End::Destination) || icmp {
        expected.destination_port = TO.1;
    }
    assert_eq!(parse(&rewritten).map(|parsed| parsed.content), Ok(Content::Flow(expected)));
    if transport_is_right(frame, headers) {
        assert!(transport_is_right(&rewritten, &expected), "the transport checksum is wrong");
    }
    // Addresses, ports, hops and two checksums; all else is not ours.
    let changed = frame.iter().zip(&rewritten).filter(|(a, b)| a != b).count();
    assert!(changed <= 4 + 2 + 1 + 2 + 2 && rewritten.len() == frame.len());
}

fn rewrite_error(frame: &[u8], error: &IcmpError, end: End) {
    let mut rewritten = frame.to_vec();
    translate_error(&mut rewritten, error, end, TO.0 ^ 1, TO);
    let mut expected = *error;
    expected.outer.ttl -= 1;
    let icmp = error.inner.protocol == Protocol::Icmp;
    let inner = &mut expected.inner;
    if matches!(end, End::Source) {
        expected.outer.source = TO.0 ^ 1;
        (inner.destination, inner.destination_port) = TO;
    } else {
        expected.outer.destination = TO.0 ^ 1;
        (inner.source, inner.source_port) = TO;
    }
    if icmp {
        (inner.source_port, inner.destination_port) = (TO.1, TO.1);
    }
    // The parser looks at the checksums of the error and of both IP headers.
    assert_eq!(parse(&rewritten).map(|parsed| parsed.content), Ok(Content::Error(expected)));
}

/// What we send of our own about a packet is understood by others like us.
fn explain(frame: &[u8], headers: &Headers) {
    let error = packet::build_unreachable(Tag::ToOutside, TO.0, frame, headers);
    let Ok(Parsed { content: Content::Error(read), .. }) = parse(&error) else {
        panic!("an error about a packet is none: {:?}", parse(&error))
    };
    assert_eq!((read.outer.source, read.outer.destination), (TO.0, headers.source));
    let ports = |headers: &Headers| (headers.source, headers.source_port, headers.destination_port);
    assert_eq!(ports(&read.inner), ports(headers));
}
