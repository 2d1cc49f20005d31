//! Prices by projected Newton on the smoothed dual.
//!
//! With a price per site and resource the groups no longer know of one another: each takes its cheapest candidate. The
//! sum of these costs less the price of all room is a lower bound of the optimum whatever the prices are (Lagrangian
//! relaxation), and the best prices give the best bound. Minima have corners, so softmin stands for them at a temperature
//! that falls. One pass over the groups gives value, gradient and Hessian together; a step that made the value worse
//! is taken back and damped (Levenberg, Marquardt).

use super::alone::Alone;
use super::instance::{CANDIDATES_MAX, Instance, PerResource, RESOURCES, SITES_MAX};
use super::sample::Drawn;
use super::softmin::{NEAR, PriceTable, Priced, Units, ln};
use super::spread;

/// Price above which nobody is helped by more of it, in milliseconds per equivalent: demand that has no room anywhere
/// would raise prices for ever.
pub(super) const PRICE_MAX_MS: f64 = 2_000.0;
/// Candidates with a smaller share do not count for the curvature.
const SHARE_MIN: f32 = 1e-3;
/// Known variables from which others may be guessed.
const KNOWN_MIN: usize = 8;
/// Rounds in which the best step by the model is found.
const MODEL_ROUNDS: usize = 12;
/// A round that gains a smaller share is the last.
const MODEL_GAIN_MIN: f64 = 1e-3;
/// Times that a step bent at the box, which gains nothing, is halved.
const HALVINGS: usize = 4;
/// Longest first step of a price, in temperatures.
const REACH: f64 = 4.0;
/// Share by which a bound is clearly higher than another.
const CLEARLY: f64 = 0.01;
/// A variable that is not priced.
const NONE: u16 = u16::MAX;

/// What one pass over the groups finds.
struct Pass {
    /// Smoothed dual, in equivalents x ms.
    value: f64,
    /// The dual itself: a lower bound, as far as the groups were all looked at.
    bound: f64,
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
pub(super) struct Effort<'s> {
    /// Groups that stand for all; `None` when all are looked at.
    pub(super) sample: Option<&'s [Drawn]>,
    /// In milliseconds.
    pub(super) temperature_ms: f32,
    pub(super) passes_max: u32,
    /// A step that promises less, as a share of the value, is not worth a pass.
    pub(super) gain_min: f64,
}

pub(super) struct Dual<'a> {
    pub(super) instance: &'a Instance,
    pub(super) units: Units,
    table: PriceTable,
    /// By class and cell, in weight x ms per group.
    pub(super) classes: Vec<Vec<f64>>,
    variables: Variables,
    room: Vec<PerResource<f64>>,
    /// Passes over the groups, whole ones.
    pub(super) passes: f64,
    best: Option<Best>,
    /// The bound of the prices where the last climb ended.
    last: f64,
}

/// The prices of a pass over all groups whose bound is the highest so far.
struct Best {
    bound: f64,
    prices: Vec<PerResource<f64>>,
    classes: Vec<Vec<f64>>,
}

impl<'a> Dual<'a> {
    pub(super) fn new(instance: &'a Instance, units: Units, classes: Vec<Vec<f64>>) -> Self {
        let alone = Alone::of(instance).for_prices(instance);
        let room = |(site, room): (usize, &PerResource<f64>)| {
            let mut room = alone.room(site, room);
            room.iter_mut().zip(units.0).for_each(|(room, unit)| *room *= unit);
            room
        };
        let room = instance.room.iter().enumerate().map(room).collect();
        let mut table = PriceTable::new(units);
        table.set_classes(instance, &classes);
        table.bar(alone);
        let variables = Variables::none();
        Self {
            instance,
            units,
            table,
            classes,
            variables,
            room,
            passes: 0.0,
            best: None,
            last: f64::NEG_INFINITY,
        }
    }

    /// Improves prices at one temperature.
    pub(super) fn climb(&mut self, prices: &mut [PerResource<f64>], effort: Effort<'_>) {
        self.variables.set(std::iter::empty());
        self.choose_variables(prices, None);
        let mut pass = self.pass(prices, effort);
        pass = self.with_all_variables(prices, pass, effort);
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
            pass = self.with_all_variables(prices, next, effort);
        }
        self.last = pass.bound;
    }

    /// A pass that also knows the variables that have just become such. How their prices bend the value is guessed from
    /// those that are known, which saves a pass over a sample; the next one knows better. The last steps, over all groups, take no guess.
    fn with_all_variables(
        &mut self,
        prices: &[PerResource<f64>],
        mut pass: Pass,
        effort: Effort<'_>,
    ) -> Pass {
        let known = self.variables.list.clone();
        self.choose_variables(prices, Some(&pass.excess));
        let (old, new) = (known.len(), self.variables.list.len());
        if new == old {
            return pass;
        }
        if old < KNOWN_MIN || effort.sample.is_none() {
            return self.pass(prices, effort);
        }
        let room = |(site, resource): (u8, u8)| self.room[usize::from(site)][usize::from(resource)];
        let bend: f64 = (0..old).map(|at| pass.curvature[at * old + at]).sum();
        let bend = bend / known.iter().map(|&one| room(one)).sum::<f64>().max(1e-9);
        let mut curvature = vec![0.0; new * new];
        let place = |one: (u8, u8)| usize::from(self.variables.of[usize::from(one.0)][usize::from(one.1)]);
        for (at, &one) in self.variables.list.iter().enumerate() {
            curvature[at * new + at] = bend * room(one);
        }
        // Both lists are in the order of sites and resources, so the upper triangle stays one.
        for (row, &one) in known.iter().enumerate() {
            for (column, &other) in known.iter().enumerate().skip(row) {
                curvature[place(one) * new + place(other)] = pass.curvature[row * old + column];
            }
        }
        pass.curvature = curvature;
        pass
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

    fn pass(&mut self, prices: &[PerResource<f64>], effort: Effort<'_>) -> Pass {
        let instance = self.instance;
        self.table.set(prices, &instance.open);
        let len = effort.sample.map_or(instance.groups(), <[Drawn]>::len);
        self.passes += len as f64 / instance.groups().max(1) as f64;
        let n = self.variables.list.len();
        let mut curvature = vec![0.0; n * n];
        let mut load = [[0.0_f64; RESOURCES]; SITES_MAX];
        let mut priced = Priced::empty();
        // At the temperature, and at none.
        let (mut soft, mut sharp) = (0.0, 0.0);
        let certain_ms = effort.temperature_ms * -NEAR;
        let mut rows = [Row::default(); CANDIDATES_MAX * RESOURCES];
        for at in 0..len {
            let (group, stands_for) = match effort.sample {
                Some(sample) => (sample[at].group as usize, Some(sample[at].size)),
                None => (at, None),
            };
            priced.set(instance, &self.table, group);
            if priced.stranded() {
                continue;
            }
            let (sites, _) = instance.row(group);
            let size = f64::from(stands_for.unwrap_or(priced.size));
            let least = size * f64::from(priced.best_ms);
            sharp += least;
            if let Some(only) = priced.find_near(certain_ms) {
                soft += least;
                let load = &mut load[usize::from(sites[only])];
                (0..RESOURCES).for_each(|r| load[r] += size * f64::from(priced.share[r]));
                continue;
            }
            let sum = priced.soften(effort.temperature_ms);
            soft += size * f64::from(priced.best_ms - effort.temperature_ms * ln(sum));
            for &(k, share) in priced.near() {
                let load = &mut load[usize::from(sites[usize::from(k)])];
                (0..RESOURCES).for_each(|r| load[r] += size * f64::from(share * priced.share[r]));
            }
            if n > 0 {
                self.add_curvature(&mut curvature, &mut rows, sites, &priced, size);
            }
        }
        let mut excess = Vec::with_capacity(prices.len());
        let mut paid = 0.0;
        for (site, price) in prices.iter().enumerate() {
            let mut one = [f64::NEG_INFINITY; RESOURCES];
            for resource in 0..RESOURCES {
                let room = self.room[site][resource];
                if room.is_finite() {
                    one[resource] = load[site][resource] - room;
                    paid += price[resource] * room;
                }
            }
            excess.push(one);
        }
        let bound = sharp - paid - self.paid_for_classes();
        if effort.sample.is_none() && self.best.as_ref().is_none_or(|best| bound > best.bound) {
            self.best = Some(Best { bound, prices: prices.to_vec(), classes: self.classes.clone() });
        }
        Pass { value: soft - paid, bound, excess, curvature }
    }

    fn paid_for_classes(&self) -> f64 {
        let spreads = self.instance.spreads.iter().zip(&self.classes);
        let pays = |(&price, &limit): (&f64, &f64)| if price > 0.0 { price * limit } else { 0.0 };
        spreads.flat_map(|(spread, prices)| prices.iter().zip(&spread.limits).map(pays)).sum()
    }

    /// The prices of a pass whose bound is clearly higher than that of the last ones, those of classes too. Where the bounds are
    /// near one another the last ones are the better prices: they say what room is worth to groups that hesitate.
    pub(super) fn take_best(mut self, prices: &mut [PerResource<f64>]) -> (Vec<Vec<f64>>, f64) {
        // The last prices of classes were found after the last climb.
        if !self.instance.spreads.is_empty() {
            let effort = Effort { sample: None, temperature_ms: 0.05, passes_max: 0, gain_min: 0.0 };
            self.last = self.pass(prices, effort).bound;
        }
        match self.best.take().filter(|best| best.bound - self.last > CLEARLY * best.bound.abs()) {
            Some(best) => {
                prices.copy_from_slice(&best.prices);
                (best.classes, self.passes)
            }
            None => (self.classes, self.passes),
        }
    }

    /// Second derivatives of one group's softmin, without the temperature: size x (p_i [i=j] - p_i p_j).
    #[inline]
    fn add_curvature(
        &self,
        curvature: &mut [f64],
        rows: &mut [Row],
        sites: &[u8],
        priced: &Priced,
        size: f64,
    ) {
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
        for (at, a) in rows[..len].iter().enumerate() {
            for b in &rows[at..len] {
                let same = if a.candidate == b.candidate { a.share } else { 0.0 };
                let (low, high) = (a.variable.min(b.variable), a.variable.max(b.variable));
                curvature[low * n + high] += size * a.demand * b.demand * (same - a.share * b.share);
            }
        }
    }

    /// The best step by the quadratic model, within the bounds of prices and at most so far for each; returns the gain that the
    /// model promises.
    fn step(&self, prices: &mut [PerResource<f64>], pass: &Pass, temperature_ms: f64, reach_ms: f64) -> f64 {
        let list = &self.variables.list;
        let at = |&(site, resource): &(u8, u8)| (usize::from(site), usize::from(resource));
        let price = |one: &(u8, u8)| prices[at(one).0][at(one).1];
        let model = Model {
            matrix: self.matrix(pass, temperature_ms),
            gradient: list.iter().map(|one| pass.excess[at(one).0][at(one).1]).collect(),
            low: list.iter().map(|one| -price(one).min(reach_ms)).collect(),
            high: list.iter().map(|one| (PRICE_MAX_MS - price(one)).min(reach_ms)).collect(),
        };
        let (step, promise) = model.best();
        for (one, by) in list.iter().zip(step) {
            prices[at(one).0][at(one).1] += by;
        }
        promise
    }

    /// The curvature as a whole matrix, by which the gradient falls.
    fn matrix(&self, pass: &Pass, temperature_ms: f64) -> Vec<f64> {
        let n = self.variables.list.len();
        let mut matrix = vec![0.0; n * n];
        for row in 0..n {
            for column in row..n {
                let one = pass.curvature[row * n + column] / temperature_ms;
                // Numbers at the edge of their range may overflow; what they bend is not known.
                let one = if one.is_finite() { one } else { 0.0 };
                (matrix[row * n + column], matrix[column * n + row]) = (one, one);
            }
            // Where nobody hesitates there is no curvature; a little of it keeps the system solvable, and the reach bounds
            // the step.
            let (site, resource) = self.variables.list[row];
            let room = self.room[usize::from(site)][usize::from(resource)].max(1e-9);
            let diagonal = &mut matrix[row * n + row];
            *diagonal = *diagonal * (1.0 + 1e-6) + room * 1e-4 / temperature_ms.max(0.1);
        }
        matrix
    }
}

/// A concave quadratic within a box: gradient x step - step x matrix x step / 2.
struct Model {
    /// Symmetric and positive.
    matrix: Vec<f64>,
    gradient: Vec<f64>,
    /// At most zero.
    low: Vec<f64>,
    /// At least zero.
    high: Vec<f64>,
}

impl Model {
    /// Where it is greatest, nearly, and by how much it is above zero there. Newton steps in the free variables, bent at the box,
    /// and after each a sweep over all variables, which frees and holds them.
    fn best(&self) -> (Vec<f64>, f64) {
        let n = self.gradient.len();
        let mut step = vec![0.0; n];
        let mut rest = self.gradient.clone();
        let mut value = 0.0;
        for _ in 0..MODEL_ROUNDS {
            let before = value;
            let free: Vec<usize> = (0..n).filter(|&at| self.is_free(&step, &rest, at)).collect();
            let wish = self.newton(&free, &rest);
            let mut share = 1.0;
            for _ in 0..HALVINGS {
                let mut tried = step.clone();
                for (&at, by) in free.iter().zip(&wish) {
                    tried[at] = (step[at] + share * by).clamp(self.low[at], self.high[at]);
                }
                let tried_rest = self.rest(&tried);
                let tried_value = self.value(&tried, &tried_rest);
                if tried_value > value {
                    (step, rest) = (tried, tried_rest);
                    break;
                }
                share *= 0.5;
            }
            self.sweep(&mut step, &mut rest);
            value = self.value(&step, &rest);
            if value - before <= MODEL_GAIN_MIN * value {
                break;
            }
        }
        (step, value)
    }

    /// Whether a variable is inside the box, or would go there.
    fn is_free(&self, step: &[f64], rest: &[f64], at: usize) -> bool {
        !(step[at] <= self.low[at] && rest[at] <= 0.0 || step[at] >= self.high[at] && rest[at] >= 0.0)
    }

    fn newton(&self, free: &[usize], rest: &[f64]) -> Vec<f64> {
        let (n, all) = (free.len(), self.gradient.len());
        let mut matrix = vec![0.0; n * n];
        for (i, &row) in free.iter().enumerate() {
            for (j, &column) in free[..=i].iter().enumerate() {
                matrix[i * n + j] = self.matrix[row * all + column];
            }
        }
        let mut step: Vec<f64> = free.iter().map(|&at| rest[at]).collect();
        solve_positive(&mut matrix, &mut step);
        step.iter_mut().for_each(|by| *by = if by.is_finite() { *by } else { 0.0 });
        step
    }

    /// The gradient that is left after a step.
    fn rest(&self, step: &[f64]) -> Vec<f64> {
        let n = step.len();
        let pull = |row: usize| -> f64 {
            self.matrix[row * n..(row + 1) * n].iter().zip(step).map(|(one, by)| one * by).sum()
        };
        (0..n).map(|row| self.gradient[row] - pull(row)).collect()
    }

    fn value(&self, step: &[f64], rest: &[f64]) -> f64 {
        let both = self.gradient.iter().zip(rest).zip(step);
        0.5 * both.map(|((gradient, rest), by)| by * (gradient + rest)).sum::<f64>()
    }

    /// Each variable at its best, the others as they are.
    fn sweep(&self, step: &mut [f64], rest: &mut [f64]) {
        let n = step.len();
        for at in 0..n {
            let row = &self.matrix[at * n..(at + 1) * n];
            let to = (step[at] + rest[at] / row[at].max(1e-12)).clamp(self.low[at], self.high[at]);
            let by = to - step[at];
            if by != 0.0 {
                step[at] = to;
                rest.iter_mut().zip(row).for_each(|(rest, one)| *rest -= one * by);
            }
        }
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
    use proptest::prelude::*;

    use super::{Model, solve_positive};

    proptest! {
        #[test]
        fn no_variable_gains_after_the_best_step_within_a_box(
            factors in proptest::collection::vec(-1.0..1.0_f64, 36),
            gradient in proptest::collection::vec(-5.0..5.0_f64, 6),
            low in proptest::collection::vec(-1.0..0.0_f64, 6),
            high in proptest::collection::vec(0.0..1.0_f64, 6),
        ) {
            let n = 6;
            let matrix = (0..n * n).map(|at| {
                let (row, column) = (at / n, at % n);
                let dot: f64 = (0..n).map(|k| factors[row * n + k] * factors[column * n + k]).sum();
                dot + if row == column { 0.1 } else { 0.0 }
            });
            let model = Model { matrix: matrix.collect(), gradient, low, high };
            let (step, promise) = model.best();
            let rest = model.rest(&step);
            prop_assert!(promise >= 0.0);
            for at in 0..n {
                prop_assert!(step[at] >= model.low[at] && step[at] <= model.high[at]);
                // What one variable alone could still gain.
                let to = (step[at] + rest[at] / model.matrix[at * n + at]).clamp(model.low[at], model.high[at]);
                let by = to - step[at];
                let gain = by * (rest[at] - 0.5 * by * model.matrix[at * n + at]);
                prop_assert!(gain <= 0.01 * promise + 1e-9, "{gain} of {promise} by variable {at}: {step:?}");
            }
        }
    }

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
