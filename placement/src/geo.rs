//! Places of addresses from a MaxMind DB file: the nested GeoIP2 schema and flat ones.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use flow::Prefix;
use maxminddb::{PathElement, Reader};

use crate::core::delay::{Locate, Place};

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path} as a MaxMind DB: {reason}")]
pub struct GeoError {
    /// The file.
    pub path: String,
    /// Why.
    pub reason: String,
}

/// An open file, held in memory. A file that is replaced is read anew by [`Geo::refresh`].
pub struct Geo {
    path: PathBuf,
    present: RwLock<Present>,
}

struct Present {
    reader: Reader<Vec<u8>>,
    /// When the file was last written, and its length, as they were when it was looked at.
    stamp: Option<(SystemTime, u64)>,
}

fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len()))
}

fn read(path: &Path) -> Result<Reader<Vec<u8>>, GeoError> {
    Reader::open_readfile(path)
        .map_err(|error| GeoError { path: path.display().to_string(), reason: error.to_string() })
}

impl Geo {
    /// Reads a file.
    ///
    /// # Errors
    /// [`GeoError`].
    pub fn open(path: &Path) -> Result<Self, GeoError> {
        // Looked at before it is read: what is written meanwhile is read again.
        let stamp = stamp(path);
        let present = Present { reader: read(path)?, stamp };
        Ok(Self { path: path.to_owned(), present: RwLock::new(present) })
    }

    /// Reads the file again if it is another one; true if it was. One that cannot be used is left alone until it
    /// changes again.
    ///
    /// # Errors
    /// [`GeoError`], once for each change of the file. The former content stays in use.
    pub fn refresh(&self) -> Result<bool, GeoError> {
        let stamp = stamp(&self.path);
        if stamp.is_none() || stamp == self.present.read().unwrap_or_else(PoisonError::into_inner).stamp {
            return Ok(false);
        }
        let reader = read(&self.path);
        let mut present = self.present.write().unwrap_or_else(PoisonError::into_inner);
        present.stamp = stamp;
        present.reader = reader?;
        Ok(true)
    }
}

/// Where coordinates are found: GeoIP2 nests them, others have short or long names at the top.
const SCHEMAS: [[&[PathElement<'static>]; 2]; 3] = [
    [
        &[PathElement::Key("location"), PathElement::Key("latitude")],
        &[PathElement::Key("location"), PathElement::Key("longitude")],
    ],
    [&[PathElement::Key("latitude")], &[PathElement::Key("longitude")]],
    [&[PathElement::Key("lat")], &[PathElement::Key("lon")]],
];

/// How far from its coordinates a network may be, in kilometres.
const RADIUS: [&[PathElement<'static>]; 2] = [
    &[PathElement::Key("location"), PathElement::Key("accuracy_radius")],
    &[PathElement::Key("accuracy_radius")],
];
/// An address that many places announce has no place.
const ANYCAST: [&[PathElement<'static>]; 2] =
    [&[PathElement::Key("traits"), PathElement::Key("is_anycast")], &[PathElement::Key("is_anycast")]];
/// The number of the autonomous system: as a number, or as a text such as `AS64500`.
const NETWORK: [&[PathElement<'static>]; 4] = [
    &[PathElement::Key("traits"), PathElement::Key("autonomous_system_number")],
    &[PathElement::Key("autonomous_system_number")],
    &[PathElement::Key("as_number")],
    &[PathElement::Key("asn")],
];
/// Within so many kilometres a place is one; beyond, it is the middle of a country.
const RADIUS_KM_MAX: f64 = 500.0;

impl Locate for Geo {
    fn locate(&self, prefix: &Prefix) -> Option<(f64, f64)> {
        self.place(prefix).at
    }

    fn place(&self, prefix: &Prefix) -> Place {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        let Ok(found) = present.reader.lookup(prefix.address()) else { return Place::default() };
        let number = |path: &[PathElement<'_>]| {
            let text = || found.decode_path::<String>(path).ok().flatten()?.parse().ok();
            // Each kind of number is one of its own in the file.
            let small = || found.decode_path::<u16>(path).ok().flatten().map(f64::from);
            let whole = || found.decode_path::<u32>(path).ok().flatten().map(f64::from);
            found.decode_path::<f64>(path).ok().flatten().or_else(small).or_else(whole).or_else(text)
        };
        let network = |path: &[PathElement<'_>]| {
            let text = || found.decode_path::<String>(path).ok().flatten();
            let number = found.decode_path::<u32>(path).ok().flatten();
            number.or_else(|| text()?.trim_start_matches("AS").parse().ok())
        };
        let radius_km = RADIUS.into_iter().find_map(number).unwrap_or(0.0);
        let anycast = ANYCAST.iter().any(|path| found.decode_path::<bool>(path).ok().flatten() == Some(true));
        let at = SCHEMAS.iter().find_map(|[lat, lon]| number(lat).zip(number(lon)));
        // The middle of the sea off Ghana stands for "unknown" in some files.
        let at = at.filter(|at| *at != (0.0, 0.0) && at.0.abs() <= 90.0 && at.1.abs() <= 180.0);
        let at = at.filter(|_| !anycast && (0.0..=RADIUS_KM_MAX).contains(&radius_km));
        Place { at, radius_km, network: NETWORK.into_iter().find_map(network) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The public test file, if it lies where `LIMOSA_DATA` or the neighbour `shared/data` says.
    fn test_file() -> Option<PathBuf> {
        let near = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
        let dir = std::env::var_os("LIMOSA_DATA").map_or_else(near, PathBuf::from);
        let file = dir.join("GeoLite2-City-Test.mmdb");
        if file.exists() {
            return Some(file);
        }
        eprintln!("skipped: {} is missing; set LIMOSA_DATA to its directory", file.display());
        None
    }

    #[test]
    fn known_prefixes_have_a_place_and_unknown_ones_have_none() {
        let Some(file) = test_file() else { return };
        let geo = Geo::open(&file).unwrap();
        let (lat, lon) = geo.locate(&"89.160.20.112/28".parse().unwrap()).unwrap();
        assert!((lat - 58.4).abs() < 0.2 && (lon - 15.6).abs() < 0.2, "Linköping, not {lat} {lon}");
        assert_eq!(geo.locate(&"100.64.0.0/24".parse().unwrap()), None);
        assert_eq!(geo.place(&"89.160.20.112/28".parse().unwrap()).radius_km, 76.0);
    }

    #[test]
    fn a_place_that_may_be_far_away_is_none() {
        let Some(file) = test_file() else { return };
        let geo = Geo::open(&file).unwrap();
        for text in
            ["2.125.160.216/29", "81.2.69.160/27", "216.160.83.56/29", "67.43.156.0/24", "202.196.224.0/20"]
        {
            let place = geo.place(&text.parse().unwrap());
            eprintln!("{text} {place:?}");
            assert!(place.at.is_none() || place.radius_km <= RADIUS_KM_MAX, "{text} {place:?}");
        }
    }

    #[test]
    fn a_file_that_is_replaced_is_read_again_and_a_broken_one_is_not_used() {
        let Some(file) = test_file() else { return };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("places.mmdb");
        std::fs::copy(&file, &path).unwrap();
        let geo = Geo::open(&path).unwrap();
        let known = || geo.locate(&"89.160.20.112/28".parse().unwrap()).is_some();
        assert!(!geo.refresh().unwrap() && known());
        std::fs::remove_file(&path).unwrap();
        assert!(!geo.refresh().unwrap() && known(), "between two files the former one is used");
        std::fs::write(&path, "no database").unwrap();
        assert!(geo.refresh().is_err() && known());
        assert!(!geo.refresh().unwrap() && known(), "said once");
        std::fs::remove_file(&path).unwrap();
        std::fs::copy(&file, &path).unwrap();
        assert!(geo.refresh().unwrap() && known());
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let error = Geo::open(Path::new("Cargo.toml")).err().unwrap();
        assert!(error.to_string().starts_with("cannot use Cargo.toml"));
    }
}
