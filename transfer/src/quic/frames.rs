//! Frames on a stream: a big-endian `u32` length, then that many bytes.

use std::sync::Arc;
use std::time::Duration;

use quinn::{RecvStream, SendStream};
use tokio::sync::OwnedSemaphorePermit;

use super::listener::Seat;
use super::{Outcome, QuicError, code, stream_error};

/// Longest wait for the next bytes of a frame that has begun: far longer than any loss is repaired in.
const STALL_BOUND: Duration = Duration::from_secs(30);
/// Longest wait for memory that other frames of the same peer hold. It has to end: the peer's unread bytes may be what
/// those frames wait for.
const MEMORY_BOUND: Duration = Duration::from_secs(2);

/// Both directions of a stream.
#[derive(Debug)]
pub struct Frames {
    /// Outgoing.
    pub sender: FrameSender,
    /// Incoming.
    pub receiver: FrameReceiver,
}

/// Outgoing frames.
#[derive(Debug)]
pub struct FrameSender(SendStream);

/// Incoming frames.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    max: usize,
    /// Of a stream that a peer has opened: its frames count towards what the peer may have in memory.
    seat: Option<Arc<Seat>>,
    /// For the frame that is being read or was given last.
    memory: Option<OwnedSemaphorePermit>,
}

impl Frames {
    /// Ends a stream that broke a rule of its kind, in both directions.
    pub fn refuse(mut self) {
        let _ = self.sender.0.reset(code::STREAM_REFUSED);
        self.receiver.refuse();
    }
}

impl FrameSender {
    pub(super) fn new(stream: SendStream) -> Self {
        Self(stream)
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// [`QuicError::Stream`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), QuicError> {
        let len = u32::try_from(bytes.len()).map_err(stream_error)?;
        self.0.write_all(&len.to_be_bytes()).await.map_err(stream_error)?;
        self.0.write_all(bytes).await.map_err(stream_error)
    }

    /// Says that nothing more will come.
    pub fn finish(&mut self) {
        let _ = self.0.finish();
    }

    /// Ends a stream that broke a rule of its kind.
    pub fn refuse(&mut self) {
        let _ = self.0.reset(code::STREAM_REFUSED);
    }
}

impl FrameReceiver {
    pub(super) fn new(stream: RecvStream, max: usize, seat: Option<Arc<Seat>>) -> Self {
        Self { stream, max, seat, memory: None }
    }

    /// The next frame; `None` at the end of the stream. It counts towards the peer's memory until the next call. Memory
    /// is taken as bytes come, whatever length is stated.
    ///
    /// # Errors
    /// [`QuicError::Stream`], and [`QuicError::FrameTooLong`] before anything is read.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, QuicError> {
        self.memory = None;
        let mut len = [0; 4];
        match self.stream.read_exact(&mut len).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(stream_error(error)),
        }
        let len = u32::from_be_bytes(len) as usize;
        if len > self.max {
            self.refuse();
            return Err(QuicError::FrameTooLong { len, max: self.max });
        }
        self.reserve(len).await?;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let read = self.stream.read_chunk(len - bytes.len(), true);
            let Ok(read) = tokio::time::timeout(STALL_BOUND, read).await else {
                self.refuse();
                return Err(QuicError::Stream(format!("a frame stalled for {} s", STALL_BOUND.as_secs())));
            };
            let chunk = read.map_err(stream_error)?;
            let chunk = chunk.ok_or_else(|| QuicError::Stream("it ended within a frame".into()))?;
            bytes.extend_from_slice(&chunk.bytes);
        }
        Ok(Some(bytes))
    }

    async fn reserve(&mut self, len: usize) -> Result<(), QuicError> {
        let Some(seat) = self.seat.clone() else { return Ok(()) };
        match tokio::time::timeout(MEMORY_BOUND, seat.reserve(len)).await {
            Ok(permit) => self.memory = permit,
            Err(_) => {
                self.refuse();
                return Err(QuicError::Stream("the peer's frames take all memory that it may have".into()));
            }
        }
        Ok(())
    }

    fn refuse(&mut self) {
        let _ = self.stream.stop(code::STREAM_REFUSED);
        if let Some(seat) = &self.seat {
            seat.counts().add(Outcome::StreamRefused);
        }
    }
}
