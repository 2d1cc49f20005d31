//! Packets per second and cycles per packet of a DPDK worker on one core, beside `dpdk-testpmd` in macswap mode, which
//! only swaps two addresses, in the same run. Time is that of the processor, so that others who use it too take little away
//! from either: the lower quartile of many short slices here, the best second of testpmd.
//!
//! `net_null` makes frames of the wanted length and copies them, as it does for testpmd; the bench then writes the headers
//! of a flow into each, which testpmd has not to bear. `net_ring` gives the worker back what the bench put in. Flows in
//! random order, both directions. "worker" is the worker alone, "loop" all of it.

#![expect(clippy::print_stdout, reason = "prints its figures")]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use dataplane::control::{Function, Request, ServiceSpec, Timeouts};
use dataplane::dpdk::{Device, DpdkConfig, DpdkLink, Idle};
use dataplane::io::PacketIo;
use dataplane::{Output, Settings, Worker, packet};
use dpdk::{Eal, EalConfig, Mbuf, Memory, Pool, cycles, cycles_per_second};
use flow::nat::NatSpec;
use flow::steer::{Side, Tag};
use flow::{Epoch, Micros, ServiceId, SiteId};
use nix::time::{ClockId, clock_gettime};

const BURST_LEN: usize = dataplane::worker::BURST_LEN;
/// Bytes of a frame that the worker looks at.
const HEADERS: usize = 64;
const PER_CLIENT: u32 = 64;
const SLICES: usize = 400;
const BURSTS_PER_SLICE: usize = 500;

fn worker(flows: u32) -> Worker<Mbuf> {
    let capacity = (flows as usize).max(1 << 10);
    let mut worker = Worker::new(Settings { flow_capacity: capacity, ..Settings::default() }, Micros(0));
    let nat = NatSpec {
        clients: vec!["100.64.0.0/16".parse().expect("a prefix")],
        pool: vec!["198.18.0.0/20".parse().expect("a prefix")],
        ports_per_subscriber: 1008,
        first_port: 1024,
        port_key: 5,
    };
    let service = ServiceId::new(1).expect("an id");
    let spec = ServiceSpec { service, function: Function::Nat44(nat), timeouts: Timeouts::default() };
    worker.handle(Request::Services(vec![spec]), Micros(0));
    let group = "1:100.64.0.0/16".parse().expect("a group");
    worker.handle(Request::Serve { group, epoch: Epoch(1) }, Micros(0));
    worker
}

fn frame(side: Side, from: (u32, u16), to: (u32, u16), len: usize) -> Vec<u8> {
    let udp_len = (len - packet::IP - packet::IPV4_LEN) as u16;
    let mut udp = [from.1.to_be_bytes(), to.1.to_be_bytes(), udp_len.to_be_bytes(), [0, 0]].concat();
    udp.resize(usize::from(udp_len), 0);
    packet::build_ip(Tag::Direct(side, SiteId(0)), 17, from.0, to.0, &udp)
}

/// A worker that serves so many flows, and the headers of a frame of each direction of each, in random order.
fn filled(flows: u32, len: usize, pool: Pool) -> (Worker<Mbuf>, Vec<[u8; HEADERS]>) {
    let mut worker = worker(flows);
    let mut out = Output::new(pool);
    let mut frames = Vec::new();
    let mut keep = |frame: &[u8]| frames.push(frame[..HEADERS].try_into().expect("long enough"));
    for flow in 0..flows {
        let client = (0x6440_0000 + flow / PER_CLIENT, 20_000 + (flow % PER_CLIENT) as u16);
        let remote = (0xcb00_7100 + flow % 251, 443);
        let first = frame(Side::Inside, client, remote, len);
        keep(&first);
        worker.burst(&mut vec![pool.packet(&first).expect("a buffer")], Micros(0), &mut out);
        let sent = out.tx.pop().expect("translated");
        let word = |at: usize| &sent.data()[packet::IP + at..];
        let port = u16::from_be_bytes(*word(20).first_chunk().expect("a port"));
        let address = u32::from_be_bytes(*word(12).first_chunk().expect("an address"));
        keep(&frame(Side::Outside, remote, (address, port), len));
    }
    let mut state = 88_172_645_463_325_252u64;
    for at in (1..frames.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        frames.swap(at, (state % (at as u64 + 1)) as usize);
    }
    (worker, frames)
}

#[derive(Clone, Copy)]
enum Kind {
    Null,
    Ring,
}

/// What the bench does around the worker, and the worker.
struct Bench {
    kind: Kind,
    link: DpdkLink,
    worker: Worker<Mbuf>,
    frames: Vec<[u8; HEADERS]>,
    at: usize,
    out: Output<Mbuf>,
    rx: Vec<Mbuf>,
    spare: Vec<Mbuf>,
    worker_cycles: u64,
}

impl Bench {
    fn write(&mut self) {
        let packets = match self.kind {
            Kind::Null => &mut self.rx,
            Kind::Ring => &mut self.spare,
        };
        for packet in packets {
            packet.data_mut()[..HEADERS].copy_from_slice(&self.frames[self.at]);
            self.at = if self.at + 1 == self.frames.len() { 0 } else { self.at + 1 };
        }
    }

    fn burst(&mut self) {
        match self.kind {
            Kind::Null => {
                self.link.rx_burst(&mut self.rx).expect("a device");
                self.write();
            }
            Kind::Ring => {
                self.write();
                self.link.port_mut().tx_burst(&mut self.spare);
                self.link.rx_burst(&mut self.rx).expect("a device");
            }
        }
        let start = cycles();
        self.worker.burst(&mut self.rx, Micros(1), &mut self.out);
        self.worker_cycles += cycles() - start;
        self.link.tx_burst(&mut self.out.tx).expect("a device");
        assert!(self.out.free.is_empty(), "every packet is translated");
        if let Kind::Ring = self.kind {
            self.link.port_mut().rx_burst(&mut self.spare);
        }
    }

    /// Nanoseconds per packet of the loop, cycles per packet of the worker.
    fn run(&mut self) -> (f64, f64) {
        let packets = (BURSTS_PER_SLICE * BURST_LEN) as f64;
        let (mut loops, mut workers) = (Vec::new(), Vec::new());
        for _ in 0..SLICES {
            self.worker_cycles = 0;
            let start = thread_time();
            for _ in 0..BURSTS_PER_SLICE {
                self.burst();
            }
            loops.push((thread_time() - start).as_nanos() as f64 / packets);
            workers.push(self.worker_cycles as f64 / packets);
        }
        (quartile(loops), quartile(workers))
    }
}

fn quartile(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 4]
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the clock of this thread").into()
}

fn bench(eal: &Eal, kind: Kind, number: u32, flows: u32, len: usize) {
    let (name, device) = match kind {
        Kind::Null => ("net_null", format!("net_null{number},size={len},copy=1")),
        Kind::Ring => ("net_ring", format!("net_ring{number}")),
    };
    let config = DpdkConfig {
        device: Device::Virtual(device),
        lcore: None,
        huge_pages: false,
        memory_mb: 0,
        idle: Idle::Spin,
        mtu: 1500,
        buffers: 4_096,
        rx_descriptors: 512,
        tx_descriptors: 512,
        eal: Vec::new(),
    };
    let (link, pool) = DpdkLink::open(eal, &config).expect("a device");
    let (worker, frames) = filled(flows, len, pool);
    let spare = match kind {
        Kind::Null => Vec::new(),
        Kind::Ring => (0..BURST_LEN).map(|_| pool.packet(&vec![0; len]).expect("a buffer")).collect(),
    };
    let (out, rx) = (Output::new(pool), Vec::new());
    let mut bench = Bench { kind, link, worker, frames, at: 0, out, rx, spare, worker_cycles: 0 };
    let cycles_per_ns = cycles_per_second(eal) as f64 / 1e9;
    let (loop_ns, worker_cycles) = bench.run();
    println!(
        "| {name} | {flows} | {len} | {:.1} | {:.0} | {:.1} | {worker_cycles:.0} |",
        1e3 / loop_ns,
        loop_ns * cycles_per_ns,
        1e3 * cycles_per_ns / worker_cycles,
    );
}

/// Nanoseconds that all threads of a process have run.
fn process_ns(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let spent = tasks.map(|task| std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default());
    spent.map(|text| text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)).sum()
}

/// The best second of testpmd; none when it is not installed.
fn testpmd(lcore: usize, len: usize) -> Option<f64> {
    let mut child = Command::new("dpdk-testpmd")
        .args(["--lcores", &format!("(0,1)@{lcore}"), "--no-huge", "-m", "256", "--no-pci", "--no-shconf"])
        .args([
            "--iova-mode=va",
            "--log-level=error",
            "--vdev",
            &format!("net_null0,size={len},copy=1"),
            "--",
        ])
        .args(["--forward-mode=macswap", "--total-num-mbufs=4096", "--stats-period=1", "--no-mlockall"])
        .args(["--auto-start", "--port-topology=loop", "--burst=32"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let lines = BufReader::new(child.stdout.take()?).lines().map_while(Result::ok);
    let mut seen = 0;
    let (mut before, mut best) = (None, 0.0f64);
    for packets in lines
        .filter_map(|line| line.trim().strip_prefix("RX-packets:")?.split_whitespace().next()?.parse().ok())
    {
        let now: (u64, u64) = (packets, process_ns(child.id()));
        // The first second has the start in it.
        if let Some((packets, ns)) = before.replace(now).filter(|(packets, _)| *packets > 0) {
            best = best.max((now.0 - packets) as f64 * 1e3 / (now.1 - ns) as f64);
            seen += 1;
        }
        if seen == 6 {
            break;
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    (best > 0.0).then_some(best)
}

fn main() {
    // The first processors take most of a machine's interrupts.
    let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
    let lcore = std::env::var("LIMOSA_BENCH_LCORE").ok().and_then(|text| text.parse().ok()).unwrap_or(last);
    let peers = [64, 1500].map(|len| (len, testpmd(lcore, len)));
    let memory = Memory::Ordinary { megabytes: 512 };
    let eal = Eal::start(&EalConfig { lcore: Some(lcore), memory, pci: None, extra: Vec::new() });
    let eal = eal.expect("DPDK starts");
    println!("One core, {:.2} GHz counter, ordinary pages.\n", cycles_per_second(&eal) as f64 / 1e9);
    println!(
        "| device | flows | bytes | loop, Mpps | cycles | worker, Mpps | cycles |\n|---|---|---|---|---|---|---|"
    );
    for (len, peer) in peers {
        match peer {
            Some(mpps) => println!(
                "| testpmd macswap, net_null | - | {len} | {mpps:.1} | {:.0} | - | - |",
                cycles_per_second(&eal) as f64 / mpps / 1e6
            ),
            None => println!("SKIPPED: dpdk-testpmd (apt-get install dpdk-dev)"),
        }
    }
    let mut number = 0;
    for kind in [Kind::Null, Kind::Ring] {
        for len in [64, 1500] {
            for flows in [1_000, 100_000, 1_000_000] {
                bench(&eal, kind, number, flows, len);
                number += 1;
            }
        }
    }
}
