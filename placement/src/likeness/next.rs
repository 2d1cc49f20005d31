//! From where to measure next.

use super::belief::{Belief, densities, mean_of};
use super::{OFFSET_MS, Seen};
use crate::solver::softmin::exp;

/// Sites that are looked at.
const CANDIDATES_MAX: usize = 16;
/// Hypotheses with smaller shares do not count here.
const SHARE_MIN: f32 = 1e-3;
/// Variance of a measurement's logarithm, as it will be.
const NOISE: f32 = 0.002;

/// What is decided before the measurement.
struct Now<'a> {
    belief: &'a Belief,
    /// The mean by hypothesis and site, with the offset.
    ms: Vec<f32>,
    /// Sites that were not measured.
    open: Vec<usize>,
    /// The shortest that was measured, with the offset.
    best_seen: f32,
}

/// Where the best choice after the measurement is expected to be shortest. Where no single measurement is expected to change the choice
/// much, the expected improvement on it counts.
pub(super) fn choose(belief: &Belief, seen: &[Seen], may: impl Fn(usize) -> bool) -> Option<(usize, f32)> {
    let is_open = |site: &usize| seen.iter().all(|seen| seen.site != *site);
    let now = Now {
        belief,
        ms: belief.means.iter().zip(&belief.variances).map(|(log, var)| mean_of(*log, *var)).collect(),
        open: (0..belief.sites).filter(is_open).collect(),
        best_seen: seen.iter().map(|seen| seen.ms + OFFSET_MS).fold(f32::INFINITY, f32::min),
    };
    let mean = |site: usize| -> f32 {
        let ms = |(n, share): (usize, &f32)| share * now.ms[n * belief.sites + site];
        belief.shares.iter().enumerate().map(ms).sum()
    };
    let means: Vec<(usize, f32)> = now.open.iter().map(|&site| (site, mean(site))).collect();
    let best = means.iter().map(|(_, ms)| *ms).fold(now.best_seen, f32::min);
    let mut hopes: Vec<(f32, f32, usize)> = means
        .iter()
        .filter(|(site, _)| may(*site))
        .map(|&(site, ms)| (hope(belief, site, best), ms, site))
        .collect();
    hopes.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
    hopes.truncate(CANDIDATES_MAX);
    let mut room = Room { weights: Vec::new(), after: vec![0.0; belief.sites] };
    let valued =
        hopes.into_iter().map(|(hope, ms, site)| (best - now.after(site, &mut room) + hope, ms, site));
    let valued: Vec<(f32, f32, usize)> = valued.collect();
    let order = |a: &&(f32, f32, usize), b: &&(f32, f32, usize)| {
        a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)).then(b.2.cmp(&a.2))
    };
    valued.iter().max_by(order).map(|(gain, _, site)| (*site, *gain))
}

/// By how much a site may be below the best so far, if it is a standard deviation shorter than thought.
fn hope(belief: &Belief, site: usize, best: f32) -> f32 {
    belief.of(site).map(|(share, log, var)| share * (best - exp(log - var.sqrt())).max(0.0)).sum()
}

/// Room for what is reckoned, used again.
struct Room {
    weights: Vec<f32>,
    after: Vec<f32>,
}

impl Now<'_> {
    /// The best choice after a measurement from a site, as a mean over what that may be: what each hypothesis says of it.
    fn after(&self, site: usize, room: &mut Room) -> f32 {
        let (mut sum, mut counted) = (0.0, 0.0);
        for (share, outcome, _) in self.belief.of(site).filter(|(share, ..)| *share > SHARE_MIN) {
            sum += share * self.after_outcome(site, outcome, room);
            counted += share;
        }
        if counted > 0.0 { sum / counted } else { self.best_seen }
    }

    fn after_outcome(&self, site: usize, outcome: f32, room: &mut Room) -> f32 {
        room.weights.clear();
        room.weights.extend(self.belief.of(site).map(|(share, log, var)| {
            let (plain, odd) = densities(outcome - log, var + NOISE);
            share * (plain + odd)
        }));
        let total: f32 = room.weights.iter().sum();
        room.after.fill(0.0);
        let counts = |(_, weight): &(usize, &f32)| **weight > SHARE_MIN * total;
        for (n, weight) in room.weights.iter().enumerate().filter(counts) {
            let row = &self.ms[n * self.belief.sites..(n + 1) * self.belief.sites];
            room.after.iter_mut().zip(row).for_each(|(sum, ms)| *sum += weight / total * ms);
        }
        let others = self.open.iter().filter(|other| **other != site).map(|other| room.after[*other]);
        others.fold(self.best_seen.min(exp(outcome)), f32::min)
    }
}
