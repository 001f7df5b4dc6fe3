//! System calls on memory: userfaultfd, `PAGEMAP_SCAN`, `process_vm_readv`.
//!
//! All of this crate's unsafe code is here, in [`crate::trace`] and in
//! `lazy/sys.rs`. Numbers and
//! layouts are those of `include/uapi/linux/userfaultfd.h` and
//! `include/uapi/linux/fs.h` of Linux 6.7 and later.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use bytes::BytesMut;
use migrate_core::wire::PAGE_BYTES;

use crate::PAGE;

/// `UFFD_USER_MODE_ONLY`: needs no privilege in the target. Enough here,
/// because asynchronous faults never reach user space.
const UFFD_USER_MODE_ONLY: i32 = 1;

/// Flags for a userfaultfd.
pub(crate) const UFFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;

/// `UFFD_FEATURE_WP_ASYNC`; implies `WP_UNPOPULATED` and `WP_HUGETLBFS_SHMEM`.
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const REGISTER_MODE_WP: u64 = 1 << 1;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Since Linux 6.15.
const PAGE_IS_GUARD: u64 = 1 << 8;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Pages of one kind side by side, as `PAGEMAP_SCAN` reports them.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

impl Region {
    /// The pages were written to since they were last protected, or never were.
    pub(crate) fn written(&self) -> bool {
        self.categories & PAGE_IS_WRITTEN != 0
    }

    pub(crate) fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE
    }
}

/// A userfaultfd, of whichever process's memory.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

impl Uffd {
    /// One for this process, for a trial.
    pub(crate) fn own() -> io::Result<OwnedFd> {
        // SAFETY: the call takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS) };
        owned(fd)
    }

    /// Asks for asynchronous write protection.
    pub(crate) fn set_up(fd: OwnedFd) -> io::Result<Self> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features: FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes one `UffdioApi`, which lives here.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Self(fd))
    }

    /// Another descriptor of it.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Watches a range. Marks of an earlier watch are cleared, so that every
    /// populated page counts as written: kernels before 6.13 carry them along
    /// in `mremap`.
    pub(crate) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register = UffdioRegister {
            start: range.start,
            len: range.end - range.start,
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes one `UffdioRegister`, which
        // lives here. It changes how faults in the range are handled, never
        // what the memory holds.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
        self.unprotect(range)
    }

    /// Watches a range no more. All of its pages count as written.
    pub(crate) fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        let mut unregister = UffdioRange {
            start: range.start,
            len: range.end - range.start,
        };
        // SAFETY: the request reads one `UffdioRange`, which lives here. It changes how
        // faults in the range are handled, never what the memory holds.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut unregister) })
    }

    /// Makes every page of the range count as written. A range with a hole is
    /// handled up to the hole, with an error.
    pub(crate) fn unprotect(&self, range: &Range<u64>) -> io::Result<()> {
        let mut protect = UffdioWriteprotect {
            start: range.start,
            len: range.end - range.start,
            mode: 0,
        };
        // SAFETY: the request reads one `UffdioWriteprotect`, which lives here.
        // It clears a mark in page table entries, never what the memory holds.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) })
    }

    /// The same for every page that still is there, whatever holes there are.
    pub(crate) fn unprotect_each(&self, range: &Range<u64>) {
        match self.unprotect(range) {
            Ok(()) => {}
            // The whole address space is gone.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(_) if range.end - range.start <= PAGE => {}
            Err(_) => {
                let middle = range.start + (range.end - range.start) / PAGE / 2 * PAGE;
                self.unprotect_each(&(range.start..middle));
                self.unprotect_each(&(middle..range.end));
            }
        }
    }
}

/// What a scan does besides looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScanMode {
    /// Protect written pages again, in the same step; `EPERM` when the range is
    /// not watched.
    Protect,
    /// The same, only of pages that are in memory. What is not there is swapped out, as a
    /// rule, and some of that cannot be read: guard pages, where the kernel does not tell
    /// them apart (6.13 and 6.14), and pages whose memory has failed.
    ProtectPresent,
    /// Only look.
    Look,
}

/// Finds populated pages from `range.start` on, until `regions` is full or the
/// range ends. Returns how many regions were filled and where the next scan
/// starts.
///
/// Pages that are neither present nor swapped are never touched: marks on
/// them would look like swapped pages to CRIU.
pub(crate) fn scan(
    pagemap: &File,
    range: &Range<u64>,
    mode: ScanMode,
    guards: bool,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let guard = if guards { PAGE_IS_GUARD } else { 0 };
    // What is watched is anonymous, and asking whether a page belongs to a file
    // costs a cache miss for each of them: 20 ms for a GiB.
    let file = match mode {
        ScanMode::Protect | ScanMode::ProtectPresent => 0,
        ScanMode::Look => PAGE_IS_FILE,
    };
    let any_of = match mode {
        ScanMode::Protect | ScanMode::Look => PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ScanMode::ProtectPresent => PAGE_IS_PRESENT,
    };
    let not = PAGE_IS_PFNZERO | file | guard;
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: match mode {
            ScanMode::Protect | ScanMode::ProtectPresent => {
                PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
            }
            ScanMode::Look => 0,
        },
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: not,
        category_mask: not,
        category_anyof_mask: any_of,
        return_mask: PAGE_IS_WRITTEN,
    };
    // SAFETY: the request reads and writes one `PmScanArg`, which lives here,
    // and writes at most `vec_len` regions to `vec`: exactly the slice that is
    // borrowed mutably. Any bytes are a valid `Region`.
    let found =
        check_count(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) })?;
    Ok((found.min(regions.len()), argument.walk_end))
}

/// Most pieces that one call of [`read_pages`] takes: `IOV_MAX`.
pub(crate) const PIECES_MAX: usize = 1024;

/// Reads memory of another process behind what `into` holds. Returns how many
/// bytes were read; fewer than asked for when a page cannot be read.
///
/// The caller keeps one call far below 2 GiB, the kernel's limit.
pub(crate) fn read_pages(
    pid: i32,
    pieces: &[Range<u64>],
    into: &mut BytesMut,
) -> io::Result<usize> {
    let wanted: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
    let wanted = usize::try_from(wanted).map_err(|_| io::ErrorKind::InvalidInput)?;
    let remote: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.start as *mut libc::c_void,
            iov_len: usize::try_from(piece.end - piece.start).unwrap_or(0),
        })
        .collect();
    into.reserve(wanted);
    let room = into.spare_capacity_mut();
    let local = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: wanted.min(room.len()),
    };
    // SAFETY: the kernel writes at most `iov_len` bytes to `iov_base`, which is
    // spare room of `into` of at least that length. The remote addresses are
    // checked by the kernel against the other process's memory.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the first `read` bytes of the spare room have just been written.
    unsafe { into.set_len(into.len() + read) };
    Ok(read)
}

/// Finds data (`SEEK_DATA`) or a hole (`SEEK_HOLE`) of a file from `at` on; none
/// up to its end.
pub(crate) fn seek(file: &File, at: u64, whence: i32) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes no pointer.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), at, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Reads the page of a file at `at`, what lies behind the file's end included.
/// An error when the file does not reach into that page.
pub(crate) fn read_last_page(file: &File, at: u64, into: &mut BytesMut) -> io::Result<()> {
    let at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe {
        libc::mmap64(
            std::ptr::null_mut(),
            PAGE_BYTES,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            at,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = page.expose_provenance() as u64;
    let range = start..start + PAGE;
    // Not by a pointer: a page behind the end would be a signal.
    let own = std::process::id().cast_signed();
    let read = read_pages(own, std::slice::from_ref(&range), into);
    // SAFETY: made above, and not used after this.
    unsafe { libc::munmap(page, PAGE_BYTES) };
    match read? {
        PAGE_BYTES => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Fetches a descriptor of a thread of another process.
pub(crate) fn fetch_descriptor(tid: i32, fd: i32) -> io::Result<OwnedFd> {
    // A thread may have a descriptor table of its own; kernels before 6.9 know
    // pidfds of processes only.
    // SAFETY: the call takes no pointer.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::PIDFD_THREAD) })
        .or_else(|_| {
            // SAFETY: the call takes no pointer.
            owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, 0) })
        })?;
    // SAFETY: the call takes no pointer.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// Whether two processes have one memory. `false` where the kernel cannot say.
pub(crate) fn same_memory(one: i32, other: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: with `KCMP_VM` the call takes no pointer.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) == 0 }
}

/// A page of our own to try the tracking on.
pub(crate) struct TrialPage(*mut libc::c_void);

impl TrialPage {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(at))
    }

    pub(crate) fn write(&mut self, value: u8) {
        // SAFETY: the mapping lives as long as `self`, is writable, and nothing
        // else refers to it.
        unsafe { self.0.cast::<u8>().write_volatile(value) };
    }

    pub(crate) fn read(&self) -> u8 {
        // SAFETY: the mapping lives as long as `self` and is readable.
        unsafe { self.0.cast::<u8>().read_volatile() }
    }

    pub(crate) fn range(&self) -> Range<u64> {
        let start = self.0 as u64;
        start..start + PAGE
    }
}

impl Drop for TrialPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and is not used after this.
        unsafe { libc::munmap(self.0, PAGE_BYTES) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    check_count(result).map(drop)
}

fn check_count(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes over a descriptor that a raw system call has just made.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `MADV_GUARD_INSTALL` of `include/uapi/asm-generic/mman-common.h`, Linux 6.13.
    const GUARD_INSTALL: libc::c_int = 102;

    #[test]
    fn what_cannot_be_read_is_not_taken_for_memory_that_can() {
        if let Err(reason) = crate::probe::probe() {
            println!("SKIP what_cannot_be_read_is_not_taken_for_memory_that_can: {reason}");
            return;
        }
        let uffd = Uffd::set_up(Uffd::own().unwrap()).unwrap();
        let mut page = TrialPage::new().unwrap();
        uffd.register(&page.range()).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let found = |page: &TrialPage, mode| {
            let mut regions = [Region::default()];
            // As where a kernel cannot tell guard pages apart.
            let (found, _) = scan(&pagemap, &page.range(), mode, false, &mut regions).unwrap();
            (found == 1).then(|| regions[0].written())
        };
        page.write(1);
        assert_eq!(found(&page, ScanMode::ProtectPresent), Some(true));
        assert_eq!(found(&page, ScanMode::ProtectPresent), Some(false));
        // SAFETY: the page lives, and nobody reads it or writes to it from here on.
        if unsafe { libc::madvise(page.0, PAGE_BYTES, GUARD_INSTALL) } != 0 {
            println!("this kernel has no guard pages");
            return;
        }
        assert!(
            found(&page, ScanMode::Look).is_some(),
            "it looks swapped out"
        );
        assert_eq!(found(&page, ScanMode::ProtectPresent), None);
    }
}
