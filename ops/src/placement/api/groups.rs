//! Groups: where they are, and why.

use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;

use axum::extract::State;
use flow::{GroupId, Prefix, ServiceId};
use placement::core::{Cluster, Command, Group};
use serde::Deserialize;
use utoipa::ToSchema;

use super::extract::{Actor, Answer, Body, Consistency, Params, ReadParams, Segments};
use super::problem::{Problem, ProblemBody};
use super::view::{ExplanationView, GroupView, Groups};
use super::{Api, aside, limited, site_by};

/// Groups of a page, if not said otherwise.
const PAGE: usize = 1_000;
/// Groups of a page, at most.
const PAGE_MAX: usize = 10_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    site: Option<String>,
    service: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
    consistency: Option<Consistency>,
}

/// Groups, page by page.
#[utoipa::path(get, path = "/v1/groups", tag = "groups",
    params(("site" = Option<String>, Query, description = "only those that it owns"),
        ("service" = Option<String>, Query, description = "only those of it, by name or number"),
        ("limit" = Option<usize>, Query, description = "1 to 10000, 1000 if not given"),
        ("cursor" = Option<String>, Query, description = "`next` of the page before; opaque"),
        ("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = Groups), (status = 400, body = ProblemBody),
        (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Params(params): Params<ListParams>,
) -> Result<Answer<Groups>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    // A filter may have to pass by all groups.
    aside(move || page(&cluster, params)).await?
}

fn page(cluster: &Cluster, params: ListParams) -> Result<Answer<Groups>, Problem> {
    let limit = limited(params.limit, PAGE, PAGE_MAX)?;
    let site = params.site.map(|name| site_by(cluster, &name).map(|site| site.id)).transpose()?;
    let service = params.service.map(|name| service_by(cluster, &name)).transpose()?;
    let after = params.cursor.map(|cursor| from_cursor(&cursor)).transpose()?;
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    let wanted = |group: &&Group| {
        site.is_none_or(|site| group.owner == site) && service.is_none_or(|id| group.id.service == id)
    };
    let mut rest =
        cluster.groups.range((start, Bound::Unbounded)).map(|(_, group)| group).filter(wanted).peekable();
    let page: Vec<&Group> = rest.by_ref().take(limit).collect();
    let next = rest.peek().and_then(|_| page.last()).map(|last| to_cursor(&last.id));
    let groups = page.into_iter().map(|group| GroupView::of(cluster, group)).collect();
    Ok(Answer::ok(cluster.revision, Groups { groups, next }))
}

fn service_by(cluster: &Cluster, name: &str) -> Result<ServiceId, Problem> {
    let named = cluster.services.values().find(|service| service.name == name);
    let numbered = || ServiceId::new(name.parse().ok()?).ok().and_then(|id| cluster.services.get(&id));
    let service = named.or_else(numbered).map(|service| service.id);
    service
        .ok_or_else(|| Problem::not_found(format!("no service {name:?}: see /v1/services")).field("service"))
}

/// A cursor is the last group of its page in hexadecimal, so that nobody is tempted to make one.
pub(super) fn to_cursor(last: &GroupId) -> String {
    last.to_string().bytes().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn from_cursor(cursor: &str) -> Result<GroupId, Problem> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = cursor.as_bytes().chunks(2).map(byte).collect();
    let group = bytes.and_then(|bytes| String::from_utf8(bytes).ok()).and_then(|text| text.parse().ok());
    group.ok_or_else(|| {
        Problem::bad("cursor", format!("cursor is {cursor:?}: give `next` of the page before"))
    })
}

fn group_id(text: &str) -> Result<GroupId, Problem> {
    text.parse().map_err(|error: flow::GroupIdError| Problem::bad("group", error.to_string()))
}

/// A group by name.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    /// `SERVICE:PREFIX`.
    group: String,
}

/// A group becomes its two halves, with its owner and epoch; nothing moves.
#[utoipa::path(post, path = "/v1/groups/split", tag = "groups", request_body = Named,
    responses((status = 200, body = Groups), (status = 400, body = ProblemBody), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn split(
    State(api): State<Arc<Api>>,
    Actor(actor): Actor,
    Body(named): Body<Named>,
) -> Result<Answer<Groups>, Problem> {
    let group = group_id(&named.group)?;
    let cluster = api.write(&actor, Command::SplitGroup { group }, false).await?;
    let halves = group.prefix.halves().map_or_else(Vec::new, |(low, high)| vec![low, high]);
    Ok(told(&cluster, group, &halves))
}

/// A group and its sibling, which must be at the same site, become one group; nothing moves.
#[utoipa::path(post, path = "/v1/groups/merge", tag = "groups", request_body = Named,
    responses((status = 200, body = Groups), (status = 400, body = ProblemBody), (status = 404, body = ProblemBody),
        (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn merge(
    State(api): State<Arc<Api>>,
    Actor(actor): Actor,
    Body(named): Body<Named>,
) -> Result<Answer<Groups>, Problem> {
    let half = group_id(&named.group)?;
    let whole = half.prefix.parent().ok_or_else(|| unknown(&half))?;
    let group = GroupId { prefix: whole, ..half };
    let cluster = api.write(&actor, Command::MergeGroups { group }, false).await?;
    Ok(told(&cluster, group, &[whole]))
}

fn told(cluster: &Cluster, group: GroupId, prefixes: &[Prefix]) -> Answer<Groups> {
    let ids = prefixes.iter().map(|prefix| GroupId { prefix: *prefix, ..group });
    let groups = ids.filter_map(|id| cluster.groups.get(&id));
    let groups = groups.map(|group| GroupView::of(cluster, group)).collect();
    Answer::ok(cluster.revision, Groups { groups, next: None })
}

fn unknown(group: &GroupId) -> Problem {
    Problem::not_found(format!("no group {group}: groups are leaves of the client prefixes of a service"))
        .field("group")
}

async fn group(
    api: &Api,
    text: &str,
    consistency: Option<Consistency>,
) -> Result<Answer<GroupView>, Problem> {
    let id = group_id(text)?;
    let cluster = api.read(consistency, Consistency::Linearizable).await?;
    let group = cluster.groups.get(&id).ok_or_else(|| unknown(&id))?;
    Ok(Answer::ok(cluster.revision, GroupView::of(&cluster, group)))
}

/// One group, with the slash of its prefix as `%2F`.
#[utoipa::path(get, path = "/v1/groups/{group}", tag = "groups",
    params(("group" = String, Path, description = "for example `1:100.64.3.0%2F24`"),
        ("consistency" = Option<Consistency>, Query, description = "`linearizable` if not given")),
    responses((status = 200, body = GroupView), (status = 400, body = ProblemBody),
        (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(text): Segments<String>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<GroupView>, Problem> {
    group(&api, &text, params.consistency).await
}

/// One group, with the slash of its prefix as it is.
#[utoipa::path(get, path = "/v1/groups/{group}/{length}", tag = "groups",
    params(("group" = String, Path, description = "for example `1:100.64.3.0`"),
        ("length" = u8, Path, description = "for example `24`"),
        ("consistency" = Option<Consistency>, Query, description = "`linearizable` if not given")),
    responses((status = 200, body = GroupView), (status = 400, body = ProblemBody),
        (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn get_plain(
    State(api): State<Arc<Api>>,
    Segments((first, length)): Segments<(String, String)>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<GroupView>, Problem> {
    group(&api, &format!("{first}/{length}"), params.consistency).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExplainParams {
    group: String,
}

/// Why a group is where it is. Only the leader knows.
#[utoipa::path(get, path = "/v1/explain", tag = "groups",
    params(("group" = String, Query, description = "a group such as `1:100.64.3.0/24`, a client's address, an outside \
        `ADDRESS:PORT`, or a flow `PROTOCOL,ADDRESS:PORT,ADDRESS:PORT`")),
    responses((status = 200, body = ExplanationView), (status = 400, body = ProblemBody),
        (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn explain(
    State(api): State<Arc<Api>>,
    Params(params): Params<ExplainParams>,
) -> Result<Answer<ExplanationView>, Problem> {
    let cluster = api.node.cluster();
    let id = target(&cluster, &params.group)?;
    let explanation = api.node.explain(id).await?.ok_or_else(|| unknown(&id))?;
    Ok(Answer::ok(cluster.revision, ExplanationView::of(&cluster, &explanation)))
}

/// The group that is meant by its name, an address, or a flow.
fn target(cluster: &Cluster, text: &str) -> Result<GroupId, Problem> {
    if text.contains('/') {
        return group_id(text);
    }
    let parts: Vec<&str> = text.split(',').collect();
    let ends = match parts.as_slice() {
        [end] => vec![*end],
        [_, from, to] => vec![*from, *to],
        _ => Vec::new(),
    };
    let parsed = ends.iter().map(|end| {
        let socket = end.parse::<SocketAddr>().map(|end| (end.ip(), Some(end.port())));
        socket.or_else(|_| end.parse::<IpAddr>().map(|address| (address, None)))
    });
    let parsed: Vec<(IpAddr, Option<u16>)> = parsed.collect::<Result<_, _>>().unwrap_or_default();
    if parsed.is_empty() {
        let detail = format!(
            "group is {text:?}: give a group such as 1:100.64.3.0/24, a client's address, an outside ADDRESS:PORT, or \
             PROTOCOL,ADDRESS:PORT,ADDRESS:PORT"
        );
        return Err(Problem::bad("group", detail));
    }
    let found = parsed.iter().find_map(|&(address, port)| {
        by_client(cluster, address).or_else(|| by_outside(cluster, address, port?))
    });
    found.ok_or_else(|| {
        let detail = format!("{text} belongs to no service: see /v1/services for clients and pools");
        Problem::not_found(detail).field("group")
    })
}

fn by_client(cluster: &Cluster, address: IpAddr) -> Option<GroupId> {
    cluster.services.keys().find_map(|&service| {
        let around = (0..=32).rev().filter_map(|len| Prefix::containing(address, len).ok());
        around.map(|prefix| GroupId { service, prefix }).find(|id| cluster.groups.contains_key(id))
    })
}

/// The group of the subscriber who owns an outside port.
fn by_outside(cluster: &Cluster, address: IpAddr, port: u16) -> Option<GroupId> {
    let IpAddr::V4(address) = address else { return None };
    cluster.services.values().find_map(|service| {
        let slices = flow::nat::NatSlices::new(service.nat.clone()).ok()?;
        by_client(cluster, slices.client(slices.owner(address, port)?)?.into())
    })
}
