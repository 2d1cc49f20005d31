//! `limosa bench placement`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use flow::sample::Seeded;
use nix::time::{ClockId, clock_gettime};
use placement::core::GROUPS_PER_SERVICE_MAX;
use placement::solver::generate::{self, Load, Shape, between};
use placement::solver::{Certificate, Instance, Solver, Start, greedy};
use serde::Serialize;

use super::leader;
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
    /// How traffic is shared among the groups: pareto, equal, zipf:POWER (the n-th largest has 1 / n to the POWER), heavy:SHARE (as
    /// pareto, and one group has this share of all).
    #[arg(long, value_delimiter = ',', default_value = "pareto", value_parser = load)]
    pub load: Vec<Load>,
    /// Same seed, same networks.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Times that each is measured; the medians are printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    pub runs: u8,
    /// Seconds that the exact solver may take for each of its small networks, 0 to 3,600; 0 leaves it out.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(0..=3_600))]
    pub exact_seconds: u16,
    /// Leaves out the rounds of a leader.
    #[arg(long)]
    pub no_leader: bool,
}

fn share(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no share: give a number above 0 and at most 1, for example 0.8");
    text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0).ok_or_else(wrong)
}

fn load(text: &str) -> Result<Load, String> {
    let wrong = || {
        format!(
            "{text:?} is no load: give pareto, equal, zipf:POWER above 0 to 4, or heavy:SHARE above 0 and below 1, for example \
             zipf:1.1 or heavy:0.05"
        )
    };
    let number = |text: &str, most: f64| text.parse().ok().filter(|&one: &f64| one > 0.0 && one <= most);
    let load = match text.split_once(':') {
        None if text == "pareto" => Some(Load::Pareto),
        None if text == "equal" => Some(Load::Equal),
        Some(("zipf", power)) => number(power, 4.0).map(Load::Zipf),
        Some(("heavy", share)) => number(share, 1.0).filter(|&share| share < 1.0).map(Load::Heavy),
        _ => None,
    };
    load.ok_or_else(wrong)
}

/// As it is given.
fn name(load: Load) -> String {
    match load {
        Load::Pareto => "pareto".to_owned(),
        Load::Equal => "equal".to_owned(),
        Load::Zipf(power) => format!("zipf:{power}"),
        Load::Heavy(share) => format!("heavy:{share}"),
    }
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Line {
    groups: u32,
    load: String,
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
    /// The same for each group.
    bytes_per_group: Option<f64>,
}

/// What a round on 100 sites with 16 candidates at 80 % is to reach.
struct Aim {
    groups: u32,
    what: &'static str,
    seconds: f64,
    gap: Option<f64>,
}

const AIM_SITES: u16 = 100;
const AIM_CANDIDATES: u8 = 16;
const AIM_FILL: f64 = 0.8;
const AIM_LOAD: &str = "pareto";
/// A round after a change of 1 % and after a loss has to stay within the rooms; its gap is shown, and no aim.
const AIMS: [Aim; 6] = [
    Aim { groups: 100_000, what: "cold", seconds: 0.6, gap: Some(0.0005) },
    Aim { groups: 100_000, what: "warm", seconds: 0.1, gap: Some(0.0005) },
    Aim { groups: 100_000, what: "changed", seconds: 0.02, gap: None },
    Aim { groups: 100_000, what: "lost", seconds: 0.5, gap: None },
    Aim { groups: 1_000_000, what: "cold", seconds: 3.0, gap: Some(0.0005) },
    Aim { groups: 1_000_000, what: "warm", seconds: 0.9, gap: Some(0.0005) },
];

/// An aim and what was measured.
#[derive(Clone, Debug, Serialize)]
struct Verdict {
    groups: u32,
    what: &'static str,
    seconds_below: f64,
    gap_below: Option<f64>,
    seconds: f64,
    gap: Option<f64>,
    /// In time, within the rooms, and with the gap that is aimed at.
    met: bool,
}

/// A small network that was also solved exactly, or not within the time.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Exact {
    pub(super) groups: u32,
    pub(super) sites: u16,
    pub(super) candidates: u8,
    /// `proven`, `no proof` or `nothing fits`.
    pub(super) state: &'static str,
    /// Processor time of the exact solver.
    pub(super) seconds: f64,
    /// The least cost of whole groups, in weight x ms, where it was proven.
    pub(super) optimum: Option<f64>,
    /// The least cost if groups could be divided; no bound from prices is above it.
    pub(super) divisible: Option<f64>,
    /// Processor time of ours.
    pub(super) own_seconds: f64,
    pub(super) own_cost: f64,
    pub(super) own_bound: f64,
    /// By how much our cost is above the optimum, as a share of it; nothing when ours exceeds a room, or nothing is proven.
    pub(super) cost_above: Option<f64>,
    /// By how much our bound is below the optimum, as a share of it.
    pub(super) bound_below: Option<f64>,
}

/// How to get what a build without the feature has not.
const NO_EXACT: &str =
    "not in this build: cargo run --release --package limosa --features exact -- bench placement";

pub(super) fn run(options: &Options, format: Format) -> ExitCode {
    let mut lines = Vec::new();
    for &groups in &options.groups {
        for (&load, &fill) in
            options.load.iter().flat_map(|load| options.fill.iter().map(move |fill| (load, fill)))
        {
            match measure(options, groups, load, fill) {
                Ok(some) => lines.extend(some),
                Err(error) => {
                    complain(&format!("no instance of {groups} groups: {error}"));
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    let exact = match exact(options) {
        Ok(exact) => exact,
        Err(error) => {
            complain(&format!("no small instance: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let leader: Vec<leader::Line> = options.groups.iter().flat_map(|&groups| led(options, groups)).collect();
    print(&lines, &leader, &verdicts(options, &lines), &exact, format);
    ExitCode::SUCCESS
}

/// Rounds of a leader at the first fill, where there are sites enough to choose from, and no more groups than a service can have.
fn led(options: &Options, groups: u32) -> Vec<leader::Line> {
    let fits = (2..=255).contains(&options.sites) && groups as usize <= GROUPS_PER_SERVICE_MAX;
    match options.fill.first().filter(|_| fits && !options.no_leader) {
        Some(&fill) => leader::measure(groups, options.sites, fill, options.seed, options.runs),
        None => Vec::new(),
    }
}

#[cfg(feature = "exact")]
fn exact(options: &Options) -> Result<Vec<Exact>, placement::solver::InstanceError> {
    if options.exact_seconds == 0 {
        return Ok(Vec::new());
    }
    super::exact::measure(options.candidates, options.seed, options.exact_seconds)
}

#[cfg(not(feature = "exact"))]
fn exact(_: &Options) -> Result<Vec<Exact>, placement::solver::InstanceError> {
    Ok(Vec::new())
}

/// The aims that the measured networks speak of.
fn verdicts(options: &Options, lines: &[Line]) -> Vec<Verdict> {
    if (options.sites, options.candidates) != (AIM_SITES, AIM_CANDIDATES) {
        return Vec::new();
    }
    let verdict = |aim: &Aim| {
        let same = |line: &&Line| {
            (line.groups, line.what, line.fill) == (aim.groups, aim.what, AIM_FILL) && line.load == AIM_LOAD
        };
        let line = lines.iter().find(same)?;
        let near = aim.gap.is_none_or(|aim| line.gap.is_some_and(|gap| gap < aim));
        Some(Verdict {
            groups: aim.groups,
            what: aim.what,
            seconds_below: aim.seconds,
            gap_below: aim.gap,
            seconds: line.seconds,
            gap: line.gap,
            met: line.seconds < aim.seconds && line.exceeded == 0 && near,
        })
    };
    AIMS.iter().filter_map(verdict).collect()
}

/// All lines of one network, medians of the runs.
fn measure(
    options: &Options,
    groups: u32,
    load: Load,
    fill: f64,
) -> Result<Vec<Line>, placement::solver::InstanceError> {
    let shape = Shape {
        groups: groups as usize,
        sites: options.sites.into(),
        candidates: options.candidates.into(),
        fill,
        load,
        seed: options.seed,
    };
    let instance = generate::instance(&shape)?;
    let mut runs = Vec::new();
    for _ in 0..options.runs {
        runs.push(once(&instance, groups, &name(load), fill));
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

fn once(instance: &Instance, groups: u32, load: &str, fill: f64) -> Vec<Line> {
    let mut solver = Solver::new(instance.clone());
    let line = |what, (seconds, certificate): (f64, Certificate), solver: &Solver| Line {
        groups,
        load: load.to_owned(),
        fill,
        what,
        seconds,
        gap: Some(certificate.gap()).filter(|gap| gap.is_finite()),
        moves: certificate.moves,
        exceeded: certificate.exceeded.len(),
        passes: Some(certificate.passes),
        bytes: Some(solver.bytes()),
        bytes_per_group: Some(solver.bytes() as f64 / f64::from(groups)),
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
        load: load.to_owned(),
        fill,
        what: "greedy",
        seconds,
        gap,
        moves,
        exceeded,
        passes: None,
        bytes: None,
        bytes_per_group: None,
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
pub(super) fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let before = now();
    let result = work();
    (now().saturating_sub(before).as_secs_f64(), result)
}

fn print(lines: &[Line], leader: &[leader::Line], verdicts: &[Verdict], exact: &[Exact], format: Format) {
    let output = Output { format, headers: true };
    let hint = (!cfg!(feature = "exact")).then_some(NO_EXACT);
    let json = serde_json::json!({
        "rounds": lines, "leader": leader, "aims": verdicts, "exact": exact, "exact_hint": hint,
    });
    output.print(&json, &round_rows(lines));
    if !matches!(format, Format::Table) {
        return;
    }
    for rows in [leader_rows(leader), exact_rows(exact, hint), aim_rows(verdicts)] {
        if !rows.rows.is_empty() {
            Output { format, headers: false }
                .print(&json, &Rows { heads: &[], rows: vec![vec![String::new()]] });
            output.print(&json, &rows);
        }
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.4} %", share * 100.0))
}

fn round_rows(lines: &[Line]) -> Rows {
    let text = |line: &Line| {
        vec![
            line.groups.to_string(),
            line.load.clone(),
            format!("{:.0} %", line.fill * 100.0),
            line.what.to_owned(),
            format!("{:.1}", line.seconds * 1e3),
            percent(line.gap),
            line.moves.to_string(),
            line.exceeded.to_string(),
            line.passes.map_or("-".to_owned(), |passes| format!("{passes:.1}")),
            line.bytes.map_or("-".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e6)),
            line.bytes_per_group.map_or("-".to_owned(), |bytes| format!("{bytes:.0}")),
        ]
    };
    let heads =
        &["GROUPS", "LOAD", "FILL", "ROUND", "MS", "GAP", "MOVES", "EXCEEDED", "PASSES", "MB", "BYTES/GROUP"];
    Rows { heads, rows: lines.iter().map(text).collect() }
}

fn leader_rows(leader: &[leader::Line]) -> Rows {
    let count = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
    let text = |line: &leader::Line| {
        let ms = format!("{:.1}", line.seconds * 1e3);
        vec![line.groups.to_string(), line.what.to_owned(), ms, count(line.touched), count(line.moves)]
    };
    Rows { heads: &["GROUPS", "LEADER", "MS", "TOUCHED", "MOVES"], rows: leader.iter().map(text).collect() }
}

fn exact_rows(exact: &[Exact], hint: Option<&str>) -> Rows {
    if let Some(hint) = hint {
        return Rows { heads: &["EXACT"], rows: vec![vec![hint.to_owned()]] };
    }
    let text = |one: &Exact| {
        let under_divisible = one.divisible.map(|divisible| 1.0 - one.own_bound / divisible);
        vec![
            one.groups.to_string(),
            one.sites.to_string(),
            one.state.to_owned(),
            format!("{:.1}", one.seconds * 1e3),
            format!("{:.1}", one.own_seconds * 1e3),
            percent(one.cost_above),
            percent(one.bound_below),
            percent(under_divisible),
        ]
    };
    let heads =
        &["GROUPS", "SITES", "EXACT", "MS", "OURS-MS", "COST-ABOVE", "BOUND-BELOW", "BELOW-DIVISIBLE"];
    Rows { heads, rows: exact.iter().map(text).collect() }
}

fn aim_rows(verdicts: &[Verdict]) -> Rows {
    let text = |verdict: &Verdict| {
        vec![
            format!("{} {}", verdict.groups, verdict.what),
            format!("{:.0}", verdict.seconds_below * 1e3),
            format!("{:.1}", verdict.seconds * 1e3),
            verdict.gap_below.map_or("-".to_owned(), |gap| format!("{:.2} %", gap * 100.0)),
            percent(verdict.gap),
            if verdict.met { "met" } else { "missed" }.to_owned(),
        ]
    };
    let heads = &["AIM", "MS-BELOW", "MS", "GAP-BELOW", "GAP", "AIM-IS"];
    Rows { heads, rows: verdicts.iter().map(text).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_is_measured_and_the_certificate_holds() {
        let options = Options {
            groups: vec![500],
            sites: 10,
            candidates: 4,
            fill: vec![0.6],
            load: vec![Load::Pareto],
            seed: 1,
            runs: 2,
            exact_seconds: 0,
            no_leader: true,
        };
        let lines = measure(&options, 500, Load::Pareto, 0.6).unwrap();
        assert_eq!(
            lines.iter().map(|l| l.what).collect::<Vec<_>>(),
            ["cold", "warm", "changed", "lost", "greedy"]
        );
        assert_eq!(lines[0].exceeded, 0);
        assert!(lines[0].gap.unwrap() < 0.05, "{lines:?}");
        assert!(lines[3].moves > 0, "{lines:?}");
    }

    #[test]
    fn an_aim_is_met_in_time_within_the_rooms_and_with_a_small_gap() {
        let options = Options {
            groups: vec![100_000],
            sites: 100,
            candidates: 16,
            fill: vec![0.8],
            load: vec![Load::Pareto],
            seed: 1,
            runs: 1,
            exact_seconds: 0,
            no_leader: true,
        };
        let good = Line {
            groups: 100_000,
            load: "pareto".to_owned(),
            fill: 0.8,
            what: "warm",
            seconds: 0.09,
            gap: Some(0.0004),
            moves: 1,
            exceeded: 0,
            passes: None,
            bytes: None,
            bytes_per_group: None,
        };
        let met = |line: &Line| verdicts(&options, std::slice::from_ref(line))[0].met;
        assert!(met(&good));
        assert!(!met(&Line { seconds: 0.11, ..good.clone() }));
        assert!(!met(&Line { gap: Some(0.0006), ..good.clone() }));
        assert!(!met(&Line { gap: None, exceeded: 1, ..good.clone() }));
        // A loss has no aim for its gap, but may exceed no room.
        let lost = Line { what: "lost", gap: Some(0.01), ..good.clone() };
        assert!(met(&lost));
        assert!(!met(&Line { gap: None, exceeded: 1, ..lost }));
        assert!(verdicts(&Options { sites: 50, ..options.clone() }, &[good]).is_empty());
    }

    #[test]
    fn loads_are_named_as_they_are_given() {
        for text in ["pareto", "equal", "zipf:1.1", "heavy:0.005"] {
            assert_eq!(load(text).map(name).as_deref(), Ok(text));
        }
        for wrong in ["", "zipf", "zipf:0", "zipf:5", "heavy:1", "heavy:-1", "heavy:NaN", "equal:1", "even"] {
            assert!(load(wrong).unwrap_err().contains("for example zipf:1.1"), "{wrong}");
        }
    }

    #[test]
    fn shares_are_above_zero_and_at_most_one() {
        assert_eq!(share("0.8"), Ok(0.8));
        for wrong in ["0", "1.1", "-1", "NaN", "x"] {
            assert!(share(wrong).unwrap_err().contains("for example 0.8"), "{wrong}");
        }
    }
}
