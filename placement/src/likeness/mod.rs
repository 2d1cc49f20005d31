//! How far a place is from all sites, when it was measured from few, or only a map knows where it is.
//!
//! A place is a client or server prefix. What it may be like are *hypotheses*: it is where the map says ([`map`]), or it is like a
//! place that is known from everywhere: the sites, which measure one another all the time, and places that were measured before; each
//! with some milliseconds more on all its ways (its access line). A hypothesis says what the logarithm of each delay is, and how what is
//! not known of it goes together: some is common to all ways of a place, some to the ways from one region, some is each way's own
//! ([`belief`]). What was measured moves each hypothesis, and weighs it against the others by Bayes' rule. One delay of several may be quite
//! different where routes are odd, so each measurement is of an odd way with some probability (the probabilistic data association of
//! Bar-Shalom and Tse, Automatica 11, 1975). The estimate is the mixture; sites are chosen by its mean, in which a site that was
//! not measured pays for what is not known of it.
//!
//! The next measurement goes where the best choice after it is expected to be shortest ([`next`]): the knowledge gradient (Frazier,
//! Powell, Dayanik, SIAM J. Control and Optimization 47, 2008).
//!
//! Sans-IO and deterministic: same knowledge, same estimate, on every node.

mod belief;
mod line;
mod map;
mod next;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::solver::softmin::{exp, ln};

use belief::{Belief, Doubt, Hypothesis, Scales};
pub(crate) use line::Line;
use map::{At, Map};

/// Places that were learned and are kept; the oldest goes first.
pub const LEARNED_LEN_MAX: usize = 1024;
/// Added to delays before the logarithm, in milliseconds: below it, differences mean little.
pub const OFFSET_MS: f32 = 5.0;
/// Longest delay that is taken, in milliseconds.
const MS_MAX: f32 = 60_000.0;
/// Round trip within a site.
const SELF_MS: f32 = 1.0;
/// Milliseconds that all ways of a place may have more than those of what it is like, and how often.
const STRETCHES: [(f32, f32); 4] = [(0.0, 0.6), (6.0, 0.2), (20.0, 0.13), (60.0, 0.07)];
/// A stretch below this is none.
const STRETCH_MIN_MS: f32 = 1.0;
/// A stretch of so many milliseconds is rarer by a factor of 2 to the power of [`FIT_POWER`].
const FIT_MS: f32 = 20.0;
const FIT_POWER: f32 = 2.0;
/// How often a place is where the map says, and is unlike any known one.
const MAPPED: f32 = 0.9;
/// How often the map is wrong.
const MAP_WRONG: f32 = 0.01;
/// Places this far apart, in kilometres, are alike less often by a factor of e.
const ALIKE_KM: f32 = 500.0;
/// A radius of the map above this says nothing, in kilometres.
const RADIUS_MAX_KM: f32 = 500.0;
/// What a learned place counts against a site.
const LEARNED_WEIGHT: f32 = 0.5;
/// From how many sites a place has to be measured to be learned.
const LEARNED_MEASURED_MIN: usize = 2;
/// A side of a triangle of delays is at least this share of what the other two differ by: few are shorter.
const TRIANGLE: f32 = 0.7;
/// What the first measurement of a place gains of which nothing is known, in milliseconds.
const NOTHING_KNOWN_MS: f32 = 100.0;
/// Measurements of one place that count; the shortest stay.
const SEEN_MAX: usize = 12;

/// A delay that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// From which site, by index.
    pub site: usize,
    /// Round trip in milliseconds.
    pub ms: f32,
    /// Standard deviation of it in milliseconds.
    pub sd_ms: f32,
}

/// Where a map says that a place is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spot {
    /// Latitude and longitude in degrees.
    pub at: (f64, f64),
    /// Within so many kilometres.
    pub radius_km: f64,
}

impl Spot {
    /// The point, where the map says enough: a place on the globe, and a radius that is one and not too large.
    fn usable(&self) -> Option<At> {
        At::new(self.at).filter(|_| (0.0..=f64::from(RADIUS_MAX_KM)).contains(&self.radius_km))
    }
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
    /// It was measured from this very site.
    pub measured: bool,
}

/// A place by its delays from all sites.
#[derive(Clone, Debug)]
struct Known {
    /// For a learned one, which.
    place: Option<u64>,
    at: Option<At>,
    ms: Vec<f32>,
    /// Variance of the logarithm, by site; 0 where it was measured. Nothing for a site.
    variance: Option<Vec<f32>>,
    /// What it counts against a site.
    weight: f32,
}

/// What is known of places.
#[derive(Clone, Debug)]
pub struct Likeness {
    sites: Vec<Known>,
    learned: VecDeque<Known>,
    map: Map,
    /// The site from which a first measurement tells most where there is no map.
    first: usize,
}

impl Likeness {
    /// From the round trips between the sites in milliseconds, `mesh[a][b]`, and where the sites are. The diagonal is not read. What is no
    /// delay counts as the line says, or as the median of its row. Rows that are short are filled up likewise.
    #[must_use]
    pub fn new(mesh: &[Vec<f32>], places: &[Option<(f64, f64)>]) -> Self {
        let len = mesh.len();
        let ats: Vec<Option<At>> =
            (0..len).map(|n| places.get(n).copied().flatten().and_then(At::new)).collect();
        let line = Line;
        let row = |a: usize| {
            let usable = |b: usize| mesh[a].get(b).copied().filter(|ms| (0.0..=MS_MAX).contains(ms));
            let mut known: Vec<f32> = (0..len).filter(|&b| b != a).filter_map(usable).collect();
            known.sort_by(f32::total_cmp);
            let median = known.get(known.len() / 2).copied().unwrap_or(SELF_MS);
            let guess = |b: usize| ats[a].zip(ats[b]).map_or(median, |(a, b)| line.ms(a.km(&b)));
            (0..len).map(|b| if a == b { SELF_MS } else { usable(b).unwrap_or_else(|| guess(b)) }).collect()
        };
        let mesh: Vec<Vec<f32>> = (0..len).map(row).collect();
        let known =
            |a: usize| Known { place: None, at: ats[a], ms: mesh[a].clone(), variance: None, weight: 1.0 };
        let sites: Vec<Known> = (0..len).map(known).collect();
        let first = (0..len).max_by(|&a, &b| tells(&mesh, a).total_cmp(&tells(&mesh, b)).then(b.cmp(&a)));
        let map = Map::new(&mesh, ats);
        Self { first: first.unwrap_or(0), sites, learned: VecDeque::new(), map }
    }

    /// Number of sites.
    #[must_use]
    pub fn sites(&self) -> usize {
        self.sites.len()
    }

    /// The delays of a place from all sites. What was learned of the place itself is left out: `place` is as it was given to
    /// [`Likeness::learn`].
    #[must_use]
    pub fn estimate(&self, place: Option<u64>, seen: &[Seen], spot: Option<Spot>) -> Vec<Estimate> {
        let seen = self.usable(seen);
        let mixture = self.believe(place, &seen, spot);
        let mut estimates: Vec<Estimate> = (0..self.sites.len()).map(|site| mixture.estimate(site)).collect();
        for seen in &seen {
            let spread = seen.sd_ms / (seen.ms + OFFSET_MS);
            estimates[seen.site] = Estimate { ms: seen.ms, spread, mean_ms: seen.ms, measured: true };
        }
        estimates
    }

    /// From which site to measure next, so that the best choice after it is expected to be shortest. `None` when all have.
    #[must_use]
    pub fn next(&self, place: Option<u64>, seen: &[Seen], spot: Option<Spot>) -> Option<usize> {
        self.next_of(place, seen, spot, |_| true).map(|(site, _)| site)
    }

    /// The same of those that may measure, with what the measurement is expected to gain, in milliseconds of a round trip.
    #[must_use]
    pub fn next_of(
        &self,
        place: Option<u64>,
        seen: &[Seen],
        spot: Option<Spot>,
        may: impl Fn(usize) -> bool,
    ) -> Option<(usize, f32)> {
        let seen = self.usable(seen);
        if seen.is_empty() && spot.is_none_or(|spot| !self.map.knows(&spot)) && self.learned.is_empty() {
            let first = Some(self.first).filter(|first| *first < self.sites.len() && may(*first));
            return first.map(|first| (first, NOTHING_KNOWN_MS));
        }
        let mixture = self.believe(place, &seen, spot);
        next::choose(&mixture, &seen, may)
    }

    /// Remembers a place, by a number of the caller's, for others that are like it; what was known of the same place is forgotten. One
    /// that was measured from fewer than two sites teaches nothing.
    pub fn learn(&mut self, place: u64, estimates: &[Estimate], spot: Option<Spot>) {
        let measured = estimates.iter().filter(|estimate| estimate.measured).count();
        if estimates.len() != self.sites.len() || measured < LEARNED_MEASURED_MIN {
            return;
        }
        let variance = |estimate: &Estimate| {
            if estimate.measured { 0.0 } else { estimate.spread * estimate.spread }
        };
        let ms: Vec<f32> = estimates.iter().map(|estimate| estimate.ms).collect();
        let at = spot.and_then(|spot| spot.usable());
        let variance = Some(estimates.iter().map(variance).collect());
        let known = Known { place: Some(place), at, ms, variance, weight: LEARNED_WEIGHT };
        if let Some(same) = self.learned.iter_mut().find(|learned| learned.place == Some(place)) {
            *same = known;
            return;
        }
        if self.learned.len() == LEARNED_LEN_MAX {
            self.learned.pop_front();
        }
        self.learned.push_back(known);
    }

    /// Those that are delays, of each site the surest, the shortest first.
    fn usable(&self, seen: &[Seen]) -> Vec<Seen> {
        let is_delay = |seen: &&Seen| {
            seen.site < self.sites.len()
                && (0.0..=MS_MAX).contains(&seen.ms)
                && (0.0..=MS_MAX).contains(&seen.sd_ms)
        };
        let mut usable: Vec<Seen> = seen.iter().filter(is_delay).copied().collect();
        usable.sort_by(|a, b| a.ms.total_cmp(&b.ms).then(a.site.cmp(&b.site)));
        let mut taken = vec![false; self.sites.len()];
        usable.retain(|seen| !std::mem::replace(&mut taken[seen.site], true));
        usable.truncate(SEEN_MAX);
        usable
    }

    fn believe(&self, place: Option<u64>, seen: &[Seen], spot: Option<Spot>) -> Belief {
        let spot = spot.filter(|spot| self.map.knows(spot));
        let at = spot.and_then(|spot| At::new(spot.at));
        let mapped = at.map(|at| self.map.delays(&at));
        let mut scales = Scales::new(seen, &self.map.together, self.sites());
        let known = self.sites.iter().chain(&self.learned);
        let known = || known.clone().filter(|known| known.place.is_none() || known.place != place);
        // By distance, the nearest counts most; a wrong map makes all alike.
        let near = |known: &Known| match at.zip(known.at) {
            Some((place, known)) => exp(-(place.km(&known) / ALIKE_KM).min(60.0)),
            None => 1.0,
        };
        let total: f32 = known().map(|known| near(known) * known.weight).sum();
        let (alike, count) = (if at.is_some() { 1.0 - MAPPED } else { 1.0 }, known().count());
        for known in known() {
            let share = alike * near(known) / total.max(1.0) + MAP_WRONG / count as f32;
            for (stretch, often) in stretches(&known.ms, seen) {
                scales.weigh(Hypothesis {
                    doubt: Doubt::ALIKE,
                    ms: &known.ms,
                    stretch,
                    variance: known.variance.as_deref(),
                    likely: log_of(share * known.weight * often),
                });
            }
        }
        if let Some((spot, ms)) = spot.zip(mapped.as_ref()) {
            let doubt = Doubt::mapped(spot.radius_km as f32);
            for (stretch, often) in stretches(ms, seen) {
                scales.weigh(Hypothesis {
                    doubt,
                    ms,
                    stretch,
                    variance: None,
                    likely: log_of(MAPPED * often),
                });
            }
        }
        let side = |seen: &Seen, site: usize| TRIANGLE * (self.sites[seen.site].ms[site] - seen.ms);
        let floor = |site: usize| seen.iter().map(|seen| side(seen, site)).fold(0.0, f32::max);
        scales.settle(&(0..self.sites()).map(floor).collect::<Vec<f32>>())
    }
}

/// Milliseconds more on all ways, and how often: those that fit, once something was measured.
fn stretches(ms: &[f32], seen: &[Seen]) -> impl Iterator<Item = (f32, f32)> {
    let fitted = fitted(ms, seen);
    let often = (1.0 - STRETCHES[0].1) * exp(-FIT_POWER * ln(1.0 + fitted / FIT_MS));
    let fits = std::iter::once((fitted, often)).filter(move |_| fitted > STRETCH_MIN_MS);
    let drawn = if seen.is_empty() { STRETCHES.len() } else { 1 };
    STRETCHES.into_iter().take(drawn).chain(fits)
}

/// What a place has more on all its ways than the known one, by the median of what was seen; of one measurement half, as it may as well
/// be distance.
fn fitted(ms: &[f32], seen: &[Seen]) -> f32 {
    let mut more: Vec<f32> = seen.iter().map(|seen| seen.ms - ms[seen.site]).collect();
    more.sort_by(f32::total_cmp);
    let median = match more.len() {
        0 => 0.0,
        1 => more[0] / 2.0,
        len if len % 2 == 1 => more[len / 2],
        len => f32::midpoint(more[len / 2 - 1], more[len / 2]),
    };
    median.max(0.0)
}

/// The logarithm of any number above 0; [`ln`] is made for those from 1 on.
fn log_of(x: f32) -> f32 {
    if x < 1.0 { -ln(1.0 / x.max(1e-30)) } else { ln(x) }
}

/// How evenly the delays from a site are spread over a scale, as entropy: the more, the more one of them tells.
fn tells(mesh: &[Vec<f32>], site: usize) -> f32 {
    let mut bins = [0_u32; 32];
    for row in mesh {
        let bin = (ln(row[site] + OFFSET_MS) / 0.3) as usize;
        bins[bin.min(31)] += 1;
    }
    let share = |count: &u32| *count as f32 / mesh.len() as f32;
    bins.iter().filter(|count| **count > 0).map(|count| -share(count) * log_of(share(count))).sum()
}
