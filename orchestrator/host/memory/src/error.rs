//! What can go wrong with a tree's memory, and the way out.

use std::io;
use std::time::Duration;

use migrate_core::wire::PageOwner;
use thiserror::Error;

/// Why this host cannot track memory with userfaultfd.
#[derive(Debug, Error)]
pub enum Unsupported {
    /// The injection is written for another architecture.
    #[error("memory tracking is written for x86_64 only")]
    Architecture,
    /// No userfaultfd could be made.
    #[error("userfaultfd is not available")]
    Userfaultfd {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Asynchronous write protection came with Linux 6.7.
    #[error("userfaultfd knows no asynchronous write protection, which came with Linux 6.7")]
    WpAsync {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `PAGEMAP_SCAN` came with Linux 6.7.
    #[error("the PAGEMAP_SCAN request is not available, it came with Linux 6.7")]
    PagemapScan {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The pagemap cannot be read.
    #[error("/proc/self/pagemap cannot be read")]
    Pagemap {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel was built without these marks.
    #[error("the kernel does not mark soft-dirty pages (CONFIG_MEM_SOFT_DIRTY)")]
    NoSoftDirty,
    /// A trial on a page of our own gave something else than it must.
    #[error("dirty tracking of a page of our own went wrong: {what}")]
    Trial {
        /// What was seen.
        what: &'static str,
    },
}

/// Why one process is not tracked. Its memory moves while the tree is frozen;
/// the process runs on unharmed.
#[derive(Debug, Error)]
pub enum UntrackedReason {
    /// A debugger or another tracer holds it.
    #[error("it is traced by process {tracer}")]
    Traced {
        /// PID of the tracer.
        tracer: i32,
    },
    /// The injection is written for another architecture.
    #[error("memory tracking is written for x86_64 only")]
    Architecture,
    /// It does not run 64-bit code.
    #[error("it runs 32-bit code")]
    Compat,
    /// No `syscall` instruction is mapped at a known place.
    #[error("it has no vDSO with a syscall instruction")]
    NoVdso,
    /// No thread could be stopped in time.
    #[error("none of its {threads} threads could be stopped within {waited:?}")]
    Busy {
        /// Threads looked at.
        threads: usize,
        /// How long was waited for one of them.
        waited: Duration,
    },
    /// `ptrace` refused.
    #[error("could not {attempt} thread {tid}")]
    Ptrace {
        /// What was asked for.
        attempt: &'static str,
        /// Of which thread.
        tid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The thread stopped in a way that is not understood.
    #[error("thread {tid} stopped unexpectedly, with status {status:#x}")]
    Stop {
        /// Which thread.
        tid: i32,
        /// What the kernel reported.
        status: i32,
    },
    /// A system call inside the process failed.
    #[error("{call} inside the process failed")]
    Inside {
        /// Which system call.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor made inside could not be fetched.
    #[error("could not fetch the userfaultfd made inside the process")]
    Fetch {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The userfaultfd refused asynchronous write protection.
    #[error("could not set up the userfaultfd made inside the process")]
    Api {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Devices may write to its pages without a fault.
    #[error("{what}: a device may write to its memory unseen")]
    Pinned {
        /// How it was recognised.
        what: &'static str,
    },
    /// It shares its memory with its parent, as after `vfork`.
    #[error("it shares its memory with process {with}")]
    SharedMemory {
        /// The other process.
        with: i32,
    },
}

/// A failure of this crate.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The root of the tree does not exist any more.
    #[error("process {pid} is gone")]
    Gone {
        /// Its PID.
        pid: i32,
    },
    /// A file of /proc could not be read.
    #[error("could not read {path}")]
    Proc {
        /// Which file.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of /proc does not have the form that is documented.
    #[error("{path} has an unexpected line: {line}")]
    Format {
        /// Which file.
        path: String,
        /// The line.
        line: String,
    },
    /// More processes than can be followed.
    #[error("the tree has more than {limit} processes")]
    TooManyProcesses {
        /// The limit.
        limit: usize,
    },
    /// The kernel refused to tell which pages changed.
    #[error("could not scan the memory of process {pid} at {vaddr:#x}")]
    Scan {
        /// Which process.
        pid: i32,
        /// Where.
        vaddr: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to read pages.
    #[error("could not read the memory of process {pid} at {vaddr:#x}")]
    Read {
        /// Which process.
        pid: i32,
        /// Where.
        vaddr: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// This machine cannot track memory.
    #[error("dirty pages cannot be tracked here")]
    Unsupported {
        /// Why not.
        #[source]
        source: Unsupported,
    },
    /// CRIU's list of pages has more runs than are kept for a comparison.
    #[error("the tree's memory lies in more than {limit} pieces, too many to compare")]
    TooManyRuns {
        /// The limit.
        limit: usize,
    },
    /// Nobody waits for the result any longer.
    #[error("stopped")]
    Stopped,
}

impl MemoryError {
    /// The way out, when there is one.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        match self {
            Self::TooManyProcesses { .. } => {
                Some("move a smaller tree, or stop what forks without an end")
            }
            Self::Unsupported { .. } => Some("choose another engine; `full` works everywhere"),
            Self::TooManyRuns { .. } => Some("migrate without --verify"),
            Self::Gone { .. } => {
                Some("it ended while it was copied: see its own log, and why it ended")
            }
            Self::Stopped
            | Self::Proc { .. }
            | Self::Format { .. }
            | Self::Scan { .. }
            | Self::Read { .. } => None,
        }
    }
}

/// A round that ended early. The kernel's account of dirty pages is intact:
/// what was not delivered counts as dirty again.
#[derive(Debug, Error)]
pub enum RoundError<E: std::error::Error + 'static> {
    /// Reading the tree's memory failed.
    #[error("could not copy the memory of the running tree")]
    Memory {
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// Pages were not taken. Pages that the sink took earlier may be lost with
    /// it: a new attempt starts with a new [`Precopy`](crate::Precopy).
    #[error("could not hand on pages")]
    Sink {
        /// Why not.
        #[source]
        source: E,
    },
}

impl<E: std::error::Error + 'static> From<MemoryError> for RoundError<E> {
    fn from(source: MemoryError) -> Self {
        Self::Memory { source }
    }
}

/// Why the page store did not take pages.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The bound on memory is reached.
    #[error("page store is full: {limit_bytes} bytes are allowed")]
    Full {
        /// The bound.
        limit_bytes: u64,
    },
    /// The kernel has no memory for it.
    #[error("no memory for the page store: {why}")]
    NoMemory {
        /// What the kernel said.
        why: String,
    },
    /// A run without data that does not say its pages are zero.
    #[error("pages at {vaddr:#x} of {owner:?} came without data")]
    NoData {
        /// Whose pages.
        owner: PageOwner,
        /// The first of them.
        vaddr: u64,
    },
    /// The data is not as long as the run says, or its address is impossible.
    #[error("malformed run of {pages} pages at {vaddr:#x} of {owner:?}")]
    Malformed {
        /// Whose pages.
        owner: PageOwner,
        /// The first of them.
        vaddr: u64,
        /// How many.
        pages: u64,
    },
}

impl StoreError {
    /// The way out, when there is one.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        match self {
            Self::Full { .. } => Some(
                "the tree has grown since the migration began: migrate again when it grows less; \
                 where the destination's policy has `memory_mib_max`, that is a bound too",
            ),
            Self::NoMemory { .. } => Some("free memory on the destination, then try again"),
            Self::NoData { .. } | Self::Malformed { .. } => None,
        }
    }
}
