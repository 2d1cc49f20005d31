//! Where a whole region is full, what is too much flows on from site to site until it comes to one with room.
//!
//! A chain moves one group for one, each of which has to fit; where sites are full to the brim in several resources none may be
//! found. Here a site may have too much for a while: heights say how far a site is from room, and groups only go downwards
//! (Goldberg and Tarjan, A new approach to the maximum-flow problem, Journal of the ACM 35, 1988).

use super::instance::{Instance, RESOURCES};
use super::round::{Assignment, Search};
use super::softmin::{PriceTable, Priced};

/// Times that heights are found anew.
const ROUNDS: usize = 64;
/// A site has room if so much of each resource is free, as a share.
const FREE_MIN: f64 = 0.005;
/// Higher than any way through all sites.
const NO_WAY: usize = usize::MAX;

/// A group that may go downwards.
#[derive(Clone, Copy)]
struct Step {
    key: f32,
    group: u32,
    choice: u8,
}

impl Assignment {
    /// Sites with too much push groups towards room, those first that lose least by it. Everything is taken back if that leaves
    /// sites with no less beyond their rooms.
    pub(super) fn push_on(&mut self, instance: &Instance, table: &PriceTable, search: &mut Search) {
        let mark = search.journal.len();
        let before = self.excess(instance);
        for _ in 0..ROUNDS {
            let heights = self.heights(instance, search);
            let mut short: Vec<usize> =
                (0..instance.sites()).filter(|&site| self.exceeded(instance, site)).collect();
            // Those far from room first, so that what they push goes on in the same round.
            short.sort_by_key(|&site| (std::cmp::Reverse(heights[site]), site));
            let mut pushed = false;
            for site in short {
                if heights[site] != NO_WAY && search.may_go_on() {
                    pushed |= self.push_from(instance, table, search, site, &heights);
                }
            }
            if !pushed || self.excess(instance) == 0.0 {
                break;
            }
        }
        if self.excess(instance) >= before {
            self.take_back(instance, search, mark);
        }
    }

    /// What is beyond rooms, as shares of them.
    fn excess(&self, instance: &Instance) -> f64 {
        let over = |site: usize, r: usize| {
            let (load, room) = (self.load[site][r], instance.room[site][r]);
            if load > room { (load - room) / room.max(f64::MIN_POSITIVE) } else { 0.0 }
        };
        let short = (0..instance.sites()).filter(|&site| self.exceeded(instance, site));
        short.map(|site| (0..RESOURCES).map(|r| over(site, r)).sum::<f64>()).sum()
    }

    /// In how many moves of groups a site comes to one with room.
    fn heights(&self, instance: &Instance, search: &mut Search) -> Vec<usize> {
        let sites = instance.sites();
        let free = |site: usize, r: usize| self.load[site][r] <= instance.room[site][r] * (1.0 - FREE_MIN);
        let has_room = |&site: &usize| instance.open[site] && (0..RESOURCES).all(|r| free(site, r));
        let mut heights = vec![NO_WAY; sites];
        let mut level: Vec<usize> = (0..sites).filter(has_room).collect();
        level.iter().for_each(|&site| heights[site] = 0);
        search.work += instance.groups();
        // Whether a group of one site may also be at another.
        let mut way = vec![false; sites * sites];
        for group in 0..instance.groups() {
            if let Some(from) = self.site(instance, group) {
                let row = &mut way[usize::from(from) * sites..][..sites];
                for &to in instance.row(group).0 {
                    // A site with room is near only to groups that fit there.
                    row[usize::from(to)] |=
                        heights[usize::from(to)] > 0 || self.fits_alone(instance, to, group);
                }
            }
        }
        for height in 1..=sites {
            let above =
                |site: &usize| heights[*site] == NO_WAY && level.iter().any(|to| way[site * sites + to]);
            let next: Vec<usize> = (0..sites).filter(above).collect();
            next.iter().for_each(|&site| heights[site] = height);
            level = next;
        }
        heights
    }

    fn push_from(
        &mut self,
        instance: &Instance,
        table: &PriceTable,
        search: &mut Search,
        site: usize,
        heights: &[usize],
    ) -> bool {
        let mut priced = Priced::empty();
        let mut steps = Vec::new();
        search.work += search.members[site].len();
        for at in 0..search.members[site].len() {
            let group = search.members[site][at];
            // Who was moved by an earlier step is still in the list of its old site.
            if self.site(instance, group as usize) != Some(site as u8) {
                continue;
            }
            let relief = self.relief(instance, site as u8, group as usize);
            if relief <= 0.0 {
                continue;
            }
            priced.set(instance, table, group as usize);
            let now = priced.value_ms[usize::from(self.choice[group as usize])];
            let downwards = self.downwards(instance, group as usize, heights, heights[site]);
            let value = |choice: &usize| priced.value_ms[*choice];
            if let Some(choice) = downwards.min_by(|a, b| value(a).total_cmp(&value(b))) {
                let key = (value(&choice) - now) * priced.size / relief;
                steps.push(Step { key, group, choice: choice as u8 });
            }
        }
        steps.sort_unstable_by(|a, b| a.key.total_cmp(&b.key).then(a.group.cmp(&b.group)));
        steps.dedup_by_key(|step| step.group);
        let mut pushed = false;
        for Step { group, choice, .. } in steps {
            let group = group as usize;
            if !self.exceeded(instance, site) {
                break;
            }
            // What has filled since the list was made takes no more.
            let still =
                self.downwards(instance, group, heights, heights[site]).any(|one| one == usize::from(choice));
            if still && self.relief(instance, site as u8, group) > 0.0 {
                self.shift_in(instance, search, group, choice);
                pushed = true;
            }
        }
        pushed
    }

    /// Candidates of a group that are nearer to room; those that are said to have it must have it for this group.
    fn downwards<'a>(
        &'a self,
        instance: &'a Instance,
        group: usize,
        heights: &'a [usize],
        height: usize,
    ) -> impl Iterator<Item = usize> + 'a {
        let sites = instance.row(group).0;
        (0..sites.len()).filter(move |&choice| {
            let to = sites[choice];
            let lower = instance.open[usize::from(to)] && heights[usize::from(to)] < height;
            lower
                && (heights[usize::from(to)] > 0 || self.fits_alone(instance, to, group))
                && self.spread_holds(instance, &[(group, to)])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::instance::{Candidate, Group, Site};
    use super::super::softmin::Units;
    use super::*;

    /// Three sites in a row with room for 10, 10 and 100. Groups of 3 fill the first beyond its room, groups of 2 the second to the
    /// brim; each may be where it is or one further. One for one, nothing fits.
    fn row() -> (Instance, Assignment, PriceTable) {
        let wide = f64::INFINITY;
        let site = |room| Site { capacity: [room, wide, wide], headroom: 0.0 };
        let mut instance = Instance::new(&[site(10.0), site(10.0), site(100.0)]).unwrap();
        for (count, demand, first) in [(4, 3.0, 0), (5, 2.0, 1)] {
            for _ in 0..count {
                let candidates =
                    [Candidate { site: first, cost_ms: 1.0 }, Candidate { site: first + 1, cost_ms: 2.0 }];
                let group = Group {
                    weight: demand,
                    demand: [demand, 0.0, 0.0],
                    present: None,
                    charge: 0.0,
                    left_out_ms: f32::INFINITY,
                    class: None,
                    candidates: &candidates,
                };
                instance.push(&group).unwrap();
            }
        }
        let mut all = Assignment::empty(&instance);
        (0..instance.groups()).for_each(|group| all.shift(&instance, group, 0));
        let table = PriceTable::free(Units::of(&instance), &instance);
        (instance, all, table)
    }

    #[test]
    fn what_is_too_much_flows_on_through_full_sites() {
        let (instance, mut assignment, table) = row();
        let mut search = Search::new(0, 1_000_000);
        search.know(&assignment, &instance);
        assert!(!assignment.chain(&instance, &mut search, 0), "one for one, nothing fits");
        assignment.push_on(&instance, &table, &mut search);
        assert_eq!(assignment.load.iter().map(|load| load[0]).collect::<Vec<_>>(), [9.0, 9.0, 4.0]);
    }

    #[test]
    fn where_nothing_has_room_nobody_is_pushed() {
        let (mut instance, mut assignment, table) = row();
        instance.set_open(2, false);
        let before = assignment.choice.clone();
        let mut search = Search::new(0, 1_000_000);
        search.know(&assignment, &instance);
        assignment.push_on(&instance, &table, &mut search);
        assert_eq!(assignment.choice, before);
    }
}
