//! Errors as problem+json (RFC 9457), each with a status that says who is at fault.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use placement::core::Rejected;
use placement::node::{NodeId, ProposeError};
use problem_details::ProblemDetails;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not granted, as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemBody {
    /// The kind, a reference: `/problems/KIND`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, and what would be right.
    pub detail: String,
    /// The field, parameter or header at fault, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The placement node that leads, if this node cannot answer and knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<NodeId>,
}

/// Members beyond those of RFC 9457.
#[derive(Debug, Default, Serialize)]
struct Extra {
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<NodeId>,
}

/// Why a request was not granted.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    kind: &'static str,
    detail: String,
    extra: Extra,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, kind: kind(status), detail: detail.into(), extra: Extra::default() }
    }

    /// A request that cannot be read.
    pub(super) fn bad(field: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail).field(field)
    }

    /// A request that can be read but makes no sense.
    pub(super) fn senseless(field: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail).field(field)
    }

    /// An answer that cannot be put into words.
    pub(super) fn unwritten(error: &serde_json::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer cannot be written: {error}"))
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// What is wrong, for people.
    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    pub(super) fn field(mut self, field: &str) -> Self {
        self.extra.field = Some(field.to_owned());
        self
    }
}

fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "bad-request",
        403 => "forbidden",
        404 => "not-found",
        405 => "method-not-allowed",
        409 => "conflict",
        412 => "precondition-failed",
        413 => "too-large",
        415 => "media-type",
        422 => "invalid",
        428 => "precondition-required",
        503 => "unavailable",
        504 => "timeout",
        _ => "internal",
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let retry = self.status == StatusCode::SERVICE_UNAVAILABLE;
        let problem = ProblemDetails::from_status_code(self.status)
            .with_detail(self.detail)
            .with_extensions(self.extra);
        let problem = match format!("/problems/{}", self.kind).parse::<axum::http::Uri>() {
            Ok(uri) => problem.with_type(uri),
            Err(_) => problem,
        };
        let mut response = problem.into_response();
        if retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<ProposeError> for Problem {
    fn from(error: ProposeError) -> Self {
        let detail = error.to_string();
        match error {
            ProposeError::NotLeader { leader } => not_leader(leader),
            ProposeError::Rejected(rejected) => rejected.into(),
            ProposeError::Timeout { .. } => Self::new(StatusCode::GATEWAY_TIMEOUT, detail),
            ProposeError::Forbidden { .. } => Self::new(StatusCode::FORBIDDEN, detail),
            ProposeError::Stopped(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, detail),
            ProposeError::Membership(_) => Self::new(StatusCode::CONFLICT, detail),
        }
    }
}

fn not_leader(leader: Option<NodeId>) -> Problem {
    let detail = match leader {
        Some(leader) => format!("this node does not lead: ask node {leader}, which does"),
        None => {
            "no leader is known: try again in a moment; if that does not help, see that a majority of the \
                 placement nodes runs"
                .to_owned()
        }
    };
    let mut problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail);
    problem.extra.leader = leader;
    problem
}

impl From<Rejected> for Problem {
    fn from(rejected: Rejected) -> Self {
        let (status, field) = judge(&rejected);
        let problem = Self::new(status, rejected.to_string());
        match field {
            Some(field) => problem.field(&field),
            None => problem,
        }
    }
}

/// Status and field: 404 for what is not there, 422 for values that are never right, 409 for what the present
/// state forbids.
fn judge(rejected: &Rejected) -> (StatusCode, Option<String>) {
    use Rejected as R;
    let named = |field: &str| Some(field.to_owned());
    match rejected {
        R::NoSite(_) | R::NoService(_) | R::NoGroup(_) | R::NoMove(_) => (StatusCode::NOT_FOUND, None),
        R::Length { field, .. }
        | R::Coordinate { field, .. }
        | R::Timeout { field, .. }
        | R::Count { field, .. } => (StatusCode::UNPROCESSABLE_ENTITY, Some(field.clone())),
        R::Nat(_) => (StatusCode::UNPROCESSABLE_ENTITY, named("nat")),
        R::Twice { .. } => (StatusCode::UNPROCESSABLE_ENTITY, named("groups")),
        R::GroupLen { .. } | R::TooManyGroups { .. } => {
            (StatusCode::UNPROCESSABLE_ENTITY, named("group_len"))
        }
        R::Policy(_) => (StatusCode::UNPROCESSABLE_ENTITY, None),
        R::ConfirmWithin { .. } => (StatusCode::UNPROCESSABLE_ENTITY, named("confirmWithin")),
        R::PolicyVersion { .. } => (StatusCode::PRECONDITION_FAILED, named("If-Match")),
        R::Fixed { field, .. } => (StatusCode::CONFLICT, Some(field.clone())),
        R::NameTaken { .. } => (StatusCode::CONFLICT, named("name")),
        R::Overlap { .. } => (StatusCode::CONFLICT, named("nat")),
        R::Budget { .. } => (StatusCode::CONFLICT, named("moves_in_flight_max")),
        R::NotParty { .. } => (StatusCode::FORBIDDEN, None),
        R::NoActiveSite
        | R::OwnsGroups { .. }
        | R::TakesPart { .. }
        | R::NamedByRule { .. }
        | R::OnlySite { .. }
        | R::Moving { .. }
        | R::Smallest { .. }
        | R::GroupsFull { .. }
        | R::AboveCut { .. }
        | R::TwoOwners { .. }
        | R::JustMoved { .. }
        | R::FinerRule { .. }
        | R::TargetClosed { .. }
        | R::SourceDead { .. }
        | R::SourceAlive { .. }
        | R::TargetAlive { .. }
        | R::Forbidden { .. }
        | R::SameDomain { .. }
        | R::NotOnTrial { .. }
        | R::Phase { .. }
        | R::Ended { .. }
        | R::TakenOver { .. } => (StatusCode::CONFLICT, None),
    }
}
