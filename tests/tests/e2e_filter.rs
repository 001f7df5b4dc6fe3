//! Hosts with stateful filters and address translation: connections that have
//! moved are as well known there as where they began.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::client::StrictClient;
use migrate_tests::hosts::ResetCapture;
use migrate_tests::migration::{moves, serves_old_connections};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};

/// Nothing passes that does not begin with a SYN; what is under way when the
/// table is empty is invalid.
const FILTER: &str = "
table inet filter {
    chain input {
        type filter hook input priority 0; policy drop;
        iif lo accept
        meta l4proto { icmp, ipv6-icmp } accept
        ct state invalid drop
        ct state established,related accept
        tcp flags & (fin|syn|rst|ack) == syn ct state new accept
    }
    chain output {
        type filter hook output priority 0;
        ct state invalid drop
    }
}";

/// Peers reach the echo at another port than it listens on.
const REDIRECT: &str = "
table ip translate {
    chain prerouting {
        type nat hook prerouting priority -100;
        ip daddr 10.77.0.100 tcp dport 8007 dnat to 10.77.0.100:7000
    }
}";

fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

fn run(host: &Host, script: &str) {
    let output = host.exec(["sh", "-ec", script]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{script}: {said}");
}

fn filter(host: &Host, rules: &str) {
    // The kernel would take connections from their middle on.
    run(
        host,
        &format!(
            "echo 0 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose; nft -f - <<'END'\n{rules}\nEND"
        ),
    );
}

/// Moves to and fro under clients at a port, and expects none to notice.
fn moves_behind(test: &str, kind: Kind, port: u16, prepare: impl Fn(&Lab)) {
    let lab = lab(test);
    prepare(&lab);
    let workload = Workload::start(kind, &lab).unwrap();
    let client = lab.host(HostName::Client);
    let capture = ResetCapture::start(&client).unwrap();
    let address = std::net::SocketAddr::new(kind.address().ip(), port).to_string();
    let mut clients =
        StrictClient::start(&client, ["echo", "--addr", &address, "--connections", "10"]).unwrap();
    let (mut from, mut to) = (HostName::Host1, HostName::Host2);
    for _ in 0..3 {
        let report = moves(&lab, &workload, from, to);
        println!("{test}, to {to}: blackout {}", report.blackout);
        assert_eq!(report.connections, 10);
        serves_old_connections(&mut clients);
        (from, to) = (to, from);
    }
    let verdict = clients.stop().unwrap();
    println!("{test}: {verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
}

#[test]
fn stateful_filters_let_moved_connections_pass() {
    require!("stateful_filters_let_moved_connections_pass": root, tcx, criu, migrate, nft, tcpdump);
    for (test, kind) in [("filter4", Kind::Echo), ("filter6", Kind::EchoV6)] {
        moves_behind(test, kind, 7000, |lab| {
            for name in [HostName::Host1, HostName::Host2] {
                filter(&lab.host(name), FILTER);
            }
        });
    }
}

#[test]
fn a_filter_on_the_destination_alone_lets_them_pass() {
    require!("a_filter_on_the_destination_alone_lets_them_pass": root, tcx, criu, migrate, nft, tcpdump);
    moves_behind("filter-there", Kind::Echo, 7000, |lab| {
        filter(&lab.host(HostName::Host2), FILTER);
    });
}

#[test]
fn translated_connections_move() {
    require!("translated_connections_move": root, tcx, criu, migrate, nft, tcpdump);
    moves_behind("translated", Kind::Echo, 8007, |lab| {
        for name in [HostName::Host1, HostName::Host2] {
            filter(&lab.host(name), &format!("{FILTER}\n{REDIRECT}"));
        }
    });
}
