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
/// Names that are remembered: as many as there can be sites, and far more than a group has nodes.
const NAMES_MAX: usize = 256;

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
    latest: u64,
    before: Option<u64>,
    /// How often the one before came back, and when that was last.
    returns: u32,
    returned: Micros,
    /// When anybody was last heard in this name.
    heard: Micros,
}

impl Heard {
    fn hear(&mut self, run: u64, now: Micros) {
        if self.latest == run {
            return;
        }
        let back = self.before == Some(run);
        let lately = now.since(self.returned) < MEMORY;
        self.returns = if back { if lately { self.returns + 1 } else { 1 } } else { 0 };
        self.before = Some(std::mem::replace(&mut self.latest, run));
        self.returned = now;
    }

    fn is_twice(&self, now: Micros) -> bool {
        self.returns >= RETURNS_MIN && now.since(self.returned) < MEMORY
    }
}

impl<Name: Ord + Clone + Display> Twins<Name> {
    pub(crate) fn new(line: &'static str) -> Self {
        Self { heard: Mutex::default(), line, notices: Notices::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears a message in a name.
    pub(crate) fn hear(&self, name: &Name, message: &Bytes, now: Micros) {
        let Some(run) = wire::run_of(message) else { return };
        if !self.hear_run(name, run, now) {
            return;
        }
        if let Some(kept_back) = self.notices.due(&name.to_string(), now) {
            tracing::error!(%name, kept_back, "{}", self.line);
        }
    }

    /// Whether there are two.
    fn hear_run(&self, name: &Name, run: u64, now: Micros) -> bool {
        let mut all = self.lock();
        if all.len() >= NAMES_MAX && !all.contains_key(name) {
            forget_silent(&mut all, now);
        }
        if all.len() >= NAMES_MAX && !all.contains_key(name) {
            return false;
        }
        let first = || Heard { latest: run, before: None, returns: 0, returned: now, heard: now };
        let heard = all.entry(name.clone()).or_insert_with(first);
        heard.heard = now;
        let changes = heard.latest != run;
        heard.hear(run, now);
        changes && heard.is_twice(now)
    }

    /// Who was there twice lately.
    pub(crate) fn twice(&self, now: Micros) -> Vec<Name> {
        self.lock().iter().filter(|(_, heard)| heard.is_twice(now)).map(|(name, _)| name.clone()).collect()
    }
}

/// Names that were not heard for so long that nothing they said counts any more: sites that were removed, for one.
fn forget_silent<Name: Ord>(all: &mut BTreeMap<Name, Heard>, now: Micros) {
    all.retain(|_, heard| now.since(heard.heard) < MEMORY);
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

    fn hear(twins: &Twins<u64>, runs: &[u64], from_s: u64) -> Micros {
        let mut now = Micros(from_s * SECOND);
        for run in runs {
            now = Micros(now.0 + SECOND);
            twins.hear(&3, &wire::with_run(&wire::encode(&"anything"), *run), now);
        }
        now
    }

    #[test]
    fn two_processes_that_take_turns_are_one_too_many_and_those_that_follow_one_another_are_not() {
        let twins = Twins::new("twice");
        // Started again and again, with a late message of the one before.
        let now = hear(&twins, &[7, 7, 8, 8, 7, 8, 8, 9, 9, 10], 0);
        assert!(twins.twice(now).is_empty());
        // Older releases say nothing.
        twins.hear(&4, &wire::encode(&"anything"), now);
        let now = hear(&twins, &[7, 7, 10, 7, 7, 10, 7], 20);
        assert_eq!(twins.twice(now), [3]);
        // One of them is stopped: it is forgotten.
        let now = hear(&twins, &[7; 10], 30);
        assert_eq!(twins.twice(now), [3]);
        assert!(twins.twice(Micros(now.0 + MEMORY.0)).is_empty());
        // Rare turns are restarts of something else, not two that run.
        for minute in (10..100).step_by(2) {
            let now = hear(&twins, &[7 + minute % 4], minute * 60);
            assert!(twins.twice(now).is_empty());
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let twins = Twins::new("twice");
        for node in 0..10 * NAMES_MAX as u64 {
            twins.hear(&node, &wire::with_run(&wire::encode(&1), 1), Micros(0));
        }
        assert_eq!(twins.lock().len(), NAMES_MAX);
    }

    #[test]
    fn names_that_are_silent_give_way_to_others() {
        let twins = Twins::new("twice");
        for node in 100..100 + NAMES_MAX as u64 {
            twins.hear(&node, &wire::with_run(&wire::encode(&1), 1), Micros(0));
        }
        let now = hear(&twins, &[1, 2, 1, 2, 1, 2, 1, 2], 100);
        assert_eq!(twins.twice(now), [3]);
    }
}
