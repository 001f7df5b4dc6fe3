//! The workloads and the questions of the suites, without a migration: what a
//! suite reports is to be blamed on the migration alone.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use migrate_test_hosts::{HostName, Lab, LabGuard, WORKLOAD_V4};
use migrate_tests::hosts::{
    eventually, has_address, listens, process_name, reset_connections, runs,
};
use migrate_tests::migration::{no_gate_left, serves_old_connections};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};

const SETTLE: Duration = Duration::from_secs(10);

fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

#[test]
fn every_workload_serves_its_clients_between_hosts() {
    require!("every_workload_serves_its_clients_between_hosts": root, redis, memcached, python);
    let lab = lab("workloads");
    let host1 = lab.host(HostName::Host1);
    for kind in [
        Kind::Redis,
        Kind::Memcached,
        Kind::Http,
        Kind::EchoV6,
        Kind::Echo,
        Kind::EchoWildcard,
    ] {
        let workload = Workload::start(kind, &lab).unwrap();
        assert!(runs(&host1, workload.pid), "{kind:?}");
        assert!(!process_name(&host1, workload.pid).is_empty());
        let mut client = workload.client(&lab, 5, &[]).unwrap();
        serves_old_connections(&mut client);
        let verdict = client.stop().unwrap();
        assert!(verdict.is_clean(), "{verdict:?}");
        host1
            .exec(["kill", "-KILL", &workload.pid.to_string()])
            .unwrap();
        let port = kind.address().port();
        assert!(eventually(SETTLE, || !listens(&host1, port)), "{kind:?}");
        assert!(
            eventually(SETTLE, || !runs(&host1, workload.pid)),
            "{kind:?}"
        );
    }
    no_gate_left(&host1);
}

#[test]
fn a_killed_workload_is_lost_to_its_client() {
    require!("a_killed_workload_is_lost_to_its_client": root);
    let lab = lab("killed");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, 10, &[]).unwrap();
    serves_old_connections(&mut client);
    let host1 = lab.host(HostName::Host1);
    host1
        .exec(["kill", "-KILL", &workload.pid.to_string()])
        .unwrap();
    // It ends by itself with its last connection.
    let verdict = client.verdict().unwrap();
    assert!(verdict.errors >= 10, "{verdict:?}");
}

#[test]
fn a_frozen_workload_shows_as_a_gap() {
    require!("a_frozen_workload_shows_as_a_gap": root);
    let lab = lab("frozen");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, 10, &[]).unwrap();
    serves_old_connections(&mut client);
    let pid = workload.pid.to_string();
    let host1 = lab.host(HostName::Host1);
    host1.exec(["kill", "-STOP", &pid]).unwrap();
    // The gap itself is under test, so time must pass.
    std::thread::sleep(Duration::from_millis(500));
    host1.exec(["kill", "-CONT", &pid]).unwrap();
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
    assert!(
        verdict
            .worst_gap_us_by_connection
            .iter()
            // A client that is late with its question waits less.
            .all(|gap| *gap > 250_000),
        "{verdict:?}"
    );
}

#[test]
fn a_shell_loop_counts_up() {
    require!("a_shell_loop_counts_up": root);
    let lab = lab("counts");
    let workload = Workload::start(Kind::ShellLoop, &lab).unwrap();
    let host1 = lab.host(HostName::Host1);
    let first = workload.count(&host1).unwrap();
    assert!(eventually(SETTLE, || workload.count(&host1).unwrap() > first));
}

#[test]
fn a_reset_is_counted_and_an_orderly_end_is_not() {
    require!("a_reset_is_counted_and_an_orderly_end_is_not": root);
    let lab = lab("resets");
    let (host1, client) = (lab.host(HostName::Host1), lab.host(HostName::Client));
    assert!(has_address(&host1, WORKLOAD_V4.into()).unwrap());
    assert!(!has_address(&client, WORKLOAD_V4.into()).unwrap());

    let address = SocketAddr::new(WORKLOAD_V4.into(), 7001);
    let listener = host1
        .in_network(|| TcpListener::bind(address))
        .unwrap()
        .unwrap();
    let connect = || {
        let mine = client
            .in_network(|| TcpStream::connect(address))
            .unwrap()
            .unwrap();
        (mine, listener.accept().unwrap().0)
    };
    let before = reset_connections(&client).unwrap();

    let (mut mine, theirs) = connect();
    drop(theirs);
    assert_eq!(mine.read(&mut [0]).unwrap(), 0);
    assert_eq!(reset_connections(&client).unwrap(), before);

    // Whoever closes with unread bytes answers with RST.
    let (mut mine, theirs) = connect();
    mine.write_all(b"unread").unwrap();
    assert!(theirs.peek(&mut [0; 6]).unwrap() > 0);
    drop(theirs);
    assert!(eventually(SETTLE, || reset_connections(&client).unwrap() == before + 1));
}
