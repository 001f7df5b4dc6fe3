//! A process that keeps the keeper's descriptors a moment longer than it lives.
//!
//! When a process forks, the kernel puts the userfaultfd of the new memory among the
//! descriptors of whoever reads of it. Should that be killed before it has passed the
//! descriptor on, the last one would be closed, and what is missing there would become
//! zeros. So a second process uses the same table of descriptors (`CLONE_FILES`) and
//! does nothing else: who goes on for the keeper takes from it what it lacks.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, getpid, pidfd_getfd, pidfd_open,
    pidfd_send_signal, waitpid,
};

/// The process, as the keeper sees it. It is ended when dropped.
#[derive(Debug)]
pub(super) struct Holder {
    pid: Pid,
    pidfd: OwnedFd,
    /// What it waits for: the ends of the keeper and of the connection. Numbers in
    /// the common table that must not come to mean anything else.
    _waits_for: [OwnedFd; 2],
}

impl Holder {
    /// Starts it. It ends when this process has ended and then either side of
    /// `partner` is closed or hung up.
    pub(super) fn start(partner: BorrowedFd<'_>) -> io::Result<Self> {
        let keeper = pidfd_open(getpid(), PidfdFlags::empty())?;
        let partner = partner.try_clone_to_owned()?;
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: as `fork`, with a stack and memory of its own; the child makes
        // nothing but system calls and does not return. It closes nothing, for its
        // descriptors are this process's.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            hold(keeper.as_raw_fd(), partner.as_raw_fd());
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.filter(|pid| pid.as_raw_pid() > 0);
        let pid = pid.ok_or_else(io::Error::last_os_error)?;
        // A child of ours that nobody else waits for: the number is its own.
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        match pidfd {
            Ok(pidfd) => Ok(Self {
                pid,
                pidfd,
                _waits_for: [keeper, partner],
            }),
            Err(error) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = waitpid(Some(pid), WaitOptions::empty());
                Err(error.into())
            }
        }
    }

    /// What stands for it elsewhere.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}

/// A descriptor that a keeper had, from the process that stands for it.
pub(super) fn fetch(holder: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    Ok(pidfd_getfd(holder, fd, PidfdGetfdFlags::empty())?)
}

/// Waits for the end of `keeper`, then for that of the connection `partner`.
fn hold(keeper: RawFd, partner: RawFd) -> ! {
    // SAFETY: system calls on what lives here; the name ends with a zero.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"memory-holder".as_ptr());
        for (fd, events) in [(keeper, libc::POLLIN), (partner, 0)] {
            let mut list = libc::pollfd {
                fd,
                events,
                revents: 0,
            };
            while libc::poll(&raw mut list, 1, -1) < 0 && *libc::__errno_location() == libc::EINTR {
            }
        }
        libc::_exit(0)
    }
}
