//! Entries of a host's connection tracking, by the kernel's `ctnetlink`.
//!
//! A filter that knows connections lets packets of unknown ones fall, and a
//! connection that has moved is unknown where it comes to. So its entry moves
//! along: [`entries`] on the one host, [`Table::put`] on the other,
//! [`Table::remove`] where it is not needed any more.
//!
//! Everything happens in the network namespace of the calling thread. A host
//! that tracks nothing has no entries and takes none: see [`is_in_use`].

mod attributes;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use migrate_core::flow::Flow;
use migrate_core::tracked::Tracked;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use thiserror::Error;

/// What went wrong between us and the kernel's table.
#[derive(Debug, Error)]
pub enum ConntrackError {
    /// No netlink socket could be had.
    #[error("could not open a netlink socket for connection tracking")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("could not {attempt} connection tracking entries")]
    Refused {
        /// What was tried.
        attempt: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// `NFNL_SUBSYS_CTNETLINK << 8`, linux/netfilter/nfnetlink.h.
const SUBSYSTEM: u16 = 1 << 8;
/// `IPCTNL_MSG_CT_NEW`, `_GET` and `_DELETE`.
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
/// linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x001;
const ACK: u16 = 0x004;
const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
/// `sizeof(struct nlmsghdr)` and `sizeof(struct nfgenmsg)`.
const HEADER_BYTES: usize = 16;
const FAMILY_BYTES: usize = 4;
/// A dump's datagram is at most 32 KiB.
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// The kernel answers from memory; seconds mean that it never will.
const ANSWER_LIMIT_MS: i64 = 5000;
/// More than the kernel's table takes (`nf_conntrack_max`) on any host.
const ENTRIES_MAX: usize = 16 << 20;

/// Whether this network namespace tracks connections: it knows at least one.
#[must_use]
pub fn is_in_use() -> bool {
    std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")
        .is_ok_and(|count| count.trim() != "0")
}

/// The TCP connections in the table that `wanted` takes.
///
/// # Errors
///
/// The kernel does not list them.
pub fn entries(mut wanted: impl FnMut(&Tracked) -> bool) -> Result<Vec<Tracked>, ConntrackError> {
    let mut found = Vec::new();
    let mut table = Table::open()?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        table.converse("list", GET, REQUEST | DUMP, &family_head(family), |body| {
            if let Some(entry) = attributes::parse(body).filter(|entry| wanted(entry)) {
                found.push(entry);
            }
        })?;
    }
    Ok(found)
}

fn family_head(family: i32) -> Vec<u8> {
    // `nfgenmsg`: family, version, resource.
    vec![u8::try_from(family).unwrap_or(0), 0, 0, 0]
}

/// The table of this network namespace.
#[derive(Debug)]
pub struct Table {
    socket: Socket,
}

impl Table {
    /// A conversation with the kernel about it.
    ///
    /// # Errors
    ///
    /// No netlink socket can be had.
    pub fn open() -> Result<Self, ConntrackError> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(ConntrackError::Open)?;
        socket.bind_auto().map_err(ConntrackError::Open)?;
        socket
            .connect(&NetlinkAddr::new(0, 0))
            .map_err(ConntrackError::Open)?;
        // SAFETY: the descriptor is open for as long as `socket` lives, which
        // is longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
        setsockopt(
            &fd,
            sockopt::ReceiveTimeout,
            &TimeVal::milliseconds(ANSWER_LIMIT_MS),
        )
        .map_err(|errno| ConntrackError::Open(errno.into()))?;
        Ok(Self { socket })
    }

    /// The entry of a connection as its socket has it, if there is one. Does
    /// not find accepted ones that are translated; [`entries`] does.
    ///
    /// # Errors
    ///
    /// The kernel does not answer.
    pub fn find(&mut self, flow: &Flow) -> Result<Option<Tracked>, ConntrackError> {
        // The kernel looks a tuple up in both directions.
        let probe = Tracked::established(flow, false);
        let mut found = None;
        let body = attributes::original(&probe);
        let answered = self.converse("find", GET, REQUEST | ACK, &body, |body| {
            found = attributes::parse(body);
        });
        match answered {
            Err(error) if error.is_not_there() => Ok(None),
            Err(error) => Err(error),
            Ok(()) => Ok(found),
        }
    }

    /// Makes an entry, in place of one that is there. Sequence numbers are not
    /// part of it, so its windows are not checked from here on.
    ///
    /// # Errors
    ///
    /// The kernel refuses it.
    pub fn put(&mut self, entry: &Tracked) -> Result<(), ConntrackError> {
        let body = attributes::whole(entry);
        let flags = REQUEST | ACK | CREATE | EXCLUSIVE;
        match self.converse("make", NEW, flags, &body, |_| ()) {
            Err(error) if error.is_there() => {
                self.remove(entry)?;
                self.converse("make", NEW, flags, &body, |_| ())
            }
            outcome => outcome,
        }
    }

    /// Removes an entry; one that is not there is no error.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn remove(&mut self, entry: &Tracked) -> Result<(), ConntrackError> {
        let body = attributes::original(entry);
        match self.converse("remove", DELETE, REQUEST | ACK, &body, |_| ()) {
            Err(error) if error.is_not_there() => Ok(()),
            outcome => outcome,
        }
    }

    /// Sends one request and hands the body of every reply to `each`, up to
    /// the end.
    fn converse(
        &mut self,
        attempt: &'static str,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), ConntrackError> {
        let failed = |source| ConntrackError::Refused { attempt, source };
        let length = u32::try_from(HEADER_BYTES + body.len())
            .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let mut request = Vec::with_capacity(HEADER_BYTES + body.len());
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&flags.to_ne_bytes());
        request.extend_from_slice(&1u32.to_ne_bytes());
        request.extend_from_slice(&0u32.to_ne_bytes());
        request.extend_from_slice(body);
        self.socket.send(&request, 0).map_err(failed)?;
        let mut datagram: Vec<u8> = Vec::with_capacity(DATAGRAM_BYTES_MAX);
        let mut seen = 0_usize;
        loop {
            datagram.clear();
            match self.socket.recv(&mut datagram, 0) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(failed(e)),
            }
            let mut rest = datagram.as_slice();
            while let Some((kind, body, after)) = split(rest) {
                rest = after;
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match errno(body) {
                            0 => Ok(()),
                            errno => Err(failed(io::Error::from_raw_os_error(errno))),
                        };
                    }
                    _ => each(body),
                }
                seen += 1;
                if seen > ENTRIES_MAX {
                    return Err(failed(io::ErrorKind::InvalidData.into()));
                }
            }
        }
    }
}

impl ConntrackError {
    fn errno(&self) -> Option<i32> {
        match self {
            Self::Open(source) | Self::Refused { source, .. } => source.raw_os_error(),
        }
    }

    fn is_not_there(&self) -> bool {
        self.errno() == Some(libc::ENOENT)
    }

    fn is_there(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }
}

/// Type and body of the first message of a datagram, and what follows it.
fn split(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let header = datagram.get(..HEADER_BYTES)?;
    let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    let length = usize::try_from(length).ok()?;
    let body = datagram.get(HEADER_BYTES..length)?;
    let next = length.next_multiple_of(4).min(datagram.len());
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    Some((kind, body, &datagram[next..]))
}

/// The error of an `NLMSG_ERROR` or `NLMSG_DONE`, as a positive number.
fn errno(body: &[u8]) -> i32 {
    body.first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes).saturating_neg())
}
