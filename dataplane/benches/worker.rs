//! Packets per second of one worker in memory, and flows per second of export and import.
//!
//! Input: 64-byte UDP frames, both directions, flows in random order. The time to copy each frame into a
//! buffer is in it; the frames lie in the order in which they are used, as a driver's ring would.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dataplane::control::{Event, Function, Ordering, Request, ServiceSpec, Timeouts};
use dataplane::{Output, Settings, Worker, packet};
use flow::nat::NatSpec;
use flow::steer::{Side, Tag};
use flow::{Batch, Epoch, GroupId, Micros, MoveId, ServiceId, SiteId};

const PORTS: u16 = 1008;
/// Flows of each client.
const PER_CLIENT: u32 = 64;
const MOVE: MoveId = MoveId(1);

fn group() -> GroupId {
    "1:100.64.0.0/16".parse().expect("a group")
}

fn worker(capacity: usize) -> Worker<Vec<u8>> {
    let settings = Settings { flow_capacity: capacity, ..Settings::default() };
    let mut worker = Worker::new(settings, Micros(0));
    let nat = NatSpec {
        clients: vec!["100.64.0.0/16".parse().expect("a prefix")],
        pool: vec!["198.18.0.0/20".parse().expect("a prefix")],
        ports_per_subscriber: PORTS,
        first_port: 1024,
        port_key: 5,
    };
    let service = ServiceId::new(1).expect("an id");
    let spec = ServiceSpec { service, function: Function::Nat44(nat), timeouts: Timeouts::default() };
    worker.handle(Request::Services(vec![spec]), Micros(0));
    worker
}

fn frame(tag: Tag, from: (u32, u16), to: (u32, u16)) -> Vec<u8> {
    let mut udp = [from.1.to_be_bytes(), to.1.to_be_bytes(), 26u16.to_be_bytes(), [0, 0]].concat();
    udp.extend([0; 18]);
    packet::build_ip(tag, 17, from.0, to.0, &udp)
}

fn client(flow: u32) -> (u32, u16) {
    (0x6440_0000 + flow / PER_CLIENT, 20_000 + (flow % PER_CLIENT) as u16)
}

fn remote(flow: u32) -> (u32, u16) {
    (0xcb00_7100 + flow % 251, 443)
}

/// A worker that serves so many flows, and a frame of each direction of each.
fn filled(flows: u32) -> (Worker<Vec<u8>>, Vec<Vec<u8>>) {
    let mut worker = worker((flows as usize).max(1 << 10));
    worker.handle(Request::Serve { group: group(), epoch: Epoch(1) }, Micros(0));
    let inside = Tag::Direct(Side::Inside, SiteId(0));
    let outside = Tag::Direct(Side::Outside, SiteId(0));
    let mut frames = Vec::new();
    let mut out = Output::default();
    for flow in 0..flows {
        let packet = frame(inside, client(flow), remote(flow));
        frames.push(packet.clone());
        worker.burst(&mut vec![packet], Micros(0), &mut out);
        let sent = out.tx.pop().expect("translated");
        let port = u16::from_be_bytes([sent[packet::IP + 20], sent[packet::IP + 21]]);
        let address =
            u32::from_be_bytes(sent[packet::IP + 12..packet::IP + 16].try_into().expect("four bytes"));
        frames.push(frame(outside, remote(flow), (address, port)));
    }
    (worker, frames)
}

fn shuffled(len: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    let mut state = 88_172_645_463_325_252u64;
    for at in (1..len).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(at, (state % (at as u64 + 1)) as usize);
    }
    order
}

/// Bursts of 32 through the worker; buffers are used again, as a driver would.
fn forward(c: &mut Criterion) {
    let mut bench = c.benchmark_group("forward");
    for flows in [1_000u32, 100_000, 1_000_000] {
        let (mut worker, frames) = filled(flows);
        let order = shuffled(frames.len());
        let frames: Vec<[u8; 64]> =
            order.iter().map(|at| frames[*at as usize][..].try_into().expect("64 bytes")).collect();
        let mut at = 0;
        let mut out = Output::default();
        let mut spare: Vec<Vec<u8>> = (0..32).map(|_| Vec::with_capacity(2048)).collect();
        let mut burst = Vec::with_capacity(32);
        bench.throughput(Throughput::Elements(32));
        bench.bench_function(BenchmarkId::from_parameter(flows), |b| {
            b.iter(|| {
                for _ in 0..32 {
                    let mut packet = spare.pop().expect("a buffer");
                    packet.clear();
                    packet.extend_from_slice(&frames[at]);
                    at = (at + 1) % frames.len();
                    burst.push(packet);
                }
                worker.burst(&mut burst, Micros(1), &mut out);
                spare.append(&mut out.tx);
                spare.append(&mut out.free);
            });
        });
    }
    bench.finish();
}

fn exported(worker: &mut Worker<Vec<u8>>) -> Vec<Batch> {
    worker.handle(
        Request::CopyStart { group: group(), move_id: MOVE, session: 0, credit: u64::MAX },
        Micros(1),
    );
    let mut out = Output::default();
    let mut batches = Vec::new();
    loop {
        worker.slice(Micros(1), &mut out);
        while let Some(event) = worker.poll_event() {
            if let Event::Records { batch, .. } = event {
                batches.push(batch);
            } else if let Event::RoundEnd { .. } = event {
                return batches;
            }
        }
    }
}

fn moves(c: &mut Criterion) {
    const FLOWS: u32 = 200_000;
    let (mut source, _) = filled(FLOWS);
    let mut bench = c.benchmark_group("move");
    bench.sample_size(10);
    bench.throughput(Throughput::Elements(u64::from(FLOWS)));
    bench.bench_function("export", |b| b.iter(|| exported(&mut source).len()));
    let batches = exported(&mut source);
    bench.bench_function("import", |b| {
        b.iter_batched(
            || {
                let mut target = worker(FLOWS as usize);
                target.handle(
                    Request::Prepare {
                        group: group(),
                        move_id: MOVE,
                        epoch: Epoch(2),
                        source: SiteId(0),
                        flows: u64::from(FLOWS),
                        ordering: Ordering::Strict,
                    },
                    Micros(0),
                );
                (target, batches.clone())
            },
            |(mut target, batches)| {
                let mut out = Output::default();
                for (sequence, batch) in (0..).zip(batches) {
                    target.handle(
                        Request::Install { group: group(), move_id: MOVE, sequence, batch, more: false },
                        Micros(0),
                    );
                    while target.wait() == dataplane::worker::Wait::Now {
                        target.slice(Micros(0), &mut out);
                    }
                }
                assert_eq!(target.counters().flows, u64::from(FLOWS));
                target
            },
            BatchSize::PerIteration,
        );
    });
    bench.finish();
}

criterion_group!(benches, forward, moves);
criterion_main!(benches);
