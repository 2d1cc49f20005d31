//! What the readiness of a site rests on that says nothing when it ceases: the last time of each, and how old that may be.

use flow::Micros;
use prometheus::{Gauge, Registry};

/// The agent's loop looks at everything twice a second.
const LOOKED_MAX: Micros = Micros(2_000_000);
/// A watch of placement is answered after two seconds at the latest, and another node is asked after some more.
const DECIDED_MAX: Micros = Micros(10_000_000);
/// All rules of the switch are compared once a minute; one comparison may find the switch busy.
const COMPARED_MAX: Micros = Micros(180_000_000);

pub(super) const LOOKS: &str = "the agent's loop goes on (within 2 s)";
pub(super) const DECISIONS: &str = "placement's decisions are heard (within 10 s)";
pub(super) const RULES: &str = "the switch has the rules that are wanted (compared once a minute)";

/// Last times, and what the last comparison found.
#[derive(Debug)]
pub(super) struct Evidence {
    looked: Micros,
    decided: Micros,
    compared: Micros,
    /// Rules that were not as wanted at two comparisons in a row.
    drift: usize,
    gauges: Gauges,
}

#[derive(Debug)]
struct Gauges {
    looked: Gauge,
    decided: Gauge,
    compared: Gauge,
}

impl Evidence {
    /// At the start everything has just been seen; what does not come then is missed as later.
    pub(super) fn new(registry: &Registry, now: Micros) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| -> prometheus::Result<Gauge> {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let gauges = Gauges {
            looked: gauge(
                "limosa_agent_look_age_seconds",
                "Since the agent's loop looked at workers and moves last; it does so twice a second",
            )?,
            decided: gauge(
                "limosa_placement_watch_age_seconds",
                "Since a placement node answered last what has been decided; it does so every two seconds",
            )?,
            compared: gauge(
                "limosa_switch_rules_age_seconds",
                "Since all rules of the switch were compared last; that is done once a minute",
            )?,
        };
        Ok(Self { looked: now, decided: now, compared: now, drift: 0, gauges })
    }

    pub(super) fn looked(&mut self, now: Micros) {
        self.looked = now;
    }

    pub(super) fn decided(&mut self, now: Micros) {
        self.decided = now;
    }

    pub(super) fn compared(&mut self, drift: usize, now: Micros) {
        (self.compared, self.drift) = (now, drift);
    }

    pub(super) fn checks(&self, now: Micros) -> [(&'static str, bool); 3] {
        let within = |last: Micros, bound: Micros| now.since(last) <= bound;
        [
            (LOOKS, within(self.looked, LOOKED_MAX)),
            (DECISIONS, within(self.decided, DECIDED_MAX)),
            (RULES, self.drift == 0 && within(self.compared, COMPARED_MAX)),
        ]
    }

    /// What is known of a check that fails.
    pub(super) fn describe(&self, check: &str, now: Micros) -> Option<String> {
        let age = |last: Micros| format!("last {:.1} s ago", seconds(now.since(last)));
        match check {
            LOOKS => Some(age(self.looked)),
            DECISIONS => Some(age(self.decided)),
            RULES if self.drift > 0 => {
                let drift = self.drift;
                Some(format!(
                    "{drift} are not: `limosa switch diff` shows them, `limosa switch resync` mends them"
                ))
            }
            RULES => Some(age(self.compared)),
            _ => None,
        }
    }

    /// Brings the gauges up to date.
    pub(super) fn show(&self, now: Micros) {
        let age = |last: Micros| seconds(now.since(last));
        self.gauges.looked.set(age(self.looked));
        self.gauges.decided.set(age(self.decided));
        self.gauges.compared.set(age(self.compared));
    }
}

#[expect(clippy::cast_precision_loss, reason = "an age")]
fn seconds(age: Micros) -> f64 {
    age.0 as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(evidence: &Evidence, now: Micros) -> Vec<&'static str> {
        evidence.checks(now).into_iter().filter(|(_, holds)| !holds).map(|(check, _)| check).collect()
    }

    #[test]
    fn what_is_not_seen_again_in_time_is_no_evidence_any_more() {
        let start = Micros(7_000_000);
        let after = |ms: u64| Micros(start.0 + ms * 1_000);
        let mut evidence = Evidence::new(&Registry::new(), start).unwrap();
        assert!(failing(&evidence, after(2_000)).is_empty());
        assert_eq!(failing(&evidence, after(2_001)), [LOOKS]);
        evidence.looked(after(10_000));
        assert!(failing(&evidence, after(10_000)).is_empty());
        evidence.looked(after(10_001));
        assert_eq!(failing(&evidence, after(10_001)), [DECISIONS]);
        assert_eq!(evidence.describe(DECISIONS, after(10_001)).as_deref(), Some("last 10.0 s ago"));
        evidence.looked(after(180_001));
        evidence.decided(after(180_001));
        assert_eq!(failing(&evidence, after(180_001)), [RULES]);
        evidence.compared(0, after(180_001));
        assert!(failing(&evidence, after(180_001)).is_empty());
    }

    #[test]
    fn rules_that_are_not_as_wanted_fail_the_readiness_until_they_are() {
        let start = Micros(7_000_000);
        let mut evidence = Evidence::new(&Registry::new(), start).unwrap();
        evidence.compared(3, start);
        assert_eq!(failing(&evidence, start), [RULES]);
        assert!(evidence.describe(RULES, start).unwrap().starts_with("3 are not: `limosa switch diff`"));
        evidence.compared(0, start);
        assert!(failing(&evidence, start).is_empty());
    }

    #[test]
    fn the_ages_are_told() {
        let start = Micros(7_000_000);
        let registry = Registry::new();
        let evidence = Evidence::new(&registry, start).unwrap();
        evidence.show(Micros(start.0 + 1_500_000));
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for name in ["agent_look", "placement_watch", "switch_rules"] {
            let line = format!("limosa_{name}_age_seconds 1.5");
            assert!(text.lines().any(|told| told == line), "{line} in {text}");
        }
    }
}
