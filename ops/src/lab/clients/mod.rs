//! What clients do, each with the programs that people use, and what each of them saw.

pub(super) mod download;
pub(super) mod http;
pub(super) mod iperf;
pub(super) mod ping;
pub(super) mod servers;
pub(super) mod ssh;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// One thing that a client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// When it began, since the lab's start.
    pub(super) at_us: u64,
    /// How long it took; `None` when it failed.
    pub(super) took_us: Option<u64>,
}

/// Samples of one client, in the order in which they ended. Copies share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Arc<Mutex<Vec<Sample>>>);

impl Samples {
    pub(super) fn push(&self, at_us: u64, took_us: Option<u64>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Sample { at_us, took_us });
    }

    pub(super) fn all(&self) -> Vec<Sample> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Latencies of some time, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) count: usize,
    pub(super) failed: usize,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) max_ms: f64,
}

impl Latency {
    /// Of these samples. Percentiles are those of the nearest rank.
    pub(super) fn of<'a>(samples: impl Iterator<Item = &'a Sample>) -> Self {
        let (mut took, mut failed) = (Vec::new(), 0);
        for sample in samples {
            match sample.took_us {
                Some(us) => took.push(us),
                None => failed += 1,
            }
        }
        took.sort_unstable();
        let rank = |share: usize| {
            let at = (took.len() * share).div_ceil(100).saturating_sub(1);
            took.get(at).map_or(0.0, |us| ms(*us))
        };
        Self { count: took.len() + failed, failed, p50_ms: rank(50), p99_ms: rank(99), max_ms: rank(100) }
    }
}

/// Milliseconds with two decimals.
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(super) fn ms(us: u64) -> f64 {
    (us as f64 / 10.0).round() / 100.0
}

/// One second of a client.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Second {
    /// Since the lab's start.
    pub(super) second: u64,
    #[serde(flatten)]
    pub(super) latency: Latency,
}

/// Latencies per second, by when things began.
pub(super) fn per_second(samples: &[Sample]) -> Vec<Second> {
    let mut seconds: BTreeMap<u64, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        seconds.entry(sample.at_us / 1_000_000).or_default().push(sample);
    }
    let second =
        |(second, samples): (u64, Vec<&Sample>)| Second { second, latency: Latency::of(samples.into_iter()) };
    seconds.into_iter().map(second).collect()
}

/// Bytes that had arrived at a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Rate {
    /// Since the lab's start.
    pub(super) second: u64,
    pub(super) mbit_per_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_has_its_own_percentiles_and_failures() {
        let sample = |at_us, took_us| Sample { at_us, took_us };
        let samples: Vec<_> = (1..=100)
            .map(|i| sample(i, Some(i * 1_000)))
            .chain([sample(1_500_000, None), sample(1_600_000, Some(5_000))])
            .collect();
        let seconds = per_second(&samples);
        let first = seconds[0].latency;
        assert_eq!((first.count, first.p50_ms, first.p99_ms, first.max_ms), (100, 50.0, 99.0, 100.0));
        let last = seconds[1];
        assert_eq!(
            (last.second, last.latency.count, last.latency.failed, last.latency.max_ms),
            (1, 2, 1, 5.0)
        );
    }
}
