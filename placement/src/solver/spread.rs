//! Groups that are to be spread: at most so many groups of a class in each cell, where a cell is a set of sites, for
//! example a failure domain.
//!
//! A limit is one more room that a group takes one of, so it has a price too: found by going from cell to cell and taking
//! the price at which as many stay as may (coordinate ascent, the auction's step). And so that a limit is kept, groups
//! of a class make way for one another along chains of cells.

use std::collections::VecDeque;

use super::instance::{Instance, InstanceError, SITES_MAX};
use super::round::{Assignment, NOWHERE, Search};
use super::softmin::{PriceTable, Priced};

/// Most classes of an instance.
pub const CLASSES_MAX: usize = 64;
/// Stands for "in no class".
pub(super) const NO_CLASS: u8 = u8::MAX;
/// Times that the prices of all cells of a class are looked at in one ascent.
const SWEEPS: usize = 8;
/// Cells of groups that one ascent may look at, over all classes: some hundredths of a second. Prices of the classes beyond stay.
const ASCENT_WORK_MAX: usize = 8_000_000;
/// Chains that may make way for one group.
const CHAINS_PER_TRIAL: usize = 8;

/// A class of groups that are to be spread, see [`Instance::add_class`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(pub(super) u8);

impl Class {
    pub(super) fn at(index: usize) -> Option<Self> {
        (index < CLASSES_MAX).then_some(Self(index as u8))
    }

    /// 0 for the first class that was added, and so on.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// The cells of the sites and what each may have.
#[derive(Clone, Debug)]
pub(super) struct Spread {
    cell: Box<[u8; SITES_MAX]>,
    /// Whole numbers, or infinite.
    pub(super) limits: Vec<f64>,
}

impl Spread {
    pub(super) fn new(sites: usize, cells: &[u8], limits: &[f64]) -> Result<Self, InstanceError> {
        if cells.len() != sites {
            return Err(InstanceError::Cells { given: cells.len(), sites });
        }
        if let Some(site) = cells.iter().position(|&cell| usize::from(cell) >= limits.len()) {
            return Err(InstanceError::Cell { site, cell: cells[site], limits: limits.len() });
        }
        if let Some(cell) = limits.iter().position(|limit| limit.is_nan() || *limit < 0.0) {
            return Err(InstanceError::Limit { cell, limit: limits[cell] });
        }
        let mut cell = Box::new([0; SITES_MAX]);
        cell[..sites].copy_from_slice(cells);
        Ok(Self { cell, limits: limits.iter().map(|limit| limit.floor()).collect() })
    }

    #[inline]
    pub(super) fn cell(&self, site: u8) -> usize {
        self.cell[usize::from(site)].into()
    }

    /// No prices, one per cell.
    pub(super) fn no_prices(&self) -> Vec<f64> {
        vec![0.0; self.limits.len()]
    }
}

/// Cells that cannot hold the groups of a class that can be nowhere else: a proof that no placement keeps the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassConflict {
    /// The class.
    pub class: Class,
    /// The cells. A group of the class that is in one of them has all its open candidates in them.
    pub cells: Vec<u8>,
    /// How many groups of the class these cells may have together.
    pub limit: u64,
    /// The groups that can only be there, more than the limit.
    pub groups: Vec<u32>,
}

/// What a group of a class costs in one cell, without the price of the class.
#[derive(Clone, Copy)]
struct Entry {
    cell: u8,
    cost: f64,
}

/// Better prices of the classes under given prices of the sites: the bound that follows from them grows, or stays.
pub(super) fn ascend(instance: &Instance, table: &mut PriceTable, prices: &mut [Vec<f64>]) {
    let mut work = 0;
    for class in instance.classes() {
        let spread = &instance.spreads[class.index()];
        if spread.limits.iter().all(|limit| limit.is_infinite()) {
            continue;
        }
        let members = instance.class.iter().filter(|&&of| of == class.0).count();
        work += members * super::CANDIDATES_MAX * SWEEPS;
        if work > ASCENT_WORK_MAX {
            break;
        }
        let rows = entries(instance, table, class);
        let prices = &mut prices[class.index()];
        for _ in 0..SWEEPS {
            let before = prices.clone();
            (0..prices.len()).for_each(|cell| prices[cell] = best_price(&rows, spread, prices, cell));
            if *prices == before {
                break;
            }
        }
    }
    table.set_classes(instance, prices);
}

/// The cheapest candidate in each cell, for each group of a class.
fn entries(instance: &Instance, table: &PriceTable, class: Class) -> Vec<Vec<Entry>> {
    let mut priced = Priced::empty();
    let of_class = (0..instance.groups()).filter(|&group| instance.class[group] == class.0);
    let row = |group: usize| {
        priced.set_without_class(instance, table, group);
        let mut row: Vec<Entry> = Vec::with_capacity(priced.len);
        for (&site, &ms) in instance.row(group).0.iter().zip(&priced.value_ms) {
            let cell = instance.spreads[class.index()].cell(site) as u8;
            let cost = f64::from(ms) * f64::from(priced.size);
            match row.iter_mut().find(|entry| entry.cell == cell) {
                Some(entry) => entry.cost = entry.cost.min(cost),
                None => row.push(Entry { cell, cost }),
            }
        }
        row.retain(|entry| entry.cost.is_finite());
        row
    };
    of_class.map(row).collect()
}

/// The price of a cell at which it has as many groups as it may, when the prices of the others stay.
fn best_price(rows: &[Vec<Entry>], spread: &Spread, prices: &[f64], cell: usize) -> f64 {
    let limit = spread.limits[cell];
    if limit.is_infinite() {
        return 0.0;
    }
    // What the cell saves each group, against its best place elsewhere: the most that it would pay.
    let saves = |row: &Vec<Entry>| {
        let here = row.iter().find(|entry| usize::from(entry.cell) == cell)?.cost;
        let others = row.iter().filter(|entry| usize::from(entry.cell) != cell);
        let elsewhere = others.map(|entry| entry.cost + prices[usize::from(entry.cell)]);
        Some(elsewhere.fold(f64::INFINITY, f64::min) - here).filter(|saves| *saves > 0.0)
    };
    let mut saves: Vec<f64> = rows.iter().filter_map(saves).collect();
    if saves.len() as f64 <= limit {
        return 0.0;
    }
    saves.sort_unstable_by(|a, b| b.total_cmp(a));
    let limit = limit as usize;
    // Who can be nowhere else pays any price; then the last who can has to go.
    let low = saves[limit..].iter().copied().find(|saves| saves.is_finite()).unwrap_or(0.0);
    let high = saves[..limit].iter().copied().rfind(|saves| saves.is_finite()).unwrap_or(low);
    if high > low { f64::midpoint(low, high) } else { low }
}

impl Assignment {
    /// How many groups of a class beyond its limit a cell has.
    pub(super) fn crowd(&self, instance: &Instance, class: Class, cell: usize) -> f64 {
        let spread = &instance.spreads[class.index()];
        (f64::from(self.count[class.index()][cell]) - spread.limits[cell]).max(0.0)
    }

    /// Whether the cell of a class that a group is in has more groups than it may.
    #[inline]
    pub(super) fn crowds(&self, instance: &Instance, group: usize, site: u8) -> bool {
        if instance.spreads.is_empty() {
            return false;
        }
        instance.class(group).is_some_and(|class| {
            self.crowd(instance, class, instance.spreads[class.index()].cell(site)) > 0.0
        })
    }

    /// The cells that have more groups of a class than they may.
    pub(super) fn crowded(&self, instance: &Instance) -> Vec<(Class, usize)> {
        let cells = |class: Class| (0..self.count[class.index()].len()).map(move |cell| (class, cell));
        let all = instance.classes().flat_map(cells);
        all.filter(|&(class, cell)| self.crowd(instance, class, cell) > 0.0).collect()
    }

    /// Whether no cell has too many groups of a class, or not more than now, when these groups go to these sites at once.
    #[inline]
    pub(super) fn spread_holds(&self, instance: &Instance, moves: &[(usize, u8)]) -> bool {
        instance.spreads.is_empty()
            || moves.iter().all(|&(group, to)| self.cell_holds(instance, moves, group, to))
    }

    fn cell_holds(&self, instance: &Instance, moves: &[(usize, u8)], group: usize, to: u8) -> bool {
        let Some(class) = instance.class(group) else { return true };
        let spread = &instance.spreads[class.index()];
        let cell = spread.cell(to);
        let mut change = 0_i32;
        for &(other, to) in moves.iter().filter(|(other, _)| instance.class[*other] == class.0) {
            change += i32::from(spread.cell(to) == cell);
            change -= i32::from(self.site(instance, other).is_some_and(|site| spread.cell(site) == cell));
        }
        change <= 0 || f64::from(self.count[class.index()][cell]) + f64::from(change) <= spread.limits[cell]
    }

    /// Cells that have too many groups of a class give some away: by chains of cells, and where the sites are full, by chains
    /// of sites that make room. Then sites that have too much, whose groups only the limit of a class keeps from going.
    pub(super) fn spread_out(&mut self, instance: &Instance, search: &mut Search) {
        for (class, cell) in self.crowded(instance) {
            while self.crowd(instance, class, cell) > 0.0
                && search.may_go_on()
                && (self.cell_chain(instance, search, class, cell)
                    || self.make_room_for_one(instance, search, class, cell))
            {}
        }
        if instance.spreads.is_empty() {
            return;
        }
        for site in 0..instance.sites() {
            while self.exceeded(instance, site)
                && search.may_go_on()
                && self.make_way_in_cells(instance, search, site)
            {}
        }
    }

    /// The shortest chain of moves of groups of a class from a cell with too many to one that may have more; sites keep within
    /// their rooms. Where rooms are wide it finds one whenever there is any.
    fn cell_chain(&mut self, instance: &Instance, search: &mut Search, class: Class, from: usize) -> bool {
        let spread = &instance.spreads[class.index()];
        let members: Vec<u32> = (0..instance.groups() as u32)
            .filter(|&group| instance.class[group as usize] == class.0)
            .collect();
        let mut reached: Vec<Option<(u32, usize, u8)>> = vec![None; spread.limits.len()];
        let mut queue = VecDeque::from([from]);
        while let Some(cell) = queue.pop_front() {
            search.work += members.len();
            for &group in &members {
                if self.site(instance, group as usize).is_none_or(|site| spread.cell(site) != cell) {
                    continue;
                }
                for (choice, &site) in instance.row(group as usize).0.iter().enumerate() {
                    let to = spread.cell(site);
                    if to == from || reached[to].is_some() || !self.fits_alone(instance, site, group as usize)
                    {
                        continue;
                    }
                    reached[to] = Some((group, cell, choice as u8));
                    if f64::from(self.count[class.index()][to]) < spread.limits[to] {
                        let mut at = to;
                        while at != from
                            && let Some((group, before, choice)) = reached[at]
                        {
                            self.shift_in(instance, search, group as usize, choice);
                            at = before;
                        }
                        return true;
                    }
                    queue.push_back(to);
                }
            }
        }
        false
    }

    /// A group of a crowded cell is put where the class may be but the site is full, if others then make room there.
    fn make_room_for_one(
        &mut self,
        instance: &Instance,
        search: &mut Search,
        class: Class,
        cell: usize,
    ) -> bool {
        let spread = &instance.spreads[class.index()];
        let inside = |this: &Self, group: usize| {
            instance.class[group] == class.0
                && this.site(instance, group).is_some_and(|site| spread.cell(site) == cell)
        };
        let members: Vec<usize> = (0..instance.groups()).filter(|&group| inside(self, group)).collect();
        for group in members {
            for (choice, &site) in instance.row(group).0.iter().enumerate() {
                let free = instance.open[usize::from(site)]
                    && spread.cell(site) != cell
                    && self.spread_holds(instance, &[(group, site)]);
                if free && search.may_try() {
                    let mark = search.journal.len();
                    self.shift_in(instance, search, group, choice as u8);
                    for _ in 0..CHAINS_PER_TRIAL {
                        if !self.exceeded(instance, site.into()) || !self.chain(instance, search, site.into())
                        {
                            break;
                        }
                    }
                    let moved_on = inside(self, group);
                    if !self.exceeded(instance, site.into()) && !moved_on {
                        return true;
                    }
                    self.take_back(instance, search, mark);
                }
            }
        }
        false
    }

    /// A group of a site with too much is put where there is room but its class has too many, if others of the class then
    /// make way.
    fn make_way_in_cells(&mut self, instance: &Instance, search: &mut Search, from: usize) -> bool {
        for at in 0..search.members[from].len() {
            let group = search.members[from][at] as usize;
            let Some(class) = instance.class(group) else { continue };
            if self.site(instance, group) != Some(from as u8)
                || self.relief(instance, from as u8, group) <= 0.0
            {
                continue;
            }
            let spread = &instance.spreads[class.index()];
            for (choice, &site) in instance.row(group).0.iter().enumerate() {
                if usize::from(site) == from || !self.fits_alone(instance, site, group) || !search.may_try() {
                    continue;
                }
                let mark = search.journal.len();
                self.shift_in(instance, search, group, choice as u8);
                let cell = spread.cell(site);
                let held = self.crowd(instance, class, cell) <= 0.0
                    || self.cell_chain(instance, search, class, cell);
                if held && self.site(instance, group) != Some(from as u8) {
                    return true;
                }
                self.take_back(instance, search, mark);
            }
        }
        false
    }

    /// Cells that cannot hold what can go nowhere else, if there are such around a crowded one.
    pub(super) fn class_conflict(
        &self,
        instance: &Instance,
        class: Class,
        cell: usize,
    ) -> Option<ClassConflict> {
        let spread = &instance.spreads[class.index()];
        let mut inside = vec![false; spread.limits.len()];
        *inside.get_mut(cell)? = true;
        let members: Vec<usize> =
            (0..instance.groups()).filter(|&group| instance.class[group] == class.0).collect();
        let is_inside = |inside: &[bool], group: usize| {
            self.choice[group] != NOWHERE
                && self.site(instance, group).is_some_and(|site| inside[spread.cell(site)])
        };
        let mut grown = true;
        while grown {
            grown = false;
            for &group in &members {
                let sites = if is_inside(&inside, group) { instance.row(group).0 } else { &[] };
                for &site in sites.iter().filter(|&&site| instance.open[usize::from(site)]) {
                    grown |= !std::mem::replace(&mut inside[spread.cell(site)], true);
                }
            }
        }
        let groups: Vec<u32> =
            members.iter().filter(|&&group| is_inside(&inside, group)).map(|&group| group as u32).collect();
        let cells: Vec<u8> = (0..inside.len()).filter(|&cell| inside[cell]).map(|cell| cell as u8).collect();
        let limit: f64 = cells.iter().map(|&cell| spread.limits[usize::from(cell)]).sum();
        // Who may also be at a site that was left out proves nothing.
        let proven = groups.len() as f64 > limit
            && groups.iter().all(|&group| instance.left_out_ms[group as usize].is_infinite());
        proven.then_some(ClassConflict { class, cells, limit: limit as u64, groups })
    }
}
