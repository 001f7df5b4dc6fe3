//! The rules of a survey, on made-up hosts.

use super::*;
use migrate_core::preflight::{Severity, refused};
use proptest::prelude::*;

const TREE: u64 = 100;
const OUTSIDE: u64 = 900;

fn end(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn tcp(inode: u64, state: TcpState, local: &str, remote: &str) -> TcpSocket {
    TcpSocket {
        inode,
        state,
        local: end(local),
        remote: end(remote),
        v6only: false,
        uid: 0,
        rqueue: 0,
        wqueue: 0,
        ifindex: 0,
        cookie: [0; 8],
        window: 0,
    }
}

fn listener(inode: u64, local: &str) -> TcpSocket {
    tcp(inode, TcpState::Listen, local, "0.0.0.0:0")
}

fn flow(inode: u64, local: &str, remote: &str) -> TcpSocket {
    tcp(inode, TcpState::Established, local, remote)
}

fn address(ip: &str, secondary: bool) -> Address {
    Address {
        ip: ip.parse().unwrap(),
        prefix_len: if ip.contains(':') { 64 } else { 24 },
        ifindex: if ip == "127.0.0.1" { 1 } else { 2 },
        interface: if ip == "127.0.0.1" { "lo" } else { "eth0" }.to_owned(),
        secondary,
        global: true,
        dynamic: false,
        deprecated: false,
        tentative: false,
        label: None,
    }
}

/// A host with an own address and a workload's, and these TCP sockets.
fn host(tcp: Vec<TcpSocket>) -> Seen {
    Seen {
        tcp,
        addresses: vec![
            address("127.0.0.1", false),
            address("10.77.0.11", false),
            address("10.77.0.100", true),
        ],
        ..Seen::default()
    }
}

/// Sockets 100 to 109 belong to the tree, the last one as descriptor 1.
fn tree() -> Inodes {
    (TREE..TREE + 9)
        .map(|inode| (inode, vec![(7, 3)]))
        .chain([(TREE + 9, vec![(7, 1)])])
        .collect()
}

fn judge(seen: &Seen, forced: &[&str]) -> TreeSockets {
    let forced: Vec<IpAddr> = forced.iter().map(|ip| ip.parse().unwrap()).collect();
    Judge::new(seen, &tree()).run(&forced)
}

fn ips(found: &TreeSockets) -> Vec<String> {
    found.addresses.iter().map(|a| a.ip.to_string()).collect()
}

fn text(found: &TreeSockets) -> String {
    found
        .findings
        .iter()
        .map(|f| {
            format!(
                "{:?} {}: {} [{}]\n",
                f.severity, f.subject, f.finding, f.way_out
            )
        })
        .collect()
}

#[test]
fn the_common_case_moves_its_own_address() {
    let found = judge(
        &host(vec![
            listener(TREE, "0.0.0.0:6379"),
            flow(
                TREE + 1,
                "[::ffff:10.77.0.100]:6379",
                "[::ffff:10.77.0.1]:40000",
            ),
            flow(OUTSIDE, "10.77.0.11:22", "10.77.0.1:50000"),
        ]),
        &[],
    );
    assert!(!refused(&found.findings), "{}", text(&found));
    assert_eq!(ips(&found), ["10.77.0.100"]);
    assert_eq!(found.interfaces, [2]);
    assert_eq!(
        found.flows[0].to_string(),
        "10.77.0.100:6379 <-> 10.77.0.1:40000"
    );
    assert_eq!(found.listeners.len(), 1);
}

#[test]
fn the_hosts_own_address_stays_unless_it_is_asked_for() {
    let seen = host(vec![flow(TREE, "10.77.0.11:80", "10.77.0.1:40000")]);
    let found = judge(&seen, &[]);
    let line = found
        .findings
        .iter()
        .find(|f| f.severity == Severity::Refused)
        .unwrap();
    assert_eq!(line.subject, "address 10.77.0.11 on eth0");
    assert!(line.way_out.contains("--address 10.77.0.11"), "{line:?}");
    assert!(line.way_out.contains("ip address add"), "{line:?}");
    // Even then it may not take the secondary with it.
    let found = judge(&seen, &["10.77.0.11"]);
    assert!(
        text(&found).contains("also removes 10.77.0.100"),
        "{}",
        text(&found)
    );
    let found = judge(&seen, &["10.77.0.11", "10.77.0.100"]);
    assert!(!refused(&found.findings), "{}", text(&found));
    assert_eq!(
        ips(&found),
        ["10.77.0.100", "10.77.0.11"],
        "secondaries first"
    );
    let mut promoting = seen;
    promoting.promoting.insert("eth0".to_owned());
    assert!(!refused(&judge(&promoting, &["10.77.0.11"]).findings));
}

#[test]
fn an_address_that_others_use_stays_and_they_are_named() {
    let seen = host(vec![
        flow(TREE, "10.77.0.100:80", "10.77.0.1:40000"),
        listener(OUTSIDE, "10.77.0.100:53"),
        flow(OUTSIDE + 1, "10.77.0.100:22", "10.77.0.1:40001"),
        // Not accepted yet, by the tree itself.
        flow(0, "10.77.0.100:80", "10.77.0.1:40002"),
    ]);
    let found = judge(&seen, &[]);
    assert!(refused(&found.findings));
    let all = text(&found);
    assert!(
        all.contains("10.77.0.100:53 (listening), 10.77.0.100:22 <-> 10.77.0.1:40001"),
        "{all}"
    );
    assert!(!all.contains("40002"), "{all}");
    assert!(!refused(&judge(&seen, &["10.77.0.100"]).findings));
}

#[test]
fn peers_on_this_host_must_be_in_the_tree() {
    let inside = host(vec![
        listener(TREE, "127.0.0.1:5000"),
        flow(TREE + 1, "127.0.0.1:5000", "127.0.0.1:40000"),
        flow(TREE + 2, "127.0.0.1:40000", "127.0.0.1:5000"),
        // Waits at the tree's own listener.
        flow(TREE + 3, "127.0.0.1:40001", "127.0.0.1:5000"),
        flow(0, "127.0.0.1:5000", "127.0.0.1:40001"),
    ]);
    let found = judge(&inside, &[]);
    assert!(!refused(&found.findings), "{}", text(&found));
    assert!(found.flows.is_empty() && found.addresses.is_empty());

    for peer in ["127.0.0.1:5432", "10.77.0.11:5432"] {
        let found = judge(
            &host(vec![
                flow(TREE, "127.0.0.1:40000", peer),
                flow(OUTSIDE, peer, "127.0.0.1:40000"),
            ]),
            &[],
        );
        assert!(refused(&found.findings), "{peer}");
        assert!(
            text(&found).contains(&format!("peer {peer}")),
            "{}",
            text(&found)
        );
        assert!(found.flows.is_empty());
    }

    let closed = host(vec![
        tcp(
            TREE,
            TcpState::CloseWait,
            "127.0.0.1:40000",
            "127.0.0.1:5432",
        ),
        tcp(0, TcpState::FinWait2, "127.0.0.1:5432", "127.0.0.1:40000"),
    ]);
    assert!(!refused(&judge(&closed, &[]).findings));
}

#[test]
fn wildcard_listeners_alone_move_nothing() {
    let seen = host(vec![
        listener(TREE, "[::]:80"),
        listener(TREE + 1, "127.0.0.1:81"),
    ]);
    let found = judge(&seen, &[]);
    assert!(!refused(&found.findings));
    assert!(found.addresses.is_empty() && found.interfaces.is_empty());
    let all = text(&found);
    assert!(
        all.contains("--address IP") && all.contains("127.0.0.1:81"),
        "{all}"
    );
    assert_eq!(ips(&judge(&seen, &["10.77.0.100"])), ["10.77.0.100"]);
    assert!(
        refused(&judge(&seen, &["10.77.0.99"]).findings),
        "nobody has it"
    );
}

#[test]
fn what_cannot_be_carried_is_refused() {
    let mut seen = host(vec![
        flow(TREE, "10.77.0.100:80", "10.77.0.1:40000"),
        flow(TREE + 1, "[fe80::1]:80", "[fe80::2]:40000"),
    ]);
    seen.mptcp.insert(TREE);
    seen.other.insert(TREE + 2, SocketKind::Packet);
    seen.other.insert(TREE + 3, SocketKind::Netlink);
    let vsock = Unlisted {
        domain: libc::AF_VSOCK,
        protocol: 0,
        foreign_namespace: false,
    };
    let idle = Unlisted {
        domain: libc::AF_INET,
        protocol: libc::IPPROTO_TCP,
        foreign_namespace: false,
    };
    let foreign = Unlisted {
        foreign_namespace: true,
        ..idle
    };
    seen.unlisted.insert(TREE + 4, Some(vsock));
    seen.unlisted.insert(TREE + 5, Some(idle));
    seen.unlisted.insert(TREE + 6, Some(foreign));
    let found = judge(&seen, &[]);
    let subjects: Vec<&str> = found
        .findings
        .iter()
        .filter(|f| f.severity == Severity::Refused)
        .map(|f| f.subject.as_str())
        .collect();
    assert_eq!(
        subjects,
        [
            "mptcp",
            "link-local addresses",
            "packet socket",
            "socket",
            "network namespace"
        ],
        "{}",
        text(&found)
    );
    for finding in &found.findings {
        assert!(finding.severity != Severity::Refused || !finding.way_out.is_empty());
    }
}

fn unix(inode: u64, kind: UnixKind, peer: u64, path: Option<&str>) -> UnixSocket {
    UnixSocket {
        inode,
        kind,
        listening: false,
        peer_inode: Some(peer),
        shut_down: false,
        path: path.map(str::to_owned),
    }
}

#[test]
fn unix_sockets_may_leave_the_tree_as_stdio_and_datagrams_only() {
    let mut seen = host(Vec::new());
    seen.unix = vec![
        unix(TREE, UnixKind::Stream, TREE + 1, None),
        unix(TREE + 1, UnixKind::Stream, TREE, None),
        unix(TREE + 2, UnixKind::Dgram, OUTSIDE, None),
        unix(OUTSIDE, UnixKind::Dgram, 0, Some("/dev/log")),
        unix(TREE + 9, UnixKind::Stream, OUTSIDE + 1, None),
    ];
    let found = judge(&seen, &[]);
    assert!(!refused(&found.findings), "{}", text(&found));
    assert_eq!(found.external_unix, [TREE + 2, TREE + 9]);
    assert!(text(&found).contains("/dev/log"));
    seen.unix
        .push(unix(TREE + 3, UnixKind::Stream, OUTSIDE + 2, None));
    assert!(refused(&judge(&seen, &[]).findings));
    // Its other end has been closed: it leads nowhere.
    let mut half = unix(TREE + 3, UnixKind::Stream, 0, None);
    half.shut_down = true;
    seen.unix.pop();
    seen.unix.push(half);
    assert!(!refused(&judge(&seen, &[]).findings));
    // Or it waits for somebody outside to accept it.
    seen.unix.pop();
    seen.unix.push(unix(TREE + 3, UnixKind::Stream, 0, None));
    assert!(refused(&judge(&seen, &[]).findings));
}

#[test]
fn ports_of_the_destination() {
    let ours = [Listener {
        local: end("0.0.0.0:6379"),
        v6only: false,
    }];
    let flows = [Flow::new(end("10.77.0.100:6379"), end("10.77.0.1:40000"))];
    assert!(port_findings(&ours, &flows, &[listener(1, "10.77.0.12:22")]).is_empty());
    let found = port_findings(&ours, &flows, &[listener(1, "[::]:6379")]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].finding.contains("[::]:6379"), "{found:?}");
    // The port of an outgoing connection is taken by a listener, not by a flow.
    let outgoing = [Flow::new(end("10.77.0.100:40000"), end("10.77.0.1:5432"))];
    assert_eq!(
        port_findings(&[], &outgoing, &[listener(1, "0.0.0.0:40000")]).len(),
        1
    );
    let other = flow(1, "10.77.0.12:40000", "10.77.0.1:5432");
    assert!(port_findings(&[], &outgoing, &[other]).is_empty());
    let same = tcp(0, TcpState::TimeWait, "10.77.0.100:40000", "10.77.0.1:5432");
    assert_eq!(port_findings(&[], &outgoing, &[same]).len(), 1);
}

proptest! {
    #[test]
    fn every_flow_leaves_the_host_from_an_address_that_moves_or_is_refused(
        sockets in prop::collection::vec((0u64..12, 0u8..14, 0usize..6, 0usize..6, 1u16..4, 1u16..4), 0..20)
    ) {
        let ips = ["127.0.0.1", "10.77.0.11", "10.77.0.100", "10.77.0.1", "10.77.0.99", "0.0.0.0"];
        let states = [
            TcpState::Established, TcpState::SynSent, TcpState::SynRecv, TcpState::FinWait1,
            TcpState::FinWait2, TcpState::TimeWait, TcpState::Close, TcpState::CloseWait,
            TcpState::LastAck, TcpState::Listen, TcpState::Closing, TcpState::Bound,
            TcpState::Established, TcpState::Established,
        ];
        let sockets = sockets
            .into_iter()
            .map(|(inode, state, l, r, lp, rp)| tcp(
                if inode == 0 { 0 } else { TREE + inode },
                states[usize::from(state)],
                &format!("{}:{lp}", ips[l]),
                &format!("{}:{rp}", ips[r]),
            ))
            .collect();
        let seen = host(sockets);
        let found = judge(&seen, &[]);
        for flow in &found.flows {
            prop_assert!(!flow.remote.ip().is_loopback());
            prop_assert!(
                found.addresses.iter().any(|a| a.ip == flow.local.ip()) || refused(&found.findings),
                "{flow}"
            );
        }
        for address in &found.addresses {
            prop_assert!(seen.addresses.iter().any(|a| a.ip == address.ip));
            prop_assert!(!address.ip.is_loopback());
        }
        prop_assert!(found.interfaces.iter().all(|i| *i == 2));
        for finding in &found.findings {
            prop_assert!(finding.severity != Severity::Refused || !finding.way_out.is_empty(), "{finding:?}");
        }
    }
}
