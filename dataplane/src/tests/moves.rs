//! The group machine: states, events, and moves between two workers.

use super::*;
use proptest::prelude::*;

const MOVE: MoveId = MoveId(9);

fn client() -> (u32, u16) {
    (address("100.64.0.1"), 5000)
}

fn remote() -> (u32, u16) {
    (address("203.0.113.1"), 53)
}

fn marker_frame(from: SiteId, tag: Tag) -> Vec<u8> {
    marker_of(MOVE, Epoch(2), from, tag)
}

fn marker_of(move_id: MoveId, epoch: Epoch, from: SiteId, tag: Tag) -> Vec<u8> {
    let id = group_id();
    let body = MarkerBody { move_id, epoch, service: id.service, prefix_len: 24, from };
    packet::build_ip(tag, MARKER_PROTOCOL, address("100.64.0.0"), address("100.64.0.0"), &body.encode())
}

fn arm(awaited: &[SiteId], bound_us: u64) -> Request {
    let (epoch, awaited) = (Epoch(2), awaited.to_vec());
    let credit = u64::MAX;
    Request::Arm {
        group: group_id(),
        move_id: MOVE,
        epoch,
        target: THERE,
        awaited,
        bound_us,
        session: 0,
        credit,
        again: false,
    }
}

fn prepare(ordering: Ordering) -> Request {
    Request::Prepare { group: group_id(), move_id: MOVE, epoch: Epoch(2), source: HERE, flows: 100, ordering }
}

fn join(token: Token, missing: &[SiteId]) -> Request {
    Request::Join {
        group: group_id(),
        move_id: MOVE,
        token,
        missing: missing.to_vec(),
        late_bound_us: 10 * SECOND,
        cut_bound_us: 50_000,
    }
}

fn install(batch: Batch) -> Request {
    Request::Install { group: group_id(), move_id: MOVE, sequence: 1, batch, more: false }
}

fn target() -> Lab {
    let mut lab = Lab::bare(THERE, 64);
    assert_eq!(lab.ask(prepare(Ordering::Strict)), [Event::Prepared { group: group_id(), move_id: MOVE }]);
    lab
}

/// Exports everything of a source, as one batch.
fn copied(lab: &mut Lab) -> Batch {
    let events =
        lab.ask(Request::CopyStart { group: group_id(), move_id: MOVE, session: 0, credit: u64::MAX });
    merged(&events)
}

fn merged(events: &[Event]) -> Batch {
    let mut all = Batch::default();
    for event in events {
        if let Event::Records { batch, .. } = event {
            all.upserts.extend(&batch.upserts);
            all.removals.extend(&batch.removals);
        }
    }
    all
}

fn token_of(events: &[Event]) -> Token {
    match events.last() {
        Some(Event::Cut { token, .. }) => *token,
        other => panic!("{other:?}"),
    }
}

fn cut(lab: &mut Lab) -> (Batch, Token, Vec<Vec<u8>>) {
    lab.worker.handle(arm(&[], 0), lab.now);
    let (events, packets) = lab.settle();
    (merged(&events), token_of(&events), packets)
}

fn source_with_flows(flows: u16) -> Lab {
    let mut lab = Lab::serving(64);
    for port in 0..flows {
        lab.inside(udp((client().0 + u32::from(port % 8), 5000 + port), remote(), b"x")).unwrap();
    }
    lab
}

#[test]
fn what_is_exported_and_imported_is_exported_the_same() {
    let mut source = source_with_flows(200);
    source.after(5 * SECOND);
    let all = copied(&mut source);
    assert_eq!(all.upserts.len(), 200);
    let (rest, token, _) = cut(&mut source);
    assert!(rest.is_empty());
    let mut there = Lab::bare(THERE, 64);
    there.ask(Request::Prepare {
        group: group_id(),
        move_id: MOVE,
        epoch: Epoch(2),
        source: HERE,
        flows: 200,
        ordering: Ordering::Strict,
    });
    there.ask(install(all.clone()));
    there.ask(join(token, &[]));
    there.after(60_000);
    assert_eq!(there.phase(), Some(Phase::Serving));
    let events = there.ask(Request::CopyStart {
        group: group_id(),
        move_id: MoveId(10),
        session: 0,
        credit: u64::MAX,
    });
    let plain = |batch: &Batch| {
        let records = batch.upserts.iter().map(|record| flow::FlowRecord { version: 0, ..*record });
        records.map(|record| (record.key, record)).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(plain(&merged(&events)), plain(&all));
}

#[test]
fn a_round_exports_what_changed_and_what_ended_with_growing_versions() {
    let mut lab = source_with_flows(3);
    let first = copied(&mut lab);
    lab.inside(udp((client().0, 5000), remote(), b"x")).unwrap();
    let events = lab.ask(Request::CopyRound { group: group_id(), move_id: MOVE });
    let second = merged(&events);
    assert_eq!(second.upserts.len(), 1);
    assert!(second.upserts[0].version > first.upserts[0].version);
    assert_eq!(second.upserts[0].joined.packets_out, 2);
    lab.seconds(310);
    let third = merged(&lab.ask(Request::CopyRound { group: group_id(), move_id: MOVE }));
    assert_eq!((third.upserts.len(), third.removals.len()), (0, 3));
    assert!(third.removals[0].1 > second.upserts[0].version);
}

#[test]
fn the_cut_waits_for_all_markers_and_early_ones_count() {
    let mut lab = source_with_flows(1);
    lab.send(marker_frame(THERE, Tag::Marker(THERE)), Tag::Marker(THERE));
    assert_eq!(lab.ask(arm(&[HERE, THERE], 60 * SECOND)), []);
    assert_eq!(lab.phase(), Some(Phase::Draining));
    assert!(lab.inside(udp(client(), remote(), b"")).is_some());
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Marker(HERE));
    let (events, packets) = lab.settle();
    let Some(Event::Cut { token, missing, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!((token.flows, token.epoch, missing.len()), (1, Epoch(2), 0));
    assert_eq!(merged(&events).upserts.len(), 1, "without a copy everything is sent");
    assert_eq!(packet::parse(&packets[0]).unwrap().tag, Tag::SendCut(THERE));
    let seen = lab.inside(udp(client(), remote(), b"late")).unwrap();
    assert_eq!((seen.tag, seen.source), (Tag::Relay(Side::Inside, THERE), client()));
}

#[test]
fn the_bound_ends_the_wait_and_names_who_is_missing() {
    let mut lab = source_with_flows(1);
    lab.ask(arm(&[HERE, THERE], 1_000));
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Marker(HERE));
    let (events, _) = lab.after(1_001);
    let Some(Event::Cut { missing, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(missing, &[THERE]);
    let relayed = lab.send(marker_frame(THERE, Tag::Marker(THERE)), Tag::Marker(THERE));
    assert_eq!(packet::parse(&relayed[0]).unwrap().tag, Tag::Relay(Side::Inside, THERE));
}

#[test]
fn arming_a_cut_group_again_gives_everything_and_the_same_token() {
    let mut lab = source_with_flows(5);
    let (_, token, _) = cut(&mut lab);
    let again = lab.ask(arm_again(u64::MAX));
    assert_eq!((merged(&again).upserts.len(), token_of(&again)), (5, token));
}

#[test]
fn a_token_that_was_withdrawn_is_not_exported_again() {
    let mut lab = source_with_flows(5);
    cut(&mut lab);
    let disarm = |withdraw| Request::Disarm { group: group_id(), move_id: MOVE, withdraw };
    let answer = |withdrawn| Event::Disarmed { group: group_id(), move_id: MOVE, cut: true, withdrawn };
    assert_eq!(lab.ask(disarm(false)), [answer(false)]);
    assert_eq!(lab.ask(disarm(true)), [answer(true)]);
    assert_eq!(lab.ask(disarm(false)), [answer(true)], "another agent hears of it");
    assert!(matches!(lab.ask(arm_again(u64::MAX))[..], [Event::Refused { .. }]));
    lab.ask(Request::Serve { group: group_id(), epoch: Epoch(3) });
    assert!(lab.inside(udp(client(), remote(), b"")).is_some(), "it is served again");
}

fn arm_again(credit: u64) -> Request {
    let (epoch, awaited) = (Epoch(2), Vec::new());
    Request::Arm {
        group: group_id(),
        move_id: MOVE,
        epoch,
        target: THERE,
        awaited,
        bound_us: 0,
        session: 0,
        credit,
        again: true,
    }
}

fn credit(credit: u64) -> Request {
    Request::Credit { group: group_id(), move_id: MOVE, session: 0, credit }
}

#[test]
fn no_more_records_are_exported_than_were_asked_for() {
    let mut lab = source_with_flows(5);
    let start = |credit| Request::CopyStart { group: group_id(), move_id: MOVE, session: 0, credit };
    let events = lab.ask(start(2));
    assert_eq!(merged(&events).upserts.len(), 2);
    assert!(!events.iter().any(|event| matches!(event, Event::RoundEnd { .. })), "{events:?}");
    assert_eq!(lab.ask(credit(1)), [], "the most that was said counts");
    assert_eq!(merged(&lab.ask(credit(4))).upserts.len(), 2);
    assert_eq!(merged(&lab.ask(start(2))).upserts.len(), 2, "a copy that starts afresh counts afresh");
    let rest = lab.ask(credit(5));
    assert_eq!(merged(&rest).upserts.len(), 3);
    assert!(
        matches!(rest.last(), Some(Event::RoundEnd { .. })),
        "what ends a round needs no credit: {rest:?}"
    );
}

#[test]
fn a_cut_is_told_when_the_last_record_had_credit() {
    let mut lab = source_with_flows(5);
    cut(&mut lab);
    let events = lab.ask(arm_again(3));
    assert!(!events.iter().any(|event| matches!(event, Event::Cut { .. })), "{events:?}");
    assert!(matches!(lab.ask(credit(5)).last(), Some(Event::Cut { .. })));
}

#[test]
fn a_worker_that_is_told_to_cut_late_and_has_cut_does_not_export_everything_again() {
    let mut lab = source_with_flows(5);
    cut(&mut lab);
    assert_eq!(merged(&lab.ask(arm_again(3))).upserts.len(), 3);
    let rest = lab.ask(arm(&[], 0));
    assert_eq!(merged(&rest).upserts.len(), 2, "it goes on where it was");
    assert!(matches!(rest.last(), Some(Event::Cut { .. })));
    assert_eq!(lab.ask(arm(&[], 0)), []);
}

#[test]
fn an_export_that_waits_for_credit_keeps_no_core_busy() {
    let mut lab = source_with_flows(5);
    lab.ask(Request::CopyStart { group: group_id(), move_id: MOVE, session: 0, credit: 2 });
    assert_eq!(lab.worker.wait(), Wait::Soon);
}

#[test]
fn a_move_between_workers_of_a_site_keeps_the_epoch() {
    let local = MoveId::local(7);
    let arm = |move_id, epoch| Request::Arm {
        group: group_id(),
        move_id,
        epoch,
        target: HERE,
        awaited: Vec::new(),
        bound_us: 0,
        session: 0,
        credit: u64::MAX,
        again: false,
    };
    let mut lab = source_with_flows(1);
    assert!(matches!(lab.ask(arm(MOVE, Epoch(1)))[..], [Event::Refused { .. }]));
    lab.worker.handle(arm(local, Epoch(1)), lab.now);
    assert_eq!(token_of(&lab.settle().0).epoch, Epoch(1));
}

/// The site's switch may have no rule yet for what one worker relays to the other.
#[test]
fn a_worker_that_gives_a_group_to_another_of_its_site_relays_nothing_before_the_cut() {
    let reset = tcp(client(), remote(), RST);
    let sent = |target: SiteId, move_id: MoveId, epoch: Epoch| {
        let mut lab = source_with_flows(0);
        lab.worker.handle(
            Request::Arm {
                group: group_id(),
                move_id,
                epoch,
                target,
                awaited: vec![HERE],
                bound_us: SECOND,
                session: 0,
                credit: u64::MAX,
                again: false,
            },
            lab.now,
        );
        lab.send(reset.clone(), Tag::Direct(Side::Inside, HERE))
    };
    assert_eq!(sent(THERE, MOVE, Epoch(2)), [with_tag(reset.clone(), Tag::Relay(Side::Inside, THERE))]);
    assert_eq!(sent(HERE, MoveId::local(7), Epoch(1)), Vec::<Vec<u8>>::new());
}

#[test]
fn a_disarmed_move_never_cuts_and_a_cut_one_says_so() {
    let mut lab = source_with_flows(1);
    lab.ask(arm(&[THERE], 1_000));
    let disarm = Request::Disarm { group: group_id(), move_id: MOVE, withdraw: false };
    let answer = |cut| Event::Disarmed { group: group_id(), move_id: MOVE, cut, withdrawn: false };
    assert_eq!(lab.ask(disarm.clone()), [answer(false)]);
    assert_eq!(lab.after(2_000).0, []);
    assert!(matches!(lab.ask(arm(&[], 0))[..], [Event::Refused { .. }]));
    let mut lab = source_with_flows(1);
    cut(&mut lab);
    assert_eq!(lab.ask(disarm), [answer(true)]);
}

#[test]
fn no_smaller_epoch_is_ever_accepted() {
    let mut lab = source_with_flows(1);
    cut(&mut lab);
    let refused = lab.ask(Request::Serve { group: group_id(), epoch: Epoch(1) });
    assert!(matches!(refused[..], [Event::Refused { .. }]));
    // Taking back under a higher one: the flows are still here.
    lab.ask(Request::Serve { group: group_id(), epoch: Epoch(3) });
    assert!(lab.inside(udp(client(), remote(), b"")).is_some());
    assert_eq!(lab.worker.counters().flows, 1);
}

#[test]
fn a_forgotten_group_relays_for_a_while_and_is_gone() {
    let mut lab = source_with_flows(100);
    cut(&mut lab);
    lab.ask(forget(SECOND));
    assert_eq!(lab.worker.counters().flows, 0);
    assert_eq!(lab.inside(udp(client(), remote(), b"")).unwrap().tag, Tag::Relay(Side::Inside, THERE));
    // That packet came from an ingress that has not flipped, so there may be more.
    assert_eq!(lab.after(SECOND + 1).0, []);
    assert_eq!(lab.after(4 * SECOND).0, [Event::Gone { group: group_id(), move_id: MOVE }]);
    assert_eq!(lab.phase(), None);
    assert!(lab.inside(udp(client(), remote(), b"")).is_none());
    assert_eq!(lab.worker.counters().dropped_no_group, 1);
}

#[test]
fn an_old_owner_relays_on_what_an_older_one_relays_to_it() {
    let mut lab = source_with_flows(1);
    cut(&mut lab);
    lab.ask(forget(5 * SECOND));
    let older = SiteId(7);
    let relayed = |from| (udp(client(), remote(), b""), Tag::Relayed(Side::Inside, from));
    // The agent of an ingress may be away for as long as this, and its packets come by way of the owner that it knows.
    for _ in 0..10 {
        assert_eq!(lab.after(4 * SECOND).0, []);
        let (frame, tag) = relayed(older);
        assert_eq!(lab.send(frame, tag).len(), 1);
    }
    // What comes back from where it goes, or from here, keeps nothing going.
    lab.after(4 * SECOND);
    for from in [THERE, HERE] {
        let (frame, tag) = relayed(from);
        lab.send(frame, tag);
    }
    assert_eq!(lab.after(2 * SECOND).0, [Event::Gone { group: group_id(), move_id: MOVE }]);
}

#[test]
fn a_group_does_not_come_back_while_an_ingress_still_sends_by_the_old_path() {
    let mut lab = source_with_flows(1);
    lab.ask(arm(&[HERE, THERE], 1_000));
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Marker(HERE));
    lab.after(1_001);
    let (group, next) = (group_id(), MoveId(10));
    lab.ask(forget(SECOND));
    let (epoch, ordering) = (Epoch(3), Ordering::Strict);
    let back = Request::Prepare { group, move_id: next, epoch, source: THERE, flows: 1, ordering };
    let [Event::Refused { reason, .. }] = &lab.ask(back.clone())[..] else { panic!("not refused") };
    assert!(reason.contains(&format!("ingress {THERE}")), "{reason}");
    assert_eq!(lab.phase(), Some(Phase::Tombstone));
    lab.send(marker_frame(THERE, Tag::Marker(THERE)), Tag::Marker(THERE));
    assert_eq!(lab.ask(back), [Event::Prepared { group, move_id: next }]);
}

/// Its agent is away, so that nobody waited for its marker.
#[test]
fn a_group_does_not_come_back_while_an_ingress_that_nobody_waits_for_sends_by_the_old_path() {
    let (group, next, ordering) = (group_id(), MoveId(10), Ordering::Strict);
    let away = SiteId(7);
    let given_away = || {
        let mut lab = source_with_flows(1);
        cut(&mut lab);
        lab.ask(forget(SECOND));
        lab
    };
    let back = Request::Prepare { group, move_id: next, epoch: Epoch(3), source: THERE, flows: 1, ordering };
    let prepared = [Event::Prepared { group, move_id: next }];
    assert_eq!(given_away().ask(back.clone()), prepared, "nobody sends here");
    for (tag, said) in [
        (Tag::Direct(Side::Inside, away), format!("ingress {away} still sends")),
        (Tag::Relayed(Side::Inside, away), format!("site {away} still relays")),
    ] {
        let mut lab = given_away();
        let frame = udp(client(), remote(), b"");
        assert_eq!(lab.send(frame.clone(), tag), [with_tag(frame, Tag::Relay(Side::Inside, THERE))]);
        let [Event::Refused { reason, .. }] = &lab.ask(back.clone())[..] else { panic!("not refused") };
        assert!(reason.contains(&said), "{reason}");
        lab.after(6 * SECOND);
        assert_eq!(lab.ask(back.clone()), prepared, "it sends no more");
    }
    let mut lab = given_away();
    lab.send(udp(client(), remote(), b""), Tag::Direct(Side::Inside, away));
    lab.send(marker_frame(away, Tag::Marker(away)), Tag::Marker(away));
    assert_eq!(lab.ask(back), prepared, "it has flipped");
}

/// The target serves, and every ingress has flipped.
fn forget(relay_us: u64) -> Request {
    forget_to((MOVE, Epoch(2), THERE), relay_us)
}

fn forget_to((move_id, epoch, target): (MoveId, Epoch, SiteId), relay_us: u64) -> Request {
    let ingresses = vec![];
    Request::Forget { group: group_id(), move_id, epoch, target, relay_us, ingresses, relay_late_us: 0 }
}

/// What was given away, and stays for half a minute after the last packet while one of these ingresses has not flipped.
fn forget_staying(group: &str, ingresses: &[SiteId]) -> Request {
    Request::Forget {
        group: group.parse().unwrap(),
        move_id: MOVE,
        epoch: Epoch(2),
        target: THERE,
        relay_us: SECOND,
        ingresses: ingresses.to_vec(),
        relay_late_us: 30 * SECOND,
    }
}

/// The agent of that ingress is away, or does not reach its switch. A client behind it may send nothing for long, and then find no relay
/// left at the old owner, where its ingress still leads.
#[test]
fn an_old_owner_relays_as_long_as_an_ingress_has_not_flipped() {
    let away = SiteId(7);
    let frame = udp(client(), remote(), b"");
    let relayed = || [with_tag(udp(client(), remote(), b""), Tag::Relay(Side::Inside, THERE))];
    let gone = [Event::Gone { group: group_id(), move_id: MOVE }];
    let mut lab = source_with_flows(1);
    cut(&mut lab);
    lab.ask(forget_staying("1:100.64.0.0/24", &[HERE, away]));
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Marker(HERE));
    // Silent for far longer than stragglers are waited for, and again after each packet.
    for _ in 0..3 {
        lab.seconds(29);
        assert_eq!(lab.send(frame.clone(), Tag::Direct(Side::Inside, away)), relayed());
    }
    lab.seconds(29);
    assert_eq!(lab.phase(), Some(Phase::Tombstone));
    lab.send(marker_frame(away, Tag::Marker(away)), Tag::Marker(away));
    assert_eq!(lab.after(SECOND).0, gone, "all have flipped");

    let mut lab = source_with_flows(1);
    cut(&mut lab);
    lab.ask(forget_staying("1:100.64.0.0/24", &[HERE, away]));
    lab.seconds(29);
    assert_eq!(lab.phase(), Some(Phase::Tombstone));
    assert_eq!(lab.after(2 * SECOND).0, gone, "its bound is over");
}

#[test]
fn an_ingress_that_flips_by_a_later_move_is_not_waited_for() {
    let away = SiteId(7);
    let mut lab = source_with_flows(1);
    cut(&mut lab);
    lab.ask(forget_staying("1:100.64.0.0/24", &[away]));
    lab.seconds(10);
    // Of a move that it had not heard of when it flipped.
    let marker = marker_of(MoveId(11), Epoch(3), away, Tag::Marker(away));
    lab.send(marker, Tag::Marker(away));
    assert_eq!(lab.after(SECOND).0, [Event::Gone { group: group_id(), move_id: MOVE }]);
}

/// It is for packets that would be lost otherwise, and must keep nothing that comes back from doing so.
#[test]
fn what_stays_for_an_ingress_that_has_not_flipped_keeps_nothing_from_coming_back() {
    let (next, ordering, away) = (MoveId(10), Ordering::Strict, SiteId(7));
    let staying = |groups: &[&str]| {
        let mut lab = source_with_flows(1);
        groups.iter().filter(|group| **group != "1:100.64.0.0/24").for_each(|group| {
            lab.ask(serve(group));
        });
        for group in groups {
            lab.ask(forget_staying(group, &[away]));
        }
        lab.seconds(10);
        lab
    };
    let prepare = |group: &str| {
        let (group, epoch) = (group.parse().unwrap(), Epoch(3));
        Request::Prepare { group, move_id: next, epoch, source: THERE, flows: 1, ordering }
    };
    let serve = |group: &str| Request::Serve { group: group.parse().unwrap(), epoch: Epoch(3) };
    let (whole, halves) = ("1:100.64.0.0/24", ["1:100.64.0.0/25", "1:100.64.0.128/25"]);
    for (was, comes) in [(&[whole][..], whole), (&halves[..], whole), (&[whole][..], halves[0])] {
        let mut lab = staying(was);
        let group = comes.parse().unwrap();
        let prepared = Event::Prepared { group, move_id: next };
        assert!(lab.ask(prepare(comes)).contains(&prepared), "{was:?}, {comes}");
        assert!(lab.inside(udp(client(), remote(), b"")).is_none(), "{was:?}, {comes}: held");
        let mut lab = staying(was);
        assert!(
            lab.ask(serve(comes)).contains(&Event::Serving { group, epoch: Epoch(3) }),
            "{was:?}, {comes}"
        );
        lab.seconds(40);
        assert!(lab.inside(udp(client(), remote(), b"")).is_some(), "{was:?}, {comes}: served");
        assert_eq!(counts(&mut lab), [(comes.to_owned(), 1)]);
    }
}

/// A site that gave everything away while one agent is away.
#[test]
fn more_stay_than_are_looked_at_in_a_tick_and_all_end() {
    let mut lab = source_with_flows(0);
    let groups: Vec<String> = (0..256).map(|n| format!("1:100.64.0.{n}/32")).collect();
    for group in &groups {
        lab.ask(serve(group));
        lab.ask(forget_staying(group, &[SiteId(7)]));
    }
    lab.seconds(10);
    assert_eq!(counts(&mut lab).len(), groups.len());
    lab.seconds(25);
    assert_eq!(counts(&mut lab), []);
}

#[test]
fn a_target_holds_until_token_and_cut_and_serves_relayed_packets_first() {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let (_, token, packets) = cut(&mut source);
    let mut lab = target();
    lab.ask(install(all));
    assert!(lab.inside(udp(client(), remote(), b"2")).is_none());
    assert!(lab.send(udp(client(), remote(), b"1"), Tag::Relayed(Side::Inside, HERE)).is_empty());
    assert_eq!(lab.ask(join(token, &[])), [], "the cut has not come");
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    let (events, sent) = lab.settle();
    let counters = lab.worker.counters();
    assert_eq!((counters.hold_without_cut, counters.hold_without_marker), (0, 0));
    let payloads: Vec<_> = sent.iter().map(|frame| see(frame).payload).collect();
    assert_eq!(payloads, [b"1", b"2"]);
    assert!(matches!(
        events[..],
        [Event::Joined { flows: 1, hold: flow::HoldTimes { held: 2, .. }, opened_early: false, .. }]
    ));
    assert!(lab.inside(udp(client(), remote(), b"3")).is_some());
    let again = lab.ask(join(token, &[]));
    assert_eq!(again, events, "asked again, it answers the same");
}

#[test]
fn a_batch_in_pieces_is_answered_once_and_removals_come_first() {
    let mut source = source_with_flows(500);
    let mut batch = copied(&mut source);
    let gone = batch.upserts[0].key;
    batch.removals.push((gone, 0));
    let mut lab = target();
    let mut answers = Vec::new();
    let pieces = Request::install(group_id(), MOVE, 7, &batch);
    assert!(matches!(&pieces[0], Request::Install { batch, .. } if batch.removals.len() == 1));
    for piece in pieces {
        answers.extend(lab.ask(piece));
    }
    assert_eq!(answers, [Event::Installed { group: group_id(), move_id: MOVE, sequence: 7 }]);
    assert_eq!(lab.worker.counters().flows, 500, "what was removed before came again");
}

#[test]
fn a_shadow_that_differs_from_the_token_is_not_served() {
    let mut source = source_with_flows(2);
    let mut all = copied(&mut source);
    let (_, token, _) = cut(&mut source);
    let lost = all.upserts.pop().unwrap();
    let mut lab = target();
    lab.ask(install(all.clone()));
    let events = lab.ask(join(token, &[]));
    assert!(matches!(events[..], [Event::Mismatch { have: Token { flows: 1, .. }, .. }]));
    lab.ask(install(Batch { upserts: vec![lost], removals: Vec::new() }));
    lab.ask(join(token, &[]));
    assert!(matches!(lab.after(60_000).0[..], [Event::Joined { flows: 2, .. }]));
}

#[test]
fn holds_that_end_at_their_bounds_are_counted() {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let (_, token, _) = cut(&mut source);
    let mut lab = target();
    lab.ask(install(all));
    lab.send(udp(client(), remote(), b"late"), Tag::Direct(Side::Inside, HERE));
    lab.ask(join(token, &[HERE]));
    let counted = |lab: &Lab| {
        let counters = lab.worker.counters();
        (counters.hold_without_cut, counters.hold_without_marker, counters.hold_opened_early)
    };
    assert_eq!(counted(&lab), (0, 0, 0));
    lab.after(60_000);
    assert_eq!(counted(&lab), (1, 0, 0), "the cut has not come");
    assert_eq!(lab.after(10 * SECOND).1.len(), 1);
    assert_eq!(counted(&lab), (1, 1, 0), "nor the marker");
}

#[test]
fn older_records_and_removals_are_ignored() {
    let mut source = source_with_flows(1);
    let old = copied(&mut source);
    source.inside(udp(client(), remote(), b"x")).unwrap();
    let new = merged(&source.ask(Request::CopyRound { group: group_id(), move_id: MOVE }));
    let mut lab = target();
    lab.ask(install(new.clone()));
    lab.ask(install(old.clone()));
    let removal = (old.upserts[0].key, old.upserts[0].version);
    lab.ask(install(Batch { upserts: Vec::new(), removals: vec![removal] }));
    assert_eq!(lab.worker.counters().flows, 1);
    let newer = (removal.0, new.upserts[0].version + 1);
    lab.ask(install(Batch { upserts: Vec::new(), removals: vec![newer] }));
    lab.ask(install(new));
    assert_eq!(lab.worker.counters().flows, 0, "a late record does not undo a removal");
}

#[test]
fn records_outside_the_group_or_the_block_are_refused_as_a_whole() {
    let mut source = source_with_flows(2);
    let all = copied(&mut source);
    let mut lab = target();
    let mut foreign = all.clone();
    foreign.upserts[1].key.client.address = "100.64.1.1".parse().unwrap();
    let mut port = all;
    port.upserts[1].fixed = flow::Fixed::Nat44 { outside_port: 1 };
    for batch in [foreign, port] {
        assert!(matches!(lab.ask(install(batch))[..], [Event::Refused { .. }]));
    }
    assert_eq!(lab.worker.counters().flows, 0);
}

#[test]
fn packets_of_a_late_ingress_wait_for_its_marker() {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let (_, token, packets) = cut(&mut source);
    let mut lab = target();
    lab.ask(install(all));
    let late = Tag::Direct(Side::Inside, HERE);
    lab.send(udp(client(), remote(), b"2"), late);
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    lab.worker.handle(join(token, &[HERE]), lab.now);
    assert!(lab.settle().1.is_empty());
    assert_eq!(lab.send(udp(client(), remote(), b"1"), Tag::Relayed(Side::Inside, HERE)).len(), 1);
    assert!(lab.send(udp(client(), remote(), b"3"), late).is_empty());
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Relayed(Side::Inside, HERE));
    let payloads: Vec<_> = lab.settle().1.iter().map(|frame| see(frame).payload).collect();
    assert_eq!(payloads, [b"2", b"3"]);
    assert!(lab.inside(udp(client(), remote(), b"4")).is_some());
}

/// The agent of an ingress that heard nothing while the group moved does not know the number of the move.
#[test]
fn a_marker_of_a_move_that_its_ingress_never_heard_of_counts_by_its_epoch() {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let (_, token, packets) = cut(&mut source);
    let unheard = |epoch| marker_of(MoveId::UNHEARD, epoch, HERE, Tag::Marker(HERE));
    let late = |lab: &mut Lab| {
        lab.send(packets[0].clone(), Tag::Cut(HERE));
        lab.ask(join(token, &[HERE]));
        lab.send(udp(client(), remote(), b"1"), Tag::Direct(Side::Inside, HERE)).is_empty()
    };
    let shadow = || {
        let mut lab = target();
        lab.ask(install(all.clone()));
        lab
    };
    let mut before = shadow();
    before.send(unheard(Epoch(2)), Tag::Relayed(Side::Inside, HERE));
    assert!(!late(&mut before), "it came before the join");
    let mut after = shadow();
    // That of a later move says nothing of this one.
    after.send(unheard(Epoch(3)), Tag::Relayed(Side::Inside, HERE));
    assert!(late(&mut after));
    after.send(unheard(Epoch(2)), Tag::Relayed(Side::Inside, HERE));
    assert_eq!(after.settle().1.len(), 1);
}

/// A target that serves and waits for the marker of one ingress.
fn joined_without_a_marker() -> Lab {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let (_, token, packets) = cut(&mut source);
    let mut lab = target();
    lab.ask(install(all));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    lab.ask(join(token, &[HERE]));
    lab
}

/// The move by which a target that waits for the marker of one ingress gives its group to a third site.
const NEXT: MoveId = MoveId(10);
const THIRD: SiteId = SiteId(3);

/// A target that waits for the marker of one ingress is told to give its group to a third site.
fn goes_on_to_the_third(bound_us: u64) -> Lab {
    let mut lab = joined_without_a_marker();
    let (group, move_id, session, credit) = (group_id(), NEXT, 1, u64::MAX);
    lab.ask(Request::CopyStart { group, move_id, session, credit });
    let (epoch, target, awaited) = (Epoch(3), THIRD, vec![HERE]);
    lab.worker.handle(
        Request::Arm { group, move_id, epoch, target, awaited, bound_us, session, credit, again: false },
        lab.now,
    );
    lab.settle();
    lab
}

/// The tag and payload of packets, and the move of markers.
fn told(frames: &[Vec<u8>]) -> Vec<(Tag, Result<Vec<u8>, MoveId>)> {
    let told = |frame: &Vec<u8>| {
        let parsed = packet::parse(frame).unwrap();
        match parsed.content {
            packet::Content::Marker(body, _) => (parsed.tag, Err(body.move_id)),
            packet::Content::Flow(_) | packet::Content::Error(_) => (parsed.tag, Ok(see(frame).payload)),
        }
    };
    frames.iter().map(told).collect()
}

#[test]
fn the_marker_of_the_next_move_comes_behind_what_its_ingress_sent_by_the_path_of_two_moves_before() {
    for forgets in [false, true] {
        let mut lab = goes_on_to_the_third(0);
        if forgets {
            lab.ask(forget_to((NEXT, Epoch(3), THIRD), SECOND));
        }
        assert_eq!(lab.phase(), Some(if forgets { Phase::Tombstone } else { Phase::Relaying }));
        let (direct, relayed) = (Tag::Direct(Side::Inside, HERE), Tag::Relayed(Side::Inside, HERE));
        let on = Tag::Relay(Side::Inside, THIRD);
        assert_eq!(told(&lab.send(udp(client(), remote(), b"2"), direct)), []);
        assert_eq!(told(&lab.send(marker_of(NEXT, Epoch(3), HERE, direct), direct)), []);
        let sent = lab.send(udp(client(), remote(), b"1"), relayed);
        assert_eq!(told(&sent), [(on, Ok(b"1".to_vec()))]);
        let mut sent = lab.send(marker_frame(HERE, relayed), relayed);
        sent.extend(lab.settle().1);
        assert_eq!(told(&sent), [(on, Ok(b"2".to_vec())), (on, Err(NEXT))]);
        assert_eq!(lab.worker.counters().unaccounted(), 0);
    }
}

#[test]
fn a_worker_that_waits_for_an_ingress_and_gave_the_group_away_forgets_it_in_time() {
    let mut lab = goes_on_to_the_third(0);
    let (group, move_id, epoch, target) = (group_id(), NEXT, Epoch(3), THIRD);
    lab.ask(forget_to((move_id, epoch, target), SECOND));
    let direct = Tag::Direct(Side::Inside, HERE);
    assert_eq!(told(&lab.send(udp(client(), remote(), b"1"), direct)), []);
    let (events, sent) = lab.after(30 * SECOND);
    assert_eq!(told(&sent), [(Tag::Relay(Side::Inside, THIRD), Ok(b"1".to_vec()))]);
    assert_eq!(events, [Event::Gone { group, move_id }]);
}

#[test]
fn a_source_does_not_cut_on_a_marker_that_overtook_an_older_path() {
    let mut lab = goes_on_to_the_third(SECOND);
    let (direct, relayed) = (Tag::Direct(Side::Inside, HERE), Tag::Relayed(Side::Inside, HERE));
    lab.send(marker_of(NEXT, Epoch(3), HERE, direct), direct);
    lab.settle();
    assert_eq!(lab.phase(), Some(Phase::Draining));
    lab.send(marker_frame(HERE, relayed), relayed);
    let (events, _) = lab.settle();
    let Some(Event::Cut { missing, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(missing, &[]);
}

#[test]
fn a_marker_goes_on_by_each_site_that_the_group_went_to_from_the_path_that_ends() {
    let mut lab = goes_on_to_the_third(0);
    let relayed = Tag::Relayed(Side::Inside, HERE);
    lab.send(marker_frame(HERE, relayed), relayed);
    let sent = lab.send(marker_of(NEXT, Epoch(3), HERE, relayed), relayed);
    assert_eq!(told(&sent), [(Tag::Relay(Side::Inside, THIRD), Err(NEXT))]);
    assert_eq!(lab.worker.counters().unaccounted(), 0);
}

/// A target that waits for the marker of one ingress gives its group to another worker of its site.
fn next_worker_of_the_site() -> (Lab, Token, Vec<Vec<u8>>) {
    let mut first = joined_without_a_marker();
    first.after(10 * SECOND);
    let group = group_id();
    let move_id = MoveId::local(1);
    let (session, credit, epoch) = (1, u64::MAX, Epoch(2));
    let batch = merged(&first.ask(Request::CopyStart { group, move_id, session, credit }));
    first.worker.handle(
        Request::Arm {
            group,
            move_id,
            epoch,
            target: THERE,
            awaited: Vec::new(),
            bound_us: 0,
            session,
            credit,
            again: false,
        },
        first.now,
    );
    let (events, packets) = first.settle();
    let Some(Event::Cut { token, missing, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(missing, &[HERE]);
    let mut next = Lab::bare(THERE, 64);
    let ordering = Ordering::Strict;
    next.ask(Request::Prepare { group, move_id, epoch, source: THERE, flows: 1, ordering });
    next.ask(Request::Install { group, move_id, sequence: 1, batch, more: false });
    (next, *token, packets)
}

#[test]
fn a_group_that_waits_for_an_ingress_goes_to_no_other_worker_before_it_has_flipped_or_stays_away() {
    let copy = |move_id| Request::CopyStart { group: group_id(), move_id, session: 1, credit: u64::MAX };
    let is_refused = |lab: &mut Lab, move_id| {
        let events = lab.ask(copy(move_id));
        events.iter().any(
            |event| matches!(event, Event::Refused { reason, .. } if reason.contains("waits for ingress")),
        )
    };
    let mut lab = joined_without_a_marker();
    assert!(is_refused(&mut lab, MoveId::local(1)));
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Relayed(Side::Inside, HERE));
    assert!(!is_refused(&mut lab, MoveId::local(2)));

    let mut lab = joined_without_a_marker();
    lab.after(9 * SECOND);
    assert!(is_refused(&mut lab, MoveId::local(1)));
    lab.after(2 * SECOND);
    assert!(!is_refused(&mut lab, MoveId::local(1)), "its agent is away");
    // Another site hears its marker.
    assert!(!is_refused(&mut joined_without_a_marker(), MoveId(77)));
}

fn join_next(lab: &mut Lab, token: Token, packets: &[Vec<u8>]) {
    lab.send(packets[0].clone(), Tag::Cut(THERE));
    let (late_bound_us, cut_bound_us) = (10 * SECOND, 50_000);
    let (group, move_id, missing) = (group_id(), MoveId::local(1), vec![HERE]);
    let events = lab.ask(Request::Join { group, move_id, token, missing, late_bound_us, cut_bound_us });
    assert!(matches!(events[..], [Event::Joined { .. }]), "{events:?}");
}

#[test]
fn an_ingress_that_is_late_is_late_for_the_next_worker_of_the_site_too() {
    let (mut lab, token, packets) = next_worker_of_the_site();
    join_next(&mut lab, token, &packets);
    let late = Tag::Direct(Side::Inside, HERE);
    assert!(lab.send(udp(client(), remote(), b"2"), late).is_empty());
    assert_eq!(lab.send(udp(client(), remote(), b"1"), Tag::Relayed(Side::Inside, HERE)).len(), 1);
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Relayed(Side::Inside, HERE));
    let payloads: Vec<_> = lab.settle().1.iter().map(|frame| see(frame).payload).collect();
    assert_eq!(payloads, [b"2"]);
}

#[test]
fn an_ingress_whose_marker_came_to_the_next_worker_of_the_site_is_late_no_more() {
    let (mut lab, token, packets) = next_worker_of_the_site();
    lab.send(marker_frame(HERE, Tag::Marker(HERE)), Tag::Relayed(Side::Inside, HERE));
    join_next(&mut lab, token, &packets);
    assert_eq!(lab.send(udp(client(), remote(), b"2"), Tag::Direct(Side::Inside, HERE)).len(), 1);
}

#[test]
fn a_full_hold_buffer_opens_early_towards_the_source_and_drops_nothing() {
    let settings = Settings { site: THERE, flow_capacity: 100, hold_packets_max: 2, ..Settings::default() };
    let mut lab = Lab::with(settings, 64);
    lab.ask(prepare(Ordering::Strict));
    for _ in 0..2 {
        assert!(lab.inside(udp(client(), remote(), b"")).is_none());
    }
    assert_eq!(lab.inside(udp(client(), remote(), b"")).unwrap().tag, Tag::Relay(Side::Inside, HERE));
    assert!(lab.send(udp(client(), remote(), b""), Tag::Relayed(Side::Inside, HERE)).is_empty());
    assert_eq!((lab.worker.counters().hold_opened_early, lab.worker.counters().held), (1, 3));
}

#[test]
fn what_a_full_hold_cannot_keep_is_dropped_under_its_own_name() {
    let settings = Settings { site: THERE, flow_capacity: 100, hold_packets_max: 1, ..Settings::default() };
    let mut lab = Lab::with(settings, 64);
    lab.ask(prepare(Ordering::Strict));
    for _ in 0..6 {
        lab.send(udp(client(), remote(), b""), Tag::Relayed(Side::Inside, HERE));
    }
    let counters = lab.worker.counters();
    assert_eq!((counters.held_now, counters.dropped_hold_full, counters.dropped_table_full), (4, 2, 0));
    assert_eq!(counters.unaccounted(), 0);
}

#[test]
fn held_packets_take_no_more_memory_than_their_bound() {
    let settings = Settings { site: THERE, flow_capacity: 100, hold_bytes_max: 2_000, ..Settings::default() };
    let mut lab = Lab::with(settings, 64);
    lab.ask(prepare(Ordering::Strict));
    for _ in 0..100 {
        lab.inside(udp(client(), remote(), &[0; 100]));
        lab.send(udp(client(), remote(), &[0; 100]), Tag::Relayed(Side::Inside, HERE));
        assert!(lab.worker.counters().held_bytes_now <= 2_000 + 300);
    }
    let counters = lab.worker.counters();
    assert!(counters.hold_opened_early > 0 && counters.dropped_hold_full > 0, "{counters:?}");
    assert_eq!(counters.unaccounted(), 0);
}

#[test]
fn late_packets_are_served_out_of_order_rather_than_dropped_when_the_hold_is_full() {
    let mut source = source_with_flows(3);
    let all = copied(&mut source);
    let (_, token, packets) = cut(&mut source);
    let settings = Settings { site: THERE, flow_capacity: 100, hold_packets_max: 4, ..Settings::default() };
    let mut lab = Lab::with(settings, 64);
    lab.ask(prepare(Ordering::Strict));
    lab.ask(install(all));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    lab.ask(join(token, &[HERE]));
    let late = Tag::Direct(Side::Inside, HERE);
    let sent: usize = (0..50).map(|_| lab.send(udp(client(), remote(), b"x"), late).len()).sum();
    assert!(sent >= 46, "{sent}");
    let counters = lab.worker.counters();
    assert_eq!((counters.dropped_hold_full, counters.unaccounted()), (0, 0));
    assert!(counters.hold_opened_early > 0);
}

#[test]
fn a_group_that_still_waits_for_a_late_ingress_splits() {
    let mut lab = joined_without_a_marker();
    let half = GroupId { prefix: group_id().prefix.halves().unwrap().0, ..group_id() };
    let events = lab.ask(Request::Serve { group: half, epoch: Epoch(2) });
    assert!(
        events.iter().any(|event| matches!(event, Event::Serving { group, .. } if *group == half)),
        "{events:?}"
    );
}

#[test]
fn a_worker_cuts_without_markers_only_when_it_is_told_to() {
    let mut source = source_with_flows(1);
    copied(&mut source);
    source.ask(arm(&[HERE], u64::MAX));
    assert_eq!(source.after(60 * SECOND).0, []);
    source.worker.handle(arm(&[HERE], 0), source.now);
    let (events, _) = source.settle();
    let late = |event: &Event| matches!(event, Event::Cut { missing, .. } if missing == &[HERE]);
    assert!(events.iter().any(late), "{events:?}");
}

#[test]
fn an_abandoned_target_gives_back_what_it_held() {
    let mut lab = target();
    for payload in [b"1", b"2"] {
        lab.inside(udp(client(), remote(), payload));
    }
    lab.worker.handle(
        Request::Abandon { group: group_id(), move_id: MOVE, relay_us: 5_000, relay_late_us: 0 },
        lab.now,
    );
    let (events, sent) = lab.settle();
    assert_eq!(events, [Event::Abandoned { group: group_id(), move_id: MOVE, joined: false }]);
    let seen: Vec<_> = sent.iter().map(|frame| (see(frame).tag, see(frame).payload)).collect();
    assert_eq!(seen, [b"1", b"2"].map(|payload| (Tag::Relay(Side::Inside, HERE), payload.to_vec())));
    assert_eq!(lab.after(5_001).0, [Event::Gone { group: group_id(), move_id: MOVE }]);
}

/// An ingress led here before the move was taken back, and its agent is away since: it may be silent for a while.
#[test]
fn an_abandoned_target_relays_as_long_as_an_ingress_may_lead_here() {
    let gone = [Event::Gone { group: group_id(), move_id: MOVE }];
    let mut lab = target();
    let (group, move_id) = (group_id(), MOVE);
    lab.ask(Request::Abandon { group, move_id, relay_us: SECOND, relay_late_us: 30 * SECOND });
    for _ in 0..3 {
        lab.seconds(29);
        let relayed = lab.inside(udp(client(), remote(), b"")).map(|seen| seen.tag);
        assert_eq!(relayed, Some(Tag::Relay(Side::Inside, HERE)));
    }
    lab.seconds(29);
    assert_eq!(lab.phase(), Some(Phase::Tombstone));
    assert_eq!(lab.after(2 * SECOND).0, gone);
}

#[test]
fn a_reservation_without_room_is_refused() {
    let mut lab = Lab::with(Settings { site: THERE, flow_capacity: 50, ..Settings::default() }, 64);
    assert!(matches!(lab.ask(prepare(Ordering::Strict))[..], [Event::Refused { .. }]));
}

#[test]
fn the_shadow_of_a_dead_source_is_served_as_it_is() {
    let mut source = source_with_flows(3);
    let all = copied(&mut source);
    let mut lab = target();
    lab.ask(install(all));
    let events = lab.ask(Request::TakeOver { group: group_id(), move_id: MOVE });
    assert!(matches!(events[..], [Event::Joined { flows: 3, .. }]));
}

#[test]
fn timers_stand_still_from_the_cut_until_the_target_serves() {
    let mut source = source_with_flows(1);
    source.seconds(290);
    let (all, token, packets) = cut(&mut source);
    assert!(all.upserts[0].joined.remaining_s <= 11, "{all:?}");
    let mut lab = target();
    lab.ask(install(all));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    source.seconds(100);
    lab.seconds(100);
    assert_eq!((source.worker.counters().flows, lab.worker.counters().flows), (1, 1));
    lab.ask(join(token, &[]));
    lab.seconds(8);
    assert_eq!(lab.worker.counters().flows, 1);
    lab.seconds(60);
    assert_eq!(lab.worker.counters().flows, 0);
}

#[test]
fn a_relaxed_target_serves_at_once_and_counts_of_both_sites_add_up() {
    let mut source = source_with_flows(1);
    let all = copied(&mut source);
    let mut lab = Lab::bare(THERE, 64);
    lab.ask(prepare(Ordering::Relaxed));
    lab.ask(install(all));
    lab.ask(Request::Open { group: group_id(), move_id: MOVE });
    for _ in 0..3 {
        assert!(lab.inside(udp(client(), remote(), b"")).is_some());
    }
    assert!(lab.inside(udp(client(), (remote().0, 9), b"new")).is_some());
    source.inside(udp(client(), remote(), b"")).unwrap();
    let (rest, token, packets) = cut(&mut source);
    lab.ask(install(rest));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    assert!(matches!(lab.ask(join(token, &[]))[..], [Event::Joined { flows: 2, .. }]));
    let events =
        lab.ask(Request::CopyStart { group: group_id(), move_id: MoveId(10), session: 0, credit: u64::MAX });
    let record = merged(&events).upserts.into_iter().find(|record| record.key.remote.port == 53).unwrap();
    assert_eq!(record.joined.packets_out, 1 + 3 + 1);
    assert_eq!(record.joined.tcp, TcpState::None);
}

/// The source has made the mapping since the copy.
#[test]
fn a_relaxed_target_asks_the_source_about_an_error_of_a_client_whose_mapping_it_lacks() {
    let mut lab = Lab::bare(THERE, 64);
    lab.ask(prepare(Ordering::Relaxed));
    lab.ask(install(Batch::default()));
    lab.ask(Request::Open { group: group_id(), move_id: MOVE });
    let inbound = udp(remote(), client(), b"x");
    let mut icmp = vec![3, 3, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&inbound[packet::IP..packet::IP + 28]);
    let sum = !packet::ones_complement(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let error = packet::build_ip(Tag::ToOutside, 1, client().0, remote().0, &icmp);
    let asked = lab.send(error.clone(), Tag::Direct(Side::Inside, HERE));
    assert_eq!(asked, [with_tag(error, Tag::Relay(Side::Inside, HERE))]);
}

#[test]
fn a_relaxed_target_asks_the_source_about_tcp_that_opens_nothing() {
    let mut source = source_with_flows(0);
    let out = source.inside(tcp(client(), remote(), SYN)).unwrap();
    let other = (remote().0, 8_080);
    source.inside(tcp(client(), other, SYN)).unwrap();
    let mut first = copied(&mut source);
    first.upserts.retain(|record| record.key.remote.port == remote().1);
    let mut lab = Lab::bare(THERE, 64);
    lab.ask(prepare(Ordering::Relaxed));
    lab.ask(install(first));
    lab.ask(Request::Open { group: group_id(), move_id: MOVE });
    let reset = tcp(client(), other, RST);
    let asked = lab.send(reset.clone(), Tag::Direct(Side::Inside, HERE));
    assert_eq!(asked, [with_tag(reset, Tag::Relay(Side::Inside, HERE))], "the source has the flow");
    let answer = tcp(other, out.source, SYN | ACK);
    let asked = lab.send(answer.clone(), Tag::Direct(Side::Outside, HERE));
    assert_eq!(
        asked,
        [with_tag(answer, Tag::Relay(Side::Outside, HERE))],
        "the mapping is here, the flow is not"
    );
}

/// A relaxed target that serves a whole copy of the source.
fn open_target(source: &mut Lab) -> Lab {
    let all = copied(source);
    let mut lab = Lab::bare(THERE, 64);
    lab.ask(prepare(Ordering::Relaxed));
    lab.ask(install(all));
    lab.ask(Request::Open { group: group_id(), move_id: MOVE });
    assert_eq!(lab.phase(), Some(Phase::Open));
    lab
}

/// The source has seen both ends of a session, the target the beginning of the next one on the same ports.
#[test]
fn a_session_that_began_anew_at_a_relaxed_target_is_not_ended_by_the_one_before() {
    let mut source = source_with_flows(0);
    let out = source.inside(tcp(client(), remote(), SYN)).unwrap();
    let from_world = |flags| tcp(remote(), out.source, flags);
    let outside = |lab: &mut Lab, flags| lab.send(from_world(flags), Tag::Direct(Side::Outside, HERE)).len();
    assert_eq!(outside(&mut source, SYN | ACK), 1);
    let mut lab = open_target(&mut source);
    source.inside(tcp(client(), remote(), FIN | ACK)).unwrap();
    assert_eq!(outside(&mut source, FIN | ACK), 1);

    lab.inside(tcp(client(), remote(), SYN)).unwrap();
    assert_eq!(outside(&mut lab, SYN | ACK), 1);
    let (rest, token, packets) = cut(&mut source);
    lab.ask(install(rest));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    assert!(matches!(lab.ask(join(token, &[]))[..], [Event::Joined { flows: 1, .. }]));
    // Longer than any session is kept that is not in use.
    for _ in 0..130 {
        lab.seconds(60);
        assert_eq!(outside(&mut lab, ACK), 1);
    }
}

/// RFC 4787, REQ-1 and REQ-3: two sites that gave ports at the same time would give one endpoint two, or one port to two endpoints.
#[test]
fn in_a_relaxed_move_only_the_source_gives_ports() {
    let mut source = source_with_flows(1);
    let mut lab = open_target(&mut source);
    let fresh = udp((client().0, 9), remote(), b"new");
    let asked = lab.send(fresh.clone(), Tag::Direct(Side::Inside, HERE));
    assert_eq!(asked, [with_tag(fresh.clone(), Tag::Relay(Side::Inside, HERE))]);
    let opened = source.send(asked[0].clone(), Tag::Relayed(Side::Inside, THERE));
    let port = see(&opened[0]).source;
    let (rest, token, packets) = cut(&mut source);
    let back = source.send(fresh.clone(), Tag::Relayed(Side::Inside, THERE));
    assert_eq!(back, [with_tag(fresh.clone(), Tag::Relay(Side::Inside, THERE))], "it serves no more");
    assert!(lab.send(back[0].clone(), Tag::Relayed(Side::Inside, HERE)).is_empty(), "it waits for the join");
    lab.ask(install(rest));
    lab.send(packets[0].clone(), Tag::Cut(HERE));
    lab.worker.handle(join(token, &[]), lab.now);
    let (_, served) = lab.settle();
    assert_eq!(served.iter().map(|frame| see(frame).source).collect::<Vec<_>>(), [port]);
    assert_eq!(lab.inside(fresh).unwrap().source, port);
}

/// The target may serve them, and only the source gives ports.
#[test]
fn ports_of_a_whole_copy_stay_taken_at_the_source_until_the_move_is_over() {
    let mut source = source_with_flows(1);
    source.seconds(290);
    let all = copied(&mut source);
    assert_eq!(all.upserts.len(), 1);
    source.seconds(20);
    assert_eq!(source.worker.counters().flows, 1, "its time is over, and its target may serve it");
    source.ask(Request::Disarm { group: group_id(), move_id: MOVE, withdraw: false });
    source.seconds(10);
    assert_eq!(source.worker.counters().flows, 0);
}

#[test]
fn a_move_that_does_not_end_keeps_flows_for_half_a_minute_at_most() {
    let mut source = source_with_flows(1);
    source.seconds(290);
    copied(&mut source);
    source.seconds(25);
    copied(&mut source);
    source.seconds(20);
    assert_eq!(source.worker.counters().flows, 0);
}

type Link = VecDeque<(Vec<u8>, Tag)>;

/// Two sites, two ingresses, an agent that carries records, and links that are first-in first-out but of
/// any relative speed.
struct Net {
    workers: [Lab; 2],
    /// To worker w: from ingress 0, from ingress 1, from the other worker.
    links: [[Link; 3]; 2],
    requests: [VecDeque<Request>; 2],
    flipped: [bool; 2],
    may_flip: bool,
    bound_us: u64,
    ordering: Ordering,
    rounds: u32,
    joined: bool,
    sent: BTreeMap<(u8, bool), u32>,
    arrived: BTreeMap<(u8, bool), Vec<u32>>,
    outside: BTreeMap<u8, (u32, u16)>,
}

const SITES: [SiteId; 2] = [HERE, THERE];

impl Net {
    fn new(ordering: Ordering, bound_us: u64) -> Self {
        let mut target = Lab::bare(THERE, 64);
        target.ask(prepare(ordering));
        let start = Request::CopyStart { group: group_id(), move_id: MOVE, session: 0, credit: u64::MAX };
        Self {
            workers: [Lab::serving(64), target],
            links: Default::default(),
            requests: [VecDeque::from([start]), VecDeque::new()],
            flipped: [false; 2],
            may_flip: false,
            bound_us,
            ordering,
            rounds: 0,
            joined: false,
            sent: BTreeMap::new(),
            arrived: BTreeMap::new(),
            outside: BTreeMap::new(),
        }
    }

    /// A packet of a flow enters; clients of odd flows sit at the second ingress.
    fn enter(&mut self, flow: u8, inside: bool) {
        let number = self.sent.get(&(flow, inside)).copied().unwrap_or(0);
        let payload = [&[flow, u8::from(inside)][..], &number.to_be_bytes()].concat();
        let frame = match (inside, self.outside.get(&flow)) {
            (true, _) => udp((client().0 + u32::from(flow % 3), 4000 + u16::from(flow)), remote(), &payload),
            (false, Some(mapped)) => udp(remote(), *mapped, &payload),
            (false, None) => return,
        };
        self.sent.insert((flow, inside), number + 1);
        let ingress = usize::from(flow % 2) ^ usize::from(!inside);
        let side = if inside { Side::Inside } else { Side::Outside };
        let to = usize::from(self.flipped[ingress]);
        self.links[to][ingress].push_back((frame, Tag::Direct(side, SITES[ingress])));
    }

    fn flip(&mut self, ingress: usize) {
        if self.may_flip && !std::mem::replace(&mut self.flipped[ingress], true) {
            let tag = Tag::Marker(SITES[ingress]);
            self.links[0][ingress].push_back((marker_frame(SITES[ingress], tag), tag));
        }
    }

    fn deliver(&mut self, to: usize, link: usize) {
        let Some((frame, tag)) = self.links[to][link].pop_front() else { return };
        let packets = self.workers[to].send(frame, tag);
        self.emit(to, packets);
    }

    fn emit(&mut self, from: usize, packets: Vec<Vec<u8>>) {
        for frame in packets {
            let tag = packet::parse(&frame).unwrap().tag;
            let link = &mut self.links[1 - from][2];
            if let Tag::Relay(side, _) = tag {
                link.push_back((frame, Tag::Relayed(side, SITES[from])));
            } else if let Tag::SendCut(_) = tag {
                link.push_back((frame, Tag::Cut(SITES[from])));
            } else {
                self.leave(&see(&frame));
            }
        }
    }

    fn leave(&mut self, seen: &Seen) {
        let (flow, inside) = (seen.payload[0], seen.payload[1] == 1);
        let number = u32::from_be_bytes(seen.payload[2..6].try_into().unwrap());
        if inside {
            assert_eq!(*self.outside.entry(flow).or_insert(seen.source), seen.source, "the port changed");
            let mut others = self.outside.iter().filter(|(other, _)| **other != flow);
            assert!(others.all(|(_, port)| *port != seen.source), "two endpoints have one port");
        } else {
            assert_eq!(seen.destination.1, 4000 + u16::from(flow));
        }
        self.arrived.entry((flow, inside)).or_default().push(number);
    }

    /// One slice of a worker, and what the agents make of its events.
    fn slice(&mut self, at: usize) {
        let lab = &mut self.workers[at];
        lab.now = lab.now.plus(Micros(50));
        let mut out = Output::default();
        lab.worker.slice(lab.now, &mut out);
        while let Some(event) = self.workers[at].worker.poll_event() {
            self.agents(event);
        }
        self.emit(at, out.tx);
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "nothing else may come")]
    fn agents(&mut self, event: Event) {
        let group = group_id();
        match event {
            Event::Records { batch, .. } => self.requests[1].push_back(install(batch)),
            Event::RoundEnd { .. } if self.rounds == 0 => {
                self.rounds = 1;
                self.requests[0].push_back(Request::CopyRound { group, move_id: MOVE });
            }
            Event::RoundEnd { .. } => {
                self.may_flip = true;
                self.requests[0].push_back(arm(&SITES, self.bound_us));
                if self.ordering == Ordering::Relaxed {
                    self.requests[1].push_back(Request::Open { group, move_id: MOVE });
                }
            }
            Event::Cut { token, missing, .. } => self.requests[1].push_back(Request::Join {
                group,
                move_id: MOVE,
                token,
                missing,
                late_bound_us: 1 << 40,
                cut_bound_us: 1 << 40,
            }),
            Event::Joined { .. } => {
                self.joined = true;
                self.requests[0].push_back(forget(1 << 40));
            }
            other => assert!(matches!(other, Event::Installed { .. }), "{other:?}"),
        }
    }

    fn control(&mut self, at: usize) {
        if let Some(request) = self.requests[at].pop_front() {
            let now = self.workers[at].now;
            self.workers[at].worker.handle(request, now);
        }
    }

    fn step(&mut self, choice: u8, flow: u8) {
        match choice % 16 {
            0..=2 => self.enter(flow, true),
            3..=4 => self.enter(flow, false),
            5 => self.flip(usize::from(flow % 2)),
            6 | 7 => self.control(usize::from(flow % 2)),
            8 | 9 => self.slice(usize::from(flow % 2)),
            _ => self.deliver(usize::from(flow % 2), usize::from(choice / 16 % 3)),
        }
    }

    fn finish(&mut self) {
        for _ in 0..400 {
            for at in 0..2 {
                self.control(at);
                self.slice(at);
                self.flip(at);
                for link in 0..3 {
                    self.deliver(at, link);
                }
            }
        }
        assert!(self.joined, "the move did not end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_strict_move_at_any_moment_keeps_every_packet_its_port_and_its_order(
        steps in proptest::collection::vec((any::<u8>(), 0u8..8), 0..400), bound in prop_oneof![Just(0u64), Just(1 << 40)],
    ) {
        let mut net = Net::new(Ordering::Strict, bound);
        for (choice, flow) in steps {
            net.step(choice, flow);
        }
        net.finish();
        for (key, count) in &net.sent {
            prop_assert_eq!(net.arrived.get(key).cloned().unwrap_or_default(), (0..*count).collect::<Vec<_>>());
        }
        prop_assert_eq!(net.workers[0].worker.counters().flows, 0);
    }

    #[test]
    fn a_relaxed_move_keeps_every_packet_and_its_port(
        known in 0u8..8, steps in proptest::collection::vec((any::<u8>(), 0u8..8), 0..400),
    ) {
        let mut net = Net::new(Ordering::Relaxed, 1 << 40);
        for flow in 0..known {
            net.enter(flow, true);
            net.deliver(0, usize::from(flow % 2));
        }
        for (choice, flow) in steps {
            net.step(choice, flow);
        }
        net.finish();
        for (key, count) in &net.sent {
            let mut arrived = net.arrived.get(key).cloned().unwrap_or_default();
            arrived.sort_unstable();
            prop_assert_eq!(arrived, (0..*count).collect::<Vec<_>>());
        }
        let counted: u64 = net.sent.values().map(|count| u64::from(*count)).sum();
        let copy = merged(&net.workers[1].ask(Request::CopyStart { group: group_id(), move_id: MoveId(10), session: 0, credit: u64::MAX }));
        let joined: u64 = copy.upserts.iter().map(|r| r.joined.packets_out + r.joined.packets_in).sum();
        prop_assert_eq!(joined, counted);
    }
}

#[test]
fn groups_split_and_merge_with_their_flows_when_the_parts_or_the_whole_are_served() {
    let mut lab = source_with_flows(40);
    let serve = |text: &str| Request::Serve { group: text.parse().unwrap(), epoch: Epoch(1) };
    let flows = |lab: &mut Lab| {
        let events = lab.ask(Request::Status);
        let [Event::Status { groups, .. }] = &events[..] else { panic!("{events:?}") };
        groups.iter().map(|status| (status.group.to_string(), status.flows)).collect::<Vec<_>>()
    };
    lab.ask(serve("1:100.64.0.0/30"));
    assert_eq!(flows(&mut lab), [("1:100.64.0.0/24".to_owned(), 25), ("1:100.64.0.0/30".to_owned(), 15)]);
    assert!(lab.inside(udp(client(), remote(), b"")).is_some());
    lab.ask(serve("1:100.64.0.0/24"));
    lab.ask(serve("1:100.64.0.0/23"));
    assert_eq!(flows(&mut lab), [("1:100.64.0.0/23".to_owned(), 40)]);
    lab.ask(serve("1:100.64.0.0/24"));
    lab.ask(serve("1:100.64.1.0/24"));
    assert_eq!(flows(&mut lab), [("1:100.64.0.0/24".to_owned(), 40), ("1:100.64.1.0/24".to_owned(), 0)]);
    let (all, token, _) = cut(&mut lab);
    let digest = all.upserts.iter().fold(0u64, |sum, record| sum.wrapping_add(record.digest()));
    assert_eq!((token.flows, token.digest), (40, digest));
    lab.seconds(310);
}

/// All flows that the groups of a worker have, by status.
fn counts(lab: &mut Lab) -> Vec<(String, u64)> {
    let events = lab.ask(Request::Status);
    let status = events
        .iter()
        .find_map(|event| if let Event::Status { groups, .. } = event { Some(groups) } else { None });
    status.unwrap().iter().map(|status| (status.group.to_string(), status.flows)).collect()
}

fn serve(text: &str) -> Request {
    Request::Serve { group: text.parse().unwrap(), epoch: Epoch(1) }
}

#[test]
fn a_large_group_is_divided_in_slices_and_its_packets_are_served_meanwhile() {
    let mut lab = Lab::serving(1_008);
    let from = |n: u32| (address("100.64.0.0") + n % 256, 5_000 + (n / 256) as u16);
    for n in 0..1_000 {
        assert!(lab.inside(udp(from(n), remote(), b"")).is_some());
    }
    lab.worker.handle(serve("1:100.64.0.0/25"), lab.now);
    lab.worker.handle(serve("1:100.64.0.128/25"), lab.now);
    assert_eq!(std::iter::from_fn(|| lab.worker.poll_event()).collect::<Vec<_>>(), [], "it is not whole yet");
    let created = lab.worker.counters().flows_created;
    for n in (0..1_000).rev().step_by(7) {
        assert!(lab.inside(udp(from(n), remote(), b"")).is_some());
    }
    assert_eq!(lab.worker.counters().flows_created, created, "every packet has found its flow");
    let (served, _) = lab.settle();
    let both = served.iter().filter(|event| matches!(event, Event::Serving { .. })).count();
    assert_eq!(both, 2, "{served:?}");
    let halves = [("1:100.64.0.0/25".to_owned(), 512), ("1:100.64.0.128/25".to_owned(), 488)];
    assert_eq!(counts(&mut lab), halves);
}

#[test]
fn a_half_that_moves_at_once_takes_all_its_flows_along() {
    let mut lab = source_with_flows(40);
    lab.worker.handle(serve("1:100.64.0.0/25"), lab.now);
    lab.worker.handle(serve("1:100.64.0.128/25"), lab.now);
    let group: flow::GroupId = "1:100.64.0.0/25".parse().unwrap();
    let copy = merged(&lab.ask(Request::CopyStart { group, move_id: MOVE, session: 0, credit: u64::MAX }));
    assert_eq!(copy.upserts.len(), 40);
}

proptest! {
    /// Splits, merges and packets in any order: no flow is lost, and each counter and timer goes on.
    #[test]
    fn flows_survive_any_splits_and_merges(steps in prop::collection::vec((0u8..8, 24u8..28, any::<u8>()), 1..80)) {
        let mut lab = Lab::serving(1_008);
        let mut sent = std::collections::BTreeMap::<u32, u64>::new();
        for (kind, len, host) in steps {
            let client = address("100.64.0.0") + u32::from(host);
            match kind {
                0..3 => {
                    prop_assert!(lab.inside(udp((client, 5_000), remote(), b"")).is_some());
                    *sent.entry(client).or_default() += 1;
                }
                3..6 => {
                    let prefix = flow::Prefix::containing(std::net::Ipv4Addr::from(client).into(), len).unwrap();
                    let group = flow::GroupId { service: group_id().service, prefix };
                    lab.worker.handle(Request::Serve { group, epoch: Epoch(1) }, lab.now);
                }
                _ => lab.seconds(1),
            }
        }
        // A part that was never named is still the whole's; to merge all shows every flow.
        lab.seconds(1);
        lab.worker.handle(serve("1:100.64.0.0/23"), lab.now);
        lab.seconds(1);
        prop_assert_eq!(counts(&mut lab), [("1:100.64.0.0/23".to_owned(), sent.len() as u64)]);
        let group = "1:100.64.0.0/23".parse().unwrap();
        let copy = merged(&lab.ask(Request::CopyStart { group, move_id: MOVE, session: 0, credit: u64::MAX }));
        let counted: std::collections::BTreeMap<u32, u64> = copy.upserts.iter().map(|record| {
            let std::net::IpAddr::V4(client) = record.key.client.address else { unreachable!() };
            (client.into(), record.joined.packets_out)
        }).collect();
        prop_assert_eq!(counted, sent);
        prop_assert!(copy.upserts.iter().all(|record| record.joined.remaining_s <= 300));
        lab.seconds(310);
        prop_assert_eq!(lab.worker.counters().flows, 0);
    }
}

#[test]
fn a_half_that_only_relays_is_no_obstacle_to_the_whole_nor_the_whole_to_a_half() {
    let bury = |group: &str| Request::Forget {
        group: group.parse().unwrap(),
        move_id: MOVE,
        epoch: Epoch(2),
        target: THERE,
        relay_us: 10 * SECOND,
        ingresses: vec![],
        relay_late_us: 0,
    };
    let again = |text: &str| Request::Serve { group: text.parse().unwrap(), epoch: Epoch(3) };
    let mut lab = source_with_flows(40);
    lab.ask(serve("1:100.64.0.0/25"));
    lab.ask(serve("1:100.64.0.128/25"));
    lab.ask(bury("1:100.64.0.128/25"));
    assert!(lab.ask(again("1:100.64.0.0/24")).iter().any(|event| matches!(event, Event::Serving { .. })));
    assert_eq!(counts(&mut lab), [("1:100.64.0.0/24".to_owned(), 40)]);
    lab.ask(Request::Forget {
        group: group_id(),
        move_id: MOVE,
        epoch: Epoch(4),
        target: THERE,
        relay_us: 10 * SECOND,
        ingresses: vec![],
        relay_late_us: 0,
    });
    let half = Request::Serve { group: "1:100.64.0.0/25".parse().unwrap(), epoch: Epoch(5) };
    assert!(lab.ask(half).iter().any(|event| matches!(event, Event::Serving { .. })));
    let all = [("1:100.64.0.0/24".to_owned(), 0), ("1:100.64.0.0/25".to_owned(), 0)];
    assert_eq!(counts(&mut lab), all);
    lab.seconds(11);
    assert_eq!(counts(&mut lab), [("1:100.64.0.0/25".to_owned(), 0)]);
}

#[test]
fn halves_merge_also_where_the_whole_was_given_away_before_and_still_relays() {
    let mut lab = source_with_flows(0);
    let forget = forget(10 * SECOND);
    lab.ask(forget);
    let serve = |text: &str| Request::Serve { group: text.parse().unwrap(), epoch: Epoch(3) };
    lab.ask(serve("1:100.64.0.0/25"));
    lab.ask(serve("1:100.64.0.128/25"));
    assert!(lab.inside(udp(client(), remote(), b"")).is_some());
    let did = lab.ask(serve("1:100.64.0.0/24"));
    assert!(matches!(did[..], [.., Event::Serving { group, .. }] if group == group_id()), "{did:?}");
    lab.seconds(1);
    assert_eq!(counts(&mut lab), [("1:100.64.0.0/24".to_owned(), 1)]);
}

#[test]
fn a_worker_that_yields_relays_to_its_own_site_and_forgets_under_the_same_epoch() {
    let mut lab = source_with_flows(100);
    assert_eq!(lab.ask(Request::Yield { group: group_id(), relay_us: SECOND }), []);
    assert_eq!(lab.worker.counters().flows, 0);
    assert_eq!(lab.inside(udp(client(), remote(), b"")).unwrap().tag, Tag::Relay(Side::Inside, HERE));
    // Asked again, it goes on as it is.
    assert_eq!(lab.ask(Request::Yield { group: group_id(), relay_us: SECOND }), []);
    assert_eq!(lab.phase(), Some(Phase::Tombstone));
    let gone = lab.after(5 * SECOND).0;
    assert!(matches!(gone[..], [Event::Gone { group, .. }] if group == group_id()), "{gone:?}");
    // It may have it again, from the one that has it now or anew.
    let serving = Event::Serving { group: group_id(), epoch: Epoch(1) };
    assert_eq!(lab.ask(Request::Serve { group: group_id(), epoch: Epoch(1) }), [serving]);
}
