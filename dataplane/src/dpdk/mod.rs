//! Workers whose link to the switch is a device that DPDK polls. Without feature `dpdk` only the configuration is here,
//! and starting one is refused.

#[cfg(feature = "dpdk")]
mod link;

use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;

use flow::socket::Listening;

use crate::process::{WorkerConfig, WorkerError};
use crate::worker::RELAYED_HOLD_FACTOR;

#[cfg(feature = "dpdk")]
pub use link::DpdkLink;

/// Whether workers over DPDK are built in.
pub const BUILT: bool = cfg!(feature = "dpdk");

/// Buffers beside those of held packets: both rings of the device, its queue to be sent, bursts, caches.
const BUFFERS_BESIDE: u32 = 8_192;

/// Which device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// Made by a driver: its name and arguments, as in `net_af_packet0,iface=eth1`.
    Virtual(String),
    /// By PCI address.
    Pci(String),
}

/// What a worker does while nothing comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Idle {
    /// Looks without end: the smallest delay, and a whole core.
    Spin,
    /// Looks for a moment, then sleeps until an interrupt; a device without interrupts is looked at again and again.
    #[default]
    Backoff,
}

/// A worker's device, and DPDK itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DpdkConfig {
    /// Which.
    pub device: Device,
    /// The processor to run on; the first that the process may use without.
    pub lcore: Option<usize>,
    /// In huge pages, which must be reserved; else in ordinary ones.
    pub huge_pages: bool,
    /// Memory for DPDK. More is taken when huge pages allow.
    pub memory_mb: u32,
    /// While nothing comes.
    pub idle: Idle,
    /// Longest IP packet.
    pub mtu: u16,
    /// Packet buffers; at least [`buffers_min`].
    pub buffers: u32,
    /// Packets that the device may hold for us.
    pub rx_descriptors: u16,
    /// Packets that the device may hold to be sent.
    pub tx_descriptors: u16,
    /// More arguments for DPDK, as they are.
    pub eal: Vec<String>,
}

/// So many buffers are needed: a hold that takes the last one would hold the packet that ends it, too.
#[must_use]
pub fn buffers_min(hold_packets_max: u32) -> u32 {
    hold_packets_max.saturating_mul(RELAYED_HOLD_FACTOR as u32).saturating_add(BUFFERS_BESIDE)
}

/// Memory that so many buffers of that length need, in megabytes, with what DPDK itself needs.
#[must_use]
pub fn memory_min_mb(buffers: u32, mtu: u16) -> u32 {
    // Data in whole kilobytes, headroom, header, and what is lost at the ends of pages.
    let len = u64::from(mtu).saturating_add(18).next_multiple_of(1024).max(2048) + 128 + 320;
    u32::try_from(((u64::from(buffers) * len) >> 20) + 64).unwrap_or(u32::MAX)
}

/// Why a worker over DPDK cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DpdkError {
    /// This program cannot.
    #[error(
        "this program was built without DPDK: cargo build --release --package limosa --features dpdk \
         (wants libdpdk-dev pkg-config clang libclang-dev)"
    )]
    NotBuilt,
    /// DPDK itself.
    #[cfg(feature = "dpdk")]
    #[error(transparent)]
    Eal(#[from] ::dpdk::EalError),
    /// Its buffers.
    #[cfg(feature = "dpdk")]
    #[error(transparent)]
    Pool(#[from] ::dpdk::PoolError),
    /// Its device.
    #[cfg(feature = "dpdk")]
    #[error(transparent)]
    Port(#[from] ::dpdk::PortError),
}

#[cfg(not(feature = "dpdk"))]
pub(crate) fn run(
    _: &WorkerConfig,
    _: &DpdkConfig,
    _: Listening<UnixListener>,
    _: &AtomicBool,
) -> Result<(), WorkerError> {
    Err(DpdkError::NotBuilt.into())
}

#[cfg(feature = "dpdk")]
pub(crate) fn run(
    config: &WorkerConfig,
    dpdk: &DpdkConfig,
    listener: Listening<UnixListener>,
    stop: &AtomicBool,
) -> Result<(), WorkerError> {
    let (link, pool) = opening(&listener, stop, || DpdkLink::start(dpdk))?;
    tracing::info!(device = ?dpdk.device, "polling the device");
    crate::process::run_over(config, listener, link, crate::worker::Output::new(pool), stop)
}

/// A `net_virtio_user` server waits for the switch inside DPDK, where no signal reaches: the process ends from outside.
#[cfg(feature = "dpdk")]
fn opening<T>(
    listener: &Listening<UnixListener>,
    stop: &AtomicBool,
    open: impl FnOnce() -> Result<T, DpdkError>,
) -> Result<T, DpdkError> {
    use std::sync::atomic::Ordering;
    const LOOK: std::time::Duration = std::time::Duration::from_millis(100);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if stop.load(Ordering::Relaxed) {
                    listener.give_back();
                    std::process::exit(0);
                }
                std::thread::park_timeout(LOOK);
            }
        });
        let result = open();
        done.store(true, Ordering::Relaxed);
        result
    })
}
