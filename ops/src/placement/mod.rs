//! A placement node: Raft and agents over QUIC, the config API over HTTP.

pub mod api;
pub mod metrics;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use flow::Micros;
use placement::node::{Caller, Node, NodeConfig};
use tokio_util::sync::CancellationToken;
use transfer::name::{NodeName, Role};
use transfer::quic::{CALL_LEN_MAX, Connection, Frames, Limits, Listener, StreamKind};

use crate::config::{ELECTION_HEARTBEATS, PlacementConfig};
use crate::net::QuicTransport;
use crate::{files, keys};

/// How long a request may take to arrive once its stream is open.
const REQUEST_BOUND: Duration = Duration::from_secs(12);
/// Longest wait for a file of locations. The largest there are have some hundred megabytes, on a slow disk.
const LOCATIONS_BOUND: Duration = Duration::from_secs(30);
/// How long a peer may take to read an answer: it waits no longer for one itself.
const ANSWER_BOUND: Duration = Duration::from_secs(12);

fn node_name(config: &PlacementConfig) -> NodeName {
    NodeName::placement(&config.tls.cluster, config.id)
}

/// Whether a placement node could start with these files and this directory: all that can be told without taking anything.
///
/// # Errors
/// When it would not.
pub fn check(config: &PlacementConfig) -> anyhow::Result<()> {
    keys::read(&config.tls, &node_name(config))?;
    let id = config.id;
    let own = move |directory: &Path| Ok(placement::store::check_owner(directory, id));
    files::within(&config.directory, files::BOUND, own)??;
    if let Some(locations) = &config.locations {
        let usable = |file: &Path| Ok(placement::geo::check(file));
        files::within(locations, LOCATIONS_BOUND, usable)??;
    }
    Ok(())
}

/// Runs a placement node until the token is cancelled; then it hands the lead over, if it has it, and ends.
///
/// # Errors
/// When keys, addresses or the log cannot be had, and when the node has stopped for good, as when its disk failed:
/// whoever looks after the process may start it again.
pub async fn run(config: PlacementConfig, stop: CancellationToken) -> anyhow::Result<()> {
    let name = node_name(&config);
    let (endpoint, keys) = keys::endpoint(config.listen, &config.tls, &name, Limits::placement())?;
    let transport = Arc::new(QuicTransport::new(&endpoint, &config.tls.cluster, &config.peers));
    let node =
        Node::start(node_config(&config), transport).await.context("the placement node cannot start")?;
    let node = Arc::new(node);
    let registry = prometheus::Registry::new();
    keys.register(&registry)?;
    let server = api::serve(config.api, node.clone(), keys.clone(), stop.clone(), registry).await?;
    tracing::info!(id = config.id, listen = %config.listen, api = %config.api, "the placement node runs");
    let reloaded = keys.clone();
    crate::signals::on_reload("certificates", move || Ok(reloaded.reload()?));
    let accepting = tokio::spawn(accept(endpoint.listen(), node.clone()));
    let watching = tokio::spawn(keys.watch());
    let end = tokio::select! {
        () = stop.cancelled() => {
            node.hand_over().await;
            Ok(())
        }
        reason = node.stopped() => Err(anyhow::anyhow!("the placement node has stopped: {reason}")),
    };
    accepting.abort();
    watching.abort();
    server.abort();
    node.shutdown().await;
    endpoint.close().await;
    end
}

fn node_config(config: &PlacementConfig) -> NodeConfig {
    let mut node = NodeConfig::new(config.id, config.directory.clone());
    let heartbeat = Duration::from_millis(config.heartbeat_ms);
    node.raft.heartbeat = heartbeat;
    let [least, most] = ELECTION_HEARTBEATS;
    node.raft.election_min = heartbeat * least;
    node.raft.election_max = heartbeat * most;
    node.brain.lease = Micros::from_millis(config.lease_ms);
    node.geo.clone_from(&config.locations);
    node.peers = config.peers.iter().map(|peer| peer.id).collect();
    node
}

async fn accept(mut listener: Listener, node: Arc<Node>) {
    while let Some(connection) = listener.accept().await {
        tokio::spawn(serve(connection, node.clone()));
    }
}

/// Each stream has a task, of which there are as many at once as a peer may have streams.
async fn serve(connection: Connection, node: Arc<Node>) {
    while let Ok(stream) = connection.accept().await {
        let (node, role) = (node.clone(), connection.peer().role.clone());
        tokio::spawn(async move {
            match stream.begin(CALL_LEN_MAX).await {
                Ok((StreamKind::Call, frames)) => call(frames, role, &node).await,
                Ok((StreamKind::Move, frames)) => frames.refuse(),
                Err(error) => tracing::debug!(%error, "a stream did not begin"),
            }
        });
    }
}

async fn call(mut frames: Frames, role: Role, node: &Node) {
    let Ok(Ok(Some(request))) = tokio::time::timeout(REQUEST_BOUND, frames.receiver.next()).await else {
        return frames.refuse();
    };
    let answer = answer(node, role, request.into()).await;
    match tokio::time::timeout(ANSWER_BOUND, frames.sender.send(&answer)).await {
        Ok(Ok(())) => frames.sender.finish(),
        Ok(Err(_)) => {}
        Err(_) => frames.refuse(),
    }
}

async fn answer(node: &Node, role: Role, request: Bytes) -> Bytes {
    match role {
        Role::Placement(id) => node.handle_peer(id, request).await,
        Role::Site(name) => node.handle_client(&Caller::Site(name), request).await,
    }
}
