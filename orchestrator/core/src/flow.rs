//! The network identity of a process tree: flows, listeners, addresses.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// One established TCP connection, seen from the process tree.
///
/// IPv4-mapped IPv6 addresses are stored as IPv4, because that is what travels
/// on the wire and what the gate sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The tree's end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

impl Flow {
    /// A flow with both ends in canonical form.
    #[must_use]
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            local: canonical(local),
            remote: canonical(remote),
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} <-> {}", self.local, self.remote)
    }
}

/// One listening TCP socket of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listener {
    /// The bound address; unspecified (`0.0.0.0`, `::`) when it listens on all.
    pub local: SocketAddr,
    /// An IPv6 socket that refuses IPv4 (`IPV6_V6ONLY`).
    pub v6only: bool,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (listening)", self.local)
    }
}

/// The address in the form the wire shows: `::ffff:a.b.c.d` becomes `a.b.c.d`,
/// scope and flow label are dropped.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether a connection on this address can never leave its host.
#[must_use]
pub fn is_host_local(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4() {
        let flow = Flow::new(
            "[::ffff:10.77.0.100]:6379".parse().unwrap(),
            "[::ffff:10.77.0.1]:40000".parse().unwrap(),
        );
        assert_eq!(flow.to_string(), "10.77.0.100:6379 <-> 10.77.0.1:40000");
    }

    #[test]
    fn loopback_is_host_local_in_every_spelling() {
        for ip in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(is_host_local(ip.parse().unwrap()), "{ip}");
        }
        assert!(!is_host_local("10.77.0.1".parse().unwrap()));
    }
}
