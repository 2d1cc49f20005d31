//! `limosa lab wan`: the network between the sites, a process of its own in a namespace of its own.
//!
//! It stands between the ends of cables: an IPv4 packet that comes in at one end, from that end's address or networks, and is for the
//! address of another end, leaves there after the delay, jitter and rate of the line between the two; some are lost.
//! A network may be behind several ends: what is for it leaves at the nearest.
//! Packets on one line never pass one another. Everything else is dropped; there is no ARP, so neighbours are set by hand.
//! A delay begins when the kernel had the packet, not when this process came to it, and how late packets left is counted: a WAN that
//! had no processor is no fault of what is tried.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use anyhow::Context;
use flow::Prefix;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;

use crate::demo::batch::{self, BATCH_LEN, Inbox};
use crate::demo::clock::Clock;
use crate::demo::line::{Line, LineSpec};

/// Between two writes of the counters.
const STATS_INTERVAL_US: u64 = 500_000;
/// Longest wait when nothing happens.
const WAIT_MAX: Duration = Duration::from_millis(100);
/// Batches taken from one end before the others, and what is due, have their turn.
const BATCHES_PER_TURN: usize = 4;

/// The network, as its file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Network {
    /// Where the counters are written, twice a second.
    pub(super) stats: PathBuf,
    /// The ends.
    pub(super) end: Vec<WireEnd>,
    /// The lines, one for each direction.
    pub(super) line: Vec<Wire>,
}

/// The end of a cable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireEnd {
    pub(super) interface: String,
    /// The one address that is reached by no other.
    pub(super) address: Ipv4Addr,
    /// Networks that are reached by it, and may be by others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) networks: Vec<Prefix>,
}

impl WireEnd {
    fn leads_to(&self, address: Ipv4Addr) -> bool {
        self.networks.iter().any(|network| network.contains(address.into()))
    }
}

/// One direction between two ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wire {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) delay_us: u64,
    /// Added to the delay, uniform from zero to this.
    #[serde(default)]
    pub(super) jitter_us: u64,
    /// 0 for no limit.
    #[serde(default)]
    pub(super) rate_bytes_per_s: u64,
    /// Bytes that may wait for the rate.
    #[serde(default = "no_limit")]
    pub(super) queue_bytes_max: u64,
    /// Share of packets lost.
    #[serde(default)]
    pub(super) loss: f64,
}

fn no_limit() -> u64 {
    u64::from(u32::MAX)
}

/// What the counters' file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WanStats {
    /// The longest time by which a packet left after it was due, since the start.
    pub(super) late_us_max: u64,
    pub(super) lines: Vec<WireStats>,
}

/// What went over a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireStats {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) packets: u64,
    pub(super) bytes: u64,
    /// Lost on purpose, or for want of room.
    pub(super) dropped: u64,
}

impl Wire {
    fn spec(&self) -> LineSpec {
        LineSpec {
            delay: Duration::from_micros(self.delay_us),
            jitter: Duration::from_micros(self.jitter_us),
            rate_bytes_per_s: self.rate_bytes_per_s,
            queue_bytes_max: self.queue_bytes_max,
            loss: self.loss,
        }
    }
}

/// Emulates until the process is ended.
///
/// # Errors
/// The file is of no use, or an interface cannot be opened.
pub(super) fn run(path: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let network: Network = toml::from_str(&text).with_context(|| path.display().to_string())?;
    let sockets = network.end.iter().map(|end| open(&end.interface)).collect::<anyhow::Result<Vec<_>>>()?;
    let (hub, stats) = (Hub::new(&network)?, write_beside(network.stats));
    Emulator { sockets, hub, stats, clock: Clock::start() }.run()
}

/// Where to send the counters that a thread writes into a file: a disk that is busy must hold up no packet.
fn write_beside(path: PathBuf) -> SyncSender<WanStats> {
    let (sender, receiver) = std::sync::mpsc::sync_channel::<WanStats>(1);
    std::thread::spawn(move || {
        let new = path.with_extension("new");
        for stats in receiver {
            let text = serde_json::to_string(&stats).unwrap_or_default();
            if let Err(error) = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)) {
                tracing::warn!(%error, path = %path.display(), "the WAN's counters cannot be written");
            }
        }
    });
    sender
}

/// Which packet goes where and when. Sans-IO.
struct Hub {
    ends: Vec<WireEnd>,
    by_address: BTreeMap<Ipv4Addr, usize>,
    /// From an end to an end.
    lines: BTreeMap<(usize, usize), Running>,
    late_us_max: u64,
    spare: Vec<Vec<u8>>,
}

struct Running {
    out: usize,
    delay_us: u64,
    line: Line,
    stats: WireStats,
}

/// Source and destination of an IPv4 packet in an Ethernet frame.
fn addresses(frame: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let bytes: &[u8; 8] = frame.get(26..)?.first_chunk()?;
    let [a, b, c, d, e, f, g, h] = *bytes;
    let is_ipv4 = frame.get(12..14)? == [0x08, 0x00];
    is_ipv4.then(|| (Ipv4Addr::new(a, b, c, d), Ipv4Addr::new(e, f, g, h)))
}

impl Hub {
    fn new(network: &Network) -> anyhow::Result<Self> {
        let by_address: BTreeMap<_, _> =
            network.end.iter().enumerate().map(|(at, end)| (end.address, at)).collect();
        anyhow::ensure!(
            by_address.len() == network.end.len(),
            "two ends have one address; give each its own"
        );
        let mut lines = BTreeMap::new();
        for (seed, wire) in network.line.iter().enumerate() {
            let (from, to) = (wire.from, wire.to);
            let end = |address: &Ipv4Addr| by_address.get(address).copied();
            let begin = end(&from).with_context(|| format!("a line begins at {from}, which no end has"))?;
            let out = end(&to).with_context(|| format!("a line ends at {to}, which no end has"))?;
            let stats = WireStats { from, to, packets: 0, bytes: 0, dropped: 0 };
            let (delay_us, line) = (wire.delay_us, Line::new(wire.spec(), seed as u64));
            lines.insert((begin, out), Running { out, delay_us, line, stats });
        }
        Ok(Self { ends: network.end.clone(), by_address, lines, late_us_max: 0, spare: Vec::new() })
    }

    /// Of the ends that lead to an address, the one with the shortest line from here.
    fn nearest(&self, end: usize, to: Ipv4Addr) -> Option<usize> {
        let lines = self.lines.range((end, 0)..=(end, usize::MAX)).map(|(_, running)| running);
        let leading = lines.filter(|running| self.ends[running.out].leads_to(to));
        leading.min_by_key(|running| running.delay_us).map(|running| running.out)
    }

    /// A frame came in at an end.
    fn accept(&mut self, end: usize, frame: &[u8], now: u64) {
        let Some((from, to)) = addresses(frame) else { return };
        if self.by_address.get(&from) != Some(&end) && !self.ends[end].leads_to(from) {
            return;
        }
        let out = self.by_address.get(&to).copied().or_else(|| self.nearest(end, to));
        let Some(running) = out.and_then(|out| self.lines.get_mut(&(end, out))) else { return };
        if running.line.accept(frame, now, &mut self.spare).is_none() {
            running.stats.dropped += 1;
        }
    }

    fn next_release(&self) -> Option<u64> {
        self.lines.values().filter_map(|running| running.line.next_release()).min()
    }

    /// Hands what is due to `send`, which says how many frames it took.
    fn release(&mut self, now: u64, mut send: impl FnMut(usize, &mut dyn Iterator<Item = &[u8]>) -> usize) {
        let late = self.next_release().map_or(0, |first| now.saturating_sub(first));
        self.late_us_max = self.late_us_max.max(late / 1_000);
        for running in self.lines.values_mut() {
            loop {
                let due = running.line.due(now).min(BATCH_LEN);
                if due == 0 {
                    break;
                }
                let taken = send(running.out, &mut running.line.packets().take(due)).min(due);
                if taken == 0 {
                    break; // The interface is busy; the next turn goes on.
                }
                for bytes in running.line.drain(taken) {
                    running.stats.packets += 1;
                    running.stats.bytes += bytes.len() as u64;
                    self.spare.push(bytes);
                }
            }
        }
    }

    fn stats(&self) -> WanStats {
        let lines = self.lines.values().map(|running| running.stats.clone()).collect();
        WanStats { late_us_max: self.late_us_max, lines }
    }
}

struct Emulator {
    sockets: Vec<OwnedFd>,
    hub: Hub,
    stats: SyncSender<WanStats>,
    clock: Clock,
}

impl Emulator {
    fn run(mut self) -> anyhow::Result<()> {
        let mut inbox = Inbox::new();
        let mut stats_at = 0;
        loop {
            let now = self.clock.nanos();
            let wait = self
                .hub
                .next_release()
                .map_or(WAIT_MAX, |next| Duration::from_nanos(next.saturating_sub(now)).min(WAIT_MAX));
            let mut fds: Vec<_> =
                self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
            batch::wait(&mut fds, wait)?;
            let ready: Vec<_> = fds.iter().map(batch::is_readable).collect();
            for at in (0..ready.len()).filter(|at| ready[*at]) {
                self.receive(at, &mut inbox);
            }
            let now = self.clock.nanos();
            let sockets = &self.sockets;
            // On an error the first one cannot be sent; the others may.
            self.hub.release(now, |out, frames| batch::send(&sockets[out], frames, None).unwrap_or(1));
            if now / 1_000 >= stats_at {
                stats_at = now / 1_000 + STATS_INTERVAL_US;
                // While the last ones are still being written, these are left out.
                let _ = self.stats.try_send(self.hub.stats());
            }
        }
    }

    fn receive(&mut self, end: usize, inbox: &mut Inbox) {
        for _ in 0..BATCHES_PER_TURN {
            let count = inbox.receive(&self.sockets[end]).unwrap_or(0);
            for at in 0..count {
                let came = inbox.arrival(at).map_or_else(|| self.clock.nanos(), |at| self.clock.nanos_at(at));
                self.hub.accept(end, inbox.datagram(at), came);
            }
            if count < BATCH_LEN {
                return;
            }
        }
    }
}

/// A packet socket at one interface. It asks for IPv4 alone, so that it does not see what it sends.
fn open(interface: &str) -> anyhow::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthIp)?;
    let address =
        link_address(interface).with_context(|| format!("{interface}: there is no such interface"))?;
    bind(socket.as_raw_fd(), &address).with_context(|| interface.to_owned())?;
    batch::grow_buffers(&socket);
    batch::timestamped(&socket)?;
    Ok(socket)
}

fn link_address(interface: &str) -> Option<LinkAddr> {
    let all = nix::ifaddrs::getifaddrs().ok()?;
    let own = all.filter(|address| address.interface_name == interface);
    own.filter_map(|address| address.address?.as_link_addr().copied()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

    fn hub() -> Hub {
        let end = |interface: &str, address| WireEnd {
            interface: interface.to_owned(),
            address,
            networks: Vec::new(),
        };
        let text = format!("from = \"{A}\"\nto = \"{B}\"\ndelay_us = 20000\n");
        let network = Network {
            stats: PathBuf::new(),
            end: vec![end("a", A), end("b", B)],
            line: vec![toml::from_str(&text).unwrap()],
        };
        Hub::new(&network).unwrap()
    }

    fn frame(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[26..30].copy_from_slice(&from.octets());
        frame[30..34].copy_from_slice(&to.octets());
        frame
    }

    fn released(hub: &mut Hub, now: u64) -> Vec<usize> {
        let mut outs = Vec::new();
        hub.release(now, |out, frames| {
            let count = frames.count();
            outs.extend(std::iter::repeat_n(out, count));
            count
        });
        outs
    }

    #[test]
    fn a_packet_leaves_at_the_end_that_it_is_for_when_its_delay_is_over() {
        let mut hub = hub();
        hub.accept(0, &frame(A, B), 0);
        assert_eq!(released(&mut hub, 19_999_999), [0; 0]);
        assert_eq!(released(&mut hub, 20_000_000), [1]);
        let stats = hub.stats();
        assert_eq!((stats.lines[0].packets, stats.lines[0].bytes, stats.late_us_max), (1, 60, 0));
    }

    #[test]
    fn a_packet_that_leaves_late_is_told_by_its_lateness() {
        let mut hub = hub();
        hub.accept(0, &frame(A, B), 0);
        hub.accept(0, &frame(A, B), 1_000_000);
        assert_eq!(released(&mut hub, 27_000_000), [1, 1]);
        assert_eq!(released(&mut hub, 28_000_000), [0; 0]);
        assert_eq!(hub.stats().late_us_max, 7_000);
    }

    #[test]
    fn a_network_behind_two_ends_is_left_to_by_either_and_reached_by_the_nearer() {
        let c = Ipv4Addr::new(10, 99, 0, 3);
        let networks = vec!["198.51.100.0/28".parse().unwrap()];
        let end = |interface: &str, address, networks: &[Prefix]| WireEnd {
            interface: interface.to_owned(),
            address,
            networks: networks.to_vec(),
        };
        let line = |from: Ipv4Addr, to: Ipv4Addr, delay_us: u64| {
            toml::from_str(&format!("from = \"{from}\"\nto = \"{to}\"\ndelay_us = {delay_us}\n")).unwrap()
        };
        let network = Network {
            stats: PathBuf::new(),
            end: vec![end("a", A, &networks), end("b", B, &networks), end("c", c, &[])],
            line: vec![line(A, c, 1), line(B, c, 1), line(c, A, 30_000), line(c, B, 20_000)],
        };
        let (mut hub, behind) = (Hub::new(&network).unwrap(), Ipv4Addr::new(198, 51, 100, 9));
        hub.accept(2, &frame(c, behind), 0);
        hub.accept(2, &frame(c, Ipv4Addr::new(198, 51, 100, 16)), 0);
        assert_eq!(released(&mut hub, 40_000_000), [1]);
        hub.accept(0, &frame(behind, c), 0);
        hub.accept(1, &frame(behind, c), 0);
        hub.accept(2, &frame(behind, A), 0);
        assert_eq!(released(&mut hub, 40_000_000), [2, 2]);
    }

    #[test]
    fn what_comes_in_at_another_end_than_its_source_or_has_no_line_is_dropped() {
        let mut hub = hub();
        hub.accept(1, &frame(A, B), 0);
        hub.accept(1, &frame(B, A), 0);
        hub.accept(0, &[0; 10], 0);
        assert_eq!(hub.next_release(), None);
    }
}
