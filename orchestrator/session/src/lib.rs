//! The driver of a migration: phases in order, every effect beside its undo.
//!
//! ```text
//!            source/                          destination/
//!  preflight   examine the tree      ------->   compare with this host
//!  track       attach the gate, open
//!  prepare     fence, CRIU warm      ------->   gate closed, address staged, CRIU warm
//!  freeze      close the gate, CRIU seizes
//!  dump        pages and images      ------->   receive
//!  restore                                      restore, hold before the first instruction
//!  handover    record, fence, Go     ------->   record Owned            == the commit ==
//!  takeover                                     announce, open the gate, run
//!  finish      remove the frozen tree
//! ```
//!
//! The source's side is [`source::migrate`], the destination's
//! [`destination::serve`]. Only this crate knows all adapters.

pub mod cancel;
pub mod destination;
pub mod error;
mod inbox;
pub mod journal;
pub mod progress;
pub mod source;
pub mod state;
pub mod sweep;

pub use cancel::Cancel;
pub use error::Error;
pub use progress::{Progress, Reporter};
pub use state::State;

/// Who this process is, for the hello of a connection.
#[must_use]
pub fn hello(migration_id: &str) -> migrate_core::wire::Hello {
    migrate_core::wire::Hello {
        protocol: migrate_core::wire::PROTOCOL_VERSION,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: hostname(),
        migration_id: migration_id.to_owned(),
    }
}

/// `uname -n`.
#[must_use]
pub fn hostname() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "this host".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Packets of the tree that a gate has dropped, in both directions.
fn dropped_packets(counted: &migrate_gate::Counters) -> u64 {
    counted.ingress_dropped_packets + counted.egress_dropped_packets
}
