//! Room for what a loss brings: a standby site for each group, so that whichever failure domain is lost, the sites that
//! remain can carry what they carry now and what comes to them.
//!
//! Only one domain is lost at a time, so domains do not compete: what room there is beside the load of today serves the loss
//! of each anew. For each domain it is an assignment problem of its own, smaller than that of the placement, and solved by the
//! same steps: each group where it is cheapest, sites with too much give away, chains make room. Groups that find no room are
//! unprotected. Where there are such, the placement itself may leave more room: [`Solver::solve_to_survive`].

use std::collections::BTreeMap;

use super::instance::{
    CANDIDATES_MAX, Candidate, Group, Instance, PerResource, RESOURCES, Resource, SITES_MAX,
};
use super::round::{Assignment, NOWHERE, SLACK, Search};
use super::softmin::{PriceTable, Units};
use super::{Bounds, Certificate, Solver, Start};

/// Placements that are tried so that more groups find a standby.
const ROUNDS: usize = 4;
/// What it has to gain that a group changes its standby site, in milliseconds: more than any delay. A standby that holds is
/// only given up so that another group finds one.
const KEEP_MS: f32 = 10_000.0;
/// Groups that the searches for chains of all domains may look at: about a second at worst.
const WORK_MAX: usize = 10_000_000;
/// Chains that may make room for one group.
const CHAINS_PER_GROUP: usize = 8;

/// What may be lost, and who needs a standby.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// What each site can carry after a loss, its headroom included, in the units of the resources; infinite where there is no
    /// limit.
    pub capacity: &'a [PerResource<f64>],
    /// The failure domain of each site. Sites of one domain are lost together.
    pub domain: &'a [u8],
    /// The present standby of each group. One that holds is kept.
    pub standby: &'a [Option<u8>],
    /// Whether a group needs a standby.
    pub wanted: &'a [bool],
    /// Groups whose standby may not be everywhere; `None` when all may be at any of their candidates.
    pub among: Option<Among<'a>>,
    /// Sites for the standby of groups that may not be placed there now, beside their candidates.
    pub beside: Option<&'a BTreeMap<u32, Vec<Candidate>>>,
}

/// Where standbys may be.
#[derive(Clone, Copy, Debug)]
pub struct Among<'a> {
    /// Sets of sites.
    pub sets: &'a [[bool; SITES_MAX]],
    /// Number of the set of each group; one that is not there stands for all sites.
    pub of: &'a [u8],
}

impl Among<'_> {
    fn allows(&self, group: usize, site: u8) -> bool {
        let set = self.of.get(group).and_then(|&set| self.sets.get(usize::from(set)));
        set.is_none_or(|set| set[usize::from(site)])
    }
}

/// Why needs were refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NeedsError {
    /// One value per site, or per group.
    #[error("{given} values of {what}: give {right}")]
    Len {
        /// `capacity`, `domain`, `standby` or `wanted`.
        what: &'static str,
        /// How many were given.
        given: usize,
        /// How many there are sites, or groups.
        right: usize,
    },
    /// Negative or not a number.
    #[error("site {site}: {capacity} is no capacity")]
    Capacity {
        /// Index of the site.
        site: usize,
        /// What was given.
        capacity: f64,
    },
}

/// A group without a standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unprotected {
    /// The group.
    pub group: u32,
    /// The domain where it is, whose loss leaves it no room.
    pub domain: u8,
}

/// What the loss of one domain brings.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// The domain.
    pub domain: u8,
    /// Groups there that need a standby.
    pub groups: usize,
    /// Their weight.
    pub weight: f64,
    /// Those of them that have none.
    pub unprotected: usize,
    /// The weight of these.
    pub unprotected_weight: f64,
    /// What the others cost at their standby sites, in weight x ms, without charges.
    pub cost: f64,
    /// The site that is fullest afterwards, in which resource, and its load as a share of its capacity, among sites that
    /// something comes to.
    pub fullest: Option<(u8, Resource, f64)>,
}

/// Standby sites, and what they leave open.
#[derive(Clone, Debug, PartialEq)]
pub struct Standbys {
    /// By group; `None` for those that need none, have none, or are nowhere themselves.
    pub sites: Vec<Option<u8>>,
    /// Groups that need one and have none, by domain, then by index. No single site has room for any of them.
    pub unprotected: Vec<Unprotected>,
    /// One for each domain that has a site, in order.
    pub losses: Vec<Loss>,
}

impl Standbys {
    /// The weight of the unprotected groups.
    #[must_use]
    pub fn unprotected_weight(&self) -> f64 {
        self.losses.iter().map(|loss| loss.unprotected_weight).sum()
    }
}

impl Needs<'_> {
    fn check(&self, instance: &Instance) -> Result<(), NeedsError> {
        let lens = [
            ("capacity", self.capacity.len(), instance.sites()),
            ("domain", self.domain.len(), instance.sites()),
            ("standby", self.standby.len(), instance.groups()),
            ("wanted", self.wanted.len(), instance.groups()),
        ];
        if let Some(&(what, given, right)) = lens.iter().find(|(_, given, right)| given != right) {
            return Err(NeedsError::Len { what, given, right });
        }
        for (site, capacities) in self.capacity.iter().enumerate() {
            if let Some(&capacity) = capacities.iter().find(|capacity| capacity.is_nan() || **capacity < 0.0)
            {
                return Err(NeedsError::Capacity { site, capacity });
            }
        }
        Ok(())
    }
}

/// Finds a standby for each group that needs one: an open candidate in another domain than where the group is placed, such
/// that for every domain that may be lost, each site that remains carries its load and what comes from there within its
/// capacity, in all resources. The limits of classes are not asked: after a loss, room counts.
///
/// # Errors
/// When the needs do not fit the instance.
pub fn standbys(solver: &Solver, needs: &Needs<'_>) -> Result<Standbys, NeedsError> {
    needs.check(&solver.instance)?;
    let mut of_domain: Vec<Vec<u32>> = vec![Vec::new(); SITES_MAX];
    for group in (0..solver.instance.groups()).filter(|&group| needs.wanted[group]) {
        if let Some(site) = solver.site(group) {
            of_domain[usize::from(needs.domain[usize::from(site)])].push(group as u32);
        }
    }
    let mut result =
        Standbys { sites: vec![None; solver.instance.groups()], unprotected: Vec::new(), losses: Vec::new() };
    let mut work = 0;
    for (domain, groups) in (0..=u8::MAX).zip(of_domain) {
        if needs.domain.contains(&domain) {
            let mut lost = Lost::new(solver, needs, domain, groups);
            lost.assign(&mut work);
            lost.report(&mut result);
        }
    }
    Ok(result)
}

/// The groups of one domain and the room elsewhere.
struct Lost<'a> {
    solver: &'a Solver,
    needs: &'a Needs<'a>,
    domain: u8,
    groups: Vec<u32>,
    /// The same groups, with indices of their own; the sites of the domain are closed.
    instance: Instance,
    assignment: Assignment,
}

impl<'a> Lost<'a> {
    fn new(solver: &'a Solver, needs: &'a Needs<'a>, domain: u8, groups: Vec<u32>) -> Self {
        let whole = &solver.instance;
        let left = |site: usize, r: usize| needs.capacity[site][r] - solver.assignment.load[site][r];
        let left = |site: usize| std::array::from_fn(|r| left(site, r).max(0.0));
        // The groups were checked when they were added to the whole instance.
        let mut instance = Instance::with_rooms((0..whole.sites()).map(left).collect());
        for site in 0..whole.sites() as u8 {
            let remains = whole.is_open(site) && needs.domain[usize::from(site)] != domain;
            instance.set_open(site, remains);
        }
        let mut candidates: Vec<Candidate> = Vec::new();
        for &group in &groups {
            let group = group as usize;
            candidates.clear();
            let may = |there: &Candidate| needs.among.is_none_or(|among| among.allows(group, there.site));
            let beside = needs.beside.and_then(|beside| beside.get(&(group as u32)));
            let all = whole.candidates(group).chain(beside.into_iter().flatten().copied());
            candidates.extend(all.filter(may).take(CANDIDATES_MAX));
            let possible = |site: &u8| {
                candidates.iter().any(|one| one.site == *site) && instance.open[usize::from(*site)]
            };
            let weight = whole.weight[group];
            instance.push_checked(&Group {
                weight,
                demand: whole.demand[group],
                present: needs.standby[group].filter(possible),
                charge: (weight * KEEP_MS + 1.0).min(f32::MAX),
                left_out_ms: f32::INFINITY,
                class: None,
                candidates: &candidates,
            });
        }
        let assignment = Assignment::empty(&instance);
        Self { solver, needs, domain, groups, instance, assignment }
    }

    fn assign(&mut self, work: &mut usize) {
        let instance = &self.instance;
        let units = Units::of(instance);
        let table = PriceTable::free(units, instance);
        self.assignment.all_cheapest(instance, &table);
        let mut search = Search::new(*work, WORK_MAX);
        self.assignment.repair_in(instance, &table, &mut search);
        self.drop_excess();
        self.add();
        self.squeeze(&mut search);
        *work = search.work;
        self.assignment.fill(&self.instance);
        self.add();
    }

    /// Sites that still have too much lose groups: those that have no standby to keep first, then those that weigh least for the
    /// room that they take.
    fn drop_excess(&mut self) {
        let members = self.assignment.members(&self.instance);
        for (site, members) in members.iter().enumerate() {
            if !self.assignment.exceeded(&self.instance, site) {
                continue;
            }
            let mut order = [Vec::new(), Vec::new()];
            for &group in members {
                let relief = self.assignment.relief(&self.instance, site as u8, group as usize);
                let kept = self.instance.present(group as usize).is_some();
                if relief > 0.0 {
                    order[usize::from(kept)].push((self.instance.weight[group as usize] / relief, group));
                }
            }
            for (_, group) in order.iter_mut().flat_map(|list| in_order_of_first(list)) {
                if self.assignment.relief(&self.instance, site as u8, group as usize) > 0.0 {
                    self.assignment.shift(&self.instance, group as usize, NOWHERE);
                }
            }
        }
    }

    /// Groups that are nowhere, the heaviest first.
    fn missing(&self) -> Vec<usize> {
        let missing = (0..self.groups.len()).filter(|&group| self.assignment.choice[group] == NOWHERE);
        let mut missing: Vec<usize> = missing.collect();
        let weight = |group: usize| self.instance.weight[group];
        missing.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        missing
    }

    /// Groups that are nowhere go where there is room, the cheapest of those.
    fn add(&mut self) {
        for group in self.missing() {
            let instance = &self.instance;
            let (sites, _) = instance.row(group);
            let fits = |&choice: &usize| self.assignment.fits_alone(instance, sites[choice], group);
            let cost = |choice: usize| instance.cost(group, choice);
            let best = (0..sites.len()).filter(fits).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
            if let Some(choice) = best {
                self.assignment.shift(instance, group, choice as u8);
            }
        }
    }

    /// Groups that are nowhere are put where there is no room, if others then make room.
    fn squeeze(&mut self, search: &mut Search) {
        // Who is where has changed since the search began.
        search.members.clear();
        search.know(&self.assignment, &self.instance);
        for group in self.missing() {
            let instance = &self.instance;
            for (choice, &site) in instance.row(group).0.iter().enumerate() {
                if !instance.open[usize::from(site)] || !search.may_try() {
                    continue;
                }
                let mark = search.journal.len();
                self.assignment.shift_in(instance, search, group, choice as u8);
                for _ in 0..CHAINS_PER_GROUP {
                    if !self.assignment.exceeded(instance, site.into())
                        || !self.assignment.chain(instance, search, site.into())
                    {
                        break;
                    }
                }
                if !self.assignment.exceeded(instance, site.into()) {
                    break;
                }
                self.assignment.take_back(instance, search, mark);
            }
        }
    }

    fn report(self, result: &mut Standbys) {
        let weight = |group: usize| f64::from(self.instance.weight[group]);
        let mut loss = Loss {
            domain: self.domain,
            groups: self.groups.len(),
            weight: (0..self.groups.len()).map(weight).sum(),
            unprotected: 0,
            unprotected_weight: 0.0,
            cost: 0.0,
            fullest: None,
        };
        for (own, &group) in self.groups.iter().enumerate() {
            let choice = self.assignment.choice[own];
            if choice == NOWHERE {
                loss.unprotected += 1;
                loss.unprotected_weight += weight(own);
                result.unprotected.push(Unprotected { group, domain: self.domain });
            } else {
                loss.cost += weight(own) * f64::from(self.instance.row(own).1[usize::from(choice)]);
                result.sites[group as usize] = self.assignment.site(&self.instance, own);
            }
        }
        for (site, comes) in self.assignment.load.iter().enumerate() {
            for resource in Resource::ALL {
                let r = resource as usize;
                let capacity = self.needs.capacity[site][r];
                let fill = (self.solver.assignment.load[site][r] + comes[r]) / capacity;
                if comes[r] > 0.0 && loss.fullest.is_none_or(|(_, _, most)| fill > most) {
                    loss.fullest = Some((site as u8, resource, fill));
                }
            }
        }
        result.losses.push(loss);
    }
}

fn in_order_of_first(list: &mut [(f32, u32)]) -> impl Iterator<Item = (f32, u32)> + '_ {
    list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    list.iter().copied()
}

impl Solver {
    /// One round whose placement also leaves room for the loss of any one domain, as far as it can: where groups are without a
    /// standby, sites get less room and the round is done again, up to four times, and the best is kept: within the rooms
    /// first, then with the least weight unprotected, then the cheapest. What costs too much for what it protects is the caller's to
    /// say.
    ///
    /// Cost and bound are those of the instance as it is, so the gap also counts what the room for a loss costs; prices are
    /// those of the first solve.
    ///
    /// # Errors
    /// When the needs do not fit the instance; nothing was solved then.
    pub fn solve_to_survive(
        &mut self,
        start: Start,
        needs: &Needs<'_>,
    ) -> Result<(Certificate, Standbys), NeedsError> {
        needs.check(&self.instance)?;
        let mut best_certificate = self.solve(start);
        let mut best = standbys(self, needs)?;
        let (prices, class_prices) = (self.prices.clone(), self.class_prices.clone());
        let room = self.instance.room.clone();
        let mut kept = self.assignment.clone();
        let mut narrowed = None;
        // Rooms that leave groups unprotected, and rooms that are too little, or less than is needed.
        let mut wide = room.clone();
        let mut narrow: Option<Vec<PerResource<f64>>> = None;
        let mut last = best.clone();
        for _ in 0..ROUNDS {
            let tried = match &narrow {
                _ if best.unprotected.is_empty() && narrow.is_none() => break,
                Some(narrow) => between(&wide, narrow),
                None => self.lower(&wide, &last, needs),
            };
            self.instance.room.clone_from(&tried);
            let passes = self.solve(Start::Warm).passes;
            self.instance.room.clone_from(&room);
            best_certificate.passes += passes;
            let Certificate { priced, bound, passes, .. } = best_certificate;
            let certificate = self.certify_by(Bounds { priced, alone: bound }, passes);
            let found = standbys(self, needs)?;
            let breaks = broken(&certificate) > broken(&best_certificate);
            if breaks || found.unprotected.is_empty() {
                narrow = Some(tried.clone());
            } else {
                wide.clone_from(&tried);
                last = found.clone();
            }
            if is_better((&certificate, &found), (&best_certificate, &best)) {
                (best_certificate, best) = (certificate, found);
                kept = self.assignment.clone();
                narrowed = Some(tried);
            } else {
                best_certificate.passes = certificate.passes;
            }
        }
        (self.prices, self.class_prices, self.assignment) = (prices, class_prices, kept);
        self.narrow = narrowed;
        Ok((best_certificate, best))
    }

    /// Less room where unprotected groups could come to, and where they are: half of what is missing each.
    fn lower(
        &self,
        rooms: &[PerResource<f64>],
        standbys: &Standbys,
        needs: &Needs<'_>,
    ) -> Vec<PerResource<f64>> {
        let mut lowered = rooms.to_vec();
        let instance = &self.instance;
        // What is missing at each site; the losses of different domains do not add up.
        let mut missing = vec![[0.0_f64; RESOURCES]; instance.sites()];
        for unprotected in standbys.unprotected.chunk_by(|a, b| a.domain == b.domain) {
            let domain = unprotected[0].domain;
            let mut of_domain = vec![[0.0_f64; RESOURCES]; instance.sites()];
            for &Unprotected { group, .. } in unprotected {
                let group = group as usize;
                let sites = instance.row(group).0;
                let remains =
                    |site: &&u8| instance.is_open(**site) && needs.domain[usize::from(**site)] != domain;
                let elsewhere = sites.iter().filter(remains).count().max(1) as f64;
                for &site in sites.iter().filter(remains) {
                    let demand = instance.demand[group];
                    let slot = &mut of_domain[usize::from(site)];
                    (0..RESOURCES).for_each(|r| slot[r] += f64::from(demand[r]) / elsewhere);
                }
                if let Some(site) = self.site(group) {
                    let slot = &mut of_domain[usize::from(site)];
                    (0..RESOURCES).for_each(|r| slot[r] += f64::from(instance.demand[group][r]));
                }
            }
            for (all, one) in missing.iter_mut().zip(&of_domain) {
                (0..RESOURCES).for_each(|r| all[r] = all[r].max(one[r]));
            }
        }
        for (site, missing) in missing.iter().enumerate() {
            for r in (0..RESOURCES).filter(|&r| missing[r] > 0.0) {
                let now = self.assignment.load[site][r].min(lowered[site][r]);
                lowered[site][r] = (now - 0.5 * missing[r]).max(0.0);
            }
        }
        lowered
    }
}

/// Rooms halfway between two.
fn between(a: &[PerResource<f64>], b: &[PerResource<f64>]) -> Vec<PerResource<f64>> {
    let one =
        |(a, b): (&PerResource<f64>, &PerResource<f64>)| std::array::from_fn(|r| f64::midpoint(a[r], b[r]));
    a.iter().zip(b).map(one).collect()
}

/// In how many places a placement breaks rooms or limits.
fn broken(certificate: &Certificate) -> usize {
    certificate.exceeded.len() + certificate.crowded.len()
}

/// Whether one round is better than another.
fn is_better(one: (&Certificate, &Standbys), other: (&Certificate, &Standbys)) -> bool {
    if broken(one.0) != broken(other.0) {
        return broken(one.0) < broken(other.0);
    }
    let weight = |standbys: &Standbys| standbys.unprotected_weight();
    let less = |a: f64, b: f64| a < b * (1.0 - SLACK);
    if less(weight(one.1), weight(other.1)) || less(weight(other.1), weight(one.1)) {
        return weight(one.1) < weight(other.1);
    }
    one.0.cost < other.0.cost
}
