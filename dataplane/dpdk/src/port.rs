//! One device with one queue in each direction.

use std::ffi::{CString, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::eal::{Eal, describe};
use crate::error::PortError;
use crate::mbuf::{Mbuf, Pool};
use crate::socket::remove_abandoned;

/// Most packets of one call.
pub const BURST_LEN: usize = 32;

/// Bytes of a frame around its IP packet: addresses, VLAN tag, type.
pub const FRAME_OVERHEAD: u16 = 18;

/// Which device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// Made by a driver: its name and arguments, as in `net_af_packet0,iface=eth1`.
    Virtual(String),
    /// By PCI address; must be the one that [`crate::EalConfig::pci`] names.
    Pci(String),
}

impl Device {
    fn text(&self) -> &str {
        match self {
            Self::Virtual(text) | Self::Pci(text) => text,
        }
    }

    /// The driver's name: that of a virtual device without its number.
    fn driver(&self) -> &str {
        let name = self.text().split(',').next().unwrap_or_default();
        match self {
            Self::Virtual(_) => name.trim_end_matches(|letter: char| letter.is_ascii_digit()),
            Self::Pci(_) => "pci",
        }
    }

    fn argument(&self, key: &str) -> Option<&str> {
        self.text().split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
    }

    /// The socket at which it will listen, if it does.
    fn listens_at(&self) -> Option<&std::path::Path> {
        let (role, path) = match self.driver() {
            "net_virtio_user" => ("server=1", "path"),
            "net_memif" => ("role=server", "socket"),
            _ => return None,
        };
        let listens = self.text().split(',').any(|part| part == role);
        listens.then(|| self.argument(path).map(std::path::Path::new))?
    }

    /// Why it may not be there, as far as can be seen from here.
    fn remedy(&self) -> String {
        match self.driver() {
            "pci" => self.pci_remedy(),
            "net_af_packet" | "net_af_xdp" => {
                let iface = self.argument("iface").unwrap_or("");
                if std::path::Path::new("/sys/class/net").join(iface).exists() && !iface.is_empty() {
                    format!(
                        "interface {iface} is there; it must be up, and wants root or CAP_NET_RAW (and for net_af_xdp \
                         CAP_BPF); net_af_packet refuses one by chance when another process of this network namespace has \
                         the same fanout number (process xor interface index): started again, it has another"
                    )
                } else {
                    format!("no interface {iface:?}: name one that `ip link` shows, with iface=NAME")
                }
            }
            "net_virtio_user" => "see that path= names the socket of the vhost switch port, or add server=1 and let the \
                                  switch connect (dpdkvhostuserclient of Open vSwitch)"
                .to_owned(),
            "net_pcap" => "see that the files of rx_pcap= are there and that tx_pcap= can be written".to_owned(),
            "net_memif" => "see that socket= can be reached, with role=client or role=server and the same id= on both \
                            sides"
                .to_owned(),
            _ => "see that the driver is installed (apt-get install librte-net-*) and its name and arguments are right: \
                  net_virtio_user, net_af_packet, net_af_xdp, net_memif, net_null, net_ring or net_pcap, then a number, \
                  then key=value pairs"
                .to_owned(),
        }
    }

    fn pci_remedy(&self) -> String {
        let directory = std::path::Path::new("/sys/bus/pci/devices").join(self.text());
        if !directory.exists() {
            return "no such device: `dpdk-devbind.py --status-dev net` lists those that are there"
                .to_owned();
        }
        let driver = std::fs::read_link(directory.join("driver")).ok();
        let driver = driver.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy());
        match driver.as_deref() {
            Some("vfio-pci" | "uio_pci_generic" | "igb_uio") => {
                "it is bound for DPDK: see that its driver is installed (apt-get install librte-net-*)"
                    .to_owned()
            }
            driver => format!(
                "it is bound to {}: dpdk-devbind.py --bind=vfio-pci {}",
                driver.unwrap_or("no driver"),
                self.text()
            ),
        }
    }
}

/// How a device is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Which.
    pub device: Device,
    /// Longest IP packet.
    pub mtu: u16,
    /// Packets that the device may hold for us; rounded to what it can.
    pub rx_descriptors: u16,
    /// Packets that the device may hold to be sent; rounded to what it can.
    pub tx_descriptors: u16,
}

/// Frames that are looked through for foreign ones at most: the ring of a packet socket is shorter.
const FOREIGN_MAX: usize = 65_536;

/// What a look at the device brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Packets that were appended.
    pub packets: usize,
    /// Packets that were longer than a frame may be, or had no room for their tag, and were dropped.
    pub oversize: usize,
}

/// What a device counted since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Received.
    pub received: u64,
    /// Sent.
    pub sent: u64,
    /// Lost because we were too slow.
    pub missed: u64,
    /// Received damaged.
    pub rx_errors: u64,
    /// Lost for want of a buffer. Not all drivers count.
    pub no_buffer: u64,
    /// Taken by the driver and not sent.
    pub tx_errors: u64,
}

/// A device that runs; stopped and closed when dropped.
#[derive(Debug)]
pub struct Port {
    number: u16,
    frame_len_max: u32,
    driver: String,
    /// Becomes readable on packets while interrupts are armed; none when the driver has no interrupts.
    wake: Option<Wake>,
}

#[derive(Debug)]
struct Wake {
    epoll: Epoll,
    /// By DPDK's interrupts; else by a descriptor that is readable while packets wait.
    interrupt: bool,
}

impl Port {
    /// Opens and starts a device; its buffers come from `pool`.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn open(_: &Eal, pool: Pool, config: &PortConfig) -> Result<Self, PortError> {
        config.device.listens_at().into_iter().for_each(remove_abandoned);
        let sockets = packet_sockets();
        let number = probe(&config.device)?;
        // From here on dropping it closes the device.
        let mut port = Self {
            number,
            frame_len_max: u32::from(config.mtu) + u32::from(FRAME_OVERHEAD),
            driver: config.device.driver().to_owned(),
            wake: None,
        };
        // Others refuse at different places, some after a message of their own.
        let mut interrupts = matches!(port.driver.as_str(), "pci" | "net_virtio_user" | "net_tap");
        if port.configure(config, interrupts).is_err() {
            interrupts = false;
            port.configure(config, interrupts)?;
        }
        port.set_up_queues(config, pool)?;
        let result =
            // SAFETY: the port is there and set up.
            unsafe { dpdk_sys::rte_eth_dev_start(number) };
        check(config, "start", result, || "see its messages on standard error".to_owned())?;
        // Frames come with the switch's addresses in them, not with ours. A device without it has no filter.
        // SAFETY: the port is there.
        let _ = unsafe { dpdk_sys::rte_eth_promiscuous_enable(number) };
        if interrupts {
            port.wake = port.interrupt();
        }
        if port.driver == "net_af_packet" {
            if port.wake.is_none() {
                let fresh = packet_sockets().into_iter().find(|socket| !sockets.contains(socket));
                port.wake = fresh.and_then(|(fd, _)| readable(fd));
            }
            port.drop_foreign();
        }
        Ok(port)
    }

    /// Drops what the device has at its start. A packet socket gets the frames of all interfaces of its network namespace until it is bound to
    /// one, and the driver makes its ring before that: a worker would take what belongs to others for its own, and some came twice.
    fn drop_foreign(&mut self) {
        let (mut foreign, mut dropped) = (Vec::new(), 0);
        while dropped < FOREIGN_MAX {
            let received = self.rx_burst(&mut foreign);
            if received == Received::default() {
                break;
            }
            dropped += received.packets + received.oversize;
            foreign.clear();
        }
    }

    fn configure(&self, config: &PortConfig, interrupts: bool) -> Result<(), PortError> {
        let info = self.info(config)?;
        let mut conf = dpdk_sys::rte_eth_conf::default();
        conf.rxmode.mtu = u32::from(config.mtu);
        conf.txmode.offloads = info.tx_offload_capa & dpdk_sys::LIMOSA_TX_FAST_FREE;
        conf.intr_conf.set_rxq(u32::from(interrupts));
        // SAFETY: the port is there and stopped; `conf` is read during the call.
        let result = unsafe { dpdk_sys::rte_eth_dev_configure(self.number, 1, 1, &conf) };
        check(config, "configuration", result, || {
            format!("mtu = {} must lie in {} to {} of this device", config.mtu, info.min_mtu, info.max_mtu)
        })?;
        // Some drivers take the length from here only. Those that cannot change it have no limit of their own.
        // SAFETY: the port is there and stopped.
        let _ = unsafe { dpdk_sys::rte_eth_dev_set_mtu(self.number, config.mtu) };
        Ok(())
    }

    fn info(&self, config: &PortConfig) -> Result<dpdk_sys::rte_eth_dev_info, PortError> {
        let mut info = dpdk_sys::rte_eth_dev_info::default();
        // SAFETY: the port is there; `info` is written during the call.
        let result = unsafe { dpdk_sys::rte_eth_dev_info_get(self.number, &mut info) };
        check(config, "asking what it can do", result, || config.device.remedy())?;
        Ok(info)
    }

    fn set_up_queues(&self, config: &PortConfig, pool: Pool) -> Result<(), PortError> {
        let (mut rx, mut tx) = (config.rx_descriptors, config.tx_descriptors);
        // SAFETY: the port is there; both numbers are written during the call.
        let result = unsafe { dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(self.number, &mut rx, &mut tx) };
        check(config, "choosing queue lengths", result, || "try 512 descriptors".to_owned())?;
        // SAFETY: the port is there and configured; without options the driver's own hold; the pool lives for ever.
        let result = unsafe {
            let socket = u32::try_from(dpdk_sys::rte_eth_dev_socket_id(self.number)).unwrap_or(u32::MAX);
            let result =
                dpdk_sys::rte_eth_rx_queue_setup(self.number, 0, rx, socket, std::ptr::null(), pool.as_ptr());
            if result == 0 {
                dpdk_sys::rte_eth_tx_queue_setup(self.number, 0, tx, socket, std::ptr::null())
            } else {
                result
            }
        };
        check(config, "queue setup", result, || {
            format!(
                "frames of up to {} bytes fit a buffer; net_af_packet wants framesz= no longer than that, other devices \
                 a smaller mtu or fewer descriptors",
                pool.room()
            )
        })
    }

    /// Interrupts of the receive queue, as a descriptor; none when the driver has none.
    fn interrupt(&self) -> Option<Wake> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).ok()?;
        // RTE_INTR_EVENT_ADD.
        let add = 1;
        // SAFETY: the port was started with interrupts; the epoll descriptor lives as long as the port.
        let result = unsafe {
            dpdk_sys::rte_eth_dev_rx_intr_ctl_q(
                self.number,
                0,
                epoll.0.as_raw_fd(),
                add,
                std::ptr::null_mut(),
            )
        };
        let wake = Wake { epoll, interrupt: true };
        // SAFETY: the port is there. A driver that cannot do it says so here.
        (result == 0 && unsafe { dpdk_sys::rte_eth_dev_rx_intr_enable(self.number, 0) } == 0).then_some(wake)
    }

    /// Receives at most [`BURST_LEN`] packets, tags in place.
    pub fn rx_burst(&mut self, packets: &mut Vec<Mbuf>) -> Received {
        let start = packets.len();
        packets.reserve(BURST_LEN);
        // SAFETY: an `Mbuf` is a pointer; there is room for `BURST_LEN` of them; those received are ours.
        unsafe {
            let place = packets.as_mut_ptr().add(start).cast();
            let count = dpdk_sys::limosa_rx_burst(self.number, 0, place, BURST_LEN as u16);
            packets.set_len(start + usize::from(count));
        }
        let mut odd = false;
        for packet in &packets[start..] {
            packet.prefetch();
            let (len, segments) = packet.extent();
            odd |= segments != 1 || len > self.frame_len_max || packet.is_untagged();
        }
        let oversize = if odd { self.set_right(packets, start) } else { 0 };
        Received { packets: packets.len() - start, oversize }
    }

    #[cold]
    fn set_right(&self, packets: &mut Vec<Mbuf>, start: usize) -> usize {
        let received = packets.split_off(start);
        let before = received.len();
        packets.extend(received.into_iter().filter_map(|packet| {
            let packet = if packet.is_untagged() { packet.tagged()? } else { packet };
            let (len, segments) = packet.extent();
            (segments == 1 && len <= self.frame_len_max).then_some(packet)
        }));
        before - (packets.len() - start)
    }

    /// Sends from the front until the device is full; what is left stays in `packets`.
    pub fn tx_burst(&mut self, packets: &mut Vec<Mbuf>) -> usize {
        let mut sent = 0;
        while sent < packets.len() {
            let count = (packets.len() - sent).min(BURST_LEN) as u16;
            // SAFETY: an `Mbuf` is a pointer; `count` of them are there, and those that are taken are not used again.
            let taken = unsafe {
                let place = packets.as_mut_ptr().add(sent).cast();
                usize::from(dpdk_sys::limosa_tx_burst(self.number, 0, place, count))
            };
            sent += taken;
            if taken < usize::from(count) {
                break;
            }
        }
        let left = packets.len() - sent;
        // SAFETY: those in front belong to the device now; the others move to the front, and the length says so.
        unsafe {
            let start = packets.as_mut_ptr();
            std::ptr::copy(start.add(sent), start, left);
            packets.set_len(left);
        }
        sent
    }

    /// Whether the device has a link.
    #[must_use]
    pub fn is_link_up(&self) -> bool {
        let mut link = dpdk_sys::rte_eth_link::default();
        // SAFETY: the port is there; `link` is written during the call.
        let result = unsafe { dpdk_sys::rte_eth_link_get_nowait(self.number, &mut link) };
        result == 0 && link.link_status() == dpdk_sys::LIMOSA_LINK_UP
    }

    /// Takes the link down or up; says whether the device can.
    pub fn set_link(&mut self, up: bool) -> bool {
        // SAFETY: the port is there.
        let result = unsafe {
            if up {
                dpdk_sys::rte_eth_dev_set_link_up(self.number)
            } else {
                dpdk_sys::rte_eth_dev_set_link_down(self.number)
            }
        };
        result == 0
    }

    /// What the device counted.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let mut stats = dpdk_sys::rte_eth_stats::default();
        // SAFETY: the port is there; `stats` is written during the call, or stays zero.
        let _ = unsafe { dpdk_sys::rte_eth_stats_get(self.number, &mut stats) };
        Statistics {
            received: stats.ipackets,
            sent: stats.opackets,
            missed: stats.imissed,
            rx_errors: stats.ierrors,
            no_buffer: stats.rx_nombuf,
            tx_errors: stats.oerrors,
        }
    }

    /// Whether packets come from a kernel that leaves checksums to the network card without a word in the buffer.
    #[must_use]
    pub fn is_checksum_hidden(&self) -> bool {
        matches!(self.driver.as_str(), "net_af_packet" | "net_af_xdp" | "net_tap")
    }

    /// A descriptor that is readable when packets came after [`Port::arm`]; none when the driver has no interrupts and
    /// must be asked again and again.
    #[must_use]
    pub fn wake_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|wake| wake.epoll.0.as_fd())
    }

    /// From now on packets make the descriptor readable. Packets that are there already do not: receive once more.
    pub fn arm(&mut self) {
        if self.wake.as_ref().is_some_and(|wake| wake.interrupt) {
            // SAFETY: the port was started with interrupts.
            let _ = unsafe { dpdk_sys::rte_eth_dev_rx_intr_enable(self.number, 0) };
        }
    }

    /// Packets come without interrupts again.
    pub fn disarm(&mut self) {
        let Some(wake) = self.wake.as_ref().filter(|wake| wake.interrupt) else { return };
        let mut event = dpdk_sys::rte_epoll_event::default();
        // SAFETY: the port was started with interrupts; at most one event is written. The wait returns at once, and
        // takes back what made the descriptor readable.
        unsafe {
            let _ = dpdk_sys::rte_eth_dev_rx_intr_disable(self.number, 0);
            let _ = dpdk_sys::rte_epoll_wait(wake.epoll.0.as_raw_fd(), &mut event, 1, 0);
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: the port is there, and is not used again.
        unsafe {
            let _ = dpdk_sys::rte_eth_dev_stop(self.number);
            let _ = dpdk_sys::rte_eth_dev_close(self.number);
        }
    }
}

fn check(
    config: &PortConfig,
    step: &'static str,
    result: c_int,
    remedy: impl FnOnce() -> String,
) -> Result<(), PortError> {
    if result >= 0 {
        return Ok(());
    }
    let device = config.device.text().to_owned();
    Err(PortError::Setup { device, step, reason: describe(result), remedy: remedy() })
}

/// The port of a device, which is made when it is virtual.
fn probe(device: &Device) -> Result<u16, PortError> {
    let refuse = |reason: String| PortError::Device {
        device: device.text().to_owned(),
        reason,
        remedy: device.remedy(),
    };
    let zero = |_| refuse("a zero byte in its name".to_owned());
    if let Device::Virtual(text) = device {
        let arguments = CString::new(text.as_str()).map_err(zero)?;
        // SAFETY: DPDK was started (the caller has the proof); the string ends in zero and is copied.
        let result = unsafe { dpdk_sys::rte_dev_probe(arguments.as_ptr()) };
        if result < 0 {
            return Err(refuse(describe(result)));
        }
    }
    let name = device.text().split(',').next().unwrap_or_default();
    let name = CString::new(name).map_err(zero)?;
    let mut number = 0;
    // SAFETY: the name ends in zero; the number is written during the call.
    let result = unsafe { dpdk_sys::rte_eth_dev_get_port_by_name(name.as_ptr(), &mut number) };
    if result < 0 { Err(refuse(describe(result))) } else { Ok(number) }
}

/// Descriptors of this process that are packet sockets, with their inodes.
fn packet_sockets() -> Vec<(c_int, String)> {
    let table = std::fs::read_to_string("/proc/thread-self/net/packet").unwrap_or_default();
    let inodes: Vec<&str> = table.lines().skip(1).filter_map(|line| line.split_whitespace().last()).collect();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        let number = entry.file_name().to_string_lossy().parse();
        if let (Some(inode), Ok(number)) = (inode, number)
            && inodes.contains(&inode)
        {
            found.push((number, inode.to_owned()));
        }
    }
    found
}

/// The packet driver has no interrupts, but its socket is readable while its ring holds packets.
fn readable(socket: c_int) -> Option<Wake> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).ok()?;
    // SAFETY: the driver opened it and closes it with the port; it is only borrowed for this call, and a closed
    // descriptor leaves the epoll set by itself.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)).ok()?;
    Some(Wake { epoll, interrupt: false })
}
