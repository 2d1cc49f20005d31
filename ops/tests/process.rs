//! Whole processes: a deployment of three sites as child processes, real traffic through it, and each kind of process
//! killed while groups move. Nothing may be lost, duplicated or reordered wherever the design promises it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use flow::{SiteId, WorkerId};
use limosa::demo::cluster::{Cluster, Layout, Part};
use limosa::demo::scenario::world_spec;
use limosa::demo::world::{World, WorldHandle};
use limosa::demo::{Thresholds, built_in};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use switchctl::{Session, SessionOptions, SwitchAddr, SwitchEvent};
use tokio::time::sleep;

/// Longest wait for moves to end: a dead leader and its lease included.
const MOVES_BOUND: Duration = Duration::from_secs(40);

/// Phases of a move that the API tells of.
const PHASES: [&str; 2] = ["preparing", "switching"];

/// Enough for each group to have some.
const TCP_CONNECTIONS: usize = 48;

/// How often moves are started until one is seen in its phase.
const TRIES: usize = 10;

struct Deployment {
    cluster: Cluster,
    /// Killed, and not started again yet.
    gone: Vec<Part>,
    /// The groups that were at Amsterdam at first.
    home: Vec<Value>,
    tcp_connections: usize,
    world: WorldHandle,
    _directory: Option<tempfile::TempDir>,
}

impl Deployment {
    /// Three sites at their real distances; little traffic, but of every group.
    async fn start() -> Self {
        Self::start_with(None, TCP_CONNECTIONS).await
    }

    /// The same; agents start and stop workers if they are told when.
    async fn start_with(elastic: Option<Thresholds>, tcp_connections: usize) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // In LIMOSA_TEST_DIRECTORY logs and state can be looked at afterwards.
        let (directory, path) = match std::env::var_os("LIMOSA_TEST_DIRECTORY") {
            Some(parent) => {
                std::fs::create_dir_all(&parent).unwrap();
                (None, tempfile::Builder::new().prefix("limosa-").tempdir_in(parent).unwrap().keep())
            }
            None => {
                let directory = tempfile::Builder::new().prefix("limosa-").tempdir().unwrap();
                let path = directory.path().to_owned();
                (Some(directory), path)
            }
        };
        let layout = Layout {
            sites: built_in(),
            workers: 2,
            flows: 1 << 14,
            directory: path,
            binary: PathBuf::from(env!("CARGO_BIN_EXE_limosa")),
            elastic,
            relay_late: None,
        };
        let cluster = Cluster::start(layout).await.unwrap();
        cluster.set_policy(json!({ "automatic": false })).await.unwrap();
        cluster.configure(100_000).await.unwrap();
        cluster.until_ready().await.unwrap();
        let mut spec = world_spec(&cluster, 7);
        spec.tcp_connections = tcp_connections;
        spec.udp_flows = 1_200;
        spec.udp_fast_flows = 120;
        spec.udp_interval = (Duration::from_secs(1), Duration::from_secs(2));
        spec.grace = Duration::from_secs(3);
        let world = World::start(spec).unwrap();
        world.begin_act("test").unwrap();
        sleep(Duration::from_secs(2)).await;
        let mut deployment = Self {
            cluster,
            gone: Vec::new(),
            home: Vec::new(),
            tcp_connections,
            world,
            _directory: directory,
        };
        deployment.home = deployment.groups_at("amsterdam").await;
        deployment
    }

    /// The names of groups at a site.
    async fn groups_at(&self, site: &str) -> Vec<Value> {
        let groups = self.cluster.get(&format!("/v1/groups?site={site}")).await.unwrap();
        groups["groups"].as_array().unwrap().iter().map(|group| group["group"].clone()).collect()
    }

    /// Starts moves of so many groups from one site to another, and gives their numbers.
    async fn start_moves(&self, count: usize, from: &str, to: &str) -> Vec<u64> {
        let mut groups = self.groups_at(from).await;
        groups.truncate(count);
        assert_eq!(groups.len(), count);
        self.move_groups(&groups, to).await
    }

    async fn move_groups(&self, groups: &[Value], to: &str) -> Vec<u64> {
        if groups.is_empty() {
            return Vec::new();
        }
        let moves: Vec<_> = groups.iter().map(|group| json!({ "group": group, "to": to })).collect();
        let started = self.cluster.post("/v1/moves", &json!({ "moves": moves })).await.unwrap();
        started["moves"].as_array().unwrap().iter().map(|started| started["move"].as_u64().unwrap()).collect()
    }

    /// Waits until all these moves are done.
    async fn until_done(&self, moves: &[u64]) {
        for state in self.until_ended(moves).await {
            assert!(state["state"] == "done", "the move was given up: {state}");
        }
    }

    /// Waits until all these moves have ended, one way or the other, and gives their last states.
    async fn until_ended(&self, moves: &[u64]) -> Vec<Value> {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        let mut states = Vec::new();
        while states.len() < moves.len() {
            let state =
                self.cluster.get(&format!("/v1/moves/{}", moves[states.len()])).await.unwrap_or_default();
            if state["state"] == "done" || state["state"] == "aborted" || state["state"] == "taken_back" {
                states.push(state);
                continue;
            }
            assert!(tokio::time::Instant::now() < ends, "the move has not ended: {state}");
            sleep(Duration::from_millis(100)).await;
        }
        states
    }

    /// From now on all is well again.
    async fn assert_whole_again(&self) {
        self.cluster.until_ready().await.unwrap();
        // What was sent before may still be on its way, or held.
        sleep(Duration::from_secs(4)).await;
        self.world.begin_act("after").unwrap();
        sleep(Duration::from_secs(2)).await;
        let after = self.world.end_act().unwrap();
        assert!(after.packets.sent > 500, "{:?}", after.packets);
        assert_eq!(after.packets.lost, 0, "{:?} {:#?}", after.packets, self.cluster.drops().await);
        let total = self.world.total().unwrap();
        assert_eq!(total.packets.duplicated, 0, "{:?}", total.packets);
        assert_eq!((total.tcp.corrupt, total.checks.misdelivered, total.checks.corrupt_packets), (0, 0, 0));
        assert_eq!(
            total.checks.outside_changed, 0,
            "ports are a function of the subscriber, so they are the same again"
        );
    }

    /// No packet, byte or connection may have come to harm.
    async fn assert_unharmed(&self) {
        sleep(Duration::from_secs(2)).await;
        let traffic = self.world.drain().unwrap();
        let (p, t) = (traffic.packets, traffic.tcp);
        assert!(p.sent > 2_000, "{p:?}");
        let drops = self.cluster.drops().await;
        let harm = format!("{p:?} {:?}\nmissing: {:#?}\ndrops: {drops:#?}", traffic.checks, traffic.missing);
        assert_eq!((p.lost, p.duplicated, p.reordered), (0, 0, 0), "{harm}");
        assert_eq!((t.reset, t.corrupt), (0, 0), "{t:?}");
        assert_eq!(t.connections, self.tcp_connections as u64);
        assert_eq!(traffic.checks, Default::default());
    }

    /// Where a move is, by the API; nothing when no node answers.
    async fn state_of(&self, id: u64) -> String {
        let state = self.cluster.get(&format!("/v1/moves/{id}")).await.unwrap_or_default();
        state["state"].as_str().unwrap_or_default().to_owned()
    }

    async fn is_in_hand(&self, id: u64) -> bool {
        let state = self.state_of(id).await;
        state == "preparing" || state == "switching"
    }

    /// The first of these moves that the API says to be in this phase; `None` when all were past it before it could be asked.
    async fn until_phase(&self, moves: &[u64], phase: &str) -> Option<u64> {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        loop {
            let mut is_left = false;
            for &id in moves {
                let state = self.state_of(id).await;
                if state == phase {
                    return Some(id);
                }
                is_left |= state == "preparing" || state == "switching" || state.is_empty();
            }
            if !is_left {
                return None;
            }
            assert!(tokio::time::Instant::now() < ends, "no move came to the phase {phase}, and some go on");
        }
    }

    /// Does something to the deployment while a move from Amsterdam to Singapore is in this phase. Moves that were quicker than this test
    /// go back, and it is tried again.
    async fn in_phase(&mut self, phase: &str, fault: impl AsyncFn(&mut Self)) -> Vec<u64> {
        for _ in 0..TRIES {
            let moves = self.start_moves(6, "amsterdam", "singapore").await;
            if let Some(id) = self.until_phase(&moves, phase).await {
                fault(self).await;
                if self.is_in_hand(id).await {
                    return moves;
                }
            }
            self.until_gone().await;
            self.restart_gone();
            self.until_ended(&moves).await;
            self.go_back().await;
        }
        panic!("no move was in hand in its phase {phase} when the fault came");
    }

    /// The groups of Amsterdam that are at Singapore go back. A move may be given up while a process that was killed is still on its way
    /// back, and is begun again then.
    async fn go_back(&self) {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        loop {
            let mut away = self.groups_at("singapore").await;
            away.retain(|group| self.home.contains(group));
            if away.is_empty() {
                return;
            }
            assert!(tokio::time::Instant::now() < ends, "they do not go back: {away:?}");
            let back = self.move_groups(&away, "amsterdam").await;
            self.until_ended(&back).await;
        }
    }

    /// Who was told to stop has stopped. Who was killed has already.
    async fn until_gone(&mut self) {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        while self.gone.iter().any(|&part| self.cluster.process_id(part).is_some()) {
            assert!(tokio::time::Instant::now() < ends, "they do not end: {:?}", self.gone);
            self.cluster.ended();
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn kill(&mut self, part: Part) {
        self.cluster.kill(part).unwrap();
        self.gone.push(part);
    }

    fn restart_gone(&mut self) {
        for part in std::mem::take(&mut self.gone) {
            self.cluster.spawn(part).unwrap();
        }
    }

    /// Kills a process in each phase of moves, and starts it again after a while; what was to move has moved.
    async fn kill_in_each_phase(&mut self, part: Part, pause: Duration) {
        for phase in PHASES {
            let moves = self.in_phase(phase, async |deployment| deployment.kill(part)).await;
            sleep(pause).await;
            self.restart_gone();
            self.until_done(&moves).await;
            self.go_back().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_under_traffic_lose_nothing() {
    let deployment = Deployment::start().await;
    let moves = deployment.start_moves(6, "amsterdam", "singapore").await;
    deployment.until_done(&moves).await;
    let back = deployment.start_moves(6, "singapore", "virginia").await;
    deployment.until_done(&back).await;
    deployment.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_of_the_source_killed_in_each_phase_loses_nothing() {
    let mut deployment = Deployment::start().await;
    deployment.kill_in_each_phase(Part::Agent(SiteId(1)), Duration::from_millis(300)).await;
    deployment.assert_unharmed().await;
}

/// The agent ends the moves in hand, and then itself; the moves that it has not begun are those of its next start.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_told_to_stop_in_the_middle_of_a_move_ends_with_its_moves() {
    let mut deployment = Deployment::start().await;
    let agent = Part::Agent(SiteId(1));
    for phase in PHASES {
        let told = async |deployment: &mut Deployment| {
            let pid = deployment.cluster.process_id(agent).unwrap();
            kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
            deployment.gone.push(agent);
        };
        let moves = deployment.in_phase(phase, told).await;
        deployment.until_gone().await;
        deployment.restart_gone();
        deployment.until_done(&moves).await;
        deployment.go_back().await;
    }
    deployment.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_of_the_target_killed_in_each_phase_loses_nothing() {
    let mut deployment = Deployment::start().await;
    deployment.kill_in_each_phase(Part::Agent(SiteId(3)), Duration::from_millis(300)).await;
    deployment.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_of_an_ingress_killed_in_each_phase_loses_nothing() {
    let mut deployment = Deployment::start().await;
    deployment.kill_in_each_phase(Part::Agent(SiteId(2)), Duration::from_millis(300)).await;
    deployment.assert_unharmed().await;
}

/// Its switch goes on by the rules that it has, whatever moves. Without TCP, which is never silent.
#[tokio::test(flavor = "multi_thread")]
async fn clients_behind_an_ingress_without_its_agent_may_be_silent_and_find_what_moved_meanwhile() {
    let mut deployment = Deployment::start_with(None, 0).await;
    let groups = deployment.home[..4].to_vec();
    deployment.until_done(&deployment.move_groups(&groups, "singapore").await).await;
    deployment.kill(Part::Agent(SiteId(1)));
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    let is_alive = |site: &Value| site["id"] == 1 && site["alive"] == true;
    while deployment.cluster.get("/v1/sites").await.unwrap()["sites"].as_array().unwrap().iter().any(is_alive)
    {
        assert!(tokio::time::Instant::now() < ends, "it still has its lease");
        sleep(Duration::from_millis(100)).await;
    }
    deployment.until_done(&deployment.move_groups(&groups, "virginia").await).await;
    let set_rate = |factor: f64| {
        for group in &groups {
            let (_, prefix) = group.as_str().unwrap().split_once(':').unwrap();
            assert_eq!(deployment.world.set_rate(prefix.parse().unwrap(), factor).unwrap(), 1);
        }
    };
    set_rate(1e-6);
    // Longer than an old owner relays (`moves.relay_ms`) and waits for stragglers.
    sleep(Duration::from_secs(17)).await;
    set_rate(1.0);
    sleep(Duration::from_secs(3)).await;
    deployment.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_killed_in_each_phase_loses_nothing() {
    let mut deployment = Deployment::start().await;
    for phase in PHASES {
        let kill = async |deployment: &mut Deployment| {
            let leader = deployment.cluster.leader().await.unwrap();
            deployment.kill(Part::Placement(leader));
        };
        let moves = deployment.in_phase(phase, kill).await;
        sleep(Duration::from_secs(1)).await;
        deployment.restart_gone();
        deployment.until_done(&moves).await;
        deployment.go_back().await;
    }
    deployment.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_without_its_controller_in_each_phase_loses_nothing() {
    let mut deployment = Deployment::start().await;
    for phase in PHASES {
        let cut = async |deployment: &mut Deployment| {
            tokio::spawn(deployment.cluster.controller_cut(SiteId(2), Duration::from_secs(1)));
        };
        let moves = deployment.in_phase(phase, cut).await;
        deployment.until_done(&moves).await;
        deployment.go_back().await;
    }
    deployment.assert_unharmed().await;
}

/// What is in a switch, or comes while it is gone, is lost with it; nothing else is, and it is steered as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_switch_killed_in_each_phase_is_steered_again() {
    let mut deployment = Deployment::start().await;
    deployment.kill_in_each_phase(Part::Switch(SiteId(2)), Duration::from_millis(200)).await;
    deployment.assert_whole_again().await;
}

/// A worker's table dies with its process: its flows are lost, and only they. The groups are served again, and the flows
/// of all other workers have seen nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_each_phase_loses_its_own_flows_only_and_its_groups_are_served_again() {
    let mut deployment = Deployment::start().await;
    for phase in PHASES {
        let kill = async |deployment: &mut Deployment| deployment.kill(Part::Worker(SiteId(1), WorkerId(1)));
        let moves = deployment.in_phase(phase, kill).await;
        sleep(Duration::from_millis(200)).await;
        deployment.restart_gone();
        // The agent gives the groups to a worker, and each flow's next packet from its client makes it anew.
        deployment.until_ended(&moves).await;
        deployment.cluster.until_ready().await.unwrap();
        deployment.go_back().await;
    }
    deployment.assert_whole_again().await;
    let elsewhere = deployment.start_moves(2, "singapore", "virginia").await;
    deployment.until_done(&elsewhere).await;
}

/// Real load, real hooks: a third worker comes, groups move to it, and it goes when the load is gone.
#[tokio::test(flavor = "multi_thread")]
async fn load_starts_a_worker_and_its_end_stops_it_and_nothing_is_lost() {
    let site = SiteId(1);
    let thresholds = Thresholds { busy_high: 0.02, busy_low: 0.012, hold_s: 1, pause_s: 3 };
    let deployment = Deployment::start_with(Some(thresholds), TCP_CONNECTIONS).await;
    let until = async |bound_s: u64, wanted: usize| {
        let ends = tokio::time::Instant::now() + Duration::from_secs(bound_s);
        while deployment.cluster.worker_count(site).await != wanted {
            if tokio::time::Instant::now() > ends {
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
        true
    };
    let clients: Vec<flow::Prefix> = ["100.64.0.0/20", "100.64.16.0/21"].map(|p| p.parse().unwrap()).to_vec();
    let set_rates = |factor| {
        clients.iter().for_each(|prefix| assert!(deployment.world.set_rate(*prefix, factor).unwrap() > 0));
    };
    // Packets come one by one here, so that little load is a few thousandths, and much a few hundredths.
    set_rates(0.1);
    assert!(until(30, 2).await, "two workers answer");
    let mut factor = 0.5;
    while !until(5, 3).await {
        factor *= 2.0;
        assert!(
            factor < 100.0,
            "no load starts a worker: {:?}",
            deployment.cluster.site_text(site, "/v1/workers").await
        );
        set_rates(factor);
    }
    let local = async || -> Value {
        let text = deployment.cluster.site_text(site, "/v1/local-moves").await.unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let moved_to = |moves: &Value, worker: u16| {
        moves.as_array().unwrap().iter().filter(|one| one["to"] == worker).count()
    };
    let ends = tokio::time::Instant::now() + Duration::from_secs(30);
    while moved_to(&local().await, 3) == 0 {
        assert!(tokio::time::Instant::now() < ends, "no group moves to the new worker");
        sleep(Duration::from_millis(200)).await;
    }
    set_rates(0.1);
    assert!(until(60, 2).await, "{:?}", deployment.cluster.site_text(site, "/v1/workers").await);
    let moves = local().await;
    assert!(moves.as_array().unwrap().iter().any(|one| one["from"] == 3), "{moves}");
    let metrics = deployment.cluster.site_text(site, "/metrics").await.unwrap();
    for name in ["starts", "stops"] {
        let line = format!("limosa_workers_{name}_total{{outcome=\"ok\",site=\"amsterdam\"}} 1");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    deployment.assert_unharmed().await;
}

/// Runs the command line against a deployment; exit status, output and error.
fn limosa(deployment: &Deployment, arguments: &[&str]) -> (i32, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
    for api in deployment.cluster.apis() {
        command.args(["--api", &api]);
    }
    // Paths in the demo's configuration files begin there.
    command.current_dir(&deployment.cluster.layout().directory);
    let output = command.args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_a_deployment_and_changes_it() {
    let deployment = Deployment::start().await;
    let ok = |arguments: &[&str]| {
        let (status, output, error) = limosa(&deployment, arguments);
        assert_eq!(status, 0, "{arguments:?}: {error}");
        output
    };
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&ok(&[arguments, &["-o", "json"]].concat())).unwrap()
    };
    assert_eq!(ok(&["site", "list", "-o", "name"]).lines().count(), 3);
    assert!(ok(&["site", "list"]).contains("amsterdam"));
    let groups = ok(&["group", "list", "-o", "name"]);
    let group = groups.lines().next().unwrap();
    assert!(ok(&["group", "explain", group]).contains("amsterdam"));
    assert!(ok(&["placement", "status"]).contains("amsterdam"));
    let owner = json(&["group", "get", group])["owner"].as_str().unwrap().to_owned();
    let to = if owner == "virginia" { "singapore" } else { "virginia" };
    ok(&["move", "start", group, "--to", to]);
    ok(&["move", "watch"]);
    assert_eq!(json(&["group", "get", group])["owner"], to);
    assert!(ok(&["move", "list", "-o", "json"]).contains(group));
    assert_eq!(json(&["policy", "get"])["automatic"], false);
    assert!(json(&["raft", "status"])["leader"].is_u64());
    ok(&["site", "drain", "singapore"]);
    assert_eq!(json(&["site", "get", "singapore"])["admin"], "draining");
    ok(&["site", "undrain", "singapore"]);
    assert!(ok(&["audit", "list"]).contains("singapore"));
    let (status, _, error) = limosa(&deployment, &["site", "drain", "atlantis"]);
    assert!(status != 0 && error.contains("atlantis"), "{status}: {error}");
    let (status, _, error) = limosa(&deployment, &["group", "get", "1:10.0.0.0/33"]);
    assert!(status != 0 && error.contains("10.0.0.0/33"), "{status}: {error}");
}

/// Two of three go on, and one more loss would end that: it is said at once, by whom ever one asks.
/// Waits until a command ends so, and says all of that.
async fn until_said(deployment: &Deployment, command: &[&str], expected: i32, words: &[&str]) {
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    loop {
        let (status, output, error) = limosa(deployment, command);
        let said = format!("{output}{error}");
        if status == expected && words.iter().all(|words| said.contains(words)) {
            return;
        }
        assert!(tokio::time::Instant::now() < ends, "{status}: {said}");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_node_that_is_gone_is_said_until_it_is_back() {
    let mut deployment = Deployment::start().await;
    let leader = deployment.cluster.leader().await.unwrap();
    let gone = (1..=3).find(|id| *id != leader).unwrap();
    let status = ["raft", "status"];
    until_said(&deployment, &status, 0, &["leader"]).await;
    deployment.kill(Part::Placement(gone));
    let silent = format!("have not answered the leader for more than 2.0 s: {gone};");
    until_said(&deployment, &status, 6, &[&silent]).await;
    let (_, output, _) = limosa(&deployment, &status);
    assert!(output.contains("voter (silent)"), "{output}");
    deployment.restart_gone();
    until_said(&deployment, &status, 0, &["leader"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_between_two_agents_that_is_cut_is_said_of_both_until_it_is_mended() {
    let deployment = Deployment::start().await;
    let list = ["site", "list"];
    until_said(&deployment, &list, 0, &["amsterdam"]).await;
    let links = deployment.cluster.links(Part::Agent(SiteId(1)), Part::Agent(SiteId(2)));
    deployment.cluster.wan().set_up(&links, false);
    let of = |site: &str, peer: &str| format!("{site}: no connection to the agent of {peer} at ");
    let both = [of("amsterdam", "virginia"), of("virginia", "amsterdam")];
    until_said(&deployment, &list, 6, &both.each_ref().map(String::as_str)).await;
    until_page(&deployment, "/readyz", "[+] peers: no connection to the agent of virginia", true).await;
    until_page(&deployment, "/readyz", "[-]", false).await;
    until_page(&deployment, "/metrics", "limosa_peers_unreached{site=\"amsterdam\"} 1", true).await;
    let moves = deployment.start_moves(1, "amsterdam", "singapore").await;
    deployment.until_done(&moves).await;

    deployment.cluster.wan().set_up(&links, true);
    until_said(&deployment, &list, 0, &["amsterdam"]).await;
    until_page(&deployment, "/metrics", "limosa_peers_unreached{site=\"amsterdam\"} 0", true).await;
    deployment.assert_unharmed().await;
}

/// Virginia is given the position of Singapore, as if its lines had been copied, and its own again.
#[tokio::test(flavor = "multi_thread")]
async fn a_site_with_a_wrong_position_is_named_until_it_is_mended() {
    let deployment = Deployment::start().await;
    let status = ["placement", "status"];
    let is_named = "virginia seems not to be where the latitude and longitude say";
    until_said(&deployment, &status, 0, &["mean delay"]).await;
    let said = limosa(&deployment, &status);
    assert!(!said.2.contains("seems not to be"), "{said:?}");
    let (_, site, _) = limosa(&deployment, &["site", "get", "virginia", "-o", "json"]);
    let site: Value = serde_json::from_str(&site).unwrap();
    let place = |latitude: &str, longitude: &str| {
        let of = |key: &str| site[key].to_string().trim_matches('"').to_owned();
        let (id, endpoint, capacity) = (of("id"), of("endpoint"), of("capacity_pps"));
        let set = [
            "site",
            "add",
            "virginia",
            "--id",
            &id,
            "--endpoint",
            &endpoint,
            "--capacity-pps",
            &capacity,
            "--latitude",
            latitude,
            "--longitude",
            longitude,
        ];
        let (status, output, error) = limosa(&deployment, &set);
        assert_eq!(status, 0, "{output}{error}");
    };
    place("1.3", "103.8");
    until_said(&deployment, &status, 0, &[is_named, "between virginia and singapore"]).await;
    place(&site["latitude"].to_string(), &site["longitude"].to_string());
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    while limosa(&deployment, &status).2.contains("seems not to be") {
        assert!(tokio::time::Instant::now() < ends, "it is where it says now");
        sleep(Duration::from_millis(200)).await;
    }
    deployment.assert_unharmed().await;
}

/// Halves are groups like others: one moves to another site and back under traffic, by the command line, and both are one again.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_splits_and_its_half_moves_and_both_merge_and_nothing_is_lost() {
    let deployment = Deployment::start().await;
    // Above the ten seconds for which an old owner relays.
    deployment.cluster.set_policy(json!({ "rest_after_move_ms": 11_000 })).await.unwrap();
    let whole = deployment.groups_at("amsterdam").await[0].as_str().unwrap().to_owned();
    let (status, output, error) = limosa(&deployment, &["group", "split", &whole, "-o", "json"]);
    assert_eq!(status, 0, "{error}");
    let halves: Value = serde_json::from_str(&output).unwrap();
    let halves: Vec<_> = (0..2).map(|n| halves["groups"][n]["group"].as_str().unwrap().to_owned()).collect();
    assert!(halves.iter().all(|half| half.ends_with("/25")), "{halves:?}");
    let listed = limosa(&deployment, &["group", "list", "-o", "name"]).1;
    let is_listed = |group: &str| listed.lines().any(|line| line == group);
    assert!(is_listed(&halves[0]) && is_listed(&halves[1]) && !is_listed(&whole), "{listed}");
    deployment.cluster.until_ready().await.unwrap();

    for (to, elsewhere) in [("singapore", true), ("amsterdam", false)] {
        let started = json!({ "moves": [{ "group": halves[0], "to": to }] });
        let started = deployment.cluster.post("/v1/moves", &started).await.unwrap();
        deployment.until_done(&[started["moves"][0]["move"].as_u64().unwrap()]).await;
        let (status, _, error) = limosa(&deployment, &["group", "merge", &halves[0]]);
        let wanted = if elsewhere { "are at sites 3 and 1" } else { "has just moved" };
        assert!(status == 3 && error.contains(wanted), "{status}: {error}");
    }
    sleep(Duration::from_secs(12)).await;
    let (status, output, error) = limosa(&deployment, &["group", "merge", &halves[1], "-o", "name"]);
    assert_eq!((status, output.trim()), (0, whole.as_str()), "{error}");
    deployment.cluster.until_ready().await.unwrap();

    let (status, _, error) = limosa(&deployment, &["group", "merge", &whole]);
    assert!(status == 4 || status == 3, "{status}: {error}");
    let (status, _, error) = limosa(&deployment, &["group", "split", "1:10.0.0.0/24"]);
    assert!(status == 4 && error.contains("1:10.0.0.0/24"), "{status}: {error}");
    deployment.assert_unharmed().await;
}

/// A second controller takes one rule away, as a person with `ovs-ofctl` would.
async fn remove_a_rule(socket: PathBuf) {
    let (handle, mut events) = Session::spawn(SwitchAddr::Unix(socket), SessionOptions::default());
    loop {
        match events.recv().await.unwrap() {
            SwitchEvent::Connected { .. } => {
                let flows = handle.flow_stats().await.unwrap();
                assert!(flows.len() > 1, "the agent has set rules");
                let kept = flows.into_iter().skip(1).map(|flow| (flow.key, flow.rule)).collect();
                handle.set_rules(Arc::new(kept), 1);
            }
            SwitchEvent::InForce { tag: 1, changes } => return assert_eq!(changes, 1),
            SwitchEvent::InForce { .. }
            | SwitchEvent::Disconnected
            | SwitchEvent::Silent(_)
            | SwitchEvent::Answering => {}
            SwitchEvent::Error(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_finds_a_rule_that_was_taken_away_and_mends_it() {
    let deployment = Deployment::start().await;
    let site = SiteId(1);
    let config = deployment.cluster.layout().config_path(Part::Agent(site)).display().to_string();
    let switch =
        |verb: &str| limosa(&deployment, &["switch", verb, "--config", config.as_str(), "-o", "json"]);
    let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let (status, rules, error) = switch("rules");
    assert_eq!(status, 0, "{error}");
    let all = json(&rules)["rules"].as_array().unwrap().len();
    let (status, differences, error) = switch("diff");
    assert_eq!(status, 0, "{differences}{error}");

    remove_a_rule(deployment.cluster.layout().site_directory(site).join("switch.control")).await;
    let (status, differences, _) = switch("diff");
    assert_eq!((status, json(&differences)["differences"][0]["drift"].as_str()), (6, Some("missing")));
    let (status, mended, error) = switch("resync");
    assert_eq!((status, json(&mended)["mended"].as_u64()), (0, Some(1)), "{error}");
    let (status, _, error) = switch("diff");
    assert_eq!(status, 0, "{error}");
    let (_, rules, _) = switch("rules");
    assert_eq!(json(&rules)["rules"].as_array().unwrap().len(), all);

    let (status, _, error) = switch("setup");
    assert!(status == 2 && error.contains("no table [openvswitch]"), "{status}: {error}");
}

/// Gives a process a part of its configuration file, up to some words, or all of it, and has it read again.
fn reconfigure(deployment: &Deployment, part: Part, until: Option<&str>) {
    let path = deployment.cluster.layout().config_path(part);
    let kept = path.with_extension("whole");
    if !kept.exists() {
        std::fs::copy(&path, &kept).unwrap();
    }
    let whole = std::fs::read_to_string(&kept).unwrap();
    let end = until.map_or(whole.len(), |until| whole.find(until).unwrap());
    std::fs::write(&path, &whole[..end]).unwrap();
    let id = i32::try_from(deployment.cluster.process_id(part).unwrap()).unwrap();
    kill(Pid::from_raw(id), Signal::SIGHUP).unwrap();
}

/// Waits until an agent's page has these words, or has them no more.
async fn until_page(deployment: &Deployment, path: &str, words: &str, are_there: bool) {
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    loop {
        let text = deployment.cluster.site_text(SiteId(1), path).await.unwrap();
        if text.contains(words) == are_there {
            return;
        }
        assert!(tokio::time::Instant::now() < ends, "{path}, {words}: {text}");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_peer_is_taken_with_sighup_and_the_moves_that_waited_for_it_go_on() {
    let deployment = Deployment::start().await;
    let [agent, switch] = [Part::Agent(SiteId(1)), Part::Switch(SiteId(1))];
    let round_trip = "limosa_path_rtt_seconds{peer_site=\"singapore\"";
    until_page(&deployment, "/metrics", round_trip, true).await;

    // A switch without the tunnel that the agent's rules lead to is said; an agent that knows no such peer needs none.
    reconfigure(&deployment, switch, Some("\n[[tunnels]]\nsite = 3"));
    until_page(&deployment, "/readyz", "it has no port 1003", true).await;
    reconfigure(&deployment, agent, Some("\n[[peers]]\nsite = 3"));
    until_page(&deployment, "/metrics", round_trip, false).await;
    until_page(&deployment, "/readyz", "[-]", false).await;

    let moves = deployment.start_moves(3, "amsterdam", "singapore").await;
    reconfigure(&deployment, switch, None);
    until_page(&deployment, "/metrics", "limosa_switch_port_packets{fate=\"sent\",port=\"1003\"", true).await;
    assert!(deployment.is_in_hand(moves[0]).await, "a move went to a site that is no peer");
    reconfigure(&deployment, agent, None);
    deployment.until_done(&moves).await;
    // Without the tunnel, what servers near Singapore answered was lost.
    deployment.assert_whole_again().await;
}

/// One process by its own configuration file: what a person does who starts Limosa by hand.
#[test]
fn a_configuration_that_cannot_work_names_file_key_value_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("worker.toml");
    std::fs::write(&path, "site = 1\nworker = 1\ndirectory = \".\"\nswitch = \"s\"\nflows = 5\n").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"))
        .args(["run", "worker", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(error.contains("worker.toml: flows = \"5\": use 1024 to"), "{error}");
}
