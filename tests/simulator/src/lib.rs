//! Both sides of the protocol in a world where everything fails, by seed.
//!
//! The tables and decisions are those of [`migrate_core::protocol`], the ones
//! that the driver runs. What a step does to the hosts is modelled here, one
//! effect at a time ([`ops`]), and between any two effects the world may go
//! on: connections stall, are cut and overtake each other, each process dies,
//! CRIU among them, and several processes recover at once. After every effect
//! the rules of the tool are checked ([`Breach`]).
//!
//! A run is a function of its seed and nothing else.

mod actors;
mod ops;
mod random;
mod world;

use migrate_core::journal::Stage;
use migrate_core::protocol::recovery::{self, Evidence};
use migrate_core::protocol::{Machine as _, Row, destination, source};
use thiserror::Error;

use crate::world::World;

/// What decides: the product's tables and functions, or changed ones that a
/// test hands in to see them found out.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The source's table.
    pub source: Vec<Row<source::Step, source::Event>>,
    /// The destination's table.
    pub destination: Vec<Row<destination::Step, destination::Event>>,
    /// [`recovery::source`].
    pub dead_source: fn(Stage) -> recovery::Source,
    /// [`recovery::told`].
    pub told: fn(Stage) -> Option<recovery::Source>,
    /// [`recovery::destination`].
    pub dead_destination: fn(Stage) -> recovery::Destination,
    /// [`recovery::examined`].
    pub examined: fn(Evidence) -> Option<recovery::Destination>,
    /// [`recovery::verdict`].
    pub verdict: fn(Option<Stage>) -> (Stage, Option<Stage>),
    /// [`recovery::may_write`].
    pub may_write: fn(Option<Stage>, Stage) -> bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            source: source::Step::TABLE.to_vec(),
            destination: destination::Step::TABLE.to_vec(),
            dead_source: recovery::source,
            told: recovery::told,
            dead_destination: recovery::destination,
            examined: recovery::examined,
            verdict: recovery::verdict,
            may_write: recovery::may_write,
        }
    }
}

/// A rule of the tool that a run has broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Error)]
pub enum Breach {
    /// Two hosts run the tree.
    #[error("two hosts run the tree")]
    TwoRunners,
    /// Two hosts answer for its flows.
    #[error("two hosts answer for its flows")]
    TwoOwners,
    /// One host runs it after the other has gone on from the same state.
    #[error("one host runs the tree after the other has gone on from the same state")]
    Forked,
    /// The source's tree was removed and the copy has never run.
    #[error("the source's tree was removed, and the copy has never run")]
    Lost,
    /// The kernel of a host answers for a tree that is not there.
    #[error("a kernel answers for a tree that is not there")]
    AnswersForNobody,
    /// The command said something that is not so.
    #[error("the command's last word is wrong")]
    WrongWord,
    /// Nobody runs the tree in the end, without need.
    #[error("nobody runs the tree in the end")]
    NoRunner,
    /// Whoever runs it is not reached in the end.
    #[error("whoever runs the tree is not reached in the end")]
    Unreached,
    /// It does not come to an end.
    #[error("it does not come to an end")]
    Endless,
    /// A side had no answer to an event.
    #[error("a side had no answer to an event")]
    Illegal,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ending {
    /// The tree runs on the destination.
    Moved,
    /// It runs on the source.
    Stayed,
    /// The copy was let go and died: nothing may run, and `recover` says so.
    Undecided,
    /// The copy ran and was killed for want of memory: `--postcopy` alone.
    Lost,
}

/// A broken rule and where to find it again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("seed {seed}, effect {at}: {breach}")]
pub struct Failure {
    /// Replays the run.
    pub seed: u64,
    /// Effects until then.
    pub at: u32,
    /// What was broken.
    #[source]
    pub breach: Breach,
    /// The effects, oldest first; only of [`replay`].
    pub trace: Vec<String>,
}

/// Runs one seed.
///
/// # Errors
///
/// A rule was broken.
pub fn run(seed: u64, rules: &Rules) -> Result<Ending, Failure> {
    World::new(seed, rules, false).run()
}

/// The same, with a trace.
///
/// # Errors
///
/// As [`run`].
pub fn replay(seed: u64, rules: &Rules) -> Result<Ending, Failure> {
    World::new(seed, rules, true).run()
}

/// What many seeds came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that ended as [`Ending::Moved`].
    pub moved: u64,
    /// As [`Ending::Stayed`].
    pub stayed: u64,
    /// As [`Ending::Undecided`].
    pub undecided: u64,
    /// As [`Ending::Lost`].
    pub lost: u64,
}

/// Runs `runs` seeds from `first` on.
///
/// # Errors
///
/// The first failure, with its trace.
pub fn run_many(first: u64, runs: u64, rules: &Rules) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    for seed in (0..runs).map(|n| first.wrapping_add(n)) {
        match run(seed, rules) {
            Ok(Ending::Moved) => tally.moved += 1,
            Ok(Ending::Stayed) => tally.stayed += 1,
            Ok(Ending::Undecided) => tally.undecided += 1,
            Ok(Ending::Lost) => tally.lost += 1,
            Err(failure) => return Err(replay(seed, rules).err().unwrap_or(failure)),
        }
    }
    Ok(tally)
}
