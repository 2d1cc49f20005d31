//! `limosa run`: the processes of a deployment, each until SIGTERM or SIGINT.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::{PlacementConfig, SiteConfig, SwitchConfig, WorkerConfig};

/// Which process, and its configuration.
#[derive(Args, Debug)]
pub struct Run {
    /// Which process.
    process: Process,
    /// Its configuration file (TOML).
    #[arg(long)]
    config: PathBuf,
    /// Also stop when standard input closes, so that a parent that dies takes its children along.
    #[arg(long, hide = true)]
    with_parent: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Process {
    /// A placement node: Raft, config API, solver.
    Placement,
    /// The agent of a site.
    Site,
    /// A worker: the fast path on one core.
    Worker,
    /// The embedded switch.
    Switch,
}

/// Runs it.
///
/// # Errors
/// When the configuration or a resource at fault is named in the message.
pub fn run(run: Run) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_from_env("LIMOSA_LOG").unwrap_or_else(|_| EnvFilter::new("info,openraft=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match run.process {
        Process::Worker => {
            let config = WorkerConfig::read(&run.config)?;
            let stop = stop_flag(run.with_parent)?;
            Ok(dataplane::process::run(&config.worker, &stop)?)
        }
        Process::Switch => {
            let config = SwitchConfig::read(&run.config)?;
            let stop = stop_flag(run.with_parent)?;
            Ok(switchctl::softswitch::run(&config.switch, &stop)?)
        }
        Process::Site => {
            let config = SiteConfig::read(&run.config)?;
            with_runtime(run.with_parent, |stop| crate::site::shell::run(config, stop))
        }
        Process::Placement => {
            let config = PlacementConfig::read(&run.config)?;
            with_runtime(run.with_parent, |stop| crate::placement::run(config, stop))
        }
    }
}

fn with_runtime<F: Future<Output = anyhow::Result<()>>>(
    with_parent: bool,
    process: impl FnOnce(CancellationToken) -> F,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let stop = CancellationToken::new();
    if with_parent {
        let stop = stop.clone();
        std::thread::spawn(move || {
            wait_for_parent();
            stop.cancel();
        });
    }
    let signalled = stop.clone();
    runtime.spawn(async move {
        signal().await;
        signalled.cancel();
    });
    let result = runtime.block_on(process(stop));
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    result
}

/// A flag that a signal sets, for processes with one thread of their own.
fn stop_flag(with_parent: bool) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signalled = stop.clone();
    std::thread::spawn(move || {
        runtime.block_on(signal());
        signalled.store(true, Ordering::Relaxed);
    });
    if with_parent {
        let orphaned = stop.clone();
        std::thread::spawn(move || {
            wait_for_parent();
            orphaned.store(true, Ordering::Relaxed);
        });
    }
    Ok(stop)
}

fn wait_for_parent() {
    let mut byte = [0];
    while matches!(std::io::stdin().read(&mut byte), Ok(1)) {}
}

/// Waits for SIGTERM or SIGINT.
pub async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
}
