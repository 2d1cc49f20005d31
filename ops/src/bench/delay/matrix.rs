//! A matrix of round trips from a file.

use std::path::Path;

/// Most hosts of a matrix.
const HOSTS_MAX: usize = 20_000;
/// Words for a round trip that is not known, beside numbers below 0.
const UNKNOWN: [&str; 5] = ["-", "?", "x", "nan", "nil"];
/// Half of the round trips of any network are shorter; those of a matrix in microseconds are not.
const MEDIAN_MAX_MS: f32 = 2_000.0;

/// Round trips between hosts, and where these are.
pub(super) struct Matrix {
    hosts: usize,
    /// Milliseconds; not a number where neither direction is known.
    ms: Vec<f32>,
    /// Latitude and longitude, by host; empty without a file of them.
    places: Vec<Option<(f64, f64)>>,
}

impl Matrix {
    pub(super) fn read(matrix: &Path, coordinates: Option<&Path>) -> Result<Self, String> {
        let text = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|error| format!("{}: cannot be read: {error}", path.display()))
        };
        let places = coordinates.map(text).transpose()?;
        Self::parse(&text(matrix)?, places.as_deref())
            .map_err(|error| format!("{}: {error}", matrix.display()))
    }

    /// Of two directions the mean is taken, or the one that is known.
    pub(super) fn parse(text: &str, coordinates: Option<&str>) -> Result<Self, String> {
        let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
        let lines: Vec<(usize, &str)> =
            lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).collect();
        let hosts = lines.len();
        if !(3..=HOSTS_MAX).contains(&hosts) {
            return Err(format!("{hosts} lines with numbers: give one per host, 3 to {HOSTS_MAX}"));
        }
        let mut given: Vec<f32> = Vec::with_capacity(hosts * hosts);
        for (n, line) in lines {
            let before = given.len();
            for word in line.split_whitespace() {
                given.push(number(word).map_err(|error| format!("line {n}: {error}"))?);
            }
            let len = given.len() - before;
            if len != hosts {
                return Err(format!("line {n} has {len} numbers: give {hosts}, one per line with numbers"));
            }
            let own = given[before + before / hosts];
            if own > 0.0 {
                return Err(format!(
                    "line {n}: number {} is {own}: a host is 0 ms from itself",
                    before / hosts + 1
                ));
            }
        }
        let known = |a: usize, b: usize| Some(given[a * hosts + b]).filter(|ms| *ms >= 0.0 && ms.is_finite());
        let both = |a: usize, b: usize| match (known(a, b), known(b, a)) {
            (Some(there), Some(back)) => f32::midpoint(there, back),
            (one, other) => one.or(other).unwrap_or(f32::NAN),
        };
        let ms: Vec<f32> =
            (0..hosts).flat_map(|a| (0..hosts).map(move |b| (a, b))).map(|(a, b)| both(a, b)).collect();
        check_median(&ms)?;
        let places = coordinates.map_or(Ok(Vec::new()), |text| places(text, hosts))?;
        Ok(Self { hosts, ms, places })
    }

    /// Of round trips in milliseconds row by row, and where the hosts are.
    pub(super) fn new(ms: Vec<f32>, places: Vec<Option<(f64, f64)>>) -> Self {
        Self { hosts: places.len(), ms, places }
    }

    pub(super) fn hosts(&self) -> usize {
        self.hosts
    }

    /// Milliseconds; not a number where not known.
    pub(super) fn ms(&self, a: usize, b: usize) -> f32 {
        self.ms[a * self.hosts + b]
    }

    /// Hosts without coordinates, if there are any with.
    pub(super) fn unplaced(&self) -> usize {
        self.places.iter().filter(|place| place.is_none()).count()
    }

    pub(super) fn place(&self, host: usize) -> Option<(f64, f64)> {
        self.places.get(host).copied().flatten()
    }
}

/// Milliseconds, or not a number where the word says that it is not known.
fn number(word: &str) -> Result<f32, String> {
    match word.parse::<f32>() {
        Ok(ms) => Ok(ms),
        Err(_) if UNKNOWN.contains(&word.to_ascii_lowercase().as_str()) => Ok(f32::NAN),
        Err(_) => Err(format!(
            "{word:?} is no number: give milliseconds split by blanks, and - where they are not known"
        )),
    }
}

fn check_median(ms: &[f32]) -> Result<(), String> {
    let mut known: Vec<f32> = ms.iter().copied().filter(|ms| *ms > 0.0).collect();
    if known.is_empty() {
        return Err("no round trip is known: give milliseconds above 0".into());
    }
    let at = known.len() / 2;
    let (_, median, _) = known.select_nth_unstable_by(at, f32::total_cmp);
    if *median > MEDIAN_MAX_MS {
        return Err(format!(
            "half of the round trips are above {median}: give milliseconds (these may be microseconds)"
        ));
    }
    Ok(())
}

fn places(text: &str, hosts: usize) -> Result<Vec<Option<(f64, f64)>>, String> {
    let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let place = |(n, line): (usize, &str)| {
        if line == "-" {
            return Ok(None);
        }
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match numbers.as_slice() {
            [lat, lon] if lat.abs() <= 90.0 && lon.abs() <= 180.0 => Ok(Some((*lat, *lon))),
            _ => Err(format!(
                "coordinates, line {n} is {line:?}: give latitude and longitude in degrees, or -"
            )),
        }
    };
    let places = lines.map(place).collect::<Result<Vec<_>, String>>()?;
    if places.len() != hosts {
        return Err(format!("coordinates of {} hosts: give {hosts}, as the matrix has", places.len()));
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_directions_are_one_delay_and_what_is_unknown_is_none() {
        let matrix = Matrix::parse("# three\n0 10 -1\n20 0 5\nx nan 0\n", Some("1 2\n-\n3 4")).unwrap();
        assert_eq!((matrix.ms(0, 1), matrix.ms(1, 0), matrix.ms(1, 2)), (15.0, 15.0, 5.0));
        assert!(matrix.ms(0, 2).is_nan());
        assert_eq!((matrix.place(0), matrix.place(1)), (Some((1.0, 2.0)), None));
    }

    #[test]
    fn what_cannot_be_meant_is_named_by_line_and_value() {
        let error = |text: &str| Matrix::parse(text, None).err().unwrap();
        assert!(
            error("0,1,2\n1,0,2\n1,2,0").starts_with("line 1: \"0,1,2\" is no number: give milliseconds")
        );
        assert!(error("0 1 2\n1 0 two\n1 2 0").starts_with("line 2: \"two\" is no number"));
        assert_eq!(error("0 1 2\n# more\n1 4 2\n1 2 0"), "line 3: number 2 is 4: a host is 0 ms from itself");
        assert!(error("0 - -1\n? 0 nan\nx NIL 0").starts_with("no round trip is known"));
        assert!(
            error("0 90000 9\n90000 0 80000\n9 80000 0")
                .starts_with("half of the round trips are above 80000")
        );
    }

    #[test]
    fn what_is_no_matrix_is_named_by_its_line() {
        let error = |text: &str, places: Option<&str>| Matrix::parse(text, places).err().unwrap();
        assert_eq!(error("", None), "0 lines with numbers: give one per host, 3 to 20000");
        assert_eq!(
            error("0 2 3\n1 0\n1 2 0", None),
            "line 2 has 2 numbers: give 3, one per line with numbers"
        );
        let square = "0 1 1\n1 0 1\n1 1 0";
        assert_eq!(error(square, Some("1 2")), "coordinates of 1 hosts: give 3, as the matrix has");
        assert!(error(square, Some("1 2\n1 2\n91 0")).starts_with("coordinates, line 3 is \"91 0\""));
    }
}
