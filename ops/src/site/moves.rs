//! Streams of moves over QUIC: records are encoded and decoded here, off the agent's task.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flow::{Batch, MoveId, SiteId};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use transfer::codec::{self, ChunkHeader, Decoder, Encoder};
use transfer::core::{MoveSpec, ToSource, ToTarget};
use transfer::name::Role;
use transfer::quic::{Connection, FrameReceiver, FrameSender, Frames, Listener, Notices, StreamKind};
use transfer::wire::{FRAME_LEN_MAX, Frame, decode_answer, encode_answer};

use super::core::Input;
use super::metrics::SiteMetrics;
use super::shell::Slices;
use crate::clock::Clock;
use crate::net::Link;

/// Between two attempts to open a stream.
const RETRY: Duration = Duration::from_millis(200);
/// How long a stream waits for a connection that is being made, before the agent hears that there is none.
const CONNECTION_WAIT: Duration = Duration::from_secs(2);

/// Answers that may wait for one stream. There is one per chunk or offer, and a source that reads none is one that hangs.
const ANSWERS_MAX: usize = 1_024;
/// Messages that may wait for one stream: as many chunks are a group of 60 million flows. A target that reads none of
/// them is one that hangs, and its stream is made anew.
const MESSAGES_MAX: usize = 4_096;
/// How long a stream of a move may take to say of which.
const NUMBER_BOUND: Duration = Duration::from_secs(5);

/// Answers to sources, by move and site. A move names its two sites: nobody else is answered about it.
#[derive(Clone, Default)]
pub struct Incoming(Arc<Mutex<Registry>>);

#[derive(Default)]
struct Registry {
    /// The sites of the configuration, by the name of their certificate.
    peers: BTreeMap<SiteId, String>,
    /// The sites that placement knows, once it was heard. A certificate outlives its site.
    sites: Option<BTreeMap<SiteId, String>>,
    /// The site that gives the group away, of each move to here that is known.
    sources: BTreeMap<MoveId, SiteId>,
    streams: BTreeMap<(MoveId, SiteId), mpsc::Sender<ToSource>>,
}

impl Registry {
    fn check(&self, id: MoveId, peer: SiteId) -> Result<(), Refused> {
        self.check_site(peer)?;
        match self.sources.get(&id) {
            Some(&source_site) if source_site != peer => Err(Refused::NotTheSource { id, source_site, peer }),
            Some(_) | None => Ok(()),
        }
    }

    /// Number and name, since the number of a site that was removed may be another's.
    fn check_site(&self, peer: SiteId) -> Result<(), Refused> {
        let name = self.peers.get(&peer).ok_or(Refused::NoPeer { peer })?;
        match &self.sites {
            Some(sites) if sites.get(&peer) != Some(name) => {
                Err(Refused::NoSite { peer, name: name.clone() })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Streams of those who may not speak any more end.
    fn forget_refused(&mut self) {
        let mut streams = std::mem::take(&mut self.streams);
        streams.retain(|(id, peer), _| self.check(*id, *peer).is_ok());
        self.streams = streams;
    }
}

/// Why a site may not speak about a move.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The move is not from it.
    #[error("move {id} is from site {source_site}, not from site {peer}")]
    NotTheSource {
        /// The move.
        id: MoveId,
        /// Where it is from.
        source_site: SiteId,
        /// Who spoke.
        peer: SiteId,
    },
    /// It is not among the peers of the configuration, or not any more.
    #[error("site {peer} is not among the peers in the configuration of this site")]
    NoPeer {
        /// Its number.
        peer: SiteId,
    },
    /// It is no site, or none any more.
    #[error("placement knows no site {peer} with the name {name}: it was removed, or is not added yet")]
    NoSite {
        /// Its number in the configuration.
        peer: SiteId,
        /// Its name there, and in its certificate.
        name: String,
    },
}

impl Incoming {
    fn lock(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no move comes in.
    pub fn is_empty(&self) -> bool {
        self.lock().streams.is_empty()
    }

    /// Of peers with these names.
    #[must_use]
    pub fn new(peers: BTreeMap<SiteId, String>) -> Self {
        Self(Arc::new(Mutex::new(Registry { peers, ..Registry::default() })))
    }

    /// These are the moves to here and their sources, and all sites, by the committed state. Streams of others end.
    pub fn learn(&self, sources: BTreeMap<MoveId, SiteId>, sites: BTreeMap<SiteId, String>) {
        let mut registry = self.lock();
        registry.sources = sources;
        registry.sites = Some(sites);
        registry.forget_refused();
    }

    /// These are the peers from now on. Streams of others end, also of one whose number another has now.
    pub fn set_peers(&self, peers: BTreeMap<SiteId, String>) {
        let mut registry = self.lock();
        let before = std::mem::replace(&mut registry.peers, peers);
        let mut streams = std::mem::take(&mut registry.streams);
        streams.retain(|(_, peer), _| registry.peers.get(peer) == before.get(peer));
        registry.streams = streams;
    }

    /// The peer whose certificate has this name.
    fn peer_of(&self, name: &str) -> Option<SiteId> {
        let registry = self.lock();
        let mut peers = registry.peers.iter();
        peers.find_map(|(site, known)| (known == name).then_some(*site))
    }

    /// Whether a site may speak about a move: placement knows it, and it is the source, or the move is not known here yet.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn check(&self, id: MoveId, peer: SiteId) -> Result<(), Refused> {
        self.lock().check(id, peer)
    }

    /// Sends an answer to a site on its newest stream of a move; if there is none, the source will ask again. A stream
    /// with too many answers ends, and the source makes a new one.
    pub fn answer(&self, id: MoveId, peer: SiteId, message: ToSource) {
        let mut registry = self.lock();
        if let Some(stream) = registry.streams.get(&(id, peer))
            && stream.try_send(message).is_err()
        {
            registry.streams.remove(&(id, peer));
        }
    }

    /// The site that has to be answered about a move: its source, by the committed state.
    #[must_use]
    pub fn source(&self, id: MoveId) -> Option<SiteId> {
        self.lock().sources.get(&id).copied()
    }

    /// Registers a stream for answers, in the place of the peer's former one.
    fn open(&self, id: MoveId, peer: SiteId) -> Result<mpsc::Receiver<ToSource>, Refused> {
        let (sender, queue) = mpsc::channel(ANSWERS_MAX);
        let mut registry = self.lock();
        registry.check(id, peer)?;
        registry.streams.insert((id, peer), sender);
        Ok(queue)
    }

    /// Forgets a stream that has ended, unless a newer one has taken its place.
    fn close(&self, id: MoveId, peer: SiteId) {
        let mut registry = self.lock();
        if registry.streams.get(&(id, peer)).is_some_and(mpsc::Sender::is_closed) {
            registry.streams.remove(&(id, peer));
        }
    }
}

/// A bucket of bytes that all moves from this site share. It holds a tenth of a second, so that a small move never waits.
pub struct RateLimit {
    bytes_per_s: AtomicU64,
    clock: Clock,
    free_at_us: Mutex<u64>,
}

impl RateLimit {
    /// A limit.
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.into(), clock: Clock::start(), free_at_us: Mutex::new(0) }
    }

    /// Another limit for what is booked from now on.
    pub fn set(&self, bytes_per_s: u64) {
        self.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
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
        *free_at = start + bytes * 1_000_000 / self.bytes_per_s.load(Ordering::Relaxed);
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
    /// Told when messages had no room: the stream is made anew, and the machines agree again on what is there.
    pub overflow: Arc<Notify>,
}

/// The agent's end of a stream to a target; dropping it ends the stream.
pub struct Stream {
    messages: mpsc::Sender<ToTarget>,
    overflow: Arc<Notify>,
    task: AbortHandle,
}

impl Stream {
    /// Starts to keep a stream open. `outgoing` gets what tells it that there was no room.
    #[must_use]
    pub fn start(outgoing: impl FnOnce(Arc<Notify>) -> Outgoing) -> Self {
        let (messages, queue) = mpsc::channel(MESSAGES_MAX);
        let overflow = Arc::new(Notify::new());
        let task = tokio::spawn(outgoing(overflow.clone()).run(queue)).abort_handle();
        Self { messages, overflow, task }
    }

    /// Sends a message; never waits.
    pub fn send(&self, message: ToTarget) {
        if self.messages.try_send(message).is_err() {
            self.overflow.notify_one();
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Outgoing {
    /// Keeps a stream open and carries messages both ways, for as long as it is let.
    async fn run(self, mut messages: mpsc::Receiver<ToTarget>) {
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

    async fn talk(&self, messages: &mut mpsc::Receiver<ToTarget>) -> anyhow::Result<()> {
        let connection = self.link.ready(CONNECTION_WAIT).await?;
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
        tokio::select! {
            result = write => result,
            result = read => result,
            () = self.overflow.notified() => anyhow::bail!("{MESSAGES_MAX} messages wait for the target"),
        }
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
            ToTarget::Copied { session, chunks } => Frame::Copied { session, chunks },
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
    mut listener: Listener,
    incoming: Incoming,
    inputs: mpsc::Sender<Input>,
    slices: watch::Receiver<Slices>,
) {
    let notices = Arc::new(Notices::default());
    while let Some(connection) = listener.accept().await {
        let Role::Site(name) = &connection.peer().role else {
            connection.refuse("this is the agent of a site, which only agents of other sites connect to");
            continue;
        };
        let Some(site) = incoming.peer_of(name) else {
            connection.refuse("it is not among the peers in the configuration of this site");
            continue;
        };
        let receiver = Receiver {
            site,
            name: name.clone(),
            incoming: incoming.clone(),
            inputs: inputs.clone(),
            slices: slices.clone(),
            notices: notices.clone(),
        };
        tokio::spawn(receiver.streams(connection));
    }
}

/// The target's end of all moves from one site.
#[derive(Clone)]
struct Receiver {
    site: SiteId,
    /// Of its certificate.
    name: String,
    incoming: Incoming,
    inputs: mpsc::Sender<Input>,
    slices: watch::Receiver<Slices>,
    notices: Arc<Notices>,
}

impl Receiver {
    async fn streams(self, connection: Connection) {
        while let Ok(stream) = connection.accept().await {
            let receiver = self.clone();
            // At most as many at once as a peer may have streams.
            tokio::spawn(async move {
                match stream.begin(FRAME_LEN_MAX).await {
                    Ok((StreamKind::Move, frames)) => receiver.stream(frames).await,
                    Ok((StreamKind::Call, frames)) => frames.refuse(),
                    Err(error) => tracing::debug!(site = %receiver.site, %error, "a stream did not begin"),
                }
            });
        }
    }

    async fn stream(self, frames: Frames) {
        // The configuration may have changed since the connection came.
        if self.incoming.peer_of(&self.name) != Some(self.site) {
            tracing::debug!(site = %self.site, name = self.name, "a stream of a site that is no peer any more is refused");
            return frames.refuse();
        }
        if let Err(error) = self.talk(frames).await {
            if error.is::<Refused>() {
                // A source tries again several times a second.
                if let Some(kept_back) = self.notices.due(&error.to_string()) {
                    tracing::warn!(site = %self.site, %error, kept_back, "a stream is refused");
                }
            } else {
                tracing::debug!(site = %self.site, %error, "the stream of a move ended");
            }
        }
    }

    async fn talk(&self, mut frames: Frames) -> anyhow::Result<()> {
        let first = tokio::time::timeout(NUMBER_BOUND, frames.receiver.next()).await;
        let Ok(Ok(Some(Ok(id)))) = first.map(|first| first.map(|first| first.map(<[u8; 8]>::try_from)))
        else {
            frames.refuse();
            anyhow::bail!("a stream of a move starts with its number");
        };
        let id = MoveId(u64::from_be_bytes(id));
        let answers = match self.incoming.open(id, self.site) {
            Ok(answers) => answers,
            Err(error) => {
                frames.refuse();
                return Err(error.into());
            }
        };
        let Frames { sender, mut receiver } = frames;
        let result = tokio::select! {
            result = write_answers(sender, answers) => result,
            result = self.read(id, &mut receiver) => result,
        };
        self.incoming.close(id, self.site);
        result
    }

    async fn read(&self, move_id: MoveId, receiver: &mut FrameReceiver) -> anyhow::Result<()> {
        while let Some(bytes) = receiver.next().await? {
            let wire_len = bytes.len() as u64;
            let message = self.decode(bytes).await?;
            self.incoming.check(move_id, self.site)?;
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
            Frame::Copied { session, chunks } => ToTarget::Copied { session, chunks },
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

/// Until there are none any more: then another stream has taken the place of this one, or it is refused.
async fn write_answers(mut sender: FrameSender, mut queue: mpsc::Receiver<ToSource>) -> anyhow::Result<()> {
    while let Some(answer) = queue.recv().await {
        sender.send(&encode_answer(&answer)).await?;
    }
    sender.refuse();
    anyhow::bail!("nobody answers on this stream any more")
}

#[cfg(test)]
mod tests {
    use super::*;

    use transfer::name::NodeName;
    use transfer::quic::{Endpoint, Limits};

    const MOVE: MoveId = MoveId(7);
    const SOURCE: SiteId = SiteId(1);
    const THIRD: SiteId = SiteId(3);

    fn sites(ids: &[SiteId]) -> BTreeMap<SiteId, String> {
        let name = |id: &SiteId| if *id == SOURCE { "source" } else { "third" }.to_owned();
        ids.iter().map(|id| (*id, name(id))).collect()
    }

    #[tokio::test]
    async fn answers_about_a_move_go_to_its_source_and_to_nobody_else() {
        let incoming = Incoming::new(sites(&[SOURCE, THIRD]));
        // Before the move is known here anybody may ask, and is answered alone.
        let mut third = incoming.open(MOVE, THIRD).unwrap();
        let mut source = incoming.open(MOVE, SOURCE).unwrap();
        incoming.answer(MOVE, SOURCE, ToSource::Unknown);
        assert_eq!(source.recv().await, Some(ToSource::Unknown));
        assert!(third.try_recv().is_err());
        // Once it is, the other's stream ends, and it gets no new one.
        incoming.learn(BTreeMap::from([(MOVE, SOURCE)]), sites(&[SOURCE, THIRD]));
        assert_eq!(third.recv().await, None);
        let refused = incoming.open(MOVE, THIRD).unwrap_err();
        assert_eq!(refused.to_string(), "move 7 is from site 1, not from site 3");
        assert_eq!(incoming.source(MOVE), Some(SOURCE));
        incoming.answer(MOVE, SOURCE, ToSource::Joined);
        assert_eq!(source.recv().await, Some(ToSource::Joined));
    }

    #[tokio::test]
    async fn a_source_that_reads_no_answers_is_disconnected_and_may_come_again() {
        let incoming = Incoming::new(sites(&[SOURCE]));
        let mut queue = incoming.open(MOVE, SOURCE).unwrap();
        (0..=ANSWERS_MAX).for_each(|_| incoming.answer(MOVE, SOURCE, ToSource::Joined));
        let mut answers = 0;
        while queue.recv().await.is_some() {
            answers += 1;
        }
        assert_eq!(answers, ANSWERS_MAX);
        assert!(incoming.open(MOVE, SOURCE).is_ok());
    }

    struct Sites {
        endpoints: BTreeMap<&'static str, Endpoint>,
        _directory: tempfile::TempDir,
    }

    impl Sites {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let nodes = ["source", "target", "third"].map(|name| (name, NodeName::site("c", name)));
            crate::certs::write(directory.path(), &nodes.clone().map(|(_, node)| node)).unwrap();
            let endpoint = |(name, node): (&'static str, NodeName)| {
                let stem = directory.path().join(crate::certs::file_stem(&node));
                let tls = crate::config::Tls {
                    cluster: "c".into(),
                    certificate: stem.with_extension("pem"),
                    key: stem.with_extension("key"),
                    authority: directory.path().join("authority.pem"),
                };
                let listen = "127.0.0.1:0".parse().unwrap();
                (name, crate::keys::endpoint(listen, &tls, &node, Limits::site()).unwrap().0)
            };
            Self { endpoints: nodes.into_iter().map(endpoint).collect(), _directory: directory }
        }

        /// A stream from a site to the target that says that it is of the move.
        async fn open(&self, from: &str) -> (Connection, Frames) {
            let address = self.endpoints["target"].local_address().unwrap();
            let target = NodeName::site("c", "target");
            let connection = self.endpoints[from].connect(address, &target).await.unwrap();
            let mut frames = connection.open(StreamKind::Move, FRAME_LEN_MAX).await.unwrap();
            frames.sender.send(&MOVE.0.to_be_bytes()).await.unwrap();
            (connection, frames)
        }
    }

    #[tokio::test]
    async fn a_third_site_that_opens_a_stream_with_the_number_of_others_move_is_refused() {
        let network = Sites::new();
        let incoming = Incoming::new(sites(&[SOURCE, THIRD]));
        incoming.learn(BTreeMap::from([(MOVE, SOURCE)]), sites(&[SOURCE, THIRD]));
        let (inputs, mut queue) = mpsc::channel(8);
        let (_slices, slices) = watch::channel(Slices::default());
        let listener = network.endpoints["target"].listen();
        tokio::spawn(accept(listener, incoming.clone(), inputs, slices));

        let (_connection, mut source) = network.open("source").await;
        let offer = Frame::Offer { session: 1, flows: 0, schemas: (codec::SCHEMA_MIN, codec::SCHEMA) };
        source.sender.send(&offer.encode()).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Input::FromSource { from: SOURCE, .. })));

        let (connection, mut third) = network.open("third").await;
        let refused = third.receiver.next().await;
        assert!(refused.is_err(), "{refused:?}");
        assert!(!connection.is_closed());
        let _ = third.sender.send(&offer.encode()).await;

        incoming.answer(MOVE, SOURCE, ToSource::Joined);
        let answer = source.receiver.next().await.unwrap().unwrap();
        assert_eq!(decode_answer(&answer).unwrap(), ToSource::Joined);
        assert!(queue.try_recv().is_err(), "nothing of the third site's came through");
    }

    /// What it may have said before placement was heard ends too.
    #[tokio::test]
    async fn a_stream_of_a_site_that_placement_does_not_know_is_refused() {
        let network = Sites::new();
        let incoming = Incoming::new(sites(&[SOURCE, THIRD]));
        let (inputs, mut queue) = mpsc::channel(8);
        let (_slices, slices) = watch::channel(Slices::default());
        tokio::spawn(accept(network.endpoints["target"].listen(), incoming.clone(), inputs, slices));
        let offer = Frame::Offer { session: 1, flows: 0, schemas: (codec::SCHEMA_MIN, codec::SCHEMA) };

        // Nothing was heard of placement yet.
        let (_first, mut before) = network.open("source").await;
        before.sender.send(&offer.encode()).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Input::FromSource { from: SOURCE, .. })));

        incoming.learn(BTreeMap::new(), sites(&[THIRD]));
        let ended = before.receiver.next().await;
        assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
        let refused = incoming.check(MOVE, SOURCE).unwrap_err().to_string();
        assert_eq!(
            refused,
            "placement knows no site 1 with the name source: it was removed, or is not added yet"
        );
        let (connection, mut after) = network.open("source").await;
        let ended = after.receiver.next().await;
        assert!(ended.is_err(), "{ended:?}");
        assert!(!connection.is_closed());
        assert!(queue.try_recv().is_err());

        // Another site has its number.
        let other = BTreeMap::from([(SOURCE, "bergen".to_owned())]);
        incoming.learn(BTreeMap::new(), other);
        assert!(incoming.check(MOVE, SOURCE).is_err());
        // It is added again.
        incoming.learn(BTreeMap::new(), sites(&[SOURCE, THIRD]));
        let (_third, mut again) = network.open("source").await;
        again.sender.send(&offer.encode()).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Input::FromSource { from: SOURCE, .. })));
    }

    #[tokio::test]
    async fn a_peer_that_the_configuration_takes_away_may_not_speak_and_one_that_it_adds_may() {
        let network = Sites::new();
        let incoming = Incoming::new(sites(&[SOURCE]));
        let (inputs, mut queue) = mpsc::channel(8);
        let (_slices, slices) = watch::channel(Slices::default());
        tokio::spawn(accept(network.endpoints["target"].listen(), incoming.clone(), inputs, slices));
        let offer = Frame::Offer { session: 1, flows: 0, schemas: (codec::SCHEMA_MIN, codec::SCHEMA) };
        let (connection, mut source) = network.open("source").await;
        source.sender.send(&offer.encode()).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Input::FromSource { from: SOURCE, .. })));

        // Its number is another's now.
        incoming.set_peers(BTreeMap::from([(SOURCE, "bergen".to_owned()), (THIRD, "third".to_owned())]));
        assert!(source.receiver.next().await.is_err(), "its stream ends");
        let mut again = connection.open(StreamKind::Move, FRAME_LEN_MAX).await.unwrap();
        let _ = again.sender.send(&MOVE.0.to_be_bytes()).await;
        let _ = again.sender.send(&offer.encode()).await;
        assert!(again.receiver.next().await.is_err(), "it gets no other by the connection that it has");
        assert!(queue.try_recv().is_err());

        let (_third, mut third) = network.open("third").await;
        third.sender.send(&offer.encode()).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Input::FromSource { from: THIRD, .. })));
        incoming.set_peers(BTreeMap::new());
        assert_eq!(incoming.check(MOVE, THIRD), Err(Refused::NoPeer { peer: THIRD }));
    }

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
