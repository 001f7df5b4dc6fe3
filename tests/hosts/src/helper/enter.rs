//! Into a host that is up, to run a program there.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, fork, setsid};

use super::{exit, report, word};
use crate::error::{Attempt, Error, Result};
use crate::files;
use crate::processes;

/// Signals that a program gets when its helper gets them.
const HANDED_DOWN: [libc::c_int; 6] = [
    libc::SIGHUP,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGINT,
    libc::SIGQUIT,
];

/// Runs a program to its end, and ends the same way.
pub(super) fn run(mut words: impl Iterator<Item = OsString>) -> Result<i32> {
    let host = join(&mut words)?;
    let on_terminal = io::stdin().is_terminal();
    let signals = Signals::block(on_terminal);
    // SAFETY: this process has one thread.
    match unsafe { fork() }.attempt(|| "fork into the host".to_owned())? {
        ForkResult::Parent { child } => signals.supervise(child),
        ForkResult::Child => {
            signals.when_parent_dies();
            let mut command = program(words)?;
            signals.unblock_in(&mut command);
            if !on_terminal {
                new_session(&mut command);
            }
            let name = command.get_program().to_owned();
            match command.spawn() {
                Ok(child) => signals.supervise(Pid::from_raw(child.id().cast_signed())),
                Err(error) => {
                    eprintln!("could not run `{}` in {host}: {error}", name.display());
                    // As shells have it.
                    Ok(if error.kind() == io::ErrorKind::NotFound {
                        127
                    } else {
                        126
                    })
                }
            }
        }
    }
}

/// Starts a program in a session of its own, reports its PID inside, and leaves it to the init.
pub(super) fn spawn(mut words: impl Iterator<Item = OsString>) -> Result<i32> {
    join(&mut words)?;
    let log = word(&mut words, "log")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.attempt(|| "fork into the host".to_owned())? {
        ForkResult::Parent { child } => {
            let _ = waitpid(child, None);
            Ok(0)
        }
        ForkResult::Child => {
            let mut command = program(words)?;
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&log)
                .attempt(|| format!("open the log {log}"))?;
            let second = file.try_clone().attempt(|| format!("open the log {log}"))?;
            command.stdin(Stdio::null()).stdout(file).stderr(second);
            let _ = chdir("/");
            new_session(&mut command);
            let name = command.get_program().display().to_string();
            let child = command.spawn().attempt(|| format!("run `{name}`"))?;
            report(&format!("pid {}", child.id()));
            Ok(0)
        }
    }
}

/// Joins the namespaces of the host that the command line names, all but its PID namespace, which
/// the next child is in.
fn join(words: &mut impl Iterator<Item = OsString>) -> Result<String> {
    let lab = word(words, "lab")?;
    let host = word(words, "host")?;
    let init = word(words, "init")?.parse().unwrap_or(0);
    let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));

    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, init, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    // The name after the handle: now the PID cannot become another's any more.
    if fd < 0 || !processes::is_init(init, &lab, &host) {
        return Err(Error::NotUp { lab });
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWCGROUP;
    setns(&fd, namespaces).attempt(|| format!("join the namespaces of {host}"))?;
    if chdir(&directory).is_err() {
        chdir("/").attempt(|| "change to /".to_owned())?;
    }
    own_null()?;
    Ok(host)
}

/// Takes the host's `/dev/null` for every standard stream that is the machine's: a file that is
/// open through a mount of another namespace cannot be dumped, and no real machine has one.
fn own_null() -> Result<()> {
    let attempt = || "open /dev/null".to_owned();
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .attempt(attempt)?;
    let own = fstat(&null).attempt(attempt)?;
    let streams = [
        io::stdin().as_raw_fd(),
        io::stdout().as_raw_fd(),
        io::stderr().as_raw_fd(),
    ];
    for stream in streams {
        // SAFETY: a standard stream, or a closed one, of which fstat says so.
        let is_null = fstat(unsafe { BorrowedFd::borrow_raw(stream) })
            .is_ok_and(|stat| stat.st_rdev == own.st_rdev);
        // SAFETY: both descriptors are open.
        if is_null && unsafe { libc::dup2(null.as_raw_fd(), stream) } < 0 {
            return Err(io::Error::last_os_error()).attempt(attempt);
        }
    }
    Ok(())
}

/// The program and its arguments, with a machine's environment instead of a test's.
fn program(mut words: impl Iterator<Item = OsString>) -> Result<Command> {
    let name = words.next().unwrap_or_else(|| "/bin/sh".into());
    let path = match std::env::var("PATH") {
        Ok(path) if !path.is_empty() => format!("{}:{path}", files::TOOLS),
        _ => files::PATH.to_owned(),
    };
    // SAFETY: this process has one thread.
    unsafe {
        std::env::set_var("PATH", path);
        // Cargo sets the first for tests; the others lead to sockets and terminals of the machine.
        for name in [
            "LD_LIBRARY_PATH",
            "SSH_AUTH_SOCK",
            "SSH_CONNECTION",
            "SSH_CLIENT",
            "SSH_TTY",
        ] {
            std::env::remove_var(name);
        }
    }
    let mut command = Command::new(name);
    command.args(words);
    Ok(command)
}

/// The program leads its own session, as a service does. (A session that is led from outside of
/// the PID namespace is something that no real machine has.)
fn new_session(command: &mut Command) {
    // SAFETY: setsid is a bare system call.
    unsafe {
        command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
}

/// The signals of a helper, blocked and waited for.
struct Signals {
    waited: libc::sigset_t,
    /// What was blocked before.
    inherited: libc::sigset_t,
    /// A terminal sends its signals to the program itself.
    on_terminal: bool,
    /// Sent by the kernel when the process above has died.
    orphaned: libc::c_int,
}

impl Signals {
    fn block(on_terminal: bool) -> Self {
        let orphaned = libc::SIGRTMIN() + 7;
        // SAFETY: the set is initialized by sigemptyset before anything reads it; all signal
        // numbers are valid.
        let (waited, inherited) = unsafe {
            let mut set = std::mem::MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            for signal in HANDED_DOWN.into_iter().chain([libc::SIGCHLD, orphaned]) {
                libc::sigaddset(&raw mut set, signal);
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut before = set;
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            (set, before)
        };
        Self {
            waited,
            inherited,
            on_terminal,
            orphaned,
        }
    }

    /// From now on the death of the process above is a signal to this one.
    fn when_parent_dies(&self) {
        // SAFETY: PR_SET_PDEATHSIG takes a signal number.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, self.orphaned);
        }
    }

    /// The command starts with the mask that this process was started with.
    fn unblock_in(&self, command: &mut Command) {
        let mask = self.inherited;
        // SAFETY: sigprocmask is async-signal-safe, and the mask is initialized.
        unsafe {
            command.pre_exec(move || {
                match libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    }

    /// Hands signals down to `child` until it ends, then ends the same way.
    fn supervise(&self, child: Pid) -> ! {
        loop {
            match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => exit(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => die_of(signal as libc::c_int),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(_) => exit(125),
            }
            // SAFETY: the set is initialized; a null siginfo is allowed.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.waited, std::ptr::null_mut()) };
            let from_terminal = self.on_terminal && [libc::SIGINT, libc::SIGQUIT].contains(&signal);
            let to_send = match signal {
                libc::SIGCHLD => continue,
                signal if signal == self.orphaned => libc::SIGKILL,
                signal if signal > 0 && !from_terminal => signal,
                _ => continue,
            };
            // SAFETY: the child is not reaped yet, so the PID is its own.
            unsafe {
                libc::kill(child.as_raw(), to_send);
            }
        }
    }
}

/// Ends this process by `signal`, without a second core file.
fn die_of(signal: libc::c_int) -> ! {
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls with valid arguments; the set is initialized by sigemptyset.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        let mut set = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::sigprocmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
    exit(128 + signal)
}
