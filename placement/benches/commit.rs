//! Commits of three nodes in one process, redb on disk, messages in memory.
//!
//! And the snapshot of a million groups, whose bytes are printed: neighbours of sixteen at one of 100 sites, a quarter of the
//! groups moved since, each at another time.
//!
//! `one`: a command, awaited: latency. `many`: 256 in flight at a time: throughput, in commands per second.

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::{Group, put_site};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flow::sample::Seeded;
use flow::{Epoch, GroupId, Prefix, ServiceId, SiteId};
use placement::core::{Cluster, Command};
use placement::node::Node;
use placement::wire;

const IN_FLIGHT: u64 = 256;

async fn write(node: &Node, alive: bool) {
    let command = Command::SetAlive { site: SiteId(1), alive };
    node.propose("bench", command).await.expect("a quorum");
}

fn commits(c: &mut Criterion) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let group = runtime.block_on(Group::of_three());
    let leader = runtime.block_on(async { group.node(group.leader().await) });
    runtime.block_on(leader.propose("bench", put_site(1))).expect("a quorum");

    let mut bench = c.benchmark_group("commit/3-nodes");
    bench.sample_size(20).measurement_time(Duration::from_secs(5));
    bench.throughput(Throughput::Elements(1));
    bench.bench_function("one", |b| b.iter(|| runtime.block_on(write(&leader, true))));
    bench.throughput(Throughput::Elements(IN_FLIGHT));
    bench.bench_function("many", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let writes = (0..IN_FLIGHT).map(|n| write(&leader, n % 2 == 0));
                futures::future::join_all(writes).await;
            });
        });
    });
    bench.finish();
}

const GROUPS: u32 = 1_000_000;

fn million() -> Cluster {
    let service = ServiceId::new(1).expect("in range");
    let mut random = Seeded::new(1);
    let mut group = |n: u32| {
        let prefix = Prefix::new(IpAddr::V4((0x0a00_0000 + n).into()), 32).expect("an address");
        let moved = random.below(4) == 0;
        let site = if moved { random.below(100) } else { u64::from(n / 16 * 7 % 100) };
        let group = placement::core::Group {
            id: GroupId { service, prefix },
            owner: SiteId(site as u8),
            epoch: Epoch(1 + u64::from(moved) * (1 + random.below(5))),
            move_id: None,
            changed: if moved { 1_000 + random.below(10_000_000) } else { 17 },
            standby: None,
        };
        (group.id, group)
    };
    Cluster { groups: (0..GROUPS).map(&mut group).collect(), ..Cluster::default() }
}

fn snapshots(c: &mut Criterion) {
    let cluster = million();
    let bytes = wire::encode_cluster(&cluster);
    eprintln!(
        "snapshot of {GROUPS} groups: {} bytes, {:.2} each",
        bytes.len(),
        bytes.len() as f64 / f64::from(GROUPS)
    );
    let mut bench = c.benchmark_group("snapshot/1M-groups");
    bench.sample_size(10);
    bench.bench_function("write", |b| b.iter(|| wire::encode_cluster(&cluster)));
    bench.bench_function("read", |b| {
        b.iter(|| wire::decode_cluster(bytes.clone()).expect("what was written"))
    });
    bench.finish();
}

criterion_group!(benches, commits, snapshots);
criterion_main!(benches);
