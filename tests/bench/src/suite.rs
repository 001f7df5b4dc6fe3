//! Which scenarios are moved by which methods.

use migrate_tests::streams::Kind;

use crate::method::{Method, marks_soft_dirty};
use crate::scenario::{Scenario, Server};

/// A table of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// Memory and dirty rate.
    Memory,
    /// Connections and ways to keep packets from the tree.
    Gate,
    /// Ways to talk.
    Traffic,
    /// Data stores as people have them.
    Stores,
    /// Processes, and address space.
    Scale,
    /// What was aimed at, as far as the others do not have it.
    Goals,
}

const OURS: Method = Method::Ours {
    name: "migrate",
    options: &[],
    lossy: false,
};
const FULL: Method = Method::Ours {
    name: "migrate, engine full",
    options: &["--engine", "full"],
    lossy: false,
};
const SOFT_DIRTY: Method = Method::Ours {
    name: "migrate, engine soft-dirty",
    options: &["--engine", "soft-dirty"],
    lossy: false,
};
/// Hands over as soon as it may, with what is left to follow.
const POSTCOPY: Method = Method::Ours {
    name: "migrate, postcopy",
    options: &["--postcopy", "--max-iterations", "1"],
    lossy: false,
};
/// What to compare the gate that holds with.
const WITH_DROP: Method = Method::Ours {
    name: "migrate, gate drops",
    options: &["--network-lock", "drop"],
    lossy: false,
};
const WITH_NFTABLES: Method = Method::Ours {
    name: "migrate, nftables",
    options: &["--network-lock", "nftables"],
    lossy: false,
};
const WITH_IPTABLES: Method = Method::Ours {
    name: "migrate, iptables",
    options: &["--network-lock", "iptables"],
    lossy: false,
};
const STOCK_NFTABLES: Method = Method::Stock {
    lock: "nftables",
    lossy: false,
    pre_dumps: 0,
};
/// As often as our own rounds take at least, and a few more.
const STOCK_PRE_DUMPS: Method = Method::Stock {
    lock: "nftables",
    lossy: false,
    pre_dumps: 3,
};
const STOCK_IPTABLES: Method = Method::Stock {
    lock: "iptables",
    lossy: false,
    pre_dumps: 0,
};
/// Requests are lost with them: what comes of a run is for the table to say.
const WITH_SKIP: Method = Method::Ours {
    name: "migrate, skip",
    options: &["--network-lock", "skip"],
    lossy: true,
};
const STOCK_SKIP: Method = Method::Stock {
    lock: "skip",
    lossy: true,
    pre_dumps: 0,
};

/// Beyond this many connections iptables takes seconds for each hundred.
const IPTABLES_CONNECTIONS_MAX: u16 = 1000;
const IPTABLES_CONNECTIONS_MAX_QUICK: u16 = 200;

/// Servers and how many talk to each.
const TRAFFIC: [(Server, u16); 6] = [
    (Server::EchoV6, 10),
    (Server::Streams(Kind::Upload), 2),
    (Server::Streams(Kind::Download), 2),
    (Server::Streams(Kind::Subscribe), 5),
    (Server::Streams(Kind::Storm), 2),
    (Server::Streams(Kind::HalfClosed), 2),
];

impl Suite {
    pub(crate) const ALL: [Self; 6] = [
        Self::Memory,
        Self::Gate,
        Self::Traffic,
        Self::Stores,
        Self::Scale,
        Self::Goals,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Gate => "gate",
            Self::Traffic => "traffic",
            Self::Stores => "stores",
            Self::Scale => "scale",
            Self::Goals => "goals",
        }
    }

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Memory => "Memory and how fast it changes",
            Self::Gate => "Connections",
            Self::Traffic => "Ways to talk",
            Self::Stores => "Data stores",
            Self::Scale => "Processes, and address space",
            Self::Goals => "Full data stores, and one connection",
        }
    }

    /// What cannot be measured on this machine, in words.
    pub(crate) fn leaves_out(self, quick: bool) -> Option<&'static str> {
        (self == Self::Memory && !quick && !marks_soft_dirty()).then_some(
            "engine soft-dirty and stock pre-dumps: left out, this kernel does not mark the pages \
             that are written (CONFIG_MEM_SOFT_DIRTY)",
        )
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
                            methods.extend([FULL, POSTCOPY]);
                            if marks_soft_dirty() {
                                methods.extend([SOFT_DIRTY, STOCK_PRE_DUMPS]);
                            }
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
                            server: Server::Memcached { keys: 0 },
                            connections,
                        };
                        let mut methods = vec![OURS, WITH_DROP, WITH_NFTABLES, STOCK_NFTABLES];
                        let most = if quick {
                            IPTABLES_CONNECTIONS_MAX_QUICK
                        } else {
                            methods.extend([WITH_SKIP, STOCK_SKIP]);
                            IPTABLES_CONNECTIONS_MAX
                        };
                        if connections <= most {
                            methods.extend([WITH_IPTABLES, STOCK_IPTABLES]);
                        }
                        (scenario, methods)
                    })
                    .collect()
            }
            Self::Traffic => TRAFFIC
                .iter()
                .map(|&(server, connections)| {
                    let scenario = Scenario {
                        server,
                        connections,
                    };
                    let mut methods = vec![OURS, STOCK_NFTABLES];
                    if !quick {
                        methods.push(WITH_DROP);
                    }
                    (scenario, methods)
                })
                .collect(),
            Self::Stores => vec![
                (
                    Scenario {
                        server: Server::Redis { keys: 100_000 },
                        connections: 20,
                    },
                    vec![OURS, FULL, STOCK_NFTABLES, STOCK_IPTABLES],
                ),
                (
                    Scenario {
                        server: Server::Memcached { keys: 100_000 },
                        connections: 20,
                    },
                    vec![OURS, FULL, STOCK_NFTABLES, STOCK_IPTABLES],
                ),
                (
                    Scenario {
                        server: Server::PressedRedis { keys: 300_000 },
                        connections: 4,
                    },
                    vec![OURS],
                ),
            ],
            Self::Scale => {
                let (processes, gib): (&[u32], &[u32]) = if quick {
                    (&[1, 10, 100], &[1])
                } else {
                    (&[1, 10, 100, 1000], &[1, 16])
                };
                let families = processes
                    .iter()
                    .map(|&processes| Server::Family { processes });
                let sparse = gib.iter().map(|&gib| Server::Sparse { gib });
                families
                    .chain(sparse)
                    .map(|server| {
                        let scenario = Scenario {
                            server,
                            connections: 10,
                        };
                        (scenario, vec![OURS, STOCK_NFTABLES])
                    })
                    .collect()
            }
            Self::Goals => {
                let all = [
                    (Server::Redis { keys: 100_000 }, 1),
                    (Server::FullRedis { gib: 1 }, 100),
                    (Server::FullRedis { gib: 4 }, 100),
                    (Server::FullMemcached { gib: 1 }, 1000),
                ];
                let some = if quick { 1 } else { all.len() };
                all.into_iter()
                    .take(some)
                    .map(|(server, connections)| {
                        let scenario = Scenario {
                            server,
                            connections,
                        };
                        (scenario, vec![OURS, STOCK_NFTABLES])
                    })
                    .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_run_has_a_name_of_its_own() {
        for suite in Suite::ALL {
            let plan = suite.plan(false);
            let mut names = HashSet::new();
            for (scenario, methods) in &plan {
                for method in methods {
                    assert!(
                        names.insert((scenario.name(), method.name())),
                        "{scenario:?}"
                    );
                }
            }
            // What the quick plan makes is not made again by the whole.
            for (scenario, methods) in suite.plan(true) {
                for method in methods {
                    assert!(
                        names.contains(&(scenario.name(), method.name())),
                        "{scenario:?}"
                    );
                }
            }
        }
    }
}
