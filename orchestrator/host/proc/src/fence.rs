//! Keeps a dumped tree from running, invisible to it.
//!
//! ```text
//!   prepare --> open --close--> closed --open--> open --release--> (gone)
//!                                  |
//!                                  +-- tree killed --release--> (gone)
//! ```
//!
//! CRIU holds a dumped tree with ptrace. When CRIU dies, the kernel lets the
//! tree run, on a host that may no longer own it. The fence is what then still
//! holds: the freezer of a cgroup v2, made before the dump so that one write
//! closes it, or SIGSTOP where there is no such hierarchy. Neither cares that
//! a tracer holds the tasks at that moment: a task that leaves its tracer's
//! stop goes straight into the fence's.
//!
//! A fence is never opened by being dropped. After the handover the source may
//! not run again on its own, not even when this program crashes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Hierarchy};
use crate::error::ProcError;
use crate::read;
use crate::signal::{Pidfd, timeout};
use crate::tree::{self, Tree};

/// How often the tree is looked through for processes forked meanwhile.
const ROUNDS_MAX: u32 = 20;
/// How long a tree may take to stand still. Under a tracer it already does;
/// a running one takes well below a millisecond unless it hangs in the kernel.
const CLOSE_WAIT_MAX: Duration = Duration::from_millis(500);
/// How long a killed tree may take to leave its cgroup.
const EMPTY_WAIT_MAX: Duration = Duration::from_secs(10);
/// Where no event tells of a change, /proc is read at this interval.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// What holds the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceKind {
    /// The freezer of a cgroup v2 made for the tree.
    CgroupFreezer,
    /// SIGSTOP to each process: the parent and a debugger can see it.
    StopSignal,
}

impl std::fmt::Display for FenceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CgroupFreezer => "cgroup freezer",
            Self::StopSignal => "stop signals",
        })
    }
}

/// All that another process needs to take a fence over after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceRecord {
    /// What holds the tree.
    pub kind: FenceKind,
    /// The root's PID.
    pub root: i32,
    /// The fence's own cgroup; none with signals.
    pub directory: Option<PathBuf>,
    /// The processes at the time of preparing.
    pub members: Vec<FencedProcess>,
}

/// A process behind a fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FencedProcess {
    /// Its PID.
    pub pid: i32,
    /// When it started, in ticks since boot.
    pub start_ticks: u64,
    /// The cgroup directory it came from; none with signals.
    pub origin: Option<PathBuf>,
    /// It was stopped by job control before, and stays so.
    pub was_stopped: bool,
}

/// A fence around a process tree; see the module's page.
#[derive(Debug)]
#[must_use = "an unreleased fence leaves the tree in a cgroup of its own"]
pub struct Fence {
    record: FenceRecord,
}

impl Fence {
    /// What [`Fence::prepare`] is about to make, for a journal that is written
    /// first; changes nothing. A fence that was begun and never finished can
    /// be opened and released by it, and so can one that was never begun.
    ///
    /// # Errors
    /// When the tree has gone.
    pub fn plan(tree: &Tree, id: &str) -> Result<FenceRecord, ProcError> {
        let Some((hierarchy, directory)) = place(tree, id)? else {
            return Ok(Self::prepare_signals(tree)?.record);
        };
        let mut members = Vec::new();
        for process in tree.living() {
            members.push(FencedProcess {
                pid: process.pid,
                start_ticks: process.start_ticks,
                origin: cgroup::v2_path(process.pid)?.and_then(|path| hierarchy.directory(&path)),
                was_stopped: tree.stopped.contains(&process.pid),
            });
        }
        Ok(FenceRecord {
            kind: FenceKind::CgroupFreezer,
            root: tree.root(),
            directory: Some(directory),
            members,
        })
    }

    /// Makes a fence around a running tree and leaves it open. `id` names the
    /// migration and becomes part of the cgroup's name.
    ///
    /// # Errors
    /// When the tree has gone or never stands still. A missing or unfit cgroup
    /// hierarchy is no error: the fence then is one of signals.
    pub fn prepare(tree: &Tree, id: &str) -> Result<Self, ProcError> {
        if let Some(fence) = Self::prepare_cgroup(tree, id)? {
            return Ok(fence);
        }
        Self::prepare_signals(tree)
    }

    /// A fence of signals, whatever else this host offers.
    ///
    /// # Errors
    /// When the tree has gone.
    pub fn prepare_signals(tree: &Tree) -> Result<Self, ProcError> {
        let members = tree
            .living()
            .map(|process| FencedProcess {
                pid: process.pid,
                start_ticks: process.start_ticks,
                origin: None,
                was_stopped: tree.stopped.contains(&process.pid),
            })
            .collect();
        let record = FenceRecord {
            kind: FenceKind::StopSignal,
            root: tree.root(),
            directory: None,
            members,
        };
        Ok(Self { record })
    }

    /// `None` where the hierarchy does not let us, with nothing changed.
    fn prepare_cgroup(tree: &Tree, id: &str) -> Result<Option<Self>, ProcError> {
        let Some((hierarchy, directory)) = place(tree, id)? else {
            return Ok(None);
        };
        match cgroup::create(&directory) {
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        let mut fence = Self {
            record: FenceRecord {
                kind: FenceKind::CgroupFreezer,
                root: tree.root(),
                directory: Some(directory.clone()),
                members: Vec::new(),
            },
        };
        let freezable = directory.join("cgroup.freeze").exists();
        let gathered = if freezable {
            fence.gather(&hierarchy, &directory, tree)
        } else {
            Ok(false)
        };
        match gathered {
            Ok(true) => Ok(Some(fence)),
            Ok(false) => {
                fence.release()?;
                Ok(None)
            }
            Err(error) => {
                // The first failure is the one to tell.
                let _ = fence.release();
                Err(error)
            }
        }
    }

    /// Moves every process in, and those forked meanwhile. `false` when the
    /// kernel does not allow it.
    fn gather(
        &mut self,
        hierarchy: &Hierarchy,
        directory: &Path,
        tree: &Tree,
    ) -> Result<bool, ProcError> {
        for _ in 0..ROUNDS_MAX {
            let mut moved = 0;
            for (pid, start_ticks) in tree::living_now(self.record.root)? {
                let Some(path) = cgroup::v2_path(pid)? else {
                    continue;
                };
                let origin = hierarchy.directory(&path);
                if origin.as_deref() == Some(directory) {
                    continue;
                }
                let known =
                    |member: &FencedProcess| (member.pid, member.start_ticks) == (pid, start_ticks);
                match cgroup::enter(directory, pid) {
                    // The kernel leaves out what is about to end, without a
                    // word (`cgroup_migrate_add_task` in `cgroup.c`), and the
                    // end of a large process takes long.
                    Ok(true) if self.record.members.iter().any(known) => {}
                    Ok(true) => {
                        moved += 1;
                        self.record.members.push(FencedProcess {
                            pid,
                            start_ticks,
                            origin,
                            was_stopped: tree.stopped.contains(&pid),
                        });
                    }
                    Ok(false) => {}
                    Err(_) => return Ok(false),
                }
            }
            if moved == 0 {
                return Ok(true);
            }
        }
        Err(ProcError::Unstable {
            pid: self.record.root,
            attempts: ROUNDS_MAX,
        })
    }

    /// Stops the tree from running, now or as soon as its tracer lets go.
    /// Closing a closed fence is fine.
    ///
    /// # Errors
    /// [`ProcError::NotFrozen`] when a process does not come to rest: it is
    /// held all the same once it leaves the kernel.
    pub fn close(&self) -> Result<(), ProcError> {
        match &self.record.directory {
            Some(directory) => {
                cgroup::write(directory, "cgroup.freeze", "1")?;
                if !await_event(directory, "frozen", "1", CLOSE_WAIT_MAX)? {
                    return Err(not_frozen());
                }
                Ok(())
            }
            None => self.stop(),
        }
    }

    /// Makes sure that a closed fence holds the whole tree: something else on
    /// this host may have moved a process out of it since it was made.
    ///
    /// # Errors
    /// [`ProcError::OutsideFence`] with the first that is not held.
    pub fn holds(&self, tree: &Tree) -> Result<(), ProcError> {
        let Some(directory) = &self.record.directory else {
            return Ok(());
        };
        let listed = read::text_if_there(directory.join("cgroup.procs"))?.unwrap_or_default();
        let held: BTreeSet<i32> = listed.lines().filter_map(|pid| pid.parse().ok()).collect();
        match tree.living().find(|process| !held.contains(&process.pid)) {
            Some(process) => Err(ProcError::OutsideFence { pid: process.pid }),
            None => Ok(()),
        }
    }

    /// Closes the fence by itself in the moment in which the other end of
    /// `holder` is closed, which is what the kernel does first when it ends a
    /// process, and only then lets go of what that has traced. So a tree whose
    /// tracer dies comes to rest before it can do much.
    ///
    /// # Errors
    /// When there are no descriptors or threads left.
    pub fn watch(&self, holder: OwnedFd) -> Result<FenceWatch, ProcError> {
        let failed = |source| ProcError::Write {
            attempt: "watch",
            path: self.record.directory.clone().unwrap_or_default(),
            source,
        };
        let (stopped, stop) = std::io::pipe().map_err(failed)?;
        let freezer = self.record.directory.as_ref().and_then(|directory| {
            let path = directory.join("cgroup.freeze");
            std::fs::OpenOptions::new().write(true).open(path).ok()
        });
        let fence = Self {
            record: self.record.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("fence".to_owned())
            .spawn(move || {
                if !hangs_up(&holder, &stopped) {
                    return false;
                }
                let closed = freezer.is_some_and(|mut file| file.write_all(b"1").is_ok());
                closed || fence.close().is_ok()
            })
            .map_err(failed)?;
        Ok(FenceWatch { stop, thread })
    }

    /// The members that are still there, and what they have forked since.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn living(&self) -> Result<Vec<i32>, ProcError> {
        Ok(self
            .stoppable()?
            .into_iter()
            .filter(|(pid, member)| tree::is_same_process(*pid, member.start_ticks))
            .map(|(pid, _)| pid)
            .collect())
    }

    /// Lets the tree run, as far as the fence is concerned. Opening an open
    /// fence is fine.
    ///
    /// # Errors
    /// When the cgroup cannot be written or a signal not be sent.
    pub fn open(&self) -> Result<(), ProcError> {
        match &self.record.directory {
            Some(directory) => match cgroup::write(directory, "cgroup.freeze", "0") {
                Err(ProcError::Write { source, .. }) if read::is_gone(&source) => Ok(()),
                other => other,
            },
            None => {
                for (pid, member) in self.stoppable()? {
                    if !member.was_stopped {
                        signal(&member, pid, libc::SIGCONT, "SIGCONT")?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes the fence away: what runs goes back to where it came from. After
    /// the tree was killed, only the cgroup goes.
    ///
    /// # Errors
    /// [`ProcError::FenceHolds`] when it is closed and the tree still lives.
    pub fn release(self) -> Result<(), ProcError> {
        let Some(directory) = &self.record.directory else {
            return Ok(());
        };
        if !directory.exists() {
            return Ok(());
        }
        let frozen = read::text(directory.join("cgroup.freeze")).unwrap_or_default();
        if frozen.trim() == "1" {
            if !await_event(directory, "populated", "0", EMPTY_WAIT_MAX)? {
                return Err(ProcError::FenceHolds {
                    root: self.record.root,
                });
            }
        } else {
            self.send_home(directory)?;
        }
        // What is dying counts until it is dead.
        await_event(directory, "populated", "0", EMPTY_WAIT_MAX)?;
        read::removed(std::fs::remove_dir(directory), directory)?;
        if let Some(parent) = directory.parent() {
            cgroup::remove_empty_home(parent);
        }
        Ok(())
    }

    /// Empties the fence's cgroup, back to where each process came from.
    fn send_home(&self, directory: &Path) -> Result<(), ProcError> {
        let origins: BTreeMap<i32, &Path> = self
            .record
            .members
            .iter()
            .filter_map(|member| Some((member.pid, member.origin.as_deref()?)))
            .collect();
        let Some(parent) = directory.parent() else {
            return Ok(());
        };
        for _ in 0..ROUNDS_MAX {
            let listed = read::text_if_there(directory.join("cgroup.procs"))?.unwrap_or_default();
            let pids: Vec<i32> = listed.lines().filter_map(|pid| pid.parse().ok()).collect();
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                // An origin that went away meanwhile gives way to the parent,
                // which cannot while we are in it.
                let origin = origins.get(&pid).copied().unwrap_or(parent);
                if cgroup::enter(origin, pid).is_err() {
                    cgroup::enter(parent, pid)?;
                }
            }
        }
        Ok(())
    }

    /// What holds the tree.
    #[must_use]
    pub fn kind(&self) -> FenceKind {
        self.record.kind
    }

    /// What a journal has to keep of the fence.
    #[must_use]
    pub fn record(&self) -> FenceRecord {
        self.record.clone()
    }

    /// Takes over a fence that another process made.
    pub fn from_record(record: FenceRecord) -> Self {
        Self { record }
    }

    /// Sends SIGSTOP to all, then to those forked meanwhile, and waits.
    fn stop(&self) -> Result<(), ProcError> {
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        let mut stopped = BTreeMap::new();
        for _ in 0..ROUNDS_MAX {
            let before = stopped.len();
            for (pid, member) in self.stoppable()? {
                if stopped.contains_key(&pid) {
                    continue;
                }
                signal(&member, pid, libc::SIGSTOP, "SIGSTOP")?;
                stopped.insert(pid, member.start_ticks);
            }
            if stopped.len() == before {
                break;
            }
        }
        while !all_at_rest(&stopped)? {
            if Instant::now() >= deadline {
                return Err(not_frozen());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Those to be signalled: the members, and what they forked since.
    fn stoppable(&self) -> Result<BTreeMap<i32, FencedProcess>, ProcError> {
        let mut all: BTreeMap<i32, FencedProcess> = self
            .record
            .members
            .iter()
            .map(|member| (member.pid, member.clone()))
            .collect();
        let root = self
            .record
            .members
            .iter()
            .find(|m| m.pid == self.record.root);
        if root.is_some_and(|root| tree::is_same_process(root.pid, root.start_ticks)) {
            for (pid, start_ticks) in tree::living_now(self.record.root)? {
                all.entry(pid).or_insert(FencedProcess {
                    pid,
                    start_ticks,
                    origin: None,
                    was_stopped: false,
                });
            }
        }
        Ok(all)
    }
}

/// See [`Fence::watch`].
#[derive(Debug)]
#[must_use = "a watch that is not ended may close the fence later"]
pub struct FenceWatch {
    stop: std::io::PipeWriter,
    thread: std::thread::JoinHandle<bool>,
}

impl FenceWatch {
    /// Ends the watch; whether it has closed the fence.
    pub fn end(self) -> bool {
        drop(self.stop);
        self.thread.join().unwrap_or(false)
    }
}

/// Waits until the other end of `holder` or of `stopped` is closed; whether it
/// was the former.
fn hangs_up(holder: &OwnedFd, stopped: &std::io::PipeReader) -> bool {
    loop {
        // An end is told whether it is asked for or not; bytes are not.
        let mut fds = [
            PollFd::new(holder.as_fd(), PollFlags::empty()),
            PollFd::new(stopped.as_fd(), PollFlags::empty()),
        ];
        match nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return false,
        }
        let ended = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        return ended(&fds[0]) && !ended(&fds[1]);
    }
}

/// Where the cgroup of a fence goes; `None` without a v2 hierarchy.
fn place(tree: &Tree, id: &str) -> Result<Option<(Hierarchy, PathBuf)>, ProcError> {
    let Some(hierarchy) = Hierarchy::v2() else {
        return Ok(None);
    };
    let Some(path) = cgroup::v2_path(tree.root())? else {
        return Err(ProcError::NoSuchProcess { pid: tree.root() });
    };
    // A fence left behind by a crash is not to be nested into.
    let Some(parent) = hierarchy.directory(cgroup::without_fence(&path)) else {
        return Ok(None);
    };
    let name = format!("{}{}", cgroup::FENCE_PREFIX, cgroup::file_name(id));
    Ok(Some((hierarchy, parent.join(name))))
}

/// Signals exactly the process that was meant, or nobody.
fn signal(
    member: &FencedProcess,
    pid: i32,
    number: i32,
    name: &'static str,
) -> Result<(), ProcError> {
    // The handle is taken before the look: what it names can no longer change.
    let Some(handle) = Pidfd::open(pid)? else {
        return Ok(());
    };
    if !tree::is_same_process(pid, member.start_ticks) {
        return Ok(());
    }
    match handle.send(number) {
        Ok(_) => Ok(()),
        Err(source) => Err(ProcError::Signal {
            signal: name,
            pid,
            source,
        }),
    }
}

/// Whether every thread of every process is stopped, traced or over.
fn all_at_rest(processes: &BTreeMap<i32, u64>) -> Result<bool, ProcError> {
    for (&pid, &start_ticks) in processes {
        if !tree::is_same_process(pid, start_ticks) {
            continue;
        }
        for thread in read::numbers(read::of(pid, "task"))? {
            let moving = read::stat(thread)?
                .is_some_and(|stat| !matches!(stat.state, 'T' | 't' | 'Z' | 'X' | 'x'));
            if moving {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn not_frozen() -> ProcError {
    ProcError::NotFrozen {
        waited_ms: u64::try_from(CLOSE_WAIT_MAX.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Waits until `cgroup.events` says `key value`; whether it did in time. A
/// cgroup that has gone has neither processes nor anything that runs.
pub(crate) fn await_event(
    directory: &Path,
    key: &str,
    value: &str,
    wait: Duration,
) -> Result<bool, ProcError> {
    let deadline = Instant::now() + wait;
    let path = directory.join("cgroup.events");
    let failed = |source| ProcError::Read {
        path: path.clone(),
        source,
    };
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if read::is_gone(&error) => return Ok(true),
        Err(error) => return Err(failed(error)),
    };
    loop {
        let mut text = String::new();
        // Reading rearms the notification, so no change is missed between
        // this look and the poll.
        match file.rewind().and_then(|()| file.read_to_string(&mut text)) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(true),
            Err(error) => return Err(failed(error)),
        }
        if text
            .lines()
            .any(|line| line.split_once(' ') == Some((key, value)))
        {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        match nix::poll::poll(&mut fds, timeout(left)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
}
