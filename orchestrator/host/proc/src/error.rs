//! What can go wrong, by attempt and object.

use std::io;
use std::path::PathBuf;

/// A failed look at, or act on, the processes of this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcError {
    /// Not root.
    #[error("migrating a process needs root")]
    NotRoot,
    /// No process has this PID.
    #[error("no process has PID {pid}")]
    NoSuchProcess {
        /// The PID asked for.
        pid: i32,
    },
    /// The PID is zero or negative.
    #[error("{pid} is not a PID")]
    NotAPid {
        /// The number given.
        pid: i32,
    },
    /// PID 1 was asked for.
    #[error("PID 1 is this host's init and cannot be moved")]
    Init,
    /// The target is this very process.
    #[error("PID {pid} is this command itself")]
    Own {
        /// The PID asked for.
        pid: i32,
    },
    /// The target started, directly or not, this very process.
    #[error("PID {pid} ({name}) is an ancestor of this command, which would freeze with it")]
    Ancestor {
        /// The PID asked for.
        pid: i32,
        /// Its `comm`.
        name: String,
    },
    /// The target is a kernel thread.
    #[error("PID {pid} ({name}) is a kernel thread")]
    KernelThread {
        /// The PID asked for.
        pid: i32,
        /// Its `comm`.
        name: String,
    },
    /// The target has ended and only waits for its parent.
    #[error("PID {pid} ({name}) has already ended and waits to be reaped by PID {parent}")]
    Zombie {
        /// The PID asked for.
        pid: i32,
        /// Its `comm`.
        name: String,
        /// Its parent.
        parent: i32,
    },
    /// The target is a thread, not a process.
    #[error("{thread} is a thread of process {leader}, not a process")]
    ThreadId {
        /// The id asked for.
        thread: i32,
        /// The process it belongs to.
        leader: i32,
    },
    /// The tree could not be read whole.
    #[error("a process of the tree of PID {pid} ended during each of {attempts} reads")]
    Unstable {
        /// The root.
        pid: i32,
        /// How often it was read.
        attempts: u32,
    },
    /// A file of /proc, /sys or a workload's file could not be read.
    #[error("could not read {path}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of /proc or /sys did not look as the kernel documents it.
    #[error("could not make sense of {path}: {line:?}")]
    Malformed {
        /// What was read.
        path: PathBuf,
        /// The offending text, shortened.
        line: String,
    },
    /// A cgroup or drop-in could not be made, written or removed.
    #[error("could not {attempt} {path}")]
    Write {
        /// The attempt: `create`, `write`, `remove`, `lock`.
        attempt: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A signal could not be sent.
    #[error("could not send {signal} to PID {pid}")]
    Signal {
        /// The signal's name.
        signal: &'static str,
        /// The receiver.
        pid: i32,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The tree did not come to rest within the bound.
    #[error("the process tree did not come to rest within {waited_ms} ms")]
    NotFrozen {
        /// How long was waited.
        waited_ms: u64,
    },
    /// A fence was to be taken away from a tree that it still holds.
    #[error("the fence still holds the process tree of PID {root}")]
    FenceHolds {
        /// The root of the tree.
        root: i32,
    },
    /// A process of the tree has left the fence.
    #[error("PID {pid} is not behind the fence any more")]
    OutsideFence {
        /// The process.
        pid: i32,
    },
    /// A connection could not be taken into or out of repair mode.
    #[error("could not change the repair mode of a connection")]
    Repair {
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Processes outlived a SIGKILL for longer than the bound.
    #[error("PIDs {pids:?} are still there {waited_ms} ms after SIGKILL")]
    Unkillable {
        /// Those that are left.
        pids: Vec<i32>,
        /// How long was waited.
        waited_ms: u64,
    },
    /// A helper program failed.
    #[error("`{command}` failed: {reason}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status and what it wrote to standard error.
        reason: String,
    },
    /// Leaving the login session failed.
    #[error("could not {attempt}")]
    Detach {
        /// The step that failed.
        attempt: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ProcError {
    /// What the user can do about it, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NotRoot => "run it with sudo".into(),
            Self::NoSuchProcess { .. } | Self::NotAPid { .. } => {
                "find the PID with `pgrep -a NAME` or `ss -tlnp`".into()
            }
            Self::Init => {
                "name the process that serves the connections; `ss -tlnp` lists them".into()
            }
            Self::Own { .. } | Self::Ancestor { .. } => {
                "name the workload itself, or run the command from another login session".into()
            }
            Self::KernelThread { .. } => {
                "name the process that serves the connections; `ss -tlnp` lists them".into()
            }
            Self::Zombie { parent, .. } => {
                format!("there is nothing left to move; PID {parent} has yet to collect it")
            }
            Self::ThreadId { leader, .. } => format!("use PID {leader}"),
            Self::Unstable { .. } => {
                "it starts and ends processes or threads all the time; try again when it is quieter"
                    .into()
            }
            Self::NotFrozen { .. } => {
                "a process hangs inside the kernel, often on storage; see the state column of \
                 `ps -eo pid,stat,wchan:20,comm`"
                    .into()
            }
            Self::FenceHolds { .. } => "open the fence or end the tree first".into(),
            Self::OutsideFence { .. } => {
                "something moves processes between cgroups; stop it for the time of the migration"
                    .into()
            }
            Self::Unkillable { .. } => {
                "they hang inside the kernel, often on storage; they end when that answers".into()
            }
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                let missing = crate::host::missing_capabilities();
                if missing.is_empty() {
                    return None;
                }
                format!(
                    "this root lacks {}: run as root outside a container, or give the container \
                     these capabilities",
                    missing.join(", ")
                )
            }
            Self::Read { .. }
            | Self::Malformed { .. }
            | Self::Write { .. }
            | Self::Signal { .. }
            | Self::Command { .. }
            | Self::Repair { .. }
            | Self::Detach { .. } => return None,
        })
    }
}
