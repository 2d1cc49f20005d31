//! The connection of an agent to its switch: what `switchctl::session` does around the driver.

use flow::SiteId;
use limosa::site::core::Input;
use switchctl::core::driver::{Event, Output};
use switchctl::ofp::Message;

use crate::world::{Checked, Happening, Queue, World};

impl World {
    pub(crate) fn switch_connect(&mut self, site: SiteId, number: u32) {
        let (connection, now) = (self.number(), self.micros());
        let Some(life) = self.life(site, number).filter(|life| life.connection == 0) else { return };
        life.connection = connection;
        life.driver.handle_connected(now);
        self.drive_switch(site, number);
    }

    pub(crate) fn switch_loss(&mut self, site: SiteId) {
        let Some(state) = self.sites.get_mut(&site) else { return };
        state.switch.forget_bundles();
        let Some(life) = state.life.as_mut().filter(|life| life.connection != 0) else { return };
        life.connection = 0;
        life.driver.handle_disconnected();
        let number = life.number;
        let wait = self.between(1_000, 300_000);
        self.after(wait, Happening::SwitchConnect(site, number));
        self.drive_switch(site, number);
    }

    pub(crate) fn drive_switch(&mut self, site: SiteId, number: u32) {
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
                Output::Event(_) => {}
            }
        }
    }

    pub(crate) fn to_switch(&mut self, site: SiteId, connection: u64, xid: u32, message: Message) -> Checked {
        let now = self.now;
        let lag = if self.one_in(8) { self.between(0, 150_000) } else { self.between(0, 10_000) };
        let Some(state) = self.sites.get_mut(&site) else { return Ok(()) };
        if state.life.as_ref().is_none_or(|life| life.connection != connection) {
            return Ok(());
        }
        let turn = state.switch.message(message, now, lag);
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
            return self.schedule.at(until, Happening::FromSwitch(site, connection, xid, message));
        }
        let now = self.micros();
        let Some(life) = self.sites.get_mut(&site).and_then(|state| state.life.as_mut()) else { return };
        if life.connection != connection {
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
