use std::collections::BTreeSet;

use flow::nat::NatSpec;
use flow::{ServiceId, SiteId};

use super::*;
use crate::core::{Command, Ordering, Service, SiteSpec, Timeouts};

fn propose(shared: &Shared, index: u64, command: Command) {
    let proposal = Proposal { actor: "alice".into(), at_ms: index, command };
    shared.write().apply(index, &proposal).unwrap();
    shared.revision.send_replace(index);
}

fn site(id: u8) -> Command {
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

/// A site that owns 16,384 groups.
fn with_groups() -> Shared {
    let shared = Shared::new();
    propose(&shared, 1, site(1));
    propose(&shared, 2, Command::SetAlive { site: SiteId(1), alive: true });
    let service = Service {
        id: ServiceId::new(1).unwrap(),
        name: "nat".into(),
        nat: NatSpec {
            clients: vec!["100.64.0.0/14".parse().unwrap()],
            pool: vec!["192.0.0.0/12".parse().unwrap()],
            ports_per_subscriber: 1024,
            first_port: 1024,
            port_key: 0,
        },
        timeouts: Timeouts::default(),
        ordering: Ordering::Strict,
        group_len: 28,
    };
    propose(&shared, 3, Command::PutService { service, owner: Some(SiteId(1)) });
    shared
}

/// What a watcher knows.
#[derive(Default, PartialEq, Debug)]
struct Known {
    groups: BTreeMap<GroupId, Group>,
    sites: BTreeSet<SiteId>,
}

impl Known {
    fn take(&mut self, changes: &Changes) {
        if changes.reset {
            *self = Self::default();
        }
        for change in &changes.changes {
            match change {
                Change::Group(group) => drop(self.groups.insert(group.id, *group)),
                Change::GroupGone(id) => drop(self.groups.remove(id)),
                Change::Site(site) => drop(self.sites.insert(site.id)),
                Change::SiteGone(id) => drop(self.sites.remove(id)),
                Change::Service(_) | Change::Move(_) | Change::MoveEnded { .. } | Change::Policy { .. } => {}
            }
        }
    }

    fn of(cluster: &Cluster) -> Self {
        Self { groups: cluster.groups.clone(), sites: cluster.sites.keys().copied().collect() }
    }
}

fn len(changes: &Changes) -> usize {
    wire::encode(changes).len()
}

#[test]
fn everything_comes_in_short_pages_that_lead_to_the_same_state_though_it_changes_meanwhile() {
    let shared = with_groups();
    let mut known = Known::default();
    let first = shared.page_since(0).unwrap();
    assert!(first.changes.reset && len(&first.changes) < 2 * ANSWER_LEN_MAX);
    known.take(&first.changes);
    let (revision, mut next, mut pages) = (first.changes.revision, first.next, 1);
    while let Some(after) = next {
        // A group behind the page, and one before it, change.
        let (low, high) = {
            let (cluster, nth) = (shared.cluster(), pages * 3);
            (*cluster.groups.keys().nth(nth).unwrap(), *cluster.groups.keys().rev().nth(nth).unwrap())
        };
        for (group, index) in [low, high].into_iter().zip(10 + 2 * pages as u64..) {
            propose(&shared, index, Command::SplitGroup { group });
        }
        let page = shared.rest(revision, after);
        assert!(!page.changes.reset && len(&page.changes) < 2 * ANSWER_LEN_MAX);
        known.take(&page.changes);
        next = page.next;
        pages += 1;
    }
    assert!(pages > 3, "{pages} pages");
    let mut since = revision;
    while let Some(page) = shared.page_since(since) {
        assert!(!page.changes.reset && page.next.is_none());
        known.take(&page.changes);
        since = page.changes.revision;
    }
    assert_eq!(known, Known::of(&shared.cluster()));
}

#[test]
fn later_changes_are_cut_at_a_revision_and_the_rest_is_asked_for() {
    let shared = with_groups();
    let begin = shared.cluster().revision;
    let groups: Vec<GroupId> = shared.cluster().groups.keys().copied().take(4_000).collect();
    for (group, index) in groups.into_iter().zip(10..) {
        propose(&shared, index, Command::SplitGroup { group });
    }
    let mut known = Known::of(&with_groups().cluster());
    let (mut since, mut answers) = (begin, 0);
    while let Some((changes, groups)) = shared.changes_since(since, true) {
        assert!(groups.is_empty() && !changes.reset && changes.revision > since);
        assert!(len(&changes) < 2 * ANSWER_LEN_MAX, "{} bytes", len(&changes));
        known.take(&changes);
        since = changes.revision;
        assert_eq!(
            changes.more,
            since < shared.cluster().revision,
            "whoever may not act on a part has to know"
        );
        answers += 1;
    }
    assert!(answers > 2, "{answers} answers");
    assert_eq!(since, shared.cluster().revision);
    assert_eq!(known, Known::of(&shared.cluster()));
}

#[test]
fn one_revision_is_never_cut() {
    let shared = with_groups();
    propose(&shared, 4, site(2));
    // The service and its groups came in one revision, which is longer than an answer else is.
    let (changes, _) = shared.changes_since(2, true).unwrap();
    assert_eq!(changes.revision, 3);
    assert!(changes.changes.len() > 16_384);
    let (changes, _) = shared.changes_since(3, true).unwrap();
    assert_eq!((changes.revision, changes.changes.len()), (4, 1));
}

#[test]
fn an_entry_that_does_not_follow_is_not_applied() {
    use openraft::testing::log_id;
    let state = State { applied: Some(log_id::<TypeConfig>(2, 1, 5)), ..State::default() };
    assert!(state.check_next(log_id::<TypeConfig>(2, 1, 6)).is_ok());
    assert!(state.check_next(log_id::<TypeConfig>(3, 1, 5)).is_err());
    assert!(state.check_next(log_id::<TypeConfig>(1, 1, 6)).is_err());
}
