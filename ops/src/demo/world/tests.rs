//! The world against a small NAT of its own, without faults and with each fault that it must see.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use super::frame::{Headers, UDP, rewrite};
use super::*;
use crate::demo::batch::{self, Inbox};

const DROP: u8 = 1;
const REPEAT: u8 = 2;
const SWAP: u8 = 3;
const CHANGE: u8 = 4;
const RENUMBER: u8 = 5;

const POOL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// A NAT with an inside and an outside port per site; a fault strikes one UDP packet on its way out.
struct FakeNetwork {
    stop: Arc<AtomicBool>,
    fault: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl FakeNetwork {
    fn start(paths: &[PathBuf]) -> Self {
        let (stop, fault) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU8::new(0)));
        let listeners: Vec<_> = paths.iter().map(|path| listener(path)).collect();
        let (stopped, strikes) = (Arc::clone(&stop), Arc::clone(&fault));
        let thread = std::thread::spawn(move || {
            let ports = listeners.iter().map(|listener| listener.accept().unwrap().0).collect();
            Nat { ports, next: 1_024, ..Nat::default() }.run(&stopped, &strikes);
        });
        Self { stop, fault, thread: Some(thread) }
    }
}

impl Drop for FakeNetwork {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn listener(path: &Path) -> UnixListener {
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(4).unwrap()).unwrap();
    UnixListener::from(fd)
}

#[derive(Default)]
struct Nat {
    ports: Vec<UnixStream>,
    outside: HashMap<(u8, Ipv4Addr, u16), u16>,
    /// Owner of each outside port, and the inside port where it came in last.
    inside: HashMap<(u8, u16), (Ipv4Addr, u16, usize)>,
    next: u16,
    held: Option<Vec<u8>>,
}

impl Nat {
    fn run(mut self, stop: &AtomicBool, fault: &AtomicU8) {
        let mut inbox = Inbox::new();
        while !stop.load(Relaxed) {
            std::thread::sleep(Duration::from_micros(100));
            for port in 0..self.ports.len() {
                let count = inbox.receive(&self.ports[port]).unwrap_or(0);
                for at in 0..count {
                    self.forward(port, inbox.datagram(at).to_vec(), fault);
                }
            }
        }
    }

    fn forward(&mut self, port: usize, mut frame: Vec<u8>, fault: &AtomicU8) {
        let Some(headers) = Headers::parse(&frame) else { return };
        if port % 2 == 1 {
            let Some(&(address, number, inside)) = self.inside.get(&(headers.protocol, headers.to.1)) else {
                return;
            };
            rewrite(&mut frame, &headers, headers.from, (address, number));
            return self.send(inside, &frame);
        }
        let strike = if headers.protocol == UDP { fault.load(Relaxed) } else { 0 };
        let key = (headers.protocol, headers.from.0, headers.from.1);
        if strike == RENUMBER && self.outside.remove(&key).is_some() {
            fault.store(0, Relaxed);
        }
        let outside = *self.outside.entry(key).or_insert_with(|| {
            self.next += 1;
            self.next
        });
        self.inside.insert((headers.protocol, outside), (headers.from.0, headers.from.1, port));
        rewrite(&mut frame, &headers, (POOL, outside), headers.to);
        self.strike(strike, port + 1, frame, fault);
    }

    fn strike(&mut self, strike: u8, port: usize, mut frame: Vec<u8>, fault: &AtomicU8) {
        match strike {
            DROP => return fault.store(0, Relaxed),
            REPEAT => self.send(port, &frame),
            CHANGE => {
                let last = frame.len() - 1;
                frame[last] ^= 1;
            }
            SWAP => {
                // Held until the one flow of the test sends again.
                match self.held.take() {
                    None => return self.held = Some(frame),
                    Some(held) => {
                        self.send(port, &frame);
                        frame = held;
                    }
                }
            }
            _ => return self.send(port, &frame),
        }
        fault.store(0, Relaxed);
        self.send(port, &frame);
    }

    fn send(&self, port: usize, frame: &[u8]) {
        while matches!(batch::send(&self.ports[port], std::iter::once(frame), None), Ok(0)) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn spec(folder: &Path, tcp_connections: usize, udp_flows: usize) -> WorldSpec {
    let site = |id, name: &str, latitude, longitude| SiteSpec {
        id: SiteId(id),
        name: name.to_owned(),
        latitude,
        longitude,
        inside: folder.join(format!("{name}-inside")),
        outside: folder.join(format!("{name}-outside")),
    };
    let sites = vec![site(1, "amsterdam", 52.37, 4.9), site(2, "virginia", 39.04, -77.49)];
    let group = |prefix: &str, home| GroupSpec {
        prefix: prefix.parse().unwrap(),
        home: SiteId(home),
        servers: vec![(SiteId(2), 1.0)],
    };
    let groups = vec![group("100.64.0.0/24", 1), group("100.64.1.0/24", 2)];
    let server = |last, site| ServerSpec {
        address: Ipv4Addr::new(203, 0, 113, last),
        site: SiteId(site),
        distance: Duration::from_millis(2),
    };
    let servers = vec![server(1, 1), server(2, 2)];
    WorldSpec {
        clients_per_group: 8,
        tcp_connections,
        udp_flows,
        udp_fast_flows: udp_flows,
        udp_fast_interval: Duration::from_millis(50),
        think: (Duration::from_millis(50), Duration::from_millis(200)),
        roam_silence: Duration::from_millis(400),
        grace: Duration::from_millis(700),
        ..WorldSpec::new(sites, groups, servers, vec!["198.51.100.0/24".parse().unwrap()])
    }
}

fn start(tcp_connections: usize, udp_flows: usize) -> (tempfile::TempDir, FakeNetwork, WorldHandle) {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), tcp_connections, udp_flows);
    let paths = spec.sites.iter().flat_map(|site| [site.inside.clone(), site.outside.clone()]);
    let network = FakeNetwork::start(&paths.collect::<Vec<_>>());
    let world = World::start(spec).unwrap();
    (folder, network, world)
}

#[test]
fn a_sound_network_is_found_sound_even_when_clients_roam() {
    let (_folder, _network, world) = start(20, 200);
    world.begin_act("roam").unwrap();
    std::thread::sleep(Duration::from_millis(1_500));
    let before = world.mark();
    assert_eq!(world.roam("100.64.0.0/24".parse().unwrap(), SiteId(2)).unwrap(), 1);
    std::thread::sleep(Duration::from_millis(1_500));
    let act = world.end_act().unwrap();
    let group = ["100.64.0.0/24".parse().unwrap()];
    assert!(world.delay_window(&group, before, None).unwrap().count > 0);
    let total = world.drain().unwrap();
    for traffic in [&act, &total] {
        let packets = traffic.packets;
        assert!(packets.sent > 2_000 && packets.sent == packets.delivered, "{packets:?}");
        assert_eq!((packets.lost, packets.duplicated, packets.reordered), (0, 0, 0));
        assert_eq!((traffic.tcp.connections, traffic.tcp.reset, traffic.tcp.corrupt), (20, 0, 0));
        assert!(traffic.tcp.bytes_verified > 50_000, "{:?}", traffic.tcp);
        assert_eq!(traffic.checks, Checks::default());
    }
    // The way from Amsterdam to Virginia is more than 40 ms; the way back is by the nearer port.
    let far = act.by_group["100.64.0.0/24"].round_trip_ms;
    let near = act.by_group["100.64.1.0/24"].round_trip_ms;
    assert!(far.p50 > 45.0 && near.p50 < 30.0, "{far:?} {near:?}");
}

/// What one fault does to a single flow.
fn with_fault(fault: u8) -> ActTraffic {
    let (_folder, network, world) = start(0, 1);
    std::thread::sleep(Duration::from_millis(400));
    network.fault.store(fault, Relaxed);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(network.fault.load(Relaxed), 0, "the fault did not strike");
    world.drain().unwrap()
}

#[test]
fn a_dropped_packet_is_lost() {
    let packets = with_fault(DROP).packets;
    assert_eq!((packets.lost, packets.duplicated, packets.reordered), (1, 0, 0));
}

#[test]
fn a_repeated_packet_is_duplicated() {
    let packets = with_fault(REPEAT).packets;
    assert_eq!((packets.lost, packets.duplicated, packets.reordered), (0, 1, 0));
}

#[test]
fn swapped_packets_are_reordered_both_ways() {
    let packets = with_fault(SWAP).packets;
    // The echo of the late one is late too.
    assert_eq!((packets.lost, packets.duplicated, packets.reordered), (0, 0, 2));
}

#[test]
fn a_changed_packet_is_corrupt_and_so_lost() {
    let traffic = with_fault(CHANGE);
    assert_eq!((traffic.checks.corrupt_packets, traffic.packets.lost), (1, 1));
}

#[test]
fn a_changed_outside_endpoint_is_seen() {
    let traffic = with_fault(RENUMBER);
    assert_eq!((traffic.checks.outside_changed, traffic.packets.lost), (1, 0));
}

/// Connections are down at first, and are opened within a second.
#[test]
fn a_world_that_is_drained_while_connections_are_down_ends() {
    let (_folder, _network, world) = start(8, 0);
    world.drain().unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    let (ended, ends) = channel();
    std::thread::spawn(move || {
        drop(world);
        let _ = ended.send(());
    });
    ends.recv_timeout(Duration::from_secs(30)).expect("the world goes on");
}
