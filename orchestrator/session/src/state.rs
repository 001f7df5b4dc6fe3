//! Where this host keeps what must outlive the orchestrator.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::error::Error;

/// The state directory of this host.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

/// Held while memory of a tree is still being put in place.
#[derive(Debug)]
pub struct Arriving {
    /// Locked until its last duplicate is closed; nothing unlocks it before.
    lock: File,
    path: PathBuf,
}

impl Arriving {
    /// Another handle of the same lock, for another process to hold.
    ///
    /// # Errors
    ///
    /// No descriptor can be had.
    pub fn share(&self) -> std::io::Result<OwnedFd> {
        self.lock.try_clone().map(OwnedFd::from)
    }

    /// Removes the record: nothing is missing, or nothing is left that could
    /// miss it. Without this call it lasts for as long as anybody shares it.
    pub fn done(self) {
        let _ = fs::remove_file(&self.path);
    }
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
        let own = [
            state.journal(),
            state.log(),
            state.locks(),
            state.arriving(),
            state.reports(),
        ];
        for directory in std::iter::once(root.to_owned()).chain(own) {
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

    /// Reports of migrations that began here.
    #[must_use]
    pub fn reports(&self) -> PathBuf {
        self.root.join("report")
    }

    /// Pinned gates.
    #[must_use]
    pub fn gates(&self) -> PathBuf {
        self.root.join("bpf")
    }

    fn locks(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Ends the name of a record that is being written.
    const UNFINISHED: &str = "new";

    fn arriving(&self) -> PathBuf {
        self.root.join("arriving")
    }

    /// Puts on record that memory of these processes may be missing, until the
    /// last one that shares this lets go.
    ///
    /// # Errors
    ///
    /// The record cannot be written.
    pub fn arrives(&self, migration_id: &str, pids: &[i32]) -> Result<Arriving, Error> {
        let path = self.arriving().join(migration_id);
        // Has its name once it is complete.
        let fresh = path.with_extension(Self::UNFINISHED);
        let text: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
        fs::write(&fresh, text).map_err(Error::file("write", &fresh))?;
        let lock = File::open(&fresh).map_err(Error::file("open", &fresh))?;
        lock.try_lock()
            .map_err(|error| Error::file("lock", &fresh)(error.into()))?;
        fs::rename(&fresh, &path).map_err(Error::file("rename", &fresh))?;
        Ok(Arriving { lock, path })
    }

    /// Whether memory of a migration's copy may be missing.
    #[must_use]
    pub fn is_arriving(&self, migration_id: &str) -> bool {
        self.arriving().join(migration_id).exists()
    }

    /// Waits until no memory of these processes is missing.
    ///
    /// # Errors
    ///
    /// Some still is after `limit`.
    pub async fn await_memory(&self, pids: &[i32], limit: Duration) -> Result<(), Error> {
        let directory = self.arriving();
        let entries = fs::read_dir(&directory).map_err(Error::file("read", &directory))?;
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(file) = File::open(&path) else {
                continue;
            };
            if path.extension().is_some_and(|end| end == Self::UNFINISHED) {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_default();
            let mut named = text.lines().filter_map(|line| line.parse::<i32>().ok());
            let Some(pid) = named.find(|pid| pids.contains(pid)) else {
                if file.try_lock_shared().is_ok() {
                    // Of an agent that was killed.
                    let _ = fs::remove_file(&path);
                }
                continue;
            };
            // On a thread, for there is no other way to wait for such a lock.
            let locked = tokio::task::spawn_blocking(move || file.lock_shared());
            match tokio::time::timeout(limit, locked).await {
                Ok(_) => {
                    let _ = fs::remove_file(&path);
                }
                Err(_) => return Err(Error::Arriving { pid }),
            }
        }
        Ok(())
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

    /// Held while somebody compares what migrations will take of this host and
    /// adds to it. The moment of a record, so that it is waited for.
    ///
    /// # Errors
    ///
    /// The lock cannot be made.
    pub(crate) fn lock_claims(&self) -> Result<Flock<File>, Error> {
        let path = self.locks().join("claims");
        let file = File::create(&path).map_err(Error::file("create", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::file("lock", &path)(errno.into()))
    }

    /// PID and start of the process that has claimed a tree, if it lives.
    #[must_use]
    pub fn holder(&self, pid: i32) -> Option<(i32, u64)> {
        let text = fs::read_to_string(self.locks().join(pid.to_string())).ok()?;
        let (holder, ticks) = text.split_once(' ')?;
        let (holder, ticks) = (holder.parse().ok()?, ticks.parse().ok()?);
        (migrate_proc::start_ticks(holder) == Some(ticks)).then_some((holder, ticks))
    }

    /// Whether the user has named the place for images.
    pub(crate) fn images_are_named() -> bool {
        std::env::var_os("MIGRATE_IMAGE_DIR").is_some()
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

    #[tokio::test]
    async fn memory_that_arrives_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let arriving = state.arrives("m-1", &[7, 42]).unwrap();
        let path = arriving.path.clone();
        let moment = Duration::from_millis(10);
        state.await_memory(&[8], moment).await.unwrap();
        assert!(path.exists());
        // The record outlives the one who has made it.
        let shared = arriving.share().unwrap();
        drop(arriving);
        let late = state.await_memory(&[1, 42], moment).await;
        assert!(matches!(late, Err(Error::Arriving { pid: 42 })), "{late:?}");
        let waiting = state.await_memory(&[42], Duration::from_secs(60));
        let release = async { drop(shared) };
        let (waited, ()) = tokio::join!(waiting, release);
        waited.unwrap();
        assert!(!path.exists());
    }

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
