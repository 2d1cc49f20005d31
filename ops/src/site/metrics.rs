//! What the agent counts and reports: metrics for Prometheus, loads and delays for placement.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dataplane::control::Stats;
use flow::{Prefix, SiteId, WorkerId};
use placement::core::{GroupReport, PeerRtt, SiteReport};
use prometheus::{Gauge, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use switchctl::session::SwitchEvent;

use super::core::Agent;

/// Weight of a new round trip in the running mean.
const RTT_GAIN: f64 = 0.3;

/// Counters and gauges of one agent.
pub struct SiteMetrics {
    registry: Registry,
    state: Mutex<State>,
    packets: IntGaugeVec,
    flows: IntGaugeVec,
    busy: GaugeVec,
    rtt: GaugeVec,
    moves: IntGaugeVec,
    in_progress: IntGaugeVec,
    flows_sent: IntCounter,
    bytes_sent: IntCounter,
    hold_max: Gauge,
    switch_connected: IntGauge,
    switch_errors: IntCounter,
    rule_changes: IntCounter,
    rules: IntGauge,
    rules_drift: IntGauge,
    fail_mode: IntGaugeVec,
    groups: IntGauge,
    revision: IntGauge,
}

#[derive(Default)]
struct State {
    busy: BTreeMap<WorkerId, f64>,
    /// Running mean of the round trip to each server prefix, in microseconds.
    servers: BTreeMap<Prefix, f64>,
    synced: bool,
    serving: bool,
    in_force: bool,
    connected: bool,
    /// Whether the fail mode is secure, where it is looked at.
    fail_mode: Option<bool>,
    local_moves: Vec<super::core::LocalMove>,
}

impl SiteMetrics {
    /// All metrics at zero.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn new(site: &str) -> anyhow::Result<Self> {
        let labels = std::iter::once(("site".to_owned(), site.to_owned())).collect();
        let registry = Registry::new_custom(None, Some(labels))?;
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
        let build =
            IntGaugeVec::new(Opts::new("limosa_build_info", "Version of this process"), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            packets: gauge(
                "limosa_worker_packets",
                "Packets by fate since the worker started",
                &["worker", "fate"],
            )?,
            flows: gauge("limosa_flow_table_entries", "Flows in the worker's table", &["worker"])?,
            busy: float(
                "limosa_worker_busy_ratio",
                "Share of time that the worker was not idle",
                &["worker"],
            )?,
            rtt: float("limosa_path_rtt_seconds", "Round trip to a peer site over QUIC", &["peer_site"])?,
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
            fail_mode: gauge(
                "limosa_switch_fail_mode_secure",
                "1 while the bridge is known to keep its rules without a controller; absent where it is not looked at",
                &[],
            )?,
            groups: single("limosa_groups", "Groups that have a worker at this site")?,
            revision: single("limosa_config_revision", "Revision of placement that the agent follows")?,
            hold_max,
            registry,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a worker's statistics.
    pub fn worker(&self, worker: WorkerId, stats: &Stats) {
        let label = worker.to_string();
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for (fate, value) in fates(stats) {
            self.packets.with_label_values(&[label.as_str(), fate]).set(signed(value));
        }
        self.flows.with_label_values(&[&label]).set(signed(stats.counters.flows));
        self.busy.with_label_values(&[&label]).set(stats.busy);
        let mut state = self.state();
        state.busy.insert(worker, stats.busy);
        for sample in stats.round_trips.iter().filter(|sample| sample.remote) {
            let new = f64::from(sample.mean_us);
            let mean = state.servers.entry(sample.prefix).or_insert(new);
            *mean += RTT_GAIN * (new - *mean);
        }
    }

    /// Takes an event of the switch.
    pub fn switch(&self, event: &SwitchEvent) {
        match event {
            SwitchEvent::Connected { .. } => self.set_connected(true),
            SwitchEvent::Disconnected => self.set_connected(false),
            SwitchEvent::InForce { changes, .. } => self.rule_changes.inc_by(*changes as u64),
            SwitchEvent::Error(_) => self.switch_errors.inc(),
        }
    }

    fn set_connected(&self, connected: bool) {
        self.switch_connected.set(connected.into());
        self.state().connected = connected;
    }

    /// Takes a comparison of all rules.
    pub fn drift(&self, wanted: usize, differences: usize) {
        self.rules.set(i64::try_from(wanted).unwrap_or(i64::MAX));
        self.rules_drift.set(i64::try_from(differences).unwrap_or(i64::MAX));
    }

    /// Takes a look at the bridge's fail mode.
    pub fn fail_mode(&self, secure: bool) {
        self.fail_mode.with_label_values::<&str>(&[]).set(secure.into());
        self.state().fail_mode = Some(secure);
    }

    /// Counts records sent.
    pub fn sent(&self, flows: u64, bytes: u64) {
        self.flows_sent.inc_by(flows);
        self.bytes_sent.inc_by(bytes);
    }

    /// What placement gets to know; also brings the gauges up to date.
    pub fn report(&self, agent: &Agent, rtts: &[(SiteId, u32)], interval: Duration) -> SiteReport {
        self.update(agent, rtts);
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
                remote_rtt_us: None,
            })
            .collect();
        SiteReport {
            site: agent.site(),
            packets_per_s: groups.iter().map(|group| group.packets_per_s).sum(),
            busy: self.state().busy.values().copied().fold(0.0, f64::max),
            groups,
            peers: rtts.iter().map(|&(site, rtt_us)| PeerRtt { site, rtt_us }).collect(),
        }
    }

    fn update(&self, agent: &Agent, rtts: &[(SiteId, u32)]) {
        for (site, rtt_us) in rtts {
            let name = agent.sites().get(site).map_or_else(|| site.to_string(), |site| site.name.clone());
            self.rtt.with_label_values(&[&name]).set(f64::from(*rtt_us) / 1e6);
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
        self.groups.set(i64::try_from(agent.local().len()).unwrap_or(i64::MAX));
        let mut state = self.state();
        self.revision.set(i64::try_from(agent.revision()).unwrap_or(i64::MAX));
        state.synced = agent.is_synced();
        state.serving = agent.is_serving_all();
        state.in_force = agent.is_in_force();
        state.local_moves = agent.local_log().iter().copied().collect();
    }

    /// The text for Prometheus.
    #[must_use]
    pub fn text(&self) -> String {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// The last moves between workers, as of the last report.
    #[must_use]
    pub fn local_moves(&self) -> Vec<super::core::LocalMove> {
        self.state().local_moves.clone()
    }

    /// What must hold for the site to be ready, each with whether it does.
    #[must_use]
    pub fn checks(&self) -> Vec<(&'static str, bool)> {
        let state = self.state();
        let mut checks = vec![
            ("placement and workers were heard", state.synced),
            ("all groups of the site are served", state.serving),
            ("the switch is connected", state.connected),
            ("the switch follows the newest rules", state.in_force),
        ];
        checks.extend(
            state
                .fail_mode
                .map(|secure| ("the bridge keeps its rules without the agent (fail mode)", secure)),
        );
        checks
    }
}

fn fates(stats: &Stats) -> [(&'static str, u64); 22] {
    let c = &stats.counters;
    [
        ("received", c.received),
        ("sent", c.sent),
        ("translated_out", c.translated_out),
        ("translated_in", c.translated_in),
        ("hairpinned", c.hairpinned),
        ("relayed", c.relayed),
        ("held", c.held),
        ("dropped_malformed", c.dropped_malformed),
        ("dropped_no_group", c.dropped_no_group),
        ("dropped_no_mapping", c.dropped_no_mapping),
        ("dropped_port_block_exhausted", c.dropped_port_block_exhausted),
        ("dropped_table_full", c.dropped_table_full),
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
