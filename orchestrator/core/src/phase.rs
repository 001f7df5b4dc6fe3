//! The phases of a migration and the only place that says which may follow which.
//!
//! ```text
//! preflight -> track -> prepare -> precopy -> freeze -> dump -> restore -> handover -> takeover -> finish
//!     |          |         |          |          |        |        |          |
//!     +----------+---------+----------+----------+--------+--------+          +--> undecided
//!                          v                                                  |
//!                     rolled back <------ the destination does not own it ----+ (also from takeover)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where a migration stands, seen from the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Both sides are examined; nothing has changed anywhere.
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
}

/// What moves a migration on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Event {
    /// Nothing stands in the way.
    Checked,
    /// The gate knows every flow of the tree.
    Tracked,
    /// The destination is ready for the tree.
    Prepared,
    /// More rounds would not shorten the blackout.
    Converged,
    /// The gate is closed and the tree no longer runs.
    Frozen,
    /// All pages and images have left.
    Dumped,
    /// The destination holds a complete copy that has not run yet.
    Restored,
    /// The destination says that it owns the tree.
    Owned,
    /// The copy runs and its connections are served.
    Running,
    /// The source's tree is gone and its gate detached.
    Removed,
    /// Something failed, or the user cancelled.
    Failed,
    /// Asked after a lost answer, the destination has put on record that it
    /// does not own the tree and never will.
    Disowned,
}

/// An event that a phase has no answer to: a defect of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{on:?} cannot happen in phase {from}")]
pub struct IllegalTransition {
    /// The phase it happened in.
    pub from: Phase,
    /// The event.
    pub on: Event,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 13] = [
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

    /// The phase that follows, or a refusal.
    ///
    /// # Errors
    ///
    /// The event has no meaning in this phase.
    pub fn on(self, event: Event) -> Result<Self, IllegalTransition> {
        Ok(match (self, event) {
            (Self::Preflight, Event::Checked) => Self::Track,
            (Self::Track, Event::Tracked) => Self::Prepare,
            (Self::Prepare, Event::Prepared) => Self::Precopy,
            (Self::Precopy, Event::Converged) => Self::Freeze,
            (Self::Freeze, Event::Frozen) => Self::Dump,
            (Self::Dump, Event::Dumped) => Self::Restore,
            (Self::Restore, Event::Restored) => Self::HandedOver,
            (Self::HandedOver, Event::Owned) => Self::Takeover,
            (Self::Takeover, Event::Running) => Self::Finish,
            (Self::Finish, Event::Removed) => Self::Committed,
            (phase, Event::Failed) if phase.may_roll_back() => Self::RolledBack,
            (Self::HandedOver, Event::Failed) => Self::Undecided,
            // Also of a destination that has died between its word and the
            // first instruction of the copy, which can be proved there.
            (Self::HandedOver | Self::Takeover, Event::Disowned) => Self::RolledBack,
            // The destination owns the tree: whatever fails from here on, the
            // source never runs it again, and the outcome stays a commit.
            (Self::Takeover, Event::Failed) => Self::Finish,
            (Self::Finish, Event::Failed) => Self::Committed,
            (from, on) => return Err(IllegalTransition { from, on }),
        })
    }

    /// Whether a failure in this phase leaves the source running.
    #[must_use]
    pub fn may_roll_back(self) -> bool {
        self < Self::HandedOver
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

    const EVENTS: [Event; 12] = [
        Event::Checked,
        Event::Tracked,
        Event::Prepared,
        Event::Converged,
        Event::Frozen,
        Event::Dumped,
        Event::Restored,
        Event::Owned,
        Event::Running,
        Event::Removed,
        Event::Failed,
        Event::Disowned,
    ];

    #[test]
    fn a_phase_is_found_by_its_number() {
        for phase in Phase::ALL {
            assert_eq!(Phase::from_number(phase.number()), Some(phase));
        }
        assert_eq!(Phase::from_number(13), None);
    }

    #[test]
    fn every_pair_is_pinned() {
        let mut table = String::new();
        for phase in Phase::ALL {
            for event in EVENTS {
                if let Ok(next) = phase.on(event) {
                    table += &format!("{phase} + {event:?} -> {next}\n");
                }
            }
        }
        assert_eq!(table, include_str!("phase_table.txt"));
    }

    #[test]
    fn no_failure_rolls_back_once_handed_over() {
        for phase in Phase::ALL.into_iter().filter(|p| *p >= Phase::HandedOver) {
            assert_ne!(phase.on(Event::Failed), Ok(Phase::RolledBack), "{phase}");
        }
    }

    #[test]
    fn only_the_destinations_word_commits() {
        for phase in Phase::ALL {
            for event in EVENTS {
                if phase.on(event) == Ok(Phase::Takeover) {
                    assert_eq!((phase, event), (Phase::HandedOver, Event::Owned));
                }
            }
        }
    }
}
