//! Whether somebody is there twice, and two processes speak in one name: the directory of a placement node was copied, and its promises
//! are kept by neither of both, so what a majority has promised may be forgotten; or a second agent was started as the same site, and
//! would act for flows that it does not have.
//!
//! Each process draws a number when it starts and says it with each message. A process that was started again has another
//! for ever; where two take turns, there are two. Those who say none are of earlier releases.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use flow::Micros;

use crate::clock::Clock;
use crate::node::{NodeId, Transport, TransportError};
use crate::notices::Notices;
use crate::wire;

/// How often a process has to come back after another was heard. Once may be a message that was late when its process was
/// started again.
const RETURNS_MIN: u32 = 3;
/// How long it counts. Both are heard several times a second while they run: one node answers the leader's heartbeats, the other
/// hears none, and asks for votes; agents report.
const MEMORY: Micros = Micros(60_000_000);
/// Who was heard alone for so long before another came was there first. Who has heard both from the start cannot know.
const ALONE: Micros = Micros(10_000_000);
/// Names that are remembered: as many as there can be sites, and far more than a group has nodes.
const NAMES_MAX: usize = 256;
/// Processes in one name that came later and are remembered; the one that was heard last longest ago is forgotten first.
const LATER_MAX: usize = 8;

/// A number for this process, or for a part of it that speaks in a name of its own. Zero says nothing.
pub(crate) fn draw_run() -> u64 {
    RandomState::new().hash_one("run").max(1)
}

/// What is known of who speaks in each name.
#[derive(Debug)]
pub(crate) struct Twins<Name> {
    heard: Mutex<BTreeMap<Name, Heard>>,
    /// What is said in the log of who is there twice.
    line: &'static str,
    notices: Notices,
}

#[derive(Debug)]
struct Heard {
    /// The last process, of those that did not come later than another.
    latest: u64,
    /// Since when no other was heard.
    since: Micros,
    before: Option<u64>,
    /// The one before was alone for long when the last one came.
    before_was_first: bool,
    /// How often the one before came back, and when that was last.
    returns: u32,
    returned: Micros,
    /// Both have taken turns, and nobody knows who was first; when that was last.
    in_doubt: Option<Micros>,
    /// Processes that came while another was there, and when they were heard last. They are so for ever: whoever should go on in
    /// their place is started again, and has another number.
    later: BTreeMap<u64, Micros>,
}

impl Heard {
    fn begin(run: u64, now: Micros) -> Self {
        Self {
            latest: run,
            since: now,
            before: None,
            before_was_first: false,
            returns: 0,
            returned: now,
            in_doubt: None,
            later: BTreeMap::new(),
        }
    }

    fn hear(&mut self, run: u64, now: Micros) -> Turn {
        if let Some(at) = self.later.get_mut(&run) {
            *at = now;
            return Turn::Later;
        }
        if self.latest == run {
            return Turn::First;
        }
        self.change(run, now);
        if self.returns < RETURNS_MIN {
            return Turn::First;
        }
        // The one that came back first was there before the other; it is the last one after an odd number of returns.
        if !self.before_was_first {
            self.in_doubt = Some(now);
            return Turn::First;
        }
        if let Some(other) = self.before.take() {
            self.note_later(other, now);
        }
        self.returns = 0;
        Turn::First
    }

    /// Another one than the last is heard.
    fn change(&mut self, run: u64, now: Micros) {
        let back = self.before == Some(run) && now.since(self.returned) < MEMORY;
        if back {
            self.returns += 1;
        } else {
            self.returns = 0;
            self.before_was_first = now.since(self.since) >= ALONE;
        }
        self.before = Some(std::mem::replace(&mut self.latest, run));
        (self.since, self.returned) = (now, now);
    }

    fn note_later(&mut self, run: u64, now: Micros) {
        if self.later.len() >= LATER_MAX
            && let Some(oldest) = self.later.iter().min_by_key(|(_, at)| **at).map(|(run, _)| *run)
        {
            self.later.remove(&oldest);
        }
        self.later.insert(run, now);
    }

    fn is_twice(&self, now: Micros) -> bool {
        self.later.values().chain(&self.in_doubt).any(|at| now.since(*at) < MEMORY)
    }
}

/// Whose message it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Of the only one that speaks in its name, of the first of two, or of one of two of which nobody knows which was first.
    First,
    /// Of the one of two that came later.
    Later,
}

impl<Name: Ord + Clone + Display> Twins<Name> {
    pub(crate) fn new(line: &'static str) -> Self {
        Self { heard: Mutex::default(), line, notices: Notices::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears a message in a name.
    pub(crate) fn hear(&self, name: &Name, message: &Bytes, now: Micros) -> Turn {
        let Some(run) = wire::run_of(message) else { return Turn::First };
        let (twice, turn) = self.hear_run(name, run, now);
        if twice && let Some(kept_back) = self.notices.due(&name.to_string(), now) {
            tracing::error!(%name, kept_back, "{}", self.line);
        }
        turn
    }

    fn hear_run(&self, name: &Name, run: u64, now: Micros) -> (bool, Turn) {
        let mut all = self.lock();
        if all.len() >= NAMES_MAX && !all.contains_key(name) {
            return (false, Turn::First);
        }
        let heard = all.entry(name.clone()).or_insert_with(|| Heard::begin(run, now));
        let turn = heard.hear(run, now);
        (heard.is_twice(now), turn)
    }

    /// Who was there twice lately.
    pub(crate) fn twice(&self, now: Micros) -> Vec<Name> {
        self.lock().iter().filter(|(_, heard)| heard.is_twice(now)).map(|(name, _)| name.clone()).collect()
    }
}

/// A way to others that says which process speaks, and hears which answers.
pub(crate) struct Speaking {
    way: Arc<dyn Transport>,
    twins: Arc<Twins<NodeId>>,
    clock: Clock,
    /// This process.
    run: u64,
}

impl Speaking {
    pub(crate) fn new(way: Arc<dyn Transport>, twins: Arc<Twins<NodeId>>, clock: Clock) -> Self {
        Self { way, twins, clock, run: draw_run() }
    }

    /// What this process says.
    pub(crate) fn said(&self, message: &Bytes) -> Bytes {
        wire::with_run(message, self.run)
    }
}

#[async_trait]
impl Transport for Speaking {
    async fn call(&self, to: NodeId, request: Bytes) -> Result<Bytes, TransportError> {
        let answer = self.way.call(to, self.said(&request)).await?;
        self.twins.hear(&to, &answer, self.clock.now());
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn hear(twins: &Twins<u64>, runs: &[u64], from_s: u64) -> (Micros, Vec<Turn>) {
        let mut now = Micros(from_s * SECOND);
        let mut turns = Vec::new();
        for run in runs {
            now = Micros(now.0 + SECOND);
            turns.push(twins.hear(&3, &wire::with_run(&wire::encode(&"anything"), *run), now));
        }
        (now, turns)
    }

    #[test]
    fn two_processes_that_take_turns_are_one_too_many_and_those_that_follow_one_another_are_not() {
        let twins = Twins::new("twice");
        // Started again and again, with a late message of the one before.
        let (now, turns) = hear(&twins, &[7, 7, 8, 8, 7, 8, 8, 9, 9, 10], 0);
        assert!(twins.twice(now).is_empty() && turns.iter().all(|turn| *turn == Turn::First));
        // Older releases say nothing.
        assert_eq!(twins.hear(&4, &wire::encode(&"anything"), now), Turn::First);
        let (now, _) = hear(&twins, &[7, 7, 10, 7, 7, 10, 7], 20);
        assert_eq!(twins.twice(now), [3]);
        // One of them is stopped: it is forgotten.
        let (now, _) = hear(&twins, &[7; 10], 30);
        assert_eq!(twins.twice(now), [3]);
        assert!(twins.twice(Micros(now.0 + MEMORY.0)).is_empty());
        // Rare turns are restarts of something else, not two that run.
        for minute in (10..100).step_by(2) {
            let (now, _) = hear(&twins, &[20 + minute % 4], minute * 60);
            assert!(twins.twice(now).is_empty());
        }
    }

    #[test]
    fn of_two_the_one_that_came_later_is_told_from_the_first_and_who_starts_again_is_never_the_later() {
        let twins = Twins::new("twice");
        hear(&twins, &[7; 12], 0);
        let (first, later) = (Turn::First, Turn::Later);
        let (now, turns) = hear(&twins, &[8, 7, 8, 7, 8, 7, 8], 12);
        assert_eq!(turns, [first, first, first, first, later, first, later]);
        assert_eq!(twins.twice(now), [3]);
        // The first is started again while the other goes on: it is taken at once.
        let (now, turns) = hear(&twins, &[8, 9, 8, 9, 9, 8], 20);
        assert_eq!(turns, [later, first, later, first, first, later]);
        assert_eq!(twins.twice(now), [3]);
        // Also when the other is alone for a while it has not become the right one; started again it is.
        let (now, turns) = hear(&twins, &[8, 8, 8, 10, 10], 100);
        assert_eq!(turns, [later, later, later, first, first]);
        assert_eq!(twins.twice(now), [3]);
        let (now, _) = hear(&twins, &[10], 110 + MEMORY.0 / SECOND);
        assert!(twins.twice(now).is_empty());
    }

    #[test]
    fn who_hears_both_from_the_start_says_so_and_takes_neither_for_the_later() {
        let twins = Twins::new("twice");
        let (now, turns) = hear(&twins, &[7, 8, 7, 8, 7, 8, 8, 7], 0);
        assert!(turns.iter().all(|turn| *turn == Turn::First));
        assert_eq!(twins.twice(now), [3]);
        // One of them ends.
        let (now, _) = hear(&twins, &[8], 10 + MEMORY.0 / SECOND);
        assert!(twins.twice(now).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let twins = Twins::new("twice");
        for node in 0..10 * NAMES_MAX as u64 {
            twins.hear(&node, &wire::with_run(&wire::encode(&1), 1), Micros(0));
        }
        assert_eq!(twins.lock().len(), NAMES_MAX);
        let mut heard = Heard::begin(1, Micros(0));
        for run in 2..100 {
            heard.note_later(run, Micros(run));
        }
        assert_eq!((heard.later.len(), heard.later.contains_key(&99)), (LATER_MAX, true));
    }
}
