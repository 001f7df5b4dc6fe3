//! In virtual machines, on kernels of Debian: the gate's own tests, for the verifier takes the
//! programs there, too, and they do what they do here; whole migrations, from one kernel to
//! another and by the kernel's soft-dirty marks, which the kernel of a test machine may not have;
//! and machines that get another kernel, by kexec and by a reset, with their trees parked on a disk.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migrate_core::report::Report;
use migrate_test_hosts::{HostName, WORKLOAD_V4};
use migrate_test_vms::{DISK, Kernel, Machine, Machines, Order, Program, Way, scratch};
use migrate_tests::client::{StrictClient, program};
use migrate_tests::hosts::gate_tests;
use migrate_tests::migration::{Migration, serves_old_connections, serves_old_connections_within};
use migrate_tests::{require, tunnel};

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

/// One migration takes half a minute under emulation on an idle machine.
const MOVES_WITHIN: Duration = Duration::from_secs(600);

/// Exit code: the destination was not reached in time, and nothing was touched.
const NOT_REACHED: i32 = 4;
/// Logging in by SSH takes two busy machines a minute or more, and less each time: what they
/// have run before, they need not translate again.
const ATTEMPTS: usize = 6;

/// Moves a process between machines and returns the report, and what was said of the engine.
fn moves(from: &Machine, to: &Machine, pid: &str, options: &[&str]) -> (Report, String) {
    let argv = ["migrate", "--json", "--to", to.host().as_str()];
    // Every page is compared, and no machine is quick here.
    let always = ["--verify", "--max-blackout", "300", pid];
    let attempt = || {
        let argv = argv.iter().chain(options).chain(&always);
        let finished = from.exec(argv, MOVES_WITHIN).unwrap();
        Migration::read(finished.code, &finished.stdout, &finished.stderr)
    };
    let mut migration = attempt();
    for _ in 1..ATTEMPTS {
        if migration.code != Some(NOT_REACHED) {
            break;
        }
        migration = attempt();
    }
    if migration.code != Some(0) {
        for machine in [from, to] {
            let logs = machine.exec(["sh", "-c", "tail -n 40 /run/migrate/log/*"], MOVES_WITHIN);
            println!("-- {}: {}", machine.host(), logs.unwrap().said());
        }
    }
    let report = migration.expect_committed().clone();
    let engine = migration
        .events
        .iter()
        .find(|event| event["subject"] == "memory engine")
        .map(ToString::to_string)
        .unwrap_or_default();
    (report, engine)
}

/// What such a set of machines runs.
fn moving() -> [Program; 2] {
    ["migrate", "strict-client"].map(|name| Program {
        path: program(name),
        name: name.to_owned(),
    })
}

/// The workload's address, for programs.
fn workload() -> String {
    WORKLOAD_V4.to_string()
}

/// A redis at an address, and its PID.
fn redis_on(machine: &Machine, address: &str) -> String {
    let server = ["redis-server", "--bind", address, "--save", ""];
    let alone = ["--protected-mode", "no", "--daemonize", "yes"];
    let pidfile = ["--pidfile", "/run/redis.pid"];
    let argv = server.iter().chain(&alone).chain(&pidfile);
    machine.succeed(argv, MOVES_WITHIN).unwrap();
    let pid = "until test -s /run/redis.pid; do sleep 0.1; done; cat /run/redis.pid";
    let pid = machine.succeed(["sh", "-c", pid], MOVES_WITHIN).unwrap();
    pid.trim().to_owned()
}

/// Its strict client, which has been served.
fn client_on(machine: &Machine, address: &str) -> StrictClient {
    let mut command = machine.command("strict-client");
    command
        .args(["redis", "--addr", &format!("{address}:6379")])
        .args(["--connections", "8", "--interval-us", "20000"])
        .args(["--keys", "2000", "--populate", "--verify"])
        .args(["--connect-wait-ms", "60000", "--reply-timeout-ms", "300000"]);
    let mut client = StrictClient::spawn(command).unwrap();
    serves_old_connections(&mut client);
    client
}

/// By soft-dirty marks of their own accord on 6.1, which has nothing else, and because they are
/// told to on 6.12, which has.
#[test]
fn redis_moves_between_kernels_by_soft_dirty_marks() {
    require!(
        "redis_moves_between_kernels_by_soft_dirty_marks":
        vm, kernel_6_1, kernel_6_12, migrate, criu, redis
    );
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let orders = [
        Order::new(HostName::Host1, Kernel::V6_1),
        Order::new(HostName::Host2, Kernel::V6_12),
        Order::new(HostName::Client, Kernel::V6_12),
    ];
    let machines = Machines::boot(dir.path(), &orders, &moving()).unwrap();
    let [one, two, peer] = orders.map(|order| machines.get(order.host).unwrap());
    println!("up after {} s", begun.elapsed().as_secs());

    let pid = redis_on(one, &workload());
    let pid = pid.as_str();
    let mut client = client_on(peer, &workload());

    for (from, to, options) in [(one, two, &[][..]), (two, one, &["--engine", "soft-dirty"])] {
        let (report, engine) = moves(from, to, pid, options);
        println!(
            "from {} to {}: {engine}, {} rounds, {} of {} pages while frozen, {} ms, done {} s after \
             the boot began",
            from.kernel(),
            to.kernel(),
            report.rounds,
            report.frozen_pages,
            report.pages,
            report.blackout.total_us() / 1000,
            begun.elapsed().as_secs()
        );
        assert!(engine.contains("soft-dirty: "), "{engine}");
        assert_eq!(report.connections, 8);
        // Rounds have moved most of it, and the dump has relied on them.
        assert!(report.rounds >= 2, "{report:#?}");
        assert!(report.frozen_pages * 2 < report.pages, "{report:#?}");
        let there = to.succeed(["cat", &format!("/proc/{pid}/comm")], MOVES_WITHIN);
        assert_eq!(there.unwrap().trim(), "redis-server");
        let here = from.exec(["test", "-e", &format!("/proc/{pid}")], MOVES_WITHIN);
        assert_ne!(
            here.unwrap().code,
            Some(0),
            "it still runs on {}",
            from.host()
        );
        serves_old_connections(&mut client);
    }
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict}");
}

/// What the boot does before there is a network, as `dist/migrate-guard.service`.
const BEFORE_NETWORK: &str = "test ! -d /disk/parked || migrate guard-boot --dir /disk/parked";

/// Peers that have waited for two minutes may wait for as long again until they ask.
const ASKED_AGAIN_WITHIN: Duration = Duration::from_secs(300);

/// Parks trees, lets the machine have another kernel in one of the two ways, resumes them.
fn outlive_their_kernel(machines: &mut Machines, way: Way, pids: &[&str], at_boot: &str) {
    let one = machines.get(HostName::Host1).unwrap();
    let parked = format!("{DISK}/parked");
    let prepare = format!(
        "mkdir -m 700 {parked}; echo '{BEFORE_NETWORK}' >{DISK}/before-network; sync; uname -r"
    );
    let former = one.succeed(["sh", "-c", &prepare], MOVES_WITHIN).unwrap();
    let reboot = match way {
        Way::Kexec => {
            // The digest of the images is what a crashed kernel needs, and takes seconds here.
            let load = format!(
                "kexec --load --no-checks --reuse-cmdline --initrd={DISK}/initrd {DISK}/vmlinuz"
            );
            one.succeed(["sh", "-c", &load], MOVES_WITHIN).unwrap();
            "kexec --exec"
        }
        // At once, as a power switch.
        Way::Reset => "echo b >/proc/sysrq-trigger",
    };
    let park = [
        "migrate",
        "maintenance",
        "--dir",
        &parked,
        "--reboot-cmd",
        reboot,
    ];
    let park = park.iter().chain(pids);
    machines.leave_kernel(HostName::Host1, way, park).unwrap();

    let one = machines.get(HostName::Host1).unwrap();
    let latter = one.succeed(["uname", "-r"], MOVES_WITHIN).unwrap();
    assert_ne!(former, latter);
    assert_eq!(latter.trim(), Kernel::V6_12.find().unwrap().release);
    let list = ["migrate", "resume", "--list", "--dir", &parked];
    let list = one.succeed(list, MOVES_WITHIN).unwrap();
    assert_eq!(list.matches(former.trim()).count(), pids.len(), "{list}");
    assert_eq!(list.matches("; waits").count(), pids.len(), "{list}");
    one.succeed(["sh", "-c", at_boot], MOVES_WITHIN).unwrap();
    let resume = ["migrate", "resume", "--dir", &parked];
    let resumed = one.succeed(resume, MOVES_WITHIN).unwrap();
    println!("{resumed}");
    assert_eq!(
        resumed.matches("runs again").count(),
        pids.len(),
        "{resumed}"
    );
}

/// A strict client that goes on: no connection was reset, and every key is as it was written.
fn goes_on(mut client: StrictClient) {
    serves_old_connections_within(&mut client, ASKED_AGAIN_WITHIN);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict}");
}

/// A redis, and an OpenVPN over TCP with somebody's connections through it.
#[test]
fn redis_and_openvpn_outlive_a_kexec() {
    require!(
        "redis_and_openvpn_outlive_a_kexec":
        vm, kernel_6_1, kernel_6_12, migrate, criu, redis, kexec, openvpn
    );
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let orders = [
        Order::new(HostName::Host1, Kernel::V6_1).with_disk(Kernel::V6_12),
        Order::new(HostName::Host2, Kernel::V6_12),
        Order::new(HostName::Client, Kernel::V6_12),
    ];
    let mut machines = Machines::boot(dir.path(), &orders, &moving()).unwrap();
    println!("up after {} s", begun.elapsed().as_secs());
    let [one, two, peer] = orders.map(|order| machines.get(order.host).unwrap());
    let shell = |machine: &Machine, script: &str| {
        machine.succeed(["sh", "-c", script], MOVES_WITHIN).unwrap()
    };
    shell(one, &format!("openvpn --genkey secret {}", tunnel::KEY));
    let key = dir.path().join("vpn.key");
    fs::write(&key, one.read(tunnel::KEY).unwrap()).unwrap();
    peer.put(&key, tunnel::KEY, 0o600).unwrap();
    shell(two, &tunnel::behind());
    redis_on(two, tunnel::BEHIND);
    // As the configuration of a network makes it at each boot.
    let at_boot = format!("{} && {}", tunnel::DEVICE, tunnel::router());
    shell(one, &at_boot);
    let vpn = one.spawn_detached(tunnel::server(), "/dev/null").unwrap();
    let listens = format!(
        "until ss -tln | grep -q :{}; do sleep 0.1; done",
        tunnel::PORT
    );
    shell(one, &listens);
    peer.spawn_detached(tunnel::client(), "/dev/null").unwrap();
    shell(
        peer,
        &format!("until {}; do sleep 0.1; done", tunnel::ROUTE),
    );
    let cache = redis_on(one, &workload());
    let clients = [workload().as_str(), tunnel::BEHIND].map(|address| client_on(peer, address));

    let pids = [cache.as_str(), &vpn.to_string()];
    outlive_their_kernel(&mut machines, Way::Kexec, &pids, &at_boot);
    println!("back after {} s", begun.elapsed().as_secs());
    clients.into_iter().for_each(goes_on);
    println!("done after {} s", begun.elapsed().as_secs());
}

#[test]
fn redis_outlives_a_reset() {
    require!("redis_outlives_a_reset": vm, kernel_6_1, kernel_6_12, migrate, criu, redis);
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let orders = [
        Order::new(HostName::Host1, Kernel::V6_1).with_disk(Kernel::V6_12),
        Order::new(HostName::Client, Kernel::V6_12),
    ];
    let mut machines = Machines::boot(dir.path(), &orders, &moving()).unwrap();
    let [one, peer] = orders.map(|order| machines.get(order.host).unwrap());
    let pid = redis_on(one, &workload());
    let client = client_on(peer, &workload());
    outlive_their_kernel(&mut machines, Way::Reset, &[&pid], "true");
    goes_on(client);
    println!("done after {} s", begun.elapsed().as_secs());
}
