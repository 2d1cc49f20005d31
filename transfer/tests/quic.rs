//! Real QUIC over loopback: who is let in, and what arrives.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use transfer::name::NodeName;
use transfer::quic::{CALL_LEN_MAX, Endpoint, QuicError, StreamKind};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn endpoint(&self, cluster: &str, name: &str) -> Endpoint {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(name.try_into().unwrap()));
        let key = KeyPair::generate().unwrap();
        let leaf: CertificateDer<'static> = params.signed_by(&key, &self.0).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let address = "127.0.0.1:0".parse().unwrap();
        Endpoint::bind(address, cluster, vec![leaf], key, &[self.0.der().clone()]).unwrap()
    }
}

/// Answers every call with its bytes reversed, until the endpoint goes away.
fn serve(endpoint: Endpoint) {
    tokio::spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            tokio::spawn(async move {
                while let Ok((StreamKind::Call, mut frames)) = connection.accept(CALL_LEN_MAX).await {
                    let mut bytes = frames.receiver.next().await.unwrap().unwrap();
                    bytes.reverse();
                    frames.sender.send(&bytes).await.unwrap();
                    frames.sender.finish();
                }
            });
        }
    });
}

#[tokio::test]
async fn calls_are_answered_by_the_node_that_was_asked_for() {
    let authority = Authority::new();
    let server = authority.endpoint("c", "limosa://c/placement/1");
    let address = server.local_address().unwrap();
    serve(server);
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
    serve(server);
    let client = authority.endpoint("c", "limosa://c/site/ams");
    let error = client.connect(address, &NodeName::placement("c", 2)).await.unwrap_err();
    assert!(matches!(error, QuicError::WrongPeer { .. }), "{error}");
}

#[tokio::test]
async fn a_node_of_another_cluster_or_authority_is_not_let_in() {
    let authority = Authority::new();
    let server = authority.endpoint("c", "limosa://c/placement/1");
    let address = server.local_address().unwrap();
    serve(server);
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
