//! Metrics, health and the switch of the agent, over HTTP on loopback.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use problem_details::ProblemDetails;
use serde::Serialize;
use switchctl::session::QueryError;
use tokio::task::JoinHandle;

use super::fleet::SharedPage;
use super::metrics::SiteMetrics;
use super::switch::Switch;

#[derive(Clone)]
struct Site {
    metrics: Arc<SiteMetrics>,
    switch: Switch,
    workers: SharedPage,
}

/// Serves `/metrics`, `/livez`, `/readyz`; `/v1/workers`: what each worker does; `/v1/local-moves`: the last moves between workers;
/// and `/v1/switch/rules`, `/v1/switch/diff` and `/v1/switch/resync` (POST).
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<SiteMetrics>,
    switch: Switch,
    workers: SharedPage,
) -> anyhow::Result<JoinHandle<()>> {
    let listener =
        tokio::net::TcpListener::bind(address).await.with_context(|| format!("metrics = {address}"))?;
    let router = Router::new()
        .route("/metrics", get(|State(site): State<Site>| async move { site.metrics.text() }))
        .route(
            "/v1/local-moves",
            get(|State(site): State<Site>| async move { Json(site.metrics.local_moves()) }),
        )
        .route("/v1/workers", get(|State(site): State<Site>| async move { told_workers(&site.workers) }))
        .route(
            "/v1/switch/rules",
            get(|State(site): State<Site>| async move { told(site.switch.rules().await) }),
        )
        .route(
            "/v1/switch/diff",
            get(|State(site): State<Site>| async move { told(site.switch.differences().await) }),
        )
        .route(
            "/v1/switch/resync",
            post(|State(site): State<Site>| async move { told(site.switch.resync().await) }),
        )
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(|State(site): State<Site>| async move { ready(&site.metrics) }))
        .with_state(Site { metrics, switch, workers });
    Ok(crate::http::serve(listener, router))
}

fn told(answer: Result<impl Serialize, QueryError>) -> Response {
    match answer {
        Ok(body) => Json(body).into_response(),
        Err(QueryError::Unavailable) => {
            let detail =
                "the switch is not connected, did not answer, or nothing is wanted of it yet: see /readyz";
            ProblemDetails::from_status_code(StatusCode::SERVICE_UNAVAILABLE)
                .with_type(axum::http::Uri::from_static("/problems/unavailable"))
                .with_detail(detail)
                .into_response()
        }
    }
}

fn told_workers(workers: &SharedPage) -> Response {
    let page = workers.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Json(page).into_response()
}

fn ready(metrics: &SiteMetrics) -> (StatusCode, String) {
    let checks = metrics.checks();
    let line = |(what, holds): &(&str, bool)| {
        if *holds { format!("[+] {what}\n") } else { format!("[-] {}\n", metrics.describe(what)) }
    };
    let remark = |remark: String| format!("[+] peers: {remark}; this site is as ready as before\n");
    let text = checks.iter().map(line).chain(metrics.remarks().into_iter().map(remark)).collect();
    let all = checks.iter().all(|(_, holds)| *holds);
    (if all { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}
