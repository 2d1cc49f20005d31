//! I10: what a move adds to the delay of a packet is bounded: between its reception by a worker and its emission or drop lies no more than
//! the waits that the settings allow, and what the faults that were in hand meanwhile take. A fault at one site counts for the groups
//! that the site has or moves: as an ingress it adds no more than the settings allow. Source: part 1.1; docs/operations.md, the
//! bounds of a move.

use std::collections::{BTreeMap, BTreeSet};

use flow::{GroupId, SiteId, WorkerId};

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

/// Something is broken from then to then.
struct Broken {
    from: u64,
    to: u64,
    /// At one site: for these groups only.
    at: Option<(SiteId, BTreeSet<GroupId>)>,
}

impl Broken {
    fn concerns(&self, group: Option<GroupId>) -> bool {
        self.at.as_ref().is_none_or(|(_, groups)| group.is_none_or(|group| groups.contains(&group)))
    }
}

/// A packet in a worker: since when, and of which group, if of one.
struct Inside {
    entered: u64,
    group: Option<GroupId>,
}

/// Packets that are in workers, and what broke when.
#[derive(Default)]
pub(crate) struct Delays {
    inside: BTreeMap<(SiteId, WorkerId), BTreeMap<u64, Inside>>,
    faults: Vec<Broken>,
}

impl Delays {
    /// Something is broken for so long; at one site, if it is, that has or moves these groups.
    pub(crate) fn broken(&mut self, now: u64, span: u64, at: Option<(SiteId, BTreeSet<GroupId>)>) {
        self.faults.push(Broken { from: now, to: now.saturating_add(span), at });
    }

    /// The group moves between these sites now.
    pub(crate) fn moves(&mut self, now: u64, group: GroupId, sites: [SiteId; 2]) {
        for fault in self.faults.iter_mut().filter(|fault| fault.to.saturating_add(RECOVERY) > now) {
            if let Some((site, groups)) = &mut fault.at
                && sites.contains(site)
            {
                groups.insert(group);
            }
        }
    }

    pub(crate) fn enters(&mut self, at: (SiteId, WorkerId), number: u64, group: Option<GroupId>, now: u64) {
        self.inside.entry(at).or_default().insert(number, Inside { entered: now, group });
    }

    /// Gives the time that it took.
    pub(crate) fn leaves(&mut self, at: (SiteId, WorkerId), number: u64, now: u64) -> u64 {
        let entered = self.inside.get_mut(&at).and_then(|packets| packets.remove(&number));
        entered.map_or(0, |packet| now - packet.entered)
    }

    /// The process is gone.
    pub(crate) fn forget(&mut self, at: (SiteId, WorkerId)) {
        self.inside.remove(&at);
    }

    /// What still waits.
    pub(crate) fn check(&self, now: u64) -> Checked {
        for ((site, worker), packets) in &self.inside {
            let late = packets.iter().find(|(_, packet)| {
                let took = now - packet.entered;
                took > CALM && took > self.bound(packet, now)
            });
            if let Some((number, Inside { entered, .. })) = late {
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
    fn bound(&self, packet: &Inside, now: u64) -> u64 {
        let of = |fault: &Broken| {
            let meanwhile = fault.from < now && fault.to.saturating_add(RECOVERY) > packet.entered;
            (meanwhile && fault.concerns(packet.group)).then(|| fault.to - fault.from)
        };
        CALM + self.faults.iter().filter_map(of).map(|span| span + RECOVERY).sum::<u64>()
    }
}
