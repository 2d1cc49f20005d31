//! Metrics and health of the agent, over HTTP on loopback.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use tokio::task::JoinHandle;

use super::metrics::SiteMetrics;

/// Serves `/metrics`, `/livez`, `/readyz`, and `/v1/local-moves`: the last moves between workers.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(address: SocketAddr, metrics: Arc<SiteMetrics>) -> anyhow::Result<JoinHandle<()>> {
    let listener =
        tokio::net::TcpListener::bind(address).await.with_context(|| format!("metrics = {address}"))?;
    let router = Router::new()
        .route("/metrics", get(|State(metrics): State<Arc<SiteMetrics>>| async move { metrics.text() }))
        .route(
            "/v1/local-moves",
            get(|State(metrics): State<Arc<SiteMetrics>>| async move { Json(metrics.local_moves()) }),
        )
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(|State(metrics): State<Arc<SiteMetrics>>| async move { ready(&metrics) }))
        .with_state(metrics);
    Ok(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the metrics listener ended");
        }
    }))
}

fn ready(metrics: &SiteMetrics) -> (StatusCode, String) {
    let checks = metrics.checks();
    let line = |(what, holds): &(&str, bool)| format!("[{}] {what}\n", if *holds { '+' } else { '-' });
    let text = checks.iter().map(line).collect();
    let all = checks.iter().all(|(_, holds)| *holds);
    (if all { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}
