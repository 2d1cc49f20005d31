//! A matrix of round trips from a file.

use std::path::Path;

/// Most hosts of a matrix.
const HOSTS_MAX: usize = 20_000;

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
            given.extend(line.split_whitespace().map(|word| word.parse().unwrap_or(f32::NAN)));
            let len = given.len() - before;
            if len != hosts {
                return Err(format!("line {n} has {len} numbers: give {hosts}, one per line with numbers"));
            }
        }
        let known = |a: usize, b: usize| Some(given[a * hosts + b]).filter(|ms| *ms >= 0.0 && ms.is_finite());
        let both = |a: usize, b: usize| match (known(a, b), known(b, a)) {
            (Some(there), Some(back)) => f32::midpoint(there, back),
            (one, other) => one.or(other).unwrap_or(f32::NAN),
        };
        let ms = (0..hosts).flat_map(|a| (0..hosts).map(move |b| (a, b))).map(|(a, b)| both(a, b)).collect();
        let places = coordinates.map_or(Ok(Vec::new()), |text| places(text, hosts))?;
        Ok(Self { hosts, ms, places })
    }

    pub(super) fn hosts(&self) -> usize {
        self.hosts
    }

    /// Milliseconds; not a number where not known.
    pub(super) fn ms(&self, a: usize, b: usize) -> f32 {
        self.ms[a * self.hosts + b]
    }

    pub(super) fn place(&self, host: usize) -> Option<(f64, f64)> {
        self.places.get(host).copied().flatten()
    }
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
    fn what_is_no_matrix_is_named_by_its_line() {
        let error = |text: &str, places: Option<&str>| Matrix::parse(text, places).err().unwrap();
        assert_eq!(error("", None), "0 lines with numbers: give one per host, 3 to 20000");
        assert_eq!(
            error("1 2 3\n1 2\n1 2 3", None),
            "line 2 has 2 numbers: give 3, one per line with numbers"
        );
        let square = "0 1 1\n1 0 1\n1 1 0";
        assert_eq!(error(square, Some("1 2")), "coordinates of 1 hosts: give 3, as the matrix has");
        assert!(error(square, Some("1 2\n1 2\n91 0")).starts_with("coordinates, line 3 is \"91 0\""));
    }
}
