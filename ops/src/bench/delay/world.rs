//! Worlds made up from a seed: cities that are joined by cables, networks that meet in few of them, access lines, and a map that is
//! missing or wrong in places.
//!
//! What makes real round trips differ from distance is in it: cables that take detours, traffic that goes to where two networks meet
//! (hot potato: each direction at the place that is nearest to its sender), networks that meet far away, lines of homes, ways that
//! are odd. The excess over the straight line is that of real measurements, medians of some 8 ms near by and 30 ms far off; in about
//! three of ten triangles one side is longer than the other two together.

use flow::sample::Seeded;
use placement::core::delay::great_circle_km;

/// Cities: latitude, longitude, hosts (weight), and whether networks meet there.
const CITIES: [(f64, f64, u8, bool); 72] = [
    (51.5, -0.1, 8, true),
    (52.4, 4.9, 6, true),
    (50.1, 8.7, 7, true),
    (48.9, 2.4, 7, true),
    (43.3, 5.4, 2, true),
    (40.4, -3.7, 4, true),
    (45.5, 9.2, 4, true),
    (48.2, 16.4, 3, true),
    (59.3, 18.1, 3, true),
    (52.2, 21.0, 3, false),
    (55.7, 37.6, 5, true),
    (41.0, 29.0, 4, false),
    (38.0, 23.7, 2, false),
    (38.7, -9.1, 2, false),
    (53.3, -6.3, 2, false),
    (60.2, 24.9, 2, false),
    (50.4, 30.5, 2, false),
    (44.4, 26.1, 2, false),
    (40.7, -74.0, 8, true),
    (39.0, -77.5, 7, true),
    (33.7, -84.4, 4, true),
    (25.8, -80.2, 3, true),
    (41.9, -87.6, 5, true),
    (32.8, -96.8, 4, true),
    (39.7, -105.0, 2, false),
    (34.1, -118.2, 6, true),
    (37.4, -122.0, 6, true),
    (47.6, -122.3, 4, true),
    (45.5, -73.6, 2, false),
    (43.7, -79.4, 4, true),
    (49.3, -123.1, 1, false),
    (42.4, -71.1, 3, false),
    (29.8, -95.4, 2, false),
    (44.9, -93.3, 2, false),
    (19.4, -99.1, 4, false),
    (4.7, -74.1, 2, false),
    (-12.0, -77.0, 2, false),
    (-33.4, -70.7, 2, false),
    (-34.6, -58.4, 3, false),
    (-23.5, -46.6, 5, true),
    (-22.9, -43.2, 2, false),
    (-3.7, -38.5, 1, true),
    (9.9, -84.1, 1, false),
    (18.5, -69.9, 1, false),
    (35.7, 139.7, 7, true),
    (34.7, 135.5, 3, false),
    (37.6, 127.0, 5, false),
    (31.2, 121.5, 5, false),
    (39.9, 116.4, 5, false),
    (22.3, 114.2, 5, true),
    (25.0, 121.5, 3, false),
    (14.6, 121.0, 2, false),
    (1.35, 103.8, 5, true),
    (3.1, 101.7, 2, false),
    (13.8, 100.5, 2, false),
    (-6.2, 106.8, 3, false),
    (10.8, 106.7, 2, false),
    (19.1, 72.9, 4, true),
    (13.1, 80.3, 3, false),
    (28.6, 77.2, 4, false),
    (23.8, 90.4, 1, false),
    (24.9, 67.0, 2, false),
    (25.2, 55.3, 3, true),
    (32.1, 34.8, 2, false),
    (30.0, 31.2, 2, false),
    (6.5, 3.4, 2, false),
    (-1.3, 36.8, 2, false),
    (-26.2, 28.0, 3, true),
    (-33.9, 18.4, 1, false),
    (-33.9, 151.2, 4, true),
    (-37.8, 145.0, 3, false),
    (-36.8, 174.8, 2, false),
];
/// Light in fibre.
const KM_PER_MS: f64 = 200.0;
/// Pairs of cities that have a cable across an ocean in every world.
const OCEANS: [(usize, usize); 16] = [
    (0, 18),
    (5, 39),
    (25, 44),
    (27, 44),
    (26, 69),
    (44, 52),
    (52, 57),
    (57, 62),
    (62, 4),
    (4, 52),
    (69, 52),
    (67, 0),
    (67, 57),
    (21, 39),
    (41, 21),
    (26, 49),
];
/// One way between networks that meet nowhere.
const FAR_MS: f64 = 100.0;
/// Pairs of hosts whose way is odd.
const ODD_SHARE: f64 = 0.07;
/// Networks of a world.
const NETWORKS: usize = 70;

/// Hosts, the round trips between them, and where a map says that they are.
pub(super) struct World {
    /// Milliseconds, row by row.
    pub(super) ms: Vec<f32>,
    /// Latitude and longitude; nothing where the map has nothing.
    pub(super) places: Vec<Option<(f64, f64)>>,
    /// Where they are.
    #[cfg(test)]
    pub(super) truth: Vec<(f64, f64)>,
}

struct Network {
    home: usize,
    /// Cities where others may meet it.
    meets: Vec<usize>,
}

struct Host {
    at: (f64, f64),
    city: usize,
    network: usize,
    access_ms: f64,
}

impl World {
    /// The same seed, the same world.
    pub(super) fn new(seed: u64, hosts: usize) -> Self {
        let random = &mut Seeded::new(seed ^ 0x005e_ed0f_3a11_0001);
        let cables = cables(random);
        let networks: Vec<Network> = (0..NETWORKS).map(|_| network(&cables, random)).collect();
        let hosts: Vec<Host> = (0..hosts).map(|_| host(&networks, &cables, random)).collect();
        let meetings = meetings(&networks, &cables, random);
        let mut ms = vec![0.0; hosts.len() * hosts.len()];
        for a in 0..hosts.len() {
            for b in 0..a {
                let round_trip = round_trip((&hosts[a], &hosts[b]), &meetings, &cables, random) as f32;
                ms[a * hosts.len() + b] = round_trip;
                ms[b * hosts.len() + a] = round_trip;
            }
        }
        let places = hosts.iter().map(|host| mapped(host, &networks, random)).collect();
        Self {
            ms,
            places,
            #[cfg(test)]
            truth: hosts.iter().map(|host| host.at).collect(),
        }
    }
}

fn round_trip(
    (from, to): (&Host, &Host),
    meetings: &[Vec<usize>],
    cables: &[Vec<f64>],
    random: &mut Seeded,
) -> f64 {
    let straight = great_circle_km(from.at, to.at) / KM_PER_MS;
    let way = one_way(from, to, meetings, cables, random) + one_way(to, from, meetings, cables, random);
    let odd = if random.fraction() < ODD_SHARE {
        0.7 * way * random.fraction() + 30.0 * random.fraction()
    } else {
        0.0
    };
    let sway = 1.0 + 0.12 * random.fraction();
    way.max(straight) * sway + 2.0 * (from.access_ms + to.access_ms) + odd
}

/// Over a place where the two networks meet: for half of the pairs that of the shortest way, mostly the one that is nearest to the sender,
/// sometimes any.
fn one_way(from: &Host, to: &Host, meetings: &[Vec<usize>], cables: &[Vec<f64>], random: &mut Seeded) -> f64 {
    let meets = &meetings[from.network * NETWORKS + to.network];
    let ways = |meet: usize| (cables[from.city][meet], cables[meet][to.city]);
    let shorter = |a: &(f64, f64), b: &(f64, f64)| (a.0 + a.1).total_cmp(&(b.0 + b.1));
    let drawn: [usize; 2] = std::array::from_fn(|_| random.below(meets.len().max(1) as u64) as usize);
    let kind = random.fraction();
    let over = if kind < 0.5 {
        meets.iter().copied().map(ways).min_by(shorter)
    } else if kind < 0.985 {
        meets.iter().copied().map(ways).min_by(|a, b| a.0.total_cmp(&b.0))
    } else {
        drawn.iter().filter_map(|at| meets.get(*at)).copied().map(ways).min_by(shorter)
    };
    if from.network == to.network {
        return cables[from.city][to.city];
    }
    over.map_or(FAR_MS, |(near, far)| near + far)
}

/// One way between all cities in milliseconds, over cables: each city has some to those near by, and where networks meet there are
/// long ones.
fn cables(random: &mut Seeded) -> Vec<Vec<f64>> {
    let count = CITIES.len();
    let km = |a: usize, b: usize| great_circle_km((CITIES[a].0, CITIES[a].1), (CITIES[b].0, CITIES[b].1));
    let mut ms = vec![vec![f64::INFINITY; count]; count];
    let mut lay = |a: usize, b: usize, random: &mut Seeded| {
        let detour = 1.2 + 0.6 * random.fraction();
        let way = km(a, b) * detour / KM_PER_MS + 0.3;
        ms[a][b] = ms[a][b].min(way);
        ms[b][a] = ms[a][b];
    };
    let nearest = |a: usize, among: &dyn Fn(usize) -> bool| {
        let mut others: Vec<usize> = (0..count).filter(|&b| b != a && among(b)).collect();
        others.sort_by(|&x, &y| km(a, x).total_cmp(&km(a, y)));
        others
    };
    for (a, city) in CITIES.iter().enumerate() {
        let hubs = nearest(a, &|b| CITIES[b].3);
        lay(a, hubs[0], random);
        for b in nearest(a, &|_| true).into_iter().take(2) {
            lay(a, b, random);
        }
        if city.3 {
            for &b in hubs.iter().take(9) {
                if random.fraction() < 0.6 {
                    lay(a, b, random);
                }
            }
        }
    }
    for (a, b) in OCEANS {
        lay(a, b, random);
    }
    for via in 0..count {
        for a in 0..count {
            for b in 0..count {
                ms[a][b] = ms[a][b].min(ms[a][via] + ms[via][b]);
            }
        }
    }
    (0..count).for_each(|a| ms[a][a] = 0.2);
    ms
}

/// A city, by weight.
fn city(random: &mut Seeded) -> usize {
    let total: u64 = CITIES.iter().map(|city| u64::from(city.2)).sum();
    let mut left = random.below(total);
    for (at, city) in CITIES.iter().enumerate() {
        match left.checked_sub(u64::from(city.2)) {
            Some(rest) => left = rest,
            None => return at,
        }
    }
    0
}

/// Some meet others wherever they can, some in few places, and some only far away.
fn network(cables: &[Vec<f64>], random: &mut Seeded) -> Network {
    let home = city(random);
    let kind = random.fraction();
    let reach = if kind < 0.6 {
        400.0
    } else if kind < 0.88 {
        50.0
    } else if kind < 0.98 {
        20.0
    } else {
        0.0
    };
    let mut meets: Vec<usize> = (0..CITIES.len())
        .filter(|&at| {
            CITIES[at].3 && cables[home][at] <= reach && (cables[home][at] < 10.0 || random.fraction() < 0.8)
        })
        .collect();
    if meets.is_empty() {
        // One far hub at which it buys.
        let far = random.fraction() < 0.4;
        let mut hubs: Vec<usize> = (0..CITIES.len()).filter(|&at| CITIES[at].3).collect();
        hubs.sort_by(|&a, &b| cables[home][a].total_cmp(&cables[home][b]));
        meets.push(hubs[if far { random.below(8) as usize } else { 0 }]);
    }
    Network { home, meets }
}

/// Where each two networks meet: in common places, or at a carrier that both reach.
fn meetings(networks: &[Network], cables: &[Vec<f64>], random: &mut Seeded) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new(); NETWORKS * NETWORKS];
    for a in 0..NETWORKS {
        for b in 0..=a {
            let (one, other) = (&networks[a], &networks[b]);
            let mut common: Vec<usize> = one
                .meets
                .iter()
                .copied()
                .filter(|at| other.meets.contains(at) && random.fraction() < 0.9)
                .collect();
            if common.is_empty() {
                // By carriers, which take it over where each of them is.
                let near = one
                    .meets
                    .iter()
                    .copied()
                    .min_by(|&x, &y| cables[one.home][x].total_cmp(&cables[one.home][y]));
                common.extend(near);
                let near = other
                    .meets
                    .iter()
                    .copied()
                    .min_by(|&x, &y| cables[other.home][x].total_cmp(&cables[other.home][y]));
                common.extend(near.filter(|_| random.fraction() < 0.7));
            }
            all[a * NETWORKS + b].clone_from(&common);
            all[b * NETWORKS + a] = common;
        }
    }
    all
}

fn host(networks: &[Network], cables: &[Vec<f64>], random: &mut Seeded) -> Host {
    let city = city(random);
    let here = (CITIES[city].0, CITIES[city].1);
    // Mostly a network of the region, sometimes any.
    let near = |network: &Network| {
        great_circle_km((CITIES[network.home].0, CITIES[network.home].1), here) < 1_200.0
            || network.meets.iter().any(|&at| cables[at][city] < 8.0)
    };
    let mut network = random.below(NETWORKS as u64) as usize;
    for _ in 0..40 {
        if near(&networks[network]) {
            break;
        }
        network = random.below(NETWORKS as u64) as usize;
    }
    let home_line = random.fraction() < 0.25;
    let base = -random.fraction().max(1e-6).ln() * 0.35 + 0.1;
    let access_ms = base + if home_line { 1.0 + 5.0 * random.fraction() } else { 0.0 };
    let off = |random: &mut Seeded| (random.fraction() - 0.5) * 1.2;
    Host { at: (here.0 + off(random), here.1 + off(random)), city, network, access_ms }
}

/// Where a map says that it is: some 40 km off, for some hundreds, for some where the network has its seat, for some nothing.
fn mapped(host: &Host, networks: &[Network], random: &mut Seeded) -> Option<(f64, f64)> {
    let kind = random.fraction();
    if kind < 0.04 {
        return None;
    }
    if kind < 0.052 {
        let seat = networks[host.network].home;
        return Some((CITIES[seat].0, CITIES[seat].1));
    }
    let wide = if kind < 0.2 { 6.0 } else { 0.8 };
    Some((host.at.0 + wide * (random.fraction() - 0.5), host.at.1 + wide * (random.fraction() - 0.5)))
}
