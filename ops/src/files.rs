//! Files that operators give to a process: configuration, certificates, keys. A process reads them again while it runs, and
//! what is at their paths by then may be no file at all, or on a file system that gives no answer. So they are looked at
//! before they are opened, on a thread of their own, and nobody waits for them longer than [`BOUND`].

use std::collections::BTreeSet;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::OFlag;

/// Longest wait for one file. What answers at all does so within a second, also when a disk has to wake first; who renews
/// certificates, or sends a signal, waits for this.
pub const BOUND: Duration = Duration::from_secs(5);
/// Longest file in bytes: the authorities of the whole open network have a quarter of a million.
const LEN_MAX: u64 = 4 << 20;

/// The paths that a thread is at: one each, so that threads that never come back do not pile up.
static IN_HAND: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static LET_GO: Condvar = Condvar::new();

fn in_hand() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    IN_HAND.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a whole file.
///
/// # Errors
/// When it is not there, no regular file, too long, or cannot be read; of kind [`ErrorKind::TimedOut`] when there is no
/// answer within [`BOUND`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    within(path, BOUND, read_now)
}

/// The same of a file of text.
///
/// # Errors
/// As [`read`], and when it is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| io::Error::new(ErrorKind::InvalidData, "it is not UTF-8 text"))
}

/// Whether there is a file.
///
/// # Errors
/// As [`read`], but it is not opened.
pub fn check(path: &Path) -> io::Result<()> {
    within(path, BOUND, |path| regular(&std::fs::metadata(path)?))
}

/// Does something with a path that may take for ever, for as long as somebody waits. One thing at a time is done with a
/// path: what comes later waits for it, no longer either.
///
/// # Errors
/// Those of the work, and of kind [`ErrorKind::TimedOut`] when it has not ended by then.
pub fn within<T: Send + 'static>(
    path: &Path,
    bound: Duration,
    work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let late = || {
        let text = format!("it gave no answer within {} s: does its file system?", bound.as_secs_f64());
        io::Error::new(ErrorKind::TimedOut, text)
    };
    let taken = Taken::take(path, bound).ok_or_else(late)?;
    let (done, wait) = sync_channel(1);
    std::thread::Builder::new().name("file".into()).spawn(move || {
        let result = work(&taken.0);
        drop(taken);
        // Whoever waited may have gone.
        let _ = done.send(result);
    })?;
    wait.recv_timeout(bound).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(late()),
        RecvTimeoutError::Disconnected => Err(io::Error::other("the thread that was to read it has ended")),
    })
}

/// A path that is nobody else's until this is dropped.
struct Taken(PathBuf);

impl Taken {
    fn take(path: &Path, bound: Duration) -> Option<Self> {
        let wait = LET_GO.wait_timeout_while(in_hand(), bound, |paths| paths.contains(path));
        let (mut paths, _) = wait.unwrap_or_else(PoisonError::into_inner);
        paths.insert(path.to_owned()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        in_hand().remove(&self.0);
        LET_GO.notify_all();
    }
}

fn read_now(path: &Path) -> io::Result<Vec<u8>> {
    // Before it is opened: that alone sets some devices going, and wakes who waits at the other end of a FIFO.
    regular(&std::fs::metadata(path)?)?;
    // What took the file's place meanwhile is not waited for either.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    regular(&file.metadata()?)?;
    read_bounded(file)
}

fn read_bounded(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LEN_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LEN_MAX {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("it is longer than {LEN_MAX} bytes")));
    }
    Ok(bytes)
}

fn regular(found: &Metadata) -> io::Result<()> {
    let kind = found.file_type();
    let what = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_dir() => "a directory",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(io::Error::new(ErrorKind::InvalidInput, format!("it is {what}, a regular file is wanted")))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_refused_at_once_and_not_opened() {
        let place = tempfile::tempdir().unwrap();
        let fifo = place.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let socket = place.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, what) in [
            (fifo.as_path(), "a FIFO"),
            (place.path(), "a directory"),
            (socket.as_path(), "a socket"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            for error in [read(path).unwrap_err(), check(path).unwrap_err()] {
                assert_eq!(error.to_string(), format!("it is {what}, a regular file is wanted"));
            }
        }
        assert_eq!(read(&place.path().join("no")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_file_is_read_whole_through_links_and_one_that_is_too_long_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let [file, link] = ["file", "link"].map(|name| place.path().join(name));
        std::fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read_text(&link).unwrap(), "text");
        File::create(&file).unwrap().set_len(LEN_MAX).unwrap();
        assert_eq!(read(&file).unwrap().len() as u64, LEN_MAX);
        File::create(&file).unwrap().set_len(LEN_MAX + 1).unwrap();
        assert_eq!(read(&file).unwrap_err().to_string(), "it is longer than 4194304 bytes");
        std::fs::write(&file, [0xff]).unwrap();
        assert_eq!(read_text(&file).unwrap_err().to_string(), "it is not UTF-8 text");
    }

    #[test]
    fn a_path_that_gives_no_answer_has_one_thread_and_nobody_waits_for_it_for_ever() {
        let path = Path::new("/a/file/that/gives/no/answer");
        let threads = Arc::new(AtomicUsize::new(0));
        let (answer, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let ask = || {
            let (threads, gate) = (threads.clone(), gate.clone());
            within(path, Duration::from_millis(20), move |_| {
                threads.fetch_add(1, Ordering::Relaxed);
                gate.lock().unwrap().recv().map_err(io::Error::other)
            })
        };
        for _ in 0..10 {
            let error = ask().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            assert!(error.to_string().contains("gave no answer within 0.02 s"), "{error}");
        }
        // A slow machine may not even have begun it.
        assert!(threads.load(Ordering::Relaxed) <= 1);
        answer.send(()).unwrap();
        // Others are not held up, and the path is free once it has answered.
        assert!(within(Path::new("/another"), BOUND, |_| Ok(())).is_ok());
        assert_eq!(within(path, Duration::from_secs(60), |_| Ok(7)).unwrap(), 7);
    }
}
