//! One process for each path. Whoever listens on Unix sockets or keeps files takes them first, so that a second start on
//! the same ones says so and touches nothing. The kernel lets go of a lock when its process ends, however it ends.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flow::socket::{Occupant, occupant};

/// Bytes of a lock file that are read: a process number has ten digits at most.
const NOTE_LEN_MAX: u64 = 32;

/// Paths that are this process's own as long as the value lives.
#[derive(Debug)]
#[must_use = "the paths are let go of with the value"]
pub struct Lock(#[expect(dead_code, reason = "a file that is open is what holds its lock")] Vec<File>);

/// Why a process does not start.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another one has the path.
    #[error(
        "{path}: limosa run {process} is already running here{holder}; nothing was changed. Stop that one first, or \
         give this one paths of its own"
    )]
    Running {
        /// Which of `limosa run`.
        process: &'static str,
        /// What both want.
        path: PathBuf,
        /// The process that has it, if it is known.
        holder: String,
    },
    /// Somebody listens there without its lock: the lock file was removed, or it is no process of Limosa.
    #[error(
        "{0}: another process listens here, though nobody holds its lock; nothing was changed. Stop that one first (its \
         lock file may have been removed), or give this one paths of its own"
    )]
    Taken(PathBuf),
    /// Something that is no socket is where one is to be.
    #[error(
        "{0}: something that is no socket is in the way of one, and is left alone: move it, or use another path"
    )]
    InTheWay(PathBuf),
    /// The lock cannot be had.
    #[error("{path}: cannot be locked: {source}")]
    Unusable {
        /// What was to be locked.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Takes the paths of sockets that are to be made. Each has a lock file beside it, which stays.
///
/// # Errors
/// [`LockError`]; none of the sockets was touched then.
pub fn sockets<'a>(
    process: &'static str,
    paths: impl IntoIterator<Item = &'a Path>,
) -> Result<Lock, LockError> {
    let mut held = Vec::new();
    for path in paths {
        held.push(beside(process, path)?);
        not_in_the_way(path)?;
    }
    Ok(Lock(held))
}

/// Takes the part of a directory that an agent has: the workers' sockets are others'. It is made if it is not there.
///
/// # Errors
/// [`LockError`].
pub fn agent(directory: &Path) -> Result<Lock, LockError> {
    make(directory)?;
    beside("site", &directory.join("agent")).map(|file| Lock(vec![file]))
}

/// Takes a whole directory, which is made if it is not there. Nothing is written into it.
///
/// # Errors
/// [`LockError`].
pub fn directory(process: &'static str, path: &Path) -> Result<Lock, LockError> {
    make(path)?;
    let file = File::open(path).map_err(|source| LockError::Unusable { path: path.to_owned(), source })?;
    try_lock(&file, process, path, String::new)?;
    Ok(Lock(vec![file]))
}

/// Whether a process that runs could have another directory after its next start: what a start does is tried, and what was made for it
/// is taken away again.
///
/// # Errors
/// [`LockError`], as [`agent`] and [`directory`].
pub fn could_have_directory(path: &Path) -> Result<(), LockError> {
    let missing: Vec<&Path> =
        path.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists()).collect();
    let made = make(path);
    let writable = made.and_then(|()| could_have_file(&path.join(".limosa-tried")));
    for directory in missing {
        // Others may have put something there meanwhile.
        let _ = std::fs::remove_dir(directory);
    }
    writable
}

/// The same of the path of a socket.
///
/// # Errors
/// [`LockError`], as [`sockets`].
pub fn could_have_socket(path: &Path) -> Result<(), LockError> {
    could_have_file(&lock_path(path))?;
    not_in_the_way(path)
}

fn could_have_file(path: &Path) -> Result<(), LockError> {
    let unusable = |source| LockError::Unusable { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    match options.write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => std::fs::remove_file(path).map_err(unusable),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(unusable(error)),
    }
}

/// Whether a socket can be made there.
fn not_in_the_way(path: &Path) -> Result<(), LockError> {
    match occupant(path).map_err(|source| LockError::Unusable { path: path.to_owned(), source })? {
        Occupant::Nobody | Occupant::Abandoned => Ok(()),
        Occupant::Listener => Err(LockError::Taken(path.to_owned())),
        Occupant::Other => Err(LockError::InTheWay(path.to_owned())),
    }
}

fn make(directory: &Path) -> Result<(), LockError> {
    let unusable = |source| LockError::Unusable { path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(unusable)
}

fn beside(process: &'static str, path: &Path) -> Result<File, LockError> {
    let lock = lock_path(path);
    let unusable = |source| LockError::Unusable { path: lock.clone(), source };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&lock);
    let mut file = file.map_err(unusable)?;
    try_lock(&file, process, path, || holder(&mut &file))?;
    note(&mut file).map_err(unusable)?;
    Ok(file)
}

fn try_lock(
    file: &File,
    process: &'static str,
    path: &Path,
    holder: impl FnOnce() -> String,
) -> Result<(), LockError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(LockError::Running { process, path: path.to_owned(), holder: holder() })
        }
        Err(TryLockError::Error(source)) => Err(LockError::Unusable { path: path.to_owned(), source }),
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".lock");
    name.into()
}

/// Writes down for people who has the lock.
fn note(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "{}", std::process::id())
}

fn holder(file: &mut impl Read) -> String {
    let mut text = String::new();
    match file.take(NOTE_LEN_MAX).read_to_string(&mut text).ok().and_then(|_| text.trim().parse::<u32>().ok())
    {
        Some(process) => format!(" (process {process})"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_path_is_taken_once_and_free_again_when_its_process_lets_go() {
        let place = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| place.path().join(name));
        let first = sockets("switch", [a.as_path(), &b]).unwrap();
        // One path in common is enough.
        let refused = sockets("switch", [b.as_path()]).unwrap_err().to_string();
        let expected = format!(
            "{}: limosa run switch is already running here (process {})",
            b.display(),
            std::process::id()
        );
        assert!(refused.starts_with(&expected), "{refused}");
        drop(first);
        drop(sockets("switch", [b.as_path()]).unwrap());
        let first = directory("placement", &place.path().join("new")).unwrap();
        let refused = directory("placement", &place.path().join("new")).unwrap_err().to_string();
        assert!(refused.contains("limosa run placement is already running here; nothing"), "{refused}");
        // An agent and a placement node may have one directory, two agents may not.
        let agents = agent(&place.path().join("new")).unwrap();
        let refused = agent(&place.path().join("new")).unwrap_err().to_string();
        assert!(
            refused.contains("new/agent: limosa run site is already running here (process "),
            "{refused}"
        );
        drop((first, agents));
        drop(directory("placement", &place.path().join("new")).unwrap());
    }

    #[test]
    fn what_could_be_had_is_tried_and_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("file"), "").unwrap();
        let names = || std::fs::read_dir(place.path()).unwrap().count();
        could_have_directory(&place.path().join("a/b")).unwrap();
        could_have_directory(place.path()).unwrap();
        could_have_socket(&place.path().join("socket")).unwrap();
        assert_eq!(names(), 1);
        for (refused, said) in [
            (could_have_directory(&place.path().join("file/a")), "file/a: cannot be locked: "),
            (could_have_directory(&place.path().join("file")), "file: cannot be locked: "),
            (could_have_directory(Path::new("/proc/none")), "/proc/none: cannot be locked: "),
            (could_have_socket(&place.path().join("none/socket")), "none/socket.lock: cannot be locked: "),
            (
                could_have_socket(&place.path().join("file")),
                "file: something that is no socket is in the way",
            ),
        ] {
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains(said), "{refused}");
        }
        assert_eq!(names(), 1);
    }

    #[test]
    fn what_is_no_socket_is_not_in_the_way_of_being_lost() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("precious");
        std::fs::write(&path, "text").unwrap();
        let refused = sockets("worker", [path.as_path()]).unwrap_err();
        assert!(matches!(refused, LockError::InTheWay(_)), "{refused}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
        // Nor is a socket at which somebody listens without a lock, as where the lock file was removed.
        let living = place.path().join("living");
        let _listener = UnixListener::bind(&living).unwrap();
        let refused = sockets("worker", [living.as_path()]).unwrap_err();
        assert!(matches!(refused, LockError::Taken(_)), "{refused}");
        assert!(refused.to_string().contains("living: another process listens here"), "{refused}");
        assert!(std::os::unix::net::UnixStream::connect(&living).is_ok());
        // A socket that a dead process left is replaced.
        let stale = place.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        let _ = sockets("worker", [stale.as_path()]).unwrap();
        let missing = sockets("worker", [place.path().join("no/where").as_path()]).unwrap_err().to_string();
        assert!(missing.contains("no/where.lock: cannot be locked"), "{missing}");
    }
}
