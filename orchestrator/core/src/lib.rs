//! What a migration is, without the machine it runs on.
//!
//! The protocol of both sides as tables, when pre-copy ends, the messages between
//! source and destination, the facts that preflight compares, and the report a user
//! reads. Nothing here makes a system call, reads a clock or knows an adapter.

pub mod blackout;
pub mod convergence;
mod error;
pub mod facts;
pub mod flow;
pub mod journal;
pub mod kernel;
pub mod late;
pub mod pace;
pub mod parked;
pub mod phase;
pub mod policy;
pub mod preflight;
pub mod protocol;
pub mod report;
pub mod stream;
pub mod timeline;
pub mod tracked;
pub mod unit;
pub mod wire;

pub use error::chain;
pub use flow::{Flow, Listener};
pub use phase::Phase;
