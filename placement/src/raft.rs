//! The state machine and the network as Raft (openraft) wants them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use flow::{GroupId, SiteId};
use futures::{Stream, StreamExt};
use openraft::alias::{LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf, WatchReceiverOf};
use openraft::async_runtime::Instant;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{BasicNode, EntryPayload, RaftMetrics, RaftSnapshotBuilder, ServerState, Snapshot};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::claims::{Claim, Claims, Witness};
use crate::core::{Change, Cluster, Group, Outcome, Probe, Proposal, Rejected, SiteReport};
use crate::node::{Caller, NodeId, ProposeError, Transport};
use crate::pack;
use crate::store::Store;
use crate::wire;

openraft::declare_raft_types!(
    /// What Raft is told of this package's types.
    pub TypeConfig:
        D = Proposal,
        R = Answer,
);

/// The Raft of this package.
pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// What applying an entry returned; `None` for Raft's own entries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer(pub Option<Result<Outcome, Rejected>>);

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.actor, self.command.summary())
    }
}

/// Changes that are kept for watchers, at most.
const HISTORY_LEN_MAX: usize = 65_536;
/// Bytes of changes in one answer, beyond its first revision or change: little work, and little of a slow link.
pub(crate) const ANSWER_LEN_MAX: usize = 1 << 19;
/// Changes in one answer, beyond its first revision, whatever their length.
const ANSWER_CHANGES_MAX: usize = 8_192;

/// What watchers and readers share with the state machine.
pub(crate) struct Shared {
    state: RwLock<State>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    cluster: Arc<Cluster>,
    /// Changes by revision, oldest first.
    history: VecDeque<(u64, Arc<[Change]>)>,
    history_len: usize,
    /// The revision before the oldest change in the history.
    floor: u64,
    applied: Option<LogIdOf<TypeConfig>>,
    membership: StoredMembershipOf<TypeConfig>,
}

/// Changes after a revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Changes {
    /// The revision that they lead to: ask for those since this one next.
    pub revision: u64,
    /// They are all there is: forget what is not among them.
    pub reset: bool,
    /// In order.
    pub changes: Vec<Change>,
    /// These are not all that there were when the answer was made: who must not act on a part asks for the rest first.
    #[serde(default)]
    pub more: bool,
}

impl Shared {
    fn new() -> Self {
        Self { state: RwLock::default(), revision: watch::Sender::new(0) }
    }

    pub(crate) fn cluster(&self) -> Arc<Cluster> {
        self.read().cluster.clone()
    }

    /// The number of the site with this name. Holds no copy of the state, which applying entries would have to leave alone.
    pub(crate) fn site_named(&self, name: &str) -> Option<SiteId> {
        self.read().cluster.site_named(name).map(|site| site.id)
    }

    /// A short look at the state, which entries wait for: to compare, not to compute. Holds no copy.
    pub(crate) fn look<T>(&self, at: impl FnOnce(&Cluster) -> T) -> T {
        at(&self.read().cluster)
    }

    /// Whether the site with this number has this name.
    pub(crate) fn is_site(&self, id: SiteId, name: &str) -> bool {
        self.read().cluster.sites.get(&id).is_some_and(|site| site.name == name)
    }

    /// Whether a placement node was a member once and is none any more, by what is committed and known here.
    pub(crate) fn is_removed(&self, node: NodeId) -> bool {
        self.read().cluster.removed_nodes.contains(&node)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Told of every new revision.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// What a watcher at `since` lacks, up to a length; it asks again for the rest. Nothing when this node is behind
    /// the watcher: it must not be taken back in time. Who starts from nothing gets all at once, and may have the
    /// groups as a table instead of one change for each. Takes a while: not for threads that others wait for.
    pub(crate) fn changes_since(&self, since: u64, as_table: bool) -> Option<(Changes, Bytes)> {
        let cluster = match self.news(since)? {
            News::Later(revisions) => return Some((cut(revisions), Bytes::new())),
            News::All(cluster) => cluster,
        };
        let (changes, groups) = if as_table {
            (cluster.snapshot_changes_without_groups(), pack::pack(&cluster.groups))
        } else {
            (cluster.snapshot_changes(), Bytes::new())
        };
        Some((Changes { revision: cluster.revision, reset: true, changes, more: false }, groups))
    }

    /// The same for those who take everything page by page: the first page of all has no groups but those that
    /// have room; [`Shared::rest`] has the others.
    pub(crate) fn page_since(&self, since: u64) -> Option<Page> {
        let cluster = match self.news(since)? {
            News::Later(revisions) => return Some(Page { changes: cut(revisions), next: None }),
            News::All(cluster) => cluster,
        };
        let changes = cluster.snapshot_changes_without_groups();
        let len = changes.iter().map(len_of).sum();
        let changes = Changes { revision: cluster.revision, reset: true, changes, more: false };
        Some(add_groups(&cluster, changes, Bound::Unbounded, len))
    }

    /// Groups behind one, for a watcher who began at a revision. Those that have changed meanwhile come as they are
    /// now, and again with the changes since that revision, which it has to ask for when this is done.
    pub(crate) fn rest(&self, revision: u64, after: GroupId) -> Page {
        let changes = Changes { revision, reset: false, changes: Vec::new(), more: false };
        add_groups(&self.cluster(), changes, Bound::Excluded(after), 0)
    }

    /// What there is, without looking into it: this holds what applying entries waits for.
    fn news(&self, since: u64) -> Option<News> {
        let state = self.read();
        if state.cluster.revision <= since {
            return None;
        }
        if since == 0 || since < state.floor {
            return Some(News::All(state.cluster.clone()));
        }
        let start = state.history.partition_point(|(at, _)| *at <= since);
        let mut count = 0;
        let within = |(_, changes): &&(u64, Arc<[Change]>)| {
            let first = count == 0;
            count += changes.len();
            first || count <= ANSWER_CHANGES_MAX
        };
        let revisions: Vec<_> = state.history.range(start..).take_while(within).cloned().collect();
        // Whoever has all of them is at the last revision, which need not have changes of its own.
        let all = start + revisions.len() == state.history.len();
        Some(News::Later(Later { revisions, end: all.then_some(state.cluster.revision) }))
    }
}

enum News {
    All(Arc<Cluster>),
    Later(Later),
}

struct Later {
    revisions: Vec<(u64, Arc<[Change]>)>,
    /// The present revision, if these are all that lead to it.
    end: Option<u64>,
}

/// Changes, and where the rest begins if they are not all.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// As many as one answer takes.
    pub changes: Changes,
    /// The last group of the page; groups behind it are still to come.
    pub next: Option<GroupId>,
}

/// Bytes of a change in an answer.
fn len_of(change: &Change) -> usize {
    wire::encode(change).len()
}

/// Whole revisions, until they are as long as an answer may be.
fn cut(later: Later) -> Changes {
    let (mut len, mut revision, mut changes) = (0, 0, Vec::new());
    let mut rest = later.revisions.into_iter().peekable();
    while let Some((at, of_revision)) = rest.next_if(|_| len < ANSWER_LEN_MAX) {
        len += of_revision.iter().map(len_of).sum::<usize>();
        changes.extend(of_revision.iter().cloned());
        revision = at;
    }
    let end = later.end.filter(|_| rest.peek().is_none());
    Changes { revision: end.unwrap_or(revision), reset: false, changes, more: end.is_none() }
}

/// Adds groups until a page is full.
fn add_groups(cluster: &Cluster, mut changes: Changes, from: Bound<GroupId>, mut len: usize) -> Page {
    let mut rest = cluster.groups.range((from, Bound::Unbounded)).peekable();
    let mut next = None;
    // At least one, so that every page leads on.
    while let Some((id, group)) = rest.next_if(|_| next.is_none() || len < ANSWER_LEN_MAX) {
        let change = Change::Group(*group);
        len += len_of(&change);
        changes.changes.push(change);
        next = Some(*id);
    }
    Page { changes, next: next.filter(|_| rest.peek().is_some()) }
}

impl Changes {
    /// Puts the groups of a table where they belong: behind the sites and services that they name, before the moves.
    pub(crate) fn take_groups(&mut self, groups: BTreeMap<GroupId, Group>) {
        let at = self.changes.iter().position(|change| matches!(change, Change::Move(_)));
        let at = at.unwrap_or(self.changes.len());
        self.changes.splice(at..at, groups.into_values().map(Change::Group));
    }
}

impl State {
    /// An entry at or before what is applied would make another history of this state.
    fn check_next(&self, id: LogIdOf<TypeConfig>) -> io::Result<()> {
        if self.applied.is_none_or(|applied| applied < id && applied.index < id.index) {
            return Ok(());
        }
        Err(io::Error::other(format!("entry {id} does not follow {:?}, which is applied", self.applied)))
    }

    fn apply(&mut self, index: u64, proposal: &Proposal) -> Result<Outcome, Rejected> {
        // Copies the cluster only while a reader holds the last one.
        let applied = Arc::make_mut(&mut self.cluster).apply(index, proposal);
        if !applied.changes.is_empty() {
            self.history_len += applied.changes.len();
            self.history.push_back((index, applied.changes.into()));
        }
        while self.history_len > HISTORY_LEN_MAX {
            let Some((at, dropped)) = self.history.pop_front() else { break };
            self.history_len -= dropped.len();
            self.floor = at;
        }
        applied.result
    }

    /// Whoever leaves with a committed membership is noted, for snapshots too. While the change is under way, when the old and
    /// the new voters decide together, all of them are members.
    fn change_members(&mut self, next: StoredMembershipOf<TypeConfig>) {
        let ids = |membership: &StoredMembershipOf<TypeConfig>| -> BTreeSet<NodeId> {
            membership.membership().nodes().map(|(id, _)| *id).collect()
        };
        let (before, now) = (ids(&self.membership), ids(&next));
        self.membership = next;
        if before != now {
            // Copies the cluster only while a reader holds the last one.
            Arc::make_mut(&mut self.cluster).note_members(&before, &now);
        }
    }

    fn install(&mut self, meta: &SnapshotMetaOf<TypeConfig>, cluster: Cluster) {
        self.floor = cluster.revision;
        self.cluster = Arc::new(cluster);
        self.history.clear();
        self.history_len = 0;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
    }
}

/// The replicated state: in memory, made from the last snapshot and the log behind it.
#[derive(Clone)]
pub struct StateMachine {
    shared: Arc<Shared>,
    store: Store,
}

impl fmt::Debug for StateMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StateMachine at {:?}", self.shared.read().applied)
    }
}

impl StateMachine {
    /// From the last snapshot in the store.
    ///
    /// # Errors
    /// The disk's, or a damaged snapshot.
    pub fn open(store: Store) -> io::Result<Self> {
        let machine = Self { shared: Arc::new(Shared::new()), store };
        if let Some((meta, data)) = machine.store.snapshot()? {
            machine.take(&meta, data)?;
        }
        Ok(machine)
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    fn take(&self, meta: &SnapshotMetaOf<TypeConfig>, data: Bytes) -> io::Result<()> {
        let cluster = wire::decode_cluster(data)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        let revision = cluster.revision;
        self.shared.write().install(meta, cluster);
        self.shared.revision.send_replace(revision);
        Ok(())
    }
}

/// Work that takes a while, away from the threads that carry Raft's messages.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, Bytes>, io::Error> {
        let (cluster, meta) = {
            let state = self.shared.read();
            let meta = SnapshotMetaOf::<TypeConfig> {
                last_log_id: state.applied,
                last_membership: state.membership.clone(),
            };
            (state.cluster.clone(), meta)
        };
        let data = aside(move || Ok(wire::encode_cluster(&cluster))).await?;
        self.store.save_snapshot(&meta, data.clone()).await?;
        Ok(Snapshot { meta, snapshot: data })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogIdOf<TypeConfig>>, StoredMembershipOf<TypeConfig>), io::Error> {
        let state = self.shared.read();
        Ok((state.applied, state.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        while let Some(entry) = entries.next().await {
            let (entry, responder) = entry?;
            let (answer, revision) = {
                let mut state = self.shared.write();
                state.check_next(entry.log_id)?;
                state.applied = Some(entry.log_id);
                let answer = match &entry.payload {
                    EntryPayload::Normal(proposal) => Some(state.apply(entry.log_id.index, proposal)),
                    EntryPayload::Membership(membership) => {
                        let membership = membership.clone();
                        state.change_members(StoredMembershipOf::<TypeConfig>::new(
                            Some(entry.log_id),
                            membership,
                        ));
                        None
                    }
                    EntryPayload::Blank => None,
                };
                (answer, state.cluster.revision)
            };
            self.shared.revision.send_if_modified(|last| std::mem::replace(last, revision) != revision);
            if let Some(responder) = responder {
                responder.send(Answer(answer));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        snapshot: Bytes,
    ) -> Result<(), io::Error> {
        self.store.save_snapshot(meta, snapshot.clone()).await?;
        let (machine, meta) = (self.clone(), meta.clone());
        aside(move || machine.take(&meta, snapshot)).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<TypeConfig, Bytes>>, io::Error> {
        let store = self.store.clone();
        let snapshot = aside(move || store.snapshot()).await?;
        Ok(snapshot.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// From node to node.
#[derive(Serialize, Deserialize)]
pub(crate) enum PeerRequest {
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<TypeConfig>),
    PreVote(VoteRequest<TypeConfig>),
    Snapshot(SnapshotChunk),
    TransferLeader(TransferLeaderRequest<TypeConfig>),
    /// A proposal for the leader.
    Propose(Proposal),
    /// A site's report for the leader, which the sender took from who is named.
    Report {
        by: Caller,
        report: Box<SiteReport>,
    },
    /// Which log index must be applied before a read is up to date?
    ReadIndex,
    /// What do you know that we all have promised? This is what I know.
    Claims(Claims),
}

/// Beside what a leader sends to have appended; those who do not know it need not read it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Note {
    /// What the leader knows that all have promised.
    pub(crate) claims: Claims,
    /// Time since a quorum answered the leader, in milliseconds.
    pub(crate) quorum_ack_ms: Option<u64>,
    /// All up to this index is committed. Those of earlier releases do not say it.
    #[serde(default)]
    pub(crate) committed: Option<u64>,
    /// Members that have not answered the leader for longer than an election takes. Those of earlier releases do not say it.
    #[serde(default)]
    pub(crate) silent: Vec<NodeId>,
}

/// What connections of this node have in common.
pub(crate) struct Ledger {
    pub(crate) store: Store,
    pub(crate) witness: Arc<Witness>,
    /// Raft's figures, once it runs.
    pub(crate) metrics: OnceLock<WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>>,
    /// Who said first that this node was removed from the group. Numbers are never used again, so it is for good.
    pub(crate) removed_by: OnceLock<NodeId>,
    /// A member that has not answered for longer is silent.
    silence_max: Duration,
    /// Since when this node leads without an answer of members that never gave one.
    unheard: Mutex<BTreeMap<NodeId, tokio::time::Instant>>,
}

impl Ledger {
    pub(crate) fn new(store: Store, silence_max: Duration) -> Self {
        Self {
            witness: store.witness(),
            store,
            metrics: OnceLock::new(),
            removed_by: OnceLock::new(),
            silence_max,
            unheard: Mutex::default(),
        }
    }

    /// Members that do not answer this leader; `None` where this node does not lead.
    pub(crate) fn silent(&self) -> Option<Vec<NodeId>> {
        let metrics = self.metrics.get()?.borrow_watched();
        let mut unheard = self.unheard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(heard) = metrics.heartbeat.as_ref().filter(|_| metrics.state == ServerState::Leader) else {
            unheard.clear();
            return None;
        };
        let mut silence = |id: NodeId| {
            if let Some(at) = heard.get(&id).copied().flatten() {
                unheard.remove(&id);
                return at.elapsed();
            }
            unheard.entry(id).or_insert_with(tokio::time::Instant::now).elapsed()
        };
        let members = metrics.membership_config.membership().nodes().map(|(id, _)| *id);
        Some(members.filter(|id| *id != metrics.id && silence(*id) > self.silence_max).collect())
    }

    /// Time since a quorum answered this node as the leader.
    pub(crate) fn quorum_ack(&self) -> Option<Duration> {
        let metrics = self.metrics.get()?.borrow_watched();
        if metrics.state != ServerState::Leader {
            return None;
        }
        let alone = metrics.membership_config.membership().voter_ids().eq([metrics.id]);
        if alone { Some(Duration::ZERO) } else { metrics.last_quorum_acked.map(|at| at.elapsed()) }
    }

    fn note(&self) -> Note {
        let quorum_ack_ms = self.quorum_ack().map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let applied = |metrics: &WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>| {
            metrics.borrow_watched().last_applied.map(|id| id.index)
        };
        let committed = self.metrics.get().and_then(applied);
        let silent = self.silent().unwrap_or_default();
        Note { claims: self.witness.told(&self.store.promised()), quorum_ack_ms, committed, silent }
    }
}

/// A part of a snapshot; its bytes are attached. The receiver installs them with the last part.
#[derive(Serialize, Deserialize)]
pub(crate) struct SnapshotChunk {
    pub(crate) vote: VoteOf<TypeConfig>,
    pub(crate) meta: SnapshotMetaOf<TypeConfig>,
    pub(crate) offset: usize,
    pub(crate) total: usize,
}

/// Answers, in the order of the requests. A node that cannot answer says why in a text.
#[derive(Serialize, Deserialize)]
pub(crate) enum PeerResponse {
    Append(AppendEntriesResponse<TypeConfig>),
    Vote(VoteResponse<TypeConfig>),
    /// `None` until the last part.
    Snapshot(Option<SnapshotResponse<TypeConfig>>),
    TransferLeader(TransferLeaderResponse<TypeConfig>),
    Propose(Result<Outcome, ProposeError>),
    Report(Result<Vec<Probe>, ProposeError>),
    ReadIndex(Result<u64, ProposeError>),
    Claims(Claims),
    Failed(String),
    /// To a node that was a member and was removed: nothing that it sends is looked at.
    Removed,
}

/// Bytes of a snapshot in one message.
const CHUNK_LEN: usize = 1 << 20;

/// Makes connections for Raft.
pub(crate) struct Network {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) ledger: Arc<Ledger>,
    /// Longest wait for the answer to entries.
    pub(crate) append_bound: Duration,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: NodeId, _node: &BasicNode) -> Peer {
        let Self { transport, ledger, append_bound } = self;
        Peer { target, transport: transport.clone(), ledger: ledger.clone(), append_bound: *append_bound }
    }
}

/// One other node.
pub(crate) struct Peer {
    target: NodeId,
    transport: Arc<dyn Transport>,
    ledger: Arc<Ledger>,
    append_bound: Duration,
}

/// Sends a request to a node and reads its answer.
pub(crate) async fn ask<T: DeserializeOwned>(
    transport: &dyn Transport,
    to: NodeId,
    request: Bytes,
) -> Result<T, AskError> {
    ask_with(transport, to, request).await.map(|(answer, _)| answer)
}

/// Its answer, and what is beside it.
pub(crate) async fn ask_with<T: DeserializeOwned>(
    transport: &dyn Transport,
    to: NodeId,
    request: Bytes,
) -> Result<(T, Bytes), AskError> {
    let bytes =
        transport.call(to, request).await.map_err(|error| AskError::Unreachable(error.to_string()))?;
    wire::decode_with(bytes, wire::MESSAGE_LEN_MAX).map_err(|error| AskError::Wrong(error.to_string()))
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("wrong answer: {0}")]
    Wrong(String),
}

impl From<AskError> for RPCError<TypeConfig> {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Unreachable(text) => Self::Unreachable(Unreachable::from_string(text)),
            AskError::Wrong(text) => Self::Network(NetworkError::from_string(text)),
        }
    }
}

impl Peer {
    async fn ask(
        &self,
        request: &PeerRequest,
        option: &RPCOption,
    ) -> Result<PeerResponse, RPCError<TypeConfig>> {
        self.send(wire::encode(request), option.hard_ttl()).await
    }

    async fn send(&self, request: Bytes, bound: Duration) -> Result<PeerResponse, RPCError<TypeConfig>> {
        let answer = ask(self.transport.as_ref(), self.target, request);
        match tokio::time::timeout(bound, answer).await {
            Ok(Ok(PeerResponse::Failed(text))) => Err(NetworkError::from_string(text).into()),
            Ok(Ok(PeerResponse::Removed)) => {
                let _ = self.ledger.removed_by.set(self.target);
                Err(Unreachable::from_string("it says that this node was removed from the group").into())
            }
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Unreachable::from_string("no answer in time").into()),
        }
    }
}

fn unexpected() -> RPCError<TypeConfig> {
    NetworkError::from_string("the peer answered something else").into()
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let (vote, end) = (rpc.vote, rpc.entries.last().map(|entry| entry.log_id).or(rpc.prev_log_id));
        let request = wire::encode_with(&PeerRequest::Append(rpc), wire::encode(&self.ledger.note()));
        // Raft gives a heartbeat's time for these, which a round trip and a write to disk may exceed together: each answer would
        // come too late, be asked for again with more entries, and come too late. Signs of life are bounded by who sends them.
        let bound = option.hard_ttl().max(self.append_bound);
        let PeerResponse::Append(answer) = self.send(request, bound).await? else {
            return Err(unexpected());
        };
        let last = match &answer {
            AppendEntriesResponse::Success => end,
            AppendEntriesResponse::PartialSuccess(last) => *last,
            AppendEntriesResponse::Conflict | AppendEntriesResponse::HigherVote(_) => return Ok(answer),
        };
        self.ledger.witness.learn(self.target, &Claim { vote: Some(vote), last });
        Ok(answer)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let vote = rpc.vote;
        let PeerResponse::Vote(answer) = self.ask(&PeerRequest::Vote(rpc), &option).await? else {
            return Err(unexpected());
        };
        if answer.vote_granted {
            self.ledger.witness.learn(self.target, &Claim { vote: Some(vote), last: None });
        }
        Ok(answer)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let PeerResponse::Vote(answer) = self.ask(&PeerRequest::PreVote(rpc), &option).await? else {
            return Err(unexpected());
        };
        Ok(answer)
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, Bytes>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let send = self.send_snapshot(vote, snapshot, option);
        tokio::select! {
            answer = send => answer.map_err(Into::into),
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let PeerResponse::TransferLeader(answer) =
            self.ask(&PeerRequest::TransferLeader(req), &option).await?
        else {
            return Err(unexpected());
        };
        Ok(answer)
    }
}

impl Peer {
    async fn send_snapshot(
        &self,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, Bytes>,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, RPCError<TypeConfig>> {
        let total = snapshot.snapshot.len();
        let mut offset = 0;
        loop {
            let end = total.min(offset + CHUNK_LEN);
            let chunk = SnapshotChunk { vote, meta: snapshot.meta.clone(), offset, total };
            let request =
                wire::encode_with(&PeerRequest::Snapshot(chunk), snapshot.snapshot.slice(offset..end));
            let PeerResponse::Snapshot(answer) = self.send(request, option.hard_ttl()).await? else {
                return Err(unexpected());
            };
            match answer {
                Some(answer) => {
                    if answer.vote == vote {
                        let last = snapshot.meta.last_log_id;
                        self.ledger.witness.learn(self.target, &Claim { vote: Some(vote), last });
                    }
                    return Ok(answer);
                }
                None if end < total => offset = end,
                None => return Err(unexpected()),
            }
        }
    }
}

#[cfg(test)]
#[path = "raft_tests.rs"]
mod tests;
