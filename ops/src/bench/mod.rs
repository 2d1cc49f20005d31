//! `limosa bench`: figures of the pure parts, on the reader's own machine.

mod placement;

use std::process::ExitCode;

use clap::Subcommand;

use crate::cli::Format;

/// What can be measured.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// The solver on generated networks: from nothing, after small changes, after the loss of a site; beside the simple
    /// choice, nearest with spill. One core.
    Placement(placement::Options),
}

/// Measures and prints.
#[must_use]
pub fn main(verb: &Verb, format: Format) -> ExitCode {
    let Verb::Placement(options) = verb;
    placement::run(options, format)
}
