//! How far a place is from all sites, when it was measured from few: by its likeness to places that are known.
//!
//! A place is a client or server prefix, or a group with all its servers. The sites measure one another all the time, so each is
//! a place that is known from everywhere; places that were measured before are known too, less well. A new place that was
//! measured from some sites is like those known places that have the same delays from there, but for a stretch of its
//! own that all sites have to cover (its access line). Each known place is a hypothesis; what was measured gives its weight; the
//! estimate is their mean in the logarithm of the delay, and their spread says how sure it is (a kernel estimate of
//! locally weighted neighbours, Atkeson, Moore, Schaal, AI Review 11, 1997; the shared stretch is the height of
//! Dabek et al., Vivaldi, SIGCOMM 2004). One delay of several may be quite different where routes are odd, so misfits count by
//! Student's distribution, and long stretches by a logarithm. The next measurement goes to the site from which it is expected to be
//! below the best so far by most (expected improvement, Jones, Schonlau, Welch, J. Global Optimization 13, 1998).
//!
//! Sans-IO and deterministic: same knowledge, same estimate, on every node.

use std::collections::VecDeque;

use crate::solver::softmin::{exp, ln};

/// Places that were learned and are kept; the oldest goes first.
pub const LEARNED_LEN_MAX: usize = 1024;

/// Added to delays before the logarithm, in milliseconds: below it, differences mean little.
pub(crate) const OFFSET_MS: f32 = 5.0;
/// How well two places that are alike agree where both were measured, in the logarithm.
const MISFIT: f32 = 0.1;
/// And where one was not.
const SPREAD: f32 = 0.15;
/// Degrees of freedom of misfits: the fewer, the more a single one is put up with.
const FREEDOM: f32 = 2.0;
/// A measurement of this age counts as one with a misfit of [`MISFIT`] more.
const AGING_S: f32 = 3600.0;
/// A stretch of its own of so many milliseconds makes a place less likely by a factor of 2 to the power of [`STRETCH_POWER`].
const STRETCH_MS: f32 = 20.0;
const STRETCH_POWER: f32 = 3.0;
/// What a learned place counts against a site: its row is an estimate in parts.
const LEARNED_WEIGHT: f32 = 0.5;
/// From how many sites a place has to be measured to be learned: of one that was measured once, all but that is hearsay.
const LEARNED_MEASURED_MIN: usize = 2;
/// How much of the doubt in what a learned place was not measured from counts against it.
const LEARNED_DOUBT: f32 = 0.5;
/// Round trip within a site.
const SELF_MS: f32 = 1.0;
/// Places this far apart, in kilometres, are alike less often by a factor of e.
const ALIKE_KM: f32 = 500.0;
/// Longest delay that is taken, in milliseconds.
const MS_MAX: f32 = 60_000.0;
/// Hypotheses less likely than this, as a share of the likeliest, do not count.
const LIKELY_MIN: f32 = 1e-4;
/// A side of a triangle of delays is at least this share of what the other two differ by: routes are not straight, so some sides are shorter
/// than that, but few by more.
const TRIANGLE: f32 = 0.7;
/// Largest standard deviation of a logarithm: beyond it nothing is known anyway.
const SPREAD_MAX: f32 = 2.0;

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
    /// Round trip in milliseconds: as often above it as below.
    pub ms: f32,
    /// Standard deviation of its logarithm: 0.2 is a fifth of the delay, more or less.
    pub spread: f32,
    /// What it is on the mean, in milliseconds: more than `ms`, the less sure it is. By this sites are chosen.
    pub mean_ms: f32,
    /// By how many milliseconds it is expected to be below the best that was measured, as a mean over all that it may be.
    pub gain_ms: f32,
    /// It was measured from this very site.
    pub measured: bool,
}

/// A place by its delays from all sites.
#[derive(Clone, Debug)]
struct Known {
    /// For a learned one, which.
    place: Option<u64>,
    /// Milliseconds, by site.
    ms: Vec<f32>,
    /// Variance of the logarithm, by site; 0 where it was measured.
    variance: Vec<f32>,
    /// Against a site.
    unlikely: f32,
}

/// What is known of places.
#[derive(Clone, Debug)]
pub struct Likeness {
    sites: Vec<Known>,
    learned: VecDeque<Known>,
    /// The site from which a first measurement tells most.
    first: usize,
}

/// A known place with the stretch that fits best, and how likely it is.
struct Hypothesis<'a> {
    known: &'a Known,
    stretch: f32,
    likely: f32,
}

impl Hypothesis<'_> {
    /// The delay from a site in milliseconds. A place that was measured itself knows better what is possible there.
    fn says(&self, site: usize, floor: f32) -> f32 {
        let floor = if self.known.place.is_some() { 0.0 } else { floor };
        (self.known.ms[site] + self.stretch).max(floor)
    }
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
        let known = |a: usize| Known { place: None, ms: row(a), variance: vec![0.0; len], unlikely: 0.0 };
        let sites: Vec<Known> = (0..len).map(known).collect();
        let first = (0..len).max_by(|&a, &b| tells(&sites, a).total_cmp(&tells(&sites, b)).then(b.cmp(&a)));
        Self { first: first.unwrap_or(0), sites, learned: VecDeque::new() }
    }

    /// Number of sites.
    #[must_use]
    pub fn sites(&self) -> usize {
        self.sites.len()
    }

    /// The delays of a place from all sites. What was learned of the place itself is left out: `place` is as it was given to
    /// [`Likeness::learn`]. `distance_km`, by site, where coordinates are known: near sites are then more alike.
    #[must_use]
    pub fn estimate(&self, place: Option<u64>, seen: &[Seen], distance_km: Option<&[f32]>) -> Vec<Estimate> {
        let seen: Vec<Seen> = seen.iter().copied().filter(|seen| self.is_usable(seen)).collect();
        let hypotheses = self.hypotheses(place, &seen, distance_km);
        let best = seen.iter().map(|seen| seen.ms).fold(MS_MAX, f32::min);
        let (sites, mut logs) = (0..self.sites.len(), Vec::with_capacity(hypotheses.len()));
        let mut estimates: Vec<Estimate> =
            sites.map(|site| blend(&hypotheses, (site, self.floor(&seen, site)), best, &mut logs)).collect();
        for seen in &seen {
            let (ms, spread) = (seen.ms, doubt(seen.age_s) - MISFIT);
            estimates[seen.site] = Estimate { ms, spread, mean_ms: ms, gain_ms: 0.0, measured: true };
        }
        estimates
    }

    /// From which site to measure next: where the place may be nearer than it was measured so far. `None` when all have.
    #[must_use]
    pub fn next(&self, seen: &[Seen], estimates: &[Estimate]) -> Option<usize> {
        let open = |site: &usize| !seen.iter().any(|seen| seen.site == *site);
        if seen.is_empty() && estimates.iter().all(|estimate| !estimate.measured) {
            return Some(self.first).filter(|first| *first < self.sites.len());
        }
        let order = |&a: &usize, &b: &usize| {
            let (a_at, b_at) = (&estimates[a], &estimates[b]);
            let gain = b_at.gain_ms.total_cmp(&a_at.gain_ms);
            gain.then(a_at.mean_ms.total_cmp(&b_at.mean_ms)).then(a.cmp(&b))
        };
        (0..self.sites.len().min(estimates.len())).filter(open).min_by(order)
    }

    /// Remembers a place, by a number of the caller's, for others that are like it; what was known of the same place is forgotten. One
    /// that was measured from fewer than two sites teaches nothing.
    pub fn learn(&mut self, place: u64, estimates: &[Estimate]) {
        let measured = estimates.iter().filter(|estimate| estimate.measured).count();
        if estimates.len() != self.sites.len() || measured < LEARNED_MEASURED_MIN {
            return;
        }
        let variance = |estimate: &Estimate| {
            if estimate.measured { 0.0 } else { estimate.spread * estimate.spread }
        };
        let known = Known {
            place: Some(place),
            ms: estimates.iter().map(|estimate| estimate.ms).collect(),
            variance: estimates.iter().map(variance).collect(),
            // Weights are at most 1, and the logarithm is made for more.
            unlikely: ln(1.0 / LEARNED_WEIGHT),
        };
        if let Some(same) = self.learned.iter_mut().find(|learned| learned.place == Some(place)) {
            *same = known;
            return;
        }
        if self.learned.len() == LEARNED_LEN_MAX {
            self.learned.pop_front();
        }
        self.learned.push_back(known);
    }

    fn is_usable(&self, seen: &Seen) -> bool {
        seen.site < self.sites.len() && (0.0..=MS_MAX).contains(&seen.ms) && seen.age_s >= 0.0
    }

    /// What a place has from a site at least, in milliseconds: if it is near another and that is far from this one. That it is far from
    /// another may be an odd route and says nothing of this one.
    fn floor(&self, seen: &[Seen], site: usize) -> f32 {
        let side = |seen: &Seen| TRIANGLE * (self.sites[seen.site].ms[site] - seen.ms);
        seen.iter().map(side).fold(0.0, f32::max)
    }

    /// Those that are likely; the likelinesses sum to 1.
    fn hypotheses(
        &self,
        place: Option<u64>,
        seen: &[Seen],
        distance_km: Option<&[f32]>,
    ) -> Vec<Hypothesis<'_>> {
        let mut all = Vec::with_capacity(self.sites.len() + self.learned.len());
        let logs: Vec<f32> = seen.iter().map(|seen| ln(seen.ms + OFFSET_MS)).collect();
        let mut stretches = Vec::with_capacity(seen.len());
        for (n, known) in self.sites.iter().chain(&self.learned).enumerate() {
            if known.place.is_some() && known.place == place {
                continue;
            }
            let stretch = stretch(known, seen, &mut stretches);
            let far = distance_km.and_then(|km| km.get(n)).map_or(0.0, |km| km.max(0.0) / ALIKE_KM);
            let misfits = seen.iter().zip(&logs).map(|(seen, log)| misfit(known, stretch, seen, *log));
            let unlikely = misfits.sum::<f32>() + STRETCH_POWER * ln(1.0 + stretch / STRETCH_MS) + far;
            all.push(Hypothesis { known, stretch, likely: unlikely + known.unlikely });
        }
        let least = all.iter().map(|each| each.likely).fold(f32::INFINITY, f32::min);
        all.iter_mut().for_each(|each| each.likely = exp((least - each.likely).max(-80.0)));
        all.retain(|each| each.likely > LIKELY_MIN);
        let sum: f32 = all.iter().map(|each| each.likely).sum();
        all.iter_mut().for_each(|each| each.likely /= sum);
        all
    }
}

/// How unlikely it is that a place which is like this one is so far off.
fn misfit(known: &Known, stretch: f32, seen: &Seen, log: f32) -> f32 {
    let off = log - ln(known.ms[seen.site] + stretch + OFFSET_MS);
    let doubt = doubt(seen.age_s);
    let extra = LEARNED_DOUBT * LEARNED_DOUBT * known.variance[seen.site];
    let variance = doubt * doubt + extra;
    let student = (FREEDOM + 1.0) / 2.0 * ln(1.0 + off * off / (FREEDOM * variance));
    student + 0.5 * ln(variance / (MISFIT * MISFIT))
}

/// How much a measurement of this age is trusted.
fn doubt(age_s: f32) -> f32 {
    MISFIT * (1.0 + age_s / AGING_S).min(1e6)
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

/// Mean, spread and expected gain over hypotheses, from a site and the least that it may have. `logs` is room for one number each.
fn blend(
    hypotheses: &[Hypothesis<'_>],
    (site, floor): (usize, f32),
    best_ms: f32,
    logs: &mut Vec<f32>,
) -> Estimate {
    logs.clear();
    logs.extend(hypotheses.iter().map(|each| ln(each.says(site, floor) + OFFSET_MS)));
    let mean_log: f32 = hypotheses.iter().zip(&*logs).map(|(each, log)| each.likely * log).sum();
    let (best_ms, mut around, mut mean_ms, mut gain_ms) = (best_ms + OFFSET_MS, 0.0, 0.0, 0.0);
    let best_log = ln(best_ms);
    for (each, log) in hypotheses.iter().zip(&*logs) {
        // One that has to be lifted is less sure by that.
        let lifted = log - ln(each.says(site, 0.0) + OFFSET_MS);
        let variance = SPREAD * SPREAD + each.known.variance[site] + lifted * lifted;
        let variance = variance.min(SPREAD_MAX * SPREAD_MAX);
        let (off, spread) = (log - mean_log, variance.sqrt());
        around += each.likely * (off * off + variance);
        // The mean of the logarithmic normal distribution.
        let ms = (each.says(site, floor) + OFFSET_MS) / exp(-variance / 2.0);
        mean_ms += each.likely * ms;
        let below = (best_log - log) / spread;
        if below > -4.0 {
            gain_ms += each.likely * (best_ms * normal(below) - ms * normal(below - spread)).max(0.0);
        }
    }
    Estimate {
        ms: (1.0 / exp(-mean_log) - OFFSET_MS).max(0.0),
        spread: around.sqrt().min(2.0 * SPREAD_MAX),
        mean_ms: (mean_ms - OFFSET_MS).max(0.0),
        gain_ms,
        measured: false,
    }
}

/// The normal distribution function, to 1e-5 (Abramowitz and Stegun, 26.2.16).
fn normal(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.33267 * x.abs());
    let density = 0.398_942_3 * exp((-x * x / 2.0).max(-80.0));
    let tail = density * t * (0.436_183_6 + t * (-0.120_167_6 + t * 0.937_298));
    if x > 0.0 { 1.0 - tail } else { tail }
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
    fn a_place_that_is_like_no_site_is_not_nearer_than_the_triangle_allows() {
        // 70 ms from the first and 80 from the last, which are 170 apart; 90 and 208 ms from the second.
        let likeness =
            Likeness::new(&[vec![0.0, 90.0, 170.0], vec![90.0, 0.0, 208.0], vec![170.0, 208.0, 0.0]]);
        let estimates = likeness.estimate(None, &[seen(0, 70.0), seen(2, 80.0)], None);
        assert!(estimates[1].ms >= 0.7 * (208.0 - 80.0) - 0.1, "{estimates:?}");
        assert!(estimates[1].spread > 0.5, "and that is not sure: {estimates:?}");
    }

    #[test]
    fn a_place_is_like_the_site_with_the_same_delays_but_for_its_own_stretch() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        // At site 2, behind a line of 30 ms.
        let estimates = likeness.estimate(None, &[seen(0, 132.0), seen(3, 112.0)], None);
        assert_eq!(nearest(&estimates), 2);
        assert!((estimates[2].ms - 31.0).abs() < 8.0, "{estimates:?}");
        assert!((estimates[1].ms - 92.0).abs() < 15.0, "{estimates:?}");
        assert!(estimates[0].measured && estimates[0].ms == 132.0);
    }

    #[test]
    fn what_was_measured_elsewhere_makes_sure_and_age_makes_doubt() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        let unknown = likeness.estimate(None, &[], None);
        let once = likeness.estimate(None, &[seen(0, 42.0)], None);
        assert!(once[1].spread < unknown[1].spread, "{once:?} {unknown:?}");
        let old = likeness.estimate(None, &[Seen { age_s: 36_000.0, ..seen(0, 42.0) }], None);
        assert!(old[1].spread > once[1].spread && old[0].spread > once[0].spread, "{old:?} {once:?}");
    }

    #[test]
    fn coordinates_say_where_to_look_before_anything_was_measured() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        let estimates = likeness.estimate(None, &[], Some(&[9_000.0, 6_000.0, 100.0, 7_000.0]));
        assert_eq!(nearest(&estimates), 2);
        assert!(estimates[2].spread < likeness.estimate(None, &[], None)[2].spread);
    }

    #[test]
    fn places_that_were_measured_help_those_that_are_like_them() {
        // Of three sites far apart none is like places that are 60 from two of them and far from the third.
        let mesh = vec![vec![0.0, 100.0, 250.0], vec![100.0, 0.0, 250.0], vec![250.0, 250.0, 0.0]];
        let mut likeness = Likeness::new(&mesh);
        let alone = likeness.estimate(None, &[seen(0, 60.0)], None);
        for n in 0..20 {
            let full = likeness.estimate(None, &[seen(0, 60.0), seen(1, 60.0), seen(2, 220.0)], None);
            likeness.learn(n, &full);
        }
        let helped = likeness.estimate(None, &[seen(0, 60.0)], None);
        let off = |estimates: &[Estimate]| (estimates[1].ms - 60.0).abs() + (estimates[2].ms - 220.0).abs();
        assert!(off(&helped) < 0.5 * off(&alone), "{helped:?} {alone:?}");
    }

    #[test]
    fn probes_go_where_the_place_may_be_nearest_and_end() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0, 260.0]);
        let mut known: Vec<Seen> = Vec::new();
        let truth = [101.0, 61.0, 3.0, 79.0, 161.0];
        let mut order = Vec::new();
        while let Some(site) = likeness.next(&known, &likeness.estimate(None, &known, None)) {
            order.push(site);
            known.push(seen(site, truth[site]));
        }
        assert_eq!(order.len(), 5);
        assert!(order[..3].contains(&2), "{order:?}");
    }

    #[test]
    fn a_place_does_not_learn_from_itself_and_is_learned_once() {
        let mut likeness = line(&[0.0, 40.0, 100.0, 180.0]);
        let measured = [seen(0, 70.0), seen(3, 30.0)];
        let before = likeness.estimate(Some(7), &measured, None);
        for _ in 0..3 {
            likeness.learn(7, &before);
        }
        assert_eq!(likeness.learned.len(), 1);
        assert_eq!(likeness.estimate(Some(7), &measured, None), before);
        assert_ne!(likeness.estimate(Some(8), &measured, None), before);
    }

    #[test]
    fn one_odd_route_does_not_hide_whom_a_place_is_like() {
        let likeness = line(&[0.0, 40.0, 100.0, 180.0, 260.0, 300.0]);
        // At site 1, but for a detour from site 3.
        let estimates =
            likeness.estimate(None, &[seen(0, 42.0), seen(2, 62.0), seen(3, 320.0), seen(4, 222.0)], None);
        assert_eq!(nearest(&estimates), 1);
        assert!(estimates[1].ms < 20.0, "{estimates:?}");
    }

    #[test]
    fn the_normal_distribution_is_right_to_some_digits() {
        for (x, share) in [(0.0, 0.5), (1.0, 0.841_345), (-1.0, 0.158_655), (2.0, 0.977_25), (-3.0, 0.001_35)]
        {
            assert!((normal(x) - share).abs() < 2e-5, "{x}: {}", normal(x));
        }
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
            for n in 0..=learn {
                let estimates = likeness.estimate(None, &given, None);
                prop_assert_eq!(estimates.len(), mesh.len());
                for estimate in &estimates {
                    prop_assert!(estimate.ms.is_finite() && estimate.ms >= 0.0, "{:?}", estimate);
                    prop_assert!(!estimate.spread.is_nan() && estimate.spread >= 0.0, "{:?}", estimate);
                    prop_assert!(estimate.mean_ms.is_finite() && estimate.mean_ms >= 0.0, "{:?}", estimate);
                    prop_assert!(estimate.gain_ms.is_finite() && estimate.gain_ms >= 0.0, "{:?}", estimate);
                }
                prop_assert_eq!(&estimates, &likeness.estimate(None, &given, None));
                let next = likeness.next(&given, &estimates);
                prop_assert!(next.is_none_or(|next| next < mesh.len()));
                likeness.learn(n as u64, &estimates);
            }
        }
    }
}
