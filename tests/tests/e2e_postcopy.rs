//! The tree is handed over before its memory: what it lacks follows, or it ends.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use migrate_core::report::Postcopy;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::client::program;
use migrate_tests::hosts::{eventually, named, runs};
use migrate_tests::migration::{
    Migration, arrives, migrate_as_given, print_logs, running_records, serves_old_connections,
};
use migrate_tests::refusals::{REFUSED, UNDECIDED, driver, shell};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload, redis_script};
use nix::sys::signal::{Signal, kill};

/// Limit for what takes a moment, and for the half minute in which nothing comes.
const SOON: Duration = Duration::from_secs(120);

/// Pages of so many MiB.
const fn pages_of(mib: u64) -> u64 {
    mib << 8
}

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("late-{test}-{}", std::process::id())).unwrap()
}

/// A program that writes to all of its memory until it is elsewhere.
struct Busy {
    pid: i32,
    file: String,
}

impl Busy {
    fn start(lab: &Lab, mode: &str, mib: u64, seed: u64) -> Self {
        let (file, go) = (format!("/srv/late-{seed}"), format!("/srv/go-{seed}"));
        fs::write(lab.host(HostName::Host2).path(&go), "").unwrap();
        // As its file, for CRIU.
        let words = [
            program("lazy-memory").display().to_string(),
            mode.to_owned(),
            mib.to_string(),
            seed.to_string(),
            file.clone(),
            go,
        ];
        let source = lab.host(HostName::Host1);
        let pid = source.spawn_detached(words, "/dev/null").unwrap();
        let busy = Self { pid, file };
        assert!(eventually(SOON, || busy.said(&source) == "ready"));
        busy
    }

    /// What it has found.
    fn said(&self, host: &Host) -> String {
        fs::read_to_string(host.path(&self.file)).unwrap_or_default()
    }

    fn moves(&self, lab: &Lab, more: &[&str]) -> Migration {
        let pid = self.pid.to_string();
        let arguments = [&["--to", "host2"], more, &[&pid]].concat();
        migrate_as_given(&lab.host(HostName::Host1), arguments).unwrap()
    }

    /// Every byte of it is right on the destination.
    #[track_caller]
    fn is_right(&self, lab: &Lab) {
        let destination = lab.host(HostName::Host2);
        assert!(eventually(SOON, || !self.said(&destination).is_empty()));
        if self.said(&destination) != "ok" {
            print_logs(&destination);
        }
        assert_eq!(self.said(&destination), "ok");
    }

    /// It is over with the tree: nobody runs it, on either host.
    #[track_caller]
    fn is_lost(&self, lab: &Lab) {
        let [source, destination] = [HostName::Host1, HostName::Host2].map(|name| lab.host(name));
        let ended = eventually(SOON, || !runs(&destination, self.pid));
        if !ended {
            print_logs(&destination);
        }
        assert!(ended, "the copy goes on without its memory");
        let removed = eventually(SOON, || !runs(&source, self.pid));
        assert!(removed, "the source's tree is still there");
    }
}

#[track_caller]
fn late(moved: &Migration) -> Postcopy {
    let report = moved.expect_committed();
    report.postcopy.unwrap_or_else(|| panic!("{report:#?}"))
}

/// Memory that changes all the time follows the handover, and every byte of it is
/// right, whatever the copy does to it before it is there.
#[test]
fn memory_under_heavy_writing_follows_the_handover() {
    require!("memory_under_heavy_writing_follows_the_handover": root, tcx, criu, migrate);
    let lab = lab("busy");
    for (seed, mode, more) in [
        (1, "busy-check", &["--postcopy", "--verify"][..]),
        // Slow enough for the copy to wait, fork and move what is not there.
        (2, "busy-churn", &["--postcopy", "--bandwidth", "30M"]),
        (
            3,
            "busy-threads",
            &["--postcopy", "--verify", "--streams", "1"],
        ),
        (
            4,
            "busy-churn",
            &["--on-timeout", "postcopy", "--engine", "full"],
        ),
        // CRIU takes all of its memory for stack.
        (
            5,
            "busy-aligned",
            &["--postcopy", "--engine", "full", "--verify"],
        ),
    ] {
        let busy = Busy::start(&lab, mode, if seed == 1 { 256 } else { 96 }, seed);
        // What changes while all of it goes over once: on a busy machine the program may
        // not get to run between a last round of some milliseconds and the freeze.
        let few = ["--max-iterations", "1", "--max-blackout", "60"];
        let moved = busy.moves(&lab, &[&few, more].concat());
        if moved.code != Some(0) {
            print_logs(&lab.host(HostName::Host1));
            print_logs(&lab.host(HostName::Host2));
        }
        let postcopy = late(&moved);
        println!(
            "{mode}: {postcopy:?}, {:?}",
            moved.expect_committed().blackout
        );
        assert!(postcopy.pages > pages_of(1), "{postcopy:?}");
        assert!(postcopy.bytes > postcopy.pages << 12, "{postcopy:?}");
        if seed == 2 {
            assert!(postcopy.waited_faults > 0, "{postcopy:?}");
        }
        busy.is_right(&lab);
        assert!(eventually(SOON, || !arrives(&lab.host(HostName::Host2))));
    }
}

/// A redis that is written to while it moves keeps its connections and its keys.
#[test]
fn redis_serves_while_its_memory_follows() {
    require!("redis_serves_while_its_memory_follows": root, tcx, criu, migrate, redis);
    let lab = lab("redis");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let fill = |first: u32, last: u32| {
        const SET: &str = "for i=ARGV[1],ARGV[2] do \
                           redis.call('SET', 'more:'..i, string.rep(string.char(33 + i % 90), 1000)) end \
                           return 0";
        redis_script(&lab, SET, first, last);
    };
    for first in (0..64 << 10).step_by(8 << 10) {
        fill(first, first + (8 << 10) - 1);
    }
    let keys = ["--keys", "20000", "--populate", "--verify"];
    let mut client = workload.client(&lab, 10, &keys).unwrap();
    let pid = workload.pid.to_string();
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = 0;
            while !over.load(Ordering::Relaxed) {
                fill(first, first + (4 << 10) - 1);
                first = (first + (4 << 10)) % (64 << 10);
            }
        });
        let there = [
            "--postcopy",
            "--verify",
            "--max-iterations",
            "1",
            "--to",
            "host2",
            &pid,
        ];
        let moved = migrate_as_given(&lab.host(HostName::Host1), there);
        over.store(true, Ordering::Relaxed);
        moved.unwrap()
    });
    if moved.code != Some(0) {
        print_logs(&lab.host(HostName::Host2));
    }
    let postcopy = late(&moved);
    println!("{postcopy:?}, {:?}", moved.expect_committed().blackout);
    assert!(postcopy.pages > 0, "{postcopy:?}");
    serves_old_connections(&mut client);
    const RIGHT: &str = "local right = 0; for i=ARGV[1],ARGV[2] do \
                         if redis.call('GET', 'more:'..i) == string.rep(string.char(33 + i % 90), 1000) \
                         then right = right + 1 end end return right";
    for first in (0..64 << 10).step_by(8 << 10) {
        assert_eq!(
            redis_script(&lab, RIGHT, first, first + (8 << 10) - 1),
            8 << 10
        );
    }
    assert!(client.stop().unwrap().is_clean());
}

/// Where rounds reach their goal nothing follows.
#[test]
fn nothing_follows_where_rounds_reach_their_goal() {
    require!("nothing_follows_where_rounds_reach_their_goal": root, tcx, criu, migrate);
    let lab = lab("goal");
    let quiet = Busy::start(&lab, "check", 48, 1);
    let moved = quiet.moves(
        &lab,
        &[
            "--on-timeout",
            "postcopy",
            "--goal",
            "10",
            "--downtime-limit",
            "60000",
        ],
    );
    let report = moved.expect_committed();
    assert_eq!(report.postcopy, None, "{report:?}");
    assert!(report.lazy_pages > 0, "{report:?}");
    quiet.is_right(&lab);
}

/// Several processes would no longer have pages in common: refused, unless the
/// user accepts that.
#[test]
fn a_family_is_refused_unless_the_user_insists() {
    require!("a_family_is_refused_unless_the_user_insists": root, tcx, criu, migrate);
    let lab = lab("family");
    let family = Busy::start(&lab, "family", 48, 1);
    let refused = family.moves(&lab, &["--postcopy"]);
    assert_eq!(refused.code, Some(REFUSED), "{refused:?}");
    assert!(
        refused
            .events
            .iter()
            .any(|event| event["subject"] == "postcopy"),
        "{refused:?}"
    );
    let refused = family.moves(&lab, &["--postcopy", "--restore", "eager"]);
    assert_eq!(refused.code, Some(REFUSED), "{refused:?}");
    let moved = family.moves(&lab, &["--postcopy", "--restore", "lazy"]);
    let _ = moved.expect_committed();
    family.is_right(&lab);
}

/// A migration that is under way.
fn begin(lab: &Lab, busy: &Busy) -> Child {
    let mut command = lab.host(HostName::Host1).command("migrate");
    let slow = [
        "--bandwidth",
        "2M",
        "--max-iterations",
        "1",
        "--max-blackout",
        "60",
    ];
    command
        .args([
            "--json",
            "--postcopy",
            "--engine",
            "uffd",
            "--compress",
            "lz4",
        ])
        .args(slow)
        .args(["--to", "host2", &busy.pid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // It runs there and touches nothing; here it stands still for what the copy lacks.
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    assert!(eventually(SOON, || !running_records(&destination).is_empty()));
    assert!(runs(&destination, busy.pid) && runs(&source, busy.pid));
    assert!(arrives(&destination), "all memory had arrived before");
    let told = || shell(&source, "migrate status");
    assert!(eventually(SOON, || told().contains("when all of its memory is there")));
    child
}

/// The network is cut before the last page: the copy ends, the tree is lost, and
/// the command says so.
#[test]
fn a_cut_network_ends_a_copy_without_its_memory() {
    require!("a_cut_network_ends_a_copy_without_its_memory": root, tcx, criu, migrate);
    let lab = lab("cut");
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let busy = Busy::start(&lab, "busy-idle", 32, 1);
    let child = begin(&lab, &busy);
    let address = source.ipv4();
    shell(
        &destination,
        &format!(
            "nft add table inet wall && \
             nft add chain inet wall input '{{ type filter hook input priority 0; }}' && \
             nft add chain inet wall output '{{ type filter hook output priority 0; }}' && \
             nft add rule inet wall input ip saddr {address} drop && \
             nft add rule inet wall output ip daddr {address} drop"
        ),
    );
    busy.is_lost(&lab);
    let ended = child.wait_with_output().unwrap();
    let ended = Migration::read(ended.status.code(), &ended.stdout, &ended.stderr);
    assert_eq!(ended.code, Some(UNDECIDED), "{ended:#?}");
    let last = ended.events.last().unwrap();
    assert_eq!(last["outcome"], "lost", "{ended:#?}");
    // Nothing brings it back.
    shell(&destination, "nft delete table inet wall");
    shell(&source, "migrate recover");
    busy.is_lost(&lab);
}

/// The source's command is killed before the last page.
#[test]
fn a_source_that_dies_takes_the_copy_along() {
    require!("a_source_that_dies_takes_the_copy_along": root, tcx, criu, migrate);
    let lab = lab("dead-source");
    let source = lab.host(HostName::Host1);
    let busy = Busy::start(&lab, "busy-idle", 32, 1);
    let mut child = begin(&lab, &busy);
    kill(driver(&source), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    busy.is_lost(&lab);
    assert!(eventually(SOON, || !arrives(&lab.host(HostName::Host2))));
}

/// The keeper is killed while pages are on their way: the agent goes on, or the tree
/// is dead and somebody has said so.
#[test]
fn memory_follows_without_the_keeper() {
    require!("memory_follows_without_the_keeper": root, tcx, criu, migrate);
    let lab = lab("dead-keeper");
    let destination = lab.host(HostName::Host2);
    let busy = Busy::start(&lab, "busy-patient", 32, 1);
    let child = begin(&lab, &busy);
    let keeper = named(&destination, "memory-keeper").unwrap();
    shell(&destination, &format!("kill -KILL {keeper}"));
    let ended = child.wait_with_output().unwrap();
    let ended = Migration::read(ended.status.code(), &ended.stdout, &ended.stderr);
    if !runs(&destination, busy.pid) {
        // It was killed between an event and its note.
        print_logs(&destination);
        return;
    }
    assert!(late(&ended).pages > pages_of(1), "{ended:?}");
    fs::write(destination.path("/srv/go-1-now"), "").unwrap();
    busy.is_right(&lab);
}

/// The agent, who brings the pages, is killed: the keeper ends the copy.
#[test]
fn an_agent_that_dies_takes_the_copy_along() {
    require!("an_agent_that_dies_takes_the_copy_along": root, tcx, criu, migrate);
    let lab = lab("dead-agent");
    let destination = lab.host(HostName::Host2);
    let busy = Busy::start(&lab, "busy-idle", 32, 1);
    let child = begin(&lab, &busy);
    kill(
        migrate_tests::refusals::agent(&destination),
        Signal::SIGKILL,
    )
    .unwrap();
    busy.is_lost(&lab);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(UNDECIDED), "{ended:?}");
}
