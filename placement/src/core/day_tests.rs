//! A day of the leader: demand that follows the sun, users who roam, sites that fail and are drained.

use std::collections::BTreeMap;

use flow::sample::Seeded;
use flow::{Epoch, GroupId, Micros, SiteId};

use super::assess::{SiteAssessment, assess};
use super::brain_tests::{cluster, group_id, load, site};
use super::delay::Model;
use super::leader::{Brain, BrainTimings};
use super::*;

const MINUTE: u64 = 60_000_000;
const SITES: u8 = 6;
const GROUPS: u8 = 120;

/// What a day brought.
#[derive(Debug, Default)]
struct Day {
    moves: usize,
    /// Moves back to where a group came from within the hour, though no site failed or was drained meanwhile.
    returns: usize,
    /// Packets x ms as it was, and the bound that no placement of each minute can beat.
    delay: f64,
    best: f64,
    /// Minutes in which a site carried more than its capacity.
    overloaded: usize,
}

struct World {
    cluster: Cluster,
    brain: Brain,
    random: Seeded,
    /// Where the clients of each group come in, and where its servers are.
    ends: Vec<(u8, u8)>,
    dead: Option<SiteId>,
    index: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut cluster = cluster();
        cluster.policy.moves_in_flight_max = 16;
        cluster.policy.min_dwell_s = 600;
        let place = |id: u8| Site { capacity_pps: 14_000, ..site(id, f64::from(id) * 60.0 - 180.0) };
        cluster.sites = (0..SITES).map(|id| (SiteId(id), place(id))).collect();
        let mut random = Seeded::new(seed);
        let ends = (0..GROUPS).map(|n| (n % SITES, random.below(SITES.into()) as u8)).collect();
        let group = |n: u8| {
            let (id, owner) = (group_id(n), SiteId(n % SITES));
            (id, Group { id, owner, epoch: Epoch(1), move_id: None, changed: 1, standby: None })
        };
        cluster.groups = (0..GROUPS).map(group).collect();
        let brain = Brain::new(BrainTimings::default(), None, Micros(0));
        Self { cluster, brain, random, ends, dead: None, index: 10 }
    }

    /// Packets per second of a group: high in the evening of its clients, by a noise of a tenth.
    fn demand(&mut self, group: u8, minute: u64) -> u64 {
        let hour = minute as f64 / 60.0 + f64::from(self.ends[usize::from(group)].0) * 4.0;
        let tide = 1.0 + 0.8 * ((hour - 20.0) / 24.0 * std::f64::consts::TAU).cos();
        let noise = 0.95 + 0.1 * self.random.fraction();
        (400.0 * tide * noise) as u64
    }

    fn minute(&mut self, minute: u64) -> Vec<(GroupId, SiteId)> {
        let now = Micros(minute * MINUTE);
        for _ in 0..self.random.below(2) {
            // A user of a group with one of them goes abroad.
            let group = self.random.below(GROUPS.into()) as usize;
            self.ends[group].0 = self.random.below(SITES.into()) as u8;
        }
        let mut reports: BTreeMap<SiteId, SiteReport> = (0..SITES)
            .map(|id| (SiteId(id), SiteReport { site: SiteId(id), ..SiteReport::default() }))
            .collect();
        for n in 0..GROUPS {
            let packets = self.demand(n, minute);
            let (inside, outside) = self.ends[usize::from(n)];
            let seen =
                GroupReport { outside_ingress: vec![(SiteId(outside), 1)], ..load(n, packets, inside) };
            let owner = self.cluster.groups[&group_id(n)].owner;
            reports.get_mut(&owner).unwrap().groups.push(seen);
        }
        for report in reports.values().filter(|report| Some(report.site) != self.dead) {
            self.brain.handle_report(report, now);
        }
        let mut moved = Vec::new();
        for command in self.brain.poll(&self.cluster, now) {
            let started =
                if let Command::StartMoves { moves, .. } = &command { moves.clone() } else { Vec::new() };
            self.apply(command);
            for (group, to) in started {
                self.finish(group, to);
                moved.push((group, to));
            }
        }
        moved
    }

    fn apply(&mut self, command: Command) {
        self.index += 1;
        let proposal = Proposal { actor: "leader".into(), at_ms: 0, command };
        self.cluster.apply(self.index, &proposal).result.unwrap();
    }

    /// A move is done before the next minute.
    fn finish(&mut self, group: GroupId, to: SiteId) {
        let present = self.cluster.move_of(&group).unwrap().clone();
        self.apply(Command::Switch { move_id: present.id, by: present.from });
        self.apply(Command::Served { move_id: present.id, by: to, summary: MoveSummary::default() });
    }
}

fn day(seed: u64) -> Day {
    let mut world = World::new(seed);
    let mut day = Day::default();
    let mut came: BTreeMap<GroupId, (SiteId, u64)> = BTreeMap::new();
    let mut upset = 0;
    for minute in 0..24 * 60 {
        match minute {
            600 => world.dead = Some(SiteId(2)),
            660 => world.dead = None,
            900 => world.apply(Command::SetAdmin { site: SiteId(4), admin: Admin::Draining }),
            1_020 => world.apply(Command::SetAdmin { site: SiteId(4), admin: Admin::Active }),
            _ => {}
        }
        if (600..=662).contains(&minute) || (900..=1_022).contains(&minute) {
            upset = minute;
        }
        let owners: BTreeMap<GroupId, SiteId> =
            world.cluster.groups.values().map(|group| (group.id, group.owner)).collect();
        for (group, to) in world.minute(minute) {
            day.moves += 1;
            let from = owners[&group];
            let back = came.get(&group).is_some_and(|(before, at)| *before == to && minute - at < 60);
            day.returns += usize::from(back && minute > upset + 60);
            came.insert(group, (from, minute));
        }
        day.score(&world, minute);
    }
    day
}

impl Day {
    fn score(&mut self, world: &World, minute: u64) {
        let model: &Model = world.brain.model();
        let now = Micros(minute * MINUTE);
        let Some(found) = assess(&world.cluster, model, now).unwrap().filter(|found| found.gap.is_some())
        else {
            return;
        };
        // Groups at a dead site stand still in both.
        if world.dead.is_none() {
            self.delay += found.delay_ms * found.packets_per_s;
            self.best += found.bound_ms * found.packets_per_s;
        }
        let over = |site: &SiteAssessment| site.packets_per_s > 14_000.0;
        self.overloaded += usize::from(found.sites.iter().any(over));
    }
}

#[test]
fn a_day_goes_by_without_flapping_and_near_the_best_of_hindsight() {
    for seed in 1..=3 {
        let day = day(seed);
        eprintln!("seed {seed}: {day:?}, {:.3} of the best", day.delay / day.best);
        // Some 720 users roam, a site is drained and comes back, one dies. On the way between two ends one site is as good as another.
        assert!((100..1_500).contains(&day.moves), "{day:?}");
        assert!(day.returns * 20 <= day.moves, "{day:?}");
        assert!(day.delay < 1.1 * day.best, "{day:?}");
        assert!(day.overloaded <= 10, "{day:?}");
    }
}
