//! Shared segments that CRIU need not dump, because their pages reach the
//! destination another way.
//!
//! Their numbers stand in a page that is shared with whoever started CRIU, and
//! which he writes when the tree stands still:
//!
//! ```text
//!  0 u64 how many, written last
//!  8 u64 number of their device
//! 16 u64 number of the first inode, ...
//! ```

use core::sync::atomic::{AtomicU64, Ordering};

/// Words of the page.
pub(crate) const WORDS: usize = 512;

/// Bytes of the page.
pub(crate) const TABLE_BYTES: usize = WORDS * 8;

/// Most segments that it names.
const SEGMENTS_MAX: usize = WORDS - 2;

/// The page, as it is seen here.
pub(crate) type Table = [AtomicU64; WORDS];

/// Whether a file is among those that the table names.
pub(crate) fn named(table: &Table, device: u64, inode: u64) -> bool {
    let [count, of, inodes @ ..] = table;
    let count = usize::try_from(count.load(Ordering::Acquire)).unwrap_or(0);
    count > 0
        && of.load(Ordering::Relaxed) == device
        && inodes
            .iter()
            .take(count.min(SEGMENTS_MAX))
            .any(|known| known.load(Ordering::Relaxed) == inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_left_out() {
        let table: Table = [const { AtomicU64::new(0) }; WORDS];
        assert!(!named(&table, 0, 0));
        table[1].store(1, Ordering::Relaxed);
        table[2].store(7, Ordering::Relaxed);
        table[3].store(9, Ordering::Relaxed);
        assert!(!named(&table, 1, 7));
        table[0].store(1, Ordering::Release);
        assert!(named(&table, 1, 7));
        for (device, inode) in [(1, 9), (1, 0), (2, 7), (0, 7)] {
            assert!(!named(&table, device, inode));
        }
        // A number that cannot be is no harm.
        table[0].store(u64::MAX, Ordering::Release);
        assert!(named(&table, 1, 9));
        assert!(!named(&table, 1, 8));
    }
}
