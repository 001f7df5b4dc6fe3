//! Rounds that compare content, for hosts that cannot track memory.
//!
//! Every round reads all memory of the running tree and hands on the pages whose
//! digest is not that of what was handed on last for the same address. Nothing is
//! marked and nothing injected; the price is a core that reads and hashes. The
//! final dump asks [`ContentPrecopy::holds`] for each page of the frozen tree, so
//! what a round has read half-written costs nothing but time.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::time::Instant;

use bytes::BytesMut;
use migrate_core::wire::{PAGE_BYTES, PageOwner};

use crate::error::{MemoryError, RoundError};
use crate::known::Known;
use crate::maps::{self, Vma};
use crate::process::Memory;
use crate::rounds::{Limits, PageSink, RUN_PAGES_MAX, RoundStats, micros, unless_gone};
use crate::segments::{FrozenSegments, Segments, breathe};
use crate::sys::PIECES_MAX;
use crate::{PAGE, pagemap, tree};

/// Pages looked up in one reading of the pagemap: 32 MiB of memory.
const WINDOW_PAGES: u64 = 8192;

/// Pre-copy of one tree by content.
#[derive(Debug)]
pub struct ContentPrecopy {
    root: i32,
    limits: Limits,
    known: Known,
    segments: Segments,
    last_start: Option<Instant>,
    buffer: BytesMut,
}

impl ContentPrecopy {
    /// Prepares to copy the tree of `root`.
    #[must_use]
    pub fn new(root: i32, limits: Limits) -> Self {
        Self {
            root,
            limits,
            known: Known::default(),
            segments: Segments::default(),
            last_start: None,
            buffer: BytesMut::new(),
        }
    }

    /// Whether this page of this process is what was handed on last for it.
    #[must_use]
    pub fn holds(&self, pid: u32, vaddr: u64, page: &[u8]) -> bool {
        self.known.holds(PageOwner::Task(pid), vaddr, page)
    }

    /// The shared segments of the tree, which stands still.
    ///
    /// # Errors
    ///
    /// The tree cannot be looked at.
    pub fn frozen_segments(&self) -> Result<FrozenSegments, MemoryError> {
        self.segments.frozen(self.root, self.limits.processes)
    }

    /// Hands on what is not as it was in the last round; everything in the
    /// first.
    ///
    /// # Errors
    ///
    /// The root is gone, the tree has too many processes, or the sink refused:
    /// the rounds cannot go on then.
    pub async fn round<S: PageSink>(
        &mut self,
        sink: &mut S,
    ) -> Result<RoundStats, RoundError<S::Error>> {
        let start = Instant::now();
        let mut stats = RoundStats::begun(start, self.last_start);
        let members = tree::members(self.root, self.limits.processes)?;
        self.last_start = Some(start);
        for member in &members {
            let done = self.process(member.pid, sink, &mut stats).await;
            unless_gone(done, self.root)?;
        }
        self.segments.round(&members, sink, &mut stats).await?;
        stats.processes = members.len() as u64;
        stats.took_us = micros(start.elapsed());
        Ok(stats)
    }

    async fn process<S: PageSink>(
        &mut self,
        pid: i32,
        sink: &mut S,
        stats: &mut RoundStats,
    ) -> Result<(), RoundError<S::Error>> {
        let vmas = maps::read(pid)?;
        let memory = Memory::open(pid)?;
        for Vma { range, .. } in vmas.iter().filter(|vma| vma.readable && vma.private()) {
            let mut at = range.start;
            while at < range.end {
                let window = at..range.end.min(at + WINDOW_PAGES * PAGE);
                at = window.end;
                let populated = populated(pid, memory.pagemap(), &window)?;
                self.pages(pid, &memory, populated, sink, stats).await?;
            }
        }
        Ok(())
    }

    /// Reads pages, compares them and hands on what is new.
    async fn pages<S: PageSink>(
        &mut self,
        pid: i32,
        memory: &Memory,
        mut populated: VecDeque<Range<u64>>,
        sink: &mut S,
        stats: &mut RoundStats,
    ) -> Result<(), RoundError<S::Error>> {
        let owner = PageOwner::Task(pid.unsigned_abs());
        while !populated.is_empty() {
            let pieces = next_pieces(&mut populated);
            let Some(data) = memory.read(&pieces, &mut self.buffer)? else {
                return Err(MemoryError::Gone { pid }.into());
            };
            let data = data.freeze();
            let mut at = 0usize;
            let mut missing = Vec::new();
            for piece in pieces {
                if !missing.is_empty() {
                    missing.push(piece);
                    continue;
                }
                let bytes = usize::try_from(piece.end - piece.start).unwrap_or(usize::MAX);
                let end = data.len().min(at.saturating_add(bytes));
                let read = (end - at) as u64;
                self.known
                    .hand_on(owner, piece.start, &data.slice(at..end), sink, stats)
                    .await?;
                at = end;
                if read < bytes as u64 {
                    // This page could not be read; those behind it may be.
                    stats.pages_vanished += 1;
                    missing.push(piece.start + read + PAGE..piece.end);
                }
            }
            let missing = missing.into_iter().filter(|piece| !piece.is_empty());
            populated.extend(missing);
            // Whoever waits for the end of the round may want to give up.
            breathe().await;
        }
        Ok(())
    }
}

/// Takes pieces off the front, no more than are read and handed on at once.
fn next_pieces(ranges: &mut VecDeque<Range<u64>>) -> Vec<Range<u64>> {
    let mut room = RUN_PAGES_MAX * PAGE;
    let mut pieces = Vec::new();
    while room > 0
        && pieces.len() < PIECES_MAX
        && let Some(range) = ranges.front_mut()
    {
        let end = range.end.min(range.start + room);
        room -= end - range.start;
        pieces.push(range.start..end);
        range.start = end;
        if range.start == range.end {
            ranges.pop_front();
        }
    }
    pieces
}

/// The populated pages of a range that are the process's own: not those that
/// are still the file's.
fn populated(
    pid: i32,
    pagemap: &File,
    range: &Range<u64>,
) -> Result<VecDeque<Range<u64>>, MemoryError> {
    let entries = pagemap::entries(pagemap, range).map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => MemoryError::Gone { pid },
        _ => maps::proc_failed(pid, &format!("/proc/{pid}/pagemap"), source),
    })?;
    let mut found: VecDeque<Range<u64>> = VecDeque::new();
    for (entry, at) in entries.iter().zip((range.start..).step_by(PAGE_BYTES)) {
        if !entry.populated() || entry.of_file() {
            continue;
        }
        match found.back_mut() {
            Some(last) if last.end == at => last.end += PAGE,
            _ => found.push_back(at..at + PAGE),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_the_ranges_once(lengths in prop::collection::vec(1u64..600, 0..20)) {
            let mut ranges = VecDeque::new();
            let mut at = 0;
            for length in lengths {
                ranges.push_back(at..at + length * PAGE);
                at += (length + 1) * PAGE;
            }
            let wanted: Vec<u64> = ranges.iter().cloned().flat_map(|r| r.step_by(PAGE_BYTES)).collect();
            let mut got = Vec::new();
            while !ranges.is_empty() {
                let pieces = next_pieces(&mut ranges);
                let pages: u64 = pieces.iter().map(|piece| (piece.end - piece.start) / PAGE).sum();
                prop_assert!(pages > 0 && pages <= RUN_PAGES_MAX);
                got.extend(pieces.into_iter().flat_map(|r| r.step_by(PAGE_BYTES)));
            }
            prop_assert_eq!(got, wanted);
        }
    }
}
