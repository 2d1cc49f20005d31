//! Placement: one log in which proposals are committed late or twice, lost with a leader, or answered by nobody; watchers that
//! hear of it late, twice or anew; the real leader's brain, and an operator who tries everything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use flow::nat::{NatSlices, NatSpec};
use flow::{GroupId, ServiceId, SiteId};
use limosa::site::core::Input;
use placement::core::leader::{Brain, BrainTimings};
use placement::core::{
    Admin, Change, Cluster, Command, MoveOutcome, MoveReason, Ordering, Policy, Proof, Proposal, Service,
    SiteReport, SiteSpec, Timeouts,
};

use crate::mutation::Mutation;
use crate::world::{Checked, Happening, Queue, SITES, World};

/// How often an operator asks for the same.
const TRIES_MAX: u32 = 30;
/// An agent whose watch is not answered asks another node after so long.
const WATCH_GRACE: u64 = 1_000_000;

/// Another node leads after so long at most.
const LEADERLESS_MAX: u64 = 400_000;

/// The shortest timeout of a flow: short, so that flows expire within a seed.
pub(crate) const TIMEOUT_S: u32 = 3;

/// Outside ports of a subscriber, and the first of an address.
pub(crate) const BLOCK_LEN: u16 = 1_008;
pub(crate) const FIRST_PORT: u16 = 1_024;

/// Who the leader's own proposals are from.
const LEADER: &str = "leader";

/// Groups are cut into this length.
const GROUP_LEN: u8 = 27;

/// A client's wish: kept until the log has answered.
pub(crate) struct Ticket {
    pub(crate) proposal: Proposal,
    pub(crate) origin: Option<(SiteId, u32)>,
    pub(crate) tries: u32,
}

/// A proposal on its way, for whom it is and whose it is.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    ticket: u64,
    proposal: Proposal,
    origin: Option<(SiteId, u32)>,
}

pub(crate) struct Log {
    pub(crate) cluster: Cluster,
    /// Accepted by the leader, not committed.
    pub(crate) appended: VecDeque<(u64, Asked)>,
    /// Tickets that were committed.
    committed: BTreeSet<u64>,
    /// The leader has no majority until then.
    alone_until: u64,
    index: u64,
    pub(crate) changes: Vec<Vec<Change>>,
    pub(crate) tickets: BTreeMap<u64, Ticket>,
    brain: Brain,
    /// Nobody leads until then.
    pub(crate) leaderless_until: u64,
    /// A node that does not lead does nothing until then: what it was asked it passes on when it wakes.
    pub(crate) node_stopped_until: u64,
    started: u64,
}

fn timings() -> BrainTimings {
    use flow::Micros;
    BrainTimings {
        lease: Micros(1_500_000),
        preparing_max: Micros(4_000_000),
        round: Micros(1_000_000),
        retry: Micros(2_000_000),
    }
}

fn service(id: u8, clients: &str, pool: &str, ordering: Ordering) -> Option<Service> {
    Some(Service {
        id: ServiceId::new(id).ok()?,
        name: format!("nat-{id}"),
        nat: NatSpec {
            clients: vec![clients.parse().ok()?],
            pool: vec![pool.parse().ok()?],
            ports_per_subscriber: BLOCK_LEN,
            first_port: FIRST_PORT,
            port_key: 77,
        },
        timeouts: Timeouts {
            udp_s: TIMEOUT_S,
            tcp_established_s: 2 * TIMEOUT_S,
            tcp_transitory_s: TIMEOUT_S,
            icmp_s: TIMEOUT_S,
        },
        ordering,
        group_len: GROUP_LEN,
    })
}

fn specs() -> Vec<Service> {
    // Two groups share each outside address, so that port masks count.
    let strict = service(1, "100.64.0.0/25", "198.51.100.0/30", Ordering::Strict);
    let relaxed = service(2, "100.65.0.0/26", "198.51.101.0/30", Ordering::Relaxed);
    strict.into_iter().chain(relaxed).collect()
}

pub(crate) fn services() -> BTreeMap<ServiceId, NatSlices> {
    specs().into_iter().filter_map(|service| Some((service.id, NatSlices::new(service.nat).ok()?))).collect()
}

impl Log {
    /// Three sites that are alive, two services.
    pub(crate) fn new(flip_lead_ms: u32) -> Self {
        let brain = Brain::new(timings(), None, flow::Micros(0));
        let mut log = Self {
            cluster: Cluster::default(),
            appended: VecDeque::new(),
            committed: BTreeSet::new(),
            alone_until: 0,
            index: 0,
            changes: Vec::new(),
            tickets: BTreeMap::new(),
            brain,
            leaderless_until: 0,
            node_stopped_until: 0,
            started: 0,
        };
        for id in SITES {
            let (name, endpoint) = (format!("site-{id}"), format!("site-{id}:1"));
            let spec = SiteSpec {
                id,
                name,
                latitude: None,
                longitude: None,
                endpoint,
                capacity_pps: 1_000_000,
                capacity_flows: None,
                capacity_bps: None,
                failure_domain: None,
            };
            log.apply(&by_operator(Command::PutSite(spec)));
            log.apply(&by_operator(Command::SetAlive { site: id, alive: true }));
        }
        let policy = Policy {
            automatic: false,
            min_dwell_s: 0,
            flip_lead_ms,
            rest_after_move_ms: 2_000,
            ..Policy::default()
        };
        log.apply(&by_operator(Command::PutPolicy { policy, expected_version: 0, confirm_within_ms: None }));
        for service in specs() {
            log.apply(&by_operator(Command::PutService { service, owner: None }));
        }
        log
    }

    fn apply(&mut self, proposal: &Proposal) -> (Vec<Change>, bool) {
        self.index += 1;
        let applied = self.cluster.apply(self.index, proposal);
        if !applied.changes.is_empty() {
            self.changes.push(applied.changes.clone());
        }
        (applied.changes, applied.result.is_ok())
    }

    /// The group that a client belongs to now.
    pub(crate) fn leaf(&self, root: &GroupId, client: std::net::Ipv4Addr) -> GroupId {
        let leaf = |id: &&GroupId| id.service == root.service && id.prefix.contains(client.into());
        self.cluster.groups.keys().find(leaf).copied().unwrap_or(*root)
    }

    pub(crate) fn is_relaxed(&self, group: &GroupId) -> bool {
        self.cluster.services.get(&group.service).is_some_and(|service| service.ordering == Ordering::Relaxed)
    }
}

/// The group that it was cut into at first: traffic is filed by these.
pub(crate) fn root(group: GroupId) -> GroupId {
    let prefix = flow::Prefix::containing(group.prefix.address(), GROUP_LEN).unwrap_or(group.prefix);
    GroupId { prefix, ..group }
}

fn by_operator(command: Command) -> Proposal {
    Proposal { actor: "operator".into(), at_ms: 0, command }
}

impl World {
    /// Sends a ticket to the leader, and again when nothing was heard of it.
    pub(crate) fn submit(&mut self, ticket: u64) {
        let Some(entry) = self.log.tickets.get(&ticket) else { return };
        let asked = Asked { ticket, proposal: entry.proposal.clone(), origin: entry.origin };
        let delay = if self.one_in(5) { self.between(1_000, 150_000) } else { self.between(500, 10_000) };
        // Whoever asks does not wait for it.
        let asleep = self.asks_a_stopped_node().unwrap_or(0);
        self.counts.add("proposals to a node that was stopped", u64::from(asleep > 0));
        self.after(asleep + delay, Happening::Propose(Box::new(asked)));
        let again = delay + self.between(150_000, 400_000);
        self.after(again, Happening::Retry(ticket));
    }

    /// How long the node that is asked now does nothing, if it is the one that is stopped.
    fn asks_a_stopped_node(&mut self) -> Option<u64> {
        let left = self.log.node_stopped_until.checked_sub(self.now).filter(|left| *left > 0)?;
        self.one_in(2).then_some(left)
    }

    pub(crate) fn retry(&mut self, ticket: u64) {
        let Some(entry) = self.log.tickets.get_mut(&ticket) else { return };
        entry.tries += 1;
        let (tries, origin) = (entry.tries, entry.origin);
        if let Some(until) = origin.and_then(|(site, _)| self.stopped(site)) {
            return self.schedule.at(until, Happening::Retry(ticket));
        }
        let alive = origin.is_none_or(|(site, life)| self.life(site, life).is_some());
        // Only a person gives up.
        let given_up = origin.is_none() && tries > TRIES_MAX;
        if given_up || !alive {
            self.log.tickets.remove(&ticket);
        } else {
            self.submit(ticket);
        }
    }

    /// A proposal reaches the leader, which appends it to its log. Whether the client still waits makes no difference.
    pub(crate) fn proposed(&mut self, asked: Asked) {
        let site = asked.origin.and_then(|(site, _)| self.sites.get(&site));
        let cut_off = site.map_or(0, |state| state.cut_off_until);
        let nobody_leads = self.log.leaderless_until > self.now;
        if cut_off > self.now || nobody_leads {
            // The client hears nothing, and asks again.
            return;
        }
        let number = self.number();
        self.log.appended.push_back((number, asked));
        let round = if self.one_in(8) { self.between(500, 60_000) } else { self.between(500, 8_000) };
        self.in_order(Queue::Commit, round, Happening::Commit(number));
    }

    /// A majority has an entry, if the leader has it still.
    pub(crate) fn commit(&mut self, number: u64) -> Checked {
        let until = self.log.leaderless_until.max(self.log.alone_until);
        if self.log.appended.iter().all(|(known, _)| *known != number) {
            return Ok(());
        }
        if until > self.now {
            let wait = until - self.now + 1;
            self.in_order(Queue::Commit, wait, Happening::Commit(number));
            return Ok(());
        }
        // What is ahead of it is committed with it.
        while let Some((first, asked)) = self.log.appended.pop_front() {
            self.apply(asked)?;
            if first == number {
                break;
            }
        }
        Ok(())
    }

    fn apply(&mut self, asked: Asked) -> Checked {
        let Asked { ticket, proposal, .. } = asked;
        let again = !self.log.committed.insert(ticket);
        self.counts.add("proposals committed more than once", u64::from(again));
        let before = self.log.cluster.moves.clone();
        if let Command::TakeBack { move_id, proof: Proof::Fenced, .. } = &proposal.command
            && let Some(mv) = before.get(move_id)
        {
            self.checks.outcomes.fenced(mv);
        }
        let (changes, accepted) = self.log.apply(&proposal);
        self.trace(|| format!("log: {:?} accepted={accepted} again={again}", proposal.command));
        // An answer may be lost; then the client asks again.
        if !self.one_in(12) {
            self.log.tickets.remove(&ticket);
        }
        for change in &changes {
            self.note_change(change, &before);
            self.checks.outcomes.committed(change, &before)?;
        }
        if !changes.is_empty() {
            SITES.into_iter().for_each(|site| self.poke_watch(site));
        }
        Ok(())
    }

    fn note_change(&mut self, change: &Change, before: &BTreeMap<flow::MoveId, placement::core::Move>) {
        self.counts.add("sites removed", u64::from(matches!(change, Change::SiteGone(_))));
        if let Change::Site(site) = change
            && !site.alive
        {
            self.dead_once.insert(site.id);
        }
        if let Change::MoveEnded { id, group, outcome: MoveOutcome::TakenBack } = change {
            // What the target holds comes back when it hears of it, behind what is served meanwhile; what a relaxed target has
            // opened is gone.
            self.excuses.shuffle(*group);
            if before.get(id).is_some_and(|mv| mv.ordering == Ordering::Relaxed) {
                self.excuses.lose(*group);
            }
        }
        let Change::Move(mv) = change else { return };
        self.checks.delays.moves(self.now, root(mv.group), [mv.from, mv.to]);
        if mv.take_over && !before.get(&mv.id).is_some_and(|old| old.take_over) {
            self.excuses.lose(mv.group);
        }
    }

    /// A watcher has something to hear.
    pub(crate) fn poke_watch(&mut self, site: SiteId) {
        let Some(life) = self.sites.get(&site).and_then(|state| state.life.as_ref()) else { return };
        let number = life.number;
        let asleep = self.asks_a_stopped_node().unwrap_or(0).min(WATCH_GRACE);
        let delay = if self.one_in(6) { self.between(1_000, 120_000) } else { self.between(500, 20_000) };
        let delay = asleep + delay;
        self.in_order(Queue::Watch(site), delay, Happening::Watch(site, number));
    }

    pub(crate) fn watch(&mut self, site: SiteId, number: u32) {
        let now = self.now;
        let cut_off = self.sites.get(&site).map_or(0, |state| state.cut_off_until);
        if cut_off > now {
            return self.after(cut_off - now + 5_000, Happening::Watch(site, number));
        }
        let stopped_until = self.stopped(site);
        let anew = self.mode.faults && self.one_in(40);
        let in_parts = self.mode.faults && self.one_in(8);
        let (latest, snapshot) = (self.log.changes.len(), self.log.cluster.snapshot_changes());
        let Some(life) = self.life(site, number) else { return };
        if let Some(until) = stopped_until
            && life.answered_until > now
        {
            return self.schedule.at(until + 1, Happening::Watch(site, number));
        }
        life.answered_until = stopped_until.unwrap_or(0);
        let reset = std::mem::take(&mut life.fresh) || anew;
        let from = life.watched;
        // As an answer that would be too long.
        let to = if in_parts && !reset && from < latest { from + 1 } else { latest };
        life.watched = to;
        let catches_up = std::mem::take(&mut life.catches_up);
        if from == to && !reset && !catches_up {
            return;
        }
        let mut changes = if reset { snapshot } else { self.log.changes[from..to].concat() };
        if self.mutation == Some(Mutation::EndUnheard) && site == SITES[2] {
            // Source and target would be stuck, which another check finds.
            let other = |id: &flow::MoveId| {
                let ended = self.log.cluster.finished.iter().find(|ended| ended.last.id == *id);
                ended.is_some_and(|ended| ended.last.from != site && ended.last.to != site)
            };
            changes.retain(|change| !matches!(change, Change::MoveEnded { id, .. } if other(id)));
        }
        let (revision, more, asked_at) = (to as u64, to < latest, self.micros());
        if more {
            self.poke_watch(site);
        }
        // No clock of the three is right.
        let wall_ms = (self.now / 1_000).saturating_add(u64::from(site.0) * 40).saturating_sub(60);
        let input = Input::Placement { asked_at, more, revision, wall_ms, reset, changes };
        self.agent_input(site, number, input);
    }

    pub(crate) fn report(&mut self, site: SiteId) {
        if let Some(until) = self.stopped(site) {
            // An interval that was missed is made up for.
            return self.schedule.at(until, Happening::Report(site));
        }
        self.after(200_000, Happening::Report(site));
        let now = self.micros();
        let Some(state) = self.sites.get(&site) else { return };
        if state.life.is_some() && state.cut_off_until <= now.0 {
            self.log.brain.handle_report(&SiteReport { site, ..SiteReport::default() }, now);
        }
    }

    /// The leader goes on alone: it accepts what is proposed, and nothing is committed until another leads.
    pub(crate) fn leader_alone(&mut self) -> u64 {
        let span = self.between(20_000, 500_000);
        self.log.alone_until = self.log.alone_until.max(self.now + span);
        self.after(span, Happening::LeaderChange);
        span + LEADERLESS_MAX
    }

    /// The next leader has the log of a majority: of what was not committed perhaps the beginning, and nothing after that.
    pub(crate) fn leader_change(&mut self) -> u64 {
        self.log.alone_until = 0;
        self.log.leaderless_until = self.now + self.between(10_000, LEADERLESS_MAX);
        let kept = self.rng.below(self.log.appended.len() as u64 + 1);
        let lost = self.log.appended.split_off(kept as usize);
        self.counts.add("proposals lost with their leader", lost.len() as u64);
        self.counts.add("proposals committed by the next leader", kept);
        // The leader's own wishes end with it.
        self.log.tickets.retain(|_, ticket| ticket.proposal.actor != LEADER);
        self.log.brain = Brain::new(timings(), None, self.micros());
        self.trace(|| format!("the leader is gone, {kept} proposals stay, {} do not", lost.len()));
        self.log.leaderless_until - self.now
    }

    pub(crate) fn brain(&mut self) {
        self.after(50_000, Happening::Brain);
        self.look_at_stopped_switches();
        self.watch_again();
        if self.log.leaderless_until > self.now {
            return;
        }
        for command in self.log.brain.poll(&self.log.cluster, self.micros()) {
            let pending = self.log.tickets.values().any(|ticket| ticket.proposal.command == command);
            if !pending {
                self.propose(LEADER, command, None);
            }
        }
    }

    /// An operator who moves, drains, aborts and retires workers at random.
    pub(crate) fn operator(&mut self) {
        if self.now >= self.busy_until {
            return;
        }
        let wait = self.between(50_000, 500_000);
        self.after(wait, Happening::Operator);
        self.log.started += 1;
        let groups: Vec<_> = self.log.cluster.groups.keys().copied().collect();
        let command = match self.rng.below(20) {
            0 if self.mode.faults => {
                let (site, draining) = (self.pick(&SITES), self.one_in(2));
                Command::SetAdmin { site, admin: if draining { Admin::Draining } else { Admin::Active } }
            }
            1 if self.mode.faults => {
                let Some(id) = self.log.cluster.moves.keys().next().copied() else { return };
                Command::Abort { move_id: id, by: None, reason: "operator".into() }
            }
            2 | 3 => return self.retire_or_recall(),
            4..=6 => Command::SplitGroup { group: self.pick(&groups) },
            7..=10 => {
                let half = self.pick(&groups);
                let Some(prefix) = half.prefix.parent() else { return };
                Command::MergeGroups { group: flow::GroupId { prefix, ..half } }
            }
            _ => {
                // Often one that came to its site a moment ago: not all may have heard of that.
                let came = self.log.cluster.finished.back().map(|ended| ended.last.group);
                let came = came.filter(|id| self.log.cluster.groups.contains_key(id));
                let group = match came {
                    Some(group) if self.one_in(2) => group,
                    _ => self.pick(&groups),
                };
                let to = self.pick(&SITES);
                Command::StartMoves { moves: vec![(group, to)], reason: MoveReason::Operator }
            }
        };
        self.propose("operator", command, None);
    }

    /// The last worker of a site is to have no groups, or is one like the others again.
    fn retire_or_recall(&mut self) {
        let (site, recall) = (self.pick(&SITES), self.one_in(3));
        let Some(state) = self.sites.get(&site) else { return };
        let (Some(life), Some(worker)) = (&state.life, state.workers.keys().next_back().copied()) else {
            return;
        };
        let number = life.number;
        self.agent_input(site, number, if recall { Input::Recall(worker) } else { Input::Retire(worker) });
    }

    /// The operator allows everything again.
    pub(crate) fn activate_sites(&mut self) {
        for site in SITES {
            self.propose("operator", Command::SetAdmin { site, admin: Admin::Active }, None);
        }
    }
}
