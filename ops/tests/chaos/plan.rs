//! What is done to a deployment, drawn from the seed alone: storms of requests and faults. When each thing happens is as real
//! time and the machine let it, so two runs of a seed try the same things, and never do quite the same.

use std::time::Duration;

use flow::sample::Seeded;
use flow::{SiteId, WorkerId};

/// How long a storm begins new faults.
pub(crate) const STORM: Duration = Duration::from_secs(26);
/// Sites, placement nodes, and workers that a site has always.
pub(crate) const SITES: u64 = 3;
pub(crate) const WORKERS: u16 = 2;

/// A load for which agents start workers, as a multiple of the usual.
const HIGH: f64 = 6.0;

/// What an operator asks for. `pick` chooses among what is there by then.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Move {
        count: u64,
        from: SiteId,
        to: SiteId,
        pick: u64,
    },
    Abort {
        pick: u64,
    },
    Drain(SiteId),
    Undrain(SiteId),
    Split {
        pick: u64,
    },
    Merge {
        pick: u64,
    },
    /// An odd one has groups moved by the solver.
    Policy {
        number: u64,
    },
    WrongPolicy {
        which: usize,
    },
    /// Clients of a site send so many times as much.
    Load(SiteId, f64),
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Leader,
    Follower(u64),
    Agent(SiteId),
    /// One that was started by the load, if that is wanted and there is one.
    Worker {
        site: SiteId,
        worker: WorkerId,
        by_load: bool,
    },
    Switch(SiteId),
}

/// What a process suffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    Kill,
    Stop,
    Term,
}

/// Between which processes of two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Between {
    Agents,
    Nodes,
    AgentAndNode,
    Switches,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Process(Who, Blow),
    /// Placement nodes but one.
    Majority(Blow),
    DiskFull,
    Cut(Between, SiteId, SiteId),
    Slow(Between, SiteId, SiteId, Duration),
    Controller(SiteId),
}

/// In which phase of a move a fault strikes, and at which of its sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Aim {
    pub(crate) switching: bool,
    pub(crate) at_target: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    pub(crate) at: Duration,
    pub(crate) fault: Fault,
    pub(crate) lasts: Duration,
    /// It waits for a move in this phase, if for any.
    pub(crate) aim: Option<Aim>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Storm {
    pub(crate) operations: Vec<(Duration, Operation)>,
    pub(crate) strikes: Vec<Strike>,
}

pub(crate) fn storm(seed: u64, number: u64) -> Storm {
    let mut rng = Seeded::new(seed.wrapping_mul(1_000_003).wrapping_add(number));
    rng.word();
    let mut storm = Storm::default();
    if rng.below(2) == 0 {
        // From the start, so that there is time to strike the worker that comes by it.
        storm.operations.push((Duration::ZERO, Operation::Load(site(&mut rng), HIGH)));
    }
    let mut at = Duration::ZERO;
    while at < STORM {
        storm.operations.push((at, operation(&mut rng)));
        at += between(&mut rng, 400, 2_500);
    }
    at = between(&mut rng, 500, 2_000);
    while at < STORM {
        storm.strikes.push(strike(&mut rng, at));
        at += between(&mut rng, 1_000, 4_000);
    }
    storm
}

fn between(rng: &mut Seeded, least_ms: u64, most_ms: u64) -> Duration {
    Duration::from_millis(least_ms + rng.below(most_ms - least_ms))
}

fn site(rng: &mut Seeded) -> SiteId {
    SiteId(u8::try_from(rng.below(SITES) + 1).unwrap_or(1))
}

fn two_sites(rng: &mut Seeded) -> (SiteId, SiteId) {
    let from = site(rng);
    let step = u8::try_from(rng.below(SITES - 1)).unwrap_or(0);
    (from, SiteId((from.0 + step) % 3 + 1))
}

fn operation(rng: &mut Seeded) -> Operation {
    let (from, to) = two_sites(rng);
    let pick = rng.word() >> 1;
    match rng.below(20) {
        0..10 => Operation::Move { count: 1 + rng.below(6), from, to, pick },
        10 => Operation::Abort { pick },
        11 => Operation::Drain(from),
        12 => Operation::Undrain(from),
        13 => Operation::Split { pick },
        14 => Operation::Merge { pick },
        15 | 16 => Operation::Policy { number: rng.below(1_000) },
        17 => Operation::WrongPolicy { which: usize::try_from(pick % 4).unwrap_or(0) },
        18 => Operation::Load(from, HIGH),
        _ => Operation::Load(from, 1.0),
    }
}

fn strike(rng: &mut Seeded, at: Duration) -> Strike {
    let place = site(rng);
    let worker = WorkerId(u16::try_from(rng.below(WORKERS.into()) + 1).unwrap_or(1));
    let blow = [Blow::Kill, Blow::Stop, Blow::Stop, Blow::Term][usize::try_from(rng.below(4)).unwrap_or(0)];
    let who = match rng.below(7) {
        0 => Who::Leader,
        1 => Who::Follower(rng.below(2)),
        2 | 3 => Who::Agent(place),
        4 | 5 => Who::Worker { site: place, worker, by_load: rng.below(4) > 0 },
        _ => Who::Switch(place),
    };
    let (a, b) = two_sites(rng);
    let ways = [Between::Agents, Between::Nodes, Between::AgentAndNode, Between::Switches];
    let way = ways[usize::try_from(rng.below(4)).unwrap_or(0)];
    let extra = Duration::from_millis(rng.log_uniform(900));
    let fault = match rng.below(20) {
        0..12 => Fault::Process(who, blow),
        12 => Fault::Majority(blow),
        13 => Fault::DiskFull,
        14..17 => Fault::Cut(way, a, b),
        17 | 18 => Fault::Slow(way, a, b, extra),
        _ => Fault::Controller(place),
    };
    // From 0.2 s on, each decade as likely as any other, or some seconds.
    let most = match fault {
        Fault::Majority(_) => 40,
        Fault::Cut(Between::Switches, ..) | Fault::Process(Who::Switch(_), _) => 60,
        Fault::Process(..) | Fault::DiskFull | Fault::Cut(..) | Fault::Slow(..) | Fault::Controller(_) => 150,
    };
    let lasts = match rng.below(3) {
        // Long enough for whoever has to say that it is there.
        0 => between(rng, 5_000, 8_000),
        _ => Duration::from_millis(200 * rng.log_uniform(most).max(1)),
    };
    let aim = Aim { switching: rng.below(2) == 0, at_target: rng.below(2) == 0 };
    Strike { at, fault, lasts, aim: (rng.below(3) > 0).then_some(aim) }
}
