//! Architectures for which no injection is written.

use std::os::fd::OwnedFd;

use crate::error::UntrackedReason;

/// What an injection cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    /// How long one thread stood still, in microseconds.
    pub stopped_us: u64,
    /// From the first look at the process to the end, in microseconds.
    pub took_us: u64,
}

pub(crate) enum InjectError {
    #[expect(dead_code, reason = "the other architectures make it")]
    Gone,
    Refused(UntrackedReason),
}

pub(crate) fn userfaultfd(_pid: i32) -> Result<(OwnedFd, Injection), InjectError> {
    Err(InjectError::Refused(UntrackedReason::Architecture))
}
