//! A connection to a port of a switch.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::net::Net;
use crate::demo::batch::{self, BATCH_LEN, Inbox};

/// Frames that wait for the switch; more are lost, and counted as the world's own fault.
const BACKLOG_LEN_MAX: usize = 65_536;
/// How often a switch that is gone is called again, in microseconds.
const RETRY_INTERVAL: u64 = 50_000;

/// A port of a switch, and what waits for it.
pub(super) struct Port {
    path: PathBuf,
    socket: Option<OwnedFd>,
    backlog: VecDeque<Vec<u8>>,
    retry_at: u64,
    /// Frames lost here.
    pub(super) dropped: u64,
}

impl Port {
    pub(super) fn open(path: &Path) -> Result<Self, Errno> {
        let socket = Some(dial(path)?);
        Ok(Self { path: path.to_owned(), socket, backlog: VecDeque::new(), retry_at: 0, dropped: 0 })
    }

    pub(super) fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.backlog.is_empty()
    }

    pub(super) fn push(&mut self, frame: Vec<u8>) {
        if self.backlog.len() < BACKLOG_LEN_MAX {
            self.backlog.push_back(frame);
        } else {
            self.dropped += 1;
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self, net: &mut Net) {
        while self.is_waiting() {
            let Some(socket) = &self.socket else { return self.retry(net.now) };
            match batch::send(socket, self.backlog.iter().map(Vec::as_slice), None) {
                Ok(0) => return,
                Ok(sent) => self.backlog.drain(..sent).for_each(|frame| net.recycle(frame)),
                Err(_) => self.socket = None,
            }
        }
    }

    /// Appends all frames that have come.
    pub(super) fn receive(&mut self, inbox: &mut Inbox, net: &mut Net, frames: &mut Vec<Vec<u8>>) {
        while let Some(socket) = &self.socket {
            let count = match inbox.receive(socket) {
                Ok(count) => count,
                Err(_) => return self.socket = None,
            };
            for at in 0..count {
                if inbox.datagram(at).is_empty() {
                    return self.socket = None;
                }
                let mut frame = net.buffer();
                frame.extend_from_slice(inbox.datagram(at));
                frames.push(frame);
            }
            if count < BATCH_LEN {
                return;
            }
        }
    }

    /// Calls a switch that is gone.
    pub(super) fn retry(&mut self, now: u64) {
        if self.socket.is_none() && now >= self.retry_at {
            self.retry_at = now + RETRY_INTERVAL;
            self.socket = dial(&self.path).ok();
        }
    }
}

fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    batch::grow_buffers(&fd);
    Ok(fd)
}
