//! QUIC connections to other nodes that are kept, and Raft's bytes over them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use placement::node::{Transport, TransportError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::Mutex;
use transfer::name::NodeName;
use transfer::quic::{Connection, Endpoint, QuicError};

use crate::config::{NodeAddress, Tls};

/// How long one request to a placement node may take; Raft's own timeouts are shorter.
const CALL_BOUND: Duration = Duration::from_secs(12);

/// Opens the QUIC endpoint of a node.
///
/// # Errors
/// A message that names the file or address at fault.
pub fn endpoint(listen: SocketAddr, tls: &Tls) -> anyhow::Result<Endpoint> {
    let chain = certificates(&tls.certificate)?;
    let authority = certificates(&tls.authority)?;
    let key = PrivateKeyDer::from_pem_file(&tls.key)
        .with_context(|| format!("{}: a PEM private key is wanted (tls.key)", tls.key.display()))?;
    Ok(Endpoint::bind(listen, &tls.cluster, chain, key, &authority)?)
}

fn certificates(path: &std::path::Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = read.with_context(|| format!("{}: PEM certificates are wanted", path.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{}: no PEM certificate in it", path.display());
    Ok(chain)
}

/// A peer that is connected to when needed, and again when the connection is gone.
#[derive(Debug)]
pub struct Link {
    endpoint: Endpoint,
    address: SocketAddr,
    name: NodeName,
    connection: Mutex<Option<Connection>>,
}

impl Link {
    /// A link that is not connected yet.
    #[must_use]
    pub fn new(endpoint: Endpoint, address: SocketAddr, name: NodeName) -> Self {
        Self { endpoint, address, name, connection: Mutex::new(None) }
    }

    /// The connection; makes one if there is none.
    ///
    /// # Errors
    /// [`QuicError`] when the peer does not answer or is somebody else.
    pub async fn get(&self) -> Result<Connection, QuicError> {
        let mut held = self.connection.lock().await;
        if let Some(connection) = held.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        let connection = self.endpoint.connect(self.address, &self.name).await?;
        *held = Some(connection.clone());
        Ok(connection)
    }

    /// The round trip, if connected.
    pub async fn round_trip(&self) -> Option<Duration> {
        let held = self.connection.lock().await;
        held.as_ref().filter(|connection| !connection.is_closed()).map(Connection::round_trip)
    }
}

/// Requests to placement nodes, for Raft and for agents.
#[derive(Debug)]
pub struct QuicTransport {
    links: BTreeMap<u64, Arc<Link>>,
}

impl QuicTransport {
    /// A transport to these nodes.
    #[must_use]
    pub fn new(endpoint: &Endpoint, cluster: &str, nodes: &[NodeAddress]) -> Self {
        let link = |node: &NodeAddress| {
            let name = NodeName::placement(cluster, node.id);
            (node.id, Arc::new(Link::new(endpoint.clone(), node.address, name)))
        };
        Self { links: nodes.iter().map(link).collect() }
    }
}

#[async_trait::async_trait]
impl Transport for QuicTransport {
    async fn call(&self, to: u64, request: Bytes) -> Result<Bytes, TransportError> {
        let unreachable = |reason: String| TransportError::Unreachable { to, reason };
        let link = self.links.get(&to).ok_or_else(|| unreachable("it is not configured".into()))?;
        let call = async {
            let connection = link.get().await?;
            connection.call(&request).await
        };
        match tokio::time::timeout(CALL_BOUND, call).await {
            Ok(Ok(answer)) => Ok(answer.into()),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(TransportError::Timeout { to }),
        }
    }
}
