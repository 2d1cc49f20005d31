//! Paths of Unix sockets: taken only where nobody listens, kept while they are one's own, and given back only then.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use crate::Micros;

/// Between two looks whether a path still is one's own: whoever looks for the socket does so about as often, and a look
/// costs a microsecond.
pub const LOOK_INTERVAL: Micros = Micros(1_000_000);

/// What is where somebody wants to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// Nothing.
    Nobody,
    /// A socket that a process has left which is gone.
    Abandoned,
    /// A socket of a process that lives.
    Listener,
    /// Something that is no socket.
    Other,
}

/// Looks what is at a path. A process that listens there does not notice.
///
/// # Errors
/// When nothing can be said, as for want of permission.
pub fn occupant(path: &Path) -> io::Result<Occupant> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Ok(Occupant::Other),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Occupant::Nobody),
        Err(error) => return Err(error),
    }
    // A socket for datagrams never connects to one for streams or packets of a connection, nor waits for room there, but
    // it is told whether there is one.
    let Err(error) = UnixDatagram::unbound()?.connect(path) else { return Ok(Occupant::Listener) };
    if error.kind() == ErrorKind::ConnectionRefused {
        return Ok(Occupant::Abandoned);
    }
    if error.kind() == ErrorKind::NotFound {
        return Ok(Occupant::Nobody);
    }
    if error.kind() == ErrorKind::PermissionDenied {
        return Err(error);
    }
    // Of another type (`EPROTOTYPE`), and so of somebody.
    Ok(Occupant::Listener)
}

/// Removes a socket at which nobody listens any more. Anything else that is there stays.
fn make_room(path: &Path) -> io::Result<()> {
    let in_use = |why| Err(io::Error::new(ErrorKind::AddrInUse, why));
    match occupant(path)? {
        Occupant::Nobody => Ok(()),
        Occupant::Abandoned => fs::remove_file(path),
        Occupant::Listener => in_use("another process listens there; stop it first, or use another path"),
        Occupant::Other => in_use("something that is no socket is there; move it, or use another path"),
    }
}

/// A path that a socket of this process has. It is removed with the value, if the socket still is there.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// Device and inode. No other file has them while the socket is open, whatever becomes of the path.
    identity: (u64, u64),
}

impl Bound {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }

    fn is_there(&self) -> bool {
        identity(&self.path).is_ok_and(|found| found == self.identity)
    }

    fn give_back(&self) {
        if self.is_there() {
            // A socket that stays is one that the next start takes for abandoned.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// How a listening socket is opened at a path where there is nothing.
pub type Bind<S> = fn(&Path) -> io::Result<S>;

/// A listening socket at a path of its own.
#[derive(Debug)]
pub struct Listening<S> {
    // Let go of before the socket: see `Bound::identity`.
    bound: Bound,
    socket: S,
    bind: Bind<S>,
    failures: u32,
}

/// What a look at the path of a listening socket has found.
#[derive(Debug)]
pub enum Kept {
    /// It is there.
    Own,
    /// It was not there, and was bound again.
    Again,
    /// It is not there and cannot be bound again, for so many looks: nobody can connect.
    Lost(io::Error, u32),
}

impl<S> Listening<S> {
    /// Opens a socket at a path. One that a process has left which is gone is replaced.
    ///
    /// # Errors
    /// When somebody listens there, when something is in the way that is no socket, and those of `bind`.
    pub fn open(path: &Path, bind: Bind<S>) -> io::Result<Self> {
        make_room(path)?;
        let socket = bind(path)?;
        Ok(Self { bound: Bound::of(path)?, socket, bind, failures: 0 })
    }

    /// The socket.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.bound.path
    }

    /// Looks whether the path still leads here, and binds it again if it was taken away.
    pub fn keep(&mut self) -> Kept {
        if self.bound.is_there() {
            self.failures = 0;
            return Kept::Own;
        }
        match Self::open(&self.bound.path, self.bind) {
            Ok(new) => {
                *self = new;
                Kept::Again
            }
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                Kept::Lost(error, self.failures)
            }
        }
    }

    /// Gives the path back: for a process that ends without letting go of its values.
    pub fn give_back(&self) {
        self.bound.give_back();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn bind(path: &Path) -> io::Result<UnixListener> {
        UnixListener::bind(path)
    }

    #[test]
    fn a_socket_is_taken_from_the_dead_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert_eq!(occupant(&path).unwrap(), Occupant::Nobody);
        let first = UnixListener::bind(&path).unwrap();
        first.set_nonblocking(true).unwrap();
        assert_eq!(occupant(&path).unwrap(), Occupant::Listener);
        let refused = Listening::open(&path, bind).unwrap_err();
        assert!(refused.to_string().contains("another process listens"), "{refused}");
        assert_eq!(first.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "and it did not notice");
        let _reaches = UnixStream::connect(&path).unwrap();
        first.accept().unwrap();
        drop(first);
        assert_eq!(occupant(&path).unwrap(), Occupant::Abandoned);
        drop(Listening::open(&path, bind).unwrap());
        assert_eq!(occupant(&path).unwrap(), Occupant::Nobody, "it is given back");
        fs::write(&path, "text").unwrap();
        let refused = Listening::open(&path, bind).unwrap_err();
        assert!(refused.to_string().contains("no socket"), "{refused}");
    }

    #[test]
    fn a_path_that_was_taken_away_is_bound_again_and_that_of_another_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut own = Listening::open(&path, bind).unwrap();
        assert!(matches!(own.keep(), Kept::Own));
        fs::remove_file(&path).unwrap();
        assert!(matches!(own.keep(), Kept::Again));
        assert!(matches!(own.keep(), Kept::Own));
        UnixStream::connect(&path).unwrap();
        own.socket().accept().unwrap();
        // Another process has it now: neither taken from it nor removed at the end.
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(own.keep(), Kept::Lost(_, 1)));
        assert!(matches!(own.keep(), Kept::Lost(_, 2)));
        drop(own);
        UnixStream::connect(&path).unwrap();
        drop(other);
    }
}
