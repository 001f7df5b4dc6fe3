//! Reports of migrations as files, one of each.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use migrate_core::report::{REPORT_VERSION, Report};

use crate::error::Error;
use crate::state::State;

/// Reports that a host keeps; of an operator's day, and some MiB at most.
pub const KEPT_MAX: usize = 100;

/// The largest file that is read. A hundred connections and a thousand rounds are
/// half a MiB.
const BYTES_MAX: u64 = 8 << 20;

/// Ends the name of a report.
const SUFFIX: &str = "json";

/// The highest moment in a name, in milliseconds since 1970: what its 15 digits hold.
const NAMED_MS_MAX: u64 = 999_999_999_999_999;

/// Keeps a report on this host; the oldest make room for it.
///
/// # Errors
///
/// It cannot be written.
pub fn keep(state: &State, report: &Report) -> Result<PathBuf, Error> {
    let directory = state.reports();
    let mut others = all(&directory)?;
    // Sorted by name, the newest is last, also where the clock was put back meanwhile.
    let last_ms = others.last().and_then(|path| named(path)?.0.parse().ok());
    let after_ms = last_ms.map_or(0, |last_ms: u64| last_ms.saturating_add(1));
    let moment_ms = report.began_unix_ms.max(after_ms).min(NAMED_MS_MAX);
    let path = directory.join(format!("{moment_ms:015}-{}.{SUFFIX}", report.migration_id));
    write(&path, report)?;
    others.retain(|other| *other != path);
    for old in &others[..(others.len() + 1).saturating_sub(KEPT_MAX)] {
        // Another migration may have done so.
        let _ = fs::remove_file(old);
    }
    Ok(path)
}

/// The moment in the name of a kept report, and the migration's id.
fn named(path: &Path) -> Option<(&str, &str)> {
    path.file_stem()?.to_str()?.split_once('-')
}

/// Writes a report for root to read; the file is there whole or not at all.
///
/// # Errors
///
/// It cannot be written, or would take the place of what is no regular file.
pub fn write(path: &Path, report: &Report) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(report).map_err(io::Error::from);
    text.and_then(|text| placed(path, &format!("{text}\n")))
        .map_err(Error::file("write", path))
}

/// Writes a file for root to read, which tells what a report does; it is there whole
/// or not at all.
///
/// # Errors
///
/// See [`write`].
pub fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    placed(path, text).map_err(Error::file("write", path))
}

fn placed(path: &Path, text: &str) -> io::Result<()> {
    replaceable(path)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Of a name that nobody can have taken before, and of mode 0600.
    let mut fresh = tempfile::Builder::new()
        .prefix(".migrate-")
        .tempfile_in(directory)?;
    fresh.write_all(text.as_bytes())?;
    fresh.persist(path)?;
    Ok(())
}

/// Whether a file may be put at `path`: the new one takes the place of what is there,
/// which would be the end of a device, and a link would not be followed.
///
/// # Errors
///
/// Something is there that is no regular file, or it cannot be looked at.
pub fn replaceable(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(there) if !there.is_file() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "this is no regular file, and would be replaced: name a new file or a regular one",
        )),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads a report.
///
/// # Errors
///
/// The file cannot be read, is no report, or is one of another version.
pub fn read(path: &Path) -> Result<Report, Error> {
    parsed(path).map_err(Error::file("read", path))
}

fn parsed(path: &Path) -> io::Result<Report> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let mut text = Vec::new();
    let file = fs::File::open(path)?;
    file.take(BYTES_MAX + 1).read_to_end(&mut text)?;
    let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    if text.len() as u64 > BYTES_MAX {
        return Err(wrong(format!("it is larger than {BYTES_MAX} bytes")));
    }
    let no_report = |error| wrong(format!("it is no report of a migration: {error}"));
    let Version { version } = serde_json::from_slice(&text).map_err(no_report)?;
    if version != REPORT_VERSION {
        return Err(wrong(format!(
            "it has version {version}, and this release knows {REPORT_VERSION}: use the one that wrote it"
        )));
    }
    serde_json::from_slice(&text).map_err(no_report)
}

/// The report that this host has kept last, or that of a migration by its id.
///
/// # Errors
///
/// There is none, or the directory cannot be read.
pub fn kept(state: &State, migration_id: Option<&str>) -> Result<PathBuf, Error> {
    let directory = state.reports();
    let found = all(&directory)?
        .into_iter()
        .rfind(|path| migration_id.is_none_or(|id| named(path).is_some_and(|(_, of)| of == id)));
    found.ok_or_else(|| {
        let none = match migration_id {
            None => "no migration has begun here since the host has started".to_owned(),
            Some(id) => format!("none of them is of migration {id}"),
        };
        Error::file("find a report in", &directory)(io::Error::new(io::ErrorKind::NotFound, none))
    })
}

/// Reports in a directory, the oldest first.
fn all(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == SUFFIX))
        .collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn report(began_unix_ms: u64, id: &str) -> Report {
        Report {
            version: REPORT_VERSION,
            began_unix_ms,
            migration_id: id.to_owned(),
            ..Report::default()
        }
    }

    #[test]
    fn the_newest_are_kept_and_found() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let none = kept(&state, None).unwrap_err().chain();
        assert!(none.contains("no migration has begun"), "{none}");
        for n in 1..=KEPT_MAX as u64 + 3 {
            keep(&state, &report(n * 1000, &format!("id-{n}"))).unwrap();
        }
        assert_eq!(all(&state.reports()).unwrap().len(), KEPT_MAX);
        let last = read(&kept(&state, None).unwrap()).unwrap();
        assert_eq!(last.migration_id, format!("id-{}", KEPT_MAX + 3));
        assert!(kept(&state, Some("id-3")).is_err());
        let fourth = read(&kept(&state, Some("id-4")).unwrap()).unwrap();
        assert_eq!(fourth, report(4000, "id-4"));
    }

    #[test]
    fn a_clock_that_was_put_back_makes_no_report_old() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        for n in 1..=KEPT_MAX as u64 {
            keep(&state, &report(n + 1_000_000, &format!("id-{n}"))).unwrap();
        }
        for id in ["earlier", "later"] {
            let path = keep(&state, &report(5, id)).unwrap();
            assert_eq!(kept(&state, None).unwrap(), path);
            assert_eq!(read(&path).unwrap(), report(5, id));
        }
        assert_eq!(all(&state.reports()).unwrap().len(), KEPT_MAX);
        // A clock from the far future leaves the name at its width.
        for id in ["far", "farther"] {
            let path = keep(&state, &report(u64::MAX, id)).unwrap();
            assert!(path.exists());
            assert_eq!(named(&path).unwrap().0.len(), 15);
        }
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("old"), "old").unwrap();
        std::os::unix::fs::symlink(at("old"), at("link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("dangling")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for name in ["link", "dangling", "socket", "."] {
            let told = write_text(&at(name), "new").unwrap_err().chain();
            assert!(told.contains("no regular file"), "{name}: {told}");
        }
        assert_eq!(fs::read(at("old")).unwrap(), b"old");
        for name in ["old", "fresh"] {
            write_text(&at(name), "new").unwrap();
            assert_eq!(fs::read(at(name)).unwrap(), b"new");
            let mode = fs::metadata(at(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        // Nothing else is left.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5);
    }

    #[test]
    fn what_is_no_report_is_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        for (text, words) in [
            ("", "no report of a migration"),
            ("{\"version\": 1}", "missing field"),
            (
                "{\"version\": 2}",
                "it has version 2, and this release knows 1",
            ),
        ] {
            fs::write(&path, text).unwrap();
            let told = read(&path).unwrap_err().chain();
            assert!(told.contains(words), "{told}");
        }
    }
}
