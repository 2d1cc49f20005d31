//! The state of a cluster as an instance of the solver: which groups weigh, where they may be, and what that costs.
//!
//! Waiting at a site is not among the costs: what grows with everybody's choice is held down by the room, where it stays
//! below a tenth of a millisecond. Of many sites a group's best and its present one are candidates; the bound counts the rest.

use flow::{GroupId, Micros, SiteId};

use super::delay::{Demand, LIGHT_KM_PER_MS, Model, great_circle_km};
use super::model::{Admin, Cluster, Group, MoveReason, Site};
use super::plan::Readiness;
use crate::solver::{
    self, CANDIDATES_MAX, Instance, InstanceError, PerResource, RESOURCES, Resource, SITES_MAX,
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
    /// Delay at its owner.
    pub(super) here_ms: f32,
}

/// An instance of the solver, and what each index means.
pub(super) struct Problem {
    pub(super) instance: Instance,
    pub(super) sites: Vec<SiteId>,
    pub(super) groups: Vec<Entry>,
    /// What sites carry, moves in hand counted at their target.
    pub(super) load: Vec<PerResource<f64>>,
    /// What sites have, headroom included.
    pub(super) capacity: Vec<PerResource<f64>>,
    /// Sum of the weights.
    pub(super) weight: f64,
    /// Weight x ms at the owners.
    pub(super) present: f64,
    /// Weight x ms that light would take from where packets come in to where they go out.
    pub(super) light: f64,
    /// Groups that no site may have.
    pub(super) stranded: Vec<GroupId>,
}

/// Delays between all sites, so that a group costs a few sums of rows.
struct Table<'a> {
    sites: Vec<&'a Site>,
    index: [Option<u8>; SITES_MAX],
    ms: Vec<f32>,
    light_ms: Vec<f32>,
}

impl<'a> Table<'a> {
    fn new(cluster: &'a Cluster, model: &Model, now: Micros) -> Self {
        let sites: Vec<&Site> = cluster.sites.values().collect();
        let mut index = [None; SITES_MAX];
        for (site, n) in sites.iter().zip(0..=u8::MAX) {
            index[usize::from(site.id.0)] = Some(n);
        }
        let pairs = || sites.iter().flat_map(|a| sites.iter().map(move |b| (a, b)));
        let light = |(a, b): (&&Site, &&Site)| {
            let ends = a.coordinates().zip(b.coordinates());
            ends.map_or(0.0, |(a, b)| (great_circle_km(a, b) / LIGHT_KM_PER_MS) as f32)
        };
        let ms = pairs().map(|(a, b)| model.between(a, b, now).ms as f32).collect();
        let light_ms = pairs().map(light).collect();
        Self { index, ms, light_ms, sites }
    }

    fn row(&self, site: u8) -> &[f32] {
        let len = self.sites.len();
        &self.ms[usize::from(site) * len..][..len]
    }

    /// Known sites of shares, by index.
    fn known<'b>(
        &'b self,
        shares: impl IntoIterator<Item = (&'b SiteId, &'b f64)> + 'b,
    ) -> impl Iterator<Item = (u8, f32)> + 'b {
        shares.into_iter().filter_map(|(site, share)| Some((self.index[usize::from(site.0)]?, *share as f32)))
    }

    /// The group's delay at every site, in milliseconds.
    fn costs(&self, model: &Model, id: &GroupId, demand: Option<&Demand>, costs: &mut Vec<f32>) {
        costs.clear();
        costs.resize(self.sites.len(), 0.0);
        let mut add = |site: u8, share: f32| {
            costs.iter_mut().zip(self.row(site)).for_each(|(cost, ms)| *cost += share * ms);
        };
        let mut inside = 0;
        for (site, share) in demand.into_iter().flat_map(|demand| self.known(&demand.inside)) {
            add(site, share);
            inside += 1;
        }
        for (site, share) in demand.into_iter().flat_map(|demand| self.known(&demand.outside)) {
            add(site, share);
        }
        if inside == 0 {
            for (cost, site) in costs.iter_mut().zip(&self.sites) {
                *cost += model.clients_to(id, site).unwrap_or(0.0) as f32;
            }
        }
    }

    /// The straight way from the ingresses of a group's clients to those of its servers, by share.
    fn light(&self, demand: &Demand) -> f64 {
        let mut sum = 0.0;
        for (from, in_share) in self.known(&demand.inside) {
            for (to, out_share) in self.known(&demand.outside) {
                let at = usize::from(from) * self.sites.len() + usize::from(to);
                sum += f64::from(in_share * out_share * self.light_ms[at]);
            }
        }
        sum
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
        if cluster.sites.is_empty() {
            return Ok(None);
        }
        let table = Table::new(cluster, model, now);
        let load = loads(cluster, model, &table, purpose);
        let rooms = table.sites.iter().zip(&load).map(|(site, load)| room(cluster, site, *load, purpose));
        let mut problem = Self {
            instance: Instance::new(&rooms.collect::<Vec<_>>())?,
            sites: cluster.sites.keys().copied().collect(),
            groups: Vec::new(),
            load,
            capacity: table.sites.iter().map(|site| capacity(site)).collect(),
            weight: 0.0,
            present: 0.0,
            light: 0.0,
            stranded: Vec::new(),
        };
        let mut rows = Rows { costs: Vec::new(), order: Vec::new(), candidates: Vec::new() };
        for group in cluster.groups.values() {
            problem.add(cluster, model, &table, &mut rows, group, purpose)?;
        }
        Ok(Some(problem))
    }

    fn add(
        &mut self,
        cluster: &Cluster,
        model: &Model,
        table: &Table<'_>,
        rows: &mut Rows,
        group: &Group,
        purpose: Purpose<'_>,
    ) -> Result<(), InstanceError> {
        let Some(owner) = table.index[usize::from(group.owner.0)] else { return Ok(()) };
        let site = table.sites[usize::from(owner)];
        let demand = model.demand(&group.id).filter(|demand| demand.packets_per_s > 0.0);
        let Some(stand) = stand(cluster, group, site, purpose) else { return Ok(()) };
        let leaves = matches!((purpose, stand), (Purpose::Plan(_), Stand::Leaving(_)));
        if demand.is_none() && !leaves {
            return Ok(());
        }
        table.costs(model, &group.id, demand, &mut rows.costs);
        let here_ms = rows.costs[usize::from(owner)];
        let left_out_ms = rows.fill(cluster, table, group, stand);
        if rows.candidates.is_empty() {
            self.stranded.push(group.id);
            return Ok(());
        }
        let weight = demand.map_or(WEIGHT_MIN, |demand| demand.packets_per_s);
        let charge = match (purpose, stand) {
            (Purpose::Plan(_), Stand::Open) => weight * cluster.policy.min_gain_ms,
            (Purpose::Plan(_) | Purpose::Assess, _) => 0.0,
        };
        self.instance.push(&solver::Group {
            weight: weight as f32,
            demand: demand.map_or([0.0; RESOURCES], |demand| wants(demand).map(|want| want as f32)),
            present: matches!(purpose, Purpose::Plan(_)).then_some(owner),
            charge: charge as f32,
            left_out_ms,
            candidates: &rows.candidates,
        })?;
        self.weight += weight;
        self.present += weight * f64::from(here_ms);
        self.light += weight * demand.map_or(0.0, |demand| table.light(demand));
        self.groups.push(Entry { id: group.id, owner, stand, here_ms });
        Ok(())
    }

    /// A sum over groups of weight x ms, as a mean.
    pub(super) fn mean(&self, sum: f64) -> f64 {
        if self.weight > 0.0 { sum / self.weight } else { 0.0 }
    }
}

/// What a group takes of each resource.
fn wants(demand: &Demand) -> PerResource<f64> {
    let mut wants = [0.0; RESOURCES];
    wants[Resource::Packets as usize] = demand.packets_per_s;
    wants[Resource::Flows as usize] = demand.flows as f64;
    wants[Resource::Bits as usize] = demand.bits_per_s;
    wants
}

fn loads(cluster: &Cluster, model: &Model, table: &Table<'_>, purpose: Purpose<'_>) -> Vec<PerResource<f64>> {
    let mut loads = vec![[0.0; RESOURCES]; table.sites.len()];
    for group in cluster.groups.values() {
        let target = || cluster.move_of(&group.id).map(|present| present.to);
        let site = if matches!(purpose, Purpose::Plan(_)) { target() } else { None };
        let site = table.index[usize::from(site.unwrap_or(group.owner).0)];
        if let Some((site, demand)) = site.zip(model.demand(&group.id)) {
            let load = &mut loads[usize::from(site)];
            load.iter_mut().zip(wants(demand)).for_each(|(load, want)| *load += want);
        }
    }
    loads
}

/// What a site may carry. In a plan a site that is above its headroom, but not above its capacity, keeps what it has: groups
/// are not sent away, and back again, for a load that sways.
fn room(cluster: &Cluster, site: &Site, load: PerResource<f64>, purpose: Purpose<'_>) -> solver::Site {
    let capacity = capacity(site);
    let share = 1.0 - cluster.policy.headroom;
    let room = std::array::from_fn(|r| {
        let keeps = matches!(purpose, Purpose::Plan(_)) && load[r] <= capacity[r];
        if keeps { (capacity[r] * share).max(load[r]) } else { capacity[r] * share }
    });
    solver::Site { capacity: room, headroom: 0.0 }
}

/// What a site has of each resource; infinite where the operator set no limit.
fn capacity(site: &Site) -> PerResource<f64> {
    let limit = |limit: Option<u64>| limit.map_or(f64::INFINITY, |limit| limit as f64);
    let mut capacity = [0.0; RESOURCES];
    capacity[Resource::Packets as usize] = site.capacity_pps as f64;
    capacity[Resource::Flows as usize] = limit(site.capacity_flows);
    capacity[Resource::Bits as usize] = limit(site.capacity_bps);
    capacity
}

/// How a group stands; `None` for one that cannot be placed by a move, its owner being dead.
fn stand(cluster: &Cluster, group: &Group, owner: &Site, purpose: Purpose<'_>) -> Option<Stand> {
    let ready = match purpose {
        Purpose::Assess => {
            let away = !owner.alive || owner.admin == Admin::Draining;
            return Some(if away { Stand::Leaving(MoveReason::Drain) } else { Stand::Open });
        }
        Purpose::Plan(ready) => ready,
    };
    if let Some(present) = cluster.move_of(&group.id) {
        return Some(Stand::Fixed(present.to));
    }
    if !owner.alive {
        return None;
    }
    let forced = if owner.admin == Admin::Draining {
        Some(MoveReason::Drain)
    } else {
        cluster.policy.forbids(&group.id, owner.id).then_some(MoveReason::Operator)
    };
    Some(match forced {
        _ if !(ready.free)(&group.id) => Stand::Fixed(owner.id),
        Some(reason) => Stand::Leaving(reason),
        None if cluster.policy.automatic && (ready.rested)(&group.id) => Stand::Open,
        None => Stand::Fixed(owner.id),
    })
}

/// Room for the costs and candidates of one group at a time.
struct Rows {
    costs: Vec<f32>,
    order: Vec<u8>,
    candidates: Vec<solver::Candidate>,
}

impl Rows {
    /// The best sites that a group may have, its owner among them, and what the best of the others costs. Full ones too:
    /// whether there is room is the solver's to say.
    fn fill(&mut self, cluster: &Cluster, table: &Table<'_>, group: &Group, stand: Stand) -> f32 {
        self.candidates.clear();
        self.order.clear();
        if let Stand::Fixed(site) = stand {
            let site = table.index[usize::from(site.0)];
            self.candidates.extend(site.map(|site| self.candidate(site)));
            return f32::INFINITY;
        }
        for (site, n) in table.sites.iter().zip(0..=u8::MAX) {
            let here = site.id == group.owner;
            let open = if here {
                stand == Stand::Open && !cluster.policy.forbids(&group.id, site.id)
            } else {
                site.takes_groups() && !cluster.policy.forbids(&group.id, site.id)
            };
            if open {
                self.order.push(n);
            }
        }
        let costs = &self.costs;
        let cost = |n: u8| costs[usize::from(n)];
        let by_cost = |a: &u8, b: &u8| cost(*a).total_cmp(&cost(*b)).then(a.cmp(b));
        let mut left_out_ms = f32::INFINITY;
        if self.order.len() > CANDIDATES_MAX {
            self.order.select_nth_unstable_by(CANDIDATES_MAX, by_cost);
            let owner =
                self.order.iter().position(|n| table.sites[usize::from(*n)].id == group.owner).unwrap_or(0);
            if owner >= CANDIDATES_MAX {
                // In the place of the worst of the best, which counts as left out then.
                let best = &self.order[..CANDIDATES_MAX];
                let worst = (0..CANDIDATES_MAX).max_by(|a, b| by_cost(&best[*a], &best[*b])).unwrap_or(0);
                self.order.swap(owner, worst);
            }
            left_out_ms = self.order[CANDIDATES_MAX..].iter().map(|n| cost(*n)).fold(f32::INFINITY, f32::min);
            self.order.truncate(CANDIDATES_MAX);
        }
        self.order.sort_unstable_by(by_cost);
        let candidates = self.order.iter().map(|&site| solver::Candidate { site, cost_ms: cost(site) });
        self.candidates.extend(candidates);
        left_out_ms
    }

    fn candidate(&self, site: u8) -> solver::Candidate {
        solver::Candidate { site, cost_ms: self.costs[usize::from(site)] }
    }
}
