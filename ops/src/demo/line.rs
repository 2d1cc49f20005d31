//! One direction of an emulated line: delay, jitter, rate, queue and loss. Sans-IO: packets and the time go in, packets
//! that are due come out. Packets never pass one another.

use std::collections::VecDeque;
use std::time::Duration;

use flow::sample::Seeded;

/// How a line behaves.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LineSpec {
    /// One-way delay.
    pub(crate) delay: Duration,
    /// Added to the delay, uniform from zero to this.
    pub(crate) jitter: Duration,
    /// Rate in bytes per second; 0 for no limit.
    pub(crate) rate_bytes_per_s: u64,
    /// Bytes that may wait for the rate; more are dropped.
    pub(crate) queue_bytes_max: u64,
    /// Share of packets lost, `0..=1`.
    pub(crate) loss: f64,
}

impl LineSpec {
    /// A constant delay, and neither limit nor loss.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn new(delay: Duration) -> Self {
        Self { delay, jitter: Duration::ZERO, rate_bytes_per_s: 0, queue_bytes_max: u64::MAX, loss: 0.0 }
    }
}

struct Waiting {
    release: u64,
    bytes: Vec<u8>,
}

/// A line while it runs. Times are nanoseconds.
pub(crate) struct Line {
    spec: LineSpec,
    queue: VecDeque<Waiting>,
    /// When the last byte accepted so far has left at the rate.
    sent_at: u64,
    release_last: u64,
    /// On top of the specification, for a while: delay and jitter.
    extra: (u64, u64),
    rng: Seeded,
}

impl Line {
    pub(crate) fn new(spec: LineSpec, seed: u64) -> Self {
        Self {
            spec,
            queue: VecDeque::new(),
            sent_at: 0,
            release_last: 0,
            extra: (0, 0),
            rng: Seeded::new(seed),
        }
    }

    /// What comes from now on takes longer by so much, and by up to so much; nanoseconds.
    pub(crate) fn slow_down(&mut self, delay: u64, jitter: u64) {
        self.extra = (delay, jitter);
    }

    /// When the next packet is due.
    pub(crate) fn next_release(&self) -> Option<u64> {
        self.queue.front().map(|waiting| waiting.release)
    }

    /// Takes a packet, into a buffer of `spare` where there is one; the bytes that now wait for the rate. `None` when the
    /// packet was lost, or does not fit the queue.
    pub(crate) fn accept(&mut self, bytes: &[u8], now: u64, spare: &mut Vec<Vec<u8>>) -> Option<u64> {
        let backlog = self.backlog(now).saturating_add(bytes.len() as u64);
        let lost = self.spec.loss > 0.0 && self.rng.fraction() < self.spec.loss;
        if lost || backlog > self.spec.queue_bytes_max {
            return None;
        }
        self.sent_at = self.sent_at.max(now) + self.nanos_of(bytes.len() as u64);
        let (delay, jitter) = (nanos(self.spec.delay) + self.extra.0, nanos(self.spec.jitter) + self.extra.1);
        let jitter = if jitter == 0 { 0 } else { self.rng.below(jitter + 1) };
        self.release_last = self.release_last.max(self.sent_at + delay + jitter);
        let mut copy = spare.pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(bytes);
        self.queue.push_back(Waiting { release: self.release_last, bytes: copy });
        Some(backlog)
    }

    /// How many packets are due.
    pub(crate) fn due(&self, now: u64) -> usize {
        self.queue.partition_point(|waiting| waiting.release <= now)
    }

    /// The packets, the first one due first.
    pub(crate) fn packets(&self) -> impl Iterator<Item = &[u8]> {
        self.queue.iter().map(|waiting| waiting.bytes.as_slice())
    }

    /// Removes the first packets, whose buffers the caller may give back as spare ones.
    pub(crate) fn drain(&mut self, count: usize) -> impl Iterator<Item = Vec<u8>> {
        self.queue.drain(..count).map(|waiting| waiting.bytes)
    }

    /// Bytes that wait for the rate.
    fn backlog(&self, now: u64) -> u64 {
        let wait = u128::from(self.sent_at.saturating_sub(now));
        let bytes = wait * u128::from(self.spec.rate_bytes_per_s) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    fn nanos_of(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(1_000_000_000).checked_div(self.spec.rate_bytes_per_s).unwrap_or(0)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn accepted(line: &mut Line, len: usize, now: u64) -> bool {
        line.accept(&vec![0; len], now, &mut Vec::new()).is_some()
    }

    #[test]
    fn a_packet_is_due_after_its_delay_and_the_time_that_the_rate_takes() {
        let spec = LineSpec { rate_bytes_per_s: 100_000, ..LineSpec::new(Duration::from_millis(20)) };
        let mut line = Line::new(spec, 1);
        assert!(accepted(&mut line, 1_000, 0) && accepted(&mut line, 1_000, 0));
        assert_eq!(line.next_release(), Some(30 * MS));
        assert_eq!((line.due(30 * MS - 1), line.due(30 * MS), line.due(40 * MS)), (0, 1, 2));
        assert_eq!(line.drain(1).count(), 1);
        assert_eq!(line.next_release(), Some(40 * MS));
    }

    #[test]
    fn a_line_that_is_slowed_down_keeps_order_when_it_is_itself_again() {
        let mut line = Line::new(LineSpec::new(Duration::from_millis(5)), 1);
        line.slow_down(300 * MS, 0);
        assert!(accepted(&mut line, 10, 0));
        assert_eq!(line.next_release(), Some(305 * MS));
        line.slow_down(0, 0);
        assert!(accepted(&mut line, 11, 100 * MS));
        assert_eq!((line.due(305 * MS - 1), line.due(305 * MS)), (0, 2), "the second waits for the first");
        assert!(accepted(&mut line, 12, 400 * MS));
        assert_eq!((line.due(404 * MS), line.due(405 * MS)), (2, 3));
    }

    #[test]
    fn a_full_queue_takes_nothing_more() {
        let spec =
            LineSpec { rate_bytes_per_s: 1_000, queue_bytes_max: 2_500, ..LineSpec::new(Duration::ZERO) };
        let mut line = Line::new(spec, 1);
        assert!(accepted(&mut line, 1_000, 0) && accepted(&mut line, 1_000, 0));
        assert!(!accepted(&mut line, 1_000, 0));
        assert!(accepted(&mut line, 1_000, 1_000 * MS));
    }

    #[test]
    fn jitter_changes_no_order_and_loss_is_what_was_asked_for() {
        let spec = LineSpec {
            jitter: Duration::from_millis(10),
            loss: 0.2,
            ..LineSpec::new(Duration::from_millis(1))
        };
        let mut line = Line::new(spec, 7);
        let taken: Vec<u8> = (0..=255)
            .filter(|number| line.accept(&[*number], u64::from(*number), &mut Vec::new()).is_some())
            .collect();
        assert!((170..=230).contains(&taken.len()), "{}", taken.len());
        let mut releases = Vec::new();
        let mut came = Vec::new();
        while let Some(release) = line.next_release() {
            releases.push(release);
            came.extend(line.drain(1).flatten());
        }
        assert_eq!(came, taken);
        assert!(releases.is_sorted());
    }
}
