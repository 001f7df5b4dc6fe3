//! What can go wrong with addresses and sockets.

use std::io;
use std::net::IpAddr;

use thiserror::Error;

/// A failed attempt, with the object it was about.
#[derive(Debug, Error)]
pub enum NetError {
    /// No netlink socket could be had.
    #[error("could not open a netlink socket")]
    Open {
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The kernel did not list something.
    #[error("could not list {what}")]
    List {
        /// What was asked for.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The kernel did not answer in time.
    #[error("the kernel did not answer within {limit_ms} ms when asked to {what}")]
    TimedOut {
        /// What was asked.
        what: &'static str,
        /// How long was waited, in milliseconds.
        limit_ms: u64,
    },
    /// The address that should come is already on this host.
    #[error("address {ip} is already on {interface} of this host")]
    AlreadyHere {
        /// The address.
        ip: IpAddr,
        /// Where it is.
        interface: String,
    },
    /// No interface of this host is in the subnet of the address.
    #[error("no interface of this host takes {ip}/{prefix_len}; it has {have}")]
    NoInterface {
        /// The address.
        ip: IpAddr,
        /// Its prefix length on the source.
        prefix_len: u8,
        /// The interfaces of this host and their addresses.
        have: String,
    },
    /// The address is not on this host.
    #[error("no interface of this host has the address {ip}")]
    NotHere {
        /// The address.
        ip: IpAddr,
    },
    /// The kernel would delete other addresses together with this one.
    #[error("removing {ip} from {interface} would also remove {others}")]
    TakesOthers {
        /// The primary address.
        ip: IpAddr,
        /// Where it is.
        interface: String,
        /// Its secondaries.
        others: String,
    },
    /// An address was not added.
    #[error("could not add {ip} on {interface}")]
    Add {
        /// The address.
        ip: IpAddr,
        /// Where.
        interface: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// An address was not removed.
    #[error("could not remove {ip} from {interface}")]
    Remove {
        /// The address.
        ip: IpAddr,
        /// Where.
        interface: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The address is back, but a route that used it is not.
    #[error("could not put back a route that used {ip} on {interface}")]
    RestoreRoute {
        /// The address.
        ip: IpAddr,
        /// Where.
        interface: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A record of a withdrawn address cannot be read.
    #[error("the record of the withdrawn address {ip} is damaged")]
    Record {
        /// The address.
        ip: IpAddr,
    },
    /// Nobody was told where the address is now.
    #[error("could not announce {ip} on {interface}")]
    Announce {
        /// The address.
        ip: IpAddr,
        /// Where.
        interface: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl NetError {
    /// The way out, where there is one.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Open { .. } => Some("run as root".to_owned()),
            Self::AlreadyHere { ip, interface } => Some(format!(
                "if it is left over from an earlier attempt, remove it here with \
                 `ip address del {ip} dev {interface}`; an address can be on one host only"
            )),
            Self::NoInterface { ip, prefix_len, .. } => Some(format!(
                "choose a destination in the network of {ip}/{prefix_len}, or give one of its \
                 interfaces that is attached to that network an address in it"
            )),
            Self::TakesOthers { interface, .. } => Some(promote_help(interface)),
            Self::Add { source, .. } | Self::Remove { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some("run as root (CAP_NET_ADMIN is needed)".to_owned())
            }
            Self::List { .. }
            | Self::TimedOut { .. }
            | Self::NotHere { .. }
            | Self::Add { .. }
            | Self::Remove { .. }
            | Self::RestoreRoute { .. }
            | Self::Record { .. }
            | Self::Announce { .. } => None,
        }
    }
}

/// The way out where the kernel would drop secondaries with their primary.
pub(crate) fn promote_help(interface: &str) -> String {
    format!("let the kernel keep them: `sysctl -w net/ipv4/conf/{interface}/promote_secondaries=1`")
}
