//! The process tree to be moved, read until it stands still.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migrate_core::facts::{ProcessFacts, TreeFacts};

use crate::error::ProcError;
use crate::files::MappedFile;
use crate::{cgroup, parse, read};

/// How often the tree is read to see the same twice. A read takes a few
/// milliseconds, so that only a tree that forks all the time comes to the end.
const READS_MAX: u32 = 20;
/// How long to try for a read during which nothing of the tree ends, on a
/// machine so busy that a read takes long.
const READ_WAIT_MAX: Duration = Duration::from_secs(5);

/// Refuses a PID that cannot be moved, before anything else is looked at.
///
/// # Errors
/// Says what is wrong with the PID; [`ProcError::help`] says what to do.
pub fn validate_target(pid: i32) -> Result<(), ProcError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(ProcError::NotRoot);
    }
    if pid <= 0 {
        return Err(ProcError::NotAPid { pid });
    }
    let Some(stat) = read::stat(pid)? else {
        return Err(ProcError::NoSuchProcess { pid });
    };
    let status = read::text_if_there(read::of(pid, "status"))?;
    let leader = status
        .as_deref()
        .and_then(|status| parse::value(status, "Tgid"))
        .and_then(|tgid| tgid.parse().ok());
    match leader {
        None => return Err(ProcError::NoSuchProcess { pid }),
        Some(leader) if leader != pid => {
            return Err(ProcError::ThreadId {
                thread: pid,
                leader,
            });
        }
        Some(_) => {}
    }
    if pid == 1 {
        return Err(ProcError::Init);
    }
    let name = stat.name.clone();
    if stat.is_kernel_thread() {
        return Err(ProcError::KernelThread { pid, name });
    }
    if stat.has_ended() {
        let parent = stat.parent;
        return Err(ProcError::Zombie { pid, name, parent });
    }
    if pid == read::own_pid() {
        return Err(ProcError::Own { pid });
    }
    if own_ancestors()?.contains(&pid) {
        return Err(ProcError::Ancestor { pid, name });
    }
    Ok(())
}

/// The PIDs from our parent up to the top of what we can see.
pub(crate) fn own_ancestors() -> Result<BTreeSet<i32>, ProcError> {
    let mut ancestors = BTreeSet::new();
    let mut pid = read::own_pid();
    while let Some(stat) = read::stat(pid)? {
        pid = stat.parent;
        // Zero: the parent is outside our PID namespace.
        if pid == 0 || !ancestors.insert(pid) {
            break;
        }
    }
    Ok(ancestors)
}

/// A process tree, as two equal reads of /proc showed it, or one moment of a
/// tree that is never the same twice.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Every process, parents before children. A process that has ended and
    /// waits for its parent is among them: CRIU carries it over.
    pub processes: Vec<ProcessFacts>,
    /// PIDs of those that have ended.
    pub(crate) ended: BTreeSet<i32>,
    /// PIDs that were stopped by job control.
    pub(crate) stopped: BTreeSet<i32>,
    /// PIDs that have a controlling terminal.
    with_terminal: BTreeSet<i32>,
    cgroup: String,
}

/// One read of the tree, which has to come out the same twice.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sight {
    processes: Vec<ProcessFacts>,
    ended: BTreeSet<i32>,
    with_terminal: BTreeSet<i32>,
}

/// Reads the tree of `root` until two reads agree.
///
/// A tree that forks all the time never comes out the same twice: then it is
/// as the last of [`READS_MAX`] reads saw it. It will be another one a moment
/// later whatever is done here, and is read again when it stands still.
///
/// # Errors
/// [`ProcError::NoSuchProcess`] when the root is not there,
/// [`ProcError::Unstable`] when something of it ended during every read.
pub fn tree(root: i32) -> Result<Tree, ProcError> {
    let mut last = None;
    for _ in 0..READS_MAX {
        let Some((sight, stopped)) = look_whole(root)? else {
            return Err(ProcError::NoSuchProcess { pid: root });
        };
        let same = last.as_ref().is_some_and(|(before, _)| *before == sight);
        last = Some((sight, stopped));
        if same {
            break;
        }
    }
    let Some((sight, stopped)) = last else {
        return Err(ProcError::NoSuchProcess { pid: root });
    };
    Tree::seen(root, sight, stopped)
}

/// PIDs and start ticks of the tree as it is right now; empty when the root
/// has gone.
pub(crate) fn living_now(root: i32) -> Result<Vec<(i32, u64)>, ProcError> {
    let Some((sight, _)) = look_whole(root)? else {
        return Ok(Vec::new());
    };
    Ok(sight
        .processes
        .iter()
        .filter(|process| !sight.ended.contains(&process.pid))
        .map(|process| (process.pid, process.start_ticks))
        .collect())
}

/// A pass over /proc during which nothing of the tree ended; `None` when the
/// root has gone.
fn look_whole(root: i32) -> Result<Option<(Sight, BTreeSet<i32>)>, ProcError> {
    let deadline = Instant::now() + READ_WAIT_MAX;
    for attempts in 1.. {
        if let Some(seen) = look(root)? {
            return Ok(Some(seen));
        }
        if read::stat(root)?.is_none() {
            return Ok(None);
        }
        if attempts >= READS_MAX && Instant::now() >= deadline {
            return Err(ProcError::Unstable {
                pid: root,
                attempts,
            });
        }
    }
    Ok(None)
}

/// One pass over /proc. `None` when something ended under our eyes.
fn look(root: i32) -> Result<Option<(Sight, BTreeSet<i32>)>, ProcError> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let mut stats = BTreeMap::new();
    for pid in read::numbers("/proc")? {
        // Anything may end while we look; only the tree's own members count.
        if let Some(stat) = read::stat(pid)? {
            children.entry(stat.parent).or_default().push(pid);
            stats.insert(pid, stat);
        }
    }
    let mut order = vec![root];
    let mut next = 0;
    while let Some(pid) = order.get(next).copied() {
        order.extend(children.get(&pid).into_iter().flatten());
        next += 1;
    }
    let mut sight = Sight {
        processes: Vec::with_capacity(order.len()),
        ended: BTreeSet::new(),
        with_terminal: BTreeSet::new(),
    };
    let mut stopped = BTreeSet::new();
    for pid in order {
        let Some(stat) = stats.get(&pid) else {
            return Ok(None);
        };
        let threads = if stat.has_ended() {
            sight.ended.insert(pid);
            vec![pid]
        } else {
            read::numbers(read::of(pid, "task"))?
        };
        if threads.is_empty() {
            return Ok(None);
        }
        let Some(status) = read::text_if_there(read::of(pid, "status"))? else {
            return Ok(None);
        };
        if stat.state == 'T' {
            stopped.insert(pid);
        }
        if stat.terminal != 0 {
            sight.with_terminal.insert(pid);
        }
        sight.processes.push(ProcessFacts {
            pid,
            parent: stat.parent,
            start_ticks: stat.start_ticks,
            threads,
            name: stat.name.clone(),
            session: stat.session,
            group: stat.group,
            credentials: parse::credentials(&status),
        });
    }
    Ok(Some((sight, stopped)))
}

/// Memory of a tree that is to be carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResidentMemory {
    /// All of it: what processes have in common since a fork counts for each of them, what
    /// is in shared segments once.
    pub bytes: u64,
    /// How much more that is than what is there: it would be needed if each process had pages
    /// of its own. No less than that where the kernel does not tell.
    pub common_bytes: u64,
}

/// What one process adds to the memory of its tree.
#[derive(Debug, PartialEq, Eq)]
struct Carried {
    bytes: u64,
    /// Of these, its part of shared segments.
    shared_bytes: u64,
    /// Of these, what others have as well since a fork, but for its part of that.
    common_bytes: u64,
}

impl Carried {
    /// By its `/proc/PID/smaps_rollup`. A kernel that does not tell the kinds of memory
    /// apart has all of it counted, for too much is refused and too little is not.
    fn of(rollup: &str) -> Self {
        let field = |name| parse::kilobytes(rollup, name);
        // `Pss` splits a page among all who have it mapped. Pages of its own that are huge
        // or in swap are sent as well, and are in none of the others.
        let fields = [
            "Pss_Shmem",
            "Anonymous",
            "Pss_File",
            "Private_Hugetlb",
            "SwapPss",
        ];
        let known = fields.map(field);
        let fields = known.map(Option::unwrap_or_default);
        if known.contains(&None) {
            return Self::unknown(field("Rss").unwrap_or(0));
        }
        let [shared_bytes, anonymous_bytes, ..] = fields;
        let own_bytes = field("Pss_Anon").unwrap_or(0);
        Self {
            bytes: fields.into_iter().fold(0, u64::saturating_add),
            shared_bytes,
            common_bytes: anonymous_bytes.saturating_sub(own_bytes),
        }
    }

    /// All of it may be anybody's.
    fn unknown(bytes: u64) -> Self {
        Self {
            bytes,
            shared_bytes: 0,
            common_bytes: bytes,
        }
    }
}

/// Notes the memory of the shared segments that a process has mapped, in bytes
/// by inode.
fn add_segments(pid: i32, segments: &mut BTreeMap<u64, u64>) -> Result<(), ProcError> {
    /// What they are called in `/proc/PID/maps`.
    const NAMES: [&str; 3] = ["/dev/zero (deleted)", "/memfd:", "/SYSV"];
    /// Of `st_blocks`.
    const BLOCK_BYTES: u64 = 512;
    let text = read::text_if_there(read::of(pid, "maps"))?.unwrap_or_default();
    for mapping in text.lines().filter_map(parse::mapping) {
        if segments.contains_key(&mapping.inode)
            || !NAMES.iter().any(|name| mapping.path.starts_with(name))
        {
            continue;
        }
        let file = MappedFile { pid, mapping };
        // Unmapped since it was listed, where it fails.
        if let Ok(meta) = std::fs::metadata(file.link()) {
            segments.insert(file.mapping.inode, meta.blocks() * BLOCK_BYTES);
        }
    }
    Ok(())
}

impl Tree {
    fn seen(root: i32, sight: Sight, stopped: BTreeSet<i32>) -> Result<Self, ProcError> {
        let cgroup = cgroup::of_tree(root)?.unwrap_or_else(|| "/".to_owned());
        Ok(Self {
            processes: sight.processes,
            ended: sight.ended,
            stopped,
            with_terminal: sight.with_terminal,
            cgroup,
        })
    }

    /// The same tree as it is now that it stands still, which one read shows.
    ///
    /// # Errors
    /// [`ProcError::NoSuchProcess`] when the root is not there,
    /// [`ProcError::Unstable`] when something of it ended during every read.
    pub fn frozen(&self) -> Result<Self, ProcError> {
        let root = self.root();
        let Some((sight, stopped)) = look_whole(root)? else {
            return Err(ProcError::NoSuchProcess { pid: root });
        };
        Self::seen(root, sight, stopped)
    }

    /// The root's PID.
    #[must_use]
    pub fn root(&self) -> i32 {
        self.processes.first().map_or(0, |root| root.pid)
    }

    /// Every PID, parents before children.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(|process| process.pid).collect()
    }

    /// Every thread id, leaders included.
    #[must_use]
    pub fn tids(&self) -> Vec<i32> {
        self.processes
            .iter()
            .flat_map(|process| process.threads.iter().copied())
            .collect()
    }

    /// Memory of all processes, in bytes: what has to be carried, at most. A page
    /// that processes have in common since a fork counts for each of them, since
    /// each process's pages go over on their own; one of a shared segment counts
    /// once, and so does one of a file, which the destination reads from its own.
    ///
    /// The kernel looks at every page to count them, which takes 15 ms a GiB: not
    /// for when peers wait.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn resident_memory(&self) -> Result<ResidentMemory, ProcError> {
        let mut sum = 0_u64;
        let mut common_bytes = 0_u64;
        let mut mapped_shared = 0_u64;
        let mut segments = BTreeMap::new();
        for process in self.living() {
            let rollup = read::text_if_there(read::of(process.pid, "smaps_rollup"));
            let carried = match rollup.ok().flatten() {
                Some(text) => Carried::of(&text),
                None => Carried::unknown(
                    read::text_if_there(read::of(process.pid, "status"))?
                        .and_then(|text| parse::kilobytes(&text, "VmRSS"))
                        .unwrap_or(0),
                ),
            };
            sum = sum.saturating_add(carried.bytes);
            common_bytes = common_bytes.saturating_add(carried.common_bytes);
            mapped_shared = mapped_shared.saturating_add(carried.shared_bytes);
            add_segments(process.pid, &mut segments)?;
        }
        // What no living process has touched is in nobody's share.
        let in_segments: u64 = segments.values().sum();
        Ok(ResidentMemory {
            bytes: sum.saturating_add(in_segments.saturating_sub(mapped_shared)),
            common_bytes,
        })
    }

    /// cgroup path of the root: in the v2 hierarchy, else in v1's freezer,
    /// else `/`. Without the cgroup that a [`crate::Fence`] put below it.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Whether CRIU needs `shell_job`: the root leads no session of its own,
    /// or a terminal's session leader is outside the tree.
    #[must_use]
    pub fn shell_job(&self) -> bool {
        let Some(root) = self.processes.first() else {
            return false;
        };
        let inside: BTreeSet<i32> = self.pids().into_iter().collect();
        root.session != root.pid
            || self.processes.iter().any(|process| {
                self.with_terminal.contains(&process.pid) && !inside.contains(&process.session)
            })
    }

    /// Whether the tree still is the one that was read: the same processes
    /// and threads, started when they were.
    #[must_use]
    pub fn still_same(&self) -> bool {
        let key = |processes: &[ProcessFacts]| -> BTreeMap<i32, (u64, Vec<i32>)> {
            processes
                .iter()
                .map(|process| (process.pid, (process.start_ticks, process.threads.clone())))
                .collect()
        };
        match look(self.root()) {
            Ok(Some((sight, _))) => {
                sight.ended == self.ended && key(&sight.processes) == key(&self.processes)
            }
            Ok(None) | Err(_) => false,
        }
    }

    /// What this crate knows of the tree; flows, listeners and addresses are
    /// the network's to fill in.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn facts(&self) -> Result<TreeFacts, ProcError> {
        let memory = self.resident_memory()?;
        Ok(TreeFacts {
            root_pid: self.root(),
            processes: self.processes.clone(),
            files: self.files()?,
            flows: Vec::new(),
            listeners: Vec::new(),
            windows: Default::default(),
            addresses: Vec::new(),
            stdio: self.stdio()?,
            tunnel: self.tunnel()?,
            resident_bytes: memory.bytes,
            common_bytes: memory.common_bytes,
            shell_job: self.shell_job(),
            cgroup: self.cgroup.clone(),
            unit: Default::default(),
        })
    }

    /// Processes that still run, and so have files and memory.
    pub(crate) fn living(&self) -> impl Iterator<Item = &ProcessFacts> {
        self.processes
            .iter()
            .filter(|process| !self.ended.contains(&process.pid))
    }

    /// `name (PID)`, for a finding.
    pub(crate) fn named(&self, pid: i32) -> String {
        match self.processes.iter().find(|process| process.pid == pid) {
            Some(process) => format!("{} (PID {pid})", process.name),
            None => format!("PID {pid}"),
        }
    }
}

/// Whether `pid` is there and started at `start_ticks`.
pub(crate) fn is_same_process(pid: i32, start_ticks: u64) -> bool {
    matches!(read::stat(pid), Ok(Some(stat)) if stat.start_ticks == start_ticks && !stat.has_ended())
}

/// The directory of a process's descriptors.
pub(crate) fn descriptors_of(pid: i32) -> PathBuf {
    read::of(pid, "fd")
}

/// When a process started, in clock ticks since boot; `None` when it is not
/// there or has ended. Tells a reused PID from the process it once was.
#[must_use]
pub fn start_ticks(pid: i32) -> Option<u64> {
    read::stat(pid)
        .ok()
        .flatten()
        .filter(|stat| !stat.has_ended())
        .map(|stat| stat.start_ticks)
}

/// PID and name of the process that traces one of `pids`, if any does.
///
/// # Errors
/// When /proc cannot be read.
pub fn tracer(pids: &[i32]) -> Result<Option<(i32, String)>, ProcError> {
    for &pid in pids {
        let status = read::text_if_there(read::of(pid, "status"))?.unwrap_or_default();
        let tracer = parse::value(&status, "TracerPid").and_then(|pid| pid.parse().ok());
        if let Some(tracer) = tracer.filter(|tracer| *tracer != 0) {
            return Ok(Some((tracer, read::name(tracer))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_adds_by_what_the_kernel_tells() {
        let rollup = "556e6713c000-7fff3163e000 ---p 00000000 00:00 0    [rollup]\n\
                      Rss:                1752 kB\n\
                      Pss:                 400 kB\n\
                      Pss_Anon:             50 kB\n\
                      Pss_File:            146 kB\n\
                      Pss_Shmem:             8 kB\n\
                      Anonymous:           100 kB\n\
                      Private_Hugetlb:    2048 kB\n\
                      Swap:                 24 kB\n\
                      SwapPss:              16 kB\n";
        let carried = |kib: u64, shared_kib: u64, common_kib: u64| Carried {
            bytes: kib << 10,
            shared_bytes: shared_kib << 10,
            common_bytes: common_kib << 10,
        };
        let bytes_kib = 100 + 146 + 8 + 2048 + 16;
        assert_eq!(Carried::of(rollup), carried(bytes_kib, 8, 50));
        // Before Linux 5.3.
        let old = rollup.replace("Pss_", "Unknown_");
        assert_eq!(Carried::of(&old), carried(1752, 0, 1752));
        assert_eq!(Carried::of(""), carried(0, 0, 0));
    }
}
