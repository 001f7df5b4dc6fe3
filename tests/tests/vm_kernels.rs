//! The gate's own tests in virtual machines, on kernels of Debian: the verifier takes the
//! programs there, too, and they do what they do here.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migrate_test_hosts::HostName;
use migrate_test_vms::{Kernel, Machines, Order, Program, scratch};
use migrate_tests::hosts::gate_tests;
use migrate_tests::require;

/// They take a minute or two under emulation on an idle machine; this is for one with many others.
const TESTS_WITHIN: Duration = Duration::from_secs(1200);
/// On real interfaces: attach, close, hold, open, adopt and detach. Few, since loading alone takes
/// seconds under emulation; what the programs decide does not depend on the kernel.
const TESTS: [&str; 2] = [
    "a_dropped_gate_is_adopted_and_detached",
    "a_question_is_held_and_answered_over_ipv4",
];
/// Where filters take the place of tcx hooks, and on devices whose drivers are modules.
const TESTS_OF_FILTERS: [&str; 2] = ["filters_of_others_come_behind_the_gate", "a_vlan_is_gated"];
/// Where there are tcx hooks, and on devices whose drivers are modules.
const TESTS_OF_TCX: [&str; 3] = [
    "programs_of_others_come_behind_the_gate",
    "a_program_in_front_is_noticed",
    "a_bond_is_gated",
];
/// What those of devices have to have been on.
const VLANS: [&str; 2] = ["vlan 802.1Q", "vlan 802.1ad"];
const BONDS: [&str; 3] = ["bond active-backup", "bond balance-rr", "bond 802.3ad"];

fn gate_works_on(kernel: Kernel) {
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let tests = Program {
        path: gate_tests().unwrap(),
        name: "gate-tests".to_owned(),
    };
    let order = Order::new(HostName::Host1, kernel);
    let machines = Machines::boot(dir.path(), &[order], &[tests]).unwrap();
    let machine = machines.get(HostName::Host1).unwrap();
    let release = machine
        .succeed(["uname", "-r"], TESTS_WITHIN)
        .unwrap()
        .trim()
        .to_owned();
    assert_eq!(release, kernel.find().unwrap().release);
    let (of_hooks, devices) = match kernel {
        Kernel::V6_1 => (&TESTS_OF_FILTERS[..], &VLANS[..]),
        Kernel::V6_12 | Kernel::Newest => (&TESTS_OF_TCX[..], &BONDS[..]),
    };
    let tests: Vec<&str> = TESTS.iter().chain(of_hooks).copied().collect();
    let argv = ["gate-tests", "--test-threads=1", "--show-output"];
    let argv = argv.into_iter().chain(tests.iter().copied());
    let finished = machine.exec(argv, TESTS_WITHIN).unwrap();
    let said = finished.said();
    assert_eq!(finished.code, Some(0), "on {release}: {said}");
    // What skips there would be missed here.
    assert!(!said.contains("SKIP"), "on {release}: {said}");
    for device in devices {
        assert!(said.contains(&format!("gated: {device}")), "{said}");
    }
    let passed = said.lines().filter(|line| line.ends_with("... ok")).count();
    assert_eq!(passed, tests.len(), "on {release}: {said}");
    println!(
        "{release}: {passed} tests of the gate passed, {} s after the boot began",
        begun.elapsed().as_secs()
    );
}

/// One set of machines at a time, however many threads run the tests: each keeps a core busy.
fn alone() -> MutexGuard<'static, ()> {
    static MACHINES: Mutex<()> = Mutex::new(());
    MACHINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The oldest kernel that is supported, on which filters take the place of tcx hooks.
#[test]
fn the_gate_works_on_linux_6_1() {
    require!("the_gate_works_on_linux_6_1": vm, kernel_6_1, gate_tests);
    let _alone = alone();
    gate_works_on(Kernel::V6_1);
}

/// That of Debian 13.
#[test]
fn the_gate_works_on_linux_6_12() {
    require!("the_gate_works_on_linux_6_12": vm, kernel_6_12, gate_tests);
    let _alone = alone();
    gate_works_on(Kernel::V6_12);
}
