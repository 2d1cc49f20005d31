//! Metrics of a placement node, made from its state at each scrape.

use std::collections::{BTreeMap, BTreeSet};

use placement::core::delay::{BASES, Misplaced};
use placement::core::{Cluster, Round};
use placement::node::{Node, Role};
use prometheus::{
    Counter, Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// The text for Prometheus, with what others of this process have registered.
///
/// # Errors
/// When a name is registered twice.
pub fn text(node: &Node, others: &Registry) -> prometheus::Result<String> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, value: u64| -> prometheus::Result<()> {
        let gauge = IntGauge::new(name, help)?;
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(Box::new(gauge))
    };
    let status = node.status();
    let cluster = node.cluster();
    let counts = node.metrics();
    gauge(
        "limosa_raft_has_leader",
        "1 if a leader is known that a quorum followed lately",
        status.leader.is_some().into(),
    )?;
    gauge("limosa_raft_is_leader", "1 if this node leads", (status.role == Role::Leader).into())?;
    gauge("limosa_raft_has_quorum", "1 if a quorum answered the leader lately", status.quorum.into())?;
    gauge(
        "limosa_raft_nodes_twice",
        "Nodes in whose name two processes spoke to this one within the last minute",
        status.twice.len() as u64,
    )?;
    gauge(
        "limosa_raft_members_silent",
        "Members that do not answer the leader, as far as this node knows",
        status.silent.len() as u64,
    )?;
    gauge(
        "limosa_placement_sites_twice",
        "Sites in whose name two processes spoke to this node within the last minute",
        node.sites_twice().len() as u64,
    )?;
    let seconds = |name: &str, help: &str, ms: Option<u64>| -> prometheus::Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(ms.map_or(f64::INFINITY, |ms| ms as f64 / 1e3));
        registry.register(Box::new(gauge))
    };
    seconds(
        "limosa_raft_quorum_ack_age_seconds",
        "Time since a quorum answered the leader, as far as this node knows; +Inf if never",
        status.quorum_ack_ms,
    )?;
    seconds(
        "limosa_raft_behind_seconds",
        "Since when entries are missing that the leader said are committed; 0 if none are",
        Some(status.behind_ms),
    )?;
    seconds(
        "limosa_raft_write_seconds",
        "How long the disk has been at the write in hand; 0 if there is none",
        Some(status.write_ms),
    )?;
    gauge("limosa_raft_term", "Term", status.term)?;
    gauge("limosa_raft_log_index", "Last index of the log", status.last_log.unwrap_or(0))?;
    gauge("limosa_raft_applied_index", "Last index applied", status.applied.unwrap_or(0))?;
    gauge("limosa_config_revision", "Revision of the replicated state", cluster.revision)?;
    gauge("limosa_groups", "Flow groups", cluster.groups.len() as u64)?;
    gauge("limosa_migrations_in_progress", "Moves in hand", cluster.moves.len() as u64)?;
    crate::signals::metrics(&registry)?;
    let counter = |name: &str, help: &str, value: u64| -> prometheus::Result<()> {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(value);
        registry.register(Box::new(counter))
    };
    counter("limosa_proposals_total", "Proposals taken", counts.proposals)?;
    counter("limosa_proposals_rejected_total", "Proposals refused", counts.rejected)?;
    counter("limosa_reports_total", "Reports of sites taken", counts.reports)?;
    counter(
        "limosa_placement_moves_planned_total",
        "Moves that rounds of this leader started",
        counts.moves_planned,
    )?;
    counter(
        "limosa_placement_rounds_checked_total",
        "Rounds of other leaders that this node checked by its own knowledge",
        counts.rounds_checked,
    )?;
    counter(
        "limosa_placement_rounds_doubted_total",
        "Of these, rounds whose figures this node did not find",
        counts.rounds_doubted,
    )?;
    let estimates = IntCounterVec::new(
        Opts::new(
            "limosa_placement_estimates_tested_total",
            "Ways measured for the first time, by what their estimate rested on and whether it was within two standard deviations",
        ),
        &["basis", "held"],
    )?;
    for (basis, tested) in BASES.into_iter().zip(node.tested()) {
        for (held, count) in [("yes", tested.held), ("no", tested.tested - tested.held)] {
            estimates.with_label_values(&[basis, held]).inc_by(count);
        }
    }
    registry.register(Box::new(estimates))?;
    let busy =
        Counter::new("limosa_placement_busy_seconds_total", "Time that this node thought as the leader")?;
    busy.inc_by(counts.poll_us as f64 / 1e6);
    registry.register(Box::new(busy))?;
    if let Some(last) = &cluster.round {
        round(&registry, &cluster, last)?;
    }
    let owned = IntGaugeVec::new(Opts::new("limosa_site_groups", "Groups by owner"), &["site"])?;
    let alive =
        IntGaugeVec::new(Opts::new("limosa_site_alive", "1 while the site holds its lease"), &["site"])?;
    let misplaced = IntGaugeVec::new(
        Opts::new(
            "limosa_site_misplaced",
            "1 while what is measured contradicts the site's latitude and longitude",
        ),
        &["site"],
    )?;
    // Where either of two may be wrong, both are said.
    let wrong: BTreeSet<_> = node.misplaced(&cluster).iter().flat_map(Misplaced::suspects).collect();
    let mut counts: BTreeMap<_, usize> = BTreeMap::new();
    cluster.groups.values().for_each(|group| *counts.entry(group.owner).or_default() += 1);
    for site in cluster.sites.values() {
        let count = counts.get(&site.id).copied().unwrap_or_default();
        misplaced.with_label_values(&[&site.name]).set(wrong.contains(&site.id).into());
        owned.with_label_values(&[&site.name]).set(i64::try_from(count).unwrap_or(i64::MAX));
        alive.with_label_values(&[&site.name]).set(site.alive.into());
    }
    registry.register(Box::new(owned))?;
    registry.register(Box::new(alive))?;
    registry.register(Box::new(misplaced))?;
    let build = IntGaugeVec::new(Opts::new("limosa_build_info", "Version of this process"), &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(build))?;
    let mut families = registry.gather();
    families.extend(others.gather());
    TextEncoder::new().encode_to_string(&families)
}

/// The last published round. All nodes show it: take the maximum over nodes, not the sum.
fn round(registry: &Registry, cluster: &Cluster, last: &Round) -> prometheus::Result<()> {
    let gauge = |name: &str, help: &str, value: f64| -> prometheus::Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        registry.register(Box::new(gauge))
    };
    let ratio = if last.bound_ms > 0.0 { last.objective_ms / last.bound_ms } else { 1.0 };
    gauge(
        "limosa_placement_objective_ratio",
        "Objective of the last round over its bound, 1 is the best",
        ratio,
    )?;
    gauge("limosa_placement_solve_seconds", "Time that the last round took", last.solve_us as f64 / 1e6)?;
    gauge(
        "limosa_placement_groups_touched",
        "Groups whose place the last round looked for anew",
        last.touched as f64,
    )?;
    gauge("limosa_placement_groups_misplaced", "Groups that should be elsewhere", last.moves as f64)?;
    gauge("limosa_placement_groups_stranded", "Groups that no site may have", last.stranded as f64)?;
    gauge(
        "limosa_placement_groups_unprotected",
        "Groups that are to have a standby and have none",
        last.unprotected as f64,
    )?;
    gauge(
        "limosa_placement_moves_in_vain",
        "Moves of the last hour that brought a group back to where it had been within an hour before",
        last.vain as f64,
    )?;
    gauge("limosa_placement_sites_exceeded", "Sites planned beyond their room", last.exceeded.len() as f64)?;
    gauge("limosa_placement_round_timestamp_seconds", "When the last round was", last.at_ms as f64 / 1e3)?;
    let delay = GaugeVec::new(
        Opts::new("limosa_placement_delay_seconds", "Mean delay over packets, one way, by the model"),
        &["of"],
    )?;
    let of = [
        ("present", last.delay_ms),
        ("planned", last.planned_ms),
        ("bound", last.bound_ms),
        ("unconstrained", last.unconstrained_ms),
        ("light", last.light_ms),
    ];
    of.into_iter().for_each(|(of, ms)| delay.with_label_values(&[of]).set(ms / 1e3));
    registry.register(Box::new(delay))?;
    let price = GaugeVec::new(
        Opts::new(
            "limosa_placement_price_seconds",
            "Delay saved, times packets per second, by one more of a resource",
        ),
        &["site", "resource"],
    )?;
    for prices in &last.prices {
        let Some(site) = cluster.sites.get(&prices.site) else { continue };
        for (resource, value) in
            ["packets_per_second", "flows", "bits_per_second"].into_iter().zip(prices.values())
        {
            price.with_label_values(&[&site.name, resource]).set(value / 1e3);
        }
    }
    registry.register(Box::new(price))
}
