//! The rules of the replicated state, by example and by random commands.

use std::collections::BTreeMap;

use flow::nat::NatSpec;
use flow::{Epoch, GroupId, MoveId, ServiceId, SiteId};
use proptest::prelude::*;

use super::*;

fn site(id: u8) -> Command {
    Command::PutSite(SiteSpec {
        id: SiteId(id),
        name: format!("site-{id}"),
        latitude: Some(f64::from(id)),
        longitude: Some(0.0),
        endpoint: format!("[::1]:{id}"),
        capacity_pps: 1_000_000,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
    })
}

fn service() -> Service {
    Service {
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
    }
}

fn group(n: u8) -> GroupId {
    format!("1:100.64.{n}.0/24").parse().unwrap()
}

/// A log, and what it makes.
#[derive(Default)]
struct Log {
    cluster: Cluster,
    index: u64,
}

impl Log {
    fn apply(&mut self, command: Command) -> Applied {
        self.index += 1;
        self.cluster.apply(self.index, &Proposal { actor: "test".into(), at_ms: 0, command })
    }

    fn ok(&mut self, command: Command) -> Outcome {
        self.apply(command).result.unwrap()
    }

    fn refused(&mut self, command: Command) -> Rejected {
        let before = self.cluster.revision;
        let applied = self.apply(command);
        assert_eq!(applied.changes, []);
        assert_eq!(self.cluster.revision, before);
        applied.result.unwrap_err()
    }

    fn start(&mut self, n: u8, to: u8) -> MoveId {
        let moves = vec![(group(n), SiteId(to))];
        match self.ok(Command::StartMoves { moves, reason: MoveReason::Operator }) {
            Outcome::Moves(started) => started[0].move_id.unwrap(),
            Outcome::Done => unreachable!(),
        }
    }

    fn group(&self, n: u8) -> Group {
        self.cluster.groups[&group(n)]
    }
}

/// Three sites alive, four groups, all at site 0.
fn log() -> Log {
    let mut log = Log::default();
    for id in 0..3 {
        log.ok(site(id));
        log.ok(Command::SetAlive { site: SiteId(id), alive: true });
    }
    log.ok(Command::PutService { service: service(), owner: Some(SiteId(0)) });
    log
}

fn switch(move_id: MoveId, by: u8) -> Command {
    Command::Switch { move_id, by: SiteId(by) }
}

fn served(move_id: MoveId, by: u8) -> Command {
    Command::Served { move_id, by: SiteId(by), summary: MoveSummary::default() }
}

fn abort(move_id: MoveId) -> Command {
    Command::Abort { move_id, by: None, reason: "no".into() }
}

fn take_back(move_id: MoveId, by: u8, proof: Proof) -> Command {
    Command::TakeBack { move_id, by: SiteId(by), proof }
}

#[test]
fn a_service_is_cut_into_groups_that_start_at_epoch_1() {
    let log = log();
    assert_eq!(log.cluster.groups.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3].map(group));
    assert!(log.cluster.groups.values().all(|g| g.owner == SiteId(0) && g.epoch == Epoch(1)));
}

#[test]
fn first_owners_follow_capacity_when_none_is_given() {
    let mut log = Log::default();
    for (id, capacity_pps) in [(0, 3_000), (1, 1_000)] {
        let Command::PutSite(spec) = site(id) else { unreachable!() };
        log.ok(Command::PutSite(SiteSpec { capacity_pps, ..spec }));
    }
    log.ok(Command::PutService { service: service(), owner: None });
    let at_0 = log.cluster.groups.values().filter(|g| g.owner == SiteId(0)).count();
    assert_eq!(at_0, 3);
}

#[test]
fn a_move_runs_to_its_end_and_every_step_can_be_repeated() {
    let mut log = log();
    let id = log.start(1, 2);
    assert_eq!(log.start(1, 2), id);
    assert_eq!(log.group(1).move_id, Some(id));
    for _ in 0..2 {
        log.ok(switch(id, 0));
    }
    assert_eq!(log.cluster.moves[&id].ingresses, [0, 1, 2].map(SiteId));
    assert_eq!(log.cluster.moves[&id].flip, Some(Flip { at_ms: 500, lead_ms: 500 }));
    let end = log.apply(served(id, 2));
    assert!(end.changes.contains(&Change::MoveEnded { id, group: group(1), outcome: MoveOutcome::Done }));
    let revision = log.cluster.revision;
    for command in [served(id, 2), switch(id, 0)] {
        assert_eq!(log.apply(command), Applied { result: Ok(Outcome::Done), changes: vec![] });
    }
    assert_eq!(log.cluster.revision, revision);
    let group = log.group(1);
    assert_eq!((group.owner, group.epoch, group.move_id), (SiteId(2), Epoch(2), None));
    assert!(matches!(log.refused(abort(id)), Rejected::Ended { .. }));
}

#[test]
fn abort_and_switching_race_and_the_first_in_the_log_wins() {
    let mut log = log();
    let id = log.start(0, 1);
    log.ok(abort(id));
    log.ok(abort(id));
    assert!(matches!(log.refused(switch(id, 0)), Rejected::Ended { .. }));
    assert_eq!(log.group(0).epoch, Epoch(1));

    let id = log.start(0, 1);
    log.ok(switch(id, 0));
    assert!(matches!(log.refused(abort(id)), Rejected::Phase { .. }));
}

#[test]
fn taking_back_skips_the_epoch_that_the_target_might_have_seen() {
    let mut log = log();
    let id = log.start(0, 1);
    assert!(matches!(log.refused(take_back(id, 0, Proof::NeverGiven)), Rejected::Phase { .. }));
    log.ok(switch(id, 0));
    assert!(matches!(log.refused(take_back(id, 1, Proof::NeverGiven)), Rejected::NotParty { .. }));
    assert!(matches!(log.refused(take_back(id, 2, Proof::NeverAccepted)), Rejected::NotParty { .. }));
    for _ in 0..2 {
        log.ok(take_back(id, 0, Proof::NeverGiven));
    }
    assert_eq!((log.group(0).owner, log.group(0).epoch), (SiteId(0), Epoch(3)));
    assert!(matches!(log.refused(served(id, 1)), Rejected::Ended { .. }));
}

#[test]
fn a_move_to_a_dead_target_that_may_serve_is_taken_back_when_that_is_fenced() {
    let mut log = log();
    let id = log.start(0, 1);
    assert!(matches!(
        log.refused(take_back(id, 0, Proof::Fenced)),
        Rejected::Phase { .. } | Rejected::TargetAlive { .. }
    ));
    log.ok(switch(id, 0));
    assert!(matches!(log.refused(take_back(id, 0, Proof::Fenced)), Rejected::TargetAlive { .. }));
    log.ok(Command::SetAlive { site: SiteId(1), alive: false });
    assert_eq!(take_back(id, 0, Proof::Fenced).site(), None, "a site may not say this");
    for _ in 0..2 {
        log.ok(take_back(id, 0, Proof::Fenced));
    }
    assert_eq!((log.group(0).owner, log.group(0).epoch), (SiteId(0), Epoch(3)));
    assert!(matches!(log.refused(served(id, 1)), Rejected::Ended { .. }));
}

#[test]
fn only_a_dead_source_is_taken_over_and_then_only_the_target_can_say_no() {
    let mut log = log();
    let id = log.start(0, 1);
    log.ok(switch(id, 0));
    assert!(matches!(log.refused(Command::TakeOver { move_id: id }), Rejected::SourceAlive { .. }));
    log.ok(Command::SetAlive { site: SiteId(0), alive: false });
    log.ok(Command::TakeOver { move_id: id });
    assert!(log.cluster.moves[&id].take_over);
    assert!(matches!(log.refused(take_back(id, 0, Proof::NeverGiven)), Rejected::TakenOver { .. }));
    assert!(matches!(log.refused(take_back(id, 0, Proof::NeverAccepted)), Rejected::TakenOver { .. }));
    log.ok(take_back(id, 1, Proof::NeverAccepted));
}

#[test]
fn strangers_have_no_say_in_a_move() {
    let mut log = log();
    let id = log.start(0, 1);
    assert!(matches!(log.refused(switch(id, 1)), Rejected::NotParty { .. }));
    log.ok(switch(id, 0));
    assert!(matches!(log.refused(served(id, 2)), Rejected::NotParty { .. }));
    let stranger = Command::Abort { move_id: id, by: Some(SiteId(2)), reason: String::new() };
    assert!(matches!(log.refused(stranger), Rejected::NotParty { .. }));
}

#[test]
fn closed_and_dead_sites_get_nothing_and_one_refusal_refuses_all() {
    let mut log = log();
    let to_2 = |n| (group(n), SiteId(2));
    for admin in [Admin::Cordoned, Admin::Draining] {
        log.ok(Command::SetAdmin { site: SiteId(2), admin });
        let moves = vec![(group(0), SiteId(1)), to_2(1)];
        let refused = log.refused(Command::StartMoves { moves, reason: MoveReason::Operator });
        assert_eq!(refused, Rejected::TargetClosed { site: SiteId(2), admin, alive: true });
        assert!(log.cluster.moves.is_empty());
    }
    log.ok(Command::SetAlive { site: SiteId(0), alive: false });
    let moves = vec![(group(0), SiteId(1))];
    let refused = log.refused(Command::StartMoves { moves: moves.clone(), reason: MoveReason::Operator });
    assert_eq!(refused, Rejected::SourceDead { group: group(0), site: SiteId(0) });
    log.ok(Command::Reassign { groups: moves });
    assert_eq!((log.group(0).owner, log.group(0).epoch), (SiteId(1), Epoch(2)));
}

#[test]
fn a_group_is_reassigned_to_one_site_only() {
    let mut log = log();
    log.ok(Command::SetAlive { site: SiteId(0), alive: false });
    let groups = vec![(group(0), SiteId(1)), (group(0), SiteId(2))];
    assert_eq!(log.refused(Command::Reassign { groups }), Rejected::Twice { group: group(0) });
    let groups = vec![(group(0), SiteId(1)); 2];
    log.ok(Command::Reassign { groups: groups.clone() });
    log.ok(Command::Reassign { groups });
    assert_eq!((log.group(0).owner, log.group(0).epoch), (SiteId(1), Epoch(2)));
}

#[test]
fn the_policy_bounds_moves_in_flight_and_pins() {
    let mut log = log();
    let pin = super::brain_tests::rule("half", Some("100.64.2.0/23"), Kind::Pin(SiteId(1)));
    let policy = Policy { moves_in_flight_max: 1, rules: vec![pin], ..Policy::default() };
    let put = Command::PutPolicy { policy, expected_version: 0, confirm_within_ms: None };
    log.ok(put.clone());
    log.ok(put.clone());
    assert_eq!(log.cluster.policy_version, 1);
    let Command::PutPolicy { policy, .. } = put else { unreachable!() };
    let other = Policy { min_dwell_s: 1, ..policy };
    let stale = Command::PutPolicy { policy: other, expected_version: 0, confirm_within_ms: None };
    assert_eq!(log.refused(stale), Rejected::PolicyVersion { expected: 0, current: 1 });
    let start =
        |n, to| Command::StartMoves { moves: vec![(group(n), SiteId(to))], reason: MoveReason::Operator };
    assert_eq!(
        log.refused(start(2, 2)),
        Rejected::Forbidden { group: group(2), site: SiteId(2), rule: "half".into() }
    );
    log.ok(start(0, 1));
    assert_eq!(log.refused(start(1, 1)), Rejected::Budget { in_flight: 1, asked: 1, max: 1 });
}

#[test]
fn misdeeds_are_named_with_their_values() {
    let mut log = log();
    let Command::PutSite(spec) = site(3) else { unreachable!() };
    let wrong = SiteSpec { latitude: Some(91.0), ..spec.clone() };
    let text = log.refused(Command::PutSite(wrong)).to_string();
    assert_eq!(text, "latitude is 91: give -90 to 90, and both coordinates or none");
    let taken = SiteSpec { name: "site-1".into(), ..spec };
    assert_eq!(
        log.refused(Command::PutSite(taken)).to_string(),
        "name \"site-1\" is taken by site 1: names are unique"
    );
    let finer = Service { group_len: 25, ..service() };
    let refused = log.refused(Command::PutService { service: finer, owner: None });
    assert_eq!(refused.to_string(), "group_len of service 1 is fixed: make a new service");
    let twin = Service { id: ServiceId::new(2).unwrap(), name: "two".into(), ..service() };
    assert!(matches!(
        log.refused(Command::PutService { service: twin, owner: None }),
        Rejected::Overlap { .. }
    ));
    assert!(log.cluster.audit.back().unwrap().refused.is_some());
}

/// What a watcher has who followed all changes.
fn follow(cluster: &mut Cluster, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Site(site) => drop(cluster.sites.insert(site.id, site)),
            Change::SiteGone(id) => drop(cluster.sites.remove(&id)),
            Change::Service(service) => drop(cluster.services.insert(service.id, service)),
            Change::Group(group) => drop(cluster.groups.insert(group.id, group)),
            Change::GroupGone(id) => drop(cluster.groups.remove(&id)),
            Change::Move(next) => drop(cluster.moves.insert(next.id, next)),
            Change::MoveEnded { id, .. } => drop(cluster.moves.remove(&id)),
            Change::Policy { policy, version } => {
                (cluster.policy, cluster.policy_version) = (policy, version)
            }
        }
    }
}

fn any_site() -> impl Strategy<Value = SiteId> {
    (0u8..4).prop_map(SiteId)
}

/// Commands in which a move is named by how recent it is; [`resolve`] puts its number there.
fn any_command() -> impl Strategy<Value = Command> {
    let proof = prop_oneof![Just(Proof::NeverGiven), Just(Proof::NeverAccepted), Just(Proof::Fenced)];
    let admin = prop_oneof![3 => Just(Admin::Active), 1 => Just(Admin::Cordoned), 1 => Just(Admin::Draining)];
    let recent = || (0u64..3).prop_map(MoveId);
    let wishes = || proptest::collection::vec((0u8..5, any_site()), 0..3);
    let groups =
        |wishes: Vec<(u8, SiteId)>| wishes.into_iter().map(|(n, to)| (group(n), to)).collect::<Vec<_>>();
    prop_oneof![
        1 => (0u8..4).prop_map(site),
        1 => any_site().prop_map(|site| Command::RemoveSite { site }),
        1 => (any_site(), admin).prop_map(|(site, admin)| Command::SetAdmin { site, admin }),
        2 => (any_site(), proptest::bool::weighted(0.8))
            .prop_map(|(site, alive)| Command::SetAlive { site, alive }),
        1 => proptest::option::of(any_site())
            .prop_map(|owner| Command::PutService { service: service(), owner }),
        2 => (0u8..5).prop_map(|n| Command::SplitGroup { group: group(n) }),
        2 => (0u8..5).prop_map(|n| Command::MergeGroups { group: group(n) }),
        6 => wishes().prop_map(move |wishes| {
            Command::StartMoves { moves: groups(wishes), reason: MoveReason::Load }
        }),
        6 => (recent(), any_site()).prop_map(|(move_id, by)| Command::Switch { move_id, by }),
        6 => (recent(), any_site()).prop_map(|(move_id, by)| served(move_id, by.0)),
        2 => (recent(), proptest::option::of(any_site()))
            .prop_map(|(move_id, by)| Command::Abort { move_id, by, reason: "x".into() }),
        3 => (recent(), any_site(), proof)
            .prop_map(|(move_id, by, proof)| Command::TakeBack { move_id, by, proof }),
        2 => recent().prop_map(|move_id| Command::TakeOver { move_id }),
        1 => wishes().prop_map(move |wishes| Command::Reassign { groups: groups(wishes) }),
    ]
}

/// Puts the number of the n-th last move where a command says n. What only parties may say is, two times in
/// three, said by one, or random commands would seldom get far.
#[expect(clippy::wildcard_enum_match_arm, reason = "only some commands name moves")]
fn resolve(mut command: Command, cluster: &Cluster, seen: &[MoveId]) -> Command {
    let nth = |n: MoveId| seen.iter().rev().nth(n.0 as usize).copied().unwrap_or(n);
    match &mut command {
        Command::Switch { move_id, by } => {
            *move_id = nth(*move_id);
            if let Some(present) = cluster.moves.get(move_id).filter(|_| by.0 > 0) {
                *by = present.from;
            }
        }
        Command::Served { move_id, by, .. } => {
            *move_id = nth(*move_id);
            if let Some(present) = cluster.moves.get(move_id).filter(|_| by.0 > 0) {
                *by = present.to;
            }
        }
        Command::Abort { move_id, .. }
        | Command::TakeBack { move_id, .. }
        | Command::TakeOver { move_id } => {
            *move_id = nth(*move_id);
        }
        _ => {}
    }
    command
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// I1, and what the module promises: one owner per group and epoch, epochs only grow, one move per group.
    #[test]
    fn random_commands_keep_every_rule(
        commands in proptest::collection::vec(any_command(), 1..80), cut in 0usize..80,
    ) {
        let mut log = log();
        let mut watcher = Cluster::default();
        follow(&mut watcher, log.cluster.snapshot_changes());
        let mut owners: BTreeMap<(GroupId, Epoch), SiteId> = BTreeMap::new();
        let mut seen = Vec::new();
        let mut entries = Vec::new();
        let mut snapshot = log.cluster.clone();
        for (n, command) in commands.iter().enumerate() {
            let command = resolve(command.clone(), &log.cluster, &seen);
            let bytes = crate::wire::encode(&command);
            prop_assert_eq!(crate::wire::decode::<Command>(bytes, 1 << 20), Ok(command.clone()));
            let before = log.cluster.clone();
            let applied = log.apply(command.clone());
            entries.push((log.index, command.clone()));
            if n == cut {
                let json = serde_json::to_vec(&log.cluster).unwrap();
                snapshot = serde_json::from_slice(&json).unwrap();
                entries.clear();
            }
            follow(&mut watcher, applied.changes.clone());
            for (id, group) in &log.cluster.groups {
                let owner = owners.entry((*id, group.epoch)).or_insert(group.owner);
                prop_assert_eq!(*owner, group.owner);
                if let Some(before) = before.groups.get(id) {
                    prop_assert!(group.epoch >= before.epoch);
                    prop_assert!(group.owner == before.owner || group.epoch > before.epoch);
                }
                let moves: Vec<_> = log.cluster.moves.values().filter(|m| m.group == *id).collect();
                prop_assert!(moves.len() <= 1);
                prop_assert_eq!(moves.first().map(|m| m.id), group.move_id);
                prop_assert!(log.cluster.sites.contains_key(&group.owner), "an owner is never removed");
                prop_assert!(moves.iter().all(|m| m.epoch > group.epoch && m.from == group.owner && !m.id.is_local()));
            }
            seen.extend(log.cluster.moves.keys().filter(|id| !before.moves.contains_key(id)));
            if applied.result.is_ok() && !matches!(command, Command::StartMoves { .. }) {
                let again = log.apply(command.clone());
                entries.push((log.index, command));
                prop_assert_eq!(again, Applied { result: applied.result, changes: vec![] });
            }
        }
        prop_assert_eq!(watcher.snapshot_changes(), log.cluster.snapshot_changes());
        for (index, command) in entries {
            snapshot.apply(index, &Proposal { actor: "test".into(), at_ms: 0, command });
        }
        prop_assert_eq!(snapshot, log.cluster);
    }
}
