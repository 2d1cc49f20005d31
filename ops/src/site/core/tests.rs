//! The agent between placement, workers and switch: what it asks of whom, when what it finds is not what it left.

use dataplane::control::{Event, GroupStatus, Phase, Request};
use flow::nat::NatSpec;
use flow::{Epoch, GroupId, Micros, MoveId, ServiceId, SiteId, WorkerId};
use placement::core::{
    Admin, Change, Group, Move, MoveOutcome, MovePhase, MoveReason, Ordering, Service, Site, Timeouts,
};
use switchctl::Ports;
use transfer::core::{Ending, ToSource, ToTarget};

use super::{Agent, Bounds, Input, Output};

const HERE: SiteId = SiteId(1);
const THERE: SiteId = SiteId(2);
const WORKERS: [WorkerId; 2] = [WorkerId(0), WorkerId(1)];
const NOW: Micros = Micros(1_000_000);

fn group(text: &str, owner: SiteId, epoch: u64) -> Group {
    let id = text.parse().unwrap();
    Group { id, owner, epoch: Epoch(epoch), move_id: None, changed: 0, standby: None }
}

fn whole() -> GroupId {
    "1:100.64.0.0/27".parse().unwrap()
}

fn service() -> Service {
    Service {
        id: ServiceId::new(1).unwrap(),
        name: "nat".into(),
        nat: NatSpec {
            clients: vec!["100.64.0.0/25".parse().unwrap()],
            pool: vec!["198.51.100.0/30".parse().unwrap()],
            ports_per_subscriber: 1_008,
            first_port: 1_024,
            port_key: 7,
        },
        timeouts: Timeouts::default(),
        ordering: Ordering::Strict,
        group_len: 27,
    }
}

fn site(id: SiteId) -> Change {
    Change::Site(Site {
        id,
        name: format!("site-{id}"),
        latitude: None,
        longitude: None,
        endpoint: "x:1".into(),
        capacity_pps: 1,
        capacity_flows: None,
        capacity_bps: None,
        failure_domain: None,
        admin: Admin::Active,
        alive: true,
    })
}

fn agent(expected: &[WorkerId]) -> Agent {
    let ports = Ports::conventional([THERE], [WorkerId(0), WorkerId(1), WorkerId(2)]);
    Agent::new(HERE, 1, ports, expected.iter().copied(), Bounds::default())
}

fn outputs(agent: &mut Agent) -> Vec<Output> {
    std::iter::from_fn(|| agent.poll_output()).collect()
}

fn feed(agent: &mut Agent, input: Input) -> Vec<Output> {
    agent.handle(input, NOW);
    agent.settle(NOW);
    outputs(agent)
}

fn placement(asked_at: Micros, more: bool, reset: bool, changes: Vec<Change>) -> Input {
    Input::Placement { asked_at, more, revision: 1, wall_ms: 1, reset, changes }
}

fn say(agent: &mut Agent, reset: bool, changes: Vec<Change>) -> Vec<Output> {
    feed(agent, placement(NOW, false, reset, changes))
}

fn status(agent: &mut Agent, worker: WorkerId, groups: Vec<GroupStatus>) -> Vec<Output> {
    let services = vec![ServiceId::new(1).unwrap()];
    feed(agent, Input::Worker(worker, Event::Status { services, groups }))
}

fn at(group: GroupId, epoch: u64, phase: Phase) -> GroupStatus {
    let move_id = (phase != Phase::Serving).then_some(MoveId(9));
    GroupStatus { group, epoch: Epoch(epoch), move_id, phase, flows: 3 }
}

/// Its move 7 from here to there, which is being prepared.
fn leaving(group: GroupId) -> Move {
    Move {
        id: MoveId(7),
        group,
        from: HERE,
        to: THERE,
        epoch: Epoch(2),
        phase: MovePhase::Preparing,
        ordering: Ordering::Strict,
        ingresses: Vec::new(),
        flip: None,
        take_over: false,
        reason: MoveReason::Operator,
        started: 1,
    }
}

fn world(groups: Vec<Group>) -> Vec<Change> {
    let services = [site(HERE), site(THERE), Change::Service(service())];
    services.into_iter().chain(groups.into_iter().map(Change::Group)).collect()
}

/// An agent whose first worker says that it has this.
fn settled(groups: Vec<Group>, first: Vec<GroupStatus>) -> (Agent, Vec<Output>) {
    let mut agent = agent(&WORKERS);
    let mut did = say(&mut agent, true, world(groups));
    for worker in WORKERS {
        did.extend(feed(&mut agent, Input::WorkerUp { worker, boot: 1 }));
    }
    // The second time is after all were heard.
    for _ in 0..2 {
        for worker in WORKERS {
            let groups = if worker == WORKERS[0] { first.clone() } else { Vec::new() };
            did.extend(status(&mut agent, worker, groups));
        }
    }
    (agent, did)
}

fn requests(outputs: &[Output]) -> Vec<(WorkerId, Request)> {
    let request = |output: &Output| {
        if let Output::Worker(worker, request) = output { Some((*worker, request.clone())) } else { None }
    };
    outputs.iter().filter_map(request).collect()
}

#[test]
fn a_site_that_relays_for_a_group_still_does_when_the_group_is_split() {
    let tombstone = at(whole(), 1, Phase::Tombstone);
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 2)], vec![tombstone]);
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[0]));
    let halves = [group("1:100.64.0.0/28", THERE, 2), group("1:100.64.0.16/28", THERE, 2)];
    let split = [Change::GroupGone(whole())].into_iter().chain(halves.map(Change::Group)).collect();
    say(&mut agent, false, split);
    assert_eq!(agent.plan().relayed.get(&whole()), Some(&WORKERS[0]));
    assert_eq!(agent.count_local(), (0, 1));
    feed(&mut agent, Input::Worker(WORKERS[0], Event::Gone { group: whole(), move_id: MoveId(9) }));
    assert!(agent.plan().relayed.is_empty() && agent.leftovers().is_empty(), "{:?}", agent.leftovers());
    assert_eq!(agent.count_local(), (0, 0));
}

#[test]
fn what_was_given_away_and_split_while_no_agent_listened_is_forgotten() {
    let halves = vec![group("1:100.64.0.0/28", THERE, 2), group("1:100.64.0.16/28", THERE, 2)];
    let (_, did) = settled(halves, vec![at(whole(), 1, Phase::Relaying)]);
    let forgets = |request: &(WorkerId, Request)| {
        if let Request::Forget { group, epoch, target, .. } = &request.1 {
            return (request.0, *group, *epoch, *target) == (WORKERS[0], whole(), Epoch(2), THERE);
        }
        false
    };
    assert!(requests(&did).iter().any(forgets), "{did:?}");
}

#[test]
fn what_was_taken_back_and_split_while_no_agent_listened_is_served_again() {
    let halves = vec![group("1:100.64.0.0/28", HERE, 3), group("1:100.64.0.16/28", HERE, 3)];
    let (_, did) = settled(halves, vec![at(whole(), 1, Phase::Relaying)]);
    let serves = (WORKERS[0], Request::Serve { group: whole(), epoch: Epoch(3) });
    assert!(requests(&did).contains(&serves), "{did:?}");
}

#[test]
fn a_group_that_comes_back_without_a_move_is_served_by_the_worker_that_relayed_for_it() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", THERE, 2)], vec![at(whole(), 1, Phase::Tombstone)]);
    let did = say(&mut agent, false, vec![Change::Group(group("1:100.64.0.0/27", HERE, 3))]);
    let serves = (WORKERS[0], Request::Serve { group: whole(), epoch: Epoch(3) });
    assert!(requests(&did).contains(&serves), "{did:?}");
    assert!(!agent.is_serving_all());
    feed(&mut agent, Input::Worker(WORKERS[0], Event::Serving { group: whole(), epoch: Epoch(3) }));
    assert!(agent.is_serving_all());
}

#[test]
fn a_worker_that_answers_is_heard_before_rules_are_made_although_nobody_expected_it() {
    let extra = WorkerId(2);
    let mut agent = agent(&WORKERS);
    say(&mut agent, true, world(vec![group("1:100.64.0.0/27", HERE, 1)]));
    for worker in [WORKERS[0], WORKERS[1], extra] {
        feed(&mut agent, Input::WorkerUp { worker, boot: 1 });
    }
    for worker in WORKERS {
        let did = status(&mut agent, worker, Vec::new());
        assert!(!did.iter().any(|output| matches!(output, Output::Rules(..))), "{did:?}");
    }
    assert!(!agent.is_synced());
    status(&mut agent, extra, vec![at(whole(), 1, Phase::Serving)]);
    assert!(agent.is_synced());
    assert_eq!(agent.plan().groups[&whole()].local, Some(extra));
}

#[test]
fn what_was_served_in_vain_is_forgotten_when_the_group_was_taken_back() {
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 3)], Vec::new());
    let abandoned = Event::Abandoned { group: whole(), move_id: MoveId(9), joined: true };
    let did = feed(&mut agent, Input::Worker(WORKERS[0], abandoned));
    let forgets =
        |request: &(WorkerId, Request)| matches!(request.1, Request::Forget { epoch: Epoch(3), .. });
    assert!(requests(&did).iter().any(forgets), "{did:?}");
}

/// Nobody waited for the marker of an ingress whose agent is away, and it leads to here until that is back.
#[test]
fn who_forgets_a_group_is_told_all_ingresses_also_those_whose_agents_are_away() {
    let away = SiteId(3);
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 3)], Vec::new());
    let Change::Site(known) = site(away) else { panic!("a site") };
    say(&mut agent, false, vec![Change::Site(Site { alive: false, ..known })]);
    let abandoned = Event::Abandoned { group: whole(), move_id: MoveId(9), joined: true };
    let did = feed(&mut agent, Input::Worker(WORKERS[0], abandoned));
    let told = requests(&did).into_iter().find_map(|(_, request)| {
        let Request::Forget { ingresses, relay_late_us, .. } = request else { return None };
        Some((ingresses, relay_late_us))
    });
    assert_eq!(told, Some((vec![HERE, THERE, away], Bounds::default().relay_late_us)), "{did:?}");
}

/// Before the flip is committed no ingress leads to a target; after it one may whose agent then does not hear that the move was taken back.
#[test]
fn who_gives_a_copy_up_relays_for_late_ingresses_only_if_some_may_have_led_there() {
    let late = Bounds::default().relay_late_us;
    for (outcome, epoch, relays) in
        [(MoveOutcome::Aborted { reason: String::new() }, 1, 0), (MoveOutcome::TakenBack, 3, late)]
    {
        let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 1)], Vec::new());
        let coming = Move { from: THERE, to: HERE, ..leaving(whole()) };
        say(&mut agent, false, vec![Change::Move(coming.clone())]);
        let offer = ToTarget::Offer { session: 1, flows: 0 };
        feed(&mut agent, Input::FromSource { move_id: coming.id, from: THERE, message: offer, wire_len: 1 });
        let back = Change::Group(group("1:100.64.0.0/27", THERE, epoch));
        let ended = Change::MoveEnded { id: coming.id, group: whole(), outcome };
        let did = say(&mut agent, false, vec![back, ended]);
        let told = requests(&did).into_iter().find_map(|(_, request)| {
            let Request::Abandon { relay_late_us, .. } = request else { return None };
            Some(relay_late_us)
        });
        assert_eq!(told, Some(relays), "{did:?}");
    }
}

#[test]
fn a_worker_that_keeps_its_connection_and_does_not_answer_is_said_to_be_silent() {
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 2)], Vec::new());
    assert!(agent.silent_workers(NOW).is_empty());
    feed(&mut agent, Input::Worker(WORKERS[1], Event::Stats(Box::default())));
    assert!(agent.silent_workers(NOW.plus(Micros(1_000_000))).is_empty());
    assert_eq!(agent.silent_workers(NOW.plus(Micros(1_500_000))), [WORKERS[1]]);
    feed(&mut agent, Input::WorkerDown(WORKERS[1]));
    assert!(agent.silent_workers(NOW.plus(Micros(1_500_000))).is_empty());
}

#[test]
fn a_probe_is_answered_while_the_worker_that_takes_the_group_answers() {
    let mut agent = settled(vec![group("1:100.64.0.0/27", THERE, 1)], Vec::new()).0;
    let mv = Move {
        id: MoveId(7),
        group: whole(),
        from: THERE,
        to: HERE,
        epoch: Epoch(2),
        phase: MovePhase::Preparing,
        ordering: Ordering::Strict,
        ingresses: Vec::new(),
        flip: None,
        take_over: false,
        reason: MoveReason::Operator,
        started: 1,
    };
    say(&mut agent, false, vec![Change::Move(mv)]);
    let from_source = |message| Input::FromSource { move_id: MoveId(7), from: THERE, message, wire_len: 1 };
    let did = feed(&mut agent, from_source(ToTarget::Offer { session: 1, flows: 0 }));
    let worker = requests(&did)[0].0;
    let prepared = Event::Prepared { group: whole(), move_id: MoveId(7) };
    feed(&mut agent, Input::Worker(worker, prepared));
    feed(&mut agent, Input::InForce(u64::MAX));
    feed(&mut agent, Input::Worker(worker, Event::Stats(Box::default())));
    let answers = |agent: &mut Agent, now| {
        agent.handle(from_source(ToTarget::Probe), now);
        agent.settle(now);
        outputs(agent).iter().any(|output| matches!(output, Output::ToSource(_, ToSource::Alive)))
    };
    assert!(answers(&mut agent, NOW));
    assert!(!answers(&mut agent, NOW.plus(Micros(1_500_000))), "its worker hangs");
}

fn stats(link_down: bool) -> Event {
    Event::Stats(Box::new(dataplane::control::Stats { link_down, ..Default::default() }))
}

/// Time passes second by second; those that answer say how their link is, down or not.
fn seconds(agent: &mut Agent, from: u64, until: u64, answers: &[(WorkerId, bool)]) -> Vec<Output> {
    let mut did = Vec::new();
    for second in from..until {
        let now = NOW.plus(Micros(second * 1_000_000));
        for (worker, link_down) in answers {
            agent.handle(Input::Worker(*worker, stats(*link_down)), now);
        }
        agent.handle_timeout(now);
        agent.settle(now);
        let mut asked = outputs(agent);
        for (worker, request) in requests(&asked) {
            if request == Request::Status && answers.contains(&(worker, false)) {
                asked.extend(status(agent, worker, Vec::new()));
            }
        }
        did.extend(asked);
    }
    did
}

/// Why a worker is taken for dead.
#[derive(Clone, Copy, PartialEq)]
enum Lost {
    Hung,
    CutOff,
}

/// What is done in the end when one of two workers is taken for dead while a group moves from the first to the second.
fn left_between_two(
    (lost, why): (WorkerId, Lost),
    flipped: bool,
    other_has: GroupStatus,
) -> Vec<(WorkerId, Request)> {
    let mut agent = served_by_the_first();
    let begun = NOW.plus(Micros(7_500_000));
    agent.handle(Input::MoveLocally(whole(), WORKERS[1]), begun);
    let prepare = |(_, request): (WorkerId, Request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    };
    let local = requests(&outputs(&mut agent)).into_iter().find_map(prepare).unwrap();
    if flipped {
        agent.commit_local(local, begun);
    }
    let other = if lost == WORKERS[0] { WORKERS[1] } else { WORKERS[0] };
    let mut asked = Vec::new();
    for second in 8..14 {
        let now = NOW.plus(Micros(second * 1_000_000));
        agent.handle(Input::Worker(other, stats(false)), now);
        if why == Lost::CutOff {
            agent.handle(Input::Worker(lost, stats(true)), now);
        }
        agent.handle_timeout(now);
        asked.extend(requests(&outputs(&mut agent)));
    }
    assert!(asked.contains(&(other, Request::Status)), "{asked:?}");
    let serves = |(_, request): &(WorkerId, Request)| matches!(request, Request::Serve { .. });
    assert!(!asked.iter().any(serves), "before it is known what the other has: {asked:?}");
    let did = status(&mut agent, other, vec![GroupStatus { move_id: Some(local), ..other_has }]);
    assert_eq!(agent.plan().groups[&whole()].local, Some(other));
    assert!(!agent.is_moving(&whole()));
    requests(&did)
}

#[test]
fn flows_stay_at_the_worker_that_they_were_to_leave_when_the_next_one_hangs_or_is_cut_off() {
    for why in [Lost::Hung, Lost::CutOff] {
        for (flipped, phase) in [(false, Phase::Copying), (true, Phase::Draining)] {
            let did = left_between_two((WORKERS[1], why), flipped, at(whole(), 1, phase));
            let disarms = |(worker, request): &(WorkerId, Request)| {
                *worker == WORKERS[0] && matches!(request, Request::Disarm { withdraw: false, .. })
            };
            assert!(did.iter().any(disarms), "{did:?}");
        }
        let did = left_between_two((WORKERS[1], why), true, at(whole(), 1, Phase::Relaying));
        assert!(did.contains(&(WORKERS[0], Request::Serve { group: whole(), epoch: Epoch(1) })), "{did:?}");
    }
}

#[test]
fn what_was_copied_is_served_when_the_worker_that_it_comes_from_hangs_or_is_cut_off() {
    for why in [Lost::Hung, Lost::CutOff] {
        for flipped in [false, true] {
            let did = left_between_two((WORKERS[0], why), flipped, at(whole(), 1, Phase::Shadow));
            let takes_over = |(worker, request): &(WorkerId, Request)| {
                *worker == WORKERS[1] && matches!(request, Request::TakeOver { .. })
            };
            assert!(did.iter().any(takes_over), "{did:?}");
        }
    }
}

/// The first worker serves the group, and both were well for a while.
fn served_by_the_first() -> Agent {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[0]));
    let did = seconds(&mut agent, 0, 8, &[(WORKERS[0], false), (WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "{did:?}");
    agent
}

#[test]
fn groups_of_a_worker_that_hangs_go_to_one_that_answers_and_it_gives_them_up_when_it_wakes() {
    let mut agent = served_by_the_first();
    let did = seconds(&mut agent, 8, 12, &[(WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "a busy machine keeps a process from running for longer than this");
    let did = seconds(&mut agent, 12, 14, &[(WORKERS[1], false)]);
    assert!(did.iter().any(|output| matches!(output, Output::Disconnect(worker) if *worker == WORKERS[0])));
    let serves = (WORKERS[1], Request::Serve { group: whole(), epoch: Epoch(1) });
    assert!(requests(&did).contains(&serves), "{did:?}");
    feed(&mut agent, Input::Worker(WORKERS[1], Event::Serving { group: whole(), epoch: Epoch(1) }));
    feed(&mut agent, Input::WorkerDown(WORKERS[0]));

    feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 1 });
    let mut did = status(&mut agent, WORKERS[0], vec![at(whole(), 1, Phase::Serving)]);
    did.extend(status(&mut agent, WORKERS[1], vec![at(whole(), 1, Phase::Serving)]));
    let yields =
        |request: &(WorkerId, Request)| matches!(request.1, Request::Yield { group, .. } if group == whole());
    let told: Vec<_> = requests(&did).into_iter().filter(yields).map(|(worker, _)| worker).collect();
    assert_eq!(told, [WORKERS[0]]);
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[1]));
}

#[test]
fn nothing_is_taken_over_where_every_worker_is_silent_or_the_agent_itself_was_stopped() {
    let mut agent = served_by_the_first();
    let did = seconds(&mut agent, 8, 30, &[]);
    assert!(did.is_empty(), "{did:?}");

    let mut agent = served_by_the_first();
    let did = seconds(&mut agent, 60, 64, &[(WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "it heard nobody while it was stopped: {did:?}");
    let did = seconds(&mut agent, 64, 68, &[(WORKERS[1], false)]);
    assert!(!requests(&did).is_empty());
}

#[test]
fn groups_of_a_worker_without_its_link_go_to_one_that_has_it() {
    let mut agent = served_by_the_first();
    let did = seconds(&mut agent, 8, 11, &[(WORKERS[0], true), (WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "{did:?}");
    assert_eq!(agent.unlinked_workers(), [WORKERS[0]]);
    let did = seconds(&mut agent, 11, 13, &[(WORKERS[0], true), (WORKERS[1], false)]);
    let serves = (WORKERS[1], Request::Serve { group: whole(), epoch: Epoch(1) });
    assert!(requests(&did).contains(&serves), "{did:?}");
    feed(&mut agent, Input::Worker(WORKERS[1], Event::Serving { group: whole(), epoch: Epoch(1) }));
    feed(&mut agent, Input::WorkerDown(WORKERS[0]));
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 1 });
    let mut did = status(&mut agent, WORKERS[0], vec![at(whole(), 1, Phase::Serving)]);
    did.extend(status(&mut agent, WORKERS[1], vec![at(whole(), 1, Phase::Serving)]));
    assert!(
        matches!(requests(&did)[..], [(worker, Request::Yield { .. })] if worker == WORKERS[0]),
        "{did:?}"
    );
}

#[test]
fn a_new_worker_gets_no_group_before_it_has_said_that_it_has_its_link() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let [first, second] = WORKERS;
    feed(&mut agent, Input::Worker(first, stats(false)));
    // The other one is heard, and not yet what it has: it has no group, and would be the least loaded.
    let mut did = say(&mut agent, false, vec![Change::Group(group("1:100.64.0.32/27", HERE, 1))]);
    let serves = |did: &[Output]| requests(did).into_iter().find(|(_, r)| matches!(r, Request::Serve { .. }));
    assert_eq!(serves(&did).map(|(worker, _)| worker), Some(first), "{did:?}");
    feed(&mut agent, Input::Worker(second, stats(true)));
    did = say(&mut agent, false, vec![Change::Group(group("1:100.64.0.64/27", HERE, 1))]);
    assert_eq!(serves(&did).map(|(worker, _)| worker), Some(first), "{did:?}");
    feed(&mut agent, Input::Worker(second, stats(false)));
    did = say(&mut agent, false, vec![Change::Group(group("1:100.64.0.96/27", HERE, 1))]);
    assert_eq!(serves(&did).map(|(worker, _)| worker), Some(second), "{did:?}");
}

#[test]
fn a_switch_that_was_away_takes_no_groups_from_the_worker_that_finds_it_last() {
    let mut agent = served_by_the_first();
    let did = seconds(&mut agent, 8, 14, &[(WORKERS[0], true), (WORKERS[1], true)]);
    assert!(requests(&did).is_empty(), "{did:?}");
    let did = seconds(&mut agent, 14, 16, &[(WORKERS[0], true), (WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "the second has found it, the first has not yet: {did:?}");
    let did = seconds(&mut agent, 16, 30, &[(WORKERS[0], false), (WORKERS[1], false)]);
    assert!(requests(&did).is_empty(), "{did:?}");
}

/// It was taken for dead by an agent that is gone as well.
#[test]
fn of_two_workers_that_serve_a_group_a_new_agent_lets_one() {
    let both = vec![at(whole(), 1, Phase::Serving)];
    let mut agent = agent(&WORKERS);
    say(&mut agent, true, world(vec![group("1:100.64.0.0/27", HERE, 1)]));
    for worker in WORKERS {
        feed(&mut agent, Input::WorkerUp { worker, boot: 1 });
    }
    let mut did = Vec::new();
    for _ in 0..2 {
        for worker in WORKERS {
            did.extend(status(&mut agent, worker, both.clone()));
        }
    }
    let local = agent.plan().groups[&whole()].local;
    let yields = requests(&did).into_iter().filter(|(_, request)| matches!(request, Request::Yield { .. }));
    let told: std::collections::BTreeSet<_> = yields.map(|(worker, _)| worker).collect();
    let other = WORKERS.into_iter().find(|worker| Some(*worker) != local).unwrap();
    assert_eq!(told, [other].into());
}

#[test]
fn the_end_of_a_round_of_a_copy_that_was_given_up_does_not_end_the_one_in_hand() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let mut agent = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]).0;
    let id = MoveId(7);
    let mv = leaving(whole());
    say(&mut agent, false, vec![Change::Move(mv)]);
    let copies = |did: &[Output]| {
        let start = |(_, request)| {
            if let Request::CopyStart { session, .. } = request { Some(session) } else { None }
        };
        requests(did).into_iter().find_map(start)
    };
    let offered = |did: &[Output]| {
        let offer = |output: &Output| {
            let Output::ToTarget(_, ToTarget::Offer { session, .. }) = output else { return None };
            Some(*session)
        };
        did.iter().find_map(offer)
    };
    let accept = |session| Input::FromTarget(id, ToSource::Accept { session, next: 0 });
    let first = offered(&feed(&mut agent, Input::PeerUp(id))).unwrap();
    assert_eq!(copies(&feed(&mut agent, accept(first))), Some(first));
    let given_up = feed(&mut agent, Input::FromTarget(id, ToSource::Mismatch { session: first }));
    let second = offered(&given_up).unwrap();
    assert_eq!(copies(&feed(&mut agent, accept(second))), Some(second));
    let ended = |session| {
        Input::Worker(
            WORKERS[0],
            Event::RoundEnd { group: whole(), move_id: id, session, round: 0, dirty: 0, flows: 3 },
        )
    };
    let proposes = |did: &[Output]| did.iter().any(|output| matches!(output, Output::Propose(_)));
    assert!(!proposes(&feed(&mut agent, ended(first))), "most flows are still to come");
    assert!(proposes(&feed(&mut agent, ended(second))));
}

#[test]
fn a_move_waits_for_one_between_workers_also_when_all_are_asked_what_they_have_meanwhile() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let serving = at(whole(), 1, Phase::Serving);
    let (mut agent, _) = settled(vec![mine], vec![serving]);
    let did = feed(&mut agent, Input::MoveLocally(whole(), WORKERS[1]));
    assert!(requests(&did).iter().any(|(_, request)| matches!(request, Request::Prepare { .. })), "{did:?}");
    let id = MoveId(7);
    let moving = Change::Group(Group { move_id: Some(id), ..mine });
    let mv = leaving(whole());
    say(&mut agent, false, vec![Change::Move(mv), moving]);
    feed(&mut agent, Input::WorkerUp { worker: WorkerId(2), boot: 1 });
    let did = status(&mut agent, WORKERS[0], vec![serving]);
    assert!(!did.iter().any(|output| matches!(output, Output::Connect(..))), "{did:?}");
}

/// The target of the move between workers is cut off for a moment, and may have joined; the source still serves.
#[test]
fn a_move_to_another_site_waits_for_one_between_workers_whose_target_is_away_for_a_moment() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
    let did = feed(&mut agent, Input::MoveLocally(whole(), WORKERS[1]));
    let prepare = |(_, request): (WorkerId, Request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    };
    let local = requests(&did).into_iter().find_map(prepare).unwrap();
    agent.commit_local(local, NOW);
    let moving = Change::Group(Group { move_id: Some(MoveId(7)), ..mine });
    let mut did = say(&mut agent, false, vec![Change::Move(leaving(whole())), moving]);
    did.extend(feed(&mut agent, Input::WorkerDown(WORKERS[1])));
    // It is asked once for each group that was in doubt, and answers as often.
    let draining = GroupStatus { move_id: Some(local), ..at(whole(), 1, Phase::Draining) };
    did.extend(status(&mut agent, WORKERS[0], vec![draining]));
    did.extend(status(&mut agent, WORKERS[0], vec![draining]));
    assert!(!did.iter().any(|output| matches!(output, Output::Connect(..))), "{did:?}");
    let gives_up = |(_, request): &(WorkerId, Request)| matches!(request, Request::Yield { .. });
    assert!(!requests(&did).iter().any(gives_up), "{did:?}");
}

/// The switch delivers to the target already, which holds, and the source may still serve.
#[test]
fn a_group_between_two_workers_waits_for_the_one_that_has_it_when_that_is_away_for_a_moment() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
    let did = feed(&mut agent, Input::MoveLocally(whole(), WORKERS[1]));
    let prepare = |(_, request): (WorkerId, Request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    };
    let local = requests(&did).into_iter().find_map(prepare).unwrap();
    agent.commit_local(local, NOW);
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[1]), "flipped");
    feed(&mut agent, Input::WorkerDown(WORKERS[0]));
    let away = leaving(whole());
    let moving = Change::Group(Group { move_id: Some(MoveId(7)), ..mine });
    let mut did = say(&mut agent, false, vec![Change::Move(away), moving]);
    let shadow = GroupStatus { move_id: Some(local), ..at(whole(), 1, Phase::Shadow) };
    did.extend(feed(&mut agent, Input::WorkerUp { worker: WorkerId(2), boot: 1 }));
    did.extend(status(&mut agent, WORKERS[1], vec![shadow]));
    did.extend(status(&mut agent, WorkerId(2), Vec::new()));
    let served = |request: &(WorkerId, Request)| {
        matches!(request.1, Request::Serve { .. } | Request::TakeOver { .. } | Request::CopyStart { .. })
    };
    assert!(!requests(&did).iter().any(served), "{did:?}");
    assert!(!did.iter().any(|output| matches!(output, Output::Connect(..))), "{did:?}");

    // It is back, and has cut meanwhile: the move between the workers goes forward.
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 1 });
    let cut = GroupStatus { move_id: Some(local), ..at(whole(), 1, Phase::Relaying) };
    let mut did = status(&mut agent, WORKERS[1], vec![shadow]);
    did.extend(status(&mut agent, WorkerId(2), Vec::new()));
    did.extend(status(&mut agent, WORKERS[0], vec![cut]));
    assert!(agent.is_moving_locally(&whole()), "{did:?}");
    assert!(!requests(&did).iter().any(|request| matches!(request.1, Request::Serve { .. })), "{did:?}");
}

#[test]
fn a_half_moves_when_its_worker_serves_both_halves_and_not_before() {
    let halves = ["1:100.64.0.0/28", "1:100.64.0.16/28"].map(|half| group(half, HERE, 1));
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let split = [Change::GroupGone(whole())].into_iter().chain(halves.map(Change::Group)).collect();
    say(&mut agent, false, split);
    let mv = leaving(halves[0].id);
    let moving = Change::Group(Group { move_id: Some(MoveId(7)), ..halves[0] });
    let mut did = say(&mut agent, false, vec![Change::Move(mv), moving]);
    let serving = |half: &Group| Event::Serving { group: half.id, epoch: Epoch(1) };
    did.extend(feed(&mut agent, Input::Worker(WORKERS[0], serving(&halves[0]))));
    let begins = |did: &[Output]| did.iter().any(|output| matches!(output, Output::Connect(..)));
    assert!(!begins(&did), "{did:?}");
    assert!(begins(&feed(&mut agent, Input::Worker(WORKERS[0], serving(&halves[1])))));
}

#[test]
fn a_copy_for_a_group_that_was_split_since_its_move_ended_is_given_up() {
    let halves = vec![group("1:100.64.0.0/28", THERE, 1), group("1:100.64.0.16/28", THERE, 1)];
    let (_, did) = settled(halves, vec![at(whole(), 2, Phase::Shadow)]);
    let gives_up = |request: &(WorkerId, Request)| matches!(request.1, Request::Abandon { group, move_id: MoveId(9), .. } if group == whole());
    assert!(requests(&did).iter().any(gives_up), "{did:?}");
}

#[test]
fn a_group_that_is_split_twice_while_its_worker_is_another_process_never_overlaps_its_parts() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let split = |whole: &str, halves: [&str; 2]| {
        let gone = Change::GroupGone(whole.parse().unwrap());
        [gone].into_iter().chain(halves.map(|half| Change::Group(group(half, HERE, 1)))).collect()
    };
    feed(&mut agent, Input::WorkerDown(WORKERS[0]));
    say(&mut agent, false, split("1:100.64.0.0/27", ["1:100.64.0.0/28", "1:100.64.0.16/28"]));
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 2 });
    say(&mut agent, false, split("1:100.64.0.0/28", ["1:100.64.0.0/29", "1:100.64.0.8/29"]));
    let acted_on: Vec<_> = agent.plan().groups.into_keys().collect();
    let overlap = |a: &GroupId, b: &GroupId| a != b && a.prefix.overlaps(&b.prefix);
    assert!(!acted_on.iter().any(|a| acted_on.iter().any(|b| overlap(a, b))), "{acted_on:?}");

    status(&mut agent, WORKERS[1], Vec::new());
    let mut did = status(&mut agent, WORKERS[0], Vec::new());
    // Whatever is asked for is done.
    let mut served = Vec::new();
    for second in 1..5 {
        for (worker, request) in requests(&did) {
            let Request::Serve { group, epoch } = request else { continue };
            served.retain(|other: &GroupId| !other.prefix.overlaps(&group.prefix));
            served.push(group);
            agent.handle(Input::Worker(worker, Event::Serving { group, epoch }), NOW);
        }
        did = seconds(&mut agent, second, second + 1, &[]);
    }
    served.sort_unstable();
    let parts = ["1:100.64.0.0/29", "1:100.64.0.8/29", "1:100.64.0.16/28"];
    assert_eq!(served, parts.map(|part| part.parse().unwrap()));
}

#[test]
fn what_a_worker_lost_is_served_again_also_when_another_dies_that_was_asked_what_it_has() {
    let mut agent = served_by_the_first();
    // The first is another process, and all are asked.
    let [first, second] = WORKERS;
    feed(&mut agent, Input::WorkerDown(first));
    feed(&mut agent, Input::WorkerUp { worker: first, boot: 2 });
    let before = status(&mut agent, first, Vec::new());
    assert!(
        !requests(&before).iter().any(|(_, request)| matches!(request, Request::Serve { .. })),
        "{before:?}"
    );
    // The other one ends before it answers: nobody else is to be heard.
    let did = feed(&mut agent, Input::WorkerDown(second));
    assert_eq!(requests(&did), [(first, Request::Serve { group: whole(), epoch: Epoch(1) })]);
}

#[test]
fn groups_of_a_worker_that_is_gone_are_not_said_to_be_served_until_another_one_serves_them() {
    let mut agent = served_by_the_first();
    let [first, second] = WORKERS;
    assert!(agent.is_serving_all());
    feed(&mut agent, Input::WorkerDown(second));
    assert!(agent.is_serving_all(), "it had no group");
    feed(&mut agent, Input::WorkerUp { worker: second, boot: 2 });
    status(&mut agent, second, Vec::new());
    feed(&mut agent, Input::WorkerDown(first));
    assert!(!agent.is_serving_all(), "nobody is known to serve its group");
}

#[test]
fn what_an_agent_missed_while_it_was_stopped_is_one_set_of_rules_without_what_was_undone() {
    let theirs = group("1:100.64.0.0/27", THERE, 1);
    let (mut agent, _) = settled(vec![theirs], Vec::new());
    let flipped = Move { from: THERE, to: SiteId(3), phase: MovePhase::Switching, ..leaving(whole()) };
    let outcome = MoveOutcome::TakenBack;
    let ended = Change::MoveEnded { id: flipped.id, group: whole(), outcome };
    let back = Change::Group(Group { epoch: Epoch(3), ..theirs });
    for changes in [vec![Change::Move(flipped)], vec![back, ended]] {
        agent.handle(placement(NOW, false, false, changes), NOW);
    }
    agent.settle(NOW);
    let sets = outputs(&mut agent).into_iter().filter(|output| matches!(output, Output::Rules(..)));
    assert_eq!(sets.count(), 1);
    assert_eq!(agent.plan().groups[&whole()].steer, THERE);
}

/// The agent was away while the first of two moves from here was given up.
#[test]
fn a_worker_that_still_copies_for_a_move_that_is_over_is_told_so_before_the_next_one_begins() {
    for phase in [Phase::Copying, Phase::Draining] {
        let mut agent = agent(&WORKERS);
        let mine = Group { move_id: Some(MoveId(7)), ..group("1:100.64.0.0/27", HERE, 1) };
        let move_of_log = Change::Move(leaving(whole()));
        let mut did = say(&mut agent, true, world(vec![mine]).into_iter().chain([move_of_log]).collect());
        for worker in WORKERS {
            did.extend(feed(&mut agent, Input::WorkerUp { worker, boot: 1 }));
        }
        for _ in 0..2 {
            did.extend(status(&mut agent, WORKERS[0], vec![at(whole(), 1, phase)]));
            did.extend(status(&mut agent, WORKERS[1], Vec::new()));
        }
        let disarm = Request::Disarm { group: whole(), move_id: MoveId(9), withdraw: false };
        assert!(requests(&did).contains(&(WORKERS[0], disarm)), "{did:?}");
        assert!(did.iter().any(|output| matches!(output, Output::Connect(MoveId(7), _))), "{did:?}");
    }
}

/// A group of another site, and what is said of a move that flipped and was taken back.
fn flipped_and_back() -> (Agent, Vec<Change>, Vec<Change>) {
    let theirs = group("1:100.64.0.0/27", THERE, 1);
    let (agent, _) = settled(vec![theirs], Vec::new());
    let flipped = Move { from: THERE, to: SiteId(3), phase: MovePhase::Switching, ..leaving(whole()) };
    let outcome = MoveOutcome::TakenBack;
    let ended = Change::MoveEnded { id: flipped.id, group: whole(), outcome };
    let back = Change::Group(Group { epoch: Epoch(3), ..theirs });
    (agent, vec![Change::Move(flipped)], vec![back, ended])
}

/// What it does with one input at a time, and how many sets of rules that made.
fn heard(agent: &mut Agent, input: Input, now: Micros) -> (Vec<Output>, usize) {
    agent.handle(input, now);
    agent.settle(now);
    let did = outputs(agent);
    let sets = did.iter().filter(|output| matches!(output, Output::Rules(..))).count();
    (did, sets)
}

/// Sites that the group of [`goes_on_unflipped`] goes to one after another.
const ON: [SiteId; 3] = [THERE, SiteId(3), SiteId(4)];

/// What this ingress sends when its switch, which did not answer while the group went from site to site, follows the rules.
fn goes_on_unflipped(resets: bool) -> (Agent, Vec<Output>) {
    let mut agent = settled(vec![group("1:100.64.0.0/27", ON[0], 1)], Vec::new()).0;
    agent.set_ports(Ports::conventional(ON, WORKERS));
    agent.settle(NOW);
    outputs(&mut agent);
    let tag = agent.tag;
    feed(&mut agent, Input::InForce(tag));
    for (nth, pair) in ON.windows(2).enumerate() {
        let (id, epoch) = (MoveId(7 + nth as u64), Epoch(2 + nth as u64));
        let flipped =
            Move { id, epoch, from: pair[0], to: pair[1], phase: MovePhase::Switching, ..leaving(whole()) };
        say(&mut agent, false, vec![Change::Move(flipped)]);
        let there = Change::Group(group("1:100.64.0.0/27", pair[1], epoch.0));
        let outcome = MoveOutcome::Done;
        let ended = Change::MoveEnded { id, group: whole(), outcome };
        say(&mut agent, false, vec![there, ended]);
        if resets {
            say(&mut agent, true, world(vec![group("1:100.64.0.0/27", pair[1], epoch.0)]));
        }
    }
    let tag = agent.tag;
    let did = feed(&mut agent, Input::InForce(tag));
    (agent, did)
}

#[test]
fn flips_that_come_into_force_together_send_each_its_marker_also_after_a_snapshot() {
    for resets in [false, true] {
        let (agent, did) = goes_on_unflipped(resets);
        let sent = did
            .into_iter()
            .filter_map(|output| if let Output::PacketOut(packet) = output { Some(packet) } else { None });
        let marker = |id, epoch, from| {
            let old = switchctl::OldPath::Remote(from);
            switchctl::marker_out(&agent.plan(), old, &whole(), MoveId(id), Epoch(epoch)).unwrap()
        };
        assert_eq!(
            sent.collect::<Vec<_>>(),
            [marker(7, 2, ON[0]), marker(8, 3, ON[1])],
            "a snapshot between: {resets}"
        );
    }
}

/// It was stopped, or could not reach the log, and a snapshot is all that it hears. Of the first move it had heard that it began.
#[test]
fn an_ingress_sends_a_marker_for_each_move_that_it_hears_of_only_when_it_is_over() {
    let (first, last) = (ON[0], ON[2]);
    for (heard, id) in [(true, MoveId(7)), (false, MoveId::UNHEARD)] {
        let mut agent = settled(vec![group("1:100.64.0.0/27", first, 1)], Vec::new()).0;
        agent.set_ports(Ports::conventional(ON, WORKERS));
        agent.settle(NOW);
        outputs(&mut agent);
        let tag = agent.tag;
        feed(&mut agent, Input::InForce(tag));
        if heard {
            let moving = Group { move_id: Some(MoveId(7)), ..group("1:100.64.0.0/27", first, 1) };
            let preparing = Move { from: first, to: ON[1], ..leaving(whole()) };
            say(&mut agent, false, vec![Change::Move(preparing), Change::Group(moving)]);
        }
        let markers = |agent: &mut Agent, epoch| {
            say(agent, true, world(vec![group("1:100.64.0.0/27", last, epoch)]));
            let tag = agent.tag;
            let sent = feed(agent, Input::InForce(tag)).into_iter().filter_map(|output| {
                if let Output::PacketOut(packet) = output { Some(packet) } else { None }
            });
            sent.collect::<Vec<_>>()
        };
        let marker = |agent: &Agent, id, epoch| {
            let old = switchctl::OldPath::Remote(first);
            switchctl::marker_out(&agent.plan(), old, &whole(), id, Epoch(epoch)).unwrap()
        };
        let sent = markers(&mut agent, 3);
        assert_eq!(sent, [marker(&agent, id, 2), marker(&agent, MoveId::UNHEARD, 3)], "heard: {heard}");
        assert_eq!(markers(&mut agent, 3), [], "each is sent once");
        assert_eq!(agent.leftovers(), Vec::<&str>::new());
    }
}

#[test]
fn an_agent_that_wakes_makes_no_rules_of_what_it_was_told_before_it_was_stopped() {
    let (mut agent, first, rest) = flipped_and_back();
    let woke = NOW.plus(Micros(20_000_000));
    let (did, sets) = heard(&mut agent, placement(NOW, false, false, first), woke);
    assert!(did.iter().any(|output| matches!(output, Output::CatchUp)), "{did:?}");
    assert_eq!((sets, agent.is_in_force()), (0, false));
    let (_, sets) = heard(&mut agent, placement(woke, false, false, rest), woke.plus(Micros(5_000)));
    assert_eq!((sets, agent.plan().groups[&whole()].steer), (1, THERE));
}

#[test]
fn an_agent_that_wakes_and_hears_nothing_goes_on_with_what_it_knows_after_a_while() {
    let (mut agent, first, _) = flipped_and_back();
    let woke = NOW.plus(Micros(20_000_000));
    assert_eq!(heard(&mut agent, placement(NOW, false, false, first), woke).1, 0);
    let bound = woke.plus(super::CATCH_UP_BOUND);
    let mut now = woke;
    while now < bound {
        let next = agent.poll_timeout().unwrap();
        assert!(next <= bound, "{next:?}");
        now = next.max(now);
        agent.handle_timeout(now);
        agent.settle(now);
        let sets = outputs(&mut agent).into_iter().filter(|output| matches!(output, Output::Rules(..)));
        assert_eq!(sets.count(), usize::from(now >= bound));
    }
}

#[test]
fn no_rules_are_made_of_a_part_of_an_answer() {
    let (mut agent, first, rest) = flipped_and_back();
    assert_eq!(heard(&mut agent, placement(NOW, true, false, first), NOW.plus(Micros(10))).1, 0);
    // The rest was asked for before the first part was taken.
    let (_, sets) =
        heard(&mut agent, placement(NOW.plus(Micros(5)), false, false, rest), NOW.plus(Micros(20)));
    assert_eq!((sets, agent.plan().groups[&whole()].steer), (1, THERE));
}

#[test]
fn an_agent_that_was_told_to_stop_begins_no_move_and_goes_on_with_those_in_hand() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let begins = |did: &[Output]| did.iter().any(|output| matches!(output, Output::Connect(..)));
    let moving = Change::Group(Group { move_id: Some(MoveId(7)), ..mine });
    let told = |phase| {
        let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
        feed(&mut agent, Input::Stop);
        let mv = Move { phase, ingresses: vec![HERE, THERE], ..leaving(whole()) };
        let did = say(&mut agent, false, vec![Change::Move(mv), moving.clone()]);
        (begins(&did), agent)
    };
    let (begun, mut agent) = told(MovePhase::Preparing);
    assert!(!begun);
    assert!(requests(&feed(&mut agent, Input::MoveLocally(whole(), WORKERS[1]))).is_empty());
    assert!(told(MovePhase::Switching).0, "the ingresses flip, and the group would be served nowhere");
}

/// It was cut, the target never came, and the token was withdrawn; that is proposed, and then the worker dies.
#[test]
fn a_token_that_was_withdrawn_by_a_worker_that_died_is_not_given_anew_by_another() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let moving = Change::Group(Group { move_id: Some(MoveId(7)), ..mine });
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
    let flipped = Move { phase: MovePhase::Switching, ingresses: vec![HERE, THERE], ..leaving(whole()) };
    say(&mut agent, false, vec![Change::Move(flipped), moving]);
    // The target is not heard of.
    let late = NOW.plus(Micros(4_000_000));
    let did = seconds(&mut agent, 1, 5, &WORKERS.map(|worker| (worker, false)));
    let withdraws = |(_, request): &(WorkerId, Request)| matches!(request, Request::Disarm { .. });
    assert!(requests(&did).iter().any(withdraws), "{did:?}");
    let withdrawn = Event::Disarmed { group: whole(), move_id: MoveId(7), cut: true, withdrawn: true };
    agent.handle(Input::Worker(WORKERS[0], withdrawn), late);
    let takes_back = |did: &[Output]| {
        did.iter().any(|output| matches!(output, Output::Propose(placement::core::Command::TakeBack { .. })))
    };
    assert!(takes_back(&outputs(&mut agent)));

    feed(&mut agent, Input::WorkerDown(WORKERS[0]));
    let mut did = feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 2 });
    for worker in WORKERS {
        did.extend(status(&mut agent, worker, Vec::new()));
    }
    assert!(!did.iter().any(|output| matches!(output, Output::Connect(..))), "{did:?}");

    // The log has decided: another worker serves.
    let outcome = MoveOutcome::TakenBack;
    let ended = Change::MoveEnded { id: MoveId(7), group: whole(), outcome };
    let did = say(&mut agent, false, vec![Change::Group(Group { epoch: Epoch(3), ..mine }), ended]);
    let serves =
        |(_, request): &(WorkerId, Request)| matches!(request, Request::Serve { epoch: Epoch(3), .. });
    assert!(requests(&did).iter().any(serves), "{did:?}");
    assert!(!agent.leftovers().contains(&"moves whose token was withdrawn"));
}

/// It hung while it was a move's target, so that another worker became that.
#[test]
fn a_worker_that_wakes_with_a_copy_for_what_another_serves_by_now_gives_it_up() {
    let mine = group("1:100.64.0.0/27", HERE, 2);
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 2, Phase::Serving)]);
    feed(&mut agent, Input::WorkerDown(WORKERS[1]));
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[1], boot: 1 });
    let mut did = status(&mut agent, WORKERS[1], vec![at(whole(), 2, Phase::Shadow)]);
    did.extend(status(&mut agent, WORKERS[0], vec![at(whole(), 2, Phase::Serving)]));
    let of_it = |(worker, _): &(WorkerId, Request)| *worker == WORKERS[1];
    let asked: Vec<_> = requests(&did).into_iter().filter(of_it).collect();
    assert!(matches!(asked[..], [(_, Request::Abandon { move_id: MoveId(9), .. })]), "{asked:?}");
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[0]));
}

#[test]
fn a_worker_that_wakes_with_a_group_whose_parts_others_have_gives_it_up() {
    let half = |text, owner| group(text, owner, 1);
    let yields = |did: &[Output]| {
        let yields = |(worker, request): (WorkerId, Request)| {
            if let Request::Yield { group, .. } = request { Some((worker, group)) } else { None }
        };
        requests(did).into_iter().find_map(yields)
    };
    let whole_at = |agent: &mut Agent, worker| status(agent, worker, vec![at(whole(), 1, Phase::Serving)]);
    // Both are another worker's, or one is another site's by now.
    for owner in [HERE, THERE] {
        let halves = [half("1:100.64.0.0/28", HERE), half("1:100.64.0.16/28", owner)];
        let here = halves.iter().filter(|half| half.owner == HERE);
        let serving = here.map(|half| at(half.id, 1, Phase::Serving)).collect();
        let (mut agent, _) = settled(halves.to_vec(), serving);
        assert_eq!(yields(&whole_at(&mut agent, WORKERS[1])), Some((WORKERS[1], whole())));
        // The one that serves the parts may answer what it was asked before it was told to divide them.
        assert_eq!(yields(&whole_at(&mut agent, WORKERS[0])), None);
    }
    // They are to become that group again.
    let halves = [half("1:100.64.0.0/28", HERE), half("1:100.64.0.16/28", HERE)];
    let serving = halves.iter().map(|half| at(half.id, 1, Phase::Serving)).collect();
    let (mut agent, _) = settled(halves.to_vec(), serving);
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[1], boot: 1 });
    let gone = halves.iter().map(|half| Change::GroupGone(half.id));
    let merged = Change::Group(group("1:100.64.0.0/27", HERE, 1));
    say(&mut agent, false, gone.chain([merged]).collect());
    assert_eq!(yields(&whole_at(&mut agent, WORKERS[1])), Some((WORKERS[1], whole())));
}

#[test]
fn a_site_that_is_removed_is_forgotten_whether_it_is_heard_or_missed() {
    let known = |agent: &Agent| agent.sites().keys().copied().collect::<Vec<_>>();
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![]);
    assert_eq!(known(&agent), [HERE, THERE]);
    say(&mut agent, false, vec![Change::SiteGone(THERE)]);
    assert_eq!(known(&agent), [HERE]);
    say(&mut agent, false, vec![site(THERE)]);
    assert_eq!(known(&agent), [HERE, THERE]);
    // An agent that was away for long hears only what there is.
    let rest = [site(HERE), Change::Service(service()), Change::Group(group("1:100.64.0.0/27", HERE, 1))];
    say(&mut agent, true, rest.into());
    assert_eq!(known(&agent), [HERE]);
}

#[test]
fn a_worker_that_wakes_with_an_old_copy_does_not_get_what_a_later_move_brings_to_another() {
    let theirs = group("1:100.64.0.0/27", THERE, 3);
    let (mut agent, _) = settled(vec![theirs], Vec::new());
    let coming = Move { from: THERE, to: HERE, epoch: Epoch(4), ..leaving(whole()) };
    say(&mut agent, false, vec![Change::Move(coming)]);
    let target = agent.plan().groups[&whole()].local.unwrap();
    let offer = ToTarget::Offer { session: 1, flows: 0 };
    feed(&mut agent, Input::FromSource { move_id: MoveId(7), from: THERE, message: offer, wire_len: 1 });
    let other = WORKERS.into_iter().find(|worker| *worker != target).unwrap();
    let did = status(&mut agent, other, vec![at(whole(), 2, Phase::Shadow)]);
    assert!(matches!(requests(&did)[..], [(_, Request::Abandon { move_id: MoveId(9), .. })]), "{did:?}");
    assert_eq!(agent.plan().groups[&whole()].local, Some(target));
    // Or it joined when it woke, with the token that the source hands to the other now.
    let did = status(&mut agent, other, vec![at(whole(), 4, Phase::Serving)]);
    assert!(matches!(requests(&did)[..], [(_, Request::Yield { .. })]), "{did:?}");
    assert_eq!(agent.plan().groups[&whole()].local, Some(target));
}

/// The group leaves for another site from another worker than the one that had it, which was taken for dead: agent, and the two.
fn leaves_from_another_worker() -> (Agent, WorkerId, WorkerId) {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let moving = Group { move_id: Some(MoveId(7)), ..mine };
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
    let flipped = Move { phase: MovePhase::Switching, ingresses: vec![HERE, THERE], ..leaving(whole()) };
    say(&mut agent, false, vec![Change::Move(flipped), Change::Group(moving)]);
    agent.worker_lost(WORKERS[0]);
    agent.drive_all(NOW);
    // It begins from nothing at another worker.
    let given = |agent: &Agent, worker| agent.plan().groups[&whole()].local == Some(worker);
    let did = feed(&mut agent, Input::PeerUp(MoveId(7)));
    let offered = |output: &Output| {
        if let Output::ToTarget(_, ToTarget::Offer { session, .. }) = output { Some(*session) } else { None }
    };
    let session = did.iter().find_map(offered).unwrap();
    let accept = ToSource::Accept { session, next: 0 };
    feed(&mut agent, Input::FromTarget(MoveId(7), accept));
    let source = WORKERS.into_iter().find(|worker| given(&agent, *worker)).unwrap();
    let woken = WORKERS.into_iter().find(|worker| *worker != source).unwrap();
    (agent, source, woken)
}

#[test]
fn a_worker_that_wakes_after_its_cut_forgets_what_another_gives_away_by_now() {
    let (mut agent, source, woken) = leaves_from_another_worker();
    let cut = GroupStatus { move_id: Some(MoveId(7)), ..at(whole(), 1, Phase::Relaying) };
    let did = status(&mut agent, woken, vec![cut]);
    let forgets = |request: &(WorkerId, Request)| matches!(request, (worker, Request::Forget { target: THERE, .. }) if *worker == woken);
    assert!(requests(&did).iter().any(forgets), "{did:?}");
    assert_eq!(agent.plan().groups[&whole()].local, Some(source));
}

#[test]
fn a_worker_that_wakes_and_serves_what_another_gives_away_by_now_gives_it_up() {
    let (mut agent, source, woken) = leaves_from_another_worker();
    let did = status(&mut agent, woken, vec![at(whole(), 1, Phase::Serving)]);
    let yields = |(worker, request): &(WorkerId, Request)| {
        *worker == woken && matches!(request, Request::Yield { .. })
    };
    assert!(requests(&did).iter().any(yields), "{did:?}");
    assert_eq!(agent.plan().groups[&whole()].local, Some(source));
}

#[test]
fn rules_name_the_epoch_of_a_group_whose_move_was_taken_back_before_its_flip() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", THERE, 1)], vec![at(whole(), 1, Phase::Tombstone)]);
    let did = say(&mut agent, false, vec![Change::Group(group("1:100.64.0.0/27", THERE, 3))]);
    let rules =
        did.iter().find_map(|output| if let Output::Rules(rules, _) = output { Some(rules) } else { None });
    assert_eq!(**rules.unwrap(), switchctl::compile(&agent.plan()));
    // What rules do not name changes none.
    let moving = Group { move_id: Some(MoveId(7)), ..group("1:100.64.0.0/27", THERE, 3) };
    let did = say(&mut agent, false, vec![Change::Group(moving)]);
    assert!(!did.iter().any(|output| matches!(output, Output::Rules(..))), "{did:?}");
}

#[test]
fn a_worker_that_wakes_gives_up_what_moves_between_two_others_by_now() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let did = feed(&mut agent, Input::MoveLocally(whole(), WORKERS[1]));
    let local = requests(&did).into_iter().find_map(|(_, request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    });
    agent.commit_local(local.unwrap(), NOW);
    let third = WorkerId(2);
    feed(&mut agent, Input::WorkerUp { worker: third, boot: 1 });
    let part = |phase| vec![GroupStatus { move_id: local, ..at(whole(), 1, phase) }];
    status(&mut agent, WORKERS[1], part(Phase::Shadow));
    let did = status(&mut agent, third, vec![at(whole(), 1, Phase::Serving)]);
    let yields = |(worker, request): &(WorkerId, Request)| {
        *worker == third && matches!(request, Request::Yield { .. })
    };
    assert!(requests(&did).iter().any(yields), "{did:?}");
    status(&mut agent, WORKERS[0], part(Phase::Draining));
    assert_eq!(agent.plan().groups[&whole()].local, Some(WORKERS[1]));
    assert!(agent.is_moving_locally(&whole()));
}

#[test]
fn a_worker_that_wakes_in_a_move_between_workers_forgets_what_another_site_has_by_now() {
    wakes_in_a_move_of(whole());
}

#[test]
fn a_worker_that_wakes_in_a_move_between_workers_forgets_a_half_whose_whole_another_site_has_by_now() {
    wakes_in_a_move_of("1:100.64.0.16/28".parse().unwrap());
}

/// The group that it was in a move of is at another site, as it was or in another.
fn wakes_in_a_move_of(had: GroupId) {
    let (mut agent, _) = settled(vec![group("1:100.64.0.0/27", THERE, 2)], Vec::new());
    for (phase, abandons) in [(Phase::Copying, false), (Phase::Relaying, false), (Phase::Shadow, true)] {
        let part = GroupStatus { move_id: Some(MoveId::local(1)), ..at(had, 1, phase) };
        let did = requests(&status(&mut agent, WORKERS[0], vec![part]));
        let told = |(worker, request): &(WorkerId, Request)| {
            let epoch = Epoch(2);
            let forgets = matches!(request, Request::Forget { target: THERE, epoch: e, .. } if *e == epoch);
            let gives_up = matches!(request, Request::Abandon { .. });
            *worker == WORKERS[0] && if abandons { gives_up } else { forgets }
        };
        assert!(did.iter().any(told), "{phase:?}: {did:?}");
        assert!(!did.iter().any(|(_, request)| matches!(request, Request::Disarm { .. })), "{did:?}");
    }
}

/// It was the target of a move between workers, hung, and a third got the group.
#[test]
fn of_a_move_between_workers_nothing_is_left_when_a_third_has_the_group() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let third = WorkerId(2);
    feed(&mut agent, Input::WorkerUp { worker: third, boot: 1 });
    for (worker, has) in [(WORKERS[0], vec![at(whole(), 1, Phase::Serving)]), (WORKERS[1], vec![])] {
        status(&mut agent, worker, has);
    }
    let local = Some(MoveId::local(1));
    let of_move = |phase| GroupStatus { move_id: local, ..at(whole(), 1, phase) };
    let mut did = status(&mut agent, WORKERS[1], vec![of_move(Phase::Relaying)]);
    did.extend(status(&mut agent, third, vec![of_move(Phase::Shadow)]));
    assert!(agent.plan().groups[&whole()].local == Some(WORKERS[0]) && agent.leftovers().is_empty());
    let requests = requests(&did);
    let one = |wanted: fn(&Request) -> bool, by| requests.iter().any(|(w, r)| *w == by && wanted(r));
    assert!(one(|request| matches!(request, Request::Forget { target: HERE, .. }), WORKERS[1]), "{did:?}");
    assert!(one(|request| matches!(request, Request::Abandon { .. }), third), "{did:?}");
    assert!(!requests.iter().any(|(_, r)| matches!(r, Request::Join { .. } | Request::TakeOver { .. })));
}

/// The whole is copied from the first worker to the second, which goes away; gives the move.
fn copied_to_a_worker_that_goes_away(agent: &mut Agent) -> (MoveId, Vec<Output>) {
    agent.move_locally(whole(), WORKERS[1], NOW);
    let prepared = requests(&outputs(agent)).into_iter().find_map(|(_, request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    });
    (prepared.unwrap(), feed(agent, Input::WorkerDown(WORKERS[1])))
}

fn split_of_whole() -> Vec<Change> {
    let halves = [group("1:100.64.0.0/28", HERE, 1), group("1:100.64.0.16/28", HERE, 1)];
    [Change::GroupGone(whole())].into_iter().chain(halves.map(Change::Group)).collect()
}

#[test]
fn a_copy_to_a_worker_that_goes_away_ends_before_the_group_is_split() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let (id, did) = copied_to_a_worker_that_goes_away(&mut agent);
    assert!(requests(&did).contains(&(WORKERS[0], Request::Status)), "{did:?}");
    let split = requests(&say(&mut agent, false, split_of_whole()));
    assert!(!split.iter().any(|(_, request)| matches!(request, Request::Serve { .. })), "{split:?}");
    let copying = GroupStatus { move_id: Some(id), ..at(whole(), 1, Phase::Copying) };
    let did = requests(&status(&mut agent, WORKERS[0], vec![copying]));
    let place = |wanted: fn(&Request) -> bool| did.iter().position(|(_, request)| wanted(request)).unwrap();
    let ends = place(|request| matches!(request, Request::Disarm { .. }));
    assert!(ends < place(|request| matches!(request, Request::Serve { .. })), "{did:?}");
}

/// What it said before was said before the copy began.
#[test]
fn a_copy_that_is_in_the_way_of_a_split_is_ended() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let (id, _) = copied_to_a_worker_that_goes_away(&mut agent);
    status(&mut agent, WORKERS[0], vec![at(whole(), 1, Phase::Serving)]);
    say(&mut agent, false, split_of_whole());
    let copying = GroupStatus { move_id: Some(id), ..at(whole(), 1, Phase::Copying) };
    let did = requests(&status(&mut agent, WORKERS[0], vec![copying]));
    let disarm = Request::Disarm { group: whole(), move_id: id, withdraw: false };
    assert!(did.contains(&(WORKERS[0], disarm)), "{did:?}");
}

/// It hung while its group was split; another has the halves, and gives one of them to another site.
#[test]
fn a_worker_that_wakes_with_a_whole_gives_it_up_also_while_a_half_leaves() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    let (lower, upper) = ("1:100.64.0.0/28".parse().unwrap(), "1:100.64.0.16/28".parse().unwrap());
    say(&mut agent, false, split_of_whole());
    agent.workers.remove(&WORKERS[0]);
    agent.worker_lost(WORKERS[0]);
    let halves = vec![at(lower, 1, Phase::Serving), at(upper, 1, Phase::Serving)];
    status(&mut agent, WORKERS[1], halves);
    let leaves = Move { group: lower, ..leaving(lower) };
    let group = Group { move_id: Some(leaves.id), ..group("1:100.64.0.0/28", HERE, 1) };
    say(&mut agent, false, vec![Change::Group(group), Change::Move(leaves)]);
    // As after a shadow was taken over: no answer has said that the half is served.
    agent.served.remove(&lower);
    feed(&mut agent, Input::WorkerUp { worker: WORKERS[0], boot: 1 });
    let did = requests(&status(&mut agent, WORKERS[0], vec![at(whole(), 1, Phase::Serving)]));
    let yields = |(worker, request): &(WorkerId, Request)| {
        *worker == WORKERS[0] && matches!(request, Request::Yield { group, .. } if *group == whole())
    };
    assert!(did.iter().any(yields), "{did:?}");
}

#[test]
fn a_worker_that_says_what_cannot_be_true_any_more_is_asked_again() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    say(&mut agent, false, split_of_whole());
    let said = requests(&status(&mut agent, WORKERS[0], vec![at(whole(), 1, Phase::Serving)]));
    assert!(!said.contains(&(WORKERS[0], Request::Status)), "not at once: {said:?}");
    let mut later = || {
        agent.handle_timeout(NOW.plus(super::BALANCE_INTERVAL));
        let asked = requests(&outputs(&mut agent));
        asked.contains(&(WORKERS[0], Request::Status))
    };
    assert!(later());
    let halves = ["1:100.64.0.0/28", "1:100.64.0.16/28"];
    let halves = halves.map(|half| at(half.parse().unwrap(), 1, Phase::Serving));
    status(&mut agent, WORKERS[0], halves.to_vec());
    assert!(agent.leftovers().is_empty(), "{:?}", agent.leftovers());
}

/// Else it is stopped, and takes the group and what it holds with it.
#[test]
fn a_worker_that_may_have_a_group_of_a_move_whose_other_worker_went_away_is_not_empty() {
    let (mut agent, _) =
        settled(vec![group("1:100.64.0.0/27", HERE, 1)], vec![at(whole(), 1, Phase::Serving)]);
    // What it said of itself is older than its group.
    feed(&mut agent, Input::Worker(WORKERS[0], Event::Stats(Box::default())));
    agent.move_locally(whole(), WORKERS[1], NOW);
    let prepared = requests(&outputs(&mut agent)).into_iter().find_map(|(_, request)| {
        if let Request::Prepare { move_id, .. } = request { Some(move_id) } else { None }
    });
    agent.commit_local(prepared.unwrap(), NOW);
    feed(&mut agent, Input::WorkerDown(WORKERS[1]));
    let is_empty = |agent: &Agent| agent.worker_views(NOW).map(|views| views[&WORKERS[0]].is_empty);
    assert_eq!(is_empty(&agent), None, "it has not said yet what it has");
    let part = GroupStatus { move_id: prepared, ..at(whole(), 1, Phase::Draining) };
    status(&mut agent, WORKERS[0], vec![part]);
    assert_eq!(is_empty(&agent), Some(false), "it has said that it has it");
}

/// A move between workers was given up, and the switch does not answer, so the copy cannot be either; meanwhile the group leaves the site.
#[test]
fn nothing_is_delivered_for_a_group_that_left_while_a_copy_waited_to_be_given_up() {
    let mine = group("1:100.64.0.0/27", HERE, 1);
    let (mut agent, _) = settled(vec![mine], vec![at(whole(), 1, Phase::Serving)]);
    agent.move_locally(whole(), WORKERS[1], NOW);
    let local = *agent.outgoing.keys().next().unwrap();
    agent.commit_local(local, NOW);
    agent.end_local(local, Ending::Aborted, NOW);
    assert!(agent.leftovers().contains(&"moves between workers that were given up"));

    say(&mut agent, false, vec![Change::Group(Group { owner: THERE, epoch: Epoch(2), ..mine })]);
    let delivers = |agent: &Agent| agent.plan().groups[&whole()].local;
    assert_eq!(delivers(&agent), Some(WORKERS[0]), "it relays what comes by old paths");
    feed(&mut agent, Input::Worker(WORKERS[0], Event::Gone { group: whole(), move_id: MoveId(7) }));
    assert_eq!(delivers(&agent), None);
}
