//! Sites and services.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use flow::{GroupId, SiteId};
use placement::core::{
    Admin, Cluster, Command, Group, MOVES_PER_COMMAND_MAX, Move, MovePhase, Proof, Service, Site, SiteSpec,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::extract::{Actor, Answer, Body, Consistency, Params, ReadParams, Segments, WriteParams, typed};
use super::problem::{Problem, ProblemBody};
use super::view::{Services, SiteStatus, Sites};
use super::{Api, aside, site_by};
use crate::address::Address;

/// All sites.
#[utoipa::path(get, path = "/v1/sites", tag = "sites",
    params(("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = Sites), (status = 503, body = ProblemBody)))]
pub(super) async fn sites(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<Sites>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    all(&api, cluster).await
}

/// All sites, told aside: a look at every group.
async fn all(api: &Api, cluster: Arc<Cluster>) -> Result<Answer<Sites>, Problem> {
    let (revision, heard) = (cluster.revision, api.node.heard());
    let sites = aside(move || SiteStatus::all(&cluster, &heard)).await?;
    Ok(Answer::ok(revision, Sites { sites }))
}

/// One site.
#[utoipa::path(get, path = "/v1/sites/{name}", tag = "sites",
    params(("name" = String, Path, description = "its name, or else its number"),
        ("consistency" = Option<Consistency>, Query, description = "`linearizable` if not given")),
    responses((status = 200, body = SiteStatus), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn site(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<SiteStatus>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Linearizable).await?;
    let id = site_by(&cluster, &name)?.id;
    status_of(&api, cluster, id.0).await
}

async fn status_of(api: &Api, cluster: Arc<Cluster>, id: u8) -> Result<Answer<SiteStatus>, Problem> {
    let Answer { revision, body, .. } = all(api, cluster).await?;
    let status = body.sites.into_iter().find(|status| status.site.id == id);
    let status = status.ok_or_else(|| Problem::not_found(format!("no site {id}: add it first")))?;
    Ok(Answer::ok(revision, status))
}

/// Adds a site, or replaces what was said of it. The body's `id` says which; `name` may be left out.
#[utoipa::path(put, path = "/v1/sites/{name}", tag = "sites",
    params(("name" = String, Path, description = "its name"),
        ("dryRun" = Option<bool>, Query, description = "checks only")),
    request_body(content = Object, description = "id, endpoint, capacity_pps; capacity_flows, capacity_bps, failure_domain; latitude and longitude or neither"),
    responses((status = 200, body = SiteStatus), (status = 409, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn put_site(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Params(params): Params<WriteParams>,
    Actor(actor): Actor,
    Body(body): Body<Value>,
) -> Result<Answer<SiteStatus>, Problem> {
    check_endpoint(&body)?;
    let spec: SiteSpec = typed(named(body, &name)?)?;
    let id = spec.id.0;
    let cluster = api.write(&actor, Command::PutSite(spec), params.dry_run).await?;
    status_of(&api, cluster, id).await
}

/// Removes a site that nothing leads to any more: it owns no group, has no part in a move, no rule names it, and it is not the only
/// one. From then on its certificate is of no use. Answers with the sites that are left.
#[utoipa::path(delete, path = "/v1/sites/{name}", tag = "sites",
    params(("name" = String, Path, description = "its name, or else its number"),
        ("dryRun" = Option<bool>, Query, description = "checks only")),
    responses((status = 200, body = Sites), (status = 404, body = ProblemBody), (status = 409, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn remove_site(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Params(params): Params<WriteParams>,
    Actor(actor): Actor,
) -> Result<Answer<Sites>, Problem> {
    let cluster = api.read(None, Consistency::Linearizable).await?;
    let site = site_by(&cluster, &name)?.id;
    let cluster = api.write(&actor, Command::RemoveSite { site }, params.dry_run).await?;
    all(&api, cluster).await
}

/// Whether a site's agent can be where the body says, if it says so. What the state has from earlier releases counts.
pub(super) fn check_endpoint(body: &Value) -> Result<(), Problem> {
    let given = body.get("endpoint").and_then(Value::as_str);
    match given.map(str::parse::<Address>) {
        Some(Err(error)) => Err(Problem::senseless("endpoint", format!("endpoint is {error}"))),
        Some(Ok(_)) | None => Ok(()),
    }
}

/// Puts the name of the path into the body, unless the body says another.
fn named(mut body: Value, name: &str) -> Result<Value, Problem> {
    let fields = body.as_object_mut().ok_or_else(|| Problem::senseless("body", "give a JSON object"))?;
    match fields.get("name") {
        None => {
            fields.insert("name".into(), name.into());
        }
        Some(given) if given == name => {}
        Some(given) => {
            let detail =
                format!("name is {given} here and {name:?} in the path: give the same, or leave it out");
            return Err(Problem::senseless("name", detail));
        }
    }
    Ok(body)
}

async fn set_admin(api: &Api, actor: &str, name: &str, admin: Admin) -> Result<Answer<SiteStatus>, Problem> {
    let cluster = api.read(None, Consistency::Linearizable).await?;
    let site = site_by(&cluster, name)?.id;
    let cluster = api.write(actor, Command::SetAdmin { site, admin }, false).await?;
    status_of(api, cluster, site.0).await
}

/// Empties a site: its groups move away as fast as the policy lets them, and no more come.
#[utoipa::path(post, path = "/v1/sites/{name}/drain", tag = "sites", params(("name" = String, Path)),
    responses((status = 200, body = SiteStatus), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn drain(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Actor(actor): Actor,
) -> Result<Answer<SiteStatus>, Problem> {
    set_admin(&api, &actor, &name, Admin::Draining).await
}

/// Ends a drain or cordon: the site may get groups again.
#[utoipa::path(post, path = "/v1/sites/{name}/undrain", tag = "sites", params(("name" = String, Path)),
    responses((status = 200, body = SiteStatus), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn undrain(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Actor(actor): Actor,
) -> Result<Answer<SiteStatus>, Problem> {
    set_admin(&api, &actor, &name, Admin::Active).await
}

/// Closes a site for more groups; it keeps those that it has.
#[utoipa::path(post, path = "/v1/sites/{name}/cordon", tag = "sites", params(("name" = String, Path)),
    responses((status = 200, body = SiteStatus), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn cordon(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Actor(actor): Actor,
) -> Result<Answer<SiteStatus>, Problem> {
    set_admin(&api, &actor, &name, Admin::Cordoned).await
}

/// What became of the groups of a site that was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailOver {
    /// Groups that have a new owner.
    pub reassigned: u64,
    /// Groups that were on their way to it, and are served by their former owners again.
    pub taken_back: u64,
    /// Groups that stay with it: they have no standby, or one that takes no groups.
    pub left: Vec<String>,
}

/// Groups of [`FailOver::left`] that are named.
const LEFT_SHOWN_MAX: usize = 1_000;

/// Gives the groups of a site that is lost to their standbys, without their flows, and takes back those that were on their way to
/// it and that it may have served already, with their flows as of the cut. Only for a site that holds no lease; who
/// calls this knows that it does not forward either, or fences it: a site that only lost its agent still serves its groups.
#[utoipa::path(post, path = "/v1/sites/{name}/fail-over", tag = "sites", params(("name" = String, Path)),
    responses((status = 200, body = FailOver), (status = 404, body = ProblemBody), (status = 409, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn fail_over(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Actor(actor): Actor,
) -> Result<Answer<FailOver>, Problem> {
    let cluster = api.read(None, Consistency::Linearizable).await?;
    let site = site_by(&cluster, &name)?;
    if site.alive {
        let detail = format!("site {} is alive: drain it instead", site.name);
        return Err(Problem::new(StatusCode::CONFLICT, detail));
    }
    let site = site.id;
    let (taken_back, mut revision) = take_back(&api, &actor, &cluster, site).await?;
    let (groups, left) = aside(move || standbys(&cluster, site)).await?;
    for some in groups.chunks(MOVES_PER_COMMAND_MAX) {
        let command = Command::Reassign { groups: some.to_vec() };
        revision = api.write(&actor, command, false).await?.revision;
    }
    Ok(Answer::ok(revision, FailOver { reassigned: groups.len() as u64, taken_back, left }))
}

/// Where the groups of a lost site go, and some of those that have nowhere to go.
fn standbys(cluster: &Cluster, lost: SiteId) -> (Vec<(GroupId, SiteId)>, Vec<String>) {
    let takes = |id: SiteId| cluster.sites.get(&id).is_some_and(Site::takes_groups);
    let target = |group: &Group| group.standby.filter(|&to| group.move_id.is_none() && takes(to));
    let (mut groups, mut left) = (Vec::new(), Vec::new());
    for group in cluster.groups.values().filter(|group| group.owner == lost) {
        match target(group) {
            Some(to) => groups.push((group.id, to)),
            None if left.len() < LEFT_SHOWN_MAX => left.push(group.id.to_string()),
            None => {}
        }
    }
    (groups, left)
}

/// Ends the moves to a lost site after their flip: how many, and the revision after them.
async fn take_back(api: &Api, actor: &str, cluster: &Cluster, site: SiteId) -> Result<(u64, u64), Problem> {
    let lost = |mv: &&Move| mv.to == site && mv.phase == MovePhase::Switching;
    let mut done = (0, cluster.revision);
    for mv in cluster.moves.values().filter(lost) {
        let command = Command::TakeBack { move_id: mv.id, by: mv.from, proof: Proof::Fenced };
        done = (done.0 + 1, api.write(actor, command, false).await?.revision);
    }
    Ok(done)
}

/// All services.
#[utoipa::path(get, path = "/v1/services", tag = "services",
    params(("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = Services), (status = 503, body = ProblemBody)))]
pub(super) async fn services(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<Services>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    let services = cluster.services.values().cloned().collect();
    Ok(Answer::ok(cluster.revision, Services { services }))
}

/// Adds a service with its groups, or replaces its name, timeouts and ordering. `owner`, a site, is the first owner
/// of its groups; without it they are spread by capacity.
#[utoipa::path(put, path = "/v1/services/{name}", tag = "services",
    params(("name" = String, Path, description = "its name"),
        ("dryRun" = Option<bool>, Query, description = "checks only")),
    request_body(content = Object, description = "id, nat, group_len; timeouts, ordering and owner if wanted"),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 422, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn put_service(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    Params(params): Params<WriteParams>,
    Actor(actor): Actor,
    Body(body): Body<Value>,
) -> Result<Answer<Service>, Problem> {
    let mut body = named(body, &name)?;
    let owner = body.as_object_mut().and_then(|fields| fields.remove("owner"));
    let owner = match owner.map(typed::<Option<String>>).transpose()?.flatten() {
        Some(owner) => {
            let cluster = api.read(None, Consistency::Linearizable).await?;
            Some(site_by(&cluster, &owner).map_err(|problem| problem.field("owner"))?.id)
        }
        None => None,
    };
    let service: Service = typed(body)?;
    let command = Command::PutService { service: service.clone(), owner };
    let cluster = api.write(&actor, command, params.dry_run).await?;
    Ok(Answer::ok(cluster.revision, service))
}
