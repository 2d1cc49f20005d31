//! Bytes between nodes, agents and disks.
//!
//! Every message is a prost envelope: a version, the features that a reader must know, and a body of named
//! fields (JSON), so that releases can be mixed: unknown fields of the envelope are skipped, an unknown
//! feature or command refuses the message. Lengths are bounded before anything is decoded.

use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::core::Cluster;
use crate::pack::{self, PackError};

/// The version that this code writes.
pub const VERSION: u32 = 1;
/// The groups of a cluster are in a table beside the body.
pub(crate) const GROUPS_BESIDE: u64 = 1;
/// Features that this code knows, one per bit.
const FEATURES: u64 = GROUPS_BESIDE;
/// The longest message that a peer or client may send.
pub const MESSAGE_LEN_MAX: usize = 16 << 20;
/// The longest snapshot.
pub const SNAPSHOT_LEN_MAX: usize = 1 << 30;

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Envelope {
    /// Grows when old readers could misread the body.
    #[prost(uint32, tag = "1")]
    version: u32,
    /// What the reader must know, one bit each.
    #[prost(uint64, tag = "2")]
    critical: u64,
    #[prost(bytes = "bytes", tag = "3")]
    body: Bytes,
    /// Bytes that are not for the body's format.
    #[prost(bytes = "bytes", tag = "4")]
    attached: Bytes,
}

/// A field beside those of the envelope, which skips it: which process of a node speaks.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Run {
    #[prost(uint64, tag = "5")]
    run: u64,
}

/// A message, and which process of its node says it.
pub(crate) fn with_run(message: &Bytes, run: u64) -> Bytes {
    let run = Run { run };
    let mut bytes = Vec::with_capacity(message.len() + run.encoded_len());
    bytes.extend_from_slice(message);
    bytes.extend(run.encode_to_vec());
    bytes.into()
}

/// Which process of its node says a message; nothing if it does not tell.
pub(crate) fn run_of(message: &Bytes) -> Option<u64> {
    let run = Run::decode(message.clone()).ok()?.run;
    (run != 0).then_some(run)
}

/// Why bytes were refused. The connection they came on is no use any more; a disk record is lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than allowed.
    #[error("message has {len} bytes, {max} are allowed")]
    TooLong {
        /// What came.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// Not an envelope.
    #[error("not an envelope: {0}")]
    Envelope(String),
    /// A later version.
    #[error("message of version {got}, this node knows up to {known}: upgrade it")]
    Version {
        /// What came.
        got: u32,
        /// What is known.
        known: u32,
    },
    /// Features that this code does not know.
    #[error("message needs features {0:#x} that this node does not know: upgrade it")]
    Critical(u64),
    /// The body is not what it should be.
    #[error("bad body: {0}")]
    Body(String),
    /// The table of groups beside it is not.
    #[error(transparent)]
    Groups(#[from] PackError),
}

/// Bytes of a value.
///
/// # Panics
/// Never for the types of this package: none of them has a map with keys that are not texts.
#[must_use]
pub fn encode<T: Serialize>(value: &T) -> Bytes {
    encode_with(value, Bytes::new())
}

/// Bytes of a value, with others beside it.
pub(crate) fn encode_with<T: Serialize>(value: &T, attached: Bytes) -> Bytes {
    encode_needing(value, attached, 0)
}

/// Bytes of a value that makes no sense without the table of groups beside it.
pub(crate) fn encode_with_groups<T: Serialize>(value: &T, groups: Bytes) -> Bytes {
    encode_needing(value, groups, GROUPS_BESIDE)
}

fn encode_needing<T: Serialize>(value: &T, attached: Bytes, critical: u64) -> Bytes {
    let body = serde_json::to_vec(value).expect("types of this package have a JSON form");
    Envelope { version: VERSION, critical, body: body.into(), attached }.encode_to_vec().into()
}

/// Bytes of the whole state; its groups as a table beside the body, some bytes for each.
#[must_use]
pub fn encode_cluster(cluster: &Cluster) -> Bytes {
    encode_with_groups(&cluster.without_groups(), pack::pack(&cluster.groups))
}

/// The state of bytes, also of those of releases that had groups in the body.
///
/// # Errors
/// [`WireError`]; arbitrary bytes never panic.
pub fn decode_cluster(bytes: Bytes) -> Result<Cluster, WireError> {
    let (mut cluster, beside): (Cluster, Bytes) = decode_with(bytes, SNAPSHOT_LEN_MAX)?;
    if !beside.is_empty() {
        cluster.groups = pack::unpack(&beside)?;
    }
    Ok(cluster)
}

/// The value of bytes.
///
/// # Errors
/// [`WireError`]; arbitrary bytes never panic.
pub fn decode<T: DeserializeOwned>(bytes: Bytes, len_max: usize) -> Result<T, WireError> {
    decode_with(bytes, len_max).map(|(value, _)| value)
}

/// The value of bytes, and what was beside it.
pub(crate) fn decode_with<T: DeserializeOwned>(
    bytes: Bytes,
    len_max: usize,
) -> Result<(T, Bytes), WireError> {
    if bytes.len() > len_max {
        return Err(WireError::TooLong { len: bytes.len(), max: len_max });
    }
    let envelope = Envelope::decode(bytes).map_err(|error| WireError::Envelope(error.to_string()))?;
    if envelope.version == 0 || envelope.version > VERSION {
        return Err(WireError::Version { got: envelope.version, known: VERSION });
    }
    if envelope.critical & !FEATURES != 0 {
        return Err(WireError::Critical(envelope.critical & !FEATURES));
    }
    let value = serde_json::from_slice(&envelope.body).map_err(|error| WireError::Body(error.to_string()))?;
    Ok((value, envelope.attached))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Change, Command, Proposal};
    use flow::{MoveId, SiteId};
    use proptest::prelude::*;

    fn proposal() -> Proposal {
        let command = Command::Switch { move_id: MoveId(u64::MAX), by: SiteId(3) };
        Proposal { actor: "site a".into(), at_ms: 7, command }
    }

    #[test]
    fn a_later_version_or_unknown_feature_is_refused_with_its_number() {
        let body = Bytes::from(serde_json::to_vec(&proposal()).unwrap());
        let read = |version, critical| {
            let bytes =
                Envelope { version, critical, body: body.clone(), attached: Bytes::new() }.encode_to_vec();
            decode::<Proposal>(bytes.into(), MESSAGE_LEN_MAX)
        };
        assert_eq!(read(1, 0), Ok(proposal()));
        assert_eq!(read(2, 0), Err(WireError::Version { got: 2, known: 1 }));
        assert_eq!(read(1, 4), Err(WireError::Critical(4)));
        assert!(matches!(
            decode::<Proposal>(encode(&proposal()), 10),
            Err(WireError::TooLong { max: 10, .. })
        ));
    }

    #[test]
    fn a_snapshot_has_its_groups_beside_and_those_of_earlier_releases_are_read() {
        let prefix = "100.64.0.0/24".parse().unwrap();
        let id = flow::GroupId { service: flow::ServiceId::new(1).unwrap(), prefix };
        let (owner, epoch) = (SiteId(3), flow::Epoch(2));
        let group = crate::core::Group { id, owner, epoch, move_id: None, changed: 9, standby: None };
        let cluster = Cluster { revision: 9, groups: [(id, group)].into(), ..Cluster::default() };
        let earlier = encode(&cluster);
        assert_eq!(decode_cluster(earlier).unwrap(), cluster);
        let now = encode_cluster(&cluster);
        // Who does not know of the table must not take the state for one without groups.
        assert_eq!(Envelope::decode(now.clone()).unwrap().critical, GROUPS_BESIDE);
        assert_eq!(decode_cluster(now).unwrap(), cluster);
    }

    #[test]
    fn an_unknown_command_is_refused() {
        let body = br#"{"actor":"x","at_ms":1,"command":{"explode":{}}}"#;
        let bytes =
            Envelope { version: 1, critical: 0, body: Bytes::from_static(body), attached: Bytes::new() }
                .encode_to_vec();
        assert!(matches!(decode::<Proposal>(bytes.into(), 1000), Err(WireError::Body(_))));
    }

    #[test]
    fn who_does_not_know_of_processes_reads_a_message_all_the_same() {
        let beside = Bytes::from_static(b"beside");
        let plain = encode_with(&proposal(), beside.clone());
        assert_eq!(run_of(&plain), None);
        let said = with_run(&plain, u64::MAX);
        assert_eq!(run_of(&said), Some(u64::MAX));
        assert_eq!(decode_with::<Proposal>(said, MESSAGE_LEN_MAX), Ok((proposal(), beside)));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>, body: Vec<u8>) {
            let _ = run_of(&bytes.clone().into());
            let _ = decode::<Proposal>(bytes.into(), MESSAGE_LEN_MAX);
            let bytes = Envelope { version: 1, critical: 0, body: body.into(), attached: Bytes::new() }.encode_to_vec();
            let _ = decode_cluster(Bytes::from(bytes.clone()));
            let _ = decode::<Vec<Change>>(bytes.into(), MESSAGE_LEN_MAX);
        }

        #[test]
        fn damaged_bytes_never_panic(at: prop::sample::Index, with: u8) {
            let mut bytes = encode(&proposal()).to_vec();
            let at = at.index(bytes.len());
            bytes[at] = with;
            let _ = decode::<Proposal>(bytes.into(), MESSAGE_LEN_MAX);
        }
    }
}
