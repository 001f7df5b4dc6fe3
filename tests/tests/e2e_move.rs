//! Each workload moved with strict clients at it: no error, nothing lost,
//! nothing doubled, and nothing left behind.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::process::Stdio;
use std::time::Duration;

use migrate_test_hosts::{HostName, Lab, LabGuard};
use migrate_tests::hosts::{eventually, reset_connections};
use migrate_tests::migration::{moves, serves_old_connections};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};

const HOPS: usize = 10;

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// Moves a workload `hops` times, to and fro, under the same connections.
fn moves_under_load(kind: Kind, connections: usize, more: &[&str], hops: usize) {
    let lab = lab(&format!("{kind:?}-{hops}").to_lowercase());
    let workload = Workload::start(kind, &lab).unwrap();
    let mut client = workload.client(&lab, connections, more).unwrap();
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    let (mut from, mut to) = (HostName::Host1, HostName::Host2);
    for hop in 1..=hops {
        serves_old_connections(&mut client);
        let report = moves(&lab, &workload, from, to);
        println!("{kind:?}, hop {hop} to {to}: blackout {}", report.blackout);
        let moved = usize::try_from(report.connections).unwrap();
        assert_eq!(moved, connections, "{report:?}");
        serves_old_connections(&mut client);
        (from, to) = (to, from);
    }
    let verdict = client.stop().unwrap();
    println!("{kind:?}: {verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(
        reset_connections(&lab.host(HostName::Client)).unwrap(),
        resets
    );
}

#[test]
fn redis_moves_with_its_keys_and_connections() {
    require!("redis_moves_with_its_keys_and_connections": root, tcx, criu, migrate, redis);
    let keys = ["--keys", "100000", "--populate", "--verify"];
    moves_under_load(Kind::Redis, 20, &keys, 1);
}

#[test]
fn memcached_moves_with_its_connections() {
    require!("memcached_moves_with_its_connections": root, tcx, criu, migrate, memcached);
    moves_under_load(Kind::Memcached, 20, &[], 1);
}

#[test]
fn a_multi_threaded_echo_moves_with_its_connections() {
    require!("a_multi_threaded_echo_moves_with_its_connections": root, tcx, criu, migrate);
    moves_under_load(Kind::Echo, 50, &[], 1);
}

#[test]
fn ipv6_connections_move() {
    require!("ipv6_connections_move": root, tcx, criu, migrate);
    moves_under_load(Kind::EchoV6, 10, &[], 1);
}

#[test]
fn v4_mapped_connections_move() {
    require!("v4_mapped_connections_move": root, tcx, criu, migrate);
    moves_under_load(Kind::EchoWildcard, 10, &[], 1);
}

#[test]
fn a_python_web_server_moves_with_its_connections() {
    require!("a_python_web_server_moves_with_its_connections": root, tcx, criu, migrate, python);
    moves_under_load(Kind::Http, 5, &[], 1);
}

#[test]
fn a_shell_loop_moves_and_goes_on_counting() {
    require!("a_shell_loop_moves_and_goes_on_counting": root, tcx, criu, migrate);
    let lab = lab("shell");
    let workload = Workload::start(Kind::ShellLoop, &lab).unwrap();
    let before = workload.count(&lab.host(HostName::Host1)).unwrap();
    let report = moves(&lab, &workload, HostName::Host1, HostName::Host2);
    assert_eq!(report.connections, 0);
    let after = workload.count(&lab.host(HostName::Host2)).unwrap();
    // A second copy, or one begun anew, would be behind.
    assert!(after > before, "{before} {after}");
    let back = moves(&lab, &workload, HostName::Host2, HostName::Host1);
    assert_eq!(back.connections, 0);
    assert!(workload.count(&lab.host(HostName::Host1)).unwrap() > after);
}

#[test]
fn an_echo_moves_ten_times_under_one_connection() {
    require!("an_echo_moves_ten_times_under_one_connection": root, tcx, criu, migrate);
    moves_under_load(Kind::Echo, 1, &[], HOPS);
}

#[test]
fn redis_moves_ten_times_under_the_same_connections() {
    require!("redis_moves_ten_times_under_the_same_connections": root, tcx, criu, migrate, redis);
    moves_under_load(
        Kind::Redis,
        5,
        &["--keys", "1000", "--populate", "--verify"],
        HOPS,
    );
}

#[test]
fn redis_benchmark_does_not_notice() {
    require!("redis_benchmark_does_not_notice": root, tcx, criu, migrate, redis);
    let lab = lab("benchmark");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let address = workload.kind.address();
    let client = lab.host(HostName::Client);
    let asked = || -> u64 {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let info = client
            .exec(["redis-cli", "-h", &ip, "-p", &port, "info", "stats"])
            .unwrap();
        String::from_utf8(info.stdout)
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("total_commands_processed:"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let mut benchmark = client
        .command("redis-benchmark")
        .args(["-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string()])
        .args(["-c", "20", "-n", "400000", "-r", "10000", "-t", "set", "-q"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(eventually(Duration::from_secs(20), || asked() > 20_000));
    let report = moves(&lab, &workload, HostName::Host1, HostName::Host2);
    assert_eq!(report.connections, 20, "{report:?}");
    // It was under way all the time, or this shows nothing.
    assert!(benchmark.try_wait().unwrap().is_none());
    let before = asked();
    assert!(eventually(Duration::from_secs(20), || asked() > before + 20_000));
    let output = benchmark.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("requests per second"), "{text}");
    assert!(!text.contains("Error"), "{text}");
}
