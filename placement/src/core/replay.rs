//! A leader on traffic that was recorded or made up: what it would do over hours, and how near to the best that is.
//!
//! Each step is a time with the reports of all sites. The leader plays its rounds, its moves are done at once, and the
//! placement is put beside the bound that no placement of that step can beat: the best of hindsight, had every group been able
//! to be anywhere at any time. Pure: same steps, same answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flow::sample::Seeded;
use flow::{GroupId, Micros, SiteId};

use super::assess::{Assessment, assess};
use super::command::{Command, Proposal, Rejected};
use super::delay::Locate;
use super::leader::{Brain, BrainTimings};
use super::model::{Cluster, MoveSummary};
use super::report::{GroupReport, SiteReport};
use super::rules::capacity;
use super::stay::RETURN;
use crate::solver::{InstanceError, Resource};

/// Rounds that a leader plays within one step, at most: what moves makes room for others.
const ROUNDS_MAX: usize = 8;

/// A step, with what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// When.
    pub at: Micros,
    /// Moves that were made.
    pub moves: usize,
    /// Of these, back to where the group came from within an hour.
    pub returns: usize,
    /// Packets per second with known traffic.
    pub packets_per_s: f64,
    /// Mean delay over packets, one way, in milliseconds.
    pub delay_ms: f64,
    /// What prices of rules add to it.
    pub rules_ms: f64,
    /// No placement within the capacities has less, delay and prices together.
    pub bound_ms: f64,
    /// Sites that carry more packets than their capacity.
    pub beyond: Vec<SiteId>,
    /// Groups that no site may have.
    pub stranded: usize,
    /// What one more packet per second of capacity would save at each site, in milliseconds of one packet.
    pub prices: Vec<(SiteId, f64)>,
}

/// A leader with its cluster.
pub struct Replay {
    cluster: Cluster,
    brain: Brain,
    /// The site before the present one of groups that were moved, and when that was.
    came: BTreeMap<GroupId, (SiteId, Micros)>,
}

impl Replay {
    /// From a state; moves in hand are given up.
    #[must_use]
    pub fn new(mut cluster: Cluster, geography: Option<Arc<dyn Locate>>) -> Self {
        cluster.moves.clear();
        cluster.groups.values_mut().for_each(|group| group.move_id = None);
        let brain = Brain::new(BrainTimings::default(), geography, Micros(0));
        Self { cluster, brain, came: BTreeMap::new() }
    }

    /// The state as it is now.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// What is known of delays and loads.
    #[must_use]
    pub fn model(&self) -> &super::delay::Model {
        self.brain.model()
    }

    /// A command of an operator, such as a drain in the course of the day.
    ///
    /// # Errors
    /// As the log would refuse it.
    pub fn command(&mut self, command: Command) -> Result<(), Rejected> {
        let index = self.cluster.revision + 1;
        // Also where nothing changes, an index is used once.
        self.cluster.revision = index;
        let proposal = Proposal { actor: "replay".into(), at_ms: 0, command };
        self.cluster.apply(index, &proposal).result.map(|_| ())
    }

    /// The next step. Reports of a site that is dead are left out; sites without a report that are not dead are idle.
    ///
    /// # Errors
    /// When a number cannot be used, such as a demand that is not finite; the message names it.
    pub fn step(
        &mut self,
        at: Micros,
        reports: &[SiteReport],
        dead: &BTreeSet<SiteId>,
    ) -> Result<Step, InstanceError> {
        let known: BTreeSet<SiteId> = reports.iter().map(|report| report.site).collect();
        let idle = self.cluster.sites.keys().filter(|site| !known.contains(site));
        let idle: Vec<SiteReport> = idle.map(|&site| SiteReport { site, ..SiteReport::default() }).collect();
        for report in reports.iter().chain(&idle).filter(|report| !dead.contains(&report.site)) {
            self.brain.handle_report(report, at);
        }
        let (mut moves, mut returns) = (0, 0);
        for round in 0..ROUNDS_MAX {
            // Rounds are a second apart.
            let now = at.plus(Micros::from_secs(round as u64));
            let moved = self.round(now);
            moves += moved.len();
            returns +=
                moved.iter().filter(|(group, from, to)| self.is_return(group, *from, *to, now)).count();
            if moved.is_empty() {
                break;
            }
        }
        let found = assess(&self.cluster, self.brain.model(), at)?;
        Ok(Step { at, moves, returns, ..self.scored(found.as_ref()) })
    }

    /// One round of the leader, with all that it starts done; who went from where to where.
    fn round(&mut self, now: Micros) -> Vec<(GroupId, SiteId, SiteId)> {
        let mut moved = Vec::new();
        for command in self.brain.poll(&self.cluster, now) {
            let wanted =
                if let Command::StartMoves { moves, .. } = &command { moves.clone() } else { Vec::new() };
            if self.command(command).is_err() {
                // As in life: the next round decides anew.
                continue;
            }
            for (group, to) in wanted {
                if let Some(from) = self.finish(&group) {
                    moved.push((group, from, to));
                }
            }
        }
        moved
    }

    fn finish(&mut self, group: &GroupId) -> Option<SiteId> {
        let present = self.cluster.move_of(group)?.clone();
        self.command(Command::Switch { move_id: present.id, by: present.from }).ok()?;
        let summary = MoveSummary::default();
        self.command(Command::Served { move_id: present.id, by: present.to, summary }).ok()?;
        Some(present.from)
    }

    fn is_return(&mut self, group: &GroupId, from: SiteId, to: SiteId, now: Micros) -> bool {
        let before = self.came.insert(*group, (from, now));
        before.is_some_and(|(site, at)| site == to && now.since(at) < RETURN)
    }

    fn scored(&self, found: Option<&Assessment>) -> Step {
        let all = || found.into_iter().flat_map(|found| &found.sites);
        let over = all().filter(|found| {
            let site = self.cluster.sites.get(&found.site);
            let capacity =
                site.map(|site| capacity(&self.cluster.policy, site).0[Resource::Packets as usize]);
            capacity.is_some_and(|capacity| found.packets_per_s > capacity)
        });
        Step {
            at: Micros(0),
            moves: 0,
            returns: 0,
            packets_per_s: found.map_or(0.0, |found| found.packets_per_s),
            delay_ms: found.map_or(0.0, |found| found.delay_ms),
            rules_ms: found.map_or(0.0, |found| found.rules_ms),
            bound_ms: found.map_or(0.0, |found| found.bound_ms),
            beyond: over.map(|site| site.site).collect(),
            stranded: found.map_or(0, |found| found.stranded),
            prices: all().map(|site| (site.site, site.price_ms)).collect(),
        }
    }
}

/// What all steps came to; delays are means over all packets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Hours from the first step to the last.
    pub hours: f64,
    /// Moves made.
    pub moves: usize,
    /// Of these, in vain.
    pub returns: usize,
    /// In milliseconds, one way.
    pub delay_ms: f64,
    /// What prices of rules add to it.
    pub rules_ms: f64,
    /// The best of hindsight.
    pub bound_ms: f64,
    /// Steps in which a site carried more packets than its capacity.
    pub beyond: usize,
    /// Steps in which there was a group with traffic that no site may have.
    pub stranded: usize,
    /// Mean over steps of what one more packet per second of capacity would save, in milliseconds of one packet; the
    /// dearest first: where to build next.
    pub prices: Vec<(SiteId, f64)>,
}

/// Sums steps up.
#[must_use]
pub fn summary(steps: &[Step]) -> Summary {
    let packets: f64 = steps.iter().map(|step| step.packets_per_s).sum();
    let mean = |ms: fn(&Step) -> f64| {
        let sum: f64 = steps.iter().map(|step| ms(step) * step.packets_per_s).sum();
        if packets > 0.0 { sum / packets } else { 0.0 }
    };
    let mut prices: BTreeMap<SiteId, f64> = BTreeMap::new();
    for (site, price) in steps.iter().flat_map(|step| &step.prices) {
        *prices.entry(*site).or_insert(0.0) += price / steps.len() as f64;
    }
    let mut prices: Vec<(SiteId, f64)> = prices.into_iter().collect();
    prices.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let span = steps.first().zip(steps.last()).map_or(0, |(first, last)| last.at.since(first.at).0);
    Summary {
        hours: span as f64 / 3.6e9,
        moves: steps.iter().map(|step| step.moves).sum(),
        returns: steps.iter().map(|step| step.returns).sum(),
        delay_ms: mean(|step| step.delay_ms),
        rules_ms: mean(|step| step.rules_ms),
        bound_ms: mean(|step| step.bound_ms),
        beyond: steps.iter().filter(|step| !step.beyond.is_empty()).count(),
        stranded: steps.iter().filter(|step| step.stranded > 0).count(),
        prices,
    }
}

/// A day made of one moment: traffic that follows the sun, with noise, and clients that roam.
pub struct Day {
    base: Vec<SiteReport>,
    random: Seeded,
    /// Hour of the highest tide at each site, by its longitude.
    noon: BTreeMap<SiteId, f64>,
    /// Where clients of groups come in that went abroad.
    abroad: BTreeMap<GroupId, SiteId>,
}

/// By how much of its mean traffic rises and falls over a day.
const TIDE: f64 = 0.6;
/// Share of the groups whose clients go abroad within a day.
const ROAM: f64 = 0.05;

impl Day {
    /// From the reports of one moment, which count as the mean of the day; same seed, same day.
    #[must_use]
    pub fn new(base: Vec<SiteReport>, cluster: &Cluster, seed: u64) -> Self {
        // Traffic is highest at eight in the evening.
        let noon = |longitude: f64| 20.0 - longitude / 15.0;
        let noon = cluster.sites.values().map(|site| (site.id, noon(site.longitude.unwrap_or(0.0))));
        Self { base, random: Seeded::new(seed), noon: noon.collect(), abroad: BTreeMap::new() }
    }

    /// The reports at an hour; to be asked for one after another, `step_h` apart.
    pub fn at(&mut self, hour: f64, step_h: f64) -> Vec<SiteReport> {
        let mut reports = self.base.clone();
        let sites: Vec<SiteId> = self.noon.keys().copied().collect();
        for group in reports.iter_mut().flat_map(|report| &mut report.groups) {
            if self.random.fraction() < ROAM * step_h / 24.0 && !sites.is_empty() {
                let to = sites[self.random.below(sites.len() as u64) as usize];
                self.abroad.insert(group.group, to);
            }
            self.change(group, hour);
        }
        for report in &mut reports {
            report.packets_per_s = report.groups.iter().map(|group| group.packets_per_s).sum();
        }
        reports
    }

    fn change(&mut self, group: &mut GroupReport, hour: f64) {
        let home =
            group.inside_ingress.iter().max_by_key(|(site, count)| (*count, site.0)).map(|most| most.0);
        let noon = home.and_then(|site| self.noon.get(&site)).copied().unwrap_or(20.0);
        let tide = 1.0 + TIDE * ((hour - noon) / 24.0 * std::f64::consts::TAU).cos();
        let by = tide * (0.95 + 0.1 * self.random.fraction());
        let scaled = |value: u64| (value as f64 * by) as u64;
        group.packets_per_s = scaled(group.packets_per_s);
        group.bits_per_s = scaled(group.bits_per_s);
        group.flows = scaled(group.flows);
        if let Some(site) = self.abroad.get(&group.group) {
            group.inside_ingress = vec![(*site, 1)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::brain_tests::{cluster, load, report};
    use super::super::{Kind, Rule, Scope};
    use super::*;

    const HOUR: u64 = 3_600_000_000;

    fn day(cluster: &Cluster) -> Vec<Step> {
        let groups = (0..4).map(|n| load(n, 100, n % 3)).collect();
        let mut day = Day::new(vec![report(0, groups)], cluster, 7);
        let mut replay = Replay::new(cluster.clone(), None);
        let step = |quarter: u64| {
            let reports = day.at(quarter as f64 / 4.0, 0.25);
            replay.step(Micros(quarter * HOUR / 4), &reports, &BTreeSet::new()).unwrap()
        };
        (0..96).map(step).collect()
    }

    #[test]
    fn a_day_is_played_the_same_again_and_stays_near_its_bound() {
        let steps = day(&cluster());
        assert_eq!(steps, day(&cluster()));
        let summary = summary(&steps);
        assert!(summary.moves > 0 && summary.returns == 0, "{summary:?}");
        assert!(summary.delay_ms >= summary.bound_ms * (1.0 - 1e-6), "{summary:?}");
        assert!(summary.delay_ms < summary.bound_ms + 1.0, "{summary:?}");
        assert!((summary.hours - 23.75).abs() < 1e-9);
        let (most, least) = steps.iter().fold((0.0_f64, f64::MAX), |(most, least), step| {
            (most.max(step.packets_per_s), least.min(step.packets_per_s))
        });
        assert!(most > 1.5 * least, "{most} {least}");
    }

    #[test]
    fn another_policy_and_another_capacity_show() {
        let free = summary(&day(&cluster()));
        let mut pinned = cluster();
        let kind = Kind::Pin(SiteId(0));
        let (scope, name) = (Scope::default(), "home".to_owned());
        pinned.policy.rules = vec![Rule { name, scope, kind, price_ms: None, owner: None, until_ms: None }];
        let pinned = summary(&day(&pinned));
        assert!(pinned.moves == 0 && pinned.delay_ms > free.delay_ms + 5.0, "{pinned:?} {free:?}");
        let mut small = cluster();
        small.sites.get_mut(&SiteId(2)).unwrap().capacity_pps = 10;
        let small = summary(&day(&small));
        assert_eq!(small.prices[0].0, SiteId(2), "it is where to build next: {small:?}");
        assert!(small.prices[0].1 > 0.0);
    }

    #[test]
    fn a_dead_site_keeps_its_groups_and_gets_no_more() {
        let mut replay = Replay::new(cluster(), None);
        let groups = || vec![report(0, (0..4).map(|n| load(n, 100, 1)).collect())];
        let dead = BTreeSet::from([SiteId(1)]);
        for hour in 0..3 {
            let step = replay.step(Micros(hour * HOUR), &groups(), &dead).unwrap();
            assert_eq!(step.moves, 0, "the nearest is dead, and the second is farther than staying");
        }
        assert!(!replay.cluster().sites[&SiteId(1)].alive);
    }
}
