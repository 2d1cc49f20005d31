//! What another policy or other sites would bring, as it is sent.

use placement::core::Cluster;
use placement::core::whatif::{Binding, Delays, Load, Moved, Region, WhatIf};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::view::site_name;

/// Moves that are sent, those with most packets first; `moves` counts all.
const MOVES_SHOWN_MAX: usize = 1000;

/// What would be. Delays are one way, by the delay model, weighted by packets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhatIfView {
    /// Groups with known traffic, and those that have to leave.
    pub groups: u64,
    /// Now.
    pub before: DelaysView,
    /// Then.
    pub after: DelaysView,
    /// What prices of rules, those of then, add to the mean now.
    #[serde(default)]
    pub before_rules_ms: f64,
    /// What they add then.
    #[serde(default)]
    pub after_rules_ms: f64,
    /// The mean that no placement can beat then, prices of rules and charges of moves included.
    pub bound_ms: f64,
    /// By how much the placement may be worse than the best, as a share; nothing when capacities are exceeded.
    pub gap: Option<f64>,
    /// Groups that no site may have then.
    pub stranded: Vec<String>,
    /// Groups that would have no standby though they are to have one.
    #[serde(default)]
    pub unprotected: u64,
    /// Sites that would carry more than their room.
    pub exceeded: Vec<String>,
    /// How many groups would move.
    pub moves: usize,
    /// Flows that would move with them.
    pub flows: u64,
    /// The first of them: at most 1000, those with most packets first.
    pub moved: Vec<MovedView>,
    /// By where clients come in.
    pub regions: Vec<RegionView>,
    /// All sites.
    pub sites: Vec<LoadView>,
    /// What keeps groups from their nearest site, what costs most first.
    pub bindings: Vec<BindingView>,
}

/// Delays in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DelaysView {
    /// Mean.
    pub mean_ms: f64,
    /// Half of the packets have no more.
    pub p50_ms: f64,
    /// 95 of 100 packets have no more.
    pub p95_ms: f64,
}

/// A group that would move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MovedView {
    /// Which.
    pub group: String,
    /// Its owner now.
    pub from: String,
    /// Its owner then.
    pub to: String,
    /// By how many milliseconds its delay would shrink.
    pub gain_ms: f64,
    /// Its packets per second; 0 where nothing is known.
    pub packets_per_s: f64,
    /// Its flows.
    pub flows: u64,
    /// The hard rule that sends it away, if one does.
    pub rule: Option<String>,
}

/// Before and after, for the clients that come in at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RegionView {
    /// The site.
    pub ingress: String,
    /// Their packets per second.
    pub packets_per_s: f64,
    /// Now.
    pub before: DelaysView,
    /// Then.
    pub after: DelaysView,
}

/// A site before and after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoadView {
    /// Its name.
    pub site: String,
    /// Packets per second now.
    pub before: f64,
    /// Packets per second then.
    pub after: f64,
    /// What it may carry then.
    pub room: f64,
    /// Milliseconds of one packet that one more packet per second of room would save then: where to build next.
    pub price_ms: f64,
}

/// Why groups would not be at the site that is nearest to them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BindingView {
    /// A rule's name; nothing when the nearest site is full, or a move there gains too little.
    pub rule: Option<String>,
    /// The nearest site.
    pub site: String,
    /// Groups.
    pub groups: u64,
    /// What it costs, as a mean over all packets, in milliseconds.
    pub costs_ms: f64,
}

impl From<Delays> for DelaysView {
    fn from(delays: Delays) -> Self {
        Self { mean_ms: delays.mean_ms, p50_ms: delays.p50_ms, p95_ms: delays.p95_ms }
    }
}

impl WhatIfView {
    pub(super) fn of(cluster: &Cluster, found: &WhatIf) -> Self {
        let name = |site| site_name(cluster, site);
        let moved = |moved: &Moved| MovedView {
            group: moved.group.to_string(),
            from: name(moved.from),
            to: name(moved.to),
            gain_ms: moved.gain_ms,
            packets_per_s: moved.packets_per_s,
            flows: moved.flows,
            rule: moved.rule.clone(),
        };
        let region = |region: &Region| RegionView {
            ingress: name(region.ingress),
            packets_per_s: region.packets_per_s,
            before: region.before.into(),
            after: region.after.into(),
        };
        let load = |load: &Load| LoadView {
            site: name(load.site),
            before: load.before,
            after: load.after,
            room: load.room,
            price_ms: load.price_ms,
        };
        let binding = |binding: &Binding| BindingView {
            rule: binding.rule.clone(),
            site: name(binding.site),
            groups: binding.groups,
            costs_ms: binding.costs_ms,
        };
        Self {
            groups: found.groups,
            before: found.before.into(),
            after: found.after.into(),
            before_rules_ms: found.before_rules_ms,
            after_rules_ms: found.after_rules_ms,
            bound_ms: found.bound_ms,
            gap: found.gap,
            stranded: found.stranded.iter().map(ToString::to_string).collect(),
            unprotected: found.unprotected,
            exceeded: found.exceeded.iter().map(|&site| name(site)).collect(),
            moves: found.moves.len(),
            flows: found.moves.iter().map(|moved| moved.flows).sum(),
            moved: found.moves.iter().take(MOVES_SHOWN_MAX).map(moved).collect(),
            regions: found.regions.iter().map(region).collect(),
            sites: found.loads.iter().map(load).collect(),
            bindings: found.bindings.iter().map(binding).collect(),
        }
    }
}
