//! `/proc/PID/smaps` without its counts of pages, in a file of memory.

use core::ffi::c_int;

use crate::flags::{self, Mapping, Next, Sink, Source};
use crate::sys::{address, call, number};

/// Bytes of each of three buffers; a whole number of records.
const BUFFER_BYTES: usize = 48 << 10;
const BUFFERS: usize = 3;
/// Bytes of a record.
const RECORD_BYTES: usize = size_of::<Mapping>();

/// Opens what an iterator over mappings writes for one process; -1 where that cannot be.
/// `program` is a descriptor of the program.
#[must_use]
pub fn iterate(program: c_int, process: u32) -> isize {
    /// `BPF_LINK_CREATE` and `BPF_ITER_CREATE` of `enum bpf_cmd`, `BPF_TRACE_ITER` of
    /// `enum bpf_attach_type` (`linux/bpf.h`).
    const LINK_CREATE: isize = 28;
    const ITER_CREATE: isize = 33;
    const TRACE_ITER: u32 = 28;

    let Ok(program) = u32::try_from(program) else {
        return -1;
    };
    // `bpf_iter_link_info.task.tid`.
    let which = [process, 0, 0, 0];
    let place = address(which.as_ptr()).cast_unsigned() as u64;
    let halves = [place & 0xffff_ffff, place >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    // prog_fd, target_fd, attach_type, flags; iter_info, iter_info_len.
    let link = [program, 0, TRACE_ITER, 0, halves[0], halves[1], 16, 0];
    // SAFETY: both arguments are structures of the request's layout, in the byte order of
    // these machines, which the kernel only reads; the descriptor is closed here.
    unsafe {
        let link = call(
            number::BPF,
            [LINK_CREATE, address(link.as_ptr()), 32, 0, 0, 0],
        );
        let Ok(fd) = u32::try_from(link) else {
            return -1;
        };
        let open = [fd, 0];
        let iterator = call(
            number::BPF,
            [ITER_CREATE, address(open.as_ptr()), 8, 0, 0, 0],
        );
        call(number::CLOSE, [link, 0, 0, 0, 0, 0]);
        iterator
    }
}

/// Makes the file, at its beginning; `None` where that cannot be. `maps` and `mappings`
/// are descriptors of one process's `maps` and of what [`iterate`] opens.
pub(crate) fn file(maps: isize, mappings: isize) -> Option<isize> {
    /// `PROT_READ | PROT_WRITE`, `MAP_PRIVATE | MAP_ANONYMOUS`.
    const READ_WRITE: isize = 3;
    const ANONYMOUS: isize = 0x22;
    /// `MFD_CLOEXEC`.
    const CLOSE_ON_EXEC: isize = 1;

    let length = (BUFFERS * BUFFER_BYTES).cast_signed();
    // SAFETY: a new mapping at an address of the kernel's choice, and a new file.
    unsafe {
        let room = call(number::MMAP, [0, length, READ_WRITE, ANONYMOUS, -1, 0]);
        if room == -1 {
            return None;
        }
        let name = c"smaps".as_ptr();
        let file = call(
            number::MEMFD_CREATE,
            [address(name), CLOSE_ON_EXEC, 0, 0, 0, 0],
        );
        let done = file != -1 && {
            let buffer = |index: usize| {
                let at = room.cast_unsigned() + index * BUFFER_BYTES;
                core::ptr::with_exposed_provenance_mut::<u8>(at)
            };
            let mut maps = Read::new(maps, buffer(0));
            let mut mappings = Read::new(mappings, buffer(1));
            let mut text = Write::new(file, buffer(2));
            flags::compose(&mut maps, &mut mappings, &mut text)
                && text.flush()
                && call(number::LSEEK, [file, 0, 0, 0, 0, 0]) == 0
        };
        call(number::MUNMAP, [room, length, 0, 0, 0, 0]);
        if done {
            return Some(file);
        }
        if file != -1 {
            call(number::CLOSE, [file, 0, 0, 0, 0, 0]);
        }
    }
    None
}

/// A descriptor that is read to its end.
struct Read {
    fd: isize,
    /// Of [`BUFFER_BYTES`], and nobody else's.
    bytes: *mut u8,
    from: usize,
    to: usize,
}

impl Read {
    /// # Safety
    ///
    /// `bytes` points to [`BUFFER_BYTES`] bytes that are nobody else's while this lives.
    unsafe fn new(fd: isize, bytes: *mut u8) -> Self {
        Self {
            fd,
            bytes,
            from: 0,
            to: 0,
        }
    }

    /// Where the next `length` bytes are.
    fn take(&mut self, length: usize) -> Next<*const u8> {
        if self.from == self.to {
            // SAFETY: into the buffer, of that length.
            let got = unsafe {
                let arguments = [
                    self.fd,
                    address(self.bytes),
                    BUFFER_BYTES.cast_signed(),
                    0,
                    0,
                    0,
                ];
                call(number::READ, arguments)
            };
            match usize::try_from(got) {
                Ok(0) => return Next::End,
                Ok(got) => (self.from, self.to) = (0, got),
                Err(_) => return Next::Broken,
            }
        }
        // An iterator writes whole records, as many as fit.
        if self.to - self.from < length {
            return Next::Broken;
        }
        // SAFETY: within the buffer.
        let at = unsafe { self.bytes.add(self.from) };
        self.from += length;
        Next::Item(at.cast_const())
    }
}

impl Source<u8> for Read {
    fn next(&mut self) -> Next<u8> {
        match self.take(1) {
            // SAFETY: of the buffer, written by the kernel.
            Next::Item(at) => Next::Item(unsafe { at.read() }),
            Next::End => Next::End,
            Next::Broken => Next::Broken,
        }
    }
}

impl Source<Mapping> for Read {
    fn next(&mut self) -> Next<Mapping> {
        match self.take(RECORD_BYTES) {
            // SAFETY: of the buffer, with as many bytes, written by the kernel.
            Next::Item(at) => Next::Item(unsafe { at.cast::<Mapping>().read_unaligned() }),
            Next::End => Next::End,
            Next::Broken => Next::Broken,
        }
    }
}

/// A descriptor that is written.
struct Write {
    fd: isize,
    /// Of [`BUFFER_BYTES`], and nobody else's.
    bytes: *mut u8,
    length: usize,
}

impl Write {
    /// # Safety
    ///
    /// As for [`Read::new`].
    unsafe fn new(fd: isize, bytes: *mut u8) -> Self {
        Self {
            fd,
            bytes,
            length: 0,
        }
    }

    fn flush(&mut self) -> bool {
        let length = self.length.cast_signed();
        self.length = 0;
        // SAFETY: of the buffer, as many bytes as were written. A file of memory takes
        // all or fails.
        unsafe {
            call(
                number::WRITE,
                [self.fd, address(self.bytes), length, 0, 0, 0],
            ) == length
        }
    }
}

impl Sink for Write {
    fn push(&mut self, byte: u8) -> bool {
        // SAFETY: the length is below that of the buffer.
        unsafe { self.bytes.add(self.length).write(byte) };
        self.length += 1;
        self.length < BUFFER_BYTES || self.flush()
    }
}
