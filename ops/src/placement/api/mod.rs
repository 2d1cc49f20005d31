//! The config API.

use std::net::SocketAddr;
use std::sync::Arc;

use placement::node::Node;

/// Serves the API.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(_address: SocketAddr, _node: Arc<Node>) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    Ok(tokio::spawn(async {}))
}
