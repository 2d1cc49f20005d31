//! Health, metrics, and the description of the API.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use placement::node::Node;
use serde::Deserialize;

use super::Api;
use super::extract::Params;
use super::problem::Problem;
use crate::placement::metrics;

/// Whether this process answers.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, body = String)))]
pub(super) async fn livez() -> &'static str {
    "ok\n"
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
    let checks = checks(&api.node);
    let ready = checks.iter().all(|(_, holds)| *holds);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if ready && params.verbose.is_none() {
        return (status, "ok\n".into());
    }
    let shown = checks.iter().filter(|(_, holds)| params.verbose.is_some() || !holds);
    (status, shown.map(|(what, holds)| format!("[{}] {what}\n", if *holds { '+' } else { '-' })).collect())
}

fn checks(node: &Node) -> [(&'static str, bool); 2] {
    let status = node.status();
    [("a leader is known", status.leader.is_some()), ("the node runs", status.stopped.is_none())]
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = 200, body = String)))]
pub(super) async fn scrape(State(api): State<Arc<Api>>) -> Result<impl IntoResponse, Problem> {
    let text = metrics::text(&api.node)
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "health", responses((status = 200, body = Object)))]
pub(super) async fn openapi(State(api): State<Arc<Api>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], api.description.clone())
}
