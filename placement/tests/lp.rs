//! The solver against a general LP solver. The best that prices can prove is the optimum of the relaxation in which groups may be
//! divided: the assignment has integral corners without the rooms (Fisher, Management Science 27, 1981). So the bound has to
//! be that optimum, but for the smoothing: nearly everywhere to a thousandth of a per cent, less well where a tenth of a site hangs on one group.

#![allow(clippy::unwrap_used, reason = "tests")]

use good_lp::{Expression, ProblemVariables, Solution, SolverModel, constraint, default_solver, variable};
use placement::solver::generate::{self, Shape};
use placement::solver::{Instance, RESOURCES, Solver, Start};

/// The least cost when groups may be divided between sites.
fn relaxed(instance: &Instance) -> f64 {
    let mut variables = ProblemVariables::new();
    let mut cost = Expression::from(0.0);
    let mut wholes = Vec::new();
    let mut loads = vec![std::array::from_fn::<Expression, RESOURCES, _>(|_| 0.0.into()); instance.sites()];
    for group in 0..instance.groups() {
        let mut whole = Expression::from(0.0);
        for candidate in instance.candidates(group) {
            let part = variables.add(variable().min(0.0).max(1.0));
            cost += f64::from(instance.weight(group)) * f64::from(candidate.cost_ms) * part;
            whole += part;
            for (load, demand) in loads[usize::from(candidate.site)].iter_mut().zip(instance.demand(group)) {
                *load += f64::from(demand) * part;
            }
        }
        wholes.push(whole);
    }
    let mut model = variables.minimise(cost.clone()).using(default_solver);
    for whole in wholes {
        model = model.with(constraint!(whole == 1.0));
    }
    for (site, loads) in (0..).zip(loads) {
        for (load, room) in loads.into_iter().zip(instance.room(site)) {
            if room.is_finite() {
                model = model.with(constraint!(load <= room));
            }
        }
    }
    let solution = model.solve().unwrap();
    solution.eval(cost)
}

#[test]
fn the_bound_is_the_optimum_of_the_relaxation() {
    for (groups, seed) in [(100, 1), (100, 2), (200, 3)] {
        let shape = Shape { groups, sites: 8, candidates: 5, fill: 0.8, seed };
        let instance = generate::instance(&shape).unwrap();
        let optimum = relaxed(&instance);
        let certificate = Solver::new(instance).solve(Start::Cold);
        assert!(certificate.bound <= optimum * (1.0 + 1e-6), "{certificate:?}, LP {optimum}");
        assert!(certificate.bound >= optimum * 0.99, "{certificate:?}, LP {optimum}");
        eprintln!("bound {:.4} % below the LP", (1.0 - certificate.bound / optimum) * 100.0);
        if certificate.exceeded.is_empty() {
            assert!(certificate.cost >= optimum * (1.0 - 1e-6), "{certificate:?}, LP {optimum}");
            eprintln!("{groups} groups: {:.3} % above the LP", (certificate.cost / optimum - 1.0) * 100.0);
        }
    }
}
