//! Terms of delay from what sites report: each source, its age, and what is never known.

use proptest::prelude::*;

use super::*;
use crate::core::brain_tests::{cluster, group_id, load, report};
use crate::core::{Admin, ClientRtt, GroupReport, GroupTalk, PeerRtt, Probe, ServerRtt};

const S: u64 = 1_000_000;
/// Round trips between the sites of the test: 0 and 1, 0 and 2, 1 and 2.
const BETWEEN_US: [(u8, u8, u32); 3] = [(0, 1, 40_000), (0, 2, 100_000), (1, 2, 70_000)];

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn peers(of: u8) -> Vec<PeerRtt> {
    let ends = BETWEEN_US.iter().filter(|(a, b, _)| *a == of || *b == of);
    ends.map(|&(a, b, rtt_us)| PeerRtt { site: SiteId(if a == of { b } else { a }), rtt_us }).collect()
}

fn server(text: &str, ingress: Option<u8>, us: u32) -> ServerRtt {
    let prefix = prefix(text);
    let answered = Some(SocketAddr::new(prefix.nth(1).unwrap(), 443));
    let ingress = ingress.map(SiteId);
    ServerRtt { prefix, ingress, count: 20, min_us: us, mean_us: us, answered }
}

fn talk(group: u8, servers: &[&str]) -> GroupTalk {
    GroupTalk { group: group_id(group), servers: servers.iter().map(|text| (prefix(text), 10)).collect() }
}

/// Group 0 at site 0, its clients come in there, the world at `outside`.
fn group(outside: u8) -> GroupReport {
    GroupReport { outside_ingress: vec![(SiteId(outside), 1)], ..load(0, 100, 0) }
}

/// A report of site 0 with the ways between sites.
fn of_owner(servers: Vec<ServerRtt>, talks: Vec<GroupTalk>) -> SiteReport {
    SiteReport { peers: peers(0), servers, talks, ..report(0, vec![group(1)]) }
}

fn model(reports: &[SiteReport]) -> Model {
    let mut model = Model::new(None);
    reports.iter().for_each(|report| model.handle_report(report, Micros(0)));
    model.handle_report(&SiteReport { peers: peers(1), ..report(1, vec![]) }, Micros(0));
    model
}

fn terms(model: &Model, site: u8, now: Micros) -> Terms {
    let cluster = cluster();
    Mesh::of(&cluster, model, &group_id(0), now).terms(&group_id(0), SiteId(site), 0.0)
}

fn part(terms: &Terms, part: Part) -> Leg {
    terms.parts.iter().find(|term| term.part == part).unwrap().leg
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 0.01
}

const SERVER: &str = "203.0.113.0/24";

#[test]
fn a_server_that_nobody_measured_is_where_its_packets_come_in() {
    let model = model(&[of_owner(vec![], vec![])]);
    for (site, ms) in [(0, 20.0), (1, 0.0), (2, 35.0)] {
        let terms = terms(&model, site, Micros(0));
        assert!(near(terms.outside_ms, ms), "{site}: {terms:?}");
        assert_eq!(part(&terms, Part::Server).source, Source::Assumed);
        assert!(part(&terms, Part::Server).sd_ms >= 40.0, "unknown stays unknown: {terms:?}");
    }
}

#[test]
fn a_handshake_over_another_ingress_measures_the_whole_way() {
    // 0 to 1 and back are 40 ms, so the server is 5 ms behind 1.
    let model = model(&[of_owner(vec![server(SERVER, Some(1), 50_000)], vec![talk(0, &[SERVER])])]);
    for (site, ms) in [(0, 25.0), (1, 5.0)] {
        let terms = terms(&model, site, Micros(0));
        assert!(near(terms.outside_ms, ms), "{site}: {terms:?}");
    }
    let here = terms(&model, 0, Micros(0));
    assert_eq!(part(&here, Part::Server).source, Source::Measured { age: Micros(0) });
    assert!(near(part(&here, Part::Server).ms, 25.0) && near(part(&here, Part::Return).ms, 25.0));
    let there = part(&terms(&model, 2, Micros(0)), Part::Server);
    assert_eq!(there.source, Source::Borrowed { from: Near::Likeness, age: Micros(0) });
    assert!((35.0..48.0).contains(&there.ms), "it is near 1, and 35 ms are from there: {there:?}");
    assert!(there.sd_ms > part(&here, Part::Server).sd_ms);
}

/// Says that all servers are where site 2 is.
struct AtSiteTwo;

impl Locate for AtSiteTwo {
    fn locate(&self, _: &Prefix) -> Option<(f64, f64)> {
        cluster().sites[&SiteId(2)].coordinates()
    }
}

/// One group and its server, seen by site 0 over its own ingress, where sites 1 and 2 are willing to measure.
fn mapped(us: u32) -> Model {
    let mut model = Model::new(Some(Arc::new(AtSiteTwo)));
    let owner = of_owner(vec![server(SERVER, Some(0), us)], vec![talk(0, &[SERVER])]);
    let owner = SiteReport { groups: vec![group(0)], ..owner };
    [owner, willing(1, 2), willing(2, 2)].iter().for_each(|report| model.handle_report(report, Micros(0)));
    model
}

#[test]
fn what_is_measured_and_what_the_map_says_are_weighed_together() {
    // 100 ms from site 0, as site 2 is: the map is right.
    let right = part(&terms(&mapped(104_000), 2, Micros(0)), Part::Server);
    assert!(right.ms < 12.0, "{right:?}");
    // 3 ms from site 0: the map is wrong, and the server is as far from site 2 as site 0 is.
    let wrong = part(&terms(&mapped(3_000), 2, Micros(0)), Part::Server);
    assert!(wrong.ms > 35.0, "{wrong:?}");
}

#[test]
fn the_site_is_asked_first_from_which_a_measurement_tells_most() {
    let (cluster, model) = (cluster(), mapped(104_000));
    Mesh::all(&cluster, &model, Micros(0));
    let number = model.servers.number(&prefix(SERVER)).unwrap();
    let (first, gain) = model.thoughts.next(number, |_| true).unwrap();
    assert_eq!(first, 2, "the map has it near site 2, and it is as far from site 0 as that is");
    let (second, less) = model.thoughts.next(number, |site| site != first).unwrap();
    assert!(second == 1 && less < gain, "{gain} {less}");
    assert_eq!(model.thoughts.next(number, |site| site == 0), None, "that has been measured");
}

#[test]
fn what_a_site_measured_by_itself_counts_before_what_is_thought() {
    let probe = SiteReport { servers: vec![server(SERVER, None, 30_000)], ..report(2, vec![]) };
    let owner = of_owner(vec![server(SERVER, Some(1), 50_000)], vec![talk(0, &[SERVER])]);
    let model = model(&[owner, probe]);
    let terms = terms(&model, 2, Micros(0));
    assert!(near(part(&terms, Part::Server).ms, 15.0), "{terms:?}");
    // 15 there, and 5 to its ingress and 35 from there.
    assert!(near(terms.outside_ms, 27.5), "{terms:?}");
}

#[test]
fn the_access_line_is_what_is_left_of_handshakes_without_the_ways_between_sites() {
    let clients = |group: u8, ingress: u8, us| ClientRtt {
        group: group_id(group),
        ingress: SiteId(ingress),
        count: 5,
        min_us: us,
        mean_us: us,
    };
    let mut report = of_owner(vec![], vec![]);
    report.groups = vec![GroupReport { inside_ingress: vec![(SiteId(1), 1)], ..group(1) }, load(1, 5, 1)];
    report.clients = vec![clients(0, 1, 52_000)];
    let model = model(&[report]);
    for site in 0..3 {
        let terms = terms(&model, site, Micros(0));
        assert!(near(terms.access_ms, 6.0), "{site}: {terms:?}");
    }
    let cluster = cluster();
    let mesh = Mesh::of(&cluster, &model, &group_id(1), Micros(0));
    let borrowed = part(&mesh.terms(&group_id(1), SiteId(0), 0.0), Part::Access);
    assert!(near(borrowed.ms, 6.0), "{borrowed:?}");
    assert_eq!(borrowed.source, Source::Borrowed { from: Near::Prefix, age: Micros(0) });
}

#[test]
fn a_neighbour_lends_what_was_measured_of_it() {
    let neighbour = SiteReport { servers: vec![server("203.0.112.0/24", None, 24_000)], ..report(2, vec![]) };
    let owner = of_owner(vec![server(SERVER, Some(1), 50_000)], vec![talk(0, &[SERVER])]);
    let mut neighbour_home = neighbour.clone();
    neighbour_home.servers = vec![server("203.0.112.0/24", Some(1), 80_000)];
    let model = model(&[owner, neighbour, neighbour_home]);
    let lent = part(&terms(&model, 2, Micros(0)), Part::Server);
    assert_eq!(lent.source, Source::Borrowed { from: Near::Prefix, age: Micros(0) });
    assert!(near(lent.ms, 12.0), "{lent:?}");
}

/// All of a network and in one town.
struct Town;

impl Locate for Town {
    fn locate(&self, _: &Prefix) -> Option<(f64, f64)> {
        None
    }

    fn place(&self, prefix: &Prefix) -> Place {
        let away = prefix.address().to_string().starts_with("198.");
        Place {
            at: Some((0.0, if away { 16.0 } else { 15.0 })),
            radius_km: 50.0,
            network: (!away).then_some(7),
        }
    }
}

#[test]
fn a_network_lends_and_then_a_town() {
    for (other, from) in [("192.0.2.0/24", Near::Network), ("198.51.100.0/24", Near::Distance)] {
        let mut model = Model::new(Some(Arc::new(Town)));
        let lender = SiteReport { servers: vec![server(other, None, 90_000)], ..report(2, vec![]) };
        for report in [of_owner(vec![server(SERVER, Some(1), 46_000)], vec![talk(0, &[SERVER])]), lender] {
            model.handle_report(&report, Micros(0));
        }
        // Long after, the own way from the ingress is known less well than what was lent.
        let cluster = cluster();
        let mesh = Mesh::of(&cluster, &model, &group_id(0), Micros(0));
        let number = model.servers.number(&prefix(SERVER)).unwrap();
        let near = mesh.neighbours(model.servers.get(number).unwrap());
        assert_eq!(near.iter().map(|(_, from, _)| *from).collect::<Vec<_>>(), [from]);
    }
}

#[test]
fn what_is_not_measured_any_more_becomes_unsure_and_then_the_next_source_counts() {
    let model = model(&[of_owner(vec![server(SERVER, Some(1), 50_000)], vec![talk(0, &[SERVER])])]);
    let sd = |s: u64| terms(&model, 0, Micros(s * S)).sd_ms;
    assert!(sd(0) < sd(60) && sd(60) < sd(300) && sd(300) < sd(599));
    let late = terms(&model, 0, Micros(601 * S));
    assert_eq!(part(&late, Part::Server).source, Source::Assumed);
    assert_eq!(late.legs[0].1.source, Source::Same);
    assert_eq!(late.legs[1].1.source, Source::Geography);
}

#[test]
fn what_the_solver_sees_is_what_is_explained() {
    let owner = of_owner(
        vec![server(SERVER, Some(1), 50_000), server("198.51.100.0/24", Some(2), 130_000)],
        vec![talk(0, &[SERVER, "198.51.100.0/24"])],
    );
    let mut owner = SiteReport { clients: vec![], ..owner };
    owner.groups[0].outside_ingress = vec![(SiteId(1), 3), (SiteId(2), 1), (SiteId(0), 1)];
    let model = model(&[owner]);
    let cluster = cluster();
    let rows = Mesh::all(&cluster, &model, Micros(S));
    let mut delays = Delays::default();
    rows.delays(&model, &group_id(0), model.known(&group_id(0)), Micros(S), &mut delays);
    for site in 0..3_u8 {
        let terms = terms(&model, site, Micros(S));
        let seen = f64::from(delays.ms[usize::from(site)]);
        assert!(near(seen, terms.total_ms() - terms.queue_ms), "{site}: {seen} {terms:?}");
    }
}

#[test]
fn a_site_that_is_less_surely_known_has_to_promise_more() {
    let mut delays = Delays { ms: vec![0.0; 3], variance: vec![1.0, 1.0, 37.0] };
    let doubts = [0, 1, 2].map(|site| delays.doubt_ms(0, site));
    assert!(doubts[..2] == [0.0, 0.0] && (doubts[2] - 1.8).abs() < 1e-5, "{doubts:?}");
    delays.variance[0] = 100.0;
    assert_eq!(
        [1, 2].map(|site| delays.doubt_ms(0, site)),
        [0.0, 0.0],
        "it is the present one that is unsure"
    );
}

#[test]
fn whom_a_group_talks_to_is_bounded_and_fades() {
    let texts: Vec<String> = (0..40).map(|n| format!("203.0.{n}.0/24")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut model = Model::new(None);
    let servers: Vec<ServerRtt> = texts.iter().map(|text| server(text, Some(1), 50_000)).collect();
    for (n, chunk) in texts.chunks(8).enumerate() {
        let report = of_owner(servers.clone(), vec![talk(0, chunk)]);
        model.handle_report(&report, Micros(n as u64 * 1_000 * S));
    }
    let known = model.known(&group_id(0)).unwrap();
    assert_eq!(known.talk.len(), TALK_LEN_MAX);
    let first = model.servers.number(&prefix(texts[32])).unwrap();
    assert!(known.talk.iter().all(|(number, _)| *number >= first), "the last eight count most");
    model.forget(&cluster(), Micros(4_030 * S));
    assert_eq!(model.servers.iter().count(), 40);
    model.forget(&cluster(), Micros(9_000 * S));
    assert_eq!(model.servers.iter().count(), 0);
}

fn willing(site: u8, probes_per_s: u16) -> SiteReport {
    SiteReport { probes_per_s, peers: peers(site), ..report(site, vec![]) }
}

/// What a round over group 0 asks for, where it may be nearer to another site.
fn wished(reports: &[SiteReport]) -> Vec<(SiteId, Probe)> {
    wished_in(&cluster(), reports)
}

fn wished_in(cluster: &Cluster, reports: &[SiteReport]) -> Vec<(SiteId, Probe)> {
    let mut model = model(&[of_owner(vec![server(SERVER, Some(1), 70_000)], vec![talk(0, &[SERVER])])]);
    reports.iter().for_each(|report| model.handle_report(report, Micros(0)));
    let ready =
        crate::core::plan::Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };
    crate::core::plan::plan(cluster, &model, &ready, Micros(S)).probes
}

#[test]
fn sites_that_may_be_better_are_asked_if_they_are_willing() {
    assert_eq!(wished(&[]), []);
    let target = "203.0.113.1:443".parse().unwrap();
    let probe = Probe { prefix: prefix(SERVER), target };
    assert_eq!(wished(&[willing(1, 2)]), [(SiteId(1), probe)]);
    let measured = SiteReport { servers: vec![server(SERVER, None, 30_000)], ..willing(1, 2) };
    assert_eq!(wished(&[measured]), [], "what was measured just now is not asked again");
}

#[test]
fn where_an_operator_moves_groups_by_hand_sites_are_asked_as_well() {
    let mut by_hand = cluster();
    by_hand.policy.automatic = false;
    let willing = [willing(1, 2)];
    assert_eq!(wished_in(&by_hand, &willing), wished(&willing));
    by_hand.sites.get_mut(&SiteId(1)).unwrap().admin = Admin::Cordoned;
    assert_eq!(wished_in(&by_hand, &willing), [], "it takes no groups");
}

#[test]
fn of_a_hundred_groups_one_is_asked_for_in_a_round() {
    let (groups, sites) = (500, 20);
    let cluster = many(groups, sites);
    let mut model = Model::new(None);
    feed(&mut model, &cluster, sites, groups, 1);
    for site in 0..sites {
        model.handle_report(&SiteReport { probes_per_s: 5, ..report(site, vec![]) }, Micros(0));
    }
    let ready =
        crate::core::plan::Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };
    let probes = crate::core::plan::plan(&cluster, &model, &ready, Micros(S)).probes;
    // Each group has a server of its own.
    let asked: BTreeSet<Prefix> = probes.iter().map(|(_, probe)| probe.prefix).collect();
    assert_eq!(asked.len(), 5, "{probes:?}");
    assert!(probes.len() <= 5 * 4, "of each at most four sites: {probes:?}");
}

#[test]
fn a_report_of_an_older_agent_is_read() {
    let old = r#"{"site":1,"packets_per_s":5,"busy":0.5,"groups":[],"peers":[{"site":2,"rtt_us":7}]}"#;
    let read: SiteReport = serde_json::from_str(old).unwrap();
    assert_eq!((read.probes_per_s, read.servers.len(), read.peers[0].rtt_us), (0, 0, 7));
}

/// Sites, servers and times from small numbers.
fn any_report() -> impl Strategy<Value = (SiteReport, u64)> {
    let way = (0u8..6, proptest::option::of(0u8..4), any::<u32>(), 0u32..40);
    let ways = proptest::collection::vec(way, 0..6);
    let peers = proptest::collection::vec((0u8..4, any::<u32>()), 0..4);
    let clients = proptest::collection::vec((0u8..3, 0u8..4, any::<u32>(), 0u32..9), 0..3);
    let talks =
        proptest::collection::vec((0u8..3, proptest::collection::vec((0u8..8, any::<u32>()), 0..12)), 0..3);
    let shares = proptest::collection::vec((0u8..4, any::<u32>()), 0..4);
    (0u8..4, ways, peers, clients, talks, shares, 0u64..400_000_000).prop_map(
        |(site, ways, peers, clients, talks, shares, later)| {
            let server_prefix = |n: u8| prefix(&format!("203.0.{}.0/24", u32::from(n) * 3));
            let seen = |(n, ingress, us, count): (u8, Option<u8>, u32, u32)| ServerRtt {
                count,
                ..server(&server_prefix(n).to_string(), ingress, us)
            };
            let shares: Vec<_> = shares.into_iter().map(|(site, n)| (SiteId(site), u64::from(n))).collect();
            let seen_group = GroupReport { inside_ingress: shares.clone(), ..group(1) };
            let groups = vec![GroupReport { outside_ingress: shares, ..seen_group }, load(1, 7, site)];
            let report = SiteReport {
                peers: peers
                    .into_iter()
                    .map(|(site, rtt_us)| PeerRtt { site: SiteId(site), rtt_us })
                    .collect(),
                servers: ways.into_iter().map(seen).collect(),
                clients: clients
                    .into_iter()
                    .map(|(group, ingress, us, count)| ClientRtt {
                        group: group_id(group),
                        ingress: SiteId(ingress),
                        count,
                        min_us: us,
                        mean_us: us,
                    })
                    .collect(),
                talks: talks
                    .into_iter()
                    .map(|(group, servers)| GroupTalk {
                        group: group_id(group),
                        servers: servers.into_iter().map(|(n, count)| (server_prefix(n), count)).collect(),
                    })
                    .collect(),
                ..report(site, groups)
            };
            (report, later)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever comes: finite, not negative, and the same again; what is measured becomes surer by it, and by age less so.
    #[test]
    fn estimates_are_finite_and_measurements_make_surer(
        reports in proptest::collection::vec(any_report(), 1..12),
        way in (0u8..3, 1_000u32..400_000),
        wait in 0u64..500_000_000,
    ) {
        let (mut model, mut again, mut now) = (Model::new(None), Model::new(None), Micros(0));
        for (report, later) in &reports {
            now = now.plus(Micros(*later));
            model.handle_report(report, now);
            again.handle_report(report, now);
            model.forget(&cluster(), now);
            again.forget(&cluster(), now);
        }
        for site in 0..3 {
            let terms = terms(&model, site, now);
            prop_assert_eq!(&terms, &super::tests::terms(&again, site, now));
            for ms in [terms.access_ms, terms.inside_ms, terms.outside_ms, terms.queue_ms, terms.sd_ms] {
                prop_assert!(ms.is_finite() && ms >= 0.0, "{:?}", terms);
            }
            for term in &terms.parts {
                prop_assert!(term.leg.ms.is_finite() && term.leg.ms >= 0.0 && term.leg.sd_ms >= 0.0, "{:?}", term);
            }
        }
        // One server, measured from one site: what is thought of that way.
        let leg = |model: &Model, now: Micros| {
            let cluster = cluster();
            let mesh = Mesh::of(&cluster, model, &group_id(0), now);
            let number = model.servers.number(&prefix(SERVER))?;
            mesh.leg_of(number, SiteId(way.0))
        };
        let report = of_owner(vec![server(SERVER, Some(1), 50_000)], vec![talk(0, &[SERVER])]);
        model.handle_report(&report, now);
        let before = leg(&model, now).unwrap();
        let probe = SiteReport { servers: vec![server(SERVER, None, way.1)], ..report_of(way.0) };
        model.handle_report(&probe, now);
        let after = leg(&model, now).unwrap();
        prop_assert!(after.sd_ms <= before.sd_ms * (1.0 + 1e-6), "{:?} {:?}", before, after);
        let later = leg(&model, now.plus(Micros(wait))).unwrap();
        prop_assert!(later.sd_ms >= after.sd_ms * (1.0 - 1e-6), "{:?} {:?}", after, later);
    }
}

fn report_of(site: u8) -> SiteReport {
    report(site, vec![])
}

/// Time of a round, for people: `cargo test --release -p limosa-placement a_round_over -- --nocapture`.
#[test]
fn a_round_over_many_groups_knows_all_their_servers() {
    let groups: u32 = if cfg!(debug_assertions) { 2_000 } else { 100_000 };
    let (sites, servers) = (if cfg!(debug_assertions) { 20 } else { 100 }, 4_000.min(groups));
    let cluster = many(groups, sites);
    for talks in [0, 4, 8] {
        let mut model = Model::new(None);
        feed(&mut model, &cluster, sites, servers, talks);
        let ready =
            crate::core::plan::Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };
        let purpose = crate::core::problem::Purpose::Plan(&ready);
        #[expect(clippy::disallowed_methods, reason = "printed, not asserted")]
        let start = std::time::Instant::now();
        let problem =
            crate::core::problem::Problem::new(&cluster, &model, purpose, Micros(S)).unwrap().unwrap();
        eprintln!("{groups} groups, {sites} sites, {talks} servers each: instance in {:?}", start.elapsed());
        assert_eq!(problem.groups.len(), groups as usize);
        assert_eq!(model.servers.iter().count() as u32, if talks == 0 { 0 } else { servers });
    }
}

fn many(groups: u32, sites: u8) -> Cluster {
    let mut cluster = cluster();
    cluster.sites = (0..sites)
        .map(|id| {
            let site = crate::core::brain_tests::site(id, f64::from(id) * 3.0 - 150.0);
            (SiteId(id), Site { capacity_pps: 100_000_000, ..site })
        })
        .collect();
    cluster.groups = (0..groups)
        .map(|n| {
            let id: GroupId = format!("1:10.{}.{}.0/24", n / 256 % 256, n % 256).parse().unwrap();
            let id = if n < 65_536 {
                id
            } else {
                format!("1:11.{}.{}.0/24", n / 256 % 256, n % 256).parse().unwrap()
            };
            let owner = SiteId((n % u32::from(sites)) as u8);
            let epoch = flow::Epoch(1);
            (id, crate::core::Group { id, owner, epoch, move_id: None, changed: 1, standby: None })
        })
        .collect();
    cluster
}

fn feed(model: &mut Model, cluster: &Cluster, sites: u8, servers: u32, talks: u32) {
    let server_prefix = |n: u32| prefix(&format!("203.{}.{}.0/24", n / 256, n % 256));
    for site in 0..sites {
        let peers = (0..sites).filter(|peer| *peer != site);
        let apart = |peer: u8| 2_000 * u32::from(peer.abs_diff(site)) + 500;
        let peers = peers.map(|peer| PeerRtt { site: SiteId(peer), rtt_us: apart(peer) }).collect();
        model.handle_report(&SiteReport { peers, ..report(site, vec![]) }, Micros(0));
    }
    let home = |n: u32| (n * 7 % u32::from(sites)) as u8;
    let seen = |n: u32| ServerRtt { prefix: server_prefix(n), ..server(SERVER, Some(home(n)), 300_000) };
    let known: Vec<ServerRtt> = (0..servers).map(seen).collect();
    for (n, group) in (0..).zip(cluster.groups.values()) {
        let picks = || (0..talks).map(|k| (n * 31 + k * 997) % servers);
        let mut outside: Vec<_> = picks().take(2).map(|n| (SiteId(home(n)), 10)).collect();
        outside.push((SiteId(home(n)), 5));
        let load = GroupReport {
            group: group.id,
            inside_ingress: vec![(group.owner, 9), (SiteId((n % 3) as u8), 1)],
            outside_ingress: outside,
            ..load(0, 100, 0)
        };
        let servers = if n % 1_000 == 0 && talks > 0 { known.clone() } else { vec![] };
        let talks =
            vec![GroupTalk { group: group.id, servers: picks().map(|n| (server_prefix(n), 5)).collect() }];
        let report = SiteReport { groups: vec![load], servers, talks, ..SiteReport::default() };
        model.handle_report(&SiteReport { site: group.owner, ..report }, Micros(0));
    }
}
