//! Raft's log, vote and snapshot in one redb file.
//!
//! One thread writes; what has queued up meanwhile goes into one durable commit. An entry can be read as soon
//! as it was handed over, from memory until it is on disk. When the disk fails, the failure goes to Raft, which
//! stops: this node votes no more, and nothing is cut away to make it start again.
//!
//! A damaged database is refused when it is opened, and one that has less than this node promised (see
//! [`crate::promise`]) too. What is committed is never cut away, whoever asks.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use bytes::Bytes;
use flow::Micros;
use openraft::RaftLogReader;
use openraft::alias::{EntryOf, LogIdOf, SnapshotMetaOf, VoteOf};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use redb::backends::FileBackend;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::claims::{Claims, Witness};
use crate::clock::Clock;
use crate::own_files::{self, OwnFile};
use crate::promise::{FILE_MODE, Promise, PromiseFile, check_kind};
use crate::raft::TypeConfig;
use crate::wire;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const NODE: &str = "node";
const INCARNATION: &str = "incarnation";
const CLAIMS: &str = "claims";
const SNAPSHOT_META: &str = "snapshot_meta";
const SNAPSHOT: &str = "snapshot";

/// Bytes of log that one read returns at most, beyond its first entry.
const READ_LEN_MAX: usize = 1 << 18;
/// Jobs that may wait for the disk: some seconds of what a leader can propose. Beyond, the disk has failed, for all that Raft can use
/// of it; to wait for room would keep the threads that carry its messages.
const JOBS_MAX: usize = 1 << 16;
/// Jobs that one commit takes at most.
const BATCH_LEN_MAX: usize = 1024;
/// The database and the promise in a node's directory.
const DATABASE_FILE: &str = "raft.redb";
const PROMISE_FILE: &str = "promise";
/// Mode of a node's directory: what is in it is for its user alone.
const DIR_MODE: u32 = 0o700;

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
    /// The directory must not be used any more: it has less than its node promised to the others.
    #[error(
        "{path}: {found}. Node {node} must not go on with it, for it may have less than it promised to the \
         others. Remove the node from the group (`limosa raft remove {node}`), take its directory away, and \
         add a node with a number that was never used before (`limosa raft add`)"
    )]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        found: String,
        /// Whose it is.
        node: u64,
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
    jobs: mpsc::SyncSender<Job>,
    /// What is on disk and may be counted on.
    promised: Arc<Mutex<Promise>>,
    witness: Arc<Witness>,
    /// The end of what is committed: it is never cut away.
    committed: Arc<Mutex<Option<LogIdOf<TypeConfig>>>>,
    files: Arc<[OwnFile; 2]>,
    /// Since when the disk has been at what it is at.
    writing: Arc<Mutex<Option<Micros>>>,
    clock: Clock,
}

enum Job {
    Append {
        entries: Vec<(u64, Bytes)>,
        last: Option<LogIdOf<TypeConfig>>,
        flushed: IOFlushed<TypeConfig>,
    },
    Put {
        values: Vec<(&'static str, Bytes)>,
        promise: Promised,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Losing it is harmless, so it waits for the next durable commit.
    Committed(Bytes),
    Truncate {
        to: Option<LogIdOf<TypeConfig>>,
        done: oneshot::Sender<io::Result<()>>,
    },
    Purge {
        through: LogIdOf<TypeConfig>,
        done: oneshot::Sender<io::Result<()>>,
    },
}

/// What a value promises to the others.
#[derive(Clone, Copy)]
enum Promised {
    Vote(VoteOf<TypeConfig>),
    /// A snapshot has everything up to here.
    Snapshot(Option<LogIdOf<TypeConfig>>),
}

fn disk(error: impl Into<redb::Error>) -> io::Error {
    let error = error.into();
    if let redb::Error::Corrupted(what) = &error {
        return damaged("database", what);
    }
    let redb::Error::Io(error) = error else { return io::Error::other(error.to_string()) };
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return damaged("database", "it ends before its last page, so a part of it is missing");
    }
    error
}

fn damaged(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} on disk is damaged: {error}"))
}

fn decode<T: DeserializeOwned>(what: &str, bytes: Bytes) -> io::Result<T> {
    wire::decode(bytes, wire::SNAPSHOT_LEN_MAX).map_err(|error| damaged(what, error))
}

impl Store {
    /// Opens the store of a node, or makes it. The whole database is looked through before it is used.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(dir: &Path, node: u64) -> Result<Self, StoreError> {
        Self::open_on(dir, node, |file| FileBackend::new(file).map_err(disk))
    }

    /// The same on what somebody makes of the file.
    pub(crate) fn open_on<B: StorageBackend>(
        dir: &Path,
        node: u64,
        backend: impl FnOnce(File) -> io::Result<B>,
    ) -> Result<Self, StoreError> {
        let paths = Paths::of(dir, node);
        let failed = |source| StoreError::Io { path: paths.database.display().to_string(), source };
        // One that is there may be others' too, and stays as it is; what lies in it is only this user's.
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(failed)?;
        let database = paths.open_database(backend)?;
        let found = guarded(|| Found::in_database(&database, node))
            .map_err(|e| paths.unreadable(&paths.database, e))?;
        if found.node != node {
            return Err(StoreError::OtherNode { stored: found.node, given: node });
        }
        let (file, promise) = paths.open_promise(&found)?;
        let files = paths.own().map_err(failed)?;
        Self::start(database, (file, promise), files, found).map_err(failed)
    }

    fn start(
        database: Database,
        (file, promise): (PromiseFile, Promise),
        files: [OwnFile; 2],
        found: Found,
    ) -> io::Result<Self> {
        let files = Arc::new(files);
        let database = Arc::new(database);
        let pending = Arc::new(Mutex::new(BTreeMap::new()));
        let promised = Arc::new(Mutex::new(promise));
        let witness = Arc::new(Witness::new(found.claims));
        let (jobs, queue) = mpsc::sync_channel(JOBS_MAX);
        let (writing, clock) = (Arc::default(), Clock::start());
        let writer = Writer {
            writing: Arc::clone(&writing),
            clock,
            database: database.clone(),
            pending: pending.clone(),
            file,
            files: files.clone(),
            promised: promised.clone(),
            witness: witness.clone(),
        };
        let thread = std::thread::Builder::new().name("raft-store".into());
        thread.spawn(move || writer.run(&queue))?;
        let committed = Arc::new(Mutex::new(found.committed.max(found.snapshot)));
        Ok(Self { database, pending, jobs, promised, witness, committed, files, writing, clock })
    }

    /// Whether what this node writes will be there at its next start.
    pub(crate) fn check_files(&self) -> io::Result<()> {
        own_files::check(&*self.files)
    }

    /// How long the write in hand has taken, and with it the oldest that waits; nothing while there is none.
    pub(crate) fn writing(&self) -> Option<Micros> {
        lock(&self.writing).map(|since| self.clock.now().since(since))
    }

    /// What is on disk and may be counted on.
    pub(crate) fn promised(&self) -> Promise {
        *lock(&self.promised)
    }

    /// What this node knows of the promises of all.
    pub(crate) fn witness(&self) -> Arc<Witness> {
        self.witness.clone()
    }

    fn submit(&self, job: Job) -> io::Result<()> {
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::TrySendError::Full(_) => {
                io::Error::other(format!("the disk stands still: {JOBS_MAX} jobs of the store wait for it"))
            }
            mpsc::TrySendError::Disconnected(_) => {
                io::Error::other("the store's writer has stopped after a disk error")
            }
        })
    }

    async fn wait(&self, done: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
        done.await
            .unwrap_or_else(|_| Err(io::Error::other("the store's writer has stopped after a disk error")))
    }

    async fn put(&self, values: Vec<(&'static str, Bytes)>, promise: Promised) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.submit(Job::Put { values, promise, done })?;
        self.wait(wait).await
    }

    fn bytes(&self, key: &str) -> io::Result<Option<Bytes>> {
        guarded(|| bytes_of(&self.database, key))
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> io::Result<Option<T>> {
        guarded(|| value_of(&self.database, key))
    }

    pub(crate) async fn save_snapshot(
        &self,
        meta: &SnapshotMetaOf<TypeConfig>,
        data: Bytes,
    ) -> io::Result<()> {
        let values = vec![(SNAPSHOT_META, wire::encode(meta)), (SNAPSHOT, data)];
        self.put(values, Promised::Snapshot(meta.last_log_id)).await?;
        self.raise_committed(meta.last_log_id);
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> io::Result<Option<(SnapshotMetaOf<TypeConfig>, Bytes)>> {
        let Some(meta) = self.get(SNAPSHOT_META)? else { return Ok(None) };
        let data = self.bytes(SNAPSHOT)?.ok_or_else(|| damaged(SNAPSHOT, "missing"))?;
        Ok(Some((meta, data)))
    }

    fn raise_committed(&self, id: Option<LogIdOf<TypeConfig>>) {
        let mut committed = lock(&self.committed);
        *committed = (*committed).max(id);
    }

    /// Refuses what would put something else in the place of what is committed. Only a group that has lost its
    /// memory asks for that.
    fn check_kept(&self, from: u64) -> io::Result<()> {
        let committed = *lock(&self.committed);
        match committed.filter(|committed| committed.index >= from) {
            None => Ok(()),
            Some(committed) => Err(io::Error::other(format!(
                "a leader wants the log replaced from {from} on, but all up to {committed} is committed: \
                 the leader's group has lost a part of its log. Nothing was changed"
            ))),
        }
    }

    /// Encoded entries in order, until about `len_max` bytes.
    fn entries(&self, range: impl RangeBounds<u64>, len_max: usize) -> io::Result<Vec<EntryOf<TypeConfig>>> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        if is_empty(range) {
            return Ok(Vec::new());
        }
        guarded(|| self.entries_in(range, len_max))
    }

    fn entries_in(
        &self,
        range: (Bound<u64>, Bound<u64>),
        len_max: usize,
    ) -> io::Result<Vec<EntryOf<TypeConfig>>> {
        // Memory first: what is written meanwhile is then found in both places, never in neither.
        let pending: BTreeMap<u64, Bytes> =
            lock(&self.pending).range(range).map(|(&at, entry)| (at, entry.clone())).collect();
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
        guarded(|| last_of(&self.database))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The database panics on some kinds of damage; that is an error as others are.
fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(damaged("database", said(&*panic))))
}

fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it cannot be read")
}

fn bytes_of(database: &Database, key: &str) -> io::Result<Option<Bytes>> {
    let read = database.begin_read().map_err(disk)?;
    let table = read.open_table(META).map_err(disk)?;
    let value = table.get(key).map_err(disk)?;
    Ok(value.map(|value| Bytes::copy_from_slice(value.value())))
}

fn value_of<T: DeserializeOwned>(database: &Database, key: &str) -> io::Result<Option<T>> {
    bytes_of(database, key)?.map(|bytes| decode(key, bytes)).transpose()
}

fn last_of(database: &Database) -> io::Result<Option<Bytes>> {
    let read = database.begin_read().map_err(disk)?;
    let table = read.open_table(LOG).map_err(disk)?;
    Ok(table.last().map_err(disk)?.map(|(_, entry)| Bytes::copy_from_slice(entry.value())))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether a directory is this node's, or nobody's yet. Its node may be running.
///
/// # Errors
/// [`StoreError`], as [`Store::open`].
pub fn check_owner(dir: &Path, node: u64) -> Result<(), StoreError> {
    let paths = Paths::of(dir, node);
    match PromiseFile::peek(&paths.promise) {
        Ok(promise) if promise.node != node => {
            Err(StoreError::OtherNode { stored: promise.node, given: node })
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(paths.unreadable(&paths.promise, error)),
    }
}

/// The files of a node.
struct Paths {
    database: PathBuf,
    promise: PathBuf,
    node: u64,
}

impl Paths {
    fn of(dir: &Path, node: u64) -> Self {
        Self { database: dir.join(DATABASE_FILE), promise: dir.join(PROMISE_FILE), node }
    }

    fn damaged(&self, path: &Path, found: impl Into<String>) -> StoreError {
        StoreError::Damaged { path: path.display().to_string(), found: found.into(), node: self.node }
    }

    /// Damage is for ever; all else may be mended.
    fn unreadable(&self, path: &Path, error: io::Error) -> StoreError {
        if error.kind() == io::ErrorKind::InvalidData {
            return self.damaged(path, error.to_string());
        }
        StoreError::Io { path: path.display().to_string(), source: error }
    }

    /// Both as they are now.
    fn own(&self) -> io::Result<[OwnFile; 2]> {
        let promise_len = std::fs::metadata(&self.promise)?.len();
        Ok([OwnFile::at(&self.database, 1)?, OwnFile::at(&self.promise, promise_len)?])
    }

    /// Opens the database and checks every page of it; makes it where there is none.
    fn open_database<B: StorageBackend>(
        &self,
        backend: impl FnOnce(File) -> io::Result<B>,
    ) -> Result<Database, StoreError> {
        if self.database.exists() {
            check_kind(&self.database).map_err(|error| self.unreadable(&self.database, error))?;
        }
        let len = std::fs::metadata(&self.database).map(|metadata| metadata.len()).unwrap_or_default();
        if len == 0 && self.promise.exists() {
            return Err(self.damaged(&self.database, "it is gone or empty, but the promise beside it is not"));
        }
        guarded(|| {
            remove(&self.unfinished())?;
            if len == 0 { self.make_database(backend) } else { self.read_database(backend) }
        })
        .map_err(|error| self.unreadable(&self.database, error))
    }

    fn read_database<B: StorageBackend>(
        &self,
        backend: impl FnOnce(File) -> io::Result<B>,
    ) -> io::Result<Database> {
        let file = OpenOptions::new().read(true).write(true).open(&self.database)?;
        // Those of earlier releases were open to all.
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(true);
        builder.create_with_backend(backend(file)?).map_err(disk)
    }

    /// Makes the database, whole or not at all: a part of one, as a full disk leaves it, could not be told from one that
    /// was damaged.
    fn make_database<B: StorageBackend>(
        &self,
        backend: impl FnOnce(File) -> io::Result<B>,
    ) -> io::Result<Database> {
        let fresh = self.unfinished();
        let make = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(FILE_MODE).open(&fresh)?;
            let database = Database::builder().create_with_backend(backend(file)?).map_err(disk)?;
            create_tables(&database, self.node)?;
            File::open(&fresh)?.sync_all()?;
            std::fs::rename(&fresh, &self.database)?;
            if let Some(dir) = self.database.parent() {
                File::open(dir)?.sync_all()?;
            }
            Ok(database)
        };
        make().inspect_err(|_| {
            // The next start would do it; until then others may want the room.
            let _ = remove(&fresh);
        })
    }

    /// The database while it is made. What is there was never used.
    fn unfinished(&self) -> PathBuf {
        self.database.with_extension("redb.new")
    }

    /// The promise beside the database; makes it where there is nothing to promise yet.
    fn open_promise(&self, found: &Found) -> Result<(PromiseFile, Promise), StoreError> {
        let failed = |source| StoreError::Io { path: self.promise.display().to_string(), source };
        if !self.promise.exists() {
            if found.has_history() && !found.earlier {
                return Err(self.damaged(&self.promise, "it is gone, but the database beside it is not"));
            }
            let promise = found.promise();
            return Ok((PromiseFile::create(&self.promise, &promise).map_err(failed)?, promise));
        }
        let (file, promise) =
            PromiseFile::open(&self.promise).map_err(|error| self.unreadable(&self.promise, error))?;
        if (promise.node, promise.incarnation) != (found.node, found.incarnation) {
            return Err(self.damaged(&self.promise, "it is not of the database beside it"));
        }
        match found.lacks(&promise) {
            Some(what) => Err(self.damaged(&self.database, format!("it is older than it was: {what}"))),
            None => Ok((file, promise)),
        }
    }
}

/// What is in a database when it is opened.
struct Found {
    node: u64,
    incarnation: u64,
    /// It is of a release that made no promises.
    earlier: bool,
    vote: Option<VoteOf<TypeConfig>>,
    last: Option<LogIdOf<TypeConfig>>,
    purged: Option<LogIdOf<TypeConfig>>,
    committed: Option<LogIdOf<TypeConfig>>,
    snapshot: Option<LogIdOf<TypeConfig>>,
    /// Ids of the log by index.
    log: BTreeMap<u64, LogIdOf<TypeConfig>>,
    claims: Claims,
}

impl Found {
    /// Reads everything once, so that what cannot be read is found now.
    fn in_database(database: &Database, node: u64) -> io::Result<Self> {
        let earlier = create_tables(database, node)?;
        let purged: Option<LogIdOf<TypeConfig>> = value_of(database, PURGED)?;
        let log = log_ids(database)?;
        let last = log.last_key_value().map(|(_, id)| *id);
        if let Some((first, _)) = log.first_key_value()
            && purged.is_some_and(|purged| purged.index + 1 < *first)
        {
            return Err(damaged("log", format!("it begins at {first}, not behind {purged:?}")));
        }
        let snapshot: Option<SnapshotMetaOf<TypeConfig>> = value_of(database, SNAPSHOT_META)?;
        if snapshot.is_some() && bytes_of(database, SNAPSHOT)?.is_none() {
            return Err(damaged(SNAPSHOT, "missing"));
        }
        Ok(Self {
            node: value_of(database, NODE)?.unwrap_or(node),
            incarnation: value_of(database, INCARNATION)?.unwrap_or_default(),
            earlier,
            vote: value_of(database, VOTE)?,
            last,
            purged,
            committed: value_of::<Option<LogIdOf<TypeConfig>>>(database, COMMITTED)?.flatten(),
            snapshot: snapshot.and_then(|meta| meta.last_log_id),
            log,
            claims: value_of(database, CLAIMS)?.unwrap_or_default(),
        })
    }

    fn has_history(&self) -> bool {
        self.vote.is_some() || self.end().is_some()
    }

    /// The end of log and snapshot.
    fn end(&self) -> Option<LogIdOf<TypeConfig>> {
        self.last.max(self.purged).max(self.snapshot)
    }

    fn promise(&self) -> Promise {
        let (node, incarnation) = (self.node, self.incarnation);
        Promise { node, incarnation, vote: self.vote, last: self.end(), dropped: None }
    }

    /// What was promised and is not there.
    fn lacks(&self, promise: &Promise) -> Option<String> {
        if self.vote < promise.vote {
            let vote = promise.vote.map(|vote| vote.to_string()).unwrap_or_default();
            return Some(format!("the vote {vote} is not in it"));
        }
        let last = promise.last?;
        let covered = self.purged.max(self.snapshot).is_some_and(|id| id.index >= last.index);
        let there = covered || self.log.get(&last.index) == Some(&last);
        (!there).then(|| format!("log entry {last} is not in it"))
    }
}

/// The ids of all entries; each is decoded, and none may be missing between two.
fn log_ids(database: &Database) -> io::Result<BTreeMap<u64, LogIdOf<TypeConfig>>> {
    let read = database.begin_read().map_err(disk)?;
    let table = read.open_table(LOG).map_err(disk)?;
    let mut ids: BTreeMap<u64, LogIdOf<TypeConfig>> = BTreeMap::new();
    for stored in table.range::<u64>(..).map_err(disk)? {
        let (at, entry) = stored.map_err(disk)?;
        let entry: EntryOf<TypeConfig> = decode("log entry", Bytes::copy_from_slice(entry.value()))?;
        let (at, id) = (at.value(), entry.log_id());
        let before = ids.last_key_value().map(|(before, _)| *before);
        if at != id.index || before.is_some_and(|before| before + 1 != at) {
            return Err(damaged("log", format!("entry {id} is at {at}, behind {before:?}")));
        }
        ids.insert(at, id);
    }
    Ok(ids)
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

/// Makes the tables, and says on first use whose they are. Whether they are of a release that made no promises.
fn create_tables(database: &Database, node: u64) -> io::Result<bool> {
    let write = database.begin_write().map_err(disk)?;
    let earlier = {
        write.open_table(LOG).map_err(disk)?;
        let mut meta = write.open_table(META).map_err(disk)?;
        let has = |key: &str| Ok::<_, io::Error>(meta.get(key).map_err(disk)?.is_some());
        let (named, drawn) = (has(NODE)?, has(INCARNATION)?);
        if !named {
            meta.insert(NODE, wire::encode(&node).as_ref()).map_err(disk)?;
        }
        if !drawn {
            let incarnation: u64 = RandomState::new().hash_one(node);
            meta.insert(INCARNATION, wire::encode(&incarnation).as_ref()).map_err(disk)?;
        }
        named && !drawn
    };
    write.commit().map_err(disk)?;
    Ok(earlier)
}

/// The thread that writes.
struct Writer {
    writing: Arc<Mutex<Option<Micros>>>,
    clock: Clock,
    database: Arc<Database>,
    pending: Arc<Mutex<BTreeMap<u64, Bytes>>>,
    file: PromiseFile,
    files: Arc<[OwnFile; 2]>,
    promised: Arc<Mutex<Promise>>,
    witness: Arc<Witness>,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            batch.extend(queue.try_iter().take(BATCH_LEN_MAX - 1));
            *lock(&self.writing) = Some(self.clock.now());
            let result = self.keep(&batch);
            *lock(&self.writing) = None;
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
        // Nobody waits for what is known of others, so it may not be on disk yet.
        if let Err(error) = self.keep(&[]) {
            tracing::warn!(%error, "the last news of other nodes' promises is not on disk");
        }
    }

    /// Writes a batch so that the promise never says more than the database has: it is taken back before a log is
    /// cut back, and given after everything else.
    fn keep(&mut self, batch: &[Job]) -> io::Result<()> {
        if !batch.is_empty() {
            own_files::check(&*self.files)?;
        }
        let present = *lock(&self.promised);
        let (lowest, next) = promises(present, batch);
        if lowest != present {
            self.file.write(&lowest)?;
        }
        guarded(|| self.write(batch))?;
        if next != present {
            self.file.write(&next)?;
            *lock(&self.promised) = next;
        }
        Ok(())
    }

    fn write(&self, batch: &[Job]) -> io::Result<()> {
        let mut write = self.database.begin_write().map_err(disk)?;
        if !batch.is_empty() && batch.iter().all(|job| matches!(job, Job::Committed(_))) {
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
                    Job::Truncate { to, .. } => {
                        log.retain_in::<u64, _>(behind(*to).., |_, _| false).map_err(disk)?
                    }
                    Job::Purge { through, .. } => {
                        log.retain_in::<u64, _>(..=through.index, |_, _| false).map_err(disk)?;
                        meta.insert(PURGED, wire::encode(through).as_ref()).map_err(disk)?;
                    }
                }
            }
            if let Some(claims) = self.witness.unwritten() {
                meta.insert(CLAIMS, wire::encode(&claims).as_ref()).map_err(disk)?;
            }
        }
        write.commit().map_err(disk)
    }

    fn forget_pending(&self, batch: &[Job]) {
        let mut pending = lock(&self.pending);
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

/// The first index behind an id.
fn behind(id: Option<LogIdOf<TypeConfig>>) -> u64 {
    id.map_or(0, |id| id.index + 1)
}

fn raise_vote(highest: &mut Option<VoteOf<TypeConfig>>, vote: VoteOf<TypeConfig>) {
    if highest.is_none_or(|highest| highest < vote) {
        *highest = Some(vote);
    }
}

/// What may be promised while a batch is being written, and when it is on disk.
fn promises(present: Promise, batch: &[Job]) -> (Promise, Promise) {
    let (mut lowest, mut next) = (present, present);
    for job in batch {
        match job {
            Job::Append { last, .. } => last.iter().for_each(|last| next.reach(*last)),
            Job::Put { promise: Promised::Vote(vote), .. } => raise_vote(&mut next.vote, *vote),
            Job::Put { promise: Promised::Snapshot(id), .. } => id.iter().for_each(|id| next.reach(*id)),
            Job::Truncate { to, .. } => {
                next.cut_back(*to);
                lowest.cut_back(*to);
            }
            Job::Purge { through, .. } => next.reach(*through),
            Job::Committed(_) => {}
        }
    }
    // What one batch appends and cuts back again was promised to nobody.
    lowest.dropped = lowest.dropped.max(next.dropped);
    (lowest, next)
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
        let waiting = lock(&self.pending).last_key_value().map(|(_, entry)| entry.clone());
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
        self.put(vec![(VOTE, wire::encode(vote))], Promised::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogIdOf<TypeConfig>>) -> Result<(), io::Error> {
        self.raise_committed(committed);
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
        let mut last = None;
        let mut encode = |entry: EntryOf<TypeConfig>| {
            last = last.max(Some(entry.log_id()));
            (entry.index(), wire::encode(&entry))
        };
        let entries: Vec<(u64, Bytes)> = entries.into_iter().map(&mut encode).collect();
        if let Some((first, _)) = entries.first() {
            self.check_kept(*first)?;
        }
        lock(&self.pending).extend(entries.iter().cloned());
        self.submit(Job::Append { entries, last, flushed: callback })
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogIdOf<TypeConfig>>) -> Result<(), io::Error> {
        let from = behind(last_log_id);
        self.check_kept(from)?;
        lock(&self.pending).split_off(&from);
        let (done, wait) = oneshot::channel();
        self.submit(Job::Truncate { to: last_log_id, done })?;
        self.wait(wait).await
    }

    async fn purge(&mut self, log_id: LogIdOf<TypeConfig>) -> Result<(), io::Error> {
        let (done, wait) = oneshot::channel();
        self.submit(Job::Purge { through: log_id, done })?;
        self.wait(wait).await
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
pub(crate) mod tests;
