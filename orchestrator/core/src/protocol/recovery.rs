//! What becomes of a tree whose orchestrator or agent has died.
//!
//! ```text
//! source       Preparing, Undone --------------------> runs here
//!              HandedOver --the destination says-- Undone --> runs here
//!                                                  Done ----> removed here
//!                                                  Owned, no answer: undecided
//! destination  Preparing, Undone --------------------> copy removed
//!              Owned --the copy has never run--> Undone --> copy removed
//!                    --it runs-----------------> Done ----> gate opened
//!                    --it was let go and is not there: undecided
//!              Done ---------------------------------> images and gate removed
//! ```

use crate::journal::Stage;

/// What to do about a source's record of a dead owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Let the tree run here again.
    TakeBack,
    /// End what stands here: the tree runs elsewhere.
    Remove,
    /// Only the destination knows.
    Ask,
}

/// By the record alone.
#[must_use]
pub fn source(stage: Stage) -> Source {
    match stage {
        // A source never writes `Owned`.
        Stage::Preparing | Stage::Undone | Stage::Owned => Source::TakeBack,
        Stage::HandedOver => Source::Ask,
        Stage::Done => Source::Remove,
    }
}

/// By the destination's answer; none where it decides nothing.
#[must_use]
pub fn told(answer: Stage) -> Option<Source> {
    match answer {
        Stage::Done => Some(Source::Remove),
        Stage::Undone => Some(Source::TakeBack),
        Stage::Preparing | Stage::HandedOver | Stage::Owned => None,
    }
}

/// What to do about a destination's record of a dead owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Close the record, then remove the copy, which never runs.
    Remove,
    /// Close the record: the copy runs; open its gate.
    Open,
    /// Find out whether the copy has run.
    Examine,
}

/// By the record alone.
#[must_use]
pub fn destination(stage: Stage) -> Destination {
    match stage {
        // A destination never writes `HandedOver`.
        Stage::Preparing | Stage::Undone | Stage::HandedOver => Destination::Remove,
        Stage::Owned => Destination::Examine,
        Stage::Done => Destination::Open,
    }
}

/// What is left of a copy whose agent has died after `Owned`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    /// The note that CRIU is about to let it go.
    pub let_go: bool,
    /// A process of it is there.
    pub alive: bool,
    /// Its connections.
    pub connected: usize,
    /// Those of them in TCP repair mode.
    pub in_repair: usize,
    /// All of this could be read.
    pub complete: bool,
}

/// By what is left of the copy; none where nothing proves whether it has run.
#[must_use]
pub fn examined(found: Evidence) -> Option<Destination> {
    // CRIU takes all of them out of repair mode before the first instruction,
    // and nobody else puts them into it.
    let repaired = found.connected > 0 && found.connected == found.in_repair;
    if found.complete && (!found.let_go || repaired) {
        Some(Destination::Remove)
    } else if found.alive {
        Some(Destination::Open)
    } else {
        None
    }
}

/// The answer to the question who owns the tree, and what the record becomes
/// first, so that the answer stays true.
#[must_use]
pub fn verdict(record: Option<Stage>) -> (Stage, Option<Stage>) {
    match record {
        // Nothing was ever prepared, or it was undone and swept; a record
        // that is gone does not come back.
        None => (Stage::Undone, None),
        Some(stage) if stage.may_own() => (Stage::Undone, Some(Stage::Undone)),
        Some(stage) => (stage, None),
    }
}

/// Whether the process that last wrote a record, in stage `own`, may change it
/// once more; `None` stands for a record that is gone.
#[must_use]
pub fn may_write(on_record: Option<Stage>, own: Stage) -> bool {
    own == Stage::Undone || on_record.is_some_and(|stage| stage != Stage::Undone)
}
