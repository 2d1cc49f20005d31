//! How far the placement is from the best.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use placement::core::assess::{Assessment, Shortage, SiteAssessment};
use placement::core::delay::Misplaced;
use placement::core::witness::Finding;
use placement::core::{Cluster, Round, SitePrices};
use placement::node::AssessError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::extract::{Answer, Consistency, Params, ReadParams};
use super::problem::{Problem, ProblemBody};
use super::view::site_name;

/// How far the present placement is from the best, by the delay model. Delays are means over packets, one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AssessmentView {
    /// Groups with known traffic that some site may have; the others weigh nothing.
    pub groups: usize,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Delay of the present placement. With `rules_ms` it may be below the bound while sites carry more than their room.
    pub delay_ms: f64,
    /// What prices of rules add to it.
    #[serde(default)]
    pub rules_ms: f64,
    /// Delay of the best placement that was found, where delay and prices together are least.
    pub best_ms: f64,
    /// What prices of rules add to that.
    #[serde(default)]
    pub best_rules_ms: f64,
    /// No placement within the capacities has less, delay and prices together.
    pub bound_ms: f64,
    /// The same with each group at its best site, without capacities.
    pub unconstrained_ms: f64,
    /// What light would take straight from where packets come in to where they go out; 0 without coordinates.
    pub light_ms: f64,
    /// By how much `best_ms` and `best_rules_ms` together may be above the best there is, as a share; nothing when it exceeds capacities.
    pub gap: Option<f64>,
    /// Groups that are elsewhere in the best placement.
    pub moves: usize,
    /// Groups with known traffic that no site may have.
    pub stranded: usize,
    /// All sites.
    pub sites: Vec<SiteAssessmentView>,
    /// Proofs that demand does not fit.
    pub shortages: Vec<ShortageView>,
    /// Sites that seem not to be where their configuration says.
    #[serde(default)]
    pub misplaced: Vec<MisplacedView>,
}

/// A site that seems not to be where its latitude and longitude say. Round trips, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MisplacedView {
    /// Its name.
    pub site: String,
    /// The other end of the way that contradicts most.
    pub peer: String,
    /// Whether it may as well be the peer whose position is wrong.
    pub or_peer: bool,
    /// Measured between the two.
    pub measured_ms: f64,
    /// Usual for their distance.
    pub usual_ms: f64,
    /// What light needs for it.
    pub least_ms: f64,
    /// The same in words.
    pub what: String,
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
    /// Its capacity less the headroom; or what it carries now, where that is more and within the capacity.
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
            rules_ms: assessment.rules_ms,
            best_ms: assessment.best_ms,
            best_rules_ms: assessment.best_rules_ms,
            bound_ms: assessment.bound_ms,
            unconstrained_ms: assessment.unconstrained_ms,
            light_ms: assessment.light_ms,
            gap: assessment.gap,
            moves: assessment.moves,
            stranded: assessment.stranded,
            sites: assessment.sites.iter().map(site).collect(),
            shortages: assessment.shortages.iter().map(shortage).collect(),
            misplaced: assessment.misplaced.iter().map(|one| MisplacedView::of(cluster, one)).collect(),
        }
    }
}

impl MisplacedView {
    fn of(cluster: &Cluster, misplaced: &Misplaced) -> Self {
        let Misplaced { site, peer, measured_ms, usual_ms, least_ms, or_peer } = *misplaced;
        let (site, peer) = (site_name(cluster, site), site_name(cluster, peer));
        let what = misplaced.describe(&cluster.sites);
        Self { site, peer, or_peer, measured_ms, usual_ms, least_ms, what }
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

/// What the last published round of the solver brought. Delays are means over packets, one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RoundView {
    /// The policy that it followed.
    pub policy_version: u64,
    /// Groups that it placed.
    pub groups: u64,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// At the owners of that time.
    pub delay_ms: f64,
    /// As planned.
    pub planned_ms: f64,
    /// As planned, with what the moves are charged.
    pub objective_ms: f64,
    /// No placement within the capacities has a smaller objective.
    pub bound_ms: f64,
    /// The objective without capacities.
    pub unconstrained_ms: f64,
    /// What light would take straight from where packets come in to where they go out.
    pub light_ms: f64,
    /// By how much the objective may be above the best, as a share; nothing when capacities are exceeded.
    pub gap: Option<f64>,
    /// Groups that should be elsewhere.
    pub moves: u64,
    /// Moves that were started at once.
    pub started: u64,
    /// Groups whose place was looked for anew: all, or only those that differed from what the leader knew of them.
    #[serde(default)]
    pub touched: u64,
    /// Groups that no site may have.
    pub stranded: u64,
    /// Groups that are to have a standby and have none: nowhere is room for them when their failure domain is lost.
    #[serde(default)]
    pub unprotected: u64,
    /// Moves of the last hour, for delay or load, that brought a group back to where it had been within an hour before; since the leader
    /// leads.
    #[serde(default)]
    pub vain: u64,
    /// Sites that would carry more than their room.
    pub exceeded: Vec<String>,
    /// What more room is worth.
    pub prices: Vec<PricesView>,
    /// Time that the leader took, in microseconds.
    pub solve_us: u64,
    /// When, in milliseconds since 1970, by the leader's clock.
    pub at_ms: u64,
    /// What the answering node found when it checked the round by what it knows itself; nothing on the leader, and before
    /// there was time for it.
    #[serde(default)]
    pub check: Option<CheckView>,
}

/// A round, checked by another node than that which published it. Delays are means over packets, one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckView {
    /// Whether the figures agree within a tenth.
    pub agrees: bool,
    /// Largest difference of a figure, as a share.
    pub deviation: f64,
    /// Packets per second that the node knows of.
    pub packets_per_s: f64,
    /// The bound that the leader's prices give.
    pub bound_ms: f64,
    /// At the present owners.
    pub delay_ms: f64,
}

impl CheckView {
    fn of(finding: &Finding) -> Self {
        Self {
            agrees: finding.agrees(),
            deviation: finding.deviation(),
            packets_per_s: finding.packets_per_s.0,
            bound_ms: finding.bound_ms.0,
            delay_ms: finding.delay_ms.0,
        }
    }
}

/// What more room is worth at a site: milliseconds x packets per second that are saved by one more of a resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PricesView {
    /// Its name.
    pub site: String,
    /// Whether it took groups.
    pub open: bool,
    /// Of one packet per second.
    pub packets: f64,
    /// Of one flow.
    pub flows: f64,
    /// Of one bit per second.
    pub bits: f64,
}

impl RoundView {
    fn of(cluster: &Cluster, round: &Round) -> Self {
        let prices = |price: &SitePrices| PricesView {
            site: site_name(cluster, price.site),
            open: price.open,
            packets: price.packets,
            flows: price.flows,
            bits: price.bits,
        };
        Self {
            policy_version: round.policy_version,
            groups: round.groups,
            packets_per_s: round.packets_per_s,
            delay_ms: round.delay_ms,
            planned_ms: round.planned_ms,
            objective_ms: round.objective_ms,
            bound_ms: round.bound_ms,
            unconstrained_ms: round.unconstrained_ms,
            light_ms: round.light_ms,
            gap: round.gap,
            moves: round.moves,
            started: round.started,
            touched: round.touched,
            stranded: round.stranded,
            unprotected: round.unprotected,
            vain: round.vain,
            exceeded: round.exceeded.iter().map(|&site| site_name(cluster, site)).collect(),
            prices: round.prices.iter().map(prices).collect(),
            solve_us: round.solve_us,
            at_ms: round.at_ms,
            check: None,
        }
    }
}

/// The last round of the solver that the leader published: what was planned, what proves it, and the prices that the next
/// leader begins with. Every node knows it.
#[utoipa::path(get, path = "/v1/placement/round", tag = "groups",
    params(("consistency" = Option<Consistency>, Query, description = "`stale` if not given")),
    responses((status = 200, body = RoundView), (status = 404, body = ProblemBody),
        (status = 503, body = ProblemBody)))]
pub(super) async fn round(
    State(api): State<Arc<Api>>,
    Params(params): Params<ReadParams>,
) -> Result<Answer<RoundView>, Problem> {
    let cluster = api.read(params.consistency, Consistency::Stale).await?;
    let none =
        || Problem::not_found("no round was published yet: a leader does so once sites report".to_owned());
    let round = cluster.round.as_ref().ok_or_else(none)?;
    let finding = api.node.finding().filter(|finding| finding.at_ms == round.at_ms);
    let check = finding.as_ref().map(CheckView::of);
    Ok(Answer::ok(cluster.revision, RoundView { check, ..RoundView::of(&cluster, round) }))
}
