//! A process whose memory is copied by the tests of this crate.
//!
//! `victim write MIB`: writes at random places of so much memory, for ever.
//! `victim threads N`: the same by N threads, each its own 4 MiB.
//! `victim idle MIB`: fills so much memory and waits.
//! `victim sparse GIB`: maps so much, touches three pages, waits.
//! `victim replaced MIB`: fills so much memory, and again so much above that; for a line
//! writes to the former, and for another puts a file into the place of the latter, writes to
//! it, and answers where.
//! `victim blocked CALL`: waits in a system call, for ever; ends with status 3
//! when the call returns `EINTR`. A line on standard input is answered.
//! `victim filtered`: is killed by the kernel when it calls `userfaultfd`.
//! `victim signals`: a timer's signals all the while; answers with their number.
//! `victim family MIB`: fills so much memory and has a child that waits, too.
//! `victim fork`: for each line forks a child that writes; answers its PID.
//! `victim exec`: at the next line becomes `victim write 4`.
//! `victim execs fork|vfork`: for each line has a child that becomes `victim parked` a
//! moment later; answers its PID, after that if the two had one memory until then.
//! `victim parked`: waits, and ends with its parent.
//! `victim shape SEED`: maps, grows, moves, protects, drops and unmaps at
//! random, for ever.
//!
//! Each prints `ready` first.

#![allow(
    clippy::cast_possible_truncation,
    reason = "random and pattern bytes are cut off on purpose"
)]

use std::ffi::CString;
use std::io::{BufRead as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, io, process, ptr, thread};

const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", mib] => {
            let mut memory = Memory::map(number(mib)? << 20)?;
            memory.fill(1);
            ready()?;
            write_for_ever(memory, 1)
        }
        ["threads", count] => threads(number(count)?),
        ["idle", mib] => {
            let mut memory = Memory::map(number(mib)? << 20)?;
            memory.fill(1);
            ready()?;
            wait_for_end()
        }
        ["family", mib] => {
            let mut memory = Memory::map(number(mib)? << 20)?;
            memory.fill(1);
            // SAFETY: this process has one thread, and the child only waits.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: takes no pointer.
                    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                    loop {
                        thread::park();
                    }
                }
                -1 => return Err(io::Error::last_os_error()),
                _ => {}
            }
            ready()?;
            wait_for_end()
        }
        ["sparse", gib] => {
            let mut memory = Memory::map(number(gib)? << 30)?;
            for part in [0, 1, 2] {
                memory.set(memory.bytes / 3 * part / PAGE * PAGE, 7);
            }
            ready()?;
            wait_for_end()
        }
        ["hole", mib] => {
            let mut memory = Memory::map(number(mib)? << 20)?;
            memory.fill(1);
            ready()?;
            line()?;
            let quarter = memory.bytes / 4;
            // SAFETY: the second quarter of the mapping is not used any more.
            let unmapped = unsafe { libc::munmap(memory.at.add(quarter).cast(), quarter) };
            println!("{unmapped}");
            wait_for_end()
        }
        ["replaced", mib] => replaced(number(mib)? << 20),
        ["blocked", call] => blocked(call),
        ["filtered"] => filtered(),
        ["signals"] => signals(),
        ["fork"] => fork(),
        ["exec"] => {
            ready()?;
            line()?;
            Err(process::Command::new(env::current_exe()?)
                .args(["write", "4"])
                .exec())
        }
        ["execs", how] => execs(how == "vfork"),
        ["parked"] => loop {
            thread::park();
        },
        ["shape", seed] => shape(number(seed)? as u64),
        _ => Err(io::Error::other("usage: victim write|threads|... ...")),
    }
}

fn number(text: &str) -> io::Result<usize> {
    text.parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn ready() -> io::Result<()> {
    println!("ready");
    io::stdout().flush()
}

fn line() -> io::Result<String> {
    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line)? == 0 {
        process::exit(0);
    }
    Ok(line)
}

fn wait_for_end() -> io::Result<()> {
    loop {
        line()?;
        println!("here");
    }
}

/// A small generator; quality does not matter.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// A private anonymous mapping.
struct Memory {
    at: *mut u8,
    bytes: usize,
    writable: bool,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Memory {}

impl Memory {
    fn map(bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            at: at.cast(),
            bytes,
            writable: true,
        })
    }

    fn set(&mut self, at: usize, value: u8) {
        assert!(at < self.bytes && self.writable);
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.at.add(at).write_volatile(value) };
    }

    fn fill(&mut self, value: u8) {
        for page in 0..self.bytes / PAGE {
            self.set(page * PAGE + page % PAGE, value);
        }
    }

    fn resize(&mut self, bytes: usize) {
        // SAFETY: the mapping is ours; it is only reached through `at`.
        let at = unsafe { libc::mremap(self.at.cast(), self.bytes, bytes, libc::MREMAP_MAYMOVE) };
        if at != libc::MAP_FAILED {
            self.at = at.cast();
            self.bytes = bytes;
        }
    }

    fn forget(&mut self, start: usize, bytes: usize, advice: i32) {
        // SAFETY: within the mapping; pages that are dropped read as zeros.
        unsafe { libc::madvise(self.at.add(start).cast(), bytes, advice) };
    }

    fn protect(&mut self, protection: i32) {
        // SAFETY: the mapping is ours; `writable` keeps writes away.
        let result = unsafe { libc::mprotect(self.at.cast(), self.bytes, protection) };
        if result == 0 {
            self.writable = protection & libc::PROT_WRITE != 0;
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and not used after this.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

fn write_for_ever(mut memory: Memory, seed: u64) -> ! {
    let mut random = Random(seed * 2 + 1);
    loop {
        let at = random.below(memory.bytes);
        let value = random.below(256) as u8;
        memory.set(at, value);
    }
}

fn threads(count: usize) -> io::Result<()> {
    for seed in 0..count {
        let mut memory = Memory::map(4 << 20)?;
        memory.fill(1);
        thread::spawn(move || write_for_ever(memory, seed as u64));
    }
    ready()?;
    wait_for_end()
}

fn replaced(bytes: usize) -> io::Result<()> {
    // SAFETY: a name that ends.
    let file = unsafe { libc::memfd_create(c"victim".as_ptr(), 0) };
    // SAFETY: takes no pointer.
    if file < 0 || unsafe { libc::ftruncate(file, bytes as libc::off_t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut memory = Memory::map(2 * bytes + PAGE)?;
    memory.fill(1);
    // What is below and what is above are mappings of their own.
    // SAFETY: nobody touches the page in the middle from here on.
    unsafe { libc::mprotect(memory.at.add(bytes).cast(), PAGE, libc::PROT_NONE) };
    ready()?;
    line()?;
    for page in 0..bytes / PAGE {
        memory.set(page * PAGE, 2);
    }
    println!("filled");
    line()?;
    let above = bytes + PAGE;
    // SAFETY: in the place of memory of ours, which only `memory` knows.
    let at = unsafe {
        libc::mmap(
            memory.at.add(above).cast(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for page in 0..bytes / PAGE {
        memory.set(above + page * PAGE, 2);
    }
    println!("{}", at as usize);
    wait_for_end()
}

fn blocked(call: &str) -> io::Result<()> {
    if call == "timeouts" {
        return timeouts();
    }
    let (reader, _writer) = std::os::unix::net::UnixStream::pair()?;
    if call == "rcvtimeo" {
        reader.set_read_timeout(Some(std::time::Duration::from_secs(3600)))?;
    }
    let fd = reader.as_raw_fd();
    let call = call.to_owned();
    // The main thread blocks; another one answers.
    thread::spawn(|| {
        if wait_for_end().is_err() {
            process::exit(4);
        }
    });
    ready()?;
    let result = block(&call, fd);
    let error = io::Error::last_os_error();
    eprintln!("{call} returned {result}: {error}");
    process::exit(3);
}

fn block(call: &str, fd: i32) -> i64 {
    let long = libc::timespec {
        tv_sec: 3600,
        tv_nsec: 0,
    };
    // SAFETY: each call is given pointers to values that live here, of the type
    // that it takes, or null where it takes that.
    unsafe {
        match call {
            "epoll" | "epoll-timeout" | "epoll-mask" => {
                let epoll = libc::epoll_create1(0);
                let mut event = libc::epoll_event {
                    events: libc::EPOLLIN as u32,
                    u64: 0,
                };
                libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event);
                let mut mask: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut mask);
                match call {
                    "epoll" => libc::epoll_wait(epoll, &raw mut event, 1, -1).into(),
                    "epoll-timeout" => libc::epoll_wait(epoll, &raw mut event, 1, 3_600_000).into(),
                    _ => libc::epoll_pwait(epoll, &raw mut event, 1, -1, &raw const mask).into(),
                }
            }
            "poll" => {
                let mut poll = libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                };
                libc::poll(&raw mut poll, 1, 3_600_000).into()
            }
            "ppoll" => {
                let mut poll = libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                };
                libc::ppoll(&raw mut poll, 1, &raw const long, ptr::null()).into()
            }
            "sleep" => libc::nanosleep(&raw const long, ptr::null_mut()).into(),
            "read" | "rcvtimeo" => {
                let mut byte = 0u8;
                libc::read(fd, (&raw mut byte).cast(), 1) as i64
            }
            "sigtimedwait" => {
                let mut mask: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut mask);
                libc::sigaddset(&raw mut mask, libc::SIGUSR2);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const mask, ptr::null_mut());
                libc::sigtimedwait(&raw const mask, ptr::null_mut(), &raw const long).into()
            }
            "futex" => {
                let word = 0u32;
                libc::syscall(
                    libc::SYS_futex,
                    &raw const word,
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    0,
                    &raw const long,
                )
            }
            "pause" => libc::pause().into(),
            other => {
                eprintln!("unknown call {other}");
                process::exit(5);
            }
        }
    }
}

/// Short waits with a timeout, each checked: never early, never `EINTR`.
fn timeouts() -> io::Result<()> {
    // SAFETY: no pointer is passed.
    let epoll = unsafe { libc::epoll_create1(0) };
    thread::spawn(|| {
        if wait_for_end().is_err() {
            process::exit(4);
        }
    });
    ready()?;
    loop {
        let started = std::time::Instant::now();
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event is passed.
        let result = unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 2) };
        if result != 0 || started.elapsed().as_micros() < 1900 {
            process::exit(3);
        }
    }
}

fn filtered() -> io::Result<()> {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // The number of a system call comes first in `struct seccomp_data`.
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_userfaultfd as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program and its steps live until the call has copied them.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    ready()?;
    wait_for_end()
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

fn signals() -> io::Result<()> {
    // SAFETY: the handler only adds to an atomic; the structs are whole.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
        let tick = libc::timeval {
            tv_sec: 0,
            tv_usec: 300,
        };
        let timer = libc::itimerval {
            it_interval: tick,
            it_value: tick,
        };
        libc::syscall(
            libc::SYS_setitimer,
            libc::ITIMER_REAL,
            &raw const timer,
            ptr::null_mut::<libc::itimerval>(),
        );
    }
    ready()?;
    loop {
        line()?;
        println!("{}", SIGNALS.load(Ordering::Relaxed));
    }
}

fn fork() -> io::Result<()> {
    let mut memory = Memory::map(8 << 20)?;
    memory.fill(1);
    ready()?;
    loop {
        line()?;
        memory.fill(2);
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            0 => write_for_ever(memory, 3),
            child if child > 0 => println!("{child}"),
            _ => return Err(io::Error::last_os_error()),
        }
    }
}

/// What a child does that becomes another program.
struct Becomes {
    after: libc::timespec,
    program: CString,
}

/// For `clone`.
extern "C" fn become_parked(becomes: *mut libc::c_void) -> libc::c_int {
    let parked = c"parked".as_ptr();
    // SAFETY: the caller's value outlives this, for it goes on after exec only, or has
    // another memory; the words end with a null pointer.
    unsafe {
        let becomes = &*becomes.cast::<Becomes>();
        // It outlives exec.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::nanosleep(&raw const becomes.after, ptr::null_mut());
        let words = [becomes.program.as_ptr(), parked, ptr::null()];
        libc::execv(becomes.program.as_ptr(), words.as_ptr());
        libc::_exit(127)
    }
}

fn execs(of_one_memory: bool) -> io::Result<()> {
    const STACK_BYTES: usize = 64 << 10;
    let mut stack = vec![0u128; STACK_BYTES / 16];
    let mut random = Random(1);
    let program = CString::new(env::current_exe()?.into_os_string().into_vec())?;
    let mut becomes = Becomes {
        after: libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        program,
    };
    let shared = if of_one_memory {
        libc::CLONE_VM | libc::CLONE_VFORK
    } else {
        0
    };
    ready()?;
    loop {
        line()?;
        becomes.after.tv_nsec = random.below(12_000_000) as libc::c_long;
        // SAFETY: the stack is the child's alone until it has called exec, and this goes on
        // after that, or the child has another memory.
        let child = unsafe {
            let top = stack.as_mut_ptr().add(stack.len());
            let becomes = (&raw mut becomes).cast();
            libc::clone(become_parked, top.cast(), shared | libc::SIGCHLD, becomes)
        };
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        println!("{child}");
    }
}

fn shape(seed: u64) -> io::Result<()> {
    let mut random = Random(seed * 2 + 1);
    let mut mappings: Vec<Memory> = Vec::new();
    let mut steps = 0u64;
    // Where the break was after each growth of ours.
    let mut grown: Vec<usize> = Vec::new();
    loop {
        steps += 1;
        if steps == 1000 {
            ready()?;
        }
        let pick = random.below(mappings.len().max(1));
        match random.below(20) {
            0..=1 if mappings.len() < 40 => {
                mappings.push(Memory::map((1 + random.below(200)) * PAGE)?);
            }
            2 if mappings.len() > 10 => drop(mappings.swap_remove(pick)),
            3 if !mappings.is_empty() => {
                let pages = 1 + random.below(300);
                mappings[pick].resize(pages * PAGE);
            }
            4 if !mappings.is_empty() => {
                let memory = &mut mappings[pick];
                let start = random.below(memory.bytes / PAGE);
                let pages = 1 + random.below(memory.bytes / PAGE - start);
                memory.forget(start * PAGE, pages * PAGE, libc::MADV_DONTNEED);
            }
            5 if !mappings.is_empty() => {
                let choice = [
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::PROT_READ,
                    libc::PROT_NONE,
                ];
                mappings[pick].protect(choice[random.below(3)]);
            }
            6 => {
                // SAFETY: with zero the break is only asked for.
                let top = unsafe { libc::sbrk(0) };
                if grown.last() == Some(&(top as usize)) && random.below(2) == 0 {
                    grown.pop();
                    // SAFETY: the last four pages were added here, and nobody
                    // has moved the break since.
                    unsafe { libc::sbrk(-(PAGE as isize) * 4) };
                } else if grown.len() < 100 {
                    // SAFETY: the allocator copes with a break that others move.
                    let start = unsafe { libc::sbrk(PAGE as isize * 4) };
                    if start as isize != -1 {
                        // SAFETY: the four pages have just been added.
                        unsafe { start.cast::<u8>().write_volatile(steps as u8) };
                        grown.push(start as usize + PAGE * 4);
                    }
                }
            }
            7 if random.below(50) == 0 => {
                // SAFETY: one thread; the child ends at once.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    process::exit(0);
                }
                // SAFETY: no status is asked for.
                unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
            }
            _ if !mappings.is_empty() => {
                let memory = &mut mappings[pick];
                for _ in 0..random.below(60) {
                    if memory.writable {
                        let at = random.below(memory.bytes);
                        let value = random.below(4) as u8;
                        memory.set(at, value);
                    }
                }
            }
            _ => {}
        }
    }
}
