//! Memory in a file without a name, in slots of 2 MiB: what another process has
//! to be able to read after this one has ended.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::error::StoreError;

/// Bytes of a slot: a huge page on x86_64.
pub(crate) const SLOT_BYTES: usize = 2 << 20;

/// The file grows by at least so many slots: 128 MiB of addresses, of which the
/// kernel provides what is touched.
const GROWTH_SLOTS: usize = 64;

/// Slots, as many as are asked for.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    mapped: Option<(File, Mapping)>,
    /// Slots that were taken at some time.
    used: usize,
    free: Vec<usize>,
}

impl Arena {
    /// A slot of zeros.
    pub(crate) fn take(&mut self) -> Result<usize, StoreError> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let slot = self.used;
        let have = self.mapped.as_ref().map_or(0, |(_, map)| map.bytes);
        if (slot + 1) * SLOT_BYTES > have {
            self.grow(have + (have / 2).max(GROWTH_SLOTS * SLOT_BYTES))
                .map_err(|error| StoreError::NoMemory {
                    why: error.to_string(),
                })?;
        }
        self.used += 1;
        Ok(slot)
    }

    /// The slot is not needed any more, and nor is its memory.
    pub(crate) fn give_back(&mut self, slot: usize) {
        let Some((file, _)) = &self.mapped else {
            return;
        };
        let (at, length) = (slot * SLOT_BYTES, SLOT_BYTES);
        let (Ok(at), Ok(length)) = (libc::off_t::try_from(at), libc::off_t::try_from(length))
        else {
            return;
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory of Rust's is involved but that of a slot which
        // nobody refers to any more; it reads as zeros afterwards.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, at, length) } == 0 {
            self.free.push(slot);
        }
    }

    pub(crate) fn bytes(&self, slot: usize) -> &[u8] {
        let all = self.mapped.as_ref().map_or(&[][..], |(_, map)| map.bytes());
        all.get(slot * SLOT_BYTES..(slot + 1) * SLOT_BYTES)
            .unwrap_or_default()
    }

    /// Copies content into a slot, from `at` bytes on. By a call: through the mapping
    /// each page would be a fault, and would be cleared before it is filled, 4 µs of
    /// 5 for a page. A huge page is one fault, but takes memory that nobody has
    /// used lately; a virtual machine's host has to provide that first, which took
    /// longer than all that is gained (measured: 2.4 s a GiB against 0.3).
    pub(crate) fn write(
        &mut self,
        slot: usize,
        at: usize,
        content: &[u8],
    ) -> Result<(), StoreError> {
        let written = match &self.mapped {
            Some((file, _)) => file.write_all_at(content, (slot * SLOT_BYTES + at) as u64),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        written.map_err(|error| StoreError::NoMemory {
            why: error.to_string(),
        })
    }

    /// Where in the file a part of a slot is.
    pub(crate) fn offset(&self, content: &[u8]) -> u64 {
        let start = self.mapped.as_ref().map_or(0, |(_, map)| map.at.addr());
        content.as_ptr().addr().saturating_sub(start) as u64
    }

    /// The file.
    pub(crate) fn file(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.mapped {
            Some((file, _)) => Ok(file.as_fd()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn grow(&mut self, bytes: usize) -> io::Result<()> {
        match &mut self.mapped {
            Some((file, map)) => {
                file.set_len(bytes as u64)?;
                map.grow(bytes)
            }
            None => {
                let file = content_file(c"migrate-pages")?;
                file.set_len(bytes as u64)?;
                let map = Mapping::new(file.as_fd(), bytes)?;
                self.mapped = Some((file, map));
                Ok(())
            }
        }
    }
}

/// A tmpfs that the kernel never writes to swap, mounted nowhere yet. Room for so
/// many bytes, or for as many as there is memory.
///
/// # Errors
///
/// The kernel is older than 6.4, which brought `noswap`, or this process may not
/// mount.
pub fn unswapped(room_bytes: Option<NonZeroU64>) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_flag(&context, "noswap")?;
    fsconfig_set_string(&context, "mode", "0700")?;
    // None at all is what tmpfs takes for no limit.
    let room_bytes = room_bytes.map_or(0, NonZeroU64::get);
    fsconfig_set_string(&context, "size", room_bytes.to_string())?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// A file without a name for what a tree has in its memory: where the kernel can
/// do that, one that is never written to swap.
pub(crate) fn content_file(name: &std::ffi::CStr) -> io::Result<File> {
    // For all files of the process; a file keeps it for as long as it is open.
    static PLACE: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let Some(place) = PLACE.get_or_init(|| unswapped(None).ok()) else {
        return memory_file(name);
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::openat(place, ".", flags, mode)?.into())
}

/// A file in memory, without a name.
pub(crate) fn memory_file(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: the name ends with a zero; the result is a new descriptor.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

/// A file mapped from its start, to read.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: memory that belongs to the process as a whole; changed only through
// `&mut Arena`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at, bytes })
    }

    fn grow(&mut self, bytes: usize) -> io::Result<()> {
        // SAFETY: borrowed exclusively, so that nobody holds a reference into
        // what may move.
        let at = unsafe { libc::mremap(self.at, self.bytes, bytes, libc::MREMAP_MAYMOVE) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        (self.at, self.bytes) = (at, bytes);
        Ok(())
    }

    /// All of a file, to read. Nobody may change or shorten it any more.
    pub(crate) fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let length = File::from(file.try_clone_to_owned()?).metadata()?.len();
        let length = usize::try_from(length).map_err(io::Error::other)?;
        Self::new(file, length)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable for all its length and the file never
        // gets shorter; what is changed is changed through `&mut Arena` alone.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no slice outlives it.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use migrate_core::wire::PAGE_BYTES;

    use super::*;
    use crate::PAGE;

    /// Of `linux/kernel-page-flags.h`: the kernel does not write it anywhere else.
    const KPF_UNEVICTABLE: u64 = 1 << 18;

    /// Pages of a file that the kernel says it would never swap. What has been
    /// written lately is not judged yet: it waits in lists of each processor, of up
    /// to so many pages.
    const PAGES: usize = 4096;
    const WAITING_MAX: usize = 512;

    /// How many pages of a mapping are unevictable.
    fn unevictable(at: *mut libc::c_void) -> io::Result<usize> {
        const PFN: u64 = (1 << 55) - 1;
        let (pagemap, flags) = (
            File::open("/proc/self/pagemap")?,
            File::open("/proc/kpageflags")?,
        );
        let word = |file: &File, index: u64| -> io::Result<u64> {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, index * 8)?;
            Ok(u64::from_ne_bytes(word))
        };
        let first = at.addr() as u64 / PAGE;
        let mut count = 0;
        for index in 0..PAGES as u64 {
            let frame = word(&pagemap, first + index)? & PFN;
            count += usize::from(word(&flags, frame)? & KPF_UNEVICTABLE != 0);
        }
        Ok(count)
    }

    fn filled(file: &File) -> Mapping {
        let bytes = PAGES * PAGE_BYTES;
        file.set_len(bytes as u64).unwrap();
        let map = Mapping::new(file.as_fd(), bytes).unwrap();
        file.write_all_at(&vec![7; bytes], 0).unwrap();
        assert!(map.bytes().iter().all(|byte| *byte == 7));
        map
    }

    #[test]
    fn content_is_never_swapped() {
        if let Err(error) = unswapped(None) {
            println!("SKIP content_is_never_swapped: no tmpfs without swap: {error}");
            return;
        }
        let (kept, other) = (
            content_file(c"kept").unwrap(),
            memory_file(c"other").unwrap(),
        );
        let (kept, other) = (filled(&kept), filled(&other));
        let [kept, other] = [kept.at, other.at].map(|at| unevictable(at).unwrap());
        assert!(kept > PAGES - WAITING_MAX, "{kept} of {PAGES}");
        // So that the number says something.
        assert!(other < WAITING_MAX, "{other} of {PAGES}");
    }

    #[test]
    fn a_tmpfs_of_our_own_has_the_room_it_was_given() {
        let Ok(place) = unswapped(NonZeroU64::new(PAGE * 4)) else {
            println!("SKIP a_tmpfs_of_our_own_has_the_room_it_was_given: no such tmpfs");
            return;
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&place, ".", flags, Mode::RUSR | Mode::WUSR).unwrap();
        let file = File::from(file);
        let room = vec![1; PAGE_BYTES * 4];
        file.write_all_at(&room, 0).unwrap();
        let more = file.write_at(&[1], room.len() as u64).unwrap_err();
        assert_eq!(more.kind(), io::ErrorKind::StorageFull);
    }
}
