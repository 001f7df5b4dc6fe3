//! What each side puts on record, so that a crash or a lost message leaves no doubt.
//!
//! One record per migration and side, replaced as a whole. It lives on tmpfs:
//! it has to outlive the orchestrator, not the machine, because the tree's
//! memory does not outlive the machine either.

use serde::{Deserialize, Serialize};

use crate::facts::AddressFacts;
use crate::flow::Listener;
use crate::wire::NetworkLock;

/// Version of the record's form; a record of another version is not read.
pub const RECORD_VERSION: u32 = 1;

/// Which side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The host the tree comes from.
    Source,
    /// The host the tree goes to.
    Destination,
}

/// How far a side has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Nothing is decided: the source owns the tree.
    Preparing,
    /// Source: `Go` may have been sent. The source runs the tree again only
    /// when the destination has put `Undone` on record.
    HandedOver,
    /// Destination: the tree is its own.
    Owned,
    /// Destination: the tree runs. Source: the tree is gone.
    Done,
    /// This side has given up and will never run (destination) or has taken
    /// the tree back (source).
    Undone,
}

impl Stage {
    /// Whether this stage of the destination means that the tree lives there.
    #[must_use]
    pub fn owns(self) -> bool {
        matches!(self, Self::Owned | Self::Done)
    }

    /// Whether a destination in this stage may still take the tree.
    #[must_use]
    pub fn may_own(self) -> bool {
        self == Self::Preparing
    }
}

/// One side's record of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The migration.
    pub migration_id: String,
    /// Which side wrote it.
    pub side: Side,
    /// How far it has come.
    pub stage: Stage,
    /// The process that drives this side.
    pub owner_pid: i32,
    /// Its `starttime`, in clock ticks since boot: a reused PID is not the owner.
    pub owner_start_ticks: u64,
    /// Root of the tree.
    pub root_pid: i32,
    /// Every PID of the tree.
    pub pids: Vec<i32>,
    /// Name of the root process.
    pub name: String,
    /// The other host, as the user or the peer named it.
    pub peer: String,
    /// Addresses that move with the tree; on the destination with the
    /// interface there.
    pub addresses: Vec<AddressFacts>,
    /// Directory of the images, when there is one.
    pub images: Option<String>,
    /// The fence, as its adapter describes it, when there is one.
    pub fence: Option<String>,
    /// The supervisor that is held down, as its adapter describes it.
    #[serde(default)]
    pub hold_down: Option<String>,
    /// Source: how the destination is reached, for the question who owns the
    /// tree.
    #[serde(default)]
    pub route: Option<Route>,
    /// Source: the addresses, as their adapter describes them when they are
    /// taken away, from before they are.
    #[serde(default)]
    pub withdrawn: Option<String>,
    /// Source: what keeps packets from the tree; CRIU's own locks outlast it.
    #[serde(default)]
    pub network_lock: NetworkLock,
    /// Destination: the cgroup that the copy is made in.
    #[serde(default)]
    pub home: Option<String>,
    /// Destination: what the copy will take of this host, beside its
    /// addresses.
    #[serde(default)]
    pub claims: Claims,
}

/// What is free on a host and nobody else's all the same: a migration under way
/// will need it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Ids of processes and threads, of their sessions and process groups.
    pub ids: Vec<i32>,
    /// Where the copy will listen.
    pub listeners: Vec<Listener>,
}

/// How a destination is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What the user said after `--to`.
    pub to: String,
    /// Files of the authority, the certificate and the key, for a standing
    /// agent.
    pub certificates: Option<[String; 3]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_undecided_destination_may_still_take_the_tree() {
        for stage in [
            Stage::Preparing,
            Stage::HandedOver,
            Stage::Owned,
            Stage::Done,
            Stage::Undone,
        ] {
            assert!(!(stage.owns() && stage.may_own()), "{stage:?}");
        }
        assert!(!Stage::Undone.owns() && !Stage::Undone.may_own());
    }
}
