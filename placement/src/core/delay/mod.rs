//! How long packets of a group take when a site handles it.
//!
//! One way, in milliseconds, half of the round trip that users feel. A request goes from the clients over their ingress i to the site s
//! and on to the server; the answer comes in at the outside ingress o, where the pool is announced, and goes by s and i to the
//! client:
//!
//! ```text
//! access + (i to s) + half of ( (s to server) + (server to o) + (o to s) ) + waiting at s
//! ```
//!
//! each weighted by what workers saw: packets per ingress, handshakes per server prefix. Of a server that was never measured the place
//! of o is assumed, and the middle is then (o to s). Ways that were measured (handshakes, probes, QUIC between sites) are as measured; the
//! others of a server are what [`crate::likeness`] makes of map, measurements and places that are alike together, or, of what it does not
//! know, are borrowed from what is near; each [`Leg`] says which, how old it is, and how sure. What is not known has a wide
//! variance, which is the same at every site, so that it decides nothing.
//!
//! `window` holds what was measured of one way, `servers` that of server prefixes, `mesh` makes `rows` of delays by site of
//! them, so that a group costs a few sums of rows; `prior` knows where things are, `positions` which sites are not where their
//! configuration says; `calibration` says how often all this is right.

mod calibration;
mod mesh;
mod positions;
mod prior;
pub(super) mod probes;
mod rows;
mod servers;
mod steady;
#[cfg(test)]
mod tests;
mod thoughts;
mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use flow::{GroupId, Micros, Prefix, SiteId};
use serde::Serialize;

use super::model::{Cluster, Group, Site};
use super::report::{REPORT_GROUPS_MAX, REPORT_WAYS_MAX, SiteReport, TALK_LEN_MAX};
use crate::solver::softmin::exp;

use calibration::Calibration;
pub use calibration::{BASES, Tested};
pub(crate) use mesh::Mesh;
pub use positions::Misplaced;
pub(crate) use prior::KM_PER_MS;
pub use prior::{LIGHT_KM_PER_MS, Locate, Place, great_circle_km};
pub(crate) use rows::{Delays, Rows};
use servers::Servers;
use steady::Steady;
use thoughts::Thoughts;
use window::Window;

/// What is known of a group's traffic: means over half a minute, or of the last seconds when it has changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Demand {
    /// Packets per second.
    pub packets_per_s: f64,
    /// Flows.
    pub flows: u64,
    /// Bits per second.
    pub bits_per_s: f64,
    /// Share of the clients' packets by the site where they came in; sums to 1, or empty.
    pub inside: BTreeMap<SiteId, f64>,
    /// Share of the world's packets by the site where they came in; sums to 1, or empty.
    pub outside: BTreeMap<SiteId, f64>,
    /// Mean round trip to the servers, and the site that measured it. For people: delays are estimated by server prefix.
    pub remote_rtt_us: Option<(SiteId, u32)>,
    /// When this was reported.
    pub updated: Micros,
    /// Since when it has had traffic without being forgotten.
    pub since: Micros,
}

/// A delay and how sure it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Guess {
    /// Milliseconds.
    pub(crate) ms: f64,
    /// Its variance, in milliseconds squared.
    pub(crate) variance: f64,
}

/// What is near enough to borrow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Near {
    /// Its own way to where its packets come in, and from there on between sites.
    Ingress,
    /// Sites that have the same delays from where it was measured.
    Likeness,
    /// Prefixes that share its first 16 bits (IPv6: 32) or more.
    Prefix,
    /// Prefixes of its autonomous system.
    Network,
    /// Prefixes within 300 km.
    Distance,
}

/// Where a delay is known from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The same site.
    Same,
    /// Measured.
    Measured {
        /// How long ago.
        age: Micros,
    },
    /// Measured of something near.
    Borrowed {
        /// What.
        from: Near,
        /// How long ago.
        age: Micros,
    },
    /// From coordinates.
    Geography,
    /// A server is taken to be where its packets come in: a wide variance.
    Assumed,
    /// Nothing is known; between sites a whole world's width is assumed.
    Unknown,
}

impl Source {
    /// How old a measurement is.
    #[must_use]
    pub fn age(&self) -> Option<Micros> {
        match self {
            Self::Measured { age } | Self::Borrowed { age, .. } => Some(*age),
            Self::Same | Self::Geography | Self::Assumed | Self::Unknown => None,
        }
    }

    /// What is least sure comes last.
    fn rank(self) -> u8 {
        match self {
            Self::Same => 0,
            Self::Measured { .. } => 1,
            Self::Borrowed { .. } => 2,
            Self::Geography => 3,
            Self::Assumed => 4,
            Self::Unknown => 5,
        }
    }
}

/// A delay with its source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Leg {
    /// One way, in milliseconds.
    pub ms: f64,
    /// Standard deviation, in milliseconds.
    pub sd_ms: f64,
    /// Where this is known from.
    pub source: Source,
}

impl Leg {
    fn new(guess: Guess, source: Source) -> Self {
        Self { ms: guess.ms, sd_ms: guess.variance.sqrt(), source }
    }

    fn variance(&self) -> f64 {
        self.sd_ms * self.sd_ms
    }
}

/// Which part of a group's delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// From clients to where they come in.
    Access,
    /// From there to the site.
    Inside,
    /// From the site to the servers.
    Server,
    /// From the servers to where their packets come in, and from there to the site.
    Return,
    /// Waiting at the site.
    Queue,
}

/// One part of a group's delay at a site, over all ways by their shares.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Term {
    /// Which.
    pub part: Part,
    /// The delay. Its source is that of the least sure way which has a twentieth of the part's packets or more.
    #[serde(flatten)]
    pub leg: Leg,
}

/// The terms of a group's delay at a site, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Terms {
    /// From the clients to their ingress; the same at every site.
    pub access_ms: f64,
    /// From the clients' ingress to the site.
    pub inside_ms: f64,
    /// Half of the way from the site to the servers and back over the outside ingress.
    pub outside_ms: f64,
    /// Waiting at the site.
    pub queue_ms: f64,
    /// Standard deviation of the sum.
    pub sd_ms: f64,
    /// Each part. Server and return count half: see [`Terms::outside_ms`].
    pub parts: Vec<Term>,
    /// Sources of the legs that count, by the other site; clients' ingresses first.
    pub legs: Vec<(SiteId, Leg)>,
}

impl Terms {
    /// All terms.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.access_ms + self.inside_ms + self.outside_ms + self.queue_ms
    }
}

/// Traffic of a group that nobody reports for so long is over: owners report all groups that have traffic or flows, several
/// times a second.
pub const DEMAND_AGE_MAX: Micros = Micros(60_000_000);
/// What a pair of sites has when nothing is known: farther than any known pair, so that it is not chosen.
const UNKNOWN_MS: f64 = 150.0;
/// Its standard deviation.
const UNKNOWN_SD_MS: f64 = 75.0;
/// Service time of a packet, for waiting: small until a site is nearly full.
const SERVICE_MS: f64 = 0.01;
/// Handshakes with a server count half after so many seconds.
const TALK_FADES_S: f32 = 120.0;
/// Ingresses of a group with known access.
const ACCESS_LEN_MAX: usize = 8;
/// Access lines of neighbours: by the first bits of the group's prefix and the ingress.
const NEIGHBOURHOODS_MAX: usize = 65_536;
/// Weight of a new neighbour's access against the mean so far.
const NEIGHBOUR_WEIGHT: f64 = 0.1;
/// What neighbours have in common is not known better than by this variance of a round trip, in milliseconds squared.
const NEIGHBOUR_VARIANCE_MIN: f64 = 1.0;
/// Standard deviation of access lines that are not known, one way in milliseconds. It is the same wherever the group is.
const ACCESS_SD_MS: f64 = 20.0;

/// What is known of a group.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) demand: Demand,
    steady: Steady,
    /// Servers by number, with handshakes that count, most first.
    talk: Vec<(u32, f32)>,
    talked: Micros,
    /// Access lines by ingress: round trips in milliseconds.
    access: Vec<(SiteId, Window)>,
}

/// The access of clients that are near one another: mean and mean square of what differs, round trips in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Neighbourhood {
    ms: f64,
    variance: f64,
    last: Micros,
}

/// What is known of delays and loads.
#[derive(Clone)]
pub struct Model {
    geography: Option<Arc<dyn Locate>>,
    between: BTreeMap<(SiteId, SiteId), Window>,
    groups: BTreeMap<GroupId, Known>,
    servers: Servers,
    neighbourhoods: BTreeMap<(Prefix, SiteId), Neighbourhood>,
    /// Sites that are willing to send probes.
    probers: BTreeSet<SiteId>,
    /// When a site was asked for a server last.
    asked: BTreeMap<(SiteId, Prefix), Micros>,
    /// The sites by name, when they were looked at last.
    names: BTreeMap<SiteId, String>,
    thoughts: Thoughts,
    calibration: Calibration,
}

impl Model {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(geography: Option<Arc<dyn Locate>>) -> Self {
        Self {
            geography,
            between: BTreeMap::new(),
            groups: BTreeMap::new(),
            servers: Servers::default(),
            neighbourhoods: BTreeMap::new(),
            probers: BTreeSet::new(),
            asked: BTreeMap::new(),
            names: BTreeMap::new(),
            thoughts: Thoughts::default(),
            calibration: Calibration::default(),
        }
    }

    /// Takes loads and round trips from a report. What is beyond the bounds of a report does not count.
    pub fn handle_report(&mut self, report: &SiteReport, now: Micros) {
        if report.probes_per_s > 0 {
            self.probers.insert(report.site);
        } else {
            self.probers.remove(&report.site);
        }
        for peer in report.peers.iter().filter(|peer| peer.site != report.site).take(256) {
            let way = self.between.entry(pair(report.site, peer.site)).or_insert_with(Window::new);
            way.add(f64::from(peer.rtt_us) / 1000.0, 1, now);
        }
        for group in report.groups.iter().take(REPORT_GROUPS_MAX) {
            let since = self.groups.get(&group.group).map_or(now, |known| known.demand.since);
            let demand = Demand {
                packets_per_s: group.packets_per_s as f64,
                flows: group.flows,
                bits_per_s: group.bits_per_s as f64,
                inside: shares(&group.inside_ingress),
                outside: shares(&group.outside_ingress),
                remote_rtt_us: group.remote_rtt_us.map(|us| (report.site, us)),
                updated: now,
                since,
            };
            match self.groups.get_mut(&group.group) {
                Some(known) => known.steady.add(&mut known.demand, demand),
                None => {
                    let (steady, talk, access) = (Steady::new(&demand), Vec::new(), Vec::new());
                    self.groups.insert(group.group, Known { demand, steady, talk, talked: now, access });
                }
            }
        }
        self.take_servers(report, now);
        self.take_clients(report, now);
    }

    fn take_servers(&mut self, report: &SiteReport, now: Micros) {
        let geography = self.geography.as_deref();
        for server in report.servers.iter().take(REPORT_WAYS_MAX) {
            let (way, ms) = ((report.site, server.ingress), f64::from(server.min_us) / 1000.0);
            let is_direct = server.ingress.is_none_or(|ingress| ingress == report.site);
            if is_direct && !self.servers.is_measured(&server.prefix, report.site) {
                self.calibration.test(&server.prefix, report.site, ms / 2.0, now);
            }
            let known = self.servers.add(server.prefix, way, (ms, server.count), geography, now);
            if let Some(known) = known.filter(|_| server.answered.is_some()) {
                known.target = server.answered;
            }
        }
        for talk in report.talks.iter().take(REPORT_GROUPS_MAX) {
            let Some(known) = self.groups.get_mut(&talk.group) else { continue };
            let age_s = now.since(std::mem::replace(&mut known.talked, now)).0 as f32 / 1e6;
            let fades = exp((-age_s / TALK_FADES_S * std::f32::consts::LN_2).max(-80.0));
            known.talk.iter_mut().for_each(|(_, count)| *count *= fades);
            for (prefix, count) in talk.servers.iter().take(TALK_LEN_MAX) {
                let Some(number) = self.servers.number(prefix) else { continue };
                match known.talk.iter_mut().find(|(known, _)| *known == number) {
                    Some((_, sum)) => *sum += *count as f32,
                    None => known.talk.push((number, *count as f32)),
                }
            }
            known.talk.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            known.talk.truncate(TALK_LEN_MAX);
        }
    }

    /// Takes the ways between sites off what the owner measured: what is left is the access line.
    fn take_clients(&mut self, report: &SiteReport, now: Micros) {
        for clients in report.clients.iter().take(REPORT_WAYS_MAX) {
            let Some(between) = self.measured_ms(report.site, clients.ingress, now) else { continue };
            let Some(known) = self.groups.get_mut(&clients.group) else { continue };
            let ms = (f64::from(clients.min_us) / 1000.0 - between).max(0.0);
            let at = known.access.iter().position(|(ingress, _)| *ingress == clients.ingress);
            let at = at.unwrap_or_else(|| {
                if known.access.len() == ACCESS_LEN_MAX {
                    known.access.remove(0);
                }
                known.access.push((clients.ingress, Window::new()));
                known.access.len() - 1
            });
            known.access[at].1.add(ms, clients.count, now);
            self.teach_neighbours((neighbourhood(&clients.group.prefix), clients.ingress), ms, now);
        }
    }

    fn teach_neighbours(&mut self, at: (Prefix, SiteId), ms: f64, now: Micros) {
        if self.neighbourhoods.len() >= NEIGHBOURHOODS_MAX && !self.neighbourhoods.contains_key(&at) {
            return;
        }
        let first = Neighbourhood { ms, variance: ACCESS_SD_MS * ACCESS_SD_MS, last: now };
        let near = self.neighbourhoods.entry(at).or_insert(first);
        // What is far off counts as if it were two deviations off.
        let off = (ms - near.ms).clamp(-2.0 * near.variance.sqrt(), 2.0 * near.variance.sqrt());
        near.ms = (near.ms + NEIGHBOUR_WEIGHT * off).max(0.0);
        near.variance = (1.0 - NEIGHBOUR_WEIGHT) * near.variance + NEIGHBOUR_WEIGHT * off * off;
        near.last = now;
    }

    /// Round trip between two sites, if it is measured.
    fn measured_ms(&self, a: SiteId, b: SiteId, now: Micros) -> Option<f64> {
        if a == b {
            return Some(0.0);
        }
        self.between.get(&pair(a, b))?.guess(now).map(|(guess, _)| guess.ms)
    }

    /// A copy for what is not so: its estimates are not put beside what sites measure.
    pub(super) fn apart(&self) -> Self {
        Self { calibration: Calibration::default(), ..self.clone() }
    }

    /// Takes all traffic times a factor.
    pub(super) fn scale(&mut self, factor: f64) {
        for known in self.groups.values_mut() {
            let demand = &mut known.demand;
            demand.packets_per_s *= factor;
            demand.bits_per_s *= factor;
            demand.flows = (demand.flows as f64 * factor) as u64;
        }
    }

    /// Forgets groups that are gone, traffic that nobody has reported for [`DEMAND_AGE_MAX`], and what was measured long ago.
    pub fn forget(&mut self, cluster: &Cluster, now: Micros) {
        self.groups.retain(|group, known| {
            cluster.groups.contains_key(group) && now.since(known.demand.updated) <= DEMAND_AGE_MAX
        });
        let mut in_use = vec![false; self.servers.len()];
        for known in self.groups.values_mut() {
            known.access.retain(|(_, window)| now.since(window.last()) <= window::AGE_MAX);
            known.talk.iter().for_each(|(number, _)| in_use[*number as usize] = true);
        }
        self.servers.forget(&in_use, now);
        self.calibration.retain(|prefix| self.servers.number(prefix).is_some());
        self.between.retain(|_, window| now.since(window.last()) <= window::AGE_MAX);
        self.neighbourhoods.retain(|_, near| now.since(near.last) <= window::AGE_MAX);
        self.asked.retain(|_, at| now.since(*at) < PROBE_AGAIN);
    }

    /// Looks which sites there are, and forgets what was measured of those that are others than at the last look: a number that
    /// was given to another site, or to one after it was nobody's, says nothing of what was there before. Gives these numbers.
    pub fn note_sites(&mut self, cluster: &Cluster) -> Vec<SiteId> {
        if self.knows_sites(cluster) {
            return Vec::new();
        }
        let name = |id: &SiteId| cluster.sites.get(id).map(|site| &site.name);
        let first = self.names.is_empty();
        let all: BTreeSet<SiteId> = self.names.keys().chain(cluster.sites.keys()).copied().collect();
        let others: Vec<SiteId> =
            all.into_iter().filter(|id| !first && self.names.get(id) != name(id)).collect();
        others.iter().for_each(|site| self.forget_site(*site));
        self.names = cluster.sites.values().map(|site| (site.id, site.name.clone())).collect();
        others
    }

    /// Whether the sites are those of the last look.
    #[must_use]
    pub fn knows_sites(&self, cluster: &Cluster) -> bool {
        let same = |(id, site): (&SiteId, &Site)| self.names.get(id) == Some(&site.name);
        self.names.len() == cluster.sites.len() && cluster.sites.iter().all(same)
    }

    fn forget_site(&mut self, site: SiteId) {
        self.between.retain(|&(a, b), _| a != site && b != site);
        self.neighbourhoods.retain(|&(_, ingress), _| ingress != site);
        self.asked.retain(|&(asked, _), _| asked != site);
        self.probers.remove(&site);
        self.servers.forget_site(site);
        for known in self.groups.values_mut() {
            known.access.retain(|(ingress, _)| *ingress != site);
            let demand = &mut known.demand;
            demand.inside.remove(&site);
            demand.outside.remove(&site);
            demand.remote_rtt_us = demand.remote_rtt_us.filter(|(by, _)| *by != site);
        }
    }

    /// What is known of a group's traffic.
    #[must_use]
    pub fn demand(&self, group: &GroupId) -> Option<&Demand> {
        self.groups.get(group).map(|known| &known.demand)
    }

    pub(super) fn known(&self, group: &GroupId) -> Option<&Known> {
        self.groups.get(group)
    }

    /// All groups, in order, each with what is known of it.
    pub(super) fn beside<'a>(
        &'a self,
        cluster: &'a Cluster,
    ) -> impl Iterator<Item = (&'a Group, Option<&'a Known>)> {
        let mut known = self.groups.iter().peekable();
        cluster.groups.values().map(move |group| {
            while known.next_if(|(id, _)| **id < group.id).is_some() {}
            (group, known.next_if(|(id, _)| **id == group.id).map(|(_, known)| known))
        })
    }

    /// Packets per second of a group; 0 when nothing is known.
    #[must_use]
    pub fn load(&self, group: &GroupId) -> f64 {
        self.demand(group).map_or(0.0, |demand| demand.packets_per_s)
    }

    /// One way between two sites.
    #[must_use]
    pub fn between(&self, a: &Site, b: &Site, now: Micros) -> Leg {
        if a.id == b.id {
            return Leg { ms: 0.0, sd_ms: 0.0, source: Source::Same };
        }
        let measured = self.between.get(&pair(a.id, b.id)).and_then(|way| way.guess(now));
        let measured = measured.map(|(guess, age)| Leg::new(one_way(guess), Source::Measured { age }));
        let line = a.coordinates().zip(b.coordinates()).map(|(a, b)| prior::line(great_circle_km(a, b), 0.0));
        let line = line.map(|line| Leg::new(line, Source::Geography));
        let unknown = Leg { ms: UNKNOWN_MS, sd_ms: UNKNOWN_SD_MS, source: Source::Unknown };
        surest([measured, line].into_iter().flatten().chain([unknown]), unknown)
    }

    /// Whether anything is known of access lines of the group or of any neighbour.
    fn knows_access(&self, known: &Known) -> bool {
        !(known.access.is_empty() && self.neighbourhoods.is_empty())
    }

    /// The access line of a group at one of its ingresses, one way.
    fn access(&self, group: &GroupId, known: &Known, ingress: SiteId, now: Micros) -> Leg {
        let own = known.access.iter().find(|(at, _)| *at == ingress).and_then(|(_, way)| way.guess(now));
        let own = own.map(|(guess, age)| Leg::new(one_way(guess), Source::Measured { age }));
        if let Some(own) = own.filter(|own| own.variance() <= NEIGHBOUR_VARIANCE_MIN / 4.0) {
            return own;
        }
        let near = self.neighbourhoods.get(&(neighbourhood(&group.prefix), ingress)).map(|near| {
            let age = now.since(near.last);
            let drift = age.0 as f64 / 60e6;
            let guess =
                Guess { ms: near.ms, variance: near.variance + NEIGHBOUR_VARIANCE_MIN + drift * drift };
            Leg::new(one_way(guess), Source::Borrowed { from: Near::Prefix, age })
        });
        let unknown = Leg { ms: 0.0, sd_ms: ACCESS_SD_MS, source: Source::Unknown };
        surest([own, near].into_iter().flatten(), unknown)
    }

    /// Where no packet has been seen, the clients' own place stands for their ingress.
    fn clients_to(&self, group: &GroupId, site: &Site) -> Option<Guess> {
        let place = self.geography.as_ref()?.place(&group.prefix);
        Some(prior::line(great_circle_km(place.at?, site.coordinates()?), place.radius_km))
    }

    /// How many of the estimates of ways that nobody had measured held when they were, by [`BASES`].
    #[must_use]
    pub fn tested(&self) -> [Tested; BASES.len()] {
        self.calibration.tested()
    }

    /// Whether any site sends probes.
    pub(super) fn probes(&self) -> bool {
        !self.probers.is_empty()
    }

    /// A site was asked to measure a server prefix.
    pub(super) fn remember_asked(&mut self, site: SiteId, prefix: Prefix, now: Micros) {
        self.asked.insert((site, prefix), now);
    }

    /// What a site may ask of a server prefix; nothing when it asks nobody, has done so lately, or was asked to, answered or not: else
    /// one server that is silent would take the place of all others.
    fn target(&self, number: u32, site: SiteId, now: Micros) -> Option<(Prefix, SocketAddr)> {
        let server = self.servers.get(number).filter(|_| self.probers.contains(&site))?;
        let fresh = |seen: &servers::Seen| {
            seen.site == site && seen.over.is_none() && now.since(seen.window.last()) < PROBED_FOR
        };
        let asked = |at: &Micros| now.since(*at) < PROBE_AGAIN;
        if server.seen.iter().any(fresh) || self.asked.get(&(site, server.prefix)).is_some_and(asked) {
            return None;
        }
        Some((server.prefix, server.target?))
    }
}

/// What a site measured of a server by itself is not asked for again for so long.
const PROBED_FOR: Micros = Micros(120_000_000);
/// A site is not asked for a server again for so long, whether it answered or not.
const PROBE_AGAIN: Micros = Micros(300_000_000);

/// Of several that speak of one way, the first of the surest.
fn surest(legs: impl IntoIterator<Item = Leg>, otherwise: Leg) -> Leg {
    legs.into_iter().min_by(|a, b| a.sd_ms.total_cmp(&b.sd_ms)).unwrap_or(otherwise)
}

/// Half of a round trip.
fn one_way(round_trip: Guess) -> Guess {
    Guess { ms: round_trip.ms / 2.0, variance: round_trip.variance / 4.0 }
}

/// Waiting by load: grows without bound towards a full site, but stays finite so that it can be compared.
fn queue_ms(fill: f64) -> f64 {
    SERVICE_MS * fill / (1.0 - fill.clamp(0.0, 0.999))
}

fn pair(a: SiteId, b: SiteId) -> (SiteId, SiteId) {
    if a < b { (a, b) } else { (b, a) }
}

/// The /16 or /32 that a prefix is in, or itself if it is wider.
fn neighbourhood(prefix: &Prefix) -> Prefix {
    let len = if prefix.address().is_ipv4() { 16 } else { 32 };
    Prefix::containing(prefix.address(), prefix.len().min(len)).unwrap_or(*prefix)
}

fn shares(counts: &[(SiteId, u64)]) -> BTreeMap<SiteId, f64> {
    let total: f64 = counts.iter().map(|(_, count)| *count as f64).sum();
    let mut shares = BTreeMap::new();
    for (site, count) in counts.iter().filter(|(_, count)| *count > 0) {
        *shares.entry(*site).or_insert(0.0) += *count as f64 / total;
    }
    shares
}
