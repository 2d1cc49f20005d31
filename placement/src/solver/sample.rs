//! A sample of the groups by which prices are found roughly.
//!
//! Loads are uneven: one group may be a tenth of all. Every n-th group, each for n, would count it n times or not at all. So
//! a group is drawn with a chance in proportion to its size, by a step through their running sum, and stands for one step
//! of it; who is larger than a step is in the sample once, with its own size (systematic sampling with probability
//! proportional to size; Madow, Annals of Mathematical Statistics 20, 1949).

use super::instance::Instance;
use super::softmin::Units;

/// Looks at how many groups are larger than a step: each time that some are, the step of the rest is shorter.
const CERTAIN_ROUNDS: usize = 8;

/// Groups, and what each stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Drawn {
    pub(super) group: u32,
    /// In equivalents.
    pub(super) size: f32,
}

/// About so many groups, in their order.
pub(super) fn draw(instance: &Instance, units: Units, about: usize) -> Vec<Drawn> {
    let size = |group: usize| units.size(instance.weight[group], instance.demand[group]);
    let all = || (0..instance.groups()).map(|group| f64::from(size(group)));
    let mut step = all().sum::<f64>() / about.max(1) as f64;
    for _ in 0..CERTAIN_ROUNDS {
        let (certain, rest) = all()
            .fold((0_usize, 0.0), |(n, sum), one| if one >= step { (n + 1, sum) } else { (n, sum + one) });
        let next = rest / about.saturating_sub(certain).max(1) as f64;
        if certain == 0 || next >= step * 0.99 {
            break;
        }
        step = next;
    }
    let mut drawn = Vec::with_capacity(about + 1);
    let mut left = step * 0.5;
    for group in 0..instance.groups() {
        let size = size(group);
        if f64::from(size) >= step {
            drawn.push(Drawn { group: group as u32, size });
            continue;
        }
        left -= f64::from(size);
        if left < 0.0 {
            left += step;
            drawn.push(Drawn { group: group as u32, size: step as f32 });
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::instance::{Candidate, Group, Site};
    use super::*;

    fn instance(loads: &[f32]) -> Instance {
        let site = Site { capacity: [f64::INFINITY; 3], headroom: 0.0 };
        let mut instance = Instance::new(&[site]).unwrap();
        for &weight in loads {
            let candidates = &[Candidate { site: 0, cost_ms: 1.0 }][..];
            let (present, charge, left_out_ms, class) = (None, 0.0, f32::INFINITY, None);
            let demand = [weight, 0.0, 0.0];
            instance
                .push(&Group { weight, demand, present, charge, left_out_ms, class, candidates })
                .unwrap();
        }
        instance
    }

    proptest! {
        #[test]
        fn a_sample_weighs_what_all_weigh_and_heavy_groups_are_in_it_as_themselves(
            mut loads in proptest::collection::vec(1.0..10.0_f32, 500..1_500),
            heavy in proptest::collection::vec((0_usize..500, 0.01..3.0_f32), 0..6),
        ) {
            let all: f32 = loads.iter().sum();
            for &(at, share) in &heavy {
                loads[at] = all * share;
            }
            let instance = instance(&loads);
            let units = Units::of(&instance);
            let drawn = draw(&instance, units, 100);
            let sum: f64 = drawn.iter().map(|one| f64::from(one.size)).sum();
            let whole: f64 = loads.iter().map(|&load| f64::from(load)).sum();
            let step = drawn.iter().map(|one| one.size).fold(f32::INFINITY, f32::min);
            prop_assert!((sum - whole).abs() <= f64::from(step) * 1.01, "{sum} for {whole}");
            for &(at, _) in &heavy {
                let times: Vec<f32> = drawn.iter().filter(|one| one.group as usize == at).map(|one| one.size).collect();
                prop_assert!(times.len() == 1 && (times[0] / loads[at] - 1.0).abs() < 1e-5, "{times:?} for {}", loads[at]);
            }
            prop_assert!(drawn.len() <= 110 && drawn.windows(2).all(|two| two[0].group < two[1].group));
        }
    }
}
