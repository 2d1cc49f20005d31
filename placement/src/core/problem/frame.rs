//! Tables that hold for all groups alike.

use flow::Micros;

use super::Classes;
use super::maker::WEIGHT_MIN;
use crate::core::apart::{self, Apart, Side};
use crate::core::delay::{self, Delays, Demand, LIGHT_KM_PER_MS, Mesh, Model, great_circle_km};
use crate::core::model::{Admin, Cluster, Site};
use crate::core::policy::PRICE_MS_MAX;
use crate::core::rules::SiteSet;
use crate::solver::SITES_MAX;

/// Delays between all sites, so that a group costs a few sums of rows.
pub(super) struct Table {
    rows: delay::Rows,
    light_ms: Vec<f32>,
}

impl std::ops::Deref for Table {
    type Target = delay::Rows;

    fn deref(&self) -> &delay::Rows {
        &self.rows
    }
}

impl Table {
    pub(super) fn new(cluster: &Cluster, model: &Model, now: Micros) -> Self {
        let rows = Mesh::all(cluster, model, now);
        let pairs = rows.sites.iter().flat_map(|a| rows.sites.iter().map(move |b| (a, b)));
        let light = |(a, b): (&Site, &Site)| {
            let ends = a.coordinates().zip(b.coordinates());
            ends.map_or(0.0, |(a, b)| (great_circle_km(a, b) / LIGHT_KM_PER_MS) as f32)
        };
        let light_ms = pairs.map(light).collect();
        Self { rows, light_ms }
    }

    /// The straight way from the ingresses of a group's clients to those of its servers, by share.
    pub(super) fn light(&self, demand: &Demand) -> f32 {
        let mut sum = 0.0;
        for (from, in_share) in self.shares(&demand.inside) {
            for (to, out_share) in self.shares(&demand.outside) {
                let at = usize::from(from) * self.sites.len() + usize::from(to);
                sum += in_share * out_share * f64::from(self.light_ms[at]);
            }
        }
        sum as f32
    }
}

/// What holds for all groups alike, as long as sites, rules and what is known of delays do.
pub(in crate::core) struct Frame {
    pub(super) table: Table,
    /// Sites of each label of each `separate` rule.
    pub(super) owned: Vec<Vec<SiteSet>>,
}

impl Frame {
    /// Of a table; `domains` has the sites of each failure domain.
    pub(super) fn new(
        cluster: &Cluster,
        model: &Model,
        table: Table,
        domains: &[SiteSet],
        now: Micros,
    ) -> Self {
        let (mut classes, apart) = (Classes::new(&cluster.policy), Apart::new(&cluster.policy));
        let owned = share_out(cluster, model, &table, domains, &mut classes, &apart, now);
        Self { table, owned }
    }

    /// The number of each site.
    pub(in crate::core) fn index(&self) -> &[Option<u8>; SITES_MAX] {
        &self.table.index
    }
}

/// The sites of each label of each `separate` rule.
fn share_out(
    cluster: &Cluster,
    model: &Model,
    table: &Table,
    domains: &[SiteSet],
    classes: &mut Classes<'_>,
    apart: &Apart<'_>,
    now: Micros,
) -> Vec<Vec<SiteSet>> {
    let mut sides: Vec<Vec<Side>> =
        apart.rules().map(|(_, labels)| vec![Side::new(domains.len()); labels]).collect();
    let groups = cluster.groups.values().filter(|_| !apart.is_empty());
    let mut delays = Delays::default();
    for group in groups {
        let of = apart.sides(&group.id);
        if of.is_empty() {
            continue;
        }
        let effect = classes.effect(&group.id);
        let demand = model.demand(&group.id);
        table.delays(model, &group.id, model.known(&group.id), now, &mut delays);
        let may = |site: &&Site| effect.allows(&group.id, site.id);
        let need = SiteSet::of(table.sites.iter().filter(may).map(|site| &site.id));
        let cost = |site: &Site, ms: f32| effect.cost_ms(&group.id, site.id, f64::from(ms));
        let open = table
            .sites
            .iter()
            .zip(&delays.ms)
            .filter(|(site, _)| need.contains(site.id) && site.takes_groups());
        let mut best = vec![f64::INFINITY; domains.len()];
        for (site, &ms) in open {
            if let Some(domain) = domains.iter().position(|domain| domain.contains(site.id)) {
                best[domain] = best[domain].min(cost(site, ms));
            }
        }
        let weight = demand.map_or(WEIGHT_MIN, |demand| demand.packets_per_s.max(WEIGHT_MIN));
        let regret = regret(&best);
        let site = cluster.move_of(&group.id).map_or(group.owner, |present| present.to);
        let stays =
            need.contains(site) && cluster.sites.get(&site).is_some_and(|site| site.admin != Admin::Draining);
        let at = domains.iter().position(|domain| stays && domain.contains(site));
        for (rule, label) in of {
            let side = &mut sides[rule][label];
            side.needs.insert(need);
            if let Some((domain, ms)) = regret {
                side.worth[domain] += weight * ms;
            }
            if let Some(domain) = at {
                side.held[domain] += 1;
            }
        }
    }
    let owned = |sides: &Vec<Side>| {
        let mut owned = vec![SiteSet::NONE; sides.len()];
        for (domain, side) in domains.iter().zip(apart::share_out(domains, sides)) {
            owned[side] = owned[side].or(*domain);
        }
        owned
    };
    sides.iter().map(owned).collect()
}

/// The domain that is best, and what one has more without it; at most what nobody would wait for.
fn regret(best: &[f64]) -> Option<(usize, f64)> {
    let order = |&a: &usize, &b: &usize| best[a].total_cmp(&best[b]);
    let first = (0..best.len()).filter(|&domain| best[domain].is_finite()).min_by(order)?;
    let second = (0..best.len()).filter(|&domain| domain != first).map(|domain| best[domain]);
    let second = second.fold(f64::INFINITY, f64::min);
    Some((first, (second - best[first]).min(PRICE_MS_MAX)))
}
