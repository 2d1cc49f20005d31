//! Raft's log, vote and snapshot in one redb file.
//!
//! One thread writes; what has queued up meanwhile goes into one durable commit. An entry can be read as soon
//! as it was handed over, from memory until it is on disk. When the disk fails, the failure goes to Raft, which
//! stops: this node votes no more, and nothing is cut away to make it start again.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use bytes::Bytes;
use openraft::RaftLogReader;
use openraft::alias::{EntryOf, LogIdOf, SnapshotMetaOf, VoteOf};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::raft::TypeConfig;
use crate::wire;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const NODE: &str = "node";
const SNAPSHOT_META: &str = "snapshot_meta";
const SNAPSHOT: &str = "snapshot";

/// Bytes of log that one read returns at most, beyond its first entry.
const READ_LEN_MAX: usize = 1 << 20;
/// Jobs that one commit takes at most.
const BATCH_LEN_MAX: usize = 1024;

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its directory; fix it or restore from another node.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The directory is another node's: its votes are not this node's.
    #[error("directory belongs to node {stored}, not to node {given}: a node id is never reused")]
    OtherNode {
        /// Whose it is.
        stored: u64,
        /// Who wanted it.
        given: u64,
    },
}

/// Handle to the store; clones share it.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
    /// Entries that were handed over and are not on disk yet.
    pending: Arc<Mutex<BTreeMap<u64, Bytes>>>,
    jobs: mpsc::Sender<Job>,
}

enum Job {
    Append {
        entries: Vec<(u64, Bytes)>,
        flushed: IOFlushed<TypeConfig>,
    },
    Put {
        values: Vec<(&'static str, Bytes)>,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Losing it is harmless, so it waits for the next durable commit.
    Committed(Bytes),
    Truncate {
        from: u64,
        done: oneshot::Sender<io::Result<()>>,
    },
    Purge {
        through: u64,
        id: Bytes,
        done: oneshot::Sender<io::Result<()>>,
    },
}

fn disk(error: impl Into<redb::Error>) -> io::Error {
    let error = error.into();
    if let redb::Error::Io(error) = error { error } else { io::Error::other(error.to_string()) }
}

fn damaged(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} on disk is damaged: {error}"))
}

fn decode<T: DeserializeOwned>(what: &str, bytes: Bytes) -> io::Result<T> {
    wire::decode(bytes, wire::SNAPSHOT_LEN_MAX).map_err(|error| damaged(what, error))
}

impl Store {
    /// Opens the store of a node, or makes it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(dir: &Path, node: u64) -> Result<Self, StoreError> {
        let path = dir.join("raft.redb");
        let failed = |source| StoreError::Io { path: path.display().to_string(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let database = Arc::new(Database::create(&path).map_err(disk).map_err(failed)?);
        create_tables(&database).map_err(failed)?;
        let pending = Arc::new(Mutex::new(BTreeMap::new()));
        let (jobs, queue) = mpsc::channel();
        let writer = Writer { database: database.clone(), pending: pending.clone() };
        let thread = std::thread::Builder::new().name("raft-store".into());
        thread.spawn(move || writer.run(&queue)).map_err(failed)?;
        let store = Self { database, pending, jobs };
        store
            .claim(node)
            .map_err(failed)?
            .map_or(Ok(store), |stored| Err(StoreError::OtherNode { stored, given: node }))
    }

    /// Writes the node's id on first use; the stored one if it is another.
    fn claim(&self, node: u64) -> io::Result<Option<u64>> {
        if let Some(stored) = self.get::<u64>(NODE)? {
            return Ok((stored != node).then_some(stored));
        }
        let (done, _) = oneshot::channel();
        self.submit(Job::Put { values: vec![(NODE, wire::encode(&node))], done })?;
        Ok(None)
    }

    fn submit(&self, job: Job) -> io::Result<()> {
        self.jobs.send(job).map_err(|_| io::Error::other("the store's writer has stopped after a disk error"))
    }

    async fn wait(&self, done: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
        done.await
            .unwrap_or_else(|_| Err(io::Error::other("the store's writer has stopped after a disk error")))
    }

    async fn put(&self, values: Vec<(&'static str, Bytes)>) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.submit(Job::Put { values, done })?;
        self.wait(wait).await
    }

    fn bytes(&self, key: &str) -> io::Result<Option<Bytes>> {
        let read = self.database.begin_read().map_err(disk)?;
        let table = read.open_table(META).map_err(disk)?;
        let value = table.get(key).map_err(disk)?;
        Ok(value.map(|value| Bytes::copy_from_slice(value.value())))
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> io::Result<Option<T>> {
        self.bytes(key)?.map(|bytes| decode(key, bytes)).transpose()
    }

    pub(crate) async fn save_snapshot(
        &self,
        meta: &SnapshotMetaOf<TypeConfig>,
        data: Bytes,
    ) -> io::Result<()> {
        self.put(vec![(SNAPSHOT_META, wire::encode(meta)), (SNAPSHOT, data)]).await
    }

    pub(crate) fn snapshot(&self) -> io::Result<Option<(SnapshotMetaOf<TypeConfig>, Bytes)>> {
        let Some(meta) = self.get(SNAPSHOT_META)? else { return Ok(None) };
        let data = self.bytes(SNAPSHOT)?.ok_or_else(|| damaged(SNAPSHOT, "missing"))?;
        Ok(Some((meta, data)))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Bytes>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Encoded entries in order, until about `len_max` bytes.
    fn entries(&self, range: impl RangeBounds<u64>, len_max: usize) -> io::Result<Vec<EntryOf<TypeConfig>>> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        if is_empty(range) {
            return Ok(Vec::new());
        }
        // Memory first: what is written meanwhile is then found in both places, never in neither.
        let pending: BTreeMap<u64, Bytes> =
            self.lock().range(range).map(|(&at, entry)| (at, entry.clone())).collect();
        let mut entries = Vec::new();
        let mut len = 0;
        let mut add = |entry: Bytes| {
            len += entry.len();
            entries.push(decode::<EntryOf<TypeConfig>>("log entry", entry)?);
            Ok::<bool, io::Error>(len < len_max)
        };
        let read = self.database.begin_read().map_err(disk)?;
        let table = read.open_table(LOG).map_err(disk)?;
        for stored in table.range(range).map_err(disk)? {
            let (at, entry) = stored.map_err(disk)?;
            if pending.contains_key(&at.value())
                || pending.keys().next().is_some_and(|&first| first < at.value())
            {
                break;
            }
            if !add(Bytes::copy_from_slice(entry.value()))? {
                return check_dense(entries);
            }
        }
        for entry in pending.into_values() {
            if !add(entry)? {
                break;
            }
        }
        check_dense(entries)
    }

    fn last_on_disk(&self) -> io::Result<Option<Bytes>> {
        let read = self.database.begin_read().map_err(disk)?;
        let table = read.open_table(LOG).map_err(disk)?;
        Ok(table.last().map_err(disk)?.map(|(_, entry)| Bytes::copy_from_slice(entry.value())))
    }
}

fn is_empty((start, end): (Bound<u64>, Bound<u64>)) -> bool {
    let first = match start {
        Bound::Included(first) => first,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    match end {
        Bound::Included(last) => first > last,
        Bound::Excluded(end) => first >= end,
        Bound::Unbounded => false,
    }
}

/// A hole in the log is damage: better to stop than to apply the wrong things.
fn check_dense(entries: Vec<EntryOf<TypeConfig>>) -> io::Result<Vec<EntryOf<TypeConfig>>> {
    match entries.windows(2).find(|two| two[0].index() + 1 != two[1].index()) {
        Some(two) => {
            Err(damaged("log", format!("entry {} is followed by {}", two[0].index(), two[1].index())))
        }
        None => Ok(entries),
    }
}

fn create_tables(database: &Database) -> io::Result<()> {
    let write = database.begin_write().map_err(disk)?;
    write.open_table(LOG).map_err(disk)?;
    write.open_table(META).map_err(disk)?;
    write.commit().map_err(disk)
}

/// The thread that writes.
struct Writer {
    database: Arc<Database>,
    pending: Arc<Mutex<BTreeMap<u64, Bytes>>>,
}

impl Writer {
    fn run(self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            batch.extend(queue.try_iter().take(BATCH_LEN_MAX - 1));
            let result = self.write(&batch);
            if result.is_ok() {
                self.forget_pending(&batch);
            }
            let failed = result.is_err();
            for job in batch {
                answer(job, &result);
            }
            if failed {
                // Later writes could succeed and leave a hole.
                tracing::error!(error = ?result.err(), "raft store failed; this node stops voting");
                return;
            }
        }
    }

    fn write(&self, batch: &[Job]) -> io::Result<()> {
        let mut write = self.database.begin_write().map_err(disk)?;
        if batch.iter().all(|job| matches!(job, Job::Committed(_))) {
            write.set_durability(Durability::None).map_err(|error| io::Error::other(error.to_string()))?;
        }
        {
            let mut log = write.open_table(LOG).map_err(disk)?;
            let mut meta = write.open_table(META).map_err(disk)?;
            for job in batch {
                match job {
                    Job::Append { entries, .. } => {
                        for (index, entry) in entries {
                            log.insert(index, entry.as_ref()).map_err(disk)?;
                        }
                    }
                    Job::Put { values, .. } => {
                        for (key, value) in values {
                            meta.insert(*key, value.as_ref()).map_err(disk)?;
                        }
                    }
                    Job::Committed(id) => drop(meta.insert(COMMITTED, id.as_ref()).map_err(disk)?),
                    Job::Truncate { from, .. } => {
                        log.retain_in::<u64, _>(from.., |_, _| false).map_err(disk)?
                    }
                    Job::Purge { through, id, .. } => {
                        log.retain_in::<u64, _>(..=through, |_, _| false).map_err(disk)?;
                        meta.insert(PURGED, id.as_ref()).map_err(disk)?;
                    }
                }
            }
        }
        write.commit().map_err(disk)
    }

    fn forget_pending(&self, batch: &[Job]) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        for job in batch {
            let Job::Append { entries, .. } = job else { continue };
            for (index, entry) in entries {
                // After a truncation another entry may wait at the same index.
                if pending.get(index).is_some_and(|waiting| waiting.as_ptr() == entry.as_ptr()) {
                    pending.remove(index);
                }
            }
        }
    }
}

fn answer(job: Job, result: &io::Result<()>) {
    let result = result.as_ref().copied().map_err(|error| io::Error::new(error.kind(), error.to_string()));
    match job {
        Job::Append { flushed, .. } => flushed.io_completed(result),
        // Nobody waits any more: the caller has gone.
        Job::Put { done, .. } | Job::Truncate { done, .. } | Job::Purge { done, .. } => {
            drop(done.send(result))
        }
        Job::Committed(_) => {}
    }
}

impl RaftLogReader<TypeConfig> for Store {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<EntryOf<TypeConfig>>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        self.entries(range, usize::MAX)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<EntryOf<TypeConfig>>, io::Error> {
        self.entries(start..end, READ_LEN_MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<VoteOf<TypeConfig>>, io::Error> {
        self.get(VOTE)
    }
}

impl RaftLogStorage<TypeConfig> for Store {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let last_purged_log_id: Option<LogIdOf<TypeConfig>> = self.get(PURGED)?;
        let waiting = self.lock().last_key_value().map(|(_, entry)| entry.clone());
        let last = match waiting {
            Some(entry) => Some(entry),
            None => self.last_on_disk()?,
        };
        let last = last.map(|entry| decode::<EntryOf<TypeConfig>>("log entry", entry)).transpose()?;
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last.map(|entry| entry.log_id()).or(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &VoteOf<TypeConfig>) -> Result<(), io::Error> {
        self.put(vec![(VOTE, wire::encode(vote))]).await
    }

    async fn save_committed(&mut self, committed: Option<LogIdOf<TypeConfig>>) -> Result<(), io::Error> {
        self.submit(Job::Committed(wire::encode(&committed)))
    }

    async fn read_committed(&mut self) -> Result<Option<LogIdOf<TypeConfig>>, io::Error> {
        Ok(self.get::<Option<LogIdOf<TypeConfig>>>(COMMITTED)?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = EntryOf<TypeConfig>> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<(u64, Bytes)> =
            entries.into_iter().map(|entry| (entry.index(), wire::encode(&entry))).collect();
        self.lock().extend(entries.iter().cloned());
        self.submit(Job::Append { entries, flushed: callback })
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogIdOf<TypeConfig>>) -> Result<(), io::Error> {
        let from = last_log_id.map_or(0, |id| id.index + 1);
        self.lock().split_off(&from);
        let (done, wait) = oneshot::channel();
        self.submit(Job::Truncate { from, done })?;
        self.wait(wait).await
    }

    async fn purge(&mut self, log_id: LogIdOf<TypeConfig>) -> Result<(), io::Error> {
        let (done, wait) = oneshot::channel();
        self.submit(Job::Purge { through: log_id.index, id: wire::encode(&log_id), done })?;
        self.wait(wait).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::StateMachine;
    use openraft::StorageError;
    use openraft::testing::log::{StoreBuilder, Suite};
    use tempfile::TempDir;

    struct Builder;

    impl StoreBuilder<TypeConfig, Store, StateMachine, TempDir> for Builder {
        async fn build(&self) -> Result<(TempDir, Store, StateMachine), StorageError<TypeConfig>> {
            let dir = TempDir::new().unwrap();
            let store = Store::open(dir.path(), 1).unwrap();
            let machine = StateMachine::open(store.clone()).unwrap();
            Ok((dir, store, machine))
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn it_passes_the_suite_of_openraft() {
        Suite::test_all(Builder).await.unwrap();
    }

    #[tokio::test]
    async fn damage_is_an_error_and_nothing_is_cut_away() {
        let dir = TempDir::new().unwrap();
        let mut store = Store::open(dir.path(), 1).unwrap();
        let write = store.database.begin_write().unwrap();
        write.open_table(LOG).unwrap().insert(7, [1, 2, 3].as_slice()).unwrap();
        write.commit().unwrap();
        let kind = |error: io::Error| error.kind();
        assert_eq!(store.get_log_state().await.map_err(kind).err(), Some(io::ErrorKind::InvalidData));
        assert_eq!(store.try_get_log_entries(..).await.map_err(kind).err(), Some(io::ErrorKind::InvalidData));
        assert!(store.last_on_disk().unwrap().is_some());
    }

    #[test]
    fn a_directory_belongs_to_one_node_for_ever() {
        let dir = TempDir::new().unwrap();
        let store = Store::open(dir.path(), 1).unwrap();
        drop(store);
        // The writer lets go of the file a moment after its last handle is gone.
        let again = (0..100).find_map(|_| match Store::open(dir.path(), 2) {
            Err(StoreError::Io { .. }) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
                None
            }
            other => Some(other),
        });
        assert!(matches!(again, Some(Err(StoreError::OtherNode { stored: 1, given: 2 }))));
    }
}
