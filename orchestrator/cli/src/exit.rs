//! Exit codes, a promise to scripts.

use std::process::ExitCode;

use migrate_core::Phase;
use migrate_session::Error;
use migrate_session::source::Failure;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// A defect, or something this list has no name for.
    Internal = 1,
    /// The command line.
    Usage = 2,
    /// Preflight refused.
    Refused = 3,
    /// The destination was not reached or did not let us in.
    Connect = 4,
    /// Pre-copy did not converge; the source was not frozen.
    NotConverged = 5,
    /// Failed and rolled back; the source runs.
    RolledBack = 6,
    /// Undecided, or failed after the commit.
    Undecided = 7,
    /// CRIU refused the dump; the source runs.
    DumpRefused = 8,
    /// Interrupted and rolled back.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The code for an error before anything was done.
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Refused(_) | Error::Proc(_) | Error::Park(_) | Error::Busy { .. } => {
                Self::Refused
            }
            Error::NotConverged { .. } => Self::NotConverged,
            Error::Connect(_) => Self::Connect,
            Error::Cancelled | Error::Stopped => Self::Interrupted,
            Error::DumpRefused(_) => Self::DumpRefused,
            Error::Undecided(_) | Error::LostAfterCommit(_) => Self::Undecided,
            Error::Illegal(_) | Error::OutOfOrder { .. } | Error::Unexpected { .. } => {
                Self::Internal
            }
            _ => Self::RolledBack,
        }
    }

    /// The code for a migration that did not end in a commit.
    pub fn of_failure(failure: &Failure) -> Self {
        if failure.outcome != Phase::RolledBack {
            return Self::Undecided;
        }
        match Self::of(&failure.error) {
            // More was done than checking by then.
            Self::Refused if failure.phase > Phase::Preflight => Self::RolledBack,
            exit => exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_preflight_refuses() {
        let code = |phase, outcome| {
            Exit::of_failure(&Failure {
                phase,
                outcome,
                error: Error::Busy { pid: 7 },
                leftovers: Vec::new(),
                report: None,
            })
        };
        let rolled_back = Phase::RolledBack;
        assert_eq!(code(Phase::Preflight, rolled_back), Exit::Refused);
        assert_eq!(code(Phase::Prepare, rolled_back), Exit::RolledBack);
        assert_eq!(code(Phase::HandedOver, rolled_back), Exit::RolledBack);
        assert_eq!(code(Phase::HandedOver, Phase::Undecided), Exit::Undecided);
    }
}
