//! Trees as they are found in the field: shells, terminals, pipes, programs
//! with threads of their own mind, and `migrate` run while something looks on.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migrate_test_hosts::{Host, INTERFACE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::hosts::eventually;

/// For whatever a process does as soon as it is scheduled, on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// A directory that all hosts and the machine see, as if it were on shared
/// storage; removed with all that is in it.
#[derive(Debug)]
pub struct Shared {
    path: PathBuf,
}

impl Shared {
    /// Makes one in `/tmp`, which the hosts share with the machine.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new(test: &str) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("migrate-field-{test}-{}-{number}", std::process::id());
        let path = Path::new("/tmp").join(name);
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The same as text.
    #[must_use]
    pub fn text_path(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Writes a file of it and returns its path as text.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> io::Result<String> {
        fs::write(self.path(name), text)?;
        Ok(self.text_path(name))
    }

    /// What a file of it holds; empty as long as it is not there.
    #[must_use]
    pub fn read(&self, name: &str) -> String {
        read(&self.path(name))
    }

    /// The PID that a shell wrote with `echo`, once it is there.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<i32> {
        let mut pid = None;
        eventually(SOON, || {
            pid = self
                .read(name)
                .strip_suffix('\n')
                .and_then(|digits| digits.parse().ok());
            pid.is_some()
        });
        pid
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What is left is in /tmp.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A file's text; empty as long as it is not there.
#[must_use]
pub fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A shell that writes 1, 2, 3, … to its standard output without end.
pub const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";

/// The whole lines of a log, as numbers.
///
/// # Panics
///
/// When one is none.
#[track_caller]
#[must_use]
pub fn numbers(text: &str) -> Vec<u64> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| match line.trim_end_matches('\r').parse() {
            Ok(number) => number,
            Err(_) => panic!("{line:?} is no number, in {text:?}"),
        })
        .collect()
}

/// The numbers of a log follow each other, each once.
///
/// # Panics
///
/// When one is missing, comes again or is no number.
#[track_caller]
pub fn contiguous(text: &str) -> Vec<u64> {
    let numbers = numbers(text);
    for pair in numbers.windows(2) {
        assert_eq!(pair[0] + 1, pair[1], "lost or doubled: {numbers:?}");
    }
    numbers
}

/// Waits until a growing log has `more` lines than it had.
#[must_use]
pub fn grows(path: &Path, more: usize) -> bool {
    let lines = || read(path).lines().count();
    let before = lines();
    eventually(SOON, || lines() >= before + more)
}

/// One line of `/proc/PID/stat` of a process in a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its PID there.
    pub pid: i32,
    /// `comm`.
    pub name: String,
    /// `R`, `S`, `Z` and so on.
    pub state: char,
    /// Its parent's PID.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// Its command line, words joined by spaces.
    pub command_line: String,
}

/// Every process of a host, zombies included, by PID.
///
/// # Errors
///
/// When the host's `/proc` cannot be listed.
pub fn processes(host: &Host) -> io::Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(host.path("/proc"))? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        all.extend(process(host, pid));
    }
    all.sort_by_key(|process| process.pid);
    Ok(all)
}

/// One process of a host; `None` when there is none, not even a zombie.
#[must_use]
pub fn process(host: &Host, pid: i32) -> Option<Process> {
    let stat = read(&host.path(format!("/proc/{pid}/stat")));
    let (head, tail) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once(" (")?;
    let mut words = tail.split_whitespace();
    let state = words.next()?.chars().next()?;
    let mut number = || words.next()?.parse::<i32>().ok();
    let (parent, group, session) = (number()?, number()?, number()?);
    let command_line = read(&host.path(format!("/proc/{pid}/cmdline")));
    Some(Process {
        pid,
        name: name.to_owned(),
        state,
        parent,
        group,
        session,
        command_line: command_line.replace('\0', " ").trim_end().to_owned(),
    })
}

/// Sends a signal to a process in a host.
///
/// # Panics
///
/// When `kill` fails there.
#[track_caller]
pub fn signal(host: &Host, signal: &str, pid: i32) {
    let output = match host.exec(["kill", &format!("-{signal}"), &pid.to_string()]) {
        Ok(output) => output,
        Err(error) => panic!("kill in {}: {error}", host.name()),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "kill -{signal} {pid} in {}: {said}",
        host.name()
    );
}

/// The output of a program that must succeed in a host.
///
/// # Panics
///
/// When it fails.
#[track_caller]
pub fn output<I>(host: &Host, argv: I) -> String
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let argv: Vec<OsString> = argv
        .into_iter()
        .map(|word| word.as_ref().to_owned())
        .collect();
    match host.exec(&argv) {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        other => panic!("{argv:?} in {}: {other:?}", host.name()),
    }
}

/// A process's cgroup in the v2 hierarchy, as its own host names it.
#[must_use]
pub fn cgroup(host: &Host, pid: i32) -> Option<String> {
    let output = host.exec(["cat", &format!("/proc/{pid}/cgroup")]).ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(str::to_owned)
}

/// cgroups that `migrate` has made in a host: fences and homes.
///
/// # Panics
///
/// When they cannot be listed.
#[track_caller]
#[must_use]
pub fn cgroups_made(host: &Host) -> Vec<String> {
    let found = output(
        host,
        ["find", "/sys/fs/cgroup", "-type", "d", "-name", "migrate*"],
    );
    found.lines().map(str::to_owned).collect()
}

/// Waits for a line that satisfies `wanted`, at most `limit`.
fn await_line(
    lines: &Receiver<String>,
    seen: &mut Vec<String>,
    limit: Duration,
    wanted: impl Fn(&str) -> bool,
) -> Option<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => {
                seen.push(line.clone());
                if wanted(&line) {
                    return Some(line);
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn lines_of(stream: impl io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        lines
            .map(|line| sender.send(line))
            .take_while(Result::is_ok)
            .for_each(drop);
    });
    lines
}

/// A `migrate --json` under way.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
    /// Every line so far.
    pub events: Vec<String>,
}

impl Running {
    /// Starts `migrate --json ARGUMENTS` in a host, with more variables in its
    /// environment.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start<I>(host: &Host, variables: &[(&str, &str)], arguments: I) -> io::Result<Self>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command: Command = host.command("migrate");
        command
            .arg("--json")
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let stderr = child.stderr.take().map(collect);
        Ok(Self {
            child,
            lines: lines_of(stdout),
            stderr,
            events: Vec::new(),
        })
    }

    /// Sends it a signal, and not to what stands for it outside of the host.
    ///
    /// # Panics
    ///
    /// When it is not there.
    #[track_caller]
    pub fn signal(&self, host: &Host, name: &str) {
        let all = match processes(host) {
            Ok(all) => all,
            Err(error) => panic!("{}: {error}", host.name()),
        };
        let it = all
            .iter()
            .filter(|process| process.command_line.starts_with("migrate --json"));
        for process in it.clone() {
            signal(host, name, process.pid);
        }
        assert_eq!(it.count(), 1, "{all:#?}");
    }

    /// Kills it.
    ///
    /// # Errors
    ///
    /// When its end cannot be awaited.
    ///
    /// # Panics
    ///
    /// When it is not there.
    #[track_caller]
    pub fn kill(mut self, host: &Host) -> io::Result<()> {
        self.signal(host, "KILL");
        self.child.wait()?;
        Ok(())
    }

    /// Its exit code, all it said as events, and its log.
    ///
    /// # Errors
    ///
    /// When it does not end, and had to be killed.
    pub fn end(mut self) -> io::Result<(Option<i32>, Vec<String>, String)> {
        const LIMIT: Duration = Duration::from_secs(120);
        let mut status = None;
        let ended = eventually(LIMIT, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        if !ended {
            self.child.kill()?;
        }
        let code = self.child.wait()?.code();
        while let Ok(line) = self.lines.recv_timeout(SOON) {
            self.events.push(line);
        }
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok());
        let stderr = stderr.unwrap_or_default();
        if ended {
            Ok((code, self.events, stderr))
        } else {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{:?} {stderr}", self.events),
            ))
        }
    }
}

fn collect(mut stream: ChildStderr) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came so far is what there is to show.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A tcpdump on a host's interface.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Capture {
    /// Starts to capture what matches `filter`, and waits until it does.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(host: &Host, filter: &str) -> io::Result<Self> {
        let mut command = host.command("tcpdump");
        command
            .args([
                "-n",
                "-e",
                "-l",
                "--immediate-mode",
                "-i",
                INTERFACE,
                filter,
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut said = Vec::new();
        let ready = await_line(&lines_of(stderr), &mut said, SOON, |line| {
            line.contains("listening on")
        });
        if ready.is_none() {
            // The reason is what it said.
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other(format!("tcpdump: {said:?}")));
        }
        Ok(Self {
            child,
            lines: lines_of(stdout),
            said: Vec::new(),
        })
    }

    /// All lines up to one that holds `marker`: a packet that the test itself
    /// caused, which proves that the capture works and has come so far. `None`
    /// when it never came.
    pub fn up_to(&mut self, marker: &str) -> Option<Vec<String>> {
        let before = self.said.len();
        await_line(&self.lines, &mut self.said, SOON, |line| {
            line.contains(marker)
        })?;
        Some(self.said[before..self.said.len() - 1].to_vec())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // The helper hands SIGTERM down; SIGKILL it cannot.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

/// A CRIU that waits, before it takes an order, until a file exists: what was
/// done before lasts for as long as a test wants to look at it.
///
/// # Errors
///
/// When it cannot be written.
pub fn waiting_criu(shared: &Shared, gate: &str) -> io::Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    /// Where `scripts/setup` puts its own.
    const OWN: &str = "/opt/migrate/criu/bin/criu";
    let real = std::env::var("MIGRATE_CRIU").unwrap_or_else(|_| {
        if Path::new(OWN).exists() {
            OWN.to_owned()
        } else {
            "criu".to_owned()
        }
    });
    let gate = shared.text_path(gate);
    let script = format!(
        "#!/bin/sh\n\
         case \"$*\" in *swrk*) echo waits >{gate}.waits; while [ ! -e {gate} ]; do sleep 0.01; done;; esac\n\
         exec {real} \"$@\"\n"
    );
    let path = shared.file(
        &format!(
            "{}-criu",
            Path::new(&gate)
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
        ),
        &script,
    )?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
