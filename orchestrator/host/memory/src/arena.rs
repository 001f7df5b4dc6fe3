//! Memory in a file without a name, in slots of 2 MiB: what another process has
//! to be able to read after this one has ended.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _};

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

    pub(crate) fn bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        let Some((_, map)) = &mut self.mapped else {
            return &mut [];
        };
        // SAFETY: the mapping is readable and writable for all its length, and
        // borrowed for as long as the slice is; nobody else maps it writable.
        let all = unsafe { std::slice::from_raw_parts_mut(map.at.cast(), map.bytes) };
        all.get_mut(slot * SLOT_BYTES..(slot + 1) * SLOT_BYTES)
            .unwrap_or_default()
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
                let file = memory_file(c"migrate-pages")?;
                file.set_len(bytes as u64)?;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let map = Mapping::new(file.as_fd(), bytes, access)?;
                self.mapped = Some((file, map));
                Ok(())
            }
        }
    }
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

/// A file mapped from its start.
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
    fn new(file: BorrowedFd<'_>, bytes: usize, access: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                access,
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
        Self::new(file, length, libc::PROT_READ)
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
