//! Memory that is still on the source when the copy begins to run.
//!
//! One file in memory, which keeper and agent share, has a place for each of
//! these pages by its number ([`LateRuns`]), a bit that says that it has come,
//! and one that says that a thread waits for it. The agent writes a page and
//! then sets the first bit; whoever puts pages in place reads none without it,
//! sets the second one and waits. A page that has come is never written again.
//! Bells tell either side to look.
//!
//! [`LateRuns`]: migrate_core::late::LateRuns

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use migrate_core::wire::PAGE_BYTES;

use super::sys;
use crate::PAGE;
use crate::arena::content_file;

/// Where pages that come late begin among the places that a plan names; files
/// are smaller than that.
pub(super) const LATE_FROM: u64 = 1 << 62;

/// Most pages that there can be: all of an address space of 2^57 bytes.
const PAGES_MAX: u64 = 1 << 45;

/// Bits of a word.
const BITS: u64 = 64;

/// Words before the bits: how many pages have come, whether the rest never
/// will, and how many faults have waited.
const HEAD_WORDS: u64 = 3;
const COME: u64 = 0;
const LOST: u64 = 1;
const WAITED: u64 = 2;

/// The shared file, as either process sees it.
#[derive(Debug)]
pub struct LatePages {
    at: *mut u8,
    bytes: usize,
    pages: u64,
    file: OwnedFd,
    /// Rings for whoever puts pages in place.
    arrived: OwnedFd,
    /// Rings for whoever fetches them.
    wanted: OwnedFd,
}

// SAFETY: shared memory whose words are only used as atomics, and whose pages
// are written by one thread before their bit is set and never afterwards.
unsafe impl Send for LatePages {}
// SAFETY: as above.
unsafe impl Sync for LatePages {}

impl LatePages {
    /// Room for so many pages, none of which has come.
    ///
    /// # Errors
    ///
    /// There is no such room.
    pub fn new(pages: u64) -> io::Result<Self> {
        if pages > PAGES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = content_file(c"migrate-late")?;
        file.set_len(Self::data_at(pages) + pages * PAGE)?;
        Self::of(file.into(), pages, [sys::event_fd()?, sys::event_fd()?])
    }

    /// The file of another process.
    pub(super) fn of(file: OwnedFd, pages: u64, bells: [OwnedFd; 2]) -> io::Result<Self> {
        let short = || io::Error::from(io::ErrorKind::InvalidData);
        if pages > PAGES_MAX {
            return Err(short());
        }
        let bytes = Self::data_at(pages) + pages * PAGE;
        let file = File::from(file);
        if file.metadata()?.len() < bytes {
            return Err(short());
        }
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let [arrived, wanted] = bells;
        Ok(Self {
            at: at.cast(),
            bytes,
            pages,
            file: file.into(),
            arrived,
            wanted,
        })
    }

    /// Words of one set of bits.
    fn bit_words(pages: u64) -> u64 {
        pages.div_ceil(BITS)
    }

    /// Where the content begins, in bytes.
    fn data_at(pages: u64) -> u64 {
        ((HEAD_WORDS + 2 * Self::bit_words(pages)) * 8).next_multiple_of(PAGE)
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        assert!(index.saturating_mul(8) < self.bytes, "a word of the file");
        // SAFETY: within the mapping, which is aligned to a page and lasts as
        // long as `self`; used as an atomic by everybody.
        unsafe { &*self.at.cast::<AtomicU64>().add(index) }
    }

    fn arrived_word(&self, index: u64) -> &AtomicU64 {
        self.word(HEAD_WORDS + index)
    }

    fn wanted_word(&self, index: u64) -> &AtomicU64 {
        self.word(HEAD_WORDS + Self::bit_words(self.pages) + index)
    }

    /// How many pages there are, come or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many have not come.
    #[must_use]
    pub fn missing(&self) -> u64 {
        let come = self.word(COME).load(Ordering::SeqCst);
        self.pages.saturating_sub(come)
    }

    /// Faults that had to wait for a page.
    #[must_use]
    pub fn waited_faults(&self) -> u64 {
        self.word(WAITED).load(Ordering::Relaxed)
    }

    pub(super) fn note_fault(&self) {
        self.word(WAITED).fetch_add(1, Ordering::Relaxed);
    }

    /// The rest never comes: whoever puts pages in place gives up.
    pub fn lose(&self) {
        self.word(LOST).store(1, Ordering::SeqCst);
        sys::ring(self.arrived.as_fd());
    }

    /// Whether that was said.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.word(LOST).load(Ordering::SeqCst) != 0
    }

    /// Whether a page has come.
    pub(super) fn has(&self, number: u64) -> bool {
        number < self.pages
            && self.arrived_word(number / BITS).load(Ordering::SeqCst) & (1 << (number % BITS)) != 0
    }

    /// Takes in pages from a number on. Those that have come before stay as they
    /// are. By one thread at a time.
    ///
    /// # Errors
    ///
    /// There are no such pages.
    pub fn arrive(&self, first: u64, data: &[u8]) -> io::Result<u64> {
        let count = data.len() as u64 / PAGE;
        if first.checked_add(count).is_none_or(|end| end > self.pages) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut fresh = 0;
        for (number, page) in (first..).zip(data.chunks_exact(PAGE_BYTES)) {
            if self.has(number) {
                continue;
            }
            let at = Self::data_at(self.pages) + number * PAGE;
            let at = usize::try_from(at).map_err(io::Error::other)?;
            // SAFETY: within the mapping, for the number is that of a page; no
            // slice of it exists, for its bit is not set, and only this thread
            // writes.
            unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), self.at.add(at), PAGE_BYTES) };
            self.arrived_word(number / BITS)
                .fetch_or(1 << (number % BITS), Ordering::SeqCst);
            fresh += 1;
        }
        self.word(COME).fetch_add(fresh, Ordering::SeqCst);
        if fresh > 0 {
            sys::ring(self.arrived.as_fd());
        }
        Ok(fresh)
    }

    /// The content of pages, if all of them have come.
    #[must_use]
    pub fn content(&self, numbers: Range<u64>) -> Option<&[u8]> {
        if numbers.end > self.pages || !numbers.clone().all(|number| self.has(number)) {
            return None;
        }
        let at = Self::data_at(self.pages) + numbers.start * PAGE;
        let at = usize::try_from(at).ok()?;
        let bytes = usize::try_from(numbers.end.checked_sub(numbers.start)? * PAGE).ok()?;
        // SAFETY: within the mapping, and never written again once it has come.
        Some(unsafe { std::slice::from_raw_parts(self.at.add(at), bytes) })
    }

    /// Threads wait for these.
    pub(super) fn want(&self, numbers: Range<u64>) {
        let mut is_new = false;
        for number in numbers.start..numbers.end.min(self.pages) {
            let bit = 1 << (number % BITS);
            let before = self
                .wanted_word(number / BITS)
                .fetch_or(bit, Ordering::SeqCst);
            is_new |= before & bit == 0;
        }
        if is_new {
            sys::ring(self.wanted.as_fd());
        }
    }

    /// What threads wait for and was not returned before, as first number and
    /// count, at most so many ranges. What is beyond that comes with the next
    /// call.
    #[must_use]
    pub fn take_wanted(&self, ranges_max: usize) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        for index in 0..Self::bit_words(self.pages) {
            let word = self.wanted_word(index).load(Ordering::SeqCst);
            if word == 0 {
                continue;
            }
            if ranges.len() + 64 > ranges_max {
                // The bell has been heard, and not all was done.
                sys::ring(self.wanted.as_fd());
                break;
            }
            let taken = self.wanted_word(index).swap(0, Ordering::SeqCst);
            add_numbers(&mut ranges, index, taken);
        }
        let counted = |range: Range<u64>| (range.start, range.end - range.start);
        ranges.into_iter().map(counted).collect()
    }

    /// Waits until [`take_wanted`](Self::take_wanted) may have something, at most
    /// `limit`; whether it may. Blocks.
    ///
    /// # Errors
    ///
    /// It cannot be waited for.
    pub fn await_wanted(&self, limit: Duration) -> io::Result<bool> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ready = sys::poll(&[self.wanted.as_raw_fd()], Some(limit_ms))?;
        let rung = ready.first().is_some_and(|rung| *rung);
        if rung {
            sys::hush(self.wanted.as_fd());
        }
        Ok(rung)
    }

    /// Readable when pages have come, or never will.
    pub(super) fn arrived_bell(&self) -> BorrowedFd<'_> {
        self.arrived.as_fd()
    }

    /// Takes note of that bell.
    pub(super) fn hush_arrived(&self) {
        sys::hush(self.arrived.as_fd());
    }

    /// What another process needs to see the same.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.file.as_fd(), self.arrived.as_fd(), self.wanted.as_fd()]
    }
}

impl Drop for LatePages {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`; no reference outlives `self`.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// What has come and was noted.
#[derive(Debug)]
pub(super) struct Noted {
    words: Vec<u64>,
}

impl Noted {
    pub(super) fn new(pages: &LatePages) -> Self {
        let words = LatePages::bit_words(pages.pages);
        Self {
            words: vec![0; usize::try_from(words).unwrap_or(0)],
        }
    }

    /// Numbers of pages that have come since the last call.
    pub(super) fn fresh(&mut self, pages: &LatePages) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        for (index, noted) in (0..).zip(&mut self.words) {
            let now = pages.arrived_word(index).load(Ordering::SeqCst);
            let fresh = now & !*noted;
            *noted = now;
            add_numbers(&mut ranges, index, fresh);
        }
        ranges
    }
}

/// Adds the pages whose bits are set in a word, which comes behind the words that
/// were added before.
fn add_numbers(ranges: &mut Vec<Range<u64>>, index: u64, word: u64) {
    if word == 0 {
        return;
    }
    for bit in (0..BITS).filter(|bit| word & (1 << bit) != 0) {
        let number = index * BITS + bit;
        match ranges.last_mut() {
            Some(last) if last.end == number => last.end += 1,
            _ => ranges.push(number..number + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(with: u8) -> Vec<u8> {
        vec![with; PAGE_BYTES]
    }

    #[test]
    fn pages_come_once_and_are_seen_by_both() {
        let ours = LatePages::new(130).unwrap();
        let [file, arrived, wanted] = ours.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        let theirs = LatePages::of(file, 130, [arrived, wanted]).unwrap();
        let mut noted = Noted::new(&theirs);
        let mut fresh = || -> Vec<(u64, u64)> {
            let ranges = noted.fresh(&theirs).into_iter();
            ranges.map(|range| (range.start, range.end)).collect()
        };
        assert_eq!(theirs.missing(), 130);
        assert!(theirs.content(0..1).is_none());
        assert_eq!(
            ours.arrive(62, &[page(1), page(2), page(3)].concat())
                .unwrap(),
            3
        );
        assert_eq!(fresh(), [(62, 65)]);
        assert_eq!(fresh(), []);
        // What has come stays.
        assert_eq!(ours.arrive(64, &[page(9), page(4)].concat()).unwrap(), 1);
        assert_eq!(fresh(), [(65, 66)]);
        let content = theirs.content(62..66).unwrap();
        let first = |number: usize| content[number * PAGE_BYTES];
        assert_eq!([first(0), first(1), first(2), first(3)], [1, 2, 3, 4]);
        assert!(theirs.content(61..63).is_none());
        assert_eq!(theirs.missing(), 126);
        for impossible in [130, 129, u64::MAX] {
            assert!(
                ours.arrive(impossible, &[page(1), page(1)].concat())
                    .is_err()
            );
        }
        assert!(theirs.content(129..131).is_none());
        assert!(!theirs.is_lost());
        ours.lose();
        assert!(theirs.is_lost());
    }

    #[test]
    fn what_is_wanted_is_asked_for() {
        let pages = LatePages::new(1000).unwrap();
        assert_eq!(pages.take_wanted(1024), []);
        pages.want(60..70);
        pages.want(998..2000);
        pages.want(66..68);
        assert_eq!(pages.take_wanted(1024), [(60, 10), (998, 2)]);
        assert_eq!(pages.take_wanted(1024), []);
        // More than one message may name.
        for number in (0..1000).step_by(2) {
            pages.want(number..number + 1);
        }
        let mut asked = 0;
        while let ranges @ [_, ..] = &pages.take_wanted(128)[..] {
            assert!(ranges.len() <= 128);
            asked += ranges.len();
        }
        assert_eq!(asked, 500);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let pages = LatePages::new(2).unwrap();
        let fds = || pages.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        for count in [3, u64::MAX, u64::MAX / 4096] {
            let [file, arrived, wanted] = fds();
            assert!(LatePages::of(file, count, [arrived, wanted]).is_err());
        }
    }
}
