//! I7: what is closed stays closed. A packet from outside to a port that no client has opened reaches no client, whatever
//! moves meanwhile. (A `nat44` fails closed as a firewall must.) Source: part 1.1.

use std::collections::BTreeMap;

use flow::Protocol;

use crate::packet::{End, Seen};
use crate::traffic::Talk;
use crate::world::{Checked, Violation};

/// Numbers of probes begin here, those of ordinary packets at 0.
const FIRST: u64 = 1 << 48;

/// Packets to closed ports.
#[derive(Default)]
pub(crate) struct Closed {
    probes: BTreeMap<u64, End>,
}

impl Closed {
    /// The number of a new probe to a port near one that is open; nothing when that one is open too.
    pub(crate) fn probe(&mut self, talks: &[Talk], protocol: Protocol, open: End) -> Option<(u64, End)> {
        let number = FIRST + self.probes.len() as u64;
        let target = (open.0, open.1 ^ (1 + number as u16 % 7));
        let taken = talks.iter().any(|talk| talk.protocol == protocol && talk.known_as == Some(target));
        if taken {
            return None;
        }
        self.probes.insert(number, target);
        Some((number, target))
    }

    /// A packet reaches a client. A port may have been opened while the probe was on its way.
    pub(crate) fn arrives(&self, seen: &Seen, talks: &[Talk]) -> Checked {
        let Some(target) = self.probes.get(&seen.number) else { return Ok(()) };
        let opened = |talk: &Talk| {
            let own = talk.protocol == seen.protocol && talk.client == seen.destination;
            own && talk.known_as.is_none_or(|known_as| known_as == *target)
        };
        if talks.iter().any(opened) {
            return Ok(());
        }
        Err(Violation::new(
            7,
            format!("a packet to the closed port {target:?} reached {:?}", seen.destination),
        ))
    }
}
