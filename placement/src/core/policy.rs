//! What the operator wants of the solver.

use flow::{GroupId, Prefix, ServiceId, SiteId};
use serde::{Deserialize, Serialize};

/// Rules that may be given in one policy.
pub const RULES_LEN_MAX: usize = 4096;

/// Longest lead of a flip, in milliseconds.
pub(super) const FLIP_LEAD_MS_MAX: u32 = 5_000;

/// What the operator wants of the solver. [`Policy::validate`] checks the numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whether the solver starts moves by itself. Drains go on without it.
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
    /// Groups that must be at a site; the longest prefix wins.
    pub pins: Vec<Rule>,
    /// Groups that must not be at a site.
    pub denies: Vec<Rule>,
}

/// Groups and a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Groups of this service.
    pub service: ServiceId,
    /// Groups inside this prefix.
    pub clients: Prefix,
    /// The site.
    pub site: SiteId,
}

impl Rule {
    /// Whether it speaks of the group.
    #[must_use]
    pub fn covers(&self, group: &GroupId) -> bool {
        self.service == group.service && self.clients.covers(&group.prefix)
    }
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
            pins: Vec::new(),
            denies: Vec::new(),
        }
    }
}

/// Why a policy makes no sense. Each message names the value and what would be right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum PolicyError {
    /// Negative or not a number.
    #[error("min_gain_ms is {0}: give 0 to 1000")]
    MinGain(String),
    /// Out of range.
    #[error("headroom is {0}: give 0 to 0.9")]
    Headroom(String),
    /// Out of range.
    #[error("moves_in_flight_max is {0}: give 1 to 4096")]
    MovesInFlight(u32),
    /// Out of range.
    #[error("min_dwell_s is {0}: give at most 86400")]
    MinDwell(u32),
    /// Out of range.
    #[error("flip_lead_ms is {0}: give at most {FLIP_LEAD_MS_MAX}")]
    FlipLead(u32),
    /// Too many rules.
    #[error("{field} has {len} rules: give at most {RULES_LEN_MAX}")]
    TooManyRules {
        /// `pins` or `denies`.
        field: String,
        /// How many.
        len: usize,
    },
    /// Two pins of one prefix.
    #[error("pins: {service}:{clients} is pinned to sites {a} and {b}: give one")]
    TwoPins {
        /// The service.
        service: ServiceId,
        /// The prefix.
        clients: Prefix,
        /// One site.
        a: SiteId,
        /// The other.
        b: SiteId,
    },
}

impl Policy {
    /// Checks the numbers; whether the sites exist is the state machine's to check.
    ///
    /// # Errors
    /// One [`PolicyError`] per misdeed, the first that is found.
    pub fn validate(&self) -> Result<(), PolicyError> {
        if !(0.0..=1000.0).contains(&self.min_gain_ms) {
            return Err(PolicyError::MinGain(self.min_gain_ms.to_string()));
        }
        if !(0.0..=0.9).contains(&self.headroom) {
            return Err(PolicyError::Headroom(self.headroom.to_string()));
        }
        if !(1..=4096).contains(&self.moves_in_flight_max) {
            return Err(PolicyError::MovesInFlight(self.moves_in_flight_max));
        }
        if self.min_dwell_s > 86_400 {
            return Err(PolicyError::MinDwell(self.min_dwell_s));
        }
        if self.flip_lead_ms > FLIP_LEAD_MS_MAX {
            return Err(PolicyError::FlipLead(self.flip_lead_ms));
        }
        for (field, rules) in [("pins", &self.pins), ("denies", &self.denies)] {
            if rules.len() > RULES_LEN_MAX {
                return Err(PolicyError::TooManyRules { field: field.into(), len: rules.len() });
            }
        }
        self.check_pins()
    }

    fn check_pins(&self) -> Result<(), PolicyError> {
        let mut pins: Vec<&Rule> = self.pins.iter().collect();
        pins.sort_by_key(|pin| (pin.service, pin.clients));
        match pins.windows(2).find(|two| (two[0].service, two[0].clients) == (two[1].service, two[1].clients))
        {
            Some(two) => Err(PolicyError::TwoPins {
                service: two[0].service,
                clients: two[0].clients,
                a: two[0].site,
                b: two[1].site,
            }),
            None => Ok(()),
        }
    }

    /// The site that a group must be at.
    #[must_use]
    pub fn pin(&self, group: &GroupId) -> Option<SiteId> {
        let pins = self.pins.iter().filter(|pin| pin.covers(group));
        pins.max_by_key(|pin| pin.clients.len()).map(|pin| pin.site)
    }

    /// Whether a rule forbids a group to be at a site.
    #[must_use]
    pub fn forbids(&self, group: &GroupId, site: SiteId) -> bool {
        self.pin(group).is_some_and(|pin| pin != site) || self.denies(group, site)
    }

    /// Whether a group must not be at a site.
    #[must_use]
    pub fn denies(&self, group: &GroupId, site: SiteId) -> bool {
        self.denies.iter().any(|deny| deny.site == site && deny.covers(group))
    }
}
