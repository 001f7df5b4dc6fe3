//! Memory of a tree that stands still and follows it after the commit.
//!
//! ```text
//! frozen:     PAGEMAP_SCAN of what is tracked -> pages written since the last round,
//!             marked clean; then CRIU lists them as in store and does not read them
//! committed:  the fenced tree -> content of a page, when its turn comes or somebody waits
//! ```
//!
//! Nobody copies such a page before it goes out: CRIU does not read it, which takes it some
//! 20 µs where pages lie apart, and this host needs no room for it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::BytesMut;
use migrate_core::late::RUNS_MAX;
use migrate_core::wire::PageOwner;

use crate::PAGE;
use crate::code::code_pages_in;
use crate::error::MemoryError;
use crate::maps::{self, Vma};
use crate::process::{Memory, Watch};
use crate::rounds::without;
use crate::sys::ScanMode;

/// Parts of tasks' memory, by task, ascending.
pub type TaskRanges = BTreeMap<u32, Vec<Range<u64>>>;

/// The tracked memory of a tree that stands still.
#[derive(Debug)]
pub struct FrozenPages {
    processes: Vec<(u32, Watch, Vec<Range<u64>>)>,
    guards: bool,
}

impl FrozenPages {
    pub(crate) fn of<'w>(
        watched: impl Iterator<Item = (i32, &'w Watch)>,
        guards: bool,
        tree: &[u32],
        held: Option<&TaskRanges>,
    ) -> Result<Self, MemoryError> {
        let mut processes = Vec::new();
        // It cannot wait, nor can what other tasks have at such addresses: CRIU says
        // of some which pages these are.
        if held.is_none() {
            for pid in tree {
                if has_locked(pid.cast_signed())? {
                    return Ok(Self { processes, guards });
                }
            }
        }
        for (pid, watch) in watched {
            let vmas = match maps::read(pid) {
                Err(MemoryError::Gone { .. }) => continue,
                vmas => vmas?,
            };
            let readable = joined(vmas.iter().filter(|vma| vma.trackable()));
            // CRIU lets the task execute its own code there.
            let code: Vec<Range<u64>> =
                code_pages_in(&vmas).map(|page| page..page + PAGE).collect();
            let unreadable = without(watch.registered(), &readable);
            let ranges = without(&without(watch.registered(), &unreadable), &code);
            let held = held.and_then(|held| held.get(&pid.unsigned_abs()));
            let ranges = without(&ranges, held.map_or(&[], Vec::as_slice));
            let watch = watch
                .duplicate()
                .map_err(|source| maps::proc_failed(pid, "its userfaultfd", source))?;
            processes.push((pid.unsigned_abs(), watch, ranges));
        }
        Ok(Self { processes, guards })
    }

    /// Marks the pages clean that have changed; which ones these are. CRIU must not look at
    /// the marks before this has returned: what could not be looked at whole is marked
    /// written again.
    ///
    /// What is beyond [`RUNS_MAX`] ranges, what is not in memory just now, and memory of
    /// another program than the one that is tracked, stays as it is: CRIU lists it with its
    /// content, and a page that cannot be read ends the dump and not the copy.
    ///
    /// # Errors
    ///
    /// It was stopped, or a process cannot be looked at.
    pub fn written(&self, stop: &AtomicBool) -> Result<TaskRanges, MemoryError> {
        let mut written = TaskRanges::new();
        let mut room = RUNS_MAX;
        for (pid, watch, ranges) in &self.processes {
            let memory = match Memory::open(pid.cast_signed()) {
                // What has ended has no pages.
                Err(MemoryError::Gone { .. }) => continue,
                memory => memory?,
            };
            let found = written.entry(*pid).or_default();
            for range in ranges {
                let mut left = range.clone();
                while left.start < left.end {
                    if stop.load(Ordering::Relaxed) {
                        return Err(MemoryError::Stopped);
                    }
                    let mode = ScanMode::ProtectPresent;
                    // Another program's memory, or another shape.
                    let Ok(scan) = watch.scan(memory.pagemap(), &left, mode, self.guards) else {
                        break;
                    };
                    left.start = scan.next.max(left.start + PAGE);
                    if scan.owed.ranges() > room {
                        return Ok(written);
                    }
                    room -= scan.owed.ranges();
                    found.extend(scan.owed.hand_over());
                }
            }
        }
        Ok(written)
    }
}

/// The memory of a tree that stands still, for reading.
#[derive(Debug)]
pub struct FrozenMemory {
    tasks: BTreeMap<u32, FrozenTask>,
}

#[derive(Debug)]
struct FrozenTask {
    memory: Memory,
    /// What may be read at any time and is not known to be needed at once.
    readable: Vec<Range<u64>>,
    /// What of that may wait, whatever CRIU thinks of it.
    waits: Vec<Range<u64>>,
}

impl FrozenMemory {
    /// Opens the memory of these processes; `held` is what of it cannot wait, where that
    /// is known.
    ///
    /// # Errors
    ///
    /// That of one of them cannot be opened.
    pub fn open(
        pids: impl IntoIterator<Item = i32>,
        held: Option<&TaskRanges>,
    ) -> Result<Self, MemoryError> {
        let mut tasks = BTreeMap::new();
        for pid in pids {
            match FrozenTask::open(pid, held) {
                // One that has ended and was not waited for has no memory.
                Err(MemoryError::Gone { .. }) => {}
                opened => {
                    tasks.insert(pid.unsigned_abs(), opened?);
                }
            }
        }
        Ok(Self { tasks })
    }

    /// Whether this memory may wait and can be read at any time as long as the tree stands
    /// still: not what its own task may not read, for which a kernel may want a tracer
    /// (`CONFIG_PROC_MEM_FORCE_PTRACE`, Linux 6.12 and later).
    #[must_use]
    pub fn may_wait(&self, owner: PageOwner, range: &Range<u64>) -> bool {
        self.task(owner)
            .is_some_and(|task| is_within(&task.readable, range))
    }

    /// The same of memory of which CRIU has not said that it may wait. It does not say so
    /// of a process one of whose stack pointers is a multiple of 4 KiB (`is_stack` in
    /// `criu/mem.c` of 4.2 then takes all pages for stack).
    #[must_use]
    pub fn waits(&self, owner: PageOwner, range: &Range<u64>) -> bool {
        self.task(owner)
            .is_some_and(|task| is_within(&task.waits, range))
    }

    fn task(&self, owner: PageOwner) -> Option<&FrozenTask> {
        match owner {
            PageOwner::Task(pid) => self.tasks.get(&pid),
            PageOwner::Shared(_) => None,
        }
    }

    /// Reads pieces of a task's memory, whole pages, all of them.
    ///
    /// # Errors
    ///
    /// The task has ended, or one of the pages cannot be read.
    pub fn read(
        &self,
        owner: PageOwner,
        pieces: &[Range<u64>],
        buffer: &mut BytesMut,
    ) -> Result<BytesMut, MemoryError> {
        let (Some(task), PageOwner::Task(pid)) = (self.task(owner), owner) else {
            return Err(MemoryError::Stopped);
        };
        let gone = MemoryError::Gone {
            pid: pid.cast_signed(),
        };
        let wanted: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let data = task.memory.read(pieces, buffer)?.ok_or(gone)?;
        if data.len() as u64 == wanted {
            return Ok(data);
        }
        let vaddr = nth(pieces, data.len() as u64);
        Err(MemoryError::Read {
            pid: pid.cast_signed(),
            vaddr,
            source: std::io::Error::from_raw_os_error(libc::EFAULT),
        })
    }
}

impl FrozenTask {
    fn open(pid: i32, held: Option<&TaskRanges>) -> Result<Self, MemoryError> {
        let memory = Memory::open(pid)?;
        let vmas = maps::read(pid)?;
        let free = |ranges: &[Range<u64>]| {
            let held = held.and_then(|held| held.get(&pid.unsigned_abs()));
            without(ranges, held.map_or(&[], Vec::as_slice))
        };
        let readable = joined(vmas.iter().filter(|vma| vma.readable && vma.private()));
        let waits = match held {
            Some(_) => joined(vmas.iter().filter(|vma| vma.trackable())),
            None => Vec::new(),
        };
        Ok(Self {
            memory,
            readable: free(&readable),
            waits: free(&waits),
        })
    }
}

/// Whether one of these parts, which ascend, has all of it.
fn is_within(parts: &[Range<u64>], range: &Range<u64>) -> bool {
    let at = parts.partition_point(|part| part.end <= range.start);
    parts
        .get(at)
        .is_some_and(|part| part.start <= range.start && range.end <= part.end)
}

/// Whether a process has memory locked in, as far as that can be told. One that has ended
/// and was not waited for has none.
fn has_locked(pid: i32) -> Result<bool, MemoryError> {
    match maps::read(pid) {
        Err(MemoryError::Gone { .. }) => Ok(false),
        vmas => Ok(!vmas?.is_empty() && locked_kb(pid) != Some(0)),
    }
}

/// Memory that the process has locked in, in KiB; none when it cannot be told.
fn locked_kb(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Where the byte is that comes after so many of these pieces.
fn nth(pieces: &[Range<u64>], mut bytes: u64) -> u64 {
    for piece in pieces {
        let length = piece.end - piece.start;
        if bytes < length {
            return piece.start + bytes;
        }
        bytes -= length;
    }
    0
}

/// Where these mappings are, those that touch as one.
fn joined<'v>(vmas: impl Iterator<Item = &'v Vma>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for vma in vmas {
        match joined.last_mut() {
            Some(last) if last.end == vma.range.start => last.end = vma.range.end,
            _ => joined.push(vma.range.clone()),
        }
    }
    joined
}
