//! State, event, actions of the driver.
#![expect(clippy::wildcard_enum_match_arm, reason = "a test names what it is about and nothing else")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::sync::Arc;

use flow::Micros;
use switchctl::core::driver::{Driver, DriverError, Event, Output, Proof, QueryId, SILENCE_BOUND};
use switchctl::core::rules::PacketIn;
use switchctl::ofp::{BundleControl, Command, FlowStats, Message, Reply};
use switchctl::{Action, Match, PacketOut, PortNo, Rule, RuleKey, RuleSet};

const T: Micros = Micros(0);

fn rules(ports: &[u32]) -> Arc<RuleSet> {
    let rule = |&port: &u32| {
        let key = RuleKey { table: 0, priority: 1, matches: Match::any().in_port(PortNo(port)) };
        (key, Rule { cookie: 1, actions: vec![Action::Output(PortNo(9))], goto: None })
    };
    Arc::new(ports.iter().map(rule).collect())
}

fn outputs(driver: &mut Driver) -> Vec<Output> {
    std::iter::from_fn(|| driver.poll_output()).collect()
}

/// The messages, by what matters, and the id of the last.
fn names(outputs: &[Output]) -> (Vec<String>, u32) {
    let mut last = 0;
    let name = |output: &Output| match output {
        Output::Send(xid, message) => {
            last = *xid;
            match message {
                Message::BundleControl { control, .. } => format!("{control:?}"),
                Message::BundleAdd { message, .. } => match &**message {
                    Message::FlowMod(change) if change.command == Command::Add => "add".into(),
                    Message::FlowMod(change) if change.command == Command::DeleteStrict => "delete".into(),
                    Message::FlowMod(_) => "clear".into(),
                    other => format!("{other:?}"),
                },
                Message::Hello { .. } => "hello".into(),
                Message::MultipartRequest(_) => "read".into(),
                Message::PacketOut(packet) => format!("packet {}", packet.bytes[0]),
                other => format!("{other:?}"),
            }
        }
        Output::Settle(_) => "settle".into(),
        Output::Close => "close".into(),
        Output::Event(event) => match event {
            Event::InForce { tag, changes } => format!("in force {tag} {changes}"),
            Event::Connected { rules, .. } => format!("connected {rules}"),
            Event::Disconnected => "disconnected".into(),
            Event::Error(DriverError::RulesRefused { tag, .. }) => format!("refused {tag}"),
            other => format!("{other:?}"),
        },
    };
    (outputs.iter().map(name).collect(), last)
}

/// Takes a driver up to the question for rules, and answers it.
fn connect(driver: &mut Driver, present: &RuleSet) {
    driver.handle_connected(T);
    driver.handle_message(0, Message::hello(), T);
    let features = Message::FeaturesReply { datapath: 7, buffers: 0, tables: 8, capabilities: 0 };
    driver.handle_message(2, features, T);
    let (sent, xid) = names(&outputs(driver));
    assert_eq!(sent, ["hello", "FeaturesRequest", "read"]);
    let flow =
        |(key, rule): (&RuleKey, &Rule)| FlowStats { key: *key, rule: rule.clone(), ..FlowStats::default() };
    let reply = Reply::Flows(present.iter().map(flow).collect());
    driver.handle_message(xid, Message::MultipartReply { reply, more: false }, T);
}

fn answer(driver: &mut Driver, xid: u32, control: BundleControl) {
    driver.handle_message(xid, Message::BundleControl { bundle: 1, control, flags: 3 }, T);
}

/// Answers everything until the datapath is settled; gives all that was done.
fn finish(driver: &mut Driver) -> Vec<String> {
    let mut done = Vec::new();
    loop {
        let next = outputs(driver);
        if next.is_empty() {
            return done;
        }
        for output in &next {
            match output {
                Output::Send(xid, Message::BarrierRequest) => {
                    driver.handle_message(*xid, Message::BarrierReply, T)
                }
                Output::Send(xid, Message::BundleControl { control: BundleControl::CommitRequest, .. }) => {
                    answer(driver, *xid, BundleControl::CommitReply);
                }
                Output::Settle(number) => driver.handle_settled(*number, T),
                _ => {}
            }
        }
        done.extend(names(&next).0);
    }
}

fn packet(byte: u8) -> Vec<PacketOut> {
    vec![PacketOut {
        bytes: vec![byte],
        in_port: PortNo::CONTROLLER,
        actions: vec![Action::Output(PortNo(1))],
    }]
}

#[test]
fn a_bundle_commits_after_its_barrier_and_is_in_force_after_the_next_and_settling() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    driver.set_rules(rules(&[1, 2]), 5, T);
    let (sent, barrier) = names(&outputs(&mut driver));
    assert_eq!(sent, ["connected 0", "OpenRequest", "add", "add", "BarrierRequest"]);
    driver.handle_message(barrier, Message::BarrierReply, T);
    let (sent, commit) = names(&outputs(&mut driver));
    assert_eq!(sent, ["CommitRequest"]);
    answer(&mut driver, commit, BundleControl::CommitReply);
    let (sent, barrier) = names(&outputs(&mut driver));
    assert_eq!(sent, ["BarrierRequest"]);
    driver.handle_message(barrier, Message::BarrierReply, T);
    let settle = outputs(&mut driver);
    let [Output::Settle(number)] = settle[..] else { panic!("{settle:?}") };
    driver.handle_settled(number + 1, T);
    assert_eq!(outputs(&mut driver), []);
    driver.handle_settled(number, T);
    assert_eq!(names(&outputs(&mut driver)).0, ["in force 5 2"]);
}

#[test]
fn a_refused_change_discards_the_bundle_and_is_tried_again_from_what_the_switch_has() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    driver.set_rules(rules(&[1, 2]), 5, T);
    let (_, barrier) = names(&outputs(&mut driver));
    driver.handle_message(barrier - 1, Message::Error { kind: 5, code: 1, data: Vec::new() }, T);
    driver.handle_message(barrier, Message::BarrierReply, T);
    let (sent, discard) = names(&outputs(&mut driver));
    assert_eq!(sent, ["DiscardRequest"]);
    answer(&mut driver, discard, BundleControl::DiscardReply);
    assert_eq!(names(&outputs(&mut driver)).0, ["refused 5"]);
    let echo = driver.poll_timeout().unwrap();
    driver.handle_timeout(echo);
    let (sent, xid) = names(&outputs(&mut driver));
    assert_eq!(sent, ["EchoRequest([])"], "the switch is asked whether it is there meanwhile");
    driver.handle_message(xid, Message::EchoReply(Vec::new()), echo);
    let retry = driver.poll_timeout().unwrap();
    driver.handle_timeout(retry);
    assert!(names(&outputs(&mut driver)).0.contains(&"read".to_owned()));
}

#[test]
fn a_refused_commit_is_reported_and_newer_rules_are_tried_at_once() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    driver.set_rules(rules(&[1]), 5, T);
    let (_, barrier) = names(&outputs(&mut driver));
    driver.handle_message(barrier, Message::BarrierReply, T);
    let (_, commit) = names(&outputs(&mut driver));
    driver.set_rules(rules(&[3]), 6, T);
    driver.handle_message(commit, Message::Error { kind: 17, code: 13, data: Vec::new() }, T);
    assert_eq!(names(&outputs(&mut driver)).0, ["refused 5", "read"]);
}

#[test]
fn sets_that_are_not_on_their_way_are_replaced_by_the_newest() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    for (tag, ports) in [(1, &[1][..]), (2, &[1, 2]), (3, &[2, 3])] {
        driver.set_rules(rules(ports), tag, T);
    }
    let done = finish(&mut driver);
    let told: Vec<_> = done.iter().filter(|name| name.starts_with("in force")).collect();
    assert_eq!(told, ["in force 1 1", "in force 3 3"]);
}

#[test]
fn packets_wait_for_the_rules_set_before_them_and_for_no_others() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    driver.packet_out(packet(1), T);
    driver.set_rules(rules(&[1]), 1, T);
    driver.packet_out(packet(2), T);
    driver.packet_out(packet(3), T);
    let first = outputs(&mut driver);
    assert_eq!(names(&first).0, ["connected 0", "packet 1", "OpenRequest", "add", "BarrierRequest"]);
    driver.handle_message(names(&first).1, Message::BarrierReply, T);
    driver.set_rules(rules(&[2]), 2, T);
    let done = finish(&mut driver);
    let interesting: Vec<_> =
        done.iter().filter(|name| name.starts_with("in force") || name.starts_with("packet")).collect();
    assert_eq!(interesting, ["in force 1 1", "packet 2", "packet 3", "in force 2 2"]);
}

#[test]
fn a_new_connection_compares_and_sends_only_the_difference() {
    let mut driver = Driver::default();
    driver.set_rules(rules(&[1, 2, 3]), 4, T);
    connect(&mut driver, &rules(&[1, 2, 8]));
    let done = finish(&mut driver);
    assert_eq!(done[..6], ["connected 3", "OpenRequest", "add", "delete", "BarrierRequest", "CommitRequest"]);
    assert_eq!(done.last().unwrap(), "in force 4 2");
    driver.handle_disconnected();
    assert_eq!(names(&outputs(&mut driver)).0, ["disconnected"]);
    connect(&mut driver, &rules(&[1, 2, 3]));
    assert_eq!(finish(&mut driver), ["connected 3", "settle", "in force 4 0"]);
}

#[test]
fn packets_survive_a_lost_connection_and_wait_for_their_rules_again() {
    let mut driver = Driver::default();
    driver.set_rules(rules(&[1]), 1, T);
    driver.packet_out(packet(7), T);
    connect(&mut driver, &RuleSet::new());
    outputs(&mut driver);
    driver.handle_disconnected();
    assert_eq!(names(&outputs(&mut driver)).0, ["disconnected"]);
    connect(&mut driver, &RuleSet::new());
    let done = finish(&mut driver);
    assert_eq!(done[done.len() - 2..], ["in force 1 1", "packet 7"]);
}

#[test]
fn rules_that_cannot_be_read_are_replaced_as_a_whole() {
    let mut driver = Driver::default();
    driver.set_rules(rules(&[1]), 1, T);
    driver.handle_connected(T);
    driver.handle_message(0, Message::hello(), T);
    let features = Message::FeaturesReply { datapath: 7, buffers: 0, tables: 8, capabilities: 0 };
    driver.handle_message(2, features, T);
    let (_, read) = names(&outputs(&mut driver));
    driver.handle_unreadable(read, T);
    let done = finish(&mut driver);
    assert_eq!(done[1..4], ["OpenRequest", "clear", "add"]);
    assert_eq!(done.last().unwrap(), "in force 1 2");
}

#[test]
fn a_silent_switch_is_asked_once_and_then_left() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    outputs(&mut driver);
    let ask = driver.poll_timeout().unwrap();
    driver.handle_timeout(ask);
    assert_eq!(names(&outputs(&mut driver)).0, ["EchoRequest([])"]);
    let mut last = None;
    while last != Some(Output::Close) {
        let next = driver.poll_timeout().unwrap();
        assert!(next.0 < 11_000_000, "a silent switch is left in the end");
        driver.handle_timeout(next);
        last = outputs(&mut driver).pop();
    }
}

/// Lets time pass up to `until` for a switch that says nothing; gives what was told, and when.
fn silence(driver: &mut Driver, until: Micros) -> Vec<(Micros, Event)> {
    let mut told = Vec::new();
    while let Some(at) = driver.poll_timeout().filter(|at| *at <= until) {
        driver.handle_timeout(at);
        told.extend(outputs(driver).into_iter().filter_map(|output| match output {
            Output::Event(event) => Some((at, event)),
            _ => None,
        }));
    }
    told
}

#[test]
fn a_switch_that_is_silent_is_said_to_be_within_the_bound_and_to_answer_at_its_next_word() {
    assert!(SILENCE_BOUND < Micros(2_000_000));
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    outputs(&mut driver);
    let told = silence(&mut driver, Micros(2_600_000));
    let spans: Vec<_> = [1_500_000, 2_000_000, 2_500_000]
        .map(|span| (Micros(span), Event::Silent(Micros(span))))
        .into_iter()
        .collect();
    assert_eq!(told, spans, "at the bound, and again twice a second");
    driver.handle_message(9, Message::EchoReply(Vec::new()), Micros(2_600_000));
    assert_eq!(outputs(&mut driver), [Output::Event(Event::Answering)]);
    // One that owes an answer is no other: that it is waited for longer does not hide that it is silent.
    driver.set_rules(rules(&[1]), 5, Micros(2_700_000));
    outputs(&mut driver);
    let told = silence(&mut driver, Micros(4_200_000));
    assert_eq!(told, [(Micros(4_100_000), Event::Silent(SILENCE_BOUND))]);
    // With the connection its silence ends.
    driver.handle_disconnected();
    assert_eq!(names(&outputs(&mut driver)).0, ["disconnected"]);
    connect(&mut driver, &RuleSet::new());
    assert!(!names(&outputs(&mut driver)).0.contains(&"Answering".to_owned()));
}

#[test]
fn a_switch_that_was_not_asked_is_not_silent() {
    let mut driver = Driver::default();
    connect(&mut driver, &RuleSet::new());
    outputs(&mut driver);
    // The driver stood still for a minute: it asks now, and waits for the answer from now on.
    let late = Micros(60_000_000);
    driver.handle_timeout(late);
    assert_eq!(names(&outputs(&mut driver)).0, ["EchoRequest([])"]);
    assert_eq!(silence(&mut driver, late.plus(Micros(900_000))), []);
    driver.handle_message(9, Message::EchoReply(Vec::new()), late.plus(Micros(900_000)));
    assert_eq!(outputs(&mut driver), []);
}

#[test]
fn a_switch_of_another_version_is_left() {
    let mut driver = Driver::default();
    driver.handle_connected(T);
    driver.handle_message(0, Message::Hello { version: 4, versions: None }, T);
    let done = names(&outputs(&mut driver)).0;
    assert!(done[1].contains("Version(4)"), "{done:?}");
    assert_eq!(done[2], "close");
}

/// Takes a driver of this proof to the point where the barrier behind the commit was answered.
fn committed(proof: Proof, sentinel: Option<u64>) -> Driver {
    let mut driver = Driver::new(proof);
    driver.handle_connected(T);
    driver.handle_message(0, Message::hello(), T);
    let features = Message::FeaturesReply { datapath: 7, buffers: 0, tables: 8, capabilities: 0 };
    driver.handle_message(2, features, T);
    let (_, xid) = names(&outputs(&mut driver));
    let flow = |cookie| {
        let rule = Rule { cookie, ..Rule::default() };
        FlowStats { key: proof.sentinel().unwrap(), rule, ..FlowStats::default() }
    };
    let reply = Reply::Flows(sentinel.map(flow).into_iter().collect());
    driver.handle_message(xid, Message::MultipartReply { reply, more: false }, T);
    driver.set_rules(rules(&[1]), 5, T);
    let (sent, barrier) = names(&outputs(&mut driver));
    assert_eq!(sent, ["connected 0", "OpenRequest", "add", "BarrierRequest"], "the sentinel is not deleted");
    driver.handle_message(barrier, Message::BarrierReply, T);
    let (_, commit) = names(&outputs(&mut driver));
    answer(&mut driver, commit, BundleControl::CommitReply);
    let (_, barrier) = names(&outputs(&mut driver));
    driver.handle_message(barrier, Message::BarrierReply, T);
    driver
}

/// The cookie of the only change of a sentinel among the outputs.
fn sentinel_of(outputs: &[Output]) -> Option<u64> {
    outputs.iter().find_map(|output| match output {
        Output::Send(_, Message::FlowMod(change)) => Some(change.rule.cookie),
        _ => None,
    })
}

/// The number of the only question among the outputs.
fn question_of(outputs: &[Output]) -> u64 {
    let number = outputs.iter().find_map(|output| match output {
        Output::Settle(number) => Some(*number),
        _ => None,
    });
    number.unwrap()
}

#[test]
fn the_end_of_one_sweep_proves_nothing_and_that_of_one_begun_after_it_does() {
    let mut driver = committed(Proof::Sweeps, Some(7));
    let asked = outputs(&mut driver);
    assert_eq!(sentinel_of(&asked), Some(8), "a change makes a sweep begin");
    let first = question_of(&asked);
    driver.handle_settled(first, T);
    let asked = outputs(&mut driver);
    assert_eq!(sentinel_of(&asked), Some(9), "and so the next");
    driver.handle_settled(first, T);
    assert_eq!(outputs(&mut driver), [], "an answer counts once");
    driver.handle_settled(question_of(&asked), T);
    assert_eq!(names(&outputs(&mut driver)).0, ["in force 5 1"]);
}

#[test]
fn a_sweep_that_ended_before_the_question_is_followed_by_another() {
    let mut driver = committed(Proof::Sweeps, Some(7));
    outputs(&mut driver);
    let mut before = T;
    for cookie in 9..12 {
        let at = driver.poll_timeout().unwrap();
        assert!(at.0 >= 2 * before.0, "the pauses double");
        driver.handle_timeout(at);
        assert_eq!(sentinel_of(&outputs(&mut driver)), Some(cookie));
        before = at;
    }
}

const PROBE: Proof = Proof::Probe { out: PortNo(10), back: PortNo(11) };

fn packet_in(cookie: u64, bytes: &[u8]) -> Message {
    Message::PacketIn(PacketIn { cookie, table: 0, bytes: bytes.to_vec() })
}

fn probe_of(outputs: &[Output]) -> Vec<u8> {
    let probe = outputs.iter().find_map(|output| match output {
        Output::Send(_, Message::PacketOut(packet)) => Some(packet.bytes.clone()),
        _ => None,
    });
    probe.unwrap()
}

#[test]
fn probes_prove_with_four_cookies_each_seen_before_the_next_is_set() {
    let mut driver = committed(PROBE, Some(40));
    for cookie in 41..=44 {
        let sent = outputs(&mut driver);
        assert_eq!(sentinel_of(&sent), Some(cookie));
        let probe = probe_of(&sent);
        driver.handle_message(0, packet_in(cookie - 1, &probe), T);
        driver.handle_message(0, packet_in(cookie, &[0; 60]), T);
        assert_eq!(outputs(&mut driver), [], "neither an old cookie nor a strange frame proves anything");
        let again = driver.poll_timeout().unwrap();
        driver.handle_timeout(again);
        assert_eq!(probe_of(&outputs(&mut driver)), probe, "a lost probe is sent again");
        driver.handle_message(0, packet_in(cookie, &probe), T);
    }
    assert_eq!(names(&outputs(&mut driver)).0, ["in force 5 1"]);
}

#[test]
fn probes_that_never_come_back_are_an_error_and_the_rules_count_late_rather_than_never() {
    let mut driver = committed(PROBE, None);
    let mut said = Vec::new();
    for _ in 0..5_000 {
        said.extend(
            names(&outputs(&mut driver)).0.into_iter().filter(|name| {
                !["packet", "EchoRequest", "Silent"].iter().any(|other| name.starts_with(other))
            }),
        );
        let Some(at) = driver.poll_timeout() else { break };
        driver.handle_timeout(at);
        if said.iter().any(|name| name.starts_with("in force")) {
            break;
        }
    }
    let [.., lost, in_force] = &said[..] else { panic!("{said:?}") };
    assert!(lost.contains("ProbeLost"), "{said:?}");
    assert_eq!(in_force, "in force 5 1");
}

#[test]
fn a_resync_reads_the_switch_and_mends_what_others_changed() {
    let mut driver = Driver::default();
    driver.set_rules(rules(&[1, 2]), 4, T);
    connect(&mut driver, &rules(&[1, 2]));
    finish(&mut driver);
    driver.resync(QueryId(3), T);
    let (sent, xid) = names(&outputs(&mut driver));
    assert_eq!(sent, ["read"]);
    let found = rules(&[1, 9]);
    let flow =
        |(key, rule): (&RuleKey, &Rule)| FlowStats { key: *key, rule: rule.clone(), ..FlowStats::default() };
    let reply = Reply::Flows(found.iter().map(flow).collect());
    driver.handle_message(xid, Message::MultipartReply { reply, more: false }, T);
    let done = finish(&mut driver);
    assert_eq!(done[..3], ["OpenRequest", "add", "delete"]);
    assert_eq!(done[done.len() - 2..], ["in force 4 2", "Answer(QueryId(3), Resynced(2))"]);
}

#[test]
fn a_resync_without_a_switch_is_answered_at_once() {
    let mut driver = Driver::default();
    driver.set_rules(rules(&[1]), 4, T);
    driver.resync(QueryId(1), T);
    assert_eq!(names(&outputs(&mut driver)).0, ["Answer(QueryId(1), Unavailable)"]);
}
