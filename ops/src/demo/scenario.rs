//! The acts of the demo.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context;
use flow::{HoldTimes, Prefix, SiteId};
use serde::Deserialize;
use tokio::time::sleep;

use super::cluster::{CLIENTS, Cluster, POOL, Part};
use super::hooked::Thresholds;
use super::report::{Act, BeforeAfter, Excess, GivenUp, MoveReport, Report, RoundTrips, hold_bound};
use super::world::{Delays, GroupSpec, Mark, ServerSpec, SiteSpec, World, WorldHandle, WorldSpec};

/// Packets per second that each site may carry: several times what the demo sends.
pub const CAPACITY_PPS: u64 = 60_000;
/// Groups of each home site.
const GROUPS_PER_SITE: usize = 8;
/// Groups that roam in act 2.
const ROAMING: usize = 4;
/// Servers near each site.
const SERVERS_PER_SITE: u8 = 8;
/// Longest wait for the moves of an act. They take seconds; on a machine that is busy with other things, as long as it lets them.
const MOVES_BOUND: Duration = Duration::from_secs(90);
/// Factors of the load in the surge: the first that makes the workers busy enough is enough.
const SURGE: [f64; 6] = [2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
/// By how much they have to be busier than they usually are.
const SURGE_RISE: f64 = 2.0;
/// With less a surge cannot be told from what varies by itself.
const SURGE_RISE_MIN: f64 = 1.5;
/// Looks at how busy workers are, for one mean: five seconds.
const BUSY_LOOKS: u32 = 10;
/// Between two of them: workers say so twice a second.
const BUSY_LOOK: Duration = Duration::from_millis(500);
/// How often the API is asked how far moves are: a switch takes some tens of milliseconds.
const PHASE_LOOK: Duration = Duration::from_millis(5);
/// Longest wait for a worker to be started or stopped again: thresholds, moves, and ten seconds for which it relays take half a minute.
const SCALE_BOUND: Duration = Duration::from_secs(150);
/// What a site may carry of what it carries, in the act with a limit.
const LIMIT: f64 = 0.7;
/// How long the load is steady at the limit.
const STEADY: Duration = Duration::from_secs(20);
/// Moves that are not too many in that time: a load sways, and one group may have to follow.
const STEADY_MOVES_MAX: usize = 1;
/// How long nothing moves after users have roamed, so that there is something to measure.
const BEFORE: Duration = Duration::from_secs(2);
/// How long an act goes on after its moves, so that there is something to measure.
const AFTER: Duration = Duration::from_secs(4);

/// Says something to whoever watches.
#[expect(clippy::print_stdout, reason = "the demo is for people who watch")]
pub fn say(text: &str) {
    println!("{text}");
}

/// The stage: a deployment, its traffic, and what was found so far.
pub struct Stage {
    cluster: Cluster,
    world: WorldHandle,
    seen: BTreeSet<u64>,
    /// The last move between workers that was taken, of each agent; another one counts anew.
    local_seen: BTreeMap<SiteId, u64>,
    /// In this act.
    first_moved: Option<Mark>,
    /// What was found.
    pub report: Report,
}

/// When an act changed something, and what the delay model said then.
struct Start {
    mark: Mark,
    model_ms: Option<f64>,
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

#[derive(Deserialize)]
struct Groups {
    groups: Vec<GroupView>,
}

#[derive(Deserialize)]
struct GroupView {
    group: String,
    owner: String,
}

/// The traffic that belongs to a cluster: clients at three homes, servers near each site.
#[must_use]
pub fn world_spec(cluster: &Cluster, seed: u64) -> WorldSpec {
    let layout = cluster.layout();
    let sites = layout.site_ids().map(|id| SiteSpec {
        id,
        name: layout.site(id).name.clone(),
        latitude: layout.site(id).latitude,
        longitude: layout.site(id).longitude,
        inside: layout.site_directory(id).join("inside.packets"),
        outside: layout.site_directory(id).join("outside.packets"),
    });
    let groups = (0..GROUPS_PER_SITE * 3).filter_map(|i| {
        let home = SiteId(u8::try_from(i / GROUPS_PER_SITE).ok()? + 1);
        Some(GroupSpec { prefix: group_prefix(i)?, home, servers: server_weights(i, home) })
    });
    let servers = layout.site_ids().flat_map(|site| {
        (0..SERVERS_PER_SITE).map(move |i| ServerSpec {
            address: Ipv4Addr::new(203, 0, site.0, 10 + i),
            site,
            distance: Duration::from_millis(1 + u64::from(i % 3)),
        })
    });
    let pool = POOL.parse().into_iter().collect();
    WorldSpec { seed, ..WorldSpec::new(sites.collect(), groups.collect(), servers.collect(), pool) }
}

/// Most flows go to servers nearby. The groups that will roam to the third site have theirs there from the start.
fn server_weights(group: usize, home: SiteId) -> Vec<(SiteId, f64)> {
    let far = SiteId(3);
    let near = if group < ROAMING { far } else { home };
    (1..=3).map(|site| (SiteId(site), if SiteId(site) == near { 0.8 } else { 0.1 })).collect()
}

fn group_prefix(i: usize) -> Option<Prefix> {
    let clients: Vec<Prefix> = CLIENTS.iter().filter_map(|text| text.parse().ok()).collect();
    let mut rest = i as u128 * 256;
    let within = clients.iter().find(|prefix| {
        let inside = rest < prefix.size();
        if !inside {
            rest -= prefix.size();
        }
        inside
    })?;
    Prefix::new(within.nth(rest)?, 24).ok()
}

impl Stage {
    /// Opens the stage.
    ///
    /// # Errors
    /// When the traffic cannot start.
    pub fn open(cluster: Cluster, spec: WorldSpec) -> anyhow::Result<Self> {
        let world = World::start(spec)?;
        let report = Report {
            version: env!("CARGO_PKG_VERSION").into(),
            machine: super::report::machine(),
            ..Report::default()
        };
        Ok(Self {
            cluster,
            world,
            seen: BTreeSet::new(),
            local_seen: BTreeMap::new(),
            first_moved: None,
            report,
        })
    }

    /// The deployment.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Plays all acts.
    ///
    /// # Errors
    /// When something could not be done at all; what went wrong with the traffic is in the report.
    pub async fn play(&mut self) -> anyhow::Result<()> {
        self.settle().await?;
        self.roam().await?;
        self.surge().await?;
        self.drain().await?;
        self.faults().await?;
        self.back().await?;
        self.limit().await?;
        Ok(())
    }

    fn name(&self, site: u8) -> String {
        self.cluster.layout().site(SiteId(site)).name.clone()
    }

    async fn settle(&mut self) -> anyhow::Result<()> {
        say("\nAct 1: settle. Placement has spread the groups without knowing where their users are.");
        self.world.begin_act("1 settle")?;
        let start = self.start().await;
        sleep(Duration::from_secs(4)).await;
        self.cluster.set_policy(serde_json::json!({ "automatic": true })).await?;
        self.until_moves_end(1).await?;
        self.end("1 settle", start, &[]).await
    }

    async fn roam(&mut self) -> anyhow::Result<()> {
        let (from, to) = (self.name(1), self.name(3));
        say(&format!(
            "\nAct 2: roam. The users of {ROAMING} groups fly from {from} to {to}; their flows stay behind."
        ));
        self.world.begin_act("2 roam")?;
        let groups: Vec<_> = (0..ROAMING).filter_map(group_prefix).collect();
        // So long that there is something to measure before.
        self.cluster.set_policy(serde_json::json!({ "automatic": false })).await?;
        for prefix in &groups {
            self.world.roam(*prefix, SiteId(3))?;
        }
        sleep(Duration::from_millis(1_100)).await;
        let arrived = self.start().await;
        sleep(BEFORE).await;
        self.cluster.set_policy(serde_json::json!({ "automatic": true })).await?;
        self.until_moves_end(ROAMING).await?;
        self.end("2 roam", arrived, &groups).await
    }

    async fn surge(&mut self) -> anyhow::Result<()> {
        let site = SiteId(1);
        say(&format!(
            "\nAct 3: surge. Load in {} grows until its agent starts a third worker; then it falls again.",
            self.name(1)
        ));
        self.world.begin_act("3 surge")?;
        let start = self.start().await;
        let groups: Vec<_> = (ROAMING..GROUPS_PER_SITE).filter_map(group_prefix).collect();
        let usual = self.busy(site).await;
        let (factor, high) = self.raise_load(&groups, site, usual).await?;
        say(&format!(
            "  At {factor} times the load its workers are busy for {:.1} % of their time, {:.1} before.",
            high * 100.0,
            usual * 100.0
        ));
        let left_out = (high < usual * SURGE_RISE_MIN).then(|| {
            "this machine is too busy with other things for workers to tell a surge from what varies by itself".to_owned()
        });
        if let Some(reason) = &left_out {
            say(&format!("  The rest of this act is left out: {reason}."));
            self.set_rate(&groups, 1.0)?;
        } else {
            self.scale(site, usual, high, &groups).await?;
        }
        self.end_act(Act { name: "3 surge".into(), left_out, ..Act::default() }, start, &groups).await
    }

    /// The agent gets thresholds between what is usual and the surge, starts a worker, and stops it again when the load has fallen.
    async fn scale(&mut self, site: SiteId, usual: f64, high: f64, groups: &[Prefix]) -> anyhow::Result<()> {
        let before = self.cluster.worker_count(site).await;
        self.cluster.set_thresholds(site, Thresholds::between(usual, high))?;
        self.local_seen.remove(&site);
        let started = self.until_workers(site, |count| count > before).await;
        if started {
            say("  The agent has started a worker.");
        }
        let used = started && self.until_worker_used(site, before).await;
        self.until_moves_end(0).await?;
        self.set_rate(groups, 1.0)?;
        let stopped = started && self.until_workers(site, |count| count == before).await;
        if stopped {
            say(
                "  Load is as before; the agent has moved the groups of that worker to the others, and stopped it.",
            );
        }
        for (done, what) in [
            (started, "no worker was started"),
            (used || !started, "no group was moved to the new worker"),
            (stopped, "the worker was not stopped again"),
        ] {
            if !done {
                self.report.failures.push(format!("3 surge: {what}"));
            }
        }
        Ok(())
    }

    fn set_rate(&self, groups: &[Prefix], factor: f64) -> anyhow::Result<()> {
        groups.iter().try_for_each(|prefix| self.world.set_rate(*prefix, factor).map(drop))
    }

    /// Until the workers are clearly busier than usual. The factor, and how busy they are.
    async fn raise_load(&self, groups: &[Prefix], site: SiteId, usual: f64) -> anyhow::Result<(f64, f64)> {
        let mut last = (1.0, usual);
        for factor in SURGE {
            self.set_rate(groups, factor)?;
            last = (factor, self.busy(site).await);
            if last.1 >= usual * SURGE_RISE {
                break;
            }
        }
        Ok(last)
    }

    /// The mean share of time that the workers of a site are busy, over some seconds.
    async fn busy(&self, site: SiteId) -> f64 {
        let (mut sum, mut count) = (0.0, 0u32);
        for _ in 0..BUSY_LOOKS {
            sleep(BUSY_LOOK).await;
            let text = self.cluster.site_text(site, "/metrics").await.unwrap_or_default();
            let lines = text.lines().filter(|line| line.starts_with("limosa_worker_busy_ratio{"));
            for share in lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()) {
                (sum, count) = (sum + share, count + 1);
            }
        }
        sum / f64::from(count.max(1))
    }

    async fn drain(&mut self) -> anyhow::Result<()> {
        let name = self.name(2);
        say(&format!("\nAct 4: drain. {name} is emptied for upkeep; its users come in there all the same."));
        self.world.begin_act("4 drain")?;
        let start = self.start().await;
        self.cluster.post(&format!("/v1/sites/{name}/drain"), &serde_json::json!({})).await?;
        self.until_moves_end(GROUPS_PER_SITE).await?;
        let left = self.groups_at(&name).await?.len();
        anyhow::ensure!(left == 0, "{left} groups are still at {name}");
        say(&format!("  {name} serves nothing any more."));
        self.end("4 drain", start, &[]).await
    }

    async fn faults(&mut self) -> anyhow::Result<()> {
        say("\nAct 5: faults. Processes are killed with SIGKILL while groups move.");
        self.world.begin_act("5 faults")?;
        let start = self.start().await;
        self.cluster.set_policy(serde_json::json!({ "automatic": false })).await?;
        let (a, c) = (self.name(1), self.name(3));
        let batch: Vec<_> = self.groups_at(&a).await?.into_iter().take(6).collect();

        let moves = self.start_moves(&batch, &c).await?;
        self.until_one_switches(&moves).await?;
        say(&format!("  The agent of {a} is killed, and started again half a second later."));
        self.cluster.kill(Part::Agent(SiteId(1)))?;
        sleep(Duration::from_millis(500)).await;
        self.cluster.spawn(Part::Agent(SiteId(1)))?;
        self.local_seen.remove(&SiteId(1));
        self.until_these_end(&moves).await;

        let owned: Vec<_> =
            self.groups_at(&c).await?.into_iter().filter(|group| batch.contains(group)).collect();
        let leader = self.cluster.leader().await.context("no leader is known")?;
        let moves = self.start_moves(&owned, &a).await?;
        self.until_one_switches(&moves).await?;
        say(&format!("  Placement node {leader}, the leader, is killed, and started again a second later."));
        self.cluster.kill(Part::Placement(leader))?;
        sleep(Duration::from_secs(1)).await;
        self.cluster.spawn(Part::Placement(leader))?;
        self.until_these_end(&moves).await;

        let batch: Vec<_> =
            self.groups_at(&a).await?.into_iter().filter(|group| batch.contains(group)).collect();
        let moves = self.start_moves(&batch, &c).await?;
        self.until_one_switches(&moves).await?;
        say(&format!("  The switch of {c} loses its controller connection for a second."));
        self.cluster.cut_controller(SiteId(3), Duration::from_secs(1)).await;
        self.until_these_end(&moves).await;
        self.until_moves_end(0).await?;
        self.end("5 faults", start, &[]).await
    }

    async fn back(&mut self) -> anyhow::Result<()> {
        let name = self.name(2);
        say(&format!("\nAct 6: back. {name} takes part again, and its users' groups return."));
        self.world.begin_act("6 back")?;
        let start = self.start().await;
        self.cluster.post(&format!("/v1/sites/{name}/undrain"), &serde_json::json!({})).await?;
        self.cluster.set_policy(serde_json::json!({ "automatic": true })).await?;
        self.until_moves_end(GROUPS_PER_SITE).await?;
        self.end("6 back", start, &[]).await
    }

    /// Who plans from one report to the next moves groups to and fro at a limit: reports sway.
    async fn limit(&mut self) -> anyhow::Result<()> {
        const ACT: &str = "7 limit";
        let name = self.name(3);
        let carries = self.carried(&name).await?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands")]
        let most = (carries * LIMIT) as u64;
        say(&format!(
            "\nAct 7: limit. {name} carries {carries:.0} packets/s; a rule allows {most}. Some groups make way, and then nobody moves."
        ));
        self.world.begin_act(ACT)?;
        let start = self.start().await;
        let rule = serde_json::json!({ "name": "limit", "capacity": { "site": name, "packets_per_s": most, "headroom": 0.1 } });
        self.cluster.set_policy(serde_json::json!({ "rules": [rule] })).await?;
        self.until_moves_end(1).await?;
        let known = self.known_moves().await?;
        sleep(STEADY).await;
        let later = self.known_moves().await?.difference(&known).count();
        say(&format!("  In {} s at the limit {later} groups began to move.", STEADY.as_secs()));
        if later > STEADY_MOVES_MAX {
            self.report.failures.push(format!(
                "{ACT}: {later} moves began in {} s of steady load, {STEADY_MOVES_MAX} is allowed",
                STEADY.as_secs()
            ));
        }
        let left = self.carried(&name).await?;
        self.cluster.set_policy(serde_json::json!({ "rules": [] })).await?;
        say(&format!(
            "  {name} carries {left:.0} packets/s. The rule is taken back, and who made way returns."
        ));
        let ended = self.moves().await?.iter().filter(|view| self.is_new(view)).count();
        self.until_moves_end(ended + 1).await?;
        self.end(ACT, start, &[]).await
    }

    /// What a site carries, in packets per second, by the leader's knowledge.
    async fn carried(&self, site: &str) -> anyhow::Result<f64> {
        let view = self.cluster.get("/v1/placement").await?;
        let found = view["sites"].as_array().and_then(|all| all.iter().find(|known| known["site"] == site));
        found
            .and_then(|found| found["packets_per_s"].as_f64())
            .with_context(|| format!("no load of {site} is known"))
    }

    /// Whether the move is done, and belongs to this act.
    fn is_new(&self, view: &MoveView) -> bool {
        view.state == "done" && !self.seen.contains(&view.id)
    }

    async fn known_moves(&self) -> anyhow::Result<BTreeSet<u64>> {
        Ok(self.moves().await?.into_iter().map(|view| view.id).collect())
    }

    /// Starts moves of groups to a site, and gives their numbers.
    async fn start_moves(&self, groups: &[String], to: &str) -> anyhow::Result<Vec<u64>> {
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        say(&format!("  {} groups start to move to {to}.", groups.len()));
        let moves: Vec<_> =
            groups.iter().map(|group| serde_json::json!({ "group": group, "to": to })).collect();
        let started = self.cluster.post("/v1/moves", &serde_json::json!({ "moves": moves })).await?;
        let started = started["moves"].as_array().cloned().unwrap_or_default();
        Ok(started.iter().filter_map(|started| started["move"].as_u64()).collect())
    }

    /// Waits until the API says of one of these moves that the group changes its owner: what is struck then is struck within a move.
    async fn until_one_switches(&self, moves: &[u64]) -> anyhow::Result<()> {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        loop {
            let views = self.moves().await.unwrap_or_default();
            let mut views = views.iter().filter(|view| moves.contains(&view.id));
            if views.clone().any(|view| view.state == "switching") {
                return Ok(());
            }
            if views.clone().count() == moves.len() && !views.any(is_in_hand) {
                say("  They have moved before anything could be done to them.");
                return Ok(());
            }
            anyhow::ensure!(tokio::time::Instant::now() < ends, "no move comes to its switch");
            sleep(PHASE_LOOK).await;
        }
    }

    /// Waits until these moves have ended, one way or the other.
    async fn until_these_end(&self, moves: &[u64]) {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        loop {
            sleep(Duration::from_millis(100)).await;
            let views = self.moves().await.unwrap_or_default();
            let state =
                |wanted: &str| views.iter().filter(|v| moves.contains(&v.id) && v.state == wanted).count();
            let done = state("done");
            let ended = done + state("aborted") + state("taken_back");
            if ended == moves.len() {
                let given_up =
                    views.iter().filter(|view| moves.contains(&view.id) && view.state == "aborted");
                for reason in given_up.filter_map(|view| view.abort_reason.as_ref()).collect::<BTreeSet<_>>()
                {
                    say(&format!("  Some were given up: {reason}."));
                }
                return say(&format!("  {done} of them have moved, {} were given up.", ended - done));
            }
            if tokio::time::Instant::now() > ends {
                return say(&format!("  Only {ended} of them have ended; going on."));
            }
        }
    }

    /// Waits until so many workers of a site are as wanted; whether they are.
    async fn until_workers(&self, site: SiteId, wanted: impl Fn(usize) -> bool) -> bool {
        let ends = tokio::time::Instant::now() + SCALE_BOUND;
        while !wanted(self.cluster.worker_count(site).await) {
            if tokio::time::Instant::now() > ends {
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
        true
    }

    /// Until the agent has moved a group to a worker beyond the first ones.
    async fn until_worker_used(&self, site: SiteId, first: usize) -> bool {
        let ends = tokio::time::Instant::now() + SCALE_BOUND;
        loop {
            let text = self.cluster.site_text(site, "/v1/local-moves").await.unwrap_or_default();
            let moves: Vec<LocalMove> = serde_json::from_str(&text).unwrap_or_default();
            if moves.iter().any(|one| usize::from(one.to) > first) {
                return true;
            }
            if tokio::time::Instant::now() > ends {
                return false;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn groups_at(&self, site: &str) -> anyhow::Result<Vec<String>> {
        let groups: Groups =
            serde_json::from_value(self.cluster.get(&format!("/v1/groups?site={site}")).await?)?;
        let own = groups.groups.into_iter().filter(|group| group.owner == site);
        Ok(own.map(|group| group.group).collect())
    }

    async fn moves(&self) -> anyhow::Result<Vec<MoveView>> {
        let moves: Moves = serde_json::from_value(self.cluster.get("/v1/moves?limit=1000").await?)?;
        Ok(moves.moves)
    }

    /// Waits until so many moves have ended since the last act, and none has been in hand for two seconds.
    async fn until_moves_end(&mut self, least: usize) -> anyhow::Result<()> {
        let ends = tokio::time::Instant::now() + MOVES_BOUND;
        let mut quiet = 0;
        let mut told = 0;
        while quiet < 20 {
            if tokio::time::Instant::now() > ends {
                say("  This takes longer than it should; going on.");
                return Ok(());
            }
            sleep(Duration::from_millis(100)).await;
            let Ok(moves) = self.moves().await else { continue };
            let in_hand = moves.iter().filter(|m| is_in_hand(m)).count();
            let ended = moves.iter().filter(|m| self.is_new(m)).count();
            if ended > told {
                self.first_moved.get_or_insert(self.world.mark());
                told = ended;
                say(&format!("  {ended} groups have moved, {in_hand} are on their way."));
            }
            quiet = if in_hand == 0 && ended >= least { quiet + 1 } else { 0 };
        }
        Ok(())
    }

    /// Measures, and closes the act. Delays are those of `groups`, or of all; before: since `changed`, until the first had moved.
    async fn end(&mut self, name: &str, changed: Start, groups: &[Prefix]) -> anyhow::Result<()> {
        self.end_act(Act { name: name.to_owned(), ..Act::default() }, changed, groups).await
    }

    async fn end_act(&mut self, mut act: Act, changed: Start, groups: &[Prefix]) -> anyhow::Result<()> {
        let moved = self.world.mark();
        let first_moved = self.first_moved.take().unwrap_or(moved);
        sleep(AFTER).await;
        let model_after = self.model_round_trip_ms().await;
        let all: Vec<_> = CLIENTS.iter().filter_map(|text| text.parse().ok()).collect();
        let groups = if groups.is_empty() { &all[..] } else { groups };
        let user_delay_ms = BeforeAfter {
            before: self.world.delay_window(groups, changed.mark, Some(first_moved))?,
            after: self.world.delay_window(groups, moved, None)?,
        };
        let mean = |window: anyhow::Result<Delays>| window.map(|delays| delays.mean);
        let round_trip_ms = RoundTrips {
            model_before: changed.model_ms,
            model_after,
            requests_before: mean(self.world.delay_window(&all, changed.mark, Some(first_moved)))?,
            requests_after: mean(self.world.delay_window(&all, moved, None))?,
        };
        (act.user_delay_ms, act.round_trip_ms) = (user_delay_ms, round_trip_ms);
        self.collect_moves(&mut act).await?;
        self.collect_local_moves(&mut act).await?;
        act.take(self.world.end_act()?);
        self.tell(&act);
        for part in self.cluster.ended() {
            self.report.failures.push(format!("{}: {part} ended by itself", act.name));
        }
        self.report.acts.push(act);
        Ok(())
    }

    fn tell(&self, act: &Act) {
        let p = &act.packets;
        say(&format!(
            "  {} groups with {} flows moved. {} packets: {} lost, {} duplicated, {} reordered; {} connections, {} reset.",
            act.groups_moved,
            act.flows_moved,
            p.sent,
            p.lost,
            p.duplicated,
            p.reordered,
            act.tcp.connections,
            act.tcp.reset
        ));
        let (before, after) = (&act.user_delay_ms.before, &act.user_delay_ms.after);
        say(&format!(
            "  Requests took {:.0} ms at the 95th percentile before, {:.0} ms after.",
            before.p95, after.p95
        ));
        let means = act.round_trip_ms;
        if let (Some(model_before), Some(model_after)) = (means.model_before, means.model_after) {
            say(&format!(
                "  On the mean of all users they took {:.0} ms, then {:.0}; the delay model says {model_before:.0} ms, then \
                 {model_after:.0}.",
                means.requests_before, means.requests_after
            ));
        }
    }

    /// The beginning of what an act changes.
    async fn start(&self) -> Start {
        Start { mark: self.world.mark(), model_ms: self.model_round_trip_ms().await }
    }

    /// What the leader thinks that packets take there and back, as a mean over all packets; nothing while it knows
    /// of none.
    async fn model_round_trip_ms(&self) -> Option<f64> {
        let view = self.cluster.get("/v1/placement").await.ok()?;
        view["groups"].as_u64().filter(|groups| *groups > 0)?;
        Some(2.0 * view["delay_ms"].as_f64()?)
    }

    async fn collect_moves(&mut self, act: &mut Act) -> anyhow::Result<()> {
        for view in self.moves().await? {
            if is_in_hand(&view) || !self.seen.insert(view.id) {
                continue;
            }
            match &view.summary {
                Some(summary) => act.moves.push(self.move_report(&view, summary)),
                None => act.moves_given_up.push(given_up(view)),
            }
        }
        Ok(())
    }

    fn move_report(&self, view: &MoveView, summary: &Summary) -> MoveReport {
        let layout = self.cluster.layout();
        let id = |name: &str| layout.site_ids().find(|id| layout.site(*id).name == name).unwrap_or_default();
        let bound = hold_bound(layout.site_ids(), id(&view.from), id(&view.to), |a, b| layout.delay(a, b));
        report_of(&view.group, view.from.clone(), view.to.clone(), summary, bound)
    }

    async fn collect_local_moves(&mut self, act: &mut Act) -> anyhow::Result<()> {
        for site in self.cluster.layout().site_ids().collect::<Vec<_>>() {
            let Ok(text) = self.cluster.site_text(site, "/v1/local-moves").await else { continue };
            let moves: Vec<LocalMove> = serde_json::from_str(&text)?;
            let seen = self.local_seen.entry(site).or_default();
            let new: Vec<_> = moves.into_iter().filter(|m| m.number > *seen).collect();
            *seen = new.last().map_or(*seen, |last| last.number);
            let name = self.cluster.layout().site(site).name.clone();
            act.moves.extend(new.into_iter().map(|m| {
                let summary =
                    Summary { flows: m.flows, bytes_on_wire: 0, precopy_us: m.precopy_us, hold: m.hold };
                let worker = |worker: u16| format!("{name} worker {worker}");
                report_of(&m.group, worker(m.from), worker(m.to), &summary, Duration::ZERO)
            }));
        }
        Ok(())
    }

    /// Stops the traffic, and accounts for what was still on its way.
    ///
    /// # Errors
    /// When the world has ended.
    pub async fn close(&mut self) -> anyhow::Result<()> {
        let total = self.world.drain()?;
        if total.packets.lost > 0 {
            let (missing, drops) = (total.missing.join("; "), self.cluster.drops().await.join("; "));
            let what = format!("{} packets lost in all: {missing}; dropped: {drops}", total.packets.lost);
            self.report.failures.push(what);
        }
        if total.packets.reordered > 0 {
            let opened = self.cluster.opened_holds().await;
            let opened = if opened.is_empty() { "none".to_owned() } else { opened.join("; ") };
            self.report.failures.push(format!("packets reordered; holds that were opened early: {opened}"));
        }
        // The median: a machine that is busy with other things has tails of its own.
        let improved = |act: &Act| act.user_delay_ms.after.p50 < act.user_delay_ms.before.p50;
        if self.report.acts.get(1).is_some_and(|act| !improved(act)) {
            self.report.failures.push("2 roam: the median of delays did not become less".into());
        }
        self.report.sum_up();
        Ok(())
    }
}

fn given_up(view: MoveView) -> GivenUp {
    let reason = view.abort_reason.unwrap_or(view.state);
    GivenUp { group: view.group, from: view.from, to: view.to, reason }
}

fn is_in_hand(view: &MoveView) -> bool {
    view.state == "preparing" || view.state == "switching"
}

fn report_of(group: &str, from: String, to: String, summary: &Summary, bound: Duration) -> MoveReport {
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
