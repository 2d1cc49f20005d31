//! Sites that are lost for good, what an operator does then, and workers that come and go with the load.

use dataplane::control::Request;
use flow::{SiteId, WorkerId};
use limosa::site::core::Input;
use placement::core::{Command, MovePhase, Proof};

use crate::site::EXTRA;
use crate::world::{Happening, Place, SITES, World};

/// Between two looks at whether a worker is to come or go.
const LOOK: u64 = 150_000;
/// Between two questions for statistics.
const STATS: u64 = 500_000;
/// Between two attempts of an operator to have done with a lost site.
const AGAIN: u64 = 500_000;
/// An operator makes sure for so long that the site does not forward any more.
pub(crate) const FENCED_AFTER: u64 = 3_000_000;

impl World {
    pub(crate) fn is_lost(&self, site: SiteId) -> bool {
        self.sites.get(&site).is_some_and(|state| state.lost)
    }

    /// Agent, switch and workers are gone. One site of three may be: then the placement nodes have their quorum.
    pub(crate) fn lose_site(&mut self, site: SiteId) {
        if SITES.into_iter().any(|site| self.is_lost(site)) {
            return;
        }
        self.trace(|| format!("site {site} is lost"));
        let workers: Vec<_> =
            self.sites.get(&site).map(|state| state.workers.keys().copied().collect()).unwrap_or_default();
        workers.into_iter().for_each(|worker| self.worker_crash(site, worker));
        self.agent_crash(site);
        let Some(state) = self.sites.get_mut(&site) else { return };
        state.lost = true;
        let waited = state.switch.forget_rules();
        waited.iter().for_each(|frame| self.excuse_frame(frame));
        // Clients and servers reach another site.
        let near = SITES.into_iter().find(|other| *other != site).unwrap_or(site);
        for talk in &mut self.traffic.talks {
            if talk.ingress == site {
                (talk.ingress, talk.stretch) = (near, talk.stretch + 1);
            }
            if talk.server_ingress == site {
                (talk.server_ingress, talk.stretch) = (near, talk.stretch + 1);
            }
        }
        let moves = |group: &placement::core::Group| {
            group.move_id.and_then(|id| self.log.cluster.moves.get(&id)).is_some_and(|mv| mv.to == site)
        };
        let groups = self.log.cluster.groups.values();
        let concerned: Vec<_> =
            groups.filter(|group| group.owner == site || moves(group)).map(|group| group.id).collect();
        concerned.into_iter().for_each(|group| self.excuses.lose(group));
        self.after(FENCED_AFTER, Happening::FailOver(site));
    }

    /// What `limosa site fail-over` proposes; again until nothing is left there. Then the site is removed.
    pub(crate) fn fail_over(&mut self, site: SiteId) {
        let cluster = &self.log.cluster;
        let takes = |to: &SiteId| cluster.sites.get(to).is_some_and(|to| to.takes_groups());
        let to = SITES.into_iter().find(|to| *to != site && takes(to));
        let lost = cluster.moves.values().filter(|mv| mv.to == site && mv.phase == MovePhase::Switching);
        let lost: Vec<_> = lost.map(|mv| (mv.id, mv.group, mv.from)).collect();
        let owned: Vec<_> = cluster.groups.values().filter(|group| group.owner == site).copied().collect();
        if !cluster.sites.contains_key(&site) {
            return;
        }
        if owned.is_empty() && cluster.moves.values().all(|mv| mv.to != site) {
            // As `limosa site remove`: refused while a move waits for it as an ingress.
            self.propose("operator", Command::RemoveSite { site }, None);
        }
        for (move_id, group, by) in lost {
            self.excuses.lose(group);
            self.propose("operator", Command::TakeBack { move_id, by, proof: Proof::Fenced }, None);
        }
        for group in owned.iter().filter(|group| group.move_id.is_none()) {
            self.excuses.lose(group.id);
            if let Some(to) = to {
                self.propose("operator", Command::Reassign { groups: vec![(group.id, to)] }, None);
            }
        }
        self.after(AGAIN, Happening::FailOver(site));
    }

    /// As the shell does: every worker is asked for its statistics, and one that does not answer is said to be silent, then hung.
    pub(crate) fn ask_stats(&mut self, site: SiteId) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.at(until, Happening::AskStats(site));
        }
        self.after(STATS, Happening::AskStats(site));
        let Some(state) = self.sites.get(&site) else { return };
        if state.life.is_none() {
            return;
        }
        let workers: Vec<_> = state.workers.keys().copied().collect();
        workers.into_iter().for_each(|worker| self.ask(site, worker, Request::Stats));
    }

    /// A worker is started by load, and ended when it was told to go and says that it has nothing.
    pub(crate) fn elastic(&mut self, site: SiteId) {
        self.after(LOOK, Happening::Elastic(site));
        if !self.mode.faults || self.is_lost(site) {
            return;
        }
        let (now, busy, act) = (self.micros(), self.now < self.busy_until, self.one_in(6));
        let Some(state) = self.sites.get(&site).filter(|state| state.stopped_until <= now.0) else { return };
        let Some(life) = state.life.as_ref() else { return };
        let number = life.number;
        if state.workers.get(&EXTRA).is_none_or(|place| place.process.is_none()) {
            if busy && act {
                self.start_extra(site, number);
            }
            return;
        }
        let views = life.agent.worker_views(now);
        let empty = views.and_then(|views| Some(views.get(&EXTRA)?.is_empty)).unwrap_or(false);
        match (life.agent.is_retiring(EXTRA), empty) {
            (true, true) => self.end_extra(site, number),
            (true, false) => {}
            (false, _) if busy && act => self.agent_input(site, number, Input::Retire(EXTRA)),
            (false, _) => {}
        }
    }

    fn start_extra(&mut self, site: SiteId, number: u32) {
        if let Some(state) = self.sites.get_mut(&site) {
            state.workers.insert(EXTRA, Place { extra: true, ..Place::default() });
        }
        self.trace(|| format!("worker {site}/{EXTRA} is started"));
        self.worker_start(site, EXTRA);
        let wait = self.between(100, 20_000);
        self.after(wait, Happening::WorkerConnect(site, number, EXTRA));
    }

    /// The stop hook; the worker had nothing, so nothing is excused.
    fn end_extra(&mut self, site: SiteId, number: u32) {
        self.trace(|| format!("worker {site}/{EXTRA} is ended"));
        let worker: WorkerId = EXTRA;
        self.worker_cut(site, worker);
        if let Some(place) = self.sites.get_mut(&site).and_then(|state| state.workers.get_mut(&worker)) {
            place.process = None;
        }
        self.checks.delays.forget((site, worker));
        let wait = self.between(20_000, 200_000);
        self.after(wait, Happening::AgentInput(site, number, Input::Recall(worker)));
    }
}
