//! What a node has promised to the others, in a small file beside the database.
//!
//! The others count on the vote and the log that a node acknowledged. So both are noted in a second file too:
//! after the database has them, before anybody is told. When a page of the database is lost, or an older copy
//! of it is put back, the file says more than the database, and the node must not start: it could vote again, or
//! help to elect a leader that lacks what was committed. It may always say less.
//!
//! Two slots are written in turn, each in a page of its own, so that a write that was cut short leaves the other.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use openraft::alias::{LogIdOf, VoteOf};
use serde::{Deserialize, Serialize};

use crate::raft::TypeConfig;
use crate::wire;

/// Mode of files with a node's state: for its user alone.
pub(crate) const FILE_MODE: u32 = 0o600;

/// Bytes between the slots: a page each, so that no write touches both.
const SLOT_LEN: usize = 4096;
/// Bytes before a slot's body: number, length, checksum.
const HEAD_LEN: usize = 16;

/// What the others may count on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Promise {
    /// Whose it is.
    pub(crate) node: u64,
    /// Drawn when the directory was made; the database has the same.
    pub(crate) incarnation: u64,
    /// The highest vote.
    pub(crate) vote: Option<VoteOf<TypeConfig>>,
    /// The end of the log.
    pub(crate) last: Option<LogIdOf<TypeConfig>>,
    /// The highest end of a log that a leader had cut back. The others may remember it; it is owed no more.
    pub(crate) dropped: Option<LogIdOf<TypeConfig>>,
}

impl Promise {
    /// Notes that a leader has the log cut back to `to`.
    pub(crate) fn cut_back(&mut self, to: Option<LogIdOf<TypeConfig>>) {
        if self.last.map(|last| last.index) > to.map(|to| to.index) {
            self.dropped = self.dropped.max(self.last);
            self.last = to;
        }
    }

    /// Notes an entry, or a snapshot in the place of entries.
    pub(crate) fn reach(&mut self, id: LogIdOf<TypeConfig>) {
        if self.last < Some(id) {
            // A snapshot may take the place of a longer log that no leader wants.
            self.dropped = self.dropped.max(self.last.filter(|last| last.index >= id.index));
            self.last = Some(id);
        }
    }
}

/// The file.
#[derive(Debug)]
pub(crate) struct PromiseFile {
    file: File,
    /// The number of the slot that was written last.
    number: u64,
}

impl PromiseFile {
    /// Makes the file, whole or not at all.
    pub(crate) fn create(path: &Path, promise: &Promise) -> io::Result<Self> {
        let fresh = path.with_extension("new");
        // What a node left that was ended here, or anything else in its place.
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(FILE_MODE);
        let mut file = options.open(&fresh)?;
        file.write_all(&[0; 2 * SLOT_LEN])?;
        let mut made = Self { file, number: 0 };
        made.write(promise)?;
        made.file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(made)
    }

    /// Opens the file; its last promise is the one that counts.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, Promise)> {
        check_kind(path)?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let (number, promise) = last(&file)?;
        Ok((Self { file, number }, promise))
    }

    /// Reads the file of a node that may be writing to it.
    pub(crate) fn peek(path: &Path) -> io::Result<Promise> {
        check_kind(path)?;
        let file = File::open(path)?;
        // Both records can be found half written only if the node went on from one to the other meanwhile.
        let found = last(&file).or_else(|_| last(&file))?;
        Ok(found.1)
    }

    /// Writes a promise; when this returns it is on disk.
    pub(crate) fn write(&mut self, promise: &Promise) -> io::Result<()> {
        let number = self.number + 1;
        let body = wire::encode(promise);
        let mut slot = Vec::with_capacity(HEAD_LEN + body.len());
        slot.extend_from_slice(&number.to_le_bytes());
        slot.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        slot.extend_from_slice(&checksum(number, &body).to_le_bytes());
        slot.extend_from_slice(&body);
        if slot.len() > SLOT_LEN {
            return Err(io::Error::other(format!("a promise of {} bytes has no room", slot.len())));
        }
        self.file.write_all_at(&slot, (number % 2) * SLOT_LEN as u64)?;
        self.file.sync_data()?;
        self.number = number;
        Ok(())
    }
}

/// Whether a file is one. To open a FIFO is to wait for who writes to it, and a directory looks like damage.
pub(crate) fn check_kind(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_file() {
        return Ok(());
    }
    Err(io::Error::other("it is no regular file: put back the one that was there"))
}

/// The last promise in a file, and its number.
fn last(file: &File) -> io::Result<(u64, Promise)> {
    let slots = [read_slot(file, 0)?, read_slot(file, 1)?];
    let last = slots.into_iter().flatten().max_by_key(|(number, _)| *number);
    last.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "neither of its two records can be read"))
}

fn checksum(number: u64, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), body)
}

/// A slot's number and promise; nothing when it was never written, cut short, or damaged.
fn read_slot(file: &File, slot: u64) -> io::Result<Option<(u64, Promise)>> {
    let mut bytes = vec![0; SLOT_LEN];
    match file.read_exact_at(&mut bytes, slot * SLOT_LEN as u64) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    Ok(decode_slot(&bytes))
}

fn decode_slot(bytes: &[u8]) -> Option<(u64, Promise)> {
    let (number, rest) = bytes.split_first_chunk::<8>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let number = u64::from_le_bytes(*number);
    let body = rest.get(..usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
    if checksum(number, body) != u32::from_le_bytes(*sum) {
        return None;
    }
    let promise = wire::decode(Bytes::copy_from_slice(body), SLOT_LEN).ok()?;
    Some((number, promise))
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::testing::log_id;
    use proptest::prelude::*;

    fn promise(index: u64) -> Promise {
        Promise {
            node: 1,
            incarnation: 7,
            vote: None,
            last: Some(log_id::<TypeConfig>(3, 1, index)),
            dropped: None,
        }
    }

    #[test]
    fn the_last_promise_counts_and_a_write_that_was_cut_short_leaves_the_one_before() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("promise");
        let mut file = PromiseFile::create(&path, &promise(1)).unwrap();
        for index in 2..=5 {
            file.write(&promise(index)).unwrap();
            assert_eq!(PromiseFile::open(&path).unwrap().1, promise(index));
        }
        let cut = (file.number + 1) % 2 * SLOT_LEN as u64;
        file.file.write_all_at(&[9; 40], cut).unwrap();
        let (mut file, last) = PromiseFile::open(&path).unwrap();
        assert_eq!(last, promise(5));
        file.write(&promise(6)).unwrap();
        assert_eq!(PromiseFile::open(&path).unwrap().1, promise(6));
        file.file.write_all_at(&[0; 2 * SLOT_LEN], 0).unwrap();
        assert_eq!(PromiseFile::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn what_was_left_of_a_file_that_was_being_made_is_in_nobodys_way() {
        let dir = tempfile::TempDir::new().unwrap();
        let (path, fresh) = (dir.path().join("promise"), dir.path().join("promise.new"));
        std::fs::write(&fresh, [9; 3 * SLOT_LEN]).unwrap();
        PromiseFile::create(&path, &promise(1)).unwrap();
        assert_eq!(PromiseFile::open(&path).unwrap().1, promise(1));
        std::fs::remove_file(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&fresh).unwrap();
        PromiseFile::create(&path, &promise(2)).unwrap();
        assert_eq!(PromiseFile::open(&path).unwrap().1, promise(2));
    }

    #[test]
    fn what_a_leader_had_cut_back_is_owed_no_more_but_remembered() {
        let mut promise = promise(9);
        promise.cut_back(Some(log_id::<TypeConfig>(2, 1, 6)));
        promise.reach(log_id::<TypeConfig>(4, 2, 7));
        assert_eq!(
            (promise.last, promise.dropped),
            (Some(log_id::<TypeConfig>(4, 2, 7)), Some(log_id::<TypeConfig>(3, 1, 9)))
        );
        promise.cut_back(Some(log_id::<TypeConfig>(4, 2, 8)));
        assert_eq!(promise.last, Some(log_id::<TypeConfig>(4, 2, 7)), "nothing was cut back");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_no_promise(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode_slot(&bytes).is_none());
        }
    }
}
