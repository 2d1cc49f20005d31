//! I2: a NAT mapping never changes while the flow lives. Source: RFC 4787, REQ-1; the failure matrix, part 1.1.

use std::collections::BTreeMap;

use flow::Protocol;

use crate::packet::End;
use crate::traffic::LIVE;
use crate::world::{Checked, Violation};

/// The outside endpoint of each client endpoint, and when it was used last.
#[derive(Default)]
pub(crate) struct Mappings {
    outside: BTreeMap<(Protocol, End), (End, u64)>,
}

impl Mappings {
    pub(crate) fn translated(&mut self, protocol: Protocol, client: End, outside: End, now: u64) -> Checked {
        let known = self.outside.insert((protocol, client), (outside, now));
        let Some((first, _)) = known.filter(|(first, at)| *first != outside && now - at < LIVE) else {
            return Ok(());
        };
        Err(Violation::new(2, format!("{protocol:?} {client:?} was {first:?} and is {outside:?}")))
    }

    /// Whoever's flows were lost may get others.
    pub(crate) fn forget_all(&mut self, clients: impl Fn(std::net::Ipv4Addr) -> bool) {
        self.outside.retain(|(_, client), _| !clients(client.0));
    }

    /// A mapping may change when the worker that had it died.
    pub(crate) fn forget(&mut self, protocol: Protocol, client: End) {
        self.outside.remove(&(protocol, client));
    }
}

/// An error reaches a client, about a packet from this endpoint: it is the client's own, as the client knows it. The ports only where
/// flows are the same as when it was sent.
pub(crate) fn quoted(client: End, to: End, about: End, same_flows: bool) -> Checked {
    if to.0 == client.0 && about.0 == client.0 && (about == client || !same_flows) {
        return Ok(());
    }
    Err(Violation::new(2, format!("an error about {client:?} reached {to:?}, and names {about:?}")))
}
