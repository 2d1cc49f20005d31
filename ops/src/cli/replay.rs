//! `limosa placement record` and `limosa placement simulate --replay`: traffic is written down, and played again with another
//! policy, other capacities or other sites. Playing needs no cluster.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flow::Micros;
use placement::core::replay::{Day, Replay, Step, Summary, summary};
use placement::core::{Admin, Cluster, Command, SiteReport};
use serde_json::{Value, json};

use super::client::Ask;
use super::output::{Format, Rows, progress};
use super::policy::by_rules;
use super::{Context, Exit, Failure, read_object};
use crate::placement::api::policy::{completed, resolve};
use crate::placement::api::traffic::TrafficView;

/// Moments in one record: a month of minutes.
const MOMENTS_MAX: usize = 50_000;
/// Longest record or day.
const HOURS_MAX: u64 = 24 * 31;

/// What is to be different from what was.
pub(super) struct Changes {
    pub(super) policy: Option<PathBuf>,
    pub(super) sites: Vec<PathBuf>,
    pub(super) lost: Vec<String>,
    pub(super) demand: Option<f64>,
}

/// Writes moments to a file, one line of JSON each, the first with the state.
pub(super) async fn record(
    context: &Context,
    file: &Path,
    every: Duration,
    lasts: Duration,
) -> Result<Exit, Failure> {
    if every < Duration::from_secs(1) || lasts > Duration::from_secs(HOURS_MAX * 3600) {
        return Err(Failure::usage(format!(
            "--every is {every:?} and --for {lasts:?}: give at least 1s and at most {HOURS_MAX}h"
        )));
    }
    let failed =
        |error: std::io::Error| Failure::usage(format!("{}: cannot be written: {error}", file.display()));
    let mut out = File::create_new(file).map_err(failed)?;
    let moments = (lasts.as_secs_f64() / every.as_secs_f64()) as usize + 1;
    let mut written = 0;
    let mut pause = tokio::time::interval(every);
    for moment in 0..moments.min(MOMENTS_MAX) {
        pause.tick().await;
        let state = (written == 0).then_some("true");
        match context.client.send(Ask::get(&["placement", "traffic"]).query("state", state)).await {
            Ok(answer) => {
                writeln!(out, "{}", answer.body).and_then(|()| out.flush()).map_err(failed)?;
                written += 1;
            }
            // A cluster between two leaders is no reason to lose a day.
            Err(failure) if written > 0 => {
                progress(&format!("moment {moment} is missing: {}", failure.message))
            }
            Err(failure) => return Err(failure),
        }
    }
    progress(&format!("{}: {written} moments", file.display()));
    Ok(Exit::Done)
}

/// Moments of a file.
fn read(file: &Path) -> Result<(Cluster, Vec<TrafficView>), Failure> {
    let wrong = |line: usize, error: String| Failure::usage(format!("{}:{line}: {error}", file.display()));
    let open = File::open(file).map_err(|error| wrong(0, format!("cannot be read: {error}")))?;
    let mut moments: Vec<TrafficView> = Vec::new();
    for (n, line) in BufReader::new(open).lines().enumerate() {
        if n == MOMENTS_MAX {
            return Err(wrong(n + 1, format!("more than {MOMENTS_MAX} moments: cut the file")));
        }
        let line = line.map_err(|error| wrong(n + 1, error.to_string()))?;
        moments.push(serde_json::from_str(&line).map_err(|error| wrong(n + 1, error.to_string()))?);
    }
    let state = moments.first_mut().and_then(|first| first.state.take());
    let state = state
        .ok_or_else(|| wrong(1, "no state: the first line of `limosa placement record` has it".into()))?;
    let cluster = serde_json::from_value(state).map_err(|error| wrong(1, format!("state: {error}")))?;
    Ok((cluster, moments))
}

/// Plays a record twice, as it was and with what is different.
pub(super) fn replay(context: &Context, file: &Path, changes: &Changes) -> Result<Exit, Failure> {
    let (cluster, moments) = read(file)?;
    let start = moments.first().map_or(0, |moment| moment.at_ms);
    let timed = |moment: &TrafficView| {
        let at = Micros::from_millis(moment.at_ms.saturating_sub(start));
        (at, moment.reports.clone())
    };
    compare(context, &cluster, &moments.iter().map(timed).collect::<Vec<_>>(), changes)
}

/// Plays a day that is made of the traffic of now, or of the first moment of a record.
pub(super) async fn day(
    context: &Context,
    file: Option<&Path>,
    hours: u64,
    seed: u64,
    changes: &Changes,
) -> Result<Exit, Failure> {
    /// Steps of an hour.
    const STEPS: u64 = 4;
    let (cluster, first) = match file {
        Some(file) => {
            let (cluster, moments) = read(file)?;
            (cluster, moments.into_iter().next().unwrap_or_default())
        }
        None => {
            let answer =
                context.client.send(Ask::get(&["placement", "traffic"]).query("state", Some("true"))).await?;
            let mut view: TrafficView = answer.parse()?;
            let state = view.state.take().unwrap_or_default();
            let cluster = serde_json::from_value(state);
            (cluster.map_err(|error| Failure::new(Exit::Error, format!("state: {error}")))?, view)
        }
    };
    let mut day = Day::new(first.reports, &cluster, seed);
    let step =
        |n: u64| (Micros(n * 3_600_000_000 / STEPS), day.at(n as f64 / STEPS as f64, 1.0 / STEPS as f64));
    let moments: Vec<_> = (0..hours.min(HOURS_MAX) * STEPS).map(step).collect();
    compare(context, &cluster, &moments, changes)
}

type Moment = (Micros, Vec<SiteReport>);

fn compare(
    context: &Context,
    cluster: &Cluster,
    moments: &[Moment],
    changes: &Changes,
) -> Result<Exit, Failure> {
    let before = play(Replay::new(cluster.clone(), None), moments, 1.0)?;
    let changed = changed(cluster, changes)?;
    let differs = changed.is_some();
    let after = match changed {
        Some(replay) => play(replay, moments, changes.demand.unwrap_or(1.0))?,
        None => Vec::new(),
    };
    let name = |site: flow::SiteId| {
        let known = cluster.sites.get(&site).map(|site| site.name.clone());
        known.unwrap_or_else(|| format!("site {site}"))
    };
    let mut json =
        json!({ "before": { "steps": shown(&before, &name), "summary": told(&summary(&before), &name) } });
    if differs {
        json["after"] = json!({ "steps": shown(&after, &name), "summary": told(&summary(&after), &name) });
    }
    let heads = &[
        "HOUR",
        "PACKETS/S",
        "MS",
        "BOUND",
        "MOVES",
        "BEYOND",
        "MS-THEN",
        "BOUND-THEN",
        "MOVES-THEN",
        "BEYOND-THEN",
    ];
    let rows = hours(&before).into_iter().enumerate().map(|(n, mut row)| {
        row.insert(0, n.to_string());
        let then = hours(&after).into_iter().nth(n);
        row.extend(then.map_or(vec!["-".to_owned(); 4], |then| then[1..].to_vec()));
        row
    });
    context.output.print(&json, &Rows { heads, rows: rows.collect() });
    if context.output.format == Format::Table {
        progress(&format!("as it was: {}", line(&summary(&before), &name)));
        if differs {
            progress(&format!("with the change: {}", line(&summary(&after), &name)));
        }
    }
    let asked = summary(if differs { &after } else { &before });
    if asked.stranded == 0 {
        return Ok(Exit::Done);
    }
    let message = format!(
        "in {} of {} moments there are groups that no site may have, which are in no mean: add a site, or change the rules",
        asked.stranded,
        moments.len()
    );
    Err(Failure::new(Exit::Degraded, message))
}

/// A leader of the state with what is different; nothing if nothing is.
fn changed(cluster: &Cluster, changes: &Changes) -> Result<Option<Replay>, Failure> {
    let Changes { policy, sites, lost, demand } = changes;
    if policy.is_none() && sites.is_empty() && lost.is_empty() && demand.is_none() {
        return Ok(None);
    }
    if let Some(demand) = demand.filter(|demand| !(*demand > 0.0 && *demand <= 1000.0)) {
        return Err(Failure::usage(format!("--demand is {demand}: give above 0 to 1000")));
    }
    let mut replay = Replay::new(cluster.clone(), None);
    let refused = |error: placement::core::Rejected| Failure::usage(error.to_string());
    let mut specs = Vec::new();
    for file in sites {
        let spec = completed(read_object(file)?, cluster, &specs)
            .map_err(|problem| Failure::usage(format!("{}: {}", file.display(), problem.detail())))?;
        replay.command(Command::PutSite(spec.clone())).map_err(refused)?;
        replay.command(Command::SetAlive { site: spec.id, alive: true }).map_err(refused)?;
        specs.push(spec);
    }
    if let Some(file) = policy {
        let policy = resolve(read_object(file)?, replay.cluster())
            .map_err(|problem| Failure::usage(format!("{}: {}", file.display(), problem.detail())))?;
        let expected_version = replay.cluster().policy_version;
        replay
            .command(Command::PutPolicy { policy, expected_version, confirm_within_ms: None })
            .map_err(refused)?;
    }
    for name in lost {
        let site = replay.cluster().site_named(name).map(|site| site.id);
        let site =
            site.ok_or_else(|| Failure::new(Exit::NotFound, format!("no site {name:?} in the record")))?;
        // What a dead site has stays there; a site that is taken away has been emptied before.
        replay.command(Command::SetAdmin { site, admin: Admin::Draining }).map_err(refused)?;
    }
    Ok(Some(replay))
}

fn play(mut replay: Replay, moments: &[Moment], demand: f64) -> Result<Vec<Step>, Failure> {
    let mut steps = Vec::with_capacity(moments.len());
    for (at, reports) in moments {
        let mut reports = reports.clone();
        for group in reports.iter_mut().flat_map(|report| &mut report.groups) {
            let scaled = |value: u64| (value as f64 * demand) as u64;
            group.packets_per_s = scaled(group.packets_per_s);
            group.flows = scaled(group.flows);
            group.bits_per_s = scaled(group.bits_per_s);
        }
        // The first moment has time to settle in: leaders wait a lease before they judge.
        let at = at.plus(Micros::from_secs(10));
        let step = replay.step(at, &reports, &BTreeSet::new());
        steps.push(step.map_err(|error| Failure::usage(error.to_string()))?);
    }
    Ok(steps)
}

/// One row per hour: packets, delay, bound, moves, steps beyond capacity.
fn hours(steps: &[Step]) -> Vec<Vec<String>> {
    let hour = |step: &Step| step.at.0 / 3_600_000_000;
    steps
        .chunk_by(|a, b| hour(a) == hour(b))
        .map(|hour| {
            let sums = summary(hour);
            let packets = hour.iter().map(|step| step.packets_per_s).sum::<f64>() / hour.len() as f64;
            vec![
                format!("{packets:.0}"),
                format!("{:.2}", sums.delay_ms),
                format!("{:.2}", sums.bound_ms),
                sums.moves.to_string(),
                sums.beyond.to_string(),
            ]
        })
        .collect()
}

fn shown(steps: &[Step], name: &impl Fn(flow::SiteId) -> String) -> Vec<Value> {
    let step = |step: &Step| {
        json!({
            "at_s": step.at.0 / 1_000_000, "moves": step.moves, "returns": step.returns,
            "packets_per_s": step.packets_per_s, "delay_ms": step.delay_ms, "rules_ms": step.rules_ms,
            "bound_ms": step.bound_ms,
            "beyond": step.beyond.iter().map(|site| name(*site)).collect::<Vec<_>>(), "stranded": step.stranded,
        })
    };
    steps.iter().map(step).collect()
}

fn told(summary: &Summary, name: &impl Fn(flow::SiteId) -> String) -> Value {
    let price = |(site, ms): &(flow::SiteId, f64)| json!({ "site": name(*site), "price_ms": ms });
    json!({
        "hours": summary.hours, "moves": summary.moves, "returns": summary.returns, "delay_ms": summary.delay_ms,
        "rules_ms": summary.rules_ms, "bound_ms": summary.bound_ms, "beyond": summary.beyond, "stranded": summary.stranded,
        "prices": summary.prices.iter().map(price).collect::<Vec<_>>(),
    })
}

fn line(summary: &Summary, name: &impl Fn(flow::SiteId) -> String) -> String {
    let dearest = summary.prices.iter().take_while(|(_, price)| *price > 0.0).take(3);
    let build: Vec<String> =
        dearest.map(|(site, price)| format!("{} ({price:.2} ms)", name(*site))).collect();
    format!(
        "{:.2} ms mean{}, {:.2} at best, {} moves in {:.1} h ({} in vain), {} moments beyond capacity; more capacity is worth most at {}",
        summary.delay_ms,
        by_rules(summary.rules_ms),
        summary.bound_ms,
        summary.moves,
        summary.hours,
        summary.returns,
        summary.beyond,
        if build.is_empty() { "no site".to_owned() } else { build.join(", ") }
    )
}
