//! Where another node is reached: an IP address or a host name, and a port. A name is looked up whenever a connection is
//! made, so that a node that moved is found where it is now.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use transfer::name::NodeName;
use transfer::quic::{Connection, Endpoint, QuicError};

/// Longest wait for a name's addresses: a resolver asks two servers twice in that time, and a dial that waits for more
/// would keep its node from being tried again.
const LOOKUP_BOUND: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried, in the resolver's order: a host has one or two of each family.
const TRIED_MAX: usize = 4;
/// Longest name of a host, and of a part of it between dots (RFC 1035, section 2.3.4).
const NAME_LEN_MAX: usize = 253;
const LABEL_LEN_MAX: usize = 63;

/// An IP address or a host name, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?}: use HOST:PORT, where HOST is an IP address (in brackets if it is IPv6) or a host name, and PORT is 1 to 65535"
)]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        // A sign is no digit of a port.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or_else(wrong)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match (bracketed, host.parse()) {
            (Some(inner), _) => Host::Ip(IpAddr::V6(inner.parse().map_err(|_| wrong())?)),
            (None, Ok(ip @ IpAddr::V4(_))) => Host::Ip(ip),
            (None, Err(_)) if is_host_name(host) => Host::Name(host.to_ascii_lowercase()),
            (None, _) => return Err(wrong()),
        };
        Ok(Self { host, port })
    }
}

/// RFC 1123, section 2.1. What ends in a number would be an IPv4 address that is none.
fn is_host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=LABEL_LEN_MAX).contains(&label.len())
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let numeric = text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= NAME_LEN_MAX && text.split('.').all(label) && !numeric
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Ip(address.ip()), port: address.port() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl Address {
    /// What it stands for now. The system's resolver is asked on a thread of its own, so nothing waits for it but the
    /// caller.
    ///
    /// # Errors
    /// [`QuicError::Lookup`] when a name is unknown, or nobody answers in time.
    pub async fn resolve(&self) -> Result<Vec<SocketAddr>, QuicError> {
        let name = match &self.host {
            Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, self.port)]),
            Host::Name(name) => name,
        };
        let failed = |reason: String| QuicError::Lookup { name: name.clone(), reason };
        let found = tokio::time::timeout(LOOKUP_BOUND, tokio::net::lookup_host((name.as_str(), self.port)));
        let found = found.await.map_err(|_| failed(format!("no answer in {} s", LOOKUP_BOUND.as_secs())))?;
        let found: Vec<_> = found.map_err(|error| failed(error.to_string()))?.take(TRIED_MAX).collect();
        if found.is_empty() { Err(failed("it has no address".to_owned())) } else { Ok(found) }
    }

    /// Connects to the node with this name at what the address stands for now.
    ///
    /// # Errors
    /// [`QuicError`]: the last, if there is more than one address.
    pub async fn connect(&self, endpoint: &Endpoint, name: &NodeName) -> Result<Connection, QuicError> {
        let mut failed = None;
        for address in self.resolve().await? {
            match endpoint.connect(address, name).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| QuicError::Stream("there is no address".to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Result<Address, String> {
        text.parse().map_err(|error: AddressError| error.to_string())
    }

    #[test]
    fn addresses_and_host_names_are_taken_and_written_as_they_were() {
        for text in [
            "127.0.0.1:4001",
            "[2001:db8::1]:4001",
            "localhost:4001",
            "placement-1.example.net:65535",
            "a_b.example:1",
            "3com.example:9",
        ] {
            assert_eq!(address(text).unwrap().to_string(), text);
        }
        assert_eq!(address("Placement.Example:1").unwrap().to_string(), "placement.example:1");
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_would_be_right() {
        let long = format!("{}.example:1", "a".repeat(64));
        for text in [
            "localhost",
            "localhost:",
            "localhost:0",
            "localhost:65536",
            "localhost:+1",
            ":4001",
            "2001:db8::1:4001",
            "[localhost]:1",
            "[::1:1",
            "a b:1",
            "-a:1",
            "a-:1",
            "a..b:1",
            "192.0.2.300:1",
            "1:1",
            "http://a:1",
            &long,
        ] {
            let error = address(text).unwrap_err();
            assert!(error.contains(text) && error.contains("use HOST:PORT"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_name_that_nobody_knows_is_said_with_the_name() {
        let error = address("no-such-host.invalid:1").unwrap().resolve().await.unwrap_err().to_string();
        assert!(error.starts_with("cannot look up no-such-host.invalid: "), "{error}");
    }
}
