//! Groups change places: one goes where it is cheaper, and one that is there makes way for it.
//!
//! Prices and single moves leave a rest that is about the size of a group's share of a site: nothing among many groups, some
//! per cent among few. Among few there is time to look at pairs.

use super::instance::{Instance, PerResource, RESOURCES};
use super::round::{Assignment, NOWHERE, SLACK};

/// Instances with more groups have no need of it.
const GROUPS_MAX: usize = 20_000;
/// Groups that one round may look at for making way: some hundredths of a second.
const WORK_MAX: usize = 400_000;
/// A gain that is a smaller share of the cost is noise of the sums.
const GAIN_MIN: f64 = 1e-7;

/// Who makes way, and where to.
#[derive(Clone, Copy)]
struct Exchange {
    gain: f64,
    /// Candidate of the group that wants to go.
    choice: u8,
    other: u32,
    other_choice: u8,
}

impl Assignment {
    /// Exchanges until none helps, or the work of a round is done. Only for placements within the rooms, which stay so.
    pub(super) fn exchange(&mut self, instance: &Instance) {
        if instance.groups() > GROUPS_MAX || (0..instance.sites()).any(|site| self.exceeded(instance, site)) {
            return;
        }
        let mut members = self.members(instance);
        let mut work = 0;
        loop {
            let mut changed = false;
            for group in self.wishes(instance) {
                if work > WORK_MAX {
                    return;
                }
                if let Some(best) = self.best_exchange(instance, &members, group, &mut work) {
                    self.make(instance, &mut members, group, best);
                    changed = true;
                }
            }
            if !changed {
                return;
            }
        }
    }

    /// Groups that would be cheaper elsewhere, those that would gain most first.
    fn wishes(&self, instance: &Instance) -> Vec<usize> {
        let gain = |group: usize| {
            let choice = self.choice[group];
            let present = (choice != NOWHERE).then(|| instance.cost(group, usize::from(choice)))?;
            let gain = present - instance.least(group);
            (gain > present * GAIN_MIN).then_some((gain, group))
        };
        let mut wishes: Vec<(f64, usize)> = (0..instance.groups()).filter_map(gain).collect();
        wishes.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        wishes.into_iter().map(|(_, group)| group).collect()
    }

    fn best_exchange(
        &self,
        instance: &Instance,
        members: &[Vec<u32>],
        group: usize,
        work: &mut usize,
    ) -> Option<Exchange> {
        let from = self.site(instance, group)?;
        let present = instance.cost(group, usize::from(self.choice[group]));
        let (sites, _) = instance.row(group);
        let mut best: Option<Exchange> = None;
        for (choice, &to) in sites.iter().enumerate() {
            let gain = present - instance.cost(group, choice);
            let least = best.map_or(present * GAIN_MIN, |best| best.gain);
            if gain <= least || !instance.open[usize::from(to)] {
                continue;
            }
            *work += members[usize::from(to)].len();
            for &other in &members[usize::from(to)] {
                let least = best.map_or(present * GAIN_MIN, |best| best.gain);
                if let Some((other_choice, loss)) = self.way(instance, group, from, other as usize, to)
                    && gain - loss > least
                {
                    best = Some(Exchange { gain: gain - loss, choice: choice as u8, other, other_choice });
                }
            }
        }
        best
    }

    /// Where another group could go that makes way at a site, and what it loses by it, if that makes room.
    fn way(&self, instance: &Instance, group: usize, from: u8, other: usize, at: u8) -> Option<(u8, f64)> {
        let (comes, goes) = (instance.demand[group], instance.demand[other]);
        if other == group || !self.fits_when(instance, at, comes, goes) {
            return None;
        }
        let (sites, _) = instance.row(other);
        let present = instance.cost(other, usize::from(self.choice[other]));
        let none = [0.0; RESOURCES];
        let mut best: Option<(u8, f64)> = None;
        for (choice, &to) in sites.iter().enumerate() {
            // The place that the first one leaves is free by its demand.
            let left = if to == from { comes } else { none };
            let loss = instance.cost(other, choice) - present;
            if to != at
                && instance.open[usize::from(to)]
                && best.is_none_or(|(_, least)| loss < least)
                && self.fits_when(instance, to, goes, left)
                && self.spread_holds(instance, &[(group, at), (other, to)])
            {
                best = Some((choice as u8, loss));
            }
        }
        best
    }

    /// Whether a site stays within its room when one demand comes and another goes.
    fn fits_when(
        &self,
        instance: &Instance,
        site: u8,
        comes: PerResource<f32>,
        goes: PerResource<f32>,
    ) -> bool {
        let (load, room) = (self.load[usize::from(site)], instance.room[usize::from(site)]);
        (0..RESOURCES).all(|r| {
            comes[r] <= goes[r]
                || load[r] + f64::from(comes[r]) - f64::from(goes[r]) <= room[r] * (1.0 + SLACK)
        })
    }

    fn make(&mut self, instance: &Instance, members: &mut [Vec<u32>], group: usize, best: Exchange) {
        for (group, choice) in [(best.other as usize, best.other_choice), (group, best.choice)] {
            if let Some(left) = self.site(instance, group) {
                members[usize::from(left)].retain(|&member| member as usize != group);
            }
            self.shift(instance, group, choice);
            members[usize::from(instance.row(group).0[usize::from(choice)])].push(group as u32);
        }
    }
}
