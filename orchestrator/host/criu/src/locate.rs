//! Finding CRIU and warming it.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use migrate_core::facts::CriuVersion;
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::CriuError;

/// Names the program to use; nothing else is looked at then.
pub const OVERRIDE: &str = "MIGRATE_CRIU";

/// Where `scripts/setup` puts a CRIU of its own.
pub const PRIVATE_PATH: &str = "/opt/migrate/criu/bin/criu";

/// Limit for `criu --version`: it takes a few milliseconds.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// Limit for `criu check`: 40-60 ms without its cache; it runs `iptables`
/// twice, which may wait for a lock.
const CHECK_LIMIT: Duration = Duration::from_secs(30);

/// Lines of output that an error carries.
const OUTPUT_LINES_MAX: usize = 10;

/// A CRIU that is new enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criu {
    /// The program.
    pub path: PathBuf,
    /// What `--version` says.
    pub version: CriuVersion,
}

/// Finds CRIU: `MIGRATE_CRIU`, else `criu` in `PATH`, else [`PRIVATE_PATH`];
/// the first that is at least [`CriuVersion::OLDEST_SUPPORTED`].
///
/// # Errors
///
/// `MIGRATE_CRIU` is set and cannot be used, or nothing usable was found.
pub async fn locate() -> Result<Criu, CriuError> {
    if let Some(path) = env::var_os(OVERRIDE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return probe(&path)
            .await
            .map_err(|problem| CriuError::Override { path, problem });
    }
    first_usable(candidates(env::var_os("PATH").as_deref())).await
}

/// Every `criu` in `search`, then the private one.
fn candidates(search: Option<&OsStr>) -> Vec<PathBuf> {
    let mut candidates: Vec<PathBuf> = search
        .map(|search| env::split_paths(search).collect())
        .unwrap_or_default();
    // Missing from the PATH of an unprivileged login, yet Debian's place for it.
    candidates.push(PathBuf::from("/usr/sbin"));
    let mut candidates: Vec<PathBuf> = candidates
        .into_iter()
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join("criu"))
        .filter(|path| is_program(path))
        .collect();
    candidates.push(PathBuf::from(PRIVATE_PATH));
    let mut seen = Vec::new();
    candidates.retain(|path| {
        let new = !seen.contains(path);
        seen.push(path.clone());
        new
    });
    candidates
}

async fn first_usable(candidates: Vec<PathBuf>) -> Result<Criu, CriuError> {
    let mut found = Vec::new();
    for path in candidates {
        match probe(&path).await {
            Ok(criu) => return Ok(criu),
            Err(problem) => found.push(format!("{} {problem}", path.display())),
        }
    }
    Err(CriuError::NotFound { found })
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Asks a program for its version. The error completes the sentence
/// "PATH ...".
async fn probe(path: &Path) -> Result<Criu, String> {
    let output = run(path, &["--version"], VERSION_LIMIT)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "does not exist".to_owned(),
            io::ErrorKind::TimedOut => "does not answer".to_owned(),
            _ => format!("does not run: {error}"),
        })?;
    let Some(version) = output.lines.iter().find_map(|line| parse_version(line)) else {
        return Err(match output.lines.last() {
            Some(line) => format!("does not name its version: {line}"),
            None => format!("does not name its version ({})", output.status),
        });
    };
    if version < CriuVersion::OLDEST_SUPPORTED {
        return Err(format!(
            "is {version}, {} or newer is needed",
            CriuVersion::OLDEST_SUPPORTED
        ));
    }
    Ok(Criu {
        path: path.to_owned(),
        version,
    })
}

/// Reads `Version: 4.2.1`; anything after the numbers is ignored.
fn parse_version(line: &str) -> Option<CriuVersion> {
    let text = line.trim().strip_prefix("Version:")?.trim();
    let numbers = text
        .split(|c: char| c != '.' && !c.is_ascii_digit())
        .next()?;
    let mut parts = numbers.split('.');
    Some(CriuVersion {
        major: parts.next()?.parse().ok()?,
        minor: parts.next()?.parse().ok()?,
        sublevel: match parts.next() {
            Some(part) => part.parse().ok()?,
            None => 0,
        },
    })
}

pub(crate) struct Output {
    pub(crate) status: std::process::ExitStatus,
    pub(crate) lines: Vec<String>,
}

/// Runs CRIU for its text. Its own configuration files are ignored, as they
/// are for the worker.
pub(crate) async fn run(path: &Path, arguments: &[&str], limit: Duration) -> io::Result<Output> {
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env_remove("CRIU_CONFIG_FILE")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(limit, command.output())
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let lines = [output.stdout, output.stderr]
        .iter()
        .flat_map(|bytes| {
            String::from_utf8_lossy(bytes)
                .lines()
                .filter(|line| !line.trim().is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    Ok(Output {
        status: output.status,
        lines,
    })
}

impl Criu {
    /// Runs `criu check`, so that CRIU's probes of the kernel (30-60 ms) are
    /// done and cached before anything is frozen. CRIU keeps the cache only
    /// where `/run` is a tmpfs.
    ///
    /// # Errors
    ///
    /// CRIU does not run or finds that the kernel lacks what it needs.
    pub async fn warm(&self) -> Result<(), CriuError> {
        let failed = |output| CriuError::Check {
            path: self.path.clone(),
            output,
        };
        let output = run(&self.path, &["check", "--no-default-config"], CHECK_LIMIT)
            .await
            .map_err(|error| failed(vec![error.to_string()]))?;
        if output.status.success() {
            return Ok(());
        }
        let from = output.lines.len().saturating_sub(OUTPUT_LINES_MAX);
        Err(failed(output.lines[from..].to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn version(major: u32, minor: u32, sublevel: u32) -> CriuVersion {
        CriuVersion {
            major,
            minor,
            sublevel,
        }
    }

    #[test]
    fn versions_as_criu_prints_them() {
        for (line, expected) in [
            ("Version: 4.2.1", Some(version(4, 2, 1))),
            ("Version: 4.2", Some(version(4, 2, 0))),
            ("Version: 3.17.1", Some(version(3, 17, 1))),
            (
                "Version: 4.2-rc1 (gitid v4.2-3-g12)",
                Some(version(4, 2, 0)),
            ),
            ("GitID: v4.2", None),
            ("Version: unknown", None),
            ("Version: 99999999999.1", None),
        ] {
            assert_eq!(parse_version(line), expected, "{line}");
        }
    }

    /// A program that answers `--version` with `text`.
    fn program(directory: &Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn what_is_too_old_is_skipped_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let old = program(directory.path(), "old", "Version: 3.17.1");
        let new = program(directory.path(), "new", "Version: 4.3");
        let missing = directory.path().join("missing");
        let found = first_usable(vec![missing.clone(), old.clone(), new.clone()])
            .await
            .unwrap();
        assert_eq!((found.path, found.version), (new, version(4, 3, 0)));

        let error = first_usable(vec![missing, old]).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("missing does not exist"), "{text}");
        assert!(text.contains("old is 3.17.1, 4.2 or newer"), "{text}");
        assert!(error.help().unwrap().contains("scripts/setup"));
    }

    #[test]
    fn the_path_is_searched_before_the_private_place() {
        let directory = tempfile::tempdir().unwrap();
        program(directory.path(), "criu", "");
        let found = candidates(Some(directory.path().as_os_str()));
        assert_eq!(found.first().unwrap(), &directory.path().join("criu"));
        assert_eq!(found.last().unwrap(), Path::new(PRIVATE_PATH));
    }
}
