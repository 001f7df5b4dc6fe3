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
use migrate_tests::strict::Verdict;
use serde::{Deserialize, Serialize};

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    pub suite: String,
    pub scenario: String,
    pub method: String,
    pub number: u32,
    /// Longest time from a request to its reply.
    pub client_gap_us: u64,
    /// How late the client itself was at worst.
    pub client_lag_us: u64,
    /// Replies that were not as they had to be.
    pub client_errors: u64,
    /// From the command to its end.
    pub took_us: u64,
    /// On the client and on both hosts, over the whole run.
    pub retransmissions: u64,
    /// This product's own figures.
    pub report: Option<Report>,
    /// Why there are no figures.
    pub failure: Option<String>,
}

impl Run {
    pub(crate) fn key(&self) -> (String, String, u32) {
        (self.scenario.clone(), self.method.clone(), self.number)
    }

    /// Fills in what the client has to say.
    pub(crate) fn heard(&mut self, verdict: &Verdict) {
        self.client_gap_us = verdict.worst_gap_us;
        self.client_lag_us = verdict.client_lag_us;
        self.client_errors = verdict.errors;
    }

    pub(crate) fn blackout_us(&self) -> Option<u64> {
        Some(self.report.as_ref()?.blackout.total_us())
    }
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

/// Segments sent again so far, by the client and both hosts.
pub(crate) fn retransmissions(lab: &Lab) -> anyhow::Result<u64> {
    HostName::ALL.into_iter().try_fold(0, |sum, name| {
        Ok(sum
            + retransmissions_of(&lab.host(name)).with_context(|| format!("counters of {name}"))?)
    })
}

fn retransmissions_of(host: &Host) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/net/snmp", host.init_pid()))?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TCP counters")?;
    let at = names
        .split_whitespace()
        .position(|name| name == "RetransSegs")
        .context("no RetransSegs")?;
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
    use super::*;

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
