//! The config API: JSON over HTTP, errors as problem+json (RFC 9457), described at `/v1/openapi.json`.
//!
//! It has no authentication and no encryption yet. Therefore it listens on loopback only, which the configuration
//! checks, and [`guard`] turns away what a browser was tricked into sending. Whoever can open a connection to
//! the listener is an operator; the name for the audit log (`Limosa-Actor`) is taken on trust.
//!
//! Any node answers: writes and up-to-date reads go by way of the leader. What only the leader can do gives 503
//! and names it. `Limosa-Revision` is the revision that an answer shows; `Limosa-Quorum` (`yes` or `no`) and
//! `Limosa-Quorum-Age-Ms` say whether the node heard of a majority lately, without which it may be old. Every write may be repeated.

pub mod assess;
pub mod config;
mod extract;
mod groups;
mod health;
mod moves;
pub mod policy;
mod problem;
mod raft;
pub mod traffic;
pub mod view;
pub mod whatif;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use placement::core::{Cluster, Command, Proposal, Site};
use placement::node::Node;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::keys::Keys;
use extract::Consistency;
use problem::Problem;
pub use problem::ProblemBody;

/// Bytes of a request's body.
pub const BODY_LEN_MAX: usize = 1 << 20;

/// What the handlers share.
struct Api {
    node: Arc<Node>,
    /// The key material of the process, where it has some.
    keys: Option<Arc<Keys>>,
    replays: moves::Replays,
    description: String,
    /// The process was told to stop, and may still hand over.
    stops: CancellationToken,
    /// Metrics of the process beside those of the node.
    registry: prometheus::Registry,
}

impl Api {
    /// The state, as new as asked for.
    async fn read(&self, asked: Option<Consistency>, default: Consistency) -> Result<Arc<Cluster>, Problem> {
        match asked.unwrap_or(default) {
            Consistency::Linearizable => Ok(self.node.linearizable().await?),
            Consistency::Stale => Ok(self.node.cluster()),
        }
    }

    /// Proposes a command and gives the state with its effect; a dry run tries it on a copy of the state.
    async fn write(&self, actor: &str, command: Command, dry_run: bool) -> Result<Arc<Cluster>, Problem> {
        if dry_run {
            let cluster = self.node.linearizable().await?;
            let proposal = Proposal { actor: actor.to_owned(), at_ms: crate::clock::wall_ms(), command };
            return aside(move || tried(&cluster, &proposal)).await?;
        }
        self.node.propose(actor, command).await?;
        // This node may follow: what it has just proposed must show.
        Ok(self.node.linearizable().await?)
    }
}

/// The state as a proposal would make it.
fn tried(cluster: &Cluster, proposal: &Proposal) -> Result<Arc<Cluster>, Problem> {
    let mut copy = cluster.clone();
    copy.apply(cluster.revision + 1, proposal).result?;
    copy.revision = cluster.revision;
    Ok(Arc::new(copy))
}

/// Does what takes a while with many groups away from the threads that carry Raft's messages.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let failed = |error: tokio::task::JoinError| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the work for this answer failed: {error}"))
    };
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// A site by its name, or else its number.
fn site_by<'a>(cluster: &'a Cluster, name: &str) -> Result<&'a Site, Problem> {
    let numbered = || cluster.sites.get(&flow::SiteId(name.parse().ok()?));
    let site = cluster.site_named(name).or_else(numbered);
    site.ok_or_else(|| {
        Problem::not_found(format!("no site {name:?}: see /v1/sites, or add it first")).field("site")
    })
}

/// A limit in its range.
fn limited(given: Option<usize>, default: usize, max: usize) -> Result<usize, Problem> {
    match given.unwrap_or(default) {
        limit if (1..=max).contains(&limit) => Ok(limit),
        limit => Err(Problem::bad("limit", format!("limit is {limit}: give 1 to {max}"))),
    }
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Limosa",
    description = "Sites, services, groups, moves and policy of a Limosa cluster. No authentication yet; loopback only."
))]
struct Description;

fn parts() -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(config::sites))
        .routes(routes!(config::site, config::put_site, config::remove_site))
        .routes(routes!(config::drain))
        .routes(routes!(traffic::traffic))
        .routes(routes!(config::fail_over))
        .routes(routes!(config::undrain))
        .routes(routes!(config::cordon))
        .routes(routes!(config::services))
        .routes(routes!(config::put_service))
        .routes(routes!(policy::policy, policy::put_policy))
        .routes(routes!(policy::confirm))
        .routes(routes!(policy::history))
        .routes(routes!(policy::revision))
        .routes(routes!(policy::plan))
        .routes(routes!(policy::simulate))
        .routes(routes!(groups::list))
        .routes(routes!(groups::get))
        .routes(routes!(groups::get_plain))
        .routes(routes!(groups::explain))
        .routes(routes!(groups::split))
        .routes(routes!(groups::merge))
        .routes(routes!(assess::assess))
        .routes(routes!(assess::round))
        .routes(routes!(moves::list, moves::start))
        .routes(routes!(moves::get, moves::abort))
        .routes(routes!(moves::changes))
        .routes(routes!(moves::audit))
        .routes(routes!(raft::status))
        .routes(routes!(raft::initialize))
        .routes(routes!(raft::add_learner))
        .routes(routes!(raft::set_voters))
        .routes(routes!(raft::remove))
        .routes(routes!(raft::transfer_leader))
        .routes(routes!(raft::snapshot))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(health::scrape))
        .routes(routes!(health::openapi))
        .split_for_parts()
}

/// The description of the API, as it is served.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn openapi() -> serde_json::Result<String> {
    parts().1.to_pretty_json()
}

/// The routes over a node; `/metrics` also has what is in the registry.
///
/// # Errors
/// When the description cannot be written as JSON.
pub fn router(
    node: Arc<Node>,
    keys: Option<Arc<Keys>>,
    stops: CancellationToken,
    registry: prometheus::Registry,
) -> anyhow::Result<Router> {
    let (router, description) = parts();
    let description = description.to_pretty_json()?;
    let api = Arc::new(Api { node, keys, replays: moves::Replays::default(), description, stops, registry });
    let dated = axum::middleware::from_fn_with_state(api.clone(), date);
    Ok(router
        .fallback(|| async { Problem::not_found("there is no such path: see /v1/openapi.json") })
        .method_not_allowed_fallback(|| async {
            let detail = "the path does not take this method: see /v1/openapi.json";
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
        })
        .layer(DefaultBodyLimit::max(BODY_LEN_MAX))
        .layer(dated)
        .layer(axum::middleware::from_fn(guard))
        .with_state(api))
}

/// Whether the node had a quorum when it answered: `yes` or `no`. Without one the state may be old.
pub const QUORUM_HEADER: &str = "limosa-quorum";
/// Milliseconds since a quorum answered the leader, if that is known.
pub const QUORUM_AGE_HEADER: &str = "limosa-quorum-age-ms";

/// Says with each answer how old what it rests on may be.
async fn date(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let quorum = if api.node.has_quorum() { "yes" } else { "no" };
    response.headers_mut().insert(QUORUM_HEADER, HeaderValue::from_static(quorum));
    if let Some(age) = api.node.quorum_age() {
        response.headers_mut().insert(QUORUM_AGE_HEADER, HeaderValue::from(millis(age)));
    }
    response
}

fn millis(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

/// Turns away what comes from web pages: they can reach loopback, and there is no authentication. A page's writes
/// carry `Origin`; a page that has its own name resolved to loopback carries that name as `Host`.
async fn guard(request: Request, next: Next) -> Response {
    let refused = |header: &str, detail: &str| {
        Problem::new(StatusCode::FORBIDDEN, detail).field(header).into_response()
    };
    if request.headers().contains_key(header::ORIGIN) {
        return refused("Origin", "requests of web pages are refused: this API has no authentication yet");
    }
    if !host_is_local(request.headers()) {
        return refused("Host", "the host is a name: use `localhost` or an address");
    }
    next.run(request).await
}

fn host_is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let address =
        host.parse::<SocketAddr>().is_ok() || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    address || host.split(':').next().is_some_and(|name| name.eq_ignore_ascii_case("localhost"))
}

/// Serves the API.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    node: Arc<Node>,
    keys: Arc<Keys>,
    stops: CancellationToken,
    registry: prometheus::Registry,
) -> anyhow::Result<JoinHandle<()>> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("api = {address}"))?;
    Ok(crate::http::serve(listener, router(node, Some(keys), stops, registry)?))
}

/// Serves the API on a listener that is bound already.
///
/// # Errors
/// When the description cannot be written as JSON.
pub fn serve_on(
    listener: TcpListener,
    node: Arc<Node>,
    stops: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    Ok(crate::http::serve(listener, router(node, None, stops, prometheus::Registry::new())?))
}
