//! Delay model, solver, and the replicated placement state machine.

pub mod core;
