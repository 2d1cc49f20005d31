//! Emulates the wide area network between sites: UDP links with delay, jitter, rate, queue and loss.
//!
//! One thread, one socket per address. Each direction is a link: what arrives at `listen` goes to `to`, sent from
//! `from`. For a pair of endpoints A and B take two addresses: A sends to `s_a`, B to `s_b`; the link A to B
//! listens at `s_a` and sends from `s_b`, the link back listens at `s_b` and sends from `s_a`. So each end sees
//! one peer address in both directions, as QUIC needs it.
//!
//! A thread that a busy machine keeps from running is late with everything, but by the same: packets count from when the kernel had
//! them, and of what is due the oldest leaves first, whatever its link.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::SockaddrStorage;
use placement::core::delay::{LIGHT_KM_PER_MS, great_circle_km};
use serde::Serialize;

use super::batch::{self, BATCH_LEN, Inbox};
use super::clock::Clock;
use super::line::{Line, LineSpec};

/// How much longer real paths take than light on the great circle.
const DETOUR: f64 = 2.0;
/// How often the stop flag is looked at when nothing happens.
const STOP_POLL: Duration = Duration::from_millis(50);
/// Packets of different links that are due within so much of one another may leave in any order.
const RELEASE_STEP: u64 = 500_000;
/// Batches taken from one socket before the others, and what is due, have their turn.
const BATCHES_PER_TURN: usize = 4;

/// One direction of a link.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkSpec {
    /// Where the sender sends to.
    pub listen: SocketAddr,
    /// The local address that packets are sent on from: the peer that the receiver sees.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// One-way delay.
    pub delay: Duration,
    /// Added to the delay, uniform from zero to this. Packets never pass one another.
    pub jitter: Duration,
    /// Rate in bytes per second; 0 for no limit.
    pub rate_bytes_per_s: u64,
    /// Bytes that may wait for the rate; more are dropped.
    pub queue_bytes_max: u64,
    /// Share of packets lost, `0..=1`.
    pub loss: f64,
}

impl LinkSpec {
    /// A link with a constant delay, and neither limit nor loss.
    #[must_use]
    pub fn new(listen: SocketAddr, from: SocketAddr, to: SocketAddr, delay: Duration) -> Self {
        let jitter = Duration::ZERO;
        Self { listen, from, to, delay, jitter, rate_bytes_per_s: 0, queue_bytes_max: u64::MAX, loss: 0.0 }
    }

    fn line(&self) -> LineSpec {
        let Self { delay, jitter, rate_bytes_per_s, queue_bytes_max, loss, .. } = *self;
        LineSpec { delay, jitter, rate_bytes_per_s, queue_bytes_max, loss }
    }
}

/// What went over a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkStats {
    /// Packets delivered.
    pub packets: u64,
    /// Bytes delivered.
    pub bytes: u64,
    /// Packets dropped: by a full queue, by loss, or because the link was cut.
    pub dropped: u64,
    /// Most bytes that waited for the rate.
    pub queue_bytes_max: u64,
}

/// One-way delay between two places, each latitude and longitude in degrees: twice as long as light takes on the
/// great circle, about what good paths through fibre take.
#[must_use]
pub fn great_circle_delay(a: (f64, f64), b: (f64, f64)) -> Duration {
    let ms = great_circle_km(a, b) / LIGHT_KM_PER_MS * DETOUR;
    Duration::try_from_secs_f64(ms / 1_000.0).unwrap_or_default()
}

/// A running emulator; it ends when this is dropped.
#[derive(Debug)]
pub struct Wan {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    links: Vec<SharedLink>,
}

#[derive(Debug)]
struct SharedLink {
    up: AtomicBool,
    /// Nanoseconds on top of what was specified: delay and jitter.
    extra: (AtomicU64, AtomicU64),
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    queue_bytes_max: AtomicU64,
}

impl Wan {
    /// Opens the sockets and starts the thread. Links are known by their place in `links`.
    ///
    /// # Errors
    /// Two links listen at one address, or an address cannot be bound.
    pub fn start(links: Vec<LinkSpec>) -> Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            links: links.iter().map(|_| SharedLink::default()).collect(),
        });
        let emulator = Emulator::new(links, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("wan".into()).spawn(move || emulator.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Heals or cuts links. What is on its way when a link is cut is lost. Unknown places are ignored.
    pub fn set_up(&self, links: &[usize], up: bool) {
        for link in links.iter().filter_map(|&at| self.shared.links.get(at)) {
            link.up.store(up, Relaxed);
        }
    }

    /// Makes links slower than they were specified: so much more delay and jitter; none for what they were. Packets never pass
    /// one another. Unknown places are ignored.
    pub fn slow_down(&self, links: &[usize], delay: Duration, jitter: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4);
        for link in links.iter().filter_map(|&at| self.shared.links.get(at)) {
            link.extra.0.store(nanos(delay), Relaxed);
            link.extra.1.store(nanos(jitter), Relaxed);
        }
    }

    /// Counters of all links, in their order.
    #[must_use]
    pub fn stats(&self) -> Vec<LinkStats> {
        self.shared.links.iter().map(SharedLink::stats).collect()
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Default for SharedLink {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        let up = AtomicBool::new(true);
        Self {
            up,
            extra: (zero(), zero()),
            packets: zero(),
            bytes: zero(),
            dropped: zero(),
            queue_bytes_max: zero(),
        }
    }
}

impl SharedLink {
    fn stats(&self) -> LinkStats {
        LinkStats {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            queue_bytes_max: self.queue_bytes_max.load(Relaxed),
        }
    }
}

/// One direction while it runs. Times are nanoseconds.
struct Link {
    from: usize,
    to: SockaddrStorage,
    line: Line,
}

struct Emulator {
    shared: Arc<Shared>,
    sockets: Vec<UdpSocket>,
    links: Vec<Link>,
    /// The link that listens at each socket.
    listeners: Vec<Option<usize>>,
    clock: Clock,
    inbox: Inbox,
    spare: Vec<Vec<u8>>,
}

impl Emulator {
    fn new(specs: Vec<LinkSpec>, shared: Arc<Shared>) -> Result<Self> {
        let mut addresses: Vec<SocketAddr> = specs.iter().flat_map(|spec| [spec.listen, spec.from]).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let sockets = addresses.iter().map(|&address| open(address)).collect::<Result<Vec<_>>>()?;
        let place = |address: &SocketAddr| addresses.binary_search(address).unwrap_or_default();
        let mut listeners = vec![None; sockets.len()];
        let mut links = Vec::with_capacity(specs.len());
        for (at, spec) in specs.into_iter().enumerate() {
            let (listen, from) = (place(&spec.listen), place(&spec.from));
            ensure!(listeners[listen].is_none(), "two links listen at {}; give each its own", spec.listen);
            listeners[listen] = Some(at);
            links.push(Link::new(&spec, from, at as u64));
        }
        let (clock, inbox) = (Clock::start(), Inbox::new());
        Ok(Self { shared, sockets, links, listeners, clock, inbox, spare: Vec::new() })
    }

    fn run(mut self) {
        let mut ready = Vec::new();
        while !self.shared.stop.load(Relaxed) {
            if let Err(error) = self.wait(&mut ready) {
                return tracing::error!(%error, "the WAN emulator cannot wait and ends");
            }
            for at in ready.drain(..) {
                self.receive(at);
            }
            self.release();
        }
    }

    /// Waits for a packet or for the next release; the sockets that have packets.
    fn wait(&self, ready: &mut Vec<usize>) -> Result<(), nix::errno::Errno> {
        let next = self.links.iter().filter_map(Link::next_release).min().unwrap_or(u64::MAX);
        let timeout = Duration::from_nanos(next.saturating_sub(self.clock.nanos())).min(STOP_POLL);
        let fds = self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        let mut fds: Vec<_> = fds.collect();
        batch::wait(&mut fds, timeout)?;
        ready.extend(fds.iter().enumerate().filter(|(_, fd)| batch::is_readable(fd)).map(|(at, _)| at));
        Ok(())
    }

    fn receive(&mut self, socket: usize) {
        for _ in 0..BATCHES_PER_TURN {
            let count = self.inbox.receive(&self.sockets[socket]).unwrap_or(0);
            if let Some(at) = self.listeners[socket] {
                for datagram in 0..count {
                    let arrival = self.inbox.arrival(datagram);
                    let came = arrival.map_or_else(|| self.clock.nanos(), |at| self.clock.nanos_at(at));
                    let bytes = self.inbox.datagram(datagram);
                    self.links[at].accept(bytes, came, &self.shared.links[at], &mut self.spare);
                }
            }
            if count < BATCH_LEN {
                return;
            }
        }
    }

    fn release(&mut self) {
        let now = self.clock.nanos();
        loop {
            let first = self.links.iter().filter_map(Link::next_release).min();
            let Some(first) = first.filter(|first| *first <= now) else { return };
            let until = now.min(first + RELEASE_STEP);
            let mut released = false;
            for (link, shared) in self.links.iter_mut().zip(&self.shared.links) {
                released |= link.release(&self.sockets[link.from], until, shared, &mut self.spare);
            }
            if !released {
                return; // A socket is full; the next turn goes on.
            }
        }
    }
}

impl Link {
    fn new(spec: &LinkSpec, from: usize, seed: u64) -> Self {
        Self { to: spec.to.into(), from, line: Line::new(spec.line(), seed) }
    }

    fn next_release(&self) -> Option<u64> {
        self.line.next_release()
    }

    fn accept(&mut self, bytes: &[u8], now: u64, shared: &SharedLink, spare: &mut Vec<Vec<u8>>) {
        let up = shared.up.load(Relaxed);
        self.line.slow_down(shared.extra.0.load(Relaxed), shared.extra.1.load(Relaxed));
        match up.then(|| self.line.accept(bytes, now, spare)).flatten() {
            Some(backlog) => drop(shared.queue_bytes_max.fetch_max(backlog, Relaxed)),
            None => drop(shared.dropped.fetch_add(1, Relaxed)),
        }
    }

    /// Sends what is due; whether anything was.
    fn release(
        &mut self,
        socket: &UdpSocket,
        now: u64,
        shared: &SharedLink,
        spare: &mut Vec<Vec<u8>>,
    ) -> bool {
        let mut any = false;
        loop {
            let due = self.line.due(now).min(BATCH_LEN);
            if due == 0 {
                return any;
            }
            let sent = if shared.up.load(Relaxed) {
                batch::send(socket, self.line.packets().take(due), Some(self.to))
            } else {
                Err(nix::errno::Errno::ENETDOWN)
            };
            let (count, delivered) = match sent {
                Ok(0) => return any, // The socket is full; the next turn goes on.
                Ok(sent) => (sent, true),
                // The first one cannot be sent, the others may.
                Err(_) => (1, false),
            };
            any = true;
            for bytes in self.line.drain(count) {
                shared.released(bytes.len(), delivered);
                spare.push(bytes);
            }
        }
    }
}

impl SharedLink {
    fn released(&self, len: usize, delivered: bool) {
        if delivered {
            self.packets.fetch_add(1, Relaxed);
            self.bytes.fetch_add(len as u64, Relaxed);
        } else {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

fn open(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot bind {address} for the WAN"))?;
    socket.set_nonblocking(true)?;
    batch::grow_buffers(&socket);
    batch::timestamped(&socket)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender and a receiver with one emulated link between them.
    struct Pair {
        wan: Wan,
        a: UdpSocket,
        b: UdpSocket,
        entry: SocketAddr,
        clock: Clock,
    }

    fn free_address() -> SocketAddr {
        UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap()
    }

    fn pair(change: impl Fn(&mut LinkSpec)) -> Pair {
        let endpoint = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (a, b) = (endpoint(), endpoint());
        b.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        a.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let (s_a, s_b) = (free_address(), free_address());
        let delay = Duration::from_millis(20);
        let mut there = LinkSpec::new(s_a, s_b, b.local_addr().unwrap(), delay);
        change(&mut there);
        let back = LinkSpec::new(s_b, s_a, a.local_addr().unwrap(), delay);
        let wan = Wan::start(vec![there, back]).unwrap();
        Pair { wan, a, b, entry: s_a, clock: Clock::start() }
    }

    impl Pair {
        fn send(&self, number: u32, len: usize) {
            let mut bytes = vec![0; len.max(4)];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            self.a.send_to(&bytes, self.entry).unwrap();
        }

        fn receive(&self) -> Option<u32> {
            let mut bytes = [0; 2048];
            let (len, _) = self.b.recv_from(&mut bytes).ok()?;
            assert!(len >= 4);
            Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        }
    }

    #[test]
    fn delay_is_at_least_the_base_and_peers_are_symmetrical() {
        let pair = pair(|_| {});
        let start = pair.clock.micros();
        pair.send(1, 100);
        let mut bytes = [0; 100];
        let (_, peer) = pair.b.recv_from(&mut bytes).unwrap();
        let there = pair.clock.micros() - start;
        assert!((20_000..60_000).contains(&there), "{there} us");
        pair.b.send_to(&bytes, peer).unwrap();
        let (_, peer) = pair.a.recv_from(&mut bytes).unwrap();
        assert_eq!(peer, pair.entry);
        assert!(pair.clock.micros() - start >= 40_000);
        assert_eq!(pair.wan.stats()[0].packets, 1);
    }

    #[test]
    fn of_what_is_due_the_oldest_leaves_first_although_the_emulator_was_late() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let to = receiver.local_addr().unwrap();
        // The second is known by the greater address or not: so both are tried.
        for delays in [[30, 1], [1, 30]] {
            let link = |ms| LinkSpec::new(free_address(), free_address(), to, Duration::from_millis(ms));
            let links = delays.map(link);
            let entries = [links[0].listen, links[1].listen];
            let shared = Shared {
                stop: AtomicBool::new(false),
                links: links.iter().map(|_| SharedLink::default()).collect(),
            };
            let mut emulator = Emulator::new(links.to_vec(), Arc::new(shared)).unwrap();
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            for (entry, delay) in entries.iter().zip(delays) {
                sender.send_to(&[delay as u8], entry).unwrap();
            }
            std::thread::sleep(Duration::from_millis(60));
            (0..emulator.sockets.len()).for_each(|socket| emulator.receive(socket));
            emulator.release();
            let got: Vec<u8> = (0..2)
                .map(|_| {
                    let mut byte = [0];
                    receiver.recv_from(&mut byte).unwrap();
                    byte[0]
                })
                .collect();
            assert_eq!(got, [1, 30]);
        }
    }

    #[test]
    fn jitter_keeps_order() {
        let pair = pair(|link| link.jitter = Duration::from_millis(10));
        for number in 0..200 {
            pair.send(number, 64);
            std::thread::sleep(Duration::from_micros(50));
        }
        let got: Vec<u32> = std::iter::from_fn(|| pair.receive()).collect();
        assert_eq!(got, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn rate_limits_and_a_full_queue_drops_the_tail() {
        let pair = pair(|link| (link.rate_bytes_per_s, link.queue_bytes_max) = (100_000, 10_000));
        let start = pair.clock.micros();
        for number in 0..30 {
            pair.send(number, 1_000);
        }
        let mut last = 0;
        let got: Vec<u32> = std::iter::from_fn(|| {
            let number = pair.receive()?;
            last = pair.clock.micros() - start;
            Some(number)
        })
        .collect();
        assert!((9..=12).contains(&got.len()), "{}", got.len());
        assert!(last >= 20_000 + got.len() as u64 * 10_000 - 1_000, "{last} us");
        assert!(got.windows(2).all(|pair| pair[0] < pair[1]));
        let stats = pair.wan.stats()[0];
        assert_eq!(stats.dropped, 30 - got.len() as u64);
        assert!((9_000..=10_000).contains(&stats.queue_bytes_max));
    }

    #[test]
    fn a_cut_link_loses_all_and_a_healed_one_nothing() {
        let pair = pair(|_| {});
        pair.wan.set_up(&[0], false);
        pair.send(1, 64);
        assert_eq!(pair.receive(), None);
        pair.wan.set_up(&[0], true);
        pair.send(2, 64);
        assert_eq!(pair.receive(), Some(2));
        assert_eq!(pair.wan.stats()[0].dropped, 1);
    }

    #[test]
    fn amsterdam_to_singapore_takes_seventy_milliseconds() {
        let delay = great_circle_delay((52.37, 4.90), (1.35, 103.82));
        assert!((68..73).contains(&delay.as_millis()), "{delay:?}");
    }
}
