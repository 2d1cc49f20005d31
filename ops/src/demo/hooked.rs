//! Hooks by which the agents of a cluster start and stop workers by themselves, as shell scripts, and the end of what they started.
//!
//! A worker that a hook has started is nobody's child. It ends with the harness all the same: its input is a FIFO that the harness
//! holds open. Whoever is still there after that is ended by its number, if it still is the process that the hook wrote down.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

/// When agents start and stop workers. `min` are those of the layout, `max` the ports of the switch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Mean busy share above which a worker is started.
    pub busy_high: f64,
    /// Mean busy share below which one is retired.
    pub busy_low: f64,
    /// How long a threshold has to be passed, in seconds.
    pub hold_s: u64,
    /// Shortest time between two changes, in seconds.
    pub pause_s: u64,
}

impl Thresholds {
    /// None is ever passed.
    pub(crate) const NEVER: Self = Self { busy_high: 1.0, busy_low: 0.0, hold_s: 2, pause_s: 5 };

    /// A surge from what is usual to `high` passes the upper one, and what is usual is below the lower one. A surge by half is enough for
    /// the workers that are left when one is retired to stay below the upper one by prediction.
    pub(crate) fn between(usual: f64, high: f64) -> Self {
        let at = |share: f64| (usual + (high - usual) * share).clamp(0.0, 1.0);
        Self { busy_high: at(0.4), busy_low: at(0.15), ..Self::NEVER }
    }

    /// The keys of an agent's file.
    pub(crate) fn table(&self, directory: &Path, min: u16, max: u16) -> String {
        let Self { busy_high, busy_low, hold_s, pause_s } = self;
        let hook = |name: &str| format!("[{:?}, \"{{worker}}\"]", directory.join(name));
        format!(
            "workers.elastic = {{ start = {}, stop = {}, min = {min}, max = {max}, busy_high = {busy_high:?}, \
             busy_low = {busy_low:?}, hold_s = {hold_s}, pause_s = {pause_s}, timeout_s = 10 }}\n",
            hook(START),
            hook(STOP)
        )
    }
}

const START: &str = "start-worker";
const STOP: &str = "stop-worker";
const LIFELINE: &str = "lifeline";
/// How long a worker may take to end when the harness does.
const END_BOUND: Duration = Duration::from_secs(3);

/// Both scripts begin so. A process that ended and that nobody waited for has no command line.
const COMMON: &str = r#"#!/bin/sh
set -eu
name=worker-$LIMOSA_SITE-$1
is_there() { [ -e "$name.pid" ] && grep -q -- "$name.toml" "/proc/$(cat "$name.pid")/cmdline" 2>/dev/null; }
"#;

/// Workers that hooks have started. Dropping it ends them.
pub(crate) struct HookWorkers {
    directory: PathBuf,
    lifeline: Option<File>,
}

impl HookWorkers {
    /// Writes the hooks.
    pub(crate) fn new(directory: &Path, binary: &Path) -> anyhow::Result<Self> {
        let path = directory.join(LIFELINE);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).with_context(|| path.display().to_string())?;
        // For reading too, or opening it would wait for the first worker.
        let lifeline = File::options().read(true).write(true).open(&path)?;
        let start = format!(
            "cd {directory:?}\nis_there && exit 0\n[ -p {LIFELINE} ]\n\
             {binary:?} run worker --with-parent --config {directory:?}/$name.toml <{LIFELINE} \
             >>logs/$name.log 2>&1 &\necho $! >$name.pid.new\nmv $name.pid.new $name.pid\n\
             # For a moment the new process is still a copy of this shell.\n\
             tries=0\nuntil is_there; do tries=$((tries + 1)); [ $tries -lt 100 ] || exit 1; sleep 0.02; done\n"
        );
        let stop = format!(
            "cd {directory:?}\nis_there || exit 0\nkill -TERM \"$(cat $name.pid)\"\n\
             while is_there; do sleep 0.05; done\nrm $name.pid\n"
        );
        for (name, script) in [(START, start), (STOP, stop)] {
            let path = directory.join(name);
            fs::write(&path, format!("{COMMON}{script}"))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        }
        Ok(Self { directory: directory.to_owned(), lifeline: Some(lifeline) })
    }

    /// Processes that hooks wrote down and that are still those.
    fn present(&self) -> Vec<Pid> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let pids = paths.filter(|path| path.extension().is_some_and(|extension| extension == "pid"));
        pids.filter_map(|path| runs(&path)).collect()
    }

    /// The process of a worker that a hook has started, by the worker's name.
    pub(crate) fn process_id(&self, name: &str) -> Option<u32> {
        u32::try_from(runs(&self.directory.join(name).with_extension("pid"))?.as_raw()).ok()
    }
}

/// Who is written down in a file, if it still is that process.
fn runs(path: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let config = path.with_extension("toml").display().to_string();
    String::from_utf8_lossy(&line).contains(&config).then(|| Pid::from_raw(pid))
}

impl Drop for HookWorkers {
    fn drop(&mut self) {
        const STEP: Duration = Duration::from_millis(20);
        // First the name: a hook that has not opened it yet fails, instead of waiting for ever.
        let _ = fs::remove_file(self.directory.join(LIFELINE));
        self.lifeline = None;
        let mut waited = Duration::ZERO;
        while waited < END_BOUND && !self.present().is_empty() {
            std::thread::sleep(STEP);
            waited += STEP;
        }
        for pid in self.present() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In place of `limosa`: waits until its input ends.
    fn waiter(directory: &Path) -> PathBuf {
        let path = directory.join("waiter");
        fs::create_dir(directory.join("logs")).unwrap();
        fs::write(&path, "#!/bin/sh\ncat\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    fn hook(directory: &Path, name: &str) -> bool {
        let mut command = Command::new(directory.join(name));
        command.arg("3").env("LIMOSA_SITE", "1").status().unwrap().success()
    }

    #[test]
    fn what_a_hook_has_started_ends_by_the_other_hook_or_with_the_harness() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let workers = HookWorkers::new(directory, &waiter(directory)).unwrap();
        assert!(hook(directory, START) && hook(directory, START), "twice is as good as once");
        assert_eq!(workers.present().len(), 1);
        assert!(workers.process_id("worker-1-3").is_some() && workers.process_id("worker-1-4").is_none());
        assert!(hook(directory, STOP) && hook(directory, STOP));
        assert_eq!(workers.present(), []);
        assert!(hook(directory, START));
        let [pid] = workers.present()[..] else { panic!("one worker") };
        drop(workers);
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(line.is_empty(), "{}", String::from_utf8_lossy(&line));
        assert!(!hook(directory, START), "nothing starts after the end");
    }
}
