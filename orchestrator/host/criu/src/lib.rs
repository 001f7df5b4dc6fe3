//! CRIU as the freezer and the thawer of a migration.
//!
//! CRIU is driven by its own RPC: a *worker* is a `criu swrk` that has started
//! and waits; one order turns it into a *session*, which reports the moments
//! of a dump or restore and waits for an answer at each.

mod error;
mod images;
mod locate;
mod log;
mod pages;
mod rpc;
mod session;
pub mod stdio;
mod worker;

pub use error::{Action, CriuError};
pub use images::{ImageDir, ImageStats, SmallImage, small_images};
pub use locate::{Criu, OVERRIDE, PRIVATE_PATH, locate};
pub use log::LogTail;
pub use pages::{PIECE_PAGES_MAX, PageSink, PageStats, serve_pages};
pub use session::{Notice, Outcome, Session};
pub use worker::{DumpOptions, RestoreOptions, Worker, WorkerOptions};
