//! What is counted on a host after each hop, by its kernel and its files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use migrate_test_hosts::Host;
use nix::sys::statvfs::statvfs;

use super::judge::Rule;
use crate::hosts::gates;

/// Ended records of destinations that a host keeps (`ENDED_RECORDS_MAX` of
/// `migrate-session`) and the one that is added before the oldest goes, each
/// with its lock, its note and its claim.
const RECORDS_MAX: u64 = 65 * 4;
/// Logs that a host keeps (`AGENT_LOGS_MAX` of `migrate`), and those of
/// processes that began at once: an agent, its guard and its keeper.
const LOGS_MAX: u64 = 35;
/// Reports that a host keeps (`KEPT_MAX` of `migrate-session`).
const REPORTS_MAX: u64 = 100;
/// Memory that an agent or the tree may have more of in the end. Allocators
/// keep what threads gave back, and which threads did differs from hop to hop: an
/// agent has gone from 40 to 57 MiB within 20 hops and stayed there for 200. What
/// is left of a page store in each hop shows all the same.
const MEMORY_SLACK_KIB: u64 = 32 << 10;
/// Pieces of address space that the tree may have more of in the end.
const MAPPINGS_SLACK: u64 = 16;
/// In bytes, whatever the file system.
const BLOCK_BYTES: u64 = 512;
/// How deep directories are looked into: deeper than any of ours.
const DEPTH_MAX: u32 = 16;
/// Where `migrate` keeps what is its own.
const DIRECTORY: &str = "/run/migrate";
/// Ours write there, and nobody else on a test host.
const TMPFS: [&str; 2] = ["/run", "/dev/shm"];

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// Processes of the host.
    Processes,
    /// Descriptors of the standing agent.
    AgentDescriptors,
    /// Memory of the standing agent.
    AgentMemoryKib,
    /// Programs, maps and links: by their pins, by who has them open, by the
    /// interfaces they hang on.
    BpfObjects,
    /// Mounts of the host.
    Mounts,
    /// Interfaces of the host.
    Interfaces,
    /// cgroups of the host.
    Cgroups,
    /// Files of journal records, which are kept for late questions up to a bound.
    Records,
    /// Logs, which are kept up to a bound.
    Logs,
    /// Reports, which are kept up to a bound.
    Reports,
    /// What all other files on tmpfs take.
    TmpfsKib,
    /// Descriptors of the tree.
    TreeDescriptors,
    /// Mappings of the tree.
    TreeMappings,
    /// Memory of the tree.
    TreeMemoryKib,
}

impl Figure {
    /// As the table has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::AgentDescriptors => "agent's descriptors",
            Self::AgentMemoryKib => "agent's memory, KiB",
            Self::BpfObjects => "BPF objects",
            Self::Mounts => "mounts",
            Self::Interfaces => "interfaces",
            Self::Cgroups => "cgroups",
            Self::Records => "records",
            Self::Logs => "logs",
            Self::Reports => "reports",
            Self::TmpfsKib => "other tmpfs, KiB",
            Self::TreeDescriptors => "tree's descriptors",
            Self::TreeMappings => "tree's mappings",
            Self::TreeMemoryKib => "tree's memory, KiB",
        }
    }

    /// How it may behave.
    #[must_use]
    pub const fn rule(self) -> Rule {
        match self {
            Self::AgentMemoryKib | Self::TreeMemoryKib => Rule::Slack(MEMORY_SLACK_KIB),
            Self::TreeMappings => Rule::Slack(MAPPINGS_SLACK),
            Self::Records => Rule::AtMost(RECORDS_MAX),
            Self::Logs => Rule::AtMost(LOGS_MAX),
            Self::Reports => Rule::AtMost(REPORTS_MAX),
            _ => Rule::Constant,
        }
    }
}

/// The figures of one host at one moment.
pub type Figures = BTreeMap<Figure, u64>;

/// Counts on a host; `agent` is the PID of its standing agent, `tree` that of
/// the workload where it runs here.
///
/// # Errors
///
/// When the host or one of the two is gone.
pub fn count(host: &Host, agent: i32, tree: Option<i32>) -> io::Result<Figures> {
    let mut figures = Figures::new();
    let processes = processes(host)?;
    let ([journal, log, reports], tmpfs_bytes) = kept(host)?;
    let kept_bytes = journal.bytes + log.bytes + reports.bytes;
    let init = host.init_pid();
    let lines =
        |path: &str| -> io::Result<u64> { Ok(as_count(fs::read_to_string(path)?.lines().count())) };
    figures.extend([
        (Figure::Processes, as_count(processes.len())),
        (Figure::AgentDescriptors, descriptors(host, agent)?),
        (Figure::AgentMemoryKib, memory_kib(host, agent)?),
        (Figure::BpfObjects, bpf_objects(host, &processes)?),
        (Figure::Mounts, lines(&format!("/proc/{init}/mountinfo"))?),
        (Figure::Interfaces, lines(&format!("/proc/{init}/net/dev"))?),
        (
            Figure::Cgroups,
            host.cgroups().map_or(0, |top| directories(&top, DEPTH_MAX)),
        ),
        (Figure::Records, journal.count),
        (Figure::Logs, log.count),
        (Figure::Reports, reports.count),
        (
            Figure::TmpfsKib,
            tmpfs_bytes.saturating_sub(kept_bytes) / 1024,
        ),
    ]);
    if let Some(tree) = tree {
        let maps = fs::read_to_string(host.path(format!("/proc/{tree}/maps")))?;
        figures.extend([
            (Figure::TreeDescriptors, descriptors(host, tree)?),
            (Figure::TreeMappings, as_count(maps.lines().count())),
            (Figure::TreeMemoryKib, memory_kib(host, tree)?),
        ]);
    }
    Ok(figures)
}

fn as_count(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// PIDs of a host; those that only wait to be reaped count too.
fn processes(host: &Host) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(host.path("/proc"))?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.collect())
}

fn descriptors(host: &Host, pid: i32) -> io::Result<u64> {
    Ok(as_count(
        fs::read_dir(host.path(format!("/proc/{pid}/fd")))?.count(),
    ))
}

/// Resident memory, of files in memory that it has mapped, too.
fn memory_kib(host: &Host, pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(host.path(format!("/proc/{pid}/status")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("no VmRSS of {pid}")))
}

/// Records, logs and reports, and all that tmpfs holds with them: of one moment,
/// or what a log has grown by between two looks would be missing elsewhere.
fn kept(host: &Host) -> io::Result<([Files; 3], u64)> {
    const LOOKS_MAX: u32 = 1000;
    let look = || ["journal", "log", "report"].map(|name| files(&host.path(DIRECTORY).join(name)));
    for _ in 0..LOOKS_MAX {
        let before = look();
        let mut tmpfs_bytes = 0;
        for mount in TMPFS {
            let state = statvfs(&host.path(mount))?;
            tmpfs_bytes += (state.blocks() - state.blocks_free()) * state.fragment_size();
        }
        if look() == before {
            return Ok((before, tmpfs_bytes));
        }
    }
    Err(io::Error::other(
        "records, logs or reports change all the time",
    ))
}

/// What has an identifier and is open in a process of the host, what is pinned
/// there, and what hangs on its interfaces. Nothing else keeps one alive.
fn bpf_objects(host: &Host, processes: &[i32]) -> io::Result<u64> {
    let mut open = BTreeSet::new();
    for pid in processes {
        // One that has ended meanwhile has nothing open.
        let entries = fs::read_dir(host.path(format!("/proc/{pid}/fdinfo")));
        for entry in entries.into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let ids = text.lines().filter(|line| {
                ["prog_id:", "map_id:", "link_id:"]
                    .iter()
                    .any(|name| line.starts_with(name))
            });
            open.extend(ids.map(str::to_owned));
        }
    }
    let pinned = pins(&host.path("/run/migrate/bpf"), DEPTH_MAX);
    Ok(as_count(open.len() + gates(host)?.len()) + pinned)
}

/// Files below a directory, and what they take on their file system.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Files {
    count: u64,
    bytes: u64,
}

fn files(directory: &Path) -> Files {
    let mut found = Files::default();
    // A directory that is not there has none.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_file() => {
                found.count += 1;
                found.bytes += metadata.blocks() * BLOCK_BYTES;
            }
            _ => {}
        }
    }
    found
}

/// Pins below a directory, without the kernel's own, which have a dot.
fn pins(top: &Path, depth_left: u32) -> u64 {
    let Some(depth_left) = depth_left.checked_sub(1) else {
        return 0;
    };
    let entries = fs::read_dir(top).into_iter().flatten().flatten();
    entries
        .filter(|entry| !entry.file_name().as_encoded_bytes().contains(&b'.'))
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => pins(&entry.path(), depth_left),
            _ => 1,
        })
        .sum()
}

fn directories(top: &Path, depth_left: u32) -> u64 {
    let Some(depth_left) = depth_left.checked_sub(1) else {
        return 0;
    };
    let entries = fs::read_dir(top).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| 1 + directories(&entry.path(), depth_left))
        .sum()
}
