//! The cgroup v2 hierarchy, wherever it is mounted.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::ProcError;
use crate::{parse, read};

/// Prefix of the cgroup a fence makes below the tree's own.
pub(crate) const FENCE_PREFIX: &str = "migrate-fence-";
/// Parent of the cgroups a moved tree gets where its old one does not exist.
pub(crate) const HOME_PARENT: &str = "/migrate";

/// Where a cgroup hierarchy is mounted, and which part of it.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchy {
    point: PathBuf,
    root: String,
}

impl Hierarchy {
    /// The v2 hierarchy; `None` where there is none.
    pub(crate) fn v2() -> Option<Self> {
        Self::find(|mount| mount.fstype == "cgroup2")
    }

    /// The v1 hierarchy with these controllers, as /proc/PID/cgroup lists them.
    pub(crate) fn v1(controllers: &str) -> Option<Self> {
        Self::find(|mount| {
            mount.fstype == "cgroup"
                && controllers
                    .split(',')
                    .all(|wanted| mount.super_options.split(',').any(|has| has == wanted))
        })
    }

    fn find(wanted: impl Fn(&parse::Mount) -> bool) -> Option<Self> {
        let text = read::text("/proc/self/mountinfo").ok()?;
        let mount = text.lines().filter_map(parse::mount).rfind(wanted)?;
        Some(Self {
            point: PathBuf::from(mount.point),
            root: mount.root,
        })
    }

    /// The directory of a cgroup path as /proc/PID/cgroup names it; `None`
    /// when it is not below what is mounted here.
    pub(crate) fn directory(&self, path: &str) -> Option<PathBuf> {
        if path.split('/').any(|part| part == "..") {
            return None;
        }
        let below = match self.root.as_str() {
            "/" => path,
            root => path
                .strip_prefix(root)
                .filter(|rest| rest.is_empty() || rest.starts_with('/'))?,
        };
        let below = below.trim_matches('/');
        Some(if below.is_empty() {
            self.point.clone()
        } else {
            self.point.join(below)
        })
    }
}

/// A process's v2 path; `None` without a v2 hierarchy or when it has gone.
pub(crate) fn v2_path(pid: i32) -> Result<Option<String>, ProcError> {
    Ok(paths(pid)?
        .into_iter()
        .find_map(|(controllers, path)| controllers.is_empty().then_some(path)))
}

/// Every hierarchy a process is in: controllers and path.
pub(crate) fn paths(pid: i32) -> Result<Vec<(String, String)>, ProcError> {
    let text = read::text_if_there(read::of(pid, "cgroup"))?.unwrap_or_default();
    Ok(text
        .lines()
        .filter_map(parse::cgroup)
        .map(|(controllers, path)| (controllers.to_owned(), path.to_owned()))
        .collect())
}

/// The path a tree is to be known by: v2, else v1's freezer.
pub(crate) fn of_tree(root: i32) -> Result<Option<String>, ProcError> {
    let paths = paths(root)?;
    let has = |wanted: &str| {
        paths
            .iter()
            .find(|(controllers, _)| controllers == wanted)
            .map(|(_, path)| without_fence(path).to_owned())
    };
    Ok(has("").or_else(|| has("freezer")))
}

/// A path without the cgroup that a fence put below it.
pub(crate) fn without_fence(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", last)) if last.starts_with(FENCE_PREFIX) => "/",
        Some((parent, last)) if last.starts_with(FENCE_PREFIX) => parent,
        _ => path,
    }
}

/// Whether a path belongs to somebody's login, or to the daemon that let them
/// in, and so ends with it.
pub(crate) fn is_login(path: &str) -> bool {
    path.split('/').any(|part| {
        part.starts_with("user@")
            || (part.starts_with("session-") && part.ends_with(".scope"))
            || matches!(
                part,
                "user.slice" | "ssh.service" | "sshd.service" | "dropbear.service"
            )
    })
}

/// Whether a path belongs to a unit of this host's systemd.
pub(crate) fn is_units(path: &str) -> bool {
    crate::systemd::is_booted()
        && path.split('/').any(|part| {
            [".service", ".scope", ".slice"]
                .iter()
                .any(|kind| part.ends_with(kind))
        })
}

/// Makes a directory of a cgroup hierarchy; whether it was made here.
pub(crate) fn create(directory: &Path) -> Result<bool, ProcError> {
    match std::fs::create_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(ProcError::Write {
            attempt: "create",
            path: directory.to_owned(),
            source,
        }),
    }
}

/// Writes one of a cgroup's files.
pub(crate) fn write(directory: &Path, file: &str, value: &str) -> Result<(), ProcError> {
    let path = directory.join(file);
    match std::fs::write(&path, value) {
        Ok(()) => Ok(()),
        Err(source) => Err(ProcError::Write {
            attempt: "write",
            path,
            source,
        }),
    }
}

/// Moves a process; whether it was still there to be moved.
pub(crate) fn enter(directory: &Path, pid: i32) -> Result<bool, ProcError> {
    match write(directory, "cgroup.procs", &pid.to_string()) {
        Ok(()) => Ok(true),
        Err(ProcError::Write { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// A name fit for a directory: what is not a letter, digit, `-`, `_` or `.`
/// becomes `_`, and it is not longer than a file name may be.
pub(crate) fn file_name(text: &str) -> String {
    let name: String = text
        .chars()
        .take(100)
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') {
                c
            } else {
                '_'
            }
        })
        .collect();
    if name.trim_matches('.').is_empty() {
        "_".to_owned()
    } else {
        name
    }
}

/// Removes the cgroup that a moved tree was given, when it was one and nobody
/// is in it any more.
pub(crate) fn remove_empty_home(directory: &Path) {
    let Some(homes) = Hierarchy::v2().and_then(|v2| v2.directory(HOME_PARENT)) else {
        return;
    };
    if directory.parent() == Some(homes.as_path()) {
        // Somebody in it: not ours to remove.
        let _ = std::fs::remove_dir(directory);
        let _ = std::fs::remove_dir(homes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_is_no_part_of_the_path() {
        assert_eq!(without_fence("/a/migrate-fence-17"), "/a");
        assert_eq!(without_fence("/migrate-fence-17"), "/");
        assert_eq!(without_fence("/migrate/redis-7"), "/migrate/redis-7");
        assert_eq!(without_fence("/"), "/");
    }

    #[test]
    fn logins() {
        assert!(is_login("/user.slice/user-0.slice/session-3.scope"));
        assert!(is_login(
            "/user.slice/user-0.slice/user@0.service/app.slice/x.service"
        ));
        assert!(is_login("/system.slice/ssh.service"));
        assert!(!is_login("/system.slice/redis-server.service"));
        assert!(!is_login("/"));
    }

    #[test]
    fn directories_below_what_is_mounted() {
        let whole = Hierarchy {
            point: "/m".into(),
            root: "/".into(),
        };
        assert_eq!(whole.directory("/"), Some("/m".into()));
        assert_eq!(whole.directory("/a/b"), Some("/m/a/b".into()));
        assert_eq!(whole.directory("/../x"), None);
        let part = Hierarchy {
            point: "/m".into(),
            root: "/box".into(),
        };
        assert_eq!(part.directory("/box/a"), Some("/m/a".into()));
        assert_eq!(part.directory("/box"), Some("/m".into()));
        assert_eq!(part.directory("/boxer"), None);
    }
}
