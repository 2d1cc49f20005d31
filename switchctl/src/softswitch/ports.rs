//! The ports of the embedded switch: sockets, output queues, counters.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use flow::socket::Listening;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use socket2::Socket;

use super::packet::{Packet, VXLAN_LEN};
use super::{PortConfig, PortKind, SwitchError, bind_packets, listen_unix};
use crate::core::rules::PortNo;
use crate::ofp::PortStats;

/// Socket buffers that are asked for: some 10 ms at 10 Gbit/s. The kernel may grant less.
const SOCKET_BUFFER: usize = 8 << 20;

/// All ports, found by number.
pub(super) struct Ports {
    list: Vec<Port>,
    places: HashMap<PortNo, usize>,
    queue_max: usize,
    /// Tunnels that are wanted and could not be opened.
    closed: Vec<PortConfig>,
    /// Packets that rules sent to ports that are not there.
    nowhere: u64,
}

impl Ports {
    pub(super) fn open(configs: &[PortConfig], queue_max: usize) -> Result<Self, SwitchError> {
        let (list, places) = (Vec::new(), HashMap::new());
        let mut ports = Self { list, places, queue_max, closed: Vec::new(), nowhere: 0 };
        // A UDP port that another process has is refused, so tunnels come before any path is touched.
        let mut configs: Vec<_> = configs.iter().collect();
        configs.sort_by_key(|config| matches!(config.kind, PortKind::Socket { .. }));
        for config in configs {
            ports.add(config)?;
        }
        Ok(ports)
    }

    fn add(&mut self, config: &PortConfig) -> Result<(), SwitchError> {
        let number = config.number;
        if self.places.contains_key(&number) || number.0 == 0 || number >= PortNo::MAX {
            return Err(SwitchError::PortNumber(number));
        }
        self.list.push(Port::open(config, self.queue_max)?);
        self.places.insert(number, self.list.len() - 1);
        Ok(())
    }

    /// Has these tunnels and no others from now on. Those that are as before stay as they are, with what they have counted; what cannot
    /// be opened is said, and tried again.
    pub(super) fn set_tunnels(&mut self, tunnels: &[PortConfig]) {
        let wanted = |port: &Port| match port.link {
            Link::Socket { .. } => true,
            Link::Tunnel { .. } => tunnels.iter().any(|tunnel| port.is(tunnel)),
        };
        self.list.retain(wanted);
        self.places = self.list.iter().enumerate().map(|(at, port)| (port.number(), at)).collect();
        let is_there = |tunnel: &&PortConfig| self.places.contains_key(&tunnel.number);
        self.closed = tunnels.iter().filter(|tunnel| !is_there(tunnel)).cloned().collect();
        for (tunnel, error) in self.open_closed() {
            tracing::error!(port = tunnel, %error, "a tunnel cannot be opened, and is tried again");
        }
    }

    /// Tries to open the tunnels that could not be opened; those that still cannot be, and why.
    pub(super) fn open_closed(&mut self) -> Vec<(String, SwitchError)> {
        let mut failed = Vec::new();
        for tunnel in std::mem::take(&mut self.closed) {
            match self.add(&tunnel) {
                Ok(()) => tracing::info!(port = tunnel.name, "a tunnel is there"),
                Err(error) => {
                    failed.push((tunnel.name.clone(), error));
                    self.closed.push(tunnel);
                }
            }
        }
        failed
    }

    /// The sockets that peers connect to.
    pub(super) fn listeners(&mut self) -> impl Iterator<Item = &mut Listening<Socket>> {
        self.list.iter_mut().filter_map(|port| match &mut port.link {
            Link::Socket { listener, .. } => Some(listener),
            Link::Tunnel { .. } => None,
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Port> {
        self.list.iter()
    }

    pub(super) fn at(&mut self, place: usize) -> &mut Port {
        &mut self.list[place]
    }

    /// Sends by a port. What is for a number that no port has is dropped, as OpenFlow wants it, and said with its count: at the first, and
    /// each time that there are twice as many.
    pub(super) fn send(&mut self, port: PortNo, packet: &mut Packet, tunnel_id: u64) {
        if let Some(&place) = self.places.get(&port) {
            return self.list[place].send(packet, tunnel_id);
        }
        self.nowhere += 1;
        if self.nowhere.is_power_of_two() {
            tracing::warn!(
                %port,
                packets = self.nowhere,
                "a rule sends packets to a port that is not there: they are dropped"
            );
        }
    }
}

enum Link {
    Socket { listener: Listening<Socket>, peer: Option<Socket> },
    Tunnel { socket: UdpSocket, local: SocketAddr, remote: SocketAddr },
}

/// One port.
pub(super) struct Port {
    name: String,
    link: Link,
    /// Frames that the socket had no room for, the oldest first.
    queue: VecDeque<Box<[u8]>>,
    queue_max: usize,
    stats: PortStats,
}

/// What a read brought.
pub(super) enum Received {
    /// A frame is in the packet.
    Frame { tunnel_id: u64 },
    /// Something that is no frame of ours was read and counted.
    Skipped,
    /// There is no more.
    Nothing,
}

impl Port {
    fn open(config: &PortConfig, queue_max: usize) -> Result<Self, SwitchError> {
        let link = match &config.kind {
            PortKind::Socket { path } => {
                Link::Socket { listener: listen_unix(path, bind_packets)?, peer: None }
            }
            PortKind::Tunnel { local, remote } => {
                Link::Tunnel { socket: open_udp(*local)?, local: *local, remote: *remote }
            }
        };
        let stats = PortStats { port: config.number, ..PortStats::default() };
        Ok(Self { name: config.name.clone(), link, queue: VecDeque::new(), queue_max, stats })
    }

    /// Whether it is what a configuration says.
    fn is(&self, config: &PortConfig) -> bool {
        let same = match (&self.link, &config.kind) {
            (Link::Tunnel { local, remote, .. }, PortKind::Tunnel { local: at, remote: to }) => {
                (local, remote) == (at, to)
            }
            (Link::Socket { listener, .. }, PortKind::Socket { path }) => listener.path() == path,
            (Link::Tunnel { .. }, PortKind::Socket { .. })
            | (Link::Socket { .. }, PortKind::Tunnel { .. }) => false,
        };
        same && self.number() == config.number && self.name == config.name
    }

    pub(super) fn number(&self) -> PortNo {
        self.stats.port
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn stats(&self) -> PortStats {
        self.stats
    }

    pub(super) fn is_up(&self) -> bool {
        !matches!(self.link, Link::Socket { peer: None, .. })
    }

    pub(super) fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Socket { listener, .. } => Some(listener.socket().as_fd()),
            Link::Tunnel { .. } => None,
        }
    }

    pub(super) fn data(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Socket { peer, .. } => peer.as_ref().map(Socket::as_fd),
            Link::Tunnel { socket, .. } => Some(socket.as_fd()),
        }
    }

    /// Takes a new peer in place of the old one.
    pub(super) fn accept(&mut self) {
        let Link::Socket { listener, .. } = &self.link else { return };
        let socket = match listener.socket().accept() {
            Ok((socket, _)) => socket,
            Err(error) => return tracing::debug!(port = self.name, %error, "accept failed"),
        };
        if let Err(error) = socket.set_nonblocking(true) {
            return tracing::warn!(port = self.name, %error, "peer refused");
        }
        grow_buffers(&socket);
        self.hang_up();
        if let Link::Socket { peer, .. } = &mut self.link {
            *peer = Some(socket);
        }
        tracing::info!(port = self.name, "peer connected");
    }

    /// Forgets the peer; what waited for it is lost and counted.
    fn hang_up(&mut self) {
        if let Link::Socket { peer, .. } = &mut self.link
            && peer.take().is_some()
        {
            tracing::info!(port = self.name, lost = self.queue.len(), "peer gone");
        }
        self.stats.tx_dropped += self.queue.len() as u64;
        self.queue.clear();
    }

    pub(super) fn receive(&mut self, packet: &mut Packet) -> Received {
        let result = match &mut self.link {
            Link::Socket { peer: None, .. } => return Received::Nothing,
            Link::Socket { peer: Some(peer), .. } => {
                peer.read(packet.receive_buffer()).map(|len| (len, None))
            }
            Link::Tunnel { socket, .. } => {
                socket.recv_from(packet.receive_buffer()).map(|(len, from)| (len, Some(from)))
            }
        };
        match result {
            // On a seqpacket socket no bytes are the end.
            Ok((0, None)) => self.hang_up(),
            Ok((len, from)) => return self.received(packet, len, from),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return Received::Skipped,
            Err(error) => self.failed(&error),
        }
        Received::Nothing
    }

    fn received(&mut self, packet: &mut Packet, len: usize, from: Option<SocketAddr>) -> Received {
        let tunnel = match &self.link {
            Link::Socket { .. } => Some((0, 0)),
            Link::Tunnel { remote, .. } => {
                let header = packet.receive_buffer()[..len].first_chunk();
                let trusted = from.is_some_and(|from| from.ip().to_canonical() == remote.ip().to_canonical());
                header.filter(|_| trusted).and_then(vxlan_key).map(|key| (key, VXLAN_LEN))
            }
        };
        match tunnel {
            Some((tunnel_id, skip)) if packet.received(len, skip) => {
                self.stats.rx_packets += 1;
                self.stats.rx_bytes += (len - skip) as u64;
                Received::Frame { tunnel_id }
            }
            _ => {
                self.stats.rx_dropped += 1;
                Received::Skipped
            }
        }
    }

    /// Sends, or queues, or drops and counts.
    fn send(&mut self, packet: &mut Packet, tunnel_id: u64) {
        let bytes = match &self.link {
            Link::Socket { peer: None, .. } => {
                self.stats.tx_dropped += 1;
                return;
            }
            Link::Socket { .. } => packet.frame(),
            Link::Tunnel { .. } => packet.encapsulated((tunnel_id & 0xff_ffff) as u32),
        };
        if self.queue.is_empty() {
            match self.write(bytes) {
                Ok(()) => return self.sent(bytes.len()),
                Err(error) if has_no_room(&error) => {}
                Err(error) => {
                    self.stats.tx_dropped += 1;
                    return self.failed(&error);
                }
            }
        }
        if self.queue.len() < self.queue_max {
            self.queue.push_back(bytes.into());
        } else {
            self.stats.tx_dropped += 1;
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        while let Some(frame) = self.queue.pop_front() {
            match self.write(&frame) {
                Ok(()) => self.sent(frame.len()),
                Err(error) if has_no_room(&error) => return self.queue.push_front(frame),
                Err(error) => {
                    self.stats.tx_dropped += 1;
                    self.failed(&error);
                }
            }
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.link {
            Link::Socket { peer: Some(peer), .. } => {
                peer.send_with_flags(bytes, MsgFlags::MSG_NOSIGNAL.bits()).map(drop)
            }
            Link::Socket { peer: None, .. } => Err(ErrorKind::NotConnected.into()),
            Link::Tunnel { socket, remote, .. } => socket.send_to(bytes, remote).map(drop),
        }
    }

    fn sent(&mut self, len: usize) {
        let header = if matches!(self.link, Link::Tunnel { .. }) { VXLAN_LEN } else { 0 };
        self.stats.tx_packets += 1;
        self.stats.tx_bytes += (len - header) as u64;
    }

    /// A Unix peer that is gone is forgotten; anything else concerns one frame only.
    fn failed(&mut self, error: &io::Error) {
        tracing::debug!(port = self.name, %error, "socket error");
        let gone = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset, ErrorKind::NotConnected];
        if gone.contains(&error.kind()) {
            self.hang_up();
        }
    }
}

fn has_no_room(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32)
}

/// The network identifier of a VXLAN header whose I flag is set (RFC 7348, section 5).
fn vxlan_key(header: &[u8; VXLAN_LEN]) -> Option<u64> {
    let key = u32::from_be_bytes([0, header[4], header[5], header[6]]);
    (header[0] & 0x08 != 0).then_some(key.into())
}

fn open_udp(local: SocketAddr) -> Result<UdpSocket, SwitchError> {
    let open = || -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind(local)?;
        socket.set_nonblocking(true)?;
        grow_buffers(&socket);
        Ok(socket)
    };
    open().map_err(|source| SwitchError::Listen { at: local.to_string(), source })
}

/// Larger buffers, beyond the system's limit where we may; smaller ones only cost drops under bursts.
fn grow_buffers<F: AsFd>(socket: &F) {
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &SOCKET_BUFFER);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER);
    }
}
