//! What is moved: memory, how fast it changes, and connections.

use migrate_test_hosts::{HostName, Lab, WORKLOAD_V4};
use migrate_tests::client::{ClientError, StrictClient, program};
use migrate_tests::hosts::{eventually, listens};
use std::time::Duration;

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
    /// redis with so many short keys.
    Redis { keys: u32 },
    /// memcached, empty: all that counts is its connections.
    Memcached,
}

impl Server {
    const fn port(self) -> u16 {
        match self {
            Self::Ballast { .. } => 7000,
            Self::Redis { .. } => 6379,
            Self::Memcached => 11211,
        }
    }

    fn command(self) -> Vec<String> {
        let address = WORKLOAD_V4.to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        match self {
            Self::Ballast {
                resident_mib,
                dirty_mb_per_s,
            } => vec![
                program("echo-server").to_string_lossy().into_owned(),
                format!("{address}:7000"),
                format!("--resident-mib={resident_mib}"),
                format!("--dirty-mb-per-s={dirty_mb_per_s}"),
            ],
            Self::Redis { .. } => words(&[
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
            Self::Memcached => words(&[
                "memcached",
                "-u",
                "root",
                "-l",
                &address,
                "-t",
                "2",
                "-c",
                "16384",
            ]),
        }
    }
}

impl Scenario {
    /// Its name in results: two runs with the same name are comparable.
    pub(crate) fn name(&self) -> String {
        let many = self.connections;
        match self.server {
            Server::Ballast {
                resident_mib,
                dirty_mb_per_s,
            } => format!("{resident_mib} MiB, {dirty_mb_per_s} MB/s, {many} conn"),
            Server::Redis { keys } => format!("redis {keys} keys, {many} conn"),
            Server::Memcached => format!("memcached, {many} conn"),
        }
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

    /// Starts its strict client.
    pub(crate) fn client(&self, lab: &Lab) -> Result<StrictClient, ClientError> {
        let address = format!("{WORKLOAD_V4}:{}", self.server.port());
        let (connections, keys);
        connections = self.connections.to_string();
        let mut arguments = vec![
            match self.server {
                Server::Ballast { .. } => "echo",
                Server::Redis { .. } => "redis",
                Server::Memcached => "memcached",
            },
            "--addr",
            &address,
            "--connections",
            &connections,
            // iptables with many connections stands still for longer.
            "--reply-timeout-ms",
            "120000",
        ];
        if let Server::Redis { keys: number } = self.server {
            keys = number.to_string();
            arguments.extend(["--keys", &keys, "--populate", "--verify"]);
        }
        StrictClient::start(&lab.host(HostName::Client), arguments)
    }
}
