//! One watched process: registering its memory, scanning it, reading it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};

use bytes::BytesMut;
use migrate_core::wire::PAGE_BYTES;

use crate::PAGE;
use crate::error::{MemoryError, UntrackedReason};
use crate::inject::{self, InjectError, Injection};
use crate::maps::{self, Vma};
use crate::sys::{self, PIECES_MAX, Region, ScanMode, Uffd};

/// Regions taken by one scan: 192 KiB of them.
const REGIONS_PER_SCAN: usize = 8192;

/// The userfaultfd of one process.
#[derive(Debug)]
pub(crate) struct Watch {
    pid: i32,
    uffd: Uffd,
    /// Ranges that this descriptor has registered, ascending. Marks in memory
    /// that another userfaultfd watches must not be trusted: what they call
    /// clean was handed to somebody else.
    registered: Vec<Range<u64>>,
}

/// Why a part of a process could not be watched this time.
#[derive(Debug)]
enum Unwatched {
    /// Another userfaultfd has it, or it changed while it was registered. It
    /// counts as dirty.
    Part,
    /// See [`OtherMemory`].
    OtherMemory,
}

/// The process has another memory than the one watched: it called exec. Or what is watched
/// of it cannot be told.
#[derive(Debug)]
pub(crate) struct OtherMemory;

impl Watch {
    /// Starts to watch a process; none of its memory is registered yet.
    pub(crate) fn begin(pid: i32) -> Result<(Self, Injection), InjectError> {
        let (fd, injection) = inject::userfaultfd(pid)?;
        let uffd = Uffd::set_up(fd).map_err(|source| UntrackedReason::Api { source })?;
        let watch = Self {
            pid,
            uffd,
            registered: Vec::new(),
        };
        Ok((watch, injection))
    }

    /// Registers what of these mappings is not registered yet, and forgets what
    /// is not among them. Returns the mappings that cannot be watched.
    pub(crate) fn adopt<'v>(
        &mut self,
        vmas: impl Iterator<Item = &'v Vma>,
    ) -> Result<Vec<Range<u64>>, OtherMemory> {
        let mut now: Vec<Range<u64>> = Vec::new();
        let mut refused = Vec::new();
        let mut fresh = Vec::new();
        for vma in vmas {
            let at = self
                .registered
                .partition_point(|range| range.end < vma.range.end);
            let known = self
                .registered
                .get(at)
                .is_some_and(|range| range.start <= vma.range.start);
            if !known {
                let registered = self.register(&vma.range);
                if matches!(registered, Err(Unwatched::OtherMemory)) {
                    return Err(OtherMemory);
                }
                // After an error a part of it may be watched.
                fresh.push(vma.range.clone());
                if registered.is_err() {
                    refused.push(vma.range.clone());
                    continue;
                }
            }
            match now.last_mut() {
                Some(last) if last.end == vma.range.start => last.end = vma.range.end,
                _ => now.push(vma.range.clone()),
            }
        }
        self.registered = now;
        if !fresh.is_empty() {
            self.watch_trackable(&fresh)?;
        }
        Ok(refused)
    }

    /// Watches these ranges anew, in which mappings have changed since they were adopted.
    /// Returns what is there now, cut to them: what is watched, and what is not.
    pub(crate) fn renew(&self, ranges: &[Range<u64>]) -> Result<(Vec<Vma>, Vec<Vma>), OtherMemory> {
        for range in ranges {
            if let Err(Unwatched::OtherMemory) = self.register(range) {
                return Err(OtherMemory);
            }
        }
        let here = self.watch_trackable(ranges)?;
        // Where there are holes, marks that a mapping has brought along may be left.
        let is_watched = |vma: &Vma| vma.trackable() && self.uffd.unprotect(&vma.range).is_ok();
        Ok(here.into_iter().partition(is_watched))
    }

    /// Sees to it that of ranges that have just been registered nothing is watched but what
    /// is trackable, and returns what is there. Between a look at the mappings and the
    /// registration the process may have put something else in their place, and that must
    /// have no marks, see [`Vma::trackable`]: no other round would look at it. It has none
    /// yet; and a mapping that comes later is not watched.
    fn watch_trackable(&self, ranges: &[Range<u64>]) -> Result<Vec<Vma>, OtherMemory> {
        /// How often the mappings may change in between.
        const LOOKS_MAX: usize = 16;
        for _ in 0..LOOKS_MAX {
            let vmas = maps::read(self.pid).map_err(|_| OtherMemory)?;
            let mut here = Vec::new();
            for range in ranges {
                let first = vmas.partition_point(|vma| vma.range.end <= range.start);
                let within = vmas[first..].iter();
                let within = within.take_while(|vma| vma.range.start < range.end);
                here.extend(within.map(|vma| Vma {
                    range: vma.range.start.max(range.start)..vma.range.end.min(range.end),
                    ..vma.clone()
                }));
            }
            let mut others = here.iter().filter(|vma| !vma.trackable());
            if others.all(|vma| self.uffd.unregister(&vma.range).is_ok()) {
                return Ok(here);
            }
        }
        Err(OtherMemory)
    }

    /// Another one of the same memory, which registers nothing.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        Ok(Self {
            pid: self.pid,
            uffd: self.uffd.duplicate()?,
            registered: self.registered.clone(),
        })
    }

    /// What is registered, ascending.
    pub(crate) fn registered(&self) -> &[Range<u64>] {
        &self.registered
    }

    fn register(&self, range: &Range<u64>) -> Result<(), Unwatched> {
        self.uffd
            .register(range)
            .map_err(|error| match error.raw_os_error() {
                // The memory that belongs to this descriptor is gone.
                Some(libc::ESRCH | libc::ENOMEM) => Unwatched::OtherMemory,
                _ => Unwatched::Part,
            })
    }

    /// Whether the process still has the memory that is watched, and has not called exec.
    /// `at` is a range of addresses that this watches none of.
    pub(crate) fn is_of_living_memory(&self, at: &Range<u64>) -> bool {
        let touched = self.uffd.unprotect(at);
        !touched.is_err_and(|error| error.raw_os_error() == Some(libc::ESRCH))
    }

    /// Finds populated pages of a mapping from `range.start` on and marks the
    /// written ones clean. What the guard still holds when it is dropped is
    /// marked written again. After an error, as of a mapping that has changed its shape or is
    /// not the one that was registered, all of it counts as written.
    pub(crate) fn scan(
        &self,
        pagemap: &File,
        range: &Range<u64>,
        mode: ScanMode,
        guards: bool,
    ) -> io::Result<Scan<'_>> {
        let mut regions = vec![Region::default(); REGIONS_PER_SCAN];
        let (found, next) =
            sys::scan(pagemap, range, mode, guards, &mut regions).inspect_err(|_| {
                // Pages before the one that failed may be marked clean, and
                // which ones is not known.
                self.mark_written(range);
            })?;
        regions.truncate(found);
        let pages = |written| {
            regions
                .iter()
                .filter(|region| region.written() == written)
                .map(Region::pages)
                .sum()
        };
        Ok(Scan {
            clean_pages: pages(false),
            written_pages: pages(true),
            next,
            owed: Owed {
                watch: self,
                ranges: regions
                    .iter()
                    .filter(|region| region.written())
                    .map(|region| region.start..region.end)
                    .collect(),
            },
        })
    }

    /// Makes every watched page of the range count as written.
    fn mark_written(&self, range: &Range<u64>) {
        /// How often the mappings may change in between.
        const LOOKS_MAX: usize = 16;
        if self.uffd.unprotect(range).is_ok() {
            return;
        }
        // There are holes, or mappings that are not watched. Each mapping by
        // itself works, unless it changes in that moment.
        let mut seen = Vec::new();
        for _ in 0..LOOKS_MAX {
            let Ok(vmas) = maps::read(self.pid) else {
                return;
            };
            let pieces: Vec<Range<u64>> = vmas
                .iter()
                .map(|vma| vma.range.start.max(range.start)..vma.range.end.min(range.end))
                .filter(|piece| piece.start < piece.end)
                .collect();
            let failed: Vec<bool> = pieces
                .iter()
                .map(|piece| self.uffd.unprotect(piece).is_err())
                .collect();
            // What fails twice in the same shape is not watched.
            if !failed.contains(&true) || seen == pieces {
                return;
            }
            seen = pieces;
        }
        self.uffd.unprotect_each(range);
    }
}

/// What one scan found.
#[derive(Debug)]
pub(crate) struct Scan<'a> {
    pub(crate) clean_pages: u64,
    pub(crate) written_pages: u64,
    /// Where the next scan starts.
    pub(crate) next: u64,
    pub(crate) owed: Owed<'a>,
}

/// Pages that are marked clean and not handed on yet.
#[derive(Debug)]
pub(crate) struct Owed<'a> {
    watch: &'a Watch,
    ranges: VecDeque<Range<u64>>,
}

impl Owed<'_> {
    /// The next pieces, at most `pages` pages together.
    pub(crate) fn next_pieces(&self, pages: u64) -> Vec<Range<u64>> {
        let mut room = pages * PAGE;
        let mut pieces = Vec::new();
        for range in self.ranges.iter().take(PIECES_MAX) {
            if room == 0 {
                break;
            }
            let end = range.end.min(range.start + room);
            room -= end - range.start;
            pieces.push(range.start..end);
        }
        pieces
    }

    /// How many ranges there are.
    pub(crate) fn ranges(&self) -> usize {
        self.ranges.len()
    }

    /// All of it, for somebody else to answer for.
    pub(crate) fn hand_over(mut self) -> VecDeque<Range<u64>> {
        std::mem::take(&mut self.ranges)
    }

    /// The first `bytes` bytes have been handed on.
    pub(crate) fn settle(&mut self, mut bytes: u64) {
        while bytes > 0
            && let Some(range) = self.ranges.front_mut()
        {
            let part = bytes.min(range.end - range.start);
            range.start += part;
            bytes -= part;
            if range.start == range.end {
                self.ranges.pop_front();
            }
        }
    }

    /// The first page cannot be read: it and others of its region, `pages` together, count
    /// as written, for the next round to look at. Returns how many pages that are.
    pub(crate) fn give_up(&mut self, pages: u64) -> u64 {
        let Some(range) = self.ranges.front() else {
            return 0;
        };
        let bytes = (range.end - range.start).min(pages.saturating_mul(PAGE));
        self.watch.mark_written(&(range.start..range.start + bytes));
        self.settle(bytes);
        bytes / PAGE
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        for range in self.ranges.drain(..) {
            self.watch.mark_written(&range);
        }
    }
}

/// The memory that a process has now, for reading.
#[derive(Debug)]
pub(crate) struct Memory {
    pid: i32,
    pagemap: File,
    content: File,
}

impl Memory {
    /// Opens the memory that the process has now.
    pub(crate) fn open(pid: i32) -> Result<Self, MemoryError> {
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).map_err(|source| maps::proc_failed(pid, &path, source))
        };
        Ok(Self {
            pid,
            pagemap: open("pagemap")?,
            content: open("mem")?,
        })
    }

    /// For scans.
    pub(crate) fn pagemap(&self) -> &File {
        &self.pagemap
    }

    /// Reads pieces of memory. Fewer bytes than asked for, always whole pages,
    /// when a page could not be read; `None` when the process has ended.
    ///
    /// `process_vm_readv` pins what it reads, and a page that parent and child
    /// have shared since a fork is copied for that: the tree would need the
    /// more memory the more of it is read, and Linux 6.18 then loses pages of
    /// the child which the parent gives back with `MADV_FREE`, for the copy
    /// does not count as written. Such pages are read through `/proc/PID/mem`,
    /// which takes twice as long and changes nothing.
    pub(crate) fn read(
        &self,
        pieces: &[Range<u64>],
        buffer: &mut BytesMut,
    ) -> Result<Option<BytesMut>, MemoryError> {
        let parts = match own_parts(&self.pagemap, pieces) {
            Ok(parts) => parts,
            Err(source) => {
                let path = format!("/proc/{}/pagemap", self.pid);
                return match maps::proc_failed(self.pid, &path, source) {
                    MemoryError::Gone { .. } => Ok(None),
                    error => Err(error),
                };
            }
        };
        for group in parts.chunk_by(|one, next| one.own == next.own) {
            let pieces: Vec<Range<u64>> = group.iter().map(|part| part.range.clone()).collect();
            let wanted: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
            let before = buffer.len();
            let read = if group.first().is_some_and(|part| part.own) {
                sys::read_pages(self.pid, &pieces, buffer)
            } else {
                read_shared(&self.content, &pieces, buffer)
            };
            match read {
                Ok(read) if read as u64 == wanted => {}
                Ok(read) => {
                    buffer.truncate(before + read / PAGE_BYTES * PAGE_BYTES);
                    break;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EFAULT | libc::EIO) => break,
                    Some(libc::ESRCH) => {
                        buffer.clear();
                        return Ok(None);
                    }
                    _ => {
                        buffer.clear();
                        return Err(MemoryError::Read {
                            pid: self.pid,
                            vaddr: pieces.first().map_or(0, |piece| piece.start),
                            source: error,
                        });
                    }
                },
            }
        }
        Ok(Some(buffer.split()))
    }
}

/// A part of a piece to be read.
#[derive(Debug)]
struct Part {
    range: Range<u64>,
    /// No other process has these pages.
    own: bool,
}

/// Splits pieces by whether another process has their pages, too.
fn own_parts(pagemap: &File, pieces: &[Range<u64>]) -> io::Result<Vec<Part>> {
    /// Entries read at once, 8 KiB of them.
    const ENTRIES_MAX: u64 = 1024;
    const ENTRY_BYTES: u64 = 8;
    /// Bit 56 of an entry: mapped by one process only. See
    /// `Documentation/admin-guide/mm/pagemap.rst`.
    const OWN: u64 = 1 << 56;
    let mut parts: Vec<Part> = Vec::new();
    let mut entries = Vec::new();
    let mut window = 0..0;
    let end_of_all = pieces.last().map_or(0, |piece| piece.end);
    for piece in pieces {
        let mut first_of_piece = true;
        for page in piece.start / PAGE..piece.end / PAGE {
            if !window.contains(&page) {
                // Pieces close to each other in one go.
                let end = (end_of_all / PAGE).min(page + ENTRIES_MAX).max(page + 1);
                let bytes = usize::try_from((end - page) * ENTRY_BYTES).unwrap_or(0);
                entries.resize(bytes, 0);
                let read = pagemap.read_at(&mut entries, page * ENTRY_BYTES)? as u64;
                window = page..page + read / ENTRY_BYTES;
                if window.is_empty() {
                    // The process has ended, and with it its memory.
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
            let at = usize::try_from((page - window.start) * ENTRY_BYTES).unwrap_or(0);
            let own = entries
                .get(at..)
                .and_then(|entry| entry.first_chunk())
                .is_some_and(|entry| u64::from_ne_bytes(*entry) & OWN != 0);
            let range = page * PAGE..(page + 1) * PAGE;
            match parts.last_mut() {
                Some(last) if !first_of_piece && last.own == own => last.range.end = range.end,
                _ => parts.push(Part { range, own }),
            }
            first_of_piece = false;
        }
    }
    Ok(parts)
}

/// Reads pages without pinning them, behind what `into` holds. Returns how many
/// bytes were read.
fn read_shared(content: &File, pieces: &[Range<u64>], into: &mut BytesMut) -> io::Result<usize> {
    let mut sum = 0;
    for piece in pieces {
        let bytes = usize::try_from(piece.end - piece.start).unwrap_or(0);
        let before = into.len();
        into.resize(before + bytes, 0);
        let mut read = 0;
        while read < bytes {
            match content.read_at(&mut into[before + read..], piece.start + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What was read by then counts.
                Err(_) if sum + read > 0 => break,
                Err(error) => {
                    into.truncate(before);
                    return Err(error);
                }
            }
        }
        into.truncate(before + read);
        sum += read;
        if read < bytes {
            break;
        }
    }
    Ok(sum)
}

/// Populated pages of a mapping, without touching any mark.
pub(crate) fn populated_pages(
    pid: i32,
    pagemap: &File,
    vma: &Vma,
    guards: bool,
) -> Result<u64, MemoryError> {
    let mut regions = vec![Region::default(); REGIONS_PER_SCAN];
    let mut range = vma.range.clone();
    let mut pages = 0;
    while range.start < range.end {
        let (found, next) = sys::scan(pagemap, &range, ScanMode::Look, guards, &mut regions)
            .map_err(|source| match source.raw_os_error() {
                // It has ended since its memory was opened.
                Some(libc::ESRCH) => MemoryError::Gone { pid },
                _ => MemoryError::Scan {
                    pid,
                    vaddr: range.start,
                    source,
                },
            })?;
        pages += regions.iter().take(found).map(Region::pages).sum::<u64>();
        range.start = next.max(range.start + PAGE);
    }
    Ok(pages)
}

/// Signs that a device may write to memory of this process without a fault:
/// memory pinned for good, asynchronous I/O, or files open past the page cache.
pub(crate) fn device_writes(pid: i32, vmas: &[Vma]) -> Option<&'static str> {
    if vmas.iter().any(|vma| vma.name.starts_with("/[aio]")) {
        return Some("it does asynchronous I/O");
    }
    if vmas.iter().any(|vma| vma.name.contains("[io_uring]")) {
        return Some("it uses io_uring");
    }
    let pinned = fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("VmPin:"))
        .is_some_and(|value| !value.trim().starts_with("0 "));
    if pinned {
        return Some("it has pinned memory");
    }
    opened_past_cache(pid).then_some("it has a file open with O_DIRECT")
}

fn opened_past_cache(pid: i32) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors.filter_map(Result::ok).any(|entry| {
        // Sockets, pipes and the like lead nowhere; only files are asked, since
        // the answer of an epoll descriptor lists all it watches.
        let leads_to_path = fs::read_link(entry.path()).is_ok_and(|to| to.is_absolute());
        leads_to_path
            && fs::metadata(entry.path())
                .is_ok_and(|file| file.file_type().is_file() || file.file_type().is_block_device())
            && entry
                .file_name()
                .to_str()
                .and_then(|fd| descriptor_flags(pid, fd))
                .is_some_and(|flags| flags & libc::O_DIRECT != 0)
    })
}

fn descriptor_flags(pid: i32, fd: &str) -> Option<i32> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/fdinfo/{fd}"))
        .and_then(|file| file.take(256).read_to_string(&mut text))
        .ok()?;
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(flags.trim(), 8).ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_has_ended_is_gone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let memory = Memory::open(pid).unwrap();
        let vmas = maps::read(pid).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        for vma in &vmas {
            let found = populated_pages(pid, memory.pagemap(), vma, false);
            assert!(
                matches!(found, Ok(0) | Err(MemoryError::Gone { .. })),
                "{found:?}"
            );
        }
    }
}
