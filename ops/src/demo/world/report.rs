//! What is counted, by act, and what is told about it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::AddAssign;

use flow::{Prefix, SiteId};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::Mark;

/// How long packets are counted together, in microseconds.
const BIN_LEN: u64 = 500_000;
/// Broken connections that are remembered.
const BREAKS_MAX: usize = 1 << 14;
/// Requests remembered for windows; the oldest go first.
const SAMPLES_MAX: usize = 1 << 20;

/// UDP packets, both directions together, counted in the act in which they were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PacketCounts {
    /// Sent by clients and servers.
    pub sent: u64,
    /// Arrived intact, the first time.
    pub delivered: u64,
    /// Sent longer ago than the grace time, and not delivered.
    pub lost: u64,
    /// Arrived again.
    pub duplicated: u64,
    /// Arrived after a later packet of their flow and direction.
    pub reordered: u64,
}

/// Packets between clients of one group and servers near one site that came to harm, by when they were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathHarm {
    /// Of the clients.
    pub group: Prefix,
    /// Where answers of the servers come in.
    pub server: SiteId,
    /// Sent from then on.
    pub from: Mark,
    /// And before.
    pub until: Mark,
    /// How many; those on their way for no longer than the grace time do not count as lost.
    pub packets: PacketCounts,
}

/// All that came to harm, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Harm {
    /// Packets, in half seconds.
    pub paths: Vec<PathHarm>,
    /// TCP connections that ended without being asked to: group and time. The first [`BREAKS_MAX`].
    pub breaks: Vec<(Prefix, Mark)>,
}

/// TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TcpCounts {
    /// Open at the end.
    pub connections: u64,
    /// Ended without being asked to.
    pub reset: u64,
    /// Bytes that arrived as they were sent, both ways.
    pub bytes_verified: u64,
    /// Bytes that did not.
    pub corrupt: u64,
}

/// What else must never happen. All zero when all is well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checks {
    /// Packets with a wrong checksum or content.
    pub corrupt_packets: u64,
    /// Packets that came to an endpoint that they were not for.
    pub misdelivered: u64,
    /// Times that the outside endpoint of a UDP flow changed.
    pub outside_changed: u64,
    /// Packets from an outside address that is not in the pool.
    pub outside_foreign: u64,
    /// Frames that are not TCP or UDP over IPv4, or for nobody.
    pub unknown: u64,
    /// Frames that the world itself lost because a switch did not take them; not a fault of the flows' site.
    pub world_dropped: u64,
}

/// Mean and percentiles in milliseconds; all zero when there was nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Delays {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Measurements.
    pub count: u64,
}

/// Delays of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct GroupDelays {
    /// From a request over TCP to the last byte of its answer.
    pub request_ms: Delays,
    /// UDP packet and its echo.
    pub round_trip_ms: Delays,
}

/// What the traffic saw during an act.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ActTraffic {
    /// The act.
    pub name: String,
    /// How long it was.
    pub seconds: f64,
    /// UDP.
    pub packets: PacketCounts,
    /// TCP.
    pub tcp: TcpCounts,
    /// From a request over TCP to the last byte of its answer, of requests that began in the act.
    pub user_delay_ms: Delays,
    /// By client prefix.
    pub by_group: BTreeMap<String, GroupDelays>,
    /// What must be zero.
    pub checks: Checks,
    /// After the traffic was drained: packets that never arrived, the first ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

/// Packets that were sent at about one time.
#[derive(Default)]
struct Bin {
    begin: u64,
    end: u64,
    act: usize,
    packets: PacketCounts,
    /// By group and site of the server.
    paths: Vec<PacketCounts>,
}

#[derive(Default)]
struct Act {
    name: String,
    begin: u64,
    end: Option<u64>,
    tcp: TcpCounts,
    checks: Checks,
    round_trips: Vec<Option<Histogram<u32>>>,
}

struct Sample {
    started: u64,
    group: usize,
    delay: u64,
}

/// Whose packets: places in the lists of groups and of sites.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    pub(super) group: usize,
    /// Where the server is near.
    pub(super) server: usize,
}

/// All counters. Times are microseconds.
pub(super) struct Ledger {
    bins: Vec<Bin>,
    acts: Vec<Act>,
    samples: VecDeque<Sample>,
    groups: Vec<Prefix>,
    /// Where servers are.
    sites: Vec<SiteId>,
    breaks: Vec<(Prefix, Mark)>,
    /// TCP connections that are open now.
    pub(super) open: u64,
}

impl Ledger {
    pub(super) fn new(groups: Vec<Prefix>, sites: Vec<SiteId>) -> Self {
        let (bins, acts, samples, breaks) = (Vec::new(), Vec::new(), VecDeque::new(), Vec::new());
        let mut ledger = Self { bins, acts, samples, groups, sites, breaks, open: 0 };
        ledger.begin(String::new(), 0);
        ledger
    }

    /// Begins an act and ends the one before; its number.
    pub(super) fn begin(&mut self, name: String, now: u64) -> usize {
        if let Some(last) = self.acts.last_mut() {
            last.end = Some(now);
        }
        if let Some(bin) = self.bins.last_mut() {
            bin.end = now;
        }
        self.acts.push(Act { name, begin: now, ..Act::default() });
        self.add_bin(now);
        self.current()
    }

    /// Begins a new bin when the last one is full.
    pub(super) fn tick(&mut self, now: u64) {
        if self.bins.last().is_some_and(|bin| bin.end <= now) {
            self.add_bin(now);
        }
    }

    fn add_bin(&mut self, now: u64) {
        let paths = vec![PacketCounts::default(); self.groups.len() * self.sites.len()];
        let (act, packets) = (self.current(), PacketCounts::default());
        self.bins.push(Bin { begin: now, end: now + BIN_LEN, act, packets, paths });
    }

    /// Counts a packet as sent; the bin that it is counted in, which it carries.
    pub(super) fn sent(&mut self, path: Path) -> u32 {
        let bin = u32::try_from(self.bins.len() - 1).unwrap_or(u32::MAX);
        self.count(bin, path, PacketCounts { sent: 1, ..PacketCounts::default() });
        bin
    }

    /// Counts what became of a packet, by the bin that it carries.
    pub(super) fn count(&mut self, bin: u32, path: Path, packets: PacketCounts) {
        let at = (bin as usize).min(self.bins.len() - 1);
        let bin = &mut self.bins[at];
        bin.packets += packets;
        bin.paths[path.group * self.sites.len() + path.server] += packets;
    }

    /// A connection ended without being asked to.
    pub(super) fn broke(&mut self, group: usize, now: u64) {
        self.tcp().reset += 1;
        if self.breaks.len() < BREAKS_MAX {
            self.breaks.push((self.groups[group], Mark(now)));
        }
    }

    /// All that came to harm. What was sent after `settled` may still be on its way.
    pub(super) fn harm(&self, settled: u64) -> Harm {
        let mut harm = Harm { breaks: self.breaks.clone(), ..Harm::default() };
        for bin in &self.bins {
            for (at, &packets) in bin.paths.iter().enumerate() {
                let lost =
                    if bin.end <= settled { packets.sent.saturating_sub(packets.delivered) } else { 0 };
                if lost + packets.duplicated + packets.reordered > 0 {
                    harm.paths.push(PathHarm {
                        group: self.groups[at / self.sites.len()],
                        server: self.sites[at % self.sites.len()],
                        from: Mark(bin.begin),
                        until: Mark(bin.end),
                        packets: PacketCounts { lost, ..packets },
                    });
                }
            }
        }
        harm
    }

    pub(super) fn tcp(&mut self) -> &mut TcpCounts {
        &mut self.act().tcp
    }

    pub(super) fn checks(&mut self) -> &mut Checks {
        &mut self.act().checks
    }

    /// The number of the present act.
    pub(super) fn current(&self) -> usize {
        self.acts.len() - 1
    }

    fn act(&mut self) -> &mut Act {
        let last = self.acts.len() - 1;
        &mut self.acts[last]
    }

    pub(super) fn round_trip(&mut self, bin: u32, group: usize, delay: u64) {
        let act = self.bins[(bin as usize).min(self.bins.len() - 1)].act;
        let (groups, act) = (self.groups.len(), &mut self.acts[act]);
        act.round_trips.resize_with(groups, || None);
        let histogram = &mut act.round_trips[group];
        if histogram.is_none() {
            *histogram = Histogram::new_with_bounds(1, 60_000_000, 3).ok();
        }
        if let Some(histogram) = histogram {
            histogram.saturating_record(delay);
        }
    }

    pub(super) fn request(&mut self, group: usize, started: u64, delay: u64) {
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample { started, group, delay });
    }

    /// Delays of requests of some groups that began in a time.
    pub(super) fn requests(&self, wanted: impl Fn(usize) -> bool, since: u64, until: u64) -> Delays {
        let Ok(mut histogram) = Histogram::<u32>::new_with_bounds(1, 60_000_000, 3) else {
            return Delays::default();
        };
        let in_time = |sample: &&Sample| (since..until).contains(&sample.started) && wanted(sample.group);
        for sample in self.samples.iter().filter(in_time) {
            histogram.saturating_record(sample.delay);
        }
        Delays::of(&histogram)
    }

    /// What one act saw, or all of them. Packets of bins that ended after `settled` may still be on their way
    /// and do not count as lost.
    pub(super) fn report(&self, act: Option<usize>, now: u64, settled: u64) -> ActTraffic {
        let acts = act.map_or(0..self.acts.len(), |act| act..(act + 1).min(self.acts.len()));
        let Some(acts) = self.acts.get(acts.clone()).filter(|acts| !acts.is_empty()) else {
            return ActTraffic::default();
        };
        let begin = acts[0].begin;
        let end = acts[acts.len() - 1].end.unwrap_or(now);
        let mut traffic = ActTraffic {
            name: act.map_or("all".to_owned(), |_| acts[0].name.clone()),
            seconds: millis(end - begin) / 1_000.0,
            user_delay_ms: self.requests(|_| true, begin, end),
            ..ActTraffic::default()
        };
        for act in acts {
            traffic.tcp += act.tcp;
            traffic.checks += act.checks;
        }
        traffic.tcp.connections = self.open;
        for bin in self.bins.iter().filter(|bin| act.is_none_or(|act| bin.act == act)) {
            traffic.packets += bin.packets;
            if bin.end <= settled {
                traffic.packets.lost += bin.packets.sent.saturating_sub(bin.packets.delivered);
            }
        }
        for (at, group) in self.groups.iter().enumerate() {
            let request_ms = self.requests(|group| group == at, begin, end);
            let round_trip_ms = round_trips(acts, at);
            traffic.by_group.insert(group.to_string(), GroupDelays { request_ms, round_trip_ms });
        }
        traffic
    }
}

fn round_trips(acts: &[Act], group: usize) -> Delays {
    let mut all: Option<Histogram<u32>> = None;
    for histogram in acts.iter().filter_map(|act| act.round_trips.get(group)?.as_ref()) {
        match &mut all {
            Some(all) => drop(all.add(histogram)),
            None => all = Some(histogram.clone()),
        }
    }
    all.map_or(Delays::default(), |all| Delays::of(&all))
}

impl Delays {
    fn of(histogram: &Histogram<u32>) -> Self {
        let count = histogram.len();
        if count == 0 {
            return Self::default();
        }
        let at = |quantile| millis(histogram.value_at_quantile(quantile));
        let mean = histogram.mean() / 1_000.0;
        Self { mean, p50: at(0.5), p95: at(0.95), p99: at(0.99), count }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1_000.0
}

impl AddAssign for PacketCounts {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.delivered += other.delivered;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
    }
}

impl AddAssign for TcpCounts {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.reset += other.reset;
        self.bytes_verified += other.bytes_verified;
        self.corrupt += other.corrupt;
    }
}

impl AddAssign for Checks {
    fn add_assign(&mut self, other: Self) {
        self.corrupt_packets += other.corrupt_packets;
        self.misdelivered += other.misdelivered;
        self.outside_changed += other.outside_changed;
        self.outside_foreign += other.outside_foreign;
        self.unknown += other.unknown;
        self.world_dropped += other.world_dropped;
    }
}
