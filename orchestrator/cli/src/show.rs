//! What a person or a script sees.

use std::io::{IsTerminal, Write};

use migrate_core::Phase;
use migrate_core::preflight::{Finding, Severity};
use migrate_core::report::{Report, counted};
use migrate_session::source::Failure;
use migrate_session::{Error, Progress};
use serde::Serialize;

use crate::Output;

/// The three ways to show: a terminal, plain lines, JSON.
#[derive(Debug)]
pub struct Show {
    json: bool,
    quiet: bool,
    terminal: bool,
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

impl Show {
    pub fn new(output: &Output) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            json: output.json,
            quiet: output.quiet,
            terminal,
            colour: terminal && std::env::var_os("NO_COLOR").is_none(),
            told: false,
        }
    }

    fn json<T: Serialize>(&self, line: &T) {
        if let Ok(line) = serde_json::to_string(line) {
            say(&line);
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
            self.json(progress);
            return;
        }
        if self.quiet {
            return;
        }
        match progress {
            Progress::Connected { destination, .. } => {
                self.line(&format!("connected to {destination}"));
            }
            Progress::Finding { finding } if finding.severity != Severity::Ok => {
                self.line(&self.finding(finding));
            }
            Progress::Started { phase } if self.terminal => {
                let mut out = std::io::stdout().lock();
                let _ = write!(out, "  {:<10} ...", phase.name());
                let _ = out.flush();
            }
            Progress::Ended {
                phase,
                took_us,
                detail,
            } => {
                let start = if self.terminal { "\r\x1b[K" } else { "" };
                say(format!(
                    "{start}  {:<10} {:>10}  {detail}",
                    phase.name(),
                    ms(*took_us)
                )
                .trim_end());
            }
            Progress::Round {
                round,
                pages_scanned,
                pages_written,
                skipped_percent,
                bytes,
                took_us,
                blackout_us_predicted,
                ..
            } => {
                let mut text = format!(
                    "    round {round:<4} {:>10}  {} of {} pages sent, {skipped_percent} % unchanged, {}",
                    ms(*took_us),
                    thousands(*pages_written),
                    thousands(*pages_scanned),
                    mib(*bytes)
                );
                if let Some(predicted) = blackout_us_predicted {
                    text += &format!(", blackout now {}", ms(*predicted));
                }
                self.line(&text);
            }
            Progress::Failed { phase, error } => {
                self.told = true;
                let text = self.paint("31", &format!("{} failed", phase.name()));
                self.line(&format!("  {text}: {error}"));
            }
            Progress::Warning { text } => {
                let mark = self.paint("33", "warning");
                self.line(&format!("  {mark}: {text}"));
            }
            Progress::Finding { .. } | Progress::Started { .. } | Progress::Report { .. } => {}
        }
    }

    /// A line of its own, also while a phase's line is open.
    fn line(&self, text: &str) {
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        say(&format!("{start}{text}"));
    }

    fn finding(&self, finding: &Finding) -> String {
        let verdict = match finding.severity {
            Severity::Ok => self.paint("32", "ok     "),
            Severity::Note => self.paint("33", "note   "),
            Severity::Refused => self.paint("31", "refused"),
        };
        let mut text = format!("  {verdict}  {}: {}", finding.subject, finding.finding);
        if !finding.way_out.is_empty() {
            text += &format!("\n           -> {}", finding.way_out);
        }
        text
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
        if !self.quiet {
            for finding in findings {
                say(&self.finding(finding));
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
            say(&format!("cannot be moved: {}", counted(refused, "problem")));
        }
    }

    /// The closing block.
    pub fn report(&mut self, report: &Report) {
        if self.json {
            self.json(&Progress::Report {
                report: Box::new(report.clone()),
            });
            return;
        }
        if !self.quiet {
            say(&block(report));
        }
        let place = self.paint("1", &report.destination);
        say(&format!(
            "process {} ({}) runs on {place}",
            report.pid, report.name
        ));
    }

    /// A migration that did not end in a commit.
    pub fn failure(&mut self, pid: i32, failure: &Failure, exit_code: u8) {
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
            eprintln!("migrate: {}", failure.error.chain());
        }
        if let Some(help) = failure.error.help() {
            eprintln!("help: {help}");
        }
        for leftover in &failure.leftovers {
            eprintln!("left behind: {leftover}");
        }
        // Nothing was touched when the target itself was refused.
        let refused = failure.phase == Phase::Preflight
            && matches!(&failure.error, Error::Proc(_) | Error::Busy { .. });
        if runs_here && !refused {
            say(&format!(
                "process {pid} runs on {}, as before",
                migrate_session::hostname()
            ));
        } else if !runs_here {
            say(&format!(
                "process {pid} is fenced on {} and may run on the destination",
                migrate_session::hostname()
            ));
        }
    }

    /// An error of a command that moves nothing.
    pub fn error(&self, error: &Error) {
        eprintln!("migrate: {}", error.chain());
        if let Some(help) = error.help() {
            eprintln!("help: {help}");
        }
    }

    /// A mistake on the command line that clap cannot see.
    pub fn usage(&self, text: &str) {
        eprintln!("migrate: {text}");
    }
}

/// The closing block, 80 columns wide, with an empty line before it.
fn block(report: &Report) -> String {
    let Report {
        pages,
        frozen_pages,
        rounds,
        bytes,
        frozen_us,
        blackout,
        connections,
        held_packets,
        dropped_packets,
        rst_sent,
        total_us,
        ..
    } = report;
    let parts = [
        ("freeze", blackout.freeze_us),
        ("dump", blackout.dump_us),
        ("transfer", blackout.transfer_us),
        ("restore", blackout.restore_us),
        ("takeover", blackout.takeover_us),
    ]
    .map(|(part, us)| format!("{part} {}", tenths_of_ms(us)))
    .join(" + ");
    let while_it_ran = match rounds {
        0 => String::new(),
        _ => format!(", all but {} while it ran", thousands(*frozen_pages)),
    };
    format!(
        "
  moved        {} pages{while_it_ran}, {} sent, in {}
  frozen       {}, in which the tree did not run
  blackout     {}, in which no peer was served:
    {parts}
  connections  {connections} kept, {rst_sent} resets sent
  packets      {} held, {} dropped",
        thousands(*pages),
        mib(*bytes),
        ms(*total_us),
        ms(*frozen_us),
        ms(blackout.total_us()),
        thousands(*held_packets),
        thousands(*dropped_packets)
    )
}

/// Prints a line; a reader that has gone away is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

fn ms(us: u64) -> String {
    format!("{} ms", tenths_of_ms(us))
}

/// Microseconds as milliseconds with one decimal.
fn tenths_of_ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

fn mib(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20)
}

fn thousands(number: u64) -> String {
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
    use migrate_core::report::Blackout;

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
            total_us: 1_235_300,
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
                "  connections  20 kept, 0 resets sent",
                "  packets      1,020 held, 3 dropped",
            ]
        );
        assert!(text.lines().all(|line| line.len() <= 80));
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
