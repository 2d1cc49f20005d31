//! A group that rounding sent away takes its place back, and small ones make way for it.
//!
//! What rounding loses, it loses by few groups: heavy ones that had to leave a full site, or that a chain carried off. In
//! their place many small groups can go that hardly care where they are.

use super::instance::{Instance, PerResource, RESOURCES};
use super::round::{Assignment, NOWHERE, SLACK};
use super::softmin::{PriceTable, Priced};

/// A group that loses a smaller share of what all lose together is left where it is.
const LOSS_MIN: f32 = 0.003;
/// Places that a group tries to get.
const PLACES: usize = 3;

/// A group that may make way, sorted by what that costs per share of the room that it makes.
#[derive(Clone, Copy)]
struct Offer {
    key: f32,
    group: u32,
}

impl Assignment {
    /// Groups that were sent away, those that lose most first, take back a cheaper place where others can make way for less.
    /// At most so many groups are asked to. Rooms and limits that hold go on to hold.
    pub(super) fn take_places(&mut self, instance: &Instance, table: &PriceTable, mut work: usize) {
        let mut priced = Priced::empty();
        let mut losers = std::mem::take(&mut self.displaced);
        losers.sort_unstable();
        losers.dedup();
        let loss = |this: &Self, priced: &mut Priced, group: usize| {
            let choice = this.choice[group];
            if choice == NOWHERE {
                return 0.0;
            }
            priced.set(instance, table, group);
            (priced.value_ms[usize::from(choice)] - priced.best_ms) * priced.size
        };
        let mut losers: Vec<(f32, u32)> =
            losers.into_iter().map(|group| (loss(self, &mut priced, group as usize), group)).collect();
        losers.retain(|(loss, _)| *loss > 0.0);
        losers.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.displaced = losers.iter().map(|(_, group)| *group).collect();
        let least = losers.iter().map(|(loss, _)| loss).sum::<f32>() * LOSS_MIN;
        let mut members: Option<Vec<Vec<u32>>> = None;
        for (_, group) in losers.into_iter().take_while(|(loss, _)| *loss > least) {
            let members = members.get_or_insert_with(|| self.members(instance));
            if !self.take_place(instance, table, members, group as usize, &mut work) {
                break;
            }
        }
    }

    /// Whether there is work left.
    fn take_place(
        &mut self,
        instance: &Instance,
        table: &PriceTable,
        members: &mut [Vec<u32>],
        group: usize,
        work: &mut usize,
    ) -> bool {
        let mut priced = Priced::empty();
        priced.set(instance, table, group);
        let now = priced.value_ms[usize::from(self.choice[group])];
        let sites = instance.row(group).0;
        let mut places: Vec<usize> = (0..sites.len()).filter(|&k| priced.value_ms[k] < now).collect();
        places.sort_by(|&a, &b| priced.value_ms[a].total_cmp(&priced.value_ms[b]).then(a.cmp(&b)));
        for place in places.into_iter().take(PLACES) {
            let site = usize::from(sites[place]);
            if members[site].len() > *work {
                return false;
            }
            *work -= members[site].len();
            let gain = (now - priced.value_ms[place]) * priced.size;
            let before = self.choice[group];
            if !self.spread_holds(instance, &[(group, sites[place])]) {
                continue;
            }
            self.shift(instance, group, place as u8);
            match self.make_way(instance, table, &members[site], site, group, gain) {
                Some(moved) => {
                    members[site].push(group as u32);
                    for other in moved {
                        if let Some(to) = self.site(instance, other as usize) {
                            members[usize::from(to)].push(other);
                        }
                        self.displaced.push(other);
                    }
                    return true;
                }
                None => self.shift(instance, group, before),
            }
        }
        true
    }

    /// Groups of a site that has too much leave it until it has not, for less than a loss; who left. Or nobody has moved.
    fn make_way(
        &mut self,
        instance: &Instance,
        table: &PriceTable,
        members: &[u32],
        site: usize,
        keep: usize,
        loss_max: f32,
    ) -> Option<Vec<u32>> {
        let mut priced = Priced::empty();
        let mut offers = Vec::new();
        for &group in members {
            // Who left since the list was made is still in it.
            if group as usize == keep || self.site(instance, group as usize) != Some(site as u8) {
                continue;
            }
            let relief = self.relief(instance, site as u8, group as usize);
            if relief > 0.0
                && let Some((_, loss)) = self.way_out(instance, table, &mut priced, group as usize)
                && loss < loss_max
            {
                offers.push(Offer { key: loss / relief, group });
            }
        }
        offers.sort_unstable_by(|a, b| a.key.total_cmp(&b.key).then(a.group.cmp(&b.group)));
        let mut lost = 0.0;
        let mut moved: Vec<(u32, u8, f32)> = Vec::new();
        for Offer { group, .. } in offers {
            if !self.exceeded(instance, site) || lost >= loss_max {
                break;
            }
            if self.relief(instance, site as u8, group as usize) > 0.0
                && let Some((to, loss)) = self.way_out(instance, table, &mut priced, group as usize)
            {
                moved.push((group, self.choice[group as usize], loss));
                self.shift(instance, group as usize, to as u8);
                lost += loss;
            }
        }
        let held = !self.exceeded(instance, site);
        // The last ones may have made more room than was needed: who fits again comes back, the dearest first.
        moved.sort_unstable_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
        moved.retain(|&(group, choice, loss)| {
            let back = held
                && loss > 0.0
                && self.leaves_room(instance, site, instance.demand[group as usize])
                && self.spread_holds(instance, &[(group as usize, site as u8)]);
            if back {
                self.shift(instance, group as usize, choice);
                lost -= loss;
            }
            !back
        });
        if held && lost < loss_max {
            return Some(moved.into_iter().map(|(group, _, _)| group).collect());
        }
        moved.into_iter().for_each(|(group, choice, _)| self.shift(instance, group as usize, choice));
        None
    }

    fn leaves_room(&self, instance: &Instance, site: usize, demand: PerResource<f32>) -> bool {
        let (load, room) = (self.load[site], instance.room[site]);
        (0..RESOURCES).all(|r| load[r] + f64::from(demand[r]) <= room[r] * (1.0 + SLACK))
    }

    /// The cheapest other candidate with room, and what a group loses by going there.
    fn way_out(
        &self,
        instance: &Instance,
        table: &PriceTable,
        priced: &mut Priced,
        group: usize,
    ) -> Option<(usize, f32)> {
        priced.set(instance, table, group);
        let to = self.cheapest_with_room(instance, group, priced)?;
        let now = priced.value_ms[usize::from(self.choice[group])];
        Some((to, (priced.value_ms[to] - now) * priced.size))
    }
}

#[cfg(test)]
mod tests {
    use super::super::instance::{Candidate, Group, Site};
    use super::super::softmin::Units;
    use super::*;

    /// Site 0 has room for 100: ninety groups of one there hardly care, the last group, of 60 at site 1, does.
    fn crowded(heavy_ms: f32, small_ms: f32) -> (Instance, Assignment, PriceTable) {
        let wide = f64::INFINITY;
        let site = |room| Site { capacity: [room, wide, wide], headroom: 0.0 };
        let mut instance = Instance::new(&[site(100.0), site(1000.0)]).unwrap();
        let mut push = |weight: f32, other_ms: f32| {
            let candidates =
                [Candidate { site: 0, cost_ms: 1.0 }, Candidate { site: 1, cost_ms: 1.0 + other_ms }];
            let (demand, present, charge) = ([weight, 0.0, 0.0], None, 0.0);
            let (left_out_ms, class, candidates) = (f32::INFINITY, None, &candidates[..]);
            instance
                .push(&Group { weight, demand, present, charge, left_out_ms, class, candidates })
                .unwrap();
        };
        (0..90).for_each(|_| push(1.0, small_ms));
        push(60.0, heavy_ms);
        let mut assignment = Assignment::empty(&instance);
        (0..90).for_each(|group| assignment.shift(&instance, group, 0));
        assignment.shift(&instance, 90, 1);
        assignment.displaced = vec![90];
        let table = PriceTable::free(Units::of(&instance), &instance);
        (instance, assignment, table)
    }

    #[test]
    fn a_heavy_group_takes_its_place_back_and_just_enough_small_ones_make_way() {
        let (instance, mut assignment, table) = crowded(20.0, 0.5);
        assignment.take_places(&instance, &table, 1000);
        assert_eq!(assignment.choice[90], 0);
        assert_eq!(assignment.load[0][0], 100.0);
        assert_eq!(assignment.choice.iter().filter(|&&choice| choice == 1).count(), 50);
    }

    #[test]
    fn nobody_makes_way_for_less_than_that_costs() {
        let (instance, mut assignment, table) = crowded(1.0, 2.0);
        let before = assignment.choice.clone();
        assignment.take_places(&instance, &table, 1000);
        assert_eq!(assignment.choice, before);
        assert_eq!(assignment.load[0][0], 90.0);
    }

    #[test]
    fn the_work_is_bounded() {
        let (instance, mut assignment, table) = crowded(20.0, 0.5);
        assignment.take_places(&instance, &table, 89);
        assert_eq!(assignment.choice[90], 1);
    }
}
