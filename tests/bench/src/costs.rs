//! What a GiB, a connection and a process cost: a straight line through the medians of each
//! part of the blackout.

use std::fmt::Write as _;

use migrate_core::report::Blackout;

use crate::method::Method;
use crate::record::{Run, Spread};
use crate::scenario::{Scenario, Server};
use crate::suite::Suite;

/// The name of a part of a blackout, and how to read it, in microseconds.
type Part = (&'static str, fn(&Blackout) -> u64);

/// The parts of a blackout, in order.
pub(crate) const PARTS: [Part; 5] = [
    ("freeze", |blackout| blackout.freeze_us),
    ("dump", |blackout| blackout.dump_us),
    ("transfer", |blackout| blackout.transfer_us),
    ("restore", |blackout| blackout.restore_us),
    ("takeover", |blackout| blackout.takeover_us),
];

/// The rate of writing at which sizes are compared, MB/s.
const DIRTY_MB_PER_S: u32 = 10;

/// Medians of the parts of a blackout, in milliseconds; none without a run.
pub(crate) fn parts_ms(runs: &[Run], scenario: &Scenario, method: &Method) -> Option<[f64; 5]> {
    let blackouts: Vec<&Blackout> = runs
        .iter()
        .filter(|run| run.scenario == scenario.name() && run.method == method.name())
        .filter_map(|run| Some(&run.report.as_ref()?.blackout))
        .collect();
    if blackouts.is_empty() {
        return None;
    }
    Some(PARTS.map(|(_, part)| {
        let median = Spread::of(blackouts.iter().map(|blackout| part(blackout)));
        median.map_or(0.0, |spread| crate::show::plotted_ms(spread.median))
    }))
}

/// How much a scenario has of what its suite compares: MiB, connections, or
/// processes.
pub(crate) fn amount(suite: Suite, scenario: &Scenario) -> Option<f64> {
    match (suite, scenario.server) {
        (
            Suite::Memory,
            Server::Ballast {
                resident_mib,
                dirty_mb_per_s: DIRTY_MB_PER_S,
            },
        ) => Some(f64::from(resident_mib)),
        (Suite::Gate, _) => Some(f64::from(scenario.connections)),
        (Suite::Scale, Server::Family { processes }) => Some(f64::from(processes)),
        _ => None,
    }
}

/// Where it was measured, what, and how much that counts.
type Point = (f64, f64, f64);

/// Least squares: where the line begins, and what it gains for each one.
fn line(points: &[Point]) -> Option<(f64, f64)> {
    let sum = |value: &dyn Fn(&Point) -> f64| points.iter().map(|p| p.2 * value(p)).sum::<f64>();
    let weight = sum(&|_| 1.0);
    let (x, y) = (sum(&|p| p.0) / weight, sum(&|p| p.1) / weight);
    let spread = sum(&|p| (p.0 - x).powi(2));
    if points.len() < 2 || spread == 0.0 {
        return None;
    }
    let each = sum(&|p| (p.0 - x) * (p.1 - y)) / spread;
    Some((y - each * x, each))
}

/// The Markdown table of the lines of the first method; nothing with fewer than
/// two points.
pub(crate) fn table(suite: Suite, plan: &[(Scenario, Vec<Method>)], runs: &[Run]) -> String {
    let (unit, size) = match suite {
        Suite::Memory => ("GiB", 1024.0),
        Suite::Scale => ("process", 1.0),
        _ => ("connection", 1.0),
    };
    let mut measured = Vec::new();
    for (scenario, methods) in plan {
        let (Some(amount), Some(method)) = (amount(suite, scenario), methods.first()) else {
            continue;
        };
        if let Some(parts) = parts_ms(runs, scenario, method) {
            measured.push((amount / size, parts));
        }
    }
    let fitted = |part: &dyn Fn(&[f64; 5]) -> f64| {
        let points: Vec<Point> = measured
            .iter()
            .map(|(amount, parts): &(f64, [f64; 5])| {
                // A tenth of a small tree's blackout counts as much as that of a large one's.
                let whole: f64 = parts.iter().sum();
                (*amount, part(parts), whole.max(1.0).powi(-2))
            })
            .collect();
        line(&points)
    };
    let Some((fixed, each)) = fitted(&|parts| parts.iter().sum()) else {
        return String::new();
    };
    let mut text = format!(
        "What that comes to, as a straight line through these medians that has the least relative error, ms:\n\n\
         | part | in any case | for each {unit} |\n|---|---|---|\n"
    );
    for (index, (name, _)) in PARTS.iter().enumerate() {
        if let Some((fixed, each)) = fitted(&|parts| parts[index]) {
            let _ = writeln!(text, "| {name} | {fixed:.1} | {each:.3} |");
        }
    }
    let _ = writeln!(text, "| together | {fixed:.1} | {each:.3} |\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again() {
        let points = [1.0, 2.0, 4.0].map(|x| (x, 3.0 + 0.5 * x, 1.0 / x));
        let (fixed, each) = line(&points).unwrap_or_default();
        assert!((fixed - 3.0).abs() < 1e-9 && (each - 0.5).abs() < 1e-9);
        assert_eq!(line(&points[..1]), None);
        assert_eq!(line(&[(1.0, 1.0, 1.0), (1.0, 2.0, 1.0)]), None);
        // What hardly counts hardly bends it.
        let (fixed, each) = line(&[points[0], points[1], (4.0, 9.0, 1e-9)]).unwrap_or_default();
        assert!((fixed - 3.0).abs() < 1e-6 && (each - 0.5).abs() < 1e-6);
    }
}
