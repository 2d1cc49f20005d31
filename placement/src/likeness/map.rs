//! Where the map says: the line of distance, shifted to what the sites measure between one another.
//!
//! The line is shifted by range of distance to the measurements of this deployment. What is left, the residuals of each site's ways to the
//! others, goes on smoothly over the map: simple kriging (Cressie, *Statistics for Spatial Data*, 1993, ch. 3) from the sites around.

use super::line::Line;
use super::{OFFSET_MS, Spot};
use crate::solver::softmin::{exp, ln};

/// Ends of the ranges of distance that are shifted apart, in kilometres.
const RANGES_KM: [f32; 4] = [300.0, 1_000.0, 3_000.0, 6_000.0];
/// The line counts as so many measurements in each range.
const LINE_COUNT: f32 = 8.0;
/// Residuals this far apart have a correlation of 1/e, in kilometres.
const SCALE_KM: f32 = 1_500.0;
/// What is each way's own, as a share of what goes on over the map (variance).
const NUGGET: f32 = 0.8;
/// Sites around that residuals are taken from.
const AROUND_MAX: usize = 32;
const EARTH_KM: f32 = 6_371.0;

/// A point on the globe.
#[derive(Clone, Copy, Debug)]
pub(super) struct At([f32; 3]);

impl At {
    /// Of latitude and longitude in degrees; nothing for what is none.
    pub(super) fn new((latitude, longitude): (f64, f64)) -> Option<Self> {
        if !(-90.0..=90.0).contains(&latitude) || !(-180.0..=180.0).contains(&longitude) {
            return None;
        }
        let (latitude, longitude) = (latitude.to_radians(), longitude.to_radians());
        let around = latitude.cos();
        let at = [around * longitude.cos(), around * longitude.sin(), latitude.sin()];
        Some(Self(at.map(|x| x as f32)))
    }

    /// Great circle, in kilometres.
    pub(super) fn km(&self, other: &Self) -> f32 {
        let square: f32 = self.0.iter().zip(&other.0).map(|(a, b)| (a - b) * (a - b)).sum();
        2.0 * EARTH_KM * (square.sqrt() / 2.0).min(1.0).asin()
    }
}

/// The map, and what sites measure of it.
#[derive(Clone, Debug)]
pub(super) struct Map {
    ats: Vec<Option<At>>,
    shifts: [f32; RANGES_KM.len() + 1],
    /// Residual of the logarithm from site `s` to site `b`, at `s * len + b`.
    residuals: Vec<f32>,
    /// Correlation of the ways from two sites, at `a * len + b`.
    pub(super) together: Vec<f32>,
}

fn range(km: f32) -> usize {
    RANGES_KM.iter().filter(|end| km > **end).count()
}

impl Map {
    /// Of round trips between sites.
    pub(super) fn new(mesh: &[Vec<f32>], ats: Vec<Option<At>>) -> Self {
        let (len, line) = (mesh.len(), Line);
        let km = |a: usize, b: usize| Some(ats[a]?.km(&ats[b]?));
        let off = |a: usize, b: usize| {
            Some((km(a, b)?, ln(mesh[a][b] + OFFSET_MS) - ln(line.ms(km(a, b)?) + OFFSET_MS)))
        };
        let (mut sums, mut counts) = ([0.0; RANGES_KM.len() + 1], [LINE_COUNT; RANGES_KM.len() + 1]);
        let pairs = || (0..len).flat_map(|a| (0..len).map(move |b| (a, b))).filter(|(a, b)| a != b);
        for (km, off) in pairs().filter_map(|(a, b)| off(a, b)) {
            sums[range(km)] += off;
            counts[range(km)] += 1.0;
        }
        let shifts: [f32; RANGES_KM.len() + 1] = std::array::from_fn(|n| sums[n] / counts[n]);
        let mut residuals = vec![0.0; len * len];
        for (a, b) in pairs() {
            if let Some((km, off)) = off(a, b) {
                residuals[a * len + b] = off - shifts[range(km)];
            }
        }
        let together = (0..len).flat_map(|a| (0..len).map(move |b| (a, b)));
        // Without coordinates, by how near the sites are to each other in time.
        let apart = |a: usize, b: usize| {
            if a == b { 0.0 } else { km(a, b).unwrap_or(mesh[a][b] * super::line::KM_PER_MS) }
        };
        let together = together.map(|(a, b)| exp(-(apart(a, b) / SCALE_KM).min(60.0))).collect();
        Self { ats, shifts, residuals, together }
    }

    /// Whether the map says anything of such a place.
    pub(super) fn knows(&self, spot: &Spot) -> bool {
        spot.usable().is_some() && self.ats.iter().any(Option::is_some)
    }

    /// Round trips from all sites to a place there, in milliseconds.
    pub(super) fn delays(&self, place: &At) -> Vec<f32> {
        let len = self.ats.len();
        let kms: Vec<Option<f32>> = self.ats.iter().map(|at| at.map(|at| at.km(place))).collect();
        let mut around: Vec<(f32, usize)> =
            kms.iter().enumerate().filter_map(|(n, km)| Some(((*km)?, n))).collect();
        around.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        around.truncate(AROUND_MAX);
        let weights = self.weights(&around);
        let line = Line;
        let delay = |(site, km): (usize, &Option<f32>)| {
            let Some(km) = *km else { return line.ms(8_000.0) };
            let others = around.iter().zip(&weights).filter(|((_, other), _)| *other != site);
            let residual: f32 =
                others.map(|((_, other), weight)| weight * self.residuals[site * len + other]).sum();
            let log = ln(line.ms(km) + OFFSET_MS) + self.shifts[range(km)] + residual;
            (exp(log) - OFFSET_MS).max(0.0)
        };
        kms.iter().enumerate().map(delay).collect()
    }

    /// Of the residuals at the sites around: the solution of (C + nugget) w = c, by Cholesky.
    fn weights(&self, around: &[(f32, usize)]) -> Vec<f32> {
        let (count, len) = (around.len(), self.ats.len());
        let mut lower = vec![0.0_f32; count * count];
        let mut solved: Vec<f32> = around.iter().map(|(km, _)| exp(-km / SCALE_KM)).collect();
        for row in 0..count {
            for column in 0..=row {
                let own = if row == column {
                    1.0 + NUGGET
                } else {
                    self.together[around[row].1 * len + around[column].1]
                };
                let done: f32 = (0..column).map(|k| lower[row * count + k] * lower[column * count + k]).sum();
                lower[row * count + column] = if row == column {
                    (own - done).max(1e-6).sqrt()
                } else {
                    (own - done) / lower[column * count + column]
                };
            }
        }
        for row in 0..count {
            let done: f32 = (0..row).map(|k| lower[row * count + k] * solved[k]).sum();
            solved[row] = (solved[row] - done) / lower[row * count + row];
        }
        for row in (0..count).rev() {
            let done: f32 = (row + 1..count).map(|k| lower[k * count + row] * solved[k]).sum();
            solved[row] = (solved[row] - done) / lower[row * count + row];
        }
        solved
    }
}
