//! Metrics of a placement node, made from its state at each scrape.

use placement::node::{Node, Role};
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// The text for Prometheus.
///
/// # Errors
/// When a name is registered twice.
pub fn text(node: &Node) -> prometheus::Result<String> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, value: u64| -> prometheus::Result<()> {
        let gauge = IntGauge::new(name, help)?;
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(Box::new(gauge))
    };
    let status = node.status();
    let cluster = node.cluster();
    let counts = node.metrics();
    gauge("limosa_raft_has_leader", "1 if a leader is known", status.leader.is_some().into())?;
    gauge("limosa_raft_is_leader", "1 if this node leads", (status.role == Role::Leader).into())?;
    gauge("limosa_raft_term", "Term", status.term)?;
    gauge("limosa_raft_log_index", "Last index of the log", status.last_log.unwrap_or(0))?;
    gauge("limosa_raft_applied_index", "Last index applied", status.applied.unwrap_or(0))?;
    gauge("limosa_config_revision", "Revision of the replicated state", cluster.revision)?;
    gauge("limosa_groups", "Flow groups", cluster.groups.len() as u64)?;
    gauge("limosa_migrations_in_progress", "Moves in hand", cluster.moves.len() as u64)?;
    gauge("limosa_proposals_total", "Proposals taken", counts.proposals)?;
    gauge("limosa_proposals_rejected_total", "Proposals refused", counts.rejected)?;
    gauge("limosa_reports_total", "Reports of sites taken", counts.reports)?;
    let owned = IntGaugeVec::new(Opts::new("limosa_site_groups", "Groups by owner"), &["site"])?;
    let alive =
        IntGaugeVec::new(Opts::new("limosa_site_alive", "1 while the site holds its lease"), &["site"])?;
    for site in cluster.sites.values() {
        let count = cluster.groups.values().filter(|group| group.owner == site.id).count();
        owned.with_label_values(&[&site.name]).set(i64::try_from(count).unwrap_or(i64::MAX));
        alive.with_label_values(&[&site.name]).set(site.alive.into());
    }
    registry.register(Box::new(owned))?;
    registry.register(Box::new(alive))?;
    let build = IntGaugeVec::new(Opts::new("limosa_build_info", "Version of this process"), &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(build))?;
    TextEncoder::new().encode_to_string(&registry.gather())
}
