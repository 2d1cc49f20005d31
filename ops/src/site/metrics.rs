//! What the agent counts and reports: metrics for Prometheus, loads and delays for placement.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use dataplane::control::{RoundTrip, Stats, Talk};
use flow::{GroupId, Micros, MoveId, Prefix, SiteId, WorkerId};
use placement::core::{
    ClientRtt, GroupReport, GroupTalk, PeerRtt, REPORT_WAYS_MAX, ServerRtt, SiteReport, TALK_LEN_MAX,
};
use prometheus::{Gauge, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use switchctl::PortNo;
use switchctl::core::driver::SILENCE_BOUND;
use switchctl::ofp::{PortStats, TableStats};
use switchctl::session::SwitchEvent;

use super::core::Agent;
use super::evidence::Evidence;
use super::prober::Prober;
use crate::clock::Clock;
use crate::keys::Keys;

/// A leader of placement has to have taken a report within so long. Sites report twice a second; an election takes longer, and nothing
/// is decided while it lasts.
pub const PLACEMENT_SILENCE_MAX: Duration = Duration::from_millis(1_500);
/// The check for it. Placement is not told: it would hear of it when it is over.
const REPORTS_TAKEN: &str = "placement takes the site's reports (within 1.5 s)";

/// Ways that wait for a report, to clients and servers together; more are left out.
const WAYS_MAX: usize = 2 * REPORT_WAYS_MAX;
/// Groups whose servers wait for a report; more are left out.
const TALKS_MAX: usize = 16_384;
/// Server prefixes of one of them; the report has those with the most handshakes.
const TALK_SERVERS_MAX: usize = 64;

/// The check of the readiness that fails while the switch is silent, with the bound of [`SILENCE_BOUND`].
const SWITCH_ANSWERS: &str = "the switch answers (within 1.5 s)";
const _: () = assert!(SILENCE_BOUND.0 == 1_500_000);

/// The check that fails while rules lead to ports that are not there.
const PORTS: &str = "the switch has a port for each peer and worker (asked every 5 s)";
/// The check that fails when peers refuse the certificate. Connections that are there go on.
const CERTIFICATE: &str = "the certificate is valid";

/// Counters and gauges of one agent.
pub struct SiteMetrics {
    registry: Registry,
    state: Mutex<State>,
    clock: Clock,
    evidence: Mutex<Evidence>,
    keys: OnceLock<Arc<Keys>>,
    packets: IntGaugeVec,
    holds_opened: IntGaugeVec,
    flows: IntGaugeVec,
    busy: GaugeVec,
    rtt: GaugeVec,
    probes: IntGaugeVec,
    moves: IntGaugeVec,
    in_progress: IntGaugeVec,
    flows_sent: IntCounter,
    bytes_sent: IntCounter,
    longest_wait: Gauge,
    overdue_moves: IntGauge,
    silent_workers: IntGauge,
    unreached_peers: IntGauge,
    unlinked_workers: IntGauge,
    missing_workers: IntGauge,
    placement_silence: Gauge,
    hold_max: Gauge,
    switch_connected: IntGauge,
    switch_silent: Gauge,
    switch_errors: IntCounter,
    rule_changes: IntCounter,
    rules: IntGauge,
    rules_drift: IntGauge,
    ports_missing: IntGauge,
    fail_mode: IntGaugeVec,
    table_packets: IntGaugeVec,
    port_packets: IntGaugeVec,
    groups: IntGauge,
    groups_relayed: IntGauge,
    revision: IntGauge,
}

/// Whom a round trip is with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Clients(GroupId),
    Servers(Prefix),
}

/// Round trips of several workers, in microseconds.
#[derive(Clone, Copy)]
struct Trips {
    count: u32,
    min_us: u32,
    sum_us: u64,
    answered: Option<SocketAddr>,
}

impl Trips {
    fn mean_us(&self) -> u32 {
        u32::try_from(self.sum_us / u64::from(self.count.max(1))).unwrap_or(u32::MAX)
    }
}

#[derive(Default)]
struct State {
    /// Peers whose round trip is shown.
    rtt_peers: BTreeSet<String>,
    busy: BTreeMap<WorkerId, f64>,
    /// Handshakes since the last report.
    ways: BTreeMap<(Way, SiteId), Trips>,
    talks: BTreeMap<GroupId, BTreeMap<Prefix, u32>>,
    synced: bool,
    serving: bool,
    in_force: bool,
    connected: bool,
    /// For how long nothing was heard of the switch, once that is too long.
    switch_silent: Option<Duration>,
    /// The ports that the switch has, as it said last; none before.
    switch_ports: BTreeSet<PortNo>,
    /// Those that the agent's rules lead to and the switch has not.
    ports_missing: Vec<PortNo>,
    /// Whether the fail mode is secure, where it is looked at.
    fail_mode: Option<bool>,
    local_moves: Vec<super::core::LocalMove>,
    /// The agent was told to stop.
    stopping: bool,
    /// Checks that failed at the last report, and those of them that it told of.
    failing: Vec<&'static str>,
    told: Vec<&'static str>,
    silent: Vec<WorkerId>,
    unreached: Vec<UnreachedPeer>,
    unlinked: Vec<WorkerId>,
    missing: Vec<WorkerId>,
    waiting: Vec<MoveId>,
    overdue: Vec<MoveId>,
    /// No leader of placement has taken a report for too long.
    unheard: bool,
}

impl State {
    fn add_trips(&mut self, sample: &RoundTrip) {
        let way = sample.group.map_or(Way::Servers(sample.prefix), Way::Clients);
        let key = (way, sample.ingress);
        if self.ways.len() >= WAYS_MAX && !self.ways.contains_key(&key) {
            return;
        }
        let none = Trips { count: 0, min_us: u32::MAX, sum_us: 0, answered: None };
        let trips = self.ways.entry(key).or_insert(none);
        trips.count = trips.count.saturating_add(sample.count);
        trips.min_us = trips.min_us.min(sample.min_us);
        trips.sum_us += u64::from(sample.mean_us) * u64::from(sample.count);
        trips.answered = sample.answered.or(trips.answered);
    }

    fn add_talk(&mut self, talk: &Talk) {
        if self.talks.len() >= TALKS_MAX && !self.talks.contains_key(&talk.group) {
            return;
        }
        let servers = self.talks.entry(talk.group).or_default();
        for (server, count) in &talk.servers {
            if servers.len() < TALK_SERVERS_MAX || servers.contains_key(server) {
                let sum = servers.entry(*server).or_insert(0);
                *sum = sum.saturating_add(*count);
            }
        }
    }

    /// Mean round trip to the servers of a group by its handshakes since the last report.
    fn remote_rtt_us(&self, group: &GroupId) -> Option<u32> {
        let (mut sum_us, mut handshakes) = (0_u64, 0_u64);
        for (server, count) in self.talks.get(group)? {
            let ways = self
                .ways
                .range((Way::Servers(*server), SiteId(0))..=(Way::Servers(*server), SiteId(u8::MAX)));
            let least = ways.map(|(_, trips)| trips.min_us).min()?;
            sum_us += u64::from(least) * u64::from(*count);
            handshakes += u64::from(*count);
        }
        u32::try_from(sum_us.checked_div(handshakes)?).ok()
    }

    /// Moves what was seen into a report, as far as its bounds allow; the rest waits for the next.
    fn give_trips(&mut self, report: &mut SiteReport) {
        self.ways.retain(|&(way, ingress), trips| {
            let Trips { count, min_us, answered, .. } = *trips;
            let mean_us = trips.mean_us();
            match way {
                Way::Clients(group) if report.clients.len() < REPORT_WAYS_MAX => {
                    report.clients.push(ClientRtt { group, ingress, count, min_us, mean_us });
                    false
                }
                Way::Servers(prefix) if report.servers.len() < REPORT_WAYS_MAX => {
                    let ingress = Some(ingress);
                    report.servers.push(ServerRtt { prefix, ingress, count, min_us, mean_us, answered });
                    false
                }
                Way::Clients(_) | Way::Servers(_) => true,
            }
        });
        for (group, servers) in std::mem::take(&mut self.talks) {
            let mut servers: Vec<_> = servers.into_iter().collect();
            servers.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
            servers.truncate(TALK_LEN_MAX);
            report.talks.push(GroupTalk { group, servers });
        }
    }
}

impl SiteMetrics {
    /// All metrics at zero.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn new(site: &str) -> anyhow::Result<Self> {
        let labels = std::iter::once(("site".to_owned(), site.to_owned())).collect();
        let registry = Registry::new_custom(None, Some(labels))?;
        let clock = Clock::start();
        let gauge = |name: &str, help: &str, labels: &[&str]| -> anyhow::Result<IntGaugeVec> {
            let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let float = |name: &str, help: &str, labels: &[&str]| -> anyhow::Result<GaugeVec> {
            let gauge = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str| -> anyhow::Result<IntCounter> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let single = |name: &str, help: &str| -> anyhow::Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let hold_max =
            Gauge::new("limosa_migration_hold_seconds_max", "Longest hold of a packet by a move to here")?;
        registry.register(Box::new(hold_max.clone()))?;
        let longest_wait = Gauge::new(
            "limosa_move_silent_target_seconds_max",
            "Longest silence of a target that may have the token of a move from here",
        )?;
        registry.register(Box::new(longest_wait.clone()))?;
        let placement_silence = Gauge::new(
            "limosa_placement_silence_seconds",
            "Time since a leader of placement took a report of this site",
        )?;
        registry.register(Box::new(placement_silence.clone()))?;
        let switch_silent = Gauge::new(
            "limosa_switch_silent_seconds",
            "For how long a connected switch has been silent though it was asked; 0 while it answers",
        )?;
        registry.register(Box::new(switch_silent.clone()))?;
        let build =
            IntGaugeVec::new(Opts::new("limosa_build_info", "Version of this process"), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            longest_wait,
            overdue_moves: single(
                "limosa_moves_overdue",
                "Moves from here that have been switching for more than a minute",
            )?,
            placement_silence,
            missing_workers: single(
                "limosa_workers_missing",
                "Expected workers without a connection: they do not run, or their control sockets are gone",
            )?,
            unlinked_workers: single(
                "limosa_workers_unlinked",
                "Workers that answer and have no link to the switch",
            )?,
            silent_workers: single(
                "limosa_workers_silent",
                "Workers whose connection is there and that do not answer",
            )?,
            unreached_peers: single(
                "limosa_peers_unreached",
                "Peer sites that are alive and that this agent has had no connection to for ten seconds",
            )?,
            packets: gauge(
                "limosa_worker_packets",
                "Packets by fate since the worker started",
                &["worker", "fate"],
            )?,
            holds_opened: gauge(
                "limosa_worker_holds_opened_early",
                "Holds that ended before what they waited for had come, by cause since the worker started: packets may be out of order",
                &["worker", "cause"],
            )?,
            flows: gauge("limosa_flow_table_entries", "Flows in the worker's table", &["worker"])?,
            busy: float(
                "limosa_worker_busy_ratio",
                "Share of time that the worker was not idle",
                &["worker"],
            )?,
            rtt: float("limosa_path_rtt_seconds", "Round trip to a peer site over QUIC", &["peer_site"])?,
            probes: gauge(
                "limosa_probes",
                "Servers asked for an answer since the agent started, by what became of it",
                &["outcome"],
            )?,
            moves: gauge(
                "limosa_migrations",
                "Moves that ended since the agent started",
                &["direction", "outcome"],
            )?,
            in_progress: gauge("limosa_migrations_in_progress", "Moves in hand", &["direction"])?,
            flows_sent: counter("limosa_migration_flows_total", "Flow records sent to other sites")?,
            bytes_sent: counter("limosa_migration_bytes_total", "Encoded bytes of them")?,
            switch_connected: single("limosa_switch_connected", "1 while the switch answers")?,
            switch_errors: counter("limosa_switch_errors_total", "Requests that the switch refused")?,
            rule_changes: counter("limosa_switch_rule_changes_total", "Rules added, changed or removed")?,
            rules: single("limosa_switch_rules", "Rules that are wanted of the switch")?,
            rules_drift: single(
                "limosa_switch_rules_drift",
                "Rules that were not as wanted when they were compared last",
            )?,
            ports_missing: single(
                "limosa_switch_ports_missing",
                "Ports that rules lead to and that the switch has not: packets for them are lost",
            )?,
            fail_mode: gauge(
                "limosa_switch_fail_mode_secure",
                "1 while the bridge is known to keep its rules without a controller; absent where it is not looked at",
                &[],
            )?,
            table_packets: gauge(
                "limosa_switch_table_packets",
                "Packets that came to a table of the switch, by whether a rule matched; those that it missed are dropped",
                &["table", "fate"],
            )?,
            port_packets: gauge(
                "limosa_switch_port_packets",
                "Packets of a port of the switch by fate, as the switch counts them",
                &["port", "fate"],
            )?,
            groups: single("limosa_groups", "Groups of this site that have a worker")?,
            groups_relayed: single(
                "limosa_groups_relayed",
                "Groups that this site has given away and still relays for ingresses that lead here",
            )?,
            revision: single("limosa_config_revision", "Revision of placement that the agent follows")?,
            hold_max,
            switch_silent,
            clock,
            evidence: Mutex::new(Evidence::new(&registry, clock.now())?),
            registry,
            state: Mutex::default(),
            keys: OnceLock::new(),
        })
    }

    /// Where other metrics of the agent are registered.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn evidence(&self) -> std::sync::MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A placement node answered what has been decided, be it nothing.
    pub fn decided(&self) {
        self.evidence().decided(self.clock.now());
    }

    /// Takes a worker's statistics.
    pub fn worker(&self, worker: WorkerId, stats: &Stats) {
        let label = worker.to_string();
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for (fate, value) in fates(stats) {
            self.packets.with_label_values(&[label.as_str(), fate]).set(signed(value));
        }
        for (cause, value) in openings(stats) {
            self.holds_opened.with_label_values(&[label.as_str(), cause]).set(signed(value));
        }
        self.flows.with_label_values(&[&label]).set(signed(stats.counters.flows));
        self.busy.with_label_values(&[&label]).set(stats.busy);
        let mut state = self.state();
        state.busy.insert(worker, stats.busy);
        stats.round_trips.iter().for_each(|sample| state.add_trips(sample));
        stats.talks.iter().for_each(|talk| state.add_talk(talk));
    }

    /// Takes an event of the switch.
    pub fn switch(&self, event: &SwitchEvent) {
        match event {
            SwitchEvent::Connected { .. } => self.set_connected(true),
            SwitchEvent::Disconnected => self.set_connected(false),
            SwitchEvent::Silent(span) => self.set_silent(Some(*span)),
            SwitchEvent::Answering => self.set_silent(None),
            SwitchEvent::InForce { changes, .. } => self.rule_changes.inc_by(*changes as u64),
            SwitchEvent::Error(_) => self.switch_errors.inc(),
        }
    }

    fn set_connected(&self, connected: bool) {
        self.switch_connected.set(connected.into());
        self.state().connected = connected;
        // Of a connection that is gone nothing is expected, and a new one has just answered.
        self.set_silent(None);
    }

    fn set_silent(&self, silent: Option<Duration>) {
        self.switch_silent.set(silent.unwrap_or_default().as_secs_f64());
        let before = std::mem::replace(&mut self.state().switch_silent, silent);
        match (before, silent) {
            (None, Some(span)) => {
                let ms = span.as_millis();
                tracing::warn!(ms, "the switch is silent though it was asked: it is stopped, or hangs");
            }
            (Some(_), None) => tracing::info!("the switch answers again, or its connection ended"),
            _ => {}
        }
    }

    /// From now on the readiness says whether peers take the certificate.
    pub fn judge_keys(&self, keys: Arc<Keys>) {
        let _ = self.keys.set(keys);
    }

    /// A check that fails, with what is known of it.
    #[must_use]
    pub fn describe(&self, check: &str) -> String {
        if check == CERTIFICATE
            && let Some(why) = self.keys.get().and_then(|keys| keys.refused())
        {
            return format!("{check}: {why}");
        }
        if let Some(found) = self.evidence().describe(check, self.clock.now()) {
            return format!("{check}: {found}");
        }
        let state = self.state();
        match state.switch_silent {
            Some(span) if check == SWITCH_ANSWERS => {
                format!("{check}: switch silent for {} ms", span.as_millis())
            }
            _ if check == PORTS && !state.ports_missing.is_empty() => {
                let missing: Vec<_> = state.ports_missing.iter().map(PortNo::to_string).collect();
                format!("{check}: it has no port {}", missing.join(", "))
            }
            _ => check.to_owned(),
        }
    }

    /// Takes a comparison of all rules: how many are wanted, and how many were not as wanted now and a moment ago.
    pub fn drift(&self, wanted: usize, differences: usize) {
        self.evidence().compared(differences, self.clock.now());
        self.rules.set(i64::try_from(wanted).unwrap_or(i64::MAX));
        self.rules_drift.set(i64::try_from(differences).unwrap_or(i64::MAX));
    }

    /// Takes a look at the bridge's fail mode.
    pub fn fail_mode(&self, secure: bool) {
        self.fail_mode.with_label_values::<&str>(&[]).set(secure.into());
        self.state().fail_mode = Some(secure);
    }

    /// Takes the switch's counters. Tables that no packet came to are left out: Open vSwitch has hundreds.
    pub fn switch_counters(&self, tables: &[TableStats], ports: &[PortStats]) {
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for table in tables.iter().filter(|table| table.lookups > 0) {
            let label = table.table.to_string();
            let missed = table.lookups.saturating_sub(table.matched);
            for (fate, value) in [("matched", table.matched), ("missed", missed)] {
                self.table_packets.with_label_values(&[label.as_str(), fate]).set(signed(value));
            }
        }
        if !ports.is_empty() {
            self.state().switch_ports = ports.iter().map(|port| port.port).collect();
        }
        for port in ports {
            let label = port.port.to_string();
            let fates = [
                ("received", port.rx_packets),
                ("sent", port.tx_packets),
                ("dropped_received", port.rx_dropped),
                ("dropped_to_send", port.tx_dropped),
            ];
            for (fate, value) in fates {
                self.port_packets.with_label_values(&[label.as_str(), fate]).set(signed(value));
            }
        }
    }

    /// Counts records sent.
    pub fn sent(&self, flows: u64, bytes: u64) {
        self.flows_sent.inc_by(flows);
        self.bytes_sent.inc_by(bytes);
    }

    /// What placement gets to know; also brings the gauges up to date. Round trips are told once.
    pub fn report(
        &self,
        agent: &Agent,
        rtts: &[(SiteId, u32)],
        prober: &Prober,
        interval: Duration,
    ) -> SiteReport {
        self.evidence().looked(self.clock.now());
        self.update(agent, rtts);
        for (fate, count) in prober.counts() {
            self.probes.with_label_values(&[fate]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let problems = self.problems();
        let mut state = self.state();
        let per_s = |count: u64| count * 1_000 / u64::try_from(interval.as_millis().max(1)).unwrap_or(1);
        let groups: Vec<_> = agent
            .loads()
            .values()
            .map(|load| GroupReport {
                group: load.group,
                packets_per_s: per_s(load.packets),
                flows: load.flows,
                bits_per_s: per_s(load.bytes.saturating_mul(8)),
                inside_ingress: load.inside_ingress.clone(),
                outside_ingress: load.outside_ingress.clone(),
                remote_rtt_us: state.remote_rtt_us(&load.group),
            })
            .collect();
        let mut report = SiteReport {
            site: agent.site(),
            packets_per_s: groups.iter().map(|group| group.packets_per_s).sum(),
            busy: state.busy.values().copied().fold(0.0, f64::max),
            groups,
            peers: rtts.iter().map(|&(site, rtt_us)| PeerRtt { site, rtt_us }).collect(),
            servers: prober.take(),
            probes_per_s: prober.per_second(),
            problems,
            ..SiteReport::default()
        };
        state.give_trips(&mut report);
        report
    }

    /// The checks that fail and what else is wrong, as placement is told of them.
    fn problems(&self) -> Vec<String> {
        let told = |check: &(&str, bool)| !check.1 && check.0 != REPORTS_TAKEN;
        let failing: Vec<_> = self.checks().into_iter().filter(told).map(|(check, _)| check).collect();
        let told = {
            let mut state = self.state();
            let before = std::mem::replace(&mut state.failing, failing.clone());
            state.told = lasting(failing, &before, &state.told);
            state.told.clone()
        };
        let failing = told.iter().map(|check| format!("not ready: {}", self.describe(check)));
        failing.chain(self.remarks()).collect()
    }

    fn update(&self, agent: &Agent, rtts: &[(SiteId, u32)]) {
        let mut peers = BTreeSet::new();
        for (site, rtt_us) in rtts {
            let name = agent.sites().get(site).map_or_else(|| site.to_string(), |site| site.name.clone());
            self.rtt.with_label_values(&[&name]).set(f64::from(*rtt_us) / 1e6);
            peers.insert(name);
        }
        // A peer that is no site any more, or is not reached, has no last value.
        let before = std::mem::replace(&mut self.state().rtt_peers, peers.clone());
        for name in before.difference(&peers) {
            let _ = self.rtt.remove_label_values(&[name]);
        }
        let counts = agent.counts();
        let ended = [
            ("out", "ok", counts.moves_done_out),
            ("in", "ok", counts.moves_done_in),
            ("out", "aborted", counts.moves_aborted),
            ("out", "taken_back", counts.moves_taken_back),
            ("local", "ok", counts.moves_local),
        ];
        for (direction, outcome, count) in ended {
            self.moves.with_label_values(&[direction, outcome]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let (out, inc) = agent.moves_in_hand();
        for (direction, count) in [("out", out), ("in", inc)] {
            self.in_progress.with_label_values(&[direction]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        #[expect(clippy::cast_precision_loss, reason = "microseconds of one move")]
        self.hold_max.set(counts.hold_us_max as f64 / 1e6);
        let (own, relayed) = agent.count_local();
        self.groups.set(i64::try_from(own).unwrap_or(i64::MAX));
        self.groups_relayed.set(i64::try_from(relayed).unwrap_or(i64::MAX));
        self.forget_workers(&agent.connected_workers());
        self.compare_ports(&wanted_ports(agent));
        let mut state = self.state();
        self.revision.set(i64::try_from(agent.revision()).unwrap_or(i64::MAX));
        state.synced = agent.is_synced();
        state.serving = agent.is_serving_all();
        state.in_force = agent.is_in_force();
        state.local_moves = agent.local_log().iter().copied().collect();
    }

    /// Notes which ports the switch should have and has not.
    fn compare_ports(&self, wanted: &BTreeSet<PortNo>) {
        let mut state = self.state();
        let missing =
            if state.switch_ports.is_empty() { BTreeSet::new() } else { wanted - &state.switch_ports };
        self.ports_missing.set(i64::try_from(missing.len()).unwrap_or(i64::MAX));
        state.ports_missing = missing.into_iter().collect();
    }

    /// A worker that is gone has no last value: its load is no load of the site.
    fn forget_workers(&self, there: &BTreeSet<WorkerId>) {
        let mut state = self.state();
        let gone: Vec<_> = state.busy.keys().copied().filter(|worker| !there.contains(worker)).collect();
        for worker in gone {
            state.busy.remove(&worker);
            let label = worker.to_string();
            let _ = self.flows.remove_label_values(&[&label]);
            let _ = self.busy.remove_label_values(&[&label]);
            for (fate, _) in fates(&Stats::default()) {
                let _ = self.packets.remove_label_values(&[label.as_str(), fate]);
            }
            for (cause, _) in openings(&Stats::default()) {
                let _ = self.holds_opened.remove_label_values(&[label.as_str(), cause]);
            }
        }
    }

    /// The text for Prometheus.
    #[must_use]
    pub fn text(&self) -> String {
        self.evidence().show(self.clock.now());
        let reloads = Registry::new();
        let mut families = self.registry.gather();
        if crate::signals::metrics(&reloads).is_ok() {
            families.extend(reloads.gather());
        }
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }

    /// The last moves between workers, as of the last report.
    #[must_use]
    pub fn local_moves(&self) -> Vec<super::core::LocalMove> {
        self.state().local_moves.clone()
    }

    /// Who does not answer, as of now; what is new is logged.
    pub fn silence(&self, workers: &[WorkerId], unlinked: &[WorkerId], moves: &[(MoveId, Micros)]) {
        self.silent_workers.set(i64::try_from(workers.len()).unwrap_or(i64::MAX));
        let longest = moves.iter().map(|(_, silent)| silent.0).max().unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "microseconds of one move")]
        self.longest_wait.set(longest as f64 / 1e6);
        let mut state = self.state();
        let words =
            ["the worker does not answer: it is stopped, or hangs", "the worker answers again, or is gone"];
        tell_changed(&mut state.silent, workers, words);
        self.unlinked_workers.set(i64::try_from(unlinked.len()).unwrap_or(i64::MAX));
        let words = [
            "the worker has no link to the switch",
            "the worker has its link to the switch again, or is gone",
        ];
        tell_changed(&mut state.unlinked, unlinked, words);
        for (id, _) in moves.iter().filter(|(id, _)| !state.waiting.contains(id)) {
            tracing::warn!(%id, "the target of a move is silent and may serve: if its site is lost, use `limosa site fail-over`");
        }
        state.waiting = moves.iter().map(|(id, _)| *id).collect();
    }

    /// The peers that are alive and not reached, as of now; what is new is logged.
    pub fn unreached(&self, peers: Vec<UnreachedPeer>) {
        self.unreached_peers.set(i64::try_from(peers.len()).unwrap_or(i64::MAX));
        let mut state = self.state();
        let is_among = |peers: &[UnreachedPeer], name: &str| peers.iter().any(|peer| peer.name == name);
        for peer in peers.iter().filter(|peer| !is_among(&state.unreached, &peer.name)) {
            tracing::warn!(peer = %peer.name, address = %peer.address, "a peer that is alive is not reached");
        }
        for peer in state.unreached.iter().filter(|peer| !is_among(&peers, &peer.name)) {
            tracing::info!(peer = %peer.name, "the peer is reached again, or is not alive");
        }
        state.unreached = peers;
    }

    /// What is wrong and makes the site no less ready.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        self.state().unreached.iter().map(ToString::to_string).collect()
    }

    /// The moves that have been switching for too long, as of now; what is new is logged.
    pub fn overdue(&self, moves: &[(MoveId, Micros)]) {
        self.overdue_moves.set(i64::try_from(moves.len()).unwrap_or(i64::MAX));
        let mut state = self.state();
        for (id, since) in moves.iter().filter(|(id, _)| !state.overdue.contains(id)) {
            tracing::warn!(
                %id, switching_s = since.0 / 1_000_000,
                "a move does not end: if both sites have their workers and a leader is there, restart the agent of its source, which \
                 begins it anew from what its worker has"
            );
        }
        state.overdue = moves.iter().map(|(id, _)| *id).collect();
    }

    /// The expected workers that are not there, as of now; what is new is logged.
    pub fn missing(&self, workers: &[WorkerId]) {
        self.missing_workers.set(i64::try_from(workers.len()).unwrap_or(i64::MAX));
        let words = [
            "an expected worker is not there: it does not run, or its control socket is gone",
            "an expected worker is there",
        ];
        tell_changed(&mut self.state().missing, workers, words);
    }

    /// How long no leader of placement has taken a report; what is new is logged.
    pub fn placement(&self, silence: Duration) {
        self.placement_silence.set(silence.as_secs_f64());
        let unheard = silence > PLACEMENT_SILENCE_MAX;
        match (std::mem::replace(&mut self.state().unheard, unheard), unheard) {
            (false, true) => tracing::warn!(
                silence_s = silence.as_secs_f64(),
                "no leader of placement takes this site's reports: its lease ends, and nothing is decided for it"
            ),
            (true, false) => tracing::info!("a leader of placement takes this site's reports again"),
            _ => {}
        }
    }

    /// What must hold for the site to be ready, each with whether it does.
    #[must_use]
    pub fn checks(&self) -> Vec<(&'static str, bool)> {
        let state = self.state();
        let mut checks = vec![
            ("placement and workers were heard", state.synced),
            ("all groups of the site are served", state.serving),
            (REPORTS_TAKEN, !state.unheard),
            ("every expected worker is there", state.missing.is_empty()),
            ("every worker answers (within 1.5 s)", state.silent.is_empty()),
            ("every worker has its link to the switch", state.unlinked.is_empty()),
            ("no move waits for a silent site that may have its token", state.waiting.is_empty()),
            ("no move has been switching for more than a minute", state.overdue.is_empty()),
            ("the switch is connected", state.connected),
            (SWITCH_ANSWERS, state.switch_silent.is_none()),
            ("the switch follows the newest rules", state.in_force),
            (PORTS, state.ports_missing.is_empty()),
        ];
        checks.extend(self.evidence().checks(self.clock.now()));
        checks.extend(
            state
                .fail_mode
                .map(|secure| ("the bridge keeps its rules without the agent (fail mode)", secure)),
        );
        checks.extend(self.keys.get().map(|keys| (CERTIFICATE, keys.refused().is_none())));
        if state.stopping {
            checks.push(("the agent goes on (it was told to stop, and ends with its moves)", false));
        }
        checks
    }

    /// From now on the site is not ready: the agent was told to stop.
    pub fn stops(&self) {
        self.state().stopping = true;
    }
}

/// The ports that rules may lead to: to clients, to the world, to each peer, and to the workers that are there.
fn wanted_ports(agent: &Agent) -> BTreeSet<PortNo> {
    let ports = agent.ports();
    let workers = agent.connected_workers();
    let workers = ports.workers.iter().filter(|(worker, _)| workers.contains(worker)).map(|(_, port)| *port);
    let tunnels = ports.tunnels.values().map(|tunnel| tunnel.port);
    [ports.inside, ports.outside].into_iter().chain(tunnels).chain(workers).collect()
}

/// Which checks that fail a report tells of. What fails for a moment, as the newest rules do with every move, is no problem; but where nothing
/// is left of what was told before, and something fails, it is that under another name: a worker that was silent is gone.
fn lasting(failing: Vec<&'static str>, before: &[&'static str], told: &[&'static str]) -> Vec<&'static str> {
    let lasting: Vec<_> = failing.iter().filter(|check| before.contains(check)).copied().collect();
    if lasting.is_empty() && !told.is_empty() { failing } else { lasting }
}

/// A peer that is alive, as placement hears of it, and that this agent has no connection to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreachedPeer {
    /// The site's name.
    pub name: String,
    /// Where its agent is connected to.
    pub address: String,
    /// For how long.
    pub span: Micros,
}

impl fmt::Display for UnreachedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, address, span } = self;
        let seconds = span.0 / 1_000_000;
        write!(
            f,
            "no connection to the agent of {name} at {address} for {seconds} s, though placement hears it: no flow moves between the two"
        )
    }
}

/// Logs of which workers a fault is told now that was not before, and of which it is told no more.
fn tell_changed(before: &mut Vec<WorkerId>, now: &[WorkerId], [begins, ends]: [&str; 2]) {
    for worker in now.iter().filter(|worker| !before.contains(worker)) {
        tracing::warn!(%worker, "{begins}");
    }
    for worker in before.iter().filter(|worker| !now.contains(worker)) {
        tracing::info!(%worker, "{ends}");
    }
    *before = now.to_vec();
}

fn openings(stats: &Stats) -> [(&'static str, u64); 3] {
    let c = &stats.counters;
    [("full", c.hold_opened_early), ("no_cut", c.hold_without_cut), ("no_marker", c.hold_without_marker)]
}

fn fates(stats: &Stats) -> [(&'static str, u64); 27] {
    let c = &stats.counters;
    [
        ("received", c.received),
        ("sent", c.sent),
        ("made", c.made),
        ("translated_out", c.translated_out),
        ("translated_in", c.translated_in),
        ("hairpinned", c.hairpinned),
        ("relayed", c.relayed),
        ("icmp_by_port", c.icmp_by_port),
        ("held", c.held),
        ("held_now", c.held_now),
        ("markers", c.markers),
        ("dropped_malformed", c.dropped_malformed),
        ("dropped_no_group", c.dropped_no_group),
        ("dropped_no_mapping", c.dropped_no_mapping),
        ("dropped_port_block_exhausted", c.dropped_port_block_exhausted),
        ("dropped_table_full", c.dropped_table_full),
        ("dropped_hold_full", c.dropped_hold_full),
        ("dropped_unsupported", c.dropped_unsupported),
        ("dropped_ttl", c.dropped_ttl),
        ("dropped_bad_checksum", c.dropped_bad_checksum),
        ("dropped_tx_full", c.dropped_tx_full),
        ("dropped_tx_error", c.dropped_tx_error),
        ("dropped_link_down", c.dropped_link_down),
        ("dropped_no_buffer", c.dropped_no_buffer),
        ("dropped_oversize", c.dropped_oversize),
        ("dropped_rx_missed", c.dropped_rx_missed),
        ("dropped_rx_error", c.dropped_rx_error),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trip(group: Option<u8>, ingress: u8, count: u32, min_us: u32) -> RoundTrip {
        let group: Option<GroupId> = group.map(|n| format!("1:100.64.{n}.0/24").parse().unwrap());
        let server = "203.0.113.0/24".parse().unwrap();
        RoundTrip {
            prefix: group.map_or(server, |group| group.prefix),
            remote: group.is_none(),
            group,
            ingress: SiteId(ingress),
            answered: group.is_none().then(|| "203.0.113.7:443".parse().unwrap()),
            count,
            min_us,
            mean_us: 2 * min_us,
        }
    }

    #[test]
    fn what_tables_of_the_switch_miss_is_told() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let table = |table, lookups, matched| TableStats { table, active: 1, lookups, matched };
        let port = PortStats { port: PortNo(2), rx_dropped: 4, ..PortStats::default() };
        metrics.switch_counters(&[table(0, 9, 7), table(1, 0, 0)], &[port]);
        let text = metrics.text();
        let told = |line: &str| text.lines().any(|told| told == line);
        assert!(told(r#"limosa_switch_table_packets{fate="missed",table="0",site="ams"} 2"#), "{text}");
        assert!(told(r#"limosa_switch_table_packets{fate="matched",table="0",site="ams"} 7"#), "{text}");
        assert!(
            told(r#"limosa_switch_port_packets{fate="dropped_received",port="2",site="ams"} 4"#),
            "{text}"
        );
        assert!(!text.contains(r#"table="1""#), "{text}");
    }

    #[test]
    fn a_port_that_the_switch_has_not_is_said_by_its_number() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let failing = || {
            let checks = metrics.checks().into_iter().filter(|(_, holds)| !holds);
            checks.map(|(check, _)| metrics.describe(check)).find(|check| check.starts_with(PORTS))
        };
        let wanted = BTreeSet::from([1, 2, 1002, 1003].map(PortNo));
        let port = |number| PortStats { port: PortNo(number), ..PortStats::default() };
        metrics.compare_ports(&wanted);
        assert_eq!(failing(), None, "the switch was not asked yet");
        metrics.switch_counters(&[], &[port(1), port(2), port(1003)]);
        // No answer, as while the switch is gone, says nothing.
        metrics.switch_counters(&[], &[]);
        metrics.compare_ports(&wanted);
        assert_eq!(failing().as_deref(), Some(&*format!("{PORTS}: it has no port 1002")));
        assert!(metrics.text().contains("limosa_switch_ports_missing{site=\"ams\"} 1"));
        metrics.switch_counters(&[], &[port(1), port(2), port(1002), port(1003)]);
        metrics.compare_ports(&wanted);
        assert_eq!(failing(), None);
    }

    #[test]
    fn a_switch_that_is_silent_is_said_with_how_long() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let failing = || {
            let checks = metrics.checks().into_iter().filter(|(_, holds)| !holds);
            checks.map(|(check, _)| metrics.describe(check)).filter(|check| check.contains("answers"))
        };
        let silent_s = |value: &str| {
            let line = format!("limosa_switch_silent_seconds{{site=\"ams\"}} {value}");
            metrics.text().lines().any(|told| told == line)
        };
        metrics.switch(&SwitchEvent::Connected { datapath: 1, rules: 0 });
        assert_eq!(failing().count(), 0);
        assert!(silent_s("0"));
        metrics.switch(&SwitchEvent::Silent(Duration::from_millis(2_500)));
        let told: Vec<_> = failing().collect();
        assert_eq!(told, ["the switch answers (within 1.5 s): switch silent for 2500 ms"]);
        assert!(silent_s("2.5"));
        metrics.switch(&SwitchEvent::Answering);
        assert!(failing().count() == 0 && silent_s("0"));
        metrics.switch(&SwitchEvent::Silent(Duration::from_millis(2_500)));
        metrics.switch(&SwitchEvent::Disconnected);
        assert!(failing().count() == 0 && silent_s("0"));
    }

    #[test]
    fn a_worker_that_is_gone_has_no_last_value() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let busy = |busy| Stats { busy, ..Stats::default() };
        metrics.worker(WorkerId(1), &busy(0.25));
        metrics.worker(WorkerId(2), &busy(0.75));
        metrics.forget_workers(&[WorkerId(1)].into());
        let text = metrics.text();
        assert!(text.contains(r#"limosa_worker_busy_ratio{worker="1",site="ams"} 0.25"#), "{text}");
        assert!(!text.contains(r#"worker="2""#), "{text}");
        let state = metrics.state();
        assert_eq!(state.busy, [(WorkerId(1), 0.25)].into());
    }

    #[test]
    fn a_peer_that_is_not_reached_is_a_problem_and_makes_the_site_no_less_ready() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let before = metrics.checks();
        let (name, address, span) = ("vir".to_owned(), "192.0.2.1:7401".to_owned(), Micros(12_300_000));
        metrics.unreached(vec![UnreachedPeer { name, address, span }]);
        let remarks = metrics.remarks();
        assert!(
            remarks[0].starts_with("no connection to the agent of vir at 192.0.2.1:7401 for 12 s"),
            "{remarks:?}"
        );
        assert!(metrics.problems().ends_with(&remarks));
        assert_eq!(metrics.checks(), before);
        assert!(metrics.text().contains("limosa_peers_unreached{site=\"ams\"} 1"));
        metrics.unreached(Vec::new());
        assert!(
            metrics.remarks().is_empty() && metrics.text().contains("limosa_peers_unreached{site=\"ams\"} 0")
        );
    }

    #[test]
    fn a_move_that_does_not_end_makes_the_site_not_ready_until_it_does() {
        let metrics = SiteMetrics::new("ams").unwrap();
        let fails =
            || metrics.checks().contains(&("no move has been switching for more than a minute", false));
        assert!(!fails());
        metrics.overdue(&[(MoveId(7), Micros(61_000_000))]);
        assert!(fails() && metrics.text().contains("limosa_moves_overdue{site=\"ams\"} 1"));
        metrics.overdue(&[]);
        assert!(!fails() && metrics.text().contains("limosa_moves_overdue{site=\"ams\"} 0"));
    }

    #[test]
    fn what_is_wrong_without_interruption_is_told_without_interruption_whatever_check_it_fails() {
        let metrics = SiteMetrics::new("ams").unwrap();
        {
            let mut state = metrics.state();
            (state.synced, state.serving, state.in_force, state.connected) = (true, true, true, true);
        }
        let told = |check: &str| metrics.problems() == [format!("not ready: {check}")];
        let (silent, missing) = ("every worker answers (within 1.5 s)", "every expected worker is there");
        metrics.silence(&[WorkerId(1)], &[], &[]);
        assert!(metrics.problems().is_empty(), "it may be for a moment");
        assert!(told(silent));
        // It is taken for dead.
        metrics.silence(&[], &[], &[]);
        metrics.missing(&[WorkerId(1)]);
        assert!(told(missing) && told(missing));
        metrics.missing(&[]);
        assert!(metrics.problems().is_empty());
        metrics.missing(&[WorkerId(1)]);
        assert!(metrics.problems().is_empty(), "it may be for a moment");
    }

    #[test]
    fn handshakes_of_all_workers_are_told_once() {
        let mut state = State::default();
        let group = trip(Some(3), 0, 1, 1).group.unwrap();
        for sample in [
            trip(Some(3), 0, 2, 900),
            trip(None, 1, 1, 7_000),
            trip(None, 1, 3, 5_000),
            trip(None, 0, 1, 9_000),
        ] {
            state.add_trips(&sample);
        }
        for count in [2, 3] {
            state.add_talk(&Talk { group, servers: vec![("203.0.113.0/24".parse().unwrap(), count)] });
        }
        assert_eq!(state.remote_rtt_us(&group), Some(5_000));
        let mut report = SiteReport::default();
        state.give_trips(&mut report);
        let seen: Vec<_> =
            report.servers.iter().map(|way| (way.ingress.unwrap().0, way.count, way.min_us)).collect();
        assert_eq!(seen, [(0, 1, 9_000), (1, 4, 5_000)]);
        assert_eq!(report.servers[1].mean_us, (7_000 * 2 + 3 * 5_000 * 2) / 4);
        assert_eq!((report.clients[0].group, report.clients[0].mean_us), (group, 1_800));
        assert_eq!(report.talks[0].servers[0].1, 5);
        let mut next = SiteReport::default();
        state.give_trips(&mut next);
        assert_eq!(next, SiteReport::default());
    }

    #[test]
    fn what_does_not_fit_into_a_report_waits_for_the_next() {
        let mut state = State::default();
        for n in 0..REPORT_WAYS_MAX as u32 + 5 {
            let prefix = format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap();
            state.add_trips(&RoundTrip { prefix, ..trip(None, 0, 1, 10) });
        }
        let (mut first, mut second) = (SiteReport::default(), SiteReport::default());
        state.give_trips(&mut first);
        state.give_trips(&mut second);
        assert_eq!((first.servers.len(), second.servers.len()), (REPORT_WAYS_MAX, 5));
    }
}
