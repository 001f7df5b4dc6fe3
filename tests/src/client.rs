//! A strict client as a process of its own, told what to do through a pipe.
//!
//! It ends with the pipe, so a test that panics leaves none behind.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use migrate_test_hosts::Host;

use crate::strict::{Snapshot, Verdict};

/// All connections open and answered: a thousand of them on a busy machine, or
/// all keys written in an emulated one.
const READY_TIMEOUT: Duration = Duration::from_secs(240);
/// A snapshot is one turn of the client's loop.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer than the client's own patience of 10 s, plus reading keys back.
const STOP_TIMEOUT: Duration = Duration::from_secs(90);
/// Lines of standard error kept for a failure's message.
const STDERR_LINES_MAX: usize = 50;

/// Why a strict client could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The program did not start.
    #[error("could not start {program}")]
    Start {
        /// Its path.
        program: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended, or was silent for too long.
    #[error("the strict client gave no {what} within {waited:?}; it said: {said}")]
    Silent {
        /// What was awaited.
        what: &'static str,
        /// For how long.
        waited: Duration,
        /// Its standard output and standard error.
        said: String,
    },
    /// It had already ended, by itself; [`StrictClient::stop`] has its verdict.
    #[error("the strict client had already ended: {verdict}")]
    Ended {
        /// How it judged.
        verdict: Box<Verdict>,
    },
    /// Its line could not be read.
    #[error("the strict client's line is no {what}: {line}")]
    Unreadable {
        /// What was awaited.
        what: &'static str,
        /// The line.
        line: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It no longer listens.
    #[error("could not tell the strict client to {command}")]
    Tell {
        /// The command.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The path of one of this crate's programs, beside the running test.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let mut directory = std::env::current_exe().unwrap_or_default();
    directory.pop();
    if directory.file_name() == Some(OsStr::new("deps")) {
        directory.pop();
    }
    directory.join(name)
}

enum Said {
    Out(String),
    Err(String),
}

/// A running strict client.
pub struct StrictClient {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Receiver<Said>,
    stderr: Vec<String>,
    ended: Option<Verdict>,
}

impl StrictClient {
    /// Starts `command`, which runs `strict-client` wherever it shall run, and
    /// waits until every connection had its first reply.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when it does not start or does not get that far.
    pub fn spawn(mut command: Command) -> Result<Self, ClientError> {
        command.arg("--control");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|source| ClientError::Start {
            program: command.get_program().to_string_lossy().into_owned(),
            source,
        })?;
        let (sender, said) = channel();
        if let Some(stdout) = child.stdout.take() {
            let sender = sender.clone();
            thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(Result::ok);
                lines.map(Said::Out).try_for_each(|line| sender.send(line))
            });
        }
        if let Some(stderr) = child.stderr.take() {
            thread::spawn(move || {
                let lines = BufReader::new(stderr).lines().map_while(Result::ok);
                lines.map(Said::Err).try_for_each(|line| sender.send(line))
            });
        }
        let stdin = child.stdin.take();
        let mut client = Self {
            child,
            stdin,
            said,
            stderr: Vec::new(),
            ended: None,
        };
        client.await_line("ready", READY_TIMEOUT, true)?;
        Ok(client)
    }

    /// Starts a strict client in a host: `start(&client, ["echo", "--addr", ...])`.
    ///
    /// # Errors
    ///
    /// As [`StrictClient::spawn`].
    pub fn start<I>(host: &Host, arguments: I) -> Result<Self, ClientError>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = host.command(program("strict-client"));
        command.args(arguments);
        Self::spawn(command)
    }

    /// Where it stands.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when it has ended or does not answer.
    pub fn snapshot(&mut self) -> Result<Snapshot, ClientError> {
        self.tell("snapshot")?;
        self.take_snapshot("snapshot", SNAPSHOT_TIMEOUT)
    }

    /// Waits until every connection had `requests` more right replies.
    ///
    /// # Errors
    ///
    /// [`ClientError::Silent`] when that does not happen in time.
    pub fn await_progress(
        &mut self,
        requests: u64,
        timeout: Duration,
    ) -> Result<Snapshot, ClientError> {
        self.tell(&format!("progress {requests}"))?;
        self.take_snapshot("progress", timeout)
    }

    /// Lets it finish what is outstanding, and takes its verdict.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when it has none to give.
    pub fn stop(mut self) -> Result<Verdict, ClientError> {
        // One that ended by itself has its verdict ready in the pipe.
        let _ = self.tell("stop");
        self.stdin = None;
        self.verdict()
    }

    /// Waits for the end that `--duration`, or the loss of all connections,
    /// brings.
    ///
    /// # Errors
    ///
    /// [`ClientError`] when it has no verdict to give by then.
    pub fn verdict(&mut self) -> Result<Verdict, ClientError> {
        let verdict = loop {
            if let Some(verdict) = self.ended.take() {
                break verdict;
            }
            match self.take_snapshot("verdict", STOP_TIMEOUT) {
                // The answer to a question that nobody waited for.
                Ok(_) | Err(ClientError::Ended { .. }) => {}
                Err(error) => return Err(error),
            }
        };
        // It has nothing left to do but to exit.
        let _ = self.child.wait();
        Ok(verdict)
    }

    fn tell(&mut self, command: &str) -> Result<(), ClientError> {
        let outcome = match &mut self.stdin {
            Some(stdin) => stdin.write_all(format!("{command}\n").as_bytes()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        outcome.map_err(|source| ClientError::Tell {
            command: command.into(),
            source,
        })
    }

    fn take_snapshot(
        &mut self,
        what: &'static str,
        timeout: Duration,
    ) -> Result<Snapshot, ClientError> {
        let line = self.await_line(what, timeout, false)?;
        if let Ok(verdict) = serde_json::from_str::<Verdict>(&line) {
            self.ended = Some(verdict.clone());
            return Err(ClientError::Ended {
                verdict: Box::new(verdict),
            });
        }
        serde_json::from_str(&line).map_err(|source| ClientError::Unreadable { what, line, source })
    }

    /// The next line of standard output, or `what` itself on standard error.
    fn await_line(
        &mut self,
        what: &'static str,
        timeout: Duration,
        on_stderr: bool,
    ) -> Result<String, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(Said::Out(line)) if !on_stderr => return Ok(line),
                Ok(Said::Err(line)) if on_stderr && line == what => return Ok(line),
                Ok(Said::Out(line) | Said::Err(line)) => {
                    if self.stderr.len() < STDERR_LINES_MAX {
                        self.stderr.push(line);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let said = self.stderr.join("\n");
                    return Err(ClientError::Silent {
                        what,
                        waited: timeout,
                        said,
                    });
                }
            }
        }
    }
}

impl Drop for StrictClient {
    fn drop(&mut self) {
        // The end of its pipe stops it too, but it would finish in peace.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
