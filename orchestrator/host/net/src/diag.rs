//! The host's sockets, from the kernel's `sock_diag` interface.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{DecodeError, Emitable, Parseable};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla,
};
use netlink_packet_sock_diag::unix::{
    ShowFlags, StateFlags as UnixStateFlags, UnixRequest, UnixResponse,
    nlas::{Nla as UnixNla, UnixDiagName},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::NetError;

/// `SOCK_DIAG_BY_FAMILY`, linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `TCPDIAG_GETSOCK`, linux/inet_diag.h: TCP sockets of both families.
const TCPDIAG_GETSOCK: u16 = 18;
/// `SOCK_DESTROY`, linux/sock_diag.h.
const SOCK_DESTROY: u16 = 21;
/// `NLM_F_REQUEST | NLM_F_ACK`, linux/netlink.h.
const REQUEST_ACK: u16 = 0x0005;
/// `NLMSG_ERROR` and `NLMSG_DONE`, linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`, linux/netlink.h.
const REQUEST_DUMP: u16 = 0x0301;
/// `sizeof(struct nlmsghdr)`.
const HEADER_BYTES: usize = 16;
/// A dump's datagram is at most 32 KiB (`netlink_recvmsg` caps it there).
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// More sockets than one host can have file descriptors by default (`fs.nr_open`
/// times a few), so that a defective reply cannot grow without limit.
const SOCKETS_MAX: usize = 4 << 20;
/// The kernel answers a dump from memory; seconds mean that it never will.
const ANSWER_LIMIT_MS: i64 = 5000;
/// `INET_DIAG_REQ_PROTOCOL`, linux/inet_diag.h: protocols beyond 255.
const INET_DIAG_REQ_PROTOCOL: u16 = 3;
/// `IPPROTO_MPTCP`, linux/in.h.
pub(crate) const IPPROTO_MPTCP: u32 = 262;
/// `IPPROTO_RAW`, by which `raw_diag` lists raw sockets of every protocol.
const IPPROTO_RAW: u8 = 255;

/// States of a TCP socket (`include/net/tcp_states.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TcpState {
    /// Both directions open.
    Established,
    /// Connecting.
    SynSent,
    /// A handshake in progress at a listener.
    SynRecv,
    /// Closed by us, FIN not acknowledged.
    FinWait1,
    /// Closed by us, peer still open.
    FinWait2,
    /// Both closed, waiting for stragglers.
    TimeWait,
    /// Neither bound to a peer nor listening.
    Close,
    /// Closed by the peer.
    CloseWait,
    /// Closed by the peer, then by us.
    LastAck,
    /// Accepting connections.
    Listen,
    /// Closed by both at once.
    Closing,
    /// Bound to an address and nothing more.
    Bound,
}

impl TcpState {
    fn from_kernel(state: u8) -> Self {
        match state {
            1 => Self::Established,
            2 => Self::SynSent,
            3 | 12 => Self::SynRecv,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            13 => Self::Bound,
            _ => Self::Close,
        }
    }

    /// The name that `ss` prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "ESTAB",
            Self::SynSent => "SYN-SENT",
            Self::SynRecv => "SYN-RECV",
            Self::FinWait1 => "FIN-WAIT-1",
            Self::FinWait2 => "FIN-WAIT-2",
            Self::TimeWait => "TIME-WAIT",
            Self::Close => "UNCONN",
            Self::CloseWait => "CLOSE-WAIT",
            Self::LastAck => "LAST-ACK",
            Self::Listen => "LISTEN",
            Self::Closing => "CLOSING",
            Self::Bound => "BOUND",
        }
    }

    /// The connection has been closed in one direction at least, but is there.
    #[must_use]
    pub fn is_half_closed(self) -> bool {
        matches!(
            self,
            Self::FinWait1 | Self::FinWait2 | Self::CloseWait | Self::LastAck | Self::Closing
        )
    }

    /// A connection with a peer: everything but listening, idle and forgotten sockets.
    #[must_use]
    pub fn is_connected(self) -> bool {
        matches!(self, Self::Established | Self::SynSent) || self.is_half_closed()
    }
}

/// A TCP socket of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSocket {
    /// Inode; zero where no file descriptor stands behind it (not yet accepted,
    /// or closed and lingering).
    pub inode: u64,
    /// State.
    pub state: TcpState,
    /// Own end, as the socket has it (IPv4-mapped stays IPv6).
    pub local: SocketAddr,
    /// Peer's end, as the socket has it.
    pub remote: SocketAddr,
    /// `IPV6_V6ONLY`.
    pub v6only: bool,
    /// Owner.
    pub uid: u32,
    /// Bytes received and not read; for a listener the connections not accepted.
    pub rqueue: u32,
    /// Bytes written and not acknowledged; for a listener the length of its queue.
    pub wqueue: u32,
    /// Index of the interface that it is bound to; zero for none.
    pub ifindex: u32,
    /// The kernel's name for this very socket.
    pub cookie: [u8; 8],
    /// The largest receive window that it advertises at present, in bytes;
    /// zero where the kernel does not say.
    pub window: u32,
}

/// A UDP socket of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpSocket {
    /// Inode.
    pub inode: u64,
    /// Own end, as the socket has it.
    pub local: SocketAddr,
    /// Peer's end when it is connected, else unspecified.
    pub remote: SocketAddr,
    /// `IPV6_V6ONLY`.
    pub v6only: bool,
}

/// Kinds of Unix sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnixKind {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`.
    Dgram,
    /// `SOCK_SEQPACKET`.
    Seqpacket,
}

impl fmt::Display for UnixKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "stream",
            Self::Dgram => "datagram",
            Self::Seqpacket => "packet",
        })
    }
}

/// A Unix socket of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode.
    pub inode: u64,
    /// Kind.
    pub kind: UnixKind,
    /// It accepts connections.
    pub listening: bool,
    /// The socket at the other end, when connected.
    pub peer_inode: Option<u64>,
    /// Nothing can be sent or received any more, as when the other end is closed.
    pub shut_down: bool,
    /// Name it is bound to; an abstract one begins with `@`.
    pub path: Option<String>,
}

/// Sockets besides TCP, UDP and Unix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketKind {
    /// Raw IP.
    Raw,
    /// A packet socket, which sees whole frames of an interface.
    Packet,
    /// A conversation with the kernel.
    Netlink,
}

/// Every TCP socket of both families, in every state.
///
/// # Errors
///
/// The kernel refuses the dump or its reply makes no sense.
pub fn tcp_sockets() -> Result<Vec<TcpSocket>, NetError> {
    tcp_sockets_in(u32::MAX)
}

/// The TCP sockets of both families whose state is in a set: bit 1 for the
/// kernel's state 1 and so on.
pub(crate) fn tcp_sockets_in(states: u32) -> Result<Vec<TcpSocket>, NetError> {
    /// `struct inet_diag_req` of `linux/inet_diag.h`: family, lengths of addresses,
    /// extensions, the socket (48 bytes), states, a cursor.
    const REQUEST_BYTES: usize = 60;
    const EXTENSIONS_AT: usize = 3;
    const STATES_AT: usize = 52;
    const ESTABLISHED: u32 = 1 << 1;

    // The older of the kernel's two requests, for it asks for both families at once:
    // the kernel goes through all its connections for each.
    let mut body = [0; REQUEST_BYTES];
    if states & ESTABLISHED != 0 {
        body[EXTENSIONS_AT] = ExtensionFlags::INFO.bits();
    }
    body[STATES_AT..STATES_AT + 4].copy_from_slice(&states.to_ne_bytes());
    let mut out = Vec::new();
    converse("TCP sockets", TCPDIAG_GETSOCK, REQUEST_DUMP, &body, |r| {
        out.push(tcp_socket(&InetResponse::parse(r)?));
        Ok(())
    })?;
    Ok(out)
}

/// Removes a socket that no process holds. The kernel may send an RST for it,
/// which a closed gate keeps in.
///
/// # Errors
///
/// The kernel does not know it (any more), or cannot remove sockets.
pub(crate) fn destroy(socket: &TcpSocket) -> Result<(), NetError> {
    let mut socket_id = match socket.local.ip() {
        IpAddr::V4(_) => SocketId::new_v4(),
        IpAddr::V6(_) => SocketId::new_v6(),
    };
    socket_id.source_address = socket.local.ip();
    socket_id.source_port = socket.local.port();
    socket_id.destination_address = socket.remote.ip();
    socket_id.destination_port = socket.remote.port();
    socket_id.interface_id = socket.ifindex;
    socket_id.cookie = socket.cookie;
    let request = InetRequest {
        family: if socket.local.is_ipv4() {
            AF_INET
        } else {
            AF_INET6
        },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_retain(u32::MAX),
        socket_id,
    };
    let mut body = vec![0; request.buffer_len()];
    request.emit(&mut body);
    converse("closed sockets", SOCK_DESTROY, REQUEST_ACK, &body, |_| {
        Ok(())
    })
}

fn tcp_socket(response: &InetResponse) -> TcpSocket {
    let InetResponse { header, nlas } = response;
    let id = &header.socket_id;
    TcpSocket {
        inode: u64::from(header.inode),
        state: TcpState::from_kernel(header.state),
        local: SocketAddr::new(id.source_address, id.source_port),
        remote: SocketAddr::new(id.destination_address, id.destination_port),
        v6only: v6only(nlas),
        uid: header.uid,
        rqueue: header.recv_queue,
        wqueue: header.send_queue,
        ifindex: id.interface_id,
        cookie: id.cookie,
        window: window(nlas),
    }
}

/// `tcpi_rcv_ssthresh` of `struct tcp_info` (linux/tcp.h): the kernel lets no
/// window grow beyond it.
fn window(nlas: &[Nla]) -> u32 {
    const AT: usize = 64;
    nlas.iter()
        .find_map(|nla| match nla {
            Nla::TcpInfo(info) => info.get(AT..AT + 4)?.try_into().ok(),
            _ => None,
        })
        .map_or(0, u32::from_ne_bytes)
}

fn v6only(nlas: &[Nla]) -> bool {
    nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true)))
}

/// Inodes of every MPTCP socket; empty where the kernel has none or cannot list them.
///
/// # Errors
///
/// The kernel's reply makes no sense.
pub fn mptcp_inodes() -> Result<BTreeSet<u64>, NetError> {
    let mut out = BTreeSet::new();
    // Kernels that do not know the attribute (before 5.9) go by the byte in the
    // request: zero names no protocol and is refused.
    let listed = inet_sockets("MPTCP sockets", 0, Some(IPPROTO_MPTCP), u32::MAX, |r| {
        out.insert(u64::from(r.header.inode));
    });
    match listed {
        Ok(()) => Ok(out),
        Err(e) if is_unsupported(&e) => Ok(BTreeSet::new()),
        Err(e) => Err(e),
    }
}

/// Every UDP socket of both families.
///
/// # Errors
///
/// The kernel's reply makes no sense.
pub fn udp_sockets() -> Result<Vec<UdpSocket>, NetError> {
    let mut out = Vec::new();
    let listed = inet_sockets("UDP sockets", IPPROTO_UDP, None, u32::MAX, |r| {
        let id = &r.header.socket_id;
        out.push(UdpSocket {
            inode: u64::from(r.header.inode),
            local: SocketAddr::new(id.source_address, id.source_port),
            remote: SocketAddr::new(id.destination_address, id.destination_port),
            v6only: v6only(&r.nlas),
        });
    });
    match listed {
        Err(e) if !is_unsupported(&e) => Err(e),
        _ => Ok(out),
    }
}

/// Raw, packet and netlink sockets by inode.
///
/// # Errors
///
/// The kernel's reply makes no sense, or `/proc` is not there.
pub fn other_sockets() -> Result<BTreeMap<u64, SocketKind>, NetError> {
    let mut out = BTreeMap::new();
    let raw = inet_sockets("raw sockets", IPPROTO_RAW, None, u32::MAX, |r| {
        out.insert(u64::from(r.header.inode), SocketKind::Raw);
    });
    match raw {
        Err(e) if !is_unsupported(&e) => return Err(e),
        _ => {}
    }
    for (table, kind) in [
        ("packet", SocketKind::Packet),
        ("netlink", SocketKind::Netlink),
    ] {
        // Not /proc/net, which is the namespace of the process's first thread.
        let text = match std::fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => text,
            // A kernel without packet sockets has no table of them.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(NetError::List {
                    what: "packet and netlink sockets",
                    source,
                });
            }
        };
        for inode in inode_column(&text) {
            out.insert(inode, kind.clone());
        }
    }
    Ok(out)
}

/// The column headed `Inode` of a table in `/proc/net`.
fn inode_column(table: &str) -> Vec<u64> {
    let mut lines = table.lines();
    let Some(column) = lines.next().and_then(|head| {
        head.split_whitespace()
            .position(|name| name.eq_ignore_ascii_case("inode"))
    }) else {
        return Vec::new();
    };
    lines
        .filter_map(|line| line.split_whitespace().nth(column)?.parse().ok())
        .collect()
}

/// Every Unix socket.
///
/// # Errors
///
/// The kernel refuses the dump or its reply makes no sense.
pub fn unix_sockets() -> Result<Vec<UnixSocket>, NetError> {
    let request = UnixRequest {
        // Unconnected datagram sockets are in state 7 (closed).
        state_flags: UnixStateFlags::from_bits_retain(u32::MAX),
        inode: 0,
        show_flags: ShowFlags::NAME | ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut body = vec![0; request.buffer_len()];
    request.emit(&mut body);
    let mut out = Vec::new();
    dump("Unix sockets", &body, |reply| {
        out.push(unix_socket(&UnixResponse::parse(reply)?));
        Ok(())
    })?;
    Ok(out)
}

fn unix_socket(response: &UnixResponse) -> UnixSocket {
    let mut socket = UnixSocket {
        inode: u64::from(response.header.inode),
        kind: match i32::from(response.header.kind) {
            libc::SOCK_DGRAM => UnixKind::Dgram,
            libc::SOCK_SEQPACKET => UnixKind::Seqpacket,
            _ => UnixKind::Stream,
        },
        listening: response.header.state == 10,
        peer_inode: None,
        shut_down: false,
        path: None,
    };
    for nla in &response.nlas {
        match nla {
            UnixNla::Peer(inode) => socket.peer_inode = Some(u64::from(*inode)),
            // `SHUTDOWN_MASK`: for sending and receiving.
            UnixNla::Shutdown(how) => socket.shut_down = *how == 3,
            UnixNla::Name(UnixDiagName::Pathname(path)) => {
                socket.path = Some(path.to_string_lossy().into_owned());
            }
            UnixNla::Name(UnixDiagName::Abstract(name)) => {
                socket.path = Some(format!("@{}", String::from_utf8_lossy(name)));
            }
            _ => {}
        }
    }
    socket
}

fn is_unsupported(error: &NetError) -> bool {
    matches!(error, NetError::List { source, .. } if matches!(
        source.raw_os_error(),
        Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
    ))
}

fn inet_sockets(
    what: &'static str,
    protocol: u8,
    wide_protocol: Option<u32>,
    states: u32,
    mut each: impl FnMut(InetResponse),
) -> Result<(), NetError> {
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            // May include states that are newer than the flags' definition.
            states: StateFlags::from_bits_retain(states),
            socket_id,
        };
        let mut body = vec![0; request.buffer_len()];
        request.emit(&mut body);
        if let Some(protocol) = wide_protocol {
            body.extend_from_slice(&8u16.to_ne_bytes());
            body.extend_from_slice(&INET_DIAG_REQ_PROTOCOL.to_ne_bytes());
            body.extend_from_slice(&protocol.to_ne_bytes());
        }
        dump(what, &body, |reply| {
            each(InetResponse::parse(reply)?);
            Ok(())
        })?;
    }
    Ok(())
}

/// Sends one dump request and hands every reply to `each`.
fn dump(
    what: &'static str,
    body: &[u8],
    each: impl FnMut(&[u8]) -> Result<(), DecodeError>,
) -> Result<(), NetError> {
    converse(what, SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, body, each)
}

/// Sends one request and hands every reply to `each`, up to the end.
fn converse(
    what: &'static str,
    kind: u16,
    flags: u16,
    body: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<(), DecodeError>,
) -> Result<(), NetError> {
    let failed = |source: io::Error| NetError::List { what, source };
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(|source| NetError::Open { source })?;
    socket.bind_auto().map_err(failed)?;
    socket.connect(&NetlinkAddr::new(0, 0)).map_err(failed)?;
    // SAFETY: the descriptor is open for as long as `socket` lives, which is
    // longer than this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    setsockopt(
        &fd,
        sockopt::ReceiveTimeout,
        &TimeVal::milliseconds(ANSWER_LIMIT_MS),
    )
    .map_err(|e| failed(e.into()))?;

    let length = u32::try_from(HEADER_BYTES + body.len())
        .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let mut request = Vec::with_capacity(HEADER_BYTES + body.len());
    request.extend_from_slice(&length.to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&1u32.to_ne_bytes());
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(body);
    socket.send(&request, 0).map_err(failed)?;

    let mut datagram: Vec<u8> = Vec::with_capacity(DATAGRAM_BYTES_MAX);
    let mut seen = 0;
    loop {
        datagram.clear();
        match socket.recv(&mut datagram, 0) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed(e)),
        }
        for message in Messages(&datagram) {
            let (kind, payload) = message.map_err(failed)?;
            match kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    return match errno(payload) {
                        0 => Ok(()),
                        errno => Err(failed(io::Error::from_raw_os_error(errno))),
                    };
                }
                SOCK_DIAG_BY_FAMILY | TCPDIAG_GETSOCK => {
                    seen += 1;
                    if seen > SOCKETS_MAX {
                        return Err(failed(malformed("more sockets than a host can have")));
                    }
                    each(payload).map_err(|e| failed(malformed(e)))?;
                }
                _ => {}
            }
        }
    }
}

/// The error number at the head of a final message, positive; zero where there is none.
fn errno(payload: &[u8]) -> i32 {
    payload
        .first_chunk()
        .map_or(0, |b| i32::from_ne_bytes(*b).saturating_neg())
}

fn malformed(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

/// Splits a datagram into netlink messages: type and payload of each.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<(u16, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0);
        let Some([l0, l1, l2, l3, t0, t1, ..]) = rest.first_chunk::<HEADER_BYTES>().copied() else {
            return Some(Err(malformed("netlink message cut short")));
        };
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let Some(payload) = rest.get(HEADER_BYTES..length) else {
            return Some(Err(malformed("netlink message of a wrong length")));
        };
        // Messages are aligned to four bytes; the last one need not be padded.
        self.0 = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok((u16::from_ne_bytes([t0, t1]), payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inode_column_is_found_by_its_name() {
        let packet = "sk       RefCnt Type Proto  Iface R Rmem   User   Inode\n\
                      0000000000000000 3      3    0003   2     1 0      0      4711\n";
        assert_eq!(inode_column(packet), [4711]);
        let netlink = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
                       0000000000000000 0   1          00000000 0        0        0     2        0        12   \n";
        assert_eq!(inode_column(netlink), [12]);
        assert!(inode_column("").is_empty());
    }

    proptest! {
        #[test]
        fn any_datagram_ends(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let count = Messages(&bytes).take(1000).count();
            prop_assert!(count <= bytes.len() / HEADER_BYTES + 1);
        }

        #[test]
        fn any_reply_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(r) = InetResponse::parse(&bytes) {
                let _ = tcp_socket(&r);
            }
            if let Ok(r) = UnixResponse::parse(&bytes) {
                let _ = unix_socket(&r);
            }
        }
    }
}
