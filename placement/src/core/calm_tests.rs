//! Steady traffic moves nobody: reports twice a second with the noise of packets, a limit that binds, sites that are equally far.

use std::collections::{BTreeMap, BTreeSet};

use flow::sample::Seeded;
use flow::{Epoch, Micros, SiteId};

use super::brain_tests::{cluster, group_id, load, rule, site};
use super::replay::{Replay, Step};
use super::report::PeerRtt;
use super::*;

const HALF: u64 = 500_000;
const GROUPS: u8 = 24;
/// Amsterdam, Virginia, Singapore.
const PLACES: [(f64, f64); 3] = [(52.37, 4.90), (39.04, -77.49), (1.35, 103.82)];

/// Three sites with eight groups each, whose servers are everywhere.
struct World {
    replay: Replay,
    random: Seeded,
    /// Packets per second of each group on the mean.
    rates: Vec<f64>,
    /// Round trips between sites; by how much those of each report vary, and by how much ways wander.
    rtt_ms: [[f64; 3]; 3],
    sway: f64,
    wander: f64,
    wandered: [[f64; 3]; 3],
    at: u64,
}

impl World {
    fn new(seed: u64, rules: Vec<Rule>) -> Self {
        let mut cluster = cluster();
        cluster.policy = Policy { min_dwell_s: 4, moves_in_flight_max: 8, rules, ..cluster.policy };
        let place = |(id, (latitude, longitude)): (u8, (f64, f64))| Site {
            latitude: Some(latitude),
            capacity_pps: 50_000,
            ..site(id, longitude)
        };
        cluster.sites = (0..).zip(PLACES).map(|at| (SiteId(at.0), place(at))).collect();
        let group = |n: u8| {
            let (id, owner) = (group_id(n), SiteId(n / 8));
            (id, Group { id, owner, epoch: Epoch(1), move_id: None, changed: 1, standby: None })
        };
        cluster.groups = (0..GROUPS).map(group).collect();
        let mut random = Seeded::new(seed);
        let rates = (0..GROUPS).map(|_| 500.0 + 400.0 * random.fraction()).collect();
        let rtt_ms = [[0.0, 80.0, 160.0], [80.0, 0.0, 215.0], [160.0, 215.0, 0.0]];
        let (sway, wander, wandered) = (0.01, 0.0, [[0.0; 3]; 3]);
        Self { replay: Replay::new(cluster, None), random, rates, rtt_ms, sway, wander, wandered, at: 0 }
    }

    /// A count of so many on the mean, of things that come at random.
    fn count(&mut self, mean: f64) -> f64 {
        let normal = (0..12).map(|_| self.random.fraction()).sum::<f64>() - 6.0;
        (mean + normal * mean.sqrt()).max(0.0).round()
    }

    fn reports(&mut self) -> Vec<SiteReport> {
        let mut reports: BTreeMap<SiteId, SiteReport> =
            (0..3).map(|id| (SiteId(id), SiteReport { site: SiteId(id), ..SiteReport::default() })).collect();
        for n in 0..GROUPS {
            // Half of the packets are answers; clients are bursty beyond chance.
            let mean = self.rates[usize::from(n)] * (0.9 + 0.2 * self.random.fraction()) / 2.0;
            let packets = self.count(mean);
            let servers: Vec<(SiteId, u64)> =
                (0..3).map(|id| (SiteId(id), self.count(packets / 6.0) as u64)).collect();
            let seen = GroupReport { outside_ingress: servers, ..load(n, 2 * packets as u64, n / 8) };
            let owner = self.replay.cluster().groups[&group_id(n)].owner;
            reports.get_mut(&owner).unwrap().groups.push(seen);
        }
        for (from, report) in (0..).zip(reports.values_mut()) {
            for to in (0..3).filter(|to| *to != from) {
                let way = &mut self.wandered[from.min(to)][from.max(to)];
                let step = self.wander * (self.random.fraction() - 0.5);
                *way = (*way + step).clamp(-self.wander, self.wander);
                let ms = self.rtt_ms[from][to] * (1.0 + *way + self.sway * self.random.fraction());
                report.peers.push(PeerRtt { site: SiteId(to as u8), rtt_us: (ms * 1e3) as u32 });
            }
        }
        reports.into_values().collect()
    }

    fn step(&mut self) -> Step {
        let reports = self.reports();
        let at = self.at;
        self.at += HALF;
        self.replay.step(Micros(at), &reports, &BTreeSet::new()).unwrap()
    }

    /// Moves of so many seconds, and those in vain.
    fn run(&mut self, seconds: u64) -> (usize, usize) {
        let steps: Vec<Step> = (0..seconds * 2).map(|_| self.step()).collect();
        (steps.iter().map(|step| step.moves).sum(), steps.iter().map(|step| step.returns).sum())
    }
}

fn full(site: u8) -> Kind {
    Kind::Deny(BTreeSet::from([SiteId(site)]))
}

fn limited() -> Rule {
    let (packets_per_s, headroom) = (Some(5_000), Some(0.1));
    let capacity = Capacity { site: SiteId(2), packets_per_s, flows: None, bits_per_s: None, headroom };
    rule("limit", None, Kind::Capacity(capacity))
}

#[test]
fn steady_traffic_at_a_limit_moves_few_and_none_in_vain() {
    let mut all = (0, 0);
    for seed in 1..=6 {
        let mut world = World::new(seed, vec![limited()]);
        // Two to four have to leave.
        let (moves, vain) = world.run(660);
        assert!(moves > 0 && moves <= 6 && vain <= 1, "seed {seed}: {moves} moves, {vain} in vain");
        let last = world.step();
        assert!(last.beyond.is_empty() && last.delay_ms < 1.03 * last.bound_ms, "seed {seed}: {last:?}");
        all = (all.0 + moves, all.1 + vain);
    }
    assert!(all.1 * 6 <= all.0, "{all:?}");
}

#[test]
fn steady_traffic_that_is_spread_moves_few() {
    for seed in 1..=6 {
        let spread = Kind::Spread(Spread { share: 0.4, by: Place::default() });
        let mut world = World::new(seed, vec![rule("spread", None, spread)]);
        let (moves, vain) = world.run(660);
        assert!(moves <= 6 && vain == 0, "seed {seed}: {moves} moves, {vain} in vain");
    }
}

#[test]
fn sites_that_are_equally_far_keep_what_they_have() {
    for seed in 1..=6 {
        let mut world = World::new(seed, vec![rule("full", None, full(2))]);
        world.rtt_ms = [[0.0, 30.0, 100.0], [30.0, 0.0, 100.0], [100.0, 100.0, 0.0]];
        (world.sway, world.wander) = (0.1, 0.1);
        // All of the site that is denied leave it.
        let (moves, vain) = world.run(1_800);
        assert!((8..=16).contains(&moves) && vain == 0, "seed {seed}: {moves} moves, {vain} in vain");
    }
}

/// Two sites that are best in turn, four minutes each: whatever moves a group, it does so less and less.
#[test]
fn a_group_that_returns_again_and_again_rests_longer_each_time() {
    let mut world = World::new(1, vec![rule("full", None, full(2))]);
    let (mut moves, mut at) = (Vec::new(), 0);
    for _ in 0..90 {
        at += 1;
        let (near, far) = (40.0, 140.0);
        let (a, b) = if at % 2 == 0 { (near, far) } else { (far, near) };
        world.rtt_ms = [[0.0, 30.0, a], [30.0, 0.0, b], [a, b, 0.0]];
        let four_minutes: usize = (0..480).map(|_| world.step().moves).sum();
        moves.push(four_minutes);
    }
    let hours: Vec<usize> = moves.chunks(15).map(|hour| hour.iter().sum()).collect();
    // In the end each of the groups moves once in an hour.
    assert!(hours[0] > 3 * 16, "{hours:?}");
    assert!(hours[2..].iter().all(|hour| *hour <= 16), "{hours:?}");
}
