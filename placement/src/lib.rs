//! Delay model, solver, and the replicated placement state machine.
//!
//! [`core`] is pure. [`node`] runs it under Raft, [`client`] is for those who ask. Bytes travel by
//! [`node::Transport`], which somebody else provides.

mod claims;
pub mod client;
mod clock;
pub mod core;
pub mod geo;
mod lag;
pub mod likeness;
pub mod node;
mod notices;
mod own_files;
pub mod pack;
mod promise;
mod proof;
pub mod raft;
pub mod solver;
pub mod store;
mod twins;
pub mod wire;
