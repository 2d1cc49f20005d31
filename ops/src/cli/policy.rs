//! `limosa policy` and `limosa audit`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use placement::core::AuditEntry;
use serde_json::Value;

use super::client::{Answer, Ask};
use super::output::{Format, Rows, or_dash, progress};
use super::{Context, Exit, Failure, duration, read_object};
use crate::placement::api::policy::{PoliciesView, PolicyView};
use crate::placement::api::view::Audit;
use crate::placement::api::whatif::{DelaysView, LoadView, WhatIfView};

/// What can be done with the policy.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show the policy; with `-o name` its version only.
    Get,
    /// Show what a policy would bring: which groups would move and why, delay, load, and what binds. Changes nothing.
    Plan {
        /// TOML, or YAML or JSON if it ends so; - for standard input.
        file: PathBuf,
        /// Exit code 0 if no group would move, 2 if some would.
        #[arg(long)]
        detailed_exitcode: bool,
    },
    /// Replace the policy. Keys that the file lacks get their defaults.
    #[command(alias = "set")]
    Apply {
        /// TOML, or YAML or JSON if it ends so; - for standard input.
        file: PathBuf,
        /// The version that must still be in force; the present one if not given.
        #[arg(long, value_name = "VERSION")]
        if_match: Option<u64>,
        /// Only check.
        #[arg(long)]
        dry_run: bool,
        /// The former policy returns by itself after this time, 1 s to 24 h, unless `policy confirm` comes before.
        #[arg(long, value_parser = duration, value_name = "TIME")]
        confirm_within: Option<Duration>,
    },
    /// Keep the policy that is on trial.
    Confirm {
        /// Its version; the present one if not given.
        #[arg(long, value_name = "VERSION")]
        if_match: Option<u64>,
    },
    /// Show the policies that were in force, newest first.
    History,
    /// Show what is different between two versions: keys and rules that went (-) and came (+).
    Diff {
        /// The older one.
        from: u64,
        /// The newer one; the present one if not given.
        to: Option<u64>,
    },
    /// Put a policy that was in force again.
    Rollback {
        /// Its version.
        version: u64,
    },
}

/// What can be asked of the audit log.
#[derive(Clone, Debug, Subcommand)]
pub enum AuditVerb {
    /// Show who did what, newest first.
    List {
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    match verb {
        Verb::Get => show(context, &context.client.send(Ask::get(&["policy"])).await?),
        Verb::Plan { file, detailed_exitcode } => return plan(context, &file, detailed_exitcode).await,
        Verb::Apply { file, if_match, dry_run, confirm_within } => {
            let ask = Ask::put(&["policy"], read_object(&file)?)
                .query("dryRun", dry_run.then_some(true))
                .query("confirmWithin", confirm_within.map(|time| time.as_secs()))
                .if_match(tag(context, if_match).await?);
            show(context, &context.client.send(ask).await?);
        }
        Verb::Confirm { if_match } => {
            let ask = Ask::post(&["policy", "confirm"], None).if_match(tag(context, if_match).await?);
            show(context, &context.client.send(ask).await?);
        }
        Verb::History => history(context).await?,
        Verb::Diff { from, to } => diff(context, from, to).await?,
        Verb::Rollback { version } => {
            let former = kept(context, version).await?;
            let ask = Ask::put(&["policy"], former).if_match(tag(context, None).await?);
            show(context, &context.client.send(ask).await?);
        }
    }
    Ok(Exit::Done)
}

async fn tag(context: &Context, version: Option<u64>) -> Result<String, Failure> {
    match version {
        Some(version) => Ok(format!("\"{version}\"")),
        None => present_tag(context).await,
    }
}

async fn kept(context: &Context, version: u64) -> Result<Value, Failure> {
    Ok(context.client.send(Ask::get(&["policy", "history", &version.to_string()])).await?.body)
}

async fn plan(context: &Context, file: &Path, detailed: bool) -> Result<Exit, Failure> {
    let answer = context.client.send(Ask::post(&["policy", "plan"], Some(read_object(file)?))).await?;
    let view: WhatIfView = answer.parse()?;
    what_if(context, &answer.body, &view);
    Ok(if detailed && view.moves > 0 { Exit::Usage } else { Exit::Done })
}

async fn history(context: &Context) -> Result<(), Failure> {
    let answer = context.client.send(Ask::get(&["policy", "history"])).await?;
    let view: PoliciesView = answer.parse()?;
    let row = |kept: &PolicyView| {
        let present = kept.version == view.version;
        let note = match view.on_trial_until_ms.filter(|_| present) {
            Some(until_ms) => format!("in force, on trial until {}", utc(until_ms)),
            None => if present { "in force" } else { "" }.to_owned(),
        };
        vec![kept.version.to_string(), utc(kept.at_ms), kept.actor.clone(), kept.rules.to_string(), note]
    };
    let heads = &["VERSION", "TIME", "ACTOR", "RULES", "NOTE"];
    context.output.print(&answer.body, &Rows { heads, rows: view.policies.iter().map(row).collect() });
    Ok(())
}

async fn diff(context: &Context, from: u64, to: Option<u64>) -> Result<(), Failure> {
    let older = kept(context, from).await?;
    let newer = match to {
        Some(to) => kept(context, to).await?,
        None => context.client.send(Ask::get(&["policy"])).await?.body,
    };
    let (older, newer) = (entries(&older), entries(&newer));
    let only = |sign: &str, of: &[Vec<String>], other: &[Vec<String>]| -> Vec<Vec<String>> {
        let lines = of.iter().filter(|line| !other.contains(line));
        lines.map(|line| std::iter::once(sign.to_owned()).chain(line.iter().cloned()).collect()).collect()
    };
    let (gone, came) = (only("-", &older, &newer), only("+", &newer, &older));
    let pairs = |lines: &[Vec<String>]| -> Value {
        lines.iter().map(|line| serde_json::json!({ "key": line[1], "value": line[2] })).collect()
    };
    let body = serde_json::json!({ "removed": pairs(&gone), "added": pairs(&came) });
    let rows = gone.into_iter().chain(came).collect();
    context.output.print(&body, &Rows { heads: &["", "KEY", "VALUE"], rows });
    Ok(())
}

/// A policy as lines of key and value.
fn entries(policy: &Value) -> Vec<Vec<String>> {
    policy.as_object().into_iter().flatten().flat_map(|(key, value)| lines(key, value)).collect()
}

async fn present_tag(context: &Context) -> Result<String, Failure> {
    let answer = context.client.send(Ask::get(&["policy"])).await?;
    answer.tag.ok_or_else(|| Failure::new(Exit::Error, "the node gave the policy without a version"))
}

fn show(context: &Context, answer: &Answer) {
    let version = answer.tag.as_deref().map_or("-", |tag| tag.trim_matches('"')).to_owned();
    let mut rows = vec![vec!["version".to_owned(), version.clone()]];
    if context.output.format == Format::Name {
        rows = vec![vec![version]];
    }
    for (key, value) in answer.body.as_object().into_iter().flatten() {
        if context.output.format == Format::Table {
            rows.extend(lines(key, value));
        }
    }
    context.output.print(&answer.body, &Rows { heads: &["KEY", "VALUE"], rows });
}

/// One line for a value, one per entry for rules and labels.
fn lines(key: &str, value: &Value) -> Vec<Vec<String>> {
    let line = |key: String, value: &Value| vec![key, value.to_string()];
    match (key, value) {
        ("rules", Value::Array(rules)) => rules.iter().map(rule_line).collect(),
        ("labels", Value::Object(labels)) => {
            labels.iter().map(|(name, prefixes)| line(format!("label {name}"), prefixes)).collect()
        }
        _ => vec![line(key.to_owned(), value)],
    }
}

/// A rule as its name, and its parts as they were written.
fn rule_line(rule: &Value) -> Vec<String> {
    let parts = rule.as_object().into_iter().flatten().filter(|(key, _)| *key != "name");
    let parts: Vec<String> = parts.map(|(key, value)| format!("{key} {value}")).collect();
    vec![format!("rule {}", rule["name"].as_str().unwrap_or("-")), parts.join(", ")]
}

/// What would be, for people: sites, then what moves, then what binds.
pub(super) fn what_if(context: &Context, body: &Value, view: &WhatIfView) {
    let whole = |value: f64| format!("{value:.0}");
    let row = |site: &LoadView| {
        let price = format!("{:.2}", site.price_ms);
        vec![site.site.clone(), whole(site.before), whole(site.after), whole(site.room), price]
    };
    let heads = &["SITE", "PACKETS/S", "THEN", "ROOM", "PRICE-MS"];
    context.output.print(body, &Rows { heads, rows: view.sites.iter().map(row).collect() });
    if context.output.format == Format::Table {
        told(view).iter().for_each(|line| progress(line));
    }
}

/// What prices of rules add to a mean delay, if they do.
pub(super) fn by_rules(ms: f64) -> String {
    if ms < 0.005 { String::new() } else { format!(" (and {ms:.2} by prices of rules)") }
}

/// The rest in sentences.
fn told(view: &WhatIfView) -> Vec<String> {
    /// Lines of a kind; `-o json` has all.
    const SHOWN: usize = 10;
    let delays = |delays: &DelaysView| {
        format!("mean {:.2} ms, p50 {:.2}, p95 {:.2}", delays.mean_ms, delays.p50_ms, delays.p95_ms)
    };
    let gap = view.gap.map_or("beyond capacities".to_owned(), |gap| format!("gap {:.3} %", gap * 100.0));
    let mut told = vec![
        format!("delay now:  {}{}", delays(&view.before), by_rules(view.before_rules_ms)),
        format!(
            "delay then: {}{}; bound {:.2} ({gap})",
            delays(&view.after),
            by_rules(view.after_rules_ms),
            view.bound_ms
        ),
        format!("{} of {} groups would move, with {} flows", view.moves, view.groups, view.flows),
    ];
    told.extend(view.moved.iter().take(SHOWN).map(|moved| {
        let why = moved.rule.as_ref().map_or(String::new(), |rule| format!(", by rule {rule}"));
        format!("  {} {} -> {}: {:+.2} ms{why}", moved.group, moved.from, moved.to, -moved.gain_ms)
    }));
    told.extend(view.regions.iter().map(|region| {
        let (before, after) = (region.before, region.after);
        format!(
            "clients at {}: p50 {:.2} -> {:.2} ms, p95 {:.2} -> {:.2}",
            region.ingress, before.p50_ms, after.p50_ms, before.p95_ms, after.p95_ms
        )
    }));
    told.extend(view.bindings.iter().take(SHOWN).map(|binding| {
        let why =
            binding.rule.as_ref().map_or("room or too little gain".to_owned(), |rule| format!("rule {rule}"));
        format!(
            "{why} keeps {} groups from {}: {:.2} ms of the mean",
            binding.groups, binding.site, binding.costs_ms
        )
    }));
    if view.unprotected > 0 {
        told.push(format!("{} groups would have no standby, for want of room", view.unprotected));
    }
    if !view.stranded.is_empty() {
        told.push(format!("no site may have: {}", view.stranded.join(", ")));
    }
    if !view.exceeded.is_empty() {
        told.push(format!("beyond its room: {}", view.exceeded.join(", ")));
    }
    told
}

pub(super) async fn audit(verb: AuditVerb, context: &Context) -> Result<Exit, Failure> {
    let AuditVerb::List { limit } = verb;
    let answer = context.client.send(Ask::get(&["audit"]).query("limit", Some(limit))).await?;
    let audit: Audit = answer.parse()?;
    let row = |entry: &AuditEntry| {
        vec![
            entry.index.to_string(),
            utc(entry.at_ms),
            entry.actor.clone(),
            entry.action.clone(),
            or_dash(entry.refused.as_ref()),
        ]
    };
    let heads = &["INDEX", "TIME", "ACTOR", "ACTION", "REFUSED"];
    context.output.print(&answer.body, &Rows { heads, rows: audit.entries.iter().map(row).collect() });
    Ok(Exit::Done)
}

/// A time in UTC, to the second.
fn utc(at_ms: u64) -> String {
    let seconds = i64::try_from(at_ms / 1_000).unwrap_or(0);
    let Ok(at) = time::OffsetDateTime::from_unix_timestamp(seconds) else { return at_ms.to_string() };
    let (date, time) = (at.date(), at.time());
    let (hour, minute, second) = time.as_hms();
    format!("{date}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_utc() {
        assert_eq!(utc(1_700_000_000_123), "2023-11-14T22:13:20Z");
    }
}
