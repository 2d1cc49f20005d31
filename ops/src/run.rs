//! `limosa run`: the processes of a deployment, each until SIGTERM or SIGINT; see [`crate::signals`] for others.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, PlacementConfig, SiteConfig, SwitchConfig, WorkerConfig};
use crate::lock;
use crate::signals::{self, Configuration, Log};

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
    let log = Log::start();
    let path = run.config;
    match run.process {
        Process::Worker => {
            let config = WorkerConfig::read(&path)?;
            let _own = lock::sockets("worker", config.sockets())?;
            let stop = stop_flag(log, checked(path, WorkerConfig::read), run.with_parent)?;
            Ok(dataplane::process::run(&config.worker, &stop)?)
        }
        Process::Switch => {
            let config = SwitchConfig::read(&path)?;
            let _own = lock::sockets("switch", config.sockets())?;
            let stop = stop_flag(log, checked(path, SwitchConfig::read), run.with_parent)?;
            Ok(switchctl::softswitch::run(&config.switch, &stop)?)
        }
        Process::Site => {
            let config = SiteConfig::read(&path)?;
            let _own = lock::agent(&config.workers)?;
            let signals = checked(path, SiteConfig::read);
            with_runtime(log, signals, run.with_parent, |stop| crate::site::shell::run(config, stop))
        }
        Process::Placement => {
            let config = PlacementConfig::read(&path)?;
            let _own = lock::directory("placement", &config.directory)?;
            let signals = checked(path, PlacementConfig::read);
            with_runtime(log, signals, run.with_parent, |stop| crate::placement::run(config, stop))
        }
    }
}

/// The file of a process, which is read again as it was at the start.
fn checked<C: 'static>(path: PathBuf, read: fn(&Path) -> Result<C, ConfigError>) -> Configuration {
    let file = path.clone();
    Configuration::new(path, move || read(&file).map(drop).map_err(Into::into))
}

fn with_runtime<F: Future<Output = anyhow::Result<()>>>(
    log: Log,
    configuration: Configuration,
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
    signals::hear(log, configuration, move || signalled.cancel())?;
    let result = runtime.block_on(process(stop));
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    result
}

/// A flag that a signal sets, for processes with one thread of their own.
fn stop_flag(log: Log, configuration: Configuration, with_parent: bool) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let signalled = stop.clone();
    signals::hear(log, configuration, move || signalled.store(true, Ordering::Relaxed))?;
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
