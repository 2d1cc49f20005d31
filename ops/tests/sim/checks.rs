//! All invariants that are checked as things happen.

use dataplane::control::{GroupStatus, Phase};
use flow::steer::Tag;
use flow::{Epoch, GroupId, SiteId, WorkerId};

use crate::invariant_1::OneDecider;
use crate::invariant_2::Mappings;
use crate::invariant_3::OutsidePorts;
use crate::invariant_4::ExactlyOnce;
use crate::invariant_5::Order;
use crate::invariant_6::Outcomes;
use crate::invariant_7::Closed;
use crate::invariant_10::Delays;
use crate::packet;
use crate::traffic::{LIVE, Way};
use crate::world::{Checked, SITES, World};

#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) decider: OneDecider,
    pub(crate) mappings: Mappings,
    pub(crate) ports: OutsidePorts,
    pub(crate) once: ExactlyOnce,
    pub(crate) order: Order,
    pub(crate) outcomes: Outcomes,
    pub(crate) closed: Closed,
    pub(crate) delays: Delays,
}

pub(crate) fn serves(phase: Phase) -> bool {
    matches!(phase, Phase::Serving | Phase::Copying | Phase::Draining)
}

impl World {
    /// All workers that decide about a group now; a relaxed target that is open counts as none, as it joins later.
    pub(crate) fn served_by(&self, group: &GroupId) -> Vec<(SiteId, WorkerId, Epoch)> {
        let mut all = Vec::new();
        for site in SITES {
            let Some(state) = self.sites.get(&site) else { continue };
            for (id, place) in &state.workers {
                let status = place.process.as_ref().and_then(|process| process.status.get(group));
                all.extend(status.filter(|s| serves(s.phase)).map(|status| (site, *id, status.epoch)));
            }
        }
        all
    }

    /// How many workers serve whatever has clients in common with the group.
    fn count_served_by(&self, group: &GroupId) -> usize {
        let has = |known: &GroupId| known.service == group.service && known.prefix.overlaps(&group.prefix);
        let places = self.sites.values().flat_map(|state| state.workers.values());
        places.filter(|place| place.process.iter().any(|process| process.serving.iter().any(has))).count()
    }

    /// The same of whatever has clients in common with the group; a worker that divides one counts once.
    fn any_served_by(&self, group: &GroupId) -> Vec<(SiteId, WorkerId, Epoch)> {
        let mut all = Vec::new();
        for (site, state) in &self.sites {
            for (id, place) in &state.workers {
                let statuses = place.process.iter().flat_map(|process| process.status.values());
                let mut serving = statuses.filter(|status| {
                    serves(status.phase)
                        && status.group.service == group.service
                        && status.group.prefix.overlaps(&group.prefix)
                });
                all.extend(serving.next().map(|status| (*site, *id, status.epoch)));
            }
        }
        all
    }

    /// What a worker does now, after one of its turns.
    pub(crate) fn check_states(&mut self, site: SiteId, worker: WorkerId) -> Checked {
        let place = self.sites.get(&site).and_then(|state| state.workers.get(&worker));
        let Some(process) = place.and_then(|place| place.process.as_ref()) else { return Ok(()) };
        for status in process.status.values().filter(|status| serves(status.phase)) {
            self.checks.outcomes.serves(status.group, status.epoch)?;
            // The list is for who reads of it.
            if self.count_served_by(&status.group) > 1 && !self.excuses.may_lose(&status.group) {
                OneDecider::serving(status.group, &self.any_served_by(&status.group))?;
            }
        }
        Ok(())
    }

    /// A translated packet leaves a worker.
    pub(crate) fn check_egress(&mut self, site: SiteId, worker: WorkerId, frame: &[u8]) -> Checked {
        let Some(seen) = packet::read(frame).filter(|seen| !seen.by_port) else { return Ok(()) };
        let Some((sending, talk)) = self.traffic.of(seen.number) else { return Ok(()) };
        let number = sending.talk;
        let (group, client, known_as) = (talk.group, talk.client, talk.known_as);
        let place = self.sites.get(&site).and_then(|state| state.workers.get(&worker));
        let statuses = place.and_then(|place| place.process.as_ref()).map(|process| process.status.values());
        let is_of = |status: &&GroupStatus| {
            status.group.service == group.service && status.group.prefix.contains(client.0.into())
        };
        let status =
            statuses.into_iter().flatten().filter(is_of).max_by_key(|status| status.group.prefix.len());
        let status = status.copied();
        // What is true of a group is true of each of its clients, whatever it was split or merged into since.
        let host = GroupId { prefix: flow::Prefix::host(client.0.into()), ..group };
        let outside = if packet::tag(frame) == Some(Tag::ToOutside) { Some(seen.source) } else { known_as };
        let lost = self.excuses.may_lose(&group);
        let planned = !lost && !self.log.is_relaxed(&group);
        self.trace(|| {
            format!("worker {site}/{worker} translates {} {:?} as {outside:?}", seen.number, sending.way)
        });
        if let Some(status) = status {
            let open = status.phase == Phase::Open;
            self.checks.decider.translated(host, status.epoch, site, planned)?;
            if !open {
                self.checks.outcomes.translated(status.group, status.epoch);
            }
        }
        let Some(outside) = outside.filter(|_| seen.quoted.is_none()) else { return Ok(()) };
        let now = self.now;
        if sending.way == Way::In && now - sending.at >= LIVE {
            // It waited in a switch that stood still for longer than a flow lives: its port may be of another flow of the same client.
            return Ok(());
        }
        self.traffic.talks[number].translated = now;
        if lost {
            self.checks.mappings.forget(seen.protocol, client);
        }
        self.checks.mappings.translated(seen.protocol, client, outside, now)?;
        match self.services.get(&group.service) {
            Some(slices) => {
                let planned = !lost;
                self.checks.ports.translated(slices, seen.protocol, (client, outside), planned, now)
            }
            None => Ok(()),
        }
    }
}
