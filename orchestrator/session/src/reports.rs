//! Reports of migrations as files, one of each.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
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

/// Keeps a report on this host; the oldest make room for it.
///
/// # Errors
///
/// It cannot be written.
pub fn keep(state: &State, report: &Report) -> Result<PathBuf, Error> {
    let directory = state.reports();
    // Sorted by name, the newest is last.
    let name = format!(
        "{:015}-{}.{SUFFIX}",
        report.began_unix_ms, report.migration_id
    );
    let path = directory.join(name);
    write(&path, report)?;
    let kept = all(&directory)?;
    for old in &kept[..kept.len().saturating_sub(KEPT_MAX)] {
        // Another migration may have done so.
        let _ = fs::remove_file(old);
    }
    Ok(path)
}

/// Writes a report for root to read; the file is there whole or not at all.
///
/// # Errors
///
/// It cannot be written.
pub fn write(path: &Path, report: &Report) -> Result<(), Error> {
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let written = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&fresh)
        .and_then(|mut file| {
            serde_json::to_writer_pretty(&mut file, report)?;
            writeln!(file)
        })
        .and_then(|()| fs::rename(&fresh, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&fresh);
        Error::file("write", path)(error)
    })
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
    let found = all(&directory)?.into_iter().rfind(|path| {
        let name = path.file_stem().and_then(|name| name.to_str());
        migration_id.is_none_or(|id| {
            name.and_then(|name| name.split_once('-'))
                .is_some_and(|(_, of)| of == id)
        })
    });
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
