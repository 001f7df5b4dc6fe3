//! The phases of a migration as a user sees them.
//!
//! Which step follows which is said in [`crate::protocol`]; a phase is what a
//! step belongs to ([`crate::protocol::source::Step::phase`]).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a migration stands, seen from the source.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Both sides are examined; nothing has changed anywhere.
    #[default]
    Preflight,
    /// The gate is attached and open; the tree runs untouched.
    Track,
    /// The destination stages the address behind a closed gate.
    Prepare,
    /// Memory goes over while the tree runs, round after round.
    Precopy,
    /// The gate is closed and CRIU seizes the tree.
    Freeze,
    /// Pages and images leave while the tree stands still.
    Dump,
    /// The destination builds the copy and holds it before its first instruction.
    Restore,
    /// `HandedOver` is on record and `Go` is on its way: the commit.
    HandedOver,
    /// The destination announces the address and opens its gate.
    Takeover,
    /// The source's tree is removed.
    Finish,
    /// The tree runs on the destination.
    Committed,
    /// The tree runs on the source, as before.
    RolledBack,
    /// `Go` was sent and no answer came: only `recover` may decide.
    Undecided,
    /// The copy ran and ended for want of memory that the source still had.
    Lost,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 14] = [
        Self::Preflight,
        Self::Track,
        Self::Prepare,
        Self::Precopy,
        Self::Freeze,
        Self::Dump,
        Self::Restore,
        Self::HandedOver,
        Self::Takeover,
        Self::Finish,
        Self::Committed,
        Self::RolledBack,
        Self::Undecided,
        Self::Lost,
    ];

    /// The phase's place in [`Self::ALL`].
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The phase at that place, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The name a user reads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Track => "track",
            Self::Prepare => "prepare",
            Self::Precopy => "precopy",
            Self::Freeze => "freeze",
            Self::Dump => "dump",
            Self::Restore => "restore",
            Self::HandedOver => "handover",
            Self::Takeover => "takeover",
            Self::Finish => "finish",
            Self::Committed => "committed",
            Self::RolledBack => "rolled back",
            Self::Undecided => "undecided",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_found_by_its_number() {
        for phase in Phase::ALL {
            assert_eq!(Phase::from_number(phase.number()), Some(phase));
        }
        assert_eq!(Phase::from_number(14), None);
    }
}
