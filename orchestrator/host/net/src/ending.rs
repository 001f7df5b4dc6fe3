//! Connections that are beginning or ending: what no process of the tree
//! holds, and CRIU therefore does not carry.
//!
//! A handshake in progress, a connection that waits to be accepted, and one
//! that was closed while its last bytes were under way all live in the kernel
//! of their host alone. They are given time to come to their end there.

use std::net::{IpAddr, SocketAddr};

use migrate_core::flow::{Flow, Listener, canonical};

use crate::diag::{TcpSocket, TcpState, destroy, tcp_sockets_in};
use crate::error::NetError;
use crate::rules;

/// Bits of the kernel's states (`include/net/tcp_states.h`): SYN_RECV,
/// FIN_WAIT1, LAST_ACK, CLOSING, NEW_SYN_RECV.
const UNSETTLED_STATES: u32 = 1 << 3 | 1 << 4 | 1 << 9 | 1 << 11 | 1 << 12;
const LISTEN: u32 = 1 << 10;
/// FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING.
const CLOSED_STATES: u32 = 1 << 4 | 1 << 5 | 1 << 9 | 1 << 11;
const TIME_WAIT: u32 = 1 << 6;

/// What is under way at a tree's addresses and would be lost with its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unsettled {
    /// Handshakes in progress.
    pub handshakes: usize,
    /// Listeners with connections that wait to be accepted, and how many.
    pub unaccepted: Vec<(SocketAddr, u32)>,
    /// Closed connections whose peers have not acknowledged everything.
    pub closing: Vec<Flow>,
    /// The bytes that those peers have not acknowledged.
    pub unsent_bytes: u64,
}

impl Unsettled {
    /// Nothing is under way.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.handshakes == 0 && self.unaccepted.is_empty() && self.closing.is_empty()
    }
}

/// Connections that nobody holds any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndedFlows {
    /// Their peers may close them at any time yet.
    pub open: Vec<Flow>,
    /// Their peers have closed them, too.
    pub over: Vec<Flow>,
}

/// The connections at these addresses that nobody holds any more.
///
/// # Errors
///
/// The kernel does not list its sockets.
pub fn ended(addresses: &[IpAddr]) -> Result<EndedFlows, NetError> {
    Ok(ended_of(
        &tcp_sockets_in(CLOSED_STATES | TIME_WAIT)?,
        addresses,
    ))
}

pub(crate) fn ended_of(sockets: &[TcpSocket], addresses: &[IpAddr]) -> EndedFlows {
    let mut ended = EndedFlows::default();
    for socket in sockets.iter().filter(|s| is_forsaken(s, addresses)) {
        let flow = Flow::new(socket.local, socket.remote);
        match socket.state {
            TcpState::FinWait1 | TcpState::FinWait2 => ended.open.push(flow),
            TcpState::LastAck | TcpState::Closing | TcpState::TimeWait => ended.over.push(flow),
            // In CLOSE_WAIT it still waits to be accepted; the rest is alive.
            TcpState::Established
            | TcpState::SynSent
            | TcpState::SynRecv
            | TcpState::Close
            | TcpState::CloseWait
            | TcpState::Listen
            | TcpState::Bound => {}
        }
    }
    ended
}

/// What is under way at these listeners and, where no process holds it any
/// more, at these addresses.
///
/// # Errors
///
/// The kernel does not list its sockets.
pub fn unsettled(listeners: &[Listener], addresses: &[IpAddr]) -> Result<Unsettled, NetError> {
    let mut found = Unsettled::default();
    for socket in tcp_sockets_in(UNSETTLED_STATES)? {
        if socket.state == TcpState::SynRecv {
            let local = canonical(socket.local);
            let is_tree = listeners
                .iter()
                .any(|l| rules::collide(local, false, l.local, l.v6only));
            found.handshakes += usize::from(is_tree);
        } else if is_closing(&socket, addresses) {
            found.closing.push(Flow::new(socket.local, socket.remote));
            // The end itself counts for one.
            found.unsent_bytes += u64::from(socket.wqueue.saturating_sub(1));
        }
    }
    // After handshakes: one that has ended meanwhile waits here, or is the tree's.
    for socket in tcp_sockets_in(LISTEN)? {
        let local = canonical(socket.local);
        let is_tree = listeners
            .iter()
            .any(|l| l.local == local && l.v6only == socket.v6only);
        if is_tree && socket.rqueue > 0 {
            found.unaccepted.push((local, socket.rqueue));
        }
    }
    Ok(found)
}

/// Removes the closed connections at these addresses, which this host has no
/// longer. The gate has to be closed for them: an RST may be sent for each.
/// Returns how many were removed.
///
/// # Errors
///
/// The kernel does not list its sockets. One that it cannot remove is left to
/// end by itself.
pub fn remove_closed(addresses: &[IpAddr]) -> Result<usize, NetError> {
    let closed = tcp_sockets_in(CLOSED_STATES | TIME_WAIT)?;
    let mut removed = 0;
    for socket in closed.iter().filter(|s| is_forsaken(s, addresses)) {
        match destroy(socket) {
            Ok(()) => removed += 1,
            Err(error) => tracing::debug!(%error, local = %socket.local, remote = %socket.remote,
                "a closed connection is left to end by itself"),
        }
    }
    Ok(removed)
}

/// Closed by its holder, and not acknowledged in full.
pub(crate) fn is_closing(socket: &TcpSocket, addresses: &[IpAddr]) -> bool {
    matches!(
        socket.state,
        TcpState::FinWait1 | TcpState::LastAck | TcpState::Closing
    ) && is_forsaken(socket, addresses)
}

/// Nobody holds it, and it is at one of the addresses.
pub(crate) fn is_forsaken(socket: &TcpSocket, addresses: &[IpAddr]) -> bool {
    socket.inode == 0 && addresses.contains(&socket.local.ip().to_canonical())
}
