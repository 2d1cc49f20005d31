//! Rules about groups together: spread, kept apart, with a standby; and drains with a deadline.

use std::collections::{BTreeMap, BTreeSet};

use flow::{GroupId, Micros, SiteId};
use proptest::prelude::*;

use super::brain_tests::{cluster, group_id, load, report, rule, site};
use super::delay::Model;
use super::plan::{Plan, Readiness, plan};
use super::*;

/// Four sites 1,700 km apart, the first two in one metro; groups 0 to 7, all at site 0, which is where their clients are.
fn world(rules: Vec<Rule>) -> (Cluster, Model) {
    let mut cluster = cluster();
    let place = |id: u8| Site { capacity_pps: 10_000, ..site(id, f64::from(id) * 15.0) };
    cluster.sites = (0..4).map(|id| (SiteId(id), place(id))).collect();
    for id in 0..2 {
        cluster.sites.get_mut(&SiteId(id)).unwrap().failure_domain = Some("metro".into());
    }
    let template = cluster.groups[&group_id(0)];
    cluster.groups = (0..8).map(|n| (group_id(n), Group { id: group_id(n), ..template })).collect();
    cluster.policy.rules = rules;
    let mut model = Model::new(None);
    model.handle_report(&report(0, (0..8).map(|n| load(n, 100, 0)).collect()), Micros(0));
    (cluster, model)
}

fn round(cluster: &Cluster, model: &Model) -> Plan {
    plan(
        cluster,
        model,
        &Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None },
        Micros(1),
    )
}

fn apply(cluster: &mut Cluster, command: Command) -> Result<Outcome, Rejected> {
    let index = cluster.revision.max(100) + 1;
    cluster.revision = index;
    cluster.apply(index, &Proposal { actor: "leader".into(), at_ms: 0, command }).result
}

/// Plays rounds with all that they start until nothing moves; checks after each command.
fn settle(cluster: &mut Cluster, model: &Model, check: impl Fn(&Cluster)) {
    for _ in 0..20 {
        let commands = round(cluster, model).commands;
        if commands.is_empty() {
            return;
        }
        for command in commands {
            apply(cluster, command).unwrap();
            check(cluster);
        }
        for present in cluster.moves.values().cloned().collect::<Vec<_>>() {
            apply(cluster, Command::Switch { move_id: present.id, by: present.from }).unwrap();
            let summary = MoveSummary::default();
            apply(cluster, Command::Served { move_id: present.id, by: present.to, summary }).unwrap();
            check(cluster);
        }
    }
    panic!("no rest after 20 rounds: {:?}", owners(cluster));
}

fn owners(cluster: &Cluster) -> BTreeMap<u8, usize> {
    let mut owners = BTreeMap::new();
    cluster.groups.values().for_each(|group| *owners.entry(group.owner.0).or_insert(0) += 1);
    owners
}

fn put(cluster: &mut Cluster, policy: Policy) -> Result<Outcome, Rejected> {
    let expected_version = cluster.policy_version;
    apply(cluster, Command::PutPolicy { policy, expected_version, confirm_within_ms: None })
}

fn spread(share: f64, by: Place) -> Rule {
    rule("spread", None, Kind::Spread(Spread { share, by }))
}

fn labelled(labels: &[(&str, &str)], rules: Vec<Rule>) -> Policy {
    let mut policy = Policy { rules, ..Policy::default() };
    for (label, prefix) in labels {
        policy.labels.entry((*label).to_owned()).or_default().push(prefix.parse().unwrap());
    }
    policy
}

fn separate(labels: &[&str]) -> Rule {
    rule("apart", None, Kind::Separate(labels.iter().map(|label| (*label).to_owned()).collect()))
}

#[test]
fn the_new_kinds_are_written_flat_and_read_back_as_they_were() {
    for text in [
        r#"{"name":"a","spread":{"share":0.5,"by":"domain"}}"#,
        r#"{"name":"b","separate":["east","west"]}"#,
        r#"{"name":"c","standby":"any"}"#,
        r#"{"name":"d","label":"gold","standby":[1,2]}"#,
        r#"{"name":"e","drain":{"site":1,"deadline_ms":7}}"#,
    ] {
        let rule: Rule = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&rule).unwrap(), text);
    }
}

#[test]
fn no_site_gets_more_than_its_share_of_the_groups() {
    let (mut cluster, model) = world(vec![spread(0.25, Place::Site)]);
    settle(&mut cluster, &model, |_| {});
    assert_eq!(owners(&cluster), BTreeMap::from([(0, 2), (1, 2), (2, 2), (3, 2)]));
}

#[test]
fn sites_of_one_failure_domain_share_a_share() {
    let (mut cluster, model) = world(vec![spread(0.5, Place::Domain)]);
    settle(&mut cluster, &model, |_| {});
    // Site 0 is nearest to all, then 1, which is in its domain, then 2.
    assert_eq!(owners(&cluster), BTreeMap::from([(0, 4), (2, 4)]));
    // An operator cannot break it either.
    let refused = Command::StartMoves { moves: vec![(group_id(7), SiteId(1))], reason: MoveReason::Operator };
    let at_two = cluster.groups.values().find(|group| group.owner == SiteId(2)).unwrap().id;
    let moves = Command::StartMoves { moves: vec![(at_two, SiteId(1))], reason: MoveReason::Operator };
    let error = apply(&mut cluster, moves).unwrap_err().to_string();
    assert!(error.contains("must not be at site 1 by rule \"spread\""), "{error}");
    let within = cluster.groups[&group_id(7)].owner == SiteId(0);
    assert_eq!(apply(&mut cluster, refused).is_ok(), within);
}

#[test]
fn groups_without_traffic_count_and_move_only_when_there_are_too_many() {
    let (mut cluster, _) = world(vec![spread(0.5, Place::Site)]);
    let mut model = Model::new(None);
    model.handle_report(&report(0, vec![load(0, 100, 0), load(1, 100, 0)]), Micros(0));
    settle(&mut cluster, &model, |_| {});
    assert_eq!(owners(&cluster)[&0], 4);
    assert!(
        (0..2).all(|n| cluster.groups[&group_id(n)].owner == SiteId(0)),
        "those with traffic stay where they are nearest"
    );
}

#[test]
fn a_spread_that_cannot_be_is_refused_with_the_rules_in_its_way() {
    let (mut cluster, _) = world(vec![]);
    let near = rule("near", None, Kind::Allow([SiteId(0), SiteId(1), SiteId(2)].into()));
    let not_two = rule("not two", Some("100.64.0.0/21"), Kind::Deny([SiteId(2)].into()));
    let far = rule("far", None, Kind::Cost([SiteId(3)].into()));
    let far = Rule { price_ms: Some(1.0), ..far };
    let policy = Policy { rules: vec![far, near, not_two, spread(0.5, Place::Domain)], ..Policy::default() };
    assert_eq!(
        put(&mut cluster, policy).unwrap_err().to_string(),
        "rules \"near\" and \"not two\" and \"spread\" cannot all hold for group 1:100.64.0.0/24 and others: each \
         place may have 4 of 8 groups, and they have too few places that they may be in"
    );
    // By sites it can be.
    let near = rule("near", None, Kind::Allow([SiteId(0), SiteId(1)].into()));
    put(&mut cluster, Policy { rules: vec![near, spread(0.5, Place::Site)], ..Policy::default() }).unwrap();
}

#[test]
fn labels_that_are_kept_apart_end_in_different_domains_and_never_meet_on_the_way() {
    let (mut cluster, model) = world(vec![]);
    let labels = [("east", "100.64.0.0/23"), ("west", "100.64.2.0/23")];
    put(&mut cluster, labelled(&labels, vec![separate(&["east", "west"])])).unwrap();
    settle(&mut cluster, &model, |_| {});
    let sites = |groups: std::ops::Range<u8>| -> BTreeSet<SiteId> {
        groups.map(|n| cluster.groups[&group_id(n)].owner).collect()
    };
    let (east, west) = (sites(0..2), sites(2..4));
    let metro = |sites: &BTreeSet<SiteId>| sites.iter().any(|site| site.0 < 2);
    assert!(metro(&east) != metro(&west) && east.is_disjoint(&west), "{east:?} {west:?}");
    // Groups of no label stay at the nearest site.
    assert_eq!(sites(4..8), [SiteId(0)].into());
    // Once they are apart, nobody may join them again.
    let stray = if metro(&east) { group_id(2) } else { group_id(0) };
    let moves = Command::StartMoves { moves: vec![(stray, SiteId(0))], reason: MoveReason::Operator };
    let error = apply(&mut cluster, moves).unwrap_err().to_string();
    assert!(error.contains("by rule \"apart\""), "{error}");
}

#[test]
fn labels_that_cannot_be_kept_apart_are_refused_with_the_rules_in_their_way() {
    let (mut cluster, _) = world(vec![]);
    let labels = [("east", "100.64.0.0/23"), ("west", "100.64.2.0/23")];
    let home = rule("home", Some("100.64.0.0/22"), Kind::Allow([SiteId(0), SiteId(1)].into()));
    let error = put(&mut cluster, labelled(&labels, vec![home.clone(), separate(&["east", "west"])]));
    assert_eq!(
        error.unwrap_err().to_string(),
        "rules \"home\" and \"apart\" cannot all hold for group 1:100.64.0.0/24 and others: its labels have too few \
         failure domains to be kept apart in"
    );
    let overlapping = [("east", "100.64.0.0/22"), ("west", "100.64.2.0/23")];
    let error = put(&mut cluster, labelled(&overlapping, vec![separate(&["east", "west"])])).unwrap_err();
    assert!(error.to_string().contains("overlap: give each client one label"), "{error}");
    let error = put(&mut cluster, labelled(&labels, vec![separate(&["east", "north"])])).unwrap_err();
    assert!(error.to_string().contains("label \"north\" is not among the labels"), "{error}");
}

#[test]
fn standbys_are_in_another_domain_and_follow_their_group() {
    let (mut cluster, model) = world(vec![rule("twice", Some("100.64.0.0/23"), Kind::Standby([].into()))]);
    settle(&mut cluster, &model, |_| {});
    // Site 2 is the nearest outside the metro.
    let standby = |cluster: &Cluster, n| cluster.groups[&group_id(n)].standby;
    assert_eq!((standby(&cluster, 0), standby(&cluster, 1)), (Some(SiteId(2)), Some(SiteId(2))));
    assert_eq!(standby(&cluster, 2), None);
    // What is moved to its standby gets another.
    let moves = vec![(group_id(0), SiteId(2))];
    apply(&mut cluster, Command::StartMoves { moves, reason: MoveReason::Operator }).unwrap();
    let present = cluster.move_of(&group_id(0)).unwrap().clone();
    apply(&mut cluster, Command::Switch { move_id: present.id, by: SiteId(0) }).unwrap();
    let summary = MoveSummary::default();
    apply(&mut cluster, Command::Served { move_id: present.id, by: SiteId(2), summary }).unwrap();
    assert_eq!(standby(&cluster, 0), None);
    // Also while it may not move.
    cluster.policy.automatic = false;
    settle(&mut cluster, &model, |_| {});
    assert_eq!((cluster.groups[&group_id(0)].owner, standby(&cluster, 0)), (SiteId(2), Some(SiteId(0))));
    assert_eq!(round(&cluster, &model).round.unwrap().unprotected, 0);
    // Without the rule nobody has one.
    put(&mut cluster, Policy::default()).unwrap();
    settle(&mut cluster, &model, |_| {});
    assert!(cluster.groups.values().all(|group| group.standby.is_none()));
}

#[test]
fn a_group_that_waits_to_move_has_a_standby_where_it_is() {
    // The plan takes group 6 out of the metro and has its standby there; nobody gains by that plan, so nobody moves.
    let (mut cluster, _) = world(vec![]);
    for (n, owner) in (0..).zip([0, 2, 0, 2, 0, 0, 1, 0]) {
        cluster.groups.get_mut(&group_id(n)).unwrap().owner = SiteId(owner);
    }
    let mut model = Model::new(None);
    let loads = (0..).zip([2, 0, 0, 1, 2, 2, 2, 0]).map(|(n, ingress)| load(n, 100, ingress)).collect();
    model.handle_report(&report(0, loads), Micros(0));
    let rules = vec![
        spread(0.4, Place::Domain),
        rule("allow", Some("100.64.0.0/23"), Kind::Allow([SiteId(1), SiteId(2)].into())),
        rule("standby", Some("100.64.4.0/22"), Kind::Standby([].into())),
    ];
    put(&mut cluster, Policy { rules, ..Policy::default() }).unwrap();
    settle(&mut cluster, &model, |_| {});
    for n in 4..8 {
        let Group { owner, standby, .. } = cluster.groups[&group_id(n)];
        assert!(standby.is_some_and(|site| site.0.max(1) != owner.0.max(1)), "{n}: {owner} {standby:?}");
    }
    assert_eq!(round(&cluster, &model).round.unwrap().unprotected, 0);
}

#[test]
fn a_standby_is_one_of_the_sites_that_the_rule_names() {
    let (mut cluster, model) = world(vec![rule("there", None, Kind::Standby([SiteId(3)].into()))]);
    settle(&mut cluster, &model, |_| {});
    assert!(cluster.groups.values().all(|group| group.standby == Some(SiteId(3))));
    let standbys = vec![(group_id(0), Some(SiteId(1)))];
    let error = apply(&mut cluster, Command::SetStandbys { standbys }).unwrap_err().to_string();
    assert!(error.contains("it is in the failure domain of its owner, site 0"), "{error}");
}

#[test]
fn room_is_kept_for_the_loss_of_any_domain_and_who_finds_none_is_counted() {
    let (mut cluster, model) = world(vec![]);
    cluster.policy.headroom = 0.0;
    cluster.policy.survive_loss = true;
    // 800 packets in all; without the metro 500 are left for them.
    for (id, capacity_pps) in [(0, 1000), (1, 1000), (2, 400), (3, 100)] {
        cluster.sites.get_mut(&SiteId(id)).unwrap().capacity_pps = capacity_pps;
    }
    let unprotected = |cluster: &Cluster| round(cluster, &model).round.unwrap().unprotected;
    assert!(unprotected(&cluster) > 0);
    cluster.sites.get_mut(&SiteId(2)).unwrap().capacity_pps = 1_000;
    assert_eq!(unprotected(&cluster), 0);
    assert!(cluster.groups.values().all(|group| group.standby.is_none()), "no rule asked for them");
}

#[test]
fn a_drain_with_a_deadline_leaves_evenly() {
    let drain = |moves_per_minute, deadline_ms| {
        let drain = Drain { site: SiteId(0), moves_per_minute, deadline_ms };
        world(vec![rule("drain", None, Kind::Drain(drain))])
    };
    let started = |(cluster, model): &(Cluster, Model), wall_ms| {
        let ready = Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms };
        plan(cluster, model, &ready, Micros(1)).round.unwrap().started
    };
    let minutes = |n: u64| Some(n * 60_000);
    let paced = drain(None, minutes(10));
    // Eight groups: two a minute when four minutes are left, all in the last, and when time is up.
    assert_eq!(started(&paced, minutes(6)), 2);
    assert_eq!(started(&paced, minutes(2)), 1);
    assert_eq!(started(&paced, Some(600_000 - 30_000)), 8);
    assert_eq!(started(&paced, minutes(11)), 8);
    assert_eq!(started(&paced, None), 8);
    // A rate is a rate, deadline or not.
    assert_eq!(started(&drain(Some(1), minutes(10)), minutes(9)), 1);
}

fn any_rules() -> impl Strategy<Value = (Vec<Rule>, bool)> {
    // With 0.25 the eight groups fill every place, and nobody could move at all.
    let share = prop_oneof![Just(0.4), Just(0.5), Just(0.7)];
    let by = prop_oneof![Just(Place::Site), Just(Place::Domain)];
    let allow = proptest::option::of(1_u8..16);
    (proptest::option::of((share, by)), any::<bool>(), allow, any::<bool>()).prop_map(
        |(spreading, apart, allow, standby)| {
            let mut rules = Vec::new();
            if let Some((share, by)) = spreading {
                rules.push(spread(share, by));
            }
            if apart {
                rules.push(separate(&["east", "west"]));
            }
            if let Some(bits) = allow {
                let sites = (0..4).filter(|n| bits & 1 << n != 0).map(SiteId).collect();
                rules.push(rule("allow", Some("100.64.0.0/23"), Kind::Allow(sites)));
            }
            if standby {
                rules.push(rule("standby", Some("100.64.4.0/22"), Kind::Standby([].into())));
            }
            (rules, standby)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever rules are accepted, wherever groups begin: rounds come to rest, and then every rule holds.
    #[test]
    fn rules_that_are_accepted_come_to_hold(
        (rules, _) in any_rules(),
        owners_at in proptest::collection::vec(0_u8..4, 8),
        ingress in proptest::collection::vec(0_u8..4, 8),
    ) {
        let (mut cluster, _) = world(vec![]);
        for (n, owner) in (0..).zip(&owners_at) {
            cluster.groups.get_mut(&group_id(n)).unwrap().owner = SiteId(*owner);
        }
        let mut model = Model::new(None);
        let loads = (0..).zip(&ingress).map(|(n, ingress)| load(n, 100, *ingress)).collect();
        model.handle_report(&report(0, loads), Micros(0));
        let labels = [("east", "100.64.0.0/23"), ("west", "100.64.2.0/23")];
        let accepted = put(&mut cluster, labelled(&labels, rules.clone()));
        prop_assume!(accepted.is_ok());
        settle(&mut cluster, &model, |_| {});
        let domain = |site: SiteId| if site.0 < 2 { 0 } else { site.0 };
        for rule in &rules {
            if let Kind::Spread(Spread { share, by }) = &rule.kind {
                let place = |site: SiteId| if *by == Place::Site { site.0 } else { domain(site) };
                let mut counts = BTreeMap::new();
                cluster.groups.values().for_each(|g| *counts.entry(place(g.owner)).or_insert(0) += 1);
                prop_assert!(counts.values().all(|&n| n <= (share * 8.0) as usize), "{:?}", counts);
            } else if let Kind::Separate(_) = &rule.kind {
                let of = |range: std::ops::Range<u8>| -> BTreeSet<u8> {
                    range.map(|n| domain(cluster.groups[&group_id(n)].owner)).collect()
                };
                prop_assert!(of(0..2).is_disjoint(&of(2..4)), "{:?}", owners(&cluster));
            } else if let Kind::Allow(sites) = &rule.kind {
                prop_assert!((0..2).all(|n| sites.contains(&cluster.groups[&group_id(n)].owner)));
            } else {
                // Clients of this rule are groups 4 to 7.
                prop_assert_eq!(rule.kind.name(), "standby");
                for n in 4..8 {
                    let group = cluster.groups[&group_id(n)];
                    prop_assert!(group.standby.is_some_and(|site| domain(site) != domain(group.owner)));
                }
            }
        }
        let again = round(&cluster, &model);
        prop_assert_eq!(again.commands.len(), 0);
    }
}

#[test]
fn groups_of_a_label_are_found_by_its_prefixes_only() {
    let (cluster, _) = world(vec![]);
    let policy = labelled(&[("a", "100.64.1.0/24"), ("b", "100.64.6.0/23")], vec![separate(&["a", "b"])]);
    let apart = super::apart::Apart::new(&policy);
    let sides: Vec<(GroupId, usize)> = cluster
        .groups
        .keys()
        .flat_map(|id| apart.sides(id).into_iter().map(|(_, side)| (*id, side)))
        .collect();
    assert_eq!(sides, [(group_id(1), 0), (group_id(6), 1), (group_id(7), 1)]);
}
