//! A day of the leader: demand that follows the sun, users who roam, sites that fail and are drained.

use std::collections::{BTreeMap, BTreeSet};

use flow::sample::Seeded;
use flow::{Epoch, Micros, SiteId};

use super::brain_tests::{cluster, group_id, load, site};
use super::replay::{Replay, Step, summary};
use super::*;

const MINUTE: u64 = 60_000_000;
const SITES: u8 = 6;
const GROUPS: u8 = 120;

struct World {
    replay: Replay,
    random: Seeded,
    /// Where the clients of each group come in, and where its servers are.
    ends: Vec<(u8, u8)>,
    dead: BTreeSet<SiteId>,
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
        Self { replay: Replay::new(cluster, None), random, ends, dead: BTreeSet::new() }
    }

    /// Packets per second of a group: high in the evening of its clients, by a noise of a tenth.
    fn demand(&mut self, group: u8, minute: u64) -> u64 {
        let hour = minute as f64 / 60.0 + f64::from(self.ends[usize::from(group)].0) * 4.0;
        let tide = 1.0 + 0.8 * ((hour - 20.0) / 24.0 * std::f64::consts::TAU).cos();
        let noise = 0.95 + 0.1 * self.random.fraction();
        (400.0 * tide * noise) as u64
    }

    fn minute(&mut self, minute: u64) -> Step {
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
            let owner = self.replay.cluster().groups[&group_id(n)].owner;
            reports.get_mut(&owner).unwrap().groups.push(seen);
        }
        let reports: Vec<SiteReport> = reports.into_values().collect();
        self.replay.step(Micros(minute * MINUTE), &reports, &self.dead).unwrap()
    }

    fn admin(&mut self, site: u8, admin: Admin) {
        self.replay.command(Command::SetAdmin { site: SiteId(site), admin }).unwrap();
    }
}

/// All minutes, and those in which, or in whose hour before, a site failed or was drained.
fn day(seed: u64) -> (Vec<Step>, BTreeSet<usize>) {
    let mut world = World::new(seed);
    let mut steps = Vec::new();
    for minute in 0..24 * 60 {
        match minute {
            600 => drop(world.dead.insert(SiteId(2))),
            660 => drop(world.dead.remove(&SiteId(2))),
            900 => world.admin(4, Admin::Draining),
            1_020 => world.admin(4, Admin::Active),
            _ => {}
        }
        steps.push(world.minute(minute));
    }
    (steps, (600..=722).chain(900..=1_082).collect())
}

#[test]
fn a_day_goes_by_without_flapping_and_near_the_best_of_hindsight() {
    for seed in 1..=3 {
        let (steps, upset) = day(seed);
        // Groups at a dead site stand still, whatever would be best.
        let calm: Vec<Step> = steps
            .iter()
            .enumerate()
            .filter(|(minute, _)| !(600..=661).contains(minute))
            .map(|(_, step)| step.clone())
            .collect();
        let (all, calm) = (summary(&steps), summary(&calm));
        let returns: usize = steps
            .iter()
            .enumerate()
            .filter(|(at, _)| !upset.contains(at))
            .map(|(_, step)| step.returns)
            .sum();
        eprintln!(
            "seed {seed}: {} moves, {returns} of them in vain, {:.3} of the best, {} minutes beyond capacity",
            all.moves,
            calm.delay_ms / calm.bound_ms,
            all.beyond
        );
        // Some 720 users roam, a site is drained and comes back, one dies. On the way between two ends one site is as good as another.
        assert!((100..1_500).contains(&all.moves), "{all:?}");
        assert!(returns * 20 <= all.moves, "{returns} {all:?}");
        assert!(calm.delay_ms < 1.1 * calm.bound_ms, "{calm:?}");
        assert!(all.beyond <= 10, "{all:?}");
    }
}
