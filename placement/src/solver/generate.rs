//! Instances that look like a network operator's, from a seed: for benches, tests and `limosa bench placement`.
//!
//! Sites and groups lie around towns, the larger ones with more of both; a group's traffic is heavy-tailed; delay is the
//! great circle with a detour; a group's candidates are its nearest sites. Capacities follow half what is near and
//! half chance, so that some sites are short while the sum is not.

use super::instance::{
    CANDIDATES_MAX, Candidate, Group, Instance, InstanceError, RESOURCES, SITES_MAX, Site,
};
use flow::sample::Seeded;

use crate::core::delay::{KM_PER_MS, great_circle_km};

/// How traffic is shared among groups.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Load {
    /// Heavy-tailed: Pareto with shape 1.5, cut at 200 times the least.
    #[default]
    Pareto,
    /// All the same.
    Equal,
    /// The n-th largest has 1 / n to this power, above 0. The nearest site of each could hold it alone.
    Zipf(f64),
    /// As `Pareto`, and one group has this share of all, above 0 and below 1. Its nearest site could hold it alone.
    Heavy(f64),
}

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
    /// How traffic is shared among groups.
    pub load: Load,
    /// Same seed, same instance.
    pub seed: u64,
}

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
    let mut random = Seeded::new(shape.seed);
    let towns: Vec<(f64, f64)> = (0..TOWNS).map(|_| place(&mut random)).collect();
    let sites: Vec<(f64, f64)> = (0..shape.sites).map(|n| around(&mut random, towns[n % TOWNS])).collect();
    // Delay from each town to each site, nearest first: groups differ from their town by a little.
    let near: Vec<Vec<(u8, f64)>> = towns.iter().map(|&town| nearest(town, &sites, candidates)).collect();
    let mut groups = Vec::with_capacity(shape.groups);
    let ranks = ranks(shape, &mut random);
    let mut rest = 0.0;
    let mut load = vec![[0.0_f64; RESOURCES]; shape.sites];
    for n in 0..shape.groups {
        let town = town(&mut random);
        let weight = match shape.load {
            Load::Equal => 30.0,
            Load::Zipf(power) => 1e6 * ranks.get(n).map_or(1.0, |&rank| f64::from(rank + 1).powf(-power)),
            // The last one, when all others are known.
            Load::Heavy(share) if n + 1 == shape.groups && n > 0 => rest * share / (1.0 - share),
            Load::Pareto | Load::Heavy(_) => heavy(&mut random),
        };
        rest += weight;
        let demand = [
            weight,
            weight * between(&mut random, 0.02, 0.08),
            weight * between(&mut random, 3_000.0, 9_000.0),
        ];
        let first = &mut load[usize::from(near[town][0].0)];
        first.iter_mut().zip(demand).for_each(|(load, demand)| *load += demand);
        groups.push((town, weight, demand));
    }
    let mut sites = capacities(&load, shape.fill, &mut random);
    let uneven = matches!(shape.load, Load::Zipf(_) | Load::Heavy(_));
    for (town, _, demand) in groups.iter().filter(|_| uneven) {
        let nearest = &mut sites[usize::from(near[*town][0].0)].capacity;
        nearest
            .iter_mut()
            .zip(demand)
            .for_each(|(capacity, demand)| *capacity = capacity.max(demand / shape.fill));
    }
    let mut instance = Instance::new(&sites)?;
    instance.reserve(shape.groups, shape.groups * candidates);
    let mut row = Vec::with_capacity(candidates);
    for (town, weight, demand) in groups {
        let access = between(&mut random, 1.0, 8.0);
        row.clear();
        row.extend(near[town].iter().map(|&(site, ms)| Candidate {
            site,
            cost_ms: (access + ms * between(&mut random, 1.0, 1.2) + between(&mut random, 0.0, 1.0)) as f32,
        }));
        let demand = demand.map(|one| one as f32);
        let group = Group {
            weight: weight as f32,
            demand,
            present: None,
            charge: 0.0,
            left_out_ms: f32::INFINITY,
            class: None,
            candidates: &row,
        };
        instance.push(&group)?;
    }
    Ok(instance)
}

/// The place of each group in the order of weight, 0 for the heaviest, where that is asked for.
fn ranks(shape: &Shape, random: &mut Seeded) -> Vec<u32> {
    if !matches!(shape.load, Load::Zipf(_)) {
        return Vec::new();
    }
    let mut ranks: Vec<u32> = (0..shape.groups as u32).collect();
    for n in (1..ranks.len()).rev() {
        ranks.swap(n, random.below(n as u64 + 1) as usize);
    }
    ranks
}

fn nearest(town: (f64, f64), sites: &[(f64, f64)], len: usize) -> Vec<(u8, f64)> {
    let delay = |(index, &site): (usize, &(f64, f64))| (index as u8, great_circle_km(town, site) / KM_PER_MS);
    let mut all: Vec<(u8, f64)> = sites.iter().enumerate().map(delay).collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1));
    all.truncate(len);
    all
}

fn capacities(load: &[[f64; RESOURCES]], fill: f64, random: &mut Seeded) -> Vec<Site> {
    let chance: Vec<f64> = load.iter().map(|_| between(random, 0.3, 1.7)).collect();
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

/// From low to below high.
pub fn between(random: &mut Seeded, low: f64, high: f64) -> f64 {
    low + (high - low) * random.fraction()
}

/// Pareto with shape 1.5, cut at 200 times the least: most groups are small.
fn heavy(random: &mut Seeded) -> f64 {
    (10.0 * (1.0 - random.fraction()).powf(-1.0 / 1.5)).min(2_000.0)
}

/// Town n with a share in proportion to 1 / (n + 1), roughly.
fn town(random: &mut Seeded) -> usize {
    ((TOWNS as f64 + 1.0).powf(random.fraction()) - 1.0) as usize % TOWNS
}

fn place(random: &mut Seeded) -> (f64, f64) {
    (between(random, -45.0, 60.0), between(random, -180.0, 180.0))
}

fn around(random: &mut Seeded, town: (f64, f64)) -> (f64, f64) {
    (town.0 + between(random, -AROUND, AROUND), town.1 + between(random, -AROUND, AROUND))
}
