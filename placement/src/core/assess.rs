//! How far the present placement is from the best there could be, with a bound that proves it.
//!
//! Time grows with groups x sites, and then as `limosa bench placement` shows: ask a copy of the model, so that nobody has
//! to wait. Groups without known traffic weigh nothing and do not count, nor do those that no site may have. What moves cost
//! does not count either: this is about where groups should be, not about what to do next.
//!
//! Of many sites a group's nearest and its present one are looked at; the bound is true for all.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};

use super::delay::{LIGHT_KM_PER_MS, Model, great_circle_km};
use super::model::{Cluster, Site};
use super::solve::{Blocked, Candidate, Round};
use crate::solver::{
    self, CANDIDATES_MAX, Certificate, Conflict, Instance, InstanceError, Resource, Solver, Start,
};

/// An instance of the solver, and which group and site each index means.
struct Question {
    instance: Instance,
    groups: Vec<GroupId>,
    sites: Vec<SiteId>,
    /// Where groups are now.
    owners: Vec<SiteId>,
    /// Weight x ms at the owners.
    present: f64,
    /// Weight x ms that light would take from where packets come in to where they go out.
    light: f64,
    weight: f64,
    /// Packets per second of each site now.
    load: Vec<f64>,
    stranded: usize,
}

/// What the solver found, delays as means over packets in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Assessment {
    /// Groups with known traffic that some site may have.
    pub groups: usize,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Now. It may be below the bound while sites carry more than their room.
    pub delay_ms: f64,
    /// Of the best placement that was found.
    pub best_ms: f64,
    /// No placement within the capacities has less.
    pub bound_ms: f64,
    /// Without capacities.
    pub unconstrained_ms: f64,
    /// What light would take straight from where packets come in to where they go out; zero where no coordinates are known.
    pub light_ms: f64,
    /// By how much the best that was found may be above the best there is, as a share; `None` when it exceeds capacities.
    pub gap: Option<f64>,
    /// Groups that are elsewhere in the best placement.
    pub moves: usize,
    /// Groups with known traffic that no site may have.
    pub stranded: usize,
    /// By site.
    pub sites: Vec<SiteAssessment>,
    /// Proofs that demand does not fit, one per set of sites.
    pub shortages: Vec<Shortage>,
}

/// A site in an [`Assessment`].
#[derive(Clone, Debug, PartialEq)]
pub struct SiteAssessment {
    /// Which.
    pub site: SiteId,
    /// What it carries now.
    pub packets_per_s: f64,
    /// What it carries in the best placement.
    pub best_packets_per_s: f64,
    /// Its capacity less the headroom.
    pub room_packets_per_s: f64,
    /// Milliseconds of one packet that would be saved per packet of capacity added: where to build next.
    pub price_ms: f64,
}

/// Sites whose room does not suffice for the groups that can only be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The sites.
    pub sites: Vec<SiteId>,
    /// The groups.
    pub groups: Vec<GroupId>,
}

/// Assesses the present placement; `None` without sites.
///
/// # Errors
/// When a number cannot be used, such as a demand that is not finite; the message names it.
pub fn assess(cluster: &Cluster, model: &Model, now: Micros) -> Result<Option<Assessment>, InstanceError> {
    Ok(question(cluster, model, now)?.map(Question::answer))
}

fn question(cluster: &Cluster, model: &Model, now: Micros) -> Result<Option<Question>, InstanceError> {
    let sites: Vec<SiteId> = cluster.sites.keys().copied().collect();
    if sites.is_empty() {
        return Ok(None);
    }
    let headroom = cluster.policy.headroom;
    let room = |site: &Site| {
        let capacity = [site.capacity_pps as f64, f64::INFINITY, f64::INFINITY];
        solver::Site { capacity, headroom }
    };
    let instance = Instance::new(&cluster.sites.values().map(room).collect::<Vec<_>>())?;
    let index: BTreeMap<SiteId, u8> = sites.iter().zip(0..=u8::MAX).map(|(&id, n)| (id, n)).collect();
    let mut question = Question {
        instance,
        groups: Vec::new(),
        sites,
        owners: Vec::new(),
        present: 0.0,
        light: 0.0,
        weight: 0.0,
        load: vec![0.0; cluster.sites.len()],
        stranded: 0,
    };
    let round = Round::looking(cluster, model, now);
    for group in cluster.groups.values() {
        let packets = model.load(&group.id);
        if packets <= 0.0 {
            continue;
        }
        if let Some(&owner) = index.get(&group.owner) {
            question.load[usize::from(owner)] += packets;
        }
        let candidates = round.candidates(group);
        let (row, left_out_ms) = row(&candidates, group.owner, &index);
        if row.is_empty() {
            question.stranded += 1;
            continue;
        }
        question.weight += packets;
        question.light += packets * light_ms(cluster, model, &group.id);
        let here = candidates.iter().find(|candidate| candidate.site == group.owner);
        question.present += packets * here.map_or(0.0, |here| here.total_ms);
        let demand = [packets as f32, 0.0, 0.0];
        let weight = packets as f32;
        question.instance.push(&solver::Group {
            weight,
            demand,
            present: None,
            charge: 0.0,
            left_out_ms,
            candidates: &row,
        })?;
        question.groups.push(group.id);
        question.owners.push(group.owner);
    }
    Ok(Some(question))
}

/// The best sites that a group may have, its owner among them, and what the best of the others costs. Full ones too:
/// whether there is room is the solver's to say.
fn row(
    candidates: &[Candidate],
    owner: SiteId,
    index: &BTreeMap<SiteId, u8>,
) -> (Vec<solver::Candidate>, f32) {
    let open = candidates.iter().filter(|candidate| matches!(candidate.blocked, None | Some(Blocked::Full)));
    let known = open.filter_map(|candidate| Some((index.get(&candidate.site)?, candidate)));
    let mut known: Vec<(&u8, &Candidate)> = known.collect();
    if let Some(at) = known.iter().position(|(_, candidate)| candidate.site == owner)
        && at >= CANDIDATES_MAX
    {
        let present = known.remove(at);
        known.insert(CANDIDATES_MAX - 1, present);
    }
    let left_out_ms = known.get(CANDIDATES_MAX).map_or(f32::INFINITY, |(_, best)| best.total_ms as f32);
    known.truncate(CANDIDATES_MAX);
    let row = known.iter().map(|&(&site, one)| solver::Candidate { site, cost_ms: one.total_ms as f32 });
    (row.collect(), left_out_ms)
}

/// The straight way from the ingresses of a group's clients to those of its servers, by share.
fn light_ms(cluster: &Cluster, model: &Model, group: &GroupId) -> f64 {
    let Some(demand) = model.demand(group) else { return 0.0 };
    let place = |id: &SiteId| cluster.sites.get(id)?.coordinates();
    let mut sum = 0.0;
    for (from, in_share) in &demand.inside {
        for (to, out_share) in &demand.outside {
            if let Some((from, to)) = place(from).zip(place(to)) {
                sum += in_share * out_share * great_circle_km(from, to) / LIGHT_KM_PER_MS;
            }
        }
    }
    sum
}

impl Question {
    fn answer(self) -> Assessment {
        let mut solver = Solver::new(self.instance);
        let certificate = solver.solve(Start::Cold);
        let mean = |sum: f64| if self.weight > 0.0 { sum / self.weight } else { 0.0 };
        let to =
            |group: usize| solver.site(group).and_then(|site| self.sites.get(usize::from(site)).copied());
        let moves =
            self.owners.iter().enumerate().filter(|&(group, owner)| to(group) != Some(*owner)).count();
        let prices = solver.prices();
        let sites = self.sites.iter().zip(&self.load).zip(0..=u8::MAX).map(|((&site, &packets_per_s), n)| {
            SiteAssessment {
                site,
                packets_per_s,
                best_packets_per_s: solver.load(n)[Resource::Packets as usize],
                room_packets_per_s: solver.instance().room(n)[Resource::Packets as usize],
                price_ms: prices[usize::from(n)][Resource::Packets as usize],
            }
        });
        Assessment {
            groups: self.groups.len(),
            packets_per_s: self.weight,
            delay_ms: mean(self.present),
            best_ms: mean(certificate.cost),
            bound_ms: mean(certificate.bound),
            unconstrained_ms: mean(certificate.unconstrained),
            light_ms: mean(self.light),
            gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
            moves,
            stranded: self.stranded,
            sites: sites.collect(),
            shortages: shortages(&solver, &certificate, &self.sites, &self.groups),
        }
    }
}

fn shortages(
    solver: &Solver,
    certificate: &Certificate,
    sites: &[SiteId],
    groups: &[GroupId],
) -> Vec<Shortage> {
    let named = |conflict: Conflict| Shortage {
        sites: conflict.sites.iter().filter_map(|&site| sites.get(usize::from(site)).copied()).collect(),
        groups: conflict.groups.iter().filter_map(|&group| groups.get(group as usize).copied()).collect(),
    };
    let mut found: Vec<Shortage> = Vec::new();
    for (site, _, _) in &certificate.exceeded {
        if let Some(shortage) = solver.conflict(*site).map(named).filter(|shortage| !found.contains(shortage))
        {
            found.push(shortage);
        }
    }
    found
}
