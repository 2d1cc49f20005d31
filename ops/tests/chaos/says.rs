//! Who has to say that something is broken, in which words and how soon, as docs/operations.md has it.
//!
//! | fault | who says it | how soon |
//! |---|---|---|
//! | worker stopped | its agent, and placement nodes of the site | 1.5 s |
//! | worker killed or ended, and fewer than `min` are left | its agent | with its next look, twice a second |
//! | switch stopped | its agent | 1.5 s |
//! | switch killed or ended, controller connection cut | its agent | with its next look |
//! | switch killed or ended | its agent: workers have no link | with the next statistics |
//! | agent killed or stopped | all placement nodes, of the site | 1.5 s |
//! | agent told to end | itself while it goes on, then all placement nodes | at once; 10 s and 1.5 s |
//! | leader killed or stopped | the other nodes, or they know another leader | 2 s |
//! | placement node told to end | itself while it goes on | at once |
//! | majority killed or stopped | the node that is left; agents: nobody takes their reports | 2 s; 1.5 s |
//! | path of the leader to another node cut | that node | 2 s |
//! | path of an agent to a node cut | that node, of the site, unless it leads: others pass reports on | 1.5 s |
//! | path between two agents cut | placement nodes, of both sites | 14 s: the connection's idle time and ten seconds |
//!
//! Agents and nodes say it by their readiness, a metric and a line of the log; what is said of a site is in the list of sites, and then
//! `limosa site list` ends with 6. A node that says that it is ready has all that was
//! committed some seconds before, whatever was the matter: so is judged a node whose disk is full.
//!
//! Nobody has to say that a placement node is gone whose group goes on without it, that a path between two switches is cut, or that
//! one is slow: the docs do not promise it.

use std::time::Duration;

use flow::SiteId;
use limosa::demo::cluster::Part;

use crate::plan::Blow;
use crate::watch::Seen;

/// On top of what the docs allow: looks are up to 0.7 s apart, and one at a process that is slow takes up to 1.5 s.
pub(crate) const MARGIN: Duration = Duration::from_millis(2_500);
/// Agents look at workers, and report, twice a second; placement is told of what fails in two reports.
const TWO_REPORTS: Duration = Duration::from_secs(1);
/// Of workers, switches, reports and sites.
const SILENCE: Duration = Duration::from_millis(1_500);
/// The longest election.
const ELECTION: Duration = Duration::from_secs(2);
/// A connection that brings nothing ends, and is missed for ten seconds.
const UNREACHED: Duration = Duration::from_secs(14);
/// For so long an agent that was told to end goes on with its moves.
const LAST_MOVES: Duration = Duration::from_secs(10);

/// How something is said: one of each kind has to be found, if there is any.
#[derive(Debug)]
pub(crate) struct Words {
    /// Checks of the readiness that fail.
    pub(crate) checks: &'static [&'static str],
    /// Metrics, by [`Gauge::name`].
    pub(crate) gauges: &'static [&'static str],
    pub(crate) log: &'static [&'static str],
}

const SILENT_WORKER: Words = Words {
    checks: &["every worker answers", "every expected worker is there"],
    gauges: &["limosa_workers_silent", "limosa_workers_missing"],
    log: &["the worker does not answer: it is stopped, or hangs", "an expected worker is not there"],
};
const MISSING_WORKER: Words = Words {
    checks: &["every expected worker is there"],
    gauges: &["limosa_workers_missing"],
    log: &["an expected worker is not there"],
};
/// A session that was silent for ten seconds is given up.
const SILENT_SWITCH: Words = Words {
    checks: &["the switch answers", "the switch is connected"],
    gauges: &["limosa_switch_silent_seconds", "limosa_switch_connected"],
    log: &["the switch is silent though it was asked", "the switch is gone"],
};
const LOST_SWITCH: Words = Words {
    checks: &["the switch is connected"],
    gauges: &["limosa_switch_connected"],
    log: &["the switch is gone"],
};
const UNLINKED_WORKERS: Words = Words {
    checks: &["every worker has its link to the switch"],
    gauges: &["limosa_workers_unlinked"],
    log: &["the worker has no link to the switch"],
};
const REPORTS_NOT_TAKEN: Words = Words {
    checks: &["placement takes the site's reports"],
    gauges: &["limosa_placement_silence_seconds"],
    log: &["no leader of placement takes this site's reports"],
};
const AGENT_ENDS: Words = Words { checks: &["the agent goes on"], gauges: &[], log: &[] };
const NO_QUORUM: Words = Words {
    checks: &["quorum:"],
    gauges: &["limosa_raft_has_quorum"],
    log: &["no quorum: nothing is decided"],
};
const NODE_ENDS: Words = Words { checks: &["stop:"], gauges: &[], log: &[] };
const NOT_REACHED: &[&str] = &["no connection to the agent of"];
const NO_REPORT: &[&str] = &["no report for", "no report since"];

/// A metric that says that something is wrong above a value, or below it.
pub(crate) struct Gauge {
    pub(crate) name: &'static str,
    wrong: fn(f64) -> bool,
}

pub(crate) const GAUGES: [Gauge; 7] = [
    Gauge { name: "limosa_workers_silent", wrong: |value| value > 0.0 },
    Gauge { name: "limosa_workers_missing", wrong: |value| value > 0.0 },
    Gauge { name: "limosa_workers_unlinked", wrong: |value| value > 0.0 },
    Gauge { name: "limosa_switch_silent_seconds", wrong: |value| value > 0.0 },
    Gauge { name: "limosa_switch_connected", wrong: |value| value == 0.0 },
    Gauge { name: "limosa_placement_silence_seconds", wrong: |value| value > 1.5 },
    Gauge { name: "limosa_raft_has_quorum", wrong: |value| value == 0.0 },
];

/// Names of gauges that say that something is wrong.
pub(crate) fn wrong_gauges(metrics: &str) -> Vec<&'static str> {
    let told = |line: &str, gauge: &Gauge| {
        let rest = line.strip_prefix(gauge.name).filter(|rest| rest.starts_with(['{', ' ']));
        let value = rest.and_then(|rest| rest.rsplit(' ').next()?.parse().ok());
        value.is_some_and(gauge.wrong)
    };
    let wrong = |gauge: &&Gauge| metrics.lines().any(|line| told(line, gauge));
    GAUGES.iter().filter(wrong).map(|gauge| gauge.name).collect()
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Says {
    /// An agent or a placement node, of itself.
    Itself(Part, &'static Words),
    /// A placement node in its list of sites: this one, or, if none is named, any.
    OfSite(SiteId, &'static [&'static str], Option<u64>),
    /// A node whose leader is lost is not ready, or knows another.
    Bereft { node: u64, lost: u64 },
    /// Two nodes that do not reach one another: if one leads and so keeps the lead, the other one is not ready.
    Apart(u64, u64),
    /// Two agents that do not reach one another: of both that is said.
    Parted(SiteId, SiteId),
    /// A node that an agent does not reach says so of its site, unless it leads.
    Unreported(SiteId, u64),
}

impl Says {
    /// Whether placement nodes have to say it in their lists of sites, which the command line shows.
    pub(crate) fn is_of_site(self) -> bool {
        matches!(self, Self::OfSite(..))
    }

    /// What is said.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Itself(_, words) => words.checks[0],
            Self::OfSite(_, words, _) => words[0],
            Self::Bereft { .. } => "leader lost",
            Self::Apart(..) => "leader cut off",
            Self::Parted(..) => "agents cut off",
            Self::Unreported(..) => "agent cut off",
        }
    }
}

/// Who has to say something within a time of docs/operations.md.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Witness {
    pub(crate) says: Says,
    pub(crate) within: Duration,
    /// Whether it goes on to say so as long as the fault lasts.
    pub(crate) goes_on: bool,
}

fn witness(says: Says, within: Duration) -> Witness {
    Witness { says, within, goes_on: true }
}

/// Who has to say that processes suffer this. `lacks`: fewer workers than `min` are left of their site; `leader`: who led.
pub(crate) fn of_blow(parts: &[Part], blow: Blow, lacks: bool, leader: Option<u64>) -> Vec<Witness> {
    let nodes = 1..=3_u64;
    match (parts, blow) {
        (&[Part::Worker(site, _)], Blow::Stop) => vec![
            witness(Says::Itself(Part::Agent(site), &SILENT_WORKER), SILENCE),
            // Taken for dead, it is not missed where enough are left.
            Witness {
                goes_on: lacks,
                ..witness(Says::OfSite(site, SILENT_WORKER.checks, None), SILENCE + TWO_REPORTS)
            },
        ],
        (&[Part::Worker(site, _)], Blow::Kill | Blow::Term) if lacks => {
            vec![witness(Says::Itself(Part::Agent(site), &MISSING_WORKER), Duration::ZERO)]
        }
        (&[Part::Switch(site)], Blow::Stop) => vec![
            witness(Says::Itself(Part::Agent(site), &SILENT_SWITCH), SILENCE),
            witness(Says::OfSite(site, SILENT_SWITCH.checks, None), SILENCE + TWO_REPORTS),
        ],
        (&[Part::Switch(site)], Blow::Kill | Blow::Term) => {
            let unlinked = witness(Says::Itself(Part::Agent(site), &UNLINKED_WORKERS), SILENCE);
            [of_controller(site), vec![unlinked]].concat()
        }
        (&[Part::Agent(site)], Blow::Kill | Blow::Stop) => {
            nodes.map(|node| witness(Says::OfSite(site, NO_REPORT, Some(node)), SILENCE)).collect()
        }
        (&[Part::Agent(site)], Blow::Term) => {
            let ends = witness(Says::Itself(Part::Agent(site), &AGENT_ENDS), Duration::ZERO);
            let gone = |node| witness(Says::OfSite(site, NO_REPORT, Some(node)), LAST_MOVES + SILENCE);
            std::iter::once(ends).chain(nodes.map(gone)).collect()
        }
        (&[Part::Placement(lost)], Blow::Kill | Blow::Stop) if leader == Some(lost) => {
            let others = nodes.filter(|node| *node != lost);
            others.map(|node| witness(Says::Bereft { node, lost }, ELECTION)).collect()
        }
        (&[Part::Placement(node)], Blow::Term) => {
            vec![witness(Says::Itself(Part::Placement(node), &NODE_ENDS), Duration::ZERO)]
        }
        (&[Part::Placement(a), Part::Placement(b)], Blow::Kill | Blow::Stop) => {
            let left = witness(Says::Itself(Part::Placement(6 - a - b), &NO_QUORUM), ELECTION);
            let agents = [1, 2, 3].map(|site| Says::Itself(Part::Agent(SiteId(site)), &REPORTS_NOT_TAKEN));
            std::iter::once(left).chain(agents.map(|says| witness(says, SILENCE))).collect()
        }
        _ => Vec::new(),
    }
}

pub(crate) fn of_controller(site: SiteId) -> Vec<Witness> {
    vec![
        witness(Says::Itself(Part::Agent(site), &LOST_SWITCH), Duration::ZERO),
        witness(Says::OfSite(site, LOST_SWITCH.checks, None), TWO_REPORTS),
    ]
}

pub(crate) fn of_nodes_apart(a: SiteId, b: SiteId) -> Vec<Witness> {
    vec![witness(Says::Apart(a.0.into(), b.0.into()), ELECTION)]
}

pub(crate) fn of_agents_apart(a: SiteId, b: SiteId) -> Vec<Witness> {
    vec![witness(Says::Parted(a, b), UNREACHED + TWO_REPORTS)]
}

pub(crate) fn of_agent_and_node(agent: SiteId, node: SiteId) -> Vec<Witness> {
    vec![witness(Says::Unreported(agent, node.0.into()), SILENCE)]
}

/// What an own log has to say, and whose it is.
pub(crate) fn log_of(says: Says) -> Option<(Part, &'static [&'static str])> {
    match says {
        Says::Itself(part, words) if !words.log.is_empty() => Some((part, words.log)),
        Says::Itself(..)
        | Says::OfSite(..)
        | Says::Bereft { .. }
        | Says::Apart(..)
        | Says::Parted(..)
        | Says::Unreported(..) => None,
    }
}

/// What was found of a witness, each with how it was to be said; nothing of who cannot be asked. `able`: who was well all the time.
pub(crate) fn found(
    says: Says,
    seen: &Seen,
    (since, until): (Duration, Duration),
    able: impl Fn(Part) -> bool,
) -> Vec<(&'static str, bool)> {
    let is_able = |part: Part| able(part) && seen.answered_all(part, since, until);
    let node = |id: u64| Part::Placement(id);
    match says {
        Says::Itself(part, words) if is_able(part) => {
            let mut found = vec![("readiness", seen.complained(part, words.checks, since, until))];
            if !words.gauges.is_empty() {
                found.push(("metrics", seen.had_gauge(part, words.gauges, since, until)));
            }
            found
        }
        Says::OfSite(site, words, Some(id)) if is_able(node(id)) => {
            vec![("list of sites", seen.had_problem(site, id, words, since, until))]
        }
        Says::OfSite(site, words, None) => {
            // What an agent says it has to be there to say.
            let asked: Vec<u64> = (1..=3).filter(|id| is_able(node(*id))).collect();
            let said = asked.iter().any(|id| seen.had_problem(site, *id, words, since, until));
            if asked.is_empty() || !is_able(Part::Agent(site)) {
                Vec::new()
            } else {
                vec![("list of sites", said)]
            }
        }
        Says::Bereft { node: id, lost } if is_able(node(id)) => {
            let other =
                seen.leaders(id, since, until).any(|leader| leader.is_some_and(|leader| leader != lost));
            vec![("readiness", other || seen.complained(node(id), NO_QUORUM.checks, since, until))]
        }
        Says::Apart(a, b) => apart(seen, (a, b), (since, until), is_able),
        Says::Parted(a, b) => {
            let nodes = [1, 2, 3].map(node);
            let all = nodes.into_iter().chain([Part::Agent(a), Part::Agent(b)]);
            // Reports are heard, and both are alive, all the time.
            if !all.into_iter().all(is_able) {
                return Vec::new();
            }
            let said = |site| (1..=3).any(|id| seen.had_problem(site, id, NOT_REACHED, since, until));
            vec![("list of sites", said(a) && said(b))]
        }
        Says::Unreported(site, id) if is_able(node(id)) && is_able(Part::Agent(site)) => {
            // What passes reports on to the leader, it hears.
            if seen.leaders(id, since.saturating_sub(ELECTION), until).any(|leader| leader == Some(id)) {
                return Vec::new();
            }
            vec![("list of sites", seen.had_problem(site, id, NO_REPORT, since, until))]
        }
        Says::Itself(..) | Says::OfSite(..) | Says::Bereft { .. } | Says::Unreported(..) => Vec::new(),
    }
}

fn apart(
    seen: &Seen,
    (a, b): (u64, u64),
    (since, until): (Duration, Duration),
    is_able: impl Fn(Part) -> bool,
) -> Vec<(&'static str, bool)> {
    let third = 6 - a - b;
    let mut leaders = seen.leaders(third, since.saturating_sub(ELECTION), until);
    let Some(first) = leaders.next() else { return Vec::new() };
    let leads = first.filter(|leader| *leader != third && leaders.all(|other| other == first));
    let Some(leads) = leads else { return Vec::new() };
    let part = Part::Placement(a + b - leads);
    if !is_able(part) {
        return Vec::new();
    }
    let said = seen.complained(part, NO_QUORUM.checks, since, until);
    vec![("readiness", said), ("metrics", seen.had_gauge(part, NO_QUORUM.gauges, since, until))]
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMSTERDAM: SiteId = SiteId(1);
    const AGENT: Part = Part::Agent(AMSTERDAM);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn seen_from(part: Part, seconds: std::ops::Range<u64>) -> Seen {
        let mut seen = Seen::default();
        seconds.for_each(|at| seen.note_ready(part, s(at), true));
        seen
    }

    fn found_of(says: Says, seen: &Seen) -> Vec<bool> {
        found(says, seen, (s(10), s(14)), |_| true).into_iter().map(|(_, said)| said).collect()
    }

    #[test]
    fn gauges_that_say_that_something_is_wrong_are_read_with_labels_and_without() {
        let text = "limosa_workers_silent{site=\"a\"} 1\nlimosa_workers_missing{site=\"a\"} 0\nlimosa_raft_has_quorum 0\n\
                    limosa_switch_connected{site=\"a\"} 1\nlimosa_placement_silence_seconds{site=\"a\"} 1.2\n";
        assert_eq!(wrong_gauges(text), ["limosa_workers_silent", "limosa_raft_has_quorum"]);
    }

    #[test]
    fn an_agent_has_to_say_which_check_fails_and_by_which_metric() {
        let says = Says::Itself(AGENT, &SILENT_WORKER);
        let mut seen = seen_from(AGENT, 0..20);
        assert_eq!(found_of(says, &seen), [false, false]);
        seen.note_complaint(AGENT, s(12), "[+] every worker answers\n[-] the switch is connected\n", vec![]);
        assert_eq!(found_of(says, &seen), [false, false], "another check");
        seen.note_complaint(AGENT, s(12), "[-] every worker answers\n", vec!["limosa_workers_silent"]);
        assert_eq!(found_of(says, &seen), [true, true]);
        seen = seen_from(AGENT, 0..20);
        seen.note_complaint(AGENT, s(15), "[-] every worker answers\n", vec!["limosa_workers_silent"]);
        assert_eq!(found_of(says, &seen), [false, false], "too late");
    }

    #[test]
    fn who_was_struck_or_did_not_answer_all_the_time_is_no_witness() {
        let says = Says::Itself(AGENT, &SILENT_WORKER);
        let seen = seen_from(AGENT, 0..20);
        assert!(found(says, &seen, (s(10), s(14)), |part| part != AGENT).is_empty());
        assert!(found_of(says, &seen_from(AGENT, 0..12)).is_empty());
        assert!(found_of(says, &seen_from(AGENT, 12..20)).is_empty());
    }

    #[test]
    fn a_site_without_reports_is_named_by_each_node_that_can() {
        let says = |node| Says::OfSite(AMSTERDAM, NO_REPORT, Some(node));
        let mut seen = seen_from(Part::Placement(2), 0..20);
        assert_eq!(found_of(says(2), &seen), [false]);
        seen.note_problem(AMSTERDAM, 1, s(12), "no report for 2.0 s");
        assert_eq!(found_of(says(2), &seen), [false], "another node said it");
        seen.note_problem(AMSTERDAM, 2, s(12), "no report for 2.0 s");
        assert_eq!(found_of(says(2), &seen), [true]);
        assert!(found_of(says(3), &seen).is_empty(), "it does not answer");
    }

    #[test]
    fn of_two_agents_apart_it_has_to_be_said_of_both() {
        let says = Says::Parted(AMSTERDAM, SiteId(2));
        let mut seen = Seen::default();
        let parts = [1, 2, 3].map(Part::Placement).into_iter().chain([AGENT, Part::Agent(SiteId(2))]);
        parts.for_each(|part| (0..20).for_each(|at| seen.note_ready(part, s(at), true)));
        let problem = "no connection to the agent of virginia at x:1 for 10 s";
        seen.note_problem(AMSTERDAM, 1, s(12), problem);
        assert_eq!(found_of(says, &seen), [false], "the other does not say it");
        seen.note_problem(SiteId(2), 3, s(12), problem);
        assert_eq!(found_of(says, &seen), [true]);
        assert!(found(says, &seen, (s(10), s(14)), |part| part != Part::Placement(3)).is_empty());
    }

    #[test]
    fn of_two_nodes_apart_the_one_that_does_not_lead_has_to_say_it() {
        let mut seen = seen_from(Part::Placement(2), 0..20);
        (0..20).for_each(|at| seen.note_raft(3, s(at), Some(1), 7));
        assert_eq!(found_of(Says::Apart(1, 2), &seen), [false, false]);
        assert!(found_of(Says::Apart(2, 3), &seen).is_empty(), "the leader reaches both");
        let checks = "[-] leader: none\n[-] quorum: none\n";
        seen.note_complaint(Part::Placement(2), s(13), checks, vec!["limosa_raft_has_quorum"]);
        assert_eq!(found_of(Says::Apart(1, 2), &seen), [true, true]);
        seen.note_raft(3, s(13), Some(2), 7);
        assert!(found_of(Says::Apart(1, 2), &seen).is_empty(), "the lead changed");
    }
}
