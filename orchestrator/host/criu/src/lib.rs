//! CRIU as the freezer and the thawer of a migration.
//!
//! CRIU is driven by its own RPC. A [`Worker`] is a `criu swrk` that has
//! started and waits; one order turns it into a [`Session`], which reports the
//! moments of a dump or a restore and waits for an answer at each.
//!
//! ```text
//! source                                     destination
//!   locate, warm, worker                       locate, warm, worker
//!   Worker::dump
//!   PreDump            serve_pages starts
//!   [NetworkLock]      frozen: close the gate
//!   QueryExtFiles      frozen: close the gate
//!     page stream  ->  PageSink  ->  channel ->  ImageDir::pages
//!     PageSink::close: all have arrived
//!   PostDump           small_images ---------->  ImageDir::image_piece, finish
//!     |                                        Worker::restore
//!     |                                        PreRestore
//!     |                                        PostRestore   complete, has not run
//!     |                                          |
//!   =====================  the commit  =====================
//!   answer(true)                               answer(true)
//!   Finished(Dumped)   the tree is dead        [NetworkUnlock]
//!                                              PreResume     out of repair mode
//!                                              PostResume    it runs
//!                                              Finished(Restored)
//! ```
//!
//! Before the commit `answer(false)` undoes everything on either side, and
//! [`Outcome::Refused`] says that this is done. Whatever else happens to the
//! caller by then, a panic or the end of the process, closes CRIU's socket,
//! which CRIU takes for `false`. CRIU itself is never killed while it holds a
//! tree: the tree would run on with its sockets in repair mode, unless it was
//! fenced.
//!
//! The network lock is the caller's, unless [`DumpOptions::lock`] says
//! otherwise: CRIU runs with `skip`. cgroups are the
//! caller's as well: CRIU ignores them, and what is restored lives in the
//! worker's cgroup ([`WorkerOptions::cgroup`]). The restored root becomes a
//! child of the nearest reaper above the caller. CRIU's configuration files
//! are not read.
//!
//! Memory that was copied before the dump need not travel again. A worker with
//! a library of ours in it ([`WorkerOptions::shim`]) dumps with
//! [`DumpOptions::track`]: pages that the tracker knows to be clean come as runs
//! with the flag [`PARENT`] and without data, and [`ImageDir::gap`] and
//! [`ImageDir::fill`] put there what the destination has in store.
//! [`Criu::self_check_shim`] proves beforehand that this works. Where the kernel
//! has soft-dirty marks ([`Worker::check_soft_dirty`]), [`Worker::pre_dump`] copies
//! by them and the dump goes by them too: [`Marks`].
//!
//! Nor need it be in place before the copy runs: an [`ImageDir::lazy`] leaves
//! out what can wait, and [`RestoreOptions::lazy`] makes CRIU leave the faults
//! to whoever listens in the image directory. Such a directory is of no use to
//! any other restore: what was left out would be zeros.
//!
//! A restore that is parked ([`Worker::park`]) has done all that needs no image
//! before the first image comes.
//!
//! Images hold the memory of a process, so they stand on a tmpfs unless the user
//! has named a place ([`ImageDir::create_on_disk`]), and an [`ImageDir`] removes
//! itself.

mod breakpoints;
mod error;
mod images;
mod locate;
mod lock;
mod log;
mod mappings;
mod offsets;
mod pages;
mod park;
mod rpc;
mod rseq;
mod session;
mod shim;
pub mod stdio;
mod worker;

pub use error::{Action, CriuError};
#[doc(hidden)]
pub use images::read_any_image;
pub use images::{
    Filler, ImageDir, ImageStats, SmallImage, StoredRun, guard_in_locked, small_images, stored_runs,
};
pub use locate::{Criu, OVERRIDE, PRIVATE_PATH, locate};
pub use lock::NetworkLock;
pub use log::LogTail;
pub use mappings::{Held, held};
pub use pages::{PARENT, PIECE_PAGES_MAX, PageSink, PageSocket, PageStats, serve_pages};
pub use park::{ParkedRestore, dismiss_parked};
#[doc(hidden)]
pub use rpc::reencoded_answer;
pub use rseq::rseq_areas;
pub use session::{Notice, Outcome, Session};
pub use worker::{
    DumpOptions, Marks, PreDumpOptions, RestoreOptions, Track, Worker, WorkerOptions,
};
