use std::sync::atomic::AtomicBool;

use super::*;
use crate::store::tests::Disk;
use tempfile::TempDir;

/// Nobody else is there.
struct Alone;

#[async_trait]
impl Transport for Alone {
    async fn call(&self, to: NodeId, _: Bytes) -> Result<Bytes, TransportError> {
        Err(TransportError::Unreachable { to, reason: "there is nobody".into() })
    }
}

async fn leader(dir: &TempDir, full: &Arc<AtomicBool>) -> Node {
    let mut config = NodeConfig::new(1, dir.path().to_owned());
    config.raft.heartbeat = Duration::from_millis(30);
    config.raft.election_min = Duration::from_millis(100);
    config.raft.election_max = Duration::from_millis(200);
    let store = Store::open_on(dir.path(), 1, |file| Disk::new(file, full.clone())).unwrap();
    let node = Node::start_on(config, Arc::new(Alone), store).await.unwrap();
    node.initialize([(1, "node-1".to_owned())].into()).await.unwrap();
    for _ in 0..1000 {
        if node.status().role == Role::Leader {
            return node;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not lead: {:?}", node.status());
}

/// A round of the solver holds the mind for seconds when there are many groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_does_not_wait_for_a_busy_mind_and_is_heard_afterwards() {
    let dir = TempDir::new().unwrap();
    let node = leader(&dir, &Arc::default()).await;
    let (held, wait_held) = std::sync::mpsc::channel();
    let (release, wait_release) = std::sync::mpsc::channel::<()>();
    let holder = node.clone();
    let thread = std::thread::spawn(move || {
        let _mind = lock(&holder.inner.mind);
        held.send(()).unwrap();
        wait_release.recv().unwrap();
    });
    wait_held.recv().unwrap();
    let report = SiteReport { site: SiteId(7), ..SiteReport::default() };
    let operator = Caller::Operator("alice".into());
    assert_eq!(node.report(&operator, Box::new(report.clone())), Ok(Vec::new()));
    assert_eq!(node.reports().len(), 1);
    assert_eq!(lock(&node.inner.late).len(), 1);
    for _ in 0..LATE_REPORTS_MAX + 5 {
        node.report(&operator, Box::new(report.clone())).unwrap();
    }
    assert_eq!(lock(&node.inner.late).len(), LATE_REPORTS_MAX, "they are bounded");
    release.send(()).unwrap();
    thread.join().unwrap();
    for _ in 0..1000 {
        if lock(&node.inner.late).is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nobody takes the reports that wait");
}

fn site(id: u8) -> Command {
    Command::PutSite(crate::core::SiteSpec {
        id: SiteId(id),
        name: format!("site-{id}"),
        latitude: None,
        longitude: None,
        endpoint: "[::1]:9".into(),
        capacity_pps: 1_000,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_heard_of_a_site_before_the_leader_has_looked_again_is_not_forgotten() {
    let dir = TempDir::new().unwrap();
    let node = leader(&dir, &Arc::default()).await;
    node.propose("alice", site(1)).await.unwrap();
    node.wishes();
    let seen = crate::core::GroupReport {
        group: "1:100.64.0.0/24".parse().unwrap(),
        packets_per_s: 100,
        flows: 1,
        bits_per_s: 0,
        inside_ingress: vec![(SiteId(2), 1)],
        outside_ingress: Vec::new(),
        remote_rtt_us: None,
    };
    let group = seen.group;
    let report = SiteReport { site: SiteId(1), groups: vec![seen], ..SiteReport::default() };
    node.propose("alice", site(2)).await.unwrap();
    node.report(&Caller::Site("site-1".into()), Box::new(report)).unwrap();
    node.wishes();
    let mind = lock(&node.inner.mind);
    let demand = mind.leader().and_then(|brain| brain.model().demand(&group)).unwrap();
    assert!(demand.inside.contains_key(&SiteId(2)), "{demand:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_is_full_stops_for_good_and_says_why() {
    let dir = TempDir::new().unwrap();
    let full = Arc::default();
    let node = leader(&dir, &full).await;
    assert_eq!(node.status().stopped, None);
    full.store(true, Ordering::Relaxed);
    let command = Command::SetAlive { site: SiteId(1), alive: true };
    assert!(node.propose("alice", command).await.is_err());
    full.store(false, Ordering::Relaxed);
    let reason = tokio::time::timeout(Duration::from_secs(60), node.stopped()).await.unwrap();
    assert!(!reason.is_empty());
    let status = node.status();
    assert_eq!((status.role, status.leader, status.quorum), (Role::Stopped, None, false));
    assert!(status.stopped.is_some());
}

/// What a node with the number would send to depose this one, whoever leads.
fn takes_the_lead(from: NodeId) -> Bytes {
    use openraft::impls::Vote;
    let vote = Vote::new_committed(99, from);
    let rpc = openraft::raft::AppendEntriesRequest {
        vote,
        prev_log_id: None,
        entries: vec![],
        leader_commit: None,
    };
    wire::encode(&PeerRequest::Append(rpc))
}

async fn says_removed(node: &Node, from: NodeId, request: Bytes) -> bool {
    let answer = node.handle_peer(from, request).await;
    matches!(wire::decode(answer, wire::MESSAGE_LEN_MAX), Ok(PeerResponse::Removed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_removed_is_not_listened_to_and_one_that_never_belonged_is() {
    let dir = TempDir::new().unwrap();
    let node = leader(&dir, &Arc::default()).await;
    let claims = || wire::encode(&PeerRequest::Claims(Claims::new()));
    assert!(!says_removed(&node, 2, claims()).await, "it may be on its way in");
    // The first membership may be on its way into the log still.
    node.propose("alice", Command::SetAlive { site: SiteId(9), alive: true }).await.unwrap_err();
    node.inner.raft.add_learner(2, BasicNode::new("node-2"), false).await.unwrap();
    assert!(!says_removed(&node, 2, claims()).await, "it is a member");
    node.remove(2).await.unwrap();

    let term = node.status().term;
    let read = || wire::encode(&PeerRequest::ReadIndex);
    let command = Command::SetAlive { site: SiteId(1), alive: true };
    let proposal = Proposal { actor: "alice".into(), at_ms: 0, command };
    let before = node.cluster().audit.len();
    for request in [takes_the_lead(2), claims(), read(), wire::encode(&PeerRequest::Propose(proposal))] {
        assert!(says_removed(&node, 2, request).await);
    }
    assert_eq!((node.status().term, node.status().role), (term, Role::Leader));
    assert_eq!(node.cluster().audit.len(), before, "nothing came into the log");
    let again = node.add_learner(2, "node-2".into()).await.unwrap_err().to_string();
    assert!(again.contains("node 2 was removed, and a number is never used again"), "{again}");

    // It is on disk, in the log and in a snapshot.
    node.snapshot().await.unwrap();
    for _ in 0..1000 {
        if node.status().snapshot.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(node.cluster().removed_nodes.contains(&2));
    // This node knows nothing of 3, so it may be a member that joined while this one was away.
    assert!(!says_removed(&node, 3, takes_the_lead(3)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_files_are_gone_stops_and_says_so_also_when_nothing_is_written() {
    let dir = TempDir::new().unwrap();
    let mut config = NodeConfig::new(1, dir.path().join("node"));
    config.raft.heartbeat = Duration::from_millis(30);
    let node = Node::start(config, Arc::new(Alone)).await.unwrap();
    std::fs::rename(dir.path().join("node"), dir.path().join("elsewhere")).unwrap();
    let reason = tokio::time::timeout(Duration::from_secs(60), node.stopped()).await.unwrap();
    assert!(reason.contains("node/raft.redb: it is gone"), "{reason}");
    assert!(reason.contains("If its directory was moved, put it back"), "{reason}");
    assert_eq!(node.status().role, Role::Stopped);
}
