//! The solver against a general solver of linear and integer programs. The best that prices can prove is the optimum of the
//! relaxation in which groups may be divided: the assignment has integral corners without the rooms (Fisher, Management Science
//! 27, 1981). So the bound has to be that optimum, but for the smoothing: nearly everywhere to a thousandth of a per cent, less
//! well where a tenth of a site hangs on one group. And between bound and cost lies the optimum of whole groups.

#![allow(clippy::unwrap_used, reason = "tests")]

use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolverModel, constraint, default_solver,
    variable,
};
use placement::solver::generate::{self, Load, Shape};
use placement::solver::{Class, Group, Instance, PerResource, RESOURCES, Site, Solver, Start};

/// The least cost; groups may be divided between sites that could hold them whole, or not at all. Nothing when they do not fit.
fn optimum(instance: &Instance, divisible: bool) -> Option<f64> {
    let mut variables = ProblemVariables::new();
    let mut cost = Expression::from(0.0);
    let mut wholes = Vec::new();
    let mut loads = vec![std::array::from_fn::<Expression, RESOURCES, _>(|_| 0.0.into()); instance.sites()];
    // By class and cell.
    let mut counts = vec![vec![Expression::from(0.0); 256]; instance.classes().len()];
    for group in 0..instance.groups() {
        let mut whole = Expression::from(0.0);
        for candidate in instance.candidates(group) {
            let most = f64::from(u8::from(instance.holds_alone(candidate.site, instance.demand(group))));
            let part = if divisible { variable().min(0.0).max(most) } else { variable().binary() };
            let part = variables.add(part);
            cost += f64::from(instance.weight(group)) * f64::from(candidate.cost_ms) * part;
            whole += part;
            for (load, demand) in loads[usize::from(candidate.site)].iter_mut().zip(instance.demand(group)) {
                *load += f64::from(demand) * part;
            }
            if let Some(class) = instance.class(group) {
                let (cell, _) = instance.cell(class, candidate.site);
                counts[class.index()][usize::from(cell)] += part;
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
    for class in instance.classes() {
        let mut limits = vec![f64::INFINITY; 256];
        (0..instance.sites() as u8).for_each(|site| {
            let (cell, limit) = instance.cell(class, site);
            limits[usize::from(cell)] = limit;
        });
        for (count, limit) in std::mem::take(&mut counts[class.index()]).into_iter().zip(limits) {
            if limit.is_finite() {
                model = model.with(constraint!(count <= limit));
            }
        }
    }
    match model.solve() {
        Ok(solution) => Some(solution.eval(cost)),
        Err(ResolutionError::Infeasible) => None,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn the_bound_is_the_optimum_of_the_relaxation() {
    for (groups, seed) in [(100, 1), (100, 2), (200, 3)] {
        let shape = Shape { groups, sites: 8, candidates: 5, fill: 0.8, load: Load::Pareto, seed };
        let instance = generate::instance(&shape).unwrap();
        let optimum = optimum(&instance, true).unwrap();
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

#[test]
fn the_optimum_of_whole_groups_lies_between_bound_and_cost() {
    let mut compared = 0;
    for seed in 1..=6 {
        let shape = Shape { groups: 100, sites: 8, candidates: 5, fill: 0.7, load: Load::Pareto, seed };
        let instance = generate::instance(&shape).unwrap();
        let optimum = optimum(&instance, false);
        let certificate = Solver::new(instance).solve(Start::Cold);
        let Some(optimum) = optimum else {
            assert!(!certificate.exceeded.is_empty(), "{certificate:?}, but nothing fits");
            continue;
        };
        compared += 1;
        assert!(certificate.exceeded.is_empty(), "{certificate:?}, optimum {optimum}");
        assert!(certificate.bound <= optimum * (1.0 + 1e-6), "{certificate:?}, optimum {optimum}");
        assert!(certificate.cost >= optimum * (1.0 - 1e-6), "{certificate:?}, optimum {optimum}");
        assert!(certificate.cost <= optimum * 1.02, "{certificate:?}, optimum {optimum}");
        eprintln!(
            "seed {seed}: cost {:.3} % above the optimum, bound {:.3} % below",
            (certificate.cost / optimum - 1.0) * 100.0,
            (1.0 - certificate.bound / optimum) * 100.0
        );
    }
    assert!(compared >= 4, "{compared} instances had an optimum");
}

/// The same groups, every third of them in a class that may have a few in each of four cells.
fn spread(plain: &Instance, limit: f64) -> Instance {
    let rooms: Vec<PerResource<f64>> = (0..plain.sites() as u8).map(|site| plain.room(site)).collect();
    let sites: Vec<Site> = rooms.iter().map(|&capacity| Site { capacity, headroom: 0.0 }).collect();
    let mut instance = Instance::new(&sites).unwrap();
    let cells: Vec<u8> = (0..plain.sites() as u8).map(|site| site % 4).collect();
    let class: Class = instance.add_class(&cells, &[limit; 4]).unwrap();
    for group in 0..plain.groups() {
        let candidates: Vec<_> = plain.candidates(group).collect();
        let group = Group {
            weight: plain.weight(group),
            demand: plain.demand(group),
            present: None,
            charge: 0.0,
            left_out_ms: f32::INFINITY,
            class: Some(class).filter(|_| group % 3 == 0),
            candidates: &candidates,
        };
        instance.push(&group).unwrap();
    }
    instance
}

#[test]
fn the_optimum_of_spread_groups_lies_between_bound_and_cost() {
    for seed in 1..=4 {
        let shape = Shape { groups: 60, sites: 8, candidates: 6, fill: 0.6, load: Load::Pareto, seed };
        let instance = spread(&generate::instance(&shape).unwrap(), 6.0);
        let whole = optimum(&instance, false).unwrap();
        let divisible = optimum(&instance, true).unwrap();
        let certificate = Solver::new(instance).solve(Start::Cold);
        assert!(certificate.exceeded.is_empty() && certificate.crowded.is_empty(), "{certificate:?}");
        assert!(certificate.bound <= divisible * (1.0 + 1e-6), "{certificate:?}, LP {divisible}");
        assert!(certificate.cost >= whole * (1.0 - 1e-6), "{certificate:?}, optimum {whole}");
        eprintln!(
            "seed {seed}: cost {:.3} % above the optimum, bound {:.3} % below the LP",
            (certificate.cost / whole - 1.0) * 100.0,
            (1.0 - certificate.bound / divisible) * 100.0
        );
    }
}
