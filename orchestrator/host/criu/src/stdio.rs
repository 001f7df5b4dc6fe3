//! Open files that lead out of the tree: what CRIU needs to know of them, and
//! what takes their place on the destination.
//!
//! | standard stream | resource | for the dump | as it is (`inherit_fd`) | replaced by anything |
//! |---|---|---|---|---|
//! | pipe to outside | `pipe:[INO]` | nothing | key `pipe:[INO]`, a pipe of the same direction | [`ImageDir::redirect`] |
//! | terminal | `tty[RDEV:DEV]`, hexadecimal | `external: tty[RDEV:DEV]` | key `tty[RDEV:DEV]`, another terminal, `new_session` if it shall be the controlling one | [`ImageDir::redirect`] |
//! | unix stream to outside | `unix[INO]` | `external: unix[INO]` | key `socket:[INO]`, any descriptor | [`ImageDir::redirect`] |
//! | unix datagram to a named socket (`/dev/log`) | - | `external_unix` on both sides | connects again by name | - |
//! | regular file | its path | nothing | opened again by its path | [`ImageDir::redirect`] |
//! | `/dev/null` | - | nothing | opened again by its path | - |
//!
//! A terminal whose session leader is outside the tree (a shell's job) can only
//! be redirected, be it to another terminal: CRIU looks for the leader ("No task
//! found with sid"). Such a tree also needs `shell_job` on both sides, and joins
//! the session of the worker (`new_session`).
//!
//! In every case `inherit_fd` names a descriptor *inside the worker*: give it
//! with [`WorkerOptions::inherit`](crate::WorkerOptions::inherit) and take its
//! number from [`Worker::inherited`](crate::Worker::inherited).
//!
//! Why both ways exist: CRIU opens an inherited pipe anew through `/proc`, with
//! the flags of the old one. So a socket cannot take its place (`ENXIO`), and a
//! file loses `O_APPEND` and its position. A terminal gets the settings of the
//! old one, which fails on anything but a terminal. [`ImageDir::redirect`]
//! turns the open file in the images into a regular file with a name of our
//! own; CRIU then takes the inherited descriptor exactly as it is, position,
//! flags and kind. This is how a tree gets journald's socket, an appended file
//! or `/dev/null` for whatever it had before.
//!
//! What was written to the tree and not yet read, in a pipe, socket or
//! terminal that is replaced, is lost; what the tree has written is still
//! there for the reader on the source.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use prost::Message;

use crate::error::CriuError;
use crate::images::{ImageDir, private};

/// `FD_TYPES__REG` of CRIU's `images/fdinfo.proto`.
const TYPE_REGULAR: i32 = 1;

/// Bytes before the first record: two magic numbers.
const MAGIC_BYTES: usize = 8;

/// Starts the name of a redirected file. CRIU drops the slash for the key.
const NAME_PREFIX: &str = "/migrate:";

#[derive(Clone, PartialEq, Message)]
struct FdInfo {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(int32, required, tag = "3")]
    kind: i32,
    #[prost(uint32, required, tag = "4")]
    fd: u32,
    #[prost(string, optional, tag = "5")]
    xattr_security_selinux: Option<String>,
}

/// The parts of an open file that tell whether it is meant.
#[derive(Clone, PartialEq, Message)]
struct FileEntry {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "3")]
    regular: Option<RegularFile>,
    #[prost(message, optional, tag = "16")]
    unix: Option<UnixSocket>,
    #[prost(message, optional, tag = "18")]
    pipe: Option<Pipe>,
    #[prost(message, optional, tag = "19")]
    terminal: Option<Terminal>,
}

#[derive(Clone, PartialEq, Message)]
struct RegularFile {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(uint64, required, tag = "3")]
    position: u64,
    #[prost(message, required, tag = "5")]
    owner: Owner,
    #[prost(string, required, tag = "6")]
    name: String,
}

/// Who gets `SIGIO`; nobody.
#[derive(Clone, PartialEq, Message)]
struct Owner {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "2")]
    euid: u32,
    #[prost(uint32, required, tag = "3")]
    signum: u32,
    #[prost(uint32, required, tag = "4")]
    pid_type: u32,
    #[prost(uint32, required, tag = "5")]
    pid: u32,
}

#[derive(Clone, PartialEq, Message)]
struct UnixSocket {
    #[prost(uint32, required, tag = "2")]
    inode: u32,
    #[prost(uint32, required, tag = "5")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Pipe {
    #[prost(uint32, required, tag = "2")]
    inode: u32,
    #[prost(uint32, required, tag = "3")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Terminal {
    #[prost(uint32, required, tag = "2")]
    info: u32,
    #[prost(uint32, required, tag = "3")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct TerminalInfo {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "8")]
    rdev: u32,
    #[prost(uint32, optional, tag = "13")]
    dev: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct TerminalData {
    #[prost(uint32, required, tag = "1")]
    id: u32,
}

/// What becomes of a record.
pub(crate) enum Edit {
    Keep,
    Drop,
    Replace(Vec<u8>),
}

impl ImageDir {
    /// Makes every open file of the tree that is `resource` a placeholder, and
    /// returns the key under which
    /// [`RestoreOptions::inherit_fd`](crate::RestoreOptions::inherit_fd) gives
    /// it a descriptor of any kind. `None` when the tree has no such file.
    ///
    /// `resource` is CRIU's name: `pipe:[INO]`, `unix[INO]` or
    /// `tty[RDEV:DEV]`, or the path of a regular file. To be called when all images have come.
    ///
    /// # Errors
    ///
    /// An image is not what CRIU writes, or cannot be rewritten.
    pub fn redirect(&mut self, resource: &str) -> Result<Option<String>, CriuError> {
        let directory = self.path().to_owned();
        let infos = terminal_infos(&directory, resource)?;
        let mut replaced = BTreeSet::new();
        let name = placeholder(resource);
        edit(&directory.join("files.img"), |record| {
            let file = FileEntry::decode(record)?;
            let flags = match (&file.pipe, &file.unix, &file.terminal) {
                (Some(pipe), ..) if resource == format!("pipe:[{}]", pipe.inode) => pipe.flags,
                (_, Some(unix), _) if resource == format!("unix[{}]", unix.inode) => unix.flags,
                (.., Some(terminal)) if infos.contains(&terminal.info) => terminal.flags,
                _ => match &file.regular {
                    Some(regular) if regular.name == resource => regular.flags,
                    _ => return Ok(Edit::Keep),
                },
            };
            replaced.insert(file.id);
            let placeholder = FileEntry {
                kind: TYPE_REGULAR,
                id: file.id,
                regular: Some(RegularFile {
                    id: file.id,
                    flags,
                    position: 0,
                    owner: Owner::default(),
                    name: name.clone(),
                }),
                ..FileEntry::default()
            };
            Ok(Edit::Replace(placeholder.encode_to_vec()))
        })?;
        if replaced.is_empty() {
            return Ok(None);
        }
        for image in crate::small_images(&directory)? {
            if image.name.starts_with("fdinfo-") {
                edit(&image.path, |record| {
                    let mut fd = FdInfo::decode(record)?;
                    if !replaced.contains(&fd.id) {
                        return Ok(Edit::Keep);
                    }
                    fd.kind = TYPE_REGULAR;
                    Ok(Edit::Replace(fd.encode_to_vec()))
                })?;
            }
        }
        // A terminal's settings without the terminal would be an orphan.
        if !infos.is_empty() {
            edit(&directory.join("tty-info.img"), |record| {
                let info = TerminalInfo::decode(record)?;
                Ok(if infos.contains(&info.id) {
                    Edit::Drop
                } else {
                    Edit::Keep
                })
            })?;
            let data = directory.join("tty-data.img");
            if data.exists() {
                edit(&data, |record| {
                    let data = TerminalData::decode(record)?;
                    Ok(if infos.contains(&data.id) {
                        Edit::Drop
                    } else {
                        Edit::Keep
                    })
                })?;
            }
        }
        Ok(Some(placeholder_key(resource)))
    }
}

fn placeholder(resource: &str) -> String {
    format!("{NAME_PREFIX}{resource}")
}

/// The key of [`ImageDir::redirect`] for this resource, whether or not a tree
/// has it: CRIU does not mind one too many.
#[must_use]
pub fn placeholder_key(resource: &str) -> String {
    placeholder(resource).trim_start_matches('/').to_owned()
}

/// CRIU's ids for the terminal `resource`.
fn terminal_infos(directory: &Path, resource: &str) -> Result<BTreeSet<u32>, CriuError> {
    let mut found = BTreeSet::new();
    let path = directory.join("tty-info.img");
    if resource.starts_with("tty[") && path.exists() {
        for record in records(&path, &read(&path)?)? {
            let info = TerminalInfo::decode(record).map_err(|error| malformed(&path, &error))?;
            let dev = info.dev.unwrap_or(0);
            if resource == format!("tty[{:x}:{dev:x}]", info.rdev) {
                found.insert(info.id);
            }
        }
    }
    Ok(found)
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, CriuError> {
    fs::read(path).map_err(|source| CriuError::image("read", path, source))
}

pub(crate) fn malformed(path: &Path, why: &dyn std::fmt::Display) -> CriuError {
    CriuError::ImageData {
        what: format!("{}: {why}", path.display()),
    }
}

/// The records of an image, without their sizes.
pub(crate) fn records<'a>(path: &Path, image: &'a [u8]) -> Result<Vec<&'a [u8]>, CriuError> {
    let cut = || malformed(path, &"cut in the middle of a record");
    let mut rest = image.get(MAGIC_BYTES..).ok_or_else(cut)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (size, after) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (record, after) = after
            .split_at_checked(u32::from_le_bytes(*size) as usize)
            .ok_or_else(cut)?;
        found.push(record);
        rest = after;
    }
    Ok(found)
}

/// Rewrites an image record by record; what is kept stays byte for byte.
pub(crate) fn edit(
    path: &Path,
    mut decide: impl FnMut(&[u8]) -> Result<Edit, prost::DecodeError>,
) -> Result<(), CriuError> {
    let image = read(path)?;
    let mut out = image.get(..MAGIC_BYTES).unwrap_or_default().to_vec();
    let mut changed = false;
    for record in records(path, &image)? {
        let edit = decide(record).map_err(|error| malformed(path, &error))?;
        changed |= !matches!(edit, Edit::Keep);
        let record = match &edit {
            Edit::Keep => record,
            Edit::Drop => continue,
            Edit::Replace(record) => record,
        };
        let size = u32::try_from(record.len()).map_err(|error| malformed(path, &error))?;
        out.extend(size.to_le_bytes());
        out.extend(record);
    }
    if !changed {
        return Ok(());
    }
    private()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| file.write_all(&out))
        .map_err(|source: io::Error| CriuError::image("rewrite", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_core::wire::ImagePiece;

    fn image(records: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0xaa; MAGIC_BYTES];
        for record in records {
            out.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            out.extend(record);
        }
        out
    }

    fn add(images: &mut ImageDir, name: &str, data: &[u8]) {
        images
            .image_piece(&ImagePiece {
                name,
                last: true,
                data,
            })
            .unwrap();
    }

    fn pipe(id: u32, inode: u32) -> Vec<u8> {
        FileEntry {
            kind: 2,
            id,
            pipe: Some(Pipe { inode, flags: 1 }),
            ..FileEntry::default()
        }
        .encode_to_vec()
    }

    fn fd(id: u32, kind: i32, fd: u32) -> Vec<u8> {
        FdInfo {
            id,
            flags: 0,
            kind,
            fd,
            xattr_security_selinux: None,
        }
        .encode_to_vec()
    }

    #[test]
    fn only_the_named_resource_is_touched() {
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut images = ImageDir::create(parent.path().join("images")).unwrap();
        // A record with fields that are not declared here must stay as it is.
        let mut other = pipe(3, 78);
        other.extend([0xf8, 0x3f, 7]);
        add(
            &mut images,
            "files.img",
            &image(&[pipe(2, 77), other.clone()]),
        );
        add(
            &mut images,
            "fdinfo-2.img",
            &image(&[fd(2, 2, 1), fd(3, 2, 5)]),
        );
        assert_eq!(images.redirect("pipe:[99]").unwrap(), None);
        assert_eq!(
            images.redirect("pipe:[77]").unwrap().as_deref(),
            Some("migrate:pipe:[77]")
        );

        let path = images.path().join("files.img");
        let bytes = read(&path).unwrap();
        let found = records(&path, &bytes).unwrap();
        let first = FileEntry::decode(found[0]).unwrap();
        assert_eq!((first.kind, first.id, first.pipe), (TYPE_REGULAR, 2, None));
        assert_eq!(first.regular.unwrap().name, "/migrate:pipe:[77]");
        assert_eq!(found[1], other);

        let path = images.path().join("fdinfo-2.img");
        let bytes = read(&path).unwrap();
        assert_eq!(
            records(&path, &bytes).unwrap(),
            [&fd(2, TYPE_REGULAR, 1)[..], &fd(3, 2, 5)]
        );
    }

    #[test]
    fn a_cut_image_is_refused() {
        let whole = image(&[pipe(2, 77)]);
        for cut in 0..whole.len() {
            let result = records(Path::new("x"), &whole[..cut]);
            // An image without records is valid.
            assert_eq!(result.is_ok(), cut == MAGIC_BYTES, "{cut}");
        }
    }
}
