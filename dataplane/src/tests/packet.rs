use super::*;
use etherparse::PacketBuilder;
use flow::SiteId;
use flow::steer::Side;
use proptest::prelude::*;

fn tagged(ip: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(0x8100u16.to_be_bytes());
    frame.extend(Tag::Direct(Side::Inside, SiteId(1)).vlan().to_be_bytes());
    frame.extend(0x0800u16.to_be_bytes());
    frame.extend_from_slice(ip);
    frame
}

fn build(protocol: Protocol, from: ([u8; 4], u16), to: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let ip = PacketBuilder::ipv4(from.0, to.0, 64);
    let mut bytes = Vec::new();
    match protocol {
        Protocol::Udp => ip.udp(from.1, to.1).write(&mut bytes, payload),
        Protocol::Tcp => ip.tcp(from.1, to.1, 7, 1000).syn().write(&mut bytes, payload),
        Protocol::Icmp | Protocol::Icmp6 => ip.icmpv4_echo_request(from.1, 9).write(&mut bytes, payload),
    }
    .unwrap();
    tagged(&bytes)
}

/// Transport checksum over a frame, by full computation; all ones when it is right.
fn transport_sum(frame: &[u8]) -> u16 {
    let ip = ip_bytes(frame).unwrap();
    let header_len = usize::from(ip[0] & 0xf) * 4;
    let mut bytes = ip[header_len..].to_vec();
    if ip[9] != 1 {
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        bytes.extend_from_slice(&ip[12..20]);
        bytes.extend_from_slice(&[0, ip[9]]);
        bytes.extend(((ip.len() - header_len) as u16).to_be_bytes());
    }
    ones_complement(&bytes)
}

fn headers(frame: &[u8]) -> Headers {
    let Content::Flow(headers) = parse(frame).unwrap().content else { panic!("no flow") };
    headers
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)]
}

proptest! {
    #[test]
    fn a_translated_packet_has_the_checksums_of_full_computation(
        protocol in protocols(), a: [u8; 4], b: [u8; 4], p: u16, q: u16, to: u32, port: u16, source: bool,
        payload in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut frame = build(protocol, (a, p), (b, q), &payload);
        let before = headers(&frame);
        prop_assert_eq!(transport_sum(&frame), 0xffff);
        let end = if source { End::Source } else { End::Destination };
        translate(&mut frame, &before, end, to, port);
        let after = headers(&frame);
        prop_assert_eq!(after.ttl, before.ttl - 1);
        prop_assert_eq!(transport_sum(&frame), 0xffff);
        let (address, got) = match end {
            End::Source => (after.source, after.source_port),
            End::Destination => (after.destination, after.destination_port),
        };
        prop_assert_eq!((address, got), (to, port));
        prop_assert!(ip_bytes(&frame).unwrap().ends_with(&payload));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
        let _ = parse(&tagged(&bytes));
        let _ = parse(&bytes);
    }

    #[test]
    fn a_broken_packet_is_rewritten_or_refused_but_never_panics(
        protocol in protocols(), at in 18usize..70, value: u8, cut in 18usize..80,
    ) {
        let mut frame = build(protocol, ([10, 0, 0, 1], 5), ([10, 0, 0, 2], 6), &[7; 24]);
        if at < frame.len() { frame[at] = value; }
        frame.truncate(cut);
        match parse(&frame).map(|parsed| parsed.content) {
            Ok(Content::Flow(headers)) => translate(&mut frame, &headers, End::Source, 1, 2),
            Ok(Content::Error(error)) => translate_error(&mut frame, &error, End::Source, 1, (1, 2)),
            Ok(Content::Marker(..)) | Err(_) => {}
        }
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    let mut frame = build(Protocol::Udp, ([10, 0, 0, 1], 5), ([10, 0, 0, 2], 6), b"x");
    frame[IP + 26..IP + 28].copy_from_slice(&[0, 0]);
    let parsed = headers(&frame);
    translate(&mut frame, &parsed, End::Source, 99, 98);
    assert_eq!(&frame[IP + 26..IP + 28], [0, 0]);
}

#[test]
fn the_edges_of_incremental_checksums_are_those_of_rfc_1624() {
    // The example of RFC 1624, section 4.
    assert_eq!(Delta::default().word(0x5555, 0x3285).apply(0xdd2f), 0x0000);
    for (old, new) in [(0, 0xffff), (0xffff, 0), (0, 0), (0xffff, 0xffff), (1, 0xfffe)] {
        let rest = 0x1234u16;
        let sum = |word: u16| !ones_complement(&[rest.to_be_bytes(), word.to_be_bytes()].concat());
        let got = Delta::default().word(old, new).apply(sum(old));
        assert_eq!(fold(u32::from(!got)), fold(u32::from(!sum(new))), "{old:x} {new:x}");
    }
}

#[test]
fn a_damaged_packet_stays_damaged() {
    let mut frame = build(Protocol::Udp, ([10, 0, 0, 1], 5), ([10, 0, 0, 2], 6), b"payload");
    let last = frame.len() - 1;
    frame[last] ^= 1;
    let parsed = headers(&frame);
    translate(&mut frame, &parsed, End::Source, 99, 98);
    assert_ne!(transport_sum(&frame), 0xffff);
}

#[test]
fn fragments_and_unknown_protocols_are_unsupported_and_a_bad_header_sum_is_refused() {
    let good = build(Protocol::Udp, ([10, 0, 0, 1], 5), ([10, 0, 0, 2], 6), b"x");
    let mut bad = good.clone();
    bad[IP + 10] ^= 1;
    assert_eq!(parse(&bad), Err(Reject::Checksum));
    let mut fragment = good.clone();
    fragment[IP + 6] = 0x20;
    assert_eq!(parse(&fragment), Err(Reject::Unsupported));
    assert_eq!(parse(&good[..30]), Err(Reject::Malformed));
    let mut untagged = good;
    untagged[12] = 8;
    assert_eq!(parse(&untagged), Err(Reject::Malformed));
}

#[test]
fn an_error_about_a_packet_that_is_never_carried_is_unsupported() {
    let about = |protocol| {
        let tag = Tag::Direct(Side::Outside, SiteId(1));
        let offender = build_ip(tag, protocol, 1, 2, &[8, 0, 0, 0, 0, 5, 0, 1]);
        let mut body = [&[3, 1, 0, 0, 0, 0, 0, 0], &offender[IP..]].concat();
        let sum = !ones_complement(&body);
        put_u16(&mut body, 2, sum);
        parse(&build_ip(tag, 1, 3, 4, &body)).map(drop)
    };
    assert_eq!(about(Protocol::Icmp.number()), Ok(()));
    assert_eq!(about(Protocol::Icmp6.number()), Err(Reject::Unsupported));
    assert_eq!(about(MARKER_PROTOCOL), Err(Reject::Unsupported));
}

#[test]
fn a_checksum_left_to_the_network_card_is_made_and_others_stay() {
    let tag = Tag::Direct(Side::Inside, SiteId(1));
    let (source, destination) = (0x6440_0005u32, 0xcb00_7109u32);
    for (protocol, header_len, at) in [(17u8, 8, 6), (6, 20, 16)] {
        let mut payload = vec![0; header_len];
        payload[..4].copy_from_slice(&[0x12, 0x34, 0, 53]);
        if protocol == 6 {
            payload[12] = 0x50;
        }
        payload.extend(b"an odd number of bytes");
        let len = payload.len() as u16;
        let pseudo =
            [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0, protocol], &len.to_be_bytes()];
        payload[at..at + 2].copy_from_slice(&ones_complement(&pseudo.concat()).to_be_bytes());
        let mut frame = build_ip(tag, protocol, source, destination, &payload);
        // Padding is not part of it.
        frame.extend([7; 3]);
        complete_checksum(&mut frame);
        let whole = [&pseudo.concat(), &frame[IP + IPV4_LEN..frame.len() - 3]].concat();
        assert_eq!(ones_complement(&whole), 0xffff);
        let complete = frame.clone();
        complete_checksum(&mut frame);
        assert_eq!(frame, complete);
        frame[IP + IPV4_LEN + at] ^= 1;
        let damaged = frame.clone();
        complete_checksum(&mut frame);
        assert_eq!(frame, damaged, "a damaged packet stays damaged");
    }
}

proptest! {
    #[test]
    fn a_message_by_port_comes_out_as_it_went_in(
        a: [u8; 4], b: [u8; 4], id: u16, seal: u32, payload in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let frame = build(Protocol::Icmp, (a, id), (b, 0), &payload);
        let message = headers(&frame);
        let mut wrapped = by_port::wrap(&frame, &message, id, seal).unwrap();
        let parsed = parse(&wrapped).unwrap();
        let around = headers(&wrapped);
        prop_assert_eq!((around.protocol, around.destination_port), (Protocol::Udp, id));
        prop_assert_eq!(by_port::seal_of(&wrapped, &around), Some(seal));
        let Some(Parsed { content: Content::Flow(inside), .. }) = by_port::peek(&wrapped, &parsed, &around)
        else { panic!("no message in it") };
        prop_assert_eq!((inside.protocol, inside.destination_port), (Protocol::Icmp, id));
        let len = by_port::unwrap(&mut wrapped, &around);
        wrapped.truncate(len);
        prop_assert_eq!(wrapped, frame);
    }

    #[test]
    fn whatever_looks_like_a_message_by_port_is_none_or_lies_in_its_packet(
        port: u16, bytes in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let frame = build(Protocol::Udp, ([192, 0, 2, 1], 0), ([198, 51, 100, 1], port), &bytes);
        let (parsed, around) = (parse(&frame).unwrap(), headers(&frame));
        if let Some(Parsed { content: Content::Flow(message), .. }) = by_port::peek(&frame, &parsed, &around) {
            prop_assert!(usize::from(message.transport) + 8 <= frame.len());
            let mut frame = frame;
            let len = by_port::unwrap(&mut frame, &around);
            prop_assert_eq!(headers(&frame[..len]).destination_port, port);
        }
    }
}

#[test]
fn a_message_that_would_be_too_long_by_port_is_not_wrapped() {
    let frame = build(Protocol::Icmp, ([192, 0, 2, 1], 5), ([198, 51, 100, 1], 0), &[0; 65_500]);
    let message = headers(&frame);
    assert_eq!(by_port::wrap(&frame, &message, 5, 0), None);
}
