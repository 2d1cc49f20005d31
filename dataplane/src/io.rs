//! Packet buffers and where they come from and go to.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use flow::Micros;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, UnixAddr, connect, recvmmsg, sendmmsg,
    setsockopt, socket, sockopt,
};

use crate::worker::BURST_LEN;

/// Longest frame.
pub const FRAME_LEN_MAX: usize = 9_216;

/// Bytes asked of the kernel for each direction of a packet socket.
const SOCKET_BUFFER_LEN: usize = 4 << 20;

/// Packets that wait for the switch before reading stops.
const TX_QUEUE_LEN: usize = 1_024;

/// Packets kept while no switch is there; more are dropped and counted.
const DETACHED_QUEUE_LEN: usize = 4_096;

/// A frame that the worker may rewrite in place.
pub trait PacketBuf: Sized {
    /// Where new frames come from.
    type Pool: std::fmt::Debug;
    /// The frame.
    fn data(&self) -> &[u8];
    /// The frame, to be rewritten.
    fn data_mut(&mut self) -> &mut [u8];
    /// A new frame, for the few packets that the worker makes itself; none when no buffer is free.
    fn from_bytes(pool: &Self::Pool, bytes: &[u8]) -> Option<Self>;
    /// Cuts the frame to a length; one that is shorter stays as it is.
    fn truncate(&mut self, len: usize);
    /// The frame, to be kept for a while in no more memory than it needs; and the buffer that it was in, if it is in another now.
    fn compact(self) -> (Self, Option<Self>);
    /// Bytes of memory that the frame takes.
    fn footprint(&self) -> usize;
}

impl PacketBuf for Vec<u8> {
    type Pool = ();

    fn data(&self) -> &[u8] {
        self
    }

    fn data_mut(&mut self) -> &mut [u8] {
        self
    }

    fn from_bytes((): &(), bytes: &[u8]) -> Option<Self> {
        Some(bytes.to_vec())
    }

    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }

    fn compact(self) -> (Self, Option<Self>) {
        (self, None)
    }

    fn footprint(&self) -> usize {
        self.len()
    }
}

/// A frame in a buffer of full length, so that it can be received into again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    buffer: Vec<u8>,
    len: usize,
}

impl Frame {
    fn empty() -> Self {
        Self { buffer: vec![0; FRAME_LEN_MAX], len: 0 }
    }
}

impl PacketBuf for Frame {
    type Pool = ();

    fn data(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn data_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }

    fn from_bytes((): &(), bytes: &[u8]) -> Option<Self> {
        Some(Self { buffer: bytes.to_vec(), len: bytes.len() })
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn compact(self) -> (Self, Option<Self>) {
        if self.buffer.len() == self.len {
            return (self, None);
        }
        (Self { buffer: self.data().to_vec(), len: self.len }, Some(self))
    }

    fn footprint(&self) -> usize {
        self.buffer.len()
    }
}

/// Where packets come from and go to.
pub trait PacketIo<B: PacketBuf> {
    /// Appends what has come in, at most a burst, without waiting.
    ///
    /// # Errors
    /// The peer is gone.
    fn rx_burst(&mut self, packets: &mut Vec<B>) -> Result<usize, Errno>;

    /// Sends all of `packets`, in order; what does not go out now is kept and goes first next time.
    ///
    /// # Errors
    /// The peer is gone; what was not sent is kept.
    fn tx_burst(&mut self, packets: &mut Vec<B>) -> Result<(), Errno>;

    /// Takes buffers back.
    fn recycle(&mut self, packets: &mut Vec<B>);
}

/// Packets that a link lost or refused, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// The switch took too few.
    pub tx_full: u64,
    /// Taken by the device and not sent.
    pub tx_error: u64,
    /// Sent while there was no link.
    pub link_down: u64,
    /// No buffer was free. A device that does not count them itself adds one for every look that found none.
    pub no_buffer: u64,
    /// Longer than a frame may be.
    pub oversize: u64,
    /// Lost in the device before we looked.
    pub rx_missed: u64,
    /// Received damaged.
    pub rx_error: u64,
}

/// What to do while a link brings nothing.
#[derive(Debug)]
pub enum Rest<'a> {
    /// Look again at once.
    Spin,
    /// Look again after so long.
    Nap(Micros),
    /// Look again when the descriptor is ready.
    Until(BorrowedFd<'a>, PollFlags),
}

/// A worker's one link to its switch, and how it is kept.
pub trait SwitchLink: PacketIo<Self::Buf> {
    /// What its packets are in.
    type Buf: PacketBuf;

    /// Does what is due: reaches for the switch, looks at the device. Called at every turn.
    fn maintain(&mut self, now: Micros);

    /// How to wait, after nothing has come for `idle`.
    fn rest(&mut self, idle: Micros) -> Rest<'_>;

    /// What was lost since the last call.
    fn take_drops(&mut self) -> Drops;

    /// Whether the switch is there, by what the last [`Self::maintain`] saw.
    fn is_up(&self) -> bool;
}

/// Queues in memory, for tests and benches.
#[derive(Debug)]
pub struct MemoryIo<B> {
    /// To be received.
    pub rx: VecDeque<B>,
    /// Was sent.
    pub tx: Vec<B>,
}

impl<B> Default for MemoryIo<B> {
    fn default() -> Self {
        Self { rx: VecDeque::new(), tx: Vec::new() }
    }
}

impl<B: PacketBuf> PacketIo<B> for MemoryIo<B> {
    fn rx_burst(&mut self, packets: &mut Vec<B>) -> Result<usize, Errno> {
        let count = self.rx.len().min(BURST_LEN);
        packets.extend(self.rx.drain(..count));
        Ok(count)
    }

    fn tx_burst(&mut self, packets: &mut Vec<B>) -> Result<(), Errno> {
        self.tx.append(packets);
        Ok(())
    }

    fn recycle(&mut self, packets: &mut Vec<B>) {
        packets.clear();
    }
}

/// A connection to the switch, one frame per message.
#[derive(Debug)]
pub struct SeqpacketIo {
    socket: Option<OwnedFd>,
    queue: VecDeque<Frame>,
    /// Buffers to receive into.
    pool: Vec<Frame>,
    dropped: u64,
}

impl Default for SeqpacketIo {
    fn default() -> Self {
        Self::new()
    }
}

impl SeqpacketIo {
    /// Not connected yet.
    #[must_use]
    pub fn new() -> Self {
        Self { socket: None, queue: VecDeque::new(), pool: Vec::new(), dropped: 0 }
    }

    /// Over a socket that is connected.
    ///
    /// # Errors
    /// The socket cannot be made nonblocking.
    pub fn attach(&mut self, socket: OwnedFd) -> Result<(), Errno> {
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        // The kernel may grant less.
        let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_LEN);
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN);
        self.socket = Some(socket);
        Ok(())
    }

    /// Connects to the switch.
    ///
    /// # Errors
    /// As `connect(2)` says.
    pub fn connect(&mut self, path: &Path) -> Result<(), Errno> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        self.attach(fd)
    }

    /// The socket, while connected.
    #[must_use]
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Forgets a connection that failed. What waits is kept for the next one.
    pub fn detach(&mut self) {
        self.socket = None;
    }

    /// Whether packets wait for the switch.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Packets dropped for want of a switch since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn recycle_one(&mut self, packet: Frame) {
        if self.pool.len() < TX_QUEUE_LEN && packet.buffer.len() == FRAME_LEN_MAX {
            self.pool.push(packet);
        }
    }

    /// Sends from the queue until it is empty or the socket is full.
    fn flush(&mut self) -> Result<(), Errno> {
        while !self.queue.is_empty() {
            let Some(socket) = &self.socket else { return Ok(()) };
            let sent = send_some(socket, &self.queue);
            match sent {
                Ok(0) | Err(Errno::EAGAIN | Errno::ENOBUFS) => return Ok(()),
                Ok(sent) => {
                    for _ in 0..sent {
                        if let Some(packet) = self.queue.pop_front() {
                            self.recycle_one(packet);
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                // This one can never be sent; the others can.
                Err(Errno::EMSGSIZE) => {
                    self.queue.pop_front();
                    self.dropped += 1;
                }
                Err(error) => {
                    self.detach();
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

fn send_some(socket: &OwnedFd, queue: &VecDeque<Frame>) -> Result<usize, Errno> {
    let count = queue.len().min(BURST_LEN);
    let slices: [[IoSlice<'_>; 1]; BURST_LEN] =
        std::array::from_fn(|at| [IoSlice::new(queue.get(at).map_or(&[], Frame::data))]);
    let addresses = [None::<UnixAddr>; BURST_LEN];
    let mut headers = MultiHeaders::preallocate(count, None);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let results =
        sendmmsg(socket.as_raw_fd(), &mut headers, &slices[..count], &addresses[..count], [], flags)?;
    Ok(results.count())
}

impl PacketIo<Frame> for SeqpacketIo {
    fn rx_burst(&mut self, packets: &mut Vec<Frame>) -> Result<usize, Errno> {
        self.flush()?;
        if self.queue.len() >= TX_QUEUE_LEN {
            return Ok(0); // The switch is slow: let it queue, rather than drop here.
        }
        let Some(socket) = &self.socket else { return Ok(0) };
        while self.pool.len() < BURST_LEN {
            self.pool.push(Frame::empty());
        }
        let start = self.pool.len() - BURST_LEN;
        let received = receive_some(socket, &mut self.pool[start..]);
        let lengths = match received {
            Ok(lengths) => lengths,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(error) => {
                self.detach();
                return Err(error);
            }
        };
        let count = lengths.iter().take_while(|len| **len > 0).count();
        let closed = lengths[0] == 0;
        for (mut packet, len) in self.pool.drain(start..start + count).zip(lengths) {
            packet.len = len;
            packets.push(packet);
        }
        if closed {
            self.detach();
            return Err(Errno::ECONNRESET);
        }
        Ok(count)
    }

    fn tx_burst(&mut self, packets: &mut Vec<Frame>) -> Result<(), Errno> {
        self.queue.extend(packets.drain(..));
        let result = self.flush();
        if self.socket.is_none() && self.queue.len() > DETACHED_QUEUE_LEN {
            let excess = self.queue.len() - DETACHED_QUEUE_LEN;
            self.queue.drain(..excess);
            self.dropped += excess as u64;
        }
        result
    }

    fn recycle(&mut self, packets: &mut Vec<Frame>) {
        for packet in packets.drain(..) {
            self.recycle_one(packet);
        }
    }
}

/// First and longest wait between attempts to reach the switch.
const BACKOFF_MIN: Micros = Micros(10_000);
const BACKOFF_MAX: Micros = Micros(1_000_000);

/// [`SeqpacketIo`] that connects again and again.
#[derive(Debug)]
pub struct SocketLink {
    io: SeqpacketIo,
    path: PathBuf,
    connect_at: Micros,
    backoff: Micros,
}

impl SocketLink {
    /// To a switch that listens at `path`, now or later.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { io: SeqpacketIo::new(), path, connect_at: Micros(0), backoff: BACKOFF_MIN }
    }
}

impl PacketIo<Frame> for SocketLink {
    fn rx_burst(&mut self, packets: &mut Vec<Frame>) -> Result<usize, Errno> {
        self.io.rx_burst(packets)
    }

    fn tx_burst(&mut self, packets: &mut Vec<Frame>) -> Result<(), Errno> {
        self.io.tx_burst(packets)
    }

    fn recycle(&mut self, packets: &mut Vec<Frame>) {
        self.io.recycle(packets);
    }
}

impl SwitchLink for SocketLink {
    type Buf = Frame;

    fn maintain(&mut self, now: Micros) {
        if self.io.socket().is_some() || now < self.connect_at {
            return;
        }
        match self.io.connect(&self.path) {
            Ok(()) => {
                tracing::info!(path = %self.path.display(), "connected to the switch");
                self.backoff = BACKOFF_MIN;
            }
            Err(error) => {
                tracing::debug!(%error, path = %self.path.display(), "cannot reach the switch");
                self.backoff = Micros((self.backoff.0 * 2).min(BACKOFF_MAX.0));
            }
        }
        self.connect_at = now.plus(self.backoff);
    }

    fn rest(&mut self, _idle: Micros) -> Rest<'_> {
        let Some(socket) = self.io.socket() else { return Rest::Nap(BACKOFF_MIN) };
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, self.io.is_waiting());
        Rest::Until(socket.as_fd(), flags)
    }

    fn take_drops(&mut self) -> Drops {
        Drops { tx_full: self.io.take_dropped(), ..Drops::default() }
    }

    fn is_up(&self) -> bool {
        self.io.socket().is_some()
    }
}

/// Lengths of the frames received, 0 behind the last; all 0 when the peer has closed.
fn receive_some(socket: &OwnedFd, buffers: &mut [Frame]) -> Result<[usize; BURST_LEN], Errno> {
    let mut headers = MultiHeaders::<UnixAddr>::preallocate(BURST_LEN, None);
    let mut buffers = buffers.iter_mut();
    let mut slices: [[IoSliceMut<'_>; 1]; BURST_LEN] =
        std::array::from_fn(|_| [IoSliceMut::new(buffers.next().map_or(&mut [], |frame| &mut frame.buffer))]);
    let results =
        recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None)?;
    let mut lengths = [0; BURST_LEN];
    for (length, result) in lengths.iter_mut().zip(results) {
        *length = result.bytes;
    }
    Ok(lengths)
}
