use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::claims::Claim;
use crate::raft::StateMachine;
use openraft::impls::Vote;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::testing::log_id;
use openraft::type_config::TypeConfigExt;
use openraft::{BasicNode, Membership, StorageError};
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

fn id(term: u64, index: u64) -> LogIdOf<TypeConfig> {
    log_id::<TypeConfig>(term, 1, index)
}

fn entry(term: u64, index: u64) -> EntryOf<TypeConfig> {
    // Long enough for a log of many pages.
    let nodes = BTreeMap::from([(1, BasicNode::new("x".repeat(700)))]);
    let members = Membership::new(vec![BTreeSet::from([1])], nodes).unwrap();
    EntryOf::<TypeConfig>::new_membership(id(term, index), members)
}

/// Appends, and returns when that is acknowledged.
async fn append(store: &mut Store, entries: Vec<EntryOf<TypeConfig>>) -> io::Result<()> {
    let (sender, wait) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(sender)).await?;
    wait.await.unwrap_or_else(|_| Err(io::Error::other("not answered")))
}

fn copy(from: &Path, to: &Path) {
    for name in [DATABASE_FILE, PROMISE_FILE] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// The directory of a node that was killed after it had acknowledged a vote and entries up to `last`.
async fn killed(last: u64) -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut store = Store::open(dir.path(), 1).unwrap();
    store.save_vote(&Vote::new_committed(3, 1)).await.unwrap();
    for index in 0..=last {
        append(&mut store, vec![entry(3, index)]).await.unwrap();
    }
    left_by_a_kill(dir.path())
}

/// What is on disk while a store runs is what a kill leaves behind.
fn left_by_a_kill(dir: &Path) -> TempDir {
    let left = TempDir::new().unwrap();
    copy(dir, left.path());
    left
}

/// The directory of a node that stopped in order.
async fn stopped(last: u64) -> TempDir {
    let dir = killed(last).await;
    drop(reopened(dir.path()).unwrap());
    drop(reopened(dir.path()).unwrap());
    dir
}

/// Opens a store whose last owner may hold its file for a moment more.
fn reopened(dir: &Path) -> Result<Store, StoreError> {
    for _ in 0..500 {
        match Store::open(dir, 1) {
            Err(StoreError::Io { source, .. }) if source.to_string().contains("already open") => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            other => return other,
        }
    }
    panic!("the store is never let go of");
}

async fn has_all(store: &mut Store, last: u64) -> bool {
    let entries = store.try_get_log_entries(..).await.unwrap();
    let state = store.get_log_state().await.unwrap();
    store.read_vote().await.unwrap() == Some(Vote::new_committed(3, 1))
        && state.last_log_id == Some(id(3, last))
        && entries.len() as u64 == last + 1
        && entries.iter().zip(0..).all(|(found, index)| *found == entry(3, index))
}

/// Zeros in any place: the store says so, or has everything that was acknowledged.
async fn zeros_never_take_what_was_acknowledged(dir: &TempDir, last: u64) {
    let original = std::fs::read(dir.path().join(DATABASE_FILE)).unwrap();
    let (mut refused, mut whole) = (0, 0);
    for at in (0..original.len()).step_by(8192) {
        let damaged = TempDir::new().unwrap();
        copy(dir.path(), damaged.path());
        let mut bytes = original.clone();
        let end = bytes.len().min(at + 8192);
        bytes[at..end].fill(0);
        std::fs::write(damaged.path().join(DATABASE_FILE), bytes).unwrap();
        match Store::open(damaged.path(), 1) {
            Ok(mut store) => {
                assert!(has_all(&mut store, last).await, "zeros at {at} took something silently");
                whole += 1;
            }
            Err(StoreError::Damaged { path, found, node: 1 }) => {
                assert!(path.ends_with(DATABASE_FILE) && !found.is_empty());
                refused += 1;
            }
            Err(other) => assert!(at == 0, "zeros at {at}: {other}"),
        }
    }
    assert!(refused > 0 && whole > 0, "{refused} places refused, {whole} did no harm");
}

#[tokio::test]
async fn zeros_in_the_database_of_a_killed_node_are_refused_or_take_nothing() {
    zeros_never_take_what_was_acknowledged(&killed(40).await, 40).await;
}

#[tokio::test]
async fn zeros_in_the_database_of_a_stopped_node_are_refused_or_take_nothing() {
    zeros_never_take_what_was_acknowledged(&stopped(40).await, 40).await;
}

#[tokio::test]
async fn a_killed_node_comes_back_with_all_that_it_acknowledged() {
    let dir = killed(10).await;
    let mut store = Store::open(dir.path(), 1).unwrap();
    assert!(has_all(&mut store, 10).await);
    append(&mut store, vec![entry(3, 11)]).await.unwrap();
    drop(store);
    assert!(has_all(&mut reopened(dir.path()).unwrap(), 11).await);
}

/// What is wrong with the directory, by the store's own words.
fn refusal(dir: &Path) -> String {
    match reopened(dir) {
        Err(error @ StoreError::Damaged { .. }) => error.to_string(),
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it opens"),
    }
}

#[tokio::test]
async fn a_database_that_is_older_than_its_promise_is_refused() {
    let (old, new) = (killed(5).await, killed(9).await);
    // The same node's, so that only the age differs.
    let dir = TempDir::new().unwrap();
    copy(old.path(), dir.path());
    let mut store = Store::open(dir.path(), 1).unwrap();
    append(&mut store, vec![entry(3, 6)]).await.unwrap();
    let dir = left_by_a_kill(dir.path());
    std::fs::copy(old.path().join(DATABASE_FILE), dir.path().join(DATABASE_FILE)).unwrap();
    let text = refusal(dir.path());
    assert!(text.contains("log entry") && text.contains("limosa raft remove 1"), "{text}");

    // Another directory's database.
    std::fs::copy(new.path().join(DATABASE_FILE), dir.path().join(DATABASE_FILE)).unwrap();
    assert!(refusal(dir.path()).contains("not of the database beside it"));
    std::fs::write(dir.path().join(DATABASE_FILE), []).unwrap();
    assert!(refusal(dir.path()).contains("gone or empty"));
    std::fs::remove_file(dir.path().join(DATABASE_FILE)).unwrap();
    assert!(refusal(dir.path()).contains("gone or empty"));

    copy(new.path(), dir.path());
    std::fs::remove_file(dir.path().join(PROMISE_FILE)).unwrap();
    assert!(refusal(dir.path()).contains("it is gone, but the database beside it is not"));
    std::fs::write(dir.path().join(PROMISE_FILE), [0; 100]).unwrap();
    assert!(refusal(dir.path()).contains("neither of its two records"));
}

#[tokio::test]
async fn a_vote_that_was_given_is_never_forgotten() {
    let dir = killed(3).await;
    let before = TempDir::new().unwrap();
    copy(dir.path(), before.path());
    let mut store = Store::open(dir.path(), 1).unwrap();
    store.save_vote(&Vote::new(4, 2)).await.unwrap();
    let dir = left_by_a_kill(dir.path());
    std::fs::copy(before.path().join(DATABASE_FILE), dir.path().join(DATABASE_FILE)).unwrap();
    assert!(refusal(dir.path()).contains("the vote"));
}

#[tokio::test]
async fn a_log_that_a_leader_cut_back_is_no_damage() {
    let dir = killed(9).await;
    let mut store = Store::open(dir.path(), 1).unwrap();
    store.truncate_after(Some(id(3, 6))).await.unwrap();
    append(&mut store, vec![entry(4, 7)]).await.unwrap();
    let promised = store.promised();
    assert_eq!((promised.last, promised.dropped), (Some(id(4, 7)), Some(id(3, 9))));
    drop(store);
    let mut store = reopened(dir.path()).unwrap();
    assert_eq!(store.get_log_state().await.unwrap().last_log_id, Some(id(4, 7)));
    assert_eq!(store.promised(), promised);
}

#[tokio::test]
async fn what_is_committed_is_never_cut_away_or_replaced() {
    let dir = killed(9).await;
    let mut store = Store::open(dir.path(), 1).unwrap();
    store.save_committed(Some(id(3, 6))).await.unwrap();
    let error = store.truncate_after(Some(id(3, 5))).await.unwrap_err();
    assert!(error.to_string().contains("lost a part of its log"), "{error}");
    assert!(append(&mut store, vec![entry(4, 6)]).await.is_err());
    assert!(has_all(&mut store, 9).await);
    // Also by one that starts again.
    append(&mut store, vec![entry(3, 10)]).await.unwrap();
    drop(store);
    let mut store = reopened(dir.path()).unwrap();
    assert!(store.truncate_after(Some(id(3, 5))).await.is_err());
    store.truncate_after(Some(id(3, 6))).await.unwrap();
}

#[tokio::test]
async fn claims_of_others_are_kept_on_disk() {
    let dir = killed(1).await;
    let mut store = Store::open(dir.path(), 1).unwrap();
    let claim = Claim { vote: Some(Vote::new(3, 1)), last: Some(id(3, 1)) };
    store.witness().learn(2, &claim);
    append(&mut store, vec![entry(3, 2)]).await.unwrap();
    drop(store);
    assert_eq!(reopened(dir.path()).unwrap().witness().of(2), claim);
}

#[tokio::test]
async fn the_files_of_a_node_are_for_its_user_alone() {
    let dir = killed(1).await;
    for name in [DATABASE_FILE, PROMISE_FILE] {
        std::fs::set_permissions(dir.path().join(name), Permissions::from_mode(0o600)).unwrap();
    }
    std::fs::set_permissions(dir.path().join(DATABASE_FILE), Permissions::from_mode(0o644)).unwrap();
    // Others may have theirs in a directory that was there before.
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let _store = Store::open(dir.path(), 1).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o755);
    let made = dir.path().join("new");
    let _new = Store::open(&made, 1).unwrap();
    assert_eq!(mode(&made), 0o700);
    assert_eq!(mode(&dir.path().join(DATABASE_FILE)), 0o600);
    let fresh = TempDir::new().unwrap();
    let _other = Store::open(fresh.path(), 1).unwrap();
    assert_eq!(mode(&fresh.path().join(PROMISE_FILE)), 0o600);
}

#[tokio::test]
async fn what_is_written_to_files_that_are_gone_is_not_acknowledged() {
    for name in [DATABASE_FILE, PROMISE_FILE] {
        let dir = TempDir::new().unwrap();
        let mut store = Store::open(dir.path(), 1).unwrap();
        append(&mut store, vec![entry(1, 1)]).await.unwrap();
        std::fs::remove_file(dir.path().join(name)).unwrap();
        let error = append(&mut store, vec![entry(1, 2)]).await.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("it is gone"), "{error}");
        assert!(error.contains("If its directory was moved, put it back"), "{error}");
    }
}

/// A disk that takes nothing more once it is full.
#[derive(Debug)]
pub(crate) struct Disk {
    file: FileBackend,
    full: Arc<AtomicBool>,
}

impl Disk {
    /// A disk with a file on it; it is full as long as the flag is set.
    pub(crate) fn new(file: File, full: Arc<AtomicBool>) -> io::Result<Self> {
        Ok(Self { file: FileBackend::new(file).map_err(disk)?, full })
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

#[tokio::test]
async fn a_full_disk_stops_the_store_and_with_space_it_has_all_that_it_acknowledged() {
    let dir = killed(4).await;
    let full = Arc::new(AtomicBool::new(false));
    let mut store = Store::open_on(dir.path(), 1, |file| Disk::new(file, full.clone())).unwrap();
    append(&mut store, vec![entry(3, 5)]).await.unwrap();
    full.store(true, Ordering::Relaxed);
    assert!(append(&mut store, vec![entry(3, 6)]).await.is_err());
    full.store(false, Ordering::Relaxed);
    // Later writes could leave a hole: it writes nothing more.
    assert!(append(&mut store, vec![entry(3, 7)]).await.is_err());
    drop(store);
    let mut store = reopened(dir.path()).unwrap();
    assert_eq!(store.promised().last, Some(id(3, 5)));
    append(&mut store, vec![entry(3, 6)]).await.unwrap();
    assert!(has_all(&mut store, 6).await);
}

/// What is in a directory.
fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_first_start_on_a_full_disk_leaves_nothing_and_the_next_one_begins_anew() {
    let dir = TempDir::new().unwrap();
    let full = Arc::new(AtomicBool::new(true));
    let refused = Store::open_on(dir.path(), 1, |file| Disk::new(file, full.clone())).err().unwrap();
    assert!(matches!(refused, StoreError::Io { .. }), "{refused}");
    assert_eq!(names(dir.path()), BTreeSet::new());
    drop(reopened(dir.path()).unwrap());
    // One that was killed on the way leaves what it had.
    let dir = TempDir::new().unwrap();
    for name in ["raft.redb.new", "promise.new"] {
        std::fs::write(dir.path().join(name), [7; 10_000]).unwrap();
    }
    drop(reopened(dir.path()).unwrap());
    assert_eq!(names(dir.path()), BTreeSet::from([DATABASE_FILE, PROMISE_FILE].map(str::to_owned)));
    // So does one that was killed between the two files.
    std::fs::remove_file(dir.path().join(PROMISE_FILE)).unwrap();
    drop(reopened(dir.path()).unwrap());
    assert_eq!(names(dir.path()).len(), 2);
}

#[tokio::test]
async fn a_database_that_was_cut_short_is_said_to_be_damaged_with_the_way_back() {
    for dir in [killed(40).await, stopped(40).await] {
        let path = dir.path().join(DATABASE_FILE);
        let whole = std::fs::read(&path).unwrap();
        for cut in [1, 4_096, 8_192, whole.len() / 2, whole.len() - 4_096, whole.len() - 1] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let text = refusal(dir.path());
            assert!(text.contains("raft.redb: ") && text.contains("limosa raft remove 1"), "{cut}: {text}");
            assert!(!text.contains("fill whole buffer"), "{cut}: {text}");
        }
    }
}

#[tokio::test]
async fn what_is_no_file_is_said_to_be_none_and_an_empty_promise_is_damage_with_the_way_back() {
    let dir = killed(3).await;
    let [database, promise] = [DATABASE_FILE, PROMISE_FILE].map(|name| dir.path().join(name));
    std::fs::write(&promise, "").unwrap();
    let owner = check_owner(dir.path(), 1).unwrap_err().to_string();
    for said in [owner, refusal(dir.path())] {
        assert!(said.contains("promise: neither of its two records can be read"), "{said}");
        assert!(said.contains("limosa raft remove 1") && said.contains("limosa raft add"), "{said}");
    }
    let refused = || reopened(dir.path()).err().unwrap().to_string();
    for (path, wanted) in
        [(&promise, "promise: it is no regular file"), (&database, "raft.redb: it is no regular file")]
    {
        std::fs::remove_file(path).unwrap();
        // To open it would be to wait for whoever writes.
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
        let said = refused();
        assert!(said.contains(wanted), "{said}");
        assert!(check_owner(dir.path(), 1).is_err());
        std::fs::remove_file(path).unwrap();
        std::fs::create_dir(path).unwrap();
        let said = refused();
        assert!(said.contains(wanted), "{said}");
    }
}

#[tokio::test]
async fn whose_a_directory_is_can_be_told_while_its_node_runs() {
    let dir = TempDir::new().unwrap();
    check_owner(&dir.path().join("none"), 1).unwrap();
    check_owner(dir.path(), 1).unwrap();
    let _store = Store::open(dir.path(), 1).unwrap();
    check_owner(dir.path(), 1).unwrap();
    let other = check_owner(dir.path(), 2).unwrap_err();
    assert!(matches!(other, StoreError::OtherNode { stored: 1, given: 2 }), "{other}");
}

#[tokio::test]
async fn how_long_the_disk_has_been_at_a_write_is_known() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path(), 1).unwrap();
    assert_eq!(store.writing(), None);
    let writer = store.database.begin_write().unwrap();
    store.submit(Job::Committed(Bytes::new())).unwrap();
    let long = Micros(200_000);
    for _ in 0..1_000 {
        if store.writing().is_some_and(|age| age >= long) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(store.writing().is_some_and(|age| age >= long));
    drop(writer);
    for _ in 0..1_000 {
        if store.writing().is_none() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the disk is free, and the write has not ended");
}

#[tokio::test]
async fn a_disk_that_stands_still_stops_the_store_before_memory_is_full() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path(), 1).unwrap();
    // There is one writer at a time, and this one does nothing.
    let writer = store.database.begin_write().unwrap();
    // The store's thread takes a batch at some time of these, and no more than that one.
    let (taken, refused): (Vec<_>, Vec<_>) =
        (0..2 * JOBS_MAX).map(|_| store.submit(Job::Committed(Bytes::new()))).partition(io::Result::is_ok);
    assert!((JOBS_MAX..=JOBS_MAX + BATCH_LEN_MAX).contains(&taken.len()), "{}", taken.len());
    for error in refused.into_iter().filter_map(Result::err) {
        assert!(error.to_string().contains("the disk stands still"), "{error}");
    }
    drop(writer);
}
