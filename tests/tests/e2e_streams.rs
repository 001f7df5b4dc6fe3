//! Connections that a request and its reply do not describe: one side that
//! never stops, connections made for one request, connections half closed.
//! None may notice a migration but by its pause, and no RST may be on the wire.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, UNIX_EPOCH};

use migrate_test_hosts::{HostName, Lab, LabGuard, WORKLOAD_V6};
use migrate_tests::hosts::{ResetCapture, TcpCounts, eventually};
use migrate_tests::migration::{
    migrate, moves, moves_in_time, no_gate_left, serves_old_connections,
};
use migrate_tests::refusals::shell;
use migrate_tests::require;
use migrate_tests::streams::wire::{REPLY_BYTES, REQUEST, head};
use migrate_tests::streams::{Kind, Running};
use migrate_tests::workload::{Kind as WorkloadKind, Workload};

fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// What a peer may send again of one connection around a move: a probe, and the
/// first segment each time that its timer runs out, for the peer of a silent
/// host has no choice. Held packets that are overtaken by newer ones count in
/// hundreds, for a sender takes them for lost.
const REPEATED_MAX: u64 = 32;

/// Moves a workload `hops` times, to and fro, under clients of some kinds,
/// half of them over IPv6 where it has such an address.
fn moves_under(test: &str, workload: WorkloadKind, clients: &[(Kind, usize)], hops: usize) {
    let lab = lab(test);
    let workload = Workload::start(workload, &lab).unwrap();
    let client = lab.host(HostName::Client);
    let ports = "echo 1024 65535 >/proc/sys/net/ipv4/ip_local_port_range";
    assert!(client.exec(["sh", "-c", ports]).unwrap().status.success());
    let capture = ResetCapture::start(&client).unwrap();
    let hosts = [HostName::Host1, HostName::Host2, HostName::Client];
    let v4 = workload.kind.address();
    let v6 = SocketAddr::new(IpAddr::from(WORKLOAD_V6), v4.port());
    let addresses = match workload.kind {
        WorkloadKind::Streams => vec![v4, v6],
        _ => vec![v4],
    };
    let running: Vec<Running> = clients
        .iter()
        .flat_map(|(kind, clients)| addresses.iter().map(move |to| (*kind, *clients, *to)))
        .map(|(kind, clients, to)| Running::start(kind, clients, &client, to).unwrap())
        .collect();
    let counts = || hosts.map(|name| TcpCounts::of(&lab.host(name)).unwrap());
    let (mut from, mut to) = (HostName::Host1, HostName::Host2);
    let mut watched = Vec::new();
    for hop in 1..=hops {
        let before = counts();
        let (report, noticeable) = moves_in_time(&lab, &workload, from, to);
        watched.push(noticeable);
        for running in &running {
            running.goes_on(1).unwrap();
        }
        println!(
            "{test}, hop {hop} to {to}: blackout {}, new ones held {:?} us before",
            report.blackout, report.new_held_us
        );
        let noticed = report.continuity.as_ref().unwrap();
        let worst = noticed.worst.iter().max_by_key(|f| f.repeated_by_peer);
        println!(
            "{test}, hop {hop}: {} segments again, most by {worst:?}",
            noticed.repeated_segments
        );
        assert!(worst.is_none_or(|flow| flow.repeated_by_peer <= REPEATED_MAX));
        for ((name, now), before) in hosts.iter().zip(counts()).zip(before) {
            println!("{test}, hop {hop}, {name}: {:?}", now.since(&before));
        }
        (from, to) = (to, from);
    }
    let verdicts: Vec<_> = running.into_iter().map(Running::stop).collect();
    for verdict in &verdicts {
        println!("{test}: {verdict:?}");
    }
    // Where a connection ends every few microseconds, a busy kernel delivers
    // its last two segments the wrong way round now and then, with or without
    // a migration, and the end of that is an RST for a connection that is over.
    // A connection that is not has a client that says so below.
    let resets: Vec<String> = capture
        .stop()
        .unwrap()
        .into_iter()
        .filter(|line| {
            let at = line.split(' ').next().and_then(|at| at.parse().ok());
            let at = UNIX_EPOCH + Duration::from_secs_f64(at.unwrap());
            watched.iter().any(|time| time.contains(&at))
        })
        .collect();
    assert_eq!(resets, Vec::<String>::new());
    for verdict in verdicts {
        assert_eq!(verdict.failures, Vec::<String>::new());
    }
}

#[test]
fn a_storm_of_connections_loses_none() {
    require!("a_storm_of_connections_loses_none": root, tcx, criu, migrate, tcpdump);
    let clients = [(Kind::Storm, 4), (Kind::PoliteStorm, 4)];
    moves_under("storm", WorkloadKind::Streams, &clients, 4);
}

#[test]
fn what_a_closed_connection_has_still_to_say_is_said() {
    require!("what_a_closed_connection_has_still_to_say_is_said": root, tcx, criu, migrate, tcpdump);
    moves_under("closed", WorkloadKind::Streams, &[(Kind::BigStorm, 4)], 4);
}

#[test]
fn half_closed_connections_go_on() {
    require!("half_closed_connections_go_on": root, tcx, criu, migrate, tcpdump);
    moves_under("half", WorkloadKind::Streams, &[(Kind::HalfClosed, 4)], 3);
}

/// The kernel of the host on which a tree has closed a connection waits a
/// minute for its peer to do the same. So does whoever has the address now.
#[test]
fn a_peer_closes_long_after_the_tree_has() {
    require!("a_peer_closes_long_after_the_tree_has": root, tcx, criu, migrate, tcpdump, ss);
    let lab = lab("late");
    let workload = Workload::start(WorkloadKind::Streams, &lab).unwrap();
    let client = lab.host(HostName::Client);
    let capture = ResetCapture::start(&client).unwrap();
    let v4 = workload.kind.address();
    let v6 = SocketAddr::new(IpAddr::from(WORKLOAD_V6), v4.port());
    let answered: Vec<TcpStream> = [v4, v6]
        .into_iter()
        .map(|to| {
            let mut stream = client
                .in_network(|| TcpStream::connect(to))
                .unwrap()
                .unwrap();
            stream.write_all(&head(REQUEST, 7)).unwrap();
            let mut reply = Vec::new();
            // Up to the end that the server has made.
            stream.read_to_end(&mut reply).unwrap();
            assert_eq!(reply.len(), REPLY_BYTES);
            stream
        })
        .collect();
    let pid = workload.pid.to_string();
    for (from, to) in [
        (HostName::Host1, HostName::Host2),
        (HostName::Host2, HostName::Host1),
    ] {
        let moved = migrate(&lab.host(from), ["--to", to.as_str(), &pid]).unwrap();
        println!("late, to {to}: {}", moved.expect_committed().blackout);
    }
    // The agent there had to give up for the address to be answered for here.
    no_gate_left(&lab.host(HostName::Host2));
    let ask = format!("ss -tanH dport = :{}", v4.port());
    let sockets = || shell(&client, &ask);
    assert_eq!(sockets().lines().count(), 2, "{}", sockets());
    drop(answered);
    // A socket waits for the acknowledgement of its end, for minutes if need be.
    let gone = eventually(Duration::from_secs(5), || sockets().is_empty());
    assert!(gone, "{}", sockets());
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
    no_gate_left(&lab.host(HostName::Host1));
}

#[test]
fn bulk_streams_keep_every_byte() {
    require!("bulk_streams_keep_every_byte": root, tcx, criu, migrate, tcpdump);
    let clients = [(Kind::Upload, 2), (Kind::Download, 2)];
    moves_under("bulk", WorkloadKind::Streams, &clients, 2);
}

#[test]
fn subscribers_get_every_message_once() {
    require!("subscribers_get_every_message_once": root, tcx, criu, migrate, redis, tcpdump);
    moves_under("push", WorkloadKind::Redis, &[(Kind::Subscribe, 5)], 2);
}

/// Many connections that ask when it pleases them.
fn moves_under_many(test: &str, kind: WorkloadKind, connections: usize) {
    let lab = lab(test);
    let workload = Workload::start(kind, &lab).unwrap();
    let capture = ResetCapture::start(&lab.host(HostName::Client)).unwrap();
    let mut client = workload
        .client(&lab, connections, &["--random-interval"])
        .unwrap();
    let hosts = [HostName::Host1, HostName::Host2, HostName::Client];
    let counts = || hosts.map(|name| TcpCounts::of(&lab.host(name)).unwrap());
    let before = counts();
    let report = moves(&lab, &workload, HostName::Host1, HostName::Host2);
    serves_old_connections(&mut client);
    println!("{test}: blackout {}", report.blackout);
    for ((name, now), before) in hosts.iter().zip(counts()).zip(before) {
        println!("{test}, {name}: {:?}", now.since(&before));
    }
    assert_eq!(usize::try_from(report.connections).unwrap(), connections);
    // Before the client ends: with so many at once some send their FIN again,
    // and to a socket that is gone any kernel answers with a reset.
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
    let verdict = client.stop().unwrap();
    println!("{test}: {verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn a_thousand_connections_move() {
    require!("a_thousand_connections_move": root, tcx, criu, migrate, redis, tcpdump);
    moves_under_many("many", WorkloadKind::Redis, 1000);
}

#[test]
fn two_hundred_ipv6_connections_move() {
    require!("two_hundred_ipv6_connections_move": root, tcx, criu, migrate, tcpdump);
    moves_under_many("many6", WorkloadKind::EchoV6, 200);
}

#[test]
fn a_tree_that_does_not_accept_stays() {
    require!("a_tree_that_does_not_accept_stays": root, tcx, criu, migrate, tcpdump);
    let lab = lab("deaf");
    let workload = Workload::start(WorkloadKind::Deaf, &lab).unwrap();
    let (host1, client) = (lab.host(HostName::Host1), lab.host(HostName::Client));
    let capture = ResetCapture::start(&client).unwrap();
    let address = workload.kind.address();
    let waiting = client
        .in_network(|| TcpStream::connect(address))
        .unwrap()
        .unwrap();
    let migration = migrate(&host1, ["--to", "host2", &workload.pid.to_string()]).unwrap();
    assert_eq!(migration.code, Some(6), "{migration:#?}");
    let said = format!("{:?}", migration.events);
    assert!(said.contains("has not accepted 1 connection"), "{said}");
    // It goes on here, and new connections are let in again.
    assert!(migrate_tests::hosts::runs(&host1, workload.pid));
    client
        .in_network(|| TcpStream::connect(address))
        .unwrap()
        .unwrap();
    drop(waiting);
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
}
