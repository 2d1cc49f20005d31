//! The state of a cluster as an instance of the solver: which groups weigh, where they may be, and what that costs.
//!
//! A group is made into a line by itself ([`Maker`]), of tables that hold for all ([`Frame`]); so a leader that keeps both can make a few
//! lines anew.
//!
//! Waiting at a site is not among the costs: what grows with everybody's choice is held down by the room, where it stays
//! below a tenth of a millisecond. Of many sites a group's best and its present one are candidates; the bound counts the rest.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::apart::{self, Apart, Side};
use super::delay::probes::Doubt;
use super::delay::{self, Delays, Demand, Known, LIGHT_KM_PER_MS, Mesh, Model, great_circle_km};
use super::model::{Admin, Cluster, Group, MoveReason, Site};
use super::plan::Readiness;
use super::policy::{PRICE_MS_MAX, Place, Policy};
use super::rules::{Effect, Rules, SiteSet, capacity};
use super::spread::{self, Spreading};
use crate::solver::{
    self, CANDIDATES_MAX, Instance, InstanceError, PerResource, RESOURCES, Resource, SITES_MAX, Solver,
};

/// What a group without known traffic weighs that has to go somewhere: enough to prefer what is near.
const WEIGHT_MIN: f64 = 1e-3;

/// What is asked.
#[derive(Clone, Copy)]
pub(super) enum Purpose<'a> {
    /// Where groups should be, whatever it costs to move them.
    Assess,
    /// Where groups should go next.
    Plan(&'a Readiness<'a>),
}

/// How a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    /// May stay or go.
    Open,
    /// Has to leave its owner.
    Leaving(MoveReason),
    /// Is at this site, or on its way there, and stays for now.
    Fixed(SiteId),
}

/// A group of the instance.
pub(super) struct Entry {
    pub(super) id: GroupId,
    /// Index of its owner.
    pub(super) owner: u8,
    pub(super) stand: Stand,
    /// Delay at its owner, and that with what rules add.
    pub(super) here_ms: f32,
    pub(super) here_cost_ms: f32,
    /// The site with the least delay of those that take groups, whatever rules say, and that delay.
    pub(super) nearest: Option<u8>,
    pub(super) nearest_ms: f32,
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
pub(super) struct Problem {
    pub(super) solver: Solver,
    pub(super) sites: Vec<SiteId>,
    pub(super) groups: Vec<Entry>,
    /// What sites carry, moves in hand counted at their target.
    pub(super) load: Vec<PerResource<f64>>,
    /// What sites have, headroom included.
    pub(super) capacity: Vec<PerResource<f64>>,
    /// Sum of the weights.
    pub(super) weight: f64,
    /// Weight x ms at the owners, without and with what rules add.
    pub(super) present: f64,
    pub(super) present_cost: f64,
    /// Delays at the candidates, without what rules add; those of a group begin where `delay_at` says.
    delay_ms: Vec<f32>,
    delay_at: Vec<u32>,
    /// Weight x ms that light would take from where packets come in to where they go out.
    pub(super) light: f64,
    /// Groups that no site may have.
    pub(super) stranded: Vec<GroupId>,
    /// Groups whose best site is in doubt, the most worth to be measured last; none where no site sends probes.
    pub(super) doubts: Vec<Doubt>,
    /// Groups that are spread, by rule; the classes of the instance have the same order.
    pub(super) spreads: Vec<Spreading>,
    /// Which of these each group counts for.
    pub(super) class: Vec<Option<u8>>,
    /// Failure domain of each site.
    pub(super) domain: Vec<u8>,
    /// Who is to have a standby.
    pub(super) standby: Standby,
}

/// Which groups are to have a standby, by index.
#[derive(Default)]
pub(super) struct Standby {
    pub(super) wanted: Vec<bool>,
    /// By a rule, which makes it known to all; else only room is kept.
    pub(super) named: Vec<bool>,
    pub(super) present: Vec<Option<u8>>,
    /// Number of the set of sites that it may be at; [`u8::MAX`] for all.
    pub(super) among: Vec<u8>,
    pub(super) sets: Vec<[bool; SITES_MAX]>,
    /// Sites for the standbys of groups that stay where they are for now, and so have no other candidates.
    pub(super) beside: BTreeMap<u32, Vec<solver::Candidate>>,
}

/// Delays between all sites, so that a group costs a few sums of rows.
struct Table {
    rows: delay::Rows,
    light_ms: Vec<f32>,
}

impl std::ops::Deref for Table {
    type Target = delay::Rows;

    fn deref(&self) -> &delay::Rows {
        &self.rows
    }
}

impl Table {
    fn new(cluster: &Cluster, model: &Model, now: Micros) -> Self {
        let rows = Mesh::all(cluster, model, now);
        let pairs = rows.sites.iter().flat_map(|a| rows.sites.iter().map(move |b| (a, b)));
        let light = |(a, b): (&Site, &Site)| {
            let ends = a.coordinates().zip(b.coordinates());
            ends.map_or(0.0, |(a, b)| (great_circle_km(a, b) / LIGHT_KM_PER_MS) as f32)
        };
        let light_ms = pairs.map(light).collect();
        Self { rows, light_ms }
    }

    /// The straight way from the ingresses of a group's clients to those of its servers, by share.
    fn light(&self, demand: &Demand) -> f32 {
        let mut sum = 0.0;
        for (from, in_share) in self.shares(&demand.inside) {
            for (to, out_share) in self.shares(&demand.outside) {
                let at = usize::from(from) * self.sites.len() + usize::from(to);
                sum += in_share * out_share * f64::from(self.light_ms[at]);
            }
        }
        sum as f32
    }
}

/// What holds for all groups alike, as long as sites, rules and what is known of delays do.
pub(super) struct Frame {
    table: Table,
    /// Sites of each label of each `separate` rule.
    owned: Vec<Vec<SiteSet>>,
}

impl Frame {
    /// The number of each site.
    pub(super) fn index(&self) -> &[Option<u8>; SITES_MAX] {
        &self.table.index
    }
}

impl Problem {
    /// The instance of a cluster; `None` without sites.
    ///
    /// # Errors
    /// When a number cannot be used, such as a demand that is not finite; the message names it.
    pub(super) fn new(
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
    pub(super) fn with_frame(
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
        let rooms =
            table.sites.iter().zip(&load).map(|(site, load)| room(&cluster.policy, site, *load, purpose));
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
        let (mut classes, apart) = (Classes::new(&cluster.policy), Apart::new(&cluster.policy));
        let owned = share_out(cluster, model, &table, &domains, &mut classes, &apart, now);
        let frame = Frame { table, owned };
        let mut maker = Maker {
            cluster,
            model,
            frame: &frame,
            purpose,
            now,
            apart,
            classes,
            scratch: Scratch::default(),
        };
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
    pub(super) fn instance(&self) -> &Instance {
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
    pub(super) fn renew(
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

    /// What sites carry is another load now, and their rooms follow.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub(super) fn set_loads(
        &mut self,
        cluster: &Cluster,
        load: Vec<PerResource<f64>>,
        purpose: Purpose<'_>,
    ) -> Result<(), InstanceError> {
        for ((site, load), n) in cluster.sites.values().zip(&load).zip(0..=u8::MAX) {
            self.solver.set_room(n, room(&cluster.policy, site, *load, purpose).capacity)?;
        }
        self.load = load;
        Ok(())
    }

    /// Sums over all groups.
    pub(super) fn sum_up(&mut self) {
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
    pub(super) fn at(&self, group: usize, site: u8) -> Option<(f32, f32)> {
        let (n, there) =
            self.instance().candidates(group).enumerate().find(|(_, there)| there.site == site)?;
        Some((there.cost_ms, self.delay_ms[self.delay_at[group] as usize + n]))
    }

    /// A sum over groups of weight x ms, as a mean.
    pub(super) fn mean(&self, sum: f64) -> f64 {
        if self.weight > 0.0 { sum / self.weight } else { 0.0 }
    }
}

/// What became of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It has this index.
    At(usize),
    /// It does not count: without traffic, or its owner is dead.
    Absent,
    /// No site may have it.
    Stranded,
}

/// What a maker made of a group; its candidates are in the maker's scratch.
enum Made {
    Nothing,
    Stranded,
    Line(Line),
}

/// A group as the solver wants it, but for its candidates.
struct Line {
    entry: Entry,
    class: Option<usize>,
    weight: f64,
    demand: PerResource<f64>,
    charge_ms: f64,
    left_out_ms: f32,
    present: Option<u8>,
    /// Whether its best site is in doubt; its index is not in it yet.
    doubt: Option<Doubt>,
}

impl Line {
    fn group<'a>(
        &self,
        class: Option<solver::Class>,
        candidates: &'a [solver::Candidate],
    ) -> solver::Group<'a> {
        solver::Group {
            weight: self.weight as f32,
            demand: self.demand.map(|want| want as f32),
            present: self.present,
            charge: (self.weight * self.charge_ms) as f32,
            left_out_ms: self.left_out_ms,
            class,
            candidates,
        }
    }
}

/// Makes groups into lines, one at a time.
pub(super) struct Maker<'a> {
    cluster: &'a Cluster,
    model: &'a Model,
    frame: &'a Frame,
    purpose: Purpose<'a>,
    now: Micros,
    apart: Apart<'a>,
    classes: Classes<'a>,
    scratch: Scratch,
}

impl<'a> Maker<'a> {
    /// With a frame that was made of the same sites and rules.
    pub(super) fn new(
        cluster: &'a Cluster,
        model: &'a Model,
        frame: &'a Frame,
        purpose: Purpose<'a>,
        now: Micros,
    ) -> Self {
        let (classes, apart) = (Classes::new(&cluster.policy), Apart::new(&cluster.policy));
        Self { cluster, model, frame, purpose, now, apart, classes, scratch: Scratch::default() }
    }

    /// Sites that are left to a group by those that it is kept apart from.
    fn within(&self, group: &GroupId) -> SiteSet {
        if self.apart.is_empty() {
            return SiteSet::ALL;
        }
        let sides = self.apart.sides(group).into_iter();
        sides.fold(SiteSet::ALL, |within, (rule, label)| within.and(self.frame.owned[rule][label]))
    }

    fn line(&mut self, spreads: &[Spreading], group: &Group, known: Option<&Known>) -> Made {
        let within = self.within(&group.id);
        let Self { cluster, model, frame, purpose, now, .. } = *self;
        let table = &frame.table;
        let Some(owner) = table.index[usize::from(group.owner.0)] else { return Made::Nothing };
        let site = &table.sites[usize::from(owner)];
        let known = known.filter(|known| known.demand.packets_per_s > 0.0);
        let demand = known.map(|known| &known.demand);
        let effect = self.classes.effect(&group.id);
        let lawful = Lawful { effect, within };
        let Some(mut stand) = stand(cluster, lawful, group, site, purpose) else { return Made::Nothing };
        let leaves = matches!((purpose, stand), (Purpose::Plan(_), Stand::Leaving(_)));
        let class = effect.spread.and_then(|rule| spreads.iter().position(|spread| spread.rule == rule));
        if demand.is_none() && !leaves {
            if class.is_none() && effect.standby.is_none() {
                return Made::Nothing;
            }
            // It counts where it is, and moves only if there are too many.
            let crowded = class.is_some_and(|class| spreads[class].is_over(group.owner));
            if stand == Stand::Open && !crowded {
                stand = Stand::Fixed(group.owner);
            }
        }
        let scratch = &mut self.scratch;
        table.delays(model, &group.id, known, now, &mut scratch.delays);
        let weight = demand.map_or(WEIGHT_MIN, |demand| demand.packets_per_s);
        let plans = matches!(purpose, Purpose::Plan(_));
        let doubted = (plans && stand == Stand::Open).then_some(owner);
        // An operator who moves groups by hand wants to know as well where they would be better off.
        let by_hand = plans && !cluster.policy.automatic && stand == Stand::Fixed(group.owner);
        let mut doubt = None;
        if by_hand && model.probes() {
            scratch.fill(table, lawful, group, Stand::Open, Some(owner));
            doubt = scratch.doubt(owner, weight);
        }
        let left_out_ms = scratch.fill(table, lawful, group, stand, doubted);
        if doubted.is_some() && model.probes() {
            doubt = scratch.doubt(owner, weight);
        }
        if scratch.candidates.is_empty() {
            return Made::Stranded;
        }
        let charge_ms = match (purpose, stand) {
            (Purpose::Plan(_), Stand::Open) => effect.charge_ms(&cluster.policy, demand, now),
            (Purpose::Plan(_) | Purpose::Assess, _) => 0.0,
        };
        let here_ms = scratch.delays.ms[usize::from(owner)];
        let nearest = scratch.nearest(table);
        Made::Line(Line {
            entry: Entry {
                id: group.id,
                owner,
                stand,
                here_ms,
                here_cost_ms: scratch.costs[usize::from(owner)],
                nearest: nearest.map(|(_, n)| n),
                nearest_ms: nearest.map_or(here_ms, |(ms, _)| ms),
                light_ms: demand.map_or(0.0, |demand| table.light(demand)),
            },
            class,
            weight,
            demand: demand.map_or([0.0; RESOURCES], wants),
            charge_ms,
            left_out_ms,
            present: plans.then_some(owner),
            doubt,
        })
    }

    /// A group that counts no more, where it is; `None` when that is nowhere.
    fn silent(&mut self, group: &Group) -> Option<Line> {
        let owner = self.frame.table.index[usize::from(group.owner.0)]?;
        self.scratch.candidates.clear();
        self.scratch.candidates.push(solver::Candidate { site: owner, cost_ms: 0.0 });
        self.scratch.delays.ms.clear();
        self.scratch.delays.ms.resize(self.frame.table.sites.len(), 0.0);
        Some(Line {
            entry: Entry {
                id: group.id,
                owner,
                stand: Stand::Fixed(group.owner),
                here_ms: 0.0,
                here_cost_ms: 0.0,
                nearest: None,
                nearest_ms: 0.0,
                light_ms: 0.0,
            },
            class: None,
            weight: 0.0,
            demand: [0.0; RESOURCES],
            charge_ms: 0.0,
            left_out_ms: f32::INFINITY,
            present: Some(owner),
            doubt: None,
        })
    }

    /// The delays at the candidates of the last line.
    fn delays_there(&self) -> impl Iterator<Item = f32> + '_ {
        let Scratch { candidates, delays, .. } = &self.scratch;
        candidates.iter().map(|there| delays.ms[usize::from(there.site)])
    }

    fn add_standby(&mut self, standby: &mut Standby, index: u32, group: &Group, stand: Stand) {
        let within = self.within(&group.id);
        let (table, effect) = (&self.frame.table, self.classes.effect(&group.id));
        standby.add(&self.cluster.policy, effect, table, group);
        if let (Stand::Fixed(site), Some(true)) = (stand, standby.wanted.last()) {
            let here = table.index[usize::from(site.0)];
            let others = self.scratch.others(table, Lawful { effect, within }, group, here);
            standby.beside.insert(index, others);
        }
    }
}

/// Where a group may be by hard rules.
#[derive(Clone, Copy)]
struct Lawful<'a> {
    effect: &'a Effect,
    within: SiteSet,
}

impl Lawful<'_> {
    fn allows(&self, group: &GroupId, site: SiteId) -> bool {
        self.within.contains(site) && self.effect.allows(group, site)
    }
}

impl Standby {
    fn add(&mut self, policy: &Policy, effect: &Effect, table: &Table, group: &Group) {
        let set = effect.standby.filter(|set| *set != SiteSet::ALL).map(|set| {
            let mut sites = [false; SITES_MAX];
            table.sites.iter().zip(0..).for_each(|(site, n): (_, usize)| sites[n] = set.contains(site.id));
            sites
        });
        let among = set.map_or(usize::from(u8::MAX), |set| {
            // Sets are those of rules; a rule beyond the number that fits stands for all sites.
            let known = self.sets.iter().position(|known| *known == set);
            known.unwrap_or_else(|| {
                self.sets.push(set);
                self.sets.len() - 1
            })
        });
        self.among.push(u8::try_from(among).unwrap_or(u8::MAX));
        self.named.push(effect.standby.is_some());
        self.wanted.push(policy.survive_loss || effect.standby.is_some());
        self.present.push(group.standby.and_then(|site| table.index[usize::from(site.0)]));
    }
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

/// The sites of each label of each `separate` rule.
fn share_out(
    cluster: &Cluster,
    model: &Model,
    table: &Table,
    domains: &[SiteSet],
    classes: &mut Classes<'_>,
    apart: &Apart<'_>,
    now: Micros,
) -> Vec<Vec<SiteSet>> {
    let mut sides: Vec<Vec<Side>> =
        apart.rules().map(|(_, labels)| vec![Side::new(domains.len()); labels]).collect();
    let groups = cluster.groups.values().filter(|_| !apart.is_empty());
    let mut delays = Delays::default();
    for group in groups {
        let of = apart.sides(&group.id);
        if of.is_empty() {
            continue;
        }
        let effect = classes.effect(&group.id);
        let demand = model.demand(&group.id);
        table.delays(model, &group.id, model.known(&group.id), now, &mut delays);
        let may = |site: &&Site| effect.allows(&group.id, site.id);
        let need = SiteSet::of(table.sites.iter().filter(may).map(|site| &site.id));
        let cost = |site: &Site, ms: f32| effect.cost_ms(&group.id, site.id, f64::from(ms));
        let open = table
            .sites
            .iter()
            .zip(&delays.ms)
            .filter(|(site, _)| need.contains(site.id) && site.takes_groups());
        let mut best = vec![f64::INFINITY; domains.len()];
        for (site, &ms) in open {
            if let Some(domain) = domains.iter().position(|domain| domain.contains(site.id)) {
                best[domain] = best[domain].min(cost(site, ms));
            }
        }
        let weight = demand.map_or(WEIGHT_MIN, |demand| demand.packets_per_s.max(WEIGHT_MIN));
        let regret = regret(&best);
        let site = cluster.move_of(&group.id).map_or(group.owner, |present| present.to);
        let stays =
            need.contains(site) && cluster.sites.get(&site).is_some_and(|site| site.admin != Admin::Draining);
        let at = domains.iter().position(|domain| stays && domain.contains(site));
        for (rule, label) in of {
            let side = &mut sides[rule][label];
            side.needs.insert(need);
            if let Some((domain, ms)) = regret {
                side.worth[domain] += weight * ms;
            }
            if let Some(domain) = at {
                side.held[domain] += 1;
            }
        }
    }
    let owned = |sides: &Vec<Side>| {
        let mut owned = vec![SiteSet::NONE; sides.len()];
        for (domain, side) in domains.iter().zip(apart::share_out(domains, sides)) {
            owned[side] = owned[side].or(*domain);
        }
        owned
    };
    sides.iter().map(owned).collect()
}

/// The domain that is best, and what one has more without it; at most what nobody would wait for.
fn regret(best: &[f64]) -> Option<(usize, f64)> {
    let order = |&a: &usize, &b: &usize| best[a].total_cmp(&best[b]);
    let first = (0..best.len()).filter(|&domain| best[domain].is_finite()).min_by(order)?;
    let second = (0..best.len()).filter(|&domain| domain != first).map(|domain| best[domain]);
    let second = second.fold(f64::INFINITY, f64::min);
    Some((first, (second - best[first]).min(PRICE_MS_MAX)))
}

/// What rules say, once for all groups that the same rules cover.
pub(super) struct Classes<'a> {
    rules: Rules<'a>,
    covering: Vec<u16>,
    known: BTreeMap<Vec<u16>, Effect>,
}

impl<'a> Classes<'a> {
    pub(super) fn new(policy: &'a Policy) -> Self {
        Self { rules: Rules::new(policy), covering: Vec::new(), known: BTreeMap::new() }
    }

    pub(super) fn effect(&mut self, group: &GroupId) -> &Effect {
        self.rules.covering(group, &mut self.covering);
        if !self.known.contains_key(&self.covering) {
            self.known.insert(self.covering.clone(), self.rules.effect(&self.covering));
        }
        &self.known[&self.covering]
    }
}

/// What a group takes of each resource.
pub(super) fn wants(demand: &Demand) -> PerResource<f64> {
    let mut wants = [0.0; RESOURCES];
    wants[Resource::Packets as usize] = demand.packets_per_s;
    wants[Resource::Flows as usize] = demand.flows as f64;
    wants[Resource::Bits as usize] = demand.bits_per_s;
    wants
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
pub(super) struct Loads(pub(super) Vec<PerResource<f64>>);

impl Loads {
    pub(super) fn new(sites: usize) -> Self {
        Self(vec![[0.0; RESOURCES]; sites])
    }

    pub(super) fn add(&mut self, index: &[Option<u8>; SITES_MAX], wants: PerResource<f64>, site: SiteId) {
        if let Some(site) = index[usize::from(site.0)] {
            let load = &mut self.0[usize::from(site)];
            load.iter_mut().zip(wants).for_each(|(load, want)| *load += want);
        }
    }
}

/// What a site may carry. In a plan a site that is above its headroom, but not above its capacity, keeps what it has: groups
/// are not sent away, and back again, for a load that sways.
fn room(policy: &Policy, site: &Site, load: PerResource<f64>, purpose: Purpose<'_>) -> solver::Site {
    let (capacity, headroom) = capacity(policy, site);
    let room = std::array::from_fn(|r| {
        let keeps = matches!(purpose, Purpose::Plan(_)) && load[r] <= capacity[r];
        let free = capacity[r] * (1.0 - headroom);
        if keeps { free.max(load[r]) } else { free }
    });
    solver::Site { capacity: room, headroom: 0.0 }
}

/// How a group stands; `None` for one that cannot be placed by a move, its owner being dead.
fn stand(
    cluster: &Cluster,
    lawful: Lawful<'_>,
    group: &Group,
    owner: &Site,
    purpose: Purpose<'_>,
) -> Option<Stand> {
    let forced = if owner.admin == Admin::Draining || lawful.effect.drained.contains(owner.id) {
        Some(MoveReason::Drain)
    } else {
        (!lawful.allows(&group.id, owner.id)).then_some(MoveReason::Operator)
    };
    let ready = match purpose {
        Purpose::Assess => {
            let forced = forced.or((!owner.alive).then_some(MoveReason::Drain));
            return Some(forced.map_or(Stand::Open, Stand::Leaving));
        }
        Purpose::Plan(ready) => ready,
    };
    if let Some(present) = cluster.move_of(&group.id) {
        return Some(Stand::Fixed(present.to));
    }
    if !owner.alive {
        return None;
    }
    Some(match forced {
        _ if !(ready.free)(&group.id) => Stand::Fixed(owner.id),
        Some(reason) => Stand::Leaving(reason),
        None if cluster.policy.automatic && (ready.rested)(&group.id) => Stand::Open,
        None => Stand::Fixed(owner.id),
    })
}

/// Room for the costs and candidates of one group at a time.
#[derive(Default)]
struct Scratch {
    /// By site: the delay, and that with what rules and doubt add.
    delays: Delays,
    costs: Vec<f32>,
    order: Vec<u8>,
    candidates: Vec<solver::Candidate>,
}

impl Scratch {
    /// The cheapest sites that take groups and that a group may have, but for one.
    fn others(
        &self,
        table: &Table,
        lawful: Lawful<'_>,
        group: &Group,
        but: Option<u8>,
    ) -> Vec<solver::Candidate> {
        let open = |(site, n): &(&Site, u8)| {
            Some(*n) != but && site.takes_groups() && lawful.allows(&group.id, site.id)
        };
        let cost =
            |(_, site): (&Site, u8)| solver::Candidate { site, cost_ms: self.costs[usize::from(site)] };
        let mut others: Vec<_> = table.sites.iter().zip(0..=u8::MAX).filter(open).map(cost).collect();
        others.sort_by(|a, b| a.cost_ms.total_cmp(&b.cost_ms).then(a.site.cmp(&b.site)));
        others.truncate(CANDIDATES_MAX - 1);
        others
    }

    /// The least delay of the sites that take groups, and where that is.
    fn nearest(&self, table: &Table) -> Option<(f32, u8)> {
        let sites = table.sites.iter().zip(&self.delays.ms).zip(0..=u8::MAX);
        let open = sites.filter(|((site, _), _)| site.takes_groups()).map(|((_, ms), n)| (*ms, n));
        open.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Whether the best of the candidates is in doubt, for a group that its index is not known of yet.
    fn doubt(&self, owner: u8, weight: f64) -> Option<Doubt> {
        Doubt::of(0, weight as f32, self.undoubted(owner), &self.delays)
    }

    /// The candidates at what they cost when nothing is in doubt.
    fn undoubted(&self, owner: u8) -> impl Iterator<Item = solver::Candidate> + Clone {
        let doubt_ms = move |site: u8| self.delays.doubt_ms(owner, site);
        let candidates = self.candidates.iter();
        candidates
            .map(move |there| solver::Candidate { cost_ms: there.cost_ms - doubt_ms(there.site), ..*there })
    }

    /// From the delays: the best sites that a group may have, its owner among them, and what the best of the others costs.
    /// Full ones too: whether there is room is the solver's to say.
    /// `doubted` is the owner of one that may stay: sites that are less surely known than that have to promise more.
    fn fill(
        &mut self,
        table: &Table,
        lawful: Lawful<'_>,
        group: &Group,
        stand: Stand,
        doubted: Option<u8>,
    ) -> f32 {
        let effect = lawful.effect;
        let costs = table.sites.iter().zip(&self.delays.ms);
        let costs = costs.map(|(site, ms)| effect.cost_ms(&group.id, site.id, f64::from(*ms)) as f32);
        self.costs.clear();
        self.costs.extend(costs);
        if let Some(owner) = doubted {
            self.delays.add_doubts(owner, &mut self.costs);
        }
        self.candidates.clear();
        self.order.clear();
        let owner = table.index[usize::from(group.owner.0)];
        let costs = &self.costs;
        let cost = |n: u8| costs[usize::from(n)];
        if let Stand::Fixed(site) = stand {
            let site = table.index[usize::from(site.0)];
            self.candidates.extend(site.map(|site| solver::Candidate { site, cost_ms: cost(site) }));
            return f32::INFINITY;
        }
        let open = |(site, n): &(&Site, u8)| {
            let free = if Some(*n) == owner { stand == Stand::Open } else { site.takes_groups() };
            free && lawful.allows(&group.id, site.id)
        };
        self.order.extend(table.sites.iter().zip(0..=u8::MAX).filter(open).map(|(_, n)| n));
        let by_cost = |a: &u8, b: &u8| cost(*a).total_cmp(&cost(*b)).then(a.cmp(b));
        let mut left_out_ms = f32::INFINITY;
        if self.order.len() > CANDIDATES_MAX {
            self.order.select_nth_unstable_by(CANDIDATES_MAX, by_cost);
            let at = self.order.iter().position(|n| Some(*n) == owner).unwrap_or(0);
            if at >= CANDIDATES_MAX {
                // In the place of the worst of the best, which counts as left out then.
                let best = &self.order[..CANDIDATES_MAX];
                let worst = (0..CANDIDATES_MAX).max_by(|a, b| by_cost(&best[*a], &best[*b])).unwrap_or(0);
                self.order.swap(at, worst);
            }
            let left_out = self.order[CANDIDATES_MAX..].iter().map(|n| cost(*n));
            left_out_ms = left_out.fold(f32::INFINITY, f32::min);
            self.order.truncate(CANDIDATES_MAX);
        }
        self.order.sort_unstable_by(by_cost);
        let candidates = self.order.iter().map(|&site| solver::Candidate { site, cost_ms: cost(site) });
        self.candidates.extend(candidates);
        left_out_ms
    }
}
