//! How far the present placement is from the best there could be, with a bound that proves it.
//!
//! Time grows with groups x sites, and then as `limosa bench placement` shows: ask a copy of the model, so that nobody has
//! to wait. Groups without known traffic weigh nothing and do not count, nor do those that no site may have. What moves cost
//! does not count either: this is about where groups should be, not about what to do next.
//!
//! Of many sites a group's nearest and its present one are looked at; the bound is true for all.

use flow::{GroupId, Micros, SiteId};

use super::delay::{Misplaced, Model};
use super::model::Cluster;
use super::problem::{Entry, Problem, Purpose, Stand};
use crate::solver::{Certificate, Conflict, InstanceError, PerResource, Resource, Solver, Start};

/// What the solver found, delays as means over packets in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Assessment {
    /// Groups with known traffic that some site may have.
    pub groups: usize,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Delay now. With what rules add it may be below the bound while sites carry more than their room.
    pub delay_ms: f64,
    /// What prices of rules add to it.
    pub rules_ms: f64,
    /// Delay in the best placement that was found, which is the one where delay and prices together are least.
    pub best_ms: f64,
    /// What prices of rules add to that.
    pub best_rules_ms: f64,
    /// No placement within the capacities has less, delay and prices together.
    pub bound_ms: f64,
    /// The same without capacities.
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
    /// Sites that are not where their configuration says, as what was measured between them has it.
    pub misplaced: Vec<Misplaced>,
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
    /// Its capacity less the headroom; or what it carries now, where that is more and within the capacity.
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
    let problem = Problem::new(cluster, model, Purpose::Assess, now)?;
    Ok(problem.map(|problem| answer(problem, model.misplaced(&cluster.sites, now))))
}

fn answer(mut problem: Problem, misplaced: Vec<Misplaced>) -> Assessment {
    let certificate = problem.solver.solve(Start::Cold);
    let (problem, solver) = (&problem, &problem.solver);
    // Rounding may end a little above what is there already; then that is the best that is known.
    let stays = fits_already(problem) && problem.present_cost < certificate.cost;
    let best = if stays { problem.present_cost } else { certificate.cost };
    let best_delay = if stays { problem.present } else { problem.planned() };
    let gap = (best - certificate.bound).max(0.0) / best.max(f64::MIN_POSITIVE);
    let elsewhere = |(group, entry): (usize, &Entry)| solver.site(group) != Some(entry.owner);
    let moves = problem.groups.iter().enumerate().filter(|&entry| !stays && elsewhere(entry)).count();
    let prices = solver.prices();
    let packets = Resource::Packets as usize;
    let site = |((&site, load), n): ((&SiteId, &PerResource<f64>), u8)| SiteAssessment {
        site,
        packets_per_s: load[packets],
        best_packets_per_s: if stays { load[packets] } else { solver.load(n)[packets] },
        room_packets_per_s: solver.instance().room(n)[packets],
        price_ms: prices[usize::from(n)][packets],
    };
    let groups: Vec<GroupId> = problem.groups.iter().map(|entry| entry.id).collect();
    Assessment {
        groups: groups.len(),
        packets_per_s: problem.weight,
        delay_ms: problem.mean(problem.present),
        rules_ms: problem.mean(problem.present_cost - problem.present),
        best_ms: problem.mean(best_delay),
        best_rules_ms: problem.mean(best - best_delay),
        bound_ms: problem.mean(certificate.bound),
        unconstrained_ms: problem.mean(certificate.unconstrained),
        light_ms: problem.mean(problem.light),
        gap: (stays || certificate.gap().is_finite()).then_some(gap),
        moves,
        stranded: problem.stranded.len(),
        sites: problem.sites.iter().zip(&problem.load).zip(0..=u8::MAX).map(site).collect(),
        shortages: shortages(solver, &certificate, &problem.sites, &groups),
        misplaced,
    }
}

/// Whether nobody has to leave and no site carries more than its room.
fn fits_already(problem: &Problem) -> bool {
    let within = |(n, load): (u8, &PerResource<f64>)| {
        let room = problem.instance().room(n);
        load.iter().zip(room).all(|(load, room)| *load <= room)
    };
    problem.groups.iter().all(|entry| entry.stand == Stand::Open)
        && problem.stranded.is_empty()
        && (0..=u8::MAX).zip(&problem.load).all(within)
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
