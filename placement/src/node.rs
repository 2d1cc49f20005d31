//! One placement node: Raft, the watchers' history, and the leader's brain.
//!
//! Whoever carries bytes calls [`Node::handle_peer`] for what placement nodes send and [`Node::handle_client`]
//! for what agents send, and passes the name that the connection's certificate gave.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use flow::{GroupId, Micros, SiteId};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{BasicNode, ReadPolicy, ServerState, Snapshot, SnapshotPolicy};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::claims::Claims;
use crate::clock::{Clock, wall_ms};
use crate::core::assess::{self, Assessment};
use crate::core::delay::{BASES, DEMAND_AGE_MAX, Locate, Misplaced, Model, Tested};
use crate::core::explain::Explanation;
use crate::core::leader::{Brain, BrainTimings, ROUND_SHARE};
use crate::core::whatif::{self, Difference, WhatIf};
use crate::core::witness::{self, Finding};
use crate::core::{Cluster, Command, Outcome, PROBLEMS_MAX, Probe, Proposal, Rejected, SiteReport};
use crate::geo::{Geo, GeoError};
use crate::lag::Lag;
use crate::notices::Notices;
use crate::proof::{Electorate, KnownTo, Proof};
use crate::raft::{
    Changes, Ledger, Network, Note, Page, PeerRequest, PeerResponse, Raft, Shared, SnapshotChunk,
    StateMachine, TypeConfig, ask, ask_with,
};
use crate::solver::InstanceError;
use crate::store::{Store, StoreError};
use crate::twins::{Speaking, Twins};
use crate::wire;

/// A placement node. Never used again once the node has left.
pub type NodeId = u64;

/// Carries bytes to a placement node and brings its answer.
#[async_trait]
pub trait Transport: Send + Sync {
    /// One request, one answer.
    async fn call(&self, to: NodeId, request: Bytes) -> Result<Bytes, TransportError>;
}

/// Why a request was not answered. Whether it had an effect is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// No way to the node now.
    #[error("node {to} is unreachable: {reason}")]
    Unreachable {
        /// The node.
        to: NodeId,
        /// Why.
        reason: String,
    },
    /// No answer in time.
    #[error("node {to} did not answer in time")]
    Timeout {
        /// The node.
        to: NodeId,
    },
}

/// How long Raft waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftTimings {
    /// Between signs of life of the leader.
    pub heartbeat: Duration,
    /// Shortest silence after which a follower stands for election; each draws its own.
    pub election_min: Duration,
    /// Longest such silence.
    pub election_max: Duration,
}

impl Default for RaftTimings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(250),
            election_min: Duration::from_millis(1000),
            election_max: Duration::from_millis(2000),
        }
    }
}

/// What a node needs.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its number, for life.
    pub id: NodeId,
    /// Its directory, for itself.
    pub dir: PathBuf,
    /// The other nodes that the transport reaches. While the directory is empty they are asked what this node
    /// promised; later the voters are.
    pub peers: BTreeSet<NodeId>,
    /// Raft's waits.
    pub raft: RaftTimings,
    /// The leader's waits.
    pub brain: BrainTimings,
    /// A MaxMind DB with places of addresses.
    pub geo: Option<PathBuf>,
    /// Log entries between snapshots.
    pub snapshot_every: u64,
    /// Longest wait for a write or an up-to-date read.
    pub deadline: Duration,
}

impl NodeConfig {
    /// With defaults for all but number and directory.
    #[must_use]
    pub fn new(id: NodeId, dir: PathBuf) -> Self {
        Self {
            id,
            dir,
            peers: BTreeSet::new(),
            raft: RaftTimings::default(),
            brain: BrainTimings::default(),
            geo: None,
            snapshot_every: 10_000,
            deadline: Duration::from_secs(5),
        }
    }
}

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The snapshot or log on disk.
    #[error("cannot read the state of node {id} from disk: {source}; restore it as a new node")]
    State {
        /// The node.
        id: NodeId,
        /// Why.
        source: std::io::Error,
    },
    /// The MaxMind DB.
    #[error(transparent)]
    Geo(#[from] GeoError),
    /// Timings that cannot work.
    #[error("raft timings: {0}; the heartbeat must be below election_min, and that below election_max")]
    Timings(String),
    /// Raft itself.
    #[error("raft: {0}")]
    Raft(String),
}

/// Why a proposal has no outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum ProposeError {
    /// Ask the leader, or anyone a little later if there is none.
    #[error("not the leader; it is {leader:?}")]
    NotLeader {
        /// Who leads, if that is known.
        leader: Option<NodeId>,
    },
    /// The state machine said no; nothing has changed.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// No quorum in time. It may still take effect: repeat it.
    #[error("no quorum answered within {ms} ms; repeat the command, it may or may not have taken effect")]
    Timeout {
        /// How long it was waited for.
        ms: u64,
    },
    /// The caller may not say this.
    #[error("{who} may not do this: {right}")]
    Forbidden {
        /// The caller.
        who: String,
        /// Who may.
        right: String,
    },
    /// This node has stopped, for example because its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
    /// A change of membership that is not possible now.
    #[error("membership: {0}")]
    Membership(String),
}

/// Why there is no assessment.
#[derive(Debug, thiserror::Error)]
pub enum AssessError {
    /// The node does not lead, or has stopped.
    #[error(transparent)]
    Node(#[from] ProposeError),
    /// A number that the solver cannot use.
    #[error(transparent)]
    Instance(#[from] InstanceError),
}

/// Who sends, by its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Caller {
    /// The agent of the site with this name.
    Site(String),
    /// A person or a tool with an operator's rights.
    Operator(String),
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Site(name) => write!(f, "site {name}"),
            Self::Operator(name) => f.write_str(name),
        }
    }
}

/// From an agent to a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientRequest {
    /// To the leader.
    Propose(Command),
    /// To any node: changes after a revision, as soon as there are some.
    Watch {
        /// The last revision that the watcher has; 0 for none.
        since: u64,
        /// Longest wait, in milliseconds; at most [`WATCH_WAIT_MAX`] counts.
        wait_ms: u64,
        /// The watcher can take the groups as a table beside the answer.
        #[serde(default)]
        table: bool,
    },
    /// To every node: all learn of delays and loads, and the leader, who alone says that it is done, renews the lease.
    Report(Box<SiteReport>),
    /// To any node, from who cannot reach the leader: the node passes it on.
    PassProposal(Command),
    /// As [`Self::Report`], and the node passes it on.
    PassReport(Box<SiteReport>),
}

/// From a node to an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientResponse {
    /// What became of a proposal or report.
    Done(Result<Outcome, ProposeError>),
    /// Changes, maybe none.
    Changes(Changes),
    /// To a report that was taken: what the site should measure. Only to sites that said that they are willing to, so that one which
    /// does not know this answer never gets it.
    Probes(Vec<Probe>),
    /// The bytes made no sense.
    Unreadable(String),
}

/// Longest wait of a watch.
pub const WATCH_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often the leader thinks. Well below a lease.
const TICK: Duration = Duration::from_millis(100);

/// Between two looks whether its files are still there.
const FILES_LOOK: Duration = Duration::from_secs(1);
/// Pause before a leader is looked for again.
const INSIST_PAUSE: Duration = Duration::from_millis(50);

/// A node's part in Raft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Decides.
    Leader,
    /// Follows a leader.
    Follower,
    /// Stands for election.
    Candidate,
    /// Leads by its own account only: no quorum answers it.
    Isolated,
    /// Follows without a vote.
    Learner,
    /// Has stopped.
    Stopped,
}

/// A member of the Raft group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number.
    pub id: NodeId,
    /// Where it listens.
    pub address: String,
    /// Whether it votes.
    pub voter: bool,
    /// Its last known log index; on the leader only.
    pub matched: Option<u64>,
}

/// As much of a problem as is told: what comes from a site may be of any length.
fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

/// What a site said of itself last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// How long ago.
    pub age: Duration,
    /// What keeps it from being ready.
    pub problems: Vec<String>,
}

/// How a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftStatus {
    /// Its number.
    pub id: NodeId,
    /// Its part.
    pub role: Role,
    /// Who leads, if known, and if a quorum followed it lately.
    pub leader: Option<NodeId>,
    /// The term.
    pub term: u64,
    /// Last index of the log.
    pub last_log: Option<u64>,
    /// Last index applied.
    pub applied: Option<u64>,
    /// Last index in a snapshot.
    pub snapshot: Option<u64>,
    /// Time since a quorum answered the leader, by the leader's last word; nothing if none was ever heard.
    pub quorum_ack_ms: Option<u64>,
    /// That time is below [`RaftStatus::quorum_age_max_ms`]: the group can decide.
    #[serde(default)]
    pub quorum: bool,
    /// An older answer of a quorum proves nothing: another leader may have been elected since.
    #[serde(default)]
    pub quorum_age_max_ms: u64,
    /// How long entries are missing that the leader said are committed; 0 if none are.
    #[serde(default)]
    pub behind_ms: u64,
    /// Above it the node is behind: a write is to be everywhere before.
    #[serde(default = "forever")]
    pub behind_max_ms: u64,
    /// How long this node's disk has been at the write in hand; 0 if there is none. The others may have a quorum without it.
    #[serde(default)]
    pub write_ms: u64,
    /// Above it the disk stands still.
    #[serde(default = "forever")]
    pub write_max_ms: u64,
    /// Nodes in whose name two processes spoke to this one lately.
    #[serde(default)]
    pub twice: Vec<NodeId>,
    /// Members that have not answered the leader for [`RaftStatus::quorum_age_max_ms`]: one more, and there may be no quorum. Nothing where
    /// no quorum is known.
    #[serde(default)]
    pub silent: Vec<NodeId>,
    /// The node takes part: enough others have said that it has all that it promised to them.
    #[serde(default)]
    pub proven: bool,
    /// The revision of the state.
    pub revision: u64,
    /// Who belongs.
    pub members: Vec<Member>,
    /// Why the node has stopped, if it has.
    pub stopped: Option<String>,
}

impl RaftStatus {
    /// Entries that are committed have not come for longer than they may take.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.behind_ms > self.behind_max_ms
    }

    /// The disk has not ended a write for longer than one may take.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.write_ms > self.write_max_ms
    }
}

fn forever() -> u64 {
    u64::MAX
}

/// Counts since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeMetrics {
    /// Proposals that came in here as the leader.
    pub proposals: u64,
    /// Of these, refused by the state machine.
    pub rejected: u64,
    /// Of these, without a quorum in time.
    pub timeouts: u64,
    /// Reports of sites.
    pub reports: u64,
    /// Watches answered.
    pub watches: u64,
    /// Of these, with everything anew.
    pub watch_resets: u64,
    /// Commands of the leader's own.
    pub leader_commands: u64,
    /// Messages that made no sense.
    pub unreadable: u64,
    /// Times that this node thought as the leader: each looks after leases and moves, some solve.
    pub polls: u64,
    /// Microseconds that they took.
    pub poll_us: u64,
    /// Moves that its rounds started.
    pub moves_planned: u64,
    /// Rounds of other leaders that this node looked at.
    pub rounds_checked: u64,
    /// Of these, such that it found otherwise.
    pub rounds_doubted: u64,
}

#[derive(Default)]
struct Counters {
    proposals: AtomicU64,
    rejected: AtomicU64,
    timeouts: AtomicU64,
    reports: AtomicU64,
    watches: AtomicU64,
    watch_resets: AtomicU64,
    leader_commands: AtomicU64,
    unreadable: AtomicU64,
    polls: AtomicU64,
    poll_us: AtomicU64,
    moves_planned: AtomicU64,
    rounds_checked: AtomicU64,
    rounds_doubted: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A running node; clones share it.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

/// Time between looks at the file of places.
const GEO_LOOK: Micros = Micros(5_000_000);

/// What a node knows of delays and loads, and thinks while it leads.
enum Mind {
    Follows {
        model: Box<Model>,
        tidied: Micros,
        /// Since when it has had reports: before it has heard all sites, it can judge nobody.
        heard: Option<Micros>,
    },
    Leads(Box<Brain>),
}

impl Mind {
    fn follows(model: Model, now: Micros) -> Self {
        Self::Follows { model: Box::new(model), tidied: now, heard: None }
    }

    fn leader(&self) -> Option<&Brain> {
        match self {
            Self::Leads(brain) => Some(brain),
            Self::Follows { .. } => None,
        }
    }

    fn leader_mut(&mut self) -> Option<&mut Brain> {
        match self {
            Self::Leads(brain) => Some(brain),
            Self::Follows { .. } => None,
        }
    }

    fn model(&self) -> &Model {
        match self {
            Self::Leads(brain) => brain.model(),
            Self::Follows { model, .. } => model,
        }
    }

    fn note_sites(&mut self, cluster: &Cluster) {
        match self {
            Self::Leads(brain) => brain.note_sites(cluster),
            Self::Follows { model, .. } => {
                model.note_sites(cluster);
            }
        }
    }

    fn hear(&mut self, report: &SiteReport, at: Micros) {
        match self {
            Self::Leads(brain) => brain.handle_report(report, at),
            Self::Follows { model, heard, .. } => {
                heard.get_or_insert(at);
                model.handle_report(report, at);
            }
        }
    }
}

/// Reports that may wait for a busy mind: some seconds of a few hundred sites.
const LATE_REPORTS_MAX: usize = 1024;

/// Longest wait for a quorum's word that this node is up to date, before an agent that starts asks another. Two round trips around the
/// world take less.
const CONFIRM_WAIT: Duration = Duration::from_secs(2);

/// A node that follows forgets what is old this often.
const TIDY: Micros = Micros(10_000_000);

const NODE_TWICE: &str = "two processes run with the number of this placement node, and the group may lose what was committed: stop \
                          the one that was started with a copy of the directory, and take the copy away";
const SITE_TWICE: &str = "two processes run as this site, and both act for it: stop one of them; a site that was copied needs a name \
                          and a certificate of its own (`limosa site add`, `limosa dev certs`)";

struct Inner {
    id: NodeId,
    deadline: Duration,
    timings: BrainTimings,
    geo: Option<Arc<Geo>>,
    /// When its file was looked at.
    geo_seen: AtomicU64,
    raft: Raft,
    shared: Arc<Shared>,
    transport: Arc<Speaking>,
    /// Whether two processes speak in the name of one placement node, or of one site.
    twins: Arc<Twins<NodeId>>,
    twin_sites: Twins<String>,
    ledger: Arc<Ledger>,
    /// Beyond this a quorum's answer is old.
    quorum_age_max: Duration,
    /// What the leader said of its quorum last: when, in whose name, and how long before a quorum had answered it.
    led: Mutex<Option<Led>>,
    lag: Mutex<Lag>,
    behind_max: Duration,
    /// Enough others have said that this node has all that it promised.
    proven: watch::Sender<bool>,
    /// Why this node may never take part again.
    condemned: watch::Sender<Option<String>>,
    clock: Clock,
    mind: Mutex<Mind>,
    /// Sites whose positions the log has complained about.
    misplaced: Mutex<BTreeSet<SiteId>>,
    /// The last report of each site, and when it came.
    heard: Mutex<BTreeMap<SiteId, Said>>,
    /// Reports that came in while the mind was busy, oldest first.
    late: Mutex<VecDeque<Said>>,
    /// What this node found of the last round that another published, if it could be looked at.
    finding: Mutex<Option<Finding>>,
    /// Not before this is another round looked at.
    check_at: AtomicU64,
    assessing: tokio::sync::Mutex<()>,
    /// Held while somebody is told everything, which takes memory and a core.
    telling_all: tokio::sync::Mutex<()>,
    /// A snapshot that is coming in, with its sender's last index.
    incoming: Mutex<Option<(Option<u64>, BytesMut)>>,
    notices: Notices,
    counters: Counters,
}

/// What a leader said of the group.
struct Led {
    at: Micros,
    by: NodeId,
    /// Time since a quorum had answered it, in milliseconds.
    quorum_ack_ms: u64,
    silent: Vec<NodeId>,
}

/// A report, with whose it is: by the time that it is made use of its site may be no more, and the number another's.
#[derive(Clone)]
struct Said {
    at: Micros,
    by: Caller,
    report: Arc<SiteReport>,
}

type Metrics = openraft::RaftMetrics<TypeConfig>;

/// Up to where a node has acknowledged the log; the leader knows.
fn matched(metrics: &Metrics, id: NodeId) -> Option<u64> {
    metrics.replication.as_ref()?.get(&id)?.as_ref().map(|at| at.index)
}

/// When a node acknowledged anything last; the leader knows.
fn heard_at(
    metrics: &Metrics,
    id: NodeId,
) -> Option<openraft::metrics::SerdeInstant<openraft::type_config::alias::InstantOf<TypeConfig>>> {
    *metrics.heartbeat.as_ref()?.get(&id)?
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Starts a node from its directory. It does nothing until it is a member of a group: see
    /// [`Node::initialize`] and [`Node::add_learner`].
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: NodeConfig, transport: Arc<dyn Transport>) -> Result<Self, StartError> {
        // Whether the timings can work is said before anything is made.
        raft_config(&config)?;
        let (dir, id) = (config.dir.clone(), config.id);
        let store = tokio::task::spawn_blocking(move || Store::open(&dir, id)).await;
        let store = store.map_err(|error| StartError::Raft(error.to_string()))??;
        Self::start_on(config, transport, store).await
    }

    async fn start_on(
        config: NodeConfig,
        transport: Arc<dyn Transport>,
        store: Store,
    ) -> Result<Self, StartError> {
        let raft_config = raft_config(&config)?;
        let geo = config.geo.as_deref().map(Geo::open).transpose()?;
        let machine = StateMachine::open(store.clone())
            .map_err(|source| StartError::State { id: config.id, source })?;
        let shared = machine.shared();
        let ledger = Arc::new(Ledger::new(store.clone(), config.raft.election_max));
        let (clock, twins) = (Clock::start(), Arc::new(Twins::new(NODE_TWICE)));
        let transport = Arc::new(Speaking::new(transport, twins.clone(), clock));
        let network =
            Network { transport: transport.clone(), ledger: ledger.clone(), append_bound: config.deadline };
        let raft = Raft::new(config.id, Arc::new(raft_config), network, store, machine)
            .await
            .map_err(|error| StartError::Raft(error.to_string()))?;
        let _ = ledger.metrics.set(raft.metrics());
        let geo = geo.map(Arc::new);
        let places = geo.clone().map(|geo| geo as Arc<dyn Locate>);
        let inner = Arc::new(Inner {
            id: config.id,
            deadline: config.deadline,
            timings: config.brain,
            geo,
            geo_seen: AtomicU64::new(0),
            raft,
            shared,
            transport,
            twins,
            twin_sites: Twins::new(SITE_TWICE),
            ledger,
            quorum_age_max: config.raft.election_max,
            led: Mutex::new(None),
            lag: Mutex::default(),
            behind_max: config.deadline,
            proven: watch::Sender::new(false),
            condemned: watch::Sender::new(None),
            clock,
            mind: Mutex::new(Mind::follows(Model::new(places), Micros(0))),
            misplaced: Mutex::default(),
            finding: Mutex::new(None),
            check_at: AtomicU64::new(0),
            heard: Mutex::new(BTreeMap::new()),
            assessing: tokio::sync::Mutex::new(()),
            telling_all: tokio::sync::Mutex::new(()),
            late: Mutex::new(VecDeque::new()),
            incoming: Mutex::new(None),
            notices: Notices::default(),
            counters: Counters::default(),
        });
        let node = Self { inner };
        let proof = Proof::new(config.id, node.electorate(KnownTo::Log).await?, config.peers);
        if proof.is_enough() {
            node.take_part_in_raft();
        }
        tokio::spawn(prove(Arc::downgrade(&node.inner), proof, config.raft));
        tokio::spawn(think(Arc::downgrade(&node.inner)));
        tokio::spawn(watch_files(Arc::downgrade(&node.inner)));
        Ok(node)
    }

    /// The voters as this node knows them. Raft's figures say nothing so early.
    async fn electorate(&self, known_to: KnownTo) -> Result<Electorate, StartError> {
        let of = move |state: &openraft::RaftState<TypeConfig>| match known_to {
            KnownTo::Log => Electorate::of(state.membership_state.effective()),
            KnownTo::Quorum => Electorate::of(state.membership_state.committed()),
        };
        let known = self.inner.raft.with_raft_state(of).await;
        known.map_err(|error| StartError::Raft(error.to_string()))
    }

    /// From now on it votes, follows, and stands for election.
    fn take_part_in_raft(&self) {
        self.inner.raft.runtime_config().elect(true);
        self.inner.proven.send_replace(true);
    }

    /// Learns what others know of promises. A node that has less than it promised takes no part any more.
    fn learn(&self, claims: &Claims) {
        let ledger = &self.inner.ledger;
        ledger.witness.learn_all(claims);
        let claim = ledger.witness.of(self.inner.id);
        // What is on disk is looked up afterwards: it only grows, so it has all that anybody may know.
        if let Some(missing) = claim.missing_in(&ledger.store.promised()) {
            self.condemn(format!(
                "the others know that {missing}: its directory is older than it was, or another one. Remove node \
                 {id} from the group (`limosa raft remove {id}`), take its directory away, and add a node with a \
                 number that was never used before (`limosa raft add`)",
                id = self.inner.id
            ));
        }
    }

    /// Another node says that this one was removed from the group.
    fn learn_removed(&self, by: NodeId) {
        self.condemn(format!(
            "node {by} says that this one was removed from the group: take its directory and its certificate away; to \
             come back it needs a number that was never used before (`limosa raft add`)"
        ));
    }

    fn condemn(&self, reason: String) {
        let first = self.inner.condemned.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert_with(|| reason.clone());
            first
        });
        if !first {
            return;
        }
        tracing::error!(id = self.inner.id, reason, "this node takes no part any more");
        self.inner.raft.runtime_config().elect(false);
        let node = self.clone();
        tokio::spawn(async move { node.shutdown().await });
    }

    /// Why this node takes part in nothing any more, as soon as that is so: its disk failed, or it has less than it
    /// promised. Also after [`Node::shutdown`].
    pub async fn stopped(&self) -> String {
        let mut condemned = self.inner.condemned.subscribe();
        let mut metrics = self.inner.raft.metrics();
        loop {
            if let Some(reason) = self.why_stopped() {
                return reason;
            }
            tokio::select! {
                _ = condemned.changed() => {}
                // When the sender is gone Raft has ended without a word.
                changed = metrics.changed() => if changed.is_err() {
                    return self.why_stopped().unwrap_or_else(|| "raft has ended".into());
                },
            }
        }
    }

    fn why_stopped(&self) -> Option<String> {
        let condemned = self.inner.condemned.borrow().clone();
        condemned.or_else(|| {
            let metrics = self.inner.raft.metrics();
            let state = metrics.borrow_watched().running_state.clone();
            state.err().map(|fatal| fatal.to_string())
        })
    }

    /// Stops Raft. The log thread ends when the last handle is gone.
    pub async fn shutdown(&self) {
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
    }

    // Reads

    /// The state as this node knows it; may be old.
    #[must_use]
    pub fn cluster(&self) -> Arc<Cluster> {
        self.inner.shared.cluster()
    }

    /// The state, at least as new as when this was called (ReadIndex).
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`] when no leader answers, [`ProposeError::Timeout`].
    pub async fn linearizable(&self) -> Result<Arc<Cluster>, ProposeError> {
        let index = self.insist(|| self.read_index_of_leader()).await?;
        let wait = self.inner.raft.wait(Some(self.inner.deadline));
        wait.applied_index_at_least(Some(index), "read").await.map_err(|_| self.timeout())?;
        Ok(self.cluster())
    }

    /// Waits until this node has all that was committed when it was asked, by a quorum's word; not long, for others may be asked instead.
    async fn confirm(&self) -> Result<(), ProposeError> {
        let confirmed = async {
            let index = self.read_index_of_leader().await?;
            let wait = self.inner.raft.wait(Some(CONFIRM_WAIT));
            wait.applied_index_at_least(Some(index), "watch").await.map(drop).map_err(|_| self.timeout())
        };
        tokio::time::timeout(CONFIRM_WAIT, confirmed).await.unwrap_or_else(|_| Err(self.timeout()))
    }

    /// Tries again while there is no leader, as there is none for a moment after one has died.
    async fn insist<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, ProposeError>
    where
        F: Future<Output = Result<T, ProposeError>>,
    {
        let start = self.inner.clock.now();
        loop {
            match attempt().await {
                Err(ProposeError::NotLeader { .. })
                    if millis(self.inner.deadline) > self.inner.clock.now().since(start).0 / 1000 =>
                {
                    tokio::time::sleep(INSIST_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    async fn read_index_of_leader(&self) -> Result<u64, ProposeError> {
        match self.read_index().await {
            Err(ProposeError::NotLeader { leader: Some(leader) }) if leader != self.inner.id => {
                let PeerResponse::ReadIndex(index) = self.ask_leader(leader, &PeerRequest::ReadIndex).await?
                else {
                    return Err(ProposeError::NotLeader { leader: None });
                };
                index
            }
            result => result,
        }
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        let read = self.inner.raft.ensure_linearizable(ReadPolicy::ReadIndex);
        match tokio::time::timeout(self.inner.deadline, read).await {
            Ok(Ok(id)) => Ok(id.index()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
                Err(ProposeError::NotLeader { leader: to.leader_id })
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => {
                Err(self.timeout())
            }
            Ok(Err(RaftError::Fatal(fatal))) => Err(ProposeError::Stopped(fatal.to_string())),
        }
    }

    /// Changes after `since`, as soon as there are some; none after `wait`. 0 asks for all there is, which comes in
    /// pages: see [`Node::rest`].
    pub async fn page_since(&self, since: u64, wait: Duration) -> Page {
        let none = || Page { changes: nothing_new(since), next: None };
        self.news(since, wait, move |shared| shared.page_since(since)).await.unwrap_or_else(none)
    }

    /// The groups behind the last one of a page of everything. When all are there, the changes since the revision of
    /// the first page make of them the present state: a group that has changed meanwhile comes twice.
    pub async fn rest(&self, revision: u64, after: GroupId) -> Page {
        let shared = self.inner.shared.clone();
        let page = tokio::task::spawn_blocking(move || shared.rest(revision, after)).await;
        page.unwrap_or_else(|_| Page { changes: nothing_new(revision), next: Some(after) })
    }

    async fn news_since(&self, since: u64, wait: Duration, as_table: bool) -> (Changes, Bytes) {
        let news = self.news(since, wait, move |shared| shared.changes_since(since, as_table)).await;
        news.unwrap_or_else(|| (nothing_new(since), Bytes::new()))
    }

    /// Waits for a later revision, and has news of it made away from the threads that carry messages; who starts from
    /// nothing one after another.
    async fn news<T: Send + 'static>(
        &self,
        since: u64,
        wait: Duration,
        make: impl FnOnce(&Shared) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let mut revision = self.inner.shared.subscribe();
        let later = revision.wait_for(|&revision| revision > since);
        tokio::time::timeout(wait.min(WATCH_WAIT_MAX), later).await.ok()?.ok()?;
        let _turn = if since == 0 { Some(self.inner.telling_all.lock().await) } else { None };
        let shared = self.inner.shared.clone();
        tokio::task::spawn_blocking(move || make(&shared)).await.ok()?
    }

    /// The candidates of a group with the terms of their delay. Only the leader knows; `Ok(None)` for an unknown
    /// group.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`].
    pub async fn explain(&self, group: GroupId) -> Result<Option<Explanation>, ProposeError> {
        let (cluster, node) = (self.cluster(), self.clone());
        let work = move || match lock(&node.inner.mind).leader() {
            Some(brain) => Ok(brain.explain(&cluster, &group, node.inner.clock.now())),
            None => Err(ProposeError::NotLeader { leader: node.leader() }),
        };
        let explained = tokio::task::spawn_blocking(work).await;
        explained.unwrap_or_else(|error| Err(ProposeError::Stopped(error.to_string())))
    }

    /// How far the present placement is from the best. Only the leader knows; `None` without sites. One at a time; other
    /// work goes on meanwhile.
    ///
    /// # Errors
    /// [`AssessError`].
    pub async fn assess(&self) -> Result<Option<Assessment>, AssessError> {
        self.ask(|cluster, model, now| Ok(assess::assess(cluster, model, now)?)).await
    }

    /// What would be if something were different. On the leader.
    ///
    /// # Errors
    /// [`AssessError`].
    pub async fn what_if(&self, difference: Difference) -> Result<Option<WhatIf>, AssessError> {
        self.ask(move |cluster, model, now| Ok(whatif::what_if(cluster, model, &difference, now)?)).await
    }

    /// Puts a question to the state and the leader's knowledge of it.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Cluster, &Model, Micros) -> Result<T, AssessError> + Send + 'static,
    ) -> Result<T, AssessError> {
        // Each takes memory and a core: many askers wait, they do not multiply.
        let _turn = self.inner.assessing.lock().await;
        let cluster = self.cluster();
        let node = self.clone();
        let work = move || {
            // Reports must not wait for a solver: it gets a copy.
            let model = lock(&node.inner.mind).leader().map(|brain| brain.model().clone());
            let model = model.ok_or_else(|| ProposeError::NotLeader { leader: node.leader() })?;
            question(&cluster, &model, node.inner.clock.now())
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(ProposeError::Stopped(error.to_string()).into()))
    }

    /// Who leads, if known.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.inner.raft.metrics().borrow_watched().current_leader
    }

    /// How the node is.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let metrics = self.inner.raft.metrics().borrow_watched().clone();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<NodeId> = membership.voter_ids().collect();
        let member = |(id, node): (&NodeId, &BasicNode)| Member {
            id: *id,
            address: node.addr.clone(),
            voter: voters.contains(id),
            matched: matched(&metrics, *id),
        };
        let stopped = self.why_stopped();
        let age = self.quorum_age();
        let quorum = stopped.is_none() && self.has_quorum();
        let applied = metrics.last_applied.map(|id| id.index);
        let behind = lock(&self.inner.lag).age(applied, self.inner.clock.now());
        RaftStatus {
            id: self.inner.id,
            role: if stopped.is_some() { Role::Stopped } else { role(metrics.state, quorum) },
            leader: metrics.current_leader.filter(|_| quorum),
            term: metrics.current_term,
            last_log: metrics.last_log_index,
            applied,
            snapshot: metrics.snapshot.map(|id| id.index),
            quorum_ack_ms: age.map(millis),
            quorum,
            quorum_age_max_ms: millis(self.inner.quorum_age_max),
            behind_ms: behind.map_or(0, |age| age.0 / 1_000),
            behind_max_ms: millis(self.inner.behind_max),
            write_ms: self.inner.ledger.store.writing().map_or(0, |age| age.0 / 1_000),
            write_max_ms: millis(self.inner.behind_max),
            twice: self.inner.twins.twice(self.inner.clock.now()),
            silent: if quorum { self.silent() } else { Vec::new() },
            proven: *self.inner.proven.borrow(),
            revision: self.cluster().revision,
            members: membership.nodes().map(member).collect(),
            stopped,
        }
    }

    /// Time since a quorum answered the leader. A follower counts what the leader said of it, and the time since.
    #[must_use]
    pub fn quorum_age(&self) -> Option<Duration> {
        if let Some(age) = self.inner.ledger.quorum_ack() {
            return Some(age);
        }
        let led = lock(&self.inner.led);
        let led = led.as_ref().filter(|led| self.leader() == Some(led.by))?;
        let since = self.inner.clock.now().since(led.at);
        Some(Duration::from_micros(since.0).saturating_add(Duration::from_millis(led.quorum_ack_ms)))
    }

    /// Members that do not answer the leader. A follower knows what the leader said of it.
    fn silent(&self) -> Vec<NodeId> {
        let said = || {
            let led = lock(&self.inner.led);
            led.as_ref().filter(|led| self.leader() == Some(led.by)).map(|led| led.silent.clone())
        };
        self.inner.ledger.silent().or_else(said).unwrap_or_default()
    }

    /// Whether a quorum answered the leader lately, as far as this node knows. Without one what it has may be old.
    #[must_use]
    pub fn has_quorum(&self) -> bool {
        self.quorum_age().is_some_and(|age| age <= self.inner.quorum_age_max)
    }

    /// How many of the estimates of ways that nobody had measured held when they were, by [`BASES`]: those that this node made, as the leader or
    /// to check the leader's rounds.
    #[must_use]
    pub fn tested(&self) -> [Tested; BASES.len()] {
        lock(&self.inner.mind).model().tested()
    }

    /// Sites that are not where their configuration says, by what this node heard of the ways between them.
    #[must_use]
    pub fn misplaced(&self, cluster: &Cluster) -> Vec<Misplaced> {
        let now = self.inner.clock.now();
        lock(&self.inner.mind).model().misplaced(&cluster.sites, now)
    }

    /// A line for each site that was not misplaced before.
    fn tell_misplaced(&self, cluster: &Cluster, found: &[Misplaced]) {
        let mut told = lock(&self.inner.misplaced);
        for one in found.iter().filter(|one| !told.contains(&one.site)) {
            tracing::warn!("{}", one.describe(&cluster.sites));
        }
        *told = found.iter().map(|one| one.site).collect();
    }

    /// Counts since the start of the process.
    #[must_use]
    pub fn metrics(&self) -> NodeMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.inner.counters;
        NodeMetrics {
            proposals: get(&counters.proposals),
            rejected: get(&counters.rejected),
            timeouts: get(&counters.timeouts),
            reports: get(&counters.reports),
            watches: get(&counters.watches),
            watch_resets: get(&counters.watch_resets),
            leader_commands: get(&counters.leader_commands),
            unreadable: get(&counters.unreadable),
            polls: get(&counters.polls),
            poll_us: get(&counters.poll_us),
            moves_planned: get(&counters.moves_planned),
            rounds_checked: get(&counters.rounds_checked),
            rounds_doubted: get(&counters.rounds_doubted),
        }
    }

    // Writes

    /// Proposes a command in somebody's name, by way of the leader wherever it is. While there is none it is
    /// tried again, up to the deadline.
    ///
    /// # Errors
    /// [`ProposeError`]. After [`ProposeError::NotLeader`] and [`ProposeError::Timeout`] it may be repeated.
    pub async fn propose(&self, actor: &str, command: Command) -> Result<Outcome, ProposeError> {
        let proposal = Proposal { actor: actor.to_owned(), at_ms: wall_ms(), command };
        self.insist(|| self.propose_to_leader(proposal.clone())).await
    }

    async fn propose_to_leader(&self, proposal: Proposal) -> Result<Outcome, ProposeError> {
        match self.propose_here(proposal.clone()).await {
            Err(ProposeError::NotLeader { leader: Some(leader) }) if leader != self.inner.id => {
                let request = PeerRequest::Propose(proposal);
                let PeerResponse::Propose(result) = self.ask_leader(leader, &request).await? else {
                    return Err(ProposeError::NotLeader { leader: None });
                };
                result
            }
            result => result,
        }
    }

    async fn ask_leader(&self, leader: NodeId, request: &PeerRequest) -> Result<PeerResponse, ProposeError> {
        let answer = ask(self.inner.transport.as_ref(), leader, wire::encode(request));
        match tokio::time::timeout(self.inner.deadline, answer).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(_)) => Err(ProposeError::NotLeader { leader: None }),
            Err(_) => Err(self.timeout()),
        }
    }

    fn timeout(&self) -> ProposeError {
        ProposeError::Timeout { ms: millis(self.inner.deadline) }
    }

    async fn propose_here(&self, proposal: Proposal) -> Result<Outcome, ProposeError> {
        count(&self.inner.counters.proposals);
        let write = self.inner.raft.client_write(proposal);
        match tokio::time::timeout(self.inner.deadline, write).await {
            Ok(Ok(written)) => written.data.0.unwrap_or(Ok(Outcome::Done)).map_err(|rejected| {
                count(&self.inner.counters.rejected);
                rejected.into()
            }),
            Ok(Err(error)) => Err(write_error(error)),
            Err(_) => {
                count(&self.inner.counters.timeouts);
                Err(self.timeout())
            }
        }
    }

    // Membership

    /// Makes a new group of these voters, by number and address. To be called on one node, once. The group
    /// outlives that node once the others list the members in their [`Node::status`].
    ///
    /// # Errors
    /// [`ProposeError::Membership`] when the node has a log already.
    pub async fn initialize(&self, members: BTreeMap<NodeId, String>) -> Result<(), ProposeError> {
        // The directory may be empty because it was lost.
        let mut proven = self.inner.proven.subscribe();
        let wait = proven.wait_for(|proven| *proven);
        if !tokio::time::timeout(self.inner.deadline, wait).await.is_ok_and(|proven| proven.is_ok()) {
            return Err(ProposeError::Membership(format!(
                "node {} has not heard from enough of its peers that it never belonged to a group: start them, \
                 and see that they reach each other",
                self.inner.id
            )));
        }
        let members: BTreeMap<NodeId, BasicNode> =
            members.into_iter().map(|(id, address)| (id, BasicNode::new(address))).collect();
        let known = self.status();
        if known.last_log.is_some() {
            return Err(ProposeError::Membership(format!(
                "node {} belongs to a group already, of nodes {:?}",
                self.inner.id,
                known.members.iter().map(|member| member.id).collect::<Vec<_>>()
            )));
        }
        self.inner
            .raft
            .initialize(members)
            .await
            .map_err(|error| ProposeError::Membership(error.to_string()))?;
        // What is asked next is to know of them.
        let formed = |metrics: &Metrics| metrics.membership_config.membership().nodes().next().is_some();
        let _ = self.inner.raft.wait(Some(self.inner.deadline)).metrics(formed, "a group").await;
        Ok(())
    }

    /// Adds a node without a vote and waits until it has caught up. On the leader.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn add_learner(&self, id: NodeId, address: String) -> Result<(), ProposeError> {
        let members = self.status().members;
        if let Some(member) = members.iter().find(|member| member.id == id && member.address != address) {
            return Err(ProposeError::Membership(format!(
                "node {id} is a member already, at {}: an address stays as it was added; a node that is to be at another is removed, and \
                 added with a number that was never used",
                member.address
            )));
        }
        if let Some(member) = members.iter().find(|member| member.id != id && member.address == address) {
            return Err(ProposeError::Membership(format!(
                "node {} is at {address}: give the address of node {id}, or remove node {} first",
                member.id, member.id
            )));
        }
        if self.inner.shared.is_removed(id) {
            return Err(ProposeError::Membership(format!(
                "node {id} was removed, and a number is never used again: give the new node one that never was, and a \
                 certificate for it"
            )));
        }
        let added = self.inner.raft.add_learner(id, BasicNode::new(address), false);
        match tokio::time::timeout(self.inner.deadline, added).await {
            Ok(result) => result.map_err(write_error)?,
            Err(_) => return Err(self.timeout()),
        };
        self.until_caught_up(id).await
    }

    /// Waits until a member has acknowledged all that is in the log now. openraft's own waiting is content with a lag that a young log
    /// never reaches, also of a node that nobody has heard.
    async fn until_caught_up(&self, id: NodeId) -> Result<(), ProposeError> {
        let goal = self.status().last_log;
        let silent = |bound: Duration, has: &str| {
            ProposeError::Membership(format!(
                "node {id} {has} within {} ms, and gets no vote before: see that it runs and that the file of every node names it in \
                 `peers`, then repeat the command",
                millis(bound)
            ))
        };
        let wait = |bound: Duration| self.inner.raft.wait(Some(bound));
        let bound = self.inner.deadline;
        // What it acknowledged long ago says nothing: it may have died since.
        let before = heard_at(&self.inner.raft.metrics().borrow_watched(), id);
        let heard = |metrics: &Metrics| {
            let at = heard_at(metrics, id);
            at.is_some() && at != before
        };
        wait(bound).metrics(heard, "it answers").await.map_err(|_| silent(bound, "has not answered"))?;
        // It may take a snapshot.
        let bound = bound * 10;
        let has_all = |metrics: &Metrics| matched(metrics, id) >= goal;
        wait(bound)
            .metrics(has_all, "it has the log")
            .await
            .map_err(|_| silent(bound, "has not acknowledged the log"))?;
        Ok(())
    }

    /// Makes these nodes the voters; each must be a member, and new ones have to have the log. Former voters leave. On the leader.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn change_membership(&self, voters: BTreeSet<NodeId>) -> Result<(), ProposeError> {
        let status = self.status();
        if status.leader == Some(status.id) {
            // A vote counts for every majority from then on.
            let is_new = |id: &NodeId| status.members.iter().any(|member| member.id == *id && !member.voter);
            for id in voters.iter().copied().filter(is_new) {
                self.until_caught_up(id).await?;
            }
        }
        let changed = self.inner.raft.change_membership(voters, false);
        match tokio::time::timeout(self.inner.deadline, changed).await {
            Ok(result) => result.map(|_| ()).map_err(write_error),
            Err(_) => Err(self.timeout()),
        }
    }

    /// Removes a node, voter or not. Its number is never used again. On the leader.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn remove(&self, id: NodeId) -> Result<(), ProposeError> {
        let status = self.status();
        if status.members.iter().any(|member| member.id == id && !member.voter) {
            let gone = openraft::ChangeMembers::RemoveNodes(BTreeSet::from([id]));
            return self.inner.raft.change_membership(gone, false).await.map(|_| ()).map_err(write_error);
        }
        let rest = status.members.iter().filter(|member| member.voter && member.id != id);
        self.change_membership(rest.map(|member| member.id).collect()).await
    }

    /// Hands the lead to another voter. On the leader.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`], [`ProposeError::Stopped`].
    pub async fn transfer(&self, to: NodeId) -> Result<(), ProposeError> {
        if self.leader() != Some(self.inner.id) {
            return Err(ProposeError::NotLeader { leader: self.leader() });
        }
        let transfer = self.inner.raft.trigger();
        transfer.transfer_leader(to).await.map_err(|fatal| ProposeError::Stopped(fatal.to_string()))
    }

    /// Hands the lead, if this node has it, to the voter that has most of the log, and waits until that one leads, for
    /// the time of an election at most. Whether nobody has to wait for an election when this node stops.
    pub async fn hand_over(&self) -> bool {
        let status = self.status();
        if status.role != Role::Leader {
            return true;
        }
        let others = status.members.iter().filter(|member| member.voter && member.id != status.id);
        let Some(heir) = others.filter(|member| member.matched.is_some()).max_by_key(|member| member.matched)
        else {
            return false;
        };
        if let Err(error) = self.transfer(heir.id).await {
            tracing::warn!(%error, to = heir.id, "the lead cannot be handed over");
            return false;
        }
        let mut metrics = self.inner.raft.metrics();
        let led = async {
            while self.leader().is_none_or(|leader| leader == self.inner.id) {
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        let done = tokio::time::timeout(self.inner.quorum_age_max, led).await.unwrap_or(false);
        if done {
            tracing::info!(to = heir.id, "the lead is handed over");
        } else {
            tracing::warn!(to = heir.id, "the lead was not taken over in time: the others have to elect");
        }
        done
    }

    /// Takes a snapshot now.
    ///
    /// # Errors
    /// [`ProposeError::Stopped`].
    pub async fn snapshot(&self) -> Result<(), ProposeError> {
        self.inner.raft.trigger().snapshot().await.map_err(|fatal| ProposeError::Stopped(fatal.to_string()))
    }

    // Messages

    /// Answers another placement node. `from` is who its certificate says it is.
    pub async fn handle_peer(&self, from: NodeId, request: Bytes) -> Bytes {
        self.inner.twins.hear(&from, &request, self.inner.clock.now());
        self.inner.transport.said(&self.answer_to_peer(from, request).await)
    }

    async fn answer_to_peer(&self, from: NodeId, request: Bytes) -> Bytes {
        if self.inner.shared.is_removed(from) {
            if let Some(kept_back) = self.inner.notices.due(&format!("node {from}"), self.inner.clock.now()) {
                tracing::warn!(
                    from,
                    kept_back,
                    "a placement node that was removed from the group is refused: stop it, and take its certificate away"
                );
            }
            return wire::encode(&PeerResponse::Removed);
        }
        let response = match wire::decode_with(request, wire::MESSAGE_LEN_MAX) {
            Ok((PeerRequest::Claims(claims), _)) => return self.answer_claims(&claims).await,
            Ok((request, _)) if speaks_for(&request).is_some_and(|id| id != from) => {
                count(&self.inner.counters.unreadable);
                tracing::warn!(from, "a placement node speaks for another");
                PeerResponse::Failed(format!("node {from} may speak only for itself"))
            }
            Ok((request, attached)) => self.answer_peer(request, attached).await,
            Err(error) => {
                count(&self.inner.counters.unreadable);
                tracing::warn!(from, %error, "unreadable message of a placement node");
                PeerResponse::Failed(error.to_string())
            }
        };
        wire::encode(&response)
    }

    async fn answer_peer(&self, request: PeerRequest, attached: Bytes) -> PeerResponse {
        let raft = &self.inner.raft;
        if self.inner.condemned.borrow().is_some() {
            return PeerResponse::Failed(format!("node {} takes no part any more", self.inner.id));
        }
        if is_rafts(&request) && !*self.inner.proven.borrow() {
            return PeerResponse::Failed(format!(
                "node {} asks first what it promised, and takes part when enough have answered",
                self.inner.id
            ));
        }
        match request {
            PeerRequest::Append(rpc) => {
                self.note(rpc.vote.leader_id.node_id, attached);
                raft.append_entries(rpc).await.map_or_else(|e| failed(&e), PeerResponse::Append)
            }
            PeerRequest::Vote(rpc) => raft.vote(rpc).await.map_or_else(|e| failed(&e), PeerResponse::Vote),
            PeerRequest::PreVote(rpc) => {
                raft.pre_vote(rpc).await.map_or_else(|e| failed(&e), PeerResponse::Vote)
            }
            PeerRequest::Snapshot(chunk) => self.take_chunk(chunk, &attached).await,
            PeerRequest::TransferLeader(rpc) => raft
                .handle_transfer_leader(rpc)
                .await
                .map_or_else(|e| failed(&e), PeerResponse::TransferLeader),
            PeerRequest::Propose(proposal) => PeerResponse::Propose(self.propose_here(proposal).await),
            PeerRequest::Report { by, report } => PeerResponse::Report(self.take_report(&by, report)),
            PeerRequest::ReadIndex => PeerResponse::ReadIndex(self.read_index().await),
            // Answered before, also by a node that takes part in nothing.
            PeerRequest::Claims(_) => PeerResponse::Failed("asked for promises in the wrong place".into()),
        }
    }

    /// What is known of promises, and beside it whose count.
    async fn answer_claims(&self, claims: &Claims) -> Bytes {
        self.learn(claims);
        let ledger = &self.inner.ledger;
        let answer = PeerResponse::Claims(ledger.witness.told(&ledger.store.promised()));
        let electorate = self.electorate(KnownTo::Quorum).await.unwrap_or_default();
        wire::encode_with(&answer, wire::encode(&electorate))
    }

    /// Takes what a leader wrote beside its entries; those of earlier releases write nothing.
    fn note(&self, from: NodeId, attached: Bytes) {
        if attached.is_empty() {
            return;
        }
        match wire::decode::<Note>(attached, wire::MESSAGE_LEN_MAX) {
            Ok(note) => {
                self.learn(&note.claims);
                let now = self.inner.clock.now();
                if let Some(quorum_ack_ms) = note.quorum_ack_ms {
                    let silent = note.silent;
                    *lock(&self.inner.led) = Some(Led { at: now, by: from, quorum_ack_ms, silent });
                }
                if let Some(committed) = note.committed {
                    let applied = self.inner.raft.metrics().borrow_watched().last_applied.map(|id| id.index);
                    lock(&self.inner.lag).hear(committed, applied, now);
                }
            }
            Err(error) => {
                count(&self.inner.counters.unreadable);
                tracing::debug!(from, %error, "unreadable note of a leader");
            }
        }
    }

    async fn take_chunk(&self, chunk: SnapshotChunk, data: &Bytes) -> PeerResponse {
        let key = chunk.meta.last_log_id.map(|id| id.index);
        let whole = {
            let mut incoming = lock(&self.inner.incoming);
            if chunk.offset == 0 {
                *incoming = Some((key, BytesMut::new()));
            }
            let Some((_, so_far)) =
                incoming.as_mut().filter(|(of, so_far)| *of == key && so_far.len() == chunk.offset)
            else {
                return PeerResponse::Failed("snapshot part out of order: start again".into());
            };
            if chunk.total > wire::SNAPSHOT_LEN_MAX || so_far.len() + data.len() > chunk.total {
                *incoming = None;
                return PeerResponse::Failed(format!("snapshot above {} bytes", wire::SNAPSHOT_LEN_MAX));
            }
            so_far.extend_from_slice(data);
            if so_far.len() < chunk.total {
                return PeerResponse::Snapshot(None);
            }
            incoming.take().map(|(_, whole)| whole.freeze()).unwrap_or_default()
        };
        // Raft counts on a snapshot that can be read: look before it is installed.
        let copy = whole.clone();
        let readable = tokio::task::spawn_blocking(move || wire::decode_cluster(copy).map(drop)).await;
        match readable {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return PeerResponse::Failed(error.to_string()),
            Err(error) => return PeerResponse::Failed(error.to_string()),
        }
        let snapshot = Snapshot { meta: chunk.meta, snapshot: whole };
        let installed = self.inner.raft.install_full_snapshot(chunk.vote, snapshot).await;
        installed.map_or_else(|e| failed(&e), |answer| PeerResponse::Snapshot(Some(answer)))
    }

    /// Answers an agent or tool. `caller` is who its certificate says it is: a site may say only what is its own.
    pub async fn handle_client(&self, caller: &Caller, request: Bytes) -> Bytes {
        if let Caller::Site(name) = caller {
            self.inner.twin_sites.hear(name, &request, self.inner.clock.now());
        }
        let response = match wire::decode(request, wire::MESSAGE_LEN_MAX) {
            Ok(ClientRequest::Watch { since, wait_ms, table }) => {
                return self.answer_watch(caller, since, Duration::from_millis(wait_ms), table).await;
            }
            Ok(ClientRequest::Propose(command)) => self.answer_proposal(caller, command, false).await,
            Ok(ClientRequest::PassProposal(command)) => self.answer_proposal(caller, command, true).await,
            Ok(ClientRequest::Report(report)) => answer_report(self.take_report(caller, report)),
            Ok(ClientRequest::PassReport(report)) => answer_report(self.pass_report(caller, report).await),
            Err(error) => {
                count(&self.inner.counters.unreadable);
                tracing::warn!(%caller, %error, "unreadable message of a client");
                ClientResponse::Unreadable(error.to_string())
            }
        };
        wire::encode(&response)
    }

    async fn answer_proposal(&self, caller: &Caller, command: Command, pass: bool) -> ClientResponse {
        if let Err(error) = self.check(caller, command.site()) {
            // A node that is behind may not know of a site yet: the refusal is the leader's to say.
            let behind = !self.inner.raft.is_leader() && self.admit(caller).is_err();
            let error = if behind { ProposeError::NotLeader { leader: self.leader() } } else { error };
            return ClientResponse::Done(Err(error));
        }
        let proposal = Proposal { actor: caller.to_string(), at_ms: wall_ms(), command };
        let answer = if pass && self.led_by_another().is_some() {
            self.propose_to_leader(proposal).await
        } else {
            self.propose_here(proposal).await
        };
        ClientResponse::Done(answer)
    }

    /// The other node that leads, by a quorum's word: one that may lead no more is not worth a wait.
    fn led_by_another(&self) -> Option<NodeId> {
        self.leader().filter(|&leader| self.has_quorum() && leader != self.inner.id)
    }

    fn take_report(&self, caller: &Caller, report: Box<SiteReport>) -> Result<Vec<Probe>, ProposeError> {
        self.check(caller, Some(report.site))?;
        self.report(caller, report)
    }

    /// Takes a report, and has the leader take it too if that is another.
    async fn pass_report(
        &self,
        caller: &Caller,
        report: Box<SiteReport>,
    ) -> Result<Vec<Probe>, ProposeError> {
        let taken = self.take_report(caller, report.clone());
        let Some(leader) = self.led_by_another().filter(|_| taken.is_err()) else { return taken };
        let request = PeerRequest::Report { by: caller.clone(), report };
        let PeerResponse::Report(answer) = self.ask_leader(leader, &request).await? else {
            return Err(ProposeError::NotLeader { leader: None });
        };
        answer
    }

    async fn answer_watch(&self, caller: &Caller, since: u64, wait: Duration, as_table: bool) -> Bytes {
        if let Err(error) = self.admit(caller) {
            return wire::encode(&ClientResponse::Done(Err(error)));
        }
        count(&self.inner.counters.watches);
        // Who has nothing yet would act on what it gets: two owners come of an agent that starts on the word of a node that was away.
        if since == 0
            && let Err(error) = self.confirm().await
        {
            return wire::encode(&ClientResponse::Done(Err(error)));
        }
        let (changes, groups) = self.news_since(since, wait, as_table).await;
        // What it waited for may have been the end of its site.
        if let Err(error) = self.admit(caller) {
            return wire::encode(&ClientResponse::Done(Err(error)));
        }
        if changes.reset {
            count(&self.inner.counters.watch_resets);
        }
        let response = ClientResponse::Changes(changes);
        if groups.is_empty() { wire::encode(&response) } else { wire::encode_with_groups(&response, groups) }
    }

    /// Whether the caller is an operator, or a site that there is; then its number. A certificate outlives its site.
    fn admit(&self, caller: &Caller) -> Result<Option<SiteId>, ProposeError> {
        let Caller::Site(name) = caller else { return Ok(None) };
        if let Some(id) = self.inner.shared.site_named(name) {
            return Ok(Some(id));
        }
        // One that belongs to no group yet, or has not heard of a quorum lately, cannot know that there is no such site.
        if !self.has_quorum() {
            return Err(ProposeError::NotLeader { leader: None });
        }
        if let Some(kept_back) = self.inner.notices.due(&caller.to_string(), self.inner.clock.now()) {
            tracing::warn!(
                site = name,
                kept_back,
                "an agent is refused: no site has the name of its certificate; it was removed, or is not added yet"
            );
        }
        let right =
            "no site has this name: it was removed, or is not added yet (`limosa site add`)".to_owned();
        Err(ProposeError::Forbidden { who: caller.to_string(), right })
    }

    /// Whether the caller may speak for a site (`None`: for the operator).
    fn check(&self, caller: &Caller, site: Option<SiteId>) -> Result<(), ProposeError> {
        let Some(own) = self.admit(caller)? else { return Ok(()) };
        let right = match site {
            Some(site) if site == own => return Ok(()),
            None => "only operators may".to_owned(),
            Some(site) => format!("it is for site {site}, the caller is site {own}"),
        };
        Err(ProposeError::Forbidden { who: caller.to_string(), right })
    }

    /// Whether its sender's site is still the one with this number.
    fn holds(&self, said: &Said) -> bool {
        match &said.by {
            Caller::Site(name) => self.inner.shared.is_site(said.report.site, name),
            Caller::Operator(_) => true,
        }
    }

    /// Takes a report, and never waits for a round of the solver: while one goes on, the report waits for its end.
    fn report(&self, caller: &Caller, report: Box<SiteReport>) -> Result<Vec<Probe>, ProposeError> {
        count(&self.inner.counters.reports);
        let now = self.inner.clock.now();
        let said = Said { at: now, by: caller.clone(), report: report.into() };
        let report = said.report.clone();
        lock(&self.inner.heard).insert(report.site, said.clone());
        let Ok(mut mind) = self.inner.mind.try_lock() else {
            self.keep_for_later(said);
            return if self.inner.raft.is_leader() {
                Ok(Vec::new())
            } else {
                Err(ProposeError::NotLeader { leader: self.leader() })
            };
        };
        self.take_part(&mut mind, now);
        self.take_late(&mut mind);
        self.hear(&mut mind, &said);
        match mind.leader_mut() {
            Some(brain) => Ok(brain.probes(&report, now)),
            // It knows now what it needs to lead well from the start, but the lease is the leader's to give.
            None => Err(ProposeError::NotLeader { leader: self.leader() }),
        }
    }

    /// The oldest goes when there are too many: sites report again.
    fn keep_for_later(&self, said: Said) {
        let mut late = lock(&self.inner.late);
        if late.len() == LATE_REPORTS_MAX {
            late.pop_front();
        }
        late.push_back(said);
    }

    /// With the mind held, so that nothing is heard of a site behind the look at which sites there are.
    fn hear(&self, mind: &mut Mind, said: &Said) {
        // To forget a site takes a walk over all groups, for which entries must not wait.
        if !self.inner.shared.look(|cluster| mind.model().knows_sites(cluster)) {
            mind.note_sites(&self.cluster());
        }
        if self.holds(said) {
            mind.hear(&said.report, said.at);
        }
    }

    /// Hears what came in while the mind was busy.
    fn take_late(&self, mind: &mut Mind) {
        let late = std::mem::take(&mut *lock(&self.inner.late));
        late.iter().for_each(|said| self.hear(mind, said));
    }

    /// What sites reported last, those that have fallen silent left out.
    #[must_use]
    pub fn reports(&self) -> Vec<Arc<SiteReport>> {
        let now = self.inner.clock.now();
        let heard = lock(&self.inner.heard);
        let fresh = heard.values().filter(|said| now.since(said.at) < DEMAND_AGE_MAX && self.holds(said));
        fresh.map(|said| said.report.clone()).collect()
    }

    /// What each site said of itself last to this node, and how long ago, by this node's clock.
    #[must_use]
    pub fn heard(&self) -> BTreeMap<SiteId, Heard> {
        let now = self.inner.clock.now();
        let twice = self.sites_twice();
        let heard = lock(&self.inner.heard);
        let told = |said: &Said| {
            let is_twice = matches!(&said.by, Caller::Site(name) if twice.contains(name));
            let own = said.report.problems.iter().take(PROBLEMS_MAX).map(|text| short(text));
            Heard {
                age: Duration::from_micros(now.since(said.at).0),
                problems: is_twice.then(|| SITE_TWICE.to_owned()).into_iter().chain(own).collect(),
            }
        };
        let of_present = heard.iter().filter(|(_, said)| self.holds(said));
        of_present.map(|(site, said)| (*site, told(said))).collect()
    }

    /// Sites, by name, in whose name two processes spoke to this node within the last minute.
    #[must_use]
    pub fn sites_twice(&self) -> Vec<String> {
        self.inner.twin_sites.twice(self.inner.clock.now())
    }

    /// Looks every few seconds whether there is another file of places.
    fn refresh_places(&self, now: Micros) {
        let Some(geo) = &self.inner.geo else { return };
        let seen = Micros(self.inner.geo_seen.load(Ordering::Relaxed));
        if now.since(seen) < GEO_LOOK {
            return;
        }
        self.inner.geo_seen.store(now.0, Ordering::Relaxed);
        match geo.refresh() {
            Ok(true) => tracing::info!("the file of places was replaced and is in use"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the former file of places stays in use"),
        }
    }

    /// Leads or follows, as Raft has it now.
    fn take_part(&self, mind: &mut Mind, now: Micros) {
        let leads = self.inner.raft.is_leader();
        let nothing = || Mind::follows(Model::new(None), now);
        if leads == matches!(mind, Mind::Leads(_)) {
            return;
        }
        *mind = match std::mem::replace(mind, nothing()) {
            Mind::Follows { model, .. } => {
                *lock(&self.inner.finding) = None;
                Mind::Leads(Box::new(Brain::knowing(self.inner.timings, *model, now)))
            }
            Mind::Leads(brain) => Mind::follows(brain.into_model(), now),
        };
    }

    /// Looks whether the round that the leader published is true.
    fn witness(&self, cluster: &Cluster, model: &Model, now: Micros) {
        match witness::check(cluster, model, now) {
            Ok(Some(finding)) => {
                let counters = &self.inner.counters;
                count(&counters.rounds_checked);
                if !finding.agrees() {
                    count(&counters.rounds_doubted);
                    tracing::warn!(?finding, "the leader's round is not what this node finds");
                }
                *lock(&self.inner.finding) = Some(finding);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the leader's round cannot be checked"),
        }
    }

    /// What this node found of the last round that another node published; nothing on the leader.
    #[must_use]
    pub fn finding(&self) -> Option<Finding> {
        *lock(&self.inner.finding)
    }

    /// What the leader wants now; nothing on other nodes, which look at what it published.
    fn wishes(&self) -> Vec<Command> {
        let now = self.inner.clock.now();
        self.refresh_places(now);
        let mut mind = lock(&self.inner.mind);
        self.take_part(&mut mind, now);
        self.take_late(&mut mind);
        let cluster = self.cluster();
        let brain = match &mut *mind {
            Mind::Leads(brain) => brain,
            Mind::Follows { model, tidied, heard } => {
                model.note_sites(&cluster);
                if now.since(*tidied) >= TIDY {
                    model.forget(&cluster, now);
                    *tidied = now;
                }
                let knows = heard.is_some_and(|since| now.since(since) >= self.inner.timings.lease)
                    && now.0 >= self.inner.check_at.load(Ordering::Relaxed);
                let due = cluster.round.as_ref().filter(|_| knows).is_some_and(|round| {
                    lock(&self.inner.finding).is_none_or(|finding| finding.at_ms != round.at_ms)
                });
                let model = due.then(|| model.clone());
                drop(mind);
                if let Some(model) = model {
                    self.witness(&cluster, &model, now);
                    let end = self.inner.clock.now();
                    let rest = end.since(now).0.saturating_mul(ROUND_SHARE - 1);
                    self.inner.check_at.store(end.0.saturating_add(rest), Ordering::Relaxed);
                }
                return Vec::new();
            }
        };
        brain.handle_wall_clock(wall_ms());
        let mut wishes = brain.poll(&cluster, now);
        wishes.extend(Brain::due(&cluster, wall_ms()));
        let end = self.inner.clock.now();
        let took = end.since(now);
        brain.spent(took, end);
        let counters = &self.inner.counters;
        count(&counters.polls);
        counters.poll_us.fetch_add(took.0, Ordering::Relaxed);
        for wish in &mut wishes {
            if let Command::Publish(round) = wish {
                (round.solve_us, round.at_ms) = (took.0, wall_ms());
                self.tell_misplaced(&cluster, &brain.model().misplaced(&cluster.sites, now));
                counters.moves_planned.fetch_add(round.started, Ordering::Relaxed);
            }
        }
        wishes
    }
}

/// Looks for its files once a second: a node whose files are gone would promise what its next start does not know.
async fn watch_files(inner: std::sync::Weak<Inner>) {
    loop {
        tokio::time::sleep(FILES_LOOK).await;
        let Some(store) = inner.upgrade().map(|inner| inner.ledger.store.clone()) else { return };
        let looked = tokio::task::spawn_blocking(move || store.check_files()).await;
        let (Ok(Err(error)), Some(inner)) = (looked, inner.upgrade()) else { continue };
        let node = Node { inner };
        if node.why_stopped().is_none() {
            node.condemn(error.to_string());
        }
        return;
    }
}

/// The node's own work, until it is dropped.
async fn think(inner: std::sync::Weak<Inner>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut word = HealthWord::default();
    loop {
        tick.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        let node = Node { inner };
        if node.why_stopped().is_some() {
            return;
        }
        if let Some(&by) = node.inner.ledger.removed_by.get() {
            node.learn_removed(by);
            return;
        }
        word.look(&node.status(), node.inner.clock.now());
        let brain = node.clone();
        // A round of the solver may take longer than a message should wait.
        let Ok(wishes) = tokio::task::spawn_blocking(move || brain.wishes()).await else { return };
        let proposals = wishes.into_iter().map(|command| {
            count(&node.inner.counters.leader_commands);
            let proposal = Proposal { actor: "leader".into(), at_ms: wall_ms(), command };
            node.propose_here(proposal)
        });
        for result in futures::future::join_all(proposals).await {
            if let Err(error) = result {
                tracing::info!(%error, "a wish of the leader was not granted; the next round decides anew");
            }
        }
    }
}

/// Says once that there is no quorum or that the node is behind, and once that it is well again.
#[derive(Default)]
struct HealthWord {
    missed: bool,
    behind: bool,
    stuck: bool,
    /// Members that do not answer this node, if it leads.
    silent: Vec<NodeId>,
    /// When there was one last, or when this began to look.
    seen: Option<Micros>,
}

impl HealthWord {
    fn look(&mut self, status: &RaftStatus, now: Micros) {
        if status.is_behind() != self.behind {
            self.behind = status.is_behind();
            let (leader, applied) = (status.leader, status.applied);
            if self.behind {
                tracing::warn!(
                    leader,
                    applied,
                    "behind: what the leader has committed does not come to this node"
                );
            } else {
                tracing::info!(leader, applied, "this node has again what is committed");
            }
        }
        self.look_at_members(status);
        if status.is_stuck() != self.stuck {
            self.stuck = status.is_stuck();
            if self.stuck {
                tracing::error!(write_ms = status.write_ms, "the disk has not ended a write");
            } else {
                tracing::info!("the disk writes again");
            }
        }
        // Who belongs to no group yet lacks nothing.
        if status.quorum || status.members.is_empty() {
            self.seen = Some(now);
        }
        if status.quorum && self.missed {
            self.missed = false;
            tracing::info!(leader = status.leader, term = status.term, "there is a quorum again");
        }
        let since = now.since(*self.seen.get_or_insert(now));
        // A node that has just started is given the time of an election.
        if !self.missed && !status.quorum && since >= Micros::from_millis(status.quorum_age_max_ms) {
            self.missed = true;
            tracing::warn!(
                last_ms = status.quorum_ack_ms,
                term = status.term,
                "no quorum: nothing is decided until a majority of the members reach each other"
            );
        }
    }

    /// The leader speaks for all.
    fn look_at_members(&mut self, status: &RaftStatus) {
        let silent: &[NodeId] = if status.role == Role::Leader { &status.silent } else { &[] };
        for node in silent.iter().filter(|id| !self.silent.contains(id)) {
            tracing::warn!(node, "a placement node does not answer: the group has one less to lose");
        }
        if status.role == Role::Leader {
            for node in self.silent.iter().filter(|id| !silent.contains(id)) {
                tracing::info!(node, "the placement node answers again, or was removed");
            }
        }
        self.silent = silent.to_vec();
    }
}

fn answer_report(taken: Result<Vec<Probe>, ProposeError>) -> ClientResponse {
    match taken {
        Ok(probes) if !probes.is_empty() => ClientResponse::Probes(probes),
        result => ClientResponse::Done(result.map(|_| Outcome::Done)),
    }
}

/// The node in whose name a message is; `None` for those in nobody's.
fn speaks_for(request: &PeerRequest) -> Option<NodeId> {
    match request {
        PeerRequest::Append(rpc) => Some(rpc.vote.leader_id.node_id),
        PeerRequest::Vote(rpc) | PeerRequest::PreVote(rpc) => Some(rpc.vote.leader_id.node_id),
        PeerRequest::Snapshot(chunk) => Some(chunk.vote.leader_id.node_id),
        PeerRequest::TransferLeader(rpc) => Some(rpc.from_leader().leader_id.node_id),
        PeerRequest::Propose(_)
        | PeerRequest::Report { .. }
        | PeerRequest::ReadIndex
        | PeerRequest::Claims(_) => None,
    }
}

/// Whether answering it is a part in Raft.
fn is_rafts(request: &PeerRequest) -> bool {
    speaks_for(request).is_some()
}

/// Asks the others what this node promised, until all have answered. It takes part as soon as enough have, if it has all
/// that they know of.
async fn prove(inner: std::sync::Weak<Inner>, mut proof: Proof, timings: RaftTimings) {
    loop {
        let unheard = proof.unheard();
        if unheard.is_empty() {
            return;
        }
        let Some(inner) = inner.upgrade() else { return };
        let node = Node { inner };
        let ledger = &node.inner.ledger;
        let request = wire::encode(&PeerRequest::Claims(ledger.witness.told(&ledger.store.promised())));
        let ask_one = async |id: NodeId| {
            let answer = ask_with(node.inner.transport.as_ref(), id, request.clone());
            let (answer, beside) = tokio::time::timeout(timings.election_min, answer).await.ok()?.ok()?;
            match answer {
                PeerResponse::Claims(claims) => node.learn(&claims),
                PeerResponse::Removed => node.learn_removed(id),
                PeerResponse::Append(_)
                | PeerResponse::Vote(_)
                | PeerResponse::Snapshot(_)
                | PeerResponse::TransferLeader(_)
                | PeerResponse::Propose(_)
                | PeerResponse::Report(_)
                | PeerResponse::ReadIndex(_)
                | PeerResponse::Failed(_) => {
                    tracing::info!(id, "an earlier release knows nothing of promises, so it cannot say any");
                }
            }
            // Nothing is beside what earlier releases say.
            Some((id, wire::decode(beside, wire::MESSAGE_LEN_MAX).unwrap_or_default()))
        };
        let answers = futures::future::join_all(unheard.into_iter().map(ask_one)).await;
        for (id, knows) in answers.into_iter().flatten() {
            proof.hear(id, knows);
        }
        if node.why_stopped().is_some() {
            return;
        }
        let enough = proof.is_enough();
        if enough && !*node.inner.proven.borrow() {
            node.take_part_in_raft();
        }
        // The rest may be gone for long; what they know is still of use when they come back.
        let pause = if enough { timings.election_max } else { timings.heartbeat };
        drop(node);
        tokio::time::sleep(pause).await;
    }
}

fn nothing_new(since: u64) -> Changes {
    Changes { revision: since, reset: false, changes: Vec::new(), more: false }
}

fn raft_config(config: &NodeConfig) -> Result<openraft::Config, StartError> {
    let raft = openraft::Config {
        cluster_name: "limosa".into(),
        heartbeat_interval: millis(config.raft.heartbeat),
        election_timeout_min: millis(config.raft.election_min),
        election_timeout_max: millis(config.raft.election_max),
        // One part of a snapshot, or a whole log read, over a slow link.
        install_snapshot_timeout: 10_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every),
        max_in_snapshot_log_to_keep: config.snapshot_every / 10,
        // A node that was cut off must not depose a leader that works.
        enable_pre_vote: Some(true),
        // Not before it is known that it has all that it promised.
        enable_elect: false,
        // Who led before it stopped may have been succeeded meanwhile: it leads again when it is elected.
        enable_leader_restore: Some(false),
        ..openraft::Config::default()
    };
    raft.validate().map_err(|error| StartError::Timings(error.to_string()))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn role(state: ServerState, quorum: bool) -> Role {
    match state {
        ServerState::Leader if !quorum => Role::Isolated,
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    }
}

fn failed(error: &dyn std::error::Error) -> PeerResponse {
    PeerResponse::Failed(error.to_string())
}

fn write_error(
    error: RaftError<crate::raft::TypeConfig, ClientWriteError<crate::raft::TypeConfig>>,
) -> ProposeError {
    match error {
        RaftError::APIError(
            ClientWriteError::ForwardToLeader(to) | ClientWriteError::LogEntryDiscarded(to),
        ) => ProposeError::NotLeader { leader: to.leader_id },
        RaftError::APIError(
            error @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)),
        ) => ProposeError::Membership(error.to_string()),
        RaftError::Fatal(fatal) => ProposeError::Stopped(fatal.to_string()),
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
