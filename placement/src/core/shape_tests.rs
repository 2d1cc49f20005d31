use proptest::prelude::*;

use super::super::brain_tests::{cluster, group_id};
use super::super::*;
use super::*;

fn of(packets_per_s: f64) -> Demand {
    let (inside, outside) = (BTreeMap::new(), BTreeMap::new());
    Demand {
        packets_per_s,
        flows: 0,
        bits_per_s: 0.0,
        inside,
        outside,
        remote_rtt_us: None,
        since: Micros(0),
        updated: Micros(0),
    }
}

/// A cluster whose log is fed with what the shaper wants, under a load per client address that the test gives.
struct Rig {
    cluster: Cluster,
    shaper: Shaper,
    now_s: u64,
    index: u64,
    done: Vec<(u64, Command)>,
}

impl Rig {
    fn new(split: Option<Split>) -> Self {
        let mut cluster = cluster();
        cluster.policy.split = split;
        Self { cluster, shaper: Shaper::default(), now_s: 1_000, index: 100, done: Vec::new() }
    }

    /// A second passes; `load` is packets per second of a client, by the last byte of its /24.
    fn second(&mut self, load: &dyn Fn(&GroupId) -> f64) {
        self.now_s += 1;
        let now = Micros::from_secs(self.now_s);
        let demand = |id: &GroupId| Some(of(load(id)));
        let known = Known { demand: &demand, rested: &|_| true };
        let wishes = self.shaper.wishes(&self.cluster, &known, now);
        assert!(wishes.len() <= SHAPES_PER_ROUND);
        for command in wishes {
            self.index += 1;
            let proposal =
                Proposal { actor: "leader".into(), at_ms: self.now_s * 1_000, command: command.clone() };
            self.cluster.apply(self.index, &proposal).result.unwrap();
            self.done.push((self.now_s, command));
        }
    }

    fn seconds(&mut self, s: u64, load: &dyn Fn(&GroupId) -> f64) {
        (0..s).for_each(|_| self.second(load));
    }
}

/// Sites carry 1,000 packets per second; one group has so many, evenly over its clients, the others none.
fn only_first(packets_per_s: f64) -> impl Fn(&GroupId) -> f64 {
    move |id| {
        let inside = group_id(0).prefix.covers(&id.prefix);
        if inside { packets_per_s * id.prefix.size() as f64 / 256.0 } else { 0.0 }
    }
}

#[test]
fn without_a_setting_nothing_splits_or_merges() {
    let mut rig = Rig::new(None);
    rig.seconds(1_000, &only_first(900.0));
    assert_eq!(rig.done, []);
}

#[test]
fn a_group_that_stays_hot_splits_after_its_time_and_so_do_hot_halves() {
    let mut rig = Rig::new(Some(Split::default()));
    rig.seconds(30, &only_first(90.0));
    assert_eq!(rig.done, []);
    rig.second(&only_first(90.0));
    assert_eq!(rig.done, [(1_031, Command::SplitGroup { group: group_id(0) })]);
    rig.seconds(200, &only_first(90.0));
    assert_eq!(rig.done.len(), 1, "halves have 45 each, below the 50 that are too much");
    let mut rig = Rig::new(Some(Split::default()));
    rig.seconds(200, &only_first(190.0));
    assert_eq!(rig.done.len(), 3, "halves of 95 split again: {:?}", rig.done);
}

#[test]
fn a_load_that_comes_and_goes_is_no_reason() {
    let mut rig = Rig::new(Some(Split::default()));
    for _ in 0..20 {
        rig.seconds(29, &only_first(90.0));
        rig.second(&only_first(40.0));
    }
    assert_eq!(rig.done, []);
}

#[test]
fn halves_that_stay_cold_merge_but_not_beyond_the_cut() {
    let mut rig = Rig::new(Some(Split::default()));
    rig.seconds(31, &only_first(90.0));
    assert_eq!(rig.done.len(), 1);
    rig.seconds(300, &only_first(5.0));
    assert_eq!(rig.done.len(), 1);
    rig.seconds(2, &only_first(5.0));
    assert_eq!(rig.done.last().unwrap().1, Command::MergeGroups { group: group_id(0) });
    rig.seconds(1_000, &only_first(0.0));
    assert_eq!(rig.done.len(), 2);
}

#[test]
fn a_group_that_moves_or_has_just_moved_is_left_alone() {
    let mut rig = Rig::new(Some(Split::default()));
    let hot = |_: &GroupId| Some(of(90.0));
    for s in 0..100 {
        let known = Known { demand: &hot, rested: &|_| false };
        assert_eq!(rig.shaper.wishes(&rig.cluster, &known, Micros::from_secs(s)), []);
    }
    let id = flow::MoveId(7);
    rig.cluster.groups.get_mut(&group_id(0)).unwrap().move_id = Some(id);
    for s in 0..31 {
        let known = Known { demand: &hot, rested: &|_| true };
        let wishes = rig.shaper.wishes(&rig.cluster, &known, Micros::from_secs(s));
        assert!(!wishes.contains(&Command::SplitGroup { group: group_id(0) }), "{wishes:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Each group has a mean of its own, and sways around it by less than a factor of two, fast or slowly.
    #[test]
    fn a_load_that_sways_never_makes_a_group_split_and_merge_in_turn(
        means in prop::collection::vec(0.0_f64..400.0, 4),
        period in 2.0_f64..2_000.0,
        sway in 0.0_f64..0.32,
    ) {
        let mut rig = Rig::new(Some(Split::default()));
        for s in 0..3_000_u32 {
            let phase = 1.0 + sway * (f64::from(s) * std::f64::consts::TAU / period).sin();
            let load = |id: &GroupId| {
                let mean = (0..4).find(|n| group_id(*n).prefix.covers(&id.prefix)).map_or(0.0, |n| means[usize::from(n)]);
                mean * phase * id.prefix.size() as f64 / 256.0
            };
            rig.second(&load);
        }
        let merges = rig.done.iter().filter(|(_, command)| matches!(command, Command::MergeGroups { .. }));
        prop_assert_eq!(merges.count(), 0, "{:?}", rig.done);
        let late = rig.done.iter().find(|(at, _)| *at > 1_000 + 2_500);
        prop_assert!(late.is_none() || period > 200.0, "{:?}", rig.done);
    }
}
