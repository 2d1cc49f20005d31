//! `curl` fetches a big file from nginx, which sends it slowly enough that it lasts over the moves; the checksum is compared.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use serde::Serialize;

use super::super::namespaces::Namespace;
use super::super::processes::{Processes, end};
use super::Rate;
use crate::clock::Clock;

/// A download under way.
#[derive(Debug)]
pub(in super::super) struct Download {
    child: Child,
    target: PathBuf,
    source: PathBuf,
    rates: std::thread::JoinHandle<Vec<Rate>>,
    stop: Arc<AtomicBool>,
    started_us: u64,
    clock: Clock,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(in super::super) struct Downloaded {
    pub(in super::super) bytes: u64,
    pub(in super::super) seconds: f64,
    pub(in super::super) checksum: String,
    /// The checksum of what the server has.
    pub(in super::super) checksum_expected: String,
    /// What `curl` ended with; 0 when all was well.
    pub(in super::super) exit_code: Option<i32>,
    pub(in super::super) per_second: Vec<Rate>,
}

impl Download {
    /// Starts `curl` in the namespace.
    ///
    /// # Errors
    /// It cannot be started.
    pub(in super::super) fn start(
        clients: &Namespace,
        (from, server): (Ipv4Addr, Ipv4Addr),
        source: &Path,
        clock: Clock,
        processes: &mut Processes,
    ) -> anyhow::Result<Self> {
        let target = source.with_file_name("downloaded");
        let mut command = clients.command("curl");
        // A client that only receives has nothing to say. When the table of its worker is lost, what it says next makes its flow
        // anew, so it must say something.
        command.args(["-sS", "--interface", &from.to_string(), "--keepalive-time", "2"]);
        command.arg("-o").arg(&target).arg(format!("http://{server}/big"));
        let child = processes.spawn_piped("curl", command)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (path, ended) = (target.clone(), Arc::clone(&stop));
        let rates = std::thread::Builder::new().name("download".into()).spawn(move || {
            let mut rates = Vec::new();
            let (mut at, mut had) = (clock.now().0, 0);
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1_000));
                let has = std::fs::metadata(&path).map_or(0, |file| file.len());
                let now = clock.now().0;
                rates.push(Rate { second: at / 1_000_000, mbit_per_s: mbit_per_s(has - had, now - at) });
                (at, had) = (now, has);
            }
            rates
        })?;
        let started_us = clock.now().0;
        Ok(Self { child, target, source: source.to_owned(), rates, stop, started_us, clock })
    }

    /// Waits until it is done, no longer than a bound.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(in super::super) fn finish(mut self, bound: Duration) -> anyhow::Result<Downloaded> {
        const STEP: Duration = Duration::from_millis(50);
        let mut waited = Duration::ZERO;
        while waited < bound && self.child.try_wait()?.is_none() {
            std::thread::sleep(STEP);
            waited += STEP;
        }
        let status = match self.child.try_wait()? {
            Some(status) => Some(status),
            None => end(&mut self.child, Signal::SIGTERM),
        };
        let us = self.clock.now().0 - self.started_us;
        self.stop.store(true, Ordering::Relaxed);
        Ok(Downloaded {
            bytes: std::fs::metadata(&self.target).map_or(0, |file| file.len()),
            seconds: super::ms(us) / 1_000.0,
            checksum: checksum(&self.target)?,
            checksum_expected: checksum(&self.source)?,
            exit_code: status.and_then(|status| status.code()),
            per_second: self.rates.join().unwrap_or_default(),
        })
    }
}

/// Megabits per second.
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(in super::super) fn mbit_per_s(bytes: u64, us: u64) -> f64 {
    (bytes as f64 * 8.0 / us.max(1) as f64 * 100.0).round() / 100.0
}

fn checksum(path: &Path) -> anyhow::Result<String> {
    let output = Command::new("sha256sum").arg(path).output().context("sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or("none").to_owned())
}
