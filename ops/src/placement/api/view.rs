//! What the API shows: sites by name, groups as `SERVICE:PREFIX`. The names of these fields are kept stable,
//! whatever the replicated state calls its own.

use std::collections::BTreeMap;
use std::time::Duration;

use flow::SiteId;
use placement::core::delay::{Leg, Near, Part, Source, Term};
use placement::core::drain::{self, Progress, Wait};
use placement::core::explain::{Blocked, Candidate, Explanation};
use placement::core::{
    Admin, AuditEntry, Change, Cluster, FinishedMove, Group, Move, MoveOutcome, MovePhase, MoveReason,
    MoveSummary, Ordering, Service, Site,
};
use placement::node::Heard;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The name of a site; its number if nothing is known of it.
pub(super) fn site_name(cluster: &Cluster, id: SiteId) -> String {
    cluster.sites.get(&id).map_or_else(|| id.to_string(), |site| site.name.clone())
}

/// A site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SiteView {
    /// Its name, unique.
    pub name: String,
    /// Its number.
    pub id: u8,
    /// `active`, `cordoned` (keeps its groups, gets no more) or `draining` (is being emptied).
    #[schema(value_type = String)]
    pub admin: Admin,
    /// Whether its agent holds a lease.
    pub alive: bool,
    /// Where its agent listens (QUIC).
    pub endpoint: String,
    /// Packets per second that its workers carry.
    pub capacity_pps: u64,
    /// Flows that its workers hold; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_flows: Option<u64>,
    /// Bits per second that its links carry; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bps: Option<u64>,
    /// What may fail together with the other sites that name the same; a domain of its own if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_domain: Option<String>,
    /// Degrees north.
    pub latitude: Option<f64>,
    /// Degrees east.
    pub longitude: Option<f64>,
}

impl SiteView {
    pub(super) fn of(site: &Site) -> Self {
        Self {
            name: site.name.clone(),
            id: site.id.0,
            admin: site.admin,
            alive: site.alive,
            endpoint: site.endpoint.clone(),
            capacity_pps: site.capacity_pps,
            capacity_flows: site.capacity_flows,
            capacity_bps: site.capacity_bps,
            failure_domain: site.failure_domain.clone(),
            latitude: site.latitude,
            longitude: site.longitude,
        }
    }
}

/// A site with what is there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SiteStatus {
    /// The site.
    #[serde(flatten)]
    pub site: SiteView,
    /// Groups that it owns, those on their way elsewhere included.
    pub groups: u64,
    /// Moves in hand to it.
    pub moves_in: u64,
    /// Moves in hand from it.
    pub moves_out: u64,
    /// How far it is emptied, while it is drained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainView>,
    /// What is not as it should be, by what the site told the node that answered, and when. Empty when all is well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// How far a site is emptied. A group takes all its flows along, so none is left when no group is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainView {
    /// Groups that are still there and have to leave.
    pub left: u64,
    /// Of these, on their way.
    pub moving: u64,
    /// What the others wait for, most first.
    pub waits: Vec<WaitView>,
}

/// What groups of a drained site wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitView {
    /// What, and what would help.
    pub reason: String,
    /// How many groups.
    pub groups: u64,
    /// Whether they wait until the policy is changed: rules without an end forbid them every other site.
    #[serde(default)]
    pub forbidden: bool,
}

impl From<Progress> for DrainView {
    fn from(progress: Progress) -> Self {
        let wait = |Wait { reason, groups, forbidden }: Wait| WaitView { reason, groups, forbidden };
        Self {
            left: progress.left,
            moving: progress.moving,
            waits: progress.waits.into_iter().map(wait).collect(),
        }
    }
}

impl SiteStatus {
    /// All sites, in one pass over the groups.
    pub(super) fn all(cluster: &Cluster, heard: &BTreeMap<SiteId, Heard>) -> Vec<Self> {
        let mut owned: BTreeMap<SiteId, u64> = BTreeMap::new();
        for group in cluster.groups.values() {
            *owned.entry(group.owner).or_default() += 1;
        }
        let moves =
            |at: fn(&Move) -> SiteId, id| cluster.moves.values().filter(|m| at(m) == id).count() as u64;
        let status = |site: &Site| Self {
            site: SiteView::of(site),
            groups: owned.get(&site.id).copied().unwrap_or(0),
            moves_in: moves(|m| m.to, site.id),
            moves_out: moves(|m| m.from, site.id),
            drain: drain::progress(cluster, site.id).map(DrainView::from),
            problems: problems(site, owned.get(&site.id).copied().unwrap_or(0), heard.get(&site.id)),
        };
        cluster.sites.values().map(status).collect()
    }
}

/// A site reports twice a second; one that has not for so long is said to be silent.
const REPORT_AGE_MAX: Duration = Duration::from_millis(1_500);

fn problems(site: &Site, groups: u64, heard: Option<&Heard>) -> Vec<String> {
    let Some(heard) = heard else {
        // A site that was added and has not come yet is no fault. Nor is one with a lease: its reports may go to other nodes.
        let lost = (!site.alive && groups > 0).then(|| {
            format!("no report since this node started; its lease has ended, and it owns groups: {groups}")
        });
        return lost.into_iter().collect();
    };
    if heard.age > REPORT_AGE_MAX {
        let lease = if site.alive { "its lease still runs" } else { "its lease has ended" };
        let (age, most) = (heard.age.as_secs_f64(), REPORT_AGE_MAX.as_secs_f64());
        return vec![format!("no report for {age:.1} s ({most:.1} s allowed); {lease}")];
    }
    heard.problems.clone()
}

/// All sites.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sites {
    /// By number.
    pub sites: Vec<SiteStatus>,
}

/// All services.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Services {
    /// By number, each as it was put.
    #[schema(value_type = Vec<Object>)]
    pub services: Vec<Service>,
}

/// A group: one client prefix of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupView {
    /// `SERVICE:PREFIX`, for example `1:100.64.3.0/24`.
    pub group: String,
    /// The name of its service.
    pub service: String,
    /// The site that serves it; during a move the source, until the target serves.
    pub owner: String,
    /// The owner's fencing token.
    pub epoch: u64,
    /// The number of the move in hand.
    #[serde(rename = "move")]
    pub move_id: Option<u64>,
    /// The revision of the last change of owner or epoch.
    pub changed: u64,
    /// The site that is to get it when its owner is lost, if a rule wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
}

impl GroupView {
    pub(super) fn of(cluster: &Cluster, group: &Group) -> Self {
        let service = cluster.services.get(&group.id.service).map(|service| service.name.clone());
        Self {
            group: group.id.to_string(),
            service: service.unwrap_or_else(|| group.id.service.to_string()),
            owner: site_name(cluster, group.owner),
            epoch: group.epoch.0,
            move_id: group.move_id.map(|id| id.0),
            changed: group.changed,
            standby: group.standby.map(|site| site_name(cluster, site)),
        }
    }
}

/// A page of groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Groups {
    /// In order of service and prefix.
    pub groups: Vec<GroupView>,
    /// Give this as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveState {
    /// The source serves and copies; it can be aborted.
    Preparing,
    /// The ingresses flip.
    Switching,
    /// The target serves.
    Done,
    /// The source went on; nothing was switched.
    Aborted,
    /// The source serves again.
    TakenBack,
}

impl MoveState {
    /// Whether there is nothing more to come.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Aborted | Self::TakenBack)
    }

    /// As in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Switching => "switching",
            Self::Done => "done",
            Self::Aborted => "aborted",
            Self::TakenBack => "taken_back",
        }
    }
}

impl From<MovePhase> for MoveState {
    fn from(phase: MovePhase) -> Self {
        match phase {
            MovePhase::Preparing => Self::Preparing,
            MovePhase::Switching => Self::Switching,
        }
    }
}

impl From<&MoveOutcome> for MoveState {
    fn from(outcome: &MoveOutcome) -> Self {
        match outcome {
            MoveOutcome::Done => Self::Done,
            MoveOutcome::Aborted { .. } => Self::Aborted,
            MoveOutcome::TakenBack => Self::TakenBack,
        }
    }
}

/// A move, in hand or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveView {
    /// Its number.
    pub id: u64,
    /// Of what.
    pub group: String,
    /// The source.
    pub from: String,
    /// The target.
    pub to: String,
    /// How far it is.
    pub state: MoveState,
    /// Why: `operator`, `drain`, `delay` or `load`.
    #[schema(value_type = String)]
    pub reason: MoveReason,
    /// The target's epoch.
    pub epoch: u64,
    /// Whether packets of one flow may pass one another: `strict` or `relaxed`.
    #[schema(value_type = String)]
    pub ordering: Ordering,
    /// Sites that must flip; empty while preparing.
    pub ingresses: Vec<String>,
    /// Whether the source is dead and the target serves its shadow.
    pub take_over: bool,
    /// The revision of its start.
    pub started: u64,
    /// The revision of its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// When it ended, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    /// Why it was aborted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort_reason: Option<String>,
    /// What it took, of a move that is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub summary: Option<MoveSummary>,
}

impl MoveView {
    pub(super) fn present(cluster: &Cluster, present: &Move) -> Self {
        Self {
            id: present.id.0,
            group: present.group.to_string(),
            from: site_name(cluster, present.from),
            to: site_name(cluster, present.to),
            state: present.phase.into(),
            reason: present.reason,
            epoch: present.epoch.0,
            ordering: present.ordering,
            ingresses: present.ingresses.iter().map(|&site| site_name(cluster, site)).collect(),
            take_over: present.take_over,
            started: present.started,
            ended: None,
            ended_at_ms: None,
            abort_reason: None,
            summary: None,
        }
    }

    pub(super) fn finished(cluster: &Cluster, finished: &FinishedMove) -> Self {
        Self {
            state: (&finished.outcome).into(),
            ended: Some(finished.ended),
            ended_at_ms: Some(finished.at_ms),
            abort_reason: abort_reason(&finished.outcome),
            summary: finished.summary,
            ..Self::present(cluster, &finished.last)
        }
    }
}

fn abort_reason(outcome: &MoveOutcome) -> Option<String> {
    match outcome {
        MoveOutcome::Aborted { reason } => Some(reason.clone()),
        MoveOutcome::Done | MoveOutcome::TakenBack => None,
    }
}

/// Moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moves {
    /// Those in hand, then those that ended; newest first.
    pub moves: Vec<MoveView>,
}

/// What became of one wish to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartedMove {
    /// The group.
    pub group: String,
    /// The number of its move; null when the group is there already.
    #[serde(rename = "move")]
    pub move_id: Option<u64>,
}

/// What became of wishes to move, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartedMoves {
    /// One per wish.
    pub moves: Vec<StartedMove>,
}

/// A site for a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CandidateView {
    /// The site.
    pub site: String,
    /// Sum of the terms and of what rules add, in milliseconds.
    pub total_ms: f64,
    /// From the clients' ingress to the site.
    pub inside_ms: f64,
    /// Half of the way from the site to the servers and back over the outside ingress.
    pub outside_ms: f64,
    /// Waiting at the site.
    pub queue_ms: f64,
    /// What soft rules add, in milliseconds.
    pub rules_ms: f64,
    /// From the clients to their ingress; the same at every site.
    #[serde(default)]
    pub access_ms: f64,
    /// Standard deviation of the delay, in milliseconds.
    #[serde(default)]
    pub sd_ms: f64,
    /// What it has to promise beyond the owner since it is less surely known, in milliseconds.
    #[serde(default)]
    pub doubt_ms: f64,
    /// Each term, how sure it is and where it is known from.
    #[serde(default)]
    pub terms: Vec<TermView>,
    /// What its room is worth by the last round, in milliseconds of each packet; 0 where room is left.
    pub price_ms: f64,
    /// Load as a share of capacity with the group there.
    pub fill: f64,
    /// Why it cannot be chosen: `dead`, `cordoned`, `draining`, `full`, or `rule NAME`.
    pub blocked: Option<String>,
    /// Where the delays are known from, clients' ingresses first.
    pub legs: Vec<LegView>,
}

/// A delay between the site and where packets come in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LegView {
    /// Where they come in.
    pub ingress: String,
    /// One way, in milliseconds.
    pub ms: f64,
    /// Standard deviation, in milliseconds.
    #[serde(default)]
    pub sd_ms: f64,
    /// `same` site, `measured` between the sites, `geography` by coordinates, or `unknown`.
    pub source: String,
    /// How old a measurement is, in seconds.
    pub age_s: Option<f64>,
}

/// A term of a group's delay at a site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TermView {
    /// `access` (clients to their ingress), `inside` (ingress to site), `server` (site to servers), `return` (servers over the outside
    /// ingress to the site) or `queue` (waiting at the site). Server and return count half.
    pub term: String,
    /// One way, in milliseconds.
    pub ms: f64,
    /// Standard deviation, in milliseconds.
    pub sd_ms: f64,
    /// Of the least sure way in it: `same` site, `measured`, `borrowed from NEIGHBOUR` (its `ingress`, `likeness`, `prefix`,
    /// `network` or `distance`), `geography`, `assumed` at its ingress, or `unknown`.
    pub source: String,
    /// How old a measurement is, in seconds.
    pub age_s: Option<f64>,
}

impl TermView {
    fn of(term: &Term) -> Self {
        let name = match term.part {
            Part::Access => "access",
            Part::Inside => "inside",
            Part::Server => "server",
            Part::Return => "return",
            Part::Queue => "queue",
        };
        let (source, age_s) = source(term.leg.source);
        Self { term: name.to_owned(), ms: term.leg.ms, sd_ms: term.leg.sd_ms, source, age_s }
    }
}

/// The name of a source, and its age in seconds.
fn source(source: Source) -> (String, Option<f64>) {
    let name = match source {
        Source::Same => "same",
        Source::Measured { .. } => "measured",
        Source::Borrowed { from: Near::Ingress, .. } => "borrowed from ingress",
        Source::Borrowed { from: Near::Likeness, .. } => "borrowed from likeness",
        Source::Borrowed { from: Near::Prefix, .. } => "borrowed from prefix",
        Source::Borrowed { from: Near::Network, .. } => "borrowed from network",
        Source::Borrowed { from: Near::Distance, .. } => "borrowed from distance",
        Source::Geography => "geography",
        Source::Assumed => "assumed",
        Source::Unknown => "unknown",
    };
    (name.to_owned(), source.age().map(|age| age.0 as f64 / 1e6))
}

impl LegView {
    fn of(cluster: &Cluster, (site, leg): &(SiteId, Leg)) -> Self {
        let (source, age_s) = source(leg.source);
        Self { ingress: site_name(cluster, *site), ms: leg.ms, sd_ms: leg.sd_ms, source, age_s }
    }
}

impl CandidateView {
    fn of(cluster: &Cluster, candidate: &Candidate) -> Self {
        Self {
            site: site_name(cluster, candidate.site),
            total_ms: candidate.total_ms,
            inside_ms: candidate.terms.inside_ms,
            outside_ms: candidate.terms.outside_ms,
            queue_ms: candidate.terms.queue_ms,
            rules_ms: candidate.rules_ms,
            access_ms: candidate.terms.access_ms,
            sd_ms: candidate.terms.sd_ms,
            doubt_ms: candidate.doubt_ms,
            terms: candidate.terms.parts.iter().map(TermView::of).collect(),
            price_ms: candidate.price_ms,
            legs: candidate.terms.legs.iter().map(|leg| LegView::of(cluster, leg)).collect(),
            fill: candidate.fill,
            blocked: candidate.blocked.as_ref().map(blocked_name),
        }
    }
}

fn blocked_name(blocked: &Blocked) -> String {
    match blocked {
        Blocked::Dead => "dead".to_owned(),
        Blocked::Cordoned => "cordoned".to_owned(),
        Blocked::Draining => "draining".to_owned(),
        Blocked::Rule(rule) => format!("rule {rule}"),
        Blocked::Full => "full".to_owned(),
    }
}

/// Why a group is where it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplanationView {
    /// The group.
    pub group: String,
    /// Its owner.
    pub owner: String,
    /// The site that is to get it when its owner is lost, if a rule wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// The best site that it could have.
    pub best: Option<String>,
    /// The one after it.
    pub runner_up: Option<String>,
    /// By how many milliseconds the runner-up is worse.
    pub runner_up_ms: Option<f64>,
    /// The rules that speak of the group, by name.
    pub rules: Vec<String>,
    /// What moving there would gain, in milliseconds.
    pub gain_ms: f64,
    /// The gain that the policy demands.
    pub min_gain_ms: f64,
    /// Packets per second, if its traffic is known.
    pub packets_per_s: Option<f64>,
    /// Flows, if its traffic is known.
    pub flows: Option<u64>,
    /// All sites, best first.
    pub candidates: Vec<CandidateView>,
    /// How many ways were measured for the first time after they had been estimated, by this leader.
    #[serde(default)]
    pub estimates_tested: u64,
    /// Of these, how many lay within two standard deviations of the estimate: 95 of 100 if those are honest.
    #[serde(default)]
    pub estimates_held: u64,
}

impl ExplanationView {
    pub(super) fn of(cluster: &Cluster, explanation: &Explanation) -> Self {
        let candidates = explanation.candidates.iter();
        Self {
            group: explanation.group.to_string(),
            owner: site_name(cluster, explanation.owner),
            standby: explanation.standby.map(|site| site_name(cluster, site)),
            best: explanation.best.map(|best| site_name(cluster, best)),
            runner_up: explanation.runner_up.map(|(site, _)| site_name(cluster, site)),
            runner_up_ms: explanation.runner_up.map(|(_, ms)| ms),
            rules: explanation.rules.clone(),
            gain_ms: explanation.gain_ms,
            min_gain_ms: explanation.min_gain_ms,
            packets_per_s: explanation.demand.as_ref().map(|demand| demand.packets_per_s),
            flows: explanation.demand.as_ref().map(|demand| demand.flows),
            candidates: candidates.map(|candidate| CandidateView::of(cluster, candidate)).collect(),
            estimates_tested: explanation.tested.tested,
            estimates_held: explanation.tested.held,
        }
    }
}

/// One thing that is different now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeView {
    /// A site as it is now.
    Site(SiteView),
    /// A site was removed. Nothing names it.
    SiteGone {
        /// Its number; another site may get it.
        id: u8,
    },
    /// A service as it is now.
    Service(Service),
    /// A group as it is now.
    Group(GroupView),
    /// A move as it is now.
    Move(MoveView),
    /// A move is over.
    MoveEnded {
        /// Which.
        id: u64,
        /// Of what.
        group: String,
        /// How.
        state: MoveState,
        /// Why it was aborted.
        abort_reason: Option<String>,
    },
    /// A group was split or merged: what took its place follows.
    GroupGone {
        /// Which, as `SERVICE:PREFIX`.
        group: String,
    },
    /// The policy as it is now.
    Policy {
        /// What it says.
        policy: placement::core::Policy,
        /// Its number, as in its ETag.
        version: u64,
    },
}

impl ChangeView {
    pub(super) fn of(cluster: &Cluster, change: Change) -> Self {
        match change {
            Change::Site(site) => Self::Site(SiteView::of(&site)),
            Change::SiteGone(id) => Self::SiteGone { id: id.0 },
            Change::Service(service) => Self::Service(service),
            Change::Group(group) => Self::Group(GroupView::of(cluster, &group)),
            Change::GroupGone(id) => Self::GroupGone { group: id.to_string() },
            Change::Move(present) => Self::Move(MoveView::present(cluster, &present)),
            Change::MoveEnded { id, group, outcome } => Self::MoveEnded {
                id: id.0,
                group: group.to_string(),
                state: (&outcome).into(),
                abort_reason: abort_reason(&outcome),
            },
            Change::Policy { policy, version } => Self::Policy { policy, version },
        }
    }
}

/// Changes after a revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangesView {
    /// Give this as `since` next, if there is no `next`.
    pub revision: u64,
    /// They are all there is, with what `next` leads to: forget what is not among them.
    pub reset: bool,
    /// In order.
    #[schema(value_type = Vec<Object>)]
    pub changes: Vec<ChangeView>,
    /// More of all there is: give this as `cursor` next. Groups that have changed meanwhile come as they are now, and
    /// again with the changes since `revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Who did what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Audit {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    pub entries: Vec<AuditEntry>,
}
