//! A process that has something about it.
//!
//! `odd-memory MODE LOG` writes 1, 2, 3, … to LOG, one a line, and ends when
//! its memory is not what it wrote there. Modes: `plain`; `strict` and `filter`,
//! under seccomp, which kills at `userfaultfd` and `close`; `locked`, all memory
//! in RAM; `huge`, on huge pages; `uffd`, which has a userfaultfd; `ring`, which
//! has an io_uring; `traced`, by its own child; `guarded`, with a guard page
//! before its code; `lockguard`, with one in locked memory; `sysv`, with System V shared memory;
//! `direct`, which has a file open with `O_DIRECT`; `growing`, which takes four times the memory it
//! had when it gets SIGUSR1.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, io, ptr};

use migrate_tests::seccomp;

const PAGE: usize = 4096;
const BYTES: usize = 8 << 20;

/// Of `linux/mman.h`, since Linux 6.13.
const MADV_GUARD_INSTALL: i32 = 102;

/// Whether there is to be more memory.
static GROWS: AtomicBool = AtomicBool::new(false);

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [mode, log] = arguments.as_slice() else {
        return Err(io::Error::other("usage: odd-memory MODE LOG"));
    };
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let memory = match mode.as_str() {
        "huge" => map(libc::MAP_PRIVATE | libc::MAP_HUGETLB)?,
        "sysv" => segment()?,
        _ => map(libc::MAP_PRIVATE)?,
    };
    for page in 0..BYTES / PAGE {
        put(memory, page, 1);
    }
    match mode.as_str() {
        "plain" | "huge" | "sysv" => {}
        // SAFETY: takes no pointer.
        "locked" => called(unsafe { libc::mlockall(libc::MCL_CURRENT) }.into())?,
        // SAFETY: takes no pointer.
        "uffd" => called(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_NONBLOCK) })?,
        "ring" => ring()?,
        "direct" => {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_DIRECT);
            // Stays open.
            let _ = options.open(env::current_exe()?)?.into_raw_fd();
        }
        "traced" => traced()?,
        // SAFETY: the handler only stores into an atomic.
        "growing" => unsafe {
            let handler: extern "C" fn(libc::c_int) = grow;
            libc::signal(libc::SIGUSR1, handler as libc::sighandler_t);
        },
        "guarded" => guarded()?,
        "lockguard" => locked_guard()?,
        "strict" => {
            // SAFETY: takes no pointer.
            called(unsafe { libc::prctl(libc::PR_SET_SECCOMP, 1) }.into())?;
        }
        "filter" => filter()?,
        _ => return Err(io::Error::other("unknown mode")),
    }
    count(memory, log.as_raw_fd())
}

extern "C" fn grow(_: libc::c_int) {
    GROWS.store(true, Ordering::Relaxed);
}

/// Only writes, for more may not be allowed.
fn count(memory: usize, log: i32) -> ! {
    let mut number: u64 = 0;
    loop {
        number += 1;
        if GROWS.swap(false, Ordering::Relaxed) {
            for _ in 0..4 {
                let Ok(more) = map(libc::MAP_PRIVATE) else {
                    // SAFETY: takes no pointer.
                    unsafe { libc::_exit(1) };
                };
                for page in 0..BYTES / PAGE {
                    put(more, page, 1);
                }
            }
        }
        let page = usize::try_from(number).unwrap_or(0) % (BYTES / PAGE);
        let expected = 1 + (number - 1) / (BYTES / PAGE) as u64;
        if !(0..PAGE / 8).all(|word| get(memory, page, word) == expected) {
            // SAFETY: no pointer; a file that is not contiguous any more.
            unsafe {
                libc::write(log, c"wrong\n".as_ptr().cast(), 6);
                libc::_exit(1);
            }
        }
        put(memory, page, expected + 1);
        let mut text = [b'\n'; 24];
        let mut at = text.len() - 1;
        let mut left = number;
        while left > 0 || at == text.len() - 1 {
            at -= 1;
            text[at] = b'0' + u8::try_from(left % 10).unwrap_or(0);
            left /= 10;
        }
        // SAFETY: the digits and the end of line behind them.
        unsafe { libc::write(log, text[at..].as_ptr().cast(), text.len() - at) };
        // Some milliseconds without a system call, which strict mode does not
        // forgive; even the clock may be one.
        for _ in 0..500_000 {
            std::hint::spin_loop();
        }
    }
}

fn put(memory: usize, page: usize, value: u64) {
    for word in 0..PAGE / 8 {
        // SAFETY: within the mapping made for it.
        unsafe {
            ((memory + page * PAGE) as *mut u64)
                .add(word)
                .write_volatile(value)
        };
    }
}

fn get(memory: usize, page: usize, word: usize) -> u64 {
    // SAFETY: within the mapping made for it.
    unsafe {
        ((memory + page * PAGE) as *const u64)
            .add(word)
            .read_volatile()
    }
}

fn called(result: i64) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn map(flags: i32) -> io::Result<usize> {
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_ANONYMOUS | flags,
            -1,
            0,
        )
    };
    called(if at == libc::MAP_FAILED { -1 } else { 0 })?;
    Ok(at.addr())
}

fn segment() -> io::Result<usize> {
    // SAFETY: a segment of our own; it goes when this process has ended.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, BYTES, 0o600);
        called(id.into())?;
        let at = libc::shmat(id, ptr::null(), 0);
        called(if at.addr() == usize::MAX { -1 } else { 0 })?;
        called(libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()).into())?;
        Ok(at.addr())
    }
}

fn ring() -> io::Result<()> {
    // `struct io_uring_params`, which the kernel fills.
    let mut parameters = [0u8; 120];
    // SAFETY: room for the struct.
    called(unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) })
}

fn traced() -> io::Result<()> {
    let own = std::process::id().cast_signed();
    let mut ready = [0; 2];
    // SAFETY: two descriptors; and this process has one thread.
    unsafe {
        called(libc::pipe(ready.as_mut_ptr()).into())?;
        let child = libc::fork();
        called(child.into())?;
        if child == 0 {
            let none = ptr::null_mut::<libc::c_void>();
            libc::ptrace(libc::PTRACE_SEIZE, own, none, none);
            libc::close(ready[1]);
            loop {
                libc::pause();
            }
        }
        libc::close(ready[1]);
        let mut end = 0u8;
        libc::read(ready[0], ptr::from_mut(&mut end).cast(), 1);
        libc::close(ready[0]);
    }
    Ok(())
}

fn guarded() -> io::Result<()> {
    let code = map(libc::MAP_PRIVATE)?;
    // SAFETY: a mapping of our own that nobody else uses.
    unsafe {
        let at = code as *mut libc::c_void;
        called(libc::mprotect(at, BYTES, libc::PROT_READ | libc::PROT_EXEC).into())?;
        called(libc::madvise(at, PAGE, MADV_GUARD_INSTALL).into())
    }
}

fn locked_guard() -> io::Result<()> {
    let memory = map(libc::MAP_PRIVATE)?;
    // SAFETY: a mapping of our own that nobody else uses.
    unsafe {
        let last = (memory + BYTES - PAGE) as *mut libc::c_void;
        called(libc::madvise(last, PAGE, MADV_GUARD_INSTALL).into())?;
        // The lock holds, though the guard cannot be brought in.
        libc::mlock(memory as *const libc::c_void, BYTES);
    }
    Ok(())
}

fn filter() -> io::Result<()> {
    // SAFETY: takes no pointer.
    called(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    seccomp::filter(
        &[libc::SYS_userfaultfd, libc::SYS_close],
        libc::SECCOMP_RET_KILL_PROCESS,
    )
}
