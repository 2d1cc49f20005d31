//! When workers are started and stopped: by how busy they are, with damping. Pure: what the workers report and the time go in, what
//! to do comes out.
//!
//! ```text
//!            over busy_high for hold, below max          it answers
//! (none) ──────────────────────────────────► Starting ───────────────► (none)
//!            below busy_low for hold, above min      nothing is left there          it is gone
//! (none) ──────────────────────────────────► Retiring ──────────────► Stopping ───────────────► (none)
//!                                               └── over busy_high for hold: recalled, it serves again
//! ```
//!
//! One change is in hand at a time, and between the beginnings of two there is a pause. Nothing is remembered over a restart of the
//! agent: a worker that was retiring serves again, and the pause begins anew.
//!
//! The share that counts is the mean over the workers that serve, since the agent spreads groups over them. For a load that stays as
//! it is, starting and stopping cannot alternate: a worker is retired only if the mean over those that remain stays below
//! `busy_high`, and that mean is the very number that would start one.

use std::collections::BTreeMap;

use flow::{Micros, WorkerId};
use serde::Serialize;

/// Of `busy_high`: what the remaining workers may have at most by prediction, so that a small error does not call the retired one back.
const PREDICTED_SHARE: f64 = 0.9;
/// Pause before a hook that failed is tried again; doubles each time.
const RETRY: Micros = Micros(1_000_000);
/// Most such doublings: about a minute.
const RETRY_DOUBLINGS: u32 = 6;

/// What an operator may set; see `[workers.elastic]` in docs/operations.md.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Workers that may be started, in the order in which they are.
    pub ports: Vec<WorkerId>,
    /// Workers that serve at least.
    pub min: usize,
    /// Workers that are there at most.
    pub max: usize,
    /// Mean busy share above which a worker is started, 0 to 1.
    pub busy_high: f64,
    /// Mean busy share below which one is retired, 0 to 1.
    pub busy_low: f64,
    /// How long a threshold has to be passed without interruption.
    pub hold: Micros,
    /// Shortest time between two changes.
    pub pause: Micros,
    /// How long a hook may take, and then the worker to come or go.
    pub timeout: Micros,
}

/// A worker that answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkerView {
    /// Share of time that it was not idle, 0 to 1; nothing while no report is fresh.
    pub busy: Option<f64>,
    /// It has no group and no part of a move, and relays nothing.
    pub is_empty: bool,
}

/// The workers that answer.
pub type Views = BTreeMap<WorkerId, WorkerView>;

/// A command of the operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Starts a worker.
    Start,
    /// Stops one.
    Stop,
}

/// How a hook ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookEnd {
    /// With exit status 0.
    Ok,
    /// With another one, or it could not be run.
    Failed,
    /// It took too long and was killed.
    Timeout,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// The workers that answer, a few times a second; nothing while the agent has not heard them all.
    Workers(Option<&'a Views>),
    /// The hook that was to be run has ended.
    HookEnded(HookEnd),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run a hook for a worker.
    Run(Hook, WorkerId),
    /// Move the groups of the worker to the others, and give it none.
    Retire(WorkerId),
    /// The worker is one like the others again.
    Recall(WorkerId),
}

/// Outcomes of one kind of hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// The worker came, or went.
    pub ok: u64,
    /// The hook failed.
    pub failed: u64,
    /// The hook took too long, or the worker did.
    pub timeout: u64,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of start hooks.
    pub starts: Outcomes,
    /// Of stop hooks.
    pub stops: Outcomes,
}

/// What a worker does, for those who ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It serves, or is ready to.
    Serving,
    /// Its hook runs, or it has not answered yet.
    Starting,
    /// Its groups leave.
    Retiring,
    /// Its hook runs, or it is not gone yet.
    Stopping,
}

impl State {
    /// Every one, for metrics.
    pub const ALL: [Self; 4] = [Self::Serving, Self::Starting, Self::Retiring, Self::Stopping];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Starting => "starting",
            Self::Retiring => "retiring",
            Self::Stopping => "stopping",
        }
    }
}

/// How far a hook is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// It failed; again at this time.
    Due(Micros),
    Running,
    /// It ended well; the worker has until then to come or go.
    Awaited(Micros),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Starting(Attempt),
    Retiring,
    Stopping(Attempt),
}

/// What is in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    worker: WorkerId,
    kind: Kind,
    failures: u32,
}

/// A condition, and since when it has held without interruption.
#[derive(Clone, Copy, Debug, Default)]
struct Held(Option<Micros>);

impl Held {
    fn note(&mut self, holds: bool, now: Micros) {
        self.0 = if holds { self.0.or(Some(now)) } else { None };
    }

    fn is_for(self, span: Micros, now: Micros) -> bool {
        self.0.is_some_and(|since| since.plus(span) <= now)
    }
}

/// Decides for one site.
#[derive(Debug)]
pub struct Elastic {
    limits: Limits,
    over: Held,
    under: Held,
    short: Held,
    /// When the last change began; the first input counts as one, since a former agent may have made one just before.
    changed: Option<Micros>,
    change: Option<Change>,
    counts: Counts,
}

impl Elastic {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let (over, under, short) = (Held::default(), Held::default(), Held::default());
        Self { limits, over, under, short, changed: None, change: None, counts: Counts::default() }
    }

    /// Takes one input, and says what to do, in this order.
    pub fn handle(&mut self, input: Input<'_>, now: Micros) -> Vec<Action> {
        self.changed.get_or_insert(now);
        match input {
            Input::Workers(Some(views)) => self.workers(views, now),
            Input::Workers(None) => {
                self.forget_thresholds();
                Vec::new()
            }
            Input::HookEnded(end) => {
                self.hook_ended(end, now);
                Vec::new()
            }
        }
    }

    /// Counts since the start.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How long a hook may take.
    #[must_use]
    pub fn timeout(&self) -> Micros {
        self.limits.timeout
    }

    /// What the change in hand makes of a worker.
    #[must_use]
    pub fn in_hand(&self) -> Option<(WorkerId, State)> {
        self.change.map(|change| {
            let state = match change.kind {
                Kind::Starting(_) => State::Starting,
                Kind::Retiring => State::Retiring,
                Kind::Stopping(_) => State::Stopping,
            };
            (change.worker, state)
        })
    }

    /// How often the hook of the change in hand has failed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.change.map_or(0, |change| change.failures)
    }

    fn forget_thresholds(&mut self) {
        (self.over, self.under, self.short) = (Held::default(), Held::default(), Held::default());
    }

    fn workers(&mut self, views: &Views, now: Micros) -> Vec<Action> {
        self.look(views, now);
        match self.change {
            None => self.decide(views, now),
            Some(change) => self.go_on(change, views, now),
        }
    }

    /// How long which threshold has been passed.
    fn look(&mut self, views: &Views, now: Micros) {
        let Limits { min, busy_high, busy_low, .. } = self.limits;
        let leaves = self.in_hand().filter(|(_, state)| *state != State::Starting).map(|(worker, _)| worker);
        let serving: Vec<_> = views.iter().filter(|(worker, _)| Some(**worker) != leaves).collect();
        let count = serving.len();
        let shares: Option<Vec<f64>> = serving.iter().map(|(_, view)| view.busy).collect();
        let (mut over, mut under) = (false, false);
        if let Some(shares) = shares.filter(|shares| !shares.is_empty()) {
            let sum: f64 = shares.iter().sum();
            let mean = sum / count as f64;
            over = mean > busy_high;
            let remain = count.saturating_sub(1).max(1) as f64;
            let stays_below = |share: f64| share < busy_high * PREDICTED_SHARE;
            under = mean < busy_low && stays_below(sum / remain) && shares.into_iter().all(stays_below);
        }
        self.over.note(over, now);
        self.under.note(under, now);
        self.short.note(count < min, now);
    }

    /// More workers are wanted, and have been for long enough.
    fn wants_more(&self, now: Micros) -> bool {
        self.over.is_for(self.limits.hold, now) || self.short.is_for(self.limits.hold, now)
    }

    fn is_rested(&self, now: Micros) -> bool {
        self.changed.is_none_or(|at| at.plus(self.limits.pause) <= now)
    }

    fn decide(&mut self, views: &Views, now: Micros) -> Vec<Action> {
        let Limits { min, max, hold, .. } = self.limits;
        if !self.is_rested(now) {
            return Vec::new();
        }
        if self.wants_more(now) {
            let free = self.limits.ports.iter().find(|worker| !views.contains_key(worker)).copied();
            let Some(worker) = free.filter(|_| views.len() < max) else { return Vec::new() };
            self.begin(worker, Kind::Starting(Attempt::Running), now);
            return vec![Action::Run(Hook::Start, worker)];
        }
        // The one that was started last goes first, as far as numbers tell.
        let last = self.limits.ports.iter().rev().find(|worker| views.contains_key(worker)).copied();
        let retires = self.under.is_for(hold, now) && views.len() > min;
        let Some(worker) = last.filter(|_| retires) else { return Vec::new() };
        self.begin(worker, Kind::Retiring, now);
        vec![Action::Retire(worker)]
    }

    fn begin(&mut self, worker: WorkerId, kind: Kind, now: Micros) {
        self.change = Some(Change { worker, kind, failures: 0 });
        self.changed = Some(now);
        self.forget_thresholds();
    }

    fn go_on(&mut self, change: Change, views: &Views, now: Micros) -> Vec<Action> {
        let view = views.get(&change.worker);
        match change.kind {
            Kind::Starting(attempt) => self.starting(change, attempt, view.is_some(), now),
            // It died, so this is no retirement any more; if it comes back, it serves.
            Kind::Retiring if view.is_none() => self.end(Some(Action::Recall(change.worker))),
            Kind::Retiring if view.is_some_and(|view| view.is_empty) => {
                self.change = Some(Change { kind: Kind::Stopping(Attempt::Running), ..change });
                vec![Action::Run(Hook::Stop, change.worker)]
            }
            Kind::Retiring if self.recalls(now) => self.recall(change.worker, now),
            Kind::Retiring => Vec::new(),
            Kind::Stopping(attempt) => self.stopping(change, attempt, view.is_some(), now),
        }
    }

    fn recalls(&self, now: Micros) -> bool {
        self.wants_more(now) && self.is_rested(now)
    }

    fn recall(&mut self, worker: WorkerId, now: Micros) -> Vec<Action> {
        self.changed = Some(now);
        self.forget_thresholds();
        self.end(Some(Action::Recall(worker)))
    }

    fn end(&mut self, action: Option<Action>) -> Vec<Action> {
        self.change = None;
        action.into_iter().collect()
    }

    fn starting(&mut self, change: Change, attempt: Attempt, is_up: bool, now: Micros) -> Vec<Action> {
        match attempt {
            Attempt::Awaited(_) if is_up => {
                self.counts.starts.ok += 1;
                self.end(None)
            }
            // Somebody else has started it meanwhile.
            Attempt::Due(_) if is_up => self.end(None),
            Attempt::Awaited(until) if until <= now => {
                self.counts.starts.timeout += 1;
                self.retry_later(now);
                Vec::new()
            }
            // The load may be gone by now.
            Attempt::Due(at) if at <= now && self.over.0.is_none() && self.short.0.is_none() => {
                self.end(None)
            }
            Attempt::Due(at) if at <= now => self.run_again(change, Hook::Start),
            Attempt::Due(_) | Attempt::Running | Attempt::Awaited(_) => Vec::new(),
        }
    }

    fn stopping(&mut self, change: Change, attempt: Attempt, is_up: bool, now: Micros) -> Vec<Action> {
        match attempt {
            Attempt::Awaited(_) if !is_up => {
                self.counts.stops.ok += 1;
                self.end(Some(Action::Recall(change.worker)))
            }
            Attempt::Due(_) if !is_up => self.end(Some(Action::Recall(change.worker))),
            Attempt::Awaited(until) if until <= now => {
                self.counts.stops.timeout += 1;
                self.retry_later(now);
                Vec::new()
            }
            Attempt::Due(_) if self.recalls(now) => self.recall(change.worker, now),
            Attempt::Due(at) if at <= now => self.run_again(change, Hook::Stop),
            Attempt::Due(_) | Attempt::Running | Attempt::Awaited(_) => Vec::new(),
        }
    }

    fn run_again(&mut self, change: Change, hook: Hook) -> Vec<Action> {
        self.set_attempt(Attempt::Running);
        vec![Action::Run(hook, change.worker)]
    }

    fn set_attempt(&mut self, attempt: Attempt) {
        if let Some(change) = &mut self.change {
            match &mut change.kind {
                Kind::Starting(at) | Kind::Stopping(at) => *at = attempt,
                Kind::Retiring => {}
            }
        }
    }

    fn retry_later(&mut self, now: Micros) {
        let Some(change) = &mut self.change else { return };
        let pause = Micros(RETRY.0 << change.failures.min(RETRY_DOUBLINGS));
        change.failures += 1;
        self.set_attempt(Attempt::Due(now.plus(pause)));
    }

    fn hook_ended(&mut self, end: HookEnd, now: Micros) {
        let outcomes = match self.change.map(|change| change.kind) {
            Some(Kind::Starting(Attempt::Running)) => &mut self.counts.starts,
            Some(Kind::Stopping(Attempt::Running)) => &mut self.counts.stops,
            // Nobody has asked for it.
            _ => return,
        };
        match end {
            HookEnd::Ok => return self.set_attempt(Attempt::Awaited(now.plus(self.limits.timeout))),
            HookEnd::Failed => outcomes.failed += 1,
            HookEnd::Timeout => outcomes.timeout += 1,
        }
        self.retry_later(now);
    }
}

#[cfg(test)]
#[path = "elastic_tests.rs"]
mod tests;
