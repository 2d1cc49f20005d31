//! `limosa placement`.

use clap::Subcommand;

use super::client::Ask;
use super::output::{Format, Rows, progress};
use super::{Context, Exit, Failure};
use crate::placement::api::assess::{AssessmentView, SiteAssessmentView};

/// What can be asked of the placement as a whole.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show how far the present placement is from the best, with a bound that proves it, and what more capacity would
    /// bring at each site. Exit code 6 if demand does not fit.
    Status,
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    let Verb::Status = verb;
    let answer = context.client.send(Ask::get(&["placement"])).await?;
    let view: AssessmentView = answer.parse()?;
    let heads = &["SITE", "PACKETS/S", "BEST", "ROOM", "PRICE-MS"];
    context.output.print(&answer.body, &Rows { heads, rows: view.sites.iter().map(row).collect() });
    if context.output.format == Format::Table {
        progress(&summary(&view));
    }
    match view.shortages.first() {
        None => Ok(Exit::Done),
        Some(short) => Err(Failure::new(
            Exit::Degraded,
            format!(
                "{} groups can only be at {}, which have not the room: add capacity or lower the headroom",
                short.groups.len(),
                short.sites.join(", ")
            ),
        )),
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
    let gap = view.gap.map_or("demand does not fit".to_owned(), |gap| format!("gap {:.3} %", gap * 100.0));
    format!(
        "mean delay {:.2} ms now, {:.2} at best after {} moves ({gap}); bound {:.2}, without capacities {:.2}, light {:.2}",
        view.delay_ms, view.best_ms, view.moves, view.bound_ms, view.unconstrained_ms, view.light_ms
    )
}
