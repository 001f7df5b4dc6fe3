//! Signals through pidfds, so that a reused PID is never hit.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::error::ProcError;
use crate::read;

/// How long a killed process may take to go. Giving back memory costs about
/// 22 ms a GiB, so this is a bound for hosts, not for processes.
const KILL_WAIT_MAX: Duration = Duration::from_secs(10);

/// A handle on one process, which a reused PID does not satisfy.
#[derive(Debug)]
pub(crate) struct Pidfd(OwnedFd);

impl Pidfd {
    /// `None` when there is no such process.
    pub(crate) fn open(pid: i32) -> Result<Option<Self>, ProcError> {
        // SAFETY: pidfd_open takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        match i32::try_from(fd) {
            Ok(fd) if fd >= 0 => {
                // SAFETY: the call just returned this descriptor, nobody else
                // owns it.
                Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd) })))
            }
            _ => {
                let source = io::Error::last_os_error();
                if read::is_gone(&source) {
                    Ok(None)
                } else {
                    Err(ProcError::Signal {
                        signal: "a signal",
                        pid,
                        source,
                    })
                }
            }
        }
    }

    /// Sends a signal; whether there was still somebody to take it.
    pub(crate) fn send(&self, signal: i32) -> io::Result<bool> {
        // SAFETY: the descriptor is open and the siginfo pointer may be null.
        let done = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if done == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        if read::is_gone(&error) {
            Ok(false)
        } else {
            Err(error)
        }
    }

    /// Waits for the process to end; whether it did before the deadline.
    fn ended_by(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(&mut fds, timeout(left)) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Collects the process if it is a child of ours that has ended.
    fn reap(&self) {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        let Ok(fd) = libc::id_t::try_from(self.0.as_raw_fd()) else {
            return;
        };
        // SAFETY: `info` is large enough for what waitid writes. Not being
        // the parent fails with ECHILD, which is fine.
        unsafe {
            libc::waitid(
                libc::P_PIDFD,
                fd,
                info.as_mut_ptr(),
                libc::WEXITED | libc::WNOHANG,
            );
        }
    }
}

/// The rest of a wait in poll's units, rounded up.
pub(crate) fn timeout(left: Duration) -> PollTimeout {
    let ms = left.as_micros().div_ceil(1000);
    PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
}

/// Asks a process to end, if it is the one that started at `start_ticks`;
/// whether it was still there.
///
/// # Errors
/// [`ProcError::Signal`] when it cannot be asked.
pub fn terminate(pid: i32, start_ticks: u64) -> Result<bool, ProcError> {
    // The handle is taken before the look: what it names can no longer change.
    let Some(handle) = Pidfd::open(pid)? else {
        return Ok(false);
    };
    if !crate::tree::is_same_process(pid, start_ticks) {
        return Ok(false);
    }
    handle
        .send(libc::SIGTERM)
        .map_err(|source| ProcError::Signal {
            signal: "SIGTERM",
            pid,
            source,
        })
}

/// Kills the processes and waits until none of them runs, for undoing a
/// restore. PIDs that are not there are fine.
///
/// # Errors
/// [`ProcError::Unkillable`] for those that are left after ten seconds.
pub fn kill_tree(pids: &[i32]) -> Result<(), ProcError> {
    let deadline = Instant::now() + KILL_WAIT_MAX;
    let mut open = Vec::with_capacity(pids.len());
    for &pid in pids {
        if let Some(fd) = Pidfd::open(pid)? {
            open.push((pid, fd));
        }
    }
    for (pid, fd) in &open {
        fd.send(libc::SIGKILL).map_err(|source| ProcError::Signal {
            signal: "SIGKILL",
            pid: *pid,
            source,
        })?;
    }
    let mut left = Vec::new();
    for (pid, fd) in &open {
        let ended = fd.ended_by(deadline).map_err(|source| ProcError::Signal {
            signal: "SIGKILL",
            pid: *pid,
            source,
        })?;
        if ended {
            fd.reap();
        } else {
            left.push(*pid);
        }
    }
    if left.is_empty() {
        Ok(())
    } else {
        Err(ProcError::Unkillable {
            pids: left,
            waited_ms: u64::try_from(KILL_WAIT_MAX.as_millis()).unwrap_or(u64::MAX),
        })
    }
}
