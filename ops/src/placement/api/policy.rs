//! The policy: read, replaced, tried out, confirmed, and what was in force before.
//!
//! Operators write names of sites and services and times in UTC; the state holds numbers. Both are taken here.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use placement::core::whatif::Difference;
use placement::core::{Cluster, Command, Policy, PolicyRevision, SiteSpec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::ToSchema;

use super::config::check_endpoint;
use super::extract::{Actor, Answer, Consistency, Document, Params, ReadParams, Segments, text, typed};
use super::problem::{Problem, ProblemBody};
use super::view::site_name;
use super::whatif::WhatIfView;
use super::{Api, aside, site_by};

/// The policy; its version is the ETag.
#[utoipa::path(get, path = "/v1/policy", tag = "policy",
    params(("consistency" = Option<Consistency>, Query, description = "`linearizable` if not given")),
    responses((status = 200, body = Object, headers(("ETag" = String, description = "the version, quoted"))),
        (status = 503, body = ProblemBody)))]
pub(super) async fn policy(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadParams>,
) -> Result<Response, Problem> {
    policy_of(&*api.read(params.consistency, Consistency::Linearizable).await?)
}

fn policy_of(cluster: &Cluster) -> Result<Response, Problem> {
    let document = document(cluster, &cluster.policy)?;
    let mut response = Answer::ok(cluster.revision, document).into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{}\"", cluster.policy_version)) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

/// The query of [`put`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PutParams {
    #[serde(default, rename = "dryRun")]
    dry_run: bool,
    /// Seconds.
    #[serde(default, rename = "confirmWithin")]
    confirm_within: Option<u64>,
}

/// Replaces the policy that the caller saw. Keys that are left out get their defaults. Sites and services may be given by name
/// or number. As JSON, YAML (`application/yaml`) or TOML (`application/toml`).
#[utoipa::path(put, path = "/v1/policy", tag = "policy",
    params(("dryRun" = Option<bool>, Query, description = "checks only"),
        ("confirmWithin" = Option<u64>, Query,
            description = "seconds, 1 to 86400, after which the former policy returns unless this one is confirmed"),
        ("If-Match" = String, Header, description = "the ETag that was seen, or `*` for any")),
    request_body(content = Object, description = "automatic, min_gain_ms, min_dwell_s, moves_in_flight_max, flip_lead_ms, headroom, survive_loss, \
        labels and rules"),
    responses((status = 200, body = Object, headers(("ETag" = String, description = "the new version, quoted"))),
        (status = 404, body = ProblemBody), (status = 412, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 428, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn put_policy(
    State(api): State<Arc<Api>>,
    Params(params): Params<PutParams>,
    Actor(actor): Actor,
    headers: HeaderMap,
    Document(body): Document,
) -> Result<Response, Problem> {
    let cluster = api.read(None, Consistency::Linearizable).await?;
    let expected_version = if_match(&headers)?.unwrap_or(cluster.policy_version);
    let policy = resolve(body, &cluster)?;
    let confirm_within_ms = params.confirm_within.map(|seconds| seconds.saturating_mul(1000));
    let command = Command::PutPolicy { policy, expected_version, confirm_within_ms };
    policy_of(&*api.write(&actor, command, params.dry_run).await?)
}

/// The version of `If-Match`; `None` for `*`.
fn if_match(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(tag) = text(headers, &header::IF_MATCH)? else {
        let detail = "If-Match is missing: give the ETag of the policy that you saw, or * for any";
        return Err(Problem::new(StatusCode::PRECONDITION_REQUIRED, detail).field("If-Match"));
    };
    if tag == "*" {
        return Ok(None);
    }
    let quoted = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
    let version = quoted.and_then(|tag| tag.parse().ok());
    version.map(Some).ok_or_else(|| {
        Problem::bad("If-Match", format!("If-Match is {tag}: give an ETag of the policy, for example \"3\""))
    })
}

/// Keeps the policy that is on trial. `If-Match` says which.
#[utoipa::path(post, path = "/v1/policy/confirm", tag = "policy",
    params(("If-Match" = String, Header, description = "the ETag of the policy on trial, or `*` for the present one")),
    responses((status = 200, body = Object), (status = 409, body = ProblemBody),
        (status = 428, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn confirm(
    State(api): State<Arc<Api>>,
    Actor(actor): Actor,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let version = match if_match(&headers)? {
        Some(version) => version,
        None => api.read(None, Consistency::Linearizable).await?.policy_version,
    };
    policy_of(&*api.write(&actor, Command::ConfirmPolicy { version }, false).await?)
}

/// Policies that were in force, newest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoliciesView {
    /// The present one.
    pub version: u64,
    /// The present one returns to the former at this time unless it is confirmed, in milliseconds since 1970.
    pub on_trial_until_ms: Option<u64>,
    /// Each.
    pub policies: Vec<PolicyView>,
}

/// A policy that was in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PolicyView {
    /// Its number.
    pub version: u64,
    /// Who brought it.
    pub actor: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// How many rules it had.
    pub rules: usize,
}

/// The last policies, newest first.
#[utoipa::path(get, path = "/v1/policy/history", tag = "policy",
    params(("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = PoliciesView), (status = 503, body = ProblemBody)))]
pub(super) async fn history(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<PoliciesView>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    let view = |kept: &PolicyRevision| PolicyView {
        version: kept.version,
        actor: kept.actor.clone(),
        at_ms: kept.at_ms,
        rules: kept.policy.rules.len(),
    };
    let policies = PoliciesView {
        version: cluster.policy_version,
        on_trial_until_ms: cluster.trial.as_ref().map(|trial| trial.until_ms),
        policies: cluster.policies.iter().rev().map(view).collect(),
    };
    Ok(Answer::ok(cluster.revision, policies))
}

/// A policy that was in force, as it would be put again.
#[utoipa::path(get, path = "/v1/policy/history/{version}", tag = "policy",
    params(("version" = u64, Path, description = "see /v1/policy/history")),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn revision(
    State(api): State<Arc<Api>>,
    Segments(version): Segments<u64>,
) -> Result<Answer<Value>, Problem> {
    let cluster = api.read(None, Consistency::Stale).await?;
    let kept = cluster.policies.iter().find(|kept| kept.version == version);
    let kept = kept.ok_or_else(|| {
        let oldest = cluster.policies.front().map_or(0, |kept| kept.version);
        Problem::not_found(format!(
            "policy {version} is not kept: give {oldest} to {}",
            cluster.policy_version
        ))
    })?;
    Ok(Answer::ok(cluster.revision, document(&cluster, &kept.policy)?))
}

/// What a policy would bring, without putting it: which groups would move, and why, delay before and after, loads and prices,
/// and what keeps groups from their nearest site. Only the leader knows.
#[utoipa::path(post, path = "/v1/policy/plan", tag = "policy",
    request_body(content = Object, description = "as for PUT /v1/policy"),
    responses((status = 200, body = WhatIfView), (status = 404, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn plan(
    State(api): State<Arc<Api>>,
    Document(body): Document,
) -> Result<Answer<WhatIfView>, Problem> {
    let cluster = api.node.cluster();
    let policy = checked(&api, resolve(body, &cluster)?).await?;
    answer(&api, Difference { policy: Some(policy), ..Difference::default() }).await
}

/// A policy that the state machine would take.
async fn checked(api: &Api, policy: Policy) -> Result<Policy, Problem> {
    let expected_version = api.node.cluster().policy_version;
    let command = Command::PutPolicy { policy: policy.clone(), expected_version, confirm_within_ms: None };
    api.write("operator", command, true).await?;
    Ok(policy)
}

/// What is to be different in a simulation.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Simulation {
    /// Another policy, as for PUT /v1/policy.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Value>,
    /// Sites that are added (name, capacity_pps, latitude and longitude), or known ones by name with what is different.
    #[schema(value_type = Vec<Object>)]
    pub sites: Vec<Value>,
    /// Sites that are lost, by name.
    pub lost: Vec<String>,
    /// All traffic times this, above 0 to 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub demand: Option<f64>,
}

/// What another policy, other capacities, a new or a lost site, or more traffic would bring. Only the leader knows.
#[utoipa::path(post, path = "/v1/placement/simulate", tag = "groups", request_body = Simulation,
    responses((status = 200, body = WhatIfView), (status = 404, body = ProblemBody),
        (status = 422, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub(super) async fn simulate(
    State(api): State<Arc<Api>>,
    Document(body): Document,
) -> Result<Answer<WhatIfView>, Problem> {
    let wish: Simulation = typed(body)?;
    let cluster = api.node.cluster();
    let policy = match wish.policy {
        Some(policy) => Some(checked(&api, resolve(policy, &cluster)?).await?),
        None => None,
    };
    let mut sites: Vec<SiteSpec> = Vec::new();
    for site in wish.sites {
        let site = completed(site, &cluster, &sites)?;
        // The state machine's own checks, on a copy.
        api.write("operator", Command::PutSite(site.clone()), true).await?;
        sites.push(site);
    }
    let lost = wish.lost.iter().map(|name| Ok(site_by(&cluster, name)?.id));
    let lost = lost.collect::<Result<Vec<_>, Problem>>()?;
    if let Some(demand) = wish.demand.filter(|demand| !(*demand > 0.0 && *demand <= 1000.0)) {
        return Err(Problem::senseless("demand", format!("demand is {demand}: give above 0 to 1000")));
    }
    answer(&api, Difference { policy, sites, lost, demand: wish.demand }).await
}

/// A site that may be known already: then what is left out is as it is. A new one gets a free number.
pub(crate) fn completed(
    mut body: Value,
    cluster: &Cluster,
    others: &[SiteSpec],
) -> Result<SiteSpec, Problem> {
    check_endpoint(&body)?;
    let known = body.get("name").and_then(Value::as_str).and_then(|name| cluster.site_named(name));
    let free = |id: &u8| {
        let id = flow::SiteId(*id);
        !cluster.sites.contains_key(&id) && !others.iter().any(|other| other.id == id)
    };
    let defaults = match known {
        Some(site) => serde_json::json!({
            "id": site.id, "endpoint": site.endpoint, "capacity_pps": site.capacity_pps,
            "capacity_flows": site.capacity_flows, "capacity_bps": site.capacity_bps,
            "failure_domain": site.failure_domain,
            "latitude": site.latitude, "longitude": site.longitude,
        }),
        None => serde_json::json!({ "id": (0..=u8::MAX).find(free), "endpoint": "none:0" }),
    };
    if let (Some(body), Value::Object(defaults)) = (body.as_object_mut(), defaults) {
        for (key, value) in defaults {
            body.entry(key).or_insert(value);
        }
    }
    typed(body)
}

async fn answer(api: &Api, difference: Difference) -> Result<Answer<WhatIfView>, Problem> {
    let now = api.node.cluster();
    let found = api.node.what_if(difference.clone()).await?;
    let found = found.ok_or_else(|| Problem::not_found("there are no sites: add one first".to_owned()))?;
    let view = aside(move || {
        let mut cluster = Cluster::clone(&now);
        // New sites have names too.
        for (n, spec) in difference.sites.into_iter().enumerate() {
            let command = Command::PutSite(spec);
            let proposal = placement::core::Proposal { actor: String::new(), at_ms: 0, command };
            cluster.apply(cluster.revision + 1 + n as u64, &proposal).result?;
        }
        Ok::<_, Problem>(WhatIfView::of(&cluster, &found))
    });
    Ok(Answer::ok(api.node.cluster().revision, view.await??))
}

// Names and numbers

/// Lists of sites in a rule.
const LISTS: [&str; 5] = ["allow", "deny", "prefer", "cost", "standby"];
/// Kinds of rules with a `site` inside.
const INSIDE: [&str; 3] = ["dial", "capacity", "drain"];

/// A policy from what an operator writes.
pub(crate) fn resolve(mut body: Value, cluster: &Cluster) -> Result<Policy, Problem> {
    if let Some(rules) = body.get_mut("rules").and_then(Value::as_array_mut) {
        for (n, rule) in rules.iter_mut().enumerate() {
            let name = rule.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            if let Some(rule) = rule.as_object_mut() {
                resolve_rule(rule, cluster).map_err(|wrong| {
                    Problem::senseless(&format!("rules[{n}]"), format!("rule {name:?}: {wrong}"))
                })?;
            }
        }
    }
    typed(body)
}

fn resolve_rule(rule: &mut Map<String, Value>, cluster: &Cluster) -> Result<(), String> {
    let site = |value: &mut Value| number(value, "site", |name| Some(cluster.site_named(name)?.id.0));
    if let Some(service) = rule.get_mut("service") {
        let by_name = |name: &str| {
            cluster.services.values().find(|service| service.name == name).map(|service| service.id.get())
        };
        number(service, "service", by_name)?;
    }
    for list in LISTS {
        if let Some(sites) = rule.get_mut(list).and_then(Value::as_array_mut) {
            sites.iter_mut().try_for_each(site)?;
        }
    }
    if let Some(pin) = rule.get_mut("pin") {
        site(pin)?;
    }
    for kind in INSIDE {
        if let Some(inside) = rule.get_mut(kind).and_then(|kind| kind.get_mut("site")) {
            site(inside)?;
        }
    }
    if let Some(until) = rule.remove("until") {
        rule.insert("until_ms".into(), wall_ms("until", &until)?.into());
    }
    if let Some(drain) = rule.get_mut("drain").and_then(Value::as_object_mut)
        && let Some(deadline) = drain.remove("deadline")
    {
        drain.insert("deadline_ms".into(), wall_ms("deadline", &deadline)?.into());
    }
    Ok(())
}

/// Puts the number in the place of a name; numbers, also as text, stay.
fn number(value: &mut Value, what: &str, by_name: impl Fn(&str) -> Option<u8>) -> Result<(), String> {
    if let Some(name) = value.as_str() {
        let found = by_name(name).or_else(|| name.parse().ok());
        *value = found.ok_or_else(|| format!("no {what} {name:?}: add it first"))?.into();
    }
    Ok(())
}

fn wall_ms(field: &str, time: &Value) -> Result<u64, String> {
    let parsed = time.as_str().and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
    let ms = parsed.and_then(|at| u64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok());
    ms.ok_or_else(|| format!("{field} is {time}: give a time such as \"2027-01-31T18:00:00Z\""))
}

/// A policy as an operator would write it.
fn document(cluster: &Cluster, policy: &Policy) -> Result<Value, Problem> {
    let broken = |error: String| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error);
    let mut document = serde_json::to_value(policy).map_err(|error| broken(error.to_string()))?;
    let rules = document.get_mut("rules").and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten().filter_map(Value::as_object_mut) {
        name_rule(rule, cluster);
    }
    Ok(document)
}

fn name_rule(rule: &mut Map<String, Value>, cluster: &Cluster) {
    let site = |value: &mut Value| {
        if let Some(id) = value.as_u64().and_then(|id| u8::try_from(id).ok()) {
            *value = site_name(cluster, flow::SiteId(id)).into();
        }
    };
    if let Some(service) = rule.get_mut("service") {
        let known = |id: u64| cluster.services.values().find(|service| u64::from(service.id.get()) == id);
        if let Some(found) = service.as_u64().and_then(known) {
            *service = found.name.clone().into();
        }
    }
    for list in LISTS {
        rule.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().for_each(site);
    }
    if let Some(pin) = rule.get_mut("pin") {
        site(pin);
    }
    for kind in INSIDE {
        if let Some(inside) = rule.get_mut(kind).and_then(|kind| kind.get_mut("site")) {
            site(inside);
        }
    }
    name_time(rule, "until");
    if let Some(drain) = rule.get_mut("drain").and_then(Value::as_object_mut) {
        name_time(drain, "deadline");
    }
}

/// A time in UTC in the place of milliseconds.
fn name_time(of: &mut Map<String, Value>, field: &str) {
    let ms = format!("{field}_ms");
    if let Some(time) = of.get(&ms).and_then(Value::as_u64).and_then(utc) {
        of.remove(&ms);
        of.insert(field.to_owned(), time.into());
    }
}

fn utc(ms: u64) -> Option<String> {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok()?;
    at.format(&Rfc3339).ok()
}
