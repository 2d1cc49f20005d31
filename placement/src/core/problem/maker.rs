//! Groups made into lines of the instance, one at a time.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::frame::Frame;
use super::scratch::Scratch;
use super::standby::Standby;
use super::{Entry, Purpose, Stand};
use crate::core::apart::Apart;
use crate::core::delay::probes::Doubt;
use crate::core::delay::{Demand, Known, Model};
use crate::core::model::{Admin, Cluster, Group, MoveReason, Site};
use crate::core::policy::Policy;
use crate::core::rules::{Effect, Rules, SiteSet};
use crate::core::spread::Spreading;
use crate::solver::{self, PerResource, RESOURCES, Resource};

/// What a group without known traffic weighs that has to go somewhere: enough to prefer what is near.
pub(super) const WEIGHT_MIN: f64 = 1e-3;

/// What a maker made of a group; its candidates are in the maker's scratch.
pub(super) enum Made {
    Nothing,
    Stranded,
    Line(Line),
}

/// A group as the solver wants it, but for its candidates.
pub(super) struct Line {
    pub(super) entry: Entry,
    pub(super) class: Option<usize>,
    weight: f64,
    demand: PerResource<f64>,
    charge_ms: f64,
    left_out_ms: f32,
    present: Option<u8>,
    /// Whether its best site is in doubt; its index is not in it yet.
    pub(super) doubt: Option<Doubt>,
}

impl Line {
    pub(super) fn group<'a>(
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
pub(in crate::core) struct Maker<'a> {
    cluster: &'a Cluster,
    model: &'a Model,
    pub(super) frame: &'a Frame,
    purpose: Purpose<'a>,
    now: Micros,
    apart: Apart<'a>,
    classes: Classes<'a>,
    pub(super) scratch: Scratch,
}

impl<'a> Maker<'a> {
    /// With a frame that was made of the same sites and rules.
    pub(in crate::core) fn new(
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

    pub(super) fn line(&mut self, spreads: &[Spreading], group: &Group, known: Option<&Known>) -> Made {
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
    pub(super) fn silent(&mut self, group: &Group) -> Option<Line> {
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
    pub(super) fn delays_there(&self) -> impl Iterator<Item = f32> + '_ {
        let Scratch { candidates, delays, .. } = &self.scratch;
        candidates.iter().map(|there| delays.ms[usize::from(there.site)])
    }

    pub(super) fn add_standby(&mut self, standby: &mut Standby, index: u32, group: &Group, stand: Stand) {
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
pub(super) struct Lawful<'a> {
    pub(super) effect: &'a Effect,
    pub(super) within: SiteSet,
}

impl Lawful<'_> {
    pub(super) fn allows(&self, group: &GroupId, site: SiteId) -> bool {
        self.within.contains(site) && self.effect.allows(group, site)
    }
}

/// What rules say, once for all groups that the same rules cover.
pub(in crate::core) struct Classes<'a> {
    rules: Rules<'a>,
    covering: Vec<u16>,
    known: BTreeMap<Vec<u16>, Effect>,
}

impl<'a> Classes<'a> {
    pub(in crate::core) fn new(policy: &'a Policy) -> Self {
        Self { rules: Rules::new(policy), covering: Vec::new(), known: BTreeMap::new() }
    }

    pub(in crate::core) fn effect(&mut self, group: &GroupId) -> &Effect {
        self.rules.covering(group, &mut self.covering);
        if !self.known.contains_key(&self.covering) {
            self.known.insert(self.covering.clone(), self.rules.effect(&self.covering));
        }
        &self.known[&self.covering]
    }
}

/// What a group takes of each resource.
pub(in crate::core) fn wants(demand: &Demand) -> PerResource<f64> {
    let mut wants = [0.0; RESOURCES];
    wants[Resource::Packets as usize] = demand.packets_per_s;
    wants[Resource::Flows as usize] = demand.flows as f64;
    wants[Resource::Bits as usize] = demand.bits_per_s;
    wants
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
