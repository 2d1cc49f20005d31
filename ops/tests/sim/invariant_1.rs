//! I1: at most one decider per group and epoch; nobody acts under an epoch lower than one it has seen.
//! Source: docs/design.md, Words; the failure matrix, part 1.1.

use std::collections::BTreeMap;

use flow::{Epoch, GroupId, SiteId, WorkerId};

use crate::world::{Checked, Violation};

/// Who translated, under which epoch.
#[derive(Default)]
pub(crate) struct OneDecider {
    deciders: BTreeMap<(GroupId, Epoch), SiteId>,
    highest: BTreeMap<GroupId, Epoch>,
}

impl OneDecider {
    /// A translated packet left a worker. `planned`: no takeover and no relaxed move overlaps two owners on purpose.
    pub(crate) fn translated(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        site: SiteId,
        planned: bool,
    ) -> Checked {
        let first = *self.deciders.entry((group, epoch)).or_insert(site);
        if first != site {
            let what = format!("group {group} was served by sites {first} and {site} under epoch {epoch}");
            return Err(Violation::new(1, what));
        }
        let highest = self.highest.entry(group).or_insert(epoch);
        if epoch < *highest && planned {
            let what = format!("group {group} was served at site {site} under {epoch} after {highest}");
            return Err(Violation::new(1, what));
        }
        *highest = epoch.max(*highest);
        Ok(())
    }

    /// Workers that serve a group at one moment.
    pub(crate) fn serving(group: GroupId, by: &[(SiteId, WorkerId, Epoch)]) -> Checked {
        if by.len() <= 1 {
            return Ok(());
        }
        Err(Violation::new(1, format!("group {group} is served by {by:?} at the same time")))
    }
}
