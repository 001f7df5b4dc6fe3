//! What can go wrong with CRIU, and the way out.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use migrate_core::facts::CriuVersion;
use migrate_core::wire::PageOwner;
use thiserror::Error;

use crate::log::LogTail;

/// What CRIU was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Freeze a tree and write it down.
    Dump,
    /// Stop a tree for a moment and write down what has changed of its memory.
    PreDump,
    /// Make a tree from images.
    Restore,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dump => "dump",
            Self::PreDump => "pre-dump",
            Self::Restore => "restore",
        })
    }
}

/// A failure of this crate.
#[derive(Debug, Error)]
pub enum CriuError {
    /// No CRIU that is new enough was found.
    #[error("no usable criu was found: {}", found.join("; "))]
    NotFound {
        /// Each place that was looked at, with what is wrong there.
        found: Vec<String>,
    },
    /// The program named by `MIGRATE_CRIU` cannot be used.
    #[error("MIGRATE_CRIU names {}, which {problem}", path.display())]
    Override {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// `criu check` failed.
    #[error("criu check with {} failed: {}", path.display(), output.last().map_or("no output", |line| line.as_str()))]
    Check {
        /// The program.
        path: PathBuf,
        /// Its last lines.
        output: Vec<String>,
    },
    /// CRIU's own network lock cannot be used, or what it left not be removed.
    #[error("{} does not do what a network lock needs", program.display())]
    Lock {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// CRIU or its socket could not be started.
    #[error("could not start criu worker {}", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The worker does not answer as CRIU does.
    #[error("the criu worker did not introduce itself{}", first_of(stderr))]
    NoGreeting {
        /// What it wrote to its standard error.
        stderr: Vec<String>,
    },
    /// CRIU runs without the library that it was to load.
    #[error("the criu worker has not loaded the shim{}", first_of(stderr))]
    ShimNotLoaded {
        /// What it wrote to its standard error.
        stderr: Vec<String>,
    },
    /// A worker would answer for other marks than a tracked dump is to go by: one
    /// without the shim for the tracker's, one with it for the kernel's. A
    /// programming error.
    #[error("the criu worker asks the {} which pages are clean", if *shim { "tracker" } else { "kernel" })]
    Untracked {
        /// It has loaded the shim.
        shim: bool,
    },
    /// The kernel has no soft-dirty marks.
    #[error("the kernel does not mark soft-dirty pages (CONFIG_MEM_SOFT_DIRTY)")]
    NoSoftDirty,
    /// A tracked dump cannot be relied on here.
    #[error("criu cannot be trusted to leave out clean pages here: {why}")]
    SelfCheck {
        /// Which part of the check went wrong, and how.
        why: String,
    },
    /// Talking to CRIU failed.
    #[error("could not talk to criu during the {action}")]
    Socket {
        /// What was going on.
        action: Action,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// CRIU said nothing in time. It still does what it was doing.
    #[error("criu was silent for {} ms during the {action}", within.as_millis())]
    Silent {
        /// What was going on.
        action: Action,
        /// The limit.
        within: Duration,
    },
    /// CRIU reported a failure.
    #[error("criu {action} failed: {}", log.summary().unwrap_or("its log shows no error"))]
    Failed {
        /// What failed.
        action: Action,
        /// `cr_errno` of the answer; it stands for a few known causes only.
        errno: Option<i32>,
        /// The relevant lines of CRIU's log.
        log: LogTail,
    },
    /// CRIU ended without an answer.
    #[error("criu ended during the {action} ({}): {}", describe(*status), log.summary().unwrap_or("its log shows no error"))]
    Died {
        /// What was going on.
        action: Action,
        /// How it ended, if that is known.
        status: Option<ExitStatus>,
        /// The relevant lines of CRIU's log.
        log: LogTail,
    },
    /// A call that does not fit the state of the session: a programming error.
    #[error("{call} was called {state}")]
    OutOfTurn {
        /// The call.
        call: &'static str,
        /// Where the session stands.
        state: &'static str,
    },
    /// CRIU closed the page stream before it was complete.
    #[error("the page stream ended early, {what} was expected")]
    PageStreamEnded {
        /// What should have come.
        what: &'static str,
    },
    /// Nothing came on the page stream for too long.
    #[error("the page stream was silent for {} ms", idle.as_millis())]
    PageStreamSilent {
        /// The limit.
        idle: Duration,
    },
    /// The page stream could not be read or answered.
    #[error("could not use the page stream")]
    PageStream {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The page stream does not follow the protocol, or not in this version's layout.
    #[error("unexpected data in criu's page stream: {what} {value:#x}")]
    PageProtocol {
        /// Which part.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Whoever takes the pages refused them.
    #[error("pages could not be handed on")]
    Sink {
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Images must not touch a disk.
    #[error("{} is not on a tmpfs", path.display())]
    NotTmpfs {
        /// The directory.
        path: PathBuf,
    },
    /// The tmpfs that holds the images is full.
    #[error("no space left for images in {}", path.display())]
    ImageSpace {
        /// The file that was written.
        path: PathBuf,
        /// `ENOSPC` or `EDQUOT`.
        #[source]
        source: io::Error,
    },
    /// An image file or directory could not be used.
    #[error("could not {doing} {}", path.display())]
    Image {
        /// The attempt.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Pages or images that do not make a valid set.
    #[error("invalid image data: {what}")]
    ImageData {
        /// Which rule was broken, with the object.
        what: String,
    },
    /// A page that the dump has left out because it was copied before is not
    /// among the copies.
    #[error("the page of {owner:?} at {vaddr:#x} was left out of the dump and is not in store")]
    PageMissing {
        /// Whose page.
        owner: PageOwner,
        /// Its address.
        vaddr: u64,
        /// What the store says, if it says anything.
        #[source]
        source: Option<io::Error>,
    },
    /// Pages of one owner did not come in ascending order.
    #[error("pages of {owner:?} out of order: {vaddr:#x} after {previous_end:#x}")]
    PageOrder {
        /// Whose pages.
        owner: PageOwner,
        /// First address of the run.
        vaddr: u64,
        /// End of the run before it.
        previous_end: u64,
    },
}

fn first_of(lines: &[String]) -> String {
    lines
        .first()
        .map_or_else(String::new, |line| format!(": {line}"))
}

fn describe(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "still closing".to_owned(), |status| status.to_string())
}

impl CriuError {
    /// The way out, where one is known.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NotFound { .. } => Some(format!(
                "run `scripts/setup`, or set MIGRATE_CRIU to a criu {} or newer",
                CriuVersion::OLDEST_SUPPORTED
            )),
            Self::Override { .. } => Some(format!(
                "set MIGRATE_CRIU to a criu {} or newer, or unset it",
                CriuVersion::OLDEST_SUPPORTED
            )),
            Self::Check { path, .. } => Some(format!(
                "run `{} check` to see what this kernel lacks",
                path.display()
            )),
            Self::Lock { .. } => Some(
                "use the gate, which needs no program: leave `--network-lock` out".to_owned(),
            ),
            Self::ShimNotLoaded { .. } | Self::SelfCheck { .. } | Self::NoSoftDirty => {
                Some("choose another way to copy memory: `--engine full`".to_owned())
            }
            Self::NotTmpfs { .. } => {
                Some("name a directory on a tmpfs, such as /run or /dev/shm".to_owned())
            }
            Self::ImageSpace { .. } => Some(
                "free memory, or make the tmpfs larger: `mount -o remount,size=BYTES DIR`"
                    .to_owned(),
            ),
            Self::Sink { .. } => Some(
                "check the network between the hosts and the agent's log (`/run/migrate/log`) on the other one, then try again".to_owned(),
            ),
            Self::Failed { log, .. } | Self::Died { log, .. } => log.advice(),
            Self::Start { .. }
            | Self::NoGreeting { .. }
            | Self::Socket { .. }
            | Self::Silent { .. }
            | Self::OutOfTurn { .. }
            | Self::Untracked { .. }
            | Self::PageMissing { .. }
            | Self::PageStreamEnded { .. }
            | Self::PageStreamSilent { .. }
            | Self::PageStream { .. }
            | Self::PageProtocol { .. }
            | Self::Image { .. }
            | Self::ImageData { .. }
            | Self::PageOrder { .. } => None,
        }
    }

    /// The relevant lines of CRIU's log, when CRIU itself failed.
    #[must_use]
    pub fn log(&self) -> Option<&LogTail> {
        match self {
            Self::Failed { log, .. } | Self::Died { log, .. } => Some(log),
            _ => None,
        }
    }

    /// An error on a file of an image directory; a full file system is told apart.
    pub(crate) fn image(doing: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::ImageSpace { path, source },
            _ => Self::Image {
                doing,
                path,
                source,
            },
        }
    }
}
