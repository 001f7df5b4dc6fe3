//! Each host gets a cgroup of its own, which is the root of what the host sees.
//!
//! So a tree that is restored into a cgroup of its own leaves nothing behind on the machine: the
//! lab's cgroups go with the lab. Machines without a writable cgroup2 tree do without.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Attempt, Error, Result};
use crate::layout::Member;

/// The cgroup above all labs.
const PARENT: &str = "migrate-hosts";
/// A killed process leaves its cgroup within moments; this is for a machine under load.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);
/// How deep the cgroups of a host may be nested; deeper ones are left and reported.
const DEPTH_MAX: usize = 32;

/// Where the machine has its cgroup2 tree.
pub(crate) fn cgroup2_mount() -> Option<PathBuf> {
    mount_point_of("cgroup2", &fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The last mount of this kind.
pub(crate) fn mount_point_of(kind: &str, mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().rev().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == kind).then_some(())?;
        before.split(' ').nth(4).map(PathBuf::from)
    })
}

/// The cgroup of a member of a lab. `None` without a cgroup2 tree.
pub(crate) fn path(lab: &str, member: Member) -> Option<PathBuf> {
    Some(
        cgroup2_mount()?
            .join(PARENT)
            .join(lab)
            .join(member.as_str()),
    )
}

/// Makes the cgroup of a member. `None` if the machine has no cgroup2 tree that can be written.
pub(crate) fn create(lab: &str, member: Member) -> Option<PathBuf> {
    let path = path(lab, member)?;
    fs::create_dir_all(&path).ok()?;
    Some(path)
}

/// The file that takes a process into the cgroup, ready to be written after a fork.
pub(crate) fn procs_file(cgroup: &Path) -> Option<CString> {
    CString::new(cgroup.join("cgroup.procs").as_os_str().as_bytes()).ok()
}

/// Moves the calling process into a cgroup. Async-signal-safe.
pub(crate) fn join(procs_file: &CString) -> io::Result<()> {
    // SAFETY: the path is a valid C string; open and write touch no memory of ours but the one
    // byte, and the descriptor is closed before returning.
    unsafe {
        let fd = libc::open(procs_file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let written = libc::write(fd, b"0".as_ptr().cast(), 1);
        let error = io::Error::last_os_error();
        libc::close(fd);
        if written == 1 { Ok(()) } else { Err(error) }
    }
}

/// Removes all cgroups of a lab, whose processes must be gone.
pub(crate) fn remove(lab: &str) -> Result<()> {
    let Some(parent) = cgroup2_mount().map(|mount| mount.join(PARENT)) else {
        return Ok(());
    };
    let path = parent.join(lab);
    let deadline = Instant::now() + EMPTY_WITHIN;
    while path.exists() {
        match remove_tree(&path, DEPTH_MAX) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The last process of a cgroup leaves it a moment after it has died.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() > deadline {
                    let what = format!("{} empty", path.display());
                    return Err(Error::Deadline {
                        what,
                        limit: EMPTY_WITHIN,
                    });
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error).attempt(|| format!("remove {}", path.display())),
        }
    }
    // Other labs may be in there.
    let _ = fs::remove_dir(&parent);
    Ok(())
}

fn remove_tree(path: &Path, depth_left: usize) -> io::Result<()> {
    if depth_left == 0 {
        return Err(io::Error::other("cgroups nested too deeply"));
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path(), depth_left - 1)?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_cgroup2_tree_of_a_hybrid_machine() {
        let mountinfo = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";
        assert_eq!(
            mount_point_of("cgroup2", mountinfo).as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        assert_eq!(mount_point_of("bpf", mountinfo), None);
    }
}
