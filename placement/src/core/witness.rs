//! Whether a round that the leader published is true, by what a node knows itself.
//!
//! Sites report to every node. So a follower can build the instance of the round on its own and put the leader's prices
//! to it: these give a bound whoever found them ([`crate::solver::Bounds`]). What differs is when reports came in, and what
//! of a group's rest only the leader remembers; so figures agree nearly, not exactly.

use std::collections::BTreeSet;

use flow::{GroupId, Micros, SiteId};

use super::delay::Model;
use super::model::{Cluster, FinishedMove, MoveOutcome, Round, SitePrices};
use super::plan::Readiness;
use super::problem::{Problem, Purpose};
use crate::solver::{Bounds, InstanceError, Prices, RESOURCES};

/// Figures that differ by a smaller share agree: reports come a few times a second, and traffic sways.
pub const TOLERANCE: f64 = 0.1;
/// Of delays, what is less says nothing, in milliseconds.
const NOTHING_MS: f64 = 0.2;
/// How long groups rest that failed to move, as the leader has it by default, in milliseconds.
const RETRY_MS: u64 = 10_000;

/// What a node found of a round; delays as means over packets, one way, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finding {
    /// When the round was, by the leader's clock: which one is meant.
    pub at_ms: u64,
    /// Packets per second that this node knows of, and that the leader says.
    pub packets_per_s: (f64, f64),
    /// The bound that the leader's prices give by this node's knowledge, and that the leader says.
    pub bound_ms: (f64, f64),
    /// The same of what the prices alone prove: false prices show here also where others prove as much.
    pub priced_ms: (f64, f64),
    /// The delay at the present owners by this node's knowledge, and what the leader says.
    pub delay_ms: (f64, f64),
}

impl Finding {
    /// The largest difference of the figures, as a share of the larger one.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        let share = |(own, said): (f64, f64), nothing: f64| {
            let off = (own - said).abs();
            if off <= nothing { 0.0 } else { off / own.abs().max(said.abs()) }
        };
        let figures = [
            share(self.packets_per_s, 1.0),
            share(self.bound_ms, NOTHING_MS),
            share(self.priced_ms, NOTHING_MS),
            share(self.delay_ms, NOTHING_MS),
        ];
        figures.into_iter().fold(0.0, f64::max)
    }

    /// Whether this node finds what the leader says.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.deviation() <= TOLERANCE
    }
}

/// Looks at the published round; `None` when there is none, or no site. Work as of building an instance, and one pass.
///
/// # Errors
/// When a number cannot be used, such as a demand that is not finite; the message names it.
pub fn check(cluster: &Cluster, model: &Model, now: Micros) -> Result<Option<Finding>, InstanceError> {
    let Some(round) = &cluster.round else { return Ok(None) };
    let rests = Rests::at(cluster, round);
    let (free, rested) =
        (|group: &GroupId| !rests.failed.contains(group), |group: &GroupId| !rests.moved.contains(group));
    let ready = Readiness { free: &free, rested: &rested, recent: &[], wall_ms: None };
    let Some(problem) = Problem::new(cluster, model, Purpose::Plan(&ready), now)? else { return Ok(None) };
    let price = |site: &SiteId| {
        let price = round.prices.iter().find(|price| price.site == *site);
        price.map_or([0.0; RESOURCES], SitePrices::values)
    };
    let sites = problem.sites.iter().map(price).collect();
    let prices = Prices { sites, classes: round.spread_prices.clone() };
    let bounds = Bounds::of(problem.instance(), &prices);
    let priced_ms = problem.mean(bounds.priced);
    Ok(Some(Finding {
        at_ms: round.at_ms,
        packets_per_s: (problem.weight, round.packets_per_s),
        bound_ms: (problem.mean(bounds.best()), round.bound_ms),
        priced_ms: (priced_ms, round.priced_ms.unwrap_or(priced_ms)),
        delay_ms: (problem.mean(problem.present), round.delay_ms),
    }))
}

/// Groups that could not be moved when the round was, as the log tells.
struct Rests {
    failed: BTreeSet<GroupId>,
    moved: BTreeSet<GroupId>,
}

impl Rests {
    fn at(cluster: &Cluster, round: &Round) -> Self {
        let dwell_ms = u64::from(cluster.policy.min_dwell_s) * 1000;
        let within = |finished: &&FinishedMove, ms: u64| finished.at_ms.saturating_add(ms) > round.at_ms;
        let done = |finished: &&FinishedMove| finished.outcome == MoveOutcome::Done;
        let groups = |wanted: bool, ms: u64| {
            let ended = cluster.finished.iter().filter(move |finished| done(finished) == wanted);
            ended.filter(move |finished| within(finished, ms)).map(|finished| finished.last.group)
        };
        Self { failed: groups(false, RETRY_MS).collect(), moved: groups(true, dwell_ms).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::brain_tests::{cluster, group_id, load, planned, report};
    use super::*;

    /// A cluster with the round that its leader published of these loads.
    fn published(loads: &[u64]) -> (Cluster, Model) {
        let mut cluster = cluster();
        let groups: Vec<_> = (0..).zip(loads).map(|(n, &packets)| load(n, packets, n % 3)).collect();
        cluster.round = planned(&cluster, groups.clone()).round;
        let mut model = Model::new(None);
        model.handle_report(&report(0, groups), Micros(0));
        (cluster, model)
    }

    #[test]
    fn a_true_round_is_found_true() {
        let (cluster, model) = published(&[300, 400, 200, 350]);
        let finding = check(&cluster, &model, Micros(1_000_000)).unwrap().unwrap();
        assert!(finding.agrees() && finding.deviation() < 1e-6, "{finding:?}");
        assert!(finding.bound_ms.0 > 0.0);
    }

    #[test]
    fn a_bound_or_traffic_that_is_not_there_is_found_out() {
        let (mut cluster, model) = published(&[300, 400, 200, 350]);
        let said = cluster.round.clone().unwrap();
        let mut lies = vec![said.clone(), said.clone(), said.clone(), said.clone()];
        lies[0].bound_ms *= 1.5;
        lies[1].packets_per_s *= 0.5;
        lies[2].prices.iter_mut().for_each(|price| price.packets += 50.0);
        lies[3].delay_ms *= 0.5;
        for lie in lies {
            cluster.round = Some(lie);
            let finding = check(&cluster, &model, Micros(1_000_000)).unwrap().unwrap();
            assert!(!finding.agrees(), "{finding:?}");
        }
    }

    #[test]
    fn a_node_that_hears_no_reports_agrees_with_nothing() {
        let (cluster, _) = published(&[300, 400, 200, 350]);
        let finding = check(&cluster, &Model::new(None), Micros(1_000_000)).unwrap().unwrap();
        assert_eq!(finding.deviation(), 1.0);
    }

    #[test]
    fn groups_rest_after_moves_as_the_log_tells() {
        let (mut cluster, _) = published(&[300, 400, 200, 350]);
        let apply = |cluster: &mut Cluster, index, at_ms, command| {
            let proposal = super::super::Proposal { actor: "leader".into(), at_ms, command };
            cluster.apply(index, &proposal).result.unwrap();
        };
        let start = super::super::Command::StartMoves {
            moves: vec![(group_id(1), SiteId(1))],
            reason: super::super::MoveReason::Delay,
        };
        apply(&mut cluster, 10, 1_000, start);
        let id = cluster.move_of(&group_id(1)).unwrap().id;
        let abort = super::super::Command::Abort { move_id: id, by: None, reason: "a test".into() };
        apply(&mut cluster, 11, 2_000, abort);
        let at = |at_ms| Rests::at(&cluster, &Round { at_ms, ..Round::default() }).failed.len();
        assert_eq!((at(11_999), at(12_000)), (1, 0));
    }
}
