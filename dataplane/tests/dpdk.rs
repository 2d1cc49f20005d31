//! The worker over DPDK without hardware: the same packets out as from the embedded worker, and what a device can do
//! to it is counted and survived.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use dataplane::control::{Counters, Event, Function, Ordering, Request, ServiceSpec, Timeouts};
use dataplane::dpdk::{Device, DpdkConfig, DpdkLink, Idle};
use dataplane::io::{Drops, MemoryIo, PacketBuf, PacketIo, Rest, SwitchLink};
use dataplane::{Output, Settings, Worker, packet};
use dpdk::{Eal, EalConfig, Mbuf, Memory};
use flow::nat::NatSpec;
use flow::steer::{MARKER_PROTOCOL, MarkerBody, Side, Tag};
use flow::{Batch, Epoch, GroupId, Micros, MoveId, ServiceId, SiteId, Token};

const BURST_LEN: usize = dataplane::worker::BURST_LEN;
const MOVE: MoveId = MoveId(1 << 63 | 1);

/// DPDK starts once in a process; devices are made one at a time.
fn eal() -> (&'static Eal, MutexGuard<'static, ()>) {
    static EAL: OnceLock<Eal> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = Memory::Ordinary { megabytes: 512 };
    let config = EalConfig { lcore: None, memory, pci: None, extra: Vec::new() };
    (EAL.get_or_init(|| Eal::start(&config).unwrap()), guard)
}

fn config(device: String) -> DpdkConfig {
    DpdkConfig {
        device: Device::Virtual(device),
        lcore: None,
        huge_pages: false,
        memory_mb: 256,
        idle: Idle::Backoff,
        mtu: 1500,
        buffers: 4_096,
        rx_descriptors: 512,
        tx_descriptors: 512,
        eal: Vec::new(),
    }
}

fn write_pcap(path: &Path, frames: &[Vec<u8>]) {
    let header = [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    for frame in frames {
        let len = frame.len() as u32;
        bytes.extend([0, 0, len, len].iter().flat_map(|word: &u32| word.to_ne_bytes()));
        bytes.extend(frame);
    }
    std::fs::write(path, bytes).unwrap();
}

fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[24..];
    let mut frames = Vec::new();
    while let Some(header) = rest.first_chunk::<16>() {
        let len = u32::from_ne_bytes(header[8..12].try_into().unwrap()) as usize;
        frames.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    frames
}

fn groups() -> [GroupId; 4] {
    ["1:100.64.0.0/26", "1:100.64.0.64/26", "1:100.64.0.128/26", "1:100.64.0.192/26"]
        .map(|text| text.parse().unwrap())
}

fn services() -> Request {
    let nat = NatSpec {
        clients: vec!["100.64.0.0/24".parse().unwrap()],
        pool: vec!["198.51.100.0/28".parse().unwrap()],
        // Few, so that blocks run out and the worker says so by ICMP.
        ports_per_subscriber: 16,
        first_port: 1024,
        port_key: 3,
    };
    let (service, timeouts) = (ServiceId::new(1).unwrap(), Timeouts::default());
    Request::Services(vec![ServiceSpec { service, function: Function::Nat44(nat), timeouts }])
}

/// A generator of frames that differ in all that a worker looks at.
struct Trace(u64);

impl Trace {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32 % bound
    }

    fn frame(&mut self) -> Vec<u8> {
        let site = SiteId(self.below(3) as u8);
        let side = if self.below(3) == 0 { Side::Outside } else { Side::Inside };
        let tag = if self.below(8) == 0 { Tag::Relayed(side, site) } else { Tag::Direct(side, site) };
        // A few clients with many ports each run out of them; some are no clients at all.
        let client = 0x6440_0000 + if self.below(2) == 0 { self.below(8) * 32 } else { self.below(260) };
        let world = 0xcb00_7100 + self.below(20);
        let pool = 0xc633_6400 + self.below(16);
        let (source, destination) = match side {
            // Some to the pool itself: hairpins.
            Side::Inside => (client, if self.below(10) == 0 { pool } else { world }),
            Side::Outside => (world, pool),
        };
        let ports = [self.below(64) as u16 + 1024, self.below(260) as u16 + 1024];
        let mut payload: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        let protocol = match self.below(10) {
            0..5 => {
                payload.extend([0, 20, 0x12, 0x34]);
                17
            }
            5..8 => {
                let flags = [0x02, 0x12, 0x10, 0x18, 0x11, 0x04][self.below(6) as usize];
                payload.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0xab, 0xcd, 0, 0]);
                6
            }
            8 => {
                payload = [
                    [if side == Side::Inside { 8 } else { 0 }, 0, 0x56, 0x78],
                    [4, self.below(9) as u8, 0, 1],
                ]
                .concat();
                1
            }
            _ => self.below(256) as u8,
        };
        payload.extend(vec![0x5a; self.below(1_300) as usize]);
        let mut frame = packet::build_ip(tag, protocol, source, destination, &payload);
        match self.below(40) {
            0 => frame.truncate(self.below(60) as usize + 1),
            1 => {
                let at = self.below(frame.len() as u32) as usize;
                frame[at] ^= 1 << self.below(8);
            }
            2 => frame.extend([0; 7]),
            _ => {}
        }
        frame
    }
}

fn marker(group: GroupId, tag: Tag) -> Vec<u8> {
    let std::net::IpAddr::V4(first) = group.prefix.address() else { panic!() };
    let body = MarkerBody {
        move_id: MOVE,
        epoch: Epoch(2),
        service: group.service,
        prefix_len: group.prefix.len(),
        from: SiteId(0),
    };
    packet::build_ip(tag, MARKER_PROTOCOL, first.into(), first.into(), &body.encode())
}

/// The turns of a worker process with a clock of our own, over any packets and any link.
struct Turns<B: PacketBuf> {
    worker: Worker<B>,
    out: Output<B>,
    now: Micros,
    events: Vec<Event>,
}

impl<B: PacketBuf> Turns<B> {
    fn new(out: Output<B>) -> Self {
        let settings =
            Settings { site: SiteId(0), flow_capacity: 4096, hold_packets_max: 300, ..Settings::default() };
        Self { worker: Worker::new(settings, Micros(0)), out, now: Micros(0), events: Vec::new() }
    }

    fn ask(&mut self, request: Request) {
        self.worker.handle(request, self.now);
    }

    fn turn(&mut self, io: &mut impl PacketIo<B>) -> usize {
        self.now = self.now.plus(Micros(700));
        let mut packets = Vec::new();
        let received = io.rx_burst(&mut packets).unwrap();
        self.worker.burst(&mut packets, self.now, &mut self.out);
        self.worker.slice(self.now, &mut self.out);
        io.tx_burst(&mut self.out.tx).unwrap();
        io.recycle(&mut self.out.free);
        self.events.extend(std::iter::from_fn(|| self.worker.poll_event()));
        received
    }

    /// A life with every way that a packet can take: served, copied from, relayed, held, joined. Requests come at
    /// given bursts; then until nothing more comes.
    fn live(mut self, io: &mut impl PacketIo<B>) -> (Counters, Vec<Event>) {
        let [served, left, held, unknown] = groups();
        self.ask(services());
        for group in [served, left] {
            self.ask(Request::Serve { group, epoch: Epoch(1) });
        }
        let (move_id, epoch, source, ordering) = (MOVE, Epoch(2), SiteId(2), Ordering::Strict);
        self.ask(Request::Prepare { group: held, move_id, epoch, source, flows: 10, ordering });
        for turn in 0.. {
            match turn {
                10 => self.ask(Request::CopyStart { group: left, move_id, session: 0, credit: u64::MAX }),
                20 => {
                    let (target, awaited, bound_us) = (SiteId(1), vec![SiteId(0)], 10_000);
                    let (group, credit) = (left, u64::MAX);
                    self.ask(Request::Arm {
                        group,
                        move_id,
                        epoch,
                        target,
                        awaited,
                        bound_us,
                        session: 0,
                        credit,
                        again: false,
                    });
                }
                25 => {
                    let batch = Batch::default();
                    self.ask(Request::Install { group: held, move_id, sequence: 1, batch, more: false });
                }
                40 => {
                    let token = Token { epoch, flows: 0, ..self.token() };
                    let (missing, late_bound_us, cut_bound_us) = (vec![], 0, 5_000);
                    self.ask(Request::Join {
                        group: held,
                        move_id,
                        token,
                        missing,
                        late_bound_us,
                        cut_bound_us,
                    });
                }
                50 => self.ask(Request::Serve { group: unknown, epoch: Epoch(1) }),
                _ => {}
            }
            if self.turn(io) == 0 && turn > 60 && self.worker.wait() == dataplane::worker::Wait::Idle {
                break;
            }
        }
        (self.worker.counters(), self.events)
    }

    fn token(&self) -> Token {
        let cut = self.events.iter().find_map(|event| {
            let Event::Cut { token, .. } = event else { return None };
            Some(*token)
        });
        cut.unwrap()
    }
}

fn same_trace(seed: u8) -> Counters {
    let (eal, _turn) = eal();
    let mut trace = Trace(0x9e37_79b9_7f4a_7c15 ^ u64::from(seed) << 40);
    let mut frames: Vec<Vec<u8>> = (0..BURST_LEN * 90).map(|_| trace.frame()).collect();
    frames[BURST_LEN * 22] = marker(groups()[1], Tag::Marker(SiteId(0)));
    frames[BURST_LEN * 45] = marker(groups()[2], Tag::Cut(SiteId(2)));

    let mut memory = MemoryIo::default();
    memory.rx.extend(frames.iter().cloned());
    let expected = Turns::<Vec<u8>>::new(Output::default()).live(&mut memory);

    let directory = tempfile::tempdir().unwrap();
    let (rx, tx) = (directory.path().join("rx.pcap"), directory.path().join("tx.pcap"));
    write_pcap(&rx, &frames);
    let device = format!("net_pcap{seed},rx_pcap={},tx_pcap={}", rx.display(), tx.display());
    let (mut link, pool) = DpdkLink::open(eal, &config(device)).unwrap();
    let got = Turns::<Mbuf>::new(Output::new(pool)).live(&mut link);
    assert_eq!(link.take_drops(), Drops::default());
    drop(link);

    let sent = read_pcap(&tx);
    for (number, (sent, expected)) in sent.iter().zip(&memory.tx).enumerate() {
        assert_eq!(sent, expected, "packet {number} of seed {seed}");
    }
    assert_eq!(sent.len(), memory.tx.len());
    assert_eq!(got, expected);
    assert_eq!(pool.available(), 4_096, "every buffer came back");
    got.0
}

#[test]
fn the_same_trace_gives_the_same_bytes_as_in_the_embedded_worker() {
    let mut all = BTreeMap::new();
    for seed in 0..8 {
        let c = same_trace(seed);
        for (name, count) in [
            ("translated_out", c.translated_out),
            ("translated_in", c.translated_in),
            ("hairpinned", c.hairpinned),
            ("relayed", c.relayed),
            ("held", c.held),
            ("markers", c.markers),
            ("malformed", c.dropped_malformed),
            ("bad checksum", c.dropped_bad_checksum),
            ("exhausted", c.dropped_port_block_exhausted),
            ("icmp", c.icmp_sent),
        ] {
            *all.entry(name).or_insert(0) += count;
        }
    }
    assert!(all.values().all(|count| *count > 0), "the trace leaves something out: {all:?}");
}

fn from_client(port: u16) -> Vec<u8> {
    let udp = [port.to_be_bytes(), 53u16.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat();
    packet::build_ip(Tag::Direct(Side::Inside, SiteId(0)), 17, 0x6440_0005, 0xcb00_7109, &udp)
}

#[test]
fn what_is_sent_without_a_link_is_counted_and_what_comes_later_goes_out() {
    let (eal, _turn) = eal();
    let (mut link, pool) = DpdkLink::open(eal, &config("net_ring0".into())).unwrap();
    let packets =
        |count: u16| -> Vec<Mbuf> { (0..count).map(|at| pool.packet(&from_client(at)).unwrap()).collect() };
    link.maintain(Micros(0));
    link.tx_burst(&mut packets(3)).unwrap();
    assert!(link.port_mut().set_link(false));
    link.maintain(Micros(100_000));
    link.tx_burst(&mut packets(5)).unwrap();
    assert_eq!(link.take_drops(), Drops { link_down: 5, ..Drops::default() });
    assert!(link.port_mut().set_link(true));
    link.maintain(Micros(200_000));
    link.tx_burst(&mut packets(2)).unwrap();
    let mut received = Vec::new();
    assert_eq!(link.rx_burst(&mut received), Ok(5));
    assert_eq!(link.take_drops(), Drops::default());
}

#[test]
fn a_slow_switch_is_waited_for_and_nothing_is_lost() {
    let (eal, _turn) = eal();
    let (mut link, pool) = DpdkLink::open(eal, &config("net_ring1".into())).unwrap();
    let mut sent: Vec<Mbuf> = (0..3_000).map(|at| pool.packet(&from_client(at)).unwrap()).collect();
    link.tx_burst(&mut sent).unwrap();
    assert!(sent.is_empty());
    assert!(matches!(link.rest(Micros(1_000)), Rest::Nap(_)), "what waits needs another look");
    let mut peer = Vec::new();
    // The ring is the switch: reading from it makes room.
    for _ in 0..1_000 {
        link.port_mut().rx_burst(&mut peer);
        link.tx_burst(&mut Vec::new()).unwrap();
        link.rx_burst(&mut peer).unwrap();
    }
    assert!(peer.iter().map(|packet| packet.data().to_vec()).eq((0..3_000).map(from_client)));
    assert_eq!(link.take_drops(), Drops::default());
}

#[test]
fn an_exhausted_pool_is_counted_and_survived() {
    let (eal, _turn) = eal();
    let (mut link, pool) =
        DpdkLink::open(eal, &DpdkConfig { buffers: 256, ..config("net_null0".into()) }).unwrap();
    let mut held = Vec::new();
    while link.rx_burst(&mut held).unwrap() > 0 {}
    link.maintain(Micros(0));
    assert_eq!(link.take_drops(), Drops { no_buffer: 1, ..Drops::default() });
    assert!(Mbuf::from_bytes(&pool, &from_client(1)).is_none());
    link.recycle(&mut held);
    link.maintain(Micros(100_000));
    assert_eq!((link.take_drops(), link.rx_burst(&mut held)), (Drops::default(), Ok(BURST_LEN)));
}

#[test]
fn frames_over_the_mtu_are_counted() {
    let (eal, _turn) = eal();
    let directory = tempfile::tempdir().unwrap();
    let rx = directory.path().join("rx.pcap");
    write_pcap(&rx, &[vec![0; 1_518], vec![0; 1_519], vec![0; 5_000]]);
    let (mut link, _) = DpdkLink::open(eal, &config(format!("net_pcap8,rx_pcap={}", rx.display()))).unwrap();
    let mut packets = Vec::new();
    while link.rx_burst(&mut packets).unwrap() > 0 {}
    assert_eq!((packets.len(), link.take_drops()), (1, Drops { oversize: 2, ..Drops::default() }));
}

#[test]
fn a_device_without_interrupts_is_looked_at_again_and_again() {
    let (eal, _turn) = eal();
    let (mut link, _) = DpdkLink::open(eal, &config("net_ring2".into())).unwrap();
    assert!(matches!(link.rest(Micros(0)), Rest::Spin));
    assert!(matches!(link.rest(Micros(1_000)), Rest::Nap(Micros(..200))));
    let spin = DpdkConfig { idle: Idle::Spin, ..config("net_ring3".into()) };
    let (mut link, _) = DpdkLink::open(eal, &spin).unwrap();
    assert!(matches!(link.rest(Micros(1_000)), Rest::Spin));
}
