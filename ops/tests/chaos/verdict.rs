//! What was promised, how often it was looked at, and what was found.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

/// Events that are shown before a failure.
const SHOWN: usize = 60;
/// A fault may have begun shortly after what it did harm to was sent.
const AROUND: Duration = Duration::from_secs(4);
/// What events of failures begin with; they are described by themselves.
const FAILED: &str = "FAILED";
/// Failures of one promise that are described.
const DESCRIBED: usize = 12;

/// Promises of docs/design.md and docs/operations.md, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Promise {
    Packets,
    Order,
    Calm,
    Connections,
    Moves,
    Acknowledged,
    Readiness,
    Whole,
    Drains,
    Processes,
    Memory,
    Counters,
}

const PROMISES: [(Promise, &str); 12] = [
    (Promise::Packets, "packets: none lost, twice, wrong or for others"),
    (Promise::Order, "packets of a flow stay in order"),
    (Promise::Calm, "calm: nothing at all comes to harm"),
    (Promise::Connections, "TCP connections survive, every byte right"),
    (Promise::Moves, "every move ends; each group has one owner"),
    (Promise::Acknowledged, "what was acknowledged stays, at all nodes"),
    (Promise::Readiness, "what is broken is said, by who can, in time"),
    (Promise::Whole, "all is whole again in time once healed"),
    (Promise::Drains, "drained sites become empty"),
    (Promise::Processes, "nobody ends unasked, nobody panics"),
    (Promise::Memory, "memory and descriptors stay flat"),
    (Promise::Counters, "workers' counters add up"),
];

#[derive(Clone, Debug, Default)]
struct Tally {
    looked: u64,
    excused: u64,
    failed: u64,
    described: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Verdict {
    tallies: [Tally; PROMISES.len()],
    events: Vec<(Duration, String)>,
    /// Where they are written as they come, beside the logs.
    file: Option<File>,
    /// When the first harm was done.
    first: Option<Duration>,
    skipped: Vec<String>,
    /// How often it was seen that something was said, and what.
    said: BTreeMap<String, u64>,
    /// How often something happened that the promises are about.
    happened: BTreeMap<String, u64>,
}

impl Verdict {
    pub(crate) fn new(events: &Path) -> Self {
        Self { file: File::create(events).ok(), ..Self::default() }
    }

    /// Something happened, or was done.
    pub(crate) fn event(&mut self, at: Duration, what: impl AsRef<str>) {
        let event = (at, what.as_ref().to_owned());
        if let Some(file) = &mut self.file {
            let _ = file.write_all(line(&event).as_bytes());
        }
        self.events.push(event);
    }

    /// It was looked at so often, and all was well or excused.
    pub(crate) fn held(&mut self, promise: Promise, count: u64) {
        self.tallies[promise as usize].looked += count;
    }

    pub(crate) fn excused(&mut self, promise: Promise, count: u64) {
        self.tallies[promise as usize].excused += count;
    }

    /// It did not hold.
    pub(crate) fn failed(&mut self, promise: Promise, count: u64, at: Duration, what: impl AsRef<str>) {
        let tally = &mut self.tallies[promise as usize];
        tally.failed += count;
        if tally.described.len() < DESCRIBED {
            tally.described.push(format!("{:8.2} s  {}", at.as_secs_f64(), what.as_ref()));
        }
        self.first = Some(self.first.map_or(at, |first| first.min(at)));
        self.event(at, format!("{FAILED} {promise:?}: {}", what.as_ref()));
    }

    /// Looks at something once.
    pub(crate) fn look(
        &mut self,
        promise: Promise,
        holds: bool,
        at: Duration,
        what: impl FnOnce() -> String,
    ) {
        self.held(promise, 1);
        if !holds {
            self.failed(promise, 1, at, what());
        }
    }

    /// Something was to be said, and how.
    pub(crate) fn said(&mut self, what: String) {
        *self.said.entry(what).or_default() += 1;
    }

    /// Something that the promises are about happened so often.
    pub(crate) fn happened(&mut self, what: &str, count: u64) {
        *self.happened.entry(what.to_owned()).or_default() += count;
    }

    pub(crate) fn skipped(&mut self, what: String) {
        if !self.skipped.contains(&what) {
            self.skipped.push(what);
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.tallies.iter().any(|tally| tally.failed > 0)
    }

    pub(crate) fn table(&self) -> String {
        let mut text = format!("{:<48} {:>9} {:>9} {:>7}\n", "promise", "looked at", "excused", "failed");
        for ((_, name), tally) in PROMISES.iter().zip(&self.tallies) {
            let Tally { looked, excused, failed, .. } = tally;
            let _ = writeln!(text, "{name:<48} {looked:>9} {excused:>9} {failed:>7}");
        }
        for (title, counts) in [("had to be said", &self.said), ("happened", &self.happened)] {
            let counts: Vec<_> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
            let _ = writeln!(text, "{title}: {}", counts.join(", "));
        }
        for what in &self.skipped {
            let _ = writeln!(text, "SKIPPED: {what}");
        }
        text
    }

    /// What failed, and what came before it.
    pub(crate) fn failures(&self) -> String {
        let mut text = String::new();
        for ((_, name), tally) in PROMISES.iter().zip(&self.tallies).filter(|(_, tally)| tally.failed > 0) {
            let _ = writeln!(text, "{name}: {} failures", tally.failed);
            tally.described.iter().for_each(|what| text += &format!("  {what}\n"));
        }
        text += "what came before the first:\n";
        let until = self.first.unwrap_or_default() + AROUND;
        let mut before: Vec<_> =
            self.events.iter().filter(|(at, what)| *at <= until && !what.starts_with(FAILED)).collect();
        before.sort_by_key(|(at, _)| *at);
        before[before.len().saturating_sub(SHOWN)..].iter().for_each(|one| text += &line(one));
        text
    }
}

fn line((at, what): &(Duration, String)) -> String {
    format!("{:8.2} s  {what}\n", at.as_secs_f64())
}
