//! What the lab found, for people and as JSON.

use std::ops::RangeInclusive;

use serde::Serialize;

use super::clients::download::Downloaded;
use super::clients::http::{Reset, Wrongs};
use super::clients::iperf::Measured;
use super::clients::{Latency, Sample, Second, ms, per_second};
use super::probes::Probes;
use crate::demo::report::{GivenUp, MoveReport};

/// How long after an end a loss still counts as its own.
const AFTERMATH_US: u64 = 1_000_000;
/// What began so long before a process died may have been under way.
const UNDER_WAY_US: u64 = 2_000_000;

/// Whether packets may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Loss {
    /// Nothing that carries packets dies.
    Never,
    /// What was under way in the process that died.
    Packets,
    /// The flows that it knew, too: they are made anew by what their clients send next.
    Flows,
}

/// Something that happened while the clients worked.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Happening {
    pub(super) name: String,
    pub(super) loss: Loss,
    /// Since the lab's start.
    pub(super) start_s: f64,
    pub(super) seconds: f64,
    pub(super) moves: Vec<MoveReport>,
    pub(super) given_up: Vec<GivenUp>,
    /// Of those that began from its start to a second after its end.
    pub(super) requests: Latency,
    pub(super) keystrokes: Latency,
    pub(super) pings_sent: usize,
    pub(super) pings_lost: usize,
    pub(super) delay: Delay,
}

/// Round trips of the group that pings, measured and by the delay model, before and after.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Delay {
    /// Median of the second before.
    pub(super) measured_before_ms: Option<f64>,
    pub(super) model_before_ms: Option<f64>,
    /// Median of the second after.
    pub(super) measured_after_ms: Option<f64>,
    pub(super) model_after_ms: Option<f64>,
}

/// What the clients saw.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) http: Vec<Sample>,
    pub(super) wrongs: Wrongs,
    /// Name, echoes, when those that came back twice were sent.
    pub(super) pings: Vec<(String, Vec<Sample>, Vec<u64>)>,
    pub(super) ssh: Vec<Sample>,
    pub(super) ssh_failure: Option<String>,
    pub(super) download: Downloaded,
    pub(super) tcp: Measured,
    pub(super) udp: Measured,
}

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: String,
    pub(super) machine: String,
    pub(super) seconds: f64,
    pub(super) sites: Vec<String>,
    pub(super) happenings: Vec<Happening>,
    pub(super) clients: Clients,
    pub(super) probes: Probes,
    /// Where packets were dropped, by workers and by the emulated network.
    pub(super) drops: Vec<String>,
    /// What was not as it should be; empty when all was well.
    pub(super) failures: Vec<String>,
}

/// What each client saw.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Clients {
    pub(super) requests: Requests,
    pub(super) download: Downloaded,
    pub(super) ssh: Typed,
    pub(super) pings: Vec<Pinged>,
    pub(super) iperf_tcp: Measured,
    pub(super) iperf_udp: Measured,
}

/// Short requests.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Requests {
    #[serde(flatten)]
    pub(super) latency: Latency,
    pub(super) reset: usize,
    pub(super) wrong: u64,
    pub(super) late: usize,
    /// Those that were reset.
    pub(super) resets: Vec<Reset>,
    pub(super) per_second: Vec<Second>,
}

/// The SSH session.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Typed {
    #[serde(flatten)]
    pub(super) latency: Latency,
    pub(super) failure: Option<String>,
    pub(super) per_second: Vec<Second>,
}

/// A `ping`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Pinged {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) latency: Latency,
    pub(super) duplicates: u64,
    pub(super) per_second: Vec<Second>,
}

impl Happening {
    pub(super) fn new(name: String, loss: Loss, start_us: u64, end_us: u64) -> Self {
        Self {
            name,
            loss,
            start_s: ms(start_us) / 1_000.0,
            seconds: ms(end_us - start_us) / 1_000.0,
            moves: Vec::new(),
            given_up: Vec::new(),
            requests: Latency::default(),
            keystrokes: Latency::default(),
            pings_sent: 0,
            pings_lost: 0,
            delay: Delay::default(),
        }
    }

    /// One line for the whole, for who watches.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.moves.is_empty() {
            let flows: u64 = self.moves.iter().map(|m| m.flows).sum();
            let hold = self.moves.iter().map(|m| m.hold_ms_max).fold(0.0, f64::max);
            lines.push(format!(
                "  {} groups with {flows} flows moved within {:.1} s; held for {hold:.0} ms at most.",
                self.moves.len(),
                self.seconds
            ));
        }
        lines.extend(self.given_up.iter().map(|g| format!("  {} was given up: {}.", g.group, g.reason)));
        lines
    }

    /// Takes from what clients saw what belongs to it.
    pub(super) fn take(&mut self, seen: &Seen) {
        let span = self.span();
        let within = |sample: &&Sample| span.contains(&sample.at_us);
        self.requests = Latency::of(seen.http.iter().filter(within));
        self.keystrokes = Latency::of(seen.ssh.iter().filter(within));
        let pings = || seen.pings.iter().flat_map(|(_, samples, _)| samples).filter(within);
        self.pings_sent = pings().count();
        self.pings_lost = pings().filter(|sample| sample.took_us.is_none()).count();
        let (start, end) = (*span.start(), *span.end());
        let busy = seen.pings.first().map_or(&[][..], |(_, samples, _)| samples);
        let median = |from: u64, to: u64| {
            let latency = Latency::of(busy.iter().filter(|sample| (from..to).contains(&sample.at_us)));
            (latency.count > latency.failed).then_some(latency.p50_ms)
        };
        self.delay.measured_before_ms = median(start.saturating_sub(1_000_000), start);
        self.delay.measured_after_ms = median(end - AFTERMATH_US, end);
    }

    /// From its start to the end of its aftermath, in microseconds.
    fn span(&self) -> RangeInclusive<u64> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times of a run")]
        let us = |seconds: f64| (seconds * 1e6) as u64;
        us(self.start_s)..=us(self.start_s + self.seconds) + AFTERMATH_US
    }

    /// Whether a request that began at this time may stay without an answer: the flow of one that was under way, and whose
    /// client has nothing more to send, ends with the worker that knew it.
    fn excuses(&self, at_us: u64) -> bool {
        let span = self.span();
        self.loss != Loss::Never && (span.start().saturating_sub(UNDER_WAY_US)..=*span.end()).contains(&at_us)
    }

    fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if self.loss == Loss::Never && self.pings_lost > 0 {
            failures.push(format!("{}: {} pings lost", self.name, self.pings_lost));
        }
        failures
    }
}

impl Seen {
    fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut zero = |what: &str, count: u64| {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        };
        zero("requests with a wrong answer", self.wrongs.wrong);
        if self.http.is_empty() {
            failures.push("no request was made".to_owned());
        }
        failures.extend(
            self.pings
                .iter()
                .filter(|(_, samples, _)| samples.is_empty())
                .map(|(name, ..)| format!("{name}: nothing came back")),
        );
        if self.download.checksum != self.download.checksum_expected {
            failures.push(format!("the download of {} bytes has a wrong checksum", self.download.bytes));
        }
        if self.download.exit_code != Some(0) {
            failures.push(format!("curl ended with {:?}", self.download.exit_code));
        }
        failures.extend(self.ssh_failure.iter().map(|failure| format!("SSH: {failure}")));
        if self.ssh.is_empty() {
            failures.push("SSH: no letter came back".to_owned());
        }
        for (name, run) in [("iperf3 TCP", &self.tcp), ("iperf3 UDP", &self.udp)] {
            failures.extend(run.error.iter().map(|error| format!("{name}: {error}")));
        }
        failures
    }
}

/// Echoes that came back twice, with what happened when they were sent.
fn twice<'a>(seen: &'a Seen, happenings: &'a [Happening]) -> impl Iterator<Item = String> + 'a {
    let during = |at_us: u64| happenings.iter().rev().find(|happening| happening.span().contains(&at_us));
    let each = seen.pings.iter().flat_map(|(name, _, twice)| twice.iter().map(move |at_us| (name, *at_us)));
    each.map(move |(name, at_us)| {
        let during = during(at_us).map_or("nothing", |happening| &happening.name);
        format!("{name}: the echo sent at {:.3} s, during {during}, came back twice", at_us as f64 / 1e6)
    })
}

/// Whether the request was under way when its worker died, by a port that it cannot have been given again: made anew, its flow gets the
/// port that is tried first, which an older flow of the subscriber had before. The server knows of no connection there.
fn is_of_a_dead_worker(reset: &Reset, happenings: &[Happening]) -> bool {
    let flows_died = |happening: &Happening| happening.loss == Loss::Flows && happening.excuses(reset.at_us);
    reset.was_displaced && happenings.iter().any(flows_died)
}

impl Report {
    /// Puts together what was found.
    pub(super) fn new(
        sites: Vec<String>,
        seconds: f64,
        happenings: Vec<Happening>,
        seen: Seen,
        probes: Probes,
        drops: Vec<String>,
        mut failures: Vec<String>,
    ) -> Self {
        failures.extend(happenings.iter().flat_map(Happening::failures));
        let excused = |at_us: &u64| happenings.iter().any(|happening| happening.excuses(*at_us));
        let late = seen.wrongs.late_at_us.iter().filter(|at_us| !excused(at_us)).count();
        if late > 0 {
            failures.push(format!("{late} requests without an answer in time"));
        }
        let resets: Vec<_> =
            seen.wrongs.reset.iter().filter(|reset| !is_of_a_dead_worker(reset, &happenings)).collect();
        if let Some(first) = resets.first() {
            failures.push(format!("{} requests whose connection was reset; the first {first}", resets.len()));
        }
        failures.extend(seen.failures());
        failures.extend(twice(&seen, &happenings));
        failures.extend(probes.failures());
        let pings = seen.pings.iter().map(|(name, samples, twice)| Pinged {
            name: name.clone(),
            latency: Latency::of(samples.iter()),
            duplicates: twice.len() as u64,
            per_second: per_second(samples),
        });
        let clients = Clients {
            requests: Requests {
                latency: Latency::of(seen.http.iter()),
                reset: seen.wrongs.reset.len(),
                wrong: seen.wrongs.wrong,
                late: seen.wrongs.late_at_us.len(),
                resets: seen.wrongs.reset.clone(),
                per_second: per_second(&seen.http),
            },
            ssh: Typed {
                latency: Latency::of(seen.ssh.iter()),
                failure: seen.ssh_failure.clone(),
                per_second: per_second(&seen.ssh),
            },
            pings: pings.collect(),
            download: seen.download,
            iperf_tcp: seen.tcp,
            iperf_udp: seen.udp,
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: crate::demo::report::machine(),
            seconds,
            sites,
            happenings,
            clients,
            probes,
            drops,
            failures,
        }
    }

    /// The tables for people.
    pub(super) fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header([
            "at",
            "what",
            "groups",
            "flows",
            "took",
            "held",
            "requests",
            "failed",
            "p50 / p99 / max",
            "pings",
            "lost",
            "ping / model before",
            "after",
        ]);
        let pair = |measured: Option<f64>, model: Option<f64>| {
            let text = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.0}"));
            format!("{} / {} ms", text(measured), text(model))
        };
        for happening in &self.happenings {
            let hold = happening.moves.iter().map(|m| m.hold_ms_max).fold(0.0, f64::max);
            let (requests, flows) =
                (&happening.requests, happening.moves.iter().map(|m| m.flows).sum::<u64>());
            table.add_row([
                format!("{:.0} s", happening.start_s),
                happening.name.clone(),
                happening.moves.len().to_string(),
                flows.to_string(),
                format!("{:.1} s", happening.seconds),
                format!("{hold:.0} ms"),
                requests.count.to_string(),
                requests.failed.to_string(),
                format!("{:.0} / {:.0} / {:.0} ms", requests.p50_ms, requests.p99_ms, requests.max_ms),
                happening.pings_sent.to_string(),
                happening.pings_lost.to_string(),
                pair(happening.delay.measured_before_ms, happening.delay.model_before_ms),
                pair(happening.delay.measured_after_ms, happening.delay.model_after_ms),
            ]);
        }
        let c = &self.clients;
        let download = &c.download;
        let right = if download.checksum == download.checksum_expected { "right" } else { "WRONG" };
        format!(
            "{table}\n\n\
             curl    {} MB in {:.0} s, checksum {right}\n\
             HTTP    {} requests, {} reset, {} wrong, {} late\n\
             SSH     {} letters, {:.0} ms at the median, {:.0} ms at most\n\
             ping    {} echoes, {} lost\n\
             iperf3  TCP {:.1} Mbit/s, {} retransmits; UDP {} packets, {} lost, {} out of order",
            download.bytes / 1_000_000,
            download.seconds,
            c.requests.latency.count,
            c.requests.reset,
            c.requests.wrong,
            c.requests.late,
            c.ssh.latency.count,
            c.ssh.latency.p50_ms,
            c.ssh.latency.max_ms,
            c.pings.iter().map(|ping| ping.latency.count).sum::<usize>(),
            c.pings.iter().map(|ping| ping.latency.failed).sum::<usize>(),
            c.iperf_tcp.mbit_per_s,
            c.iperf_tcp.retransmits,
            c.iperf_udp.packets,
            c.iperf_udp.lost,
            c.iperf_udp.out_of_order,
        ) + "\n\n"
            + &self.probes.table()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lost_at_us: u64) -> Seen {
        let checksum = "a".to_owned();
        let fine = Sample { at_us: 1_500_000, took_us: Some(9) };
        Seen {
            http: vec![fine],
            wrongs: Wrongs::default(),
            pings: vec![(
                "p".to_owned(),
                vec![fine, Sample { at_us: lost_at_us, took_us: None }],
                Vec::new(),
            )],
            ssh: vec![fine],
            ssh_failure: None,
            download: Downloaded {
                bytes: 1,
                seconds: 1.0,
                checksum: checksum.clone(),
                checksum_expected: checksum,
                exit_code: Some(0),
                per_second: Vec::new(),
            },
            tcp: Measured::default(),
            udp: Measured::default(),
        }
    }

    fn failures(loss: Loss, seen: Seen) -> Vec<String> {
        let mut happening = Happening::new("move".into(), loss, 1_000_000, 2_000_000);
        happening.take(&seen);
        let report =
            Report::new(Vec::new(), 9.0, vec![happening], seen, Probes::default(), Vec::new(), Vec::new());
        report.failures.into_iter().filter(|failure| !failure.starts_with("probes: ")).collect()
    }

    #[test]
    fn a_ping_lost_by_a_planned_move_is_a_failure() {
        assert_eq!(failures(Loss::Never, seen(2_900_000)), ["move: 1 pings lost"]);
        assert_eq!(failures(Loss::Never, seen(3_100_000)), [""; 0]);
        assert_eq!(failures(Loss::Packets, seen(2_900_000)), [""; 0]);
    }

    #[test]
    fn an_echo_that_comes_back_twice_is_a_failure_that_says_when_it_was_sent() {
        let twice = |at_us| {
            let mut seen = seen(0);
            seen.pings[0].2.push(at_us);
            failures(Loss::Packets, seen)
        };
        assert_eq!(twice(1_250_000), ["p: the echo sent at 1.250 s, during move, came back twice"]);
        assert_eq!(twice(8_000_000), ["p: the echo sent at 8.000 s, during nothing, came back twice"]);
    }

    #[test]
    fn a_request_without_an_answer_is_a_failure_unless_the_worker_that_knew_it_died() {
        let late = |at_us| {
            let mut seen = seen(0);
            seen.wrongs.late_at_us.push(at_us);
            seen
        };
        let failure = ["1 requests without an answer in time"];
        assert_eq!(failures(Loss::Never, late(1_500_000)), failure);
        assert_eq!(failures(Loss::Packets, late(3_100_000)), failure);
        assert_eq!(failures(Loss::Packets, late(500_000)), [""; 0]);
        assert_eq!(failures(Loss::Packets, late(1_500_000)), [""; 0]);
    }

    #[test]
    fn a_reset_is_excused_only_where_the_flows_of_a_worker_died_and_its_port_was_not_the_first_choice() {
        let fails = |loss, at_us, was_displaced| {
            let mut seen = seen(0);
            let (server, error) = ([192, 0, 2, 1].into(), "read: reset".into());
            let reset = Reset { at_us, after_us: 2_400_000, client: None, server, error, was_displaced };
            seen.wrongs.reset.push(reset);
            !failures(loss, seen).is_empty()
        };
        assert!(!fails(Loss::Flows, 900_000, true));
        assert!(fails(Loss::Flows, 900_000, false), "it gets the same port again");
        assert!(fails(Loss::Packets, 900_000, true), "no flow died");
        assert!(fails(Loss::Never, 900_000, true));
        assert!(fails(Loss::Flows, 5_000_000, true), "the worker had been dead for long");
    }

    #[test]
    fn a_reset_connection_and_a_wrong_checksum_are_failures() {
        let mut bad = seen(0);
        let reset = Reset {
            at_us: 75_300_000,
            after_us: 120_000,
            client: Some(([100, 64, 6, 7], 40_001).into()),
            server: [192, 0, 2, 1].into(),
            error: "read: Connection reset by peer".into(),
            was_displaced: false,
        };
        bad.wrongs.reset = vec![reset.clone(), reset];
        bad.download.checksum_expected = "b".into();
        bad.ssh_failure = Some("gone".into());
        let failures = failures(Loss::Never, bad);
        assert_eq!(failures.len(), 3);
        let reset = "2 requests whose connection was reset; the first from 100.64.6.7:40001 to 192.0.2.1 at 75.3 s, \
                     120 ms after it began: read: Connection reset by peer";
        assert!(failures.contains(&reset.to_owned()), "{failures:?}");
    }
}
