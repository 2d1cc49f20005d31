//! Connections between the agents of sites, as `ops/src/net.rs` keeps them: one to each peer, made beside all that needs it. A stream
//! waits for one that is being made, up to a bound, and fails at once where the last attempt has failed. The bounds are those of the
//! product divided by five, as those of moves are about.

use flow::SiteId;

use crate::world::{Happening, IDLE, SITES, World};

/// How long a handshake may take: what is sent is sent again until then.
const HANDSHAKE_BOUND: u64 = 1_000_000;
/// Between two looks of a handshake at whether the peer can be reached.
const HANDSHAKE_STEP: u64 = 50_000;
/// Before a second attempt; it doubles with each, up to the other.
const BACKOFF_MIN: u64 = 20_000;
const BACKOFF_MAX: u64 = 400_000;
/// A connection that lasts for less does not count as one.
const SETTLED: u64 = 200_000;

/// The connection of one agent to another.
pub(crate) struct Link {
    /// Which start of the agent that made it.
    life: u32,
    pub(crate) state: State,
    backoff: u64,
    /// Nothing arrives before.
    pub(crate) stalled_until: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The first attempt since the start, or since the last connection ended.
    Dialling,
    /// The number of the connection, the peer's life, and since when.
    Up(u64, u32, u64),
    /// The last attempt failed; others follow.
    Down,
}

/// One attempt to connect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dial {
    pub(crate) from: SiteId,
    pub(crate) to: SiteId,
    /// Of the agent that dials.
    life: u32,
    began: u64,
}

impl World {
    /// An agent that starts connects to all others.
    pub(crate) fn links_start(&mut self, from: SiteId, life: u32) {
        for to in SITES.into_iter().filter(|to| *to != from) {
            let link = Link { life, state: State::Dialling, backoff: BACKOFF_MIN, stalled_until: 0 };
            self.links.insert((from, to), link);
            self.after(0, Happening::LinkDial(Dial { from, to, life, began: self.now }));
        }
    }

    /// The agent is gone: its own connections are forgotten. Its peers hear that those to it end, or nothing at all.
    pub(crate) fn links_end(&mut self, site: SiteId) {
        self.links.retain(|(from, _), _| *from != site);
        for from in SITES {
            let Some(State::Up(number, ..)) = self.links.get(&(from, site)).map(|link| link.state) else {
                continue;
            };
            if self.one_in(2) {
                self.link_ends(from, site, number);
            } else {
                self.stall_link(from, site, u64::MAX / 2);
            }
        }
    }

    fn link(&mut self, dial: &Dial) -> Option<&mut Link> {
        self.links.get_mut(&(dial.from, dial.to)).filter(|link| link.life == dial.life)
    }

    /// The peer's life, if it answers now.
    fn answers(&self, from: SiteId, to: SiteId) -> Option<u32> {
        let silent = self.plan.is_partitioned(from, to, self.now) || self.stopped(to).is_some();
        let life = self.sites.get(&to)?.life.as_ref()?.number;
        Some(life).filter(|_| !silent)
    }

    pub(crate) fn link_dial(&mut self, dial: Dial) {
        if let Some(until) = self.stopped(dial.from) {
            return self.schedule.at(until, Happening::LinkDial(dial));
        }
        if self.link(&dial).is_none() {
            return;
        }
        if let Some(peer) = self.answers(dial.from, dial.to) {
            let round_trip = self.delay(dial.from, dial.to) + self.delay(dial.to, dial.from);
            return self.after(round_trip, Happening::LinkUp(dial, peer));
        }
        if self.now - dial.began < HANDSHAKE_BOUND {
            return self.after(HANDSHAKE_STEP, Happening::LinkDial(dial));
        }
        self.dial_again(dial, State::Down);
    }

    pub(crate) fn link_up(&mut self, dial: Dial, peer: u32) {
        if self.answers(dial.from, dial.to) != Some(peer) {
            // Its answer was lost, or it is another by now.
            return self.link_dial(dial);
        }
        let (number, now) = (self.number(), self.now);
        if let Some(link) = self.link(&dial) {
            (link.state, link.stalled_until) = (State::Up(number, peer, now), 0);
            self.trace(|| format!("link {} to {} is up", dial.from, dial.to));
        }
    }

    fn dial_again(&mut self, dial: Dial, state: State) {
        let jitter = self.between(75, 125);
        let Some(link) = self.link(&dial) else { return };
        link.state = state;
        let pause = link.backoff * jitter / 100;
        link.backoff = (link.backoff * 2).min(BACKOFF_MAX);
        self.trace(|| format!("link {} to {} is {state:?}", dial.from, dial.to));
        let began = self.now + pause;
        self.after(pause, Happening::LinkDial(Dial { began, ..dial }));
    }

    /// Nothing arrives by the connection for so long; beyond the idle time it ends.
    pub(crate) fn stall_link(&mut self, from: SiteId, to: SiteId, span: u64) {
        let until = self.now.saturating_add(span);
        let Some(link) = self.links.get_mut(&(from, to)) else { return };
        let State::Up(number, ..) = link.state else { return };
        link.stalled_until = until.max(link.stalled_until);
        if span >= IDLE {
            self.after(IDLE, Happening::LinkIdle(from, to, number));
        }
    }

    /// Both ways.
    pub(crate) fn stall_links(&mut self, a: SiteId, b: SiteId, span: u64) {
        self.stall_link(a, b, span);
        self.stall_link(b, a, span);
    }

    /// The connection ends, and its streams with it.
    pub(crate) fn link_ends(&mut self, from: SiteId, to: SiteId, number: u64) {
        let Some(link) = self.links.get_mut(&(from, to)) else { return };
        let State::Up(_, _, since) = link.state else { return };
        if !matches!(link.state, State::Up(known, ..) if known == number) {
            return;
        }
        let settled = self.now - since >= SETTLED;
        if settled {
            link.backoff = BACKOFF_MIN;
        }
        let dial = Dial { from, to, life: link.life, began: self.now };
        self.counts.add("connections between agents that ended", 1);
        // A peer that was there may be back at once, and is worth waiting for; one that was not is not.
        self.dial_again(dial, if settled { State::Dialling } else { State::Down });
        let of = |stream: &crate::world::Stream| stream.open.is_some_and(|open| open.link == number);
        let broken: Vec<_> =
            self.streams.iter().filter(|(_, stream)| of(stream)).map(|(id, _)| *id).collect();
        broken.into_iter().for_each(|id| self.break_stream(id));
    }
}
