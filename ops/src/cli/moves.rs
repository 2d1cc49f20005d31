//! `limosa move`.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::client::{Answer, Ask};
use super::output::{Rows, or_dash, progress};
use super::site::passes;
use super::{Context, Exit, Failure, duration};
use crate::placement::api::view::{MoveState, MoveView, Moves, StartedMove, StartedMoves};

/// Between two looks at a move.
const LOOK: Duration = Duration::from_millis(200);
/// Moves that are looked at when none is named: more than can be in hand.
const WATCHED_MAX: u32 = 10_000;

/// What can be done with moves.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Start moves: all or, if one is refused, none.
    Start {
        /// SERVICE:PREFIX, for example 1:100.64.3.0/24.
        #[arg(required = true)]
        groups: Vec<String>,
        /// The site.
        #[arg(long, value_name = "SITE")]
        to: String,
    },
    /// Show moves in hand, then those that ended; newest first.
    List {
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Show one move.
    Get {
        /// Its number.
        id: u64,
    },
    /// Print the phases of a move until it ends; of all in hand if none is named.
    Watch {
        /// Its number.
        id: Option<u64>,
        /// Longest wait.
        #[arg(long, value_parser = duration, default_value = "10m")]
        deadline: Duration,
    },
    /// Abort a move that is still preparing.
    Abort {
        /// Its number.
        id: u64,
    },
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    match verb {
        Verb::Start { groups, to } => {
            let moves: Vec<_> = groups.iter().map(|group| json!({ "group": group, "to": to })).collect();
            let answer = context.client.send(Ask::post(&["moves"], Some(json!({ "moves": moves })))).await?;
            let started: StartedMoves = answer.parse()?;
            context.output.print(&answer.body, &started_rows(&started.moves));
        }
        Verb::List { limit } => {
            let answer = context.client.send(Ask::get(&["moves"]).query("limit", Some(limit))).await?;
            let moves: Moves = answer.parse()?;
            context.output.print(&answer.body, &rows(&moves.moves));
        }
        Verb::Get { id } => show(context, &get(context, id).await?)?,
        Verb::Abort { id } => {
            show(context, &context.client.send(Ask::delete(&["moves", &id.to_string()])).await?)?;
        }
        Verb::Watch { id, deadline } => {
            let watch = Watch { context, seen: BTreeMap::new() };
            let watch = tokio::time::timeout(deadline, watch.run(id)).await;
            return watch.unwrap_or_else(|_| {
                let message =
                    format!("nothing has ended after {deadline:?}; the move goes on: watch it again");
                Err(Failure::new(Exit::Timeout, message))
            });
        }
    }
    Ok(Exit::Done)
}

async fn get(context: &Context, id: u64) -> Result<Answer, Failure> {
    context.client.send(Ask::get(&["moves", &id.to_string()])).await
}

fn show(context: &Context, answer: &Answer) -> Result<(), Failure> {
    context.output.print(&answer.body, &rows(&[answer.parse()?]));
    Ok(())
}

fn rows(moves: &[MoveView]) -> Rows {
    let row = |view: &MoveView| {
        vec![
            view.id.to_string(),
            view.group.clone(),
            view.from.clone(),
            view.to.clone(),
            view.state.as_str().to_owned(),
            or_dash(view.summary.map(|summary| summary.flows)),
            or_dash(view.summary.map(|summary| summary.hold.us_max)),
            or_dash(view.abort_reason.as_ref()),
        ]
    };
    Rows {
        heads: &["ID", "GROUP", "FROM", "TO", "STATE", "FLOWS", "HOLD-US", "WHY"],
        rows: moves.iter().map(row).collect(),
    }
}

fn started_rows(started: &[StartedMove]) -> Rows {
    let row = |one: &StartedMove| {
        let note = if one.move_id.is_some() { "started" } else { "there already" };
        vec![or_dash(one.move_id), one.group.clone(), note.to_owned()]
    };
    Rows { heads: &["ID", "GROUP", "NOTE"], rows: started.iter().map(row).collect() }
}

/// What was printed of each move.
struct Watch<'a> {
    context: &'a Context,
    seen: BTreeMap<u64, MoveState>,
}

impl Watch<'_> {
    /// Until the named move ends, or until none is in hand.
    async fn run(mut self, id: Option<u64>) -> Result<Exit, Failure> {
        loop {
            let ended = match id {
                Some(id) => self.look_at(id).await,
                None => self.look_at_all().await,
            };
            match ended {
                Ok(true) => return Ok(self.exit()),
                Ok(false) => {}
                Err(failure) if passes(&failure) && !self.seen.is_empty() => {
                    progress(&format!("{}; trying on", failure.message));
                }
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look_at(&mut self, id: u64) -> Result<bool, Failure> {
        let view: MoveView = get(self.context, id).await?.parse()?;
        self.print(&view);
        Ok(view.state.is_end())
    }

    async fn look_at_all(&mut self) -> Result<bool, Failure> {
        let ask =
            Ask::get(&["moves"]).query("limit", Some(WATCHED_MAX)).query("consistency", Some("linearizable"));
        let moves: Moves = self.context.client.send(ask).await?.parse()?;
        // Those that had ended before are no news.
        for view in moves.moves.iter().rev() {
            if !view.state.is_end() || self.seen.contains_key(&view.id) {
                self.print(view);
            }
        }
        Ok(moves.moves.iter().all(|view| view.state.is_end()))
    }

    fn print(&mut self, view: &MoveView) {
        if self.seen.insert(view.id, view.state) == Some(view.state) {
            return;
        }
        let mut text =
            format!("{} {} {} -> {} {}", view.id, view.group, view.from, view.to, view.state.as_str());
        if let Some(reason) = &view.abort_reason {
            text.push_str(&format!(": {reason}"));
        }
        let event = serde_json::to_value(view).unwrap_or_default();
        self.context.output.print_event(&event, &view.id.to_string(), &text);
    }

    fn exit(&self) -> Exit {
        let done = self.seen.values().all(|state| *state == MoveState::Done);
        if done { Exit::Done } else { Exit::Degraded }
    }
}
