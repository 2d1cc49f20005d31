//! The embedded switch as it runs, and the sockets of its ports: what several tests share.
#![allow(dead_code, reason = "each user of these helpers uses some")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::Read;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use flow::{SiteId, WorkerId};
use socket2::{Domain, SockAddr, Socket, Type};
use switchctl::softswitch::{self, PortConfig, PortKind, QUEUE_FRAMES, SwitchConfig, Tunnels};
use switchctl::{Ports, SwitchAddr};

const OWN: SiteId = SiteId(1);
const PEER: SiteId = SiteId(2);

/// A switch in a thread of its own, with its sockets in a directory of its own.
pub(crate) struct Running {
    directory: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Changes its tunnels.
    pub(crate) tunnels: Arc<Tunnels>,
    /// The peer site's end of the tunnel.
    pub(crate) peer: UdpSocket,
    /// Where the switch receives from it.
    pub(crate) tunnel: std::net::SocketAddr,
}

impl Running {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // A port that was free a moment ago.
        let tunnel = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (stop, tunnels) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut running = Self { directory, stop, thread: None, tunnels, peer, tunnel };
        running.run();
        running
    }

    pub(crate) fn run(&mut self) {
        let config = self.config();
        self.stop.store(false, Ordering::Relaxed);
        let (tunnels, stop) = (Arc::clone(&self.tunnels), Arc::clone(&self.stop));
        self.thread = Some(std::thread::spawn(move || softswitch::run(&config, &tunnels, &stop).unwrap()));
    }

    pub(crate) fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn config(&self) -> SwitchConfig {
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

    pub(crate) fn address(&self) -> SwitchAddr {
        SwitchAddr::Unix(self.path("control"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Connects to a port, waiting until the switch listens.
pub(crate) fn attach(path: &Path) -> Socket {
    for _ in 0..1500 {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        if socket.connect(&SockAddr::unix(path).unwrap()).is_ok() {
            socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            return socket;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens at {}", path.display());
}

pub(crate) fn receive(socket: &Socket) -> Vec<u8> {
    let mut buffer = vec![0; 10_000];
    let len = (&*socket).read(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

/// A UDP packet of client 100.64.0.1 with a number in it.
pub(crate) fn client_frame(number: u32) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend_from_slice(&[
        0x08, 0x00, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 100, 64, 0, 1, 192, 0, 2, 1,
    ]);
    frame.extend_from_slice(&[1, 1, 0, 53, 0, 12, 0, 0]);
    frame.extend_from_slice(&number.to_be_bytes());
    frame
}
