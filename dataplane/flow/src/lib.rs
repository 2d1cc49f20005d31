//! Ids, units, keys and records that every part of Limosa agrees on. Knows no other part.

mod id;
pub mod nat;
mod prefix;
mod record;
pub mod sample;
pub mod socket;
pub mod steer;
pub mod trie;

pub use id::{Epoch, Micros, MoveId, ServiceId, ServiceIdError, SiteId, WorkerId};
pub use prefix::{Family, GroupId, GroupIdError, Prefix, PrefixError};
pub use record::{
    Batch, Endpoint, Fixed, FlowKey, FlowRecord, HoldTimes, Joinable, Protocol, TcpState, Token, digest,
};
