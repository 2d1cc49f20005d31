//! `limosa demo`: a whole deployment on one machine, the network between its sites, the traffic of all clients and servers, and
//! what happens to them.

mod batch;
mod clock;
pub mod cluster;
mod options;
mod proxy;
mod sites;
pub mod wan;
pub mod world;

use std::process::ExitCode;

pub use options::Options;
pub use sites::{DemoSite, built_in};

/// Runs the demo.
#[must_use]
pub fn main(_options: &Options) -> ExitCode {
    ExitCode::FAILURE
}
