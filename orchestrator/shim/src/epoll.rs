//! Whether a descriptor still is the file that an epoll set has it for.
//!
//! CRIU asks that of every entry of a set (`find_tfd_bsearch` of `criu/eventpoll.c`, by
//! `kcmp` with `KCMP_EPOLL_TFD`), and the kernel walks through the set for each answer
//! (`get_epoll_tfile_raw_ptr` of `fs/eventpoll.c`): with ten thousand connections in one
//! that is most of a dump. What the set shows of itself in `fdinfo` names the file of each
//! entry, by file system and inode. A socket is open once, however many descriptors
//! there are of it, so that the descriptor's file is the entry's where both are the same
//! there. That is a yes; whatever else there is, the kernel is asked.
//!
//! The tree stands still while CRIU asks, so a set is read once.

use core::ffi::c_int;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::paths::{self, ProcessBuffer};
use crate::sys::{AT_FDCWD, STAT_MODE_AT, address, call, number};

/// `KCMP_EPOLL_TFD` of `linux/kcmp.h`.
pub(crate) const EPOLL_TFD: c_int = 7;

/// `struct kcmp_epoll_slot` of `linux/kcmp.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    /// The set's descriptor.
    pub(crate) set: u32,
    /// Under which number the file was put in.
    pub(crate) fd: u32,
    /// Which one, of those with this number.
    pub(crate) index: u32,
}

/// What a set shows of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Under which number the file was put in.
    fd: u32,
    /// As the kernel keeps it (`MKDEV`), not as `stat` shows it.
    device: u32,
    inode: u64,
}

/// Reads a line of `fdinfo` (`ep_show_fdinfo` of `fs/eventpoll.c`); `None`: it is not that of
/// an entry.
fn entry(line: &[u8]) -> Option<Entry> {
    let mut words = line
        .split(|byte| *byte == b' ')
        .filter(|word| !word.is_empty());
    if words.next() != Some(b"tfd:") {
        return None;
    }
    let fd = value(words.next()?, 10)?;
    let (mut device, mut inode) = (None, None);
    for word in words {
        if let Some(digits) = word.strip_prefix(b"ino:") {
            inode = value(digits, 16);
        } else if let Some(digits) = word.strip_prefix(b"sdev:") {
            device = value(digits, 16);
        }
    }
    Some(Entry {
        fd: u32::try_from(fd).ok()?,
        device: u32::try_from(device?).ok()?,
        inode: inode?,
    })
}

fn value(digits: &[u8], base: u32) -> Option<u64> {
    let mut value: u64 = 0;
    for digit in digits {
        let digit = char::from(*digit).to_digit(base)?;
        value = value
            .checked_mul(u64::from(base))?
            .checked_add(u64::from(digit))?;
    }
    (!digits.is_empty()).then_some(value)
}

/// A device number of `stat` as the kernel keeps it (`new_encode_dev` of `linux/kdev_t.h`).
fn kept(shown: u64) -> u32 {
    let minor = shown & 0xff | (shown >> 12) & 0xf_ff00;
    let major = (shown >> 8) & 0xfff;
    u32::try_from(major << 20 | minor).unwrap_or(u32::MAX)
}

/// Of descriptors with higher numbers than `fs.nr_open` allows by default nothing is known.
const FDS: usize = 1 << 20;

/// What is known of the entry with one number.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Known {
    /// The reading that this is of; 0: none.
    reading: u32,
    device: u32,
    inode: u64,
}

/// As many as [`FDS`]; null until the first question. Never unmapped.
static KNOWN: AtomicPtr<Known> = AtomicPtr::new(core::ptr::null_mut());
/// The process and descriptor of the set that was read last.
static SET: AtomicU64 = AtomicU64::new(u64::MAX);
/// How many have been read; the number of the last one.
static READING: AtomicU32 = AtomicU32::new(0);
/// [`READING`] where that has succeeded, else what it was before.
static READ: AtomicU32 = AtomicU32::new(0);

/// Whether `fd` of a process certainly is the file of an entry. One thread asks: CRIU, which
/// has no other while it dumps.
pub(crate) fn has(process: u32, fd: u32, slot: Slot) -> bool {
    if slot.fd != fd || slot.index != 0 {
        return false;
    }
    let set = u64::from(process) << 32 | u64::from(slot.set);
    if SET.swap(set, Ordering::Relaxed) != set {
        let reading = READING.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if reading != 0 && read(process, slot.set, reading).is_some() {
            READ.store(reading, Ordering::Relaxed);
        }
    }
    let reading = READING.load(Ordering::Relaxed);
    if READ.load(Ordering::Relaxed) != reading {
        return false;
    }
    let Some(known) = known(fd) else {
        return false;
    };
    // SAFETY: of the table, which one thread uses.
    let known = unsafe { known.read() };
    known.reading == reading && socket(process, fd) == Some((known.device, known.inode))
}

/// Where the table has an entry.
fn known(fd: u32) -> Option<*mut Known> {
    /// `PROT_READ | PROT_WRITE`; `MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE`.
    const READ_WRITE: isize = 3;
    const SPARSE: isize = 0x4022;
    let index = usize::try_from(fd).ok().filter(|index| *index < FDS)?;
    let mut table = KNOWN.load(Ordering::Relaxed);
    if table.is_null() {
        let length = (FDS * size_of::<Known>()).cast_signed();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { call(number::MMAP, [0, length, READ_WRITE, SPARSE, -1, 0]) };
        if at == -1 {
            return None;
        }
        table = core::ptr::with_exposed_provenance_mut(at.cast_unsigned());
        KNOWN.store(table, Ordering::Relaxed);
    }
    // SAFETY: within the table.
    Some(unsafe { table.add(index) })
}

/// Notes every entry of a set. `None` where one cannot be, or where two have the same number.
fn read(process: u32, set: u32, reading: u32) -> Option<()> {
    /// `O_RDONLY | O_CLOEXEC`.
    const READ_ONLY: isize = 0o2_000_000;
    let mut path: ProcessBuffer = [0; 48];
    let path = paths::of_process(process, b"/fdinfo/", set, &mut path);
    // SAFETY: a path with a zero at its end; a descriptor of our own.
    unsafe {
        let file = call(
            number::OPENAT,
            [AT_FDCWD, address(path.as_ptr()), READ_ONLY, 0, 0, 0],
        );
        if file == -1 {
            return None;
        }
        let noted = note(file, reading);
        call(number::CLOSE, [file, 0, 0, 0, 0, 0]);
        noted
    }
}

fn note(file: isize, reading: u32) -> Option<()> {
    /// Longer than any line.
    const LINE: usize = 256;
    let mut line = [0; LINE];
    let mut length = 0;
    let mut bytes = [0; 16 << 10];
    loop {
        // SAFETY: into the buffer, of that length.
        let got = unsafe {
            let room = bytes.len().cast_signed();
            call(
                number::READ,
                [file, address(bytes.as_mut_ptr()), room, 0, 0, 0],
            )
        };
        let got = bytes.get(..usize::try_from(got).ok()?)?;
        if got.is_empty() {
            return (length == 0).then_some(());
        }
        for byte in got {
            if *byte != b'\n' {
                *line.get_mut(length)? = *byte;
                length += 1;
                continue;
            }
            let whole = line.get(..length)?;
            length = 0;
            if let Some(entry) = entry(whole) {
                let known = known(entry.fd)?;
                // SAFETY: of the table, which one thread uses.
                unsafe {
                    if known.read().reading == reading {
                        return None;
                    }
                    known.write(Known {
                        reading,
                        device: entry.device,
                        inode: entry.inode,
                    });
                }
            } else if whole.starts_with(b"tfd:") {
                return None;
            }
        }
    }
}

/// File system and inode of the socket that is open there; `None`: there is none.
fn socket(process: u32, fd: u32) -> Option<(u32, u64)> {
    /// `S_IFMT`, `S_IFSOCK` of `linux/stat.h`.
    const KIND: u32 = 0o170_000;
    const SOCKET: u32 = 0o140_000;
    let mut path: ProcessBuffer = [0; 48];
    let path = paths::of_process(process, b"/fd/", fd, &mut path);
    let mut stat = [0_u64; 32];
    // SAFETY: a path with a zero at its end, and room for the structure that the call writes.
    let done = unsafe {
        call(
            number::NEWFSTATAT,
            [
                AT_FDCWD,
                address(path.as_ptr()),
                address(stat.as_mut_ptr()),
                0,
                0,
                0,
            ],
        )
    };
    // SAFETY: a field of the structure, aligned.
    let mode = unsafe { stat.as_ptr().byte_add(STAT_MODE_AT).cast::<u32>().read() };
    (done == 0 && mode & KIND == SOCKET).then_some((kept(stat[0]), stat[1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::syscall;
    use std::fs::File;
    use std::io::pipe;
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
    use std::os::unix::net::UnixDatagram;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::vec::Vec;

    /// CRIU has one thread.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set() -> OwnedFd {
        // SAFETY: a new descriptor.
        unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) }
    }

    fn put(set: &OwnedFd, fd: RawFd) {
        let mut event = libc::epoll_event { events: 1, u64: 7 };
        // SAFETY: descriptors that are open.
        let done =
            unsafe { libc::epoll_ctl(set.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        assert_eq!(done, 0);
    }

    fn unsigned(fd: RawFd) -> u32 {
        u32::try_from(fd).unwrap()
    }

    /// Asks as CRIU does, here or the kernel itself.
    fn asked(
        ask: unsafe extern "C" fn(isize, isize, isize, isize, isize, isize, isize) -> isize,
        set: &OwnedFd,
        fd: RawFd,
        index: u32,
    ) -> isize {
        let process = isize::try_from(std::process::id()).unwrap();
        let slot = Slot {
            set: unsigned(set.as_raw_fd()),
            fd: unsigned(fd),
            index,
        };
        // SAFETY: the arguments of this call.
        unsafe {
            ask(
                number::KCMP,
                process,
                process,
                isize::try_from(EPOLL_TFD).unwrap(),
                isize::try_from(fd).unwrap(),
                address(&raw const slot),
                0,
            )
        }
    }

    unsafe extern "C" fn kernel(
        number: isize,
        a: isize,
        b: isize,
        c: isize,
        d: isize,
        e: isize,
        f: isize,
    ) -> isize {
        // SAFETY: the caller's promise.
        unsafe { call(number, [a, b, c, d, e, f]) }
    }

    /// Forgets what was read, as if CRIU had been started anew.
    fn anew() {
        SET.store(u64::MAX, Ordering::Relaxed);
    }

    #[test]
    fn the_answer_is_the_kernels() {
        let _alone = alone();
        let set = set();
        let sockets: Vec<_> = (0..300).map(|_| UnixDatagram::unbound().unwrap()).collect();
        let (reader, _writer) = pipe().unwrap();
        for socket in &sockets {
            put(&set, socket.as_raw_fd());
        }
        put(&set, reader.as_raw_fd());
        let fds: Vec<_> = sockets
            .iter()
            .map(UnixDatagram::as_raw_fd)
            .chain([reader.as_raw_fd()])
            .collect();
        let same = |fd, index| {
            let told = asked(syscall, &set, fd, index);
            let kernels = asked(kernel, &set, fd, index);
            assert_eq!(told, kernels, "{fd} {index}");
            told
        };
        if asked(kernel, &set, fds[0], 0) != 0 {
            std::println!("SKIP kcmp: {}", std::io::Error::last_os_error());
            return;
        }
        anew();
        for fd in &fds {
            assert_eq!(same(*fd, 0), 0);
            assert_eq!(same(*fd, 1), -1);
            let slot = Slot {
                set: unsigned(set.as_raw_fd()),
                fd: unsigned(*fd),
                index: 0,
            };
            let process = std::process::id();
            let known = has(process, unsigned(*fd), slot);
            assert_eq!(known, *fd != reader.as_raw_fd());
        }
        // Another file has taken the place of one.
        let other = UnixDatagram::unbound().unwrap();
        let kept = sockets[7].try_clone().unwrap();
        // SAFETY: descriptors of this test.
        unsafe { libc::dup2(other.as_raw_fd(), sockets[7].as_raw_fd()) };
        assert_ne!(same(sockets[7].as_raw_fd(), 0), 0);
        // And is in the set as well, under the same number.
        put(&set, sockets[7].as_raw_fd());
        anew();
        let (first, second) = (
            same(sockets[7].as_raw_fd(), 0),
            same(sockets[7].as_raw_fd(), 1),
        );
        assert!((first == 0) != (second == 0), "{first} {second}");
        assert_eq!(same(sockets[8].as_raw_fd(), 0), 0);
        drop(kept);
        // No set, and no descriptor.
        anew();
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        assert_eq!(asked(syscall, &file, fds[0], 0), -1);
        assert_eq!(asked(syscall, &set, 1_000_000, 0), -1);
    }

    #[test]
    fn lines_of_sets_are_read() {
        let line = b"tfd:       11 events: 80000019 data:     7f0000000b  pos:0 ino:2ea7 sdev:8";
        let expected = Entry {
            fd: 11,
            device: 8,
            inode: 0x2ea7,
        };
        assert_eq!(entry(line), Some(expected));
        for other in [
            &b"pos:\t0"[..],
            b"",
            b"tfd: x events: 19 data: 0 pos:0 ino:2 sdev:8",
            b"tfd: 11 events: 19 data: 0 pos:0 sdev:8",
            b"tfd: 11 events: 19 data: 0 pos:0 ino:2",
            b"tfd: 11 events: 19 data: 0 pos:0 ino: sdev:8",
            b"tfd: 99999999999 events: 19 data: 0 pos:0 ino:2 sdev:8",
        ] {
            assert_eq!(entry(other), None);
        }
    }

    #[test]
    fn a_device_number_is_told_as_the_kernel_keeps_it() {
        assert_eq!(kept(8), 8);
        assert_eq!(kept(libc::makedev(0, 0x1234)), 0x1234);
        assert_eq!(kept(libc::makedev(259, 0x12345)), 259 << 20 | 0x12345);
    }
}
