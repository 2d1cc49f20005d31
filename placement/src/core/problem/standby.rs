//! Who is to have a standby, and where it may be.

use std::collections::BTreeMap;

use super::frame::Table;
use crate::core::model::Group;
use crate::core::policy::Policy;
use crate::core::rules::{Effect, SiteSet};
use crate::solver::{self, SITES_MAX};

/// Which groups are to have a standby, by index.
#[derive(Default)]
pub(in crate::core) struct Standby {
    pub(in crate::core) wanted: Vec<bool>,
    /// By a rule, which makes it known to all; else only room is kept.
    pub(in crate::core) named: Vec<bool>,
    pub(in crate::core) present: Vec<Option<u8>>,
    /// Number of the set of sites that it may be at; [`u8::MAX`] for all.
    pub(in crate::core) among: Vec<u8>,
    pub(in crate::core) sets: Vec<[bool; SITES_MAX]>,
    /// Sites for the standbys of groups that stay where they are for now, and so have no other candidates.
    pub(in crate::core) beside: BTreeMap<u32, Vec<solver::Candidate>>,
}

impl Standby {
    /// Whether the rule lets the standby of a group be there.
    pub(in crate::core) fn may_be_at(&self, group: usize, site: u8) -> bool {
        let set = self.sets.get(usize::from(self.among[group]));
        set.is_none_or(|set| set[usize::from(site)])
    }

    pub(super) fn add(&mut self, policy: &Policy, effect: &Effect, table: &Table, group: &Group) {
        let set = effect.standby.filter(|set| *set != SiteSet::ALL).map(|set| {
            let mut sites = [false; SITES_MAX];
            table.sites.iter().zip(0..).for_each(|(site, n): (_, usize)| sites[n] = set.contains(site.id));
            sites
        });
        let among = set.map_or(usize::from(u8::MAX), |set| {
            // Sets are those of rules; a rule beyond the number that fits stands for all sites.
            let known = self.sets.iter().position(|known| *known == set);
            known.unwrap_or_else(|| {
                self.sets.push(set);
                self.sets.len() - 1
            })
        });
        self.among.push(u8::try_from(among).unwrap_or(u8::MAX));
        self.named.push(effect.standby.is_some());
        self.wanted.push(policy.survive_loss || effect.standby.is_some());
        self.present.push(group.standby.and_then(|site| table.index[usize::from(site.0)]));
    }
}
