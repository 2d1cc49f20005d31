//! Whole processes of which one hangs, and strangers who begin and never go on: nobody else is to notice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use flow::SiteId;
use limosa::config::{PlacementConfig, SiteConfig};
use limosa::demo::built_in;
use limosa::demo::cluster::{Cluster, Layout, Part};
use limosa::keys;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep};
use transfer::name::NodeName;
use transfer::quic::{Endpoint, Limits};

/// Longest wait for what comes about by itself, on a busy machine.
const BOUND: Duration = Duration::from_secs(90);
const HEALTHY: [SiteId; 2] = [SiteId(1), SiteId(3)];
const STOPPED: SiteId = SiteId(2);

struct Deployment {
    cluster: Cluster,
    _directory: tempfile::TempDir,
}

impl Deployment {
    async fn start() -> Self {
        Self::start_with(1).await
    }

    async fn start_with(workers: u16) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let directory = tempfile::Builder::new().prefix("limosa-").tempdir().unwrap();
        let layout = Layout {
            sites: built_in(),
            workers,
            flows: 1 << 12,
            directory: directory.path().to_owned(),
            binary: PathBuf::from(env!("CARGO_BIN_EXE_limosa")),
            elastic: None,
            relay_late: None,
        };
        let cluster = Cluster::start(layout).await.unwrap();
        cluster.set_policy(json!({ "automatic": false })).await.unwrap();
        cluster.configure(100_000).await.unwrap();
        cluster.until_ready().await.unwrap();
        Self { cluster, _directory: directory }
    }

    fn signal(&self, part: Part, signal: Signal) {
        let id = self.cluster.process_id(part).unwrap();
        kill(Pid::from_raw(i32::try_from(id).unwrap()), signal).unwrap();
    }

    /// Reports that placement nodes have taken.
    async fn reports(&self) -> u64 {
        let mut sum = 0;
        for api in self.cluster.apis() {
            let text = reqwest::get(format!("{api}/metrics")).await.unwrap().text().await.unwrap();
            let line = text.lines().find(|line| line.starts_with("limosa_reports_total ")).unwrap();
            sum += line.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
        }
        sum
    }

    /// Reports per second and site over a few seconds.
    async fn pace(&self, sites: usize) -> f64 {
        let (before, since) = (self.reports().await, Instant::now());
        sleep(Duration::from_secs(6)).await;
        let count = self.reports().await - before;
        count as f64 / since.elapsed().as_secs_f64() / sites as f64
    }

    async fn until_ended(&self, number: u64) -> Value {
        let ends = Instant::now() + BOUND;
        loop {
            let state = self.cluster.get(&format!("/v1/moves/{number}")).await.unwrap_or_default();
            if ["done", "aborted", "taken_back"].iter().any(|end| state["state"] == *end) {
                return state;
            }
            assert!(Instant::now() < ends, "the move has not ended: {state}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_site_does_not_slow_the_reports_of_others() {
    let deployment = Deployment::start().await;
    let well = deployment.pace(3).await;
    deployment.signal(Part::Agent(STOPPED), Signal::SIGSTOP);
    let pace = deployment.pace(HEALTHY.len()).await;
    // The others' own pace is the measure, so that a slow machine does not count.
    assert!(pace > 0.6 * well, "{pace:.2} reports per second and site, {well:.2} while all sites were well");

    let groups = deployment.cluster.get("/v1/groups?site=amsterdam").await.unwrap();
    let body = json!({ "moves": [{ "group": groups["groups"][0]["group"], "to": "singapore" }] });
    let started = deployment.cluster.post("/v1/moves", &body).await.unwrap();
    let ended = deployment.until_ended(started["moves"][0]["move"].as_u64().unwrap()).await;
    assert_eq!(ended["state"], "done", "{ended}");
    deployment.signal(Part::Agent(STOPPED), Signal::SIGCONT);
    deployment.cluster.until_ready().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_is_stopped_is_said_by_the_readiness_of_its_site_before_its_connection_ends() {
    let deployment = Deployment::start().await;
    let cluster = &deployment.cluster;
    deployment.signal(Part::Switch(STOPPED), Signal::SIGSTOP);
    let ends = Instant::now() + BOUND;
    loop {
        let text = cluster.site_text(STOPPED, "/readyz").await.unwrap();
        if text.contains("[-] the switch answers (within 1.5 s): switch silent for ") {
            break;
        }
        assert!(text.contains("[+] the switch is connected"), "the connection ended first: {text}");
        assert!(Instant::now() < ends, "{text}");
        sleep(Duration::from_millis(50)).await;
    }
    deployment.signal(Part::Switch(STOPPED), Signal::SIGCONT);
    cluster.until_ready().await.unwrap();
}

/// The first packets of handshakes, each from an address of its own, whose answers nobody reads.
async fn begin_handshakes(keys: &limosa::config::Tls, node: NodeName, targets: Vec<SocketAddr>) {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (identity, _) = keys::read(keys, &node).unwrap();
    let mut packet = [0; 2_048];
    loop {
        for target in &targets {
            let caught = UdpSocket::bind(any).await.unwrap();
            let relay = caught.local_addr().unwrap();
            let client = Endpoint::bind(any, &keys.cluster, &identity, Limits::site()).unwrap();
            let wanted = node.clone();
            let dial = tokio::spawn(async move { client.connect(relay, &wanted).await.is_ok() });
            let (len, _) = caught.recv_from(&mut packet).await.unwrap();
            dial.abort();
            UdpSocket::bind(any).await.unwrap().send_to(&packet[..len], target).await.unwrap();
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_restarts_is_ready_though_strangers_begin_handshakes_and_never_go_on() {
    let mut deployment = Deployment::start().await;
    let layout = deployment.cluster.layout().clone();
    let agent = Part::Agent(SiteId(1));
    let own = SiteConfig::read(&layout.config_path(agent)).unwrap();
    let mut targets = vec![own.listen];
    for id in 1..=3 {
        targets.push(PlacementConfig::read(&layout.config_path(Part::Placement(id))).unwrap().listen);
    }
    let node = NodeName::site(&own.tls.cluster, &own.name);
    deployment.cluster.kill(agent).unwrap();
    let strangers = tokio::spawn(async move { begin_handshakes(&own.tls, node, targets).await });
    // Long enough for the handshakes to be in one another's way, if they could.
    sleep(Duration::from_secs(6)).await;
    deployment.cluster.spawn(agent).unwrap();
    deployment.cluster.until_ready().await.unwrap();
    assert!(!strangers.is_finished(), "strangers kept on all the time");
    strangers.abort();
}

/// What `limosa site get` ends with, and says.
fn site_get(deployment: &Deployment, site: &str) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
    for api in deployment.cluster.apis() {
        command.args(["--api", &api]);
    }
    let output = command.args(["site", "get", site]).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Waits until `limosa site get` ends so and says this.
fn until_told(deployment: &Deployment, code: Option<i32>, text: &str) {
    let ends = Instant::now() + BOUND;
    loop {
        let (ended, said) = site_get(deployment, "amsterdam");
        if ended == code && said.contains(text) {
            return;
        }
        assert!(Instant::now() < ends, "{ended:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_is_said_and_the_other_has_its_groups_until_it_answers_again() {
    let deployment = Deployment::start_with(2).await;
    let site = HEALTHY[0];
    let ready = async || deployment.cluster.site_text(site, "/readyz?verbose").await.unwrap();
    let until = async |what: &str, holds: &dyn Fn(&str) -> bool| {
        let ends = Instant::now() + BOUND;
        loop {
            let said = ready().await;
            if holds(&said) {
                return;
            }
            assert!(Instant::now() < ends, "{what}: {said}");
            sleep(Duration::from_millis(100)).await;
        }
    };
    until("well", &|said| !said.contains("[-]")).await;
    let hangs = Part::Worker(site, flow::WorkerId(1));
    deployment.signal(hangs, Signal::SIGSTOP);
    until("said", &|said| said.contains("[-] every worker answers")).await;
    until_told(&deployment, Some(6), "every worker answers");
    // Without the worker that hangs, all groups of the site are served; that one is missing is said all the same.
    let missing = "[-] every expected worker is there";
    until("taken over", &|said| said.contains(missing) && said.matches("[-]").count() == 1).await;
    until_told(&deployment, Some(6), "every expected worker");
    let metrics = deployment.cluster.site_text(site, "/metrics").await.unwrap();
    assert!(metrics.contains("limosa_workers_missing{site=\"amsterdam\"} 1"), "{metrics}");
    deployment.signal(hangs, Signal::SIGCONT);
    until("back", &|said| !said.contains("[-]")).await;
    deployment.cluster.until_ready().await.unwrap();
    until_told(&deployment, Some(0), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_placement_an_agent_says_that_nobody_takes_its_reports() {
    let deployment = Deployment::start().await;
    for id in 1..=3 {
        deployment.signal(Part::Placement(id), Signal::SIGSTOP);
    }
    let site = HEALTHY[0];
    let said_by = async |holds: bool| {
        let ends = Instant::now() + BOUND;
        loop {
            let said = deployment.cluster.site_text(site, "/readyz?verbose").await.unwrap();
            if said.contains("[-] placement takes the site's reports") == holds {
                return;
            }
            assert!(Instant::now() < ends, "{said}");
            sleep(Duration::from_millis(100)).await;
        }
    };
    said_by(true).await;
    for id in 1..=3 {
        deployment.signal(Part::Placement(id), Signal::SIGCONT);
    }
    said_by(false).await;
    deployment.cluster.until_ready().await.unwrap();
}
