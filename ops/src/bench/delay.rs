//! `limosa bench delay`: the delay estimator on a matrix of real round trips, or on made-up worlds.
//!
//! Some hosts are sites, which know the delays between one another; the others are places, measured from a few sites
//! each. An estimator says how far each place is from every site; its choice is the site that it takes for the nearest. Regret is
//! what that site has more than the nearest one.

mod leader;
mod matrix;
#[cfg(test)]
mod positions;
mod vivaldi;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use flow::sample::Seeded;
use placement::core::delay::great_circle_km;
use placement::likeness::{Estimate, Likeness, Seen, Spot};
use serde::Serialize;

use crate::cli::{Format, Output, Rows, complain};
use matrix::Matrix;
use world::World;

/// Which matrix, and how much is measured.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Round trips in milliseconds: one line per host, one number per host in it, split by blanks. What is below 0, or -, ?, x, nan or
    /// nil, is not known; lines that begin with # do not count.
    #[arg(long, value_name = "FILE", required_unless_present = "world")]
    pub matrix: Option<PathBuf>,
    /// Latitude and longitude of each host in degrees, split by blanks, one line per host in the order of the matrix; - where not
    /// known, # begins a comment line. With it, what is nearest by the map is printed too, and the estimator knows the map.
    #[arg(long, value_name = "FILE", requires = "matrix")]
    pub coordinates: Option<PathBuf>,
    /// In the place of a matrix, worlds made up from these seeds: 250 hosts each, with cables, networks that meet in few places, odd ways,
    /// and a map that is missing or wrong in places. What is printed is over all of them.
    #[arg(long, value_name = "SEED", value_delimiter = ',', conflicts_with = "matrix")]
    pub world: Vec<u64>,
    /// The estimator knows no map.
    #[arg(long)]
    pub no_map: bool,
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

/// Hosts of a world.
const WORLD_HOSTS: usize = 250;

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Line {
    sites: u16,
    probes: u8,
    /// `likeness` (all places measured, then all chosen), `likeness, at once` (each chosen when it was measured),
    /// `likeness, nothing learned`, `vivaldi`, `geography`, `nearest by map, measured`, `best of random probes`, `best possible` or
    /// `leader`.
    estimator: &'static str,
    /// Choices that were scored: a place for each draw in which all sites know the distance to it.
    choices: usize,
    /// Median over pairs that were not measured of the error as a share of the delay.
    error: Option<f64>,
    /// Share of these pairs whose delay is within two standard deviations of the estimate: 0.95 if that is honest.
    within: Option<f64>,
    regret_mean_ms: f64,
    regret_p50_ms: f64,
    regret_p99_ms: f64,
}

/// Measures and prints.
#[must_use]
pub(super) fn run(options: &Options, format: Format) -> ExitCode {
    let matrices = match matrices(options) {
        Ok(matrices) => matrices,
        Err(error) => {
            complain(&error);
            return ExitCode::from(2);
        }
    };
    let hosts = matrices.iter().map(Matrix::hosts).min().unwrap_or(0);
    let mut lines = Vec::new();
    for &sites in &options.sites {
        if usize::from(sites) >= hosts {
            complain(&format!("--sites {sites}: the matrix has {hosts} hosts, give fewer sites"));
            return ExitCode::from(2);
        }
        for &probes in &options.probes {
            let of_these = measure(options, &matrices, sites, probes);
            if of_these.is_empty() {
                complain(&format!(
                    "--sites {sites}: in no draw was there a place with a known round trip to every site: give a matrix that knows \
                     more, or fewer sites"
                ));
                return ExitCode::from(2);
            }
            lines.extend(of_these);
            if probes > 0 {
                lines.extend(of_leader(options, &matrices, sites, probes));
            }
        }
    }
    let unplaced: usize = matrices.iter().map(Matrix::unplaced).sum();
    if unplaced > 0 {
        let all: usize = matrices.iter().map(Matrix::hosts).sum();
        complain(&format!(
            "hosts without coordinates: {unplaced} of {all}; these are estimated without a map"
        ));
    }
    print(format, &lines);
    ExitCode::SUCCESS
}

/// The matrix that is given, or those of the worlds.
fn matrices(options: &Options) -> Result<Vec<Matrix>, String> {
    match &options.matrix {
        Some(matrix) => Ok(vec![Matrix::read(matrix, options.coordinates.as_deref())?]),
        None => Ok(options.world.iter().map(|seed| World::new(*seed, WORLD_HOSTS).into()).collect()),
    }
}

impl From<World> for Matrix {
    fn from(world: World) -> Self {
        Self::new(world.ms, world.places)
    }
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
            line.within.map_or("-".to_owned(), |within| format!("{:.1} %", within * 100.0)),
            format!("{:.2}", line.regret_mean_ms),
            format!("{:.2}", line.regret_p50_ms),
            format!("{:.1}", line.regret_p99_ms),
        ]
    };
    let heads = &["SITES", "PROBES", "ESTIMATOR", "CHOICES", "ERROR", "WITHIN", "REGRET-MS", "P50", "P99"];
    let body = serde_json::to_value(lines).unwrap_or_default();
    output.print(&body, &Rows { heads, rows: lines.iter().map(row).collect() });
}

/// What an estimator did.
#[derive(Default)]
struct Score {
    regrets: Vec<f64>,
    errors: Vec<f64>,
    /// Of those that say how sure they are: within two standard deviations, and all.
    within: (u64, u64),
}

impl Score {
    /// Estimates of one place against the truth.
    fn add(&mut self, truth: &[f32], estimates: &[Estimate]) {
        for (estimate, truth) in estimates.iter().zip(truth).filter(|(estimate, _)| !estimate.measured) {
            self.errors.push(f64::from((estimate.ms - truth).abs() / truth.max(1.0)));
            if estimate.spread > 0.0 {
                let off = (log(*truth) - log(estimate.ms)).abs();
                self.within.0 += u64::from(off <= 2.0 * estimate.spread);
                self.within.1 += 1;
            }
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
            within: (self.within.1 > 0).then(|| self.within.0 as f64 / self.within.1 as f64),
            regret_mean_ms: mean,
            regret_p50_ms: quantile(&mut self.regrets, 0.5).unwrap_or(0.0),
            regret_p99_ms: quantile(&mut self.regrets, 0.99).unwrap_or(0.0),
        }
    }
}

/// The logarithm that spreads are of.
fn log(ms: f32) -> f32 {
    (ms + placement::likeness::OFFSET_MS).ln()
}

/// One draw of sites from a matrix.
struct Draw<'a> {
    matrix: &'a Matrix,
    chosen: Vec<usize>,
    /// Where the sites are; those of an operator are where their configuration says.
    at: Vec<Option<(f64, f64)>>,
    map: bool,
    probes: u8,
}

impl Draw<'_> {
    fn truth(&self, place: usize) -> Vec<f32> {
        self.chosen.iter().map(|&site| self.matrix.ms(place, site)).collect()
    }

    fn spot(&self, place: usize) -> Option<Spot> {
        let at = self.matrix.place(place).filter(|_| self.map)?;
        Some(Spot { at, radius_km: MAP_RADIUS_KM })
    }

    /// Sites by their distance to a place, the nearest first; nothing unless that is known.
    fn by_distance(&self, place: usize) -> Vec<usize> {
        let Some(from) = self.matrix.place(place) else { return Vec::new() };
        let km = |site: usize| Some((great_circle_km(from, self.at[site]?), site));
        let mut sites: Vec<(f64, usize)> = (0..self.chosen.len()).filter_map(km).collect();
        sites.sort_by(|a, b| a.0.total_cmp(&b.0));
        sites.into_iter().map(|(_, site)| site).collect()
    }

    /// Measures a place from the sites that the estimator wants, one after the other.
    fn probe(&self, likeness: &Likeness, place: usize, truth: &[f32]) -> (Vec<Seen>, Vec<Estimate>) {
        let (mut seen, number, spot) = (Vec::new(), Some(place as u64), self.spot(place));
        for _ in 0..self.probes {
            let Some(site) = likeness.next(number, &seen, spot) else { break };
            seen.push(Seen { site, ms: truth[site], sd_ms: SAMPLE_SD_MS });
        }
        let estimates = likeness.estimate(number, &seen, spot);
        (seen, estimates)
    }
}

/// How exact the map is taken to be.
const MAP_RADIUS_KM: f64 = 20.0;
/// How exact a measurement is taken to be.
const SAMPLE_SD_MS: f32 = 0.5;

fn measure(options: &Options, matrices: &[Matrix], sites: u16, probes: u8) -> Vec<Line> {
    let names = [
        "likeness",
        "likeness, at once",
        "likeness, nothing learned",
        "vivaldi",
        "best of random probes",
        "geography",
        "nearest by map, measured",
        "best possible",
    ];
    let mut scores: [Score; 8] = std::array::from_fn(|_| Score::default());
    each_draw(options, matrices, sites, probes, |draw, places, random| {
        score(draw, places, random, &mut scores)
    });
    let scored = scores.into_iter().zip(names).filter(|(score, _)| !score.regrets.is_empty());
    scored.map(|(score, name)| score.line(sites, probes, name)).collect()
}

/// The same draws for the same options.
fn each_draw(
    options: &Options,
    matrices: &[Matrix],
    sites: u16,
    probes: u8,
    mut take: impl FnMut(&Draw<'_>, &[usize], &mut Seeded),
) {
    for matrix in matrices {
        for run in 0..u64::from(options.runs) {
            let mut random = Seeded::new(options.seed.wrapping_mul(1_000_003).wrapping_add(run));
            let (chosen, places) = draw(matrix, usize::from(sites), &mut random);
            let at = chosen.iter().map(|&site| matrix.place(site)).collect();
            let draw = Draw { matrix, chosen, at, map: !options.no_map, probes };
            take(&draw, &places, &mut random);
        }
    }
}

fn score(draw: &Draw<'_>, places: &[usize], random: &mut Seeded, scores: &mut [Score; 8]) {
    let Draw { matrix, chosen, probes, .. } = draw;
    let row = |&a: &usize| chosen.iter().map(|&b| matrix.ms(a, b)).collect();
    let mesh: Vec<Vec<f32>> = chosen.iter().map(row).collect();
    let none = vec![None; chosen.len()];
    let mut likeness = Likeness::new(&mesh, if draw.map { &draw.at } else { &none });
    let alone = likeness.clone();
    let net = vivaldi::Net::new(&mesh, random);
    let mut measured: Vec<(usize, Vec<Seen>)> = Vec::new();
    for &place in places {
        let truth = draw.truth(place);
        let (seen, estimates) = draw.probe(&likeness, place, &truth);
        scores[1].add(&truth, &estimates);
        likeness.learn(place as u64, &estimates, draw.spot(place));
        scores[2].add(&truth, &draw.probe(&alone, place, &truth).1);
        if *probes > 0 {
            scores[3].add(&truth, &net.estimate(&seen, random));
            scores[4].chose(&truth, best_of_random(&truth, *probes, random));
        }
        let near = draw.by_distance(place);
        if let Some(nearest) = near.first() {
            scores[5].chose(&truth, *nearest);
            let asked = near.into_iter().take(usize::from(*probes).max(1));
            let best = asked.min_by(|&a, &b| truth[a].total_cmp(&truth[b]));
            scores[6].chose(&truth, best.unwrap_or(0));
        }
        scores[7].regrets.push(0.0);
        measured.push((place, seen));
    }
    // As a leader looks at all of them again in every round.
    let again = |likeness: &Likeness, place: usize, seen: &[Seen]| {
        likeness.estimate(Some(place as u64), seen, draw.spot(place))
    };
    for (place, seen) in &measured {
        let estimates = again(&likeness, *place, seen);
        likeness.learn(*place as u64, &estimates, draw.spot(*place));
    }
    for (place, seen) in &measured {
        scores[0].add(&draw.truth(*place), &again(&likeness, *place, seen));
    }
}

/// What a leader makes of it, with as many measurements.
fn of_leader(options: &Options, matrices: &[Matrix], sites: u16, probes: u8) -> Option<Line> {
    let mut score = Score::default();
    each_draw(options, matrices, sites, probes, |draw, places, random| {
        let first = |place: &usize| {
            let near = draw.by_distance(*place).first().copied().filter(|_| draw.map);
            near.unwrap_or_else(|| random.below(draw.chosen.len() as u64) as usize)
        };
        let firsts: Vec<usize> = places.iter().map(first).collect();
        for (place, estimates) in leader::estimates(draw, places, &firsts) {
            score.add(&draw.truth(place), &estimates);
        }
    });
    (!score.regrets.is_empty()).then(|| score.line(sites, probes, "leader"))
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

fn best_of_random(truth: &[f32], probes: u8, random: &mut Seeded) -> usize {
    let drawn = (0..probes).map(|_| random.below(truth.len() as u64) as usize);
    drawn.min_by(|&a, &b| truth[a].total_cmp(&truth[b])).unwrap_or(0)
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
        let (matrix, probes) = (None, probes.to_vec());
        let (coordinates, world, no_map) = (None, vec![], false);
        Options { matrix, coordinates, world, no_map, sites: vec![8], probes, seed: 1, runs: 3 }
    }

    #[test]
    fn probes_help_and_the_estimator_beats_chance() {
        let lines: Vec<Line> =
            [0, 3].iter().flat_map(|&probes| measure(&options(&[probes]), &[matrix()], 8, probes)).collect();
        let regret_of = |probes: u8, estimator: &str| {
            let line = lines.iter().find(|line| line.probes == probes && line.estimator == estimator);
            line.map(|line| line.regret_mean_ms).unwrap()
        };
        assert!(regret_of(3, "likeness") < 0.5 * regret_of(0, "likeness"), "{lines:?}");
        assert!(regret_of(3, "likeness") < regret_of(3, "best of random probes"), "{lines:?}");
        assert_eq!(regret_of(3, "best possible"), 0.0);
    }

    fn of_worlds(map: bool, probes: u8) -> Vec<Line> {
        let worlds: Vec<Matrix> = (0..2).map(|seed| World::new(seed, 120).into()).collect();
        let options = Options { no_map: !map, runs: 2, ..options(&[probes]) };
        measure(&options, &worlds, 20, probes)
    }

    fn regret(lines: &[Line], estimator: &str) -> f64 {
        let line = lines.iter().find(|line| line.estimator == estimator);
        line.map(|line| line.regret_mean_ms).unwrap()
    }

    /// The simplest rule there is: ask the nearest by the map, and take the best of them.
    #[test]
    fn in_made_up_worlds_the_estimator_is_at_least_as_good_as_asking_the_nearest() {
        for probes in [0, 1, 3, 5] {
            let lines = of_worlds(true, probes);
            let simple = if probes == 0 { "geography" } else { "nearest by map, measured" };
            for estimator in ["likeness", "likeness, at once", "likeness, nothing learned"] {
                assert!(
                    regret(&lines, estimator) <= regret(&lines, simple),
                    "{probes} {estimator}: {lines:?}"
                );
            }
        }
    }

    #[test]
    fn in_made_up_worlds_neither_a_measurement_nor_a_map_nor_learning_makes_the_choice_worse() {
        let (with_map, without): (Vec<_>, Vec<_>) = [0, 1, 3, 5]
            .into_iter()
            .map(|probes| (of_worlds(true, probes), of_worlds(false, probes)))
            .unzip();
        for lines in [&with_map, &without] {
            let all: Vec<f64> = lines.iter().map(|lines| regret(lines, "likeness")).collect();
            assert!(all.windows(2).all(|pair| pair[1] <= pair[0]), "{all:?}");
            for lines in &lines[2..] {
                let learned = regret(lines, "likeness") / regret(lines, "likeness, nothing learned");
                assert!(learned <= 1.1, "{learned}: {lines:?}");
            }
        }
        for (with, without) in with_map.iter().zip(&without) {
            assert!(regret(with, "likeness") <= regret(without, "likeness"), "{with:?} {without:?}");
        }
    }

    #[test]
    fn in_made_up_worlds_claims_of_two_standard_deviations_hold() {
        let lines = of_worlds(true, 3);
        let claims = lines.iter().filter(|line| line.estimator.starts_with("likeness"));
        for line in claims {
            assert!(line.within.is_some_and(|within| (0.93..0.995).contains(&within)), "{line:?}");
        }
    }

    fn leader(options: &Options, probes: u8) -> Line {
        let worlds: Vec<Matrix> = (0..2).map(|seed| World::new(seed, 120).into()).collect();
        of_leader(options, &worlds, 20, probes).unwrap()
    }

    /// What a leader makes of reports, by the probes that it asked for itself.
    #[test]
    fn in_made_up_worlds_the_leader_is_at_least_as_good_as_asking_the_nearest_and_says_how_sure_it_is() {
        let lines = [1, 3, 5].map(|probes| leader(&options(&[probes]), probes));
        for (line, probes) in lines.iter().zip([1, 3, 5]) {
            let simple = regret(&of_worlds(true, probes), "nearest by map, measured");
            assert!(line.regret_mean_ms <= simple, "{simple}: {line:?}");
            assert!(line.within.is_some_and(|within| (0.93..0.995).contains(&within)), "{line:?}");
        }
        let regrets = lines.each_ref().map(|line| line.regret_mean_ms);
        assert!(regrets[1] < 0.5 * regrets[0] && regrets[2] <= regrets[1], "{regrets:?}");
    }

    #[test]
    fn a_map_makes_no_choice_of_a_leader_worse() {
        let without = Options { no_map: true, ..options(&[3]) };
        let (with, without) = (leader(&options(&[3]), 3), leader(&without, 3));
        assert!(with.regret_mean_ms <= without.regret_mean_ms, "{with:?} {without:?}");
    }

    #[test]
    fn same_seed_same_figures() {
        let once = serde_json::to_string(&measure(&options(&[2]), &[matrix()], 8, 2)).unwrap();
        assert_eq!(once, serde_json::to_string(&measure(&options(&[2]), &[matrix()], 8, 2)).unwrap());
    }
}
