//! How far the placement is from the best.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use placement::core::Cluster;
use placement::core::assess::{Assessment, Shortage, SiteAssessment};
use placement::node::AssessError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::extract::Answer;
use super::problem::{Problem, ProblemBody};
use super::view::site_name;

/// How far the present placement is from the best, by the delay model. Delays are means over packets, one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AssessmentView {
    /// Groups with known traffic that some site may have; the others weigh nothing.
    pub groups: usize,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Of the present placement. It may be below the bound while sites carry more than their room.
    pub delay_ms: f64,
    /// Of the best placement that was found.
    pub best_ms: f64,
    /// No placement within the capacities has less.
    pub bound_ms: f64,
    /// Each group at its nearest site, without capacities.
    pub unconstrained_ms: f64,
    /// What light would take straight from where packets come in to where they go out; 0 without coordinates.
    pub light_ms: f64,
    /// By how much `best_ms` may be above the best there is, as a share; nothing when it exceeds capacities.
    pub gap: Option<f64>,
    /// Groups that are elsewhere in the best placement.
    pub moves: usize,
    /// Groups with known traffic that no site may have.
    pub stranded: usize,
    /// All sites.
    pub sites: Vec<SiteAssessmentView>,
    /// Proofs that demand does not fit.
    pub shortages: Vec<ShortageView>,
}

/// One site now and in the best placement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SiteAssessmentView {
    /// Its name.
    pub site: String,
    /// What it carries now.
    pub packets_per_s: f64,
    /// What it carries in the best placement.
    pub best_packets_per_s: f64,
    /// Its capacity less the headroom.
    pub room_packets_per_s: f64,
    /// Milliseconds of one packet that are saved per packet of capacity added here: where to build next.
    pub price_ms: f64,
}

/// Sites whose room does not suffice for the groups that can only be there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ShortageView {
    /// Their names.
    pub sites: Vec<String>,
    /// The groups.
    pub groups: Vec<String>,
}

impl AssessmentView {
    fn of(cluster: &Cluster, assessment: Assessment) -> Self {
        let site = |site: &SiteAssessment| SiteAssessmentView {
            site: site_name(cluster, site.site),
            packets_per_s: site.packets_per_s,
            best_packets_per_s: site.best_packets_per_s,
            room_packets_per_s: site.room_packets_per_s,
            price_ms: site.price_ms,
        };
        let shortage = |shortage: &Shortage| ShortageView {
            sites: shortage.sites.iter().map(|&site| site_name(cluster, site)).collect(),
            groups: shortage.groups.iter().map(ToString::to_string).collect(),
        };
        Self {
            groups: assessment.groups,
            packets_per_s: assessment.packets_per_s,
            delay_ms: assessment.delay_ms,
            best_ms: assessment.best_ms,
            bound_ms: assessment.bound_ms,
            unconstrained_ms: assessment.unconstrained_ms,
            light_ms: assessment.light_ms,
            gap: assessment.gap,
            moves: assessment.moves,
            stranded: assessment.stranded,
            sites: assessment.sites.iter().map(site).collect(),
            shortages: assessment.shortages.iter().map(shortage).collect(),
        }
    }
}

impl From<AssessError> for Problem {
    fn from(error: AssessError) -> Self {
        match error {
            AssessError::Node(error) => error.into(),
            AssessError::Instance(error) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

/// How far the present placement is from the best, with a bound that proves it and the price of each site's capacity. Only
/// the leader knows.
#[utoipa::path(get, path = "/v1/placement", tag = "groups",
    responses((status = 200, body = AssessmentView), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn assess(State(api): State<Arc<Api>>) -> Result<Answer<AssessmentView>, Problem> {
    let cluster = api.node.cluster();
    let none = || Problem::not_found("there are no sites: add one first".to_owned());
    let assessment = api.node.assess().await?.ok_or_else(none)?;
    Ok(Answer::ok(cluster.revision, AssessmentView::of(&cluster, assessment)))
}
