//! `limosa policy` and `limosa audit`.

use std::path::PathBuf;

use clap::Subcommand;
use placement::core::AuditEntry;
use serde_json::Value;

use super::client::{Answer, Ask};
use super::output::{Format, Rows, or_dash};
use super::{Context, Exit, Failure, read_object};
use crate::placement::api::view::Audit;

/// What can be done with the policy.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show the policy; with `-o name` its version only.
    Get,
    /// Replace the policy. Keys that the file lacks get their defaults.
    Set {
        /// TOML, or JSON if it ends so; - for standard input.
        file: PathBuf,
        /// The version that must still be in force; the present one if not given.
        #[arg(long, value_name = "VERSION")]
        if_match: Option<u64>,
        /// Only check.
        #[arg(long)]
        dry_run: bool,
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
    let answer = match verb {
        Verb::Get => context.client.send(Ask::get(&["policy"])).await?,
        Verb::Set { file, if_match, dry_run } => {
            let body = read_object(&file)?;
            let tag = match if_match {
                Some(version) => format!("\"{version}\""),
                None => present_tag(context).await?,
            };
            let ask = Ask::put(&["policy"], body).query("dryRun", dry_run.then_some(true)).if_match(tag);
            context.client.send(ask).await?
        }
    };
    show(context, &answer);
    Ok(Exit::Done)
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

/// One line for a value, one per entry for a list of rules.
fn lines(key: &str, value: &Value) -> Vec<Vec<String>> {
    match value.as_array() {
        Some(rules) => rules.iter().map(|rule| vec![key.to_owned(), rule_text(rule)]).collect(),
        None => vec![vec![key.to_owned(), value.to_string()]],
    }
}

fn rule_text(rule: &Value) -> String {
    let clients = rule["clients"].as_str().unwrap_or("-");
    format!("{}:{clients} site {}", rule["service"], rule["site"])
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
