//! Memory and descriptors of every process: as long as it lives neither may grow beyond a bound.

use std::collections::BTreeMap;
use std::time::Duration;

use limosa::demo::cluster::{Cluster, Part};

use crate::run::parts;

/// A descriptor per connection that is just being made, to every other process.
const DESCRIPTORS_MORE: u64 = 16;
/// Anonymous memory that a process may have more of than in the first calm of its life. Within four minutes agents grew by 1.5 MiB, switches by 0.3,
/// and placement nodes by 3, since they remember a thousand moves and an audit. Workers grew by 9 once: an allocator keeps what was
/// needed for all packets that were held while others stood still.
fn kib_more(part: Part) -> u64 {
    let mib = match part {
        Part::Placement(_) | Part::Worker(..) => 16,
        Part::Agent(_) | Part::Switch(_) => 6,
    };
    mib << 10
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    kib: u64,
    descriptors: u64,
}

/// The first look at each process in a calm, and the last.
#[derive(Default)]
pub(crate) struct Usage(BTreeMap<(Part, u32), (Sample, Sample)>);

fn look(pid: u32, at: Duration) -> Option<Sample> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    // What is mapped from files comes as it is touched, and can be given back.
    let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib = kib.split_whitespace().next()?.parse().ok()?;
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
    Some(Sample { at, kib, descriptors })
}

impl Usage {
    pub(crate) fn sample(&mut self, cluster: &Cluster, at: Duration) {
        for part in parts() {
            let Some(pid) = cluster.process_id(part) else { continue };
            if let Some(sample) = look(pid, at) {
                self.0.entry((part, pid)).or_insert((sample, sample)).1 = sample;
            }
        }
    }

    fn lasting(&self) -> impl Iterator<Item = (&Part, &Sample, &Sample)> {
        let all = self.0.iter().map(|((part, _), (first, last))| (part, first, last));
        all.filter(|(_, first, last)| last.at > first.at)
    }

    /// Of each process that was seen twice: whether it stayed within the bounds, and in words.
    pub(crate) fn judge(&self) -> Vec<(bool, String)> {
        let judged = self.lasting().map(|(part, first, last)| {
            let holds = last.kib <= first.kib + kib_more(*part)
                && last.descriptors <= first.descriptors + DESCRIPTORS_MORE;
            (holds, format!("{part}: {first:?}, then {last:?}"))
        });
        judged.collect()
    }

    /// Of each kind the process that grew most.
    pub(crate) fn table(&self) -> String {
        let mut most: BTreeMap<&str, (&Sample, &Sample)> = BTreeMap::new();
        for (part, first, last) in self.lasting() {
            let known = most.entry(kind(*part)).or_insert((first, last));
            if growth(first, last) > growth(known.0, known.1) {
                *known = (first, last);
            }
        }
        let mut text = String::from("of each kind the process that grew most: memory and descriptors\n");
        for (kind, (first, last)) in most {
            let mib = |sample: &Sample| sample.kib as f64 / 1024.0;
            text += &format!(
                "{kind:<10} {:>4} s   {:>5.1} to {:>5.1} MiB   {} to {}\n",
                (last.at - first.at).as_secs(),
                mib(first),
                mib(last),
                first.descriptors,
                last.descriptors
            );
        }
        text
    }
}

fn growth(first: &Sample, last: &Sample) -> i64 {
    last.kib.cast_signed() - first.kib.cast_signed()
}

fn kind(part: Part) -> &'static str {
    match part {
        Part::Placement(_) => "placement",
        Part::Switch(_) => "switch",
        Part::Agent(_) => "agent",
        Part::Worker(..) => "worker",
    }
}
