use flow::nat::NatSpec;
use flow::{Epoch, MoveId, ServiceId, SiteId};
use proptest::prelude::*;

use super::super::*;
use super::*;

/// As by default.
const REST_MS: u64 = 15_000;

struct Log {
    cluster: Cluster,
    index: u64,
    now_ms: u64,
}

fn id(text: &str) -> GroupId {
    text.parse().unwrap()
}

fn split(text: &str) -> Command {
    Command::SplitGroup { group: id(text) }
}

fn merge(text: &str) -> Command {
    Command::MergeGroups { group: id(text) }
}

impl Log {
    /// Two sites alive; four groups, all at site 0.
    fn new() -> Self {
        let mut log = Self { cluster: Cluster::default(), index: 0, now_ms: 1_000_000 };
        for site in [0, 1].map(SiteId) {
            log.ok(Command::PutSite(SiteSpec {
                id: site,
                name: format!("site-{site}"),
                latitude: None,
                longitude: None,
                endpoint: "[::1]:1".into(),
                capacity_pps: 1_000,
                capacity_flows: None,
                capacity_bps: None,
                failure_domain: None,
            }));
            log.ok(Command::SetAlive { site, alive: true });
        }
        let nat = NatSpec {
            clients: vec!["100.64.0.0/22".parse().unwrap()],
            pool: vec!["192.0.2.0/28".parse().unwrap()],
            ports_per_subscriber: 512,
            first_port: 1024,
            port_key: 0,
        };
        let service = Service {
            id: ServiceId::new(1).unwrap(),
            name: "nat".into(),
            nat,
            timeouts: Timeouts::default(),
            ordering: Ordering::Strict,
            group_len: 24,
        };
        log.ok(Command::PutService { service, owner: Some(SiteId(0)) });
        log
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.index += 1;
        let proposal = Proposal { actor: "test".into(), at_ms: self.now_ms, command };
        self.cluster.apply(self.index, &proposal)
    }

    fn ok(&mut self, command: Command) -> Vec<Change> {
        let applied = self.apply(command);
        applied.result.unwrap();
        applied.changes
    }

    fn refused(&mut self, command: Command) -> Rejected {
        let before = self.cluster.groups.clone();
        let refused = self.apply(command).result.unwrap_err();
        assert_eq!(self.cluster.groups, before);
        refused
    }

    fn start(&mut self, group: &str, to: u8) -> MoveId {
        let moves = vec![(id(group), SiteId(to))];
        let applied = self.apply(Command::StartMoves { moves, reason: MoveReason::Operator });
        match applied.result.unwrap() {
            Outcome::Moves(started) => started[0].move_id.unwrap(),
            Outcome::Done => unreachable!(),
        }
    }

    fn finish(&mut self, move_id: MoveId, from: u8, to: u8) {
        self.ok(Command::Switch { move_id, by: SiteId(from) });
        self.ok(Command::Served { move_id, by: SiteId(to), summary: MoveSummary::default() });
    }

    fn group(&self, text: &str) -> Group {
        self.cluster.groups[&id(text)]
    }
}

#[test]
fn halves_have_owner_and_epoch_of_the_whole_and_watchers_hear_of_all_three() {
    let mut log = Log::new();
    let move_id = log.start("1:100.64.1.0/24", 1);
    log.finish(move_id, 0, 1);
    log.now_ms += REST_MS;
    let whole = log.group("1:100.64.1.0/24");
    let halves = ["1:100.64.1.0/25", "1:100.64.1.128/25"].map(|half| Group { id: id(half), ..whole });
    let gone = Change::GroupGone(whole.id);
    assert_eq!(log.ok(split("1:100.64.1.0/24")), [gone, Change::Group(halves[0]), Change::Group(halves[1])]);
    assert_eq!((halves[0].owner, halves[0].epoch), (SiteId(1), Epoch(2)));
    assert_eq!(log.ok(split("1:100.64.1.0/24")), [], "said twice it is as said once");
}

#[test]
fn siblings_of_one_owner_merge_and_keep_the_greater_epoch() {
    let mut log = Log::new();
    log.ok(split("1:100.64.1.0/24"));
    for (from, to) in [(0, 1), (1, 0)] {
        let move_id = log.start("1:100.64.1.128/25", to);
        let wrong = log.refused(merge("1:100.64.1.0/24"));
        assert!(matches!(wrong, Rejected::Moving { .. } | Rejected::TwoOwners { .. }), "{wrong}");
        log.finish(move_id, from, to);
    }
    let early = log.refused(merge("1:100.64.1.0/24"));
    assert_eq!(early, Rejected::JustMoved { group: id("1:100.64.1.128/25"), wait_ms: REST_MS });
    log.now_ms += REST_MS;
    let changes = log.ok(merge("1:100.64.1.0/24"));
    assert_eq!(changes.len(), 3);
    let whole = log.group("1:100.64.1.0/24");
    assert_eq!((whole.owner, whole.epoch, whole.move_id), (SiteId(0), Epoch(3), None));
    assert_eq!(log.ok(merge("1:100.64.1.0/24")), []);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut log = Log::new();
    let text = |refused: Rejected| refused.to_string();
    assert_eq!(text(log.refused(split("1:100.64.9.0/24"))), text(Rejected::NoGroup(id("1:100.64.9.0/24"))));
    let above = log.refused(merge("1:100.64.0.0/23"));
    assert_eq!(
        text(above),
        "group 1:100.64.0.0/23 would be above the cut of its service: its prefix has to have 24 bits or more"
    );
    let missing = log.refused(merge("1:100.64.1.0/26"));
    assert_eq!(missing, Rejected::NoGroup(id("1:100.64.1.0/27")));
    let mut group = id("1:100.64.1.0/24");
    while let Some((low, _)) = group.prefix.halves() {
        log.ok(Command::SplitGroup { group });
        group.prefix = low;
    }
    assert_eq!(group.prefix.len(), 32);
    assert_eq!(
        text(log.refused(Command::SplitGroup { group })),
        "group 1:100.64.1.0/32 is a single subscriber: that is the smallest"
    );
    log.ok(split("1:100.64.2.0/24"));
    log.start("1:100.64.2.0/25", 1);
    assert!(matches!(log.refused(split("1:100.64.2.0/25")), Rejected::Moving { .. }));
    log.ok(Command::SetAlive { site: SiteId(0), alive: false });
    assert!(matches!(log.refused(split("1:100.64.3.0/24")), Rejected::SourceDead { .. }));
}

#[test]
fn halves_at_two_sites_or_with_a_rule_of_their_own_do_not_merge() {
    let mut log = Log::new();
    log.ok(split("1:100.64.1.0/24"));
    let policy: Policy = serde_json::from_value(serde_json::json!({
        "labels": { "vip": ["100.64.1.128/25"] },
        "rules": [{ "name": "there", "label": "vip", "deny": [1] }],
    }))
    .unwrap();
    log.ok(Command::PutPolicy { policy, expected_version: 0, confirm_within_ms: None });
    let rule = log.refused(merge("1:100.64.1.0/24"));
    assert_eq!(rule, Rejected::FinerRule { group: id("1:100.64.1.0/24"), rule: "there".into() });
    log.ok(Command::PutPolicy { policy: Policy::default(), expected_version: 1, confirm_within_ms: None });
    let move_id = log.start("1:100.64.1.128/25", 1);
    log.finish(move_id, 0, 1);
    log.now_ms += REST_MS;
    let two = log.refused(merge("1:100.64.1.0/24"));
    let (low, high) = (SiteId(0), SiteId(1));
    assert_eq!(two, Rejected::TwoOwners { group: id("1:100.64.1.0/24"), low, high });
}

proptest! {
    #[test]
    fn groups_stay_the_leaves_of_one_trie(wishes in prop::collection::vec((any::<bool>(), any::<u8>(), 0u8..9), 1..60)) {
        let mut log = Log::new();
        for (splits, address, more) in wishes {
            let address = std::net::Ipv4Addr::new(100, 64, address & 3, address);
            let prefix = Prefix::containing(address.into(), 24 + more).unwrap();
            let group = GroupId { service: ServiceId::new(1).unwrap(), prefix };
            log.apply(if splits { Command::SplitGroup { group } } else { Command::MergeGroups { group } });
            let prefixes: Vec<_> = log.cluster.groups.keys().map(|group| group.prefix).collect();
            prop_assert!(prefixes.windows(2).all(|pair| !pair[0].overlaps(&pair[1])));
            prop_assert_eq!(prefixes.iter().map(Prefix::size).sum::<u128>(), 1_024);
        }
    }
}
