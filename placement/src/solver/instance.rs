//! What is to be solved: sites with capacities, groups with demand and candidates. Structure of arrays, so that a
//! pass over a million groups reads memory in order.

use super::round::SLACK;
use super::spread::{Class, NO_CLASS, Spread};

/// Most sites of an instance; an index of a site is a byte.
pub const SITES_MAX: usize = 256;
/// Most candidates of a group.
pub const CANDIDATES_MAX: usize = 16;
/// Number of resources, see [`Resource`].
pub const RESOURCES: usize = 3;

/// What a site has to give. The index into arrays of `RESOURCES` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Packets per second.
    Packets = 0,
    /// Flows held.
    Flows = 1,
    /// Bits per second.
    Bits = 2,
}

impl Resource {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; RESOURCES] = [Self::Packets, Self::Flows, Self::Bits];
}

/// One value per resource.
pub type PerResource<T> = [T; RESOURCES];

/// A site and what it may carry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Site {
    /// Capacity per resource; infinite where there is no limit.
    pub capacity: PerResource<f64>,
    /// Share of the capacity that is to stay free, 0 to below 1.
    pub headroom: f64,
}

/// A site that a group may have. What a hard rule forbids is simply not among a group's candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Index of the site.
    pub site: u8,
    /// Delay there plus the prices of soft rules, in milliseconds; times the weight it is the cost.
    pub cost_ms: f32,
}

/// A flow group, as it is added to an instance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group<'a> {
    /// How much its delay counts: its traffic.
    pub weight: f32,
    /// What it takes of each resource wherever it is.
    pub demand: PerResource<f32>,
    /// Index of the site where it is; `None` for a group that is nowhere yet, whose placing is no move.
    pub present: Option<u8>,
    /// Cost of moving it, in weight x ms.
    pub charge: f32,
    /// No site that the group may have, but that is not among its candidates, costs less; infinite when there is none. Such
    /// a site is never chosen, but the bound counts with it.
    pub left_out_ms: f32,
    /// The class that it is to be spread with, see [`Instance::add_class`].
    pub class: Option<Class>,
    /// 1 to 16 sites, each once.
    pub candidates: &'a [Candidate],
}

/// Why something was refused; the instance is then unchanged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InstanceError {
    /// None, or more than [`SITES_MAX`].
    #[error("{0} sites: give 1 to {SITES_MAX}")]
    Sites(usize),
    /// Negative or not a number.
    #[error("site {site}: {capacity} is no capacity")]
    Capacity {
        /// Index of the site.
        site: usize,
        /// What was given.
        capacity: f64,
    },
    /// Outside of 0 to below 1.
    #[error("site {site}: headroom {headroom} is not in 0 to below 1")]
    Headroom {
        /// Index of the site.
        site: usize,
        /// What was given.
        headroom: f64,
    },
    /// None, or more than [`CANDIDATES_MAX`].
    #[error("group {group} has {len} candidates: give 1 to {CANDIDATES_MAX}")]
    Candidates {
        /// Index that the group would have had.
        group: usize,
        /// How many.
        len: usize,
    },
    /// There is no such site, or it was named twice.
    #[error("group {group}: candidate {site} is no site or is there twice")]
    CandidateSite {
        /// Index that the group would have had.
        group: usize,
        /// What was given.
        site: u8,
    },
    /// Negative, infinite or not a number.
    #[error("group {group}: {value} is no weight, demand, charge or cost")]
    Value {
        /// Index that the group has or would have had.
        group: usize,
        /// What was given.
        value: f32,
    },
    /// More than [`super::CLASSES_MAX`].
    #[error("more than {0} classes")]
    Classes(usize),
    /// Each site has one cell.
    #[error("a class names the cells of {given} sites: give {sites}, one per site")]
    Cells {
        /// How many were given.
        given: usize,
        /// How many sites there are.
        sites: usize,
    },
    /// A cell without a limit of its own.
    #[error("site {site}: cell {cell} has no limit, {limits} are given")]
    Cell {
        /// Index of the site.
        site: usize,
        /// What was given.
        cell: u8,
        /// How many limits were given.
        limits: usize,
    },
    /// Negative or not a number.
    #[error("cell {cell}: {limit} is no number of groups: give 0 or more")]
    Limit {
        /// Index of the cell.
        cell: usize,
        /// What was given.
        limit: f64,
    },
    /// The class was not added to this instance.
    #[error("group {group}: there is no class {class}")]
    Class {
        /// Index that the group would have had.
        group: usize,
        /// Number of the class.
        class: usize,
    },
    /// More than fit the indices.
    #[error("more than {0} candidates in all")]
    TooMany(u32),
}

/// What a group costs at least, with prices and without.
#[derive(Clone, Copy)]
pub(super) struct Leasts {
    pub(super) priced: f64,
    pub(super) free: f64,
}

/// Stands for "nowhere" in `present`.
pub(super) const NOWHERE: u16 = u16::MAX;

/// An assignment problem: minimise the sum of weight x cost of the chosen candidates plus the charges of those groups
/// that move, such that no site carries more of any resource than its capacity less the headroom.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Capacity less headroom.
    pub(super) room: Vec<PerResource<f64>>,
    /// A closed site takes no group, candidate or not.
    pub(super) open: Vec<bool>,
    pub(super) weight: Vec<f32>,
    pub(super) demand: Vec<PerResource<f32>>,
    pub(super) charge: Vec<f32>,
    pub(super) left_out_ms: Vec<f32>,
    pub(super) spreads: Vec<Spread>,
    /// Index into `spreads`, or `NO_CLASS`.
    pub(super) class: Vec<u8>,
    present: Vec<u16>,
    /// Where the candidates of a group begin, and how many there are.
    offset: Vec<u32>,
    len: Vec<u8>,
    site: Vec<u8>,
    cost_ms: Vec<f32>,
}

impl Instance {
    /// Sites, no groups yet.
    ///
    /// # Errors
    /// One [`InstanceError`], the first that is found.
    pub fn new(sites: &[Site]) -> Result<Self, InstanceError> {
        if !(1..=SITES_MAX).contains(&sites.len()) {
            return Err(InstanceError::Sites(sites.len()));
        }
        let room = sites.iter().enumerate().map(|(index, site)| room_of(index, site));
        Ok(Self::with_rooms(room.collect::<Result<_, _>>()?))
    }

    /// Sites by their rooms, which are known to be right.
    pub(super) fn with_rooms(room: Vec<PerResource<f64>>) -> Self {
        Self {
            open: vec![true; room.len()],
            room,
            weight: Vec::new(),
            demand: Vec::new(),
            charge: Vec::new(),
            left_out_ms: Vec::new(),
            spreads: Vec::new(),
            class: Vec::new(),
            present: Vec::new(),
            offset: Vec::new(),
            len: Vec::new(),
            site: Vec::new(),
            cost_ms: Vec::new(),
        }
    }

    /// Makes room for so many groups more, with so many candidates in all.
    pub fn reserve(&mut self, groups: usize, candidates: usize) {
        self.weight.reserve(groups);
        self.demand.reserve(groups);
        self.charge.reserve(groups);
        self.left_out_ms.reserve(groups);
        self.class.reserve(groups);
        self.present.reserve(groups);
        self.offset.reserve(groups);
        self.len.reserve(groups);
        self.site.reserve(candidates);
        self.cost_ms.reserve(candidates);
    }

    /// Adds a class of groups that are to be spread: `cells` has the cell of each site, for example its failure domain,
    /// and `limits` how many groups of the class each cell may have, infinite for any number.
    ///
    /// # Errors
    /// One [`InstanceError`], the first that is found; nothing has changed then.
    pub fn add_class(&mut self, cells: &[u8], limits: &[f64]) -> Result<Class, InstanceError> {
        let spread = Spread::new(self.sites(), cells, limits)?;
        let class = Class::at(self.spreads.len()).ok_or(InstanceError::Classes(super::CLASSES_MAX))?;
        self.spreads.push(spread);
        Ok(class)
    }

    /// The classes that were added.
    pub fn classes(&self) -> impl ExactSizeIterator<Item = Class> + use<> {
        (0..self.spreads.len() as u8).map(Class)
    }

    /// The cell of a site, and the limit there, in a class of this instance.
    #[must_use]
    pub fn cell(&self, class: Class, site: u8) -> (u8, f64) {
        let spread = &self.spreads[class.index()];
        let cell = spread.cell(site);
        (cell as u8, spread.limits[cell])
    }

    /// The class of a group.
    #[must_use]
    pub fn class(&self, group: usize) -> Option<Class> {
        Some(Class(self.class[group])).filter(|class| class.0 != NO_CLASS)
    }

    /// Adds a group; groups have the indices 0, 1, 2 and so on, in this order.
    ///
    /// # Errors
    /// One [`InstanceError`], the first that is found; the group is then not there.
    pub fn push(&mut self, group: &Group<'_>) -> Result<(), InstanceError> {
        self.check(self.groups(), group)?;
        self.push_checked(group);
        Ok(())
    }

    fn check(&self, index: usize, group: &Group<'_>) -> Result<(), InstanceError> {
        let len = group.candidates.len();
        if !(1..=CANDIDATES_MAX).contains(&len) {
            return Err(InstanceError::Candidates { group: index, len });
        }
        u32::try_from(self.site.len() + len).map_err(|_| InstanceError::TooMany(u32::MAX))?;
        let costs = group.candidates.iter().map(|candidate| candidate.cost_ms);
        check_values(index, group.demand.into_iter().chain([group.weight, group.charge]).chain(costs))?;
        if group.left_out_ms.is_nan() || group.left_out_ms < 0.0 {
            return Err(InstanceError::Value { group: index, value: group.left_out_ms });
        }
        let class = group.class.map_or(NO_CLASS, |class| class.0);
        if class != NO_CLASS && usize::from(class) >= self.spreads.len() {
            return Err(InstanceError::Class { group: index, class: class.into() });
        }
        for (position, &Candidate { site, .. }) in group.candidates.iter().enumerate() {
            let twice = group.candidates[..position].iter().any(|other| other.site == site);
            if twice || usize::from(site) >= self.sites() {
                return Err(InstanceError::CandidateSite { group: index, site });
            }
        }
        Ok(())
    }

    /// Adds a group that is known to be right.
    pub(super) fn push_checked(&mut self, group: &Group<'_>) {
        self.weight.push(group.weight);
        self.demand.push(group.demand);
        self.charge.push(group.charge);
        self.left_out_ms.push(group.left_out_ms);
        self.class.push(group.class.map_or(NO_CLASS, |class| class.0));
        self.present.push(group.present.map_or(NOWHERE, u16::from));
        self.offset.push(self.site.len() as u32);
        self.len.push(group.candidates.len() as u8);
        self.site.extend(group.candidates.iter().map(|candidate| candidate.site));
        self.cost_ms.extend(group.candidates.iter().map(|candidate| candidate.cost_ms));
    }

    /// A group is another one now, with the index that it had. Candidates that are more than before take new memory, and that of
    /// the former ones is lost until the instance is made anew.
    pub(super) fn replace(&mut self, index: usize, group: &Group<'_>) -> Result<(), InstanceError> {
        self.check(index, group)?;
        self.weight[index] = group.weight;
        self.demand[index] = group.demand;
        self.charge[index] = group.charge;
        self.left_out_ms[index] = group.left_out_ms;
        self.class[index] = group.class.map_or(NO_CLASS, |class| class.0);
        self.present[index] = group.present.map_or(NOWHERE, u16::from);
        let len = group.candidates.len();
        if len > usize::from(self.len[index]) {
            self.offset[index] = self.site.len() as u32;
            self.site.resize(self.site.len() + len, 0);
            self.cost_ms.resize(self.site.len(), 0.0);
        }
        self.len[index] = len as u8;
        let start = self.offset[index] as usize;
        for (at, candidate) in (start..).zip(group.candidates) {
            (self.site[at], self.cost_ms[at]) = (candidate.site, candidate.cost_ms);
        }
        Ok(())
    }

    /// Memory of the arrays.
    pub(super) fn bytes(&self) -> usize {
        let per_group =
            size_of::<PerResource<f32>>() + 3 * size_of::<f32>() + size_of::<u16>() + size_of::<u32>() + 2;
        let per_candidate = size_of::<u8>() + size_of::<f32>();
        self.weight.capacity() * per_group + self.site.capacity() * per_candidate
    }

    /// Number of groups.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.weight.len()
    }

    /// Number of sites.
    #[must_use]
    pub fn sites(&self) -> usize {
        self.room.len()
    }

    /// Capacity less headroom, per resource.
    #[must_use]
    pub fn room(&self, site: u8) -> PerResource<f64> {
        self.room[usize::from(site)]
    }

    /// Whether the site takes groups.
    #[must_use]
    pub fn is_open(&self, site: u8) -> bool {
        self.open[usize::from(site)]
    }

    /// The weight of a group.
    #[must_use]
    pub fn weight(&self, group: usize) -> f32 {
        self.weight[group]
    }

    /// The demand of a group.
    #[must_use]
    pub fn demand(&self, group: usize) -> PerResource<f32> {
        self.demand[group]
    }

    /// Where a group is.
    #[must_use]
    pub fn present(&self, group: usize) -> Option<u8> {
        u8::try_from(self.present[group]).ok()
    }

    /// The candidates of a group, those at closed sites too.
    pub fn candidates(&self, group: usize) -> impl ExactSizeIterator<Item = Candidate> + '_ {
        let (sites, costs) = self.row(group);
        sites.iter().zip(costs).map(|(&site, &cost_ms)| Candidate { site, cost_ms })
    }

    /// Sites and costs of the candidates of a group.
    #[inline]
    pub(super) fn row(&self, group: usize) -> (&[u8], &[f32]) {
        let start = self.offset[group] as usize;
        let range = start..start + usize::from(self.len[group]);
        (&self.site[range.clone()], &self.cost_ms[range])
    }

    /// The present site in the width in which the hot loops compare it.
    #[inline]
    pub(super) fn present_raw(&self, group: usize) -> u16 {
        self.present[group]
    }

    /// What a group costs at its `choice`-th candidate, charge included, in weight x ms.
    #[inline]
    pub(super) fn cost(&self, group: usize, choice: usize) -> f64 {
        let (sites, costs) = self.row(group);
        self.cost_of(group)(sites[choice], costs[choice])
    }

    /// The cost of a group by the site and `cost_ms` of a candidate; loops over candidates look the rest up once.
    #[inline]
    pub(super) fn cost_of(&self, group: usize) -> impl Fn(u8, f32) -> f64 + use<> {
        let (weight, present) = (f64::from(self.weight[group]), self.present[group]);
        let charge = if present == NOWHERE { 0.0 } else { f64::from(self.charge[group]) };
        move |site, cost_ms| {
            let charge = if present == u16::from(site) { 0.0 } else { charge };
            weight * f64::from(cost_ms) + charge
        }
    }

    /// The least that a group can cost, in weight x ms, without any price. Infinite for a stranded group.
    pub(super) fn least(&self, group: usize) -> f64 {
        self.leasts(group, 0, |_| 0.0).free
    }

    /// The least that a group can cost, in weight x ms, if its demand has a price at each site, and if it has none: at an open
    /// candidate that is not barred (bit k stands for candidate k), or at a site that was left out, for nothing. Infinite for a
    /// stranded group.
    #[inline]
    pub(super) fn leasts(&self, group: usize, barred: u16, price: impl Fn(u8) -> f64) -> Leasts {
        let (sites, costs) = self.row(group);
        let cost = self.cost_of(group);
        let mut least = Leasts { priced: f64::INFINITY, free: f64::INFINITY };
        for (k, (&site, &ms)) in sites.iter().zip(costs).enumerate() {
            if self.open[usize::from(site)] && barred & (1 << k) == 0 {
                let free = cost(site, ms);
                least.free = least.free.min(free);
                least.priced = least.priced.min(free + price(site));
            }
        }
        let left_out_ms = self.left_out_ms[group];
        if least.free.is_finite() && left_out_ms.is_finite() {
            let left_out = f64::from(self.weight[group]) * f64::from(left_out_ms);
            least = Leasts { priced: least.priced.min(left_out), free: least.free.min(left_out) };
        }
        least
    }

    /// Whether a site would have room for a demand if nobody else were there.
    #[must_use]
    pub fn holds_alone(&self, site: u8, demand: PerResource<f32>) -> bool {
        let room = &self.room[usize::from(site)];
        (0..RESOURCES).all(|r| demand[r] == 0.0 || f64::from(demand[r]) <= room[r] * (1.0 + SLACK))
    }

    /// Whether having the group at this site is no move.
    #[inline]
    pub(super) fn stays(&self, group: usize, site: u8) -> bool {
        let present = self.present[group];
        present == NOWHERE || present == u16::from(site)
    }

    pub(super) fn set_present(&mut self, group: usize, site: u8) {
        self.present[group] = u16::from(site);
    }

    pub(super) fn set_demand(
        &mut self,
        group: usize,
        weight: f32,
        demand: PerResource<f32>,
    ) -> Result<(), InstanceError> {
        check_values(group, demand.into_iter().chain([weight]))?;
        self.weight[group] = weight;
        self.demand[group] = demand;
        Ok(())
    }

    pub(super) fn set_room(&mut self, site: u8, room: PerResource<f64>) -> Result<(), InstanceError> {
        self.room[usize::from(site)] = room_of(site.into(), &Site { capacity: room, headroom: 0.0 })?;
        Ok(())
    }

    /// Closed sites take no group; their present groups have to leave.
    pub(super) fn set_open(&mut self, site: u8, open: bool) {
        self.open[usize::from(site)] = open;
    }
}

/// Whether a value can be a weight, a demand, a charge or a cost.
fn check_values(group: usize, values: impl IntoIterator<Item = f32>) -> Result<(), InstanceError> {
    let wrong = values.into_iter().find(|value| !value.is_finite() || *value < 0.0);
    wrong.map_or(Ok(()), |value| Err(InstanceError::Value { group, value }))
}

fn room_of(index: usize, site: &Site) -> Result<PerResource<f64>, InstanceError> {
    if let Some(&capacity) = site.capacity.iter().find(|capacity| capacity.is_nan() || **capacity < 0.0) {
        return Err(InstanceError::Capacity { site: index, capacity });
    }
    if !(0.0..1.0).contains(&site.headroom) {
        return Err(InstanceError::Headroom { site: index, headroom: site.headroom });
    }
    Ok(site.capacity.map(|capacity| capacity * (1.0 - site.headroom)))
}
