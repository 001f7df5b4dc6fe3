//! The process that the self-check dumps.
//!
//! The check must know that this CRIU under this library on this kernel leaves
//! out what is clean and nothing else. So it starts a program with the library
//! preloaded and has it become, before its `main`, a process with known memory:
//!
//! ```text
//! pages   0 .. 528   protected by a userfaultfd; then page 5 is written
//!       528 .. 544   not protected
//! ```
//!
//! What is protected is one mapping, large enough to be scanned in one
//! (`ANONYMOUS_BYTES_MIN`).
//!
//! On the socket that it is given it says where that is, waits until the
//! userfaultfd has been taken out of it, closes both, and sleeps.

use core::ffi::c_int;

use crate::sys::{__errno_location, address, call, number};

/// Bytes of a page on the machines that CRIU's images are written for here.
const PAGE_BYTES: isize = 4096;
/// Pages in all.
const PAGES: isize = 544;
/// Pages that are protected, from the first on.
const PROTECTED: isize = 528;
/// The page among them that is written.
const WRITTEN: isize = 5;
/// Ends itself when nobody else does: a check takes a fraction of a second.
const LIFE_S: isize = 60;

/// The message: three numbers.
#[repr(C)]
struct Message {
    /// 0, or the step that failed.
    step: isize,
    /// The userfaultfd, or what `errno` says.
    detail: isize,
    /// Where the pages are.
    pages: isize,
}

/// `UFFDIO_API`, `UFFDIO_REGISTER` and `UFFDIO_WRITEPROTECT` with what they
/// take (`linux/userfaultfd.h`).
const UFFDIO_API: isize = 0xc018_aa3f;
const UFFDIO_REGISTER: isize = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: isize = 0xc018_aa06;
const UFFD_API: isize = 0xaa;
const UFFD_FEATURE_WP_ASYNC: isize = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: isize = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: isize = 1 << 0;
/// `O_CLOEXEC | UFFD_USER_MODE_ONLY`.
const UFFD_FLAGS: isize = 0o2_000_000 | 1;

/// Becomes that process. Does not return.
pub(crate) fn run(socket: c_int) -> ! {
    let message = match prepare() {
        Ok(message) | Err(message) => message,
    };
    let socket = socket as isize;
    let mut word = 0u8;
    // SAFETY: plain system calls on memory of this function; the descriptors
    // are this process's own.
    unsafe {
        let told = call(
            number::WRITE,
            [socket, address(&raw const message), 24, 0, 0, 0],
        );
        let heard = call(number::READ, [socket, address(&raw mut word), 1, 0, 0, 0]);
        if told == 24 && heard == 1 && message.step == 0 {
            call(number::CLOSE, [message.detail, 0, 0, 0, 0, 0]);
            // The other end sees this once the line above is done.
            call(number::CLOSE, [socket, 0, 0, 0, 0, 0]);
            loop {
                call(number::PPOLL, [0; 6]);
            }
        }
        loop {
            call(number::EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
        }
    }
}

fn prepare() -> Result<Message, Message> {
    let life = [0, 0, LIFE_S, 0];
    step(
        1,
        number::SETITIMER,
        [0, address(&raw const life), 0, 0, 0, 0],
    )?;
    // Readable and writable; private, anonymous and populated.
    let pages = step(2, number::MMAP, [0, PAGES * PAGE_BYTES, 3, 0x8022, -1, 0])?;
    for page in 0..PAGES {
        fill(pages, page);
    }
    let fd = step(3, number::USERFAULTFD, [UFFD_FLAGS, 0, 0, 0, 0, 0])?;
    let mut api = [UFFD_API, UFFD_FEATURE_WP_ASYNC, 0];
    step(
        4,
        number::IOCTL,
        [fd, UFFDIO_API, address(&raw mut api), 0, 0, 0],
    )?;
    let length = PROTECTED * PAGE_BYTES;
    let mut register = [pages, length, UFFDIO_REGISTER_MODE_WP, 0];
    step(
        5,
        number::IOCTL,
        [fd, UFFDIO_REGISTER, address(&raw mut register), 0, 0, 0],
    )?;
    let mut protect = [pages, length, UFFDIO_WRITEPROTECT_MODE_WP];
    step(
        6,
        number::IOCTL,
        [fd, UFFDIO_WRITEPROTECT, address(&raw mut protect), 0, 0, 0],
    )?;
    fill(pages, WRITTEN);
    Ok(Message {
        step: 0,
        detail: fd,
        pages,
    })
}

/// Writes the page's number, counted from one, into its first byte, as far as it fits.
fn fill(pages: isize, page: isize) {
    let at = pages + page * PAGE_BYTES;
    let [value, ..] = (page + 1).to_le_bytes();
    if let Ok(at) = usize::try_from(at) {
        // SAFETY: within what `prepare` has just mapped, which nothing else
        // knows of.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(at).write_volatile(value) };
    }
}

fn step(step: isize, number: isize, arguments: [isize; 6]) -> Result<isize, Message> {
    // SAFETY: every pointer handed over by `prepare` outlives the call.
    let result = unsafe { call(number, arguments) };
    if result >= 0 {
        return Ok(result);
    }
    // SAFETY: of this thread.
    let errno = unsafe { *__errno_location() };
    Err(Message {
        step,
        detail: errno as isize,
        pages: 0,
    })
}
