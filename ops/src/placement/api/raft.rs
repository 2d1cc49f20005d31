//! The placement nodes themselves. All but status, initialize and snapshot are for the leader.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use placement::node::{NodeId, RaftStatus};
use serde::Deserialize;
use utoipa::ToSchema;

use super::Api;
use super::extract::{Answer, Body, Segments};
use super::problem::{Problem, ProblemBody};
use crate::address::Address;
use crate::config::PLACEMENT_IDS;

fn status_of(api: &Api) -> Answer<RaftStatus> {
    let status = api.node.status();
    Answer::ok(status.revision, status)
}

/// How this node is.
#[utoipa::path(get, path = "/v1/raft", tag = "raft", responses((status = 200, body = Object)))]
pub(super) async fn status(State(api): State<Arc<Api>>) -> Answer<RaftStatus> {
    status_of(&api)
}

/// The first voters.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Founders {
    /// Address by number.
    #[schema(value_type = Object)]
    members: BTreeMap<NodeId, String>,
}

/// Makes a new group of nodes. On one node, once.
#[utoipa::path(post, path = "/v1/raft/initialize", tag = "raft", request_body = Founders,
    responses((status = 200, body = Object), (status = 409, body = ProblemBody),
        (status = 422, body = ProblemBody)))]
pub(super) async fn initialize(
    State(api): State<Arc<Api>>,
    Body(founders): Body<Founders>,
) -> Result<Answer<RaftStatus>, Problem> {
    let own = api.node.status().id;
    if !founders.members.contains_key(&own) {
        let detail = format!("members lack node {own}, which is asked: name it, or ask one of the members");
        return Err(Problem::senseless("members", detail));
    }
    founders.members.iter().try_for_each(|(id, address)| check_member(*id, address))?;
    api.node.initialize(founders.members).await?;
    Ok(status_of(&api))
}

fn check_member(id: NodeId, address: &str) -> Result<(), Problem> {
    if !PLACEMENT_IDS.contains(&id) {
        let most = PLACEMENT_IDS.end();
        let detail = format!("node id is {id}: node ids start at 1 and end at {most}");
        return Err(Problem::senseless("id", detail));
    }
    match address.parse::<Address>() {
        Ok(_) => Ok(()),
        Err(error) => Err(Problem::senseless("address", format!("address of node {id} is {error}"))),
    }
}

/// A node that shall follow.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Learner {
    /// Its number, never used before.
    id: NodeId,
    /// Where its QUIC listens.
    address: String,
}

/// Adds a node without a vote, and waits until it has caught up.
#[utoipa::path(post, path = "/v1/raft/learners", tag = "raft", request_body = Learner,
    responses((status = 200, body = Object), (status = 409, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 503, body = ProblemBody),
        (status = 504, body = ProblemBody)))]
pub(super) async fn add_learner(
    State(api): State<Arc<Api>>,
    Body(learner): Body<Learner>,
) -> Result<Answer<RaftStatus>, Problem> {
    check_member(learner.id, &learner.address)?;
    api.node.add_learner(learner.id, learner.address).await?;
    Ok(status_of(&api))
}

/// Who shall vote.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Voters {
    /// Numbers of members.
    #[schema(value_type = Vec<u64>)]
    voters: BTreeSet<NodeId>,
}

/// Makes these members the voters; former voters leave.
#[utoipa::path(put, path = "/v1/raft/members", tag = "raft", request_body = Voters,
    responses((status = 200, body = Object), (status = 409, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 503, body = ProblemBody),
        (status = 504, body = ProblemBody)))]
pub(super) async fn set_voters(
    State(api): State<Arc<Api>>,
    Body(body): Body<Voters>,
) -> Result<Answer<RaftStatus>, Problem> {
    if body.voters.is_empty() {
        return Err(Problem::senseless("voters", "voters are none: name at least one member"));
    }
    api.node.change_membership(body.voters).await?;
    Ok(status_of(&api))
}

/// Removes a node, voter or not. Its number is never used again.
#[utoipa::path(delete, path = "/v1/raft/members/{id}", tag = "raft", params(("id" = u64, Path)),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 503, body = ProblemBody),
        (status = 504, body = ProblemBody)))]
pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<NodeId>,
) -> Result<Answer<RaftStatus>, Problem> {
    let members = api.node.status().members;
    if !members.iter().any(|member| member.id == id) {
        return Err(Problem::not_found(format!("node {id} is no member: see /v1/raft")).field("id"));
    }
    if members.iter().all(|member| member.id == id || !member.voter) {
        let detail = format!("node {id} is the only voter: add another first");
        return Err(Problem::new(StatusCode::CONFLICT, detail).field("id"));
    }
    api.node.remove(id).await?;
    Ok(status_of(&api))
}

/// Who shall lead.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Heir {
    /// A voter.
    to: NodeId,
}

/// Hands the lead to another voter. The answer does not wait for the election.
#[utoipa::path(post, path = "/v1/raft/transfer-leader", tag = "raft", request_body = Heir,
    responses((status = 202, body = Object), (status = 422, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn transfer_leader(
    State(api): State<Arc<Api>>,
    Body(heir): Body<Heir>,
) -> Result<Answer<RaftStatus>, Problem> {
    if !api.node.status().members.iter().any(|member| member.id == heir.to && member.voter) {
        return Err(Problem::senseless("to", format!("node {} has no vote: name a voter", heir.to)));
    }
    api.node.transfer(heir.to).await?;
    Ok(Answer { status: StatusCode::ACCEPTED, ..status_of(&api) })
}

/// Takes a snapshot of this node's state. The answer does not wait for it.
#[utoipa::path(post, path = "/v1/raft/snapshot", tag = "raft",
    responses((status = 202, body = Object), (status = 503, body = ProblemBody)))]
pub(super) async fn snapshot(State(api): State<Arc<Api>>) -> Result<Answer<RaftStatus>, Problem> {
    api.node.snapshot().await?;
    Ok(Answer { status: StatusCode::ACCEPTED, ..status_of(&api) })
}
