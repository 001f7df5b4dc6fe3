//! Memory moves while the tree runs: rounds, their ends, and the proof that
//! the copy's memory is the tree's.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::time::Duration;

use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::field::processes;
use migrate_tests::hosts::{eventually, runs};
use migrate_tests::migration::{Migration, migrate_as_given, serves_old_connections};
use migrate_tests::refusals::{shell, under_policy};
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
    migrate_as_given(&lab.host(HostName::Host1), arguments).unwrap()
}

/// The `round` events of a migration.
fn rounds(migration: &Migration) -> Vec<&serde_json::Value> {
    migration
        .events
        .iter()
        .filter(|event| event["event"] == "round")
        .collect()
}

/// A count of pages in a `round` event.
fn pages(round: &serde_json::Value, field: &str) -> u64 {
    round[field].as_u64().unwrap()
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
fn a_round_is_given_up_when_its_time_is_over() {
    require!("a_round_is_given_up_when_its_time_is_over": root, tcx, criu, migrate, redis);
    let lab = lab("timeout");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let keys = ["--keys", "20000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 5, &keys).unwrap();
    serves_old_connections(&mut client);
    let source = lab.host(HostName::Host1);
    for engine in ["uffd", "full"] {
        // Held to this rate, the first round takes ten seconds and more.
        let slow = [
            "--engine",
            engine,
            "--bandwidth",
            "300K",
            "--compress",
            "none",
            "--timeout",
            "1",
            "--on-timeout",
            "cancel",
        ];
        let refused = move_with(&lab, &workload, &slow);
        assert_eq!(refused.code, Some(5), "{engine}: {refused:?}");
        let begun = |phase: &str| refused.events.iter().any(|event| event["phase"] == phase);
        assert!(begun("precopy") && !begun("freeze"), "{refused:?}");
        // Its first round was under way, and did not come to its end.
        assert!(rounds(&refused).is_empty(), "{refused:?}");
        let said = format!("{:?}", refused.events);
        assert!(said.contains("no more time"), "{refused:?}");
        assert!(runs(&source, workload.pid));
        assert!(connections(&lab, HostName::Host1).is_empty());
        serves_old_connections(&mut client);
    }
    let moved = move_with(
        &lab,
        &workload,
        &[
            "--timeout",
            "60",
            "--on-timeout",
            "cancel",
            "--goal",
            "0",
            "--downtime-limit",
            "3600000",
        ],
    );
    let _ = moved.expect_committed();
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn without_tracking_unchanged_pages_are_told_by_their_content() {
    require!("without_tracking_unchanged_pages_are_told_by_their_content": root, tcx, criu, migrate, redis);
    let lab = lab("full");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let keys = ["--keys", "50000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 5, &keys).unwrap();
    serves_old_connections(&mut client);
    let options = ["--engine", "full", "--verify", "--max-blackout", "60"];
    let moved = move_with(&lab, &workload, &options);
    let report = moved.expect_committed();
    let made = rounds(&moved);
    assert!(made.len() >= 2, "{made:?}");
    assert!(pages(made[0], "pages_skipped") < pages(made[0], "pages_written") / 4);
    let last = made[made.len() - 1];
    assert!(
        pages(last, "pages_skipped") > pages(last, "pages_scanned") / 2,
        "{made:?}"
    );
    // The frozen tree had to send little, although CRIU listed everything.
    assert!(report.frozen_pages < report.pages / 2, "{report:?}");
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
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

/// Nobody has asked for it: what has to wait for the link anyway is made smaller.
#[test]
fn a_slow_link_has_pages_compressed() {
    require!("a_slow_link_has_pages_compressed": root, tcx, criu, migrate, redis);
    const SLOW: &str = "tc qdisc add dev eth0 root tbf rate 200mbit burst 256k latency 100ms";
    let lab = lab("slow-link");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let keys = ["--keys", "50000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 10, &keys).unwrap();
    serves_old_connections(&mut client);
    shell(&lab.host(HostName::Host1), SLOW);
    let options = ["--engine", "uffd", "--verify", "--max-blackout", "60"];
    let moved = move_with(&lab, &workload, &options);
    let report = moved.expect_committed();
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

/// A parent with three workers of 16 MiB each, of which two write to 900 pages
/// a second, one after the other.
const WORKERS: &str = "\
import mmap, os, sys, time
PAGES, RATE = 4096, 900
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = [mmap.mmap(-1, PAGES * 4096, flags=flags) for _ in range(3)]
for m in memory:
    m.write(os.urandom(PAGES * 4096))
for i, m in enumerate(memory):
    if os.fork() == 0:
        for other in memory:
            if other is not m:
                other.close()
        begun, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - begun) * RATE) if i else 0
            done = max(done, due - PAGES)
            while done < due:
                m[done % PAGES * 4096] = done & 255
                done += 1
            time.sleep(0.01)
for m in memory:
    m.close()
while True:
    os.wait()
";

#[test]
fn the_goal_decides_how_many_rounds_a_tree_takes() {
    require!("the_goal_decides_how_many_rounds_a_tree_takes": root, tcx, criu, migrate, python);
    let lab = lab("goal");
    let (host1, host2) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let root = host1
        .spawn_detached(["/usr/bin/python3", "-c", WORKERS], "/dev/null")
        .unwrap();
    assert!(eventually(Duration::from_secs(60), || {
        let all = processes(&host1).unwrap();
        all.iter().filter(|process| process.parent == root).count() == 3
    }));
    // The network takes not quite twice of what the workers change, so that each
    // round finds somewhat more than half of what the one before it has found.
    let moved = |from: &Host, to: &str, goal: &str| {
        let pid = root.to_string();
        let moved = migrate_as_given(
            from,
            [
                "--engine",
                "uffd",
                "--verify",
                "--max-blackout",
                "60",
                "--bandwidth",
                "12M",
                "--compress",
                "none",
                "--downtime-limit",
                "3600000",
                "--goal",
                goal,
                "--to",
                to,
                &pid,
            ],
        )
        .unwrap();
        let _ = moved.expect_committed();
        moved
    };
    let high = moved(&host1, "host2", "90");
    let low = moved(&host2, "host1", "40");
    for (migration, goal) in [(&high, 90), (&low, 40)] {
        let made = rounds(migration);
        for (index, round) in made.iter().enumerate() {
            let count = |field: &str| pages(round, field);
            let (written, skipped) = (count("pages_written"), count("pages_skipped"));
            assert_eq!(count("round"), index as u64 + 1);
            assert_eq!(count("pages_scanned"), written + skipped, "{round}");
            let percent = 100 * skipped / (written + skipped);
            assert_eq!(count("skipped_percent"), percent, "{round}");
            assert!(count("bytes") <= written * 4096, "{round}");
            assert!(
                count("took_us") > 0 && count("link_bytes_per_s") > 0,
                "{round}"
            );
            assert!(count("blackout_us_predicted") > 0, "{round}");
            assert_eq!(round["dirty_bytes_per_s"].is_u64(), index > 0, "{round}");
            if index + 1 < made.len() {
                assert!(percent < goal && round["stopped"].is_null(), "{round}");
            } else {
                assert!(percent >= goal, "{round}");
                assert_eq!(round["stopped"], "converged");
            }
        }
    }
    let (high, low) = (rounds(&high).len(), rounds(&low).len());
    println!("goal 90: {high} rounds, goal 40: {low} rounds");
    assert!(high >= low + 2, "{high} and {low} rounds");
}

/// Has 32 MiB in parts, ten times a second one of them at an address that none had before.
const MOVES_HOUSE: &str = "
import collections, ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
ROOM, ROOMS, FIXED_NOREPLACE = 2 << 20, 16, 0x100000
rooms, at = collections.deque(), 1 << 40
def build():
    global at
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED_NOREPLACE
    where = libc.mmap(at, ROOM, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert where == at, ctypes.get_errno()
    ctypes.memset(at, 7, ROOM)
    rooms.append(at)
    at += ROOM
for _ in range(ROOMS):
    build()
open('/tmp/holds', 'w').close()
while True:
    time.sleep(0.1)
    libc.munmap(rooms.popleft(), ROOM)
    build()
";

/// What a tree has unmapped takes no room at the destination, which may keep 96 MiB: in the
/// time of the rounds, several seconds, the tree has more than that.
#[test]
fn memory_that_is_gone_makes_room() {
    require!("memory_that_is_gone_makes_room": root, tcx, criu, migrate, python);
    let lab = lab("gone");
    let (host1, host2) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let tree = host1
        .spawn_detached(["/usr/bin/python3", "-c", MOVES_HOUSE], "/dev/null")
        .unwrap();
    assert!(eventually(Duration::from_secs(60), || {
        host1.path("/tmp/holds").exists()
    }));
    let mut command = host1.command("migrate");
    under_policy(&mut command, &host2, "memory_mib_max = 96\n");
    command
        .args(["--json", "--engine", "uffd", "--verify"])
        .args(["--bandwidth", "25M", "--compress", "none"])
        .args(["--goal", "100", "--max-blackout", "60", "--to", "host2"])
        .arg(tree.to_string());
    let output = command.output().unwrap();
    let moved = Migration::read(output.status.code(), &output.stdout, &output.stderr);
    let report = moved.expect_committed();
    let written: Vec<u64> = report.precopy.iter().map(|r| r.pages_written).collect();
    println!("{written:?}");
    assert!(report.rounds >= 3, "{written:?}");
    assert!(runs(&host2, tree));
}

/// Holds 64 MiB, and nothing else or all that it can get of one CPU.
const ON_ONE_CPU: &str = "
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
memory = bytearray(os.urandom(64 << 20))
open('/tmp/holds', 'w').close()
while True:
    if sys.argv[1] == 'busy':
        memory[0] = (memory[0] + 1) % 256
    else:
        time.sleep(1000)
";

/// A tree that would wait for its CPU because of the first round gets it back now and
/// then; one that wants none is not waited for.
#[test]
fn the_first_round_stands_back_for_a_busy_tree() {
    require!("the_first_round_stands_back_for_a_busy_tree": root, tcx, criu, migrate, python);
    for (how, stands_back) in [("busy", true), ("idle", false)] {
        let lab = lab(&format!("pace-{how}"));
        let host = lab.host(HostName::Host1);
        let tree = host
            .spawn_detached(["/usr/bin/python3", "-c", ON_ONE_CPU, how], "/dev/null")
            .unwrap();
        assert!(eventually(Duration::from_secs(60), || {
            host.path("/tmp/holds").exists()
        }));
        let pid = tree.to_string();
        // On the tree's CPU, however many there are.
        let pinned = r#"cpu=$(taskset -cp "$1" | sed 's/.*: //'); exec taskset -c "$cpu" migrate --json --to host2 "$1""#;
        let output = host
            .command("sh")
            .args(["-c", pinned, "sh", &pid])
            .output()
            .unwrap();
        let moved = Migration::read(output.status.code(), &output.stdout, &output.stderr);
        let report = moved.expect_committed();
        let paused: Vec<u64> = report.precopy.iter().map(|round| round.paused_us).collect();
        println!("{how}: {paused:?}");
        let (first, others) = paused.split_first().unwrap();
        assert_eq!(*first > 0, stands_back, "{:?}", report.precopy);
        assert!(*first < report.precopy[0].took_us, "{:?}", report.precopy);
        assert!(others.iter().all(|us| *us == 0), "{:?}", report.precopy);
    }
}
