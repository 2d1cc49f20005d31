//! Requests of controllers, byte by byte: each field of each is honoured, or refused by the error that OpenFlow 1.4 names
//! for it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod running;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use running::{Running, attach, client_frame, receive};
use switchctl::core::rules::{ETH_IPV4, Field, PROTO_TCP, PROTO_UDP};
use switchctl::ofp::{
    self, AsyncConfig, BundleControl, Command, FlowModMsg, FlowQuery, FlowStats, GroupMod, Message, MeterMod,
    PortMod, Reply, Request, TableMod, TableStats,
};
use switchctl::{Action, Match, PacketOut, PortNo, Rule, RuleKey, Vlan};

/// Type and code of an error.
type Code = (u16, u16);

/// A controller that says what it likes.
struct Controller {
    stream: UnixStream,
    xid: u32,
}

impl Controller {
    /// Connected, and greeted.
    fn new(running: &Running) -> Self {
        let mut controller = Self::silent(running);
        controller.send(&ofp::encode(0, &Message::hello()));
        assert_eq!(controller.read().unwrap().1, Message::hello());
        controller
    }

    /// Connected only.
    fn silent(running: &Running) -> Self {
        let path = running.path("control");
        for _ in 0..500 {
            if let Ok(stream) = UnixStream::connect(&path) {
                stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                return Self { stream, xid: 100 };
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("nobody listens at {}", path.display());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message, `None` at the end of the connection.
    fn read(&mut self) -> Option<(u32, Message)> {
        let mut bytes = vec![0; 8];
        self.stream.read_exact(&mut bytes).ok()?;
        let len = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        bytes.resize(len, 0);
        self.stream.read_exact(&mut bytes[8..]).ok()?;
        Some(ofp::decode(&bytes).unwrap())
    }

    /// Sends bytes of a message, and what was answered before the barrier behind it.
    fn ask_bytes(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.xid += 1;
        let barrier = self.xid;
        self.send(bytes);
        self.send(&ofp::encode(barrier, &Message::BarrierRequest));
        let mut answers = Vec::new();
        loop {
            match self.read().unwrap() {
                (xid, Message::BarrierReply) if xid == barrier => return answers,
                (_, message) => answers.push(message),
            }
        }
    }

    fn ask(&mut self, message: &Message) -> Vec<Message> {
        self.ask_bytes(&ofp::encode(7, message))
    }

    /// The error that answers a message.
    fn error_of(&mut self, message: &Message) -> Option<Code> {
        error_in(&self.ask(message))
    }

    /// The error that answers a message of which bytes were changed: offset behind the header, and new bytes.
    fn error_of_changed(&mut self, message: &Message, changes: &[(usize, &[u8])]) -> Option<Code> {
        let mut bytes = ofp::encode(7, message);
        for (at, new) in changes {
            bytes[8 + at..8 + at + new.len()].copy_from_slice(new);
        }
        error_in(&self.ask_bytes(&bytes))
    }

    fn raw(&mut self, kind: u8, body: &[u8]) -> Option<Code> {
        let len = u16::try_from(8 + body.len()).unwrap().to_be_bytes();
        let head = [5, kind, len[0], len[1], 0, 0, 0, 7];
        error_in(&self.ask_bytes(&[&head, body].concat()))
    }

    fn flows(&mut self) -> Vec<FlowStats> {
        self.flows_of(FlowQuery::default())
    }

    fn flows_of(&mut self, query: FlowQuery) -> Vec<FlowStats> {
        let answers = self.ask(&Message::MultipartRequest(Request::Flows(query)));
        let [Message::MultipartReply { reply: Reply::Flows(list), more: false }] = &answers[..] else {
            panic!("{answers:?}")
        };
        list.clone()
    }

    fn tables(&mut self) -> Vec<TableStats> {
        let answers = self.ask(&Message::MultipartRequest(Request::Tables));
        let [Message::MultipartReply { reply: Reply::Tables(list), .. }] = &answers[..] else {
            panic!("{answers:?}")
        };
        list.clone()
    }

    fn add(&mut self, change: FlowModMsg) {
        assert_eq!(self.error_of(&Message::FlowMod(change)), None);
    }
}

fn error_in(answers: &[Message]) -> Option<Code> {
    match answers {
        [] => None,
        [Message::Error { kind, code, .. }] => Some((*kind, *code)),
        other => panic!("{other:?}"),
    }
}

fn change(command: Command, table: u8, priority: u16, matches: Match, actions: Vec<Action>) -> FlowModMsg {
    FlowModMsg::new(command, RuleKey { table, priority, matches }, Rule { cookie: 0, actions, goto: None })
}

fn output(port: u32) -> Vec<Action> {
    vec![Action::Output(PortNo(port))]
}

fn add(table: u8, priority: u16, matches: Match, actions: Vec<Action>) -> FlowModMsg {
    change(Command::Add, table, priority, matches, actions)
}

/// Three rules of table 6, by their priorities: to port 1 with cookie 1, to port 2 with cookie 2, back with cookie 3.
fn three(controller: &mut Controller) {
    controller.add(change(Command::Delete, 255, 0, Match::any(), Vec::new()));
    let back = vec![Action::OutputInPort];
    for (priority, actions) in [(1, output(1)), (2, output(2)), (3, back)] {
        let mut change = add(6, priority, Match::any(), actions);
        change.rule.cookie = priority.into();
        controller.add(change);
    }
}

fn priorities(controller: &mut Controller) -> Vec<u16> {
    controller.flows().iter().map(|flow| flow.key.priority).collect()
}

#[test]
fn every_filter_of_a_deletion_is_honoured() {
    let running = Running::start();
    let mut controller = Controller::new(&running);
    let delete = |fill: &dyn Fn(&mut FlowModMsg)| {
        let mut change = change(Command::Delete, 255, 0, Match::any(), Vec::new());
        fill(&mut change);
        change
    };
    let cases: [(&str, FlowModMsg, &[u16]); 8] = [
        ("a group", delete(&|change| change.out_group = 5), &[1, 2, 3]),
        ("a port", delete(&|change| change.out_port = PortNo(2)), &[1, 3]),
        ("the port it came by", delete(&|change| change.out_port = PortNo::IN_PORT), &[1, 2]),
        ("another table", delete(&|change| change.key.table = 5), &[1, 2, 3]),
        ("its table", delete(&|change| change.key.table = 6), &[]),
        (
            "a cookie",
            delete(&|change| {
                change.rule.cookie = 2;
                change.cookie_mask = u64::MAX;
            }),
            &[1, 3],
        ),
        (
            "a bit of a cookie",
            delete(&|change| {
                change.rule.cookie = 1;
                change.cookie_mask = 1;
            }),
            &[2],
        ),
        (
            "its priority and a group",
            delete(&|change| {
                change.command = Command::DeleteStrict;
                change.key.table = 6;
                change.key.priority = 2;
                change.out_group = 5;
            }),
            &[1, 2, 3],
        ),
    ];
    for (what, change, left) in cases {
        three(&mut controller);
        assert_eq!(controller.error_of(&Message::FlowMod(change)), None, "{what}");
        assert_eq!(priorities(&mut controller), left, "{what}");
    }
    // Statistics have the same filters.
    three(&mut controller);
    assert!(controller.flows_of(FlowQuery { out_group: 5, ..FlowQuery::default() }).is_empty());
    let by_port = controller.flows_of(FlowQuery { out_port: PortNo(2), ..FlowQuery::default() });
    assert_eq!(by_port.iter().map(|flow| flow.key.priority).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_modification_keeps_cookie_and_counters_unless_they_are_to_be_reset() {
    let running = Running::start();
    let (inside, outside) = (attach(&running.path("inside")), attach(&running.path("outside")));
    let mut controller = Controller::new(&running);
    controller.add(add(0, 1, Match::any().in_port(PortNo(1)), output(2)));
    while controller.flows()[0].packets == 0 {
        inside.send(&client_frame(1)).unwrap();
    }
    assert_eq!(receive(&outside), client_frame(1));
    let counted = |controller: &mut Controller| controller.flows()[0].packets > 0;
    // Added again, and modified: counters stay (OpenFlow 1.4, section 6.4).
    controller.add(add(0, 1, Match::any().in_port(PortNo(1)), output(3)));
    assert!(counted(&mut controller));
    let mut modify = change(Command::Modify, 0, 0, Match::any(), output(4));
    modify.rule.cookie = 9;
    controller.add(modify.clone());
    let flow = controller.flows()[0].clone();
    assert_eq!((flow.rule.actions, flow.rule.cookie, flow.packets > 0), (output(4), 0, true));
    // Only rules with the cookie are modified.
    let other = FlowModMsg { cookie_mask: u64::MAX, ..modify.clone() };
    controller.add(FlowModMsg { rule: Rule { cookie: 9, actions: output(5), goto: None }, ..other });
    assert_eq!(controller.flows()[0].rule.actions, output(4));
    controller.add(FlowModMsg { flags: ofp::FLAG_RESET_COUNTS, ..modify });
    assert!(!counted(&mut controller));
    let again = add(0, 1, Match::any().in_port(PortNo(1)), output(2));
    controller.add(FlowModMsg { importance: 7, flags: 0x18, ..again });
    let flow = controller.flows()[0].clone();
    assert_eq!((flow.importance, flow.flags), (7, 0x18), "what was said of it is told again");
}

#[test]
fn flow_mods_that_cannot_be_done_are_refused_by_their_own_errors() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    let rule = |actions| add(1, 1, Match::any(), actions);
    let plain = || rule(output(1));
    let flow = |change| Message::FlowMod(change);
    // Each with its error.
    let to_table = |goto| {
        let mut change = plain();
        change.rule.goto = Some(goto);
        change
    };
    let none = Vec::new;
    let absent = Match::any().vlan(Vlan::Absent);
    let source = Match::any().tunnel_src("192.0.2.1".parse().unwrap());
    let cases: Vec<(&str, FlowModMsg, Code)> = vec![
        ("a table that is not there", add(8, 1, Match::any(), none()), (5, 2)),
        ("all tables, to add", add(255, 1, Match::any(), none()), (5, 2)),
        ("all tables, to modify", change(Command::Modify, 255, 1, Match::any(), none()), (5, 2)),
        ("an idle timeout", FlowModMsg { idle_timeout: 1, ..plain() }, (5, 5)),
        ("a hard timeout", FlowModMsg { hard_timeout: 1, ..plain() }, (5, 5)),
        ("to be told of its end", FlowModMsg { flags: 1, ..plain() }, (5, 7)),
        ("a flag that is none", FlowModMsg { flags: 0x20, ..plain() }, (5, 7)),
        ("a table before", to_table(1), (3, 2)),
        ("a table that is not there to go to", to_table(8), (3, 2)),
        ("port 0", rule(output(0)), (2, 4)),
        ("a reserved port", rule(output(PortNo::TABLE.0)), (2, 4)),
        ("the controller", rule(output(PortNo::CONTROLLER.0)), (2, 4)),
        ("more tags than there is room for", rule(vec![Action::PushVlan(1); 5]), (2, 7)),
        ("no tag to be popped", add(1, 1, absent, vec![Action::PopVlan]), (2, 10)),
        ("no tag to be set", add(1, 1, absent, vec![Action::SetVlan(5)]), (2, 10)),
        ("a flow-based tunnel", rule(vec![Action::SetTunnelDst([192, 0, 2, 1].into())]), (2, 13)),
        ("a key beyond VXLAN's", rule(vec![Action::SetTunnel(1 << 24)]), (2, 15)),
        ("the address of a flow-based tunnel", add(1, 1, source, none()), (4, 6)),
        ("a port that no packet comes by", add(1, 1, Match::any().in_port(PortNo(0)), none()), (4, 7)),
    ];
    for (what, change, code) in cases {
        assert_eq!(c.error_of(&flow(change)), Some(code), "{what}");
    }
    // Bytes of the message: command at 17, buffer at 24.
    let message = flow(plain());
    assert_eq!(c.error_of_changed(&message, &[(17, &[9])]), Some((5, 6)));
    assert_eq!(c.error_of_changed(&message, &[(24, &[0, 0, 0, 5])]), Some((1, 8)));
    let delete = flow(change(Command::Delete, 1, 0, Match::any(), none()));
    assert_eq!(c.error_of_changed(&delete, &[(24, &[0, 0, 0, 5])]), None, "a deletion has no packet");
    assert!(c.flows().is_empty());
}

#[test]
fn a_rule_that_overlaps_is_refused_when_that_is_asked_for_also_in_a_bundle() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    let tcp = Match::any().eth_type(ETH_IPV4).ip_proto(PROTO_TCP);
    let udp = Match::any().eth_type(ETH_IPV4).ip_proto(PROTO_UDP);
    let ip = Match::any().eth_type(ETH_IPV4);
    let checked = |priority, matches| {
        let change = add(0, priority, matches, output(1));
        FlowModMsg { flags: ofp::FLAG_CHECK_OVERLAP, ..change }
    };
    c.add(checked(5, tcp));
    c.add(checked(5, udp));
    c.add(checked(6, ip));
    assert_eq!(c.error_of(&Message::FlowMod(checked(5, ip))), Some((5, 3)));
    assert_eq!(c.error_of(&Message::FlowMod(checked(5, tcp))), Some((5, 3)));
    // In a bundle, those before it count: all or nothing.
    let before = c.flows();
    let bundle = |control| Message::BundleControl { bundle: 1, control, flags: 3 };
    let wrapped = |change| {
        let message = Box::new(Message::FlowMod(change));
        Message::BundleAdd { bundle: 1, flags: 3, message }
    };
    c.ask(&bundle(BundleControl::OpenRequest));
    assert_eq!(c.error_of(&wrapped(add(3, 1, tcp, output(1)))), None);
    assert_eq!(c.error_of(&wrapped(FlowModMsg { flags: 2, ..add(3, 1, ip, output(1)) })), None);
    assert_eq!(c.error_of(&bundle(BundleControl::CommitRequest)), Some((17, 13)));
    let keys = |flows: &[FlowStats]| flows.iter().map(|flow| flow.key).collect::<Vec<_>>();
    assert_eq!(keys(&c.flows()), keys(&before));
}

#[test]
fn matches_actions_and_instructions_are_refused_by_their_own_errors() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    // A flow mod with these bytes as its match and as what follows.
    let mut with = |matches: &[u8], rest: &[u8]| {
        let head = [&[0; 16][..], &[1, 0, 0, 0, 0, 0, 0, 9], &[0xff; 12], &[0; 4]].concat();
        let len = u16::try_from(4 + matches.len()).unwrap().to_be_bytes();
        let mut body = [&head[..], &[0, 1], &len, matches].concat();
        body.resize(40 + (4 + matches.len()).next_multiple_of(8), 0);
        c.raw(14, &[&body[..], rest].concat())
    };
    let matches: [(&str, &[u8], Code); 12] = [
        ("a field of another class", &[0, 9, 0, 4, 0, 0, 0, 1], (4, 6)),
        ("a field of a wrong length", &[0x80, 0, 0, 3, 0, 0, 1], (4, 1)),
        (
            "a value outside its mask",
            &[0x80, 0, 0x4d, 16, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1],
            (4, 5),
        ),
        ("a mask where there is none", &[0x80, 0, 0x0b, 4, 8, 0, 0xff, 0], (4, 8)),
        ("no tag with an id", &[0x80, 0, 0x0c, 2, 0, 5], (4, 7)),
        ("a tag with more bits than it has", &[0x80, 0, 0x0c, 2, 0xf0, 5], (4, 7)),
        ("an address without its protocol", &[0x80, 0, 0x16, 4, 192, 0, 2, 1], (4, 9)),
        ("a field twice", &[0x80, 0, 0x0a, 2, 8, 0, 0x80, 0, 0x0a, 2, 8, 0], (4, 10)),
        (
            "an address before its EtherType",
            &[0x80, 0, 0x16, 4, 192, 0, 2, 1, 0x80, 0, 0x0a, 2, 8, 0],
            (4, 9),
        ),
        (
            "a port before its protocol",
            &[0x80, 0, 0x0a, 2, 8, 0, 0x80, 0, 0x1a, 2, 0, 80, 0x80, 0, 0x14, 1, 6],
            (4, 9),
        ),
        ("a protocol before its EtherType", &[0x80, 0, 0x14, 1, 6, 0x80, 0, 0x0a, 2, 8, 0], (4, 9)),
        ("a protocol without its EtherType", &[0x80, 0, 0x14, 1, 6], (4, 9)),
    ];
    for (what, bytes, code) in matches {
        assert_eq!(with(bytes, &[]), Some(code), "{what}");
    }
    let instructions: [(&str, &[u8], Code); 9] = [
        ("one that is none", &[0, 99, 0, 8, 0, 0, 0, 0], (3, 0)),
        ("write actions", &[0, 3, 0, 8, 0, 0, 0, 0], (3, 1)),
        ("clear actions", &[0, 5, 0, 8, 0, 0, 0, 0], (3, 1)),
        ("a meter", &[0, 6, 0, 8, 0, 0, 0, 1], (3, 1)),
        ("metadata", &[0, 2, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], (3, 3)),
        ("an experimenter's", &[0xff, 0xff, 0, 8, 0, 0, 0, 1], (3, 5)),
        ("too short", &[0, 1, 0, 4, 0, 0, 0, 0], (3, 7)),
        ("beyond the message", &[0, 4, 0, 16, 0, 0, 0, 0], (3, 7)),
        ("twice", &[0, 1, 0, 8, 2, 0, 0, 0, 0, 1, 0, 8, 3, 0, 0, 0], (3, 9)),
    ];
    for (what, bytes, code) in instructions {
        assert_eq!(with(&[], bytes), Some(code), "{what}");
    }
    let mut actions = |bytes: &[u8]| {
        let len = u16::try_from(8 + bytes.len()).unwrap().to_be_bytes();
        with(&[], &[&[0, 4, len[0], len[1], 0, 0, 0, 0], bytes].concat())
    };
    let cases: [(&str, &[u8], Code); 10] = [
        ("one that is not supported", &[0, 23, 0, 8, 64, 0, 0, 0], (2, 0)),
        ("a length that is none", &[0, 18, 0, 4, 0, 0, 0, 0], (2, 1)),
        ("beyond the instruction", &[0, 18, 0, 16, 0, 0, 0, 0], (2, 1)),
        ("an output that is too short", &[0, 0, 0, 8, 0, 0, 0, 1], (2, 1)),
        ("an experimenter's", &[0xff, 0xff, 0, 8, 0, 0, 0x12, 0x34], (2, 2)),
        ("a tag of another type", &[0, 17, 0, 8, 0x88, 0xa8, 0, 0], (2, 5)),
        ("a group", &[0, 22, 0, 8, 0, 0, 0, 5], (2, 9)),
        ("a field that cannot be set", &[0, 25, 0, 16, 0x80, 0, 0x16, 4, 1, 2, 3, 4, 0, 0, 0, 0], (2, 13)),
        ("a field of a wrong length", &[0, 25, 0, 16, 0x80, 0, 0x0c, 3, 0x10, 1, 0, 0, 0, 0, 0, 0], (2, 14)),
        ("an id without its tag", &[0, 25, 0, 16, 0x80, 0, 0x0c, 2, 0, 5, 0, 0, 0, 0, 0, 0], (2, 15)),
    ];
    for (what, bytes, code) in cases {
        assert_eq!(actions(bytes), Some(code), "{what}");
    }
}

#[test]
fn a_packet_of_a_controller_is_sent_through_the_tables_or_refused() {
    let running = Running::start();
    let outside = attach(&running.path("outside"));
    let mut c = Controller::new(&running);
    c.add(add(0, 1, Match::any().in_port(PortNo::CONTROLLER), output(2)));
    let out = |in_port, bytes: Vec<u8>, actions| Message::PacketOut(PacketOut { bytes, in_port, actions });
    let through = out(PortNo::CONTROLLER, client_frame(1), output(PortNo::TABLE.0));
    assert_eq!(c.error_of(&through), None);
    assert_eq!(receive(&outside), client_frame(1));
    let none = PortNo::CONTROLLER;
    assert_eq!(c.error_of(&out(PortNo(77), client_frame(1), output(2))), Some((1, 11)));
    assert_eq!(c.error_of(&out(none, vec![1; 5], output(2))), Some((1, 12)));
    assert_eq!(c.error_of(&out(none, client_frame(1), output(0xffff_fffb))), Some((2, 4)));
    assert_eq!(c.error_of_changed(&through, &[(0, &[0, 0, 0, 5])]), Some((1, 8)));
    assert_eq!(c.error_of_changed(&through, &[(8, &[0xff, 0xf8])]), Some((2, 1)));
}

#[test]
fn a_controller_of_another_version_is_told_so_and_left() {
    let running = Running::start();
    // A hello of OpenFlow 1.0, and one whose bitmap has only 1.0 and 1.3.
    let newer = ofp::encode(3, &Message::Hello { version: 4, versions: Some(0b10010) });
    for hello in [vec![1, 0, 0, 8, 0, 0, 0, 3], newer] {
        let mut controller = Controller::silent(&running);
        controller.send(&hello);
        assert_eq!(controller.read().unwrap().1, Message::hello());
        let (xid, answer) = controller.read().unwrap();
        let Message::Error { kind, code, data } = answer else { panic!("{answer:?}") };
        assert_eq!((xid, kind, code), (3, 0, 0));
        assert!(String::from_utf8(data).unwrap().contains("1.4"));
        assert_eq!(controller.read(), None, "and then it is left");
    }
    // A message whose length is none, too: where the next begins is unknown.
    let mut controller = Controller::new(&running);
    controller.send(&[5, 2, 0, 4, 0, 0, 0, 9]);
    let (_, answer) = controller.read().unwrap();
    assert!(matches!(answer, Message::Error { kind: 1, code: 6, .. }), "{answer:?}");
    assert_eq!(controller.read(), None);
}

#[test]
fn there_is_one_master_and_a_slave_changes_nothing() {
    let running = Running::start();
    let (mut first, mut second) = (Controller::new(&running), Controller::new(&running));
    let role = |role, generation| Message::RoleRequest(role, generation);
    let undefined = u64::MAX;
    assert_eq!(first.ask(&role(0, 5)), [Message::RoleReply(1, undefined)]);
    assert_eq!(first.error_of(&role(9, 5)), Some((11, 2)));
    assert_eq!(first.ask(&role(2, 5)), [Message::RoleReply(2, 5)]);
    assert_eq!(second.error_of(&role(2, 4)), Some((11, 0)), "an older generation than the master's");
    assert_eq!(second.error_of(&role(3, 4)), Some((11, 0)));
    assert_eq!(second.ask(&role(1, 4)), [Message::RoleReply(1, 5)], "equals have no generation");
    assert_eq!(second.ask(&role(2, 6)), [Message::RoleReply(2, 6)]);
    // The first is told that it is a slave now, and may look but not touch.
    let (_, told) = first.read().unwrap();
    assert_eq!(told, Message::RoleStatus(3, 0, 6));
    let flow = Message::FlowMod(add(1, 1, Match::any(), output(1)));
    let out = PacketOut { bytes: client_frame(1), in_port: PortNo::CONTROLLER, actions: output(1) };
    let port = PortMod { port: PortNo(1), mac: [0; 6], config: 0, mask: 0, advertise: 0 };
    let bundled = Box::new(flow.clone());
    for message in [
        flow.clone(),
        Message::PacketOut(out),
        Message::GroupMod(GroupMod { command: 0, group: 1 }),
        Message::MeterMod(MeterMod { command: 0, meter: 1 }),
        Message::TableMod(TableMod { table: 1, config: 0 }),
        Message::PortMod(port),
        Message::BundleAdd { bundle: 1, flags: 3, message: bundled },
        Message::MultipartRequest(Request::TableFeatures { set: true }),
    ] {
        assert_eq!(first.error_of(&message), Some((1, 10)), "{message:?}");
    }
    assert!(first.flows().is_empty());
    assert_eq!(second.error_of(&flow), None);
    assert_eq!(first.flows().len(), 1);
    // Generations go around, and a master that says so is one no more.
    assert_eq!(second.ask(&role(2, undefined >> 1)), [Message::RoleReply(2, undefined >> 1)]);
    assert_eq!(second.ask(&role(3, 1 << 63)), [Message::RoleReply(3, 1 << 63)]);
    assert_eq!(second.error_of(&flow), Some((1, 10)));
}

#[test]
fn bundles_are_refused_by_their_own_errors() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    let control = |control, flags| Message::BundleControl { bundle: 4, control, flags };
    let flow = Message::FlowMod(add(1, 1, Match::any(), output(1)));
    let wrap = |flags, message: &Message| Message::BundleAdd {
        bundle: 4,
        flags,
        message: Box::new(message.clone()),
    };
    let open = control(BundleControl::OpenRequest, 3);
    assert_eq!(c.error_of_changed(&open, &[(4, &[0, 11])]), Some((17, 6)));
    assert_eq!(c.error_of(&control(BundleControl::OpenReply, 3)), Some((17, 6)));
    assert_eq!(c.error_of_changed(&open, &[(6, &[0, 4])]), Some((17, 7)));
    assert_eq!(c.error_of(&control(BundleControl::CommitRequest, 3)), Some((17, 2)));
    assert_eq!(c.ask(&open), [control(BundleControl::OpenReply, 3)]);
    assert_eq!(c.error_of(&open), Some((17, 3)));
    assert_eq!(c.error_of(&wrap(1, &flow)), Some((17, 7)), "other flags than it was opened with");
    assert_eq!(c.error_of_changed(&wrap(3, &flow), &[(6, &[0x80, 0])]), Some((17, 7)));
    assert_eq!(c.error_of(&control(BundleControl::CommitRequest, 0)), Some((17, 7)));
    assert_eq!(c.error_of_changed(&wrap(3, &flow), &[(12, &[0, 0, 0, 8])]), Some((17, 9)));
    assert_eq!(c.error_of_changed(&wrap(3, &flow), &[(10, &[0xff, 0])]), Some((17, 8)));
    assert_eq!(c.error_of(&wrap(3, &Message::BarrierRequest)), Some((17, 10)));
    assert_eq!(c.error_of(&wrap(3, &wrap(3, &flow))), Some((17, 10)));
    let mut bad = add(1, 1, Match::any(), output(1));
    bad.idle_timeout = 3;
    assert_eq!(c.error_of(&wrap(3, &Message::FlowMod(bad))), Some((5, 5)));
    // A property of an experimenter behind the request.
    let property = [0, 0, 0, 4, 0, 0, 0, 3, 0xff, 0xff, 0, 12, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0];
    assert_eq!(c.raw(33, &property), Some((14, 5)));
    assert_eq!(c.ask(&control(BundleControl::CloseRequest, 3)), [control(BundleControl::CloseReply, 3)]);
    assert_eq!(c.error_of(&wrap(3, &flow)), Some((17, 4)));
    assert_eq!(c.error_of(&control(BundleControl::CloseRequest, 3)), Some((17, 4)));
    assert_eq!(c.ask(&control(BundleControl::DiscardRequest, 3)), [control(BundleControl::DiscardReply, 3)]);
    for bundle in 0..16 {
        let control = BundleControl::OpenRequest;
        c.ask(&Message::BundleControl { bundle, control, flags: 0 });
    }
    let control = BundleControl::OpenRequest;
    assert_eq!(c.error_of(&Message::BundleControl { bundle: 16, control, flags: 0 }), Some((17, 5)));
}

#[test]
fn a_bundle_of_which_a_message_was_refused_is_never_committed() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    let control = |control| Message::BundleControl { bundle: 4, control, flags: 3 };
    let (open, commit) = (control(BundleControl::OpenRequest), control(BundleControl::CommitRequest));
    let wrap = |flags, message: &Message| Message::BundleAdd {
        bundle: 4,
        flags,
        message: Box::new(message.clone()),
    };
    let flow = |priority| Message::FlowMod(add(1, priority, Match::any(), output(1)));
    let timed = Message::FlowMod(FlowModMsg { idle_timeout: 3, ..add(1, 1, Match::any(), output(1)) });
    // Refused when it is read, when it is checked, and for what it is in.
    type Refuse<'a> = &'a dyn Fn(&mut Controller) -> Option<Code>;
    let refusals: [(&str, Refuse<'_>); 5] = [
        ("a buffer", &|c| c.error_of_changed(&wrap(3, &flow(2)), &[(8 + 8 + 24, &[0, 0, 0, 5])])),
        ("a timeout", &|c| c.error_of(&wrap(3, &timed))),
        ("another kind", &|c| c.error_of(&wrap(3, &Message::BarrierRequest))),
        ("another id", &|c| c.error_of_changed(&wrap(3, &flow(2)), &[(12, &[0, 0, 0, 8])])),
        ("other flags", &|c| c.error_of(&wrap(1, &flow(2)))),
    ];
    let fails = |c: &mut Controller, what: &str, refuse: Refuse<'_>| {
        assert!(refuse(c).is_some(), "{what}");
        assert_eq!(c.error_of(&wrap(3, &flow(3))), None, "{what}: others are taken");
        assert_eq!(c.error_of(&commit), Some((17, 13)), "{what}");
        assert!(c.flows().is_empty(), "{what}");
    };
    for (what, refuse) in &refusals {
        assert_eq!(c.ask(&open), [control(BundleControl::OpenReply)], "{what}");
        assert_eq!(c.error_of(&wrap(3, &flow(1))), None, "{what}");
        fails(&mut c, what, refuse);
    }
    // As the first of a bundle that it would open, which may have any flags.
    for (what, refuse) in &refusals[..4] {
        fails(&mut c, what, refuse);
    }
    // It is gone with that, and whole ones are committed.
    assert_eq!(c.error_of(&commit), Some((17, 2)));
    assert!(c.error_of(&wrap(3, &timed)).is_some());
    assert_eq!(c.ask(&open), [control(BundleControl::OpenReply)], "one that was never open is opened");
    assert_eq!(c.error_of(&wrap(3, &flow(1))), None);
    assert_eq!(c.ask(&commit), [control(BundleControl::CommitReply)]);
    assert_eq!(c.flows().len(), 1);
}

#[test]
fn settings_are_honoured_or_refused_by_their_own_errors() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    for flags in [1, 2, 3, 0x8000] {
        assert_eq!(c.error_of(&Message::SetConfig(flags, 99)), Some((10, 0)));
    }
    assert_eq!(c.error_of(&Message::SetConfig(0, 99)), None);
    assert_eq!(c.ask(&Message::GetConfigRequest), [Message::GetConfigReply(0, 99)]);

    let Message::GetAsyncReply(mut wants) = c.ask(&Message::GetAsyncRequest)[0].clone() else { panic!() };
    assert_eq!(wants, AsyncConfig::initial());
    let mut change = AsyncConfig::default();
    change.0[6] = Some(0);
    assert_eq!(c.error_of(&Message::SetAsync(change)), None);
    wants.0[6] = Some(0);
    assert_eq!(c.ask(&Message::GetAsyncRequest), [Message::GetAsyncReply(wants)]);
    assert_eq!(c.raw(28, &[0, 0, 0, 8, 0x80, 0, 0, 0]), Some((15, 0)));
    assert_eq!(c.raw(28, &[0, 99, 0, 8, 0, 0, 0, 0]), Some((15, 1)));
    assert_eq!(c.raw(28, &[0, 0, 0, 4, 0, 0, 0, 0]), Some((14, 1)));
    assert_eq!(c.raw(28, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0]), Some((14, 4)));

    let group = |command, group| Message::GroupMod(GroupMod { command, group });
    assert_eq!(c.error_of(&group(0, 1)), Some((6, 3)));
    assert_eq!(c.error_of(&group(1, 1)), Some((6, 8)));
    assert_eq!(c.error_of(&group(2, ofp::GROUP_ALL)), None);
    assert_eq!(c.error_of(&group(9, 1)), Some((6, 11)));
    assert_eq!(c.error_of(&group(0, ofp::GROUP_ALL)), Some((6, 1)));
    assert_eq!(c.raw(15, &[0, 0, 9, 0, 0, 0, 0, 1]), Some((6, 10)));
    let meter = |command, meter| Message::MeterMod(MeterMod { command, meter });
    assert_eq!(c.error_of(&meter(0, 1)), Some((12, 10)));
    assert_eq!(c.error_of(&meter(1, 1)), Some((12, 3)));
    assert_eq!(c.error_of(&meter(2, 1)), None);
    assert_eq!(c.error_of(&meter(9, 1)), Some((12, 4)));
    for none in [0, 0xffff_0001, u32::MAX] {
        assert_eq!(c.error_of(&meter(0, none)), Some((12, 2)));
    }
    // Buckets and bands fill the message; of what is deleted nothing more is asked.
    let bucket = [0, 16, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let band = [0, 99, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (kind, record) in [(15, bucket), (29, band)] {
        for command in 0..=2 {
            let mut whole = |flags: u8, rest: &[u8]| {
                let head = [0, command, 0, flags, 0, 0, 0, 1];
                c.raw(kind, &[&head[..], rest].concat())
            };
            for rest in [&[0; 4][..], &[0; 8], &[0; 16], &record[..12], &[&record[..], &[0; 3]].concat()] {
                assert_eq!(whole(0, rest), Some((1, 6)), "type {kind}, command {command}, {rest:?}");
            }
            let none: [Option<Code>; 3] = if kind == 15 {
                [Some((6, 3)), Some((6, 8)), None]
            } else {
                [Some((12, 10)), Some((12, 3)), None]
            };
            assert_eq!(whole(0, &[record, record].concat()), none[usize::from(command)]);
            let flagged = if kind == 29 && command != 2 { Some((12, 5)) } else { none[usize::from(command)] };
            assert_eq!(whole(0x10, &record), flagged, "type {kind}, command {command}");
        }
    }
    let table = |table, config| Message::TableMod(TableMod { table, config });
    assert_eq!(c.error_of(&table(8, 0)), Some((8, 0)));
    assert_eq!(c.error_of(&table(1, 4)), Some((8, 1)));
    assert_eq!(c.error_of(&table(255, 0)), None);
    let Message::MultipartReply { reply: Reply::PortDesc(ports), .. } =
        c.ask(&Message::MultipartRequest(Request::PortDesc))[0].clone()
    else {
        panic!()
    };
    let sound = PortMod { port: ports[0].port, mac: ports[0].mac, config: 0, mask: 1, advertise: 0 };
    let port = |change: PortMod| Message::PortMod(change);
    assert_eq!(c.error_of(&port(sound.clone())), None);
    assert_eq!(c.error_of(&port(PortMod { port: PortNo(77), ..sound.clone() })), Some((7, 0)));
    assert_eq!(c.error_of(&port(PortMod { mac: [9; 6], ..sound.clone() })), Some((7, 1)));
    assert_eq!(c.error_of(&port(PortMod { config: 1, ..sound.clone() })), Some((7, 2)));
    assert_eq!(c.error_of(&port(PortMod { advertise: 1, ..sound })), Some((7, 3)));
}

#[test]
fn every_kind_of_statistics_is_answered_or_refused_by_its_own_error() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    let multipart = |kind: u16, flags: u16, body: &[u8]| {
        [&kind.to_be_bytes()[..], &flags.to_be_bytes(), &[0; 4], body].concat()
    };
    let all = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let one = [0, 0, 0, 1, 0, 0, 0, 1];
    let cases: [(&str, u16, u16, &[u8], Code); 17] = [
        ("a description with a body", 0, 0, &one, (1, 6)),
        ("in several parts", 0, 1, &[], (1, 13)),
        ("with a flag that is none", 0, 2, &[], (1, 2)),
        ("of rules, with a flag that is none", 3, 0x8000, &[], (1, 2)),
        ("of ports, with a flag that is none", 13, 4, &[], (1, 2)),
        ("a port that is not there", 4, 0, &[0, 0, 0, 77, 0, 0, 0, 0], (1, 11)),
        ("ports, cut", 4, 0, &[0, 0, 0, 1], (1, 6)),
        ("queues of a port that is not there", 5, 0, &[0, 0, 0, 77, 255, 255, 255, 255], (9, 0)),
        ("a queue", 5, 0, &one, (9, 1)),
        ("a meter", 9, 0, &one, (12, 3)),
        ("a meter's settings", 10, 0, &one, (12, 3)),
        ("features to be set", 12, 0, &[0; 64], (13, 5)),
        ("queues' settings", 15, 0, &one, (9, 1)),
        ("a monitor", 16, 0, &[], (1, 2)),
        ("a type that is none", 99, 0, &[], (1, 2)),
        ("an experimenter's", 0xffff, 0, &one, (1, 3)),
        ("groups' settings with a body", 7, 0, &one, (1, 6)),
    ];
    for (what, kind, flags, body, code) in cases {
        assert_eq!(c.raw(18, &multipart(kind, flags, body)), Some(code), "{what}");
    }
    let query = FlowQuery { table: 8, ..FlowQuery::default() };
    assert_eq!(c.error_of(&Message::MultipartRequest(Request::Flows(query.clone()))), Some((1, 9)));
    assert_eq!(c.error_of(&Message::MultipartRequest(Request::Aggregate(query))), Some((1, 9)));
    // Of what there is nothing of, nothing is told; features are zero. Answers are read by their lengths.
    for (kind, body, len) in [
        (5, &all[..], 16),
        (6, &all, 16),
        (7, &[], 16),
        (8, &[], 56),
        (9, &all, 16),
        (10, &all, 16),
        (11, &[], 32),
        (14, &[], 16 + 8 * 8),
    ] {
        let request = multipart(kind, 0, body);
        let size = u16::try_from(8 + request.len()).unwrap().to_be_bytes();
        c.send(&[&[5, 18, size[0], size[1], 0, 0, 0, 1], &request[..]].concat());
        let mut answer = vec![0; len];
        c.stream.read_exact(&mut answer).unwrap();
        assert_eq!((answer[1], usize::from(answer[3]), answer[9]), (19, len, kind as u8), "multipart {kind}");
    }
}

#[test]
fn messages_with_bytes_behind_them_or_of_no_type_are_refused() {
    let running = Running::start();
    let mut c = Controller::new(&running);
    for kind in [5, 7, 20, 26] {
        assert_eq!(c.raw(kind, &[0; 8]), Some((1, 6)), "message type {kind}");
    }
    assert_eq!(c.raw(9, &[0; 8]), Some((1, 6)));
    assert_eq!(c.raw(9, &[0; 2]), Some((1, 6)));
    assert_eq!(c.raw(24, &[0; 12]), Some((1, 6)));
    assert_eq!(c.raw(4, &[0, 0, 0, 9, 0, 0, 0, 1]), Some((1, 3)), "an experimenter's message");
    // Answers, which are no requests, and types that OpenFlow 1.4 does not have.
    for (kind, len) in [(6, 24), (8, 4), (21, 0), (25, 16), (30, 16), (11, 48), (12, 8), (22, 8), (99, 8)] {
        assert_eq!(c.raw(kind, &vec![0; len]), Some((1, 1)), "message type {kind}");
    }
    assert_eq!(error_in(&c.ask_bytes(&[4, 5, 0, 8, 0, 0, 0, 7])), Some((1, 0)), "another version");
    assert_eq!(c.ask(&Message::EchoRequest(vec![1, 2])), [Message::EchoReply(vec![1, 2])]);
}

#[test]
fn a_frame_with_a_priority_only_goes_as_one_without_a_tag() {
    let running = Running::start();
    let (inside, outside) = (attach(&running.path("inside")), attach(&running.path("outside")));
    let mut c = Controller::new(&running);
    let untagged = Match::any().in_port(PortNo(1)).vlan(Vlan::Absent).eth_type(ETH_IPV4).ip_proto(PROTO_UDP);
    c.add(add(0, 1, untagged.exact(Field::TpDst, 53), output(2)));
    // Until the switch has taken up both connections.
    while c.flows()[0].packets == 0 {
        inside.send(&client_frame(1)).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut frame = client_frame(7);
    // Priority 5, VLAN 0; and the same twice.
    for _ in 0..2 {
        frame.splice(12..12, [0x81, 0, 0xa0, 0]);
        inside.send(&frame).unwrap();
        while receive(&outside) != client_frame(7) {}
    }
    // A VLAN is another matter, and is counted as what the first table missed.
    let missed = |c: &mut Controller| {
        let table = c.tables()[0];
        table.lookups - table.matched
    };
    assert_eq!(missed(&mut c), 0);
    frame = client_frame(8);
    frame.splice(12..12, [0x81, 0, 0xa0, 5]);
    inside.send(&frame).unwrap();
    while missed(&mut c) == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(missed(&mut c), 1);
}
