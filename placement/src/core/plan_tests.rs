//! Rounds of the leader until nothing moves any more: they end, keep every rule, and improve what they touch.

use std::collections::BTreeMap;

use flow::{Micros, SiteId};
use proptest::prelude::*;

use super::brain_tests::{cluster, group_id, load, planned, report, rule, site};
use super::delay::Model;
use super::plan::{Readiness, plan};
use super::*;

const READY: Readiness<'_> = Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };

/// Rounds until nothing is started, each started move done at once; the number of moves.
fn settle(cluster: &mut Cluster, model: &Model) -> usize {
    let mut moves = 0;
    for _ in 0..64 {
        let plan = plan(cluster, model, &READY, Micros(1));
        cluster.round = plan.round;
        if plan.commands.is_empty() {
            return moves;
        }
        for command in plan.commands {
            let Command::StartMoves { moves: started, .. } = command else { panic!("{command:?}") };
            moves += started.len();
            for (group, to) in started {
                let group = cluster.groups.get_mut(&group).unwrap();
                assert_ne!(group.owner, to);
                (group.owner, group.epoch) = (to, group.epoch.next());
            }
        }
    }
    panic!("64 rounds and still moving: {:?}", cluster.round);
}

fn carried(cluster: &Cluster, model: &Model) -> BTreeMap<SiteId, f64> {
    let mut carried = BTreeMap::new();
    for group in cluster.groups.values() {
        *carried.entry(group.owner).or_insert(0.0) += model.load(&group.id);
    }
    carried
}

fn owners(cluster: &Cluster) -> Vec<u8> {
    cluster.groups.values().map(|group| group.owner.0).collect()
}

#[test]
fn one_makes_way_where_that_helps_another_more() {
    let mut cluster = cluster();
    cluster.policy.headroom = 0.0;
    cluster.policy.min_gain_ms = 0.5;
    // Site 1 holds one group. Group 0, at home between 0 and 1, has its place; group 1 needs it more.
    cluster.sites.get_mut(&SiteId(1)).unwrap().capacity_pps = 300;
    cluster.groups.get_mut(&group_id(0)).unwrap().owner = SiteId(1);
    cluster.groups.get_mut(&group_id(1)).unwrap().owner = SiteId(2);
    let mut between = load(0, 300, 1);
    between.inside_ingress = vec![(SiteId(0), 40), (SiteId(1), 60)];
    let mut model = Model::new(None);
    model.handle_report(&report(0, vec![between, load(1, 300, 1)]), Micros(0));
    settle(&mut cluster, &model);
    assert_eq!(owners(&cluster)[..2], [0, 1]);
}

#[test]
fn a_load_that_sways_between_headroom_and_capacity_moves_nobody() {
    let mut cluster = cluster();
    for packets in [199, 210, 240, 249, 205, 249, 201] {
        let plan = planned(&cluster, (0..4).map(|n| load(n, packets, 0)).collect());
        assert_eq!(plan.commands, [], "{packets}");
        cluster.round = plan.round;
    }
    // Above the capacity: two of four leave, so that the headroom is free again.
    let plan = planned(&cluster, (0..4).map(|n| load(n, 260, 0)).collect());
    let [Command::StartMoves { moves, reason: MoveReason::Load }] = &plan.commands[..] else {
        panic!("{plan:?}")
    };
    assert_eq!(moves.len(), 1);
    assert!(moves.iter().all(|(_, to)| *to == SiteId(1)));
}

#[test]
fn flows_and_bits_are_limits_as_packets_are() {
    for limit in [0, 1] {
        let mut cluster = cluster();
        cluster.policy.headroom = 0.0;
        let full = cluster.sites.get_mut(&SiteId(1)).unwrap();
        (full.capacity_flows, full.capacity_bps) = [(Some(150), None), (None, Some(1_500))][limit];
        let wants = |n| GroupReport { flows: 100, bits_per_s: 1_000, ..load(n, 10, 1) };
        let plan = planned(&cluster, (0..2).map(wants).collect());
        let [Command::StartMoves { moves, .. }] = &plan.commands[..] else { panic!("{plan:?}") };
        assert_eq!(moves.len(), 1, "site 1 has room for one, and site 2 is farther than site 0");
        let round = plan.round.unwrap();
        let price = round.prices[1].values()[limit + 1];
        assert!(price > 0.0 && round.gap.is_some(), "{round:?}");
    }
}

#[test]
fn a_round_says_what_it_brought_and_what_it_costs_to_prove_it() {
    let plan = planned(&cluster(), vec![load(0, 300, 2), load(1, 100, 0)]);
    let round = plan.round.unwrap();
    assert_eq!((round.groups, round.packets_per_s, round.moves, round.started), (2, 400.0, 1, 1));
    assert!(round.planned_ms < 0.1 && round.delay_ms > 20.0, "{round:?}");
    // Three packets of four move, and that is charged with 5 ms.
    assert!((round.objective_ms - round.planned_ms - 0.75 * 5.0).abs() < 1e-3, "{round:?}");
    assert!(round.bound_ms <= round.objective_ms && round.gap.unwrap() < 1e-3, "{round:?}");
    assert!(serde_json::to_vec(&round).unwrap().len() < 1_000);
}

#[test]
fn a_round_is_published_when_it_tells_more_and_its_size_does_not_grow_with_groups() {
    let few = planned(&cluster(), vec![load(0, 300, 2)]).round.unwrap();
    assert!(few.tells_more(None) && few.tells_more(Some(&few)), "it starts a move");
    let idle = planned(&cluster(), vec![load(0, 300, 0)]).round.unwrap();
    assert!(!idle.tells_more(Some(&idle)));
    let fuller = planned(&cluster(), vec![load(0, 400, 0)]).round.unwrap();
    assert!(fuller.tells_more(Some(&idle)));
}

/// A cluster of up to 5 sites with up to 12 groups, some rules, and what is known of the traffic.
fn any_cluster() -> impl Strategy<Value = (Cluster, SiteReport)> {
    let sites = proptest::collection::vec((0u64..4, -60.0..60.0f64), 2..6);
    let groups = proptest::collection::vec((0u8..5, 0u64..4, 0u8..5, 0u8..5), 1..13);
    let rules = proptest::collection::vec((0u8..6, 0u8..12, 0u8..5), 0..4);
    let admin = proptest::collection::vec((0u8..8, 0u8..5), 0..2);
    (sites, groups, rules, admin).prop_map(|(sites, groups, rules, admin)| {
        let count = sites.len() as u8;
        let mut cluster = cluster();
        cluster.policy.moves_in_flight_max = 3;
        cluster.policy.min_gain_ms = 1.0;
        let place = |(id, (capacity, at)): (u8, (u64, f64))| {
            (SiteId(id), Site { capacity_pps: 200 + 300 * capacity, ..site(id, at) })
        };
        cluster.sites = (0..count).zip(sites).map(place).collect();
        for (what, id) in admin {
            let site = cluster.sites.get_mut(&SiteId(id % count)).unwrap();
            match what {
                0 => site.alive = false,
                1 => site.admin = Admin::Cordoned,
                _ => site.admin = Admin::Draining,
            }
        }
        let mut reports = Vec::new();
        let template = cluster.groups[&group_id(0)];
        cluster.groups.clear();
        for (n, (owner, packets, inside, outside)) in (0..).zip(groups) {
            let id = group_id(n);
            cluster.groups.insert(id, Group { id, owner: SiteId(owner % count), ..template });
            reports.push(GroupReport {
                outside_ingress: vec![(SiteId(outside % count), 1)],
                ..load(n, packets * 100, inside % count)
            });
        }
        for (n, (kind, at, place)) in rules.into_iter().enumerate() {
            let place = SiteId(place % count);
            let kind = match kind {
                0 => Kind::Pin(place),
                1 => Kind::Deny([place].into()),
                2 => Kind::Allow([place, SiteId(0)].into()),
                3 => Kind::Dial(Dial { site: place, share: 0.5 }),
                4 => Kind::Drain(Drain { site: place, moves_per_minute: None, deadline_ms: None }),
                _ => Kind::Slo(Slo { delay_ms: 10.0 }),
            };
            // Rules for all come first, so that later ones are more specific.
            let clients = (n > 0).then(|| group_id(at).prefix.to_string());
            cluster.policy.rules.push(rule(&n.to_string(), clients.as_deref(), kind));
        }
        (cluster, report(0, reports))
    })
}

fn model(seen: &SiteReport) -> Model {
    let mut model = Model::new(None);
    model.handle_report(seen, Micros(0));
    model
}

/// The rules of a plan's moves, checked against the state before it.
fn check_moves(cluster: &Cluster, commands: &[Command]) -> Result<(), TestCaseError> {
    for command in commands {
        let Command::StartMoves { moves, .. } = command else { panic!("{command:?}") };
        for (group, to) in moves {
            prop_assert!(cluster.sites[to].takes_groups());
            prop_assert!(cluster.policy.forbidding(group, *to).is_none());
            prop_assert!(cluster.sites[&cluster.groups[group].owner].alive);
        }
    }
    let len =
        |command: &Command| if let Command::StartMoves { moves, .. } = command { moves.len() } else { 0 };
    let moves: usize = commands.iter().map(len).sum();
    prop_assert!(moves <= cluster.policy.moves_in_flight_max as usize);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every node would give the same answer, and the state machine takes it.
    #[test]
    fn a_plan_is_lawful_and_the_same_everywhere((mut cluster, seen) in any_cluster()) {
        let model = model(&seen);
        let once = plan(&cluster, &model, &READY, Micros(1));
        let json = serde_json::to_vec(&cluster).unwrap();
        let elsewhere: Cluster = serde_json::from_slice(&json).unwrap();
        prop_assert_eq!(&once, &plan(&elsewhere, &model, &READY, Micros(1)));
        check_moves(&cluster, &once.commands)?;
        for command in once.commands {
            let applied = cluster.apply(9, &Proposal { actor: "test".into(), at_ms: 0, command });
            prop_assert!(applied.result.is_ok(), "{:?}", applied.result);
        }
    }

    /// Rounds come to an end: under the same demand nothing moves to and fro. Where they end, a site above its capacity is one
    /// that no move can help.
    #[test]
    fn rounds_settle_within_capacities((mut cluster, seen) in any_cluster()) {
        let model = model(&seen);
        settle(&mut cluster, &model);
        let round = cluster.round.clone().unwrap();
        prop_assert!(round.prices.iter().all(|price| price.values().iter().all(|value| *value >= 0.0)));
        if !round.exceeded.is_empty() {
            return Ok(());
        }
        let carried = carried(&cluster, &model);
        let room = |site: &Site| site.capacity_pps as f64 - carried.get(&site.id).copied().unwrap_or(0.0);
        for full in cluster.sites.values().filter(|site| site.alive && room(site) < 0.0) {
            for group in cluster.groups.values().filter(|group| group.owner == full.id && model.load(&group.id) > 0.0) {
                let open = |site: &&Site| site.takes_groups() && cluster.policy.forbidding(&group.id, site.id).is_none();
                let most = cluster.sites.values().filter(open).map(room).fold(0.0, f64::max);
                prop_assert!(model.load(&group.id) > most, "{} could leave site {}", group.id, full.id);
            }
        }
    }
}
