//! Trees that a maintenance parks without being told their PIDs: a file in the
//! directory that they will be parked in, `NAME.tree`, for each of them.
//!
//! It names a process and not a program, so it is of one life: a resume, which
//! gives the process another, writes it anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::place::{ParkError, Place, check_directory, replace};
use crate::error::Error;

/// Ends the name of the file.
const SUFFIX: &str = ".tree";

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

/// Marks a tree, or marks another one under the same name.
///
/// # Errors
///
/// No such tree can be moved, it is marked under another name, or the directory
/// cannot be used.
pub fn mark(place: &Place, pid: i32) -> Result<(), Error> {
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
/// There is none, or it cannot be removed.
pub fn unmark(place: &Place) -> Result<(), Error> {
    let path = path(place);
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = place.directory().to_owned();
            let name = place.name().to_owned();
            Err(ParkError::NotMarked { directory, name }.into())
        }
        removed => removed.map_err(Error::file("remove", path)),
    }
}

/// All marked trees of a directory, by name.
///
/// # Errors
///
/// The directory cannot be used, or a mark cannot be read.
pub fn marked(directory: &Path) -> Result<Vec<Marked>, Error> {
    check_directory(directory)?;
    let boot_id = super::boot_id()?;
    let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut found = Vec::new();
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        let name = entry.file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        let Some(place) = name.and_then(|name| Place::new(directory, name).ok()) else {
            continue;
        };
        let tag = read(&place)?;
        let started = migrate_proc::start_ticks(tag.pid);
        found.push(Marked {
            place,
            pid: tag.pid,
            runs: tag.boot_id == boot_id && started == Some(tag.start_ticks),
        });
    }
    found.sort_by(|a, b| a.place.name().cmp(b.place.name()));
    Ok(found)
}

/// A marked tree has come back and is marked on.
///
/// # Errors
///
/// Its mark cannot be read or written.
pub fn follow(place: &Place, pid: i32) -> Result<(), Error> {
    if path(place).exists() && read(place)?.pid == pid {
        replace(&path(place), &Tag::of(pid)?)?;
    }
    Ok(())
}

fn read(place: &Place) -> Result<Tag, Error> {
    let path = path(place);
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    serde_json::from_slice(&text).map_err(|source| ParkError::BadMark { path, source }.into())
}

fn path(place: &Place) -> PathBuf {
    place.directory().join(format!("{}{SUFFIX}", place.name()))
}
