//! Where this host keeps what must outlive the orchestrator.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::error::Error;

/// The state directory of this host.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

/// Held while a tree is being moved.
#[derive(Debug)]
pub struct TreeLock(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl State {
    /// The directory used by every release: on tmpfs on Debian.
    pub const ROOT: &str = "/run/migrate";

    /// Makes the directory, readable for root only.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn open() -> Result<Self, Error> {
        Self::at(Path::new(Self::ROOT))
    }

    /// The same at another place.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn at(root: &Path) -> Result<Self, Error> {
        let state = Self {
            root: root.to_owned(),
        };
        for directory in [root.to_owned(), state.journal(), state.log(), state.locks()] {
            make_private(&directory)?;
        }
        Ok(state)
    }

    /// Journal records.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// Logs of agents.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// Pinned gates.
    #[must_use]
    pub fn gates(&self) -> PathBuf {
        self.root.join("bpf")
    }

    fn locks(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Claims a tree for this process.
    ///
    /// # Errors
    ///
    /// Another process holds it.
    pub fn lock_tree(&self, pid: i32) -> Result<TreeLock, Error> {
        let path = self.locks().join(pid.to_string());
        // Not emptied before it is ours: it names whose it is.
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::file("create", &path))?;
        let mut lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| Error::Busy { pid })?;
        let own = std::process::id().cast_signed();
        let ticks = migrate_proc::start_ticks(own).unwrap_or(0);
        lock.set_len(0)
            .and_then(|()| write!(lock, "{own} {ticks}"))
            .map_err(Error::file("write", &path))?;
        Ok(TreeLock(lock))
    }

    /// PID and start of the process that has claimed a tree, if it lives.
    #[must_use]
    pub fn holder(&self, pid: i32) -> Option<(i32, u64)> {
        let text = fs::read_to_string(self.locks().join(pid.to_string())).ok()?;
        let (holder, ticks) = text.split_once(' ')?;
        let (holder, ticks) = (holder.parse().ok()?, ticks.parse().ok()?);
        (migrate_proc::start_ticks(holder) == Some(ticks)).then_some((holder, ticks))
    }

    /// Directories on tmpfs that can hold images. `MIGRATE_IMAGE_DIR` names
    /// one and only one.
    #[must_use]
    pub fn image_roots(&self) -> Vec<PathBuf> {
        std::env::var_os("MIGRATE_IMAGE_DIR").map_or_else(
            || {
                vec![
                    self.root.join("images"),
                    PathBuf::from("/dev/shm/migrate-images"),
                ]
            },
            |only| vec![PathBuf::from(only)],
        )
    }

    /// The place with the most free space for images. Images hold the memory
    /// of the tree, so only tmpfs is considered.
    ///
    /// # Errors
    ///
    /// None of the candidates can be made, or none is on tmpfs.
    pub fn image_root(&self) -> Result<PathBuf, Error> {
        let roots = self.image_roots();
        let mut best: Option<(u64, PathBuf)> = None;
        for root in &roots {
            make_private(root)?;
            let free = statfs(root)
                .ok()
                .filter(|fs| fs.filesystem_type() == TMPFS_MAGIC)
                .map(|fs| {
                    fs.blocks_available()
                        .saturating_mul(u64::try_from(fs.block_size()).unwrap_or(0))
                });
            if let Some(free) = free
                && best.as_ref().is_none_or(|(most, _)| free > *most)
            {
                best = Some((free, root.clone()));
            }
        }
        for root in &roots {
            if best.as_ref().is_none_or(|(_, kept)| kept != root) {
                // Empty unless another migration uses it, and then it stays.
                let _ = fs::remove_dir(root);
            }
        }
        best.map(|(_, root)| root).ok_or_else(|| {
            Error::Changed(format!(
                "no tmpfs for images: none of {} is on one",
                roots
                    .iter()
                    .map(|root| root.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            ))
        })
    }
}

/// Makes a directory for root only, with its parents.
pub(crate) fn make_private(directory: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(Error::file("create", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_locked_once() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        assert_eq!(state.holder(42), None);
        let held = state.lock_tree(42).unwrap();
        assert!(matches!(state.lock_tree(42), Err(Error::Busy { pid: 42 })));
        let holder = state.holder(42).map(|(pid, _)| pid.cast_unsigned());
        assert_eq!(holder, Some(std::process::id()));
        assert!(state.lock_tree(43).is_ok());
        drop(held);
        assert!(state.lock_tree(42).is_ok());
    }
}
