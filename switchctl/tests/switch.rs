//! The embedded switch and the session, as they run: sockets, threads, a controller that comes and goes.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;
mod running;

use std::io::Read;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::{OWN, PEER, group, in_force, next, plan, rules};
use flow::steer::{MarkerBody, Side, Tag, TunnelKey, TunnelRole};
use flow::{Epoch, MoveId, WorkerId};
use running::{Running, attach, client_frame, receive};
use socket2::Socket;
use switchctl::core::rules::{Field, RuleSet};
use switchctl::softswitch::QUEUE_FRAMES;
use switchctl::{
    Action, Match, OldPath, PacketOut, PortNo, Ports, Rule, RuleKey, Session, SessionOptions, SwitchEvent,
    marker_out,
};

/// Frames pass. The first ones may find that the switch has not taken up the receiver's connection yet, and are dropped.
fn passes(from: &Socket, to: &Socket) {
    to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let came = (0..50).any(|number| {
        from.send(&client_frame(number)).unwrap();
        (&*to).read(&mut [0; 200]).is_ok()
    });
    assert!(came, "no frame came through");
    to.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
}

fn nothing_comes(socket: &Socket) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!((&*socket).read(&mut [0; 100]).is_err());
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
}

fn tag(frame: &[u8]) -> Option<Tag> {
    assert_eq!(frame[12..14], [0x81, 0]);
    Tag::from_vlan(u16::from_be_bytes([frame[14], frame[15]]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_go_to_workers_and_peers_and_counters_count_them() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let (inside, worker) = (attach(&running.path("inside")), attach(&running.path("worker0")));
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    inside.send(&client_frame(1)).unwrap();
    assert_eq!(tag(&receive(&worker)), Some(Tag::Direct(Side::Inside, OWN)));

    switch.set_rules(rules(PEER, Some(0)), 2);
    assert_eq!(in_force(&mut events, 2).await, 1, "one rule differs");
    inside.send(&client_frame(2)).unwrap();
    let mut buffer = [0; 200];
    let (len, from) = running.peer.recv_from(&mut buffer).unwrap();
    assert_eq!(from, running.tunnel);
    let vni = u32::from_be_bytes([0, buffer[4], buffer[5], buffer[6]]);
    let key = TunnelKey::new(TunnelRole::Direct(Side::Inside), group().service, Epoch(1));
    assert_eq!(TunnelKey::from_vni(vni), Some(key));
    assert_eq!(buffer[8..len], client_frame(2));

    // What comes by tunnel goes to the local worker, though clients' packets do not.
    let vxlan = [&[8, 0, 0, 0][..], &(key.vni() << 8).to_be_bytes(), &client_frame(3)].concat();
    running.peer.send_to(&vxlan, running.tunnel).unwrap();
    assert_eq!(tag(&receive(&worker)), Some(Tag::Direct(Side::Inside, PEER)));

    let stats = switch.port_stats().await.unwrap();
    let of = |port| *stats.iter().find(|stats| stats.port == port).unwrap();
    assert_eq!((of(Ports::INSIDE).rx_packets, of(Ports::worker(WorkerId(0))).tx_packets), (2, 2));
    assert_eq!((of(Ports::tunnel(PEER)).rx_packets, of(Ports::tunnel(PEER)).tx_packets), (1, 1));
    assert_eq!(of(Ports::INSIDE).rx_bytes, 2 * client_frame(1).len() as u64);
    let flows = switch.flow_stats().await.unwrap();
    assert_eq!(flows.len(), rules(PEER, Some(0)).len());
    let first = switch.table_stats().await.unwrap()[0];
    assert_eq!((first.table, first.lookups, first.matched), (0, 3, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_change_while_the_switch_runs_and_what_has_none_is_dropped() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let (inside, worker) = (attach(&running.path("inside")), attach(&running.path("worker0")));
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    inside.send(&client_frame(1)).unwrap();
    assert_eq!(tag(&receive(&worker)), Some(Tag::Direct(Side::Inside, OWN)));
    let ports = running.config().ports;
    let numbers = async || {
        let stats = switch.port_stats().await.unwrap();
        stats.iter().map(|stats| stats.port).collect::<Vec<_>>()
    };
    let until = async |there: bool| {
        for _ in 0..1_500 {
            if numbers().await.contains(&Ports::tunnel(PEER)) == there {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the switch has {:?}", numbers().await);
    };

    running.tunnels.set(&[]);
    until(false).await;
    // What rules send there is dropped, and the switch goes on.
    switch.set_rules(rules(PEER, Some(0)), 2);
    in_force(&mut events, 2).await;
    inside.send(&client_frame(2)).unwrap();
    running.peer.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(running.peer.recv_from(&mut [0; 200]).is_err());

    // Who has its UDP port gives it back after a while.
    let taken = std::net::UdpSocket::bind(running.tunnel).unwrap();
    running.tunnels.set(&ports);
    tokio::time::sleep(Duration::from_millis(300)).await;
    until(false).await;
    drop(taken);
    until(true).await;
    running.peer.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    inside.send(&client_frame(3)).unwrap();
    let mut buffer = [0; 200];
    let (len, from) = running.peer.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[8..len], from), (&client_frame(3)[..], running.tunnel));
    // Other ports are as they were: peers that are connected stay, and counters go on.
    let stats = switch.port_stats().await.unwrap();
    let received = stats.iter().find(|stats| stats.port == Ports::INSIDE).unwrap().rx_packets;
    assert_eq!(received, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_stay_when_the_controller_goes_and_a_new_one_changes_nothing() {
    let mut running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    assert!(in_force(&mut events, 1).await > 0);
    drop((switch, events));
    let (inside, worker) = (attach(&running.path("inside")), attach(&running.path("worker0")));
    passes(&inside, &worker);

    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 2);
    let connected = next(&mut events).await;
    assert!(matches!(connected, SwitchEvent::Connected { rules, .. } if rules > 0), "{connected:?}");
    assert_eq!(in_force(&mut events, 2).await, 0, "what the switch has is what is wanted");

    // A switch that restarts is empty, and gets all of it again.
    running.halt();
    assert_eq!(next(&mut events).await, SwitchEvent::Disconnected);
    running.run();
    assert!(matches!(next(&mut events).await, SwitchEvent::Connected { rules: 0, .. }));
    assert!(in_force(&mut events, 2).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_with_one_refused_rule_changes_nothing() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    let before = switch.flow_stats().await.unwrap();
    let mut bad = (*rules(PEER, None)).clone();
    let key = RuleKey { table: 3, priority: 1, matches: Match::any() };
    bad.insert(key, Rule { goto: Some(2), ..Rule::default() });
    switch.set_rules(Arc::new(bad), 2);
    let refused = next(&mut events).await;
    assert!(matches!(refused, SwitchEvent::Error(_)), "{refused:?}");
    let keys = |flows: Vec<switchctl::ofp::FlowStats>| {
        flows.into_iter().map(|flow| (flow.key, flow.rule)).collect::<Vec<_>>()
    };
    assert_eq!(keys(switch.flow_stats().await.unwrap()), keys(before));
    switch.set_rules(rules(PEER, Some(0)), 3);
    in_force(&mut events, 3).await;
}

/// The heart of a move: while frames flow, the ingress flips from worker 0 to worker 1 and sends the marker down the
/// old path. Worker 0 sees a prefix of the frames, then the marker, then nothing; worker 1 the rest, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_old_comes_behind_the_marker() {
    const FRAMES: u32 = 20_000;
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let inside = attach(&running.path("inside"));
    let workers = [attach(&running.path("worker0")), attach(&running.path("worker1"))];
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;

    let sender = std::thread::spawn(move || {
        for number in 0..FRAMES {
            inside.send(&client_frame(number)).unwrap();
        }
        inside
    });
    let [old, new] = workers.map(|worker| {
        std::thread::spawn(move || {
            worker.set_read_timeout(Some(Duration::from_millis(1_500))).unwrap();
            let mut frames = Vec::new();
            let mut buffer = vec![0; 10_000];
            while let Ok(len @ 1..) = (&worker).read(&mut buffer) {
                frames.push(buffer[..len].to_vec());
            }
            frames
        })
    });
    tokio::time::sleep(Duration::from_millis(5)).await;
    switch.set_rules(rules(OWN, Some(1)), 2);
    let marker = marker_out(&plan(OWN, Some(0)), OldPath::Local(WorkerId(0)), &group(), MoveId(5), Epoch(2));
    switch.packet_out(vec![marker.unwrap()]);
    in_force(&mut events, 2).await;
    sender.join().unwrap();
    let (old, new) = (old.join().unwrap(), new.join().unwrap());

    let number = |frame: &Vec<u8>| u32::from_be_bytes(*frame.last_chunk().unwrap());
    let (marker, before) = old.split_last().unwrap();
    assert_eq!(tag(marker), Some(Tag::Marker(OWN)));
    let body = MarkerBody::decode(&marker[18 + 20..]).unwrap();
    assert_eq!((body.move_id, body.epoch), (MoveId(5), Epoch(2)));
    let all: Vec<u32> = before.iter().chain(&new).map(number).collect();
    assert_eq!(all, (0..FRAMES).collect::<Vec<_>>());
}

/// Later tables see what the frame has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_set_the_id_of_a_tag_that_is_not_there_makes_none() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let (inside, worker) = (attach(&running.path("inside")), attach(&running.path("worker0")));
    let to_worker = || vec![Action::Output(Ports::worker(WorkerId(0)))];
    let key = |table, priority, matches| RuleKey { table, priority, matches };
    let rule = |actions, goto| Rule { cookie: 0, actions, goto };
    let tagged_5 = Match::any().masked(Field::Vlan, 0x1005, 0x1fff);
    let mut rules = RuleSet::new();
    let from_inside = key(0, 9, Match::any().in_port(Ports::INSIDE));
    rules.insert(from_inside, rule(vec![Action::SetVlan(5)], Some(1)));
    rules.insert(key(1, 9, tagged_5), rule(to_worker(), None));
    switch.set_rules(Arc::new(rules.clone()), 1);
    in_force(&mut events, 1).await;
    for number in 0..20 {
        inside.send(&client_frame(number)).unwrap();
    }
    nothing_comes(&worker);
    rules.insert(key(1, 1, Match::any()), rule(to_worker(), None));
    switch.set_rules(Arc::new(rules), 2);
    in_force(&mut events, 2).await;
    inside.send(&client_frame(99)).unwrap();
    assert_eq!(receive(&worker), client_frame(99));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_peer_replaces_the_old_and_a_packet_out_keeps_its_order() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let first = attach(&running.path("worker0"));
    let packets = |numbers: std::ops::Range<u32>| {
        let actions =
            vec![Action::PushVlan(Tag::Marker(OWN).vlan()), Action::Output(Ports::worker(WorkerId(0)))];
        numbers
            .map(|number| PacketOut {
                bytes: client_frame(number),
                in_port: PortNo::CONTROLLER,
                actions: actions.clone(),
            })
            .collect::<Vec<_>>()
    };
    assert!(matches!(next(&mut events).await, SwitchEvent::Connected { .. }));
    switch.packet_out(packets(0..500));
    for number in 0..500u32 {
        assert_eq!(receive(&first)[18 + 28..], number.to_be_bytes());
    }
    let second = attach(&running.path("worker0"));
    assert!(receive(&first).is_empty(), "the old peer is hung up on");
    switch.packet_out(packets(7..8));
    assert_eq!(tag(&receive(&second)), Some(Tag::Marker(OWN)));
    nothing_comes(&second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_loses_nothing_up_to_the_bound_of_its_queue() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let (inside, worker) = (attach(&running.path("inside")), attach(&running.path("worker0")));
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    let count = u32::try_from(QUEUE_FRAMES).unwrap();
    let sender = std::thread::spawn(move || {
        (0..count).for_each(|number| assert!(inside.send(&client_frame(number)).is_ok()));
        inside
    });
    sender.join().unwrap();
    for number in 0..count {
        assert_eq!(receive(&worker)[18 + 28..], number.to_be_bytes());
    }
}

/// `ovs-ofctl` against the switch, in the ways that people type it.
struct Ofctl(String);

impl Ofctl {
    /// `None` when it is not installed, which is said.
    fn new(running: &Running, test: &str) -> Option<Self> {
        if Command::new("ovs-ofctl").arg("--version").output().is_ok() {
            return Some(Self(format!("unix:{}", running.path("control").display())));
        }
        use std::io::Write;
        std::io::stderr()
            .write_all(format!("SKIPPED: {test}: ovs-ofctl is not installed\n").as_bytes())
            .unwrap();
        None
    }

    /// Whether it succeeded, and what it said on both outputs.
    fn try_run(&self, options: &[&str], arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new("ovs-ofctl");
        command.args(["-O", "OpenFlow14", "--timeout=10"]).args(options);
        let output = command.args([arguments[0], &self.0]).args(&arguments[1..]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout) + &text(&output.stderr))
    }

    fn run(&self, arguments: &[&str]) -> String {
        let (done, text) = self.try_run(&["--no-names"], arguments);
        assert!(done, "{arguments:?}: {text}");
        text
    }

    /// With the names of ports and tables, as on a terminal.
    fn named(&self, arguments: &[&str]) -> String {
        let (done, text) = self.try_run(&["--names"], arguments);
        assert!(done, "{arguments:?}: {text}");
        text
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let (done, text) = self.try_run(&[], arguments);
        assert!(!done || text.contains("_ERROR") || text.contains("OFPT_ERROR"), "{arguments:?}: {text}");
        text
    }
}

/// `ovs-ofctl` of Open vSwitch as a second controller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ovs_ofctl_understands_the_embedded_switch() {
    let running = Running::start();
    let Some(ofctl) = Ofctl::new(&running, "ovs_ofctl_understands_the_embedded_switch") else { return };
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    let show = ofctl.run(&["show"]);
    assert!(show.contains("dpid:4c6d000000000001") && show.contains("1002(site2)"), "{show}");
    let flows = ofctl.run(&["dump-flows"]);
    assert!(flows.contains("table=1") && flows.contains("nw_src=100.64.0.0/24"), "{flows}");
    assert!(flows.contains("goto_table:1") && flows.contains("push_vlan:0x8100"), "{flows}");
    assert!(ofctl.run(&["dump-ports"]).contains("rx pkts=0"));
    assert!(ofctl.run(&["dump-aggregate"]).contains("flow_count="));
    assert!(ofctl.run(&["dump-desc"]).contains("Limosa"));
    ofctl.run(&["add-flow", "table=6,priority=5,in_port=1,tcp,tp_dst=0x400/0xfc00,actions=output:2"]);
    assert!(ofctl.run(&["dump-flows", "table=6"]).contains("tp_dst=0x400/0xfc00"));
    ofctl.run(&["del-flows", "table=6"]);
    let file = running.path("flows");
    std::fs::write(&file, "table=7,priority=1,ip,actions=output:1\ntable=7,priority=2,ip,actions=output:2\n")
        .unwrap();
    ofctl.run(&["add-flows", &file.display().to_string(), "--bundle"]);
    assert_eq!(ofctl.run(&["dump-flows", "table=7"]).matches("table=7").count(), 2);
}

/// Names of tables and ports are asked for on a terminal, and for each flow that is added.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ovs_ofctl_works_with_names_and_as_on_a_terminal() {
    let running = Running::start();
    let Some(ofctl) = Ofctl::new(&running, "ovs_ofctl_works_with_names_and_as_on_a_terminal") else { return };
    drop(attach(&running.path("inside")));
    ofctl.named(&["add-flow", "table=6,priority=5,in_port=inside,ip,actions=output:outside"]);
    let flows = ofctl.named(&["dump-flows", "table=6"]);
    assert!(flows.contains("in_port=inside") && flows.contains("actions=output:outside"), "{flows}");
    // A pseudo-terminal, whose output names by itself.
    let command = format!("ovs-ofctl -O OpenFlow14 --timeout=10 dump-flows {}", ofctl.0);
    let seen = Command::new("script").args(["-qec", &command, "/dev/null"]).env("TERM", "xterm").output();
    if let Ok(output) = seen {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("inside"), "{text}");
    }
    let (done, text) = ofctl.try_run(&[], &["add-flow", "table=5,tcp,actions=inside"]);
    assert!(done, "{text}");
    for request in ["dump-tables", "dump-table-features", "dump-table-desc", "dump-ports-desc", "dump-groups"]
    {
        ofctl.named(&[request]);
    }
    for request in ["dump-group-features", "dump-group-stats", "meter-features", "dump-meters", "meter-stats"]
    {
        ofctl.named(&[request]);
    }
    let features = ofctl.run(&["dump-table-features"]);
    assert!(
        features.contains("tables 1...7: ditto") && features.contains("max_entries=4194304"),
        "{features}"
    );
    ofctl.named(&["del-groups"]);
    ofctl.named(&["packet-out", "in_port=controller,packet=ffffffffffffffffffffffff08004500,actions=inside"]);
    let file = running.path("flows");
    std::fs::write(&file, "table=7,priority=1,ip,actions=output:1\n").unwrap();
    let file = file.display().to_string();
    ofctl.named(&["replace-flows", &file]);
    assert!(ofctl.named(&["diff-flows", &file]).is_empty());
    let refused = ofctl.refused(&["add-flow", "table=1,idle_timeout=5,ip,actions=drop"]);
    assert!(refused.contains("OFPFMFC_BAD_TIMEOUT"), "{refused}");
    let refused = ofctl.refused(&["add-flow", "table=7,priority=1,check_overlap,tcp,actions=drop"]);
    assert!(refused.contains("OFPFMFC_OVERLAP"), "{refused}");
    ofctl.named(&["del-flows", "out_group=5"]);
    assert!(ofctl.named(&["dump-flows"]).contains("table=7"), "a rule without that group stays");
    ofctl.named(&["del-flows", "out_port=inside"]);
    assert!(!ofctl.named(&["dump-flows"]).contains("table=7"));
}
