//! QUIC connections to other nodes that are kept, and requests over them.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use bytes::Bytes;
use placement::node::{Transport, TransportError};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use transfer::name::NodeName;
use transfer::quic::{Connection, Endpoint, QuicError};

use crate::address::Address;
use crate::config::NodeAddress;

/// How long one request to a placement node may take; Raft's own timeouts are shorter.
const CALL_BOUND: Duration = Duration::from_secs(12);
/// How long a request waits for a connection that is being made: a handshake on the longest path, once repeated.
const CONNECTION_WAIT: Duration = Duration::from_millis(500);
/// Pause before a second attempt to connect; it doubles with each, up to the other.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Short, for a peer that comes back is waited for by moves.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A connection that lasts for less does not count as one: the peer may refuse it after the handshake.
const SETTLED: Duration = Duration::from_secs(1);

/// A peer that a task of its own keeps connected to. Nobody who needs the connection waits for a dial, unless it wants to.
#[derive(Debug)]
pub struct Link {
    state: watch::Receiver<State>,
    dialler: AbortHandle,
}

#[derive(Clone, Debug)]
enum State {
    /// The first attempt since the start, or since the last connection ended.
    Dialling,
    Up(Connection),
    /// The last attempt failed so; others follow.
    Down(QuicError),
}

impl Link {
    /// Begins to connect. Must be called inside a tokio runtime; dropping the link ends its attempts.
    #[must_use]
    pub fn new(endpoint: Endpoint, address: Address, name: NodeName) -> Self {
        let (sender, state) = watch::channel(State::Dialling);
        let dialler = tokio::spawn(Dialler { endpoint, address, name, state: sender }.run()).abort_handle();
        Self { state, dialler }
    }

    /// The connection, if there is one.
    #[must_use]
    pub fn connection(&self) -> Option<Connection> {
        match &*self.state.borrow() {
            State::Up(connection) if !connection.is_closed() => Some(connection.clone()),
            State::Up(_) | State::Dialling | State::Down(_) => None,
        }
    }

    /// The connection. Waits at most for so long while a first attempt goes on, and not at all if the last one failed.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn ready(&self, wait: Duration) -> Result<Connection, QuicError> {
        let not_yet = || QuicError::Stream(format!("not connected within {} ms", wait.as_millis()));
        let mut state = self.state.clone();
        let decided = state.wait_for(|state| match state {
            State::Up(connection) => !connection.is_closed(),
            State::Down(_) => true,
            State::Dialling => false,
        });
        match tokio::time::timeout(wait, decided).await {
            Ok(Ok(state)) => match &*state {
                State::Up(connection) => Ok(connection.clone()),
                State::Down(error) => Err(error.clone()),
                State::Dialling => Err(not_yet()),
            },
            // In time there was none, or the dialler has ended with its runtime.
            Ok(Err(_)) | Err(_) => Err(not_yet()),
        }
    }

    /// The round trip, if connected.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.connection().map(|connection| connection.round_trip())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.dialler.abort();
    }
}

/// Connects, and again whenever the connection has ended.
struct Dialler {
    endpoint: Endpoint,
    address: Address,
    name: NodeName,
    state: watch::Sender<State>,
}

impl Dialler {
    async fn run(self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let (error, lived) = match self.address.connect(&self.endpoint, &self.name).await {
                Ok(connection) => self.keep(connection).await,
                Err(error) => (error, None),
            };
            let settled = lived.is_some_and(|lived| lived >= SETTLED);
            if settled {
                backoff = BACKOFF_MIN;
            }
            self.tell(&error, lived.is_some());
            // A peer that was there may be back at once, and is worth waiting for; one that was not is not.
            self.state.send_replace(if settled { State::Dialling } else { State::Down(error) });
            tokio::time::sleep(jittered(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Until the connection ends; gives the reason, and how long it lived.
    async fn keep(&self, connection: Connection) -> (QuicError, Option<Duration>) {
        let since = Instant::now();
        self.state.send_replace(State::Up(connection.clone()));
        let mut closed = std::pin::pin!(connection.closed());
        let error = match tokio::time::timeout(SETTLED, &mut closed).await {
            Ok(error) => error,
            Err(_) => {
                tracing::info!(peer = %self.name, address = %self.address, "connected");
                closed.await
            }
        };
        (error, Some(since.elapsed()))
    }

    /// A line when a peer goes or is not there at first, and one a minute while an operator has to mend something.
    fn tell(&self, error: &QuicError, was_up: bool) {
        let (peer, address) = (&self.name, &self.address);
        if matches!(error, QuicError::Refused(_) | QuicError::WrongPeer { .. } | QuicError::Tls(_)) {
            if let Some(kept_back) = self.endpoint.notices().due(&format!("{peer} {error}")) {
                tracing::warn!(%peer, %address, %error, kept_back, "no connection, and an operator has to act");
            }
        } else if was_up {
            tracing::warn!(%peer, %address, %error, "the connection ended");
        } else if matches!(&*self.state.borrow(), State::Dialling) {
            tracing::warn!(%peer, %address, %error, "not reached yet");
        } else {
            tracing::debug!(%peer, %address, %error, "not reached");
        }
    }
}

/// Within a quarter of it, so that those who lost the same peer do not come back all at once.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 1_024;
    pause.mul_f64(0.75 + random as f64 / 2_048.0)
}

/// Requests to placement nodes, for Raft and for agents.
#[derive(Debug)]
pub struct QuicTransport {
    links: BTreeMap<u64, Link>,
}

impl QuicTransport {
    /// A transport to these nodes, which begins to connect to them. Must be called inside a tokio runtime.
    #[must_use]
    pub fn new(endpoint: &Endpoint, cluster: &str, nodes: &[NodeAddress]) -> Self {
        let link = |node: &NodeAddress| {
            let name = NodeName::placement(cluster, node.id);
            (node.id, Link::new(endpoint.clone(), node.address.clone(), name))
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
            let connection = link.ready(CONNECTION_WAIT).await?;
            connection.call(&request).await
        };
        match tokio::time::timeout(CALL_BOUND, call).await {
            Ok(Ok(answer)) => Ok(answer.into()),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(TransportError::Timeout { to }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};

    use transfer::quic::Limits;

    use super::*;
    use crate::certs;
    use crate::config::Tls;

    /// Longer than any test takes: what waits for so long has hung.
    const NEVER: Duration = Duration::from_secs(120);

    struct Nodes(tempfile::TempDir);

    impl Nodes {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let nodes: Vec<_> = (1..=3).map(|id| NodeName::placement("c", id)).collect();
            certs::write(directory.path(), &nodes).unwrap();
            Self(directory)
        }

        fn endpoint(&self, id: u64, listen: SocketAddr) -> Endpoint {
            let node = NodeName::placement("c", id);
            let stem = self.0.path().join(certs::file_stem(&node));
            let tls = Tls {
                cluster: "c".into(),
                certificate: stem.with_extension("pem"),
                key: stem.with_extension("key"),
                authority: self.0.path().join("authority.pem"),
            };
            crate::keys::endpoint(listen, &tls, &node, Limits::placement()).unwrap().0
        }
    }

    fn any() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    /// Answers every call with its own bytes.
    fn echo(endpoint: &Endpoint) -> AbortHandle {
        let mut listener = endpoint.listen();
        let serve = async move {
            while let Some(connection) = listener.accept().await {
                tokio::spawn(async move {
                    while let Ok(stream) = connection.accept().await {
                        let (_, mut frames) = stream.begin(1_024).await.unwrap();
                        let bytes = frames.receiver.next().await.unwrap().unwrap();
                        frames.sender.send(&bytes).await.unwrap();
                        frames.sender.finish();
                    }
                });
            }
        };
        tokio::spawn(serve).abort_handle()
    }

    #[tokio::test]
    async fn a_node_that_is_silent_delays_no_call_to_others() {
        let nodes = Nodes::new();
        let (own, well) = (nodes.endpoint(1, any()), nodes.endpoint(2, any()));
        echo(&well);
        let silent = UdpSocket::bind(any()).unwrap();
        let address = |id, address: SocketAddr| NodeAddress { id, address: address.into() };
        let peers = [address(2, well.local_address().unwrap()), address(3, silent.local_addr().unwrap())];
        let transport = QuicTransport::new(&own, "c", &peers);
        // While one is dialled the other answers; and who is known not to answer is not waited for.
        let waiting = transport.call(3, Bytes::from_static(b"a"));
        tokio::pin!(waiting);
        let answers = async {
            for _ in 0..20 {
                assert_eq!(transport.call(2, Bytes::from_static(b"b")).await.unwrap(), "b");
            }
        };
        tokio::select! {
            biased;
            error = &mut waiting => panic!("{error:?}"),
            () = answers => {}
        }
        assert!(waiting.await.is_err());
        assert!(transport.links[&3].ready(NEVER).await.is_err(), "after a failed attempt");
        let error = tokio::time::timeout(NEVER, transport.links[&3].ready(NEVER * 2)).await;
        assert!(error.expect("it fails at once").is_err());
    }

    #[tokio::test]
    async fn a_link_connects_again_when_its_peer_comes_back() {
        let nodes = Nodes::new();
        let own = nodes.endpoint(1, any());
        let peer = nodes.endpoint(2, any());
        let listen = peer.local_address().unwrap();
        let serving = echo(&peer);
        // The name stands for an address of either family; the endpoint has one of them.
        let address = format!("localhost:{}", listen.port()).parse().unwrap();
        let link = Link::new(own, address, NodeName::placement("c", 2));
        let first = link.ready(NEVER).await.unwrap();
        assert!(link.round_trip().is_some());
        serving.abort();
        peer.close().await;
        drop(peer);
        first.closed().await;
        assert!(link.connection().is_none() && link.round_trip().is_none());
        let peer = loop {
            // The port is free once the last connection is forgotten.
            if UdpSocket::bind(listen).is_ok() {
                break nodes.endpoint(2, listen);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        echo(&peer);
        let ends = Instant::now() + NEVER;
        while link.connection().is_none() {
            assert!(Instant::now() < ends, "no connection");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(link.connection().unwrap().call(b"a").await.unwrap(), b"a");
    }
}
