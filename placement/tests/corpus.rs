//! The kept inputs of the fuzz targets, and what they were seeded with, are replayed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;

use flow::{Epoch, GroupId, MoveId, ServiceId, SiteId};
use placement::core::{Change, Cluster, Command, Group, Policy, Proposal, SiteReport};
use placement::node::{ClientRequest, ClientResponse};
use placement::{pack, wire};

#[path = "../../dataplane/fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "the package of the fuzz targets exports it")]
mod targets;

use replay::{after, replay};

fn some_groups() -> BTreeMap<GroupId, Group> {
    let prefixes = ["100.64.0.0/24", "100.64.1.0/24", "100.64.4.0/22", "2001:db8::/48"];
    let group = |(n, prefix): (u64, &str)| {
        let id = GroupId { service: ServiceId::new(1).unwrap(), prefix: prefix.parse().unwrap() };
        let (owner, standby) = (SiteId(n as u8), (n == 2).then_some(SiteId(7)));
        Group { id, owner, epoch: Epoch(n), move_id: (n == 1).then_some(MoveId(9)), changed: 5 * n, standby }
    };
    let groups = (0..).zip(prefixes).map(group);
    groups.map(|group| (group.id, group)).collect()
}

fn start() -> Vec<Command> {
    targets::START.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    for (index, command) in (1..).zip(start()) {
        cluster.apply(index, &Proposal { actor: "x".into(), at_ms: 1, command }).result.unwrap();
    }
    cluster
}

/// JSON as it is on the wire.
fn report() -> &'static str {
    concat!(
        r#"{"site":0,"packets_per_s":900,"busy":0.5,"groups":[{"group":{"service":1,"prefix":"100.64.0.0/24"},"packets_per_s":400,"#,
        r#""flows":9,"inside_ingress":[[1,400]],"outside_ingress":[[0,1]],"remote_rtt_us":9000}],"#,
        r#""peers":[{"site":1,"rtt_us":80000},{"site":2,"rtt_us":20000}],"clients":[{"group":{"service":1,"prefix":"100.64.0.0/24"},"#,
        r#""ingress":1,"count":5,"min_us":5000,"mean_us":6000}],"servers":[{"prefix":"192.0.2.0/24","ingress":0,"#,
        r#""count":3,"min_us":900,"mean_us":950,"answered":"192.0.2.1:443"}],"talks":[{"group":{"service":1,"prefix":"100.64.0.0/24"},"#,
        r#""servers":[["192.0.2.0/24",4]]}],"probes_per_s":5}"#,
    )
}

/// Commands about what a script begins with.
fn commands() -> Vec<String> {
    let policy = |rules: &str| {
        format!(
            r#"{{"put_policy":{{"policy":{{"labels":{{"eu":["100.64.0.0/23"]}},"rules":[{rules}]}},"expected_version":0}}}}"#
        )
    };
    let rules = [
        r#"{"name":"x","label":"eu","deny":[0]}"#,
        r#"{"name":"x","clients":"100.64.0.0/24","pin":1},{"name":"y","service":1,"prefer":[1,2],"price_ms":5}"#,
        r#"{"name":"x","drain":{"site":0}},{"name":"y","slo":{"delay_ms":40},"price_ms":3}"#,
        r#"{"name":"x","dial":{"site":1,"share":0.5}},{"name":"z","standby":"any"}"#,
        r#"{"name":"x","spread":{"share":0.5}},{"name":"y","charge":{"ms":1,"per_kflow_ms":2,"life_s":30}},{"name":"z","allow":[0,1]}"#,
        r#"{"name":"x","capacity":{"site":1,"packets_per_s":10}},{"name":"y","budget":{"moves_per_minute":5},"until_ms":9}"#,
    ];
    let mut commands: Vec<String> = rules.iter().map(|rules| policy(rules)).collect();
    commands.extend(
        [
            r#"{"set_admin":{"site":0,"admin":"draining"}}"#,
            r#"{"start_moves":{"moves":[[{"service":1,"prefix":"100.64.0.0/24"},1],[{"service":1,"prefix":"100.64.1.0/24"},2]],"reason":"operator"}}"#,
            r#"{"switch":{"move_id":40000,"by":0}}"#,
            r#"{"abort":{"move_id":40000,"by":null,"reason":"no"}}"#,
            r#"{"take_back":{"move_id":40000,"by":0,"proof":"never_cut"}}"#,
            r#"{"set_alive":{"site":0,"alive":false}}"#,
            r#"{"take_over":{"move_id":40000}}"#,
            r#"{"reassign":{"groups":[[{"service":1,"prefix":"100.64.2.0/24"},2]]}}"#,
            r#"{"set_standbys":{"standbys":[[{"service":1,"prefix":"100.64.2.0/24"},2],[{"service":1,"prefix":"100.64.3.0/24"},null]]}}"#,
            r#"{"split_group":{"group":{"service":1,"prefix":"100.64.0.0/24"}}}"#,
            r#"{"merge_groups":{"group":{"service":1,"prefix":"100.64.0.0/23"}}}"#,
            r#"{"confirm_policy":{"version":1}}"#,
            r#"{"remove_site":{"site":2}}"#,
        ]
        .map(str::to_owned),
    );
    for command in &commands {
        let read = serde_json::from_str::<Command>(command);
        assert!(read.is_ok(), "{command}: {read:?}");
    }
    commands
}

#[test]
fn no_kept_table_of_groups_is_misread() {
    let columns = [&[4_u8, 2, 1, 0, 24, 2, 1, 0, 22, 1][..], &[0x80, 0x80, 0x80, 0xa2, 6, 0, 0]].concat();
    let packed = pack::pack(&some_groups());
    let head = 3;
    let unpacked = zstd::bulk::decompress(&packed[head..], 1 << 12).unwrap();
    let seeds = [
        after(0, &packed),
        after(0, &pack::pack(&BTreeMap::new())),
        after(1, &after(4, &unpacked)),
        after(1, &columns),
    ];
    replay("groups", targets::groups, &seeds);
}

#[test]
fn no_kept_message_between_nodes_is_misread() {
    let proposal = |command| Proposal { actor: "site a".into(), at_ms: 7, command };
    let mut seeds: Vec<_> =
        start().into_iter().map(|command| after(0, &wire::encode(&proposal(command)))).collect();
    let read: SiteReport = serde_json::from_str(report()).unwrap();
    seeds.push(after(1, &wire::encode(&ClientRequest::Report(Box::new(read)))));
    seeds.push(after(1, &wire::encode(&ClientRequest::Watch { since: 7, wait_ms: 9, table: true })));
    seeds.push(after(2, &wire::encode(&ClientResponse::Unreadable("x".into()))));
    let changes: Vec<Change> = cluster().snapshot_changes();
    seeds.push(after(3, &wire::encode(&changes)));
    seeds.push(after(0x80 | 1, report().as_bytes()));
    let body = |command: &String| format!(r#"{{"actor":"x","at_ms":1,"command":{command}}}"#);
    seeds.extend(commands().iter().map(|command| after(0x82, body(command).as_bytes())));
    replay("wire", targets::wire, &seeds);
}

#[test]
fn no_kept_snapshot_is_misread() {
    let whole = wire::encode_cluster(&Cluster { groups: some_groups(), ..cluster() });
    let body = serde_json::to_vec(&Cluster { policy: Policy::default(), ..cluster() }).unwrap();
    let seeds = [after(0, &whole), after(0, &wire::encode(&cluster())), after(1, &after(0, &body))];
    replay("cluster", targets::cluster, &seeds);
}

#[test]
fn no_kept_command_makes_the_replicated_state_panic_or_change_when_refused() {
    let lines = commands();
    let mut seeds: Vec<_> = lines.iter().map(|line| line.clone().into_bytes()).collect();
    // Moves that are begun, switched, taken back and aborted.
    let [switch, abort, back] = [8, 9, 10].map(|at| lines[at].as_str());
    for script in [[&lines[7], switch, back], [&lines[7], abort, switch]] {
        seeds.push(script.join("\n").into_bytes());
    }
    seeds.push([&lines[15][..], &lines[16], &lines[15]].join("\n").into_bytes());
    replay("commands", targets::commands, &seeds);
}

#[test]
fn no_kept_report_or_policy_makes_the_leader_panic() {
    let reports: Vec<_> = (0..3)
        .map(|site| report().replace("\"site\":0,\"packets", &format!("\"site\":{site},\"packets")))
        .collect();
    let seeds = commands().into_iter().map(|command| {
        let [a, b, c] = &reports[..] else { panic!("three sites report") };
        [a, b, c, "0", &command, "1", a, b, c, "2"].join("\n").into_bytes()
    });
    replay("leader", targets::leader, &seeds.collect::<Vec<_>>());
}
