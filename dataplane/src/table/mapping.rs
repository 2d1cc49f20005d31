//! Endpoint-independent mappings: one outside port per protocol, client address and client port, shared
//! by all flows of that endpoint (RFC 4787, REQ-1) and by nobody else (REQ-3). A mapping lives as long as
//! its last flow and is never taken away to make room (RFC 6888, REQ-11).

use std::collections::HashMap;

use flow::Protocol;

use super::index::{Hasher, Index};
use super::resident::room_for;

/// Flows of an ordinary client, to have room for so many clients from the start.
const FLOWS_PER_CLIENT: usize = 8;

/// One endpoint's outside port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The client's address.
    pub client: u32,
    /// Flows that share it.
    pub flows: u32,
    /// The client's port.
    pub client_port: u16,
    /// The outside port, in the client's block.
    pub outside_port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// Where the client's packets came in last, for flows that begin outside.
    pub ingress: u8,
}

impl Mapping {
    /// Of nobody yet.
    const VACANT: Self =
        Self { client: 0, flows: 0, client_port: 0, outside_port: 0, protocol: Protocol::Udp, ingress: 0 };
}

/// Why a port could not be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// Every port of the client's block is in use for this protocol.
    #[error("the client's port block is exhausted")]
    Exhausted,
    /// The wanted port, or the endpoint, is bound otherwise.
    #[error("the endpoint or the outside port is bound otherwise")]
    Conflict,
}

/// All mappings of a worker. As many as flows fit.
#[derive(Debug)]
pub struct Mappings {
    entries: Vec<Mapping>,
    free: Vec<u32>,
    by_client: Index,
    by_outside: Index,
    /// Ports in use per client and protocol: a full block is refused without a search.
    used: HashMap<(u32, Protocol), u16>,
    hasher: Hasher,
}

/// A client's block, and where in it the search begins.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First port.
    pub first: u16,
    /// Ports.
    pub count: u16,
    /// Offset of the first candidate.
    pub preferred: u16,
}

impl Mappings {
    /// Room for so many.
    #[must_use]
    pub fn new(capacity: usize, hasher: Hasher) -> Self {
        Self {
            entries: room_for(capacity, Mapping::VACANT),
            free: room_for(capacity, 0),
            by_client: Index::new(capacity),
            by_outside: Index::new(capacity),
            used: HashMap::with_capacity(capacity / FLOWS_PER_CLIENT),
            hasher,
        }
    }

    fn hash(&self, side: u64, protocol: Protocol, client: u32, port: u16) -> u32 {
        self.hasher.hash(u64::from(client), side << 32 | u64::from(port) << 8 | u64::from(protocol.number()))
    }

    /// The mapping with this number.
    #[must_use]
    pub fn get(&self, number: u32) -> &Mapping {
        &self.entries[number as usize]
    }

    /// Notes where the client's packets come in.
    pub fn set_ingress(&mut self, number: u32, ingress: u8) {
        self.entries[number as usize].ingress = ingress;
    }

    /// The mapping of a client's endpoint.
    #[must_use]
    pub fn of_client(&self, protocol: Protocol, client: u32, port: u16) -> Option<u32> {
        self.by_client.find(self.hash(1, protocol, client, port), |number| {
            let entry = self.get(number);
            entry.client == client && entry.client_port == port && entry.protocol == protocol
        })
    }

    /// The mapping of an outside port of a client.
    #[must_use]
    pub fn of_outside(&self, protocol: Protocol, client: u32, port: u16) -> Option<u32> {
        self.by_outside.find(self.hash(2, protocol, client, port), |number| {
            let entry = self.get(number);
            entry.client == client && entry.outside_port == port && entry.protocol == protocol
        })
    }

    /// The client's mapping, made when there is none: the first free port from the preferred one on.
    ///
    /// # Errors
    /// [`BindError::Exhausted`].
    pub fn bind(
        &mut self,
        protocol: Protocol,
        client: u32,
        port: u16,
        range: Range,
    ) -> Result<u32, BindError> {
        if let Some(present) = self.of_client(protocol, client, port) {
            return Ok(present);
        }
        if self.is_exhausted(protocol, client, range) {
            return Err(BindError::Exhausted);
        }
        let free = (0..range.count).map(|step| Self::candidate(range, step));
        let outside = free.into_iter().find(|outside| self.of_outside(protocol, client, *outside).is_none());
        Ok(self.add(protocol, client, port, outside.ok_or(BindError::Exhausted)?))
    }

    /// Whether every port of the client's block is in use.
    #[must_use]
    pub fn is_exhausted(&self, protocol: Protocol, client: u32, range: Range) -> bool {
        self.used.get(&(client, protocol)).is_some_and(|used| *used >= range.count)
    }

    fn candidate(range: Range, step: u16) -> u16 {
        let offset = (u32::from(range.preferred) + u32::from(step)) % u32::from(range.count);
        (u32::from(range.first) + offset) as u16
    }

    /// The client's mapping to exactly this port, for flows that come from another site.
    ///
    /// # Errors
    /// [`BindError::Conflict`]; nothing changed.
    pub fn bind_exactly(
        &mut self,
        protocol: Protocol,
        client: u32,
        port: u16,
        outside: u16,
    ) -> Result<u32, BindError> {
        if let Some(present) = self.of_client(protocol, client, port) {
            let same = self.get(present).outside_port == outside;
            return if same { Ok(present) } else { Err(BindError::Conflict) };
        }
        if self.of_outside(protocol, client, outside).is_some() {
            return Err(BindError::Conflict);
        }
        Ok(self.add(protocol, client, port, outside))
    }

    fn add(&mut self, protocol: Protocol, client: u32, client_port: u16, outside_port: u16) -> u32 {
        let entry = Mapping { client, flows: 0, client_port, outside_port, protocol, ingress: 0 };
        let number = self.free.pop().unwrap_or_else(|| {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX)
        });
        self.entries[number as usize] = entry;
        *self.used.entry((client, protocol)).or_default() += 1;
        let (by_client, by_outside) =
            (self.hash(1, protocol, client, client_port), self.hash(2, protocol, client, outside_port));
        self.by_client.insert(by_client, number);
        self.by_outside.insert(by_outside, number);
        number
    }

    /// One more flow uses the mapping.
    pub fn hold(&mut self, number: u32) {
        self.entries[number as usize].flows += 1;
    }

    /// One flow less; with the last one the mapping is gone.
    pub fn release(&mut self, number: u32) {
        let entry = &mut self.entries[number as usize];
        entry.flows = entry.flows.saturating_sub(1);
        if entry.flows == 0 {
            self.remove(number);
        }
    }

    /// Removes a mapping that no flow came to use.
    pub fn remove_unused(&mut self, number: u32) {
        if self.get(number).flows == 0 {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u32) {
        let Mapping { client, client_port, outside_port, protocol, .. } = *self.get(number);
        self.by_client.remove(self.hash(1, protocol, client, client_port), number);
        self.by_outside.remove(self.hash(2, protocol, client, outside_port), number);
        if let Some(used) = self.used.get_mut(&(client, protocol)) {
            *used -= 1;
            if *used == 0 {
                self.used.remove(&(client, protocol));
            }
        }
        self.free.push(number);
    }
}
