//! Whole processes: a deployment of three sites as child processes.

use std::path::PathBuf;
use std::time::Duration;

use limosa::demo::built_in;
use limosa::demo::cluster::{Cluster, Layout};

async fn cluster(directory: &tempfile::TempDir) -> Cluster {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let layout = Layout {
        sites: built_in(),
        workers: 2,
        flows: 1 << 14,
        directory: std::env::var_os("LIMOSA_TEST_DIRECTORY").map_or_else(|| directory.path().to_owned(), PathBuf::from),
        binary: PathBuf::from(env!("CARGO_BIN_EXE_limosa")),
        distance: 0.2,
    };
    let cluster = Cluster::start(layout).await.unwrap();
    cluster.configure(100_000).await.unwrap();
    cluster.until_ready().await.unwrap();
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_moves_when_an_operator_says_so() {
    let directory = tempfile::Builder::new().prefix("limosa-").tempdir().unwrap();
    let cluster = cluster(&directory).await;
    cluster.set_policy(serde_json::json!({ "automatic": false })).await.unwrap();
    let group = &cluster.get("/v1/groups").await.unwrap()["groups"][0];
    let to = if group["owner"] == "singapore" { "virginia" } else { "singapore" };
    let body = serde_json::json!({ "moves": [{ "group": group["group"], "to": to }] });
    let started = cluster.post("/v1/moves", &body).await.unwrap();
    let path = format!("/v1/moves/{}", started["moves"][0]["move"]);
    let mut state = serde_json::Value::Null;
    for _ in 0..100 {
        state = cluster.get(&path).await.unwrap()["state"].clone();
        if state == "done" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the move is {state} after 10 s");
}
