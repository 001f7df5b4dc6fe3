//! What was handed on last for each page, by its digest.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use migrate_core::wire::{PAGE_BYTES, PageOwner};

use crate::error::RoundError;
use crate::rounds::{PageSink, RoundStats, hand_on};
use crate::{PAGE, ZERO_PAGE};

/// Pages whose digests lie together: 2 MiB of memory.
const EXTENT_PAGES: usize = 512;

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

/// What was handed on last for each page, by owner and address.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    extents: BTreeMap<(PageOwner, u64), Box<[PageDigest; EXTENT_PAGES]>>,
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
    fn get(&self, owner: PageOwner, vaddr: u64) -> PageDigest {
        let (extent, page) = place(vaddr);
        self.extents
            .get(&(owner, extent))
            .map_or(NEVER, |digests| digests[page])
    }

    /// Notes a page; `false` when it is the one noted before.
    fn note(&mut self, owner: PageOwner, vaddr: u64, now: PageDigest) -> bool {
        let (extent, page) = place(vaddr);
        let digests = self
            .extents
            .entry((owner, extent))
            .or_insert_with(|| Box::new([NEVER; EXTENT_PAGES]));
        std::mem::replace(&mut digests[page], now) != now
    }

    /// Whether this page is what was handed on last for its place.
    pub(crate) fn holds(&self, owner: PageOwner, vaddr: u64, page: &[u8]) -> bool {
        let known = self.get(owner, vaddr);
        known != NEVER && known == digest(page)
    }

    /// Forgets an owner.
    pub(crate) fn forget(&mut self, owner: PageOwner) {
        let of_owner: Vec<_> = self
            .extents
            .range((owner, 0)..=(owner, u64::MAX))
            .map(|(&key, _)| key)
            .collect();
        for key in of_owner {
            self.extents.remove(&key);
        }
    }

    /// Hands on what of these pages is not as it was handed on last.
    pub(crate) async fn hand_on<S: PageSink>(
        &mut self,
        owner: PageOwner,
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
            fresh.push(self.note(owner, at, digest(page)));
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
            hand_on(owner, start, &content, sink, stats)
                .await
                .map_err(|source| RoundError::Sink { source })?;
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_is_held_only_as_it_was_handed_on() {
        let mut known = Known::default();
        let (a, b) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        let mut zero_but_one = ZERO_PAGE;
        zero_but_one[PAGE_BYTES - 1] = 1;
        let owner = PageOwner::Task(7);
        let others = [PageOwner::Task(8), PageOwner::Shared(7)];
        for page in [&a, &b, &ZERO_PAGE, &zero_but_one] {
            assert!(!known.holds(owner, 0x2000, page));
        }
        for page in [a, b, ZERO_PAGE, zero_but_one] {
            assert!(known.note(owner, 0x2000, digest(&page)));
            assert!(!known.note(owner, 0x2000, digest(&page)));
            for other in [a, b, ZERO_PAGE, zero_but_one] {
                assert_eq!(known.holds(owner, 0x2000, &other), other == page);
                assert!(!known.holds(owner, 0x1000, &other));
                assert!(others.iter().all(|&o| !known.holds(o, 0x2000, &other)));
            }
        }
        known.note(others[1], 0x2000, digest(&a));
        known.forget(owner);
        assert!(!known.holds(owner, 0x2000, &zero_but_one));
        assert!(known.holds(others[1], 0x2000, &a));
    }

    proptest! {
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
