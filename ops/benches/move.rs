//! Time to move a group of 100 k and 1 M flows, cold, over loopback QUIC: a worker core exports, the codec encodes, QUIC
//! carries, the codec decodes, another worker core imports and checks the digest. No packets meanwhile. Two threads do the
//! work of two sites, so the figure is for one core pair.

#![allow(clippy::wildcard_enum_match_arm, reason = "of a worker's events a benchmark needs few")]

use std::sync::mpsc;

use dataplane::control::{Event, Function, Ordering, Request, ServiceSpec, Timeouts};
use dataplane::worker::{Output, Settings, Worker};
use flow::nat::NatSlices;
use flow::{Batch, Epoch, GroupId, Micros, MoveId, SiteId, Token, WorkerId};
use limosa::certs;
use limosa::clock::Clock;
use limosa::config::Tls;
use limosa::keys;
use transfer::codec::{ChunkHeader, Decoder, Encoder};
use transfer::name::NodeName;
use transfer::quic::{Endpoint, Limits, StreamKind};
use transfer::wire::FRAME_LEN_MAX;

const RUNS: usize = 5;
const CHUNK: usize = 16_384;
/// Chunks that wait between two steps.
const QUEUED: usize = 1_024;
const MOVE: MoveId = MoveId(1);
const EPOCH: Epoch = Epoch(2);

struct Site {
    worker: Worker<Vec<u8>>,
    group: GroupId,
}

impl Site {
    fn new(site: u8, slices: &NatSlices, flows: usize) -> Self {
        let settings = Settings {
            site: SiteId(site),
            worker: WorkerId(1),
            flow_capacity: flows + flows / 8,
            hold_packets_max: 1_024,
            hold_bytes_max: 64 << 20,
            keys: [1, 2],
            boot: 1,
            ..Settings::default()
        };
        let group = GroupId { service: 1.try_into().expect("a service"), prefix: slices.spec().clients[0] };
        let mut worker = Worker::new(settings, Micros(0));
        worker.agent_connected();
        let function = Function::Nat44(slices.spec().clone());
        let service = ServiceSpec { service: group.service, function, timeouts: Timeouts::default() };
        worker.handle(Request::Services(vec![service]), Micros(0));
        let mut site = Self { worker, group };
        site.events();
        site
    }

    fn ask(&mut self, request: Request) {
        self.worker.handle(request, Micros(0));
    }

    /// Runs slices until nothing more comes out.
    fn events(&mut self) -> Vec<Event> {
        let mut output = Output::default();
        let mut events = Vec::new();
        let mut idle = 0;
        while idle < 3 {
            self.worker.slice(Micros(0), &mut output);
            let before = events.len();
            events.extend(std::iter::from_fn(|| self.worker.poll_event()));
            idle = if events.len() == before { idle + 1 } else { 0 };
        }
        events
    }

    fn prepare(&mut self, flows: usize) {
        let (group, source) = (self.group, SiteId(1));
        let flows = flows as u64;
        self.ask(Request::Prepare {
            group,
            move_id: MOVE,
            epoch: EPOCH,
            source,
            flows,
            ordering: Ordering::Strict,
        });
        self.events();
    }

    fn install(&mut self, sequence: u64, batch: Batch) {
        Request::install(self.group, MOVE, sequence, &batch).into_iter().for_each(|piece| self.ask(piece));
        while !self.events().iter().any(|event| matches!(event, Event::Installed { .. })) {}
    }

    fn join(&mut self, token: Token) {
        let (missing, late_bound_us, cut_bound_us) = (Vec::new(), 0, 0);
        self.ask(Request::Join {
            group: self.group,
            move_id: MOVE,
            token,
            missing,
            late_bound_us,
            cut_bound_us,
        });
        loop {
            for event in self.events() {
                match event {
                    Event::Joined { .. } => return,
                    Event::Mismatch { have, .. } => panic!("the tables differ: {have:?} and {token:?}"),
                    _ => {}
                }
            }
        }
    }
}

/// A source that owns so many flows: it got them by a move itself.
fn source(slices: &NatSlices, flows: usize) -> Site {
    let mut site = Site::new(1, slices, flows);
    site.prepare(flows);
    let records = flow::sample::flows(slices, flows, 1);
    let mut token = Token { epoch: EPOCH, flows: records.len() as u64, digest: 0 };
    for (sequence, chunk) in records.chunks(4_096).enumerate() {
        token.digest = chunk.iter().fold(token.digest, |sum, record| sum.wrapping_add(record.digest()));
        site.install(sequence as u64, Batch { upserts: chunk.to_vec(), removals: Vec::new() });
    }
    site.join(token);
    site
}

struct Done {
    micros: u64,
    bytes: usize,
}

fn run(
    runtime: &tokio::runtime::Runtime,
    ends: &(Endpoint, Endpoint),
    slices: &NatSlices,
    flows: usize,
) -> Done {
    let mut from = source(slices, flows);
    let mut to = Site::new(2, slices, flows);
    let clock = Clock::start();
    to.prepare(flows);
    let (encoded, to_send) = tokio::sync::mpsc::channel::<Vec<u8>>(QUEUED);
    let (received, to_decode) = mpsc::sync_channel::<Vec<u8>>(QUEUED);
    runtime.spawn(carry(ends.clone(), to_send, received));
    let exporting = std::thread::spawn({
        let slices = slices.clone();
        move || export(&mut from, &slices, &encoded)
    });
    let mut decoder = Decoder::new().expect("zstd");
    let (mut sequence, mut bytes) = (0, 0);
    while let Ok(chunk) = to_decode.recv() {
        if chunk.is_empty() {
            break;
        }
        bytes += chunk.len();
        to.install(sequence, decoder.decode(&chunk, Some(slices)).expect("it decodes").1);
        sequence += 1;
    }
    to.join(exporting.join().expect("the source is well"));
    Done { micros: clock.now().0, bytes }
}

/// Exports everything, cuts at once, and gives the token.
fn export(from: &mut Site, slices: &NatSlices, out: &tokio::sync::mpsc::Sender<Vec<u8>>) -> Token {
    let (group, target) = (from.group, SiteId(2));
    from.ask(Request::CopyStart { group, move_id: MoveId(2), session: 0, credit: u64::MAX });
    let mut encoder = Encoder::new().expect("zstd");
    let mut pending = Batch::default();
    let mut sequence = 0;
    let mut flush = |pending: &mut Batch| {
        let header = ChunkHeader { group, epoch: EPOCH.next(), sequence };
        sequence += 1;
        let chunk = encoder.encode(&header, &mut std::mem::take(pending), Some(slices)).expect("it encodes");
        let _ = out.blocking_send(chunk);
    };
    let mut armed = false;
    loop {
        let mut output = Output::default();
        from.worker.slice(Micros(0), &mut output);
        while let Some(event) = from.worker.poll_event() {
            match event {
                Event::Records { batch, .. } => {
                    pending.upserts.extend(batch.upserts);
                    if pending.len() >= CHUNK {
                        flush(&mut pending);
                    }
                }
                Event::RoundEnd { .. } if !armed => {
                    armed = true;
                    let (move_id, epoch, awaited) = (MoveId(2), EPOCH.next(), Vec::new());
                    let (bound_us, credit) = (0, u64::MAX);
                    from.ask(Request::Arm {
                        group,
                        move_id,
                        epoch,
                        target,
                        awaited,
                        bound_us,
                        session: 0,
                        credit,
                        again: false,
                    });
                }
                Event::Cut { token, .. } => {
                    flush(&mut pending);
                    let _ = out.blocking_send(Vec::new());
                    return Token { epoch: EPOCH, ..token };
                }
                _ => {}
            }
        }
    }
}

async fn carry(
    (from, to): (Endpoint, Endpoint),
    mut chunks: tokio::sync::mpsc::Receiver<Vec<u8>>,
    received: mpsc::SyncSender<Vec<u8>>,
) {
    let address = to.local_address().expect("it is bound");
    let accepting = tokio::spawn(async move {
        let connection = to.listen().accept().await.expect("a peer");
        let stream = connection.accept().await.expect("a stream");
        let (_, mut frames) = stream.begin(FRAME_LEN_MAX).await.expect("its kind");
        while let Ok(Some(chunk)) = frames.receiver.next().await {
            let last = chunk.is_empty();
            if received.send(chunk).is_err() || last {
                break;
            }
        }
        connection
    });
    let connection = from.connect(address, &NodeName::site("bench", "b")).await.expect("a connection");
    let mut frames = connection.open(StreamKind::Move, FRAME_LEN_MAX).await.expect("a stream");
    while let Some(chunk) = chunks.recv().await {
        frames.sender.send(&chunk).await.expect("it goes");
    }
    frames.sender.finish();
    let _ = accepting.await;
}

fn endpoints(directory: &std::path::Path) -> (Endpoint, Endpoint) {
    let nodes = [NodeName::site("bench", "a"), NodeName::site("bench", "b")];
    certs::write(directory, &nodes).expect("certificates");
    let end = |node: &NodeName| {
        let stem = directory.join(certs::file_stem(node));
        let tls = Tls {
            cluster: "bench".into(),
            certificate: stem.with_extension("pem"),
            key: stem.with_extension("key"),
            authority: directory.join("authority.pem"),
        };
        let listen = "127.0.0.1:0".parse().expect("an address");
        keys::endpoint(listen, &tls, node, Limits::site()).expect("an endpoint").0
    };
    (end(&nodes[0]), end(&nodes[1]))
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn main() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let directory = tempfile::tempdir().expect("a directory");
    let ends = {
        let _inside = runtime.enter();
        endpoints(directory.path())
    };
    for flows in [100_000, 1_000_000] {
        let slices = flow::sample::service((flows / 40 + 1) as u32).expect("a legal service");
        let mut runs: Vec<_> = (0..RUNS).map(|_| run(&runtime, &ends, &slices, flows)).collect();
        runs.sort_by_key(|run| run.micros);
        let (least, median, most) = (&runs[0], &runs[RUNS / 2], &runs[RUNS - 1]);
        println!(
            "move of {flows} flows over loopback QUIC: {:.3} s (median of {RUNS}; {:.3} to {:.3}), {:.2} bytes per flow",
            median.micros as f64 / 1e6,
            least.micros as f64 / 1e6,
            most.micros as f64 / 1e6,
            median.bytes as f64 / flows as f64,
        );
    }
}
