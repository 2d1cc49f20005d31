//! What rooms hold of whole groups: sites that are too small for a group even if it were alone there, and rooms of which only
//! a multiple of one size is of use.
//!
//! No placement within the rooms has the group at such a site, so prices and bound count without it: the bound is higher and true
//! all the same, and no group hopes for a place that it can never get. A group for which all its candidates are too small
//! is a *giant*: it is kept at the cheapest one, which it exceeds, and whatever it takes there beyond the room is nobody's
//! fault that a price could mend.

use super::instance::{Instance, PerResource, RESOURCES};
use super::round::SLACK;

/// Which candidates are too small, by group, where giants are, and of what size all are.
pub(super) struct Alone {
    /// Bit k stands for candidate k. Empty when no candidate of any group is too small.
    barred: Vec<u16>,
    /// Groups for which all candidates are too small, in their order.
    seated: Vec<u32>,
    /// What giants want together at each site, in the units of the resources. Empty when there are none.
    giants: Vec<PerResource<f64>>,
    /// What every group wants of a resource, where they all want the same.
    each: PerResource<Option<f64>>,
}

impl Alone {
    pub(super) fn of(instance: &Instance) -> Self {
        let mut this =
            Self { barred: Vec::new(), seated: Vec::new(), giants: Vec::new(), each: each(instance) };
        let least = least_rooms(instance);
        for group in 0..instance.groups() {
            let demand = instance.demand[group];
            if (0..RESOURCES).any(|r| f64::from(demand[r]) > least[r]) {
                this.add(instance, group);
            }
        }
        this
    }

    fn add(&mut self, instance: &Instance, group: usize) {
        let (sites, costs) = instance.row(group);
        let open = |k: &usize| instance.open[usize::from(sites[*k])];
        let mut mask: u16 = 0;
        (0..sites.len())
            .filter(|&k| !instance.holds_alone(sites[k], instance.demand[group]))
            .for_each(|k| mask |= 1 << k);
        if mask == 0 {
            return;
        }
        if (0..sites.len()).filter(open).all(|k| mask & (1 << k) != 0) {
            let cost = instance.cost_of(group);
            let cheaper =
                |a: &usize, b: &usize| cost(sites[*a], costs[*a]).total_cmp(&cost(sites[*b], costs[*b]));
            let Some(seat) = (0..sites.len()).filter(open).min_by(cheaper) else { return };
            mask &= !(1 << seat);
            self.seated.push(group as u32);
            self.giants.resize(instance.sites(), [0.0; RESOURCES]);
            let wanted = &mut self.giants[usize::from(sites[seat])];
            wanted.iter_mut().zip(instance.demand[group]).for_each(|(sum, one)| *sum += f64::from(one));
        }
        self.barred.resize(instance.groups(), 0);
        self.barred[group] = mask;
    }

    /// For the climb: a site that could hold none of the groups that may be there is no candidate for anybody, and still has a price,
    /// which says what room there would be worth. The bound pays for less than one group by it.
    pub(super) fn for_prices(mut self, instance: &Instance) -> Self {
        if self.barred.is_empty() {
            return self;
        }
        let mut useless = vec![false; instance.sites()];
        for (group, &mask) in self.barred.iter().enumerate() {
            bits(mask).for_each(|k| useless[usize::from(instance.row(group).0[k])] = true);
        }
        let mut left = useless.iter().filter(|useless| **useless).count();
        for group in 0..instance.groups() {
            if left == 0 {
                return self;
            }
            let free =
                instance.row(group).0.iter().enumerate().filter(|(k, _)| self.barred(group) & (1 << k) == 0);
            // A giant is at its seat, and fits there no better.
            if self.seated.binary_search(&(group as u32)).is_err() {
                free.for_each(|(_, &site)| {
                    left -= usize::from(std::mem::take(&mut useless[usize::from(site)]));
                });
            }
        }
        for (group, mask) in self.barred.iter_mut().enumerate() {
            if self.seated.binary_search(&(group as u32)).is_err() {
                let sites = instance.row(group).0;
                bits(*mask).filter(|&k| useless[usize::from(sites[k])]).for_each(|k| *mask &= !(1 << k));
            }
        }
        self
    }

    /// The candidates of a group that are too small for it, as bits.
    #[inline]
    pub(super) fn barred(&self, group: usize) -> u16 {
        self.barred.get(group).copied().unwrap_or(0)
    }

    /// What whole groups can take of a room.
    pub(super) fn of_use(&self, room: &PerResource<f64>) -> PerResource<f64> {
        let whole = |r: usize| match self.each[r] {
            Some(each) => (room[r] / each * (1.0 + SLACK)).floor() * each,
            None => room[r],
        };
        std::array::from_fn(whole)
    }

    /// The same of a site, or what giants take there if that is more: then others find none there, and no price grows for
    /// ever for what cannot be helped.
    pub(super) fn room(&self, site: usize, room: &PerResource<f64>) -> PerResource<f64> {
        let (room, giants) = (self.of_use(room), self.giants.get(site).copied().unwrap_or_default());
        std::array::from_fn(|r| room[r].max(giants[r]))
    }
}

/// The positions of the bits that are set.
fn bits(mask: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |k| mask & (1 << k) != 0)
}

/// What all groups want alike.
fn each(instance: &Instance) -> PerResource<Option<f64>> {
    let Some(first) = instance.demand.first() else { return [None; RESOURCES] };
    let mut alike = first.map(|one| one > 0.0);
    for demand in &instance.demand {
        (0..RESOURCES).for_each(|r| alike[r] &= demand[r] == first[r]);
        if alike == [false; RESOURCES] {
            break;
        }
    }
    std::array::from_fn(|r| alike[r].then_some(f64::from(first[r])))
}

/// The least room of any site, which holds most groups: only larger ones are looked at closely.
fn least_rooms(instance: &Instance) -> PerResource<f64> {
    let mut least = [f64::INFINITY; RESOURCES];
    for room in &instance.room {
        least.iter_mut().zip(room).for_each(|(least, &room)| *least = least.min(room * (1.0 + SLACK)));
    }
    least
}
