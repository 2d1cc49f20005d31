use proptest::prelude::*;

use super::*;

/// Sites on a line, so many milliseconds apart.
fn line(at: &[f32]) -> Likeness {
    let mesh: Vec<Vec<f32>> = at.iter().map(|a| at.iter().map(|b| 2.0 + (a - b).abs()).collect()).collect();
    Likeness::new(&mesh, &[])
}

/// Sites on the equator at these degrees, with round trips as the line of distance has them.
fn equator(degrees: &[f64]) -> Likeness {
    let places: Vec<_> = degrees.iter().map(|degrees| Some((0.0, *degrees))).collect();
    let km = |a: f64, b: f64| ((a - b).abs() * 111.2) as f32;
    let mesh: Vec<Vec<f32>> =
        degrees.iter().map(|a| degrees.iter().map(|b| Line.ms(km(*a, *b))).collect()).collect();
    Likeness::new(&mesh, &places)
}

fn seen(site: usize, ms: f32) -> Seen {
    Seen { site, ms, sd_ms: 0.5 }
}

fn spot(degrees: f64) -> Option<Spot> {
    Some(Spot { at: (0.0, degrees), radius_km: 20.0 })
}

fn nearest(estimates: &[Estimate]) -> usize {
    (0..estimates.len()).min_by(|&a, &b| estimates[a].mean_ms.total_cmp(&estimates[b].mean_ms)).unwrap()
}

#[test]
fn a_place_that_is_like_no_site_is_not_nearer_than_the_triangle_allows() {
    // 70 ms from the first and 80 from the last, which are 170 apart; 90 and 208 ms from the second.
    let mesh = [vec![0.0, 90.0, 170.0], vec![90.0, 0.0, 208.0], vec![170.0, 208.0, 0.0]];
    let likeness = Likeness::new(&mesh, &[]);
    let estimates = likeness.estimate(None, &[seen(0, 70.0), seen(2, 80.0)], None);
    assert!(estimates[1].ms >= 0.7 * (208.0 - 80.0) - 0.1, "{estimates:?}");
    assert!(estimates[1].spread > 0.3, "and that is not sure: {estimates:?}");
}

#[test]
fn a_place_is_like_the_site_with_the_same_delays_but_for_its_own_stretch() {
    let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
    // At site 2, behind a line of 30 ms.
    let estimates = likeness.estimate(None, &[seen(0, 132.0), seen(3, 112.0)], None);
    assert_eq!(nearest(&estimates), 2);
    for (site, truth) in [(1, 92.0), (2, 31.0)] {
        let off = (ln(truth + OFFSET_MS) - ln(estimates[site].ms + OFFSET_MS)).abs();
        assert!(off < 2.0 * estimates[site].spread, "{truth}: {estimates:?}");
    }
    assert!(estimates[0].measured && estimates[0].ms == 132.0);
}

#[test]
fn what_was_measured_elsewhere_makes_sure_and_doubt_in_it_unsure() {
    let likeness = line(&[0.0, 40.0, 100.0, 180.0]);
    let unknown = likeness.estimate(None, &[], None);
    let once = likeness.estimate(None, &[seen(0, 42.0)], None);
    assert!(once[1].spread < unknown[1].spread, "{once:?} {unknown:?}");
    let doubtful = likeness.estimate(None, &[Seen { sd_ms: 20.0, ..seen(0, 42.0) }], None);
    assert!(
        doubtful[1].spread > once[1].spread && doubtful[0].spread > once[0].spread,
        "{doubtful:?} {once:?}"
    );
}

#[test]
fn the_map_says_where_to_go_before_anything_was_measured_and_not_that_it_is_sure() {
    let likeness = equator(&[0.0, 30.0, 60.0, 120.0]);
    let estimates = likeness.estimate(None, &[], spot(58.0));
    assert_eq!(nearest(&estimates), 2);
    assert!((0.2..0.8).contains(&estimates[2].spread), "{estimates:?}");
    assert_eq!(likeness.next(None, &[], spot(58.0)), Some(2));
}

#[test]
fn a_map_that_is_wrong_is_found_out() {
    let likeness = equator(&[0.0, 30.0, 60.0, 120.0]);
    // At the last site, and the map says at the first.
    let measured = [seen(0, Line.ms(120.0 * 111.2)), seen(1, Line.ms(90.0 * 111.2))];
    assert_eq!(nearest(&likeness.estimate(None, &measured, spot(0.0))), 3);
}

#[test]
fn where_nothing_is_like_a_place_the_map_is_shifted_to_what_the_sites_measure() {
    // A deployment on slow paths: all take twice as long as the line says.
    let degrees = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0];
    let km = |a: f64, b: f64| ((a - b).abs() * 111.2) as f32;
    let mesh: Vec<Vec<f32>> =
        degrees.iter().map(|a| degrees.iter().map(|b| 2.0 * Line.ms(km(*a, *b))).collect()).collect();
    let places: Vec<_> = degrees.iter().map(|degrees| Some((0.0, *degrees))).collect();
    let slow = Likeness::new(&mesh, &places).estimate(None, &[], spot(30.0));
    let plain = equator(&degrees).estimate(None, &[], spot(30.0));
    let times = slow[5].ms / plain[5].ms;
    assert!((1.5..2.3).contains(&times), "{times}: {slow:?} {plain:?}");
}

#[test]
fn places_that_were_measured_help_those_that_are_like_them() {
    // Of three sites far apart none is like places that are 60 from two of them and far from the third.
    let mesh = vec![vec![0.0, 100.0, 250.0], vec![100.0, 0.0, 250.0], vec![250.0, 250.0, 0.0]];
    let mut likeness = Likeness::new(&mesh, &[]);
    let alone = likeness.estimate(None, &[seen(0, 60.0)], None);
    for n in 0..20 {
        let full = likeness.estimate(None, &[seen(0, 60.0), seen(1, 60.0), seen(2, 220.0)], None);
        likeness.learn(n, &full, None);
    }
    let helped = likeness.estimate(None, &[seen(0, 60.0)], None);
    let off = |estimates: &[Estimate]| (estimates[1].ms - 60.0).abs() + (estimates[2].ms - 220.0).abs();
    assert!(off(&helped) < 0.5 * off(&alone), "{helped:?} {alone:?}");
}

#[test]
fn places_that_were_measured_far_away_say_little_of_one_here() {
    let mut likeness = equator(&[0.0, 30.0, 60.0, 120.0]);
    let before = likeness.estimate(None, &[], spot(0.0));
    for n in 0..50 {
        let there = likeness.estimate(None, &[seen(3, 5.0), seen(2, 60.0)], spot(120.0));
        likeness.learn(n, &there, spot(120.0));
    }
    let after = likeness.estimate(None, &[], spot(0.0));
    assert_eq!(nearest(&after), 0);
    assert!((after[0].mean_ms / before[0].mean_ms - 1.0).abs() < 0.3, "{after:?} {before:?}");
}

#[test]
fn probes_go_where_the_place_may_be_nearest_and_end() {
    let likeness = line(&[0.0, 40.0, 100.0, 180.0, 260.0]);
    let mut known: Vec<Seen> = Vec::new();
    let truth = [101.0, 61.0, 3.0, 79.0, 161.0];
    let mut order = Vec::new();
    while let Some(site) = likeness.next(None, &known, None) {
        order.push(site);
        known.push(seen(site, truth[site]));
    }
    assert_eq!(order.len(), 5);
    assert!(order[..3].contains(&2), "{order:?}");
}

#[test]
fn a_place_does_not_learn_from_itself_and_is_learned_once() {
    let mut likeness = line(&[0.0, 40.0, 100.0, 180.0]);
    let measured = [seen(0, 70.0), seen(3, 30.0)];
    let before = likeness.estimate(Some(7), &measured, None);
    for _ in 0..3 {
        likeness.learn(7, &before, None);
    }
    assert_eq!(likeness.learned.len(), 1);
    assert_eq!(likeness.estimate(Some(7), &measured, None), before);
    assert_ne!(likeness.estimate(Some(8), &measured, None), before);
}

#[test]
fn one_odd_route_does_not_hide_whom_a_place_is_like() {
    let likeness = line(&[0.0, 40.0, 100.0, 180.0, 260.0, 300.0]);
    // At site 1, but for a detour from site 3.
    let measured = [seen(0, 42.0), seen(2, 62.0), seen(3, 320.0), seen(4, 222.0)];
    let estimates = likeness.estimate(None, &measured, None);
    assert_eq!(nearest(&estimates), 1);
    assert!(estimates[1].ms < 20.0, "{estimates:?}");
}

#[test]
fn a_site_that_was_not_measured_is_chosen_only_if_it_is_surely_better() {
    let likeness = equator(&[0.0, 8.0, 60.0]);
    // By the map site 1 is a little nearer, but nobody knows.
    let estimates = likeness.estimate(None, &[seen(0, 17.0)], spot(4.2));
    assert!(estimates[1].ms < 17.0 && estimates[1].mean_ms > 17.0, "{estimates:?}");
    assert_eq!(nearest(&estimates), 0, "{estimates:?}");
}

#[test]
fn a_spot_whose_radius_is_none_says_nothing() {
    let likeness = equator(&[0.0, 8.0, 60.0]);
    for radius_km in [-1.0, -4.6e52, f64::NAN, f64::NEG_INFINITY, f64::INFINITY] {
        let odd = Some(Spot { at: (0.0, 7.0), radius_km });
        for known in [&[][..], &[seen(0, 0.0), seen(1, 0.0)]] {
            assert_eq!(likeness.estimate(None, known, odd), likeness.estimate(None, known, None), "{odd:?}");
            assert_eq!(likeness.next(None, known, odd), likeness.next(None, known, None), "{odd:?}");
        }
    }
}

proptest! {
    /// Whatever is given: finite, not negative, and the same again.
    #[test]
    fn estimates_are_finite_whatever_comes(
        mesh in proptest::collection::vec(proptest::collection::vec(any::<f32>(), 0..6), 0..6),
        places in proptest::collection::vec(proptest::option::of((any::<f64>(), -200.0..200.0)), 0..6),
        given in proptest::collection::vec((0usize..8, any::<f32>(), any::<f32>()), 0..16),
        at in proptest::option::of((-100.0..100.0, -200.0..200.0, any::<f64>())),
        learn in 0usize..3,
    ) {
        let mut likeness = Likeness::new(&mesh, &places);
        let given: Vec<Seen> = given.into_iter().map(|(site, ms, sd_ms)| Seen { site, ms, sd_ms }).collect();
        let spot = at.map(|(latitude, longitude, radius_km)| Spot { at: (latitude, longitude), radius_km });
        for n in 0..=learn {
            let estimates = likeness.estimate(None, &given, spot);
            prop_assert_eq!(estimates.len(), mesh.len());
            for estimate in &estimates {
                prop_assert!(estimate.ms.is_finite() && estimate.ms >= 0.0, "{:?}", estimate);
                prop_assert!(estimate.spread.is_finite() && estimate.spread >= 0.0, "{:?}", estimate);
                prop_assert!(estimate.mean_ms.is_finite() && estimate.mean_ms >= 0.0, "{:?}", estimate);
            }
            prop_assert_eq!(&estimates, &likeness.estimate(None, &given, spot));
            let next = likeness.next(None, &given, spot);
            prop_assert!(next.is_none_or(|next| next < mesh.len()));
            likeness.learn(n as u64, &estimates, spot);
        }
    }
}
