//! Mutual TLS by node names. webpki checks chain, time and usage, but cannot match URI names; so both verifiers are
//! wrapped: a certificate is good when its chain is, and when its one URI name is a node of this cluster.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};

use crate::name::{CertificateNameError, NodeName};

/// Why TLS cannot be set up, or a peer is not let in.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Key, certificate and authority do not fit together.
    #[error("{0}")]
    Config(String),
    /// The peer sent none.
    #[error("the peer has no certificate")]
    NoCertificate,
    /// The certificate names no node.
    #[error(transparent)]
    Name(#[from] CertificateNameError),
    /// The certificate is of another cluster.
    #[error("certificate is of cluster {theirs:?}, this is {ours:?}")]
    Cluster {
        /// In the certificate.
        theirs: String,
        /// Configured.
        ours: String,
    },
}

/// The name in a certificate, if it is of this cluster.
pub(crate) fn name_in_cluster(leaf: &CertificateDer<'_>, cluster: &str) -> Result<NodeName, TlsError> {
    let name = NodeName::of_certificate(leaf)?;
    if name.cluster == cluster {
        Ok(name)
    } else {
        Err(TlsError::Cluster { theirs: name.cluster, ours: cluster.to_owned() })
    }
}

/// Configurations for connecting and for accepting; TLS 1.3 only, without resumption, so that a revoked peer
/// cannot come back by a ticket.
pub(crate) fn configs(
    cluster: &str,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authority: &[CertificateDer<'static>],
    alpn: &[u8],
) -> Result<(ClientConfig, ServerConfig), TlsError> {
    let config_error = |error: &dyn std::fmt::Display| TlsError::Config(error.to_string());
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(certificate.clone()).map_err(|error| config_error(&error))?;
    }
    let roots = Arc::new(roots);
    let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| config_error(&error))?;
    let clients = Arc::new(NamedClient { chain: clients, cluster: cluster.to_owned() });
    let servers = Arc::new(NamedServer { roots, provider: provider.clone(), cluster: cluster.to_owned() });

    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| config_error(&error))?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|error| config_error(&error))?;
    server.alpn_protocols = vec![alpn.to_vec()];
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| config_error(&error))?
        .dangerous()
        .with_custom_certificate_verifier(servers)
        .with_client_auth_cert(chain, key)
        .map_err(|error| config_error(&error))?;
    client.alpn_protocols = vec![alpn.to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    Ok((client, server))
}

fn named(leaf: &CertificateDer<'_>, cluster: &str) -> Result<(), Error> {
    name_in_cluster(leaf, cluster).map(|_| ()).map_err(|error| {
        tracing::warn!(%error, "certificate refused");
        Error::InvalidCertificate(CertificateError::NotValidForName)
    })
}

#[derive(Debug)]
struct NamedServer {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    cluster: String,
}

impl ServerCertVerifier for NamedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _placeholder: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        named(leaf, &self.cluster)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct NamedClient {
    chain: Arc<dyn ClientCertVerifier>,
    cluster: String,
}

impl ClientCertVerifier for NamedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        named(leaf, &self.cluster)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
