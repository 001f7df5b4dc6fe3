//! Where a restored tree lives: not in anybody's login.

use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate_core::facts::TreeFacts;

use crate::cgroup::{self, Hierarchy};
use crate::error::ProcError;
use crate::{fence, read};

/// How long what was killed in the cgroup may take to leave it.
const EMPTY_WAIT_MAX: Duration = Duration::from_secs(5);

/// The cgroup of a restored tree, removed again when dropped unless
/// [`Home::keep`] was called. [`Home::remove`] also waits for what was killed
/// in it.
#[derive(Debug)]
pub struct Home {
    directory: Option<PathBuf>,
    path: String,
    /// Directories made here, outermost first.
    created: Vec<PathBuf>,
}

impl Home {
    /// Chooses and makes the cgroup for a tree: the path it had on the source
    /// where this host has it too and it is nobody's login and no unit's, else
    /// `/migrate/NAME-PID`. A unit that has processes here is not down, and would
    /// end them with its own. Without a writable v2 hierarchy there is no
    /// directory, and the tree stays where it is restored.
    ///
    /// # Errors
    /// When the kernel does not allow the cgroup for another reason than
    /// that there is no place for one.
    pub fn create(tree: &TreeFacts, id: &str) -> Result<Self, ProcError> {
        let mut home = Self {
            directory: None,
            path: String::new(),
            created: Vec::new(),
        };
        let Some(hierarchy) = Hierarchy::v2() else {
            return Ok(home);
        };
        let same = cgroup::without_fence(&tree.cgroup);
        if same != "/" && !cgroup::is_login(same) && !cgroup::is_units(same) {
            let directory = hierarchy.directory(same).filter(|d| takes_processes(d));
            if let Some(directory) = directory {
                home.path = same.to_owned();
                home.directory = Some(directory);
                return Ok(home);
            }
        }
        let name = tree.processes.first().map_or("tree", |root| &root.name);
        let names = names(name, tree.root_pid, id);
        let Some(parent) = hierarchy.directory(cgroup::HOME_PARENT) else {
            return Ok(home);
        };
        match cgroup::create(&parent) {
            Ok(true) => home.created.push(parent.clone()),
            Ok(false) => {}
            Err(_) => return Ok(home),
        }
        for name in names {
            let directory = parent.join(&name);
            if directory.exists() && !takes_processes(&directory) {
                continue;
            }
            if cgroup::create(&directory)? {
                home.created.push(directory.clone());
            }
            home.path = format!("{}/{name}", cgroup::HOME_PARENT);
            home.directory = Some(directory);
            break;
        }
        Ok(home)
    }

    /// Removes the cgroup that an agent has left which died before the tree
    /// was its host's, unless something lives there.
    pub fn clear(name: &str, root_pid: i32, id: &str) {
        let parent = Hierarchy::v2().and_then(|v2| v2.directory(cgroup::HOME_PARENT));
        for name in names(name, root_pid, id) {
            if let Some(parent) = &parent {
                let home = parent.join(name);
                if home.exists() {
                    // What was killed a moment ago may still be giving back
                    // its memory.
                    let _ = fence::await_event(&home, "populated", "0", EMPTY_WAIT_MAX);
                    cgroup::remove_empty_home(&home);
                }
            }
        }
    }

    /// The cgroup's directory; `None` without a v2 hierarchy.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The cgroup's path as /proc/PID/cgroup will name it; empty without a
    /// v2 hierarchy.
    #[must_use]
    pub fn path(&self) -> String {
        self.path.clone()
    }

    /// Moves a process in, for instance the CRIU that restores the tree, so
    /// that all it forks are born here. In v1 hierarchies it leaves the
    /// cgroups of a login.
    ///
    /// # Errors
    /// [`ProcError::NoSuchProcess`] when it has gone.
    pub fn place(&self, pid: i32) -> Result<(), ProcError> {
        leave_login(pid, false)?;
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        if cgroup::enter(directory, pid)? {
            Ok(())
        } else {
            Err(ProcError::NoSuchProcess { pid })
        }
    }

    /// The home that another process has made and put on record as
    /// [`Home::path`].
    #[must_use]
    pub fn from_record(path: &str) -> Self {
        Self {
            directory: Hierarchy::v2().and_then(|v2| v2.directory(path)),
            path: path.to_owned(),
            created: Vec::new(),
        }
    }

    /// Those of `pids` that live here.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn living(&self, pids: &[i32]) -> Result<Vec<i32>, ProcError> {
        let mut here = Vec::new();
        for &pid in pids {
            if self.directory.is_some()
                && crate::start_ticks(pid).is_some()
                && cgroup::of_tree(pid)?.as_deref() == Some(&self.path)
            {
                here.push(pid);
            }
        }
        Ok(here)
    }

    /// PIDs of the processes of this name that live here.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn named(&self, name: &str) -> Result<Vec<i32>, ProcError> {
        let Some(directory) = &self.directory else {
            return Ok(Vec::new());
        };
        let listed = read::text_if_there(directory.join("cgroup.procs"))?.unwrap_or_default();
        Ok(listed
            .lines()
            .filter_map(|pid| pid.parse().ok())
            .filter(|pid| read::name(*pid) == name)
            .collect())
    }

    /// Kills a copy whose restore came to nothing: everything in a cgroup that
    /// was made here, for a CRIU that was killed early leaves children behind
    /// which it had stopped (`kerndat_breakpoints` in CRIU's `criu/kerndat.c`),
    /// and otherwise those of `pids` that live here. Without a v2 hierarchy
    /// nothing tells the copy from others, and nothing is killed.
    ///
    /// # Errors
    /// When one cannot be killed.
    pub fn kill(&self, pids: &[i32]) -> Result<(), ProcError> {
        let own = self.directory.as_ref().filter(|d| self.created.contains(d));
        if let Some(own) = own
            && std::fs::write(own.join("cgroup.kill"), "1").is_ok()
        {
            return Ok(());
        }
        crate::kill_tree(&self.living(pids)?)
    }

    /// Kills a copy that runs and must not go on: everything in the cgroup that
    /// was made for it, or else those of `pids` and their descendants that live
    /// there. For one who has not made the cgroup himself; `home` is
    /// [`Home::path`]. What began before this process did is not the copy.
    ///
    /// # Errors
    /// When one cannot be killed.
    pub fn end(home: &str, pids: &[i32]) -> Result<(), ProcError> {
        /// Rounds of looking for those that were forked meanwhile.
        const ROUNDS_MAX: u32 = 16;
        let own = home.starts_with(cgroup::HOME_PARENT) && home.len() > cgroup::HOME_PARENT.len();
        let directory = Hierarchy::v2().and_then(|v2| v2.directory(home));
        if own
            && let Some(directory) = directory
            && std::fs::write(directory.join("cgroup.kill"), "1").is_ok()
        {
            fence::await_event(&directory, "populated", "0", EMPTY_WAIT_MAX)?;
            return Ok(());
        }
        let began = crate::start_ticks(read::own_pid());
        for _ in 0..ROUNDS_MAX {
            let mut here = std::collections::BTreeSet::new();
            for tree in pids.iter().filter_map(|&pid| crate::tree(pid).ok()) {
                here.extend(tree.pids().into_iter().filter(|&pid| {
                    crate::start_ticks(pid) >= began
                        && (home.is_empty()
                            || cgroup::of_tree(pid).ok().flatten().as_deref() == Some(home))
                }));
            }
            if here.is_empty() {
                return Ok(());
            }
            crate::kill_tree(&here.into_iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Removes what was made here, once everything in it has ended: a CRIU
    /// that was told to go takes a moment.
    ///
    /// # Errors
    /// When something lives on in it, or it cannot be removed.
    pub fn remove(mut self) -> Result<(), ProcError> {
        let Some(own) = self.directory.take().filter(|d| self.created.contains(d)) else {
            return Ok(());
        };
        fence::await_event(&own, "populated", "0", EMPTY_WAIT_MAX)?;
        read::removed(std::fs::remove_dir(&own), &own)
    }

    /// Leaves the cgroup to the tree: the restore has been committed.
    pub fn keep(mut self) {
        self.created.clear();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for directory in self.created.iter().rev() {
            // Not empty: somebody else came to live there.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// The names that are tried for a tree's cgroup, in this order.
fn names(name: &str, root_pid: i32, id: &str) -> [String; 2] {
    let name = format!("{}-{root_pid}", cgroup::file_name(name));
    let second = format!("{name}-{}", cgroup::file_name(id));
    [name, second]
}

/// Whether a cgroup exists, is no inner node and not frozen.
fn takes_processes(directory: &Path) -> bool {
    let says = |file: &str| {
        read::text(directory.join(file)).map_or_else(|_| String::new(), |t| t.trim().to_owned())
    };
    directory.is_dir()
        && says("cgroup.type") == "domain"
        && says("cgroup.subtree_control").is_empty()
        && says("cgroup.freeze") != "1"
        && !says("cgroup.events").lines().any(|line| line == "frozen 1")
}

/// Leaves the login session that started this process, so that it and what it
/// restores outlive the SSH connection: a hangup is ignored, the process leads
/// its own session where it can, and it leaves the session's cgroups. Call it
/// once, early. The restored tree is left to init to reap, so this process
/// does not become a subreaper.
///
/// # Errors
/// [`ProcError::Detach`] when a step that should work fails.
pub fn detach_from_session() -> Result<(), ProcError> {
    // SAFETY: ignoring a signal installs no handler.
    let hangup = unsafe {
        nix::sys::signal::signal(
            nix::sys::signal::Signal::SIGHUP,
            nix::sys::signal::SigHandler::SigIgn,
        )
    };
    if let Err(error) = hangup {
        return Err(ProcError::Detach {
            attempt: "ignore a hangup",
            source: error.into(),
        });
    }
    match nix::unistd::setsid() {
        // EPERM: already the leader of a process group, as what sshd or a
        // shell starts is. With hangups ignored that is good enough.
        Ok(_) | Err(nix::errno::Errno::EPERM) => {}
        Err(error) => {
            return Err(ProcError::Detach {
                attempt: "start a session",
                source: error.into(),
            });
        }
    }
    leave_login(read::own_pid(), true)
}

/// Moves a process out of every cgroup that ends with a login.
fn leave_login(pid: i32, v2_too: bool) -> Result<(), ProcError> {
    for (controllers, path) in cgroup::paths(pid)? {
        if !cgroup::is_login(&path) || (controllers.is_empty() && !v2_too) {
            continue;
        }
        let hierarchy = if controllers.is_empty() {
            Hierarchy::v2()
        } else {
            Hierarchy::v1(&controllers)
        };
        let Some(root) = hierarchy.and_then(|hierarchy| hierarchy.directory("/")) else {
            continue;
        };
        if cgroup::enter(&root, pid).is_ok() {
            continue;
        }
        // A root that is none, in a cgroup namespace, takes no processes
        // besides its children.
        let aside = root.join("migrate-agent");
        if controllers.is_empty() {
            cgroup::create(&aside)?;
            cgroup::enter(&aside, pid)?;
        }
    }
    Ok(())
}
