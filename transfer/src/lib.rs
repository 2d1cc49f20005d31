//! Record codec, move protocol, and QUIC between nodes.

pub mod codec;
mod columns;
pub mod core;
