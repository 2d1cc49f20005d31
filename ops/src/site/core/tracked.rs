//! Maps by group that note what was changed, so that rules can be kept up in proportion to that.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use flow::GroupId;

/// Reads as the map that it is; writes are noted.
#[derive(Debug)]
pub(super) struct Tracked<V> {
    map: BTreeMap<GroupId, V>,
    changed: BTreeSet<GroupId>,
}

impl<V> Default for Tracked<V> {
    fn default() -> Self {
        Self { map: BTreeMap::new(), changed: BTreeSet::new() }
    }
}

impl<V> Deref for Tracked<V> {
    type Target = BTreeMap<GroupId, V>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}

impl<V: Copy + PartialEq> Tracked<V> {
    pub(super) fn insert(&mut self, id: GroupId, value: V) -> Option<V> {
        let before = self.map.insert(id, value);
        if before != Some(value) {
            self.changed.insert(id);
        }
        before
    }

    pub(super) fn remove(&mut self, id: &GroupId) -> Option<V> {
        let before = self.map.remove(id);
        if before.is_some() {
            self.changed.insert(*id);
        }
        before
    }

    pub(super) fn retain(&mut self, mut keep: impl FnMut(&GroupId, &V) -> bool) {
        let changed = &mut self.changed;
        self.map.retain(|id, value| {
            let keep = keep(id, value);
            if !keep {
                changed.insert(*id);
            }
            keep
        });
    }

    pub(super) fn clear(&mut self) {
        self.changed.extend(self.map.keys());
        self.map.clear();
    }

    /// What was changed since the last call.
    pub(super) fn take_changed(&mut self) -> BTreeSet<GroupId> {
        std::mem::take(&mut self.changed)
    }
}
