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
//! With `--to` the directory is another host's: its agent keeps the set (keep.rs,
//! kept.rs), and a stub stays here that the guard and the resume go by
//! (elsewhere.rs).
//!
//! Both halves are migrations whose other end is a directory, in the same
//! process: what holds for the commit of a migration holds here.

mod boot;
mod elsewhere;
mod keep;
mod kept;
mod place;
mod resume;
mod tag;

use std::fs;
use std::path::Path;

use migrate_core::journal::Stage;
use migrate_core::parked::Manifest;
use migrate_core::preflight::Finding;

use crate::error::Error;

pub(crate) use boot::disarm;
pub use boot::{Guarded, Interfaces, MUTE, guard, guard_interface, mute, speak};
pub use elsewhere::Keeper;
pub(crate) use elsewhere::{Stub, forget};
pub(crate) use keep::{connect, keep};
pub(crate) use kept::answer;
pub use place::{ParkError, Place};
pub use resume::{Resume, Resumed, resume};
pub use tag::{Marked, mark, marked, still_marked, unmark};

/// How long whoever serves a set may take to leave it, once the connection to
/// it has ended.
const LEAVE_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// What became of a parking whose end was not heard, for good.
pub(crate) async fn verdict(place: &Place, id: &str) -> Result<Stage, Error> {
    if place.is_stub() {
        elsewhere::verdict(place, id).await
    } else {
        stands(place, id).await
    }
}

/// The same where the set lies: one that was not finished is removed first.
async fn stands(place: &Place, id: &str) -> Result<Stage, Error> {
    if !place.path().exists() {
        return Ok(Stage::Undone);
    }
    let _lock = match place.lock(LEAVE_LIMIT).await {
        Ok(lock) => lock,
        // Whoever was at work there has undone it meanwhile.
        Err(_) if !place.path().exists() => return Ok(Stage::Undone),
        Err(error) => return Err(error),
    };
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

/// Whether a set can be made here, and what it `holds`.
pub(crate) fn judge(place: &Place, holds: &str) -> Finding {
    let subject = format!("directory {}", place.directory().display());
    match place.is_free() {
        Ok(false) => Finding::ok(subject, format!("{holds} as {}", place.name())),
        Ok(true) => Finding::note(
            subject,
            format!(
                "{} holds what is left of an earlier parking, which is removed",
                place.path().display()
            ),
            "",
        ),
        Err(error) => Finding::refused(subject, error.chain(), error.help().unwrap_or_default()),
    }
}

/// Which machine this is, whatever kernel it runs.
pub(crate) fn machine_id() -> Option<String> {
    let id = fs::read_to_string("/etc/machine-id").ok()?;
    let id = id.trim();
    (!id.is_empty()).then(|| id.to_owned())
}

/// Whether a set was parked on this machine, and not on one that it is kept for.
#[must_use]
pub fn is_of_here(manifest: &Manifest) -> bool {
    manifest.machine_id == machine_id()
}

/// Which boot of it this is.
pub(crate) fn boot_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(id.trim().to_owned())
}

/// What a kernel has to have been built with, or no tree comes back on it.
pub(crate) fn kernel_findings() -> Vec<Finding> {
    lacks(Path::new("/proc"))
}

fn lacks(proc: &Path) -> Vec<Finding> {
    const NEEDED: [(&str, &str); 2] = [
        // Linux kernel/pid_namespace.c: there with CONFIG_CHECKPOINT_RESTORE only. Without it no
        // process can have its PID back.
        (
            "sys/kernel/ns_last_pid",
            "was built without CONFIG_CHECKPOINT_RESTORE",
        ),
        // Linux fs/proc/namespaces.c. The monotonic clock begins anew with each boot; CRIU lets a
        // tree's go on in a time namespace, and where there are none it lets it jump back.
        (
            "self/ns/time",
            "was built without CONFIG_TIME_NS: the clocks of the tree would jump back to this boot",
        ),
    ];
    NEEDED
        .into_iter()
        .filter(|(path, _)| proc.join(path).symlink_metadata().is_err())
        .map(|(_, finding)| {
            Finding::refused(
                "kernel",
                finding,
                "boot a kernel that has it, as the kernels of Debian do; what is parked waits for it",
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_was_built_without_is_told() {
        let proc = tempfile::tempdir().unwrap();
        let told = |words: &[&str]| {
            let findings = lacks(proc.path());
            assert_eq!(findings.len(), words.len(), "{findings:?}");
            for (finding, word) in findings.iter().zip(words) {
                assert!(finding.finding.contains(word), "{finding:?}");
            }
        };
        told(&["CONFIG_CHECKPOINT_RESTORE", "CONFIG_TIME_NS"]);
        fs::create_dir_all(proc.path().join("sys/kernel")).unwrap();
        fs::write(proc.path().join("sys/kernel/ns_last_pid"), "1").unwrap();
        told(&["CONFIG_TIME_NS"]);
        fs::create_dir_all(proc.path().join("self/ns")).unwrap();
        // As there: a link to what no path leads to.
        std::os::unix::fs::symlink("time:[1]", proc.path().join("self/ns/time")).unwrap();
        told(&[]);
    }
}
