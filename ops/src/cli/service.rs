//! `limosa service`.

use std::path::PathBuf;

use clap::Subcommand;
use placement::core::{Ordering, Service};

use super::client::Ask;
use super::output::Rows;
use super::{Context, Exit, Failure, read_object};
use crate::placement::api::view::Services;

/// What can be done with services.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show all services.
    List,
    /// Add a service with its groups, or replace its name, timeouts and ordering.
    Add {
        /// TOML, or JSON if it ends so; - for standard input.
        file: PathBuf,
        /// The first owner of its groups; spread by capacity if not given.
        #[arg(long)]
        owner: Option<String>,
        /// Only check.
        #[arg(long)]
        dry_run: bool,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    match verb {
        Verb::List => {
            let answer = context.client.send(Ask::get(&["services"])).await?;
            let services: Services = answer.parse()?;
            context.output.print(&answer.body, &rows(&services.services));
        }
        Verb::Add { file, owner, dry_run } => {
            let mut body = read_object(&file)?;
            let name = body.get("name").and_then(|name| name.as_str()).map(str::to_owned);
            let name = name.ok_or_else(|| Failure::usage(format!("{}: name is missing", file.display())))?;
            if let Some(owner) = owner {
                body["owner"] = owner.into();
            }
            let ask = Ask::put(&["services", &name], body).query("dryRun", dry_run.then_some(true));
            let answer = context.client.send(ask).await?;
            context.output.print(&answer.body, &rows(&[answer.parse()?]));
        }
    }
    Ok(Exit::Done)
}

fn rows(services: &[Service]) -> Rows {
    let joined =
        |prefixes: &[flow::Prefix]| prefixes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let row = |service: &Service| {
        let ordering = match service.ordering {
            Ordering::Strict => "strict",
            Ordering::Relaxed => "relaxed",
        };
        vec![
            service.name.clone(),
            service.id.to_string(),
            joined(&service.nat.clients),
            joined(&service.nat.pool),
            service.group_len.to_string(),
            service.nat.ports_per_subscriber.to_string(),
            ordering.to_owned(),
        ]
    };
    Rows {
        heads: &["NAME", "ID", "CLIENTS", "POOL", "GROUP-LEN", "PORTS", "ORDERING"],
        rows: services.iter().map(row).collect(),
    }
}
