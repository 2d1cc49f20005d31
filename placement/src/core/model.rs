//! What is replicated: sites, services, groups, moves, policy, and what happened lately.
//!
//! Everything here is plain data in deterministic order. JSON shows maps as lists of their values.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use flow::nat::NatSpec;
use flow::{Epoch, GroupId, HoldTimes, MoveId, Prefix, ServiceId, SiteId};
use serde::{Deserialize, Serialize};

use super::policy::Policy;
use crate::solver::PerResource;

/// Finished moves that are remembered: so long a repeated command finds its outcome.
pub const FINISHED_LEN_MAX: usize = 1024;
/// Policies that are kept, so that one can go back to them.
pub const POLICIES_LEN_MAX: usize = 16;
/// Placement nodes that are remembered when they are removed: far more than a group ever has. The lowest numbers are forgotten
/// first, which are the oldest where numbers are given in order.
pub const REMOVED_NODES_LEN_MAX: usize = 1024;
/// Audit entries that are kept.
pub const AUDIT_LEN_MAX: usize = 1024;

/// The replicated state. Changed only by [`Cluster::apply`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The log index of the last command that changed anything.
    pub revision: u64,
    /// All sites.
    #[serde(with = "values")]
    pub sites: BTreeMap<SiteId, Site>,
    /// All services.
    #[serde(with = "values")]
    pub services: BTreeMap<ServiceId, Service>,
    /// All groups: the leaves of the services' client prefixes.
    #[serde(with = "values")]
    pub groups: BTreeMap<GroupId, Group>,
    /// Moves that have not ended.
    #[serde(with = "values")]
    pub moves: BTreeMap<MoveId, Move>,
    /// What the operator wants of the solver.
    pub policy: Policy,
    /// Grows by one with each new policy.
    pub policy_version: u64,
    /// Policies that were in force, oldest first, the present one among them; at most [`POLICIES_LEN_MAX`].
    #[serde(default)]
    pub policies: VecDeque<PolicyRevision>,
    /// The present policy is on trial.
    #[serde(default)]
    pub trial: Option<Trial>,
    /// Who did what, oldest first; at most [`AUDIT_LEN_MAX`].
    pub audit: VecDeque<AuditEntry>,
    /// Moves that ended, oldest first; at most [`FINISHED_LEN_MAX`].
    pub finished: VecDeque<FinishedMove>,
    /// The last round that the leader published. Not a change for watchers: nothing follows from it.
    #[serde(default)]
    pub round: Option<Round>,
    /// Placement nodes that were members of the Raft group and are none any more; at most [`REMOVED_NODES_LEN_MAX`]. Not a
    /// change for watchers.
    #[serde(default)]
    pub removed_nodes: BTreeSet<u64>,
}

/// A policy that was in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRevision {
    /// Its number.
    pub version: u64,
    /// What it said.
    pub policy: Policy,
    /// Who brought it.
    pub actor: String,
    /// When, in milliseconds since 1970, by the proposer's clock.
    pub at_ms: u64,
}

/// A policy that is taken back unless somebody confirms it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number.
    pub version: u64,
    /// Until when, in milliseconds since 1970, by the leader's clock.
    pub until_ms: u64,
    /// What returns: the last that was not on trial.
    pub former: Box<Policy>,
}

/// What a round of the solver brought: delays as means over packets, one way, in milliseconds. A few kilobytes, however many
/// groups there are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Round {
    /// The policy that it followed.
    pub policy_version: u64,
    /// Groups that it placed.
    pub groups: u64,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// At the present owners.
    pub delay_ms: f64,
    /// As planned.
    pub planned_ms: f64,
    /// As planned, with what the moves are charged.
    pub objective_ms: f64,
    /// No placement within the capacities has a smaller objective.
    pub bound_ms: f64,
    /// What the prices alone prove of it, which followers check them by; leaders of earlier releases do not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priced_ms: Option<f64>,
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
    pub touched: u64,
    /// Groups that no site may have.
    pub stranded: u64,
    /// Groups that are to have a standby and have none: nowhere is room for them when their failure domain is lost.
    pub unprotected: u64,
    /// Moves of the last hour, for delay or load, that brought a group back to where it had been within an hour before; since the leader
    /// leads.
    pub vain: u64,
    /// Sites that would carry more than their room.
    pub exceeded: Vec<SiteId>,
    /// What one more group in a place would save, by `spread` rule and place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub spread_prices: Vec<Vec<f64>>,
    /// What more room is worth, by site.
    pub prices: Vec<SitePrices>,
    /// Time that the leader took, in microseconds.
    pub solve_us: u64,
    /// When, in milliseconds since 1970, by the leader's clock.
    pub at_ms: u64,
}

impl Round {
    /// Leaves out what is said of other sites.
    pub(super) fn keep_sites(&mut self, known: impl Fn(SiteId) -> bool) {
        self.exceeded.retain(|site| known(*site));
        self.prices.retain(|prices| known(prices.site));
    }

    /// Whether it is worth a place in the log beside the last one: something moves, what binds is different, or a number
    /// is by more than a twentieth.
    #[must_use]
    pub fn tells_more(&self, last: Option<&Self>) -> bool {
        let Some(last) = last else { return true };
        let differs = |a: f64, b: f64| (a - b).abs() > 0.05 * a.abs().max(b.abs()) + 1e-6;
        let price = |(a, b): (&SitePrices, &SitePrices)| {
            a.site != b.site
                || a.open != b.open
                || a.values().iter().zip(b.values()).any(|(&a, b)| differs(a, b))
        };
        self.started > 0
            || (
                self.policy_version,
                self.stranded,
                self.unprotected,
                self.vain,
                &self.exceeded,
                self.gap.is_some(),
            ) != (
                last.policy_version,
                last.stranded,
                last.unprotected,
                last.vain,
                &last.exceeded,
                last.gap.is_some(),
            )
            || differs(self.delay_ms, last.delay_ms)
            || differs(self.packets_per_s, last.packets_per_s)
            || self.prices.len() != last.prices.len()
            || self.prices.iter().zip(&last.prices).any(price)
    }
}

/// What more room is worth at a site: milliseconds x packets per second that are saved by one more of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SitePrices {
    /// The site.
    pub site: SiteId,
    /// Whether it took groups.
    pub open: bool,
    /// Of one packet per second.
    pub packets: f64,
    /// Of one flow.
    pub flows: f64,
    /// Of one bit per second.
    pub bits: f64,
}

impl SitePrices {
    /// In the order of the solver.
    #[must_use]
    pub fn values(&self) -> PerResource<f64> {
        [self.packets, self.flows, self.bits]
    }
}

/// What an operator says of a site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteSpec {
    /// Its number.
    pub id: SiteId,
    /// Its name, unique.
    pub name: String,
    /// Degrees north, -90 to 90.
    #[serde(default)]
    pub latitude: Option<f64>,
    /// Degrees east, -180 to 180.
    #[serde(default)]
    pub longitude: Option<f64>,
    /// Where its agent listens (QUIC), `HOST:PORT`.
    pub endpoint: String,
    /// Packets per second that its workers carry.
    pub capacity_pps: u64,
    /// Flows that its workers hold; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_flows: Option<u64>,
    /// Bits per second that its links carry; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bps: Option<u64>,
    /// What may fail together with the other sites that name the same, such as a metro or a power feed; a domain of its own
    /// if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_domain: Option<String>,
}

/// A point of presence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Site {
    /// Its number.
    pub id: SiteId,
    /// Its name, unique.
    pub name: String,
    /// Degrees north.
    pub latitude: Option<f64>,
    /// Degrees east.
    pub longitude: Option<f64>,
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
    /// What may fail together with the other sites that name the same, such as a metro or a power feed; a domain of its own
    /// if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_domain: Option<String>,
    /// What the operator allows.
    pub admin: Admin,
    /// Whether its agent holds a lease. False until the first report.
    pub alive: bool,
}

impl Site {
    /// Whether groups may be moved here.
    #[must_use]
    pub fn takes_groups(&self) -> bool {
        self.alive && self.admin == Admin::Active
    }

    /// What may fail with it: the name that others may share, or its own number.
    #[must_use]
    pub fn domain(&self) -> Domain<'_> {
        self.failure_domain.as_deref().map_or(Domain::Own(self.id), Domain::Named)
    }

    /// Latitude and longitude, if both are known.
    #[must_use]
    pub fn coordinates(&self) -> Option<(f64, f64)> {
        self.latitude.zip(self.longitude)
    }
}

/// What fails together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Domain<'a> {
    /// The sites that name it.
    Named(&'a str),
    /// One site.
    Own(SiteId),
}

/// What the operator allows a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Admin {
    /// Everything.
    #[default]
    Active,
    /// Keeps its groups, gets no more.
    Cordoned,
    /// Is being emptied.
    Draining,
}

/// Whether packets of one flow may pass one another during a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// Never.
    #[default]
    Strict,
    /// They may; whoever has an outside port does not wait.
    Relaxed,
}

/// A network function with its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its number.
    pub id: ServiceId,
    /// Its name, unique.
    pub name: String,
    /// Clients, pool and port blocks. Fixed once the service exists.
    pub nat: NatSpec,
    /// Idle timeouts.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Order of packets during moves.
    #[serde(default)]
    pub ordering: Ordering,
    /// Client prefixes are cut into groups of this length; a longer one is a group by itself. Fixed.
    pub group_len: u8,
}

/// Idle timeouts in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// UDP. At least 120; 300 recommended (RFC 4787, REQ-5).
    pub udp_s: u32,
    /// TCP established. At least 7,440 (RFC 5382, REQ-5).
    pub tcp_established_s: u32,
    /// TCP half-open or closing. At least 240 (RFC 5382, REQ-5).
    pub tcp_transitory_s: u32,
    /// ICMP echo. At least 60 (RFC 5508, REQ-2).
    pub icmp_s: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { udp_s: 300, tcp_established_s: 7_440, tcp_transitory_s: 240, icmp_s: 60 }
    }
}

/// The unit of placement. Its owner is the one decider under its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Which.
    pub id: GroupId,
    /// The site that serves it; during a move the source, until the target reports that it serves.
    pub owner: SiteId,
    /// The owner's fencing token. Starts at 1.
    pub epoch: Epoch,
    /// The move in hand.
    pub move_id: Option<MoveId>,
    /// The revision of the last change of owner or epoch.
    pub changed: u64,
    /// The site that is to get it when its owner is lost: in another failure domain, with room kept for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<SiteId>,
}

/// A move that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Which.
    pub id: MoveId,
    /// Of what.
    pub group: GroupId,
    /// The source.
    pub from: SiteId,
    /// The target.
    pub to: SiteId,
    /// The target's epoch.
    pub epoch: Epoch,
    /// How far it is committed.
    pub phase: MovePhase,
    /// Order of packets.
    pub ordering: Ordering,
    /// The sites that must flip; empty while preparing, fixed when switching is committed.
    pub ingresses: Vec<SiteId>,
    /// When they flip; nothing while preparing.
    #[serde(default)]
    pub flip: Option<Flip>,
    /// The source is dead: the target serves its shadow.
    pub take_over: bool,
    /// Why.
    pub reason: MoveReason,
    /// The revision of its intent.
    pub started: u64,
}

/// When the ingresses flip. Clocks that differ cost a longer hold, nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flip {
    /// By the wall clock, in milliseconds since 1970.
    pub at_ms: u64,
    /// How long after the commit that is: nobody waits for longer, whatever its clock says.
    pub lead_ms: u32,
}

/// How far a move is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MovePhase {
    /// The source serves and copies; every failure goes back.
    Preparing,
    /// The ingresses flip; every failure goes forward, unless taken back with proof.
    Switching,
}

/// Why a group moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MoveReason {
    /// An operator said so.
    Operator,
    /// Its owner is being drained.
    Drain,
    /// Another site is nearer.
    Delay,
    /// Its owner has more load than capacity.
    Load,
}

/// What the target reports of a move that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoveSummary {
    /// Flows moved.
    pub flows: u64,
    /// Bytes sent.
    pub bytes_on_wire: u64,
    /// The same before coding.
    pub bytes_raw: u64,
    /// Time of the copy before the flip, in microseconds.
    pub precopy_us: u64,
    /// How long packets were held.
    pub hold: HoldTimes,
    /// Copy rounds.
    pub rounds: u32,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveOutcome {
    /// The target serves.
    Done,
    /// The source went on; nothing was switched.
    Aborted {
        /// Why, for people.
        reason: String,
    },
    /// The source serves again under an epoch above the target's.
    TakenBack,
}

/// A move that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishedMove {
    /// As it was at the end.
    #[serde(rename = "move")]
    pub last: Move,
    /// How it ended.
    pub outcome: MoveOutcome,
    /// Of a move that succeeded.
    pub summary: Option<MoveSummary>,
    /// The revision of the end.
    pub ended: u64,
    /// When its end was proposed, in milliseconds since 1970, by the proposer's clock.
    pub at_ms: u64,
}

/// One command that took effect or was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Its log index.
    pub index: u64,
    /// When it was proposed, in milliseconds since 1970, by the proposer's clock.
    pub at_ms: u64,
    /// Who proposed it.
    pub actor: String,
    /// The command, in short.
    pub action: String,
    /// Why it was refused, if it was.
    pub refused: Option<String>,
}

/// One thing that is different now. Watchers replace what they have by what it says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A site as it is now.
    Site(Site),
    /// A site is no more. Nothing names it.
    SiteGone(SiteId),
    /// A service as it is now.
    Service(Service),
    /// A group as it is now.
    Group(Group),
    /// A group is no more: it was split or merged. What took its place follows.
    GroupGone(GroupId),
    /// A move as it is now.
    Move(Move),
    /// A move is over.
    MoveEnded {
        /// Which.
        id: MoveId,
        /// Of what.
        group: GroupId,
        /// How.
        outcome: MoveOutcome,
    },
    /// The policy as it is now.
    Policy {
        /// What it says.
        policy: Policy,
        /// Its number.
        version: u64,
    },
}

impl Cluster {
    /// A copy without the groups, which are most of it.
    #[must_use]
    pub fn without_groups(&self) -> Self {
        Self {
            revision: self.revision,
            sites: self.sites.clone(),
            services: self.services.clone(),
            groups: BTreeMap::new(),
            moves: self.moves.clone(),
            policy: self.policy.clone(),
            policy_version: self.policy_version,
            policies: self.policies.clone(),
            trial: self.trial.clone(),
            audit: self.audit.clone(),
            finished: self.finished.clone(),
            round: self.round.clone(),
            removed_nodes: self.removed_nodes.clone(),
        }
    }

    /// The members of the Raft group were these, and are those now.
    pub(crate) fn note_members(&mut self, before: &BTreeSet<u64>, now: &BTreeSet<u64>) {
        self.removed_nodes.extend(before.difference(now));
        self.removed_nodes.retain(|id| !now.contains(id));
        while self.removed_nodes.len() > REMOVED_NODES_LEN_MAX {
            self.removed_nodes.pop_first();
        }
    }

    /// All there is, as changes: for watchers that start from nothing. Groups come after the sites and
    /// services that they name, moves last.
    #[must_use]
    pub fn snapshot_changes(&self) -> Vec<Change> {
        self.changes_around(self.groups.values().copied().map(Change::Group))
    }

    /// The same for those who get the groups otherwise.
    #[must_use]
    pub fn snapshot_changes_without_groups(&self) -> Vec<Change> {
        self.changes_around(std::iter::empty())
    }

    fn changes_around(&self, groups: impl Iterator<Item = Change>) -> Vec<Change> {
        let policy = Change::Policy { policy: self.policy.clone(), version: self.policy_version };
        std::iter::once(policy)
            .chain(self.sites.values().cloned().map(Change::Site))
            .chain(self.services.values().cloned().map(Change::Service))
            .chain(groups)
            .chain(self.moves.values().cloned().map(Change::Move))
            .collect()
    }

    /// The move in hand of a group.
    #[must_use]
    pub fn move_of(&self, group: &GroupId) -> Option<&Move> {
        self.moves.get(&self.groups.get(group)?.move_id?)
    }

    /// How a move ended, if it did so lately.
    #[must_use]
    pub fn finished(&self, id: MoveId) -> Option<&FinishedMove> {
        self.finished.iter().rev().find(|finished| finished.last.id == id)
    }

    /// The site with this name.
    #[must_use]
    pub fn site_named(&self, name: &str) -> Option<&Site> {
        self.sites.values().find(|site| site.name == name)
    }
}

/// The groups that a service's client prefixes are cut into, or `None` when there would be more than `max`.
pub(crate) fn cut(clients: &[Prefix], len: u8, max: usize) -> Option<Vec<Prefix>> {
    let mut groups = Vec::new();
    for client in clients {
        let bits = len.saturating_sub(client.len());
        let count = 1u128.checked_shl(u32::from(bits))?;
        if groups.len() as u128 + count > max as u128 {
            return None;
        }
        let size = client.size() >> bits;
        let len = len.max(client.len());
        groups.extend(
            (0..count).filter_map(|n| client.nth(n * size)).filter_map(|first| Prefix::new(first, len).ok()),
        );
    }
    Some(groups)
}

/// What a value is filed under.
trait Keyed {
    /// The kind of key.
    type Key: Ord;
    /// The key.
    fn key(&self) -> Self::Key;
}

macro_rules! keyed {
    ($($value:ty => $key:ty),*) => {$(
        impl Keyed for $value {
            type Key = $key;
            fn key(&self) -> $key {
                self.id
            }
        }
    )*};
}
keyed!(Site => SiteId, Service => ServiceId, Group => GroupId, Move => MoveId);

/// Maps as lists of their values, since a JSON key must be a text.
mod values {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Keyed;

    pub(super) fn serialize<S, V>(map: &BTreeMap<V::Key, V>, serializer: S) -> Result<S::Ok, S::Error>
    where
        S: Serializer,
        V: Keyed + Serialize,
    {
        serializer.collect_seq(map.values())
    }

    pub(super) fn deserialize<'de, D, V>(deserializer: D) -> Result<BTreeMap<V::Key, V>, D::Error>
    where
        D: Deserializer<'de>,
        V: Keyed + Deserialize<'de>,
    {
        let values = Vec::<V>::deserialize(deserializer)?;
        Ok(values.into_iter().map(|value| (value.key(), value)).collect())
    }
}
