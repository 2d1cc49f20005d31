//! `limosa site`.

use std::time::Duration;

use clap::Subcommand;
use placement::core::Admin;
use serde_json::{Value, json};

use super::client::{Answer, Ask};
use super::output::{Rows, progress};
use super::{Context, Exit, Failure, duration};
use crate::placement::api::view::{SiteStatus, Sites};

/// Between two looks at a drain.
const LOOK: Duration = Duration::from_millis(500);

/// What can be done with sites.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show all sites.
    List,
    /// Show one site.
    Get {
        /// Its name.
        name: String,
    },
    /// Add a site, or replace what was said of it.
    Add {
        /// Its name, as its certificate says.
        name: String,
        /// Its number.
        #[arg(long)]
        id: u8,
        /// Where its agent's QUIC listens, HOST:PORT.
        #[arg(long)]
        endpoint: String,
        /// Packets per second that its workers carry.
        #[arg(long)]
        capacity_pps: u64,
        /// Flows that its workers hold; no limit if not given.
        #[arg(long)]
        capacity_flows: Option<u64>,
        /// Bits per second that its links carry; no limit if not given.
        #[arg(long)]
        capacity_bps: Option<u64>,
        /// Degrees north.
        #[arg(long, requires = "longitude", allow_hyphen_values = true)]
        latitude: Option<f64>,
        /// Degrees east.
        #[arg(long, requires = "latitude", allow_hyphen_values = true)]
        longitude: Option<f64>,
    },
    /// Empty a site: its groups move away, and no more come.
    Drain {
        /// Its name.
        name: String,
        /// Wait until no group is left.
        #[arg(long)]
        wait: bool,
        /// Longest wait; the drain goes on after it.
        #[arg(long, value_parser = duration, default_value = "10m", requires = "wait")]
        deadline: Duration,
    },
    /// End a drain or cordon.
    Undrain {
        /// Its name.
        name: String,
    },
    /// Close a site for more groups; it keeps those that it has.
    Cordon {
        /// Its name.
        name: String,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    let answer = match verb {
        Verb::List => {
            let answer = context.client.send(Ask::get(&["sites"])).await?;
            let sites: Sites = answer.parse()?;
            context.output.print(&answer.body, &rows(&sites.sites));
            return Ok(Exit::Done);
        }
        Verb::Get { name } => context.client.send(Ask::get(&["sites", &name])).await?,
        Verb::Add { name, id, endpoint, capacity_pps, capacity_flows, capacity_bps, latitude, longitude } => {
            let body = json!({
                "id": id, "endpoint": endpoint, "capacity_pps": capacity_pps,
                "capacity_flows": capacity_flows, "capacity_bps": capacity_bps,
                "latitude": latitude, "longitude": longitude,
            });
            context.client.send(Ask::put(&["sites", &name], body)).await?
        }
        Verb::Drain { name, wait, deadline } => {
            let mut answer = set(context, &name, "drain").await?;
            if wait {
                answer = await_empty(context, &name, deadline).await?;
            }
            answer
        }
        Verb::Undrain { name } => set(context, &name, "undrain").await?,
        Verb::Cordon { name } => set(context, &name, "cordon").await?,
    };
    show(context, &answer)
}

async fn set(context: &Context, name: &str, verb: &str) -> Result<Answer, Failure> {
    context.client.send(Ask::post(&["sites", name, verb], None)).await
}

fn show(context: &Context, answer: &Answer) -> Result<Exit, Failure> {
    let site: SiteStatus = answer.parse()?;
    context.output.print(&answer.body, &rows(&[site]));
    Ok(Exit::Done)
}

fn rows(sites: &[SiteStatus]) -> Rows {
    let row = |status: &SiteStatus| {
        let site = &status.site;
        vec![
            site.name.clone(),
            site.id.to_string(),
            admin(site.admin).to_owned(),
            if site.alive { "yes" } else { "no" }.to_owned(),
            status.groups.to_string(),
            status.moves_in.to_string(),
            status.moves_out.to_string(),
            site.capacity_pps.to_string(),
            site.endpoint.clone(),
        ]
    };
    Rows {
        heads: &[
            "NAME",
            "ID",
            "ADMIN",
            "ALIVE",
            "GROUPS",
            "MOVES-IN",
            "MOVES-OUT",
            "CAPACITY-PPS",
            "ENDPOINT",
        ],
        rows: sites.iter().map(row).collect(),
    }
}

fn admin(admin: Admin) -> &'static str {
    match admin {
        Admin::Active => "active",
        Admin::Cordoned => "cordoned",
        Admin::Draining => "draining",
    }
}

/// Waits until a site owns no group and nothing moves to it. An election in between is no reason to give up.
async fn await_empty(context: &Context, name: &str, deadline: Duration) -> Result<Answer, Failure> {
    let mut left = None;
    let empty = async {
        loop {
            match context.client.send(Ask::get(&["sites", name])).await {
                Ok(answer) => {
                    let site: SiteStatus = answer.parse()?;
                    if left != Some((site.groups, site.moves_out)) {
                        left = Some((site.groups, site.moves_out));
                        progress(&format!(
                            "{name}: {} groups left, {} of them moving",
                            site.groups, site.moves_out
                        ));
                    }
                    if site.groups == 0 && site.moves_in == 0 {
                        return Ok(answer);
                    }
                    if site.site.admin != Admin::Draining {
                        let message =
                            format!("{name}: the drain was called off with {} groups left", site.groups);
                        return Err(Failure::new(Exit::Conflict, message));
                    }
                }
                Err(failure) if passes(&failure) => {
                    progress(&format!("{name}: {}; trying on", failure.message))
                }
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    match tokio::time::timeout(deadline, empty).await {
        Ok(result) => result,
        Err(_) => {
            let (groups, _) = left.unwrap_or_default();
            let message = format!(
                "{name}: {groups} groups are left after {deadline:?}; the drain goes on: see that another site is \
                 active, alive and has room, or call it off with `limosa site undrain {name}`"
            );
            Err(Failure::new(Exit::Timeout, message))
        }
    }
}

/// Whether a wait outlives a failure.
pub(super) fn passes(failure: &Failure) -> bool {
    matches!(failure.exit, Exit::Degraded | Exit::Timeout | Exit::Error)
}

/// For JSON of what has no answer of its own.
pub(super) fn list(key: &str, values: Vec<Value>) -> Value {
    json!({ key: values })
}
