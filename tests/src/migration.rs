//! `migrate` run in a test host, and what must hold after it.
//!
//! The functions here that judge panic with all that is known, as assertions
//! do.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read};
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use migrate_core::Phase;
use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, Lab};
use serde_json::Value;

use crate::client::StrictClient;
use crate::hosts::{eventually, gates, has_address, process_name, runs};
use crate::workload::{Kind, Workload};

/// A migration on the test hosts takes a second; this is for one that hangs.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(120);
/// Right replies on every old connection that count as being served.
const SERVED_REQUESTS: u64 = 50;
/// Time for them, beyond the worst blackout: a lost reply is sent again after
/// the 3 s of a restored socket.
const SERVED_WITHIN: Duration = Duration::from_secs(120);
/// A large tree gives its memory back before it is gone.
const GONE_WITHIN: Duration = Duration::from_secs(60);
/// The source's end may outlast the command by a little.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// How a `migrate` ended.
pub struct Migration {
    /// Exit code, `None` when it was killed by a signal.
    pub code: Option<i32>,
    /// The events of `--json`.
    pub events: Vec<Value>,
    /// The last line, when it is the report.
    pub report: Option<Report>,
    /// Its log.
    pub stderr: String,
}

/// Runs `migrate --json --verify ARGUMENTS` in a host to its end: the hosts compare every
/// page before the commit.
///
/// # Errors
///
/// When it cannot be run, or has to be killed after two minutes.
pub fn migrate<I>(host: &Host, arguments: I) -> io::Result<Migration>
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    run(
        host.command("migrate").args(["--json", "--verify"]),
        arguments,
    )
}

/// The same as who does not ask for that has it, without `--verify`.
///
/// # Errors
///
/// As for [`migrate`].
pub fn migrate_as_given<I>(host: &Host, arguments: I) -> io::Result<Migration>
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    run(host.command("migrate").arg("--json"), arguments)
}

fn run<I>(command: &mut Command, arguments: I) -> io::Result<Migration>
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    command.args(arguments);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = output_within(command.spawn()?, MIGRATE_TIMEOUT)?;
    Ok(Migration::read(
        output.status.code(),
        &output.stdout,
        &output.stderr,
    ))
}

/// The output of a process that must end in time; else it is killed.
fn output_within(mut child: Child, limit: Duration) -> io::Result<Output> {
    let collect = |stream: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            stream
                .map_or(Ok(0), |mut stream| stream.read_to_end(&mut bytes))
                .map(|_| bytes)
        })
    };
    let stdout = collect(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = collect(child.stderr.take().map(|stream| Box::new(stream) as _));
    let mut status = None;
    let ended = eventually(limit, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    });
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    let joined = |thread: thread::JoinHandle<io::Result<Vec<u8>>>| {
        thread.join().unwrap_or_else(|_| Ok(Vec::new()))
    };
    let output = Output {
        status,
        stdout: joined(stdout)?,
        stderr: joined(stderr)?,
    };
    if ended {
        Ok(output)
    } else {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("killed after {limit:?}: {said}"),
        ))
    }
}

/// The reason first, and the events from the last one back, a line each: who
/// reads a failed test may see its beginning only.
impl fmt::Debug for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "code {:?}, stderr:\n{}", self.code, self.stderr)?;
        writeln!(f, "events, the last one first:")?;
        let mut events = self.events.iter().rev();
        events.try_for_each(|event| writeln!(f, "{event}"))
    }
}

impl Migration {
    /// What `migrate --json` printed, wherever it ran.
    #[must_use]
    pub fn read(code: Option<i32>, stdout: &[u8], stderr: &[u8]) -> Self {
        let lines = String::from_utf8_lossy(stdout);
        let events: Vec<Value> = lines
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let last = events.last().filter(|event| event["event"] == "report");
        let report = last.and_then(|event| {
            // The report's fields stand in the event or below its name.
            [event, &event["report"]]
                .into_iter()
                .find_map(|value| serde_json::from_value::<Report>(value.clone()).ok())
        });
        Self {
            code,
            report,
            events,
            stderr: String::from_utf8_lossy(stderr).into_owned(),
        }
    }

    /// The report of a migration that committed, without a RST.
    ///
    /// # Panics
    ///
    /// When it ended otherwise.
    #[track_caller]
    #[must_use]
    pub fn expect_committed(&self) -> &Report {
        assert_eq!(self.code, Some(0), "exit code, {self:?}");
        match &self.report {
            Some(report) => {
                assert_eq!(report.outcome, Phase::Committed, "{report:#?}");
                assert_eq!(report.rst_sent, 0, "{report:#?}");
                report
            }
            None => panic!("no report, {self:?}"),
        }
    }
}

/// Every connection of the client goes on, and nothing went wrong so far.
///
/// # Panics
///
/// When it does not.
#[track_caller]
pub fn serves_old_connections(client: &mut StrictClient) {
    serves_old_connections_within(client, SERVED_WITHIN);
}

/// The same where peers have been kept waiting: a retransmission timer that has doubled all the
/// while runs for as long again.
///
/// # Panics
///
/// When one does not.
#[track_caller]
pub fn serves_old_connections_within(client: &mut StrictClient, limit: Duration) {
    match client.await_progress(SERVED_REQUESTS, limit) {
        Ok(snapshot) => assert_eq!(snapshot.errors, 0, "{snapshot:?}"),
        Err(error) => panic!("the old connections are not served: {error}"),
    }
}

/// No eBPF program stays on the host's interfaces.
///
/// # Panics
///
/// When one is.
#[track_caller]
pub fn no_gate_left(host: &Host) {
    // The agent clears up after the command has ended.
    let mut left = Ok(Vec::new());
    eventually(SETTLE_WITHIN, || {
        left = gates(host);
        left.as_ref().is_ok_and(Vec::is_empty)
    });
    if !left.as_ref().is_ok_and(Vec::is_empty) {
        print_logs(host);
    }
    match left {
        Ok(gates) => assert_eq!(gates, Vec::<String>::new(), "on {}", host.name()),
        Err(error) => panic!("{}: {error}", host.name()),
    }
}

/// Whether memory still arrives for a tree that already runs on this host.
#[must_use]
pub fn arrives(host: &Host) -> bool {
    let left = host.path("/run/migrate/arriving");
    std::fs::read_dir(left).is_ok_and(|mut left| left.next().is_some())
}

/// A destination's records of trees that run.
#[must_use]
pub fn running_records(host: &Host) -> BTreeSet<PathBuf> {
    let Ok(entries) = std::fs::read_dir(host.path("/run/migrate/journal")) else {
        return BTreeSet::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.to_string_lossy().ends_with(".destination.json"))
        .filter(|path| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.contains(r#""stage": "done""#)
        })
        .collect()
}

/// Prints the ends of the logs that `migrate` left in a host, for the reader
/// of a failed test.
pub fn print_logs(host: &Host) {
    /// The directory or file, as `migrate` tells its user.
    const LOG: &str = "/run/migrate/log";
    const LINES_MAX: usize = 60;
    let top = host.path(LOG);
    let files = match std::fs::read_dir(&top) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => vec![top],
    };
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        println!(
            "-- {}: {} ({} lines)",
            host.name(),
            file.display(),
            lines.len()
        );
        lines[lines.len().saturating_sub(LINES_MAX)..]
            .iter()
            .for_each(|line| println!("{line}"));
    }
}

/// Moves a workload and checks all that the hosts can tell: it runs there and
/// no longer here, its address went with it, and no gate is left.
///
/// # Panics
///
/// When the migration fails or one of these does not hold.
#[track_caller]
pub fn moves(lab: &Lab, workload: &Workload, from: HostName, to: HostName) -> Report {
    moves_in_time(lab, workload, from, to).0
}

/// The same, and the time in which peers could notice anything: from before the
/// gate closed to the end of the command.
///
/// # Panics
///
/// As [`moves`].
#[track_caller]
pub fn moves_in_time(
    lab: &Lab,
    workload: &Workload,
    from: HostName,
    to: HostName,
) -> (Report, Range<SystemTime>) {
    moves_by(lab, workload, (from, to), &["--to", to.as_str()])
}

/// The same by a command line of the caller's own, without the PID.
///
/// # Panics
///
/// As [`moves`].
#[track_caller]
pub fn moves_by(
    lab: &Lab,
    workload: &Workload,
    (from, to): (HostName, HostName),
    words: &[&str],
) -> (Report, Range<SystemTime>) {
    let (source, destination) = (lab.host(from), lab.host(to));
    let (pid, name) = (workload.pid, process_name(&source, workload.pid));
    let pid_word = pid.to_string();
    let arguments = [words, &[&pid_word]].concat();
    let migration = match migrate(&source, &arguments) {
        Ok(migration) => migration,
        Err(error) => panic!("migrate {arguments:?} in {from}: {error}"),
    };
    let ended_at = SystemTime::now();
    if migration.code != Some(0) {
        print_logs(&source);
        print_logs(&destination);
    }
    let report = migration.expect_committed().clone();
    let took_us = |event: &Value| {
        let phase: Phase = serde_json::from_value(event["phase"].clone()).ok()?;
        (event["event"] == "ended" && phase >= Phase::Freeze)
            .then(|| event["took_us"].as_u64())
            .flatten()
    };
    let since_closing_us: u64 = migration.events.iter().filter_map(took_us).sum();
    assert!(since_closing_us > 0, "no phases in {:?}", migration.events);
    let noticeable = ended_at - Duration::from_micros(since_closing_us)..ended_at;
    assert!(runs(&destination, pid), "{pid} runs on {to}");
    assert_eq!(process_name(&destination, pid), name);
    let ended = eventually(SETTLE_WITHIN, || !runs(&source, pid));
    assert!(ended, "{pid} still runs on {from}");
    if workload.kind != Kind::ShellLoop {
        let address = workload.kind.address().ip();
        for (host, expected) in [(&source, false), (&destination, true)] {
            match has_address(host, address) {
                Ok(has) => assert_eq!(has, expected, "{address} on {}", host.name()),
                Err(error) => panic!("{}: {error}", host.name()),
            }
        }
    }
    no_gate_left(&source);
    no_gate_left(&destination);
    (report, noticeable)
}

/// Moves a tree that has no address of its own in rounds, with every page
/// compared and further options of `migrate`.
///
/// # Panics
///
/// When the migration fails, there was no round, or the tree does not run there
/// alone.
#[track_caller]
pub fn moves_in_rounds(
    lab: &Lab,
    pid: i32,
    (from, to): (HostName, HostName),
    options: &[&str],
) -> Report {
    let (source, destination) = (lab.host(from), lab.host(to));
    let words = ["--to", to.as_str(), &pid.to_string()];
    let migration = match migrate(&source, [options, &words[..]].concat()) {
        Ok(migration) => migration,
        Err(error) => panic!("migrate {options:?} in {from}: {error}"),
    };
    if migration.code != Some(0) {
        print_logs(&source);
        print_logs(&destination);
    }
    let report = migration.expect_committed().clone();
    assert!(report.rounds >= 1, "{report:?}");
    assert!(runs(&destination, pid));
    assert!(eventually(GONE_WITHIN, || !runs(&source, pid)));
    report
}
