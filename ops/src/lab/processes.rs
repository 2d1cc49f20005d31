//! Every process of the lab: started in a namespace, written into the ledger, with a log of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cleanup::Ledger;

/// All processes, by name. Dropping them ends them, newest first.
pub(super) struct Processes {
    logs: PathBuf,
    ledger: Ledger,
    children: BTreeMap<String, Child>,
}

impl Processes {
    pub(super) fn new(logs: PathBuf, ledger: Ledger) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        Ok(Self { logs, ledger, children: BTreeMap::new() })
    }

    /// Starts a process that lives until it is ended. What it says goes to `logs/NAME.log`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn spawn(&mut self, name: &str, mut command: Command) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.logs.join(format!("{name}.log")))?;
        command.stdout(log.try_clone()?).stderr(log);
        let child = self.start(name, &mut command)?;
        self.children.insert(name.to_owned(), child);
        Ok(())
    }

    /// Starts a process whose input and output the caller keeps, together with its end.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn spawn_piped(&mut self, name: &str, mut command: Command) -> anyhow::Result<Child> {
        let log = File::options().create(true).append(true).open(self.logs.join(format!("{name}.log")))?;
        command.stdout(Stdio::piped()).stderr(log);
        self.start(name, &mut command)
    }

    fn start(&mut self, name: &str, command: &mut Command) -> anyhow::Result<Child> {
        // Of its own process group: Ctrl-C is for the lab, which ends the others in order. Its input stays open as long as the lab
        // lives, by which Limosa's processes know.
        command.stdin(Stdio::piped()).process_group(0);
        let child = command.spawn().with_context(|| format!("{name} cannot be started"))?;
        self.ledger.record(child.id())?;
        Ok(child)
    }

    /// Ends a process with SIGKILL.
    ///
    /// # Errors
    /// It is not running.
    pub(super) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let mut child = self.children.remove(name).with_context(|| format!("{name} is not running"))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self, name: &str) -> bool {
        self.children.get_mut(name).is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Forgets a process that has ended since another one has its place.
    pub(super) fn forget_ended(&mut self, name: &str) {
        if self.has_ended(name) {
            self.children.remove(name);
        }
    }

    /// Processes that have ended by themselves since the last look, which none should.
    pub(super) fn ended(&mut self) -> Vec<String> {
        let ended = self.children.iter_mut().filter_map(|(name, child)| {
            let status: ExitStatus = child.try_wait().ok()??;
            Some((name.clone(), status))
        });
        let ended: Vec<_> = ended.collect();
        ended
            .into_iter()
            .map(|(name, status)| {
                self.children.remove(&name);
                format!(
                    "{name} ended by itself ({status}); see {}",
                    self.logs.join(format!("{name}.log")).display()
                )
            })
            .collect()
    }

    /// Where the logs are; they stay unless [`Processes::forget_logs`] is called.
    pub(super) fn keep_logs(&mut self) -> PathBuf {
        self.ledger.keep_directory(true);
        self.logs.clone()
    }

    /// All was well: nobody will want to read them.
    pub(super) fn forget_logs(&mut self) {
        self.ledger.keep_directory(false);
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill();
        }
        for child in self.children.values_mut() {
            let _ = child.wait();
        }
    }
}

/// Sends a signal and waits; sends SIGKILL when that takes too long.
pub(super) fn end(child: &mut Child, signal: Signal) -> Option<ExitStatus> {
    const STEP: Duration = Duration::from_millis(20);
    const STEPS: u32 = 250;
    let pid = i32::try_from(child.id()).ok()?;
    // It may have ended already, and has not been waited for, so the number is still its own.
    let _ = kill(Pid::from_raw(pid), signal);
    for _ in 0..STEPS {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(STEP);
    }
    let _ = child.kill();
    child.wait().ok()
}
