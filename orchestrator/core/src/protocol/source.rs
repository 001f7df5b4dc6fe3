//! The source's side.

use super::{Machine, Row, named, table};
use crate::journal::Stage;
use crate::phase::Phase;

named! {
    /// What the source does.
    Step {
        /// Examines both sides; nothing has changed anywhere.
        Preflight = "preflight",
        /// Puts itself on record and attaches an open gate.
        Track = "track",
        /// Has the destination stage the address behind a closed gate.
        Prepare = "prepare",
        /// Sends memory while the tree runs, round after round.
        Precopy = "precopy",
        /// Closes the gate and has CRIU seize the tree.
        Freeze = "freeze",
        /// Sends pages and images of the tree, which stands still.
        Dump = "dump",
        /// Waits for the copy, complete and held before its first instruction.
        Restore = "restore",
        /// Closes the fence: from here on the tree does not run even when
        /// CRIU dies.
        Fence = "fence",
        /// Makes sure that CRIU is alive *after* the fence has closed: only
        /// CRIU held the tree, so it has not run since the dump.
        Prove = "prove",
        /// Puts `HandedOver` on record: from here on this host runs the tree
        /// only when the destination has put on record that it never will.
        Record = "record",
        /// Withdraws the address: nothing here answers a peer any more.
        Withdraw = "withdraw",
        /// Sends `Go`, the commit, and waits for the word that the tree is
        /// owned. An error of the sending proves nothing about the arrival.
        Go = "go",
        /// Asks over a new connection who owns the tree.
        AskOwner = "ask_owner",
        /// Waits for the word that the copy runs.
        Await = "await",
        /// Asks over a new connection whether the copy runs.
        AskRunner = "ask_runner",
        /// Sends the pages that the copy still lacks, read from the frozen tree, and
        /// waits for the word that it has them all; nothing to do without `--postcopy`.
        Deliver = "deliver",
        /// Removes the frozen tree without a word to its peers.
        Remove = "remove",
        /// Does the same for a tree that is lost: it may not run here, for its peers
        /// have talked to the copy.
        RemoveLost = "remove_lost",
        /// Undoes everything, newest first.
        TakeBack = "take_back",
        /// The tree runs on the destination.
        Committed = "committed",
        /// The tree runs here, as before.
        RolledBack = "rolled_back",
        /// `Go` was sent and no answer came: only `recover` may decide.
        Undecided = "undecided",
        /// The copy has run, and was killed for want of pages that did not reach
        /// it: nobody runs the tree any more.
        Lost = "lost",
    }
}

named! {
    /// What came of it.
    Event {
        /// It is done.
        Done = "done",
        /// It failed, took too long, or the user cancelled.
        Failed = "failed",
        /// The destination's record says `Owned`.
        SaysOwned = "says_owned",
        /// The destination's record says `Done`.
        SaysRuns = "says_runs",
        /// The destination's record says `Undone`: it never will run the tree.
        SaysNever = "says_never",
    }
}

impl Machine for Step {
    type Event = Event;

    const ALL: &'static [Self] = Self::EVERY;
    const EVENTS: &'static [Event] = Event::EVERY;
    const TABLE: &'static [Row<Self, Event>] = table! { Step, Event;
        Preflight + Done => Track;
        Preflight + Failed => TakeBack;
        Track + Done => Prepare;
        Track + Failed => TakeBack;
        Prepare + Done => Precopy;
        Prepare + Failed => TakeBack;
        Precopy + Done => Freeze;
        Precopy + Failed => TakeBack;
        Freeze + Done => Dump;
        Freeze + Failed => TakeBack;
        Dump + Done => Restore;
        Dump + Failed => TakeBack;
        Restore + Done => Fence;
        Restore + Failed => TakeBack;
        Fence + Done => Prove;
        Fence + Failed => TakeBack;
        Prove + Done => Record;
        Prove + Failed => TakeBack;
        Record + Done => Withdraw;
        // `Go` was not sent: the destination cannot run the tree.
        Record + Failed => TakeBack;
        Withdraw + Done => Go;
        Withdraw + Failed => TakeBack;
        Go + Done => Await;
        // It may have arrived.
        Go + Failed => AskOwner;
        AskOwner + SaysOwned => AskRunner;
        AskOwner + SaysRuns => Deliver;
        AskOwner + SaysNever => TakeBack;
        AskOwner + Failed => Undecided;
        Await + Done => Deliver;
        Await + Failed => AskRunner;
        AskRunner + SaysRuns => Deliver;
        // It has died between its word and the copy's first instruction, which
        // can be proved there.
        AskRunner + SaysNever => TakeBack;
        AskRunner + Failed => Undecided;
        Deliver + Done => Remove;
        // Its word that it has them may be what was lost; a copy that lacks any
        // ends on its own.
        Deliver + Failed => RemoveLost;
        // What cannot be removed changes nothing about where the tree runs.
        Remove + Done => Committed;
        RemoveLost + Done => Lost;
        TakeBack + Done => RolledBack;
    };

    fn name(self) -> &'static str {
        self.text()
    }

    fn event_name(event: Event) -> &'static str {
        event.text()
    }
}

impl Step {
    /// Whether nothing of this step binds the destination yet, so that it may
    /// be given up in the middle.
    #[must_use]
    pub fn may_be_dropped(self) -> bool {
        self < Self::Fence
    }

    /// The phase that a user sees.
    #[must_use]
    pub fn phase(self) -> Phase {
        match self {
            Self::Preflight => Phase::Preflight,
            Self::Track => Phase::Track,
            Self::Prepare => Phase::Prepare,
            Self::Precopy => Phase::Precopy,
            Self::Freeze => Phase::Freeze,
            Self::Dump => Phase::Dump,
            Self::Restore => Phase::Restore,
            Self::Fence
            | Self::Prove
            | Self::Record
            | Self::Withdraw
            | Self::Go
            | Self::AskOwner => Phase::HandedOver,
            Self::Await | Self::AskRunner => Phase::Takeover,
            Self::Deliver | Self::Remove | Self::RemoveLost => Phase::Finish,
            Self::Committed => Phase::Committed,
            Self::TakeBack | Self::RolledBack => Phase::RolledBack,
            Self::Undecided => Phase::Undecided,
            Self::Lost => Phase::Lost,
        }
    }
}

impl Event {
    /// What a destination's record says; nothing that binds where it still
    /// may become anything.
    #[must_use]
    pub fn says(stage: Stage) -> Option<Self> {
        match stage {
            Stage::Owned => Some(Self::SaysOwned),
            Stage::Done => Some(Self::SaysRuns),
            Stage::Undone => Some(Self::SaysNever),
            Stage::Preparing | Stage::HandedOver => None,
        }
    }
}
