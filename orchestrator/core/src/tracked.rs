//! What a host's connection tracking knows of a connection.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::flow::Flow;

/// One direction of a connection as packets of it are addressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Way {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
}

impl Way {
    /// The other way.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
        }
    }
}

/// A TCP connection in the table of connection tracking. Without address
/// translation the two ways are each other's reverse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracked {
    /// As the first packet was addressed when it came to the host.
    pub original: Way,
    /// As answers are addressed before the host translates them.
    pub reply: Way,
    /// The kernel's state (`enum tcp_conntrack`).
    pub tcp_state: u8,
    /// Window scales of both ways, the original's first.
    pub window_scales: [u8; 2],
    /// The kernel's flags of both ways (`IP_CT_TCP_FLAG_*`).
    pub tcp_flags: [u8; 2],
    /// The kernel's status (`enum ip_conntrack_status`).
    pub status: u32,
    /// When it is forgotten without packets, in seconds.
    pub timeout_s: u32,
    /// The mark that rules have put on it.
    pub mark: u32,
    /// The zone that rules have put it in; 0 is where everything is.
    pub zone: u16,
}

/// `TCP_CONNTRACK_ESTABLISHED`.
const ESTABLISHED: u8 = 3;
/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED`.
const SEEN_BOTH_WAYS: u32 = 1 << 1 | 1 << 2 | 1 << 3;
/// The kernel's default for established connections: five days.
const TIMEOUT_S: u32 = 432_000;

impl Tracked {
    /// A connection as tracking would know it that has seen it from the first
    /// packet on. `accepted`: the peer has opened it.
    #[must_use]
    pub fn established(flow: &Flow, accepted: bool) -> Self {
        let outbound = Way {
            from: flow.local,
            to: flow.remote,
        };
        let original = if accepted {
            outbound.reversed()
        } else {
            outbound
        };
        Self {
            original,
            reply: original.reversed(),
            tcp_state: ESTABLISHED,
            window_scales: [0; 2],
            tcp_flags: [0; 2],
            status: SEEN_BOTH_WAYS,
            timeout_s: TIMEOUT_S,
            mark: 0,
            zone: 0,
        }
    }

    /// Whether the host translates addresses or ports of it.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.original.reversed() != self.reply
    }

    /// The connection as the socket at this address has it, and as it is on
    /// the wire; `None` where the socket is not at one of its ends.
    #[must_use]
    pub fn flows(&self, is_local: impl Fn(SocketAddr) -> bool) -> Option<(Flow, Flow)> {
        let flow = |way: Way| Flow::new(way.from, way.to);
        if is_local(self.reply.from) {
            // Accepted: answers leave the socket as `reply`, and the host as
            // the reverse of `original`.
            Some((flow(self.reply), flow(self.original.reversed())))
        } else if is_local(self.original.from) {
            Some((flow(self.original), flow(self.reply.reversed())))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(from: &str, to: &str) -> Way {
        Way {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        }
    }

    fn flow(local: &str, remote: &str) -> Flow {
        Flow::new(local.parse().unwrap(), remote.parse().unwrap())
    }

    #[test]
    fn a_translated_connection_has_one_flow_for_the_socket_and_one_for_the_wire() {
        let (service, client) = ("10.0.0.9:7000", "10.0.0.1:4000");
        let local = |at: SocketAddr| at.ip().to_string() == "10.0.0.9";
        let plain = Tracked::established(&flow(service, client), true);
        assert!(!plain.is_translated());
        assert_eq!(
            plain.flows(local),
            Some((flow(service, client), flow(service, client)))
        );
        let redirected = Tracked {
            original: way(client, "10.0.0.9:80"),
            ..plain.clone()
        };
        assert!(redirected.is_translated());
        assert_eq!(
            redirected.flows(local),
            Some((flow(service, client), flow("10.0.0.9:80", client)))
        );
        let opened = Tracked::established(&flow(service, client), false);
        let masqueraded = Tracked {
            reply: way(client, "10.0.0.2:5000"),
            ..opened
        };
        assert_eq!(
            masqueraded.flows(local),
            Some((flow(service, client), flow("10.0.0.2:5000", client)))
        );
        assert_eq!(plain.flows(|_| false), None);
    }
}
