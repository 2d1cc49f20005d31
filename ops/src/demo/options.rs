//! Options of `limosa demo`.

use std::path::PathBuf;

use clap::Args;

/// What may be chosen of the demo.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seed of traffic: the same seed gives the same clients, servers and payloads.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// A TOML file with three `[[site]]` tables (name, latitude, longitude) instead of Amsterdam, Virginia, Singapore.
    #[arg(long)]
    pub sites: Option<PathBuf>,
    /// Leave everything running at the end, for play with the command line, until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Where to write the report.
    #[arg(long, default_value = "target/demo/report.json")]
    pub report: PathBuf,
}
