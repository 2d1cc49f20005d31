//! The seeded simulation: the real agents, move machines, workers, rule compiler, OpenFlow driver, switch pipelines,
//! replicated state machine and leader of four sites in one schedule, with faults at every step of a move.
//!
//! `SIM_SEEDS=n` runs so many seeds (2000 by default), `SIM_FROM=m` from that one on; `SIM_SEED=n` runs one and prints what happens.

#![allow(clippy::wildcard_enum_match_arm, reason = "a simulation looks at few of many events")]

mod checks;
mod counts;
mod excuse;
mod fault;
mod invariant_1;
mod invariant_10;
mod invariant_2;
mod invariant_3;
mod invariant_4;
mod invariant_5;
mod invariant_6;
mod invariant_7;
mod invariant_8;
mod invariant_9;
mod links;
mod log;
mod lost;
mod mutation;
mod packet;
mod schedule;
mod session;
mod site;
mod slow;
mod switch;
mod traffic;
mod world;

use std::collections::BTreeMap;
use std::io::Write as _;

use counts::Counts;
use fault::{Kind, STAGES, Stage, kinds};
use mutation::Mutation;
use world::{Checked, Mode, Violation, World};

/// What runs the same seeds again.
const REPLAY: &str = "cargo test -p limosa --test sim every_invariant -- --nocapture";

/// Past the test harness, which keeps what a test that passes prints to itself.
fn tell(line: &str) {
    // Who cannot be told is not told.
    let _ = writeln!(std::io::stderr(), "{line}");
}

type Hits = BTreeMap<(Stage, Kind), u64>;

/// Every seventh seed has an underlay that loses and reorders, every 13th no faults at all; in every eleventh workers hold few packets.
/// These share no divisor with one another, nor with the number of kinds of faults and their stages: so all go with all.
fn mode_of(seed: u64, trace: bool) -> Mode {
    Mode { lossy: seed % 7 == 6, faults: !seed.is_multiple_of(13), tight: seed % 11 == 5, trace }
}

fn run(seed: u64, mode: Mode, mutation: Option<Mutation>) -> (Checked, World) {
    let mut world = World::new(seed, mode, mutation);
    let result = world.run();
    (result, world)
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn shard(seeds: impl Iterator<Item = u64>) -> (Hits, Vec<String>, Counts) {
    let (mut hits, mut failures, mut counts) = (Hits::new(), Vec::new(), Counts::default());
    for seed in seeds {
        let (result, world) = run(seed, mode_of(seed, false), None);
        if let Err(violation) = result {
            let Violation { invariant, what } = violation;
            let failure = format!("I{invariant}: {what}\n    SIM_SEED={seed} {REPLAY}");
            // Long runs tell at once.
            tell(&failure);
            failures.push(failure);
        }
        for (cell, count) in &world.plan.hits {
            *hits.entry(*cell).or_default() += count;
        }
        counts.merge(&world.counts);
        counts.add("moves", world.log.cluster.finished.len() as u64);
        counts.add("packets", world.traffic.sendings.len() as u64);
        counts.add("flows expired", world.expired());
        counts.add("virtual seconds", world.now / 1_000_000);
    }
    (hits, failures, counts)
}

fn print_coverage(hits: &Hits) -> usize {
    let mut empty = 0;
    eprintln!("{:<28}{}", "fault", STAGES.map(|stage| format!("{:>12}", format!("{stage:?}"))).concat());
    for kind in kinds() {
        let count = |stage| hits.get(&(stage, kind)).copied().unwrap_or(0);
        empty += STAGES.into_iter().filter(|stage| count(*stage) == 0).count();
        eprintln!(
            "{:<28}{}",
            format!("{kind:?}"),
            STAGES.map(|stage| format!("{:>12}", count(stage))).concat()
        );
    }
    empty
}

#[test]
fn every_invariant_holds_for_every_seed() {
    if let Some(seed) = env("SIM_SEED") {
        let (result, _) = run(seed, mode_of(seed, true), None);
        return result.unwrap_or_else(|violation| panic!("I{}: {}", violation.invariant, violation.what));
    }
    let (seeds, from) = (env("SIM_SEEDS").unwrap_or(2_000), env("SIM_FROM").unwrap_or(0));
    tell(&format!("simulation: SIM_FROM={from} SIM_SEEDS={seeds} {REPLAY}"));
    let half = |odd: u64| {
        let all = (0..seeds).map(move |number| from.wrapping_add(number));
        std::thread::spawn(move || shard(all.filter(move |seed| seed % 2 == odd)))
    };
    let halves = [half(0), half(1)].map(|thread| thread.join().expect("a panic in a shard is a bug"));
    let (mut hits, mut failures, mut counts) = (Hits::new(), Vec::new(), Counts::default());
    for (part, failed, counted) in halves {
        part.into_iter().for_each(|(cell, count)| *hits.entry(cell).or_default() += count);
        failures.extend(failed);
        counts.merge(&counted);
    }
    let empty = print_coverage(&hits);
    eprintln!("{seeds} seeds from {from}:\n{counts}");
    assert!(failures.is_empty(), "{} of {seeds} seeds failed:\n{}", failures.len(), failures.join("\n"));
    assert!(seeds < 2_000 || empty == 0, "{empty} cells of fault and stage were never hit");
    let lacking = counts.lacking();
    assert!(seeds < 2_000 || lacking.is_empty(), "never come to: {}", lacking.join(", "));
}

/// The check for one invariant finds the fault that is built in, in one of some runs without other faults.
fn is_found(mutation: Mutation, invariants: &[u8]) {
    is_found_saying(mutation, invariants, Mode::default(), "");
}

/// As [`is_found`], by the check that says so.
fn is_found_saying(mutation: Mutation, invariants: &[u8], mode: Mode, says: &str) {
    let violations = (0..96).filter_map(|seed| run(seed, mode, Some(mutation)).0.err());
    let mut found: Vec<u8> = Vec::new();
    for violation in violations {
        found.push(violation.invariant);
        if invariants.contains(&violation.invariant) && violation.what.contains(says) {
            return;
        }
    }
    panic!("{mutation:?} led to violations {found:?} only");
}

#[test]
fn an_owner_that_goes_on_after_the_cut_is_found() {
    is_found(Mutation::TwoOwners, &[1]);
}

#[test]
fn a_port_that_changes_is_found() {
    is_found(Mutation::PortBent, &[2]);
}

#[test]
fn a_port_of_another_block_is_found() {
    is_found_saying(Mutation::BlockBent, &[3], Mode::default(), "of the block of");
}

#[test]
fn a_port_that_two_endpoints_share_is_found() {
    is_found_saying(Mutation::PortShared, &[3], Mode::default(), "and of");
}

#[test]
fn a_lost_packet_is_found() {
    is_found(Mutation::OutputLost, &[4]);
}

#[test]
fn a_port_that_is_open_to_all_is_found() {
    is_found(Mutation::DoorOpen, &[7]);
}

#[test]
fn a_packet_sent_twice_is_found() {
    is_found(Mutation::OutputTwice, &[4]);
}

#[test]
fn a_marker_that_overtakes_the_flip_is_found() {
    is_found(Mutation::MarkerBeforeFlip, &[5]);
}

#[test]
fn a_target_that_serves_before_the_log_says_so_is_found() {
    is_found(Mutation::EarlyTarget, &[6]);
}

#[test]
fn rules_that_never_arrive_are_found() {
    is_found(Mutation::RulesLost, &[8]);
}

#[test]
fn a_packet_that_is_not_counted_is_found() {
    is_found_saying(Mutation::Miscounted, &[9], Mode::default(), "has lost");
}

#[test]
fn a_hold_without_a_bound_is_found() {
    is_found_saying(Mutation::HoldsAll, &[9], Mode { tight: true, ..Mode::default() }, "bytes");
}

#[test]
fn an_export_that_waits_for_nobody_is_found() {
    is_found_saying(Mutation::Windowless, &[9], Mode::default(), "under way");
}

#[test]
fn packets_that_are_held_for_ever_are_found() {
    is_found(Mutation::NeverJoined, &[10]);
}

#[test]
fn a_connection_that_is_trusted_for_ever_is_found() {
    let faults = Mode { faults: true, ..Mode::default() };
    is_found_saying(Mutation::DriverTimeless, &[8], faults, "are not in force");
}

#[test]
fn what_an_agent_keeps_of_a_move_that_is_over_is_found() {
    is_found_saying(Mutation::EndUnheard, &[8], Mode::default(), "still has moves of the log");
}
