//! Sockets that a killed process has left behind.

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Removes a Unix socket at which nobody listens any more. DPDK binds its sockets anew and refuses a path that is there, so a
/// worker that was killed could otherwise not be started again. Any other file stays, and so does a socket in use.
pub(crate) fn remove_abandoned(path: &Path) {
    let is_socket = path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    {
        // If that fails, opening the device does so too, and names it.
        let _ = std::fs::remove_file(path);
    }
}
