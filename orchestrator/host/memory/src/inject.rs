//! Two system calls inside a running process, by one of its threads.
//!
//! A userfaultfd belongs to the memory of whoever makes it, so it has to be
//! made inside:
//!
//! ```text
//! seize, interrupt --> stopped: registers and signal mask kept
//!                      the vDSO still is where it was: else let go, and again
//!                      signals blocked, rip -> `syscall` in the vDSO
//!                      userfaultfd(...)  entry stop, exit stop
//!                      [descriptor fetched from outside]
//!                      close(fd)         entry stop, exit stop
//! interrupt        --> stopped as at first
//!                      registers and signal mask put back, detach
//! ```
//!
//! The other threads run all the while. No byte of the process's memory is
//! written.
//!
//! Until it is stopped, the thread may call exec, and run another program at other
//! addresses: where the vDSO is found before it is stopped, which takes long in a
//! process with many mappings, is only true if the vDSO can be read there after.
//!
//! The second interrupt matters. A thread stopped in a system call sits inside
//! the kernel's signal delivery, with `-ERESTART...` for a result, and it is
//! the kernel that then decides: a handler runs and the call returns `EINTR`,
//! or none does and the call begins again. Putting the registers back at a
//! stop of the same kind leaves that decision to it, with no race against a
//! signal that arrives meanwhile. Some calls do not take part in this and
//! return `EINTR` after any stop (`epoll_wait`, see signal(7)); for those that
//! have no effect when they return it, the result is changed to
//! `-ERESTARTNOHAND`, which asks for just that decision. Only their timeout
//! begins anew.
//!
//! A thread stopped within a restartable sequence (rseq(2)) has to go on at the
//! sequence's abort handler, as after any preemption; the kernel would do so
//! itself had the instruction pointer not been moved.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::UntrackedReason;
use crate::maps;
use crate::sys;
use crate::trace::{self, Registers, Resume, Stop, WaitError};

/// How long one thread may take to stop. Threads that cannot stop at once are
/// recognised beforehand, so this is for a machine that is overloaded: a
/// thread let go before it has stopped may see `EINTR`.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// How long to look for a thread that can be stopped. All of them may wait for
/// a disk, or for a child after `vfork`, at one moment.
const STOPPABLE_WAIT: Duration = Duration::from_millis(100);

/// How long a process may have no vDSO: between two programs, in the middle of exec.
const EXEC_WAIT: Duration = Duration::from_millis(10);

/// How long a system call inside may take; neither can block.
const CALL_WAIT: Duration = Duration::from_secs(10);

/// Most threads that are tried.
const THREADS_MAX: usize = 8;

/// Most signals that are passed on before the thread stops.
const SIGNALS_MAX: usize = 64;

/// Every signal; the kernel takes SIGKILL and SIGSTOP out of it.
const ALL_SIGNALS: u64 = u64::MAX;

/// `__USER_CS` of `arch/x86/include/asm/segment.h`: 64-bit code.
const CODE_SEGMENT_64: u64 = 0x33;

/// `ERESTARTNOHAND` of `include/linux/errno.h`: begin again unless a handler runs.
const ERESTARTNOHAND: i64 = 514;

/// What an injection cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    /// How long one thread stood still, in microseconds. The other threads
    /// were not stopped.
    pub stopped_us: u64,
    /// From the first look at the process to the end, in microseconds.
    pub took_us: u64,
}

/// Why nothing could be made inside.
#[derive(Debug)]
pub(crate) enum InjectError {
    /// The process has ended.
    Gone,
    /// It runs on, without being tracked.
    Refused(UntrackedReason),
}

impl From<UntrackedReason> for InjectError {
    fn from(reason: UntrackedReason) -> Self {
        Self::Refused(reason)
    }
}

/// Makes a userfaultfd inside a process and fetches it.
pub(crate) fn userfaultfd(pid: i32) -> Result<(OwnedFd, Injection), InjectError> {
    let began = Instant::now();
    // A tracer is a thread; when it ends, whatever it traces is let go.
    let (fd, stopped) = thread::scope(|scope| {
        let tracer = thread::Builder::new()
            .name("inject".into())
            .spawn_scoped(scope, || inject(pid));
        match tracer {
            Ok(tracer) => tracer.join().unwrap_or_else(|_| {
                Err(UntrackedReason::Inside {
                    call: "the injection",
                    source: io::Error::other("its thread panicked"),
                }
                .into())
            }),
            Err(source) => Err(UntrackedReason::Inside {
                call: "starting the injection",
                source,
            }
            .into()),
        }
    })?;
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let injection = Injection {
        stopped_us: micros(stopped),
        took_us: micros(began.elapsed()),
    };
    Ok((fd, injection))
}

/// The vDSO of a process, which every process maps.
struct Vdso {
    at: u64,
    /// All of it.
    code: Vec<u8>,
    /// Address of a `syscall` instruction in it.
    syscall: u64,
}

impl Vdso {
    fn of(pid: i32) -> Result<Self, InjectError> {
        /// The vDSO has two pages or so; far more would be something else.
        const BYTES_MAX: u64 = 1 << 20;
        let vdso = maps::read(pid)
            .map_err(|_| InjectError::Gone)?
            .into_iter()
            .find(|vma| vma.name == "[vdso]")
            .filter(|vma| vma.bytes() <= BYTES_MAX)
            .ok_or(UntrackedReason::NoVdso)?;
        let at = vdso.range.start;
        let mut code = vec![0; usize::try_from(vdso.bytes()).unwrap_or(0)];
        read_code(pid, at, &mut code).map_err(|_| UntrackedReason::NoVdso)?;
        let syscall = code
            .windows(2)
            .position(|bytes| bytes == [0x0f, 0x05])
            .ok_or(UntrackedReason::NoVdso)?;
        Ok(Self {
            at,
            syscall: at + syscall as u64,
            code,
        })
    }

    /// Whether the thread, which stands still, has it where it is here.
    fn is_of(&self, tid: i32) -> bool {
        let mut code = vec![0; self.code.len()];
        read_code(tid, self.at, &mut code).is_ok_and(|()| code == self.code)
    }
}

fn read_code(task: i32, at: u64, code: &mut [u8]) -> io::Result<()> {
    File::open(format!("/proc/{task}/mem"))?.read_exact_at(code, at)
}

/// A thread as its status file shows it.
struct Thread {
    tid: i32,
    /// Running, or in a sleep that a signal interrupts.
    stoppable: bool,
    seccomp: bool,
    tracer: i32,
}

fn thread_of(pid: i32, tid: i32) -> Option<Thread> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/task/{tid}/status"))
        .and_then(|mut file| file.read_to_string(&mut text))
        .ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let state = field("State")?.chars().next()?;
    if matches!(state, 'Z' | 'X') {
        return None;
    }
    Some(Thread {
        tid,
        stoppable: matches!(state, 'R' | 'S' | 'T' | 't'),
        seccomp: field("Seccomp").is_some_and(|mode| mode != "0"),
        tracer: field("TracerPid")
            .and_then(|pid| pid.parse().ok())
            .unwrap_or(0),
    })
}

/// Runs on a thread of its own.
fn inject(pid: i32) -> Result<(OwnedFd, Duration), InjectError> {
    const PAUSE: Duration = Duration::from_millis(1);
    let began = Instant::now();
    let deadline = began + STOPPABLE_WAIT;
    loop {
        let vdso = match Vdso::of(pid) {
            Err(InjectError::Refused(UntrackedReason::NoVdso)) if began.elapsed() < EXEC_WAIT => {
                thread::sleep(PAUSE);
                continue;
            }
            vdso => vdso?,
        };
        let threads = threads_of(pid)?;
        if let Some(traced) = threads.iter().find(|thread| thread.tracer != 0) {
            return Err(UntrackedReason::Traced {
                tracer: traced.tracer,
            }
            .into());
        }
        for thread in threads
            .iter()
            .filter(|thread| thread.stoppable)
            .take(THREADS_MAX)
        {
            match inject_by(thread, &vdso) {
                // It ended or would not stop; another one may do.
                Err(InjectError::Gone | InjectError::Refused(UntrackedReason::Busy { .. })) => {}
                done => return done,
            }
        }
        if Instant::now() >= deadline {
            return Err(UntrackedReason::Busy {
                threads: threads.len(),
                waited: deadline.elapsed() + STOPPABLE_WAIT,
            }
            .into());
        }
        thread::sleep(PAUSE);
    }
}

fn threads_of(pid: i32) -> Result<Vec<Thread>, InjectError> {
    let threads: Vec<Thread> = fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|_| InjectError::Gone)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|tid| thread_of(pid, tid))
        .collect();
    if threads.is_empty() {
        return Err(InjectError::Gone);
    }
    Ok(threads)
}

fn inject_by(thread: &Thread, vdso: &Vdso) -> Result<(OwnedFd, Duration), InjectError> {
    let tid = thread.tid;
    let refused = |attempt| move |source| ptrace_failed(tid, attempt, source);
    trace::seize(tid, thread.seccomp).map_err(refused("trace"))?;
    let stopped = Instant::now();
    trace::interrupt(tid).map_err(refused("stop"))?;
    await_trap(tid, stopped + STOP_WAIT)?;
    let held = Held::of(tid)?;
    if held.registers.cs != CODE_SEGMENT_64 {
        held.let_go()?;
        return Err(UntrackedReason::Compat.into());
    }
    if !vdso.is_of(tid) {
        held.let_go()?;
        return Err(UntrackedReason::Busy {
            threads: 1,
            waited: stopped.elapsed(),
        }
        .into());
    }
    let fd = held.call_both(vdso.syscall);
    held.stop_again()?;
    held.let_go()?;
    Ok((fd?, stopped.elapsed()))
}

/// Waits for the stop asked for by an interrupt; signals that come first are
/// passed on.
fn await_trap(tid: i32, deadline: Instant) -> Result<(), InjectError> {
    for _ in 0..SIGNALS_MAX {
        let signal = match wait(tid, deadline)? {
            Stop::Trap => return Ok(()),
            Stop::Signal(signal) => signal,
            // The entry or exit that was under way.
            Stop::Syscall => 0,
            Stop::Other(status) => return Err(UntrackedReason::Stop { tid, status }.into()),
        };
        trace::resume(tid, Resume::Freely, signal)
            .map_err(|source| ptrace_failed(tid, "resume", source))?;
    }
    Err(UntrackedReason::Busy {
        threads: 1,
        waited: STOP_WAIT,
    }
    .into())
}

/// A stopped thread and what has to be put back.
struct Held {
    tid: i32,
    /// As they are to be when the thread goes on.
    registers: Registers,
    signal_mask: u64,
}

impl Held {
    fn of(tid: i32) -> Result<Self, InjectError> {
        let refused = |attempt| move |source| ptrace_failed(tid, attempt, source);
        let mut registers = trace::registers(tid).map_err(refused("read registers of"))?;
        let signal_mask = trace::signal_mask(tid).map_err(refused("read the signal mask of"))?;
        restart_instead_of_eintr(&mut registers);
        leave_restartable_sequence(tid, &mut registers);
        Ok(Self {
            tid,
            registers,
            signal_mask,
        })
    }

    /// Makes the userfaultfd, fetches it and closes it inside.
    fn call_both(&self, syscall: u64) -> Result<OwnedFd, InjectError> {
        let tid = self.tid;
        trace::set_signal_mask(tid, ALL_SIGNALS)
            .map_err(|source| ptrace_failed(tid, "block signals of", source))?;
        let flags = u64::from(sys::UFFD_FLAGS.unsigned_abs());
        let fd = self.call(syscall, libc::SYS_userfaultfd, flags)?;
        let fd = i32::try_from(fd)
            .ok()
            .filter(|&fd| fd >= 0)
            .ok_or_else(|| UntrackedReason::Inside {
                call: "userfaultfd",
                source: io::Error::from_raw_os_error(i32::try_from(-fd).unwrap_or(libc::EINVAL)),
            })?;
        let fetched = sys::fetch_descriptor(tid, fd);
        let closed = self.call(syscall, libc::SYS_close, u64::from(fd.unsigned_abs()))?;
        if closed != 0 {
            return Err(UntrackedReason::Inside {
                call: "close",
                source: io::Error::from_raw_os_error(
                    i32::try_from(-closed).unwrap_or(libc::EINVAL),
                ),
            }
            .into());
        }
        Ok(fetched.map_err(|source| UntrackedReason::Fetch { source })?)
    }

    /// One system call with one argument; returns its result.
    fn call(&self, syscall: u64, number: libc::c_long, argument: u64) -> Result<i64, InjectError> {
        let tid = self.tid;
        let refused = |attempt| move |source| ptrace_failed(tid, attempt, source);
        let mut registers = self.registers;
        registers.rip = syscall;
        registers.rax = number.unsigned_abs();
        // Not in a system call: nothing to begin again.
        registers.orig_rax = u64::MAX;
        registers.rdi = argument;
        trace::set_registers(tid, &registers).map_err(refused("set registers of"))?;
        let deadline = Instant::now() + CALL_WAIT;
        for _entry_then_exit in 0..2 {
            trace::resume(tid, Resume::ToSyscall, 0).map_err(refused("resume"))?;
            self.next_syscall_stop(deadline)?;
        }
        let after = trace::registers(tid).map_err(refused("read registers of"))?;
        Ok(after.rax.cast_signed())
    }

    /// Only SIGSTOP cannot be blocked. It stops the other threads at once and
    /// this one when it is let go.
    fn next_syscall_stop(&self, deadline: Instant) -> Result<(), InjectError> {
        for _ in 0..SIGNALS_MAX {
            let signal = match wait(self.tid, deadline)? {
                Stop::Syscall => return Ok(()),
                Stop::Trap => 0,
                Stop::Signal(signal) => signal,
                Stop::Other(status) => {
                    return Err(UntrackedReason::Stop {
                        tid: self.tid,
                        status,
                    }
                    .into());
                }
            };
            trace::resume(self.tid, Resume::ToSyscall, signal)
                .map_err(|source| ptrace_failed(self.tid, "resume", source))?;
        }
        Err(UntrackedReason::Busy {
            threads: 1,
            waited: CALL_WAIT,
        }
        .into())
    }

    /// Back to a stop of the first kind. The thread has nothing to do on the
    /// way there: it returns from the system call inside and stops.
    fn stop_again(&self) -> Result<(), InjectError> {
        let tid = self.tid;
        trace::interrupt(tid).map_err(|source| ptrace_failed(tid, "stop", source))?;
        match trace::resume(tid, Resume::Freely, 0) {
            Ok(()) => {}
            // It was not stopped, after a wait in vain.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(source) => return Err(ptrace_failed(tid, "resume", source)),
        }
        await_trap(tid, Instant::now() + CALL_WAIT)
    }

    /// Puts everything back and lets the thread run on.
    fn let_go(&self) -> Result<(), InjectError> {
        let tid = self.tid;
        let refused = |attempt| move |source| ptrace_failed(tid, attempt, source);
        trace::set_registers(tid, &self.registers).map_err(refused("set registers of"))?;
        trace::set_signal_mask(tid, self.signal_mask).map_err(refused("set the signal mask of"))?;
        trace::detach(tid).map_err(refused("let go of"))
    }
}

/// `io_pgetevents` of `arch/x86/entry/syscalls/syscall_64.tbl`.
const SYS_IO_PGETEVENTS: libc::c_long = 333;

/// System calls that return `EINTR` after any stop, and then have had no
/// effect, so that they can begin again. `connect` and `close` are not among
/// them: they do have one.
const RESTARTABLE: [libc::c_long; 21] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_io_uring_enter,
    // Sockets with SO_RCVTIMEO or SO_SNDTIMEO.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
];

/// See the head of this module.
fn restart_instead_of_eintr(registers: &mut Registers) {
    let call = registers.orig_rax.cast_signed();
    if registers.rax.cast_signed() == -i64::from(libc::EINTR) && RESTARTABLE.contains(&call) {
        registers.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
}

/// See the head of this module. `struct rseq` and `struct rseq_cs` are those of
/// `include/uapi/linux/rseq.h`.
fn leave_restartable_sequence(tid: i32, registers: &mut Registers) {
    const SEQUENCE_AT: u64 = 8;
    const START_AT: usize = 8;
    if registers.orig_rax.cast_signed() >= 0 {
        return;
    }
    let Some(rseq) = trace::rseq(tid) else { return };
    let Ok(memory) = File::open(format!("/proc/{tid}/mem")) else {
        return;
    };
    let mut pointer = [0; 8];
    let mut sequence = [0; 32];
    let found = memory.read_exact_at(&mut pointer, rseq.area + SEQUENCE_AT);
    let pointer = u64::from_ne_bytes(pointer);
    if found.is_err() || pointer == 0 || memory.read_exact_at(&mut sequence, pointer).is_err() {
        return;
    }
    let mut words = sequence[START_AT..].chunks_exact(8).map(|word| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        u64::from_ne_bytes(bytes)
    });
    if let (Some(start), Some(length), Some(abort)) = (words.next(), words.next(), words.next())
        && registers.rip.wrapping_sub(start) < length
    {
        registers.rip = abort;
    }
}

fn wait(tid: i32, deadline: Instant) -> Result<Stop, InjectError> {
    trace::wait(tid, deadline).map_err(|error| match error {
        WaitError::Gone => InjectError::Gone,
        WaitError::Late => UntrackedReason::Busy {
            threads: 1,
            waited: STOP_WAIT,
        }
        .into(),
        WaitError::Failed(source) => ptrace_failed(tid, "wait for", source),
    })
}

fn ptrace_failed(tid: i32, attempt: &'static str, source: io::Error) -> InjectError {
    if source.raw_os_error() == Some(libc::ESRCH) {
        InjectError::Gone
    } else {
        UntrackedReason::Ptrace {
            attempt,
            tid,
            source,
        }
        .into()
    }
}
