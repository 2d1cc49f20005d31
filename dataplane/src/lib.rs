//! The worker: network functions, flow table, packet I/O.

pub mod control;
