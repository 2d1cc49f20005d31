//! The embedded switch: a small OpenFlow 1.4 switch in one thread, for places without Open vSwitch.
//!
//! Frames come and go over `SOCK_SEQPACKET` Unix sockets (clients, the world, workers) and VXLAN over UDP (peer
//! sites). Controllers connect to a Unix socket or to TCP; rules stay when they go.
//!
//! # Order
//!
//! One thread reads a frame and takes it through the tables and into the output queue before it reads the
//! next, and executes controllers' messages in between. So frames of one input keep their order on each
//! output, and once a change is answered by a barrier, no frame that was read before it can leave behind a
//! packet-out that comes after it.

mod control;
pub mod packet;
pub mod pipeline;
mod ports;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use flow::socket::{Kept, LOOK_INTERVAL, Listening};
use flow::{Micros, SiteId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use socket2::{Domain, Socket, Type};

use crate::core::rules::PortNo;
use control::{Connection, Roles};
use packet::Packet;
use pipeline::Pipeline;
use ports::{Port, Ports, Received};

/// Frames that one port may send at once before the others have their turn.
const FRAMES_PER_TURN: usize = 32;
/// How often the stop flag is looked at when nothing happens.
const STOP_POLL_MS: u16 = 20;
/// Connections of controllers at one time; see [`Switch::accept`] for more.
const CONTROLLERS_MAX: usize = 16;
/// How long a controller may take to say hello. The agent does at once, and 5 s is long even for a machine that swaps.
const HELLO_BOUND: Micros = Micros(5_000_000);
/// How long a controller that said hello may be silent before it gives way to another when there is no room. The agent
/// says something twice a second.
const SILENCE_BOUND: Micros = Micros(5_000_000);
/// A path that is lost is complained about again after so many looks: once a minute.
const COMPLAIN_EVERY: u32 = 60;
/// Between two complaints about too many controllers: whoever connects again and again is not to fill the log.
const COMPLAINT_INTERVAL: Micros = Micros(60_000_000);
/// Frames that wait for one port before more are dropped, by default: about 20 ms of small frames.
pub const QUEUE_FRAMES: usize = 16_384;

/// What to run.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// The site: the datapath id that controllers see.
    pub site: SiteId,
    /// The name that controllers see.
    pub name: String,
    /// Path of the Unix socket that controllers connect to.
    pub control: PathBuf,
    /// Also listen here, if given. There is no authentication: loopback or a trusted network only.
    pub control_tcp: Option<SocketAddr>,
    /// The ports.
    pub ports: Vec<PortConfig>,
    /// Frames that wait for one port before more are dropped; [`QUEUE_FRAMES`] if in doubt.
    pub queue_frames: usize,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its number.
    pub number: PortNo,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// What it is.
    pub kind: PortKind,
}

/// What a port is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A `SOCK_SEQPACKET` Unix socket that the switch listens on, a frame per message. One peer at a time; a
    /// new one replaces the old.
    Socket {
        /// Its path; a socket that is there and at which nobody listens is replaced.
        path: PathBuf,
    },
    /// VXLAN over UDP to one peer site.
    Tunnel {
        /// Where to receive.
        local: SocketAddr,
        /// Where to send. Frames are accepted from this IP address, from any UDP port.
        remote: SocketAddr,
    },
}

/// Why the switch does not run.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// Two ports have one number, or a number is out of range.
    #[error("port number {0} is taken, zero or reserved")]
    PortNumber(PortNo),
    /// A socket cannot be opened.
    #[error("cannot listen on {at}: {source}")]
    Listen {
        /// Path or address.
        at: String,
        /// Why.
        source: io::Error,
    },
    /// Waiting failed; nothing can go on.
    #[error("poll failed: {0}")]
    Poll(Errno),
}

/// The tunnels that a switch is to have, for whoever changes them while it runs. What is set last counts.
#[derive(Debug, Default)]
pub struct Tunnels(Mutex<Option<Vec<PortConfig>>>);

impl Tunnels {
    /// Has these and no others from now on, within some 20 ms. Ports that are no tunnels are as at the start.
    pub fn set(&self, ports: &[PortConfig]) {
        let is_tunnel = |port: &&PortConfig| matches!(port.kind, PortKind::Tunnel { .. });
        *self.lock() = Some(ports.iter().filter(is_tunnel).cloned().collect());
    }

    fn take(&self) -> Option<Vec<PortConfig>> {
        self.lock().take()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Vec<PortConfig>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a switch until `stop` is set, which it sees within some 20 ms. `tunnels` changes those of the configuration.
///
/// # Errors
/// [`SwitchError`] when it cannot start. Trouble with one peer or controller later ends that connection only.
pub fn run(config: &SwitchConfig, tunnels: &Tunnels, stop: &AtomicBool) -> Result<(), SwitchError> {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    let now = Instant::now;
    let started = now();
    let mut switch = Switch::new(config)?;
    tracing::info!(name = config.name, ports = config.ports.len(), "switch runs");
    while !stop.load(Ordering::Relaxed) {
        let since = u64::try_from(now().duration_since(started).as_micros()).unwrap_or(u64::MAX);
        if let Some(tunnels) = tunnels.take() {
            switch.datapath.ports.set_tunnels(&tunnels);
        }
        switch.turn(Micros(since))?;
    }
    Ok(())
}

/// A listening Unix socket in place of one that an earlier run left. Anything else that is there stays, and listening fails.
fn listen_unix(path: &Path, bind: flow::socket::Bind<Socket>) -> Result<Listening<Socket>, SwitchError> {
    let failed = |source| SwitchError::Listen { at: path.display().to_string(), source };
    Listening::open(path, bind).map_err(failed)
}

fn bind_stream(path: &Path) -> io::Result<Socket> {
    bind_unix(path, Type::STREAM)
}

fn bind_packets(path: &Path) -> io::Result<Socket> {
    bind_unix(path, Type::SEQPACKET)
}

fn bind_unix(path: &Path, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, kind, None)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Binds a socket again whose path was taken away, and says so.
fn keep(listening: &mut Listening<Socket>) {
    let path = listening.path().to_owned();
    match listening.keep() {
        Kept::Own => {}
        Kept::Again => {
            tracing::warn!(path = %path.display(), "the socket was taken away, and is bound again");
        }
        Kept::Lost(error, times) if times % COMPLAIN_EVERY == 1 => {
            tracing::error!(path = %path.display(), %error, "the socket was taken away: nobody can connect");
        }
        Kept::Lost(..) => {}
    }
}

fn listen_tcp(address: SocketAddr) -> Result<Socket, SwitchError> {
    let open = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(16)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    open().map_err(|source| SwitchError::Listen { at: address.to_string(), source })
}

/// Everything that the one thread works on.
struct Switch {
    datapath: Datapath,
    control: Listening<Socket>,
    control_tcp: Option<Socket>,
    controllers: Vec<Connection>,
    /// Number of the next controller.
    next: u64,
    packet: Packet,
    now: Micros,
    /// When the paths of the sockets are looked at next.
    look_at: Micros,
    /// When too many controllers are complained about again.
    complain_at: Micros,
}

/// What controllers change and ask for.
struct Datapath {
    name: String,
    id: u64,
    pipeline: Pipeline,
    ports: Ports,
    roles: Roles,
}

/// What a file descriptor that is ready belongs to.
#[derive(Clone, Copy)]
enum Ready {
    /// Of controllers, by TCP or not.
    Listener(bool),
    Controller(usize, PollFlags),
    PortListener(usize),
    Port(usize, PollFlags),
}

impl Switch {
    fn new(config: &SwitchConfig) -> Result<Self, SwitchError> {
        // What the system refuses to a second process comes first, before any path is touched.
        let control_tcp = config.control_tcp.map(listen_tcp).transpose()?;
        let ports = Ports::open(&config.ports, config.queue_frames)?;
        let control = listen_unix(&config.control, bind_stream)?;
        let id = 0x4c6d_0000_0000_0000 | u64::from(config.site.0);
        let (pipeline, roles) = (Pipeline::default(), Roles::default());
        let datapath = Datapath { name: config.name.clone(), id, pipeline, ports, roles };
        Ok(Self {
            datapath,
            control,
            control_tcp,
            controllers: Vec::new(),
            next: 0,
            packet: Packet::default(),
            now: Micros(0),
            look_at: LOOK_INTERVAL,
            complain_at: Micros(0),
        })
    }

    /// Waits for something and does all of it once.
    fn turn(&mut self, now: Micros) -> Result<(), SwitchError> {
        self.now = now;
        self.datapath.pipeline.set_time(now);
        for ready in self.wait()? {
            match ready {
                Ready::Listener(by_tcp) => self.accept(by_tcp),
                Ready::PortListener(at) => self.datapath.ports.at(at).accept(),
                Ready::Port(at, events) => self.port(at, events),
                Ready::Controller(at, events) => {
                    self.controllers[at].turn(events, now, &mut self.datapath, &mut self.packet);
                }
            }
        }
        for controller in &mut self.controllers {
            controller.hear_of_roles(&self.datapath.roles);
            controller.leave_if_no_hello(now);
        }
        self.controllers.retain(Connection::is_open);
        if now >= self.look_at {
            self.look_at = now.plus(LOOK_INTERVAL);
            keep(&mut self.control);
            self.datapath.ports.listeners().for_each(keep);
            self.datapath.ports.open_closed();
        }
        Ok(())
    }

    fn wait(&self) -> Result<Vec<Ready>, SwitchError> {
        let sources: Vec<(Ready, BorrowedFd<'_>, PollFlags)> = self.sources().collect();
        let mut fds: Vec<_> = sources.iter().map(|&(_, fd, events)| PollFd::new(fd, events)).collect();
        match nix::poll::poll(&mut fds, PollTimeout::from(STOP_POLL_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(SwitchError::Poll(errno)),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !happened(fd).is_empty());
        Ok(ready
            .map(|((ready, ..), fd)| match *ready {
                Ready::Controller(at, _) => Ready::Controller(at, happened(fd)),
                Ready::Port(at, _) => Ready::Port(at, happened(fd)),
                other @ (Ready::Listener(_) | Ready::PortListener(_)) => other,
            })
            .collect())
    }

    fn sources(&self) -> impl Iterator<Item = (Ready, BorrowedFd<'_>, PollFlags)> {
        let wanted =
            |writes: bool| if writes { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let listeners = [(false, Some(self.control.socket())), (true, self.control_tcp.as_ref())];
        let listeners = listeners.into_iter().filter_map(|(by_tcp, socket)| {
            Some((Ready::Listener(by_tcp), socket?.as_fd(), PollFlags::POLLIN))
        });
        let controllers = self.controllers.iter().enumerate().map(move |(at, connection)| {
            let mut events = wanted(connection.has_output());
            events.set(PollFlags::POLLIN, connection.is_heard());
            (Ready::Controller(at, events), connection.fd(), events)
        });
        let ports = self.datapath.ports.iter().enumerate().flat_map(move |(at, port)| {
            let listener = port.listener().map(|fd| (Ready::PortListener(at), fd, PollFlags::POLLIN));
            let events = wanted(port.has_queue());
            let data = port.data().map(|fd| (Ready::Port(at, events), fd, events));
            listener.into_iter().chain(data)
        });
        // Newcomers are last: who has said something meanwhile is no silent one that gives way to them.
        controllers.chain(ports).chain(listeners)
    }

    /// Takes up a controller. If there is no room, who has been silent longest gives way: without a hello first, then of
    /// those that are silent for too long. If all are well the new one is turned away.
    fn accept(&mut self, by_tcp: bool) {
        let listener = if by_tcp { self.control_tcp.as_ref() } else { Some(self.control.socket()) };
        let socket = match listener.map(Socket::accept) {
            Some(Ok((socket, _))) => socket,
            Some(Err(error)) => return tracing::debug!(%error, "accept failed"),
            None => return,
        };
        let open = self.controllers.iter().filter(|controller| controller.is_open()).count();
        if open >= CONTROLLERS_MAX {
            let made_room = self.make_room();
            if self.now >= self.complain_at {
                self.complain_at = self.now.plus(COMPLAINT_INTERVAL);
                let max = CONTROLLERS_MAX;
                tracing::warn!(
                    max,
                    made_room,
                    "too many controllers: silent ones make room, else new ones are turned away"
                );
            }
            if !made_room {
                return;
            }
        }
        self.controllers.extend(Connection::new(self.next, socket, self.now));
        self.next += 1;
    }

    fn make_room(&mut self) -> bool {
        let now = self.now;
        let silent = self.controllers.iter_mut().filter_map(|c| Some((c.silence_rank(now)?, c)));
        let Some((_, longest)) = silent.min_by_key(|(rank, _)| *rank) else { return false };
        longest.close();
        true
    }

    fn port(&mut self, at: usize, events: PollFlags) {
        if events.contains(PollFlags::POLLOUT) {
            self.datapath.ports.at(at).flush();
        }
        if !events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        for _ in 0..FRAMES_PER_TURN {
            match self.datapath.ports.at(at).receive(&mut self.packet) {
                Received::Frame { tunnel_id } => self.datapath.forward(at, tunnel_id, &mut self.packet),
                Received::Skipped => {}
                Received::Nothing => return,
            }
        }
    }
}

impl Datapath {
    fn forward(&mut self, at: usize, tunnel_id: u64, packet: &mut Packet) {
        let in_port = self.ports.at(at).number();
        let ports = &mut self.ports;
        let mut out = |port, packet: &mut Packet, key| ports.send(port, packet, key);
        self.pipeline.process(packet, in_port, tunnel_id, &mut out);
    }

    fn ports_of(&self, number: PortNo) -> impl Iterator<Item = &Port> {
        self.ports.iter().filter(move |port| number == PortNo::ANY || number == port.number())
    }
}
