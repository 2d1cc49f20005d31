//! What the switch is to do, and markers down the old path.

use std::collections::BTreeMap;
use std::sync::Arc;

use flow::{GroupId, Micros};
use placement::core::Group;
use switchctl::{GroupPlan, SitePlan, marker_out};
use transfer::core::{Ending, TargetInput};

use super::{Agent, Incoming, Marker, Output};

/// Markers are sent again this often while the move is switching: a tunnel may lose one.
const MARKER_INTERVAL: Micros = Micros(250_000);

impl Agent {
    /// What follows from the inputs taken: rules, then what waited for rules.
    pub(super) fn settle(&mut self, now: Micros) {
        self.try_sync(now);
        if self.plan_dirty && self.synced && (self.is_settled() || !self.has_strays()) {
            self.plan_dirty = false;
            self.tag += 1;
            let rules = switchctl::compile(&self.plan());
            self.outputs.push_back(Output::Rules(Arc::new(rules), self.tag));
        }
        self.release_prepared(now);
        self.release_withdrawn(now);
        self.send_markers(now);
    }

    fn release_prepared(&mut self, now: Micros) {
        let in_force = self.in_force;
        let ready = |incoming: &Incoming| incoming.prepared_at.is_some_and(|tag| tag <= in_force);
        let ids: Vec<_> = self.incoming.iter().filter(|(_, i)| ready(i)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(incoming) = self.incoming.get_mut(&id) {
                incoming.prepared_at = None;
            }
            self.feed_target(id, TargetInput::Prepared, now);
        }
    }

    fn release_withdrawn(&mut self, now: Micros) {
        let in_force = self.in_force;
        let due: Vec<_> =
            self.withdrawn.iter().filter(|(_, tag)| **tag <= in_force).map(|(id, _)| *id).collect();
        for id in due {
            self.withdrawn.remove(&id);
            self.feed_target(id, TargetInput::Ended(Ending::Aborted), now);
        }
        // A worker that is gone gives nothing back.
        self.withdrawn.retain(|id, _| self.incoming.contains_key(id));
    }

    fn send_markers(&mut self, now: Micros) {
        let due = |m: &Marker| m.tag <= self.in_force && m.at.is_none_or(|at| at <= now);
        let due: Vec<_> = self.markers.iter().filter(|(_, m)| due(m)).map(|(id, m)| (*id, *m)).collect();
        if due.is_empty() {
            return;
        }
        let plan = self.ports_plan();
        for (id, marker) in due {
            match marker_out(&plan, marker.old, &marker.group, id, marker.epoch) {
                Ok(packet) => self.outputs.push_back(Output::PacketOut(packet)),
                Err(error) => tracing::warn!(%error, group = %marker.group, "no marker can be sent"),
            }
            // The move may be over by now (its end can be heard before the flip is in force): then once is enough.
            if self.moves.contains_key(&id) || id.is_local() {
                if let Some(marker) = self.markers.get_mut(&id) {
                    marker.at = Some(now.plus(MARKER_INTERVAL));
                }
            } else {
                self.markers.remove(&id);
            }
        }
    }

    fn ports_plan(&self) -> SitePlan {
        SitePlan {
            site: self.site,
            ports: self.ports.clone(),
            services: BTreeMap::new(),
            groups: BTreeMap::new(),
            relayed: BTreeMap::new(),
        }
    }

    /// What the switch of this site is to do.
    #[must_use]
    pub fn plan(&self) -> SitePlan {
        let group = |(id, state): (&GroupId, &Group)| {
            let steer = self.steer.get(id).copied().unwrap_or(state.owner);
            let epoch = if steer == state.owner { state.epoch } else { state.epoch.next() };
            (*id, GroupPlan { epoch, steer, local: self.local.get(id).copied() })
        };
        let mut plan = SitePlan {
            site: self.site,
            ports: self.ports.clone(),
            services: self.slices.clone(),
            groups: self.groups.iter().map(group).collect(),
            relayed: BTreeMap::new(),
        };
        self.plan_relayed(&mut plan);
        plan
    }
}
