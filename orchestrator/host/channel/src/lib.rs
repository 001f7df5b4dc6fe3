//! The channel between source and destination.
//!
//! Whatever leaves a host is inside TLS 1.3 with a certificate on both sides;
//! there is no other path. Two ways lead to a [`Connection`]:
//!
//! ```text
//! source: connect(Ssh)                        destination: serve_stdio
//!   one-time certificate, in memory
//!   ssh HOST migrate agent --stdio  ------->  reads one line of JSON from stdin
//!   {protocol, release, certificate} ------>  one-time certificate, listens on
//!                                             the address that SSH came to
//!                                  <------    {protocol, release, addresses, certificate}
//!   TCP, TLS 1.3, each side accepts nothing but the other's very certificate
//!   Hello                          ------->
//!                                  <------    Hello
//!                                             lets go of stdin, stdout and SSH
//!
//! source: connect(Tls)                        destination: StandingAgent::accept
//!   TCP, TLS 1.3, both certificates signed by the given authority
//!   Hello                          ------->
//!                                  <------    Hello
//! ```
//!
//! For pages there can be further connections ([`Further`]), which go the same
//! way; the frames then travel over all of them in turn.
//!
//! After that both sides exchange the frames of [`migrate_core::wire`] through
//! [`Sender`] and [`Receiver`]. Every wait has a deadline, every length a bound
//! that is checked before anything is allocated.

mod agent;
mod bootstrap;
mod connect;
mod connection;
mod error;
mod frame;
mod further;
mod lanes;
mod ssh;
mod tls;

#[cfg(test)]
mod tests;

pub use agent::{StandingAgent, serve_stdio};
pub use connect::{Destination, TlsFiles, connect};
pub use connection::{Connection, Peer, Receiver, Sender};
pub use error::{ChannelError, PeerVersion};
pub use frame::{Frame, STALL_LIMIT};
pub use further::{Expected, Further, Lane};
pub use lanes::{StreamOptions, StreamStats};
pub use ssh::{REMOTE_COMMAND_VARIABLE, SshSession};
