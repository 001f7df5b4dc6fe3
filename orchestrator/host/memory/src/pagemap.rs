//! Entries of `/proc/PID/pagemap`, one for each page (kernel:
//! `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use crate::PAGE;
use crate::sys::TrialPage;

const ENTRY_BYTES: usize = 8;

/// What the kernel says of one page of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    /// Zeros without the privilege to see it.
    const FRAME: u64 = (1 << 55) - 1;

    /// There is a page, or its content lies in swap.
    pub(crate) fn populated(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0
    }

    /// The page is a file's, or shared memory.
    pub(crate) fn of_file(self) -> bool {
        self.0 & Self::OF_FILE != 0
    }

    /// The page frame, where this process may know it.
    fn frame(self) -> Option<u64> {
        let frame = self.0 & Self::FRAME;
        (self.0 & Self::PRESENT != 0 && frame != 0).then_some(frame)
    }
}

/// The entries of the pages of a range.
///
/// # Errors
///
/// The kernel's; [`io::ErrorKind::UnexpectedEof`] when the memory that the file
/// was opened for is gone.
pub(crate) fn entries(pagemap: &File, range: &Range<u64>) -> io::Result<Vec<Entry>> {
    let pages = usize::try_from((range.end - range.start) / PAGE).unwrap_or_default();
    let mut bytes = vec![0; pages * ENTRY_BYTES];
    pagemap.read_exact_at(&mut bytes, range.start / PAGE * ENTRY_BYTES as u64)?;
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    Ok(entries
        .iter()
        .map(|entry| Entry(u64::from_ne_bytes(*entry)))
        .collect())
}

/// Tells the page of zeros, which a process gets that reads where nothing was
/// ever written, from a page that it has written zeros to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ZeroFrame(Option<u64>);

impl ZeroFrame {
    /// Looks for it in this process; not found without the privilege to.
    pub(crate) fn find() -> io::Result<Self> {
        let page = TrialPage::new()?;
        page.read();
        let found = entries(&File::open("/proc/self/pagemap")?, &page.range())?;
        Ok(Self(found.first().and_then(|entry| entry.frame())))
    }

    /// Whether this is that page.
    pub(crate) fn is(self, entry: Entry) -> bool {
        entry.frame().is_some_and(|frame| self.0 == Some(frame))
    }
}
