//! How far a place is from all sites, when it was measured from few: by its likeness to places that are known.
//!
//! A place is a client or server prefix, or a group with all its servers. The sites measure one another all the time, so each is
//! a place that is known from everywhere; places that were measured before are known too, less well. A new place that was
//! measured from some sites is like those known places that have the same delays from there, but for a stretch of its
//! own that all sites have to cover (its access line). Each known place is a hypothesis; what was measured gives its weight; the
//! estimate is their mean in the logarithm of the delay, and their spread says how sure it is (a kernel estimate of
//! locally weighted neighbours, Atkeson, Moore, Schaal, AI Review 11, 1997; the shared stretch is the height of
//! Dabek et al., Vivaldi, SIGCOMM 2004).
//!
//! Sans-IO and deterministic: same knowledge, same estimate, on every node.

use std::collections::VecDeque;

use crate::solver::softmin::{exp, ln};

/// Places that were learned and are kept; the oldest goes first.
pub const LEARNED_LEN_MAX: usize = 1024;

/// Added to delays before the logarithm, in milliseconds: below it, differences mean little.
pub(crate) const OFFSET_MS: f32 = 5.0;
/// How well two places that are alike agree, in the logarithm.
const SPREAD: f32 = 0.2;
/// A measurement of this age counts as one with a spread of [`SPREAD`] more.
const AGING_S: f32 = 3600.0;
/// A place with this much of a stretch of its own is less likely by a factor of e.
const STRETCH_MS: f32 = 30.0;
/// What a learned place counts against a site: its row is an estimate in parts.
const LEARNED_WEIGHT: f32 = 0.3;
/// Round trip within a site.
const SELF_MS: f32 = 1.0;
/// Places this far apart, in kilometres, are alike less often by a factor of e.
const ALIKE_KM: f32 = 500.0;
/// Longest delay that is taken, in milliseconds.
const MS_MAX: f32 = 60_000.0;

/// A delay that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// From which site, by index.
    pub site: usize,
    /// Round trip in milliseconds.
    pub ms: f32,
    /// How long ago, in seconds.
    pub age_s: f32,
}

/// A delay that is thought to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Round trip in milliseconds.
    pub ms: f32,
    /// Standard deviation of its logarithm: 0.2 is a fifth of the delay, more or less.
    pub spread: f32,
    /// It was measured from this very site.
    pub measured: bool,
}

/// A place by its delays from all sites.
#[derive(Clone, Debug)]
struct Known {
    /// Milliseconds, by site.
    ms: Vec<f32>,
    weight: f32,
}

/// What is known of places.
#[derive(Clone, Debug)]
pub struct Likeness {
    sites: Vec<Known>,
    learned: VecDeque<Known>,
    /// The site from which a first measurement tells most.
    first: usize,
}

impl Likeness {
    /// From the round trips between the sites in milliseconds, `mesh[a][b]`; the diagonal is not read. What is no delay counts as
    /// the median of its row. Rows that are short are filled up likewise.
    #[must_use]
    pub fn new(mesh: &[Vec<f32>]) -> Self {
        let len = mesh.len();
        let row = |a: usize| {
            let usable = |b: usize| mesh[a].get(b).copied().filter(|ms| (0.0..=MS_MAX).contains(ms));
            let mut known: Vec<f32> = (0..len).filter(|&b| b != a).filter_map(usable).collect();
            known.sort_by(f32::total_cmp);
            let median = known.get(known.len() / 2).copied().unwrap_or(SELF_MS);
            (0..len).map(|b| if a == b { SELF_MS } else { usable(b).unwrap_or(median) }).collect()
        };
        let sites: Vec<Known> = (0..len).map(|a| Known { ms: row(a), weight: 1.0 }).collect();
        let first = (0..len).max_by(|&a, &b| tells(&sites, a).total_cmp(&tells(&sites, b)).then(b.cmp(&a)));
        Self { first: first.unwrap_or(0), sites, learned: VecDeque::new() }
    }

    /// Number of sites.
    #[must_use]
    pub fn sites(&self) -> usize {
        self.sites.len()
    }

    /// The delays of a place from all sites. `distance_km`, by site, where coordinates are known: near sites are then more alike.
    #[must_use]
    pub fn estimate(&self, seen: &[Seen], distance_km: Option<&[f32]>) -> Vec<Estimate> {
        let seen: Vec<Seen> = seen.iter().copied().filter(|seen| self.is_usable(seen)).collect();
        let hypotheses = self.hypotheses(&seen, distance_km);
        let sites = 0..self.sites.len();
        let mut estimates: Vec<Estimate> = sites.map(|site| mean(&hypotheses, site)).collect();
        for seen in &seen {
            estimates[seen.site] =
                Estimate { ms: seen.ms, spread: doubt(seen.age_s) - SPREAD, measured: true };
        }
        estimates
    }

    /// From which site to measure next: where the place may be nearest. `None` when all have.
    #[must_use]
    pub fn next(&self, seen: &[Seen], estimates: &[Estimate]) -> Option<usize> {
        let open = |site: &usize| !seen.iter().any(|seen| seen.site == *site);
        if seen.is_empty() && estimates.iter().all(|estimate| !estimate.measured) {
            return Some(self.first).filter(|first| *first < self.sites.len());
        }
        let hope = |site: usize| ln(estimates[site].ms + OFFSET_MS) - estimates[site].spread;
        let sites = (0..self.sites.len().min(estimates.len())).filter(open);
        sites.min_by(|&a, &b| hope(a).total_cmp(&hope(b)).then(a.cmp(&b)))
    }

    /// Remembers a place for others that are like it. One that was not measured teaches nothing.
    pub fn learn(&mut self, estimates: &[Estimate]) {
        if estimates.len() != self.sites.len() || estimates.iter().all(|estimate| !estimate.measured) {
            return;
        }
        if self.learned.len() == LEARNED_LEN_MAX {
            self.learned.pop_front();
        }
        let ms = estimates.iter().map(|estimate| estimate.ms).collect();
        self.learned.push_back(Known { ms, weight: LEARNED_WEIGHT });
    }

    fn is_usable(&self, seen: &Seen) -> bool {
        seen.site < self.sites.len() && (0.0..=MS_MAX).contains(&seen.ms) && seen.age_s >= 0.0
    }

    /// Each known place with the stretch that fits best, and how likely it is; the likelinesses sum to 1.
    fn hypotheses(&self, seen: &[Seen], distance_km: Option<&[f32]>) -> Vec<(&Known, f32, f32)> {
        let mut all: Vec<(&Known, f32, f32)> = Vec::with_capacity(self.sites.len() + self.learned.len());
        let mut stretches = Vec::with_capacity(seen.len());
        for (n, known) in self.sites.iter().chain(&self.learned).enumerate() {
            let stretch = stretch(known, seen, &mut stretches);
            let misfit = |seen: &Seen| {
                let thought = ln(known.ms[seen.site] + stretch + OFFSET_MS);
                let off = (ln(seen.ms + OFFSET_MS) - thought) / doubt(seen.age_s);
                0.5 * off * off
            };
            let far = distance_km.and_then(|km| km.get(n)).map_or(0.0, |km| km.max(0.0) / ALIKE_KM);
            let unlikely =
                seen.iter().map(misfit).sum::<f32>() + stretch / STRETCH_MS + far - ln_weight(known);
            all.push((known, stretch, unlikely));
        }
        let least = all.iter().map(|(_, _, unlikely)| *unlikely).fold(f32::INFINITY, f32::min);
        all.iter_mut().for_each(|(_, _, unlikely)| *unlikely = exp((least - *unlikely).max(-80.0)));
        let sum: f32 = all.iter().map(|(_, _, likely)| *likely).sum();
        all.iter_mut().for_each(|(_, _, likely)| *likely /= sum);
        all
    }
}

fn ln_weight(known: &Known) -> f32 {
    // Weights are at most 1, and the logarithm is made for more.
    -ln(1.0 / known.weight)
}

/// How much a measurement of this age is trusted.
fn doubt(age_s: f32) -> f32 {
    SPREAD * (1.0 + age_s / AGING_S)
}

/// What the place has more than the known one, by the median of what was seen; of one measurement only half of it, as that may as
/// well be distance.
fn stretch(known: &Known, seen: &[Seen], stretches: &mut Vec<f32>) -> f32 {
    stretches.clear();
    stretches.extend(seen.iter().map(|seen| seen.ms - known.ms[seen.site]));
    stretches.sort_by(f32::total_cmp);
    let median = match stretches.len() {
        0 => return 0.0,
        1 => stretches[0] / 2.0,
        len if len % 2 == 1 => stretches[len / 2],
        len => (stretches[len / 2 - 1] + stretches[len / 2]) / 2.0,
    };
    median.max(0.0)
}

/// Mean and spread over hypotheses of the delay from a site.
fn mean(hypotheses: &[(&Known, f32, f32)], site: usize) -> Estimate {
    let value = |(known, stretch, _): &(&Known, f32, f32)| ln(known.ms[site] + stretch + OFFSET_MS);
    let middle: f32 = hypotheses.iter().map(|all| all.2 * value(all)).sum();
    let variance: f32 = hypotheses
        .iter()
        .map(|all| {
            let off = value(all) - middle;
            all.2 * off * off
        })
        .sum();
    let spread = (variance + SPREAD * SPREAD).sqrt();
    Estimate { ms: (exp(middle) - OFFSET_MS).max(0.0), spread, measured: false }
}

/// How evenly the delays of places from a site are spread over a scale, as entropy: the more, the more one of them tells.
fn tells(places: &[Known], site: usize) -> f32 {
    let mut bins = [0_u32; 32];
    for place in places {
        let bin = (ln(place.ms[site] + OFFSET_MS) / 0.3) as usize;
        bins[bin.min(31)] += 1;
    }
    let share = |count: &u32| *count as f32 / places.len() as f32;
    bins.iter().filter(|count| **count > 0).map(|count| -share(count) * -ln(1.0 / share(count))).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sites on a line, so many milliseconds apart.
    fn line(at: &[f32]) -> Likeness {
        let mesh: Vec<Vec<f32>> =
            at.iter().map(|a| at.iter().map(|b| 2.0 + (a - b).abs()).collect()).collect();
        Likeness::new(&mesh)
    }

    fn seen(site: usize, ms: f32) -> Seen {
        Seen { site, ms, age_s: 0.0 }
    }

    fn nearest(estimates: &[Estimate]) -> usize {
        (0..estimates.len()).min_by(|&a, &b| estimates[a].ms.total_cmp(&estimates[b].ms)).unwrap()
    }

    #[test]
    fn a_place_is_like_the_site_with_the_same_delays_but_for_its_own_stretch() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        // At site 2, behind a line of 30 ms.
        let estimates = likeness.estimate(&[seen(0, 132.0), seen(3, 112.0)], None);
        assert_eq!(nearest(&estimates), 2);
        assert!((estimates[2].ms - 31.0).abs() < 8.0, "{estimates:?}");
        assert!((estimates[1].ms - 92.0).abs() < 15.0, "{estimates:?}");
        assert!(estimates[0].measured && estimates[0].ms == 132.0);
    }

    #[test]
    fn what_was_measured_elsewhere_makes_sure_and_age_makes_doubt() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        let unknown = likeness.estimate(&[], None);
        let once = likeness.estimate(&[seen(0, 42.0)], None);
        assert!(once[1].spread < unknown[1].spread, "{once:?} {unknown:?}");
        let old = likeness.estimate(&[Seen { age_s: 36_000.0, ..seen(0, 42.0) }], None);
        assert!(old[1].spread > once[1].spread && old[0].spread > once[0].spread, "{old:?} {once:?}");
    }

    #[test]
    fn coordinates_say_where_to_look_before_anything_was_measured() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        let estimates = likeness.estimate(&[], Some(&[9_000.0, 6_000.0, 100.0, 7_000.0]));
        assert_eq!(nearest(&estimates), 2);
        assert!(estimates[2].spread < likeness.estimate(&[], None)[2].spread);
    }

    #[test]
    fn places_that_were_measured_help_those_that_are_like_them() {
        // Of three sites far apart none is like places that are 60 from two of them and far from the third.
        let mesh = vec![vec![0.0, 100.0, 250.0], vec![100.0, 0.0, 250.0], vec![250.0, 250.0, 0.0]];
        let mut likeness = Likeness::new(&mesh);
        let alone = likeness.estimate(&[seen(0, 60.0)], None);
        for _ in 0..20 {
            let full = likeness.estimate(&[seen(0, 60.0), seen(1, 60.0), seen(2, 220.0)], None);
            likeness.learn(&full);
        }
        let helped = likeness.estimate(&[seen(0, 60.0)], None);
        let off = |estimates: &[Estimate]| (estimates[1].ms - 60.0).abs() + (estimates[2].ms - 220.0).abs();
        assert!(off(&helped) < 0.5 * off(&alone), "{helped:?} {alone:?}");
    }

    #[test]
    fn probes_go_where_the_place_may_be_nearest_and_end() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0, 260.0]);
        let mut known: Vec<Seen> = Vec::new();
        let truth = [101.0, 61.0, 3.0, 79.0, 161.0];
        let mut order = Vec::new();
        while let Some(site) = likeness.next(&known, &likeness.estimate(&known, None)) {
            order.push(site);
            known.push(seen(site, truth[site]));
        }
        assert_eq!(order.len(), 5);
        assert!(order[..3].contains(&2), "{order:?}");
    }

    proptest! {
        /// Whatever is given: finite, not negative, and the same again.
        #[test]
        fn estimates_are_finite_whatever_comes(
            mesh in proptest::collection::vec(proptest::collection::vec(any::<f32>(), 0..6), 0..6),
            given in proptest::collection::vec((0usize..8, any::<f32>(), any::<f32>()), 0..6),
            learn in 0usize..3,
        ) {
            let mut likeness = Likeness::new(&mesh);
            let given: Vec<Seen> = given.into_iter().map(|(site, ms, age_s)| Seen { site, ms, age_s }).collect();
            for _ in 0..=learn {
                let estimates = likeness.estimate(&given, None);
                prop_assert_eq!(estimates.len(), mesh.len());
                for estimate in &estimates {
                    prop_assert!(estimate.ms.is_finite() && estimate.ms >= 0.0, "{:?}", estimate);
                    prop_assert!(!estimate.spread.is_nan() && estimate.spread >= 0.0, "{:?}", estimate);
                }
                prop_assert_eq!(&estimates, &likeness.estimate(&given, None));
                let next = likeness.next(&given, &estimates);
                prop_assert!(next.is_none_or(|next| next < mesh.len()));
                likeness.learn(&estimates);
            }
        }
    }
}
