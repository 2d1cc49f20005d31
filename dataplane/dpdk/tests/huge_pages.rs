//! Huge pages: reserved for the test where root may do so, and given back. A process of its own: DPDK starts once.

#![expect(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stdout, reason = "says what is skipped")]

mod common;

use common::{config, port_config};
use dpdk::{Eal, EalConfig, Mbuf, Memory, Pool, Port};

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const PAGES: u32 = 64;

struct Reservation(String);

impl Reservation {
    fn make() -> Option<Self> {
        let before = std::fs::read_to_string(RESERVED).ok()?.trim().to_owned();
        let reservation = Self(before);
        let wanted = reservation.0.parse::<u32>().ok()? + PAGES;
        std::fs::write(RESERVED, wanted.to_string()).ok()?;
        let granted: u32 = std::fs::read_to_string(RESERVED).ok()?.trim().parse().ok()?;
        (granted >= wanted).then_some(reservation)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVED, &self.0);
    }
}

#[test]
fn buffers_lie_in_huge_pages_when_asked_for() {
    let Some(_reservation) = Reservation::make() else {
        println!("SKIPPED: huge pages cannot be reserved here");
        return;
    };
    let memory = Memory::Huge { megabytes: PAGES * 2 - 64 };
    let eal = Eal::start(&EalConfig { memory, ..config() }).unwrap();
    let pool = Pool::new(&eal, "huge", 1024, 1518).unwrap();
    let mut port = Port::open(&eal, pool, &port_config("net_ring0")).unwrap();
    let mut packets = vec![pool.packet(&[5; 60]).unwrap()];
    port.tx_burst(&mut packets);
    assert_eq!(port.rx_burst(&mut packets).packets, 1);
    assert_eq!(packets[0].data(), [5; 60]);
    Mbuf::free(&mut packets);
    let taken = std::fs::read_to_string("/proc/self/smaps").unwrap();
    assert!(taken.contains("KernelPageSize:     2048 kB"));
}
