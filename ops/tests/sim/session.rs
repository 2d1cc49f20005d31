//! The connection of an agent to its switch: what `switchctl::session` does around the driver.

use dataplane::control::Phase;
use flow::SiteId;
use limosa::site::core::Input;
use switchctl::core::driver::{DriverError, Event, Output};
use switchctl::ofp::Message;
use switchctl::session::SessionOptions;

use crate::mutation::Mutation;
use crate::site::BOUNDS;
use crate::slow::Part;
use crate::world::{Checked, Happening, Queue, SiteState, World};

/// An agent knows after so long that nothing arrives: it asks after half a second without a word, and waits ten more.
pub(crate) const HALF_OPEN_MAX: u64 = 11_000_000;

/// A switch that was restarted listens after so long at most.
pub(crate) const AWAY_MAX: u64 = 300_000;

fn micros(span: std::time::Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

/// The shell's pauses between attempts to connect to the switch.
pub(crate) fn pause_min() -> u64 {
    micros(SessionOptions::default().backoff_min)
}

fn pause_max() -> u64 {
    micros(SessionOptions::default().backoff_max)
}

impl World {
    /// Until when the switch does nothing, if it is stopped.
    pub(crate) fn switch_stopped(&self, site: SiteId) -> Option<u64> {
        let until = self.sites.get(&site)?.switch.stopped_until;
        Some(until).filter(|until| *until > self.now)
    }

    pub(crate) fn switch_connect(&mut self, site: SiteId, number: u32) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.at(until, Happening::SwitchConnect(site, number));
        }
        let (connection, now) = (self.number(), self.micros());
        // One that is stopped is connected to all the same: its system accepts, and it reads later.
        let refused = self.sites.get(&site).is_some_and(|state| state.unreachable_until > now.0);
        let Some(life) = self.life(site, number).filter(|life| life.connection == 0) else { return };
        if refused {
            return self.switch_retry(site, number);
        }
        (life.connection, life.connected_at) = (connection, now.0);
        life.driver.handle_connected(now);
        if let Some(state) = self.sites.get_mut(&site) {
            state.muted_at = None;
        }
        self.drive_switch(site, number);
    }

    fn switch_retry(&mut self, site: SiteId, number: u32) {
        let connecting = self.between(100, 2_000);
        let Some(life) = self.life(site, number) else { return };
        let wait = life.pause + connecting;
        life.pause = (life.pause * 2).min(pause_max());
        self.after(wait, Happening::SwitchConnect(site, number));
    }

    /// The connection of the agent's present life ends, if there is one. What was said on it arrives all the same, or does not.
    pub(crate) fn switch_severed(&mut self, site: SiteId) {
        let arrives = self.one_in(2);
        let Some(state) = self.sites.get_mut(&site) else { return };
        let Some(connection) = state.life.as_ref().map(|life| life.connection).filter(|it| *it != 0) else {
            return;
        };
        if !arrives {
            state.switch.forget_bundles(connection);
            state.severed.insert(connection);
        }
    }

    /// The agent hears that the connection is gone, and connects again.
    pub(crate) fn switch_loss(&mut self, site: SiteId) {
        self.switch_severed(site);
        let now = self.now;
        let Some(state) = self.sites.get_mut(&site) else { return };
        let Some(life) = state.life.as_mut().filter(|life| life.connection != 0) else { return };
        life.connection = 0;
        if now - life.connected_at > pause_max() {
            life.pause = pause_min();
        }
        life.driver.handle_disconnected();
        let number = life.number;
        self.switch_retry(site, number);
        self.drive_switch(site, number);
    }

    /// What either says to the other is lost from now on.
    pub(crate) fn switch_mutes(&mut self, site: SiteId) {
        let now = self.now;
        let Some(state) = self.sites.get_mut(&site) else { return };
        if let Some(life) = state.life.as_ref().filter(|life| life.connection != 0) {
            state.severed.insert(life.connection);
            state.muted_at = Some(now);
        }
    }

    /// The process of the switch is another, which knows nothing, and listens in a moment.
    pub(crate) fn switch_restarts(&mut self, site: SiteId) {
        let away = self.between(0, AWAY_MAX);
        let until = self.now + away;
        let Some(state) = self.sites.get_mut(&site) else { return };
        let waited = state.switch.forget_rules();
        state.forgetful = true;
        state.unreachable_until = until;
        let said = state.life.as_ref().map(|life| life.connection);
        state.severed.extend(said);
        waited.iter().for_each(|frame| self.excuse_frame(frame));
        self.switch_loss(site);
    }

    /// The switch does nothing for so long: it neither answers nor forwards, and what comes waits in its sockets.
    pub(crate) fn switch_stops(&mut self, site: SiteId, span: u64) {
        let (now, until) = (self.now, self.now + span);
        let Some(state) = self.sites.get_mut(&site) else { return };
        state.switch.stop(now, until);
        self.trace(|| format!("switch {site} stops until {until}"));
        // Frames or messages are first.
        let wakes = until + self.between(0, 1);
        self.schedule.at(wakes, Happening::SwitchWakes(site));
        self.look_at_stopped_switches();
    }

    pub(crate) fn switch_wakes(&mut self, site: SiteId) -> Checked {
        let now = self.now;
        let Some(state) = self.sites.get_mut(&site).filter(|state| state.switch.stopped_until <= now) else {
            return Ok(());
        };
        state.outdated |= state.switch.stopped_for() > BOUNDS.relay_late_us;
        self.trace(|| format!("switch {site} wakes"));
        self.takes_turn(site, Part::Switch);
        let next = |world: &mut Self| world.sites.get_mut(&site)?.switch.read_waiting();
        while let Some((port, (frame, tunnel))) = next(self) {
            self.forward(site, port, tunnel, &frame)?;
        }
        Ok(())
    }

    /// The cut, and what the old owner sent before it, wait in the sockets of a switch that is stopped, and the new owner waits for the
    /// cut up to its bound only: what a move does at a switch that is stopped for longer may be out of order.
    pub(crate) fn look_at_stopped_switches(&mut self) {
        let now = self.now;
        for state in self.sites.values_mut() {
            state.outdated |= state.muted_at.is_some_and(|since| since + BOUNDS.relay_late_us < now);
            state.outdated &= !state.life.as_ref().is_some_and(|life| life.agent.is_in_force());
        }
        let long =
            |state: &SiteState| state.switch.is_stopped(now) && state.switch.stopped_for() > BOUNDS.cut_us;
        let stopped: Vec<_> = self.sites.iter().filter(|(_, state)| long(state)).map(|(id, _)| *id).collect();
        for site in stopped {
            let moves = self.log.cluster.moves.values().filter(|mv| mv.from == site || mv.to == site);
            let mut groups: Vec<_> = moves.map(|mv| mv.group).collect();
            let places = self.sites.get(&site).into_iter().flat_map(|state| state.workers.values());
            let statuses =
                places.filter_map(|place| place.process.as_ref()).flat_map(|process| process.status.values());
            groups
                .extend(statuses.filter(|status| status.phase != Phase::Serving).map(|status| status.group));
            groups.into_iter().for_each(|group| self.excuses.shuffle(group));
        }
    }

    pub(crate) fn switch_timer(&mut self, site: SiteId, number: u32) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.at(until, Happening::SwitchTimerLate(site, number));
        }
        let (now, timeless) = (self.micros(), self.mutation == Some(Mutation::DriverTimeless));
        let Some(life) = self.life(site, number).filter(|life| life.switch_timer_at <= now.0) else { return };
        life.switch_timer_at = u64::MAX;
        if timeless {
            return;
        }
        life.driver.handle_timeout(now);
        self.drive_switch(site, number);
    }

    pub(crate) fn drive_switch(&mut self, site: SiteId, number: u32) {
        self.drain_driver(site, number);
        let now = self.now;
        let Some(life) = self.life(site, number) else { return };
        if let Some(at) = life.driver.poll_timeout().map(|at| at.0.max(now + 1))
            && at < life.switch_timer_at
        {
            life.switch_timer_at = at;
            self.schedule.at(at, Happening::SwitchTimer(site, number));
        }
    }

    fn drain_driver(&mut self, site: SiteId, number: u32) {
        while let Some((output, connection)) =
            self.life(site, number).and_then(|life| Some((life.driver.poll_output()?, life.connection)))
        {
            match output {
                Output::Send(xid, message) => {
                    let delay = self.between(20, 2_000);
                    self.in_order(
                        Queue::ToSwitch(site),
                        delay,
                        Happening::ToSwitch(site, connection, xid, message),
                    );
                }
                Output::Settle(settle) => {
                    let until = self.sites.get(&site).map_or(0, |state| state.switch.settled_at());
                    let at = until.max(self.now) + self.between(10, 3_000);
                    self.schedule.at(at, Happening::Settled(site, connection, settle));
                }
                Output::Close => self.switch_loss(site),
                Output::Event(Event::InForce { tag, .. }) => {
                    if let Some(state) = self.sites.get_mut(&site) {
                        state.forgetful = false;
                    }
                    self.after(10, Happening::AgentInput(site, number, Input::InForce(tag)));
                }
                Output::Event(Event::Silent(_)) => self.counts.add("times a switch was said to be silent", 1),
                Output::Event(Event::Error(DriverError::Silent(_))) => {
                    self.counts.add("connections to silent switches given up", 1);
                }
                Output::Event(_) => {}
            }
        }
    }

    pub(crate) fn to_switch(&mut self, site: SiteId, connection: u64, xid: u32, message: Message) -> Checked {
        let now = self.now;
        if let Some(until) = self.switch_stopped(site) {
            self.schedule.put_off(until, Happening::ToSwitch(site, connection, xid, message));
            return Ok(());
        }
        let lag = if self.one_in(8) { self.between(0, 150_000) } else { self.between(0, 10_000) };
        let Some(state) = self.sites.get_mut(&site) else { return Ok(()) };
        if state.lost || state.severed.contains(&connection) {
            return Ok(());
        }
        self.takes_turn(site, Part::Switch);
        let Some(state) = self.sites.get_mut(&site) else { return Ok(()) };
        let turn = state.switch.message(connection, message, now, lag);
        if turn.committed {
            self.trace(|| format!("switch {site} commits, follows within {lag}"));
        }
        if let Some(reply) = turn.reply {
            let delay = self.between(20, 2_000);
            self.in_order(
                Queue::FromSwitch(site),
                delay,
                Happening::FromSwitch(site, connection, xid, reply),
            );
        }
        self.leave(site, turn.sent)
    }

    pub(crate) fn from_switch(&mut self, site: SiteId, connection: u64, xid: u32, message: Message) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.put_off(until, Happening::FromSwitch(site, connection, xid, message));
        }
        let now = self.micros();
        let Some(state) = self.sites.get_mut(&site) else { return };
        let Some(life) = state.life.as_mut() else { return };
        if life.connection != connection || state.severed.contains(&connection) {
            return;
        }
        life.driver.handle_message(xid, message, now);
        let number = life.number;
        self.drive_switch(site, number);
    }

    pub(crate) fn settled(&mut self, site: SiteId, connection: u64, settle: u64) {
        if let Some(until) = self.stopped(site) {
            return self.schedule.at(until, Happening::Settled(site, connection, settle));
        }
        if let Some(until) = self.switch_stopped(site) {
            let at = until + self.between(10, 3_000);
            return self.schedule.at(at, Happening::Settled(site, connection, settle));
        }
        let now = self.micros();
        let Some(life) = self.sites.get_mut(&site).and_then(|state| state.life.as_mut()) else { return };
        if life.connection != connection {
            return;
        }
        life.driver.handle_settled(settle, now);
        let number = life.number;
        self.drive_switch(site, number);
    }
}
