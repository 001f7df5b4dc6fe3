//! Reading /proc: a process that ends meanwhile is an answer, not an error.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::ProcError;
use crate::parse;

/// Reads a text of /proc, whatever bytes a `comm` or a path may hold.
pub(crate) fn text(path: impl AsRef<Path>) -> Result<String, ProcError> {
    let path = path.as_ref();
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(source) => Err(ProcError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// As [`text`], with `None` for what has gone.
pub(crate) fn text_if_there(path: impl AsRef<Path>) -> Result<Option<String>, ProcError> {
    if_there(text(path))
}

/// Turns "it has gone" into `None`.
pub(crate) fn if_there<T>(result: Result<T, ProcError>) -> Result<Option<T>, ProcError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ProcError::Read { source, .. }) if is_gone(&source) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The process, thread or descriptor ended between two looks.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The outcome of removing what may have gone by itself.
pub(crate) fn removed(outcome: io::Result<()>, path: &Path) -> Result<(), ProcError> {
    match outcome {
        Err(error) if !is_gone(&error) => Err(ProcError::Write {
            attempt: "remove",
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// The target of a link, as text.
pub(crate) fn link(path: impl AsRef<Path>) -> Result<String, ProcError> {
    let path = path.as_ref();
    match std::fs::read_link(path) {
        Ok(target) => Ok(target.to_string_lossy().into_owned()),
        Err(source) => Err(ProcError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// `/proc/PID/NAME`.
pub(crate) fn of(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// `/proc/PID/stat`, or `None` when there is no such process or thread.
pub(crate) fn stat(pid: i32) -> Result<Option<parse::Stat>, ProcError> {
    let path = of(pid, "stat");
    let Some(text) = text_if_there(&path)? else {
        return Ok(None);
    };
    match parse::stat(&text) {
        Some(stat) => Ok(Some(stat)),
        None => Err(malformed(path, &text)),
    }
}

/// The numbers a directory of /proc lists: processes, threads, descriptors.
/// Empty when the directory has gone.
pub(crate) fn numbers(directory: impl AsRef<Path>) -> Result<Vec<i32>, ProcError> {
    let directory = directory.as_ref();
    let unreadable = |source| ProcError::Read {
        path: directory.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => numbers.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<i32>().ok()),
            ),
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(unreadable(error)),
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// A parse failure, with the text cut to what fits a line.
pub(crate) fn malformed(path: impl Into<PathBuf>, text: &str) -> ProcError {
    ProcError::Malformed {
        path: path.into(),
        line: text.chars().take(80).collect(),
    }
}

/// `comm`, or `?` for a process that has gone.
pub(crate) fn name(pid: i32) -> String {
    match text(of(pid, "comm")) {
        Ok(name) => name.trim_end_matches('\n').to_owned(),
        Err(_) => "?".to_owned(),
    }
}

/// The command line, one string an argument; empty for a zombie.
pub(crate) fn arguments(pid: i32) -> Vec<String> {
    let Ok(text) = text(of(pid, "cmdline")) else {
        return Vec::new();
    };
    let text = text.strip_suffix('\0').unwrap_or(&text);
    if text.is_empty() {
        return Vec::new();
    }
    text.split('\0').map(str::to_owned).collect()
}

/// Our own PID as the kernel's type.
pub(crate) fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}
