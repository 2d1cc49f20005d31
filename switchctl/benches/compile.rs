//! Compiling 10,000 groups over 3 sites, the difference when one of them moves, and the embedded switch's tables in
//! memory. Units: time per call; packets per second of one core.

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flow::nat::{NatSlices, NatSpec};
use flow::{Epoch, GroupId, Prefix, ServiceId, SiteId, WorkerId};
use switchctl::softswitch::packet::Packet;
use switchctl::softswitch::pipeline::Pipeline;
use switchctl::{Compiled, GroupPlan, PlanEntry, Ports, SitePlan, compile, diff};

/// 10,000 /26 of 100.64.0.0/12 with runs of `run` groups at one of three sites.
fn plan(run: u32) -> SitePlan {
    let clients: Prefix = "100.64.0.0/12".parse().expect("a prefix");
    let pool: Prefix = "10.0.0.0/14".parse().expect("a prefix");
    let spec = NatSpec {
        clients: vec![clients],
        pool: vec![pool],
        ports_per_subscriber: 1008,
        first_port: 1024,
        port_key: 1,
    };
    let service = ServiceId::new(1).expect("below 64");
    let groups = (0..10_000u32).map(|i| {
        let address = std::net::Ipv4Addr::from(0x6440_0000 + (i << 6)).into();
        let prefix = Prefix::new(address, 26).expect("aligned");
        let steer = SiteId(u8::try_from(i / run % 3).expect("below 3"));
        let local =
            (steer == SiteId(0)).then_some(WorkerId(u16::try_from(i / run / 3 % 2).expect("below 2")));
        (GroupId { service, prefix }, GroupPlan { epoch: Epoch(u64::from(i % 7)), steer, local })
    });
    SitePlan {
        site: SiteId(0),
        ports: Ports::conventional([SiteId(1), SiteId(2)], [WorkerId(0), WorkerId(1)]),
        services: BTreeMap::from([(service, NatSlices::new(spec).expect("valid"))]),
        groups: groups.collect(),
        relayed: BTreeMap::new(),
    }
}

fn frame(source: u32) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend_from_slice(&[0x08, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend_from_slice(&source.to_be_bytes());
    frame.extend_from_slice(&[192, 0, 2, 1, 1, 1, 0, 53, 0, 26, 0, 0]);
    frame.resize(60, 0);
    frame
}

fn outside_frame(destination: u32, port: u16) -> Vec<u8> {
    let mut frame = frame(0xc000_0201);
    frame[30..34].copy_from_slice(&destination.to_be_bytes());
    frame[36..38].copy_from_slice(&port.to_be_bytes());
    frame
}

fn rules(c: &mut Criterion) {
    for (name, run) in [("a border per group", 1), ("a border per 64 groups", 64)] {
        let mut moved = plan(run);
        let before = compile(&moved);
        c.bench_function(&format!("compile 10k groups, {name}, {} rules", before.len()), |b| {
            b.iter(|| compile(black_box(&moved)));
        });
        let entry = moved.groups.values_mut().nth(5_000).expect("there are 10,000");
        *entry =
            GroupPlan { epoch: Epoch(9), steer: SiteId((entry.steer.0 + 1) % 3), local: Some(WorkerId(0)) };
        let (id, there) =
            moved.groups.iter().nth(5_000).map(|(id, plan)| (*id, *plan)).expect("there are 10,000");
        let here = GroupPlan { steer: SiteId((there.steer.0 + 1) % 3), ..there };
        let entries = [here, there]
            .map(|group| BTreeMap::from([(id, PlanEntry { group: Some(group), relayed: None })]));
        let mut compiled = Compiled::new(&moved);
        c.bench_function(&format!("keep up 10k groups, one moves there and back, {name}"), |b| {
            b.iter(|| entries.iter().for_each(|entry| compiled.update(black_box(entry))));
        });
        let (kept, mut other) = (compiled.rules().clone(), compiled);
        other.update(&entries[0]);
        c.bench_function(&format!("difference of a set that was kept up, {name}"), |b| {
            b.iter(|| diff(black_box(&kept), black_box(other.rules())));
        });
        let after = compile(&moved);
        let changes = diff(&before, &after).len();
        c.bench_function(&format!("difference of one moved group, {name}, {changes} changes"), |b| {
            b.iter(|| diff(black_box(&before), black_box(&after)));
        });
    }
}

fn pipeline(c: &mut Criterion) {
    let rules = compile(&plan(1));
    let mut tables = Pipeline::with_rules(&rules);
    let mut group =
        c.benchmark_group(format!("embedded switch in memory, {} rules, 60-byte UDP", rules.len()));
    let inside: Vec<_> = (0..1024u32).map(|i| frame(0x6440_0000 + i.wrapping_mul(7919) % 640_000)).collect();
    let outside: Vec<_> = (0..1024u32)
        .map(|i| outside_frame(0x0a00_0000 + i.wrapping_mul(31) % 10_000, 1024 + (i % 64_000) as u16))
        .collect();
    for (name, port, frames) in [("inside", Ports::INSIDE, inside), ("outside", Ports::OUTSIDE, outside)] {
        let mut packet = Packet::default();
        group.throughput(Throughput::Elements(frames.len() as u64));
        group.bench_function(format!("1024 packets from {name}"), |b| {
            b.iter(|| {
                let mut sent = 0;
                for frame in &frames {
                    if packet.load(frame) {
                        tables.process(&mut packet, port, 0, &mut |_, _, _| sent += 1);
                    }
                }
                sent
            });
        });
    }
}

criterion_group!(benches, rules, pipeline);
criterion_main!(benches);
