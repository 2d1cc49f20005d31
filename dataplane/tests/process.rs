//! The real loop over real sockets: a switch that sends one packet, an agent that comes, goes and comes
//! back, and a move of real flows from one worker process to another.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::thread::JoinHandle;
use std::time::Duration;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Function, Ordering, Phase, Request, ServiceSpec, Timeouts, VERSION};
use dataplane::process::Link;
use dataplane::{WorkerConfig, packet, run};
use flow::nat::NatSpec;
use flow::steer::{Side, Tag};
use flow::{Epoch, GroupId, MoveId, ServiceId, SiteId, WorkerId};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

const MOVE: MoveId = MoveId(1 << 63 | 1);
const SITE: SiteId = SiteId(1);

fn group() -> GroupId {
    "1:100.64.0.0/24".parse().unwrap()
}

fn services() -> Request {
    let nat = NatSpec {
        clients: vec!["100.64.0.0/24".parse().unwrap()],
        pool: vec!["198.51.100.0/28".parse().unwrap()],
        ports_per_subscriber: 256,
        first_port: 1024,
        port_key: 3,
    };
    let service = ServiceId::new(1).unwrap();
    Request::Services(vec![ServiceSpec {
        service,
        function: Function::Nat44(nat),
        timeouts: Timeouts::default(),
    }])
}

/// A worker in a thread, with the switch's end of its packet socket.
struct Running {
    config: WorkerConfig,
    control: PathBuf,
    switch: UnixStream,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(directory: &Path, number: u16) -> Self {
        let switch_path = directory.join(format!("switch{number}"));
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&switch_path).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let control = directory.join(format!("control{number}"));
        let config = WorkerConfig {
            site: SITE,
            worker: WorkerId(number),
            control_path: control.clone(),
            link: Link::Socket(switch_path),
            flow_capacity: 4096,
            hold_packets_max: 100,
            hold_bytes_max: 16 << 20,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let own = config.clone();
        let thread = std::thread::spawn(move || run(&own, &flag).unwrap());
        // The standard types carry packets as well: one read or write is one message.
        let (switch, _) = UnixListener::from(listener).accept().unwrap();
        switch.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { config, control, switch, stop, thread: Some(thread) }
    }

    fn agent(&self) -> Agent {
        let agent = (0..3000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            self.try_agent(SITE)
        });
        agent.expect("the worker listens, and takes an agent")
    }

    /// An agent of a site, if the worker takes it for its own.
    fn try_agent(&self, site: SiteId) -> Option<Agent> {
        let stream = UnixStream::connect(&self.control).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut agent = Agent { stream, decoder: FrameDecoder::new() };
        agent.stream.write_all(&encode(&Request::Hello { version: VERSION, site }).unwrap()).ok()?;
        let hello = agent.try_hear()?;
        assert!(matches!(hello, Event::Hello { version: VERSION, .. }));
        Some(agent)
    }

    fn pass(&mut self, frame: &[u8]) -> Vec<u8> {
        self.switch.write_all(frame).unwrap();
        self.receive()
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        let len = self.switch.read(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Atomic::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Agent {
    stream: UnixStream,
    decoder: FrameDecoder<Event>,
}

impl Agent {
    fn say(&mut self, request: &Request) {
        self.stream.write_all(&encode(request).unwrap()).unwrap();
    }

    fn hear(&mut self) -> Event {
        self.try_hear().expect("the worker hung up")
    }

    /// Nothing when the worker has closed the connection.
    fn try_hear(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.decoder.next().unwrap() {
                return Some(event);
            }
            let mut bytes = [0; 4096];
            let len = self.stream.read(&mut bytes).unwrap_or(0);
            if len == 0 {
                return None;
            }
            self.decoder.push(&bytes[..len]);
        }
    }

    fn ask(&mut self, request: &Request) -> Event {
        self.say(request);
        self.hear()
    }
}

fn from_client(port: u16) -> Vec<u8> {
    let udp = [port.to_be_bytes(), 53u16.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat();
    packet::build_ip(Tag::Direct(Side::Inside, SITE), 17, 0x6440_0005, 0xcb00_7109, &udp)
}

fn tag(frame: &[u8]) -> Tag {
    packet::parse(frame).unwrap().tag
}

fn serving(worker: &Running) -> Agent {
    let mut agent = worker.agent();
    assert_eq!(agent.ask(&services()), Event::ServicesSet);
    agent
}

#[test]
fn a_worker_forwards_on_when_the_agent_goes_and_tells_the_next_one_what_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let mut worker = Running::start(directory.path(), 1);
    let mut agent = serving(&worker);
    agent.ask(&Request::Serve { group: group(), epoch: Epoch(1) });
    let first = worker.pass(&from_client(5000));
    assert_eq!(tag(&first), Tag::ToOutside);
    drop(agent);
    let again = worker.pass(&from_client(5000));
    assert_eq!(first[18..], again[18..]);
    let mut agent = worker.agent();
    let Event::Status { groups, .. } = agent.ask(&Request::Status) else { panic!() };
    assert_eq!((groups[0].phase, groups[0].flows), (Phase::Serving, 1));
    for round in 0..200u16 {
        assert_eq!(tag(&worker.pass(&from_client(round))), Tag::ToOutside);
    }
}

#[test]
fn an_agent_of_another_version_is_told_ours() {
    let directory = tempfile::tempdir().unwrap();
    let worker = Running::start(directory.path(), 1);
    let mut agent = worker.agent();
    let hello = Request::Hello { version: VERSION + 1, site: SITE };
    assert!(matches!(agent.ask(&hello), Event::Hello { version: VERSION, .. }));
    assert_eq!(agent.stream.read(&mut [0; 16]).unwrap(), 0);
}

#[test]
fn silent_connections_neither_displace_an_agent_nor_keep_one_out() {
    let directory = tempfile::tempdir().unwrap();
    let worker = Running::start(directory.path(), 1);
    let mut agent = serving(&worker);
    let silent = || UnixStream::connect(&worker.control).unwrap();
    let mut strangers = Vec::new();
    for _ in 0..20 {
        strangers.extend((0..5).map(|_| silent()));
        assert!(matches!(agent.ask(&Request::Status), Event::Status { .. }));
    }
    // One that says hello is an agent, once the one before is silent.
    let mut next = worker.agent();
    assert!(matches!(next.ask(&Request::Status), Event::Status { .. }));
    assert_eq!(agent.stream.read(&mut [0; 16]).unwrap(), 0);
    // Who says nothing, or something else first, is left.
    let mut last = silent();
    last.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(last.read(&mut [0; 16]).unwrap(), 0);
    let mut other = silent();
    other.write_all(&encode(&Request::Status).unwrap()).unwrap();
    assert_eq!(other.read(&mut [0; 16]).unwrap(), 0);
    assert!(matches!(next.ask(&Request::Status), Event::Status { .. }));
}

#[test]
fn an_agent_of_another_site_or_a_second_one_takes_no_worker_from_its_agent() {
    let directory = tempfile::tempdir().unwrap();
    let worker = Running::start(directory.path(), 1);
    drop(worker.agent());
    assert!((0..10).all(|_| worker.try_agent(SiteId(9)).is_none()));
    let mut agent = serving(&worker);
    for site in [SiteId(9), SITE] {
        assert!(worker.try_agent(site).is_none());
        assert!(matches!(agent.ask(&Request::Status), Event::Status { .. }));
    }
    // One that has closed its end gives way at once.
    drop(agent);
    assert!(worker.try_agent(SITE).is_some());
}

#[test]
fn a_control_socket_that_was_taken_away_is_bound_again() {
    let directory = tempfile::tempdir().unwrap();
    let worker = Running::start(directory.path(), 1);
    drop(worker.agent());
    std::fs::remove_file(&worker.control).unwrap();
    let mut agent = worker.agent();
    assert!(matches!(agent.ask(&Request::Status), Event::Status { .. }));
}

#[test]
fn a_second_worker_takes_nothing_from_the_first_and_the_first_nothing_from_others() {
    let directory = tempfile::tempdir().unwrap();
    let worker = Running::start(directory.path(), 1);
    let mut agent = worker.agent();
    let refused = run(&worker.config, &AtomicBool::new(true)).unwrap_err().to_string();
    assert!(refused.contains("control1: another process listens there"), "{refused}");
    assert!(matches!(agent.ask(&Request::Status), Event::Status { .. }));
    drop(worker.agent());
    // Its path is another's now, and stays that at its end.
    let control = worker.control.clone();
    std::fs::remove_file(&control).unwrap();
    let other = UnixListener::bind(&control).unwrap();
    drop(worker);
    UnixStream::connect(&control).unwrap();
    drop(other);
}

#[test]
#[expect(clippy::wildcard_enum_match_arm, reason = "nothing else may come")]
fn flows_move_from_one_worker_to_another() {
    let directory = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Running::start(directory.path(), 1), Running::start(directory.path(), 2));
    let (mut source, mut target) = (serving(&a), serving(&b));
    source.ask(&Request::Serve { group: group(), epoch: Epoch(1) });
    let before: Vec<_> = (0..100).map(|port| a.pass(&from_client(port))).collect();
    let (group, move_id, epoch) = (group(), MOVE, Epoch(2));
    let ordering = Ordering::Strict;
    let prepare = Request::Prepare { group, move_id, epoch, source: SITE, flows: 100, ordering };
    assert_eq!(target.ask(&prepare), Event::Prepared { group, move_id });
    source.say(&Request::CopyStart { group, move_id, session: 0, credit: u64::MAX });
    source.say(&Request::Arm {
        group,
        move_id,
        epoch,
        target: SITE,
        awaited: vec![],
        bound_us: 0,
        session: 0,
        credit: u64::MAX,
        again: false,
    });
    let (token, missing) = loop {
        match source.hear() {
            Event::Records { batch, .. } => {
                let installed =
                    target.ask(&Request::Install { group, move_id, sequence: 7, batch, more: false });
                assert_eq!(installed, Event::Installed { group, move_id, sequence: 7 });
            }
            Event::Cut { token, missing, .. } => break (token, missing),
            Event::RoundEnd { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(token.flows, 100);
    let mut cut = a.receive();
    assert_eq!(tag(&cut), Tag::SendCut(SITE));
    packet::set_tag(&mut cut, Tag::Cut(SITE));
    b.switch.write_all(&from_client(0)).unwrap();
    b.switch.write_all(&cut).unwrap();
    let join = Request::Join { group, move_id, token, missing, late_bound_us: 0, cut_bound_us: 1_000_000 };
    assert!(matches!(target.ask(&join), Event::Joined { flows: 100, .. }));
    assert_eq!(b.receive()[18..], before[0][18..]);
    for (port, frame) in (0..100).zip(&before).skip(1) {
        assert_eq!(b.pass(&from_client(port))[18..], frame[18..], "the mapping is the same");
    }
    assert_eq!(tag(&a.pass(&from_client(3))), Tag::Relay(Side::Inside, SITE));
    let forget = Request::Forget {
        group,
        move_id,
        epoch,
        target: SITE,
        relay_us: 1_000,
        ingresses: vec![],
        relay_late_us: 0,
    };
    assert_eq!(source.ask(&forget), Event::Gone { group, move_id });
}
