//! Moves: those in hand, those that ended, and new ones. Beside them the watch and the audit log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use flow::{GroupId, MoveId, SiteId};
use placement::core::{Cluster, Command, MoveReason, Outcome};
use placement::raft::Changes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::extract::{Actor, Answer, Body, Consistency, Params, ReadParams, Segments, text};
use super::problem::{Problem, ProblemBody};
use super::view::{Audit, ChangeView, ChangesView, MoveView, Moves, StartedMove, StartedMoves};
use super::{Api, groups, limited, site_by};

/// Moves or audit entries, if not said otherwise.
const LEN: usize = 100;
/// Moves or audit entries, at most: more than are kept.
const LEN_MAX: usize = 10_000;
/// Answers that are remembered for repeated requests.
const REPLAYS_LEN_MAX: usize = 256;
/// Characters of an idempotency key.
const KEY_LEN_MAX: usize = 255;
/// The header with the key.
const KEY: HeaderName = HeaderName::from_static("idempotency-key");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    limit: Option<usize>,
    consistency: Option<Consistency>,
}

/// Moves in hand, then those that ended lately; newest first.
#[utoipa::path(get, path = "/v1/moves", tag = "moves",
    params(("limit" = Option<usize>, Query, description = "1 to 10000, 100 if not given"),
        ("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = Moves), (status = 400, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Params(params): Params<ListParams>,
) -> Result<Answer<Moves>, Problem> {
    let limit = limited(params.limit, LEN, LEN_MAX)?;
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    let present = cluster.moves.values().rev().map(|present| MoveView::present(&cluster, present));
    let finished = cluster.finished.iter().rev().map(|finished| MoveView::finished(&cluster, finished));
    let moves = present.chain(finished).take(limit).collect();
    Ok(Answer::ok(cluster.revision, Moves { moves }))
}

fn view(cluster: &Cluster, id: MoveId) -> Result<Answer<MoveView>, Problem> {
    let present = cluster.moves.get(&id).map(|present| MoveView::present(cluster, present));
    let view = present.or_else(|| Some(MoveView::finished(cluster, cluster.finished(id)?)));
    let view = view.ok_or_else(|| Problem::not_found(format!("no move {id}, or it ended long ago")))?;
    Ok(Answer::ok(cluster.revision, view))
}

/// One move.
#[utoipa::path(get, path = "/v1/moves/{id}", tag = "moves",
    params(("id" = u64, Path), ("consistency" = Option<Consistency>, Query, description = "`linearizable` if not given")),
    responses((status = 200, body = MoveView), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<u64>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<MoveView>, Problem> {
    view(&*api.read(params.consistency, Consistency::Linearizable).await?, MoveId(id))
}

/// Wishes to move.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wishes {
    /// All or, if one is refused, none.
    moves: Vec<Wish>,
}

/// A wish to move.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wish {
    /// Of what, for example `1:100.64.3.0/24`.
    group: String,
    /// The site, by name or number.
    to: String,
}

impl Wish {
    fn resolve(&self, cluster: &Cluster, n: usize) -> Result<(GroupId, SiteId), Problem> {
        let group = self.group.parse().map_err(|error: flow::GroupIdError| {
            Problem::senseless(&format!("moves[{n}].group"), error.to_string())
        })?;
        let to = site_by(cluster, &self.to).map_err(|problem| problem.field(&format!("moves[{n}].to")))?;
        Ok((group, to.id))
    }
}

/// Answers to requests with an idempotency key. This node's own: at another node a repeated request joins the moves
/// that are in hand, as it does without a key.
#[derive(Default)]
pub(super) struct Replays(Mutex<VecDeque<(String, Wishes, u64, StartedMoves)>>);

impl Replays {
    fn find(&self, key: &str, wishes: &Wishes) -> Result<Option<Answer<StartedMoves>>, Problem> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.iter().find(|(known, ..)| known == key) {
            None => Ok(None),
            Some((_, same, revision, started)) if same == wishes => {
                Ok(Some(accepted(*revision, started.clone())))
            }
            Some(_) => {
                let detail =
                    format!("idempotency-key {key:?} was used for other moves: give each request its own");
                Err(Problem::senseless("idempotency-key", detail))
            }
        }
    }

    fn keep(&self, key: String, wishes: Wishes, revision: u64, started: StartedMoves) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == REPLAYS_LEN_MAX {
            kept.pop_front();
        }
        kept.push_back((key, wishes, revision, started));
    }
}

fn accepted(revision: u64, body: StartedMoves) -> Answer<StartedMoves> {
    Answer { status: StatusCode::ACCEPTED, revision, body }
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    match text(headers, &KEY)? {
        Some(key) if key.is_empty() || key.len() > KEY_LEN_MAX => {
            let detail = format!("idempotency-key has {} characters: give 1 to {KEY_LEN_MAX}", key.len());
            Err(Problem::bad("idempotency-key", detail))
        }
        key => Ok(key.map(str::to_owned)),
    }
}

/// Starts moves. A group that is on its way to the same site already keeps its move.
#[utoipa::path(post, path = "/v1/moves", tag = "moves",
    params(("Idempotency-Key" = Option<String>, Header, description = "a repeated request gets the first answer")),
    request_body = Wishes,
    responses((status = 202, body = StartedMoves), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 422, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn start(
    State(api): State<Arc<Api>>,
    Actor(actor): Actor,
    headers: HeaderMap,
    Body(wishes): Body<Wishes>,
) -> Result<Answer<StartedMoves>, Problem> {
    let key = key(&headers)?;
    if let Some(key) = &key
        && let Some(answer) = api.replays.find(key, &wishes)?
    {
        return Ok(answer);
    }
    let cluster = api.read(None, Consistency::Linearizable).await?;
    let moves = wishes.moves.iter().enumerate().map(|(n, wish)| wish.resolve(&cluster, n));
    let command =
        Command::StartMoves { moves: moves.collect::<Result<_, _>>()?, reason: MoveReason::Operator };
    let started = match api.node.propose(&actor, command).await? {
        Outcome::Moves(started) => started,
        Outcome::Done => Vec::new(),
    };
    let view = |started: &placement::core::Started| StartedMove {
        group: started.group.to_string(),
        move_id: started.move_id.map(|id| id.0),
    };
    let started = StartedMoves { moves: started.iter().map(view).collect() };
    let revision = api.node.cluster().revision;
    if let Some(key) = key {
        api.replays.keep(key, wishes, revision, started.clone());
    }
    Ok(accepted(revision, started))
}

/// Aborts a move that is still preparing.
#[utoipa::path(delete, path = "/v1/moves/{id}", tag = "moves", params(("id" = u64, Path)),
    responses((status = 200, body = MoveView), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn abort(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<u64>,
    Actor(actor): Actor,
) -> Result<Answer<MoveView>, Problem> {
    let id = MoveId(id);
    let command = Command::Abort { move_id: id, by: None, reason: format!("asked for by {actor}") };
    let cluster = api.write(&actor, command, false).await?;
    view(&cluster, id)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangesParams {
    #[serde(default)]
    since: u64,
    #[serde(default)]
    wait_ms: u64,
    cursor: Option<String>,
}

/// What has changed since a revision, as soon as there is something. An answer is some hundred kilobytes at most, cut
/// between two revisions; all there is comes in pages.
#[utoipa::path(get, path = "/v1/changes", tag = "watch",
    params(("since" = Option<u64>, Query, description = "`revision` of the answer before; 0 for all there is"),
        ("wait_ms" = Option<u64>, Query, description = "longest wait; at most 60000 counts"),
        ("cursor" = Option<String>, Query, description = "`next` of the answer before, in place of `since`; opaque")),
    responses((status = 200, body = ChangesView), (status = 400, body = ProblemBody)))]
pub(super) async fn changes(
    State(api): State<Arc<Api>>,
    Params(params): Params<ChangesParams>,
) -> Result<Answer<ChangesView>, Problem> {
    let page = match params.cursor {
        Some(cursor) => {
            let (revision, after) = from_cursor(&cursor)?;
            api.node.rest(revision, after).await
        }
        None => api.node.page_since(params.since, Duration::from_millis(params.wait_ms)).await,
    };
    let cluster = api.node.cluster();
    let Changes { revision, reset, changes, .. } = page.changes;
    let changes = changes.into_iter().map(|change| ChangeView::of(&cluster, change)).collect();
    let next = page.next.map(|after| format!("{revision}.{}", groups::to_cursor(&after)));
    Ok(Answer::ok(revision, ChangesView { revision, reset, changes, next }))
}

/// The revision that a watcher began at, and the last group that it has.
fn from_cursor(cursor: &str) -> Result<(u64, GroupId), Problem> {
    let wrong = || Problem::bad("cursor", format!("cursor is {cursor:?}: give `next` of the answer before"));
    let (revision, after) = cursor.split_once('.').ok_or_else(wrong)?;
    Ok((revision.parse().map_err(|_| wrong())?, groups::from_cursor(after)?))
}

/// Who did what, newest first.
#[utoipa::path(get, path = "/v1/audit", tag = "audit",
    params(("limit" = Option<usize>, Query, description = "1 to 10000, 100 if not given"),
        ("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = Audit), (status = 400, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn audit(
    State(api): State<Arc<Api>>,
    Params(params): Params<ListParams>,
) -> Result<Answer<Audit>, Problem> {
    let limit = limited(params.limit, LEN, LEN_MAX)?;
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    let entries = cluster.audit.iter().rev().take(limit).cloned().collect();
    Ok(Answer::ok(cluster.revision, Audit { entries }))
}
