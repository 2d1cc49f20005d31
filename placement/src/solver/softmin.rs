//! What the candidates of one group cost under prices, and how softmin shares a group among them.
//!
//! A group is measured in *equivalents*: the larger of its weight and of its demand in units in which all groups
//! together want of each resource as much as they weigh. Per equivalent, costs and prices are milliseconds, whatever
//! the resources are counted in, and no price counts more than once.

use super::alone::Alone;
use super::instance::{CANDIDATES_MAX, Instance, NOWHERE, PerResource, RESOURCES, SITES_MAX};

/// Factors from the units of the resources to equivalents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Units(pub(super) PerResource<f64>);

impl Units {
    pub(super) fn of(instance: &Instance) -> Self {
        let weight: f64 = instance.weight.iter().map(|&weight| f64::from(weight)).sum();
        let mut demand = [0.0; RESOURCES];
        for group in &instance.demand {
            demand.iter_mut().zip(group).for_each(|(sum, &one)| *sum += f64::from(one));
        }
        // Without any weight only charges are left to be saved, and any unit will do.
        let weight = if weight > 0.0 { weight } else { 1.0 };
        Self(demand.map(|sum| if sum > 0.0 { weight / sum } else { 0.0 }))
    }

    fn narrow(self) -> PerResource<f32> {
        self.0.map(|unit| unit as f32)
    }

    /// A group in equivalents.
    pub(super) fn size(self, weight: f32, demand: PerResource<f32>) -> f32 {
        size(weight, wants(self.narrow(), demand))
    }
}

#[inline]
fn wants(unit: PerResource<f32>, demand: PerResource<f32>) -> PerResource<f32> {
    [demand[0] * unit[0], demand[1] * unit[1], demand[2] * unit[2]]
}

/// A group without weight and demand is still somewhere, and only its charge counts.
#[inline]
fn size(weight: f32, want: PerResource<f32>) -> f32 {
    weight.max(want[0]).max(want[1]).max(want[2]).max(f32::MIN_POSITIVE)
}

/// Prices by site in milliseconds per equivalent, in the width of the hot loops. The fourth value is what a closed
/// site adds: infinity.
pub(super) struct PriceTable {
    rows: Box<[[f32; 4]; SITES_MAX]>,
    unit: PerResource<f32>,
    /// What a group of each class pays at each site besides, in weight x ms.
    classes: Vec<[f32; SITES_MAX]>,
    /// Candidates that are too small for their group cost infinitely much; `None` when all count.
    alone: Option<Alone>,
}

impl PriceTable {
    pub(super) fn new(units: Units) -> Self {
        Self { rows: Box::new([[0.0; 4]; SITES_MAX]), unit: units.narrow(), classes: Vec::new(), alone: None }
    }

    /// Nothing has a price; closed sites stay closed.
    pub(super) fn free(units: Units, instance: &Instance) -> Self {
        let mut table = Self::new(units);
        table.set(&vec![[0.0; RESOURCES]; instance.sites()], &instance.open);
        table
    }

    /// Prices of classes, by class and cell, in weight x ms per group.
    pub(super) fn set_classes(&mut self, instance: &Instance, prices: &[Vec<f64>]) {
        self.classes.clear();
        for (spread, prices) in instance.spreads.iter().zip(prices) {
            let mut row = [0.0; SITES_MAX];
            for site in 0..instance.sites() as u8 {
                row[usize::from(site)] = prices[spread.cell(site)] as f32;
            }
            self.classes.push(row);
        }
    }

    /// Candidates that are too small for their group are none.
    pub(super) fn bar(&mut self, alone: Alone) {
        self.alone = Some(alone);
    }

    pub(super) fn set(&mut self, prices: &[PerResource<f64>], open: &[bool]) {
        for (row, (price, &open)) in self.rows.iter_mut().zip(prices.iter().zip(open)) {
            let closed = if open { 0.0 } else { f32::INFINITY };
            *row = [price[0] as f32, price[1] as f32, price[2] as f32, closed];
        }
    }
}

/// The candidates of one group under prices.
pub(super) struct Priced {
    /// Cost plus prices, in milliseconds per equivalent; infinite at closed sites. The first `len` count.
    pub(super) value_ms: [f32; CANDIDATES_MAX],
    pub(super) len: usize,
    /// The least of them.
    pub(super) best_ms: f32,
    /// The group in equivalents.
    pub(super) size: f32,
    /// Demand per equivalent, each 0 to 1.
    pub(super) share: PerResource<f32>,
    near: [(u8, f32); CANDIDATES_MAX],
    near_len: usize,
}

impl Priced {
    pub(super) fn empty() -> Self {
        Self {
            value_ms: [f32::INFINITY; CANDIDATES_MAX],
            len: 0,
            best_ms: f32::INFINITY,
            size: 0.0,
            share: [0.0; RESOURCES],
            near: [(0, 0.0); CANDIDATES_MAX],
            near_len: 0,
        }
    }

    /// Whether all candidates are closed.
    pub(super) fn stranded(&self) -> bool {
        self.best_ms == f32::INFINITY
    }

    /// Prices the candidates of a group. Constant time, no allocation.
    #[inline]
    pub(super) fn set(&mut self, instance: &Instance, table: &PriceTable, group: usize) {
        self.set_without_class(instance, table, group);
        if !table.classes.is_empty()
            && let Some(prices) = table.classes.get(usize::from(instance.class[group]))
        {
            self.add(instance.row(group).0, prices);
        }
    }

    /// The same, as if the group were in no class.
    #[inline]
    pub(super) fn set_without_class(&mut self, instance: &Instance, table: &PriceTable, group: usize) {
        let (sites, costs) = instance.row(group);
        let weight = instance.weight[group];
        let demand = instance.demand[group];
        let want = wants(table.unit, demand);
        let size = size(weight, want);
        let share = want.map(|want| want / size);
        let (pull, charge) = (weight / size, (instance.charge[group] / size).min(f32::MAX));
        let present = instance.present_raw(group);
        let moves_from = if present == NOWHERE { 0.0 } else { charge };
        let price = |site: u8, cost: f32, charge: f32| {
            let row = &table.rows[usize::from(site)];
            let priced = row[0] * share[0] + row[1] * share[1] + row[2] * share[2] + row[3];
            pull * cost + charge + priced
        };
        for ((value, &site), &cost) in self.value_ms.iter_mut().zip(sites).zip(costs) {
            *value = price(site, cost, moves_from);
        }
        if moves_from > 0.0
            && let Some(k) = sites.iter().position(|&site| u16::from(site) == present)
        {
            self.value_ms[k] = price(sites[k], costs[k], 0.0);
        }
        if sites.len() < self.len {
            self.value_ms[sites.len()..].fill(f32::INFINITY);
        }
        (self.len, self.size, self.share) = (sites.len(), size, share);
        if let Some(alone) = &table.alone {
            self.bar(alone.barred(group));
        }
        self.find_best();
    }

    /// Candidates by their bits are none.
    #[inline]
    fn bar(&mut self, mut barred: u16) {
        while barred != 0 {
            self.value_ms[barred.trailing_zeros() as usize] = f32::INFINITY;
            barred &= barred - 1;
        }
    }

    /// The least value, four at a time: what is beyond the candidates is infinite.
    #[inline]
    fn find_best(&mut self) {
        let less = |a: f32, b: f32| if b < a { b } else { a };
        let mut least = [f32::INFINITY; 4];
        for four in self.value_ms.as_chunks::<4>().0 {
            least.iter_mut().zip(four).for_each(|(least, &one)| *least = less(*least, one));
        }
        self.best_ms = less(less(least[0], least[1]), less(least[2], least[3]));
    }

    /// The first of the cheapest.
    #[inline]
    pub(super) fn best(&self) -> usize {
        self.value_ms.iter().position(|&value| value == self.best_ms).unwrap_or(0)
    }

    /// Adds what each site costs a group of a class.
    fn add(&mut self, sites: &[u8], prices: &[f32; SITES_MAX]) {
        for (&site, value) in sites.iter().zip(&mut self.value_ms) {
            // Closed sites stay infinite, and no open one becomes so: a group may weigh next to nothing.
            if *value < f32::INFINITY {
                *value = (*value + prices[usize::from(site)] / self.size).min(f32::MAX);
            }
        }
        self.find_best();
    }

    /// Finds the candidates that cost at most so much more than the best, and returns the only one if there is only one.
    #[inline]
    pub(super) fn find_near(&mut self, within_ms: f32) -> Option<usize> {
        let limit = self.best_ms + within_ms;
        let mut len = 0;
        for (k, &value) in (0..).zip(&self.value_ms) {
            // Written always, counted only if it is near: no branch to guess.
            self.near[len & (CANDIDATES_MAX - 1)] = (k, value);
            len += usize::from(value < limit);
        }
        // Where numbers are so large that the best is not below its own limit, it is alone.
        self.near_len = len;
        match len {
            0 => Some(self.best()),
            1 => Some(self.near[0].0.into()),
            _ => None,
        }
    }

    /// Shares the group among its near candidates by softmin at a temperature in milliseconds: `near` then has them with
    /// their shares, which sum to 1. Returns the sum before they were made so, 1 to 16: the softmin is the minimum less
    /// temperature x its logarithm. After [`Priced::find_near`].
    #[inline]
    pub(super) fn soften(&mut self, temperature_ms: f32) -> f32 {
        let inverse = 1.0 / temperature_ms;
        let mut sum = 0.0;
        for (_, share) in &mut self.near[..self.near_len] {
            *share = exp((self.best_ms - *share) * inverse);
            sum += *share;
        }
        let inverse = 1.0 / sum;
        self.near[..self.near_len].iter_mut().for_each(|(_, share)| *share *= inverse);
        sum
    }

    /// What [`Priced::soften`] found.
    #[inline]
    pub(super) fn near(&self) -> &[(u8, f32)] {
        &self.near[..self.near_len]
    }
}

/// Candidates that are farther, in temperatures below zero, have a share that single precision does not see beside 1.
pub(super) const NEAR: f32 = -16.0;

/// `e^x` for x in -16 to 0, and far below, to 2e-6 of its value.
///
/// The standard library's `exp` and `ln` may differ between platforms; these give the same bits everywhere, and so all nodes
/// the same answer. Power of two by the exponent's bits times a polynomial for the rest (Muller, Elementary Functions, ch. 6).
#[inline]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let scaled = x * std::f32::consts::LOG2_E;
    let rounded = scaled + ROUND;
    let whole = rounded - ROUND;
    let rest = (scaled - whole) * std::f32::consts::LN_2;
    let tail = 0.5 + rest * (1.0 / 6.0 + rest * (1.0 / 24.0 + rest * (1.0 / 120.0)));
    let fraction = 1.0 + rest + rest * rest * tail;
    let power = (rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    fraction * f32::from_bits(power)
}

/// `ln x` for x from 1, to 1e-6 up to 16 and to single precision beyond. Exponent times ln 2, and for the rest the series of the inverse hyperbolic tangent.
#[inline]
pub(crate) fn ln(x: f32) -> f32 {
    // Halves from the square root of 1/2 to that of 2, where the series is short.
    let shifted = x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
    let power = shifted >> 23;
    let rest = f32::from_bits(x.to_bits().wrapping_sub(power << 23));
    let s = (rest - 1.0) / (rest + 1.0);
    let square = s * s;
    let series =
        1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * (1.0 / 9.0))));
    power as f32 * std::f32::consts::LN_2 + 2.0 * s * series
}

#[cfg(test)]
mod tests {
    use super::{exp, ln};

    #[test]
    fn ln_is_right_to_single_precision() {
        for step in 0..=15_000_u16 {
            let x = 1.0 + f32::from(step) / 1000.0;
            assert!((f64::from(ln(x)) - f64::from(x).ln()).abs() < 1e-6, "{x}: {}", ln(x));
        }
    }

    #[test]
    fn exp_is_right_to_single_precision() {
        for step in 0..=3000_u16 {
            let x = -f32::from(step) / 100.0;
            let right = f64::from(x).exp();
            assert!((f64::from(exp(x)) / right - 1.0).abs() < 5e-6, "{x}: {} for {right}", exp(x));
        }
    }
}
