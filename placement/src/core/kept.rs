//! What a leader keeps of a round over all groups, so that the rounds after it look only at those that differ.
//!
//! All groups are compared with what they were, in one pass in order; those whose traffic is notably other, whose clients or servers
//! come in elsewhere, or that stand otherwise (they began to move, have moved, have rested) are made anew and choose again under the
//! last prices. Others go only to make room, or to room that came free; where that leaves more to be wished for than it should, prices
//! are found anew, and all choose again. Loads of sites are those of all groups as they are now.
//!
//! Delays between sites and to servers, rules and sites are those of the last round over all groups. It is due when any of the
//! latter differs, and every [`WHOLE_EVERY`].

use std::collections::{BTreeMap, BTreeSet};

use flow::{GroupId, Micros, MoveId, SiteId};

use super::delay::{DEMAND_AGE_MAX, Known, Model};
use super::model::{Cluster, Group, Site};
use super::plan::{self, Plan, Readiness};
use super::policy::Policy;
use super::problem::{Fate, Frame, Loads, Maker, Problem, Purpose, wants};
use crate::solver::{Certificate, PerResource, RESOURCES, Resource, Start};

/// A round over all groups is due after so long; where these are long it may not be yet ([`super::leader::ROUND_SHARE`]).
const WHOLE_EVERY: Micros = Micros(8_000_000);
/// Traffic that differs by a smaller share is the same; and what is less than this share of the mean group's.
const DIFFERS: f32 = 0.1;
/// Packets of a second are counted with a standard deviation of their root, if they come at random; so many of these are noise.
const NOISE: f32 = 3.0;
/// Groups that are taken to be the same may together carry so much more or less at a site, as a share of its room.
const DRIFT: f64 = 0.05;
/// Packets come in elsewhere when the share of the ingress that had most differs by more.
const SHIFTS: f32 = 0.25;
/// Where more than one group in so many differs, and more than a few, a round over all is no dearer.
const MANY: usize = 4;
const MANY_MIN: usize = 64;
/// The gap may grow by so much, as a share of the cost, before prices are found anew.
const GAP_MORE: f64 = 1e-2;

/// A problem that is solved, and what it was made of.
pub(super) struct Kept {
    problem: Problem,
    frame: Frame,
    seen: Vec<Seen>,
    policy: Policy,
    sites: BTreeMap<SiteId, Site>,
    /// When all groups were looked at.
    at: Micros,
    /// All are to be looked at again as soon as may be.
    due: bool,
    gap: f64,
    /// How many sites and places had too much.
    broken: usize,
    unprotected: u64,
}

/// A group as the last round saw it.
struct Seen {
    id: GroupId,
    owner: SiteId,
    changed: u64,
    move_id: Option<MoveId>,
    /// In the problem; [`u32::MAX`] for one that does not count.
    index: u32,
    demand: PerResource<f32>,
    /// Of packets by ingress, the largest share.
    inside: Most,
    outside: Most,
}

/// Where most packets come in, and the share of these.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Most(SiteId, f32);

impl Most {
    fn of(shares: &BTreeMap<SiteId, f64>) -> Self {
        let most = shares.iter().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(a.0)));
        most.map_or(Self(SiteId(0), 0.0), |(site, share)| Self(*site, *share as f32))
    }

    fn shifted(self, shares: &BTreeMap<SiteId, f64>) -> bool {
        let share = shares.get(&self.0).map_or(0.0, |share| *share as f32);
        (share - self.1).abs() > SHIFTS
    }
}

impl Seen {
    fn new(group: &Group, known: Option<&Known>, index: u32) -> Self {
        let most = |shares: fn(&Known) -> &BTreeMap<SiteId, f64>| {
            known.map_or(Most(SiteId(0), 0.0), |known| Most::of(shares(known)))
        };
        Self {
            id: group.id,
            owner: group.owner,
            changed: group.changed,
            move_id: group.move_id,
            index,
            demand: demand(known),
            inside: most(|known| &known.demand.inside),
            outside: most(|known| &known.demand.outside),
        }
    }

    fn stands_as(&self, group: &Group) -> bool {
        (self.owner, self.changed, self.move_id) == (group.owner, group.changed, group.move_id)
    }

    fn differs(&self, known: Option<&Known>, mean: PerResource<f32>) -> bool {
        let (before, now) = (self.demand, demand(known));
        let packets = now[Resource::Packets as usize].max(before[Resource::Packets as usize]);
        let noise = NOISE / packets.max(1.0).sqrt();
        let other = |r: usize| {
            let (off, most) = ((now[r] - before[r]).abs(), now[r].max(before[r]));
            // Flows are counted as they are, packets and bits as they come.
            let sways = if r == Resource::Flows as usize { DIFFERS } else { DIFFERS.max(noise) };
            off > sways * most && off > DIFFERS * mean[r]
        };
        (0..RESOURCES).any(other)
            || known.is_some_and(|known| {
                self.inside.shifted(&known.demand.inside) || self.outside.shifted(&known.demand.outside)
            })
    }

    fn index(&self) -> Option<usize> {
        (self.index != u32::MAX).then_some(self.index as usize)
    }
}

/// Whether anybody has told of a group's traffic lately; what nobody tells of is forgotten when all groups are looked at.
fn is_told(known: &Known, now: Micros) -> bool {
    now.since(known.demand.updated) <= DEMAND_AGE_MAX
}

/// What a group takes of each resource; nothing without packets.
fn demand(known: Option<&Known>) -> PerResource<f32> {
    let demand = known.map(|known| &known.demand).filter(|demand| demand.packets_per_s > 0.0);
    demand.map_or([0.0; RESOURCES], |demand| wants(demand).map(|want| want as f32))
}

/// What differs from what was kept.
pub(super) struct Differences {
    /// Positions of the groups.
    groups: Vec<usize>,
    /// What sites carry now.
    load: Vec<PerResource<f64>>,
    /// Small differences of other groups come to much at some site.
    drifted: bool,
}

impl Kept {
    /// Of a round over all groups.
    pub(super) fn new(
        cluster: &Cluster,
        model: &Model,
        (problem, frame): (Problem, Frame),
        (certificate, unprotected): (&Certificate, u64),
        now: Micros,
    ) -> Self {
        let mut index = (0..).zip(&problem.groups).peekable();
        let seen = model.beside(cluster).map(|(group, known)| {
            let index = index.next_if(|(_, entry)| entry.id == group.id).map_or(u32::MAX, |(index, _)| index);
            Seen::new(group, known, index)
        });
        Self {
            seen: seen.collect(),
            problem,
            frame,
            policy: cluster.policy.clone(),
            sites: cluster.sites.clone(),
            at: now,
            due: false,
            gap: certificate.gap(),
            broken: broken(certificate),
            unprotected,
        }
    }

    /// Whether it is time for a round over all groups.
    pub(super) fn is_due(&self, now: Micros) -> bool {
        self.due || now.since(self.at) >= WHOLE_EVERY
    }

    /// Whether sites and rules are the same as then.
    pub(super) fn holds(&self, cluster: &Cluster) -> bool {
        self.seen.len() == cluster.groups.len()
            && self.sites == cluster.sites
            && self.policy == cluster.policy
    }

    /// Groups that differ, those named among them; `None` where there are other groups than before.
    pub(super) fn differences(
        &self,
        cluster: &Cluster,
        model: &Model,
        named: &BTreeSet<GroupId>,
        now: Micros,
    ) -> Option<Differences> {
        let index = self.frame.index();
        let (mut loads, mut drift) = (Loads::new(self.sites.len()), Loads::new(self.sites.len()));
        let mean = self.mean();
        let mut groups = Vec::new();
        for (position, (seen, (group, known))) in self.seen.iter().zip(model.beside(cluster)).enumerate() {
            if seen.id != group.id {
                return None;
            }
            let known = known.filter(|known| is_told(known, now));
            let target = group.move_id.and_then(|id| Some(cluster.moves.get(&id)?.to));
            let site = target.unwrap_or(group.owner);
            if let Some(known) = known {
                loads.add(index, wants(&known.demand), site);
            }
            if !seen.stands_as(group) || seen.differs(known, mean) {
                groups.push(position);
            } else {
                let (now, before) = (demand(known), seen.demand);
                drift.add(index, std::array::from_fn(|r| f64::from(now[r] - before[r])), site);
            }
        }
        let at = |id: &GroupId| self.seen.binary_search_by(|seen| seen.id.cmp(id)).ok();
        groups.extend(named.iter().filter_map(at));
        groups.sort_unstable();
        groups.dedup();
        let drifted = self.is_drift(&drift.0);
        Some(Differences { groups, load: loads.0, drifted })
    }

    /// Whether what sites carry more or less, by groups that are taken to be the same, is much beside their rooms.
    fn is_drift(&self, drift: &[PerResource<f64>]) -> bool {
        (0..=u8::MAX).zip(drift).any(|(site, drift)| {
            let room = self.problem.instance().room(site);
            (0..RESOURCES).any(|r| drift[r].abs() > DRIFT * room[r])
        })
    }

    /// What a group takes of each resource in the mean.
    fn mean(&self) -> PerResource<f32> {
        let groups = self.problem.groups.len().max(1) as f64;
        std::array::from_fn(|r| (self.problem.load.iter().map(|load| load[r]).sum::<f64>() / groups) as f32)
    }

    /// Groups by what differs.
    pub(super) fn ids<'a>(&'a self, differences: &'a Differences) -> impl Iterator<Item = GroupId> + 'a {
        differences.groups.iter().map(|&position| self.seen[position].id)
    }

    /// A round over the groups that differ. `None` when one over all is called for and may be: where many differ, or by little but all in
    /// one way, and where room that is kept for a loss is to be found anew.
    pub(super) fn round(
        &mut self,
        (cluster, model): (&Cluster, &Model),
        differences: Differences,
        ready: &Readiness<'_>,
        may_be_whole: bool,
        now: Micros,
    ) -> Option<Plan> {
        let mut touched = differences.groups.len();
        let many = touched > MANY_MIN && touched * MANY > self.seen.len();
        if may_be_whole && (many || differences.drifted) {
            return None;
        }
        self.renew(cluster, model, &differences, ready, now);
        self.problem.set_loads(cluster, differences.load).ok()?;
        self.problem.sum_up();
        let mut certificate = self.problem.solver.solve(Start::Touched);
        // Where room is kept for a loss, only a round over all finds it anew.
        let keeps_room = self.problem.standby.wanted.contains(&true);
        if self.is_worse(&certificate) && keeps_room && may_be_whole {
            return None;
        }
        if self.is_worse(&certificate) && !keeps_room {
            // The lines are right, the prices are not any more.
            certificate = self.problem.solver.solve(Start::Warm);
            (self.gap, self.broken) = (certificate.gap(), broken(&certificate));
            touched = self.problem.groups.len();
        }
        let (commands, mut round) = plan::decide(cluster, &self.problem, &certificate, ready);
        (round.touched, round.unprotected) = (touched as u64, self.unprotected);
        let probes = plan::probes(model, &mut self.problem, now);
        Some(Plan { commands, round: Some(round), probes })
    }

    /// Whether prices are to be found anew.
    fn is_worse(&self, certificate: &Certificate) -> bool {
        certificate.gap() > self.gap + GAP_MORE || broken(certificate) > self.broken
    }

    /// Makes the groups that differ anew. What that cannot do, a round over all is due for.
    fn renew(
        &mut self,
        cluster: &Cluster,
        model: &Model,
        differences: &Differences,
        ready: &Readiness<'_>,
        now: Micros,
    ) {
        let mut maker = Maker::new(cluster, model, &self.frame, Purpose::Plan(ready), now);
        for &position in &differences.groups {
            let seen = &mut self.seen[position];
            let Some(group) = cluster.groups.get(&seen.id) else { continue };
            let known = model.known(&seen.id).filter(|known| is_told(known, now));
            let index = match self.problem.renew(&mut maker, group, known, seen.index()) {
                Ok(Fate::At(index)) => index as u32,
                Ok(Fate::Absent) => u32::MAX,
                Ok(Fate::Stranded) if self.problem.stranded.contains(&seen.id) => u32::MAX,
                Ok(Fate::Stranded) | Err(_) => {
                    self.due = true;
                    continue;
                }
            };
            if seen.index == u32::MAX && index != u32::MAX {
                self.problem.count_again(index as usize, seen.owner, &self.frame);
            }
            *seen = Seen::new(group, known, index);
        }
    }
}

/// In how many places a placement breaks rooms or limits.
fn broken(certificate: &Certificate) -> usize {
    certificate.exceeded.len() + certificate.crowded.len()
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
