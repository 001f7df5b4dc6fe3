//! What passes through our processes is other programs' memory.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::mm::{MlockAllFlags, mlockall};

/// A soft limit, in bytes, that allows no core dump at all. None to a file, for a
/// page has more; and none to a program either, for which the kernel takes this
/// one number as a refusal and would not look at any other, zero included
/// (`coredump_pipe` in Linux's fs/coredump.c).
const NO_CORES_BYTES: u64 = 1;

/// From here on this process leaves no core dump, and only root may look into
/// it. What it starts, CRIU above all, has no core dump by the soft limit; CRIU
/// gives each process of a tree its own limits back, for which the hard one stays.
///
/// # Errors
///
/// The kernel refuses.
pub fn leave_no_cores() -> std::io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE)?;
    setrlimit(Resource::RLIMIT_CORE, NO_CORES_BYTES.min(hard), hard)?;
    prctl::set_dumpable(false)?;
    Ok(())
}

/// From here on the kernel does not swap this process: buffers on their way, and
/// what it maps. A page is locked when it is first touched, so nothing is taken that
/// is not in use. Without `CAP_IPC_LOCK` nothing is done, for every mapping beyond
/// the limit would fail then.
///
/// # Errors
///
/// The kernel refuses.
pub fn stay_in_memory() -> std::io::Result<()> {
    if !migrate_proc::may_lock_memory() {
        return Ok(());
    }
    Ok(mlockall(
        MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT,
    )?)
}
