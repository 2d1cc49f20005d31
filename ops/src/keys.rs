//! A node's key material: read and checked before it is used, and again when its files change.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::Instant;
use transfer::name::NodeName;
use transfer::quic::{Endpoint, Limits, Outcome};
use transfer::tls::{Identity, Part, Validity};

use crate::clock::wall_ms;
use crate::config::Tls;
use crate::files;

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
    /// Nobody knows what is in a file.
    #[error("{0}: {1}")]
    Unread(PathBuf, String),
    /// The endpoint does not take it, or cannot be bound.
    #[error(transparent)]
    Quic(#[from] transfer::quic::QuicError),
}

/// Reads and checks the key material of a node.
///
/// # Errors
/// [`KeysError`].
pub fn read(tls: &Tls, node: &NodeName) -> Result<(Identity, Validity), KeysError> {
    let identity = Identity {
        chain: certificates(&tls.certificate, "tls.certificate")?,
        key: private_key(&tls.key)?,
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

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, KeysError> {
    let error = |reason: String| KeysError::Read {
        file: path.to_owned(),
        key: "tls.key",
        wanted: "a PEM private key is",
        reason,
    };
    let text = files::read(path).map_err(|cause| error(cause.to_string()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|cause| error(cause.to_string()))
}

pub(crate) fn certificates(
    path: &Path,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    let error = |reason: String| KeysError::Read {
        file: path.to_owned(),
        key,
        wanted: "PEM certificates are",
        reason,
    };
    let text = files::read(path).map_err(|cause| error(cause.to_string()))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let chain = chain.map_err(|cause| error(cause.to_string()))?;
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
    /// A file gave no answer when it was looked at last.
    unread: AtomicBool,
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
    let first = fingerprint(tls).map_err(|unread| KeysError::Unread(unread.file, unread.reason))?;
    let (identity, validity) = read(tls, node)?;
    let endpoint = Endpoint::bind(listen, &tls.cluster, &identity, limits)?;
    let keys = Keys {
        files: tls.clone(),
        node: node.clone(),
        endpoint: endpoint.clone(),
        validity: Mutex::new(validity),
        expiry_s: AtomicI64::new(validity.until),
        last_reload_worked: AtomicBool::new(true),
        unread: AtomicBool::new(false),
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

    /// Registers the metrics of the key material and of what peers begin.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(self: &Arc<Self>, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(Collector { keys: self.clone(), gauges: Gauges::new()? }))
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

    /// Whether the files are of use, as far as anybody knows.
    fn are_of_use(&self) -> bool {
        self.last_reload_worked() && !self.unread.load(Ordering::Relaxed)
    }

    /// Why peers refuse the certificate that is in use, if they do.
    #[must_use]
    pub fn refused(&self) -> Option<String> {
        let validity = *self.validity.lock().unwrap_or_else(PoisonError::into_inner);
        refused(validity, i64::try_from(wall_ms() / 1_000).unwrap_or(i64::MAX))
    }

    fn days_left(&self) -> i64 {
        (self.expiry_s() - i64::try_from(wall_ms() / 1_000).unwrap_or(0)).div_euclid(86_400)
    }

    /// Reads the files when they have changed, and warns before the certificate expires; until it is dropped.
    pub async fn watch(self: Arc<Self>) {
        let mut look = Look { used: Some(self.first), seen: None, unread: None };
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
            let keys = self.clone();
            let before = look.clone();
            // Files may keep who looks at them waiting, and nothing else may wait for them.
            let looked = tokio::task::spawn_blocking(move || keys.look(before, fingerprint(&keys.files)));
            // One that did not come back was told to stop.
            let Ok((after, reloaded)) = looked.await else { return };
            look = after;
            if reloaded {
                warned = None;
            }
        }
    }

    /// Takes one look at the files, and whether they were read again then.
    fn look(&self, before: Look, found: Result<u64, Unread>) -> (Look, bool) {
        let found = match found {
            Ok(found) => found,
            Err(unread) => {
                if before.unread.as_ref() != Some(&unread.file) {
                    tracing::error!(file = %unread.file.display(), error = unread.reason,
                        "the key material cannot be read; what was read before stays in use");
                }
                self.unread.store(true, Ordering::Relaxed);
                return (Look { seen: None, unread: Some(unread.file), ..before }, false);
            }
        };
        self.unread.store(false, Ordering::Relaxed);
        let mut after = Look { seen: Some(found), unread: None, ..before };
        if let Some(file) = before.unread {
            tracing::info!(file = %file.display(), "the key material can be read again");
            // A signal may have asked for it meanwhile, in vain.
            after.used = after.used.filter(|_| self.last_reload_worked());
        }
        // Certificate and key are two files: they are read once nobody is writing them any more.
        let settled = before.seen == Some(found);
        let changed = after.used != Some(found);
        if settled && changed {
            after.used = Some(found);
            let _ = self.reload();
        }
        (after, settled && changed)
    }
}

/// What was found at the files when somebody last looked.
#[derive(Clone, Debug)]
struct Look {
    /// Of what is in use, or was found to be of no use.
    used: Option<u64>,
    seen: Option<u64>,
    /// Which gave no answer.
    unread: Option<PathBuf>,
}

/// A file that gave no answer.
#[derive(Debug)]
struct Unread {
    file: PathBuf,
    reason: String,
}

/// Of the contents of the files; one that cannot be read counts as empty. One that gives no answer may be as it was.
fn fingerprint(files: &Tls) -> Result<u64, Unread> {
    let mut hasher = DefaultHasher::new();
    for path in [&files.certificate, &files.key, &files.authority] {
        match files::read(path) {
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                return Err(Unread { file: path.clone(), reason: error.to_string() });
            }
            read => read.ok().hash(&mut hasher),
        }
    }
    Ok(hasher.finish())
}

/// Whether an operator should hear of it: in the last third of a short life, in the last week of a long one.
fn refused(validity: Validity, now: i64) -> Option<String> {
    if now >= validity.until {
        return Some(format!("it expired {} s ago: put a new one in its place", now - validity.until));
    }
    (now < validity.from).then(|| {
        format!("it is valid in {} s only: is the clock of this machine right?", validity.from - now)
    })
}

fn is_near_end(validity: Validity, now: i64) -> bool {
    let life = (validity.until - validity.from).max(0);
    validity.until - now < WARN_S.min(life / 3)
}

/// Metrics of key material and of what peers begin.
struct Collector {
    keys: Arc<Keys>,
    gauges: Gauges,
}

struct Gauges {
    expiry: IntGauge,
    reloaded: IntGauge,
    connections: IntGauge,
    handshakes: IntCounterVec,
    connections_ended: IntCounterVec,
    streams_refused: IntCounter,
}

/// What may become of a handshake.
const HANDSHAKES: [Outcome; 6] = [
    Outcome::Accepted,
    Outcome::Failed,
    Outcome::TimedOut,
    Outcome::Retried,
    Outcome::GaveWay,
    Outcome::Ignored,
];

impl Gauges {
    fn new() -> prometheus::Result<Self> {
        let labelled =
            |name: &str, help: &str, label: &str| IntCounterVec::new(Opts::new(name, help), &[label]);
        Ok(Self {
            expiry: IntGauge::new(
                "limosa_certificate_expiry_timestamp_seconds",
                "When the certificate in use expires",
            )?,
            reloaded: IntGauge::new(
                "limosa_certificate_last_reload_successful",
                "1 if certificate, key and authority were of use when they were looked at last",
            )?,
            connections: IntGauge::new("limosa_quic_connections", "Connections to and from other nodes")?,
            handshakes: labelled(
                "limosa_quic_handshakes_total",
                "Handshakes that others began, by what became of them",
                "outcome",
            )?,
            connections_ended: labelled(
                "limosa_quic_connections_refused_total",
                "Connections of known nodes that were ended: not served here, or replaced by newer ones",
                "reason",
            )?,
            streams_refused: IntCounter::new(
                "limosa_quic_streams_refused_total",
                "Streams of an unknown kind, silent, or beyond a bound",
            )?,
        })
    }

    fn all(&self) -> [&dyn prometheus::core::Collector; 6] {
        [
            &self.expiry,
            &self.reloaded,
            &self.connections,
            &self.handshakes,
            &self.connections_ended,
            &self.streams_refused,
        ]
    }

    fn update(&self, keys: &Keys) {
        self.expiry.set(keys.expiry_s());
        self.reloaded.set(keys.are_of_use().into());
        self.connections.set(i64::try_from(keys.endpoint.open_connections()).unwrap_or(i64::MAX));
        let counts = keys.endpoint.counts();
        // The endpoint counts; these only show.
        let show = |counters: &IntCounterVec, outcome: Outcome| {
            let counter = counters.with_label_values(&[outcome.label()]);
            counter.inc_by(counts.count(outcome).saturating_sub(counter.get()));
        };
        HANDSHAKES.into_iter().for_each(|outcome| show(&self.handshakes, outcome));
        [Outcome::Refused, Outcome::Replaced]
            .into_iter()
            .for_each(|outcome| show(&self.connections_ended, outcome));
        let refused = counts.count(Outcome::StreamRefused);
        self.streams_refused.inc_by(refused.saturating_sub(self.streams_refused.get()));
    }
}

impl prometheus::core::Collector for Collector {
    fn desc(&self) -> Vec<&prometheus::core::Desc> {
        self.gauges.all().into_iter().flat_map(prometheus::core::Collector::desc).collect()
    }

    fn collect(&self) -> Vec<prometheus::proto::MetricFamily> {
        self.gauges.update(&self.keys);
        self.gauges.all().into_iter().flat_map(prometheus::core::Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{self, DAYS, Order};

    /// Longer than any test takes.
    const NEVER: Duration = Duration::from_secs(120);

    struct Deployment(tempfile::TempDir);

    impl Deployment {
        fn new() -> Self {
            let deployment = Self(tempfile::tempdir().unwrap());
            deployment.make(DAYS);
            deployment
        }

        fn nodes() -> [NodeName; 2] {
            [NodeName::placement("c", 1), NodeName::site("c", "ams")]
        }

        fn make(&self, days: u32) {
            let nodes = Self::nodes();
            let order = Order { directory: self.0.path(), cluster: "c", nodes: &nodes, days, renew: true };
            certs::make(&order).unwrap();
        }

        fn files(&self, node: &NodeName) -> Tls {
            let stem = self.0.path().join(certs::file_stem(node));
            Tls {
                cluster: "c".into(),
                certificate: stem.with_extension("pem"),
                key: stem.with_extension("key"),
                authority: self.0.path().join("authority.pem"),
            }
        }

        fn endpoint(&self, node: &NodeName) -> (Endpoint, Arc<Keys>) {
            endpoint("127.0.0.1:0".parse().unwrap(), &self.files(node), node, Limits::placement()).unwrap()
        }
    }

    #[test]
    fn key_material_that_is_not_the_nodes_own_is_refused_with_file_key_and_remedy() {
        let deployment = Deployment::new();
        let [placement, site] = Deployment::nodes();
        let error = |files: &Tls, node: &NodeName| read(files, node).unwrap_err().to_string();
        let files = deployment.files(&site);
        let wrong = error(&files, &NodeName::site("c", "sin"));
        assert!(
            wrong.contains("site-ams.pem (tls.certificate): it is the certificate of limosa://c/site/ams"),
            "{wrong}"
        );
        assert!(wrong.contains("this node is limosa://c/site/sin"), "{wrong}");
        let mixed = Tls { key: deployment.files(&placement).key, ..files.clone() };
        let wrong = error(&mixed, &site);
        assert!(wrong.contains("placement-1.key (tls.key): it is not the key of the certificate"), "{wrong}");
        let other = Deployment::new();
        let foreign = Tls { authority: other.files(&site).authority, ..files.clone() };
        assert!(
            error(&foreign, &site).contains("none of the certificates in the authority's file has signed it")
        );
        std::fs::write(&files.certificate, "nothing").unwrap();
        assert!(error(&files, &site).contains("site-ams.pem: PEM certificates are wanted (tls.certificate)"));
    }

    #[tokio::test]
    async fn files_that_change_are_used_by_new_handshakes_and_broken_ones_are_not() {
        let deployment = Deployment::new();
        let [placement, site] = Deployment::nodes();
        let (server, server_keys) = deployment.endpoint(&placement);
        let (client, client_keys) = deployment.endpoint(&site);
        let address = server.local_address().unwrap();
        let mut listener = server.listen();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(connection) = listener.accept().await {
                held.push(connection);
            }
        });
        let watching = [tokio::spawn(server_keys.clone().watch()), tokio::spawn(client_keys.clone().watch())];

        // Another authority: both sides have to read it, for either refuses the other until then.
        for file in ["authority.pem", "authority.key"] {
            std::fs::remove_file(deployment.0.path().join(file)).unwrap();
        }
        let before = server_keys.expiry_s();
        deployment.make(2 * DAYS);
        let ends = Instant::now() + NEVER;
        while server_keys.expiry_s() == before || client_keys.expiry_s() == before {
            assert!(Instant::now() < ends, "the new files were not read");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _first = client.connect(address, &placement).await.unwrap();
        watching.iter().for_each(tokio::task::JoinHandle::abort);

        // A broken file is refused, and what was read before goes on.
        std::fs::write(deployment.files(&placement).key, "nothing").unwrap();
        let error = server_keys.reload().unwrap_err().to_string();
        assert!(error.contains("placement-1.key: a PEM private key is wanted (tls.key)"), "{error}");
        assert!(!server_keys.last_reload_worked() && client_keys.last_reload_worked());
        let _second = client.connect(address, &placement).await.unwrap();
        // The side that dials is done first.
        while server.counts().count(Outcome::Accepted) < 2 {
            assert!(Instant::now() < ends + NEVER, "the server did not let both in");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let registry = Registry::new();
        server_keys.register(&registry).unwrap();
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let expiry = format!("limosa_certificate_expiry_timestamp_seconds {}", server_keys.expiry_s());
        for line in [&expiry, "limosa_certificate_last_reload_successful 0"] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(text.contains("limosa_quic_handshakes_total{outcome=\"accepted\"} 2"), "{text}");
    }

    #[tokio::test]
    async fn a_fifo_in_the_place_of_a_file_holds_up_nothing_and_is_refused_once() {
        let deployment = Deployment::new();
        let [placement, site] = Deployment::nodes();
        let files = deployment.files(&placement);
        let (_server, keys) = deployment.endpoint(&placement);
        // This runtime has one thread: a look that waits would hold up the test, too.
        let watching = tokio::spawn(keys.clone().watch());
        let fifo = |path: &Path| {
            std::fs::remove_file(path).unwrap();
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        };
        fifo(&files.certificate);
        let ends = Instant::now() + NEVER;
        while keys.last_reload_worked() {
            assert!(Instant::now() < ends, "nobody looked");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let error = keys.reload().unwrap_err().to_string();
        assert!(error.contains("placement-1.pem: PEM certificates are wanted (tls.certificate)"), "{error}");
        assert!(error.contains("it is a FIFO, a regular file is wanted"), "{error}");
        // The files come back: they are in use by themselves.
        std::fs::remove_file(&files.certificate).unwrap();
        deployment.make(DAYS);
        while !keys.last_reload_worked() {
            assert!(Instant::now() < ends, "the new files were not read");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        watching.abort();
        // So is a start.
        let files = deployment.files(&site);
        fifo(&files.key);
        let error = endpoint("127.0.0.1:0".parse().unwrap(), &files, &site, Limits::site()).unwrap_err();
        assert!(error.to_string().contains("site-ams.key: a PEM private key is wanted (tls.key)"), "{error}");
    }

    #[tokio::test]
    async fn files_that_give_no_answer_are_read_when_they_give_one_and_meanwhile_nothing_is_taken_for_changed()
     {
        let deployment = Deployment::new();
        let [placement, _] = Deployment::nodes();
        let (_server, keys) = deployment.endpoint(&placement);
        let unread = || Unread { file: "authority.pem".into(), reason: "it gave no answer".into() };
        let first = Look { used: Some(keys.first), seen: Some(keys.first), unread: None };
        let (look, reloaded) = keys.look(first, Err(unread()));
        assert!(!reloaded && !keys.are_of_use() && look.unread == Some("authority.pem".into()));
        let (look, reloaded) = keys.look(look, Err(unread()));
        assert!(!reloaded && !keys.are_of_use());
        // As they were: nothing is to be done.
        let (look, reloaded) = keys.look(look, Ok(keys.first));
        assert!(!reloaded && keys.are_of_use() && look.unread.is_none());
        assert!(!keys.look(look.clone(), Ok(keys.first)).1);
        // A signal that came meanwhile found nothing.
        let (look, _) = keys.look(look, Err(unread()));
        keys.last_reload_worked.store(false, Ordering::Relaxed);
        let (look, reloaded) = keys.look(look, Ok(keys.first));
        assert!(!reloaded && !keys.are_of_use());
        let (_, reloaded) = keys.look(look, Ok(keys.first));
        assert!(reloaded && keys.are_of_use());
    }

    #[test]
    fn a_certificate_is_near_its_end_in_its_last_week_or_the_last_third_of_a_short_life() {
        let day = 86_400;
        let long = Validity { from: 0, until: 90 * day };
        assert!(!is_near_end(long, 80 * day) && is_near_end(long, 84 * day) && is_near_end(long, 91 * day));
        let short = Validity { from: 0, until: day };
        assert!(!is_near_end(short, day / 2) && is_near_end(short, 3 * day / 4));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_certificate_that_peers_refuse_is_said_by_who_has_it() {
        let deployment = Deployment::new();
        let [_, site] = Deployment::nodes();
        let (_endpoint, keys) = deployment.endpoint(&site);
        let metrics = crate::site::metrics::SiteMetrics::new("ams").unwrap();
        metrics.judge_keys(keys.clone());
        let said = || {
            let checks = metrics.checks();
            let (check, holds) = checks.iter().find(|(check, _)| check.contains("certificate")).unwrap();
            (*holds, metrics.describe(check))
        };
        assert_eq!(said(), (true, "the certificate is valid".to_owned()));
        let now = i64::try_from(wall_ms() / 1_000).unwrap();
        for (from, until, why) in [
            (now - 100, now - 10, "it expired"),
            (now + 100, now + 200, "is the clock of this machine right?"),
        ] {
            *keys.validity.lock().unwrap() = Validity { from, until };
            let (holds, text) = said();
            assert!(!holds && text.contains(why), "{text}");
        }
    }
}
