//! The system's `ssh`, which starts the agent and carries two lines.

use std::{
    env, io,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    bootstrap::{LINE_BYTES_MAX, MARKER},
    connection::remaining,
    error::{ChannelError, printable},
};

/// Names the command on the destination when it is not `migrate`, for example
/// `/opt/migrate/bin/migrate` or `sudo -n migrate`. The remote shell splits it.
pub const REMOTE_COMMAND_VARIABLE: &str = "MIGRATE_REMOTE_COMMAND";

/// What a login may print before the agent answers.
const CHATTER_BYTES_MAX: usize = 64 << 10;

/// The end of standard error that is kept for messages.
const COMPLAINTS_BYTES_MAX: usize = 8 << 10;

/// Characters of another program's output that go into a message.
const QUOTE_CHARS_MAX: usize = 400;

/// The longest that ssh may take for its TCP connection, in seconds.
const CONNECT_SECONDS_MAX: u64 = 15;

/// How long the rest of standard error may take when ssh has ended: a
/// multiplexing master in the background may hold it open.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);

/// Where `ssh` is to go.
#[derive(Debug, Clone)]
pub(crate) struct SshTarget<'a> {
    pub(crate) user: Option<&'a str>,
    pub(crate) host: &'a str,
    pub(crate) options: &'a [String],
}

impl SshTarget<'_> {
    pub(crate) fn name(&self) -> String {
        match self.user {
            Some(user) => format!("{user}@{}", self.host),
            None => self.host.to_owned(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ssh");
        // ssh takes the first value of an option, so the caller's go first.
        for option in self.options {
            command.arg("-o").arg(option);
        }
        // Ctrl-C belongs to the migration, which decides what it undoes.
        command.kill_on_drop(true).process_group(0);
        command
    }

    /// The name or address that ssh connects to, by its own configuration.
    pub(crate) async fn configured_host(&self, ends_at: Instant) -> Option<String> {
        let output = self
            .command()
            .args(["-G", "--", &self.name()])
            .stdin(Stdio::null())
            .output();
        let output = timeout(remaining(ends_at), output).await.ok()?.ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.lines()
            .find_map(|line| line.strip_prefix("hostname "))
            .map(str::to_owned)
    }

    /// Starts the agent, sends `offer` and waits for its line.
    pub(crate) async fn start_agent(
        &self,
        offer: &[u8],
        ends_at: Instant,
    ) -> Result<(SshSession, Vec<u8>), ChannelError> {
        let migrate = env::var(REMOTE_COMMAND_VARIABLE).unwrap_or_else(|_| "migrate".to_owned());
        let seconds = remaining(ends_at).as_secs().clamp(1, CONNECT_SECONDS_MAX);
        let mut child = self
            .command()
            .args(["-T", "-a", "-x", "-e", "none"])
            .args(["-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes"])
            .args(["-o", "LogLevel=ERROR"])
            .args(["-o", &format!("ConnectTimeout={seconds}")])
            .args(["--", &self.name(), &format!("{migrate} agent --stdio")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| ChannelError::StartSsh { source })?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(mut stdout), Some(stderr)) = pipes else {
            return Err(ChannelError::StartSsh {
                source: io::Error::other("a pipe is missing"),
            });
        };
        let mut session = SshSession {
            child,
            stdin,
            complaints: Complaints::collect(stderr, self.name()),
        };
        // A pipe takes a line of this length at once. When ssh has ended
        // already, its exit status says more than the broken pipe.
        if let Err(error) = session.stdin.write_all(offer).await {
            tracing::debug!(%error, "ssh did not take the offer");
        }
        let mut heard = Vec::new();
        let read = timeout(remaining(ends_at), self.answer(&mut stdout, &mut heard));
        match read.await {
            Ok(Ok(Some(line))) => {
                drain(stdout);
                Ok((session, line))
            }
            Ok(Ok(None)) => Err(self.post_mortem(session, &migrate, &heard, ends_at).await),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.too_late(&session, &heard)),
        }
    }

    /// Reads until the agent's line is complete; `None` at the end of output.
    async fn answer(
        &self,
        stdout: &mut ChildStdout,
        heard: &mut Vec<u8>,
    ) -> Result<Option<Vec<u8>>, ChannelError> {
        loop {
            if let Some((before, line)) = find_answer(heard) {
                if before > 0 {
                    tracing::warn!(
                        host = %self.name(),
                        bytes = before,
                        text = %quote(&heard[..before]),
                        "the login printed something before the agent's answer"
                    );
                }
                return Ok(Some(line));
            }
            if heard.len() > CHATTER_BYTES_MAX + LINE_BYTES_MAX {
                return Err(ChannelError::TooMuchOutput {
                    host: self.name(),
                    limit: CHATTER_BYTES_MAX,
                    detail: printable(&String::from_utf8_lossy(heard), 80),
                });
            }
            let mut piece = [0; 4096];
            match stdout.read(&mut piece).await {
                Ok(0) => return Ok(None),
                Ok(got) => heard.extend_from_slice(&piece[..got]),
                Err(source) => {
                    return Err(ChannelError::Local {
                        attempt: "read from ssh",
                        source,
                    });
                }
            }
        }
    }

    async fn post_mortem(
        &self,
        mut session: SshSession,
        migrate: &str,
        heard: &[u8],
        ends_at: Instant,
    ) -> ChannelError {
        let status = match timeout(remaining(ends_at), session.child.wait()).await {
            Ok(Ok(status)) => status,
            Ok(Err(source)) => {
                return ChannelError::Local {
                    attempt: "wait for ssh",
                    source,
                };
            }
            Err(_) => return self.too_late(&session, heard),
        };
        let said = session.complaints.last_words().await;
        self.sort(status, migrate, &said, heard)
    }

    /// Sorts ssh's end by what it says: its exit status is 255 for everything
    /// of its own, and the remote command's otherwise.
    fn sort(&self, status: ExitStatus, migrate: &str, said: &[u8], heard: &[u8]) -> ChannelError {
        let text = String::from_utf8_lossy(said);
        let has = |phrase: &str| text.contains(phrase);
        let host = self.name();
        let detail = quote(said);
        match status.code() {
            Some(255) => {
                if has("Could not resolve hostname") {
                    ChannelError::NameNotResolved { host, detail }
                } else if has("HOST IDENTIFICATION HAS CHANGED") {
                    ChannelError::HostKeyChanged {
                        host,
                        detail: String::new(),
                    }
                } else if has("Host key verification failed") || has("host key is known") {
                    ChannelError::HostKeyUnknown { host, detail }
                } else if has("Permission denied") || has("Too many authentication failures") {
                    ChannelError::PermissionDenied { host, detail }
                } else if has("Connection refused") {
                    ChannelError::SshRefused { host, detail }
                } else if has("timed out") || has("unreachable") || has("No route to host") {
                    ChannelError::HostUnreachable { host, detail }
                } else {
                    ChannelError::SshEnded {
                        host,
                        status,
                        detail,
                    }
                }
            }
            Some(127) => ChannelError::NotInstalled {
                host,
                command: migrate.to_owned(),
                detail,
            },
            Some(_) => ChannelError::AgentEnded {
                host,
                status,
                detail: if said.is_empty() {
                    quote(heard)
                } else {
                    detail
                },
            },
            None => ChannelError::SshEnded {
                host,
                status,
                detail,
            },
        }
    }

    fn too_late(&self, session: &SshSession, heard: &[u8]) -> ChannelError {
        let mut awaited = format!("the agent's answer through ssh {}", self.name());
        let said = session.complaints.so_far();
        for (what, bytes) in [("ssh said", said.as_slice()), ("it printed", heard)] {
            if !bytes.is_empty() {
                awaited.push_str(&format!(" ({what}: {})", quote(bytes)));
            }
        }
        ChannelError::Deadline {
            awaited,
            waited: session.complaints.started_at.elapsed(),
        }
    }
}

/// A running `ssh`. Dropping it ends the session, not the agent.
#[derive(Debug)]
pub struct SshSession {
    child: Child,
    /// Open as long as the session: its end tells an agent that still waits
    /// for the connection that nobody will come.
    stdin: ChildStdin,
    complaints: Complaints,
}

impl SshSession {
    /// The last that `ssh` or the agent wrote to standard error, on one line.
    #[must_use]
    pub fn stderr(&self) -> String {
        quote(&self.complaints.so_far())
    }
}

/// Standard error of ssh, of which the end is kept.
#[derive(Debug)]
struct Complaints {
    kept: Arc<Mutex<Vec<u8>>>,
    collector: Option<JoinHandle<()>>,
    started_at: Instant,
}

impl Complaints {
    fn collect(stderr: ChildStderr, host: String) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&kept);
        let collector = tokio::spawn(async move {
            let mut stderr = BufReader::new(stderr);
            loop {
                let mut line = Vec::new();
                let mut bounded = (&mut stderr).take(COMPLAINTS_BYTES_MAX as u64);
                match bounded.read_until(b'\n', &mut line).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => tracing::debug!(%host, line = %quote(&line), "ssh"),
                }
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&line);
                let surplus = kept.len().saturating_sub(COMPLAINTS_BYTES_MAX);
                kept.drain(..surplus);
            }
        });
        Self {
            kept,
            collector: Some(collector),
            started_at: Instant::now(),
        }
    }

    fn so_far(&self) -> Vec<u8> {
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Everything, after ssh has ended.
    async fn last_words(&mut self) -> Vec<u8> {
        if let Some(collector) = self.collector.take() {
            // Whether it ended or ran out of time, what there is counts.
            let _ = timeout(LAST_WORDS_LIMIT, collector).await;
        }
        self.so_far()
    }
}

/// Keeps whatever else comes from filling the pipe; ends with ssh.
fn drain(mut stdout: ChildStdout) {
    tokio::spawn(async move {
        // A closed pipe is the regular end of this.
        let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
    });
}

/// The agent's line and the number of bytes before it, once it is complete.
fn find_answer(heard: &[u8]) -> Option<(usize, Vec<u8>)> {
    let before = heard.windows(MARKER.len()).position(|w| w == MARKER)?;
    let rest = &heard[before..];
    let length = rest.iter().position(|b| *b == b'\n')?;
    Some((before, rest[..length].to_vec()))
}

fn quote(bytes: &[u8]) -> String {
    printable(&String::from_utf8_lossy(bytes), QUOTE_CHARS_MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn sorted(code: i32, said: &str) -> ChannelError {
        let target = SshTarget {
            user: Some("root"),
            host: "host2",
            options: &[],
        };
        let status = ExitStatus::from_raw(code << 8);
        target.sort(status, "migrate", said.as_bytes(), b"")
    }

    #[test]
    fn the_ways_of_ssh_to_fail_are_told_apart() {
        use ChannelError as E;
        let unresolved = "ssh: Could not resolve hostname host2: Name or service not known\r\n";
        assert!(matches!(sorted(255, unresolved), E::NameNotResolved { .. }));
        let refused = "ssh: connect to host host2 port 22: Connection refused\r\n";
        assert!(matches!(sorted(255, refused), E::SshRefused { .. }));
        let away = "ssh: connect to host host2 port 22: No route to host\r\n";
        assert!(matches!(sorted(255, away), E::HostUnreachable { .. }));
        let away = "ssh: connect to host host2 port 22: Connection timed out\r\n";
        assert!(matches!(sorted(255, away), E::HostUnreachable { .. }));
        let changed =
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\nHost key verification failed.";
        assert!(matches!(sorted(255, changed), E::HostKeyChanged { .. }));
        let unknown = "Host key verification failed.\r\n";
        assert!(matches!(sorted(255, unknown), E::HostKeyUnknown { .. }));
        let denied = "root@host2: Permission denied (publickey).\r\n";
        assert!(matches!(sorted(255, denied), E::PermissionDenied { .. }));
        assert!(matches!(sorted(255, "???"), E::SshEnded { .. }));
        let missing = "bash: line 1: migrate: command not found\n";
        assert!(matches!(sorted(127, missing), E::NotInstalled { .. }));
        let error = sorted(2, "error: unexpected argument '--stdio'");
        assert!(matches!(error, E::AgentEnded { .. }));
        assert!(error.to_string().contains("unexpected argument"));
        for code in [2, 127, 255] {
            assert!(sorted(code, refused).help().is_some());
        }
    }

    #[test]
    fn the_answer_is_found_behind_what_a_login_prints() {
        assert_eq!(find_answer(b"motd\n"), None);
        assert_eq!(find_answer(b"motd\n{\"migrate_agent\":1"), None);
        let heard = b"Welcome!\nno newline{\"migrate_agent\":1}\nrest";
        assert_eq!(
            find_answer(heard),
            Some((19, b"{\"migrate_agent\":1}".to_vec()))
        );
    }
}
