//! In virtual machines, on kernels of Debian: the gate's own tests and those of what reads
//! flags of mappings, for the verifier takes the programs there, too, and they do what they do
//! here; whole migrations, from one kernel to
//! another and by the kernel's soft-dirty marks, which the kernel of a test machine may not have;
//! and machines that get another kernel, by kexec and by a reset, with their trees parked on a disk.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migrate_core::report::Report;
use migrate_test_hosts::{Authority, HostName, WORKLOAD_V4};
use migrate_test_vms::{DISK, Kernel, Machine, Machines, Order, Program, Way, scratch};
use migrate_tests::client::{StrictClient, program};
use migrate_tests::hosts::unit_tests;
use migrate_tests::migration::{Migration, serves_old_connections, serves_old_connections_within};
use migrate_tests::require;
use migrate_tests::tunnel::{self, End};

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
/// Tests of what reads flags of mappings out of the kernel's own records.
const TESTS_OF_FLAGS: [&str; 2] = [
    "the_program_says_what_smaps_says",
    "smaps_comes_without_counts",
];
/// What those of devices have to have been on.
const VLANS: [&str; 2] = ["vlan 802.1Q", "vlan 802.1ad"];
const BONDS: [&str; 3] = ["bond active-backup", "bond balance-rr", "bond 802.3ad"];

fn gate_works_on(kernel: Kernel) {
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let programs = ["migrate-gate", "migrate-criu"].map(|package| Program {
        path: unit_tests(package).unwrap(),
        name: package.to_owned(),
    });
    let order = Order::new(HostName::Host1, kernel);
    let machines = Machines::boot(dir.path(), &[order], &programs).unwrap();
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
    let gates: Vec<&str> = TESTS.iter().chain(of_hooks).copied().collect();
    for (program, tests) in [
        ("migrate-gate", &gates[..]),
        ("migrate-criu", &TESTS_OF_FLAGS),
    ] {
        let argv = [program, "--test-threads=1", "--show-output"];
        let argv = argv.into_iter().chain(tests.iter().copied());
        let finished = machine.exec(argv, TESTS_WITHIN).unwrap();
        let said = finished.said();
        assert_eq!(finished.code, Some(0), "on {release}: {said}");
        // What skips there would be missed here.
        assert!(!said.contains("SKIP"), "on {release}: {said}");
        let passed = said.lines().filter(|line| line.ends_with("... ok")).count();
        assert_eq!(passed, tests.len(), "on {release}: {said}");
        if program == "migrate-gate" {
            for device in devices {
                assert!(said.contains(&format!("gated: {device}")), "{said}");
            }
        }
        println!(
            "{release}: {passed} tests of {program} passed, {} s after the boot began",
            begun.elapsed().as_secs()
        );
    }
}

/// One set of machines at a time, however many threads run the tests: each keeps a core busy.
fn alone() -> MutexGuard<'static, ()> {
    static MACHINES: Mutex<()> = Mutex::new(());
    MACHINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The oldest kernel that is supported, on which filters take the place of tcx hooks.
#[test]
fn the_gate_works_on_linux_6_1() {
    require!("the_gate_works_on_linux_6_1": vm, kernel_6_1, unit_tests);
    let _alone = alone();
    gate_works_on(Kernel::V6_1);
}

/// That of Debian 13.
#[test]
fn the_gate_works_on_linux_6_12() {
    require!("the_gate_works_on_linux_6_12": vm, kernel_6_12, unit_tests);
    let _alone = alone();
    gate_works_on(Kernel::V6_12);
}

/// The newest that Debian has, where what the kernel's programs and adapters take for granted
/// ceases to hold first.
#[test]
fn the_gate_works_on_the_newest_linux() {
    require!("the_gate_works_on_the_newest_linux": vm, kernel_newest, unit_tests);
    let _alone = alone();
    gate_works_on(Kernel::Newest);
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
    let migration = moved(from, to, pid, options);
    let engine = said_of(&migration, "memory engine");
    (migration.expect_committed().clone(), engine)
}

/// What preflight said of something.
fn said_of(migration: &Migration, subject: &str) -> String {
    migration
        .events
        .iter()
        .find(|event| event["subject"] == subject)
        .map(ToString::to_string)
        .unwrap_or_default()
}

/// Tries again while the other machine is not reached.
fn reached<T>(attempt: impl Fn() -> T, code: impl Fn(&T) -> Option<i32>) -> T {
    let mut tried = attempt();
    for _ in 1..ATTEMPTS {
        if code(&tried) != Some(NOT_REACHED) {
            break;
        }
        tried = attempt();
    }
    tried
}

/// Moves a process between machines, which has to succeed.
fn moved(from: &Machine, to: &Machine, pid: &str, options: &[&str]) -> Migration {
    moved_by(from, to, to.host().as_str(), pid, options)
}

/// The same to an agent that is reached by this name.
fn moved_by(from: &Machine, to: &Machine, at: &str, pid: &str, options: &[&str]) -> Migration {
    let argv = ["migrate", "--json", "--to", at];
    // Every page is compared, and no machine is quick here.
    let always = ["--verify", "--max-blackout", "300", pid];
    let attempt = || {
        let argv = argv.iter().chain(options).chain(&always);
        let finished = from.exec(argv, MOVES_WITHIN).unwrap();
        Migration::read(finished.code, &finished.stdout, &finished.stderr)
    };
    let migration = reached(attempt, |migration| migration.code);
    if migration.code != Some(0) {
        for machine in [from, to] {
            let logs = machine.exec(["sh", "-c", "tail -n 40 /run/migrate/log/*"], MOVES_WITHIN);
            println!("-- {}: {}", machine.host(), logs.unwrap().said());
        }
    }
    let _ = migration.expect_committed();
    migration
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
/// A machine whose clock is put back and forth by decades, several times a second.
struct SteppingClock<'a>(&'a Machine);

impl<'a> SteppingClock<'a> {
    fn start(machine: &'a Machine) -> Self {
        shell(
            machine,
            "touch /run/stepping; \
             (while test -e /run/stepping; do \
                date -s @1000000000; sleep 0.1; date -s @2000000000; sleep 0.1; echo >>/run/steps; \
              done >/dev/null 2>&1 &)",
        );
        until(machine, "test -s /run/steps");
        Self(machine)
    }
}

impl Drop for SteppingClock<'_> {
    fn drop(&mut self) {
        // A machine that does not answer has failed the test already.
        let _ = self
            .0
            .exec(["rm", "-f", "/run/stepping", "/run/steps"], MOVES_WITHIN);
    }
}

/// A process that calls exec when CRIU is about to freeze it has its vDSO where nobody has sent
/// it from, and CRIU takes it for sent.
fn exec_before_the_freeze(from: &Machine, to: &Machine) {
    const SHELL: &str = "trap 'exec sleep 1000' USR1; sleep 1000 & wait";
    let pid = from
        .spawn_detached(["sh", "-c", SHELL], "/dev/null")
        .unwrap();
    // SIGUSR1 is the tenth.
    let catches = "grep -q '^SigCgt:.*[2367abef]..$'";
    until(from, &format!("{catches} /proc/{pid}/status"));
    let to_name = to.host().as_str();
    let script = format!(
        "MIGRATE_STOP_AT=loaded migrate --to {to_name} --engine soft-dirty --verify \
             --max-blackout 300 {pid} & \
         until grep -q '^State:.T' /proc/$!/status; do \
             test -e /proc/$! || exit 9; sleep 0.1; \
         done; \
         kill -USR1 {pid}; \
         until grep -q sleep /proc/{pid}/comm; do sleep 0.1; done; \
         kill -CONT $!; wait $!"
    );
    println!("{}", shell(from, &script));
    assert_eq!(shell(to, &format!("cat /proc/{pid}/comm")), "sleep\n");
}

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
        // The clocks of both jump to and fro all through the second one.
        let stepping: Vec<SteppingClock<'_>> = [one, two]
            .into_iter()
            .filter(|_| to.host() == HostName::Host1)
            .map(SteppingClock::start)
            .collect();
        let (report, engine) = moves(from, to, pid, options);
        drop(stepping);
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
    exec_before_the_freeze(one, two);
    println!("done after {} s", begun.elapsed().as_secs());
}

/// What the boot does before there is a network, as `dist/migrate-guard.service`.
const BEFORE_NETWORK: &str = "test ! -d /disk/parked || migrate guard-boot --dir /disk/parked";

/// Peers that have waited for two minutes may wait for as long again until they ask.
const ASKED_AGAIN_WITHIN: Duration = Duration::from_secs(300);

/// The standard output of a script in a guest, which has to succeed.
#[track_caller]
fn shell(machine: &Machine, script: &str) -> String {
    machine.succeed(["sh", "-c", script], MOVES_WITHIN).unwrap()
}

/// Waits in a guest.
#[track_caller]
fn until(machine: &Machine, condition: &str) {
    shell(machine, &format!("until {condition}; do sleep 0.1; done"));
}

/// A number that a script in a guest prints.
#[track_caller]
fn number(machine: &Machine, script: &str) -> u64 {
    shell(machine, script).trim().parse().unwrap()
}

/// Parks trees and lets the machine have another kernel in one of the two ways.
fn leave_kernel(machines: &mut Machines, way: Way, pids: &[String]) {
    let one = machines.get(HostName::Host1).unwrap();
    let parked = format!("{DISK}/parked");
    let former = shell(one, &format!("mkdir -p -m 700 {parked}; uname -r"));
    let reboot = match way {
        Way::Kexec => {
            // The digest of the images is what a crashed kernel needs, and takes seconds here.
            let load = format!(
                "kexec --load --no-checks --reuse-cmdline --initrd={DISK}/initrd {DISK}/vmlinuz"
            );
            shell(one, &load);
            "kexec --exec"
        }
        // At once, as a power switch.
        Way::Reset => "echo b >/proc/sysrq-trigger",
    };
    let park = ["migrate", "maintenance", "--dir", &parked];
    let park = park.into_iter().chain(["--reboot-cmd", reboot]);
    let park = park.chain(pids.iter().map(String::as_str));
    machines.leave_kernel(HostName::Host1, way, park).unwrap();

    let one = machines.get(HostName::Host1).unwrap();
    let latter = shell(one, "uname -r");
    assert_ne!(former, latter);
    assert_eq!(latter.trim(), Kernel::V6_12.find().unwrap().release);
}

/// What a machine that parks trees serves, and to whom: a redis, and a tunnel with somebody's
/// connections through it, among them a ping and a download that do not end by themselves.
struct Served {
    pids: [String; 2],
    clients: [StrictClient; 2],
    /// The client's end of the tunnel's connection.
    tunnel: String,
}

/// What asks for the tunnel's connection, which is alone at this port.
const TUNNEL: &str = "ss -tnH state established dport = :1194 | tr -s ' ' | cut -d ' ' -f 3";
/// The answers to a ping so far.
const ANSWERS: &str = "grep -c 'bytes from' /run/ping";
/// The bytes of a download so far.
const DOWNLOADED: &str = "wc -c </run/got";
/// Sends what nobody can guess until it is told that it is enough, and keeps it.
const ENDLESS: &str = "#!/bin/sh\n\
     printf 'Content-Type: application/octet-stream\\r\\n\\r\\n'\n\
     while test ! -e /run/enough; do head -c 8192 /dev/urandom; sleep 0.2; done | tee /run/sent\n";

impl Served {
    fn start(machines: &Machines, dir: &Path) -> Self {
        let at = |host| machines.get(host).unwrap();
        let [one, two, peer] = [HostName::Host1, HostName::Host2, HostName::Client].map(at);
        tunnel::certify(dir).unwrap();
        for (machine, end) in [(one, End::Server), (peer, End::Client)] {
            for (from, to) in end.keys(dir) {
                machine.put(&from, &to, 0o600).unwrap();
            }
        }
        shell(two, &tunnel::behind());
        redis_on(two, tunnel::BEHIND);
        let script = dir.join("endless");
        fs::write(&script, ENDLESS).unwrap();
        shell(two, "mkdir -p /srv/www/cgi-bin");
        two.put(&script, "/srv/www/cgi-bin/endless", 0o755).unwrap();
        let downloads = format!("{}:{}", tunnel::BEHIND, tunnel::DOWNLOADS);
        let serve = ["busybox", "httpd", "-f", "-p", &downloads, "-h", "/srv/www"];
        two.spawn_detached(serve, "/dev/null").unwrap();
        listens(two, tunnel::DOWNLOADS);

        shell(one, &at_boot());
        let vpn = one.spawn_detached(tunnel::server(), "/dev/null").unwrap();
        listens(one, tunnel::PORT);
        peer.spawn_detached(tunnel::client(), "/dev/null").unwrap();
        until(peer, tunnel::ROUTE);
        let ping = ["busybox", "ping", tunnel::BEHIND];
        peer.spawn_detached(ping, "/run/ping").unwrap();
        until(peer, "grep -q 'bytes from' /run/ping");
        let get = format!(
            "busybox wget -q -O /run/got http://{downloads}/cgi-bin/endless; echo $? >/run/got.code"
        );
        peer.spawn_detached(["sh", "-c", &get], "/dev/null")
            .unwrap();
        until(peer, "test -s /run/got");
        let cache = redis_on(one, &workload());
        let clients = [workload().as_str(), tunnel::BEHIND].map(|at| client_on(peer, at));
        Self {
            pids: [cache, vpn.to_string()],
            clients,
            tunnel: shell(peer, TUNNEL),
        }
    }

    /// All of it goes on where it was.
    fn goes_on(self, machines: &Machines) {
        let at = |host| machines.get(host).unwrap();
        let [two, peer] = [HostName::Host2, HostName::Client].map(at);
        let [answers, downloaded] = [ANSWERS, DOWNLOADED].map(|script| number(peer, script));
        self.clients.into_iter().for_each(goes_on);
        until(peer, &format!("test $({ANSWERS}) -gt {answers}"));
        until(peer, &format!("test $({DOWNLOADED}) -gt {downloaded}"));
        shell(two, "touch /run/enough");
        until(peer, "test -s /run/got.code");
        assert_eq!(shell(peer, "cat /run/got.code").trim(), "0");
        let [got, sent] = [(peer, "/run/got"), (two, "/run/sent")]
            .map(|(machine, file)| shell(machine, &format!("busybox sha256sum <{file}")));
        assert_eq!(got, sent);
        println!(
            "{} bytes downloaded, {} pings answered",
            number(peer, DOWNLOADED),
            number(peer, ANSWERS)
        );
        // It is the same connection, with the same session in it.
        assert_eq!(shell(peer, TUNNEL), self.tunnel);
        let said = peer.read(tunnel::CLIENT_LOG).unwrap();
        assert_eq!(said.matches(tunnel::AGREED).count(), 1, "{said}");
    }
}

/// As the configuration of a network makes it at each boot.
fn at_boot() -> String {
    format!("{} && {}", tunnel::DEVICE, tunnel::router())
}

fn listens(machine: &Machine, port: u16) {
    until(machine, &format!("ss -tln | grep -q :{port}"));
}

/// A strict client that goes on: no connection was reset, and every key is as it was written.
fn goes_on(mut client: StrictClient) {
    serves_old_connections_within(&mut client, ASKED_AGAIN_WITHIN);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict}");
}

/// What is parked on one, which another kernel is to have; the other two do not change.
fn parking(one: Order) -> [Order; 3] {
    [
        one.with_disk(Kernel::V6_12),
        Order::new(HostName::Host2, Kernel::V6_12),
        Order::new(HostName::Client, Kernel::V6_12),
    ]
}

#[test]
fn redis_and_openvpn_outlive_a_kexec() {
    require!(
        "redis_and_openvpn_outlive_a_kexec":
        vm, kernel_6_1, kernel_6_12, migrate, criu, redis, kexec, openvpn, busybox
    );
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let orders = parking(Order::new(HostName::Host1, Kernel::V6_1));
    let mut machines = Machines::boot(dir.path(), &orders, &moving()).unwrap();
    println!("up after {} s", begun.elapsed().as_secs());
    let served = Served::start(&machines, dir.path());
    let one = machines.get(HostName::Host1).unwrap();
    let former = shell(one, "uname -r");
    shell(
        one,
        &format!("echo '{BEFORE_NETWORK}' >{DISK}/before-network"),
    );
    println!("parks after {} s", begun.elapsed().as_secs());

    leave_kernel(&mut machines, Way::Kexec, &served.pids);
    let one = machines.get(HostName::Host1).unwrap();
    let list = shell(one, "migrate resume --list --dir /disk/parked");
    assert_eq!(list.matches(former.trim()).count(), 2, "{list}");
    assert_eq!(list.matches("; waits").count(), 2, "{list}");
    shell(one, &at_boot());
    let resumed = shell(one, "migrate resume --dir /disk/parked");
    println!("{resumed}");
    assert_eq!(resumed.matches("runs again").count(), 2, "{resumed}");
    println!("back after {} s", begun.elapsed().as_secs());
    served.goes_on(&machines);
    println!("done after {} s", begun.elapsed().as_secs());
}

/// The units as they are shipped.
const UNITS: [(&str, &str); 4] = [
    ("card-goes.service", CARD_GOES),
    ("card-comes.service", CARD_COMES),
    (
        "migrate-guard.service",
        include_str!("../../dist/migrate-guard.service"),
    ),
    (
        "migrate-resume.service",
        include_str!("../../dist/migrate-resume.service"),
    ),
];

/// What the package has udev do.
const RULE: (&str, &str) = (
    "udev/rules.d/60-migrate-guard.rules",
    include_str!("../../dist/60-migrate-guard.rules"),
);

/// The machine's card is not there when the guard looks for interfaces.
const CARD_GOES: &str = "\
[Unit]
DefaultDependencies=no
After=systemd-udev-settle.service
Wants=systemd-udev-settle.service
Before=migrate-guard.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'cd /sys/bus/virtio/drivers/virtio_net && for card in virtio*; do \
echo $$card >>/run/cards && echo $$card >unbind; done'
[Install]
WantedBy=sysinit.target
";

/// It comes when whoever configures the network is there already.
const CARD_COMES: &str = "\
[Unit]
DefaultDependencies=no
Requires=card-goes.service
After=card-goes.service migrate-guard.service systemd-networkd.service
Before=migrate-resume.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'cd /sys/bus/virtio/drivers/virtio_net && while read card; do \
echo $$card >bind; done </run/cards && udevadm settle && migrate status >/run/guarded'
[Install]
WantedBy=multi-user.target
";

/// Puts files where the next kernel's systemd has its configuration.
fn configure(machine: &Machine, scratch: &Path) {
    let etc = format!("{DISK}/etc");
    let put = |name: &str, text: &str| {
        let to = format!("{etc}/{name}");
        let (directory, _) = to.rsplit_once('/').unwrap();
        shell(machine, &format!("mkdir -p {directory}"));
        let file = scratch.join("file");
        fs::write(&file, text).unwrap();
        machine.put(&file, &to, 0o644).unwrap();
    };
    // Where the units look for parked trees.
    put(
        "fstab",
        &format!("{DISK}/parked /var/lib/migrate/parked none bind 0 0\n"),
    );
    for (name, text) in tunnel::networkd() {
        put(&name, &text);
    }
    let (name, text) = RULE;
    put(name, text);
    for (unit, text) in UNITS {
        put(&format!("systemd/system/{unit}"), text);
        // As `systemctl enable`, which the machine does not have yet.
        for (setting, how) in [("WantedBy=", "wants"), ("RequiredBy=", "requires")] {
            let lines = text.lines().filter_map(|line| line.strip_prefix(setting));
            for by in lines.flat_map(str::split_whitespace) {
                let directory = format!("{etc}/systemd/system/{by}.{how}");
                shell(
                    machine,
                    &format!("mkdir -p {directory} && ln -s ../{unit} {directory}/"),
                );
            }
        }
    }
}

/// When something of a unit happened, in microseconds of its machine's uptime.
fn happened(machine: &Machine, unit: &str, what: &str) -> u64 {
    let show = format!("systemctl show --value -p {what}TimestampMonotonic {unit}");
    let us = number(machine, &show);
    assert_ne!(us, 0, "{unit} has not come to {what}");
    us
}

/// What has been resumed has left its directory, so the guard is asked again.
fn no_network_without_the_guard(machine: &Machine) {
    const NETWORK: &str = "systemd-networkd.service";
    let systemctl = |arguments: &str| {
        let argv = ["systemctl"].into_iter();
        let argv = argv.chain(arguments.split_whitespace());
        machine.exec(argv, MOVES_WITHIN).unwrap()
    };
    let is_active = |unit| systemctl(&format!("is-active {unit}")).code == Some(0);
    // Whoever stops it would stop the network.
    let stopped = systemctl("stop migrate-guard.service");
    assert_ne!(stopped.code, Some(0), "{}", stopped.said());
    assert!(is_active(NETWORK));

    let fails = "[Unit]\nRefuseManualStop=no\n[Service]\nExecStart=\nExecStart=/nonexistent\n";
    let fails = format!(
        "mkdir -p /run/systemd/system/migrate-guard.service.d && \
         printf '{}' >/run/systemd/system/migrate-guard.service.d/fails.conf && \
         systemctl daemon-reload && \
         systemctl stop systemd-networkd.socket {NETWORK} migrate-guard.service",
        fails.replace('\n', "\\n")
    );
    shell(machine, &fails);
    assert!(!is_active(NETWORK));
    let started = systemctl(&format!("start {NETWORK}"));
    assert_ne!(started.code, Some(0), "{}", started.said());
    assert!(!is_active(NETWORK));
    // What is put right on a console lets it start.
    shell(
        machine,
        &format!(
            "rm /run/systemd/system/migrate-guard.service.d/fails.conf && \
             systemctl daemon-reload && systemctl start {NETWORK}"
        ),
    );
    assert!(is_active(NETWORK) && is_active("migrate-guard.service"));
}

/// By the units that are shipped, under a systemd that brings the network up, on a machine
/// whose network card is late; one of the trees comes back from another host.
#[test]
fn redis_and_openvpn_outlive_a_reset_by_their_units() {
    require!(
        "redis_and_openvpn_outlive_a_reset_by_their_units":
        vm, kernel_6_1, kernel_6_12, migrate, criu, redis, openvpn, busybox, systemctl, udevadm
    );
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let orders = parking(Order::new(HostName::Host1, Kernel::V6_1).by_systemd());
    let mut machines = Machines::boot(dir.path(), &orders, &moving()).unwrap();
    println!("up after {} s", begun.elapsed().as_secs());
    let served = Served::start(&machines, dir.path());
    configure(machines.get(HostName::Host1).unwrap(), dir.path());
    println!("parks after {} s", begun.elapsed().as_secs());

    // The memory of one waits on a machine whose kernel stays.
    let [cache, vpn] = &served.pids;
    let [one, two] = [HostName::Host1, HostName::Host2].map(|host| machines.get(host).unwrap());
    shell(two, "mkdir -p -m 700 /var/lib/migrate/kept");
    shell(one, &format!("mkdir -m 700 {DISK}/parked"));
    let park = format!("migrate park {cache} --to host2 --dir {DISK}/parked --max-blackout 300");
    let attempt = || one.exec(park.split(' '), MOVES_WITHIN).unwrap();
    let parked = reached(attempt, |parked| parked.code).said();
    assert!(parked.contains("is parked on host2"), "{parked}");
    leave_kernel(&mut machines, Way::Reset, std::slice::from_ref(vpn));
    println!("left after {} s", begun.elapsed().as_secs());
    let one = machines.get(HostName::Host1).unwrap();
    until(
        one,
        "systemctl is-system-running | grep -Eq '^(running|degraded)$'",
    );
    println!("back after {} s", begun.elapsed().as_secs());
    let said = shell(
        one,
        "journalctl -b -o cat -u migrate-guard -u migrate-resume",
    );
    println!("{said}");
    let guarded = said.matches("nothing answers for");
    assert_eq!(guarded.count(), 2, "{said}");
    assert_eq!(said.matches("eth0 is not there yet").count(), 2, "{said}");
    let status = shell(one, "cat /run/guarded");
    println!("{status}");
    assert_eq!(status.matches(": closed on ").count(), 2, "{status}");
    assert_eq!(status.matches("eth0").count(), 2, "{status}");
    assert_eq!(said.matches("runs again").count(), 2, "{said}");
    // The gate was closed before anything could get an address, and opened when all had theirs.
    let order = [
        ("migrate-guard.service", "ActiveEnter"),
        ("network-pre.target", "ActiveEnter"),
        ("systemd-networkd.service", "ExecMainStart"),
        ("card-comes.service", "ExecMainStart"),
        ("network-online.target", "ActiveEnter"),
        ("migrate-resume.service", "ExecMainStart"),
    ];
    let times = order.map(|(unit, what)| happened(one, unit, what));
    println!("{times:?} us");
    assert!(times.is_sorted(), "{order:?}: {times:?}");
    let gates = shell(one, "migrate status");
    assert!(!gates.contains("waits with a parked tree"), "{gates}");
    served.goes_on(&machines);
    no_network_without_the_guard(machines.get(HostName::Host1).unwrap());
    println!("done after {} s", begun.elapsed().as_secs());
}

/// A service as an administrator has it, who lets it begin anew whatever ends it.
const REDIS: &str = "redis-server.service";
const REDIS_UNIT: &str = "\
[Unit]
Description=A cache
[Service]
User=redis
WorkingDirectory=/tmp
ExecStart=/usr/bin/redis-server --bind 10.77.0.100 --protected-mode no --save \"\"
ExecStop=/usr/bin/redis-cli -h 10.77.0.100 shutdown nosave
MemoryMax=300M
Restart=on-failure
[Install]
WantedBy=multi-user.target
";
const REDIS_OVERRIDE: &str = "[Service]\nRestart=always\nRestartSec=1\n";
/// Its `MemoryMax=` in bytes.
const REDIS_BYTES: &str = "314572800";
/// Higher than what either machine has used, so that no PID is taken.
const PIDS_ABOVE: &str = "echo 30000 >/proc/sys/kernel/ns_last_pid";

/// One property of a unit.
#[track_caller]
fn property(machine: &Machine, unit: &str, name: &str) -> String {
    let show = ["systemctl", "show", "--value", "-p", name, unit];
    let value = machine.succeed(show, MOVES_WITHIN).unwrap();
    value.trim().to_owned()
}

/// Puts a text into a file of a guest.
#[track_caller]
fn put(machine: &Machine, scratch: &Path, text: &str, to: &str) {
    let (directory, _) = to.rsplit_once('/').unwrap();
    shell(machine, &format!("mkdir -p {directory}"));
    let file = scratch.join("text");
    fs::write(&file, text).unwrap();
    machine.put(&file, to, 0o644).unwrap();
}

/// The Debian package of what was built, as `cargo xtask dist` makes it.
fn package(scratch: &Path) -> PathBuf {
    let made = Command::new(program("xtask"))
        .arg("dist")
        .arg("--out")
        .arg(scratch)
        .arg("--program")
        .arg(program("migrate"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{said}");
    PathBuf::from(String::from_utf8(made.stdout).unwrap().trim())
}

/// Installs it with dpkg, which knows of the packages that it depends on.
fn install(machine: &Machine, scratch: &Path, package: &Path) {
    let known = Command::new("dpkg-query")
        .args(["-s", "libc6", "libgcc-s1"])
        .output()
        .unwrap();
    let known = String::from_utf8(known.stdout).unwrap();
    put(machine, scratch, &known, "/var/lib/dpkg/status");
    shell(machine, "mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates");
    machine.put(package, "/tmp/migrate.deb", 0o644).unwrap();
    let said = shell(machine, "dpkg -i /tmp/migrate.deb 2>&1");
    assert!(said.contains("Setting up migrate"), "{said}");
    for file in [
        "/usr/bin/migrate",
        "/usr/lib/systemd/system/migrate-agent.service",
        "/usr/lib/systemd/system/migrate-guard.service",
        "/usr/lib/systemd/system/migrate-resume.service",
        "/usr/lib/udev/rules.d/60-migrate-guard.rules",
        "/usr/share/bash-completion/completions/migrate",
        "/usr/share/zsh/vendor-completions/_migrate",
        "/usr/share/fish/vendor_completions.d/migrate.fish",
        "/usr/share/man/man8/migrate.8.gz",
        "/etc/migrate/config.toml",
    ] {
        shell(machine, &format!("test -s {file}"));
    }
    // As dpkg has noted them while it unpacked.
    shell(machine, "dpkg --verify migrate");
    // systemd has been told.
    for unit in ["agent", "guard", "resume"] {
        let unit = format!("migrate-{unit}.service");
        assert_eq!(property(machine, &unit, "LoadState"), "loaded", "{unit}");
        let start = property(machine, &unit, "ExecStart");
        assert!(start.contains("path=/usr/bin/migrate "), "{start}");
    }
}

/// The unit has this process as its main one, bounds it, and is what its files say.
fn has_the_tree(machine: &Machine, pid: &str) {
    let is = |name| property(machine, REDIS, name);
    println!(
        "{}:\n{}",
        machine.host(),
        shell(machine, &format!("systemctl status --no-pager {REDIS}"))
    );
    assert_eq!(
        (is("ActiveState").as_str(), is("MainPID").as_str()),
        ("active", pid)
    );
    let group = format!("/sys/fs/cgroup{}", is("ControlGroup"));
    shell(machine, &format!("grep -qx {pid} {group}/cgroup.procs"));
    assert_eq!(
        shell(machine, &format!("cat {group}/memory.max")).trim(),
        REDIS_BYTES
    );
    for (name, value) in [
        ("Type", "simple"),
        ("Restart", "always"),
        ("KillMode", "control-group"),
        ("NRestarts", "0"),
        ("NeedDaemonReload", "no"),
        (
            "DropInPaths",
            "/etc/systemd/system/redis-server.service.d/override.conf",
        ),
    ] {
        assert_eq!(is(name), value, "{name}");
    }
    let start = is("ExecStart");
    assert!(start.contains("path=/usr/bin/redis-server ;"), "{start}");
    // What it says now is said by the unit.
    let answer = format!("redis-cli -h {} bgsave", workload());
    assert!(shell(machine, &answer).contains("saving started"));
    until(
        machine,
        &format!("journalctl -o cat _PID={pid} _SYSTEMD_UNIT={REDIS} | grep -q 'saving started'"),
    );
    assert_eq!(
        shell(machine, "ls /sys/fs/cgroup/migrate 2>/dev/null | wc -l").trim(),
        "0"
    );
}

/// The unit is down and stays so: nothing is about to start it.
fn is_down(machine: &Machine) {
    let is = |name| property(machine, REDIS, name);
    let state = (is("ActiveState"), is("SubState"));
    assert!(
        matches!(state.0.as_str(), "failed" | "inactive"),
        "{state:?}"
    );
    assert!(matches!(state.1.as_str(), "failed" | "dead"), "{state:?}");
    assert_eq!(
        (is("MainPID").as_str(), is("Restart").as_str()),
        ("0", "always")
    );
    assert_eq!(is("NRestarts"), "0");
}

/// And nothing of the service runs there.
fn is_left(machine: &Machine) {
    is_down(machine);
    let running = machine.exec(["ps", "-C", "redis-server", "-o", "pid="], MOVES_WITHIN);
    assert_ne!(
        running.unwrap().code,
        Some(0),
        "a second copy on {}",
        machine.host()
    );
}

/// What a tree gets that no service takes.
const SCOPE: &str = "redis-server.migrated.scope";

/// A scope has the process, and bounds it as the service did.
fn is_in_scope(machine: &Machine, pid: &str) {
    shell(machine, &format!("systemctl status --no-pager {SCOPE}"));
    assert_eq!(property(machine, SCOPE, "MemoryMax"), REDIS_BYTES);
    let group = property(machine, SCOPE, "ControlGroup");
    shell(
        machine,
        &format!("grep -qx {pid} /sys/fs/cgroup{group}/cgroup.procs"),
    );
}

/// A machine with the package, the service and a way in.
fn furnish(machine: &Machine, scratch: &Path, package: &Path) {
    fs::create_dir(scratch).unwrap();
    until(machine, "systemctl start network-online.target");
    install(machine, scratch, package);
    for (file, text) in [
        (REDIS.to_owned(), REDIS_UNIT),
        (format!("{REDIS}.d/override.conf"), REDIS_OVERRIDE),
    ] {
        put(
            machine,
            scratch,
            text,
            &format!("/etc/systemd/system/{file}"),
        );
    }
    shell(
        machine,
        "systemctl daemon-reload && systemctl start ssh.service",
    );
}

/// The standing agent of the package.
const AGENT: &str = "migrate-agent.service";
/// Where its unit has it listen.
const AGENT_AT: &str = "host2:7700";
/// What a source shows to it.
const SHOWS: [&str; 6] = [
    "--ca",
    "/etc/migrate/ca.pem",
    "--cert",
    "/etc/migrate/host.pem",
    "--key",
    "/etc/migrate/host.key",
];

/// Gives machines certificates of one authority, and one of them an agent as the package has it.
fn stands(machines: [&Machine; 2], stands_on: &Machine, scratch: &Path) {
    let directory = scratch.join("authority");
    fs::create_dir(&directory).unwrap();
    let authority = Authority::in_dir(&directory).unwrap();
    for machine in machines {
        let (cert, key) = authority.certify(machine.host().as_str()).unwrap();
        for (file, name, mode) in [
            (authority.ca(), "ca.pem", 0o644),
            (cert, "host.pem", 0o644),
            (key, "host.key", 0o600),
        ] {
            let to = format!("/etc/migrate/{name}");
            machine.put(&file, &to, mode).unwrap();
        }
    }
    // Without a policy the unit starts nothing.
    shell(stands_on, &format!("systemctl start {AGENT}"));
    assert_eq!(property(stands_on, AGENT, "ActiveState"), "inactive");
    let policy = format!("peers = [\"host1\"]\nunits = [\"{REDIS}\"]\n");
    put(stands_on, scratch, &policy, "/etc/migrate/agent.toml");
    shell(stands_on, &format!("systemctl start {AGENT}"));
    listens(stands_on, 7700);
}

/// A start of the unit is under way around the tree that has come when the agent dies. The unit
/// gets the tree all the same, and its own settings from the next agent.
fn loses_its_agent(from: &Machine, to: &Machine, scratch: &Path, pid: &str) {
    const SLOW: &str = "\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'until test -e /run/go; do sleep 0.1; done'
";
    let slow = format!("/etc/systemd/system/{REDIS}.d/slow.conf");
    put(to, scratch, SLOW, "/etc/systemd/system/slow.service");
    let after = "[Unit]\nWants=slow.service\nAfter=slow.service\n";
    put(to, scratch, after, &slow);
    shell(to, "systemctl daemon-reload");
    let agent = property(to, AGENT, "MainPID");
    let is = |unit: &str, name: &str, value: &str| {
        format!("test \"$(systemctl show --value -p {name} {unit})\" {value}")
    };
    std::thread::scope(|scope| {
        let options = [&SHOWS[..], &["--stdio", "journal"]].concat();
        let moving = scope.spawn(move || moved_by(from, to, AGENT_AT, pid, &options));
        let begins = is("slow.service", "ActiveState", "= activating");
        until(to, &begins);
        assert!(property(to, REDIS, "DropInPaths").contains("zzz-migrate-adopt"));
        shell(
            to,
            &format!("systemctl kill --signal=KILL --kill-whom=main {AGENT}"),
        );
        let migration = moving.join().unwrap();
        assert_eq!(migration.expect_committed().unit, None);
        let warned = migration.events.iter().any(|event| {
            let event = event.to_string();
            event.contains("has not said in which unit")
        });
        assert!(warned, "{:#?}", migration.events);
    });
    until(
        to,
        &format!(
            "{} && {}",
            is(AGENT, "MainPID", &format!("!= {agent}")),
            is(AGENT, "SubState", "= running")
        ),
    );
    // The one that came has looked, and the start is still under way.
    listens(to, 7700);
    assert!(property(to, REDIS, "DropInPaths").contains("zzz-migrate-adopt"));
    shell(to, "touch /run/go");
    until(to, &is(REDIS, "ActiveState", "= active"));
    until(
        to,
        &format!("! ls /run/systemd/system/{REDIS}.d/*migrate* 2>/dev/null"),
    );
    shell(to, &format!("rm {slow} && systemctl daemon-reload"));
    is_left(from);
    has_the_tree(to, pid);
}

/// A service whose memory follows it, with a unit that would end what stands still meanwhile.
const BUSY: &str = "busy.service";
/// The same in a scope.
const BARE: &str = "bare.scope";

/// Nothing ends what is left of a tree while its copy lacks memory: no operator who takes it
/// for over, no watchdog, no age, no lack of memory.
fn is_kept_meanwhile(from: &Machine, to: &Machine, scratch: &Path) {
    let program = shell(from, "command -v lazy-memory");
    let program = format!("{} busy-idle 4 1 /srv/busy /srv/go", program.trim());
    let unit = format!(
        "[Service]\nExecStart={program}\nRestart=always\nWatchdogSec=1h\nRuntimeMaxSec=1h\n"
    );
    put(from, scratch, &unit, &format!("/etc/systemd/system/{BUSY}"));
    shell(from, "mkdir -p /srv");
    // There it comes to rest.
    shell(to, "mkdir -p /srv && touch /srv/go");
    shell(
        from,
        &format!("{PIDS_ABOVE} && systemctl daemon-reload && systemctl start {BUSY}"),
    );
    until(from, "grep -q ready /srv/busy");
    let is = |name| property(from, BUSY, name);
    let pid = is("MainPID");
    is_watched_again(from, to, &pid);
    moves_kept(from, to, BUSY, &pid, || assert_eq!(is("WatchdogUSec"), "0"));
    assert!(!is("DropInPaths").contains("migrate"));
    assert_eq!(
        (is("RefuseManualStop"), is("MainPID")),
        ("no".to_owned(), "0".to_owned())
    );
    shell(to, "systemctl stop busy.migrated.scope");
    shell(to, &format!("test ! -e /proc/{pid}"));

    let run = format!("systemd-run --scope --unit={BARE} -p RuntimeMaxSec=1h setsid {program}");
    shell(
        from,
        &format!("rm /srv/busy && {PIDS_ABOVE} && {run} </dev/null >/dev/null 2>&1 &"),
    );
    until(from, "grep -q ready /srv/busy 2>/dev/null");
    let pid = shell(
        from,
        &format!("cat /sys/fs/cgroup/system.slice/{BARE}/cgroup.procs"),
    );
    moves_kept(from, to, BARE, pid.trim(), || ());
    shell(from, &format!("! ls /run/systemd/system/{BARE}.d"));
    shell(
        to,
        &format!("systemctl stop lazy-memory-{}.migrated.scope", pid.trim()),
    );
}

/// The unit's watchdog does not count while the tree may stand still, and does again when a
/// migration has ended before the commit.
fn is_watched_again(from: &Machine, to: &Machine, pid: &str) {
    let is = |name| property(from, BUSY, name);
    let settings = || ["WatchdogUSec", "Restart", "MainPID"].map(is);
    assert_eq!(settings(), ["1h", "always", pid]);
    let argv = ["migrate", "--json", "--to", to.host().as_str()];
    // A goal that no round can reach, and 20 s for the one that is made.
    let vain = ["--engine", "uffd", "--goal", "101", "--max-iterations", "1"];
    let slow = ["--bandwidth", "200K", "--on-timeout", "cancel"];
    let attempt = || {
        let options = argv.iter().chain(&vain).chain(&slow);
        from.exec(options.chain(&["--stdio", "journal", pid]), MOVES_WITHIN)
            .unwrap()
    };
    std::thread::scope(|scope| {
        let trying = scope.spawn(|| reached(attempt, |finished| finished.code));
        while settings() != ["0", "no", pid] {
            assert!(!trying.is_finished(), "{}", trying.join().unwrap().said());
        }
        let tried = trying.join().unwrap();
        assert_eq!(tried.code, Some(5), "{}", tried.said());
    });
    assert_eq!(settings(), ["1h", "always", pid]);
    assert!(!is("DropInPaths").contains("migrate"));
}

/// Moves a tree that is followed by memory for a while, in which its unit is kept; `meanwhile`
/// looks as well.
fn moves_kept(from: &Machine, to: &Machine, unit: &str, pid: &str, meanwhile: impl FnOnce()) {
    let is = |name| property(from, unit, name);
    assert_eq!(is("RuntimeMaxUSec"), "1h");
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            let few = ["--postcopy", "--engine", "uffd", "--max-iterations", "1"];
            // 20 s for all of its memory.
            let slow = ["--bandwidth", "200K", "--stdio", "journal"];
            moved(from, to, pid, &[&few[..], &slow].concat())
        });
        while is("RefuseManualStop") != "yes" {
            assert!(
                !moving.is_finished(),
                "{:#?}",
                moving.join().unwrap().events
            );
        }
        let refused = format!("systemctl stop {unit} 2>&1 || true");
        let said = shell(from, &refused);
        assert!(said.contains("refused"), "{said}");
        assert_eq!(is("RuntimeMaxUSec"), "infinity");
        meanwhile();
        let spared = shell(from, &format!("cat /proc/{pid}/oom_score_adj"));
        assert_eq!(spared.trim(), "-1000");
        let migration = moving.join().unwrap();
        let report = migration.expect_committed();
        assert!(
            report.postcopy.is_some_and(|late| late.pages > 256),
            "{report:#?}"
        );
    });
    shell(from, &format!("test ! -e /proc/{pid}"));
    let adjusted = shell(to, &format!("cat /proc/{pid}/oom_score_adj"));
    assert_eq!(adjusted.trim(), "0");
}

/// The package is installed, a service moves to another machine's own unit by a standing agent and
/// back by SSH, is stopped and started there as ever, gets its unit also when the agent dies
/// meanwhile, and then moves to a machine that has no such unit.
#[test]
fn a_service_moves_into_the_unit_of_the_other_machine() {
    require!(
        "a_service_moves_into_the_unit_of_the_other_machine":
        vm, kernel_6_12, migrate, xtask, criu, redis, systemctl, udevadm, dpkg
    );
    let _alone = alone();
    let begun = Instant::now();
    let dir = scratch().unwrap();
    let package = package(&dir.path().join("dist"));
    let orders = [
        Order::new(HostName::Host1, Kernel::V6_12).under_systemd(),
        Order::new(HostName::Host2, Kernel::Newest).under_systemd(),
        Order::new(HostName::Client, Kernel::V6_12),
    ];
    let programs = ["strict-client", "lazy-memory"].map(|name| Program {
        path: program(name),
        name: name.to_owned(),
    });
    let machines = Machines::boot(dir.path(), &orders, &programs).unwrap();
    let [one, two, peer] = orders.map(|order| machines.get(order.host).unwrap());
    println!("up after {} s", begun.elapsed().as_secs());
    std::thread::scope(|scope| {
        for machine in [one, two] {
            let (dir, package) = (dir.path().join(machine.host().as_str()), &package);
            scope.spawn(move || furnish(machine, &dir, package));
        }
    });
    // What both have run once is translated, and a login then within its limit.
    std::thread::scope(|scope| {
        for (from, to) in [(one, two), (two, one)] {
            scope.spawn(move || until(from, &format!("ssh {} true", to.host())));
        }
    });
    println!("installed after {} s", begun.elapsed().as_secs());
    shell(one, &format!("{PIDS_ABOVE} && systemctl start {REDIS}"));
    let pid = property(one, REDIS, "MainPID");
    let mut client = client_on(peer, &workload());

    stands([one, two], two, dir.path());
    for (from, to, at, shows) in [
        (one, two, AGENT_AT, &SHOWS[..]),
        (two, one, one.host().as_str(), &[]),
    ] {
        let options = [shows, &["--stdio", "journal"]].concat();
        let migration = moved_by(from, to, at, &pid, &options);
        let planned = said_of(&migration, &format!("unit {REDIS}"));
        assert!(planned.contains("kept down meanwhile"), "{planned}");
        let report = migration.expect_committed();
        assert_eq!(report.unit.as_deref(), Some(REDIS));
        is_left(from);
        has_the_tree(to, &pid);
        serves_old_connections(&mut client);
        println!("on {} after {} s", to.host(), begun.elapsed().as_secs());
    }
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict}");

    shell(one, &format!("systemctl stop {REDIS}"));
    assert_eq!(property(one, REDIS, "ActiveState"), "inactive");
    shell(one, &format!("test ! -e /proc/{pid}"));
    shell(one, &format!("systemctl restart {REDIS}"));
    let anew = property(one, REDIS, "MainPID");
    assert_ne!(anew, pid);
    assert_eq!(
        shell(one, &format!("cat /proc/{anew}/comm")).trim(),
        "redis-server"
    );

    let mut client = client_on(peer, &workload());
    loses_its_agent(one, two, dir.path(), &anew);
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict}");
    println!("without its agent after {} s", begun.elapsed().as_secs());

    // One has no such unit, and the other's has a condition that does not hold.
    shell(
        one,
        &format!(
            "rm -r /etc/systemd/system/{REDIS}* /usr/lib/systemd/system/redis* && \
             systemctl daemon-reload"
        ),
    );
    let migration = moved(two, one, &anew, &["--stdio", "journal"]);
    assert!(said_of(&migration, &format!("unit {SCOPE}")).contains("there is no"));
    assert_eq!(migration.expect_committed().unit.as_deref(), Some(SCOPE));
    is_left(two);
    is_in_scope(one, &anew);
    println!("in a scope after {} s", begun.elapsed().as_secs());

    put(
        two,
        dir.path(),
        "[Unit]\nConditionPathExists=/nonexistent\n",
        &format!("/etc/systemd/system/{REDIS}.d/never.conf"),
    );
    shell(two, "systemctl daemon-reload");
    let migration = moved(one, two, &anew, &["--stdio", "journal"]);
    assert_eq!(migration.expect_committed().unit.as_deref(), Some(SCOPE));
    let warned = migration.events.iter().any(|event| {
        let event = event.to_string();
        event.contains("redis-server.service could not take it")
    });
    assert!(warned, "{:#?}", migration.events);
    is_in_scope(two, &anew);
    is_down(two);
    assert!(!property(two, REDIS, "DropInPaths").contains("migrate"));
    shell(two, &format!("systemctl stop {SCOPE}"));
    shell(two, &format!("test ! -e /proc/{anew}"));
    println!("in another scope after {} s", begun.elapsed().as_secs());

    is_kept_meanwhile(one, two, dir.path());
    goes_with_its_package(two);
    println!("done after {} s", begun.elapsed().as_secs());
}

/// An upgrade has the agent run the new program, and a removal ends it.
fn goes_with_its_package(machine: &Machine) {
    const AGENT: &str = "migrate-agent.service";
    let is = |name| property(machine, AGENT, name);
    shell(machine, &format!("systemctl restart {AGENT}"));
    let before = is("MainPID");
    shell(machine, "dpkg -i /tmp/migrate.deb");
    assert_eq!(is("ActiveState"), "active");
    assert_ne!(is("MainPID"), before);
    shell(machine, "dpkg -r migrate");
    assert_eq!(is("LoadState"), "not-found");
    shell(machine, "test -e /etc/migrate/config.toml");
    let program = shell(machine, "command -v migrate || true");
    assert!(!program.contains("/usr/bin/migrate"), "{program}");
}
