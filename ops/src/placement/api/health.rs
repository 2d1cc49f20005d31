//! Health, metrics, and the description of the API.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use placement::node::RaftStatus;
use serde::Deserialize;

use super::extract::Params;
use super::problem::Problem;
use super::{Api, aside};
use crate::placement::metrics;

/// Whether this process can go on. One that has stopped for good ends, so that it is started again.
#[utoipa::path(get, path = "/livez", tag = "health",
    responses((status = 200, body = String), (status = 503, body = String)))]
pub(super) async fn livez(State(api): State<Arc<Api>>) -> (StatusCode, String) {
    match api.node.status().stopped {
        None => (StatusCode::OK, "ok\n".into()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("[-] the node has stopped: {reason}\n")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadyParams {
    verbose: Option<String>,
}

/// Whether this node can do its work; if not, the answer lists what fails.
#[utoipa::path(get, path = "/readyz", tag = "health",
    params(("verbose" = Option<String>, Query, description = "lists what holds, too; takes no value")),
    responses((status = 200, body = String), (status = 503, body = String)))]
pub(super) async fn readyz(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadyParams>,
) -> (StatusCode, String) {
    let checks = checks(&api);
    let ready = checks.iter().all(|(_, holds)| *holds);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if ready && params.verbose.is_none() {
        return (status, "ok\n".into());
    }
    let shown = checks.iter().filter(|(_, holds)| params.verbose.is_some() || !holds);
    (status, shown.map(|(what, holds)| format!("[{}] {what}\n", if *holds { '+' } else { '-' })).collect())
}

/// What is checked, from evidence that is no older than an election may take.
fn checks(api: &Api) -> Vec<(String, bool)> {
    let status = api.node.status();
    let leader = status.leader.map_or_else(|| "none is known".into(), |id| format!("node {id}"));
    let mut checks = vec![
        (format!("leader: {leader}"), status.leader.is_some()),
        (format!("quorum: {}", quorum(&status)), status.quorum),
        (format!("part: {}", part(&status)), status.proven && status.stopped.is_none()),
        (format!("log: {}", log(&status)), !status.is_behind()),
        (format!("disk: {}", disk(&status)), !status.is_stuck()),
    ];
    for node in &status.silent {
        checks.push((
            format!("members: node {node} does not answer the leader; this node is as ready as before"),
            true,
        ));
    }
    for node in &status.twice {
        let what = format!(
            "numbers: two processes run as node {node}: stop the one that was started with a copy of its directory"
        );
        checks.push((what, false));
    }
    if let Some(keys) = &api.keys {
        let refused = keys.refused();
        let what = refused.as_deref().unwrap_or("it is valid");
        checks.push((format!("certificate: {what}"), refused.is_none()));
    }
    if api.stops.is_cancelled() {
        checks.push(("stop: it was told to stop".into(), false));
    }
    checks
}

/// When a quorum was heard of last.
pub(super) fn quorum(status: &RaftStatus) -> String {
    let allowed = status.quorum_age_max_ms as f64 / 1e3;
    match status.quorum_ack_ms {
        Some(age) => {
            format!(
                "a majority answered the leader {:.1} s ago, {allowed:.1} s are allowed",
                age as f64 / 1e3
            )
        }
        None => "no majority has answered the leader since this node started, or it knows no leader".into(),
    }
}

fn part(status: &RaftStatus) -> String {
    match &status.stopped {
        Some(reason) => format!("the node has stopped: {reason}"),
        None if !status.proven => "too few others have said yet what this node promised to them".into(),
        None => "the node takes part".into(),
    }
}

fn log(status: &RaftStatus) -> String {
    let [since, allowed] = [status.behind_ms, status.behind_max_ms].map(|ms| ms as f64 / 1e3);
    match status.behind_ms {
        0 => "all that the leader said is committed is here".into(),
        _ => format!(
            "what the leader said is committed is not here since {since:.1} s, {allowed:.1} s are allowed"
        ),
    }
}

fn disk(status: &RaftStatus) -> String {
    let [since, allowed] = [status.write_ms, status.write_max_ms].map(|ms| ms as f64 / 1e3);
    if status.is_stuck() {
        format!("a write has been in hand for {since:.1} s, {allowed:.1} s are allowed")
    } else {
        format!("no write has been in hand for more than the {allowed:.1} s that are allowed")
    }
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = 200, body = String)))]
pub(super) async fn scrape(State(api): State<Arc<Api>>) -> Result<impl IntoResponse, Problem> {
    let text = aside(move || metrics::text(&api.node, &api.registry))
        .await?
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "health", responses((status = 200, body = Object)))]
pub(super) async fn openapi(State(api): State<Arc<Api>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], api.description.clone())
}
