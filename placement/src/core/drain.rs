//! What is left at a site that is being emptied, and what keeps it there. From the replicated state alone: any node can say.

use std::collections::BTreeMap;

use flow::SiteId;

use super::apart::Apart;
use super::model::{Admin, Cluster, Group, MoveOutcome, Site};
use super::policy::Kind;
use super::spread;

/// A drain in hand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Groups that are still there and have to leave.
    pub left: u64,
    /// Of these, on their way.
    pub moving: u64,
    /// Of the others, how many wait for what, most first.
    pub waits: Vec<Wait>,
}

/// What groups wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// What, and what would help.
    pub reason: String,
    /// How many groups.
    pub groups: u64,
    /// Whether they wait until an operator changes the policy: rules without an end forbid them every other site.
    pub forbidden: bool,
}

/// How far a drain of a site is; `None` when it is not drained, neither as a whole nor by a rule.
#[must_use]
pub fn progress(cluster: &Cluster, id: SiteId) -> Option<Progress> {
    let site = cluster.sites.get(&id)?;
    let rules = || {
        cluster
            .policy
            .rules
            .iter()
            .filter(|rule| matches!(&rule.kind, Kind::Drain(drain) if drain.site == id))
    };
    if site.admin != Admin::Draining && rules().next().is_none() {
        return None;
    }
    let leaves = |group: &&Group| {
        let by_rule = || rules().any(|rule| cluster.policy.covers(rule, &group.id));
        group.owner == id && (site.admin == Admin::Draining || by_rule())
    };
    let look = Look::new(cluster, site);
    let mut progress = Progress::default();
    let mut waits: BTreeMap<(String, bool), u64> = BTreeMap::new();
    for group in cluster.groups.values().filter(leaves) {
        progress.left += 1;
        if group.move_id.is_some() {
            progress.moving += 1;
        } else {
            *waits.entry((look.reason(group), look.is_forbidden(group))).or_insert(0) += 1;
        }
    }
    let wait = |((reason, forbidden), groups)| Wait { reason, groups, forbidden };
    progress.waits = waits.into_iter().map(wait).collect();
    progress.waits.sort_by(|a, b| b.groups.cmp(&a.groups).then_with(|| a.reason.cmp(&b.reason)));
    Some(progress)
}

struct Look<'a> {
    cluster: &'a Cluster,
    site: &'a Site,
    apart: Apart<'a>,
    spreads: Vec<spread::Spreading>,
    index: spread::Index<'a>,
    others: Vec<SiteId>,
}

impl<'a> Look<'a> {
    fn new(cluster: &'a Cluster, site: &'a Site) -> Self {
        let others = cluster.sites.values().filter(|other| other.id != site.id && other.takes_groups());
        Self {
            cluster,
            site,
            apart: Apart::new(&cluster.policy),
            spreads: spread::spreadings(cluster),
            index: spread::Index::new(&cluster.policy),
            others: others.map(|other| other.id).collect(),
        }
    }

    fn reason(&self, group: &Group) -> String {
        if !self.site.alive {
            return format!(
                "site {} is not alive, so its flows cannot be copied: bring it back, or give its groups away with `limosa \
                 site fail-over`",
                self.site.name
            );
        }
        if self.others.is_empty() {
            return "no other site is active and alive: activate or add one".to_owned();
        }
        let mut rules: Vec<String> = Vec::new();
        for &other in &self.others {
            let Some(rule) = self.rule_against(group, other) else { return self.waits(group) };
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
        let named: Vec<String> = rules.iter().map(|rule| format!("{rule:?}")).collect();
        format!("no other site may have them now, by {}: change the policy", named.join(", "))
    }

    /// Whether rules without an end forbid a group all other sites, also those that take none now.
    fn is_forbidden(&self, group: &Group) -> bool {
        let policy = &self.cluster.policy;
        let others = self.cluster.sites.keys().filter(|&&other| other != self.site.id);
        let for_good =
            |other: &SiteId| policy.forbidding(&group.id, *other).is_some_and(|rule| rule.until_ms.is_none());
        self.cluster.sites.len() > 1 && others.into_iter().all(for_good)
    }

    fn rule_against(&self, group: &Group, site: SiteId) -> Option<String> {
        let policy = &self.cluster.policy;
        let spread = || {
            let spread = &self.spreads[self.index.of(&group.id, &self.spreads)?];
            let stays = spread.place(group.owner) == spread.place(site);
            (!stays && !spread.has_room(site)).then(|| &policy.rules[usize::from(spread.rule)])
        };
        let apart = || self.apart.forbidding(self.cluster, &group.id, site);
        policy.forbidding(&group.id, site).or_else(apart).or_else(spread).map(|rule| rule.name.clone())
    }

    /// Nothing is against it.
    fn waits(&self, group: &Group) -> String {
        let last = self.cluster.finished.iter().rev().find(|finished| finished.last.group == group.id);
        if let Some(MoveOutcome::Aborted { reason }) = last.map(|finished| &finished.outcome) {
            return format!("their last move was given up, and is tried again: {reason}");
        }
        let max = self.cluster.policy.moves_in_flight_max;
        if self.cluster.moves.len() >= max as usize {
            return format!("{max} moves are in flight, the most that moves_in_flight_max lets");
        }
        "the leader's next round, or the rate of the drain".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::brain_tests::{cluster, group_id, rule};
    use super::super::{Command, MoveReason, Proposal};
    use super::*;

    fn apply(cluster: &mut Cluster, index: u64, command: Command) {
        cluster.apply(index, &Proposal { actor: "test".into(), at_ms: 0, command }).result.unwrap();
    }

    fn draining() -> Cluster {
        let mut cluster = cluster();
        apply(&mut cluster, 10, Command::SetAdmin { site: SiteId(0), admin: Admin::Draining });
        cluster
    }

    fn only(cluster: &Cluster) -> String {
        let progress = progress(cluster, SiteId(0)).unwrap();
        let [wait] = progress.waits.as_slice() else { panic!("{progress:?}") };
        assert_eq!(wait.groups, progress.left - progress.moving);
        wait.reason.clone()
    }

    #[test]
    fn a_site_that_is_not_drained_has_no_progress() {
        assert_eq!(progress(&cluster(), SiteId(0)), None);
        assert_eq!(progress(&draining(), SiteId(1)), None);
    }

    #[test]
    fn what_keeps_groups_at_a_drained_site_is_named() {
        let mut cluster = draining();
        assert_eq!(only(&cluster), "the leader's next round, or the rate of the drain");
        let far = rule("far", None, Kind::Deny([SiteId(2)].into()));
        let low = rule("low", Some("100.64.0.0/22"), Kind::Deny([SiteId(1)].into()));
        cluster.policy.rules = vec![far, low];
        assert_eq!(only(&cluster), "no other site may have them now, by \"low\", \"far\": change the policy");
        cluster.policy.rules.clear();
        for id in 1..3 {
            cluster.sites.get_mut(&SiteId(id)).unwrap().admin = Admin::Cordoned;
        }
        assert_eq!(only(&cluster), "no other site is active and alive: activate or add one");
        cluster.sites.get_mut(&SiteId(0)).unwrap().alive = false;
        assert!(only(&cluster).starts_with("site site-0 is not alive"));
    }

    #[test]
    fn groups_on_their_way_are_counted_and_a_move_that_was_given_up_is_told() {
        let mut cluster = draining();
        let moves = vec![(group_id(0), SiteId(1)), (group_id(1), SiteId(1))];
        apply(&mut cluster, 11, Command::StartMoves { moves, reason: MoveReason::Drain });
        let id = cluster.move_of(&group_id(0)).unwrap().id;
        apply(&mut cluster, 12, Command::Abort { move_id: id, by: None, reason: "no memory".into() });
        cluster.policy.moves_in_flight_max = 1;
        let progress = progress(&cluster, SiteId(0)).unwrap();
        assert_eq!((progress.left, progress.moving), (4, 1));
        assert_eq!(
            progress.waits.iter().map(|wait| (wait.reason.as_str(), wait.groups)).collect::<Vec<_>>(),
            [
                ("1 moves are in flight, the most that moves_in_flight_max lets", 2),
                ("their last move was given up, and is tried again: no memory", 1)
            ]
        );
        assert!(progress.waits.iter().all(|wait| !wait.forbidden));
    }

    #[test]
    fn groups_that_rules_without_an_end_keep_are_told_from_those_that_wait() {
        let mut cluster = draining();
        let forbidden =
            |cluster: &Cluster| progress(cluster, SiteId(0)).unwrap().waits.iter().all(|wait| wait.forbidden);
        cluster.policy.rules = vec![rule("home", None, Kind::Allow([SiteId(0)].into()))];
        assert!(forbidden(&cluster));
        cluster.policy.rules[0].until_ms = Some(5_000);
        assert!(!forbidden(&cluster), "that rule ends");
        // Another site may have them, though it takes none now.
        cluster.policy.rules = vec![rule("near", None, Kind::Allow([SiteId(0), SiteId(1)].into()))];
        cluster.sites.get_mut(&SiteId(1)).unwrap().admin = Admin::Cordoned;
        assert!(!forbidden(&cluster));
    }
}
