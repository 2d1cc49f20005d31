//! Places of addresses from a MaxMind DB file: the nested GeoIP2 schema and flat ones.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, mpsc};
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
    looking: Mutex<Option<Looking>>,
}

struct Present {
    reader: Reader<Vec<u8>>,
    stamp: Option<Stamp>,
}

/// When the file was last written, and its length, as they were when it was looked at.
type Stamp = (SystemTime, u64);

/// A thread looks at the file. One at a time: one that never comes back is the last.
struct Looking {
    answer: mpsc::Receiver<Option<Changed>>,
    /// It was said that it takes long.
    said: bool,
}

/// Another file than before.
struct Changed {
    stamp: Stamp,
    reader: Result<Reader<Vec<u8>>, GeoError>,
}

fn stamp(path: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len()))
}

fn read(path: &Path) -> Result<Reader<Vec<u8>>, GeoError> {
    let error = |reason: String| GeoError { path: path.display().to_string(), reason };
    // To open a FIFO would be to wait for whoever writes.
    let is_file = std::fs::metadata(path).map_err(|cause| error(cause.to_string()))?.is_file();
    if !is_file {
        return Err(error("it is no regular file".to_owned()));
    }
    Reader::open_readfile(path).map_err(|cause| error(cause.to_string()))
}

/// Whether a file can be used.
///
/// # Errors
/// [`GeoError`].
pub fn check(path: &Path) -> Result<(), GeoError> {
    read(path).map(drop)
}

/// Looks at the file, and reads it if it is another one than before.
fn look(path: &Path, before: Option<Stamp>) -> Option<Changed> {
    let stamp = stamp(path).filter(|stamp| Some(*stamp) != before)?;
    Some(Changed { stamp, reader: read(path) })
}

impl Geo {
    /// Reads a file, and says in the log if it has no places.
    ///
    /// # Errors
    /// [`GeoError`].
    pub fn open(path: &Path) -> Result<Self, GeoError> {
        // Looked at before it is read: what is written meanwhile is read again.
        let stamp = stamp(path);
        let present = RwLock::new(Present { reader: read(path)?, stamp });
        let geo = Self { path: path.to_owned(), present, looking: Mutex::new(None) };
        geo.warn();
        Ok(geo)
    }

    /// Takes what the last look at the file brought, if it has ended, and begins the next: nothing is waited for. True if
    /// there was another file. One that cannot be used is left alone until it changes again.
    ///
    /// # Errors
    /// [`GeoError`], once for each change of the file, and for a look that takes long. The former content stays in use.
    pub fn refresh(&self) -> Result<bool, GeoError> {
        let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match looking.as_mut().map(|looking| (looking.answer.try_recv(), looking)) {
            Some((Err(mpsc::TryRecvError::Empty), looking)) => {
                return if std::mem::replace(&mut looking.said, true) {
                    Ok(false)
                } else {
                    Err(self.silent())
                };
            }
            Some((found, _)) => found.ok().flatten(),
            None => None,
        };
        let taken = self.take(found);
        *looking = self.begin();
        taken
    }

    fn begin(&self) -> Option<Looking> {
        let (found, answer) = mpsc::sync_channel(1);
        let path = self.path.clone();
        let before = self.present.read().unwrap_or_else(PoisonError::into_inner).stamp;
        let thread = std::thread::Builder::new().name("places".into());
        // Nobody waits any more when the node has ended. Without a thread the next time is as good.
        let begun = thread.spawn(move || drop(found.send(look(&path, before))));
        begun.ok().map(|_| Looking { answer, said: false })
    }

    fn take(&self, found: Option<Changed>) -> Result<bool, GeoError> {
        let Some(Changed { stamp, reader }) = found else { return Ok(false) };
        let mut present = self.present.write().unwrap_or_else(PoisonError::into_inner);
        present.stamp = Some(stamp);
        present.reader = reader?;
        drop(present);
        self.warn();
        Ok(true)
    }

    fn silent(&self) -> GeoError {
        let reason = "it was not read since it was looked at last: does its file system answer?".to_owned();
        GeoError { path: self.path.display().to_string(), reason }
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

    /// A file with one network at 1 degree north, and so many degrees east.
    fn written_at(path: &Path, east: f64) {
        let city = map(&[("lat", Item::Double(1.0)), ("lng", Item::Double(east))]);
        std::fs::write(path, file("GeoLite2-City", "203.0.113.0/24", &city)).unwrap();
    }

    /// Looks at the file, and waits for it.
    fn refreshed(geo: &Geo) -> Result<bool, GeoError> {
        let before = geo.present.read().unwrap().stamp;
        geo.take(look(&geo.path, before))
    }

    #[test]
    fn a_file_that_is_replaced_is_read_again_and_a_broken_one_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("places.mmdb");
        written_at(&path, 2.0);
        let geo = Geo::open(&path).unwrap();
        let known = || geo.locate(&"203.0.113.0/28".parse().unwrap()).is_some();
        assert!(!refreshed(&geo).unwrap() && known());
        std::fs::remove_file(&path).unwrap();
        assert!(!refreshed(&geo).unwrap() && known(), "between two files the former one is used");
        std::fs::write(&path, "no database").unwrap();
        assert!(refreshed(&geo).is_err() && known());
        assert!(!refreshed(&geo).unwrap() && known(), "said once");
        std::fs::remove_file(&path).unwrap();
        written_at(&path, 3.0);
        assert!(refreshed(&geo).unwrap() && known());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = refreshed(&geo).unwrap_err().to_string();
        assert!(error.ends_with("it is no regular file") && known(), "{error}");
        assert!(!refreshed(&geo).unwrap(), "said once");
    }

    /// Repeats a step until it says that it is done.
    fn until(what: &str, mut step: impl FnMut() -> bool) {
        for _ in 0..6_000 {
            if step() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{what}: not within a minute");
    }

    #[test]
    fn nobody_waits_for_a_look_at_the_file_and_a_silent_one_has_one_thread_and_is_said_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("places.mmdb");
        written_at(&path, 2.0);
        let geo = Geo::open(&path).unwrap();
        let (silent, answer) = mpsc::sync_channel(1);
        *geo.looking.lock().unwrap() = Some(Looking { answer, said: false });
        let error = geo.refresh().unwrap_err().to_string();
        assert!(error.contains("places.mmdb") && error.contains("does its file system answer?"), "{error}");
        assert!((0..10).all(|_| !geo.refresh().unwrap()));
        // The look is still the same one: it is taken when it ends, and others follow.
        std::fs::remove_file(&path).unwrap();
        written_at(&path, 33.0);
        silent.send(None).unwrap();
        until("a new file is in use", || geo.refresh().unwrap_or_default());
        assert_eq!(geo.place(&"203.0.113.0/28".parse().unwrap()).at, Some((1.0, 33.0)));
        // Where a pipe takes its place, the former content stays, and looks come back.
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let refused = || geo.refresh().is_err_and(|error| error.reason == "it is no regular file");
        until("the pipe is refused", refused);
        assert_eq!(geo.place(&"203.0.113.0/28".parse().unwrap()).at, Some((1.0, 33.0)));
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let error = Geo::open(Path::new("Cargo.toml")).err().unwrap();
        assert!(error.to_string().starts_with("cannot use Cargo.toml"));
    }
}
