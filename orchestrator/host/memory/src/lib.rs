//! The memory of a running process tree, copied while it runs.
//!
//! Source: [`Precopy`] finds the pages that changed since its last round and
//! hands them to a [`PageSink`]. Nothing is frozen; one thread of each process
//! stands still once, for well under a millisecond. [`probe`] says whether this
//! host can do that; where it cannot, [`ContentPrecopy`] compares content.
//!
//! Destination: [`PageStore`] keeps the pages, the latest of each, until CRIU's
//! final list says which of them count, and [`LazyServer`] puts them in place
//! while the copy runs.
//!
//! ```text
//! tree --PAGEMAP_SCAN, process_vm_readv--> Precopy --PageSink--> ... --> PageStore --> LazyServer --> copy
//! ```
//!
//! # What is kept true
//!
//! The kernel's marks in the page tables are the only account of what has
//! changed. A page is marked clean only between a scan and the moment the sink
//! has taken its content; whatever ends a round early (an error, a future that
//! is dropped, a page that cannot be read) marks it dirty again. Memory the
//! tracker does not watch is never clean. So a final dump that asks these
//! marks, as CRIU does through our shim, can trust every page it finds clean
//! to have been handed on with the content it still has.
//!
//! Shared segments have no such account: they are compared by content.
//!
//! Known exception: a device that writes to pages pinned earlier leaves no
//! mark. Processes that show signs of that are not tracked at all
//! ([`UntrackedReason::Pinned`]).

mod arena;
mod code;
mod content;
mod digests;
mod error;
mod frozen;
#[cfg(target_arch = "x86_64")]
mod inject;
#[cfg(not(target_arch = "x86_64"))]
#[path = "inject_unsupported.rs"]
mod inject;
mod known;
mod lazy;
mod maps;
mod mask;
mod pagemap;
mod probe;
mod process;
mod rounds;
mod segments;
mod store;
mod sys;
#[cfg(target_arch = "x86_64")]
mod trace;
mod tree;

pub use arena::unswapped;
pub use code::{code_pages, read_page};
pub use content::ContentPrecopy;
pub use digests::{Listed, digests};
pub use error::{MemoryError, RoundError, StoreError, Unsupported, UntrackedReason};
pub use frozen::{FrozenMemory, FrozenPages, TaskRanges};
pub use inject::Injection;
pub use known::alike;
#[doc(hidden)]
pub use lazy::{Death, keep_until};
pub use lazy::{
    Keeper, LATE_LIMIT, LatePages, LazyError, LazyOptions, LazyReport, LazyServer, LazyServing,
    keep, probe_lazy,
};
pub use mask::SomePages;
pub use probe::{Support, probe, probe_soft_dirty};
pub use rounds::{
    Limits, Markable, PageSink, Precopy, ProcessStatus, RUN_PAGES_MAX, RoundStats, TrackingState,
    hand_on, markable, vdso,
};
pub use segments::{FrozenRun, FrozenSegments};
pub use store::{Content, Held, Holding, MemoryDigest, PageStore, Piece};

/// The size of a page.
pub(crate) const PAGE: u64 = migrate_core::wire::PAGE_BYTES as u64;

/// A page of zeros, to compare with.
pub(crate) static ZERO_PAGE: [u8; migrate_core::wire::PAGE_BYTES] =
    [0; migrate_core::wire::PAGE_BYTES];
