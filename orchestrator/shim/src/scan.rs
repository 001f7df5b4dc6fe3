//! The question for soft-dirty pages, put in terms of the tracker.
//!
//! Pure: numbers in, numbers out. Names and values are those of the kernel's
//! `include/uapi/linux/fs.h`.

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
pub(crate) const PAGEMAP_SCAN: usize = 0xc060_6610;

/// `PAGE_IS_WPALLOWED`: the mapping is registered for asynchronous write
/// protection.
pub(crate) const WPALLOWED: u64 = 1 << 0;
/// `PAGE_IS_WRITTEN`: written since it was protected, or never protected.
pub(crate) const WRITTEN: u64 = 1 << 1;
/// `PAGE_IS_FILE`: belongs to a file, or is shared.
pub(crate) const FILE: u64 = 1 << 2;
/// `PAGE_IS_SOFT_DIRTY`.
pub(crate) const SOFT_DIRTY: u64 = 1 << 7;

/// The soft-dirty bit of an entry of `/proc/PID/pagemap`.
pub(crate) const PAGEMAP_SOFT_DIRTY: u64 = 1 << 55;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: *mut Region,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);

/// `PROCMAP_QUERY`: `_IOWR('f', 17, struct procmap_query)`, since Linux 6.11.
pub(crate) const PROCMAP_QUERY: usize = 0xc068_6611;

/// `PROCMAP_QUERY_VMA_SHARED`.
const SHARED: u64 = 1 << 3;

/// A scan of fewer bytes is not worth the question what is mapped there, and what
/// the kernel itself maps (`[vdso]`, `[uprobes]`) is far smaller.
pub(crate) const ANONYMOUS_BYTES_MIN: u64 = 2 << 20;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<MapQuery>() == 0x68);

impl MapQuery {
    /// Which mapping is at an address.
    pub(crate) fn at(address: u64) -> Self {
        Self {
            size: size_of::<Self>() as u64,
            query_addr: address,
            ..Self::default()
        }
    }

    /// Whether the mapping that was found is private memory without a file, and
    /// there is no other one in a range.
    pub(crate) fn is_anonymous(&self, start: u64, end: u64) -> bool {
        self.vma_start <= start
            && end <= self.vma_end
            && self.vma_flags & SHARED == 0
            && (self.inode, self.dev_major, self.dev_minor) == (0, 0, 0)
    }
}

/// What a scan is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing that concerns us.
    Other,
    /// It wants to know which pages are soft-dirty; the answer is ours.
    Asks,
    /// It selects pages by that bit, so that clean and dirty pages could not
    /// be told apart from what comes back. No known CRIU does.
    Selects,
}

impl ScanArg {
    pub(crate) fn kind(&self) -> Kind {
        let selected = self.category_inverted | self.category_mask | self.category_anyof_mask;
        if selected & SOFT_DIRTY != 0 {
            Kind::Selects
        } else if self.return_mask & SOFT_DIRTY != 0 {
            Kind::Asks
        } else {
            Kind::Other
        }
    }

    /// Whether a walk that has told of so many regions has come to the end: there was room
    /// for more. The kernel says so with 0 in `walk_end`, for which it puts `end`, unless its own
    /// buffer of 512 regions was full before: then it leaves there where that was
    /// (`do_pagemap_scan` of `fs/proc/task_mmu.c`, seen with Linux 6.18), and CRIU would ask
    /// for the rest once more.
    pub(crate) fn is_complete(&self, regions: i32) -> bool {
        u64::try_from(regions).is_ok_and(|regions| regions < self.vec_len) && self.max_pages == 0
    }

    /// Whether it wants no pages of files, and wants to know nothing else of
    /// them, in a range that may be worth a second look. The kernel looks at the
    /// descriptor of every page for that, 30 ms a GiB, while peers wait.
    pub(crate) fn spares_files(&self) -> bool {
        let says_not = self.category_mask & self.category_inverted & FILE != 0;
        let says_more = (self.category_anyof_mask | self.return_mask) & FILE != 0;
        let bytes = self.end.saturating_sub(self.start);
        says_not && !says_more && self.flags == 0 && bytes >= ANONYMOUS_BYTES_MIN
    }
}

/// What to ask the kernel for in place of `wanted`.
pub(crate) fn question(wanted: u64) -> u64 {
    (wanted & !SOFT_DIRTY) | WRITTEN | WPALLOWED
}

/// What to tell CRIU, who wanted to know `wanted`, about pages that are
/// `found` to be such by [`question`].
pub(crate) fn answer(wanted: u64, found: u64) -> u64 {
    let clean = found & WPALLOWED != 0 && found & WRITTEN == 0;
    let dirty = if clean { 0 } else { SOFT_DIRTY };
    (found & wanted & !SOFT_DIRTY) | dirty
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESENT: u64 = 1 << 3;
    const SWAPPED: u64 = 1 << 4;
    const GUARD: u64 = 1 << 8;
    /// What CRIU 4.2 asks for.
    const CRIU: u64 = PRESENT | SWAPPED | SOFT_DIRTY | GUARD;

    fn argument() -> ScanArg {
        ScanArg {
            size: 96,
            flags: 0,
            start: 0,
            end: 0,
            walk_end: 0,
            vec: core::ptr::null_mut(),
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: 0,
            return_mask: 0,
        }
    }

    #[test]
    fn a_walk_with_room_left_has_come_to_the_end() {
        let scan = ScanArg {
            vec_len: 4,
            ..argument()
        };
        assert!([0, 3].iter().all(|&regions| scan.is_complete(regions)));
        assert!([-1, 4].iter().all(|&regions| !scan.is_complete(regions)));
        let limited = ScanArg {
            max_pages: 1,
            ..scan
        };
        assert!(!limited.is_complete(1));
    }

    #[test]
    fn only_protected_and_unwritten_pages_are_clean() {
        for content in [PRESENT, SWAPPED, PRESENT | GUARD] {
            for (tracker, dirty) in [
                (WPALLOWED, false),
                (WPALLOWED | WRITTEN, true),
                (WRITTEN, true),
                // Not ours at all.
                (0, true),
            ] {
                let expected = content | if dirty { SOFT_DIRTY } else { 0 };
                assert_eq!(answer(CRIU, content | tracker), expected);
            }
        }
    }

    #[test]
    fn every_combination_says_what_was_asked_and_errs_to_dirty() {
        for wanted in 0..512 {
            let asked = question(wanted);
            assert_eq!(asked & SOFT_DIRTY, 0);
            assert_eq!(asked & (WRITTEN | WPALLOWED), WRITTEN | WPALLOWED);
            assert_eq!(
                asked & !(WRITTEN | WPALLOWED),
                wanted & !(SOFT_DIRTY | WRITTEN | WPALLOWED)
            );
            for found in 0..512 {
                let told = answer(wanted, found);
                // Nothing is made up but the one bit, and what was asked for
                // stays as it was found.
                assert_eq!(told & !SOFT_DIRTY, found & wanted & !SOFT_DIRTY);
                // Even a kernel that tracks soft-dirty pages is not asked.
                assert_eq!(
                    told & SOFT_DIRTY == 0,
                    found & (WRITTEN | WPALLOWED) == WPALLOWED
                );
            }
        }
    }

    #[test]
    fn only_a_scan_without_files_can_be_put_without_them() {
        let scan = ScanArg {
            end: ANONYMOUS_BYTES_MIN,
            category_mask: FILE,
            category_inverted: FILE,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: CRIU,
            ..argument()
        };
        assert!(scan.spares_files());
        for other in [
            ScanArg { end: 4096, ..scan },
            ScanArg { flags: 1, ..scan },
            ScanArg {
                category_inverted: 0,
                ..scan
            },
            ScanArg {
                category_mask: 0,
                ..scan
            },
            ScanArg {
                return_mask: FILE,
                ..scan
            },
            ScanArg {
                category_anyof_mask: FILE,
                ..scan
            },
        ] {
            assert!(!other.spares_files(), "{other:?}");
        }
    }

    #[test]
    fn a_mapping_is_anonymous_all_over_or_not() {
        let found = MapQuery {
            vma_start: 4096,
            vma_end: 12288,
            ..MapQuery::at(4096)
        };
        assert!(found.is_anonymous(4096, 12288) && found.is_anonymous(8192, 12288));
        assert!(!found.is_anonymous(0, 8192) && !found.is_anonymous(8192, 16384));
        for other in [
            MapQuery { inode: 7, ..found },
            MapQuery {
                dev_minor: 1,
                ..found
            },
            MapQuery {
                dev_major: 8,
                ..found
            },
            MapQuery {
                vma_flags: SHARED,
                ..found
            },
        ] {
            assert!(!other.is_anonymous(4096, 12288), "{other:?}");
        }
    }

    #[test]
    fn scans_are_told_apart() {
        assert_eq!(argument().kind(), Kind::Other);
        let scan = ScanArg {
            return_mask: PRESENT,
            ..argument()
        };
        assert_eq!(scan.kind(), Kind::Other);
        let scan = ScanArg {
            return_mask: CRIU,
            category_anyof_mask: PRESENT | SWAPPED,
            ..argument()
        };
        assert_eq!(scan.kind(), Kind::Asks);
        for scan in [
            ScanArg {
                category_mask: SOFT_DIRTY,
                ..scan
            },
            ScanArg {
                category_anyof_mask: SOFT_DIRTY | PRESENT,
                ..scan
            },
            ScanArg {
                category_inverted: SOFT_DIRTY,
                return_mask: 0,
                ..scan
            },
        ] {
            assert_eq!(scan.kind(), Kind::Selects);
        }
    }
}
