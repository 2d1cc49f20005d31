//! The names of nodes, as certificates state them: `limosa://CLUSTER/site/NAME` and `limosa://CLUSTER/placement/ID`.

use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;

/// One node of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName {
    /// The cluster.
    pub cluster: String,
    /// The node.
    pub role: Role,
}

/// What a node is, and so what it may say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The agent of the site with this name.
    Site(String),
    /// The placement node with this number.
    Placement(u64),
}

/// A text that names no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no node: limosa://CLUSTER/site/NAME or limosa://CLUSTER/placement/ID is wanted")]
pub struct NameError(pub String);

/// Why a certificate names no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateNameError {
    /// Not X.509.
    #[error("certificate cannot be parsed")]
    Parse,
    /// The number of URI names is not one (SPIFFE X.509-SVID, section 2: exactly one).
    #[error("certificate has {0} URI names, exactly one is wanted")]
    Count(usize),
    /// The one URI is something else.
    #[error(transparent)]
    Name(#[from] NameError),
}

impl NodeName {
    /// A site's agent.
    #[must_use]
    pub fn site(cluster: &str, name: &str) -> Self {
        Self { cluster: cluster.to_owned(), role: Role::Site(name.to_owned()) }
    }

    /// A placement node.
    #[must_use]
    pub fn placement(cluster: &str, id: u64) -> Self {
        Self { cluster: cluster.to_owned(), role: Role::Placement(id) }
    }

    /// The name in a certificate. CN, DNS and IP names are not looked at.
    ///
    /// # Errors
    /// [`CertificateNameError`].
    pub fn of_certificate(der: &[u8]) -> Result<Self, CertificateNameError> {
        let (_, certificate) =
            x509_parser::parse_x509_certificate(der).map_err(|_| CertificateNameError::Parse)?;
        let names = certificate.subject_alternative_name().map_err(|_| CertificateNameError::Parse)?;
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let uri = |name: &GeneralName<'_>| {
            if let GeneralName::URI(uri) = name { Some(uri.to_string()) } else { None }
        };
        let mut uris = names.iter().filter_map(uri);
        match (uris.next(), uris.count()) {
            (Some(uri), 0) => Ok(uri.parse()?),
            (first, more) => Err(CertificateNameError::Count(usize::from(first.is_some()) + more)),
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.role {
            Role::Site(name) => write!(f, "limosa://{}/site/{name}", self.cluster),
            Role::Placement(id) => write!(f, "limosa://{}/placement/{id}", self.cluster),
        }
    }
}

/// Whether a text may be a cluster's or a site's name: it becomes part of a URI, a file name and a metric label.
#[must_use]
pub fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
}

impl FromStr for NodeName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError(text.to_owned());
        let rest = text.strip_prefix("limosa://").ok_or_else(error)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(kind), Some(node), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(error());
        };
        let role = match kind {
            "site" if is_label(node) => Role::Site(node.to_owned()),
            "placement" => Role::Placement(node.parse().map_err(|_| error())?),
            _ => return Err(error()),
        };
        if is_label(cluster) { Ok(Self { cluster: cluster.to_owned(), role }) } else { Err(error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(uris: &[&str]) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["limosa".to_owned()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(rcgen::SanType::URI((*uri).try_into().unwrap()));
        }
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn names_lead_back_and_others_are_refused() {
        for text in ["limosa://c/site/ams", "limosa://prod-1/placement/3"] {
            assert_eq!(text.parse::<NodeName>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "limosa://c/site/",
            "limosa:///site/a",
            "limosa://c/site/a/b",
            "limosa://c/placement/x",
            "https://c/site/a",
            "limosa://c/admin/a",
            "limosa://C/site/a",
        ] {
            assert!(text.parse::<NodeName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_certificate_has_exactly_one_uri_name() {
        let name = "limosa://c/site/ams";
        assert_eq!(NodeName::of_certificate(&certificate(&[name])), Ok(NodeName::site("c", "ams")));
        let error = |uris: &[&str]| NodeName::of_certificate(&certificate(uris)).unwrap_err();
        assert_eq!(error(&[]), CertificateNameError::Count(0));
        assert_eq!(error(&[name, "limosa://c/site/sin"]), CertificateNameError::Count(2));
        assert!(matches!(error(&["https://example.org/"]), CertificateNameError::Name(_)));
        assert_eq!(NodeName::of_certificate(b"junk"), Err(CertificateNameError::Parse));
    }
}
