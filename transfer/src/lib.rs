//! Record codec, move protocol, and QUIC between nodes.
