//! Groups that are to be spread, against every placement there is.

use proptest::prelude::*;

use super::tests::{Small, check_round, small};
use super::{
    Candidate, Class, Group, Instance, InstanceError, PerResource, Prices, RESOURCES, Site, Solver, Start,
    bound, bound_with,
};

/// A small instance whose groups are in one of two classes, or in none.
#[derive(Clone, Debug)]
struct Classed {
    small: Small,
    /// By class: the cell of each site, and the limit of each cell.
    classes: Vec<(Vec<u8>, Vec<f64>)>,
    class_of: Vec<Option<usize>>,
}

impl Classed {
    fn instance(&self, rooms: bool) -> Instance {
        let wide = [f64::INFINITY; RESOURCES];
        let site = |&capacity: &PerResource<f64>| Site {
            capacity: if rooms { capacity } else { wide },
            headroom: 0.0,
        };
        let mut instance = Instance::new(&self.small.rooms.iter().map(site).collect::<Vec<_>>()).unwrap();
        let add = |(cells, limits): &(Vec<u8>, Vec<f64>)| instance.add_class(cells, limits).unwrap();
        let classes: Vec<Class> = self.classes.iter().map(add).collect();
        for (group, class) in self.small.groups.iter().zip(&self.class_of) {
            let class = class.map(|class| classes[class]);
            let candidates = &group.candidates[..];
            let (weight, demand, present, charge) = (group.weight, group.demand, group.present, group.charge);
            let left_out_ms = f32::INFINITY;
            let group = Group { weight, demand, present, charge, left_out_ms, class, candidates };
            instance.push(&group).unwrap();
        }
        instance
    }

    /// The cost of the best placement within rooms and limits, by trying all.
    fn optimum(&self, instance: &Instance) -> Option<f64> {
        let mut choices = vec![0; instance.groups()];
        let mut best: Option<f64> = None;
        loop {
            if let Some(cost) = self.cost(instance, &choices) {
                best = Some(best.map_or(cost, |best| best.min(cost)));
            }
            let lens = (0..instance.groups()).map(|group| instance.candidates(group).len());
            let mut more = false;
            for (choice, len) in choices.iter_mut().zip(lens) {
                *choice += 1;
                if *choice < len {
                    more = true;
                    break;
                }
                *choice = 0;
            }
            if !more {
                return best;
            }
        }
    }

    /// What a placement costs; nothing when it breaks a room or a limit.
    fn cost(&self, instance: &Instance, choices: &[usize]) -> Option<f64> {
        let mut load = vec![[0.0; RESOURCES]; instance.sites()];
        let mut count = vec![[0.0; 8]; self.classes.len()];
        let mut cost = 0.0;
        for (group, &choice) in choices.iter().enumerate() {
            let site = instance.candidates(group).nth(choice)?.site;
            let demand = instance.demand(group);
            (0..RESOURCES).for_each(|r| load[usize::from(site)][r] += f64::from(demand[r]));
            if let Some(class) = self.class_of[group] {
                count[class][usize::from(self.classes[class].0[usize::from(site)])] += 1.0;
            }
            cost += instance.cost(group, choice);
        }
        let fits = load.iter().zip(0..).all(|(load, site)| {
            let room = instance.room(site);
            (0..RESOURCES).all(|r| load[r] <= room[r] + 1e-9)
        });
        let spread = count
            .iter()
            .zip(&self.classes)
            .all(|(count, (_, limits))| count.iter().zip(limits).all(|(count, limit)| count <= limit));
        (fits && spread).then_some(cost)
    }
}

fn classed(unit: bool) -> impl Strategy<Value = Classed> {
    let class = || {
        let limits =
            proptest::collection::vec(prop_oneof![(0_u8..4).prop_map(f64::from), Just(f64::INFINITY)], 3);
        (proptest::collection::vec(0_u8..3, 4), limits)
    };
    let class_of = proptest::collection::vec(proptest::option::of(0_usize..2), 6);
    (small(unit), class(), class(), class_of).prop_map(|(small, a, b, mut class_of)| {
        class_of.truncate(small.groups.len());
        let cut = |(mut cells, limits): (Vec<u8>, Vec<f64>)| {
            cells.truncate(small.rooms.len());
            (cells, limits)
        };
        Classed { classes: vec![cut(a), cut(b)], class_of, small }
    })
}

/// Counted anew, the certificate names every cell with too many, and no other.
fn check_crowds(solver: &Solver, crowded: &[(Class, u8, f64)]) -> Result<(), TestCaseError> {
    let instance = solver.instance();
    let mut found = Vec::new();
    for class in instance.classes() {
        let mut count = [0_u32; 8];
        let mut limits = [f64::INFINITY; 8];
        for site in 0..instance.sites() as u8 {
            let (cell, limit) = instance.cell(class, site);
            limits[usize::from(cell)] = limit;
        }
        for group in (0..instance.groups()).filter(|&group| instance.class(group) == Some(class)) {
            if let Some(site) = solver.site(group) {
                count[usize::from(instance.cell(class, site).0)] += 1;
            }
        }
        for (cell, (&count, limit)) in count.iter().zip(limits).enumerate() {
            if f64::from(count) > limit {
                found.push((class, cell as u8, f64::from(count) - limit));
            }
            if limit.is_finite() {
                prop_assert_eq!(solver.count(class, cell as u8), count);
            }
        }
    }
    prop_assert_eq!(found, crowded);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_bound_holds_with_classes_and_no_placement_beats_it(classed in classed(false)) {
        let instance = classed.instance(true);
        let mut solver = Solver::new(instance.clone());
        let certificate = solver.solve(Start::Cold);
        check_round(&solver, false, certificate.exceeded.len())?;
        check_crowds(&solver, &certificate.crowded)?;
        let holds = certificate.exceeded.is_empty() && certificate.crowded.is_empty();
        prop_assert_eq!(bound_with(&instance, &solver.all_prices()), certificate.bound);
        match classed.optimum(&instance) {
            Some(optimum) => {
                prop_assert!(certificate.bound <= optimum + 1e-6, "{certificate:?}, optimum {optimum}");
                prop_assert!(!holds || certificate.cost >= optimum - 1e-6, "{certificate:?}, optimum {optimum}");
            }
            None => prop_assert!(!holds, "{certificate:?}, but nothing holds"),
        }
    }

    #[test]
    fn any_prices_of_classes_give_a_bound(
        classed in classed(false),
        sites in proptest::collection::vec([0.0..100.0, 0.0..100.0, 0.0..100.0], 4),
        classes in proptest::collection::vec(proptest::collection::vec(0.0..1000.0, 0..4), 0..3),
    ) {
        let instance = classed.instance(true);
        if let Some(optimum) = classed.optimum(&instance) {
            // A price of a limit that is infinite would be worth everything; then the bound says nothing, but is true.
            let prices = Prices { sites: sites[..instance.sites()].to_vec(), classes };
            prop_assert!(bound_with(&instance, &prices) <= optimum + 1e-6);
        }
    }

    #[test]
    fn with_wide_rooms_a_limit_is_only_exceeded_when_it_must_be(classed in classed(false)) {
        let instance = classed.instance(false);
        let mut solver = Solver::new(instance.clone());
        let certificate = solver.solve(Start::Cold);
        let possible = classed.optimum(&instance).is_some();
        prop_assert_eq!(certificate.crowded.is_empty(), possible, "{:?}", certificate);
        for (class, cell, _) in certificate.crowded {
            let conflict = solver.class_conflict(class, cell).expect("rooms are wide");
            prop_assert!(conflict.groups.len() as u64 > conflict.limit);
            let limit: f64 = conflict.cells.iter().map(|&cell| classed.classes[class.index()].1[usize::from(cell)]).sum();
            prop_assert_eq!(conflict.limit as f64, limit);
            for &group in &conflict.groups {
                prop_assert_eq!(instance.class(group as usize), Some(class));
                let inside = |candidate: Candidate| conflict.cells.contains(&instance.cell(class, candidate.site).0);
                prop_assert!(instance.candidates(group as usize).all(inside), "group {group} could be elsewhere");
            }
        }
    }

    #[test]
    fn later_rounds_keep_the_limits_too(
        classed in classed(true),
        closed in 0_u8..4,
        changes in proptest::collection::vec(0_usize..6, 0..4),
    ) {
        let mut solver = Solver::new(classed.instance(false));
        let cold = solver.solve(Start::Cold);
        solver.adopt();
        for group in changes {
            solver.set_demand(group % classed.small.groups.len(), 3.0, [2.0, 0.0, 1.0]).unwrap();
        }
        let touched = solver.solve(Start::Touched);
        check_crowds(&solver, &touched.crowded)?;
        prop_assert!(touched.crowded.is_empty() || !cold.crowded.is_empty(), "{touched:?}");
        solver.set_open(closed % classed.small.rooms.len() as u8, false);
        let warm = solver.solve(Start::Warm);
        check_crowds(&solver, &warm.crowded)?;
        for (class, cell, _) in warm.crowded {
            prop_assert!(solver.class_conflict(class, cell).is_some());
        }
    }
}

/// Two sites with costs of 1 and 5 ms for each of some groups of weight 10, of which so many may be at a site.
fn pair(groups: usize, limit: f64) -> Solver {
    let site = Site { capacity: [1e6; RESOURCES], headroom: 0.0 };
    let mut instance = Instance::new(&[site, site]).unwrap();
    let class = Some(instance.add_class(&[0, 1], &[limit, limit]).unwrap());
    let candidates = [Candidate { site: 0, cost_ms: 1.0 }, Candidate { site: 1, cost_ms: 5.0 }];
    for _ in 0..groups {
        let (weight, demand, left_out_ms) = (10.0, [10.0, 1.0, 1.0], f32::INFINITY);
        let group =
            Group { weight, demand, present: None, charge: 0.0, left_out_ms, class, candidates: &candidates };
        instance.push(&group).unwrap();
    }
    Solver::new(instance)
}

#[test]
fn prices_of_a_class_prove_the_spread_to_be_best() {
    let mut solver = pair(6, 3.0);
    let certificate = solver.solve(Start::Cold);
    assert!(certificate.crowded.is_empty(), "{certificate:?}");
    assert_eq!(certificate.cost, 3.0 * 10.0 + 3.0 * 50.0);
    assert!(certificate.gap() < 1e-6, "{certificate:?}");
    assert!((solver.all_prices().classes[0][0] - 40.0).abs() < 1e-3, "{:?}", solver.all_prices());
    // Without these prices the bound holds too, but is lower.
    assert!(bound(solver.instance(), &solver.prices()) < certificate.bound);
}

#[test]
fn a_class_that_is_too_large_is_named_with_its_cells() {
    let mut solver = pair(7, 3.0);
    let certificate = solver.solve(Start::Cold);
    let [(class, cell, by)] = certificate.crowded[..] else { panic!("{certificate:?}") };
    assert_eq!((class.index(), by), (0, 1.0));
    assert!(certificate.gap().is_nan());
    let conflict = solver.class_conflict(class, cell).unwrap();
    assert_eq!((conflict.cells, conflict.limit, conflict.groups.len()), (vec![0, 1], 6, 7));
}

#[test]
fn prices_of_classes_are_taken_up_by_the_next_leader() {
    let mut old = pair(6, 3.0);
    old.solve(Start::Cold);
    let mut new = pair(6, 3.0);
    new.set_all_prices(&old.all_prices());
    assert_eq!(new.all_prices(), old.all_prices());
    assert!(new.solve(Start::Warm).gap() < 1e-6);
    // What makes no sense is taken as none.
    new.set_all_prices(&Prices { sites: Vec::new(), classes: vec![vec![f64::NAN, -1.0, 2.0]] });
    assert_eq!(new.all_prices().classes, [[0.0, 0.0]]);
}

#[test]
fn classes_that_make_no_sense_are_named() {
    let site = Site { capacity: [1.0; RESOURCES], headroom: 0.0 };
    let mut instance = Instance::new(&[site, site]).unwrap();
    let message = |result: Result<Class, InstanceError>| result.unwrap_err().to_string();
    assert_eq!(
        message(instance.add_class(&[0], &[1.0])),
        "a class names the cells of 1 sites: give 2, one per site"
    );
    assert_eq!(message(instance.add_class(&[0, 2], &[1.0])), "site 1: cell 2 has no limit, 1 are given");
    assert_eq!(
        message(instance.add_class(&[0, 0], &[f64::NAN])),
        "cell 0: NaN is no number of groups: give 0 or more"
    );
    assert_eq!(instance.classes().len(), 0);
    for _ in 0..super::CLASSES_MAX {
        instance.add_class(&[0, 0], &[1.0]).unwrap();
    }
    assert_eq!(message(instance.add_class(&[0, 0], &[1.0])), "more than 64 classes");
    let mut other = Instance::new(&[site]).unwrap();
    let class = instance.classes().next();
    let candidates = &[Candidate { site: 0, cost_ms: 1.0 }];
    let group = Group {
        weight: 1.0,
        demand: [1.0; RESOURCES],
        present: None,
        charge: 0.0,
        left_out_ms: f32::INFINITY,
        class,
        candidates,
    };
    assert_eq!(other.push(&group).unwrap_err().to_string(), "group 0: there is no class 0");
}
