//! How long groups have been where they are, and how long they are to stay.
//!
//! A group that was moved for its gain or for load and comes back within the hour was moved in vain: what moved it was noise, or two sites
//! that are as good. Each return makes it rest twice as long, so that whatever the plan believes, groups do not go to and fro for ever.
//!
//! The leader's own memory: a new one begins anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use flow::{GroupId, Micros, SiteId};

use super::model::{Cluster, Group, MoveReason};

/// A group that goes back to where it came from within this time was moved in vain.
pub(super) const RETURN: Micros = Micros(3_600_000_000);
/// What a group rests that came back once, if the policy's dwell is not longer; it doubles with each return, up to [`RETURN`].
const REST: Micros = Micros(60_000_000);
/// A group that comes back within so many times what it was to rest has not found its place yet.
const WINDOW: u64 = 4;
/// Returns that count.
const RETURNS_MAX: u8 = 8;
/// Moves in vain that are remembered.
const VAIN_LEN_MAX: usize = 65_536;

/// A group's stay at its owner.
#[derive(Clone, Copy, Debug)]
struct Stay {
    changed: u64,
    owner: SiteId,
    /// `None` for what the leader found or was created: a first owner may be far from good.
    since: Option<Micros>,
    /// Where it was before, and until when, if it left for its gain or for load.
    before: Option<(SiteId, Micros)>,
    returns: u8,
}

/// All stays.
#[derive(Debug, Default)]
pub(super) struct Stays {
    stays: BTreeMap<GroupId, Stay>,
    /// Groups that have moved and are to stay for a while, as of the last round.
    resting: BTreeSet<GroupId>,
    /// When groups came back, oldest first; of the last hour.
    vain: VecDeque<Micros>,
}

impl Stays {
    /// Looks at a group, which may have moved.
    pub(super) fn look(&mut self, cluster: &Cluster, group: &Group, now: Micros) {
        let (changed, owner) = (group.changed, group.owner);
        let found = Stay { changed, owner, since: None, before: None, returns: 0 };
        let stay = self.stays.entry(group.id).or_insert(found);
        if stay.changed == changed {
            return;
        }
        (stay.changed, stay.since) = (changed, Some(now));
        if stay.owner != owner {
            let left = std::mem::replace(&mut stay.owner, owner);
            // One that rested for an hour each time comes back no less often for that.
            let window = Micros(rest(cluster, stay).0.saturating_mul(WINDOW)).max(RETURN);
            let lately = stay.before.filter(|(_, until)| now.since(*until) < window);
            if !is_willing(cluster, &group.id) {
                (stay.before, stay.returns) = (None, 0);
            } else if let Some((_, until)) = lately.filter(|(site, _)| *site == owner) {
                stay.returns = (stay.returns + 1).min(RETURNS_MAX);
                stay.before = Some((left, now));
                self.vain.extend((now.since(until) < RETURN).then_some(now));
            } else {
                stay.returns = if lately.is_some() { stay.returns } else { 0 };
                stay.before = Some((left, now));
            }
        }
        if rest(cluster, stay).0 > 0 {
            self.resting.insert(group.id);
        }
    }

    /// Whether a group is to stay where it is for now.
    pub(super) fn rests(&self, group: &GroupId) -> bool {
        self.resting.contains(group)
    }

    /// For how long a group has been where it is; nothing for what the leader found there.
    pub(super) fn age(&self, group: &GroupId, now: Micros) -> Option<Micros> {
        self.stays.get(group).and_then(|stay| stay.since).map(|since| now.since(since))
    }

    /// Groups that have rested by now.
    pub(super) fn release(&mut self, cluster: &Cluster, now: Micros) -> Vec<GroupId> {
        let mut released = Vec::new();
        let Self { stays, resting, .. } = self;
        resting.retain(|group| {
            let rests = |stay: &Stay| stay.since.is_some_and(|at| now.since(at) < rest(cluster, stay));
            let rests = stays.get(group).is_some_and(rests);
            if !rests {
                released.push(*group);
            }
            rests
        });
        released
    }

    /// Forgets groups that are gone.
    pub(super) fn forget(&mut self, cluster: &Cluster) {
        self.stays.retain(|group, _| cluster.groups.contains_key(group));
    }

    /// Moves of the last hour that brought a group back to where it had been within an hour before.
    pub(super) fn vain(&mut self, now: Micros) -> u64 {
        while self.vain.front().is_some_and(|at| now.since(*at) >= RETURN) || self.vain.len() > VAIN_LEN_MAX {
            self.vain.pop_front();
        }
        self.vain.len() as u64
    }
}

/// Whether the last move of a group was one that the leader need not have made.
fn is_willing(cluster: &Cluster, group: &GroupId) -> bool {
    let last = cluster.finished.iter().rev().find(|finished| finished.last.group == *group);
    last.is_some_and(|finished| matches!(finished.last.reason, MoveReason::Delay | MoveReason::Load))
}

fn rest(cluster: &Cluster, stay: &Stay) -> Micros {
    let dwell = Micros::from_secs(cluster.policy.min_dwell_s.into());
    match stay.returns {
        0 => dwell,
        returns => Micros(dwell.max(REST).0 << (returns - 1)).min(RETURN.max(dwell)),
    }
}
