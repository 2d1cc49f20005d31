//! The state of a cluster as an instance of the solver: which groups weigh, where they may be, and what that costs.
//!
//! A group is made into a line by itself ([`Maker`]), of tables that hold for all ([`Frame`]); so a leader that keeps both can make a few
//! lines anew.
//!
//! Waiting at a site is not among the costs: what grows with everybody's choice is held down by the room, where it stays
//! below a tenth of a millisecond. Of many sites a group's best and its present one are candidates; the bound counts the rest.

mod frame;
mod maker;
mod scratch;
mod standby;

use flow::{GroupId, Micros, SiteId};

use super::delay::probes::Doubt;
use super::delay::{self, Known, Model};
use super::model::{Cluster, Group, MoveReason, Site};
use super::plan::Readiness;
use super::policy::{Place, Policy};
use super::rules::capacity;
use super::spread::{self, Spreading};
use crate::solver::{self, Instance, InstanceError, PerResource, RESOURCES, SITES_MAX, Solver};
pub(in crate::core) use frame::Frame;
use frame::Table;
use maker::Made;
pub(in crate::core) use maker::{Classes, Maker, wants};
use standby::Standby;

/// What is asked.
#[derive(Clone, Copy)]
pub(in crate::core) enum Purpose<'a> {
    /// Where groups should be, whatever it costs to move them.
    Assess,
    /// Where groups should go next.
    Plan(&'a Readiness<'a>),
}

/// How a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::core) enum Stand {
    /// May stay or go.
    Open,
    /// Has to leave its owner.
    Leaving(MoveReason),
    /// Is at this site, or on its way there, and stays for now.
    Fixed(SiteId),
}

/// A group of the instance.
pub(in crate::core) struct Entry {
    pub(in crate::core) id: GroupId,
    /// Index of its owner.
    pub(in crate::core) owner: u8,
    pub(in crate::core) stand: Stand,
    /// Delay at its owner, and that with what rules add.
    pub(in crate::core) here_ms: f32,
    pub(in crate::core) here_cost_ms: f32,
    /// The site with the least delay of those that take groups, whatever rules say, and that delay.
    pub(in crate::core) nearest: Option<u8>,
    pub(in crate::core) nearest_ms: f32,
    /// What light would take.
    light_ms: f32,
}

impl Entry {
    /// Where it counts: a move in hand is as good as done.
    fn at(&self, frame: &Frame) -> u8 {
        let fixed =
            if let Stand::Fixed(site) = self.stand { frame.table.index[usize::from(site.0)] } else { None };
        fixed.unwrap_or(self.owner)
    }
}

/// An instance in its solver, and what each index means.
pub(in crate::core) struct Problem {
    pub(in crate::core) solver: Solver,
    pub(in crate::core) sites: Vec<SiteId>,
    pub(in crate::core) groups: Vec<Entry>,
    /// What sites carry, moves in hand counted at their target.
    pub(in crate::core) load: Vec<PerResource<f64>>,
    /// What sites have, headroom included.
    pub(in crate::core) capacity: Vec<PerResource<f64>>,
    /// Sum of the weights.
    pub(in crate::core) weight: f64,
    /// Weight x ms at the owners, without and with what rules add.
    pub(in crate::core) present: f64,
    pub(in crate::core) present_cost: f64,
    /// Delays at the candidates, without what rules add; those of a group begin where `delay_at` says.
    delay_ms: Vec<f32>,
    delay_at: Vec<u32>,
    /// Weight x ms that light would take from where packets come in to where they go out.
    pub(in crate::core) light: f64,
    /// Groups that no site may have.
    pub(in crate::core) stranded: Vec<GroupId>,
    /// Groups whose best site is in doubt, the most worth to be measured last; none where no site sends probes.
    pub(in crate::core) doubts: Vec<Doubt>,
    /// Groups that are spread, by rule; the classes of the instance have the same order.
    pub(in crate::core) spreads: Vec<Spreading>,
    /// Which of these each group counts for.
    pub(in crate::core) class: Vec<Option<u8>>,
    /// Failure domain of each site.
    pub(in crate::core) domain: Vec<u8>,
    /// Who is to have a standby.
    pub(in crate::core) standby: Standby,
}

impl Problem {
    /// The instance of a cluster; `None` without sites.
    ///
    /// # Errors
    /// When a number cannot be used, such as a demand that is not finite; the message names it.
    pub(in crate::core) fn new(
        cluster: &Cluster,
        model: &Model,
        purpose: Purpose<'_>,
        now: Micros,
    ) -> Result<Option<Self>, InstanceError> {
        Ok(Self::with_frame(cluster, model, purpose, now)?.map(|(problem, _)| problem))
    }

    /// The same with what it was made of.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub(in crate::core) fn with_frame(
        cluster: &Cluster,
        model: &Model,
        purpose: Purpose<'_>,
        now: Micros,
    ) -> Result<Option<(Self, Frame)>, InstanceError> {
        if cluster.sites.is_empty() {
            return Ok(None);
        }
        let table = Table::new(cluster, model, now);
        let load = loads(cluster, model, &table, purpose);
        let rooms = table.sites.iter().zip(&load).map(|(site, load)| room(&cluster.policy, site, *load));
        let mut instance = Instance::new(&rooms.collect::<Vec<_>>())?;
        let spreads = add_classes(&mut instance, cluster, purpose)?;
        let domains = spread::places(cluster, Place::Domain);
        let domain =
            |site: &SiteId| domains.iter().position(|domain| domain.contains(*site)).unwrap_or(0) as u8;
        let mut problem = Self {
            solver: Solver::new(instance),
            sites: cluster.sites.keys().copied().collect(),
            domain: cluster.sites.keys().map(domain).collect(),
            spreads,
            class: Vec::new(),
            standby: Standby::default(),
            groups: Vec::new(),
            load,
            capacity: table.sites.iter().map(|site| capacity(&cluster.policy, site).0).collect(),
            weight: 0.0,
            present: 0.0,
            present_cost: 0.0,
            delay_ms: Vec::new(),
            delay_at: Vec::new(),
            light: 0.0,
            stranded: Vec::new(),
            doubts: Vec::new(),
        };
        let frame = Frame::new(cluster, model, table, &domains, now);
        let mut maker = Maker::new(cluster, model, &frame, purpose, now);
        for (group, known) in model.beside(cluster) {
            if problem.add(&mut maker, group, known)? == Fate::Stranded {
                problem.stranded.push(group.id);
            }
        }
        delay::probes::sort(&mut problem.doubts);
        problem.sum_up();
        Ok(Some((problem, frame)))
    }

    /// What is solved.
    pub(in crate::core) fn instance(&self) -> &Instance {
        self.solver.instance()
    }

    /// Adds a group, if it counts.
    fn add(
        &mut self,
        maker: &mut Maker<'_>,
        group: &Group,
        known: Option<&Known>,
    ) -> Result<Fate, InstanceError> {
        let made = maker.line(&self.spreads, group, known);
        let line = match made {
            Made::Nothing => return Ok(Fate::Absent),
            Made::Stranded => return Ok(Fate::Stranded),
            Made::Line(line) => line,
        };
        let index = self.groups.len();
        self.doubts.extend(line.doubt.map(|doubt| doubt.at(index as u32)));
        let class = line.class.and_then(|class| self.instance().classes().nth(class));
        self.solver.push(&line.group(class, &maker.scratch.candidates))?;
        self.class.push(line.class.map(|class| class as u8));
        maker.add_standby(&mut self.standby, index as u32, group, line.entry.stand);
        self.groups.push(line.entry);
        self.delay_at.push(self.delay_ms.len() as u32);
        self.delay_ms.extend(maker.delays_there());
        Ok(Fate::At(index))
    }

    /// Makes a group anew that has an index, or gives it one if it counts now. What sites carry is the caller's to renew.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub(in crate::core) fn renew(
        &mut self,
        maker: &mut Maker<'_>,
        group: &Group,
        known: Option<&Known>,
        index: Option<usize>,
    ) -> Result<Fate, InstanceError> {
        let Some(index) = index else { return self.add(maker, group, known) };
        let line = match maker.line(&self.spreads, group, known) {
            Made::Line(line) => line,
            Made::Stranded => return Ok(Fate::Stranded),
            // It keeps its index, and weighs nothing where it is.
            Made::Nothing => match maker.silent(group) {
                Some(line) => line,
                None => return Ok(Fate::Absent),
            },
        };
        if let Some(class) = self.class[index] {
            let site = |at: u8| self.sites.get(usize::from(at)).copied();
            let (from, to) = (site(self.groups[index].at(maker.frame)), site(line.entry.at(maker.frame)));
            self.spreads[usize::from(class)].shift(from, to);
        }
        let class = self.instance().class(index);
        let before = self.instance().candidates(index).len();
        self.solver.replace(index, &line.group(class, &maker.scratch.candidates))?;
        self.groups[index] = line.entry;
        if maker.scratch.candidates.len() > before {
            self.delay_at[index] = self.delay_ms.len() as u32;
            self.delay_ms.extend(maker.delays_there());
        } else {
            let start = self.delay_at[index] as usize;
            self.delay_ms[start..].iter_mut().zip(maker.delays_there()).for_each(|(slot, ms)| *slot = ms);
        }
        Ok(Fate::At(index))
    }

    /// A group that has come into the instance counted for those that it is spread with where its dead owner was.
    pub(in crate::core) fn count_again(&mut self, index: usize, before: SiteId, frame: &Frame) {
        if let Some(class) = self.class[index] {
            let site = self.sites.get(usize::from(self.groups[index].at(frame))).copied();
            self.spreads[usize::from(class)].shift(Some(before), site);
        }
    }

    /// What sites carry is another load now, and their rooms follow.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub(in crate::core) fn set_loads(
        &mut self,
        cluster: &Cluster,
        load: Vec<PerResource<f64>>,
    ) -> Result<(), InstanceError> {
        for ((site, load), n) in cluster.sites.values().zip(&load).zip(0..=u8::MAX) {
            self.solver.set_room(n, room(&cluster.policy, site, *load).capacity)?;
        }
        self.load = load;
        Ok(())
    }

    /// Sums over all groups.
    pub(in crate::core) fn sum_up(&mut self) {
        (self.weight, self.present, self.present_cost, self.light) = (0.0, 0.0, 0.0, 0.0);
        for (index, entry) in self.groups.iter().enumerate() {
            let weight = f64::from(self.solver.instance().weight(index));
            self.weight += weight;
            self.present += weight * f64::from(entry.here_ms);
            self.present_cost += weight * f64::from(entry.here_cost_ms);
            self.light += weight * f64::from(entry.light_ms);
        }
    }

    /// What a group costs at one of its candidates, with what rules add, and the delay alone.
    pub(in crate::core) fn at(&self, group: usize, site: u8) -> Option<(f32, f32)> {
        let (n, there) =
            self.instance().candidates(group).enumerate().find(|(_, there)| there.site == site)?;
        Some((there.cost_ms, self.delay_ms[self.delay_at[group] as usize + n]))
    }

    /// Weight x ms of the delays at the sites that the solver chose, without what rules add.
    pub(in crate::core) fn planned(&self) -> f64 {
        let placed = |group: usize| {
            let (_, delay_ms) = self.at(group, self.solver.site(group)?)?;
            Some(f64::from(self.instance().weight(group)) * f64::from(delay_ms))
        };
        (0..self.groups.len()).filter_map(placed).sum()
    }

    /// A sum over groups of weight x ms, as a mean.
    pub(in crate::core) fn mean(&self, sum: f64) -> f64 {
        if self.weight > 0.0 { sum / self.weight } else { 0.0 }
    }
}

/// What became of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::core) enum Fate {
    /// It has this index.
    At(usize),
    /// It does not count: without traffic, or its owner is dead.
    Absent,
    /// No site may have it.
    Stranded,
}

/// The classes of groups that are spread. Those that are not in the instance, as their owner is dead, hold their place.
fn add_classes(
    instance: &mut Instance,
    cluster: &Cluster,
    purpose: Purpose<'_>,
) -> Result<Vec<Spreading>, InstanceError> {
    let spreads = spread::spreadings(cluster);
    let mut absent: Vec<Vec<usize>> = spreads.iter().map(|spread| vec![0; spread.places.len()]).collect();
    if !spreads.is_empty() && matches!(purpose, Purpose::Plan(_)) {
        let index = spread::Index::new(&cluster.policy);
        let dead = |group: &&Group| {
            let alive = cluster.sites.get(&group.owner).is_some_and(|site| site.alive);
            !alive && group.move_id.is_none()
        };
        for group in cluster.groups.values().filter(dead) {
            let at = index.of(&group.id, &spreads);
            if let Some((at, place)) = at.and_then(|at| Some((at, spreads[at].place(group.owner)?))) {
                absent[at][place] += 1;
            }
        }
    }
    for (spread, absent) in spreads.iter().zip(&absent) {
        let cell = |site: &SiteId| spread.place(*site).unwrap_or(0) as u8;
        let cells: Vec<u8> = cluster.sites.keys().map(cell).collect();
        let limits = absent.iter().map(|absent| spread.limit.saturating_sub(*absent) as f64);
        instance.add_class(&cells, &limits.collect::<Vec<_>>())?;
    }
    Ok(spreads)
}

/// What sites carry; in a plan moves in hand count at their target.
fn loads(cluster: &Cluster, model: &Model, table: &Table, purpose: Purpose<'_>) -> Vec<PerResource<f64>> {
    let mut loads = Loads::new(table.sites.len());
    for (group, known) in model.beside(cluster) {
        if let Some(known) = known {
            let target = |group: &Group| cluster.moves.get(&group.move_id?).map(|present| present.to);
            let target = if matches!(purpose, Purpose::Plan(_)) { target(group) } else { None };
            loads.add(&table.index, wants(&known.demand), target.unwrap_or(group.owner));
        }
    }
    loads.0
}

/// What sites carry, group by group.
pub(in crate::core) struct Loads(pub(in crate::core) Vec<PerResource<f64>>);

impl Loads {
    pub(in crate::core) fn new(sites: usize) -> Self {
        Self(vec![[0.0; RESOURCES]; sites])
    }

    pub(in crate::core) fn add(
        &mut self,
        index: &[Option<u8>; SITES_MAX],
        wants: PerResource<f64>,
        site: SiteId,
    ) {
        if let Some(site) = index[usize::from(site.0)] {
            let load = &mut self.0[usize::from(site)];
            load.iter_mut().zip(wants).for_each(|(load, want)| *load += want);
        }
    }
}

/// What a site may carry. One that is above its headroom, but not above its capacity, keeps what it has: groups are not sent
/// away, and back again, for a load that sways. The same for who asks how good the placement is: what is there now and what could be are
/// compared within one room.
fn room(policy: &Policy, site: &Site, load: PerResource<f64>) -> solver::Site {
    let (capacity, headroom) = capacity(policy, site);
    let room = std::array::from_fn(|r| {
        let free = capacity[r] * (1.0 - headroom);
        if load[r] <= capacity[r] { free.max(load[r]) } else { free }
    });
    solver::Site { capacity: room, headroom: 0.0 }
}
