//! The processes that make a host and enter it: this executable under another name.
//!
//! Anything that links this crate runs [`on_start`] before its `main`. Under one of the names
//! below the process does a helper's work and never reaches `main`:
//!
//! ```text
//!   migrate-host-init LAB MEMBER …          leaves for new namespaces, furnishes them, and forks
//!     └─ the same command line              PID 1 of the host: starts sshd, reaps orphans
//!   migrate-host-enter LAB MEMBER INIT …    joins the host's namespaces, and forks
//!     └─ the same command line              inside the PID namespace: starts PROGRAM,
//!        └─ PROGRAM …                       hands signals down and the exit status up
//!   migrate-host-spawn LAB MEMBER INIT …    the same, but leaves PROGRAM to the host's init
//! ```
//!
//! Forking is safe here: before `main` there is only this one thread.

mod enter;
mod init;

use std::ffi::OsString;
use std::io::Write as _;

use crate::error::Result;

/// The name of an init. The lab and the member follow.
pub(crate) const INIT: &str = "migrate-host-init";
/// The name of a helper that runs one program in a host. The lab, the member and the PID of the
/// host's init follow, then the program with its arguments.
pub(crate) const ENTER: &str = "migrate-host-enter";
/// As [`ENTER`], but with the path of a log before the program, which outlives the helper.
pub(crate) const SPAWN: &str = "migrate-host-spawn";

pub(crate) use init::InitArgs;

#[used]
// SAFETY: the C library calls every function of this section once, before `main`, with three
// arguments, which a C function may leave unused. `on_start` returns at once in all but helpers.
#[unsafe(link_section = ".init_array")]
static ON_START: extern "C" fn() = on_start;

extern "C" fn on_start() {
    let mut words = std::env::args_os();
    let Some(name) = words.next() else { return };
    if !matches!(name.to_str(), Some(INIT | ENTER | SPAWN)) {
        return;
    }
    // What the starter left open would belong to the machine, and stay open as long as the host.
    // SAFETY: before `main` nothing in this process has a descriptor of its own.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
    let outcome = match name.to_str() {
        Some(INIT) => init::run(words),
        Some(ENTER) => enter::run(words),
        _ => enter::spawn(words),
    };
    let code = match outcome {
        Ok(code) => code,
        Err(error) => {
            report(&format!("error: {}", error.chain()));
            let _ = writeln!(std::io::stderr(), "{}: {}", name.display(), error.chain());
            125
        }
    };
    exit(code)
}

/// Writes one line to standard output, where the starter of an init or a daemon reads it.
fn report(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

/// Ends this process without running what the executable registered for its exit.
fn exit(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// The next word of a helper's command line.
fn word(words: &mut impl Iterator<Item = OsString>, what: &str) -> Result<String> {
    words
        .next()
        .and_then(|word| word.into_string().ok())
        .ok_or_else(|| crate::Error::System {
            attempt: format!("find the {what} in the command line"),
            source: std::io::ErrorKind::InvalidInput.into(),
        })
}
