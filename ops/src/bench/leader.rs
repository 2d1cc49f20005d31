//! Rounds of the leader, with what stands around the solver: delays of groups at all sites from reports, what differs since the
//! last round, which moves to start.

use std::collections::BTreeMap;

use flow::sample::Seeded;
use flow::{Epoch, GroupId, Micros, Prefix, ServiceId, SiteId};
use placement::core::leader::{Brain, BrainTimings};
use placement::core::{
    Admin, Cluster, Command, Group, GroupReport, GroupTalk, PeerRtt, Round, ServerRtt, Site, SiteReport,
};
use placement::solver::generate::between;
use serde::Serialize;

use super::placement::timed;

/// Server prefixes that groups talk to, and of these each group.
const SERVERS: u32 = 4_000;
const TALKS: u32 = 4;
/// Groups of one report.
const REPORT: usize = 10_000;

/// One kind of round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Line {
    pub(super) groups: u32,
    /// `reports` (all sites tell of all groups once), `all`, `1 % changed`, `nothing changed`.
    pub(super) what: &'static str,
    /// Processor time, median of the runs.
    pub(super) seconds: f64,
    /// Groups whose place was looked for anew.
    pub(super) touched: Option<u64>,
    /// Groups that should be elsewhere.
    pub(super) moves: Option<u64>,
}

/// Medians of the runs; nothing when there are more groups than a cluster can have of one service.
pub(super) fn measure(groups: u32, sites: u16, fill: f64, seed: u64, runs: u8) -> Vec<Line> {
    let mut bench = Bench::new(groups, sites.min(u16::from(u8::MAX)) as u8, fill, seed);
    let mut lines: Vec<Vec<Line>> = Vec::new();
    for _ in 0..runs {
        lines.push(bench.once());
    }
    let median = |line: usize| {
        let mut seconds: Vec<f64> = lines.iter().map(|run| run[line].seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let last = lines.last().into_iter().flatten().enumerate();
    last.map(|(n, line)| Line { seconds: median(n), ..line.clone() }).collect()
}

struct Bench {
    cluster: Cluster,
    brain: Brain,
    loads: Vec<GroupReport>,
    random: Seeded,
    now: Micros,
    last: Option<Round>,
}

impl Bench {
    fn new(groups: u32, sites: u8, fill: f64, seed: u64) -> Self {
        let mut random = Seeded::new(seed);
        let ids = (0..groups).filter_map(group_id);
        let loads: Vec<GroupReport> = ids.map(|id| load(id, sites, &mut random)).collect();
        let mut cluster = Cluster { groups: loads.iter().map(owned).collect(), ..Cluster::default() };
        let mut carried = BTreeMap::new();
        for load in &loads {
            *carried.entry(load.inside_ingress[0].0).or_insert(0) += load.packets_per_s;
        }
        cluster.policy.headroom = 0.0;
        cluster.sites = (0..sites)
            .map(|n| {
                let carries = carried.get(&SiteId(n)).copied().unwrap_or(0) as f64;
                (SiteId(n), site(n, sites, (carries / fill) as u64))
            })
            .collect();
        let brain = Brain::new(BrainTimings::default(), None, Micros(0));
        let mut bench = Self { cluster, brain, loads, random, now: Micros(0), last: None };
        bench.introduce(sites);
        bench
    }

    /// What is told once: ways between sites, servers, and who talks to whom.
    fn introduce(&mut self, sites: u8) {
        let server = |n: u32| Prefix::new(std::net::Ipv4Addr::from(0xcb00_0000 + (n << 8)).into(), 24).ok();
        let home = |n: u32| SiteId((n % u32::from(sites)) as u8);
        for n in 0..sites {
            let peers = (0..sites).filter(|other| *other != n);
            let peers = peers.map(|other| PeerRtt {
                site: SiteId(other),
                rtt_us: 2_000 * u32::from(other.abs_diff(n)) + 500,
            });
            let seen = |number: u32| {
                let (min_us, ingress) = (20_000 + 37 * (number % 500), Some(home(number)));
                Some(ServerRtt {
                    prefix: server(number)?,
                    ingress,
                    count: 9,
                    min_us,
                    mean_us: min_us,
                    answered: None,
                })
            };
            let servers = (0..SERVERS).filter(|number| home(*number) == SiteId(n)).filter_map(seen).collect();
            let report =
                SiteReport { site: SiteId(n), peers: peers.collect(), servers, ..SiteReport::default() };
            self.brain.handle_report(&report, self.now);
        }
        self.tell_all();
        let talks = self.loads.iter().zip(0_u32..).map(|(load, n)| {
            // Near where the clients are.
            let at = u32::from(load.inside_ingress[0].0.0);
            let picks = (0..TALKS)
                .map(|k| at + u32::from(sites) * ((n + k * 7) % (SERVERS / u32::from(sites)).max(1)));
            GroupTalk {
                group: load.group,
                servers: picks.filter_map(|pick| Some((server(pick)?, 5))).collect(),
            }
        });
        let talks: Vec<GroupTalk> = talks.collect();
        for some in talks.chunks(REPORT) {
            self.brain.handle_report(&SiteReport { talks: some.to_vec(), ..SiteReport::default() }, self.now);
        }
    }

    fn tell_all(&mut self) {
        for some in self.loads.chunks(REPORT) {
            let report = SiteReport { groups: some.to_vec(), ..SiteReport::default() };
            self.brain.handle_report(&report, self.now);
        }
        for &site in self.cluster.sites.keys() {
            self.brain.handle_report(&SiteReport { site, ..SiteReport::default() }, self.now);
        }
    }

    fn once(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        // The next round over all is due.
        self.now = self.now.plus(Micros::from_secs(10));
        let (seconds, ()) = timed(|| self.tell_all());
        lines.push(self.line("reports", seconds, None));
        // Its prices are where the next one over all begins. With another delay that one has something to tell.
        self.cluster.round = self.last.clone().map(|round| Round { delay_ms: f64::MAX, ..round });
        lines.push(self.round("all"));
        for _ in 0..self.loads.len().div_ceil(100) {
            let at = self.random.below(self.loads.len() as u64) as usize;
            let by = between(&mut self.random, 0.5, 1.5);
            let load = &mut self.loads[at];
            load.packets_per_s = ((load.packets_per_s as f64 * by) as u64).max(1);
        }
        // For as long as it takes until that is no burst.
        for _ in 0..6 {
            self.now = self.now.plus(Micros(500_000));
            self.tell_all();
        }
        lines.push(self.round("1 % changed"));
        lines.push(self.round("nothing changed"));
        lines
    }

    /// A second later.
    fn round(&mut self, what: &'static str) -> Line {
        self.now = self.now.plus(Micros::from_secs(1));
        let (seconds, commands) = timed(|| self.brain.poll(&self.cluster, self.now));
        let published = commands
            .into_iter()
            .find_map(|command| if let Command::Publish(round) = command { Some(*round) } else { None });
        let line = self.line(what, seconds, published.as_ref());
        self.last = published.or_else(|| self.last.take());
        // A round that tells nothing new beside the last is not published.
        self.cluster.round = None;
        line
    }

    fn line(&self, what: &'static str, seconds: f64, round: Option<&Round>) -> Line {
        Line {
            groups: self.loads.len() as u32,
            what,
            seconds,
            touched: round.map(|round| round.touched),
            moves: round.map(|round| round.moves),
        }
    }
}

fn group_id(n: u32) -> Option<GroupId> {
    let prefix = Prefix::new(std::net::Ipv4Addr::from(0x0a00_0000 + (n << 4)).into(), 28).ok()?;
    Some(GroupId { service: ServiceId::new(1).ok()?, prefix })
}

/// Most of a group comes in at one site, where it also goes out.
fn load(group: GroupId, sites: u8, random: &mut Seeded) -> GroupReport {
    let home = random.below(sites.into()) as u8;
    // Pareto, as the networks of the solver's bench; some thousands of subscribers each.
    let packets_per_s = (500.0 * (1.0 - random.fraction()).powf(-1.0 / 1.5)).min(100_000.0) as u64;
    GroupReport {
        group,
        packets_per_s,
        flows: packets_per_s / 5,
        bits_per_s: packets_per_s * 6_000,
        inside_ingress: vec![(SiteId(home), 9), (SiteId((home + 1) % sites), 1)],
        outside_ingress: vec![(SiteId(home), 1)],
        remote_rtt_us: None,
    }
}

fn owned(load: &GroupReport) -> (GroupId, Group) {
    let (id, owner) = (load.group, load.inside_ingress[0].0);
    (id, Group { id, owner, epoch: Epoch(1), move_id: None, changed: 1, standby: None })
}

fn site(n: u8, sites: u8, capacity_pps: u64) -> Site {
    Site {
        id: SiteId(n),
        name: format!("site-{n}"),
        latitude: Some(0.0),
        longitude: Some(f64::from(n) * 300.0 / f64::from(sites) - 150.0),
        endpoint: "[::1]:1".into(),
        capacity_pps,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
        admin: Admin::Active,
        alive: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_few_groups_touches_few() {
        let lines = measure(3_000, 20, 0.8, 1, 2);
        let what: Vec<_> = lines.iter().map(|line| (line.what, line.groups)).collect();
        let all = ["reports", "all", "1 % changed", "nothing changed"];
        assert_eq!(what, all.map(|what| (what, 3_000)));
        assert_eq!(lines[1].touched, Some(3_000));
        // Groups that weigh little do not count, however they change.
        assert!(lines[2].touched.is_some_and(|touched| touched > 0 && touched <= 30), "{lines:?}");
        assert_eq!(lines[3].touched, Some(0));
    }
}
