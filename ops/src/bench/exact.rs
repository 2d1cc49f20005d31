//! The exact optimum of small networks, from a general solver of integer programs, beside ours.
//!
//! Whole groups make the problem NP-hard: branch and bound proves the optimum of some hundred groups in seconds, and of a thousand
//! hardly ever. What always comes in no time is the optimum if groups could be divided, above which no bound from prices can be.

use good_lp::solvers::{SolutionStatus, WithInitialSolution, WithTimeLimit};
use good_lp::{
    Expression, ProblemVariables, Solution, SolverModel, Variable, constraint, default_solver, variable,
};
use placement::solver::generate::{self, Load, Shape};
use placement::solver::{Instance, InstanceError, RESOURCES, Solver, Start};

use super::placement::{Exact, timed};

/// Groups and sites of the networks, at 80 % of their capacity.
const NETWORKS: [(u32, u16); 4] = [(200, 10), (200, 20), (1_000, 10), (1_000, 20)];
const FILL: f64 = 0.8;

/// The variables of one network: which candidate a group has.
struct Program {
    variables: ProblemVariables,
    /// By group, in the order of its candidates.
    parts: Vec<Vec<Variable>>,
    cost: Expression,
    /// What sites carry, as a share of their room, where that has a limit.
    loads: Vec<Expression>,
}

impl Program {
    fn new(instance: &Instance, divisible: bool) -> Self {
        let mut program = Self {
            variables: ProblemVariables::new(),
            parts: Vec::new(),
            cost: 0.0.into(),
            loads: Vec::new(),
        };
        let mut loads =
            vec![std::array::from_fn::<Expression, RESOURCES, _>(|_| 0.0.into()); instance.sites()];
        for group in 0..instance.groups() {
            let mut parts = Vec::new();
            for candidate in instance.candidates(group) {
                // A part of a group is nowhere where the whole of it could not be.
                let (room, demand) = (instance.room(candidate.site), instance.demand(group));
                let most = f64::from(u8::from(instance.holds_alone(candidate.site, demand)));
                let part = if divisible { variable().min(0.0).max(most) } else { variable().binary() };
                let part = program.variables.add(part);
                program.cost += f64::from(instance.weight(group)) * f64::from(candidate.cost_ms) * part;
                for (r, load) in loads[usize::from(candidate.site)].iter_mut().enumerate() {
                    *load += f64::from(demand[r]) / room[r].max(f64::MIN_POSITIVE) * part;
                }
                parts.push(part);
            }
            program.parts.push(parts);
        }
        program.loads = loads.into_iter().flatten().collect();
        program
    }

    /// The least cost, and whether it is proven. Nothing when there is none, or none was found.
    fn solve(self, seconds: u16, start: Option<&Solver>) -> Result<(f64, bool), good_lp::ResolutionError> {
        let at = |group: usize| start.and_then(|solver| solver.site(group));
        let mut initial = Vec::new();
        if let Some(solver) = start {
            for (group, parts) in self.parts.iter().enumerate() {
                let here = solver.instance().candidates(group).map(|one| Some(one.site) == at(group));
                initial.extend(parts.iter().zip(here).map(|(&part, here)| (part, f64::from(u8::from(here)))));
            }
        }
        let mut model = self.variables.minimise(self.cost.clone()).using(default_solver);
        model = model.with_time_limit(f64::from(seconds));
        if !initial.is_empty() {
            model = model.with_initial_solution(initial);
        }
        for parts in self.parts {
            let whole: Expression = parts.into_iter().sum();
            model = model.with(constraint!(whole == 1.0));
        }
        for load in self.loads {
            model = model.with(constraint!(load <= 1.0));
        }
        let solution = model.solve()?;
        let proven = matches!(solution.status(), SolutionStatus::Optimal);
        Ok((solution.eval(self.cost), proven))
    }
}

/// Solves each network by both.
///
/// # Errors
/// When a network cannot be made.
pub(super) fn measure(candidates: u8, seed: u64, seconds: u16) -> Result<Vec<Exact>, InstanceError> {
    let one = |&(groups, sites): &(u32, u16)| compare(groups, sites, candidates, seed, seconds);
    NETWORKS.iter().map(one).collect()
}

fn compare(groups: u32, sites: u16, candidates: u8, seed: u64, seconds: u16) -> Result<Exact, InstanceError> {
    let candidates = candidates.min(sites.min(16) as u8);
    let shape = Shape {
        groups: groups as usize,
        sites: sites.into(),
        candidates: candidates.into(),
        fill: FILL,
        load: Load::Pareto,
        seed,
    };
    let instance = generate::instance(&shape)?;
    let mut solver = Solver::new(instance.clone());
    let (own_seconds, certificate) = timed(|| solver.solve(Start::Cold));
    let holds = certificate.exceeded.is_empty();
    let divisible = Program::new(&instance, true).solve(seconds, None).ok().filter(|(_, proven)| *proven);
    // Beginning with ours, it need not look at what is dearer; the proof is its own.
    let whole = Program::new(&instance, false);
    let (exact_seconds, whole) = timed(|| whole.solve(seconds, Some(&solver).filter(|_| holds)));
    let (state, optimum) = match whole {
        Ok((optimum, true)) => ("proven", Some(optimum)),
        Err(good_lp::ResolutionError::Infeasible) => ("nothing fits", None),
        Ok((_, false)) | Err(_) => ("no proof", None),
    };
    Ok(Exact {
        groups,
        sites,
        candidates,
        state,
        seconds: exact_seconds,
        optimum,
        divisible: divisible.map(|(cost, _)| cost),
        own_seconds,
        own_cost: certificate.cost,
        own_bound: certificate.bound,
        cost_above: optimum.filter(|_| holds).map(|optimum| certificate.cost / optimum - 1.0),
        bound_below: optimum.map(|optimum| 1.0 - certificate.bound / optimum),
    })
}

#[cfg(test)]
mod tests {
    use super::compare;

    #[test]
    fn ours_is_never_below_the_exact_optimum_and_the_bound_never_above() {
        let mut proven = 0;
        for seed in 1..=4 {
            let exact = compare(80, 8, 5, seed, 60).unwrap();
            let above = |share: f64| share > -1e-6;
            assert!(exact.cost_above.is_none_or(above) && exact.bound_below.is_none_or(above), "{exact:?}");
            assert!(exact.divisible.is_none_or(|cost| exact.own_bound <= cost * (1.0 + 1e-6)), "{exact:?}");
            assert!(
                exact.divisible.zip(exact.optimum).is_none_or(|(a, b)| a <= b * (1.0 + 1e-6)),
                "{exact:?}"
            );
            proven += usize::from(exact.cost_above.is_some());
        }
        assert!(proven >= 2, "{proven} networks were compared");
    }
}
