//! The file system that keeps the gate alive without its owner.
//!
//! A gate is one directory, `DIRECTORY/ID-ROLE/`, with a pin per map and one
//! per attachment (`ingress-IFINDEX`, `egress-IFINDEX`). A bpf file system is
//! mounted on `DIRECTORY` where there is none, and taken away again with the
//! last gate, if it is one that this program mounted.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, fstatfs};

use crate::GateError;
use crate::sys;

/// What our mounts are called in /proc/self/mountinfo, so that they can be
/// told from those of others.
const MOUNT_SOURCE: &str = "migrate-gate";
/// Another process may take its mount away between two steps of ours.
const ATTEMPTS: usize = 8;

/// Opens the bpf file system at `directory`, mounting one if there is none.
/// The open file keeps it from being taken away.
pub(crate) fn open_or_mount(directory: &Path) -> Result<File, GateError> {
    let failed = |source| GateError::MountBpffs {
        path: directory.to_owned(),
        source,
    };
    for _ in 0..ATTEMPTS {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        match open(directory) {
            Ok(Some(root)) => return Ok(root),
            Ok(None) => mount(
                Some(MOUNT_SOURCE),
                directory,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                Some("mode=0700"),
            )
            .map_err(|errno| failed(errno.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(io::Error::from(io::ErrorKind::ResourceBusy)))
}

/// Opens `directory` if it is the root or a part of a bpf file system.
pub(crate) fn open(directory: &Path) -> io::Result<Option<File>> {
    let root = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(directory)?;
    let is_bpf = fstatfs(&root)?.filesystem_type() == BPF_FS_MAGIC;
    Ok(is_bpf.then_some(root))
}

/// Takes our own file system and its mount point away if it holds no gate.
/// Nobody is harmed where that fails: an empty directory stays.
pub(crate) fn release(directory: &Path) {
    let Ok(directory) = directory.canonicalize() else {
        return;
    };
    // The kernel puts files of its own there (`maps.debug`, `progs.debug`,
    // CONFIG_BPF_PRELOAD) and lets nobody else use a dot in a name.
    let is_empty = fs::read_dir(&directory).is_ok_and(|entries| {
        entries
            .flatten()
            .all(|entry| entry.file_name().as_encoded_bytes().contains(&b'.'))
    });
    if is_empty && is_our_mount(&directory) && umount2(&directory, MntFlags::empty()).is_ok() {
        let _ = fs::remove_dir(&directory);
    }
}

fn is_our_mount(directory: &Path) -> bool {
    // The calling thread's namespace, which need not be the first thread's.
    let Ok(mounts) = fs::read_to_string("/proc/thread-self/mountinfo") else {
        return false;
    };
    mounts
        .lines()
        .rev()
        .filter_map(mount_entry)
        .find(|(point, _)| *point == directory)
        .is_some_and(|(_, source)| source == MOUNT_SOURCE)
}

/// Mount point and source of one line of mountinfo (see proc(5)): the point is
/// the fifth field, the source the second behind the lone hyphen.
fn mount_entry(line: &str) -> Option<(PathBuf, &str)> {
    let (front, back) = line.split_once(" - ")?;
    let point = front.split(' ').nth(4)?;
    let source = back.split(' ').nth(1)?;
    let unescaped = point
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\");
    Some((unescaped.into(), source))
}

/// Removes a gate's pins: first its links, so that no packet meets it any
/// more, then its maps and its directory. Goes on past errors and returns the
/// first.
pub(crate) fn remove_gate(path: &Path) -> Result<(), GateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| GateError::Remove { path, source }
    };
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        // Somebody else has removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path)(error)),
    };
    let mut pins: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    pins.sort_by_key(|pin| parse_link(pin).is_none());
    let mut first_error = Ok(());
    for pin in pins {
        let detached = if parse_link(&pin).is_some() {
            sys::detach_link(&pin)
        } else {
            Ok(())
        };
        let removed = fs::remove_file(&pin);
        first_error = first_error.and(detached.and(removed).map_err(failed(&pin)));
    }
    first_error.and(fs::remove_dir(path).map_err(failed(path)))
}

/// The interface index in the name of a link's pin, `None` for a map's.
pub(crate) fn parse_link(pin: &Path) -> Option<u32> {
    let (direction, index) = pin.file_name()?.to_str()?.split_once('-')?;
    matches!(direction, "ingress" | "egress").then(|| index.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = "41 23 0:36 / /run/with\\040space/bpf rw,nosuid shared:7 - bpf migrate-gate rw";
        assert_eq!(
            mount_entry(line),
            Some((PathBuf::from("/run/with space/bpf"), "migrate-gate"))
        );
    }

    #[test]
    fn links_are_told_from_maps() {
        assert_eq!(parse_link(Path::new("/x/ingress-12")), Some(12));
        assert_eq!(parse_link(Path::new("/x/egress-3")), Some(3));
        assert_eq!(parse_link(Path::new("/x/flows")), None);
        assert_eq!(parse_link(Path::new("/x/ingress-x")), None);
    }
}
