//! Prices by projected Newton on the smoothed dual.
//!
//! With a price per site and resource the groups no longer know of one another: each takes its cheapest candidate. The
//! sum of these costs less the price of all room is a lower bound of the optimum whatever the prices are (Lagrangian
//! relaxation), and the best prices give the best bound. Minima have corners, so softmin stands for them at a temperature
//! that falls. One pass over the groups gives value, gradient and Hessian together; a step that made the value worse
//! is taken back and damped (Levenberg, Marquardt).

use super::instance::{CANDIDATES_MAX, Instance, PerResource, RESOURCES, SITES_MAX};
use super::softmin::{NEAR, PriceTable, Priced, Units, ln};
use super::spread;

/// Price above which nobody is helped by more of it, in milliseconds per equivalent: demand that has no room anywhere
/// would raise prices for ever.
pub(super) const PRICE_MAX_MS: f64 = 2_000.0;
/// Candidates with a smaller share do not count for the curvature.
const SHARE_MIN: f32 = 1e-3;
/// Times that a step is asked for again, with prices held that would be negative.
const ACTIVE_ROUNDS: usize = 8;
/// Longest first step of a price, in temperatures.
const REACH: f64 = 8.0;
/// A variable that is not priced.
const NONE: u16 = u16::MAX;

/// What one pass over the groups finds.
struct Pass {
    /// Smoothed dual, in equivalents x ms.
    value: f64,
    /// Expected load less room, in equivalents.
    excess: Vec<PerResource<f64>>,
    /// Curvature over the variables, upper triangle, row by row.
    curvature: Vec<f64>,
}

/// Which (site, resource) pairs have a price that may change.
struct Variables {
    of: Box<[[u16; RESOURCES]; SITES_MAX]>,
    list: Vec<(u8, u8)>,
}

impl Variables {
    fn none() -> Self {
        Self { of: Box::new([[NONE; RESOURCES]; SITES_MAX]), list: Vec::new() }
    }

    fn set(&mut self, free: impl Iterator<Item = (u8, u8)>) {
        for &(site, resource) in &self.list {
            self.of[usize::from(site)][usize::from(resource)] = NONE;
        }
        self.list.clear();
        for (site, resource) in free {
            self.of[usize::from(site)][usize::from(resource)] = self.list.len() as u16;
            self.list.push((site, resource));
        }
    }
}

/// A candidate's price that a group feels.
#[derive(Clone, Copy, Default)]
struct Row {
    variable: usize,
    candidate: u8,
    share: f64,
    demand: f64,
}

/// How long to go on.
#[derive(Clone, Copy)]
pub(super) struct Effort {
    /// All groups are looked at, or every n-th, which then stands for its neighbours.
    pub(super) stride: usize,
    /// In milliseconds.
    pub(super) temperature_ms: f32,
    pub(super) passes_max: u32,
    /// A step that promises less, as a share of the value, is not worth a pass.
    pub(super) gain_min: f64,
}

pub(super) struct Dual<'a> {
    instance: &'a Instance,
    table: PriceTable,
    /// By class and cell, in weight x ms per group.
    pub(super) classes: Vec<Vec<f64>>,
    variables: Variables,
    room: Vec<PerResource<f64>>,
    /// Passes over the groups, whole ones.
    pub(super) passes: f64,
}

impl<'a> Dual<'a> {
    pub(super) fn new(instance: &'a Instance, units: Units, classes: Vec<Vec<f64>>) -> Self {
        let room = |room: &PerResource<f64>| {
            let mut room = *room;
            room.iter_mut().zip(units.0).for_each(|(room, unit)| *room *= unit);
            room
        };
        let mut table = PriceTable::new(units);
        table.set_classes(instance, &classes);
        Self {
            instance,
            table,
            classes,
            variables: Variables::none(),
            room: instance.room.iter().map(room).collect(),
            passes: 0.0,
        }
    }

    /// Improves prices at one temperature.
    pub(super) fn climb(&mut self, prices: &mut [PerResource<f64>], effort: Effort) {
        self.variables.set(std::iter::empty());
        self.choose_variables(prices, None);
        let mut pass = self.pass(prices, effort);
        self.choose_variables(prices, Some(&pass.excess));
        if self.variables.list.len().pow(2) != pass.curvature.len() {
            pass = self.pass(prices, effort);
        }
        // The quadratic model is right about as far as softmin bends: some temperatures.
        let mut reach_ms = f64::from(effort.temperature_ms) * REACH;
        let mut left = effort.passes_max;
        while left > 0 && !self.variables.list.is_empty() {
            let before = prices.to_vec();
            let promise = self.step(prices, &pass, f64::from(effort.temperature_ms), reach_ms);
            if promise <= effort.gain_min * pass.value.abs() {
                break;
            }
            left -= 1;
            let next = self.pass(prices, effort);
            let kept = (next.value - pass.value) / promise;
            if kept < 0.05 {
                prices.copy_from_slice(&before);
                reach_ms *= 0.25;
                continue;
            }
            reach_ms *= if kept > 0.75 {
                2.0
            } else if kept < 0.3 {
                0.5
            } else {
                1.0
            };
            let known = self.variables.list.len();
            self.choose_variables(prices, Some(&next.excess));
            // Curvature of a variable that has just become one is not known yet.
            pass = if self.variables.list.len() == known { next } else { self.pass(prices, effort) };
        }
    }

    /// Improves the prices of classes under these prices.
    pub(super) fn spread(&mut self, prices: &[PerResource<f64>]) {
        if !self.instance.spreads.is_empty() {
            self.table.set(prices, &self.instance.open);
            spread::ascend(self.instance, &mut self.table, &mut self.classes);
        }
    }

    /// Free are those that have a price, and those that need one. Once free, always free: prices at zero are held there by
    /// the step itself.
    fn choose_variables(&mut self, prices: &[PerResource<f64>], excess: Option<&[PerResource<f64>]>) {
        let mut free = Vec::new();
        for (site, price) in prices.iter().enumerate() {
            for resource in 0..RESOURCES {
                let needed = excess.is_some_and(|excess| excess[site][resource] > 0.0);
                let bounded = self.room[site][resource].is_finite() && self.instance.open[site];
                let was = self.variables.of[site][resource] != NONE;
                if bounded && (price[resource] > 0.0 || needed || was) {
                    free.push((site as u8, resource as u8));
                }
            }
        }
        self.variables.set(free.into_iter());
    }

    fn pass(&mut self, prices: &[PerResource<f64>], effort: Effort) -> Pass {
        let instance = self.instance;
        self.table.set(prices, &instance.open);
        let stride = effort.stride;
        self.passes += 1.0 / stride as f64;
        let n = self.variables.list.len();
        let mut curvature = vec![0.0; n * n];
        let mut load = [[0.0_f64; RESOURCES]; SITES_MAX];
        let mut priced = Priced::empty();
        let mut value = 0.0;
        let certain_ms = effort.temperature_ms * -NEAR;
        let mut rows = [Row::default(); CANDIDATES_MAX * RESOURCES];
        for group in (0..instance.groups()).step_by(stride) {
            priced.set(instance, &self.table, group);
            if priced.stranded() {
                continue;
            }
            let (sites, _) = instance.row(group);
            let size = f64::from(priced.size);
            if priced.margin_ms > certain_ms {
                value += size * f64::from(priced.best_ms);
                let load = &mut load[usize::from(sites[priced.best])];
                (0..RESOURCES).for_each(|r| load[r] += size * f64::from(priced.share[r]));
                continue;
            }
            let sum = priced.soften(effort.temperature_ms);
            value += size * f64::from(priced.best_ms - effort.temperature_ms * ln(sum));
            for &(k, share) in priced.near() {
                let load = &mut load[usize::from(sites[usize::from(k)])];
                (0..RESOURCES).for_each(|r| load[r] += size * f64::from(share * priced.share[r]));
            }
            if n > 0 {
                self.add_curvature(&mut curvature, &mut rows, sites, &priced);
            }
        }
        let scale = stride as f64;
        curvature.iter_mut().for_each(|one| *one *= scale);
        let mut excess = Vec::with_capacity(prices.len());
        value *= scale;
        for (site, price) in prices.iter().enumerate() {
            let mut one = [f64::NEG_INFINITY; RESOURCES];
            for resource in 0..RESOURCES {
                let room = self.room[site][resource];
                if room.is_finite() {
                    one[resource] = load[site][resource] * scale - room;
                    value -= price[resource] * room;
                }
            }
            excess.push(one);
        }
        Pass { value, excess, curvature }
    }

    /// Second derivatives of one group's softmin, without the temperature: size x (p_i [i=j] - p_i p_j).
    #[inline]
    fn add_curvature(&self, curvature: &mut [f64], rows: &mut [Row], sites: &[u8], priced: &Priced) {
        let n = self.variables.list.len();
        let mut len = 0;
        for &(candidate, share) in priced.near().iter().filter(|(_, share)| *share > SHARE_MIN) {
            let variables = self.variables.of[usize::from(sites[usize::from(candidate)])];
            for (&variable, &demand) in variables.iter().zip(&priced.share) {
                if variable != NONE {
                    let (share, demand) = (f64::from(share), f64::from(demand));
                    rows[len] = Row { variable: usize::from(variable), candidate, share, demand };
                    len += 1;
                }
            }
        }
        let size = f64::from(priced.size);
        for (at, a) in rows[..len].iter().enumerate() {
            for b in &rows[at..len] {
                let same = if a.candidate == b.candidate { a.share } else { 0.0 };
                let (low, high) = (a.variable.min(b.variable), a.variable.max(b.variable));
                curvature[low * n + high] += size * a.demand * b.demand * (same - a.share * b.share);
            }
        }
    }

    /// One Newton step within the bounds of prices and at most so far for each; returns the gain that the quadratic
    /// model promises.
    fn step(&self, prices: &mut [PerResource<f64>], pass: &Pass, temperature_ms: f64, reach_ms: f64) -> f64 {
        let list = &self.variables.list;
        let gradient: Vec<f64> = list
            .iter()
            .map(|&(site, resource)| pass.excess[usize::from(site)][usize::from(resource)])
            .collect();
        let price = |at: usize| prices[usize::from(list[at].0)][usize::from(list[at].1)];
        let low = |at: usize| -price(at).min(reach_ms);
        let high = |at: usize| (PRICE_MAX_MS - price(at)).min(reach_ms);
        // A price at a bound with the gradient pointing out stays where it is.
        let stays =
            |at: usize| low(at) >= 0.0 && gradient[at] <= 0.0 || high(at) <= 0.0 && gradient[at] >= 0.0;
        let mut free: Vec<usize> = (0..list.len()).filter(|&at| !stays(at)).collect();
        let mut wanted = vec![0.0; list.len()];
        // A price that the step takes beyond a bound goes to the bound, and the others are asked again, knowing that.
        for _ in 0..ACTIVE_ROUNDS {
            let step = self.newton(pass, &gradient, &free, &wanted, temperature_ms);
            // Numbers at the edge of their range may overflow; such a step is none.
            let usable = |by: f64| if by.is_finite() { by } else { 0.0 };
            free.iter().zip(&step).for_each(|(&at, &by)| wanted[at] = usable(by).clamp(low(at), high(at)));
            let before = free.len();
            let inside: Vec<bool> = free.iter().zip(&step).map(|(&at, by)| *by == wanted[at]).collect();
            let mut inside = inside.iter();
            free.retain(|_| inside.next() == Some(&true));
            if free.len() == before {
                break;
            }
            free.iter().for_each(|&at| wanted[at] = 0.0);
        }
        let all = list.len();
        let mut promise = 0.0;
        for (at, &(site, resource)) in list.iter().enumerate() {
            prices[usize::from(site)][usize::from(resource)] += wanted[at];
            let bend: f64 = (0..all).map(|j| pass.curvature[at.min(j) * all + at.max(j)] * wanted[j]).sum();
            promise += wanted[at] * (gradient[at] - 0.5 * bend / temperature_ms);
        }
        promise
    }

    /// Steps of the free prices; `held` has those of the others, and zero for the free.
    fn newton(
        &self,
        pass: &Pass,
        gradient: &[f64],
        free: &[usize],
        held: &[f64],
        temperature_ms: f64,
    ) -> Vec<f64> {
        let (n, all) = (free.len(), self.variables.list.len());
        let mut matrix = vec![0.0; n * n];
        for (i, &row) in free.iter().enumerate() {
            for (j, &column) in free.iter().enumerate().skip(i) {
                matrix[j * n + i] = pass.curvature[row.min(column) * all + row.max(column)] / temperature_ms;
            }
            // Where nobody hesitates there is no curvature; a little of it keeps the system solvable, and the reach bounds
            // the step.
            let (site, resource) = self.variables.list[row];
            let room = self.room[usize::from(site)][usize::from(resource)].max(1e-9);
            let diagonal = &mut matrix[i * n + i];
            *diagonal = *diagonal * (1.0 + 1e-6) + room * 1e-4 / temperature_ms.max(0.1);
        }
        let pull = |row: usize| -> f64 {
            let one =
                |(column, by): (usize, &f64)| pass.curvature[row.min(column) * all + row.max(column)] * by;
            held.iter().enumerate().filter(|(_, by)| **by != 0.0).map(one).sum::<f64>() / temperature_ms
        };
        let mut step: Vec<f64> = free.iter().map(|&at| gradient[at] - pull(at)).collect();
        solve_positive(&mut matrix, &mut step);
        step
    }

    pub(super) fn groups(&self) -> usize {
        self.instance.groups()
    }
}

/// Solves A x = b in place by Cholesky; A is symmetric, positive and given by its lower triangle.
fn solve_positive(matrix: &mut [f64], b: &mut [f64]) {
    let n = b.len();
    for i in 0..n {
        for j in 0..=i {
            let (above, below) = matrix.split_at(i * n);
            let row_j = if i == j { &below[..j] } else { &above[j * n..j * n + j] };
            let dot: f64 = below[..j].iter().zip(row_j).map(|(a, b)| a * b).sum();
            let value = matrix[i * n + j] - dot;
            matrix[i * n + j] = if i == j { value.max(1e-12).sqrt() } else { value / matrix[j * n + j] };
        }
    }
    for i in 0..n {
        let dot: f64 = (0..i).map(|j| matrix[i * n + j] * b[j]).sum();
        b[i] = (b[i] - dot) / matrix[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|j| matrix[j * n + i] * b[j]).sum();
        b[i] = (b[i] - dot) / matrix[i * n + i];
    }
}

#[cfg(test)]
mod tests {
    use super::solve_positive;

    #[test]
    fn a_positive_system_is_solved() {
        let mut lower = vec![4.0, 0.0, 0.0, 2.0, 5.0, 0.0, 1.0, 3.0, 6.0];
        let mut b = vec![4.0 + 4.0 + 3.0, 2.0 + 10.0 + 9.0, 1.0 + 6.0 + 18.0];
        solve_positive(&mut lower, &mut b);
        for (got, right) in b.iter().zip([1.0, 2.0, 3.0]) {
            assert!((got - right).abs() < 1e-12, "{b:?}");
        }
    }
}
