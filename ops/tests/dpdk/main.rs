//! The real binary as a DPDK worker on one end of a veth pair, in a network namespace of its own that ends with the
//! test. The other end is polled by the test, also through DPDK. As root; otherwise says what was skipped.

#![expect(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stdout, reason = "says what is skipped")]

mod common;

use std::time::Duration;

use common::{SITE, Worker, pair, services};
use dataplane::control::{Event, Request};
use dataplane::dpdk::DpdkLink;
use dataplane::io::{PacketBuf, PacketIo};
use dataplane::packet;
use dpdk::{Mbuf, Pool};
use flow::Epoch;
use flow::steer::{Side, Tag};

/// A packet whose checksum a kernel left to the network card: the sum of the pseudo header alone.
fn from_client(port: u16) -> Vec<u8> {
    let (source, destination) = (0x6440_0005u32, 0xcb00_7109u32);
    let mut udp = [port.to_be_bytes(), 53u16.to_be_bytes(), 40u16.to_be_bytes(), [0, 0]].concat();
    udp.resize(40, 0x5a);
    let pseudo = [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0, 17, 0, 40]].concat();
    udp[6..8].copy_from_slice(&packet::ones_complement(&pseudo).to_be_bytes());
    packet::build_ip(Tag::Direct(Side::Inside, SITE), 17, source, destination, &udp)
}

/// Sends a packet until its translation comes back: the first ones meet a device that is not yet there.
fn pass(link: &mut DpdkLink, pool: &Pool, frame: &[u8]) -> Vec<u8> {
    let mut received = Vec::new();
    for _ in 0..1_000 {
        link.tx_burst(&mut vec![Mbuf::from_bytes(pool, frame).unwrap()]).unwrap();
        for _ in 0..20 {
            link.rx_burst(&mut received).unwrap();
            for packet in received.drain(..) {
                if packet::parse(packet.data()).is_ok_and(|parsed| parsed.tag == Tag::ToOutside) {
                    return packet.data().to_vec();
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    panic!("nothing came back");
}

fn whole_checksum(frame: &[u8]) -> u16 {
    let ip = packet::ip_bytes(frame).unwrap();
    let len = (ip.len() - 20) as u16;
    packet::ones_complement(&[&ip[12..20], &[0, ip[9]], &len.to_be_bytes(), &ip[20..]].concat())
}

#[test]
fn the_real_worker_translates_over_a_network_interface_and_stops_when_told() {
    let Some((mut link, pool)) = pair() else {
        println!("SKIPPED: network namespaces want root");
        return;
    };
    for idle in ["backoff", "spin"] {
        let directory = tempfile::tempdir().unwrap();
        let mut worker = Worker::start(directory.path(), "net_af_packet0,iface=worker", idle);
        assert_eq!(worker.ask(&services()), Event::ServicesSet);
        worker.ask(&Request::Serve { group: "1:100.64.0.0/24".parse().unwrap(), epoch: Epoch(1) });
        for port in 1..50 {
            let sent = pass(&mut link, &pool, &from_client(port));
            assert_eq!(whole_checksum(&sent), 0xffff, "no checksum stays partial");
        }
        let Event::Stats(stats) = worker.ask(&Request::Stats) else { panic!() };
        assert_eq!(stats.counters.flows, 49);
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(worker.child.id() as i32),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        assert!(worker.child.wait().unwrap().success());
        assert!(!directory.path().join("worker-1.control").exists());
    }
}
