//! The agent of a site.

pub mod core;
pub mod elastic;
mod evidence;
pub mod fleet;
pub mod http;
pub mod metrics;
pub mod moves;
pub mod prober;
pub mod reports;
pub mod shell;
pub mod switch;
mod unreached;
pub mod workers;
