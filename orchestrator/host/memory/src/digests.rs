//! What the frozen tree's memory amounts to, to compare a copy with.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use migrate_core::wire::{PageOwner, PageRun};

use crate::PAGE;
use crate::error::MemoryError;
use crate::store::MemoryDigest;

/// Bytes read at once.
const DIGEST_PIECE_BYTES: usize = 1 << 20;

/// Digest of each task's memory as CRIU's final list names it, read from the
/// frozen tree, without the areas of `masks`. Shared segments are left out:
/// they come whole.
///
/// # Errors
///
/// A page cannot be read.
pub fn digests(
    listed: &[PageRun],
    masks: &[(u64, u32)],
) -> Result<Vec<(u32, [u8; 32])>, MemoryError> {
    let mut by_task: BTreeMap<u32, Vec<PageRun>> = BTreeMap::new();
    for run in listed {
        if let PageOwner::Task(pid) = run.owner {
            by_task.entry(pid).or_default().push(*run);
        }
    }
    let mut digests = Vec::new();
    for (pid, mut runs) in by_task {
        runs.sort_by_key(|run| run.vaddr);
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
                let bytes = usize::try_from(end - at).map_or(buffer.len(), |n| n.min(buffer.len()));
                let piece = &mut buffer[..bytes];
                memory.read_exact_at(piece, at).map_err(failed)?;
                digest.add(at, piece);
                at += bytes as u64;
            }
        }
        digests.push((pid, digest.finish()));
    }
    Ok(digests)
}
