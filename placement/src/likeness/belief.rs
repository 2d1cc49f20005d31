//! Hypotheses, each a normal distribution of the logarithms of all delays, and what measurements make of them.

use super::line::KM_PER_MS;
use super::{Estimate, OFFSET_MS, SEEN_MAX, Seen, log_of};
use crate::solver::softmin::{exp, ln};

/// Hypotheses that count in the end, the likeliest.
const KEPT_MAX: usize = 64;
/// Hypotheses less likely than this, as a share of the likeliest, do not count.
const LIKELY_MIN: f32 = 1e-4;
/// How often a way is odd.
const ODD_SHARE: f32 = 0.12;
/// By how much an odd way is longer in the logarithm, on the mean, and the variance of that.
const ODD_LONGER: f32 = 0.7;
const ODD_VARIANCE: f32 = 0.4;
/// A measurement is not surer than this (variance of the logarithm).
const NOISE: f32 = 4e-4;
/// Largest variance of a logarithm: beyond it nothing is known anyway.
const VARIANCE_MAX: f32 = 1.0;

/// What a hypothesis does not know: variances of the logarithm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doubt {
    /// Common to all ways of the place.
    place: f32,
    /// Common to the ways from one region.
    region: f32,
    /// Each way's own.
    way: f32,
    /// The place is within so many kilometres.
    radius_km: f32,
}

impl Doubt {
    /// About a place that is like a known one: standard deviations of 0.1, 0.1 and 0.12, as measured on PlanetLab and made-up worlds.
    pub(super) const ALIKE: Self = Self { place: 0.01, region: 0.01, way: 0.0144, radius_km: 0.0 };

    /// About a place that is where the map says: 0.15, 0.15 and 0.2.
    pub(super) fn mapped(radius_km: f32) -> Self {
        Self { place: 0.0225, region: 0.0225, way: 0.04, radius_km }
    }

    /// What the radius makes of a delay's logarithm, as a standard deviation.
    fn radius(&self, log: f32) -> f32 {
        self.radius_km / KM_PER_MS * exp(-log) / 2.0
    }
}

/// What a place may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hypothesis<'a> {
    pub(super) doubt: Doubt,
    /// Round trips from all sites in milliseconds, but for the stretch.
    pub(super) ms: &'a [f32],
    /// What all of them have more.
    pub(super) stretch: f32,
    /// Variances of the logarithms beside the doubt, by site.
    pub(super) variance: Option<&'a [f32]>,
    /// The logarithm of its likelihood.
    pub(super) likely: f32,
}

impl Hypothesis<'_> {
    fn log(&self, site: usize) -> f32 {
        ln(self.ms[site] + self.stretch + OFFSET_MS)
    }

    fn own_variance(&self, site: usize) -> f32 {
        self.doubt.way + self.variance.map_or(0.0, |variance| variance[site])
    }
}

/// A hypothesis with what each measurement moves, and takes from the covariance.
struct Weighed<'a> {
    hypothesis: Hypothesis<'a>,
    gains: [f32; SEEN_MAX],
    cuts: [f32; SEEN_MAX],
}

type Square = [[f32; SEEN_MAX]; SEEN_MAX];

/// Densities of a measurement that is so far off, for an ordinary and for an odd way; `variance` is that of the difference.
pub(super) fn densities(off: f32, variance: f32) -> (f32, f32) {
    let density = |off: f32, variance: f32| exp((-off * off / (2.0 * variance)).max(-80.0)) / variance.sqrt();
    let odd = density(off - ODD_LONGER, variance + ODD_VARIANCE);
    ((1.0 - ODD_SHARE) * density(off, variance), ODD_SHARE * odd)
}

/// Weighs hypotheses by what was seen.
pub(super) struct Scales<'a> {
    seen: &'a [Seen],
    logs: Vec<f32>,
    noise: Vec<f32>,
    /// Correlation of the ways from two sites, at `a * sites + b`.
    together: &'a [f32],
    sites: usize,
    all: Vec<Weighed<'a>>,
}

impl<'a> Scales<'a> {
    pub(super) fn new(seen: &'a [Seen], together: &'a [f32], sites: usize) -> Self {
        let noise = |seen: &Seen| {
            let share = seen.sd_ms / (seen.ms + OFFSET_MS);
            (share * share).min(VARIANCE_MAX) + NOISE
        };
        Self {
            seen,
            logs: seen.iter().map(|seen| ln(seen.ms + OFFSET_MS)).collect(),
            noise: seen.iter().map(noise).collect(),
            together,
            sites,
            all: Vec::new(),
        }
    }

    /// Of the ways from two sites by a hypothesis that says so of both; `a` is the place in what was seen.
    fn covariance(&self, hypothesis: &Hypothesis<'_>, a: usize, site: usize, log: f32) -> f32 {
        let (doubt, seen) = (&hypothesis.doubt, self.seen[a].site);
        let own = if seen == site { hypothesis.own_variance(site) } else { 0.0 };
        let radius = doubt.radius(self.logs[a]) * doubt.radius(log);
        doubt.place + doubt.region * self.together[seen * self.sites + site] + radius + own
    }

    fn square(&self, hypothesis: &Hypothesis<'_>) -> Square {
        let mut square = [[0.0; SEEN_MAX]; SEEN_MAX];
        for (a, row) in square.iter_mut().enumerate().take(self.seen.len()) {
            for (b, (cell, seen)) in row.iter_mut().zip(self.seen).enumerate() {
                *cell = self.covariance(hypothesis, a, seen.site, self.logs[b]);
            }
        }
        square
    }

    /// Takes the measurements one after the other, as a Kalman filter does; each counts by how sure it is that its way is not odd.
    pub(super) fn weigh(&mut self, mut hypothesis: Hypothesis<'a>) {
        let count = self.seen.len();
        let mut square = self.square(&hypothesis);
        let mut off = [0.0; SEEN_MAX];
        for (n, seen) in self.seen.iter().enumerate() {
            off[n] = self.logs[n] - hypothesis.log(seen.site);
        }
        let (mut gains, mut cuts) = ([0.0; SEEN_MAX], [0.0; SEEN_MAX]);
        for n in 0..count {
            let variance = square[n][n] + self.noise[n];
            let (plain, odd) = densities(off[n], variance);
            hypothesis.likely += log_of(plain + odd);
            let sure = plain / (plain + odd).max(f32::MIN_POSITIVE);
            gains[n] = sure * off[n] / variance;
            let between = sure * (1.0 - sure) * off[n] * off[n] / (variance * variance);
            cuts[n] = (sure / variance - between).max(0.0);
            let row = square[n];
            for (later, off) in off.iter_mut().enumerate().take(count).skip(n + 1) {
                *off -= gains[n] * row[later];
            }
            take_from(&mut square, n, cuts[n], count);
        }
        self.all.push(Weighed { hypothesis, gains, cuts });
    }

    /// The likely ones at all sites; none is below its floor, in milliseconds.
    pub(super) fn settle(mut self, floors: &[f32]) -> Belief {
        self.all.sort_by(|a, b| b.hypothesis.likely.total_cmp(&a.hypothesis.likely));
        let most = self.all.first().map_or(0.0, |first| first.hypothesis.likely);
        self.all.truncate(KEPT_MAX);
        self.all.retain(|each| each.hypothesis.likely - most > log_of(LIKELY_MIN));
        let shares: Vec<f32> = self.all.iter().map(|each| exp(each.hypothesis.likely - most)).collect();
        let total: f32 = shares.iter().sum();
        let floors: Vec<f32> = floors.iter().map(|ms| ln(ms + OFFSET_MS)).collect();
        let room = self.sites * self.all.len();
        let mut belief = Belief {
            sites: self.sites,
            shares: shares.iter().map(|share| share / total).collect(),
            means: Vec::with_capacity(room),
            variances: Vec::with_capacity(room),
        };
        for weighed in &self.all {
            self.at_all_sites(weighed, &floors, &mut belief);
        }
        belief
    }

    fn at_all_sites(&self, weighed: &Weighed<'_>, floors: &[f32], belief: &mut Belief) {
        let Weighed { hypothesis, gains, cuts } = weighed;
        let count = self.seen.len();
        // Of measured ways, as each measurement found them.
        let mut square = self.square(hypothesis);
        (0..count).for_each(|n| take_from(&mut square, n, cuts[n], count));
        for (site, floor) in floors.iter().enumerate() {
            let mut mean = hypothesis.log(site);
            let (doubt, radius) = (&hypothesis.doubt, hypothesis.doubt.radius(mean));
            let mut variance = doubt.place + doubt.region + hypothesis.own_variance(site) + radius * radius;
            let mut with = [0.0; SEEN_MAX];
            for (n, with) in with.iter_mut().enumerate().take(count) {
                *with = self.covariance(hypothesis, n, site, mean);
            }
            for n in 0..count {
                mean += gains[n] * with[n];
                variance -= cuts[n] * with[n] * with[n];
                for later in n + 1..count {
                    with[later] -= cuts[n] * with[n] * square[n][later];
                }
            }
            // One that has to be lifted is less sure by that.
            let lifted = (floor - mean).max(0.0);
            belief.means.push(mean + lifted);
            belief.variances.push((variance.max(NOISE) + lifted * lifted).min(VARIANCE_MAX));
        }
    }
}

/// What a measurement takes from the covariance of those after it.
fn take_from(square: &mut Square, n: usize, cut: f32, count: usize) {
    let row = square[n];
    for a in n + 1..count {
        for b in n + 1..count {
            square[a][b] -= cut * row[a] * row[b];
        }
    }
}

/// What is believed: shares that sum to 1, and of each hypothesis mean and variance of the logarithms by site.
pub(super) struct Belief {
    pub(super) sites: usize,
    pub(super) shares: Vec<f32>,
    /// By hypothesis, then by site.
    pub(super) means: Vec<f32>,
    pub(super) variances: Vec<f32>,
}

impl Belief {
    /// What the hypotheses say of a site: share, mean and variance of the logarithm.
    pub(super) fn of(&self, site: usize) -> impl Iterator<Item = (f32, f32, f32)> {
        let at = move |n: usize| n * self.sites + site;
        self.shares
            .iter()
            .enumerate()
            .map(move |(n, share)| (*share, self.means[at(n)], self.variances[at(n)]))
    }

    /// The mixture at a site.
    pub(super) fn estimate(&self, site: usize) -> Estimate {
        let (mut log, mut mean) = (0.0, 0.0);
        for (share, at, variance) in self.of(site) {
            log += share * at;
            mean += share * mean_of(at, variance);
        }
        let around = |(share, at, variance): (f32, f32, f32)| share * (variance + (at - log) * (at - log));
        let variance: f32 = self.of(site).map(around).sum();
        Estimate {
            ms: (exp(log) - OFFSET_MS).max(0.0),
            spread: variance.sqrt(),
            mean_ms: (mean - OFFSET_MS).max(0.0),
            measured: false,
        }
    }
}

/// The mean of the logarithmic normal distribution.
pub(super) fn mean_of(log: f32, variance: f32) -> f32 {
    exp(log + variance / 2.0)
}
