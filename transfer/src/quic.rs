//! QUIC between nodes: mutual TLS, names from URI SANs, every limit set.
//!
//! A connection carries bidirectional streams. The first byte of a stream says what it is ([`StreamKind`]): one
//! request and one answer, or a move. 0-RTT and datagrams are off, connections do not migrate: nodes have
//! fixed addresses.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::name::NodeName;
use crate::tls;

/// Application protocol: a version that cannot talk to this one gets another name.
const ALPN: &[u8] = b"limosa/1";
/// Silence after which a peer counts as gone; keep-alives are a quarter of it apart.
const IDLE: Duration = Duration::from_secs(4);
/// How long a connection attempt may take.
const CONNECT_BOUND: Duration = Duration::from_secs(5);
/// Streams that a peer may have open at once: moves, and requests.
const STREAMS_MAX: u32 = 1_024;
/// One stream's window: 10 Gbit/s at 13 ms, 1 Gbit/s at 134 ms.
const STREAM_WINDOW: u32 = 16 << 20;
/// All streams of one connection together.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// Handshakes under way at once, and what they may buffer.
const INCOMING_MAX: usize = 256;
/// Most bytes of one request or answer.
pub const CALL_LEN_MAX: usize = 16 << 20;

/// What a stream is, by its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamKind {
    /// One request, one answer: to a placement node.
    Call = 1,
    /// A move, from source to target: then eight bytes of move id, then frames.
    Move = 2,
}

/// Why a connection or a stream failed. Try again with backoff, except for the first two.
#[derive(Debug, thiserror::Error)]
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
        source: std::io::Error,
    },
    /// No connection.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
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

/// A node's own end: it connects and accepts.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    cluster: String,
}

/// A connection to an authenticated peer.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: quinn::Connection,
    peer: NodeName,
}

/// Both directions of a stream, in frames: a big-endian `u32` length, then that many bytes.
#[derive(Debug)]
pub struct Frames {
    /// Outgoing.
    pub sender: FrameSender,
    /// Incoming.
    pub receiver: FrameReceiver,
}

/// Outgoing frames.
#[derive(Debug)]
pub struct FrameSender(SendStream);

/// Incoming frames.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    max: usize,
}

impl Endpoint {
    /// Binds a UDP address. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`QuicError::Tls`] and [`QuicError::Bind`].
    pub fn bind(
        address: SocketAddr,
        cluster: &str,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        authority: &[CertificateDer<'static>],
    ) -> Result<Self, QuicError> {
        let (client, server) = tls::configs(cluster, chain, key, authority, ALPN)?;
        let transport = Arc::new(transport());
        let unusable = |error: &dyn std::fmt::Display| tls::TlsError::Config(error.to_string());
        let server = QuicServerConfig::try_from(server).map_err(|error| unusable(&error))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport.clone()).migration(false).max_incoming(INCOMING_MAX);
        server.incoming_buffer_size(64 << 10).incoming_buffer_size_total(4 << 20);
        let client = QuicClientConfig::try_from(client).map_err(|error| unusable(&error))?;
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport);
        let mut inner =
            quinn::Endpoint::server(server, address).map_err(|source| QuicError::Bind { address, source })?;
        inner.set_default_client_config(client);
        Ok(Self { inner, cluster: cluster.to_owned() })
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
    /// [`QuicError::Connect`] and [`QuicError::WrongPeer`].
    pub async fn connect(&self, address: SocketAddr, wanted: &NodeName) -> Result<Connection, QuicError> {
        let failed = |reason: String| QuicError::Connect { address, reason };
        // The name in the handshake is a placeholder: the certificate's URI name is what counts.
        let connecting = self.inner.connect(address, "limosa").map_err(|error| failed(error.to_string()))?;
        let inner = tokio::time::timeout(CONNECT_BOUND, connecting)
            .await
            .map_err(|_| failed(format!("no answer in {} s", CONNECT_BOUND.as_secs())))?
            .map_err(|error| failed(error.to_string()))?;
        let connection = Connection::identify(inner, &self.cluster)?;
        if connection.peer == *wanted {
            return Ok(connection);
        }
        connection.inner.close(VarInt::from_u32(1), b"wrong peer");
        Err(QuicError::WrongPeer { found: connection.peer.to_string(), wanted: wanted.to_string() })
    }

    /// The next peer that connects; `None` when the endpoint is closed. A peer that fails its handshake is not
    /// reported.
    pub async fn accept(&self) -> Option<Connection> {
        loop {
            let incoming = self.inner.accept().await?;
            let Ok(connecting) = incoming.accept() else { continue };
            let handshake = tokio::time::timeout(CONNECT_BOUND, connecting).await;
            match handshake.ok().and_then(Result::ok).map(|inner| Connection::identify(inner, &self.cluster))
            {
                Some(Ok(connection)) => return Some(connection),
                Some(Err(error)) => tracing::warn!(%error, "a peer was refused"),
                None => tracing::debug!("a handshake failed"),
            }
        }
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.inner.close(VarInt::from_u32(0), b"bye");
        let _ = tokio::time::timeout(Duration::from_millis(200), self.inner.wait_idle()).await;
    }
}

fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .keep_alive_interval(Some(IDLE / 4))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .datagram_receive_buffer_size(None);
    config
}

impl Connection {
    fn identify(inner: quinn::Connection, cluster: &str) -> Result<Self, QuicError> {
        let chain = inner.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let leaf = chain.as_ref().and_then(|chain| chain.first()).ok_or(tls::TlsError::NoCertificate)?;
        let peer = tls::name_in_cluster(leaf, cluster)?;
        Ok(Self { inner, peer })
    }

    /// Who the peer is.
    #[must_use]
    pub fn peer(&self) -> &NodeName {
        &self.peer
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

    /// Waits until the connection has ended.
    pub async fn closed(&self) {
        self.inner.closed().await;
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.inner.close(VarInt::from_u32(0), b"bye");
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
        let (mut sender, stream) = self.inner.open_bi().await.map_err(stream_error)?;
        sender.write_all(&[kind as u8]).await.map_err(stream_error)?;
        Ok(Frames { sender: FrameSender(sender), receiver: FrameReceiver { stream, max: frame_len_max } })
    }

    /// The next stream that the peer opens, with its kind.
    ///
    /// # Errors
    /// [`QuicError::Stream`] when the connection has ended or the kind is unknown.
    pub async fn accept(&self, frame_len_max: usize) -> Result<(StreamKind, Frames), QuicError> {
        let (sender, mut stream) = self.inner.accept_bi().await.map_err(stream_error)?;
        let mut kind = [0];
        stream.read_exact(&mut kind).await.map_err(stream_error)?;
        let kind = match kind[0] {
            1 => StreamKind::Call,
            2 => StreamKind::Move,
            other => return Err(QuicError::Stream(format!("kind {other} is not known"))),
        };
        Ok((
            kind,
            Frames { sender: FrameSender(sender), receiver: FrameReceiver { stream, max: frame_len_max } },
        ))
    }
}

fn stream_error(error: impl std::fmt::Display) -> QuicError {
    QuicError::Stream(error.to_string())
}

impl FrameSender {
    /// Sends one frame.
    ///
    /// # Errors
    /// [`QuicError::Stream`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), QuicError> {
        let len = u32::try_from(bytes.len()).map_err(stream_error)?;
        self.0.write_all(&len.to_be_bytes()).await.map_err(stream_error)?;
        self.0.write_all(bytes).await.map_err(stream_error)
    }

    /// Says that nothing more will come.
    pub fn finish(&mut self) {
        let _ = self.0.finish();
    }
}

impl FrameReceiver {
    /// The next frame; `None` at the end of the stream.
    ///
    /// # Errors
    /// [`QuicError::Stream`], and [`QuicError::FrameTooLong`] before anything is allocated.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, QuicError> {
        let mut len = [0; 4];
        match self.stream.read_exact(&mut len).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(stream_error(error)),
        }
        let len = u32::from_be_bytes(len) as usize;
        if len > self.max {
            return Err(QuicError::FrameTooLong { len, max: self.max });
        }
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.map_err(stream_error)?;
        Ok(Some(bytes))
    }
}
