//! The worker: network functions, flow table, packet I/O.
//!
//! [`worker::Worker`] is the pure core: packets, requests and time go in, packets and events come out.
//! [`process::run`] puts sockets and a clock around it.

pub mod control;
pub mod dpdk;
pub mod group;
pub mod io;
pub mod nat;
pub mod packet;
pub mod process;
pub mod rtt;
pub mod table;
pub mod worker;

pub use process::{WorkerConfig, WorkerError, run};
pub use worker::{Output, Settings, Worker};
