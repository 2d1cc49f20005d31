//! `limosa dev certs`: a development authority and certificates of nodes. For trying out: the authority's key lies beside the
//! certificates, which a real deployment would not do.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use transfer::name::NodeName;

/// Days that development certificates are good for.
const DAYS: i64 = 30;

/// Writes `authority.pem`, and `NODE.pem` and `NODE.key` for each node, with names like `site-ams` and `placement-1`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path, nodes: &[NodeName]) -> anyhow::Result<()> {
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "Limosa development authority");
    params.not_after = expiry();
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(directory.join("authority.pem"), authority.pem())?;
    for node in nodes {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(node.to_string().as_str().try_into()?));
        params.distinguished_name.push(DnType::CommonName, node.to_string());
        params.not_after = expiry();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &authority)?;
        let stem = file_stem(node);
        fs::write(directory.join(format!("{stem}.pem")), certificate.pem())?;
        write_secret(&directory.join(format!("{stem}.key")), &key.serialize_pem())?;
    }
    Ok(())
}

fn expiry() -> time::OffsetDateTime {
    let now = i64::try_from(crate::clock::wall_ms() / 1_000).unwrap_or(0);
    time::OffsetDateTime::from_unix_timestamp(now + DAYS * 86_400).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

/// The name of a node's files.
#[must_use]
pub fn file_stem(node: &NodeName) -> String {
    match &node.role {
        transfer::name::Role::Site(name) => format!("site-{name}"),
        transfer::name::Role::Placement(id) => format!("placement-{id}"),
    }
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
