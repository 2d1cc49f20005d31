//! A node's key material: read and checked before it is used, and again when its files change.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::Instant;
use transfer::name::NodeName;
use transfer::quic::{Endpoint, Limits};
use transfer::tls::{Identity, Part, Validity};

use crate::clock::wall_ms;
use crate::config::Tls;

/// Between two looks at the files. They are small, and who renews them waits for this.
const LOOK: Duration = Duration::from_secs(2);
/// Seconds before the end at which warnings begin, unless a third of the certificate's whole life is less.
const WARN_S: i64 = 7 * 86_400;
/// Between two warnings.
const WARN_INTERVAL: Duration = Duration::from_secs(3_600);

/// Why key material is of no use; each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Not there, or not PEM.
    #[error("{file}: {wanted} wanted ({key}): {reason}")]
    Read {
        /// Which.
        file: PathBuf,
        /// Its key in the configuration.
        key: &'static str,
        /// What should be in it.
        wanted: &'static str,
        /// Why not.
        reason: String,
    },
    /// Not this node's, or of no use now.
    #[error("{file} ({key}): {reason}")]
    Check {
        /// Which.
        file: PathBuf,
        /// Its key in the configuration.
        key: &'static str,
        /// What is wrong and wanted.
        reason: String,
    },
    /// The endpoint does not take it, or cannot be bound.
    #[error(transparent)]
    Quic(#[from] transfer::quic::QuicError),
}

/// Reads and checks the key material of a node.
///
/// # Errors
/// [`KeysError`].
pub fn read(tls: &Tls, node: &NodeName) -> Result<(Identity, Validity), KeysError> {
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| KeysError::Read {
        file: tls.key.clone(),
        key: "tls.key",
        wanted: "a PEM private key is",
        reason: error.to_string(),
    })?;
    let identity = Identity {
        chain: certificates(&tls.certificate, "tls.certificate")?,
        key,
        authority: certificates(&tls.authority, "tls.authority")?,
    };
    let now = i64::try_from(wall_ms() / 1_000).unwrap_or(i64::MAX);
    let validity = identity.check(node, now).map_err(|error| {
        let (file, key) = match error.part() {
            Part::Certificate => (&tls.certificate, "tls.certificate"),
            Part::Key => (&tls.key, "tls.key"),
            Part::Authority => (&tls.authority, "tls.authority"),
        };
        KeysError::Check { file: file.clone(), key, reason: error.to_string() }
    })?;
    Ok((identity, validity))
}

fn certificates(path: &Path, key: &'static str) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    let error = |reason: String| KeysError::Read {
        file: path.to_owned(),
        key,
        wanted: "PEM certificates are",
        reason,
    };
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = read.map_err(|cause| error(cause.to_string()))?;
    if chain.is_empty() { Err(error("there is none in it".into())) } else { Ok(chain) }
}

/// The key material that an endpoint uses, and the files that it comes from.
#[derive(Debug)]
pub struct Keys {
    files: Tls,
    node: NodeName,
    endpoint: Endpoint,
    validity: Mutex<Validity>,
    expiry_s: AtomicI64,
    last_reload_worked: AtomicBool,
    /// Of the files' contents when they were first read.
    first: u64,
}

/// Opens the QUIC endpoint of a node with its key material. Must be called inside a tokio runtime.
///
/// # Errors
/// [`KeysError`].
pub fn endpoint(
    listen: SocketAddr,
    tls: &Tls,
    node: &NodeName,
    limits: Limits,
) -> Result<(Endpoint, Arc<Keys>), KeysError> {
    let first = fingerprint(tls);
    let (identity, validity) = read(tls, node)?;
    let endpoint = Endpoint::bind(listen, &tls.cluster, &identity, limits)?;
    let keys = Keys {
        files: tls.clone(),
        node: node.clone(),
        endpoint: endpoint.clone(),
        validity: Mutex::new(validity),
        expiry_s: AtomicI64::new(validity.until),
        last_reload_worked: AtomicBool::new(true),
        first,
    };
    Ok((endpoint, Arc::new(keys)))
}

impl Keys {
    /// Reads the files again. New handshakes use what is in them; connections that are there stay. If anything is wrong with
    /// them, what was in use stays in use.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn reload(&self) -> Result<(), KeysError> {
        let renewed = read(&self.files, &self.node).and_then(|(identity, validity)| {
            self.endpoint.renew(&identity)?;
            Ok(validity)
        });
        self.last_reload_worked.store(renewed.is_ok(), Ordering::Relaxed);
        match renewed {
            Ok(validity) => {
                self.expiry_s.store(validity.until, Ordering::Relaxed);
                *self.validity.lock().unwrap_or_else(PoisonError::into_inner) = validity;
                tracing::info!(certificate = %self.files.certificate.display(), days_left = self.days_left(),
                    "the key material was read again and is in use");
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the new key material is of no use; what was read before stays in use");
                Err(error)
            }
        }
    }

    /// When the certificate in use expires, in seconds since 1970.
    #[must_use]
    pub fn expiry_s(&self) -> i64 {
        self.expiry_s.load(Ordering::Relaxed)
    }

    /// Whether the last reading of the files worked.
    #[must_use]
    pub fn last_reload_worked(&self) -> bool {
        self.last_reload_worked.load(Ordering::Relaxed)
    }

    fn days_left(&self) -> i64 {
        (self.expiry_s() - i64::try_from(wall_ms() / 1_000).unwrap_or(0)).div_euclid(86_400)
    }

    /// Reads the files when they have changed, and warns before the certificate expires; until it is dropped.
    pub async fn watch(self: Arc<Self>) {
        let (mut used, mut seen) = (self.first, None);
        let mut warned: Option<Instant> = None;
        loop {
            let now = i64::try_from(wall_ms() / 1_000).unwrap_or(i64::MAX);
            let validity = *self.validity.lock().unwrap_or_else(PoisonError::into_inner);
            if is_near_end(validity, now) && warned.is_none_or(|at| at.elapsed() >= WARN_INTERVAL) {
                warned = Some(Instant::now());
                tracing::warn!(certificate = %self.files.certificate.display(), days_left = self.days_left(),
                    seconds_left = validity.until - now,
                    "the certificate expires soon: put a new one in its place, it is read by itself");
            }
            tokio::time::sleep(LOOK).await;
            let found = fingerprint(&self.files);
            // Certificate and key are two files: they are read once nobody is writing them any more.
            if found != used && seen == Some(found) {
                used = found;
                let _ = self.reload();
                warned = None;
            }
            seen = Some(found);
        }
    }
}

/// Of the contents of the files; one that cannot be read counts as empty.
fn fingerprint(files: &Tls) -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in [&files.certificate, &files.key, &files.authority] {
        std::fs::read(path).ok().hash(&mut hasher);
    }
    hasher.finish()
}

/// Whether an operator should hear of it: in the last third of a short life, in the last week of a long one.
fn is_near_end(validity: Validity, now: i64) -> bool {
    let life = (validity.until - validity.from).max(0);
    validity.until - now < WARN_S.min(life / 3)
}
