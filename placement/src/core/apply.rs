//! The transitions of the replicated state.
//!
//! ```text
//! Stable(S,e) ── Preparing(S to D,e+1) ── Switching ── Stable(D,e+1)
//!                        └── Abort: Stable(S,e)   └── TakeBack: Stable(S,e+2)
//! ```
//!
//! Always true: one owner per group and epoch; an epoch never shrinks; at most one move per group. Work per
//! command is bounded by the groups it names, or makes; the removal of a site looks at all.

use std::collections::BTreeMap;

use flow::nat::NatSlices;
use flow::{Epoch, GroupId, MoveId, SiteId};

use super::apart::Apart;
use super::command::{
    Applied, Command, ENDPOINT_LEN_MAX, GROUPS_PER_SERVICE_MAX, MOVES_PER_COMMAND_MAX, NAME_LEN_MAX, Outcome,
    Proof, Proposal, Rejected, Started, clip,
};
use super::model::{
    AUDIT_LEN_MAX, Admin, AuditEntry, Change, Cluster, FINISHED_LEN_MAX, FinishedMove, Flip, Group, Move,
    MoveOutcome, MovePhase, MoveReason, MoveSummary, POLICIES_LEN_MAX, PolicyRevision, Round, Service, Site,
    SiteSpec, Timeouts, Trial, cut,
};
use super::policy::Policy;
use super::rules::Rules;
use super::spread;

/// How long a policy may be on trial, in milliseconds.
const CONFIRM_WITHIN_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;

/// One command on its way: where it stands in the log, and what it has changed.
pub(super) struct Step {
    pub(super) index: u64,
    pub(super) at_ms: u64,
    actor: String,
    pub(super) changes: Vec<Change>,
}

impl Cluster {
    /// Applies one log entry. The same entries give the same state at every node.
    pub fn apply(&mut self, index: u64, proposal: &Proposal) -> Applied {
        let mut step = Step {
            index,
            at_ms: proposal.at_ms,
            actor: clip(&proposal.actor).to_owned(),
            changes: Vec::new(),
        };
        let result = self.transition(&mut step, &proposal.command);
        if !step.changes.is_empty() {
            self.revision = index;
        }
        if !step.changes.is_empty() || result.is_err() {
            self.note(index, proposal, result.as_ref().err());
        }
        Applied { result, changes: step.changes }
    }

    fn transition(&mut self, step: &mut Step, command: &Command) -> Result<Outcome, Rejected> {
        match command {
            Command::PutSite(spec) => self.put_site(step, spec)?,
            Command::RemoveSite { site } => self.remove_site(step, *site)?,
            Command::SetAdmin { site, admin } => self.change_site(step, *site, |site| site.admin = *admin)?,
            Command::SetAlive { site, alive } => self.change_site(step, *site, |site| site.alive = *alive)?,
            Command::PutService { service, owner } => self.put_service(step, service, *owner)?,
            Command::PutPolicy { policy, expected_version, confirm_within_ms } => {
                self.put_policy(step, policy, *expected_version, *confirm_within_ms)?
            }
            Command::ConfirmPolicy { version } => self.confirm_policy(step, *version)?,
            Command::RevertPolicy { version } => self.revert_policy(step, *version)?,
            Command::EndRules { version, rules } => self.end_rules(step, *version, rules),
            Command::StartMoves { moves, reason } => return self.start_moves(step, moves, *reason),
            Command::Switch { move_id, by } => self.switch(step, *move_id, *by)?,
            Command::Served { move_id, by, summary } => self.served(step, *move_id, *by, *summary)?,
            Command::Abort { move_id, by, reason } => self.abort(step, *move_id, *by, reason)?,
            Command::TakeBack { move_id, by, proof } => self.take_back(step, *move_id, *by, *proof)?,
            Command::TakeOver { move_id } => self.take_over(step, *move_id)?,
            Command::Reassign { groups } => self.reassign(step, groups)?,
            Command::SetStandbys { standbys } => self.set_standbys(step, standbys)?,
            Command::SplitGroup { group } => self.split_group(step, *group)?,
            Command::MergeGroups { group } => self.merge_groups(step, *group)?,
            Command::Publish(round) => self.publish(round),
        }
        Ok(Outcome::Done)
    }

    fn note(&mut self, index: u64, proposal: &Proposal, refused: Option<&Rejected>) {
        self.audit.push_back(AuditEntry {
            index,
            at_ms: proposal.at_ms,
            actor: clip(&proposal.actor).to_owned(),
            action: proposal.command.summary(),
            refused: refused.map(ToString::to_string),
        });
        while self.audit.len() > AUDIT_LEN_MAX {
            self.audit.pop_front();
        }
    }

    // Configuration

    fn put_site(&mut self, step: &mut Step, spec: &SiteSpec) -> Result<(), Rejected> {
        check_len("name", &spec.name, NAME_LEN_MAX)?;
        check_len("endpoint", &spec.endpoint, ENDPOINT_LEN_MAX)?;
        if let Some(domain) = &spec.failure_domain {
            check_len("failure_domain", domain, NAME_LEN_MAX)?;
        }
        check_coordinates(spec)?;
        if let Some(other) = self.sites.values().find(|site| site.name == spec.name && site.id != spec.id) {
            return Err(Rejected::NameTaken { name: spec.name.clone(), by: format!("site {}", other.id) });
        }
        let present = self.sites.get(&spec.id);
        let site = Site {
            id: spec.id,
            name: spec.name.clone(),
            latitude: spec.latitude,
            longitude: spec.longitude,
            endpoint: spec.endpoint.clone(),
            capacity_pps: spec.capacity_pps,
            capacity_flows: spec.capacity_flows,
            capacity_bps: spec.capacity_bps,
            failure_domain: spec.failure_domain.clone(),
            admin: present.map_or(Admin::Active, |site| site.admin),
            alive: present.is_some_and(|site| site.alive),
        };
        self.set_site(step, site);
        Ok(())
    }

    /// Whether its agent still reports does not matter: somebody who has its key could, and must not keep it in.
    fn remove_site(&mut self, step: &mut Step, id: SiteId) -> Result<(), Rejected> {
        if !self.sites.contains_key(&id) {
            return Ok(());
        }
        self.check_unused(id)?;
        let standby: Vec<Group> =
            self.groups.values().filter(|group| group.standby == Some(id)).copied().collect();
        for group in standby {
            self.set_group(step, Group { standby: None, ..group });
        }
        self.sites.remove(&id);
        // Its number may be given to another site, which must not begin with this one's prices.
        if let Some(round) = &mut self.round {
            round.keep_sites(|site| site != id);
            round.spread_prices.clear();
        }
        step.changes.push(Change::SiteGone(id));
        Ok(())
    }

    /// Whether nothing leads to a site.
    fn check_unused(&self, site: SiteId) -> Result<(), Rejected> {
        let mut owned = self.groups.values().filter(|group| group.owner == site);
        if let Some(first) = owned.next() {
            return Err(Rejected::OwnsGroups { site, groups: 1 + owned.count(), first: first.id });
        }
        let part = |mv: &&Move| mv.from == site || mv.to == site || mv.ingresses.contains(&site);
        if let Some(mv) = self.moves.values().find(part) {
            return Err(Rejected::TakesPart { site, move_id: mv.id, group: mv.group });
        }
        let former = self.trial.as_ref().map(|trial| (&*trial.former, Some(trial.version)));
        for (policy, returns) in std::iter::once((&self.policy, None)).chain(former) {
            if let Some(rule) = policy.rules.iter().find(|rule| rule.kind.sites().contains(&site)) {
                return Err(Rejected::NamedByRule { site, rule: rule.name.clone(), returns });
            }
        }
        if self.sites.len() == 1 {
            return Err(Rejected::OnlySite { site });
        }
        Ok(())
    }

    /// The leader may not have known yet that a site is no more.
    fn publish(&mut self, round: &Round) {
        let mut round = round.clone();
        round.keep_sites(|site| self.sites.contains_key(&site));
        self.round = Some(round);
    }

    fn change_site(
        &mut self,
        step: &mut Step,
        id: SiteId,
        change: impl FnOnce(&mut Site),
    ) -> Result<(), Rejected> {
        let mut site = self.sites.get(&id).ok_or(Rejected::NoSite(id))?.clone();
        change(&mut site);
        self.set_site(step, site);
        Ok(())
    }

    fn set_site(&mut self, step: &mut Step, site: Site) {
        if self.sites.get(&site.id) != Some(&site) {
            step.changes.push(Change::Site(site.clone()));
            self.sites.insert(site.id, site);
        }
    }

    fn put_service(
        &mut self,
        step: &mut Step,
        service: &Service,
        owner: Option<SiteId>,
    ) -> Result<(), Rejected> {
        check_len("name", &service.name, NAME_LEN_MAX)?;
        check_timeouts(&service.timeouts)?;
        if let Some(other) = self.services.values().find(|s| s.name == service.name && s.id != service.id) {
            return Err(Rejected::NameTaken {
                name: service.name.clone(),
                by: format!("service {}", other.id),
            });
        }
        match self.services.get(&service.id) {
            Some(present) if present == service => return Ok(()),
            Some(present) => check_fixed(present, service)?,
            None => self.make_groups(step, service, owner)?,
        }
        // Watchers must know a service before they hear of its groups.
        step.changes.insert(0, Change::Service(service.clone()));
        self.services.insert(service.id, service.clone());
        Ok(())
    }

    fn make_groups(
        &mut self,
        step: &mut Step,
        service: &Service,
        owner: Option<SiteId>,
    ) -> Result<(), Rejected> {
        let slices = NatSlices::new(service.nat.clone())?;
        self.check_overlap(service)?;
        if !(8..=32).contains(&service.group_len) {
            return Err(Rejected::GroupLen { given: service.group_len });
        }
        let prefixes = cut(&slices.spec().clients, service.group_len, GROUPS_PER_SERVICE_MAX)
            .ok_or(Rejected::TooManyGroups { group_len: service.group_len, max: GROUPS_PER_SERVICE_MAX })?;
        let mut owners = self.first_owners(owner)?;
        for prefix in prefixes {
            let id = GroupId { service: service.id, prefix };
            let owner = self.lawful(&id, owners.next().ok_or(Rejected::NoActiveSite)?);
            let (epoch, changed) = (Epoch(1), step.index);
            self.set_group(step, Group { id, owner, epoch, move_id: None, changed, standby: None });
        }
        Ok(())
    }

    /// The site, or where a rule forbids it the first that none forbids; if all are forbidden the site none the less, since
    /// a group has to have an owner.
    fn lawful(&self, group: &GroupId, site: SiteId) -> SiteId {
        let active = self.sites.values().filter(|site| site.admin == Admin::Active).map(|site| site.id);
        let mut sites = std::iter::once(site).chain(active).chain(self.sites.keys().copied());
        sites.find(|&site| self.policy.forbidding(group, site).is_none()).unwrap_or(site)
    }

    fn check_overlap(&self, service: &Service) -> Result<(), Rejected> {
        let all = |nat: &flow::nat::NatSpec| nat.clients.iter().chain(&nat.pool).copied().collect::<Vec<_>>();
        let new = all(&service.nat);
        for other in self.services.values() {
            for present in all(&other.nat) {
                if let Some(&new) = new.iter().find(|new| new.overlaps(&present)) {
                    return Err(Rejected::Overlap { new, present, service: other.id });
                }
            }
        }
        Ok(())
    }

    /// First owners of new groups, without end: the given one, or all that may have groups, in turn, each as
    /// often as its share of the capacity. Sites that are alive come before those that never were.
    fn first_owners(&self, owner: Option<SiteId>) -> Result<impl Iterator<Item = SiteId> + use<>, Rejected> {
        let mut shares: Vec<(SiteId, u64)> = match owner {
            Some(id) if self.sites.contains_key(&id) => vec![(id, 1)],
            Some(id) => return Err(Rejected::NoSite(id)),
            None => {
                let active: Vec<&Site> = self.sites.values().filter(|s| s.admin == Admin::Active).collect();
                let any_alive = active.iter().any(|site| site.alive);
                let usable = active.iter().filter(|site| site.alive || !any_alive);
                usable.map(|site| (site.id, site.capacity_pps.max(1))).collect()
            }
        };
        if shares.is_empty() {
            return Err(Rejected::NoActiveSite);
        }
        shares.sort_unstable();
        let mut given = vec![0u64; shares.len()];
        Ok(std::iter::from_fn(move || {
            // The site that would have the least per unit of capacity after one more.
            let next = (0..shares.len()).min_by(|&a, &b| {
                let fill =
                    |n: usize| u128::from(given[n] + 1) * u128::from(shares[if n == a { b } else { a }].1);
                fill(a).cmp(&fill(b)).then(a.cmp(&b))
            })?;
            given[next] += 1;
            Some(shares[next].0)
        }))
    }

    fn put_policy(
        &mut self,
        step: &mut Step,
        policy: &Policy,
        expected: u64,
        confirm_within_ms: Option<u64>,
    ) -> Result<(), Rejected> {
        policy.validate()?;
        if let Some(given_ms) = confirm_within_ms.filter(|ms| !CONFIRM_WITHIN_MS.contains(ms)) {
            return Err(Rejected::ConfirmWithin { given_ms });
        }
        if *policy == self.policy && expected + 1 == self.policy_version {
            return Ok(());
        }
        if expected != self.policy_version {
            return Err(Rejected::PolicyVersion { expected, current: self.policy_version });
        }
        for rule in &policy.rules {
            if let Some(site) = rule.kind.sites().into_iter().find(|site| !self.sites.contains_key(site)) {
                return Err(Rejected::NoSite(site));
            }
            if let Some(service) = rule.scope.service.filter(|id| !self.services.contains_key(id)) {
                return Err(Rejected::NoService(service));
            }
        }
        Rules::new(policy).check(self)?;
        // What was on trial and is replaced does not return: the last that was not does.
        let former = self.trial.take().map_or_else(|| Box::new(self.policy.clone()), |trial| trial.former);
        self.set_policy(step, policy.clone());
        self.trial = confirm_within_ms.map(|ms| Trial {
            version: self.policy_version,
            until_ms: step.at_ms.saturating_add(ms),
            former,
        });
        Ok(())
    }

    fn set_policy(&mut self, step: &mut Step, policy: Policy) {
        self.policy_version += 1;
        self.policies.push_back(PolicyRevision {
            version: self.policy_version,
            policy: policy.clone(),
            actor: step.actor.clone(),
            at_ms: step.at_ms,
        });
        while self.policies.len() > POLICIES_LEN_MAX {
            self.policies.pop_front();
        }
        step.changes.push(Change::Policy { policy: policy.clone(), version: self.policy_version });
        self.policy = policy;
    }

    fn confirm_policy(&mut self, step: &mut Step, version: u64) -> Result<(), Rejected> {
        let present = self.trial.as_ref().map(|trial| trial.version);
        if present != Some(version) {
            // Said before, or never on trial: it stays either way.
            let stays = present.is_none() && version == self.policy_version;
            return if stays { Ok(()) } else { Err(Rejected::NotOnTrial { version, present }) };
        }
        self.trial = None;
        step.changes.push(Change::Policy { policy: self.policy.clone(), version });
        Ok(())
    }

    fn revert_policy(&mut self, step: &mut Step, version: u64) -> Result<(), Rejected> {
        let present = self.trial.as_ref().map(|trial| trial.version);
        let Some(trial) = self.trial.take_if(|trial| trial.version == version) else {
            return Err(Rejected::NotOnTrial { version, present });
        };
        self.set_policy(step, *trial.former);
        Ok(())
    }

    /// Rules leave the present policy, and that which would return; whether it is on trial does not change.
    fn end_rules(&mut self, step: &mut Step, version: u64, ended: &[String]) {
        let present = |rule: &super::policy::Rule| ended.contains(&rule.name);
        if version != self.policy_version || !self.policy.rules.iter().any(present) {
            return;
        }
        let mut policy = self.policy.clone();
        policy.rules.retain(|rule| !present(rule));
        self.set_policy(step, policy);
        if let Some(trial) = &mut self.trial {
            trial.version = self.policy_version;
        }
    }

    // Moves

    fn start_moves(
        &mut self,
        step: &mut Step,
        moves: &[(GroupId, SiteId)],
        reason: MoveReason,
    ) -> Result<Outcome, Rejected> {
        check_count("moves", moves.len())?;
        let mut planned: Vec<Move> = Vec::new();
        let mut started = Vec::with_capacity(moves.len());
        for &(group, to) in moves {
            let twin = planned.iter().find(|planned| planned.group == group);
            let move_id = match twin.or_else(|| self.move_of(&group)) {
                Some(present) if present.to == to => Some(present.id),
                Some(present) => return Err(Rejected::Moving { group, move_id: present.id, to: present.to }),
                None => match self.plan(step.index, planned.len(), group, to, reason)? {
                    Some(plan) => {
                        let id = plan.id;
                        planned.push(plan);
                        Some(id)
                    }
                    None => None,
                },
            };
            started.push(Started { group, move_id });
        }
        self.check_spread(&planned)?;
        self.check_apart(&planned)?;
        let max = self.policy.moves_in_flight_max;
        if !planned.is_empty() && self.moves.len() + planned.len() > max as usize {
            return Err(Rejected::Budget { in_flight: self.moves.len(), asked: planned.len(), max });
        }
        for plan in planned {
            self.begin(step, plan);
        }
        Ok(Outcome::Moves(started))
    }

    /// The n-th new move of a command; `None` when the group is there already.
    fn plan(
        &self,
        index: u64,
        n: usize,
        group: GroupId,
        to: SiteId,
        reason: MoveReason,
    ) -> Result<Option<Move>, Rejected> {
        let present = self.groups.get(&group).ok_or(Rejected::NoGroup(group))?;
        if present.owner == to {
            return Ok(None);
        }
        self.check_target(&group, to)?;
        let source = self.sites.get(&present.owner).ok_or(Rejected::NoSite(present.owner))?;
        if !source.alive {
            return Err(Rejected::SourceDead { group, site: source.id });
        }
        let service = self.services.get(&group.service).ok_or(Rejected::NoService(group.service))?;
        Ok(Some(Move {
            id: MoveId(index * MOVES_PER_COMMAND_MAX as u64 + n as u64),
            group,
            from: present.owner,
            to,
            epoch: present.epoch.next(),
            phase: MovePhase::Preparing,
            ordering: self.policy.ordering(&group).unwrap_or(service.ordering),
            ingresses: Vec::new(),
            flip: None,
            take_over: false,
            reason,
            started: index,
        }))
    }

    fn check_target(&self, group: &GroupId, to: SiteId) -> Result<(), Rejected> {
        let target = self.sites.get(&to).ok_or(Rejected::NoSite(to))?;
        if !target.takes_groups() {
            return Err(Rejected::TargetClosed { site: to, admin: target.admin, alive: target.alive });
        }
        if let Some(rule) = self.policy.forbidding(group, to) {
            return Err(Rejected::Forbidden { group: *group, site: to, rule: rule.name.clone() });
        }
        Ok(())
    }

    /// Whether places have room for all of these groups, when those that leave have left.
    fn check_spread(&self, planned: &[Move]) -> Result<(), Rejected> {
        let mut spreads = spread::spreadings(self);
        if spreads.is_empty() {
            return Ok(());
        }
        let index = spread::Index::new(&self.policy);
        let class: Vec<Option<usize>> = planned.iter().map(|plan| index.of(&plan.group, &spreads)).collect();
        for (plan, class) in planned.iter().zip(&class) {
            if let Some(class) = class {
                spreads[*class].shift(Some(plan.from), Some(plan.to));
            }
        }
        for (plan, class) in planned.iter().zip(&class) {
            let Some(spread) = class.map(|class| &spreads[class]) else { continue };
            if spread.is_over(plan.to) && spread.place(plan.from) != spread.place(plan.to) {
                let rule = self.policy.rules[usize::from(spread.rule)].name.clone();
                return Err(Rejected::Forbidden { group: plan.group, site: plan.to, rule });
            }
        }
        Ok(())
    }

    /// Whether groups that are kept apart are so when all of these have moved.
    fn check_apart(&self, planned: &[Move]) -> Result<(), Rejected> {
        let apart = Apart::new(&self.policy);
        if apart.is_empty() {
            return Ok(());
        }
        let going: BTreeMap<GroupId, SiteId> = planned.iter().map(|plan| (plan.group, plan.to)).collect();
        for (&group, &site) in &going {
            if let Some(rule) = apart.forbidding_with(self, &going, &group, site) {
                return Err(Rejected::Forbidden { group, site, rule: rule.name.clone() });
            }
        }
        Ok(())
    }

    fn set_standbys(
        &mut self,
        step: &mut Step,
        standbys: &[(GroupId, Option<SiteId>)],
    ) -> Result<(), Rejected> {
        check_count("standbys", standbys.len())?;
        let mut next = Vec::new();
        for &(id, standby) in standbys {
            let group = self.groups.get(&id).ok_or(Rejected::NoGroup(id))?;
            if let Some(site) = standby {
                let standby = self.sites.get(&site).ok_or(Rejected::NoSite(site))?;
                let owner = self.sites.get(&group.owner);
                if owner.is_some_and(|owner| owner.domain() == standby.domain()) {
                    return Err(Rejected::SameDomain { group: id, owner: group.owner, standby: site });
                }
            }
            if group.standby != standby {
                next.push(Group { standby, ..*group });
            }
        }
        for group in next {
            self.set_group(step, group);
        }
        Ok(())
    }

    /// A group that has come into the domain of its standby has none, until the leader finds another.
    fn without_near_standby(&self, mut group: Group) -> Group {
        let domain = |site: SiteId| self.sites.get(&site).map(Site::domain);
        if group.standby.is_some_and(|standby| domain(standby) == domain(group.owner)) {
            group.standby = None;
        }
        group
    }

    fn begin(&mut self, step: &mut Step, plan: Move) {
        step.changes.push(Change::Move(plan.clone()));
        if let Some(group) = self.groups.get(&plan.group).copied() {
            self.set_group(step, Group { move_id: Some(plan.id), ..group });
        }
        self.moves.insert(plan.id, plan);
    }

    fn switch(&mut self, step: &mut Step, id: MoveId, by: SiteId) -> Result<(), Rejected> {
        let Some(present) = self.moves.get(&id) else {
            // A move that was taken to its end, or back, had been switched.
            return self
                .ended_as(id, |outcome| *outcome == MoveOutcome::Done || *outcome == MoveOutcome::TakenBack);
        };
        check_party(present, by, present.from, "the source")?;
        if present.phase == MovePhase::Switching {
            return Ok(());
        }
        let mut next = present.clone();
        next.phase = MovePhase::Switching;
        let lead_ms = self.policy.flip_lead_ms;
        next.flip = Some(Flip { at_ms: step.at_ms.saturating_add(lead_ms.into()), lead_ms });
        next.ingresses = self.sites.values().filter(|site| site.alive).map(|site| site.id).collect();
        self.set_move(step, next);
        Ok(())
    }

    fn served(
        &mut self,
        step: &mut Step,
        id: MoveId,
        by: SiteId,
        summary: MoveSummary,
    ) -> Result<(), Rejected> {
        let Some(present) = self.moves.get(&id) else {
            return self.ended_as(id, |outcome| *outcome == MoveOutcome::Done);
        };
        check_party(present, by, present.to, "the target")?;
        check_switching(present, "it can be served only after Switching is committed")?;
        let (to, epoch) = (present.to, present.epoch);
        self.end(step, id, MoveOutcome::Done, Some(summary), |group| {
            (group.owner, group.epoch) = (to, epoch)
        });
        Ok(())
    }

    fn abort(
        &mut self,
        step: &mut Step,
        id: MoveId,
        by: Option<SiteId>,
        reason: &str,
    ) -> Result<(), Rejected> {
        let Some(present) = self.moves.get(&id) else {
            return self.ended_as(id, |outcome| matches!(outcome, MoveOutcome::Aborted { .. }));
        };
        if let Some(by) = by.filter(|&by| by != present.from && by != present.to) {
            return Err(Rejected::NotParty { move_id: id, by, right: parties(present) });
        }
        if present.phase == MovePhase::Switching {
            let right = "it can only be served, or taken back with proof".to_owned();
            return Err(Rejected::Phase { move_id: id, phase: present.phase, right });
        }
        self.end(step, id, MoveOutcome::Aborted { reason: clip(reason).to_owned() }, None, |_| {});
        Ok(())
    }

    fn take_back(&mut self, step: &mut Step, id: MoveId, by: SiteId, proof: Proof) -> Result<(), Rejected> {
        let Some(present) = self.moves.get(&id) else {
            return self.ended_as(id, |outcome| *outcome == MoveOutcome::TakenBack);
        };
        match proof {
            Proof::NeverGiven => check_party(present, by, present.from, "the source")?,
            Proof::Fenced => {
                check_party(present, by, present.from, "the source")?;
                if self.sites.get(&present.to).is_some_and(|site| site.alive) {
                    return Err(Rejected::TargetAlive { group: present.group, site: present.to });
                }
            }
            Proof::NeverAccepted if by == present.from || by == present.to => {}
            Proof::NeverAccepted => {
                return Err(Rejected::NotParty { move_id: id, by, right: parties(present) });
            }
        }
        check_switching(present, "abort it instead")?;
        if present.take_over && by != present.to && proof != Proof::Fenced {
            // The target may serve its shadow by now, whatever the source knows.
            return Err(Rejected::TakenOver { move_id: id, to: present.to });
        }
        let epoch = present.epoch.next();
        self.end(step, id, MoveOutcome::TakenBack, None, |group| group.epoch = epoch);
        Ok(())
    }

    fn take_over(&mut self, step: &mut Step, id: MoveId) -> Result<(), Rejected> {
        let Some(present) = self.moves.get(&id) else {
            return self.ended_as(id, |outcome| *outcome == MoveOutcome::Done);
        };
        if present.take_over {
            return Ok(());
        }
        check_switching(present, "abort it instead")?;
        if self.sites.get(&present.from).is_some_and(|site| site.alive) {
            return Err(Rejected::SourceAlive { group: present.group, site: present.from });
        }
        let next = Move { take_over: true, ..present.clone() };
        self.set_move(step, next);
        Ok(())
    }

    fn reassign(&mut self, step: &mut Step, groups: &[(GroupId, SiteId)]) -> Result<(), Rejected> {
        check_count("groups", groups.len())?;
        let mut wanted = BTreeMap::new();
        for &(group, to) in groups {
            if wanted.insert(group, to).is_some_and(|other| other != to) {
                return Err(Rejected::Twice { group });
            }
        }
        let mut next = Vec::with_capacity(wanted.len());
        for (id, to) in wanted {
            let group = self.groups.get(&id).ok_or(Rejected::NoGroup(id))?;
            if group.owner == to {
                continue;
            }
            if let Some(present) = self.move_of(&id) {
                return Err(Rejected::Moving { group: id, move_id: present.id, to: present.to });
            }
            if self.sites.get(&group.owner).is_some_and(|site| site.alive) {
                return Err(Rejected::SourceAlive { group: id, site: group.owner });
            }
            self.check_target(&id, to)?;
            if let Some(rule) = Apart::new(&self.policy).forbidding(self, &id, to) {
                return Err(Rejected::Forbidden { group: id, site: to, rule: rule.name.clone() });
            }
            let group = Group { owner: to, epoch: group.epoch.next(), changed: step.index, ..*group };
            next.push(self.without_near_standby(group));
        }
        for group in next {
            self.set_group(step, group);
        }
        Ok(())
    }

    /// The answer to a repeated command about a move that is over.
    fn ended_as(&self, id: MoveId, same: impl Fn(&MoveOutcome) -> bool) -> Result<(), Rejected> {
        let finished = self.finished(id).ok_or(Rejected::NoMove(id))?;
        if same(&finished.outcome) {
            return Ok(());
        }
        Err(Rejected::Ended { move_id: id, outcome: finished.outcome.clone() })
    }

    fn end(
        &mut self,
        step: &mut Step,
        id: MoveId,
        outcome: MoveOutcome,
        summary: Option<MoveSummary>,
        change: impl FnOnce(&mut Group),
    ) {
        let Some(last) = self.moves.remove(&id) else { return };
        if let Some(mut group) = self.groups.get(&last.group).copied() {
            let before = (group.owner, group.epoch);
            group.move_id = None;
            change(&mut group);
            if (group.owner, group.epoch) != before {
                group.changed = step.index;
            }
            let group = self.without_near_standby(group);
            self.set_group(step, group);
        }
        step.changes.push(Change::MoveEnded { id, group: last.group, outcome: outcome.clone() });
        self.finished.push_back(FinishedMove {
            last,
            outcome,
            summary,
            ended: step.index,
            at_ms: step.at_ms,
        });
        while self.finished.len() > FINISHED_LEN_MAX {
            self.finished.pop_front();
        }
    }

    pub(super) fn set_group(&mut self, step: &mut Step, group: Group) {
        step.changes.push(Change::Group(group));
        self.groups.insert(group.id, group);
    }

    fn set_move(&mut self, step: &mut Step, next: Move) {
        step.changes.push(Change::Move(next.clone()));
        self.moves.insert(next.id, next);
    }
}

fn parties(present: &Move) -> String {
    format!("sites {} and {}", present.from, present.to)
}

fn check_party(present: &Move, by: SiteId, right: SiteId, role: &str) -> Result<(), Rejected> {
    if by == right {
        return Ok(());
    }
    Err(Rejected::NotParty { move_id: present.id, by, right: format!("{role}, site {right}") })
}

fn check_switching(present: &Move, right: &str) -> Result<(), Rejected> {
    if present.phase == MovePhase::Switching {
        return Ok(());
    }
    Err(Rejected::Phase { move_id: present.id, phase: present.phase, right: right.to_owned() })
}

fn check_len(field: &str, text: &str, max: usize) -> Result<(), Rejected> {
    if (1..=max).contains(&text.len()) {
        return Ok(());
    }
    Err(Rejected::Length { field: field.to_owned(), len: text.len(), max })
}

fn check_count(field: &str, len: usize) -> Result<(), Rejected> {
    if (1..=MOVES_PER_COMMAND_MAX).contains(&len) {
        return Ok(());
    }
    Err(Rejected::Count { field: field.to_owned(), len, max: MOVES_PER_COMMAND_MAX })
}

fn check_coordinates(spec: &SiteSpec) -> Result<(), Rejected> {
    let one = |field: &str, value: Option<f64>, other: Option<f64>, max: f64| {
        let right =
            value.is_none_or(|value| (-max..=max).contains(&value)) && value.is_some() == other.is_some();
        if right {
            return Ok(());
        }
        let value = value.map_or_else(|| "missing".to_owned(), |value| value.to_string());
        Err(Rejected::Coordinate { field: field.to_owned(), value, right: format!("-{max} to {max}") })
    };
    one("latitude", spec.latitude, spec.longitude, 90.0)?;
    one("longitude", spec.longitude, spec.latitude, 180.0)
}

fn check_timeouts(timeouts: &Timeouts) -> Result<(), Rejected> {
    // Tests and labs may go below the standards' values, but nothing works below these.
    let all = [
        ("udp_s", timeouts.udp_s),
        ("tcp_established_s", timeouts.tcp_established_s),
        ("tcp_transitory_s", timeouts.tcp_transitory_s),
        ("icmp_s", timeouts.icmp_s),
    ];
    match all.iter().find(|(_, given)| *given == 0) {
        Some((field, given)) => Err(Rejected::Timeout { field: (*field).to_owned(), given: *given, min: 1 }),
        None => Ok(()),
    }
}

fn check_fixed(present: &Service, service: &Service) -> Result<(), Rejected> {
    let fixed = |field: &str| Err(Rejected::Fixed { service: service.id, field: field.to_owned() });
    if present.nat != service.nat {
        return fixed("nat");
    }
    if present.group_len != service.group_len {
        return fixed("group_len");
    }
    Ok(())
}
