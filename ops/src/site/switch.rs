//! The agent's switch: what is wanted of it, whether it may be steered yet, and how far it has drifted.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use switchctl::core::ovsdb::FailMode;
use switchctl::ovs::{Database, OvsError};
use switchctl::session::QueryError;
use switchctl::{FlowMod, PacketOut, Rule, RuleKey, RuleSet, SwitchAddr, SwitchHandle, diff};

use super::metrics::SiteMetrics;
use crate::config::OpenVswitch;

/// Between two looks at the fail mode.
const FAIL_MODE_INTERVAL: Duration = Duration::from_secs(1);
/// How long one look may take: a database that hangs is known for one within two seconds. It answers in milliseconds.
const FAIL_MODE_BOUND: Duration = Duration::from_secs(1);
/// The fail mode is complained about again after so many looks.
const COMPLAIN_EVERY: u32 = 60;
/// Before a comparison is tried again that the switch did not answer.
const DRIFT_RETRY: Duration = Duration::from_secs(1);
/// Between two looks at the counters of tables and ports.
const COUNTERS_INTERVAL: Duration = Duration::from_secs(5);
/// Between two comparisons of all rules.
const DRIFT_INTERVAL: Duration = Duration::from_secs(60);
/// The same while they are not as wanted: who mends them wants to see that.
const DRIFT_AGAIN: Duration = Duration::from_secs(5);

/// A switch that is steered only once it is known not to forward by itself.
#[derive(Clone, Debug)]
pub struct Switch {
    handle: SwitchHandle,
    sentinel: Option<RuleKey>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    wanted: Option<(Arc<RuleSet>, u64)>,
}

/// A rule for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    /// Table.
    pub table: u8,
    /// The largest that matches wins.
    pub priority: u16,
    /// Which packets, in the words of `ovs-ofctl`.
    #[serde(rename = "match")]
    pub matches: String,
    /// What is done with them, in the same words.
    pub actions: String,
    /// For whom the rule is, 16 digits.
    pub cookie: String,
    /// Packets that it has matched.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl RuleView {
    fn new(key: &RuleKey, rule: &Rule) -> Self {
        Self {
            table: key.table,
            priority: key.priority,
            matches: key.matches.to_string(),
            actions: rule.to_string(),
            cookie: format!("{:016x}", rule.cookie),
            packets: 0,
            bytes: 0,
        }
    }
}

/// All rules of a switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// By table, priority and match.
    pub rules: Vec<RuleView>,
}

/// How a rule of the switch is not as wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Drift {
    /// It is wanted and not there.
    Missing,
    /// It is there and does something else, or has another cookie.
    Differs,
    /// It is there and not wanted.
    Extra,
}

/// A rule that is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// How.
    pub drift: Drift,
    /// As wanted, or as it is when it is not wanted.
    pub rule: RuleView,
}

/// Which rule is not as wanted, and how.
type RuleName = (Drift, u8, u16, String);

impl Difference {
    fn name(&self) -> RuleName {
        (self.drift, self.rule.table, self.rule.priority, self.rule.matches.clone())
    }
}

/// How many rules were not as wanted before and are not now; `None` when some are not now and nobody knows of before.
fn lasting(before: Option<&BTreeSet<RuleName>>, now: &BTreeSet<RuleName>) -> Option<usize> {
    if now.is_empty() { Some(0) } else { before.map(|before| before.intersection(now).count()) }
}

/// The difference between a switch and what is wanted of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differences {
    /// Rules that are wanted.
    pub wanted: usize,
    /// Rules that are not as wanted.
    pub differences: Vec<Difference>,
}

/// What a resync did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resynced {
    /// Rules that were not as wanted and are now.
    pub mended: usize,
}

/// Rules as their switch told them.
pub async fn rules(handle: &SwitchHandle) -> Result<Rules, QueryError> {
    let mut flows = handle.flow_stats().await?;
    flows.sort_by_key(|flow| (flow.key.table, std::cmp::Reverse(flow.key.priority), flow.key.matches));
    let view = |flow: &switchctl::ofp::FlowStats| RuleView {
        packets: flow.packets,
        bytes: flow.bytes,
        ..RuleView::new(&flow.key, &flow.rule)
    };
    Ok(Rules { rules: flows.iter().map(view).collect() })
}

impl Switch {
    /// A switch that waits for [`Switch::open`] if it is `guarded`.
    #[must_use]
    pub fn new(handle: SwitchHandle, sentinel: Option<RuleKey>, guarded: bool) -> Self {
        let state = State { open: !guarded, wanted: None };
        Self { handle, sentinel, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what is wanted.
    pub fn set_rules(&self, rules: Arc<RuleSet>, tag: u64) {
        let mut state = self.state();
        if state.open {
            self.handle.set_rules(rules.clone(), tag);
        }
        state.wanted = Some((rules, tag));
    }

    /// Sends a packet behind the rules that were set before.
    pub fn packet_out(&self, packet: PacketOut) {
        self.handle.packet_out(vec![packet]);
    }

    /// The switch may be steered from now on.
    pub fn open(&self) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.open, true)
            && let Some((rules, tag)) = state.wanted.clone()
        {
            self.handle.set_rules(rules, tag);
        }
    }

    /// All rules that the switch has.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn rules(&self) -> Result<Rules, QueryError> {
        rules(&self.handle).await
    }

    /// What is not as wanted. Rules that are on their way count as different.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`], also before anything was wanted.
    pub async fn differences(&self) -> Result<Differences, QueryError> {
        let wanted = self.state().wanted.clone().ok_or(QueryError::Unavailable)?.0;
        let flows = self.handle.flow_stats().await?;
        let mut present: RuleSet = flows.into_iter().map(|flow| (flow.key, flow.rule)).collect();
        if let Some(sentinel) = self.sentinel {
            present.remove(&sentinel);
        }
        Ok(compare(&present, &wanted))
    }

    /// Mends what is not as wanted; answered when that is in force.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn resync(&self) -> Result<Resynced, QueryError> {
        self.handle.resync().await.map(|mended| Resynced { mended })
    }

    /// Counts rules and drift for the metrics, for ever. Rules that are on their way differ too, so only what differs at two
    /// comparisons in a row counts.
    pub async fn watch_drift(self, metrics: Arc<SiteMetrics>) {
        let mut before: Option<BTreeSet<RuleName>> = None;
        loop {
            let mut pause = DRIFT_RETRY;
            if let Ok(Differences { wanted, differences }) = self.differences().await {
                let now: BTreeSet<RuleName> = differences.iter().map(Difference::name).collect();
                if let Some(drift) = lasting(before.as_ref(), &now) {
                    metrics.drift(wanted, drift);
                    pause = if drift > 0 { DRIFT_AGAIN } else { DRIFT_INTERVAL };
                    if drift > 0 {
                        tracing::warn!(
                            drift,
                            "the switch has other rules than wanted: limosa switch diff, resync"
                        );
                    }
                }
                before = (pause < DRIFT_INTERVAL).then_some(now);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Brings the counters of tables and ports into the metrics, for ever.
    pub async fn watch_counters(self, metrics: Arc<SiteMetrics>) {
        loop {
            let (tables, ports) = (self.handle.table_stats().await, self.handle.port_stats().await);
            metrics.switch_counters(&tables.unwrap_or_default(), &ports.unwrap_or_default());
            tokio::time::sleep(COUNTERS_INTERVAL).await;
        }
    }

    /// Looks at the fail mode of the bridge, for ever: nothing is steered before it is secure. When it ceases to be, that is
    /// said loudly, and what is steered goes on. Open vSwitch drops all rules when the fail mode changes, so they are mended.
    pub async fn guard(self, target: SwitchAddr, settings: OpenVswitch, metrics: Arc<SiteMetrics>) {
        let bridge = &settings.bridge.name;
        let (mut database, mut before, mut known, mut looks) = (None, None, None, 0);
        loop {
            let found = fail_mode(&mut database, &target, bridge).await;
            let now = match &found {
                Ok(mode) => Some(*mode),
                Err(_) => {
                    database = None;
                    None
                }
            };
            let secure = now == Some(Some(FailMode::Secure));
            metrics.fail_mode(secure);
            if before != Some(now) || looks % COMPLAIN_EVERY == 0 {
                complain(bridge, &found);
                looks = 0;
            }
            if secure {
                self.open();
            }
            if let Some(Some(mode)) = now
                && known.replace(mode).is_some_and(|known| known != mode)
                && let Ok(Resynced { mended }) = self.resync().await
            {
                tracing::warn!(bridge, mended, "the fail mode changed, which drops rules: they are mended");
            }
            before = Some(now);
            looks += 1;
            tokio::time::sleep(FAIL_MODE_INTERVAL).await;
        }
    }
}

fn complain(bridge: &str, found: &Result<Option<FailMode>, OvsError>) {
    match found {
        Ok(Some(FailMode::Secure)) => tracing::debug!(bridge, "the fail mode is secure"),
        Ok(Some(FailMode::Standalone)) => tracing::error!(
            bridge,
            "the fail mode is not secure: without its controller the bridge becomes a learning switch and packets \
             bypass the network functions; run `limosa switch setup`, or `ovs-vsctl set-fail-mode {bridge} secure`"
        ),
        Ok(None) => tracing::error!(bridge, "there is no such bridge: run `limosa switch setup`"),
        Err(error) => tracing::error!(bridge, %error, "the fail mode cannot be read"),
    }
}

async fn fail_mode(
    database: &mut Option<Database>,
    target: &SwitchAddr,
    bridge: &str,
) -> Result<Option<FailMode>, OvsError> {
    let found = tokio::time::timeout(FAIL_MODE_BOUND, read_fail_mode(database, target, bridge)).await;
    found.unwrap_or(Err(OvsError::Timeout(FAIL_MODE_BOUND)))
}

async fn read_fail_mode(
    database: &mut Option<Database>,
    target: &SwitchAddr,
    bridge: &str,
) -> Result<Option<FailMode>, OvsError> {
    let database = match database {
        Some(database) => database,
        None => database.insert(Database::connect(target).await?),
    };
    Ok(database.read().await?.fail_mode(bridge))
}

fn compare(present: &RuleSet, wanted: &RuleSet) -> Differences {
    let difference = |change: FlowMod| {
        Some(match change {
            FlowMod::Add(key, rule) => Difference {
                drift: if present.contains_key(&key) { Drift::Differs } else { Drift::Missing },
                rule: RuleView::new(&key, &rule),
            },
            FlowMod::Delete(key) => {
                Difference { drift: Drift::Extra, rule: RuleView::new(&key, present.get(&key)?) }
            }
            FlowMod::Clear => return None,
        })
    };
    let differences = diff(present, wanted).into_iter().filter_map(difference).collect();
    Differences { wanted: wanted.len(), differences }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchctl::{Action, Match, PortNo};

    #[tokio::test]
    async fn a_database_that_hangs_is_known_for_one_within_two_seconds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db.sock");
        let _listens = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let found = fail_mode(&mut None, &SwitchAddr::Unix(path), "br0").await;
        assert!(matches!(found, Err(OvsError::Timeout(FAIL_MODE_BOUND))), "{found:?}");
        assert!(FAIL_MODE_INTERVAL + FAIL_MODE_BOUND <= Duration::from_secs(2));
    }

    #[test]
    fn rules_that_are_on_their_way_are_no_drift_and_those_that_stay_wrong_are() {
        let names = |ports: &[u16]| {
            let name = |port: &u16| (Drift::Missing, 1, *port, String::new());
            ports.iter().map(name).collect::<BTreeSet<_>>()
        };
        assert_eq!(lasting(None, &names(&[])), Some(0));
        assert_eq!(lasting(None, &names(&[1, 2])), None);
        assert_eq!(lasting(Some(&names(&[1, 2])), &names(&[3])), Some(0));
        assert_eq!(lasting(Some(&names(&[1, 2])), &names(&[2, 3])), Some(1));
    }

    #[test]
    fn drift_is_told_by_what_is_wrong_with_a_rule() {
        let rule = |port, cookie| {
            let key = RuleKey { table: 1, priority: 5, matches: Match::any().in_port(PortNo(port)) };
            (key, Rule { cookie, actions: vec![Action::Output(PortNo(9))], goto: None })
        };
        let wanted = RuleSet::from_iter([rule(1, 1), rule(2, 2), rule(3, 3)]);
        let present = RuleSet::from_iter([rule(1, 1), rule(2, 7), rule(4, 4)]);
        let found = compare(&present, &wanted);
        assert_eq!(found.wanted, 3);
        let told: Vec<_> = found
            .differences
            .iter()
            .map(|difference| {
                (difference.drift, difference.rule.matches.as_str(), difference.rule.cookie.as_str())
            })
            .collect();
        assert_eq!(
            told,
            [
                (Drift::Differs, "in_port=2", "0000000000000002"),
                (Drift::Missing, "in_port=3", "0000000000000003"),
                (Drift::Extra, "in_port=4", "0000000000000004"),
            ]
        );
        assert_eq!(compare(&wanted, &wanted).differences, []);
    }
}
