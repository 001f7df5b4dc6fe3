//! What passes through our processes is other programs' memory.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// From here on this process leaves no core dump, and only root may look into
/// it. What it starts has no core dump by the soft limit; CRIU gives each
/// process of a tree its own limits back, for which the hard one stays.
///
/// # Errors
///
/// The kernel refuses.
pub fn leave_no_cores() -> std::io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE)?;
    setrlimit(Resource::RLIMIT_CORE, 0, hard)?;
    // The limit does not count where the kernel pipes core dumps to a program.
    prctl::set_dumpable(false)?;
    Ok(())
}
