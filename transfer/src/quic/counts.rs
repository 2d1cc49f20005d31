//! What became of what peers began, and which of it is worth a line in the log.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What became of a handshake, connection or stream that a peer began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The handshake is done and the peer let in.
    Accepted,
    /// The handshake failed: no certificate, or one that is of no use here.
    Failed,
    /// The handshake was not completed in time.
    TimedOut,
    /// The peer was asked to show that it receives at its address.
    Retried,
    /// Newer handshakes of the same address took its place.
    GaveWay,
    /// Nothing was answered, for too many handshakes are under way.
    Ignored,
    /// The peer is known and not served, or there are too many connections.
    Refused,
    /// The peer has made newer connections.
    Replaced,
    /// A stream of an unknown kind, silent, or beyond a bound.
    StreamRefused,
}

impl Outcome {
    /// All, in the order of their declaration.
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::Failed,
        Self::TimedOut,
        Self::Retried,
        Self::GaveWay,
        Self::Ignored,
        Self::Refused,
        Self::Replaced,
        Self::StreamRefused,
    ];

    /// As a label of a metric.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Retried => "retried",
            Self::GaveWay => "gave_way",
            Self::Ignored => "ignored",
            Self::Refused => "refused",
            Self::Replaced => "replaced",
            Self::StreamRefused => "stream_refused",
        }
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Outcome::ALL.len()]);

impl Counts {
    pub(super) fn add(&self, outcome: Outcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often that has happened.
    #[must_use]
    pub fn count(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}

/// Between two lines about the same thing.
const INTERVAL: Duration = Duration::from_secs(60);
/// Things that are remembered; a peer that makes up new ones has all the others' lines, not the memory.
const KEYS_MAX: usize = 256;

/// Lets the same line into the log once a minute.
#[derive(Debug, Default)]
pub struct Notices(Mutex<BTreeMap<String, (Instant, u64)>>);

impl Notices {
    /// Whether a line is due: if so, how many were kept back since the last.
    #[must_use]
    pub fn due(&self, key: &str) -> Option<u64> {
        self.due_at(key, Instant::now())
    }

    fn due_at(&self, key: &str, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= KEYS_MAX && !said.contains_key(key) {
            said.retain(|_, (at, _)| now.duration_since(*at) < INTERVAL);
        }
        let key = if said.len() >= KEYS_MAX && !said.contains_key(key) { "" } else { key };
        match said.get_mut(key) {
            Some((at, kept)) if now.duration_since(*at) < INTERVAL => {
                *kept += 1;
                None
            }
            Some((at, kept)) => {
                *at = now;
                Some(std::mem::take(kept))
            }
            None => {
                said.insert(key.to_owned(), (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_is_counted_for_itself() {
        let counts = Counts::default();
        for (times, outcome) in Outcome::ALL.into_iter().enumerate() {
            (0..times).for_each(|_| counts.add(outcome));
        }
        for (times, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(counts.count(outcome), times as u64, "{}", outcome.label());
        }
    }

    #[test]
    fn the_same_line_comes_once_a_minute_and_says_how_many_were_kept_back() {
        let notices = Notices::default();
        let start = Instant::now();
        let due = |key, after| notices.due_at(key, start + after);
        assert_eq!(due("a", Duration::ZERO), Some(0));
        assert_eq!(
            (due("a", INTERVAL / 2), due("a", INTERVAL / 2), due("b", INTERVAL / 2)),
            (None, None, Some(0))
        );
        assert_eq!((due("a", INTERVAL), due("a", INTERVAL)), (Some(2), None));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let notices = Notices::default();
        let now = Instant::now();
        let lines = (0..10 * KEYS_MAX).filter(|at| notices.due_at(&at.to_string(), now).is_some()).count();
        assert_eq!(lines, KEYS_MAX + 1);
        assert!(notices.0.lock().unwrap().len() <= KEYS_MAX + 1);
    }
}
