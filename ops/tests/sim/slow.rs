//! Processes that are slow: for a while whatever one does takes its time, and what comes meanwhile is taken together afterwards.

use flow::{SiteId, WorkerId};

use crate::world::{Happening, World};

/// How long one turn of a slow process takes.
const TURN_MIN: u64 = 5_000;
const TURN_MAX: u64 = 200_000;

/// A process of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Agent,
    Worker(WorkerId),
    Switch,
}

/// Until when a process is slow, and until when it does nothing.
struct Pace<'a> {
    slow_until: &'a mut u64,
    stopped_until: u64,
}

impl World {
    fn pace(&mut self, site: SiteId, part: Part) -> Option<Pace<'_>> {
        let state = self.sites.get_mut(&site)?;
        Some(match part {
            Part::Agent => Pace { slow_until: &mut state.slow_until, stopped_until: state.stopped_until },
            Part::Worker(worker) => {
                let place = state.workers.get_mut(&worker)?;
                Pace { slow_until: &mut place.slow_until, stopped_until: place.stopped_until }
            }
            Part::Switch => {
                Pace { slow_until: &mut state.switch.slow_until, stopped_until: state.switch.stopped_until }
            }
        })
    }

    /// The process is slow for so long.
    pub(crate) fn slows(&mut self, site: SiteId, part: Part, span: u64) {
        let until = self.now + span;
        self.trace(|| format!("{part:?} of site {site} is slow until {until}"));
        if let Some(pace) = self.pace(site, part) {
            *pace.slow_until = until.max(*pace.slow_until);
        }
        self.takes_turn(site, part);
    }

    /// The process does something. What else it has to do now is part of the same turn.
    pub(crate) fn takes_turn(&mut self, site: SiteId, part: Part) {
        let now = self.now;
        if self.pace(site, part).is_some_and(|pace| *pace.slow_until > now) {
            self.after(0, Happening::TurnEnds(site, part));
        }
    }

    /// The turn takes its time, if the process is slow.
    pub(crate) fn turn_ends(&mut self, site: SiteId, part: Part) {
        let now = self.now;
        if self.pace(site, part).is_none_or(|pace| *pace.slow_until <= now || pace.stopped_until > now) {
            return;
        }
        let span = TURN_MIN * (1 + self.rng.log_uniform(TURN_MAX / TURN_MIN));
        self.counts.add("turns of slow processes", 1);
        let Some(state) = self.sites.get_mut(&site) else { return };
        match part {
            Part::Agent => state.stopped_until = now + span,
            Part::Worker(worker) => {
                if let Some(place) = state.workers.get_mut(&worker) {
                    place.stopped_until = now + span;
                }
            }
            Part::Switch => self.switch_stops(site, span),
        }
    }
}
