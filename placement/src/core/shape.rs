//! When groups split and merge by themselves: by their share of what their site can carry, held for a while.
//!
//! Between the two thresholds lies a factor of two at least, so a load that sways by less than that never makes a group split and
//! merge in turn. Nothing is remembered but since when a threshold has been passed; a new leader counts anew.

use std::collections::BTreeMap;

use flow::{GroupId, Micros};

use super::command::Command;
use super::delay::Demand;
use super::model::{Cluster, Group, Site};
use super::policy::Split;

/// Splits and merges of one round, at most.
pub(super) const SHAPES_PER_ROUND: usize = 4;

/// Since when which group has been above, and which halves below.
#[derive(Debug, Default)]
pub(super) struct Shaper {
    above: BTreeMap<GroupId, Micros>,
    /// By the group that they would become.
    below: BTreeMap<GroupId, Micros>,
}

/// What is known of groups.
pub(super) struct Known<'a> {
    /// Its traffic; nothing when no site has told of any.
    pub(super) demand: &'a dyn Fn(&GroupId) -> Option<Demand>,
    /// It has been where it is for long enough.
    pub(super) rested: &'a dyn Fn(&GroupId) -> bool,
}

impl Shaper {
    /// What is to be split or merged now.
    pub(super) fn wishes(&mut self, cluster: &Cluster, known: &Known<'_>, now: Micros) -> Vec<Command> {
        let Some(split) = cluster.policy.split else {
            *self = Self::default();
            return Vec::new();
        };
        self.look(cluster, &split, known, now);
        let due = |since: &Micros, s: u32| now.since(*since) >= Micros::from_secs(s.into());
        let splits = self.above.iter().filter(|(_, since)| due(since, split.above_s)).map(|(id, _)| *id);
        let splits = splits.map(|group| Command::SplitGroup { group });
        let merges = self.below.iter().filter(|(_, since)| due(since, split.below_s)).map(|(id, _)| *id);
        let merges = merges.map(|group| Command::MergeGroups { group });
        splits.chain(merges).take(SHAPES_PER_ROUND).collect()
    }

    fn look(&mut self, cluster: &Cluster, split: &Split, known: &Known<'_>, now: Micros) {
        let share = |group: &Group| share(cluster.sites.get(&group.owner), (known.demand)(&group.id));
        let calm = |group: &Group| group.move_id.is_none() && (known.rested)(&group.id);
        let (mut above, mut below) = (BTreeMap::new(), BTreeMap::new());
        let mut before: Option<&Group> = None;
        for group in cluster.groups.values() {
            if group.id.prefix.halves().is_some() && calm(group) && share(group) > split.above {
                above.insert(group.id, self.above.get(&group.id).copied().unwrap_or(now));
            }
            // Siblings come one after the other.
            if let Some(whole) = before.and_then(|low| whole_of(cluster, low, group))
                && let Some(low) = before.filter(|low| calm(low) && calm(group))
                && share(low) + share(group) < split.below
            {
                below.insert(whole, self.below.get(&whole).copied().unwrap_or(now));
            }
            before = Some(group);
        }
        (self.above, self.below) = (above, below);
    }
}

/// The group that two would become, if they may.
fn whole_of(cluster: &Cluster, low: &Group, high: &Group) -> Option<GroupId> {
    let parent = low.id.prefix.parent()?;
    let siblings = low.id.service == high.id.service && low.id.prefix.sibling() == Some(high.id.prefix);
    let whole = GroupId { prefix: parent, ..low.id };
    let cut = cluster.services.get(&whole.service)?.group_len;
    let may = siblings
        && low.owner == high.owner
        && parent.len() >= cut
        && super::split::finer_rule(&cluster.policy, &whole).is_none();
    may.then_some(whole)
}

/// Of what the site carries, by the resource that it takes most of.
#[expect(clippy::cast_precision_loss, reason = "shares")]
fn share(site: Option<&Site>, demand: Option<Demand>) -> f64 {
    let (Some(site), Some(demand)) = (site, demand) else { return 0.0 };
    let of =
        |used: f64, capacity: Option<u64>| capacity.map_or(0.0, |capacity| used / capacity.max(1) as f64);
    let packets = of(demand.packets_per_s, Some(site.capacity_pps));
    let flows = of(demand.flows as f64, site.capacity_flows);
    packets.max(flows).max(of(demand.bits_per_s, site.capacity_bps))
}

#[cfg(test)]
#[path = "shape_tests.rs"]
mod tests;
