//! A worker's link over a device that DPDK polls. Packets stay in the buffers that the device wrote them to.

use dpdk::{Eal, EalConfig, Mbuf, Memory, Pool, Port, PortConfig, Statistics};
use flow::Micros;
use nix::errno::Errno;
use nix::poll::PollFlags;

use super::{Device, DpdkConfig, DpdkError, Idle};
use crate::io::{Drops, PacketBuf, PacketIo, Rest, SwitchLink};
use crate::packet;
use crate::worker::BURST_LEN;

/// Packets that wait for the device before reading stops.
const TX_QUEUE_LEN: usize = 1_024;
/// How often link and buffers are looked at.
const LOOK_INTERVAL: Micros = Micros(100_000);
/// How long to look without a pause after the last packet: sleeping and waking takes some ten microseconds.
const SPIN: Micros = Micros(50);
/// Between two looks at an idle device without interrupts. With what waking takes it stays below 200 microseconds.
const NAP: Micros = Micros(150);
/// Timers of this thread fire within so many nanoseconds; 50,000 by default.
const TIMER_SLACK_NS: u64 = 1;

impl PacketBuf for Mbuf {
    type Pool = Pool;

    #[inline]
    fn data(&self) -> &[u8] {
        Self::data(self)
    }

    #[inline]
    fn data_mut(&mut self) -> &mut [u8] {
        Self::data_mut(self)
    }

    fn from_bytes(pool: &Pool, bytes: &[u8]) -> Option<Self> {
        pool.packet(bytes)
    }

    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }

    /// Buffers of a device are of one length, and there are as many as may be held: see [`super::buffers_min`].
    fn compact(self) -> (Self, Option<Self>) {
        (self, None)
    }

    /// The pool is allotted at the start, so what counts here is the frame.
    fn footprint(&self) -> usize {
        Self::data(self).len()
    }
}

/// Where the wait for an interrupt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupt {
    /// Packets come without.
    Off,
    /// Armed, and looked at once more, because packets may have come before.
    Armed,
    /// Waited for.
    Waited,
}

/// The link.
#[derive(Debug)]
pub struct DpdkLink {
    port: Port,
    pool: Pool,
    idle: Idle,
    interrupt: Interrupt,
    /// Waits for the device.
    queue: Vec<Mbuf>,
    is_up: bool,
    look_at: Micros,
    statistics: Statistics,
    drops: Drops,
}

impl DpdkLink {
    /// Starts DPDK on this thread, and opens the device. Once in a process.
    ///
    /// # Errors
    /// [`DpdkError`], with what to do.
    pub fn start(config: &DpdkConfig) -> Result<(Self, Pool), DpdkError> {
        let megabytes = config.memory_mb;
        let pci = if let Device::Pci(address) = &config.device { Some(address.clone()) } else { None };
        let eal = Eal::start(&EalConfig {
            lcore: config.lcore,
            memory: if config.huge_pages {
                Memory::Huge { megabytes }
            } else {
                Memory::Ordinary { megabytes }
            },
            pci,
            extra: config.eal.clone(),
        })?;
        Self::open(&eal, config)
    }

    /// Opens the device where DPDK runs already.
    ///
    /// # Errors
    /// [`DpdkError`], with what to do.
    pub fn open(eal: &Eal, config: &DpdkConfig) -> Result<(Self, Pool), DpdkError> {
        let device = match &config.device {
            Device::Virtual(text) => dpdk::Device::Virtual(text.clone()),
            Device::Pci(address) => dpdk::Device::Pci(address.clone()),
        };
        let (Device::Virtual(text) | Device::Pci(text)) = &config.device;
        let name: String = text.split(',').next().unwrap_or_default().chars().take(25).collect();
        let pool = Pool::new(eal, &name, config.buffers, config.mtu + dpdk::FRAME_OVERHEAD)?;
        let port_config = PortConfig {
            device,
            mtu: config.mtu,
            rx_descriptors: config.rx_descriptors,
            tx_descriptors: config.tx_descriptors,
        };
        let port = Port::open(eal, pool, &port_config)?;
        Ok((Self::over(port, pool, config.idle), pool))
    }

    /// Over a port that is open, with buffers of `pool`.
    #[must_use]
    pub fn over(port: Port, pool: Pool, idle: Idle) -> Self {
        // Without it naps are longer; nothing else.
        let _ = nix::sys::prctl::set_timerslack(TIMER_SLACK_NS);
        Self {
            statistics: port.statistics(),
            port,
            pool,
            idle,
            interrupt: Interrupt::Off,
            queue: Vec::new(),
            is_up: true,
            look_at: Micros(0),
            drops: Drops::default(),
        }
    }

    /// The device.
    pub fn port_mut(&mut self) -> &mut Port {
        &mut self.port
    }

    fn look(&mut self) {
        let is_up = self.port.is_link_up();
        if is_up != self.is_up {
            tracing::warn!(is_up, "the link of the device changed");
            self.is_up = is_up;
        }
        let now = self.port.statistics();
        let before = std::mem::replace(&mut self.statistics, now);
        let drops = &mut self.drops;
        drops.rx_missed += now.missed.saturating_sub(before.missed);
        drops.rx_error += now.rx_errors.saturating_sub(before.rx_errors);
        drops.tx_error += now.tx_errors.saturating_sub(before.tx_errors);
        let counted = now.no_buffer.saturating_sub(before.no_buffer);
        let starved = self.pool.available() < BURST_LEN as u32;
        drops.no_buffer += if counted == 0 { u64::from(starved) } else { counted };
    }

    fn drop_queue(&mut self) {
        self.drops.link_down += self.queue.len() as u64;
        Mbuf::free(&mut self.queue);
    }
}

impl PacketIo<Mbuf> for DpdkLink {
    fn rx_burst(&mut self, packets: &mut Vec<Mbuf>) -> Result<usize, Errno> {
        if !self.queue.is_empty() {
            self.port.tx_burst(&mut self.queue);
            if self.queue.len() >= TX_QUEUE_LEN {
                return Ok(0); // The switch is slow: let the device queue, rather than drop here.
            }
        }
        let start = packets.len();
        let received = self.port.rx_burst(packets);
        self.drops.oversize += received.oversize as u64;
        if received.packets > 0 {
            if self.interrupt != Interrupt::Off {
                self.port.disarm();
                self.interrupt = Interrupt::Off;
            }
            let hidden = self.port.is_checksum_hidden();
            for packet in &mut packets[start..] {
                if hidden || packet.is_checksum_partial() {
                    packet::complete_checksum(packet.data_mut());
                }
            }
        }
        Ok(received.packets)
    }

    fn tx_burst(&mut self, packets: &mut Vec<Mbuf>) -> Result<(), Errno> {
        if packets.is_empty() && (self.is_up || self.queue.is_empty()) {
            return Ok(());
        }
        if !self.is_up {
            self.queue.append(packets);
            self.drop_queue();
            return Ok(());
        }
        if self.queue.is_empty() {
            self.port.tx_burst(packets);
        }
        self.queue.append(packets);
        Ok(())
    }

    fn recycle(&mut self, packets: &mut Vec<Mbuf>) {
        Mbuf::free(packets);
    }
}

impl SwitchLink for DpdkLink {
    type Buf = Mbuf;

    fn maintain(&mut self, now: Micros) {
        if now >= self.look_at {
            self.look();
            self.look_at = now.plus(LOOK_INTERVAL);
        }
    }

    fn rest(&mut self, idle: Micros) -> Rest<'_> {
        if self.idle == Idle::Spin || idle < SPIN {
            return Rest::Spin;
        }
        // What waits for the device goes out when we look again, not when packets come.
        if !self.queue.is_empty() || self.port.wake_descriptor().is_none() {
            return Rest::Nap(NAP);
        }
        if self.interrupt != Interrupt::Armed {
            if self.interrupt == Interrupt::Waited {
                self.port.disarm();
            }
            self.port.arm();
            self.interrupt = Interrupt::Armed;
            return Rest::Spin;
        }
        self.interrupt = Interrupt::Waited;
        match self.port.wake_descriptor() {
            Some(descriptor) => Rest::Until(descriptor, PollFlags::POLLIN),
            None => Rest::Nap(NAP),
        }
    }

    fn take_drops(&mut self) -> Drops {
        std::mem::take(&mut self.drops)
    }

    fn is_up(&self) -> bool {
        self.is_up
    }
}
