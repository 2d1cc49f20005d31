//! Three nodes: elections, lost leaders, restarts, snapshots, membership.
#![allow(clippy::unwrap_used, reason = "also in the helpers of tests")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Group, eventually, put_site};
use flow::nat::NatSpec;
use flow::{GroupId, ServiceId, SiteId};
use placement::client::ClientError;
use placement::core::{
    Change, Command, GroupReport, GroupTalk, MoveOutcome, MoveReason, MoveSummary, Ordering, Outcome,
    PeerRtt, Probe, ServerRtt, Service, SiteReport, SiteSpec, Timeouts,
};
use placement::node::{Caller, ClientRequest, ClientResponse, ProposeError, Role};
use placement::wire;

/// Bytes: a heartbeat is shorter, and any entry makes an append longer.
const LONGER_THAN_A_HEARTBEAT: usize = 800;

fn operator() -> Caller {
    Caller::Operator("alice".into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_goes_on_when_the_leader_dies_and_the_dead_node_comes_back_from_disk() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    client.propose(put_site(1)).await.unwrap();
    let first = group.leader().await;
    group.stop(first).await;
    client.propose(put_site(2)).await.unwrap();
    let second = group.leader().await;
    assert_ne!(first, second);
    client.propose(put_site(3)).await.unwrap();

    group.start(first).await;
    eventually("the dead node has all sites", || group.node(first).cluster().sites.len() == 3).await;
    let state = group.node(second).linearizable().await.unwrap();
    assert_eq!(*group.node(first).linearizable().await.unwrap(), *state);
    let actors: BTreeSet<_> = state.audit.iter().map(|entry| entry.actor.clone()).collect();
    assert!(actors.contains("alice"), "{actors:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_stop_and_nothing_is_forgotten() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    for id in 1..=20 {
        group.node(leader).propose("alice", put_site(id)).await.unwrap();
    }
    for id in 1..=3 {
        group.stop(id).await;
    }
    for id in 1..=3 {
        group.start(id).await;
    }
    let leader = group.leader().await;
    assert_eq!(group.node(leader).linearizable().await.unwrap().sites.len(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_commits_nothing_and_steps_back() {
    let group = Group::of_three().await;
    let old = group.leader().await;
    group.wires.cut.lock().unwrap().insert(old);
    let lost = group.node(old).propose("alice", put_site(9)).await;
    assert!(matches!(lost, Err(ProposeError::Timeout { .. } | ProposeError::NotLeader { .. })), "{lost:?}");
    assert!(group.node(old).linearizable().await.is_err());
    let new = group.leader().await;
    group.node(new).propose("alice", put_site(1)).await.unwrap();
    group.wires.cut.lock().unwrap().clear();
    eventually("the old leader follows", || group.node(old).cluster().sites.contains_key(&SiteId(1))).await;
    assert!(!group.node(old).cluster().sites.contains_key(&SiteId(9)));
}

/// A round trip and the write to its disk may together be longer than a heartbeat, while signs of life are answered in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_takes_entries_later_than_a_heartbeat_counts_all_the_same() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    let away = (1..=3).find(|id| *id != leader).unwrap();
    group.wires.cut.lock().unwrap().insert(away);
    for id in 1..=3 {
        let late = (LONGER_THAN_A_HEARTBEAT, Duration::from_millis(120));
        group.wires.late.lock().unwrap().insert(id, late);
    }
    for id in 1..=5 {
        group.node(leader).propose("alice", put_site(id)).await.unwrap();
    }
    assert_eq!(group.leader().await, leader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hears_its_leader_and_lacks_what_is_committed_says_that_it_is_behind() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    let behind = (1..=3).find(|id| *id != leader).unwrap();
    let is_behind = |id: u64| group.node(id).status().is_behind();
    group.wires.lost.lock().unwrap().insert(behind, LONGER_THAN_A_HEARTBEAT);
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    assert!(!is_behind(behind), "not at once");
    eventually("a node that is behind", || is_behind(behind)).await;
    let status = group.node(behind).status();
    assert!(status.quorum && status.leader == Some(leader), "{status:?}");
    assert!((1..=3).filter(|id| *id != behind).all(|id| !is_behind(id)));
    group.wires.lost.lock().unwrap().clear();
    eventually("a node that has caught up", || !is_behind(behind)).await;
    assert!(group.node(behind).cluster().sites.contains_key(&SiteId(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_does_not_answer_is_named_by_all_others_and_by_the_next_leader_too() {
    let group = Group::of_three().await;
    let first = group.leader().await;
    let [silent, other] = [1, 2].map(|step| (first + step - 1) % 3 + 1);
    let silent_at = |id: u64| group.node(id).status().silent;
    assert!([first, silent, other].into_iter().all(|id| silent_at(id).is_empty()), "all answer");
    group.stop(silent).await;
    eventually("both name it", || [first, other].into_iter().all(|id| silent_at(id) == [silent])).await;
    assert!(group.node(other).status().quorum);
    // A leader that it never answered.
    group.node(first).transfer(other).await.unwrap();
    eventually("the other leads", || group.node(first).leader() == Some(other)).await;
    eventually("both name it", || [first, other].into_iter().all(|id| silent_at(id) == [silent])).await;
    group.start(silent).await;
    eventually("it answers again", || [first, silent, other].into_iter().all(|id| silent_at(id).is_empty()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_node_gets_a_snapshot_then_a_vote_and_an_old_one_leaves() {
    let mut group = Group::new();
    group.snapshot_every = 20;
    for id in 1..=3 {
        group.start(id).await;
    }
    group.node(1).initialize((1..=3).map(|id| (id, format!("node-{id}"))).collect()).await.unwrap();
    let leader = group.node(group.leader().await);
    for id in 0..100 {
        leader.propose("alice", put_site(id)).await.unwrap();
    }
    eventually("a snapshot", || leader.status().snapshot.is_some_and(|at| at > 50)).await;
    group.start(4).await;
    leader.add_learner(4, "node-4".into()).await.unwrap();
    eventually("the new node has all", || group.node(4).cluster().sites.len() == 100).await;
    assert!(group.node(4).status().snapshot.is_some());

    let leaves = (1..=3).find(|&id| id != leader.status().id).unwrap();
    let voters: BTreeSet<u64> = (1..=4).filter(|&id| id != leaves).collect();
    leader.change_membership(voters.clone()).await.unwrap();
    let members: BTreeSet<u64> = leader.status().members.iter().map(|member| member.id).collect();
    assert_eq!(members, voters);
    leader.transfer(4).await.unwrap();
    eventually("the new node leads", || group.node(4).leader() == Some(4)).await;
    group.node(4).propose("alice", put_site(200)).await.unwrap();
    group.node(4).remove(leader.status().id).await.unwrap();
    assert_eq!(group.node(4).status().members.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_answer_gets_no_vote_and_gets_it_when_it_does() {
    let group = Group::new();
    group.start(1).await;
    group.node(1).initialize([(1, "node-1".into())].into()).await.unwrap();
    let leader = group.node(group.leader().await);
    let refused = |result: Result<(), ProposeError>| {
        assert!(
            matches!(&result, Err(ProposeError::Membership(why)) if why.contains("node 2 has not answered")),
            "{result:?}"
        );
    };
    // The first members have to be committed before others can be spoken of.
    leader.propose("alice", put_site(1)).await.unwrap();
    refused(leader.add_learner(2, "node-2".into()).await);
    refused(leader.change_membership([1, 2].into()).await);

    group.start(2).await;
    leader.add_learner(2, "node-2".into()).await.unwrap();
    // What it acknowledged before it died does not count.
    group.stop(2).await;
    refused(leader.change_membership([1, 2].into()).await);
    group.start(2).await;
    // The leader leaves a node that did not answer alone for a while: the command is repeated, as its error says.
    let mut last = Ok(());
    for _ in 0..20 {
        last = leader.change_membership([1, 2].into()).await;
        if last.is_ok() {
            break;
        }
    }
    last.unwrap();
    leader.propose("alice", put_site(2)).await.unwrap();
    assert!(leader.status().members.iter().all(|member| member.voter));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_bring_everything_once_then_differences() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    client.propose(put_site(1)).await.unwrap();
    let all = client.watch(0, Duration::from_secs(5)).await;
    assert!(all.reset && all.changes.iter().any(|change| matches!(change, Change::Site(_))));
    let none = client.watch(all.revision, Duration::from_millis(50)).await;
    assert_eq!((none.revision, none.reset, none.changes.len()), (all.revision, false, 0));
    let watch = client.watch(all.revision, Duration::from_secs(5));
    let (next, _) = tokio::join!(watch, client.propose(put_site(2)));
    assert!(!next.reset);
    assert!(matches!(next.changes.as_slice(), [Change::Site(site)] if site.id == SiteId(2)), "{next:?}");
    // The groups of a service come as a table to who starts from nothing.
    client.propose(Command::PutService { service: service(), owner: Some(SiteId(1)) }).await.unwrap();
    let leader = group.node(group.leader().await);
    let all = group.client(operator()).watch(0, Duration::from_secs(5)).await;
    assert_eq!(all.revision, leader.cluster().revision);
    assert_eq!(all.changes, leader.cluster().snapshot_changes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_take_effect_once_although_messages_and_answers_are_lost() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    group.wires.lose_every.store(4, std::sync::atomic::Ordering::Relaxed);
    for id in 1..=30 {
        client.propose(put_site(id)).await.unwrap();
    }
    group.wires.lose_every.store(0, std::sync::atomic::Ordering::Relaxed);
    let state = group.node(group.leader().await).linearizable().await.unwrap();
    assert_eq!(state.sites.len(), 30);
    // Repeated commands change nothing, and leave no trace in the audit log.
    assert_eq!(state.audit.iter().filter(|entry| entry.action.starts_with("put site")).count(), 30);
}

fn group_id() -> GroupId {
    "1:100.64.0.0/24".parse().unwrap()
}

fn service() -> Service {
    Service {
        id: ServiceId::new(1).unwrap(),
        name: "nat".into(),
        nat: NatSpec {
            clients: vec!["100.64.0.0/24".parse().unwrap()],
            pool: vec!["192.0.2.0/29".parse().unwrap()],
            ports_per_subscriber: 1024,
            first_port: 1024,
            port_key: 0,
        },
        timeouts: Timeouts::default(),
        ordering: Ordering::Strict,
        group_len: 24,
    }
}

/// One site has all traffic of one group, which is where it should be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_check_rounds_and_the_next_leader_knows_the_traffic() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    client.propose(put_site(1)).await.unwrap();
    client.propose(Command::PutService { service: service(), owner: Some(SiteId(1)) }).await.unwrap();
    let agent = group.client(Caller::Site("site-1".into()));
    let load = GroupReport {
        group: group_id(),
        packets_per_s: 1000,
        flows: 10,
        bits_per_s: 0,
        inside_ingress: vec![(SiteId(1), 1)],
        outside_ingress: vec![(SiteId(1), 1)],
        remote_rtt_us: None,
    };
    let report = SiteReport { site: SiteId(1), groups: vec![load], ..SiteReport::default() };
    let old = group.leader().await;
    let checked = |node: &placement::node::Node| {
        node.finding().is_some_and(|finding| finding.packets_per_s.0 == 1000.0 && finding.agrees())
    };
    for _ in 0..100 {
        agent.report(report.clone()).await.unwrap();
        if (1..=3).filter(|&id| id != old).all(|id| checked(&group.node(id))) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for id in (1..=3).filter(|&id| id != old) {
        let node = group.node(id);
        assert!(checked(&node), "{id}: {:?}", node.finding());
        assert_eq!(node.metrics().rounds_doubted, 0);
    }
    assert_eq!(group.node(old).finding(), None);
    group.node(old).transfer(old % 3 + 1).await.unwrap();
    let next = group.node(old % 3 + 1);
    eventually("the other node leads", || next.leader() == Some(old % 3 + 1)).await;
    // Nobody has reported to it as the leader yet.
    let mut knows = false;
    for _ in 0..100 {
        knows = next.explain(group_id()).await.is_ok_and(|explanation| explanation.unwrap().demand.is_some());
        if knows {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(knows, "it knows the traffic");
}

/// Sites say that all clients come in at site 2, so the leader moves the group there; the agents take it
/// through, and only in their own names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_lead_to_a_move_that_only_its_parties_take_through() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    for id in 1..=2 {
        client.propose(put_site(id)).await.unwrap();
    }
    client.propose(Command::PutService { service: service(), owner: Some(SiteId(1)) }).await.unwrap();
    let agent = |id: u8| group.client(Caller::Site(format!("site-{id}")));
    let (source, target) = (agent(1), agent(2));
    let load = GroupReport {
        group: group_id(),
        packets_per_s: 1000,
        flows: 10,
        bits_per_s: 0,
        inside_ingress: vec![(SiteId(2), 900), (SiteId(1), 100)],
        outside_ingress: vec![(SiteId(2), 1)],
        remote_rtt_us: None,
    };
    let peers = vec![PeerRtt { site: SiteId(2), rtt_us: 40_000 }];
    let report = SiteReport { site: SiteId(1), groups: vec![load], peers, ..SiteReport::default() };
    let wrong = source.report(SiteReport { site: SiteId(2), ..SiteReport::default() }).await;
    assert!(matches!(wrong, Err(ClientError::Refused(ProposeError::Forbidden { .. }))), "{wrong:?}");

    let leader = group.node(group.leader().await);
    let mut present = None;
    for _ in 0..100 {
        source.report(report.clone()).await.unwrap();
        target.report(SiteReport { site: SiteId(2), ..SiteReport::default() }).await.unwrap();
        present = leader.cluster().moves.values().next().cloned();
        if present.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let present = present.expect("the leader starts a move");
    assert_eq!((present.from, present.to, present.reason), (SiteId(1), SiteId(2), MoveReason::Delay));
    let explanation = leader.explain(group_id()).await.unwrap().unwrap();
    assert_eq!(explanation.best, Some(SiteId(2)));

    let switch = Command::Switch { move_id: present.id, by: SiteId(1) };
    assert!(matches!(
        target.propose(switch.clone()).await,
        Err(ClientError::Refused(ProposeError::Forbidden { .. }))
    ));
    assert_eq!(source.propose(switch).await, Ok(Outcome::Done));
    let served = Command::Served { move_id: present.id, by: SiteId(2), summary: MoveSummary::default() };
    assert_eq!(target.propose(served).await, Ok(Outcome::Done));
    let cluster = leader.cluster();
    assert_eq!(cluster.groups[&group_id()].owner, SiteId(2));
    assert_eq!(cluster.finished(present.id).unwrap().outcome, MoveOutcome::Done);
    eventually("silent sites lose their lease", || leader.cluster().sites.values().all(|site| !site.alive))
        .await;
}

/// Who does not say that it is willing never gets an answer that it may not know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_that_offer_probes_are_asked_for_them() {
    let group = Group::of_three().await;
    let client = group.client(operator());
    for id in 1..=3 {
        client.propose(put_site(id)).await.unwrap();
    }
    client.propose(Command::PutService { service: service(), owner: Some(SiteId(1)) }).await.unwrap();
    let agent = |id: u8| group.client(Caller::Site(format!("site-{id}")));
    let (owner, other) = (agent(1), agent(3));
    let load = GroupReport {
        group: group_id(),
        packets_per_s: 1000,
        flows: 10,
        bits_per_s: 0,
        inside_ingress: vec![(SiteId(1), 1)],
        outside_ingress: vec![(SiteId(2), 1)],
        remote_rtt_us: None,
    };
    let prefix = "203.0.113.0/24".parse().unwrap();
    let target = "203.0.113.7:443".parse().unwrap();
    let (count, min_us) = (5, 200_000);
    let (ingress, answered) = (Some(SiteId(2)), Some(target));
    let near = |site: u8| PeerRtt { site: SiteId(site), rtt_us: 10_000 };
    let report = SiteReport {
        site: SiteId(1),
        groups: vec![load],
        peers: vec![near(2), near(3)],
        servers: vec![ServerRtt { prefix, ingress, count, min_us, mean_us: min_us, answered }],
        talks: vec![GroupTalk { group: group_id(), servers: vec![(prefix, 5)] }],
        ..SiteReport::default()
    };
    let mut asked = Vec::new();
    for _ in 0..100 {
        assert_eq!(owner.report(report.clone()).await.unwrap(), [], "it offers none");
        let peers = vec![near(2)];
        let offer = SiteReport { site: SiteId(3), peers, probes_per_s: 10, ..SiteReport::default() };
        asked = other.report(offer).await.unwrap();
        if !asked.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(asked, [Probe { prefix, target }]);
}

/// The answer of a node to bytes of an agent.
async fn answer(group: &Group, node: u64, caller: &Caller, request: &ClientRequest) -> ClientResponse {
    let bytes = group.node(node).handle_client(caller, wire::encode(request)).await;
    wire::decode(bytes, wire::SNAPSHOT_LEN_MAX).unwrap()
}

fn is_refused(response: &ClientResponse) -> bool {
    let text = "no site has this name: it was removed, or is not added yet (`limosa site add`)";
    matches!(response, ClientResponse::Done(Err(ProposeError::Forbidden { right, .. })) if right == text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_of_a_site_that_is_not_there_is_refused_and_goes_on_asking_until_it_is_added() {
    let group = Group::of_three().await;
    let operator = group.client(operator());
    operator.propose(put_site(1)).await.unwrap();
    let caller = Caller::Site("site-2".into());
    let report = SiteReport { site: SiteId(2), ..SiteReport::default() };
    let served = Command::Served { move_id: flow::MoveId(1), by: SiteId(2), summary: MoveSummary::default() };
    let requests = [
        ClientRequest::Report(Box::new(report.clone())),
        ClientRequest::Propose(served),
        ClientRequest::Watch { since: 0, wait_ms: 0, table: true },
    ];
    let refused_by_all = async || {
        let leader = group.leader().await;
        for request in &requests {
            let response = answer(&group, leader, &caller, request).await;
            assert!(is_refused(&response), "{request:?}: {response:?}");
        }
        for id in 1..=3 {
            assert!(group.node(id).heard().is_empty() && group.node(id).reports().is_empty());
        }
    };
    refused_by_all().await;
    let agent = group.client(caller.clone());
    let refused = agent.report(report.clone()).await;
    assert!(matches!(refused, Err(ClientError::Refused(ProposeError::Forbidden { .. }))), "{refused:?}");

    let add = async {
        // It asks in vain first.
        tokio::time::sleep(Duration::from_millis(300)).await;
        operator.propose(put_site(2)).await.unwrap();
    };
    let watch = agent.watch(0, Duration::from_secs(5));
    let (all, ()) = tokio::join!(watch, add);
    assert!(all.changes.iter().any(|change| matches!(change, Change::Site(site) if site.id == SiteId(2))));
    agent.report(report.clone()).await.unwrap();
    let leader = group.node(group.leader().await);
    eventually("its report is heard", || leader.heard().contains_key(&SiteId(2))).await;

    // A watch that waits when the site is removed is refused, and so is all that follows.
    let since = group.node(1).cluster().revision.max(all.revision);
    let waiting = ClientRequest::Watch { since, wait_ms: 60_000, table: true };
    let waiting = answer(&group, 1, &caller, &waiting);
    let remove = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        operator.propose(Command::RemoveSite { site: SiteId(2) }).await.unwrap();
    };
    let (mut response, ()) = tokio::join!(waiting, remove);
    // What came before the removal, such as the end of its lease, is its to hear.
    while let ClientResponse::Changes(changes) = &response {
        assert!(!changes.changes.contains(&Change::SiteGone(SiteId(2))));
        let next = ClientRequest::Watch { since: changes.revision, wait_ms: 60_000, table: true };
        response = answer(&group, 1, &caller, &next).await;
    }
    assert!(is_refused(&response), "{response:?}");
    let gone = |id: u64| !group.node(id).cluster().sites.contains_key(&SiteId(2));
    eventually("all nodes know", || (1..=3).all(gone)).await;
    refused_by_all().await;
    // Another site with the number has said nothing yet.
    let Command::PutSite(spec) = put_site(2) else { unreachable!() };
    let bergen = SiteSpec { name: "bergen".into(), ..spec };
    operator.propose(Command::PutSite(bergen)).await.unwrap();
    refused_by_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_an_agent_cannot_reach_hears_of_it_by_way_of_the_others() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    let others: Vec<_> = (1..=3).filter(|&id| id != leader).collect();
    let agent = group.client_of(Caller::Site("site-1".into()), others);
    let report = SiteReport { site: SiteId(1), ..SiteReport::default() };
    // As agents do: a report is sent whether the last one was taken or not.
    for _ in 0..600 {
        if agent.report(report.clone()).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(group.node(leader).heard().contains_key(&SiteId(1)), "{:?}", agent.silence());
    eventually("the site has its lease", || group.node(leader).cluster().sites[&SiteId(1)].alive).await;
    let operator = group.client_of(operator(), (1..=3).filter(|&id| id != leader).collect());
    operator.propose(put_site(2)).await.unwrap();
    assert_eq!(group.leader().await, leader, "nobody else came to lead meanwhile");
    // What is passed on is still the caller's: a site speaks for itself only.
    let other = Box::new(SiteReport { site: SiteId(2), ..SiteReport::default() });
    for id in 1..=3 {
        let caller = Caller::Site("site-1".into());
        let said = answer(&group, id, &caller, &ClientRequest::PassReport(other.clone())).await;
        assert!(
            matches!(&said, ClientResponse::Done(Err(ProposeError::Forbidden { .. }))),
            "node {id}: {said:?}"
        );
        let put = answer(&group, id, &caller, &ClientRequest::PassProposal(put_site(3))).await;
        assert!(
            matches!(&put, ClientResponse::Done(Err(ProposeError::Forbidden { .. }))),
            "node {id}: {put:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_belongs_to_no_group_does_not_say_that_a_site_is_not_there() {
    let group = Group::new();
    group.start(1).await;
    let caller = Caller::Site("site-1".into());
    let report = Box::new(SiteReport { site: SiteId(1), ..SiteReport::default() });
    for request in [ClientRequest::Report(report), ClientRequest::Watch { since: 0, wait_ms: 0, table: true }]
    {
        let response = answer(&group, 1, &caller, &request).await;
        let elsewhere = ClientResponse::Done(Err(ProposeError::NotLeader { leader: None }));
        assert_eq!(response, elsewhere, "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_named_and_do_not_belong_to_the_group_keep_nobody_from_taking_part() {
    let mut group = Group::of_three().await;
    // As in files that still name removed nodes, or already name new ones.
    group.peers = (1..=5).collect();
    group.stop(3).await;
    group.stop(2).await;
    group.start(2).await;
    let leader = group.leader().await;
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    eventually("it takes part", || group.node(2).status().proven).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_while_all_other_voters_were_replaced_takes_part_again() {
    let mut group = Group::of_three().await;
    group.start(4).await;
    let leader = group.leader().await;
    group.node(leader).add_learner(4, "node-4".into()).await.unwrap();
    group.node(leader).change_membership((1..=4).collect()).await.unwrap();
    eventually("it knows all four", || group.node(4).status().members.len() == 4).await;
    group.stop(4).await;
    for id in 5..=7 {
        group.start(id).await;
        group.node(group.leader().await).add_learner(id, format!("node-{id}")).await.unwrap();
    }
    group.node(group.leader().await).change_membership((4..=7).collect()).await.unwrap();
    for id in 1..=3 {
        group.stop(id).await;
    }
    // Its log knows only nodes that are gone; its file names others.
    group.peers = (4..=7).collect();
    let leader = group.leader().await;
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    group.start(4).await;
    eventually("it has all", || group.node(4).cluster().sites.contains_key(&SiteId(1))).await;
    assert!(group.node(4).status().proven);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_starts_never_begins_with_what_a_node_knew_that_was_away() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    let [away, stays] = [leader % 3 + 1, (leader + 1) % 3 + 1];
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    eventually("all know the first site", || group.node(away).cluster().sites.len() == 1).await;
    group.stop(away).await;
    group.node(leader).propose("alice", put_site(2)).await.unwrap();
    group.stop(leader).await;
    group.stop(stays).await;
    // It knows of a site, and not what has become of the group since.
    group.start(away).await;
    assert_eq!(group.node(away).cluster().sites.len(), 1);
    let agent = group.client_of(Caller::Operator("agent".into()), vec![away]);
    let old = tokio::time::timeout(Duration::from_secs(4), agent.watch(0, Duration::from_secs(1))).await;
    assert!(old.is_err(), "{old:?}");
    group.start(leader).await;
    group.start(stays).await;
    let all = agent.watch(0, Duration::from_secs(5)).await;
    let sites = all.changes.iter().filter(|change| matches!(change, Change::Site(..))).count();
    assert_eq!(sites, 2, "{all:?}");
    // Who has begun goes on with any node: it never gets what is older.
    group.stop(leader).await;
    group.stop(stays).await;
    assert!(!agent.watch(all.revision, Duration::from_millis(100)).await.reset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_that_are_one_site_are_said() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    group.node(leader).propose("alice", put_site(1)).await.unwrap();
    group.node(leader).propose("alice", put_site(3)).await.unwrap();
    let client = |site| group.client(Caller::Site(format!("site-{site}")));
    let report = |site| SiteReport { site: SiteId(site), ..SiteReport::default() };
    let (first, copy, other) = (client(1), client(1), client(3));
    for _ in 0..10 {
        first.report(report(1)).await.unwrap();
        copy.report(report(1)).await.unwrap();
        other.report(report(3)).await.unwrap();
    }
    assert_eq!(group.node(leader).sites_twice(), ["site-1"]);
    let heard = group.node(leader).heard();
    assert!(heard[&SiteId(1)].problems[0].starts_with("two processes run as this site"), "{heard:?}");
    assert!(heard[&SiteId(3)].problems.is_empty(), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_is_added_again_only_where_it_is_and_a_group_is_made_once() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    group.node(leader).add_learner(2, "node-2".into()).await.unwrap();
    let moved = group.node(leader).add_learner(2, "elsewhere".into()).await.unwrap_err().to_string();
    assert!(moved.contains("node 2 is a member already, at node-2"), "{moved}");
    let there = group.node(leader).add_learner(6, "node-2".into()).await.unwrap_err().to_string();
    assert!(there.contains("node 2 is at node-2: give the address of node 6"), "{there}");
    assert!(group.node(leader).status().members.iter().all(|member| member.id != 6));
    let again = group.node(leader).initialize([(1, "node-1".into())].into()).await.unwrap_err().to_string();
    assert!(
        again.contains(&format!("node {leader} belongs to a group already, of nodes [1, 2, 3]")),
        "{again}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_removed_while_it_runs_stops_and_says_why() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    let gone = leader % 3 + 1;
    group.node(leader).remove(gone).await.unwrap();
    let reason = tokio::time::timeout(Duration::from_secs(60), group.node(gone).stopped()).await.unwrap();
    assert!(reason.contains("this one was removed from the group"), "{reason}");
    let status = group.node(gone).status();
    assert_eq!((status.role, status.stopped), (Role::Stopped, Some(reason)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_follows_a_leader_that_joined_meanwhile_and_not_one_that_was_removed() {
    let group = Group::of_three().await;
    let old = group.leader().await;
    let [away, stays] = [old % 3 + 1, (old + 1) % 3 + 1];
    group.wires.cut.lock().unwrap().insert(away);
    group.start(4).await;
    group.node(old).add_learner(4, "node-4".into()).await.unwrap();
    group.node(old).change_membership((1..=4).collect()).await.unwrap();
    group.node(old).transfer(4).await.unwrap();
    eventually("the new node leads", || group.node(4).status().role == Role::Leader).await;
    group.node(4).remove(old).await.unwrap();
    group.node(4).propose("alice", put_site(1)).await.unwrap();

    // Removed, it asks those who know in vain; who does not know yet learns it from the present leader.
    eventually("the other knows", || group.node(stays).cluster().sites.contains_key(&SiteId(1))).await;
    let read = wire::encode(&"ReadIndex");
    for id in [4, stays] {
        let answer = group.node(id).handle_peer(old, read.clone()).await;
        assert_eq!(wire::decode::<String>(answer, 1 << 20).unwrap(), "Removed");
    }
    let lost = group.node(old).propose("alice", put_site(9)).await;
    assert!(lost.is_err(), "{lost:?}");
    group.wires.cut.lock().unwrap().clear();
    eventually("it has all", || group.node(away).cluster().sites.contains_key(&SiteId(1))).await;
    assert_eq!(group.node(away).status().members.len(), 3);
    let answer = group.node(away).handle_peer(old, read).await;
    assert_eq!(wire::decode::<String>(answer, 1 << 20).unwrap(), "Removed");
    group.node(away).propose("alice", put_site(2)).await.unwrap();
    assert!(!group.node(4).cluster().sites.contains_key(&SiteId(9)));
}
