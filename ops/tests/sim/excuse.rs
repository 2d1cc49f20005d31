//! What may be lost, or out of order, for a while: packets of groups whose flows died with a worker, were taken over, or were opened
//! at a relaxed target that gave the group back; the order of packets that a target held when its move was taken back. Such a
//! group is watched again once it is served again and nothing of before is on its way.

use std::collections::{BTreeMap, BTreeSet};

use dataplane::control::Phase;
use flow::{GroupId, Protocol, ServiceId};

use crate::log::root;
use crate::world::{Place, SiteState, World};

/// For so long nothing may be in hand before a group is watched again: longer than any packet is on its way.
const CALM: u64 = 500_000;

/// By the groups that services were cut into at first.
#[derive(Default)]
pub(crate) struct Excuses {
    flows: BTreeSet<GroupId>,
    order: BTreeSet<GroupId>,
    calm_since: BTreeMap<GroupId, u64>,
    /// What was sent before is not judged.
    watched_from: BTreeMap<GroupId, u64>,
    /// How often a group was watched again.
    pub(crate) returned: u64,
}

impl Excuses {
    /// Flows of the group are lost.
    pub(crate) fn lose(&mut self, group: GroupId) {
        self.flows.insert(root(group));
        self.calm_since.remove(&root(group));
    }

    /// Packets of the group may pass one another.
    pub(crate) fn shuffle(&mut self, group: GroupId) {
        self.order.insert(root(group));
        self.calm_since.remove(&root(group));
    }

    pub(crate) fn may_lose(&self, group: &GroupId) -> bool {
        self.flows.contains(&root(*group))
    }

    pub(crate) fn may_shuffle(&self, group: &GroupId) -> bool {
        self.order.contains(&root(*group)) || self.may_lose(group)
    }

    /// Flows of some group of the service may be lost.
    pub(crate) fn may_lose_of(&self, service: ServiceId) -> bool {
        self.flows.iter().any(|group| group.service == service)
    }

    /// Whether what was sent then is judged for all groups of the service.
    pub(crate) fn is_watched_of(&self, service: ServiceId, at: u64) -> bool {
        let mut watched = self.watched_from.iter().filter(|(group, _)| group.service == service);
        watched.all(|(_, from)| *from <= at)
    }

    /// Whether what was sent then is judged.
    pub(crate) fn is_watched_since(&self, group: &GroupId, at: u64) -> bool {
        self.watched_from.get(&root(*group)).is_none_or(|from| *from <= at)
    }
}

impl World {
    /// Groups for which something was excused and where all is as it should be again.
    pub(crate) fn watch_again(&mut self) {
        let now = self.now;
        let excused: BTreeSet<_> = self.excuses.flows.union(&self.excuses.order).copied().collect();
        for group in excused {
            if !self.is_calm(&group) {
                self.excuses.calm_since.remove(&group);
                continue;
            }
            let since = *self.excuses.calm_since.entry(group).or_insert(now);
            if since + CALM <= now {
                self.judge_again(group);
            }
        }
    }

    fn judge_again(&mut self, group: GroupId) {
        self.trace(|| format!("{group} is watched again"));
        let excuses = &mut self.excuses;
        excuses.order.remove(&group);
        excuses.calm_since.remove(&group);
        excuses.watched_from.insert(group, self.now);
        excuses.returned += 1;
        if !excuses.flows.remove(&group) {
            return;
        }
        let inside = |client: std::net::Ipv4Addr| group.prefix.contains(client.into());
        self.checks.mappings.forget_all(inside);
        self.checks.ports.forget_all(inside);
        for talk in self.traffic.talks.iter_mut().filter(|talk| talk.group == group) {
            // The server hears from the client first, and TCP begins anew.
            talk.known_as = None;
            talk.open = talk.protocol != Protocol::Tcp;
        }
    }

    /// Every part of it is served by its owner only, and nobody holds, relays or moves anything of it.
    fn is_calm(&self, group: &GroupId) -> bool {
        let overlaps = |id: &GroupId| id.service == group.service && id.prefix.overlaps(&group.prefix);
        let mut parts = self.log.cluster.groups.values().filter(|part| overlaps(&part.id));
        if !parts.all(|part| part.move_id.is_none() && self.group_unsettled(part).is_none()) {
            return false;
        }
        // An ingress without an agent still sends by the path of before, to a worker that may be gone.
        let heard = |site: &SiteState| {
            let life = site.life.as_ref();
            life.is_some_and(|life| life.agent.is_in_force() && life.watched == self.log.changes.len())
        };
        if !self.sites.values().filter(|site| !site.lost).all(heard) {
            return false;
        }
        // What waits in a switch that is stopped may be of the group, and of before.
        if self.sites.values().any(|site| site.switch.is_stopped(self.now)) {
            return false;
        }
        let places = || self.sites.values().flat_map(|site| site.workers.values());
        // One that hangs will wake, and find that others have what it had.
        let hangs = |place: &&Place| place.stopped_until > self.now;
        let hung = places().filter(hangs).filter_map(|place| place.process.as_ref());
        if hung.flat_map(|process| process.status.keys()).any(overlaps) {
            return false;
        }
        let mut statuses =
            places().filter_map(|place| place.process.as_ref()).flat_map(|p| p.status.values());
        statuses.all(|status| !overlaps(&status.group) || status.phase == Phase::Serving)
    }
}
