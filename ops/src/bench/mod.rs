//! `limosa bench`: figures of the pure parts, on the reader's own machine.

mod delay;
#[cfg(feature = "exact")]
mod exact;
mod leader;
mod placement;

use std::process::ExitCode;

use clap::Subcommand;

use crate::cli::Format;

/// What can be measured.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// The solver on generated networks: from nothing, after small changes, after the loss of a site; beside the simple
    /// choice, nearest with spill, and on small networks beside the exact optimum. One core.
    Placement(placement::Options),
    /// The delay estimator on a matrix of real round trips: its error, and what its choice of site costs beside the nearest one;
    /// beside Vivaldi, geography where coordinates are given, and measuring at random.
    Delay(delay::Options),
}

/// Measures and prints.
#[must_use]
pub fn main(verb: &Verb, format: Format) -> ExitCode {
    match verb {
        Verb::Placement(options) => placement::run(options, format),
        Verb::Delay(options) => delay::run(options, format),
    }
}
