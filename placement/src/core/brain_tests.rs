//! The leader and the solver: state, event, exact commands.

use std::collections::BTreeMap;

use flow::nat::NatSpec;
use flow::{Epoch, GroupId, Micros, MoveId, ServiceId, SiteId};

use super::delay::{Model, Source};
use super::explain::{Blocked, explain};
use super::leader::{Brain, BrainTimings};
use super::plan::{Plan, Readiness, plan};
use super::*;

const S: u64 = 1_000_000;

pub(super) fn site(id: u8, longitude: f64) -> Site {
    Site {
        id: SiteId(id),
        name: format!("site-{id}"),
        latitude: Some(0.0),
        longitude: Some(longitude),
        endpoint: "[::1]:1".into(),
        capacity_pps: 1000,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
        admin: Admin::Active,
        alive: true,
    }
}

pub(super) fn group_id(n: u8) -> GroupId {
    format!("1:100.64.{n}.0/24").parse().unwrap()
}

/// Sites 0, 1, 2 on the equator, 1,500 km and more apart; four groups, all at site 0.
pub(super) fn cluster() -> Cluster {
    let service = Service {
        id: ServiceId::new(1).unwrap(),
        name: "nat".into(),
        nat: NatSpec {
            clients: vec!["100.64.0.0/22".parse().unwrap()],
            pool: vec!["192.0.2.0/28".parse().unwrap()],
            ports_per_subscriber: 512,
            first_port: 1024,
            port_key: 0,
        },
        timeouts: Timeouts::default(),
        ordering: Ordering::Strict,
        group_len: 24,
    };
    let group = |n| Group {
        id: group_id(n),
        owner: SiteId(0),
        epoch: Epoch(1),
        move_id: None,
        changed: 1,
        standby: None,
    };
    Cluster {
        sites: [(0, 0.0), (1, 15.0), (2, 40.0)].map(|(id, at)| (SiteId(id), site(id, at))).into(),
        services: BTreeMap::from([(service.id, service)]),
        groups: (0..4).map(|n| (group_id(n), group(n))).collect(),
        ..Cluster::default()
    }
}

pub(super) fn load(n: u8, packets_per_s: u64, ingress: u8) -> GroupReport {
    GroupReport {
        group: group_id(n),
        packets_per_s,
        flows: 1,
        bits_per_s: 0,
        inside_ingress: vec![(SiteId(ingress), 1)],
        outside_ingress: vec![],
        remote_rtt_us: None,
    }
}

/// A hard rule, for all or for the clients in a prefix.
pub(super) fn rule(name: &str, clients: Option<&str>, kind: Kind) -> Rule {
    let clients = clients.map(|clients| clients.parse().unwrap());
    let scope = Scope { clients, ..Scope::default() };
    Rule { name: name.into(), scope, kind, price_ms: None, owner: None, until_ms: None }
}

pub(super) fn report(site: u8, groups: Vec<GroupReport>) -> SiteReport {
    SiteReport { site: SiteId(site), groups, ..SiteReport::default() }
}

fn moves(reason: MoveReason, moves: &[(u8, u8)]) -> Command {
    let moves = moves.iter().map(|&(n, to)| (group_id(n), SiteId(to))).collect();
    Command::StartMoves { moves, reason }
}

fn alive(site: u8, alive: bool) -> Command {
    Command::SetAlive { site: SiteId(site), alive }
}

fn brain() -> Brain {
    Brain::new(BrainTimings::default(), None, Micros(0))
}

pub(super) fn planned(cluster: &Cluster, groups: Vec<GroupReport>) -> Plan {
    let mut model = Model::new(None);
    model.handle_report(&report(0, groups), Micros(0));
    plan(
        cluster,
        &model,
        &Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None },
        Micros(S),
    )
}

fn solved(cluster: &Cluster, groups: Vec<GroupReport>) -> Vec<Command> {
    planned(cluster, groups).commands
}

/// What the leader wants, but for the rounds that it publishes.
fn wishes(brain: &mut Brain, cluster: &Cluster, at: Micros) -> Vec<Command> {
    let mut wishes = brain.poll(cluster, at);
    wishes.retain(|wish| !matches!(wish, Command::Publish(_)));
    wishes
}

fn moving(cluster: &mut Cluster, phase: MovePhase) -> MoveId {
    let id = MoveId(7);
    cluster.groups.get_mut(&group_id(0)).unwrap().move_id = Some(id);
    let present = Move {
        id,
        group: group_id(0),
        from: SiteId(0),
        to: SiteId(1),
        epoch: Epoch(2),
        phase,
        ordering: Ordering::Strict,
        ingresses: vec![],
        flip: None,
        take_over: false,
        reason: MoveReason::Operator,
        started: 1,
    };
    cluster.moves.insert(id, present);
    id
}

#[test]
fn a_site_is_dead_a_lease_after_its_last_report_or_after_the_leader_began() {
    let (cluster, mut brain) = (cluster(), brain());
    brain.handle_report(&report(0, vec![]), Micros(2 * S));
    assert_eq!(wishes(&mut brain, &cluster, Micros(3 * S - 1)), []);
    assert_eq!(wishes(&mut brain, &cluster, Micros(3 * S)), [alive(1, false), alive(2, false)]);
    assert_eq!(wishes(&mut brain, &cluster, Micros(5 * S)), [0, 1, 2].map(|id| alive(id, false)));
}

#[test]
fn a_site_lives_from_its_first_report() {
    let (mut cluster, mut brain) = (cluster(), brain());
    cluster.sites.get_mut(&SiteId(1)).unwrap().alive = false;
    assert_eq!(wishes(&mut brain, &cluster, Micros(1)), []);
    brain.handle_report(&report(1, vec![]), Micros(1));
    assert_eq!(wishes(&mut brain, &cluster, Micros(2)), [alive(1, true)]);
}

#[test]
fn preparing_ends_when_a_party_is_dead_or_time_is_up() {
    for (dead, reason) in [(0, "source site 0 is dead"), (1, "target site 1 is dead")] {
        let (mut cluster, mut brain) = (cluster(), brain());
        let move_id = moving(&mut cluster, MovePhase::Preparing);
        cluster.sites.get_mut(&SiteId(dead)).unwrap().alive = false;
        let abort = Command::Abort { move_id, by: None, reason: reason.into() };
        assert_eq!(wishes(&mut brain, &cluster, Micros(1)), [abort]);
    }
    let (mut cluster, mut brain) = (cluster(), brain());
    let move_id = moving(&mut cluster, MovePhase::Preparing);
    let poll = |brain: &mut Brain, at| {
        for id in 0..3 {
            brain.handle_report(&report(id, vec![]), at);
        }
        wishes(brain, &cluster, at)
    };
    assert_eq!(poll(&mut brain, Micros(0)), []);
    assert_eq!(poll(&mut brain, Micros(60 * S - 1)), []);
    let abort = Command::Abort { move_id, by: None, reason: "not ready after 60 s".into() };
    assert_eq!(poll(&mut brain, Micros(60 * S)), [abort]);
}

#[test]
fn a_switched_move_is_taken_over_once_and_only_when_its_source_is_dead() {
    let (mut cluster, mut brain) = (cluster(), brain());
    let move_id = moving(&mut cluster, MovePhase::Switching);
    assert_eq!(wishes(&mut brain, &cluster, Micros(0)), []);
    cluster.sites.get_mut(&SiteId(1)).unwrap().alive = false;
    assert_eq!(wishes(&mut brain, &cluster, Micros(0)), []);
    cluster.sites.get_mut(&SiteId(0)).unwrap().alive = false;
    assert_eq!(wishes(&mut brain, &cluster, Micros(0)), [Command::TakeOver { move_id }]);
    cluster.moves.get_mut(&move_id).unwrap().take_over = true;
    assert_eq!(wishes(&mut brain, &cluster, Micros(0)), []);
}

#[test]
fn a_group_that_has_just_moved_rests() {
    let (mut cluster, mut brain) = (cluster(), brain());
    let poll = |brain: &mut Brain, cluster: &Cluster, at| {
        for id in 0..3 {
            brain.handle_report(&report(id, if id == 0 { vec![load(0, 10, 1)] } else { vec![] }), at);
        }
        wishes(brain, cluster, at)
    };
    assert_eq!(poll(&mut brain, &cluster, Micros(3 * S)), [moves(MoveReason::Delay, &[(0, 1)])]);
    cluster.groups.get_mut(&group_id(0)).unwrap().changed = 2;
    assert_eq!(poll(&mut brain, &cluster, Micros(4 * S)), []);
    assert_eq!(poll(&mut brain, &cluster, Micros(64 * S - 1)), []);
    assert_eq!(poll(&mut brain, &cluster, Micros(65 * S)), [moves(MoveReason::Delay, &[(0, 1)])]);
}

#[test]
fn traffic_that_nobody_reports_is_forgotten() {
    let (cluster, mut brain) = (cluster(), brain());
    let mut policy_off = cluster.clone();
    policy_off.policy.automatic = false;
    let poll = |brain: &mut Brain, groups: Vec<GroupReport>, at| {
        brain.handle_report(&report(0, groups), at);
        (1..3).for_each(|id| brain.handle_report(&report(id, vec![]), at));
        wishes(brain, &policy_off, at)
    };
    poll(&mut brain, vec![load(0, 10, 1)], Micros(3 * S));
    poll(&mut brain, vec![], Micros(63 * S));
    assert!(brain.demand(&group_id(0)).is_some());
    // The next round over all groups is after eight seconds.
    poll(&mut brain, vec![], Micros(71 * S));
    assert_eq!(brain.demand(&group_id(0)), None);
}

#[test]
fn a_group_whose_move_failed_is_left_alone_for_a_while() {
    let (mut cluster, mut brain) = (cluster(), brain());
    cluster.sites.get_mut(&SiteId(0)).unwrap().admin = Admin::Draining;
    cluster.policy.moves_in_flight_max = 2;
    let poll = |brain: &mut Brain, cluster: &Cluster, at| {
        for id in 0..3 {
            brain.handle_report(&report(id, vec![]), at);
        }
        wishes(brain, cluster, at)
    };
    let move_id = moving(&mut cluster, MovePhase::Preparing);
    assert_eq!(poll(&mut brain, &cluster, Micros(3 * S)), [moves(MoveReason::Drain, &[(1, 1)])]);
    let command = Command::Abort { move_id, by: None, reason: "no room".into() };
    cluster.apply(9, &Proposal { actor: "test".into(), at_ms: 0, command }).result.unwrap();
    assert_eq!(poll(&mut brain, &cluster, Micros(4 * S)), [moves(MoveReason::Drain, &[(1, 1), (2, 1)])]);
    assert_eq!(poll(&mut brain, &cluster, Micros(14 * S)), [moves(MoveReason::Drain, &[(0, 1), (1, 1)])]);
}

#[test]
fn groups_go_where_their_clients_come_in_if_that_gains_enough() {
    let mut cluster = cluster();
    let groups = || vec![load(0, 10, 1), load(1, 10, 2), load(2, 10, 0)];
    assert_eq!(solved(&cluster, groups()), [moves(MoveReason::Delay, &[(0, 1), (1, 2)])]);
    // Site 1 is 22 ms away, site 2 is 47.
    cluster.policy.min_gain_ms = 30.0;
    assert_eq!(solved(&cluster, groups()), [moves(MoveReason::Delay, &[(1, 2)])]);
    cluster.policy.automatic = false;
    assert_eq!(solved(&cluster, groups()), []);
}

#[test]
fn a_draining_site_is_emptied_within_the_budget_even_without_traffic() {
    let mut cluster = cluster();
    cluster.sites.get_mut(&SiteId(0)).unwrap().admin = Admin::Draining;
    cluster.policy.moves_in_flight_max = 3;
    cluster.policy.automatic = false;
    moving(&mut cluster, MovePhase::Preparing);
    assert_eq!(solved(&cluster, vec![]), [moves(MoveReason::Drain, &[(1, 1), (2, 1)])]);
}

#[test]
fn cordoned_dead_and_denied_sites_get_nothing_and_pins_are_kept() {
    let mut cluster = cluster();
    let groups = || vec![load(0, 10, 2)];
    cluster.sites.get_mut(&SiteId(2)).unwrap().admin = Admin::Cordoned;
    assert_eq!(solved(&cluster, groups()), [moves(MoveReason::Delay, &[(0, 1)])]);
    cluster.sites.get_mut(&SiteId(1)).unwrap().alive = false;
    assert_eq!(solved(&cluster, groups()), []);
    cluster.sites.get_mut(&SiteId(2)).unwrap().admin = Admin::Active;
    let clients = |n| group_id(n).prefix.to_string();
    let deny = |n, site| rule("deny", Some(&clients(n)), Kind::Deny([SiteId(site)].into()));
    cluster.policy.rules = vec![deny(0, 2)];
    assert_eq!(solved(&cluster, groups()), []);
    cluster.policy.rules = vec![deny(3, 0), rule("pin", Some(&clients(1)), Kind::Pin(SiteId(2)))];
    assert_eq!(solved(&cluster, vec![]), [moves(MoveReason::Operator, &[(1, 2), (3, 2)])],);
}

#[test]
fn a_surge_spills_to_the_next_best_site_with_room() {
    let mut cluster = cluster();
    cluster.sites.get_mut(&SiteId(1)).unwrap().capacity_pps = 600;
    let groups = vec![load(0, 400, 0), load(1, 400, 0), load(2, 400, 0), load(3, 400, 0)];
    // 1,600 of 1,000 at site 0; site 1 takes 480 with headroom, site 2 takes 800.
    assert_eq!(solved(&cluster, groups), [moves(MoveReason::Load, &[(0, 1), (1, 2)])]);
}

#[test]
fn the_owner_being_dead_nothing_moves() {
    let mut cluster = cluster();
    cluster.sites.get_mut(&SiteId(0)).unwrap().alive = false;
    assert_eq!(solved(&cluster, vec![load(0, 10, 1)]), []);
}

#[test]
fn explain_names_terms_sources_and_what_binds() {
    let mut cluster = cluster();
    cluster.sites.get_mut(&SiteId(2)).unwrap().admin = Admin::Cordoned;
    let mut model = Model::new(None);
    let peers = vec![PeerRtt { site: SiteId(1), rtt_us: 8_000 }];
    let groups = vec![load(0, 10, 1)];
    model.handle_report(&SiteReport { peers, groups, ..SiteReport::default() }, Micros(0));
    let explained = explain(&cluster, &model, &group_id(0), Micros(5)).unwrap();
    assert_eq!((explained.owner, explained.best), (SiteId(0), Some(SiteId(1))));
    assert!((explained.gain_ms - 4.0).abs() < 0.01);
    let order: Vec<_> = explained.candidates.iter().map(|c| (c.site.0, c.blocked.clone())).collect();
    assert_eq!(order, [(1, None), (0, None), (2, Some(Blocked::Cordoned))]);
    assert_eq!(explained.candidates[1].terms.legs[0].1.source, Source::Measured { age: Micros(5) });
    assert_eq!(explained.candidates[2].terms.legs[0].1.source, Source::Geography);
    assert_eq!(explain(&cluster, &model, &group_id(9), Micros(5)), None);
}

#[test]
fn an_assessment_says_what_is_best_and_proves_it() {
    let (cluster, mut model) = (cluster(), Model::new(None));
    // Group 0's packets come in and go out at site 2, 40 degrees from its owner; group 1 is where it should be.
    let mut far = load(0, 300, 2);
    far.outside_ingress = vec![(SiteId(2), 1)];
    model.handle_report(&report(0, vec![far, load(1, 100, 0)]), Micros(0));
    let assessment = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    assert_eq!((assessment.groups, assessment.moves, assessment.stranded), (2, 1, 0));
    assert_eq!(assessment.packets_per_s, 400.0);
    // 4,448 km twice, for three packets of four; light needs no time from site 2 to itself.
    assert!((assessment.delay_ms - 0.75 * 2.0 * 47.36).abs() < 0.5, "{assessment:?}");
    assert!(assessment.best_ms < 0.1 && assessment.bound_ms <= assessment.best_ms, "{assessment:?}");
    assert_eq!(assessment.light_ms, 0.0);
    let carried: Vec<_> =
        assessment.sites.iter().map(|site| (site.packets_per_s, site.best_packets_per_s)).collect();
    assert_eq!(carried, [(400.0, 100.0), (0.0, 0.0), (0.0, 300.0)]);
}

#[test]
fn an_assessment_tells_delay_and_prices_of_rules_apart() {
    let (mut cluster, mut model) = (cluster(), Model::new(None));
    model.handle_report(&report(0, vec![load(0, 300, 2), load(1, 100, 0)]), Micros(0));
    let assess = |cluster: &Cluster| super::assess::assess(cluster, &model, Micros(0)).unwrap().unwrap();
    let free = assess(&cluster);
    assert_eq!((free.rules_ms, free.best_rules_ms), (0.0, 0.0));
    // Nothing is within it anywhere, so everything is charged for it.
    cluster.policy.rules = vec![rule("slo", None, Kind::Slo(Slo { delay_ms: 0.0 }))];
    cluster.policy.rules[0].price_ms = Some(500.0);
    let (dear, close) = (assess(&cluster), |a: f64, b: f64| (a - b).abs() < 1e-2);
    assert!(close(dear.delay_ms, free.delay_ms) && close(dear.best_ms, free.best_ms), "{dear:?} {free:?}");
    assert!(dear.rules_ms > 100.0 && dear.rules_ms <= 500.0, "{dear:?}");
    assert!(dear.bound_ms <= dear.best_ms + dear.best_rules_ms + 1e-3, "{dear:?}");
}

#[test]
fn what_is_there_now_and_what_is_best_are_compared_within_one_room() {
    let (mut cluster, mut model) = (cluster(), Model::new(None));
    cluster.policy.headroom = 0.1;
    model.handle_report(&report(0, vec![load(0, 475, 0), load(1, 475, 0)]), Micros(0));
    let found = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    // 950 of 1,000 are above the headroom and within the capacity: it is the best, and nothing has to leave.
    assert_eq!((found.moves, found.sites[0].room_packets_per_s), (0, 950.0));
    assert!(found.best_ms <= found.delay_ms && found.bound_ms <= found.delay_ms + 1e-6, "{found:?}");
}

#[test]
fn an_assessment_names_what_does_not_fit_and_leaves_out_closed_sites() {
    let (mut cluster, mut model) = (cluster(), Model::new(None));
    cluster.policy.headroom = 0.0;
    cluster.sites.get_mut(&SiteId(1)).unwrap().admin = Admin::Draining;
    cluster.sites.get_mut(&SiteId(2)).unwrap().alive = false;
    model.handle_report(&report(0, vec![load(0, 700, 0), load(1, 700, 0)]), Micros(0));
    let assessment = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    assert_eq!(assessment.gap, None);
    assert_eq!(assessment.shortages.len(), 1);
    assert_eq!(assessment.shortages[0].sites, [SiteId(0)]);
    assert_eq!(assessment.shortages[0].groups, [group_id(0), group_id(1)]);
    cluster.sites.get_mut(&SiteId(0)).unwrap().alive = false;
    let stranded = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    assert_eq!((stranded.stranded, stranded.groups), (2, 0));
    assert!(super::assess::assess(&Cluster::default(), &model, Micros(0)).unwrap().is_none());
}

/// Groups at the last of 18 sites a degree apart.
fn many_sites(capacity_pps: u64) -> Cluster {
    let mut cluster = cluster();
    cluster.policy.headroom = 0.0;
    let sites = (0..18_u8).map(|id| (SiteId(id), Site { capacity_pps, ..site(id, f64::from(id)) }));
    cluster.sites = sites.collect();
    cluster.groups.values_mut().for_each(|group| group.owner = SiteId(17));
    cluster
}

#[test]
fn an_assessment_of_many_sites_looks_at_the_owner_and_bounds_them_all() {
    let mut model = Model::new(None);
    model.handle_report(&report(17, vec![load(0, 100, 0)]), Micros(0));
    let far = super::assess::assess(&many_sites(1000), &model, Micros(0)).unwrap().unwrap();
    assert_eq!(far.moves, 1);
    assert!(far.bound_ms <= far.best_ms && far.gap.unwrap() < 1e-6, "{far:?}");

    // 100 packets fit nowhere, at none of the sites, those that were left out among them.
    let cluster = many_sites(5);
    let short = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    assert_eq!(short.gap, None);
    assert!(short.shortages.len() == 1 && short.shortages[0].sites.len() == 18, "{short:?}");
    assert_eq!(short.shortages[0].groups, [group_id(0)]);
    let explained = explain(&cluster, &model, &group_id(0), Micros(0)).unwrap();
    let left_out = explained.candidates.iter().find(|candidate| candidate.site == SiteId(15)).unwrap();
    assert!(short.bound_ms <= left_out.total_ms + 1e-3, "{} is above {}", short.bound_ms, left_out.total_ms);
}

#[test]
fn groups_that_no_site_may_have_do_not_count() {
    let (mut cluster, mut model) = (cluster(), Model::new(None));
    model.handle_report(&report(0, vec![load(0, 300, 2), load(1, 100, 0)]), Micros(0));
    let all = Kind::Deny([0, 1, 2].map(SiteId).into());
    cluster.policy.rules = vec![rule("nowhere", Some(&group_id(0).prefix.to_string()), all)];
    let assessment = super::assess::assess(&cluster, &model, Micros(0)).unwrap().unwrap();
    assert_eq!((assessment.groups, assessment.stranded, assessment.packets_per_s), (1, 1, 100.0));
    assert!((assessment.delay_ms - assessment.best_ms).abs() < 1e-4, "{assessment:?}");
}

/// A report of site 0 of what group 0 talks to, and of site 1, which measures for others.
fn doubtful(brain: &mut Brain, servers: u8, at: Micros) {
    let prefix = |n: u8| format!("203.0.{n}.0/24").parse().unwrap();
    let seen = |n: u8| ServerRtt {
        prefix: prefix(n),
        ingress: Some(SiteId(1)),
        count: 9,
        min_us: 90_000,
        mean_us: 90_000,
        answered: Some(format!("203.0.{n}.1:443").parse().unwrap()),
    };
    for site in 0..3 {
        let group = GroupReport { outside_ingress: vec![(SiteId(1), 1)], ..load(0, 100, 0) };
        let mut report = SiteReport { probes_per_s: u16::from(site == 1), ..report(site, vec![]) };
        if site == 0 {
            report.groups = vec![group];
            report.servers = (0..servers).map(seen).collect();
            let servers = (0..servers).map(|n| (prefix(n), 9 + u32::from(n))).collect();
            report.talks = vec![GroupTalk { group: group_id(0), servers }];
        }
        brain.handle_report(&report, at);
    }
}

fn asked(brain: &mut Brain, site: u8, probes_per_s: u16, at: Micros) -> Vec<String> {
    let report = SiteReport { probes_per_s, ..report(site, vec![]) };
    brain.probes(&report, at).iter().map(|probe| probe.prefix.to_string()).collect()
}

#[test]
fn a_site_is_asked_within_its_rate_and_for_a_server_once_in_a_while() {
    let (cluster, mut brain) = (cluster(), brain());
    let round = |brain: &mut Brain, s: u64| {
        doubtful(brain, 2, Micros(s * S));
        brain.poll(&cluster, Micros(s * S));
    };
    assert_eq!(asked(&mut brain, 1, 1, Micros(0)), [] as [&str; 0], "nothing is known yet");
    round(&mut brain, 3);
    assert_eq!(asked(&mut brain, 1, 0, Micros(3 * S)), [] as [&str; 0], "it is not willing");
    // One per second, and at most two at once; the server with the most handshakes comes first.
    assert_eq!(asked(&mut brain, 1, 1, Micros(3 * S + 1)), [] as [&str; 0], "not yet");
    assert_eq!(asked(&mut brain, 1, 1, Micros(4 * S + 1)), ["203.0.1.0/24"]);
    assert_eq!(asked(&mut brain, 1, 1, Micros(4 * S + 2)), [] as [&str; 0]);
    assert_eq!(asked(&mut brain, 1, 1, Micros(9 * S)), ["203.0.0.0/24"]);
    round(&mut brain, 10);
    assert_eq!(asked(&mut brain, 1, 1, Micros(20 * S)), [] as [&str; 0], "both were asked for");
    for s in [309, 310] {
        round(&mut brain, s);
    }
    assert_eq!(asked(&mut brain, 1, 1, Micros(310 * S)), ["203.0.1.0/24", "203.0.0.0/24"]);
}

#[test]
fn a_server_that_never_answers_does_not_keep_others_from_being_asked_for() {
    let (cluster, mut brain) = (cluster(), brain());
    let round = |brain: &mut Brain, s: u64| {
        for (n, packets_per_s) in [(0, 1000), (1, 10)] {
            let mut owner = report(0, vec![load(n, packets_per_s, 0)]);
            owner.groups[0].outside_ingress = vec![(SiteId(1), 1)];
            let prefix = format!("203.0.{n}.0/24").parse().unwrap();
            owner.servers = vec![ServerRtt {
                prefix,
                ingress: Some(SiteId(1)),
                count: 9,
                min_us: 90_000,
                mean_us: 90_000,
                answered: Some(format!("203.0.{n}.1:443").parse().unwrap()),
            }];
            owner.talks = vec![GroupTalk { group: group_id(n), servers: vec![(prefix, 9)] }];
            brain.handle_report(&owner, Micros(s * S));
        }
        for site in 1..3 {
            let probes_per_s = u16::from(site == 1);
            brain.handle_report(&SiteReport { probes_per_s, ..report(site, vec![]) }, Micros(s * S));
        }
        brain.poll(&cluster, Micros(s * S));
        asked(brain, 1, 1, Micros(s * S))
    };
    let all: Vec<_> = (3..9).flat_map(|s| round(&mut brain, s)).collect();
    assert_eq!(all, ["203.0.0.0/24", "203.0.1.0/24"], "the heavier group first, and each once");
}
