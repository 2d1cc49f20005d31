//! Costs and candidates of one group at a time, in memory that is used again.

use super::Stand;
use super::frame::Table;
use super::maker::Lawful;
use crate::core::delay::Delays;
use crate::core::delay::probes::Doubt;
use crate::core::model::{Group, Site};
use crate::solver::{self, CANDIDATES_MAX};

/// Room for the costs and candidates of one group at a time.
#[derive(Default)]
pub(super) struct Scratch {
    /// By site: the delay, and that with what rules and doubt add.
    pub(super) delays: Delays,
    pub(super) costs: Vec<f32>,
    order: Vec<u8>,
    pub(super) candidates: Vec<solver::Candidate>,
}

impl Scratch {
    /// The cheapest sites that take groups and that a group may have, but for one.
    pub(super) fn others(
        &self,
        table: &Table,
        lawful: Lawful<'_>,
        group: &Group,
        but: Option<u8>,
    ) -> Vec<solver::Candidate> {
        let open = |(site, n): &(&Site, u8)| {
            Some(*n) != but && site.takes_groups() && lawful.allows(&group.id, site.id)
        };
        let cost =
            |(_, site): (&Site, u8)| solver::Candidate { site, cost_ms: self.costs[usize::from(site)] };
        let mut others: Vec<_> = table.sites.iter().zip(0..=u8::MAX).filter(open).map(cost).collect();
        others.sort_by(|a, b| a.cost_ms.total_cmp(&b.cost_ms).then(a.site.cmp(&b.site)));
        others.truncate(CANDIDATES_MAX - 1);
        others
    }

    /// The least delay of the sites that take groups, and where that is.
    pub(super) fn nearest(&self, table: &Table) -> Option<(f32, u8)> {
        let sites = table.sites.iter().zip(&self.delays.ms).zip(0..=u8::MAX);
        let open = sites.filter(|((site, _), _)| site.takes_groups()).map(|((_, ms), n)| (*ms, n));
        open.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Whether the best of the candidates is in doubt, for a group that its index is not known of yet.
    pub(super) fn doubt(&self, owner: u8, weight: f64) -> Option<Doubt> {
        Doubt::of(0, weight as f32, self.undoubted(owner), &self.delays)
    }

    /// The candidates at what they cost when nothing is in doubt.
    fn undoubted(&self, owner: u8) -> impl Iterator<Item = solver::Candidate> + Clone {
        let doubt_ms = move |site: u8| self.delays.doubt_ms(owner, site);
        let candidates = self.candidates.iter();
        candidates
            .map(move |there| solver::Candidate { cost_ms: there.cost_ms - doubt_ms(there.site), ..*there })
    }

    /// From the delays: the best sites that a group may have, its owner among them, and what the best of the others costs.
    /// Full ones too: whether there is room is the solver's to say.
    /// `doubted` is the owner of one that may stay: sites that are less surely known than that have to promise more.
    pub(super) fn fill(
        &mut self,
        table: &Table,
        lawful: Lawful<'_>,
        group: &Group,
        stand: Stand,
        doubted: Option<u8>,
    ) -> f32 {
        let effect = lawful.effect;
        let costs = table.sites.iter().zip(&self.delays.ms);
        let costs = costs.map(|(site, ms)| effect.cost_ms(&group.id, site.id, f64::from(*ms)) as f32);
        self.costs.clear();
        self.costs.extend(costs);
        if let Some(owner) = doubted {
            self.delays.add_doubts(owner, &mut self.costs);
        }
        self.candidates.clear();
        self.order.clear();
        let owner = table.index[usize::from(group.owner.0)];
        let costs = &self.costs;
        let cost = |n: u8| costs[usize::from(n)];
        if let Stand::Fixed(site) = stand {
            let site = table.index[usize::from(site.0)];
            self.candidates.extend(site.map(|site| solver::Candidate { site, cost_ms: cost(site) }));
            return f32::INFINITY;
        }
        let open = |(site, n): &(&Site, u8)| {
            let free = if Some(*n) == owner { stand == Stand::Open } else { site.takes_groups() };
            free && lawful.allows(&group.id, site.id)
        };
        self.order.extend(table.sites.iter().zip(0..=u8::MAX).filter(open).map(|(_, n)| n));
        let by_cost = |a: &u8, b: &u8| cost(*a).total_cmp(&cost(*b)).then(a.cmp(b));
        let mut left_out_ms = f32::INFINITY;
        if self.order.len() > CANDIDATES_MAX {
            self.order.select_nth_unstable_by(CANDIDATES_MAX, by_cost);
            let at = self.order.iter().position(|n| Some(*n) == owner).unwrap_or(0);
            if at >= CANDIDATES_MAX {
                // In the place of the worst of the best, which counts as left out then.
                let best = &self.order[..CANDIDATES_MAX];
                let worst = (0..CANDIDATES_MAX).max_by(|a, b| by_cost(&best[*a], &best[*b])).unwrap_or(0);
                self.order.swap(at, worst);
            }
            let left_out = self.order[CANDIDATES_MAX..].iter().map(|n| cost(*n));
            left_out_ms = left_out.fold(f32::INFINITY, f32::min);
            self.order.truncate(CANDIDATES_MAX);
        }
        self.order.sort_unstable_by(by_cost);
        let candidates = self.order.iter().map(|&site| solver::Candidate { site, cost_ms: cost(site) });
        self.candidates.extend(candidates);
        left_out_ms
    }
}
