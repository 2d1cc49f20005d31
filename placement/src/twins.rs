//! Whether a number is there twice: the directory of a placement node was copied, and two processes speak in its name.
//! Their promises are kept by neither, so what a majority has promised may be forgotten.
//!
//! Each process draws a number when it starts and says it with each message. A process that was started again has another
//! for ever; where two take turns, there are two. Those who say none are of earlier releases.

use std::collections::BTreeMap;
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
/// How long it counts. Both are heard several times a second while they run: one answers the leader's heartbeats, the other
/// hears none, and asks for votes.
const MEMORY: Micros = Micros(60_000_000);
/// Nodes that are remembered: far more than a group has.
const NODES_MAX: usize = 64;

/// What is known of who speaks for each node.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    heard: Mutex<BTreeMap<NodeId, Heard>>,
    notices: Notices,
}

#[derive(Debug)]
struct Heard {
    latest: u64,
    before: Option<u64>,
    /// How often the one before came back, and when that was last.
    returns: u32,
    returned: Micros,
}

impl Twins {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears a message of a node.
    pub(crate) fn hear(&self, node: NodeId, message: &Bytes, now: Micros) {
        let Some(run) = wire::run_of(message) else { return };
        if !self.is_twice(node, run, now) {
            return;
        }
        if let Some(kept_back) = self.notices.due(&node.to_string(), now) {
            tracing::error!(
                node,
                kept_back,
                "two processes run with the number of this placement node, and the group may lose what was committed: \
                 stop the one that was started with a copy of the directory, and take the copy away"
            );
        }
    }

    fn is_twice(&self, node: NodeId, run: u64, now: Micros) -> bool {
        let mut all = self.lock();
        if all.len() >= NODES_MAX && !all.contains_key(&node) {
            return false;
        }
        let first = || Heard { latest: run, before: None, returns: 0, returned: now };
        let heard = all.entry(node).or_insert_with(first);
        if heard.latest == run {
            return false;
        }
        let back = heard.before == Some(run);
        let lately = now.since(heard.returned) < MEMORY;
        heard.returns = if back { if lately { heard.returns + 1 } else { 1 } } else { 0 };
        heard.before = Some(std::mem::replace(&mut heard.latest, run));
        heard.returned = now;
        heard.returns >= RETURNS_MIN
    }

    /// Who was there twice lately.
    pub(crate) fn twice(&self, now: Micros) -> Vec<NodeId> {
        let lately = |heard: &Heard| heard.returns >= RETURNS_MIN && now.since(heard.returned) < MEMORY;
        self.lock().iter().filter(|(_, heard)| lately(heard)).map(|(node, _)| *node).collect()
    }
}

/// A way to others that says which process speaks, and hears which answers.
pub(crate) struct Speaking {
    way: Arc<dyn Transport>,
    twins: Arc<Twins>,
    clock: Clock,
    /// This process.
    run: u64,
}

impl Speaking {
    pub(crate) fn new(way: Arc<dyn Transport>, twins: Arc<Twins>, clock: Clock) -> Self {
        // Zero says nothing.
        let run = RandomState::new().hash_one("run").max(1);
        Self { way, twins, clock, run }
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
        self.twins.hear(to, &answer, self.clock.now());
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn hear(twins: &Twins, runs: &[u64], from_s: u64) -> Micros {
        let mut now = Micros(from_s * SECOND);
        for run in runs {
            now = Micros(now.0 + SECOND);
            twins.hear(3, &wire::with_run(&wire::encode(&"anything"), *run), now);
        }
        now
    }

    #[test]
    fn two_processes_that_take_turns_are_one_too_many_and_those_that_follow_one_another_are_not() {
        let twins = Twins::default();
        // Started again and again, with a late message of the one before.
        let now = hear(&twins, &[7, 7, 8, 8, 7, 8, 8, 9, 9, 10], 0);
        assert!(twins.twice(now).is_empty());
        // Older releases say nothing.
        twins.hear(4, &wire::encode(&"anything"), now);
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
        let twins = Twins::default();
        for node in 0..10 * NODES_MAX as u64 {
            twins.hear(node, &wire::with_run(&wire::encode(&1), 1), Micros(0));
        }
        assert_eq!(twins.lock().len(), NODES_MAX);
    }
}
