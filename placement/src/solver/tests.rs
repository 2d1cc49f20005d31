//! The solver against every placement there is, on instances small enough to look at all of them.

use proptest::prelude::*;

use super::generate::{self, Load, Shape};
use super::{
    Candidate, Group, Instance, InstanceError, PerResource, RESOURCES, Site, Solver, Start, bound, greedy,
};

/// One random instance of up to 6 groups and 4 sites.
#[derive(Clone, Debug)]
pub(super) struct Small {
    pub(super) rooms: Vec<PerResource<f64>>,
    pub(super) groups: Vec<SmallGroup>,
}

#[derive(Clone, Debug)]
pub(super) struct SmallGroup {
    pub(super) weight: f32,
    pub(super) demand: PerResource<f32>,
    pub(super) present: Option<u8>,
    pub(super) charge: f32,
    pub(super) candidates: Vec<Candidate>,
}

impl SmallGroup {
    fn as_given(&self) -> Group<'_> {
        let Self { weight, demand, present, charge, ref candidates } = *self;
        Group { weight, demand, present, charge, left_out_ms: f32::INFINITY, class: None, candidates }
    }
}

impl Small {
    pub(super) fn instance(&self) -> Instance {
        let sites: Vec<Site> = self.rooms.iter().map(|&capacity| Site { capacity, headroom: 0.0 }).collect();
        let mut instance = Instance::new(&sites).unwrap();
        for group in &self.groups {
            instance.push(&group.as_given()).unwrap();
        }
        instance
    }

    /// The cost of the best placement within the rooms, by trying all; `None` when there is none.
    pub(super) fn optimum(&self, instance: &Instance) -> Option<f64> {
        fn rest(
            small: &Small,
            instance: &Instance,
            group: usize,
            load: &mut [PerResource<f64>],
        ) -> Option<f64> {
            let Some(present) = small.groups.get(group) else { return Some(0.0) };
            let mut best: Option<f64> = None;
            for (choice, candidate) in present.candidates.iter().enumerate() {
                let site = usize::from(candidate.site);
                let fits =
                    |r: usize| load[site][r] + f64::from(present.demand[r]) <= small.rooms[site][r] + 1e-9;
                if !(0..RESOURCES).all(fits) {
                    continue;
                }
                (0..RESOURCES).for_each(|r| load[site][r] += f64::from(present.demand[r]));
                if let Some(others) = rest(small, instance, group + 1, load) {
                    let cost = others + instance.cost(group, choice);
                    best = Some(best.map_or(cost, |best| best.min(cost)));
                }
                (0..RESOURCES).for_each(|r| load[site][r] -= f64::from(present.demand[r]));
            }
            best
        }
        rest(self, instance, 0, &mut vec![[0.0; RESOURCES]; self.rooms.len()])
    }
}

prop_compose! {
    fn small_group(sites: u8, unit: bool)(
        weight in 0_u8..20,
        demand in [1_u8..10, 0_u8..4, 0_u8..4],
        present in proptest::option::of(0..sites),
        charge in 0_u8..50,
        costs in proptest::collection::vec(1_u16..500, usize::from(sites)),
        mask in 1_u8..(1 << sites),
    ) -> SmallGroup {
        let demand = if unit { [1.0, 0.0, 0.0] } else { demand.map(f32::from) };
        let candidates = (0..sites)
            .filter(|site| mask & (1 << site) != 0)
            .map(|site| Candidate { site, cost_ms: f32::from(costs[usize::from(site)]) })
            .collect();
        SmallGroup { weight: f32::from(weight), demand, present, charge: f32::from(charge), candidates }
    }
}

pub(super) fn small(unit: bool) -> impl Strategy<Value = Small> {
    (1_u8..=4).prop_flat_map(move |sites| {
        let room = if unit { [0_u8..5, 9..10, 9..10] } else { [2_u8..30, 1..12, 1..12] };
        let rooms = proptest::collection::vec(room.prop_map(|room| room.map(f64::from)), usize::from(sites));
        let groups = proptest::collection::vec(small_group(sites, unit), 1..7);
        (rooms, groups).prop_map(|(rooms, groups)| Small { rooms, groups })
    })
}

/// What must hold of any round.
pub(super) fn check_round(
    solver: &Solver,
    exceeded_allowed: bool,
    exceeded: usize,
) -> Result<(), TestCaseError> {
    let instance = solver.instance();
    let mut load = vec![[0.0_f64; RESOURCES]; instance.sites()];
    for group in 0..instance.groups() {
        let candidates: Vec<u8> =
            instance.candidates(group).map(|c| c.site).filter(|&site| instance.is_open(site)).collect();
        match solver.site(group) {
            Some(site) => {
                prop_assert!(
                    candidates.contains(&site),
                    "group {group} at {site}, not one of {candidates:?}"
                );
                let demand = instance.demand(group);
                (0..RESOURCES).for_each(|r| load[usize::from(site)][r] += f64::from(demand[r]));
            }
            None => {
                prop_assert!(candidates.is_empty(), "group {group} is nowhere, but may be at {candidates:?}")
            }
        }
    }
    for (site, load) in load.iter().enumerate() {
        let room = instance.room(site as u8);
        for r in 0..RESOURCES {
            let kept = solver.load(site as u8)[r];
            prop_assert!(
                (kept - load[r]).abs() <= 1e-6 * (1.0 + load[r]),
                "load {kept} is kept, {} is right",
                load[r]
            );
            prop_assert!(exceeded_allowed || exceeded > 0 || load[r] <= room[r] * (1.0 + 1e-6));
        }
    }
    for price in solver.prices().iter().flatten() {
        prop_assert!(price.is_finite() && *price >= 0.0, "price {price}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_bound_never_exceeds_the_optimum_and_no_placement_beats_it(small in small(false)) {
        let instance = small.instance();
        let mut solver = Solver::new(instance.clone());
        let certificate = solver.solve(Start::Cold);
        check_round(&solver, false, certificate.exceeded.len())?;
        if let Some(optimum) = small.optimum(&instance) {
            prop_assert!(certificate.bound <= optimum + 1e-6, "{certificate:?}, optimum {optimum}");
            if certificate.exceeded.is_empty() {
                prop_assert!(certificate.cost >= optimum - 1e-6, "{certificate:?}, optimum {optimum}");
            }
        } else {
            prop_assert!(!certificate.exceeded.is_empty(), "{certificate:?}, but nothing fits");
        }
    }

    #[test]
    fn the_bound_counts_with_sites_that_were_left_out(small in small(false), keep in 1_usize..4) {
        let Some(optimum) = small.optimum(&small.instance()) else { return Ok(()) };
        let mut few = Instance::new(&small.rooms.iter().map(|&capacity| Site { capacity, headroom: 0.0 }).collect::<Vec<_>>()).unwrap();
        for group in &small.groups {
            let mut candidates = group.candidates.clone();
            candidates.sort_by(|a, b| a.cost_ms.total_cmp(&b.cost_ms));
            let left_out_ms = candidates.get(keep).map_or(f32::INFINITY, |best| best.cost_ms);
            candidates.truncate(keep);
            let SmallGroup { weight, demand, present, charge, .. } = *group;
            few.push(&Group { weight, demand, present, charge, left_out_ms, class: None, candidates: &candidates }).unwrap();
        }
        let mut solver = Solver::new(few);
        let certificate = solver.solve(Start::Cold);
        prop_assert!(certificate.bound <= optimum + 1e-6, "{certificate:?}, optimum {optimum}");
        for (site, _, _) in certificate.exceeded {
            prop_assert!(solver.conflict(site).is_none(), "{small:?} holds with the sites that were left out");
        }
    }

    #[test]
    fn any_prices_give_a_bound(small in small(false), prices in proptest::collection::vec([0.0..100.0, 0.0..100.0, 0.0..100.0], 4)) {
        let instance = small.instance();
        if let Some(optimum) = small.optimum(&instance) {
            prop_assert!(bound(&instance, &prices[..instance.sites()]) <= optimum + 1e-6);
        }
    }

    #[test]
    fn groups_of_one_size_never_exceed_what_could_hold_them(small in small(true)) {
        let instance = small.instance();
        let mut solver = Solver::new(instance.clone());
        let certificate = solver.solve(Start::Cold);
        prop_assert_eq!(certificate.exceeded.is_empty(), small.optimum(&instance).is_some(), "{:?}", certificate);
    }

    #[test]
    fn a_conflict_is_a_proof(small in small(true)) {
        let instance = small.instance();
        let mut solver = Solver::new(instance.clone());
        for (site, _, _) in solver.solve(Start::Cold).exceeded {
            let conflict = solver.conflict(site).expect("groups of one size");
            let r = conflict.resource as usize;
            let room: f64 = conflict.sites.iter().map(|&site| instance.room(site)[r]).sum();
            let demand: f64 = conflict.groups.iter().map(|&g| f64::from(instance.demand(g as usize)[r])).sum();
            prop_assert!(demand > room, "{demand} fits {room}");
            for &group in &conflict.groups {
                let inside = instance.candidates(group as usize).all(|c| conflict.sites.contains(&c.site));
                prop_assert!(inside, "group {group} could be elsewhere");
            }
        }
    }

    /// A group that is larger than any place it may be at is named, whatever else is there.
    #[test]
    fn a_group_that_fits_nowhere_is_named(small in small(false), which in 0_usize..6, beyond in 1.01_f32..3.0) {
        let mut small = small;
        let which = which % small.groups.len();
        let rooms = &small.rooms;
        let group = &mut small.groups[which];
        let most = group.candidates.iter().map(|there| rooms[usize::from(there.site)][0]).fold(0.0, f64::max);
        prop_assume!(most.is_finite() && !group.candidates.is_empty());
        group.demand[0] = (most as f32 + 1.0) * beyond;
        let mut solver = Solver::new(small.instance());
        let certificate = solver.solve(Start::Cold);
        let at = solver.site(which).expect("it has candidates");
        prop_assert!(certificate.exceeded.iter().any(|(site, _, _)| *site == at), "{certificate:?}");
        let conflict = solver.conflict(at).expect("it fits nowhere");
        let named = solver.instance();
        for &site in &conflict.sites {
            let demand = named.demand(conflict.groups[0] as usize);
            let larger = (0..RESOURCES).any(|r| f64::from(demand[r]) > named.room(site)[r]);
            prop_assert!(larger, "{conflict:?}");
        }
        let all = named.candidates(conflict.groups[0] as usize).all(|there| conflict.sites.contains(&there.site));
        prop_assert!(conflict.groups.len() == 1 && all, "{conflict:?}");
    }

    /// Where all places are as good, whatever is full, the placement is the best, and that is known.
    #[test]
    fn where_all_places_cost_the_same_the_gap_is_none(groups in 2_usize..60, sites in 2_u8..6, fill in 0.5_f64..0.96) {
        let room = groups as f64 * 10.0 / (f64::from(sites) * fill);
        let site = Site { capacity: [room, f64::INFINITY, f64::INFINITY], headroom: 0.0 };
        let mut instance = Instance::new(&vec![site; usize::from(sites)]).unwrap();
        let candidates: Vec<Candidate> = (0..sites).map(|site| Candidate { site, cost_ms: 20.0 }).collect();
        for n in 0..groups {
            let demand = [5.0 + (n * 7 % 11) as f32, 0.0, 0.0];
            let (present, charge, left_out_ms) = (None, 0.0, f32::INFINITY);
            let group = Group { weight: demand[0], demand, present, charge, left_out_ms, class: None, candidates: &candidates };
            instance.push(&group).unwrap();
        }
        let certificate = Solver::new(instance).solve(Start::Cold);
        prop_assume!(certificate.exceeded.is_empty());
        prop_assert!(certificate.gap() < 1e-9 && certificate.bound <= certificate.cost, "{certificate:?}");
    }

    /// Whatever the groups were before: replaced and added ones are as if they had been there from the start.
    #[test]
    fn replaced_groups_are_as_new_ones(small in small(false), other in small(false), start in 0_u8..3) {
        let fits = |group: &&SmallGroup| {
            let inside = |site: u8| usize::from(site) < small.rooms.len();
            group.candidates.iter().all(|there| inside(there.site)) && group.present.is_none_or(inside)
        };
        let former: Vec<SmallGroup> = other.groups.iter().filter(fits).cloned().collect();
        let former = Small { rooms: other.rooms.clone(), groups: former };
        let sites: Vec<Site> = small.rooms.iter().map(|&capacity| Site { capacity, headroom: 0.0 }).collect();
        let mut solver = Solver::new(Instance::new(&sites).unwrap());
        for group in former.groups.iter().take(small.groups.len()) {
            solver.push(&group.as_given()).unwrap();
        }
        solver.solve([Start::Cold, Start::Warm, Start::Touched][usize::from(start)]);
        for (index, group) in small.groups.iter().enumerate() {
            if index < solver.instance().groups() {
                solver.replace(index, &group.as_given()).unwrap();
            } else {
                solver.push(&group.as_given()).unwrap();
            }
        }
        for (site, &room) in (0..).zip(&small.rooms) {
            solver.set_room(site, room).unwrap();
        }
        let touched = solver.solve(Start::Touched);
        check_round(&solver, true, touched.exceeded.len())?;
        prop_assert!(!touched.exceeded.is_empty() || touched.bound <= touched.cost + 1e-6, "{:?}", touched);
        let mut new = Solver::new(small.instance());
        prop_assert_eq!(solver.solve(Start::Cold), new.solve(Start::Cold));
        for group in 0..small.groups.len() {
            prop_assert_eq!(solver.site(group), new.site(group));
        }
    }

    #[test]
    fn later_rounds_keep_their_books(small in small(false), closed in 0_u8..4, changes in proptest::collection::vec((0_usize..7, 1_u8..20), 0..8)) {
        let mut solver = Solver::new(small.instance());
        solver.solve(Start::Cold);
        solver.adopt();
        for (group, demand) in changes {
            let group = group % small.groups.len();
            solver.set_demand(group, 1.0, [f32::from(demand), 0.0, 1.0]).unwrap();
        }
        let touched = solver.solve(Start::Touched);
        check_round(&solver, true, touched.exceeded.len())?;
        solver.set_open(closed % small.rooms.len() as u8, false);
        let warm = solver.solve(Start::Warm);
        check_round(&solver, true, warm.exceeded.len())?;
        prop_assert!(warm.exceeded.is_empty() == warm.gap().is_finite());
        prop_assert!(!warm.exceeded.is_empty() || warm.bound <= warm.cost + 1e-6, "{:?}", warm);
    }
}

fn generated(groups: usize, fill: f64) -> Instance {
    generate::instance(&Shape { groups, sites: 60, candidates: 12, fill, load: Load::Pareto, seed: 3 })
        .unwrap()
}

#[test]
fn the_same_input_gives_the_same_placement() {
    let round = || {
        let mut solver = Solver::new(generated(5_000, 0.8));
        let certificate = solver.solve(Start::Cold);
        let sites: Vec<_> = (0..5_000).map(|group| solver.site(group)).collect();
        (certificate, sites, solver.prices())
    };
    assert_eq!(round(), round());
}

#[test]
fn the_gap_is_small_and_the_simple_choice_is_beaten() {
    let instance = generated(20_000, 0.8);
    let simple = greedy::place(&instance);
    let certificate = Solver::new(instance).solve(Start::Cold);
    assert!(certificate.exceeded.is_empty());
    assert!(certificate.gap() < 0.005, "{certificate:?}");
    assert!(certificate.cost < simple.cost, "{} is not below {}", certificate.cost, simple.cost);
}

/// However prices are found from samples: a heavy group counts once, with its own weight.
#[test]
fn one_group_that_is_a_large_part_of_all_spoils_no_prices() {
    for share in [0.005, 0.05, 0.1] {
        let shape =
            Shape { groups: 60_000, sites: 40, candidates: 8, fill: 0.8, load: Load::Heavy(share), seed: 1 };
        let certificate = Solver::new(generate::instance(&shape).unwrap()).solve(Start::Cold);
        assert!(certificate.exceeded.is_empty(), "{share}: {certificate:?}");
        assert!(certificate.gap() < 0.002, "{share}: {certificate:?}");
    }
}

/// It is where it is cheapest, and named; the others are as well off as without that site.
#[test]
fn a_group_that_fits_nowhere_drives_nobody_away_but_from_its_own_site() {
    let mut instance = generated(4_000, 0.4);
    let most = (0..60).map(|site| instance.room(site)[0]).fold(0.0, f64::max) as f32;
    let candidates: Vec<Candidate> = instance.candidates(0).collect();
    let cheapest = candidates.iter().min_by(|a, b| a.cost_ms.total_cmp(&b.cost_ms)).unwrap().site;
    let mut without = Solver::new(instance.clone());
    without.set_open(cheapest, false);
    let without = without.solve(Start::Cold);
    let giant = Group {
        weight: 1.0,
        demand: [most * 1.5, 0.0, 0.0],
        present: None,
        charge: 0.0,
        left_out_ms: f32::INFINITY,
        class: None,
        candidates: &candidates,
    };
    instance.push(&giant).unwrap();
    let mut solver = Solver::new(instance);
    let certificate = solver.solve(Start::Cold);
    assert_eq!(solver.site(4_000), Some(cheapest));
    let exceeded: Vec<u8> = certificate.exceeded.iter().map(|(site, _, _)| *site).collect();
    assert_eq!(exceeded, [cheapest], "{certificate:?}");
    assert_eq!(solver.conflict(cheapest).unwrap().groups, [4_000]);
    assert!(certificate.cost < without.cost * 1.01, "{} and {}", certificate.cost, without.cost);
}

/// Whatever the climb looks at, prices whose bound was clearly higher are not given up.
#[test]
fn a_round_after_nothing_has_changed_has_no_clearly_lower_bound() {
    for seed in 0..6 {
        let shape =
            Shape { groups: 2_500, sites: 12, candidates: 6, fill: 0.85, load: Load::Zipf(1.1), seed };
        let mut solver = Solver::new(generate::instance(&shape).unwrap());
        let mut before = solver.solve(Start::Cold).bound;
        for _ in 0..3 {
            let bound = solver.solve(Start::Warm).bound;
            assert!(bound >= before * 0.99, "seed {seed}: {bound} after {before}");
            before = before.max(bound);
        }
    }
}

#[test]
fn a_room_counts_for_the_whole_groups_that_it_holds() {
    let site = |room| Site { capacity: [room, f64::INFINITY, f64::INFINITY], headroom: 0.0 };
    let mut instance = Instance::new(&[site(25.0), site(1_000.0)]).unwrap();
    let candidates = [Candidate { site: 0, cost_ms: 10.0 }, Candidate { site: 1, cost_ms: 30.0 }];
    for _ in 0..10 {
        let (demand, present, charge) = ([10.0, 0.0, 0.0], None, 0.0);
        let (left_out_ms, class, candidates) = (f32::INFINITY, None, &candidates[..]);
        instance
            .push(&Group { weight: 10.0, demand, present, charge, left_out_ms, class, candidates })
            .unwrap();
    }
    let certificate = Solver::new(instance).solve(Start::Cold);
    assert_eq!(certificate.cost, 2.0 * 100.0 + 8.0 * 300.0);
    assert!(certificate.gap() < 1e-3, "two groups fit, and not two and a half: {certificate:?}");
}

#[test]
fn few_groups_change_places_until_none_is_better_off() {
    for seed in 0..8 {
        let shape = Shape { groups: 150, sites: 6, candidates: 5, fill: 0.8, load: Load::Pareto, seed };
        let instance = generate::instance(&shape).unwrap();
        let mut solver = Solver::new(instance.clone());
        let certificate = solver.solve(Start::Cold);
        assert!(certificate.exceeded.is_empty(), "{certificate:?}");
        eprintln!("seed {seed}: gap {:.3} %", certificate.gap() * 100.0);
        assert!(certificate.gap() < 0.02, "{certificate:?}");
        // Whoever swaps two groups afterwards, within the rooms, gains nothing.
        let (place, cost) = (
            |group: usize| solver.site(group).unwrap(),
            |group: usize, site: u8| {
                let there = instance.candidates(group).find(|candidate| candidate.site == site)?;
                Some(f64::from(instance.weight(group)) * f64::from(there.cost_ms))
            },
        );
        for a in 0..instance.groups() {
            for b in 0..a {
                let (here, there) = (place(a), place(b));
                let swapped = cost(a, there).zip(cost(b, here)).map(|(a, b)| a + b);
                let fits = |site: u8, comes: usize, goes: usize| {
                    let load = solver.load(site);
                    let (comes, goes) = (instance.demand(comes), instance.demand(goes));
                    (0..RESOURCES).all(|r| load[r] + f64::from(comes[r] - goes[r]) <= instance.room(site)[r])
                };
                let now = cost(a, here).zip(cost(b, there)).map_or(0.0, |(a, b)| a + b);
                if fits(there, a, b) && fits(here, b, a) {
                    assert!(
                        swapped.is_none_or(|swapped| swapped > now * (1.0 - 1e-4)),
                        "{a} and {b} in {seed}"
                    );
                }
            }
        }
    }
}

#[test]
fn with_room_everywhere_everybody_is_at_the_nearest_site() {
    let certificate = Solver::new(generated(2_000, 0.02)).solve(Start::Cold);
    assert!((certificate.cost / certificate.unconstrained - 1.0).abs() < 1e-9, "{certificate:?}");
    assert!(certificate.gap() < 1e-6);
}

#[test]
fn a_lost_site_is_left_by_all_and_others_stay() {
    let mut solver = Solver::new(generated(5_000, 0.5));
    solver.solve(Start::Cold);
    solver.adopt();
    let there = (0..5_000).filter(|&group| solver.site(group) == Some(0)).count();
    solver.set_open(0, false);
    let certificate = solver.solve(Start::Warm);
    assert!(certificate.exceeded.is_empty() && certificate.stranded == 0, "{certificate:?}");
    assert_eq!(solver.load(0), [0.0; RESOURCES]);
    assert!(there > 0 && certificate.moves >= there);
}

#[test]
fn a_charge_keeps_groups_that_gain_little() {
    let site = Site { capacity: [100.0, f64::INFINITY, f64::INFINITY], headroom: 0.0 };
    let place = |charge: f32| {
        let mut instance = Instance::new(&[site, site]).unwrap();
        let candidates = [Candidate { site: 0, cost_ms: 20.0 }, Candidate { site: 1, cost_ms: 15.0 }];
        let group = Group {
            weight: 10.0,
            demand: [10.0, 0.0, 0.0],
            present: Some(0),
            charge,
            left_out_ms: f32::INFINITY,
            class: None,
            candidates: &candidates,
        };
        instance.push(&group).unwrap();
        let mut solver = Solver::new(instance);
        solver.solve(Start::Cold);
        solver.site(0)
    };
    assert_eq!(place(40.0), Some(1));
    assert_eq!(place(60.0), Some(0));
}

#[test]
fn a_group_that_is_wrong_is_refused_and_nothing_has_changed() {
    let mut solver = Solver::new(generated(50, 0.5));
    let before = solver.solve(Start::Cold);
    let candidates = [Candidate { site: 60, cost_ms: 1.0 }];
    let wrong = Group {
        weight: 1.0,
        demand: [1.0; RESOURCES],
        present: None,
        charge: 0.0,
        left_out_ms: f32::INFINITY,
        class: None,
        candidates: &candidates,
    };
    assert_eq!(solver.replace(7, &wrong), Err(InstanceError::CandidateSite { group: 7, site: 60 }));
    assert_eq!(solver.push(&wrong), Err(InstanceError::CandidateSite { group: 50, site: 60 }));
    assert!(solver.set_room(0, [f64::NAN; RESOURCES]).is_err());
    assert_eq!((solver.touched.len(), solver.instance().groups()), (0, 50));
    assert_eq!(solver.solve(Start::Touched).cost, before.cost);
}

#[test]
fn prices_of_the_last_round_are_taken_up_by_the_next_leader() {
    let mut old = Solver::new(generated(5_000, 0.8));
    let before = old.solve(Start::Cold);
    let mut new = Solver::new(generated(5_000, 0.8));
    new.set_prices(&old.prices());
    let after = new.solve(Start::Warm);
    assert!(after.passes < before.passes / 2.0, "{} and {}", after.passes, before.passes);
    assert!(after.gap() < 0.02, "{after:?}");
}

#[test]
fn what_makes_no_sense_is_named() {
    let site = |capacity: f64, headroom: f64| Site { capacity: [capacity, 1.0, 1.0], headroom };
    let message = |result: Result<Instance, super::InstanceError>| result.unwrap_err().to_string();
    assert_eq!(message(Instance::new(&[])), "0 sites: give 1 to 256");
    assert_eq!(message(Instance::new(&[site(-1.0, 0.0)])), "site 0: -1 is no capacity");
    assert_eq!(message(Instance::new(&[site(1.0, 1.0)])), "site 0: headroom 1 is not in 0 to below 1");
    let mut instance = Instance::new(&[site(1.0, 0.0)]).unwrap();
    let push = |instance: &mut Instance, weight: f32, candidates: &[Candidate]| {
        let group = Group {
            weight,
            demand: [1.0; 3],
            present: None,
            charge: 0.0,
            left_out_ms: f32::INFINITY,
            class: None,
            candidates,
        };
        instance.push(&group).unwrap_err().to_string()
    };
    let here = Candidate { site: 0, cost_ms: 1.0 };
    assert_eq!(push(&mut instance, 1.0, &[]), "group 0 has 0 candidates: give 1 to 16");
    assert_eq!(push(&mut instance, 1.0, &[here, here]), "group 0: candidate 0 is no site or is there twice");
    assert_eq!(push(&mut instance, f32::NAN, &[here]), "group 0: NaN is no weight, demand, charge or cost");
    assert_eq!(instance.groups(), 0);
}

#[test]
fn unusable_prices_are_taken_as_none() {
    let mut solver = Solver::new(generated(500, 0.5));
    solver.set_prices(&[[f64::NAN, -1.0, f64::INFINITY]]);
    assert!(solver.prices().iter().flatten().all(|price| *price == 0.0));
}
