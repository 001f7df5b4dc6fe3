//! Trees that a maintenance parks without being told their PIDs: a file in the
//! directory that they will be parked in, `NAME.tree`, for each of them.
//!
//! It names a process and not a program, so it is of one life: a resume, which
//! gives the process another, writes it anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use migrate_core::parked::Manifest;
use serde::{Deserialize, Serialize};

use super::place::{MARK_SUFFIX as SUFFIX, ParkError, Place, check_directory, replace, sync};
use crate::error::Error;

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tag {
    pid: i32,
    /// `starttime` of `/proc/PID/stat`, in clock ticks since boot.
    start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    boot_id: String,
}

impl Tag {
    fn of(pid: i32) -> Result<Self, Error> {
        let start_ticks = migrate_proc::start_ticks(pid);
        let gone = || migrate_proc::ProcError::NoSuchProcess { pid };
        Ok(Self {
            pid,
            start_ticks: start_ticks.ok_or_else(gone)?,
            boot_id: super::boot_id()?,
        })
    }

    /// Whether that very process runs, in a boot of this name.
    fn runs(&self, boot_id: &str) -> bool {
        self.boot_id == boot_id && migrate_proc::start_ticks(self.pid) == Some(self.start_ticks)
    }
}

/// A tree that was marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// Where it will be parked.
    pub place: Place,
    /// Its root.
    pub pid: i32,
    /// Whether that very process still runs.
    pub runs: bool,
}

impl Marked {
    /// Its PID: a tree that was marked and has ended is not passed over.
    ///
    /// # Errors
    ///
    /// That process does not run any more.
    pub fn running(&self) -> Result<i32, Error> {
        if self.runs {
            return Ok(self.pid);
        }
        Err(ParkError::MarkedGone {
            pid: self.pid,
            directory: self.place.directory().to_owned(),
            name: self.place.name().to_owned(),
        }
        .into())
    }
}

/// Marks a tree, or marks another one under the same name.
///
/// # Errors
///
/// No such tree can be moved, it is marked under another name, or the directory
/// or the name cannot be used.
pub fn mark(place: &Place, pid: i32) -> Result<(), Error> {
    place.check_name()?;
    migrate_proc::validate_target(pid)?;
    let tag = Tag::of(pid)?;
    let others = marked(place.directory())?;
    if let Some(other) = others
        .into_iter()
        .find(|other| other.runs && other.pid == pid && other.place != *place)
    {
        return Err(ParkError::MarkedAs {
            pid,
            directory: place.directory().to_owned(),
            name: other.place.name().to_owned(),
        }
        .into());
    }
    replace(&path(place), &tag)
}

/// Takes a mark away. The tree runs on.
///
/// # Errors
///
/// There is none, the directory cannot be used, or the mark cannot be removed.
pub fn unmark(place: &Place) -> Result<(), Error> {
    check_directory(place.directory())?;
    let path = path(place);
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_marked(place)),
        Err(error) => Err(Error::file("remove", path)(error)),
        Ok(()) => sync(place.directory()),
    }
}

/// Whether the process that is marked under this name is still this one: between
/// the look at all marks and the parking of the last tree minutes may pass.
///
/// # Errors
///
/// It is marked no more, or has ended.
pub fn still_marked(place: &Place, pid: i32) -> Result<(), Error> {
    check_directory(place.directory())?;
    let tag = read(place)?;
    let runs = tag.pid == pid && tag.runs(&super::boot_id()?);
    let place = place.clone();
    Marked { place, pid, runs }.running().map(|_| ())
}

/// All marked trees of a directory, by name.
///
/// # Errors
///
/// The directory cannot be used, or a mark cannot be read.
pub fn marked(directory: &Path) -> Result<Vec<Marked>, Error> {
    let boot_id = super::boot_id()?;
    let read = |place: Place| {
        let tag = read(&place)?;
        Ok(Marked {
            runs: tag.runs(&boot_id),
            pid: tag.pid,
            place,
        })
    };
    places(directory)?.into_iter().map(read).collect()
}

/// A tree has come back from a directory and is marked there on, under whatever
/// name it was parked.
///
/// # Errors
///
/// Its mark cannot be read or written.
pub fn follow(directory: &Path, manifest: &Manifest) -> Result<(), Error> {
    let pid = manifest.tree.root_pid;
    let Some(root) = manifest.tree.processes.iter().find(|p| p.pid == pid) else {
        return Ok(());
    };
    let before = Tag {
        pid,
        start_ticks: root.start_ticks,
        boot_id: manifest.boot_id.clone(),
    };
    renew(directory, &before, &Tag::of(pid)?)
}

/// Writes one tag over another, wherever it stands in a directory.
fn renew(directory: &Path, before: &Tag, after: &Tag) -> Result<(), Error> {
    let mut unread = Ok(());
    for place in places(directory)? {
        match read(&place) {
            Ok(tag) if tag == *before => return replace(&path(&place), after),
            Ok(_) => {}
            // Whose it is cannot be told.
            Err(error) => unread = Err(error),
        }
    }
    unread
}

/// What is marked in a directory, by name.
fn places(directory: &Path) -> Result<Vec<Place>, Error> {
    check_directory(directory)?;
    let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut places = Vec::new();
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        let name = entry.file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        places.extend(name.and_then(|name| Place::new(directory, name).ok()));
    }
    places.sort_by(|a, b| a.name().cmp(b.name()));
    Ok(places)
}

fn read(place: &Place) -> Result<Tag, Error> {
    let path = path(place);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_marked(place)),
        text => text.map_err(Error::file("read", &path))?,
    };
    serde_json::from_slice(&text).map_err(|source| ParkError::BadMark { path, source }.into())
}

fn path(place: &Place) -> PathBuf {
    place.directory().join(format!("{}{SUFFIX}", place.name()))
}

fn not_marked(place: &Place) -> Error {
    ParkError::NotMarked {
        directory: place.directory().to_owned(),
        name: place.name().to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    /// A directory that can be used; none without root, to whom it must belong.
    fn directory() -> Option<tempfile::TempDir> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: not root");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        Some(directory)
    }

    fn place(directory: &Path, name: &str) -> Place {
        Place::new(directory, name).unwrap()
    }

    fn texts(directory: &Path) -> Vec<(String, bool)> {
        let told = |tree: Marked| (tree.place.name().to_owned(), tree.runs);
        marked(directory).unwrap().into_iter().map(told).collect()
    }

    #[test]
    fn a_mark_follows_its_tree_under_any_name() {
        let Some(directory) = directory() else { return };
        let directory = directory.path();
        let after = Tag::of(own()).unwrap();
        let before = Tag {
            boot_id: "before".to_owned(),
            ..after.clone()
        };
        let other = Tag {
            start_ticks: before.start_ticks + 1,
            ..before.clone()
        };
        for (name, tag) in [("a-other", &other), ("front", &before)] {
            replace(&path(&place(directory, name)), tag).unwrap();
        }
        let old = [("a-other".to_owned(), false), ("front".to_owned(), false)];
        assert_eq!(texts(directory), old);
        // One that cannot be read does not keep the right one from being found.
        let torn = directory.join("b-torn.tree");
        fs::write(&torn, "{").unwrap();
        renew(directory, &before, &after).unwrap();
        assert!(renew(directory, &before, &after).is_err());
        fs::remove_file(torn).unwrap();
        let new = [("a-other".to_owned(), false), ("front".to_owned(), true)];
        assert_eq!(texts(directory), new);
        renew(directory, &before, &after).unwrap();
        assert_eq!(texts(directory), new);
    }

    #[test]
    fn a_mark_is_looked_at_again_before_the_parking() {
        let Some(directory) = directory() else { return };
        let front = place(directory.path(), "front");
        let error = still_marked(&front, own()).unwrap_err();
        assert!(matches!(error, Error::Park(ParkError::NotMarked { .. })));
        let tag = Tag::of(own()).unwrap();
        replace(&path(&front), &tag).unwrap();
        still_marked(&front, own()).unwrap();
        let reused = Tag {
            start_ticks: tag.start_ticks + 1,
            ..tag.clone()
        };
        for (tag, pid) in [(&reused, own()), (&tag, own() + 1)] {
            replace(&path(&front), tag).unwrap();
            let error = still_marked(&front, pid).unwrap_err();
            assert!(
                matches!(error, Error::Park(ParkError::MarkedGone { pid: gone, .. }) if gone == pid)
            );
        }
        unmark(&front).unwrap();
        assert!(unmark(&front).is_err());
    }

    #[test]
    fn a_mark_is_not_taken_from_a_directory_that_others_can_change() {
        let Some(directory) = directory() else { return };
        let front = place(directory.path(), "front");
        replace(&path(&front), &Tag::of(own()).unwrap()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = unmark(&front).unwrap_err();
        assert!(matches!(error, Error::Park(ParkError::NotPrivate { .. })));
        assert!(path(&front).exists());
    }
}
