//! A report as one page that needs nothing else: no script, no network.
//!
//! Names of processes and hosts come from outside. maud escapes whatever is
//! written into the page, and the page forbids scripts besides.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use migrate_core::Phase;
use migrate_core::report::{Report, counted};
use migrate_core::timeline::Span;

use crate::show::{block, mib, ms, size, thousands};

/// Width of every chart, in SVG's units.
const WIDTH: f64 = 960.0;
/// Where bars begin; names stand to the left.
const LEFT: f64 = 150.0;
/// Height of a bar, and from one to the next.
const BAR: f64 = 18.0;
const ROW: f64 = 24.0;
/// The narrowest bar that can be seen and pointed at.
const NARROWEST: f64 = 1.5;
/// Connections in the chart of silences; a person compares no more.
const FLOWS_SHOWN: usize = 40;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --paper: #ffffff;
  --line: #d5dae0; --source: #3b76c4; --destination: #2f8f6b; --stop: #c8453b; --still: #b9c3ce; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #98a2ad; --paper: #16191d;
  --line: #363c44; --source: #6ea3e8; --destination: #58bd95; --stop: #ee7468; --still: #4a535d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.dim, figcaption { color: var(--dim); font-size: .9rem; }
figure { margin: .5rem 0; overflow-x: auto; } svg { width: 100%; min-width: 40rem; height: auto; }
svg text { fill: var(--ink); font-size: 12px; } svg text.dim { fill: var(--dim); }
svg line { stroke: var(--line); }
.source { fill: var(--source); } .destination { fill: var(--destination); }
.stop { fill: var(--stop); } .still { fill: var(--still); }
pre { border: 1px solid var(--line); padding: .8rem 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
";

/// The whole page.
pub fn page(report: &Report) -> String {
    let title = format!(
        "{} ({}): {} to {}",
        report.name, report.pid, report.source, report.destination
    );
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p.dim { "Migration " (report.migration_id) ": " (report.outcome) }
                @if let Some(failure) = &report.failure {
                    p { strong { (failure.phase) " failed: " } (failure.error) }
                }
                @if report.outcome == Phase::Committed {
                    pre { (block(report).trim_start_matches('\n')) }
                }
                (timelines(report))
                (rounds(report))
                (silences(report))
                (table(report))
            }
        }
    }
    .into_string()
}

/// The whole migration, and once more what peers had to wait for.
fn timelines(report: &Report) -> Markup {
    let end_us = report.total_us.cast_signed();
    html! {
        h2 { "Both hosts, from the command to its end" }
        (timeline("timeline", report, 0, end_us))
        @if let (Some(start_us), Phase::Committed) = (report.blackout_start_us, report.outcome) {
            @let start_us = start_us.cast_signed();
            @let took_us = report.blackout.total_us();
            // A tenth before and after, to see what it stands between.
            @let margin_us = (took_us / 10).max(1000).cast_signed();
            h2 { "The blackout, " (ms(took_us)) }
            (timeline("blackout", report, start_us.saturating_sub(margin_us), start_us.saturating_add_unsigned(took_us.saturating_add(margin_us.unsigned_abs()))))
        }
        p.dim {
            @match report.clock_error_us {
                Some(error_us) => {
                    "Times are the source's; those of the destination were estimated from the commit's round trip and may be off by "
                    (ms(error_us)) "."
                }
                None => "Times are the source's; the destination has told none.",
            }
        }
    }
}

/// A bar of a timeline.
struct Bar {
    name: String,
    class: &'static str,
    start_us: i64,
    end_us: i64,
}

impl Bar {
    fn of(span: &Span, class: &'static str) -> Self {
        Self {
            name: span.name.replace('_', " "),
            class,
            start_us: span.start_us,
            end_us: span.end_us(),
        }
    }
}

/// What stands in the way of peers, part by part.
fn blackout_bars(report: &Report) -> Vec<Bar> {
    let Some(start_us) = report.blackout_start_us else {
        return Vec::new();
    };
    let mut at_us = start_us.cast_signed();
    report
        .blackout
        .parts()
        .into_iter()
        .map(|(name, took_us)| {
            let start_us = at_us;
            at_us = at_us.saturating_add_unsigned(took_us);
            Bar {
                name: name.to_owned(),
                class: "stop",
                start_us,
                end_us: at_us,
            }
        })
        .collect()
}

/// What both hosts did between two moments, a row for each thing.
fn timeline(id: &str, report: &Report, from_us: i64, to_us: i64) -> Markup {
    let source = report.phases.iter().map(|span| Bar::of(span, "source"));
    let rounds = report.precopy.iter().map(|round| Bar {
        name: format!("round {}", round.round),
        class: "still",
        start_us: round.start_us.cast_signed(),
        end_us: round.start_us.saturating_add(round.took_us).cast_signed(),
    });
    let steps = &report.destination_steps;
    let destination = steps.iter().map(|span| Bar::of(span, "destination"));
    let lanes = [
        (format!("on {}", report.source), source.collect::<Vec<_>>()),
        ("rounds".to_owned(), rounds.collect()),
        (format!("on {}", report.destination), destination.collect()),
        ("blackout".to_owned(), blackout_bars(report)),
    ];
    let seen = |bar: &&Bar| bar.end_us >= from_us && bar.start_us <= to_us;
    let lanes: Vec<(String, Vec<&Bar>)> = lanes
        .iter()
        .map(|(name, bars)| (name.clone(), bars.iter().filter(seen).collect::<Vec<_>>()))
        .filter(|(_, bars)| !bars.is_empty())
        .collect();
    let rows: usize = lanes.iter().map(|(_, bars)| bars.len() + 1).sum();
    let height = float(rows) * ROW + 2.0 * ROW;
    let to_us = to_us.max(from_us.saturating_add(1));
    // What a file says may lie at either end of what a number holds.
    let span_us = float_us(to_us.saturating_sub(from_us)).max(1.0);
    let x = |at_us: i64| {
        let share = float_us(at_us.clamp(from_us, to_us).saturating_sub(from_us)) / span_us;
        LEFT + share * (WIDTH - LEFT - 70.0)
    };
    let step_us = tick(span_us);
    let marks = (0..TICKS_MAX)
        .map(|n| (from_us / step_us + n).saturating_mul(step_us))
        .filter(|at_us| (from_us..=to_us).contains(at_us));
    let mut row = 0.0;
    html! {
        figure {
            svg id=(id) viewBox={ "0 0 " (WIDTH) " " (px(height)) } role="img" {
                @for at_us in marks {
                    line x1=(px(x(at_us))) x2=(px(x(at_us))) y1="0" y2=(px(height - ROW)) {}
                    text.dim x=(px(x(at_us))) y=(px(height - 8.0)) text-anchor="middle" { (label(at_us)) }
                }
                @for (name, bars) in &lanes {
                    text.dim x="0" y=(px(row * ROW + 14.0)) { (name) }
                    ({ row += 1.0; "" })
                    @for bar in bars {
                        (bar_row(bar, row * ROW, x(bar.start_us), x(bar.end_us)))
                        ({ row += 1.0; "" })
                    }
                }
            }
        }
    }
}

fn bar_row(bar: &Bar, y: f64, from: f64, to: f64) -> Markup {
    let took_us = u64::try_from(bar.end_us.saturating_sub(bar.start_us)).unwrap_or(0);
    let width = (to - from).max(NARROWEST);
    html! {
        g {
            title { (bar.name) ", " (ms(took_us)) }
            text x="12" y=(px(y + 14.0)) { (bar.name) }
            rect class=(bar.class) x=(px(from)) y=(px(y)) width=(px(width)) height=(BAR) {}
            text.dim x=(px(from + width + 4.0)) y=(px(y + 14.0)) { (ms(took_us)) }
        }
    }
}

/// Pages of each round: those sent, and those that had not changed.
fn rounds(report: &Report) -> Markup {
    let most = report.precopy.iter().map(|round| round.pages_scanned).max();
    let most = float_pages(most.unwrap_or(0)).max(1.0);
    // What is said of a round stands behind its bar.
    let scale = (WIDTH - LEFT - 370.0) / most;
    let height = float(report.precopy.len()) * ROW + ROW;
    html! {
        h2 { "Rounds of pre-copy" }
        @if report.precopy.is_empty() {
            p { "There were none: all memory moved while the tree stood still." }
        } @else {
            figure {
                svg #rounds viewBox={ "0 0 " (WIDTH) " " (px(height)) } role="img" {
                    @for (row, round) in report.precopy.iter().enumerate() {
                        @let y = float(row) * ROW;
                        @let sent = float_pages(round.pages_written) * scale;
                        @let kept = float_pages(round.pages_skipped) * scale;
                        g {
                            title { "round " (round.round) }
                            text x="12" y=(px(y + 14.0)) { "round " (round.round) ", " (ms(round.took_us)) }
                            rect.source x=(LEFT) y=(px(y)) width=(px(sent.max(NARROWEST))) height=(BAR) {}
                            rect.still x=(px(LEFT + sent.max(NARROWEST))) y=(px(y)) width=(px(kept)) height=(BAR) {}
                            text.dim x=(px(LEFT + sent + kept + 8.0)) y=(px(y + 14.0)) {
                                (thousands(round.pages_written)) " pages sent, " (round.skipped_percent) " % unchanged"
                                @if let Some(predicted) = round.blackout_us_predicted {
                                    ", blackout then " (ms(predicted))
                                }
                            }
                        }
                    }
                }
                figcaption { "Coloured: sent; grey: unchanged since the round before." }
            }
        }
    }
}

/// How long each peer heard nothing, the longest first.
fn silences(report: &Report) -> Markup {
    let mut flows: Vec<(u64, String)> = report
        .continuity
        .iter()
        .flat_map(|continuity| &continuity.worst)
        .filter_map(|flow| Some((flow.silence_us?, flow.flow.remote.to_string())))
        .collect();
    flows.sort_by(|a, b| b.cmp(a));
    let known = flows.len();
    flows.truncate(FLOWS_SHOWN);
    let longest = flows
        .first()
        .map_or(1.0, |(us, _)| float_pages(*us).max(1.0));
    let left = LEFT + 110.0;
    let height = float(flows.len()) * ROW + ROW;
    html! {
        h2 { "Silence, peer by peer" }
        @if flows.is_empty() {
            p { "Not known of any peer." }
        } @else {
            figure {
                svg #silence viewBox={ "0 0 " (WIDTH) " " (px(height)) } role="img" {
                    @for (row, (us, peer)) in flows.iter().enumerate() {
                        @let y = float(row) * ROW;
                        @let width = float_pages(*us) / longest * (WIDTH - left - 80.0);
                        g {
                            title { (peer) }
                            text x="12" y=(px(y + 14.0)) { (peer) }
                            rect.stop x=(left) y=(px(y)) width=(px(width.max(NARROWEST))) height=(BAR) {}
                            text.dim x=(px(left + width + 6.0)) y=(px(y + 14.0)) { (ms(*us)) }
                        }
                    }
                }
                figcaption {
                    "From the closed gate to the first packet of the copy. "
                    @if known > flows.len() { (counted(known - flows.len(), "more connection")) " had less to bear." }
                }
            }
        }
    }
}

/// All figures once more, for who wants to copy them.
fn table(report: &Report) -> Markup {
    let row = |host: &str, span: &Span| {
        html! {
            tr {
                td { (span.name.replace('_', " ")) }
                td { (host) }
                td { (label(span.start_us)) }
                td { (ms(span.took_us)) }
            }
        }
    };
    let (here, there) = (&report.source_parts, &report.destination_parts);
    let here = here.iter().map(|span| (&report.source, span));
    let there = there.iter().map(|span| (&report.destination, span));
    let mut parts: Vec<_> = here.chain(there).collect();
    parts.sort_by_key(|(_, span)| span.start_us);
    html! {
        h2 { "Figures" }
        table {
            tr { th { "phase" } th { "on" } th { "began after" } th { "took" } }
            @for span in &report.phases { (row(&report.source, span)) }
            @for span in &report.destination_steps { (row(&report.destination, span)) }
        }
        @if !parts.is_empty() {
            table id="parts" {
                tr { th { "part of the blackout" } th { "on" } th { "began after" } th { "took" } }
                @for (host, span) in &parts { (row(host, span)) }
            }
        }
        p.dim {
            (thousands(report.pages)) " pages, " (mib(report.bytes)) ", "
            (counted(size(report.connections), "connection")) ", "
            (thousands(report.held_packets)) " packets held, " (thousands(report.dropped_packets)) " dropped."
        }
    }
}

/// Marks of an axis, at most.
const TICKS_MAX: i64 = 10;

/// A round distance between them.
fn tick(span_us: f64) -> i64 {
    [1, 2, 5]
        .into_iter()
        .cycle()
        .zip((0..).flat_map(|power: u32| [power; 3]))
        .map(|(digit, power)| digit * 10_i64.saturating_pow(power))
        .take(50)
        .find(|step_us| span_us / float_us(*step_us) <= 8.0)
        .unwrap_or(i64::MAX)
}

/// A moment on an axis.
fn label(at_us: i64) -> String {
    let sign = if at_us < 0 { "-" } else { "" };
    format!("{sign}{}", ms(at_us.unsigned_abs()))
}

/// A coordinate with as many digits as can be seen.
fn px(value: f64) -> String {
    format!("{value:.1}")
}

#[allow(clippy::cast_precision_loss, reason = "a coordinate of a drawing")]
fn float_us(us: i64) -> f64 {
    us as f64
}

#[allow(clippy::cast_precision_loss, reason = "a coordinate of a drawing")]
fn float_pages(pages: u64) -> f64 {
    pages as f64
}

#[allow(clippy::cast_precision_loss, reason = "a coordinate of a drawing")]
fn float(rows: usize) -> f64 {
    rows as f64
}

#[cfg(test)]
mod tests {
    use migrate_core::report::{Blackout, FailureReport, RoundReport};

    use super::*;

    #[test]
    fn nothing_from_outside_becomes_markup() {
        let hostile = "</title><script>alert(1)</script>\"'&".to_owned();
        let report = Report {
            name: hostile.clone(),
            source: hostile.clone(),
            destination: hostile.clone(),
            migration_id: hostile.clone(),
            phases: vec![Span {
                name: hostile.clone(),
                start_us: 0,
                took_us: 5,
            }],
            failure: Some(FailureReport {
                phase: Phase::Dump,
                error: hostile,
            }),
            total_us: 10,
            ..Report::default()
        };
        let page = page(&report);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;"), "{page}");
    }

    #[test]
    fn a_report_of_strange_figures_is_drawn_all_the_same() {
        let report = Report {
            outcome: Phase::Committed,
            blackout_start_us: Some(u64::MAX >> 1),
            total_us: u64::MAX,
            phases: vec![Span {
                name: "x".into(),
                start_us: i64::MIN,
                took_us: u64::MAX,
            }],
            precopy: vec![RoundReport {
                pages_written: u64::MAX,
                start_us: u64::MAX,
                ..RoundReport::default()
            }],
            ..Report::default()
        };
        assert!(page(&report).len() < 100_000);
        let most = Blackout {
            freeze_us: u64::MAX,
            dump_us: u64::MAX,
            ..Blackout::default()
        };
        for blackout_start_us in [0, 1 << 63, u64::MAX >> 1, u64::MAX] {
            for blackout in [Blackout::default(), most] {
                let page = page(&Report {
                    blackout_start_us: Some(blackout_start_us),
                    blackout,
                    ..report.clone()
                });
                assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
            }
        }
        assert!(page(&Report::default()).contains("There were none"));
    }

    #[test]
    fn axes_have_few_round_marks() {
        for (span_us, step_us) in [(7.0, 1), (80_000.0, 10_000), (1_200_000.0, 200_000)] {
            assert_eq!(tick(span_us), step_us);
        }
    }
}
