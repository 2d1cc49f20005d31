//! The config API and the command line over one real placement node.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use clap::Parser;
use limosa::cli::{self, Exit, Noun, Options};
use limosa::placement::api;
use placement::core::Command;
use placement::node::{Node, NodeConfig, NodeId, Transport, TransportError};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Reaches nobody: the node is alone.
struct Alone;

#[async_trait]
impl Transport for Alone {
    async fn call(&self, to: NodeId, _: Bytes) -> Result<Bytes, TransportError> {
        Err(TransportError::Unreachable { to, reason: "there is nobody".into() })
    }
}

struct World {
    node: Arc<Node>,
    base: String,
    http: reqwest::Client,
    _directory: TempDir,
}

struct Reply {
    status: StatusCode,
    headers: reqwest::header::HeaderMap,
    body: Value,
}

impl World {
    /// A node that is no member of anything yet.
    async fn empty() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let mut config = NodeConfig::new(1, directory.path().to_owned());
        config.raft.heartbeat = Duration::from_millis(30);
        config.raft.election_min = Duration::from_millis(100);
        config.raft.election_max = Duration::from_millis(200);
        config.deadline = Duration::from_millis(1_500);
        let node = Arc::new(Node::start(config, Arc::new(Alone)).await.unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        api::serve_on(listener, node.clone(), CancellationToken::new()).unwrap();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { node, base, http, _directory: directory }
    }

    /// A node that leads, two sites that are alive, and a service of four groups at `ams`.
    async fn new() -> Self {
        let world = Self::empty().await;
        let members = json!({ "members": { "1": "127.0.0.1:4001" } });
        assert_eq!(world.post("/v1/raft/initialize", members).await.status, 200);
        for (id, name) in [(1, "ams"), (2, "virginia")] {
            let spec = json!({ "id": id, "endpoint": "127.0.0.1:5001", "capacity_pps": 1_000_000 });
            assert_eq!(world.put(&format!("/v1/sites/{name}"), spec).await.status, 200);
            let alive = Command::SetAlive { site: flow::SiteId(id), alive: true };
            world.node.propose("leader", alive).await.unwrap();
        }
        let mut service = service();
        service["owner"] = "ams".into();
        assert_eq!(world.put("/v1/services/nat", service).await.status, 200);
        world
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    async fn get(&self, path: &str) -> Reply {
        reply(self.request(Method::GET, path)).await
    }

    async fn put(&self, path: &str, body: Value) -> Reply {
        reply(self.request(Method::PUT, path).json(&body)).await
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        reply(self.request(Method::POST, path).json(&body)).await
    }

    async fn delete(&self, path: &str) -> Reply {
        reply(self.request(Method::DELETE, path)).await
    }

    async fn cli(&self, line: &str) -> Exit {
        run(&format!("--api {} {line}", self.base)).await
    }
}

async fn reply(request: RequestBuilder) -> Reply {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await.unwrap();
    Reply { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
}

/// That it is a problem of the right shape.
#[track_caller]
fn assert_problem(reply: &Reply, status: u16, field: Option<&str>, detail: &str) {
    let body = &reply.body;
    assert_eq!(reply.status, status, "{body}");
    assert_eq!(reply.headers["content-type"], "application/problem+json");
    assert_eq!(body["status"], status);
    assert!(body["type"].as_str().unwrap().starts_with("/problems/"), "{body}");
    assert!(!body["title"].as_str().unwrap().is_empty(), "{body}");
    assert_eq!(body.get("field").and_then(Value::as_str), field, "{body}");
    assert!(body["detail"].as_str().unwrap().contains(detail), "{body}");
}

fn service() -> Value {
    json!({
        "id": 1,
        "nat": { "clients": ["100.64.0.0/22"], "pool": ["198.51.100.0/24"], "ports_per_subscriber": 1000 },
        "group_len": 24,
    })
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    noun: Noun,
}

async fn run(line: &str) -> Exit {
    let line = Line::try_parse_from(["limosa"].into_iter().chain(line.split(' '))).unwrap();
    cli::run(line.noun, &line.options).await
}

const GROUP: &str = "1:100.64.3.0/24";

#[tokio::test]
async fn sites_are_put_shown_and_closed() {
    let world = World::new().await;
    let sites = world.get("/v1/sites").await;
    assert_eq!(sites.body["sites"][0]["name"], "ams");
    assert_eq!(sites.body["sites"][0]["groups"], 4);
    assert!(sites.headers["limosa-revision"].to_str().unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(world.get("/v1/sites/2?consistency=stale").await.body["name"], "virginia");
    assert_problem(&world.get("/v1/sites/oslo").await, 404, Some("site"), "oslo");
    assert_problem(&world.get("/v1/sites?consistency=new").await, 400, Some("query"), "linearizable");
    for (verb, admin) in [("cordon", "cordoned"), ("drain", "draining"), ("undrain", "active")] {
        let path = format!("/v1/sites/virginia/{verb}");
        assert_eq!(reply(world.request(Method::POST, &path)).await.body["admin"], admin);
        let path = format!("/v1/sites/oslo/{verb}");
        assert_problem(&reply(world.request(Method::POST, &path)).await, 404, Some("site"), "oslo");
    }
    for endpoint in ["127.0.0.1:100011", "127.0.0.1:0", "oslo.example", "[::1]", ""] {
        let spec = json!({ "id": 3, "endpoint": endpoint, "capacity_pps": 1 });
        let problem = world.put("/v1/sites/oslo", spec.clone()).await;
        assert_problem(&problem, 422, Some("endpoint"), "PORT is 1 to 65535");
        let mut spec = spec;
        spec["name"] = "oslo".into();
        let problem = world.post("/v1/placement/simulate", json!({ "sites": [spec] })).await;
        assert_problem(&problem, 422, Some("endpoint"), "PORT is 1 to 65535");
    }
    let spec = json!({ "id": 3, "endpoint": "oslo.example:1", "capacity_pps": 1, "latitude": 91.0, "longitude": 0.0 });
    assert_problem(&world.put("/v1/sites/oslo", spec.clone()).await, 422, Some("latitude"), "91");
    let mut taken = spec.clone();
    taken["latitude"] = 60.0.into();
    assert_problem(&world.put("/v1/sites/ams", taken.clone()).await, 409, Some("name"), "ams");
    assert_eq!(world.put("/v1/sites/oslo?dryRun=true", taken.clone()).await.status, 200);
    assert_eq!(world.get("/v1/sites/oslo").await.status, 404, "a dry run adds nothing");
    taken["name"] = "bergen".into();
    assert_problem(&world.put("/v1/sites/oslo", taken.clone()).await, 422, Some("name"), "bergen");
    taken["colour"] = "red".into();
    taken["name"] = "oslo".into();
    assert_problem(&world.put("/v1/sites/oslo", taken).await, 422, Some("body"), "colour");
}

#[tokio::test]
async fn a_site_is_removed_when_nothing_leads_to_it() {
    let world = World::new().await;
    assert_problem(&world.delete("/v1/sites/oslo").await, 404, Some("site"), "oslo");
    assert_problem(
        &world.delete("/v1/sites/ams").await,
        409,
        None,
        "site 1 owns 4 groups, the first is 1:100",
    );
    let put_policy = |rules: Value| {
        let request = world.request(Method::PUT, "/v1/policy").header("If-Match", "*");
        reply(request.json(&json!({ "automatic": false, "rules": rules })))
    };
    assert_eq!(put_policy(json!([{ "name": "far", "deny": ["virginia"] }])).await.status, 200);
    assert_problem(&world.delete("/v1/sites/virginia").await, 409, None, "named by rule \"far\"");
    assert_eq!(put_policy(json!([])).await.status, 200);
    assert_eq!(
        world.delete("/v1/sites/virginia?dryRun=true").await.body["sites"].as_array().unwrap().len(),
        1
    );
    assert_eq!(world.get("/v1/sites/virginia").await.status, 200, "a dry run removes nothing");

    let revision = world.get("/v1/sites/virginia").await.headers["limosa-revision"].clone();
    let removed =
        reply(world.request(Method::DELETE, "/v1/sites/virginia").header("Limosa-Actor", "alice")).await;
    assert_eq!((removed.status.as_u16(), &removed.body["sites"][0]["name"]), (200, &json!("ams")));
    assert_eq!(removed.body["sites"].as_array().unwrap().len(), 1);
    assert_eq!(world.get("/v1/sites/virginia").await.status, 404);
    assert_problem(&world.delete("/v1/sites/virginia").await, 404, Some("site"), "virginia");
    assert_problem(&world.delete("/v1/sites/ams").await, 409, None, "owns 4 groups");
    let since = revision.to_str().unwrap();
    let news = world.get(&format!("/v1/changes?since={since}&wait_ms=20000")).await.body;
    let changes = news["changes"].as_array().unwrap();
    assert!(changes.contains(&json!({ "site_gone": { "id": 2 } })), "{news}");
    let audit = world.get("/v1/audit?limit=1000").await.body;
    let entry = |entry: &&Value| entry["action"] == "remove site 2" && entry["refused"].is_null();
    let entry = audit["entries"].as_array().unwrap().iter().find(entry).expect("an audit entry");
    assert_eq!(entry["actor"], "operator alice");

    // Its agent is not heard, whatever it says of itself, until a site of its name is added.
    let report = placement::core::SiteReport { site: flow::SiteId(2), ..Default::default() };
    let request = placement::wire::encode(&placement::node::ClientRequest::Report(Box::new(report)));
    let caller = placement::node::Caller::Site("virginia".to_owned());
    let answer = || async {
        let bytes = world.node.handle_client(&caller, request.clone()).await;
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let refused = answer().await;
    assert!(refused.contains("no site has this name: it was removed, or is not added yet"), "{refused}");
    let spec = json!({ "id": 2, "endpoint": "127.0.0.1:5001", "capacity_pps": 1_000_000 });
    assert_eq!(world.put("/v1/sites/virginia", spec).await.status, 200);
    assert!(!answer().await.contains("no site has this name"));
}

#[tokio::test]
async fn a_site_without_a_lease_that_owns_groups_is_a_problem_although_nothing_was_heard_of_it() {
    let world = World::new().await;
    for site in [1, 2] {
        let lost = Command::SetAlive { site: flow::SiteId(site), alive: false };
        world.node.propose("leader", lost).await.unwrap();
    }
    let sites = world.get("/v1/sites").await.body["sites"].clone();
    assert_eq!(
        sites[0]["problems"],
        json!(["no report since this node started; its lease has ended, and it owns groups: 4"]),
        "{sites}"
    );
    assert_eq!(sites[1]["problems"], Value::Null, "it may be about to come for the first time: {sites}");
    assert_eq!(world.cli("site list").await, Exit::Degraded);
    assert_eq!(world.cli("site get ams").await, Exit::Degraded);
    assert_eq!(world.cli("site get virginia").await, Exit::Done);
}

#[tokio::test]
async fn services_and_groups_are_shown_page_by_page() {
    let world = World::new().await;
    assert_eq!(world.get("/v1/services").await.body["services"][0]["name"], "nat");
    let mut other = service();
    other["group_len"] = 23.into();
    assert_problem(&world.put("/v1/services/nat", other.clone()).await, 409, Some("group_len"), "fixed");
    other["group_len"] = 40.into();
    assert_problem(
        &world.put("/v1/services/nat?dryRun=true", other.clone()).await,
        409,
        Some("group_len"),
        "",
    );
    other["group_len"] = 24.into();
    other["id"] = 2.into();
    assert_problem(&world.put("/v1/services/other", other.clone()).await, 409, Some("nat"), "overlaps");
    other["owner"] = "oslo".into();
    assert_problem(&world.put("/v1/services/other", other).await, 404, Some("owner"), "oslo");

    let first = world.get("/v1/groups?limit=3&site=ams&service=nat").await.body;
    assert_eq!(first["groups"].as_array().unwrap().len(), 3);
    let next = first["next"].as_str().unwrap();
    let last = world.get(&format!("/v1/groups?limit=3&cursor={next}")).await.body;
    assert_eq!(last["groups"][0]["group"], GROUP);
    assert!(last.get("next").is_none());
    assert_eq!(world.get("/v1/groups?site=virginia").await.body["groups"], json!([]));
    assert_problem(&world.get("/v1/groups?cursor=zz").await, 400, Some("cursor"), "next");
    assert_problem(&world.get("/v1/groups?limit=0").await, 400, Some("limit"), "1 to 10000");
    assert_problem(&world.get("/v1/groups?site=oslo").await, 404, Some("site"), "oslo");
    assert_problem(&world.get("/v1/groups?service=dns").await, 404, Some("service"), "dns");

    for path in ["/v1/groups/1:100.64.3.0%2F24", "/v1/groups/1:100.64.3.0/24"] {
        let group = world.get(path).await.body;
        assert_eq!(
            (&group["group"], &group["owner"], &group["epoch"]),
            (&json!(GROUP), &json!("ams"), &json!(1))
        );
    }
    assert_problem(&world.get("/v1/groups/one").await, 400, Some("group"), "SERVICE:PREFIX");
    assert_problem(&world.get("/v1/groups/1:10.0.0.0/24").await, 404, Some("group"), "1:10.0.0.0/24");
    let explained = eventually(&world, &format!("/v1/explain?group={GROUP}")).await;
    assert_eq!(explained["owner"], "ams");
    assert_eq!(explained["candidates"].as_array().unwrap().len(), 2);
    assert_problem(&world.get("/v1/explain?group=1:10.0.0.0/24").await, 404, Some("group"), "10.0.0.0");
}

#[tokio::test]
async fn the_placement_is_assessed_with_a_bound() {
    let world = World::new().await;
    // The solver must not make the move that is to be looked at.
    let still = world.request(Method::PUT, "/v1/policy").header("If-Match", "\"0\"");
    assert_eq!(reply(still.json(&json!({ "automatic": false }))).await.status, 200);
    let none = eventually(&world, "/v1/placement").await;
    assert_eq!((&none["groups"], &none["moves"]), (&json!(0), &json!(0)), "nothing is known of traffic yet");
    let seen = |packets_per_s| placement::core::GroupReport {
        group: GROUP.parse().unwrap(),
        packets_per_s,
        flows: 10,
        bits_per_s: 0,
        inside_ingress: vec![(flow::SiteId(2), 1)],
        outside_ingress: vec![(flow::SiteId(2), 1)],
        remote_rtt_us: None,
    };
    let rtt = placement::core::PeerRtt { site: flow::SiteId(2), rtt_us: 80_000 };
    let report = |packets_per_s| {
        let (groups, peers) = (vec![seen(packets_per_s)], vec![rtt]);
        let ams = placement::core::SiteReport { site: flow::SiteId(1), groups, peers, ..Default::default() };
        vec![ams, placement::core::SiteReport { site: flow::SiteId(2), ..Default::default() }]
    };
    let far = reported(&world, "/v1/placement", report(1000), |body| body["moves"] == 1).await;
    let ms = |key: &str| far[key].as_f64().unwrap();
    assert!((ms("delay_ms") - 80.0).abs() < 1.0, "to Virginia and back: {far}");
    assert!(ms("best_ms") < 1.0 && ms("bound_ms") <= ms("best_ms"), "{far}");
    assert!(ms("gap") < 0.01, "{far}");
    assert_eq!(run(&format!("placement status --api {}", world.base)).await, Exit::Done);

    let short = reported(&world, "/v1/placement", report(5_000_000), |body| body["gap"].is_null()).await;
    assert_eq!(short["shortages"][0]["groups"], json!([GROUP]));
    assert_eq!(run(&format!("placement status --api {}", world.base)).await, Exit::Degraded);

    // Of groups that no site may have nothing is said to be well.
    for site in ["ams", "virginia"] {
        assert_eq!(
            world.request(Method::POST, &format!("/v1/sites/{site}/drain")).send().await.unwrap().status(),
            200
        );
    }
    let closed = reported(&world, "/v1/placement", report(1000), |body| body["stranded"] == 1).await;
    assert_eq!(closed["groups"], 0, "{closed}");
    assert_eq!(run(&format!("placement status --api {}", world.base)).await, Exit::Degraded);
    assert_eq!(run(&format!("placement simulate --demand 1 --api {}", world.base)).await, Exit::Degraded);
    for site in ["ams", "virginia"] {
        assert_eq!(
            world.request(Method::POST, &format!("/v1/sites/{site}/undrain")).send().await.unwrap().status(),
            200
        );
    }

    let round = reported(&world, "/v1/placement/round", report(1000), |body| body["groups"] == 1).await;
    assert!((round["delay_ms"].as_f64().unwrap() - 80.0).abs() < 1.0, "{round}");
    assert_eq!((&round["moves"], &round["prices"][1]["site"]), (&json!(0), &json!("virginia")), "{round}");
    assert_eq!(run(&format!("placement round --api {}", world.base)).await, Exit::Done);
    let metrics = reqwest::get(format!("{}/metrics", world.base)).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("limosa_placement_delay_seconds{of=\"present\"} 0.0"), "{metrics}");
    assert!(
        metrics.contains("limosa_placement_price_seconds{resource=\"flows\",site=\"virginia\"} 0"),
        "{metrics}"
    );
}

/// The leader's own knowledge comes a moment after its election.
async fn eventually(world: &World, path: &str) -> Value {
    for _ in 0..50 {
        let reply = world.get(path).await;
        if reply.status == 200 {
            return reply.body;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{path} gave no answer");
}

/// Sites report, again and again so that they stay alive, until the answer is as wanted.
async fn reported(
    world: &World,
    path: &str,
    reports: Vec<placement::core::SiteReport>,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let mut last = Value::Null;
    for _ in 0..100 {
        for (report, name) in reports.iter().zip(["ams", "virginia"]) {
            let request = placement::node::ClientRequest::Report(Box::new(report.clone()));
            let caller = placement::node::Caller::Site(name.to_owned());
            world.node.handle_client(&caller, placement::wire::encode(&request)).await;
        }
        last = world.get(path).await.body;
        if wanted(&last) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not as wanted after many reports: {last}");
}

#[tokio::test]
async fn moves_are_started_shown_and_aborted() {
    let world = World::new().await;
    let wish = json!({ "moves": [{ "group": GROUP, "to": "virginia" }] });
    let start = |key: &'static str, body: &Value| {
        reply(world.request(Method::POST, "/v1/moves").header("idempotency-key", key).json(body))
    };
    let started = start("a", &wish).await;
    assert_eq!(started.status, 202, "{}", started.body);
    let id = started.body["moves"][0]["move"].as_u64().unwrap();
    assert_eq!(world.get("/v1/moves").await.body["moves"][0]["state"], "preparing");
    assert_eq!(world.get(&format!("/v1/moves/{id}")).await.body["to"], "virginia");
    let aborted = world.delete(&format!("/v1/moves/{id}")).await;
    assert_eq!((aborted.status.as_u16(), &aborted.body["state"]), (200, &json!("aborted")));
    assert_eq!(start("a", &wish).await.body["moves"][0]["move"], id, "the key brings the first answer");
    let other = json!({ "moves": [{ "group": "1:100.64.2.0/24", "to": "virginia" }] });
    assert_problem(&start("a", &other).await, 422, Some("idempotency-key"), "\"a\"");
    assert_ne!(start("b", &wish).await.body["moves"][0]["move"], id, "a new key makes a new move");
    let clash = json!({ "moves": [{ "group": GROUP, "to": "ams" }] });
    assert_problem(&world.post("/v1/moves", clash).await, 409, None, "is moving to site 2");

    let wrong = json!({ "moves": [{ "group": "x", "to": "ams" }] });
    assert_problem(&world.post("/v1/moves", wrong).await, 422, Some("moves[0].group"), "SERVICE:PREFIX");
    let wrong = json!({ "moves": [{ "group": GROUP, "to": "oslo" }] });
    assert_problem(&world.post("/v1/moves", wrong).await, 404, Some("moves[0].to"), "oslo");
    assert_problem(&world.post("/v1/moves", json!({ "moves": [] })).await, 422, Some("moves"), "1 to");
    assert_problem(&world.post("/v1/moves", json!({ "move": [] })).await, 422, Some("body"), "move");
    assert_problem(&world.get("/v1/moves/7").await, 404, None, "7");
    assert_problem(&world.delete("/v1/moves/7").await, 404, None, "7");
    assert_problem(&world.get("/v1/moves/x").await, 400, Some("path"), "");
    assert_problem(&world.get("/v1/moves?limit=0").await, 400, Some("limit"), "1 to");

    let audit = world.get("/v1/audit?limit=1000").await.body;
    let actions: Vec<&str> =
        audit["entries"].as_array().unwrap().iter().map(|e| e["action"].as_str().unwrap()).collect();
    assert!(actions.iter().any(|action| action.starts_with("abort move")), "{actions:?}");
}

#[tokio::test]
async fn a_policy_is_replaced_only_over_what_was_seen() {
    let world = World::new().await;
    let put = |query: &'static str, tag: Option<String>, body: Value| {
        let request = world.request(Method::PUT, &format!("/v1/policy{query}")).json(&body);
        reply(tag.into_iter().fold(request, |request, tag| request.header("if-match", tag)))
    };
    let seen = world.get("/v1/policy").await;
    let tag = seen.headers["etag"].to_str().unwrap().to_owned();
    let mut policy = seen.body;
    policy["headroom"] = 0.5.into();
    assert_problem(&put("", None, policy.clone()).await, 428, Some("If-Match"), "ETag");
    assert_problem(&put("", Some("three".into()), policy.clone()).await, 400, Some("If-Match"), "three");
    let dry = put("?dryRun=true", Some(tag.clone()), policy.clone()).await;
    assert_eq!(dry.status, 200);
    assert_eq!(world.get("/v1/policy").await.headers["etag"], tag.as_str(), "a dry run stores nothing");
    let stored = put("", Some(tag.clone()), policy.clone()).await;
    assert_eq!((stored.status.as_u16(), &stored.body["headroom"]), (200, &json!(0.5)));
    assert_ne!(stored.headers["etag"], tag.as_str());
    policy["headroom"] = 0.6.into();
    assert_problem(&put("", Some(tag.clone()), policy.clone()).await, 412, Some("If-Match"), "read it again");
    assert_problem(&put("?dryRun=true", Some(tag), policy.clone()).await, 412, Some("If-Match"), "");
    assert_eq!(put("", Some("*".into()), policy.clone()).await.status, 200);
    policy["headroom"] = 2.into();
    assert_problem(&put("", Some("*".into()), policy.clone()).await, 422, None, "headroom is 2");
    policy["headroom"] = 0.1.into();
    policy["rules"] = json!([{ "name": "there", "clients": GROUP.trim_start_matches("1:"), "pin": 9 }]);
    assert_problem(&put("?dryRun=true", Some("*".into()), policy.clone()).await, 404, None, "no site 9");
    policy["rules"][0]["pin"] = "oslo".into();
    let named = "rule \"there\": no site \"oslo\": add it first";
    assert_problem(&put("", Some("*".into()), policy.clone()).await, 422, Some("rules[0]"), named);
    policy["rules"][0]["pin"] = "ams".into();
    policy["rules"][0]["until"] = "tomorrow".into();
    assert_problem(
        &put("", Some("*".into()), policy.clone()).await,
        422,
        Some("rules[0]"),
        "2027-01-31T18:00:00Z",
    );
    policy["rules"][0]["until"] = "2100-01-31T18:00:00Z".into();
    let other = json!({ "name": "not there", "service": "nat", "deny": ["ams"] });
    policy["rules"].as_array_mut().unwrap().push(other);
    let both = "rules \"not there\" and \"there\" cannot all hold for group 1:100.64.3.0/24";
    assert_problem(&put("", Some("*".into()), policy.clone()).await, 422, None, both);
    policy["rules"][1]["price_ms"] = 3.0.into();
    assert_eq!(put("", Some("*".into()), policy.clone()).await.status, 200);
    assert_eq!(world.get("/v1/policy").await.body, policy, "it is shown as it was written");
}

/// The reports of two sites, 40 ms apart, with one group at `ams` whose clients and servers are at `virginia`.
fn far_group() -> Vec<placement::core::SiteReport> {
    let seen = placement::core::GroupReport {
        group: GROUP.parse().unwrap(),
        packets_per_s: 1000,
        flows: 10,
        bits_per_s: 0,
        inside_ingress: vec![(flow::SiteId(2), 1)],
        outside_ingress: vec![(flow::SiteId(2), 1)],
        remote_rtt_us: None,
    };
    let peers = vec![placement::core::PeerRtt { site: flow::SiteId(2), rtt_us: 80_000 }];
    let site =
        |site, groups, peers| placement::core::SiteReport { site, groups, peers, ..Default::default() };
    vec![site(flow::SiteId(1), vec![seen], peers), site(flow::SiteId(2), vec![], vec![])]
}

#[tokio::test]
async fn a_plan_says_what_a_policy_would_bring_and_apply_does_it() {
    let world = World::new().await;
    let path = |name: &str| world._directory.path().join(name).display().to_string();
    let file = |name: &str, text: &str| {
        std::fs::write(path(name), text).unwrap();
        path(name)
    };
    let still = file("still.yaml", "automatic: false\n");
    assert_eq!(world.cli(&format!("policy apply {still}")).await, Exit::Done);
    reported(&world, "/v1/placement", far_group(), |body| body["groups"] == 1).await;
    let free = file("free.yaml", "min_gain_ms: 2\n");
    let plan = |text: &'static str| {
        let request =
            world.request(Method::POST, "/v1/policy/plan").header("content-type", "application/yaml");
        reply(request.body(text))
    };
    let moves = plan("min_gain_ms: 2").await.body;
    assert_eq!((&moves["moves"], &moves["flows"]), (&json!(1), &json!(10)), "{moves}");
    assert_eq!((&moves["moved"][0]["group"], &moves["moved"][0]["to"]), (&json!(GROUP), &json!("virginia")));
    let ms = |body: &Value, of: &str, key: &str| body[of][key].as_f64().unwrap();
    assert!(
        (ms(&moves, "before", "p95_ms") - 80.0).abs() < 1.0 && ms(&moves, "after", "p95_ms") < 1.0,
        "{moves}"
    );
    assert_eq!(moves["regions"][0]["ingress"], "virginia", "{moves}");
    let pinned = plan("rules: [{ name: home, pin: ams }]").await.body;
    assert_eq!((&pinned["moves"], &pinned["bindings"][0]["rule"]), (&json!(0), &json!("home")), "{pinned}");
    assert_problem(&plan("rules: [{ name: home, pin: oslo }]").await, 422, Some("rules[0]"), "oslo");
    assert_problem(&plan("rules: [").await, 400, Some("body"), "");
    let home = file("home.yaml", "rules:\n- name: home\n  pin: ams\n");
    assert_eq!(world.cli(&format!("policy plan {home} --detailed-exitcode")).await, Exit::Done);
    assert_eq!(world.cli(&format!("policy plan {free} --detailed-exitcode")).await, Exit::Usage);
    assert_eq!(world.cli(&format!("policy plan {free}")).await, Exit::Done);

    // Simulations change nothing either.
    let simulate = |body: Value| world.post("/v1/placement/simulate", body);
    let oslo = json!({ "name": "oslo", "capacity_pps": 500 });
    let with = simulate(json!({ "sites": [oslo], "demand": 2.0 })).await.body;
    assert_eq!(
        (&with["sites"][0]["site"], &with["sites"][2]["after"]),
        (&json!("oslo"), &json!(2000.0)),
        "{with}"
    );
    let lost = simulate(json!({ "lost": ["virginia"] })).await.body;
    assert_eq!((&lost["moves"], &lost["sites"][1]["after"]), (&json!(0), &json!(0.0)), "{lost}");
    let small = simulate(json!({ "sites": [{ "name": "virginia", "capacity_pps": 10 }] })).await.body;
    assert_eq!((&small["moves"], &small["bindings"][0]["site"]), (&json!(0), &json!("virginia")), "{small}");
    assert_problem(&simulate(json!({ "demand": 0 })).await, 422, Some("demand"), "above 0");
    assert_problem(&simulate(json!({ "lost": ["oslo"] })).await, 404, Some("site"), "oslo");
    assert_eq!(world.cli("placement simulate --lost virginia --demand 1.5").await, Exit::Done);
    assert_eq!(world.cli("placement losses").await, Exit::Done);
    let nowhere_else = file("only.yaml", "automatic: false\nrules: [{ name: only, pin: ams }]\n");
    assert_eq!(world.cli(&format!("policy apply {nowhere_else}")).await, Exit::Done);
    assert_eq!(world.cli("placement losses").await, Exit::Degraded, "group 3 may only be at ams");
    assert_eq!(world.cli(&format!("policy apply {still}")).await, Exit::Done);
    assert_eq!(world.get("/v1/sites").await.body["sites"].as_array().unwrap().len(), 2);

    for target in [GROUP, "100.64.3.9", "100.64.3.9:1234", "udp,100.64.3.9:1,192.0.2.1:53"] {
        let explained = world.get(&format!("/v1/explain?group={target}")).await.body;
        assert_eq!(
            (&explained["group"], &explained["best"]),
            (&json!(GROUP), &json!("virginia")),
            "{target}"
        );
        assert_eq!(explained["candidates"][1]["legs"][0]["source"], "measured", "{explained}");
    }
    let outside = world.get("/v1/explain?group=198.51.100.0:1024").await.body;
    assert!(outside["group"].as_str().unwrap().starts_with("1:100.64."), "{outside}");
    assert_problem(
        &world.get("/v1/explain?group=10.0.0.1").await,
        404,
        Some("group"),
        "belongs to no service",
    );
    assert_problem(&world.get("/v1/explain?group=x").await, 400, Some("group"), "PROTOCOL,ADDRESS:PORT");
    assert_eq!(world.cli("placement explain 100.64.3.9").await, Exit::Done);
}

#[tokio::test]
async fn a_policy_can_be_tried_confirmed_and_taken_back() {
    let world = World::new().await;
    let path = world._directory.path().join("policy.toml").display().to_string();
    std::fs::write(&path, "headroom = 0.3").unwrap();
    assert_eq!(world.cli(&format!("policy apply {path} --confirm-within 100ms")).await, Exit::Usage);
    assert_eq!(world.cli(&format!("policy apply {path} --confirm-within 1s")).await, Exit::Done);
    assert_eq!(world.get("/v1/policy").await.body["headroom"], 0.3);
    for _ in 0..100 {
        if world.get("/v1/policy").await.headers["etag"] == "\"2\"" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(world.get("/v1/policy").await.body["headroom"], 0.2, "the former policy is back");
    assert_eq!(world.cli("policy confirm --if-match 1").await, Exit::Conflict);
    assert_eq!(world.cli(&format!("policy apply {path} --confirm-within 1h")).await, Exit::Done);
    assert!(world.get("/v1/policy/history").await.body["on_trial_until_ms"].is_u64());
    assert_eq!(world.cli("policy confirm").await, Exit::Done);
    let history = world.get("/v1/policy/history").await.body;
    let versions: Vec<_> =
        history["policies"].as_array().unwrap().iter().map(|one| &one["version"]).collect();
    assert_eq!(
        (versions, history["on_trial_until_ms"].is_null()),
        (vec![&json!(3), &json!(2), &json!(1)], true)
    );
    assert_eq!(world.cli("policy history").await, Exit::Done);
    assert_eq!(world.cli("policy diff 2").await, Exit::Done);
    assert_eq!(world.cli("policy diff 9 2").await, Exit::NotFound);
    assert_eq!(world.cli("policy rollback 2").await, Exit::Done);
    assert_eq!(world.get("/v1/policy").await.body["headroom"], 0.2);
    let json =
        world.request(Method::PUT, "/v1/policy").header("if-match", "*").header("content-type", "text/plain");
    assert_problem(&reply(json.body("x")).await, 415, Some("content-type"), "application/yaml");
}

#[tokio::test]
async fn a_lost_site_gives_its_groups_to_their_standbys() {
    let world = World::new().await;
    let path = world._directory.path().join("twice.yaml").display().to_string();
    std::fs::write(&path, "automatic: false\nrules: [{ name: twice, standby: any }]\n").unwrap();
    assert_eq!(world.cli(&format!("policy apply {path}")).await, Exit::Done);
    let all = |groups: &Value, key: &str, site: &str| {
        let groups = groups["groups"].as_array().unwrap();
        groups.len() == 4 && groups.iter().all(|group| group[key] == site)
    };
    reported(&world, "/v1/groups", far_group(), |groups| all(groups, "standby", "virginia")).await;
    assert_eq!(world.cli("group list").await, Exit::Done);
    assert_eq!(world.get(&format!("/v1/explain?group={GROUP}")).await.body["standby"], "virginia");
    assert_problem(&world.post("/v1/sites/ams/fail-over", Value::Null).await, 409, None, "drain it instead");
    // Only virginia reports from now on.
    let mut silent = far_group();
    silent[0].site = flow::SiteId(2);
    reported(&world, "/v1/sites/ams", silent, |site| site["alive"] == false).await;
    assert_eq!(world.cli("site fail-over ams").await, Exit::Done);
    let groups = world.get("/v1/groups?consistency=linearizable").await.body;
    assert!(all(&groups, "owner", "virginia"), "{groups}");
    assert!(groups["groups"][0].get("standby").is_none(), "it has become the owner: {groups}");
}

#[tokio::test]
async fn traffic_is_recorded_and_played_again_with_a_change() {
    let world = World::new().await;
    let path = |name: &str| world._directory.path().join(name).display().to_string();
    let still = path("still.yaml");
    std::fs::write(&still, "automatic: false\n").unwrap();
    assert_eq!(world.cli(&format!("policy apply {still}")).await, Exit::Done);
    let seen = |traffic: &Value| traffic["reports"].as_array().is_some_and(|reports| reports.len() == 2);
    reported(&world, "/v1/placement/traffic", far_group(), seen).await;
    let record = path("record.jsonl");
    assert_eq!(world.cli(&format!("placement record {record} --every 1s --for 1s")).await, Exit::Done);
    assert_eq!(world.cli(&format!("placement record {record} --every 1s --for 1s")).await, Exit::Usage);
    let lines = std::fs::read_to_string(&record).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((lines.lines().count(), first["state"]["policy"]["automatic"].clone()), (2, json!(false)));

    let free = path("free.yaml");
    std::fs::write(&free, "min_gain_ms: 1\n").unwrap();
    let oslo = path("oslo.json");
    std::fs::write(&oslo, r#"{ "name": "oslo", "capacity_pps": 500 }"#).unwrap();
    for line in [
        format!("placement simulate --replay {record} --policy {free}"),
        format!(
            "placement simulate --replay {record} --day --hours 2 --policy {free} --lost ams --demand 2 -o json"
        ),
        format!("placement simulate --day --hours 2 --site {oslo}"),
    ] {
        assert_eq!(world.cli(&line).await, Exit::Done, "{line}");
    }
    std::fs::write(path("no.jsonl"), "{}\n").unwrap();
    std::fs::write(path("bad.yaml"), "rules: [{ name: x, pin: rome }]\n").unwrap();
    for (line, exit) in [
        (format!("placement simulate --replay {}", path("no.jsonl")), Exit::Usage),
        (format!("placement simulate --replay {record} --policy {}", path("bad.yaml")), Exit::Usage),
        (format!("placement simulate --replay {record} --lost rome"), Exit::NotFound),
        (format!("placement simulate --replay {record} --demand 0"), Exit::Usage),
    ] {
        assert_eq!(world.cli(&line).await, exit, "{line}");
    }
}

#[tokio::test]
async fn a_drain_says_what_its_groups_wait_for() {
    let world = World::new().await;
    let path = world._directory.path().join("only.yaml").display().to_string();
    std::fs::write(&path, "rules: [{ name: residency, allow: [ams] }]\n").unwrap();
    assert_eq!(world.cli(&format!("policy apply {path}")).await, Exit::Done);
    let shown = world.get("/v1/sites/ams").await.body;
    assert!(shown.get("drain").is_none(), "{shown}");
    // No use to wait: they stay until the policy changes.
    assert_eq!(world.cli("site drain ams --wait").await, Exit::Conflict);
    let drain = world.get("/v1/sites/ams").await.body["drain"].clone();
    assert_eq!((&drain["left"], &drain["moving"]), (&json!(4), &json!(0)));
    let wait = &drain["waits"][0];
    assert_eq!(wait["groups"], 4);
    assert!(wait["reason"].as_str().unwrap().contains("by \"residency\": change the policy"), "{drain}");
    assert_eq!(wait["forbidden"], true);

    // A rule with an end may let them go.
    std::fs::write(&path, "rules: [{ name: residency, allow: [ams], until: 2100-01-31T18:00:00Z }]\n")
        .unwrap();
    assert_eq!(world.cli(&format!("policy apply {path}")).await, Exit::Done);
    assert_eq!(world.cli("site drain ams --wait --deadline 1s").await, Exit::Timeout);
}

/// What the documentation shows is taken as it stands.
#[tokio::test]
async fn each_example_of_the_policy_reference_is_taken() {
    let world = World::new().await;
    let text = include_str!("../../docs/placement.md");
    let blocks: Vec<&str> =
        text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 16, "one per kind of rule: {}", blocks.len());
    for block in blocks {
        let request = world.request(Method::PUT, "/v1/policy?dryRun=true").header("if-match", "*");
        let taken = reply(request.header("content-type", "application/yaml").body(block)).await;
        assert_eq!(taken.status, 200, "{block}\n{}", taken.body);
    }
}

#[tokio::test]
async fn changes_come_as_soon_as_they_are_there() {
    let world = World::new().await;
    let all = world.get("/v1/changes").await.body;
    let revision = all["revision"].as_u64().unwrap();
    assert!(all["changes"].as_array().unwrap().iter().any(|change| change["group"]["group"] == GROUP));
    let none = world.get(&format!("/v1/changes?since={revision}&wait_ms=10")).await.body;
    assert_eq!(none["changes"], json!([]));
    let path = format!("/v1/changes?since={revision}&wait_ms=20000");
    let (news, _) = tokio::join!(world.get(&path), world.post("/v1/sites/ams/cordon", json!({})));
    assert_eq!(news.body["changes"][0]["site"]["admin"], "cordoned");
    assert_problem(&world.get("/v1/changes?since=x").await, 400, Some("query"), "");
}

#[tokio::test]
async fn raft_is_shown_and_changed() {
    let world = World::new().await;
    let status = world.get("/v1/raft").await.body;
    assert_eq!((&status["role"], &status["leader"]), (&json!("leader"), &json!(1)));
    let again = json!({ "members": { "1": "127.0.0.1:4001" } });
    assert_problem(&world.post("/v1/raft/initialize", again).await, 409, None, "membership");
    let other = json!({ "members": { "2": "127.0.0.1:4001" } });
    assert_problem(&world.post("/v1/raft/initialize", other).await, 422, Some("members"), "node 1");
    let learner = json!({ "id": 2, "address": "nowhere" });
    assert_problem(&world.post("/v1/raft/learners", learner).await, 422, Some("address"), "HOST:PORT");
    for address in ["placement-2:100011", "placement-2:0", ":4002", "::1:4002"] {
        let learner = json!({ "id": 2, "address": address });
        let problem = world.post("/v1/raft/learners", learner).await;
        assert_problem(&problem, 422, Some("address"), "PORT is 1 to 65535");
    }
    let learner = json!({ "id": u64::MAX, "address": "127.0.0.1:4002" });
    assert_problem(
        &world.post("/v1/raft/learners", learner).await,
        422,
        Some("id"),
        "end at 9223372036854775807",
    );
    let learner = json!({ "id": 0, "address": "127.0.0.1:4002" });
    assert_problem(&world.post("/v1/raft/learners", learner).await, 422, Some("id"), "start at 1");
    assert_problem(
        &world.put("/v1/raft/members", json!({ "voters": [] })).await,
        422,
        Some("voters"),
        "none",
    );
    assert_problem(
        &world.put("/v1/raft/members", json!({ "voters": [1, 9] })).await,
        409,
        None,
        "membership",
    );
    assert_eq!(world.put("/v1/raft/members", json!({ "voters": [1] })).await.status, 200);
    assert_problem(&world.delete("/v1/raft/members/9").await, 404, Some("id"), "9");
    assert_problem(&world.delete("/v1/raft/members/1").await, 409, Some("id"), "only voter");
    assert_problem(&world.post("/v1/raft/transfer-leader", json!({ "to": 9 })).await, 422, Some("to"), "9");
    assert_eq!(world.post("/v1/raft/transfer-leader", json!({ "to": 1 })).await.status, 202);
    assert_eq!(reply(world.request(Method::POST, "/v1/raft/snapshot")).await.status, 202);
}

#[tokio::test]
async fn a_node_without_a_leader_says_so() {
    let world = World::empty().await;
    assert_eq!(world.get("/livez").await.status, 200);
    let ready = world.get("/readyz").await;
    let lacks = "[-] leader: none is known\n[-] quorum: no majority has answered the leader since this node \
                 started, or it knows no leader\n";
    assert_eq!((ready.status.as_u16(), ready.body), (503, json!(lacks)));
    let refused = reply(world.request(Method::POST, "/v1/sites/ams/drain")).await;
    assert_problem(&refused, 503, None, "no leader is known");
    assert_eq!(refused.headers["retry-after"], "1");
    assert_problem(&world.get("/v1/policy").await, 503, None, "no leader is known");
    assert_eq!(world.get("/v1/policy?consistency=stale").await.status, 200);
    assert_eq!(world.cli("raft status").await, Exit::Degraded);
    assert_eq!(world.cli("site get ams").await, Exit::Degraded);
    for list in ["site list", "group list", "service list", "move list", "audit list"] {
        assert_eq!(world.cli(list).await, Exit::Degraded, "{list}: it may be old");
    }
    let shown = world.get("/v1/sites").await;
    assert_eq!((shown.status.as_u16(), &shown.headers["limosa-quorum"]), (200, &"no".parse().unwrap()));
    let other = World::new().await;
    for verb in ["site get ams", "group list"] {
        let both = format!("--api {},{} {verb}", world.base, other.base);
        assert_eq!(run(&both).await, Exit::Done, "the next node is asked");
    }
    assert_eq!(other.get("/v1/sites").await.headers["limosa-quorum"], "yes");
}

#[tokio::test]
async fn of_a_node_that_hangs_the_next_is_asked_where_nothing_is_changed() {
    let world = World::new().await;
    // The kernel takes connections that nobody ever looks at, as of a process that is stopped.
    let hangs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let both = format!("--timeout 1s --api http://{},{}", hangs.local_addr().unwrap(), world.base);
    for verb in ["group list", "site get ams"] {
        assert_eq!(run(&format!("{both} {verb}")).await, Exit::Done, "{verb}");
    }
    assert_eq!(run(&format!("{both} site drain ams")).await, Exit::Timeout, "it may take effect still");
    let alone = format!("--timeout 1s --api http://{} site list", hangs.local_addr().unwrap());
    assert_eq!(run(&alone).await, Exit::Timeout);
}

#[tokio::test]
async fn health_metrics_and_requests_that_make_no_sense() {
    let world = World::new().await;
    assert_eq!(world.get("/readyz").await.body, "ok\n");
    let verbose = "[+] leader: node 1\n[+] quorum: a majority answered the leader 0.0 s ago, 0.2 s are allowed\n\
                   [+] part: the node takes part\n[+] log: all that the leader said is committed is here\n\
                   [+] disk: no write has been in hand for more than the 1.5 s that are allowed\n";
    assert_eq!(world.get("/readyz?verbose").await.body, verbose);
    assert_problem(&world.get("/v1/changes?cursor=1").await, 400, Some("cursor"), "next");
    let metrics = world.get("/metrics").await;
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    assert!(metrics.body.as_str().unwrap().contains("limosa_raft_is_leader 1"));
    assert_problem(&world.get("/v2").await, 404, None, "openapi.json");
    assert_problem(&world.delete("/v1/sites").await, 405, None, "method");
    let text = world.request(Method::POST, "/v1/moves").header("content-type", "text/plain").body("{}");
    assert_problem(&reply(text).await, 415, Some("body"), "");
    let broken =
        world.request(Method::POST, "/v1/moves").header("content-type", "application/json").body("{");
    assert_problem(&reply(broken).await, 400, Some("body"), "");
    let long = json!({ "moves": [{ "group": "x".repeat(api::BODY_LEN_MAX), "to": "ams" }] });
    assert_problem(&world.post("/v1/moves", long).await, 413, Some("body"), "");
    let page = world.request(Method::POST, "/v1/sites/ams/drain").header("origin", "http://evil.example");
    assert_problem(&reply(page).await, 403, Some("Origin"), "web pages");
    let rebound = world.request(Method::GET, "/v1/sites").header("host", "evil.example:8470");
    assert_problem(&reply(rebound).await, 403, Some("Host"), "localhost");
    let nameless =
        world.request(Method::POST, "/v1/sites/ams/undrain").header("limosa-actor", "x".repeat(65));
    assert_problem(&reply(nameless).await, 400, Some("limosa-actor"), "1 to 64");
}

#[tokio::test]
async fn every_route_is_described() {
    let world = World::new().await;
    let spec = world.get("/v1/openapi.json").await.body;
    assert_eq!(spec, serde_json::from_str::<Value>(&api::openapi().unwrap()).unwrap());
    let described: BTreeMap<&str, BTreeSet<&str>> = spec["paths"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(path, item)| (path.as_str(), item.as_object().unwrap().keys().map(String::as_str).collect()))
        .collect();
    let wanted: [(&str, &[&str]); 38] = [
        ("/livez", &["get"]),
        ("/metrics", &["get"]),
        ("/readyz", &["get"]),
        ("/v1/audit", &["get"]),
        ("/v1/changes", &["get"]),
        ("/v1/explain", &["get"]),
        ("/v1/groups", &["get"]),
        ("/v1/groups/merge", &["post"]),
        ("/v1/groups/split", &["post"]),
        ("/v1/groups/{group}", &["get"]),
        ("/v1/groups/{group}/{length}", &["get"]),
        ("/v1/moves", &["get", "post"]),
        ("/v1/moves/{id}", &["delete", "get"]),
        ("/v1/openapi.json", &["get"]),
        ("/v1/placement", &["get"]),
        ("/v1/placement/round", &["get"]),
        ("/v1/placement/simulate", &["post"]),
        ("/v1/placement/traffic", &["get"]),
        ("/v1/policy", &["get", "put"]),
        ("/v1/policy/confirm", &["post"]),
        ("/v1/policy/history", &["get"]),
        ("/v1/policy/history/{version}", &["get"]),
        ("/v1/policy/plan", &["post"]),
        ("/v1/raft", &["get"]),
        ("/v1/raft/initialize", &["post"]),
        ("/v1/raft/learners", &["post"]),
        ("/v1/raft/members", &["put"]),
        ("/v1/raft/members/{id}", &["delete"]),
        ("/v1/raft/snapshot", &["post"]),
        ("/v1/raft/transfer-leader", &["post"]),
        ("/v1/services", &["get"]),
        ("/v1/services/{name}", &["put"]),
        ("/v1/sites", &["get"]),
        ("/v1/sites/{name}", &["delete", "get", "put"]),
        ("/v1/sites/{name}/cordon", &["post"]),
        ("/v1/sites/{name}/drain", &["post"]),
        ("/v1/sites/{name}/fail-over", &["post"]),
        ("/v1/sites/{name}/undrain", &["post"]),
    ];
    let wanted: BTreeMap<&str, BTreeSet<&str>> =
        wanted.iter().map(|(path, methods)| (*path, methods.iter().copied().collect())).collect();
    assert_eq!(described, wanted);
}

#[tokio::test]
async fn the_command_line_ends_with_the_code_that_fits() {
    let world = World::new().await;
    let file = |name: &str, text: &str| {
        let path = world._directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    for line in [
        "site list",
        "site get ams -o json",
        "site list -o name",
        "site cordon virginia --no-headers",
        "site undrain virginia",
        "site add oslo --id 3 --endpoint 127.0.0.1:5003 --capacity-pps 5 --latitude -60 --longitude 10",
        "site drain oslo --wait --deadline 5s",
        "site remove oslo",
        "service list",
        "group list --site ams --limit 3",
        "group get 1:100.64.3.0/24",
        "policy get",
        "policy get -o name",
        "raft status",
        "raft snapshot",
        "audit list",
        "move list",
        "move start 1:100.64.0.0/24 1:100.64.1.0/24 --to virginia",
    ] {
        assert_eq!(world.cli(line).await, Exit::Done, "{line}");
    }
    let id = world.get("/v1/moves").await.body["moves"][0]["id"].as_u64().unwrap();
    assert_eq!(world.cli(&format!("move watch {id} --deadline 300ms")).await, Exit::Timeout);
    assert_eq!(world.cli(&format!("move abort {id}")).await, Exit::Done);
    assert_eq!(world.cli(&format!("move watch {id} -o json")).await, Exit::Degraded, "it was aborted");
    assert_eq!(world.cli("move get 7").await, Exit::NotFound);
    assert_eq!(world.cli("move watch 7").await, Exit::NotFound);
    assert_eq!(world.cli("site get bergen").await, Exit::NotFound);
    assert_eq!(world.cli("site remove oslo").await, Exit::NotFound, "it was removed");
    assert_eq!(world.cli("site remove ams").await, Exit::Conflict, "it owns groups");
    assert_eq!(world.cli("move start 1:100.64.0.0/24 --to ams").await, Exit::Conflict);
    assert_eq!(world.cli("move start x --to ams").await, Exit::Usage);
    assert_eq!(world.cli("site drain ams --wait --deadline 700ms").await, Exit::Timeout);
    let policy = file("policy.toml", "headroom = 0.3");
    assert_eq!(world.cli(&format!("policy set {policy} --dry-run")).await, Exit::Done);
    assert_eq!(world.cli(&format!("policy set {policy} --if-match 9")).await, Exit::Conflict);
    assert_eq!(world.cli(&format!("policy set {policy}")).await, Exit::Done);
    let wrong = file("wrong.json", r#"{"headroom": 3}"#);
    assert_eq!(world.cli(&format!("policy set {wrong}")).await, Exit::Usage);
    let mut dns = service();
    dns["id"] = 2.into();
    dns["name"] = "dns".into();
    let overlap = file("dns.json", &dns.to_string());
    assert_eq!(world.cli(&format!("service add {overlap} --owner virginia")).await, Exit::Conflict);
    assert_eq!(run("--api http://127.0.0.1:1 site list").await, Exit::Error, "nobody listens");
    assert_eq!(run("--api https://127.0.0.1:1 site list").await, Exit::Usage);
    let next = format!("--api http://127.0.0.1:1 --api {} site list", world.base);
    assert_eq!(run(&next).await, Exit::Done, "the next node is asked");
}
