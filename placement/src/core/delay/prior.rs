//! What is thought of a delay that was not measured, from where its ends are.

use flow::Prefix;

use super::Guess;
use crate::likeness::{Line, OFFSET_MS};

/// Where addresses are. Unknown is `None`, never a guess.
pub trait Locate: Send + Sync {
    /// Latitude and longitude in degrees.
    fn locate(&self, prefix: &Prefix) -> Option<(f64, f64)>;

    /// The same, with how sure it is and whose network it is.
    fn place(&self, prefix: &Prefix) -> Place {
        Place { at: self.locate(prefix), radius_km: 0.0, network: None }
    }
}

/// What is known of where a prefix is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    /// Latitude and longitude in degrees.
    pub at: Option<(f64, f64)>,
    /// It is within so many kilometres of there.
    pub radius_km: f64,
    /// The number of its autonomous system.
    pub network: Option<u32>,
}

/// Light in fibre covers some 200 km per millisecond; routes are about half as long again as the great circle: kilometres in
/// a millisecond of one way. What a way has beside that is in [`Line`].
pub(crate) const KM_PER_MS: f64 = 133.0;
/// Kilometres that light covers in a millisecond; nothing is faster.
pub const LIGHT_KM_PER_MS: f64 = 299.792_458;
/// Standard deviation of the logarithm of a delay around the line: of 0.15 for a place, 0.15 for its region and 0.2 for each way.
pub(super) const LINE_SD_SHARE: f64 = 0.29;

/// One way over a great circle, between ends that are known to so many kilometres.
pub(super) fn line(km: f64, radius_km: f64) -> Guess {
    let ms = f64::from(Line.ms(km as f32)) / 2.0;
    let (share, radius) = (LINE_SD_SHARE * (ms + f64::from(OFFSET_MS) / 2.0), radius_km / KM_PER_MS);
    Guess { ms, variance: share * share + radius * radius }
}

/// Great-circle distance of two points (latitude, longitude in degrees) by the haversine formula.
#[must_use]
pub fn great_circle_km(a: (f64, f64), b: (f64, f64)) -> f64 {
    const EARTH_RADIUS_KM: f64 = 6371.0;
    let (lat_a, lat_b) = (a.0.to_radians(), b.0.to_radians());
    let half = |from: f64, to: f64| ((to - from) / 2.0).sin().powi(2);
    let lon = half(a.1.to_radians(), b.1.to_radians());
    let h = half(lat_a, lat_b) + lat_a.cos() * lat_b.cos() * lon;
    2.0 * EARTH_RADIUS_KM * h.sqrt().clamp(0.0, 1.0).asin()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn berlin_to_lisbon_is_2313_km() {
        let km = great_circle_km((52.52, 13.405), (38.7223, -9.1393));
        assert!((km - 2313.0).abs() < 5.0, "{km}");
        assert_eq!(great_circle_km((1.0, 1.0), (1.0, 1.0)), 0.0);
        assert!((great_circle_km((0.0, 0.0), (0.0, 180.0)) - 20015.0).abs() < 1.0);
    }

    #[test]
    fn the_line_is_less_sure_of_what_is_far_or_badly_known() {
        assert!(line(100.0, 0.0).variance < line(1_000.0, 0.0).variance);
        assert!(line(100.0, 20.0).variance < line(100.0, 400.0).variance);
        // 20 ms of a round trip by distance, and 16.5 ms more.
        assert!((line(1_330.0, 400.0).ms - 18.26).abs() < 0.01);
    }
}
