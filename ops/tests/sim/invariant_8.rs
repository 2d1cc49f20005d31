//! I8: every move that began ends, and leaves no rule, port, memory, hold or tombstone behind. Source: part 1.1.

use dataplane::control::Phase;
use flow::{GroupId, SiteId};
use placement::core::Group;

use crate::world::{Checked, SITES, Violation, World};

impl World {
    /// Why the system is not at rest, if it is not. Tombstones may still relay.
    pub(crate) fn unsettled(&self) -> Option<String> {
        if let Some(mv) = self.log.cluster.moves.values().next() {
            return Some(format!(
                "move {} of {} from {} to {} is {:?}",
                mv.id, mv.group, mv.from, mv.to, mv.phase
            ));
        }
        if !self.log.appended.is_empty() || !self.log.tickets.is_empty() && self.now < self.busy_until {
            return Some("the log was asked".into());
        }
        if let Some(site) = self.log.cluster.sites.keys().find(|site| self.is_lost(**site)) {
            return Some(format!("site {site} is lost and not removed"));
        }
        SITES
            .into_iter()
            .find_map(|site| self.site_unsettled(site))
            .or_else(|| self.log.cluster.groups.values().find_map(|group| self.group_unsettled(group)))
    }

    fn site_unsettled(&self, site: SiteId) -> Option<String> {
        let state = self.sites.get(&site).filter(|state| !state.lost)?;
        let Some(life) = state.life.as_ref() else { return Some(format!("site {site} has no agent")) };
        if !life.agent.is_in_force() {
            return Some(format!("the rules of site {site} are not in force"));
        }
        if !life.agent.sites().keys().eq(self.log.cluster.sites.keys()) {
            return Some(format!("the agent of site {site} knows other sites than there are"));
        }
        let hands = life.agent.moves_in_hand();
        if hands != (0, 0) {
            return Some(format!("the agent of site {site} has moves in hand: {hands:?}"));
        }
        if life.agent.reshaping() > 0 {
            return Some(format!("site {site} has {} groups to split or merge", life.agent.reshaping()));
        }
        if life.watched != self.log.changes.len() {
            return Some(format!("the agent of site {site} has not heard everything"));
        }
        let rules = switchctl::compile(&life.agent.plan());
        (rules != state.switch.rules())
            .then(|| format!("the switch of site {site} has other rules than its plan says"))
    }

    pub(crate) fn group_unsettled(&self, group: &Group) -> Option<String> {
        let all = self.served_by(&group.id);
        let [(site, worker, epoch)] = all.as_slice() else {
            return Some(format!(
                "{} of site {} under {} is served by {all:?}",
                group.id, group.owner, group.epoch
            ));
        };
        if (*site, *epoch) != (group.owner, group.epoch) {
            return Some(format!(
                "{} of site {} under {} is served by {all:?}",
                group.id, group.owner, group.epoch
            ));
        }
        SITES.into_iter().find_map(|at| {
            let plan = self.sites.get(&at)?.life.as_ref()?.agent.plan();
            let planned = plan.groups.get(&group.id)?;
            let right = planned.steer == group.owner && (at != *site || planned.local == Some(*worker));
            (!right)
                .then(|| format!("site {at} plans {planned:?} for {}, served by {site}/{worker}", group.id))
        })
    }

    /// At the very end nothing is left but the groups at their owners.
    pub(crate) fn check_end(&self) -> Checked {
        if !self.mode.lossy {
            crate::invariant_4::ExactlyOnce::end(&self.traffic, &self.excuses)?;
        }
        for site in SITES {
            self.check_leftovers(site)?;
        }
        Ok(())
    }

    fn check_leftovers(&self, site: SiteId) -> Checked {
        let Some(state) = self.sites.get(&site).filter(|state| !state.lost) else { return Ok(()) };
        for (id, place) in &state.workers {
            let Some(process) = &place.process else { continue };
            let left = process.status.values().find(|status| {
                status.phase != Phase::Serving || status.move_id.is_some() || !self.owns(site, &status.group)
            });
            if let Some(status) = left {
                return Err(Violation::new(8, format!("worker {site}/{id} still has {status:?}")));
            }
            let retires = state.life.as_ref().is_some_and(|life| life.agent.is_retiring(*id));
            if let Some(status) = process.status.values().next().filter(|_| retires) {
                return Err(Violation::new(
                    8,
                    format!("worker {site}/{id} retires and still has {status:?}"),
                ));
            }
            let flows = process.worker.counters().flows;
            let of_groups: u64 = process.status.values().map(|status| status.flows).sum();
            if flows != of_groups {
                let what = format!("worker {site}/{id} has {flows} flows, its groups {of_groups}");
                return Err(Violation::new(8, what));
            }
        }
        let Some(life) = &state.life else { return Ok(()) };
        let left = life.agent.leftovers();
        if !left.is_empty() {
            let what = format!("the agent of site {site} still has {}", left.join(", "));
            return Err(Violation::new(8, what));
        }
        for (group, plan) in life.agent.plan().groups {
            if plan.local.is_some() && !self.owns(site, &group) {
                return Err(Violation::new(
                    8,
                    format!("site {site} still delivers {group} to {:?}", plan.local),
                ));
            }
        }
        Ok(())
    }

    fn owns(&self, site: SiteId, group: &GroupId) -> bool {
        self.log.cluster.groups.get(group).is_some_and(|known| known.owner == site)
    }
}
