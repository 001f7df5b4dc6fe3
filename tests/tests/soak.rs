//! A redis that moves back and forth, and what stays behind: what `cargo xtask soak`
//! does, for 200 hops or for `MIGRATE_SOAK_HOPS`.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::time::Duration;

use migrate_test_hosts::HostName;
use migrate_tests::field::processes;
use migrate_tests::hosts::eventually;
use migrate_tests::refusals::{scoped, shell};
use migrate_tests::require;
use migrate_tests::soak::figures::{Figure, count};
use migrate_tests::soak::{Options, run};

/// Some five minutes, in which 100 KiB a hop would be 20 MiB.
const HOPS: usize = 200;

/// Limit for what takes a moment.
const SOON: Duration = Duration::from_secs(60);

/// For what the test leaves behind on purpose.
const LEFT_BEHIND: &str = "mkdir -p /run/migrate/journal /run/migrate/log /run/migrate/bpf/gate && \
     mount -t tmpfs left /mnt && ip link add left type veth peer name right && \
     touch /run/migrate/journal/left /run/migrate/log/left /run/migrate/bpf/gate/left && \
     dd if=/dev/zero of=/run/left bs=1024 count=64 2>/dev/null && \
     (setsid sleep 600 >/dev/null 2>&1 &)";

#[test]
fn nothing_grows_from_hop_to_hop() {
    require!("nothing_grows_from_hop_to_hop": root, tcx, criu, migrate, redis);
    let hops = std::env::var("MIGRATE_SOAK_HOPS").map_or(HOPS, |hops| {
        hops.parse().expect("MIGRATE_SOAK_HOPS is a number")
    });
    let options = Options {
        hops,
        connections: 50,
    };
    let outcome = run(options, |line| println!("{line}"), || false);
    println!("{}", outcome.table);
    assert_eq!(outcome.faults, Vec::<String>::new());
    assert_eq!(outcome.hops, options.hops);
}

#[test]
fn what_is_left_behind_is_counted() {
    require!("what_is_left_behind_is_counted": root, tcx, migrate);
    let lab = scoped("soak-count");
    let host = lab.host(HostName::Host1);
    // In the places of an agent and a tree: one that opens nothing and ends no
    // sooner than the test. The host's init would not do, it reads what its
    // children tell it while they start.
    let standing = host.spawn_detached(["sleep", "600"], "/dev/null").unwrap();
    let state = host.path(format!("/proc/{standing}/stat"));
    assert!(
        eventually(SOON, || fs::read_to_string(&state)
            .is_ok_and(|text| text.contains(" (sleep) S "))),
        "it does not sleep"
    );
    let counted = || count(&host, standing, Some(standing)).unwrap();
    // What made the host and the process is still ending: an init, an sshd and
    // the process are all that stays.
    let names = || -> Vec<String> {
        let all = processes(&host).unwrap();
        all.into_iter().map(|process| process.name).collect()
    };
    assert!(eventually(SOON, || names().len() == 3), "{:?}", names());
    let before = counted();
    assert_eq!(before[&Figure::Processes], 3, "{before:?} {:?}", names());
    shell(&host, LEFT_BEHIND);
    fs::create_dir(host.cgroups().unwrap().join("left")).unwrap();
    // The shell's own helpers end a moment later.
    let mut after = before.clone();
    assert!(
        eventually(SOON, || {
            after = counted();
            after[&Figure::Processes] == before[&Figure::Processes] + 1
        }),
        "{before:?} and then {after:?}"
    );
    for figure in [
        Figure::BpfObjects,
        Figure::Mounts,
        Figure::Cgroups,
        Figure::Records,
        Figure::Logs,
    ] {
        assert_eq!(after[&figure], before[&figure] + 1, "{figure:?}");
    }
    // A pair of them.
    assert_eq!(after[&Figure::Interfaces], before[&Figure::Interfaces] + 2);
    assert!(after[&Figure::TmpfsKib] >= before[&Figure::TmpfsKib] + 64);
    for figure in [Figure::AgentDescriptors, Figure::TreeDescriptors] {
        assert_eq!(after[&figure], before[&figure], "{figure:?}");
        assert!(after[&figure] > 0, "{figure:?}");
    }
}
