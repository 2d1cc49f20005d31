//! Standby sites, against what must hold of any of them.

use proptest::prelude::*;

use super::generate::{self, Load, Shape};
use super::survive::{Needs, NeedsError, Standbys, Unprotected, standbys};
use super::tests::{Small, check_round, small};
use super::{Candidate, Group, Instance, PerResource, RESOURCES, Site, Solver, Start};

/// A small instance, what its sites can carry after a loss, and who needs a standby.
#[derive(Clone, Debug)]
struct Case {
    small: Small,
    capacity: Vec<PerResource<f64>>,
    domain: Vec<u8>,
    standby: Vec<Option<u8>>,
    wanted: Vec<bool>,
}

impl Case {
    fn needs(&self) -> Needs<'_> {
        let Self { capacity, domain, standby, wanted, .. } = self;
        Needs { capacity, domain, standby, wanted, among: None, beside: None }
    }
}

fn case(unit: bool) -> impl Strategy<Value = Case> {
    let factor = proptest::collection::vec(1.0..2.5_f64, 4);
    let domain = proptest::collection::vec(0_u8..3, 4);
    let standby = proptest::collection::vec(proptest::option::of(0_u8..4), 6);
    let wanted = proptest::collection::vec(prop_oneof![3 => Just(true), 1 => Just(false)], 6);
    (small(unit), factor, domain, standby, wanted).prop_map(
        |(small, factor, mut domain, mut standby, mut wanted)| {
            domain.truncate(small.rooms.len());
            standby.truncate(small.groups.len());
            wanted.truncate(small.groups.len());
            let capacity =
                small.rooms.iter().zip(factor).map(|(room, by)| room.map(|room| room * by)).collect();
            Case { small, capacity, domain, standby, wanted }
        },
    )
}

/// What comes to each site when a domain is lost.
fn comes(solver: &Solver, needs: &Needs<'_>, standby: &[Option<u8>], domain: u8) -> Vec<PerResource<f64>> {
    let mut comes = vec![[0.0; RESOURCES]; solver.instance().sites()];
    for (group, to) in standby.iter().enumerate() {
        let lost = solver.site(group).is_some_and(|site| needs.domain[usize::from(site)] == domain);
        if let Some(to) = to.filter(|_| lost) {
            let demand = solver.instance().demand(group);
            (0..RESOURCES).for_each(|r| comes[usize::from(to)][r] += f64::from(demand[r]));
        }
    }
    comes
}

/// Whether sites carry what comes, where something comes.
fn holds(solver: &Solver, needs: &Needs<'_>, comes: &[PerResource<f64>]) -> bool {
    comes.iter().zip(0..).all(|(comes, site)| {
        let (load, capacity) = (solver.load(site), needs.capacity[usize::from(site)]);
        (0..RESOURCES).all(|r| comes[r] == 0.0 || load[r] + comes[r] <= capacity[r] * (1.0 + 1e-6))
    })
}

/// What must hold of standby sites.
fn check(solver: &Solver, needs: &Needs<'_>, found: &Standbys) -> Result<(), TestCaseError> {
    let instance = solver.instance();
    let domains = |site: u8| needs.domain[usize::from(site)];
    let possible = |group: usize, owner: u8| {
        let open = instance.candidates(group).map(|one| one.site).filter(|&site| instance.is_open(site));
        open.filter(move |&site| domains(site) != domains(owner)).collect::<Vec<u8>>()
    };
    let mut unprotected = Vec::new();
    for group in 0..instance.groups() {
        let owner = solver.site(group).filter(|_| needs.wanted[group]);
        match (owner, found.sites[group]) {
            (None, standby) => prop_assert_eq!(standby, None, "group {} needs none", group),
            (Some(owner), Some(standby)) => {
                prop_assert!(possible(group, owner).contains(&standby), "group {group}: {owner}, {standby}");
            }
            (Some(owner), None) => {
                unprotected.push(Unprotected { group: group as u32, domain: domains(owner) })
            }
        }
    }
    unprotected.sort_by_key(|one| (one.domain, one.group));
    prop_assert_eq!(&found.unprotected, &unprotected);
    for domain in 0..4 {
        let comes = comes(solver, needs, &found.sites, domain);
        prop_assert!(holds(solver, needs, &comes), "domain {domain}: {comes:?} comes, {found:?}");
        // Whoever is unprotected finds room at no single site.
        for group in unprotected.iter().filter(|one| one.domain == domain).map(|one| one.group as usize) {
            for site in possible(group, solver.site(group).expect("is somewhere")) {
                let (load, capacity) = (solver.load(site), needs.capacity[usize::from(site)]);
                let fits = (0..RESOURCES).all(|r| {
                    let demand = f64::from(instance.demand(group)[r]);
                    demand == 0.0
                        || load[r] + comes[usize::from(site)][r] + demand <= capacity[r] * (1.0 - 1e-6)
                });
                prop_assert!(!fits, "group {group} has room at {site}: {found:?}");
            }
        }
    }
    for loss in &found.losses {
        let of_domain = unprotected.iter().filter(|one| one.domain == loss.domain);
        prop_assert_eq!(loss.unprotected, of_domain.count());
        prop_assert!(loss.fullest.is_none_or(|(_, _, fill)| fill <= 1.0 + 1e-6), "{loss:?}");
    }
    Ok(())
}

/// Whether all groups of one domain that need a standby can have one, by trying all.
fn all_can(solver: &Solver, needs: &Needs<'_>, domain: u8) -> bool {
    fn rest(
        solver: &Solver,
        needs: &Needs<'_>,
        domain: u8,
        groups: &[usize],
        sites: &mut [Option<u8>],
    ) -> bool {
        let Some((&group, groups)) = groups.split_first() else { return true };
        let candidates: Vec<u8> = solver.instance().candidates(group).map(|one| one.site).collect();
        candidates.into_iter().any(|site| {
            sites[group] = Some(site);
            let found = solver.instance().is_open(site)
                && needs.domain[usize::from(site)] != domain
                && holds(solver, needs, &comes(solver, needs, sites, domain))
                && rest(solver, needs, domain, groups, sites);
            sites[group] = None;
            found
        })
    }
    let lost = |group: &usize| {
        needs.wanted[*group]
            && solver.site(*group).is_some_and(|site| needs.domain[usize::from(site)] == domain)
    };
    let groups: Vec<usize> = (0..solver.instance().groups()).filter(lost).collect();
    rest(solver, needs, domain, &groups, &mut vec![None; solver.instance().groups()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_loss_brings_no_site_more_than_it_can_carry(case in case(false)) {
        let mut solver = Solver::new(case.small.instance());
        solver.solve(Start::Cold);
        let found = standbys(&solver, &case.needs()).unwrap();
        check(&solver, &case.needs(), &found)?;
        prop_assert_eq!(&standbys(&solver, &case.needs()).unwrap(), &found);
    }

    #[test]
    fn a_standby_that_holds_is_kept(case in case(false)) {
        let mut solver = Solver::new(case.small.instance());
        solver.solve(Start::Cold);
        let first = standbys(&solver, &case.needs()).unwrap();
        let needs = Needs { standby: &first.sites, ..case.needs() };
        let second = standbys(&solver, &needs).unwrap();
        for group in 0..first.sites.len() {
            let lost = first.sites[group].is_some() && second.sites[group].is_none();
            prop_assert!(!lost, "group {group}: {first:?}, then {second:?}");
        }
        if first.unprotected.is_empty() {
            prop_assert_eq!(first.sites, second.sites);
        }
    }

    #[test]
    fn groups_of_one_size_are_all_protected_when_they_can_be(case in case(true)) {
        let mut solver = Solver::new(case.small.instance());
        solver.solve(Start::Cold);
        let found = standbys(&solver, &case.needs()).unwrap();
        check(&solver, &case.needs(), &found)?;
        for loss in &found.losses {
            prop_assert_eq!(loss.unprotected == 0, all_can(&solver, &case.needs(), loss.domain), "{:?}", loss);
        }
    }

    #[test]
    fn a_round_that_leaves_room_is_lawful_and_protects_no_less(case in case(false)) {
        let mut solver = Solver::new(case.small.instance());
        let plain = solver.solve(Start::Cold);
        let before = standbys(&solver, &case.needs()).unwrap();
        let mut solver = Solver::new(case.small.instance());
        let (certificate, found) = solver.solve_to_survive(Start::Cold, &case.needs()).unwrap();
        check_round(&solver, false, certificate.exceeded.len())?;
        check(&solver, &case.needs(), &found)?;
        prop_assert!(certificate.exceeded.len() <= plain.exceeded.len());
        if certificate.exceeded.len() == plain.exceeded.len() && plain.exceeded.is_empty() {
            prop_assert!(found.unprotected_weight() <= before.unprotected_weight() * (1.0 + 1e-6));
        }
        if let (true, Some(optimum)) = (certificate.exceeded.is_empty(), case.small.optimum(solver.instance())) {
            prop_assert!(certificate.bound <= optimum + 1e-6 && optimum <= certificate.cost + 1e-6);
        }
        for (room, site) in case.small.rooms.iter().zip(0..) {
            prop_assert_eq!(*room, solver.instance().room(site));
        }
        let mut again = Solver::new(case.small.instance());
        prop_assert_eq!(again.solve_to_survive(Start::Cold, &case.needs()).unwrap(), (certificate, found));
    }
}

/// Three sites of capacity 30 with 20 of it to be used, and four groups of 10 that are nearest to the first, then to the second.
fn crowd_at_the_first() -> (Solver, Vec<PerResource<f64>>) {
    let wide = f64::INFINITY;
    let site = Site { capacity: [20.0, wide, wide], headroom: 0.0 };
    let mut instance = Instance::new(&[site; 3]).unwrap();
    let candidates = [1.0, 2.0, 8.0].into_iter().zip(0..).map(|(cost_ms, site)| Candidate { site, cost_ms });
    let candidates: Vec<Candidate> = candidates.collect();
    for _ in 0..4 {
        let (weight, demand, left_out_ms) = (10.0, [10.0, 0.0, 0.0], f32::INFINITY);
        let (present, charge, class) = (None, 0.0, None);
        let candidates = &candidates;
        instance.push(&Group { weight, demand, present, charge, left_out_ms, class, candidates }).unwrap();
    }
    (Solver::new(instance), vec![[25.0, wide, wide]; 3])
}

#[test]
fn a_placement_that_leaves_no_room_for_a_loss_is_changed() {
    let (mut solver, capacity) = crowd_at_the_first();
    let needs = Needs {
        capacity: &capacity,
        domain: &[0, 1, 2],
        standby: &[None; 4],
        wanted: &[true; 4],
        among: None,
        beside: None,
    };
    solver.solve(Start::Cold);
    // Two at each of the near sites: with one of them lost, the third has room for two.
    let near = standbys(&solver, &needs).unwrap();
    assert!(near.unprotected.is_empty(), "{near:?}");
    assert_eq!(near.sites, [Some(2); 4]);
    // With room for one there, one of the two goes without.
    let capacity: Vec<_> = capacity.iter().map(|_| [20.0, f64::INFINITY, f64::INFINITY]).collect();
    let tight: Vec<_> =
        capacity.iter().enumerate().map(|(n, c)| if n == 2 { [10.0, c[1], c[2]] } else { *c }).collect();
    let needs = Needs { capacity: &tight, ..needs };
    assert_eq!(standbys(&solver, &needs).unwrap().unprotected.len(), 2);
}

#[test]
fn generated_networks_get_room_for_the_loss_of_any_site() {
    for seed in 1..4 {
        let instance = generate::instance(&Shape {
            groups: 3_000,
            sites: 20,
            candidates: 12,
            fill: 0.9,
            load: Load::Pareto,
            seed,
        })
        .unwrap();
        // The rooms are 0.9 of what sites can carry after a loss.
        let capacity: Vec<_> = (0..20).map(|site| instance.room(site).map(|room| room / 0.9)).collect();
        let domain: Vec<u8> = (0..20).collect();
        let (standby, wanted) = (vec![None; 3_000], vec![true; 3_000]);
        let needs = Needs {
            capacity: &capacity,
            domain: &domain,
            standby: &standby,
            wanted: &wanted,
            among: None,
            beside: None,
        };
        let mut plain = Solver::new(instance.clone());
        plain.solve(Start::Cold);
        let before = standbys(&plain, &needs).unwrap();
        let mut solver = Solver::new(instance);
        let (certificate, found) = solver.solve_to_survive(Start::Cold, &needs).unwrap();
        eprintln!(
            "seed {seed}: {} unprotected, {} with room for a loss, gap {:.2} %",
            before.unprotected.len(),
            found.unprotected.len(),
            certificate.gap() * 100.0
        );
        assert!(certificate.exceeded.is_empty(), "{certificate:?}");
        assert!(found.unprotected_weight() <= before.unprotected_weight());
        check(&solver, &needs, &found).unwrap();
        // A round that looks at few does not fill what was left free.
        for group in (0..3_000).step_by(100) {
            let (weight, demand) = (solver.instance().weight(group), solver.instance().demand(group));
            solver.set_demand(group, weight, demand).unwrap();
        }
        assert!(solver.solve(Start::Touched).exceeded.is_empty());
        let later = standbys(&solver, &needs).unwrap();
        eprintln!("seed {seed}: {} unprotected, later {}", found.unprotected.len(), later.unprotected.len());
        let lost = before.unprotected_weight() - found.unprotected_weight();
        assert!(later.unprotected_weight() <= found.unprotected_weight() + 0.1 * lost);
    }
}

#[test]
fn needs_that_do_not_fit_are_named() {
    let (mut solver, capacity) = crowd_at_the_first();
    solver.solve(Start::Cold);
    let needs = Needs {
        capacity: &capacity,
        domain: &[0, 1, 2],
        standby: &[None; 4],
        wanted: &[true; 4],
        among: None,
        beside: None,
    };
    let message = |needs: Needs<'_>| standbys(&solver, &needs).unwrap_err().to_string();
    assert_eq!(message(Needs { domain: &[0], ..needs }), "1 values of domain: give 3");
    assert_eq!(message(Needs { wanted: &[], ..needs }), "0 values of wanted: give 4");
    let wrong = vec![[f64::NAN; RESOURCES]; 3];
    let refused = standbys(&solver, &Needs { capacity: &wrong, ..needs });
    assert!(matches!(refused, Err(NeedsError::Capacity { site: 0, .. })), "{refused:?}");
}
