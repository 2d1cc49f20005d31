//! Places of addresses from a MaxMind DB file: the nested GeoIP2 schema and flat ones.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use flow::Prefix;
use maxminddb::{LookupResult, PathElement, Reader, WithinOptions};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};

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
    /// Reads a file, and says in the log if it has no places.
    ///
    /// # Errors
    /// [`GeoError`].
    pub fn open(path: &Path) -> Result<Self, GeoError> {
        // Looked at before it is read: what is written meanwhile is read again.
        let stamp = stamp(path);
        let present = Present { reader: read(path)?, stamp };
        let geo = Self { path: path.to_owned(), present: RwLock::new(present) };
        geo.warn();
        Ok(geo)
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
        drop(present);
        self.warn();
        Ok(true)
    }
}

/// Tables in which coordinates are found: GeoIP2 nests them, others have them at the top.
const TABLES: [&[PathElement<'static>]; 2] = [&[PathElement::Key("location")], &[]];
/// Names of a latitude and of a longitude.
const LATITUDES: [&str; 2] = ["latitude", "lat"];
const LONGITUDES: [&str; 4] = ["longitude", "lon", "lng", "long"];

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
/// Networks that are looked at to find out what a file has. One in so many has a place in every file of places; the look
/// takes milliseconds.
const LOOKED_AT: usize = 20_000;

/// A value of any type that a file may have it in: numbers come as doubles, floats and integers of five kinds, and numbers
/// and flags as texts.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Number(f64),
    Flag(bool),
    Text(String),
}

impl Value {
    fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.trim().parse().ok(),
            Self::Flag(_) => None,
        }
    }

    fn flag(&self) -> bool {
        match self {
            Self::Flag(flag) => *flag,
            Self::Number(number) => *number != 0.0,
            Self::Text(text) => ["true", "yes", "1"].iter().any(|yes| text.trim().eq_ignore_ascii_case(yes)),
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range and whole")]
    fn network(&self) -> Option<u32> {
        match self {
            Self::Number(number) if number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(number) => {
                Some(*number as u32)
            }
            Self::Text(text) => {
                let text = text.trim();
                let digits = text
                    .get(..2)
                    .filter(|start| start.eq_ignore_ascii_case("as"))
                    .map_or(text, |_| &text[2..]);
                digits.parse().ok()
            }
            Self::Number(_) | Self::Flag(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, a flag or a text")
            }

            fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
                Ok(Value::Flag(flag))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
                Ok(Value::Number(number))
            }

            #[expect(
                clippy::cast_precision_loss,
                reason = "degrees, kilometres and network numbers are small"
            )]
            fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
                Ok(Value::Number(number as f64))
            }

            #[expect(
                clippy::cast_precision_loss,
                reason = "degrees, kilometres and network numbers are small"
            )]
            fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
                Ok(Value::Number(number as f64))
            }

            #[expect(
                clippy::cast_precision_loss,
                reason = "degrees, kilometres and network numbers are small"
            )]
            fn visit_u128<E>(self, number: u128) -> Result<Value, E> {
                Ok(Value::Number(number as f64))
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// What a record of a file says, whatever its schema.
fn place_in(found: &LookupResult<'_, Vec<u8>>) -> Place {
    let value = |path: &[PathElement<'_>]| found.decode_path::<Value>(path).ok().flatten();
    let number = |path: &[PathElement<'_>]| value(path)?.number();
    let named = |table: &[PathElement<'static>], names: &[&'static str]| {
        names.iter().find_map(|name| number(&[table, &[PathElement::Key(name)]].concat()))
    };
    let radius_km = RADIUS.into_iter().find_map(number).unwrap_or(0.0);
    let anycast = ANYCAST.iter().any(|path| value(path).is_some_and(|value| value.flag()));
    let at = TABLES.iter().find_map(|table| named(table, &LATITUDES).zip(named(table, &LONGITUDES)));
    // The middle of the sea off Ghana stands for "unknown" in some files.
    let at = at.filter(|at| *at != (0.0, 0.0) && at.0.abs() <= 90.0 && at.1.abs() <= 180.0);
    let at = at.filter(|_| !anycast && (0.0..=RADIUS_KM_MAX).contains(&radius_km));
    Place { at, radius_km, network: NETWORK.into_iter().find_map(|path| value(path)?.network()) }
}

/// What is to be said of a file that has no places, such as one of countries or of autonomous systems.
fn lacks(path: &Path, reader: &Reader<Vec<u8>>) -> Option<String> {
    let looked_at = reader.networks(WithinOptions::default()).ok()?.take(LOOKED_AT);
    let mut numbers = false;
    for found in looked_at.flatten() {
        let place = place_in(&found);
        if place.at.is_some() {
            return None;
        }
        numbers |= place.network.is_some();
    }
    let instead = if numbers {
        "only numbers of autonomous systems are read from it"
    } else {
        "nothing is read from it"
    };
    Some(format!(
        "{} has no places (latitude and longitude); its type is {:?}: {instead}. Use a file of cities, or leave the key \
         `locations` out",
        path.display(),
        reader.metadata().database_type
    ))
}

impl Geo {
    /// What is to be said of the file in use, if it has no places.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        lacks(&self.path, &self.present.read().unwrap_or_else(PoisonError::into_inner).reader)
    }

    fn warn(&self) {
        if let Some(warning) = self.warning() {
            tracing::warn!("{warning}");
        }
    }
}

impl Locate for Geo {
    fn locate(&self, prefix: &Prefix) -> Option<(f64, f64)> {
        self.place(prefix).at
    }

    fn place(&self, prefix: &Prefix) -> Place {
        let present = self.present.read().unwrap_or_else(PoisonError::into_inner);
        present.reader.lookup(prefix.address()).map_or_else(|_| Place::default(), |found| place_in(&found))
    }
}

#[cfg(test)]
mod written;

#[cfg(test)]
mod tests {
    use super::written::{Item, file};
    use super::*;

    /// The place that a file of one network with this record has for it.
    fn place(record: Item) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("written.mmdb");
        std::fs::write(&path, file("Test", "203.0.113.0/24", &record)).unwrap();
        Geo::open(&path).unwrap().place(&"203.0.113.0/24".parse().unwrap())
    }

    fn map(entries: &[(&'static str, Item)]) -> Item {
        Item::Map(entries.to_vec())
    }

    #[test]
    fn coordinates_are_read_by_every_name_and_of_every_type() {
        let text = |text: &'static str| Item::Text(text);
        for (lat, lon, at) in [
            (("latitude", Item::Double(58.5)), ("longitude", Item::Double(15.25)), (58.5, 15.25)),
            (("lat", Item::Float(58.5)), ("lng", Item::Float(-15.25)), (58.5, -15.25)),
            (("lat", text("58.5")), ("lon", text(" -15.25 ")), (58.5, -15.25)),
            (("lat", Item::Int32(-58)), ("lng", Item::U16(15)), (-58.0, 15.0)),
            (("lat", Item::U32(58)), ("long", Item::U64(15)), (58.0, 15.0)),
        ] {
            assert_eq!(place(map(&[lat.clone(), lon.clone()])).at, Some(at), "{lat:?} {lon:?}");
            let nested = map(&[("location", map(&[lat.clone(), lon.clone()]))]);
            assert_eq!(place(nested).at, Some(at), "{lat:?} {lon:?} in a table");
        }
        let half = map(&[("lat", Item::Double(1.0))]);
        assert_eq!(place(half).at, None);
        let beyond = map(&[("lat", Item::Double(91.0)), ("lng", Item::Double(1.0))]);
        assert_eq!(place(beyond).at, None);
    }

    #[test]
    fn an_anycast_address_has_no_place_however_that_is_written() {
        let with = |key: &'static str, value: Item| {
            place(map(&[("lat", Item::Double(1.0)), ("lng", Item::Double(2.0)), (key, value)]))
        };
        for value in [Item::Flag(true), Item::Text("true"), Item::Text("True"), Item::Text("1"), Item::U32(1)]
        {
            assert_eq!(with("is_anycast", value.clone()).at, None, "{value:?}");
            assert_eq!(with("traits", map(&[("is_anycast", value)])).at, None);
        }
        for value in [Item::Flag(false), Item::Text("false"), Item::Text(""), Item::U16(0)] {
            assert_eq!(with("is_anycast", value.clone()).at, Some((1.0, 2.0)), "{value:?}");
        }
        for value in [Item::U32(900), Item::U64(900), Item::Int32(900), Item::Text("900"), Item::Float(900.0)]
        {
            assert_eq!(with("accuracy_radius", value.clone()).at, None, "{value:?}");
        }
        for value in [Item::U32(64_500), Item::U64(64_500), Item::Text("AS64500"), Item::Text("as64500")] {
            assert_eq!(with("asn", value.clone()).network, Some(64_500), "{value:?}");
        }
    }

    #[test]
    fn a_file_without_places_is_said_to_have_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("written.mmdb");
        let warning = |kind: &str, record: Item| {
            std::fs::write(&path, file(kind, "203.0.113.0/24", &record)).unwrap();
            Geo::open(&path).unwrap().warning()
        };
        let country = map(&[("country", map(&[("iso_code", Item::Text("SE"))]))]);
        let said = warning("GeoLite2-Country", country).unwrap();
        assert!(said.contains("has no places") && said.contains("\"GeoLite2-Country\": nothing"), "{said}");
        let network = map(&[("autonomous_system_number", Item::U32(64_500))]);
        let said = warning("GeoLite2-ASN", network).unwrap();
        assert!(said.contains("\"GeoLite2-ASN\": only numbers of autonomous systems"), "{said}");
        let city = map(&[("lat", Item::Double(1.0)), ("lng", Item::Double(2.0))]);
        assert_eq!(warning("GeoLite2-City", city), None);
    }

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
