//! What a process tree uses of the network, and whether the other host can
//! take it over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use migrate_core::facts::{AddressFacts, SocketFacts, TreeFacts, WindowFacts};
use migrate_core::flow::{Flow, Listener, canonical, is_host_local};
use migrate_core::preflight::Finding;

use crate::classify::{self, Unlisted};
use crate::diag::{
    IPPROTO_MPTCP, SocketKind, TcpSocket, TcpState, UdpSocket, UnixKind, UnixSocket, mptcp_inodes,
    other_sockets, tcp_sockets, udp_sockets, unix_sockets,
};
use crate::ending::{self, EndedFlows};
use crate::error::{NetError, promote_help};
use crate::route::{Address, Net, Placement, promotes_secondaries};
use crate::rules::{self, Owner, join};

/// Holders of each socket inode: process and descriptor.
type Inodes = BTreeMap<u64, Vec<(i32, i32)>>;

/// What the user has decided beforehand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SurveyOptions {
    /// Addresses that move in any case (`--address`), even the host's own.
    pub forced_addresses: Vec<IpAddr>,
    /// [`TreeSockets::doubted`] of an earlier survey: what is in doubt again
    /// belongs to others.
    pub doubted: BTreeSet<u64>,
    /// The tree comes back to this very host, so its addresses stay and may be
    /// shared with others.
    pub in_place: bool,
}

/// A tree's network, and what stands in the way of moving it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreeSockets {
    /// Connections with peers outside the tree and outside this host.
    pub flows: Vec<Flow>,
    /// Listening sockets.
    pub listeners: Vec<Listener>,
    /// Addresses that move, in the order in which they have to be withdrawn
    /// (secondaries before their primary) and the reverse of that in which
    /// they are restored.
    pub addresses: Vec<AddressFacts>,
    /// What was found, worst and best.
    pub findings: Vec<Finding>,
    /// The receive windows of those connections.
    pub windows: WindowFacts,
    /// Every TCP socket of the tree, listeners first.
    pub sockets: Vec<SocketFacts>,
    /// Indexes of the interfaces where the moving addresses sit.
    pub interfaces: Vec<u32>,
    /// Connections at the moving addresses that the tree has closed and the
    /// kernel has not done with, those in TIME_WAIT last.
    pub ended: EndedFlows,
    /// Those of them whose peers have not acknowledged everything.
    pub closing: Vec<Flow>,
    /// Connections at the tree's listeners that no process of the tree held
    /// when it was looked at: accepted since, or by others. A second survey
    /// tells.
    pub doubted: BTreeSet<u64>,
    /// Listeners with connections that the tree has not accepted, and how many.
    pub unaccepted: Vec<(SocketAddr, u32)>,
    /// Inodes of the tree's Unix sockets whose other end is outside the tree.
    /// A stream that is nobody's descriptor 0, 1 or 2 has been refused above;
    /// a datagram socket has a note.
    pub external_unix: Vec<u64>,
}

/// Everything a survey looks at, so that it can be judged without the machine.
#[derive(Debug, Default)]
struct Seen {
    tcp: Vec<TcpSocket>,
    mptcp: BTreeSet<u64>,
    udp: Vec<UdpSocket>,
    unix: Vec<UnixSocket>,
    other: BTreeMap<u64, SocketKind>,
    /// Sockets of the tree that are in none of the above.
    unlisted: BTreeMap<u64, Option<Unlisted>>,
    addresses: Vec<Address>,
    default_sources: Vec<IpAddr>,
    /// Interfaces that keep secondaries when their primary goes.
    promoting: BTreeSet<String>,
}

/// Turns the socket inodes of a tree into its flows, listeners and addresses.
///
/// `inodes` names every socket of the tree with the processes and descriptors
/// that hold it. Must run in the network namespace of the tree; sockets of
/// another one are refused.
///
/// # Errors
///
/// The kernel does not list its sockets or addresses.
pub async fn survey(
    net: &Net,
    inodes: &Inodes,
    options: &SurveyOptions,
) -> Result<TreeSockets, NetError> {
    let mut seen = Seen {
        tcp: tcp_sockets()?,
        mptcp: mptcp_inodes()?,
        udp: udp_sockets()?,
        unix: unix_sockets()?,
        other: other_sockets()?,
        unlisted: BTreeMap::new(),
        addresses: net.addresses().await?,
        default_sources: net.default_sources().await?,
        promoting: BTreeSet::new(),
    };
    seen.promoting = seen
        .addresses
        .iter()
        .map(|a| &a.interface)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .filter(|name| promotes_secondaries(name))
        .cloned()
        .collect();
    let listed: BTreeSet<u64> = (seen.tcp.iter().map(|s| s.inode))
        .chain(seen.udp.iter().map(|s| s.inode))
        .chain(seen.unix.iter().map(|s| s.inode))
        .chain(seen.other.keys().copied())
        .chain(seen.mptcp.iter().copied())
        .collect();
    for (inode, holders) in inodes.iter().filter(|(inode, _)| !listed.contains(inode)) {
        let answer = holders
            .iter()
            .find_map(|(pid, fd)| classify::ask(*pid, *fd).ok());
        seen.unlisted.insert(*inode, answer);
    }
    let mut judge = Judge::new(&seen, inodes);
    judge.doubted_before.clone_from(&options.doubted);
    judge.in_place = options.in_place;
    Ok(judge.run(&options.forced_addresses))
}

/// The tree's connections and listeners and nothing more: cheap enough to be
/// asked in every round. Connections that cannot leave the host are left out.
///
/// # Errors
///
/// The kernel does not list its sockets.
pub fn tree_flows(inodes: &Inodes) -> Result<(Vec<Flow>, Vec<Listener>), NetError> {
    let (mut flows, mut listeners) = (Vec::new(), Vec::new());
    for socket in tcp_sockets()? {
        if !inodes.contains_key(&socket.inode) {
            continue;
        }
        let (local, remote) = ends(&socket);
        if socket.state == TcpState::Listen {
            listeners.push(Listener {
                local,
                v6only: socket.v6only,
            });
        } else if socket.state.is_connected() && !is_host_local(remote.ip()) {
            flows.push(Flow::new(local, remote));
        }
    }
    Ok((flows, listeners))
}

/// Judges what was seen.
struct Judge<'a> {
    seen: &'a Seen,
    inodes: &'a Inodes,
    /// Own and peer's end of every connected TCP socket of the tree.
    tree_ends: BTreeSet<(SocketAddr, SocketAddr)>,
    host_ips: BTreeSet<IpAddr>,
    flows: BTreeSet<Flow>,
    windows: WindowFacts,
    listeners: BTreeSet<Listener>,
    /// Addresses that sockets of the tree are bound to, beyond loopback.
    needed: BTreeSet<IpAddr>,
    external_unix: Vec<u64>,
    doubted_before: BTreeSet<u64>,
    doubted: BTreeSet<u64>,
    in_place: bool,
    findings: Vec<Finding>,
}

impl<'a> Judge<'a> {
    fn new(seen: &'a Seen, inodes: &'a Inodes) -> Self {
        Self {
            seen,
            inodes,
            tree_ends: seen
                .tcp
                .iter()
                .filter(|s| inodes.contains_key(&s.inode) && s.state.is_connected())
                .map(ends)
                .collect(),
            host_ips: seen.addresses.iter().map(|a| a.ip).collect(),
            flows: BTreeSet::new(),
            windows: WindowFacts::default(),
            listeners: BTreeSet::new(),
            needed: BTreeSet::new(),
            external_unix: Vec::new(),
            doubted_before: BTreeSet::new(),
            doubted: BTreeSet::new(),
            in_place: false,
            findings: Vec::new(),
        }
    }

    fn run(mut self, forced: &[IpAddr]) -> TreeSockets {
        self.mptcp();
        self.tcp();
        self.datagrams();
        self.unix();
        self.unlisted();
        let (addresses, interfaces) = self.addresses(forced);
        let sockets = self.sockets();
        if addresses.is_empty() {
            self.nothing_moves();
        }
        let ips: Vec<IpAddr> = addresses.iter().map(|a| a.ip).collect();
        let closing = (self.seen.tcp.iter())
            .filter(|s| ending::is_closing(s, &ips))
            .map(|s| Flow::new(s.local, s.remote))
            .collect();
        let unaccepted = (self.seen.tcp.iter())
            .filter(|s| s.state == TcpState::Listen && s.rqueue > 0 && self.is_tree(s.inode))
            .map(|s| (canonical(s.local), s.rqueue))
            .collect();
        TreeSockets {
            ended: ending::ended_of(&self.seen.tcp, &ips),
            closing,
            unaccepted,
            doubted: self.doubted,
            flows: self.flows.into_iter().collect(),
            listeners: self.listeners.into_iter().collect(),
            addresses,
            findings: self.findings,
            windows: self.windows,
            sockets,
            interfaces,
            external_unix: self.external_unix,
        }
    }

    fn sockets(&self) -> Vec<SocketFacts> {
        let mut of_tree: Vec<&TcpSocket> = self
            .seen
            .tcp
            .iter()
            .filter(|s| self.is_tree(s.inode))
            .collect();
        of_tree.sort_by_key(|s| (s.state != TcpState::Listen, ends(s)));
        of_tree
            .into_iter()
            .map(|socket| {
                let (local, remote) = ends(socket);
                SocketFacts {
                    local,
                    peer: (remote.port() != 0).then_some(remote),
                    state: socket.state.name().to_owned(),
                    receive_queue: socket.rqueue,
                    send_queue: socket.wqueue,
                }
            })
            .collect()
    }

    fn is_tree(&self, inode: u64) -> bool {
        self.inodes.contains_key(&inode)
    }

    /// `pid 12 fd 3`, of the first holder.
    fn holder(&self, inode: u64) -> String {
        match self.inodes.get(&inode).and_then(|h| h.first()) {
            Some((pid, fd)) => format!("pid {pid} fd {fd}"),
            None => format!("socket {inode}"),
        }
    }

    fn mptcp(&mut self) {
        let unlisted = self.seen.unlisted.iter().filter(|(_, answer)| {
            answer.is_some_and(|a| u32::try_from(a.protocol) == Ok(IPPROTO_MPTCP))
        });
        let holders: Vec<String> = (self.seen.mptcp.iter())
            .filter(|inode| self.is_tree(**inode))
            .chain(unlisted.map(|(inode, _)| inode))
            .map(|inode| self.holder(*inode))
            .collect();
        if !holders.is_empty() {
            self.findings.push(Finding::refused(
                "mptcp",
                format!(
                    "{} of Multipath TCP, which CRIU cannot carry: {}",
                    count(holders.len(), "socket"),
                    join(&holders)
                ),
                "restart the workload with plain TCP: `GODEBUG=multipathtcp=0` for Go programs, \
                 without `mptcpize` otherwise",
            ));
        }
    }

    fn tcp(&mut self) {
        let mut counts = BTreeMap::<&'static str, usize>::new();
        let mut local_peers = BTreeMap::<SocketAddr, usize>::new();
        let mut link_local = Vec::new();
        let of_tree = self.seen.tcp.iter().filter(|s| {
            // The subflows of an MPTCP socket share its inode.
            self.inodes.contains_key(&s.inode) && !self.seen.mptcp.contains(&s.inode)
        });
        for socket in of_tree {
            let (local, remote) = ends(socket);
            if socket.state == TcpState::Listen {
                self.listeners.insert(Listener {
                    local,
                    v6only: socket.v6only,
                });
                if is_bound_to_one(local.ip()) {
                    self.needed.insert(local.ip());
                }
                if socket.rqueue > 0 {
                    self.findings.push(Finding::note(
                        format!("listener {local}"),
                        format!(
                            "{} not accepted yet; it has to accept them before it moves",
                            count(socket.rqueue as usize, "connection")
                        ),
                        "",
                    ));
                }
            } else if socket.state.is_connected() {
                if rules::is_link_local(local.ip()) || rules::is_link_local(remote.ip()) {
                    link_local.push(Flow::new(local, remote));
                } else if self.is_inside(local, remote) {
                    self.need_both(local.ip(), remote.ip());
                } else if self.is_this_host(remote.ip()) {
                    if socket.state.is_half_closed() && self.counterpart(local, remote).is_none() {
                        *counts.entry("closed by a peer on this host").or_default() += 1;
                    } else {
                        *local_peers.entry(remote).or_default() += 1;
                    }
                } else {
                    self.flows.insert(Flow::new(local, remote));
                    let window = u64::from(socket.window);
                    self.windows.sum_bytes += window;
                    self.windows.largest_bytes = self.windows.largest_bytes.max(window);
                    self.needed.insert(local.ip());
                    if socket.state == TcpState::SynSent {
                        *counts.entry("still connecting").or_default() += 1;
                    } else if socket.state.is_half_closed() {
                        *counts.entry("closed in one direction").or_default() += 1;
                    }
                }
            } else if is_bound_to_one(local.ip()) {
                self.needed.insert(local.ip());
            }
        }
        for (peer, connections) in local_peers {
            self.findings.push(Finding::refused(
                format!("peer {peer}"),
                format!(
                    "{} with a process on this host that does not move along",
                    count(connections, "connection")
                ),
                "move that process in the same tree, or let the workload reach it by the address \
                 of a third host",
            ));
        }
        if !link_local.is_empty() {
            self.findings.push(Finding::refused(
                "link-local addresses",
                format!(
                    "{} on addresses that are valid on this host's link only: {}",
                    count(link_local.len(), "connection"),
                    join(&link_local)
                ),
                "connect by a global or unique-local (fd00::/8) address",
            ));
        }
        for (what, connections) in counts {
            self.findings.push(Finding::note(
                "connections",
                format!(
                    "{} {what}; carried as they are",
                    count(connections, "connection")
                ),
                "",
            ));
        }
        self.forgotten();
    }

    /// Connections in TIME_WAIT at the tree's listeners belong to nobody any more.
    fn forgotten(&mut self) {
        let waiting = (self.seen.tcp.iter())
            .filter(|s| s.state == TcpState::TimeWait)
            .filter(|s| {
                (self.listeners.iter()).any(|l| rules::collide(s.local, false, l.local, l.v6only))
            })
            .count();
        if waiting > 0 {
            self.findings.push(Finding::note(
                "connections",
                format!(
                    "{} closed and in TIME_WAIT; the destination answers their peers for a moment",
                    count(waiting, "connection")
                ),
                "",
            ));
        }
    }

    /// Both ends belong to the tree; CRIU carries such a pair as a whole.
    fn is_inside(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.tree_ends.contains(&(remote, local))
            // Not accepted yet by a listener of the tree.
            || self.is_this_host(remote.ip())
                && self.seen.tcp.iter().any(|s| {
                    s.inode == 0 && s.state == TcpState::Established && ends(s) == (remote, local)
                })
                && self.seen.tcp.iter().any(|s| {
                    s.state == TcpState::Listen
                        && self.is_tree(s.inode)
                        && rules::collide(remote, false, s.local, s.v6only)
                })
    }

    /// The other end of a connection within this host, when a process holds it.
    fn counterpart(&self, local: SocketAddr, remote: SocketAddr) -> Option<&TcpSocket> {
        (self.seen.tcp.iter())
            .find(|s| s.inode != 0 && s.state.is_connected() && ends(s) == (remote, local))
    }

    fn is_this_host(&self, ip: IpAddr) -> bool {
        is_host_local(ip) || self.host_ips.contains(&ip)
    }

    fn need_both(&mut self, a: IpAddr, b: IpAddr) {
        self.needed
            .extend([a, b].into_iter().filter(|ip| is_bound_to_one(*ip)));
    }

    fn datagrams(&mut self) {
        let udp: Vec<SocketAddr> = (self.seen.udp.iter())
            .filter(|s| self.is_tree(s.inode))
            .map(|s| canonical(s.local))
            .collect();
        self.needed.extend(
            udp.iter()
                .map(SocketAddr::ip)
                .filter(|ip| is_bound_to_one(*ip)),
        );
        if !udp.is_empty() {
            self.findings.push(Finding::note(
                "udp",
                format!(
                    "{} carried ({}); datagrams that arrive during the move are lost",
                    count(udp.len(), "UDP socket"),
                    join(&udp)
                ),
                "",
            ));
        }
        for (inode, kind) in &self.seen.other {
            if !self.inodes.contains_key(inode) {
                continue;
            }
            let holder = self.holder(*inode);
            match kind {
                SocketKind::Netlink => {}
                SocketKind::Raw => self.findings.push(Finding::note(
                    "raw socket",
                    format!(
                        "{holder} is a raw IP socket; packets that arrive during the move are lost"
                    ),
                    "",
                )),
                SocketKind::Packet => self.findings.push(Finding::refused(
                    "packet socket",
                    format!("{holder} reads whole frames of this host's interfaces"),
                    "stop that part of the workload (a capture, a DHCP client) before the move",
                )),
            }
        }
    }

    fn unix(&mut self) {
        let by_inode: BTreeMap<u64, &UnixSocket> =
            self.seen.unix.iter().map(|s| (s.inode, s)).collect();
        for socket in self
            .seen
            .unix
            .iter()
            .filter(|s| self.inodes.contains_key(&s.inode))
        {
            if let (Some(path), true) = (&socket.path, socket.listening) {
                self.findings.push(Finding::note(
                    format!("unix socket {path}"),
                    "moves with the workload; its clients on this host outside the tree do not",
                    "",
                ));
            }
            let Some(peer) = socket.peer_inode.filter(|peer| !self.is_tree(*peer)) else {
                continue;
            };
            // A peer that nobody has accepted yet shows as inode zero; it is
            // inside when the listener that has it is.
            if peer == 0 && self.is_pending_inside(socket) {
                continue;
            }
            // Half of a pair whose other half is closed, as every Java program
            // has one: CRIU makes it so again.
            if peer == 0 && socket.shut_down && !self.is_stdio(socket.inode) {
                continue;
            }
            self.external_unix.push(socket.inode);
            let peer_path = by_inode.get(&peer).and_then(|p| p.path.as_deref());
            self.external(socket.inode, socket.kind, peer_path);
        }
    }

    /// Some Unix listener of the tree exists that the socket can be waiting at.
    fn is_pending_inside(&self, socket: &UnixSocket) -> bool {
        socket.kind != UnixKind::Dgram
            && self
                .seen
                .unix
                .iter()
                .any(|l| l.listening && self.is_tree(l.inode))
    }

    /// Whether somebody has it as a standard stream.
    fn is_stdio(&self, inode: u64) -> bool {
        (self.inodes.get(&inode))
            .is_some_and(|holders| holders.iter().any(|(_, fd)| (0..=2).contains(fd)))
    }

    fn external(&mut self, inode: u64, kind: UnixKind, peer: Option<&str>) {
        let holder = self.holder(inode);
        let to = peer.unwrap_or("a socket without a name");
        if kind == UnixKind::Dgram {
            self.findings.push(Finding::note(
                "unix socket",
                format!(
                    "{holder} sends datagrams to {to}, which must exist on the destination too"
                ),
                "",
            ));
            return;
        }
        if !self.is_stdio(inode) {
            self.findings.push(Finding::refused(
                "unix socket",
                format!("{holder} is connected to a process outside the tree ({to})"),
                "let the workload close that connection, or move both processes in one tree",
            ));
        }
    }

    fn unlisted(&mut self) {
        let mut foreign = Vec::new();
        for (inode, answer) in &self.seen.unlisted {
            let Some(answer) = answer else {
                // Closed since the tree was read, or not for us to look at.
                self.findings.push(Finding::note(
                    "socket",
                    format!("{} could not be examined", self.holder(*inode)),
                    "run the check again",
                ));
                continue;
            };
            if answer.domain == libc::AF_UNIX {
                // Of another namespace: whoever is at the other end is outside.
                self.external_unix.push(*inode);
                self.external(*inode, UnixKind::Stream, None);
                continue;
            }
            if answer.foreign_namespace {
                foreign.push(self.holder(*inode));
                continue;
            }
            let carried = match answer.domain {
                libc::AF_INET | libc::AF_INET6 => matches!(
                    answer.protocol,
                    libc::IPPROTO_TCP | libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE
                ),
                libc::AF_NETLINK => true,
                _ => false,
            };
            let is_mptcp = u32::try_from(answer.protocol) == Ok(IPPROTO_MPTCP);
            if !carried && !is_mptcp {
                self.findings.push(Finding::refused(
                    "socket",
                    format!(
                        "{} is {}, which CRIU cannot carry",
                        self.holder(*inode),
                        family_name(answer.domain, answer.protocol)
                    ),
                    "stop the part of the workload that uses it before the move",
                ));
            }
        }
        if !foreign.is_empty() {
            self.findings.push(Finding::refused(
                "network namespace",
                format!(
                    "{} of another network namespace: {}",
                    count(foreign.len(), "socket"),
                    join(&foreign)
                ),
                "run migrate in the network namespace of the workload: `nsenter --net -t PID`",
            ));
        }
    }

    /// The addresses that move and the interfaces they sit on.
    fn addresses(&mut self, forced: &[IpAddr]) -> (Vec<AddressFacts>, Vec<u32>) {
        let forced: BTreeSet<IpAddr> = forced.iter().map(IpAddr::to_canonical).collect();
        let wanted: BTreeSet<IpAddr> = self.needed.union(&forced).copied().collect();
        let mut moving: Vec<&Address> = Vec::new();
        for ip in &wanted {
            let Some(address) = self.seen.addresses.iter().find(|a| a.ip == *ip) else {
                self.findings.push(Finding::refused(
                    format!("address {ip}"),
                    "no interface of this host has it",
                    "give it to an interface, or let the workload use one that this host has",
                ));
                continue;
            };
            if self.address(address, forced.contains(ip)) {
                moving.push(address);
            }
        }
        for address in &moving {
            self.secondaries(address, &wanted);
        }
        // Primaries last: the kernel takes secondaries along with them.
        moving.sort_by_key(|a| !a.secondary);
        let interfaces: BTreeSet<u32> = moving.iter().map(|a| a.ifindex).collect();
        let facts = moving
            .iter()
            .map(|a| AddressFacts {
                ip: a.ip,
                prefix_len: a.prefix_len,
                interface: a.interface.clone(),
            })
            .collect();
        (facts, interfaces.into_iter().collect())
    }

    /// Judges one address that the tree uses; `false` when it can move in no case.
    fn address(&mut self, address: &Address, forced: bool) -> bool {
        let Address { ip, interface, .. } = address;
        let subject = format!("address {ip} on {interface}");
        if self.is_on_loopback(address) {
            self.findings.push(Finding::refused(
                subject,
                "sits on the loopback interface: peers reach it by a route, which does not move",
                "put the workload's address on the interface that faces its clients",
            ));
            return false;
        }
        if self.in_place {
            // Only to tell what is in doubt.
            let _ = self.other_users(*ip);
            let finding = Finding::ok(subject, "stays on this host");
            self.findings.push(finding);
            return true;
        }
        let own_address = format!(
            "give the workload an address of its own (`ip address add ADDRESS/{} dev {interface}`) \
             and let its clients use that, or pass `--address {ip}` to move this one anyway",
            address.prefix_len
        );
        let mut fine = true;
        match rules::owner(address, &self.seen.addresses, &self.seen.default_sources) {
            Owner::Workload => {}
            Owner::Fixed(why) => {
                self.findings.push(Finding::refused(
                    subject,
                    format!("cannot move: {why}"),
                    "let the workload use a global or unique-local (fd00::/8) address",
                ));
                return false;
            }
            Owner::Host(why) => {
                fine = false;
                self.findings.push(if forced {
                    Finding::note(
                        subject.clone(),
                        format!("moves because you asked for it, although {why}"),
                        "",
                    )
                } else {
                    Finding::refused(
                        subject.clone(),
                        format!("{why}, so it stays"),
                        own_address.clone(),
                    )
                });
            }
        }
        let users = self.other_users(*ip);
        if !users.is_empty() {
            fine = false;
            let users = join(&users);
            self.findings.push(if forced {
                Finding::note(
                    subject.clone(),
                    format!("other processes of this host lose it: {users}"),
                    "",
                )
            } else {
                Finding::refused(
                    subject.clone(),
                    format!("processes outside the tree use it too: {users}"),
                    format!("stop them or bind them elsewhere, or {own_address}"),
                )
            });
        }
        let udp: Vec<SocketAddr> = (self.seen.udp.iter())
            .filter(|s| !self.is_tree(s.inode))
            .map(|s| canonical(s.local))
            .filter(|local| local.ip() == *ip)
            .collect();
        if !udp.is_empty() {
            self.findings.push(Finding::note(
                subject.clone(),
                format!(
                    "UDP sockets outside the tree are bound to it: {}",
                    join(&udp)
                ),
                "",
            ));
        }
        if fine {
            self.findings.push(Finding::ok(
                subject,
                "belongs to the workload and moves with it",
            ));
        }
        true
    }

    fn is_on_loopback(&self, address: &Address) -> bool {
        (self.seen.addresses.iter()).any(|a| a.ifindex == address.ifindex && a.ip.is_loopback())
    }

    /// Sockets outside the tree that are bound to exactly this address.
    fn other_users(&mut self, ip: IpAddr) -> Vec<String> {
        let new: BTreeSet<u64> = (self.seen.tcp.iter())
            .filter(|s| s.inode != 0 && !self.is_tree(s.inode) && s.state.is_connected())
            .filter(|s| !self.doubted_before.contains(&s.inode) && canonical(s.local).ip() == ip)
            .filter(|s| {
                (self.listeners.iter()).any(|l| rules::collide(s.local, false, l.local, l.v6only))
            })
            .map(|s| s.inode)
            .collect();
        self.doubted.extend(&new);
        let outside = || {
            (self.seen.tcp.iter())
                .filter(|s| s.inode != 0 && !self.is_tree(s.inode) && !new.contains(&s.inode))
                .filter(|s| canonical(s.local).ip() == ip)
        };
        let listening = outside()
            .filter(|s| s.state == TcpState::Listen)
            .map(|s| format!("{} (listening)", canonical(s.local)));
        let connected = outside().filter(|s| s.state.is_connected()).map(|s| {
            let (local, remote) = ends(s);
            Flow::new(local, remote).to_string()
        });
        listening.chain(connected).collect()
    }

    /// A primary address must not take others with it when it goes.
    fn secondaries(&mut self, address: &Address, moving: &BTreeSet<IpAddr>) {
        if self.in_place {
            return;
        }
        let left_behind: Vec<IpAddr> = rules::dependents(address, &self.seen.addresses)
            .into_iter()
            .filter(|ip| !moving.contains(ip))
            .collect();
        if !left_behind.is_empty() && !self.seen.promoting.contains(&address.interface) {
            self.findings.push(Finding::refused(
                format!("address {} on {}", address.ip, address.interface),
                format!(
                    "when it goes, the kernel also removes {}",
                    join(&left_behind)
                ),
                promote_help(&address.interface),
            ));
        }
    }

    /// No address moves: say what that means for the clients.
    fn nothing_moves(&mut self) {
        let open: Vec<SocketAddr> = (self.listeners.iter())
            .map(|l| l.local)
            .filter(|local| !is_host_local(local.ip()))
            .collect();
        let loopback: Vec<SocketAddr> = (self.listeners.iter())
            .map(|l| l.local)
            .filter(|local| is_host_local(local.ip()))
            .collect();
        if !open.is_empty() && self.needed.is_empty() {
            self.findings.push(Finding::note(
                "address",
                format!(
                    "the workload listens on every address ({}) and has no connections, so no \
                     address moves with it; clients must find the new host",
                    join(&open)
                ),
                "pass `--address IP` to move an address along",
            ));
        }
        if !loopback.is_empty() {
            self.findings.push(Finding::note(
                "address",
                format!(
                    "listens on loopback ({}); clients on this host stay behind",
                    join(&loopback)
                ),
                "",
            ));
        }
    }
}

/// Both ends in the form in which they are compared.
fn ends(socket: &TcpSocket) -> (SocketAddr, SocketAddr) {
    (canonical(socket.local), canonical(socket.remote))
}

/// A socket bound to this address needs it on the destination.
fn is_bound_to_one(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
}

/// `1 socket`, `3 sockets`.
fn count(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

fn family_name(domain: i32, protocol: i32) -> String {
    match domain {
        libc::AF_VSOCK => "a vsock".to_owned(),
        libc::AF_ALG => "a kernel crypto socket".to_owned(),
        libc::AF_CAN => "a CAN socket".to_owned(),
        libc::AF_XDP => "an XDP socket".to_owned(),
        libc::AF_PACKET => "a packet socket".to_owned(),
        libc::AF_BLUETOOTH => "a Bluetooth socket".to_owned(),
        libc::AF_TIPC => "a TIPC socket".to_owned(),
        libc::AF_INET | libc::AF_INET6 => match protocol {
            libc::IPPROTO_SCTP => "an SCTP socket".to_owned(),
            libc::IPPROTO_DCCP => "a DCCP socket".to_owned(),
            libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => "a ping socket".to_owned(),
            other => format!("a socket of IP protocol {other}"),
        },
        other => format!("a socket of family {other}"),
    }
}

/// Checks on the destination that the tree's addresses find a place and that
/// nothing there is bound to what its sockets will be bound to.
///
/// # Errors
///
/// The kernel does not list its sockets or addresses.
pub async fn compare(
    net: &Net,
    tree: &TreeFacts,
) -> Result<(Vec<Finding>, Vec<Placement>), NetError> {
    let interfaces = net.interfaces().await?;
    let addresses = net.addresses().await?;
    let mut findings = Vec::new();
    let mut placements = Vec::new();
    for address in &tree.addresses {
        let subject = format!("address {}", address.ip);
        match rules::place(address, &interfaces, &addresses) {
            Ok(placement) => {
                findings.push(Finding::ok(
                    subject,
                    format!("goes to {}", placement.interface),
                ));
                placements.push(placement);
            }
            Err(e) => {
                findings.push(Finding::refused(
                    subject,
                    e.to_string(),
                    e.help().unwrap_or_default(),
                ));
            }
        }
    }
    findings.extend(port_findings(&tree.listeners, &tree.flows, &tcp_sockets()?));
    Ok((findings, placements))
}

/// The same on the host that the tree was on before: its addresses have to be
/// there again.
///
/// # Errors
///
/// As [`compare`].
pub async fn compare_in_place(
    net: &Net,
    tree: &TreeFacts,
) -> Result<(Vec<Finding>, Vec<Placement>), NetError> {
    let mut findings = Vec::new();
    let mut placements = Vec::new();
    for address in &tree.addresses {
        let ip = address.ip;
        let subject = format!("address {ip}");
        if let Some(placement) = net.placed(ip).await? {
            findings.push(Finding::ok(
                subject,
                format!("is on {}", placement.interface),
            ));
            placements.push(placement);
        } else {
            findings.push(Finding::refused(
                subject,
                "is not on this host: the network is not up yet, or the address has not come back",
                format!(
                    "wait for the network, or bring it back: ip address add {ip}/{} dev {}",
                    address.prefix_len, address.interface
                ),
            ));
        }
    }
    findings.extend(port_findings(&tree.listeners, &tree.flows, &tcp_sockets()?));
    Ok((findings, placements))
}

/// What on this host is bound to an end that the tree will be bound to.
fn port_findings(listeners: &[Listener], flows: &[Flow], here: &[TcpSocket]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let listening: Vec<&TcpSocket> = here
        .iter()
        .filter(|s| s.state == TcpState::Listen)
        .collect();
    // One line for each listener in the way, however many sockets it is in the way of.
    let mut in_the_way = BTreeMap::<SocketAddr, BTreeSet<SocketAddr>>::new();
    let own = (listeners.iter().map(|l| (l.local, l.v6only)))
        .chain(flows.iter().map(|f| (f.local, false)));
    for (local, v6only) in own {
        for theirs in &listening {
            if rules::collide(local, v6only, theirs.local, theirs.v6only) {
                (in_the_way.entry(canonical(theirs.local)).or_default()).insert(local);
            }
        }
    }
    for (theirs, ours) in in_the_way {
        let ours: Vec<SocketAddr> = ours.into_iter().collect();
        findings.push(Finding::refused(
            format!("port {}", theirs.port()),
            format!(
                "a socket of the destination listens on {theirs}, which the workload needs for {}",
                join(&ours)
            ),
            "stop that service on the destination, or bind it to the destination's own address",
        ));
    }
    let flows: BTreeSet<Flow> = flows.iter().copied().collect();
    let taken: Vec<String> = here
        .iter()
        .filter(|s| s.state != TcpState::Listen)
        .map(|s| (Flow::new(s.local, s.remote), s.state))
        .filter(|(flow, _)| flows.contains(flow))
        .map(|(flow, state)| format!("{flow} ({state:?})"))
        .collect();
    if !taken.is_empty() {
        findings.push(Finding::refused(
            "connections",
            format!("the destination has them already: {}", join(&taken)),
            "a copy of the workload may run there; connections in TIME_WAIT end after a minute",
        ));
    }
    findings
}

#[cfg(test)]
#[path = "survey_tests.rs"]
mod tests;
