//! The session against Open vSwitch itself; skipped where that is not installed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;
mod ovs;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use common::{OWN, PEER, group, in_force, next, plan, rules};
use flow::steer::{Side, Tag};
use flow::{Epoch, GroupId, MoveId, SiteId, WorkerId};
use ovs::{Datapath, Namespace, OpenVswitch, skip};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use switchctl::core::ovsdb::{BridgeSpec, FailMode, PortSpec};
use switchctl::core::rules::RuleSet;
use switchctl::ovs::{Database, SetUp};
use switchctl::{
    GroupPlan, InForce, Match, OldPath, PortNo, Ports, Rule, RuleKey, Session, SessionOptions, SitePlan,
    SwitchAddr, SwitchEvent, SwitchHandle, TlsClient, TlsMaterial, Tunnel, compile, marker_out,
};
use tokio::sync::mpsc;

/// A plan with NAT slices and a flow-based tunnel, so that every kind of rule is there.
fn rich_rules(steer: SiteId) -> Arc<RuleSet> {
    let spec = flow::nat::NatSpec {
        clients: vec![group().prefix],
        pool: vec!["198.51.100.0/29".parse().unwrap()],
        ports_per_subscriber: 1000,
        first_port: 1024,
        port_key: 1,
    };
    let mut plan = plan(steer, Some(0));
    let remote = Some("10.0.0.2".parse().unwrap());
    plan.ports.tunnels.insert(SiteId(3), Tunnel { port: Ports::FLOW_BASED, remote });
    plan.services.insert(group().service, flow::nat::NatSlices::new(spec).unwrap());
    let (low, high) = group().prefix.halves().unwrap();
    let entry = plan.groups.remove(&group()).unwrap();
    let (first, second) = low.halves().unwrap();
    plan.groups.insert(GroupId { prefix: first, ..group() }, entry);
    plan.groups.insert(GroupId { prefix: second, ..group() }, GroupPlan { steer: SiteId(3), ..entry });
    let second = GroupPlan { steer: OWN, local: Some(WorkerId(1)), ..entry };
    plan.groups.insert(GroupId { prefix: high, ..group() }, second);
    let v6 = GroupId { prefix: "2001:db8::/48".parse().unwrap(), ..group() };
    plan.groups.insert(v6, entry);
    Arc::new(compile(&plan))
}

async fn read(switch: &SwitchHandle, but: Option<RuleKey>) -> RuleSet {
    let flows = switch.flow_stats().await.unwrap();
    flows.into_iter().map(|flow| (flow.key, flow.rule)).filter(|(key, _)| Some(*key) != but).collect()
}

/// The same behaviour over every transport and with every proof.
async fn keeps_returns_and_refuses(address: SwitchAddr, in_force_by: InForce) {
    let sentinel = in_force_by.proof().sentinel();
    let options = SessionOptions { in_force: in_force_by, ..SessionOptions::default() };
    let (switch, mut events) = Session::spawn(address.clone(), options.clone());
    switch.set_rules(rich_rules(PEER), 1);
    assert_eq!(in_force(&mut events, 1).await, rich_rules(PEER).len());
    assert_eq!(read(&switch, sentinel).await, *rich_rules(PEER));
    switch.set_rules(rich_rules(OWN), 2);
    in_force(&mut events, 2).await;
    drop((switch, events));

    let (switch, mut events) = Session::spawn(address, options);
    switch.set_rules(rich_rules(OWN), 3);
    assert_eq!(in_force(&mut events, 3).await, 0, "what the switch has is what is wanted");
    assert!(!switch.port_stats().await.unwrap().is_empty());

    let mut bad = (*rich_rules(PEER)).clone();
    let backwards = RuleKey { table: 3, priority: 1, matches: Match::any() };
    bad.insert(backwards, Rule { goto: Some(2), ..Rule::default() });
    switch.set_rules(Arc::new(bad), 4);
    assert!(matches!(next(&mut events).await, SwitchEvent::Error(_)));
    assert_eq!(read(&switch, sentinel).await, *rich_rules(OWN), "a refused rule leaves everything as it was");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_are_kept_returned_and_refused_as_a_whole_over_a_unix_socket() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("rules over a Unix socket", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[]);
    let address = SwitchAddr::Unix(ovs.path("br0.mgmt"));
    keeps_returns_and_refuses(address, InForce::Control(ovs.path("vs.ctl"))).await;
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_are_kept_returned_and_refused_as_a_whole_over_tcp() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("rules over TCP", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[]);
    let port = free_port();
    ovs.vsctl(&["set-controller", "br0", &format!("ptcp:{port}:127.0.0.1")]);
    let address = SwitchAddr::Tcp("localhost".into(), port);
    keeps_returns_and_refuses(address, InForce::Control(ovs.path("vs.ctl"))).await;
}

/// An authority, and what it signed for a name: chain and key as PEM.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        // OpenSSL takes a certificate for self-signed when subject and issuer have one name.
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "authority");
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(rcgen::CertifiedIssuer::self_signed(parameters, rcgen::KeyPair::generate().unwrap()).unwrap())
    }

    fn sign(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        (parameters.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    fn client(&self, name_of_switch: &str) -> TlsClient {
        let (chain, key) = self.sign("agent");
        let chain = vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let authority = vec![self.0.der().clone()];
        TlsClient::new(name_of_switch, TlsMaterial { chain, key, authority }).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_a_switch_of_the_wrong_name_is_not_spoken_to_and_the_right_one_is() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("rules over TLS", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[]);
    let (authority, port) = (Authority::new(), free_port());
    let (chain, key) = authority.sign("switch-1");
    for (name, text) in [("key.pem", key), ("cert.pem", chain), ("ca.pem", authority.0.pem())] {
        std::fs::write(ovs.path(name), text).unwrap();
    }
    let file = |name| ovs.path(name).display().to_string();
    ovs.vsctl(&["set-ssl", &file("key.pem"), &file("cert.pem"), &file("ca.pem")]);
    ovs.vsctl(&["set-controller", "br0", &format!("pssl:{port}:127.0.0.1")]);
    let address = |client| SwitchAddr::Tls("127.0.0.1".into(), port, client);

    let strangers = [authority.client("switch-2"), Authority::new().client("switch-1")];
    for stranger in strangers {
        let (switch, mut events) = Session::spawn(address(stranger), SessionOptions::default());
        switch.set_rules(rules(OWN, Some(0)), 1);
        assert!(tokio::time::timeout(Duration::from_millis(500), events.recv()).await.is_err());
    }
    let in_force = InForce::Control(ovs.path("vs.ctl"));
    keeps_returns_and_refuses(address(authority.client("switch-1")), in_force).await;
}

/// A UDP packet of client 100.64.0.1 with a number in it.
fn client_bytes(number: u32) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend_from_slice(&[
        0x08, 0x00, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 100, 64, 0, 1, 192, 0, 2, 1,
    ]);
    frame.extend_from_slice(&[1, 1, 0, 53, 0, 12, 0, 0]);
    frame.extend_from_slice(&number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

const WORKER_0: PortNo = PortNo(100);
const WORKER_1: PortNo = PortNo(101);

async fn sent_by(switch: &SwitchHandle, port: PortNo) -> u64 {
    let stats = switch.port_stats().await.unwrap();
    stats.iter().find(|stats| stats.port == port).unwrap().tx_packets
}

/// Whether the next packet of a cached flow always takes the new path once a flip is in force.
async fn flips(ovs: &OpenVswitch, proof: InForce) {
    let options = SessionOptions { in_force: proof, ..SessionOptions::default() };
    let (switch, mut events) = Session::spawn(SwitchAddr::Unix(ovs.path("br0.mgmt")), options);
    let mut expected = [0; 2];
    for tag in 1..=30 {
        let worker = tag % 2;
        switch.set_rules(rules(OWN, Some(u16::try_from(worker).unwrap())), tag);
        in_force(&mut events, tag).await;
        for number in 0..3 {
            ovs.appctl(&["netdev-dummy/receive", "inside", &hex(&client_bytes(number))]);
        }
        expected[usize::try_from(worker).unwrap()] += 3;
        let sent = [sent_by(&switch, WORKER_0).await, sent_by(&switch, WORKER_1).await];
        assert_eq!(sent, expected, "after flip {tag}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_sweeps_no_packet_takes_the_old_path() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("sweeps", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[("inside", 1), ("worker0", 100), ("worker1", 101)]);
    flips(&ovs, InForce::Control(ovs.path("vs.ctl"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_probes_no_packet_takes_the_old_path() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("probes", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[("inside", 1), ("worker0", 100), ("worker1", 101), ("out", 90), ("back", 91)]);
    // A link between two dummy ports.
    ovs.vsctl(&["set", "interface", "back", "options:pstream=punix:link"]);
    ovs.wait_for("link");
    ovs.vsctl(&["set", "interface", "out", "options:stream=unix:link"]);
    flips(&ovs, InForce::Probe { out: PortNo(90), back: PortNo(91) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_mends_what_others_changed_and_a_restarted_daemon_gets_all_rules_again() {
    let Some(mut ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("resync", "Open vSwitch is not installed");
    };
    ovs.dummy_bridge(&[]);
    let proof = InForce::Control(ovs.path("vs.ctl"));
    let sentinel = proof.proof().sentinel();
    let options = SessionOptions { in_force: proof, ..SessionOptions::default() };
    let (switch, mut events) = Session::spawn(SwitchAddr::Unix(ovs.path("br0.mgmt")), options);
    let wanted = rich_rules(PEER);
    switch.set_rules(wanted.clone(), 1);
    in_force(&mut events, 1).await;
    let bridge = format!("unix:{}", ovs.path("br0.mgmt").display());
    ovs.ofctl(&["del-flows", &bridge, "table=3"]);
    ovs.ofctl(&["add-flow", &bridge, "table=1,priority=9,ip,actions=drop"]);
    let missing = wanted.keys().filter(|key| key.table == 3).count();
    assert!(missing > 0);
    assert_eq!(switch.resync().await, Ok(missing + 1));
    assert_eq!(read(&switch, sentinel).await, *wanted);
    assert_eq!(switch.resync().await, Ok(0));
    assert_eq!(in_force(&mut events, 1).await, missing + 1);
    assert_eq!(in_force(&mut events, 1).await, 0);

    // Open vSwitch drops all rules when the fail mode changes, and tells nobody.
    ovs.vsctl(&["set-fail-mode", "br0", "standalone"]);
    assert!(switch.resync().await.unwrap() > wanted.len());
    assert_eq!(read(&switch, sentinel).await, *wanted);
    ovs.vsctl(&["set-fail-mode", "br0", "secure"]);
    switch.resync().await.unwrap();
    assert_eq!(read(&switch, sentinel).await, *wanted);
    in_force(&mut events, 1).await;
    in_force(&mut events, 1).await;

    ovs.kill_vswitchd();
    assert_eq!(next(&mut events).await, SwitchEvent::Disconnected);
    ovs.vswitchd(Datapath::Dummy);
    assert_eq!(in_force(&mut events, 1).await, wanted.len());
}

fn port(name: &str, number: PortNo) -> PortSpec {
    PortSpec { name: name.into(), number, kind: String::new(), options: BTreeMap::new() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_up_bridge_is_secure_and_setting_it_up_again_changes_nothing() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return skip("setting up a bridge", "Open vSwitch is not installed");
    };
    let mut database = Database::connect(&SwitchAddr::Unix(ovs.path("db.sock"))).await.unwrap();
    let dummy = |name: &str, number| PortSpec { kind: "dummy".into(), ..port(name, number) };
    let tunnel = |site| {
        PortSpec::vxlan(format!("vx{site}"), Ports::tunnel(site), Some([10, 0, 0, site.0].into()), None, 4789)
    };
    let mut spec = BridgeSpec {
        name: "br0".into(),
        datapath: "dummy".into(),
        ports: vec![
            dummy("in0", Ports::INSIDE),
            dummy("out0", Ports::OUTSIDE),
            tunnel(SiteId(2)),
            tunnel(SiteId(3)),
        ],
        listen: Some(format!("ptcp:{}:127.0.0.1", free_port())),
    };
    let planned = database.plan(&spec).await.unwrap().changes;
    assert_eq!(planned.len(), 6, "{planned:?}");
    assert_eq!(database.read().await.unwrap().fail_mode("br0"), None, "a plan changes nothing");
    let done = database.set_up(&spec).await.unwrap();
    assert_eq!(done, SetUp { changes: planned, problems: Vec::new() });
    assert_eq!(database.set_up(&spec).await.unwrap(), SetUp::default());
    assert_eq!(database.read().await.unwrap().fail_mode("br0"), Some(FailMode::Secure));
    assert_eq!(ovs.vsctl(&["get", "interface", "vx3", "ofport"]).trim(), "1003");

    ovs.vsctl(&["clear", "bridge", "br0", "fail_mode"]);
    ovs.vsctl(&["set", "bridge", "br0", "protocols=OpenFlow13"]);
    assert_eq!(database.read().await.unwrap().fail_mode("br0"), Some(FailMode::Standalone));
    spec.ports[0].number = PortNo(7);
    spec.ports.push(dummy("late", PortNo(7)));
    let done = database.set_up(&spec).await.unwrap();
    assert_eq!(done.changes.len(), 4, "{done:?}");
    assert_eq!(done.problems.len(), 1, "two ports cannot have one number: {done:?}");
    assert_eq!(database.read().await.unwrap().fail_mode("br0"), Some(FailMode::Secure));
    let protocols = ovs.vsctl(&["get", "bridge", "br0", "protocols"]);
    assert!(protocols.contains("OpenFlow13") && protocols.contains("OpenFlow14"), "{protocols}");
}

/// A site in a namespace of its own: a daemon with the site's bridge, whose tunnels are real and whose other ports exist in
/// the daemon alone, and an underlay bridge that leads to a real device.
struct Site {
    ovs: OpenVswitch,
    namespace: Namespace,
    plan: SitePlan,
    switch: SwitchHandle,
    events: mpsc::Receiver<SwitchEvent>,
}

impl Site {
    /// The site's address in the underlay.
    fn address(site: SiteId) -> std::net::Ipv4Addr {
        [172, 16, 0, site.0].into()
    }

    async fn start(own: SiteId, flow_based: bool) -> Option<Self> {
        let namespace = Namespace::new()?;
        let ovs = OpenVswitch::start(Datapath::Netdev, Some(&namespace))?;
        let peer = if own == OWN { PEER } else { OWN };
        let remote = Self::address(peer);
        let tunnel = if flow_based { Ports::FLOW_BASED } else { Ports::tunnel(peer) };
        let options = if flow_based { (None, None) } else { (Some(remote.into()), Some(Self::address(own))) };
        let captured = |name: &str, number| {
            let file = ovs.path(name).display().to_string();
            PortSpec {
                kind: "dummy".into(),
                options: [("tx_pcap".into(), file)].into(),
                ..port(name, number)
            }
        };
        let ports = vec![
            captured("in", Ports::INSIDE),
            captured("out", Ports::OUTSIDE),
            captured("w", Ports::worker(WorkerId(0))),
            PortSpec::vxlan("vx".into(), tunnel, options.0, options.1, 4789),
        ];
        let spec = BridgeSpec { name: "br0".into(), datapath: "netdev".into(), ports, listen: None };
        let mut database = Database::connect(&SwitchAddr::Unix(ovs.path("db.sock"))).await.unwrap();
        assert_eq!(database.set_up(&spec).await.unwrap().problems, [""; 0]);
        ovs.wait_for("br0.mgmt");
        let mut plan = plan(PEER, (own == PEER).then_some(0));
        plan.site = own;
        plan.ports = Ports::conventional([], [WorkerId(0)]);
        plan.ports.tunnels.insert(peer, Tunnel { port: tunnel, remote: flow_based.then_some(remote) });
        let options =
            SessionOptions { in_force: InForce::Control(ovs.path("vs.ctl")), ..SessionOptions::default() };
        let (switch, events) = Session::spawn(SwitchAddr::Unix(ovs.path("br0.mgmt")), options);
        Some(Self { ovs, namespace, plan, switch, events })
    }

    /// Joins the underlay: a device that leads to the other site, behind a bridge with an address.
    fn join(&self, device: &str) {
        let bridge = ["add-br", "under", "--", "set", "bridge", "under", "datapath_type=netdev"];
        self.ovs.vsctl(&bridge);
        self.ovs.vsctl(&["add-port", "under", device]);
        self.namespace.run(&format!("ip address add {}/24 dev under", Self::address(self.plan.site)));
        for device in ["under", device] {
            self.namespace.run(&format!("ip link set {device} up"));
        }
    }

    async fn rules(&mut self) {
        self.switch.set_rules(Arc::new(compile(&self.plan)), 1);
        in_force(&mut self.events, 1).await;
    }

    /// Lets a frame come in by a port.
    fn send(&self, port: &str, frame: &[u8]) {
        self.ovs.appctl(&["netdev-dummy/receive", port, &hex(frame)]);
    }

    /// All frames that left by a port: records of a pcap file.
    fn sent(&self, port: &str) -> Vec<Vec<u8>> {
        let file = std::fs::read(self.ovs.path(port)).unwrap();
        let (mut rest, mut frames) = (file.get(24..).unwrap_or(&[]), Vec::new());
        while let Some(len) = rest.get(8..12) {
            let len = u32::from_ne_bytes(len.try_into().unwrap()) as usize;
            let Some(frame) = rest.get(16..16 + len) else { break };
            frames.push(frame.to_vec());
            rest = &rest[16 + len..];
        }
        frames
    }
}

fn tagged(tag: Tag, frame: &[u8]) -> Vec<u8> {
    let tag = tag.vlan().to_be_bytes();
    [&frame[..12], &[0x81, 0], &tag, &frame[12..]].concat()
}

/// Sends a frame until it leaves at the other place as it should: the first ones only make the tunnel's addresses known.
async fn travels(from: (&Site, &str), frame: &[u8], to: (&Site, &str), expected: &[u8]) {
    for _ in 0..200 {
        from.0.send(from.1, frame);
        if to.0.sent(to.1).iter().any(|sent| sent == expected) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{} does not get the frame; it got {:?}", to.1, to.0.sent(to.1));
}

async fn two_sites(flow_based: bool) {
    let name = if flow_based { "two sites, flow-based tunnels" } else { "two sites, a tunnel per peer" };
    if !nix::unistd::geteuid().is_root() {
        return skip(name, "network namespaces need root");
    }
    let Some(mut one) = Site::start(OWN, flow_based).await else {
        return skip(name, "Open vSwitch is not installed, or network namespaces cannot be made");
    };
    let mut two = Site::start(PEER, flow_based).await.unwrap();
    one.namespace.run(&format!("ip link add u type veth peer name u2 netns {}", two.namespace.pid()));
    one.join("u");
    two.join("u2");
    one.rules().await;
    two.rules().await;

    // A client's packet at site 1 goes through the tunnel to the worker of site 2, and from there to the world.
    let frame = client_bytes(1);
    let direct = tagged(Tag::Direct(Side::Inside, OWN), &frame);
    travels((&one, "in"), &frame, (&two, "w"), &direct).await;
    travels((&two, "w"), &tagged(Tag::ToOutside, &frame), (&two, "out"), &frame).await;
    // The answer goes back through the tunnel to the client at site 1.
    let answer = client_bytes(2);
    travels((&two, "w"), &tagged(Tag::ToClient(OWN), &answer), (&one, "in"), &answer).await;
    // What a worker of site 1 relays takes the same way.
    let relayed = tagged(Tag::Relayed(Side::Inside, OWN), &frame);
    travels((&one, "w"), &tagged(Tag::Relay(Side::Inside, PEER), &frame), (&two, "w"), &relayed).await;
    // A marker of site 1 arrives as one. It is sent until it does, as an agent does; a copy of what was sent above may still come
    // behind it.
    let marker = marker_out(&one.plan, OldPath::Remote(PEER), &group(), MoveId(5), Epoch(2)).unwrap();
    let expected = tagged(Tag::Marker(OWN), &marker.bytes);
    for _ in 0..200 {
        one.switch.packet_out(vec![marker.clone()]);
        tokio::time::sleep(Duration::from_millis(50)).await;
        if two.sent("w").contains(&expected) {
            return;
        }
    }
    panic!("the marker {expected:?} does not arrive; site 2 got {:?}", two.sent("w"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_travel_between_sites_by_flow_based_tunnels() {
    two_sites(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_travel_between_sites_by_a_tunnel_per_peer() {
    two_sites(false).await;
}
