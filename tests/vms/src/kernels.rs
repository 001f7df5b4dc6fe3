//! The kernels that `scripts/vms` has fetched.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// A series of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's: no tcx, no asynchronous write protection, soft-dirty pages.
    V6_1,
    /// Debian 13's.
    V6_12,
    /// The newest of the suites.
    Newest,
}

impl Kernel {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::V6_1, Self::V6_12, Self::Newest];

    /// As `scripts/vms` names it.
    #[must_use]
    pub const fn series(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// Its unpacked packages.
    ///
    /// # Errors
    ///
    /// When it has not been fetched.
    pub fn find(self) -> Result<Fetched> {
        let path = cache().join(self.series());
        let missing = || Error::NoKernel {
            series: self.series(),
            path: path.clone(),
        };
        let release = std::fs::read_to_string(path.join("release")).map_err(|_| missing())?;
        let fetched = Fetched {
            kernel: self,
            image: path.join("vmlinuz"),
            modules: path.join("lib/modules").join(release.trim()),
            release: release.trim().to_owned(),
        };
        if fetched.image.is_file() && fetched.modules.join("modules.dep").is_file() {
            Ok(fetched)
        } else {
            Err(missing())
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.series())
    }
}

impl FromStr for Kernel {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kernel| kernel.series() == name)
            .ok_or_else(|| Error::UnknownKernel {
                name: name.to_owned(),
            })
    }
}

/// A kernel that is there.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Its series.
    pub kernel: Kernel,
    /// What QEMU boots.
    pub image: PathBuf,
    /// Its modules, with the lists that `depmod` makes.
    pub modules: PathBuf,
    /// `uname -r`.
    pub release: String,
}

/// The QEMU to use: the one that `MIGRATE_QEMU` names, that `scripts/vms` fetched, the machine's.
pub(crate) fn qemu() -> PathBuf {
    let fetched = cache().with_file_name("qemu").join("qemu-system-x86_64");
    match std::env::var_os("MIGRATE_QEMU") {
        Some(path) => path.into(),
        None if fetched.is_file() => fetched,
        None => "/usr/bin/qemu-system-x86_64".into(),
    }
}

/// As in `scripts/vms`.
fn cache() -> PathBuf {
    let home = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = home("XDG_CACHE_HOME").map_or_else(
        || {
            home("HOME")
                .map_or_else(|| PathBuf::from("/root"), PathBuf::from)
                .join(".cache")
        },
        PathBuf::from,
    );
    base.join("migrate/kernels")
}

/// The files of the named modules and of all that they need, below `modules`. What a kernel has
/// built in, or not at all, is left out: the guest finds out when it needs it.
pub(crate) fn with_dependencies(modules: &Path, wanted: &[&str]) -> std::io::Result<Vec<PathBuf>> {
    let list = std::fs::read_to_string(modules.join("modules.dep"))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for line in list.lines() {
        let Some((file, needs)) = line.split_once(':') else {
            continue;
        };
        // Names differ in hyphens from what one asks for.
        let name = file.rsplit('/').next().unwrap_or(file);
        let name = name.split('.').next().unwrap_or(name).replace('-', "_");
        if !wanted.contains(&name.as_str()) {
            continue;
        }
        for file in std::iter::once(file).chain(needs.split_whitespace()) {
            let file = PathBuf::from(file);
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_with_what_they_need_once() {
        let dir = tempfile::tempdir().unwrap();
        let list = "\
kernel/net/ipv4/tcp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz
kernel/net/ipv4/udp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz
kernel/net/ipv4/inet_diag.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko:
kernel/fs/fuse/fuse.ko:
";
        std::fs::write(dir.path().join("modules.dep"), list).unwrap();
        let wanted = ["tcp_diag", "udp_diag", "virtio_rng", "no_such"];
        assert_eq!(
            with_dependencies(dir.path(), &wanted).unwrap(),
            [
                "kernel/net/ipv4/tcp_diag.ko.xz",
                "kernel/net/ipv4/inet_diag.ko.xz",
                "kernel/net/ipv4/udp_diag.ko.xz",
                "kernel/drivers/char/hw_random/virtio-rng.ko",
            ]
            .map(PathBuf::from)
        );
    }

    #[test]
    fn every_kernel_is_found_by_its_name() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.series().parse::<Kernel>().unwrap(), kernel);
        }
        assert!("5.10".parse::<Kernel>().is_err());
    }
}
