//! What the kernel programs and user space share.
//!
//! The programs themselves only fetch bytes, look into maps and return
//! verdicts; everything that can be decided without the kernel is decided
//! here, so that it is tested on the host, byte by byte:
//!
//! ```text
//!   bytes --parse--> Parsed --judge(state, maps)--> Judgement --hook--> verdict
//! ```
//!
//! [`key`] holds the map keys, [`parse`] the bounded packet reader, [`state`]
//! the control record that user space writes, [`track`] what is remembered of
//! a flow, and [`judge`] the decision.

#![cfg_attr(not(test), no_std)]

pub mod judge;
pub mod key;
pub mod mapping;
pub mod parse;
pub mod state;
pub mod track;

pub use judge::{Judgement, World, judge};
pub use key::{FlowKey, ListenerKey};
pub use parse::{Direction, Layer2, Packet, Parsed, parse};
pub use state::{Control, Counters, Ended, LAYOUT_VERSION, Mode, Route, State};
pub use track::{Fate, FlowRecord, Segment, Way};

/// The mark that CRIU puts on the packets it forges while it restores
/// half-closed sockets (`SOCCR_MARK` of CRIU's libsoccr). Such packets pass.
pub const EXEMPT_MARK: u32 = 0xC114;
