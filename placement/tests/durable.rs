//! Directories that are older than they were, or gone, and groups without a quorum: what a node says and does not do.
#![allow(clippy::unwrap_used, reason = "also in the helpers of tests")]

mod common;

use common::{Group, eventually, put_site};
use placement::node::{NodeId, Role};

/// Three nodes with some sites, and which one leads.
async fn group_with_sites(count: u8) -> (Group, NodeId) {
    let mut group = Group::of_three().await;
    group.peers = (1..=3).collect();
    let leader = group.leader().await;
    for id in 1..=count {
        group.node(leader).propose("alice", put_site(id)).await.unwrap();
    }
    let all = || (1..=3).all(|id| group.node(id).cluster().sites.len() == usize::from(count));
    eventually("all nodes have all sites", all).await;
    (group, leader)
}

fn stopped(group: &Group, id: NodeId) -> Option<String> {
    group.node(id).status().stopped
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_put_back_from_an_older_copy_stops_its_node_and_the_others_go_on() {
    let (group, leader) = group_with_sites(3).await;
    let other = leader % 3 + 1;
    group.stop(other).await;
    group.let_go(other).await;
    let old = group.copy_of(other);
    group.start(other).await;
    for id in 4..=9 {
        group.node(leader).propose("alice", put_site(id)).await.unwrap();
    }
    eventually("it has the later sites", || group.node(other).cluster().sites.len() == 9).await;
    group.stop(other).await;
    group.let_go(other).await;
    group.put_back(other, &old);
    group.start(other).await;
    eventually("the node stops", || stopped(&group, other).is_some()).await;
    let reason = group.node(other).stopped().await;
    assert!(reason.contains("acknowledged its log") && reason.contains("limosa raft remove"), "{reason}");
    assert_eq!(group.node(other).status().role, Role::Stopped);
    let leader = group.leader().await;
    group.node(leader).propose("alice", put_site(10)).await.unwrap();
    assert_eq!(group.node(other).cluster().sites.len(), 3, "it took nothing more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_directory_is_gone_does_not_come_back_under_its_number() {
    let (group, leader) = group_with_sites(2).await;
    let other = leader % 3 + 1;
    group.stop(other).await;
    group.let_go(other).await;
    std::fs::remove_dir_all(group.dir(other)).unwrap();
    group.start(other).await;
    eventually("the node stops", || stopped(&group, other).is_some()).await;
    let members = (1..=3).map(|id| (id, format!("node-{id}"))).collect();
    assert!(group.node(other).initialize(members).await.is_err());
    // Under a number that nobody knows it is welcome.
    let leader = group.node(group.leader().await);
    leader.remove(other).await.unwrap();
    group.start(4).await;
    leader.add_learner(4, "node-4".into()).await.unwrap();
    eventually("the new node has all", || group.node(4).cluster().sites.len() == 2).await;
}

/// Each alone could be a node that was slow. The one that was not put back remembers what all acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_older_directories_are_no_quorum_after_a_restart_of_all() {
    let (group, leader) = group_with_sites(2).await;
    let olders = [leader, leader % 3 + 1];
    let kept = (leader + 1) % 3 + 1;
    let mut copies = Vec::new();
    for id in olders {
        group.stop(id).await;
        group.let_go(id).await;
        copies.push(group.copy_of(id));
        group.start(id).await;
    }
    let leader = group.node(group.leader().await);
    for id in 3..=8 {
        leader.propose("alice", put_site(id)).await.unwrap();
    }
    let all = || (1..=3).all(|id| group.node(id).cluster().sites.len() == 8);
    eventually("all nodes have all sites", all).await;
    drop(leader);
    // The leader tells what it knows with its next signs of life.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    for id in 1..=3 {
        group.stop(id).await;
    }
    for id in 1..=3 {
        group.let_go(id).await;
    }
    for (id, copy) in olders.into_iter().zip(&copies) {
        group.put_back(id, copy);
    }
    group.start(kept).await;
    for id in olders {
        group.start(id).await;
    }
    eventually("both stop", || olders.iter().all(|&id| stopped(&group, id).is_some())).await;
    assert_eq!(group.node(kept).cluster().sites.len(), 8);
    assert_eq!(stopped(&group, kept), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_starts_takes_no_part_before_enough_others_have_answered() {
    let (group, _) = group_with_sites(1).await;
    let term = group.node(1).status().term;
    for id in 1..=3 {
        group.stop(id).await;
    }
    group.start(1).await;
    // Longer than the longest silence after which a node stands for election.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let status = group.node(1).status();
    assert!(!status.proven && status.term == term && status.role == Role::Follower, "{status:?}");
    group.start(2).await;
    group.leader().await;
    eventually("both take part", || (1..=2).all(|id| group.node(id).status().proven)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_quorum_is_said_by_a_leader_that_is_cut_off_and_by_one_that_starts_so() {
    let (group, leader) = group_with_sites(1).await;
    let status = group.node(leader).status();
    assert!(status.quorum && status.leader == Some(leader), "{status:?}");
    group.wires.cut.lock().unwrap().insert(leader);
    eventually("it says so", || !group.node(leader).status().quorum).await;
    let status = group.node(leader).status();
    assert_eq!(status.leader, None);
    // Whole milliseconds: what is a fraction above the bound reads as the bound.
    assert!(status.quorum_ack_ms >= Some(status.quorum_age_max_ms), "{status:?}");
    group.leader().await;
    group.stop(leader).await;
    group.start(leader).await;
    let said = || group.node(leader).status();
    assert!(!said().quorum && said().leader.is_none(), "{:?}", said());
    group.wires.cut.lock().unwrap().clear();
    eventually("there is a quorum again", || said().quorum && said().leader.is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_quorum_is_said_by_the_last_of_three() {
    let (group, leader) = group_with_sites(1).await;
    let last = leader % 3 + 1;
    eventually("a follower knows of the quorum", || group.node(last).status().quorum).await;
    for id in (1..=3).filter(|&id| id != last) {
        group.stop(id).await;
    }
    eventually("it says so", || !group.node(last).status().quorum).await;
    assert_eq!(group.node(last).status().leader, None);
}
