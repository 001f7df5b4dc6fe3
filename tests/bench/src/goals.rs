//! What was aimed at, and what came of it.

use std::fmt::Write as _;

use migrate_gate::cost::{Case, PacketCost};

use crate::record::{Run, Spread};
use crate::show::Measured;
use crate::suite::Suite;

/// The method whose figures count.
const OURS: &str = "migrate";

/// What is good enough, and what is aimed at.
struct Goal {
    case: &'static str,
    unit: Unit,
    good: f64,
    goal: f64,
    /// More is better.
    is_rate: bool,
    /// The figure, where it was measured.
    figure: fn(&Figures<'_>) -> Option<f64>,
}

/// How a figure is written.
#[derive(Clone, Copy)]
enum Unit {
    Ms,
    Times,
    MbPerS,
    Ns,
    Count,
    Percent,
}

const GOALS: [Goal; 13] = [
    Goal {
        case: "redis, 100,000 keys, 1 connection: client gap",
        unit: Unit::Ms,
        good: 50.0,
        goal: 20.0,
        is_rate: false,
        figure: |all| all.gap_ms(Suite::Goals, "redis 100000 keys, 1 conn"),
    },
    Goal {
        case: "redis, 1 GiB, 100 connections, written to: client gap",
        unit: Unit::Ms,
        good: 150.0,
        goal: 60.0,
        is_rate: false,
        figure: |all| all.gap_ms(Suite::Goals, "redis 1 GiB, 100 conn"),
    },
    Goal {
        case: "redis, 4 GiB, 100 connections, written to: client gap",
        unit: Unit::Ms,
        good: 250.0,
        goal: 100.0,
        is_rate: false,
        figure: |all| all.gap_ms(Suite::Goals, "redis 4 GiB, 100 conn"),
    },
    Goal {
        case: "memcached, 1 GiB, 1,000 connections: client gap",
        unit: Unit::Ms,
        good: 250.0,
        goal: 100.0,
        is_rate: false,
        figure: |all| all.gap_ms(Suite::Goals, "memcached 1 GiB, 1000 conn"),
    },
    Goal {
        case: "memcached, 10,000 connections: client gap",
        unit: Unit::Ms,
        good: 1000.0,
        goal: 400.0,
        is_rate: false,
        figure: |all| all.gap_ms(Suite::Gate, "memcached, 10000 conn"),
    },
    Goal {
        case: "the gate closed on 1,000 connections",
        unit: Unit::Ms,
        good: 5.0,
        goal: 0.2,
        is_rate: false,
        figure: |all| {
            all.median(Suite::Gate, "memcached, 1000 conn", |run| {
                run.report.as_ref()?.gate_close_ns
            })
            .map(|ns| ns / 1e6)
        },
    },
    Goal {
        case: "client gap with 4 GiB over that with 1 GiB, 10 MB/s written",
        unit: Unit::Times,
        good: 2.5,
        goal: 1.5,
        is_rate: false,
        figure: |all| {
            let gap_ms = |mib| all.gap_ms(Suite::Memory, &format!("{mib} MiB, 10 MB/s, 10 conn"));
            Some(gap_ms(4096)? / gap_ms(1024)?)
        },
    },
    Goal {
        case: "tree frozen, 1 GiB, 10 MB/s written",
        unit: Unit::Ms,
        good: 150.0,
        goal: 60.0,
        is_rate: false,
        figure: |all| {
            all.median(Suite::Memory, "1024 MiB, 10 MB/s, 10 conn", |run| {
                Some(run.report.as_ref()?.frozen_us)
            })
            .map(|us| us / 1e3)
        },
    },
    Goal {
        case: "page stream, 1 GiB, reading and writing included",
        unit: Unit::MbPerS,
        good: 1500.0,
        goal: 3000.0,
        is_rate: true,
        figure: |all| {
            all.median(
                Suite::Memory,
                "1024 MiB, 10 MB/s, 10 conn",
                Run::stream_bytes_per_s,
            )
            .map(|bytes| bytes / 1e6)
        },
    },
    Goal {
        case: "a packet of the tree at the open gate, 1 connection known",
        unit: Unit::Ns,
        good: 200.0,
        goal: 80.0,
        is_rate: false,
        figure: |all| all.packet_ns(1),
    },
    Goal {
        case: "a packet of the tree at the open gate, 100,000 known",
        unit: Unit::Ns,
        good: 200.0,
        goal: 80.0,
        is_rate: false,
        figure: |all| all.packet_ns(100_000),
    },
    Goal {
        case: "RST at a client, and replies that were wrong, lost or doubled, in all runs",
        unit: Unit::Count,
        good: 0.0,
        goal: 0.0,
        is_rate: false,
        figure: |all| all.harm(),
    },
    Goal {
        case: "connections on which a client sent again, redis 1 GiB",
        unit: Unit::Percent,
        good: 1.0,
        goal: 0.0,
        is_rate: false,
        figure: |all| {
            all.median(Suite::Goals, "redis 1 GiB, 100 conn", |run| {
                Some(run.client_tcp.retransmissions)
            })
        },
    },
];

/// What was measured, to be asked.
struct Figures<'a> {
    measured: &'a [Measured],
    costs: &'a [PacketCost],
}

impl Figures<'_> {
    fn ours(&self) -> impl Iterator<Item = &Run> {
        let runs = self.measured.iter().flat_map(|(_, _, runs)| runs);
        runs.filter(|run| run.method == OURS)
    }

    fn median(
        &self,
        suite: Suite,
        scenario: &str,
        value: impl Fn(&Run) -> Option<u64>,
    ) -> Option<f64> {
        let runs = self.ours().filter(|run| {
            run.suite == suite.name() && run.scenario == scenario && run.failure.is_none()
        });
        let median = Spread::of(runs.filter_map(value))?.median;
        u32::try_from(median).ok().map(f64::from)
    }

    fn gap_ms(&self, suite: Suite, scenario: &str) -> Option<f64> {
        let us = self.median(suite, scenario, |run| Some(run.client_gap_us))?;
        Some(us / 1e3)
    }

    /// The dearer of both directions.
    fn packet_ns(&self, flows: u32) -> Option<f64> {
        let tracked = self
            .costs
            .iter()
            .filter(|cost| cost.flows == flows && cost.case == Case::Tracked);
        let ns = tracked.map(|cost| cost.ns).max()?;
        u32::try_from(ns).ok().map(f64::from)
    }

    fn harm(&self) -> Option<f64> {
        let mut ours = self.ours().peekable();
        ours.peek()?;
        u32::try_from(ours.map(harm).sum::<u64>())
            .ok()
            .map(f64::from)
    }
}

/// What a client must never see.
fn harm(run: &Run) -> u64 {
    run.client_errors + run.client_tcp.resets
}

impl Unit {
    fn shown(self, value: f64) -> String {
        match self {
            Self::Ms if value < 1.0 => format!("{value:.4} ms"),
            Self::Ms => format!("{value:.1} ms"),
            Self::Times => format!("{value:.2} times"),
            Self::MbPerS => format!("{value:.0} MB/s"),
            Self::Ns => format!("{value:.0} ns"),
            Self::Count => format!("{value:.0}"),
            Self::Percent => format!("{value:.0} %"),
        }
    }
}

impl Goal {
    fn verdict(&self, figure: f64) -> &'static str {
        let is_within = |bound: f64| {
            if self.is_rate {
                figure >= bound
            } else {
                figure <= bound
            }
        };
        match (is_within(self.goal), is_within(self.good)) {
            (true, _) => "reached",
            (false, true) => "**short of the goal**, good",
            (false, false) => "**short of the goal, and of good**",
        }
    }
}

/// The Markdown table of what was aimed at; nothing where nothing of it was measured.
pub(crate) fn table(measured: &[Measured], costs: &[PacketCost]) -> String {
    let all = Figures { measured, costs };
    let mut rows = String::new();
    for goal in &GOALS {
        let Some(figure) = (goal.figure)(&all) else {
            continue;
        };
        let [figure_shown, good, aim] = [figure, goal.good, goal.goal].map(|v| goal.unit.shown(v));
        let verdict = goal.verdict(figure);
        let _ = writeln!(
            rows,
            "| {} | {figure_shown} | {good} | {aim} | {verdict} |",
            goal.case
        );
    }
    if rows.is_empty() {
        return rows;
    }
    let harmed: String = all
        .ours()
        .filter(|&run| harm(run) > 0)
        .map(|run| {
            format!(
                "- suite {}, {}, run {}: {} RST, {} replies wrong, lost or doubled\n",
                run.suite, run.scenario, run.number, run.client_tcp.resets, run.client_errors
            )
        })
        .collect();
    let harmed = if harmed.is_empty() {
        harmed
    } else {
        format!("\nRuns in which a client saw harm:\n\n{harmed}")
    };
    format!(
        "### What was aimed at\n\n\
         Medians of `{OURS}`. Why some are short of the goal: [performance.md](performance.md).\n\n\
         | case | measured | good | goal | |\n|---|---|---|---|---|\n{rows}{harmed}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(scenario: &str, client_gap_us: u64) -> Run {
        Run {
            client_gap_us,
            ..Run::of(Suite::Goals.name(), scenario.to_owned(), OURS.to_owned(), 1)
        }
    }

    #[test]
    fn what_is_short_of_a_goal_is_called_so() {
        let runs = vec![
            run("redis 100000 keys, 1 conn", 20_000),
            run("redis 1 GiB, 100 conn", 60_100),
            run("redis 4 GiB, 100 conn", 250_001),
        ];
        let text = table(&[(Suite::Goals, Vec::new(), runs)], &[]);
        let row = |case: &str| {
            let mut lines = text.lines().filter(|line| line.contains(case));
            lines.next().unwrap_or_default().to_owned()
        };
        assert!(row("1 connection:").ends_with("| 20.0 ms | 50.0 ms | 20.0 ms | reached |"));
        assert!(row("1 GiB, 100 connections").ends_with("**short of the goal**, good |"));
        assert!(row("4 GiB, 100 connections").ends_with("**short of the goal, and of good** |"));
        assert_eq!(row("10,000 connections"), "", "not measured");
    }

    #[test]
    fn a_wrong_reply_in_any_run_counts() {
        let mut runs = vec![run("redis 1 GiB, 100 conn", 1), run("odd", 1)];
        runs[1].client_errors = 2;
        runs[1].failure = Some("2 errors at the client".to_owned());
        let text = table(&[(Suite::Goals, Vec::new(), runs)], &[]);
        let harm = text
            .lines()
            .find(|line| line.contains("wrong, lost"))
            .unwrap_or_default();
        assert!(harm.contains("| 2 | 0 | 0 | **short"), "{harm}");
        let named: Vec<&str> = text.lines().filter(|line| line.starts_with("- ")).collect();
        assert_eq!(
            named,
            ["- suite goals, odd, run 1: 0 RST, 2 replies wrong, lost or doubled"]
        );
        assert_eq!(table(&[], &[]).lines().count(), 0);
    }
}
