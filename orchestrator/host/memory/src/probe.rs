//! Whether this host can track memory: tried, not read off a version.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::PAGE;
use crate::error::Unsupported;
use crate::sys::{self, Region, ScanMode, TrialPage, Uffd};

/// What this host's kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// Guard pages (`MADV_GUARD_INSTALL`) can be told from swapped ones, which
    /// came with Linux 6.15.
    pub guard_pages: bool,
}

/// Tracks a page of this process for a moment: watch, write, scan.
///
/// # Errors
///
/// What is missing here.
pub fn probe() -> Result<Support, Unsupported> {
    if !cfg!(target_arch = "x86_64") {
        return Err(Unsupported::Architecture);
    }
    let uffd = Uffd::own().map_err(|source| Unsupported::Userfaultfd { source })?;
    let uffd = Uffd::set_up(uffd).map_err(|source| Unsupported::WpAsync { source })?;
    let pagemap =
        File::open("/proc/self/pagemap").map_err(|source| Unsupported::PagemapScan { source })?;
    let mut page = TrialPage::new().map_err(|source| Unsupported::Userfaultfd { source })?;
    page.write(1);
    uffd.register(&page.range())
        .map_err(|source| Unsupported::WpAsync { source })?;
    let look = |guards| {
        let mut regions = [Region::default()];
        sys::scan(
            &pagemap,
            &page.range(),
            ScanMode::Look,
            guards,
            &mut regions,
        )
    };
    let guard_pages = look(true).is_ok();
    let scan = |page: &TrialPage| {
        let mut regions = [Region::default()];
        sys::scan(
            &pagemap,
            &page.range(),
            ScanMode::Protect,
            guard_pages,
            &mut regions,
        )
        .map(|(found, _)| found == 1 && regions[0].written())
        .map_err(|source| Unsupported::PagemapScan { source })
    };
    let first = scan(&page)?;
    let untouched = scan(&page)?;
    page.write(2);
    let touched = scan(&page)?;
    match (first, untouched, touched) {
        (true, false, true) => Ok(Support { guard_pages }),
        (false, _, _) => Err(Unsupported::Trial {
            what: "a page written to before counts as clean",
        }),
        (_, true, _) => Err(Unsupported::Trial {
            what: "a page left alone counts as written",
        }),
        (_, _, false) => Err(Unsupported::Trial {
            what: "a page written to counts as clean",
        }),
    }
}

/// Whether the kernel marks pages that are written to, seen on one of our own.
///
/// # Errors
///
/// It does not, or its word cannot be read.
pub fn probe_soft_dirty() -> Result<(), Unsupported> {
    /// Bit of an entry (kernel: `Documentation/admin-guide/mm/soft-dirty.rst`).
    const SOFT_DIRTY: u64 = 1 << 55;
    let pagemap =
        File::open("/proc/self/pagemap").map_err(|source| Unsupported::Pagemap { source })?;
    let mut page = TrialPage::new().map_err(|source| Unsupported::Pagemap { source })?;
    page.write(1);
    let mut entry = [0; size_of::<u64>()];
    let at = page.range().start / PAGE * entry.len() as u64;
    pagemap
        .read_exact_at(&mut entry, at)
        .map_err(|source| Unsupported::Pagemap { source })?;
    if u64::from_ne_bytes(entry) & SOFT_DIRTY == 0 {
        return Err(Unsupported::NoSoftDirty);
    }
    Ok(())
}
