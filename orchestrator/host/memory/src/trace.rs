//! `ptrace` on one thread, x86_64, with every wait bounded.
//!
//! A tracer is a thread, not a process: all of this runs on a thread made for
//! one injection (see [`crate::inject`]). When that thread ends, however, the
//! kernel lets go of what it traced.

use std::io;
use std::ptr;
use std::time::{Duration, Instant};

/// Registers as `ptrace` shows them.
pub(crate) type Registers = libc::user_regs_struct;

/// A system call's entry or exit, told from other traps by
/// `PTRACE_O_TRACESYSGOOD`.
pub(crate) const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// `linux/ptrace.h`, since 5.13.
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;

/// `PTRACE_SETSIGMASK`, `linux/ptrace.h`.
const PTRACE_SETSIGMASK: u32 = 0x420b;
/// `PTRACE_GETSIGMASK`, `linux/ptrace.h`.
const PTRACE_GETSIGMASK: u32 = 0x420a;
/// `PTRACE_O_SUSPEND_SECCOMP`, `linux/ptrace.h`.
const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;

/// How a traced thread was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The stop asked for by `PTRACE_INTERRUPT`, or a stop of the whole group.
    Trap,
    /// At the entry or the exit of a system call.
    Syscall,
    /// About to be given a signal.
    Signal(i32),
    /// Anything else, by the kernel's status.
    Other(i32),
}

/// Why a wait ended without a stop.
#[derive(Debug)]
pub(crate) enum WaitError {
    /// The thread has ended.
    Gone,
    /// The deadline passed.
    Late,
    /// The kernel refused.
    Failed(io::Error),
}

/// How a stopped thread is set going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resume {
    /// Until the next event.
    Freely,
    /// Until the next entry or exit of a system call.
    ToSyscall,
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RseqConfiguration {
    /// Address of the thread's `struct rseq`.
    pub(crate) area: u64,
    area_bytes: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// Begins to trace; the thread runs on.
pub(crate) fn seize(tid: i32, suspend_seccomp: bool) -> io::Result<()> {
    let mut options = libc::PTRACE_O_TRACESYSGOOD as usize;
    if suspend_seccomp {
        options |= PTRACE_O_SUSPEND_SECCOMP;
    }
    // SAFETY: PTRACE_SEIZE ignores `addr` and takes option bits in `data`.
    unsafe { request(libc::PTRACE_SEIZE, tid, 0, options as *mut libc::c_void) }
}

/// Asks the thread to stop.
pub(crate) fn interrupt(tid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_INTERRUPT takes no argument.
    unsafe { request(libc::PTRACE_INTERRUPT, tid, 0, ptr::null_mut()) }
}

/// Sets a stopped thread going, giving it `signal` unless that is zero.
pub(crate) fn resume(tid: i32, how: Resume, signal: i32) -> io::Result<()> {
    let what = match how {
        Resume::Freely => libc::PTRACE_CONT,
        Resume::ToSyscall => libc::PTRACE_SYSCALL,
    };
    // SAFETY: both ignore `addr` and take a signal number in `data`.
    unsafe {
        request(
            what,
            tid,
            0,
            signal.unsigned_abs() as usize as *mut libc::c_void,
        )
    }
}

/// Lets go of a stopped thread; it runs on.
pub(crate) fn detach(tid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_DETACH takes a signal number, here none.
    unsafe { request(libc::PTRACE_DETACH, tid, 0, ptr::null_mut()) }
}

/// The registers of a stopped thread.
pub(crate) fn registers(tid: i32) -> io::Result<Registers> {
    let mut registers = std::mem::MaybeUninit::<Registers>::zeroed();
    // SAFETY: PTRACE_GETREGS fills one `user_regs_struct` at `data`; any bytes,
    // zeros among them, are a valid one.
    unsafe {
        request(libc::PTRACE_GETREGS, tid, 0, registers.as_mut_ptr().cast())?;
        Ok(registers.assume_init())
    }
}

/// Changes the registers of a stopped thread.
pub(crate) fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    let data = ptr::from_ref(registers).cast_mut().cast();
    // SAFETY: PTRACE_SETREGS reads one `user_regs_struct` at `data`. What the
    // other thread then does is the caller's concern; it is not our memory.
    unsafe { request(libc::PTRACE_SETREGS, tid, 0, data) }
}

/// Which signals a stopped thread blocks; the mask it had before a call like
/// `ppoll` put another in its place.
pub(crate) fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: PTRACE_GETSIGMASK writes `addr` bytes, eight, to `data`.
    unsafe {
        request(
            PTRACE_GETSIGMASK,
            tid,
            size_of::<u64>(),
            ptr::from_mut(&mut mask).cast(),
        )?;
    }
    Ok(mask)
}

/// Changes which signals a stopped thread blocks.
pub(crate) fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    let data = ptr::from_ref(&mask).cast_mut().cast();
    // SAFETY: PTRACE_SETSIGMASK reads `addr` bytes, eight, from `data`.
    unsafe { request(PTRACE_SETSIGMASK, tid, size_of::<u64>(), data) }
}

/// Where a stopped thread keeps its restartable sequences. `None` where it has
/// none or the kernel is too old to tell.
pub(crate) fn rseq(tid: i32) -> Option<RseqConfiguration> {
    let mut found = RseqConfiguration::default();
    // SAFETY: PTRACE_GET_RSEQ_CONFIGURATION writes at most `addr` bytes, the
    // size of the struct, to `data`.
    let asked = unsafe {
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            tid,
            size_of::<RseqConfiguration>(),
            ptr::from_mut(&mut found).cast(),
        )
    };
    (asked.is_ok() && found.area != 0).then_some(found)
}

/// Waits until a traced thread stops.
///
/// The kernel has no wait for a tracee with a deadline, so this looks again
/// and again: at first giving way to others only, then with ever longer pauses.
pub(crate) fn wait(tid: i32, deadline: Instant) -> Result<Stop, WaitError> {
    /// A stop usually comes within a few context switches.
    const YIELDS: u32 = 200;
    const PAUSE_MIN: Duration = Duration::from_micros(20);
    const PAUSE_MAX: Duration = Duration::from_millis(1);
    let mut pause = PAUSE_MIN;
    for looks in 0u32.. {
        if let Some(stop) = look(tid)? {
            return Ok(stop);
        }
        if Instant::now() >= deadline {
            return Err(WaitError::Late);
        }
        if looks < YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
    Err(WaitError::Late)
}

fn look(tid: i32) -> Result<Option<Stop>, WaitError> {
    // The end of a thread is only looked at, never taken: it may be our child.
    match wait_id(tid, libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT)? {
        None => return Ok(None),
        Some((libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED, _)) => {
            return Err(WaitError::Gone);
        }
        Some(_) => {}
    }
    let Some((code, status)) = wait_id(tid, libc::WSTOPPED)? else {
        return Ok(None);
    };
    if code != libc::CLD_TRAPPED {
        return Ok(Some(Stop::Other(status)));
    }
    Ok(Some(match (status >> 8, status & 0xff) {
        (libc::PTRACE_EVENT_STOP, _) => Stop::Trap,
        (0, SYSCALL_STOP) => Stop::Syscall,
        (0, signal) => Stop::Signal(signal),
        _ => Stop::Other(status),
    }))
}

fn wait_id(tid: i32, what: i32) -> Result<Option<(i32, i32)>, WaitError> {
    let id = libc::id_t::try_from(tid).map_err(|_| WaitError::Gone)?;
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `waitid` writes one `siginfo_t`; zeros are a valid one.
    let result = unsafe {
        libc::waitid(
            libc::P_PID,
            id,
            info.as_mut_ptr(),
            what | libc::WNOHANG | libc::__WALL,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ECHILD) => Err(WaitError::Gone),
            Some(libc::EINTR) => Ok(None),
            _ => Err(WaitError::Failed(error)),
        };
    }
    // SAFETY: filled by `waitid`, or still zero when nothing was found, which
    // `si_pid` of zero tells.
    let (pid, code, status) = unsafe {
        let info = info.assume_init();
        (info.si_pid(), info.si_code, info.si_status())
    };
    Ok((pid != 0).then_some((code, status)))
}

/// # Safety
///
/// `address` and `data` must be what the request expects.
unsafe fn request(
    what: libc::c_uint,
    tid: i32,
    address: usize,
    data: *mut libc::c_void,
) -> io::Result<()> {
    // SAFETY: promised by the caller.
    let result = unsafe { libc::ptrace(what, tid, address as *mut libc::c_void, data) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
