//! `limosa group`.

use clap::Subcommand;
use serde_json::Value;

use super::client::Ask;
use super::output::{Format, Rows, or_dash, progress};
use super::site::list;
use super::{Context, Exit, Failure};
use crate::placement::api::view::{CandidateView, ExplanationView, GroupView, Groups, TermView};

/// What can be asked of groups.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show groups.
    List {
        /// Only those that this site owns.
        #[arg(long)]
        site: Option<String>,
        /// Only those of this service.
        #[arg(long)]
        service: Option<String>,
        /// At most so many; all if not given.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
    },
    /// Show one group.
    Get {
        /// SERVICE:PREFIX, for example 1:100.64.3.0/24.
        group: String,
    },
    /// Split a group into its two halves, which can then be moved apart.
    Split {
        /// SERVICE:PREFIX, for example 1:100.64.3.0/24.
        group: String,
    },
    /// Merge a group with its sibling, the other half of the prefix above; both must be at one site.
    Merge {
        /// SERVICE:PREFIX, for example 1:100.64.3.0/25.
        group: String,
    },
    /// Show why a group is where it is.
    Explain {
        /// SERVICE:PREFIX, for example 1:100.64.3.0/24; or as for `placement explain`.
        group: String,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    match verb {
        Verb::List { site, service, limit } => {
            let groups = pages(context, site, service, limit).await?;
            let views: Vec<GroupView> =
                groups.iter().filter_map(|group| serde_json::from_value(group.clone()).ok()).collect();
            context.output.print(&list("groups", groups), &rows(&views));
        }
        Verb::Get { group } => {
            let answer = context.client.send(Ask::get(&["groups", &group])).await?;
            context.output.print(&answer.body, &rows(&[answer.parse()?]));
        }
        Verb::Split { group } => reshape(context, "split", &group).await?,
        Verb::Merge { group } => reshape(context, "merge", &group).await?,
        Verb::Explain { group } => return explain(context, group).await,
    }
    Ok(Exit::Done)
}

/// Splits or merges, and shows what came of it.
async fn reshape(context: &Context, verb: &str, group: &str) -> Result<(), Failure> {
    let body = serde_json::json!({ "group": group });
    let answer = context.client.send(Ask::post(&["groups", verb], Some(body))).await?;
    context.output.print(&answer.body, &rows(&answer.parse::<Groups>()?.groups));
    Ok(())
}

/// Why a group, named by itself, by an address or by a flow, is where it is.
pub(super) async fn explain(context: &Context, target: String) -> Result<Exit, Failure> {
    let answer = context.client.send(Ask::get(&["explain"]).query("group", Some(target))).await?;
    let view: ExplanationView = answer.parse()?;
    context.output.print(&answer.body, &candidates(&view));
    if context.output.format == Format::Table {
        told(&view).iter().for_each(|line| progress(line));
    }
    Ok(Exit::Done)
}

/// What the table does not say.
fn told(view: &ExplanationView) -> Vec<String> {
    let traffic = match (view.packets_per_s, view.flows) {
        (Some(packets), Some(flows)) => format!("{packets:.0} packets/s, {flows} flows"),
        _ => "no traffic known".to_owned(),
    };
    let mut told = vec![format!("group {} at {}: {traffic}", view.group, view.owner)];
    if let Some(standby) = &view.standby {
        told.push(format!("its standby is {standby}"));
    }
    if !view.rules.is_empty() {
        told.push(format!("rules that speak of it: {}", view.rules.join(", ")));
    }
    if let (Some(best), Some(second), Some(ms)) = (&view.best, &view.runner_up, view.runner_up_ms) {
        told.push(format!("after {best} comes {second}, {ms:.2} ms worse"));
    }
    let named = |name: &Option<String>| name.as_ref().filter(|name| **name != view.owner).cloned();
    let shown = [Some(view.owner.clone()), named(&view.best), named(&view.runner_up)];
    for name in shown.into_iter().flatten() {
        let Some(site) = view.candidates.iter().find(|candidate| candidate.site == name) else { continue };
        told.push(format!("at {name}: {:.2} ms, give or take {:.2}", site.total_ms, site.sd_ms));
        told.extend(site.terms.iter().map(term));
    }
    let known = view.candidates.iter().find(|candidate| candidate.site == view.owner);
    told.extend(known.into_iter().flat_map(|owner| &owner.legs).map(|leg| {
        let known = known_from(leg.sd_ms, &leg.source, leg.age_s);
        format!("  {:.2} ms to ingress {}: {known}", leg.ms, leg.ingress)
    }));
    if view.estimates_tested > 0 {
        told.push(format!(
            "of {} ways that were measured after they had been estimated {} were within two standard deviations (95 of 100 would \
             be honest)",
            view.estimates_tested, view.estimates_held
        ));
    }
    told
}

fn term(term: &TermView) -> String {
    let way = match term.term.as_str() {
        "access" => "clients to their ingress",
        "inside" => "ingress to site",
        "server" => "site to servers (half counts)",
        "return" => "servers over their ingress to site (half counts)",
        "queue" => "waiting at the site",
        other => other,
    };
    format!("  {:.2} ms {way}: {}", term.ms, known_from(term.sd_ms, &term.source, term.age_s))
}

/// How sure, from where, and how old.
fn known_from(sd_ms: f64, source: &str, age_s: Option<f64>) -> String {
    let age = age_s.map_or(String::new(), |age| format!(" {age:.0} s ago"));
    format!("{source}{age}, give or take {sd_ms:.2} ms")
}

/// All pages, up to a limit.
async fn pages(
    context: &Context,
    site: Option<String>,
    service: Option<String>,
    limit: Option<u64>,
) -> Result<Vec<Value>, Failure> {
    /// Groups of a page; the API gives no more.
    const PAGE: u64 = 10_000;
    let mut groups: Vec<Value> = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let left = limit.map_or(PAGE, |limit| limit.saturating_sub(groups.len() as u64).min(PAGE));
        let ask = Ask::get(&["groups"])
            .query("site", site.as_ref())
            .query("service", service.as_ref())
            .query("limit", Some(left))
            .query("cursor", cursor.as_ref());
        let mut answer = context.client.send(ask).await?;
        cursor = answer.parse::<Groups>()?.next;
        if let Some(page) = answer.body["groups"].as_array_mut() {
            groups.append(page);
        }
        if cursor.is_none() || limit.is_some_and(|limit| groups.len() as u64 >= limit) {
            return Ok(groups);
        }
    }
}

fn rows(groups: &[GroupView]) -> Rows {
    let row = |group: &GroupView| {
        vec![
            group.group.clone(),
            group.service.clone(),
            group.owner.clone(),
            or_dash(group.standby.as_ref()),
            group.epoch.to_string(),
            or_dash(group.move_id),
        ]
    };
    let heads = &["GROUP", "SERVICE", "OWNER", "STANDBY", "EPOCH", "MOVE"];
    Rows { heads, rows: groups.iter().map(row).collect() }
}

fn candidates(explanation: &ExplanationView) -> Rows {
    let ms = |value: f64| format!("{value:.2}");
    let row = |candidate: &CandidateView| {
        let note = if candidate.site == explanation.owner {
            "owner".to_owned()
        } else if Some(&candidate.site) == explanation.best.as_ref() {
            format!("best: gains {} ms, {} ms wanted", ms(explanation.gain_ms), ms(explanation.min_gain_ms))
        } else {
            String::new()
        };
        vec![
            candidate.site.clone(),
            ms(candidate.total_ms),
            ms(candidate.sd_ms),
            ms(candidate.access_ms),
            ms(candidate.inside_ms),
            ms(candidate.outside_ms),
            ms(candidate.queue_ms),
            ms(candidate.rules_ms),
            ms(candidate.doubt_ms),
            ms(candidate.price_ms),
            format!("{:.0}%", candidate.fill * 100.0),
            or_dash(candidate.blocked.as_ref()),
            note,
        ]
    };
    Rows {
        heads: &[
            "SITE",
            "TOTAL-MS",
            "SD-MS",
            "ACCESS-MS",
            "INSIDE-MS",
            "OUTSIDE-MS",
            "QUEUE-MS",
            "RULES-MS",
            "DOUBT-MS",
            "PRICE-MS",
            "FILL",
            "BLOCKED",
            "NOTE",
        ],
        rows: explanation.candidates.iter().map(row).collect(),
    }
}
