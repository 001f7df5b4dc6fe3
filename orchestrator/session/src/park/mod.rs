//! Parking: a tree leaves for a directory and comes back, on another kernel.
//!
//! ```text
//!  park     the source's phases as ever, towards a directory    source/, keep.rs
//!           its gate stays closed, without an owner
//!  reboot   everything in memory is gone, the gate as well
//!  guard    the gate again, before there is an address          boot.rs
//!  resume   the destination's phases as ever, fed from there    resume.rs, destination/
//!           then the gate of before goes
//! ```
//!
//! Both halves are migrations whose other end is a directory, in the same
//! process: what holds for the commit of a migration holds here.

mod boot;
mod keep;
mod place;
mod resume;
mod tag;

use std::fs;
use std::path::Path;

use migrate_core::journal::Stage;
use migrate_core::preflight::Finding;

use crate::error::Error;

pub(crate) use boot::disarm;
pub use boot::{Guarded, guard};
pub(crate) use keep::connect;
pub use place::{ParkError, Place};
pub use resume::{Resume, Resumed, resume};
pub use tag::{Marked, mark, marked, still_marked, unmark};

/// How long whoever serves a set may take to leave it, once the connection to
/// it has ended.
const LEAVE_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// What became of a parking whose end was not heard, for good: a set that was
/// not finished is removed first.
pub(crate) async fn verdict(place: &Place, id: &str) -> Result<Stage, Error> {
    if !place.path().exists() {
        return Ok(Stage::Undone);
    }
    let _lock = place.lock(LEAVE_LIMIT).await?;
    match place.manifest() {
        Ok(manifest) if manifest.id == id => Ok(Stage::Done),
        Ok(_) => Ok(Stage::Undone),
        Err(Error::Park(ParkError::Unfinished(_))) => {
            place.remove()?;
            Ok(Stage::Undone)
        }
        Err(error) => Err(error),
    }
}

/// Which machine this is, whatever kernel it runs.
fn machine_id() -> Option<String> {
    let id = fs::read_to_string("/etc/machine-id").ok()?;
    let id = id.trim();
    (!id.is_empty()).then(|| id.to_owned())
}

/// Which boot of it this is.
fn boot_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(id.trim().to_owned())
}

/// A kernel that cannot give a process its PID back cannot restore any.
fn kernel_finding() -> Option<Finding> {
    lacks_restore(Path::new("/proc"))
}

fn lacks_restore(proc: &Path) -> Option<Finding> {
    // Linux kernel/pid_namespace.c: there with CONFIG_CHECKPOINT_RESTORE only.
    let knob = proc.join("sys/kernel/ns_last_pid");
    (!knob.exists()).then(|| {
        Finding::refused(
            "kernel",
            "was built without CONFIG_CHECKPOINT_RESTORE",
            "boot a kernel that has it, as the kernels of Debian do; what is parked waits for it",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_checkpoint_restore_is_told() {
        let proc = tempfile::tempdir().unwrap();
        let finding = lacks_restore(proc.path()).unwrap();
        assert!(finding.finding.contains("CONFIG_CHECKPOINT_RESTORE"));
        fs::create_dir_all(proc.path().join("sys/kernel")).unwrap();
        fs::write(proc.path().join("sys/kernel/ns_last_pid"), "1").unwrap();
        assert_eq!(lacks_restore(proc.path()), None);
    }
}
