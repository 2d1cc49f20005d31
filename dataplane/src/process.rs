//! The worker as a process: one thread, one link to the switch, one agent at a time, one clock.
//!
//! It goes on forwarding without an agent, and waits for a switch that is gone. With a slow agent exports
//! pause: nothing is queued without bound.

use std::hash::BuildHasher;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use flow::socket::{Kept, LOOK_INTERVAL, Listening};
use flow::{Micros, SiteId, WorkerId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};

use crate::control::codec::{FrameDecoder, encode};
use crate::control::{Event, Request, VERSION};
use crate::dpdk::{DpdkConfig, DpdkError};
use crate::io::{Drops, PacketBuf, Rest, SocketLink, SwitchLink};
use crate::worker::{Output, Settings, Wait, Worker};

/// Bytes that may wait for the agent before exports pause.
const AGENT_QUEUE_LEN: usize = 2 << 20;
/// Longest time between two looks at the agent's socket under load.
const CONTROL_INTERVAL: Micros = Micros(100);
/// How long who connects may take to say hello. The agent does at once, and 5 s is long even for a machine that swaps.
const HELLO_BOUND: Micros = Micros(5_000_000);
/// Bytes within which the hello is, which takes some ten.
const HELLO_LEN_MAX: usize = 256;
/// An agent that was heard within so long is not displaced by another one. It asks for statistics twice a second.
const AGENT_SILENCE: Micros = Micros(1_500_000);
/// Connections that have not said hello yet; one more ends the oldest.
const STRANGERS_MAX: usize = 8;
/// Between two complaints about those: whoever connects again and again is not to fill the log.
const COMPLAINT_INTERVAL: Micros = Micros(60_000_000);
/// A path that is lost is complained about again after so many looks: once a minute.
const COMPLAIN_EVERY: u32 = 60;

/// How a worker reaches its switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// By the switch's `SOCK_SEQPACKET` socket.
    Socket(PathBuf),
    /// By a device that DPDK polls.
    Dpdk(DpdkConfig),
}

/// What a worker process needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Its site.
    pub site: SiteId,
    /// Its number.
    pub worker: WorkerId,
    /// Where it listens for the agent; a socket that is there and at which nobody listens is replaced.
    pub control_path: PathBuf,
    /// Its way to the switch.
    pub link: Link,
    /// Flows that fit.
    pub flow_capacity: usize,
    /// Packets that may be held, over all groups.
    pub hold_packets_max: usize,
    /// See [`crate::worker::Settings::hold_bytes_max`].
    pub hold_bytes_max: usize,
}

/// Why a worker cannot start. What happens later is survived.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The control socket.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Waiting for sockets failed.
    #[error("poll failed: {0}")]
    Poll(Errno),
    /// The device cannot be used.
    #[error(transparent)]
    Dpdk(#[from] DpdkError),
}

/// Microseconds of a monotonic clock since the process started the worker.
#[derive(Clone, Copy, Debug)]
struct Clock(std::time::Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place of this package that reads the clock")]
    fn start() -> Self {
        Self(std::time::Instant::now())
    }

    fn now(self) -> Micros {
        Micros(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// A random word: the standard library keys its hash maps from the system's source.
fn random(nonce: u64) -> u64 {
    std::hash::RandomState::new().hash_one(nonce)
}

/// Runs a worker until `stop` is set; looks at it ten times a second or more often.
///
/// # Errors
/// [`WorkerError`], at the start.
pub fn run(config: &WorkerConfig, stop: &AtomicBool) -> Result<(), WorkerError> {
    let listen = |source| WorkerError::Listen { path: config.control_path.clone(), source };
    let listener = Listening::open(&config.control_path, bind).map_err(listen)?;
    match &config.link {
        Link::Socket(path) => {
            run_over(config, listener, SocketLink::new(path.clone()), Output::default(), stop)
        }
        Link::Dpdk(dpdk) => crate::dpdk::run(config, dpdk, listener, stop),
    }
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Runs a worker over a link that is open.
pub(crate) fn run_over<L: SwitchLink>(
    config: &WorkerConfig,
    listener: Listening<UnixListener>,
    link: L,
    out: Output<L::Buf>,
    stop: &AtomicBool,
) -> Result<(), WorkerError> {
    let mut process = Process::new(config, listener, link, out);
    while !stop.load(Ordering::Relaxed) {
        process.turn()?;
    }
    Ok(())
}

/// A connected agent.
struct Agent {
    stream: UnixStream,
    decoder: FrameDecoder<Request>,
    /// What it said first, until that is handled.
    first: Option<Request>,
    queue: Vec<u8>,
    sent: usize,
    greeted: bool,
    heard_at: Micros,
}

/// Who has connected and not said hello yet.
struct Stranger {
    agent: Agent,
    came_at: Micros,
    /// Bytes of what it has said.
    heard_len: usize,
}

struct Process<L: SwitchLink> {
    clock: Clock,
    listener: Listening<UnixListener>,
    /// When the path of the listener is looked at next.
    look_at: Micros,
    /// The oldest first.
    strangers: Vec<Stranger>,
    /// When too many of them, or what one of them said, are complained about again.
    complain_at: Micros,
    agent: Option<Agent>,
    /// Agent or listener are ready, or were left with something to read.
    control_due: bool,
    control_at: Micros,
    link: L,
    idle_since: Option<Micros>,
    worker: Worker<L::Buf>,
    rx: Vec<L::Buf>,
    out: Output<L::Buf>,
}

impl<L: SwitchLink> Process<L> {
    fn new(config: &WorkerConfig, listener: Listening<UnixListener>, link: L, out: Output<L::Buf>) -> Self {
        let clock = Clock::start();
        let settings = Settings {
            site: config.site,
            worker: config.worker,
            flow_capacity: config.flow_capacity,
            hold_packets_max: config.hold_packets_max,
            hold_bytes_max: config.hold_bytes_max,
            keys: [random(0), random(1)],
            boot: random(2),
            ..Settings::default()
        };
        Self {
            clock,
            listener,
            look_at: LOOK_INTERVAL,
            strangers: Vec::new(),
            complain_at: Micros(0),
            agent: None,
            control_due: false,
            control_at: Micros(0),
            link,
            idle_since: None,
            worker: Worker::new(settings, clock.now()),
            rx: Vec::new(),
            out,
        }
    }

    /// One burst, one slice, and now and then the agent; rests when there is nothing to do.
    fn turn(&mut self) -> Result<(), WorkerError> {
        let now = self.clock.now();
        self.link.maintain(now);
        self.worker.note_link(self.link.is_up());
        let received = if self.worker.takes_packets(now) { self.receive() } else { 0 };
        if received > 0 {
            self.worker.burst(&mut self.rx, now, &mut self.out);
        }
        self.worker.slice(now, &mut self.out);
        self.flush();
        let to_say = self.agent.is_some() && self.worker.has_events();
        if self.control_due || to_say || now >= self.control_at {
            self.talk(now);
            self.control_at = now.plus(CONTROL_INTERVAL);
        }
        if now >= self.look_at {
            self.look_at = now.plus(LOOK_INTERVAL);
            self.keep_listening();
        }
        if received > 0 || self.control_due || self.worker.wait() == Wait::Now {
            self.idle_since = None;
            return Ok(());
        }
        self.rest(now)
    }

    fn receive(&mut self) -> usize {
        self.link.rx_burst(&mut self.rx).unwrap_or_else(|error| {
            tracing::warn!(%error, "the switch is gone");
            0
        })
    }

    fn flush(&mut self) {
        if let Err(error) = self.link.tx_burst(&mut self.out.tx) {
            tracing::warn!(%error, "the switch is gone");
        }
        self.link.recycle(&mut self.out.free);
        let drops = self.link.take_drops();
        if drops != Drops::default() {
            self.worker.note_drops(&drops);
        }
    }

    fn talk(&mut self, now: Micros) {
        self.control_due = false;
        // Who has said hello meanwhile is no stranger that gives way to the next.
        self.hear_strangers(now);
        self.accept(now);
        let Some(mut agent) = self.agent.take() else {
            // Nobody listens: what was said to the last agent is void.
            return;
        };
        let result = agent.receive(&mut self.worker, now).and_then(|()| {
            self.worker.slice(now, &mut self.out);
            agent.send(&mut self.worker)
        });
        match result {
            Ok(()) => self.agent = Some(agent),
            Err(reason) => tracing::info!(reason, "the agent is gone"),
        }
        self.flush();
    }

    /// Takes up a connection, which is a stranger's until it says hello: one that is silent displaces no agent.
    fn accept(&mut self, now: Micros) {
        if let Ok((stream, _)) = self.listener.socket().accept()
            && stream.set_nonblocking(true).is_ok()
        {
            if self.strangers.len() >= STRANGERS_MAX {
                self.strangers.remove(0);
                if self.may_complain(now) {
                    tracing::warn!(
                        max = STRANGERS_MAX,
                        "too many connections without a hello: the oldest are left"
                    );
                }
            }
            let first = None;
            let decoder = FrameDecoder::new();
            let agent =
                Agent { stream, decoder, first, queue: Vec::new(), sent: 0, greeted: false, heard_at: now };
            self.strangers.push(Stranger { agent, came_at: now, heard_len: 0 });
            // What it said with its coming is there already.
            self.control_due = true;
        }
    }

    fn may_complain(&mut self, now: Micros) -> bool {
        let may = now >= self.complain_at;
        if may {
            self.complain_at = now.plus(COMPLAINT_INTERVAL);
        }
        may
    }

    /// Makes the one that says hello the agent, in place of one that is gone or silent, and leaves those that do not.
    fn hear_strangers(&mut self, now: Micros) {
        let own = self.worker.site();
        let mut at = 0;
        while let Some(stranger) = self.strangers.get_mut(at) {
            let reason = match stranger.hear() {
                Ok(None) if now.since(stranger.came_at) <= HELLO_BOUND => {
                    at += 1;
                    continue;
                }
                Ok(None) => "it said no hello".to_owned(),
                Ok(Some(site)) if site != own => {
                    format!("it is of site {site}, and this worker of site {own}")
                }
                Ok(Some(_)) if self.agent.as_ref().is_some_and(|agent| agent.is_there(now)) => {
                    "another agent talks to this worker: a site has one".to_owned()
                }
                Ok(Some(_)) => {
                    tracing::info!("an agent has come");
                    self.worker.agent_connected();
                    self.agent = Some(self.strangers.remove(at).agent);
                    continue;
                }
                Err(reason) => reason,
            };
            self.strangers.remove(at);
            if self.may_complain(now) {
                tracing::warn!(reason, "who has connected is not taken for the agent");
            }
        }
    }

    /// Binds the control socket again if its path was taken away: nobody could find the worker.
    fn keep_listening(&mut self) {
        let kept = self.listener.keep();
        let path = self.listener.path().display();
        match kept {
            Kept::Own => {}
            Kept::Again => tracing::warn!(%path, "the control socket was taken away, and is bound again"),
            Kept::Lost(error, times) if times % COMPLAIN_EVERY == 1 => {
                tracing::error!(%path, %error, "the control socket was taken away: no agent can connect");
            }
            Kept::Lost(..) => {}
        }
    }

    fn rest(&mut self, now: Micros) -> Result<(), WorkerError> {
        let idle = now.since(*self.idle_since.get_or_insert(now));
        let most = match self.worker.wait() {
            Wait::Now => return Ok(()),
            Wait::Soon => Micros(1_000),
            Wait::Idle => Micros(100_000),
        };
        let rest = self.link.rest(idle);
        if matches!(rest, Rest::Spin) {
            self.worker.note_idle(self.clock.now().since(now));
            return Ok(());
        }
        let mut fds = vec![PollFd::new(self.listener.socket().as_fd(), PollFlags::POLLIN)];
        fds.extend(self.strangers.iter().map(|s| PollFd::new(s.agent.stream.as_fd(), PollFlags::POLLIN)));
        if let Some(agent) = &self.agent {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !self.worker.is_backlogged() && agent.queue.len() < AGENT_QUEUE_LEN);
            flags.set(PollFlags::POLLOUT, !agent.queue.is_empty());
            fds.push(PollFd::new(agent.stream.as_fd(), flags));
        }
        let control = fds.len();
        let timeout = match rest {
            Rest::Spin => Micros(0),
            Rest::Nap(span) => span.min(most),
            // The switch may have much: it waits for the agent.
            Rest::Until(..) if self.worker.is_waking() => most,
            Rest::Until(descriptor, flags) => {
                fds.push(PollFd::new(descriptor, flags));
                most
            }
        };
        let before = self.clock.now();
        match ppoll(&mut fds, Some(Duration::from_micros(timeout.0).into()), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(WorkerError::Poll(error)),
        }
        self.control_due = fds[..control].iter().any(|fd| fd.any().unwrap_or(true));
        self.worker.note_idle(self.clock.now().since(before));
        Ok(())
    }
}

impl Stranger {
    /// The site in its hello, of whatever version, once it has said it.
    fn hear(&mut self) -> Result<Option<SiteId>, String> {
        let mut bytes = [0; HELLO_LEN_MAX];
        match self.agent.stream.read(&mut bytes) {
            Ok(0) => return Err("closed".to_owned()),
            Ok(len) => {
                self.agent.decoder.push(&bytes[..len]);
                self.heard_len += len;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error.to_string()),
        }
        match self.agent.decoder.next().map_err(|error| error.to_string())? {
            Some(hello @ Request::Hello { site, .. }) => {
                self.agent.first = Some(hello);
                Ok(Some(site))
            }
            Some(_) => Err("it did not say Hello first".to_owned()),
            None if self.heard_len >= HELLO_LEN_MAX => {
                Err("it says something too long for a Hello".to_owned())
            }
            None => Ok(None),
        }
    }
}

impl Agent {
    /// Whether it was heard lately, and has not closed its end.
    fn is_there(&self, now: Micros) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let closed =
            ppoll(&mut fds, Some(Duration::ZERO.into()), None).is_ok_and(|_| fds[0].any() != Some(false));
        !closed && now.since(self.heard_at) < AGENT_SILENCE
    }

    fn receive<B: PacketBuf>(&mut self, worker: &mut Worker<B>, now: Micros) -> Result<(), String> {
        let mut bytes = [0; 65_536];
        while !worker.is_backlogged() && self.queue.len() < AGENT_QUEUE_LEN {
            let next = match self.first.take() {
                None => self.decoder.next().map_err(|error| error.to_string())?,
                first => first,
            };
            match next {
                Some(request) => {
                    let greeting = self.greet(&request);
                    if greeting.is_ok() || matches!(request, Request::Hello { .. }) {
                        worker.handle(request, now);
                    }
                    if greeting.is_err() {
                        // So that the agent can name both versions too.
                        self.send(worker)?;
                    }
                    greeting?;
                }
                None => match self.stream.read(&mut bytes) {
                    Ok(0) => return Err("closed".to_owned()),
                    Ok(len) => {
                        self.heard_at = now;
                        self.decoder.push(&bytes[..len]);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.to_string()),
                },
            }
        }
        Ok(())
    }

    fn greet(&mut self, request: &Request) -> Result<(), String> {
        let Request::Hello { version, .. } = request else {
            return if self.greeted { Ok(()) } else { Err("the agent did not say Hello first".to_owned()) };
        };
        if *version != VERSION {
            return Err(format!("the agent speaks version {version}, this worker {VERSION}"));
        }
        self.greeted = true;
        Ok(())
    }

    /// Encodes events while the queue is short, and writes what the socket takes.
    fn send<B: PacketBuf>(&mut self, worker: &mut Worker<B>) -> Result<(), String> {
        while self.queue.len() - self.sent < AGENT_QUEUE_LEN {
            let Some(event) = worker.poll_event() else { break };
            self.queue.extend(encode::<Event>(&event).map_err(|error| error.to_string())?);
        }
        while self.sent < self.queue.len() {
            match self.stream.write(&self.queue[self.sent..]) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        if self.sent == self.queue.len() {
            self.queue.clear();
            self.sent = 0;
        } else if self.sent > AGENT_QUEUE_LEN / 2 {
            self.queue.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}
