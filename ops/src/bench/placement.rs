//! `limosa bench placement`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use flow::sample::Seeded;
use nix::time::{ClockId, clock_gettime};
use placement::solver::generate::{self, Shape, between};
use placement::solver::{Certificate, Instance, Solver, Start, greedy};
use serde::Serialize;

use crate::cli::{Format, Output, Rows, complain};

/// Which networks.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Numbers of groups, 1 to 4,000,000.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000,1000000",
        value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    pub groups: Vec<u32>,
    /// Number of sites.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub sites: u16,
    /// Sites that a group may have.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub candidates: u8,
    /// Demand as shares of the capacity, above 0 and at most 1.
    #[arg(long, value_delimiter = ',', default_value = "0.8,0.5", value_parser = share)]
    pub fill: Vec<f64>,
    /// Same seed, same networks.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Times that each is measured; the medians are printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    pub runs: u8,
}

fn share(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no share: give a number above 0 and at most 1, for example 0.8");
    text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0).ok_or_else(wrong)
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Line {
    groups: u32,
    fill: f64,
    /// `cold`, `warm`, `changed`, `lost` or `greedy`.
    what: &'static str,
    /// Processor time, median of the runs.
    seconds: f64,
    /// By how much the cost may be above the best, as a share of it; nothing when a room is exceeded.
    gap: Option<f64>,
    moves: usize,
    /// Groups beyond the room of their site (`greedy`), or sites with resources beyond theirs.
    exceeded: usize,
    /// Passes over all groups.
    passes: Option<f64>,
    /// Memory of instance, prices and placement.
    bytes: Option<usize>,
}

pub(super) fn run(options: &Options, format: Format) -> ExitCode {
    let mut lines = Vec::new();
    for &groups in &options.groups {
        for &fill in &options.fill {
            match measure(options, groups, fill) {
                Ok(some) => lines.extend(some),
                Err(error) => {
                    complain(&format!("no instance of {groups} groups: {error}"));
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    print(&lines, format);
    ExitCode::SUCCESS
}

/// All lines of one network, medians of the runs.
fn measure(options: &Options, groups: u32, fill: f64) -> Result<Vec<Line>, placement::solver::InstanceError> {
    let shape = Shape {
        groups: groups as usize,
        sites: options.sites.into(),
        candidates: options.candidates.into(),
        fill,
        seed: options.seed,
    };
    let instance = generate::instance(&shape)?;
    let mut runs = Vec::new();
    for _ in 0..options.runs {
        runs.push(once(&instance, groups, fill));
    }
    let median = |line: usize| {
        let mut seconds: Vec<f64> = runs.iter().map(|run| run[line].seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    // The seed is the same, so only times differ.
    let lines = runs[0].iter().enumerate().map(|(n, line)| Line { seconds: median(n), ..line.clone() });
    Ok(lines.collect())
}

fn once(instance: &Instance, groups: u32, fill: f64) -> Vec<Line> {
    let mut solver = Solver::new(instance.clone());
    let line = |what, (seconds, certificate): (f64, Certificate), solver: &Solver| Line {
        groups,
        fill,
        what,
        seconds,
        gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
        moves: certificate.moves,
        exceeded: certificate.exceeded.len(),
        passes: Some(certificate.passes),
        bytes: Some(solver.bytes()),
    };
    let mut random = Seeded::new(groups.into());
    let cold = timed(|| solver.solve(Start::Cold));
    let bound = cold.1.bound;
    let mut lines = vec![line("cold", cold, &solver)];
    solver.adopt();
    (0..groups).for_each(|group| scale(&mut solver, group, between(&mut random, 0.97, 1.03)));
    let warm = timed(|| solver.solve(Start::Warm));
    lines.push(line("warm", warm, &solver));
    solver.adopt();
    let few: Vec<(u32, f64)> = (0..groups.div_ceil(100))
        .map(|_| (random.below(groups.into()) as u32, between(&mut random, 0.5, 1.5)))
        .collect();
    let changed = timed(|| {
        few.iter().for_each(|&(group, by)| scale(&mut solver, group, by));
        solver.solve(Start::Touched)
    });
    lines.push(line("changed", changed, &solver));
    solver.adopt();
    let lost = timed(|| {
        solver.set_open(largest(&solver), false);
        solver.solve(Start::Warm)
    });
    lines.push(line("lost", lost, &solver));
    let (seconds, simple) = timed(|| greedy::place(instance));
    let gap = Some((simple.cost - bound) / simple.cost).filter(|_| simple.spilled == 0);
    let (moves, exceeded) = (0, simple.spilled);
    lines.push(Line {
        groups,
        fill,
        what: "greedy",
        seconds,
        gap,
        moves,
        exceeded,
        passes: None,
        bytes: None,
    });
    lines
}

fn scale(solver: &mut Solver, group: u32, by: f64) {
    let group = group as usize;
    let (weight, demand) = (solver.instance().weight(group), solver.instance().demand(group));
    let by = by as f32;
    // Scaled by a small positive number, both stay what they may be.
    let _ = solver.set_demand(group, weight * by, demand.map(|one| one * by));
}

/// The site that carries most packets.
fn largest(solver: &Solver) -> u8 {
    let sites = 0..solver.instance().sites() as u8;
    sites.max_by(|&a, &b| solver.load(a)[0].total_cmp(&solver.load(b)[0])).unwrap_or(0)
}

/// Processor time of this thread, so that other work on the machine does not count.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let before = now();
    let result = work();
    (now().saturating_sub(before).as_secs_f64(), result)
}

fn print(lines: &[Line], format: Format) {
    let text = |line: &Line| {
        vec![
            line.groups.to_string(),
            format!("{:.0} %", line.fill * 100.0),
            line.what.to_owned(),
            format!("{:.1}", line.seconds * 1e3),
            line.gap.map_or("-".to_owned(), |gap| format!("{:.4} %", gap * 100.0)),
            line.moves.to_string(),
            line.exceeded.to_string(),
            line.passes.map_or("-".to_owned(), |passes| format!("{passes:.1}")),
            line.bytes.map_or("-".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e6)),
        ]
    };
    let heads = &["GROUPS", "FILL", "ROUND", "MS", "GAP", "MOVES", "EXCEEDED", "PASSES", "MB"];
    let rows = Rows { heads, rows: lines.iter().map(text).collect() };
    let json = serde_json::json!({ "rounds": lines });
    Output { format, headers: true }.print(&json, &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_is_measured_and_the_certificate_holds() {
        let options =
            Options { groups: vec![500], sites: 10, candidates: 4, fill: vec![0.6], seed: 1, runs: 2 };
        let lines = measure(&options, 500, 0.6).unwrap();
        assert_eq!(
            lines.iter().map(|l| l.what).collect::<Vec<_>>(),
            ["cold", "warm", "changed", "lost", "greedy"]
        );
        assert_eq!(lines[0].exceeded, 0);
        assert!(lines[0].gap.unwrap() < 0.05, "{lines:?}");
        assert!(lines[3].moves > 0, "{lines:?}");
    }

    #[test]
    fn shares_are_above_zero_and_at_most_one() {
        assert_eq!(share("0.8"), Ok(0.8));
        for wrong in ["0", "1.1", "-1", "NaN", "x"] {
            assert!(share(wrong).unwrap_err().contains("for example 0.8"), "{wrong}");
        }
    }
}
