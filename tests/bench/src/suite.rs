//! Which scenarios are moved by which methods.

use crate::method::Method;
use crate::scenario::{Scenario, Server};

/// A table of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// Memory and dirty rate.
    Memory,
    /// Connections and ways to keep packets from the tree.
    Gate,
    /// Data stores as people have them.
    Stores,
}

const OURS: Method = Method::Ours {
    name: "migrate",
    options: &[],
};
const FULL: Method = Method::Ours {
    name: "migrate, engine full",
    options: &["--engine", "full"],
};
/// The locks to compare with the gate; not `skip`, with which requests are lost
/// and their client waits for ever.
const WITH_NFTABLES: Method = Method::Ours {
    name: "migrate, nftables",
    options: &["--network-lock", "nftables"],
};
const WITH_IPTABLES: Method = Method::Ours {
    name: "migrate, iptables",
    options: &["--network-lock", "iptables"],
};
const STOCK_NFTABLES: Method = Method::Stock { lock: "nftables" };
const STOCK_IPTABLES: Method = Method::Stock { lock: "iptables" };

/// Beyond this many connections iptables takes seconds for each hundred.
const IPTABLES_CONNECTIONS_MAX: u16 = 200;

impl Suite {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Gate, Self::Stores];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Gate => "gate",
            Self::Stores => "stores",
        }
    }

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Memory => "Memory and how fast it changes",
            Self::Gate => "Connections",
            Self::Stores => "Data stores",
        }
    }

    /// Every scenario with its methods, in the order in which they are run.
    pub(crate) fn plan(self, quick: bool) -> Vec<(Scenario, Vec<Method>)> {
        match self {
            Self::Memory => {
                let (sizes, rates): (&[u32], &[u32]) = if quick {
                    (&[64, 256, 1024], &[0, 10])
                } else {
                    (&[64, 256, 1024, 4096], &[0, 10, 100])
                };
                let pairs = sizes
                    .iter()
                    .flat_map(|size| rates.iter().map(move |rate| (*size, *rate)));
                pairs
                    .map(|(resident_mib, dirty_mb_per_s)| {
                        let server = Server::Ballast {
                            resident_mib,
                            dirty_mb_per_s,
                        };
                        let scenario = Scenario {
                            server,
                            connections: 10,
                        };
                        let mut methods = vec![OURS, STOCK_NFTABLES];
                        if !quick {
                            methods.push(FULL);
                        }
                        (scenario, methods)
                    })
                    .collect()
            }
            Self::Gate => {
                let counts: &[u16] = if quick {
                    &[1, 100, 1000]
                } else {
                    &[1, 100, 1000, 10_000]
                };
                counts
                    .iter()
                    .map(|&connections| {
                        let scenario = Scenario {
                            server: Server::Memcached,
                            connections,
                        };
                        let mut methods = vec![OURS, WITH_NFTABLES, STOCK_NFTABLES];
                        if connections <= IPTABLES_CONNECTIONS_MAX {
                            methods.extend([WITH_IPTABLES, STOCK_IPTABLES]);
                        }
                        (scenario, methods)
                    })
                    .collect()
            }
            Self::Stores => vec![(
                Scenario {
                    server: Server::Redis { keys: 100_000 },
                    connections: 20,
                },
                vec![OURS, FULL, STOCK_NFTABLES, STOCK_IPTABLES],
            )],
        }
    }
}
