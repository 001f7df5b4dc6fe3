//! What a person or a script sees.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};

use console::Term;
use migrate_core::Phase;
use migrate_core::facts::SocketFacts;
use migrate_core::preflight::{Finding, Severity};
use migrate_core::report::{Continuity, Report, RoundReport, counted};
use migrate_session::source::Failure;
use migrate_session::{Error, Progress};
use serde::Serialize;

use crate::Output;
use crate::live::{Live, aside, columns, wrapped};

/// The three ways to show: a terminal, plain lines, JSON.
#[derive(Debug)]
pub struct Show {
    json: bool,
    /// Errors are all that is said; standard output leads nowhere.
    quiet: bool,
    /// On a terminal.
    live: Option<Live>,
    colour: bool,
    /// The reason of a failure has been shown.
    told: bool,
}

/// The last line of `--json` when a migration failed.
#[derive(Serialize)]
struct FailureLine<'a> {
    event: &'static str,
    phase: Phase,
    outcome: Phase,
    error: String,
    help: Option<String>,
    leftovers: &'a [String],
    exit_code: u8,
    runs_on: Option<String>,
}

/// A socket of the tree in `--json`.
#[derive(Serialize)]
struct SocketLine<'a> {
    event: &'static str,
    #[serde(flatten)]
    socket: &'a SocketFacts,
}

impl Show {
    pub fn new(output: &Output) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            json: output.json,
            quiet: output.quiet,
            live: (terminal && !output.json).then(Live::new),
            // https://no-color.org: set and not empty.
            colour: terminal && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
            told: false,
        }
    }

    fn json<T: Serialize>(&self, line: &T) {
        if let Ok(line) = serde_json::to_string(line) {
            put(&line);
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Something happened.
    pub fn progress(&mut self, progress: &Progress) {
        if self.json {
            // What only moves a bar is no line.
            if !matches!(progress, Progress::Sending { .. }) {
                self.json(progress);
            }
            return;
        }
        if self.quiet {
            return;
        }
        match progress {
            Progress::Connected { destination, .. } => {
                say(&format!("connected to {}", plain(destination)));
            }
            Progress::Finding { finding } if finding.severity != Severity::Ok => {
                say(&self.finding(finding));
            }
            Progress::Started { phase } => {
                if let Some(live) = &mut self.live {
                    live.phase(*phase);
                }
            }
            Progress::Ended {
                phase,
                took_us,
                detail,
            } => {
                if let Some(live) = &mut self.live {
                    live.end();
                }
                let (took, detail) = (ms(*took_us), plain(detail));
                let line = format!("  {:<10} {took:>10}  {detail}", phase.name());
                say(line.trim_end());
            }
            Progress::Sending {
                round,
                pages,
                pages_expected,
            } => {
                if let Some(live) = &mut self.live {
                    live.sending(*round, *pages, *pages_expected);
                }
            }
            Progress::Round { round } => match &mut self.live {
                Some(live) => live.round(round),
                None => say(&round_line(round)),
            },
            Progress::Failed { phase, error } => {
                self.told = true;
                let text = self.paint("31", &format!("{} failed", phase.name()));
                say(&format!("  {text}: {}", plain_lines(error)));
                if let Some(live) = &mut self.live {
                    live.waits("undoing");
                }
            }
            Progress::Warning { text } => {
                let mark = self.paint("33", "warning");
                say(&format!("  {mark}: {}", plain_lines(text)));
            }
            Progress::Finding { .. } | Progress::Report { .. } => {}
        }
    }

    /// Something that went wrong, or what follows from it: the one thing that is told even
    /// when nothing else is.
    fn bad(&self, text: &str) {
        if self.quiet {
            complain(text)
        } else {
            say(text)
        }
    }

    /// Something that went wrong beside the matter itself.
    pub fn warn(&mut self, text: &str) {
        self.progress(&Progress::Warning {
            text: text.to_owned(),
        });
    }

    fn verdict(&self, severity: Severity) -> String {
        match severity {
            Severity::Ok => self.paint("32", "ok     "),
            Severity::Note => self.paint("33", "note   "),
            Severity::Refused => self.paint("31", "refused"),
        }
    }

    fn finding(&self, finding: &Finding) -> String {
        let verdict = self.verdict(finding.severity);
        let finding = &Finding {
            subject: plain(&finding.subject),
            finding: plain_lines(&finding.finding),
            way_out: plain_lines(&finding.way_out),
            ..finding.clone()
        };
        if let Some(columns) = columns(&Term::stdout()) {
            return finding_row(&verdict, finding, columns);
        }
        let mut text = format!("  {verdict}  {}: {}", finding.subject, finding.finding);
        if !finding.way_out.is_empty() {
            text += &format!("\n           -> {}", finding.way_out);
        }
        text
    }

    /// The tree's TCP sockets.
    pub fn sockets(&mut self, sockets: &[SocketFacts]) {
        if self.json {
            for socket in sockets {
                self.json(&SocketLine {
                    event: "socket",
                    socket,
                });
            }
        } else if !sockets.is_empty() {
            say(&socket_table(sockets, columns(&Term::stdout())));
        }
    }

    /// All findings, with a verdict at the end.
    pub fn table(&mut self, findings: &[Finding]) {
        if self.json {
            for finding in findings {
                self.json(&Progress::Finding {
                    finding: finding.clone(),
                });
            }
            return;
        }
        let mut shown: Vec<&Finding> = findings.iter().collect();
        if self.live.is_some() {
            // What stands in the way is read last, beside the verdict.
            shown.sort_by_key(|finding| finding.severity);
        }
        for finding in shown {
            let row = self.finding(finding);
            match finding.severity {
                Severity::Refused => self.bad(&row),
                Severity::Ok | Severity::Note => say(&row),
            }
        }
        let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
        let (notes, refused) = (count(Severity::Note), count(Severity::Refused));
        if refused == 0 {
            let notes = match notes {
                0 => String::new(),
                notes => format!(" ({})", counted(notes, "note")),
            };
            say(&format!("can be moved{notes}"));
        } else {
            self.bad(&format!("cannot be moved: {}", counted(refused, "problem")));
        }
    }

    /// The closing block.
    pub fn report(&mut self, report: &Report) {
        self.end();
        if self.json {
            self.json(&Progress::Report {
                report: Box::new(report.clone()),
            });
            return;
        }
        let blackout = format!("  blackout     {}", ms(report.blackout.total_us()));
        let bold = self.paint("1", &blackout);
        say(&block(report).replacen(&blackout, &bold, 1));
        let place = self.paint("1", &plain(&report.destination));
        say(&format!(
            "process {} ({}) runs on {place}",
            report.pid,
            plain(&report.name)
        ));
    }

    /// A report that was kept.
    pub fn kept(&mut self, report: &Report) {
        if self.json {
            self.json(report);
            return;
        }
        say(&format!(
            "migration {}: process {} ({}) from {} to {}, {}",
            plain(&report.migration_id),
            report.pid,
            plain(&report.name),
            plain(&report.source),
            plain(&report.destination),
            report.outcome
        ));
        for span in &report.phases {
            let name = plain(&span.name).replace('_', " ");
            say(&format!("  {name:<10} {:>10}", ms(span.took_us)));
            if span.name == Phase::Precopy.name() {
                for round in &report.precopy {
                    say(&round_line(round));
                }
            }
        }
        if let Some(failure) = &report.failure {
            let text = self.paint("31", &format!("{} failed", failure.phase));
            say(&format!("  {text}: {}", plain_lines(&failure.error)));
        }
        if report.outcome == Phase::Committed {
            say(&block(report));
        }
    }

    /// The live line goes.
    fn end(&mut self) {
        self.live = None;
    }

    /// A migration that did not end in a commit.
    pub fn failure(&mut self, pid: i32, failure: &Failure, exit_code: u8) {
        self.end();
        let runs_here = failure.outcome == Phase::RolledBack;
        if self.json {
            self.json(&FailureLine {
                event: "failure",
                phase: failure.phase,
                outcome: failure.outcome,
                error: failure.error.chain(),
                help: failure.error.help(),
                leftovers: &failure.leftovers,
                exit_code,
                runs_on: runs_here.then(migrate_session::hostname),
            });
            return;
        }
        // Nothing was told of a migration that did not begin.
        if !self.told {
            complain(&format!("migrate: {}", plain_lines(&failure.error.chain())));
        }
        if let Some(help) = failure.error.help() {
            complain(&format!("help: {}", plain_lines(&help)));
        }
        for leftover in &failure.leftovers {
            complain(&format!("left behind: {}", plain_lines(leftover)));
        }
        // Nothing was touched when the target itself was refused.
        let refused = failure.phase == Phase::Preflight
            && matches!(&failure.error, Error::Proc(_) | Error::Busy { .. });
        if runs_here && !refused {
            self.bad(&format!(
                "process {pid} runs on {}, as before",
                migrate_session::hostname()
            ));
        } else if failure.outcome == Phase::Lost {
            self.bad(&format!(
                "process {pid} is not on {} any more; where all its memory had arrived it runs on the destination, else it is lost",
                migrate_session::hostname()
            ));
        } else if !runs_here {
            self.bad(&format!(
                "process {pid} is fenced on {} and may run on the destination",
                migrate_session::hostname()
            ));
        }
    }

    /// An error of a command that moves nothing.
    pub fn error(&self, error: &Error) {
        complain(&format!("migrate: {}", plain_lines(&error.chain())));
        if let Some(help) = error.help() {
            complain(&format!("help: {}", plain_lines(&help)));
        }
    }

    /// A mistake on the command line that clap cannot see.
    pub fn usage(&self, text: &str) {
        complain(&format!("migrate: {text}"));
    }
}

/// A finding as a row of a table: verdict, what was looked at, what was found, and
/// below it the way out.
fn finding_row(verdict: &str, finding: &Finding, columns: usize) -> String {
    /// Where the second and the third column begin, and how wide the second may be.
    const SUBJECT_AT: usize = 11;
    const FOUND: usize = 36;
    const SUBJECT: usize = FOUND - 2 - SUBJECT_AT;
    let mut head = format!("  {verdict}  {:<SUBJECT$}  ", finding.subject);
    let mut above = String::new();
    if finding.subject.chars().count() > SUBJECT {
        above = wrapped(&head, SUBJECT_AT, columns) + "\n";
        head = " ".repeat(FOUND);
    }
    let mut row = head + &finding.finding;
    if !finding.way_out.is_empty() {
        row += &format!("\n-> {}", finding.way_out);
    }
    above + &wrapped(&row, FOUND, columns)
}

/// A round as a sentence: where there is no table of them.
fn round_line(round: &RoundReport) -> String {
    let RoundReport {
        round,
        pages_scanned,
        pages_written,
        skipped_percent,
        bytes,
        took_us,
        paused_us,
        blackout_us_predicted,
        flows,
        dirty_flows,
        ..
    } = round;
    let mut text = format!(
        "    round {round:<4} {:>10}  {} of {} pages sent, {skipped_percent} % unchanged, {}",
        ms(*took_us),
        thousands(*pages_written),
        thousands(*pages_scanned),
        mib(*bytes)
    );
    if *paused_us > 0 {
        text += &format!(", {} left to the tree", ms(*paused_us));
    }
    if let (Some(flows), Some(dirty)) = (flows, dirty_flows) {
        text += &format!(", {dirty} of {} dirty", counted(*flows, "connection"));
    }
    if let Some(predicted) = blackout_us_predicted {
        text += &format!(", blackout now {}", ms(*predicted));
    }
    text
}

/// The closing block, with an empty line before it.
pub fn block(report: &Report) -> String {
    let Report {
        pages,
        frozen_pages,
        rounds,
        lazy_pages,
        postcopy,
        bytes,
        frozen_us,
        new_held_us,
        blackout,
        connections,
        held_packets,
        dropped_packets,
        rst_sent,
        total_us,
        continuity,
        unit,
        ..
    } = report;
    let parts = blackout
        .parts()
        .map(|(part, us)| format!("{part} {}", tenths_of_ms(us)))
        .join(" + ");
    let while_it_ran = match rounds {
        0 => String::new(),
        _ => format!(", all but {} while it ran", thousands(*frozen_pages)),
    };
    let unit = unit.as_ref().map_or_else(String::new, |unit| {
        let how = match unit.ends_with(".scope") {
            true => "\n    systemctl status and stop work there, restart cannot",
            false => "",
        };
        format!("\n  unit         {}{how}", plain(unit))
    });
    let noticed = continuity.as_ref().map(noticed).unwrap_or_default();
    let waited = match new_held_us {
        None => String::new(),
        Some(waited_us) => format!("\n    new connections waited {} more", ms(*waited_us)),
    };
    let restored = match lazy_pages {
        0 => String::new(),
        pages => format!(
            "\n  memory       {} pages put in place while it runs again",
            thousands(*pages)
        ),
    };
    let restored = match postcopy {
        None => restored,
        Some(late) => format!(
            "{restored}\n  postcopy     {} pages, {} after the commit, in {}; {} faults waited",
            thousands(late.pages),
            mib(late.bytes),
            ms(late.took_us),
            thousands(late.waited_faults)
        ),
    };
    format!(
        "
  moved        {} pages{while_it_ran}, {} sent, in {}{restored}
  frozen       {}, in which the tree did not run
  blackout     {}, in which no peer was served:
    {parts}{waited}
  connections  {connections} kept, {rst_sent} resets sent
  packets      {} held, {} dropped{noticed}{unit}",
        thousands(*pages),
        mib(*bytes),
        ms(*total_us),
        ms(*frozen_us),
        ms(blackout.total_us()),
        thousands(*held_packets),
        thousands(*dropped_packets)
    )
}

/// What peers noticed, as a line of the closing block. What was not measured
/// is not in it.
fn noticed(continuity: &Continuity) -> String {
    let mut parts = Vec::new();
    if let Some(silence_us) = continuity.silence_us {
        parts.push(format!("silent for {} at most", ms(silence_us)));
    }
    let repeated = continuity.repeated_segments;
    parts.push(format!("{} segments sent again", thousands(repeated)));
    if !continuity.both_hosts {
        parts.push("seen by this host alone".to_owned());
    }
    if continuity.flows == 0 {
        return String::new();
    }
    format!("\n  peers        {}", parts.join(", "))
}

/// Sockets shown one by one; a person does not read more.
const SOCKETS_SHOWN: usize = 10;

/// Sockets as a table whose columns are as wide as they have to be. Where that is too
/// much, peers stand below.
fn socket_table(sockets: &[SocketFacts], columns: Option<usize>) -> String {
    let head = ["state", "unread", "unsent", "local", "peer"].map(str::to_owned);
    let rows: Vec<[String; 5]> = std::iter::once(head)
        .chain(sockets.iter().take(SOCKETS_SHOWN).map(|socket| {
            [
                socket.state.clone(),
                thousands(socket.receive_queue.into()),
                thousands(socket.send_queue.into()),
                socket.local.to_string(),
                socket
                    .peer
                    .map_or_else(|| "-".to_owned(), |peer| peer.to_string()),
            ]
        }))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let [state, unread, unsent, local, peer] = std::array::from_fn(width);
    // Where addresses begin, and where if peers are below.
    let begin = 2 + state + 2 + unread + 2 + unsent + 2;
    let below = columns
        .filter(|&columns| begin + local + 2 + peer > columns)
        .map(|columns| match begin + local.max(peer) > columns {
            true => (4, columns),
            false => (begin, columns),
        });
    let mut lines: Vec<String> = rows
        .iter()
        .map(|[a, b, c, d, e]| {
            let counts = format!("  {a:<state$}  {b:>unread$}  {c:>unsent$}");
            match below {
                Some((indent, columns)) => wrapped(&format!("{counts}  {d}\n{e}"), indent, columns),
                None => format!("{counts}  {d:<local$}  {e}"),
            }
        })
        .collect();
    if let Some(more) = sockets.len().checked_sub(SOCKETS_SHOWN)
        && more > 0
    {
        lines.push(format!("  … and {} more", thousands(more as u64)));
    }
    lines.join("\n")
}

/// A name that comes from outside, for a line of a terminal: a process may call itself
/// by a sequence that clears the screen.
pub fn plain(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// The same of a text that may have several lines.
fn plain_lines(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}

/// Prints lines, which fit a terminal.
pub fn say(text: &str) {
    put(&fitted(text, columns(&Term::stdout())));
}

/// The same on standard error.
pub fn complain(text: &str) {
    let text = fitted(text, columns(&Term::stderr()));
    let _ = aside(|| writeln!(std::io::stderr().lock(), "{text}"));
}

/// Prints lines as they are; a reader that has gone away is no reason to stop.
fn put(text: &str) {
    let _ = aside(|| writeln!(std::io::stdout().lock(), "{text}"));
}

/// Lines that fit so many columns, if that matters: what does not goes on below where the
/// text of its line begins.
pub fn fitted(text: &str, columns: Option<usize>) -> Cow<'_, str> {
    let Some(columns) = columns else {
        return text.into();
    };
    let lines = text.split('\n');
    let lines: Vec<String> = lines
        .map(|line| wrapped(line, text_column(line), columns))
        .collect();
    lines.join("\n").into()
}

/// Where the text of a line begins: after the last gap, which has labels and figures before
/// it. A line without any goes on a little further in than it begins.
fn text_column(line: &str) -> usize {
    /// Texts begin before; words have to fit behind it also on the narrowest terminal.
    const COLUMN_MAX: usize = 30;
    let begins = line.len() - line.trim_start_matches(' ').len();
    line.rmatch_indices("  ")
        .map(|(at, gap)| at + gap.len())
        .filter(|&end| end > begins)
        .map(|end| textwrap::core::display_width(&line[..end]))
        .find(|&column| column <= COLUMN_MAX)
        .unwrap_or(begins + 2)
}

pub fn ms(us: u64) -> String {
    format!("{} ms", tenths_of_ms(us))
}

/// Microseconds as milliseconds with one decimal.
fn tenths_of_ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

pub fn mib(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20)
}

/// A number of things as the machine counts them.
pub fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use migrate_core::report::{Blackout, Postcopy};

    use super::*;

    #[test]
    fn the_closing_block_fits_a_terminal() {
        let report = Report {
            migration_id: "0123456789ab".into(),
            outcome: Phase::Committed,
            pid: 1006,
            name: "redis-server".into(),
            source: "host1".into(),
            destination: "host2".into(),
            pages: 5_387,
            frozen_pages: 87,
            lazy_pages: 0,
            postcopy: None,
            rounds: 3,
            bytes: 22_020_096,
            frozen_us: 196_500,
            blackout: Blackout {
                freeze_us: 1_100,
                dump_us: 1_079_900,
                transfer_us: 300,
                restore_us: 48_300,
                takeover_us: 67_800,
            },
            connections: 20,
            held_packets: 1_020,
            dropped_packets: 3,
            rst_sent: 0,
            gate_close_ns: None,
            new_held_us: Some(2_600),
            total_us: 1_235_300,
            continuity: Some(Continuity {
                was_quiet: true,
                flows: 20,
                both_hosts: true,
                repeated_segments: 1_004,
                resets: 0,
                silence_us: Some(1_140_700),
                worst: Vec::new(),
            }),
            unit: Some("redis-server.migrated.scope".into()),
            ..Report::default()
        };
        let text = block(&report);
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "",
                "  moved        5,387 pages, all but 87 while it ran, 21.0 MiB sent, in 1235.3 ms",
                "  frozen       196.5 ms, in which the tree did not run",
                "  blackout     1197.4 ms, in which no peer was served:",
                "    freeze 1.1 + dump 1079.9 + transfer 0.3 + restore 48.3 + takeover 67.8",
                "    new connections waited 2.6 ms more",
                "  connections  20 kept, 0 resets sent",
                "  packets      1,020 held, 3 dropped",
                "  peers        silent for 1140.7 ms at most, 1,004 segments sent again",
                "  unit         redis-server.migrated.scope",
                "    systemctl status and stop work there, restart cannot",
            ]
        );
        assert_eq!(fitted(&text, Some(80)), text);
        let large = Report {
            pages: 1_048_576,
            frozen_pages: 262_144,
            lazy_pages: 786_432,
            postcopy: Some(Postcopy {
                pages: 786_432,
                bytes: 3 << 30,
                took_us: 123_456_700,
                waited_faults: 100_000,
            }),
            bytes: 4 << 30,
            blackout: Blackout {
                freeze_us: 12_345_600,
                dump_us: 12_345_600,
                transfer_us: 12_345_600,
                restore_us: 12_345_600,
                takeover_us: 12_345_600,
            },
            total_us: 1_234_567_800,
            continuity: report.continuity.clone().map(|seen| Continuity {
                both_hosts: false,
                ..seen
            }),
            ..report
        };
        let text = fits(&block(&large));
        for lines in [
            "  moved        1,048,576 pages, all but 262,144 while it ran, 4096.0 MiB sent,\n               \
             in 1234567.8 ms\n",
            "  peers        silent for 1140.7 ms at most, 1,004 segments sent again, seen by\n               \
             this host alone\n",
        ] {
            assert!(text.contains(lines), "{text}");
        }
    }

    /// A text on a terminal of 80 columns, on which nothing of it is lost.
    fn fits(text: &str) -> String {
        let on_terminal = fitted(text, Some(80)).into_owned();
        let width = |line| textwrap::core::display_width(line);
        assert!(
            on_terminal.lines().all(|line| width(line) <= 80),
            "{on_terminal}"
        );
        assert!(
            on_terminal.split_whitespace().eq(text.split_whitespace()),
            "{on_terminal}"
        );
        on_terminal
    }

    #[test]
    fn a_large_round_fits_a_terminal() {
        let round = RoundReport {
            round: 1000,
            pages_scanned: 1_048_576,
            pages_written: 1_048_576,
            bytes: 4 << 30,
            took_us: 123_456_700,
            paused_us: 23_456_700,
            flows: Some(10_000),
            dirty_flows: Some(10_000),
            blackout_us_predicted: Some(12_345_600),
            ..RoundReport::default()
        };
        let begins =
            "    round 1000 123456.7 ms  1,048,576 of 1,048,576 pages sent, 0 % unchanged,\n";
        let goes_on = "                            4096.0 MiB, ";
        let text = fits(&round_line(&round));
        assert!(text.starts_with(&(begins.to_owned() + goes_on)), "{text}");
    }

    #[test]
    fn a_finding_is_a_row_with_its_way_out_below() {
        let finding = Finding::refused(
            "file /usr/bin/x",
            "it has another size on the destination",
            "install the same package there",
        );
        assert_eq!(
            finding_row("refused", &finding, 60)
                .lines()
                .collect::<Vec<_>>(),
            [
                "  refused  file /usr/bin/x          it has another size on",
                "                                    the destination",
                "                                    -> install the same",
                "                                    package there",
            ]
        );
        let long = Finding::ok("file /usr/lib/x86_64-linux-gnu/libc.so.6", "alike");
        assert_eq!(
            finding_row("ok     ", &long, 60)
                .lines()
                .collect::<Vec<_>>(),
            [
                "  ok       file /usr/lib/x86_64-linux-gnu/libc.so.6",
                "                                    alike",
            ]
        );
        let longer = Finding::ok(format!("file /{}", "x".repeat(48)), "alike");
        assert_eq!(
            finding_row("ok     ", &longer, 60)
                .lines()
                .collect::<Vec<_>>(),
            [
                "  ok       file",
                &format!("           /{}", "x".repeat(48)),
                "                                    alike",
            ]
        );
    }

    #[test]
    fn sockets_are_listed_and_a_crowd_is_summed_up() {
        let socket = |port: u16| SocketFacts {
            local: "10.77.0.100:6379".parse().unwrap(),
            peer: (port > 0).then(|| ([10, 77, 0, 1], 40_000 + port).into()),
            state: if port == 0 { "LISTEN" } else { "ESTAB" }.into(),
            receive_queue: u32::from(port) * 1000,
            send_queue: 0,
        };
        let two: Vec<SocketFacts> = (0..2).map(socket).collect();
        assert_eq!(
            socket_table(&two, Some(80)).lines().collect::<Vec<_>>(),
            [
                "  state   unread  unsent  local             peer",
                "  LISTEN       0       0  10.77.0.100:6379  -",
                "  ESTAB    1,000       0  10.77.0.100:6379  10.77.0.1:40001",
            ]
        );
        let many: Vec<SocketFacts> = (0..105).map(socket).collect();
        let text = socket_table(&many, None);
        assert_eq!(text.lines().count(), 1 + SOCKETS_SHOWN + 1);
        assert_eq!(text.lines().last(), Some("  … and 95 more"));
    }

    #[test]
    fn sockets_with_long_addresses_fit_a_terminal() {
        let address = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535";
        let mut sockets = [SocketFacts {
            local: address.parse().unwrap(),
            peer: Some(address.parse().unwrap()),
            state: "ESTAB".into(),
            receive_queue: 0,
            send_queue: 0,
        }];
        assert_eq!(
            socket_table(&sockets, Some(80)).lines().collect::<Vec<_>>(),
            [
                "  state  unread  unsent  local",
                "                         peer",
                "  ESTAB       0       0  [2001:db8:1111:2222:3333:4444:5555:6666]:65535",
                "                         [2001:db8:1111:2222:3333:4444:5555:6666]:65535",
            ]
        );
        (sockets[0].receive_queue, sockets[0].send_queue) = (u32::MAX, u32::MAX);
        assert_eq!(
            socket_table(&sockets, Some(80)).lines().collect::<Vec<_>>(),
            [
                "  state         unread         unsent  local",
                "    peer",
                "  ESTAB  4,294,967,295  4,294,967,295",
                "    [2001:db8:1111:2222:3333:4444:5555:6666]:65535",
                "    [2001:db8:1111:2222:3333:4444:5555:6666]:65535",
            ]
        );
        assert_eq!(socket_table(&sockets, None).lines().count(), 2);
    }

    #[test]
    fn names_from_outside_command_no_terminal() {
        assert_eq!(plain("red\x1b[31m\u{9b}2J\r\nis"), "red�[31m�2J��is");
        assert_eq!(plain("grün"), "grün");
        assert_eq!(plain_lines("a\x07\nb"), "a�\nb");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(thousands(7), "7");
        assert_eq!(thousands(1234), "1,234");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(ms(1_950), "1.9 ms");
        assert_eq!(mib(21 << 20), "21.0 MiB");
        assert_eq!(mib((1 << 20) + (1 << 19)), "1.5 MiB");
    }
}
