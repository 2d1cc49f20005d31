//! Bytes per flow, and flows per second encoded and decoded on one core. The input is `flow::sample`.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use flow::{Batch, Epoch};
use transfer::codec::{ChunkHeader, Decoder, Encoder};

/// Records per chunk, as the move protocol sends them.
const CHUNK: usize = 16_384;

fn batches(flows: usize) -> (flow::nat::NatSlices, Vec<Batch>) {
    let subscribers = u32::try_from(flows / 40 + 1).expect("a small number");
    let slices = flow::sample::service(subscribers).expect("a legal service");
    let mut records = flow::sample::flows(&slices, flows, 1);
    // A worker exports a group in the order of its flows' age, which is none; chunks are runs of that.
    records.sort_by_key(|record| record.digest());
    let batches = records.chunks(CHUNK).map(|chunk| Batch { upserts: chunk.to_vec(), removals: Vec::new() });
    (slices, batches.collect())
}

fn header() -> ChunkHeader {
    ChunkHeader { group: "1:100.64.0.0/16".parse().expect("a group"), epoch: Epoch(2), sequence: 0 }
}

fn codec(criterion: &mut Criterion) {
    for flows in [1_000, 10_000, 100_000] {
        let (slices, batches) = batches(flows);
        let mut encoder = Encoder::new().expect("zstd");
        let mut encode =
            |batch: &mut Batch| encoder.encode(&header(), batch, Some(&slices)).expect("it encodes");
        let chunks: Vec<_> = batches.iter().map(|batch| encode(&mut batch.clone())).collect();
        let bytes: usize = chunks.iter().map(Vec::len).sum();
        #[expect(clippy::print_stdout, reason = "a figure of the benchmark")]
        {
            println!("{flows} flows: {:.2} bytes per flow", bytes as f64 / flows as f64);
        }
        let mut group = criterion.benchmark_group(format!("{flows} flows"));
        group.throughput(Throughput::Elements(flows as u64)).sample_size(20);
        group.bench_function("encode", |bencher| {
            let run =
                |mut batches: Vec<Batch>| batches.iter_mut().map(&mut encode).map(|c| c.len()).sum::<usize>();
            bencher.iter_batched(|| batches.clone(), run, BatchSize::LargeInput);
        });
        let mut decoder = Decoder::new().expect("zstd");
        group.bench_function("decode", |bencher| {
            bencher.iter(|| {
                let mut decode =
                    |chunk: &Vec<u8>| decoder.decode(chunk, Some(&slices)).expect("it decodes").1.len();
                chunks.iter().map(&mut decode).sum::<usize>()
            });
        });
        group.finish();
    }
}

criterion_group!(benches, codec);
criterion_main!(benches);
