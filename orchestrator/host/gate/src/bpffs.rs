//! The file system that keeps the gate alive without its owner.
//!
//! A gate is one directory, `DIRECTORY/ID-ROLE/`, with a pin per map and one
//! per attachment: a link's (`ingress-IFINDEX`), or before Linux 6.6 the
//! program's, with the handle of its filter (`ingress-IFINDEX-HANDLE`). A bpf
//! file system is
//! mounted on `DIRECTORY` where there is none, and taken away again with the
//! last gate, if it is one that this program mounted.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aya::programs::TcAttachType;
use aya::programs::links::Link as _;
use aya::programs::tc::{SchedClassifierLink, TcHandle};
use migrate_ebpf_common::Direction;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, fstatfs};

use crate::{FILTER_PRIORITY, GateError, sys};

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

/// Keeps others from adding to a gate's pins, or removing them, while the file is open.
pub(crate) fn lock(path: &Path) -> io::Result<File> {
    let directory = File::open(path)?;
    directory.lock()?;
    Ok(directory)
}

/// Removes a gate's pins: first its links, so that no packet meets it any
/// more, then its maps and its directory. Goes on past errors and returns the
/// first.
pub(crate) fn remove_gate(path: &Path) -> Result<(), GateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| GateError::Remove { path, source }
    };
    let listed = lock(path).and_then(|locked| Ok((locked, fs::read_dir(path)?)));
    let (_locked, entries) = match listed {
        Ok(listed) => listed,
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
        let detached = match parse_link(&pin) {
            Some(hook) if hook.filter.is_some() => detach_filter(&hook),
            Some(_) => sys::detach_link(&pin),
            None => Ok(()),
        };
        let removed = fs::remove_file(&pin);
        first_error = first_error.and(detached.and(removed).map_err(failed(&pin)));
    }
    first_error.and(fs::remove_dir(path).map_err(failed(path)))
}

/// Where a program hangs, as the name of its pin says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) direction: Direction,
    pub(crate) interface_index: u32,
    /// The filter's handle, where there is no link.
    pub(crate) filter: Option<u32>,
}

/// `None` for a map's pin.
pub(crate) fn parse_link(pin: &Path) -> Option<Hook> {
    let (direction, place) = pin.file_name()?.to_str()?.split_once('-')?;
    let direction = match direction {
        "ingress" => Direction::Ingress,
        "egress" => Direction::Egress,
        _ => return None,
    };
    let (index, filter) = match place.split_once('-') {
        Some((index, handle)) => (index, Some(handle.parse().ok()?)),
        None => (place, None),
    };
    Some(Hook {
        direction,
        interface_index: index.parse().ok()?,
        filter,
    })
}

/// Takes a filter off its interface.
fn detach_filter(hook: &Hook) -> io::Result<()> {
    // Interfaces that are gone have taken their filters along.
    let Ok(name) = nix::net::if_::if_indextoname(hook.interface_index) else {
        return Ok(());
    };
    let name = name.into_string().map_err(io::Error::other)?;
    let way = match hook.direction {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    };
    let handle = TcHandle::from(hook.filter.unwrap_or_default());
    SchedClassifierLink::attached(&name, way, FILTER_PRIORITY, handle, None)?
        .detach()
        .map_err(io::Error::other)
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
        let hook = |direction, interface_index, filter| {
            Some(Hook {
                direction,
                interface_index,
                filter,
            })
        };
        let parsed = |name: &str| parse_link(&Path::new("/x").join(name));
        assert_eq!(parsed("ingress-12"), hook(Direction::Ingress, 12, None));
        assert_eq!(parsed("egress-3"), hook(Direction::Egress, 3, None));
        assert_eq!(parsed("egress-3-7"), hook(Direction::Egress, 3, Some(7)));
        assert_eq!(parsed("egress-3-x"), None);
        assert_eq!(parse_link(Path::new("/x/flows")), None);
        assert_eq!(parse_link(Path::new("/x/ingress-x")), None);
    }
}
