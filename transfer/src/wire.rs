//! Move messages on a QUIC stream: a big-endian `u32` length, then a prost message. Field numbers are for ever; unknown
//! ones are ignored, an unknown kind of message is refused.

use prost::Message;

use crate::core::ToSource;
use flow::{Epoch, SiteId, Token};

/// Most bytes of one frame: a chunk and its envelope.
pub const FRAME_LEN_MAX: usize = crate::codec::CHUNK_LEN_MAX + 1_024;
/// Most ingresses that a handover may name: one per site.
const MISSING_MAX: usize = 256;

/// From source to target, before the chunk is decoded.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// See [`crate::core::ToTarget::Offer`].
    Offer {
        /// The copy.
        session: u64,
        /// Flows to make room for.
        flows: u64,
        /// Oldest and newest schema that the source can write.
        schemas: (u16, u16),
    },
    /// See [`crate::core::ToTarget::Chunk`]; `bytes` is for [`crate::codec::Decoder`].
    Chunk {
        /// The copy.
        session: u64,
        /// Its place.
        sequence: u64,
        /// The encoded records.
        bytes: Vec<u8>,
    },
    /// See [`crate::core::ToTarget::Copied`].
    Copied {
        /// The copy.
        session: u64,
        /// Number of chunks.
        chunks: u64,
    },
    /// See [`crate::core::ToTarget::Handover`].
    Handover {
        /// The copy.
        session: u64,
        /// Number of chunks.
        chunks: u64,
        /// The proof.
        token: Token,
        /// Late ingresses.
        missing: Vec<SiteId>,
        /// Microseconds of copying.
        precopy_us: u64,
        /// Rounds of copying.
        rounds: u32,
    },
    /// See [`crate::core::ToTarget::Probe`].
    Probe,
}

/// Why bytes are not a message. The peer is at fault: close the stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not prost, or not this message.
    #[error("message is malformed: {0}")]
    Malformed(String),
    /// A kind that this version does not know.
    #[error("message has no kind that this version knows")]
    UnknownKind,
    /// A value out of range.
    #[error("{field} is {value}, at most {max} is allowed")]
    OutOfRange {
        /// Its name.
        field: &'static str,
        /// Given.
        value: u64,
        /// Limit.
        max: u64,
    },
}

#[derive(Clone, PartialEq, Message)]
struct TargetEnvelope {
    #[prost(oneof = "TargetKind", tags = "1, 2, 3, 4, 5")]
    kind: Option<TargetKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum TargetKind {
    #[prost(message, tag = "1")]
    Offer(OfferWire),
    #[prost(message, tag = "2")]
    Chunk(ChunkWire),
    #[prost(message, tag = "3")]
    Handover(HandoverWire),
    #[prost(bool, tag = "4")]
    Probe(bool),
    #[prost(message, tag = "5")]
    Copied(CopiedWire),
}

#[derive(Clone, PartialEq, Message)]
struct OfferWire {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    flows: u64,
    #[prost(uint32, tag = "3")]
    schema_min: u32,
    #[prost(uint32, tag = "4")]
    schema_max: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ChunkWire {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(bytes = "vec", tag = "3")]
    bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct CopiedWire {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    chunks: u64,
}

#[derive(Clone, PartialEq, Message)]
struct HandoverWire {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    chunks: u64,
    #[prost(uint64, tag = "3")]
    epoch: u64,
    #[prost(uint64, tag = "4")]
    flows: u64,
    #[prost(fixed64, tag = "5")]
    digest: u64,
    #[prost(uint32, repeated, tag = "6")]
    missing: Vec<u32>,
    #[prost(uint64, tag = "7")]
    precopy_us: u64,
    #[prost(uint32, tag = "8")]
    rounds: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SourceEnvelope {
    #[prost(oneof = "SourceKind", tags = "1, 2, 3, 4, 5, 6, 7")]
    kind: Option<SourceKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum SourceKind {
    #[prost(message, tag = "1")]
    Accept(Place),
    #[prost(string, tag = "2")]
    Refuse(String),
    #[prost(message, tag = "3")]
    Ack(Place),
    #[prost(bool, tag = "4")]
    Joined(bool),
    #[prost(uint64, tag = "5")]
    Mismatch(u64),
    #[prost(bool, tag = "6")]
    Unknown(bool),
    #[prost(bool, tag = "7")]
    Alive(bool),
}

#[derive(Clone, PartialEq, Message)]
struct Place {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    next: u64,
}

impl Frame {
    /// The bytes on the wire, without the length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.clone() {
            Self::Offer { session, flows, schemas } => TargetKind::Offer(OfferWire {
                session,
                flows,
                schema_min: schemas.0.into(),
                schema_max: schemas.1.into(),
            }),
            Self::Chunk { session, sequence, bytes } => {
                TargetKind::Chunk(ChunkWire { session, sequence, bytes })
            }
            Self::Handover { session, chunks, token, missing, precopy_us, rounds } => {
                TargetKind::Handover(HandoverWire {
                    session,
                    chunks,
                    epoch: token.epoch.0,
                    flows: token.flows,
                    digest: token.digest,
                    missing: missing.iter().map(|site| site.0.into()).collect(),
                    precopy_us,
                    rounds,
                })
            }
            Self::Copied { session, chunks } => TargetKind::Copied(CopiedWire { session, chunks }),
            Self::Probe => TargetKind::Probe(true),
        };
        TargetEnvelope { kind: Some(kind) }.encode_to_vec()
    }

    /// From the bytes on the wire.
    ///
    /// # Errors
    /// A [`WireError`] that says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let envelope =
            TargetEnvelope::decode(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
        Ok(match envelope.kind.ok_or(WireError::UnknownKind)? {
            TargetKind::Offer(offer) => Self::Offer {
                session: offer.session,
                flows: offer.flows,
                schemas: (schema("schema_min", offer.schema_min)?, schema("schema_max", offer.schema_max)?),
            },
            TargetKind::Chunk(chunk) => {
                Self::Chunk { session: chunk.session, sequence: chunk.sequence, bytes: chunk.bytes }
            }
            TargetKind::Handover(wire) => handover(wire)?,
            TargetKind::Copied(wire) => Self::Copied { session: wire.session, chunks: wire.chunks },
            TargetKind::Probe(_) => Self::Probe,
        })
    }
}

fn schema(field: &'static str, value: u32) -> Result<u16, WireError> {
    let error = WireError::OutOfRange { field, value: value.into(), max: u16::MAX.into() };
    u16::try_from(value).map_err(|_| error)
}

fn handover(wire: HandoverWire) -> Result<Frame, WireError> {
    let too_many = |value| WireError::OutOfRange { field: "missing", value, max: 255 };
    if wire.missing.len() > MISSING_MAX {
        return Err(too_many(wire.missing.len() as u64));
    }
    let site = |&site: &u32| u8::try_from(site).map(SiteId).map_err(|_| too_many(site.into()));
    Ok(Frame::Handover {
        session: wire.session,
        chunks: wire.chunks,
        token: Token { epoch: Epoch(wire.epoch), flows: wire.flows, digest: wire.digest },
        missing: wire.missing.iter().map(site).collect::<Result<_, _>>()?,
        precopy_us: wire.precopy_us,
        rounds: wire.rounds,
    })
}

/// The bytes of an answer, without the length.
#[must_use]
pub fn encode_answer(answer: &ToSource) -> Vec<u8> {
    let kind = match answer.clone() {
        ToSource::Accept { session, next } => SourceKind::Accept(Place { session, next }),
        ToSource::Refuse { reason } => SourceKind::Refuse(reason),
        ToSource::Ack { session, next } => SourceKind::Ack(Place { session, next }),
        ToSource::Joined => SourceKind::Joined(true),
        ToSource::Mismatch { session } => SourceKind::Mismatch(session),
        ToSource::Unknown => SourceKind::Unknown(true),
        ToSource::Alive => SourceKind::Alive(true),
    };
    SourceEnvelope { kind: Some(kind) }.encode_to_vec()
}

/// An answer from the bytes on the wire.
///
/// # Errors
/// A [`WireError`] that says what is wrong.
pub fn decode_answer(bytes: &[u8]) -> Result<ToSource, WireError> {
    let envelope = SourceEnvelope::decode(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
    Ok(match envelope.kind.ok_or(WireError::UnknownKind)? {
        SourceKind::Accept(Place { session, next }) => ToSource::Accept { session, next },
        SourceKind::Refuse(reason) => ToSource::Refuse { reason },
        SourceKind::Ack(Place { session, next }) => ToSource::Ack { session, next },
        SourceKind::Joined(_) => ToSource::Joined,
        SourceKind::Mismatch(session) => ToSource::Mismatch { session },
        SourceKind::Unknown(_) => ToSource::Unknown,
        SourceKind::Alive(_) => ToSource::Alive,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_lead_back(session: u64, n: u64, bytes: Vec<u8>, missing: Vec<u8>) {
            let token = Token { epoch: Epoch(n), flows: session, digest: !n };
            let missing: Vec<_> = missing.into_iter().map(SiteId).collect();
            for frame in [
                Frame::Offer { session, flows: n, schemas: (1, 65_535) },
                Frame::Chunk { session, sequence: n, bytes: bytes.clone() },
                Frame::Handover { session, chunks: n, token, missing: missing.clone(), precopy_us: 5, rounds: 6 },
                Frame::Copied { session, chunks: n },
                Frame::Probe,
            ] {
                prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
            }
        }

        #[test]
        fn answers_lead_back(session: u64, next: u64, reason: String) {
            for answer in [
                ToSource::Accept { session, next },
                ToSource::Refuse { reason: reason.clone() },
                ToSource::Ack { session, next },
                ToSource::Joined,
                ToSource::Mismatch { session },
                ToSource::Unknown,
                ToSource::Alive,
            ] {
                prop_assert_eq!(decode_answer(&encode_answer(&answer)), Ok(answer));
            }
        }

        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Frame::decode(&bytes);
            let _ = decode_answer(&bytes);
        }
    }

    #[test]
    fn a_kind_of_the_future_is_refused() {
        assert_eq!(Frame::decode(&[0x7a, 0]), Err(WireError::UnknownKind));
    }
}
