//! Journal records on disk: replaced as a whole, changed only under a lock.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use migrate_core::journal::{RECORD_VERSION, Record, Side, Stage};
use migrate_core::protocol::recovery;
use nix::fcntl::{Flock, FlockArg};

use crate::error::Error;
use crate::state::State;

/// One side's record of one migration, and the only way to change it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Record,
}

impl Journal {
    /// Writes the first record.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn begin(state: &State, record: Record) -> Result<Self, Error> {
        let journal = Self {
            path: path(state, &record.migration_id, record.side),
            record,
        };
        let _lock = lock(&journal.path)?;
        store(&journal.path, &journal.record)?;
        Ok(journal)
    }

    /// The record as this process last wrote it.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record, unless somebody else has closed it meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Disowned`] when another process has set [`Stage::Undone`]; or
    /// the file cannot be written.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), Error> {
        let _lock = lock(&self.path)?;
        let on_record = load(&self.path)?.map(|record| record.stage);
        if !recovery::may_write(on_record, self.record.stage) {
            return Err(Error::Disowned);
        }
        change(&mut self.record);
        store(&self.path, &self.record)
    }

    /// Sets the stage; see [`Journal::update`].
    ///
    /// # Errors
    ///
    /// As [`Journal::update`].
    pub fn stage(&mut self, stage: Stage) -> Result<(), Error> {
        self.update(|record| record.stage = stage)
    }

    /// Notes that CRIU is about to be told to let the copy go: without this
    /// note a copy has never run. One empty file, for it stands in the blackout.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn let_go(&self) -> Result<(), Error> {
        let path = note_path(&self.path);
        File::create(&path)
            .map(drop)
            .map_err(Error::file("create", &path))
    }

    /// Takes the note back: CRIU could not be told.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub fn not_let_go(&self) -> Result<(), Error> {
        remove_note(&self.path)
    }

    /// Removes the record: nothing is left that it would be needed for.
    pub fn discard(self) {
        unlink(&self.path);
    }
}

/// Whether the copy of a migration may have been let go; see [`Journal::let_go`].
#[must_use]
pub fn was_let_go(state: &State, record: &Record) -> bool {
    note_path(&path(state, &record.migration_id, record.side)).exists()
}

/// Removes the note of a copy that has provably not run.
///
/// # Errors
///
/// It cannot be removed.
pub fn forget_note(state: &State, record: &Record) -> Result<(), Error> {
    remove_note(&path(state, &record.migration_id, record.side))
}

fn remove_note(path: &Path) -> Result<(), Error> {
    let path = note_path(path);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::file("remove", &path)(error))
        }
        _ => Ok(()),
    }
}

/// One record as it is now.
///
/// # Errors
///
/// It cannot be read.
pub fn read(state: &State, migration_id: &str, side: Side) -> Result<Option<Record>, Error> {
    load(&path(state, migration_id, side))
}

/// Sets the stage of a record whose owner is dead.
///
/// # Errors
///
/// It cannot be written.
pub fn close(state: &State, record: &mut Record, stage: Stage) -> Result<(), Error> {
    let path = path(state, &record.migration_id, record.side);
    let _lock = lock(&path)?;
    record.stage = stage;
    store(&path, record)
}

/// Claims a record of a dead owner for this process, so that it is settled
/// once; `None` while another process does that.
///
/// # Errors
///
/// The lock cannot be made.
pub fn claim(state: &State, record: &Record) -> Result<Option<Flock<File>>, Error> {
    let path = claim_path(&path(state, &record.migration_id, record.side));
    let file = File::create(&path).map_err(Error::file("create", &path))?;
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
}

/// The stage of the destination's record. A record that may still become
/// `Owned` is closed first, so that the answer stays true.
///
/// # Errors
///
/// The record cannot be read or written.
pub fn verdict(state: &State, migration_id: &str) -> Result<Stage, Error> {
    let path = path(state, migration_id, Side::Destination);
    if !path.exists() {
        // No lock either, then: nobody may fill the directory with questions.
        return without_record(state, migration_id);
    }
    let _lock = lock(&path)?;
    let mut record = load(&path)?;
    if record.is_none() {
        return without_record(state, migration_id);
    }
    let (answer, becomes) = recovery::verdict(record.as_ref().map(|record| record.stage));
    if let (Some(record), Some(stage)) = (&mut record, becomes) {
        record.stage = stage;
        store(&path, record)?;
    }
    Ok(answer)
}

/// The answer where there is no record, or none any more.
fn without_record(state: &State, migration_id: &str) -> Result<Stage, Error> {
    Ok(if retired(state, migration_id)? {
        Stage::Done
    } else {
        recovery::verdict(None).0
    })
}

/// Whether a migration may have this name, which becomes part of file names.
fn is_name(migration_id: &str) -> bool {
    (1..=64).contains(&migration_id.len())
        && migration_id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// A peer's names become part of file names here.
pub(crate) fn check_name(peer: &str, migration_id: &str) -> Result<(), Error> {
    if is_name(migration_id) {
        return Ok(());
    }
    Err(Error::Unexpected {
        peer: peer.to_owned(),
        got: format!("{migration_id:?}"),
        awaited: "the name of a migration",
    })
}

/// Every record of this host that can be read, the longest unchanged first.
///
/// # Errors
///
/// The directory cannot be read.
pub fn all(state: &State) -> Result<Vec<Record>, Error> {
    let directory = state.journal();
    let mut records = Vec::new();
    for entry in fs::read_dir(&directory).map_err(Error::file("read", &directory))? {
        let entry = entry.map_err(Error::file("read", &directory))?;
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            match load(&path) {
                Ok(Some(record)) => {
                    let changed = entry.metadata().and_then(|metadata| metadata.modified());
                    records.push((changed.ok(), record));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(error = %error.chain(), "skipping a record"),
            }
        }
    }
    records.sort_by(|(a, one), (b, other)| (a, &one.migration_id).cmp(&(b, &other.migration_id)));
    Ok(records.into_iter().map(|(_, record)| record).collect())
}

/// Whether a migration of this name has, or has had, the destination's side
/// here. One that was undone has left nothing.
///
/// # Errors
///
/// Names that are kept cannot be read.
pub fn is_known(state: &State, migration_id: &str) -> Result<bool, Error> {
    Ok(path(state, migration_id, Side::Destination).exists() || retired(state, migration_id)?)
}

/// Removes a record that was read by [`all`].
pub fn remove(state: &State, record: &Record) {
    unlink(&path(state, &record.migration_id, record.side));
}

/// Removes a destination's record that says [`Stage::Done`], and keeps the
/// migration's name: a source that has lost its way asks for it however late,
/// and must not hear that the copy never ran.
///
/// # Errors
///
/// The name cannot be kept; the record stays then.
pub fn retire(state: &State, record: &Record) -> Result<(), Error> {
    let (path, older) = (retired_path(state), older_path(state));
    let length = fs::metadata(&path).map_or(0, |metadata| metadata.len());
    if length >= RETIRED_BYTES_MAX {
        fs::rename(&path, &older).map_err(Error::file("replace", &older))?;
    }
    let mut names = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .map_err(Error::file("open", &path))?;
    names
        .write_all(format!("{}\n", record.migration_id).as_bytes())
        .map_err(Error::file("write", &path))?;
    remove(state, record);
    Ok(())
}

/// Names in one file of [`retire`], of which there are two, the older one full:
/// some 80,000 migrations.
const RETIRED_BYTES_MAX: u64 = 1 << 20;

/// Whether the record of this migration was retired.
fn retired(state: &State, migration_id: &str) -> Result<bool, Error> {
    // In this order: a file only moves from the first place to the second.
    for path in [retired_path(state), older_path(state)] {
        match fs::read_to_string(&path) {
            Ok(names) if names.lines().any(|name| name == migration_id) => return Ok(true),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::file("read", &path)(error));
            }
            _ => {}
        }
    }
    Ok(false)
}

fn retired_path(state: &State) -> PathBuf {
    state.journal().join("ended")
}

fn older_path(state: &State) -> PathBuf {
    retired_path(state).with_extension("older")
}

/// The record goes first: whoever waits for one of its locks then finds none.
fn unlink(path: &Path) {
    for path in [path, &lock_path(path), &note_path(path), &claim_path(path)] {
        let _ = fs::remove_file(path);
    }
}

fn path(state: &State, migration_id: &str, side: Side) -> PathBuf {
    let side = match side {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    state.journal().join(format!("{migration_id}.{side}.json"))
}

fn lock_path(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

fn note_path(path: &Path) -> PathBuf {
    path.with_extension("let-go")
}

fn claim_path(path: &Path) -> PathBuf {
    path.with_extension("claim")
}

fn lock(path: &Path) -> Result<Flock<File>, Error> {
    let path = lock_path(path);
    let file = File::create(&path).map_err(Error::file("create", &path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::file("lock", &path)(errno.into()))
}

fn load(path: &Path) -> Result<Option<Record>, Error> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("read", path)(error)),
    };
    let record: Record =
        serde_json::from_slice(&text).map_err(|error| Error::file("parse", path)(error.into()))?;
    if record.version == RECORD_VERSION {
        Ok(Some(record))
    } else {
        Err(Error::file("use the other version's record", path)(
            ErrorKind::Unsupported.into(),
        ))
    }
}

fn store(path: &Path, record: &Record) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(record)
        .map_err(|error| Error::file("encode", path)(error.into()))?;
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).map_err(Error::file("write", &fresh))?;
    fs::rename(&fresh, path).map_err(Error::file("replace", path))
}

#[cfg(test)]
mod tests {
    use migrate_core::journal::Claims;

    use super::*;

    fn record(side: Side) -> Record {
        Record {
            version: RECORD_VERSION,
            migration_id: "m-1".to_owned(),
            side,
            stage: Stage::Preparing,
            owner_pid: 1,
            owner_start_ticks: 1,
            root_pid: 7,
            pids: vec![7],
            name: "redis".to_owned(),
            peer: "host2".to_owned(),
            addresses: Vec::new(),
            images: None,
            fence: None,
            hold_down: None,
            route: None,
            withdrawn: None,
            network_lock: migrate_core::wire::NetworkLock::Gate,
            home: None,
            claims: Claims::default(),
        }
    }

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        (directory, state)
    }

    #[test]
    fn a_verdict_binds() {
        let (_directory, state) = state();
        let mut journal = Journal::begin(&state, record(Side::Destination)).unwrap();
        assert_eq!(verdict(&state, "m-1").unwrap(), Stage::Undone);
        assert!(matches!(journal.stage(Stage::Owned), Err(Error::Disowned)));
        assert_eq!(verdict(&state, "m-1").unwrap(), Stage::Undone);
    }

    #[test]
    fn an_owner_stays_the_owner() {
        let (_directory, state) = state();
        let mut journal = Journal::begin(&state, record(Side::Destination)).unwrap();
        journal.stage(Stage::Owned).unwrap();
        assert_eq!(verdict(&state, "m-1").unwrap(), Stage::Owned);
        journal.stage(Stage::Done).unwrap();
        assert_eq!(verdict(&state, "m-1").unwrap(), Stage::Done);
    }

    #[test]
    fn an_unknown_migration_is_not_owned() {
        let (_directory, state) = state();
        assert_eq!(verdict(&state, "other").unwrap(), Stage::Undone);
        assert_eq!(fs::read_dir(state.journal()).unwrap().count(), 0);
    }

    #[test]
    fn what_has_ended_is_known_without_its_record() {
        let (_directory, state) = state();
        let mut journal = Journal::begin(&state, record(Side::Destination)).unwrap();
        journal.stage(Stage::Owned).unwrap();
        journal.stage(Stage::Done).unwrap();
        retire(&state, journal.record()).unwrap();
        assert_eq!(all(&state).unwrap(), []);
        assert_eq!(verdict(&state, "m-1").unwrap(), Stage::Done);
        assert_eq!(verdict(&state, "m").unwrap(), Stage::Undone);
        // The full file is kept beside the new one.
        let full = format!("{}\n", "x".repeat(63)).repeat(1 << 14);
        let mut names = File::options()
            .append(true)
            .open(retired_path(&state))
            .unwrap();
        names.write_all(full.as_bytes()).unwrap();
        let other = Record {
            migration_id: "m-2".to_owned(),
            ..journal.record().clone()
        };
        retire(&state, &other).unwrap();
        assert_eq!(fs::read_to_string(retired_path(&state)).unwrap(), "m-2\n");
        for name in ["m-1", "m-2"] {
            assert_eq!(verdict(&state, name).unwrap(), Stage::Done, "{name}");
        }
    }

    #[test]
    fn names_stay_in_the_directory() {
        assert!(is_name("0a1b2c3d4e5f") && is_name("m-1"));
        for name in ["", ".", "..", "../x", "a/b", "a.b", "a\0", &"a".repeat(65)] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn the_longest_unchanged_comes_first() {
        let (_directory, state) = state();
        for (id, changed_s) in [("b", 1), ("c", 3), ("a", 2)] {
            let journal = Journal::begin(
                &state,
                Record {
                    migration_id: id.to_owned(),
                    ..record(Side::Source)
                },
            )
            .unwrap();
            let changed = std::time::UNIX_EPOCH + std::time::Duration::from_secs(changed_s);
            let file = File::options().write(true).open(&journal.path).unwrap();
            file.set_modified(changed).unwrap();
        }
        let ids: Vec<String> = all(&state)
            .unwrap()
            .into_iter()
            .map(|record| record.migration_id)
            .collect();
        assert_eq!(ids, ["b", "a", "c"]);
    }

    #[test]
    fn records_are_listed_and_discarded() {
        let (_directory, state) = state();
        let source = Journal::begin(&state, record(Side::Source)).unwrap();
        Journal::begin(&state, record(Side::Destination)).unwrap();
        assert_eq!(all(&state).unwrap().len(), 2);
        source.discard();
        assert_eq!(all(&state).unwrap(), [record(Side::Destination)]);
    }
}
