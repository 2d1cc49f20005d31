use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const STEP: u64 = 500_000;

fn seconds(s: u64) -> Micros {
    Micros(s * 1_000_000)
}

fn limits() -> Limits {
    Limits {
        ports: (1..=4).map(WorkerId).collect(),
        min: 1,
        max: 3,
        busy_high: 0.7,
        busy_low: 0.3,
        hold: seconds(10),
        pause: seconds(30),
        timeout: seconds(20),
    }
}

fn views(shares: &[(u16, f64)]) -> Views {
    let view = |busy| WorkerView { busy: Some(busy), is_empty: false };
    shares.iter().map(|(worker, busy)| (WorkerId(*worker), view(*busy))).collect()
}

/// A controller that has seen enough time pass to be rested, and its clock.
struct Rig {
    elastic: Elastic,
    now: Micros,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        let mut elastic = Elastic::new(limits);
        assert_eq!(elastic.handle(Input::Workers(None), Micros(0)), []);
        Self { elastic, now: seconds(100) }
    }

    fn see(&mut self, shares: &[(u16, f64)]) -> Vec<Action> {
        self.elastic.handle(Input::Workers(Some(&views(shares))), self.now)
    }

    /// The same for so many seconds; what is done, with the second.
    fn see_for(&mut self, s: u64, shares: &[(u16, f64)]) -> Vec<(u64, Action)> {
        let start = self.now;
        let mut done = Vec::new();
        while self.now < start.plus(seconds(s)) {
            self.now = self.now.plus(Micros(STEP));
            let at = self.now.since(start).0 / 1_000_000;
            done.extend(self.see(shares).into_iter().map(|action| (at, action)));
        }
        done
    }

    fn hook_ended(&mut self, end: HookEnd) {
        assert_eq!(self.elastic.handle(Input::HookEnded(end), self.now), []);
    }
}

const BUSY: [(u16, f64); 2] = [(1, 0.8), (2, 0.75)];
const QUIET: [(u16, f64); 2] = [(1, 0.2), (2, 0.1)];

#[test]
fn a_load_that_stays_high_starts_the_first_worker_that_is_not_there() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(10, &BUSY), []);
    assert_eq!(rig.see_for(2, &BUSY), [(0, Action::Run(Hook::Start, WorkerId(3)))]);
    assert_eq!(rig.elastic.in_hand(), Some((WorkerId(3), State::Starting)));
    rig.hook_ended(HookEnd::Ok);
    assert_eq!(rig.see(&[(1, 0.5), (2, 0.5), (3, 0.5)]), []);
    assert_eq!(rig.elastic.in_hand(), None);
    assert_eq!(rig.elastic.counts().starts, Outcomes { ok: 1, failed: 0, timeout: 0 });
}

#[test]
fn a_threshold_that_is_not_passed_for_one_moment_begins_anew() {
    let mut rig = Rig::new(limits());
    for _ in 0..20 {
        assert_eq!(rig.see_for(9, &BUSY), []);
        assert_eq!(rig.see(&[(1, 0.8), (2, 0.5)]), []);
    }
    for _ in 0..20 {
        assert_eq!(rig.see_for(9, &QUIET), []);
        assert_eq!(rig.see(&[(1, 0.2), (2, 0.5)]), []);
    }
}

#[test]
fn workers_that_are_not_all_heard_are_no_reason_for_anything() {
    let mut rig = Rig::new(limits());
    for _ in 0..5 {
        rig.see_for(9, &BUSY);
        assert_eq!(rig.elastic.handle(Input::Workers(None), rig.now), []);
    }
    let mut silent = views(&BUSY);
    silent.insert(WorkerId(2), WorkerView { busy: None, is_empty: false });
    for _ in 0..40 {
        rig.now = rig.now.plus(seconds(1));
        assert_eq!(rig.elastic.handle(Input::Workers(Some(&silent)), rig.now), []);
    }
}

#[test]
fn the_first_change_waits_for_the_pause_since_an_agent_before_may_have_made_one() {
    let mut elastic = Elastic::new(limits());
    let at = |elastic: &mut Elastic, s| elastic.handle(Input::Workers(Some(&views(&BUSY))), seconds(s));
    for s in 1..31 {
        assert_eq!(at(&mut elastic, s), []);
    }
    assert_eq!(at(&mut elastic, 31), [Action::Run(Hook::Start, WorkerId(3))]);
}

#[test]
fn at_the_most_no_worker_is_started_and_at_the_least_none_is_retired() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(200, &[(1, 1.0), (2, 1.0), (3, 1.0)]), []);
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(200, &[(1, 0.0)]), []);
    let mut rig = Rig::new(Limits { min: 2, ..limits() });
    assert_eq!(rig.see_for(200, &QUIET), []);
}

#[test]
fn a_load_that_stays_low_retires_the_last_worker_and_stops_it_once_it_is_empty() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &QUIET), [(10, Action::Retire(WorkerId(2)))]);
    assert_eq!(rig.see_for(5, &QUIET), []);
    let mut empty = views(&[(1, 0.3)]);
    empty.insert(WorkerId(2), WorkerView { busy: Some(0.0), is_empty: true });
    let stop = [Action::Run(Hook::Stop, WorkerId(2))];
    assert_eq!(rig.elastic.handle(Input::Workers(Some(&empty)), rig.now), stop);
    assert_eq!(rig.elastic.in_hand(), Some((WorkerId(2), State::Stopping)));
    rig.hook_ended(HookEnd::Ok);
    assert_eq!(rig.see(&[(1, 0.3)]), [Action::Recall(WorkerId(2))]);
    assert_eq!(rig.elastic.counts().stops, Outcomes { ok: 1, failed: 0, timeout: 0 });
    assert_eq!(rig.elastic.in_hand(), None);
}

#[test]
fn no_worker_is_retired_whose_load_would_make_the_others_too_busy() {
    let high_low = Limits { busy_low: 0.6, ..limits() };
    let mut rig = Rig::new(high_low.clone());
    assert_eq!(rig.see_for(100, &[(1, 0.4), (2, 0.3)]), []);
    let mut rig = Rig::new(high_low.clone());
    assert_eq!(rig.see_for(100, &[(1, 0.69), (2, 0.1), (3, 0.1)]), []);
    let mut rig = Rig::new(high_low);
    assert_eq!(rig.see_for(11, &[(1, 0.3), (2, 0.3)]), [(10, Action::Retire(WorkerId(2)))]);
}

#[test]
fn a_worker_that_retires_is_called_back_when_the_load_is_back() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &QUIET).len(), 1);
    // Only what the others do counts, and the pause since the retirement.
    let back = rig.see_for(40, &[(1, 0.9), (2, 0.0)]);
    assert_eq!(back, [(29, Action::Recall(WorkerId(2)))]);
    assert_eq!(rig.elastic.in_hand(), None);
}

#[test]
fn a_worker_that_dies_is_not_retired_and_one_that_dies_retiring_is_not_stopped() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(60, &[(1, 0.5), (2, 0.5)]), []);
    assert_eq!(rig.see_for(60, &[(1, 0.6)]), []);
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &QUIET).len(), 1);
    assert_eq!(rig.see(&[(1, 0.3)]), [Action::Recall(WorkerId(2))]);
    assert_eq!(rig.elastic.counts(), Counts::default());
}

#[test]
fn fewer_than_the_least_are_made_up_for_after_the_hold() {
    let mut rig = Rig::new(Limits { min: 2, ..limits() });
    assert_eq!(rig.see_for(11, &[(2, 0.1)]), [(10, Action::Run(Hook::Start, WorkerId(1)))]);
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &[]), [(10, Action::Run(Hook::Start, WorkerId(1)))]);
}

#[test]
fn a_hook_that_fails_is_tried_again_after_pauses_that_double() {
    let mut rig = Rig::new(limits());
    let mut runs = Vec::new();
    for _ in 0..200 {
        for (_, action) in rig.see_for(1, &BUSY) {
            assert_eq!(action, Action::Run(Hook::Start, WorkerId(3)));
            runs.push(rig.now.0 / 1_000_000);
            rig.hook_ended(if runs.len() == 2 { HookEnd::Timeout } else { HookEnd::Failed });
        }
    }
    let pauses: Vec<_> = runs.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses[..7], [1, 2, 4, 8, 16, 32, 64]);
    assert_eq!(rig.elastic.counts().starts, Outcomes { ok: 0, failed: 7, timeout: 1 });
}

#[test]
fn a_start_that_failed_is_given_up_when_the_load_is_gone() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &BUSY).len(), 1);
    rig.hook_ended(HookEnd::Failed);
    assert_eq!(rig.see_for(5, &[(1, 0.5), (2, 0.5)]), []);
    assert_eq!(rig.elastic.in_hand(), None);
}

#[test]
fn a_worker_that_does_not_answer_after_its_hook_is_started_again() {
    let mut rig = Rig::new(limits());
    assert_eq!(rig.see_for(11, &BUSY).len(), 1);
    rig.hook_ended(HookEnd::Ok);
    assert_eq!(rig.see_for(22, &BUSY), [(21, Action::Run(Hook::Start, WorkerId(3)))]);
    assert_eq!(rig.elastic.counts().starts, Outcomes { ok: 0, failed: 0, timeout: 1 });
}

#[test]
fn a_stop_that_fails_is_tried_again_and_the_worker_is_called_back_when_the_load_is_back() {
    let mut rig = Rig::new(limits());
    rig.see_for(11, &QUIET);
    let empty = |rig: &mut Rig, busy| {
        let mut views = views(&[(1, busy)]);
        views.insert(WorkerId(2), WorkerView { busy: Some(0.0), is_empty: true });
        rig.now = rig.now.plus(seconds(1));
        rig.elastic.handle(Input::Workers(Some(&views)), rig.now)
    };
    let stop = [Action::Run(Hook::Stop, WorkerId(2))];
    assert_eq!(empty(&mut rig, 0.3), stop);
    rig.hook_ended(HookEnd::Failed);
    assert_eq!(empty(&mut rig, 0.3), stop);
    rig.hook_ended(HookEnd::Timeout);
    let mut others = Vec::new();
    for _ in 0..60 {
        let actions = empty(&mut rig, 0.9);
        if actions == stop {
            rig.hook_ended(HookEnd::Failed);
        } else {
            others.extend(actions);
        }
    }
    assert_eq!(others[0], Action::Recall(WorkerId(2)));
}

#[test]
fn an_answer_of_a_hook_that_nobody_awaits_changes_nothing() {
    let mut rig = Rig::new(limits());
    rig.hook_ended(HookEnd::Failed);
    assert_eq!(rig.elastic.counts(), Counts::default());
    assert_eq!(rig.elastic.in_hand(), None);
}

/// Machine, workers and hooks as the controller meets them.
#[derive(Debug)]
struct Plant {
    up: BTreeSet<WorkerId>,
    retiring: Option<(WorkerId, u32)>,
    hook: Option<(Hook, WorkerId, u32)>,
    /// Beginnings of changes: when, and whether a worker more was wanted.
    changes: Vec<(Micros, bool)>,
}

/// What may go wrong in a step: a number from a source that the test seeds.
type Chance<'a> = &'a mut dyn FnMut(u32) -> bool;

impl Plant {
    fn new(count: u16) -> Self {
        Self { up: (1..=count).map(WorkerId).collect(), retiring: None, hook: None, changes: Vec::new() }
    }

    fn serving(&self) -> Vec<WorkerId> {
        let retires = self.retiring.map(|(worker, _)| worker);
        self.up.iter().copied().filter(|worker| Some(*worker) != retires).collect()
    }

    /// The load spread over those that serve, by uneven shares; what is too much does not count.
    fn views(&self, load: f64, skew: f64) -> Views {
        let serving = self.serving();
        let weight = |worker: WorkerId| 1.0 + skew * f64::from(worker.0 % 3);
        let sum: f64 = serving.iter().map(|worker| weight(*worker)).sum();
        let view = |worker: &WorkerId| match self.retiring {
            Some((retires, left)) if retires == *worker => {
                WorkerView { busy: Some(0.0), is_empty: left == 0 }
            }
            _ => WorkerView { busy: Some((load * weight(*worker) / sum).min(1.0)), is_empty: false },
        };
        self.up.iter().map(|worker| (*worker, view(worker))).collect()
    }

    fn obey(&mut self, actions: Vec<Action>, limits: &Limits, elastic: &Elastic, now: Micros) {
        for action in actions {
            match action {
                Action::Run(Hook::Start, worker) => {
                    assert!(self.up.len() < limits.max, "started above the most");
                    assert!(!self.up.contains(&worker) && limits.ports.contains(&worker));
                    if elastic.failures() == 0 {
                        self.changes.push((now, true));
                    }
                    self.hook = Some((Hook::Start, worker, 3));
                }
                Action::Run(Hook::Stop, worker) => {
                    assert_eq!(self.retiring, Some((worker, 0)), "stopped with something on it");
                    self.hook = Some((Hook::Stop, worker, 3));
                }
                Action::Retire(worker) => {
                    assert!(
                        self.up.contains(&worker) && self.up.len() > limits.min,
                        "retired below the least"
                    );
                    self.changes.push((now, false));
                    self.retiring = Some((worker, 7));
                }
                Action::Recall(worker) => {
                    if self.up.contains(&worker) {
                        self.changes.push((now, true));
                    }
                    self.retiring = None;
                }
            }
        }
    }

    /// Half a second of hooks and of groups that leave.
    fn step(&mut self, chance: Chance<'_>) -> Option<HookEnd> {
        if let Some((_, left)) = &mut self.retiring {
            *left = left.saturating_sub(1);
        }
        let (hook, worker, left) = self.hook.as_mut()?;
        *left = left.saturating_sub(1);
        if *left > 0 {
            return None;
        }
        let (hook, worker) = (*hook, *worker);
        self.hook = None;
        if chance(3) {
            return Some(if chance(2) { HookEnd::Failed } else { HookEnd::Timeout });
        }
        match hook {
            Hook::Start => self.up.insert(worker),
            Hook::Stop => self.up.remove(&worker),
        };
        Some(HookEnd::Ok)
    }
}

fn arbitrary_limits() -> impl Strategy<Value = Limits> {
    (1_u16..=6, 0.05_f64..=1.0, 0.0_f64..0.99, 1_u64..=12, 1_u64..=40, 0_usize..36).prop_map(
        |(ports, busy_high, low, hold, pause, bounds)| {
            let max = 1 + bounds % usize::from(ports);
            Limits {
                ports: (1..=ports).map(WorkerId).collect(),
                min: 1 + (bounds / 6) % max,
                max,
                busy_high,
                busy_low: low * busy_high,
                hold: seconds(hold),
                pause: seconds(pause),
                timeout: seconds(20),
            }
        },
    )
}

/// Runs controller and plant for twenty minutes; the load of each step is given.
fn run(limits: &Limits, count: u16, seed: u64, skew: f64, mut load: impl FnMut(u64) -> f64) -> Plant {
    let mut elastic = Elastic::new(limits.clone());
    let mut plant = Plant::new(count.min(u16::try_from(limits.ports.len()).unwrap()));
    let mut word = seed | 1;
    let mut chance = |one_in: u32| {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (word >> 33).is_multiple_of(u64::from(one_in))
    };
    for step in 0..2_400 {
        let now = Micros(step * STEP);
        if let Some(end) = plant.step(&mut chance) {
            assert_eq!(elastic.handle(Input::HookEnded(end), now), []);
        }
        let views = plant.views(load(step), skew);
        let actions = elastic.handle(Input::Workers(Some(&views)), now);
        plant.obey(actions, limits, &elastic, now);
    }
    plant
}

proptest! {
    #[test]
    fn whatever_the_load_bounds_and_pauses_are_kept(
        limits in arbitrary_limits(),
        count in 1_u16..=6,
        seed in any::<u64>(),
        loads in prop::collection::vec(0.0_f64..6.0, 1..40),
        span in 4_u64..200,
    ) {
        let load = |step: u64| loads[usize::try_from(step / span).unwrap() % loads.len()];
        let plant = run(&limits, count, seed, 0.3, load);
        let early = plant.changes.windows(2).find(|pair| pair[1].0.since(pair[0].0) < limits.pause);
        prop_assert_eq!(early, None);
    }

    #[test]
    fn a_constant_load_is_never_answered_to_and_fro(
        limits in arbitrary_limits(),
        count in 1_u16..=6,
        seed in any::<u64>(),
        load in 0.0_f64..6.0,
        skew in 0.0_f64..1.0,
    ) {
        let plant = run(&limits, count, seed, skew, |_| load);
        let directions: BTreeSet<_> = plant.changes.iter().map(|(_, more)| *more).collect();
        prop_assert!(directions.len() < 2, "{:?}", plant.changes);
        let late = plant.changes.iter().find(|(at, _)| *at > seconds(900));
        prop_assert_eq!(late, None, "it has not settled");
    }
}
