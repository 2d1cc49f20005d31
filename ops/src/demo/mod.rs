//! `limosa demo`: a whole deployment on one machine, the network between its sites, the traffic of all clients and servers, and
//! what happens to them.

pub(crate) mod batch;
pub(crate) mod clock;
pub mod cluster;
pub(crate) mod hooked;
pub(crate) mod line;
mod options;
mod proxy;
pub mod report;
pub mod scenario;
mod sites;
pub mod wan;
pub mod world;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use cluster::{Cluster, Layout};
pub use hooked::Thresholds;
pub use options::Options;
use report::Report;
use scenario::{CAPACITY_PPS, Stage, say, world_spec};
pub use sites::{DemoSite, built_in};

/// Workers of each site at the start.
const WORKERS: u16 = 2;
/// Flows that each worker has room for: twice what the demo has in all.
const FLOWS: usize = 1 << 16;

/// Runs the demo: 0 when nothing was lost, duplicated, reordered, reset or corrupt, 1 otherwise.
#[must_use]
pub fn main(options: &Options) -> ExitCode {
    match run(options) {
        Ok(report) if report.failures.is_empty() => {
            say("\nNothing was lost, duplicated, reordered, reset or corrupt.");
            ExitCode::SUCCESS
        }
        Ok(report) => {
            say("\nNot all was well:");
            report.failures.iter().for_each(|failure| say(&format!("  {failure}")));
            ExitCode::FAILURE
        }
        Err(error) => {
            say(&format!("\nThe demo could not be played: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<Report> {
    let sites = options.sites.as_deref().map_or_else(|| Ok(built_in()), sites::read)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Short, because a socket's path ends at 107 bytes.
    let directory = tempfile::Builder::new().prefix("limosa-").tempdir()?;
    let played = runtime.block_on(async {
        tokio::select! {
            played = play(options, sites, directory.path()) => played,
            () = crate::run::signal() => Err(anyhow::anyhow!("it was stopped")),
        }
    });
    if played.as_ref().map_or(true, |report| !report.failures.is_empty()) {
        let kept = directory.keep();
        say(&format!("Logs are in {}.", kept.join("logs").display()));
    }
    played
}

async fn play(options: &Options, sites: Vec<DemoSite>, directory: &Path) -> anyhow::Result<Report> {
    let names: Vec<_> = sites.iter().map(|site| site.name.as_str()).collect();
    say(&format!(
        "Three sites ({}) and three placement nodes start, as processes of this machine.",
        names.join(", ")
    ));
    let layout = Layout {
        sites,
        workers: WORKERS,
        flows: FLOWS,
        directory: directory.to_owned(),
        binary: std::env::current_exe()?,
        // The surge finds out what is much on this machine.
        elastic: Some(Thresholds::NEVER),
        relay_late: None,
    };
    let cluster = Cluster::start(layout).await?;
    cluster
        .set_policy(serde_json::json!({ "automatic": false, "min_dwell_s": 4, "moves_in_flight_max": 8 }))
        .await?;
    cluster.configure(CAPACITY_PPS).await?;
    cluster.until_ready().await?;
    let spec = world_spec(&cluster, options.seed);
    say(&format!("{} TCP connections and {} UDP flows start.", spec.tcp_connections, spec.udp_flows));
    let mut stage = Stage::open(cluster, spec)?;
    stage.report.seed = options.seed;
    stage.play().await?;
    if options.keep {
        keep(stage.cluster()).await;
    }
    stage.close().await?;
    write(&stage.report, &options.report)?;
    Ok(stage.report)
}

async fn keep(cluster: &Cluster) {
    say("\nEverything goes on until Ctrl-C. Try, in another terminal:");
    say(&format!("  export LIMOSA_API={}", cluster.apis().join(",")));
    say("  limosa site list; limosa group list; limosa move list; limosa raft status");
    crate::run::signal().await;
}

fn write(report: &Report, path: &Path) -> anyhow::Result<()> {
    say(&format!("\n{}", report.table()));
    let text = serde_json::to_string_pretty(report)?;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    say(&format!("Written to {}.", path.display()));
    Ok(())
}
