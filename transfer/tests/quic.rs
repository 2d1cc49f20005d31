//! Real QUIC over loopback: who is let in, and what arrives.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::DigitallySignedStruct;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::net::UdpSocket;
use transfer::name::NodeName;
use transfer::quic::{Arriving, CALL_LEN_MAX, Endpoint, Limits, Outcome, QuicError, StreamKind};
use transfer::tls::{Identity, IdentityError, Part};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn identity(&self, name: &str) -> Identity {
        self.identity_with(name, |_| {})
    }

    fn identity_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(name.try_into().unwrap()));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.0).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Identity { chain: vec![leaf], key, authority: vec![self.0.der().clone()] }
    }

    fn endpoint(&self, cluster: &str, name: &str) -> Endpoint {
        self.endpoint_with(cluster, name, Limits::placement())
    }

    fn endpoint_with(&self, cluster: &str, name: &str, limits: Limits) -> Endpoint {
        bind(cluster, &self.identity(name), limits)
    }

    /// One whose certificate was good until yesterday, some years ago.
    fn expired(&self, name: &str) -> Endpoint {
        let identity = self.identity_with(name, |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
        bind("c", &identity, Limits::placement())
    }

    /// QUIC and TLS as peers have them, and nothing that keeps to the rules above them.
    fn raw_client(&self, name: &str) -> quinn::Endpoint {
        let Identity { chain, key, .. } = self.identity(name);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
            .with_client_auth_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"limosa/1".to_vec()];
        let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
        let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
        endpoint
    }
}

fn bind(cluster: &str, identity: &Identity, limits: Limits) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), cluster, identity, limits).unwrap()
}

/// Takes any certificate of a server, as an attacker would.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Answers every call with its bytes reversed, until the endpoint goes away.
fn serve(endpoint: &Endpoint) {
    let mut listener = endpoint.listen();
    tokio::spawn(async move {
        while let Some(connection) = listener.accept().await {
            tokio::spawn(async move {
                while let Ok(stream) = connection.accept().await {
                    tokio::spawn(answer(stream));
                }
            });
        }
    });
}

async fn answer(stream: Arriving) {
    let Ok((StreamKind::Call, mut frames)) = stream.begin(CALL_LEN_MAX).await else { return };
    let Ok(Some(mut bytes)) = frames.receiver.next().await else { return };
    bytes.reverse();
    if frames.sender.send(&bytes).await.is_ok() {
        frames.sender.finish();
    }
}

#[tokio::test]
async fn calls_are_answered_by_the_node_that_was_asked_for() {
    let authority = Authority::new();
    let server = authority.endpoint("c", "limosa://c/placement/1");
    let address = server.local_address().unwrap();
    serve(&server);
    let client = authority.endpoint("c", "limosa://c/site/ams");
    let connection = client.connect(address, &NodeName::placement("c", 1)).await.unwrap();
    let large: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
    let mut answer = connection.call(&large).await.unwrap();
    answer.reverse();
    assert!(answer == large);
}

#[tokio::test]
async fn another_node_than_the_one_asked_for_is_refused() {
    let authority = Authority::new();
    let server = authority.endpoint("c", "limosa://c/placement/1");
    let address = server.local_address().unwrap();
    serve(&server);
    let client = authority.endpoint("c", "limosa://c/site/ams");
    let error = client.connect(address, &NodeName::placement("c", 2)).await.unwrap_err();
    assert!(matches!(error, QuicError::WrongPeer { .. }), "{error}");
}

#[tokio::test]
async fn a_node_of_another_cluster_or_authority_is_not_let_in() {
    let authority = Authority::new();
    let server = authority.endpoint("c", "limosa://c/placement/1");
    let address = server.local_address().unwrap();
    serve(&server);
    let wanted = NodeName::placement("c", 1);
    let strangers = [
        Authority::new().endpoint("c", "limosa://c/site/ams"),
        authority.endpoint("c", "limosa://d/site/ams"),
        authority.endpoint("d", "limosa://d/site/ams"),
    ];
    for stranger in strangers {
        // A server's refusal may arrive only after the client's side of the handshake is done.
        let refused = match stranger.connect(address, &wanted).await {
            Ok(connection) => connection.call(b"hello").await.is_err(),
            Err(_) => true,
        };
        assert!(refused);
    }
}

const PLACEMENT: &str = "limosa://c/placement/1";

fn site(name: &str) -> String {
    format!("limosa://c/site/{name}")
}

/// Waits for a condition that comes about by itself, however slow the machine is.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let ends = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(tokio::time::Instant::now() < ends, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Clients that begin handshakes, each from a port of its own, and never read an answer.
async fn half_open(authority: &Authority, address: SocketAddr, count: usize) {
    for _ in 0..count {
        // Its first packets are sent, and the port is gone before the answer comes.
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let relay = socket.local_addr().unwrap();
        let client = authority.endpoint("c", &site("nobody"));
        let dial = tokio::spawn(async move { client.connect(relay, &NodeName::placement("c", 1)).await });
        let mut packet = [0; 2_048];
        let (len, _) = socket.recv_from(&mut packet).await.unwrap();
        dial.abort();
        socket.send_to(&packet[..len], address).await.unwrap();
    }
}

#[tokio::test]
async fn handshakes_that_are_never_completed_keep_no_peer_waiting() {
    let authority = Authority::new();
    let server = authority.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    half_open(&authority, address, 8).await;
    // Those hold their places for seconds; a peer needs none of them.
    let client = authority.endpoint("c", &site("ams"));
    let connection = client.connect(address, &NodeName::placement("c", 1)).await.unwrap();
    assert_eq!(connection.call(b"ab").await.unwrap(), b"ba");
    assert_eq!(server.counts().count(Outcome::TimedOut), 0, "the peer came in while they were open");
}

#[tokio::test]
async fn a_flood_from_one_address_leaves_room_for_peers_at_the_same_address() {
    let authority = Authority::new();
    let server = authority.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    half_open(&authority, address, 60).await;
    until("those beyond the first few are asked to show that they receive", || {
        server.counts().count(Outcome::Retried) > 0
    })
    .await;
    let retried = server.counts().count(Outcome::Retried);
    let client = authority.endpoint("c", &site("ams"));
    let connection = client.connect(address, &NodeName::placement("c", 1)).await.unwrap();
    assert_eq!(connection.call(b"ab").await.unwrap(), b"ba");
    assert!(server.counts().count(Outcome::Retried) >= retried);
    assert_eq!(server.counts().count(Outcome::Ignored), 0);
}

#[tokio::test]
async fn a_stream_of_an_unknown_kind_or_a_silent_one_is_refused_alone() {
    let authority = Authority::new();
    let server = authority.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    let stranger = authority.raw_client(&site("ams"));
    let connection = stranger.connect(address, "limosa").unwrap().await.unwrap();
    // One that says nothing at all: it exists for the server once a later one does.
    let (silent, _keep) = connection.open_bi().await.unwrap();
    let (mut unknown, mut answer) = connection.open_bi().await.unwrap();
    unknown.write_all(&[77, 0, 0, 0, 1, 0]).await.unwrap();
    let refused = answer.read_chunk(1, true).await.unwrap_err();
    assert!(matches!(refused, quinn::ReadError::Reset(code) if code.into_inner() == 16), "{refused}");
    let (mut call, mut answer) = connection.open_bi().await.unwrap();
    call.write_all(&[1, 0, 0, 0, 2, b'a', b'b']).await.unwrap();
    call.finish().unwrap();
    assert_eq!(answer.read_to_end(100).await.unwrap(), [0, 0, 0, 2, b'b', b'a']);
    assert!(connection.close_reason().is_none());
    assert_eq!(server.counts().count(Outcome::StreamRefused), 1);
    until("the silent one is refused too, in time", || server.counts().count(Outcome::StreamRefused) == 2)
        .await;
    let told = silent.stopped().await.unwrap();
    assert_eq!(told.map(quinn::VarInt::into_inner), Some(16));
    assert!(connection.close_reason().is_none());
}

#[tokio::test]
async fn frames_that_are_announced_and_never_sent_take_no_memory_and_no_other_peers_room() {
    let authority = Authority::new();
    let limits = Limits { buffered_max: 1 << 20, ..Limits::placement() };
    let server = authority.endpoint_with("c", PLACEMENT, limits);
    let address = server.local_address().unwrap();
    serve(&server);
    let greedy = authority.raw_client(&site("ams"));
    let connection = greedy.connect(address, "limosa").unwrap().await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..8 {
        let (mut sender, receiver) = connection.open_bi().await.unwrap();
        let len = (1u32 << 20).to_be_bytes();
        sender.write_all(&[1, len[0], len[1], len[2], len[3], 0]).await.unwrap();
        streams.push((sender, receiver));
    }
    // One of the eight has the peer's memory; the others are refused once they have waited.
    until("the peer's other frames are refused", || server.counts().count(Outcome::StreamRefused) == 7).await;
    let other = authority.endpoint("c", &site("sin"));
    let other = other.connect(address, &NodeName::placement("c", 1)).await.unwrap();
    assert_eq!(other.call(b"ab").await.unwrap(), b"ba");
    assert!(connection.close_reason().is_none());
}

#[tokio::test]
async fn a_peer_has_two_connections_and_a_third_takes_the_place_of_the_oldest() {
    let authority = Authority::new();
    let server = authority.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    let wanted = NodeName::placement("c", 1);
    let client = authority.endpoint("c", &site("ams"));
    let other = authority.endpoint("c", &site("sin")).connect(address, &wanted).await.unwrap();
    let first = client.connect(address, &wanted).await.unwrap();
    let second = client.connect(address, &wanted).await.unwrap();
    assert_eq!(second.call(b"ab").await.unwrap(), b"ba");
    assert!(!first.is_closed());
    let third = client.connect(address, &wanted).await.unwrap();
    let reason = first.closed().await.to_string();
    assert!(reason.contains("a newer connection of this node took its place"), "{reason}");
    for connection in [&second, &third, &other] {
        assert_eq!(connection.call(b"ab").await.unwrap(), b"ba");
    }
}

#[tokio::test]
async fn both_sides_learn_in_words_why_a_peer_is_refused() {
    let authority = Authority::new();
    let server = authority.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    let wanted = NodeName::placement("c", 1);
    let reason = async |stranger: Endpoint| match stranger.connect(address, &wanted).await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    };
    let refused = reason(Authority::new().endpoint("c", &site("ams"))).await;
    // Neither knows the other's authority; the one that dials sees it first.
    assert!(matches!(&refused, QuicError::Refused(_)), "{refused}");
    let refused = refused.to_string();
    assert!(
        refused.contains("this node refuses the peer: certificate of limosa://c/placement/1"),
        "{refused}"
    );
    assert!(refused.contains("another authority has signed it"), "{refused}");
    until("the server counts it", || server.counts().count(Outcome::Failed) == 1).await;

    let refused = reason(authority.endpoint("c", "limosa://d/site/ams")).await.to_string();
    assert!(refused.contains("the peer refuses this node: certificate is of cluster \"d\""), "{refused}");
    until("the server counts it", || server.counts().count(Outcome::Failed) == 2).await;

    let refused = reason(authority.expired(&site("ams"))).await.to_string();
    assert!(refused.contains("the peer refuses this node: certificate of limosa://c/site/ams"), "{refused}");
    assert!(refused.contains("has expired; its own time ends at"), "{refused}");
}

#[tokio::test]
async fn new_handshakes_use_renewed_certificates_and_old_connections_stay() {
    let (old, new) = (Authority::new(), Authority::new());
    let server = old.endpoint("c", PLACEMENT);
    let address = server.local_address().unwrap();
    serve(&server);
    let wanted = NodeName::placement("c", 1);
    let client = old.endpoint("c", &site("ams"));
    let before = client.connect(address, &wanted).await.unwrap();
    server.renew(&new.identity(PLACEMENT)).unwrap();
    assert!(matches!(client.connect(address, &wanted).await, Err(QuicError::Refused(_))));
    client.renew(&new.identity(&site("ams"))).unwrap();
    let after = client.connect(address, &wanted).await.unwrap();
    for connection in [before, after] {
        assert_eq!(connection.call(b"ab").await.unwrap(), b"ba");
    }
}

/// Seconds since 1970 that certificates of these tests are good at.
const NOW: i64 = 1_900_000_000;

#[test]
fn key_material_of_another_node_or_time_or_authority_is_refused_by_name() {
    let authority = Authority::new();
    let node = NodeName::site("c", "ams");
    let identity = || authority.identity(&site("ams"));
    assert!(identity().check(&node, NOW).is_ok());
    let error = |identity: Identity, node: &NodeName, now| identity.check(node, now).unwrap_err();
    let wrong = error(identity(), &NodeName::site("c", "sin"), NOW);
    assert_eq!(
        wrong.to_string(),
        "it is the certificate of limosa://c/site/ams, and this node is limosa://c/site/sin"
    );
    assert!(matches!(error(identity(), &node, i64::MAX), IdentityError::Expired(_)));
    assert!(matches!(error(identity(), &node, -1_000_000_000), IdentityError::NotYet(_)));
    let other = Authority::new();
    let foreign = Identity { authority: other.identity(&site("ams")).authority, ..identity() };
    let error = foreign.check(&node, NOW).unwrap_err();
    assert_eq!(error.part(), Part::Certificate);
    assert!(
        error.to_string().contains("none of the certificates in the authority's file has signed it"),
        "{error}"
    );
    let mixed = Identity { key: identity().key, ..identity() };
    let error = mixed.check(&node, NOW).unwrap_err();
    assert_eq!((error.part(), &error), (Part::Key, &IdentityError::OtherKey));
}
