//! The open descriptors of the tree: sockets, standard streams, files.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use migrate_core::facts::{StdioFacts, StdioKind};

use crate::error::ProcError;
use crate::files::DELETED;
use crate::tree::{Tree, descriptors_of};
use crate::{parse, read};

/// One open descriptor of one process.
#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    pub pid: i32,
    pub fd: i32,
    /// As /proc/PID/fd shows it.
    pub link: String,
    pub mode: u32,
    /// Device number of the node itself, in the encoding of `stat(2)`.
    pub rdev: u64,
    pub device: u64,
    pub inode: u64,
    pub size_bytes: u64,
    pub links: u64,
    /// Flags as `open(2)` takes them.
    pub flags: i32,
    /// The text of fdinfo.
    pub info: String,
}

impl Descriptor {
    pub(crate) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(crate) fn writable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    pub(crate) fn readable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_WRONLY
    }

    pub(crate) fn major(&self) -> u32 {
        libc::major(self.rdev)
    }

    pub(crate) fn minor(&self) -> u32 {
        libc::minor(self.rdev)
    }

    /// The pipe it is an end of; named pipes are none.
    pub(crate) fn pipe(&self) -> Option<u64> {
        parse::link_number(&self.link, "pipe")
    }

    fn is_terminal(&self) -> bool {
        self.kind() == libc::S_IFCHR && is_terminal_major(self.major())
    }
}

/// Majors of terminals (Documentation/admin-guide/devices.txt): consoles and
/// serial lines, pty ends, USB and low-density serial lines. Those are the
/// ones CRIU knows.
pub(crate) fn is_terminal_major(major: u32) -> bool {
    matches!(major, 4 | 5 | 128..=143 | 188 | 204)
}

/// Name and nature of what a descriptor leads to. Both are of the same file,
/// held for the look: the tree runs and may close and open files meanwhile.
fn read_whole(path: &Path) -> Result<Option<(String, std::fs::Metadata)>, ProcError> {
    let failed = |source| ProcError::Read {
        path: path.to_owned(),
        source,
    };
    // `O_PATH` opens nothing: a pipe does not see a reader, a device no user.
    let held = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path);
    let held = match held {
        Ok(held) => held,
        Err(error) if read::is_gone(&error) => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let meta = held.metadata().map_err(failed)?;
    let link = read::link(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
    Ok(Some((link, meta)))
}

impl Tree {
    /// Every descriptor of every living process.
    pub(crate) fn descriptors(&self) -> Result<Vec<Descriptor>, ProcError> {
        let mut all = Vec::new();
        for process in self.living() {
            let pid = process.pid;
            let directory = descriptors_of(pid);
            for fd in read::numbers(&directory)? {
                let path = directory.join(fd.to_string());
                let Some((link, meta)) = read_whole(&path)? else {
                    continue;
                };
                let path = read::of(pid, &format!("fdinfo/{fd}"));
                let Some(info) = read::text_if_there(&path)? else {
                    continue;
                };
                let flags = parse::value(&info, "flags")
                    .and_then(|flags| i32::from_str_radix(flags, 8).ok())
                    .ok_or_else(|| read::malformed(path, &info))?;
                all.push(Descriptor {
                    pid,
                    fd,
                    link,
                    mode: meta.mode(),
                    rdev: meta.rdev(),
                    device: meta.dev(),
                    inode: meta.ino(),
                    size_bytes: meta.size(),
                    links: meta.nlink(),
                    flags,
                    info,
                });
            }
        }
        Ok(all)
    }

    /// Which `(pid, fd)` hold each socket, by the socket's inode.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn socket_inodes(&self) -> Result<BTreeMap<u64, Vec<(i32, i32)>>, ProcError> {
        let mut sockets: BTreeMap<u64, Vec<(i32, i32)>> = BTreeMap::new();
        for process in self.living() {
            let directory = descriptors_of(process.pid);
            for fd in read::numbers(&directory)? {
                let link = read::if_there(read::link(directory.join(fd.to_string())))?;
                let inode = link.and_then(|link| parse::link_number(&link, "socket"));
                if let Some(inode) = inode {
                    sockets.entry(inode).or_default().push((process.pid, fd));
                }
            }
        }
        Ok(sockets)
    }

    /// Standard streams that lead out of the tree, and every descriptor that
    /// holds them: also a regular file that is written to, which the
    /// destination may have or not. What leads nowhere outside needs no help
    /// and is not listed: `/dev/null`, a pipe with both ends inside.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn stdio(&self) -> Result<Vec<StdioFacts>, ProcError> {
        let descriptors = self.descriptors()?;
        let outside = self.pipes_held_outside(&descriptors)?;
        self.stdio_of(&descriptors, &outside)
    }

    pub(crate) fn stdio_of(
        &self,
        descriptors: &[Descriptor],
        outside: &Outside,
    ) -> Result<Vec<StdioFacts>, ProcError> {
        let own_terminals = own_terminals(descriptors);
        let streams = self.connected_streams()?;
        let mut found: Vec<StdioFacts> = Vec::new();
        for descriptor in descriptors.iter().filter(|d| (0..=2).contains(&d.fd)) {
            let Some((kind, resource)) =
                self.leads_out(descriptor, outside, &own_terminals, &streams)
            else {
                continue;
            };
            if found.iter().any(|stream| stream.resource == resource) {
                continue;
            }
            let held: Vec<&Descriptor> = descriptors
                .iter()
                .filter(|other| same_resource(descriptor, other))
                .collect();
            found.push(StdioFacts {
                kind,
                resource,
                holders: held.iter().map(|held| (held.pid, held.fd)).collect(),
                writable: held.iter().any(|held| held.writable()),
            });
        }
        Ok(found)
    }

    fn leads_out(
        &self,
        descriptor: &Descriptor,
        outside: &Outside,
        own_terminals: &BTreeSet<u32>,
        streams: &BTreeSet<u64>,
    ) -> Option<(StdioKind, String)> {
        if descriptor.is_terminal() {
            let own = matches!(descriptor.major(), 136..=143)
                && own_terminals.contains(&terminal_index(descriptor));
            // CRIU's name: device of the node and of its file system, in hex.
            let resource = format!("tty[{:x}:{:x}]", descriptor.rdev, descriptor.device);
            return (!own).then_some((StdioKind::Terminal, resource));
        }
        if let Some(pipe) = descriptor.pipe() {
            let resource = format!("pipe:[{pipe}]");
            return outside
                .contains_key(&pipe)
                .then_some((StdioKind::Pipe, resource));
        }
        if descriptor.kind() == libc::S_IFREG {
            let moves = descriptor.writable() && !descriptor.link.ends_with(DELETED);
            return moves.then(|| (StdioKind::File, descriptor.link.clone()));
        }
        let socket = parse::link_number(&descriptor.link, "socket")?;
        if !streams.contains(&socket) || self.peer_is_inside(descriptor) {
            return None;
        }
        Some((StdioKind::UnixStream, format!("unix[{socket}]")))
    }

    /// Inodes of the connected Unix stream sockets of the tree's network
    /// namespace.
    fn connected_streams(&self) -> Result<BTreeSet<u64>, ProcError> {
        let text = read::text_if_there(read::of(self.root(), "net/unix"))?.unwrap_or_default();
        Ok(text
            .lines()
            .filter_map(parse::unix)
            .filter(|line| line.stream && line.connected)
            .map(|line| line.inode)
            .collect())
    }

    /// Whether who made the other end of a Unix socket is in the tree: the
    /// kernel keeps the listener's PID, or that of the pair's maker.
    fn peer_is_inside(&self, descriptor: &Descriptor) -> bool {
        let inside: BTreeSet<i32> = self.pids().into_iter().collect();
        crate::socket::peer_pid(descriptor.pid, descriptor.fd)
            .is_some_and(|pid| inside.contains(&pid))
    }

    /// Pipes of the tree that a process outside holds an end of.
    pub(crate) fn pipes_held_outside(
        &self,
        descriptors: &[Descriptor],
    ) -> Result<Outside, ProcError> {
        let pipes: BTreeSet<u64> = descriptors.iter().filter_map(Descriptor::pipe).collect();
        let fifos: BTreeSet<(u64, u64)> = descriptors
            .iter()
            .filter(|d| d.kind() == libc::S_IFIFO && d.pipe().is_none())
            .map(|d| (d.device, d.inode))
            .collect();
        let mut outside = Outside::new();
        if pipes.is_empty() && fifos.is_empty() {
            return Ok(outside);
        }
        let inside: BTreeSet<i32> = self.pids().into_iter().collect();
        for pid in read::numbers("/proc")? {
            if inside.contains(&pid) {
                continue;
            }
            let directory = descriptors_of(pid);
            let mut forked_meanwhile = None;
            // Somebody else's descriptors may be closed to us, which is no
            // reason to fail.
            for fd in read::numbers(&directory).unwrap_or_default() {
                let path = directory.join(fd.to_string());
                let Ok(link) = read::link(&path) else {
                    continue;
                };
                let held = match parse::link_number(&link, "pipe") {
                    Some(pipe) => pipes.contains(&pipe).then_some(pipe),
                    None if fifos.is_empty() || !link.starts_with('/') => None,
                    None => std::fs::metadata(&path)
                        .ok()
                        .filter(|meta| fifos.contains(&(meta.dev(), meta.ino())))
                        .map(|meta| meta.ino()),
                };
                if let Some(pipe) = held
                    && !*forked_meanwhile.get_or_insert_with(|| descends(pid, &inside))
                {
                    outside.entry(pipe).or_default().insert(pid);
                }
            }
        }
        Ok(outside)
    }
}

/// Whether a process has one of these above it: it was forked since the tree
/// was read, and moves with it. One that has ended holds nothing either.
fn descends(pid: i32, of: &BTreeSet<i32>) -> bool {
    /// Deeper than any tree; parents may change while they are followed.
    const DEPTH_MAX: usize = 4096;
    let mut pid = pid;
    for _ in 0..DEPTH_MAX {
        if of.contains(&pid) {
            return true;
        }
        match read::stat(pid) {
            Ok(Some(stat)) if stat.parent > 0 => pid = stat.parent,
            Ok(None) => return true,
            _ => return false,
        }
    }
    false
}

/// Which processes outside hold an end of a pipe, by inode.
pub(crate) type Outside = BTreeMap<u64, BTreeSet<i32>>;

/// Numbers of the pseudo terminals whose master the tree holds.
fn own_terminals(descriptors: &[Descriptor]) -> BTreeSet<u32> {
    descriptors
        .iter()
        .filter(|d| d.is_terminal())
        .filter_map(|d| parse::value(&d.info, "tty-index")?.parse().ok())
        .collect()
}

/// The number of a pseudo terminal's slave: 256 to each major.
fn terminal_index(descriptor: &Descriptor) -> u32 {
    (descriptor.major() - 136) * 256 + descriptor.minor()
}

/// Whether two descriptors hold what CRIU names alike.
fn same_resource(one: &Descriptor, other: &Descriptor) -> bool {
    if one.is_terminal() || other.is_terminal() {
        one.is_terminal()
            && other.is_terminal()
            && (one.rdev, one.device) == (other.rdev, other.device)
    } else {
        one.link == other.link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_nature_are_of_the_same_file() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let directory = tempfile::tempdir().unwrap();
        let short = directory.path().join("short");
        let long = directory.path().join("long");
        std::fs::write(&short, "1").unwrap();
        std::fs::write(&long, "12345").unwrap();
        let files = [&short, &long].map(|path| std::fs::File::open(path).unwrap());
        let shown = files[0].try_clone().unwrap();
        let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", shown.as_raw_fd()));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0;
                while !done.load(Ordering::Relaxed) {
                    turn += 1;
                    let from = files[turn % 2].as_raw_fd();
                    // SAFETY: both are open; `shown` takes the place of itself.
                    unsafe { libc::dup2(from, shown.as_raw_fd()) };
                }
            });
            let mixed = (0..20_000)
                .filter_map(|_| read_whole(&path).unwrap())
                .filter(|(link, meta)| (meta.size() == 1) != link.ends_with("short"))
                .count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(mixed, 0);
        });
    }
}
