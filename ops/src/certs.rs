//! `limosa dev certs`: a development authority and certificates of nodes. For trying out: the authority's key lies beside the
//! certificates, which a real deployment would not do.
//!
//! A directory has one authority. Run again it is used again, and what is there is kept: certificates are added, and
//! replaced only if that is asked for.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::PrivateKeyDer;
use time::OffsetDateTime;
use transfer::name::NodeName;
use transfer::tls::Identity;

use crate::clock::wall_ms;
use crate::config::Tls;
use crate::files;
use crate::keys;

/// Days that a node's certificate is good for if nothing is said: long enough to try things out, short enough that
/// nobody relies on them.
pub const DAYS: u32 = 30;
/// Days that may be asked for: what authorities for the open network give at most.
pub const DAYS_MAX: u32 = 825;
/// Days that the authority is good for. It is kept, so that certificates can be added.
const AUTHORITY_DAYS: u32 = 3_650;
/// Certificates are good from an hour before they are made, for clocks that are behind.
const BEFORE: time::Duration = time::Duration::hours(1);

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// Where the files are.
    pub directory: &'a Path,
    /// The cluster of all nodes.
    pub cluster: &'a str,
    /// Who needs a certificate.
    pub nodes: &'a [NodeName],
    /// How long new ones are good, 1 to [`DAYS_MAX`] days.
    pub days: u32,
    /// Replace those that are there.
    pub renew: bool,
}

/// What became of a node's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// The certificate; its key lies beside it.
    pub path: PathBuf,
    /// It was there already and is as before.
    pub kept: bool,
}

/// New certificates for nodes, good for [`DAYS`] days, whatever is there; the authority is kept if there is one.
///
/// # Errors
/// As [`make`].
pub fn write(directory: &Path, nodes: &[NodeName]) -> anyhow::Result<()> {
    let cluster = nodes.first().map_or("", |node| &node.cluster);
    make(&Order { directory, cluster, nodes, days: DAYS, renew: true }).map(|_| ())
}

/// Makes `authority.pem` and `authority.key` if they are not there, and `NODE.pem` and `NODE.key` for each node, with
/// names like `site-ams` and `placement-1`. Keys are readable by their owner only.
///
/// # Errors
/// When a file cannot be read or written, or is of no use; the message names it.
pub fn make(order: &Order<'_>) -> anyhow::Result<Vec<Made>> {
    anyhow::ensure!((1..=DAYS_MAX).contains(&order.days), "--days {}: use 1 to {DAYS_MAX}", order.days);
    fs::create_dir_all(order.directory).with_context(|| order.directory.display().to_string())?;
    let authority = authority(order)?;
    order.nodes.iter().map(|node| certificate(order, node, &authority)).collect()
}

/// The authority of the directory, made if there is none.
fn authority(order: &Order<'_>) -> anyhow::Result<Issuer<'static, KeyPair>> {
    let (path, key_path) = (order.directory.join("authority.pem"), order.directory.join("authority.key"));
    let mut params = valid_for(AUTHORITY_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let name = format!("Limosa development authority of {}", order.cluster);
    params.distinguished_name.push(DnType::CommonName, name);
    match (path.exists(), key_path.exists()) {
        (true, true) => {
            let text = files::read_text(&key_path).with_context(|| key_path.display().to_string())?;
            let key = KeyPair::from_pem(&text)
                .with_context(|| format!("{}: a PEM private key is wanted", key_path.display()))?;
            Ok(Issuer::new(params, key))
        }
        (false, false) => {
            let key = KeyPair::generate()?;
            replace(&key_path, &key.serialize_pem(), 0o600)?;
            let authority = CertifiedIssuer::self_signed(params.clone(), key)?;
            replace(&path, &authority.pem(), 0o644)?;
            Ok(Issuer::new(params, KeyPair::from_pem(&fs::read_to_string(&key_path)?)?))
        }
        (there, _) => {
            let (has, lacks) = if there { (&path, &key_path) } else { (&key_path, &path) };
            anyhow::bail!(
                "{} is there, but not {}: nothing can be added to this authority; use another directory, or put the \
                 file there",
                has.display(),
                lacks.display()
            )
        }
    }
}

fn certificate(
    order: &Order<'_>,
    node: &NodeName,
    authority: &Issuer<'static, KeyPair>,
) -> anyhow::Result<Made> {
    let stem = order.directory.join(file_stem(node));
    let files = Tls {
        cluster: node.cluster.clone(),
        certificate: stem.with_extension("pem"),
        key: stem.with_extension("key"),
        authority: order.directory.join("authority.pem"),
    };
    let path = files.certificate.clone();
    if !order.renew && (path.exists() || files.key.exists()) {
        keys::read(&files, node).context("it is there already and of no use: --renew makes a new one")?;
        return Ok(Made { path, kept: true });
    }
    let mut params = valid_for(order.days);
    params.subject_alt_names.push(SanType::URI(node.to_string().as_str().try_into()?));
    params.distinguished_name.push(DnType::CommonName, node.to_string());
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, authority)?;
    let identity = Identity {
        chain: vec![certificate.der().clone()],
        key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        authority: keys::certificates(&files.authority, "tls.authority")?,
    };
    let now = i64::try_from(wall_ms() / 1_000).unwrap_or(0);
    identity.check(node, now).with_context(|| {
        let (authority, cluster) = (files.authority.display(), order.cluster);
        format!("{authority} is not the development authority of cluster {cluster}: use another directory")
    })?;
    // Whoever reads them meanwhile finds that they do not fit, and reads them again.
    replace(&files.key, &key.serialize_pem(), 0o600)?;
    replace(&path, &certificate.pem(), 0o644)?;
    Ok(Made { path, kept: false })
}

fn valid_for(days: u32) -> CertificateParams {
    let now = i64::try_from(wall_ms() / 1_000).unwrap_or(0);
    let now = OffsetDateTime::from_unix_timestamp(now).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let mut params = CertificateParams::default();
    params.not_before = now - BEFORE;
    params.not_after = now + time::Duration::days(days.into());
    params
}

/// The name of a node's files.
#[must_use]
pub fn file_stem(node: &NodeName) -> String {
    match &node.role {
        transfer::name::Role::Site(name) => format!("site-{name}"),
        transfer::name::Role::Placement(id) => format!("placement-{id}"),
    }
}

/// Writes a file under another name and renames it: it is never seen half written, nor a key readable by others.
fn replace(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let named = || path.display().to_string();
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let _ = fs::remove_file(&beside);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside).with_context(named)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).with_context(named)?;
    fs::rename(&beside, path).with_context(named)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn order<'a>(directory: &'a Path, nodes: &'a [NodeName]) -> Order<'a> {
        Order { directory, cluster: "c", nodes, days: DAYS, renew: false }
    }

    #[test]
    fn a_second_run_keeps_the_authority_and_adds_to_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let nodes = [NodeName::site("c", "ams"), NodeName::site("c", "sin")];
        make(&order(directory.path(), &nodes[..1])).unwrap();
        let before = ["authority.pem", "authority.key", "site-ams.pem", "site-ams.key"].map(read);
        let made = make(&order(directory.path(), &nodes)).unwrap();
        assert_eq!(made.iter().map(|made| made.kept).collect::<Vec<_>>(), [true, false]);
        assert_eq!(["authority.pem", "authority.key", "site-ams.pem", "site-ams.key"].map(read), before);
        // Both chain to the one authority, and a renewed one does too.
        let made = make(&Order { renew: true, ..order(directory.path(), &nodes[..1]) }).unwrap();
        assert!(!made[0].kept);
        assert_ne!(read("site-ams.pem"), before[2]);
        assert_eq!(read("authority.pem"), before[0]);
        for entry in fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            let name = entry.file_name().into_string().unwrap();
            assert!(!name.ends_with(".key") || mode == 0o600, "{name}: {mode:o}");
        }
    }

    #[test]
    fn an_authority_that_cannot_sign_or_is_anothers_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = [NodeName::site("c", "ams")];
        make(&order(directory.path(), &nodes)).unwrap();
        let others = [NodeName::site("d", "ams2")];
        let error = make(&Order { cluster: "d", ..order(directory.path(), &others) }).unwrap_err();
        assert!(error.to_string().contains("not the development authority of cluster d"), "{error:#}");
        assert!(!directory.path().join("site-ams2.pem").exists());
        fs::remove_file(directory.path().join("authority.key")).unwrap();
        let error = make(&order(directory.path(), &nodes)).unwrap_err().to_string();
        assert!(error.contains("authority.pem is there, but not"), "{error}");
    }

    #[test]
    fn days_are_bounded_and_kept_to() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = [NodeName::placement("c", 1)];
        for days in [0, DAYS_MAX + 1] {
            let error = make(&Order { days, ..order(directory.path(), &nodes) }).unwrap_err().to_string();
            assert_eq!(error, format!("--days {days}: use 1 to {DAYS_MAX}"));
        }
        make(&Order { days: 3, ..order(directory.path(), &nodes) }).unwrap();
        let files = Tls {
            cluster: "c".into(),
            certificate: directory.path().join("placement-1.pem"),
            key: directory.path().join("placement-1.key"),
            authority: directory.path().join("authority.pem"),
        };
        let (_, validity) = keys::read(&files, &nodes[0]).unwrap();
        assert_eq!(validity.until - validity.from, 3 * 86_400 + 3_600);
        // What is there and of no use any more is not taken for good.
        let error = keys::read(&files, &NodeName::placement("c", 2)).unwrap_err().to_string();
        assert!(error.contains("placement-1.pem (tls.certificate): it is the certificate of"), "{error}");
    }
}
