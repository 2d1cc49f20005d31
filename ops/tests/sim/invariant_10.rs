//! I10: what a move adds to the delay of a packet is bounded: between its reception by a worker and its emission or drop lies no more than
//! the waits that the settings allow, and what the faults that were in hand meanwhile take. Source: part 1.1; docs/operations.md, the
//! bounds of a move.

use std::collections::BTreeMap;

use flow::{SiteId, WorkerId};

use crate::site::BOUNDS;
use crate::world::{Checked, Violation};

/// Without faults a packet is held from the first flip on: for the lead of the flip, what the clocks differ by, the markers, the cut, and a
/// late ingress. Each of these waits may come to its bound once.
const CALM: u64 = FLIP_LEAD + CLOCKS + BOUNDS.marker_us + BOUNDS.cut_us + BOUNDS.late_us;
/// The longest lead of a policy in the simulation.
const FLIP_LEAD: u64 = 300_000;
/// Between the clocks of two sites, at most.
const CLOCKS: u64 = 120_000;
/// After a fault is over: a source waits for its target before it takes the group back, and the log is asked for that, once more when an
/// answer is lost. Meanwhile connections are made anew, the switch is read, and copies begin again.
const RECOVERY: u64 = BOUNDS.take_back_us + 2 * ASKED;
/// A proposal is repeated after so long at most, and takes so long.
const ASKED: u64 = 900_000;

/// Packets that are in workers, and what broke when.
#[derive(Default)]
pub(crate) struct Delays {
    inside: BTreeMap<(SiteId, WorkerId), BTreeMap<u64, u64>>,
    /// From when to when something was broken.
    faults: Vec<(u64, u64)>,
}

impl Delays {
    /// Something is broken for so long.
    pub(crate) fn broken(&mut self, now: u64, span: u64) {
        self.faults.push((now, now.saturating_add(span)));
    }

    pub(crate) fn enters(&mut self, at: (SiteId, WorkerId), number: u64, now: u64) {
        self.inside.entry(at).or_default().insert(number, now);
    }

    /// Gives the time that it took.
    pub(crate) fn leaves(&mut self, at: (SiteId, WorkerId), number: u64, now: u64) -> u64 {
        let entered = self.inside.get_mut(&at).and_then(|packets| packets.remove(&number));
        entered.map_or(0, |entered| now - entered)
    }

    /// The process is gone.
    pub(crate) fn forget(&mut self, at: (SiteId, WorkerId)) {
        self.inside.remove(&at);
    }

    /// What still waits.
    pub(crate) fn check(&self, now: u64) -> Checked {
        for ((site, worker), packets) in &self.inside {
            let late = packets.iter().find(|(_, entered)| now - **entered > self.bound(**entered, now));
            if let Some((number, entered)) = late {
                let what = format!(
                    "packet {number} is in worker {site}/{worker} for {} ms",
                    (now - entered) / 1_000
                );
                return Err(Violation::new(10, what));
            }
        }
        Ok(())
    }

    /// How long a packet that came then may be here now.
    fn bound(&self, entered: u64, now: u64) -> u64 {
        let of = |(from, to): &(u64, u64)| {
            (*from < now && to.saturating_add(RECOVERY) > entered).then(|| to - from)
        };
        CALM + self.faults.iter().filter_map(of).map(|span| span + RECOVERY).sum::<u64>()
    }
}
