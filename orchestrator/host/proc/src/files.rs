//! The files a tree stands on, and whether the destination has them alike.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use migrate_core::facts::{FileFacts, FileRole};
use migrate_core::preflight::Finding;

use crate::error::ProcError;
use crate::tree::Tree;
use crate::{parse, read};

/// What /proc adds to the name of a file that has none any more.
pub(crate) const DELETED: &str = " (deleted)";

/// What the kernel shows as a path below `/` that is no file's.
pub(crate) fn is_no_file(path: &str) -> bool {
    !path.starts_with('/')
        || path.starts_with("/memfd:")
        || path.starts_with("/SYSV")
        || path.starts_with("/[aio]")
        || path.starts_with("/secretmem")
        || path.starts_with("/anon_hugepage")
        || path.starts_with("/dev/zero")
}

/// Files whose size says nothing: the kernel makes them up.
fn is_made_up(path: &str) -> bool {
    ["/dev/", "/proc/", "/sys/"]
        .iter()
        .any(|prefix| path.starts_with(prefix))
}

/// A mapped file of one process.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile {
    pub pid: i32,
    pub mapping: parse::Mapping,
}

impl MappedFile {
    /// The kernel's own link to the file, which holds even when the path has
    /// another file by now.
    pub(crate) fn link(&self) -> PathBuf {
        read::of(
            self.pid,
            &format!("map_files/{:x}-{:x}", self.mapping.start, self.mapping.end),
        )
    }
}

impl Tree {
    /// Every mapping of every process, unfiltered.
    pub(crate) fn mappings(&self) -> Result<Vec<MappedFile>, ProcError> {
        let mut all = Vec::new();
        for process in self.living() {
            let path = read::of(process.pid, "maps");
            let Some(text) = read::text_if_there(&path)? else {
                continue;
            };
            for line in text.lines() {
                let mapping =
                    parse::mapping(line).ok_or_else(|| read::malformed(path.clone(), line))?;
                if !mapping.path.is_empty() {
                    all.push(MappedFile {
                        pid: process.pid,
                        mapping,
                    });
                }
            }
        }
        Ok(all)
    }

    /// Files that must exist alike on the destination, by path: programs,
    /// mapped and open files, working and root directories. Files without a
    /// name any more are not among them; [`Tree::findings`] judges those.
    ///
    /// # Errors
    /// When /proc or a file of the workload cannot be read.
    pub fn files(&self) -> Result<Vec<FileFacts>, ProcError> {
        let mut files = Files::default();
        for process in self.living() {
            for (link, role) in [
                ("exe", FileRole::Executable),
                ("cwd", FileRole::Directory),
                ("root", FileRole::Directory),
            ] {
                let link = read::of(process.pid, link);
                if let Some(path) = read::if_there(read::link(&link))? {
                    files.add(&path, role, false, &link)?;
                }
            }
        }
        for file in self.mappings()? {
            if file.mapping.inode != 0 {
                files.add(&file.mapping.path, FileRole::Mapped, false, &file.link())?;
            }
        }
        for descriptor in self.descriptors()? {
            let role = match descriptor.kind() {
                libc::S_IFDIR => FileRole::Directory,
                libc::S_IFIFO if descriptor.pipe().is_none() => FileRole::Appended,
                libc::S_IFREG
                    if descriptor.flags & libc::O_APPEND != 0 && !descriptor.readable() =>
                {
                    FileRole::Appended
                }
                libc::S_IFREG => FileRole::Open,
                _ => continue,
            };
            let link = read::of(descriptor.pid, &format!("fd/{}", descriptor.fd));
            let seen = Seen {
                mode: descriptor.mode,
                size_bytes: descriptor.size_bytes,
                inode: descriptor.inode,
            };
            files.add_seen(&descriptor.link, role, descriptor.writable(), &link, seen);
        }
        Ok(files.0.into_values().collect())
    }
}

/// What was seen of a file in one look.
struct Seen {
    mode: u32,
    size_bytes: u64,
    inode: u64,
}

impl Seen {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self {
            mode: meta.mode(),
            size_bytes: meta.size(),
            inode: meta.ino(),
        }
    }
}

/// Files by path; the strictest role wins.
#[derive(Default)]
struct Files(BTreeMap<String, FileFacts>);

impl Files {
    fn add(
        &mut self,
        path: &str,
        role: FileRole,
        written: bool,
        link: &Path,
    ) -> Result<(), ProcError> {
        if !self.wants(path, role, written) {
            return Ok(());
        }
        // Through the kernel's link where we may, else by name.
        let (meta, opened) = match std::fs::metadata(link) {
            Ok(meta) => (meta, link),
            Err(_) => match std::fs::metadata(path) {
                Ok(meta) => (meta, Path::new(path)),
                Err(error) if read::is_gone(&error) => return Ok(()),
                Err(source) => {
                    return Err(ProcError::Read {
                        path: path.into(),
                        source,
                    });
                }
            },
        };
        self.insert(path, role, written, opened, Seen::of(&meta));
        Ok(())
    }

    /// As [`Files::add`], for a file that has been looked at already.
    fn add_seen(&mut self, path: &str, role: FileRole, written: bool, link: &Path, seen: Seen) {
        if self.wants(path, role, written) {
            // The link may lead to another file by now.
            let same = std::fs::metadata(link).is_ok_and(|meta| meta.ino() == seen.inode);
            let opened = if same { link } else { Path::new(path) };
            self.insert(path, role, written, opened, seen);
        }
    }

    /// Whether a file counts and is not known yet; notes another use of one that is.
    fn wants(&mut self, path: &str, role: FileRole, written: bool) -> bool {
        if is_no_file(path) || path.ends_with(DELETED) {
            return false;
        }
        if let Some(known) = self.0.get_mut(path) {
            known.role = known.role.min(role);
            known.written |= written;
            return false;
        }
        true
    }

    fn insert(&mut self, path: &str, role: FileRole, written: bool, opened: &Path, seen: Seen) {
        let facts = FileFacts {
            path: path.to_owned(),
            role,
            size_bytes: seen.size_bytes,
            mode: seen.mode,
            build_id: build_id_of(seen.mode, path, opened),
            inode: seen.inode,
            written,
        };
        self.0.insert(path.to_owned(), facts);
    }
}

/// The build-id of a regular file of the disk.
fn build_id_of(mode: u32, path: &str, opened: &Path) -> Option<Vec<u8>> {
    if mode & libc::S_IFMT != libc::S_IFREG || is_made_up(path) {
        return None;
    }
    parse::build_id(&File::open(opened).ok()?)
}

/// On the destination: whether the files are there, alike. One finding for
/// each that is not, and one that sums up.
///
/// CRIU compares size, mode and build-id of every file it opens again, after
/// the freeze; this finds out before. It does not compare the size of a file
/// that is only appended to.
#[must_use]
pub fn compare_files(files: &[FileFacts]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = files.iter().filter_map(compare_file).collect();
    if findings.is_empty() {
        findings.push(Finding::ok(
            "files",
            format!("all {} files are here alike", files.len()),
        ));
    }
    findings
}

fn compare_file(file: &FileFacts) -> Option<Finding> {
    let path = &file.path;
    let subject = format!("file {path}");
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let what = match file.role {
                FileRole::Directory => "directory",
                FileRole::Executable | FileRole::Mapped | FileRole::Open | FileRole::Appended => {
                    "file"
                }
            };
            return Some(Finding::refused(
                subject,
                format!("this {what} does not exist on the destination"),
                way_out(file, "put it there"),
            ));
        }
        Err(error) => {
            return Some(Finding::refused(
                subject,
                format!("cannot be read on the destination: {error}"),
                "make it readable for root there",
            ));
        }
    };
    let kind = |mode: u32| mode & libc::S_IFMT;
    if kind(meta.mode()) != kind(file.mode) {
        return Some(Finding::refused(
            subject,
            format!(
                "is a {} here and a {} on the source",
                kind_name(meta.mode()),
                kind_name(file.mode)
            ),
            way_out(file, "replace it"),
        ));
    }
    if is_made_up(path) {
        return None;
    }
    let bits = |mode: u32| mode & 0o7777;
    if bits(meta.mode()) != bits(file.mode) {
        let wanted = bits(file.mode);
        return Some(Finding::refused(
            subject,
            format!(
                "has mode {:04o} here and {wanted:04o} on the source",
                bits(meta.mode())
            ),
            format!("on the destination: chmod {wanted:04o} {path}"),
        ));
    }
    if file.role == FileRole::Directory || file.role == FileRole::Appended {
        return None;
    }
    // The build-id says more than the size, so it is told first.
    if file.build_id.is_some() {
        let here = build_id_of(meta.mode(), path, Path::new(path));
        if here != file.build_id {
            return Some(Finding::refused(
                subject,
                format!(
                    "is another build here (build-id {}) than on the source (build-id {})",
                    short_id(here.as_deref()),
                    short_id(file.build_id.as_deref())
                ),
                way_out(file, "install the same version"),
            ));
        }
    }
    // The tree writes on while this is looked at. CRIU compares again, and then
    // the tree stands still.
    let grows = file.written && meta.ino() == file.inode && meta.size() > file.size_bytes;
    if meta.is_file() && meta.size() != file.size_bytes && !grows {
        return Some(Finding::refused(
            subject,
            format!(
                "has {} bytes here and {} on the source",
                meta.size(),
                file.size_bytes
            ),
            way_out(file, "make them alike"),
        ));
    }
    None
}

/// What to do, by what the file is to the tree.
fn way_out(file: &FileFacts, what: &str) -> String {
    match file.role {
        FileRole::Executable | FileRole::Mapped => format!(
            "{what}: install the same package version on both hosts, then restart the workload \
             if its own files were upgraded under it"
        ),
        FileRole::Open => format!(
            "{what}: copy it (`rsync -a`), or keep it on storage that both hosts share; a file \
             that grows has to be opened for appending only"
        ),
        FileRole::Appended => format!(
            "{what}: a file of that name with mode {:04o} is enough",
            file.mode & 0o7777
        ),
        FileRole::Directory => format!(
            "{what}: mkdir -p -m {:04o} {}",
            file.mode & 0o7777,
            file.path
        ),
    }
}

fn kind_name(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFREG => "regular file",
        libc::S_IFDIR => "directory",
        libc::S_IFIFO => "named pipe",
        libc::S_IFCHR => "character device",
        libc::S_IFBLK => "block device",
        libc::S_IFSOCK => "socket",
        _ => "thing of an unknown kind",
    }
}

/// The first eight hex digits, as `file` and debuggers abbreviate it.
fn short_id(id: Option<&[u8]>) -> String {
    match id {
        None => "none".to_owned(),
        Some(id) => id
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    }
}
