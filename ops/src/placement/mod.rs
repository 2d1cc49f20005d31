//! A placement node: Raft and agents over QUIC, the config API over HTTP.

pub mod api;
pub mod metrics;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use flow::Micros;
use placement::node::{Caller, Node, NodeConfig};
use tokio_util::sync::CancellationToken;
use transfer::name::Role;
use transfer::quic::{CALL_LEN_MAX, Connection, Endpoint, StreamKind};

use crate::config::PlacementConfig;
use crate::net::{QuicTransport, endpoint};

/// Runs a placement node until the token is cancelled; then it hands the lead over, if it has it, and ends.
///
/// # Errors
/// When keys, addresses or the log cannot be had, and when the node has stopped for good, as when its disk failed:
/// whoever looks after the process may start it again.
pub async fn run(config: PlacementConfig, stop: CancellationToken) -> anyhow::Result<()> {
    let endpoint = endpoint(config.listen, &config.tls)?;
    let transport = Arc::new(QuicTransport::new(&endpoint, &config.tls.cluster, &config.peers));
    let node =
        Node::start(node_config(&config), transport).await.context("the placement node cannot start")?;
    let node = Arc::new(node);
    let server = api::serve(config.api, node.clone(), stop.clone()).await?;
    tracing::info!(id = config.id, listen = %config.listen, api = %config.api, "the placement node runs");
    let accepting = tokio::spawn(accept(endpoint.clone(), node.clone()));
    let end = tokio::select! {
        () = stop.cancelled() => {
            node.hand_over().await;
            Ok(())
        }
        reason = node.stopped() => Err(anyhow::anyhow!("the placement node has stopped: {reason}")),
    };
    accepting.abort();
    server.abort();
    node.shutdown().await;
    endpoint.close().await;
    end
}

fn node_config(config: &PlacementConfig) -> NodeConfig {
    let mut node = NodeConfig::new(config.id, config.directory.clone());
    let heartbeat = Duration::from_millis(config.heartbeat_ms);
    node.raft.heartbeat = heartbeat;
    node.raft.election_min = heartbeat * 4;
    node.raft.election_max = heartbeat * 8;
    node.brain.lease = Micros::from_millis(config.lease_ms);
    node.geo.clone_from(&config.locations);
    node.peers = config.peers.iter().map(|peer| peer.id).collect();
    node
}

async fn accept(endpoint: Endpoint, node: Arc<Node>) {
    while let Some(connection) = endpoint.accept().await {
        tokio::spawn(serve(connection, node.clone()));
    }
}

async fn serve(connection: Connection, node: Arc<Node>) {
    while let Ok((kind, mut frames)) = connection.accept(CALL_LEN_MAX).await {
        if kind != StreamKind::Call {
            continue;
        }
        let (node, role) = (node.clone(), connection.peer().role.clone());
        tokio::spawn(async move {
            let Ok(Some(request)) = frames.receiver.next().await else { return };
            let answer = answer(&node, role, request.into()).await;
            if frames.sender.send(&answer).await.is_ok() {
                frames.sender.finish();
            }
        });
    }
}

async fn answer(node: &Node, role: Role, request: Bytes) -> Bytes {
    match role {
        Role::Placement(id) => node.handle_peer(id, request).await,
        Role::Site(name) => node.handle_client(&Caller::Site(name), request).await,
    }
}
