//! How long packets of a group take when a site handles it.
//!
//! Delay of group g at site s, one way, in milliseconds: from where its clients come in to s, by share, plus
//! from s to where its servers are, plus waiting at s by its load. Sources, best first: measured round trips
//! between sites; else the great circle between their coordinates. A simple model behind the interface that a
//! fuller one keeps: nothing is borrowed from neighbours, and variance is not carried.

use std::collections::BTreeMap;
use std::sync::Arc;

use flow::{GroupId, Micros, Prefix, SiteId};
use serde::Serialize;

use super::model::{Cluster, Site};
use super::report::{REPORT_GROUPS_MAX, SiteReport};

/// Where addresses are. Unknown is `None`, never a guess.
pub trait Locate: Send + Sync {
    /// Latitude and longitude in degrees.
    fn locate(&self, prefix: &Prefix) -> Option<(f64, f64)>;
}

/// What is known of a group's traffic.
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
    /// Mean round trip to the servers, and the site that measured it.
    pub remote_rtt_us: Option<(SiteId, u32)>,
    /// When this was reported.
    pub updated: Micros,
}

/// Where a delay is known from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The same site.
    Same,
    /// Measured between the sites.
    Measured {
        /// How long ago.
        age: Micros,
    },
    /// From coordinates.
    Geography,
    /// Nothing is known; a whole world's width is assumed.
    Unknown,
}

/// A delay with its source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Leg {
    /// One way, in milliseconds.
    pub ms: f64,
    /// Where this is known from.
    pub source: Source,
}

/// The terms of a group's delay at a site, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Terms {
    /// From the clients' ingress to the site.
    pub inside_ms: f64,
    /// From the site to the outside ingress, or to the servers.
    pub outside_ms: f64,
    /// Waiting at the site.
    pub queue_ms: f64,
    /// Sources of the legs that count, by the other site; clients' ingresses first.
    pub legs: Vec<(SiteId, Leg)>,
}

impl Terms {
    /// All terms.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.inside_ms + self.outside_ms + self.queue_ms
    }
}

/// A measured round trip that nobody repeats is forgotten after so long.
const RTT_AGE_MAX: Micros = Micros(600_000_000);
/// Traffic of a group that nobody reports for so long is over: owners report all groups that have traffic or flows, several
/// times a second.
pub const DEMAND_AGE_MAX: Micros = Micros(60_000_000);
/// Weight of a new measurement against the mean so far.
const RTT_WEIGHT: f64 = 0.2;
/// Light in fibre covers some 200 km per millisecond; routes are about half as long again as the great circle.
pub(crate) const KM_PER_MS: f64 = 133.0;
/// Kilometres that light covers in a millisecond; nothing is faster.
pub const LIGHT_KM_PER_MS: f64 = 299.792_458;
/// What a pair of sites has when nothing is known: farther than any known pair, so that it is not chosen.
const UNKNOWN_MS: f64 = 150.0;
/// Service time of a packet, for waiting: small until a site is nearly full.
const SERVICE_MS: f64 = 0.01;

/// What is known of delays and loads.
#[derive(Clone)]
pub struct Model {
    geography: Option<Arc<dyn Locate>>,
    rtt_ms: BTreeMap<(SiteId, SiteId), (f64, Micros)>,
    demand: BTreeMap<GroupId, Demand>,
}

impl Model {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(geography: Option<Arc<dyn Locate>>) -> Self {
        Self { geography, rtt_ms: BTreeMap::new(), demand: BTreeMap::new() }
    }

    /// Takes loads and round trips from a report.
    pub fn handle_report(&mut self, report: &SiteReport, now: Micros) {
        for peer in report.peers.iter().filter(|peer| peer.site != report.site).take(256) {
            let ms = f64::from(peer.rtt_us) / 1000.0;
            let entry = self.rtt_ms.entry(pair(report.site, peer.site)).or_insert((ms, now));
            *entry = (entry.0 + RTT_WEIGHT * (ms - entry.0), now);
        }
        for group in report.groups.iter().take(REPORT_GROUPS_MAX) {
            self.demand.insert(
                group.group,
                Demand {
                    packets_per_s: group.packets_per_s as f64,
                    flows: group.flows,
                    bits_per_s: group.bits_per_s as f64,
                    inside: shares(&group.inside_ingress),
                    outside: shares(&group.outside_ingress),
                    remote_rtt_us: group.remote_rtt_us.map(|us| (report.site, us)),
                    updated: now,
                },
            );
        }
    }

    /// Takes all traffic times a factor.
    pub(super) fn scale(&mut self, factor: f64) {
        for demand in self.demand.values_mut() {
            demand.packets_per_s *= factor;
            demand.bits_per_s *= factor;
            demand.flows = (demand.flows as f64 * factor) as u64;
        }
    }

    /// Forgets groups that are gone, and traffic that nobody has reported for [`DEMAND_AGE_MAX`].
    pub fn forget(&mut self, cluster: &Cluster, now: Micros) {
        self.demand.retain(|group, demand| {
            cluster.groups.contains_key(group) && now.since(demand.updated) <= DEMAND_AGE_MAX
        });
    }

    /// What is known of a group's traffic.
    #[must_use]
    pub fn demand(&self, group: &GroupId) -> Option<&Demand> {
        self.demand.get(group)
    }

    /// Packets per second of a group; 0 when nothing is known.
    #[must_use]
    pub fn load(&self, group: &GroupId) -> f64 {
        self.demand.get(group).map_or(0.0, |demand| demand.packets_per_s)
    }

    /// One way between two sites.
    #[must_use]
    pub fn between(&self, a: &Site, b: &Site, now: Micros) -> Leg {
        if a.id == b.id {
            return Leg { ms: 0.0, source: Source::Same };
        }
        let measured = self.rtt_ms.get(&pair(a.id, b.id)).filter(|(_, at)| now.since(*at) <= RTT_AGE_MAX);
        if let Some((rtt_ms, at)) = measured {
            return Leg { ms: rtt_ms / 2.0, source: Source::Measured { age: now.since(*at) } };
        }
        match a.coordinates().zip(b.coordinates()) {
            Some((a, b)) => Leg { ms: great_circle_km(a, b) / KM_PER_MS, source: Source::Geography },
            None => Leg { ms: UNKNOWN_MS, source: Source::Unknown },
        }
    }

    /// The terms of a group's delay at a site whose load would be `fill` of its capacity.
    #[must_use]
    pub fn terms(&self, cluster: &Cluster, group: &GroupId, site: &Site, fill: f64, now: Micros) -> Terms {
        let mut legs = Vec::new();
        let demand = self.demand.get(group);
        let mut weighted = |shares: Option<&BTreeMap<SiteId, f64>>| {
            let known =
                shares.into_iter().flatten().filter_map(|(id, share)| Some((cluster.sites.get(id)?, share)));
            let legs_ms = known.map(|(other, share)| {
                let leg = self.between(other, site, now);
                legs.push((other.id, leg));
                leg.ms * share
            });
            legs_ms.fold(None, |sum: Option<f64>, ms| Some(sum.unwrap_or(0.0) + ms))
        };
        let inside_ms = weighted(demand.map(|demand| &demand.inside))
            .or_else(|| self.clients_to(group, site))
            .unwrap_or(0.0);
        let outside_ms = weighted(demand.map(|demand| &demand.outside)).unwrap_or(0.0);
        Terms { inside_ms, outside_ms, queue_ms: queue_ms(fill), legs }
    }

    /// Where no packet has been seen, the clients' own place stands for their ingress.
    pub(super) fn clients_to(&self, group: &GroupId, site: &Site) -> Option<f64> {
        let clients = self.geography.as_ref()?.locate(&group.prefix)?;
        Some(great_circle_km(clients, site.coordinates()?) / KM_PER_MS)
    }
}

/// Waiting by load: grows without bound towards a full site, but stays finite so that it can be compared.
fn queue_ms(fill: f64) -> f64 {
    SERVICE_MS * fill / (1.0 - fill.clamp(0.0, 0.999))
}

fn pair(a: SiteId, b: SiteId) -> (SiteId, SiteId) {
    if a < b { (a, b) } else { (b, a) }
}

fn shares(counts: &[(SiteId, u64)]) -> BTreeMap<SiteId, f64> {
    let total: f64 = counts.iter().map(|(_, count)| *count as f64).sum();
    let mut shares = BTreeMap::new();
    for (site, count) in counts.iter().filter(|(_, count)| *count > 0) {
        *shares.entry(*site).or_insert(0.0) += *count as f64 / total;
    }
    shares
}

/// Great-circle distance of two points (latitude, longitude in degrees) by the haversine formula.
#[must_use]
pub fn great_circle_km(a: (f64, f64), b: (f64, f64)) -> f64 {
    const EARTH_RADIUS_KM: f64 = 6371.0;
    let (lat_a, lat_b) = (a.0.to_radians(), b.0.to_radians());
    let half = |from: f64, to: f64| ((to - from) / 2.0).sin().powi(2);
    let lon = half(a.1.to_radians(), b.1.to_radians());
    let h = half(lat_a, lat_b) + lat_a.cos() * lat_b.cos() * lon;
    2.0 * EARTH_RADIUS_KM * h.sqrt().clamp(0.0, 1.0).asin()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn berlin_to_lisbon_is_2313_km() {
        let km = great_circle_km((52.52, 13.405), (38.7223, -9.1393));
        assert!((km - 2313.0).abs() < 5.0, "{km}");
        assert_eq!(great_circle_km((1.0, 1.0), (1.0, 1.0)), 0.0);
        assert!((great_circle_km((0.0, 0.0), (0.0, 180.0)) - 20015.0).abs() < 1.0);
    }

    #[test]
    fn waiting_grows_with_load_and_stays_finite() {
        assert!(queue_ms(0.5) < 0.1);
        assert!(queue_ms(0.99) < queue_ms(1.0));
        assert!(queue_ms(10.0).is_finite());
    }
}
