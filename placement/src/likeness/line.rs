//! What a round trip has over a distance, before anything was measured.

/// Round trips are as long as light in fibre takes over a route half as long again as the great circle, and something more. How much
/// more follows from measurements between hosts all over the world: medians of 7.5 ms up to 300 km, 13 to 1,000, 20 to 3,000, 28 to
/// 6,000, and 32 beyond, here at the middle of each range.
const EXCESS: [(f32, f32); 7] = [
    (0.0, 4.0),
    (150.0, 7.5),
    (650.0, 13.0),
    (2_000.0, 20.0),
    (4_500.0, 28.0),
    (9_000.0, 32.0),
    (20_100.0, 32.0),
];
/// Kilometres of great circle in a millisecond of a round trip.
pub(super) const KM_PER_MS: f32 = 66.5;

/// Round trip over distance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line;

impl Line {
    /// Milliseconds there and back, as often more as less.
    pub(crate) fn ms(self, km: f32) -> f32 {
        let km = km.clamp(0.0, 20_099.0);
        let at = EXCESS.iter().rposition(|(from, _)| *from <= km).unwrap_or(0).min(EXCESS.len() - 2);
        let ((from, low), (to, high)) = (EXCESS[at], EXCESS[at + 1]);
        km / KM_PER_MS + low + (high - low) * (km - from) / (to - from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_published_excess_and_never_falls() {
        for (km, excess) in [(150.0, 7.5), (650.0, 13.0), (2_000.0, 20.0), (4_500.0, 28.0), (15_000.0, 32.0)]
        {
            assert!((Line.ms(km) - km / KM_PER_MS - excess).abs() < 0.01, "{km}: {}", Line.ms(km));
        }
        let all: Vec<f32> = (0..300_u16).map(|step| Line.ms(f32::from(step) * 70.0)).collect();
        assert!(all.windows(2).all(|pair| pair[0] <= pair[1]), "{all:?}");
        assert!(Line.ms(f32::MAX).is_finite() && Line.ms(-1.0) == 4.0);
    }
}
