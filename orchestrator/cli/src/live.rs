//! The live line of a terminal: which phase, and how far a round has come.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use migrate_core::Phase;
use migrate_core::report::RoundReport;
use migrate_core::wire::PAGE_BYTES;

use crate::show::{mib, ms, say, thousands};

/// Where lines end when the terminal does not say how wide it is.
const COLUMNS: usize = 80;
/// No narrower: a word has to fit.
const COLUMNS_MIN: usize = 40;
/// Between two turns of the spinner.
const TURN: Duration = Duration::from_millis(120);

/// The line while something is under way. Not [`Live`]'s alone: whatever else is written to
/// the terminal, as by the log, would run into it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn bar() -> MutexGuard<'static, Option<ProgressBar>> {
    BAR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes while the line is out of the way.
pub fn aside<T>(write: impl FnOnce() -> T) -> T {
    // `MultiProgress` would serve, too, but panics when the terminal has gone.
    match &*bar() {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Columns of a terminal; none of anything else, where lines are as long as they are.
pub fn columns(term: &Term) -> Option<usize> {
    term.is_term().then(|| {
        let size = term.size_checked();
        size.map_or(COLUMNS, |(_, columns)| {
            usize::from(columns).max(COLUMNS_MIN)
        })
    })
}

/// A text in as many lines as the terminal needs, all but the first indented. What is to
/// be copied, as a path or the name of a verb, stays in one piece.
pub fn wrapped(text: &str, indent: usize, columns: usize) -> String {
    let indent = " ".repeat(indent);
    let options = textwrap::Options::new(columns)
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .subsequent_indent(&indent);
    // One by one: of several, each would begin with as many words as the first has room for.
    let lines = text.split('\n').enumerate().map(|(number, line)| {
        let words = line.trim_start_matches(' ');
        let begin = match number {
            // Blanks before a word too long for the line would be a line.
            0 => &line[..line.len() - words.len()],
            _ => &indent,
        };
        textwrap::fill(words, options.clone().initial_indent(begin))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The line below everything that has been said.
#[derive(Debug)]
pub struct Live {
    /// Since when something is under way.
    since: Instant,
    /// The round on the line.
    round: Option<u32>,
    /// What the last round came to.
    before: String,
}

impl Live {
    pub fn new() -> Self {
        Self {
            since: Instant::now(),
            round: None,
            before: String::new(),
        }
    }

    /// A phase begins.
    pub fn phase(&mut self, phase: Phase) {
        self.waits(phase.name());
    }

    /// What is being done.
    pub fn waits(&mut self, what: &'static str) {
        self.round = None;
        self.since = Instant::now();
        let bar = styled("  {prefix:<10} {spinner}");
        bar.set_prefix(what);
        bar.enable_steady_tick(TURN);
    }

    /// Pages of a round have gone over.
    pub fn sending(&mut self, round: u32, pages: u64, pages_expected: u64) {
        if self.round != Some(round) {
            self.round = Some(round);
            let bar = styled("    {prefix:<5}  {bar:10} {wide_msg}");
            bar.set_prefix(round.to_string());
        }
        let bytes = pages.saturating_mul(PAGE_BYTES as u64);
        let took_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(bar) = &*bar() {
            bar.set_length(pages_expected.max(pages));
            bar.set_position(pages);
            bar.set_message(format!(
                "{:>19} {:>13}  {}",
                thousands(pages),
                rate(bytes, took_us),
                self.before
            ));
        }
    }

    /// A round is over: its line of the table.
    pub fn round(&mut self, report: &RoundReport) {
        if report.round == 1 {
            say("    round  unchanged                pages          rate       dirty   blackout");
        }
        let blackout = report.blackout_us_predicted.map(ms);
        self.before = blackout
            .as_ref()
            .map_or_else(String::new, |blackout| format!("blackout now {blackout}"));
        say(&round_line(report, blackout.as_deref().unwrap_or("-")));
        // Until the next one has something to show.
        self.waits(Phase::Precopy.name());
    }

    /// Nothing is under way at the moment.
    pub fn end(&mut self) {
        let mut bar = bar();
        if let Some(bar) = bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.end();
    }
}

/// The line, with another look.
fn styled(template: &str) -> ProgressBar {
    let mut bar = bar();
    let bar = bar
        .get_or_insert_with(|| ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()));
    // The templates are ours, and every one is right.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("#>-").tick_chars("-\\|/ "));
    }
    bar.clone()
}

/// A line of the table of rounds.
fn round_line(report: &RoundReport, blackout: &str) -> String {
    let full = usize::from(report.skipped_percent.min(100)) / 10;
    let dirty = match (report.dirty_flows, report.flows) {
        (Some(dirty), Some(flows)) => format!("{dirty}/{flows}"),
        _ => "-".to_owned(),
    };
    format!(
        "    {:<5}  {}{} {:>3} % {:>13} {:>13} {dirty:>11} {blackout:>10}",
        report.round,
        "#".repeat(full),
        "-".repeat(10 - full),
        report.skipped_percent,
        thousands(report.pages_written),
        rate(
            report.bytes,
            report.took_us.saturating_sub(report.paused_us)
        ),
    )
}

/// Bytes in that time, as a rate.
fn rate(bytes: u64, took_us: u64) -> String {
    let per_s = u128::from(bytes) * 1_000_000 / u128::from(took_us.max(1));
    format!("{}/s", mib(u64::try_from(per_s).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_one_line_of_a_terminal() {
        let report = RoundReport {
            round: 2,
            pages_written: 77,
            skipped_percent: 98,
            bytes: 315_392,
            took_us: 2_600,
            flows: Some(20),
            dirty_flows: Some(19),
            ..RoundReport::default()
        };
        assert_eq!(
            round_line(&report, "42.0 ms"),
            "    2      #########-  98 %            77   115.6 MiB/s       19/20    42.0 ms"
        );
        let most = RoundReport {
            round: 1000,
            pages_written: 1_000_000_000,
            skipped_percent: 100,
            bytes: 1 << 40,
            took_us: 1_000_000,
            flows: Some(10_000),
            dirty_flows: Some(10_000),
            ..RoundReport::default()
        };
        assert!(round_line(&most, "12345.6 ms").len() <= 80);
    }

    #[test]
    fn long_lines_are_wrapped_and_indented() {
        let text = "  precopy       69.3 ms  2 rounds, goal reached; the last found 77 of 5108 pages changed";
        assert_eq!(
            wrapped(text, 25, 80),
            "  precopy       69.3 ms  2 rounds, goal reached; the last found 77 of 5108 pages\n                         changed"
        );
        assert_eq!(wrapped("  short", 25, 80), "  short");
        let path = format!("  /{}", "x".repeat(80));
        assert_eq!(wrapped(&path, 4, 80), path);
        assert_eq!(
            wrapped("look at what `migrate guard-boot` says", 2, 26),
            "look at what `migrate\n  guard-boot` says"
        );
    }
}
