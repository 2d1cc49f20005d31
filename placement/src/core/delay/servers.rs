//! What sites saw of server prefixes.
//!
//! A handshake that the owner at s saw went s, server, outside ingress o, s: with s and o the same that is the round trip between
//! site and server, else the ways between the two sites have to come off. A probe goes from its site and back to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use flow::{Micros, Prefix, SiteId};

use super::prior::{Locate, Place};
use super::window::{AGE_MAX, Window};

/// Server prefixes that are known; more are not taken until some are forgotten.
pub(super) const SERVERS_MAX: usize = 16_384;
/// Ways to one server prefix that are known; beyond, the one that was measured longest ago goes.
const SEEN_MAX: usize = 64;
/// A place is looked up again after so long, in case that the file of places is another one.
const PLACE_AGE_MAX: Micros = Micros(60_000_000);

/// A way to a server and back.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    /// From this site.
    pub(super) site: SiteId,
    /// Back over this one; `None` for the site itself.
    pub(super) over: Option<SiteId>,
    pub(super) window: Window,
}

/// A server prefix.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Server {
    pub(super) prefix: Prefix,
    pub(super) seen: Vec<Seen>,
    /// Where its packets came in last.
    pub(super) home: Option<SiteId>,
    /// One that answered, and its port.
    pub(super) target: Option<SocketAddr>,
    pub(super) place: Place,
    placed: Option<Micros>,
    updated: Micros,
}

/// Server prefixes by number, so that groups need no search.
#[derive(Clone, Default)]
pub(super) struct Servers {
    slots: Vec<Option<Server>>,
    free: Vec<u32>,
    pub(super) by_prefix: BTreeMap<Prefix, u32>,
}

impl Servers {
    pub(super) fn get(&self, number: u32) -> Option<&Server> {
        self.slots.get(number as usize)?.as_ref()
    }

    pub(super) fn number(&self, prefix: &Prefix) -> Option<u32> {
        self.by_prefix.get(prefix).copied()
    }

    /// Whether a site has measured the way to a server prefix and back to itself.
    pub(super) fn is_measured(&self, prefix: &Prefix, site: SiteId) -> bool {
        let server = self.number(prefix).and_then(|number| self.get(number));
        server.is_some_and(|server| server.seen.iter().any(|seen| seen.site == site && seen.over.is_none()))
    }

    /// One past the greatest number.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Server)> {
        (0..).zip(&self.slots).filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
    }

    /// Takes the least of `count` round trips from a site, back over another or itself. Nothing when there is no room.
    pub(super) fn add(
        &mut self,
        prefix: Prefix,
        (site, over): (SiteId, Option<SiteId>),
        (ms, count): (f64, u32),
        geography: Option<&dyn Locate>,
        now: Micros,
    ) -> Option<&mut Server> {
        let number = self.slot(prefix, now)?;
        let server = self.slots[number as usize].as_mut()?;
        if let Some(geography) = geography
            && server.placed.is_none_or(|at| now.since(at) > PLACE_AGE_MAX)
        {
            (server.place, server.placed) = (geography.place(&prefix), Some(now));
        }
        server.updated = now;
        server.home = over.or(server.home);
        let over = over.filter(|over| *over != site);
        let seen = &mut server.seen;
        let at = seen.iter().position(|seen| seen.site == site && seen.over == over).unwrap_or_else(|| {
            if seen.len() == SEEN_MAX {
                let oldest = (0..SEEN_MAX).min_by_key(|&at| seen[at].window.last()).unwrap_or(0);
                seen.remove(oldest);
            }
            seen.push(Seen { site, over, window: Window::new() });
            seen.len() - 1
        });
        seen[at].window.add(ms, count, now);
        Some(server)
    }

    fn slot(&mut self, prefix: Prefix, now: Micros) -> Option<u32> {
        if let Some(&number) = self.by_prefix.get(&prefix) {
            return Some(number);
        }
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.slots.len() < SERVERS_MAX => {
                self.slots.push(None);
                self.slots.len() as u32 - 1
            }
            None => return None,
        };
        let (place, placed, updated) = (Place::default(), None, now);
        let server = Server { prefix, seen: Vec::new(), home: None, target: None, place, placed, updated };
        self.slots[number as usize] = Some(server);
        self.by_prefix.insert(prefix, number);
        Some(number)
    }

    /// Forgets the ways from and over a site.
    pub(super) fn forget_site(&mut self, site: SiteId) {
        for server in self.slots.iter_mut().flatten() {
            server.seen.retain(|seen| seen.site != site && seen.over != Some(site));
            server.home = server.home.filter(|home| *home != site);
        }
    }

    /// Forgets ways that nobody measures any more, and servers without any, but for those in use.
    pub(super) fn forget(&mut self, in_use: &[bool], now: Micros) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let Some(server) = slot else { continue };
            server.seen.retain(|seen| now.since(seen.window.last()) <= AGE_MAX);
            let old = server.seen.is_empty() && now.since(server.updated) > AGE_MAX;
            if old && !in_use.get(number).copied().unwrap_or(false) {
                self.by_prefix.remove(&server.prefix);
                self.free.push(number as u32);
                *slot = None;
            }
        }
    }
}

/// Leading bits that two prefixes share; none between families.
pub(super) fn common_bits(a: &Prefix, b: &Prefix) -> u32 {
    let bits = match (a.address(), b.address()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    };
    bits.min(u32::from(a.len())).min(u32::from(b.len()))
}
