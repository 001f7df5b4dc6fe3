//! Memory moves while the tree runs: rounds, their ends, and the proof that
//! the copy's memory is the tree's.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::time::Duration;

use migrate_test_hosts::{HostName, Lab, LabGuard};
use migrate_tests::hosts::{eventually, runs};
use migrate_tests::migration::{Migration, migrate, serves_old_connections};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// Moves a workload from host1 to host2.
fn move_with(lab: &Lab, workload: &Workload, options: &[&str]) -> Migration {
    let pid = workload.pid.to_string();
    let arguments = [options, &["--to", "host2", &pid]].concat();
    migrate(&lab.host(HostName::Host1), arguments).unwrap()
}

/// The `round` events of a migration.
fn rounds(migration: &Migration) -> Vec<&serde_json::Value> {
    migration
        .events
        .iter()
        .filter(|event| event["event"] == "round")
        .collect()
}

/// Moves a busy workload in rounds and lets both hosts compare every page.
fn moves_verified(kind: Kind, connections: usize, more: &[&str]) {
    let lab = lab(&format!("verify-{kind:?}").to_lowercase());
    let workload = Workload::start(kind, &lab).unwrap();
    let mut client = workload.client(&lab, connections, more).unwrap();
    serves_old_connections(&mut client);
    let migration = move_with(
        &lab,
        &workload,
        &["--engine", "uffd", "--verify", "--max-blackout", "60"],
    );
    let report = migration.expect_committed().clone();
    println!("{kind:?}: {report:?}");
    // Unchanged memory was left out of the final dump, or this shows nothing.
    assert!(report.rounds >= 2, "{report:?}");
    assert!(report.frozen_pages < report.pages / 2, "{report:?}");
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn the_memory_of_a_busy_redis_arrives_whole() {
    require!("the_memory_of_a_busy_redis_arrives_whole": root, tcx, criu, migrate, redis);
    let keys = ["--keys", "100000", "--populate", "--verify"];
    moves_verified(Kind::Redis, 20, &keys);
}

#[test]
fn the_memory_of_a_busy_memcached_arrives_whole() {
    require!("the_memory_of_a_busy_memcached_arrives_whole": root, tcx, criu, migrate, memcached);
    moves_verified(Kind::Memcached, 10, &[]);
}

#[test]
fn the_memory_of_a_threaded_echo_arrives_whole() {
    require!("the_memory_of_a_threaded_echo_arrives_whole": root, tcx, criu, migrate);
    moves_verified(Kind::Echo, 30, &[]);
}

#[test]
fn rounds_go_on_until_the_goal_or_the_limit() {
    require!("rounds_go_on_until_the_goal_or_the_limit": root, tcx, criu, migrate, redis);
    let lab = lab("rounds");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload.client(&lab, 5, &[]).unwrap();
    let source = lab.host(HostName::Host1);

    // A goal that no round can reach, and no freeze without it.
    let refused = move_with(
        &lab,
        &workload,
        &[
            "--engine",
            "uffd",
            "--goal",
            "101",
            "--max-iterations",
            "3",
            "--on-timeout",
            "cancel",
        ],
    );
    assert_eq!(refused.code, Some(5), "{refused:?}");
    let made = rounds(&refused);
    assert_eq!(made.len(), 3, "{refused:?}");
    assert_eq!(made[2]["stopped"], "max-iterations", "{refused:?}");
    assert!(
        !refused
            .events
            .iter()
            .any(|event| event["phase"] == "freeze")
    );
    assert!(runs(&source, workload.pid));
    serves_old_connections(&mut client);

    // A goal that the first round reaches, and no other limit.
    let moved = move_with(
        &lab,
        &workload,
        &[
            "--engine",
            "uffd",
            "--goal",
            "0",
            "--downtime-limit",
            "3600000",
        ],
    );
    assert_eq!(moved.expect_committed().rounds, 1, "{moved:?}");
    assert_eq!(rounds(&moved)[0]["stopped"], "converged", "{moved:?}");
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

#[test]
fn everything_moves_frozen_when_the_user_says_so() {
    require!("everything_moves_frozen_when_the_user_says_so": root, tcx, criu, migrate, redis);
    let lab = lab("full");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload.client(&lab, 5, &[]).unwrap();
    let moved = move_with(&lab, &workload, &["--engine", "full", "--verify"]);
    let report = moved.expect_committed();
    assert_eq!((report.rounds, report.pages), (0, report.frozen_pages));
    assert!(rounds(&moved).is_empty());
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

/// The local ports of what `host` talks to host2 over, SSH left out: the
/// connections of a migration.
fn connections(lab: &Lab, host: HostName) -> Vec<String> {
    let peer = format!("dst {} and dport != 22", lab.host(HostName::Host2).ipv4());
    let listed = lab
        .host(host)
        .exec(["ss", "-tnHO", "state", "established", &peer])
        .unwrap();
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'))
        .map(|(_, port)| port.to_owned())
        .collect()
}

#[test]
fn pages_go_over_several_connections_compressed() {
    require!("pages_go_over_several_connections_compressed": root, tcx, criu, migrate, redis);
    let lab = lab("streams");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let keys = ["--keys", "50000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 10, &keys).unwrap();
    serves_old_connections(&mut client);
    let moved = move_with(
        &lab,
        &workload,
        &[
            "--engine",
            "uffd",
            "--streams",
            "4",
            "--compress",
            "lz4",
            "--verify",
            "--max-blackout",
            "60",
        ],
    );
    let report = moved.expect_committed();
    assert!(report.rounds >= 2, "{report:?}");
    assert!(report.bytes < report.pages * 4096 * 9 / 10, "{report:?}");
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn the_loss_of_any_connection_rolls_back() {
    require!("the_loss_of_any_connection_rolls_back": root, tcx, criu, migrate, redis);
    let lab = lab("lost-stream");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload
        .client(&lab, 5, &["--keys", "20000", "--populate"])
        .unwrap();
    serves_old_connections(&mut client);
    let source = lab.host(HostName::Host1);
    // Held to this rate, the first round takes longer than all of this.
    let slow = [
        "--engine",
        "uffd",
        "--streams",
        "3",
        "--bandwidth",
        "300K",
        "--compress",
        "none",
    ];
    for lost in 0..3 {
        let failed = std::thread::scope(|scope| {
            let migration = scope.spawn(|| move_with(&lab, &workload, &slow));
            let mut ports = Vec::new();
            eventually(Duration::from_secs(60), || {
                ports = connections(&lab, HostName::Host1);
                ports.len() == 3 || migration.is_finished()
            });
            assert_eq!(ports.len(), 3, "{ports:?}");
            let port = format!("sport = {}", ports[lost]);
            assert!(
                source
                    .exec(["ss", "-K", "-t", &port])
                    .unwrap()
                    .status
                    .success()
            );
            migration.join().unwrap()
        });
        assert_eq!(failed.code, Some(6), "{lost}: {failed:?}");
        assert!(runs(&source, workload.pid));
        assert!(connections(&lab, HostName::Host1).is_empty());
        serves_old_connections(&mut client);
    }
    let moved = move_with(&lab, &workload, &["--engine", "uffd", "--verify"]);
    let _ = moved.expect_committed();
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}
