//! A safe layer over the few parts of DPDK that a worker needs.
//!
//! [`Eal::start`] once in a process, on the thread that will poll; then a [`Pool`] of buffers and a [`Port`] with one
//! queue in each direction. A packet is an [`Mbuf`]: it owns a buffer of the pool and gives it back when dropped.
//! Pools are never taken down: a buffer can so never outlive its pool. Scattered packets, offloads that rewrite
//! packets, and more than one queue are left out.
//!
//! Empty without feature `dpdk`.

#![cfg(feature = "dpdk")]
#![allow(unsafe_code, reason = "the one layer between C and the rest")]

mod eal;
mod error;
mod mbuf;
mod port;
mod socket;

pub use eal::{Eal, EalConfig, Memory, cycles, cycles_per_second};
pub use error::{EalError, PoolError, PortError};
pub use mbuf::{Mbuf, Pool};
pub use port::{BURST_LEN, Device, FRAME_OVERHEAD, Port, PortConfig, Received, Statistics};
