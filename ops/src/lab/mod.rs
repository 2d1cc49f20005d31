//! `limosa lab`: a deployment in network namespaces of this machine, with Open vSwitch, DPDK workers, the kernel's own TCP, and the
//! programs that people use as clients. The demo's sibling: the demo needs nothing and simulates its users, the lab
//! needs root and a few packages and simulates only the distance between the sites.

mod api;
mod cleanup;
mod clients;
mod deployment;
mod namespaces;
mod ovs;
mod plot;
mod probes;
mod processes;
mod report;
mod scenario;
mod underlay;
mod wan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};

use crate::clock::Clock;
use crate::demo::built_in;
use cleanup::Ledger;
use deployment::Deployment;
use namespaces::Namespace;
use processes::Processes;
use report::Report;
use scenario::{Size, Stage};

/// What the names of the lab's directories begin with.
const DIRECTORY_PREFIX: &str = "limosa-lab-";

/// What may be chosen of the lab.
#[derive(Args, Clone, Debug)]
pub struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// Two sites, one move, one kill: below a minute.
    #[arg(long)]
    short: bool,
    /// Only remove what a killed run has left.
    #[arg(long)]
    clean: bool,
    /// Only say what is missing for the lab; ends with 0 when nothing is.
    #[arg(long)]
    check: bool,
    /// Leave everything running at the end, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Share of packets that the network between the sites loses, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Where to write the report.
    #[arg(long, default_value = "target/lab/report.json")]
    report: PathBuf,
    /// Where to write the plot.
    #[arg(long, default_value = "target/lab/report.svg")]
    plot: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
enum Part {
    /// The network between sites: packets of one cable leave by another, later.
    Wan {
        /// Its configuration (TOML).
        #[arg(long)]
        config: PathBuf,
    },
}

/// Says something to whoever watches.
#[expect(clippy::print_stdout, reason = "the lab is for people who watch")]
fn say(text: &str) {
    println!("{text}");
}

/// Runs the lab: 0 when all was as it should be, 1 otherwise.
#[must_use]
pub fn main(options: &Options) -> ExitCode {
    let result = match &options.part {
        Some(Part::Wan { config }) => wan::run(config).map(|()| Vec::new()),
        None if options.check => check().map(|()| Vec::new()),
        None if options.clean => clean().map(|()| Vec::new()),
        None => run(options),
    };
    match result {
        Ok(failures) if failures.is_empty() => ExitCode::SUCCESS,
        Ok(failures) => {
            say("\nNot all was well:");
            failures.iter().for_each(|failure| say(&format!("  {failure}")));
            ExitCode::FAILURE
        }
        Err(error) => {
            say(&format!("The lab could not be run: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Where interfaces of bridges in the userspace datapath come from.
const TUN: &str = "/dev/net/tun";

/// What the lab needs, and the Debian package that has it.
const TOOLS: [(&str, &str); 11] = [
    ("ip", "iproute2"),
    ("sysctl", "procps"),
    ("ethtool", "ethtool"),
    ("ovs-vswitchd", "openvswitch-switch"),
    ("ovsdb-tool", "openvswitch-switch"),
    ("iperf3", "iperf3"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("sshd", "openssh-server"),
    ("ssh", "openssh-client"),
    ("ping", "iputils-ping"),
];

/// Says what is missing.
fn check() -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "it makes network namespaces: run it as root");
    anyhow::ensure!(
        dataplane::dpdk::BUILT,
        "this program was built without DPDK: apt-get install libdpdk-dev clang libclang-dev, then \
         cargo build --package limosa --features dpdk"
    );
    let directories = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let is_there =
        |tool: &str| directories.split(':').any(|directory| Path::new(directory).join(tool).exists());
    let mut missing: Vec<_> =
        TOOLS.iter().filter(|(tool, _)| !is_there(tool)).map(|(_, package)| *package).collect();
    missing.dedup();
    anyhow::ensure!(missing.is_empty(), "not installed: apt-get install {}", missing.join(" "));
    anyhow::ensure!(
        Path::new(TUN).exists(),
        "there is no {TUN}, which bridges of Open vSwitch need: give it to the container, or use a machine"
    );
    Ledger::check_receive_buffer()?;
    Namespace::possible()
}

fn clean() -> anyhow::Result<()> {
    let left = cleanup::remove_stale()?;
    say(&if left.is_empty() {
        "Nothing was left.".to_owned()
    } else {
        format!("Removed {}.", left.join(", "))
    });
    Ok(())
}

fn run(options: &Options) -> anyhow::Result<Vec<String>> {
    check()?;
    anyhow::ensure!((0.0..1.0).contains(&options.loss), "--loss {}: use 0 to below 1", options.loss);
    // Short, because a socket's path ends at 107 bytes.
    let directory = tempfile::Builder::new().prefix(DIRECTORY_PREFIX).tempdir()?;
    let mut ledger = Ledger::open(directory.path())?;
    // From here on the ledger sees to it, so that a run that is killed is cleaned up too.
    let directory = directory.keep();
    ledger.raise_receive_buffer()?;
    let processes = Processes::new(directory.join("logs"), ledger)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = play(options, &directory, processes) => result,
            () = crate::run::signal() => {
                // Nobody wants the logs of a run that was stopped.
                let _ = std::fs::remove_dir_all(&directory);
                Err(anyhow::anyhow!("it was stopped; all that it made is removed"))
            }
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    result
}

async fn play(options: &Options, directory: &Path, mut processes: Processes) -> anyhow::Result<Vec<String>> {
    let size = if options.short { Size::SHORT } else { Size::FULL };
    let sites: Vec<_> = built_in().into_iter().take(size.sites.into()).collect();
    let names: Vec<_> = sites.iter().map(|site| site.name.clone()).collect();
    say(&format!("Sites ({}) start in namespaces of their own.", names.join(", ")));
    let logs = processes.keep_logs();
    let deployment = Deployment::start(sites, options.loss, directory.to_owned(), processes)
        .await
        .with_context(|| format!("logs are in {}", logs.display()))?;
    let clock = Clock::start();
    let mut stage = Stage::open(deployment, size, directory.to_owned(), clock).await?;
    say("The clients work: curl, HTTP requests, SSH, ping, iperf3.");
    if options.short {
        stage.play_short().await?;
    } else {
        stage.play().await?;
    }
    let closed = stage.close().await?;
    let seconds = clients::ms(clock.now().0) / 1_000.0;
    let (happenings, drops, failures) = (closed.happenings, closed.drops, closed.failures);
    let report = Report::new(names, seconds, happenings, closed.seen, closed.probes, drops, failures);
    write(&options.report, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    write(&options.plot, &plot::svg(&report))?;
    say(&format!("\n{}", report.table()));
    say(&format!("\nWritten to {} and {}.", options.report.display(), options.plot.display()));
    if options.keep {
        say("\nEverything goes on until Ctrl-C. Try: ip netns exec limosa-lab-s1 bash");
        crate::run::signal().await;
    }
    let mut deployment = closed.deployment;
    if report.failures.is_empty() {
        deployment.processes.forget_logs();
    } else {
        say(&format!("Logs are in {}.", logs.display()));
    }
    drop(deployment);
    Ok(report.failures)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, text).with_context(|| path.display().to_string())
}
