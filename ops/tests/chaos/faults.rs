//! Faults as they strike and heal, what they excuse, and who has to say that they are there.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use flow::{SiteId, WorkerId};
use limosa::demo::cluster::{Cluster, Part, WORKER_PORTS};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::deployment::DISK_NODE;
use crate::excuse::{Excuse, TAKEN_FOR_DEAD, Touches, WAITED_FOR};
use crate::plan::{Between, Blow, Fault, Strike, WORKERS, Who};
use crate::run::{Run, name};
use crate::says::{self, MARGIN, Witness};
use crate::verdict::Promise;

/// Faults at one time.
const AT_ONCE: usize = 2;
/// Who was healed is given so long until what it says is taken for the state after it.
const NOTICED: Duration = Duration::from_secs(1);
/// Who was struck before is given so long until it has to say what is wrong, and others what is wrong with it: an agent that starts waits
/// three seconds for workers that are silent.
const RECOVERS: Duration = Duration::from_secs(5);

/// A node that has met its full disk may still be about to end when there is room again.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The exit code of the command line when something is not as it should be.
const DEGRADED: i32 = 6;

/// How a fault is undone.
enum Undo {
    /// Parts that were stopped go on.
    Continue(Vec<Part>),
    /// Parts that are dead, or are about to end, start again.
    Start(Vec<Part>),
    /// There is room on the disk again.
    Free,
    /// Links carry packets again.
    Join(Vec<usize>),
    /// Links are as fast as before.
    Hasten(Vec<usize>),
    /// It heals by itself.
    Nothing,
}

/// Links but for those that another fault still holds.
fn without(links: &[usize], held: impl Iterator<Item = usize>) -> Vec<usize> {
    let held: BTreeSet<usize> = held.collect();
    links.iter().copied().filter(|link| !held.contains(link)).collect()
}

/// A fault while it lasts.
pub(crate) struct Active {
    pub(crate) what: String,
    since: Duration,
    until: Duration,
    undo: Undo,
    /// Which excuse is open for it, and at whose agent's readiness it ends.
    excuses: Vec<(usize, Option<SiteId>)>,
    expected: Expected,
}

/// Who has to say that a fault is there.
#[derive(Default)]
struct Expected {
    witnesses: Vec<Witness>,
    /// How long logs were before it began, of those that have to say something new.
    logs: BTreeMap<Part, usize>,
    /// What the command line said of the sites when it had to say that something is wrong, once it was asked.
    command_line: Option<Receiver<Option<i32>>>,
}

/// A process that was struck, from when to when.
pub(crate) struct Struck {
    part: Part,
    from: Duration,
    until: Duration,
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
            Undo::Join(_) | Undo::Hasten(_) | Undo::Nothing => Vec::new(),
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
            Who::Worker { site, worker, by_load } => {
                let site = place.unwrap_or(site);
                let came = if by_load { self.came_by_load(site).await } else { None };
                came.unwrap_or(Part::Worker(site, worker))
            }
            Who::Switch(site) => Part::Switch(place.unwrap_or(site)),
        })
    }

    /// A worker that an agent started by its load, and that has groups or had them: of this site, or else of another one.
    async fn came_by_load(&self, site: SiteId) -> Option<Part> {
        let others = [1, 2, 3].map(SiteId).into_iter().filter(|other| *other != site);
        for site in std::iter::once(site).chain(others) {
            if let Some(part) = self.came_by_load_at(site).await {
                return Some(part);
            }
        }
        None
    }

    async fn came_by_load_at(&self, site: SiteId) -> Option<Part> {
        let text = self.cluster.site_text(site, "/v1/workers").await.ok()?;
        let page: Value = serde_json::from_str(&text).ok()?;
        let serves = |worker: &&Value| ["serving", "retiring"].iter().any(|state| worker["state"] == *state);
        let id = |worker: &Value| u16::try_from(worker["worker"].as_u64()?).ok();
        let mut all = page["workers"].as_array()?.iter().filter(serves);
        let part =
            Part::Worker(site, WorkerId(all.find_map(|worker| id(worker).filter(|id| *id > WORKERS))?));
        self.cluster.hooked_process_id(part).map(|_| part)
    }

    /// Whether a site lacks workers without this one.
    fn would_lack(&self, part: Part) -> bool {
        let Part::Worker(site, _) = part else { return false };
        let there = (1..=WORKER_PORTS).map(|worker| Part::Worker(site, WorkerId(worker)));
        there.filter(|one| *one != part && self.cluster.process_id(*one).is_some()).count()
            < usize::from(WORKERS)
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
                self.hit(vec![part], blow, strike.lasts, phase).await;
            }
            Fault::Majority(blow) => {
                if self.nodes_struck() > 0 {
                    return self.event("the placement nodes are left alone");
                }
                let Some(leader) = self.leader().await else { return };
                let other = leader % 3 + 1;
                let parts = vec![Part::Placement(leader), Part::Placement(other)];
                self.hit(parts, blow, strike.lasts, phase).await;
            }
            Fault::DiskFull => self.fill_disk(strike.lasts),
            Fault::Cut(between, a, b) => {
                let (a, b) = aimed.unwrap_or((a, b));
                let links = self.links(between, a, b);
                let expected = self.expect(match between {
                    Between::Nodes => says::of_nodes_apart(a, b),
                    Between::AgentAndNode => says::of_agent_and_node(a, b),
                    Between::Agents => says::of_agents_apart(a, b),
                    Between::Switches => Vec::new(),
                });
                self.cluster.wan().set_up(&links, false);
                let what = format!("{between:?} of {} and {} are cut off{phase}", name(a), name(b));
                let excuse = self.across(between, a, b, true);
                self.begin(what, strike.lasts, Undo::Join(links), excuse, expected);
            }
            Fault::Slow(between, a, b, extra) => {
                let (a, b) = aimed.unwrap_or((a, b));
                let links = self.links(between, a, b);
                self.cluster.wan().slow_down(&links, extra, extra / 2);
                let extra = extra.as_millis();
                let what =
                    format!("{between:?} of {} and {} are {extra} ms further{phase}", name(a), name(b));
                let excuse = self.across(between, a, b, false);
                self.begin(what, strike.lasts, Undo::Hasten(links), excuse, Expected::default());
            }
            Fault::Controller(site) => {
                let site = place.unwrap_or(site);
                let time = strike.lasts.min(Duration::from_secs(10));
                let expected = self.expect(says::of_controller(site));
                let cut = self.cluster.controller_cut(site, time);
                tokio::spawn(cut);
                let what =
                    format!("controller of {} cut off{phase}, {:.1} s", name(site), time.as_secs_f64());
                self.begin(what, time, Undo::Nothing, vec![], expected);
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

    async fn hit(&mut self, parts: Vec<Part>, blow: Blow, lasts: Duration, phase: &str) {
        let names: Vec<String> = parts.iter().map(Part::to_string).collect();
        let how = match blow {
            Blow::Kill => "SIGKILL",
            Blow::Stop => "SIGSTOP",
            Blow::Term => "SIGTERM",
        };
        let what = format!("{} {how}{phase}, {:.1} s", names.join(" and "), lasts.as_secs_f64());
        self.verdict.happened(&format!("{} {how}", kind(&parts)), 1);
        let leader = if matches!(parts[..], [Part::Placement(_)]) { self.leader().await } else { None };
        let lacks = parts.iter().any(|part| self.would_lack(*part));
        let expected = self.expect(says::of_blow(&parts, blow, lacks, leader));
        let excuses = parts.iter().filter_map(|part| self.excused(*part, blow, lasts)).collect();
        for &part in &parts {
            match blow {
                Blow::Kill if !is_hooked(part, &self.cluster) => self.cluster.kill(part).unwrap(),
                Blow::Kill => self.signal(part, Signal::SIGKILL),
                Blow::Stop => self.signal(part, Signal::SIGSTOP),
                Blow::Term => self.signal(part, Signal::SIGTERM),
            }
        }
        let undo = if blow == Blow::Stop { Undo::Continue(parts) } else { Undo::Start(parts) };
        self.begin(what, lasts, undo, excuses, expected);
    }

    fn fill_disk(&mut self, lasts: Duration) {
        if self.nodes_struck() > 0 {
            return self.event("the disk is left alone");
        }
        let Some(disk) = &self.deployment.disk else { return };
        disk.fill();
        let what = format!("the disk of placement-{DISK_NODE} is full");
        self.begin(what, lasts, Undo::Free, vec![], Expected::default());
    }

    fn begin(
        &mut self,
        what: String,
        lasts: Duration,
        undo: Undo,
        excuses: Vec<(usize, Option<SiteId>)>,
        expected: Expected,
    ) {
        let since = self.clock.now();
        self.event(&what);
        self.active.push(Active { what, since, until: since + lasts, undo, excuses, expected });
    }

    /// To be asked for before the fault begins, since it may be logged at once.
    fn expect(&self, witnesses: Vec<Witness>) -> Expected {
        // What another fault has said there already is not said again.
        let is_free = |part: &Part| !self.active.iter().any(|other| other.expected.logs.contains_key(part));
        let parts = witnesses.iter().filter_map(|one| Some(says::log_of(one.says)?.0)).filter(is_free);
        let logs = parts.map(|part| (part, self.log(part).len())).collect();
        Expected { witnesses, logs, command_line: None }
    }

    /// Asks the command line of the sites once for each fault that it has to name by now.
    pub(crate) fn ask_command_line(&mut self) {
        let now = self.clock.now();
        let (watch, cluster) = (&self.watch, &self.cluster);
        for active in self.active.iter_mut().filter(|active| active.expected.command_line.is_none()) {
            let within = active
                .expected
                .witnesses
                .iter()
                .filter(|one| one.says.is_of_site() && one.goes_on)
                .map(|one| one.within)
                .max();
            let due = |within| now >= active.since + watch.bound(within + MARGIN, active.since);
            if within.is_some_and(due) {
                let mut command = Command::new(&cluster.layout().binary);
                command.args(["site", "list", "--api", &cluster.apis().join(",")]);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let (told, asked) = channel();
                // The fault may be over before it answers.
                std::thread::spawn(move || told.send(command.status().ok().and_then(|status| status.code())));
                active.expected.command_line = Some(asked);
            }
        }
    }

    fn log(&self, part: Part) -> Vec<u8> {
        let path = self.cluster.layout().directory.join("logs").join(format!("{part}.log"));
        std::fs::read(path).unwrap_or_default()
    }

    fn signal(&self, part: Part, signal: Signal) {
        if let Some(id) = self.cluster.process_id(part) {
            // A worker that its agent has stopped may be gone by now.
            let _ = kill(Pid::from_raw(i32::try_from(id).unwrap()), signal);
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
                    // Agents have workers started that they lack, and alone those that come by load.
                    if !is_hooked(part, &self.cluster) {
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
            Undo::Join(links) => {
                let cut =
                    |other: &Active| if let Undo::Join(links) = &other.undo { links.clone() } else { vec![] };
                let free = without(links, self.active.iter().flat_map(cut));
                self.cluster.wan().set_up(&free, true);
            }
            Undo::Hasten(links) => {
                let slow = |other: &Active| {
                    if let Undo::Hasten(links) = &other.undo { links.clone() } else { vec![] }
                };
                let free = without(links, self.active.iter().flat_map(slow));
                self.cluster.wan().slow_down(&free, Duration::ZERO, Duration::ZERO);
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
        let struck = active.parts().into_iter().map(|part| Struck { part, from: active.since, until: now });
        self.struck.extend(struck);
    }

    /// Whether it was said in time, by those who were well enough to say it, if it lasted long enough.
    fn check_said(&mut self, active: &Active, now: Duration) {
        // What is wrong with what was struck just before may be old, or still to be found out.
        if active.parts().into_iter().any(|part| self.was_struck(part, active.since, active.since)) {
            return;
        }
        for one in &active.expected.witnesses {
            let bound = self.watch.bound(one.within + MARGIN, active.since);
            if now < active.since + bound {
                continue;
            }
            let mut found = self.found(active, one, active.since + bound);
            if one.says.is_of_site() && !found.is_empty() {
                found.extend(self.told_by_command_line(active, now));
            }
            for (how, said) in found {
                self.verdict.said(format!("{} ({how})", one.says.about()));
                self.verdict.look(Promise::Readiness, said, now, || {
                    format!(
                        "{:?} did not say by its {how} within {:.1} s: {}",
                        one.says,
                        bound.as_secs_f64(),
                        active.what
                    )
                });
            }
        }
    }

    /// Whether the command line said that something is wrong with a site, if it was asked in time, and whichever node it asked was well.
    fn told_by_command_line(&self, active: &Active, now: Duration) -> Option<(&'static str, bool)> {
        let code = active.expected.command_line.as_ref()?.try_recv().ok()?;
        let seen = self.watch.seen();
        let is_well = |part: Part| !self.is_struck(part) && !self.was_struck(part, active.since, now);
        let latest = now.saturating_sub(MARGIN).max(active.since);
        let nodes = (1..=3).map(Part::Placement);
        let well =
            nodes.into_iter().all(|node| is_well(node) && seen.answered_all(node, active.since, latest));
        well.then_some(("command line", code == Some(DEGRADED)))
    }

    /// What a witness has said, and how it had to.
    fn found(&self, active: &Active, one: &Witness, until: Duration) -> Vec<(&'static str, bool)> {
        let is_well = |part: Part| !self.is_struck(part) && !self.was_struck(part, active.since, until);
        let seen = self.watch.seen();
        let mut found = says::found(one.says, &seen, (active.since, until), is_well);
        // Who was not ready when it began may have said before it what it has to say.
        if let Some((part, words)) = says::log_of(one.says)
            && let Some(begun) = active.expected.logs.get(&part)
            && !found.is_empty()
            && seen.was_ready_just_before(part, active.since)
        {
            let log = self.log(part);
            let fresh = String::from_utf8_lossy(log.get(*begun..).unwrap_or_default()).into_owned();
            found.push(("log", words.iter().any(|word| fresh.contains(word))));
        }
        found
    }

    /// Whether a fault that is over struck it in that time, or shortly before.
    fn was_struck(&self, part: Part, from: Duration, until: Duration) -> bool {
        let meets = |one: &Struck| one.part == part && one.from <= until && one.until + RECOVERS >= from;
        self.struck.iter().any(meets)
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

fn comes_by_load(part: Part) -> bool {
    matches!(part, Part::Worker(_, worker) if worker.0 > WORKERS)
}

/// Whether a process is an agent's own affair, which it starts and stops.
fn is_hooked(part: Part, cluster: &Cluster) -> bool {
    comes_by_load(part) || cluster.hooked_process_id(part).is_some()
}

/// Who is struck, in words.
fn kind(parts: &[Part]) -> &'static str {
    match parts {
        [Part::Placement(_)] => "placement node",
        [Part::Agent(_)] => "agent",
        [Part::Switch(_)] => "switch",
        [part] if comes_by_load(*part) => "worker that came by load",
        [Part::Worker(..)] => "worker",
        _ => "majority",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_mends_no_link_that_another_fault_holds() {
        assert_eq!(without(&[3, 4], [4, 5].into_iter()), [3]);
        assert_eq!(without(&[3, 4], [].into_iter()), [3, 4]);
    }
}
