//! How often sites of generated worlds are found not to be where their configuration says, when they are not and when they are.

use std::collections::{BTreeMap, BTreeSet};

use flow::sample::Seeded;
use flow::{Micros, SiteId};
use placement::core::delay::{Model, great_circle_km};
use placement::core::{Admin, PeerRtt, Site, SiteReport};

use super::world::World;

/// An error in a position that is smaller than this is none that matters much.
const GROSS_KM: f64 = 3_000.0;

fn site(id: u8, (latitude, longitude): (f64, f64)) -> Site {
    Site {
        id: SiteId(id),
        name: format!("site-{id}"),
        latitude: Some(latitude),
        longitude: Some(longitude),
        endpoint: "[::1]:1".into(),
        capacity_pps: 1,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
        admin: Admin::Active,
        alive: true,
    }
}

/// What people do to a position: a sign, the order, that of another.
fn mistaken(at: (f64, f64), other: (f64, f64), kind: usize) -> (f64, f64) {
    match kind {
        0 => (at.0, -at.1),
        1 => (-at.0, at.1),
        2 if at.1.abs() <= 90.0 => (at.1, at.0),
        2 => (0.0, 0.0),
        _ => other,
    }
}

/// Which of the sites are found.
fn found(world: &World, chosen: &[usize], said: &[(f64, f64)]) -> BTreeSet<u8> {
    let (hosts, mut model) = (world.truth.len(), Model::new(None));
    for (a, from) in (0..).zip(chosen) {
        let others = (0..).zip(chosen).filter(|(b, _)| *b != a);
        let us = |to: usize| (world.ms[from * hosts + to] * 1_000.0) as u32;
        let peers = others.map(|(b, to)| PeerRtt { site: SiteId(b), rtt_us: us(*to) }).collect();
        model.handle_report(&SiteReport { site: SiteId(a), peers, ..SiteReport::default() }, Micros(0));
    }
    let sites: BTreeMap<_, _> = (0..).zip(said).map(|(id, at)| (SiteId(id), site(id, *at))).collect();
    model.misplaced(&sites, Micros(0)).iter().map(|one| one.site.0).collect()
}

/// Of honest sites and of wrong ones, how many there were and how many of them were found.
fn tried(sites: usize) -> [(usize, usize); 2] {
    let mut all = [(0, 0); 2];
    for seed in 0..40 {
        let (world, mut random) = (World::new(seed, 200), Seeded::new(seed));
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < sites {
            let next = random.below(200) as usize;
            if !chosen.contains(&next) {
                chosen.push(next);
            }
        }
        let mut said: Vec<_> = chosen.iter().map(|&host| world.truth[host]).collect();
        for _ in 0..sites / 10 + 1 {
            let (one, other) = (random.below(sites as u64) as usize, random.below(sites as u64) as usize);
            said[one] = mistaken(said[one], said[other], random.below(4) as usize);
        }
        let found = found(&world, &chosen, &said);
        for ((id, said), host) in (0..).zip(&said).zip(&chosen) {
            let off = great_circle_km(*said, world.truth[*host]);
            let kind = if off == 0.0 {
                0
            } else if off >= GROSS_KM {
                1
            } else {
                continue;
            };
            all[kind] = (all[kind].0 + 1, all[kind].1 + usize::from(found.contains(&id)));
        }
    }
    all
}

#[test]
fn gross_errors_of_positions_are_found_the_more_sites_the_surer_and_right_ones_are_believed() {
    let rates = [5, 10, 30].map(|sites| {
        let [(right, doubted), (wrong, found)] = tried(sites);
        eprintln!(
            "{sites} sites: {doubted} of {right} right ones doubted, {found} of {wrong} wrong ones found"
        );
        (doubted as f64 / right as f64, found as f64 / wrong as f64)
    });
    for ((doubted, found), (most, least)) in rates.into_iter().zip([(0.05, 0.5), (0.03, 0.55), (0.01, 0.85)])
    {
        assert!(doubted < most && found > least, "{rates:?}");
    }
}
