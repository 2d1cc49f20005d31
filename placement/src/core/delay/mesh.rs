//! What all measurements of a moment say together: of the ways between sites, and from each site over each server prefix and
//! back.

use std::collections::BTreeMap;
use std::sync::Arc;

use flow::{GroupId, Micros, SiteId};

use super::rows::{End, Rows};
use super::servers::{Server, common_bits};
use super::thoughts::{Known, Sites};
use super::{Guess, Leg, Model, Near, Part, Source, Term, Terms, one_way, prior, queue_ms};
use crate::core::model::Cluster;
use crate::likeness::{Estimate, Likeness, Seen, Spot};

/// Standard deviation of a server's way to where its packets come in, if it was never measured, in milliseconds. It is the same at all
/// sites, so what is assumed of a server decides nothing.
const ASSUMED_SD_MS: f64 = 40.0;
/// A server at some way from its ingress may be on this side of it or on the other: standard deviation as a share of that way.
const STRETCH_SD_SHARE: f64 = 0.5;
/// Networks do not always take the way that sites take: standard deviation as a share of the way between the sites.
const ROUTE_SD_SHARE: f64 = 0.1;
/// Server prefixes of which likeness is asked; each takes some hundreds of microseconds, when what it follows from has changed.
const ALIKE_MAX: usize = 1024;
/// Of these, so many that were measured from so many sites say something of the others.
const LEARNED_MAX: usize = 128;
const LEARNED_DIRECT: usize = 3;
/// What likeness says is not surer than one measurement: its standard deviation at least, in milliseconds.
const ALIKE_SD_MS: f64 = 2.0;
/// Prefixes on either side that are looked at for a neighbour.
const NEIGHBOURS: usize = 8;
/// Prefixes that share so many bits, and by how many milliseconds their ways differ (standard deviation), the nearest first.
const NEAR_BITS_SD_MS: [(u32, f64); 3] = [(22, 3.0), (20, 5.0), (16, 8.0)];
/// The same in a network, and within 300 km.
const NETWORK_SD_MS: f64 = 10.0;
const DISTANCE_SD_MS: f64 = 12.0;
const DISTANCE_KM_MAX: f64 = 300.0;
/// Degrees of a cell in which places are looked up by distance: at least as wide as that up to 60 degrees north.
const CELL_DEGREES: f64 = 6.0;
/// Servers of a network or a cell that are looked at.
const PEERS_MAX: usize = 16;
/// A source has to have this share of a part to be named.
const NAMED_SHARE: f64 = 0.05;

/// What was measured of a server prefix.
#[derive(Default)]
struct Heard {
    /// Where its packets come in, by index.
    home: Option<u8>,
    /// One way from there, and how long ago that was measured.
    stretch: Option<(Guess, Micros)>,
    /// One way from sites.
    ways: Vec<(u8, Guess, Micros)>,
    /// Half of the way from a site over the server and its home back.
    loops: Vec<(u8, Guess, Micros)>,
    /// Ways that a site measured by itself.
    direct: usize,
}

/// A server prefix from one site.
struct Ways {
    server: Leg,
    /// Over its home.
    back: Leg,
    /// Half of both.
    outside: Guess,
}

/// Who was measured from where, who is near whom, and the rows that follow from it.
pub(crate) struct Mesh<'a> {
    rows: Rows,
    model: &'a Model,
    now: Micros,
    legs: Vec<Leg>,
    heard: Vec<Heard>,
    networks: BTreeMap<u32, Vec<u32>>,
    cells: BTreeMap<(i32, i32), Vec<u32>>,
    thoughts: Option<Arc<Known>>,
    /// Likeness is asked of server prefixes below this number.
    alike_below: u32,
}

impl std::ops::Deref for Mesh<'_> {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        &self.rows
    }
}

impl<'a> Mesh<'a> {
    /// Rows for the servers of all groups.
    pub(crate) fn all(cluster: &'a Cluster, model: &'a Model, now: Micros) -> Rows {
        let mut mesh = Self::without_rows(cluster, model, now);
        let all: Vec<u32> = model.servers.iter().map(|(number, _)| number).collect();
        all.into_iter().for_each(|number| mesh.add_row(number));
        mesh.rows
    }

    /// With rows for the servers of one group.
    pub(crate) fn of(cluster: &'a Cluster, model: &'a Model, group: &GroupId, now: Micros) -> Self {
        let mut mesh = Self::without_rows(cluster, model, now);
        let talk = model.known(group).into_iter().flat_map(|known| &known.talk);
        talk.for_each(|(number, _)| mesh.add_row(*number));
        mesh
    }

    fn without_rows(cluster: &'a Cluster, model: &'a Model, now: Micros) -> Self {
        let sites = &cluster.sites;
        let pairs = sites.values().flat_map(|a| sites.values().map(move |b| (a, b)));
        let legs: Vec<Leg> = pairs.map(|(a, b)| model.between(a, b, now)).collect();
        let mut mesh = Self {
            rows: Rows::new(sites.values().cloned().collect(), &legs, model.servers.len()),
            model,
            now,
            legs,
            heard: Vec::new(),
            networks: BTreeMap::new(),
            cells: BTreeMap::new(),
            thoughts: None,
            alike_below: 0,
        };
        mesh.hear();
        mesh
    }

    /// Gathers what was measured of servers, and who is near whom.
    fn hear(&mut self) {
        let mut heard: Vec<Heard> = Vec::new();
        heard.resize_with(self.model.servers.len(), Heard::default);
        for (number, server) in self.model.servers.iter() {
            let new = self.heard_of(server);
            if !new.ways.is_empty() {
                if let Some(network) = server.place.network {
                    push_bounded(self.networks.entry(network).or_default(), number);
                }
                if let Some(at) = server.place.at {
                    push_bounded(self.cells.entry(cell(at)).or_default(), number);
                }
            }
            heard[number as usize] = new;
        }
        self.heard = heard;
        let asked = self.model.servers.iter().filter(|(number, server)| {
            !self.heard[*number as usize].ways.is_empty() || spot_of(server).is_some()
        });
        let asked: Vec<u32> = asked.map(|(number, _)| number).take(ALIKE_MAX).collect();
        let Some(last) = asked.last() else { return };
        let row = |a: usize| self.ms_from(a).iter().map(|ms| 2.0 * ms).collect();
        let rows: Vec<Vec<f32>> = (0..self.len()).map(row).collect();
        let places: Vec<_> = self.sites.iter().map(|site| site.coordinates()).collect();
        let learn = |likeness: &mut Likeness| {
            let most = |number: &&u32| self.heard[**number as usize].direct >= LEARNED_DIRECT;
            for &number in asked.iter().filter(most).take(LEARNED_MAX) {
                let spot = self.model.servers.get(number).and_then(spot_of);
                let estimates = likeness.estimate(None, &seen_of(&self.heard[number as usize]), spot);
                likeness.learn(number.into(), &estimates, spot);
            }
        };
        let thoughts = self.model.thoughts.look(Sites { rows, places }, self.now, learn);
        (self.thoughts, self.alike_below) = (Some(thoughts), last + 1);
    }

    fn leg(&self, a: u8, b: u8) -> Leg {
        self.legs[usize::from(a) * self.len() + usize::from(b)]
    }

    fn heard_of(&self, server: &Server) -> Heard {
        let mut heard = Heard { home: server.home.and_then(|home| self.at(home)), ..Heard::default() };
        for seen in server.seen.iter().filter(|seen| seen.over.is_none()) {
            if let Some((site, (guess, age))) = self.at(seen.site).zip(seen.window.guess(self.now)) {
                heard.ways.push((site, one_way(guess), age));
            }
        }
        heard.direct = heard.ways.len();
        let Some(home) = heard.home else { return heard };
        for seen in server.seen.iter().filter(|seen| seen.over.is_some() && seen.over == server.home) {
            if let Some((site, (guess, age))) = self.at(seen.site).zip(seen.window.guess(self.now)) {
                heard.loops.push((site, one_way(guess), age));
            }
        }
        let direct =
            heard.ways.iter().find(|(site, _, _)| *site == home).map(|(_, guess, age)| (*guess, *age));
        heard.stretch = direct.or_else(|| self.stretch(home, &heard.loops));
        if let Some((stretch, age)) = heard.stretch.filter(|_| direct.is_none()) {
            heard.ways.push((home, stretch, age));
        }
        for &(site, half, age) in &heard.loops {
            let (Some((stretch, _)), false) =
                (heard.stretch, heard.ways.iter().any(|(known, _, _)| *known == site))
            else {
                continue;
            };
            // The loop less the way back over the home.
            let leg = self.leg(home, site);
            let ms = (2.0 * half.ms - leg.ms - stretch.ms).max(0.0);
            heard.ways.push((site, Guess { ms, variance: half.variance + leg.variance() }, age));
        }
        heard
    }

    /// The way from its home to a server, from loops: each is the way between the sites and this, there and back.
    fn stretch(&self, home: u8, loops: &[(u8, Guess, Micros)]) -> Option<(Guess, Micros)> {
        let (mut weights, mut sum, mut youngest) = (0.0, 0.0, None);
        for &(site, half, age) in loops {
            let leg = self.leg(home, site);
            let weight = 1.0 / (half.variance + leg.variance());
            weights += weight;
            sum += weight * (half.ms - leg.ms).max(0.0);
            youngest = Some(youngest.map_or(age, |known: Micros| known.min(age)));
        }
        Some((Guess { ms: sum / weights, variance: 1.0 / weights }, youngest?))
    }

    fn add_row(&mut self, number: u32) {
        let Some(home) = self.heard[number as usize].home else { return };
        let ways = self.ways(number, home);
        if let Some(server) = self.model.servers.get(number) {
            let legs = self.sites.iter().map(|site| site.id).zip(ways.iter().map(|ways| &ways.server));
            self.model.calibration.note(server.prefix, legs, self.now);
        }
        self.rows.add(number, home, ways.into_iter().map(|ways| ways.outside));
    }

    /// A server prefix from every site, and back over its home.
    fn ways(&self, number: u32, home: u8) -> Vec<Ways> {
        let servers = self.from_sites(number, home);
        let at_home = servers[usize::from(home)];
        let heard = &self.heard[number as usize];
        let ways = servers.into_iter().zip(0..=u8::MAX).map(|(server, site)| {
            let leg = self.leg(home, site);
            let source = if at_home.source.rank() > leg.source.rank() { at_home.source } else { leg.source };
            let back = Guess { ms: at_home.ms + leg.ms, variance: at_home.variance() + leg.variance() };
            let sum = Guess { ms: server.ms + back.ms, variance: server.variance() + back.variance };
            let (half, back) = (one_way(sum), Leg::new(back, source));
            let loops =
                heard.loops.iter().filter(|(at, _, _)| *at == site).map(|(_, loop_half, _)| *loop_half);
            match loops.min_by(|a, b| a.variance.total_cmp(&b.variance)) {
                // Measured as a whole.
                Some(whole) if whole.variance <= half.variance => {
                    let ms = (2.0 * whole.ms - server.ms).max(0.0);
                    Ways { server, back: Leg { ms, ..back }, outside: whole }
                }
                _ => Ways { server, back, outside: half },
            }
        });
        ways.collect()
    }

    /// One way from every site to a server prefix: as measured, else what all that is known of such places says together, or
    /// what was measured of one that is near, where that is surer.
    fn from_sites(&self, number: u32, home: u8) -> Vec<Leg> {
        let heard = &self.heard[number as usize];
        let past = || (0..=u8::MAX).take(self.len()).map(|site| self.past(heard, home, site)).collect();
        let alike = self.alike(number);
        let is_placed = alike.is_some();
        let mut legs: Vec<Leg> = alike.unwrap_or_else(past);
        let mut offer = |site: u8, guess: Guess, source: Source| {
            let (leg, known) = (Leg::new(guess, source), &mut legs[usize::from(site)]);
            if (leg.sd_ms, source.rank()) < (known.sd_ms, known.source.rank()) {
                *known = leg;
            }
        };
        for &(site, guess, age) in &heard.ways {
            offer(site, guess, Source::Measured { age });
        }
        if let Some(server) = self.model.servers.get(number) {
            self.borrow(server, home, is_placed, &mut offer);
        }
        legs
    }

    /// Past its home, from where it may lie in any direction.
    fn past(&self, heard: &Heard, home: u8, site: u8) -> Leg {
        let leg = self.leg(home, site);
        let Some((stretch, age)) = heard.stretch else {
            let variance = leg.variance() + ASSUMED_SD_MS * ASSUMED_SD_MS;
            return Leg::new(Guess { ms: leg.ms, variance }, Source::Assumed);
        };
        let (side, route) = (STRETCH_SD_SHARE * stretch.ms, ROUTE_SD_SHARE * leg.ms);
        let variance = leg.variance() + stretch.variance + side * side + route * route;
        Leg::new(Guess { ms: leg.ms + stretch.ms, variance }, Source::Borrowed { from: Near::Ingress, age })
    }

    /// By all that is known of such places, from the map and from sites that have the same delays; nothing where neither says anything.
    fn alike(&self, number: u32) -> Option<Vec<Leg>> {
        let heard = &self.heard[number as usize];
        let spot = self.model.servers.get(number).and_then(spot_of);
        if number >= self.alike_below || (heard.ways.is_empty() && spot.is_none()) {
            return None;
        }
        let age = heard.ways.iter().map(|(_, _, age)| *age).min();
        let source = age.map_or(Source::Geography, |age| Source::Borrowed { from: Near::Likeness, age });
        let estimates = self.thoughts.as_ref()?.of(number, &seen_of(heard), spot, self.now);
        let leg = |estimate: &Estimate| {
            let sd = f64::from(estimate.spread * (estimate.ms + crate::likeness::OFFSET_MS)) / 2.0;
            let variance = sd * sd + ALIKE_SD_MS * ALIKE_SD_MS;
            Leg::new(Guess { ms: f64::from(estimate.mean_ms) / 2.0, variance }, source)
        };
        Some(estimates.iter().map(leg).collect())
    }

    /// What neighbours have more than is thought of them, on top of what is thought of this one. Where likeness knows the place, it has
    /// looked at others of its network and its town already.
    fn borrow(&self, server: &Server, home: u8, is_placed: bool, offer: &mut impl FnMut(u8, Guess, Source)) {
        let near = if is_placed { self.by_prefix(server) } else { self.neighbours(server) };
        if near.is_empty() {
            return;
        }
        let mut sums = vec![(0.0, 0.0, f64::INFINITY, Near::Distance, Micros(u64::MAX)); self.len()];
        for (number, from, near_variance) in near {
            let (Some(other), heard) = (self.model.servers.get(number), &self.heard[number as usize]) else {
                continue;
            };
            for &(site, guess, age) in &heard.ways {
                let Some(more) = self.more(server, home, other, heard.home, site) else { continue };
                let (weights, sum, least, source, youngest) = &mut sums[usize::from(site)];
                let weight = 1.0 / (guess.variance + near_variance);
                *weights += weight;
                *sum += weight * (guess.ms + more);
                if near_variance < *least {
                    (*least, *source) = (near_variance, from);
                }
                *youngest = age.min(*youngest);
            }
        }
        for ((weights, sum, least, from, age), site) in sums.into_iter().zip(0..=u8::MAX) {
            if weights > 0.0 {
                // Many neighbours say what is common to all; what this one has for itself they do not know.
                let guess = Guess { ms: (sum / weights).max(0.0), variance: 1.0 / weights + least };
                offer(site, guess, Source::Borrowed { from, age });
            }
        }
    }

    /// What is thought of a server beyond what is thought of another, from a site.
    fn more(
        &self,
        server: &Server,
        home: u8,
        other: &Server,
        other_home: Option<u8>,
        site: u8,
    ) -> Option<f64> {
        let place = self.sites[usize::from(site)].coordinates();
        if let (Some(place), Some(a), Some(b)) = (place, server.place.at, other.place.at) {
            let ms = |at| prior::line(prior::great_circle_km(at, place), 0.0).ms;
            return Some(ms(a) - ms(b));
        }
        Some(self.leg(home, site).ms - self.leg(other_home?, site).ms)
    }

    /// Who is near by prefix, and the variance of what two that are so near differ by.
    fn by_prefix(&self, server: &Server) -> Vec<(u32, Near, f64)> {
        let by_prefix = &self.model.servers.by_prefix;
        let before = by_prefix.range(..server.prefix).rev().take(NEIGHBOURS);
        let after = by_prefix.range(server.prefix..).filter(|(prefix, _)| **prefix != server.prefix);
        let known = |number: u32| !self.heard[number as usize].ways.is_empty();
        let near = |(prefix, &number): (&flow::Prefix, &u32)| {
            let scale = if prefix.address().is_ipv4() { 1 } else { 2 };
            let bits = common_bits(prefix, &server.prefix) / scale;
            let (_, sd) = NEAR_BITS_SD_MS.iter().find(|(least, _)| bits >= *least)?;
            known(number).then_some((number, Near::Prefix, sd * sd))
        };
        before.chain(after.take(NEIGHBOURS)).filter_map(near).collect()
    }

    /// Who is near, why, and the variance of what two that are so near differ by: by prefix, else by network, else by distance.
    pub(super) fn neighbours(&self, server: &Server) -> Vec<(u32, Near, f64)> {
        let mut near = self.by_prefix(server);
        if near.is_empty()
            && let Some(peers) = server.place.network.and_then(|network| self.networks.get(&network))
        {
            let others = peers.iter().filter(|&&number| self.is_other(number, server));
            near.extend(others.map(|&number| (number, Near::Network, NETWORK_SD_MS * NETWORK_SD_MS)));
        }
        if near.is_empty()
            && let Some(at) = server.place.at
        {
            self.within_reach(server, at, &mut near);
        }
        near
    }

    fn is_other(&self, number: u32, server: &Server) -> bool {
        self.model.servers.get(number).is_some_and(|other| other.prefix != server.prefix)
    }

    fn within_reach(&self, server: &Server, at: (f64, f64), near: &mut Vec<(u32, Near, f64)>) {
        let (row, column) = cell(at);
        let around =
            (row - 1..=row + 1).flat_map(|row| (column - 1..=column + 1).map(move |column| (row, column)));
        for &number in around.filter_map(|cell| self.cells.get(&cell)).flatten() {
            let place = self.model.servers.get(number).and_then(|other| other.place.at);
            let Some(km) = place.map(|place| prior::great_circle_km(at, place)) else { continue };
            if km <= DISTANCE_KM_MAX && self.is_other(number, server) {
                let sd = DISTANCE_SD_MS + km / prior::KM_PER_MS;
                near.push((number, Near::Distance, sd * sd));
            }
        }
        near.truncate(PEERS_MAX);
    }

    /// The terms of a group's delay at a site whose load would be `fill` of its capacity.
    pub(crate) fn terms(&self, id: &GroupId, site: SiteId, fill: f64) -> Terms {
        let known = self.model.known(id);
        let at = self.at(site).unwrap_or(0);
        let mut legs = Vec::new();
        let [mut access, mut inside, mut server, mut back] = [Blend::default(); 4];
        let mut outside = Guess { ms: 0.0, variance: 0.0 };
        if let Some(known) = known {
            for (ingress, share) in self.shares(&known.demand.inside) {
                let (id_there, leg) = (self.sites[usize::from(ingress)].id, self.leg(ingress, at));
                legs.push((id_there, leg));
                inside.add(share, leg);
                access.add(share, self.model.access(id, known, id_there, self.now));
            }
            let outsides = self.shares(&known.demand.outside);
            legs.extend(outsides.map(|(other, _)| (self.sites[usize::from(other)].id, self.leg(other, at))));
            self.ends(known, |share, end| {
                let ways = match end {
                    End::Row(row) => self.ways_of_row(row, at),
                    End::Ingress(home) => self.assumed(home, at),
                };
                server.add(share, ways.server);
                back.add(share, ways.back);
                outside.ms += share * ways.outside.ms;
                outside.variance += share * share * ways.outside.variance;
            });
        }
        if inside.source.is_none()
            && let Some(guess) = self.model.clients_to(id, &self.sites[usize::from(at)])
        {
            inside.add(1.0, Leg::new(guess, Source::Geography));
        }
        let queue = Leg { ms: queue_ms(fill), sd_ms: 0.0, source: Source::Same };
        let parts =
            [(Part::Access, access), (Part::Inside, inside), (Part::Server, server), (Part::Return, back)];
        let parts = parts.into_iter().map(|(part, blend)| Term { part, leg: blend.leg() });
        Terms {
            access_ms: access.ms,
            inside_ms: inside.ms,
            outside_ms: outside.ms,
            queue_ms: queue.ms,
            sd_ms: (access.variance + inside.variance + outside.variance).sqrt(),
            parts: parts.chain([Term { part: Part::Queue, leg: queue }]).collect(),
            legs,
        }
    }

    fn ways_of_row(&self, row: u32, site: u8) -> Ways {
        let (number, home) = self.rows.server_of(row);
        self.ways(number, home).swap_remove(usize::from(site))
    }

    /// One way from a site to a server prefix.
    #[cfg(test)]
    pub(super) fn leg_of(&self, number: u32, site: SiteId) -> Option<Leg> {
        let home = self.heard[number as usize].home?;
        self.from_sites(number, home).get(usize::from(self.at(site)?)).copied()
    }

    /// A server that is taken to be at its ingress.
    fn assumed(&self, home: u8, site: u8) -> Ways {
        let leg = self.leg(home, site);
        let unsure = Guess { ms: leg.ms, variance: leg.variance() + ASSUMED_SD_MS * ASSUMED_SD_MS };
        let wide = Leg::new(unsure, Source::Assumed);
        let outside = Guess { ms: leg.ms, variance: unsure.variance / 2.0 };
        Ways { server: wide, back: wide, outside }
    }
}

/// What sites measured of a server by themselves.
fn seen_of(heard: &Heard) -> Vec<Seen> {
    let seen = |&(site, guess, _): &(u8, Guess, Micros)| Seen {
        site: usize::from(site),
        ms: 2.0 * guess.ms as f32,
        sd_ms: 2.0 * guess.variance.sqrt() as f32,
    };
    heard.ways.iter().map(seen).collect()
}

/// Where the map says that a server is.
fn spot_of(server: &Server) -> Option<Spot> {
    server.place.at.map(|at| Spot { at, radius_km: server.place.radius_km })
}

/// A sum over shares, and the least sure source of those that count.
#[derive(Clone, Copy, Default)]
struct Blend {
    ms: f64,
    variance: f64,
    source: Option<Source>,
}

impl Blend {
    fn add(&mut self, share: f64, leg: Leg) {
        self.ms += share * leg.ms;
        self.variance += share * share * leg.variance();
        if self.source.is_none_or(|known| share >= NAMED_SHARE && leg.source.rank() > known.rank()) {
            self.source = Some(leg.source);
        }
    }

    fn leg(self) -> Leg {
        let guess = Guess { ms: self.ms, variance: self.variance };
        Leg::new(guess, self.source.unwrap_or(Source::Unknown))
    }
}

fn push_bounded(list: &mut Vec<u32>, number: u32) {
    if list.len() < PEERS_MAX {
        list.push(number);
    }
}

fn cell((latitude, longitude): (f64, f64)) -> (i32, i32) {
    ((latitude / CELL_DEGREES).floor() as i32, (longitude / CELL_DEGREES).floor() as i32)
}
