//! I3: an outside port belongs to one subscriber, and lies in that subscriber's block. Source: RFC 7422; the failure
//! matrix, part 1.1. That it has one owner at a time follows from I1, since a block lies in one group.

use std::collections::BTreeMap;

use flow::Protocol;
use flow::nat::NatSlices;

use crate::packet::End;
use crate::world::{Checked, Violation};

#[derive(Default)]
pub(crate) struct OutsidePorts {
    clients: BTreeMap<(Protocol, End), End>,
}

impl OutsidePorts {
    /// Whoever's flows were lost may get other ports.
    pub(crate) fn forget_all(&mut self, clients: impl Fn(std::net::Ipv4Addr) -> bool) {
        self.clients.retain(|_, client| !clients(client.0));
    }

    /// `planned`: no worker died, so a port that a client has stays its own.
    pub(crate) fn translated(
        &mut self,
        slices: &NatSlices,
        protocol: Protocol,
        client: End,
        outside: End,
        planned: bool,
    ) -> Checked {
        let owner = slices.owner(outside.0, outside.1);
        if owner.is_none() || owner != slices.subscriber(client.0) {
            return Err(Violation::new(
                3,
                format!("{outside:?} of client {client:?} is of the block of {owner:?}"),
            ));
        }
        let first = *self.clients.entry((protocol, outside)).or_insert(client);
        if planned && first != client {
            return Err(Violation::new(3, format!("{outside:?} is of {first:?} and of {client:?}")));
        }
        Ok(())
    }
}
