//! Placement nodes in one process, over a transport in memory that loses what it is told to lose.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test and bench uses its part; for them it is a helper"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use flow::SiteId;
use placement::core::{Command, SiteSpec};
use placement::node::{
    Caller, Node, NodeConfig, NodeId, RaftStatus, RaftTimings, Role, Transport, TransportError,
};
use tempfile::TempDir;

/// The wires between all nodes and clients.
#[derive(Default)]
pub struct Wires {
    nodes: Mutex<BTreeMap<NodeId, Node>>,
    /// Nodes that nobody reaches and that reach nobody.
    pub cut: Mutex<BTreeSet<NodeId>>,
    /// Each so manieth message is lost, half of them with their effect, half without; 0 for none.
    pub lose_every: AtomicU64,
    sent: AtomicU64,
    /// Nodes whose answers to messages of so many bytes or more come so much later.
    pub late: Mutex<BTreeMap<NodeId, (usize, Duration)>>,
    /// Nodes that messages of so many bytes or more do not reach.
    pub lost: Mutex<BTreeMap<NodeId, usize>>,
}

#[derive(PartialEq)]
enum Fate {
    Passed,
    Lost,
    AnswerLost,
}

impl Wires {
    fn fate(&self) -> Fate {
        let every = self.lose_every.load(Ordering::Relaxed);
        let nth = self.sent.fetch_add(1, Ordering::Relaxed);
        match nth.checked_rem(every) {
            Some(0) if (nth / every).is_multiple_of(2) => Fate::Lost,
            Some(0) => Fate::AnswerLost,
            _ => Fate::Passed,
        }
    }

    fn reach(&self, from: Option<NodeId>, to: NodeId) -> Result<Node, TransportError> {
        let cut = self.cut.lock().unwrap();
        let lost = cut.contains(&to) || from.is_some_and(|from| cut.contains(&from));
        let node = self.nodes.lock().unwrap().get(&to).cloned().filter(|_| !lost);
        node.ok_or(TransportError::Unreachable { to, reason: "cut".into() })
    }
}

/// From one node to the others.
struct PeerWire {
    from: NodeId,
    wires: Arc<Wires>,
}

#[async_trait]
impl Transport for PeerWire {
    async fn call(&self, to: NodeId, request: Bytes) -> Result<Bytes, TransportError> {
        let node = self.wires.reach(Some(self.from), to)?;
        let fate = self.wires.fate();
        if fate == Fate::Lost {
            return Err(TransportError::Timeout { to });
        }
        if self.wires.lost.lock().unwrap().get(&to).is_some_and(|len| request.len() >= *len) {
            return Err(TransportError::Timeout { to });
        }
        let late = self.wires.late.lock().unwrap().get(&to).copied().filter(|(len, _)| request.len() >= *len);
        let answer = node.handle_peer(self.from, request).await;
        if let Some((_, late)) = late {
            tokio::time::sleep(late).await;
        }
        if fate == Fate::AnswerLost { Err(TransportError::Timeout { to }) } else { Ok(answer) }
    }
}

/// From an agent to the nodes.
pub struct ClientWire {
    pub caller: Caller,
    pub wires: Arc<Wires>,
}

#[async_trait]
impl Transport for ClientWire {
    async fn call(&self, to: NodeId, request: Bytes) -> Result<Bytes, TransportError> {
        let node = self.wires.reach(None, to)?;
        let fate = self.wires.fate();
        if fate == Fate::Lost {
            return Err(TransportError::Timeout { to });
        }
        let answer = node.handle_client(&self.caller, request).await;
        if fate == Fate::AnswerLost { Err(TransportError::Timeout { to }) } else { Ok(answer) }
    }
}

/// A group of nodes, each with its directory.
pub struct Group {
    pub wires: Arc<Wires>,
    dirs: TempDir,
    pub snapshot_every: u64,
    /// Whom a node with an empty directory asks.
    pub peers: BTreeSet<NodeId>,
}

impl Group {
    pub fn new() -> Self {
        Self {
            wires: Arc::default(),
            dirs: TempDir::new().unwrap(),
            snapshot_every: 10_000,
            peers: BTreeSet::new(),
        }
    }

    /// Three nodes that have elected a leader.
    pub async fn of_three() -> Self {
        let group = Self::new();
        for id in 1..=3 {
            group.start(id).await;
        }
        group.node(1).initialize((1..=3).map(|id| (id, format!("node-{id}"))).collect()).await.unwrap();
        group.leader().await;
        // Until then only the first node knows of the group, and without it nobody can be elected.
        let formed = || group.statuses().iter().all(|status| status.members.len() == 3);
        eventually("a group that all its nodes know", formed).await;
        // Members can change once the first ones are committed, and so is what is read then.
        while group.node(group.leader().await).linearizable().await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        group
    }

    pub fn dir(&self, id: NodeId) -> PathBuf {
        self.dirs.path().join(id.to_string())
    }

    pub async fn start(&self, id: NodeId) {
        let config = NodeConfig {
            raft: RaftTimings {
                heartbeat: Duration::from_millis(50),
                election_min: Duration::from_millis(300),
                election_max: Duration::from_millis(600),
            },
            snapshot_every: self.snapshot_every,
            peers: self.peers.clone(),
            deadline: Duration::from_secs(2),
            ..NodeConfig::new(id, self.dir(id))
        };
        let wire = Arc::new(PeerWire { from: id, wires: self.wires.clone() });
        for _ in 0..200 {
            // A node that was stopped may hold its file for a moment more.
            if let Ok(node) = Node::start(config.clone(), wire.clone()).await {
                self.wires.nodes.lock().unwrap().insert(id, node);
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("node {id} does not start");
    }

    pub async fn stop(&self, id: NodeId) {
        let node = self.wires.nodes.lock().unwrap().remove(&id).unwrap();
        node.shutdown().await;
    }

    /// Copies what is in a stopped node's directory, and what is given in its place later.
    pub fn copy_of(&self, id: NodeId) -> TempDir {
        let copy = TempDir::new().unwrap();
        copy_files(&self.dir(id), copy.path());
        copy
    }

    /// Puts a copy in the place of a stopped node's directory.
    pub fn put_back(&self, id: NodeId, copy: &TempDir) {
        std::fs::remove_dir_all(self.dir(id)).unwrap();
        std::fs::create_dir(self.dir(id)).unwrap();
        copy_files(copy.path(), &self.dir(id));
    }

    /// Waits until a stopped node has let go of its directory.
    pub async fn let_go(&self, id: NodeId) {
        let path = self.dir(id);
        for _ in 0..1500 {
            if placement::store::Store::open(&path, id).is_ok() {
                // The store that was opened just now lets go in its own time.
                tokio::time::sleep(Duration::from_millis(200)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("node {id} does not let go of its directory");
    }

    pub fn node(&self, id: NodeId) -> Node {
        self.wires.nodes.lock().unwrap()[&id].clone()
    }

    pub fn client(&self, caller: Caller) -> placement::client::Client {
        self.client_of(caller, vec![1, 2, 3])
    }

    /// A client that knows of these nodes only.
    pub fn client_of(&self, caller: Caller, members: Vec<NodeId>) -> placement::client::Client {
        let wire = ClientWire { caller, wires: self.wires.clone() };
        placement::client::Client::new(Arc::new(wire), members)
    }

    /// Waits until a node that is not cut off leads.
    pub async fn leader(&self) -> NodeId {
        for _ in 0..1500 {
            let cut = self.wires.cut.lock().unwrap().clone();
            let leads = |status: &RaftStatus| status.role == Role::Leader && !cut.contains(&status.id);
            if let Some(leader) = self.statuses().into_iter().find(leads) {
                return leader.id;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no leader came about: {:#?}", self.statuses());
    }

    fn statuses(&self) -> Vec<RaftStatus> {
        self.wires.nodes.lock().unwrap().values().map(Node::status).collect()
    }
}

fn copy_files(from: &std::path::Path, to: &std::path::Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Waits up to 15 s for something to become true.
pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come about");
}

pub fn put_site(id: u8) -> Command {
    Command::PutSite(SiteSpec {
        id: SiteId(id),
        name: format!("site-{id}"),
        latitude: None,
        longitude: None,
        endpoint: format!("[::1]:{id}"),
        capacity_pps: 1_000_000,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
    })
}
