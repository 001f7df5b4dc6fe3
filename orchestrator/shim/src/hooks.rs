//! The functions that CRIU calls in the belief that they are the C library's.
//!
//! Some of them take a variable number of arguments in C. On the machines that
//! are known here a caller passes those as it passes fixed ones, so that a
//! fixed signature with the most arguments reads them, and reads a register of
//! no meaning where there was none; such a value is not used.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};

use crate::clean;
use crate::epoll::{self, EPOLL_TFD, Slot};
use crate::mappings;
use crate::paths::{self, LinkBuffer, PLACE_BYTES_MAX, PathBuffer, TargetBuffer};
use crate::probe;
use crate::scan::{self, Kind, MapQuery, PAGEMAP_SCAN, PAGEMAP_SOFT_DIRTY, ScanArg};
use crate::segments::{self, TABLE_BYTES, Table};
use crate::sys::{AT_FDCWD, STAT_MODE_AT, STAT_RDEV_AT, address, call, getenv, number, unsetenv};

#[cfg(not(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_endian = "little",
    target_pointer_width = "64"
)))]
compile_error!("how variable arguments are passed on this machine is not known here");

/// Holds this library's path, as the loader reads it.
const PRELOAD: &CStr = c"LD_PRELOAD";
/// Names the file that takes the place of CRIU's cache.
const KDAT: &CStr = c"MIGRATE_SHIM_KDAT";
/// Holds the number of a socket: be the process that the self-check dumps.
const PROBE: &CStr = c"MIGRATE_SHIM_PROBE";

/// Holds the number of a descriptor of the page that names segments.
const SEGMENTS: &CStr = c"MIGRATE_SHIM_SEGMENTS";

/// Holds the number of a descriptor of the file that names tasks, and takes records.
const CLEAN: &CStr = c"MIGRATE_SHIM_CLEAN";

/// That descriptor, -1 where there is none. Never closed.
static CLEAN_FILE: AtomicI32 = AtomicI32::new(-1);

/// Its table; null where there is none. Never unmapped.
static CLEAN_TABLE: AtomicPtr<clean::Table> = AtomicPtr::new(core::ptr::null_mut());

/// Is there when a tunnel device is to look like one without a state.
const TUNNELS: &CStr = c"MIGRATE_SHIM_TUNNELS";

/// Holds the number of a descriptor of the program that reads flags of mappings.
const MAPPINGS: &CStr = c"MIGRATE_SHIM_MAPPINGS";

/// That descriptor, -1 where there is none. Never closed.
static MAPPINGS_PROGRAM: AtomicI32 = AtomicI32::new(-1);

/// Whether it was there. Else CRIU sees what is there, and refuses it.
static SHOW_TUNNELS: AtomicBool = AtomicBool::new(false);

/// The page that names segments; null where there is none. Never unmapped.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());

/// Room for `struct stat`, which begins with the numbers of device and inode, and
/// has 144 bytes or fewer on these machines.
type StatBuffer = [u64; 32];

/// `O_RDONLY | O_CLOEXEC`.
const READ_ONLY: isize = 0o2_000_000;

/// Entries of a pagemap have eight bytes.
const ENTRY_BYTES: usize = 8;

/// The other cache's path. Written once, before CRIU's `main`, since CRIU
/// moves and overwrites the environment.
struct Place {
    bytes: UnsafeCell<[u8; PLACE_BYTES_MAX]>,
    length: AtomicUsize,
}

// SAFETY: the bytes are written only while the loader starts the process, when
// there is one thread, and before the length says that there are any.
unsafe impl Sync for Place {}

static PLACE: Place = Place {
    bytes: UnsafeCell::new([0; PLACE_BYTES_MAX]),
    length: AtomicUsize::new(0),
};

impl Place {
    fn get(&self) -> &[u8] {
        let length = self.length.load(Ordering::Acquire);
        // SAFETY: written before the length was, and never again.
        let bytes: &[u8; PLACE_BYTES_MAX] = unsafe { &*self.bytes.get() };
        bytes.get(..length).unwrap_or_default()
    }

    /// # Safety
    ///
    /// No other thread exists.
    unsafe fn set(&self, path: &[u8]) {
        if path.len() > PLACE_BYTES_MAX {
            return;
        }
        // SAFETY: the caller's promise.
        let bytes = unsafe { &mut *self.bytes.get() };
        for (to, from) in bytes.iter_mut().zip(path) {
            *to = *from;
        }
        self.length.store(path.len(), Ordering::Release);
    }
}

#[cfg(preload)]
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

/// Called by the loader, after the C library has been set up and before
/// `main`. What CRIU runs (`iptables`, `nft`) finds no trace of us.
extern "C" fn start() {
    /// `F_SETFD` and `FD_CLOEXEC`.
    const SET_FLAGS: isize = 2;
    const CLOSE_ON_EXEC: isize = 1;
    // SAFETY: there is one thread; the strings that `getenv` gives are read
    // before the environment is changed.
    unsafe {
        PLACE.set(variable(KDAT).unwrap_or_default());
        let probe = variable(PROBE).and_then(paths::number_at_end);
        SHOW_TUNNELS.store(variable(TUNNELS).is_some(), Ordering::Release);
        // The library was loaded from a descriptor, which is of no more use.
        if let Some(fd) = variable(PRELOAD).and_then(paths::number_at_end) {
            call(number::CLOSE, [whole(fd), 0, 0, 0, 0, 0]);
        }
        if let Some(fd) = variable(SEGMENTS).and_then(paths::number_at_end) {
            TABLE.store(share(fd, TABLE_BYTES, READ), Ordering::Release);
            call(number::CLOSE, [whole(fd), 0, 0, 0, 0, 0]);
        }
        // What CRIU runs is not to have these.
        let keep = |fd| {
            let arguments = [whole(fd), SET_FLAGS, CLOSE_ON_EXEC, 0, 0, 0];
            call(number::FCNTL, arguments);
        };
        if let Some(fd) = variable(MAPPINGS).and_then(paths::number_at_end) {
            keep(fd);
            MAPPINGS_PROGRAM.store(fd, Ordering::Release);
        }
        if let Some(fd) = variable(CLEAN).and_then(paths::number_at_end) {
            keep(fd);
            let table = share(fd, clean::TABLE_BYTES, READ_WRITE);
            CLEAN_TABLE.store(table, Ordering::Release);
            CLEAN_FILE.store(fd, Ordering::Release);
        }
        for name in [PRELOAD, KDAT, PROBE, SEGMENTS, TUNNELS, MAPPINGS, CLEAN] {
            unsetenv(name.as_ptr());
        }
        if let Some(socket) = probe {
            probe::run(socket);
        }
    }
}

/// `PROT_READ`, `PROT_READ | PROT_WRITE`.
const READ: isize = 1;
const READ_WRITE: isize = 3;

/// Maps what is shared with whoever has started CRIU; null where that cannot be.
fn share<T>(fd: c_int, bytes: usize, protection: isize) -> *mut T {
    /// `MAP_SHARED`.
    const SHARED: isize = 1;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        let arguments = [0, bytes.cast_signed(), protection, SHARED, whole(fd), 0];
        call(number::MMAP, arguments)
    };
    if at == -1 {
        return core::ptr::null_mut();
    }
    core::ptr::with_exposed_provenance_mut(at.cast_unsigned())
}

/// # Safety
///
/// Nobody changes the environment while the value is in use.
unsafe fn variable(name: &CStr) -> Option<&'static [u8]> {
    // SAFETY: a C string; the result is one too, or null.
    unsafe {
        let value = getenv(name.as_ptr());
        (!value.is_null()).then(|| CStr::from_ptr(value).to_bytes())
    }
}

/// `ioctl(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: usize, argument: *mut c_void) -> c_int {
    let pass = |argument: *const c_void| {
        // SAFETY: what CRIU itself has asked for.
        let result = unsafe {
            call(
                number::IOCTL,
                [whole(fd), request.cast_signed(), address(argument), 0, 0, 0],
            )
        };
        narrow(result)
    };
    if request != PAGEMAP_SCAN || argument.is_null() {
        return pass(argument);
    }
    let scan = argument.cast::<ScanArg>();
    // SAFETY: this request has an argument of this type.
    match unsafe { (*scan).kind() } {
        Kind::Other => pass(argument),
        // EFAULT: the dump fails, and the tree runs on.
        Kind::Selects => pass(core::ptr::null()),
        // SAFETY: as above; the regions are where CRIU wants them, and there
        // are as many as the kernel says.
        Kind::Asks => unsafe {
            let asked = *scan;
            let wanted = asked.return_mask;
            (*scan).return_mask = scan::question(wanted);
            let owner = asked
                .spares_files()
                .then(|| open_on_anonymous(fd, asked.start, asked.end))
                .flatten();
            if owner.is_some() {
                // True of every page there, so that nobody has to look.
                (*scan).category_mask &= !scan::FILE;
                (*scan).category_inverted &= !scan::FILE;
            }
            let mut count = pass(argument);
            (*scan).return_mask = wanted;
            (*scan).category_mask = asked.category_mask;
            (*scan).category_inverted = asked.category_inverted;
            if asked.is_complete(count) {
                (*scan).walk_end = asked.end;
            }
            let regions = (*scan).vec;
            if let Some(process) = owner
                && let Some(table) = CLEAN_TABLE.load(Ordering::Acquire).as_ref()
                && clean::named(table, process)
                && let Ok(told @ 1..) = usize::try_from(count)
            {
                let file = whole(CLEAN_FILE.load(Ordering::Acquire));
                let left = clean::take(table, file, process, regions, told);
                count = c_int::try_from(left).unwrap_or(count);
            }
            for index in 0..usize::try_from(count).unwrap_or(0) {
                let region = regions.add(index);
                (*region).categories = scan::answer(wanted, (*region).categories);
            }
            count
        },
    }
}

/// `syscall(2)`, for calls that the C library has no function of its own for.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn syscall(
    number: isize,
    a: isize,
    b: isize,
    c: isize,
    d: isize,
    e: isize,
    f: isize,
) -> isize {
    // kcmp(PID, PID, EPOLL_TFD, FD, SLOT)
    if number == number::KCMP && narrow(c) == EPOLL_TFD && narrow(a) == narrow(b) && e != 0 {
        let numbers = (u32::try_from(narrow(a)), u32::try_from(narrow(d)));
        // SAFETY: this call has an argument of this type.
        let slot = unsafe {
            core::ptr::with_exposed_provenance::<Slot>(e.cast_unsigned()).read_unaligned()
        };
        if let (Ok(process), Ok(fd)) = numbers
            && aside(|| epoll::has(process, fd, slot))
        {
            return 0;
        }
    }
    // SAFETY: what CRIU itself has asked for.
    unsafe { call(number, [a, b, c, d, e, f]) }
}

/// `read(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, count: usize) -> isize {
    // SAFETY: what CRIU itself has asked for.
    let result = unsafe {
        call(
            number::READ,
            [whole(fd), address(buffer), count.cast_signed(), 0, 0, 0],
        )
    };
    // One entry is what the probe reads; most reads need no second look.
    if count == ENTRY_BYTES && result == 8 {
        // SAFETY: the kernel has just written these bytes.
        unsafe { all_dirty(fd, buffer, ENTRY_BYTES) };
    }
    result
}

/// `pread(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pread64(
    fd: c_int,
    buffer: *mut c_void,
    count: usize,
    offset: isize,
) -> isize {
    // SAFETY: what CRIU itself has asked for.
    let result = unsafe {
        call(
            number::PREAD64,
            [
                whole(fd),
                address(buffer),
                count.cast_signed(),
                offset,
                0,
                0,
            ],
        )
    };
    if count.is_multiple_of(ENTRY_BYTES)
        && let Ok(bytes) = usize::try_from(result)
    {
        // SAFETY: the kernel has just written these bytes.
        unsafe { all_dirty(fd, buffer, bytes) };
    }
    result
}

/// Sets the soft-dirty bit in every entry that was read, if `fd` is a pagemap.
///
/// # Safety
///
/// `buffer` holds that many bytes.
unsafe fn all_dirty(fd: c_int, buffer: *mut c_void, bytes: usize) {
    if bytes == 0 || !u32::try_from(fd).is_ok_and(open_on_pagemap) {
        return;
    }
    let entries = buffer.cast::<u64>();
    for index in 0..bytes / ENTRY_BYTES {
        // SAFETY: the caller's promise; the buffer need not be aligned.
        unsafe {
            let entry = entries.add(index);
            entry.write_unaligned(entry.read_unaligned() | PAGEMAP_SOFT_DIRTY);
        }
    }
}

/// What `fd` is open on; `None` where that cannot be told. Leaves `errno` as it
/// was.
fn target_of(fd: u32, target: &mut TargetBuffer) -> Option<&[u8]> {
    let mut link: LinkBuffer = [0; 32];
    let link = paths::fd_link(fd, &mut link);
    // SAFETY: a path with a zero at its end, and a buffer of that length;
    // `errno` belongs to this thread.
    let length = unsafe {
        let errno = crate::sys::__errno_location();
        let before = *errno;
        let length = call(
            number::READLINKAT,
            [
                AT_FDCWD,
                address(link.as_ptr()),
                address(target.as_mut_ptr()),
                size_of::<TargetBuffer>().cast_signed(),
                0,
                0,
            ],
        );
        *errno = before;
        length
    };
    usize::try_from(length)
        .ok()
        .and_then(|length| target.get(..length))
}

/// Leaves `errno` as it was.
fn open_on_pagemap(fd: u32) -> bool {
    let mut target: TargetBuffer = [0; 64];
    target_of(fd, &mut target).is_some_and(paths::is_pagemap)
}

/// Opens the `maps` beside the `pagemap` or `smaps` that `fd` is open on; also gives
/// the target of `fd`. `None` where that cannot be. The descriptor is the caller's to close.
fn open_maps_beside(fd: c_int, target: &mut TargetBuffer) -> Option<(isize, &[u8])> {
    let mut buffer: TargetBuffer = [0; 64];
    let target = target_of(u32::try_from(fd).ok()?, target)?;
    let path = paths::maps_beside(target, &mut buffer)?;
    // SAFETY: a path with a zero at its end, a descriptor of our own.
    unsafe {
        let arguments = [AT_FDCWD, address(path.as_ptr()), READ_ONLY, 0, 0, 0];
        let maps = call(number::OPENAT, arguments);
        if maps == -1 {
            return None;
        }
        // Another /proc has other processes.
        if device_of(whole(fd)).is_some_and(|own| device_of(maps) == Some(own)) {
            return Some((maps, target));
        }
        call(number::CLOSE, [maps, 0, 0, 0, 0, 0]);
        None
    }
}

/// Runs what may leave an `errno` behind that is none of CRIU's business.
fn aside<T>(run: impl FnOnce() -> T) -> T {
    // SAFETY: `errno` belongs to this thread.
    unsafe {
        let errno = crate::sys::__errno_location();
        let before = *errno;
        let result = run();
        *errno = before;
        result
    }
}

/// The process on whose `pagemap` `fd` is open, if it has nothing but private memory without a
/// file in a range, all of it one mapping. `None` where that cannot be told. Leaves `errno` as it
/// was.
fn open_on_anonymous(fd: c_int, start: u64, end: u64) -> Option<u32> {
    aside(|| {
        let mut target: TargetBuffer = [0; 64];
        let mut query = MapQuery::at(start);
        let (maps, target) = open_maps_beside(fd, &mut target)?;
        let process = paths::process_of(target, b"pagemap");
        // SAFETY: an argument of the request's size, a descriptor of our own.
        let known = unsafe {
            let request = scan::PROCMAP_QUERY.cast_signed();
            let place = address((&raw mut query).cast_const());
            let known = call(number::IOCTL, [maps, request, place, 0, 0, 0]) == 0;
            call(number::CLOSE, [maps, 0, 0, 0, 0, 0]);
            known
        };
        // SAFETY: initialized. Written by the kernel, which the compiler does not see.
        let found = unsafe { (&raw mut query).read_volatile() };
        process.filter(|_| known && found.is_anonymous(start, end))
    })
}

/// What CRIU gets for `fd`, which it has just opened by a path that may lead to some
/// process's `smaps`: the same without counts of pages, or `fd` itself. Leaves `errno` as
/// it was.
fn without_counts(fd: c_int) -> c_int {
    let program = MAPPINGS_PROGRAM.load(Ordering::Acquire);
    if program < 0 {
        return fd;
    }
    aside(|| {
        let mut target: TargetBuffer = [0; 64];
        let Some((maps, target)) = open_maps_beside(fd, &mut target) else {
            return fd;
        };
        let file = paths::process_of(target, b"smaps").and_then(|process| {
            let iterator = mappings::iterate(program, process);
            if iterator == -1 {
                return None;
            }
            let file = mappings::file(maps, iterator);
            // SAFETY: a descriptor of our own.
            unsafe { call(number::CLOSE, [iterator, 0, 0, 0, 0, 0]) };
            file
        });
        // SAFETY: descriptors of our own; the other one is nobody's, since CRIU has not
        // heard of it yet.
        unsafe {
            call(number::CLOSE, [maps, 0, 0, 0, 0, 0]);
            let Some(file) = file else {
                return fd;
            };
            call(number::CLOSE, [whole(fd), 0, 0, 0, 0, 0]);
            narrow(file)
        }
    })
}

/// Where CRIU makes the kernel forget which pages have been written.
const CLEAR_REFS: &[u8] = b"clear_refs";

/// What CRIU gets for `fd`, which it has just opened by a path that may lead to some
/// process's `clear_refs`: nothing comes of what it writes there. Those marks are not the
/// ones that count here, and the kernel goes through all of the memory for them. Leaves
/// `errno` as it was.
fn without_effect(fd: c_int) -> c_int {
    /// `O_RDWR | O_CLOEXEC`.
    const READ_WRITE: isize = 0o2_000_002;
    aside(|| {
        let mut target: TargetBuffer = [0; 64];
        let known = u32::try_from(fd).ok();
        let target = known.and_then(|fd| target_of(fd, &mut target));
        if target.is_none_or(|target| paths::process_of(target, CLEAR_REFS).is_none()) {
            return fd;
        }
        // SAFETY: a path with a zero at its end; the other descriptor is nobody's, since
        // CRIU has not heard of it yet.
        unsafe {
            let path = address(c"/dev/null".as_ptr());
            let null = call(number::OPENAT, [AT_FDCWD, path, READ_WRITE, 0, 0, 0]);
            if null == -1 {
                return fd;
            }
            call(number::CLOSE, [whole(fd), 0, 0, 0, 0, 0]);
            narrow(null)
        }
    })
}

/// The file system that a descriptor is open on.
///
/// # Safety
///
/// As for `fstat`.
unsafe fn device_of(fd: isize) -> Option<u64> {
    let mut stat: StatBuffer = [0; 32];
    // SAFETY: room for the structure that the call writes.
    let done = unsafe { call(number::FSTAT, [fd, address(stat.as_mut_ptr()), 0, 0, 0, 0]) };
    (done == 0).then_some(stat[0])
}

/// Whether `fd` is open on a segment that the table names.
fn open_on_segment(fd: c_int) -> bool {
    // SAFETY: null, or a page that was mapped when the process started and
    // stays; others change it, which atomics allow.
    let Some(table) = (unsafe { TABLE.load(Ordering::Acquire).as_ref() }) else {
        return false;
    };
    let mut stat: StatBuffer = [0; 32];
    // SAFETY: room for the structure that the call writes.
    let done = unsafe {
        call(
            number::FSTAT,
            [whole(fd), address(stat.as_mut_ptr()), 0, 0, 0, 0],
        )
    };
    done == 0 && segments::named(table, stat[0], stat[1])
}

/// # Safety
///
/// As for the C library's `fstat`.
unsafe fn status(fd: c_int, stat: *mut c_void) -> c_int {
    // SAFETY: what CRIU itself has asked for.
    let result = unsafe {
        call(
            number::FSTAT,
            [whole(fd), address(stat.cast_const()), 0, 0, 0, 0],
        )
    };
    if result == 0 && SHOW_TUNNELS.load(Ordering::Acquire) {
        // SAFETY: the kernel has just written the structure, which has room for
        // both fields and is aligned.
        unsafe {
            let mode = stat.byte_add(STAT_MODE_AT).cast::<u32>().read();
            let device = stat.byte_add(STAT_RDEV_AT).cast::<u64>();
            device.write(paths::device_to_show(mode, device.read()));
        }
    }
    narrow(result)
}

/// `fstat(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn fstat(fd: c_int, stat: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { status(fd, stat) }
}

/// `fstat64`, which is `fstat` on these machines.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn fstat64(fd: c_int, stat: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { status(fd, stat) }
}

/// # Safety
///
/// As for the C library's `lseek`.
unsafe fn seek(fd: c_int, offset: isize, whence: c_int) -> isize {
    /// `SEEK_DATA`.
    const DATA: c_int = 3;
    /// `ENXIO`: nothing but holes from there on.
    const NO_DATA: c_int = 6;
    if whence == DATA && open_on_segment(fd) {
        // SAFETY: `errno` belongs to this thread.
        unsafe { *crate::sys::__errno_location() = NO_DATA };
        return -1;
    }
    // SAFETY: what CRIU itself has asked for.
    unsafe { call(number::LSEEK, [whole(fd), offset, whole(whence), 0, 0, 0]) }
}

/// `lseek(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn lseek(fd: c_int, offset: isize, whence: c_int) -> isize {
    // SAFETY: the caller's promise.
    unsafe { seek(fd, offset, whence) }
}

/// `lseek64`, which is `lseek` on these machines.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn lseek64(fd: c_int, offset: isize, whence: c_int) -> isize {
    // SAFETY: the caller's promise.
    unsafe { seek(fd, offset, whence) }
}

/// The path to use in place of `path`.
///
/// # Safety
///
/// `path` is a C string or null.
unsafe fn place_of(path: *const c_char, buffer: &mut PathBuffer) -> isize {
    if path.is_null() {
        return 0;
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
    match paths::redirect(bytes, PLACE.get(), buffer) {
        Some(other) => address(other.as_ptr()),
        None => address(path),
    }
}

/// # Safety
///
/// `path` is a C string or null.
unsafe fn open_at(directory: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    /// `O_CREAT`.
    const CREATE: c_int = 0o100;
    /// `__O_TMPFILE`, the bit that `O_TMPFILE` has for itself.
    const TEMPORARY: c_int = 0o20_000_000;
    let mode = if flags & (CREATE | TEMPORARY) == 0 {
        0
    } else {
        mode
    };
    let mut buffer: PathBuffer = [0; 256];
    // SAFETY: what CRIU itself has asked for, at most at another place.
    let result = unsafe {
        let path = place_of(path, &mut buffer);
        call(
            number::OPENAT,
            [
                whole(directory),
                path,
                whole(flags),
                whole(mode.cast_signed()),
                0,
                0,
            ],
        )
    };
    let fd = narrow(result);
    if fd < 0 {
        return fd;
    }
    // SAFETY: the caller's promise; the kernel has just read it.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    if paths::may_be(path, b"smaps") {
        without_counts(fd)
    } else if paths::may_be(path, CLEAR_REFS) {
        without_effect(fd)
    } else {
        fd
    }
}

/// `open(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open_at(narrow(AT_FDCWD), path, flags, mode) }
}

/// `open64`, which is `open` on these machines.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open_at(narrow(AT_FDCWD), path, flags, mode) }
}

/// `openat(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn openat(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: c_uint,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open_at(directory, path, flags, mode) }
}

/// `openat64`, which is `openat` on these machines.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn openat64(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: c_uint,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open_at(directory, path, flags, mode) }
}

/// `unlink(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    let mut buffer: PathBuffer = [0; 256];
    // SAFETY: what CRIU itself has asked for, at most at another place.
    let result = unsafe {
        let path = place_of(path, &mut buffer);
        call(number::UNLINKAT, [AT_FDCWD, path, 0, 0, 0, 0])
    };
    narrow(result)
}

/// `rename(2)`.
///
/// # Safety
///
/// As for the C library's.
#[cfg_attr(preload, unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    let mut from_buffer: PathBuffer = [0; 256];
    let mut to_buffer: PathBuffer = [0; 256];
    // SAFETY: what CRIU itself has asked for, at most at another place.
    let result = unsafe {
        let from = place_of(from, &mut from_buffer);
        let to = place_of(to, &mut to_buffer);
        call(number::RENAMEAT2, [AT_FDCWD, from, AT_FDCWD, to, 0, 0])
    };
    narrow(result)
}

/// A result as the C library's functions of type `int` give it.
#[allow(
    clippy::cast_possible_truncation,
    reason = "such calls return a descriptor, a count or -1"
)]
fn narrow(result: isize) -> c_int {
    result as c_int
}

/// A number of C's type `int` as an argument of a system call.
fn whole(number: c_int) -> isize {
    number as isize
}

/// Cannot be reached: a test looks for `abort` in the object, which would be
/// there if it could.
#[cfg(preload)]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn abort() -> !;
    }
    // SAFETY: ends the process.
    unsafe { abort() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::fs::File;
    use std::io::Error;
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
    use std::vec;
    use std::vec::Vec;

    const PRESENT: u64 = 1 << 3;
    const SOFT_DIRTY: u64 = scan::SOFT_DIRTY;
    const PAGE: usize = 4096;

    /// Anonymous pages, the first `written` of them with content.
    fn pages(count: usize, written: usize) -> *mut u8 {
        // SAFETY: a new mapping, which stays until the process ends.
        unsafe {
            let at = libc::mmap(
                core::ptr::null_mut(),
                count * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(libc::madvise(at, count * PAGE, libc::MADV_NOHUGEPAGE), 0);
            for page in 0..written {
                at.cast::<u8>().add(page * PAGE).write_volatile(1);
            }
            at.cast()
        }
    }

    fn scan_of(at: *mut u8, count: usize, regions: &mut Vec<scan::Region>) -> ScanArg {
        ScanArg {
            size: 96,
            flags: 0,
            start: at.addr() as u64,
            end: (at.addr() + count * PAGE) as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr(),
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: PRESENT,
            return_mask: PRESENT | SOFT_DIRTY,
        }
    }

    fn run(scan: &mut ScanArg) -> c_int {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        // SAFETY: an argument of the right type, on regions that are there.
        unsafe { ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, (&raw mut *scan).cast()) }
    }

    #[test]
    fn memory_without_a_tracker_is_dirty() {
        let at = pages(8, 3);
        let mut regions = vec![
            scan::Region {
                start: 0,
                end: 0,
                categories: 0
            };
            8
        ];
        let mut scan = scan_of(at, 8, &mut regions);
        let found = run(&mut scan);
        if found < 0 {
            std::println!("SKIP PAGEMAP_SCAN: {}", Error::last_os_error());
            return;
        }
        assert_eq!(found, 1);
        assert_eq!(
            regions[0],
            scan::Region {
                start: at.addr() as u64,
                end: (at.addr() + 3 * PAGE) as u64,
                categories: PRESENT | SOFT_DIRTY,
            }
        );
        // CRIU finds its argument as it was.
        assert_eq!(scan.return_mask, PRESENT | SOFT_DIRTY);
    }

    /// Protects pages by a userfaultfd with these features; `None` where the
    /// kernel has none such.
    fn protect(at: *mut u8, count: usize, features: u64) -> Option<OwnedFd> {
        let (start, length) = (at.addr() as u64, (count * PAGE) as u64);
        let requests: [(u64, [u64; 4]); 3] = [
            (0xc018_aa3f, [0xaa, features, 0, 0]),
            (0xc020_aa00, [start, length, 2, 0]),
            (0xc018_aa06, [start, length, 1, 0]),
        ];
        // SAFETY: a descriptor of our own, arguments of each request's size.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1);
            let fd = OwnedFd::from_raw_fd(c_int::try_from(fd).ok().filter(|fd| *fd >= 0)?);
            for (request, mut argument) in requests {
                if libc::ioctl(fd.as_raw_fd(), request, &raw mut argument) < 0 {
                    return None;
                }
            }
            Some(fd)
        }
    }

    #[test]
    fn only_what_a_tracker_protects_is_clean() {
        const WP_ASYNC: u64 = 1 << 15;
        let at = pages(8, 8);
        let Some(_tracker) = protect(at, 8, WP_ASYNC) else {
            std::println!("SKIP userfaultfd: {}", Error::last_os_error());
            return;
        };
        let mut regions = vec![
            scan::Region {
                start: 0,
                end: 0,
                categories: 0
            };
            8
        ];
        assert_eq!(run(&mut scan_of(at, 8, &mut regions)), 1);
        assert_eq!(regions[0].categories, PRESENT);
        // SAFETY: of the mapping above.
        unsafe { at.add(2 * PAGE).write_volatile(2) };
        assert_eq!(run(&mut scan_of(at, 8, &mut regions)), 3);
        let found: Vec<u64> = regions[..3]
            .iter()
            .map(|region| region.categories)
            .collect();
        assert_eq!(found, [PRESENT, PRESENT | SOFT_DIRTY, PRESENT]);

        // Protected, though not by a tracker: whoever does that may lift the
        // protection and write without a trace.
        let at = pages(8, 8);
        let _other = protect(at, 8, 0).unwrap();
        assert_eq!(run(&mut scan_of(at, 8, &mut regions)), 1);
        assert_eq!(regions[0].categories, PRESENT | SOFT_DIRTY);
    }

    /// More regions than the kernel keeps before it writes them out.
    #[test]
    fn a_scan_of_many_regions_ends_where_it_was_to() {
        const WP_ASYNC: u64 = 1 << 15;
        const COUNT: usize = 4096;
        let at = pages(COUNT, COUNT);
        let Some(_tracker) = protect(at, COUNT, WP_ASYNC) else {
            std::println!("SKIP userfaultfd: {}", Error::last_os_error());
            return;
        };
        for page in (0..COUNT).step_by(4) {
            // SAFETY: of the mapping above.
            unsafe { at.add(page * PAGE).write_volatile(2) };
        }
        let nothing = scan::Region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut regions = vec![nothing; COUNT];
        let mut scan = scan_of(at, COUNT, &mut regions);
        assert_eq!(usize::try_from(run(&mut scan)).unwrap(), COUNT / 2);
        assert_eq!(scan.walk_end, scan.end);
        assert_eq!(regions[COUNT / 2 - 1].end, scan.end);
        // A part of it.
        let mut regions = vec![nothing; 1000];
        let mut scan = scan_of(at, COUNT, &mut regions);
        assert_eq!(run(&mut scan), 1000);
        assert_eq!(regions[999].end, scan.walk_end);
    }

    /// Asks as CRIU does, which wants no pages of files; what it is told.
    fn found_without_files(at: *mut u8, count: usize) -> Vec<(u64, u64, u64)> {
        const FILE: u64 = scan::FILE;
        let nothing = scan::Region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut regions = vec![nothing; count];
        let mut scan = scan_of(at, count, &mut regions);
        (scan.category_mask, scan.category_inverted) = (FILE, FILE);
        let found = usize::try_from(run(&mut scan)).unwrap();
        assert_eq!((scan.category_mask, scan.category_inverted), (FILE, FILE));
        assert_eq!(scan.return_mask, PRESENT | SOFT_DIRTY);
        regions[..found]
            .iter()
            .map(|region| (region.start, region.end, region.categories))
            .collect()
    }

    #[test]
    fn pages_of_files_are_left_out_where_there_are_some() {
        const COUNT: usize = 1024;
        const DIRTY: u64 = PRESENT | SOFT_DIRTY;
        let at = pages(COUNT, COUNT);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let fd = pagemap.as_raw_fd();
        let (start, end) = (at.addr() as u64, (at.addr() + COUNT * PAGE) as u64);
        let query = open_on_anonymous(fd, start, end);
        assert_eq!(found_without_files(at, COUNT), [(start, end, DIRTY)]);
        let elsewhere = File::open("/proc/self/maps").unwrap();
        assert_eq!(open_on_anonymous(elsewhere.as_raw_fd(), start, end), None);
        assert_eq!(open_on_anonymous(-1, start, end), None);

        // A private file in its midst, of which one page was written to.
        let file = tempfile();
        file.set_len((64 * PAGE) as u64).unwrap();
        let middle = 512 * PAGE;
        // SAFETY: over a part of the mapping above, which stays.
        unsafe {
            let placed = libc::mmap(
                at.add(middle).cast(),
                64 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            );
            assert_eq!(placed, at.add(middle).cast());
            for page in 0..64 {
                at.add(middle + page * PAGE).read_volatile();
            }
            at.add(middle).write_volatile(1);
        }
        let (first, after) = (start + middle as u64, start + (middle + 64 * PAGE) as u64);
        assert_eq!(open_on_anonymous(fd, start, end), None);
        assert_eq!(open_on_anonymous(fd, first, after), None);
        let page = PAGE as u64;
        assert_eq!(
            found_without_files(at, COUNT),
            [(start, first + page, DIRTY), (after, end, DIRTY)]
        );
        // Before it there is nothing else, if this kernel can say so.
        assert_eq!(open_on_anonymous(fd, start, first), query);
    }

    /// A file on a file system, without a name.
    fn tempfile() -> File {
        let path = std::env::temp_dir().join(std::format!("shim-file-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    #[test]
    fn a_scan_that_selects_by_the_bit_is_refused() {
        let mut regions = vec![
            scan::Region {
                start: 0,
                end: 0,
                categories: 0
            };
            8
        ];
        let mut scan = scan_of(pages(8, 3), 8, &mut regions);
        scan.category_anyof_mask = SOFT_DIRTY;
        assert_eq!(run(&mut scan), -1);
    }

    #[test]
    fn entries_of_a_pagemap_are_dirty_and_other_bytes_are_left_alone() {
        let at = pages(4, 2);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let offset = i64::try_from(at.addr() / PAGE * ENTRY_BYTES).unwrap();
        let mut entries = [0u64; 4];
        // SAFETY: buffers of the given sizes, descriptors that are open.
        unsafe {
            let from = isize::try_from(offset).unwrap();
            let read_bytes = pread64(pagemap.as_raw_fd(), entries.as_mut_ptr().cast(), 32, from);
            assert_eq!(read_bytes, 32);
            for entry in entries {
                assert_ne!(entry & PAGEMAP_SOFT_DIRTY, 0);
            }
            let mut entry = 0u64;
            assert_eq!(
                libc::lseek(pagemap.as_raw_fd(), offset, libc::SEEK_SET),
                offset
            );
            assert_eq!(read(pagemap.as_raw_fd(), (&raw mut entry).cast(), 8), 8);
            assert_ne!(entry & PAGEMAP_SOFT_DIRTY, 0);

            let zero = File::open("/dev/zero").unwrap();
            assert_eq!(read(zero.as_raw_fd(), (&raw mut entry).cast(), 8), 8);
            assert_eq!(entry, 0);
            assert_eq!(
                pread64(zero.as_raw_fd(), entries.as_mut_ptr().cast(), 32, 0),
                32
            );
            assert_eq!(entries, [0; 4]);
            assert_eq!(read(-1, (&raw mut entry).cast(), 8), -1);
            assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::EBADF));
        }
    }

    #[test]
    fn the_cache_is_another_file() {
        let place = std::format!("/tmp/migrate-shim-{}", std::process::id());
        let c = |text: &str| CString::new(text).unwrap();
        let cache = c("/run/criu.kdat");
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
        // SAFETY: C strings; no other test looks at the place.
        unsafe {
            // Before there is one, nothing is found or made.
            assert_eq!(open(cache.as_ptr(), flags, 0o600), -1);
            assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
            assert_eq!(unlink(cache.as_ptr()), -1);

            PLACE.set(place.as_bytes());
            let fd = open64(c("/run/criu.kdat.tmp").as_ptr(), flags, 0o600);
            assert!(fd >= 0, "{}", Error::last_os_error());
            libc::close(fd);
            assert!(std::path::Path::new(&std::format!("{place}.tmp")).exists());
            assert_eq!(rename(c("/run/criu.kdat.tmp").as_ptr(), cache.as_ptr()), 0);
            assert!(std::path::Path::new(&place).exists());
            let fd = openat(libc::AT_FDCWD, cache.as_ptr(), libc::O_RDONLY, 0);
            assert!(fd >= 0);
            libc::close(fd);
            assert_eq!(unlink(cache.as_ptr()), 0);
            assert!(!std::path::Path::new(&place).exists());

            // Other paths are what they are.
            let fd = openat64(libc::AT_FDCWD, c("/dev/null").as_ptr(), libc::O_RDONLY, 0);
            assert!(fd >= 0);
            libc::close(fd);
        }
    }

    #[test]
    fn a_tunnel_device_looks_like_one_without_a_state_when_it_is_to() {
        use std::os::unix::fs::MetadataExt as _;
        let paths = ["/dev/net/tun", "/dev/null", "/proc/self/exe"];
        for (path, shown) in paths.iter().flat_map(|&path| [(path, false), (path, true)]) {
            SHOW_TUNNELS.store(shown, Ordering::Release);
            let Ok(file) = File::open(path) else {
                std::println!("SKIP {path}: {}", Error::last_os_error());
                continue;
            };
            // SAFETY: room for the structure, a descriptor that is open.
            let seen = unsafe {
                let mut stat: libc::stat = core::mem::zeroed();
                assert_eq!(fstat64(file.as_raw_fd(), (&raw mut stat).cast()), 0);
                stat
            };
            let meta = file.metadata().unwrap();
            assert_eq!((seen.st_ino, seen.st_mode), (meta.ino(), meta.mode()));
            let expected = match path {
                "/dev/net/tun" if shown => libc::makedev(1, 3),
                _ => meta.rdev(),
            };
            assert_eq!(seen.st_rdev, expected, "{path}");
        }
        let mut stat = [0u64; 32];
        // SAFETY: room for the structure.
        let failed = unsafe { fstat(-1, (&raw mut stat).cast()) };
        assert_eq!(failed, -1);
        assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::EBADF));
    }

    /// What a descriptor is open on.
    fn open_on(fd: c_int) -> std::path::PathBuf {
        std::fs::read_link(std::format!("/proc/self/fd/{fd}")).unwrap()
    }

    #[test]
    fn the_kernels_marks_are_left_alone() {
        const READ_WRITE: c_int = 2;
        let name = std::format!("shim-marks-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let ours = directory.join("clear_refs");
        std::fs::write(&ours, "").unwrap();
        let own = std::format!("/proc/{}/clear_refs", std::process::id());
        for (path, expected) in [
            (own.as_str(), "/dev/null"),
            ("/proc/self/clear_refs", "/dev/null"),
            // Of no process.
            (ours.to_str().unwrap(), ours.to_str().unwrap()),
        ] {
            let path = CString::new(path).unwrap();
            // SAFETY: a C string; a descriptor that is closed here.
            let file = unsafe {
                let fd = open(path.as_ptr(), READ_WRITE, 0);
                assert!(fd >= 0, "{path:?}: {}", Error::last_os_error());
                File::from_raw_fd(fd)
            };
            assert_eq!(open_on(file.as_raw_fd()).to_str(), Some(expected));
        }
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_segment_that_is_named_has_no_data() {
        use std::os::unix::fs::{FileExt as _, MetadataExt as _};
        // SAFETY: C strings; the descriptors are new, the pages stay mapped.
        unsafe {
            let file = |name: &CStr| {
                let fd = libc::memfd_create(name.as_ptr(), 0);
                File::from(OwnedFd::from_raw_fd(fd))
            };
            let (table, named, other) = (file(c"table"), file(c"named"), file(c"other"));
            for segment in [&named, &other] {
                segment.write_at(b"data", 4096).unwrap();
            }
            table.set_len(TABLE_BYTES as u64).unwrap();
            let page = share(table.as_raw_fd(), TABLE_BYTES, READ);
            TABLE.store(page, Ordering::Release);
            assert_eq!(lseek(named.as_raw_fd(), 0, libc::SEEK_DATA), 4096);
            let meta = named.metadata().unwrap();
            let words = [1, meta.dev(), meta.ino()].map(u64::to_ne_bytes).concat();
            table.write_at(&words, 0).unwrap();
            assert_eq!(lseek(named.as_raw_fd(), 0, libc::SEEK_DATA), -1);
            assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::ENXIO));
            assert_eq!(lseek64(named.as_raw_fd(), 0, libc::SEEK_END), 4100);
            assert_eq!(lseek64(other.as_raw_fd(), 0, libc::SEEK_DATA), 4096);
            assert_eq!(lseek(-1, 0, libc::SEEK_DATA), -1);
        }
    }
}
