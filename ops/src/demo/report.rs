//! What the demo found, for people and as JSON.

use std::time::Duration;

use flow::{HoldTimes, SiteId};
use serde::Serialize;

use super::world::{ActTraffic, Checks, Delays, PacketCounts, TcpCounts};

/// The whole report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// One entry per act.
    pub acts: Vec<Act>,
    /// Sums over the acts.
    pub totals: Totals,
    /// Version of Limosa.
    pub version: String,
    /// Processor and cores.
    pub machine: String,
    /// Seed of the traffic.
    pub seed: u64,
    /// What was not as it should be; empty when all was well.
    pub failures: Vec<String>,
}

/// Sums.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Groups moved, each time counted.
    pub groups_moved: usize,
    /// Flows moved, each time counted.
    pub flows_moved: u64,
    /// UDP packets.
    pub packets: PacketCounts,
    /// TCP.
    pub tcp: TcpCounts,
    /// What must be zero.
    pub checks: Checks,
}

/// One act.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Act {
    /// Its name.
    pub name: String,
    /// Why a part of it was left out, if one was: the machine could not show it.
    pub left_out: Option<String>,
    /// How long it was.
    pub seconds: f64,
    /// Groups moved.
    pub groups_moved: usize,
    /// Flows moved.
    pub flows_moved: u64,
    /// UDP packets.
    pub packets: PacketCounts,
    /// TCP.
    pub tcp: TcpCounts,
    /// What must be zero.
    pub checks: Checks,
    /// Each move.
    pub moves: Vec<MoveReport>,
    /// Moves that were aborted or taken back: the source went on.
    pub moves_given_up: Vec<GivenUp>,
    /// Request delay of the groups that the act is about.
    pub user_delay_ms: BeforeAfter,
    /// What the delay model said, beside what was measured.
    pub round_trip_ms: RoundTrips,
}

/// Means in milliseconds before and after the moves of an act, over all groups. Requests take a round trip between client and
/// server, and what the answer's length takes; the model counts that round trip, weighted by packets.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct RoundTrips {
    /// By the model when the act changed something; nothing while the leader knew of no traffic.
    pub model_before: Option<f64>,
    /// By the model at the end of the act.
    pub model_after: Option<f64>,
    /// Requests from then until the moves were done.
    pub requests_before: f64,
    /// Requests from then to the end of the act.
    pub requests_after: f64,
}

/// Delay before and after the moves of an act.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct BeforeAfter {
    /// From what the act changed until its moves were done.
    pub before: Delays,
    /// From then to the end of the act.
    pub after: Delays,
}

/// One move.
#[derive(Clone, Debug, Serialize)]
pub struct MoveReport {
    /// What moved.
    pub group: String,
    /// From this site, or site and worker.
    pub from: String,
    /// To this one.
    pub to: String,
    /// Flows.
    pub flows: u64,
    /// Encoded bytes; 0 between workers of one site.
    pub bytes_on_wire: u64,
    /// Encoded bytes of each flow; changes count again.
    pub bytes_per_flow: f64,
    /// Copying while the source served.
    pub precopy_ms: f64,
    /// Longest time a packet was held.
    pub hold_ms_max: f64,
    /// Hold times beyond the bound that no protocol can beat.
    pub excess_over_bound_us: Excess,
}

/// A move that did not take place.
#[derive(Clone, Debug, Serialize)]
pub struct GivenUp {
    /// What was to move.
    pub group: String,
    /// From this site.
    pub from: String,
    /// To this one.
    pub to: String,
    /// Why.
    pub reason: String,
}

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Excess {
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
}

impl Excess {
    /// Hold times beyond a bound.
    #[must_use]
    pub fn of(hold: &HoldTimes, bound: Duration) -> Self {
        let bound = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX);
        let over = |us: u64| us.saturating_sub(bound);
        Self { p50: over(hold.us_p50), p99: over(hold.us_p99), p999: over(hold.us_p999) }
    }
}

/// The least time that some packet must be held by a move, however it is done: what the source changed last is known to the target
/// at `a + d`, and a packet of ingress i is there at `b`; the longest such wait over all ingresses.
#[must_use]
pub fn hold_bound(
    sites: impl Iterator<Item = SiteId>,
    from: SiteId,
    to: SiteId,
    delay: impl Fn(SiteId, SiteId) -> Duration,
) -> Duration {
    let d = delay(from, to);
    sites.map(|i| (delay(i, from) + d).saturating_sub(delay(i, to))).max().unwrap_or_default()
}

impl Act {
    /// Takes what the traffic saw.
    pub fn take(&mut self, traffic: ActTraffic) {
        self.seconds = traffic.seconds;
        self.packets = traffic.packets;
        self.tcp = traffic.tcp;
        self.checks = traffic.checks;
        self.groups_moved = self.moves.len();
        self.flows_moved = self.moves.iter().map(|m| m.flows).sum();
    }

    /// What was not as it should be.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let (p, t, c) = (&self.packets, &self.tcp, &self.checks);
        let zero = [
            ("packets lost", p.lost),
            ("packets duplicated", p.duplicated),
            ("packets reordered", p.reordered),
            ("connections reset", t.reset),
            ("corrupt bytes", t.corrupt),
            ("corrupt packets", c.corrupt_packets),
            ("packets delivered to the wrong client", c.misdelivered),
            ("outside endpoints changed", c.outside_changed),
            ("outside endpoints foreign", c.outside_foreign),
            ("unknown packets", c.unknown),
            ("frames that the world could not hand to a switch", c.world_dropped),
        ];
        let mut failures: Vec<_> = zero
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{}: {count} {what}", self.name))
            .collect();
        if self.moves.is_empty() && self.left_out.is_none() {
            failures.push(format!("{}: nothing moved", self.name));
        }
        failures
    }
}

impl Report {
    /// Adds the sums.
    pub fn sum_up(&mut self) {
        let mut totals = Totals::default();
        for act in &self.acts {
            totals.groups_moved += act.groups_moved;
            totals.flows_moved += act.flows_moved;
            totals.packets.sent += act.packets.sent;
            totals.packets.delivered += act.packets.delivered;
            totals.packets.lost += act.packets.lost;
            totals.packets.duplicated += act.packets.duplicated;
            totals.packets.reordered += act.packets.reordered;
            totals.tcp.connections = totals.tcp.connections.max(act.tcp.connections);
            totals.tcp.reset += act.tcp.reset;
            totals.tcp.bytes_verified += act.tcp.bytes_verified;
            totals.tcp.corrupt += act.tcp.corrupt;
            totals.checks.corrupt_packets += act.checks.corrupt_packets;
            totals.checks.misdelivered += act.checks.misdelivered;
            totals.checks.outside_changed += act.checks.outside_changed;
            totals.checks.outside_foreign += act.checks.outside_foreign;
            totals.checks.unknown += act.checks.unknown;
            totals.checks.world_dropped += act.checks.world_dropped;
        }
        self.totals = totals;
        self.failures.extend(self.acts.iter().flat_map(Act::failures));
    }

    /// The table for people: one line per act.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header([
            "act",
            "groups",
            "flows",
            "packets",
            "lost",
            "dup.",
            "reord.",
            "TCP",
            "reset",
            "MB checked",
            "corrupt",
            "hold max",
            "delay p50/p95 before",
            "after",
        ]);
        for act in &self.acts {
            table.add_row(row(act));
        }
        table.to_string()
    }
}

fn row(act: &Act) -> [String; 14] {
    let hold = act.moves.iter().map(|m| m.hold_ms_max).fold(0.0, f64::max);
    let delay =
        |d: &Delays| if d.count == 0 { "-".into() } else { format!("{:.0} / {:.0} ms", d.p50, d.p95) };
    [
        act.name.clone(),
        act.groups_moved.to_string(),
        act.flows_moved.to_string(),
        act.packets.sent.to_string(),
        act.packets.lost.to_string(),
        act.packets.duplicated.to_string(),
        act.packets.reordered.to_string(),
        act.tcp.connections.to_string(),
        act.tcp.reset.to_string(),
        (act.tcp.bytes_verified / 1_000_000).to_string(),
        (act.tcp.corrupt + act.checks.corrupt_packets).to_string(),
        format!("{hold:.0} ms"),
        delay(&act.user_delay_ms.before),
        delay(&act.user_delay_ms.after),
    ]
}

/// Processor and cores of this machine.
#[must_use]
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("{}, {cores} cores", model.map_or("unknown processor", |(_, name)| name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn act() -> Act {
        let mv = MoveReport {
            group: "1:100.64.0.0/24".into(),
            from: "a".into(),
            to: "b".into(),
            flows: 10,
            bytes_on_wire: 100,
            bytes_per_flow: 10.0,
            precopy_ms: 1.0,
            hold_ms_max: 2.0,
            excess_over_bound_us: Excess::default(),
        };
        Act { name: "x".into(), moves: vec![mv], ..Act::default() }
    }

    #[test]
    fn anything_lost_twice_or_out_of_order_is_a_failure_and_so_is_an_act_without_moves() {
        assert_eq!(act().failures(), Vec::<String>::new());
        let mut bad = act();
        bad.packets.lost = 1;
        bad.packets.reordered = 2;
        bad.tcp.reset = 3;
        bad.checks.outside_changed = 4;
        assert_eq!(bad.failures().len(), 4);
        bad.moves.clear();
        assert_eq!(bad.failures().len(), 5);
    }

    #[test]
    fn the_bound_is_that_of_the_ingress_that_must_wait_longest() {
        // On a line 1 -- 2 -- 3 with 10 ms each: moving 1 to 3, ingress 3 waits 20 + 20 - 0.
        let delay = |a: SiteId, b: SiteId| Duration::from_millis(10 * u64::from(a.0.abs_diff(b.0)));
        let bound = hold_bound((1..=3).map(SiteId), SiteId(1), SiteId(3), delay);
        assert_eq!(bound, Duration::from_millis(40));
        let hold = HoldTimes { held: 3, us_p50: 39_000, us_p99: 40_100, us_p999: 41_000, us_max: 41_000 };
        assert_eq!(Excess::of(&hold, bound), Excess { p50: 0, p99: 100, p999: 1_000 });
    }
}
