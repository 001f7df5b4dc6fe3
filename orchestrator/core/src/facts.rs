//! What each side knows before a migration and tells the other.
//!
//! Gathered by the adapters, compared by [`crate::preflight`].

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::flow::{Flow, Listener};
use crate::kernel::Rseq;
use crate::policy::Credentials;
use crate::unit::UnitFacts;

/// A CRIU release, for example 4.2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CriuVersion {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Sublevel; zero where the release has none.
    pub sublevel: u32,
}

impl CriuVersion {
    /// The oldest release that can dump TCP sockets on kernels >= 6.16, where
    /// `SO_PASSCRED` on INET sockets became `EOPNOTSUPP` (CRIU 4b7398595).
    pub const OLDEST_SUPPORTED: Self = Self {
        major: 4,
        minor: 2,
        sublevel: 0,
    };

    /// The newest release that this was tested with; sublevels have changed nothing
    /// that matters here.
    pub const NEWEST_TESTED: Self = Self {
        major: 4,
        minor: 2,
        sublevel: 0,
    };

    /// Whether nobody has tried such a release.
    #[must_use]
    pub fn is_untested(self) -> bool {
        let release = |version: Self| (version.major, version.minor);
        release(self) > release(Self::NEWEST_TESTED)
    }
}

impl std::fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            major,
            minor,
            sublevel,
        } = self;
        write!(f, "{major}.{minor}")?;
        if *sublevel > 0 {
            write!(f, ".{sublevel}")
        } else {
            Ok(())
        }
    }
}

/// One host's side of the comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// `uname -n`.
    pub hostname: String,
    /// `uname -r`.
    pub kernel: String,
    /// `uname -m`.
    pub machine: String,
    /// CPU feature flags as `/proc/cpuinfo` names them, sorted.
    pub cpu_flags: Vec<String>,
    /// CRIU, when one was found and answers.
    pub criu: Option<CriuVersion>,
    /// Memory that could be used without swapping, in bytes (`MemAvailable`).
    pub memory_available_bytes: u64,
    /// Free space where images are kept, in bytes.
    pub image_space_bytes: u64,
    /// Files and devices that the kernel may write images and pages to; none
    /// where it does not swap, or can keep them out of it.
    #[serde(default)]
    pub swaps_to: Vec<String>,
    /// Capabilities that a migration makes use of and that are not effective,
    /// by name.
    pub missing_capabilities: Vec<String>,
    /// What the kernel takes of rseq(2); none where that is not known.
    #[serde(default)]
    pub rseq: Option<Rseq>,
    /// The functions of the vDSO that it gives programs, sorted; empty where it
    /// gives none, and none where that is not known.
    #[serde(default)]
    pub vdso: Option<Vec<String>>,
}

/// The process tree to be moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeFacts {
    /// The root's PID.
    pub root_pid: i32,
    /// Every process, parents before children.
    pub processes: Vec<ProcessFacts>,
    /// Files that must exist alike on the destination.
    pub files: Vec<FileFacts>,
    /// Established TCP connections whose peer is outside the tree.
    pub flows: Vec<Flow>,
    /// TCP listeners.
    pub listeners: Vec<Listener>,
    /// What the peers may send to these connections.
    pub windows: WindowFacts,
    /// Addresses that have to move with the tree.
    pub addresses: Vec<AddressFacts>,
    /// What stands on file descriptors 0, 1 and 2 and leads out of the tree.
    pub stdio: Vec<StdioFacts>,
    /// The tunnel device that it serves.
    #[serde(default)]
    pub tunnel: Option<TunnelFacts>,
    /// Memory that is to be carried, in bytes: pages that processes have in common
    /// since a fork count for each of them, those of shared segments once.
    pub resident_bytes: u64,
    /// How much of that would not be needed if pages stayed in common since a fork, in bytes.
    pub common_bytes: u64,
    /// The tree has a controlling terminal or a session leader outside itself,
    /// so that CRIU needs `shell_job`.
    pub shell_job: bool,
    /// cgroup path of the root in the unified or freezer hierarchy.
    pub cgroup: String,
    /// Where it stood among the source's units.
    #[serde(default)]
    pub unit: UnitFacts,
}

/// A tunnel device of the host, persistent, that a process of the tree is
/// attached to. Its addresses and routes are the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelFacts {
    /// The interface.
    pub name: String,
    /// What it is, as `tun_flags` in /sys has it.
    pub flags: u32,
    /// The flags of the open file, as `open(2)` takes them.
    pub open_flags: i32,
}

/// The receive windows of the tree's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowFacts {
    /// The most that they advertise, all together, in bytes.
    pub sum_bytes: u64,
    /// The largest of them.
    pub largest_bytes: u64,
}

impl WindowFacts {
    /// Memory that held packets take at most, on each host. With thousands of
    /// connections all of whose peers fill their windows, TCP sends again what
    /// finds no room.
    pub const HELD_BYTES_CAP: u64 = 256 << 20;

    /// Room for connections that come meanwhile, and for small packets, of
    /// which each takes more than its bytes.
    pub const HELD_BYTES_MIN: u64 = 16 << 20;

    /// Room for one connection in any case.
    pub const HELD_FLOW_BYTES_MIN: u64 = 4 << 20;

    /// Bytes to hold for all connections, and for one: a peer fills the
    /// window, and sends it again when its timer runs out.
    #[must_use]
    pub fn held_bytes_max(self) -> (u64, u64) {
        let twice = |bytes: u64, least| bytes.saturating_mul(2).clamp(least, Self::HELD_BYTES_CAP);
        (
            twice(self.sum_bytes, Self::HELD_BYTES_MIN),
            twice(self.largest_bytes, Self::HELD_FLOW_BYTES_MIN),
        )
    }
}

/// One process of the tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub parent: i32,
    /// `starttime` of `/proc/PID/stat`, in clock ticks since boot: tells a
    /// reused PID from the one that was checked.
    pub start_ticks: u64,
    /// Thread ids, the leader included.
    pub threads: Vec<i32>,
    /// `comm`.
    pub name: String,
    /// Session id.
    pub session: i32,
    /// Process group id.
    pub group: i32,
    /// Whom it runs as.
    pub credentials: Credentials,
}

/// A mapped or open regular file, or a directory the tree stands in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Absolute path.
    pub path: String,
    /// What the tree uses it for; the strictest use when there are several.
    pub role: FileRole,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Permission bits and file type, as `st_mode`.
    pub mode: u32,
    /// GNU build-id of an ELF file.
    pub build_id: Option<Vec<u8>>,
    /// Inode number: on storage that both hosts share it is the same.
    pub inode: u64,
    /// Some descriptor can write to it, so that it may grow between two looks.
    pub written: bool,
}

/// What the tree uses a file for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FileRole {
    /// The program that runs.
    Executable,
    /// Mapped into memory.
    Mapped,
    /// Open on a file descriptor.
    Open,
    /// Open for appending only, or a named pipe: its size may differ.
    Appended,
    /// A working or root directory.
    Directory,
}

/// A TCP socket of the tree, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SocketFacts {
    /// The tree's end.
    pub local: SocketAddr,
    /// The peer's end; none for a socket without one.
    pub peer: Option<SocketAddr>,
    /// The state's name in the words of `ss`.
    pub state: String,
    /// Bytes received and not read; for a listener the connections that wait
    /// to be accepted.
    pub receive_queue: u32,
    /// Bytes written and not acknowledged; for a listener the connections that
    /// may wait.
    pub send_queue: u32,
}

/// An IP address that belongs to the workload, and where it sits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressFacts {
    /// The address.
    pub ip: IpAddr,
    /// Prefix length as configured on the source.
    pub prefix_len: u8,
    /// Interface name on the source.
    pub interface: String,
}

/// A standard stream that leads out of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioFacts {
    /// What it is.
    pub kind: StdioKind,
    /// CRIU's name of the resource: `pipe:[123]`, `tty[8801:3]`, `unix[456]`,
    /// or the path of a file.
    pub resource: String,
    /// Every `(pid, fd)` in the tree that holds it.
    pub holders: Vec<(i32, i32)>,
    /// The tree writes to it (as opposed to reading).
    pub writable: bool,
}

/// Kinds of standard streams that need help to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StdioKind {
    /// A terminal.
    Terminal,
    /// A pipe whose other end is outside the tree.
    Pipe,
    /// A connected Unix stream socket, as journald gives to a service.
    UnixStream,
    /// A regular file that the tree writes to. It moves as it is where the
    /// destination has it, and needs help only where it has not.
    File,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_that_is_newer_than_all_that_were_tested() {
        for (major, minor, sublevel, untested) in [
            (4, 1, 1, false),
            (4, 2, 0, false),
            (4, 2, 9, false),
            (4, 3, 0, true),
            (5, 0, 0, true),
        ] {
            let version = CriuVersion {
                major,
                minor,
                sublevel,
            };
            assert_eq!(version.is_untested(), untested, "{version}");
        }
    }

    #[test]
    fn what_is_held_follows_the_windows_within_bounds() {
        let windows = |sum_bytes, largest_bytes| WindowFacts {
            sum_bytes,
            largest_bytes,
        };
        const MIB: u64 = 1 << 20;
        for (facts, expected) in [
            (windows(0, 0), (16 * MIB, 4 * MIB)),
            (windows(20 * MIB, 6 * MIB), (40 * MIB, 12 * MIB)),
            (windows(u64::MAX, u64::MAX), (256 * MIB, 256 * MIB)),
        ] {
            assert_eq!(facts.held_bytes_max(), expected, "{facts:?}");
        }
    }
}
