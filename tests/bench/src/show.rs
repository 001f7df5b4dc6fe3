//! Tables and plots.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use migrate_gate::Direction;
use migrate_gate::cost::{Case, PacketCost};
use plotters::prelude::*;

use crate::costs;
use crate::goals;
use crate::method::Method;
use crate::record::{Run, Spread, Tcp};
use crate::scenario::Scenario;
use crate::suite::Suite;

/// A suite with what was planned and what was measured.
pub(crate) type Measured = (Suite, Vec<(Scenario, Vec<Method>)>, Vec<Run>);

/// One run, as it ends.
pub(crate) fn line(run: &Run) -> String {
    let what = format!("{} / {} / {}", run.scenario, run.method, run.number);
    match &run.failure {
        Some(why) => format!("{what}: FAILED: {why}"),
        None => format!(
            "{what}: client gap {} ms, {} segments sent again by the client",
            millis(run.client_gap_us),
            run.client_tcp.retransmissions
        ),
    }
}

fn millis(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

/// Milliseconds as a plot has them.
pub(crate) fn plotted_ms(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64() * 1e3
}

fn spread(runs: &[&Run], value: impl Fn(&Run) -> Option<u64>) -> Option<Spread> {
    Spread::of(runs.iter().filter_map(|run| value(run)))
}

/// Columns of a suite's table behind those that name the row.
const COLUMNS: [&str; 16] = [
    "client gap median (p99, max), ms",
    "client late median (max), ms",
    "ratio",
    "blackout median, ms",
    "gap beyond the blackout median, ms",
    "frozen median, ms",
    "gate closed in median, µs",
    "sent median, MB",
    "stream median, MB/s",
    "served in rounds median, %",
    "held (dropped) median",
    "sent again: client, hosts",
    "timers: client, hosts",
    "RST: client, hosts",
    "entries written in median, ms",
    "took median, ms",
];

/// The Markdown table of a suite, without columns in which nothing was measured.
pub(crate) fn table(suite: Suite, plan: &[(Scenario, Vec<Method>)], runs: &[Run]) -> String {
    let mut rows = Vec::new();
    for (scenario, methods) in plan {
        let mut first = None;
        for method in methods {
            let of_both: Vec<&Run> = of_both(runs, scenario, *method).collect();
            let good: Vec<&Run> = of_both
                .iter()
                .copied()
                .filter(|run| run.failure.is_none())
                .collect();
            let failed = of_both.len() - good.len();
            let why = of_both.iter().find_map(|run| run.failure.as_deref());
            let count = match (good.len(), failed) {
                (0, 0) => continue,
                (0, failed) => failed.to_string(),
                (good, 0) => good.to_string(),
                (good, failed) => format!("{good} ({failed} failed)"),
            };
            let cells = row(&good, &mut first).ok_or(why.unwrap_or_default());
            let at = names(&of_both, |run| run.commit.as_deref());
            let head = format!("{} | {} | {count} | {at}", scenario.name(), method.name());
            rows.push((head, cells));
        }
    }
    let is_measured = |column: &usize| {
        let mut cells = rows.iter().flat_map(|(_, cells)| cells);
        cells.any(|cells| cells[*column] != NOT_MEASURED && cells[*column] != NONE_HELD)
    };
    let shown: Vec<usize> = (0..COLUMNS.len()).filter(is_measured).collect();
    let picked = |cells: &[String]| {
        let picked: Vec<&str> = shown.iter().map(|&column| cells[column].as_str()).collect();
        picked.join(" | ")
    };
    let mut text = format!(
        "### {}\n\n| scenario | method | runs | at | {} |\n|---|---|---|---|{}\n",
        suite.title(),
        picked(&COLUMNS.map(str::to_owned)),
        "---|".repeat(shown.len()),
    );
    for (head, cells) in &rows {
        let cells = match cells {
            Ok(cells) => picked(cells),
            Err(why) => {
                let rest = " |".repeat(shown.len().saturating_sub(1));
                format!("failed: {}{rest}", in_a_cell(why))
            }
        };
        let _ = writeln!(text, "| {head} | {cells} |");
    }
    text
}

/// What runs say of themselves, each once.
fn names<'a>(
    runs: impl IntoIterator<Item = &'a &'a Run>,
    name: impl Fn(&Run) -> Option<&str>,
) -> String {
    let all: BTreeSet<&str> = runs.into_iter().filter_map(|run| name(run)).collect();
    all.into_iter().collect::<Vec<_>>().join(", ")
}

/// In the place of a figure that there is not.
const NOT_MEASURED: &str = "-";

/// The same of two figures.
const NONE_HELD: &str = "- (-)";

/// The cells of [`COLUMNS`]; none without a run that went well. `first` is the
/// median gap with which the ratio is made.
fn row(good: &[&Run], first: &mut Option<u64>) -> Option<Vec<String>> {
    let gap = spread(good, |run| Some(run.client_gap_us))?;
    let base = *first.get_or_insert(gap.median.max(1));
    let tenths = gap.median * 10 / base;
    let dash = || NOT_MEASURED.to_owned();
    let ms = |value: fn(&Run) -> Option<u64>| {
        spread(good, value).map_or_else(dash, |s| millis(s.median))
    };
    let number = |value: fn(&Run) -> Option<u64>| {
        spread(good, value).map_or_else(dash, |s| s.median.to_string())
    };
    let both = |value: fn(&Tcp) -> u64| {
        let median =
            |of: fn(&Run) -> Tcp| spread(good, |run| Some(value(&of(run)))).map_or(0, |s| s.median);
        format!(
            "{}, {}",
            median(|run| run.client_tcp),
            median(|run| run.hosts_tcp)
        )
    };
    let closed = spread(good, |run| run.report.as_ref()?.gate_close_ns);
    let held = number(|run| Some(run.report.as_ref()?.held_packets));
    let dropped = number(|run| Some(run.report.as_ref()?.dropped_packets));
    Some(vec![
        format!(
            "{} ({}, {})",
            millis(gap.median),
            millis(gap.p99),
            millis(gap.max)
        ),
        spread(good, |run| Some(run.client_lag_us)).map_or_else(dash, |lag| {
            format!("{} ({})", millis(lag.median), millis(lag.max))
        }),
        format!("{}.{}", tenths / 10, tenths % 10),
        ms(Run::blackout_us),
        ms(|run| Some(run.client_gap_us.saturating_sub(run.blackout_us()?))),
        ms(|run| Some(run.report.as_ref()?.frozen_us)),
        closed.map_or_else(dash, |s| {
            format!("{}.{}", s.median / 1000, s.median % 1000 / 100)
        }),
        number(|run| Some(run.report.as_ref()?.bytes / 1_000_000)),
        number(|run| Some(run.stream_bytes_per_s()? / 1_000_000)),
        number(|run| run.served_in_rounds_percent),
        format!("{held} ({dropped})"),
        both(|tcp| tcp.retransmissions),
        both(|tcp| tcp.timeouts),
        both(|tcp| tcp.resets),
        ms(|run| run.filled_us),
        ms(|run| Some(run.took_us)),
    ])
}

/// The first line of a text, without what would end a cell.
fn in_a_cell(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.chars()
        .filter(|&c| c != '|')
        .take(FAILURE_CHARS)
        .collect()
}

/// Of a failure's text, in a table.
const FAILURE_CHARS: usize = 160;

/// What the open gate takes for a packet, as a table.
pub(crate) fn packet_costs(costs: &[PacketCost]) -> String {
    let mut text = String::from(
        "A packet at the open gate, mean of a million runs by the kernel (`BPF_PROG_TEST_RUN`), ns:\n\n\
         | connections known | packet | ingress | egress |\n|---|---|---|---|\n",
    );
    for pair in costs.chunks(2) {
        let ns = |direction| {
            let cost = pair.iter().find(|cost| cost.direction == direction);
            cost.map_or_else(|| "-".to_owned(), |cost| cost.ns.to_string())
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            pair[0].flows,
            match pair[0].case {
                Case::Foreign => "not the tree's",
                Case::Tracked => "the tree's",
                Case::Watched => "the tree's, shortly before the blackout",
            },
            ns(Direction::Ingress),
            ns(Direction::Egress),
        );
    }
    text
}

/// Writes `benchmarks.md` and its plots.
pub(crate) fn write_docs(
    directory: &Path,
    measured: &[Measured],
    costs: &[PacketCost],
) -> anyhow::Result<()> {
    let plots = directory.join("benchmarks");
    fs::create_dir_all(&plots).with_context(|| format!("make {}", plots.display()))?;
    let runs = || measured.iter().flat_map(|(_, _, runs)| runs);
    let mut machines: BTreeSet<String> = runs().filter_map(|run| run.machine.clone()).collect();
    if runs().any(|run| run.machine.is_none()) {
        machines.insert(machine());
    }
    let machines: Vec<String> = machines.into_iter().collect();
    let mut text = format!(
        "# Benchmarks\n\n\
         `{}` makes the runs that are missing and writes this page; it was\n\
         written by `{}`. Two hosts and a client are namespaces of one machine,\n\
         joined by a bridge: {}.\n\n\
         Every run has hosts of its own; methods take turns where they were measured *at* the same\n\
         commit (`+`: with changes that are part of the next one). The client holds every reply\n\
         against its request; the *client gap* is the longest time from a request to its reply.\n\
         *Client late* is how late the client itself was at worst, which is part of its gap where others\n\
         had the CPU. *Ratio* is the median gap over that of the first method. A median of ten is the\n\
         fifth, a p99 of ten the last. Stock is\n\
         `criu dump` and `criu restore` with everything done well: warm, images on tmpfs, copied\n\
         from memory to memory, the new place announced at once. *Stream* is what the round\n\
         that sends most brings over in a second. *Served in rounds* is what clients who ask\n\
         without a pause get in a second of the rounds, of what they get before. *Entries written in*\n\
         is how long the client took to fill the data store, before the move. *Sent again*, *timers* and *RST* are\n\
         what the kernels counted in a run (`RetransSegs`, `TCPTimeouts`, `OutRsts`), medians; on\n\
         the hosts the connections that carry memory count too. Figures of one machine that\n\
         others use too: read the ratios.\n\n",
        "cargo xtask bench --results docs/benchmarks/runs --docs docs",
        command_line(),
        machines.join("; and "),
    );
    text += &goals::table(measured, costs);
    text += "\n";
    for (suite, plan, runs) in measured {
        text += &table(*suite, plan, runs);
        text += "\n";
        if *suite == Suite::Gate {
            text += "With iptables, 10,000 connections take many minutes and are left out. With `skip` requests are\n\
                 lost, which is why runs fail; the more connections, the more of them.\n\n";
            text += &packet_costs(costs);
            text += "\n";
        }
        for (name, title, axis, series) in plots_of(*suite, runs, plan) {
            let file = format!("{name}.svg");
            plot(&plots.join(&file), title, axis, &series)
                .with_context(|| format!("plot {file}"))?;
            let _ = writeln!(text, "![{title}](benchmarks/{file})\n");
        }
        let gaps = gaps(*suite, plan, runs);
        if !gaps.is_empty() {
            let file = format!("{}-gap.svg", suite.name());
            bar_plot(&plots.join(&file), GAP_BY_METHOD, ["client gap"], &gaps)
                .with_context(|| format!("plot {file}"))?;
            let _ = writeln!(text, "![{GAP_BY_METHOD}](benchmarks/{file})\n");
        }
        let bars = bars(plan, runs);
        text += &phases(&bars);
        text += &costs::table(*suite, plan, runs);
        if !bars.is_empty() {
            let file = format!("{}-blackout.svg", suite.name());
            let phases = costs::PARTS.map(|(name, _)| name);
            bar_plot(&plots.join(&file), BLACKOUT_BY_PHASE, phases, &bars)
                .with_context(|| format!("plot {file}"))?;
            let _ = writeln!(text, "![{BLACKOUT_BY_PHASE}](benchmarks/{file})\n");
        }
    }
    let path = directory.join("benchmarks.md");
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

/// The blackout of the first method in every scenario, split by phase.
fn bars(plan: &[(Scenario, Vec<Method>)], runs: &[Run]) -> Vec<(String, [f64; 5])> {
    plan.iter()
        .filter_map(|(scenario, methods)| {
            let parts = costs::parts_ms(runs, scenario, methods.first()?)?;
            Some((scenario.name(), parts))
        })
        .collect()
}

/// The client gap of every method in every scenario of a suite that has no axis to plot it on.
fn gaps(suite: Suite, plan: &[(Scenario, Vec<Method>)], runs: &[Run]) -> Vec<(String, [f64; 1])> {
    if !matches!(suite, Suite::Traffic | Suite::Stores | Suite::Goals) {
        return Vec::new();
    }
    let pairs = plan
        .iter()
        .flat_map(|(scenario, methods)| methods.iter().map(move |method| (scenario, method)));
    pairs
        .filter_map(|(scenario, method)| {
            let good = of_both(runs, scenario, *method).filter(|run| run.failure.is_none());
            let gap = Spread::of(good.map(|run| run.client_gap_us))?;
            let name = format!("{} / {}", scenario.name(), method.name());
            Some((name, [plotted_ms(gap.median)]))
        })
        .collect()
}

fn of_both<'a>(
    runs: &'a [Run],
    scenario: &Scenario,
    method: Method,
) -> impl Iterator<Item = &'a Run> + use<'a> {
    let (scenario, method) = (scenario.name(), method.name());
    runs.iter()
        .filter(move |run| run.scenario == scenario && run.method == method)
}

const BLACKOUT_BY_PHASE: &str = "Blackout by phase";
const GAP_BY_METHOD: &str = "Client gap by method";

/// The same as a table.
fn phases(bars: &[(String, [f64; 5])]) -> String {
    let names = costs::PARTS.map(|(name, _)| name).join(" | ");
    let mut text = format!(
        "Where the blackout of the first method goes, medians in ms:\n\n\
         | scenario | {names} |\n|---|---|---|---|---|---|\n",
    );
    for (scenario, parts) in bars {
        let cells = parts.map(|part| format!("{part:.1}")).join(" | ");
        let _ = writeln!(text, "| {scenario} | {cells} |");
    }
    text + "\n"
}

/// One bar a row, one colour a part.
fn bar_plot<const PARTS: usize>(
    path: &Path,
    title: &str,
    names: [&'static str; PARTS],
    bars: &[(String, [f64; PARTS])],
) -> anyhow::Result<()> {
    const ROW: u32 = 34;
    /// Of a letter of a row's name, about.
    const LETTER: u32 = 7;
    let letters = bars.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let names_width = u32::try_from(letters)? * LETTER + 20;
    let longest = bars
        .iter()
        .map(|(_, parts)| parts.iter().sum::<f64>())
        .fold(1.0, f64::max);
    let rows = u32::try_from(bars.len())?;
    let size = (530 + names_width, 130 + ROW * rows);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(names_width)
        .build_cartesian_2d(0.0..longest * 1.25, (0..rows).into_segmented())?;
    // The first on top.
    let name = |row: &SegmentValue<u32>| match row {
        SegmentValue::CenterOf(row) | SegmentValue::Exact(row) => {
            let at = bars.len().checked_sub(1 + *row as usize);
            at.and_then(|at| bars.get(at))
                .map_or_else(String::new, |(name, _)| name.clone())
        }
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .x_desc("ms (medians)")
        .y_labels(bars.len())
        .y_label_formatter(&name)
        .light_line_style(WHITE)
        .disable_y_mesh()
        .draw()?;
    for (index, part) in names.into_iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let rectangles = (0..rows).zip(bars.iter().rev()).map(|(row, (_, parts))| {
            let from: f64 = parts[..index].iter().sum();
            let corners = [
                (from, SegmentValue::Exact(row)),
                (from + parts[index], SegmentValue::Exact(row + 1)),
            ];
            let mut bar = Rectangle::new(corners, colour.filled());
            bar.set_margin(5, 5, 0, 0);
            bar
        });
        chart
            .draw_series(rectangles)?
            .label(part)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

/// Points of one method: where on the axis, median gap in milliseconds.
type Series = BTreeMap<String, Vec<(f64, f64)>>;

fn plots_of(
    suite: Suite,
    runs: &[Run],
    plan: &[(Scenario, Vec<Method>)],
) -> Vec<(&'static str, &'static str, &'static str, Series)> {
    let mut series = Series::new();
    for (scenario, methods) in plan {
        let Some(at) = costs::amount(suite, scenario) else {
            continue;
        };
        for method in methods {
            let good = of_both(runs, scenario, *method).filter(|run| run.failure.is_none());
            if let Some(gap) = Spread::of(good.map(|run| run.client_gap_us)) {
                let point = (at, plotted_ms(gap.median));
                series.entry(method.name()).or_default().push(point);
            }
        }
    }
    match suite {
        Suite::Memory => vec![(
            "memory",
            "Client gap against memory, 10 MB/s written",
            "resident memory, MiB",
            series,
        )],
        Suite::Gate => vec![(
            "connections",
            "Client gap against connections",
            "connections",
            series,
        )],
        Suite::Scale => vec![(
            "processes",
            "Client gap against processes",
            "processes",
            series,
        )],
        Suite::Traffic | Suite::Stores | Suite::Goals => Vec::new(),
    }
}

/// Both axes are logarithmic: methods differ by factors.
fn plot(path: &Path, title: &str, axis: &str, series: &Series) -> anyhow::Result<()> {
    let points = || series.values().flatten();
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        let low = points().map(value).fold(f64::INFINITY, f64::min);
        let high = points().map(value).fold(0.0, f64::max);
        low.max(0.1) / 2.0..high.max(1.0) * 2.0
    };
    if points().next().is_none() {
        return Ok(());
    }
    let root = SVGBackend::new(path, (720, 440)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(bounds(|p| p.0).log_scale(), bounds(|p| p.1).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(axis)
        .y_desc("client gap, ms (median)")
        .light_line_style(WHITE)
        .draw()?;
    for (index, (method, points)) in series.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(
                points.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(method)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(
            points
                .iter()
                .map(|point| Circle::new(*point, 3, colour.filled())),
        )?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

fn command_line() -> String {
    const RESULTS: &str = "--results";
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    // Where else on a machine results are is nobody else's business.
    let at = arguments.iter().position(|argument| argument == RESULTS);
    if let Some(at) = at.filter(|at| {
        let place = arguments.get(at + 1);
        place.is_none_or(|place| Path::new(place).is_absolute())
    }) {
        arguments.drain(at..arguments.len().min(at + 2));
    }
    format!("cargo xtask bench {}", arguments.join(" "))
        .trim_end()
        .to_owned()
}

pub(crate) fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("an unnamed CPU", |(_, model)| model)
        .to_owned();
    let cores = cpu
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let said = |program: &str, argument: &str| {
        Command::new(program)
            .arg(argument)
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            .unwrap_or_default()
    };
    let first = |text: String| text.lines().next().unwrap_or_default().to_owned();
    format!(
        "Linux {}, {model}, {cores} cores;\n{}, Redis {}, memcached {}",
        said("uname", "-r"),
        first(said(&crate::method::criu(), "--version")).replace("Version:", "CRIU"),
        // "Redis server v=7.0.15 sha=...": the rest is about its build.
        said("redis-server", "--version")
            .split_whitespace()
            .find_map(|word| word.strip_prefix("v="))
            .unwrap_or_default(),
        first(said("memcached", "--version")).replace("memcached ", ""),
    )
}
