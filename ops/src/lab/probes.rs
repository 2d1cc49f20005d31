//! What sites measured by probes of servers that no flow has gone to from there, beside what the WAN has.

use serde::Serialize;

use super::underlay::{Far, group_name};
use crate::placement::api::view::ExplanationView;

/// How far what a probe measured may be from what the WAN has. A probe is one sample, of which the delay model thinks that it is off
/// by 3 ms (standard deviation); this is three times that. The jitter is 2 ms each way at most, the rest is for busy processors. Where
/// pings, of which the emulated WAN delays each too, take longer than the WAN has, the machine is so slow, and a probe may be as much above.
const TOLERANCE_MS: f64 = 9.0;

/// What became of a site's probes, over all agents that it had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Fates {
    pub(super) site: String,
    pub(super) answered: u64,
    pub(super) silent: u64,
    /// By the site itself, without asking.
    pub(super) refused: u64,
    /// Those three when the agent was asked last.
    #[serde(skip)]
    last: [u64; 3],
}

impl Fates {
    pub(super) fn of(site: String) -> Self {
        Self { site, ..Self::default() }
    }

    fn sent(&self) -> u64 {
        self.answered + self.silent
    }

    /// From the page of metrics. An agent that is another one counts anew.
    pub(super) fn take(&mut self, metrics: &str) {
        let count = |outcome: &str| {
            let label = format!("outcome=\"{outcome}\"");
            let is_it = |line: &&str| line.starts_with("limosa_probes{") && line.contains(&label);
            metrics.lines().find(is_it)?.rsplit(' ').next()?.parse().ok()
        };
        let [Some(answered), Some(silent), Some(refused)] = ["answered", "silent", "refused"].map(count)
        else {
            return;
        };
        let now: [u64; 3] = [answered, silent, refused];
        let is_other = now.iter().zip(self.last).any(|(now, last)| *now < last);
        let last = if is_other { [0; 3] } else { self.last };
        self.answered += answered - last[0];
        self.silent += silent - last[1];
        self.refused += refused - last[2];
        self.last = now;
    }
}

/// A round trip between a site and a server as the delay model has it, and where that is known from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Known {
    pub(super) ms: f64,
    pub(super) source: String,
}

/// A server prefix from a site where none of the group that talks to it ever was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Probed {
    pub(super) site: String,
    pub(super) place: String,
    pub(super) network: String,
    pub(super) group: String,
    pub(super) owner: Option<String>,
    /// What `explain` said of the way from the site to the server before a probe.
    pub(super) before: Option<Known>,
    /// The same when it was measured.
    pub(super) measured: Option<Known>,
    /// Median of some pings from the site.
    pub(super) ping_ms: Option<f64>,
    /// What the WAN has, jitter at its mean.
    pub(super) wan_ms: f64,
    /// What the group has at its owner and would have at the site by `explain`, there and back, when it was measured.
    pub(super) here_ms: Option<f64>,
    pub(super) there_ms: Option<f64>,
}

impl Probed {
    pub(super) fn new(far: &Far, site: String, wan_ms: f64) -> Self {
        Self {
            site,
            place: far.place.to_owned(),
            network: far.network.to_owned(),
            group: group_name(far.group),
            owner: None,
            before: None,
            measured: None,
            ping_ms: None,
            wan_ms,
            here_ms: None,
            there_ms: None,
        }
    }

    /// From what `explain` says of the group. Nobody but the owner sees a handshake, so what is measured from another site is a probe's.
    pub(super) fn take(&mut self, view: &ExplanationView) {
        let at = |name: &str| view.candidates.iter().find(|candidate| candidate.site == name);
        let (Some(there), Some(here)) = (at(&self.site), at(&view.owner)) else { return };
        let Some(server) = there.terms.iter().find(|term| term.term == "server") else { return };
        if self.measured.is_some() || view.owner == self.site {
            return;
        }
        let known = Known { ms: 2.0 * server.ms, source: server.source.clone() };
        self.owner = Some(view.owner.clone());
        if known.source == "measured" {
            self.measured = Some(known);
            (self.here_ms, self.there_ms) = (Some(2.0 * here.total_ms), Some(2.0 * there.total_ms));
        } else {
            self.before = Some(known);
        }
    }

    fn failure(&self) -> Option<String> {
        let Self { site, place, network, .. } = self;
        let Some(measured) = &self.measured else {
            let said = self.before.as_ref().map_or("nothing", |known| known.source.as_str());
            return Some(format!(
                "probes: {site} was to measure {network} ({place}), of which explain still says: {said}"
            ));
        };
        let machine_ms = self.ping_ms.map_or(0.0, |ping| (ping - self.wan_ms).max(0.0));
        let off = measured.ms - self.wan_ms;
        (off < -TOLERANCE_MS || off > TOLERANCE_MS + machine_ms).then(|| {
            format!(
                "probes: from {site} to {network} ({place}) {:.1} ms were measured, the WAN has {:.1}: more than \
                 {:.1} ms apart",
                measured.ms,
                self.wan_ms,
                TOLERANCE_MS + machine_ms
            )
        })
    }
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Probes {
    pub(super) sites: Vec<Fates>,
    pub(super) ways: Vec<Probed>,
}

impl Probes {
    /// What is not as it should be.
    pub(super) fn failures(&self) -> Vec<String> {
        let sum = |count: fn(&Fates) -> u64| self.sites.iter().map(count).sum::<u64>();
        if sum(|fates| fates.answered) == 0 {
            let (sent, refused) = (sum(Fates::sent), sum(|fates| fates.refused));
            return vec![format!("probes: none was answered; {sent} were sent, {refused} refused by sites")];
        }
        self.ways.iter().filter_map(Probed::failure).collect()
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header([
            "probe from",
            "to",
            "of group",
            "thought before",
            "probe",
            "ping",
            "WAN",
            "the group: at present",
            "there",
        ]);
        let text = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
        let known = |known: &Option<Known>| {
            known.as_ref().map_or("-".to_owned(), |known| format!("{:.1} ms, {}", known.ms, known.source))
        };
        for way in &self.ways {
            let owner = way.owner.as_deref().unwrap_or("-");
            table.add_row([
                way.site.clone(),
                format!("{} ({})", way.network, way.place),
                way.group.clone(),
                known(&way.before),
                known(&way.measured),
                text(way.ping_ms),
                text(Some(way.wan_ms)),
                format!("{owner}, {}", text(way.here_ms)),
                text(way.there_ms),
            ]);
        }
        let counts = self.sites.iter().map(|fates| {
            let Fates { site, answered, refused, .. } = fates;
            format!("{site} {} sent, {answered} answered, {refused} refused", fates.sent())
        });
        format!("{table}\n\nprobes  {}", counts.collect::<Vec<_>>().join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::built_in;
    use crate::lab::underlay::far_servers;

    fn probed(measured_ms: Option<f64>) -> Probes {
        let (far, sites) = (far_servers(2).next().unwrap(), built_in());
        let known = |ms, source: &str| Known { ms, source: source.to_owned() };
        let mut way = Probed::new(&far, sites[1].name.clone(), 62.0);
        way.before = Some(known(108.0, "borrowed from ingress"));
        way.measured = measured_ms.map(|ms| known(ms, "measured"));
        let mut fates = Fates::of(sites[1].name.clone());
        fates.answered = 1;
        Probes { sites: vec![fates], ways: vec![way] }
    }

    #[test]
    fn what_a_probe_measured_has_to_be_what_the_wan_has() {
        assert_eq!(probed(Some(62.0 - TOLERANCE_MS)).failures(), [""; 0]);
        assert_eq!(probed(Some(62.0 + TOLERANCE_MS)).failures(), [""; 0]);
        let far_off = probed(Some(75.0)).failures();
        assert_eq!(
            far_off,
            [
                "probes: from virginia to 192.0.2.0/24 (reykjavik) 75.0 ms were measured, the WAN has 62.0: more than \
                 9.0 ms apart"
            ]
        );
    }

    #[test]
    fn where_pings_are_slow_too_a_probe_may_be_as_slow() {
        let mut slow = probed(Some(75.0));
        slow.ways[0].ping_ms = Some(67.0);
        assert_eq!(slow.failures(), [""; 0]);
        slow.ways[0].ping_ms = Some(65.0);
        assert_eq!(slow.failures().len(), 1);
        slow.ways[0].measured = Some(Known { ms: 50.0, source: "measured".to_owned() });
        assert_eq!(slow.failures().len(), 1, "a busy machine makes nothing faster");
    }

    #[test]
    fn a_lab_without_an_answered_probe_or_a_measured_source_fails() {
        let unknown = probed(None);
        assert_eq!(
            unknown.failures(),
            [
                "probes: virginia was to measure 192.0.2.0/24 (reykjavik), of which explain still says: borrowed \
              from ingress"
            ]
        );
        let mut silent = unknown;
        (silent.sites[0].answered, silent.sites[0].silent) = (0, 2);
        assert_eq!(silent.failures(), ["probes: none was answered; 2 were sent, 0 refused by sites"]);
    }

    #[test]
    fn probes_of_an_agent_that_was_killed_still_count() {
        let page = |answered, silent| {
            format!(
                "# TYPE limosa_probes gauge\nlimosa_probes{{outcome=\"answered\",site=\"virginia\"}} {answered}\n\
                 limosa_probes{{outcome=\"refused\",site=\"virginia\"}} 0\n\
                 limosa_probes{{outcome=\"silent\",site=\"virginia\"}} {silent}\n"
            )
        };
        let mut fates = Fates::of("virginia".into());
        for metrics in [page(1, 0), page(3, 1), String::new(), page(0, 0), page(1, 0)] {
            fates.take(&metrics);
        }
        assert_eq!((fates.answered, fates.silent, fates.sent()), (4, 1, 5));
    }
}
