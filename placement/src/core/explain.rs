//! Why a group is where it is: all its candidates, the terms of their delay, and what stands against each.

use std::collections::BTreeMap;

use flow::{GroupId, Micros, SiteId};
use serde::Serialize;

use super::delay::{Demand, Model, Terms};
use super::model::{Admin, Cluster, Group, Site};

/// Why a site cannot have a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// No lease.
    Dead,
    /// Cordoned by the operator.
    Cordoned,
    /// Being emptied.
    Draining,
    /// Pinned elsewhere.
    Pinned,
    /// Denied here.
    Denied,
    /// It would have more load than its capacity less the headroom.
    Full,
}

/// A site for a group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The site.
    pub site: SiteId,
    /// Sum of the terms, in milliseconds.
    pub total_ms: f64,
    /// The terms.
    pub terms: Terms,
    /// Load as a share of capacity with the group there.
    pub fill: f64,
    /// Why it cannot be chosen, if it cannot.
    pub blocked: Option<Blocked>,
}

/// Why a group is where it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The group.
    pub group: GroupId,
    /// Its owner.
    pub owner: SiteId,
    /// The best site that it could have.
    pub best: Option<SiteId>,
    /// What moving there would gain, in milliseconds.
    pub gain_ms: f64,
    /// The gain that the policy demands.
    pub min_gain_ms: f64,
    /// What is known of its traffic.
    pub demand: Option<Demand>,
    /// All sites, best first.
    pub candidates: Vec<Candidate>,
}

/// Loads of the sites, packets per second, with moves in hand counted at their target.
struct Loads(BTreeMap<SiteId, f64>);

impl Loads {
    fn of(cluster: &Cluster, model: &Model) -> Self {
        let mut loads = Self(cluster.sites.keys().map(|&id| (id, 0.0)).collect());
        for group in cluster.groups.values() {
            let site = cluster.move_of(&group.id).map_or(group.owner, |present| present.to);
            loads.add(site, model.load(&group.id));
        }
        loads
    }

    fn add(&mut self, site: SiteId, load: f64) {
        *self.0.entry(site).or_insert(0.0) += load;
    }

    fn fill(&self, site: &Site, more: f64) -> f64 {
        (self.0.get(&site.id).copied().unwrap_or(0.0) + more) / site.capacity_pps.max(1) as f64
    }
}

/// The candidates of a group with the terms of their delay, best first.
#[must_use]
pub fn explain(cluster: &Cluster, model: &Model, id: &GroupId, now: Micros) -> Option<Explanation> {
    let group = cluster.groups.get(id)?;
    let look = Look { cluster, model, now, loads: Loads::of(cluster, model) };
    let candidates = look.candidates(group);
    let at = |site: SiteId| candidates.iter().find(|candidate| candidate.site == site);
    let best = candidates.iter().find(|candidate| candidate.blocked.is_none()).map(|best| best.site);
    let gain_ms = best.and_then(|best| Some(at(group.owner)?.total_ms - at(best)?.total_ms)).unwrap_or(0.0);
    Some(Explanation {
        group: *id,
        owner: group.owner,
        best,
        gain_ms,
        min_gain_ms: cluster.policy.min_gain_ms,
        demand: model.demand(id).cloned(),
        candidates,
    })
}

struct Look<'a> {
    cluster: &'a Cluster,
    model: &'a Model,
    now: Micros,
    loads: Loads,
}

impl Look<'_> {
    fn limit(&self) -> f64 {
        1.0 - self.cluster.policy.headroom
    }

    /// All sites for a group, best first.
    fn candidates(&self, group: &Group) -> Vec<Candidate> {
        let sites = self.cluster.sites.values();
        let mut candidates: Vec<Candidate> = sites.map(|site| self.candidate(group, site)).collect();
        candidates.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms).then(a.site.cmp(&b.site)));
        candidates
    }

    fn candidate(&self, group: &Group, site: &Site) -> Candidate {
        let here = group.owner == site.id;
        let more = if here { 0.0 } else { self.model.load(&group.id) };
        let fill = self.loads.fill(site, more);
        let terms = self.model.terms(self.cluster, &group.id, site, fill, self.now);
        let blocked = self.blocked(group, site, fill, here);
        Candidate { site: site.id, total_ms: terms.total_ms(), terms, fill, blocked }
    }

    fn blocked(&self, group: &Group, site: &Site, fill: f64, here: bool) -> Option<Blocked> {
        let policy = &self.cluster.policy;
        if !site.alive {
            return Some(Blocked::Dead);
        }
        match site.admin {
            Admin::Draining => return Some(Blocked::Draining),
            Admin::Cordoned if !here => return Some(Blocked::Cordoned),
            Admin::Cordoned | Admin::Active => {}
        }
        if policy.pin(&group.id).is_some_and(|pin| pin != site.id) {
            return Some(Blocked::Pinned);
        }
        if policy.denies(&group.id, site.id) {
            return Some(Blocked::Denied);
        }
        (!here && fill > self.limit()).then_some(Blocked::Full)
    }
}
