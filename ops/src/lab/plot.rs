//! The plot: request latency and throughput over time, with what happened marked. One SVG file, nothing else needed.

use std::fmt::Write as _;

use super::clients::{Rate, Second};
use super::report::{Loss, Report};

const WIDTH: f64 = 1_000.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
/// Where labels of happenings stand.
const LABELS: f64 = 68.0;
const PANEL: f64 = 170.0;
const GAP: f64 = 34.0;
/// Colours that differ for most eyes, on white and on dark.
const BLUE: &str = "#0072b2";
const ORANGE: &str = "#d55e00";
const GREEN: &str = "#009e73";
const GREY: &str = "#777777";

/// Draws it.
pub(super) fn svg(report: &Report) -> String {
    let last = report.clients.requests.per_second.last().map_or(1, |second| second.second + 1);
    let time = Axis { low: 0.0, high: float(last), from: LEFT, to: WIDTH - RIGHT, log: false };
    let (top, middle) = (LABELS, LABELS + PANEL + GAP);
    let height = middle + PANEL + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    happenings(&mut svg, report, &time, top, middle + PANEL);
    latency(&mut svg, report, &time, top);
    throughput(&mut svg, report, &time, middle);
    seconds(&mut svg, &time, middle + PANEL);
    svg + "</svg>\n"
}

/// From a value to a place.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.max(self.low).log10() } else { value };
        let share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low));
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

fn happenings(svg: &mut String, report: &Report, time: &Axis, top: f64, bottom: f64) {
    let mut free = [f64::MIN; 3];
    for happening in &report.happenings {
        let (x, end) = (time.place(happening.start_s), time.place(happening.start_s + happening.seconds));
        let colour = if happening.loss == Loss::Never { GREY } else { ORANGE };
        let width = (end - x).max(1.5);
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\" \
             fill-opacity=\"0.18\"/>",
            bottom - top
        );
        // The first of three rows with room.
        let row = free.iter().position(|until| *until < x).unwrap_or(0);
        free[row] = x + 8.0 * float(happening.name.len() as u64);
        let y = top - 10.0 - 18.0 * float(row as u64);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x:.1}\" y2=\"{top}\" stroke=\"{colour}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
            x + 3.0,
            y + 4.0,
            happening.name
        );
    }
}

fn latency(svg: &mut String, report: &Report, time: &Axis, top: f64) {
    let seconds = &report.clients.requests.per_second;
    let most = seconds.iter().map(|second| second.latency.max_ms).fold(100.0, f64::max);
    let ms = Axis { low: 1.0, high: 10_f64.powf(most.log10().ceil()), from: top + PANEL, to: top, log: true };
    let ticks = std::iter::successors(Some(1.0), |tick| (tick * 10.0 <= ms.high).then_some(tick * 10.0));
    frame(svg, &ms, top, &ticks.collect::<Vec<_>>(), "request latency, ms");
    let curve = |of: fn(&Second) -> f64| {
        let points = seconds.iter().map(|s| (float(s.second) + 0.5, of(s)));
        points.map(|(x, y)| (time.place(x), ms.place(y))).collect::<Vec<_>>()
    };
    line(svg, &curve(|s| s.latency.max_ms), GREY, "1");
    line(svg, &curve(|s| s.latency.p99_ms), ORANGE, "1.5");
    line(svg, &curve(|s| s.latency.p50_ms), BLUE, "2");
    legend(svg, top, &[("p50", BLUE), ("p99", ORANGE), ("max", GREY)]);
}

fn throughput(svg: &mut String, report: &Report, time: &Axis, top: f64) {
    let clients = &report.clients;
    let all = [
        ("curl", BLUE, &clients.download.per_second),
        ("iperf3 TCP", GREEN, &clients.iperf_tcp.per_second),
        ("iperf3 UDP", ORANGE, &clients.iperf_udp.per_second),
    ];
    let most = all.iter().flat_map(|(_, _, rates)| *rates).map(|r| r.mbit_per_s).fold(10.0, f64::max);
    let step = if most > 100.0 {
        50.0
    } else if most > 40.0 {
        20.0
    } else {
        10.0
    };
    let mbit = Axis { low: 0.0, high: (most / step).ceil() * step, from: top + PANEL, to: top, log: false };
    let ticks = std::iter::successors(Some(0.0), |tick| (tick + step <= mbit.high).then_some(tick + step));
    frame(svg, &mbit, top, &ticks.collect::<Vec<_>>(), "throughput, Mbit/s");
    for (_, colour, rates) in all {
        let point = |rate: &Rate| (time.place(float(rate.second) + 0.5), mbit.place(rate.mbit_per_s));
        // Downloads end after the last request.
        let shown = rates.iter().filter(|rate| float(rate.second) < time.high);
        line(svg, &shown.map(point).collect::<Vec<_>>(), colour, "1.5");
    }
    legend(svg, top, &all.map(|(name, colour, _)| (name, colour)));
}

fn seconds(svg: &mut String, time: &Axis, bottom: f64) {
    let step = if time.high > 60.0 { 10.0 } else { 5.0 };
    let ticks = std::iter::successors(Some(0.0), |tick| (tick + step <= time.high).then_some(tick + step));
    for tick in ticks {
        let x = time.place(tick);
        let y = bottom + 16.0;
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{tick}</text>");
    }
    let (x, y) = (f64::midpoint(time.from, time.to), bottom + 34.0);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">seconds</text>");
}

fn frame(svg: &mut String, axis: &Axis, top: f64, ticks: &[f64], title: &str) {
    for tick in ticks {
        let (y, right) = (axis.place(*tick), WIDTH - RIGHT);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
            LEFT - 6.0,
            y + 4.0
        );
    }
    let y = top + PANEL / 2.0;
    let _ = writeln!(
        svg,
        "<text x=\"14\" y=\"{y:.1}\" transform=\"rotate(-90 14 {y:.1})\" text-anchor=\"middle\">{title}</text>"
    );
}

fn line(svg: &mut String, points: &[(f64, f64)], colour: &str, width: &str) {
    let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let points = points.join(" ");
    let _ = writeln!(
        svg,
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
    );
}

fn legend(svg: &mut String, top: f64, entries: &[(&str, &str)]) {
    let mut x = LEFT + 8.0;
    for (name, colour) in entries {
        let y = top + 14.0;
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\">{name}</text>");
        x += 8.0 * float(name.len() as u64) + 16.0;
    }
}

#[expect(clippy::cast_precision_loss, reason = "places on paper")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_places_linearly_or_by_decades_and_nothing_beyond_its_ends() {
        let linear = Axis { low: 0.0, high: 10.0, from: 100.0, to: 0.0, log: false };
        assert_eq!((linear.place(0.0), linear.place(5.0), linear.place(20.0)), (100.0, 50.0, 0.0));
        let log = Axis { low: 1.0, high: 100.0, from: 0.0, to: 2.0, log: true };
        assert_eq!((log.place(0.1), log.place(10.0), log.place(100.0)), (0.0, 1.0, 2.0));
    }
}
