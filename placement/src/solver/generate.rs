//! Instances that look like a network operator's, from a seed: for benches, tests and `limosa bench placement`.
//!
//! Sites and groups lie around towns, the larger ones with more of both; a group's traffic is heavy-tailed; delay is the
//! great circle with a detour; a group's candidates are its nearest sites. Capacities follow half what is near and
//! half chance, so that some sites are short while the sum is not.

use super::instance::{
    CANDIDATES_MAX, Candidate, Group, Instance, InstanceError, RESOURCES, SITES_MAX, Site,
};
use crate::core::delay::great_circle_km;

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Number of groups.
    pub groups: usize,
    /// Number of sites, 1 to 256.
    pub sites: usize,
    /// Candidates per group, 1 to 16.
    pub candidates: usize,
    /// Sum of all demand as a share of all capacity, in packets; flows and bits have a tenth more room.
    pub fill: f64,
    /// Same seed, same instance.
    pub seed: u64,
}

/// Kilometres that a packet gets in a millisecond: fibre, and half as long again as the great circle.
const KM_PER_MS: f64 = 133.0;
/// Towns of the world.
const TOWNS: usize = 300;
/// Degrees that things lie around their town.
const AROUND: f64 = 1.5;

/// Makes an instance; groups are nowhere yet.
///
/// # Errors
/// When the shape is out of its ranges.
pub fn instance(shape: &Shape) -> Result<Instance, InstanceError> {
    if !(1..=SITES_MAX).contains(&shape.sites) {
        return Err(InstanceError::Sites(shape.sites));
    }
    let candidates = shape.candidates.min(shape.sites);
    if !(1..=CANDIDATES_MAX).contains(&candidates) {
        return Err(InstanceError::Candidates { group: 0, len: candidates });
    }
    let mut random = Random(shape.seed);
    let towns: Vec<(f64, f64)> = (0..TOWNS).map(|_| random.place()).collect();
    let sites: Vec<(f64, f64)> = (0..shape.sites).map(|n| random.around(towns[n % TOWNS])).collect();
    // Delay from each town to each site, nearest first: groups differ from their town by a little.
    let near: Vec<Vec<(u8, f64)>> = towns.iter().map(|&town| nearest(town, &sites, candidates)).collect();
    let mut groups = Vec::with_capacity(shape.groups);
    let mut load = vec![[0.0_f64; RESOURCES]; shape.sites];
    for _ in 0..shape.groups {
        let town = random.town();
        let weight = random.heavy();
        let demand = [weight, weight * random.between(0.02, 0.08), weight * random.between(3_000.0, 9_000.0)];
        let first = &mut load[usize::from(near[town][0].0)];
        first.iter_mut().zip(demand).for_each(|(load, demand)| *load += demand);
        groups.push((town, weight, demand));
    }
    let mut instance = Instance::new(&capacities(&load, shape.fill, &mut random))?;
    instance.reserve(shape.groups, shape.groups * candidates);
    let mut row = Vec::with_capacity(candidates);
    for (town, weight, demand) in groups {
        let access = random.between(1.0, 8.0);
        row.clear();
        row.extend(near[town].iter().map(|&(site, ms)| Candidate {
            site,
            cost_ms: (access + ms * random.between(1.0, 1.2) + random.between(0.0, 1.0)) as f32,
        }));
        let demand = demand.map(|one| one as f32);
        let group = Group { weight: weight as f32, demand, present: None, charge: 0.0, candidates: &row };
        instance.push(&group)?;
    }
    Ok(instance)
}

fn nearest(town: (f64, f64), sites: &[(f64, f64)], len: usize) -> Vec<(u8, f64)> {
    let delay = |(index, &site): (usize, &(f64, f64))| (index as u8, great_circle_km(town, site) / KM_PER_MS);
    let mut all: Vec<(u8, f64)> = sites.iter().enumerate().map(delay).collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1));
    all.truncate(len);
    all
}

fn capacities(load: &[[f64; RESOURCES]], fill: f64, random: &mut Random) -> Vec<Site> {
    let chance: Vec<f64> = load.iter().map(|_| random.between(0.3, 1.7)).collect();
    let chances: f64 = chance.iter().sum();
    let site = |(near, chance): (&[f64; RESOURCES], &f64)| {
        let one = |r: usize| {
            let total: f64 = load.iter().map(|load| load[r]).sum();
            let spare = if r == 0 { 1.0 } else { 1.1 };
            (0.5 * near[r] + 0.5 * total * chance / chances) * spare / fill
        };
        Site { capacity: std::array::from_fn(one), headroom: 0.0 }
    };
    load.iter().zip(&chance).map(site).collect()
}

/// Splitmix64 (Steele, Lea, Flood, OOPSLA 2014): small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// From low to below high.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Below a number that is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Pareto with shape 1.5, cut at 200 times the least: most groups are small.
    fn heavy(&mut self) -> f64 {
        (10.0 * (1.0 - self.unit()).powf(-1.0 / 1.5)).min(2_000.0)
    }

    /// Town n with a share in proportion to 1 / (n + 1), roughly.
    fn town(&mut self) -> usize {
        ((TOWNS as f64 + 1.0).powf(self.unit()) - 1.0) as usize % TOWNS
    }

    fn place(&mut self) -> (f64, f64) {
        (self.between(-45.0, 60.0), self.between(-180.0, 180.0))
    }

    fn around(&mut self, town: (f64, f64)) -> (f64, f64) {
        (town.0 + self.between(-AROUND, AROUND), town.1 + self.between(-AROUND, AROUND))
    }
}
