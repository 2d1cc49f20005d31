//! Many datagrams per system call, and waiting with microseconds.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrStorage, recvmmsg, sendmmsg, setsockopt,
    sockopt,
};
use nix::sys::time::TimeSpec;

/// Datagrams per system call.
pub(crate) const BATCH_LEN: usize = 32;

/// Longest datagram, a jumbo frame with tunnel headers; longer ones are cut off.
const DATAGRAM_LEN_MAX: usize = 9_728;

/// Socket buffers that are asked for. The kernel may grant less.
const SOCKET_BUFFER_LEN: usize = 8 << 20;

/// Buffers that datagrams are received into.
pub(crate) struct Inbox {
    buffers: Vec<Vec<u8>>,
    lengths: [usize; BATCH_LEN],
    arrivals: [Option<TimeSpec>; BATCH_LEN],
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            buffers: vec![vec![0; DATAGRAM_LEN_MAX]; BATCH_LEN],
            lengths: [0; BATCH_LEN],
            arrivals: [None; BATCH_LEN],
        }
    }

    /// Receives without waiting; the number of datagrams, 0 when there are none. A datagram of length 0 is
    /// what a closed connection reads as.
    pub(crate) fn receive<F: AsFd>(&mut self, socket: &F) -> Result<usize, Errno> {
        let room = nix::cmsg_space!(TimeSpec);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH_LEN, Some(room));
        let mut buffers = self.buffers.iter_mut();
        let mut slices: [[IoSliceMut<'_>; 1]; BATCH_LEN] =
            std::array::from_fn(|_| [IoSliceMut::new(buffers.next().map_or(&mut [], Vec::as_mut_slice))]);
        let fd = socket.as_fd().as_raw_fd();
        let results = match recvmmsg(fd, &mut headers, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None) {
            Ok(results) => results,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(error) => return Err(error),
        };
        let mut count = 0;
        for ((length, arrival), result) in self.lengths.iter_mut().zip(&mut self.arrivals).zip(results) {
            *length = result.bytes;
            *arrival = arrival_of(&result);
            count += 1;
        }
        Ok(count)
    }

    /// When the kernel had the datagram, by the wall clock; `None` for sockets that were not [`timestamped`].
    pub(crate) fn arrival(&self, at: usize) -> Option<TimeSpec> {
        self.arrivals[at]
    }

    pub(crate) fn datagram(&self, at: usize) -> &[u8] {
        &self.buffers[at][..self.lengths[at]]
    }
}

fn arrival_of(message: &RecvMsg<'_, '_, SockaddrStorage>) -> Option<TimeSpec> {
    let mut notes = message.cmsgs().ok()?;
    notes.find_map(|note| if let ControlMessageOwned::ScmTimestampns(at) = note { Some(at) } else { None })
}

/// From now on the kernel notes when each datagram came.
pub(crate) fn timestamped<F: AsFd>(socket: &F) -> Result<(), Errno> {
    setsockopt(socket, sockopt::ReceiveTimestampns, &true)
}

/// Sends up to [`BATCH_LEN`] datagrams; the number that the kernel took, 0 when the socket is full.
pub(crate) fn send<'a, F: AsFd>(
    socket: &F,
    datagrams: impl Iterator<Item = &'a [u8]>,
    to: Option<SockaddrStorage>,
) -> Result<usize, Errno> {
    let mut slices: [[IoSlice<'_>; 1]; BATCH_LEN] = std::array::from_fn(|_| [IoSlice::new(&[])]);
    let mut count = 0;
    for (slice, datagram) in slices.iter_mut().zip(datagrams) {
        *slice = [IoSlice::new(datagram)];
        count += 1;
    }
    let addresses = [to; BATCH_LEN];
    let mut headers = MultiHeaders::preallocate(count, None);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let fd = socket.as_fd().as_raw_fd();
    match sendmmsg(fd, &mut headers, &slices[..count], &addresses[..count], [], flags) {
        Ok(results) => Ok(results.count()),
        Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Waits until a socket is ready or the time is over.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Duration) -> Result<(), Errno> {
    match ppoll(fds, Some(TimeSpec::from_duration(timeout)), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether something is to be read, or an error to be seen.
pub(crate) fn is_readable(fd: &PollFd<'_>) -> bool {
    let wanted = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
    fd.revents().is_some_and(|events| events.intersects(wanted))
}

/// Larger buffers, beyond the system's limit where we may.
pub(crate) fn grow_buffers<F: AsFd>(socket: &F) {
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_LEN).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER_LEN);
    }
}
