//! What likeness says of server prefixes, kept from round to round: to reckon it takes some hundred microseconds each, and little of what it
//! follows from changes in a second.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use flow::Micros;

use crate::likeness::{Estimate, Likeness, OFFSET_MS, Seen, Spot};

/// A delay that changed by less than this share is the same.
const SAME_SHARE: f32 = 0.03;
/// A standard deviation that changed by less than this factor is the same.
const SAME_SD: f32 = 1.5;
/// Kept for so long at most, and for up to half of that longer, so that not all are due at once.
const KEPT_FOR: Micros = Micros(60_000_000);

/// What was thought of a server prefix, and what of.
struct Thought {
    at: Micros,
    seen: Vec<Seen>,
    spot: Option<Spot>,
    estimates: Arc<[Estimate]>,
    /// From where it is best measured next, and what that gains; once it was asked for.
    next: Option<(usize, f32)>,
}

impl Thought {
    fn holds(&self, number: u32, seen: &[Seen], spot: Option<Spot>, now: Micros) -> bool {
        let longer = KEPT_FOR.0 / 2 * u64::from(number % 16) / 16;
        self.spot == spot
            && self.seen.len() == seen.len()
            && now.since(self.at) < Micros(KEPT_FOR.0 + longer)
            && self.seen.iter().zip(seen).all(|(before, after)| is_same(before, after))
    }
}

fn is_same(before: &Seen, after: &Seen) -> bool {
    let (low, high) = (before.sd_ms.min(after.sd_ms), before.sd_ms.max(after.sd_ms));
    before.site == after.site && is_same_delay(before.ms, after.ms) && high <= SAME_SD * low
}

fn is_same_delay(before: f32, after: f32) -> bool {
    (before - after).abs() <= SAME_SHARE * (before + OFFSET_MS)
}

/// The ways between the sites in milliseconds of a round trip, and where the sites are.
pub(super) struct Sites {
    pub(super) rows: Vec<Vec<f32>>,
    pub(super) places: Vec<Option<(f64, f64)>>,
}

impl Sites {
    fn is_same(&self, other: &Self) -> bool {
        let rows = self.rows.iter().flatten().zip(other.rows.iter().flatten());
        self.places == other.places && rows.into_iter().all(|(before, after)| is_same_delay(*before, *after))
    }
}

/// Likeness by the sites of one moment, and what it said since.
pub(super) struct Known {
    at: Micros,
    sites: Sites,
    likeness: Likeness,
    thoughts: Mutex<BTreeMap<u32, Thought>>,
}

impl Known {
    /// What is thought of a server prefix.
    pub(super) fn of(&self, number: u32, seen: &[Seen], spot: Option<Spot>, now: Micros) -> Arc<[Estimate]> {
        let mut thoughts = self.thoughts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thought) = thoughts.get(&number).filter(|thought| thought.holds(number, seen, spot, now))
        {
            return Arc::clone(&thought.estimates);
        }
        let estimates: Arc<[Estimate]> = self.likeness.estimate(Some(number.into()), seen, spot).into();
        let thought =
            Thought { at: now, seen: seen.to_vec(), spot, estimates: Arc::clone(&estimates), next: None };
        thoughts.insert(number, thought);
        estimates
    }
}

/// The last of them. Copies of a model share it: each round of a leader works on a copy.
#[derive(Clone, Default)]
pub(super) struct Thoughts(Arc<Mutex<Option<Arc<Known>>>>);

impl Thoughts {
    /// From which site a server prefix is best measured next, of those that may, and what that gains in milliseconds of a round trip; nothing
    /// where it was not thought of.
    pub(super) fn next(&self, number: u32, may: impl Fn(usize) -> bool) -> Option<(usize, f32)> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let mut thoughts = known.thoughts.lock().unwrap_or_else(PoisonError::into_inner);
        let thought = thoughts.get_mut(&number)?;
        if thought.next.is_none_or(|(site, _)| !may(site)) {
            let Thought { seen, spot, .. } = &*thought;
            thought.next = known.likeness.next_of(Some(number.into()), seen, *spot, may);
        }
        thought.next
    }

    /// Likeness for these sites: made anew where they or the ways between them are others, and once in a while; `learn` gives it the places
    /// that are known well.
    pub(super) fn look(&self, sites: Sites, now: Micros, learn: impl FnOnce(&mut Likeness)) -> Arc<Known> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let same = last.filter(|known| known.sites.is_same(&sites));
        if let Some(known) = same.as_ref().filter(|known| now.since(known.at) < KEPT_FOR) {
            return Arc::clone(known);
        }
        let mut likeness = Likeness::new(&sites.rows, &sites.places);
        learn(&mut likeness);
        // What was thought of them stays until its time is over.
        let taken = |known: Arc<Known>| {
            std::mem::take(&mut *known.thoughts.lock().unwrap_or_else(PoisonError::into_inner))
        };
        let thoughts = Mutex::new(same.map(taken).unwrap_or_default());
        let known = Arc::new(Known { at: now, sites, likeness, thoughts });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&known));
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    fn sites(ms: f32) -> Sites {
        let row = |a: usize| (0..3_usize).map(|b| ms * a.abs_diff(b) as f32).collect();
        Sites { rows: (0..3).map(row).collect(), places: vec![None; 3] }
    }

    fn seen(ms: f32) -> [Seen; 2] {
        [Seen { site: 0, ms, sd_ms: 1.0 }, Seen { site: 2, ms: 80.0, sd_ms: 1.0 }]
    }

    #[test]
    fn what_has_hardly_changed_is_thought_once_and_again_after_a_while() {
        let thoughts = Thoughts::default();
        let first = thoughts.look(sites(40.0), Micros(0), |_| {}).of(1, &seen(30.0), None, Micros(0));
        // As a round of a leader does.
        let copy = thoughts.clone();
        let known = copy.look(sites(40.5), Micros(S), |_| panic!("the ways are the same"));
        let same = |ms: f32, s: u64| Arc::ptr_eq(&first, &known.of(1, &seen(ms), None, Micros(s * S)));
        assert!(same(30.5, 1) && same(29.6, 59));
        assert!(!same(30.5, 95), "it is old");
        assert!(!same(40.0, 96), "it is another delay");
    }

    #[test]
    fn other_ways_between_the_sites_make_all_be_thought_anew() {
        let thoughts = Thoughts::default();
        let first = thoughts.look(sites(40.0), Micros(0), |_| {}).of(1, &seen(30.0), None, Micros(0));
        let other = thoughts.look(sites(60.0), Micros(S), |_| {}).of(1, &seen(30.0), None, Micros(S));
        assert_ne!(first[1].ms, other[1].ms);
    }

    #[test]
    fn a_site_more_is_never_met_with_thoughts_of_fewer() {
        let thoughts = Thoughts::default();
        let few = thoughts.look(sites(40.0), Micros(0), |_| {});
        assert_eq!(few.of(1, &seen(30.0), None, Micros(0)).len(), 3);
        let more = Sites { rows: vec![vec![40.0; 4]; 4], places: vec![None; 4] };
        let many = thoughts.look(more, Micros(1), |_| {});
        assert_eq!(many.of(1, &seen(30.0), None, Micros(1)).len(), 4);
        assert_eq!(few.of(2, &seen(30.0), None, Micros(1)).len(), 3, "a round that is not over yet");
    }
}
