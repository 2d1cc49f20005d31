//! Where switches and their databases listen, and streams to them: Unix socket, TCP, TLS.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// How long a peer may take to accept and, with TLS, to shake hands.
const CONNECT_BOUND: Duration = Duration::from_secs(5);

/// Where a switch listens for its controller, or a database for its clients.
#[derive(Clone, Debug)]
pub enum SwitchAddr {
    /// A Unix stream socket. For Open vSwitch: `BRIDGE.mgmt` in its run directory.
    Unix(PathBuf),
    /// TCP to a host and port. Neither side knows who the other is: for loopback and test networks.
    Tcp(String, u16),
    /// TLS over TCP to a host and port, with certificates on both sides.
    Tls(String, u16, TlsClient),
}

impl fmt::Display for SwitchAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Tls(host, port, _) => write!(f, "tls:{host}:{port}"),
        }
    }
}

/// Key material of this side, and the name that the other side's certificate must have.
#[derive(Clone, Debug)]
pub struct TlsClient {
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The name is neither a DNS name nor an address.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// A certificate or the key makes no sense.
    #[error(transparent)]
    Material(#[from] rustls::Error),
}

impl TlsClient {
    /// Presents `chain`, and trusts whoever chains to `authority` and has `name` in its certificate.
    ///
    /// # Errors
    /// [`TlsError`], which says what is wrong with the material.
    pub fn new(
        name: &str,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        authority: &[CertificateDer<'static>],
    ) -> Result<Self, TlsError> {
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots.add(certificate.clone())?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        Ok(Self { name, config: Arc::new(config) })
    }
}

/// A stream, whichever kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Connects within a bound.
pub(crate) async fn connect(target: &SwitchAddr) -> io::Result<Box<dyn Stream>> {
    let connected = tokio::time::timeout(CONNECT_BOUND, connect_unbounded(target)).await;
    connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn connect_unbounded(target: &SwitchAddr) -> io::Result<Box<dyn Stream>> {
    let (host, port, tls) = match target {
        SwitchAddr::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
        SwitchAddr::Tcp(host, port) => (host, *port, None),
        SwitchAddr::Tls(host, port, tls) => (host, *port, Some(tls)),
    };
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    Ok(Box::new(TlsConnector::from(tls.config.clone()).connect(tls.name.clone(), stream).await?))
}
