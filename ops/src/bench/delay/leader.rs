//! What a leader makes of a place: reports go into it, the probes that it asks for are answered, and its rows of delays are read.
//!
//! Each place is a server prefix that one group of clients talks to. Its first handshakes are seen by the site where packets of the group come
//! in: the nearest by the map, or any where the map has nothing. Further measurements are those that the leader asks sites for, where it wants
//! them, until there are as many as there may be: of each place that many on the mean.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use flow::{Epoch, GroupId, Micros, Prefix, ServiceId, SiteId};
use placement::core::delay::{Locate, Part, Place, Source};
use placement::core::leader::{Brain, BrainTimings};
use placement::core::{Admin, Cluster, Group, GroupReport, GroupTalk, PeerRtt, ServerRtt, Site, SiteReport};
use placement::likeness::{Estimate, OFFSET_MS};

use super::{Draw, MAP_RADIUS_KM};

/// Rounds of a leader, one a second, until it has to be done.
const ROUNDS: u64 = 500;
/// No fewer than these: the leader waits for reports first.
const SETTLED: u64 = 5;
/// After so many rounds all is told again that goes on.
const TELL_AGAIN: u64 = 20;
/// Probes per second that each site is willing to send.
const PROBES_PER_S: u16 = 100;
/// What a site of low load may carry.
const CAPACITY_PPS: u64 = 10_000_000;

/// Where the places are by the map.
struct Map(BTreeMap<Prefix, (f64, f64)>);

impl Locate for Map {
    fn locate(&self, prefix: &Prefix) -> Option<(f64, f64)> {
        self.0.get(prefix).copied()
    }

    fn place(&self, prefix: &Prefix) -> Place {
        Place { at: self.locate(prefix), radius_km: MAP_RADIUS_KM, network: None }
    }
}

/// A place, as the leader gets to know it.
struct Known {
    place: usize,
    group: GroupId,
    server: Prefix,
    truth: Vec<f32>,
    first: usize,
    measured: Vec<usize>,
}

impl Known {
    fn seen_by(&self, site: usize) -> ServerRtt {
        let us = (self.truth[site] * 1_000.0) as u32;
        let answered = Some(SocketAddr::new(self.server.address(), 443));
        ServerRtt { prefix: self.server, ingress: None, count: 9, min_us: us, mean_us: us, answered }
    }
}

/// What is thought of each place in the end, from all sites.
pub(super) fn estimates(draw: &Draw<'_>, places: &[usize], firsts: &[usize]) -> Vec<(usize, Vec<Estimate>)> {
    let mut known: Vec<Known> = (0_u32..)
        .zip(places.iter().zip(firsts))
        .filter_map(|(n, (&place, &first))| {
            let truth = draw.truth(place);
            Some(Known { place, group: group(n)?, server: server(n)?, truth, first, measured: vec![first] })
        })
        .collect();
    let at = known.iter().filter_map(|known| Some((known.server, draw.spot(known.place)?.at))).collect();
    let mut brain = Brain::new(BrainTimings::default(), Some(Arc::new(Map(at))), Micros(0));
    let cluster = cluster(draw, &known);
    let mut now = Micros(0);
    let mut due: Vec<VecDeque<ServerRtt>> = vec![VecDeque::new(); draw.chosen.len()];
    let mut left = known.len() * (usize::from(draw.probes) - 1);
    for round in 0..ROUNDS {
        now = now.plus(Micros::from_secs(1));
        if left == 0 && round > SETTLED && due.iter().all(VecDeque::is_empty) {
            break;
        }
        for (site, due) in due.iter_mut().enumerate() {
            let mut report = report(draw, &known, site, round % TELL_AGAIN == 0);
            report.servers.extend(due.drain(..));
            brain.handle_report(&report, now);
            for probe in brain.probes(&report, now) {
                let Some(known) = known.iter_mut().find(|known| known.server == probe.prefix) else {
                    continue;
                };
                if left > 0 && !known.measured.contains(&site) {
                    left -= 1;
                    known.measured.push(site);
                    due.push_back(ServerRtt { ingress: None, ..known.seen_by(site) });
                }
            }
        }
        brain.poll(&cluster, now);
    }
    let thought = known.iter().filter_map(|known| Some((known.place, of(&brain, &cluster, known, now)?)));
    thought.collect()
}

/// What the leader would choose by: the way to the server, and what a site has to promise that is less surely known.
fn of(brain: &Brain, cluster: &Cluster, known: &Known, now: Micros) -> Option<Vec<Estimate>> {
    let mut estimates = Vec::new();
    let explanation = brain.explain(cluster, &known.group, now)?;
    for site in cluster.sites.keys() {
        let candidate = explanation.candidates.iter().find(|candidate| candidate.site == *site)?;
        let leg = candidate.terms.parts.iter().find(|term| term.part == Part::Server)?.leg;
        let (ms, sd_ms) = (2.0 * leg.ms as f32, 2.0 * leg.sd_ms as f32);
        let measured = matches!(leg.source, Source::Measured { .. });
        let mean_ms = ms + 4.0 * candidate.doubt_ms as f32;
        estimates.push(Estimate { ms, spread: sd_ms / (ms + OFFSET_MS), mean_ms, measured });
    }
    Some(estimates)
}

fn report(draw: &Draw<'_>, known: &[Known], site: usize, all: bool) -> SiteReport {
    let id = SiteId(site as u8);
    let mut report = SiteReport { site: id, probes_per_s: PROBES_PER_S, ..SiteReport::default() };
    if !all {
        return report;
    }
    let us = |other: usize| draw.matrix.ms(draw.chosen[site], draw.chosen[other]) * 1_000.0;
    let others = (0..draw.chosen.len()).filter(|other| *other != site && us(*other).is_finite());
    report.peers =
        others.map(|other| PeerRtt { site: SiteId(other as u8), rtt_us: us(other) as u32 }).collect();
    for known in known.iter().filter(|known| known.first == site) {
        report.servers.push(ServerRtt { ingress: Some(id), ..known.seen_by(site) });
        report.groups.push(load(known.group));
        report.talks.push(GroupTalk { group: known.group, servers: vec![(known.server, 9)] });
    }
    report
}

fn load(group: GroupId) -> GroupReport {
    GroupReport {
        group,
        packets_per_s: 1_000,
        flows: 100,
        bits_per_s: 8_000_000,
        inside_ingress: Vec::new(),
        outside_ingress: Vec::new(),
        remote_rtt_us: None,
    }
}

fn cluster(draw: &Draw<'_>, known: &[Known]) -> Cluster {
    let site = |n: usize| Site {
        id: SiteId(n as u8),
        name: format!("site-{n}"),
        latitude: draw.at[n].filter(|_| draw.map).map(|(latitude, _)| latitude),
        longitude: draw.at[n].filter(|_| draw.map).map(|(_, longitude)| longitude),
        endpoint: "[::1]:1".into(),
        capacity_pps: CAPACITY_PPS,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
        admin: Admin::Active,
        alive: true,
    };
    let group = |known: &Known| {
        let (id, owner) = (known.group, SiteId(known.first as u8));
        (id, Group { id, owner, epoch: Epoch(1), move_id: None, changed: 1, standby: None })
    };
    Cluster {
        sites: (0..draw.chosen.len()).map(|n| (SiteId(n as u8), site(n))).collect(),
        groups: known.iter().map(group).collect(),
        ..Cluster::default()
    }
}

/// None shares 16 bits with another: what is thought of one says nothing of the next.
fn server(n: u32) -> Option<Prefix> {
    Prefix::new(IpAddr::V4(Ipv4Addr::from((n + 256) << 16)), 24).ok()
}

fn group(n: u32) -> Option<GroupId> {
    let prefix = Prefix::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + (n << 8))), 24).ok()?;
    Some(GroupId { service: ServiceId::new(1).ok()?, prefix })
}
