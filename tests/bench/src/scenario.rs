//! What is moved: memory, how fast it changes, and connections.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use migrate_test_hosts::{HostName, Lab, WORKLOAD_V4, WORKLOAD_V6};
use migrate_tests::client::{StrictClient, program};
use migrate_tests::hosts::{eventually, listens};
use migrate_tests::streams::{Kind, Running};

use crate::record::micros;

/// Filling 4 GiB takes seconds on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A server, its memory, and its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scenario {
    pub server: Server,
    pub connections: u16,
}

/// Who is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// `echo-server` that holds so much memory and writes to it at this rate.
    Ballast {
        resident_mib: u32,
        dirty_mb_per_s: u32,
    },
    /// `echo-server` with so many processes, itself among them.
    Family { processes: u32 },
    /// `echo-server` with that much memory, of which little is used, everywhere.
    Sparse { gib: u32 },
    /// redis with so many short keys.
    Redis { keys: u32 },
    /// redis with so much memory in values of four pages each.
    FullRedis { gib: u32 },
    /// memcached with so much memory in values of four pages each.
    FullMemcached { gib: u32 },
    /// redis with short keys, whose clients ask again as soon as they have their reply.
    PressedRedis { keys: u32 },
    /// memcached with so many short keys; without any, all that counts is its connections.
    Memcached { keys: u32 },
    /// `echo-server` on the workload's IPv6 address.
    EchoV6,
    /// Connections that one side fills, or that last for one request.
    Streams(Kind),
}

impl Server {
    const fn port(self) -> u16 {
        match self {
            Self::Ballast { .. } | Self::EchoV6 | Self::Family { .. } | Self::Sparse { .. } => 7000,
            Self::Redis { .. }
            | Self::FullRedis { .. }
            | Self::PressedRedis { .. }
            | Self::Streams(Kind::Subscribe) => 6379,
            Self::Streams(_) => 7100,
            Self::Memcached { .. } | Self::FullMemcached { .. } => 11211,
        }
    }

    fn address(self) -> SocketAddr {
        match self {
            Self::EchoV6 => (WORKLOAD_V6, self.port()).into(),
            _ => (WORKLOAD_V4, self.port()).into(),
        }
    }

    fn command(self) -> Vec<String> {
        let address = WORKLOAD_V4.to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let echo = |options: &[String]| {
            let server = program("echo-server").to_string_lossy().into_owned();
            [&[server, self.address().to_string()], options].concat()
        };
        match self {
            Self::Ballast {
                resident_mib,
                dirty_mb_per_s,
            } => echo(&[
                format!("--resident-mib={resident_mib}"),
                format!("--dirty-mb-per-s={dirty_mb_per_s}"),
            ]),
            Self::EchoV6 => echo(&[]),
            Self::Family { processes } => echo(&[format!("--children={}", processes - 1)]),
            Self::Sparse { gib } => echo(&[format!("--sparse-gib={gib}")]),
            Self::Redis { .. }
            | Self::FullRedis { .. }
            | Self::PressedRedis { .. }
            | Self::Streams(Kind::Subscribe) => words(&[
                "redis-server",
                "--bind",
                &address,
                "--save",
                "",
                "--protected-mode",
                "no",
                "--dir",
                "/srv",
            ]),
            Self::Streams(_) => vec![
                program("stream-server").to_string_lossy().into_owned(),
                self.address().to_string(),
            ],
            Self::Memcached { .. } | Self::FullMemcached { .. } => {
                let limit_mib = (self.full_gib().unwrap_or(0) * 2048).max(64).to_string();
                words(&[
                    "memcached",
                    "-u",
                    "root",
                    "-l",
                    &address,
                    "-t",
                    "2",
                    "-c",
                    "16384",
                    "-m",
                    &limit_mib,
                ])
            }
        }
    }
}

impl Server {
    /// How much memory a data store is filled with, where that is what counts.
    const fn full_gib(self) -> Option<u32> {
        match self {
            Self::FullRedis { gib } | Self::FullMemcached { gib } => Some(gib),
            _ => None,
        }
    }

    /// Entries that the clients write first and read back at the end: how many, and how
    /// long their values are.
    fn entries(self) -> Option<(u64, usize)> {
        /// As much as redis' allocator and head leave of four pages, and memcached of less
        /// than five.
        const VALUE_BYTES: usize = 16_000;
        const A_GIB: u64 = (1 << 30) / (4 * 4096);
        match self {
            Self::Redis { keys }
            | Self::PressedRedis { keys }
            | Self::Memcached { keys: keys @ 1.. } => Some((keys.into(), SHORT_VALUE_BYTES)),
            _ => Some((u64::from(self.full_gib()?) * A_GIB, VALUE_BYTES)),
        }
    }
}

/// So that 100,000 keys make about 20 MB of heap.
const SHORT_VALUE_BYTES: usize = 100;

impl Scenario {
    /// The address that moves with the server.
    pub(crate) fn address(self) -> IpAddr {
        self.server.address().ip()
    }

    /// Its name in results: two runs with the same name are comparable.
    pub(crate) fn name(&self) -> String {
        let many = self.connections;
        match self.server {
            Server::Ballast {
                resident_mib,
                dirty_mb_per_s,
            } => format!("{resident_mib} MiB, {dirty_mb_per_s} MB/s, {many} conn"),
            Server::Family { processes } => format!("{processes} processes, {many} conn"),
            Server::Sparse { gib } => format!("{gib} GiB sparse, {many} conn"),
            Server::Redis { keys } => format!("redis {keys} keys, {many} conn"),
            Server::FullRedis { gib } => format!("redis {gib} GiB, {many} conn"),
            Server::FullMemcached { gib } => format!("memcached {gib} GiB, {many} conn"),
            Server::PressedRedis { keys } => {
                format!("redis {keys} keys, {many} conn without a pause")
            }
            Server::Memcached { keys: 0 } => format!("memcached, {many} conn"),
            Server::Memcached { keys } => format!("memcached {keys} keys, {many} conn"),
            Server::EchoV6 => format!("echo over IPv6, {many} conn"),
            Server::Streams(kind) => format!("{}, {many} at a time", stream_name(kind)),
        }
    }

    /// Why this machine cannot measure it: the tree, what has come of it and the
    /// copy are in memory at the same time, all of them here.
    pub(crate) fn does_not_fit(&self) -> anyhow::Result<Option<String>> {
        /// Those three, and some room for everything else.
        const TIMES: u64 = 4;
        let resident_mib = match self.server {
            Server::Ballast { resident_mib, .. } => resident_mib,
            other => match other.full_gib() {
                Some(gib) => gib * 1024,
                None => return Ok(None),
            },
        };
        let text = std::fs::read_to_string("/proc/meminfo")?;
        let available_kb: u64 = text
            .lines()
            .find_map(|line| {
                line.strip_prefix("MemAvailable:")?
                    .split_whitespace()
                    .next()
            })
            .context("no MemAvailable in /proc/meminfo")?
            .parse()?;
        let (wanted_mib, available_mib) = (u64::from(resident_mib) * TIMES, available_kb / 1024);
        Ok((available_mib < wanted_mib)
            .then(|| format!("it takes {wanted_mib} MiB and {available_mib} MiB are available")))
    }

    /// Whether its clients show how fast it is.
    pub(crate) fn is_pressed(&self) -> bool {
        matches!(self.server, Server::PressedRedis { .. })
    }

    /// Starts the server on `host1`; its PID.
    pub(crate) fn start(&self, lab: &Lab) -> anyhow::Result<i32> {
        let host = lab.host(HostName::Host1);
        let pid = host.spawn_detached(self.server.command(), "/dev/null")?;
        anyhow::ensure!(
            eventually(START_LIMIT, || listens(&host, self.server.port())),
            "{} did not listen within {START_LIMIT:?}",
            self.name()
        );
        Ok(pid)
    }

    /// Starts its clients, which give a request up for lost after `limit`; those
    /// of streams have a limit of their own.
    pub(crate) fn clients(&self, lab: &Lab, limit: Duration) -> anyhow::Result<Clients> {
        let host = lab.host(HostName::Client);
        let to = self.server.address();
        if let Server::Streams(kind) = self.server {
            let ports = "echo 1024 65535 >/proc/sys/net/ipv4/ip_local_port_range";
            let output = host.exec(["sh", "-c", ports])?;
            anyhow::ensure!(output.status.success(), "the client's ports");
            let running = Running::start(kind, usize::from(self.connections), &host, to)?;
            return Ok(Clients::Streams(running));
        }
        let (address, limit_ms) = (to.to_string(), limit.as_millis().to_string());
        let (connections, keys, value_bytes);
        connections = self.connections.to_string();
        let mut arguments = vec![
            match self.server {
                Server::Redis { .. } | Server::FullRedis { .. } | Server::PressedRedis { .. } => {
                    "redis"
                }
                Server::Memcached { .. } | Server::FullMemcached { .. } => "memcached",
                _ => "echo",
            },
            "--addr",
            &address,
            "--connections",
            &connections,
            "--reply-timeout-ms",
            &limit_ms,
        ];
        if let Some((number, bytes)) = self.server.entries() {
            (keys, value_bytes) = (number.to_string(), bytes.to_string());
            arguments.extend(["--keys", &keys, "--populate", "--verify"]);
            arguments.extend(["--value-bytes", &value_bytes]);
        }
        if self.is_pressed() {
            arguments.extend(["--interval-us", "0"]);
        }
        Ok(Clients::Strict(StrictClient::start(&host, arguments)?))
    }
}

fn stream_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Upload => "bulk upload",
        Kind::Download => "bulk download",
        Kind::Storm | Kind::PoliteStorm => "a connection for each request",
        Kind::BigStorm => "a connection for each megabyte",
        Kind::HalfClosed => "half-closed connections",
        Kind::Subscribe => "redis pub/sub",
    }
}

/// Who talks to the server, and holds every byte against what is due.
pub(crate) enum Clients {
    /// Requests and their replies.
    Strict(StrictClient),
    /// Streams.
    Streams(Running),
}

/// What clients have seen.
pub(crate) struct Heard {
    /// The longest time from a request to its reply; for streams, without a byte.
    pub gap_us: u64,
    /// How late the client itself was at worst, where that is known.
    pub lag_us: u64,
    /// How long writing the entries took, where there are some.
    pub filled_us: Option<u64>,
    /// What was not as it had to be.
    pub errors: u64,
    /// The first of it.
    pub first_errors: Vec<String>,
}

/// Right replies on every connection before the move, and after it.
const SETTLED_REPLIES: u64 = 20;
/// Bytes, or replies, of all streams together.
const SETTLED_PROGRESS: u64 = 20;

impl Clients {
    /// Waits until all are served.
    pub(crate) fn are_served(&mut self, limit: Duration) -> anyhow::Result<()> {
        match self {
            Self::Strict(client) => {
                client.await_progress(SETTLED_REPLIES, limit)?;
            }
            Self::Streams(running) => running.goes_on(SETTLED_PROGRESS)?,
        }
        Ok(())
    }

    /// How many replies they have had, all together.
    pub(crate) fn replies(&mut self) -> anyhow::Result<u64> {
        match self {
            Self::Strict(client) => Ok(client.snapshot()?.requests),
            Self::Streams(_) => anyhow::bail!("streams have no replies"),
        }
    }

    /// What was before the move is no pause of its.
    pub(crate) fn begin(&self) {
        if let Self::Streams(running) = self {
            running.forget_pauses();
        }
    }

    pub(crate) fn stop(self) -> anyhow::Result<Heard> {
        Ok(match self {
            Self::Strict(client) => {
                let verdict = client.stop()?;
                let wrong = !verdict.is_clean();
                Heard {
                    gap_us: verdict.worst_gap_us,
                    lag_us: verdict.client_lag_us,
                    filled_us: (verdict.keys_verified > 0).then_some(verdict.keys_written_us),
                    errors: verdict.errors.max(u64::from(wrong)),
                    first_errors: verdict
                        .first_errors
                        .iter()
                        .map(|error| format!("{error:?}"))
                        .collect(),
                }
            }
            Self::Streams(running) => {
                let verdict = running.stop();
                Heard {
                    gap_us: micros(verdict.longest),
                    lag_us: 0,
                    filled_us: None,
                    errors: u64::try_from(verdict.failures.len())?,
                    first_errors: verdict.failures,
                }
            }
        })
    }
}
