//! `limosa site`.

use std::time::Duration;

use clap::Subcommand;
use placement::core::Admin;
use serde_json::{Value, json};

use super::client::{Answer, Ask};
use super::output::{Rows, progress};
use super::{Context, Exit, Failure, duration, site_name};
use crate::address::Address;
use crate::placement::api::config::FailOver;
use crate::placement::api::view::{DrainView, SiteStatus, Sites};

/// Between two looks at a drain.
const LOOK: Duration = Duration::from_millis(500);

/// What can be done with sites.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show all sites. Exit code 6 if one of them is not as it should be.
    List,
    /// Show one site. Exit code 6 if it is not as it should be.
    Get {
        /// Its name.
        #[arg(value_parser = site_name)]
        name: String,
    },
    /// Add a site, or replace what was said of it.
    Add {
        /// Its name, as its certificate says.
        #[arg(value_parser = site_name)]
        name: String,
        /// Its number.
        #[arg(long)]
        id: u8,
        /// Where its agent's QUIC listens, HOST:PORT.
        #[arg(long)]
        endpoint: Address,
        /// Packets per second that its workers carry. With 0 no group with traffic is placed there; it may still take in what others serve.
        #[arg(long)]
        capacity_pps: u64,
        /// Flows that its workers hold; no limit if not given.
        #[arg(long)]
        capacity_flows: Option<u64>,
        /// Bits per second that its links carry; no limit if not given.
        #[arg(long)]
        capacity_bps: Option<u64>,
        /// What may fail together with the other sites that name the same; a domain of its own if not given.
        #[arg(long)]
        failure_domain: Option<String>,
        /// Degrees north.
        #[arg(long, requires = "longitude", allow_hyphen_values = true)]
        latitude: Option<f64>,
        /// Degrees east.
        #[arg(long, requires = "latitude", allow_hyphen_values = true)]
        longitude: Option<f64>,
    },
    /// Remove a site that is empty. Drain it, stop its agent and workers, then remove it. Its certificate is of no use from then on,
    /// until a site of the same name is added. Exit code 4 if there is no such site, 3 if it still owns groups, takes part in a
    /// move, is named by a rule, or is the only one.
    Remove {
        /// Its name.
        #[arg(value_parser = site_name)]
        name: String,
    },
    /// Empty a site: its groups move away, and no more come.
    Drain {
        /// Its name.
        #[arg(value_parser = site_name)]
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
        #[arg(value_parser = site_name)]
        name: String,
    },
    /// Give the groups of a site that is lost to their standbys, without their flows, and take back those that were on their way to
    /// it. Make sure that it does not forward any
    /// more: a site that only lost its agent still serves. Exit code 6 if groups are left that have no standby.
    FailOver {
        /// Its name.
        #[arg(value_parser = site_name)]
        name: String,
    },
    /// Close a site for more groups; it keeps those that it has.
    Cordon {
        /// Its name.
        #[arg(value_parser = site_name)]
        name: String,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    let answer = match verb {
        Verb::List => {
            let answer = context.client.send(Ask::get(&["sites"])).await?;
            let sites: Sites = answer.parse()?;
            context.output.print(&answer.body, &rows(&sites.sites));
            return judged(&sites.sites);
        }
        Verb::Get { name } => {
            let answer = context.client.send(Ask::get(&["sites", &name])).await?;
            let site: SiteStatus = answer.parse()?;
            context.output.print(&answer.body, &rows(std::slice::from_ref(&site)));
            return judged(&[site]);
        }
        Verb::Add {
            name,
            id,
            endpoint,
            capacity_pps,
            capacity_flows,
            capacity_bps,
            failure_domain,
            latitude,
            longitude,
        } => {
            let body = json!({
                "id": id, "endpoint": endpoint, "capacity_pps": capacity_pps,
                "capacity_flows": capacity_flows, "capacity_bps": capacity_bps,
                "failure_domain": failure_domain,
                "latitude": latitude, "longitude": longitude,
            });
            context.client.send(Ask::put(&["sites", &name], body)).await?
        }
        Verb::Remove { name } => {
            let answer = context.client.send(Ask::delete(&["sites", &name])).await?;
            let left: Sites = answer.parse()?;
            context.output.print(&answer.body, &rows(&left.sites));
            progress(&format!("{name}: removed; take it out of `peers` and `tunnels` of the other sites"));
            return Ok(Exit::Done);
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
        Verb::FailOver { name } => return fail_over(context, &name).await,
    };
    show(context, &answer)
}

async fn fail_over(context: &Context, name: &str) -> Result<Exit, Failure> {
    let answer = set(context, name, "fail-over").await?;
    let done: FailOver = answer.parse()?;
    let rows = done.left.iter().map(|group| vec![group.clone()]).collect();
    context.output.print(&answer.body, &Rows { heads: &["LEFT-WITHOUT-STANDBY"], rows });
    progress(&format!(
        "{name}: {} groups have a new owner, {} that were on their way to it are where they were",
        done.reassigned, done.taken_back
    ));
    if done.left.is_empty() {
        return Ok(Exit::Done);
    }
    let message = format!("{name}: {} groups or more have no standby that takes them", done.left.len());
    Err(Failure::new(Exit::Degraded, message))
}

async fn set(context: &Context, name: &str, verb: &str) -> Result<Answer, Failure> {
    context.client.send(Ask::post(&["sites", name, verb], None)).await
}

fn show(context: &Context, answer: &Answer) -> Result<Exit, Failure> {
    let site: SiteStatus = answer.parse()?;
    context.output.print(&answer.body, &rows(&[site]));
    Ok(Exit::Done)
}

/// Whether all is as it should be at these sites.
fn judged(sites: &[SiteStatus]) -> Result<Exit, Failure> {
    let said = |status: &SiteStatus| {
        let name = status.site.name.clone();
        status.problems.iter().map(move |problem| format!("{name}: {problem}")).collect::<Vec<_>>()
    };
    let problems: Vec<_> = sites.iter().flat_map(said).collect();
    if problems.is_empty() { Ok(Exit::Done) } else { Err(Failure::new(Exit::Degraded, problems.join("; "))) }
}

fn rows(sites: &[SiteStatus]) -> Rows {
    let row = |status: &SiteStatus| {
        let site = &status.site;
        vec![
            site.name.clone(),
            site.id.to_string(),
            admin(site.admin).to_owned(),
            if site.alive { "yes" } else { "no" }.to_owned(),
            status.problems.len().to_string(),
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
            "PROBLEMS",
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
                    let news = left.as_ref() != Some(&(site.groups, site.drain.clone()));
                    if news {
                        left = Some((site.groups, site.drain.clone()));
                        progress(&format!(
                            "{name}: {} groups left, {} of them moving",
                            site.groups, site.moves_out
                        ));
                        waits(site.drain.as_ref()).iter().for_each(|line| progress(line));
                    }
                    if site.groups == 0 && site.moves_in == 0 {
                        return Ok(answer);
                    }
                    if let Some(why) = site.drain.as_ref().and_then(never_ends) {
                        let message = format!(
                            "{name}: {why}. The drain goes on, and ends once the policy lets it; call it off with `limosa site \
                             undrain {name}`"
                        );
                        return Err(Failure::new(Exit::Conflict, message));
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
            let (groups, drain) = left.unwrap_or_default();
            let waits = waits(drain.as_ref());
            let why = if waits.is_empty() { String::new() } else { format!(": {}", waits.join("; ")) };
            let message = format!(
                "{name}: {groups} groups are left after {deadline:?}{why}. The drain goes on; call it off with `limosa \
                 site undrain {name}`"
            );
            Err(Failure::new(Exit::Timeout, message))
        }
    }
}

/// Why a drain does not end by itself: all that is left is kept by rules.
fn never_ends(drain: &DrainView) -> Option<String> {
    let kept = drain.left > 0 && drain.moving == 0 && drain.waits.iter().all(|wait| wait.forbidden);
    kept.then(|| waits(Some(drain)).join("; "))
}

/// What groups of a drained site wait for, a line each.
fn waits(drain: Option<&DrainView>) -> Vec<String> {
    let waits = drain.into_iter().flat_map(|drain| &drain.waits);
    waits.map(|wait| format!("{} groups wait: {}", wait.groups, wait.reason)).collect()
}

/// Whether a wait outlives a failure.
pub(super) fn passes(failure: &Failure) -> bool {
    matches!(failure.exit, Exit::Degraded | Exit::Timeout | Exit::Error)
}

/// For JSON of what has no answer of its own.
pub(super) fn list(key: &str, values: Vec<Value>) -> Value {
    json!({ key: values })
}
