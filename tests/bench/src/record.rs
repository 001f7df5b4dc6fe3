//! What a run measured, kept one JSON line a run, so that an interrupted
//! benchmark goes on where it was.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, Lab};
use serde::{Deserialize, Serialize};

use crate::scenario::Heard;

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    pub suite: String,
    pub scenario: String,
    pub method: String,
    pub number: u32,
    /// What was measured, as git names it; none outside a clone.
    #[serde(default)]
    pub commit: Option<String>,
    /// What it was measured on.
    #[serde(default)]
    pub machine: Option<String>,
    /// Longest time from a request to its reply; for streams, without a byte.
    pub client_gap_us: u64,
    /// How late the client itself was at worst.
    pub client_lag_us: u64,
    /// Replies that were not as they had to be.
    pub client_errors: u64,
    /// From the command to its end.
    pub took_us: u64,
    /// How long writing the entries took that the server has, where it has some.
    #[serde(default)]
    pub filled_us: Option<u64>,
    /// What the client's kernel counted.
    pub client_tcp: Tcp,
    /// What the kernels of both hosts counted, for the connections that carry
    /// memory as well.
    pub hosts_tcp: Tcp,
    /// Requests answered in a second of the rounds, in percent of those in a
    /// second before; only where clients ask as fast as they can.
    pub served_in_rounds_percent: Option<u64>,
    /// This product's own figures.
    pub report: Option<Report>,
    /// Why there are no figures.
    pub failure: Option<String>,
}

impl Run {
    /// One that has not begun.
    pub(crate) fn of(suite: &str, scenario: String, method: String, number: u32) -> Self {
        Self {
            suite: suite.to_owned(),
            scenario,
            method,
            number,
            commit: None,
            machine: None,
            client_gap_us: 0,
            client_lag_us: 0,
            client_errors: 0,
            took_us: 0,
            filled_us: None,
            client_tcp: Tcp::default(),
            hosts_tcp: Tcp::default(),
            served_in_rounds_percent: None,
            report: None,
            failure: None,
        }
    }

    pub(crate) fn key(&self) -> (String, String, u32) {
        (self.scenario.clone(), self.method.clone(), self.number)
    }

    /// Fills in what the client has to say.
    pub(crate) fn heard(&mut self, heard: &Heard) {
        self.client_gap_us = heard.gap_us;
        self.client_lag_us = heard.lag_us;
        self.filled_us = heard.filled_us;
        self.client_errors = heard.errors;
    }

    pub(crate) fn blackout_us(&self) -> Option<u64> {
        Some(self.report.as_ref()?.blackout.total_us())
    }

    /// Bytes of pages in a second of the round that has sent most, reading them
    /// included and pauses left out.
    pub(crate) fn stream_bytes_per_s(&self) -> Option<u64> {
        let rounds = &self.report.as_ref()?.precopy;
        let most = rounds.iter().max_by_key(|round| round.bytes)?;
        per_second(most.bytes, most.took_us.saturating_sub(most.paused_us))
    }
}

/// How much of something there was in a second.
fn per_second(amount: u64, us: u64) -> Option<u64> {
    u64::try_from(u128::from(amount) * 1_000_000 / u128::from(us.max(1))).ok()
}

/// How many requests had been answered at a time, in microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Served {
    pub at_us: u64,
    pub requests: u64,
}

/// Requests answered in a second of the rounds, in percent of those in a second
/// before the migration; none when there were no rounds to look at.
pub(crate) fn served_in_rounds(seen: &[Served], report: &Report) -> Option<u64> {
    let began_us = report.began_unix_ms * 1000;
    let rounds = report.phases.iter().find(|phase| phase.name == "precopy")?;
    let start_us = began_us.saturating_add_signed(rounds.start_us);
    let rate = |from_us: u64, to_us: u64| {
        let mut within = seen
            .iter()
            .filter(|seen| (from_us..=to_us).contains(&seen.at_us));
        let (first, last) = (within.next()?, within.next_back()?);
        per_second(last.requests - first.requests, last.at_us - first.at_us)
    };
    let before = rate(0, began_us)?;
    let meanwhile = rate(start_us, start_us + rounds.took_us)?;
    meanwhile.checked_mul(100)?.checked_div(before)
}

/// Runs on disk.
pub(crate) struct Store {
    file: File,
    pub runs: Vec<Run>,
}

impl Store {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        // The last line is torn when the run before was killed.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let runs = text[..whole]
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .with_context(|| format!("{} is of another version; remove it", path.display()))?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        file.set_len(u64::try_from(whole)?)?;
        Ok(Self { file, runs })
    }

    /// Runs that need not be made again.
    pub(crate) fn made(&self) -> HashSet<(String, String, u32)> {
        self.runs.iter().map(Run::key).collect()
    }

    pub(crate) fn add(&mut self, run: Run) -> anyhow::Result<()> {
        let line = serde_json::to_string(&run)? + "\n";
        self.file.write_all(line.as_bytes())?;
        self.runs.push(run);
        Ok(())
    }
}

/// Counters of a kernel, or their growth over a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tcp {
    /// Segments sent again (`RetransSegs`).
    pub retransmissions: u64,
    /// Timers of them that ran out (`TCPTimeouts`).
    pub timeouts: u64,
    /// RST segments (`OutRsts`).
    pub resets: u64,
}

impl Tcp {
    /// What has come since.
    pub(crate) fn since(self, before: Self) -> Self {
        let grown = |value: fn(&Self) -> u64| value(&self).saturating_sub(value(&before));
        Self {
            retransmissions: grown(|tcp| tcp.retransmissions),
            timeouts: grown(|tcp| tcp.timeouts),
            resets: grown(|tcp| tcp.resets),
        }
    }

    fn of(host: &Host) -> anyhow::Result<Self> {
        let read = |table: &str| {
            let path = format!("/proc/{}/net/{table}", host.init_pid());
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let (snmp, netstat) = (read("snmp")?, read("netstat")?);
        Ok(Self {
            retransmissions: counter(&snmp, "Tcp:", "RetransSegs")?,
            timeouts: counter(&netstat, "TcpExt:", "TCPTimeouts")?,
            resets: counter(&snmp, "Tcp:", "OutRsts")?,
        })
    }
}

/// What the client's kernel and those of both hosts have counted so far.
pub(crate) fn tcp(lab: &Lab) -> anyhow::Result<(Tcp, Tcp)> {
    let of = |name| Tcp::of(&lab.host(name)).with_context(|| format!("counters of {name}"));
    let (one, two) = (of(HostName::Host1)?, of(HostName::Host2)?);
    let hosts = Tcp {
        retransmissions: one.retransmissions + two.retransmissions,
        timeouts: one.timeouts + two.timeouts,
        resets: one.resets + two.resets,
    };
    Ok((of(HostName::Client)?, hosts))
}

/// One of a table with a line of names and a line of values.
fn counter(text: &str, table: &str, name: &str) -> anyhow::Result<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with(table));
    let (names, values) = lines
        .next()
        .zip(lines.next())
        .with_context(|| format!("no counters {table}"))?;
    let at = names
        .split_whitespace()
        .position(|other| other == name)
        .with_context(|| format!("no counter {name}"))?;
    Ok(values.split_whitespace().nth(at).context("torn")?.parse()?)
}

/// Median, 99th percentile and maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spread {
    pub median: u64,
    pub p99: u64,
    pub max: u64,
}

impl Spread {
    /// Nearest-rank percentiles: every figure is one that was measured.
    pub(crate) fn of(values: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.into_iter().collect();
        values.sort_unstable();
        let rank = |percent: usize| values.get((values.len() * percent).div_ceil(100).max(1) - 1);
        Some(Self {
            median: *rank(50)?,
            p99: *rank(99)?,
            max: *values.last()?,
        })
    }
}

/// Microseconds of a duration.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use migrate_core::timeline::Span;

    use super::*;

    #[test]
    fn a_slower_client_is_seen_as_one() {
        let seen = |at_us, requests| Served { at_us, requests };
        let report = Report {
            began_unix_ms: 1000,
            phases: vec![Span {
                name: "precopy".to_owned(),
                start_us: 500_000,
                took_us: 1_000_000,
            }],
            ..Report::default()
        };
        // 1000 a second before, 800 a second in the rounds, none in the freeze.
        let all = [
            seen(0, 0),
            seen(900_000, 900),
            seen(1_500_000, 1300),
            seen(2_400_000, 2020),
            seen(3_000_000, 2020),
        ];
        assert_eq!(served_in_rounds(&all, &report), Some(80));
        assert_eq!(served_in_rounds(&all[..3], &report), None);
        assert_eq!(served_in_rounds(&all, &Report::default()), None);
    }

    #[test]
    fn an_interrupted_benchmark_goes_on_where_it_was() {
        let place = std::env::temp_dir().join(format!("migrate-bench-{}", std::process::id()));
        let path = place.join("runs/suite.jsonl");
        let run = |number| Run::of("suite", "scenario".to_owned(), "migrate".to_owned(), number);
        let mut store = Store::open(&path).unwrap();
        store.add(run(1)).unwrap();
        store.add(run(2)).unwrap();
        drop(store);
        // Killed in the middle of a line.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 7]).unwrap();
        let mut store = Store::open(&path).unwrap();
        let made = |store: &Store, number| store.made().contains(&run(number).key());
        assert!(made(&store, 1) && !made(&store, 2));
        store.add(run(2)).unwrap();
        let store = Store::open(&path).unwrap();
        assert!(made(&store, 1) && made(&store, 2));
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "Ip: A B\nIp: 7 8\nTcp: B A\nTcp: 1 2\n";
        assert_eq!(counter(text, "Tcp:", "A").ok(), Some(2));
        assert!(counter(text, "Tcp:", "C").is_err() && counter(text, "Udp:", "A").is_err());
    }

    #[test]
    fn percentiles_are_measured_values() {
        assert_eq!(Spread::of([]), None);
        let spread = Spread::of([3, 1, 2]).map(|s| (s.median, s.p99, s.max));
        assert_eq!(spread, Some((2, 3, 3)));
        let spread = Spread::of(1..=200).map(|s| (s.median, s.p99, s.max));
        assert_eq!(spread, Some((100, 198, 200)));
        assert_eq!(Spread::of([7]).map(|s| (s.median, s.max)), Some((7, 7)));
    }
}
