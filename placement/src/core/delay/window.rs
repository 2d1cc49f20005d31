//! What was measured of one delay: robust against single samples that are wrong, less sure with age, forgotten in the end.

use flow::Micros;

use super::Guess;

/// Samples of so long are one bucket, of which the least counts: what delays an answer (a queue of connections to accept, a
/// client that acknowledges late) only ever adds.
const BUCKET: Micros = Micros(15_000_000);
/// Buckets that are kept; so a way that became longer is believed after at most two minutes.
const BUCKETS: usize = 8;
/// What nobody measures again is forgotten after so long.
pub(super) const AGE_MAX: Micros = Micros(600_000_000);
/// Longest round trip that is taken, in milliseconds.
pub(super) const MS_MAX: f64 = 60_000.0;
/// Standard deviation of one sample, in milliseconds of a round trip.
const SAMPLE_SD_MS: f64 = 3.0;
/// Standard deviation that no number of samples takes away.
const FLOOR_SD_MS: f64 = 0.5;
/// What is known fades: after so long without a sample, the samples so far count half.
const FADES: Micros = Micros(60_000_000);
/// Ways change: standard deviation that is added per minute without a sample, in milliseconds.
const DRIFT_MS_PER_MIN: f64 = 1.0;
/// More samples than this make nothing surer.
const SAMPLES_MAX: f64 = 64.0;

/// Round trips of one way over time, in milliseconds.
///
/// The value is the second least of the buckets of the last two minutes (of fewer than three, the least): one sample that is far
/// too long or too short moves it to a neighbour at most. The variance follows from how many samples there are and how old
/// they are, not from their values: so a sample never makes less sure, and age never surer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Window {
    /// Oldest first: least of each, and when it began.
    buckets: [(f32, Micros); BUCKETS],
    len: u8,
    /// Samples that count, as of the last.
    samples: f32,
    last: Micros,
}

impl Window {
    pub(super) fn new() -> Self {
        Self { buckets: [(0.0, Micros(0)); BUCKETS], len: 0, samples: 0.0, last: Micros(0) }
    }

    /// Takes the least of `count` samples, in milliseconds; what is no round trip is left out.
    pub(super) fn add(&mut self, ms: f64, count: u32, now: Micros) {
        if !(0.0..=MS_MAX).contains(&ms) || count == 0 {
            return;
        }
        let age = now.since(self.last);
        if age > AGE_MAX {
            *self = Self::new();
        }
        let samples = (self.left(age) + f64::from(count)).min(SAMPLES_MAX);
        self.samples = samples as f32;
        self.last = now;
        let ms = ms as f32;
        match self.buckets[..usize::from(self.len)].last_mut() {
            Some(last) if now.since(last.1) < BUCKET => last.0 = last.0.min(ms),
            _ => self.push((ms, now)),
        }
    }

    fn push(&mut self, bucket: (f32, Micros)) {
        if usize::from(self.len) == BUCKETS {
            self.buckets.rotate_left(1);
            self.len -= 1;
        }
        self.buckets[usize::from(self.len)] = bucket;
        self.len += 1;
    }

    /// Samples that still count after so long.
    fn left(&self, age: Micros) -> f64 {
        f64::from(self.samples) / (1.0 + age.0 as f64 / FADES.0 as f64)
    }

    /// What the round trip is thought to be; nothing once it is forgotten.
    pub(super) fn guess(&self, now: Micros) -> Option<(Guess, Micros)> {
        let age = now.since(self.last);
        if self.len == 0 || age > AGE_MAX {
            return None;
        }
        let mut least = [f32::INFINITY; 2];
        let fresh = |(_, at): &&(f32, Micros)| self.last.since(*at) <= Micros(BUCKET.0 * BUCKETS as u64);
        let mut count = 0;
        for (ms, _) in self.buckets[..usize::from(self.len)].iter().filter(fresh) {
            count += 1;
            if *ms < least[0] {
                least = [*ms, least[0]];
            } else {
                least[1] = least[1].min(*ms);
            }
        }
        let ms = if count < 3 { least[0] } else { least[1] };
        let drift = DRIFT_MS_PER_MIN * age.0 as f64 / 60e6;
        let sample = SAMPLE_SD_MS * SAMPLE_SD_MS / self.left(age).max(1e-3);
        let variance = sample + FLOOR_SD_MS * FLOOR_SD_MS + drift * drift;
        Some((Guess { ms: f64::from(ms), variance }, age))
    }

    /// When it was measured last.
    pub(super) fn last(&self) -> Micros {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: u64 = 1_000_000;

    fn fed(samples: impl IntoIterator<Item = (f64, u64)>) -> Window {
        let mut window = Window::new();
        samples.into_iter().for_each(|(ms, s)| window.add(ms, 1, Micros(s * S)));
        window
    }

    fn ms(window: &Window, s: u64) -> f64 {
        window.guess(Micros(s * S)).unwrap().0.ms
    }

    #[test]
    fn one_sample_that_is_far_off_moves_little_whichever_way() {
        for (at, wrong) in [(40, 900.0), (40, 0.1), (0, 900.0), (119, 0.1)] {
            let window = fed((0..120).map(|s| if s == at { (wrong, s) } else { (30.0 + (s % 7) as f64, s) }));
            assert!((ms(&window, 120) - 30.0).abs() < 1.5, "{wrong} at {at}: {}", ms(&window, 120));
        }
    }

    #[test]
    fn answers_that_are_often_late_do_not_hide_the_way() {
        let window = fed((0..120).map(|s| (if s % 5 == 0 { 20.0 } else { 60.0 }, s)));
        assert_eq!(ms(&window, 120), 20.0);
    }

    #[test]
    fn a_way_that_became_longer_or_shorter_is_believed_within_two_minutes() {
        for (before, after) in [(20.0, 80.0), (80.0, 20.0)] {
            let window = fed((0..300).map(|s| (if s < 120 { before } else { after }, s)));
            assert_eq!(ms(&window, 300), after);
        }
    }

    #[test]
    fn what_nobody_measures_again_is_forgotten() {
        let window = fed([(20.0, 0)]);
        assert!(window.guess(AGE_MAX).is_some());
        assert_eq!(window.guess(AGE_MAX.plus(Micros(1))), None);
        let mut again = window;
        again.add(70.0, 1, AGE_MAX.plus(Micros(1)));
        assert_eq!(ms(&again, 601), 70.0);
    }

    proptest! {
        /// Whatever comes: finite, not negative; a sample never makes less sure, and age never surer.
        #[test]
        fn samples_make_surer_and_age_less_sure(
            samples in proptest::collection::vec((any::<f64>(), 0u32..200, 0u64..200_000_000), 1..40),
            wait in 0u64..700_000_000,
        ) {
            let (mut window, mut now) = (Window::new(), Micros(5));
            for (ms, count, later) in samples {
                let before = window.guess(now);
                let waited = window.guess(now.plus(Micros(later)));
                if let (Some((before, _)), Some((waited, _))) = (before, waited) {
                    prop_assert!(waited.variance >= before.variance);
                }
                now = now.plus(Micros(later));
                window.add(ms, count, now);
                if let (Some((before, _)), Some((after, _))) = (waited, window.guess(now)) {
                    prop_assert!(after.variance <= before.variance * (1.0 + 1e-6), "{before:?} {after:?}");
                }
                if let Some((guess, _)) = window.guess(now.plus(Micros(wait))) {
                    prop_assert!((0.0..=MS_MAX).contains(&guess.ms));
                    prop_assert!(guess.variance.is_finite() && guess.variance > 0.0);
                }
            }
        }
    }
}
