//! The destination's page store: the latest content of every page.
//!
//! Pages lie in extents of 2 MiB by address, so that a long run is one copy and
//! reading in order is one slice per extent. Zero pages are remembered by a bit.
//! Content lies in a file without a name, so that another process can go on
//! with it when this one has ended.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};
use sha2::{Digest as _, Sha256};

use crate::arena::Arena;
use crate::error::StoreError;
use crate::mask::{EXTENT_PAGES, Mask, SomePages};
use crate::{PAGE, ZERO_PAGE};

/// Bytes of an extent.
const EXTENT_BYTES: u64 = EXTENT_PAGES as u64 * PAGE;

#[derive(Debug, Default)]
struct Extent {
    /// Pages with content in `data`.
    data_pages: Mask,
    /// Pages known to be zero.
    zero_pages: Mask,
    /// Pages of the slot that were ever written to, and so take up memory.
    touched: Mask,
    /// Pages that came again with other content.
    rewritten: Mask,
    /// Where in the file the content is, all of the extent, of which the
    /// kernel provides what is touched. None until there is some.
    slot: Option<usize>,
}

/// What the store has for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Content.
    Data,
    /// Nothing but zeros.
    Zero,
    /// Nothing: it never came.
    Missing,
}

impl Extent {
    fn held(&self, page: usize) -> Held {
        if self.data_pages.has(page) {
            Held::Data
        } else if self.zero_pages.has(page) {
            Held::Zero
        } else {
            Held::Missing
        }
    }

    /// Where the pages end that are held as this one is.
    fn same(&self, page: usize) -> usize {
        match self.held(page) {
            Held::Data => self.data_pages.next(page, false),
            Held::Zero => self.zero_pages.next(page, false),
            Held::Missing => self.data_pages.or(&self.zero_pages).next(page, true),
        }
    }

    fn empty(&self) -> bool {
        self.data_pages == Mask::default() && self.zero_pages == Mask::default()
    }

    fn page_bytes(pages: Range<usize>) -> Range<usize> {
        pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
    }
}

/// Content of pages side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// One or more pages.
    Data(&'a [u8]),
    /// This many pages of zeros.
    Zero(u64),
}

impl Content<'_> {
    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64 / PAGE,
            Self::Zero(pages) => *pages,
        }
    }
}

/// Pages side by side, with their content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Address of the first.
    pub vaddr: u64,
    /// What they hold.
    pub content: Content<'a>,
}

/// A part of CRIU's final list, with what the store has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// The part; owner and flags are those of the entry it comes from.
    pub run: PageRun,
    /// The same for each of its pages.
    pub held: Held,
}

/// Pages of a tree, by owner and address.
#[derive(Debug)]
pub struct PageStore {
    owners: BTreeMap<PageOwner, BTreeMap<u64, Extent>>,
    arena: Arena,
    limit_bytes: u64,
    held_bytes: u64,
}

impl PageStore {
    /// An empty store that never holds more than `limit_bytes` of content.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            owners: BTreeMap::new(),
            arena: Arena::default(),
            limit_bytes,
            held_bytes: 0,
        }
    }

    /// Memory taken up by content, in bytes. Pages that were dropped or became
    /// zero count until their whole extent is empty.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Whose pages there are.
    pub fn owners(&self) -> impl Iterator<Item = PageOwner> {
        self.owners.keys().copied()
    }

    /// Takes a run of pages in place of whatever was held for them. Pages that
    /// hold nothing but zeros take up no memory.
    ///
    /// # Errors
    ///
    /// The store is full, or the run has neither data nor [`PageRun::ZERO`]. A
    /// run may have been taken in part then.
    pub fn put(&mut self, run: PageRun, data: &[u8]) -> Result<(), StoreError> {
        let malformed = StoreError::Malformed {
            owner: run.owner,
            vaddr: run.vaddr,
            pages: run.pages,
        };
        let range = range_of(&run).ok_or_else(|| malformed.clone())?;
        let zero = run.flags & PageRun::ZERO != 0;
        let present = run.flags & PageRun::PRESENT != 0;
        if !zero && !present {
            return Err(StoreError::NoData {
                owner: run.owner,
                vaddr: run.vaddr,
            });
        }
        if (zero && (present || !data.is_empty()))
            || (present && data.len() as u64 != range.end - range.start)
        {
            return Err(malformed);
        }
        let extents = self.owners.entry(run.owner).or_default();
        let mut data = data;
        for (base, pages) in extent_pieces(range) {
            let extent = extents.entry(base).or_default();
            if zero {
                for page in pages {
                    extent.data_pages.set(page, false);
                    extent.zero_pages.set(page, true);
                }
                continue;
            }
            let (part, rest) = data.split_at(pages.len() * PAGE_BYTES);
            data = rest;
            let room = Room {
                arena: &mut self.arena,
                held_bytes: &mut self.held_bytes,
                limit_bytes: self.limit_bytes,
            };
            fill(extent, pages, part, room)?;
        }
        Ok(())
    }

    /// Forgets the pages of a range.
    pub fn drop_range(&mut self, owner: PageOwner, range: Range<u64>) {
        let range = range.start / PAGE * PAGE..range.end.div_ceil(PAGE).saturating_mul(PAGE);
        let Some(extents) = self.owners.get_mut(&owner) else {
            return;
        };
        let first = range.start / EXTENT_BYTES * EXTENT_BYTES;
        let bases: Vec<u64> = extents
            .range(first..range.end.max(first))
            .map(|(&base, _)| base)
            .collect();
        for base in bases {
            let start = range.start.max(base);
            let end = range.end.min(base.saturating_add(EXTENT_BYTES));
            if start >= end {
                continue;
            }
            if let Some(extent) = extents.get_mut(&base) {
                for page in page_at(start - base)..page_at(end - base) {
                    extent.data_pages.set(page, false);
                    extent.zero_pages.set(page, false);
                }
                if extent.empty() {
                    self.held_bytes -= extent.touched.count() * PAGE;
                    if let Some(slot) = extent.slot {
                        self.arena.give_back(slot);
                    }
                    extents.remove(&base);
                }
            }
        }
        if extents.is_empty() {
            self.owners.remove(&owner);
        }
    }

    /// Forgets everything of an owner.
    pub fn drop_owner(&mut self, owner: PageOwner) {
        if let Some(extents) = self.owners.remove(&owner) {
            for extent in extents.values() {
                self.held_bytes -= extent.touched.count() * PAGE;
                if let Some(slot) = extent.slot {
                    self.arena.give_back(slot);
                }
            }
        }
    }

    /// What the store has for CRIU's final list, in its order: entries are
    /// split where that changes. [`Held::Missing`] parts have to come from
    /// elsewhere; the frozen tree still has them.
    pub fn resolve<'a>(&'a self, entries: &'a [PageRun]) -> impl Iterator<Item = Holding> + 'a {
        entries.iter().flat_map(|entry| {
            let mut holdings: Vec<Holding> = Vec::new();
            let Some(range) = range_of(entry) else {
                return holdings;
            };
            for (vaddr, pages, held) in self.spans(entry.owner, range) {
                match holdings.last_mut() {
                    Some(last) if last.held == held => last.run.pages += pages,
                    _ => holdings.push(Holding {
                        run: PageRun {
                            vaddr,
                            pages,
                            ..*entry
                        },
                        held,
                    }),
                }
            }
            holdings
        })
    }

    /// Forgets every page of the owner that the final list does not name: it
    /// was unmapped, or given back, since it came. Entries ascend.
    pub fn retain(&mut self, owner: PageOwner, entries: &[PageRun]) {
        let mut at = 0;
        for entry in entries.iter().filter(|entry| entry.owner == owner) {
            let Some(range) = range_of(entry) else {
                continue;
            };
            self.drop_range(owner, at..range.start.max(at));
            at = at.max(range.end);
        }
        self.drop_range(owner, at..u64::MAX / PAGE * PAGE);
    }

    /// The pages of an owner, in order of addresses; never copied.
    pub fn pages(&self, owner: PageOwner) -> impl Iterator<Item = Piece<'_>> {
        self.owners
            .get(&owner)
            .into_iter()
            .flatten()
            .flat_map(|(&base, extent)| self.pieces(base, extent, 0..EXTENT_PAGES))
    }

    /// The pages of an owner within a range, in order of addresses; pages that
    /// are missing are left out.
    pub fn range(&self, owner: PageOwner, range: Range<u64>) -> impl Iterator<Item = Piece<'_>> {
        let extents = self.owners.get(&owner);
        extent_pieces(range)
            .filter_map(move |(base, pages)| {
                let extent = extents?.get(&base)?;
                Some(self.pieces(base, extent, pages))
            })
            .flatten()
    }

    /// One page: its content, zeros included. `None` when it is missing.
    #[must_use]
    pub fn page(&self, owner: PageOwner, vaddr: u64) -> Option<&[u8]> {
        let base = vaddr / EXTENT_BYTES * EXTENT_BYTES;
        let extent = self.owners.get(&owner)?.get(&base)?;
        let page = page_at(vaddr - base);
        match extent.held(page) {
            Held::Data => self.content(extent, page..page + 1),
            Held::Zero => Some(&ZERO_PAGE),
            Held::Missing => None,
        }
    }

    /// Digest of all that is held of an owner; see [`MemoryDigest`].
    #[must_use]
    pub fn digest(&self, owner: PageOwner, masks: &[(u64, u32)]) -> [u8; 32] {
        let mut digest = MemoryDigest::without(masks);
        for piece in self.pages(owner) {
            if let Content::Data(data) = piece.content {
                digest.add(piece.vaddr, data);
            }
        }
        digest.finish()
    }

    /// The file that content lies in.
    ///
    /// # Errors
    ///
    /// There is no content yet.
    pub(crate) fn file(&self) -> io::Result<BorrowedFd<'_>> {
        self.arena.file()
    }

    /// Where in the file the content is that [`range`](Self::range) has shown.
    pub(crate) fn offset(&self, content: &[u8]) -> u64 {
        self.arena.offset(content)
    }

    /// Pages that came more than once: the tree has written to them between
    /// rounds and is likely to do so again.
    #[must_use]
    pub fn rewritten(&self) -> Vec<SomePages> {
        let extents = self
            .owners
            .iter()
            .flat_map(|(&owner, extents)| extents.iter().map(move |extent| (owner, extent)));
        let again = extents.map(|(owner, (&base, extent))| SomePages {
            owner,
            base,
            pages: extent.rewritten.and(&extent.data_pages),
        });
        again.filter(|some| some.pages != Mask::default()).collect()
    }

    fn content(&self, extent: &Extent, pages: Range<usize>) -> Option<&[u8]> {
        self.arena
            .bytes(extent.slot?)
            .get(Extent::page_bytes(pages))
    }

    /// What an extent has of some of its pages, in order.
    fn pieces<'a>(
        &'a self,
        base: u64,
        extent: &'a Extent,
        pages: Range<usize>,
    ) -> impl Iterator<Item = Piece<'a>> {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            let start = extent.data_pages.or(&extent.zero_pages).next(at, true);
            if start >= pages.end {
                return None;
            }
            let held = extent.held(start);
            let end = extent.same(start).min(pages.end);
            at = end;
            let content = if held == Held::Data {
                Content::Data(self.content(extent, start..end)?)
            } else {
                Content::Zero((end - start) as u64)
            };
            Some(Piece {
                vaddr: base + start as u64 * PAGE,
                content,
            })
        })
    }

    /// What is held, page after page, the same kinds together.
    fn spans(
        &self,
        owner: PageOwner,
        range: Range<u64>,
    ) -> impl Iterator<Item = (u64, u64, Held)> + '_ {
        let extents = self.owners.get(&owner);
        extent_pieces(range).flat_map(move |(base, pages)| {
            let mut spans: Vec<(u64, u64, Held)> = Vec::new();
            match extents.and_then(|extents| extents.get(&base)) {
                None => spans.push((
                    base + pages.start as u64 * PAGE,
                    pages.len() as u64,
                    Held::Missing,
                )),
                Some(extent) => {
                    let mut at = pages.start;
                    while at < pages.end {
                        let end = extent.same(at).min(pages.end);
                        let vaddr = base + at as u64 * PAGE;
                        spans.push((vaddr, (end - at) as u64, extent.held(at)));
                        at = end;
                    }
                }
            }
            spans
        })
    }
}

/// Where content goes, and how much more may.
struct Room<'a> {
    arena: &'a mut Arena,
    held_bytes: &'a mut u64,
    limit_bytes: u64,
}

/// Copies pages into an extent, zero pages excepted.
fn fill(
    extent: &mut Extent,
    pages: Range<usize>,
    data: &[u8],
    room: Room<'_>,
) -> Result<(), StoreError> {
    let limit_bytes = room.limit_bytes;
    let first = pages.start;
    let mut at = pages.start;
    while at < pages.end {
        let content = |page: usize| &data[Extent::page_bytes(page - first..page - first + 1)];
        let zero = content(at) == ZERO_PAGE;
        let end = (at + 1..pages.end)
            .find(|&page| (content(page) == ZERO_PAGE) != zero)
            .unwrap_or(pages.end);
        if !zero {
            let fresh = (at..end).filter(|&page| !extent.touched.has(page)).count() as u64 * PAGE;
            if *room.held_bytes + fresh > limit_bytes {
                return Err(StoreError::Full { limit_bytes });
            }
            *room.held_bytes += fresh;
            let slot = match extent.slot {
                Some(slot) => slot,
                None => *extent.slot.insert(room.arena.take()?),
            };
            let bytes = &data[Extent::page_bytes(at - first..end - first)];
            room.arena.write(slot, at * PAGE_BYTES, bytes)?;
        }
        for page in at..end {
            if extent.held(page) != Held::Missing {
                extent.rewritten.set(page, true);
            }
            extent.data_pages.set(page, !zero);
            extent.zero_pages.set(page, zero);
            if !zero {
                extent.touched.set(page, true);
            }
        }
        at = end;
    }
    Ok(())
}

/// The addresses of a run. `None` when they are impossible.
fn range_of(run: &PageRun) -> Option<Range<u64>> {
    let end = run.vaddr.checked_add(run.pages.checked_mul(PAGE)?)?;
    // One extent more, so that no sum below can overflow.
    end.checked_add(EXTENT_BYTES)?;
    (run.vaddr.is_multiple_of(PAGE) && run.pages > 0).then_some(run.vaddr..end)
}

/// The extents that a range touches, and which of their pages.
fn extent_pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let base = at / EXTENT_BYTES * EXTENT_BYTES;
        let end = range.end.min(base.saturating_add(EXTENT_BYTES));
        let pages = page_at(at - base)..page_at(end - base);
        at = end;
        Some((base, pages))
    })
}

/// An offset into a page.
fn page_offset(offset: u64) -> usize {
    usize::try_from(offset.min(PAGE)).unwrap_or(PAGE_BYTES)
}

/// The page at an offset into an extent.
fn page_at(offset: u64) -> usize {
    usize::try_from(offset.min(EXTENT_BYTES) / PAGE).unwrap_or(EXTENT_PAGES)
}

/// Digest of memory that does not depend on how it was sent: SHA-256 over
/// address and content of each page, in order of addresses, pages of zeros left
/// out, since absent anonymous memory reads as zeros.
#[derive(Debug, Clone, Default)]
pub struct MemoryDigest {
    hash: Sha256,
    /// Areas that do not count, ascending, none of which touch.
    masks: Vec<Range<u64>>,
}

impl MemoryDigest {
    /// Of no memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Of no memory; areas in `masks` (address and length) will not count. They
    /// are what the kernel writes by itself, whether the task runs or not.
    #[must_use]
    pub fn without(masks: &[(u64, u32)]) -> Self {
        let mut areas: Vec<Range<u64>> = masks
            .iter()
            .map(|&(address, length)| address..address.saturating_add(u64::from(length)))
            .collect();
        areas.sort_by_key(|area| (area.start, area.end));
        // None begins or ends before the one before it, so that the first of a
        // page is found by its end.
        areas.dedup_by(|next, kept| {
            let overlaps = next.start <= kept.end;
            if overlaps {
                kept.end = kept.end.max(next.end);
            }
            overlaps
        });
        Self {
            hash: Sha256::default(),
            masks: areas,
        }
    }

    /// Adds pages side by side; addresses ascend from call to call. A part of a
    /// page at the end is ignored.
    pub fn add(&mut self, vaddr: u64, data: &[u8]) {
        for (page, at) in data
            .chunks_exact(PAGE_BYTES)
            .zip((vaddr..).step_by(PAGE_BYTES))
        {
            let first = self.masks.partition_point(|area| area.end <= at);
            let mut masks = self.masks[first..]
                .iter()
                .take_while(|area| area.start < at + PAGE)
                .peekable();
            let mut masked = [0; PAGE_BYTES];
            let page = if masks.peek().is_some() {
                masked.copy_from_slice(page);
                for area in masks {
                    let inside = |address: u64| page_offset(address.clamp(at, at + PAGE) - at);
                    masked[inside(area.start)..inside(area.end)].fill(0);
                }
                &masked
            } else {
                page
            };
            if page != ZERO_PAGE {
                self.hash.update(at.to_le_bytes());
                self.hash.update(page);
            }
        }
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> [u8; 32] {
        self.hash.finalize().into()
    }
}
