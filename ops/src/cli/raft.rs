//! `limosa raft`.

use clap::Subcommand;
use placement::node::{Member, RaftStatus};
use serde_json::{Map, json};

use super::client::{Answer, Ask};
use super::output::{Rows, or_dash, progress};
use super::{Context, Exit, Failure};
use crate::address::{Address, AddressError};

/// What can be done with the placement nodes.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Show the node that is asked, and whom it knows. Exit code 6 if no leader is known, no majority answered it
    /// lately, the node has stopped or is behind, or a node runs twice.
    Status,
    /// Make a new group of nodes. On one node, once.
    Initialize {
        /// ID=HOST:PORT of each first voter's QUIC.
        #[arg(required = true, value_parser = member)]
        members: Vec<(u64, Address)>,
    },
    /// Add a node and let it vote once it has caught up.
    Add {
        /// Its number, never used before.
        id: u64,
        /// HOST:PORT of its QUIC.
        address: Address,
        /// Let it follow without a vote.
        #[arg(long)]
        learner: bool,
    },
    /// Remove a node, voter or not. Its number is never used again.
    Remove {
        /// Its number.
        id: u64,
    },
    /// Hand the lead to another voter.
    TransferLeader {
        /// Its number.
        to: u64,
    },
    /// Take a snapshot of the state of the node that is asked.
    Snapshot,
}

fn member(text: &str) -> Result<(u64, Address), String> {
    let parts = text.split_once('=').and_then(|(id, address)| Some((id.parse().ok()?, address)));
    let (id, address) = parts
        .ok_or_else(|| format!("{text:?} is no member: write ID=HOST:PORT, for example 1=192.0.2.1:4001"))?;
    Ok((id, address.parse().map_err(|error: AddressError| error.to_string())?))
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<Exit, Failure> {
    let client = &context.client;
    let answer = match verb {
        Verb::Status => {
            let answer = client.send(Ask::get(&["raft"])).await?;
            return status(context, &answer);
        }
        Verb::Initialize { members } => {
            let members: Map<_, _> = members
                .into_iter()
                .map(|(id, address)| (id.to_string(), String::from(address).into()))
                .collect();
            client.send(Ask::post(&["raft", "initialize"], Some(json!({ "members": members })))).await?
        }
        Verb::Add { id, address, learner } => add(context, id, &address, learner).await?,
        Verb::Remove { id } => client.send(Ask::delete(&["raft", "members", &id.to_string()])).await?,
        Verb::TransferLeader { to } => {
            client.send(Ask::post(&["raft", "transfer-leader"], Some(json!({ "to": to })))).await?
        }
        Verb::Snapshot => client.send(Ask::post(&["raft", "snapshot"], None)).await?,
    };
    print(context, &answer, &answer.parse()?);
    Ok(Exit::Done)
}

/// First without a vote, so that a node that has nothing yet cannot hold up the others.
async fn add(context: &Context, id: u64, address: &Address, learner: bool) -> Result<Answer, Failure> {
    let body = json!({ "id": id, "address": address });
    let answer = context.client.send(Ask::post(&["raft", "learners"], Some(body))).await?;
    if learner {
        return Ok(answer);
    }
    progress(&format!("node {id} has caught up and gets its vote"));
    let status: RaftStatus = answer.parse()?;
    let present = status.members.iter().filter(|member| member.voter).map(|member| member.id);
    let voters: std::collections::BTreeSet<u64> = present.chain([id]).collect();
    context.client.send(Ask::put(&["raft", "members"], json!({ "voters": voters }))).await
}

fn status(context: &Context, answer: &Answer) -> Result<Exit, Failure> {
    let status: RaftStatus = answer.parse()?;
    print(context, answer, &status);
    if let Some(reason) = &status.stopped {
        let message = format!("node {} has stopped: {reason}", status.id);
        return Err(Failure::new(Exit::Degraded, message));
    }
    if !status.quorum && !status.members.is_empty() {
        let age = status.quorum_ack_ms.map_or("it knows of none since it started".into(), |ms| {
            format!("the last that it knows of is {:.1} s old", ms as f64 / 1e3)
        });
        let message = format!(
            "node {} knows no quorum: no majority of its members answered a leader within {:.1} s, {age}; see \
             that a majority runs and that they reach each other",
            status.id,
            status.quorum_age_max_ms as f64 / 1e3
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    if status.leader.is_none() {
        let message = format!(
            "node {} knows no leader: see that a majority of its members runs, or `limosa raft initialize`",
            status.id
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    if status.is_behind() {
        let message = format!(
            "node {} is behind: what the leader has committed has not come for {:.1} s; see the path from the leader to it",
            status.id,
            status.behind_ms as f64 / 1e3
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    if status.is_stuck() {
        let message = format!(
            "node {} waits for its disk: a write has been in hand for {:.1} s; see its disk, or end the process",
            status.id,
            status.write_ms as f64 / 1e3
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    let list = |nodes: &[u64]| nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    if !status.silent.is_empty() {
        let message = format!(
            "these members have not answered the leader for more than {:.1} s: {}; see that they run and that the leader reaches them, or \
             remove them for good (`limosa raft remove`)",
            status.quorum_age_max_ms as f64 / 1e3,
            list(&status.silent)
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    if !status.twice.is_empty() {
        let twice = list(&status.twice);
        let message = format!(
            "two processes run with the number of a placement node: {twice}; stop the one that was started with a copy of the directory"
        );
        return Err(Failure::new(Exit::Degraded, message));
    }
    Ok(Exit::Done)
}

fn print(context: &Context, answer: &Answer, status: &RaftStatus) {
    let row = |member: &Member| {
        let part = if Some(member.id) == status.leader {
            "leader"
        } else if member.voter {
            "voter"
        } else {
            "learner"
        };
        let silent = if status.silent.contains(&member.id) { " (silent)" } else { "" };
        let own = member.id == status.id;
        vec![
            member.id.to_string(),
            format!("{part}{silent}"),
            member.address.clone(),
            or_dash(member.matched.or(status.last_log.filter(|_| own))),
            or_dash(status.applied.filter(|_| own)),
            or_dash(own.then_some(status.term)),
        ]
    };
    let heads = &["NODE", "PART", "ADDRESS", "LOG", "APPLIED", "TERM"];
    context.output.print(&answer.body, &Rows { heads, rows: status.members.iter().map(row).collect() });
}
