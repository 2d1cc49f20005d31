//! What seeds came to, so that what a run covered can be seen.

use std::collections::BTreeMap;

/// Things that each run of two thousand seeds must come to: else the simulation has lost them.
const EXPECTED: [&str; 21] = [
    "chunks",
    "moves",
    "handovers after several chunks",
    "handovers after several rounds",
    "proposals lost with their leader",
    "proposals committed by the next leader",
    "proposals committed more than once",
    "connections closed",
    "connections reset",
    "echo replies that arrived",
    "ICMP errors that arrived",
    "flows that rested until they may expire",
    "flows expired",
    "frames that a stopped switch had no room for",
    "times a switch was said to be silent",
    "connections to silent switches given up",
    "turns of slow processes",
    "proposals to a node that was stopped",
    "sites removed",
    "streams that found no connection",
    "connections between agents that ended",
];

/// Counts by name; those that begin with "most" are greatest values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    /// So many more.
    pub(crate) fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    /// The greatest value yet.
    pub(crate) fn most(&mut self, what: &'static str, value: u64) {
        let known = self.0.entry(what).or_default();
        *known = value.max(*known);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            if what.starts_with("most") { self.most(what, *count) } else { self.add(what, *count) }
        }
    }

    /// Expected, and never come to.
    pub(crate) fn lacking(&self) -> Vec<&'static str> {
        EXPECTED.into_iter().filter(|what| self.0.get(what).is_none_or(|count| *count == 0)).collect()
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(what, count)| writeln!(f, "{count:>12} {what}"))
    }
}
