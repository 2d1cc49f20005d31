//! The one clock of simulated networks.

use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

/// Time since a start, shared by copies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(now())
    }

    pub(crate) fn nanos(self) -> u64 {
        u64::try_from(now().duration_since(self.0).as_nanos()).unwrap_or(u64::MAX)
    }

    /// When that was, of which the kernel noted the wall clock; at the latest now.
    pub(crate) fn nanos_at(self, wall: TimeSpec) -> u64 {
        let past = clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from).unwrap_or_default();
        let age = past.saturating_sub(Duration::from(wall));
        self.nanos().saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX))
    }

    pub(crate) fn micros(self) -> u64 {
        self.nanos() / 1_000
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "emulated networks run in real time; this is where they read it"
)]
fn now() -> Instant {
    Instant::now()
}
