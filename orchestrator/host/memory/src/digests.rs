//! What the frozen tree's memory amounts to, to compare a copy with.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use migrate_core::wire::{PAGE_BYTES, PageDigest, PageOwner, PageRun};

use crate::error::MemoryError;
use crate::maps;
use crate::pagemap::{self, ZeroFrame};
use crate::segments::FrozenSegments;
use crate::store::MemoryDigest;
use crate::{PAGE, ZERO_PAGE};

/// Bytes read at once.
const DIGEST_PIECE_BYTES: usize = 1 << 20;

/// CRIU's final list, kept to compare with: runs side by side are one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    runs: Vec<PageRun>,
}

impl Listed {
    /// Most runs that are kept, 40 bytes each: more than CRIU lists for 32 GiB
    /// of which every other page is populated.
    pub const RUNS_MAX: usize = 4 << 20;

    /// Adds a run.
    ///
    /// # Errors
    ///
    /// There are [`Self::RUNS_MAX`] already.
    pub fn add(&mut self, run: PageRun) -> Result<(), MemoryError> {
        if let Some(last) = self.runs.last_mut()
            && last.owner == run.owner
            && last.vaddr + last.pages * PAGE == run.vaddr
        {
            last.pages += run.pages;
            return Ok(());
        }
        if self.runs.len() == Self::RUNS_MAX {
            return Err(MemoryError::TooManyRuns {
                limit: Self::RUNS_MAX,
            });
        }
        self.runs.push(run);
        Ok(())
    }

    /// The runs by owner, in order of addresses.
    #[must_use]
    pub fn sorted(mut self) -> Vec<PageRun> {
        self.runs.sort_by_key(|run| (run.owner, run.vaddr));
        self.runs
    }
}

/// Digest of each task's memory and of each of `segments` as the final list
/// names it, read from the frozen tree; of tasks without the areas of `masks`.
/// Other segments are left out: they come whole.
///
/// Memory that a task has given back with `MADV_FREE` is the kernel's to take
/// also while the task stands still. A page that was listed and has been taken
/// since does not count: the copy may have its content or zeros.
///
/// Blocks for as long as it takes to read and hash all memory; ends early when
/// `stop` is set.
///
/// # Errors
///
/// A page cannot be read, or `stop` was set.
pub fn digests(
    listed: Listed,
    masks: &[(u64, u32)],
    segments: &FrozenSegments,
    stop: &AtomicBool,
) -> Result<Vec<PageDigest>, MemoryError> {
    let mut by_owner: BTreeMap<PageOwner, Vec<PageRun>> = BTreeMap::new();
    for run in listed.sorted() {
        by_owner.entry(run.owner).or_default().push(run);
    }
    let zero = ZeroFrame::find().map_err(|source| MemoryError::Proc {
        path: "/proc/self/pagemap".to_owned(),
        source,
    })?;
    let mut digests = Vec::new();
    for (owner, runs) in by_owner {
        match owner {
            PageOwner::Task(pid) => {
                let mut task = Task::open(pid, zero)?;
                let sha256 = task.digest(runs, masks, stop)?;
                digests.push(PageDigest {
                    owner,
                    sha256,
                    taken: task.taken,
                });
            }
            PageOwner::Shared(id) => {
                let digest = segments.digest(id, runs, stop)?;
                digests.extend(digest.map(|sha256| PageDigest {
                    owner,
                    sha256,
                    taken: Vec::new(),
                }));
            }
        }
    }
    Ok(digests)
}

/// The memory of a task that stands still.
struct Task {
    pid: i32,
    content: File,
    pagemap: File,
    zero: ZeroFrame,
    /// Listed pages that are not there any more, as address and length in bytes.
    taken: Vec<(u64, u32)>,
}

impl Task {
    fn open(pid: u32, zero: ZeroFrame) -> Result<Self, MemoryError> {
        let pid = pid.cast_signed();
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).map_err(|source| maps::proc_failed(pid, &path, source))
        };
        Ok(Self {
            pid,
            content: open("mem")?,
            pagemap: open("pagemap")?,
            zero,
            taken: Vec::new(),
        })
    }

    fn digest(
        &mut self,
        runs: Vec<PageRun>,
        masks: &[(u64, u32)],
        stop: &AtomicBool,
    ) -> Result<[u8; 32], MemoryError> {
        let mut digest = MemoryDigest::without(masks);
        let mut buffer = vec![0; DIGEST_PIECE_BYTES];
        for run in runs {
            let (mut at, end) = (run.vaddr, run.vaddr + run.pages * PAGE);
            while at < end {
                if stop.load(Ordering::Relaxed) {
                    return Err(MemoryError::Stopped);
                }
                let bytes = usize::try_from(end - at).map_or(buffer.len(), |n| n.min(buffer.len()));
                let piece = &mut buffer[..bytes];
                self.read(at, piece)?;
                digest.add(at, piece);
                at += bytes as u64;
            }
        }
        Ok(digest.finish())
    }

    /// Reads listed pages. Those that were taken read as zeros, which do not
    /// count, and are noted.
    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let range = at..at + into.len() as u64;
        // Before they are read, which puts a page of zeros there.
        let before = self.entries(range.clone())?;
        self.content
            .read_exact_at(into, at)
            .map_err(|source| maps::proc_failed(self.pid, &self.path("mem"), source))?;
        // They may have gone in between; looked up when there is a page of zeros.
        let mut after = None;
        for (index, page) in into.chunks_exact(PAGE_BYTES).enumerate() {
            let mut taken = before.get(index).is_some_and(|entry| !entry.populated());
            if !taken && page == ZERO_PAGE {
                let after = match &mut after {
                    Some(entries) => entries,
                    none => none.insert(self.entries(range.clone())?),
                };
                taken = after.get(index).is_some_and(|&entry| self.zero.is(entry));
            }
            if taken {
                self.take(at + index as u64 * PAGE);
            }
        }
        Ok(())
    }

    fn entries(&self, range: Range<u64>) -> Result<Vec<pagemap::Entry>, MemoryError> {
        pagemap::entries(&self.pagemap, &range)
            .map_err(|source| maps::proc_failed(self.pid, &self.path("pagemap"), source))
    }

    fn path(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid)
    }

    fn take(&mut self, vaddr: u64) {
        let page = u32::try_from(PAGE).unwrap_or_default();
        match self.taken.last_mut() {
            Some((start, length))
                if *start + u64::from(*length) == vaddr && *length <= u32::MAX - page =>
            {
                *length += page;
            }
            _ => self.taken.push((vaddr, page)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_core::wire::PAGE_BYTES;

    fn run(pid: u32, vaddr: u64, pages: u64) -> PageRun {
        PageRun {
            owner: PageOwner::Task(pid),
            vaddr,
            pages,
            flags: PageRun::PRESENT,
        }
    }

    #[test]
    fn runs_side_by_side_are_one_and_there_is_an_end_to_them() {
        let mut listed = Listed::default();
        for (pid, vaddr, pages) in [
            (2, 0x1000, 1),
            (2, 0x2000, 2),
            (1, 0x4000, 1),
            (1, 0x6000, 1),
        ] {
            listed.add(run(pid, vaddr, pages)).unwrap();
        }
        let sorted = listed.sorted();
        assert_eq!(
            sorted,
            [run(1, 0x4000, 1), run(1, 0x6000, 1), run(2, 0x1000, 3)]
        );
        let mut full = Listed {
            runs: vec![run(1, 0, 1); Listed::RUNS_MAX],
        };
        full.add(run(1, 0x1000, 1)).unwrap();
        assert!(matches!(
            full.add(run(1, 0x9000, 1)),
            Err(MemoryError::TooManyRuns { .. })
        ));
    }

    #[test]
    fn what_the_kernel_has_taken_does_not_count() {
        const PAGES: usize = 5;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: made above, and used by this slice only.
        let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), PAGES * PAGE_BYTES) };
        // The last one has zeros that were written.
        memory[..4 * PAGE_BYTES].fill(7);
        memory[4 * PAGE_BYTES] = 0;
        let vaddr = at.addr() as u64;
        let mut listed = Listed::default();
        listed
            .add(run(std::process::id(), vaddr, PAGES as u64))
            .unwrap();
        let none = FrozenSegments::default();
        let go_on = AtomicBool::new(false);
        let now = || {
            digests(listed.clone(), &[], &none, &go_on)
                .unwrap()
                .remove(0)
        };
        let whole = now();
        assert_eq!(whole.taken, []);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let give_back = |page: usize| {
            let page = vaddr + page as u64 * PAGE;
            // A page that another processor still has in hand is passed over.
            let gone = (0..10_000).any(|_| {
                for advice in [libc::MADV_FREE, libc::MADV_PAGEOUT] {
                    let start = page as *mut libc::c_void;
                    // SAFETY: pages of the mapping above, whose content may go.
                    assert_eq!(unsafe { libc::madvise(start, PAGE_BYTES, advice) }, 0);
                }
                std::thread::yield_now();
                !pagemap::entries(&pagemap, &(page..page + PAGE)).unwrap()[0].populated()
            });
            assert!(gone);
        };
        give_back(1);
        give_back(2);
        let part = now();
        let gone = (vaddr + PAGE, 0x2000);
        assert_eq!(part.taken, [gone]);
        // A copy with what was there when it was listed is not another one.
        let mut copy = MemoryDigest::without(&part.taken);
        copy.add(vaddr, &[7; 4 * PAGE_BYTES]);
        assert_eq!(copy.finish(), part.sha256);
        assert_ne!(part.sha256, whole.sha256);
        // By now they have been read, which has put pages of zeros there.
        assert_eq!(now(), part);
        // SAFETY: made above, and not used any more.
        unsafe { libc::munmap(at, PAGES * PAGE_BYTES) };
    }

    #[test]
    fn a_digest_that_nobody_wants_any_more_ends() {
        let page = vec![7u8; 2 * PAGE_BYTES];
        let vaddr = (page.as_ptr() as u64).next_multiple_of(PAGE);
        let mut listed = Listed::default();
        listed.add(run(std::process::id(), vaddr, 1)).unwrap();
        let none = FrozenSegments::default();
        let stop = AtomicBool::new(false);
        assert_eq!(digests(listed.clone(), &[], &none, &stop).unwrap().len(), 1);
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(
            digests(listed, &[], &none, &stop),
            Err(MemoryError::Stopped)
        ));
    }
}
