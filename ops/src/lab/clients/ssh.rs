//! An SSH session in which somebody types, and sees each letter when it has come back.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;

use super::super::namespaces::Namespace;
use super::super::processes::{Processes, end};
use super::Samples;
use super::servers::SSH_PORT;
use crate::clock::Clock;

/// Between a letter's coming back and the next one.
const THINK: Duration = Duration::from_millis(80);
/// What the session says when it is there.
const READY: &str = "ready";

/// A session under way.
#[derive(Debug)]
pub(in super::super) struct Typing {
    pub(in super::super) samples: Samples,
    child: Child,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl Typing {
    /// Logs in and begins to type.
    ///
    /// # Errors
    /// `ssh` cannot be started.
    pub(in super::super) fn start(
        clients: &Namespace,
        (from, server): (Ipv4Addr, Ipv4Addr),
        key: &Path,
        clock: Clock,
        processes: &mut Processes,
    ) -> anyhow::Result<Self> {
        let mut command = clients.command("ssh");
        command.args(["-F", "none", "-tt", "-b", &from.to_string(), "-p", &SSH_PORT.to_string()]);
        command.arg("-i").arg(key);
        for option in
            ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        {
            command.args(["-o", option]);
        }
        // The terminal at the other end echoes; `cat` keeps it busy.
        command.arg(format!("root@{server}")).arg(format!("echo {READY}; exec cat >/dev/null"));
        let mut child = processes.spawn_piped("ssh", command)?;
        let input = child.stdin.take().context("ssh has no input")?;
        let output = child.stdout.take().context("ssh has no output")?;
        let (samples, stop) = (Samples::default(), Arc::new(AtomicBool::new(false)));
        let (into, ended) = (samples.clone(), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("ssh".into())
            .spawn(move || type_letters(input, output, clock, &into, &ended))?;
        Ok(Self { samples, child, stop, thread: Some(thread) })
    }

    /// Types no more; why it ended early, if it did.
    pub(in super::super) fn stop(&mut self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        // The last letter may be on its way.
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(50);
        while waited < Duration::from_secs(5) && self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            std::thread::sleep(step);
            waited += step;
        }
        let early = self.child.try_wait().ok().flatten();
        end(&mut self.child, Signal::SIGTERM);
        let result = self.thread.take().map(JoinHandle::join);
        match (early, result) {
            (Some(status), _) => Err(format!("ssh ended by itself ({status})")),
            (None, Some(Ok(result))) => result,
            (None, _) => Err("the typist is gone".to_owned()),
        }
    }
}

impl Drop for Typing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn type_letters(
    mut input: impl Write,
    mut output: impl Read,
    clock: Clock,
    samples: &Samples,
    stop: &AtomicBool,
) -> Result<(), String> {
    let gone = |error: std::io::Error| format!("the session was lost: {error}");
    let mut seen = String::new();
    while !seen.contains(READY) {
        seen.push(char::from(letter(&mut output).map_err(gone)?));
    }
    // The end of that line.
    while letter(&mut output).map_err(gone)? != b'\n' {}
    let mut letters = (b'a'..=b'z').cycle();
    while !stop.load(Ordering::Relaxed) {
        let Some(typed) = letters.next() else { break };
        let at = clock.now().0;
        input.write_all(&[typed]).and_then(|()| input.flush()).map_err(gone)?;
        let came = letter(&mut output).map_err(gone)?;
        samples.push(at, Some(clock.now().0 - at));
        if came != typed {
            return Err(format!("{:?} was typed and {:?} came back", char::from(typed), char::from(came)));
        }
        if typed == b'z' {
            // A terminal takes lines of 4,096 letters at most.
            input.write_all(b"\n").and_then(|()| input.flush()).map_err(gone)?;
            while letter(&mut output).map_err(gone)? != b'\n' {}
        }
        std::thread::sleep(THINK);
    }
    Ok(())
}

fn letter(output: &mut impl Read) -> std::io::Result<u8> {
    let mut byte = [0];
    output.read_exact(&mut byte).map(|()| byte[0])
}
