//! The embedded switch and the session, as they run: sockets, threads, a controller that comes and goes.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::io::Read;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{OWN, PEER, group, in_force, next, plan, rules};
use flow::steer::{MarkerBody, Side, Tag, TunnelKey, TunnelRole};
use flow::{Epoch, MoveId, WorkerId};
use socket2::{Domain, SockAddr, Socket, Type};
use switchctl::softswitch::{self, PortConfig, PortKind, QUEUE_FRAMES, SwitchConfig};
use switchctl::{
    Action, Match, OldPath, PacketOut, PortNo, Ports, Rule, RuleKey, Session, SessionOptions, SwitchAddr,
    SwitchEvent, marker_out,
};

/// A switch in a thread of its own, with its sockets in a directory of its own.
struct Running {
    directory: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// The peer site's end of the tunnel.
    peer: UdpSocket,
    /// Where the switch receives from it.
    tunnel: std::net::SocketAddr,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // A port that was free a moment ago.
        let tunnel = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut running =
            Self { directory, stop: Arc::new(AtomicBool::new(false)), thread: None, peer, tunnel };
        running.run();
        running
    }

    fn run(&mut self) {
        let config = self.config();
        self.stop.store(false, Ordering::Relaxed);
        let stop = Arc::clone(&self.stop);
        self.thread = Some(std::thread::spawn(move || softswitch::run(&config, &stop).unwrap()));
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> SwitchConfig {
        let socket = |number, name: &str| PortConfig {
            number,
            name: name.into(),
            kind: PortKind::Socket { path: self.path(name) },
        };
        let remote = self.peer.local_addr().unwrap();
        let tunnel = PortConfig {
            number: Ports::tunnel(PEER),
            name: "site2".into(),
            kind: PortKind::Tunnel { local: self.tunnel, remote },
        };
        SwitchConfig {
            site: OWN,
            name: "test".into(),
            control: self.path("control"),
            control_tcp: None,
            ports: vec![
                socket(Ports::INSIDE, "inside"),
                socket(Ports::OUTSIDE, "outside"),
                socket(Ports::worker(WorkerId(0)), "worker0"),
                socket(Ports::worker(WorkerId(1)), "worker1"),
                tunnel,
            ],
            queue_frames: QUEUE_FRAMES,
        }
    }

    fn address(&self) -> SwitchAddr {
        SwitchAddr::Unix(self.path("control"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Connects to a port, waiting until the switch listens.
fn attach(path: &Path) -> Socket {
    for _ in 0..250 {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        if socket.connect(&SockAddr::unix(path).unwrap()).is_ok() {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            return socket;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens at {}", path.display());
}

fn receive(socket: &Socket) -> Vec<u8> {
    let mut buffer = vec![0; 10_000];
    let len = (&*socket).read(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

/// Frames pass. The first ones may find that the switch has not taken up the receiver's connection yet, and are dropped.
fn passes(from: &Socket, to: &Socket) {
    to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let came = (0..50).any(|number| {
        from.send(&client_frame(number)).unwrap();
        (&*to).read(&mut [0; 200]).is_ok()
    });
    assert!(came, "no frame came through");
    to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
}

fn nothing_comes(socket: &Socket) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!((&*socket).read(&mut [0; 100]).is_err());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
}

fn tag(frame: &[u8]) -> Option<Tag> {
    assert_eq!(frame[12..14], [0x81, 0]);
    Tag::from_vlan(u16::from_be_bytes([frame[14], frame[15]]))
}

/// A UDP packet of client 100.64.0.1 with a number in it.
fn client_frame(number: u32) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend_from_slice(&[
        0x08, 0x00, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 100, 64, 0, 1, 192, 0, 2, 1,
    ]);
    frame.extend_from_slice(&[1, 1, 0, 53, 0, 12, 0, 0]);
    frame.extend_from_slice(&number.to_be_bytes());
    frame
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

/// `ovs-ofctl` of Open vSwitch as a second controller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ovs_ofctl_understands_the_embedded_switch() {
    if Command::new("ovs-ofctl").arg("--version").output().is_err() {
        use std::io::Write;
        let text = b"skipped ovs_ofctl_understands_the_embedded_switch: ovs-ofctl is not installed\n";
        std::io::stderr().write_all(text).unwrap();
        return;
    }
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    let target = format!("unix:{}", running.path("control").display());
    let ofctl = |arguments: &[&str]| {
        let mut command = Command::new("ovs-ofctl");
        command
            .args(["-O", "OpenFlow14", "--no-names", "--timeout=10", arguments[0], &target])
            .args(&arguments[1..]);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let show = ofctl(&["show"]);
    assert!(show.contains("dpid:4c6d000000000001") && show.contains("1002(site2)"), "{show}");
    let flows = ofctl(&["dump-flows"]);
    assert!(flows.contains("table=1") && flows.contains("nw_src=100.64.0.0/24"), "{flows}");
    assert!(flows.contains("goto_table:1") && flows.contains("push_vlan:0x8100"), "{flows}");
    assert!(ofctl(&["dump-ports"]).contains("rx pkts=0"));
    assert!(ofctl(&["dump-aggregate"]).contains("flow_count="));
    assert!(ofctl(&["dump-desc"]).contains("Limosa"));
    ofctl(&["add-flow", "table=6,priority=5,in_port=1,tcp,tp_dst=0x400/0xfc00,actions=output:2"]);
    assert!(ofctl(&["dump-flows", "table=6"]).contains("tp_dst=0x400/0xfc00"));
    ofctl(&["del-flows", "table=6"]);
    let file = running.path("flows");
    std::fs::write(&file, "table=7,priority=1,ip,actions=output:1\ntable=7,priority=2,ip,actions=output:2\n")
        .unwrap();
    ofctl(&["add-flows", &file.display().to_string(), "--bundle"]);
    assert_eq!(ofctl(&["dump-flows", "table=7"]).matches("table=7").count(), 2);
}
