//! One run: storms, and calm between them.

use std::collections::BTreeMap;
use std::time::Duration;

use flow::{GroupId, Prefix, SiteId, WorkerId};
use limosa::demo::cluster::{Cluster, Part, WORKER_PORTS};
use limosa::demo::world::{PathHarm, WorldHandle};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::api::{Api, Said};
use crate::deployment::Deployment;
use crate::excuse::{BEFORE, Excuse, Harmed, Judge};
use crate::faults::{Active, Closing, Struck};
use crate::plan::{self, Operation, Strike};
use crate::says::MARGIN;
use crate::services::service_of;
use crate::usage::Usage;
use crate::verdict::{Promise, Verdict};
use crate::watch::{Clock, SPILLED_WITHIN, Watch, prefix_of};

const TICK: Duration = Duration::from_millis(40);
/// How long nothing at all may come to harm between two storms.
const CALM: Duration = Duration::from_secs(5);
/// What was on its way, held, or relayed when all was whole again is given so long, before it is calm.
const SETTLE: Duration = Duration::from_secs(4);
/// From healing to whole again: an election, moves that wait to be taken back, and a drain, one after another.
const WHOLE_BOUND: Duration = Duration::from_secs(75);
/// A strike waits for a move in the phase that it aims at for so long, then strikes anyhow.
const AIM_BOUND: Duration = Duration::from_secs(4);
/// Requests in hand; more wait for their turn.
const REQUESTS_MAX: usize = 4;

/// A policy that lets operators alone move groups.
const MANUAL: u64 = 0;
/// A placement node that is ready has what was committed before: the leader's last word is as old as an election is long at most, and what
/// it said is committed has come within the longest wait for a write.
const FOLLOWS: Duration = Duration::from_secs(2 + 5);

/// What a request was for, and how it ended.
pub(crate) struct Told {
    what: String,
    wish: Wish,
    said: Said,
}

pub(crate) enum Wish {
    Moves,
    Policy(u64),
    Wrong,
    Other,
}

pub(crate) const NAMES: [&str; 3] = ["amsterdam", "virginia", "singapore"];

pub(crate) fn name(site: SiteId) -> &'static str {
    NAMES[usize::from(site.0) - 1]
}

pub(crate) struct Run {
    pub(crate) cluster: Cluster,
    pub(crate) world: WorldHandle,
    pub(crate) api: Api,
    pub(crate) watch: Watch,
    pub(crate) clock: Clock,
    pub(crate) verdict: Verdict,
    pub(crate) excuses: Vec<Excuse>,
    pub(crate) active: Vec<Active>,
    pub(crate) closing: Vec<Closing>,
    pub(crate) struck: Vec<Struck>,
    pub(crate) deployment: Deployment,
    pub(crate) disk_freed: Option<Duration>,
    pub(crate) usage: Usage,
    told: (mpsc::Sender<Told>, mpsc::Receiver<Told>),
    requests: usize,
    calms: Vec<(Duration, Duration)>,
    policies: BTreeMap<u64, u64>,
    moves: Vec<u64>,
    revision: u64,
}

impl Run {
    pub(crate) async fn start(seed: u64) -> Self {
        let (deployment, cluster, world) = Deployment::start(seed).await;
        let api = Api::new(cluster.apis());
        let clock = Clock::at(world.mark().since_start());
        let watch = Watch::start(&cluster, &api, clock);
        let mut verdict = Verdict::new(&cluster.layout().directory.join("events.txt"));
        if deployment.disk.is_none() {
            verdict.skipped("a full disk of a placement node (no tmpfs can be mounted)".into());
        }
        Self {
            cluster,
            world,
            api,
            watch,
            clock,
            verdict,
            excuses: Vec::new(),
            active: Vec::new(),
            closing: Vec::new(),
            struck: Vec::new(),
            deployment,
            disk_freed: None,
            usage: Usage::default(),
            told: mpsc::channel(64),
            requests: 0,
            calms: Vec::new(),
            policies: BTreeMap::new(),
            moves: Vec::new(),
            revision: 0,
        }
    }

    pub(crate) async fn play(&mut self, seed: u64, time: Duration) {
        let ends = self.clock.now() + time;
        self.calm(0).await;
        let mut number = 1;
        while self.clock.now() < ends {
            self.storm(&plan::storm(seed, number)).await;
            self.heal();
            self.calm(number).await;
            number += 1;
        }
        self.end().await;
        self.check_followed();
        self.count_moves().await;
    }

    pub(crate) fn event(&mut self, what: impl AsRef<str>) {
        self.verdict.event(self.clock.now(), what);
    }

    async fn storm(&mut self, storm: &plan::Storm) {
        let begun = self.clock.now();
        self.event("a storm begins");
        let mut operations = storm.operations.iter().peekable();
        let mut strikes: Vec<Strike> = storm.strikes.clone();
        strikes.reverse();
        while self.clock.now() < begun + plan::STORM {
            self.tick();
            let at = self.clock.now() - begun;
            while let Some((_, operation)) = operations.next_if(|(due, _)| *due <= at) {
                self.operate(operation.clone());
            }
            if let Some(strike) = strikes.last().copied()
                && strike.at <= at
                && self.has_room()
                && (at > strike.at + AIM_BOUND || self.aimed(&strike).is_some())
            {
                strikes.pop();
                let aimed = self.aimed(&strike).flatten();
                self.strike(&strike, aimed).await;
            }
            sleep(TICK).await;
        }
    }

    /// What goes on by itself: faults that are over, processes that ended, answers to requests.
    pub(crate) fn tick(&mut self) {
        self.reap();
        self.ask_command_line();
        self.heal_due();
        self.close_excuses();
        while let Ok(told) = self.told.1.try_recv() {
            self.requests -= 1;
            self.take(told);
        }
    }

    fn take(&mut self, told: Told) {
        let now = self.clock.now();
        let Told { what, wish, said } = told;
        match (&wish, &said) {
            (Wish::Moves, Said::Done(body)) => {
                let started = body["moves"].as_array().into_iter().flatten();
                let started: Vec<u64> = started.filter_map(|one| one["move"].as_u64()).collect();
                self.verdict.event(now, format!("{what}: moves {started:?}"));
                self.moves.extend(started);
                return;
            }
            (Wish::Policy(number), Said::Done(body)) => {
                if let Some(version) = body["version"].as_u64() {
                    self.policies.insert(version, *number);
                }
            }
            (Wish::Wrong, Said::Done(_)) => {
                self.verdict.failed(Promise::Acknowledged, 1, now, format!("{what} was accepted"));
            }
            (Wish::Wrong, Said::Refused(..)) => self.verdict.held(Promise::Acknowledged, 1),
            _ => {}
        }
        let how = match said {
            Said::Done(_) => "done".to_owned(),
            Said::Refused(status, why) => {
                let why: Value = serde_json::from_str(&why).unwrap_or_default();
                format!("refused, {status} {}", why["detail"].as_str().unwrap_or_default())
            }
            Said::Nothing(why) => format!("no answer: {why}"),
        };
        self.verdict.event(now, format!("{what}: {how}"));
    }

    fn ask(&mut self, what: String, wish: Wish, method: &'static str, path: String, body: Option<Value>) {
        if self.requests >= REQUESTS_MAX {
            return self.event(format!("{what}: left out, too many requests are in hand"));
        }
        self.requests += 1;
        let (api, told) = (self.api.clone(), self.told.0.clone());
        tokio::spawn(async move {
            let said = api.send(method, &path, body.as_ref()).await;
            // The run may be over.
            let _ = told.send(Told { what, wish, said }).await;
        });
    }

    fn operate(&mut self, operation: Operation) {
        match operation {
            Operation::Move { count, from, to, pick } => self.start_moves(count, from, to, pick),
            Operation::Abort { pick } => {
                let ids: Vec<u64> = self.watch.seen().in_hand().map(|(id, _)| id).collect();
                if let Some(id) = chosen(&ids, pick) {
                    let path = format!("/v1/moves/{id}");
                    self.ask(format!("abort move {id}"), Wish::Other, "DELETE", path, None);
                }
            }
            Operation::Drain(site) => {
                let path = format!("/v1/sites/{}/drain", name(site));
                self.ask(format!("drain {}", name(site)), Wish::Other, "POST", path, None);
            }
            Operation::Undrain(site) => self.undrain(site),
            Operation::Split { pick } => self.reshape("split", pick),
            Operation::Merge { pick } => self.reshape("merge", pick),
            Operation::Policy { number } => self.set_policy(number),
            Operation::WrongPolicy { which } => {
                let mut body = policy(0);
                let (key, value) = [
                    ("headroom", json!(5)),
                    ("moves_in_flight_max", json!(-1)),
                    ("no_such_key", json!(true)),
                    ("rules", json!([{ "nonsense": 1 }])),
                ][which]
                    .clone();
                body[key] = value;
                self.ask(format!("wrong {key}"), Wish::Wrong, "PUT", "/v1/policy".into(), Some(body));
            }
            Operation::Load(site, factor) => {
                self.event(format!("load of clients at {} times {factor}", name(site)));
                for prefix in groups_of(site) {
                    self.world.set_rate(prefix, factor).unwrap();
                }
            }
        }
    }

    fn set_policy(&mut self, number: u64) {
        let moves =
            if is_automatic(number) { "the solver moves groups" } else { "operators alone move groups" };
        let what = format!("policy {number}, {moves}");
        self.ask(what, Wish::Policy(number), "PUT", "/v1/policy".into(), Some(policy(number)));
    }

    fn undrain(&mut self, site: SiteId) {
        let path = format!("/v1/sites/{}/undrain", name(site));
        self.ask(format!("undrain {}", name(site)), Wish::Other, "POST", path, None);
    }

    fn start_moves(&mut self, count: u64, from: SiteId, to: SiteId, pick: u64) {
        let groups = self.watch.seen().groups_at(from);
        let moves: Vec<Value> = (0..count)
            .filter_map(|nth| chosen(&groups, pick.wrapping_add(nth)))
            .map(|group| json!({ "group": group, "to": name(to) }))
            .collect();
        if !moves.is_empty() {
            let what = format!("move {} from {} to {}", moves.len(), name(from), name(to));
            self.ask(what, Wish::Moves, "POST", "/v1/moves".into(), Some(json!({ "moves": moves })));
        }
    }

    fn reshape(&mut self, verb: &'static str, pick: u64) {
        let all: Vec<String> = (1..=3).flat_map(|site| self.watch.seen().groups_at(SiteId(site))).collect();
        let halves = all.into_iter().filter(|group| (verb == "split") == is_whole(group));
        if let Some(group) = chosen(&halves.collect::<Vec<_>>(), pick) {
            let body = json!({ "group": group });
            self.ask(
                format!("{verb} {group}"),
                Wish::Other,
                "POST",
                format!("/v1/groups/{verb}"),
                Some(body),
            );
        }
    }

    /// Waits until all is as it should be, and then for a while that nothing at all comes to harm.
    async fn calm(&mut self, number: u64) {
        let healed = self.clock.now();
        self.event("all faults are healed");
        for site in 1..=3 {
            self.operate(Operation::Load(SiteId(site), 1.0));
        }
        let wants = loop {
            self.tick();
            let mut wants = self.wants().await;
            wants.extend(self.leave_moves_to_operators().await);
            let late = self.clock.now() > healed + self.watch.bound(WHOLE_BOUND, healed);
            if wants.is_empty() || late {
                break wants;
            }
            sleep(TICK * 4).await;
        };
        let took = self.clock.now() - healed;
        self.event(format!("whole again after {:.1} s", took.as_secs_f64()));
        self.verdict.look(Promise::Whole, wants.is_empty(), healed + took, || {
            format!("{:.1} s after all faults were healed: {}", took.as_secs_f64(), wants.join("; "))
        });
        let moves = wants.iter().any(|want| want.starts_with("move") || want.starts_with("owner"));
        self.verdict.look(Promise::Moves, !moves, healed + took, || wants.join("; "));
        self.watch_drains(healed).await;
        self.wait(SETTLE).await;
        let begun = self.clock.now();
        self.event(format!("calm {number} begins"));
        let (from, to) = (
            SiteId(1 + u8::try_from(number % 3).unwrap_or(0)),
            SiteId(1 + u8::try_from((number + 1) % 3).unwrap_or(0)),
        );
        self.start_moves(2, from, to, number);
        self.wait(CALM).await;
        self.calms.push((begun, self.clock.now()));
        self.event("the calm is over");
        self.check_processes().await;
    }

    /// Has the policy set that lets operators alone move groups, once nobody else may set one any more; what is not so yet.
    async fn leave_moves_to_operators(&mut self) -> Option<String> {
        if self.requests > 0 {
            return Some("requests are in hand".into());
        }
        let present = self.api.get("/v1/policy?consistency=linearizable").await.unwrap_or_default();
        if present["automatic"] == json!(false) {
            return None;
        }
        self.set_policy(MANUAL);
        Some("the solver moves groups".into())
    }

    async fn wait(&mut self, time: Duration) {
        let ends = self.clock.now() + time;
        while self.clock.now() < ends {
            self.tick();
            sleep(TICK).await;
        }
    }

    /// What is not as it should be. Drains go on.
    async fn wants(&mut self) -> Vec<String> {
        let mut wants: Vec<String> =
            self.active.iter().map(|active| format!("{} is not healed", active.what)).collect();
        let now = self.clock.now();
        let (mut newest, mut served) = (0, BTreeMap::new());
        for node in 0..self.api.nodes.len() {
            let status = self.api.at(node, "/v1/raft").await.unwrap_or_default();
            newest = newest.max(status["revision"].as_u64().unwrap_or(0));
            let url = format!("{}/readyz", self.api.nodes[node]);
            match self.api.page(&url).await {
                Some((200, _)) => {}
                said => wants.push(format!("placement node {}: {said:?}", node + 1)),
            }
            let sites = self.api.at(node, "/v1/sites").await.unwrap_or_default();
            for site in sites["sites"].as_array().into_iter().flatten() {
                if site["alive"] != true || site["problems"].as_array().is_some_and(|all| !all.is_empty()) {
                    wants.push(format!(
                        "node {} says of {}: {} {}",
                        node + 1,
                        site["name"],
                        site["alive"],
                        site["problems"]
                    ));
                }
            }
        }
        for (&site, at) in self.cluster.metrics() {
            match self.api.page(&format!("http://{at}/readyz")).await {
                Some((200, _)) => {}
                Some((_, text)) => wants.push(format!("agent of {}: {text}", name(site))),
                None => wants.push(format!("agent of {}: no answer", name(site))),
            }
            let text = self.cluster.site_text(site, "/metrics").await.unwrap_or_default();
            let followed = gauge(&text, "limosa_config_revision");
            if followed.is_none_or(|followed| followed < newest) {
                wants.push(format!("agent of {} follows {followed:?} of {newest}", name(site)));
            }
            let counts = ["limosa_groups", "limosa_groups_relayed"].map(|name| gauge(&text, name));
            served.insert(site.0, counts);
        }
        wants.extend(self.misplaced(&served).await);
        let moves = self.api.get("/v1/moves?limit=200&consistency=linearizable").await;
        match &moves {
            None => wants.push("no node tells of moves".into()),
            Some(page) => {
                let in_hand =
                    page["moves"].as_array().into_iter().flatten().filter(|one| one["ended"].is_null());
                // A drain may begin one at any time.
                wants.extend(in_hand.map(|one| {
                    format!(
                        "move {} of {} {} to {}: {}",
                        one["id"], one["group"], one["from"], one["to"], one["state"]
                    )
                }));
            }
        }
        if !self.closing.is_empty() && wants.is_empty() {
            let closing: Vec<String> = self.closing.iter().map(|one| format!("{:?}", one.part)).collect();
            wants.push(format!("not seen ready since: {} at {:.1}", closing.join(", "), now.as_secs_f64()));
        }
        wants
    }

    /// Sites whose workers serve other groups, by number, than those that the log says are theirs, or relay for others.
    async fn misplaced(&self, served: &BTreeMap<u8, [Option<u64>; 2]>) -> Vec<String> {
        let page = self.api.get("/v1/sites?consistency=linearizable").await.unwrap_or_default();
        let site = |site: &Value| {
            let (id, owned) = (u8::try_from(site["id"].as_u64()?).ok()?, site["groups"].as_u64()?);
            let [serves, relays] = served.get(&id).copied().unwrap_or_default();
            (serves != Some(owned) || relays != Some(0)).then(|| {
                format!("owner: site {id} owns {owned} groups, serves {serves:?} and relays for {relays:?}")
            })
        };
        page["sites"].as_array().into_iter().flatten().filter_map(site).collect()
    }

    /// Sites that are drained become empty, and are then no longer drained.
    async fn watch_drains(&mut self, healed: Duration) {
        loop {
            self.tick();
            let page = self.api.get("/v1/sites").await.unwrap_or_default();
            let sites = page["sites"].as_array().cloned().unwrap_or_default();
            if sites.is_empty() && self.clock.now() < healed + WHOLE_BOUND {
                sleep(TICK * 4).await;
                continue;
            }
            let drained: Vec<_> = sites.iter().filter(|site| site["admin"] == "draining").collect();
            if drained.is_empty() {
                return;
            }
            // Where all are drained nobody may take anything.
            let somewhere = drained.len() < sites.len();
            let left: u64 = drained.iter().filter_map(|site| site["groups"].as_u64()).sum();
            let late = self.clock.now() > healed + self.watch.bound(WHOLE_BOUND, healed);
            if left == 0 || !somewhere || late {
                let now = self.clock.now();
                if somewhere {
                    self.verdict
                        .look(Promise::Drains, left == 0, now, || format!("{left} groups are left: {page}"));
                }
                for site in drained {
                    self.undrain(SiteId(u8::try_from(site["id"].as_u64().unwrap_or(1)).unwrap_or(1)));
                }
                self.wait(Duration::from_secs(1)).await;
                continue;
            }
            sleep(TICK * 4).await;
        }
    }

    /// Everything that is the same for all processes, or counted by them.
    async fn check_processes(&mut self) {
        self.check_nodes().await;
        self.check_acknowledged().await;
        self.check_orderings().await;
        self.check_counters().await;
        self.check_logs();
        let now = self.clock.now();
        self.usage.sample(&self.cluster, now);
    }

    /// All placement nodes have the same state.
    async fn check_nodes(&mut self) {
        const PAGES: [&str; 5] = [
            "/v1/groups?consistency=stale",
            "/v1/moves?limit=2000&consistency=stale",
            "/v1/audit?limit=2000&consistency=stale",
            "/v1/policy?consistency=stale",
            "/v1/policy/history",
        ];
        let begun = self.clock.now();
        loop {
            let mut differ = None;
            for path in PAGES {
                let mut pages = Vec::new();
                for node in 0..self.api.nodes.len() {
                    pages.push(self.api.at(node, path).await);
                }
                if pages.iter().any(|page| page.is_none() || *page != pages[0]) {
                    differ = Some(path);
                }
            }
            let now = self.clock.now();
            let late = now > begun + self.watch.bound(Duration::from_secs(20), begun);
            if differ.is_none() || late {
                return self.verdict.look(Promise::Acknowledged, differ.is_none(), now, || {
                    format!("placement nodes differ in {}", differ.unwrap_or_default())
                });
            }
            sleep(TICK * 4).await;
        }
    }

    /// Moves, policies and revisions that were acknowledged are known, at every node.
    async fn check_acknowledged(&mut self) {
        let now = self.clock.now();
        for node in 0..self.api.nodes.len() {
            let status = self.api.at(node, "/v1/raft").await.unwrap_or_default();
            let revision = status["revision"].as_u64().unwrap_or(0);
            let before = self.revision;
            self.verdict.look(Promise::Acknowledged, revision >= before, now, || {
                format!("node {} is at revision {revision}, {before} was there before", node + 1)
            });
            self.revision = before.max(if node == 0 { revision } else { before });
            let page = self.api.at(node, "/v1/moves?limit=5000&consistency=stale").await.unwrap_or_default();
            let known: Vec<u64> =
                page["moves"].as_array().into_iter().flatten().filter_map(|one| one["id"].as_u64()).collect();
            let forgotten: Vec<_> = self.moves.iter().filter(|id| !known.contains(id)).collect();
            // A thousand moves are kept.
            let may_forget = known.len() >= 1_000;
            self.verdict.look(Promise::Acknowledged, forgotten.is_empty() || may_forget, now, || {
                format!("node {} does not know moves {forgotten:?}", node + 1)
            });
            let history = self.api.at(node, "/v1/policy/history").await.unwrap_or_default();
            let versions: BTreeMap<u64, f64> = history["policies"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|one| Some((one["version"].as_u64()?, one["policy"]["min_gain_ms"].as_f64()?)))
                .collect();
            let oldest = versions.keys().next().copied().unwrap_or(0);
            for (version, number) in self.policies.range(oldest..) {
                let wanted = policy(*number)["min_gain_ms"].as_f64();
                self.verdict.look(
                    Promise::Acknowledged,
                    versions.get(version).copied() == wanted,
                    now,
                    || format!("node {}: policy {version} is {:?}", node + 1, versions.get(version)),
                );
            }
        }
    }

    /// Each move keeps the order that its service promises.
    async fn check_orderings(&mut self) {
        let now = self.clock.now();
        let page = self.api.get("/v1/moves?limit=5000&consistency=stale").await.unwrap_or_default();
        for one in page["moves"].as_array().into_iter().flatten() {
            let Some(group) = prefix_of(&one["group"]) else { continue };
            let wanted = service_of(group).ordering();
            self.verdict.look(Promise::Order, one["ordering"] == wanted, now, || {
                format!("a move of {group} is not {wanted}: {one}")
            });
        }
    }

    /// What workers received or made is what they sent, hold, took or dropped.
    async fn check_counters(&mut self) {
        for site in [1, 2, 3].map(SiteId) {
            let mut wrong = Vec::new();
            for _ in 0..5 {
                let text = self.cluster.site_text(site, "/metrics").await.unwrap_or_default();
                wrong = unaccounted(&text);
                if wrong.is_empty() {
                    break;
                }
                // A page may be made while a report comes in.
                sleep(Duration::from_millis(150)).await;
            }
            let now = self.clock.now();
            self.verdict.look(Promise::Counters, wrong.is_empty(), now, || {
                format!("workers of {} lack or have packets too many: {wrong:?}", name(site))
            });
        }
    }

    fn check_logs(&mut self) {
        let now = self.clock.now();
        for entry in std::fs::read_dir(self.cluster.layout().directory.join("logs")).unwrap() {
            let path = entry.unwrap().path();
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            let panicked = text.lines().find(|line| line.contains("panicked"));
            self.verdict.look(Promise::Processes, panicked.is_none(), now, || {
                format!("{}: {}", path.display(), panicked.unwrap_or_default())
            });
        }
    }

    /// What the whole traffic says.
    async fn end(&mut self) {
        self.wait(Duration::from_secs(4)).await;
        let traffic = self.world.drain().unwrap();
        let harm = self.world.harm().unwrap();
        let now = self.clock.now();
        let seen = self.watch.seen();
        let judge = Judge { excuses: &self.excuses, seen: &seen, home, relaxed };
        let verdict = &mut self.verdict;
        verdict.held(Promise::Packets, traffic.packets.sent);
        verdict.held(Promise::Order, traffic.packets.delivered);
        verdict.held(Promise::Connections, traffic.tcp.bytes_verified);
        verdict.held(Promise::Calm, self.calms.len() as u64);
        // What no fault excuses, and so has to be among what the kernel let go.
        let lost = |(from, until): (Duration, Duration)| -> u64 {
            let within = harm.paths.iter().filter(|path| {
                let (at, harmed) = (path.from.since_start(), harmed(path));
                at < until && harmed.until > from && !judge.may_lose(&harmed)
            });
            within.map(|path| path.packets.lost).sum()
        };
        let mut looked = BTreeMap::new();
        let mut spilled = |(at, until): (Duration, Duration)| {
            // What is lost in the half seconds around has the same explanation, and counts for it too.
            let span = (at.saturating_sub(SPILLED_WITHIN), until.saturating_add(SPILLED_WITHIN));
            *looked.entry(span).or_insert_with(|| seen.spilled(span.0, span.1) >= lost(span))
        };
        for path in &harm.paths {
            let (at, until) = (path.from.since_start(), path.until.since_start());
            let packets = path.packets;
            let harmed = harmed(path);
            let owners = seen.sites_of(path.group, at, until);
            let what = format!(
                "{} (clients at {}) and servers at {}, owners {owners:?}: {} lost, {} twice, {} late",
                path.group,
                home(path.group),
                path.server,
                packets.lost,
                packets.duplicated,
                packets.reordered
            );
            // What is sent at its end may meet the storm that follows.
            let calm =
                |(begun, ended): &(Duration, Duration)| *begun <= until && at <= ended.saturating_sub(BEFORE);
            let may_pass = judge.outran_the_detour(&harmed) || judge.may_pass(&harmed);
            let late = if may_pass { 0 } else { packets.reordered };
            let lost = if packets.lost > 0 && spilled((at, until)) { 0 } else { packets.lost };
            let harmed_in_calm = lost + packets.duplicated + late;
            if harmed_in_calm > 0 && self.calms.iter().any(calm) {
                verdict.failed(Promise::Calm, harmed_in_calm, at, &what);
            }
            if packets.lost > 0 && (judge.may_lose(&harmed) || spilled((at, until))) {
                verdict.excused(Promise::Packets, packets.lost);
            } else if packets.lost > 0 {
                verdict.failed(Promise::Packets, packets.lost, at, &what);
            }
            if packets.duplicated > 0 {
                verdict.failed(Promise::Packets, packets.duplicated, at, &what);
            }
            if packets.reordered > 0 && judge.may_shuffle(&harmed) {
                verdict.excused(Promise::Order, packets.reordered);
            } else if packets.reordered > 0 {
                let opened =
                    if judge.was_let_go_early(&harmed) { ", holds were opened early there" } else { "" };
                verdict.failed(Promise::Order, packets.reordered, at, format!("{what}{opened}"));
            }
        }
        for (group, at) in &harm.breaks {
            let at = at.since_start();
            if judge.may_break(*group, at) {
                verdict.excused(Promise::Connections, 1);
            } else {
                verdict.failed(Promise::Connections, 1, at, format!("a connection of {group} broke"));
            }
        }
        let checks = traffic.checks;
        let wrong = checks.corrupt_packets + checks.outside_changed + checks.outside_foreign + checks.unknown;
        let wrong = wrong + checks.misdelivered;
        if wrong > 0 {
            verdict.failed(Promise::Packets, wrong, now, format!("{checks:?}"));
        }
        if traffic.tcp.corrupt > 0 {
            verdict.failed(Promise::Connections, traffic.tcp.corrupt, now, "bytes are wrong");
        }
        drop(seen);
        for (holds, what) in self.usage.judge() {
            self.verdict.look(Promise::Memory, holds, now, || what);
        }
        let lag = self.watch.seen().worst_lag(Duration::ZERO, now);
        self.event(format!("the machine was late by {} ms at worst", lag.as_millis()));
    }
}

impl Run {
    /// Whether placement nodes that said that they were ready had what was committed.
    fn check_followed(&mut self) {
        for node in 1..=self.api.nodes.len() as u64 {
            let (looked, stale) = self.watch.seen().stale(node, FOLLOWS + MARGIN);
            self.verdict.happened("looks at placement nodes that had been ready for long", looked);
            self.verdict.look(Promise::Readiness, stale.is_none(), stale.unwrap_or_default(), || {
                format!("placement node {node} was ready and lacked what had been committed long before")
            });
        }
    }

    /// How many moves there were, by their reason and service, of those that are remembered.
    async fn count_moves(&mut self) {
        let page = self.api.get("/v1/moves?limit=5000").await.unwrap_or_default();
        for one in page["moves"].as_array().into_iter().flatten() {
            let (reason, state) = (one["reason"].as_str(), one["state"].as_str());
            let (Some(group), Some(reason), Some(state)) = (prefix_of(&one["group"]), reason, state) else {
                continue;
            };
            let ordering = service_of(group).ordering();
            self.verdict.happened(&format!("moves {ordering} {reason} {state}"), 1);
        }
    }
}

/// The value of a metric that has one line.
fn gauge(metrics: &str, name: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix('{')?.rsplit(' ').next()?.parse().ok();
    metrics.lines().find_map(value)
}

fn harmed(path: &PathHarm) -> Harmed {
    let (from, until) = (path.from.since_start(), path.until.since_start());
    Harmed { group: path.group, server: path.server, from, until }
}

/// All processes that may be there, also the workers that agents start.
pub(crate) fn parts() -> impl Iterator<Item = Part> {
    let sites = [1, 2, 3].map(SiteId);
    let workers = sites
        .into_iter()
        .flat_map(|site| (1..=WORKER_PORTS).map(move |worker| Part::Worker(site, WorkerId(worker))));
    (1..=3).map(Part::Placement).chain(sites.map(Part::Agent)).chain(sites.map(Part::Switch)).chain(workers)
}

/// A policy that says by its number which it is.
fn policy(number: u64) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "below a thousand")]
    let gain = 5.0 + number as f64 / 128.0;
    let automatic = is_automatic(number);
    json!({ "automatic": automatic, "min_gain_ms": gain, "min_dwell_s": 1, "moves_in_flight_max": 12 })
}

/// Whether the solver moves groups by the policy of this number.
fn is_automatic(number: u64) -> bool {
    number % 2 == 1
}

/// Whether a group is as its service makes it, and no part of one.
fn is_whole(group: &str) -> bool {
    let Ok(id) = group.parse::<GroupId>() else { return false };
    id.prefix.len() == service_of(id.prefix).group_len
}

fn relaxed(group: Prefix) -> bool {
    service_of(group).relaxed
}

fn chosen<T: Clone>(all: &[T], pick: u64) -> Option<T> {
    let at = usize::try_from(pick % (all.len().max(1) as u64)).ok()?;
    all.get(at).cloned()
}

fn groups_of(site: SiteId) -> impl Iterator<Item = Prefix> {
    (0..24u8)
        .filter(move |nth| nth / 8 + 1 == site.0)
        .map(|nth| format!("100.64.{nth}.0/24").parse().unwrap())
}

/// Where clients of a group come in.
fn home(group: Prefix) -> SiteId {
    [1, 2, 3]
        .map(SiteId)
        .into_iter()
        .find(|site| groups_of(*site).any(|one| one.covers(&group)))
        .unwrap_or(SiteId(1))
}

/// By worker: what came in or was made less all that became of it.
fn unaccounted(metrics: &str) -> Vec<(String, i64)> {
    let mut sums: BTreeMap<String, i64> = BTreeMap::new();
    for line in metrics.lines().filter_map(|line| line.strip_prefix("limosa_worker_packets{")) {
        let Some((labels, value)) = line.split_once("} ") else { continue };
        let label = |key: &str| {
            let start = labels.find(&format!("{key}=\""))? + key.len() + 2;
            labels[start..].split('"').next()
        };
        let (Some(fate), Some(worker), Ok(value)) = (label("fate"), label("worker"), value.parse::<i64>())
        else {
            continue;
        };
        let sign = match fate {
            "received" | "made" => 1,
            "sent"
            | "held_now"
            | "markers"
            | "dropped_malformed"
            | "dropped_no_group"
            | "dropped_no_mapping"
            | "dropped_port_block_exhausted"
            | "dropped_table_full"
            | "dropped_hold_full"
            | "dropped_unsupported"
            | "dropped_ttl"
            | "dropped_bad_checksum" => -1,
            _ => 0,
        };
        *sums.entry(worker.to_owned()).or_default() += sign * value;
    }
    sums.into_iter().filter(|(_, sum)| *sum != 0).collect()
}
