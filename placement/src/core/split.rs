//! Groups are leaves of a binary trie over client prefixes: a hot one splits into its halves, two cold siblings merge.
//!
//! Owner and epoch go on: halves have those of the whole, a whole has the owner of its halves and the greater of their epochs. So
//! nothing moves, no rule of a switch changes, and whatever was fenced stays fenced. Neither happens while a group moves, or while
//! an old owner may still relay for it.

use flow::{GroupId, Prefix};

use super::apply::Step;
use super::command::{GROUPS_PER_SERVICE_MAX, Rejected};
use super::model::{Change, Cluster, Group};
use super::policy::{Kind, Policy};

impl Cluster {
    /// The group becomes its two halves.
    pub(super) fn split_group(&mut self, step: &mut Step, id: GroupId) -> Result<(), Rejected> {
        let Some((low, high)) = id.prefix.halves() else { return Err(Rejected::Smallest { group: id }) };
        let halves = [low, high].map(|prefix| GroupId { prefix, ..id });
        let Some(group) = self.groups.get(&id).copied() else {
            // Said before: it is split already.
            let is_split = halves.iter().all(|half| self.groups.contains_key(half));
            return if is_split { Ok(()) } else { Err(Rejected::NoGroup(id)) };
        };
        self.check_rest(&group, step.at_ms)?;
        let count = self.groups.keys().filter(|known| known.service == id.service).count();
        if count >= GROUPS_PER_SERVICE_MAX {
            return Err(Rejected::GroupsFull { service: id.service, max: GROUPS_PER_SERVICE_MAX });
        }
        self.remove_group(step, id);
        for half in halves {
            self.set_group(step, Group { id: half, ..group });
        }
        Ok(())
    }

    /// The two halves of a prefix become one group.
    pub(super) fn merge_groups(&mut self, step: &mut Step, whole: GroupId) -> Result<(), Rejected> {
        if self.groups.contains_key(&whole) {
            // Said before.
            return Ok(());
        }
        let service = self.services.get(&whole.service).ok_or(Rejected::NoService(whole.service))?;
        let is_cut_finer = service.group_len > whole.prefix.len();
        let Some((low, high)) = whole.prefix.halves() else { return Err(Rejected::NoGroup(whole)) };
        let half = |prefix: Prefix| {
            let id = GroupId { prefix, ..whole };
            self.groups.get(&id).copied().ok_or(Rejected::NoGroup(id))
        };
        let (low, high) = (half(low)?, half(high)?);
        if is_cut_finer {
            return Err(Rejected::AboveCut { group: whole, group_len: service.group_len });
        }
        if low.owner != high.owner {
            return Err(Rejected::TwoOwners { group: whole, low: low.owner, high: high.owner });
        }
        for half in [&low, &high] {
            self.check_rest(half, step.at_ms)?;
        }
        if let Some(rule) = finer_rule(&self.policy, &whole) {
            return Err(Rejected::FinerRule { group: whole, rule });
        }
        let (epoch, changed) = (low.epoch.max(high.epoch), low.changed.max(high.changed));
        for half in [low.id, high.id] {
            self.remove_group(step, half);
        }
        let standby = low.standby.filter(|_| low.standby == high.standby);
        self.set_group(step, Group { id: whole, owner: low.owner, epoch, move_id: None, changed, standby });
        Ok(())
    }

    /// No move is in hand, the owner is alive, and nobody relays for the group any more.
    fn check_rest(&self, group: &Group, now_ms: u64) -> Result<(), Rejected> {
        if let Some(present) = self.move_of(&group.id) {
            return Err(Rejected::Moving { group: group.id, move_id: present.id, to: present.to });
        }
        if self.sites.get(&group.owner).is_none_or(|site| !site.alive) {
            return Err(Rejected::SourceDead { group: group.id, site: group.owner });
        }
        match self.rest_ms(&group.id.prefix, group.id, now_ms) {
            0 => Ok(()),
            wait_ms => Err(Rejected::JustMoved { group: group.id, wait_ms }),
        }
    }

    /// How long the last move of anything in the prefix is to be waited for.
    fn rest_ms(&self, prefix: &Prefix, group: GroupId, now_ms: u64) -> u64 {
        let touches = |id: &GroupId| id.service == group.service && id.prefix.overlaps(prefix);
        let ended = self.finished.iter().filter(|finished| touches(&finished.last.group));
        let last = ended.map(|finished| finished.at_ms).max();
        let rest_ms = u64::from(self.policy.rest_after_move_ms);
        last.map_or(0, |at_ms| at_ms.saturating_add(rest_ms).saturating_sub(now_ms))
    }

    fn remove_group(&mut self, step: &mut Step, id: GroupId) {
        if self.groups.remove(&id).is_some() {
            step.changes.push(Change::GroupGone(id));
        }
    }
}

/// A rule that is about a part of the group only: it could not be kept for the whole.
pub(super) fn finer_rule(policy: &Policy, whole: &GroupId) -> Option<String> {
    let part = |prefix: &Prefix| whole.prefix.covers(prefix) && whole.prefix != *prefix;
    let finer = |rule: &&super::policy::Rule| {
        let scope = &rule.scope;
        let apart = if let Kind::Separate(labels) = &rule.kind { Some(labels) } else { None };
        let labels = scope.label.iter().chain(apart.into_iter().flatten());
        let labelled = labels.filter_map(|label| policy.labels.get(label)).flatten();
        scope.service.is_none_or(|service| service == whole.service)
            && scope.clients.iter().chain(labelled).any(part)
    };
    policy.rules.iter().find(finer).map(|rule| rule.name.clone())
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
