//! `ping`, a hundred times a second, and which echoes never came back.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use nix::sys::signal::Signal;

use super::super::namespaces::Namespace;
use super::super::processes::{Processes, end};
use super::{Latency, Sample};
use crate::clock::{Clock, wall_ms};

/// Microseconds between two echoes at least. The kernel wakes `ping` a little later, so this makes about a hundred a second.
const INTERVAL_US: u64 = 8_000;

/// Echoes under way.
#[derive(Debug)]
pub(in super::super) struct Ping {
    child: Child,
    echoes: Arc<Mutex<Echoes>>,
    thread: Option<JoinHandle<()>>,
}

impl Ping {
    /// Starts `ping` in the namespace.
    ///
    /// # Errors
    /// It cannot be started.
    pub(in super::super) fn start(
        name: &str,
        clients: &Namespace,
        from: Ipv4Addr,
        to: Ipv4Addr,
        clock: Clock,
        processes: &mut Processes,
    ) -> anyhow::Result<Self> {
        let mut command = clients.command("ping");
        command.args(["-n", "-D", "-i", "0.008", "-I", &from.to_string(), &to.to_string()]);
        let mut child = processes.spawn_piped(name, command)?;
        let output = child.stdout.take().context("ping has no output")?;
        // `ping` tells the time of day; the lab counts from its start.
        let started_wall_us = wall_ms().saturating_mul(1_000).saturating_sub(clock.now().0);
        let echoes = Arc::new(Mutex::new(Echoes::default()));
        let into = Arc::clone(&echoes);
        let thread = std::thread::Builder::new().name("ping".into()).spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(echo) = Echo::parse(&line, started_wall_us) {
                    into.lock().unwrap_or_else(PoisonError::into_inner).add(echo);
                }
            }
        })?;
        Ok(Self { child, echoes, thread: Some(thread) })
    }

    /// Ends `ping`. Each echo, those that were lost too; and when those that came back twice were sent.
    pub(in super::super) fn stop(&mut self) -> (Vec<Sample>, Vec<u64>) {
        end(&mut self.child, Signal::SIGINT);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let echoes = self.echoes.lock().unwrap_or_else(PoisonError::into_inner);
        (echoes.samples(), echoes.twice_at_us.clone())
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Some echoes, to their end: the median of what came back, in milliseconds.
///
/// # Errors
/// Nothing came back.
pub(in super::super) fn median_ms(from: &Namespace, to: Ipv4Addr) -> anyhow::Result<f64> {
    let told = from.run("ping", &["-n", "-D", "-c", "9", "-i", "0.1", "-w", "5", &to.to_string()])?;
    let echoes = told.lines().filter_map(|line| Echo::parse(line, 0));
    let samples: Vec<_> =
        echoes.map(|echo| Sample { at_us: echo.sent_us, took_us: Some(echo.took_us) }).collect();
    Ok(Latency::of(samples.iter()).p50_ms)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Echo {
    number: u64,
    sent_us: u64,
    took_us: u64,
}

impl Echo {
    /// A line such as `[1700000000.123456] 64 bytes from 203.0.113.1: icmp_seq=7 ttl=62 time=1.23 ms`.
    fn parse(line: &str, started_wall_us: u64) -> Option<Self> {
        let (wall, rest) = line.strip_prefix('[')?.split_once(']')?;
        let field = |name: &str| {
            let at = rest.find(name)? + name.len();
            rest[at..].split_whitespace().next()
        };
        let number = field("icmp_seq=")?.parse().ok()?;
        let took_us = micros(field("time=")?, 3)?;
        let came_us = micros(wall, 6)?.checked_sub(started_wall_us)?;
        Some(Self { number, sent_us: came_us.saturating_sub(took_us), took_us })
    }
}

/// A decimal number, as an integer of so many decimals.
fn micros(text: &str, decimals: usize) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let part = format!("{part:0<decimals$}");
    format!("{whole}{}", part.get(..decimals)?).parse().ok()
}

/// The echoes that came back, by number.
#[derive(Debug, Default)]
struct Echoes {
    came: std::collections::BTreeMap<u64, Echo>,
    /// When those that came back twice were sent.
    twice_at_us: Vec<u64>,
    /// How often the 16 bits of the number have gone round.
    rounds: u64,
    last: u64,
}

impl Echoes {
    fn add(&mut self, mut echo: Echo) {
        // Far below the last one: the number has gone round.
        let gone_round = echo.number + 0x8000 < self.last & 0xffff;
        if gone_round && self.rounds << 16 <= self.last & !0xffff {
            self.rounds = (self.last >> 16) + 1;
        }
        echo.number |= self.rounds << 16;
        self.last = self.last.max(echo.number);
        if let Some(first) = self.came.insert(echo.number, echo) {
            self.twice_at_us.push(first.sent_us);
        }
    }

    /// All up to the last one that came back. When a lost one was sent follows from the one before it.
    fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::with_capacity(self.came.len());
        let mut before: Option<Echo> = None;
        for echo in self.came.values() {
            if let Some(before) = before {
                let lost = echo.number - before.number - 1;
                let step = echo.sent_us.saturating_sub(before.sent_us).max(INTERVAL_US) / (lost + 1);
                let missing = (1..=lost).map(|i| Sample { at_us: before.sent_us + i * step, took_us: None });
                samples.extend(missing);
            }
            samples.push(Sample { at_us: echo.sent_us, took_us: Some(echo.took_us) });
            before = Some(*echo);
        }
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(number: u64) -> Echo {
        Echo { number, sent_us: number * INTERVAL_US, took_us: 500 }
    }

    #[test]
    fn a_line_of_ping_is_read() {
        let line = "[1700000001.500000] 64 bytes from 203.0.113.1: icmp_seq=7 ttl=62 time=12.3 ms";
        let echo = Echo::parse(line, 1_700_000_000_000_000).unwrap();
        assert_eq!(echo, Echo { number: 7, sent_us: 1_487_700, took_us: 12_300 });
        assert_eq!(Echo::parse("PING 203.0.113.1 from 100.64.0.1 : 56(84) bytes of data.", 0), None);
        assert_eq!(Echo::parse("[1.0] From 203.0.113.1 icmp_seq=1 Destination Host Unreachable", 0), None);
    }

    #[test]
    fn what_did_not_come_back_is_lost_at_the_time_when_it_was_sent() {
        let mut echoes = Echoes::default();
        for number in [1, 2, 5, 5] {
            echoes.add(echo(number));
        }
        let lost: Vec<_> = echoes.samples().into_iter().filter(|s| s.took_us.is_none()).collect();
        assert_eq!(lost.iter().map(|s| s.at_us).collect::<Vec<_>>(), [24_000, 32_000]);
        assert_eq!(echoes.twice_at_us, [40_000]);
    }

    #[test]
    fn numbers_go_round() {
        let mut echoes = Echoes::default();
        for number in [65_534, 65_535, 0, 1] {
            echoes.add(Echo { sent_us: 0, ..echo(number) });
        }
        assert_eq!(echoes.came.keys().copied().collect::<Vec<_>>(), [65_534, 65_535, 65_536, 65_537]);
    }
}
