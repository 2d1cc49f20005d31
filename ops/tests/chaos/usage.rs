//! Memory and descriptors of every process: as long as it lives neither may grow beyond a bound.

use std::collections::BTreeMap;
use std::time::Duration;

use limosa::demo::cluster::{Cluster, Part};

use crate::run::parts;

/// A descriptor per connection that is just being made, to every other process.
const DESCRIPTORS_MORE: u64 = 16;
/// What an allocator keeps of a burst.
const KIB_MORE: u64 = 32 << 10;

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
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
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
            let holds = last.kib <= first.kib * 13 / 10 + KIB_MORE
                && last.descriptors <= first.descriptors + DESCRIPTORS_MORE;
            (holds, format!("{part}: {first:?}, then {last:?}"))
        });
        judged.collect()
    }

    /// Of each kind of process that which grew most.
    pub(crate) fn table(&self) -> String {
        let mut most: BTreeMap<&str, (u64, u64, u64, u64, u64)> = BTreeMap::new();
        for (part, first, last) in self.lasting() {
            let kind = match part {
                Part::Placement(_) => "placement",
                Part::Switch(_) => "switch",
                Part::Agent(_) => "agent",
                Part::Worker(..) => "worker",
            };
            let row = (last.at - first.at, first, last);
            let found = (row.0.as_secs(), row.1.kib, row.2.kib, row.1.descriptors, row.2.descriptors);
            let known = most.entry(kind).or_insert(found);
            if found.0 > known.0 {
                *known = found;
            }
        }
        let mut text =
            String::from("of each kind the process that was watched longest: memory and descriptors\n");
        for (kind, (seconds, kib, kib_then, descriptors, descriptors_then)) in most {
            text += &format!(
                "{kind:<10} {seconds:>4} s   {:>5.1} to {:>5.1} MiB   {descriptors} to {descriptors_then}\n",
                kib as f64 / 1024.0,
                kib_then as f64 / 1024.0
            );
        }
        text
    }
}
