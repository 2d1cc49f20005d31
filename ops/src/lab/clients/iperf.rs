//! `iperf3`: a TCP connection and a stream of UDP packets, with its own figures.

use std::io::Read;
use std::net::Ipv4Addr;
use std::process::Child;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value;

use super::super::namespaces::Namespace;
use super::super::processes::{Processes, end};
use super::Rate;
use super::servers::IPERF_PORTS;
use crate::clock::Clock;

/// What it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    Tcp,
    Udp,
}

/// A run under way.
#[derive(Debug)]
pub(in super::super) struct Iperf {
    child: Child,
    output: Option<std::thread::JoinHandle<String>>,
    started_us: u64,
}

/// What it found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(in super::super) struct Measured {
    pub(in super::super) bytes: u64,
    pub(in super::super) mbit_per_s: f64,
    /// TCP.
    pub(in super::super) retransmits: u64,
    /// UDP.
    pub(in super::super) packets: u64,
    pub(in super::super) lost: u64,
    pub(in super::super) out_of_order: u64,
    pub(in super::super) error: Option<String>,
    pub(in super::super) per_second: Vec<Rate>,
}

impl Iperf {
    /// Starts a client in the namespace, for so many seconds.
    ///
    /// # Errors
    /// It cannot be started.
    pub(in super::super) fn start(
        kind: Kind,
        clients: &Namespace,
        (from, server): (Ipv4Addr, Ipv4Addr),
        seconds: u64,
        clock: Clock,
        processes: &mut Processes,
    ) -> anyhow::Result<Self> {
        let (port, how, name): (_, &[&str], _) = match kind {
            Kind::Tcp => (IPERF_PORTS[0], &["-b", "8M"], "iperf3-tcp"),
            Kind::Udp => (IPERF_PORTS[1], &["-u", "-b", "2M", "-l", "1200"], "iperf3-udp"),
        };
        let mut command = clients.command("iperf3");
        command.args(["-c", &server.to_string(), "-B", &from.to_string(), "-p", &port.to_string()]);
        command.args(how).args(["-t", &seconds.to_string(), "--json"]);
        let mut child = processes.spawn_piped(name, command)?;
        let mut pipe = child.stdout.take().context("iperf3 has no output")?;
        let output = std::thread::Builder::new().name("iperf3".into()).spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            text
        })?;
        Ok(Self { child, output: Some(output), started_us: clock.now().0 })
    }

    /// Waits until it is done, no longer than a bound.
    pub(in super::super) fn finish(&mut self, bound: Duration) -> Measured {
        const STEP: Duration = Duration::from_millis(50);
        let mut waited = Duration::ZERO;
        while waited < bound && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(STEP);
            waited += STEP;
        }
        end(&mut self.child, Signal::SIGINT);
        let text = self.output.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        measured(&text, self.started_us / 1_000_000)
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the JSON that `iperf3` writes at its end.
fn measured(text: &str, started_s: u64) -> Measured {
    let Ok(json) = serde_json::from_str::<Value>(text) else {
        return Measured { error: Some("iperf3 said nothing".to_owned()), ..Measured::default() };
    };
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let (sent, got, udp) = (&json["end"]["sum_sent"], &json["end"]["sum_received"], &json["end"]["sum"]);
    let sum = if got.is_object() { got } else { udp };
    let out_of_order = json["end"]["streams"][0]["udp"]["out_of_order"].clone();
    let intervals = json["intervals"].as_array().cloned().unwrap_or_default();
    let mbit = |value: &Value| (value.as_f64().unwrap_or(0.0) / 10_000.0).round() / 100.0;
    #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "seconds of a run")]
    let rate = |interval: &Value| Rate {
        second: started_s + interval["sum"]["start"].as_f64().unwrap_or(0.0).round() as u64,
        mbit_per_s: mbit(&interval["sum"]["bits_per_second"]),
    };
    Measured {
        bytes: count(&sum["bytes"]),
        mbit_per_s: mbit(&sum["bits_per_second"]),
        retransmits: count(&sent["retransmits"]),
        packets: count(&udp["packets"]),
        lost: count(&udp["lost_packets"]),
        out_of_order: count(&out_of_order),
        error: json["error"].as_str().map(str::to_owned),
        per_second: intervals.iter().map(rate).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_run_is_read_and_so_is_that_of_one_that_failed() {
        let text = r#"{ "intervals": [{ "sum": { "start": 1.0001, "bits_per_second": 8.0e6 } }],
            "end": { "sum_sent": { "retransmits": 3 }, "sum_received": { "bytes": 5, "bits_per_second": 1e6 } } }"#;
        let measured = measured(text, 10);
        assert_eq!((measured.bytes, measured.retransmits, measured.error), (5, 3, None));
        assert_eq!(measured.per_second, [Rate { second: 11, mbit_per_s: 8.0 }]);
        let failed = super::measured(r#"{ "error": "unable to connect" }"#, 0);
        assert_eq!(failed.error.as_deref(), Some("unable to connect"));
        assert!(super::measured("", 0).error.is_some());
    }
}
