//! Which pages of an extent.

use std::ops::Range;

use migrate_core::wire::{PAGE_BYTES, PageOwner};

use crate::PAGE;
use crate::arena::SLOT_BYTES;

/// Pages of an extent: 2 MiB, a huge page on x86_64.
pub(crate) const EXTENT_PAGES: usize = SLOT_BYTES / PAGE_BYTES;

/// Words of a [`Mask`].
pub(crate) const MASK_WORDS: usize = EXTENT_PAGES / 64;

/// One bit for each page of an extent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mask(pub(crate) [u64; MASK_WORDS]);

impl Mask {
    pub(crate) fn has(&self, page: usize) -> bool {
        self.0[page / 64] & (1 << (page % 64)) != 0
    }

    pub(crate) fn set(&mut self, page: usize, on: bool) {
        let bit = 1 << (page % 64);
        if on {
            self.0[page / 64] |= bit;
        } else {
            self.0[page / 64] &= !bit;
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Those of both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// Those of either.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// The first page from `page` on that is in the mask, or that is not;
    /// [`EXTENT_PAGES`] where there is none.
    pub(crate) fn next(&self, page: usize, on: bool) -> usize {
        let mut at = page;
        while at < EXTENT_PAGES {
            let word = self.0[at / 64];
            let wanted = if on { word } else { !word } >> (at % 64);
            if wanted != 0 {
                return at + wanted.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        EXTENT_PAGES
    }
}

/// Some pages of one extent: a list of them that stays short, however many there are and
/// wherever they lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SomePages {
    /// Whose.
    pub(crate) owner: PageOwner,
    /// Where the extent begins.
    pub(crate) base: u64,
    pub(crate) pages: Mask,
}

impl SomePages {
    /// Takes out the first of them, as many as lie side by side.
    pub(crate) fn pop(&mut self) -> Option<Range<u64>> {
        let start = self.pages.next(0, true);
        if start == EXTENT_PAGES {
            return None;
        }
        let end = self.pages.next(start, false);
        for page in start..end {
            self.pages.set(page, false);
        }
        // A base is the wire's word, and may be any number.
        let at = |page: usize| self.base.saturating_add(page as u64 * PAGE);
        Some(at(start)..at(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn mask() -> impl Strategy<Value = Mask> {
        // Long runs, ends of words, and single pages.
        let word = prop_oneof![
            Just(0),
            Just(u64::MAX),
            any::<u64>(),
            (0_u32..64).prop_map(|n| 1 << n)
        ];
        prop::array::uniform8(word).prop_map(Mask)
    }

    proptest! {
        #[test]
        fn a_mask_is_a_table(mask in mask(), other in mask(), from in 0..=EXTENT_PAGES) {
            for on in [false, true] {
                let expected = (from..EXTENT_PAGES).find(|&page| mask.has(page) == on);
                prop_assert_eq!(mask.next(from, on), expected.unwrap_or(EXTENT_PAGES));
            }
            for page in 0..EXTENT_PAGES {
                prop_assert_eq!(mask.and(&other).has(page), mask.has(page) && other.has(page));
                prop_assert_eq!(mask.or(&other).has(page), mask.has(page) || other.has(page));
            }
        }

        #[test]
        fn some_pages_are_popped_in_order(mask in mask()) {
            let mut some = SomePages { owner: PageOwner::Task(1), base: 7 * PAGE, pages: mask };
            let mut seen = Mask::default();
            let mut last = 0;
            while let Some(range) = some.pop() {
                prop_assert!(range.start > last);
                last = range.end;
                for at in range.step_by(PAGE_BYTES) {
                    seen.set(usize::try_from(at / PAGE - 7).unwrap(), true);
                }
            }
            prop_assert_eq!(seen, mask);
        }
    }
}
