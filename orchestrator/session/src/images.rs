//! Where the images of one migration are: in memory, and never in swap where the
//! kernel can promise that.

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use migrate_core::facts::HostFacts;
use nix::sys::statvfs::statvfs;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use crate::error::Error;
use crate::state::{State, make_private};

/// What lists the areas that the host swaps to.
const SWAPS: &str = "/proc/swaps";

/// A directory for root alone. A tmpfs of its own lies over it that is not
/// swapped, unless the user has named the place (`MIGRATE_IMAGE_DIR`), which is
/// taken as it is. It goes when this is dropped; whoever clears up after a crash
/// calls [`ImagePlace::remove`].
#[derive(Debug)]
pub(crate) struct ImagePlace(PathBuf);

impl ImagePlace {
    /// Makes it. It has the room that is free where it stands.
    pub(crate) fn make(path: PathBuf) -> Result<Self, Error> {
        make_private(&path)?;
        let this = Self(path);
        if !State::images_are_named() {
            this.mount()
                .map_err(Error::file("mount a tmpfs on", &this.0))?;
        }
        Ok(this)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The images themselves, for what makes and removes its own directory.
    pub(crate) fn images(&self) -> PathBuf {
        images_in(&self.0)
    }

    fn mount(&self) -> io::Result<()> {
        let free = statvfs(&self.0)?;
        let free_bytes = free.blocks_available().saturating_mul(free.fragment_size());
        // None at all would be no limit.
        let room_bytes = NonZeroU64::new(free_bytes).unwrap_or(NonZeroU64::MIN);
        match migrate_memory::unswapped(Some(room_bytes)) {
            Ok(tmpfs) => Ok(move_mount(
                tmpfs,
                "",
                CWD,
                &self.0,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )?),
            // The directory does as well: preflight has said what that means.
            Err(error) => {
                tracing::debug!(%error, "no tmpfs without swap");
                Ok(())
            }
        }
    }

    /// Removes the place, its images with it. One that is not there is none.
    pub(crate) fn remove(path: &Path) -> io::Result<()> {
        // Where nothing is mounted, or in another mount namespace, this fails;
        // then the directory is all there is.
        let _ = unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        fs::remove_dir_all(path)
    }
}

impl Drop for ImagePlace {
    fn drop(&mut self) {
        if let Err(error) = Self::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "images could not be removed");
        }
    }
}

/// The images of a destination in its place.
pub(crate) fn images_in(place: &Path) -> PathBuf {
    place.join("images")
}

/// What this host is, with its place for images.
pub(crate) fn host_facts(state: &State) -> Result<HostFacts, Error> {
    let root = state.image_root()?;
    Ok(HostFacts {
        swaps_to: swaps_to(&root),
        ..migrate_proc::host_facts(&root)
    })
}

/// Where the kernel may write images and pages to, if anywhere.
fn swaps_to(root: &Path) -> Vec<String> {
    let kept = if State::images_are_named() {
        is_unswapped(root)
    } else {
        migrate_memory::unswapped(NonZeroU64::new(1)).is_ok()
    };
    if kept {
        return Vec::new();
    }
    swap_areas(&fs::read_to_string(SWAPS).unwrap_or_default())
}

/// The first column, below its heading.
fn swap_areas(swaps: &str) -> Vec<String> {
    let lines = swaps.lines().skip(1);
    lines
        .filter_map(|line| Some(line.split_ascii_whitespace().next()?.to_owned()))
        .collect()
}

/// Whether the file system of a directory says that it is not swapped.
fn is_unswapped(directory: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(device) = fs::metadata(directory).map(|metadata| metadata.dev()) else {
        return false;
    };
    let number = format!(
        "{}:{}",
        nix::sys::stat::major(device),
        nix::sys::stat::minor(device)
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| {
        let options = line.split(' ').next_back().unwrap_or_default();
        line.split(' ').nth(2) == Some(&*number)
            && options.split(',').any(|option| option == "noswap")
    })
}
