//! The one question about a socket that /proc does not answer.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// PID of the process that made the other end of a Unix socket, from
/// `SO_PEERCRED`. `None` when the socket cannot be asked.
pub(crate) fn peer_pid(pid: i32, fd: i32) -> Option<i32> {
    let socket = borrow(pid, fd)?;
    let mut who = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&who)).ok()?;
    // SAFETY: `who` and `size` are ours and as large as the call is told.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut size,
        )
    };
    (done == 0 && who.pid > 0).then_some(who.pid)
}

/// A descriptor of our own on what another process has open.
pub(crate) fn borrow(pid: i32, fd: i32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let process = i32::try_from(process).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: just returned to us, nobody else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    // SAFETY: pidfd_getfd takes three integers and touches no memory.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    let copy = i32::try_from(copy).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: just returned to us, nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(copy) })
}
