//! Memory arrives while the copy already runs, whatever happens meanwhile.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::thread;
use std::time::Duration;

use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::client::program;
use migrate_tests::hosts::{eventually, named, runs};
use migrate_tests::migration::{
    Migration, arrives, migrate, moves, print_logs, running_records, serves_old_connections,
};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload, redis_script};

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("lazy-{test}-{}", std::process::id())).unwrap()
}

/// Limit for what takes a moment.
const SOON: Duration = Duration::from_secs(60);

/// Values of 1000 bytes that one script looks at: redis serves nobody meanwhile,
/// and says so after 5 s.
const SCRIPT_VALUES: u32 = 16 << 10;

/// Lets a redis run a script over the values of so many MiB; the sum of what it
/// returns.
fn script(lab: &Lab, script: &str, mib: u32) -> u32 {
    let starts = (1..=mib * 1024).step_by(usize::try_from(SCRIPT_VALUES).unwrap());
    starts
        .map(|first| {
            let last = (first + SCRIPT_VALUES - 1).min(mib * 1024);
            redis_script(lab, script, first, last)
        })
        .sum()
}

/// Gives a redis so many MiB more to hold.
fn grow(lab: &Lab, mib: u32) {
    const SET: &str = "for i=ARGV[1],ARGV[2] do \
                       redis.call('SET', 'more:'..i, string.rep(string.char(33 + i % 90), 1000)) end \
                       return 0";
    script(lab, SET, mib);
}

/// Every one of them is as it was.
#[track_caller]
fn all_right(lab: &Lab, mib: u32) {
    const COUNT: &str = "local right = 0; for i=ARGV[1],ARGV[2] do \
                         local value = redis.call('GET', 'more:'..i); \
                         if value == string.rep(string.char(33 + i % 90), 1000) then right = right + 1 end end \
                         return right";
    assert_eq!(script(lab, COUNT, mib), mib * 1024);
}

/// The memory arrives while redis serves; all of it arrives.
#[test]
fn redis_serves_while_its_memory_arrives() {
    require!("redis_serves_while_its_memory_arrives": root, tcx, criu, migrate, redis);
    let lab = lab("arrives");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    grow(&lab, 64);
    let mut client = workload.client(&lab, 10, &["--verify"]).unwrap();
    serves_old_connections(&mut client);
    let pid = workload.pid.to_string();
    // One process with more than a little: nobody has to say so.
    let there = ["--to", "host2", &pid];
    let there = migrate(&lab.host(HostName::Host1), there).unwrap();
    let report = there.expect_committed();
    assert!(report.lazy_pages > 64 << 8, "{report:?}");
    all_right(&lab, 64);

    // And all at once if the user says so.
    let back = ["--restore", "eager", "--to", "host1", &pid];
    let back = migrate(&lab.host(HostName::Host2), back).unwrap();
    assert_eq!(back.expect_committed().lazy_pages, 0);
    all_right(&lab, 64);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

/// So it does where a shell waits for the one that has the memory: processes that have
/// little in common may have it late, each its own.
#[test]
fn memory_of_several_processes_arrives() {
    require!("memory_of_several_processes_arrives": root, tcx, criu, migrate, redis);
    let lab = lab("several");
    let workload = Workload::start_in_shell(Kind::Redis, &lab).unwrap();
    grow(&lab, 64);
    let mut client = workload.client(&lab, 10, &["--verify"]).unwrap();
    serves_old_connections(&mut client);
    let there = ["--to", "host2", &workload.pid.to_string()];
    let there = migrate(&lab.host(HostName::Host1), there).unwrap();
    let report = there.expect_committed();
    assert!(report.lazy_pages > 64 << 8, "{report:?}");
    all_right(&lab, 64);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

/// The next migration starts while memory of the last one arrives: it waits.
#[test]
fn ten_hops_in_a_row_lose_nothing() {
    require!("ten_hops_in_a_row_lose_nothing": root, tcx, criu, migrate, redis);
    let lab = lab("hops");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    grow(&lab, 64);
    let keys = ["--keys", "1000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 10, &keys).unwrap();
    let pid = workload.pid.to_string();
    for hop in 0..10 {
        let (from, to) = match hop % 2 {
            0 => (HostName::Host1, "host2"),
            _ => (HostName::Host2, "host1"),
        };
        let moved = migrate(&lab.host(from), ["--restore", "lazy", "--to", to, &pid]).unwrap();
        let report = moved.expect_committed();
        assert!(report.lazy_pages > 64 << 8, "hop {hop}: {report:?}");
    }
    all_right(&lab, 64);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

/// A program that takes its memory apart as soon as it runs elsewhere, and
/// checks every byte of it.
#[test]
fn memory_that_is_forked_moved_and_given_back_at_once_is_right() {
    require!("memory_that_is_forked_moved_and_given_back_at_once_is_right": root, tcx, criu, migrate);
    let lab = lab("churn");
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    for (seed, mode) in [(1, "churn"), (2, "churn"), (3, "threads"), (4, "family")] {
        let (file, go) = (format!("/srv/churn-{seed}"), format!("/srv/go-{seed}"));
        // Where it is to go, it may start at once.
        fs::write(destination.path(&go), "").unwrap();
        // As its file, for CRIU.
        let words = [
            program("lazy-memory").display().to_string(),
            mode.to_owned(),
            "96".to_owned(),
            seed.to_string(),
            file.clone(),
            go,
        ];
        let pid = source.spawn_detached(words, "/dev/null").unwrap();
        let said = |host: &Host| fs::read_to_string(host.path(&file)).unwrap_or_default();
        assert!(eventually(SOON, || said(&source) == "ready"));
        let moved = migrate(
            &source,
            ["--restore", "lazy", "--to", "host2", &pid.to_string()],
        )
        .unwrap();
        let report = moved.expect_committed();
        assert!(report.lazy_pages > 96 << 7, "{report:?}");
        assert!(eventually(SOON, || !said(&destination).is_empty()));
        assert_eq!(said(&destination), "ok", "{mode} {seed}");
    }
}

fn signal(host: &Host, signal: &str, pid: i32) {
    let output = host.exec(["kill", signal, &pid.to_string()]).unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Moves a redis and stops the keeper of its memory as soon as it runs, so that
/// some of the memory is missing. Returns its PID.
fn half_way(lab: &Lab, workload: &Workload) -> (i32, thread::JoinHandle<Migration>) {
    /// All of it may be there before the keeper is stopped: this process may be
    /// kept from the CPU.
    const ATTEMPTS_MAX: usize = 5;
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    for _ in 0..ATTEMPTS_MAX {
        // That of an attempt before may still be ending.
        let ended = eventually(SOON, || named(&destination, "memory-keeper").is_none());
        assert!(ended, "a keeper outlives its tree's stay");
        let before = running_records(&destination);
        let (source, pid) = (source.clone(), workload.pid.to_string());
        let moving = thread::spawn(move || {
            migrate(&source, ["--restore", "lazy", "--to", "host2", &pid]).unwrap()
        });
        let mut keeper = None;
        let runs = eventually(SOON, || {
            keeper = keeper.or_else(|| named(&destination, "memory-keeper"));
            !running_records(&destination).is_subset(&before)
        });
        let keeper = keeper.or_else(|| named(&destination, "memory-keeper"));
        let stopped = keeper.filter(|&keeper| {
            let stop = ["kill", "-STOP", &keeper.to_string()];
            destination.exec(stop).unwrap().status.success()
        });
        assert!(runs);
        if arrives(&destination) {
            return (stopped.unwrap(), moving);
        }
        if let Some(keeper) = stopped {
            signal(&destination, "-CONT", keeper);
        }
        assert_eq!(moving.join().unwrap().expect_committed().pid, workload.pid);
        moves(lab, workload, HostName::Host2, HostName::Host1);
    }
    panic!("all memory had arrived before the keeper was stopped, {ATTEMPTS_MAX} times");
}

/// The agent is killed while memory arrives: it goes on arriving.
#[test]
fn memory_arrives_without_the_agent() {
    require!("memory_arrives_without_the_agent": root, tcx, criu, migrate, redis);
    let lab = lab("no-agent");
    let destination = lab.host(HostName::Host2);
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    grow(&lab, 256);
    let mut client = workload.client(&lab, 5, &["--verify"]).unwrap();
    let (keeper, moving) = half_way(&lab, &workload);
    let moved = moving.join().unwrap();
    assert_eq!(moved.expect_committed().pid, workload.pid);
    let agent = named(&destination, "migrate").unwrap();
    // Signals that ask for an end are not for it any more.
    signal(&destination, "-TERM", agent);
    signal(&destination, "-INT", agent);
    signal(&destination, "-HUP", agent);
    signal(&destination, "-KILL", agent);
    assert!(eventually(SOON, || !runs(&destination, agent)));
    for polite in ["-TERM", "-INT", "-HUP"] {
        signal(&destination, polite, keeper);
    }
    assert!(arrives(&destination));
    signal(&destination, "-CONT", keeper);
    serves_old_connections(&mut client);
    all_right(&lab, 256);
    assert!(eventually(SOON, || !runs(&destination, keeper)));
    assert_eq!(named(&destination, "memory-holder"), None);
    // Nothing of it is in the way of the next one.
    moves(&lab, &workload, HostName::Host2, HostName::Host1);
    all_right(&lab, 256);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}

/// The keeper is killed while memory arrives, whatever it was about: the agent goes on.
#[test]
fn memory_arrives_without_the_keeper() {
    require!("memory_arrives_without_the_keeper": root, tcx, criu, migrate, redis);
    let lab = lab("no-keeper");
    let destination = lab.host(HostName::Host2);
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    grow(&lab, 256);
    let mut client = workload.client(&lab, 5, &["--verify"]).unwrap();
    let (keeper, moving) = half_way(&lab, &workload);
    signal(&destination, "-KILL", keeper);
    assert_eq!(moving.join().unwrap().expect_committed().pid, workload.pid);
    assert!(eventually(SOON, || !arrives(&destination)));
    print_logs(&destination);
    let held = || named(&destination, "memory-holder").is_some();
    assert!(eventually(SOON, || !held()));
    all_right(&lab, 256);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
}
