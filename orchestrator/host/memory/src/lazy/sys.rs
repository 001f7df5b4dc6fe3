//! System calls of the lazy server.
//!
//! Numbers and layouts are those of `include/uapi/linux/userfaultfd.h`.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PAGE;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

/// Messages that one read takes.
const MESSAGES: usize = 32;

/// Bytes of one message.
const MESSAGE_BYTES: usize = 32;

/// Bytes that one read takes at most.
pub(super) const EVENTS_BYTES: usize = MESSAGES * MESSAGE_BYTES;

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

/// What a process has done to its memory.
#[derive(Debug)]
pub(super) enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The memory was duplicated; this is the number of the duplicate's descriptor
    /// in the process that has read of it, which owns it.
    Fork(RawFd),
    /// Pages moved.
    Remap { from: u64, to: u64, bytes: u64 },
    /// Pages were given back or unmapped.
    Remove { start: u64, end: u64 },
}

/// How far a copy came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    /// Every page is there, or cannot be any more.
    All,
    /// Up to this byte; the rest has to be tried again, after events were read.
    Until(u64),
    /// The address space has ended.
    Gone,
}

/// Reads what has happened into a buffer; how many bytes. 0 when there is nothing.
pub(super) fn read_events(uffd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most the given length into the buffer.
    let read = unsafe { libc::read(uffd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(read).or_else(|_| {
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
            _ => Err(error),
        }
    })
}

/// What a buffer says that was all zeros before something was read into it.
pub(super) fn events(buffer: &[u8]) -> Vec<Event> {
    let messages = buffer.chunks_exact(MESSAGE_BYTES);
    messages.filter_map(event).collect()
}

fn event(message: &[u8]) -> Option<Event> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        0x12 => Some(Event::Fault(word(16) / PAGE * PAGE)),
        0x13 => {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&message[8..12]);
            let fd = RawFd::from_ne_bytes(bytes);
            (fd >= 0).then_some(Event::Fork(fd))
        }
        0x14 => Some(Event::Remap {
            from: word(8),
            to: word(16),
            bytes: word(24),
        }),
        0x15 | 0x16 => Some(Event::Remove {
            start: word(8),
            end: word(16),
        }),
        _ => None,
    }
}

/// Puts pages where there are none; pages that are there stay as they are and
/// are counted in `found`.
///
/// Nobody may read events of `uffd` meanwhile: it is what is not read yet that
/// tells pages that have moved from pages nobody wants any more.
pub(super) fn copy(
    uffd: BorrowedFd<'_>,
    to: u64,
    data: &[u8],
    found: &AtomicU64,
) -> io::Result<Copied> {
    let total = data.len() as u64;
    let mut at = 0;
    // Smaller once a piece has met the end of a mapping.
    let mut most = total;
    // The page that has no mapping, as far as the kernel says.
    let mut homeless = None;
    while at < total {
        let len = most.min(total - at);
        let mut copy = UffdioCopy {
            dst: to + at,
            src: data.as_ptr() as u64 + at,
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the request reads and writes one `UffdioCopy`, which lives
        // here, and reads `len` bytes of `data`, which ends at or after them.
        // It writes to memory of the process behind `uffd` only where there is
        // no page.
        if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) } == 0 {
            at += len;
            continue;
        }
        let error = io::Error::last_os_error();
        if let Ok(copied @ 1..) = u64::try_from(copy.copy) {
            // The next call says what is in the way.
            at += copied;
            continue;
        }
        match error.raw_os_error() {
            Some(libc::EEXIST) => {
                found.fetch_add(1, Ordering::Relaxed);
                at += PAGE;
            }
            // A mapping ends within the piece, or there is none that waits for
            // pages.
            Some(libc::ENOENT) if len > PAGE => most = (len / 2 / PAGE * PAGE).max(PAGE),
            // The kernel looks for changes before it looks for the mapping, and
            // again only once it has found one: a mapping that moves in between
            // looks like one that has gone. Its event is out by now, so the
            // second answer is true.
            Some(libc::ENOENT) if homeless != Some(at) => homeless = Some(at),
            Some(libc::ENOENT) => at += PAGE,
            // The cgroup may have room again before the time is up.
            Some(libc::EAGAIN | libc::EINTR | libc::ENOMEM) => return Ok(Copied::Until(at)),
            Some(libc::ESRCH) => return Ok(Copied::Gone),
            _ => return Err(error),
        }
    }
    Ok(Copied::All)
}

/// Puts a page of zeros where there is none.
pub(super) fn zero(uffd: BorrowedFd<'_>, at: u64) -> io::Result<Copied> {
    let mut zero = UffdioZeropage {
        range: UffdioRange {
            start: at,
            len: PAGE,
        },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: the request reads and writes one `UffdioZeropage`, which lives
    // here.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) } == 0 {
        return Ok(Copied::All);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EEXIST | libc::ENOENT) => Ok(Copied::All),
        Some(libc::EAGAIN | libc::EINTR | libc::ENOMEM) => Ok(Copied::Until(0)),
        Some(libc::ESRCH) => Ok(Copied::Gone),
        _ => Err(error),
    }
}

/// Stops watching a page that nothing is to come to: whoever waits for it is
/// woken and finds zeros.
pub(super) fn let_be(uffd: BorrowedFd<'_>, at: u64) -> io::Result<()> {
    let range = UffdioRange {
        start: at,
        len: PAGE,
    };
    // SAFETY: the request reads one `UffdioRange`, which lives here, and changes
    // no content.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw const range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the threads that wait for a page look again.
pub(super) fn wake(uffd: BorrowedFd<'_>, at: u64) {
    let range = UffdioRange {
        start: at,
        len: PAGE,
    };
    // SAFETY: the request reads one `UffdioRange`, which lives here. It cannot
    // fail but for an address space that has ended, where nobody waits.
    unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw const range) };
}

/// Waits until one of the descriptors can be read; says which can.
pub(super) fn poll(fds: &[RawFd], timeout_ms: Option<u64>) -> io::Result<Vec<bool>> {
    let mut list: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let timeout = timeout_ms.map_or(-1, |ms| i32::try_from(ms).unwrap_or(i32::MAX));
    // SAFETY: the list has as many entries as the call is told.
    let ready = unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, timeout) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(list
        .iter()
        .map(|entry| ready > 0 && entry.revents != 0)
        .collect())
}

/// Something to wake a poll with.
pub(super) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointer; the result is a new descriptor.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Wakes the poll.
pub(super) fn ring(bell: BorrowedFd<'_>) {
    let one = 1u64;
    // SAFETY: eight bytes that live here. It fails only when the bell rings
    // already.
    unsafe { libc::write(bell.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Takes note of it.
pub(super) fn hush(bell: BorrowedFd<'_>) {
    let mut count = 0u64;
    // SAFETY: room for eight bytes that lives here.
    unsafe { libc::read(bell.as_raw_fd(), (&raw mut count).cast(), 8) };
}

/// Receives at most `buffer.len()` bytes, and a descriptor if one comes along.
/// `None` when there is nothing yet.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let received = receive_all(socket, buffer, false)?;
    Ok(received.map(|(length, mut fds)| (length, fds.pop())))
}

/// Looks at what comes next without taking it: how many bytes of it there are, 0 at
/// the end of the connection, `None` when there is nothing yet.
pub(super) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    let (fd, length) = (socket.as_raw_fd(), buffer.len());
    // SAFETY: the kernel writes at most the given length into the buffer.
    let seen = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), length, flags) };
    if let Ok(seen) = usize::try_from(seen) {
        return Ok(Some(seen));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        io::ErrorKind::ConnectionReset => Ok(Some(0)),
        _ => Err(error),
    }
}

/// Descriptors that one message may bring.
const FDS_MAX: usize = 8;

/// Words of memory for them, header included.
const CONTROL_WORDS: usize = 2 + FDS_MAX / 2;

/// Receives at most `buffer.len()` bytes and the descriptors that come along.
/// `None` when there is nothing yet and it shall not be waited for.
pub(super) fn receive_all(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // Aligned as a header must be.
    let mut control = [0u64; CONTROL_WORDS];
    // SAFETY: all-zero is a valid message header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
    let received = loop {
        // SAFETY: the header points to memory that lives here, with its lengths.
        let received = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut header,
                flags | libc::MSG_CMSG_CLOEXEC,
            )
        };
        if let Ok(received) = usize::try_from(received) {
            break received;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted if wait => {}
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => return Ok(None),
            io::ErrorKind::ConnectionReset => return Ok(Some((0, Vec::new()))),
            _ => return Err(error),
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has written `msg_controllen` bytes of control data,
    // and the macros stay within them; descriptors in it are new and ours.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        if !first.is_null()
            && (*first).cmsg_level == libc::SOL_SOCKET
            && (*first).cmsg_type == libc::SCM_RIGHTS
        {
            let numbers = libc::CMSG_DATA(first).cast::<RawFd>();
            let bytes = (*first).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            for index in 0..bytes / size_of::<RawFd>() {
                let number = numbers.add(index).read_unaligned();
                fds.push(OwnedFd::from_raw_fd(number));
            }
        }
    }
    Ok(Some((received, fds)))
}

/// Sends a message with descriptors, or fails at once.
pub(super) fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    let numbers: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    if numbers.len() > FDS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = u32::try_from(size_of_val(numbers.as_slice())).unwrap_or(0);
    // Aligned as a header must be.
    let mut control = [0u64; CONTROL_WORDS];
    // SAFETY: all-zero is a valid message header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if bytes > 0 {
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: only computes.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: `control` has room for a header and `FDS_MAX` descriptors,
        // of which there are no more.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let to = libc::CMSG_DATA(first).cast::<RawFd>();
            for (index, number) in numbers.iter().enumerate() {
                to.add(index).write_unaligned(*number);
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the header points to memory that lives here, with its lengths,
    // and nothing of it is written to.
    if unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets every thread that waits for a page look again.
pub(super) fn wake_all(uffd: BorrowedFd<'_>) {
    // From `vm.mmap_min_addr`'s usual value to the end of the address space of
    // four levels of page tables, which is the lowest in use.
    let range = UffdioRange {
        start: 1 << 16,
        len: (1 << 47) - PAGE - (1 << 16),
    };
    // SAFETY: as for `wake`.
    unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw const range) };
}

/// Waits until the socket takes more.
pub(super) fn await_room(socket: BorrowedFd<'_>, limit_ms: i32) {
    let mut list = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry that lives here.
    unsafe { libc::poll(&raw mut list, 1, limit_ms) };
}

/// Whether the process that a pidfd stands for has ended.
pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    matches!(poll(&[pidfd.as_raw_fd()], Some(0)).as_deref(), Ok([true]))
}

/// Ends a connection for both sides.
pub(super) fn hang_up(socket: BorrowedFd<'_>) {
    // SAFETY: the call takes no pointer.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Forks, moves, given back and unmapped memory are reported: without these no
/// tree could be served.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Makes a userfaultfd with all that is needed, and closes it.
pub(super) fn probe() -> io::Result<()> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes no pointer; the result is a new descriptor.
    let uffd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut api = UffdioApi {
        api: 0xaa,
        features: FEATURES,
        ioctls: 0,
    };
    // SAFETY: the request reads and writes one `UffdioApi`, which lives here.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]
#[allow(clippy::cast_possible_truncation, reason = "a page fits everywhere")]
pub(super) mod tests {
    use std::os::fd::AsFd as _;
    use std::thread;

    use super::*;

    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const LIMIT_MS: u64 = 60_000;

    #[repr(C)]
    struct UffdioRegister {
        range: UffdioRange,
        mode: u64,
        ioctls: u64,
    }

    pub(in crate::lazy) fn map(pages: usize) -> u64 {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize * pages,
                protection,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        at.addr() as u64
    }

    /// `None` where this process may have none.
    pub(in crate::lazy) fn userfaultfd() -> Option<OwnedFd> {
        // SAFETY: the call takes no pointer; the result is a new descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return None;
        }
        // SAFETY: made above.
        let uffd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap()) };
        let mut api = UffdioApi {
            api: 0xaa,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes what lives here.
        let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        (done == 0).then_some(uffd)
    }

    /// Lets a page at `at` be missing.
    pub(in crate::lazy) fn register(uffd: &OwnedFd, at: u64) {
        let mut register = UffdioRegister {
            range: UffdioRange {
                start: at,
                len: PAGE,
            },
            mode: 1,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes what lives here.
        let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// A page, and who is told that it is missing.
    fn watched() -> Option<(u64, OwnedFd)> {
        let uffd = userfaultfd()?;
        let at = map(1);
        register(&uffd, at);
        Some((at, uffd))
    }

    fn read(uffd: &OwnedFd) -> Vec<Event> {
        let mut buffer = [0; EVENTS_BYTES];
        read_events(uffd.as_fd(), &mut buffer).unwrap();
        events(&buffer)
    }

    fn await_event(uffd: &OwnedFd) {
        assert_eq!(poll(&[uffd.as_raw_fd()], Some(LIMIT_MS)).unwrap(), [true]);
    }

    #[test]
    fn a_page_that_moves_while_it_is_copied_is_not_given_up() {
        let (Some((from, uffd)), Some((source, source_uffd))) = (watched(), watched()) else {
            println!("SKIP a_page_that_moves_while_it_is_copied_is_not_given_up: no userfaultfd");
            return;
        };
        let to = map(1);
        let content = [7u8; PAGE as usize];
        let found = AtomicU64::new(0);
        // SAFETY: a page of ours, which is filled once and stays for good.
        let data = unsafe { std::slice::from_raw_parts(source as *const u8, PAGE as usize) };
        thread::scope(|scope| {
            // The kernel has let go of the mapping when it waits for the data.
            let copying = scope.spawn(|| copy(uffd.as_fd(), from, data, &found).unwrap());
            await_event(&source_uffd);
            let moving = scope.spawn(|| {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let bytes = PAGE as usize;
                // SAFETY: a page that only the kernel knows goes where another
                // one of ours was.
                let at = unsafe { libc::mremap(from as *mut _, bytes, bytes, flags, to) };
                assert_eq!(at.addr() as u64, to);
            });
            await_event(&uffd);
            assert_eq!(
                copy(source_uffd.as_fd(), source, &content, &found).unwrap(),
                Copied::All
            );
            // Judged once nobody waits for events any more.
            let copied = copying.join();
            let moved = read(&uffd);
            // It also says that nothing is left behind.
            while !moving.is_finished() {
                poll(&[uffd.as_raw_fd()], Some(1)).unwrap();
                read(&uffd);
            }
            moving.join().unwrap();
            assert_eq!(copied.unwrap(), Copied::Until(0));
            // The word that nothing is left behind may be out already.
            assert!(
                matches!(
                    moved[..],
                    [Event::Remap { from: f, to: t, bytes: PAGE }]
                    | [Event::Remap { from: f, to: t, bytes: PAGE }, Event::Remove { .. }]
                        if (f, t) == (from, to)
                ),
                "{moved:?}"
            );
            assert_eq!(copy(uffd.as_fd(), to, data, &found).unwrap(), Copied::All);
        });
        // SAFETY: a page of ours that is there.
        assert_eq!(unsafe { (to as *const u8).read_volatile() }, 7);
        // Where nothing is any more, nothing is wanted.
        assert_eq!(
            copy(uffd.as_fd(), from, &content, &found).unwrap(),
            Copied::All
        );
    }
}
