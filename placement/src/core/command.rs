//! What can be asked of the replicated state, and the answers.

use flow::nat::SliceError;
use flow::{GroupId, MoveId, Prefix, ServiceId, SiteId};
use serde::{Deserialize, Serialize};

use super::model::{
    Admin, Change, MoveOutcome, MovePhase, MoveReason, MoveSummary, Round, Service, SiteSpec,
};
use super::policy::{Policy, PolicyError};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// Who asks, for the audit log: an operator, `site NAME`, or `leader`.
    pub actor: String,
    /// When, in milliseconds since 1970, by the proposer's clock. For people; decides nothing.
    pub at_ms: u64,
    /// What.
    pub command: Command,
}

/// What can be asked. Each may be repeated: what has taken effect already gives the same outcome again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Adds a site, or replaces what the operator said of it.
    PutSite(SiteSpec),
    /// A site is no more. Only one that nothing leads to: it owns no group, has no part in a move, no rule names it.
    RemoveSite {
        /// The site.
        site: SiteId,
    },
    /// Allows or forbids.
    SetAdmin {
        /// The site.
        site: SiteId,
        /// What is allowed.
        admin: Admin,
    },
    /// A site's lease began or ended. From the leader.
    SetAlive {
        /// The site.
        site: SiteId,
        /// Whether it holds a lease.
        alive: bool,
    },
    /// Adds a service with its groups, or replaces its name, timeouts and ordering.
    PutService {
        /// The service.
        service: Service,
        /// The first owner of its groups; chosen by share of capacity if not given.
        owner: Option<SiteId>,
    },
    /// Replaces the policy.
    PutPolicy {
        /// The new one.
        policy: Policy,
        /// The version that the caller saw.
        expected_version: u64,
        /// The former policy returns after so many milliseconds unless this one is confirmed.
        #[serde(default)]
        confirm_within_ms: Option<u64>,
    },
    /// The policy on trial stays.
    ConfirmPolicy {
        /// Its version.
        version: u64,
    },
    /// The policy on trial was not confirmed in time: the former one returns. From the leader.
    RevertPolicy {
        /// Its version.
        version: u64,
    },
    /// The time of rules is over. From the leader.
    EndRules {
        /// The version of the policy that has them.
        version: u64,
        /// Their names.
        rules: Vec<String>,
    },
    /// Starts moves: all or, if one is refused, none. At most [`MOVES_PER_COMMAND_MAX`].
    StartMoves {
        /// Which group to which site.
        moves: Vec<(GroupId, SiteId)>,
        /// Why.
        reason: MoveReason,
    },
    /// The source has copied enough: flip.
    Switch {
        /// The move.
        move_id: MoveId,
        /// Must be the source.
        by: SiteId,
    },
    /// The target serves.
    Served {
        /// The move.
        move_id: MoveId,
        /// Must be the target.
        by: SiteId,
        /// What it took.
        summary: MoveSummary,
    },
    /// Ends a move that has not been switched.
    Abort {
        /// The move.
        move_id: MoveId,
        /// Source or target; `None` for operators and the leader.
        by: Option<SiteId>,
        /// Why, for people.
        reason: String,
    },
    /// Ends a switched move that the target never served and never will.
    TakeBack {
        /// The move.
        move_id: MoveId,
        /// Who has the proof.
        by: SiteId,
        /// How that is known.
        proof: Proof,
    },
    /// The source of a switched move is dead: the target shall serve its shadow. From the leader.
    TakeOver {
        /// The move.
        move_id: MoveId,
    },
    /// Gives groups of a dead site new owners, without their flows. For operators: a site that only lost its
    /// agent still serves them (fail static), so nothing does this by itself.
    Reassign {
        /// Which group to which site.
        groups: Vec<(GroupId, SiteId)>,
    },
    /// Sites that are to get groups when their owner is lost. At most [`MOVES_PER_COMMAND_MAX`]. From the leader.
    SetStandbys {
        /// Which group has which standby; nothing for none.
        standbys: Vec<(GroupId, Option<SiteId>)>,
    },
    /// A group becomes its two halves, with its owner and epoch.
    SplitGroup {
        /// The group.
        group: GroupId,
    },
    /// The two halves of a prefix become one group. They must have one owner; the greater epoch stays.
    MergeGroups {
        /// The group that they become.
        group: GroupId,
    },
    /// What a round of the solver brought. From the leader.
    Publish(Box<Round>),
}

/// How it is known that the target never served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The token was never given away, and no longer can be. By the source.
    #[serde(rename = "never_cut")]
    NeverGiven,
    /// The target did not accept the token and never will. By the target, or by the source in its words.
    NeverAccepted,
    /// The target is dead and fenced: whatever it had accepted, it does not serve. By an operator, in the name of the source.
    Fenced,
}

/// Moves in one command: so many numbers fit between two log indexes.
pub const MOVES_PER_COMMAND_MAX: usize = 4096;
/// Groups of one service: a million, and then some.
pub const GROUPS_PER_SERVICE_MAX: usize = 1 << 20;
/// Bytes of a name.
pub const NAME_LEN_MAX: usize = 64;
/// Bytes of an endpoint.
pub const ENDPOINT_LEN_MAX: usize = 256;
/// Bytes of an abort's reason; longer ones are cut.
pub const REASON_LEN_MAX: usize = 256;

/// What an accepted command did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is as the command says.
    Done,
    /// Moves in the order of the command.
    Moves(Vec<Started>),
}

/// What became of one wish to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The group.
    pub group: GroupId,
    /// Its move to the wished site; `None` when it is there already.
    pub move_id: Option<MoveId>,
}

/// Result and consequences of one command.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The answer.
    pub result: Result<Outcome, Rejected>,
    /// What is different; empty when refused or repeated.
    pub changes: Vec<Change>,
}

/// Why a command was refused; nothing has changed. Each message names the value and what would be right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Rejected {
    /// A text is empty or too long.
    #[error("{field} has {len} bytes: give 1 to {max}")]
    Length {
        /// The field.
        field: String,
        /// What it has.
        len: usize,
        /// What it may have.
        max: usize,
    },
    /// A name that another has.
    #[error("name {name:?} is taken by {by}: names are unique")]
    NameTaken {
        /// The name.
        name: String,
        /// Whose it is.
        by: String,
    },
    /// A coordinate out of range, or one without the other.
    #[error("{field} is {value}: give {right}, and both coordinates or none")]
    Coordinate {
        /// `latitude` or `longitude`.
        field: String,
        /// What was given.
        value: String,
        /// The range.
        right: String,
    },
    /// There is no such site.
    #[error("no site {0}: add it first")]
    NoSite(SiteId),
    /// The site still has groups.
    #[error(
        "site {site} owns {groups} groups, the first is {first}: drain it, or fail it over if it is lost, and wait until it \
         has none"
    )]
    OwnsGroups {
        /// The site.
        site: SiteId,
        /// How many.
        groups: usize,
        /// The first of them.
        first: GroupId,
    },
    /// The site is source, target or ingress of a move.
    #[error("site {site} takes part in move {move_id} of {group}: wait for its end or abort it")]
    TakesPart {
        /// The site.
        site: SiteId,
        /// The first such move.
        move_id: MoveId,
        /// Of what.
        group: GroupId,
    },
    /// A policy names the site.
    #[error("site {site} is named by rule {rule:?} of {}: change the rule first", policy(*returns))]
    NamedByRule {
        /// The site.
        site: SiteId,
        /// The rule's name.
        rule: String,
        /// The rule is of the policy that returns unless this version, which is on trial, is confirmed.
        returns: Option<u64>,
    },
    /// Groups have to be somewhere.
    #[error("site {site} is the only one: add another first")]
    OnlySite {
        /// The site.
        site: SiteId,
    },
    /// There is no such service.
    #[error("no service {0}: add it first")]
    NoService(ServiceId),
    /// There is no such group.
    #[error("no group {0}: groups are leaves of the client prefixes of a service")]
    NoGroup(GroupId),
    /// There is no such move, or it ended so long ago that it is forgotten.
    #[error("no move {0}, or it ended long ago")]
    NoMove(MoveId),
    /// No site could be the first owner.
    #[error("no site is active: add one or activate one, or name the owner")]
    NoActiveSite,
    /// Addresses or blocks that do not work.
    #[error("{0}")]
    Nat(String),
    /// Out of range.
    #[error("group_len is {given}: give 8 to 32")]
    GroupLen {
        /// What was given.
        given: u8,
    },
    /// Too many groups.
    #[error("group_len {group_len} makes more than {max} groups: make it smaller")]
    TooManyGroups {
        /// What was given.
        group_len: u8,
        /// How many there may be.
        max: usize,
    },
    /// Too short to work.
    #[error("{field} is {given}: give at least {min}")]
    Timeout {
        /// The field.
        field: String,
        /// What was given.
        given: u32,
        /// The least.
        min: u32,
    },
    /// A field that cannot change while the service exists.
    #[error("{field} of service {service} is fixed: make a new service")]
    Fixed {
        /// The service.
        service: ServiceId,
        /// The field.
        field: String,
    },
    /// Two services share addresses.
    #[error("{new} overlaps {present} of service {service}: each address may appear once")]
    Overlap {
        /// The new prefix.
        new: Prefix,
        /// What is there.
        present: Prefix,
        /// Whose it is.
        service: ServiceId,
    },
    /// A policy that makes no sense.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Somebody else was faster.
    #[error("policy version is {current}, but {expected} was expected: read it again")]
    PolicyVersion {
        /// What the caller saw.
        expected: u64,
        /// What it is.
        current: u64,
    },
    /// Nothing to confirm.
    #[error("policy {version} is not on trial: {}", trial(present))]
    NotOnTrial {
        /// What the caller named.
        version: u64,
        /// What is on trial.
        present: Option<u64>,
    },
    /// Out of range.
    #[error("confirm_within is {given_ms} ms: give 1 s to 24 h")]
    ConfirmWithin {
        /// What was given.
        given_ms: u64,
    },
    /// Too many entries in one command.
    #[error("{field} has {len} entries: give 1 to {max}")]
    Count {
        /// The field.
        field: String,
        /// How many.
        len: usize,
        /// How many it may be.
        max: usize,
    },
    /// Too many moves at one time.
    #[error("{in_flight} moves are in flight and {asked} were asked for: moves_in_flight_max is {max}")]
    Budget {
        /// Present moves.
        in_flight: usize,
        /// New ones.
        asked: usize,
        /// The policy's bound.
        max: u32,
    },
    /// The group has a move to another site.
    #[error("group {group} is moving to site {to} (move {move_id}): wait for its end or abort it")]
    Moving {
        /// The group.
        group: GroupId,
        /// The present move.
        move_id: MoveId,
        /// Its target.
        to: SiteId,
    },
    /// The target is not active or has no lease.
    #[error("site {site} takes no groups: it is {admin:?} and {}", if *alive { "alive" } else { "not alive" })]
    TargetClosed {
        /// The site.
        site: SiteId,
        /// What it is allowed.
        admin: Admin,
        /// Whether it holds a lease.
        alive: bool,
    },
    /// The source cannot copy.
    #[error(
        "site {site}, owner of {group}, is not alive: wait for it, or reassign the group without its flows"
    )]
    SourceDead {
        /// The group.
        group: GroupId,
        /// Its owner.
        site: SiteId,
    },
    /// Only for groups of dead sites.
    #[error("site {site}, owner of {group}, is alive: move the group instead")]
    SourceAlive {
        /// The group.
        group: GroupId,
        /// Its owner.
        site: SiteId,
    },
    /// Only from targets that are dead.
    #[error("site {site}, target of the move of {group}, is alive: it can say itself what it has")]
    TargetAlive {
        /// The group.
        group: GroupId,
        /// The target.
        site: SiteId,
    },
    /// A command names a group twice, with two targets.
    #[error("group {group} is given to two sites: name each group once")]
    Twice {
        /// The group.
        group: GroupId,
    },
    /// A standby that would be lost together with the owner.
    #[error(
        "site {standby} cannot be the standby of {group}: it is in the failure domain of its owner, site {owner}"
    )]
    SameDomain {
        /// The group.
        group: GroupId,
        /// Its owner.
        owner: SiteId,
        /// The standby.
        standby: SiteId,
    },
    /// The policy forbids the target.
    #[error("group {group} must not be at site {site} by rule {rule:?}: change the rule first")]
    Forbidden {
        /// The group.
        group: GroupId,
        /// The forbidden site.
        site: SiteId,
        /// The rule's name.
        rule: String,
    },
    /// Not the party that may say so.
    #[error("move {move_id}: site {by} may not say this, only {right}")]
    NotParty {
        /// The move.
        move_id: MoveId,
        /// Who said it.
        by: SiteId,
        /// Who may.
        right: String,
    },
    /// Too early or too late.
    #[error("move {move_id} is {phase:?}: {right}")]
    Phase {
        /// The move.
        move_id: MoveId,
        /// Where it is.
        phase: MovePhase,
        /// What would be right.
        right: String,
    },
    /// The move ended otherwise.
    #[error("move {move_id} has ended: {outcome:?}")]
    Ended {
        /// The move.
        move_id: MoveId,
        /// How it ended.
        outcome: MoveOutcome,
    },
    /// A single address.
    #[error("group {group} is a single subscriber: that is the smallest")]
    Smallest {
        /// The group.
        group: GroupId,
    },
    /// No room for one more.
    #[error("service {service} has {max} groups, which is the most: merge some first")]
    GroupsFull {
        /// The service.
        service: ServiceId,
        /// How many there may be.
        max: usize,
    },
    /// Groups do not grow beyond what the service was cut into.
    #[error(
        "group {group} would be above the cut of its service: its prefix has to have {group_len} bits or more"
    )]
    AboveCut {
        /// What was to be.
        group: GroupId,
        /// The service's `group_len`.
        group_len: u8,
    },
    /// Halves at two sites.
    #[error("the halves of {group} are at sites {low} and {high}: move one to the other first")]
    TwoOwners {
        /// What was to be.
        group: GroupId,
        /// The owner of the lower half.
        low: SiteId,
        /// The owner of the higher half.
        high: SiteId,
    },
    /// An old owner may still relay.
    #[error("group {group} has just moved, and its old owner may still relay for it: wait {} s", wait_ms.div_ceil(1_000))]
    JustMoved {
        /// The group.
        group: GroupId,
        /// How long, in milliseconds.
        wait_ms: u64,
    },
    /// A rule is about a part of what was to be.
    #[error("rule {rule:?} is about a part of {group}: change the rule first")]
    FinerRule {
        /// What was to be.
        group: GroupId,
        /// The rule's name.
        rule: String,
    },
    /// The target was told to serve its shadow: only its own word can undo that.
    #[error("move {move_id} is being taken over by site {to}: only it can say that it never accepted")]
    TakenOver {
        /// The move.
        move_id: MoveId,
        /// The target.
        to: SiteId,
    },
}

fn policy(returns: Option<u64>) -> String {
    returns.map_or("the policy".to_owned(), |version| {
        format!("the policy that returns unless policy {version} is confirmed")
    })
}

fn trial(present: &Option<u64>) -> String {
    present.map_or("none is".to_owned(), |version| format!("policy {version} is"))
}

impl From<SliceError> for Rejected {
    fn from(error: SliceError) -> Self {
        Self::Nat(error.to_string())
    }
}

impl Command {
    /// In short, for the audit log.
    #[must_use]
    pub fn summary(&self) -> String {
        match self {
            Self::PutSite(site) => format!("put site {} {:?}", site.id, site.name),
            Self::RemoveSite { site } => format!("remove site {site}"),
            Self::SetAdmin { site, admin } => format!("set site {site} {admin:?}"),
            Self::SetAlive { site, alive } => {
                format!("set site {site} {}", if *alive { "alive" } else { "dead" })
            }
            Self::PutService { service, .. } => format!("put service {} {:?}", service.id, service.name),
            Self::PutPolicy { expected_version, confirm_within_ms: None, .. } => {
                format!("put policy over version {expected_version}")
            }
            Self::PutPolicy { expected_version, confirm_within_ms: Some(ms), .. } => {
                format!("put policy over version {expected_version}, on trial for {} s", ms / 1000)
            }
            Self::ConfirmPolicy { version } => format!("confirm policy {version}"),
            Self::RevertPolicy { version } => format!("take back policy {version}, which was not confirmed"),
            Self::EndRules { rules, .. } => format!("end rules {}", rules.join(", ")),
            Self::StartMoves { moves, reason } => match moves.as_slice() {
                [(group, to)] => format!("move {group} to site {to} ({reason:?})"),
                many => format!("move {} groups ({reason:?})", many.len()),
            },
            Self::Switch { move_id, by } => format!("switch move {move_id} by site {by}"),
            Self::Served { move_id, by, .. } => format!("served move {move_id} by site {by}"),
            Self::Abort { move_id, reason, .. } => format!("abort move {move_id}: {}", clip(reason)),
            Self::TakeBack { move_id, by, proof } => {
                format!("take back move {move_id} by site {by} ({proof:?})")
            }
            Self::TakeOver { move_id } => format!("take over move {move_id}"),
            Self::Reassign { groups } => match groups.as_slice() {
                [(group, to)] => format!("reassign {group} to site {to}"),
                many => format!("reassign {} groups", many.len()),
            },
            Self::SetStandbys { standbys } => format!("set standbys of {} groups", standbys.len()),
            Self::SplitGroup { group } => format!("split {group}"),
            Self::MergeGroups { group } => format!("merge the halves of {group}"),
            Self::Publish(round) => format!("publish a round with {} moves", round.moves),
        }
    }

    /// The site that must itself send the command; `None` for what operators and the leader send.
    #[must_use]
    pub fn site(&self) -> Option<SiteId> {
        match self {
            Self::TakeBack { proof: Proof::Fenced, .. } => None,
            Self::Switch { by, .. } | Self::Served { by, .. } | Self::TakeBack { by, .. } => Some(*by),
            Self::Abort { by, .. } => *by,
            Self::PutSite(_)
            | Self::RemoveSite { .. }
            | Self::SetAdmin { .. }
            | Self::SetAlive { .. }
            | Self::PutService { .. }
            | Self::PutPolicy { .. }
            | Self::ConfirmPolicy { .. }
            | Self::RevertPolicy { .. }
            | Self::EndRules { .. }
            | Self::StartMoves { .. }
            | Self::TakeOver { .. }
            | Self::Reassign { .. }
            | Self::SetStandbys { .. }
            | Self::SplitGroup { .. }
            | Self::MergeGroups { .. }
            | Self::Publish(_) => None,
        }
    }
}

/// A reason cut to [`REASON_LEN_MAX`] bytes, at a character.
pub(crate) fn clip(reason: &str) -> &str {
    let mut end = reason.len().min(REASON_LEN_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}
