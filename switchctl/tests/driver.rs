//! State, event, actions of the driver.
#![expect(clippy::wildcard_enum_match_arm, reason = "a test names what it is about and nothing else")]

use std::sync::Arc;

use flow::Micros;
use switchctl::core::driver::{Driver, DriverError, Event, Output};
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
        |(key, rule): (&RuleKey, &Rule)| FlowStats { key: *key, rule: rule.clone(), packets: 0, bytes: 0 };
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
    let retry = driver.poll_timeout().unwrap();
    driver.handle_timeout(retry);
    assert_eq!(names(&outputs(&mut driver)).0, ["read"]);
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
    let leave = driver.poll_timeout().unwrap();
    driver.handle_timeout(leave);
    assert_eq!(outputs(&mut driver).pop(), Some(Output::Close));
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
