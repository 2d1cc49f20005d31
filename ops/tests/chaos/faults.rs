//! Faults as they strike and heal, what they excuse, and who has to say that they are there.

use std::time::Duration;

use flow::SiteId;
use limosa::demo::cluster::Part;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deployment::DISK_NODE;
use crate::excuse::{Excuse, TAKEN_FOR_DEAD, Touches, WAITED_FOR};
use crate::plan::{Between, Blow, Fault, Strike, Who};
use crate::run::{Run, name};
use crate::verdict::Promise;

/// Faults at one time.
const AT_ONCE: usize = 2;
/// How long nothing may be said of who is dead or stopped: the longest bound of docs/operations.md is 2 s, and the looks at who
/// says it are up to 1.5 s apart.
const SAID_WITHIN: Duration = Duration::from_millis(4_500);
/// Who was healed is given so long until what it says is taken for the state after it.
const NOTICED: Duration = Duration::from_secs(1);

/// A node that has met its full disk may still be about to end when there is room again.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// How a fault is undone.
enum Undo {
    /// Parts that were stopped go on.
    Continue(Vec<Part>),
    /// Parts that are dead, or are about to end, start again.
    Start(Vec<Part>),
    /// There is room on the disk again.
    Free,
    Links(Vec<usize>),
    /// It heals by itself.
    Nothing,
}

/// A fault while it lasts.
pub(crate) struct Active {
    pub(crate) what: String,
    since: Duration,
    until: Duration,
    undo: Undo,
    /// Which excuse is open for it, and at whose agent's readiness it ends.
    excuses: Vec<(usize, Option<SiteId>)>,
    says: Says,
}

/// Who has to say that it is there.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    Nobody,
    /// The agent is not ready.
    Agent(SiteId),
    /// Placement nodes name the site.
    Placement(SiteId),
    /// The last placement node is not ready.
    Node(u64),
}

/// An excuse that ends when an agent is ready again.
pub(crate) struct Closing {
    excuse: usize,
    pub(crate) part: Part,
    after: Duration,
}

impl Active {
    fn parts(&self) -> Vec<Part> {
        match &self.undo {
            Undo::Continue(parts) | Undo::Start(parts) => parts.clone(),
            Undo::Free => vec![Part::Placement(DISK_NODE)],
            Undo::Links(_) | Undo::Nothing => Vec::new(),
        }
    }
}

impl Run {
    pub(crate) fn has_room(&self) -> bool {
        self.active.len() < AT_ONCE
    }

    fn is_struck(&self, part: Part) -> bool {
        self.active.iter().any(|active| active.parts().contains(&part))
    }

    fn nodes_struck(&self) -> usize {
        let struck = self.active.iter().flat_map(Active::parts);
        struck.filter(|part| matches!(part, Part::Placement(_))).count()
    }

    /// `None`: it waits for a move. Else the sites of the move that it strikes in, if it aims at any.
    pub(crate) fn aimed(&self, strike: &Strike) -> Option<Option<(SiteId, SiteId)>> {
        let Some(aim) = strike.aim else { return Some(None) };
        let phase = if aim.switching { "switching" } else { "preparing" };
        let seen = self.watch.seen();
        seen.in_hand().find(|(_, one)| one.state == phase).map(|(_, one)| Some((one.from, one.to)))
    }

    async fn leader(&self) -> Option<u64> {
        self.api.get("/v1/raft").await?["leader"].as_u64()
    }

    /// The process that is struck.
    async fn part(&self, who: Who, place: Option<SiteId>) -> Option<Part> {
        Some(match who {
            Who::Leader => Part::Placement(self.leader().await?),
            Who::Follower(nth) => {
                let leader = self.leader().await?;
                let mut others = (1..=3).filter(|id| *id != leader);
                Part::Placement(others.nth(usize::try_from(nth).ok()?)?)
            }
            Who::Agent(site) => Part::Agent(place.unwrap_or(site)),
            Who::Worker(site, worker) => Part::Worker(place.unwrap_or(site), worker),
            Who::Switch(site) => Part::Switch(place.unwrap_or(site)),
        })
    }

    pub(crate) async fn strike(&mut self, strike: &Strike, aimed: Option<(SiteId, SiteId)>) {
        let target = strike.aim.is_some_and(|aim| aim.at_target);
        let place = aimed.map(|(from, to)| if target { to } else { from });
        let phase = match (strike.aim, aimed) {
            (Some(aim), Some(_)) if aim.switching => " in a switching move",
            (Some(_), Some(_)) => " in a preparing move",
            _ => "",
        };
        match strike.fault {
            Fault::Process(who, blow) => {
                let Some(part) = self.part(who, place).await else { return };
                let is_node = matches!(part, Part::Placement(_));
                if self.is_struck(part) || is_node && self.nodes_struck() > 0 {
                    return self.event(format!("{part} is left alone"));
                }
                self.hit(vec![part], blow, strike.lasts, phase);
            }
            Fault::Majority(blow) => {
                if self.nodes_struck() > 0 {
                    return self.event("the placement nodes are left alone");
                }
                let Some(leader) = self.leader().await else { return };
                let other = leader % 3 + 1;
                self.hit(vec![Part::Placement(leader), Part::Placement(other)], blow, strike.lasts, phase);
            }
            Fault::DiskFull => self.fill_disk(strike.lasts),
            Fault::Cut(between, a, b) => {
                let (a, b) = aimed.unwrap_or((a, b));
                let links = self.links(between, a, b);
                self.cluster.wan().set_up(&links, false);
                let what = format!("{between:?} of {} and {} are cut off{phase}", name(a), name(b));
                let excuse = self.across(between, a, b, true);
                self.begin(what, strike.lasts, Undo::Links(links), excuse, Says::Nobody);
            }
            Fault::Slow(between, a, b, extra) => {
                let (a, b) = aimed.unwrap_or((a, b));
                let links = self.links(between, a, b);
                self.cluster.wan().slow_down(&links, extra, extra / 2);
                let extra = extra.as_millis();
                let what =
                    format!("{between:?} of {} and {} are {extra} ms further{phase}", name(a), name(b));
                let excuse = self.across(between, a, b, false);
                self.begin(what, strike.lasts, Undo::Links(links), excuse, Says::Nobody);
            }
            Fault::Controller(site) => {
                let site = place.unwrap_or(site);
                let time = strike.lasts.min(Duration::from_secs(10));
                let cut = self.cluster.controller_cut(site, time);
                tokio::spawn(cut);
                self.begin(
                    format!("controller of {} cut off{phase}", name(site)),
                    time,
                    Undo::Nothing,
                    vec![],
                    Says::Nobody,
                );
            }
        }
    }

    fn links(&self, between: Between, a: SiteId, b: SiteId) -> Vec<usize> {
        let node = |site: SiteId| Part::Placement(u64::from(site.0));
        match between {
            Between::Agents => self.cluster.links(Part::Agent(a), Part::Agent(b)),
            Between::Nodes => self.cluster.links(node(a), node(b)),
            Between::AgentAndNode => self.cluster.links(Part::Agent(a), node(b)),
            Between::Switches => self.cluster.links(Part::Switch(a), Part::Switch(b)),
        }
    }

    fn open(&self, touches: Touches) -> Excuse {
        let from = self.clock.now();
        let (until, loses, forgets) = (None, false, false);
        let (shuffles, shuffles_moves, holds_up) = (false, false, false);
        Excuse { touches, from, until, loses, forgets, shuffles, shuffles_moves, holds_up }
    }

    fn add(&mut self, excuse: Excuse, until_ready: Option<SiteId>) -> (usize, Option<SiteId>) {
        self.excuses.push(excuse);
        (self.excuses.len() - 1, until_ready)
    }

    fn across(
        &mut self,
        between: Between,
        a: SiteId,
        b: SiteId,
        loses: bool,
    ) -> Vec<(usize, Option<SiteId>)> {
        if between != Between::Switches {
            return Vec::new();
        }
        let excuse = Excuse { loses, shuffles_moves: true, ..self.open(Touches::Across(a, b)) };
        vec![self.add(excuse, None)]
    }

    /// What the docs let happen when a process is gone, or stopped.
    fn excused(&mut self, part: Part, blow: Blow, lasts: Duration) -> Option<(usize, Option<SiteId>)> {
        match part {
            Part::Placement(_) | Part::Agent(_) => None,
            Part::Switch(site) => {
                let holds_up = blow == Blow::Stop;
                let shuffles_moves = holds_up && lasts >= WAITED_FOR;
                let excuse = self.open(Touches::Through(site));
                let excuse = Excuse { loses: true, shuffles_moves, holds_up, ..excuse };
                Some(self.add(excuse, Some(site)))
            }
            Part::Worker(site, _) => {
                let forgets = blow != Blow::Stop || lasts >= TAKEN_FOR_DEAD;
                let excuse = self.open(Touches::ServedAt(site));
                Some(self.add(Excuse { loses: true, forgets, shuffles: true, ..excuse }, Some(site)))
            }
        }
    }

    fn hit(&mut self, parts: Vec<Part>, blow: Blow, lasts: Duration, phase: &str) {
        let names: Vec<String> = parts.iter().map(Part::to_string).collect();
        let how = match blow {
            Blow::Kill => "SIGKILL",
            Blow::Stop => "SIGSTOP",
            Blow::Term => "SIGTERM",
        };
        let what = format!("{} {how}{phase}, {:.1} s", names.join(" and "), lasts.as_secs_f64());
        let excuses = parts.iter().filter_map(|part| self.excused(*part, blow, lasts)).collect();
        for &part in &parts {
            match blow {
                Blow::Kill if self.cluster.hooked_process_id(part).is_none() => {
                    self.cluster.kill(part).unwrap()
                }
                Blow::Kill => self.signal(part, Signal::SIGKILL),
                Blow::Stop => self.signal(part, Signal::SIGSTOP),
                Blow::Term => self.signal(part, Signal::SIGTERM),
            }
        }
        let says = match (&parts[..], blow) {
            ([Part::Placement(a), Part::Placement(b)], Blow::Kill | Blow::Stop) => Says::Node(6 - a - b),
            ([Part::Agent(site)], Blow::Kill | Blow::Stop) => Says::Placement(*site),
            ([Part::Worker(site, _)], Blow::Stop) => Says::Agent(*site),
            ([Part::Switch(site)], Blow::Kill) => Says::Agent(*site),
            _ => Says::Nobody,
        };
        let undo = if blow == Blow::Stop { Undo::Continue(parts) } else { Undo::Start(parts) };
        self.begin(what, lasts, undo, excuses, says);
    }

    fn fill_disk(&mut self, lasts: Duration) {
        if self.nodes_struck() > 0 {
            return self.event("the disk is left alone");
        }
        let Some(disk) = &self.deployment.disk else { return };
        disk.fill();
        self.begin(
            format!("the disk of placement-{DISK_NODE} is full"),
            lasts,
            Undo::Free,
            vec![],
            Says::Nobody,
        );
    }

    fn begin(
        &mut self,
        what: String,
        lasts: Duration,
        undo: Undo,
        excuses: Vec<(usize, Option<SiteId>)>,
        says: Says,
    ) {
        let since = self.clock.now();
        self.event(&what);
        self.active.push(Active { what, since, until: since + lasts, undo, excuses, says });
    }

    fn signal(&self, part: Part, signal: Signal) {
        if let Some(id) = self.cluster.process_id(part) {
            kill(Pid::from_raw(i32::try_from(id).unwrap()), signal).unwrap();
        }
    }

    /// Parts that have ended: those that were told to, and those that were not.
    pub(crate) fn reap(&mut self) {
        for part in self.cluster.ended() {
            let now = self.clock.now();
            self.event(format!("{part} has ended"));
            if self.cluster.hooked_process_id(part).is_some() {
                // The agent had it started by its hook meanwhile, since it lacked workers; two cannot run.
                continue;
            }
            let has_to = |active: &Active| !matches!(active.undo, Undo::Continue(_));
            let struck = self.active.iter().any(|active| has_to(active) && active.parts().contains(&part));
            let freed = self.disk_freed.filter(|_| part == Part::Placement(DISK_NODE));
            let by_disk = freed.is_some_and(|freed| now < freed + self.watch.bound(ENDS_WITHIN, freed));
            self.verdict
                .look(Promise::Processes, struck || by_disk, now, || format!("{part} ended by itself"));
            if !struck {
                self.cluster.spawn(part).unwrap();
            }
        }
    }

    /// Undoes what is over.
    pub(crate) fn heal_due(&mut self) {
        let now = self.clock.now();
        let (due, active) = std::mem::take(&mut self.active).into_iter().partition(|one| one.until <= now);
        self.active = active;
        let due: Vec<Active> = due;
        for one in due {
            self.undo(one);
        }
    }

    /// All faults are over.
    pub(crate) fn heal(&mut self) {
        let now = self.clock.now();
        self.active.iter_mut().for_each(|active| active.until = active.until.min(now));
        self.heal_due();
    }

    fn undo(&mut self, mut active: Active) {
        match &active.undo {
            Undo::Continue(parts) => parts.iter().for_each(|part| self.signal(*part, Signal::SIGCONT)),
            Undo::Start(parts) => {
                // Whoever was told to end may still hand over.
                let is_ending = |part: &Part| {
                    self.cluster.process_id(*part).is_some()
                        && self.cluster.hooked_process_id(*part).is_none()
                };
                if parts.iter().any(is_ending) {
                    active.until += Duration::from_millis(200);
                    return self.active.push(active);
                }
                for &part in parts {
                    // Agents have workers started that they lack.
                    if self.cluster.hooked_process_id(part).is_none() {
                        self.cluster.spawn(part).unwrap();
                    }
                }
            }
            Undo::Free => {
                let part = Part::Placement(DISK_NODE);
                self.deployment.disk.iter().for_each(|disk| disk.free());
                self.disk_freed = Some(self.clock.now());
                if self.cluster.process_id(part).is_none() {
                    self.cluster.spawn(part).unwrap();
                }
            }
            Undo::Links(links) => {
                self.cluster.wan().set_up(links, true);
                self.cluster.wan().slow_down(links, Duration::ZERO, Duration::ZERO);
            }
            Undo::Nothing => {}
        }
        let now = self.clock.now();
        self.event(format!("over: {}", active.what));
        for (excuse, until_ready) in &active.excuses {
            match until_ready {
                Some(site) => {
                    let (part, after) = (Part::Agent(*site), now + NOTICED);
                    self.closing.push(Closing { excuse: *excuse, part, after });
                }
                None => self.excuses[*excuse].until = Some(now),
            }
        }
        self.check_said(&active, now);
    }

    /// Whether it was said in time, if it lasted long enough and who has to say it was well.
    fn check_said(&mut self, active: &Active, now: Duration) {
        let bound = self.watch.bound(SAID_WITHIN, active.since);
        let until = active.since + bound;
        if now < until {
            return;
        }
        let seen = self.watch.seen();
        let said = match active.says {
            Says::Nobody => return,
            Says::Agent(site) => {
                let agent = Part::Agent(site);
                // An agent that was struck itself, then or before the time was over, or that has just begun, is no witness.
                if self.is_struck(agent)
                    || !seen.answered(agent, until.saturating_sub(NOTICED), until)
                    || seen.ready_from(agent, active.since.saturating_sub(NOTICED)).is_none()
                {
                    return;
                }
                seen.was_not_ready(agent, active.since, until)
            }
            Says::Placement(site) => seen.had_problem(site, active.since, until),
            Says::Node(id) => seen.was_not_ready(Part::Placement(id), active.since, until),
        };
        drop(seen);
        self.verdict.look(Promise::Readiness, said, now, || {
            format!("{:?} did not say within {:.1} s: {}", active.says, bound.as_secs_f64(), active.what)
        });
    }

    pub(crate) fn close_excuses(&mut self) {
        let seen = self.watch.seen();
        let excuses = &mut self.excuses;
        self.closing.retain(|closing| match seen.ready_from(closing.part, closing.after) {
            Some(at) => {
                excuses[closing.excuse].until = Some(at);
                false
            }
            None => true,
        });
    }
}
