//! What sites report, for records that can be played again.

use std::sync::Arc;

use axum::extract::State;
use placement::core::{Cluster, SiteReport};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::extract::{Params, Written};
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
) -> Result<Written, Problem> {
    let (cluster, reports) = (api.node.cluster(), api.node.reports());
    let (at_ms, revision) = (crate::clock::wall_ms(), cluster.revision);
    // The state of many groups is long: its text is made aside, too.
    aside(move || {
        let reports = reports.iter().map(|report| SiteReport::clone(report)).collect();
        let state = if params.state { Some(state(&cluster)?) } else { None };
        Written::new(revision, &TrafficView { at_ms, state, reports })
    })
    .await?
}

fn state(cluster: &Cluster) -> Result<Value, Problem> {
    let mut state = cluster.clone();
    state.audit.clear();
    state.finished.clear();
    state.policies.clear();
    serde_json::to_value(&state).map_err(|error| Problem::unwritten(&error))
}
