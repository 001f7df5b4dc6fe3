//! Rounds that compare content, for hosts that cannot track memory.
//!
//! Every round reads all private memory of the running tree and hands on the
//! pages whose digest is not that of what was handed on last for the same
//! address. Nothing is marked and nothing injected; the price is a core that
//! reads and hashes. The final dump asks [`ContentPrecopy::holds`] for each page
//! of the frozen tree, so what a round has read half-written costs nothing but
//! time.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::task::Poll;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use migrate_core::wire::{PAGE_BYTES, PageRun};

use crate::error::{MemoryError, RoundError};
use crate::maps::{self, Vma};
use crate::process::Memory;
use crate::rounds::{Limits, PageSink, RUN_PAGES_MAX, RoundStats, micros, runs, unless_gone};
use crate::sys::PIECES_MAX;
use crate::{PAGE, ZERO_PAGE, tree};

/// Pages whose digests lie together: 2 MiB of memory.
const EXTENT_PAGES: usize = 512;

/// Pages looked up in one reading of the pagemap: 32 MiB of memory.
const WINDOW_PAGES: u64 = 8192;

/// BLAKE3 of a page: as strong as SHA-256, and a fraction of its cost, which
/// the frozen tree has to wait for.
type PageDigest = [u8; 32];

/// No page was handed on.
const NEVER: PageDigest = [0; 32];

/// A page of zeros, which needs no hashing.
const ZEROS: PageDigest = [0xff; 32];

fn digest(page: &[u8]) -> PageDigest {
    if page == ZERO_PAGE {
        ZEROS
    } else {
        blake3::hash(page).into()
    }
}

/// What was handed on last for each page, by PID and address.
#[derive(Debug, Default)]
struct Known {
    extents: BTreeMap<(u32, u64), Box<[PageDigest; EXTENT_PAGES]>>,
}

/// The extent that holds a page, and the page's place there.
fn place(vaddr: u64) -> (u64, usize) {
    let page = vaddr / PAGE;
    let pages = EXTENT_PAGES as u64;
    (
        page / pages,
        usize::try_from(page % pages).unwrap_or_default(),
    )
}

impl Known {
    fn get(&self, pid: u32, vaddr: u64) -> PageDigest {
        let (extent, page) = place(vaddr);
        self.extents
            .get(&(pid, extent))
            .map_or(NEVER, |digests| digests[page])
    }

    /// Notes a page; `false` when it is the one noted before.
    fn note(&mut self, pid: u32, vaddr: u64, now: PageDigest) -> bool {
        let (extent, page) = place(vaddr);
        let digests = self
            .extents
            .entry((pid, extent))
            .or_insert_with(|| Box::new([NEVER; EXTENT_PAGES]));
        std::mem::replace(&mut digests[page], now) != now
    }
}

/// Pre-copy of one tree by content.
#[derive(Debug)]
pub struct ContentPrecopy {
    root: i32,
    limits: Limits,
    known: Known,
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
            last_start: None,
            buffer: BytesMut::new(),
        }
    }

    /// Whether this page of this process is what was handed on last for it.
    #[must_use]
    pub fn holds(&self, pid: u32, vaddr: u64, page: &[u8]) -> bool {
        let known = self.known.get(pid, vaddr);
        known != NEVER && known == digest(page)
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
                self.piece(pid, piece.start, &data.slice(at..end), sink, stats)
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

    async fn piece<S: PageSink>(
        &mut self,
        pid: i32,
        vaddr: u64,
        data: &Bytes,
        sink: &mut S,
        stats: &mut RoundStats,
    ) -> Result<(), RoundError<S::Error>> {
        let mut fresh = Vec::with_capacity(data.len() / PAGE_BYTES);
        for (page, at) in data
            .chunks_exact(PAGE_BYTES)
            .zip((vaddr..).step_by(PAGE_BYTES))
        {
            fresh.push(self.known.note(pid.unsigned_abs(), at, digest(page)));
        }
        stats.pages_scanned += fresh.len() as u64;
        for (pages, new) in alike(&fresh) {
            let count = pages.len() as u64;
            if !new {
                stats.pages_skipped += count;
                continue;
            }
            stats.pages_written += count;
            let start = vaddr + pages.start as u64 * PAGE;
            let content = data.slice(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES);
            let waiting = Instant::now();
            for (run, content) in runs(pid, start, &content) {
                if run.flags == PageRun::ZERO {
                    stats.zero_pages += run.pages;
                }
                stats.bytes += content.len() as u64;
                sink.pages(run, content)
                    .await
                    .map_err(|source| RoundError::Sink { source })?;
            }
            stats.sink_us += micros(waiting.elapsed());
        }
        Ok(())
    }
}

/// Lets others have their turn.
async fn breathe() {
    let mut breathed = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut breathed, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
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

/// Runs of equal flags, with their places; for pages that are new or not.
pub fn alike(flags: &[bool]) -> impl Iterator<Item = (Range<usize>, bool)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let flag = *flags.get(at)?;
        let start = at;
        at += flags[start..].iter().take_while(|&&f| f == flag).count();
        Some((start..at, flag))
    })
}

/// The populated pages of a range that are the process's own: not those that
/// are still the file's.
fn populated(
    pid: i32,
    pagemap: &File,
    range: &Range<u64>,
) -> Result<VecDeque<Range<u64>>, MemoryError> {
    /// Bits of an entry (kernel: `Documentation/admin-guide/mm/pagemap.rst`).
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    const ENTRY_BYTES: usize = 8;
    let pages = usize::try_from((range.end - range.start) / PAGE).unwrap_or_default();
    let mut entries = vec![0; pages * ENTRY_BYTES];
    pagemap
        .read_exact_at(&mut entries, range.start / PAGE * ENTRY_BYTES as u64)
        .map_err(|source| match source.kind() {
            // The memory it was opened for is gone.
            std::io::ErrorKind::UnexpectedEof => MemoryError::Gone { pid },
            _ => maps::proc_failed(pid, &format!("/proc/{pid}/pagemap"), source),
        })?;
    let mut found: VecDeque<Range<u64>> = VecDeque::new();
    let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
    for (entry, at) in entries.iter().zip((range.start..).step_by(PAGE_BYTES)) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & (PRESENT | SWAPPED) == 0 || entry & OF_FILE != 0 {
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

    #[test]
    fn a_page_is_held_only_as_it_was_handed_on() {
        let mut precopy = ContentPrecopy::new(1, Limits::default());
        let (a, b) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        let mut zero_but_one = ZERO_PAGE;
        zero_but_one[PAGE_BYTES - 1] = 1;
        for page in [&a, &b, &ZERO_PAGE, &zero_but_one] {
            assert!(!precopy.holds(7, 0x2000, page));
        }
        for page in [a, b, ZERO_PAGE, zero_but_one] {
            assert!(precopy.known.note(7, 0x2000, digest(&page)));
            assert!(!precopy.known.note(7, 0x2000, digest(&page)));
            for other in [a, b, ZERO_PAGE, zero_but_one] {
                assert_eq!(precopy.holds(7, 0x2000, &other), other == page);
                assert!(!precopy.holds(7, 0x1000, &other));
                assert!(!precopy.holds(8, 0x2000, &other));
            }
        }
    }

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

        #[test]
        fn alike_covers_all(flags: Vec<bool>) {
            let mut again = Vec::new();
            for (range, flag) in alike(&flags) {
                prop_assert!(!range.is_empty() && range.start == again.len());
                again.extend(range.map(|_| flag));
            }
            prop_assert_eq!(again, flags);
        }
    }
}
