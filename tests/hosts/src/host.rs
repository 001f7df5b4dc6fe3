//! One host of a lab, from outside.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sched::{CloneFlags, setns};

use crate::cgroup;
use crate::error::{Attempt, Error, Result};
use crate::helper::{ENTER, SPAWN};
use crate::layout::{HostName, Member};

/// A host of a lab that is up.
#[derive(Clone, Debug)]
pub struct Host {
    pub(crate) lab: String,
    pub(crate) name: HostName,
    pub(crate) init: i32,
}

impl Host {
    /// The host's name.
    #[must_use]
    pub fn name(&self) -> HostName {
        self.name
    }

    /// The host's own IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.name.ipv4()
    }

    /// The host's own IPv6 address.
    #[must_use]
    pub fn ipv6(&self) -> Ipv6Addr {
        self.name.ipv6()
    }

    /// The PID of the host's init, as the machine sees it. Inside it is 1.
    #[must_use]
    pub fn init_pid(&self) -> i32 {
        self.init
    }

    /// A file of the host, as a path of the machine: for reading a log in `/run`, for example.
    /// (A symbolic link to an absolute path in it leads to the machine's file.)
    #[must_use]
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new(&format!("/proc/{}/root", self.init))
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The root of the host's cgroup2 tree, as a path of the machine. `None` where there is none.
    #[must_use]
    pub fn cgroups(&self) -> Option<PathBuf> {
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.init)).ok()?;
        Some(self.path(cgroup::mount_point_of("cgroup2", &mounts)?))
    }

    /// Where sshd writes its log, inside the host.
    #[must_use]
    pub fn sshd_log(&self) -> String {
        format!("/run/sshd.{}.{}.log", self.lab, self.name)
    }

    /// A command that runs `program` inside the host: in its PID, mount, network, UTS, IPC and
    /// cgroup namespaces.
    ///
    /// It is used like any other [`Command`]: arguments, environment, working directory and
    /// standard streams are the program's. The process that it starts stands for the program: it
    /// ends with its exit status or by its signal, hands down `SIGTERM`, `SIGINT`, `SIGHUP`,
    /// `SIGQUIT`, `SIGUSR1` and `SIGUSR2`, and takes it along when it is killed. Unless standard
    /// input is a terminal, the program leads a session of its own.
    ///
    /// A program that cannot be started ends with 127 (not found) or 126, as in a shell.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.helper(ENTER);
        command.arg(program);
        command
    }

    /// Runs a program inside the host to its end, with nothing as its standard input.
    ///
    /// # Errors
    ///
    /// If it cannot be started from here. How it ended is in the output.
    pub fn exec<I>(&self, argv: I) -> Result<Output>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = self.helper(ENTER);
        command.args(argv).stdin(Stdio::null());
        command
            .output()
            .attempt(|| format!("run a program in {}", self.name))
    }

    /// Starts a program inside the host as a daemon: it leads a session, has `/` as its directory,
    /// `/dev/null` as its input and `log` (inside the host) as its output, and the host's init as
    /// its parent. Returns its PID inside the host.
    ///
    /// # Errors
    ///
    /// If it or its log cannot be found, or the host is gone.
    pub fn spawn_detached<I>(&self, argv: I, log: &str) -> Result<i32>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = self.helper(SPAWN);
        command
            .arg(log)
            .args(argv)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let output = command
            .output()
            .attempt(|| format!("start a daemon in {}", self.name))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let pid = text
            .lines()
            .find_map(|line| line.strip_prefix("pid ")?.parse().ok());
        pid.ok_or_else(|| Error::System {
            attempt: format!("start a daemon in {}", self.name),
            source: io::Error::other(
                text.trim()
                    .strip_prefix("error: ")
                    .unwrap_or("it reported no PID")
                    .to_owned(),
            ),
        })
    }

    /// Runs a function with the host's network, on a thread of its own: sockets made there belong
    /// to the host for good. Nothing else of the host is visible to it.
    ///
    /// # Errors
    ///
    /// If the host is gone.
    pub fn in_network<T: Send>(&self, function: impl FnOnce() -> T + Send) -> Result<T> {
        let path = format!("/proc/{}/ns/net", self.init);
        let namespace = File::open(&path).attempt(|| format!("open {path}"))?;
        let outcome = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)
                    .attempt(|| format!("join the network of {}", self.name))?;
                Ok(function())
            });
            thread.join()
        });
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Whether the host's sshd is there.
    pub(crate) fn has_live_sshd(&self) -> bool {
        let pid = fs::read_to_string(self.path(crate::files::SSHD_PID_FILE)).unwrap_or_default();
        let name = self.path(format!("/proc/{}/comm", pid.trim()));
        fs::read_to_string(name).is_ok_and(|name| name.trim() == "sshd")
    }

    fn helper(&self, role: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(role)
            .args([&self.lab, self.name.as_str(), &self.init.to_string()]);
        let cgroup = cgroup::path(&self.lab, Member::Host(self.name));
        if let Some(procs) = cgroup
            .filter(|path| path.exists())
            .and_then(|path| cgroup::procs_file(&path))
        {
            // SAFETY: `join` is async-signal-safe and borrows only what it was given.
            unsafe {
                command.pre_exec(move || cgroup::join(&procs));
            }
        }
        command
    }
}
