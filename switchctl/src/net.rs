//! Where switches and their databases listen, and streams to them: Unix socket, TCP, TLS.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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

/// What this side shows of itself, and whom it trusts.
#[derive(Debug)]
pub struct TlsMaterial {
    /// Its certificate, and those up to the authority that the other side knows.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of its certificate.
    pub key: PrivateKeyDer<'static>,
    /// Who signs for the other side.
    pub authority: Vec<CertificateDer<'static>>,
}

/// Reads the material again, or says why it cannot be had.
type Reader = dyn Fn() -> Result<TlsMaterial, String> + Send + Sync;

/// Key material of this side, and the name that the other side's certificate must have. Clones share the material.
#[derive(Clone)]
pub struct TlsClient {
    name: ServerName<'static>,
    config: Arc<Mutex<Arc<ClientConfig>>>,
    read: Option<Arc<Reader>>,
    /// Somebody reads: the disk may give no answer, and one that waits for it is enough.
    reading: Arc<AtomicBool>,
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient").field("name", &self.name).finish_non_exhaustive()
    }
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

impl TlsMaterial {
    fn config(self) -> Result<Arc<ClientConfig>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.authority {
            roots.add(certificate)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(self.chain, self.key)?;
        Ok(Arc::new(config))
    }
}

impl TlsClient {
    /// Trusts whoever chains to the authority and has `name` in its certificate.
    ///
    /// # Errors
    /// [`TlsError`], which says what is wrong with the material.
    pub fn new(name: &str, material: TlsMaterial) -> Result<Self, TlsError> {
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
        let config = Arc::new(Mutex::new(material.config()?));
        Ok(Self { name, config, read: None, reading: Arc::default() })
    }

    /// Reads the material anew for each connection, so that a certificate can be replaced while the agent runs. What cannot be
    /// read or makes no sense is said, and the former one stays.
    #[must_use]
    pub fn read_anew(self, read: impl Fn() -> Result<TlsMaterial, String> + Send + Sync + 'static) -> Self {
        Self { read: Some(Arc::new(read)), ..self }
    }

    /// What the next connection is made with.
    async fn config(&self) -> Arc<ClientConfig> {
        if let Some(read) = self.read.clone()
            && !self.reading.swap(true, Ordering::AcqRel)
        {
            let (config, reading) = (self.config.clone(), self.reading.clone());
            let renew = move || {
                match read().and_then(|found| found.config().map_err(|error| error.to_string())) {
                    Ok(found) => *config.lock().unwrap_or_else(PoisonError::into_inner) = found,
                    Err(error) => {
                        tracing::warn!(%error, "certificates for the switch cannot be read anew: the former ones stay");
                    }
                }
                reading.store(false, Ordering::Release);
            };
            let _ = tokio::task::spawn_blocking(renew).await;
        }
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    Ok(Box::new(TlsConnector::from(tls.config().await).connect(tls.name.clone(), stream).await?))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use rustls::pki_types::PrivatePkcs8KeyDer;

    use super::*;

    fn material() -> TlsMaterial {
        let made = rcgen::generate_simple_self_signed(vec!["agent".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        TlsMaterial { chain: vec![made.cert.der().clone()], key, authority: vec![made.cert.der().clone()] }
    }

    #[tokio::test]
    async fn each_connection_is_made_with_the_certificate_that_is_there_then_or_the_last_that_was() {
        let there = Arc::new(AtomicUsize::new(0));
        let times = there.clone();
        let read = move || match times.fetch_add(1, Ordering::Relaxed) {
            1 => Err("there is no such file".to_owned()),
            2 => Ok(TlsMaterial { authority: vec![vec![0].into()], ..material() }),
            _ => Ok(material()),
        };
        let client = TlsClient::new("switch", material()).unwrap().read_anew(read);
        let first = client.config().await;
        assert!(Arc::ptr_eq(&first, &client.config().await), "it cannot be read");
        assert!(Arc::ptr_eq(&first, &client.clone().config().await), "it makes no sense");
        let renewed = client.config().await;
        assert!(!Arc::ptr_eq(&first, &renewed));
        assert_eq!(there.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn a_disk_that_gives_no_answer_is_asked_by_one_connection_only() {
        let (hold, gate) = std::sync::mpsc::channel::<()>();
        let (asked, gate) = (Arc::new(AtomicUsize::new(0)), Mutex::new(gate));
        let count = asked.clone();
        let read = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = gate.lock().unwrap().recv();
            Err("late".to_owned())
        };
        let client = TlsClient::new("switch", material()).unwrap().read_anew(read);
        let bound = Duration::from_millis(50);
        assert!(tokio::time::timeout(bound, client.config()).await.is_err());
        tokio::time::timeout(Duration::from_secs(10), client.config())
            .await
            .expect("the former one is there");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        drop(hold);
    }
}
