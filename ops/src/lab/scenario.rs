//! What happens in the lab, while its clients work: moves that were planned, and processes that die.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use flow::{HoldTimes, SiteId};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::clients::Sample;
use super::clients::download::{Download, Downloaded};
use super::clients::http::{Plan, Requests, Wrongs};
use super::clients::iperf::{Iperf, Kind, Measured};
use super::clients::ping::{self, Ping};
use super::clients::servers::Files;
use super::clients::ssh::Typing;
use super::deployment::{Deployment, WORKERS, agent, placement, worker};
use super::probes::{Fates, Probed, Probes};
use super::report::{Happening, Loss, Seen};
use super::say;
use super::underlay::{self, Far, client, far_servers, group_name, server};
use crate::clock::Clock;
use crate::demo::report::{Excess, GivenUp, MoveReport, hold_bound};

/// Groups whose clients do everything, and move.
const BUSY: [u8; 3] = [0, 1, 2];
/// All groups.
const GROUPS: u8 = 8;
/// A group whose clients only ping, and stay where they are.
const QUIET: u8 = 3;
/// Requests per second, over all busy groups.
const REQUESTS_PER_S: u32 = 200;
/// Of each group that talks to a server far from all sites.
const FAR_REQUESTS_PER_S: u32 = 5;
/// Longest wait for probes.
const PROBES_BOUND: Duration = Duration::from_secs(20);
/// Hosts above those that make requests.
const HOST_DOWNLOAD: u8 = 251;
const HOST_SSH: u8 = 252;
const HOST_IPERF: u8 = 253;
const HOST_PING: u8 = 254;
/// Longest wait for moves. They take seconds; on a machine that is busy with other things, as long as it lets them.
const MOVES_BOUND: Duration = Duration::from_secs(120);
/// Between two happenings.
const PAUSE: Duration = Duration::from_secs(4);
/// How often the API is asked how far moves are: a switch takes some tens of milliseconds.
const PHASE_LOOK: Duration = Duration::from_millis(5);
/// Longest wait for an agent to start or stop a worker: it holds, then relays for ten seconds, and a busy machine takes longer.
const SCALE_BOUND: Duration = Duration::from_secs(150);

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) sites: u8,
    pub(super) download_len: usize,
    pub(super) download_kbytes_per_s: u32,
    pub(super) iperf_seconds: u64,
}

impl Size {
    /// Three sites and everything.
    pub(super) const FULL: Self =
        Self { sites: 3, download_len: 200_000_000, download_kbytes_per_s: 2_300, iperf_seconds: 90 };
    /// Two sites, one move, one kill.
    pub(super) const SHORT: Self =
        Self { sites: 2, download_len: 20_000_000, download_kbytes_per_s: 1_800, iperf_seconds: 10 };
}

/// Everything that clients do.
struct Clients {
    requests: Vec<Requests>,
    /// To servers far from all sites, which take longer than all others.
    far: Vec<Requests>,
    pings: Vec<(String, Ping)>,
    typing: Typing,
    download: Download,
    tcp: Iperf,
    udp: Iperf,
}

/// The stage.
pub(super) struct Stage {
    pub(super) deployment: Deployment,
    clients: Clients,
    clock: Clock,
    seen: BTreeSet<u64>,
    local_seen: Vec<u64>,
    happenings: Vec<Happening>,
    probes: Probes,
    failures: Vec<String>,
}

#[derive(Deserialize)]
struct Moves {
    moves: Vec<MoveView>,
}

#[derive(Deserialize)]
struct MoveView {
    id: u64,
    group: String,
    from: String,
    to: String,
    state: String,
    abort_reason: Option<String>,
    summary: Option<Summary>,
}

#[derive(Deserialize)]
struct Summary {
    flows: u64,
    bytes_on_wire: u64,
    precopy_us: u64,
    hold: HoldTimes,
}

#[derive(Deserialize)]
struct LocalMove {
    number: u64,
    group: String,
    from: u16,
    to: u16,
    flows: u64,
    precopy_us: u64,
    hold: HoldTimes,
}

impl MoveView {
    fn is_in_hand(&self) -> bool {
        self.state == "preparing" || self.state == "switching"
    }
}

/// What is between the start of something and its end.
struct Begun {
    name: String,
    loss: Loss,
    start_us: u64,
    /// What the delay model said then.
    model_ms: Option<f64>,
}

impl Stage {
    /// Brings the groups home, and starts all clients.
    ///
    /// # Errors
    /// A client cannot be started, or a group cannot be brought home.
    pub(super) async fn open(
        mut deployment: Deployment,
        size: Size,
        directory: PathBuf,
        clock: Clock,
    ) -> anyhow::Result<Self> {
        let files = Files::write(&directory, size.download_len)?;
        let (processes, underlay) = (&mut deployment.processes, &deployment.underlay);
        files.serve(&underlay.world, size.download_kbytes_per_s, processes)?;
        files.serve_http("nginx-far", &underlay.far, size.download_kbytes_per_s, processes)?;
        for group in 0..GROUPS {
            underlay.roam(group, home(group, size.sites))?;
        }
        for far in deployment.far() {
            underlay.roam(far.group, far.ingress)?;
        }
        bring_home(&deployment, size.sites).await?;
        let clients = Clients::start(&mut deployment, &files, size, clock)?;
        let local_seen = vec![0; usize::from(size.sites) + 1];
        let name = |site: u8| deployment.name(site);
        let way = |far: Far| {
            let site = &deployment.sites[usize::from(far.ingress) - 1];
            Probed::new(&far, site.name.clone(), far.round_trip_ms(site))
        };
        let probes = Probes {
            sites: deployment.numbers().map(|site| Fates::of(name(site))).collect(),
            ways: deployment.far().map(way).collect(),
        };
        let mut stage = Self {
            deployment,
            clients,
            clock,
            seen: BTreeSet::new(),
            local_seen,
            happenings: Vec::new(),
            probes,
            failures: Vec::new(),
        };
        // What was moved to bring the groups home is no part of the play.
        let begun = stage.begin("", Loss::Packets).await;
        stage.end(begun).await?;
        stage.happenings.clear();
        Ok(stage)
    }

    /// Two sites, one move, one kill.
    ///
    /// # Errors
    /// Something could not be done at all.
    pub(super) async fn play_short(&mut self) -> anyhow::Result<()> {
        self.watch_probes().await?;
        self.move_to("move to the other site", 2).await?;
        sleep(PAUSE).await;
        self.kill_agent(2, 1).await?;
        sleep(PAUSE).await;
        Ok(())
    }

    /// Everything.
    ///
    /// # Errors
    /// Something could not be done at all.
    pub(super) async fn play(&mut self) -> anyhow::Result<()> {
        self.watch_probes().await?;
        self.move_to("move", 2).await?;
        sleep(PAUSE).await;
        self.roam(3).await?;
        sleep(PAUSE).await;
        self.scale_out(3).await?;
        sleep(PAUSE).await;
        self.drain(3).await?;
        sleep(PAUSE).await;
        self.scale_in(3).await?;
        self.move_to("return", 3).await?;
        sleep(PAUSE).await;
        self.kill_agent(3, 1).await?;
        sleep(PAUSE).await;
        self.kill_leader(3).await?;
        sleep(PAUSE).await;
        self.kill_worker(3).await?;
        sleep(PAUSE).await;
        self.restart_ovs(3).await?;
        sleep(PAUSE + PAUSE).await;
        Ok(())
    }

    // ---- what is measured ---------------------------------------------------------------------------------

    /// Two groups talk to servers that are far from all sites, and their clients come in where no flow of them is: whether they were better
    /// off there the leader cannot know, so it asks.
    async fn watch_probes(&mut self) -> anyhow::Result<()> {
        let begun = tokio::time::Instant::now();
        loop {
            for way in &mut self.probes.ways {
                // While no leader answers there is nothing to see.
                if let Ok(view) = self.deployment.get(&format!("/v1/explain?group={}", way.group)).await {
                    way.take(&serde_json::from_value(view)?);
                }
            }
            let all = self.probes.ways.iter().all(|way| way.measured.is_some());
            if (all && begun.elapsed() >= PAUSE) || begun.elapsed() >= PROBES_BOUND {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
        for (far, at) in self.deployment.far().zip(0..) {
            let site = self.deployment.underlay.site(far.ingress).clone();
            // It blocks; Ctrl-C must be heard meanwhile.
            let pinged = tokio::task::spawn_blocking(move || ping::median_ms(&site, far.address)).await?;
            self.probes.ways[at].ping_ms = pinged.ok();
        }
        Ok(())
    }

    async fn count_probes(&mut self) {
        for (site, fates) in self.deployment.numbers().zip(&mut self.probes.sites) {
            fates.take(&self.deployment.agent_page(site, "/metrics").await.unwrap_or_default());
        }
    }

    // ---- what is planned ----------------------------------------------------------------------------------

    async fn move_to(&mut self, name: &str, to: u8) -> anyhow::Result<()> {
        say(&format!("The busy groups move to {}, under load.", self.deployment.name(to)));
        let begun = self.begin(name, Loss::Never).await;
        let moves = self.start_moves(to).await?;
        self.until_these_end(&moves, true).await;
        self.end(begun).await
    }

    async fn roam(&mut self, to: u8) -> anyhow::Result<()> {
        let name = self.deployment.name(to);
        say(&format!("Their clients appear in {name}; the flows stay behind at first, then follow."));
        let begun = self.begin("roam", Loss::Never).await;
        for group in BUSY {
            self.deployment.underlay.roam(group, to)?;
        }
        self.end(begun).await?;
        sleep(PAUSE).await;
        let begun = self.begin("follow", Loss::Never).await;
        let moves = self.start_moves(to).await?;
        self.until_these_end(&moves, true).await;
        self.end(begun).await
    }

    async fn scale_out(&mut self, site: u8) -> anyhow::Result<()> {
        let name = self.deployment.name(site);
        say(&format!(
            "Load has come to {name}: its agent starts a third worker, and groups move between workers."
        ));
        let begun = self.begin("scale out", Loss::Never).await;
        if self.until_workers(site, |count| count > usize::from(WORKERS)).await {
            self.until_spread(site).await;
        } else {
            self.failures.push(format!("scale out: the agent of {name} has started no worker"));
        }
        self.end(begun).await
    }

    async fn until_workers(&self, site: u8, wanted: impl Fn(usize) -> bool) -> bool {
        let ends = tokio::time::Instant::now() + SCALE_BOUND;
        while !wanted(self.deployment.worker_count(site).await) {
            if tokio::time::Instant::now() > ends {
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
        true
    }

    async fn drain(&mut self, site: u8) -> anyhow::Result<()> {
        let name = self.deployment.name(site);
        say(&format!("{name} is drained; its clients still come in there."));
        let begun = self.begin("drain", Loss::Never).await;
        self.deployment.post(&format!("/v1/sites/{name}/drain"), &json!({})).await?;
        let left = self.until_empty(&name).await;
        if left > 0 {
            self.failures.push(format!("drain: {left} groups are still at {name}"));
        }
        self.end(begun).await
    }

    async fn scale_in(&mut self, site: u8) -> anyhow::Result<()> {
        let name = self.deployment.name(site);
        say(&format!("{name} has nothing to do now: its agent stops the third worker."));
        let begun = self.begin("scale in", Loss::Never).await;
        if !self.until_workers(site, |count| count <= usize::from(WORKERS)).await {
            self.failures.push(format!("scale in: the agent of {name} has stopped no worker"));
        }
        self.deployment.post(&format!("/v1/sites/{name}/undrain"), &json!({})).await?;
        self.end(begun).await
    }

    // ---- what is not --------------------------------------------------------------------------------------

    async fn kill_agent(&mut self, site: u8, to: u8) -> anyhow::Result<()> {
        say(&format!("The agent of {} is killed while groups leave it.", self.deployment.name(site)));
        let begun = self.begin("kill agent", Loss::Never).await;
        let moves = self.start_moves(to).await?;
        until_one_switches(&self.deployment, &moves).await?;
        self.deployment.processes.kill(&agent(site))?;
        sleep(Duration::from_millis(500)).await;
        self.deployment.start_agent(site)?;
        self.until_these_end(&moves, false).await;
        self.deployment.until_ready().await?;
        self.end(begun).await
    }

    async fn kill_leader(&mut self, to: u8) -> anyhow::Result<()> {
        let leader = self.deployment.leader().await.context("no leader is known")?;
        say(&format!("Placement node {leader}, the leader, is killed while groups move."));
        let begun = self.begin("kill leader", Loss::Never).await;
        let moves = self.start_moves(to).await?;
        until_one_switches(&self.deployment, &moves).await?;
        self.deployment.processes.kill(&placement(leader))?;
        sleep(Duration::from_secs(1)).await;
        self.deployment.start_placement(leader)?;
        self.until_these_end(&moves, false).await;
        self.deployment.until_ready().await?;
        self.end(begun).await
    }

    async fn kill_worker(&mut self, site: u8) -> anyhow::Result<()> {
        let name = self.deployment.name(site);
        say(&format!("Worker 1 of {name} is killed; its flows are made anew by what clients send next."));
        let begun = self.begin("kill worker", Loss::Flows).await;
        self.deployment.processes.kill(&worker(site, 1))?;
        sleep(Duration::from_millis(300)).await;
        self.deployment.start_worker(site, 1)?;
        sleep(Duration::from_secs(1)).await;
        self.deployment.until_ready().await?;
        if self.deployment.is_elastic(site) {
            // The agent may have wanted one more just then, and its hook have been quicker: the second start refuses itself.
            self.deployment.processes.forget_ended(&worker(site, 1));
        }
        self.end(begun).await
    }

    async fn restart_ovs(&mut self, site: u8) -> anyhow::Result<()> {
        say(&format!("ovs-vswitchd of {} is killed and started again.", self.deployment.name(site)));
        let begun = self.begin("restart OVS", Loss::Packets).await;
        self.deployment.restart_ovs(site)?;
        self.deployment.until_ready().await?;
        self.end(begun).await
    }

    // ---- moves --------------------------------------------------------------------------------------------

    async fn start_moves(&self, to: u8) -> anyhow::Result<Vec<u64>> {
        start_moves(&self.deployment, &BUSY, to).await
    }

    async fn moves(&self) -> anyhow::Result<Vec<MoveView>> {
        moves(&self.deployment).await
    }

    async fn until_these_end(&mut self, ids: &[u64], must_be_done: bool) {
        let ended = until_end(&self.deployment, ids).await;
        if let Err(error) = ended.and_then(|done| {
            let whole = done == ids.len() || !must_be_done;
            anyhow::ensure!(whole, "{} of {} moves were given up", ids.len() - done, ids.len());
            Ok(())
        }) {
            self.failures.push(error.to_string());
        }
    }

    async fn until_empty(&self, name: &str) -> usize {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        loop {
            let groups = self.deployment.get("/v1/groups?limit=1000").await.unwrap_or_default();
            let here = |group: &&Value| group["owner"] == name;
            let left = groups["groups"].as_array().map_or(usize::MAX, |all| all.iter().filter(here).count());
            let in_hand = self.moves().await.is_ok_and(|moves| moves.iter().any(MoveView::is_in_hand));
            if (left == 0 && !in_hand) || tokio::time::Instant::now() > ends {
                return left;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits for the first move to a worker that was not there at first, and until there are no more moves. The agent may have begun
    /// before anybody looked.
    async fn until_spread(&mut self, site: u8) {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        let (mut count, mut quiet, mut spread) = (0, 0, false);
        while quiet < 20 || !spread {
            if tokio::time::Instant::now() > ends {
                self.failures.push("scale out: no group has moved to the worker that was started".to_owned());
                return;
            }
            sleep(Duration::from_millis(100)).await;
            let moves = self.local_moves(site).await;
            spread = moves.iter().any(|one| one.to > WORKERS);
            let now = moves.len();
            quiet = if now == count { quiet + 1 } else { 0 };
            count = now;
        }
    }

    async fn local_moves(&self, site: u8) -> Vec<LocalMove> {
        let text = self.deployment.agent_page(site, "/v1/local-moves").await.unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    // ---- what happened ------------------------------------------------------------------------------------

    async fn begin(&self, name: &str, loss: Loss) -> Begun {
        let model_ms = self.model_round_trip_ms().await;
        Begun { name: name.to_owned(), loss, start_us: self.clock.now().0, model_ms }
    }

    /// What the delay model says of the group that pings, there and back, where it is now; nothing while no leader answers.
    async fn model_round_trip_ms(&self) -> Option<f64> {
        let view = self.deployment.get(&format!("/v1/explain?group={}", group_name(BUSY[1]))).await.ok()?;
        let here = view["candidates"].as_array()?.iter().find(|there| there["site"] == view["owner"])?;
        Some(2.0 * (here["total_ms"].as_f64()? - here["rules_ms"].as_f64()?))
    }

    async fn end(&mut self, begun: Begun) -> anyhow::Result<()> {
        let end_us = self.clock.now().0;
        let mut happening = Happening::new(begun.name, begun.loss, begun.start_us, end_us);
        happening.delay.model_before_ms = begun.model_ms;
        happening.delay.model_after_ms = self.model_round_trip_ms().await;
        for view in self.moves().await? {
            if view.is_in_hand() || !self.seen.insert(view.id) {
                continue;
            }
            match &view.summary {
                Some(summary) => happening.moves.push(self.move_report(&view, summary)),
                None => happening.given_up.push(GivenUp {
                    group: view.group,
                    from: view.from,
                    to: view.to,
                    reason: view.abort_reason.unwrap_or(view.state),
                }),
            }
        }
        for site in self.deployment.numbers() {
            let seen = self.local_seen[usize::from(site)];
            let all = self.local_moves(site).await;
            let last = all.last().map_or(seen, |last| last.number);
            // An agent that is another one counts anew.
            let new = all.into_iter().filter(|local| local.number > if last < seen { 0 } else { seen });
            happening.moves.extend(new.map(|local| self.local_report(site, &local)));
            self.local_seen[usize::from(site)] = last;
        }
        if !happening.name.is_empty() {
            happening.lines().iter().for_each(|line| say(line));
        }
        self.happenings.push(happening);
        self.count_probes().await;
        self.failures.extend(self.deployment.processes.ended());
        Ok(())
    }

    fn move_report(&self, view: &MoveView, summary: &Summary) -> MoveReport {
        let id = |name: &str| SiteId(self.deployment.number(name).unwrap_or(0));
        let place = |site: SiteId| &self.deployment.sites[usize::from(site.0).max(1) - 1];
        let delay = |a: SiteId, b: SiteId| underlay::delay(place(a), place(b));
        let sites = self.deployment.numbers().map(SiteId);
        let bound = hold_bound(sites, id(&view.from), id(&view.to), delay);
        report_of(&view.group, (view.from.clone(), view.to.clone()), summary, bound)
    }

    fn local_report(&self, site: u8, local: &LocalMove) -> MoveReport {
        let name = self.deployment.name(site);
        let worker = |number: u16| format!("{name} worker {number}");
        let summary =
            Summary { flows: local.flows, bytes_on_wire: 0, precopy_us: local.precopy_us, hold: local.hold };
        report_of(&local.group, (worker(local.from), worker(local.to)), &summary, Duration::ZERO)
    }

    /// Stops the clients, and tells what they saw.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(super) async fn close(mut self) -> anyhow::Result<Closed> {
        say("The clients finish.");
        self.count_probes().await;
        let Self { mut deployment, clients, mut happenings, probes, mut failures, .. } = self;
        // It blocks; Ctrl-C must be heard meanwhile.
        let seen = tokio::task::spawn_blocking(move || clients.finish()).await??;
        let mut drops = deployment.drops().await;
        for happening in &mut happenings {
            happening.take(&seen);
        }
        failures.extend(deployment.processes.ended());
        drops.sort_unstable();
        Ok(Closed { seen, happenings, probes, failures, drops, deployment })
    }
}

/// What is left when the clients have finished.
pub(super) struct Closed {
    pub(super) seen: Seen,
    pub(super) happenings: Vec<Happening>,
    pub(super) probes: Probes,
    pub(super) failures: Vec<String>,
    pub(super) drops: Vec<String>,
    pub(super) deployment: Deployment,
}

/// The busy groups are at home at the first site, and so are those that talk to what is far; the others in turn.
fn home(group: u8, sites: u8) -> u8 {
    let at_first = BUSY.contains(&group) || far_servers(sites).any(|far| far.group == group);
    if at_first { 1 } else { 1 + (group % sites) }
}

async fn bring_home(deployment: &Deployment, sites: u8) -> anyhow::Result<()> {
    let groups = deployment.get("/v1/groups?limit=1000").await?;
    let owner = |group: u8| {
        let name = group_name(group);
        let all = groups["groups"].as_array()?;
        let found = all.iter().find(|found| found["group"] == name.as_str())?;
        deployment.number(found["owner"].as_str()?)
    };
    let mut ids = Vec::new();
    for site in 1..=sites {
        let away: Vec<_> =
            (0..GROUPS).filter(|g| home(*g, sites) == site && owner(*g) != Some(site)).collect();
        if !away.is_empty() {
            ids.extend(start_moves(deployment, &away, site).await?);
        }
    }
    until_end(deployment, &ids).await.map(drop)
}

async fn start_moves(deployment: &Deployment, groups: &[u8], to: u8) -> anyhow::Result<Vec<u64>> {
    let to = deployment.name(to);
    let wishes: Vec<_> =
        groups.iter().map(|group| json!({ "group": group_name(*group), "to": to })).collect();
    let started = deployment.post("/v1/moves", &json!({ "moves": wishes })).await?;
    let started = started["moves"].as_array().cloned().unwrap_or_default();
    Ok(started.iter().filter_map(|started| started["move"].as_u64()).collect())
}

async fn moves(deployment: &Deployment) -> anyhow::Result<Vec<MoveView>> {
    let moves: Moves = serde_json::from_value(deployment.get("/v1/moves?limit=1000").await?)?;
    Ok(moves.moves)
}

/// Waits until the API says of one of these that the group changes its owner: what is struck then is struck within a move.
async fn until_one_switches(deployment: &Deployment, ids: &[u64]) -> anyhow::Result<()> {
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    loop {
        let views = moves(deployment).await.unwrap_or_default();
        let mut views = views.iter().filter(|view| ids.contains(&view.id));
        if views.clone().any(|view| view.state == "switching") {
            return Ok(());
        }
        if views.clone().count() == ids.len() && !views.any(MoveView::is_in_hand) {
            say("They have moved before anything could be done to them.");
            return Ok(());
        }
        anyhow::ensure!(tokio::time::Instant::now() < ends, "no move comes to its switch");
        sleep(PHASE_LOOK).await;
    }
}

/// Waits until these have ended; how many are done.
async fn until_end(deployment: &Deployment, ids: &[u64]) -> anyhow::Result<usize> {
    let ends = tokio::time::Instant::now() + MOVES_BOUND;
    loop {
        let views = moves(deployment).await.unwrap_or_default();
        let ended = views.iter().filter(|view| ids.contains(&view.id) && !view.is_in_hand());
        let ended: Vec<_> = ended.collect();
        if ended.len() == ids.len() {
            return Ok(ended.iter().filter(|view| view.state == "done").count());
        }
        anyhow::ensure!(
            tokio::time::Instant::now() < ends,
            "{} of {} moves have not ended within {} s",
            ids.len() - ended.len(),
            ids.len(),
            MOVES_BOUND.as_secs()
        );
        sleep(Duration::from_millis(50)).await;
    }
}

fn report_of(group: &str, (from, to): (String, String), summary: &Summary, bound: Duration) -> MoveReport {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let ms = |us: u64| us as f64 / 1_000.0;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let per_flow = summary.bytes_on_wire as f64 / summary.flows.max(1) as f64;
    MoveReport {
        group: group.to_owned(),
        from,
        to,
        flows: summary.flows,
        bytes_on_wire: summary.bytes_on_wire,
        bytes_per_flow: (per_flow * 100.0).round() / 100.0,
        precopy_ms: ms(summary.precopy_us),
        hold_ms_max: ms(summary.hold.us_max),
        excess_over_bound_us: Excess::of(&summary.hold, bound),
    }
}

impl Clients {
    fn start(deployment: &mut Deployment, files: &Files, size: Size, clock: Clock) -> anyhow::Result<Self> {
        let clients = deployment.underlay.clients.clone();
        let far: Vec<_> = deployment.far().collect();
        let processes = &mut deployment.processes;
        let to = server(1);
        let ping = |name: &str, group, to, processes: &mut _| {
            let ping = Ping::start(name, &clients, client(group, HOST_PING), to, clock, processes)?;
            anyhow::Ok((name.to_owned(), ping))
        };
        let per_second = REQUESTS_PER_S / u32::try_from(BUSY.len())?;
        let requests = BUSY.map(|group| {
            // What does not divide is added to the first.
            let rest = if group == BUSY[0] { REQUESTS_PER_S % 3 } else { 0 };
            let plan =
                Plan { group, server: to, per_second: per_second + rest, expected: files.short.clone() };
            Requests::start(&clients, plan, clock)
        });
        let far = far.into_iter().map(|Far { group, address: server, .. }| {
            let expected = files.short.clone();
            Requests::start(&clients, Plan { group, server, per_second: FAR_REQUESTS_PER_S, expected }, clock)
        });
        let (busy, other) = (BUSY[0], BUSY[1]);
        Ok(Self {
            requests: requests.into_iter().collect::<anyhow::Result<_>>()?,
            far: far.collect::<anyhow::Result<_>>()?,
            pings: vec![
                ping("ping-busy", other, to, processes)?,
                ping("ping-quiet", QUIET, server(2), processes)?,
            ],
            typing: Typing::start(&clients, (client(other, HOST_SSH), to), &files.key, clock, processes)?,
            download: Download::start(
                &clients,
                (client(busy, HOST_DOWNLOAD), to),
                &files.big,
                clock,
                processes,
            )?,
            tcp: Iperf::start(
                Kind::Tcp,
                &clients,
                (client(BUSY[2], HOST_IPERF), to),
                size.iperf_seconds,
                clock,
                processes,
            )?,
            udp: Iperf::start(
                Kind::Udp,
                &clients,
                (client(other, HOST_IPERF), to),
                size.iperf_seconds,
                clock,
                processes,
            )?,
        })
    }

    fn finish(self) -> anyhow::Result<Seen> {
        const FINISH_BOUND: Duration = Duration::from_secs(60);
        let Self { mut requests, mut far, pings, mut typing, download, mut tcp, mut udp } = self;
        let ssh_failure = typing.stop().err();
        let mut seen_pings = Vec::new();
        for (name, mut ping) in pings {
            let (samples, twice) = ping.stop();
            seen_pings.push((name, samples, twice));
        }
        let mut wrongs = Wrongs::default();
        let mut http: Vec<Sample> = Vec::new();
        for requests in requests.iter_mut().chain(&mut far) {
            let found = requests.stop();
            wrongs.reset.extend(found.reset);
            wrongs.wrong += found.wrong;
            wrongs.late_at_us.extend(found.late_at_us);
        }
        http.extend(requests.iter().flat_map(|requests| requests.samples.all()));
        http.sort_unstable_by_key(|sample| sample.at_us);
        let downloaded: Downloaded = download.finish(FINISH_BOUND)?;
        let tcp: Measured = tcp.finish(FINISH_BOUND);
        let udp = udp.finish(FINISH_BOUND);
        Ok(Seen {
            http,
            wrongs,
            pings: seen_pings,
            ssh: typing.samples.all(),
            ssh_failure,
            download: downloaded,
            tcp,
            udp,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_groups_begin_together_and_the_quiet_one_is_not_among_them() {
        assert!(BUSY.iter().all(|group| home(*group, 3) == 1 && *group != QUIET));
        assert!((0..GROUPS).all(|group| (1..=2).contains(&home(group, 2))));
    }
}
