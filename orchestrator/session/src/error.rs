//! What can go wrong in a migration, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use migrate_channel::ChannelError;
use migrate_core::Phase;
pub use migrate_core::chain;
use migrate_core::convergence::StopReason;
use migrate_core::policy::{self, NotAllowed};
use migrate_core::protocol::IllegalTransition;
use migrate_core::wire::{Message, PageOwner, WireError};
use migrate_criu::CriuError;
use migrate_gate::GateError;
use migrate_memory::{LazyError, MemoryError, StoreError};
use migrate_net::NetError;
use migrate_proc::ProcError;
use thiserror::Error;

use crate::destination::claims;
use crate::park::ParkError;

/// Why a migration ended without moving the tree.
#[derive(Debug, Error)]
pub enum Error {
    /// Processes, files, cgroups.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// Addresses and sockets.
    #[error(transparent)]
    Net(#[from] NetError),
    /// CRIU.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// CRIU did not accept the tree; it runs on as before.
    #[error("the dump was refused")]
    DumpRefused(#[source] CriuError),
    /// The gate.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// Reaching the other host or talking to it, before the tree was touched.
    #[error("could not reach the destination")]
    Connect(#[source] ChannelError),
    /// The connection to the other host, later on.
    #[error("the connection to {peer} failed")]
    Channel {
        /// The other host.
        peer: String,
        /// What happened to it.
        #[source]
        source: ChannelError,
    },
    /// The other host gave up and said why.
    #[error(transparent)]
    Peer(#[from] WireError),
    /// The other host closed the connection without a word.
    #[error("{peer} closed the connection before {awaited} came")]
    PeerGone {
        /// The other host.
        peer: String,
        /// What this side was waiting for.
        awaited: &'static str,
    },
    /// The other host was silent for too long.
    #[error("{awaited} did not come from {peer} within {} s", waited.as_secs())]
    PeerSilent {
        /// The other host.
        peer: String,
        /// What this side was waiting for.
        awaited: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// The other host sent something that has no meaning here.
    #[error("{peer} sent {got} while {awaited} was awaited")]
    Unexpected {
        /// The other host.
        peer: String,
        /// What came.
        got: String,
        /// What was awaited.
        awaited: &'static str,
    },
    /// The other host does not stop asking.
    #[error("{peer} asked more than {most} times whether its tree fits here")]
    TooManyQuestions {
        /// The other host.
        peer: String,
        /// Questions that a connection may ask.
        most: u32,
    },
    /// Preflight found a reason; the findings have been shown.
    #[error("{}", .0.join("; "))]
    Refused(Vec<String>),
    /// The memory of the tree and how it is followed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Rounds ended without their goal, and the user wanted no freeze then.
    #[error("pre-copy has not reached its goal: {reason}")]
    NotConverged {
        /// Why rounds ended.
        reason: StopReason,
    },
    /// The copy's memory is not the tree's.
    #[error("the copy's memory of {owner} is not the tree's")]
    NotTheSame {
        /// The task or segment.
        owner: PageOwner,
    },
    /// With `--verify`, memory that the source has sent no digest of.
    #[error(
        "the copy's memory of {owner} could not be compared: the source has sent no digest of it"
    )]
    NotCompared {
        /// The task or segment.
        owner: PageOwner,
    },
    /// The store of pages that came in rounds.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Memory that arrives while the copy runs.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// This host cannot do what the user insists on.
    #[error("memory cannot arrive while the copy runs here: {why}")]
    NotLazy {
        /// What is missing.
        why: String,
    },
    /// An earlier migration of this tree is not complete.
    #[error(
        "the memory that process {pid} had before its last migration is still being put in place"
    )]
    Arriving {
        /// A process of the tree.
        pid: i32,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Cancelled,
    /// The agent was told to stop, by a signal.
    #[error("the agent was told to stop")]
    Stopped,
    /// The other side asked to stop.
    #[error("cancelled by the source: {0}")]
    Aborted(String),
    /// The tree stood still for too long.
    #[error("the tree would have stood still for more than {} ms", limit.as_millis())]
    BlackoutLimit {
        /// The limit in force.
        limit: Duration,
    },
    /// What was checked is not what is there any more.
    #[error("{0}")]
    Changed(String),
    /// The tree lets connections wait that CRIU cannot carry.
    #[error(
        "the tree has not accepted {} at {listener} within {} ms",
        migrate_core::report::counted(*waiting as usize, "connection"),
        waited.as_millis()
    )]
    NotAccepted {
        /// Where they wait.
        listener: std::net::SocketAddr,
        /// How many.
        waiting: u32,
        /// How long the tree was given.
        waited: Duration,
    },
    /// CRIU announced something out of order.
    #[error("CRIU announced {got} while {awaited} was awaited")]
    OutOfOrder {
        /// What came.
        got: String,
        /// What was awaited.
        awaited: &'static str,
    },
    /// Another `migrate` moves this tree already.
    #[error("process {pid} is being migrated already")]
    Busy {
        /// The tree's root.
        pid: i32,
    },
    /// Another migration to this host came first.
    #[error("{}", .0.join("; "))]
    Claimed(Vec<String>),
    /// A second migration of the same name.
    #[error("a migration named {migration_id} has been here already")]
    NameTaken {
        /// The name that its source has given it.
        migration_id: String,
    },
    /// The policy of this agent does not allow the tree.
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    /// A policy that cannot be obeyed.
    #[error("could not use the policy {}", path.display())]
    Policy {
        /// Its file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A record that another side's verdict has closed.
    #[error("the source has taken the tree back")]
    Disowned,
    /// A directory to park in or to resume from.
    #[error(transparent)]
    Park(#[from] ParkError),
    /// A file of our own.
    #[error("could not {attempt} {}", path.display())]
    File {
        /// What was tried.
        attempt: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A defect of the driver.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// `Go` was sent and nothing proves what became of it.
    #[error("the destination may or may not run the tree")]
    Undecided(#[source] Box<Error>),
    /// With `--postcopy`: nothing proves that the copy got the memory that was
    /// still here.
    #[error(
        "{peer} runs the tree and has not said that it has all {pages} pages that were still here; a copy that lacks any is killed there, and the tree is lost"
    )]
    LostMemory {
        /// The other host.
        peer: String,
        /// Pages that were to go over after the commit.
        pages: u64,
        /// What happened to the connection.
        #[source]
        source: Box<Error>,
    },
    /// The destination owned the tree and could not run it.
    #[error("the destination took the tree over and then failed")]
    LostAfterCommit(#[source] Box<Error>),
}

impl Error {
    /// A way out, where there is one.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Proc(error) => error.help(),
            Self::Net(error) => error.help(),
            Self::Criu(error) | Self::DumpRefused(error) => error.help(),
            Self::Gate(error) => error.help(),
            Self::Memory(error) => error.help().map(str::to_owned),
            Self::Store(error) => error.help().map(str::to_owned),
            Self::Lazy(error) => error.help().map(str::to_owned),
            Self::NotLazy { .. } => Some("leave --restore lazy out".to_owned()),
            Self::Arriving { .. } => Some("wait until it is complete, then try again".to_owned()),
            Self::NotConverged { .. } => Some("lower --goal, raise --downtime-limit, --max-iterations or --timeout, or allow the freeze with --on-timeout freeze".to_owned()),
            Self::NotTheSame { .. } | Self::NotCompared { .. } => Some("this is a defect of migrate: please report it; `--engine full` moves the tree without pre-copy".to_owned()),
            Self::Park(error) => Some(error.help()),
            Self::Connect(error) => error.help(),
            Self::Channel { peer, source } => source.help().or_else(|| Some(check(peer))),
            Self::Peer(error) => error.help.clone().or_else(|| Some(see_log(&error.host))),
            Self::PeerGone { peer, .. } => Some(see_log(peer)),
            Self::PeerSilent { peer, .. } => Some(check(peer)),
            Self::BlackoutLimit { .. } => Some("check the network between the hosts; where it is only slow, allow more with `--max-blackout SECONDS`, or move the tree when it is smaller or less busy".to_owned()),
            Self::NotAccepted { .. } => Some("connections that were never accepted cannot be moved: see why the workload does not accept (a limit on its connections or descriptors, a worker that is stuck), then try again".to_owned()),
            Self::NotAllowed(_) => Some(policy::WAY_OUT.to_owned()),
            Self::Policy { .. } => Some("docs/threat-model.md describes the file; without one, everything is allowed".to_owned()),
            Self::Changed(_) => Some("try again".to_owned()),
            Self::Busy { .. } => Some("`migrate status` shows what is under way".to_owned()),
            Self::Claimed(_) => Some(claims::WAY_OUT.to_owned()),
            Self::NameTaken { .. } => Some("run the same command again: each attempt has a name of its own".to_owned()),
            Self::TooManyQuestions { .. } => Some("a source asks once; connect anew to ask again".to_owned()),
            Self::Unexpected { .. } | Self::OutOfOrder { .. } | Self::Illegal(_) => {
                Some("this is a defect of migrate: please report it with the output of `migrate -vv`".to_owned())
            }
            Self::Undecided(_) => Some("the source is fenced and does not run; `migrate recover` asks the destination again and does what follows from its answer".to_owned()),
            Self::LostMemory { peer, .. } => Some(format!("see on {peer} whether it runs (`migrate status`, and the log in /run/migrate/log); where it does not, start the workload anew")),
            Self::LostAfterCommit(_) => Some("the tree's last state is kept on the source, fenced; `migrate recover` there asks again who owns it".to_owned()),
            Self::Refused(_) | Self::Cancelled | Self::Stopped | Self::Aborted(_) | Self::Disowned | Self::File { .. } => None,
        }
    }

    /// The error and its causes in one line, joined by colons.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }

    /// The same for the other side, from `host`.
    pub(crate) fn as_message(&self, phase: Phase, host: String) -> Message {
        Message::Failed(WireError {
            phase,
            host,
            message: self.chain(),
            help: self.help(),
        })
    }

    /// For errors of files of our own.
    pub(crate) fn file(
        attempt: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            attempt,
            path,
            source,
        }
    }
}

/// Where a side that cannot say more has said it.
fn see_log(peer: &str) -> String {
    format!("see the agent's log on {peer} (`/run/migrate/log`), then try again")
}

/// What to do about a peer that was there and is not any more.
fn check(peer: &str) -> String {
    format!(
        "check that {peer} is up and that the network between the hosts works (`ping {peer}`), then try again"
    )
}
