//! A gate that drops, and CRIU's own network locks, which are there to be
//! compared with the gate that holds: they cost peers more time, and no
//! connection.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{Read, Write};
use std::net::TcpStream;

use migrate_test_hosts::{HostName, Lab, LabGuard};
use migrate_tests::field::SOON;
use migrate_tests::hosts::{ResetCapture, eventually, runs};
use migrate_tests::migration::{migrate, no_gate_left, serves_old_connections};
use migrate_tests::refusals::{REFUSED, shell};
use migrate_tests::require;
use migrate_tests::streams::wire::{REPLY_BYTES, REQUEST, head};
use migrate_tests::workload::{Kind, Workload};

fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("lock-{test}-{}", std::process::id())).unwrap()
}

/// What packet filters of a host have of CRIU's.
const LEFT: &str = "{ nft list tables; iptables-save; ip6tables-save; } 2>/dev/null |
                    grep -ie criu -e 0xc114 || true";

fn moves_with(lock: &str, kind: Kind) {
    let lab = lab(&format!("{lock}-{}", kind == Kind::EchoV6));
    let workload = Workload::start(kind, &lab).unwrap();
    let capture = ResetCapture::start(&lab.host(HostName::Client)).unwrap();
    let mut client = workload.client(&lab, 5, &[]).unwrap();
    serves_old_connections(&mut client);
    let pid = workload.pid.to_string();
    for (from, to) in [
        (HostName::Host1, HostName::Host2),
        (HostName::Host2, HostName::Host1),
    ] {
        let (source, destination) = (lab.host(from), lab.host(to));
        let arguments = ["--network-lock", lock, "--to", to.as_str(), &pid];
        let moved = migrate(&source, arguments).unwrap();
        let report = moved.expect_committed();
        println!("{lock}, to {to}: {}", report.blackout);
        assert_eq!(report.held_packets, 0, "{report:?}");
        let said = format!("{:?}", moved.events);
        assert!(said.contains("packets are dropped, not held"), "{said}");
        assert!(runs(&destination, workload.pid));
        assert!(eventually(SOON, || !runs(&source, workload.pid)));
        serves_old_connections(&mut client);
        for host in [&source, &destination] {
            no_gate_left(host);
            assert_eq!(shell(host, LEFT), "", "on {}", host.name());
        }
    }
    let verdict = client.stop().unwrap();
    println!("{lock}: {verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
}

#[test]
fn nftables_keep_connections_and_are_gone_after() {
    require!("nftables_keep_connections_and_are_gone_after": root, tcx, criu, migrate, tcpdump, nft);
    moves_with("nftables", Kind::Echo);
}

#[test]
fn nftables_keep_connections_over_ipv6() {
    require!("nftables_keep_connections_over_ipv6": root, tcx, criu, migrate, tcpdump, nft);
    moves_with("nftables", Kind::EchoV6);
}

#[test]
fn iptables_keep_connections_and_are_gone_after() {
    require!("iptables_keep_connections_and_are_gone_after": root, tcx, criu, migrate, tcpdump, iptables);
    moves_with("iptables", Kind::Echo);
}

#[test]
fn a_gate_that_drops_keeps_connections() {
    require!("a_gate_that_drops_keeps_connections": root, tcx, criu, migrate, tcpdump);
    moves_with("drop", Kind::Echo);
}

/// A lock is taken off with the migration that is called off.
#[test]
fn a_rollback_leaves_no_lock() {
    require!("a_rollback_leaves_no_lock": root, tcx, criu, migrate, nft);
    let lab = lab("back");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, 5, &[]).unwrap();
    serves_old_connections(&mut client);
    let (source, pid) = (lab.host(HostName::Host1), workload.pid.to_string());
    // No dump and restore is done by then.
    let arguments = ["--network-lock", "nftables", "--max-blackout", "0.01"];
    let arguments = arguments.into_iter().chain(["--to", "host2", &pid]);
    let moved = migrate(&source, arguments).unwrap();
    assert_eq!(moved.code, Some(6), "{moved:#?}");
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
    assert_eq!(shell(&source, LEFT), "");
}

/// Without any lock a connection on which nobody speaks survives, and the tool
/// says what the others may lose.
#[test]
fn without_a_lock_the_risk_is_told() {
    require!("without_a_lock_the_risk_is_told": root, tcx, criu, migrate, tcpdump);
    let lab = lab("skip");
    let workload = Workload::start(Kind::Streams, &lab).unwrap();
    let client = lab.host(HostName::Client);
    let capture = ResetCapture::start(&client).unwrap();
    let mut stream = client
        .in_network(|| TcpStream::connect(workload.kind.address()))
        .unwrap()
        .unwrap();
    let request = head(REQUEST, 7);
    let (first, rest) = request.split_at(4);
    stream.write_all(first).unwrap();
    let arguments = ["--network-lock", "skip", "--to", "host2"];
    let arguments = arguments.into_iter().map(str::to_owned);
    let moved = migrate(
        &lab.host(HostName::Host1),
        arguments.chain([workload.pid.to_string()]),
    )
    .unwrap();
    println!("skip: {}", moved.expect_committed().blackout);
    let said = format!("{:?}", moved.events);
    assert!(said.contains("is acknowledged and lost"), "{said}");
    stream.write_all(rest).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), REPLY_BYTES);
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
}

#[test]
fn a_lock_without_its_program_is_refused() {
    require!("a_lock_without_its_program_is_refused": root, tcx, criu, migrate);
    let lab = lab("none");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let source = lab.host(HostName::Host1);
    for (lock, program) in [("nftables", "nft"), ("iptables", "iptables")] {
        let script = format!(
            "PATH=$(dirname $(command -v migrate)):/nowhere migrate check --network-lock {lock} {}",
            workload.pid
        );
        let output = source.exec(["sh", "-c", &script]).unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(REFUSED), "{output:?}");
        let why = format!("{program} does not do what a network lock needs");
        assert!(said.contains(&why), "{said}");
    }
}
