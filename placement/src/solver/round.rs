//! From prices to a placement: each group takes what is cheapest under the prices, sites that then have too much give
//! away what they lose least by, and room that is left goes to those that gain most.

use std::collections::VecDeque;

use super::instance::{Instance, PerResource, RESOURCES};
use super::softmin::{PriceTable, Priced};

/// A group that is nowhere: all its candidates are closed.
pub(super) const NOWHERE: u8 = u8::MAX;
/// Groups that all searches for chains of one round may look at: about a second at worst.
const CHAIN_WORK_MAX: usize = 10_000_000;
/// Groups that one round may put where they do not fit, to see whether others make way.
const TRIALS_MAX: usize = 256;
/// What it is worth that a cell with too many groups of a class loses one, as a share of the room of a site.
const CROWD_RELIEF: f64 = 0.01;
/// Rounds of giving away, each over the groups of sites with too much.
const GIVE_ROUNDS: usize = 32;
/// Sums of many floats are right to this share; without it room that is filled to the brim would look exceeded.
pub(super) const SLACK: f64 = 1e-9;

/// Where groups are, by the number of the candidate, and what sites carry.
#[derive(Clone, Debug)]
pub(super) struct Assignment {
    pub(super) choice: Vec<u8>,
    pub(super) load: Vec<PerResource<f64>>,
    /// How many groups there are, by class and cell.
    pub(super) count: Vec<Vec<u32>>,
    /// Groups that had to leave the place that is cheapest under the prices, since all were there.
    pub(super) displaced: Vec<u32>,
}

/// What the searches of one round know of one another.
pub(super) struct Search {
    /// Who is at each site; also who was, by an earlier move. Empty until it is needed.
    pub(super) members: Vec<Vec<u32>>,
    /// Groups looked at, and how many at most.
    pub(super) work: usize,
    work_max: usize,
    /// Sites whose members are sorted.
    sorted: Vec<bool>,
    /// Groups put somewhere for trial.
    trials: usize,
    /// Which group had which choice, move by move.
    pub(super) journal: Vec<(u32, u8)>,
}

impl Search {
    /// Begins with some work done already.
    pub(super) fn new(work: usize, work_max: usize) -> Self {
        Self { members: Vec::new(), work, work_max, sorted: Vec::new(), trials: 0, journal: Vec::new() }
    }

    /// Makes the lists of members, if they are not there.
    pub(super) fn know(&mut self, assignment: &Assignment, instance: &Instance) {
        if self.members.is_empty() {
            self.members = assignment.members(instance);
            self.sorted = vec![false; self.members.len()];
        }
    }

    /// Small members of a site first: they find room soonest, and cost least.
    fn sort(&mut self, instance: &Instance, site: usize) {
        if !std::mem::replace(&mut self.sorted[site], true) {
            let size = |group: &u32| instance.demand[*group as usize][0];
            self.members[site].sort_unstable_by(|a, b| size(a).total_cmp(&size(b)).then(a.cmp(b)));
        }
    }

    pub(super) fn may_go_on(&self) -> bool {
        self.work < self.work_max
    }

    /// Counts one trial, if there may be another.
    pub(super) fn may_try(&mut self) -> bool {
        self.trials += 1;
        self.trials <= TRIALS_MAX && self.may_go_on()
    }
}

/// A wish to go elsewhere. Sorted by `key`, then by group, so that the order is the same everywhere.
#[derive(Clone, Copy)]
struct Wish {
    key: f32,
    group: u32,
}

fn in_order(wishes: &mut [Wish]) {
    wishes.sort_unstable_by(|a, b| a.key.total_cmp(&b.key).then(a.group.cmp(&b.group)));
}

impl Assignment {
    pub(super) fn empty(instance: &Instance) -> Self {
        Self {
            choice: vec![NOWHERE; instance.groups()],
            load: vec![[0.0; RESOURCES]; instance.sites()],
            count: instance.spreads.iter().map(|spread| vec![0; spread.limits.len()]).collect(),
            displaced: Vec::new(),
        }
    }

    /// Each group at its cheapest candidate under prices.
    pub(super) fn all_cheapest(&mut self, instance: &Instance, table: &PriceTable) {
        *self = Self::empty(instance);
        self.cheapest(instance, table, 0..instance.groups());
    }

    /// Some groups at their cheapest candidates, the others as they were.
    pub(super) fn cheapest(
        &mut self,
        instance: &Instance,
        table: &PriceTable,
        groups: impl IntoIterator<Item = usize>,
    ) {
        let mut priced = Priced::empty();
        for group in groups {
            priced.set(instance, table, group);
            self.shift(instance, group, if priced.stranded() { NOWHERE } else { priced.best() as u8 });
        }
    }

    /// Adds the demand of a group to its site, times a sign.
    pub(super) fn account(&mut self, instance: &Instance, group: usize, sign: f64) {
        if let Some(site) = self.site(instance, group) {
            let load = &mut self.load[usize::from(site)];
            load.iter_mut()
                .zip(instance.demand[group])
                .for_each(|(load, demand)| *load += sign * f64::from(demand));
            if !self.count.is_empty()
                && let Some(class) = instance.class(group)
            {
                let cell = instance.spreads[class.index()].cell(site);
                let count = &mut self.count[class.index()][cell];
                *count = if sign > 0.0 { *count + 1 } else { *count - 1 };
            }
        }
    }

    /// Where a group is.
    pub(super) fn site(&self, instance: &Instance, group: usize) -> Option<u8> {
        let choice = self.choice[group];
        (choice != NOWHERE).then(|| instance.row(group).0[usize::from(choice)])
    }

    pub(super) fn shift(&mut self, instance: &Instance, group: usize, choice: u8) {
        self.account(instance, group, -1.0);
        self.choice[group] = choice;
        self.account(instance, group, 1.0);
    }

    /// Whether a site carries more than it may.
    pub(super) fn exceeded(&self, instance: &Instance, site: usize) -> bool {
        let room = instance.room[site];
        (0..RESOURCES).any(|r| self.load[site][r] > room[r] * (1.0 + SLACK))
    }

    /// Whether a site has room for a demand, whatever class it is of.
    fn fits(&self, instance: &Instance, site: u8, demand: PerResource<f32>) -> bool {
        let (load, room) = (self.load[usize::from(site)], instance.room[usize::from(site)]);
        let fits = |r: usize| demand[r] == 0.0 || load[r] + f64::from(demand[r]) <= room[r] * (1.0 + SLACK);
        instance.open[usize::from(site)] && (0..RESOURCES).all(fits)
    }

    /// Whether a site has room for a group, whatever its class has there.
    pub(super) fn fits_alone(&self, instance: &Instance, site: u8, group: usize) -> bool {
        self.fits(instance, site, instance.demand[group])
    }

    fn has_room(&self, instance: &Instance, site: u8, group: usize) -> bool {
        self.fits(instance, site, instance.demand[group]) && self.spread_holds(instance, &[(group, site)])
    }

    /// Whether a site has too much, or a cell too many of a class.
    fn is_broken(&self, instance: &Instance) -> bool {
        (0..instance.sites()).any(|site| self.exceeded(instance, site)) || !self.crowded(instance).is_empty()
    }

    /// Sites that have too much give groups away. What cannot be given away directly is tried by chains.
    pub(super) fn repair(&mut self, instance: &Instance, table: &PriceTable) {
        self.repair_in(instance, table, &mut Search::new(0, CHAIN_WORK_MAX));
    }

    /// The same within the work of a search.
    pub(super) fn repair_in(&mut self, instance: &Instance, table: &PriceTable, search: &mut Search) {
        for _ in 0..GIVE_ROUNDS {
            if !self.is_broken(instance) || !self.give_away(instance, table) {
                break;
            }
        }
        if !self.is_broken(instance) {
            return;
        }
        search.know(self, instance);
        for site in 0..instance.sites() {
            while self.exceeded(instance, site) && search.may_go_on() && self.chain(instance, search, site) {}
        }
        if (0..instance.sites()).any(|site| self.exceeded(instance, site)) {
            self.push_on(instance, table, search);
        }
        self.spread_out(instance, search);
    }

    pub(super) fn members(&self, instance: &Instance) -> Vec<Vec<u32>> {
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); instance.sites()];
        for group in 0..instance.groups() {
            if let Some(site) = self.site(instance, group) {
                members[usize::from(site)].push(group as u32);
            }
        }
        members
    }

    fn give_away(&mut self, instance: &Instance, table: &PriceTable) -> bool {
        let exceeded: Vec<bool> = (0..instance.sites()).map(|site| self.exceeded(instance, site)).collect();
        let mut priced = Priced::empty();
        let mut wishes = Vec::new();
        for group in 0..instance.groups() {
            let leaves = |site: &u8| exceeded[usize::from(*site)] || self.crowds(instance, group, *site);
            let Some(site) = self.site(instance, group).filter(leaves) else { continue };
            priced.set(instance, table, group);
            let Some(to) = self.cheapest_with_room(instance, group, &priced) else { continue };
            let relief = self.relief(instance, site, group);
            if relief > 0.0 {
                let loss = priced.value_ms[to] - priced.value_ms[usize::from(self.choice[group])];
                wishes.push(Wish { key: loss * priced.size / relief, group: group as u32 });
            }
        }
        in_order(&mut wishes);
        let mut given = false;
        for Wish { group, .. } in wishes {
            let group = group as usize;
            let Some(site) = self.site(instance, group) else { continue };
            if self.relief(instance, site, group) <= 0.0 {
                continue;
            }
            priced.set(instance, table, group);
            if let Some(to) = self.cheapest_with_room(instance, group, &priced) {
                self.shift(instance, group, to as u8);
                self.displaced.push(group as u32);
                given = true;
            }
        }
        given
    }

    /// By how much of its excess a site is helped when a group goes: its demand of what is exceeded, as a share of the room;
    /// and likewise for a cell with too many groups of its class.
    pub(super) fn relief(&self, instance: &Instance, site: u8, group: usize) -> f32 {
        let (load, room) = (self.load[usize::from(site)], instance.room[usize::from(site)]);
        let demand = instance.demand[group];
        let one = |r: usize| {
            let excess = load[r] - room[r] * (1.0 + SLACK);
            if excess > 0.0 { f64::from(demand[r]).min(excess) / room[r].max(f64::MIN_POSITIVE) } else { 0.0 }
        };
        let crowded = if self.crowds(instance, group, site) { CROWD_RELIEF } else { 0.0 };
        ((0..RESOURCES).map(one).sum::<f64>() + crowded).min(f64::from(f32::MAX)) as f32
    }

    /// The cheapest other candidate with room.
    pub(super) fn cheapest_with_room(
        &self,
        instance: &Instance,
        group: usize,
        priced: &Priced,
    ) -> Option<usize> {
        let (sites, _) = instance.row(group);
        let present = usize::from(self.choice[group]);
        let mut best: Option<usize> = None;
        for (k, &site) in sites.iter().enumerate() {
            let better = best.is_none_or(|best| priced.value_ms[k] < priced.value_ms[best]);
            if k != present && better && self.has_room(instance, site, group) {
                best = Some(k);
            }
        }
        best
    }

    /// The shortest chain of moves from a site with too much to one with room: each site on the way gives a group for the
    /// one that it gets, and is not worse off than before. With groups of one size this finds room whenever there is any, as long as the
    /// work of a round lasts.
    pub(super) fn chain(&mut self, instance: &Instance, search: &mut Search, from: usize) -> bool {
        // How a site was reached: by which group, from where.
        let mut reached: Vec<Option<(u32, usize, u8)>> = vec![None; instance.sites()];
        let mut queue = VecDeque::from([from]);
        while let Some(site) = queue.pop_front() {
            let received = reached[site].map(|(group, _, _)| instance.demand[group as usize]);
            search.work += search.members[site].len();
            search.sort(instance, site);
            let members = &search.members[site];
            // Where the chain begins: the smallest that is enough, then larger ones, then the largest that is not.
            let enough = if site == from { self.first_enough(instance, site, members) } else { 0 };
            for &group in members[enough..].iter().chain(members[..enough].iter().rev()) {
                // Who was moved by an earlier chain is still in the list of its old site.
                if self.site(instance, group as usize) != Some(site as u8)
                    || !self.may_give(instance, site, received, group as usize)
                {
                    continue;
                }
                let (sites, _) = instance.row(group as usize);
                for (k, &to) in sites.iter().enumerate() {
                    let way = (group, site, k as u8);
                    let to = usize::from(to);
                    if to == from
                        || to == site
                        || reached[to].is_some()
                        || !instance.open[to]
                        || !self.way_holds(instance, &reached, way, to)
                    {
                        continue;
                    }
                    reached[to] = Some(way);
                    if self.fits_alone(instance, to as u8, group as usize) {
                        self.follow(instance, &reached, search, to, from);
                        return true;
                    }
                    queue.push_back(to);
                }
            }
        }
        false
    }

    /// The first of the members, the small ones first, without which a site has no longer too much. About: the order is by
    /// packets, and later members are not sorted.
    fn first_enough(&self, instance: &Instance, site: usize, members: &[u32]) -> usize {
        let over = |r: usize| self.load[site][r] - instance.room[site][r] * (1.0 + SLACK);
        let over: PerResource<f64> = std::array::from_fn(over);
        members.partition_point(|&group| {
            let demand = instance.demand[group as usize];
            (0..RESOURCES).any(|r| over[r] > 0.0 && f64::from(demand[r]) < over[r])
        })
    }

    /// Whether no cell would have too many groups of a class, if all on the way to a site and the last one moved.
    fn way_holds(
        &self,
        instance: &Instance,
        reached: &[Option<(u32, usize, u8)>],
        last: (u32, usize, u8),
        to: usize,
    ) -> bool {
        if instance.spreads.is_empty() || instance.class(last.0 as usize).is_none() {
            return true;
        }
        let mut moves = vec![(last.0 as usize, to as u8)];
        let mut at = last.1;
        while let Some((group, from, _)) = reached[at] {
            moves.push((group as usize, at as u8));
            at = from;
        }
        self.spread_holds(instance, &moves)
    }

    /// Whether a site on the way stays within its room, or is relieved where it is beyond, when it gives one group for
    /// another.
    fn may_give(
        &self,
        instance: &Instance,
        site: usize,
        received: Option<PerResource<f32>>,
        group: usize,
    ) -> bool {
        let Some(received) = received else { return self.relief(instance, site as u8, group) > 0.0 };
        let given = instance.demand[group];
        (0..RESOURCES).all(|r| {
            let after = self.load[site][r] + f64::from(received[r]) - f64::from(given[r]);
            received[r] <= given[r] || after <= instance.room[site][r] * (1.0 + SLACK)
        })
    }

    fn follow(
        &mut self,
        instance: &Instance,
        reached: &[Option<(u32, usize, u8)>],
        search: &mut Search,
        end: usize,
        start: usize,
    ) {
        let mut at = end;
        while at != start
            && let Some((group, from, choice)) = reached[at]
        {
            self.shift_in(instance, search, group as usize, choice);
            at = from;
        }
    }

    /// Moves a group and lets the search know.
    pub(super) fn shift_in(&mut self, instance: &Instance, search: &mut Search, group: usize, choice: u8) {
        search.journal.push((group as u32, self.choice[group]));
        self.displaced.push(group as u32);
        self.shift(instance, group, choice);
        if let Some(site) = self.site(instance, group) {
            search.members[usize::from(site)].push(group as u32);
        }
    }

    /// Takes back all moves after the first so many.
    pub(super) fn take_back(&mut self, instance: &Instance, search: &mut Search, mark: usize) {
        while search.journal.len() > mark
            && let Some((group, choice)) = search.journal.pop()
        {
            self.shift(instance, group as usize, choice);
        }
    }

    /// Room that is left goes to the groups that gain most by it, per share of room that they take.
    pub(super) fn fill(&mut self, instance: &Instance) {
        let mut wishes = Vec::new();
        for group in 0..instance.groups() {
            if let Some((gain, to)) = self.gain(instance, group) {
                let (site, demand) = (instance.row(group).0[to], instance.demand[group]);
                let room = instance.room[usize::from(site)];
                let taken = (0..RESOURCES).map(|r| f64::from(demand[r]) / room[r].max(f64::MIN_POSITIVE));
                let taken = taken.fold(f64::MIN_POSITIVE, f64::max);
                wishes
                    .push(Wish { key: -(gain / taken).min(f64::from(f32::MAX)) as f32, group: group as u32 });
            }
        }
        in_order(&mut wishes);
        for Wish { group, .. } in wishes {
            if let Some((_, to)) = self.gain(instance, group as usize) {
                self.shift(instance, group as usize, to as u8);
            }
        }
    }

    /// The cheaper candidate with room that a group could have, and what it gains by it.
    fn gain(&self, instance: &Instance, group: usize) -> Option<(f64, usize)> {
        let choice = self.choice[group];
        if choice == NOWHERE {
            return None;
        }
        let (sites, costs) = instance.row(group);
        let cost = instance.cost_of(group);
        let present = cost(sites[usize::from(choice)], costs[usize::from(choice)]);
        // Gains in the last digits are noise of the sums.
        let mut best = present * (1.0 - 1e-7);
        let mut to = None;
        for (k, (&site, &ms)) in sites.iter().zip(costs).enumerate() {
            let cost = cost(site, ms);
            if cost < best && k != usize::from(choice) && self.has_room(instance, site, group) {
                (best, to) = (cost, Some(k));
            }
        }
        to.map(|to| (present - best, to))
    }
}
