//! A disk that outlives the guest's kernel, and what the guest goes on with.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};

/// Room beside the kernel: for what tests park. The file is sparse.
const ROOM_BYTES: u64 = 256 << 20;

/// Makes an ext4 file system in the file `disk`, with `kernel` and `initrd` in its root as
/// `vmlinuz` and `initrd`.
pub(crate) fn make(disk: &Path, kernel: &Path, initrd: &Path) -> Result<()> {
    let content = disk.with_extension("content");
    let write = || format!("write {}", content.display());
    fs::create_dir(&content).attempt(write)?;
    let mut size_bytes = ROOM_BYTES;
    for (from, name) in [(kernel, "vmlinuz"), (initrd, "initrd")] {
        size_bytes += fs::copy(from, content.join(name)).attempt(write)?;
    }
    let create = || format!("create {}", disk.display());
    let file = File::create(disk).attempt(create)?;
    file.set_len(size_bytes).attempt(create)?;
    let output = Command::new("mkfs.ext4")
        // Debian has it where not every path leads.
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-d"])
        .args([&content, disk])
        .stdin(Stdio::null())
        .output()
        .attempt(|| "start mkfs.ext4".to_owned())?;
    fs::remove_dir_all(&content).attempt(|| format!("remove {}", content.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        command: "mkfs.ext4".to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
