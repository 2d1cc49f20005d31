//! What the switch is to do, and markers down the old path.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flow::{GroupId, Micros};
use placement::core::Group;
use switchctl::{Compiled, GroupPlan, PlanEntry, Ports, RuleSet, SitePlan, marker_out};
use transfer::core::{Ending, TargetInput};

use super::{Agent, Incoming, Marker, Output};

/// When more than one group in so many has changed, rules are made anew: each change costs a walk, all together one pass.
const REBUILD_SHARE: usize = 8;

/// Markers are sent again this often while the move is switching: a tunnel may lose one.
const MARKER_INTERVAL: Micros = Micros(250_000);

impl Agent {
    /// What follows from the inputs taken: rules, then what waited for rules. To be called when no more inputs are at hand: an agent that was
    /// stopped finds many, and the switch must not follow, be it for a moment, what the first of them say and the last have undone.
    pub fn settle(&mut self, now: Micros) {
        if self.plan_dirty
            && self.synced
            && self.behind_since.is_none()
            && (self.is_settled() || !self.has_strays())
        {
            self.plan_dirty = false;
            self.tag += 1;
            let rules = self.compile();
            self.outputs.push_back(Output::Rules(Arc::new(rules), self.tag));
        }
        self.release_prepared(now);
        self.release_withdrawn(now);
        self.send_markers(now);
    }

    /// The rules of the plan. Work is that of what changed since the last time, unless that is much.
    fn compile(&mut self) -> RuleSet {
        let mut changed = self.groups.take_changed();
        changed.extend(self.steer.take_changed());
        changed.extend(self.local.take_changed());
        for id in &changed {
            if self.local.contains_key(id) && !self.groups.contains_key(id) {
                self.strays.insert(*id);
            } else {
                self.strays.remove(id);
            }
        }
        let heirs = self.strays.iter().flat_map(|gone| self.overlapping(gone));
        let scope: BTreeSet<_> = self.strays.iter().copied().chain(heirs).collect();
        changed.extend(std::mem::replace(&mut self.relay_scope, scope));
        changed.extend(self.relay_scope.iter());
        let much = changed.len() * REBUILD_SHARE > self.groups.len();
        match self.compiled.take() {
            Some(mut compiled) if !much => {
                compiled.update(&self.entries(&changed));
                self.compiled = Some(compiled);
            }
            _ => self.compiled = Some(Compiled::new(&self.plan())),
        }
        let rules = self.compiled.as_ref().map(|compiled| compiled.rules().clone()).unwrap_or_default();
        debug_assert!(
            rules == switchctl::compile(&self.plan()),
            "rules that are kept up are those of the plan"
        );
        rules
    }

    /// What the plan says of these groups. Those that others relay for, and what took their place, have to be among them.
    fn entries(&self, ids: &BTreeSet<GroupId>) -> BTreeMap<GroupId, PlanEntry> {
        let mut part = self.ports_plan();
        part.groups =
            ids.iter().filter_map(|id| Some((*id, self.group_plan(self.groups.get(id)?)))).collect();
        let relayed = self.strays.iter().filter_map(|id| Some((*id, *self.local.get(id)?)));
        self.plan_relayed(&mut part, relayed);
        let entry = |id: &GroupId| {
            let (group, relayed) = (part.groups.get(id).copied(), part.relayed.get(id).copied());
            (*id, PlanEntry { group, relayed })
        };
        ids.iter().map(entry).collect()
    }

    fn group_plan(&self, state: &Group) -> GroupPlan {
        let steer = self.steer.get(&state.id).copied().unwrap_or(state.owner);
        let epoch = if steer == state.owner { state.epoch } else { state.epoch.next() };
        GroupPlan { epoch, steer, local: self.local.get(&state.id).copied() }
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
        let in_force = self.in_force;
        let due = |m: &Marker| m.tag <= in_force && m.at.is_none_or(|at| at <= now);
        let again: Vec<_> = self.markers.iter().filter(|(_, m)| due(m)).map(|(id, m)| (*id, *m)).collect();
        let once: Vec<_> = self.unheard.extract_if(.., |(_, marker)| marker.tag <= in_force).collect();
        if again.is_empty() && once.is_empty() {
            return;
        }
        let plan = self.ports_plan();
        for (id, marker) in again.iter().chain(&once) {
            match marker_out(&plan, marker.old, &marker.group, *id, marker.epoch) {
                Ok(packet) => self.outputs.push_back(Output::PacketOut(packet)),
                Err(error) => tracing::warn!(%error, group = %marker.group, "no marker can be sent"),
            }
        }
        for (id, _) in again {
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

    /// Rules of all groups may lead to ports that are others now.
    pub(super) fn set_ports(&mut self, ports: Ports) {
        if self.ports != ports {
            self.ports = ports;
            self.compiled = None;
            self.plan_dirty = true;
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
        let group = |(id, state): (&GroupId, &Group)| (*id, self.group_plan(state));
        let mut plan = SitePlan {
            site: self.site,
            ports: self.ports.clone(),
            services: self.slices.clone(),
            groups: self.groups.iter().map(group).collect(),
            relayed: BTreeMap::new(),
        };
        self.plan_relayed(&mut plan, self.relayed());
        plan
    }
}
