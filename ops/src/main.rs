//! The command line of Limosa.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use limosa::config::PLACEMENT_IDS;
use limosa::{bench, causes, certs, cli, config, demo, lab, run};
use transfer::name::{NodeName, is_label};

/// Live flows move between sites without stopping.
#[derive(Parser)]
#[command(name = "limosa", version, about, propagate_version = true, after_help = cli::AFTER_HELP)]
struct Arguments {
    #[command(flatten)]
    options: cli::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a process of a deployment.
    Run(run::Run),
    /// Run a whole deployment of three sites on this machine, with traffic, moves and failures.
    Demo(demo::Options),
    /// Run one in network namespaces, with Open vSwitch, DPDK workers and the kernel's TCP. Needs root.
    Lab(lab::Options),
    /// Measure the pure parts on this machine.
    #[command(subcommand)]
    Bench(bench::Verb),
    /// Helpers for trying out.
    Dev {
        #[command(subcommand)]
        command: Dev,
    },
    #[command(flatten)]
    Noun(cli::Noun),
}

#[derive(Subcommand)]
enum Dev {
    /// Make a development authority and node certificates. What is there is kept and added to.
    Certs {
        /// The cluster's name, part of each node's name.
        #[arg(long)]
        cluster: String,
        /// Where to write them.
        #[arg(long)]
        directory: PathBuf,
        /// A site's name; may be repeated.
        #[arg(long)]
        site: Vec<String>,
        /// A placement node's number; may be repeated.
        #[arg(long)]
        placement: Vec<u64>,
        /// Days that new certificates are good for, 1 to 825.
        #[arg(long, default_value_t = certs::DAYS)]
        days: u32,
        /// Replace the certificates and keys of these nodes if they are there. The authority stays.
        #[arg(long)]
        renew: bool,
    },
    /// Print what each key of the configuration files means, as in docs/configuration.md.
    Configuration,
}

fn main() -> ExitCode {
    // Nothing else may choose a TLS provider; a second call would only say that it is done.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Run(run) => run::run(run),
        Command::Demo(options) => return demo::main(&options),
        Command::Lab(options) => return lab::main(&options),
        Command::Bench(verb) => return bench::main(&verb, arguments.options.output),
        Command::Noun(noun) => return ask(noun, &arguments.options),
        Command::Dev { command: Dev::Certs { cluster, directory, site, placement, days, renew } } => {
            nodes(&cluster, &site, &placement).and_then(|nodes| {
                make_certificates(&certs::Order {
                    directory: &directory,
                    cluster: &cluster,
                    nodes: &nodes,
                    days,
                    renew,
                })
            })
        }
        Command::Dev { command: Dev::Configuration } => {
            std::io::stdout().write_all(config::reference::document().as_bytes()).map_err(Into::into)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = causes::said(&error);
            tracing::error!("{error}");
            #[expect(clippy::print_stderr, reason = "what a person reads when logging is off")]
            {
                eprintln!("limosa: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

fn ask(noun: cli::Noun, options: &cli::Options) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(cli::run(noun, options)).into(),
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "what went wrong is for a person")]
            {
                eprintln!("limosa: no runtime: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

fn nodes(cluster: &str, sites: &[String], placement: &[u64]) -> anyhow::Result<Vec<NodeName>> {
    for name in sites.iter().map(String::as_str).chain([cluster]) {
        anyhow::ensure!(is_label(name), "{name:?}: use 1 to 63 of a-z, 0-9 and '-', not starting with '-'");
    }
    if let Some(id) = placement.iter().find(|id| !PLACEMENT_IDS.contains(id)) {
        let (least, most) = (PLACEMENT_IDS.start(), PLACEMENT_IDS.end());
        anyhow::bail!("--placement {id}: use {least} to {most}, as for `id` in the node's configuration");
    }
    let sites = sites.iter().map(|name| NodeName::site(cluster, name));
    let nodes: Vec<_> = sites.chain(placement.iter().map(|&id| NodeName::placement(cluster, id))).collect();
    anyhow::ensure!(!nodes.is_empty(), "name at least one --site or --placement");
    Ok(nodes)
}

fn make_certificates(order: &certs::Order<'_>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for made in certs::make(order)? {
        let what = if made.kept { "kept" } else { "made" };
        writeln!(out, "{what} {}", made.path.display())?;
    }
    Ok(())
}
