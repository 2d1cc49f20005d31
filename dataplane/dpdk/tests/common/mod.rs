//! Starts DPDK once for all tests of a binary, without huge pages and without devices.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use dpdk::{Device, Eal, EalConfig, Memory, Pool, Port, PortConfig, PortError};

/// Devices and pools are made one at a time.
pub fn eal() -> (&'static Eal, MutexGuard<'static, ()>) {
    static EAL: OnceLock<Eal> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (EAL.get_or_init(|| Eal::start(&config()).unwrap()), guard)
}

pub fn config() -> EalConfig {
    EalConfig { lcore: None, memory: Memory::Ordinary { megabytes: 256 }, pci: None, extra: Vec::new() }
}

pub fn port_config(device: impl Into<String>) -> PortConfig {
    PortConfig { device: Device::Virtual(device.into()), mtu: 1500, rx_descriptors: 512, tx_descriptors: 512 }
}

pub fn open(eal: &Eal, pool: Pool, device: impl Into<String>) -> Result<Port, PortError> {
    Port::open(eal, pool, &port_config(device))
}

/// Writes frames as a capture file.
pub fn write_pcap(path: &Path, frames: &[Vec<u8>]) {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1] {
        bytes.extend(word.to_ne_bytes());
    }
    for frame in frames {
        let len = frame.len() as u32;
        for word in [0, 0, len, len] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(frame);
    }
    std::fs::write(path, bytes).unwrap();
}

/// Reads the frames of a capture file.
pub fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[24..];
    let mut frames = Vec::new();
    while let Some(header) = rest.first_chunk::<16>() {
        let len = u32::from_ne_bytes(header[8..12].try_into().unwrap()) as usize;
        frames.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    frames
}
