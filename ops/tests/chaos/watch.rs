//! What is seen of a deployment from outside, all the time: who is ready, which moves are in hand, who owns what, and how late
//! the machine lets a sleeper wake up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flow::{GroupId, Prefix, SiteId};
use limosa::demo::cluster::{Cluster, Part};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::api::Api;
use crate::says::wrong_gauges;

const READY_POLL: Duration = Duration::from_millis(200);
const MOVES_POLL: Duration = Duration::from_millis(120);
const OWNERS_POLL: Duration = Duration::from_millis(500);
const SITES_POLL: Duration = Duration::from_millis(700);
/// The longest that a move is in hand before a look sees it.
const UNSEEN: Duration = Duration::from_secs(1);
/// Who does not answer for so long may have been taken for dead by placement.
const LEASE: Duration = Duration::from_secs(2);
/// Between two looks at the machine.
const NAP: Duration = Duration::from_millis(10);
/// Between two looks at the holds that workers opened.
const HOLDS_POLL: Duration = Duration::from_millis(500);
/// Between two looks at what the kernel let go.
const SPILLS_POLL: Duration = Duration::from_millis(100);
/// A packet may wait for so long, in queues and on its ways, before the kernel lets it or its echo go; and is counted so much later.
pub(crate) const SPILLED_WITHIN: Duration = Duration::from_secs(3);
/// A sleeper is woken up to the millisecond.
const LATE_MIN: Duration = Duration::from_millis(2);
/// Bounds grow by so many times the worst delay of a wake-up: a chain of processes is late at each of its steps.
const LAG_FACTOR: u32 = 25;

/// Time since the world began, the same as that of its marks.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
    offset: Duration,
}

impl Clock {
    pub(crate) fn at(offset: Duration) -> Self {
        Self { origin: Instant::now(), offset }
    }

    pub(crate) fn now(self) -> Duration {
        self.origin.elapsed() + self.offset
    }
}

/// A move as it was seen; it began a little before.
#[derive(Clone, Debug)]
pub(crate) struct MoveSeen {
    pub(crate) group: Prefix,
    pub(crate) from: SiteId,
    pub(crate) to: SiteId,
    pub(crate) state: String,
    pub(crate) begun: Duration,
    pub(crate) ended: Option<Duration>,
}

/// What a process said that was not ready.
struct Complaint {
    at: Duration,
    /// Its checks, each in a line.
    checks: String,
    /// Metrics that said that something was wrong.
    gauges: Vec<&'static str>,
}

#[derive(Default)]
pub(crate) struct Seen {
    /// When it was asked, and whether it was ready; nothing while nobody answers.
    ready: BTreeMap<Part, Vec<(Duration, bool)>>,
    /// What a process said that was not ready.
    complaints: BTreeMap<Part, Vec<Complaint>>,
    /// When a placement node said that a site has a problem, and which.
    problems: BTreeMap<(SiteId, u64), Vec<(Duration, String)>>,
    /// What placement nodes said of Raft: when, who leads, and the revision of their state.
    raft: BTreeMap<u64, Vec<(Duration, Option<u64>, u64)>>,
    pub(crate) moves: BTreeMap<u64, MoveSeen>,
    /// Sites that own a part of a prefix, from a time on.
    owners: BTreeMap<Prefix, Vec<(Duration, BTreeSet<SiteId>)>>,
    /// Groups by owner, as of the last look.
    groups: BTreeMap<SiteId, Vec<String>>,
    /// Wake-ups that were late, and by how much.
    late: Vec<(Duration, Duration)>,
    /// When the kernel let datagrams go at sockets that were full, and how many.
    spills: Vec<(Duration, u64)>,
    /// At which site workers opened holds before what they waited for had come, and between which looks.
    opened: Vec<(SiteId, Duration, Duration)>,
}

pub(crate) struct Watch {
    seen: Arc<Mutex<Seen>>,
    clock: Clock,
    _tasks: JoinSet<()>,
}

pub(crate) fn site_of(name: &Value) -> Option<SiteId> {
    let names = ["amsterdam", "virginia", "singapore"];
    let at = names.iter().position(|known| name == known)?;
    Some(SiteId(u8::try_from(at).ok()? + 1))
}

/// The world's group that a group is, or is a part of.
pub(crate) fn prefix_of(group: &Value) -> Option<Prefix> {
    let id: GroupId = group.as_str()?.parse().ok()?;
    Prefix::containing(id.prefix.nth(0)?, 24).ok()
}

impl Watch {
    pub(crate) fn start(cluster: &Cluster, api: &Api, clock: Clock) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut tasks = JoinSet::new();
        let nodes = (1..).zip(&api.nodes).map(|(id, api)| (Part::Placement(id), api.clone()));
        let agents = cluster.metrics().iter();
        let agents = agents.map(|(site, at)| (Part::Agent(*site), format!("http://{at}")));
        for (part, page) in nodes.chain(agents) {
            tasks.spawn(look_at_readiness(Arc::clone(&seen), api.clone(), clock, part, page));
        }
        for node in 0..api.nodes.len() {
            tasks.spawn(look_at_raft(Arc::clone(&seen), api.clone(), clock, node));
            tasks.spawn(look_at_moves(Arc::clone(&seen), api.clone(), clock, node));
            tasks.spawn(look_at_owners(Arc::clone(&seen), api.clone(), clock, node));
            tasks.spawn(look_at_sites(Arc::clone(&seen), api.clone(), clock, node));
        }
        for (site, at) in cluster.metrics() {
            let page = format!("http://{at}");
            tasks.spawn(look_at_holds(Arc::clone(&seen), api.clone(), clock, *site, page));
        }
        tasks.spawn(look_at_the_machine(Arc::clone(&seen), clock));
        tasks.spawn(look_at_spills(Arc::clone(&seen), clock));
        Self { seen, clock, _tasks: tasks }
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    /// A bound that grows with how late the machine has let others wake up since then.
    pub(crate) fn bound(&self, base: Duration, since: Duration) -> Duration {
        base + self.seen().worst_lag(since, self.clock.now()) * LAG_FACTOR
    }
}

impl Seen {
    pub(crate) fn note_late(&mut self, at: Duration, late: Duration) {
        self.late.push((at, late));
    }

    pub(crate) fn note_spill(&mut self, at: Duration, datagrams: u64) {
        self.spills.push((at, datagrams));
    }

    pub(crate) fn note_opened(&mut self, site: SiteId, (since, until): (Duration, Duration)) {
        self.opened.push((site, since, until));
    }

    /// Whether workers of these sites said that holds were opened before what they waited for had come.
    pub(crate) fn opened_early(&self, sites: &BTreeSet<SiteId>, from: Duration, until: Duration) -> bool {
        let meets = |since: Duration, at: Duration| since <= until && from <= at;
        self.opened.iter().any(|(site, since, at)| sites.contains(site) && meets(*since, *at))
    }

    /// Datagrams that the kernel let go at full sockets and that may have been sent in that time.
    pub(crate) fn spilled(&self, from: Duration, until: Duration) -> u64 {
        let within = |at: &Duration| *at >= from && *at <= until.saturating_add(SPILLED_WITHIN);
        self.spills.iter().filter(|(at, _)| within(at)).map(|(_, datagrams)| datagrams).sum()
    }

    pub(crate) fn worst_lag(&self, since: Duration, until: Duration) -> Duration {
        let within = self.late.iter().filter(|(at, _)| *at >= since && *at <= until);
        within.map(|(_, late)| *late).max().unwrap_or_default()
    }

    pub(crate) fn note_ready(&mut self, part: Part, asked: Duration, ready: bool) {
        self.ready.entry(part).or_default().push((asked, ready));
    }

    /// The first time from then on at which it was asked and was ready.
    pub(crate) fn ready_from(&self, part: Part, since: Duration) -> Option<Duration> {
        let looks = self.ready.get(&part)?;
        let first = looks.partition_point(|(at, _)| *at < since);
        looks[first..].iter().find(|(_, ready)| *ready).map(|(at, _)| *at)
    }

    /// Since when it had not answered at that time, if that was for longer than a lease in all.
    pub(crate) fn gone_since(&self, part: Part, at: Duration) -> Option<Duration> {
        let looks = self.ready.get(&part)?;
        let next = looks.partition_point(|(asked, _)| *asked < at);
        let (before, _) = looks[..next].last()?;
        let after = looks.get(next).map_or(Duration::MAX, |(asked, _)| *asked);
        (after.saturating_sub(*before) >= LEASE).then_some(*before)
    }

    /// When it did not answer for longer than a lease, from its last answer to the first one after, which was in that time.
    pub(crate) fn away(&self, part: Part, from: Duration, until: Duration) -> Option<(Duration, Duration)> {
        let looks = self.ready.get(&part)?;
        let first = looks.partition_point(|(at, _)| *at < from).saturating_sub(1);
        let last = looks.partition_point(|(at, _)| *at <= until);
        let mut pairs = looks[first.min(last)..last].windows(2).map(|pair| (pair[0].0, pair[1].0));
        pairs.find(|(before, after)| after.saturating_sub(*before) >= LEASE)
    }

    /// Whether it answered from before that time on to its end, without a gap in which it may have been away.
    pub(crate) fn answered_all(&self, part: Part, from: Duration, until: Duration) -> bool {
        let looks = self.ready.get(&part).map_or(&[][..], Vec::as_slice);
        let first = looks.partition_point(|(at, _)| *at <= from);
        let last = looks.partition_point(|(at, _)| *at < until);
        if first == 0 || last == looks.len() {
            return false;
        }
        looks[first - 1..=last].windows(2).all(|pair| pair[1].0.saturating_sub(pair[0].0) < LEASE)
    }

    pub(crate) fn note_complaint(
        &mut self,
        part: Part,
        at: Duration,
        checks: &str,
        gauges: Vec<&'static str>,
    ) {
        let checks = checks.to_owned();
        self.complaints.entry(part).or_default().push(Complaint { at, checks, gauges });
    }

    fn complaints(&self, part: Part, from: Duration, until: Duration) -> impl Iterator<Item = &Complaint> {
        let all = self.complaints.get(&part).into_iter().flatten();
        all.filter(move |complaint| complaint.at >= from && complaint.at <= until)
    }

    /// Whether it was ready when it was asked last before that time.
    pub(crate) fn was_ready_just_before(&self, part: Part, at: Duration) -> bool {
        let looks = self.ready.get(&part).map_or(&[][..], Vec::as_slice);
        let next = looks.partition_point(|(asked, _)| *asked < at);
        next.checked_sub(1).is_some_and(|last| looks[last].1)
    }

    /// Whether it said in that time that one of these checks fails.
    pub(crate) fn complained(&self, part: Part, checks: &[&str], from: Duration, until: Duration) -> bool {
        let fails = |line: &str| {
            line.strip_prefix("[-] ").is_some_and(|line| checks.iter().any(|check| line.starts_with(check)))
        };
        self.complaints(part, from, until).any(|complaint| complaint.checks.lines().any(fails))
    }

    /// Whether one of these metrics said in that time that something is wrong.
    pub(crate) fn had_gauge(&self, part: Part, gauges: &[&str], from: Duration, until: Duration) -> bool {
        self.complaints(part, from, until).any(|one| one.gauges.iter().any(|gauge| gauges.contains(gauge)))
    }

    pub(crate) fn note_problem(&mut self, site: SiteId, node: u64, at: Duration, problem: &str) {
        self.problems.entry((site, node)).or_default().push((at, problem.to_owned()));
    }

    /// Whether a placement node said in that time that a site has a problem that is told with one of these words.
    pub(crate) fn had_problem(
        &self,
        site: SiteId,
        node: u64,
        words: &[&str],
        from: Duration,
        until: Duration,
    ) -> bool {
        let said = self.problems.get(&(site, node)).into_iter().flatten();
        said.filter(|(at, _)| *at >= from && *at <= until)
            .any(|(_, problem)| words.iter().any(|word| problem.contains(word)))
    }

    pub(crate) fn note_raft(&mut self, node: u64, at: Duration, leader: Option<u64>, revision: u64) {
        self.raft.entry(node).or_default().push((at, leader, revision));
    }

    /// Whom a placement node took for the leader in that time.
    pub(crate) fn leaders(
        &self,
        node: u64,
        from: Duration,
        until: Duration,
    ) -> impl Iterator<Item = Option<u64>> {
        let all = self.raft.get(&node).into_iter().flatten();
        all.filter(move |(at, ..)| *at >= from && *at <= until).map(|(_, leader, _)| *leader)
    }

    /// Looks at a placement node that had been ready for longer than the bound, and of these the first at which it lacked what any node had
    /// before that time.
    pub(crate) fn stale(&self, node: u64, bound: Duration) -> (u64, Option<Duration>) {
        let mut looked = 0;
        for &(at, _, revision) in self.raft.get(&node).into_iter().flatten() {
            let lag = self.worst_lag(at.saturating_sub(2 * bound), at);
            let since = at.saturating_sub(bound + lag * LAG_FACTOR);
            if !self.was_ready_all(Part::Placement(node), since, at) {
                continue;
            }
            looked += 1;
            if revision < self.newest_by(since) {
                return (looked, Some(at));
            }
        }
        (looked, None)
    }

    fn was_ready_all(&self, part: Part, from: Duration, until: Duration) -> bool {
        let looks = self.ready.get(&part).into_iter().flatten();
        let mut within = looks.filter(|(at, _)| *at >= from && *at <= until);
        self.answered_all(part, from, until.saturating_sub(LEASE)) && within.all(|(_, ready)| *ready)
    }

    /// The newest revision that any placement node had by then.
    fn newest_by(&self, at: Duration) -> u64 {
        let of = |looks: &Vec<(Duration, Option<u64>, u64)>| {
            let next = looks.partition_point(|(then, ..)| *then <= at);
            next.checked_sub(1).map(|last| looks[last].2)
        };
        self.raft.values().filter_map(of).max().unwrap_or(0)
    }

    /// Names of groups that a site owns.
    pub(crate) fn groups_at(&self, site: SiteId) -> Vec<String> {
        self.groups.get(&site).cloned().unwrap_or_default()
    }

    /// Moves in hand.
    pub(crate) fn in_hand(&self) -> impl Iterator<Item = (u64, &MoveSeen)> {
        self.moves.iter().filter(|(_, seen)| seen.ended.is_none()).map(|(id, seen)| (*id, seen))
    }

    /// Moves of a group that were in hand in that time.
    pub(crate) fn moves_of(
        &self,
        group: Prefix,
        from: Duration,
        until: Duration,
    ) -> impl Iterator<Item = &MoveSeen> {
        self.moves.values().filter(move |seen| {
            seen.group == group && seen.begun <= until && seen.ended.is_none_or(|ended| ended >= from)
        })
    }

    /// Sites that owned a part of a group in that time, or were source or target of a move of it.
    pub(crate) fn sites_of(&self, group: Prefix, from: Duration, until: Duration) -> BTreeSet<SiteId> {
        let owners = self.owners.get(&group).map_or(&[][..], Vec::as_slice);
        let first = owners.partition_point(|(at, _)| *at <= from).saturating_sub(1);
        let present = owners[first.min(owners.len())..].iter().take_while(|(at, _)| *at <= until);
        let mut sites: BTreeSet<SiteId> = present.flat_map(|(_, sites)| sites.iter().copied()).collect();
        sites.extend(self.moves_of(group, from, until).flat_map(|seen| [seen.from, seen.to]));
        sites
    }

    pub(crate) fn add_moves(&mut self, page: &Value, asked: Duration, now: Duration) {
        for one in page["moves"].as_array().into_iter().flatten() {
            let parts =
                (one["id"].as_u64(), prefix_of(&one["group"]), site_of(&one["from"]), site_of(&one["to"]));
            let (Some(id), Some(group), Some(from), Some(to)) = parts else { continue };
            let begun = asked.saturating_sub(UNSEEN);
            let state = one["state"].as_str().unwrap_or_default().to_owned();
            let ended = !one["ended"].is_null();
            let fresh = MoveSeen { group, from, to, state: state.clone(), begun, ended: None };
            let seen = self.moves.entry(id).or_insert(fresh);
            // A node that lags may still tell of a move that has ended.
            if seen.ended.is_none() {
                seen.state = state;
                seen.ended = ended.then_some(now);
            }
        }
    }

    pub(crate) fn add_owners(&mut self, page: &Value, now: Duration) {
        let mut owners: BTreeMap<Prefix, BTreeSet<SiteId>> = BTreeMap::new();
        let mut groups: BTreeMap<SiteId, Vec<String>> = BTreeMap::new();
        for group in page["groups"].as_array().into_iter().flatten() {
            if let (Some(prefix), Some(owner)) = (prefix_of(&group["group"]), site_of(&group["owner"])) {
                owners.entry(prefix).or_default().insert(owner);
                let name = group["group"].as_str().unwrap_or_default();
                groups.entry(owner).or_default().push(name.to_owned());
            }
        }
        self.groups = groups;
        for (prefix, sites) in owners {
            let known = self.owners.entry(prefix).or_default();
            if known.last().is_none_or(|(_, last)| *last != sites) {
                known.push((now, sites));
            }
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `page` is where a process has its pages.
async fn look_at_readiness(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, part: Part, page: String) {
    loop {
        let asked = clock.now();
        let answer = api.page(&format!("{page}/readyz")).await;
        if let Some((status, checks)) = answer {
            lock(&seen).note_ready(part, asked, status == 200);
            if status != 200 {
                let metrics = api.page(&format!("{page}/metrics")).await.unwrap_or_default().1;
                lock(&seen).note_complaint(part, asked, &checks, wrong_gauges(&metrics));
            }
        }
        sleep(READY_POLL).await;
    }
}

async fn look_at_raft(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, node: usize) {
    loop {
        if let Some(status) = api.at(node, "/v1/raft").await {
            let revision = status["revision"].as_u64().unwrap_or(0);
            lock(&seen).note_raft(node as u64 + 1, clock.now(), status["leader"].as_u64(), revision);
        }
        sleep(READY_POLL).await;
    }
}

async fn look_at_moves(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, node: usize) {
    loop {
        let asked = clock.now();
        if let Some(page) = api.at(node, "/v1/moves?limit=60&consistency=stale").await {
            lock(&seen).add_moves(&page, asked, clock.now());
        }
        sleep(MOVES_POLL).await;
    }
}

async fn look_at_owners(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, node: usize) {
    loop {
        if let Some(page) = api.at(node, "/v1/groups?consistency=stale").await {
            lock(&seen).add_owners(&page, clock.now());
        }
        sleep(OWNERS_POLL).await;
    }
}

async fn look_at_sites(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, node: usize) {
    loop {
        if let Some(page) = api.at(node, "/v1/sites").await {
            let now = clock.now();
            for site in page["sites"].as_array().into_iter().flatten() {
                let Some(id) = site_of(&site["name"]) else { continue };
                for problem in site["problems"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    lock(&seen).note_problem(id, node as u64 + 1, now, problem);
                }
            }
        }
        sleep(SITES_POLL).await;
    }
}

/// The machine is measured, never the deployment: a task that sleeps for a moment notes how late it wakes.
async fn look_at_the_machine(seen: Arc<Mutex<Seen>>, clock: Clock) {
    loop {
        let due = clock.now() + NAP;
        sleep(NAP).await;
        let now = clock.now();
        let late = now.saturating_sub(due);
        if late > LATE_MIN {
            lock(&seen).note_late(now, late);
        }
    }
}

/// Loopback has no back pressure: a switch that goes on after a stop, or whose neighbour the machine does not run, sends faster than that
/// one reads, and what its socket cannot hold is let go by the kernel, which counts it.
/// Counters of holds that were opened early, by worker and cause.
fn holds_opened(metrics: &str) -> BTreeMap<&str, u64> {
    let lines = metrics.lines().filter(|line| line.starts_with("limosa_worker_holds_opened"));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(name, count)| Some((name, count.parse().ok()?)))
        .collect()
}

async fn look_at_holds(seen: Arc<Mutex<Seen>>, api: Api, clock: Clock, site: SiteId, page: String) {
    let (mut before, mut looked) = (BTreeMap::<String, u64>::new(), Duration::ZERO);
    loop {
        sleep(HOLDS_POLL).await;
        let asked = clock.now();
        let Some((_, text)) = api.page(&format!("{page}/metrics")).await else { continue };
        let now = holds_opened(&text);
        // Who has begun anew counts from nothing.
        let more =
            now.iter().any(|(name, count)| *count > 0 && before.get(*name).is_none_or(|old| old != count));
        if more && looked > Duration::ZERO {
            lock(&seen).note_opened(site, (looked, clock.now()));
        }
        before = now.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        looked = asked;
    }
}

async fn look_at_spills(seen: Arc<Mutex<Seen>>, clock: Clock) {
    let mut before = spilled_so_far();
    loop {
        sleep(SPILLS_POLL).await;
        let now = spilled_so_far();
        if let (Some(before), Some(now)) = (before, now)
            && now > before
        {
            lock(&seen).note_spill(clock.now(), now - before);
        }
        before = now.or(before);
    }
}

/// `RcvbufErrors` of `/proc/net/snmp`, of all sockets of this network namespace.
fn spilled_so_far() -> Option<u64> {
    spilled_in(&std::fs::read_to_string("/proc/net/snmp").ok()?)
}

fn spilled_in(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    names.zip(values).find(|(name, _)| *name == "RcvbufErrors")?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_that_were_opened_are_read_by_worker_and_cause() {
        let text = "limosa_worker_holds_opened_early{cause=\"full\",worker=\"1\",site=\"a\"} 3\nlimosa_workers_silent 1\n";
        assert_eq!(holds_opened(text).into_values().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn each_part_of_a_group_belongs_to_the_clients_of_the_world_that_it_has() {
        let of = |group: &str| prefix_of(&group.into()).map(|prefix| prefix.to_string());
        for group in ["1:100.64.3.0/24", "1:100.64.3.0/25", "2:100.64.3.128/25", "2:100.64.3.192/26"] {
            assert_eq!(of(group).as_deref(), Some("100.64.3.0/24"), "{group}");
        }
        assert_eq!(of("nonsense"), None);
    }

    #[test]
    fn a_node_that_says_that_it_is_ready_has_what_was_committed_before() {
        let s = Duration::from_secs;
        let mut seen = Seen::default();
        for at in 0..40 {
            seen.note_ready(Part::Placement(2), s(at), true);
            seen.note_raft(1, s(at), Some(1), 100 + at);
            seen.note_raft(2, s(at), Some(1), 100 + at.min(20));
        }
        assert_eq!(seen.stale(2, s(9)).1, Some(s(30)), "at 30 s it lacks what was there at 21 s");
        assert_eq!(seen.stale(2, s(30)).1, None);
        let mut waits = Seen::default();
        for at in 0..40 {
            waits.note_ready(Part::Placement(2), s(at), at < 25);
            waits.note_raft(1, s(at), Some(1), 100 + at);
            waits.note_raft(2, s(at), Some(1), 100 + at.min(20));
        }
        assert_eq!(waits.stale(2, s(9)).1, None, "it said so");
    }

    #[test]
    fn what_the_kernel_let_go_is_read_and_belongs_to_what_was_sent_shortly_before() {
        let snmp = "Tcp: a b\nTcp: 1 2\nUdp: InDatagrams RcvbufErrors SndbufErrors\nUdp: 50 48 0\nUdpLite: RcvbufErrors\n";
        assert_eq!(spilled_in(snmp), Some(48));
        assert_eq!((spilled_in("Udp: InDatagrams\nUdp: 7\n"), spilled_in("")), (None, None));
        let mut seen = Seen::default();
        let s = Duration::from_secs;
        seen.note_spill(s(10), 40);
        seen.note_spill(s(12), 2);
        assert_eq!(seen.spilled(s(9), s(10)), 42);
        assert_eq!(seen.spilled(s(11), s(12)), 2);
        assert_eq!(seen.spilled(s(5), s(6)), 0);
    }
}
