//! Whether one part of a deployment that stands still, or strangers at an agent's door, cost the others anything: the real binary, three
//! sites of the demo. Reports taken in ten seconds and the time of a move between two sites, with all processes of the third stopped and
//! without; how soon an agent is ready after its start, with 1,000 handshakes a second that are never completed and without.

#![expect(clippy::unwrap_used, reason = "a bench")]
#![expect(clippy::print_stdout, reason = "prints its figures")]
#![expect(clippy::disallowed_methods, reason = "measures time")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flow::{SiteId, WorkerId};
use limosa::demo::built_in;
use limosa::demo::cluster::{Cluster, Layout, Part};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::net::UdpSocket;
use tokio::time::sleep;

const WORKERS: u16 = 2;
/// Moves whose times are taken.
const MOVES: usize = 11;
/// Starts of an agent.
const STARTS: usize = 5;
const FLOOD_PER_S: u64 = 1_000;

fn median(mut times: Vec<Duration>) -> (Duration, Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[0], times[times.len() - 1])
}

fn show(what: &str, times: Vec<Duration>) {
    let count = times.len();
    let (middle, least, most) = median(times);
    let ms = |time: Duration| time.as_millis();
    println!("{what}: {} ms ({} to {}, median of {count})", ms(middle), ms(least), ms(most));
}

async fn start(directory: PathBuf) -> Cluster {
    let layout = Layout {
        sites: built_in(),
        workers: WORKERS,
        flows: 1 << 14,
        directory,
        binary: PathBuf::from(env!("CARGO_BIN_EXE_limosa")),
        elastic: None,
        relay_late: None,
    };
    let cluster = Cluster::start(layout).await.unwrap();
    cluster.set_policy(json!({ "automatic": false })).await.unwrap();
    cluster.configure(100_000).await.unwrap();
    cluster.until_ready().await.unwrap();
    cluster
}

/// Reports that all placement nodes have taken.
async fn reports(cluster: &Cluster) -> u64 {
    let mut sum = 0;
    for api in cluster.apis() {
        let Ok(answer) = reqwest::get(format!("{api}/metrics")).await else { continue };
        let text = answer.text().await.unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("limosa_reports_total "));
        sum += line.and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    }
    sum
}

/// A group moves from one site to another; how long that took.
async fn move_once(cluster: &Cluster, group: &str, to: &str) -> Duration {
    let begun = Instant::now();
    let started =
        cluster.post("/v1/moves", &json!({ "moves": [{ "group": group, "to": to }] })).await.unwrap();
    let id = &started["moves"][0]["move"];
    loop {
        let state = cluster.get(&format!("/v1/moves/{id}")).await.unwrap();
        match state["state"].as_str().unwrap_or_default() {
            "done" => return begun.elapsed(),
            "preparing" | "switching" => {}
            other => panic!("the move ended as {other}: {state}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{state}");
        sleep(Duration::from_millis(5)).await;
    }
}

async fn moves(cluster: &Cluster) -> Vec<Duration> {
    let groups = cluster.get("/v1/groups?site=amsterdam").await.unwrap();
    let group = groups["groups"][0]["group"].as_str().unwrap().to_owned();
    let mut times = Vec::new();
    for _ in 0..MOVES {
        times.push(move_once(cluster, &group, "virginia").await);
        times.push(move_once(cluster, &group, "amsterdam").await);
    }
    times
}

async fn measure_stopped(cluster: &Cluster, how: &str) {
    let before = reports(cluster).await;
    sleep(Duration::from_secs(10)).await;
    println!("{how}: {} reports taken in 10 s", reports(cluster).await - before);
    show(&format!("{how}: a move between the two others"), moves(cluster).await);
}

fn signal_site(cluster: &Cluster, site: SiteId, signal: Signal) {
    let workers = (1..=WORKERS).map(|worker| Part::Worker(site, WorkerId(worker)));
    // Not its placement node: one of three that stands still is another question.
    for part in workers.chain([Part::Agent(site), Part::Switch(site)]) {
        kill(Pid::from_raw(cluster.process_id(part).unwrap().cast_signed()), signal).unwrap();
    }
}

/// Half-open handshakes, each of a port and a connection number of its own, until told to stop.
async fn flood(to: SocketAddr, stop: Arc<AtomicBool>, sent: Arc<AtomicU64>) {
    let mut tls = rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"limosa".to_vec()];
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let begun = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        // Its first packet is taken from it, and its port is gone before any answer comes.
        let relay = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dial = client.connect_with(config.clone(), relay.local_addr().unwrap(), "limosa").unwrap();
        let mut packet = [0; 2_048];
        let (len, _) = relay.recv_from(&mut packet).await.unwrap();
        drop(dial);
        relay.send_to(&packet[..len], to).await.unwrap();
        let count = sent.fetch_add(1, Ordering::Relaxed) + 1;
        let due = begun + Duration::from_micros(count * 1_000_000 / FLOOD_PER_S);
        tokio::time::sleep_until(due.into()).await;
    }
}

/// How soon the agent of the first site is ready after it was killed and started.
async fn starts(cluster: &mut Cluster) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        cluster.kill(Part::Agent(SiteId(1))).unwrap();
        let begun = Instant::now();
        cluster.spawn(Part::Agent(SiteId(1))).unwrap();
        let ready = format!("http://{}/readyz", cluster.metrics()[&SiteId(1)]);
        while !reqwest::get(&ready).await.is_ok_and(|answer| answer.status().is_success()) {
            assert!(begun.elapsed() < Duration::from_secs(60), "the agent is not ready");
            sleep(Duration::from_millis(2)).await;
        }
        times.push(begun.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
    times
}

fn listen_address(cluster: &Cluster) -> SocketAddr {
    let file = std::fs::read_to_string(cluster.layout().config_path(Part::Agent(SiteId(1)))).unwrap();
    let file: toml::Table = file.parse().unwrap();
    file["listen"].as_str().unwrap().parse().unwrap()
}

#[tokio::main]
async fn main() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = start(directory.path().to_owned()).await;
    measure_stopped(&cluster, "all sites run").await;
    signal_site(&cluster, SiteId(3), Signal::SIGSTOP);
    // Beyond the time after which it is said to be silent.
    sleep(Duration::from_secs(5)).await;
    measure_stopped(&cluster, "the third site is stopped").await;
    signal_site(&cluster, SiteId(3), Signal::SIGCONT);
    cluster.until_ready().await.unwrap();

    show("an agent is ready after its start, nobody at its door", starts(&mut cluster).await);
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let flood = tokio::spawn(flood(listen_address(&cluster), stop.clone(), sent.clone()));
    let begun = Instant::now();
    let times = starts(&mut cluster).await;
    let rate = sent.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    show(&format!("an agent is ready after its start, {rate:.0} handshakes a second begun"), times);
    flood.await.unwrap();
}
