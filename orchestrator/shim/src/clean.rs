//! Clean pages that CRIU need not hear of, because whoever has started it lists them.
//!
//! For every clean page CRIU goes once around its loop (`generate_iovs` of
//! `criu/mem.c`), some 10 ms a GiB while the tree stands still, and that for nothing but
//! a list with that page in it. So they are taken out of the answer that it gets, and go
//! another way to the one who reads CRIU's list and puts them back in:
//!
//! ```text
//!      0 u64 how many tasks, written last by who has started CRIU
//!      8 u64 bytes of whole records, written last by us
//!     16 u64 PID of the first task, ...
//! 32,768     records, one after the other: PID, first address, first address behind it
//! ```
//!
//! The tasks are those whose clean pages have gone over. Only a scan of a whole range of one
//! mapping without a file is looked at: CRIU makes no such scan twice.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::scan::{self, Region};
use crate::sys::{address, call, number};

/// Words of the table, which is shared memory.
pub(crate) const WORDS: usize = 4096;

/// Bytes of the table; records begin there.
pub(crate) const TABLE_BYTES: usize = WORDS * 8;

/// Most tasks that it names.
const TASKS_MAX: usize = WORDS - 2;

/// The table, as it is seen here.
pub(crate) type Table = [AtomicU64; WORDS];

/// `PAGE_IS_GUARD` of `linux/fs.h`: CRIU looks at such pages itself.
const GUARD: u64 = 1 << 8;

/// Whether the table names a task.
pub(crate) fn named(table: &Table, process: u32) -> bool {
    let [count, _, tasks @ ..] = table;
    let count = usize::try_from(count.load(Ordering::Acquire)).unwrap_or(0);
    tasks
        .iter()
        .take(count.min(TASKS_MAX))
        .any(|known| known.load(Ordering::Relaxed) == u64::from(process))
}

/// Whether pages of this kind, as the kernel tells of it, are for the records.
fn is_for_records(region: &Region) -> bool {
    scan::answer(scan::SOFT_DIRTY, region.categories) == 0 && region.categories & GUARD == 0
}

/// Records in one write.
const RECORDS: usize = 128;

/// Takes the clean ones out of the regions that the kernel has told of, of a task that the
/// table names; how many are left, from the first on. All are left where the records
/// cannot be written.
///
/// # Safety
///
/// There are as many regions, and nobody else's.
pub(crate) unsafe fn take(
    table: &Table,
    file: isize,
    process: u32,
    regions: *mut Region,
    count: usize,
) -> usize {
    // SAFETY: the caller's promise.
    let told = unsafe { core::slice::from_raw_parts_mut(regions, count) };
    let [_, written, ..] = table;
    let before = written.load(Ordering::Relaxed);
    let mut end = before;
    let mut records = [[0_u64; 3]; RECORDS];
    let mut length = 0;
    let mut flush = |records: &[[u64; 3]], length: usize| {
        let bytes = (length * size_of::<[u64; 3]>()).cast_signed();
        let Ok(at) = isize::try_from(TABLE_BYTES as u64 + end) else {
            return false;
        };
        // SAFETY: as many bytes as there are.
        let done = unsafe {
            call(
                number::PWRITE64,
                [file, address(records.as_ptr()), bytes, at, 0, 0],
            )
        };
        end += bytes.cast_unsigned() as u64;
        done == bytes
    };
    for region in told.iter().filter(|region| is_for_records(region)) {
        if let Some(record) = records.get_mut(length) {
            *record = [u64::from(process), region.start, region.end];
            length += 1;
        }
        if length == RECORDS {
            if !flush(&records, length) {
                return count;
            }
            length = 0;
        }
    }
    if length > 0 && !flush(&records, length) {
        return count;
    }
    if end == before {
        return count;
    }
    written.store(end, Ordering::Release);
    let mut left = 0;
    for index in 0..count {
        // SAFETY: within the regions.
        unsafe {
            let region = regions.add(index).read();
            if !is_for_records(&region) {
                regions.add(left).write(region);
                left += 1;
            }
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd as _, FromRawFd as _};
    use std::os::unix::fs::FileExt as _;
    use std::vec::Vec;

    const PRESENT: u64 = 1 << 3;
    const CLEAN: u64 = PRESENT | scan::WPALLOWED;
    const WRITTEN: u64 = CLEAN | scan::WRITTEN;

    fn region(start: u64, end: u64, categories: u64) -> Region {
        Region {
            start,
            end,
            categories,
        }
    }

    #[test]
    fn clean_regions_go_into_the_records() {
        let table: Table = [const { AtomicU64::new(0) }; WORDS];
        assert!(!named(&table, 0) && !named(&table, 7));
        table[2].store(7, Ordering::Relaxed);
        table[0].store(1, Ordering::Relaxed);
        assert!(named(&table, 7) && !named(&table, 8) && !named(&table, 0));
        table[0].store(u64::MAX, Ordering::Relaxed);
        assert!(named(&table, 7) && !named(&table, 8));

        // SAFETY: a new descriptor.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"records".as_ptr(), 0)) };
        let fd = isize::try_from(file.as_raw_fd()).unwrap();
        let kinds = [CLEAN, WRITTEN, PRESENT, CLEAN | GUARD, CLEAN];
        let many: Vec<Region> = (0..1000)
            .map(|at| {
                region(
                    at * 10,
                    at * 10 + 10,
                    kinds[usize::try_from(at % 5).unwrap()],
                )
            })
            .collect();
        let mut regions = many.clone();
        // SAFETY: as many as there are.
        let left = unsafe { take(&table, fd, 7, regions.as_mut_ptr(), regions.len()) };
        let (gone, kept): (Vec<Region>, Vec<Region>) =
            many.iter().partition(|region| region.categories == CLEAN);
        assert_eq!(regions[..left], kept);
        let bytes = table[1].load(Ordering::Relaxed);
        assert_eq!(bytes, gone.len() as u64 * 24);
        let mut record = [0; 24];
        file.read_exact_at(&mut record, TABLE_BYTES as u64 + bytes - 24)
            .unwrap();
        let words = [7, 9990, 10000].map(u64::to_ne_bytes).concat();
        assert_eq!(record[..], words);

        // Where they cannot be written nothing is taken out.
        let mut regions = many.clone();
        // SAFETY: as many as there are.
        let left = unsafe { take(&table, -1, 7, regions.as_mut_ptr(), regions.len()) };
        assert_eq!(regions[..left], many);
        assert_eq!(table[1].load(Ordering::Relaxed), bytes);
    }
}
