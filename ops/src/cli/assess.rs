//! `limosa placement`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::client::Ask;
use super::output::{Format, Rows, progress};
use super::policy::{by_rules, what_if};
use super::{Context, Exit, Failure, duration, read_object, replay};
use crate::placement::api::assess::{AssessmentView, PricesView, RoundView, SiteAssessmentView};
use crate::placement::api::policy::Simulation;
use crate::placement::api::view::Sites;
use crate::placement::api::whatif::{DelaysView, WhatIfView};

/// What can be asked of the placement as a whole.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show how far the present placement is from the best, with a bound that proves it, and what more capacity would
    /// bring at each site. Exit code 6 if no placement within the capacities was found, or groups with traffic may be at no site.
    Status,
    /// Show what the leader's last round planned, its proof, and what more of each resource is worth at each site.
    Round,
    /// Show why a group is where it is: all sites, the terms of their delay and where these are known from, what stands
    /// against each, and what it lacks to the best.
    Explain {
        /// A group, a client's address, an outside ADDRESS:PORT, or PROTOCOL,ADDRESS:PORT,ADDRESS:PORT.
        target: String,
    },
    /// Show what the loss of each site would bring: whether its groups have room elsewhere when the headroom is used, and the
    /// delay then. Exit code 6 if there is a site whose loss does not fit.
    Losses,
    /// Show what another policy, other capacities, a new or a lost site, or more traffic would bring. Changes nothing. Exit code
    /// 6 if it would not fit, or leave groups no site.
    Simulate {
        /// Policy, as for `policy plan`.
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// A site that is new, or known and described otherwise, as for the API: id, name, capacity_pps, latitude, longitude. May
        /// be repeated.
        #[arg(long, value_name = "FILE")]
        site: Vec<PathBuf>,
        /// A site that is lost. May be repeated.
        #[arg(long, value_name = "NAME")]
        lost: Vec<String>,
        /// All traffic times this.
        #[arg(long, value_name = "FACTOR")]
        demand: Option<f64>,
        /// Play what `placement record` wrote, as it was and with what is different, hour by hour. Needs no cluster.
        #[arg(long, value_name = "FILE")]
        replay: Option<PathBuf>,
        /// Play a day that is made of the traffic of now, or of the first moment of --replay: it follows the sun, and clients
        /// roam.
        #[arg(long)]
        day: bool,
        /// Hours of that day, 1 to 744.
        #[arg(long, default_value_t = 24, requires = "day", value_parser = clap::value_parser!(u64).range(1..=744))]
        hours: u64,
        /// Same seed, same day.
        #[arg(long, default_value_t = 1, requires = "day")]
        seed: u64,
    },
    /// Write down what sites report, for `simulate --replay`: one line of JSON per moment, the first with the state.
    Record {
        /// A file that is not there yet.
        file: PathBuf,
        /// Between two moments, at least 1s.
        #[arg(long, value_parser = duration, default_value = "60s")]
        every: Duration,
        /// How long, at most 744h.
        #[arg(long = "for", value_parser = duration, default_value = "24h")]
        lasts: Duration,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    match verb {
        Verb::Status => status(context).await,
        Verb::Round => round(context).await,
        Verb::Explain { target } => super::group::explain(context, target).await,
        Verb::Losses => losses(context).await,
        Verb::Record { file, every, lasts } => replay::record(context, &file, every, lasts).await,
        Verb::Simulate { policy, site, lost, demand, replay: file, day, hours, seed }
            if day || file.is_some() =>
        {
            let changes = replay::Changes { policy, sites: site, lost, demand };
            match file.as_deref() {
                Some(file) if !day => replay::replay(context, file, &changes),
                file => replay::day(context, file, hours, seed, &changes).await,
            }
        }
        Verb::Simulate { policy, site, lost, demand, .. } => {
            let policy = policy.map(|file| read_object(&file)).transpose()?;
            let sites = site.iter().map(|file| read_object(file)).collect::<Result<_, _>>()?;
            let wish = Simulation { policy, sites, lost, demand };
            let body = serde_json::to_value(&wish).map_err(|error| Failure::usage(error.to_string()))?;
            let answer = context.client.send(Ask::post(&["placement", "simulate"], Some(body))).await?;
            let view: WhatIfView = answer.parse()?;
            what_if(context, &answer.body, &view);
            misfits_then(&view).map_or(Ok(Exit::Done), |why| Err(Failure::new(Exit::Degraded, why)))
        }
    }
}

/// One simulation per site. Headroom is there for this, so it is used.
async fn losses(context: &Context) -> Result<Exit, Failure> {
    let sites: Sites = context.client.send(Ask::get(&["sites"])).await?.parse()?;
    let mut policy = context.client.send(Ask::get(&["policy"])).await?.body;
    policy["headroom"] = 0.into();
    let (mut rows, mut bodies, mut short) = (Vec::new(), serde_json::Map::new(), Vec::new());
    for name in sites.sites.into_iter().map(|status| status.site.name) {
        let wish =
            Simulation { policy: Some(policy.clone()), lost: vec![name.clone()], ..Simulation::default() };
        let body = serde_json::to_value(&wish).map_err(|error| Failure::usage(error.to_string()))?;
        let answer = context.client.send(Ask::post(&["placement", "simulate"], Some(body))).await?;
        let view: WhatIfView = answer.parse()?;
        let ms = |delays: DelaysView| format!("{:.2}", delays.mean_ms);
        let mut row = vec![name.clone(), view.moves.to_string(), ms(view.before), ms(view.after)];
        row.push(if view.exceeded.is_empty() { "-".to_owned() } else { view.exceeded.join(", ") });
        row.push(view.stranded.len().to_string());
        rows.push(row);
        if view.gap.is_none() || !view.stranded.is_empty() {
            short.push(name.clone());
        }
        bodies.insert(name, answer.body);
    }
    let heads = &["LOST", "MOVES", "MEAN-MS", "THEN", "BEYOND-ROOM", "STRANDED"];
    context.output.print(&serde_json::Value::Object(bodies), &Rows { heads, rows });
    if short.is_empty() {
        return Ok(Exit::Done);
    }
    let message = format!("the loss of {} does not fit: add capacity, or change the rules", short.join(", "));
    Err(Failure::new(Exit::Degraded, message))
}

async fn round(context: &Context) -> Result<Exit, Failure> {
    let answer = context.client.send(Ask::get(&["placement", "round"])).await?;
    let view: RoundView = answer.parse()?;
    let heads = &["SITE", "OPEN", "PACKET/S", "FLOW", "BIT/S"];
    let row = |price: &PricesView| {
        let values = [price.packets, price.flows, price.bits].map(|value| format!("{value:.3}"));
        [price.site.clone(), if price.open { "yes" } else { "no" }.to_owned()]
            .into_iter()
            .chain(values)
            .collect()
    };
    context.output.print(&answer.body, &Rows { heads, rows: view.prices.iter().map(row).collect() });
    if context.output.format == Format::Table {
        progress(&format!(
            "{} of {} groups looked at anew in {:.1} ms: mean delay {:.2} ms, {:.2} planned by {} moves ({} started); objective {:.2}, bound {:.2}{}",
            view.touched,
            view.groups,
            view.solve_us as f64 / 1e3,
            view.delay_ms,
            view.planned_ms,
            view.moves,
            view.started,
            view.objective_ms,
            view.bound_ms,
            if view.exceeded.is_empty() {
                String::new()
            } else {
                format!("; beyond its room: {}", view.exceeded.join(", "))
            },
        ));
        if view.unprotected > 0 {
            progress(&format!(
                "{} groups are to have a standby and have none: nowhere is room for them when their failure domain is lost",
                view.unprotected
            ));
        }
        if view.vain > 0 {
            progress(&format!(
                "{} moves of the last hour were in vain: they brought groups back to where they had been within an hour before",
                view.vain
            ));
        }
        match &view.check {
            Some(check) => progress(&format!(
                "checked by a node that does not lead: bound {:.2} ms by its own knowledge, {} (largest difference {:.1} %)",
                check.bound_ms,
                if check.agrees { "which agrees" } else { "WHICH DOES NOT AGREE" },
                check.deviation * 100.0
            )),
            None => progress("not checked by the node that answered: it leads, or has not heard enough yet"),
        }
    }
    Ok(Exit::Done)
}

async fn status(context: &Context) -> Result<Exit, Failure> {
    let answer = context.client.send(Ask::get(&["placement"])).await?;
    let view: AssessmentView = answer.parse()?;
    let heads = &["SITE", "PACKETS/S", "BEST", "ROOM", "PRICE-MS"];
    context.output.print(&answer.body, &Rows { heads, rows: view.sites.iter().map(row).collect() });
    if context.output.format == Format::Table {
        progress(&summary(&view));
        view.misplaced.iter().for_each(|one| progress(&format!("limosa: {}", one.what)));
    }
    if view.stranded > 0 {
        let message = format!(
            "{} groups with traffic may be at no site, and are in no mean: undrain, activate or add a site, or change the rules \
             (`limosa placement explain GROUP` says what is against each site)",
            view.stranded
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    if view.gap.is_some() {
        return Ok(Exit::Done);
    }
    Err(Failure::new(Exit::Degraded, misfit(&view)))
}

/// Why what was asked about does not fit, if it does not.
fn misfits_then(view: &WhatIfView) -> Option<String> {
    if !view.stranded.is_empty() {
        return Some(format!(
            "{} groups would have no site, and are in no mean: add a site, or change the rules",
            view.stranded.len()
        ));
    }
    let sites = view.exceeded.join(", ");
    view.gap.is_none().then(|| format!("it does not fit: {sites} would carry more than their room"))
}

/// Why the best that was found exceeds capacities.
fn misfit(view: &AssessmentView) -> String {
    let remedy = "add capacity or lower the headroom";
    match view.shortages.first() {
        Some(short) if short.groups.len() == 1 => {
            let (group, sites) = (&short.groups[0], short.sites.join(", "));
            format!(
                "group {group} is larger than each of the sites that it may be at, {sites}: split it, or {remedy}"
            )
        }
        Some(short) => {
            let (groups, sites) = (short.groups.len(), short.sites.join(", "));
            format!("{groups} groups can only be at {sites}, which have not the room: {remedy}")
        }
        None => format!(
            "no placement within the capacities was found, which is no proof that there is none: {remedy}"
        ),
    }
}

fn row(site: &SiteAssessmentView) -> Vec<String> {
    let whole = |value: f64| format!("{value:.0}");
    vec![
        site.site.clone(),
        whole(site.packets_per_s),
        whole(site.best_packets_per_s),
        whole(site.room_packets_per_s),
        format!("{:.2}", site.price_ms),
    ]
}

fn summary(view: &AssessmentView) -> String {
    let gap = view.gap.map_or("beyond capacities".to_owned(), |gap| format!("gap {:.3} %", gap * 100.0));
    if view.groups == 0 {
        return "no traffic is known of groups that a site may have".to_owned();
    }
    let over = view.sites.iter().filter(|site| site.packets_per_s > site.room_packets_per_s * 1.001);
    let over: Vec<&str> = over.map(|site| site.site.as_str()).collect();
    let over =
        if over.is_empty() { String::new() } else { format!("; now beyond its room: {}", over.join(", ")) };
    format!(
        "mean delay {:.2} ms now{}, {:.2}{} at best after {} moves ({gap}); bound {:.2}, without capacities {:.2}, light {:.2}{over}",
        view.delay_ms,
        by_rules(view.rules_ms),
        view.best_ms,
        by_rules(view.best_rules_ms),
        view.moves,
        view.bound_ms,
        view.unconstrained_ms,
        view.light_ms
    )
}
