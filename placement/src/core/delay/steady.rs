//! What a group's traffic is on the mean, of reports that count half a second each.
//!
//! Packets come in bursts, so the count of half a second says little of the next: plans that follow each report move groups to and
//! fro for nothing. The level is an exponential mean over [`TIME`], a plain mean for as long as the traffic has not been there for so
//! long. When [`RUN_LEN`] reports in a row are far off on the same side, the load has changed, and the level is their mean (a run test,
//! after Page, Biometrika 41, 1954): a surge is seen after three seconds, and not after thirty.

use std::collections::BTreeMap;

use flow::{Micros, SiteId};

use super::Demand;

/// Time constant of the mean.
pub(super) const TIME: Micros = Micros(30_000_000);
/// Reports in a row that are far off before the level is taken to be another.
const RUN_LEN: u8 = 6;
/// Far off is more than so many standard deviations of one report,
const FAR_SD: f64 = 3.0;
/// and more than this share of the level.
const FAR_SHARE: f64 = 0.25;
/// Of what is far off counts this share at least: else traffic that comes and goes would be none for ever after a pause.
const COUNTS_SHARE: f64 = 0.05;
/// Packets of half a second below which shares by ingress say too little to be far off.
const SHARES_PACKETS_MIN: f64 = 20.0;
/// A share below this is none.
const SHARE_MIN: f64 = 1e-3;

/// A mean that follows what changes for good.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Level {
    mean: f64,
    /// Of one report.
    variance: f64,
    /// Reports in a row that were far above, or far below.
    run: i8,
    run_sum: f64,
}

impl Level {
    fn of(value: f64) -> Self {
        Self { mean: value, ..Self::default() }
    }

    fn add(&mut self, value: f64, weight: f64) {
        let off = value - self.mean;
        let limit = (FAR_SD * self.variance.sqrt()).max(FAR_SHARE * self.mean);
        let far = off.abs() > limit;
        let side = if off > 0.0 { 1 } else { -1 };
        if !far || self.run.signum() == -side {
            (self.run, self.run_sum) = (0, 0.0);
        }
        if far {
            self.run += side;
            self.run_sum += value;
        }
        if self.run.unsigned_abs() == RUN_LEN {
            *self =
                Self { mean: self.run_sum / f64::from(RUN_LEN), variance: self.variance, ..Self::default() };
            return;
        }
        // What is far off counts as if it were at the limit: else the first of a run would hide the others.
        let most = limit.max(COUNTS_SHARE * value);
        let off = if weight < 1.0 { off.clamp(-most, most) } else { off };
        self.mean += weight * off;
        self.variance = (1.0 - weight) * (self.variance + weight * off * off);
    }
}

/// The traffic of a group over time.
#[derive(Clone, Debug)]
pub(super) struct Steady {
    since: Micros,
    packets: Level,
    flows: Level,
    bits: Level,
    /// Reports in a row whose packets came in elsewhere than the mean says: of clients, of the world.
    elsewhere: [u8; 2],
}

impl Steady {
    /// Of the first report.
    pub(super) fn new(demand: &Demand) -> Self {
        Self {
            since: demand.updated,
            packets: Level::of(demand.packets_per_s),
            flows: Level::of(demand.flows as f64),
            bits: Level::of(demand.bits_per_s),
            elsewhere: [0; 2],
        }
    }

    /// Takes a report; what is known becomes what the traffic is on the mean.
    pub(super) fn add(&mut self, known: &mut Demand, new: Demand) {
        let now = new.updated;
        let weight = weight(now.since(known.updated), now.since(self.since));
        let packets = new.packets_per_s;
        self.packets.add(packets, weight);
        self.flows.add(new.flows as f64, weight);
        self.bits.add(new.bits_per_s, weight);
        known.packets_per_s = self.packets.mean;
        known.flows = self.flows.mean.round() as u64;
        known.bits_per_s = self.bits.mean;
        let [inside, outside] = &mut self.elsewhere;
        blend(&mut known.inside, new.inside, packets, weight, inside);
        blend(&mut known.outside, new.outside, packets, weight, outside);
        (known.remote_rtt_us, known.updated) = (new.remote_rtt_us.or(known.remote_rtt_us), now);
    }
}

/// What a report counts that comes so long after the last, when the first was so long ago.
fn weight(step: Micros, age: Micros) -> f64 {
    let step = step.0 as f64;
    let time = (age.0 as f64).min(TIME.0 as f64);
    if step >= time { 1.0 } else { step / time }
}

/// Shares by ingress: the mean, until they are far from it for long. Neither has to sum to exactly 1.
fn blend(
    known: &mut BTreeMap<SiteId, f64>,
    new: BTreeMap<SiteId, f64>,
    packets: f64,
    weight: f64,
    elsewhere: &mut u8,
) {
    if new.is_empty() {
        return;
    }
    let gone: f64 = known.iter().map(|(site, share)| (share - new.get(site).unwrap_or(&0.0)).max(0.0)).sum();
    let far = gone > FAR_SHARE && packets >= SHARES_PACKETS_MIN;
    *elsewhere = if far { *elsewhere + 1 } else { 0 };
    if *elsewhere >= RUN_LEN || known.is_empty() || weight >= 1.0 {
        (*known, *elsewhere) = (new, 0);
        return;
    }
    known.values_mut().for_each(|share| *share *= 1.0 - weight);
    for (site, share) in new {
        *known.entry(site).or_insert(0.0) += weight * share;
    }
    known.retain(|_, share| *share >= SHARE_MIN);
    let sum: f64 = known.values().sum();
    known.values_mut().for_each(|share| *share /= sum);
}

#[cfg(test)]
mod tests {
    use flow::sample::Seeded;
    use proptest::prelude::*;

    use super::*;

    const HALF: u64 = 500_000;

    fn report(packets_per_s: f64, inside: &[(u8, f64)], n: u64) -> Demand {
        Demand {
            packets_per_s,
            flows: packets_per_s as u64 * 2,
            bits_per_s: packets_per_s * 8_000.0,
            inside: inside.iter().map(|(site, share)| (SiteId(*site), *share)).collect(),
            outside: BTreeMap::new(),
            remote_rtt_us: None,
            updated: Micros(n * HALF),
            since: Micros(0),
        }
    }

    fn known(reports: impl IntoIterator<Item = (f64, &'static [(u8, f64)])>) -> (Demand, Steady) {
        let mut reports = reports.into_iter().zip(0..);
        let ((packets, inside), _) = reports.next().unwrap();
        let mut known = report(packets, inside, 0);
        let mut steady = Steady::new(&known);
        for ((packets, inside), n) in reports {
            steady.add(&mut known, report(packets, inside, n));
        }
        (known, steady)
    }

    const HOME: &[(u8, f64)] = &[(1, 1.0)];

    #[test]
    fn bursts_are_smoothed_to_a_tenth() {
        let mut random = Seeded::new(7);
        let (known, _) = known((0..240).map(|_| (1_000.0 * (0.5 + random.fraction()), HOME)));
        // One report has a standard deviation of 289.
        assert!((known.packets_per_s - 1_000.0).abs() < 90.0, "{known:?}");
    }

    #[test]
    fn the_first_seconds_are_a_plain_mean() {
        let (known, _) = known([(100.0, HOME), (100.0, HOME), (103.0, HOME), (105.0, HOME)]);
        assert!((known.packets_per_s - 102.0).abs() < 1.7, "{known:?}");
    }

    #[test]
    fn a_surge_is_seen_after_three_seconds_and_one_report_is_none() {
        for after in [1_500.0, 20.0, 5_000.0] {
            let (changed, _) = known((0..100).map(|n| (if n < 94 { 1_000.0 } else { after }, HOME)));
            assert_eq!(changed.packets_per_s, after);
            let (odd, _) = known((0..100).map(|n| (if n == 90 { after } else { 1_000.0 }, HOME)));
            assert!((odd.packets_per_s - 1_000.0).abs() < 0.02 * after.max(1_000.0), "{odd:?}");
        }
    }

    #[test]
    fn traffic_that_comes_and_goes_is_not_none_after_a_pause() {
        let bursts = |n: u32| if n > 20 && n.is_multiple_of(4) { 100.0 } else { 0.0 };
        let (known, _) = known((0..800).map(|n| (bursts(n), HOME)));
        assert!((15.0..35.0).contains(&known.packets_per_s), "{known:?}");
    }

    #[test]
    fn clients_that_come_in_elsewhere_are_there_after_three_seconds() {
        let away: &[(u8, f64)] = &[(2, 1.0)];
        let (roamed, _) = known((0..100).map(|n| (1_000.0, if n < 94 { HOME } else { away })));
        assert_eq!(roamed.inside, BTreeMap::from([(SiteId(2), 1.0)]));
        let mixed: &[(u8, f64)] = &[(1, 0.9), (2, 0.1)];
        let (mean, _) = known((0..400).map(|n| (1_000.0, if n % 2 == 0 { HOME } else { mixed })));
        assert!((mean.inside[&SiteId(2)] - 0.05).abs() < 0.01, "{mean:?}");
    }

    #[test]
    fn reports_that_come_seldom_count_as_they_are() {
        let mut known = report(100.0, HOME, 0);
        let mut steady = Steady::new(&known);
        steady.add(&mut known, Demand { updated: Micros(900_000_000), ..report(700.0, &[(2, 1.0)], 0) });
        assert_eq!((known.packets_per_s, known.inside.len()), (700.0, 1));
        assert!(known.inside.contains_key(&SiteId(2)));
    }

    proptest! {
        /// Whatever comes: finite, within what was reported, and shares sum to 1.
        #[test]
        fn the_mean_is_within_what_was_reported(
            reports in proptest::collection::vec((0.0..1e9, 0u8..4, 0.0..1.0, 0u64..3_000_000), 1..60),
        ) {
            let mut at = 0;
            let mut made: Option<(Demand, Steady)> = None;
            let (mut least, mut most) = (f64::INFINITY, 0.0_f64);
            for (packets, site, share, later) in reports {
                at += later;
                let inside = [(site, share), (site + 1, 1.0 - share)];
                let new = Demand { updated: Micros(at), ..report(packets, &inside, 0) };
                (least, most) = (least.min(packets), most.max(packets));
                match &mut made {
                    None => made = Some((new.clone(), Steady::new(&new))),
                    Some((known, steady)) => steady.add(known, new),
                }
            }
            let (known, _) = made.unwrap();
            let slack = 1e-9 * most + 1e-9;
            prop_assert!(known.packets_per_s >= least - slack && known.packets_per_s <= most + slack);
            prop_assert!((known.inside.values().sum::<f64>() - 1.0).abs() < 1e-6);
        }
    }
}
