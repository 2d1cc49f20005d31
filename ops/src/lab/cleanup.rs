//! What the lab leaves when it is killed, and its removal: processes, namespaces, a directory.
//!
//! A ledger in `/run` names every process that the lab has started, with the time at which it started, so that a number that was
//! given to another process since is never mistaken for one of ours. A process that those started in turn is found by the
//! namespace that it is in: all namespaces of the lab have one prefix, and whatever runs in them is ended with them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::namespaces;

/// Where the ledger is.
const LEDGER: &str = "/run/limosa-lab.json";
/// Room of a socket's receive queue, if it does not ask for more itself.
const RECEIVE_BUFFER: &str = "/proc/sys/net/core/rmem_default";
/// What Open vSwitch needs. It reads a cable by a packet socket, asks for no more room than the default, and what a worker held
/// leaves at once: with the kernel's 200 KB a hundred packets fit, and the rest is lost.
const RECEIVE_BUFFER_LEN: u64 = 8 << 20;
/// How long a process may take to die of SIGKILL.
const DEATH_BOUND: Duration = Duration::from_secs(5);

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pid: i32,
    /// In clock ticks since the system started.
    started: u64,
}

impl Process {
    /// The process that has this number now.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid: i32::try_from(pid).ok()?, started: start_time(&stat)? })
    }

    fn lives(self) -> bool {
        u32::try_from(self.pid).ok().and_then(Self::of) == Some(self)
    }
}

/// Field 22 of `/proc/PID/stat`; none of a process that has ended and that nobody has asked about yet. The name in the second
/// field may hold anything, parentheses and spaces too.
fn start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let lives = !matches!(fields.next()?, "Z" | "X");
    lives.then(|| fields.nth(18))??.parse().ok()
}

#[derive(Default, Serialize, Deserialize)]
struct Run {
    lab: Option<Process>,
    directory: PathBuf,
    processes: Vec<Process>,
    /// The room of receive queues as it was before; the kernel has one for all namespaces.
    receive_buffer_len: Option<u64>,
}

/// What the lab has started so far. Dropping it removes all of that.
pub(super) struct Ledger {
    path: PathBuf,
    run: Run,
    keep_directory: bool,
}

impl Ledger {
    /// Removes what a killed run has left, and begins a new one.
    ///
    /// # Errors
    /// Another run is alive.
    pub(super) fn open(directory: &Path) -> anyhow::Result<Self> {
        let left = remove_stale()?;
        if !left.is_empty() {
            super::say(&format!("An earlier run was killed; removed what it left: {}.", left.join(", ")));
        }
        let lab = Process::of(std::process::id());
        let run = Run { lab, directory: directory.to_owned(), ..Run::default() };
        let ledger = Self { path: LEDGER.into(), run, keep_directory: false };
        ledger.write()?;
        Ok(ledger)
    }

    /// Notes a process, before it is used for anything.
    pub(super) fn record(&mut self, pid: u32) -> anyhow::Result<()> {
        self.run.processes.extend(Process::of(pid));
        self.run.processes.retain(|process| process.lives());
        self.write()
    }

    /// Whether [`Self::raise_receive_buffer`] may do its work.
    ///
    /// # Errors
    /// The system does not allow it.
    pub(super) fn check_receive_buffer() -> anyhow::Result<()> {
        fs::File::options().write(true).open(RECEIVE_BUFFER).map(drop).context(RECEIVE_BUFFER)
    }

    /// Gives sockets that open from now on room for a burst, until the ledger is dropped.
    ///
    /// # Errors
    /// The system does not allow it.
    pub(super) fn raise_receive_buffer(&mut self) -> anyhow::Result<()> {
        let present = receive_buffer_len().context(RECEIVE_BUFFER)?;
        if present < RECEIVE_BUFFER_LEN {
            self.run.receive_buffer_len = Some(present);
            // Written down first, so that it is put back whatever happens.
            self.write()?;
            fs::write(RECEIVE_BUFFER, RECEIVE_BUFFER_LEN.to_string()).context(RECEIVE_BUFFER)?;
        }
        Ok(())
    }

    /// Whether the directory, with its logs, stays.
    pub(super) fn keep_directory(&mut self, keep: bool) {
        self.keep_directory = keep;
    }

    fn write(&self) -> anyhow::Result<()> {
        // Replaced as a whole: a run that is killed here leaves the one before or this one.
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_string(&self.run)?).with_context(|| new.display().to_string())?;
        Ok(fs::rename(&new, &self.path)?)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        remove(&self.run, !self.keep_directory);
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what a killed run has left; says what that was.
///
/// # Errors
/// The run is alive.
pub(super) fn remove_stale() -> anyhow::Result<Vec<String>> {
    let run = match fs::read_to_string(LEDGER) {
        Ok(text) => serde_json::from_str(&text).unwrap_or_default(),
        Err(_) => Run::default(),
    };
    if let Some(lab) = run.lab.filter(|lab| lab.lives()) {
        anyhow::bail!("a lab is running (process {}): wait for it, or end it with Ctrl-C", lab.pid);
    }
    let left = remove(&run, true);
    let _ = fs::remove_file(LEDGER);
    Ok(left)
}

fn receive_buffer_len() -> Option<u64> {
    fs::read_to_string(RECEIVE_BUFFER).ok()?.trim().parse().ok()
}

fn remove(run: &Run, with_directory: bool) -> Vec<String> {
    let mut left = Vec::new();
    let names = namespaces::present();
    let mut processes: Vec<_> = run.processes.iter().copied().filter(|process| process.lives()).collect();
    processes.extend(names.iter().flat_map(|name| inhabitants(name)));
    let pids: BTreeSet<_> = processes.iter().map(|process| process.pid).collect();
    for &pid in &pids {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    await_death(&processes);
    if !pids.is_empty() {
        left.push(format!("{} processes", pids.len()));
    }
    for name in &names {
        namespaces::delete(name);
    }
    if !names.is_empty() {
        left.push(format!("{} namespaces", names.len()));
    }
    // Unless somebody has set it to something else meanwhile.
    if let Some(before) = run.receive_buffer_len
        && receive_buffer_len() == Some(RECEIVE_BUFFER_LEN)
        && fs::write(RECEIVE_BUFFER, before.to_string()).is_ok()
    {
        left.push("a setting of the kernel".to_owned());
    }
    let ours = run.directory.file_name().is_some_and(|name| {
        name.to_string_lossy().starts_with(super::DIRECTORY_PREFIX) && run.directory.is_dir()
    });
    if with_directory && ours && fs::remove_dir_all(&run.directory).is_ok() {
        left.push(run.directory.display().to_string());
    }
    left
}

/// Processes in a namespace.
fn inhabitants(name: &str) -> Vec<Process> {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let own = std::process::id();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .filter(|pid| *pid != own)
        .filter_map(Process::of)
        .collect()
}

fn await_death(processes: &[Process]) {
    const STEP: Duration = Duration::from_millis(20);
    let mut waited = Duration::ZERO;
    // Children of this process stay as zombies until they are reaped, and those hold nothing.
    let holds = |process: &Process| {
        process.lives()
            && fs::read_to_string(format!("/proc/{}/stat", process.pid))
                .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z")))
    };
    while waited < DEATH_BOUND && processes.iter().any(holds) {
        std::thread::sleep(STEP);
        waited += STEP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_was_given_away_again_is_another_process() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.lives());
        assert!(!Process { started: own.started + 1, ..own }.lives());
        assert_eq!(Process::of(0), None);
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields: Vec<_> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b (c) {}", fields.join(" "));
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("7 (a"), None);
    }

    #[test]
    fn a_process_that_nobody_has_waited_for_does_not_live() {
        let fields: Vec<_> = (4..=52).map(|field| field.to_string()).collect();
        let stat = |state: &str| format!("7 (a) {state} {}", fields.join(" "));
        assert_eq!(start_time(&stat("S")), Some(22));
        assert_eq!(start_time(&stat("Z")), None);
    }
}
