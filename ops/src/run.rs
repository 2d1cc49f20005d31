//! `limosa run`: the processes of a deployment, each until SIGTERM or SIGINT; see [`crate::signals`] for others.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use clap::{Args, ValueEnum};
use switchctl::softswitch::Tunnels;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{PlacementConfig, SiteConfig, SwitchConfig, WorkerConfig};
use crate::lock;
use crate::signals::{self, Configuration, Log};
use crate::site::shell;

/// Keys of the embedded switch that change while it runs.
pub const SWITCH_LIVE: &[&str] = &["tunnels"];

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
            let present: Vec<PathBuf> = config.sockets().map(Path::to_owned).collect();
            let signals = Configuration::new(path.clone(), move || {
                could_have_sockets(&present, WorkerConfig::read(&path)?.sockets())
            });
            let stop = stop_flag(log, signals, run.with_parent)?;
            Ok(dataplane::process::run(&config.worker, &stop)?)
        }
        Process::Switch => {
            let config = SwitchConfig::read(&path)?;
            let _own = lock::sockets("switch", config.sockets())?;
            let present: Vec<PathBuf> = config.sockets().map(Path::to_owned).collect();
            let tunnels = Arc::new(Tunnels::default());
            let (changed, held) = (tunnels.clone(), Mutex::new(config.tunnels().collect::<Vec<_>>()));
            let held = Arc::new(held);
            let signals = Configuration::with_live(path.clone(), SWITCH_LIVE, move || {
                let next = SwitchConfig::read(&path)?;
                could_have_sockets(&present, next.sockets())?;
                could_have_tunnels(&locked(&held), next.tunnels())?;
                let (changed, held) = (changed.clone(), held.clone());
                Ok(Box::new(move || {
                    *locked(&held) = next.tunnels().collect();
                    changed.set(&next.switch.ports);
                }))
            });
            let stop = stop_flag(log, signals, run.with_parent)?;
            Ok(switchctl::softswitch::run(&config.switch, &tunnels, &stop)?)
        }
        Process::Site => {
            let config = site_config(&path)?;
            let _own = lock::agent(&config.workers)?;
            let bound = |config: &SiteConfig| Bound {
                quic: config.listen,
                http: ("metrics", config.metrics),
                directory: ("workers.directory", config.workers.clone()),
            };
            let present = bound(&config);
            let (changes, changed) = watch::channel(None);
            let signals = Configuration::with_live(path.clone(), shell::LIVE, move || {
                let next = site_config(&path)?;
                present.check(&bound(&next))?;
                let changes = changes.clone();
                Ok(Box::new(move || drop(changes.send(Some(Arc::new(next))))))
            });
            with_runtime(log, signals, run.with_parent, |stop| shell::run(config, changed, stop))
        }
        Process::Placement => {
            let config = placement_config(&path)?;
            let _own = lock::directory("placement", &config.directory)?;
            let bound = |config: &PlacementConfig| Bound {
                quic: config.listen,
                http: ("api", config.api),
                directory: ("directory", config.directory.clone()),
            };
            let present = bound(&config);
            let signals =
                Configuration::new(path.clone(), move || present.check(&bound(&placement_config(&path)?)));
            with_runtime(log, signals, run.with_parent, |stop| crate::placement::run(config, stop))
        }
    }
}

/// The file of an agent and what it names, checked for a start and for SIGHUP alike.
fn site_config(path: &Path) -> anyhow::Result<SiteConfig> {
    let config = SiteConfig::read(path)?;
    shell::check(&config)?;
    Ok(config)
}

/// The same of a placement node.
fn placement_config(path: &Path) -> anyhow::Result<PlacementConfig> {
    let config = PlacementConfig::read(path)?;
    crate::placement::check(&config)?;
    Ok(config)
}

/// Whether a process that has these sockets could have others instead.
fn could_have_sockets<'a>(present: &[PathBuf], next: impl Iterator<Item = &'a Path>) -> anyhow::Result<()> {
    for path in next.filter(|path| !present.iter().any(|own| own == path)) {
        lock::could_have_socket(path)?;
    }
    Ok(())
}

/// Whether a switch whose tunnels come in here could have others instead.
fn could_have_tunnels(
    present: &[SocketAddr],
    mut next: impl Iterator<Item = SocketAddr>,
) -> anyhow::Result<()> {
    next.try_for_each(|local| {
        // A port that one of its own has, at whatever address, is free once that one is gone.
        if present.iter().any(|own| own.port() == local.port()) {
            return Ok(());
        }
        UdpSocket::bind(local)
            .map(drop)
            .with_context(|| format!("tunnels.local = \"{local}\": it cannot be bound"))
    })
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a process has for itself: where it listens, and its directory. A start finds out whether it can by doing it; for SIGHUP others
/// are only tried.
struct Bound {
    quic: SocketAddr,
    http: (&'static str, SocketAddr),
    directory: (&'static str, PathBuf),
}

impl Bound {
    /// Whether a process that has these could have others instead.
    fn check(&self, next: &Self) -> anyhow::Result<()> {
        if let Some(address) = tried(self.quic, next.quic) {
            let said = || format!("listen = \"{}\": it cannot be bound", next.quic);
            UdpSocket::bind(address).with_context(said)?;
        }
        let (key, http) = next.http;
        if let Some(address) = tried(self.http.1, http) {
            let said = || format!("{key} = \"{http}\": it cannot be bound");
            TcpListener::bind(address).with_context(said)?;
        }
        let (key, directory) = &next.directory;
        if *directory != self.directory.1 {
            lock::could_have_directory(directory)
                .with_context(|| format!("{key} = \"{}\": it cannot be had", directory.display()))?;
        }
        Ok(())
    }
}

/// What to bind to learn whether another address can be. A port that the process has itself is free for its next start.
fn tried(present: SocketAddr, next: SocketAddr) -> Option<SocketAddr> {
    let port = if next.port() == present.port() { 0 } else { next.port() };
    (next != present).then_some(SocketAddr::new(next.ip(), port))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_cannot_be_bound_is_refused_for_a_running_process_as_for_a_start() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let own = UdpSocket::bind("127.0.0.1:0").unwrap();
        let http = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let bound = |quic, http| Bound { quic, http: ("api", http), directory: ("directory", "d".into()) };
        let (own, http) = (own.local_addr().unwrap(), http.local_addr().unwrap());
        let present = bound(own, http);
        present.check(&bound(own, http)).unwrap();
        // Its own ports at another address, and ports that are free.
        let [any, anywhere] =
            [own, http].map(|address| SocketAddr::new("0.0.0.0".parse().unwrap(), address.port()));
        present.check(&bound(any, anywhere)).unwrap();
        present.check(&bound(taken, other)).unwrap();
        let _held = (UdpSocket::bind(taken).unwrap(), TcpListener::bind(other).unwrap());
        let error = format!("{:#}", present.check(&bound(taken, http)).unwrap_err());
        assert!(error.starts_with(&format!("listen = \"{taken}\": it cannot be bound: ")), "{error}");
        let error = format!("{:#}", present.check(&bound(own, other)).unwrap_err());
        assert!(error.starts_with(&format!("api = \"{other}\": it cannot be bound: ")), "{error}");
        // An address of documentation (RFC 5737) is no machine's.
        let error = format!("{:#}", present.check(&bound("192.0.2.1:1".parse().unwrap(), http)).unwrap_err());
        assert!(error.contains("192.0.2.1:1"), "{error}");
    }
}
