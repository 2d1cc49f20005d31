//! What handlers take and give: bodies and parameters whose errors are problems, answers with a revision.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::problem::Problem;

/// The revision of the state that an answer shows.
pub(super) const REVISION: HeaderName = HeaderName::from_static("limosa-revision");
/// Who says to be asking; goes into the audit log.
pub(super) const ACTOR: HeaderName = HeaderName::from_static("limosa-actor");
/// Characters of an actor's name.
const ACTOR_LEN_MAX: usize = 64;

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let read = Json::from_request(request, state).await;
        read.map(|Json(body)| Self(body))
            .map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()).field("body"))
    }
}

/// A body in JSON, YAML or TOML, by its content type; JSON if there is none.
pub(super) struct Document(pub(super) Value);

impl<S: Send + Sync> FromRequest<S> for Document {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let kind = text(request.headers(), &CONTENT_TYPE)?.unwrap_or("application/json").to_owned();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let body = String::from_request(request, state).await;
        let body =
            body.map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()).field("body"))?;
        let read = match kind.as_str() {
            "application/json" => serde_json::from_str(&body).map_err(|error| error.to_string()),
            "application/toml" => toml::from_str(&body).map_err(|error| error.to_string()),
            "application/yaml" | "application/x-yaml" | "text/yaml" => {
                serde_saphyr::from_str(&body).map_err(|error| error.to_string())
            }
            other => {
                let detail = format!(
                    "content-type is {other:?}: give application/json, application/yaml or application/toml"
                );
                return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail).field("content-type"));
            }
        };
        read.map(Self).map_err(|error| Problem::bad("body", error))
    }
}

/// Reads the body further, into what it should be.
pub(super) fn typed<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, Problem> {
    serde_json::from_value(value).map_err(|error| Problem::senseless("body", error.to_string()))
}

/// The query.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read = Query::from_request_parts(parts, state).await;
        read.map(|Query(query)| Self(query))
            .map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()).field("query"))
    }
}

/// The variable parts of the path.
pub(super) struct Segments<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Segments<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read = Path::from_request_parts(parts, state).await;
        read.map(|Path(path)| Self(path))
            .map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()).field("path"))
    }
}

/// How new an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Consistency {
    /// At least as new as the request; needs a leader.
    Linearizable,
    /// What this node knows.
    Stale,
}

/// The query of what takes nothing else.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadParams {
    #[serde(default)]
    pub(super) consistency: Option<Consistency>,
}

/// The query of what can be tried without effect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WriteParams {
    #[serde(default, rename = "dryRun")]
    pub(super) dry_run: bool,
}

/// A JSON answer with the revision that it shows.
pub(super) struct Answer<T> {
    pub(super) status: StatusCode,
    pub(super) revision: u64,
    pub(super) body: T,
}

impl<T> Answer<T> {
    pub(super) fn ok(revision: u64, body: T) -> Self {
        Self { status: StatusCode::OK, revision, body }
    }
}

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        (self.status, [(REVISION, HeaderValue::from(self.revision))], Json(self.body)).into_response()
    }
}

/// The same, already in JSON.
pub(super) struct Written {
    revision: u64,
    json: Vec<u8>,
}

impl Written {
    pub(super) fn new(revision: u64, body: &impl Serialize) -> Result<Self, Problem> {
        let json = serde_json::to_vec(body).map_err(|error| Problem::unwritten(&error))?;
        Ok(Self { revision, json })
    }
}

impl IntoResponse for Written {
    fn into_response(self) -> Response {
        let kind = (CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let revision = (REVISION, HeaderValue::from(self.revision));
        ([kind, revision], self.json).into_response()
    }
}

/// The name for the audit log. It is not verified: whoever reaches this listener may claim any.
pub(super) struct Actor(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Actor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Some(name) = text(&parts.headers, &ACTOR)? else { return Ok(Self("operator".into())) };
        if name.is_empty() || name.len() > ACTOR_LEN_MAX {
            let detail = format!("limosa-actor has {} characters: give 1 to {ACTOR_LEN_MAX}", name.len());
            return Err(Problem::bad("limosa-actor", detail));
        }
        // The word in front keeps anyone from passing for a site or the leader.
        Ok(Self(format!("operator {name}")))
    }
}

/// A header's text.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Problem> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = value.to_str();
    text.map(Some).map_err(|_| Problem::bad(name.as_str(), format!("{name}: give visible ASCII characters")))
}
