//! What the operator wants of the solver: settings, and rules with a scope.
//!
//! A rule speaks of the groups in its scope: all, those of a service, of a label, or within a client prefix. It has one kind.
//! Without a price it is hard, with one soft: what it asks for may be left undone where that costs more. Rules that restrict
//! (`allow`, `deny`, `dial`, `drain`, `separate`) and those that price (`prefer`, `cost`) add up over all scopes that cover a group; of
//! those that set a value (`pin`, `slo`, `charge`, `ordering`, `spread`, `standby`) the one with the most specific scope holds: all,
//! then service, then label, then client prefix, a longer one before a shorter.

use std::collections::{BTreeMap, BTreeSet};

use flow::{GroupId, Prefix, ServiceId, SiteId};
use serde::{Deserialize, Serialize};

use super::command::NAME_LEN_MAX;
use super::model::Ordering;

/// Rules of one policy.
pub const RULES_LEN_MAX: usize = 1024;
/// Prefixes of all labels of one policy.
pub const LABELS_LEN_MAX: usize = 4096;
/// Largest price, in milliseconds: more than any delay.
pub const PRICE_MS_MAX: f64 = 10_000.0;
/// What a delay above a hard target costs: no delay outweighs it, but where no site meets the target the nearest is still best.
pub const HARD_SLO_MS: f64 = 1_000.0;

/// Rules of kind `spread`: each is a price per site for the solver.
pub const SPREADS_LEN_MAX: usize = 32;
/// Rules of kind `separate`, and labels of one of them.
pub const SEPARATES_LEN_MAX: usize = 16;

/// Longest lead of a flip, in milliseconds.
pub(super) const FLIP_LEAD_MS_MAX: u32 = 5_000;

/// What the operator wants of the solver. [`Policy::validate`] checks it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whether the solver starts moves by itself. Drains, and groups that a rule sends away, go on without it.
    pub automatic: bool,
    /// Smallest gain of delay that is worth a move, in milliseconds.
    pub min_gain_ms: f64,
    /// Shortest stay of a group at a site, in seconds.
    pub min_dwell_s: u32,
    /// Moves at one time.
    pub moves_in_flight_max: u32,
    /// How long after the commit of a switch the ingresses flip, all at one time of the wall clock, in milliseconds. Long
    /// enough for every site to have heard, packets are held no longer than the distances want; 0 flips at once.
    pub flip_lead_ms: u32,
    /// Share of each site's capacity that is left free, 0 to 0.9.
    pub headroom: f64,
    /// Whether room is kept, the headroom included, for the groups of any one failure domain that may be lost.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub survive_loss: bool,
    /// When groups split and merge by themselves; never if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// After a move a group neither splits nor merges for so long, in milliseconds: above `moves.relay_ms` of every site, since an
    /// old owner may still relay for it.
    pub rest_after_move_ms: u32,
    /// Names for sets of client prefixes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Vec<Prefix>>,
    /// What holds for which groups.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            automatic: true,
            // Below this a user cannot tell, and estimates are no better.
            min_gain_ms: 5.0,
            // A group that has just moved has new measurements to gather first.
            min_dwell_s: 60,
            moves_in_flight_max: 32,
            // A commit, a heartbeat and the longest way between sites; what is too short costs a longer hold, never a packet.
            flip_lead_ms: 500,
            headroom: 0.2,
            // Who has two sites cannot, and more room is money.
            survive_loss: false,
            split: None,
            // Old owners relay for ten seconds if their site is not told otherwise; half as much again for clocks that differ.
            rest_after_move_ms: 15_000,
            labels: BTreeMap::new(),
            rules: Vec::new(),
        }
    }
}

/// When groups split and merge by themselves: by their share of what their site can carry, of whichever resource they take most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Split {
    /// A group above this share splits, 0 to 1.
    pub above: f64,
    /// Siblings that are below this share together merge; at most half of `above`.
    pub below: f64,
    /// How long it has to be above without interruption, in seconds.
    pub above_s: u32,
    /// How long they have to be below without interruption, in seconds.
    pub below_s: u32,
}

impl Default for Split {
    fn default() -> Self {
        // Twenty such groups fill a site: where they are larger, placement has too few choices.
        // A surge is over sooner than a lull is sure to last.
        Self { above: 0.05, below: 0.01, above_s: 30, below_s: 300 }
    }
}

/// What holds for which groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RuleDocument", into = "RuleDocument")]
pub struct Rule {
    /// Unique in its policy.
    pub name: String,
    /// Of which groups it speaks.
    pub scope: Scope,
    /// What it says.
    pub kind: Kind,
    /// Milliseconds that leaving it undone costs; a hard rule has none.
    pub price_ms: Option<f64>,
    /// Whom to ask.
    pub owner: Option<String>,
    /// When it ends, in milliseconds since 1970.
    pub until_ms: Option<u64>,
}

/// Groups. All that is given has to hold; nothing given means all groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Those of this service.
    pub service: Option<ServiceId>,
    /// Those whose prefix is within one of this label.
    pub label: Option<String>,
    /// Those whose prefix is within this one.
    pub clients: Option<Prefix>,
}

/// What a rule says.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Only these sites.
    Allow(BTreeSet<SiteId>),
    /// Not these sites.
    Deny(BTreeSet<SiteId>),
    /// This site.
    Pin(SiteId),
    /// Rather these sites; others cost the price.
    Prefer(BTreeSet<SiteId>),
    /// These sites cost the price.
    Cost(BTreeSet<SiteId>),
    /// At most a share of the groups may be at a site; which, is stable.
    Dial(Dial),
    /// Other capacities of a site.
    Capacity(Capacity),
    /// Groups leave a site.
    Drain(Drain),
    /// A delay that should not be exceeded.
    Slo(Slo),
    /// How many moves.
    Budget(Budget),
    /// What a move costs.
    Charge(Charge),
    /// Order of packets during moves.
    Ordering(Ordering),
    /// At most a share of the groups in one place.
    Spread(Spread),
    /// Groups of different labels of these are never in one failure domain.
    Separate(BTreeSet<String>),
    /// Groups have a standby in another failure domain than their owner, with room kept for it: one of these sites, any if
    /// empty.
    Standby(BTreeSet<SiteId>),
}

/// See [`Kind::Dial`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dial {
    /// The site.
    pub site: SiteId,
    /// Of the groups, 0 to 1.
    pub share: f64,
}

/// See [`Kind::Capacity`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// The site.
    pub site: SiteId,
    /// Packets per second, instead of what the site was added with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_s: Option<u64>,
    /// Flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u64>,
    /// Bits per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_s: Option<u64>,
    /// Share that is left free, instead of the policy's `headroom`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headroom: Option<f64>,
}

/// See [`Kind::Drain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The site.
    pub site: SiteId,
    /// At most so many groups leave it in a minute; as many as the policy's `moves_in_flight_max` lets if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moves_per_minute: Option<u32>,
    /// When it is to be empty, in milliseconds since 1970: until then groups leave evenly, as few at a time as that takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// See [`Kind::Spread`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Of the groups in the scope, above 0 and below 1; one group is always allowed.
    pub share: f64,
    /// What a place is.
    #[serde(default)]
    pub by: Place,
}

impl Spread {
    /// How many of so many groups may be in one place.
    #[must_use]
    pub fn limit(&self, groups: usize) -> usize {
        // A share of a third of nine groups is three, whatever the last digit of the product is.
        (((self.share * groups as f64) + 1e-9) as usize).max(1)
    }
}

/// What groups are spread over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Sites.
    #[default]
    Site,
    /// Failure domains.
    Domain,
}

/// Sites as a standby rule is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum StandbyDocument {
    Any(Any),
    Sites(BTreeSet<SiteId>),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Any {
    Any,
}

/// See [`Kind::Slo`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// One way, by the model, in milliseconds.
    pub delay_ms: f64,
}

/// See [`Kind::Budget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Moves for delay or load that may start in a minute.
    pub moves_per_minute: u32,
}

/// See [`Kind::Charge`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Charge {
    /// Of any move, in milliseconds of each packet; instead of the policy's `min_gain_ms`.
    pub ms: f64,
    /// More for each thousand flows, whose state has to be carried.
    #[serde(default)]
    pub per_kflow_ms: f64,
    /// The charge is for a group that is expected to live on for so many seconds. What has lasted long will last long: one with traffic for
    /// a shorter time is charged as many times more, at most [`SHORT_LIFE_MAX`] times. No difference is made if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life_s: Option<u32>,
}

/// How many times more a move of a short-lived group is charged, at most.
pub const SHORT_LIFE_MAX: f64 = 10.0;

impl Charge {
    /// Of a group with so many flows that has had traffic for so many seconds, in milliseconds of each of its packets.
    #[must_use]
    pub fn of(&self, flows: u64, age_s: f64) -> f64 {
        let short =
            self.life_s.map_or(1.0, |life_s| (f64::from(life_s) / age_s.max(1.0)).clamp(1.0, SHORT_LIFE_MAX));
        (self.ms + self.per_kflow_ms * flows as f64 / 1000.0) * short
    }
}

/// A rule as it is written: flat, with exactly one kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RuleDocument {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<ServiceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clients: Option<Prefix>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<BTreeSet<SiteId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deny: Option<BTreeSet<SiteId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pin: Option<SiteId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefer: Option<BTreeSet<SiteId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<BTreeSet<SiteId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dial: Option<Dial>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capacity: Option<Capacity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drain: Option<Drain>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slo: Option<Slo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Budget>,
    #[serde(skip_serializing_if = "Option::is_none")]
    charge: Option<Charge>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ordering: Option<Ordering>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spread: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    separate: Option<BTreeSet<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    standby: Option<StandbyDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    until_ms: Option<u64>,
}

/// The kinds, as errors name them.
const KINDS: &str = "allow, deny, pin, prefer, cost, dial, capacity, drain, slo, budget, charge, ordering, spread, \
    separate or standby";

impl TryFrom<RuleDocument> for Rule {
    type Error = String;

    fn try_from(document: RuleDocument) -> Result<Self, String> {
        let kinds = [
            document.allow.map(Kind::Allow),
            document.deny.map(Kind::Deny),
            document.pin.map(Kind::Pin),
            document.prefer.map(Kind::Prefer),
            document.cost.map(Kind::Cost),
            document.dial.map(Kind::Dial),
            document.capacity.map(Kind::Capacity),
            document.drain.map(Kind::Drain),
            document.slo.map(Kind::Slo),
            document.budget.map(Kind::Budget),
            document.charge.map(Kind::Charge),
            document.ordering.map(Kind::Ordering),
            document.spread.map(Kind::Spread),
            document.separate.map(Kind::Separate),
            document.standby.map(|standby| match standby {
                StandbyDocument::Any(Any::Any) => Kind::Standby(BTreeSet::new()),
                StandbyDocument::Sites(sites) => Kind::Standby(sites),
            }),
        ];
        let given: Vec<Kind> = kinds.into_iter().flatten().collect();
        let name = document.name;
        let [kind] = <[Kind; 1]>::try_from(given)
            .map_err(|given| format!("rule {name:?} has {} kinds: give one of {KINDS}", given.len()))?;
        let scope = Scope { service: document.service, label: document.label, clients: document.clients };
        let (price_ms, owner, until_ms) = (document.price_ms, document.owner, document.until_ms);
        Ok(Self { name, scope, kind, price_ms, owner, until_ms })
    }
}

impl From<Rule> for RuleDocument {
    fn from(rule: Rule) -> Self {
        let mut document = Self {
            name: rule.name,
            service: rule.scope.service,
            label: rule.scope.label,
            clients: rule.scope.clients,
            price_ms: rule.price_ms,
            owner: rule.owner,
            until_ms: rule.until_ms,
            ..Self::default()
        };
        match rule.kind {
            Kind::Allow(sites) => document.allow = Some(sites),
            Kind::Deny(sites) => document.deny = Some(sites),
            Kind::Pin(site) => document.pin = Some(site),
            Kind::Prefer(sites) => document.prefer = Some(sites),
            Kind::Cost(sites) => document.cost = Some(sites),
            Kind::Dial(dial) => document.dial = Some(dial),
            Kind::Capacity(capacity) => document.capacity = Some(capacity),
            Kind::Drain(drain) => document.drain = Some(drain),
            Kind::Slo(slo) => document.slo = Some(slo),
            Kind::Budget(budget) => document.budget = Some(budget),
            Kind::Charge(charge) => document.charge = Some(charge),
            Kind::Ordering(ordering) => document.ordering = Some(ordering),
            Kind::Spread(spread) => document.spread = Some(spread),
            Kind::Separate(labels) => document.separate = Some(labels),
            Kind::Standby(sites) if sites.is_empty() => {
                document.standby = Some(StandbyDocument::Any(Any::Any));
            }
            Kind::Standby(sites) => document.standby = Some(StandbyDocument::Sites(sites)),
        }
        document
    }
}

impl Kind {
    /// As it is written.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Allow(_) => "allow",
            Self::Deny(_) => "deny",
            Self::Pin(_) => "pin",
            Self::Prefer(_) => "prefer",
            Self::Cost(_) => "cost",
            Self::Dial(_) => "dial",
            Self::Capacity(_) => "capacity",
            Self::Drain(_) => "drain",
            Self::Slo(_) => "slo",
            Self::Budget(_) => "budget",
            Self::Charge(_) => "charge",
            Self::Ordering(_) => "ordering",
            Self::Spread(_) => "spread",
            Self::Separate(_) => "separate",
            Self::Standby(_) => "standby",
        }
    }

    /// The sites that it names.
    #[must_use]
    pub fn sites(&self) -> Vec<SiteId> {
        match self {
            Self::Allow(sites)
            | Self::Deny(sites)
            | Self::Prefer(sites)
            | Self::Cost(sites)
            | Self::Standby(sites) => sites.iter().copied().collect(),
            Self::Pin(site) => vec![*site],
            Self::Dial(dial) => vec![dial.site],
            Self::Capacity(capacity) => vec![capacity.site],
            Self::Drain(drain) => vec![drain.site],
            Self::Slo(_)
            | Self::Budget(_)
            | Self::Charge(_)
            | Self::Ordering(_)
            | Self::Spread(_)
            | Self::Separate(_) => Vec::new(),
        }
    }

    /// What of all rules with the same answer only one can hold for a group; `None` where rules add up.
    pub(super) fn sets(&self) -> Option<(&'static str, Option<SiteId>)> {
        match self {
            Self::Pin(_)
            | Self::Slo(_)
            | Self::Budget(_)
            | Self::Charge(_)
            | Self::Ordering(_)
            | Self::Spread(_)
            | Self::Standby(_) => Some((self.name(), None)),
            Self::Dial(dial) => Some((self.name(), Some(dial.site))),
            Self::Capacity(capacity) => Some((self.name(), Some(capacity.site))),
            Self::Allow(_)
            | Self::Deny(_)
            | Self::Prefer(_)
            | Self::Cost(_)
            | Self::Drain(_)
            | Self::Separate(_) => None,
        }
    }
}

impl Scope {
    /// How specific it is: what holds of rules that set a value is said by the greatest.
    pub(super) fn rank(&self) -> (bool, u8, bool, bool) {
        let len = self.clients.map_or(0, |clients| clients.len());
        (self.clients.is_some(), len, self.label.is_some(), self.service.is_some())
    }

    fn is_all(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a policy makes no sense. Each message names the value and what would be right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum PolicyError {
    /// Out of range.
    #[error("{field} is {given}: give {right}")]
    Setting {
        /// The key.
        field: String,
        /// What was given.
        given: String,
        /// The range.
        right: String,
    },
    /// Too many entries.
    #[error("{field} has {len} entries: give at most {max}")]
    TooMany {
        /// `rules` or `labels`.
        field: String,
        /// How many.
        len: usize,
        /// How many it may be.
        max: usize,
    },
    /// A rule that makes no sense by itself.
    #[error("rule {rule:?}: {reason}")]
    Rule {
        /// Its name.
        rule: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Rules that cannot all hold. There is no smaller set of them that cannot.
    #[error("rules {} cannot all hold for group {group}: {reason}", names(rules))]
    Contradiction {
        /// Their names.
        rules: Vec<String>,
        /// For whom.
        group: String,
        /// Why.
        reason: String,
    },
}

fn names(rules: &[String]) -> String {
    rules.iter().map(|rule| format!("{rule:?}")).collect::<Vec<_>>().join(" and ")
}

impl Split {
    fn validate(&self) -> Result<(), PolicyError> {
        let settings = [
            ("split.above", self.above, 1e-6, 1.0),
            // Halves of a group that was just above must not be cold together, or they would merge again.
            ("split.below", self.below, 0.0, self.above / 2.0),
            ("split.above_s", self.above_s.into(), 1.0, 86_400.0),
            ("split.below_s", self.below_s.into(), 1.0, 86_400.0),
        ];
        match settings.into_iter().find(|(_, given, least, most)| !(least..=most).contains(&given)) {
            Some((field, given, least, most)) => {
                let (field, given) = (field.to_owned(), given.to_string());
                Err(PolicyError::Setting { field, given, right: format!("{least} to {most}") })
            }
            None => Ok(()),
        }
    }
}

impl Policy {
    /// Checks what can be checked without sites and groups.
    ///
    /// # Errors
    /// One [`PolicyError`], the first that is found.
    pub fn validate(&self) -> Result<(), PolicyError> {
        let settings = [
            ("min_gain_ms", self.min_gain_ms, 0.0, 1000.0),
            ("headroom", self.headroom, 0.0, 0.9),
            ("moves_in_flight_max", self.moves_in_flight_max.into(), 1.0, 4096.0),
            ("min_dwell_s", self.min_dwell_s.into(), 0.0, 86_400.0),
            ("flip_lead_ms", self.flip_lead_ms.into(), 0.0, FLIP_LEAD_MS_MAX.into()),
            ("rest_after_move_ms", self.rest_after_move_ms.into(), 0.0, 600_000.0),
        ];
        for (field, given, least, most) in settings {
            if !(least..=most).contains(&given) {
                let (field, given) = (field.to_owned(), given.to_string());
                return Err(PolicyError::Setting { field, given, right: format!("{least} to {most}") });
            }
        }
        if let Some(split) = &self.split {
            split.validate()?;
        }
        let labelled = self.labels.values().map(Vec::len).sum();
        for (field, len, max) in
            [("rules", self.rules.len(), RULES_LEN_MAX), ("labels", labelled, LABELS_LEN_MAX)]
        {
            if len > max {
                return Err(PolicyError::TooMany { field: field.to_owned(), len, max });
            }
        }
        let of = |kind: &str| self.rules.iter().filter(|rule| rule.kind.name() == kind).count();
        for (kind, max) in [("spread", SPREADS_LEN_MAX), ("separate", SEPARATES_LEN_MAX)] {
            let len = of(kind);
            if len > max {
                return Err(PolicyError::TooMany { field: format!("rules of kind {kind}"), len, max });
            }
        }
        let mut seen = BTreeSet::new();
        for rule in &self.rules {
            let twice = (!seen.insert(&rule.name)).then(|| "its name is taken: names are unique".to_owned());
            if let Some(reason) = twice.or_else(|| self.misdeed(rule)) {
                return Err(PolicyError::Rule { rule: rule.name.clone(), reason });
            }
        }
        Ok(())
    }

    fn misdeed(&self, rule: &Rule) -> Option<String> {
        let kind = rule.kind.name();
        let within = |field: &str, value: f64, least: f64, most: f64| {
            let wrong = !(least..=most).contains(&value);
            wrong.then(|| format!("{field} is {value}: give {least} to {most}"))
        };
        if !(1..=NAME_LEN_MAX).contains(&rule.name.len()) {
            return Some(format!("name has {} bytes: give 1 to {NAME_LEN_MAX}", rule.name.len()));
        }
        if let Some(label) = rule.scope.label.as_ref().filter(|label| !self.labels.contains_key(*label)) {
            return Some(format!("label {label:?} is not among the labels: add it there"));
        }
        let (must, may) = match rule.kind {
            Kind::Prefer(_) | Kind::Cost(_) => (true, true),
            Kind::Allow(_) | Kind::Deny(_) | Kind::Pin(_) | Kind::Dial(_) | Kind::Slo(_) => (false, true),
            Kind::Capacity(_)
            | Kind::Drain(_)
            | Kind::Budget(_)
            | Kind::Charge(_)
            | Kind::Ordering(_)
            | Kind::Spread(_)
            | Kind::Separate(_)
            | Kind::Standby(_) => (false, false),
        };
        match rule.price_ms {
            None if must => return Some(format!("{kind} needs a price_ms: what it is worth")),
            Some(_) if !may => return Some(format!("{kind} takes no price_ms: leave it out")),
            Some(price) => {
                if let Some(wrong) = within("price_ms", price, 0.0, PRICE_MS_MAX) {
                    return Some(wrong);
                }
            }
            None => {}
        }
        let global = matches!(rule.kind, Kind::Capacity(_) | Kind::Budget(_) | Kind::Separate(_));
        if global && !rule.scope.is_all() {
            return Some(format!("{kind} holds for all groups: leave out service, label and clients"));
        }
        match &rule.kind {
            Kind::Allow(sites) | Kind::Deny(sites) | Kind::Prefer(sites) | Kind::Cost(sites) => {
                sites.is_empty().then(|| format!("{kind} has no sites: give at least one"))
            }
            Kind::Dial(dial) => within("share", dial.share, 0.0, 1.0),
            Kind::Slo(slo) => within("delay_ms", slo.delay_ms, 0.0, PRICE_MS_MAX),
            Kind::Charge(charge) => within("ms", charge.ms, 0.0, PRICE_MS_MAX)
                .or_else(|| within("per_kflow_ms", charge.per_kflow_ms, 0.0, PRICE_MS_MAX))
                .or_else(|| within("life_s", charge.life_s.unwrap_or(1).into(), 1.0, 86_400.0)),
            Kind::Capacity(capacity) => {
                capacity.headroom.and_then(|headroom| within("headroom", headroom, 0.0, 0.9))
            }
            Kind::Spread(spread) => {
                let right = spread.share > 0.0 && spread.share < 1.0;
                (!right).then(|| format!("share is {}: give above 0 and below 1", spread.share))
            }
            Kind::Separate(labels) => self.misfit(labels),
            Kind::Pin(_) | Kind::Drain(_) | Kind::Budget(_) | Kind::Ordering(_) | Kind::Standby(_) => None,
        }
    }

    /// Why groups of these labels cannot be kept apart, whatever the groups are.
    fn misfit(&self, labels: &BTreeSet<String>) -> Option<String> {
        if !(2..=SEPARATES_LEN_MAX).contains(&labels.len()) {
            return Some(format!("separate has {} labels: give 2 to {SEPARATES_LEN_MAX}", labels.len()));
        }
        if let Some(label) = labels.iter().find(|label| !self.labels.contains_key(*label)) {
            return Some(format!("label {label:?} is not among the labels: add it there"));
        }
        let all =
            labels.iter().flat_map(|label| self.labels[label].iter().map(move |prefix| (label, prefix)));
        let all: Vec<_> = all.collect();
        let both = |(n, (a, one)): (usize, &(&String, &Prefix))| {
            let other = all[n + 1..].iter().find(|(b, other)| a != b && one.overlaps(other));
            other.map(|(b, other)| {
                format!("{one} of label {a:?} and {other} of label {b:?} overlap: give each client one label")
            })
        };
        all.iter().enumerate().find_map(both)
    }

    /// Whether a rule speaks of a group.
    #[must_use]
    pub fn covers(&self, rule: &Rule, group: &GroupId) -> bool {
        let Scope { service, label, clients } = &rule.scope;
        let within = |prefixes: &[Prefix]| prefixes.iter().any(|prefix| prefix.covers(&group.prefix));
        service.is_none_or(|service| service == group.service)
            && clients.is_none_or(|clients| clients.covers(&group.prefix))
            && label.as_ref().is_none_or(|label| self.labels.get(label).is_some_and(|all| within(all)))
    }

    /// The hard rule by which a group must not be at a site, if there is one.
    #[must_use]
    pub fn forbidding(&self, group: &GroupId, site: SiteId) -> Option<&Rule> {
        let rules = || self.rules.iter().filter(|rule| self.covers(rule, group));
        let adds = rules().find(|rule| match &rule.kind {
            Kind::Allow(sites) => rule.price_ms.is_none() && !sites.contains(&site),
            Kind::Deny(sites) => rule.price_ms.is_none() && sites.contains(&site),
            Kind::Drain(drain) => drain.site == site,
            Kind::Pin(_)
            | Kind::Prefer(_)
            | Kind::Cost(_)
            | Kind::Dial(_)
            | Kind::Capacity(_)
            | Kind::Slo(_)
            | Kind::Budget(_)
            | Kind::Charge(_)
            | Kind::Ordering(_)
            | Kind::Spread(_)
            | Kind::Separate(_)
            | Kind::Standby(_) => false,
        });
        // Of equals the first, as everywhere.
        let most = |of: &dyn Fn(&Kind) -> bool| {
            rules().rev().filter(|rule| of(&rule.kind)).max_by_key(|rule| rule.scope.rank())
        };
        let pin = || most(&|kind| matches!(kind, Kind::Pin(_))).filter(|rule| rule.kind != Kind::Pin(site));
        let dial = || {
            let dial = most(&|kind| matches!(kind, Kind::Dial(dial) if dial.site == site))?;
            matches!(&dial.kind, Kind::Dial(Dial { share, .. }) if lot(group, site) >= *share).then_some(dial)
        };
        adds.or_else(|| pin().filter(|rule| rule.price_ms.is_none()))
            .or_else(|| dial().filter(|rule| rule.price_ms.is_none()))
    }

    /// The order of packets in moves of a group, if a rule sets it.
    #[must_use]
    pub fn ordering(&self, group: &GroupId) -> Option<Ordering> {
        let order = |rule: &Rule| {
            let Kind::Ordering(ordering) = rule.kind else { return None };
            Some((rule.scope.rank(), ordering))
        };
        let orders = self.rules.iter().rev().filter(|rule| self.covers(rule, group)).filter_map(order);
        orders.max_by_key(|(rank, _)| *rank).map(|(_, ordering)| ordering)
    }

    /// Without the rules that have ended by then; `None` when all go on. Also the names of those that ended.
    #[must_use]
    pub fn without_ended(&self, wall_ms: u64) -> Option<(Self, Vec<String>)> {
        let ended = |rule: &Rule| rule.until_ms.is_some_and(|until| until <= wall_ms);
        let names: Vec<String> =
            self.rules.iter().filter(|rule| ended(rule)).map(|rule| rule.name.clone()).collect();
        if names.is_empty() {
            return None;
        }
        let rules = self.rules.iter().filter(|rule| !ended(rule)).cloned().collect();
        Some((Self { rules, ..self.clone() }, names))
    }
}

/// A number from 0 to below 1 that is the same for a group and site everywhere and always, and spread evenly over groups: who
/// has less than the share of a dial may be there, so that turning it moves no more groups than it must.
#[must_use]
pub(super) fn lot(group: &GroupId, site: SiteId) -> f64 {
    // The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    let mix = |mut word: u64| {
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    };
    let bits = match group.prefix.address() {
        std::net::IpAddr::V4(address) => u128::from(address.to_bits()),
        std::net::IpAddr::V6(address) => address.to_bits(),
    };
    let words = [
        bits as u64,
        (bits >> 64) as u64,
        u64::from(group.prefix.len()),
        u64::from(u8::from(group.service)),
        site.0.into(),
    ];
    let word =
        words.into_iter().fold(0, |sum: u64, word| mix(sum.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ word));
    (word >> 11) as f64 / (1u64 << 53) as f64
}
