//! The pure part: replicated state machine, delay model, solver, and what the leader does.
//!
//! No socket, thread, clock, environment or unseeded random.

mod apply;
pub mod assess;
#[cfg(test)]
mod brain_tests;
mod command;
#[cfg(test)]
mod day_tests;
pub mod delay;
pub mod explain;
pub mod leader;
mod model;
pub mod plan;
#[cfg(test)]
mod plan_tests;
mod policy;
mod problem;
mod report;
#[cfg(test)]
mod rule_tests;
mod rules;
#[cfg(test)]
mod tests;
pub mod whatif;
pub mod witness;

pub use command::{
    Applied, Command, ENDPOINT_LEN_MAX, GROUPS_PER_SERVICE_MAX, MOVES_PER_COMMAND_MAX, NAME_LEN_MAX, Outcome,
    Proof, Proposal, REASON_LEN_MAX, Rejected, Started,
};
pub use model::{
    AUDIT_LEN_MAX, Admin, AuditEntry, Change, Cluster, FINISHED_LEN_MAX, FinishedMove, Flip, Group, Move,
    MoveOutcome, MovePhase, MoveReason, MoveSummary, Ordering, POLICIES_LEN_MAX, PolicyRevision, Round,
    Service, Site, SitePrices, SiteSpec, Timeouts, Trial,
};
pub use policy::{
    Budget, Capacity, Charge, Dial, Drain, HARD_SLO_MS, Kind, LABELS_LEN_MAX, PRICE_MS_MAX, Policy,
    PolicyError, RULES_LEN_MAX, Rule, Scope, Slo,
};
pub use report::{GroupReport, PeerRtt, REPORT_GROUPS_MAX, SiteReport};
