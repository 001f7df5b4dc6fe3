//! Moments at which a test may hold a side of a migration.
//!
//! In builds with debug assertions, `MIGRATE_STOP_AT` names one, and the
//! process stops itself there until it is continued or killed. In others this
//! is nothing.

/// This process has come to a moment.
#[cfg(debug_assertions)]
pub(crate) fn at(moment: &str) {
    if std::env::var_os("MIGRATE_STOP_AT").is_some_and(|wanted| wanted == moment) {
        // Cannot fail: the signal is a valid one, for this process.
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP);
    }
}

/// This process has come to a moment.
#[cfg(not(debug_assertions))]
pub(crate) const fn at(_moment: &str) {}
