//! A worker process over DPDK on one end of a veth pair, and a poller on the other.

#![allow(dead_code, unreachable_pub, reason = "test and bench use a part each")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::available_parallelism;
use std::time::Duration;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Function, Request, ServiceSpec, Timeouts, VERSION};
use dataplane::dpdk::{Device, DpdkConfig, DpdkLink, Idle};
use dpdk::{Eal, EalConfig, Memory, Pool, Port, PortConfig};
use flow::nat::NatSpec;
use flow::{ServiceId, SiteId};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare};
use nix::unistd::Pid;

/// Of the worker.
pub const SITE: SiteId = SiteId(1);

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

/// The process, and its agent's connection.
pub struct Worker {
    pub child: Child,
    agent: UnixStream,
    decoder: FrameDecoder<Event>,
}

impl Worker {
    pub fn start(directory: &Path, device: &str, idle: &str) -> Self {
        let config = directory.join("worker.toml");
        // Not where the poller is, if there is another.
        let lcore = LAST.get_or_init(|| available_parallelism().map_or(0, usize::from) - 1);
        let text = format!(
            "site = 1\nworker = 1\ndirectory = \".\"\nflows = 4096\nhold_packets = 256\n[dpdk]\n\
             device = \"{device}\"\nhuge_pages = false\nidle = \"{idle}\"\nlcore = {lcore}\n"
        );
        std::fs::write(&config, text).unwrap();
        // The worker inherits where this thread may run.
        let own = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let mut other = CpuSet::new();
        other.set(*lcore).unwrap();
        sched_setaffinity(Pid::from_raw(0), &other).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_limosa"))
            .args(["run", "worker", "--with-parent", "--config"])
            .arg(&config)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        sched_setaffinity(Pid::from_raw(0), &own).unwrap();
        let control = directory.join("worker-1.control");
        let agent = (0..1_000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            UnixStream::connect(&control).ok()
        });
        let agent = agent.expect("the worker listens");
        agent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut worker = Self { child, agent, decoder: FrameDecoder::new() };
        let hello = worker.ask(&Request::Hello { version: VERSION, site: SITE });
        assert!(matches!(hello, Event::Hello { version: VERSION, .. }));
        worker
    }

    pub fn ask(&mut self, request: &Request) -> Event {
        self.agent.write_all(&encode(request).unwrap()).unwrap();
        loop {
            if let Some(event) = self.decoder.next().unwrap() {
                return event;
            }
            let mut bytes = [0; 4096];
            let len = self.agent.read(&mut bytes).unwrap();
            assert!(len > 0, "the worker hung up");
            self.decoder.push(&bytes[..len]);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn services() -> Request {
    let nat = NatSpec {
        clients: vec!["100.64.0.0/24".parse().unwrap()],
        pool: vec!["198.51.100.0/28".parse().unwrap()],
        ports_per_subscriber: 256,
        first_port: 1024,
        port_key: 3,
    };
    let (service, timeouts) = (ServiceId::new(1).unwrap(), Timeouts::default());
    Request::Services(vec![ServiceSpec { service, function: Function::Nat44(nat), timeouts }])
}

/// A network namespace of this thread's own, with interfaces `worker` and `switch`; the latter opened. None when not root.
pub fn pair() -> Option<(DpdkLink, Pool)> {
    if !nix::unistd::geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNET).is_err() {
        return None;
    }
    assert!(ip("link add worker type veth peer name switch"));
    assert!(ip("link set worker up") && ip("link set switch up"));
    let memory = Memory::Ordinary { megabytes: 128 };
    LAST.get_or_init(|| available_parallelism().map_or(0, usize::from) - 1);
    let eal = Eal::start(&EalConfig { lcore: Some(0), memory, pci: None, extra: Vec::new() }).unwrap();
    let config = DpdkConfig {
        device: Device::Virtual("net_af_packet0,iface=switch".to_owned()),
        lcore: None,
        huge_pages: false,
        memory_mb: 128,
        idle: Idle::Spin,
        mtu: 1500,
        buffers: 8_192,
        rx_descriptors: 512,
        tx_descriptors: 512,
        eal: Vec::new(),
    };
    let opened = DpdkLink::open(&eal, &config).unwrap();
    let _ = EAL.set(eal);
    Some(opened)
}

/// Asked before this thread is bound to one processor.
static LAST: OnceLock<usize> = OnceLock::new();
static EAL: OnceLock<Eal> = OnceLock::new();

/// Another device of the poller, with the same buffers.
pub fn open_beside(device: &str, pool: Pool) -> DpdkLink {
    let config = PortConfig {
        device: dpdk::Device::Virtual(device.to_owned()),
        mtu: 1500,
        rx_descriptors: 512,
        tx_descriptors: 512,
    };
    let eal = EAL.get().expect("the pair is there");
    DpdkLink::over(Port::open(eal, pool, &config).unwrap(), pool, Idle::Spin)
}
