//! The guests' root: an archive made of files of this machine.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};

/// Where programs are looked for.
const PROGRAM_DIRECTORIES: [&str; 4] = [
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/usr/lib/openssh",
];
/// The merged directories of Debian.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// An archive in the kernel's `newc` format. Several may stand one behind the other.
pub(crate) struct Archive {
    file: BufWriter<File>,
    path: PathBuf,
    entries: u32,
    written: BTreeSet<PathBuf>,
}

impl Archive {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).attempt(|| format!("create {}", path.display()))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
            entries: 0,
            written: BTreeSet::new(),
        })
    }

    /// The directories and links that every guest has.
    pub(crate) fn skeleton(&mut self) -> Result<()> {
        for name in MERGED {
            let target = format!("usr/{name}");
            self.directory(Path::new("/").join(&target))?;
            self.link(Path::new("/").join(name), Path::new(&target))?;
        }
        for directory in [
            "/dev",
            "/etc/ssh",
            "/proc",
            "/root",
            "/run",
            "/srv",
            "/sys",
            "/tmp",
            "/var/tmp",
            "/var/lib",
            "/usr/local/bin",
            "/usr/local/sbin",
        ] {
            self.directory(directory)?;
        }
        self.link("/var/run", Path::new("/run"))
    }

    /// A directory, and those above it.
    pub(crate) fn directory(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if path.parent().is_none() || self.written.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.entry(path, 0o040_755, &[])
    }

    pub(crate) fn link(&mut self, path: impl AsRef<Path>, target: &Path) -> Result<()> {
        let path = path.as_ref();
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.entry(path, 0o120_777, target.as_os_str().as_bytes())
    }

    pub(crate) fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.as_ref();
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.entry(path, 0o100_000 | mode, content)
    }

    /// A file of the machine at the same place, with the mode it has.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<()> {
        self.copy_to(path, &merged(path))
    }

    pub(crate) fn copy_to(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.written.contains(to) {
            return Ok(());
        }
        let read = || format!("read {}", from.display());
        let mode = fs::metadata(from).attempt(read)?.permissions().mode();
        let content = fs::read(from).attempt(read)?;
        self.file(to, mode & 0o7777, &content)
    }

    /// Everything below a directory of the machine, at the same place.
    pub(crate) fn tree(&mut self, directory: &Path) -> Result<()> {
        let read = || format!("read {}", directory.display());
        self.directory(directory)?;
        for entry in fs::read_dir(directory).attempt(read)? {
            let path = entry.attempt(read)?.path();
            let kind = fs::symlink_metadata(&path).attempt(read)?.file_type();
            if kind.is_dir() {
                self.tree(&path)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).attempt(read)?;
                self.link(&path, &target)?;
            } else if kind.is_file() {
                self.copy_to(&path, &path)?;
            }
        }
        Ok(())
    }

    /// A program of the machine, found by its name, with its libraries.
    pub(crate) fn program(&mut self, name: &str) -> Result<()> {
        let path = PROGRAM_DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::MissingProgram {
                program: name.to_owned(),
            })?;
        self.libraries(&path)?;
        self.copy(&path)
    }

    /// A program that was built here, without what only a debugger reads, under another path.
    pub(crate) fn built(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.libraries(from)?;
        let stripped = self.path.with_extension("stripped");
        let output = run(Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&stripped)
            .arg(from));
        let outcome = output.and_then(|_| self.copy_to(&stripped, to));
        // The next one would overwrite it; the last one goes with the directory.
        let _ = fs::remove_file(&stripped);
        outcome
    }

    /// What the loader would load for a program.
    pub(crate) fn libraries(&mut self, program: &Path) -> Result<()> {
        let listed = run(Command::new("ldd").arg(program))?;
        for library in libraries_in(&listed) {
            self.copy(&library)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if !self.written.insert(path.to_owned()) {
            return Ok(());
        }
        self.entries += 1;
        let name = path.strip_prefix("/").unwrap_or(path);
        let name = name.as_os_str().as_bytes().to_owned();
        write_entry(&mut self.file, self.entries, &name, mode, content)
            .attempt(|| format!("write {}", self.path.display()))
    }

    pub(crate) fn finish(mut self) -> Result<()> {
        write_entry(&mut self.file, 0, b"TRAILER!!!", 0, &[])
            .and_then(|()| self.file.flush())
            .attempt(|| format!("write {}", self.path.display()))
    }
}

fn write_entry(
    to: &mut impl Write,
    number: u32,
    name: &[u8],
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    /// The head's bytes, before the name.
    const HEAD_BYTES: usize = 110;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let size = u32::try_from(content.len()).map_err(too_long)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
    // inode, mode, owner, group, links, time, size, four device numbers, length of the name, sum
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    to.write_all(b"070701")?;
    for field in fields {
        write!(to, "{field:08x}")?;
    }
    to.write_all(name)?;
    to.write_all(&[0])?;
    pad(to, HEAD_BYTES + name.len() + 1)?;
    to.write_all(content)?;
    pad(to, content.len())
}

fn pad(to: &mut impl Write, written: usize) -> io::Result<()> {
    to.write_all(&[0; 3][..written.wrapping_neg() % 4])
}

/// `/lib/x` as `/usr/lib/x`, since in the guests the one is a link to the other.
fn merged(path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").unwrap_or(path);
    if MERGED.iter().any(|name| relative.starts_with(name)) {
        Path::new("/usr").join(relative)
    } else {
        path.to_owned()
    }
}

/// The files that `ldd` names.
fn libraries_in(listed: &str) -> Vec<PathBuf> {
    listed
        .lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            let path = path.split(" (").next()?.trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

/// The standard output of a program that has to succeed.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .attempt(|| format!("start {name}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    // `ldd` says so of a static program, and fails.
    if output.status.success() || stdout.contains("statically linked") {
        return Ok(stdout);
    }
    let mut message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if message.contains("not a dynamic executable") {
        return Ok(String::new());
    }
    if message.is_empty() {
        message = output.status.to_string();
    }
    Err(Error::Program {
        command: format!("{command:?}"),
        message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_off_ldd() {
        let listed = "\
\tlinux-vdso.so.1 (0x00007ffd)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f)
";
        assert_eq!(
            libraries_in(listed),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
            .map(PathBuf::from)
        );
        assert_eq!(merged(Path::new("/lib/a")), Path::new("/usr/lib/a"));
        assert_eq!(merged(Path::new("/opt/lib/a")), Path::new("/opt/lib/a"));
    }

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_reads_it() {
        let mut bytes = Vec::new();
        write_entry(&mut bytes, 7, b"etc/a", 0o100_644, b"hello").unwrap();
        // 110 and 6 bytes, which is a multiple of 4, then 5 and 3.
        assert_eq!(bytes.len(), 116 + 8);
        assert!(bytes.starts_with(b"07070100000007000081a4"));
        assert_eq!(&bytes[110..], b"etc/a\0hello\0\0\0");
    }
}
