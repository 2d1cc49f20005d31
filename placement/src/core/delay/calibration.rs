//! Whether what the model says of ways that nobody measured is true: of those that are measured for the first time, how many lie within two
//! standard deviations of what was thought of them just before. Of honest estimates 95 of 100 do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use flow::{Micros, Prefix, SiteId};
use serde::Serialize;

use super::{Leg, Near, Source};

/// Server prefixes whose estimates are noted; of more none are until some are forgotten.
const PREFIXES_MAX: usize = 4_096;
/// An estimate that was not made again for so long does not count: the leader has not thought of that prefix since.
const AGE_MAX: Micros = Micros(60_000_000);
/// Standard deviations within which an estimate is said to hold.
const WITHIN: f32 = 2.0;

/// What an estimate rests on, in words.
pub const BASES: [&str; 4] = ["likeness", "near", "geography", "assumed"];

fn basis(source: Source) -> Option<usize> {
    match source {
        Source::Borrowed { from: Near::Likeness, .. } => Some(0),
        Source::Borrowed { .. } => Some(1),
        Source::Geography => Some(2),
        Source::Assumed | Source::Unknown => Some(3),
        Source::Same | Source::Measured { .. } => None,
    }
}

/// Calibration that were put to the test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tested {
    /// All of them.
    pub tested: u64,
    /// Those within two standard deviations.
    pub held: u64,
}

/// An estimate of the way from one site, one way in milliseconds.
#[derive(Clone, Copy)]
struct Estimated {
    site: SiteId,
    ms: f32,
    sd_ms: f32,
    basis: usize,
}

#[derive(Default)]
struct State {
    of: BTreeMap<Prefix, (Micros, Vec<Estimated>)>,
    tested: [Tested; BASES.len()],
}

/// What was estimated, and what became of it. Copies of a model share it: rounds of a leader work on a copy.
#[derive(Clone, Default)]
pub(super) struct Calibration(Arc<Mutex<State>>);

impl Calibration {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is thought of a server prefix from each site.
    pub(super) fn note<'l>(
        &self,
        prefix: Prefix,
        legs: impl Iterator<Item = (SiteId, &'l Leg)>,
        now: Micros,
    ) {
        let mut state = self.state();
        if state.of.len() >= PREFIXES_MAX && !state.of.contains_key(&prefix) {
            return;
        }
        let estimated = |(site, leg): (SiteId, &Leg)| {
            let basis = basis(leg.source)?;
            Some(Estimated { site, ms: leg.ms as f32, sd_ms: leg.sd_ms as f32, basis })
        };
        let (at, noted) = state.of.entry(prefix).or_default();
        *at = now;
        noted.clear();
        noted.extend(legs.filter_map(estimated));
    }

    /// Takes the first measurement of a way, one way in milliseconds. An estimate is tested once.
    pub(super) fn test(&self, prefix: &Prefix, site: SiteId, ms: f64, now: Micros) {
        let mut state = self.state();
        let State { of, tested } = &mut *state;
        let Some((at, noted)) = of.get_mut(prefix) else { return };
        let Some(place) = noted.iter().position(|known| known.site == site) else { return };
        let estimated = noted.swap_remove(place);
        if now.since(*at) > AGE_MAX {
            return;
        }
        let basis = &mut tested[estimated.basis];
        basis.tested += 1;
        basis.held += u64::from((ms as f32 - estimated.ms).abs() <= WITHIN * estimated.sd_ms);
    }

    /// Forgets prefixes that are not known.
    pub(super) fn retain(&self, is_known: impl Fn(&Prefix) -> bool) {
        self.state().of.retain(|prefix, _| is_known(prefix));
    }

    /// By [`BASES`].
    pub(super) fn tested(&self) -> [Tested; BASES.len()] {
        self.state().tested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(ms: f64, sd_ms: f64, source: Source) -> Leg {
        Leg { ms, sd_ms, source }
    }

    #[test]
    fn an_estimate_is_tested_once_by_the_first_measurement_and_only_while_it_is_fresh() {
        let calibration = Calibration::default();
        let prefix: Prefix = "192.0.2.0/24".parse().unwrap();
        let legs = [
            leg(20.0, 5.0, Source::Geography),
            leg(20.0, 5.0, Source::Borrowed { from: Near::Likeness, age: Micros(0) }),
            leg(20.0, 5.0, Source::Measured { age: Micros(0) }),
        ];
        let note = |now| calibration.note(prefix, (0..3).map(SiteId).zip(&legs), now);
        note(Micros(0));
        calibration.test(&prefix, SiteId(0), 29.9, Micros(1));
        calibration.test(&prefix, SiteId(0), 90.0, Micros(1));
        calibration.test(&prefix, SiteId(1), 9.9, Micros(1));
        calibration.test(&prefix, SiteId(2), 20.0, Micros(1));
        let [likeness, near, geography, assumed] = calibration.tested();
        assert_eq!(geography, Tested { tested: 1, held: 1 });
        assert_eq!(likeness, Tested { tested: 1, held: 0 });
        assert_eq!((near, assumed), (Tested::default(), Tested::default()));
        note(Micros(2));
        calibration.test(&prefix, SiteId(0), 20.0, AGE_MAX.plus(Micros(3)));
        assert_eq!(calibration.tested()[2].tested, 1, "nobody has thought of it for a minute");
        note(Micros(4));
        calibration.retain(|_| false);
        calibration.test(&prefix, SiteId(1), 20.0, Micros(5));
        assert_eq!(calibration.tested()[0].tested, 1);
    }

    #[test]
    fn what_is_estimated_takes_bounded_memory() {
        let calibration = Calibration::default();
        let leg = leg(20.0, 5.0, Source::Geography);
        for n in 0..=PREFIXES_MAX as u32 {
            let prefix = Prefix::containing(std::net::Ipv4Addr::from(n << 8).into(), 24).unwrap();
            calibration.note(prefix, std::iter::once((SiteId(0), &leg)), Micros(0));
        }
        assert_eq!(calibration.state().of.len(), PREFIXES_MAX);
    }
}
