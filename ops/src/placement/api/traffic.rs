//! What sites report, for records that can be played again.

use std::sync::Arc;

use axum::extract::State;
use placement::core::{Cluster, SiteReport};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::extract::{Answer, Params};
use super::problem::{Problem, ProblemBody};
use super::{Api, aside};

/// The query of [`traffic`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrafficParams {
    #[serde(default)]
    state: bool,
}

/// Traffic and delays of one moment, as `limosa placement record` writes them.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TrafficView {
    /// When, in milliseconds since 1970, by the clock of the node that answered.
    pub at_ms: u64,
    /// The replicated state without its history, if it was asked for.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<Value>,
    /// The last report of each site.
    #[schema(value_type = Vec<Object>)]
    pub reports: Vec<SiteReport>,
}

/// What sites reported last: with the state, a moment that can be played again. Every node knows it.
#[utoipa::path(get, path = "/v1/placement/traffic", tag = "groups",
    params(("state" = Option<bool>, Query, description = "with the replicated state")),
    responses((status = 200, body = TrafficView), (status = 503, body = ProblemBody)))]
pub(super) async fn traffic(
    State(api): State<Arc<Api>>,
    Params(params): Params<TrafficParams>,
) -> Result<Answer<TrafficView>, Problem> {
    let cluster = api.node.cluster();
    let reports = api.node.reports().iter().map(|report| SiteReport::clone(report)).collect();
    let (at_ms, revision) = (crate::clock::wall_ms(), cluster.revision);
    let state = if params.state { Some(aside(move || state(&cluster)).await??) } else { None };
    Ok(Answer::ok(revision, TrafficView { at_ms, state, reports }))
}

fn state(cluster: &Cluster) -> Result<Value, Problem> {
    let mut state = cluster.clone();
    state.audit.clear();
    state.finished.clear();
    state.policies.clear();
    let broken = |error: serde_json::Error| {
        Problem::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    };
    serde_json::to_value(&state).map_err(broken)
}
