//! I2: a NAT mapping never changes while the flow lives. Source: RFC 4787, REQ-1; the failure matrix, part 1.1.

use std::collections::BTreeMap;

use flow::Protocol;

use crate::packet::End;
use crate::world::{Checked, Violation};

/// The outside endpoint of each client endpoint. Clients of the simulation never rest long enough to expire.
#[derive(Default)]
pub(crate) struct Mappings {
    outside: BTreeMap<(Protocol, End), End>,
}

impl Mappings {
    pub(crate) fn translated(&mut self, protocol: Protocol, client: End, outside: End) -> Checked {
        let first = *self.outside.entry((protocol, client)).or_insert(outside);
        if first == outside {
            return Ok(());
        }
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
