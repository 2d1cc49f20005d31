//! What surrounds the agent's core: sockets to workers, switch, placement and peers, one clock, and the task that carries
//! inputs in and outputs out.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dataplane::control::{Event, Request};
use flow::nat::NatSlices;
use flow::{Micros, MoveId, ServiceId, SiteId, WorkerId};
use placement::client::{Client, ClientError};
use placement::core::Command;
use placement::raft::Changes;
use switchctl::session::{Session, SessionOptions, SwitchEvent};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use transfer::core::ToSource;
use transfer::name::NodeName;
use transfer::quic::{Endpoint, Limits};

use super::core::{Agent, Input, Output};
use super::elastic::HookEnd;
use super::fleet::Fleet;
use super::metrics::{SiteMetrics, UnreachedPeer};
use super::prober::Prober;
use super::reports::Reporter;
use super::switch::Switch;
use super::unreached::Unreached;
use super::{moves, workers};
use crate::clock::{Clock, wall_ms};
use crate::config::{Peer, SiteConfig};
use crate::keys::{self, Keys};
use crate::net::{Link, QuicTransport};

/// Inputs that may wait for the core; beyond, whoever brings them waits, and exports pause.
const INPUTS_MAX: usize = 256;
/// Between two statistics of the workers, and two reports to placement.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait of one watch for changes.
const WATCH_WAIT: Duration = Duration::from_secs(2);

/// How long an agent that was told to stop waits for the moves in hand to end. Most take a second; what takes longer goes
/// on from the log with the next start.
const STOP_WAIT: Duration = Duration::from_secs(10);
/// Between two looks whether moves have ended.
const STOP_LOOK: Duration = Duration::from_millis(100);

/// The outside slices of each service, for those who encode and decode.
pub type Slices = Arc<BTreeMap<ServiceId, NatSlices>>;

/// A shell around one agent.
pub struct Shell {
    agent: Agent,
    clock: Clock,
    /// Ends the present watch, for one that is answered at once.
    catch_up: Arc<Notify>,
    inputs: mpsc::Sender<Input>,
    switch: Switch,
    client: Arc<Client>,
    workers: workers::Workers,
    endpoint: Endpoint,
    cluster: String,
    peers: BTreeMap<SiteId, PeerSite>,
    unreached: Unreached,
    /// Moves from here that are to have a stream, and where to. A site that is no peer has none.
    outgoing: BTreeMap<MoveId, (SiteId, Option<moves::Stream>)>,
    incoming: moves::Incoming,
    /// Who has sent the input that is being taken.
    asking: Option<SiteId>,
    slices: watch::Sender<Slices>,
    metrics: Arc<SiteMetrics>,
    rate: Arc<moves::RateLimit>,
    prober: Arc<Prober>,
    reporter: Reporter,
    fleet: Fleet,
    /// The workers that the site is not ready without,
    expected: Vec<WorkerId>,
    /// or, where they come and go with the load, how many.
    workers_min: Option<usize>,
}

/// Another site, and the way to it.
struct PeerSite {
    spec: Peer,
    link: Arc<Link>,
}

/// Keys of the configuration that change while the agent runs, each with all below it: with a new site, or with how much moves and
/// measurements may use.
pub const LIVE: &[&str] = &["moves.rate_mbit_per_s", "openvswitch.tunnels.remotes", "peers", "probe"];

fn node_name(config: &SiteConfig) -> NodeName {
    NodeName::site(&config.tls.cluster, &config.name)
}

/// Whether an agent could start with these files: all that can be told without taking anything.
///
/// # Errors
/// When it would not.
pub fn check(config: &SiteConfig) -> anyhow::Result<()> {
    keys::read(&config.tls, &node_name(config))?;
    Ok(())
}

/// Runs the agent of a site until the token is cancelled and the moves in hand have ended, or were waited for long
/// enough. What `changes` brings differs from `config` in the keys of [`LIVE`] alone.
///
/// # Errors
/// When keys, addresses or sockets cannot be had; what fails later is tried again.
pub async fn run(
    config: SiteConfig,
    mut changes: watch::Receiver<Option<Arc<SiteConfig>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let node = node_name(&config);
    let (endpoint, keys) = keys::endpoint(config.listen, &config.tls, &node, Limits::site())?;
    let transport = Arc::new(QuicTransport::new(&endpoint, &config.tls.cluster, &config.placement));
    let members = config.placement.iter().map(|node| node.id).collect();
    let client = Arc::new(Client::new(transport, members));
    let options = SessionOptions { in_force: config.switch.in_force.clone(), ..SessionOptions::default() };
    let sentinel = options.in_force.proof().sentinel();
    let (switch, switch_events) = Session::spawn(config.switch.address.clone(), options);
    let guarded = config.switch.openvswitch.as_ref().is_some_and(|settings| settings.check_fail_mode);
    let switch = Switch::new(switch, sentinel, guarded);
    let (inputs, mut queue) = mpsc::channel(INPUTS_MAX);
    let metrics = Arc::new(SiteMetrics::new(&config.name)?);
    keys.register(metrics.registry())?;
    metrics.judge_keys(keys.clone());
    let (fleet, mut hook_ends) = Fleet::new(config.site, config.elastic.clone(), metrics.registry())?;
    let server =
        crate::site::http::serve(config.metrics, metrics.clone(), switch.clone(), fleet.page()).await?;
    let mut shell = Shell::new(&config, &endpoint, client, switch, inputs.clone(), metrics, fleet);
    let reloaded = keys.clone();
    crate::signals::on_reload("certificates", move || Ok(reloaded.reload()?));
    // Moves in hand need the helpers until the very end.
    let end = CancellationToken::new();
    let _ends_with_this = end.clone().drop_guard();
    shell.spawn_helpers(&config, &endpoint, keys, switch_events, inputs, end);
    tracing::info!(site = %config.name, listen = %config.listen, "the agent runs");
    shell.run(&mut queue, &mut hook_ends, &mut changes, &stop).await;
    server.abort();
    endpoint.close().await;
    Ok(())
}

/// Differs with every start of the agent, whatever the clock says: the standard library keys its hash maps from the system's source.
fn incarnation() -> u32 {
    RandomState::new().hash_one("incarnation") as u32
}

/// The workers that are heard before anything is done: those of the configuration, and those that came with the load, whose control
/// sockets are there.
fn expected(config: &SiteConfig) -> BTreeSet<WorkerId> {
    let found = control_paths(&config.workers).into_iter().map(|(worker, _)| worker);
    let found = found.filter(|worker| config.worker_ports.contains(worker));
    config.expected.iter().copied().chain(found).collect()
}

impl Shell {
    fn new(
        config: &SiteConfig,
        endpoint: &Endpoint,
        client: Arc<Client>,
        switch: Switch,
        inputs: mpsc::Sender<Input>,
        metrics: Arc<SiteMetrics>,
        fleet: Fleet,
    ) -> Self {
        let ports = config.switch.ports.clone();
        let prober = Arc::new(Prober::new(config.probe.clone()));
        let mut shell = Self {
            agent: Agent::new(config.site, incarnation(), ports, expected(config), config.bounds),
            clock: Clock::start(),
            catch_up: Arc::default(),
            workers: workers::Workers::new(config.site, inputs.clone()),
            inputs,
            switch,
            endpoint: endpoint.clone(),
            cluster: config.tls.cluster.clone(),
            peers: BTreeMap::new(),
            unreached: Unreached::default(),
            outgoing: BTreeMap::new(),
            incoming: moves::Incoming::default(),
            asking: None,
            slices: watch::Sender::default(),
            metrics,
            rate: Arc::new(moves::RateLimit::new(config.rate_bytes_per_s)),
            reporter: Reporter::start(&client, &prober),
            client,
            prober,
            fleet,
            expected: config.expected.clone(),
            workers_min: config.elastic.as_ref().map(|elastic| elastic.limits.min),
        };
        shell.set_peers(&config.peers);
        shell
    }

    /// Takes other peers, and gives those that are new, gone, or reached by another way. The way to one that is as before stays.
    fn set_peers(&mut self, specs: &[Peer]) -> BTreeSet<SiteId> {
        let mut before = std::mem::take(&mut self.peers);
        let mut others = BTreeSet::new();
        for spec in specs {
            let same = before.remove(&spec.site).filter(|known| known.spec == *spec);
            let peer = same.unwrap_or_else(|| {
                others.insert(spec.site);
                let name = NodeName::site(&self.cluster, &spec.name);
                let link = Arc::new(Link::new(self.endpoint.clone(), spec.address.clone(), name));
                PeerSite { spec: spec.clone(), link }
            });
            self.peers.insert(spec.site, peer);
        }
        self.incoming.set_peers(specs.iter().map(|spec| (spec.site, spec.name.clone())).collect());
        others.extend(before.into_keys());
        others
    }

    /// Takes another configuration, of which only the keys of [`LIVE`] are others. Moves to a peer that is reached by another way have a
    /// new stream.
    fn reconfigure(&mut self, config: &SiteConfig) {
        let others = self.set_peers(&config.peers);
        let moves = self.outgoing.iter().filter(|(_, (to, _))| others.contains(to));
        let moves: Vec<_> = moves.map(|(&id, &(to, _))| (id, to)).collect();
        for (id, to) in moves {
            self.outgoing.remove(&id);
            self.take(Input::PeerDown(id));
            self.connect(id, to);
        }
        self.take(Input::Ports(config.switch.ports.clone()));
        self.settle();
        self.rate.set(config.rate_bytes_per_s);
        self.prober.set(config.probe.clone());
    }

    fn spawn_helpers(
        &self,
        config: &SiteConfig,
        endpoint: &Endpoint,
        keys: Arc<Keys>,
        switch_events: mpsc::Receiver<SwitchEvent>,
        inputs: mpsc::Sender<Input>,
        stop: CancellationToken,
    ) {
        let until = |future: futures::future::BoxFuture<'static, ()>| {
            let stop = stop.clone();
            tokio::spawn(async move {
                tokio::select! { () = stop.cancelled() => {}, () = future => {} }
            });
        };
        until(Box::pin(self.workers.clone().discover(config.workers.clone(), config.worker_ports.clone())));
        until(Box::pin(watch_switch(switch_events, inputs.clone(), self.metrics.clone())));
        until(Box::pin(self.switch.clone().watch_drift(self.metrics.clone())));
        until(Box::pin(self.switch.clone().watch_counters(self.metrics.clone())));
        if let Some(settings) = config.switch.openvswitch.clone().filter(|settings| settings.check_fail_mode)
            && let Some(database) = settings.database.clone()
        {
            until(Box::pin(self.switch.clone().guard(database, settings, self.metrics.clone())));
        }
        until(Box::pin(self.prober.clone().run()));
        let heard = Heard { client: self.client.clone(), metrics: self.metrics.clone() };
        let watch = watch_placement(heard, self.clock, self.catch_up.clone(), inputs.clone());
        until(Box::pin(watch));
        until(Box::pin(moves::accept(
            endpoint.listen(),
            self.incoming.clone(),
            inputs,
            self.slices.subscribe(),
        )));
        until(Box::pin(keys.watch()));
    }

    async fn run(
        &mut self,
        queue: &mut mpsc::Receiver<Input>,
        hook_ends: &mut mpsc::Receiver<HookEnd>,
        changes: &mut watch::Receiver<Option<Arc<SiteConfig>>>,
        stop: &CancellationToken,
    ) {
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = 0;
        let mut told = false;
        let mut look = tokio::time::interval(STOP_LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wait = self.agent.poll_timeout().map_or(Duration::from_secs(1), |at| self.until(at));
            tokio::select! {
                _ = look.tick(), if told => {
                    self.metrics.stops();
                    looks += 1;
                    if self.may_stop(looks) {
                        return;
                    }
                }
                () = stop.cancelled(), if !told => {
                    told = true;
                    self.take(Input::Stop);
                    look.reset_immediately();
                }
                input = queue.recv() => {
                    let Some(input) = input else { return };
                    self.take(input);
                    // What is there is taken before anything else is looked at.
                    while let Ok(input) = queue.try_recv() {
                        self.take(input);
                    }
                    self.settle();
                }
                () = tokio::time::sleep(wait) => {
                    let now = self.clock.now();
                    self.agent.handle_timeout(now);
                    self.settle();
                }
                Ok(()) = changes.changed() => {
                    let config = changes.borrow_and_update().clone();
                    if let Some(config) = config {
                        self.reconfigure(&config);
                    }
                }
                Some(end) = hook_ends.recv() => self.fleet.hook_ended(end, self.clock.now()),
                _ = report.tick() => {
                    self.look_at_workers();
                    self.settle();
                    self.report();
                }
            }
        }
    }

    /// Whether no move is in hand here any more, or they were waited for long enough.
    fn may_stop(&self, looks: u32) -> bool {
        let (out, comes_in) = (self.outgoing.len(), !self.incoming.is_empty());
        if out == 0 && !comes_in {
            return true;
        }
        let late = STOP_LOOK * looks >= STOP_WAIT;
        if late {
            tracing::warn!(out, comes_in, "moves are still in hand: the next start goes on with them");
        }
        late
    }

    fn look_at_workers(&mut self) {
        for input in self.fleet.look(&self.agent, self.clock.now()) {
            self.take(input);
        }
    }

    fn until(&self, at: Micros) -> Duration {
        Duration::from_micros(at.since(self.clock.now()).0)
    }

    fn take(&mut self, input: Input) {
        let decided = matches!(input, Input::Placement { .. });
        if let Input::Worker(worker, Event::Stats(stats)) = &input {
            self.metrics.worker(*worker, stats);
        }
        if let Input::FromSource { move_id, from, .. } = &input {
            if let Err(error) = self.incoming.check(*move_id, *from) {
                return tracing::debug!(%error, "a message about another site's move is left out");
            }
            self.asking = Some(*from);
        }
        let now = self.clock.now();
        self.agent.handle(input, now);
        if decided {
            let slices = self.agent.plan().services;
            self.slices.send_if_modified(|old| {
                let changed = **old != slices;
                *old = Arc::new(slices);
                changed
            });
            let sites = self.agent.sites().values().map(|site| (site.id, site.name.clone()));
            self.incoming.learn(self.agent.sources().collect(), sites.collect());
        }
        self.carry_out();
        self.asking = None;
    }

    /// No more inputs are at hand.
    fn settle(&mut self) {
        let now = self.clock.now();
        self.agent.settle(now);
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.agent.poll_output() {
            match output {
                Output::Worker(worker, request) => self.workers.send(worker, &request),
                Output::CatchUp => self.catch_up.notify_one(),
                Output::Rules(rules, tag) => self.switch.set_rules(rules, tag),
                Output::PacketOut(packet) => self.switch.packet_out(packet),
                Output::Connect(id, site) => self.connect(id, site),
                Output::Hangup(id) => {
                    self.outgoing.remove(&id);
                }
                Output::ToTarget(id, message) => {
                    if let Some((_, Some(stream))) = self.outgoing.get(&id) {
                        stream.send(message);
                    }
                }
                Output::ToSource(id, message) => self.answer(id, message),
                Output::Propose(command) => self.propose(command),
                Output::Disconnect(worker) => self.workers.disconnect(worker),
            }
        }
    }

    /// Answers the source of a move, or who asks about one that is not known here yet.
    fn answer(&self, id: MoveId, message: ToSource) {
        if let Some(peer) = self.incoming.source(id).or(self.asking) {
            self.incoming.answer(id, peer, message);
        }
    }

    fn connect(&mut self, id: MoveId, site: SiteId) {
        let Some(spec) = self.agent.move_spec(id) else { return };
        let Some(link) = self.peers.get(&site).map(|peer| peer.link.clone()) else {
            self.outgoing.insert(id, (site, None));
            return tracing::error!(%site, "a move leads to a site that is not among the peers of the configuration");
        };
        let stream = moves::Stream::start(|overflow| moves::Outgoing {
            spec,
            link,
            inputs: self.inputs.clone(),
            slices: self.slices.subscribe(),
            rate: self.rate.clone(),
            metrics: self.metrics.clone(),
            overflow,
        });
        self.outgoing.insert(id, (site, Some(stream)));
    }

    /// Each proposal has a task until the log answers: a few per move in hand.
    fn propose(&self, command: Command) {
        let client = self.client.clone();
        tokio::spawn(async move {
            let answer = until_answered(|| client.propose(command.clone())).await;
            if let Err(error) = answer {
                tracing::debug!(%error, ?command, "the log refused");
            }
        });
    }

    fn missing_workers(&self) -> Vec<WorkerId> {
        let there = self.agent.connected_workers();
        if self.workers_min.is_some_and(|min| there.len() >= min) {
            return Vec::new();
        }
        self.expected.iter().copied().filter(|worker| !there.contains(worker)).collect()
    }

    /// A peer whose site is not alive is said to be silent by placement.
    fn look_for_peers(&mut self, now: Micros) {
        let is_alive = |peer: &PeerSite| {
            let site = self.agent.sites().get(&peer.spec.site);
            site.is_some_and(|site| site.name == peer.spec.name && site.alive)
        };
        let away = |peer: &&PeerSite| is_alive(peer) && peer.link.connection().is_none();
        let away = self.peers.values().filter(away).map(|peer| peer.spec.site).collect();
        let unreached = self.unreached.look(&away, now);
        let named = |(site, span): (SiteId, Micros)| {
            let peer = self.peers.get(&site)?;
            Some(UnreachedPeer { name: peer.spec.name.clone(), address: peer.spec.address.to_string(), span })
        };
        self.metrics.unreached(unreached.into_iter().filter_map(named).collect());
    }

    /// Asks the workers for statistics, and tells placement of the last ones. Nothing here waits for anybody.
    fn report(&mut self) {
        self.workers.broadcast(&Request::Stats);
        let now = self.clock.now();
        self.look_for_peers(now);
        let agent = &self.agent;
        let (silent, unlinked) = (agent.silent_workers(now), agent.unlinked_workers());
        self.metrics.silence(&silent, &unlinked, &agent.waiting_moves(now));
        self.metrics.overdue(&agent.overdue_moves(now));
        self.metrics.missing(&self.missing_workers());
        self.metrics.placement(self.client.silence());
        let us = |rtt: Duration| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX);
        // The way to a peer that is no site any more says nothing of the site that has its number now.
        let known = |peer: &&PeerSite| {
            agent.sites().get(&peer.spec.site).is_some_and(|site| site.name == peer.spec.name)
        };
        let rtts = self.peers.values().filter(known);
        let rtts = rtts.filter_map(|peer| Some((peer.spec.site, us(peer.link.round_trip()?))));
        let rtts: Vec<_> = rtts.collect();
        self.reporter.send(self.metrics.report(&self.agent, &rtts, &self.prober, REPORT_INTERVAL));
    }
}

/// However long there is no quorum: a machine proposes once, and its move would never end. A refusal means that the log knows better, and
/// the watch will say what.
async fn until_answered<T, F: Future<Output = Result<T, ClientError>>>(
    ask: impl Fn() -> F,
) -> Result<T, ClientError> {
    loop {
        match ask().await {
            Err(ClientError::Timeout { ms, last }) => tracing::warn!(ms, last, "no answer from the log"),
            answer => return answer,
        }
    }
}

async fn watch_switch(
    mut events: mpsc::Receiver<SwitchEvent>,
    inputs: mpsc::Sender<Input>,
    metrics: Arc<SiteMetrics>,
) {
    while let Some(event) = events.recv().await {
        metrics.switch(&event);
        match event {
            SwitchEvent::InForce { tag, .. } => {
                if inputs.send(Input::InForce(tag)).await.is_err() {
                    return;
                }
            }
            SwitchEvent::Connected { rules, .. } => tracing::info!(rules, "the switch is there"),
            SwitchEvent::Disconnected => tracing::warn!("the switch is gone; it keeps its rules"),
            SwitchEvent::Error(error) => tracing::warn!(%error, "the switch refused"),
            // Said where it is kept for the readiness.
            SwitchEvent::Silent(_) | SwitchEvent::Answering => {}
        }
    }
}

/// Whom placement is asked by, and who is told that it answered.
struct Heard {
    client: Arc<Client>,
    metrics: Arc<SiteMetrics>,
}

async fn watch_placement(heard: Heard, clock: Clock, catch_up: Arc<Notify>, inputs: mpsc::Sender<Input>) {
    let (mut since, mut wait, mut asked) = (0, WATCH_WAIT, false);
    loop {
        let asked_at = clock.now();
        let answer = tokio::select! {
            biased;
            changes = heard.client.watch(since, wait) => Some(changes),
            () = catch_up.notified() => None,
        };
        let Some(answer) = answer else {
            (wait, asked) = (Duration::ZERO, true);
            continue;
        };
        heard.metrics.decided();
        let Changes { revision, reset, changes, more } = answer;
        since = revision;
        wait = WATCH_WAIT;
        if !std::mem::take(&mut asked) && !reset && changes.is_empty() {
            continue;
        }
        let wall_ms = wall_ms();
        let input = Input::Placement { asked_at, more, revision: since, wall_ms, reset, changes };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// The control socket of each worker, by number.
#[must_use]
pub fn worker_of(path: &std::path::Path) -> Option<WorkerId> {
    let number = path.file_name()?.to_str()?.strip_prefix("worker-")?.strip_suffix(".control")?;
    let worker = number.parse().ok().map(WorkerId)?;
    // No other spelling, such as `worker-01.control`.
    (worker.to_string() == number).then_some(worker)
}

/// Where a worker listens, for those who look. What is no socket is nobody's.
#[must_use]
pub fn control_paths(directory: &std::path::Path) -> Vec<(WorkerId, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let is_socket = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_socket);
    paths.filter_map(|path| Some((worker_of(&path)?, path))).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_a_socket_with_the_name_of_a_worker_is_one() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        for name in ["worker-1.control", "worker-02.control", "worker-+3.control", "other-4.control"] {
            let _listens = std::os::unix::net::UnixListener::bind(path(name)).unwrap();
        }
        std::fs::write(path("worker-5.control"), "").unwrap();
        assert_eq!(control_paths(place.path()), [(WorkerId(1), path("worker-1.control"))]);
    }

    #[tokio::test]
    async fn a_proposal_is_repeated_for_as_long_as_there_is_no_quorum() {
        let asked = Cell::new(0);
        let answer = until_answered(|| {
            asked.set(asked.get() + 1);
            let quorum = asked.get() > 1_000;
            let timeout = || ClientError::Timeout { ms: 5_000, last: "no quorum".to_owned() };
            std::future::ready(quorum.then_some(7).ok_or_else(timeout))
        });
        assert_eq!((answer.await.unwrap(), asked.get()), (7, 1_001));
    }
}
