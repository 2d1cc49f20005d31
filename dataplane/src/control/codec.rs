//! Frames of the control socket: a little-endian `u32` length and that many bytes of postcard.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MESSAGE_LEN_MAX;

/// Bytes of the length.
const HEADER_LEN: usize = 4;

/// Why a stream cannot be read on: end the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The length is above the bound.
    #[error("a message of {0} bytes is above {MESSAGE_LEN_MAX}")]
    TooLong(usize),
    /// The bytes are no message of this version.
    #[error("a message cannot be decoded: {0}")]
    Decode(postcard::Error),
    /// The message cannot be encoded.
    #[error("a message cannot be encoded: {0}")]
    Encode(postcard::Error),
}

/// A message as a frame.
///
/// # Errors
/// [`CodecError::TooLong`] and [`CodecError::Encode`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes = postcard::to_extend(message, bytes).map_err(CodecError::Encode)?;
    let len = bytes.len() - HEADER_LEN;
    match u32::try_from(len) {
        Ok(short) if len <= MESSAGE_LEN_MAX => bytes[..HEADER_LEN].copy_from_slice(&short.to_le_bytes()),
        _ => return Err(CodecError::TooLong(len)),
    }
    Ok(bytes)
}

/// Splits a stream into messages.
#[derive(Debug)]
pub struct FrameDecoder<T> {
    bytes: Vec<u8>,
    at: usize,
    message: PhantomData<fn() -> T>,
}

impl<T> Default for FrameDecoder<T> {
    fn default() -> Self {
        Self { bytes: Vec::new(), at: 0, message: PhantomData }
    }
}

impl<T: DeserializeOwned> FrameDecoder<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes of the stream. Take the messages out before adding more: that bounds the memory.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// [`CodecError::TooLong`] and [`CodecError::Decode`].
    #[expect(clippy::should_implement_trait, reason = "an iterator ends at None, this goes on")]
    pub fn next(&mut self) -> Result<Option<T>, CodecError> {
        let rest = &self.bytes[self.at..];
        let Some(header) = rest.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let len = u32::from_le_bytes(*header) as usize;
        if len > MESSAGE_LEN_MAX {
            return Err(CodecError::TooLong(len));
        }
        let Some(body) = rest.get(HEADER_LEN..HEADER_LEN + len) else { return Ok(None) };
        let message = postcard::from_bytes(body).map_err(CodecError::Decode)?;
        self.at += HEADER_LEN + len;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Request;

    #[test]
    fn messages_come_out_whole_whatever_the_pieces() {
        let mut stream = encode(&Request::Status).unwrap();
        stream.extend(encode(&Request::Stats).unwrap());
        let mut decoder = FrameDecoder::<Request>::new();
        let mut got = Vec::new();
        for byte in stream {
            decoder.push(&[byte]);
            got.extend(decoder.next().unwrap());
        }
        assert_eq!(got, [Request::Status, Request::Stats]);
    }

    #[test]
    fn a_length_above_the_bound_is_refused_before_its_bytes_come() {
        let mut decoder = FrameDecoder::<Request>::new();
        decoder.push(&(MESSAGE_LEN_MAX as u32 + 1).to_le_bytes());
        assert_eq!(decoder.next(), Err(CodecError::TooLong(MESSAGE_LEN_MAX + 1)));
    }
}
