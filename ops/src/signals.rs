//! What signals do to a process of a deployment; none but SIGTERM and SIGINT end it.
//!
//! A thread of its own hears them, so that also a process whose other threads are stuck can be ended: the first
//! SIGTERM or SIGINT asks the process to hand over and end, the second ends it at once. SIGHUP reads the
//! configuration again, SIGUSR1 makes the log say more, SIGUSR2 makes it say what it said at first. That thread waits
//! for nothing but signals: files are read by another.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::{EnvFilter, reload};

use crate::causes;
use crate::clock::wall_ms;
use crate::files;

/// What the log says unless `LIMOSA_LOG` says otherwise.
///
/// Of a node that is not reached Raft would say so four times a second; the network says it once, and the node when it has no quorum.
const FILTER: &str = "info,openraft=warn,openraft::core::heartbeat=error,openraft::replication=error,\
                      openraft::engine::handler::replication_handler=error";
/// What it says after one, two and more SIGUSR1.
const LOUDER: [&str; 2] = ["debug,openraft=info", "trace,openraft=debug"];
/// Exit status of a process that was told a second time to end: it has not handed over.
const ENDED_AT_ONCE: i32 = 1;

/// The log's filter, which can be changed while the process runs.
pub struct Log {
    handle: reload::Handle<EnvFilter, tracing_subscriber::Registry>,
    /// How often it was made to say more.
    louder: usize,
}

impl Log {
    /// Begins to log to standard error.
    #[must_use]
    pub fn start() -> Self {
        use tracing_subscriber::layer::SubscriberExt;
        use tracing_subscriber::util::SubscriberInitExt;
        let (filter, handle) = reload::Layer::new(at_first());
        let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
        tracing_subscriber::registry().with(filter).with(text).init();
        Self { handle, louder: 0 }
    }

    fn louder(&mut self) {
        let at = self.louder.min(LOUDER.len() - 1);
        self.louder = at + 1;
        self.set(EnvFilter::new(LOUDER[at]), LOUDER[at]);
    }

    fn as_at_first(&mut self) {
        self.louder = 0;
        self.set(at_first(), "as at the start");
    }

    fn set(&self, filter: EnvFilter, said: &str) {
        match self.handle.reload(filter) {
            Ok(()) => tracing::info!(filter = said, "the log has another filter"),
            Err(error) => tracing::warn!(%error, "the log keeps its filter"),
        }
    }
}

fn at_first() -> EnvFilter {
    EnvFilter::try_from_env("LIMOSA_LOG").unwrap_or_else(|_| EnvFilter::new(FILTER))
}

type Hook = Box<dyn Fn() -> anyhow::Result<()> + Send>;

/// What is to be read again beside the configuration file, such as certificates.
static HOOKS: Mutex<Vec<(&'static str, Hook)>> = Mutex::new(Vec::new());
static RELOAD_FAILED: AtomicBool = AtomicBool::new(false);
static RELOADED_MS: AtomicU64 = AtomicU64::new(0);

/// Has something read again with each SIGHUP, once the configuration file was found to be right. What a hook refuses
/// stays as it was.
pub fn on_reload(what: &'static str, hook: impl Fn() -> anyhow::Result<()> + Send + 'static) {
    HOOKS.lock().unwrap_or_else(PoisonError::into_inner).push((what, Box::new(hook)));
}

/// Whether the last reading of the configuration was successful, and when the last successful one was, in
/// milliseconds since 1970.
fn last_reload() -> (bool, u64) {
    (!RELOAD_FAILED.load(Ordering::Relaxed), RELOADED_MS.load(Ordering::Relaxed))
}

/// Metrics of what SIGHUP brought.
///
/// # Errors
/// When a name is registered twice.
pub fn metrics(registry: &prometheus::Registry) -> prometheus::Result<()> {
    let (reloaded, reloaded_ms) = last_reload();
    let gauge = |name: &str, help: &str, value: f64| -> prometheus::Result<()> {
        let gauge = prometheus::Gauge::new(name, help)?;
        gauge.set(value);
        registry.register(Box::new(gauge))
    };
    gauge(
        "limosa_config_last_reload_successful",
        "1 unless the last SIGHUP found a wrong configuration",
        f64::from(u8::from(reloaded)),
    )?;
    gauge(
        "limosa_config_last_reload_success_timestamp_seconds",
        "When the configuration was read last without an error",
        reloaded_ms as f64 / 1e3,
    )
}

/// Brings a file that was found right into force, as far as the process can without a restart.
pub type Apply = Box<dyn FnOnce()>;

/// The configuration file of a process, as it is in force and as it may be now.
pub struct Configuration {
    path: PathBuf,
    in_force: Mutex<toml::Table>,
    /// Keys, each with all below it, that need no restart.
    live: &'static [&'static str],
    /// Reads and checks the file as at the start.
    check: Box<dyn Fn() -> anyhow::Result<Apply> + Send + Sync>,
    reading: Mutex<Reading>,
}

/// Whether somebody reads the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    Nobody,
    Somebody,
    /// Somebody, who reads it once more then.
    Twice,
}

impl Configuration {
    /// The file that was just read; `check` reads it as at the start. Each change needs a restart.
    #[must_use]
    pub fn new(path: PathBuf, check: impl Fn() -> anyhow::Result<()> + Send + Sync + 'static) -> Self {
        Self::with_live(path, &[], move || check().map(|()| Box::new(|| ()) as Apply))
    }

    /// The same of a process that takes changes of the `live` keys, each with all below it, while it runs: what `check` returns is called
    /// when nothing else has changed.
    #[must_use]
    pub fn with_live(
        path: PathBuf,
        live: &'static [&'static str],
        check: impl Fn() -> anyhow::Result<Apply> + Send + Sync + 'static,
    ) -> Self {
        RELOADED_MS.store(wall_ms(), Ordering::Relaxed);
        let in_force = Mutex::new(table(&path).unwrap_or_default());
        Self { path, in_force, live, check: Box::new(check), reading: Mutex::new(Reading::Nobody) }
    }

    /// Has the file read again by a thread of its own, for its file system may give no answer. While one is at it, there
    /// is no other.
    fn reload_aside(self: &Arc<Self>) {
        if !self.begin_reading() {
            tracing::warn!(file = %self.path.display(),
                "the configuration is still being read since the last SIGHUP; it is read once more then");
            return;
        }
        let own = self.clone();
        let reader = std::thread::Builder::new().name("reload".into()).spawn(move || {
            loop {
                own.reload();
                if own.end_reading() {
                    return;
                }
            }
        });
        if let Err(error) = reader {
            *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Reading::Nobody;
            RELOAD_FAILED.store(true, Ordering::Relaxed);
            tracing::warn!(%error, "there is no thread to read the configuration again, the former one stays");
        }
    }

    /// Whether nobody is at it.
    fn begin_reading(&self) -> bool {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *reading;
        *reading = if before == Reading::Nobody { Reading::Somebody } else { Reading::Twice };
        before == Reading::Nobody
    }

    /// Whether it need not be read once more.
    fn end_reading(&self) -> bool {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let once_more = *reading == Reading::Twice;
        *reading = if once_more { Reading::Somebody } else { Reading::Nobody };
        !once_more
    }

    /// Reads the file again. What is wrong is said and changes nothing.
    fn reload(&self) {
        let file = self.path.display();
        // Before it is checked: what is written meanwhile is taken once more, and never held for what is in force.
        let now = table(&self.path).unwrap_or_default();
        let result = (self.check)().and_then(|apply| run_hooks().map(|()| apply));
        RELOAD_FAILED.store(result.is_err(), Ordering::Relaxed);
        match result {
            Ok(apply) => {
                RELOADED_MS.store(wall_ms(), Ordering::Relaxed);
                self.take(apply, now);
            }
            Err(error) => tracing::warn!(%file, error = causes::said(&error),
                "the configuration is refused, the former one stays"),
        }
    }

    /// Brings what has changed into force, all of it or nothing: a part of a file is nobody's configuration. What cannot change while the
    /// process runs is named.
    fn take(&self, apply: Apply, now: toml::Table) {
        let file = self.path.display();
        let mut in_force = self.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = changed_keys(&in_force, &now);
        let (live, fixed): (Vec<&str>, Vec<&str>) =
            changed.iter().map(String::as_str).partition(|key| self.is_live(key));
        let (live, keys) = (live.join(", "), fixed.join(", "));
        match (live.is_empty(), keys.is_empty()) {
            (true, true) => tracing::info!(%file, "the configuration was read again"),
            (true, false) => {
                tracing::warn!(%file, keys, "the configuration was read again; what has changed needs a restart");
            }
            (false, false) => tracing::warn!(%file, keys, waiting = live,
                "the configuration was read again; some of what has changed needs a restart, and the rest waits for it"),
            (false, true) => {
                apply();
                *in_force = now;
                tracing::info!(%file, keys = live, "the configuration was read again, and what has changed is taken");
            }
        }
    }

    fn is_live(&self, key: &str) -> bool {
        self.live.iter().any(|live| is_at_or_below(key, live))
    }
}

/// Whether a dotted key is another, or within it.
#[must_use]
pub fn is_at_or_below(key: &str, other: &str) -> bool {
    key.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn run_hooks() -> anyhow::Result<()> {
    let hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    hooks.iter().try_for_each(|(what, hook)| hook().map_err(|error| error.context(*what)))
}

fn table(path: &std::path::Path) -> Option<toml::Table> {
    files::read_text(path).ok()?.parse().ok()
}

/// Keys whose values differ, those of tables with the table's name in front. A table that is not there has no keys.
fn changed_keys(old: &toml::Table, new: &toml::Table) -> BTreeSet<String> {
    use toml::Value::Table;
    let none = toml::Table::new();
    let mut changed = BTreeSet::new();
    for key in old.keys().chain(new.keys()) {
        let inner = match (old.get(key), new.get(key)) {
            (Some(Table(old)), Some(Table(new))) => changed_keys(old, new),
            (Some(Table(old)), None) => changed_keys(old, &none),
            (None, Some(Table(new))) => changed_keys(&none, new),
            (old, new) => {
                if old != new {
                    changed.insert(key.clone());
                }
                continue;
            }
        };
        changed.extend(inner.into_iter().map(|inner| format!("{key}.{inner}")));
    }
    changed
}

/// Hears signals from now on. `stop` is called with the first one that ends the process.
///
/// # Errors
/// When signals cannot be heard; then the process must not start, for it could not be ended in order.
pub fn hear(
    mut log: Log,
    configuration: Configuration,
    stop: impl Fn() + Send + 'static,
) -> anyhow::Result<()> {
    let configuration = Arc::new(configuration);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut signals = {
        let _within = runtime.enter();
        Signals::new()?
    };
    let listen = async move {
        let mut stopping = false;
        loop {
            match signals.next().await {
                Heard::Stop if stopping => {
                    tracing::warn!("told a second time to stop: this process ends at once");
                    std::process::exit(ENDED_AT_ONCE);
                }
                Heard::Stop => {
                    stopping = true;
                    tracing::info!(
                        "told to stop: this process hands over and ends; a second time ends it at once"
                    );
                    stop();
                }
                Heard::Reload => configuration.reload_aside(),
                Heard::Louder => log.louder(),
                Heard::AsAtFirst => log.as_at_first(),
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(listen))?;
    Ok(())
}

enum Heard {
    Stop,
    Reload,
    Louder,
    AsAtFirst,
}

struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    usr1: Signal,
    usr2: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
            usr1: signal(SignalKind::user_defined1())?,
            usr2: signal(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Heard {
        tokio::select! {
            _ = self.term.recv() => Heard::Stop,
            _ = self.int.recv() => Heard::Stop,
            _ = self.hup.recv() => Heard::Reload,
            _ = self.usr1.recv() => Heard::Louder,
            _ = self.usr2.recv() => Heard::AsAtFirst,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_have_changed_are_named_with_their_tables() {
        let table = |text: &str| text.parse::<toml::Table>().unwrap();
        let old = table("id = 1\nlisten = 'a'\n[tls]\nkey = 'k'\ncertificate = 'c'\n[moves]\ncut_ms = 1\n");
        let new = table("id = 1\nlisten = 'b'\nlease_ms = 9\n[tls]\nkey = 'k'\ncertificate = 'd'\n");
        let changed: Vec<_> = changed_keys(&old, &new).into_iter().collect();
        assert_eq!(changed, ["lease_ms", "listen", "moves.cut_ms", "tls.certificate"]);
        assert!(changed_keys(&old, &old).is_empty());
    }

    #[test]
    fn what_needs_no_restart_is_in_force_at_once_and_waits_for_what_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("site.toml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("listen = 'a'\n[moves]\ncut_ms = 1\n");
        let applied = Arc::new(AtomicU64::new(0));
        let counts = applied.clone();
        let configuration =
            Configuration::with_live(path.clone(), &["peers", "probe", "moves.rate"], move || {
                let counts = counts.clone();
                Ok(Box::new(move || {
                    counts.fetch_add(1, Ordering::Relaxed);
                }))
            });
        let after = |text: &str| {
            write(text);
            configuration.reload();
            applied.load(Ordering::Relaxed)
        };
        assert_eq!(after("listen = 'a'\n[moves]\ncut_ms = 1\n"), 0, "nothing has changed");
        assert_eq!(after("listen = 'a'\n[moves]\ncut_ms = 1\nrate = 5\n"), 1);
        assert_eq!(after("listen = 'a'\n[moves]\ncut_ms = 1\nrate = 5\n"), 1, "that is in force");
        assert_eq!(after("listen = 'a'\n[moves]\ncut_ms = 1\nrate = 5\n[probe]\nenabled = true\n"), 2);
        assert_eq!(after("listen = 'a'\npeers = [1]\n[moves]\ncut_ms = 2\nrate = 5\n"), 2, "a part is none");
        assert_eq!(after("listen = 'a'\npeers = [1]\n[moves]\ncut_ms = 1\n"), 3);
        assert_eq!(after("listen = 'a'\npeers = [1]\npeers_max = 1\n[moves]\ncut_ms = 1\n"), 3);
    }

    /// Longest wait for another thread of this test.
    const NEVER: std::time::Duration = std::time::Duration::from_secs(60);

    #[test]
    fn who_hears_signals_never_waits_for_the_file_and_no_signal_is_lost() {
        let (begun, begins) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let ends = Mutex::new(ends);
        let configuration = Arc::new(Configuration::new("/no/such/file".into(), move || {
            begun.send(())?;
            Ok(ends.lock().unwrap().recv()?)
        }));
        let idle = || *configuration.reading.lock().unwrap() == Reading::Nobody;
        configuration.reload_aside();
        begins.recv_timeout(NEVER).unwrap();
        // The file gives no answer: two signals more make one more reading, after the one that is in hand.
        configuration.reload_aside();
        configuration.reload_aside();
        assert!(begins.try_recv().is_err() && !idle());
        end.send(()).unwrap();
        begins.recv_timeout(NEVER).unwrap();
        end.send(()).unwrap();
        while !idle() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(begins.try_recv().is_err());
        configuration.reload_aside();
        begins.recv_timeout(NEVER).unwrap();
        end.send(()).unwrap();
    }
}
