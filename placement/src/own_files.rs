//! Whether the files that a process has open are still where it opened them. Who has a file open can read and write it also when it
//! was removed or another one took its place: all seems well, until the next start finds nothing.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether all of a node's files are still there; an error says what became of one, and the way back.
pub(crate) fn check(files: &[OwnFile]) -> io::Result<()> {
    files.iter().try_for_each(OwnFile::check).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!(
                "{error}, and what this node promises would be lost with its process. If its directory was moved, put it back, and \
                 start it again. If it is lost, remove this node from the group (`limosa raft remove`), and add one with a number \
                 that was never used before (`limosa raft add`)"
            ),
        )
    })
}

/// A file that is open, by its path.
#[derive(Debug)]
pub(crate) struct OwnFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    len_min: u64,
}

impl OwnFile {
    /// The file that is there now, and never has fewer bytes.
    pub(crate) fn at(path: &Path, len_min: u64) -> io::Result<Self> {
        let found = std::fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), device: found.dev(), inode: found.ino(), len_min })
    }

    /// An error says what became of it.
    fn check(&self) -> io::Result<()> {
        let path = self.path.display();
        let found = std::fs::metadata(&self.path)
            .map_err(|error| io::Error::new(error.kind(), format!("{path}: it is gone ({error})")))?;
        if (found.dev(), found.ino()) != (self.device, self.inode) {
            return Err(io::Error::other(format!("{path}: another file is in its place")));
        }
        if found.len() < self.len_min {
            return Err(io::Error::other(format!("{path}: it was cut to {} bytes", found.len())));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_removed_replaced_or_cut_is_not_what_was_opened() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("file");
        let written = || std::fs::write(&path, [1; 10]).unwrap();
        let said = |own: &OwnFile| own.check().unwrap_err().to_string();
        written();
        let own = OwnFile::at(&path, 10).unwrap();
        own.check().unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(3).unwrap();
        assert!(said(&own).contains("file: it was cut to 3 bytes"));
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        assert!(said(&own).contains("file: it is gone ("));
        written();
        assert!(said(&own).contains("file: another file is in its place"));
    }
}
