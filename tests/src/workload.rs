//! Real workloads on the test hosts, on the workload's own address.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use migrate_test_hosts::{Host, HostName, Lab, WORKLOAD_V4, WORKLOAD_V6};
use nix::sys::signal::Signal;

use crate::client::{ClientError, StrictClient, program};
use crate::hosts::{catches, eventually, listens, runs};

/// From the start until it listens: redis needs 50 ms, Python 300.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// From the signal to the answer of the shell loop, one turn of which takes
/// 20 ms.
const COUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// Where the web server's files are, on either host.
const WEB_ROOT: &str = "/srv/www";
/// What the shell loop answers.
const SHELL_COUNT: &str = "/srv/shell-loop";

/// What to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// redis-server, nothing on disk.
    Redis,
    /// memcached with four worker threads.
    Memcached,
    /// `echo-server`, one thread per connection, on the workload's IPv4
    /// address.
    Echo,
    /// The same on the workload's IPv6 address.
    EchoV6,
    /// The same on the wildcard `[::]`: its IPv4 peers are v4-mapped.
    EchoWildcard,
    /// Python's `http.server`, one thread per connection.
    Http,
    /// `stream-server` on the workload's IPv4 and IPv6 addresses.
    Streams,
    /// The same, and it accepts nothing.
    Deaf,
    /// A shell that counts, and starts `sleep` for every turn: no sockets.
    ShellLoop,
}

impl Kind {
    /// The name that the strict client has for it; `None` without a protocol.
    #[must_use]
    pub const fn protocol(self) -> Option<&'static str> {
        match self {
            Self::Redis => Some("redis"),
            Self::Memcached => Some("memcached"),
            Self::Echo | Self::EchoV6 | Self::EchoWildcard => Some("echo"),
            Self::Http => Some("http"),
            Self::Streams | Self::Deaf | Self::ShellLoop => None,
        }
    }

    const fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::Memcached => 11211,
            Self::Echo | Self::EchoV6 | Self::EchoWildcard => 7000,
            Self::Http => 8000,
            Self::Streams | Self::Deaf => 7100,
            Self::ShellLoop => 0,
        }
    }

    /// The address that its clients use, and that moves with it.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        let address: IpAddr = match self {
            Self::EchoV6 => WORKLOAD_V6.into(),
            _ => WORKLOAD_V4.into(),
        };
        SocketAddr::new(address, self.port())
    }

    fn command(self) -> Vec<OsString> {
        let address = self.address().ip().to_string();
        let port = self.port().to_string();
        let words: Vec<&str> = match self {
            Self::Redis => vec![
                "redis-server",
                "--bind",
                &address,
                "--port",
                &port,
                "--save",
                "",
                "--appendonly",
                "no",
                "--daemonize",
                "no",
                "--protected-mode",
                "no",
                "--dir",
                "/srv",
            ],
            Self::Memcached => vec![
                "memcached",
                "-u",
                "root",
                "-l",
                &address,
                "-p",
                &port,
                "-t",
                "4",
                "-m",
                "64",
                "-c",
                "4096",
            ],
            Self::Echo | Self::EchoV6 | Self::EchoWildcard => {
                let listen = match self {
                    Self::EchoWildcard => format!("[::]:{port}"),
                    _ => self.address().to_string(),
                };
                return vec![program("echo-server").into(), listen.into()];
            }
            Self::Http => vec![
                "/usr/bin/python3",
                "-m",
                "http.server",
                "--protocol",
                "HTTP/1.1",
                "--bind",
                &address,
                "--directory",
                WEB_ROOT,
                &port,
            ],
            Self::Streams | Self::Deaf => {
                let mut words = vec![program("stream-server").into()];
                for address in [IpAddr::from(WORKLOAD_V4), WORKLOAD_V6.into()] {
                    words.push(SocketAddr::new(address, self.port()).to_string().into());
                }
                if self == Self::Deaf {
                    words.push("--deaf".into());
                }
                return words;
            }
            // It writes its count only when asked, so that no file of its own
            // is open as a rule.
            Self::ShellLoop => vec![
                "/bin/sh",
                "-c",
                "i=0; trap 'echo $i >/srv/shell-loop' USR1; while :; do i=$((i+1)); sleep 0.02; done",
            ],
        };
        words.into_iter().map(OsString::from).collect()
    }
}

/// Why a workload could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Its files could not be written.
    #[error("could not write the workload's files on {host}")]
    Files {
        /// Where.
        host: HostName,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It did not start.
    #[error("could not start {kind:?}")]
    Start {
        /// What.
        kind: Kind,
        /// Why.
        #[source]
        source: migrate_test_hosts::Error,
    },
    /// It does not listen, or does not answer.
    #[error("{kind:?}, PID {pid}, {what} within {waited:?}; it still runs: {runs}")]
    Silent {
        /// What.
        kind: Kind,
        /// Its PID in its host.
        pid: i32,
        /// What it did not do.
        what: &'static str,
        /// For how long.
        waited: Duration,
        /// Whether its root process is there.
        runs: bool,
    },
}

/// A workload that was started on `host1`.
#[derive(Debug, Clone)]
pub struct Workload {
    /// What it is.
    pub kind: Kind,
    /// The PID of its root process, in every host it comes to.
    pub pid: i32,
}

impl Workload {
    /// Starts it on `host1` and waits until it listens; the shell loop, until
    /// it can be asked.
    ///
    /// # Errors
    ///
    /// [`WorkloadError`] when it does not get that far.
    pub fn start(kind: Kind, lab: &Lab) -> Result<Self, WorkloadError> {
        Self::start_by(&[], kind, lab)
    }

    /// The same with a shell as its root, which waits for it.
    ///
    /// # Errors
    ///
    /// [`WorkloadError`] when it does not get that far.
    pub fn start_in_shell(kind: Kind, lab: &Lab) -> Result<Self, WorkloadError> {
        Self::start_by(&["/bin/sh", "-c", r#""$@"; exit $?"#, "sh"], kind, lab)
    }

    fn start_by(starter: &[&str], kind: Kind, lab: &Lab) -> Result<Self, WorkloadError> {
        let host = lab.host(HostName::Host1);
        if kind == Kind::Http {
            for name in [HostName::Host1, HostName::Host2] {
                let root = lab.host(name).path(WEB_ROOT);
                let failed = |source| WorkloadError::Files { host: name, source };
                fs::create_dir_all(&root).map_err(failed)?;
                fs::write(root.join("a"), "first ".repeat(400)).map_err(failed)?;
                fs::write(root.join("b"), "second ".repeat(300)).map_err(failed)?;
            }
        }
        let command = starter.iter().map(OsString::from).chain(kind.command());
        let pid = host
            .spawn_detached(command, "/dev/null")
            .map_err(|source| WorkloadError::Start { kind, source })?;
        let workload = Self { kind, pid };
        let is_up = || match kind {
            Kind::ShellLoop => catches(&host, pid, Signal::SIGUSR1),
            _ => listens(&host, kind.port()),
        };
        if eventually(START_TIMEOUT, is_up) {
            Ok(workload)
        } else {
            Err(workload.silent(&host, "did not listen", START_TIMEOUT))
        }
    }

    /// Starts a strict client for it on the lab's client host.
    ///
    /// # Errors
    ///
    /// As [`StrictClient::spawn`]. The shell loop speaks nothing.
    pub fn client(
        &self,
        lab: &Lab,
        connections: usize,
        more: &[&str],
    ) -> Result<StrictClient, ClientError> {
        let protocol = self.kind.protocol().unwrap_or("nothing");
        let (address, connections) = (self.kind.address().to_string(), connections.to_string());
        let mut arguments = vec![protocol, "--addr", &address, "--connections", &connections];
        if self.kind == Kind::Http {
            arguments.extend(["--path", "/a", "--path", "/b"]);
        }
        arguments.extend(more);
        StrictClient::start(&lab.host(HostName::Client), arguments)
    }

    /// Asks the shell loop, wherever it runs, how far it has counted.
    ///
    /// # Errors
    ///
    /// [`WorkloadError::Silent`] when it does not answer.
    pub fn count(&self, host: &Host) -> Result<u64, WorkloadError> {
        let answer = host.path(SHELL_COUNT);
        // There is none as a rule.
        let _ = fs::remove_file(&answer);
        host.exec(["kill", "-USR1", &self.pid.to_string()])
            .map_err(|source| WorkloadError::Start {
                kind: self.kind,
                source,
            })?;
        let mut count = None;
        eventually(COUNT_TIMEOUT, || {
            let text = fs::read_to_string(&answer).unwrap_or_default();
            // Without its end of line it is still being written.
            count = text
                .strip_suffix('\n')
                .and_then(|digits| digits.parse().ok());
            count.is_some()
        });
        count.ok_or_else(|| self.silent(host, "did not count", COUNT_TIMEOUT))
    }

    fn silent(&self, host: &Host, what: &'static str, waited: Duration) -> WorkloadError {
        let runs = runs(host, self.pid);
        WorkloadError::Silent {
            kind: self.kind,
            pid: self.pid,
            what,
            waited,
            runs,
        }
    }
}

/// What a script over keys of the lab's redis, which gets these two numbers,
/// returns.
///
/// # Panics
///
/// When redis answers something else than a number.
#[track_caller]
pub fn redis_script(lab: &Lab, script: &str, first: u32, last: u32) -> u32 {
    let address = Kind::Redis.address().ip().to_string();
    let (first, last) = (first.to_string(), last.to_string());
    let command = ["redis-cli", "-h", &address, "EVAL", script, "0"];
    let words = command.into_iter().chain([first.as_str(), last.as_str()]);
    let output = match lab.host(HostName::Client).exec(words) {
        Ok(output) => output,
        Err(error) => panic!("redis-cli: {error}"),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match said.trim().parse() {
        Ok(number) => number,
        Err(_) => panic!("{said:?} {output:?}"),
    }
}
