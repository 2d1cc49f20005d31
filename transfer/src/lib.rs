//! Record codec, move protocol, and QUIC between nodes.

pub mod codec;
mod columns;
pub mod core;
pub mod name;
pub mod quic;
pub mod tls;
pub mod wire;
