//! What a socket is that no table of the kernel lists.
//!
//! A socket that was never bound stands in no table, nor does one of another
//! network namespace or of a family without tables. The socket itself knows:
//! its descriptor is duplicated out of the process and asked.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `SO_NETNS_COOKIE`, asm-generic/socket.h, since Linux 5.14.
const SO_NETNS_COOKIE: i32 = 71;

/// A socket's own answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unlisted {
    /// `SO_DOMAIN`, `AF_*`.
    pub domain: i32,
    /// `SO_PROTOCOL`.
    pub protocol: i32,
    /// It lives in another network namespace than the caller.
    pub foreign_namespace: bool,
}

/// Asks the socket behind descriptor `fd` of process `pid`.
pub fn ask(pid: i32, fd: i32) -> io::Result<Unlisted> {
    // SAFETY: takes two integers and returns a descriptor or an error.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: takes three integers, of which the first is an open descriptor.
    let socket = owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: takes integers only.
    let own = owned(libc::c_long::from(unsafe {
        libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    }))?;
    Ok(Unlisted {
        domain: option(&socket, libc::SO_DOMAIN)?,
        protocol: option(&socket, libc::SO_PROTOCOL)?,
        foreign_namespace: match (
            option::<u64>(&socket, SO_NETNS_COOKIE),
            option::<u64>(&own, SO_NETNS_COOKIE),
        ) {
            (Ok(theirs), Ok(ours)) => theirs != ours,
            _ => false,
        },
    })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Types that every bit pattern is a value of.
trait Plain: Default {}
impl Plain for i32 {}
impl Plain for u64 {}

fn option<T: Plain>(socket: &OwnedFd, name: i32) -> io::Result<T> {
    let mut value = T::default();
    let size = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let mut length = size;
    // SAFETY: the kernel writes at most `length` bytes, the size of `value`,
    // and `T` is an integer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 && length == size {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}
