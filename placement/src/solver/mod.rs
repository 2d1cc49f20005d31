//! Which group should be at which site: the least traffic-weighted delay within the capacities, with a certificate.
//!
//! An [`Instance`] says what is to be solved. A [`Solver`] keeps prices and placement between rounds, so that a round
//! after a small change is cheap. Every round ends with a [`Certificate`]: what the placement costs, and a lower bound that
//! no placement can beat, from the prices alone. Whoever has the instance and the prices can check it with
//! [`bound`]. No clock, no random: same input, same answer.
//!
//! The scheme is Lagrangian relaxation of the generalised assignment problem (Fisher, Management Science 27, 1981), with the
//! dual smoothed (Nesterov, Mathematical Programming 103, 2005) so that Newton's method can be used on it.

mod alone;
mod dual;
mod eject;
mod exchange;
pub mod generate;
pub mod greedy;
mod instance;
mod push;
mod round;
mod sample;
pub(crate) mod softmin;
mod spread;
#[cfg(test)]
mod spread_tests;
pub mod survive;
#[cfg(test)]
mod survive_tests;
#[cfg(test)]
mod tests;

pub use instance::{
    CANDIDATES_MAX, Candidate, Group, Instance, InstanceError, PerResource, RESOURCES, Resource, SITES_MAX,
    Site,
};
pub use spread::{CLASSES_MAX, Class, ClassConflict};

use alone::Alone;
use dual::{Dual, Effort};
use round::{Assignment, SLACK};
use sample::{Drawn, draw};
use serde::{Deserialize, Serialize};
use softmin::{PriceTable, Units};
use spread::Spread;

/// How much is known from the last round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing: prices are found anew.
    Cold,
    /// The last prices are near: much may have changed a little, or a little much.
    Warm,
    /// Prices stay. The groups that were touched since the last round choose again; others go only to make room, or to room
    /// that came free and is better for them.
    Touched,
}

/// What a round achieved, in weight x ms where nothing else is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Certificate {
    /// Delay, rules and move charges of the placement.
    pub cost: f64,
    /// No placement within the capacities costs less.
    pub bound: f64,
    /// What the prices alone prove of the bound: less where all places are as good, or prices far off.
    pub priced: f64,
    /// What it would cost without capacities.
    pub unconstrained: f64,
    /// Groups that are to move.
    pub moves: usize,
    /// Groups whose candidates are all closed; they are in none of the sums.
    pub stranded: usize,
    /// Site, resource, and by how much its room is exceeded in the resource's unit. Empty for a placement that holds.
    pub exceeded: Vec<(u8, Resource, f64)>,
    /// Class, cell, and how many groups of the class beyond the limit are there. Empty for a placement that holds.
    pub crowded: Vec<(Class, u8, f64)>,
    /// Passes over all groups.
    pub passes: f64,
}

impl Certificate {
    /// Share of the cost by which the placement may be worse than the best; the best may be better than the bound, so it is
    /// an upper limit. Not a number when something is exceeded: then the two cannot be compared.
    #[must_use]
    pub fn gap(&self) -> f64 {
        if !self.exceeded.is_empty() || !self.crowded.is_empty() {
            return f64::NAN;
        }
        if self.cost <= 0.0 { 0.0 } else { ((self.cost - self.bound) / self.cost).max(0.0) }
    }
}

/// Sites that cannot hold what can go nowhere else: a proof that no placement holds. Where it names one group, that is larger than each of
/// the sites by itself, since a group is not divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The sites. A group that is named has all its open candidates among them.
    pub sites: Vec<u8>,
    /// The resource that does not suffice.
    pub resource: Resource,
    /// The groups that can only be at these sites.
    pub groups: Vec<u32>,
}

/// All prices of a round: with the instance they are the certificate, see [`bound_with`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// By site and resource, in weight x ms per unit of demand.
    #[serde(default)]
    pub sites: Vec<PerResource<f64>>,
    /// By class and cell, in weight x ms per group of the class.
    #[serde(default)]
    pub classes: Vec<Vec<f64>>,
}

/// Groups of the sample that finds the prices roughly, and of that which makes them better.
const SAMPLE_SMALL: usize = 20_000;
const SAMPLE_LARGE: usize = 50_000;

/// Groups that may be asked to make way in a round: some hundredths of a second, and less when few groups changed.
const PLACES_WORK: usize = 150_000;
const PLACES_WORK_TOUCHED: usize = 15_000;

/// Groups that are few.
const FEW: usize = 2_000;

/// Keeps prices and placement from round to round.
pub struct Solver {
    instance: Instance,
    units: Units,
    /// In milliseconds per equivalent.
    prices: Vec<PerResource<f64>>,
    /// By class and cell, in weight x ms per group.
    class_prices: Vec<Vec<f64>>,
    assignment: Assignment,
    touched: Vec<u32>,
    /// A site opened or closed since the last round: prices may be far off.
    reshaped: bool,
    /// Groups were added or replaced since the units were taken.
    grown: bool,
    /// Less room than there is, by which the placement also survives the loss of a domain: for rounds that only look at what was
    /// touched, until the next one by [`Solver::solve_to_survive`].
    narrow: Option<Vec<PerResource<f64>>>,
}

impl Solver {
    /// With prices at zero and groups nowhere.
    #[must_use]
    pub fn new(instance: Instance) -> Self {
        let assignment = Assignment::empty(&instance);
        let units = Units::of(&instance);
        let prices = vec![[0.0; RESOURCES]; instance.sites()];
        let class_prices = instance.spreads.iter().map(Spread::no_prices).collect();
        Self {
            instance,
            units,
            prices,
            class_prices,
            assignment,
            touched: Vec::new(),
            reshaped: false,
            grown: false,
            narrow: None,
        }
    }

    /// Memory of instance, prices and placement.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let per_site = size_of::<PerResource<f64>>();
        let own = self.prices.capacity() * per_site
            + self.assignment.choice.capacity()
            + self.touched.capacity() * 4;
        own + self.assignment.load.capacity() * per_site + self.instance.bytes()
    }

    /// What is solved.
    #[must_use]
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Begins with prices of an earlier round, in milliseconds per unit of demand as [`Solver::prices`] gives them. Those
    /// of other length, negative or not finite are taken as zero.
    pub fn set_prices(&mut self, prices: &[PerResource<f64>]) {
        self.renew_units();
        let usable = |price: f64| if price.is_finite() { price.max(0.0) } else { 0.0 };
        for (slot, price) in self.prices.iter_mut().zip(prices) {
            for resource in 0..RESOURCES {
                let unit = self.units.0[resource];
                slot[resource] =
                    if unit > 0.0 { usable(price[resource] / unit).min(dual::PRICE_MAX_MS) } else { 0.0 };
            }
        }
    }

    /// Begins with all prices of an earlier round, those of classes too. What does not fit is taken as zero.
    pub fn set_all_prices(&mut self, prices: &Prices) {
        self.set_prices(&prices.sites);
        for (class, slots) in self.class_prices.iter_mut().enumerate() {
            for (cell, slot) in slots.iter_mut().enumerate() {
                *slot = class_price(&prices.classes, class, cell);
            }
        }
    }

    /// What [`Solver::prices`] gives, and what one more group of a class in a cell would save.
    #[must_use]
    pub fn all_prices(&self) -> Prices {
        Prices { sites: self.prices(), classes: self.class_prices.clone() }
    }

    /// How many groups of a class a cell has.
    #[must_use]
    pub fn count(&self, class: Class, cell: u8) -> u32 {
        self.assignment.count[class.index()][usize::from(cell)]
    }

    /// The next round begins from prices that may be far off: sites opened or closed since, or rules changed.
    pub fn reshape(&mut self) {
        self.reshaped = true;
    }

    /// What one more unit of capacity would save, by site and resource: weight x ms per packet/s, flow or bit/s.
    #[must_use]
    pub fn prices(&self) -> Vec<PerResource<f64>> {
        let scaled = |price: &PerResource<f64>| std::array::from_fn(|r| price[r] * self.units.0[r]);
        self.prices.iter().map(scaled).collect()
    }

    /// What sites carry, in the units of the resources.
    #[must_use]
    pub fn load(&self, site: u8) -> PerResource<f64> {
        self.assignment.load[usize::from(site)]
    }

    /// Where a group is placed; nowhere before the first round, or when all its candidates are closed.
    #[must_use]
    pub fn site(&self, group: usize) -> Option<u8> {
        self.assignment.site(&self.instance, group)
    }

    /// A group has other traffic now.
    ///
    /// # Errors
    /// When a value is negative or not finite; nothing has changed then.
    pub fn set_demand(
        &mut self,
        group: usize,
        weight: f32,
        demand: PerResource<f32>,
    ) -> Result<(), InstanceError> {
        self.assignment.account(&self.instance, group, -1.0);
        let result = self.instance.set_demand(group, weight, demand);
        self.assignment.account(&self.instance, group, 1.0);
        if result.is_ok() {
            self.touched.push(group as u32);
        }
        result
    }

    /// Adds a group, which is nowhere until the next round. Its index is the next one.
    ///
    /// # Errors
    /// One [`InstanceError`]; nothing has changed then.
    pub fn push(&mut self, group: &Group<'_>) -> Result<(), InstanceError> {
        self.instance.push(group)?;
        self.touched.push(self.assignment.choice.len() as u32);
        self.assignment.choice.push(round::NOWHERE);
        self.grown = true;
        Ok(())
    }

    /// A group has other traffic, candidates or costs now, or is elsewhere. It chooses again in the next round.
    ///
    /// # Errors
    /// One [`InstanceError`]; nothing has changed then.
    pub fn replace(&mut self, index: usize, group: &Group<'_>) -> Result<(), InstanceError> {
        let before = self.assignment.choice[index];
        self.assignment.shift(&self.instance, index, round::NOWHERE);
        if let Err(error) = self.instance.replace(index, group) {
            self.assignment.shift(&self.instance, index, before);
            return Err(error);
        }
        self.touched.push(index as u32);
        self.grown = true;
        Ok(())
    }

    /// A site has other room now: capacity less headroom.
    ///
    /// # Errors
    /// When it is negative or not a number; nothing has changed then.
    pub fn set_room(&mut self, site: u8, room: PerResource<f64>) -> Result<(), InstanceError> {
        self.instance.set_room(site, room)
    }

    /// Takes the units from the groups as they are, and says the prices in these.
    fn renew_units(&mut self) {
        if !std::mem::take(&mut self.grown) {
            return;
        }
        let former = std::mem::replace(&mut self.units, Units::of(&self.instance));
        let ratio = |r: usize| if self.units.0[r] > 0.0 { former.0[r] / self.units.0[r] } else { 0.0 };
        let ratio: PerResource<f64> = std::array::from_fn(ratio);
        for price in &mut self.prices {
            price.iter_mut().zip(ratio).for_each(|(price, ratio)| *price *= ratio);
        }
    }

    /// A site opens or closes. Its groups are touched, or those that could be there again.
    pub fn set_open(&mut self, site: u8, open: bool) {
        self.instance.set_open(site, open);
        self.reshaped = true;
        let there = |group: &usize| self.instance.row(*group).0.contains(&site);
        let groups = (0..self.instance.groups()).filter(there);
        let touched = groups.filter(|&g| open || self.site(g) == Some(site)).map(|group| group as u32);
        let touched: Vec<u32> = touched.collect();
        self.touched.extend(touched);
    }

    /// The moves are made: what is placed is present.
    pub fn adopt(&mut self) {
        for group in 0..self.instance.groups() {
            if let Some(site) = self.site(group) {
                self.instance.set_present(group, site);
            }
        }
    }

    /// One round.
    pub fn solve(&mut self, start: Start) -> Certificate {
        self.renew_units();
        let mut passes = 0.0;
        match start {
            Start::Cold => {
                self.prices.iter_mut().for_each(|price| *price = [0.0; RESOURCES]);
                self.class_prices = self.instance.spreads.iter().map(Spread::no_prices).collect();
                self.reshaped = false;
                self.units = Units::of(&self.instance);
                passes = self.cold();
            }
            Start::Warm => passes = self.warm(),
            Start::Touched => {}
        }
        if start == Start::Touched {
            self.place_touched();
        } else {
            self.narrow = None;
            self.place_all();
        }
        self.certify(passes + 1.0)
    }

    /// From prices to a placement.
    fn place_all(&mut self) {
        let table = self.price_table();
        self.touched.clear();
        self.assignment.all_cheapest(&self.instance, &table);
        self.assignment.repair(&self.instance, &table);
        self.assignment.take_places(&self.instance, &table, PLACES_WORK);
        self.assignment.fill(&self.instance);
        self.assignment.exchange(&self.instance);
    }

    /// The same for those that were touched, beside the others.
    fn place_touched(&mut self) {
        let table = self.price_table();
        let rooms = self.narrow.as_ref().map(|narrow| {
            let least =
                |(a, b): (&PerResource<f64>, &PerResource<f64>)| std::array::from_fn(|r| a[r].min(b[r]));
            let rooms = narrow.iter().zip(&self.instance.room).map(least).collect();
            std::mem::replace(&mut self.instance.room, rooms)
        });
        let touched = std::mem::take(&mut self.touched).into_iter().map(|group| group as usize);
        self.assignment.cheapest(&self.instance, &table, touched);
        self.assignment.repair(&self.instance, &table);
        self.assignment.take_places(&self.instance, &table, PLACES_WORK_TOUCHED);
        self.assignment.fill(&self.instance);
        if let Some(rooms) = rooms {
            self.instance.room = rooms;
        }
    }

    fn price_table(&self) -> PriceTable {
        let mut table = PriceTable::new(self.units);
        table.set(&self.prices, &self.instance.open);
        table.set_classes(&self.instance, &self.class_prices);
        table.bar(Alone::of(&self.instance));
        table
    }

    fn cold(&mut self) -> f64 {
        let mut dual = Dual::new(&self.instance, self.units, std::mem::take(&mut self.class_prices));
        coarse(&mut dual, &mut self.prices, 8.0);
        finish(&mut dual, &mut self.prices, 2.0);
        let passes;
        (self.class_prices, passes) = dual.take_best(&mut self.prices);
        passes
    }

    fn warm(&mut self) -> f64 {
        let mut dual = Dual::new(&self.instance, self.units, std::mem::take(&mut self.class_prices));
        let reshaped = std::mem::take(&mut self.reshaped);
        if reshaped {
            coarse(&mut dual, &mut self.prices, 2.0);
        }
        finish(&mut dual, &mut self.prices, if reshaped { 2.0 } else { 0.15 });
        let passes;
        (self.class_prices, passes) = dual.take_best(&mut self.prices);
        passes
    }

    fn certify(&self, passes: f64) -> Certificate {
        self.certify_by(Bounds::of(&self.instance, &self.all_prices()), passes + 1.0)
    }

    /// The certificate of the placement, by bounds that are known.
    fn certify_by(&self, bounds: Bounds, passes: f64) -> Certificate {
        let instance = &self.instance;
        let mut sums = Certificate {
            cost: 0.0,
            bound: bounds.best(),
            priced: bounds.priced,
            unconstrained: 0.0,
            moves: 0,
            stranded: 0,
            exceeded: Vec::new(),
            crowded: Vec::new(),
            passes,
        };
        for group in 0..instance.groups() {
            let Some(site) = self.site(group) else {
                sums.stranded += 1;
                continue;
            };
            sums.cost += instance.cost(group, usize::from(self.assignment.choice[group]));
            sums.moves += usize::from(!instance.stays(group, site));
            sums.unconstrained += instance.least(group);
        }
        for site in (0..instance.sites()).filter(|&site| self.assignment.exceeded(instance, site)) {
            for resource in Resource::ALL {
                let excess =
                    self.assignment.load[site][resource as usize] - instance.room[site][resource as usize];
                if excess > 0.0 {
                    sums.exceeded.push((site as u8, resource, excess));
                }
            }
        }
        let crowd = |(class, cell)| (class, cell as u8, self.assignment.crowd(instance, class, cell));
        sums.crowded = self.assignment.crowded(instance).into_iter().map(crowd).collect();
        sums
    }

    /// Why a cell that has too many groups of a class cannot be helped: the cells that these groups can reach, if together they
    /// may not have so many. `None` when they may, and only rooms of sites stand against it, or when sites were left out.
    #[must_use]
    pub fn class_conflict(&self, class: Class, cell: u8) -> Option<ClassConflict> {
        self.assignment.class_conflict(&self.instance, class, cell.into())
    }

    /// Why a site that is exceeded cannot be helped: a group there that is larger than any site that it may be at; or the sites that its
    /// groups can reach, if these together have not enough for what can only be there. `None` when they have, and only the sizes of the
    /// groups do not fit beside one another, or when sites were left out.
    #[must_use]
    pub fn conflict(&self, exceeded: u8) -> Option<Conflict> {
        let here = |group: &usize| self.site(*group) == Some(exceeded);
        let alone = (0..self.instance.groups()).filter(here).find_map(|group| self.too_large(group));
        alone.or_else(|| self.too_many(exceeded))
    }

    /// A group that fits nowhere, even alone. Sites that were left out of its candidates count as if it could be there.
    fn too_large(&self, group: usize) -> Option<Conflict> {
        let instance = &self.instance;
        let demand = instance.demand[group].map(f64::from);
        let lacks = |site: u8| {
            let room = &instance.room[usize::from(site)];
            Resource::ALL.into_iter().find(|&r| demand[r as usize] > room[r as usize] * (1.0 + SLACK))
        };
        let everywhere = instance.left_out_ms[group].is_finite();
        let candidates = || instance.row(group).0.iter().copied();
        let all = || (0..=u8::MAX).take(instance.sites());
        let sites: Vec<u8> = if everywhere { all().collect() } else { candidates().collect() };
        let sites: Vec<u8> = sites.into_iter().filter(|&site| instance.open[usize::from(site)]).collect();
        let lacking: Option<Vec<Resource>> = sites.iter().map(|&site| lacks(site)).collect();
        let resource = *lacking?.first()?;
        Some(Conflict { sites, resource, groups: vec![group as u32] })
    }

    fn too_many(&self, exceeded: u8) -> Option<Conflict> {
        let instance = &self.instance;
        let mut inside = vec![false; instance.sites()];
        inside[usize::from(exceeded)] = true;
        loop {
            let mut grown = false;
            for group in 0..instance.groups() {
                if self.site(group).is_none_or(|site| !inside[usize::from(site)]) {
                    continue;
                }
                for &site in instance.row(group).0 {
                    let site = usize::from(site);
                    grown |= instance.open[site] && !std::mem::replace(&mut inside[site], true);
                }
            }
            if !grown {
                break;
            }
        }
        let sites: Vec<u8> =
            (0..instance.sites()).filter(|&site| inside[site]).map(|site| site as u8).collect();
        let sum = |values: &[PerResource<f64>], r: usize| {
            sites.iter().map(|&s| values[usize::from(s)][r]).sum::<f64>()
        };
        let resource = Resource::ALL.into_iter().find(|&resource| {
            let r = resource as usize;
            sum(&self.assignment.load, r) > sum(&instance.room, r) * (1.0 + SLACK)
        })?;
        let here = |group: &usize| self.site(*group).is_some_and(|site| inside[usize::from(site)]);
        let groups: Vec<u32> = (0..instance.groups()).filter(here).map(|group| group as u32).collect();
        // Who may also be at a site that was left out proves nothing.
        if groups.iter().any(|&group| instance.left_out_ms[group as usize].is_finite()) {
            return None;
        }
        Some(Conflict { sites, resource, groups })
    }
}

/// Prices that are about right, from a sample where there are many groups, then a larger one. Temperatures fall slowly:
/// prices of the last are then near those of the next, and few steps suffice.
fn coarse(dual: &mut Dual<'_>, prices: &mut [PerResource<f64>], from_ms: f32) {
    let sample = |about: usize| -> Option<Vec<Drawn>> {
        (dual.instance.groups() > about).then(|| draw(dual.instance, dual.units, about))
    };
    let (small, large) = (sample(SAMPLE_SMALL), sample(SAMPLE_LARGE));
    let (small, large) = (small.as_deref(), large.as_deref());
    let mut temperature_ms = from_ms;
    while temperature_ms > 0.2 {
        dual.climb(prices, Effort { sample: small, temperature_ms, passes_max: 6, gain_min: 1e-4 });
        temperature_ms *= 0.5;
    }
    for temperature_ms in [0.3, 0.15] {
        dual.climb(prices, Effort { sample: large, temperature_ms, passes_max: 6, gain_min: 1e-5 });
    }
    dual.spread(prices);
}

/// The last steps, with all groups; where these are few, from a higher temperature once more.
fn finish(dual: &mut Dual<'_>, prices: &mut [PerResource<f64>], few_from_ms: f32) {
    for temperature_ms in [0.15, 0.05] {
        dual.climb(prices, Effort { sample: None, temperature_ms, passes_max: 8, gain_min: 5e-6 });
        dual.spread(prices);
    }
    // Few groups leave corners that are larger than the temperature, and passes over them take no time.
    let mut temperature_ms = few_from_ms;
    while dual.instance.groups() <= FEW && temperature_ms > 0.01 {
        dual.climb(prices, Effort { sample: None, temperature_ms, passes_max: 60, gain_min: 1e-7 });
        dual.spread(prices);
        temperature_ms *= 0.5;
    }
}

/// A price of a class from outside, zero where it is none.
fn class_price(prices: &[Vec<f64>], class: usize, cell: usize) -> f64 {
    let price = prices.get(class).and_then(|cells| cells.get(cell)).copied().unwrap_or(0.0);
    if price.is_finite() { price.max(0.0) } else { 0.0 }
}

/// A lower bound of what any placement within the capacities costs, from prices per unit of demand: the certificate that
/// anybody can check. Stranded groups count nothing. In double precision, less what its rounding may be.
#[must_use]
pub fn bound(instance: &Instance, prices: &[PerResource<f64>]) -> f64 {
    bound_with(instance, &Prices { sites: prices.to_vec(), classes: Vec::new() })
}

/// The same for prices of classes too: a lower bound for placements that also keep the limits of classes. Missing prices of
/// classes count as zero, which is valid as any price is.
#[must_use]
pub fn bound_with(instance: &Instance, prices: &Prices) -> f64 {
    Bounds::of(instance, prices).best()
}

/// Lower bounds of what any placement costs.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// What follows from the prices.
    pub priced: f64,
    /// What all groups cost, each alone: more where all places are as good, or prices far off.
    pub alone: f64,
}

impl Bounds {
    /// The higher one.
    #[must_use]
    pub fn best(&self) -> f64 {
        self.priced.max(self.alone)
    }

    /// By prices that are sites' and classes'. One pass over the groups.
    #[must_use]
    pub fn of(instance: &Instance, prices: &Prices) -> Self {
        let whole = Alone::of(instance);
        let (mut sum, mut magnitude, mut alone) = (0.0, 0.0, 0.0);
        for group in 0..instance.groups() {
            let demand = instance.demand[group].map(f64::from);
            let class = if prices.classes.is_empty() { None } else { instance.class(group) };
            let priced = |site: u8| -> f64 {
                let price = prices.sites[usize::from(site)];
                let spread = class.map_or(0.0, |class| {
                    class_price(&prices.classes, class.index(), instance.spreads[class.index()].cell(site))
                });
                (0..RESOURCES).map(|r| price[r] * demand[r]).sum::<f64>() + spread
            };
            let least = instance.leasts(group, whole.barred(group), priced);
            if least.priced.is_finite() {
                sum += least.priced;
                magnitude += least.priced;
                alone += least.free;
            }
        }
        // A price on room without limit would be worth everything; such a price is no price.
        let mut pay = |price: f64, room: f64| {
            if price > 0.0 {
                sum -= price * room;
                magnitude += price * room;
            }
        };
        for ((price, room), &open) in prices.sites.iter().zip(&instance.room).zip(&instance.open) {
            let room = whole.of_use(room);
            (0..RESOURCES).filter(|_| open).for_each(|r| pay(price[r], room[r]));
        }
        for (class, spread) in instance.spreads.iter().enumerate() {
            let limits = spread.limits.iter().enumerate();
            limits.for_each(|(cell, &limit)| pay(class_price(&prices.classes, class, cell), limit));
        }
        Self { priced: sum - magnitude * 1e-12, alone: alone * (1.0 - 1e-12) }
    }
}
