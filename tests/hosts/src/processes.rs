//! The processes of a lab, found by their command lines and their namespaces.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Attempt, Error, Result};
use crate::helper::{ENTER, INIT, SPAWN};
use crate::layout::Member;

/// Time for the processes of a host to end with their init.
const END_WITHIN: Duration = Duration::from_secs(10);
/// Time for a process that only visits a host to end by itself, before it is killed.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);

/// Every process of the machine, as this PID namespace sees it.
fn all_pids() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").attempt(|| "list the processes".to_owned())?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// The words of a process's command line; empty for a zombie.
fn command_line(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

/// Whether `pid` is the init of this member of this lab.
pub(crate) fn is_init(pid: i32, lab: &str, member: &str) -> bool {
    let words = command_line(pid);
    words.len() > 2 && words[0] == INIT && words[1] == lab && words[2] == member
}

/// The inits of a lab. `None` in place of a PID: there is more than one, so it is half made.
pub(crate) fn inits(lab: &str) -> Result<BTreeMap<Member, Option<i32>>> {
    let mut found = BTreeMap::new();
    for pid in all_pids()? {
        let words = command_line(pid);
        if words.len() < 3 || words[0] != INIT || words[1] != lab {
            continue;
        }
        if let Some(member) = Member::parse(&words[2]) {
            found
                .entry(member)
                .and_modify(|pid| *pid = None)
                .or_insert(Some(pid));
        }
    }
    Ok(found)
}

/// A handle on one process, which never means another one.
struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// `None` if there is no such process.
    fn open(pid: i32) -> Option<Self> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Some(Self { pid, fd })
    }

    fn kill(&self) {
        // SAFETY: a valid pidfd, a signal number, no siginfo, no flags.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// Whether it ended before `deadline`.
    fn ended_by(&self, deadline: Instant) -> Result<bool> {
        readable_by(&self.fd, deadline)
    }
}

/// Waits until `fd` is readable (or its other end is closed).
pub(crate) fn readable_by(fd: &impl AsFd, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // One more millisecond, so that the time is over when the poll is.
        let timeout =
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).attempt(|| "wait for a descriptor".to_owned()),
        }
    }
}

/// The number of a namespace file, which no other namespace has while the file is open.
fn namespace_id(path: &str) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Ends every process of a lab, and waits until they are gone.
pub(crate) fn kill_all(lab: &str) -> Result<()> {
    let own = std::process::id();
    let mut inits = Vec::new();
    let mut visitors = Vec::new();
    for pid in all_pids()? {
        let words = command_line(pid);
        if words.len() < 3 || words[1] != lab {
            continue;
        }
        // The handle first, then the name again: the PID could have become another's meanwhile.
        let Some(process) = Process::open(pid) else {
            continue;
        };
        if command_line(pid) != words {
            continue;
        }
        match words[0].as_str() {
            INIT => inits.push(process),
            ENTER | SPAWN => visitors.push(process),
            _ => {}
        }
    }

    // The open files keep the numbers from being given to new namespaces.
    let mut held = Vec::new();
    let mut ids = Vec::new();
    let own_ids: Vec<_> = ["net", "mnt"]
        .iter()
        .filter_map(|kind| namespace_id(&format!("/proc/self/ns/{kind}")).ok())
        .collect();
    for init in &inits {
        for kind in ["net", "mnt"] {
            let path = format!("/proc/{}/ns/{kind}", init.pid);
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let Ok(meta) = file.metadata() else { continue };
            let id = (meta.dev(), meta.ino());
            // An init that has not left the machine's namespaces yet.
            if !own_ids.contains(&id) {
                ids.push(id);
                held.push(file);
            }
        }
    }

    for init in &inits {
        init.kill();
    }
    let deadline = Instant::now() + END_WITHIN;
    for init in &inits {
        if !init.ended_by(deadline)? {
            let what = format!("the end of process {} of lab `{lab}`", init.pid);
            return Err(Error::Deadline {
                what,
                limit: END_WITHIN,
            });
        }
    }

    // Whoever came in from outside (to wait for a child inside, as a rule) has no reason to stay.
    for pid in all_pids()? {
        if pid.unsigned_abs() == own {
            continue;
        }
        let inside = ["net", "mnt"].iter().any(|kind| {
            namespace_id(&format!("/proc/{pid}/ns/{kind}")).is_ok_and(|id| ids.contains(&id))
        });
        if inside && let Some(process) = Process::open(pid) {
            visitors.push(process);
        }
    }
    let patience = Instant::now() + LEAVE_WITHIN;
    for visitor in &visitors {
        if !visitor.ended_by(patience)? {
            visitor.kill();
        }
    }
    for visitor in &visitors {
        if !visitor.ended_by(deadline)? {
            let what = format!("the end of process {} in lab `{lab}`", visitor.pid);
            return Err(Error::Deadline {
                what,
                limit: END_WITHIN,
            });
        }
    }
    drop(held);
    Ok(())
}
