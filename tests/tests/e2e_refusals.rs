//! Bad input, and what breaks on the way: a clear error, and nothing lost.
//!
//! Every test has strict clients at the workload from before the failure to
//! its end. After each failure the workload serves them in one place, nothing
//! of the attempt is left on either host, and where the cause can be taken
//! away the same command then succeeds.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use migrate_core::Phase;
use migrate_test_hosts::{Host, HostName};
use migrate_tests::client::program;
use migrate_tests::hosts::{eventually, listens, process_name, runs};
use migrate_tests::refusals::{
    CONNECT, Held, INTERRUPTED, REFUSED, ROLLED_BACK, Running, Scene, USAGE, agent, clean, criu_of,
    driver, image_mounts, is_stopped, leftovers, scoped, shell,
};
use migrate_tests::require;
use migrate_tests::standing;
use migrate_tests::workload::Kind;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::getpgid;

/// An address of the lab's network that nobody has.
const NOBODY: &str = "10.77.0.99";
/// What the destination undoes by itself once it hears that the source is gone.
const UNDONE_WITHIN: Duration = Duration::from_secs(30);

/// Of our own accord, after 10 s of silence or less, and not with the kernel,
/// which tries for two minutes.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(45);

/// `migrate` on the source, with the agent started in another way.
fn with_agent(scene: &Scene, remote_command: &str, more: &[&str]) -> Command {
    let mut command = scene.to_destination(more);
    command.env("MIGRATE_REMOTE_COMMAND", remote_command);
    command
}

/// An executable file of one host.
fn executable(host: &Host, path: &str, bytes: &[u8]) {
    let path = host.path(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

// ---- the target

#[test]
fn what_is_no_workload_is_refused() {
    require!("what_is_no_workload_is_refused": root, tcx, criu, migrate);
    let mut scene = Scene::start("target", Kind::Echo, 5);
    let to = |scene: &Scene, pid: &str| scene.migrate(&["--to", "host2", "--", pid]);

    let command = to(&scene, "999999");
    scene.fails(command, REFUSED, &["no process has PID 999999", "help: "]);
    let command = to(&scene, "1");
    scene.fails(command, REFUSED, &["PID 1 ", "init", "help: "]);
    let command = to(&scene, "-5");
    scene.fails(command, REFUSED, &["-5 is not a PID", "help: "]);
    let command = to(&scene, "0");
    scene.fails(command, REFUSED, &["0 is not a PID", "help: "]);

    // The command itself, and the shell that waits for it.
    let mut command = scene.source().command("sh");
    command.args(["-c", "exec migrate --to host2 $$"]);
    scene.fails(command, REFUSED, &["is this command itself", "help: "]);
    let mut command = scene.source().command("sh");
    command.args(["-c", "migrate --to host2 $$; exit $?"]);
    scene.fails(
        command,
        REFUSED,
        &["(sh) is an ancestor of this command", "help: "],
    );

    // A thread of the workload, and a process that has ended.
    let pid = scene.workload.pid;
    let threads = shell(&scene.source(), &format!("ls /proc/{pid}/task"));
    let thread = threads.lines().next_back().unwrap();
    assert_ne!(thread, pid.to_string());
    let command = to(&scene, thread);
    let words = format!("{thread} is a thread of process {pid}");
    scene.fails(command, REFUSED, &[&words, "help: "]);
    let zombie = "sleep 0 & exec sleep 1000";
    let parent = scene
        .source()
        .spawn_detached(["sh", "-c", zombie], "/dev/null")
        .unwrap();
    let mut child = String::new();
    let children = format!("cat /proc/{parent}/task/{parent}/children");
    let has_ended = eventually(Duration::from_secs(10), || {
        child = shell(&scene.source(), &children);
        !child.is_empty()
            && process_name(&scene.source(), parent) == "sleep"
            && !runs(&scene.source(), child.trim().parse().unwrap())
    });
    assert!(has_ended);
    let command = to(&scene, child.trim());
    scene.fails(command, REFUSED, &["has already ended", "help: "]);

    scene.moves_now();
}

/// No test host has kernel threads: the machine has.
#[test]
fn a_kernel_thread_is_refused() {
    require!("a_kernel_thread_is_refused": root, migrate);
    let name = fs::read_to_string("/proc/2/comm").unwrap_or_default();
    if name.trim() != "kthreadd" {
        println!("SKIP a_kernel_thread_is_refused: no kernel thread can be seen here");
        return;
    }
    let mut command = Command::new(program("migrate"));
    command.args(["check", "2"]);
    let ended = Running::start(command).finish();
    ended.expect(REFUSED, &["PID 2 (kthreadd) is a kernel thread", "help: "]);
}

#[test]
fn whoever_is_not_root_is_refused() {
    require!("whoever_is_not_root_is_refused": root, tcx, criu, migrate, setpriv);
    let mut scene = Scene::start("noroot", Kind::Echo, 5);
    let pid = scene.workload.pid.to_string();
    // The directory of the build may be closed to others.
    let bytes = fs::read(program("migrate")).unwrap();
    executable(&scene.source(), "/srv/migrate", &bytes);
    let mut command = scene.source().command("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command.args(["/srv/migrate", "--to", "host2", &pid]);
    scene.fails(command, USAGE, &["needs root", "help: ", "sudo"]);
    scene.moves_now();
}

/// Root, but for some rights.
#[test]
fn a_missing_right_is_named_and_missed_where_it_is_needed() {
    require!(
        "a_missing_right_is_named_and_missed_where_it_is_needed":
        root, tcx, criu, migrate, setpriv
    );
    let mut scene = Scene::start("rights", Kind::Echo, 5);
    let pid = scene.workload.pid.to_string();
    let at_source = |scene: &Scene, without: &str| {
        let mut command = scene.source().command("setpriv");
        command.args(["--bounding-set", without, "migrate", "--to", "host2", &pid]);
        command
    };
    let at_destination = |scene: &Scene, without: &str| {
        let mut command = scene.to_destination(&[]);
        let agent = format!("setpriv --bounding-set {without} migrate");
        command.env("MIGRATE_REMOTE_COMMAND", agent);
        command
    };
    for (without, lacks) in [
        (
            "-bpf",
            "lacks CAP_BPF: the gate's programs cannot be loaded",
        ),
        (
            "-net_raw",
            "lacks CAP_NET_RAW: an address cannot be announced",
        ),
        (
            "-checkpoint_restore",
            "lacks CAP_CHECKPOINT_RESTORE: a copy cannot have the PIDs it had",
        ),
    ] {
        for (side, command) in [
            ("source", at_source(&scene, without)),
            ("destination", at_destination(&scene, without)),
        ] {
            let rights = format!("rights on the {side}");
            scene.fails(command, REFUSED, &[&rights, lacks, "-> run as root"]);
        }
    }
    // Without this one the tree cannot even be looked at.
    let command = at_source(&scene, "-sys_ptrace");
    let words = ["Permission denied", "help: this root lacks CAP_SYS_PTRACE"];
    scene.fails(command, REFUSED, &words);
    // Needed for the processes of other users alone.
    let mut command = at_source(&scene, "-sys_resource");
    let agent = "setpriv --bounding-set -sys_resource migrate";
    command.env("MIGRATE_REMOTE_COMMAND", agent);
    let ended = Running::start(command).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    scene.has_moved();
    scene.unharmed();
}

#[test]
fn a_wrong_command_line_is_refused() {
    require!("a_wrong_command_line_is_refused": root, tcx, criu, migrate);
    let mut scene = Scene::start("usage", Kind::Echo, 5);
    let pid = scene.workload.pid.to_string();
    let pid = pid.as_str();
    for (arguments, words) in [
        (&["--to", "host2"][..], &["<PID>"][..]),
        (&[pid], &["--to"]),
        (&["--to", "host2", "redis"], &["redis", "<PID>"]),
        (&["--to", "host2", "--frob", pid], &["--frob"]),
        (
            &["--to", "host2", "--max-blackout", "0", pid],
            &["--max-blackout", "0.01"],
        ),
        (
            &["--to", "host2", "--stdio", "nowhere", pid],
            &["nowhere", "journal"],
        ),
        (
            &["--to", "host2", "--address", "10.77.0", pid],
            &["10.77.0", "--address"],
        ),
        (
            &["--to", "host2", "--goal", "102", pid],
            &["102", "0..=101"],
        ),
        (
            &["--to", "host2", "--goal", "most", pid],
            &["most", "--goal"],
        ),
        (
            &["--to", "host2", "--max-iterations", "0", pid],
            &["--max-iterations", "1..=1000"],
        ),
        (
            &["--to", "host2", "--timeout", "0", pid],
            &["--timeout", "0.01 and 3600"],
        ),
        (
            &["--to", "host2", "--timeout", "soon", pid],
            &["`soon` is no number of seconds"],
        ),
        (&["--to", "host2", "--downtime-limit", "-1", pid], &["-1"]),
        (
            &["--to", "host2", "--downtime-limit", "1s", pid],
            &["1s", "--downtime-limit"],
        ),
        (
            &["--to", "host2", "--on-timeout", "wait", pid],
            &["wait", "freeze, cancel"],
        ),
        (
            &["--to", "host2", "--streams", "0", pid],
            &["--streams", "1..=16"],
        ),
        (
            &["--to", "host2", "--streams", "17", pid],
            &["--streams", "1..=16"],
        ),
        (
            &["--to", "host2", "--compress", "zip", pid],
            &["zip", "auto, none, lz4"],
        ),
        (
            &["--to", "host2", "--bandwidth", "fast", pid],
            &["`fast` is no rate", "100M", "800Mbit"],
        ),
        (
            &["--to", "host2", "--bandwidth", "1K", pid],
            &["between 10K and 1000G"],
        ),
        (&["--to=-oProxyCommand=id", pid], &["`-oProxyCommand=id`"]),
        (
            &["--to", "host2:7000", pid],
            &[
                "host2:7000",
                "certificates",
                "help: add --ca, --cert and --key",
            ],
        ),
        (
            &["--to", "host2:7000", "--ca", "/srv/ca", pid],
            &["--cert and --key missing", "help: "],
        ),
    ] {
        let command = scene.migrate(arguments);
        let ended = Running::start(command).finish();
        ended.expect(USAGE, words);
    }
    scene.unharmed();
    scene.moves_now();
}

// ---- the way to the destination

#[test]
fn a_destination_out_of_reach_is_named() {
    require!("a_destination_out_of_reach_is_named": root, tcx, criu, migrate);
    let mut scene = Scene::start("reach", Kind::Echo, 5);
    let pid = scene.workload.pid.to_string();
    let to = |scene: &Scene, host: &str| scene.migrate(&["--to", host, &pid]);

    let command = to(&scene, "nosuchhost");
    let words = [
        "could not resolve the host name nosuchhost",
        "help: check the spelling",
    ];
    scene.fails(command, CONNECT, &words);
    let command = to(&scene, NOBODY);
    let words = ["10.77.0.99 cannot be reached", "help: ", "is up"];
    let ended = scene.fails(command, CONNECT, &words);
    assert!(ended.took < GIVEN_UP_WITHIN, "{:?}", ended.took);
    // The client host has no sshd.
    let command = to(&scene, "client");
    scene.fails(
        command,
        CONNECT,
        &["client refused the SSH connection", "help: start sshd"],
    );
    let command = to(&scene, "stranger");
    let words = ["SSH host key of stranger is not known", "help: log in once"];
    scene.fails(command, CONNECT, &words);
    let command = to(&scene, "nobody@host2");
    scene.fails(command, CONNECT, &["nobody@host2", "help: "]);
    scene.moves_now();
}

#[test]
fn a_silent_destination_is_given_up() {
    require!("a_silent_destination_is_given_up": root, tcx, criu, migrate, nft);
    let mut scene = Scene::start("silent", Kind::Echo, 5);
    let wall = "nft add table inet wall && \
                nft add chain inet wall input '{ type filter hook input priority 0; }' && \
                nft add rule inet wall input tcp dport";
    // Nothing answers on SSH's port.
    shell(&scene.destination(), &format!("{wall} 22 drop"));
    let command = scene.to_destination(&[]);
    let ended = scene.fails(command, CONNECT, &["host2", "help: "]);
    assert!(ended.took < GIVEN_UP_WITHIN, "{:?}", ended.took);
    shell(&scene.destination(), "nft delete table inet wall");

    // SSH gets through, the port beside it does not.
    shell(&scene.destination(), &format!("{wall} 1024-65535 drop"));
    let command = scene.to_destination(&[]);
    let words = [
        "could not connect to 10.77.0.12:",
        "help: a firewall",
        "migrate agent",
    ];
    let ended = scene.fails(command, CONNECT, &words);
    assert!(ended.took < GIVEN_UP_WITHIN, "{:?}", ended.took);
    shell(&scene.destination(), "nft delete table inet wall");
    scene.moves_now();
}

#[test]
fn another_agent_than_ours_is_refused() {
    require!("another_agent_than_ours_is_refused": root, tcx, criu, migrate);
    let mut scene = Scene::start("agent", Kind::Echo, 5);
    let destination = scene.destination();
    // What every release says first.
    let other = "#!/bin/sh\nread -r offer\n\
                 echo '{\"migrate_agent\":1,\"protocol\":9,\"release\":\"9.9.9\",\"later\":[]}'\n";
    executable(&destination, "/srv/other", other.as_bytes());
    let command = with_agent(&scene, "/srv/other", &[]);
    let words = [
        "host2",
        "release 9.9.9 (protocol 9)",
        "help: install the same release",
    ];
    scene.fails(command, CONNECT, &words);

    let command = with_agent(&scene, "/srv/none", &[]);
    let words = [
        "`/srv/none` was not found on host2",
        "help: install the same release",
    ];
    scene.fails(command, CONNECT, &words);

    // No agent at all: it does not know what it is asked for, or says nothing.
    let command = with_agent(&scene, "false", &[]);
    scene.fails(command, CONNECT, &["host2", "help: "]);
    let command = with_agent(&scene, "cat", &[]);
    scene.fails(command, CONNECT, &["host2", "help: "]);
    scene.moves_now();
}

// ---- what the destination has not

#[test]
fn a_taken_pid_is_named_with_its_holder() {
    require!("a_taken_pid_is_named_with_its_holder": root, tcx, criu, migrate);
    let mut scene = Scene::start("pid", Kind::Echo, 5);
    let (source, destination) = (scene.source(), scene.destination());
    let pid = scene.workload.pid;
    let threads = shell(&source, &format!("ls /proc/{pid}/task"));
    let thread: i32 = threads.lines().next_back().unwrap().parse().unwrap();
    for (taken, what) in [(pid, "pid"), (thread, "thread")] {
        // What starts there afterwards must not take the others.
        let sleeper = shell(
            &destination,
            &format!(
                "cd /proc/sys/kernel; read -r last <ns_last_pid; echo {} >ns_last_pid; \
                 sleep 1000 </dev/null >/dev/null 2>&1 & echo $last >ns_last_pid; echo $!",
                taken - 1
            ),
        );
        assert_eq!(sleeper, taken.to_string());
        // Until then it has the shell's name.
        assert!(eventually(Duration::from_secs(10), || process_name(
            &destination,
            taken
        ) == "sleep"));
        let command = scene.to_destination(&[]);
        let words = format!("{what} {taken}: is taken on the destination by sleep");
        let way_out = format!("-> end or restart PID {taken} there");
        scene.fails(command, REFUSED, &[&words, &way_out]);
        shell(&destination, &format!("kill -KILL {taken}"));
        assert!(eventually(Duration::from_secs(10), || !destination
            .path(format!("/proc/{taken}"))
            .exists()));
    }
    scene.moves_now();
}

#[test]
fn a_file_that_differs_is_named() {
    require!("a_file_that_differs_is_named": root, tcx, criu, migrate);
    const SERVER: &str = "/srv/app/echo-server";
    let lab = scoped("files");
    let (host1, host2) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let bytes = fs::read(program("echo-server")).unwrap();
    executable(&host1, SERVER, &bytes);
    let address = Kind::Echo.address().to_string();
    let mut scene = Scene::start_program(lab, Kind::Echo, [SERVER, &address], 5);
    let subject = format!("file {SERVER}");

    let command = scene.to_destination(&[]);
    let words = [
        &*subject,
        "does not exist on the destination",
        "-> put it there",
    ];
    scene.fails(command, REFUSED, &words);

    executable(&host2, SERVER, &bytes[..bytes.len() - 4096]);
    let command = scene.to_destination(&[]);
    let size = format!(
        "has {} bytes here and {} on",
        bytes.len() - 4096,
        bytes.len()
    );
    scene.fails(command, REFUSED, &[&subject, &size, "-> make them alike"]);

    let mut other = bytes.clone();
    let build_id = build_id_at(&bytes).expect("the echo server has a build-id");
    other[build_id] ^= 0xff;
    executable(&host2, SERVER, &other);
    let command = scene.to_destination(&[]);
    let words = [
        &*subject,
        "is another build here",
        "-> install the same version",
    ];
    scene.fails(command, REFUSED, &words);

    executable(&host2, SERVER, &bytes);
    shell(&host2, &format!("chmod 0700 {SERVER}"));
    let command = scene.to_destination(&[]);
    let words = [&*subject, "has mode 0700 here and 0755 on", "chmod 0755"];
    scene.fails(command, REFUSED, &words);

    shell(&host2, &format!("chmod 0755 {SERVER}"));
    scene.moves_now();
}

/// Where the bytes of an ELF file's build-id begin.
fn build_id_at(elf: &[u8]) -> Option<usize> {
    // Name of 4 bytes, description of 20, type NT_GNU_BUILD_ID.
    const NOTE: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let note = elf.windows(NOTE.len()).position(|bytes| bytes == NOTE)?;
    Some(note + NOTE.len())
}

#[test]
fn the_hosts_own_address_stays() {
    require!("the_hosts_own_address_stays": root, tcx, criu, migrate);
    let mut scene = Scene::start("address", Kind::Echo, 5);
    let source = scene.source();
    // A second server beside the workload: its address is the host's own.
    let own = format!("{}:7100", source.ipv4());
    let server = program("echo-server");
    let argv = [server.as_os_str(), own.as_ref()];
    let pid = source.spawn_detached(argv, "/dev/null").unwrap();
    let listening = eventually(Duration::from_secs(20), || listens(&source, 7100));
    assert!(listening);
    let client = ["echo", "--addr", &own, "--connections", "3"];
    let host = scene.lab.host(HostName::Client);
    let mut client = migrate_tests::client::StrictClient::start(&host, client).unwrap();

    let pid = pid.to_string();
    let command = scene.migrate(&["--to", "host2", &pid]);
    let words = ["address 10.77.0.11", "-> ", "ip address add", "--address"];
    scene.fails(command, REFUSED, &words);
    migrate_tests::migration::serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());
    scene.moves_now();
}

#[test]
fn a_criu_that_is_missing_or_too_old_is_named() {
    require!("a_criu_that_is_missing_or_too_old_is_named": root, tcx, criu, migrate);
    let mut scene = Scene::start("criu", Kind::Echo, 5);
    let old = b"#!/bin/sh\necho Version: 3.17.1\n";
    for host in [scene.source(), scene.destination()] {
        executable(&host, "/srv/old/criu", old);
    }
    for (path, why) in [
        ("/srv/old/criu", "is 3.17.1, 4.2 or newer is needed"),
        ("/srv/none/criu", "does not exist"),
    ] {
        let reason = format!("{path}, which {why}");
        let mut command = scene.to_destination(&[]);
        command.env("MIGRATE_CRIU", path);
        let words = ["criu on the source: ", &reason, "-> "];
        let ended = scene.fails(command, REFUSED, &words);
        assert!(!ended.text().contains("was not found"), "{ended:#?}");

        let command = with_agent(&scene, &format!("env MIGRATE_CRIU={path} migrate"), &[]);
        let words = ["criu on the destination: ", &reason, "-> "];
        let ended = scene.fails(command, REFUSED, &words);
        assert!(!ended.text().contains("was not found"), "{ended:#?}");
    }
    scene.moves_now();
}

/// What preflight has heard about the destination is not so: the kernel there has
/// less than it said, and that comes out when it is needed.
#[test]
fn a_kernel_that_has_less_than_it_said_gives_the_tree_back() {
    require!("a_kernel_that_has_less_than_it_said_gives_the_tree_back": root, tcx, criu, migrate);
    let mut scene = Scene::start("lesser", Kind::Echo, 5);
    let lesser = program("lesser-kernel").display().to_string();
    for (lacks, more, words) in [
        ("bpf", &[][..], &["could not load the gate"][..]),
        (
            "userfaultfd",
            &["--restore", "lazy"],
            &["memory cannot arrive while the copy runs here"],
        ),
        // CRIU keeps what a kernel has said, and believes it.
        ("clone3", &[], &["criu"]),
    ] {
        let command = with_agent(&scene, &format!("{lesser} {lacks} migrate"), more);
        let mut words = words.to_vec();
        words.extend(["host2", "Function not implemented"]);
        scene.fails(command, ROLLED_BACK, &words);
    }
    // Where it can do without, it does.
    let command = with_agent(&scene, &format!("{lesser} userfaultfd migrate"), &[]);
    let ended = Running::start(command).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    scene.has_moved();
    scene.unharmed();
    scene.moves_now();
}

#[test]
fn a_small_tmpfs_is_refused_in_time() {
    require!("a_small_tmpfs_is_refused_in_time": root, tcx, criu, migrate);
    let mut scene = Scene::start("small", Kind::Echo, 5);
    let mount = "mkdir -p /srv/img && mount -t tmpfs -o size=4m tmpfs /srv/img";
    shell(&scene.destination(), mount);
    let command = with_agent(&scene, "env MIGRATE_IMAGE_DIR=/srv/img migrate", &[]);
    let words = [
        "image space: the images need",
        "4 MiB are free",
        "-> ",
        "remount",
    ];
    scene.fails(command, REFUSED, &words);
    shell(&scene.destination(), "mount -o remount,size=64m /srv/img");
    let command = with_agent(&scene, "env MIGRATE_IMAGE_DIR=/srv/img migrate", &[]);
    let ended = Running::start(command).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    scene.has_moved();
    scene.unharmed();
    assert_eq!(shell(&scene.source(), "ls -A /srv/img"), "");
}

// ---- on the way

/// A redis that takes long enough to dump for something to happen meanwhile.
fn big_redis(test: &str) -> Scene {
    let mut scene = Scene::start(test, Kind::Redis, 5);
    let fill = "redis-benchmark -h 10.77.0.100 -t set -r 100000 -n 100000 -d 700 -P 100 -c 10 -q";
    shell(&scene.lab.host(HostName::Client), fill);
    scene.serves_here();
    scene
}

#[test]
fn a_tmpfs_that_fills_up_rolls_back() {
    require!("a_tmpfs_that_fills_up_rolls_back": root, tcx, criu, migrate, redis);
    let mut scene = big_redis("full");
    let destination = scene.destination();
    let mount = "mkdir -p /srv/img && mount -t tmpfs -o size=256m tmpfs /srv/img";
    shell(&destination, mount);
    let remote = "env MIGRATE_IMAGE_DIR=/srv/img migrate";
    let command = with_agent(&scene, remote, &["--json"]);
    let (running, held) = scene.held_at(command, Phase::Freeze);
    // Checked, and not yet used.
    let full = "dd if=/dev/zero of=/srv/img/filler bs=1M 2>/dev/null; test -s /srv/img/filler";
    shell(&destination, full);
    drop(held);
    let ended = running.finish();
    ended.expect(
        ROLLED_BACK,
        &["on host2: ", "/srv/img", "No space left on device"],
    );
    scene.serves_here();
    shell(&destination, "rm /srv/img/filler");
    scene.unharmed();
    assert_eq!(shell(&destination, "ls -A /srv/img"), "");

    let ended = Running::start(with_agent(&scene, remote, &[])).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    scene.has_moved();
    scene.unharmed();
    assert!(scene.client.stop().unwrap().is_clean());
}

#[test]
fn a_lost_agent_rolls_back() {
    require!("a_lost_agent_rolls_back": root, tcx, criu, migrate, redis);
    let mut scene = big_redis("agentdies");
    for (phase, signal) in [
        (Phase::Prepare, Signal::SIGKILL),
        (Phase::Dump, Signal::SIGKILL),
        (Phase::Dump, Signal::SIGTERM),
        (Phase::Restore, Signal::SIGKILL),
    ] {
        let destination = scene.destination();
        let command = scene.to_destination(&["--json"]);
        let (running, held) = match phase {
            Phase::Dump => scene.in_dump(command),
            _ => scene.held_at(command, phase),
        };
        kill(agent(&destination), signal).unwrap();
        drop(held);
        let ended = running.finish();
        ended.expect(ROLLED_BACK, &["host"]);
        scene.serves_here();
        clean(&scene.source());
        let left = leftovers(&destination);
        println!("{phase}, {signal}: the agent left {} things", left.len());
        if signal == Signal::SIGTERM {
            clean(&destination);
        }
        // Whatever a dead agent has left, the next one clears.
        scene.moves();
    }
    scene.moves_now();
}

#[test]
fn an_agent_lost_before_the_copy_runs_gives_the_tree_back() {
    require!("an_agent_lost_before_the_copy_runs_gives_the_tree_back": root, tcx, criu, migrate);
    let mut scene = Scene::start("owned", Kind::Echo, 5);
    let destination = scene.destination();
    let remote = "env MIGRATE_STOP_AT=restored migrate";
    let running = Running::start(with_agent(&scene, remote, &["--json"]));
    let agent = agent(&destination);
    // The copy is complete, and is owned only when CRIU cannot take a word.
    let restored = Held::by_itself(agent);
    assert!(runs(&destination, scene.workload.pid));
    // Its memory is there, and nothing of it in swap.
    for (host, process) in [
        (scene.source(), driver(&scene.source())),
        (destination.clone(), agent),
    ] {
        if migrate_memory::unswapped(None).is_ok() {
            let mounts = image_mounts(&host);
            assert_eq!(mounts.len(), 1, "{mounts:?} on {}", host.name());
            assert!(mounts[0].contains("noswap"), "{mounts:?}");
        }
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
        assert_ne!(locked.unwrap().trim(), "0 kB", "{status}");
    }
    let criu = criu_of(agent);
    let held = Held::stop(criu);
    drop(restored);
    let owned = eventually(UNDONE_WITHIN, || {
        shell(&destination, "cat /run/migrate/journal/*.json").contains("\"owned\"")
    });
    assert!(owned, "the destination has it on record");
    kill(agent, Signal::SIGKILL).unwrap();
    kill(criu, Signal::SIGKILL).unwrap();
    drop(held);

    // Its connections are all as CRIU builds them: it has never run.
    let ended = running.finish();
    ended.expect(ROLLED_BACK, &["host2 closed the connection"]);
    scene.unharmed();
    scene.moves_now();
}

#[test]
fn a_killed_migrate_lets_the_source_run() {
    require!("a_killed_migrate_lets_the_source_run": root, tcx, criu, migrate, redis);
    let mut scene = big_redis("sourcedies");
    for phase in [
        Phase::Preflight,
        Phase::Track,
        Phase::Prepare,
        Phase::Freeze,
        Phase::Dump,
        Phase::Restore,
    ] {
        let (source, destination) = (scene.source(), scene.destination());
        let mut command = scene.to_destination(&["--json"]);
        // It waits for its end there; the first phase begins before it connects.
        if phase != Phase::Preflight {
            command.env("MIGRATE_STOP_AT", phase.name());
        }
        let mut running = Running::start(command);
        assert!(running.await_event(|event| event["event"] == "connected"));
        let driver = driver(&source);
        // What it says last may not have come out.
        assert!(phase == Phase::Preflight || eventually(UNDONE_WITHIN, || is_stopped(driver)));
        kill(driver, Signal::SIGKILL).unwrap();
        let ended = running.finish();
        assert!(!ended.status.success(), "{phase} was over: {ended:#?}");
        scene.serves_here();
        // The agent hears of it; the source's host learns by the next command.
        clean(&destination);
        let left = leftovers(&source);
        println!("{phase}: a killed migrate left {} things", left.len());
        scene.moves();
    }
    scene.moves_now();
}

#[test]
fn an_interrupt_rolls_back_in_every_phase() {
    require!("an_interrupt_rolls_back_in_every_phase": root, tcx, criu, migrate, redis);
    let mut scene = big_redis("interrupt");
    for phase in [
        Phase::Preflight,
        Phase::Track,
        Phase::Prepare,
        Phase::Freeze,
        Phase::Dump,
        Phase::Restore,
    ] {
        let mut hits = 0;
        let signals = [Signal::SIGINT, Signal::SIGTERM];
        for signal in signals {
            let interrupt = || {
                let driver = driver(&scene.source());
                match signal {
                    // A terminal sends it to all that the command has started.
                    Signal::SIGINT => killpg(getpgid(Some(driver)).unwrap(), signal).unwrap(),
                    _ => kill(driver, signal).unwrap(),
                }
            };
            let command = scene.to_destination(&["--json"]);
            let running = match phase {
                // At once: the command has not come far.
                Phase::Preflight => {
                    let mut running = Running::start(command);
                    assert!(running.await_started(phase));
                    interrupt();
                    running
                }
                Phase::Dump => {
                    let (running, held) = scene.in_dump(command);
                    interrupt();
                    drop(held);
                    running
                }
                _ => {
                    let (running, held) = scene.held_at(command, phase);
                    interrupt();
                    drop(held);
                    running
                }
            };
            let interrupted = Instant::now();
            let ended = running.finish();
            if ended.status.success() {
                // The commit was faster.
                scene.has_moved();
            } else {
                ended.expect(INTERRUPTED, &["interrupted"]);
                assert!(interrupted.elapsed() < GIVEN_UP_WITHIN, "{ended:#?}");
                let events = ended.events();
                let failed = events.iter().find(|event| event["event"] == "failure");
                let failed = failed.expect("a failure in the events");
                assert_eq!(failed["outcome"], "rolled_back", "{ended:#?}");
                assert_eq!(failed["leftovers"], serde_json::json!([]), "{ended:#?}");
                hits += i32::from(failed["phase"] == serde_json::to_value(phase).unwrap());
            }
            scene.unharmed();
        }
        println!("interrupted in {phase}: {hits} of {}", signals.len());
        if matches!(phase, Phase::Preflight | Phase::Dump) {
            assert!(hits > 0, "{phase} was never hit");
        }
    }
    scene.moves_now();
}

/// A terminal's Ctrl-C may end ssh in the moment before it has a process group of its own.
#[test]
fn an_interrupt_is_not_taken_for_an_unreachable_host() {
    require!("an_interrupt_is_not_taken_for_an_unreachable_host": root, tcx, criu, migrate);
    const SSH: &str = "\
        case \" $* \" in *' -G '*) exit 0;; esac\n\
        (while kill -0 $$; do :; done; kill -INT $PPID) </dev/null >/dev/null 2>&1 &\n\
        kill -INT $$\n";
    let mut scene = Scene::start("early", Kind::Echo, 5);
    let script = |text: &str| format!("#!/bin/sh\n{text}");
    let to_it = |scene: &Scene| {
        let mut command = scene.to_destination(&["--json"]);
        command.env("PATH", "/run/early:/usr/sbin:/usr/bin:/sbin:/bin");
        command
    };
    // The driver hears of it when ssh has ended.
    executable(&scene.source(), "/run/early/ssh", script(SSH).as_bytes());
    let ended = Running::start(to_it(&scene)).finish();
    ended.expect(INTERRUPTED, &["interrupted"]);
    scene.unharmed();
    // Another signal, to ssh alone, is what ended ssh.
    let killed = script("kill -KILL $$\n");
    executable(&scene.source(), "/run/early/ssh", killed.as_bytes());
    let ended = Running::start(to_it(&scene)).finish();
    ended.expect(CONNECT, &["ssh to host2 ended with signal: 9"]);
    scene.unharmed();
    fs::remove_dir_all(scene.source().path("/run/early")).unwrap();
    scene.moves_now();
}

#[test]
fn a_cut_network_rolls_back_in_bounded_time() {
    require!("a_cut_network_rolls_back_in_bounded_time": root, tcx, criu, migrate, redis, nft);
    let mut scene = big_redis("cut");
    let destination = scene.destination();
    let (running, held) = scene.in_dump(scene.to_destination(&["--json", "--max-blackout", "2"]));
    let cut = Instant::now();
    shell(
        &destination,
        "nft add table inet wall && \
         nft add chain inet wall input '{ type filter hook input priority 0; policy drop; }' && \
         nft add chain inet wall output '{ type filter hook output priority 0; policy drop; }'",
    );
    drop(held);
    let ended = running.finish();
    let took = cut.elapsed();
    ended.expect(
        ROLLED_BACK,
        &["more than 2000 ms", "\"phase\":\"dump\"", "--max-blackout"],
    );
    // What has come before the cut may be a copy by now, which will never run.
    scene.serves_on();
    clean(&scene.source());
    println!("{took:?} from the cut to the end of the command");
    assert!(took < GIVEN_UP_WITHIN, "{took:?}");
    let worst = scene.client.snapshot().unwrap();
    println!("{worst:?}");

    shell(&destination, "nft delete table inet wall");
    let mut left = Vec::new();
    let undone = eventually(UNDONE_WITHIN, || {
        left = leftovers(&destination);
        left.is_empty()
    });
    assert!(undone, "{left:?}");
    scene.serves_here();
    scene.moves_now();
}

#[test]
fn one_tree_is_moved_once_at_a_time() {
    require!("one_tree_is_moved_once_at_a_time": root, tcx, criu, migrate);
    let mut scene = Scene::start("twice", Kind::Echo, 5);
    // It holds the tree for as long as it lives, here by standing still.
    let (first, held) = scene.held_at(scene.to_destination(&["--json"]), Phase::Track);
    let second = Running::start(scene.to_destination(&[])).finish();
    drop(held);
    let words = format!("process {} is being migrated already", scene.workload.pid);
    second.expect(REFUSED, &[&words, "help: `migrate status`"]);
    let first = first.finish();
    assert_eq!(first.status.code(), Some(0), "{first:#?}");
    scene.has_moved();
    scene.unharmed();
    scene.moves_now();
}

/// A process that leads a session and listens, with this PID where one is given.
fn listener(host: &Host, pid: Option<i32>, address: &str, port: u16) -> i32 {
    let counter = pid.map_or_else(String::new, |pid| {
        format!("echo {} >/proc/sys/kernel/ns_last_pid;", pid - 1)
    });
    let script = format!(
        "import socket; s = socket.create_server(('{address}', {port})); \
         [c.close() for c, _ in iter(s.accept, None)]"
    );
    let started = shell(
        host,
        &format!(
            "cd /; {counter} setsid /usr/bin/python3 -c \"{script}\" </dev/null >/dev/null 2>&1 & echo $!"
        ),
    );
    let started: i32 = started.parse().unwrap();
    assert!(
        pid.is_none_or(|pid| pid == started),
        "{pid:?}, not {started}"
    );
    let up = eventually(UNDONE_WITHIN, || listens(host, port));
    assert!(up, "{started} does not listen on {}", host.name());
    started
}

#[test]
fn who_wants_what_another_has_claimed_waits() {
    require!("who_wants_what_another_has_claimed_waits": root, tcx, criu, migrate);
    const ADDRESS: &str = "10.77.0.150";
    let mut scene = Scene::start("claims", Kind::Echo, 5);
    let third = scene.lab.host(HostName::Client);
    let (source, destination) = (scene.source(), scene.destination());
    standing::certify(&scene.lab, &HostName::ALL);
    let _agent = standing::start(&destination);
    let moving = |from: &Host, pid: i32| {
        let mut command = from.command("migrate");
        command.args(standing::words(from.name(), destination.name()));
        command.arg(pid.to_string());
        command
    };
    // Held when the destination is ready for it, and nothing of it is there yet.
    let hold = |pid: i32| {
        let mut command = moving(&source, pid);
        command.env("MIGRATE_STOP_AT", "precopy");
        let running = Running::start(command);
        (running, Held::by_itself(driver(&source)))
    };
    let refused = |from: &Host, pid: i32, what: &str, by: &str| {
        let ended = Running::start(moving(from, pid)).finish();
        let words = format!("{what}: is claimed by {by}, which is on its way here from host1");
        ended.expect(REFUSED, &[&words, "wait until that migration has ended"]);
        assert!(runs(from, pid), "{pid} runs on {}", from.name());
    };
    let commits = |(running, held): (Running, Held), pid: i32| {
        drop(held);
        let ended = running.finish();
        assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
        assert!(runs(&destination, pid) && !runs(&source, pid));
    };

    for host in [&source, &third] {
        shell(host, &format!("ip address add {ADDRESS}/24 dev eth0"));
    }
    let first = listener(&source, None, ADDRESS, 7150);
    let second = listener(&third, None, ADDRESS, 7151);
    let held = hold(first);
    refused(&third, second, &format!("address {ADDRESS}"), "python3");
    commits(held, first);

    let pid = scene.workload.pid;
    let held = hold(pid);
    let second = listener(&third, Some(pid), "127.0.0.1", 7152);
    refused(&third, second, &format!("pid {pid}"), "echo-server");
    let port = scene.workload.kind.address().port();
    let second = listener(&third, None, "0.0.0.0", port);
    refused(&third, second, &format!("port {port}"), "echo-server");
    commits(held, pid);
    scene.has_moved();
    scene.unharmed();
    scene.moves_now();
}

/// Before the driver's own last look, and behind it: CRIU is about to take
/// whoever has the PID.
#[test]
fn another_process_under_the_same_pid_is_left_alone() {
    require!("another_process_under_the_same_pid_is_left_alone": root, tcx, criu, migrate);
    let lab = scoped("reused");
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let mut pid = listener(&source, None, "127.0.0.1", 7150);
    let moving = |pid: i32| {
        let mut command = source.command("migrate");
        command.args(["--to", destination.name().as_str(), &pid.to_string()]);
        command
    };
    for moment in ["freeze", "loaded"] {
        let mut command = moving(pid);
        command.env("MIGRATE_STOP_AT", moment);
        let running = Running::start(command);
        let held = Held::by_itself(driver(&source));
        shell(&source, &format!("kill -KILL {pid}"));
        let gone = || !source.path(format!("/proc/{pid}")).exists();
        assert!(eventually(UNDONE_WITHIN, gone));
        assert_eq!(listener(&source, Some(pid), "127.0.0.1", 7151), pid);
        drop(held);
        let words = format!("process {pid} is not the one that was checked");
        running.finish().expect(ROLLED_BACK, &[&words]);
        for host in [&source, &destination] {
            clean(host);
        }
        // It runs, and does what it is asked.
        let asked = "import socket; socket.create_connection(('127.0.0.1', 7151)).recv(1)";
        shell(&source, &format!("/usr/bin/python3 -c \"{asked}\""));
        shell(&source, &format!("kill -KILL {pid}"));
        assert!(eventually(UNDONE_WITHIN, gone));
        pid = listener(&source, None, "127.0.0.1", 7150);
    }
    let ended = Running::start(moving(pid)).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    assert!(runs(&destination, pid) && !runs(&source, pid));
}
