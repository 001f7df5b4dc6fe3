//! The system calls that no dependency offers.

use std::ffi::CString;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use migrate_ebpf_common::Control;

// Command numbers of bpf(2), `enum bpf_cmd` in linux/bpf.h.
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
/// `BPF_NOEXIST`: insert, and leave alone what is there.
const BPF_NOEXIST: u64 = 1;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Device types, linux/if_arp.h.
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;

/// `sin6_addr`-like pointers travel as 64-bit numbers in `union bpf_attr`.
fn address<T>(pointer: *const T) -> u64 {
    pointer as usize as u64
}

/// # Safety
///
/// `attributes` must be the part of `union bpf_attr` that `command` reads,
/// and every address in it must be valid for what the command does there.
pub(crate) unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller vouches for the content; the size is the content's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Of `union bpf_attr`: commands about many elements.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Of `union bpf_attr`: commands about one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Puts all keys into a hash map with the same value, in one call.
pub(crate) fn insert_keys<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    value: V,
) -> io::Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let values = vec![value; keys.len()];
    let mut batch = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: address(keys.as_ptr()),
        values: address(values.as_ptr()),
        count: u32::try_from(keys.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        map_fd: map.as_raw_fd().cast_unsigned(),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both arrays outlive the call and have `count` elements of the
    // map's key and value size: callers name the types that the programs name
    // for the same map.
    unsafe { bpf(BPF_MAP_UPDATE_BATCH, &mut batch) }.map(drop)
}

/// Puts one key in, unless it is there.
pub(crate) fn insert_new<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> io::Result<()> {
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        _pad: 0,
        key: address(key),
        value: address(value),
        flags: BPF_NOEXIST,
    };
    // SAFETY: key and value outlive the call and have the map's sizes, as above.
    match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut element) } {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Reads one value; `false` when the key is not there.
pub(crate) fn look_up<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &mut V,
) -> io::Result<bool> {
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        _pad: 0,
        key: address(key),
        value: address(std::ptr::from_mut(value)),
        flags: 0,
    };
    // SAFETY: both outlive the call and have the map's sizes, and the value is
    // ours alone; it may hold any bytes.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut element) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Elements asked for at once: more than one of the map's buckets ever holds.
const READ_AT_ONCE: u32 = 16_384;

/// Reads a whole hash map, which has room for `capacity`. What comes or goes
/// meanwhile may be in or not; nothing is in twice that stays.
pub(crate) fn read_all<K: aya::Pod + Default, V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    capacity: u32,
) -> io::Result<Vec<(K, V)>> {
    let room = usize::try_from(READ_AT_ONCE.min(capacity.max(1))).map_err(io::Error::other)?;
    let mut keys = vec![K::default(); room];
    let mut values = vec![V::default(); room];
    let mut read = Vec::new();
    // The kernel's place in the map: the number of a bucket.
    let (mut from, mut to) = (0_u32, 0_u32);
    let mut is_first = true;
    // Each turn moves on by a bucket at least, and there are at most twice as
    // many buckets as elements.
    for _ in 0..=u64::from(capacity) * 2 {
        let mut batch = Batch {
            in_batch: if is_first {
                0
            } else {
                address(&raw const from)
            },
            out_batch: address(&raw mut to),
            keys: address(keys.as_mut_ptr()),
            values: address(values.as_mut_ptr()),
            count: u32::try_from(room).map_err(io::Error::other)?,
            map_fd: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the arrays are ours and have room for `count` elements of the
        // map's sizes, which the caller's types have; the places are `u32`, as
        // hash maps want them.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) };
        let is_last = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let got = usize::try_from(batch.count).unwrap_or(0).min(room);
        read.extend(
            keys[..got]
                .iter()
                .copied()
                .zip(values[..got].iter().copied()),
        );
        if is_last {
            break;
        }
        (from, is_first) = (to, false);
    }
    Ok(read)
}

/// Removes a key; a key that is not there is no error.
pub(crate) fn remove_key<K: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        _pad: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    // SAFETY: the key outlives the call and has the map's key size.
    match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut element) } {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

/// Opens a pinned object.
fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Object {
        path: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object = Object {
        path: address(path.as_ptr()),
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: the path outlives the call and ends with a zero byte.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut object) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes a pinned link's program off its interface at once. Removing the pin
/// alone would do so a moment later, after an RCU grace period.
pub(crate) fn detach_link(path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Link {
        link_fd: u32,
    }
    let fd = open_pin(path)?;
    let mut link = Link {
        link_fd: fd.as_raw_fd().cast_unsigned(),
    };
    // SAFETY: the attribute holds nothing but a live descriptor.
    match unsafe { bpf(BPF_LINK_DETACH, &mut link) } {
        // The interface is gone, and the attachment with it.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        other => other.map(drop),
    }
}

/// What an interface puts in front of the network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Loopback,
    Ethernet,
    /// Tunnels, TUN: no header at all.
    Bare,
}

/// A socket for questions about interfaces of the calling thread's network
/// namespace.
pub(crate) fn interface_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain call; the result is checked.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// A request about an interface, all zeros but for its name.
pub(crate) fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeros is a value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero behind the name.
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// What an interface is, and its hardware address if it is an Ethernet one.
pub(crate) fn device_kind(name: &str) -> io::Result<(DeviceKind, [u8; 6])> {
    let socket = interface_socket()?;
    let mut request = interface_request(name)?;
    // SAFETY: the request is a valid, writable ifreq with a terminated name.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFHWADDR has filled this member of the union.
    let hardware = unsafe { request.ifr_ifru.ifru_hwaddr };
    let kind = match hardware.sa_family {
        ARPHRD_ETHER => DeviceKind::Ethernet,
        ARPHRD_LOOPBACK => DeviceKind::Loopback,
        _ => DeviceKind::Bare,
    };
    let address = std::array::from_fn(|position| hardware.sa_data[position].cast_unsigned());
    Ok((kind, address))
}

/// A random number of the kernel's.
pub(crate) fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // SAFETY: the buffer is ours and has the length given. So few bytes are
    // never cut short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(u32::from_ne_bytes(bytes))
    }
}

/// The control record, mapped into memory: writing it is one store, which the
/// programs on every CPU see whole.
#[derive(Debug)]
pub(crate) struct ControlPage {
    record: NonNull<Control>,
    bytes: usize,
}

// SAFETY: the record is only touched through atomics, and the mapping belongs
// to the process, not to a thread.
unsafe impl Send for ControlPage {}
// SAFETY: as above.
unsafe impl Sync for ControlPage {}

impl ControlPage {
    /// Maps the control map's only element. The mapping keeps the map alive.
    pub(crate) fn map(control: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: plain call.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let bytes = usize::try_from(page_bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping where the kernel likes; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                control.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        match NonNull::new(start.cast::<Control>()) {
            Some(record) => Ok(Self { record, bytes }),
            None => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the offset is that of a u64 field, the mapping is page
        // aligned and lives as long as `self`, and everybody in this process
        // goes through these atomics.
        unsafe { AtomicU64::from_ptr(self.record.as_ptr().cast::<u8>().add(offset).cast::<u64>()) }
    }

    pub(crate) fn state(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, state))
    }

    pub(crate) fn deadline_ns(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, deadline_ns))
    }

    pub(crate) fn owner_pid(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, owner_pid))
    }

    pub(crate) fn owner_start_ticks(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, owner_start_ticks))
    }

    pub(crate) fn round_ns(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, round_ns))
    }

    pub(crate) fn progress(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, progress))
    }

    pub(crate) fn mark_ns(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, mark_ns))
    }

    pub(crate) fn newcomers(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, newcomers))
    }

    pub(crate) fn layout_version(&self) -> &AtomicU64 {
        self.word(offset_of!(Control, layout_version))
    }
}

impl Drop for ControlPage {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; nobody borrows from it.
        unsafe { libc::munmap(self.record.as_ptr().cast(), self.bytes) };
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds, never behind what the programs read.
pub(crate) fn now_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// The clock that the programs count with, which moves on with the kernel's
/// tick.
pub(crate) fn coarse_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC_COARSE)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both clocks always exist and the structure is ours.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
