//! Streams of moves over QUIC: records are encoded and decoded here, off the agent's task.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flow::{Batch, MoveId, SiteId};
use tokio::sync::{mpsc, watch};
use transfer::codec::{self, ChunkHeader, Decoder, Encoder};
use transfer::core::{MoveSpec, ToSource, ToTarget};
use transfer::name::Role;
use transfer::quic::{Connection, Endpoint, FrameReceiver, FrameSender, Frames, StreamKind};
use transfer::wire::{FRAME_LEN_MAX, Frame, decode_answer, encode_answer};

use super::core::Input;
use super::metrics::SiteMetrics;
use super::shell::Slices;
use crate::clock::Clock;
use crate::net::Link;

/// Between two attempts to open a stream.
const RETRY: Duration = Duration::from_millis(200);

/// Answers to sources, by move.
#[derive(Clone, Default)]
pub struct Incoming(Arc<Mutex<BTreeMap<MoveId, mpsc::UnboundedSender<ToSource>>>>);

impl Incoming {
    /// Whether no move comes in.
    pub fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Sends an answer on the newest stream of a move; if there is none, the source will ask again.
    pub fn answer(&self, id: MoveId, message: ToSource) {
        let streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.get(&id) {
            let _ = stream.send(message);
        }
    }

    fn open(&self, id: MoveId, sender: mpsc::UnboundedSender<ToSource>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
    }

    fn close(&self, id: MoveId, sender: &mpsc::UnboundedSender<ToSource>) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.get(&id).is_some_and(|held| held.same_channel(sender)) {
            streams.remove(&id);
        }
    }
}

/// A bucket of bytes that all moves from this site share. It holds a tenth of a second, so that a small move never waits.
pub struct RateLimit {
    bytes_per_s: u64,
    clock: Clock,
    free_at_us: Mutex<u64>,
}

impl RateLimit {
    /// A limit.
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, clock: Clock::start(), free_at_us: Mutex::new(0) }
    }

    /// Waits until so many bytes may go.
    pub async fn take(&self, bytes: usize) {
        let wait = self.book(bytes as u64, self.clock.now().0);
        if wait > 0 {
            tokio::time::sleep(Duration::from_micros(wait)).await;
        }
    }

    /// Books the bytes and says how long to wait, in microseconds.
    fn book(&self, bytes: u64, now: u64) -> u64 {
        let mut free_at = self.free_at_us.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*free_at).max(now.saturating_sub(100_000));
        *free_at = start + bytes * 1_000_000 / self.bytes_per_s;
        start.saturating_sub(now)
    }
}

/// The source's end of one move.
pub struct Outgoing {
    /// The move.
    pub spec: MoveSpec,
    /// To the target's site.
    pub link: Arc<Link>,
    /// To the agent.
    pub inputs: mpsc::Sender<Input>,
    /// For the codec.
    pub slices: watch::Receiver<Slices>,
    /// Shared by all moves.
    pub rate: Arc<RateLimit>,
    /// Counts bytes.
    pub metrics: Arc<SiteMetrics>,
}

impl Outgoing {
    /// Keeps a stream open and carries messages both ways, for as long as it is let.
    pub async fn run(self, mut messages: mpsc::UnboundedReceiver<ToTarget>) {
        loop {
            match self.talk(&mut messages).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(group = %self.spec.group, %error, "the stream of a move broke"),
            }
            if self.inputs.send(Input::PeerDown(self.spec.id)).await.is_err() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn talk(&self, messages: &mut mpsc::UnboundedReceiver<ToTarget>) -> anyhow::Result<()> {
        let connection = self.link.get().await?;
        let Frames { mut sender, mut receiver } = connection.open(StreamKind::Move, FRAME_LEN_MAX).await?;
        sender.send(&self.spec.id.0.to_be_bytes()).await?;
        // What was said on the former stream is said again when the target accepts.
        while messages.try_recv().is_ok() {}
        self.inputs.send(Input::PeerUp(self.spec.id)).await?;
        let write = async {
            while let Some(message) = messages.recv().await {
                let bytes = self.encode(message).await?;
                self.rate.take(bytes.len()).await;
                sender.send(&bytes).await?;
            }
            anyhow::Ok(())
        };
        let read = async {
            while let Some(bytes) = receiver.next().await? {
                self.inputs.send(Input::FromTarget(self.spec.id, decode_answer(&bytes)?)).await?;
            }
            anyhow::bail!("the target closed the stream")
        };
        tokio::select! { result = write => result, result = read => result }
    }

    async fn encode(&self, message: ToTarget) -> anyhow::Result<Vec<u8>> {
        let frame = match message {
            ToTarget::Offer { session, flows } => {
                Frame::Offer { session, flows, schemas: (codec::SCHEMA_MIN, codec::SCHEMA) }
            }
            ToTarget::Handover { session, chunks, token, missing, precopy_us, rounds } => {
                Frame::Handover { session, chunks, token, missing, precopy_us, rounds }
            }
            ToTarget::Chunk { session, sequence, batch } => {
                let bytes = self.encode_chunk(sequence, batch).await?;
                Frame::Chunk { session, sequence, bytes }
            }
            ToTarget::Probe => Frame::Probe,
        };
        Ok(frame.encode())
    }

    async fn encode_chunk(&self, sequence: u64, batch: Arc<Batch>) -> anyhow::Result<Vec<u8>> {
        let slices = self.slices.borrow().clone();
        let header = ChunkHeader { group: self.spec.group, epoch: self.spec.epoch, sequence };
        let flows = batch.upserts.len() as u64;
        let encode = move || {
            let mut batch = Batch::clone(&batch);
            let mut encoder = Encoder::new()?;
            anyhow::Ok(encoder.encode(&header, &mut batch, slices.get(&header.group.service))?)
        };
        // A small delta is encoded in less time than it takes to change threads, and packets wait for it.
        let bytes = if flows <= 512 { encode()? } else { tokio::task::spawn_blocking(encode).await?? };
        self.metrics.sent(flows, bytes.len() as u64);
        Ok(bytes)
    }
}

/// Accepts connections of peer sites and the streams of their moves.
pub async fn accept(
    endpoint: Endpoint,
    sites: BTreeMap<String, SiteId>,
    incoming: Incoming,
    inputs: mpsc::Sender<Input>,
    slices: watch::Receiver<Slices>,
) {
    while let Some(connection) = endpoint.accept().await {
        let Role::Site(name) = &connection.peer().role else { continue };
        let Some(&site) = sites.get(name) else {
            tracing::warn!(name, "a site connected that is not among the peers of the configuration");
            continue;
        };
        let receiver =
            Receiver { site, incoming: incoming.clone(), inputs: inputs.clone(), slices: slices.clone() };
        tokio::spawn(receiver.streams(connection));
    }
}

/// The target's end of all moves from one site.
#[derive(Clone)]
struct Receiver {
    site: SiteId,
    incoming: Incoming,
    inputs: mpsc::Sender<Input>,
    slices: watch::Receiver<Slices>,
}

impl Receiver {
    async fn streams(self, connection: Connection) {
        while let Ok((kind, frames)) = connection.accept(FRAME_LEN_MAX).await {
            if kind == StreamKind::Move {
                tokio::spawn(self.clone().stream(frames));
            }
        }
    }

    async fn stream(self, frames: Frames) {
        if let Err(error) = self.talk(frames).await {
            tracing::debug!(site = %self.site, %error, "the stream of a move ended");
        }
    }

    async fn talk(&self, frames: Frames) -> anyhow::Result<()> {
        let Frames { sender, mut receiver } = frames;
        let first = receiver.next().await?.unwrap_or_default();
        let id =
            first.try_into().map_err(|_| anyhow::anyhow!("a stream of a move starts with its number"))?;
        let id = MoveId(u64::from_be_bytes(id));
        let (answers, queue) = mpsc::unbounded_channel();
        self.incoming.open(id, answers.clone());
        let result = tokio::select! {
            result = write_answers(sender, queue) => result,
            result = self.read(id, &mut receiver) => result,
        };
        self.incoming.close(id, &answers);
        result
    }

    async fn read(&self, move_id: MoveId, receiver: &mut FrameReceiver) -> anyhow::Result<()> {
        while let Some(bytes) = receiver.next().await? {
            let wire_len = bytes.len() as u64;
            let message = self.decode(bytes).await?;
            self.inputs.send(Input::FromSource { move_id, from: self.site, message, wire_len }).await?;
        }
        Ok(())
    }

    async fn decode(&self, bytes: Vec<u8>) -> anyhow::Result<ToTarget> {
        Ok(match Frame::decode(&bytes)? {
            Frame::Offer { session, flows, schemas: (oldest, _) } => {
                anyhow::ensure!(
                    oldest <= codec::SCHEMA,
                    "the source writes schema {oldest} or newer, this site reads up to {}",
                    codec::SCHEMA
                );
                ToTarget::Offer { session, flows }
            }
            Frame::Handover { session, chunks, token, missing, precopy_us, rounds } => {
                ToTarget::Handover { session, chunks, token, missing, precopy_us, rounds }
            }
            Frame::Probe => ToTarget::Probe,
            Frame::Chunk { session, sequence, bytes } => {
                let batch = Arc::new(self.decode_chunk(bytes).await?);
                ToTarget::Chunk { session, sequence, batch }
            }
        })
    }

    async fn decode_chunk(&self, bytes: Vec<u8>) -> anyhow::Result<Batch> {
        let slices = self.slices.borrow().clone();
        let small = bytes.len() <= 8 << 10;
        let decode = move || {
            // Which service's slices predict the ports is in the header, which the decoder checks again.
            let service = bytes.get(6).and_then(|&id| flow::ServiceId::new(id).ok());
            let slices = service.and_then(|service| slices.get(&service));
            anyhow::Ok(Decoder::new()?.decode(&bytes, slices)?.1)
        };
        if small { decode() } else { tokio::task::spawn_blocking(decode).await? }
    }
}

async fn write_answers(
    mut sender: FrameSender,
    mut queue: mpsc::UnboundedReceiver<ToSource>,
) -> anyhow::Result<()> {
    while let Some(answer) = queue.recv().await {
        sender.send(&encode_answer(&answer)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_limit_lets_a_small_move_pass_and_spreads_a_large_one() {
        let limit = RateLimit::new(1_000_000);
        let now = 1_000_000;
        assert_eq!(limit.book(100_000, now), 0);
        assert_eq!(limit.book(500_000, now), 0);
        assert_eq!(limit.book(1, now), 500_000);
        assert_eq!(limit.book(1, now + 2_000_000), 0);
    }
}
