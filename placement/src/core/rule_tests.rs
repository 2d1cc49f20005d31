//! Rules: what is refused and how it is named, which holds where several speak, and what each kind does to a plan.

use flow::{GroupId, Micros, SiteId};
use proptest::prelude::*;

use super::brain_tests::{cluster, group_id, load, planned, report, rule};
use super::delay::Model;
use super::leader::Brain;
use super::plan::{Readiness, plan};
use super::rules::Rules;
use super::*;

fn parse(rule: &str) -> Result<Rule, String> {
    serde_json::from_str(rule).map_err(|error| error.to_string())
}

fn with(rules: Vec<Rule>) -> Cluster {
    let mut cluster = cluster();
    cluster.policy.rules = rules;
    cluster
}

fn put(cluster: &mut Cluster, policy: Policy) -> Result<Outcome, Rejected> {
    let command =
        Command::PutPolicy { policy, expected_version: cluster.policy_version, confirm_within_ms: None };
    cluster.apply(7, &Proposal { actor: "test".into(), at_ms: 0, command }).result
}

fn refused(rules: Vec<Rule>) -> String {
    let mut cluster = cluster();
    let policy = Policy { rules, ..Policy::default() };
    put(&mut cluster, policy).unwrap_err().to_string()
}

fn soft(price_ms: f64, rule: Rule) -> Rule {
    Rule { price_ms: Some(price_ms), ..rule }
}

fn sites<const N: usize>(sites: [u8; N]) -> std::collections::BTreeSet<SiteId> {
    sites.map(SiteId).into()
}

/// Where groups of a plan go.
fn going(cluster: &Cluster, groups: Vec<GroupReport>) -> Vec<(u8, u8)> {
    let mut going = Vec::new();
    for command in planned(cluster, groups).commands {
        let Command::StartMoves { moves, .. } = command else { panic!("{command:?}") };
        let number = |id: &GroupId| (0..4).find(|&n| group_id(n) == *id).unwrap();
        going.extend(moves.iter().map(|(group, to)| (number(group), to.0)));
    }
    going.sort_unstable();
    going
}

#[test]
fn a_rule_is_written_flat_and_read_back_as_it_was() {
    for text in [
        r#"{"name":"a","allow":[1,2]}"#,
        r#"{"name":"b","service":1,"deny":[2],"price_ms":3.5}"#,
        r#"{"name":"c","clients":"100.64.0.0/24","pin":1,"owner":"noc","until_ms":5}"#,
        r#"{"name":"d","label":"gold","prefer":[1],"price_ms":2.0}"#,
        r#"{"name":"e","cost":[1],"price_ms":2.0}"#,
        r#"{"name":"f","dial":{"site":1,"share":0.25}}"#,
        r#"{"name":"g","capacity":{"site":1,"flows":10,"headroom":0.1}}"#,
        r#"{"name":"h","drain":{"site":1,"moves_per_minute":5}}"#,
        r#"{"name":"i","slo":{"delay_ms":20.0},"price_ms":4.0}"#,
        r#"{"name":"j","budget":{"moves_per_minute":5}}"#,
        r#"{"name":"k","charge":{"ms":5.0,"per_kflow_ms":0.5}}"#,
        r#"{"name":"l","ordering":"relaxed"}"#,
    ] {
        let rule = parse(text).unwrap();
        assert_eq!(serde_json::to_string(&rule).unwrap(), text);
    }
    let error = parse(r#"{"name":"x","allow":[1],"deny":[2]}"#).unwrap_err();
    assert!(error.starts_with(r#"rule "x" has 2 kinds: give one of allow, deny, pin"#), "{error}");
    let error = parse(r#"{"name":"x","alow":[1]}"#).unwrap_err();
    assert!(error.starts_with("unknown field `alow`, expected one of `name`"), "{error}");
}

#[test]
fn misdeeds_of_a_rule_name_it_and_what_would_be_right() {
    let deny = || rule("a", None, Kind::Deny(sites([1])));
    let label = Rule { scope: Scope { label: Some("gold".into()), ..Scope::default() }, ..deny() };
    let half = rule("a", Some("100.64.0.0/25"), Kind::Pin(SiteId(1)));
    let scoped = |kind| rule("a", Some("100.64.0.0/24"), kind);
    for (rules, text) in [
        (vec![deny(), deny()], r#"rule "a": its name is taken: names are unique"#),
        (vec![label], r#"rule "a": label "gold" is not among the labels: add it there"#),
        (vec![soft(-1.0, deny())], r#"rule "a": price_ms is -1: give 0 to 10000"#),
        (vec![soft(f64::NAN, deny())], r#"rule "a": price_ms is NaN: give 0 to 10000"#),
        (vec![rule("a", None, Kind::Deny(sites([])))], r#"rule "a": deny has no sites: give at least one"#),
        (
            vec![rule("a", None, Kind::Prefer(sites([1])))],
            r#"rule "a": prefer needs a price_ms: what it is worth"#,
        ),
        (
            vec![rule("a", None, Kind::Dial(Dial { site: SiteId(1), share: 1.5 }))],
            r#"rule "a": share is 1.5: give 0 to 1"#,
        ),
        (
            vec![scoped(Kind::Budget(Budget { moves_per_minute: 1 }))],
            r#"rule "a": budget holds for all groups: leave out service, label and clients"#,
        ),
        (
            vec![half],
            "rule \"a\": 100.64.0.0/25 is a part of group 1:100.64.0.0/24, and groups are not cut: give 100.64.0.0/24 or a shorter prefix",
        ),
        (vec![rule("a", None, Kind::Deny(sites([9])))], "no site 9: add it first"),
    ] {
        assert_eq!(refused(rules), text);
    }
}

#[test]
fn rules_that_cannot_all_hold_are_named_and_no_others() {
    let pin = rule("pin", Some("100.64.1.0/24"), Kind::Pin(SiteId(1)));
    let far = rule("far", None, Kind::Deny(sites([2])));
    // A standby is where the group itself may be, beside its owner.
    for standby in [sites([1]), sites([0, 2]), [].into()] {
        let standby = rule("standby", None, Kind::Standby(standby));
        assert_eq!(
            refused(vec![far.clone(), standby, pin.clone()]),
            "rules \"pin\" and \"standby\" cannot all hold for group 1:100.64.1.0/24: they leave its standby no site in \
             another failure domain than its owner's"
        );
    }
    let deny = rule("deny", Some("100.64.0.0/22"), Kind::Deny(sites([1])));
    assert_eq!(
        refused(vec![far.clone(), pin.clone(), deny]),
        r#"rules "deny" and "pin" cannot all hold for group 1:100.64.1.0/24: they leave it no site"#
    );
    let drain = rule(
        "drain",
        None,
        Kind::Drain(Drain { site: SiteId(0), moves_per_minute: None, deadline_ms: None }),
    );
    let near = rule("near", None, Kind::Allow(sites([0, 2])));
    assert_eq!(
        refused(vec![far.clone(), drain, near]),
        r#"rules "far" and "drain" and "near" cannot all hold for group 1:100.64.0.0/24: they leave it no site"#
    );
    let other = rule("other", Some("100.64.1.0/24"), Kind::Pin(SiteId(2)));
    assert_eq!(
        refused(vec![pin.clone(), other]),
        r#"rules "pin" and "other" cannot all hold for group 1:100.64.1.0/24: both set pin, and neither scope is more specific"#
    );
    // With a price it is no contradiction, nor where one scope is within the other.
    let wider = rule("wider", Some("100.64.0.0/23"), Kind::Pin(SiteId(2)));
    let mut cluster = cluster();
    put(&mut cluster, Policy { rules: vec![pin, soft(5.0, far), wider], ..Policy::default() }).unwrap();
    assert_eq!(
        cluster.policy.forbidding(&group_id(1), SiteId(2)).map(|rule| rule.name.as_str()),
        Some("pin")
    );
    assert_eq!(
        cluster.policy.forbidding(&group_id(0), SiteId(1)).map(|rule| rule.name.as_str()),
        Some("wider")
    );
}

#[test]
fn labels_and_services_are_scopes_and_the_most_specific_holds() {
    let mut cluster = cluster();
    let scope = |service: Option<u8>, label: Option<&str>| Scope {
        service: service.map(|id| id.try_into().unwrap()),
        label: label.map(Into::into),
        clients: None,
    };
    let pin = |name: &str, scope, site| Rule { scope, ..rule(name, None, Kind::Pin(SiteId(site))) };
    cluster.policy.labels = [("gold".into(), vec!["100.64.2.0/23".parse().unwrap()])].into();
    cluster.policy.rules = vec![
        pin("label", scope(None, Some("gold")), 2),
        pin("service", scope(Some(1), None), 1),
        pin("all", scope(None, None), 0),
        rule("one", Some("100.64.3.0/24"), Kind::Pin(SiteId(0))),
    ];
    assert_eq!(going(&cluster, vec![]), [(0, 1), (1, 1), (2, 2)]);
}

#[test]
fn soft_rules_move_groups_only_where_delay_is_worth_less() {
    // Site 1 is 22 ms from where the clients come in, by coordinates, so give or take 7 ms.
    let groups = || vec![load(0, 10, 0), load(1, 10, 0)];
    let prefer = |price| soft(price, rule("prefer", None, Kind::Prefer(sites([1]))));
    assert_eq!(going(&with(vec![prefer(10.0)]), groups()), []);
    assert_eq!(going(&with(vec![prefer(40.0)]), groups()), [(0, 1), (1, 1)]);
    let cost = |price| soft(price, rule("cost", Some("100.64.1.0/24"), Kind::Cost(sites([0]))));
    assert_eq!(going(&with(vec![cost(40.0)]), groups()), [(1, 1)]);
    // Prices add up.
    assert_eq!(going(&with(vec![cost(25.0), prefer(15.0)]), groups()), [(1, 1)]);
}

#[test]
fn a_target_for_delay_is_kept_where_it_can_be() {
    // In at site 0, out at site 1, where the two ways add up to the same; site 0 is cheaper by a rule.
    let far = |n| GroupReport { inside_ingress: vec![(SiteId(1), 1)], ..load(n, 10, 1) };
    let home = soft(20.0, rule("home", None, Kind::Prefer(sites([0]))));
    let slo = |delay_ms| rule("slo", Some("100.64.0.0/24"), Kind::Slo(Slo { delay_ms }));
    assert_eq!(going(&with(vec![home.clone()]), vec![far(0), far(1)]), []);
    assert_eq!(going(&with(vec![home.clone(), slo(5.0)]), vec![far(0), far(1)]), [(0, 1)]);
    assert_eq!(going(&with(vec![home.clone(), soft(1.0, slo(5.0))]), vec![far(0), far(1)]), []);
    // What no site keeps decides nothing.
    let nowhere = GroupReport { outside_ingress: vec![(SiteId(2), 1)], ..load(0, 10, 0) };
    assert_eq!(going(&with(vec![home, slo(0.1)]), vec![nowhere]), []);
}

#[test]
fn a_dial_lets_a_stable_share_through() {
    let ids: Vec<GroupId> =
        (0..4096u32).map(|n| format!("1:10.{}.{}.0/24", n >> 8, n & 255).parse().unwrap()).collect();
    let at = |share: f64| {
        let dial = rule("dial", None, Kind::Dial(Dial { site: SiteId(1), share }));
        let policy = Policy { rules: vec![dial], ..Policy::default() };
        ids.iter().filter(|id| policy.forbidding(id, SiteId(1)).is_none()).copied().collect::<Vec<_>>()
    };
    let (quarter, half) = (at(0.25), at(0.5));
    assert!((quarter.len() as f64 / 1024.0 - 1.0).abs() < 0.1, "{}", quarter.len());
    assert!(quarter.iter().all(|id| half.contains(id)), "turning it up sends nobody away");
    assert_eq!((at(0.0).len(), at(1.0).len()), (0, 4096));
}

#[test]
fn a_budget_and_the_rate_of_a_drain_hold_over_a_minute() {
    let groups = || (0..4).map(|n| load(n, 10, 1)).collect();
    let budget = rule("budget", None, Kind::Budget(Budget { moves_per_minute: 3 }));
    let mut model = Model::new(None);
    model.handle_report(&report(0, groups()), Micros(0));
    let started = |cluster: &Cluster, recent: &[(SiteId, MoveReason)]| {
        let ready = Readiness { free: &|_| true, rested: &|_| true, recent, wall_ms: None };
        plan(cluster, &model, &ready, Micros(0)).round.unwrap().started
    };
    let of = |reason| vec![(SiteId(0), reason); 2];
    let cluster = with(vec![budget]);
    assert_eq!(started(&cluster, &[]), 3);
    assert_eq!(started(&cluster, &of(MoveReason::Delay)), 1);
    assert_eq!(started(&cluster, &of(MoveReason::Drain)), 3, "drains do not count");
    let drain = rule(
        "drain",
        None,
        Kind::Drain(Drain { site: SiteId(0), moves_per_minute: Some(3), deadline_ms: None }),
    );
    let cluster = with(vec![drain]);
    assert_eq!(started(&cluster, &[]), 3);
    assert_eq!(started(&cluster, &of(MoveReason::Drain)), 1);
    assert_eq!(
        started(&cluster, &[(SiteId(1), MoveReason::Drain)]),
        3,
        "another site's drain does not count"
    );
}

#[test]
fn a_charge_holds_back_groups_with_much_state() {
    // 22 ms nearer at site 1.
    let heavy = |n, flows| GroupReport { flows, ..load(n, 10, 1) };
    let charge = rule("charge", None, Kind::Charge(Charge { ms: 1.0, per_kflow_ms: 1.0, life_s: None }));
    assert_eq!(going(&with(vec![charge]), vec![heavy(0, 5_000), heavy(1, 25_000)]), [(0, 1)]);
}

#[test]
fn a_group_that_has_just_begun_is_charged_more_than_one_that_has_lasted() {
    let charge = Charge { ms: 3.0, per_kflow_ms: 1.0, life_s: Some(600) };
    assert_eq!(charge.of(1_000, 600.0), 4.0);
    assert_eq!(charge.of(1_000, 6_000.0), 4.0);
    assert_eq!(charge.of(1_000, 200.0), 12.0);
    assert_eq!(charge.of(1_000, 0.0), 40.0, "ten times at most");
    // 22 ms nearer at site 1: too little at first, enough when it has lasted.
    let cluster = with(vec![rule("charge", None, Kind::Charge(charge))]);
    let mut model = Model::new(None);
    let started = |model: &Model, now| {
        let ready = Readiness { free: &|_| true, rested: &|_| true, recent: &[], wall_ms: None };
        plan(&cluster, model, &ready, now).round.unwrap().started
    };
    model.handle_report(&report(0, vec![load(0, 10, 1)]), Micros(0));
    assert_eq!(started(&model, Micros::from_secs(1)), 0);
    for second in (0..=300).step_by(30) {
        model.handle_report(&report(0, vec![load(0, 10, 1)]), Micros::from_secs(second));
    }
    assert_eq!(started(&model, Micros::from_secs(301)), 1);
}

#[test]
fn a_capacity_rule_stands_in_for_what_the_site_was_added_with() {
    let groups = || (0..4).map(|n| load(n, 100, 0)).collect();
    let small = Capacity {
        site: SiteId(0),
        packets_per_s: Some(300),
        flows: None,
        bits_per_s: None,
        headroom: Some(0.0),
    };
    assert_eq!(going(&with(vec![rule("small", None, Kind::Capacity(small))]), groups()).len(), 1);
    assert_eq!(going(&with(vec![]), groups()), []);
}

#[test]
fn the_order_of_a_move_is_what_the_most_specific_rule_says() {
    let mut cluster = with(vec![
        rule("all", None, Kind::Ordering(Ordering::Relaxed)),
        rule("one", Some("100.64.1.0/24"), Kind::Ordering(Ordering::Strict)),
    ]);
    let moves = vec![(group_id(0), SiteId(1)), (group_id(1), SiteId(1))];
    let command = Command::StartMoves { moves, reason: MoveReason::Operator };
    cluster.apply(3, &Proposal { actor: "test".into(), at_ms: 0, command }).result.unwrap();
    let order: Vec<Ordering> = cluster.moves.values().map(|present| present.ordering).collect();
    assert_eq!(order, [Ordering::Relaxed, Ordering::Strict]);
}

#[test]
fn rules_end_when_their_time_is_over() {
    let mut short = rule("short", None, Kind::Pin(SiteId(1)));
    short.until_ms = Some(100);
    let policy =
        Policy { rules: vec![short, rule("long", None, Kind::Deny(sites([2])))], ..Policy::default() };
    assert_eq!(policy.without_ended(99), None);
    let (rest, ended) = policy.without_ended(100).unwrap();
    assert_eq!((rest.rules.len(), rest.rules[0].name.as_str(), ended), (1, "long", vec!["short".to_owned()]));
}

#[test]
fn a_policy_on_trial_returns_unless_it_is_confirmed() {
    let mut cluster = cluster();
    let mut index = 10;
    let mut apply = |cluster: &mut Cluster, command: Command, at_ms: u64| {
        index += 1;
        cluster.apply(index, &Proposal { actor: "operator ada".into(), at_ms, command }).result
    };
    let put = |min_dwell_s, expected_version, confirm_within_ms| Command::PutPolicy {
        policy: Policy { min_dwell_s, ..Policy::default() },
        expected_version,
        confirm_within_ms,
    };
    apply(&mut cluster, put(1, 0, None), 0).unwrap();
    assert!(apply(&mut cluster, put(2, 1, Some(999)), 0).is_err());
    apply(&mut cluster, put(2, 1, Some(5_000)), 100).unwrap();
    apply(&mut cluster, put(3, 2, Some(5_000)), 200).unwrap();
    assert_eq!(Brain::due(&cluster, 5_199), None);
    let revert = Brain::due(&cluster, 5_200).unwrap();
    assert_eq!(revert, Command::RevertPolicy { version: 3 });
    // Who confirms in time wins.
    let mut confirmed = cluster.clone();
    apply(&mut confirmed, Command::ConfirmPolicy { version: 3 }, 300).unwrap();
    apply(&mut confirmed, Command::ConfirmPolicy { version: 3 }, 300).unwrap();
    assert_eq!(Brain::due(&confirmed, 9_999), None);
    assert_eq!(
        apply(&mut confirmed, revert.clone(), 5_200),
        Err(Rejected::NotOnTrial { version: 3, present: None })
    );
    // The one that was never confirmed is skipped on the way back.
    apply(&mut cluster, revert, 5_200).unwrap();
    assert_eq!((cluster.policy.min_dwell_s, cluster.policy_version, &cluster.trial), (1, 4, &None));
    let history: Vec<_> =
        cluster.policies.iter().map(|kept| (kept.version, kept.policy.min_dwell_s)).collect();
    assert_eq!(history, [(1, 1), (2, 2), (3, 3), (4, 1)]);
    assert_eq!(cluster.policies[0].actor, "operator ada");
    for n in 0..20 {
        apply(&mut cluster, put(n, u64::from(n) + 4, None), 0).unwrap();
    }
    assert_eq!((cluster.policies.len(), cluster.policies[0].version), (POLICIES_LEN_MAX, 9));
}

#[test]
fn rules_that_ended_leave_the_policy_and_that_is_a_version() {
    let short = Rule { until_ms: Some(100), ..rule("short", None, Kind::Pin(SiteId(1))) };
    let mut cluster = cluster();
    put(&mut cluster, Policy { rules: vec![short], ..Policy::default() }).unwrap();
    let command = Brain::due(&cluster, 100).unwrap();
    assert_eq!(command, Command::EndRules { version: 1, rules: vec!["short".into()] });
    for _ in 0..2 {
        let command = command.clone();
        cluster.apply(9, &Proposal { actor: "leader".into(), at_ms: 0, command }).result.unwrap();
        assert_eq!((cluster.policy.rules.len(), cluster.policy_version), (0, 2));
    }
}

fn any_rules() -> impl Strategy<Value = Vec<Rule>> {
    let one = (0u8..6, 0u8..3, 0u8..3, 0u8..3, any::<bool>());
    proptest::collection::vec(one, 0..6).prop_map(|rules| {
        let rule = |(n, (kind, wide, a, b, soft)): (usize, (u8, u8, u8, u8, bool))| {
            let kind = match kind {
                0 => Kind::Allow(sites([a, b])),
                1 => Kind::Deny(sites([a, b])),
                2 => Kind::Deny(sites([a])),
                3 => Kind::Pin(SiteId(a)),
                4 => Kind::Drain(Drain { site: SiteId(a), moves_per_minute: None, deadline_ms: None }),
                _ => Kind::Dial(Dial { site: SiteId(a), share: 0.5 }),
            };
            let clients = [None, Some("100.64.0.0/23"), Some("100.64.1.0/24")][usize::from(wide)];
            let price_ms = (soft && !matches!(kind, Kind::Drain(_))).then_some(1.0);
            Rule { price_ms, ..rule(&n.to_string(), clients, kind) }
        };
        rules.into_iter().enumerate().map(rule).collect()
    })
}

proptest! {
    /// The index says what a look at each rule says. What is accepted leaves each group a site; what is refused for leaving
    /// none is refused with rules of which each is needed.
    #[test]
    fn rules_are_sound_and_conflicts_are_smallest(rules in any_rules()) {
        let mut cluster = cluster();
        let policy = Policy { rules, ..Policy::default() };
        let result = put(&mut cluster, policy.clone());
        let index = Rules::new(&policy);
        let mut covering = Vec::new();
        let ids: Vec<GroupId> = cluster.groups.keys().copied().collect();
        let open = |policy: &Policy, id: &GroupId| {
            let mut open = cluster.sites.keys().filter(|site| policy.forbidding(id, **site).is_none());
            open.next().is_some()
        };
        match result {
            Ok(_) => for id in &ids {
                index.covering(id, &mut covering);
                let effect = index.effect(&covering);
                prop_assert!(open(&policy, id));
                for &site in cluster.sites.keys() {
                    prop_assert_eq!(effect.allows(id, site), policy.forbidding(id, site).is_none());
                }
            },
            Err(Rejected::Policy(PolicyError::Contradiction { rules: named, group, reason })) => {
                let id: GroupId = group.parse().unwrap();
                let only = |keep: &dyn Fn(&Rule) -> bool| {
                    let rules = policy.rules.iter().filter(|rule| keep(rule)).cloned().collect();
                    Policy { rules, ..policy.clone() }
                };
                if reason.starts_with("they leave") {
                    prop_assert!(!open(&only(&|rule| named.contains(&rule.name)), &id));
                    for out in &named {
                        prop_assert!(open(&only(&|rule| named.contains(&rule.name) && rule.name != *out), &id));
                    }
                } else {
                    prop_assert_eq!(named.len(), 2);
                }
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
