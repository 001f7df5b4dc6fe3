//! Who is in a lab: names, addresses, first PIDs.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::error::{Error, Result};

/// The one interface of every host besides the loopback.
pub const INTERFACE: &str = "eth0";
/// Length of the lab's IPv4 prefix, in bits.
pub const PREFIX_BITS_V4: u8 = 24;
/// Length of the lab's IPv6 prefix, in bits.
pub const PREFIX_BITS_V6: u8 = 64;
/// The workload's own IPv4 address: a second address of `host1` when a lab comes up.
pub const WORKLOAD_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
/// The workload's own IPv6 address: a second address of `host1` when a lab comes up.
pub const WORKLOAD_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100);
/// Another name of `host2`, whose key no host knows.
pub const STRANGER: &str = "stranger";

/// A host of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostName {
    /// The first machine; it has the workload's addresses at first.
    Host1,
    /// The second machine.
    Host2,
    /// Where the clients live. It has no sshd.
    Client,
}

impl HostName {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Host1, Self::Host2, Self::Client];

    /// The name, as `hostname` prints it and `/etc/hosts` has it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Host1 => "host1",
            Self::Host2 => "host2",
            Self::Client => "client",
        }
    }

    /// The host's own IPv4 address.
    #[must_use]
    pub const fn ipv4(self) -> Ipv4Addr {
        match self {
            Self::Host1 => Ipv4Addr::new(10, 77, 0, 11),
            Self::Host2 => Ipv4Addr::new(10, 77, 0, 12),
            Self::Client => Ipv4Addr::new(10, 77, 0, 1),
        }
    }

    /// The host's own IPv6 address.
    #[must_use]
    pub const fn ipv6(self) -> Ipv6Addr {
        let last = match self {
            Self::Host1 => 0x11,
            Self::Host2 => 0x12,
            Self::Client => 0x1,
        };
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last)
    }

    /// PIDs start above this, so far apart that a tree of one machine finds its PIDs free on the
    /// other, and well below the usual `pid_max` of 32768.
    #[must_use]
    pub const fn last_pid(self) -> u32 {
        match self {
            Self::Host1 => 1_000,
            Self::Host2 => 20_000,
            Self::Client => 100,
        }
    }

    /// Whether an sshd runs there.
    #[must_use]
    pub const fn has_sshd(self) -> bool {
        matches!(self, Self::Host1 | Self::Host2)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for HostName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|host| host.as_str() == name)
            .ok_or_else(|| Error::UnknownHost {
                name: name.to_owned(),
            })
    }
}

/// A set of namespaces in a lab: a host, or the bridge between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Member {
    Switch,
    Host(HostName),
}

impl Member {
    pub(crate) const ALL: [Self; 4] = [
        Self::Switch,
        Self::Host(HostName::Host1),
        Self::Host(HostName::Host2),
        Self::Host(HostName::Client),
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Switch => "switch",
            Self::Host(host) => host.as_str(),
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|member| member.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_is_found_by_its_name() {
        for host in HostName::ALL {
            assert_eq!(host.as_str().parse::<HostName>().unwrap(), host);
        }
        let error = "host3".parse::<HostName>().unwrap_err();
        assert_eq!(error.to_string(), "no test host is named `host3`");
        assert!(error.help().unwrap().contains("host1, host2 and client"));
    }

    #[test]
    fn pids_of_the_machines_start_far_apart() {
        assert!(
            HostName::Host1
                .last_pid()
                .abs_diff(HostName::Host2.last_pid())
                > 10_000
        );
    }
}
