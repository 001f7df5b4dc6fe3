//! Strict clients: every reply is held against its request.
//!
//! ```text
//!   engine   sockets, time, signals: sends what a dialogue asks, feeds it what
//!            came, keeps the worst gap; one connection each, never a second try
//!   dialogue one protocol on one connection: what to ask, what must come back
//! ```
//!
//! A dialogue knows the whole of every reply before it arrives, except for
//! HTTP headers. What does not match is named as *lost* (requests, replies or
//! updates that the workload or the wire forgot), *doubled* (delivered or
//! executed again) or merely wrong.

mod dialogue;
mod echo;
mod engine;
mod http;
mod keys;
mod memcached;
mod redis;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use engine::{SetUpError, run};
pub use keys::VALUE_BYTES_MAX;

/// What to speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workload {
    /// INCR, SET, GET and ECHO on keys of each connection's own.
    Redis(Keys),
    /// The text protocol: set, get and incr on keys of each connection's own.
    Memcached(Keys),
    /// The numbered echo of `echo-server`.
    Echo,
    /// GET over keep-alive, bodies held against their first hash.
    Http {
        /// Paths asked in turn; different bodies let a repeated reply be seen.
        paths: Vec<String>,
    },
}

/// Entries of a data store that no connection changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    /// How many to write before the start, and to read back at the end.
    pub count: u64,
    /// Length of each value; at most 64 KiB.
    pub value_bytes: usize,
    /// Write them before the start.
    pub populate: bool,
    /// Read them back at the end, over a connection that is as old as the run.
    pub verify: bool,
}

impl Workload {
    /// Its name on the command line and in the verdict.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Redis(_) => "redis",
            Self::Memcached(_) => "memcached",
            Self::Echo => "echo",
            Self::Http { .. } => "http",
        }
    }
}

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to speak.
    pub workload: Workload,
    /// Where the workload listens.
    pub address: SocketAddr,
    /// Connections, opened once at the start.
    pub connections: usize,
    /// From one request of a connection to its next; the connections are
    /// spread evenly over it.
    pub interval: Duration,
    /// Not evenly, but after anything up to twice the interval.
    pub random_interval: bool,
    /// How long to run after `ready`; `None` until told to stop.
    pub duration: Option<Duration>,
    /// A reply older than this is lost.
    pub reply_timeout: Duration,
    /// How long to wait for a workload that does not listen yet.
    pub connect_wait: Duration,
    /// Take lines on standard input, whose end stops too: `snapshot`, `stop`,
    /// and `progress N`, answered with a snapshot as soon as every connection
    /// had N more right replies.
    pub control: bool,
    /// One line a second on standard error.
    pub progress: bool,
}

/// Default interval: one connection asks every millisecond, so that its gap is
/// exact to a millisecond; more of them share about 10,000 requests a second,
/// which costs a fraction of one core.
#[must_use]
pub fn default_interval(connections: usize) -> Duration {
    match u64::try_from(connections).unwrap_or(u64::MAX) {
        0 | 1 => Duration::from_millis(1),
        many => Duration::from_micros(many.saturating_mul(100).max(2_000)),
    }
}

/// Where a run stands, answered on SIGUSR1 and to `snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Requests with a right reply.
    pub requests: u64,
    /// The same, on the connection that has fewest.
    pub requests_min: u64,
    /// Connections still in use.
    pub live: usize,
    /// Errors so far.
    pub errors: u64,
    /// Lost so far.
    pub lost: u64,
    /// Doubled so far.
    pub doubled: u64,
    /// Longest time from a request to its reply.
    pub worst_gap_us: u64,
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What was spoken.
    pub workload: String,
    /// Connections opened.
    pub connections: usize,
    /// Requests with a right reply.
    pub requests: u64,
    /// Everything that was not as it must be, lost and doubled included.
    pub errors: u64,
    /// Requests, replies or updates that never showed.
    pub lost: u64,
    /// Replies that came twice, requests that were executed twice.
    pub doubled: u64,
    /// Longest time from a request to its reply.
    pub worst_gap_us: u64,
    /// The worst gap of each connection.
    pub worst_gap_us_by_connection: Vec<u64>,
    /// How late this client itself was at worst: a gap no longer than this
    /// says nothing about the workload.
    pub client_lag_us: u64,
    /// How long writing the keys took.
    pub keys_written_us: u64,
    /// Keys read back at the end, all with the right value unless `errors`
    /// says otherwise.
    pub keys_verified: u64,
    /// The first errors in words, at most [`FIRST_ERRORS_MAX`].
    pub first_errors: Vec<String>,
}

/// Errors kept in words: enough to see a pattern.
pub const FIRST_ERRORS_MAX: usize = 5;

impl Verdict {
    /// Whether nothing at all was wrong, and something was asked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.lost == 0 && self.doubled == 0 && self.requests > 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "client verdict: {} errors, {} lost, {} doubled, worst gap {}.{} ms over {} connection{}, {} requests",
            Grouped(self.errors),
            Grouped(self.lost),
            Grouped(self.doubled),
            Grouped(self.worst_gap_us / 1000),
            self.worst_gap_us % 1000 / 100,
            self.connections,
            if self.connections == 1 { "" } else { "s" },
            Grouped(self.requests),
        )?;
        if self.keys_verified > 0 {
            write!(
                f,
                "\nclient verdict: {} keys read back",
                Grouped(self.keys_verified)
            )?;
        }
        Ok(())
    }
}

/// A number with a comma between groups of three digits.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            write!(f, "{}", self.0)
        } else {
            write!(f, "{},{:03}", Grouped(self.0 / 1000), self.0 % 1000)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_reads_as_one_line() {
        let verdict = Verdict {
            workload: "redis".into(),
            connections: 20,
            requests: 1_183_042,
            errors: 0,
            lost: 0,
            doubled: 0,
            worst_gap_us: 41_290,
            worst_gap_us_by_connection: vec![],
            client_lag_us: 10,
            keys_written_us: 0,
            keys_verified: 0,
            first_errors: vec![],
        };
        assert_eq!(
            verdict.to_string(),
            "client verdict: 0 errors, 0 lost, 0 doubled, worst gap 41.2 ms over 20 connections, \
             1,183,042 requests"
        );
        assert!(verdict.is_clean());
        let with_keys = Verdict {
            keys_verified: 100_000,
            ..verdict.clone()
        };
        assert_eq!(
            with_keys.to_string(),
            format!("{verdict}\nclient verdict: 100,000 keys read back")
        );
        assert!(
            !Verdict {
                requests: 0,
                ..verdict
            }
            .is_clean()
        );
    }

    #[test]
    fn one_connection_is_probed_every_millisecond_and_many_share_a_rate() {
        assert_eq!(default_interval(1), Duration::from_millis(1));
        assert_eq!(default_interval(20), Duration::from_millis(2));
        assert_eq!(default_interval(1000), Duration::from_millis(100));
    }
}
