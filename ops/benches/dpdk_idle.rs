//! What an idle DPDK worker costs, and how soon it wakes: the real binary, over a veth pair (whose socket wakes it) and
//! over shared memory (whose driver has no interrupts, so it looks again and again), against one that never sleeps. As root.
//!
//! A packet is sent after a quiet time and its translation waited for; the wake is what that takes longer than with
//! `idle = "spin"`. The bench polls on the first processor, the worker runs on the last.

#![expect(clippy::unwrap_used, reason = "a bench")]
#![expect(clippy::print_stdout, reason = "prints its figures")]

#[path = "../tests/dpdk/common.rs"]
mod common;

use std::time::Duration;

use common::{SITE, Worker, pair, services};
use dataplane::control::{Event, Request};
use dataplane::dpdk::DpdkLink;
use dataplane::io::{PacketBuf, PacketIo};
use dataplane::packet;
use dpdk::{Mbuf, Pool, cycles};
use flow::Epoch;
use flow::steer::{Side, Tag};

const QUIET: Duration = Duration::from_millis(20);
const IDLE: Duration = Duration::from_secs(5);
const ROUNDS: usize = 300;

fn frame() -> Vec<u8> {
    let udp = [0x1234u16.to_be_bytes(), 53u16.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat();
    packet::build_ip(Tag::Direct(Side::Inside, SITE), 17, 0x6440_0005, 0xcb00_7109, &udp)
}

/// Nanoseconds that all threads of a process have run.
fn run_ns(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let spent = tasks.map(|task| std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default());
    spent.map(|text| text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)).sum()
}

/// Cycles from sending to receiving.
fn round(link: &mut DpdkLink, pool: &Pool) -> Option<u64> {
    let mut received = Vec::new();
    while link.rx_burst(&mut received).unwrap() > 0 {}
    received.clear();
    let start = cycles();
    link.tx_burst(&mut vec![Mbuf::from_bytes(pool, &frame()).unwrap()]).unwrap();
    while cycles() - start < 1_000_000_000 {
        link.rx_burst(&mut received).unwrap();
        let came =
            |packet: &Mbuf| packet::parse(packet.data()).is_ok_and(|parsed| parsed.tag == Tag::ToOutside);
        if received.drain(..).any(|packet| came(&packet)) {
            return Some(cycles() - start);
        }
    }
    None
}

fn measure(name: &str, device: &str, idle: &str, link: &mut DpdkLink, pool: &Pool, per_us: f64) {
    let directory = tempfile::tempdir().unwrap();
    let mut worker = Worker::start(directory.path(), device, idle);
    assert_eq!(worker.ask(&services()), Event::ServicesSet);
    worker.ask(&Request::Serve { group: "1:100.64.0.0/24".parse().unwrap(), epoch: Epoch(1) });
    while round(link, pool).is_none() {}
    std::thread::sleep(QUIET);
    let before = run_ns(worker.child.id());
    std::thread::sleep(IDLE);
    let busy = (run_ns(worker.child.id()) - before) as f64 / IDLE.as_nanos() as f64;
    let mut times = Vec::new();
    while times.len() < ROUNDS {
        std::thread::sleep(QUIET);
        times.extend(round(link, pool).map(|time| time as f64 / per_us));
    }
    times.sort_by(f64::total_cmp);
    println!(
        "| {name} | {idle} | {:.2} % | {:.0} | {:.0} | {:.0} |",
        busy * 100.0,
        times[ROUNDS / 2],
        times[ROUNDS * 99 / 100],
        times[ROUNDS - 1]
    );
}

fn main() {
    let Some((mut link, pool)) = pair() else {
        println!("SKIPPED: network namespaces want root");
        return;
    };
    let start = (cycles(), clock());
    std::thread::sleep(Duration::from_millis(200));
    let per_us = (cycles() - start.0) as f64 / (clock() - start.1).as_micros() as f64;
    println!(
        "| device | idle | share of a core | round trip p50, us | p99 | max |\n|---|---|---|---|---|---|"
    );
    for idle in ["spin", "backoff"] {
        measure("net_af_packet", "net_af_packet0,iface=worker", idle, &mut link, &pool, per_us);
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("memif").display().to_string();
    let device = |role: &str| format!("net_memif0,role={role},socket={socket},socket-abstract=no");
    let mut link = common::open_beside(&device("server"), pool);
    for idle in ["spin", "backoff"] {
        measure("net_memif (no interrupts)", &device("client"), idle, &mut link, &pool, per_us);
    }
}

fn clock() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap().into()
}
