//! What the frozen tree's memory amounts to, to compare a copy with.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use migrate_core::wire::{PageOwner, PageRun};

use crate::PAGE;
use crate::error::MemoryError;
use crate::segments::FrozenSegments;
use crate::store::MemoryDigest;

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
) -> Result<Vec<(PageOwner, [u8; 32])>, MemoryError> {
    let mut by_owner: BTreeMap<PageOwner, Vec<PageRun>> = BTreeMap::new();
    for run in listed.sorted() {
        by_owner.entry(run.owner).or_default().push(run);
    }
    let mut digests = Vec::new();
    for (owner, runs) in by_owner {
        let pid = match owner {
            PageOwner::Task(pid) => pid,
            PageOwner::Shared(id) => {
                let digest = segments.digest(id, runs, stop)?;
                digests.extend(digest.map(|digest| (owner, digest)));
                continue;
            }
        };
        let path = format!("/proc/{pid}/mem");
        let failed = |source| MemoryError::Proc {
            path: path.clone(),
            source,
        };
        let memory = File::open(&path).map_err(failed)?;
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
                memory.read_exact_at(piece, at).map_err(failed)?;
                digest.add(at, piece);
                at += bytes as u64;
            }
        }
        digests.push((owner, digest.finish()));
    }
    Ok(digests)
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
