//! `limosa bench delay`: the delay estimator on a matrix of real round trips.
//!
//! Some hosts of the matrix are sites, which know the delays between one another; the others are places, measured from a few sites
//! each. An estimator says how far each place is from every site; its choice is the site that it takes for the nearest. Regret is
//! what that site has more than the nearest one.

mod matrix;
mod vivaldi;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use flow::sample::Seeded;
use placement::core::delay::great_circle_km;
use placement::likeness::{Estimate, Likeness, Seen};
use serde::Serialize;

use crate::cli::{Format, Output, Rows, complain};
use matrix::Matrix;

/// Which matrix, and how much is measured.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Round trips in milliseconds: one line per host, one number per host in it, split by blanks. What is below 0, or -, ?, x, nan or
    /// nil, is not known; lines that begin with # do not count.
    #[arg(long, value_name = "FILE")]
    pub matrix: PathBuf,
    /// Latitude and longitude of each host in degrees, split by blanks, one line per host in the order of the matrix; - where not
    /// known, # begins a comment line. With it, nearest by geography is printed too, and likeness counts near sites more.
    #[arg(long, value_name = "FILE")]
    pub coordinates: Option<PathBuf>,
    /// Numbers of sites, 2 to 256.
    #[arg(long, value_delimiter = ',', default_value = "10,50",
        value_parser = clap::value_parser!(u16).range(2..=256))]
    pub sites: Vec<u16>,
    /// From how many sites each place is measured.
    #[arg(long, value_delimiter = ',', default_value = "0,1,3,5",
        value_parser = clap::value_parser!(u8).range(0..=64))]
    pub probes: Vec<u8>,
    /// Same seed, same sites.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Times that sites are drawn; what is printed is over all places of all draws.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub runs: u8,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Line {
    sites: u16,
    probes: u8,
    /// `likeness` (all places measured, then all chosen), `likeness, at once` (each chosen when it was measured),
    /// `likeness, nothing learned`, `vivaldi`, `geography`, `best of random probes` or `best possible`.
    estimator: &'static str,
    /// Choices that were scored: a place for each draw in which all sites know the distance to it.
    choices: usize,
    /// Median over pairs that were not measured of the error as a share of the delay.
    error: Option<f64>,
    regret_mean_ms: f64,
    regret_p50_ms: f64,
    regret_p99_ms: f64,
}

/// Measures and prints.
#[must_use]
pub(super) fn run(options: &Options, format: Format) -> ExitCode {
    let matrix = match Matrix::read(&options.matrix, options.coordinates.as_deref()) {
        Ok(matrix) => matrix,
        Err(error) => {
            complain(&error);
            return ExitCode::from(2);
        }
    };
    let mut lines = Vec::new();
    for &sites in &options.sites {
        if usize::from(sites) >= matrix.hosts() {
            complain(&format!("--sites {sites}: the matrix has {} hosts, give fewer sites", matrix.hosts()));
            return ExitCode::from(2);
        }
        for &probes in &options.probes {
            let of_these = measure(options, &matrix, sites, probes);
            if of_these.is_empty() {
                complain(&format!(
                    "--sites {sites}: in no draw was there a place with a known round trip to every site: give a matrix that knows \
                     more, or fewer sites"
                ));
                return ExitCode::from(2);
            }
            lines.extend(of_these);
        }
    }
    if matrix.unplaced() > 0 {
        complain(&format!(
            "hosts without coordinates: {} of {}; what has one for a site, or is one, is estimated without them",
            matrix.unplaced(),
            matrix.hosts()
        ));
    }
    print(format, &lines);
    ExitCode::SUCCESS
}

fn print(format: Format, lines: &[Line]) {
    let output = Output { format, headers: true };
    let row = |line: &Line| {
        vec![
            line.sites.to_string(),
            line.probes.to_string(),
            line.estimator.to_owned(),
            line.choices.to_string(),
            line.error.map_or("-".to_owned(), |error| format!("{:.0} %", error * 100.0)),
            format!("{:.2}", line.regret_mean_ms),
            format!("{:.2}", line.regret_p50_ms),
            format!("{:.1}", line.regret_p99_ms),
        ]
    };
    let heads = &["SITES", "PROBES", "ESTIMATOR", "CHOICES", "ERROR", "REGRET-MS", "P50", "P99"];
    let body = serde_json::to_value(lines).unwrap_or_default();
    output.print(&body, &Rows { heads, rows: lines.iter().map(row).collect() });
}

/// What an estimator did.
#[derive(Default)]
struct Score {
    regrets: Vec<f64>,
    errors: Vec<f64>,
}

impl Score {
    /// Estimates of one place against the truth.
    fn add(&mut self, truth: &[f32], estimates: &[Estimate]) {
        for (estimate, truth) in estimates.iter().zip(truth).filter(|(estimate, _)| !estimate.measured) {
            self.errors.push(f64::from((estimate.ms - truth).abs() / truth.max(1.0)));
        }
        let choice = estimates
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.mean_ms.total_cmp(&b.1.mean_ms))
            .map(|(site, _)| site);
        self.chose(truth, choice.unwrap_or(0));
    }

    fn chose(&mut self, truth: &[f32], site: usize) {
        let best = truth.iter().copied().fold(f32::INFINITY, f32::min);
        self.regrets.push(f64::from(truth[site] - best));
    }

    fn line(mut self, sites: u16, probes: u8, estimator: &'static str) -> Line {
        let quantile = |values: &mut Vec<f64>, share: f64| {
            values.sort_by(f64::total_cmp);
            let at = ((values.len() as f64 - 1.0) * share).round() as usize;
            values.get(at).copied()
        };
        let mean = self.regrets.iter().sum::<f64>() / self.regrets.len().max(1) as f64;
        Line {
            sites,
            probes,
            estimator,
            choices: self.regrets.len(),
            error: quantile(&mut self.errors, 0.5),
            regret_mean_ms: mean,
            regret_p50_ms: quantile(&mut self.regrets, 0.5).unwrap_or(0.0),
            regret_p99_ms: quantile(&mut self.regrets, 0.99).unwrap_or(0.0),
        }
    }
}

fn measure(options: &Options, matrix: &Matrix, sites: u16, probes: u8) -> Vec<Line> {
    let names = [
        "likeness",
        "likeness, at once",
        "likeness, nothing learned",
        "vivaldi",
        "best of random probes",
        "geography",
        "best possible",
    ];
    let mut scores: [Score; 7] = std::array::from_fn(|_| Score::default());
    for run in 0..u64::from(options.runs) {
        let mut random = Seeded::new(options.seed.wrapping_mul(1_000_003).wrapping_add(run));
        let (chosen, places) = draw(matrix, usize::from(sites), &mut random);
        let mesh: Vec<Vec<f32>> =
            chosen.iter().map(|&a| chosen.iter().map(|&b| matrix.ms(a, b)).collect()).collect();
        let mut likeness = Likeness::new(&mesh);
        let alone = likeness.clone();
        let net = vivaldi::Net::new(&mesh, &mut random);
        let mut measured: Vec<(usize, Vec<Seen>)> = Vec::new();
        let truth_of = |place: usize| chosen.iter().map(|&site| matrix.ms(place, site)).collect::<Vec<f32>>();
        for place in places {
            let truth = truth_of(place);
            let distance = matrix.distances(place, &chosen);
            let (seen, estimates) = probe(&likeness, place, &truth, distance.as_deref(), probes);
            scores[1].add(&truth, &estimates);
            likeness.learn(place as u64, &estimates);
            scores[2].add(&truth, &probe(&alone, place, &truth, distance.as_deref(), probes).1);
            if probes > 0 {
                scores[3].add(&truth, &net.estimate(&seen, &mut random));
                scores[4].chose(&truth, best_of_random(&truth, probes, &mut random));
            }
            if let Some(distance) = &distance {
                let nearest = distance.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
                scores[5].chose(&truth, nearest.map_or(0, |(site, _)| site));
            }
            scores[6].regrets.push(0.0);
            measured.push((place, seen));
        }
        // As a leader looks at all of them again in every round.
        let again = |likeness: &Likeness, place: usize, seen: &[Seen]| {
            let distance = matrix.distances(place, &chosen);
            likeness.estimate(Some(place as u64), seen, distance.as_deref())
        };
        for (place, seen) in &measured {
            let estimates = again(&likeness, *place, seen);
            likeness.learn(*place as u64, &estimates);
        }
        for (place, seen) in &measured {
            scores[0].add(&truth_of(*place), &again(&likeness, *place, seen));
        }
    }
    let scored = scores.into_iter().zip(names).filter(|(score, _)| !score.regrets.is_empty());
    scored.map(|(score, name)| score.line(sites, probes, name)).collect()
}

/// Sites, and the places that they all know the distance to.
fn draw(matrix: &Matrix, sites: usize, random: &mut Seeded) -> (Vec<usize>, Vec<usize>) {
    let mut hosts: Vec<usize> = (0..matrix.hosts()).collect();
    for at in 0..hosts.len() {
        let other = at + random.below((hosts.len() - at) as u64) as usize;
        hosts.swap(at, other);
    }
    let places = hosts.split_off(sites);
    let known = |place: &usize| hosts.iter().all(|&site| matrix.ms(*place, site).is_finite());
    let places = places.into_iter().filter(known).collect();
    (hosts, places)
}

/// Measures a place from the sites that the estimator wants, one after the other.
fn probe(
    likeness: &Likeness,
    place: usize,
    truth: &[f32],
    distance: Option<&[f32]>,
    probes: u8,
) -> (Vec<Seen>, Vec<Estimate>) {
    let mut seen = Vec::new();
    let mut estimates = likeness.estimate(Some(place as u64), &seen, distance);
    for _ in 0..probes {
        let Some(site) = likeness.next(&seen, &estimates) else { break };
        seen.push(Seen { site, ms: truth[site], age_s: 0.0 });
        estimates = likeness.estimate(Some(place as u64), &seen, distance);
    }
    (seen, estimates)
}

fn best_of_random(truth: &[f32], probes: u8, random: &mut Seeded) -> usize {
    let drawn = (0..probes).map(|_| random.below(truth.len() as u64) as usize);
    drawn.min_by(|&a, &b| truth[a].total_cmp(&truth[b])).unwrap_or(0)
}

impl Matrix {
    /// From a place to sites in kilometres; `None` unless all are known.
    fn distances(&self, place: usize, sites: &[usize]) -> Option<Vec<f32>> {
        let from = self.place(place)?;
        sites.iter().map(|&site| Some(great_circle_km(from, self.place(site)?) as f32)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hosts on a line, with a stretch of their own.
    fn matrix() -> Matrix {
        let text: Vec<String> = (0..40)
            .map(|a: i32| {
                let ms = |b: i32| if a == b { 0 } else { 3 * (a - b).abs() + (a * 7) % 11 + (b * 7) % 11 };
                (0..40).map(|b| ms(b).to_string()).collect::<Vec<_>>().join(" ")
            })
            .collect();
        Matrix::parse(&text.join("\n"), None).unwrap()
    }

    fn options(probes: &[u8]) -> Options {
        let (matrix, probes) = (PathBuf::new(), probes.to_vec());
        Options { matrix, coordinates: None, sites: vec![8], probes, seed: 1, runs: 3 }
    }

    #[test]
    fn probes_help_and_the_estimator_beats_chance() {
        let lines: Vec<Line> =
            [0, 3].iter().flat_map(|&probes| measure(&options(&[probes]), &matrix(), 8, probes)).collect();
        let regret = |probes: u8, estimator: &str| {
            let line = lines.iter().find(|line| line.probes == probes && line.estimator == estimator);
            line.map(|line| line.regret_mean_ms).unwrap()
        };
        assert!(regret(3, "likeness") < 0.5 * regret(0, "likeness"), "{lines:?}");
        assert!(regret(3, "likeness") < regret(3, "best of random probes"), "{lines:?}");
        assert_eq!(regret(3, "best possible"), 0.0);
    }

    #[test]
    fn same_seed_same_figures() {
        let once = serde_json::to_string(&measure(&options(&[2]), &matrix(), 8, 2)).unwrap();
        assert_eq!(once, serde_json::to_string(&measure(&options(&[2]), &matrix(), 8, 2)).unwrap());
    }
}
