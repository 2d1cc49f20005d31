//! Small numbers with a meaning. Each is a type of its own, so that two of them cannot be exchanged.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A point of presence. Eight bits, because a VLAN tag carries it beside four bits of role.
    SiteId(u8)
}
number! {
    /// A worker (one lcore) of one site.
    WorkerId(u16)
}
number! {
    /// The fencing token of a group: it grows by one each time the owning site changes.
    Epoch(u64)
}
number! {
    /// A move of one group. Unique for the life of the cluster: the log index of its intent.
    /// A move between workers of one site takes its number from the agent, with the top bit set.
    MoveId(u64)
}
number! {
    /// A point on a process's own monotonic clock, or a span of it, in microseconds.
    Micros(u64)
}

impl Epoch {
    /// The epoch of the next owner. No cluster lives to see the last one, but a peer may claim it: it must not wrap.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl MoveId {
    const LOCAL: u64 = 1 << 63;

    /// Of a marker for a move whose number its ingress never heard, because the move was over when the agent woke. Its epoch says which
    /// it was; no log gives this number.
    pub const UNHEARD: Self = Self(0);

    /// A move inside one site, which no log knows.
    #[must_use]
    pub fn local(sequence: u64) -> Self {
        Self(sequence | Self::LOCAL)
    }

    /// Whether the move is between workers of one site.
    #[must_use]
    pub fn is_local(self) -> bool {
        self.0 & Self::LOCAL != 0
    }
}

impl Micros {
    /// From milliseconds; saturates.
    #[must_use]
    pub fn from_millis(ms: u64) -> Self {
        Self(ms.saturating_mul(1_000))
    }

    /// From seconds; saturates.
    #[must_use]
    pub fn from_secs(s: u64) -> Self {
        Self(s.saturating_mul(1_000_000))
    }

    /// This time plus a span; saturates.
    #[must_use]
    pub fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// The span since an earlier time, zero when it is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

/// A service: one network function with its addresses. Six bits, because the tunnel key carries it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct ServiceId(u8);

/// A service number above 63.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("service id {0} is not in 0..=63")]
pub struct ServiceIdError(pub u8);

impl ServiceId {
    /// The largest legal number.
    pub const MAX: u8 = 63;

    /// Checks the range.
    ///
    /// # Errors
    /// [`ServiceIdError`] above 63.
    pub fn new(id: u8) -> Result<Self, ServiceIdError> {
        if id <= Self::MAX { Ok(Self(id)) } else { Err(ServiceIdError(id)) }
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for ServiceId {
    type Error = ServiceIdError;
    fn try_from(id: u8) -> Result<Self, ServiceIdError> {
        Self::new(id)
    }
}

impl From<ServiceId> for u8 {
    fn from(id: ServiceId) -> Self {
        id.0
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_ids_end_at_63_also_when_deserialised() {
        assert_eq!(ServiceId::new(64), Err(ServiceIdError(64)));
        assert_eq!(serde_json::from_str::<ServiceId>("63").unwrap().get(), 63);
        assert!(serde_json::from_str::<ServiceId>("64").is_err());
    }

    #[test]
    fn no_epoch_is_followed_by_a_smaller_one() {
        assert_eq!(Epoch(7).next(), Epoch(8));
        assert_eq!(Epoch(u64::MAX).next(), Epoch(u64::MAX));
    }

    #[test]
    fn local_moves_are_told_from_committed_ones() {
        assert!(MoveId::local(7).is_local());
        assert!(!MoveId(7).is_local());
    }
}
