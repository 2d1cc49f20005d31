//! Mutual TLS by node names. webpki checks chain, time and usage, but cannot match URI names; so both verifiers are
//! wrapped: a certificate is good when its chain is, and when its one URI name is a node of this cluster. A node's own key
//! material is checked in the same way before it is used.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, InconsistentKeys,
    OtherError, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::name::{CertificateNameError, NodeName};

/// Why TLS cannot be set up, or a peer is not let in.
#[derive(Clone, Debug, thiserror::Error)]
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
    /// The peer's certificate is not of this authority, or not of this time.
    #[error("certificate of {name}: {reason}")]
    Peer {
        /// As it says, which nobody has vouched for.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The key material of a node.
#[derive(Debug)]
pub struct Identity {
    /// The node's own certificate, then intermediate ones.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the first.
    pub key: PrivateKeyDer<'static>,
    /// What peers' certificates must chain to.
    pub authority: Vec<CertificateDer<'static>>,
}

/// When a certificate is good, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From then on.
    pub from: i64,
    /// Until then.
    pub until: i64,
}

/// Which of the three is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The certificate.
    Certificate,
    /// The key.
    Key,
    /// The authority.
    Authority,
}

/// Why key material cannot serve a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Somebody else's.
    #[error("it is the certificate of {found}, and this node is {wanted}")]
    WrongName {
        /// In the certificate.
        found: String,
        /// By configuration.
        wanted: String,
    },
    /// It names no node at all.
    #[error("{0}; the one of {1} is wanted")]
    NoName(CertificateNameError, String),
    /// Too late.
    #[error("it expired at {0}: a new one is wanted")]
    Expired(String),
    /// Too early, or the clock is wrong.
    #[error("it is not valid before {0}: is the clock of this machine right?")]
    NotYet(String),
    /// The authority did not sign it.
    #[error("none of the certificates in the authority's file has signed it: {0}")]
    Untrusted(String),
    /// Of another certificate.
    #[error("it is not the key of the certificate")]
    OtherKey,
    /// Not what it should be.
    #[error("{1}")]
    Unusable(Part, String),
}

impl IdentityError {
    /// What has to be replaced.
    #[must_use]
    pub fn part(&self) -> Part {
        match self {
            Self::OtherKey => Part::Key,
            Self::Unusable(part, _) => *part,
            Self::WrongName { .. }
            | Self::NoName(..)
            | Self::Expired(_)
            | Self::NotYet(_)
            | Self::Untrusted(_) => Part::Certificate,
        }
    }
}

impl Identity {
    /// Makes sure that peers will take this for the node, now, in seconds since 1970, and says for how long.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn check(&self, node: &NodeName, now: i64) -> Result<Validity, IdentityError> {
        let unusable = |part, error: &dyn std::fmt::Display| IdentityError::Unusable(part, error.to_string());
        let none = || IdentityError::Unusable(Part::Certificate, "there is no certificate in it".into());
        let leaf = self.chain.first().ok_or_else(none)?;
        let found =
            NodeName::of_certificate(leaf).map_err(|error| IdentityError::NoName(error, node.to_string()))?;
        if found != *node {
            return Err(IdentityError::WrongName { found: found.to_string(), wanted: node.to_string() });
        }
        let (validity, from, until) = times(leaf)
            .ok_or_else(|| IdentityError::Unusable(Part::Certificate, "it cannot be parsed".into()))?;
        if now < validity.from {
            return Err(IdentityError::NotYet(from));
        }
        if now > validity.until {
            return Err(IdentityError::Expired(until));
        }
        let provider = aws_lc_rs::default_provider();
        let key = provider.key_provider.load_private_key(self.key.clone_key());
        let key = key.map_err(|error| unusable(Part::Key, &error))?;
        match CertifiedKey::new(self.chain.clone(), key).keys_match() {
            Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(Error::InconsistentKeys(_)) => return Err(IdentityError::OtherKey),
            Err(error) => return Err(unusable(Part::Certificate, &error)),
        }
        let roots = Arc::new(roots(&self.authority).map_err(|error| unusable(Part::Authority, &error))?);
        let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now).unwrap_or(0)));
        let untrusted = |error: Error| IdentityError::Untrusted(reason(leaf, &error));
        let parsed = ParsedCertificate::try_from(leaf).map_err(untrusted)?;
        let algorithms = provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &self.chain[1..], now, algorithms)
            .map_err(untrusted)?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::new(provider))
            .build()
            .map_err(|error| unusable(Part::Authority, &error))?;
        clients.verify_client_cert(leaf, &self.chain[1..], now).map_err(untrusted)?;
        Ok(validity)
    }
}

/// When a certificate is good, as numbers and for people.
fn times(leaf: &[u8]) -> Option<(Validity, String, String)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let validity = certificate.validity();
    let numbers = Validity { from: validity.not_before.timestamp(), until: validity.not_after.timestamp() };
    Some((numbers, validity.not_before.to_string(), validity.not_after.to_string()))
}

/// Why a chain is not taken, in words that stay the same while time goes on.
fn reason(leaf: &[u8], error: &Error) -> String {
    let Error::InvalidCertificate(error) = error else { return error.to_string() };
    let (from, until) = times(leaf).map_or_else(Default::default, |(_, from, until)| (from, until));
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others describe themselves")]
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("it or one that signed it has expired; its own time ends at {until}")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("it is not valid before {from}")
        }
        // Authorities of the same name are told apart by the signature only.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "another authority has signed it".to_owned()
        }
        other => other.to_string(),
    }
}

fn roots(authority: &[CertificateDer<'static>]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    authority.iter().try_for_each(|certificate| roots.add(certificate.clone()))?;
    Ok(roots)
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
    identity: &Identity,
    alpn: &[u8],
) -> Result<(ClientConfig, ServerConfig), TlsError> {
    let config_error = |error: &dyn std::fmt::Display| TlsError::Config(error.to_string());
    let Identity { chain, key, authority } = identity;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = Arc::new(roots(authority).map_err(|error| config_error(&error))?);
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
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(|error| config_error(&error))?;
    client.alpn_protocols = vec![alpn.to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    Ok((client, server))
}

/// The error travels to the peer in words, so that the logs of both sides say who was refused and why.
fn refused(error: TlsError) -> Error {
    Error::Other(OtherError(Arc::new(error)))
}

fn named(leaf: &CertificateDer<'_>, cluster: &str) -> Result<(), Error> {
    name_in_cluster(leaf, cluster).map(|_| ()).map_err(refused)
}

fn untrusted(leaf: &CertificateDer<'_>, error: &Error) -> Error {
    let name = NodeName::of_certificate(leaf).map_or_else(|error| error.to_string(), |name| name.to_string());
    refused(TlsError::Peer { name, reason: reason(leaf, error) })
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
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
            .map_err(|error| untrusted(leaf, &error))?;
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
        let verified = self.chain.verify_client_cert(leaf, intermediates, now);
        let verified = verified.map_err(|error| untrusted(leaf, &error))?;
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
