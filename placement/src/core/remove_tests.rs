//! Sites that are removed: what keeps them in, and that nothing of them is left.

use flow::{Micros, MoveId, SiteId};

use super::brain_tests::{cluster, group_id, load, report, rule};
use super::delay::Model;
use super::leader::{Brain, BrainTimings};
use super::*;

const S: u64 = 1_000_000;
const GONE: SiteId = SiteId(2);

/// A log, and what it makes: three sites that are alive, four groups, all at site 0.
struct Log {
    cluster: Cluster,
    index: u64,
}

impl Log {
    fn new() -> Self {
        Self { cluster: cluster(), index: 10 }
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.index += 1;
        self.cluster.apply(self.index, &Proposal { actor: "alice".into(), at_ms: 0, command })
    }

    fn ok(&mut self, command: Command) -> Vec<Change> {
        let applied = self.apply(command);
        assert!(applied.result.is_ok(), "{applied:?}");
        applied.changes
    }

    fn refused(&mut self, site: u8) -> String {
        let applied = self.apply(remove(site));
        assert_eq!(applied.changes, []);
        assert!(self.cluster.sites.contains_key(&SiteId(site)));
        applied.result.unwrap_err().to_string()
    }

    /// The move of group 0 to a site.
    fn start(&mut self, to: u8) -> MoveId {
        let moves = vec![(group_id(0), SiteId(to))];
        self.ok(Command::StartMoves { moves, reason: MoveReason::Operator });
        *self.cluster.moves.keys().next().unwrap()
    }

    fn put_policy(&mut self, rules: Vec<Rule>, confirm_within_ms: Option<u64>) {
        let policy = Policy { rules, ..Policy::default() };
        let expected_version = self.cluster.policy_version;
        self.ok(Command::PutPolicy { policy, expected_version, confirm_within_ms });
    }
}

fn remove(site: u8) -> Command {
    Command::RemoveSite { site: SiteId(site) }
}

fn named(id: SiteId, name: &str) -> Command {
    Command::PutSite(SiteSpec {
        id,
        name: name.into(),
        latitude: None,
        longitude: None,
        endpoint: "[::1]:9".into(),
        capacity_pps: 1000,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
    })
}

#[test]
fn a_site_that_owns_groups_is_not_removed() {
    let said = Log::new().refused(0);
    assert!(said.starts_with("site 0 owns 4 groups, the first is 1:100.64.0.0/24: drain it"), "{said}");
}

#[test]
fn a_site_that_takes_part_in_a_move_is_not_removed() {
    let mut log = Log::new();
    let id = log.start(1);
    let said = log.refused(1);
    assert!(said.starts_with(&format!("site 1 takes part in move {id} of 1:100.64.0.0/24")), "{said}");
    // Site 2 is neither source nor target, and an ingress only once the ingresses are fixed.
    let mut other = Log { cluster: log.cluster.clone(), index: log.index };
    other.ok(remove(2));
    other.ok(Command::Switch { move_id: id, by: SiteId(0) });
    assert_eq!(other.cluster.moves[&id].ingresses, [SiteId(0), SiteId(1)], "moves leave it out");
    log.ok(Command::Switch { move_id: id, by: SiteId(0) });
    assert!(log.refused(2).contains("takes part in move"));
    log.ok(Command::Served { move_id: id, by: SiteId(1), summary: MoveSummary::default() });
    log.ok(remove(2));
}

#[test]
fn a_site_that_a_policy_names_is_not_removed() {
    let mut log = Log::new();
    log.put_policy(vec![rule("far", None, Kind::Deny([GONE].into()))], None);
    assert_eq!(log.refused(2), "site 2 is named by rule \"far\" of the policy: change the rule first");
    // On trial, the policy without the rule may be followed by the one with it.
    log.put_policy(vec![], Some(60_000));
    let version = log.cluster.policy_version;
    let said = log.refused(2);
    let right = format!("of the policy that returns unless policy {version} is confirmed");
    assert!(said.contains("\"far\"") && said.contains(&right), "{said}");
    log.ok(Command::ConfirmPolicy { version });
    log.ok(remove(2));
}

#[test]
fn the_only_site_is_not_removed() {
    let mut log = Log::new();
    log.cluster.groups.clear();
    log.ok(remove(2));
    log.ok(remove(1));
    assert_eq!(log.refused(0), "site 0 is the only one: add another first");
}

#[test]
fn a_site_that_is_removed_is_forgotten() {
    let mut log = Log::new();
    let standbys = vec![(group_id(1), Some(GONE)), (group_id(2), Some(SiteId(1)))];
    log.ok(Command::SetStandbys { standbys });
    let price = |site| SitePrices { site, open: true, packets: 1.0, ..SitePrices::default() };
    let prices = vec![price(SiteId(1)), price(GONE)];
    let round = Round { prices, exceeded: vec![GONE], ..Round::default() };
    log.ok(Command::Publish(Box::new(round.clone())));
    // It is alive: who has its key could keep it so.
    assert!(log.cluster.sites[&GONE].alive);
    let changes = log.ok(remove(2));
    assert!(matches!(
        changes.as_slice(),
        [Change::Group(group), Change::SiteGone(GONE)] if group.id == group_id(1) && group.standby.is_none()
    ));
    assert_eq!(log.cluster.groups[&group_id(2)].standby, Some(SiteId(1)));
    let entry = log.cluster.audit.back().unwrap().clone();
    assert_eq!(
        (entry.actor.as_str(), entry.action.as_str(), entry.refused),
        ("alice", "remove site 2", None)
    );
    assert_eq!(log.ok(remove(2)), [], "repeated, it changes nothing");
    // What the leader found before it knew.
    for _ in 0..2 {
        let round_kept = log.cluster.round.clone().unwrap();
        assert_eq!((round_kept.prices.len(), round_kept.exceeded.len()), (1, 0));
        log.ok(Command::Publish(Box::new(round.clone())));
    }
    for command in [
        Command::SetAlive { site: GONE, alive: true },
        Command::SetAdmin { site: GONE, admin: Admin::Active },
        Command::StartMoves { moves: vec![(group_id(0), GONE)], reason: MoveReason::Operator },
        Command::SetStandbys { standbys: vec![(group_id(0), Some(GONE))] },
    ] {
        assert_eq!(log.apply(command).result, Err(Rejected::NoSite(GONE)));
    }
    log.ok(named(GONE, "bergen"));
    let site = &log.cluster.sites[&GONE];
    assert!(site.admin == Admin::Active && !site.alive);
}

#[test]
fn another_site_with_the_number_of_one_that_was_removed_is_not_alive_by_its_reports() {
    let mut log = Log::new();
    let mut brain = Brain::new(BrainTimings::default(), None, Micros(0));
    let lease = BrainTimings::default().lease;
    for site in 0..3 {
        brain.handle_report(&report(site, vec![]), Micros(0));
    }
    brain.poll(&log.cluster, Micros(0));
    log.ok(remove(2));
    log.ok(named(GONE, "bergen"));
    let wishes = brain.poll(&log.cluster, Micros(S));
    assert!(!wishes.contains(&Command::SetAlive { site: GONE, alive: true }), "{wishes:?}");
    let now = lease.plus(Micros(S));
    brain.poll(&log.cluster, now);
    brain.handle_report(&report(2, vec![]), now);
    let wishes = brain.poll(&log.cluster, now);
    assert!(wishes.contains(&Command::SetAlive { site: GONE, alive: true }), "{wishes:?}");
}

/// Round trips, clients and servers of a site say nothing of another one that has its number.
#[test]
fn what_was_measured_of_a_site_that_was_removed_is_not_anothers() {
    let mut log = Log::new();
    let heard = SiteReport {
        peers: vec![PeerRtt { site: GONE, rtt_us: 8_000 }, PeerRtt { site: SiteId(1), rtt_us: 9_000 }],
        ..report(0, vec![load(0, 100, 2)])
    };
    let known = |model: &Model, cluster: &Cluster| {
        let explained = explain::explain(cluster, model, &group_id(0), Micros(0)).unwrap();
        let delay = |site| explained.candidates.iter().find(|c| c.site == site).unwrap().terms.total_ms();
        (delay(SiteId(1)), delay(GONE))
    };
    let mut model = Model::new(None);
    model.note_sites(&log.cluster);
    model.handle_report(&heard, Micros(0));
    let inside = |model: &Model| model.demand(&group_id(0)).unwrap().inside.contains_key(&GONE);
    assert!(inside(&model));
    let before = known(&model, &log.cluster);
    log.ok(remove(2));
    assert_eq!(model.note_sites(&log.cluster), [GONE]);
    assert!(!inside(&model));
    // A report that was on its way speaks of the number while it is nobody's.
    model.handle_report(&heard, Micros(0));
    log.ok(named(GONE, "bergen"));
    assert_eq!(model.note_sites(&log.cluster), [GONE]);
    assert!(!inside(&model));
    assert_ne!(known(&model, &log.cluster), before);
    let mut fresh = Model::new(None);
    let of_others = SiteReport { peers: vec![PeerRtt { site: SiteId(1), rtt_us: 9_000 }], ..heard.clone() };
    let groups = vec![GroupReport { inside_ingress: vec![], ..load(0, 100, 2) }];
    fresh.handle_report(&SiteReport { groups, ..of_others }, Micros(0));
    for model in [&mut model, &mut fresh] {
        // The number of reports makes the rest surer.
        model.handle_report(&report(0, vec![load(0, 100, 0)]), Micros(0));
    }
    let delay_to_gone = |model: &Model| known(model, &log.cluster).1;
    assert_eq!(delay_to_gone(&model), delay_to_gone(&fresh));
    assert_eq!(model.note_sites(&log.cluster), [], "nothing is forgotten twice");
}

#[test]
fn a_node_that_left_the_group_is_remembered_and_the_number_of_those_is_bounded() {
    let mut cluster = cluster();
    let ids = |ids: std::ops::RangeInclusive<u64>| ids.collect::<std::collections::BTreeSet<u64>>();
    cluster.note_members(&ids(1..=3), &ids(2..=4));
    assert_eq!(cluster.removed_nodes, ids(1..=1));
    let bytes = crate::wire::encode_cluster(&cluster);
    assert_eq!(crate::wire::decode_cluster(bytes).unwrap().removed_nodes, ids(1..=1), "snapshots have it");
    cluster.note_members(&ids(2..=4), &ids(1..=4));
    assert!(cluster.removed_nodes.is_empty(), "who is a member is not removed, whatever was before");
    cluster.note_members(&ids(1..=2_000), &ids(1..=1));
    assert_eq!(cluster.removed_nodes.len(), REMOVED_NODES_LEN_MAX);
    assert!(cluster.removed_nodes.contains(&2_000));
}
