//! The pure part: replicated state machine, delay model, solver, and what the leader does.
//!
//! No socket, thread, clock, environment or unseeded random.

mod apart;
mod apply;
pub mod assess;
#[cfg(test)]
mod brain_tests;
#[cfg(test)]
mod calm_tests;
mod command;
#[cfg(test)]
mod day_tests;
pub mod delay;
pub mod drain;
pub mod explain;
mod kept;
pub mod leader;
mod model;
#[cfg(test)]
mod place_tests;
pub mod plan;
#[cfg(test)]
mod plan_tests;
mod policy;
mod problem;
#[cfg(test)]
mod remove_tests;
pub mod replay;
mod report;
#[cfg(test)]
mod rule_tests;
mod rules;
mod shape;
mod split;
mod spread;
mod stay;
#[cfg(test)]
mod tests;
pub mod whatif;
pub mod witness;

pub use command::{
    Applied, Command, ENDPOINT_LEN_MAX, GROUPS_PER_SERVICE_MAX, MOVES_PER_COMMAND_MAX, NAME_LEN_MAX, Outcome,
    Proof, Proposal, REASON_LEN_MAX, Rejected, Started,
};
pub use model::{
    AUDIT_LEN_MAX, Admin, AuditEntry, Change, Cluster, Domain, FINISHED_LEN_MAX, FinishedMove, Flip, Group,
    Move, MoveOutcome, MovePhase, MoveReason, MoveSummary, Ordering, POLICIES_LEN_MAX, PolicyRevision,
    REMOVED_NODES_LEN_MAX, Round, Service, Site, SitePrices, SiteSpec, Timeouts, Trial,
};
pub use policy::{
    Budget, Capacity, Charge, Dial, Drain, HARD_SLO_MS, Kind, LABELS_LEN_MAX, PRICE_MS_MAX, Place, Policy,
    PolicyError, RULES_LEN_MAX, Rule, SEPARATES_LEN_MAX, SHORT_LIFE_MAX, SPREADS_LEN_MAX, Scope, Slo, Split,
    Spread,
};
pub use report::{
    ClientRtt, GroupReport, GroupTalk, PROBES_MAX, PROBLEMS_MAX, PeerRtt, Probe, REPORT_GROUPS_MAX,
    REPORT_WAYS_MAX, ServerRtt, SiteReport, TALK_LEN_MAX,
};
