//! Packet buffers and where they come from and go to.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
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
    /// The frame.
    fn data(&self) -> &[u8];
    /// The frame, to be rewritten.
    fn data_mut(&mut self) -> &mut [u8];
    /// A new frame, for the few packets that the worker makes itself.
    fn from_bytes(bytes: &[u8]) -> Self;
}

impl PacketBuf for Vec<u8> {
    fn data(&self) -> &[u8] {
        self
    }

    fn data_mut(&mut self) -> &mut [u8] {
        self
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        bytes.to_vec()
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
    fn data(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn data_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Self { buffer: bytes.to_vec(), len: bytes.len() }
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
