//! A host's network as a migration needs it: its addresses, its sockets, and
//! the move of an address from one host to another.
//!
//! ```text
//!   source                              destination
//!   survey: what the tree uses   ---->  compare: where it can go
//!                                       stage: address there, unannounced
//!                     ===== commit =====
//!   withdraw                            announce, announce_again
//!   (restore, if it comes to nothing)   (unstage, if it comes to nothing)
//! ```
//!
//! Everything goes through netlink and one packet socket, and always in the
//! network namespace of the calling thread. The rules themselves stand in
//! [`rules`] and make no system call.

mod announce;
mod classify;
mod diag;
mod ending;
mod error;
mod route;
pub mod rules;
mod survey;

pub use announce::{FOLLOW_UPS_MS, announce, announcement_frames};
pub use diag::{
    SocketKind, TcpSocket, TcpState, UdpSocket, UnixKind, UnixSocket, mptcp_inodes, other_sockets,
    tcp_sockets, udp_sockets, unix_sockets,
};
pub use ending::{EndedFlows, Unsettled, ended, remove_closed, unsettled};
pub use error::NetError;
pub use route::{Address, Interface, Net, Placement, Staged, Withdrawn};
pub use survey::{SurveyOptions, TreeSockets, compare, compare_in_place, survey, tree_flows};
