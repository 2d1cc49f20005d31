//! Nearest with spill: the simple choice, and the named peer of the solver. Groups by weight, largest first, each to its
//! cheapest candidate that has room; to the one that is filled least beyond, if none has.

use super::instance::{Instance, RESOURCES};
use super::round::Assignment;

/// What nearest-with-spill achieves.
#[derive(Clone, Debug, PartialEq)]
pub struct Greedy {
    /// Delay, rules and move charges, in weight x ms.
    pub cost: f64,
    /// Groups that found no room.
    pub spilled: usize,
    /// The site of each group; `None` when all its candidates are closed.
    pub sites: Vec<Option<u8>>,
}

/// Places all groups.
#[must_use]
pub fn place(instance: &Instance) -> Greedy {
    let mut order: Vec<u32> = (0..instance.groups() as u32).collect();
    order.sort_by(|&a, &b| {
        instance.weight[b as usize].total_cmp(&instance.weight[a as usize]).then(a.cmp(&b))
    });
    let mut assignment = Assignment::empty(instance);
    let mut result = Greedy { cost: 0.0, spilled: 0, sites: vec![None; instance.groups()] };
    for group in order {
        let group = group as usize;
        let Some((choice, fits)) = choose(instance, &assignment, group) else { continue };
        assignment.choice[group] = choice as u8;
        assignment.account(instance, group, 1.0);
        result.cost += instance.cost(group, choice);
        result.spilled += usize::from(!fits);
        result.sites[group] = assignment.site(instance, group);
    }
    result
}

fn choose(instance: &Instance, assignment: &Assignment, group: usize) -> Option<(usize, bool)> {
    let demand = instance.demand[group];
    let (sites, _) = instance.row(group);
    let open = sites.iter().enumerate().filter(|&(_, &site)| instance.open[usize::from(site)]);
    let spread = |choice: usize| assignment.spread_holds(instance, &[(group, sites[choice])]);
    // By how much the fullest resource would be filled.
    let fill = |site: u8| {
        let (load, room) = (assignment.load[usize::from(site)], instance.room[usize::from(site)]);
        let one = |r: usize| (load[r] + f64::from(demand[r])) / room[r].max(f64::MIN_POSITIVE);
        (0..RESOURCES).map(one).fold(0.0, f64::max)
    };
    let options: Vec<(usize, f64, f64)> =
        open.map(|(choice, &site)| (choice, instance.cost(group, choice), fill(site))).collect();
    let cheapest = options
        .iter()
        .filter(|option| option.2 <= 1.0 && spread(option.0))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    let emptiest = || options.iter().min_by(|a, b| a.2.total_cmp(&b.2)).map(|option| (option.0, false));
    cheapest.map(|option| (option.0, true)).or_else(emptiest)
}
