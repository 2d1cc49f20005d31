//! Commits of three nodes in one process, redb on disk, messages in memory.
//!
//! `one`: a command, awaited: latency. `many`: 256 in flight at a time: throughput, in commands per second.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Duration;

use common::{Group, put_site};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flow::SiteId;
use placement::core::Command;
use placement::node::Node;

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

criterion_group!(benches, commits);
criterion_main!(benches);
