//! QUIC between nodes: mutual TLS, names from URI SANs, every limit set.
//!
//! A connection carries bidirectional streams. The first byte of a stream says what it is ([`StreamKind`]): one
//! request and one answer, or a move. 0-RTT and datagrams are off, connections do not migrate: nodes have
//! fixed addresses. Who dials opens the streams; the other side only answers on them.
//!
//! What strangers and peers may take is bounded here: handshakes by [`Listener`], connections and streams by
//! [`Limits`], memory for frames by [`Limits::buffered_max`].

mod counts;
mod frames;
mod listener;

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, IdleTimeout, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;

use crate::name::NodeName;
use crate::tls::{self, Identity};

pub use counts::{Counts, Notices, Outcome};
pub use frames::{FrameReceiver, FrameSender, Frames};
pub use listener::Listener;

/// Application protocol: a version that cannot talk to this one gets another name.
const ALPN: &[u8] = b"limosa/1";
/// Silence after which a peer counts as gone; keep-alives are a quarter of it apart.
const IDLE: Duration = Duration::from_secs(4);
/// How long a connection attempt may take, on either side: five round trips of the worst path, with losses.
const HANDSHAKE_BOUND: Duration = Duration::from_secs(5);
/// How long a stream may take to say what it is: its first byte travels with the packet that opens it.
const KIND_BOUND: Duration = Duration::from_secs(5);
/// Incoming handshakes that quinn keeps for the listener, which takes them at once, and what they may buffer.
const INCOMING_MAX: usize = 256;
/// Most bytes of one request or answer.
pub const CALL_LEN_MAX: usize = 16 << 20;

/// Why a connection or a stream was closed, on the wire.
mod code {
    use quinn::VarInt;

    /// Nothing is wrong.
    pub(super) const BYE: VarInt = VarInt::from_u32(0);
    /// The peer is not the node that was asked for.
    pub(super) const WRONG_PEER: VarInt = VarInt::from_u32(1);
    /// This node does not serve the peer; the reason is for people.
    pub(super) const REFUSED: VarInt = VarInt::from_u32(2);
    /// The peer has made a newer connection.
    pub(super) const REPLACED: VarInt = VarInt::from_u32(3);
    /// A stream of a kind that is not known or not served here.
    pub(super) const STREAM_KIND: VarInt = VarInt::from_u32(16);
    /// A stream that broke a rule of its kind, or a bound.
    pub(super) const STREAM_REFUSED: VarInt = VarInt::from_u32(17);
}

/// What a stream is, by its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamKind {
    /// One request, one answer: to a placement node.
    Call = 1,
    /// A move, from source to target: then eight bytes of move id, then frames.
    Move = 2,
}

/// What peers may take of a node that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all peers.
    pub connections_max: usize,
    /// Connections of one peer: one in use and one that its former process left. One more closes the oldest.
    pub connections_per_peer: usize,
    /// Streams that a peer may have open at once on one connection.
    pub streams: u32,
    /// Bytes on their way or unread, of one stream and of one connection.
    pub stream_window: u32,
    /// See [`Self::stream_window`].
    pub connection_window: u32,
    /// Bytes of frames of one peer, over all its streams, that are being read or worked on.
    pub buffered_max: usize,
}

impl Limits {
    /// Of a site: up to 254 others, each with a stream per move to here. A stream's window is for 10 Gbit/s at 13 ms or 1
    /// Gbit/s at 134 ms; 128 MiB are 32 moves' chunks of 4 MiB, and usual ones have a tenth of it.
    #[must_use]
    pub const fn site() -> Self {
        Self {
            connections_max: 1_024,
            connections_per_peer: 2,
            streams: 1_024,
            stream_window: 16 << 20,
            connection_window: 64 << 20,
            buffered_max: 128 << 20,
        }
    }

    /// Of a placement node: an agent has one report and one watch open, and a proposal for each move that goes on; a Raft peer
    /// one request per follower and forwarded writes. Signs of life must not wait behind proposals. The longest requests
    /// are a snapshot's pieces.
    #[must_use]
    pub const fn placement() -> Self {
        Self {
            connections_max: 1_024,
            connections_per_peer: 2,
            streams: 256,
            stream_window: 8 << 20,
            connection_window: 16 << 20,
            buffered_max: 4 * CALL_LEN_MAX,
        }
    }
}

/// Why a connection or a stream failed. Try again with backoff, except for the first two.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QuicError {
    /// Key, certificate or authority are of no use.
    #[error("TLS: {0}")]
    Tls(#[from] tls::TlsError),
    /// The peer is somebody else.
    #[error("peer is {found}, {wanted} was expected")]
    WrongPeer {
        /// In its certificate.
        found: String,
        /// Asked for.
        wanted: String,
    },
    /// The address cannot be bound.
    #[error("cannot bind {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// A host name has no address.
    #[error("cannot look up {name}: {reason}")]
    Lookup {
        /// The host.
        name: String,
        /// Why.
        reason: String,
    },
    /// No connection.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// One of the two does not take the other's certificate, or does not serve it: an operator has to act.
    #[error("{0}")]
    Refused(String),
    /// The stream ended or broke.
    #[error("stream: {0}")]
    Stream(String),
    /// A frame is longer than allowed.
    #[error("frame of {len} bytes, at most {max} are allowed")]
    FrameTooLong {
        /// Stated.
        len: usize,
        /// Limit.
        max: usize,
    },
}

/// A node's own end: it connects, and accepts through a [`Listener`].
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    cluster: String,
    limits: Limits,
    /// Replaced when certificates are renewed; held only to copy it.
    client: Arc<RwLock<quinn::ClientConfig>>,
    counts: Arc<Counts>,
    notices: Arc<Notices>,
}

/// A connection to an authenticated peer.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: quinn::Connection,
    peer: NodeName,
    /// Of an accepted connection.
    seat: Option<Arc<listener::Seat>>,
}

/// A stream that the peer has opened and of which nothing was read yet.
#[derive(Debug)]
pub struct Arriving {
    sender: quinn::SendStream,
    receiver: quinn::RecvStream,
    seat: Option<Arc<listener::Seat>>,
}

impl Endpoint {
    /// Binds a UDP address. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`QuicError::Tls`] and [`QuicError::Bind`].
    pub fn bind(
        address: SocketAddr,
        cluster: &str,
        identity: &Identity,
        limits: Limits,
    ) -> Result<Self, QuicError> {
        let (client, server) = configs(cluster, identity, &limits)?;
        let inner = quinn::Endpoint::server(server, address)
            .map_err(|source| QuicError::Bind { address, source: Arc::new(source) })?;
        Ok(Self {
            inner,
            cluster: cluster.to_owned(),
            limits,
            client: Arc::new(RwLock::new(client)),
            counts: Arc::default(),
            notices: Arc::default(),
        })
    }

    /// From now on handshakes use this key material; connections that are there stay.
    ///
    /// # Errors
    /// [`QuicError::Tls`]; then nothing has changed.
    pub fn renew(&self, identity: &Identity) -> Result<(), QuicError> {
        let (client, server) = configs(&self.cluster, identity, &self.limits)?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        self.inner.set_server_config(Some(server));
        Ok(())
    }

    /// The bound address.
    ///
    /// # Errors
    /// [`QuicError::Stream`] when the socket is gone.
    pub fn local_address(&self) -> Result<SocketAddr, QuicError> {
        self.inner.local_addr().map_err(|error| QuicError::Stream(error.to_string()))
    }

    /// Connects to a node and makes sure that it is that node.
    ///
    /// # Errors
    /// [`QuicError::Connect`], [`QuicError::Refused`] and [`QuicError::WrongPeer`].
    pub async fn connect(&self, address: SocketAddr, wanted: &NodeName) -> Result<Connection, QuicError> {
        let failed = |reason: String| QuicError::Connect { address, reason };
        let config = self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        // The name in the handshake is a placeholder: the certificate's URI name is what counts.
        let connecting = self.inner.connect_with(config, address, "limosa");
        let connecting = connecting.map_err(|error| failed(error.to_string()))?;
        let inner = tokio::time::timeout(HANDSHAKE_BOUND, connecting)
            .await
            .map_err(|_| failed(format!("no answer in {} s", HANDSHAKE_BOUND.as_secs())))?
            .map_err(|error| refusal(&error).unwrap_or_else(|| failed(error.to_string())))?;
        let connection = Connection::identify(inner, &self.cluster, None)?;
        if connection.peer == *wanted {
            return Ok(connection);
        }
        connection.inner.close(code::WRONG_PEER, format!("{wanted} was asked for").as_bytes());
        Err(QuicError::WrongPeer { found: connection.peer.to_string(), wanted: wanted.to_string() })
    }

    /// Takes what peers begin; to be called once.
    #[must_use]
    pub fn listen(&self) -> Listener {
        Listener::new(self.clone())
    }

    /// What became of handshakes, connections and streams of peers.
    #[must_use]
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// Decides which refusals are worth a line in the log.
    #[must_use]
    pub fn notices(&self) -> &Arc<Notices> {
        &self.notices
    }

    /// Connections that are there or being made, in both directions.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.inner.open_connections()
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.inner.close(code::BYE, b"bye");
        let _ = tokio::time::timeout(Duration::from_millis(200), self.inner.wait_idle()).await;
    }
}

fn configs(
    cluster: &str,
    identity: &Identity,
    limits: &Limits,
) -> Result<(quinn::ClientConfig, quinn::ServerConfig), QuicError> {
    let (client, server) = tls::configs(cluster, identity, ALPN)?;
    let unusable = |error: &dyn std::fmt::Display| tls::TlsError::Config(error.to_string());
    let server = QuicServerConfig::try_from(server).map_err(|error| unusable(&error))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    let streams = VarInt::from_u32(limits.streams);
    server.transport_config(Arc::new(transport(limits, streams))).migration(false).max_incoming(INCOMING_MAX);
    server.incoming_buffer_size(64 << 10).incoming_buffer_size_total(4 << 20);
    let client = QuicClientConfig::try_from(client).map_err(|error| unusable(&error))?;
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(Arc::new(transport(limits, VarInt::from_u32(0))));
    Ok((client, server))
}

fn transport(limits: &Limits, streams: VarInt) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .keep_alive_interval(Some(IDLE / 4))
        .max_concurrent_bidi_streams(streams)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(limits.stream_window))
        .receive_window(VarInt::from_u32(limits.connection_window))
        .send_window(u64::from(limits.connection_window))
        .datagram_receive_buffer_size(None);
    config
}

/// What an operator has to mend, if the connection ended for that: a certificate that one side does not take, or a node
/// that the other does not serve.
fn refusal(error: &ConnectionError) -> Option<QuicError> {
    /// TLS alerts are 0x100 and up (RFC 9001, section 4.8).
    const ALERTS: std::ops::Range<u64> = 0x100..0x200;
    let is_alert = |code: quinn::TransportErrorCode| ALERTS.contains(&u64::from(code));
    #[expect(clippy::wildcard_enum_match_arm, reason = "all other ends come and go by themselves")]
    let text = match error {
        ConnectionError::TransportError(error) if is_alert(error.code) => {
            format!("this node refuses the peer: {}", plain(&error.reason))
        }
        ConnectionError::ConnectionClosed(close) if is_alert(close.error_code) => {
            format!("the peer refuses this node: {}", plain(&String::from_utf8_lossy(&close.reason)))
        }
        ConnectionError::ApplicationClosed(close)
            if [code::REFUSED, code::WRONG_PEER].contains(&close.error_code) =>
        {
            format!("the peer refuses this node: {}", plain(&String::from_utf8_lossy(&close.reason)))
        }
        _ => return None,
    };
    Some(QuicError::Refused(text))
}

/// What a peer wrote, short and without control characters, since it goes to the log.
fn plain(text: &str) -> String {
    text.trim_start_matches("other error: ").chars().filter(|letter| !letter.is_control()).take(300).collect()
}

impl Connection {
    fn identify(
        inner: quinn::Connection,
        cluster: &str,
        seat: Option<Arc<listener::Seat>>,
    ) -> Result<Self, QuicError> {
        let peer = peer_name(&inner, cluster)?;
        Ok(Self { inner, peer, seat })
    }

    /// Who the peer is.
    #[must_use]
    pub fn peer(&self) -> &NodeName {
        &self.peer
    }

    /// Where the peer is.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// The present estimate of the round trip.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.inner.rtt()
    }

    /// Lost packets since the start.
    #[must_use]
    pub fn lost_packets(&self) -> u64 {
        self.inner.stats().path.lost_packets
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.close_reason().is_some()
    }

    /// Waits until the connection has ended, and says why; [`QuicError::Refused`] is for an operator.
    pub async fn closed(&self) -> QuicError {
        let error = self.inner.closed().await;
        refusal(&error).unwrap_or_else(|| QuicError::Stream(error.to_string()))
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.inner.close(code::BYE, b"bye");
    }

    /// Ends the connection of a peer that this node does not serve, and tells it why. The log has a line about it once in
    /// a while.
    pub fn refuse(&self, reason: &str) {
        self.inner.close(code::REFUSED, reason.as_bytes());
        if let Some(seat) = &self.seat {
            seat.refused(&self.inner, &self.peer.to_string(), reason);
        }
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// [`QuicError::Stream`] and [`QuicError::FrameTooLong`].
    pub async fn call(&self, request: &[u8]) -> Result<Vec<u8>, QuicError> {
        let mut frames = self.open(StreamKind::Call, CALL_LEN_MAX).await?;
        frames.sender.send(request).await?;
        frames.sender.finish();
        frames.receiver.next().await?.ok_or_else(|| QuicError::Stream("it ended without an answer".into()))
    }

    /// Opens a stream of a kind.
    ///
    /// # Errors
    /// [`QuicError::Stream`].
    pub async fn open(&self, kind: StreamKind, frame_len_max: usize) -> Result<Frames, QuicError> {
        let (mut sender, receiver) = self.inner.open_bi().await.map_err(stream_error)?;
        sender.write_all(&[kind as u8]).await.map_err(stream_error)?;
        Ok(Frames {
            sender: FrameSender::new(sender),
            receiver: FrameReceiver::new(receiver, frame_len_max, None),
        })
    }

    /// The next stream that the peer opens. It is read by [`Arriving::begin`], in a task of its own: a stream that says
    /// nothing keeps nobody waiting.
    ///
    /// # Errors
    /// [`QuicError::Stream`] when the connection has ended.
    pub async fn accept(&self) -> Result<Arriving, QuicError> {
        let (sender, receiver) = self.inner.accept_bi().await.map_err(stream_error)?;
        Ok(Arriving { sender, receiver, seat: self.seat.clone() })
    }
}

fn peer_name(inner: &quinn::Connection, cluster: &str) -> Result<NodeName, tls::TlsError> {
    let chain = inner.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = chain.as_ref().and_then(|chain| chain.first()).ok_or(tls::TlsError::NoCertificate)?;
    tls::name_in_cluster(leaf, cluster)
}

impl Arriving {
    /// Reads what the stream is. One of an unknown kind, or that does not say so in time, is refused; its connection and
    /// other streams are left alone.
    ///
    /// # Errors
    /// [`QuicError::Stream`].
    pub async fn begin(mut self, frame_len_max: usize) -> Result<(StreamKind, Frames), QuicError> {
        let mut kind = [0];
        let read = tokio::time::timeout(KIND_BOUND, self.receiver.read_exact(&mut kind)).await;
        let kind = match (read, kind[0]) {
            (Ok(Ok(())), 1) => StreamKind::Call,
            (Ok(Ok(())), 2) => StreamKind::Move,
            (Ok(Ok(())), other) => return Err(self.refuse(format!("kind {other} is not known"))),
            (Ok(Err(error)), _) => return Err(stream_error(error)),
            (Err(_), _) => {
                return Err(self.refuse(format!("it said nothing in {} s", KIND_BOUND.as_secs())));
            }
        };
        let sender = FrameSender::new(self.sender);
        Ok((kind, Frames { sender, receiver: FrameReceiver::new(self.receiver, frame_len_max, self.seat) }))
    }

    fn refuse(mut self, reason: String) -> QuicError {
        let _ = self.sender.reset(code::STREAM_KIND);
        let _ = self.receiver.stop(code::STREAM_KIND);
        if let Some(seat) = &self.seat {
            seat.counts().add(Outcome::StreamRefused);
        }
        QuicError::Stream(reason)
    }
}

fn stream_error(error: impl std::fmt::Display) -> QuicError {
    QuicError::Stream(error.to_string())
}
