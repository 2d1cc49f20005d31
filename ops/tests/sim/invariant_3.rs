//! I3: an outside port belongs to one subscriber, and lies in that subscriber's block. Source: RFC 7422; the failure
//! matrix, part 1.1. That it has one owner at a time follows from I1, since a block lies in one group.

use std::collections::BTreeMap;

use flow::Protocol;
use flow::nat::NatSlices;

use crate::packet::End;
use crate::traffic::LIVE;
use crate::world::{Checked, Violation};

#[derive(Default)]
pub(crate) struct OutsidePorts {
    /// With when it was used last.
    clients: BTreeMap<(Protocol, End), (End, u64)>,
}

impl OutsidePorts {
    /// Whoever's flows were lost may get other ports.
    pub(crate) fn forget_all(&mut self, clients: impl Fn(std::net::Ipv4Addr) -> bool) {
        self.clients.retain(|_, (client, _)| !clients(client.0));
    }

    /// `planned`: no worker died, so a port that a client has stays its own.
    pub(crate) fn translated(
        &mut self,
        slices: &NatSlices,
        protocol: Protocol,
        (client, outside): (End, End),
        planned: bool,
        now: u64,
    ) -> Checked {
        let owner = slices.owner(outside.0, outside.1);
        if owner.is_none() || owner != slices.subscriber(client.0) {
            return Err(Violation::new(
                3,
                format!("{outside:?} of client {client:?} is of the block of {owner:?}"),
            ));
        }
        let known = self.clients.insert((protocol, outside), (client, now));
        if let Some((first, _)) = known.filter(|(first, at)| planned && *first != client && now - at < LIVE) {
            return Err(Violation::new(3, format!("{outside:?} is of {first:?} and of {client:?}")));
        }
        Ok(())
    }
}
