//! Rows of RFC 4787, 5382, 5508, 6888, 7857.

use super::*;

fn a() -> (u32, u16) {
    (address("100.64.0.1"), 5000)
}

fn b() -> (u32, u16) {
    (address("100.64.0.2"), 5000)
}

fn s1() -> (u32, u16) {
    (address("203.0.113.1"), 53)
}

fn s2() -> (u32, u16) {
    (address("203.0.113.2"), 443)
}

/// RFC 4787 REQ-1, RFC 5382 REQ-1.
#[test]
fn one_outside_endpoint_per_inside_endpoint_whatever_the_destination_even_after_collisions() {
    let mut lab = Lab::serving(4);
    let mut outside = BTreeMap::new();
    // Four ports, four endpoints: most preferred places collide.
    for port in 0..4u16 {
        for to in [s1(), s2(), (s1().0, 99)] {
            let seen = lab.inside(udp((a().0, 6000 + port), to, b"x")).unwrap();
            assert_eq!(*outside.entry(port).or_insert(seen.source), seen.source);
        }
    }
    let distinct: BTreeSet<_> = outside.values().collect();
    assert_eq!(distinct.len(), 4);
}

/// RFC 4787 REQ-3; RFC 6888 REQ-2: one address per subscriber, ports of his own block.
#[test]
fn two_inside_endpoints_never_share_an_outside_port() {
    let mut lab = Lab::serving(64);
    let mut seen = BTreeSet::new();
    for host in 1..40 {
        for port in 0..32 {
            let from = (address("100.64.0.0") + host, 1000 + port);
            assert!(seen.insert(lab.inside(udp(from, s1(), b"")).unwrap().source));
        }
    }
}

/// RFC 4787 REQ-8, RFC 6888 REQ-7.
#[test]
fn any_remote_may_use_a_mapping_and_nobody_may_without_one() {
    let mut lab = Lab::serving(64);
    let mapped = lab.inside(udp(a(), s1(), b"")).unwrap().source;
    let seen = lab.outside(udp(s2(), mapped, b"hi")).unwrap();
    assert_eq!((seen.tag, seen.destination, seen.source), (Tag::ToClient(HERE), a(), s2()));
    assert_eq!(lab.worker.counters().flows, 2);
    assert_eq!(lab.outside(udp(s2(), (mapped.0, mapped.1 ^ 1), b"hi")), None);
    assert_eq!(lab.worker.counters().dropped_no_mapping, 1);
    // RFC 7857, section 5: a UDP hole is not usable by TCP.
    assert!(lab.send(tcp(s2(), mapped, SYN), Tag::Direct(Side::Outside, HERE)).is_empty());
}

/// RFC 4787 REQ-9, RFC 5382 REQ-8.
#[test]
fn hairpin_packets_arrive_with_the_outside_source() {
    let mut lab = Lab::serving(64);
    let of_b = lab.inside(udp(b(), s1(), b"")).unwrap().source;
    let out = lab.inside(udp(a(), of_b, b"hello")).unwrap();
    assert_eq!(out.tag, Tag::ToOutside);
    let back = lab.outside(udp(out.source, out.destination, b"hello")).unwrap();
    assert_eq!((back.source, back.destination), (out.source, b()));
    assert_eq!(lab.worker.counters().hairpinned, 1);
}

/// RFC 4787 REQ-5 and 6.
#[test]
fn a_udp_mapping_lives_300_seconds_after_the_last_packet() {
    let mut lab = Lab::serving(64);
    let mapped = lab.inside(udp(a(), s1(), b"")).unwrap().source;
    lab.seconds(299);
    assert!(lab.outside(udp(s1(), mapped, b"")).is_some());
    lab.seconds(200);
    assert!(lab.inside(udp(a(), s1(), b"")).is_some());
    lab.seconds(299);
    assert_eq!(lab.worker.counters().flows, 1);
    lab.seconds(4);
    assert_eq!(lab.worker.counters().flows, 0);
    assert_eq!(lab.outside(udp(s1(), mapped, b"")), None);
}

/// RFC 5382 REQ-5.
#[test]
fn tcp_lives_7440_seconds_established_and_240_half_open() {
    let mut lab = Lab::serving(64);
    let tag = Tag::Direct(Side::Inside, HERE);
    let back = Tag::Direct(Side::Outside, HERE);
    let mapped = see(&lab.send(tcp(a(), s1(), SYN), tag)[0]).source;
    lab.seconds(239);
    assert_eq!(lab.send(tcp(s1(), mapped, SYN | ACK), back).len(), 1);
    lab.seconds(7_439);
    assert_eq!(lab.send(tcp(s1(), mapped, ACK), back).len(), 1);
    // RFC 7857, section 2.2: a reset leaves 240 seconds.
    assert_eq!(lab.send(tcp(s1(), mapped, RST), back).len(), 1);
    lab.seconds(239);
    assert_eq!(lab.worker.counters().flows, 1);
    lab.seconds(4);
    assert_eq!(lab.worker.counters().flows, 0);
}

/// RFC 5382 REQ-2a.
#[test]
fn simultaneous_open_and_half_close_pass() {
    let mut lab = Lab::serving(64);
    let (inside, outside) = (Tag::Direct(Side::Inside, HERE), Tag::Direct(Side::Outside, HERE));
    let mapped = see(&lab.send(tcp(a(), s1(), SYN), inside)[0]).source;
    for (frame, tag) in [
        (tcp(s1(), mapped, SYN), outside),
        (tcp(a(), s1(), SYN | ACK), inside),
        (tcp(s1(), mapped, SYN | ACK), outside),
        (tcp(a(), s1(), FIN | ACK), inside),
        (tcp(s1(), mapped, ACK), outside),
        (tcp(s1(), mapped, FIN | ACK), outside),
        (tcp(a(), s1(), ACK), inside),
    ] {
        assert_eq!(lab.send(frame, tag).len(), 1);
    }
    lab.seconds(245);
    assert_eq!(lab.worker.counters().flows, 0);
}

/// RFC 5508 REQ-1.
#[test]
fn echo_identifiers_are_mapped_like_ports() {
    let mut lab = Lab::serving(64);
    let of_a = lab.inside(echo(8, a().0, s1().0, 77)).unwrap();
    let again = lab.inside(echo(8, a().0, s2().0, 77)).unwrap();
    let of_b = lab.inside(echo(8, b().0, s1().0, 77)).unwrap();
    assert_eq!(of_a.source, again.source);
    assert_ne!(of_a.source, of_b.source);
    let back = lab.outside(echo(0, s1().0, of_a.source.0, of_a.source.1)).unwrap();
    assert_eq!(back.destination, (a().0, 77));
}

fn error_about(quoted: &[u8], from: u32, to: u32) -> Vec<u8> {
    let mut icmp = vec![3, 4, 0, 0, 0, 0, 5, 0];
    icmp.extend_from_slice(quoted);
    let sum = !packet::ones_complement(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    packet::build_ip(Tag::ToOutside, 1, from, to, &icmp)
}

fn error_of(frame: &[u8]) -> IcmpError {
    let Content::Error(error) = packet::parse(frame).unwrap().content else { panic!("no error") };
    error
}

/// RFC 5508 REQ-4 and 6, RFC 4787 REQ-12, RFC 5382 REQ-10.
#[test]
fn an_error_from_outside_reaches_the_client_with_its_own_packet_in_it_and_changes_nothing() {
    let mut lab = Lab::serving(64);
    let out = lab.send(tcp(a(), s1(), SYN), Tag::Direct(Side::Inside, HERE)).remove(0);
    let mapped = see(&out).source;
    let router = address("192.0.2.9");
    // Quoted with eight bytes of TCP only.
    let error = error_about(&out[packet::IP..packet::IP + 28], router, mapped.0);
    lab.seconds(200);
    let got = lab.send(error.clone(), Tag::Direct(Side::Outside, HERE)).remove(0);
    let parsed = error_of(&got);
    assert_eq!((parsed.outer.source, parsed.outer.destination), (router, a().0));
    assert_eq!((parsed.inner.source, parsed.inner.source_port), a());
    assert_eq!((parsed.inner.destination, parsed.inner.destination_port), s1());
    lab.seconds(45);
    assert_eq!(lab.worker.counters().flows, 0, "the error did not refresh");
    assert!(lab.send(error, Tag::Direct(Side::Outside, HERE)).is_empty());
    assert_eq!(lab.worker.counters().flows, 0, "the error did not create");
}

/// RFC 5508 REQ-5.
#[test]
fn an_error_from_inside_leaves_with_outside_addresses() {
    let mut lab = Lab::serving(64);
    let mapped = lab.inside(udp(a(), s1(), b"")).unwrap().source;
    let reply = lab.send(udp(s1(), mapped, b"reply"), Tag::Direct(Side::Outside, HERE)).remove(0);
    let error = error_about(packet::ip_bytes(&reply).unwrap(), a().0, s1().0);
    let got = error_of(&lab.send(error, Tag::Direct(Side::Inside, HERE)).remove(0));
    assert_eq!((got.outer.source, got.outer.destination), (mapped.0, s1().0));
    assert_eq!((got.inner.destination, got.inner.destination_port), mapped);
    assert_eq!((got.inner.source, got.inner.source_port), s1());
}

/// RFC 5508 REQ-3.
#[test]
fn an_error_with_a_bad_checksum_is_dropped() {
    let mut lab = Lab::serving(64);
    let out = lab.send(udp(a(), s1(), b""), Tag::Direct(Side::Inside, HERE)).remove(0);
    let mut error = error_about(&out[packet::IP..packet::IP + 28], s1().0, see(&out).source.0);
    let last = error.len() - 1;
    error[last] ^= 1;
    assert!(lab.send(error, Tag::Direct(Side::Outside, HERE)).is_empty());
    assert_eq!(lab.worker.counters().dropped_bad_checksum, 1);
}

/// RFC 6888 REQ-4 and 11.
#[test]
fn an_exhausted_block_refuses_tells_the_client_and_evicts_nothing() {
    let mut lab = Lab::serving(4);
    let first: Vec<_> = (0..4).map(|port| lab.inside(udp((a().0, port + 1), s1(), b"")).unwrap()).collect();
    let refused = lab.send(udp((a().0, 9), s1(), b""), Tag::Direct(Side::Inside, HERE));
    assert_eq!(packet::destination(&refused[0]), Some(a().0));
    assert_eq!(&refused[0][packet::IP + 20..packet::IP + 22], [3, 1], "host unreachable");
    assert_eq!(lab.worker.counters().dropped_port_block_exhausted, 1);
    for seen in first {
        assert!(lab.outside(udp(s1(), seen.source, b"")).is_some());
    }
    assert!(lab.inside(udp(b(), s1(), b"")).is_some(), "others are not affected");
    let told: usize =
        (0..500).map(|_| lab.send(udp((a().0, 9), s1(), b""), Tag::Direct(Side::Inside, HERE)).len()).sum();
    assert!(told < 120, "{told} errors in a second");
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_the_old() {
    let mut lab = Lab::with(Settings { site: HERE, flow_capacity: 2, ..Settings::default() }, 64);
    lab.ask(Request::Serve { group: group_id(), epoch: Epoch(1) });
    assert!(lab.inside(udp(a(), s1(), b"")).is_some());
    assert!(lab.inside(udp(a(), s2(), b"")).is_some());
    assert!(lab.inside(udp(b(), s2(), b"")).is_none());
    assert!(lab.inside(udp(a(), s1(), b"")).is_some());
    assert_eq!(lab.worker.counters().dropped_table_full, 1);
}

#[test]
fn the_last_hop_is_dropped_both_ways_and_makes_no_state() {
    let mut lab = Lab::serving(64);
    let mut frame = udp(a(), s1(), b"");
    frame[packet::IP + 8] = 1;
    let sum = [0, 0];
    frame[packet::IP + 10..packet::IP + 12].copy_from_slice(&sum);
    let sum = !packet::ones_complement(&frame[packet::IP..packet::IP + 20]);
    frame[packet::IP + 10..packet::IP + 12].copy_from_slice(&sum.to_be_bytes());
    assert!(lab.inside(frame).is_none());
    assert_eq!((lab.worker.counters().dropped_ttl, lab.worker.counters().flows), (1, 0));
}

#[test]
fn replies_follow_the_client_to_the_site_where_it_came_in_last() {
    let mut lab = Lab::serving(64);
    let mapped = lab.inside(udp(a(), s1(), b"")).unwrap().source;
    lab.send(udp(a(), s1(), b""), Tag::Direct(Side::Inside, THERE));
    assert_eq!(lab.outside(udp(s1(), mapped, b"")).unwrap().tag, Tag::ToClient(THERE));
    lab.send(udp(a(), s1(), b""), Tag::Relayed(Side::Inside, HERE));
    assert_eq!(lab.outside(udp(s1(), mapped, b"")).unwrap().tag, Tag::ToClient(THERE));
    assert_eq!(lab.outside(udp(s2(), mapped, b"")).unwrap().tag, Tag::ToClient(THERE));
}

#[test]
fn handshakes_give_round_trips_of_both_sides_and_retransmissions_do_not() {
    let mut lab = Lab::serving(64);
    let (inside, outside) = (Tag::Direct(Side::Inside, HERE), Tag::Direct(Side::Outside, HERE));
    for (port, again) in [(1, false), (2, true)] {
        let from = (a().0, port);
        let mapped = see(&lab.send(tcp(from, s1(), SYN), inside)[0]).source;
        if again {
            lab.send(tcp(from, s1(), SYN), inside);
        }
        lab.after(20_000);
        lab.send(tcp(s1(), mapped, SYN | ACK), outside);
        lab.after(5_000);
        lab.send(tcp(from, s1(), ACK), inside);
    }
    let events = lab.ask(Request::Stats);
    let [Event::Stats(stats)] = &events[..] else { panic!("{events:?}") };
    let seen: Vec<_> =
        stats.round_trips.iter().map(|r| (r.prefix.to_string(), r.remote, r.count, r.mean_us)).collect();
    assert_eq!(
        seen,
        [("100.64.0.0/24".to_owned(), false, 1, 5_000), ("203.0.113.0/24".to_owned(), true, 1, 20_000)]
    );
    assert_eq!(stats.talks.iter().map(|talk| talk.servers[0].1).collect::<Vec<_>>(), [1]);
    assert_eq!(stats.groups[0].packets, 7);
    assert_eq!(stats.groups[0].inside_ingress, [(HERE, 5)]);
}

#[test]
fn a_worker_that_was_stopped_does_not_expire_everything_when_it_wakes() {
    let mut lab = Lab::serving(64);
    let mapped = lab.inside(udp(a(), s1(), b"")).unwrap().source;
    lab.after(1_000 * SECOND);
    assert!(lab.outside(udp(s1(), mapped, b"")).is_some());
    lab.seconds(310);
    assert_eq!(lab.worker.counters().flows, 0);
}

/// Ports per subscriber with which groups share addresses: 63 subscribers to an address.
const SHARING: u16 = 1_024;

/// A client of the second group, whose outside address the first group's last clients have too.
fn sharer() -> (u32, u16) {
    (address("100.64.1.0"), 5_000)
}

fn second_group() -> GroupId {
    "1:100.64.1.0/24".parse().unwrap()
}

/// The worker of the first group, which the switch sends all ICMP to the shared address, and that of the second.
fn sharing() -> [Lab; 2] {
    let mut first = Lab::serving(SHARING);
    let mut second = Lab::bare(THERE, SHARING);
    second.ask(Request::Serve { group: second_group(), epoch: Epoch(1) });
    assert_eq!(first.inside(udp((address("100.64.0.255"), 1), s1(), b"")).unwrap().source.0, shared());
    first.worker.counters = Counters::default();
    [first, second]
}

fn shared() -> u32 {
    address("198.51.100.4")
}

/// What the switch does with what a worker sent to outside and is for a port of the second group.
fn steered(mut frames: Vec<Vec<u8>>, port: u16) -> Vec<u8> {
    assert_eq!(frames.len(), 1);
    let frame = frames.remove(0);
    let seen = packet::parse(&frame).unwrap();
    let Content::Flow(headers) = seen.content else { panic!("{seen:?}") };
    assert_eq!((seen.tag, headers.protocol), (Tag::ToOutside, Protocol::Udp));
    assert_eq!((headers.destination, headers.destination_port), (shared(), port));
    frame
}

/// RFC 5508, REQ-1 and 2, on an address that several groups share.
#[test]
fn an_echo_reply_to_a_shared_address_reaches_the_group_whose_identifier_it_has() {
    let [mut first, mut second] = sharing();
    let request = second.inside(echo(8, sharer().0, s1().0, 77)).unwrap();
    assert_eq!(request.source.0, shared());
    let reply = echo(0, s1().0, shared(), request.source.1);
    let passed = first.send(reply.clone(), Tag::Direct(Side::Outside, HERE));
    assert_eq!((first.worker.counters().icmp_by_port, first.worker.counters().unaccounted()), (1, 0));
    let direct = second.send(reply, Tag::Direct(Side::Outside, HERE));
    let by_port = second.send(steered(passed, request.source.1), Tag::Direct(Side::Outside, HERE));
    assert_eq!(by_port, direct);
    assert_eq!(see(&by_port[0]).destination, (sharer().0, 77));
    assert_eq!(second.worker.counters().unaccounted(), 0);
}

/// RFC 5508, REQ-4: path MTU discovery lives on these.
#[test]
fn fragmentation_needed_about_a_flow_of_a_shared_address_reaches_its_client() {
    let [mut first, mut second] = sharing();
    let out = second.send(tcp(sharer(), s1(), SYN), Tag::Direct(Side::Inside, HERE)).remove(0);
    let mapped = see(&out).source;
    let error = error_about(&out[packet::IP..packet::IP + 28], address("192.0.2.9"), mapped.0);
    let passed = first.send(error.clone(), Tag::Relayed(Side::Outside, THERE));
    let direct = second.send(error, Tag::Direct(Side::Outside, HERE));
    let by_port = second.send(steered(passed, mapped.1), Tag::Direct(Side::Outside, HERE));
    assert_eq!(by_port, direct);
    assert_eq!(error_of(&by_port[0]).inner.source, sharer().0);
}

#[test]
fn a_message_by_port_is_relayed_and_held_like_the_udp_of_its_group() {
    let [mut first, mut second] = sharing();
    let id = second.inside(echo(8, sharer().0, s1().0, 77)).unwrap().source.1;
    let passed = first.send(echo(0, s1().0, shared(), id), Tag::Direct(Side::Outside, HERE));
    let frame = steered(passed, id);
    let group = second_group();
    let move_id = MoveId(9);
    let mut target = Lab::bare(SiteId(3), SHARING);
    let (source, ordering) = (THERE, Ordering::Strict);
    target.ask(Request::Prepare { group, move_id, epoch: Epoch(2), source, flows: 1, ordering });
    assert!(target.send(frame.clone(), Tag::Direct(Side::Outside, HERE)).is_empty());
    assert_eq!(target.worker.counters().held, 1);
    second.ask(Request::CopyStart { group, move_id, session: 0, credit: u64::MAX });
    let awaited = Vec::new();
    let (epoch, target, bound_us, credit, again) = (Epoch(2), SiteId(3), 1, u64::MAX, false);
    let arm = Request::Arm { group, move_id, epoch, target, awaited, bound_us, session: 0, credit, again };
    second.worker.handle(arm, second.now);
    let (_, cut) = second.settle();
    assert_eq!(cut.len(), 1, "the cut");
    let relayed = second.send(frame.clone(), Tag::Direct(Side::Outside, HERE));
    assert_eq!(relayed, [with_tag(frame, Tag::Relay(Side::Outside, SiteId(3)))], "as it came");
}

/// The switch would give what is steered by address alone back to the worker of the lowest block.
#[test]
fn an_echo_reply_that_a_worker_relays_goes_by_port_when_the_address_is_shared() {
    let [mut first, _] = sharing();
    let own = first.inside(echo(8, address("100.64.0.255"), s1().0, 77)).unwrap().source;
    assert_eq!(own.0, shared());
    let whole = first.inside(echo(8, address("100.64.0.0"), s1().0, 77)).unwrap().source;
    assert_ne!(whole.0, shared());
    let (move_id, epoch) = (MoveId::local(1), Epoch(1));
    first.ask(Request::CopyStart { group: group_id(), move_id, session: 0, credit: u64::MAX });
    let (awaited, bound_us, credit, again) = (Vec::new(), 0, u64::MAX, false);
    let (group, target) = (group_id(), HERE);
    first.worker.handle(
        Request::Arm { group, move_id, epoch, target, awaited, bound_us, session: 0, credit, again },
        first.now,
    );
    first.settle();
    let relayed = first.send(echo(0, s1().0, own.0, own.1), Tag::Relayed(Side::Outside, THERE));
    let seen = packet::parse(&relayed[0]).unwrap();
    let Content::Flow(headers) = seen.content else { panic!("{seen:?}") };
    assert_eq!((seen.tag, headers.protocol), (Tag::Relay(Side::Outside, HERE), Protocol::Udp));
    assert_eq!((headers.destination, headers.destination_port), own);
    let reply = echo(0, s1().0, whole.0, whole.1);
    let relayed = first.send(reply.clone(), Tag::Direct(Side::Outside, HERE));
    assert_eq!(relayed, [with_tag(reply, Tag::Relay(Side::Outside, HERE))], "nobody shares that address");
    assert_eq!(first.worker.counters().unaccounted(), 0);
}

#[test]
fn udp_from_port_0_that_no_site_sealed_is_udp() {
    let [mut first, mut second] = sharing();
    let mapped = second.inside(udp(sharer(), s1(), b"")).unwrap().source;
    let id = second.inside(echo(8, sharer().0, s1().0, 77)).unwrap().source.1;
    let passed = first.send(echo(0, s1().0, shared(), id), Tag::Direct(Side::Outside, HERE));
    let mut forged = steered(passed, id)[packet::IP + 28..].to_vec();
    forged[0] ^= 1;
    let seen = second.outside(udp((s1().0, 0), mapped, &forged)).unwrap();
    assert_eq!((seen.destination, seen.payload), (sharer(), forged));
}

#[test]
fn what_nobody_of_a_shared_address_has_is_dropped() {
    let [mut first, _] = sharing();
    assert!(first.send(echo(0, s1().0, shared(), 80), Tag::Direct(Side::Outside, HERE)).is_empty());
    assert!(first.send(udp(s1(), (shared(), 8_000), b""), Tag::Direct(Side::Outside, HERE)).is_empty());
    let counters = first.worker.counters();
    assert_eq!((counters.icmp_by_port, counters.unaccounted()), (0, 0));
    assert_eq!((counters.dropped_no_mapping, counters.dropped_no_group), (1, 1));
}

#[test]
fn icmp_that_came_by_address_alone_is_neither_held_before_the_flip_nor_a_sign_of_one_that_is_late() {
    let [_, mut second] = sharing();
    let id = second.inside(echo(8, sharer().0, s1().0, 77)).unwrap().source.1;
    let reply = echo(0, s1().0, shared(), id);
    let (group, move_id, ordering) = (second_group(), MoveId(9), Ordering::Strict);
    let mut target = Lab::serving(SHARING);
    target.ask(Request::Prepare { group, move_id, epoch: Epoch(2), source: THERE, flows: 1, ordering });
    let passed = target.send(reply.clone(), Tag::Direct(Side::Outside, HERE));
    assert_eq!((passed.len(), target.worker.counters().held), (1, 0), "it is not this worker's yet");
    steered(passed, id);

    second.ask(Request::Yield { group, relay_us: 1 });
    steered(second.send(reply.clone(), Tag::Direct(Side::Outside, HERE)), id);
    let gone = second.after(200_000).0;
    assert!(matches!(gone[..], [Event::Gone { .. }]), "nothing kept it: {gone:?}");
}

#[test]
fn icmp_that_came_by_address_alone_does_not_use_up_the_wait_for_a_late_ingress() {
    let [_, mut other] = sharing();
    let id = other.inside(echo(8, sharer().0, s1().0, 77)).unwrap().source.1;
    let (group, move_id, late) = (second_group(), MoveId(9), SiteId(3));
    let [mut target, mut source] = sharing();
    let (epoch, ordering, credit) = (Epoch(2), Ordering::Strict, u64::MAX);
    target.ask(Request::Prepare { group, move_id, epoch, source: THERE, flows: 0, ordering });
    source.ask(Request::CopyStart { group, move_id, session: 0, credit });
    let (awaited, bound_us, again) = (vec![late], 0, false);
    let arm =
        Request::Arm { group, move_id, epoch, target: HERE, awaited, bound_us, session: 0, credit, again };
    source.worker.handle(arm, source.now);
    let (events, cut) = source.settle();
    let Some(Event::Cut { token, missing, .. }) = events.last() else { panic!("{events:?}") };
    target.send(cut[0].clone(), Tag::Cut(THERE));
    let (missing, late_bound_us, cut_bound_us) = (missing.clone(), 100_000, 50_000);
    let join = Request::Join { group, move_id, token: *token, missing, late_bound_us, cut_bound_us };
    let joined = target.ask(join);
    assert!(matches!(joined[..], [Event::Joined { .. }]), "{joined:?}");

    let reply = echo(0, s1().0, shared(), id);
    steered(target.send(reply, Tag::Direct(Side::Outside, late)), id);
    target.after(200_000);
    let before = target.worker.counters().held;
    assert!(target.send(udp(s1(), (shared(), id), b""), Tag::Direct(Side::Outside, late)).is_empty());
    assert_eq!(target.worker.counters().held, before + 1, "it waits for the marker of its ingress");
}
