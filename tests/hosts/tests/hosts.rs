//! The hosts are what they say, and nothing of them outlives `down`.

#![allow(
    clippy::unwrap_used,
    reason = "the helpers of tests may give up as tests do"
)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use migrate_test_hosts::{Error, HostName, Lab, WORKLOAD_V4, WORKLOAD_V6};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// For whatever the system does on its own after a system call has returned.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// The rest of the test, only as root.
macro_rules! require_root {
    ($test:literal) => {
        if !geteuid().is_root() {
            println!(concat!("SKIP ", $test, ": needs root"));
            return;
        }
    };
}

/// A name that no other test, and no other run of it, has.
fn lab_name(test: &str) -> String {
    format!("{test}-{}", std::process::id())
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SETTLE_WITHIN;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} within {SETTLE_WITHIN:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a lab must not leave: processes with its name or in its namespaces, mounts, files, cgroups.
#[derive(Debug, PartialEq)]
struct Traces {
    processes: Vec<String>,
    mounts: Vec<String>,
    files: Vec<String>,
    cgroups: Vec<String>,
}

impl Traces {
    const NONE: Self = Self {
        processes: vec![],
        mounts: vec![],
        files: vec![],
        cgroups: vec![],
    };

    fn of(lab: &str, namespaces: &Namespaces) -> Self {
        let mut processes = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            if pid == std::process::id() {
                continue;
            }
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            // Whoever reaps the orphans of the machine has not come by yet.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat
                .rsplit_once(") ")
                .is_none_or(|(_, after)| after.starts_with('Z'))
            {
                continue;
            }
            let inside = !namespaces_of(pid).is_disjoint(&namespaces.names);
            if line.contains(lab) || inside {
                processes.push(format!("{pid} {line}"));
            }
        }
        let matching = |text: &str| {
            text.lines()
                .filter(|line| line.contains(lab))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let cgroups = matching(
            &mountinfo
                .lines()
                .filter(|l| l.contains(" - cgroup2 "))
                .fold(String::new(), |text, line| {
                    let mount = line.split(' ').nth(4).unwrap();
                    let labs = fs::read_dir(format!("{mount}/migrate-hosts"));
                    labs.into_iter()
                        .flatten()
                        .flatten()
                        .fold(text, |text, entry| {
                            text + &format!("{}\n", entry.path().display())
                        })
                }),
        );
        let files = fs::read_dir("/run/migrate-hosts")
            .into_iter()
            .flatten()
            .flatten();
        Self {
            processes,
            mounts: matching(&mountinfo),
            files: files
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .filter(|name| name.contains(lab))
                .collect(),
            cgroups,
        }
    }
}

const NAMESPACE_KINDS: [&str; 6] = ["mnt", "net", "uts", "ipc", "pid", "cgroup"];

/// The numbers of a process's namespaces, as `lsns` shows them.
fn namespaces_of(pid: u32) -> BTreeSet<String> {
    NAMESPACE_KINDS
        .iter()
        .filter_map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect()
}

/// The namespaces of a lab's hosts that are not the machine's.
struct Namespaces {
    names: BTreeSet<String>,
    /// Keeps their numbers from being given to the namespaces of another test.
    _held: Vec<File>,
}

impl Namespaces {
    fn of(lab: &Lab) -> Self {
        let own = namespaces_of(std::process::id());
        let mut names = BTreeSet::new();
        let mut held = Vec::new();
        for host in HostName::ALL {
            let init = lab.host(host).init_pid().cast_unsigned();
            names.extend(namespaces_of(init).difference(&own).cloned());
            let kinds = NAMESPACE_KINDS.iter();
            held.extend(kinds.flat_map(|kind| File::open(format!("/proc/{init}/ns/{kind}"))));
        }
        Self { names, _held: held }
    }
}

#[test]
fn up_twice_is_up_once() {
    require_root!("up_twice_is_up_once");
    let name = lab_name("twice");
    let first = Lab::scoped(&name).unwrap();
    let second = Lab::up(&name).unwrap();
    let attached = Lab::attach(&name).unwrap();
    for host in HostName::ALL {
        assert_eq!(first.host(host).init_pid(), second.host(host).init_pid());
        assert_eq!(first.host(host).init_pid(), attached.host(host).init_pid());
    }
}

#[test]
fn many_ups_at_once_make_one_lab() {
    require_root!("many_ups_at_once_make_one_lab");
    let name = lab_name("race");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let name = name.clone();
            std::thread::spawn(move || Lab::up(&name).unwrap().host(HostName::Host1).init_pid())
        })
        .collect();
    let inits: BTreeSet<_> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    Lab::down(&name).unwrap();
    assert_eq!(inits.len(), 1, "{inits:?}");
}

#[test]
fn a_lab_that_lost_a_part_is_made_anew() {
    require_root!("a_lab_that_lost_a_part_is_made_anew");
    let name = lab_name("half");
    let lab = Lab::scoped(&name).unwrap();
    let init = lab.host(HostName::Host2).init_pid();
    kill(Pid::from_raw(init), Signal::SIGKILL).unwrap();
    eventually("a killed host is missed", || {
        matches!(Lab::attach(&name), Err(Error::NotUp { .. }))
    });
    let error = Lab::attach(&name).unwrap_err();
    assert!(
        error
            .help()
            .unwrap()
            .contains(&format!("scripts/hosts up --lab {name}"))
    );

    let healed = Lab::up(&name).unwrap();
    assert_ne!(healed.host(HostName::Host2).init_pid(), init);
    assert_eq!(
        stdout(&healed.host(HostName::Host2).exec(["hostname"]).unwrap()),
        "host2"
    );

    // Without its sshd a machine is only half a machine.
    let host1 = healed.host(HostName::Host1);
    stdout(
        &host1
            .exec(["sh", "-c", "kill $(cat /run/sshd.pid)"])
            .unwrap(),
    );
    eventually("sshd ends", || !host1.path("/run/sshd.pid").exists());
    let healed = Lab::up(&name).unwrap();
    assert!(healed.host(HostName::Host1).path("/run/sshd.pid").exists());
}

#[test]
fn every_host_is_a_machine_of_its_own() {
    require_root!("every_host_is_a_machine_of_its_own");
    let lab = Lab::scoped(&lab_name("own")).unwrap();
    for name in HostName::ALL {
        let host = lab.host(name);
        assert_eq!(stdout(&host.exec(["hostname"]).unwrap()), name.as_str());
        assert_eq!(
            stdout(&host.exec(["cat", "/etc/hostname"]).unwrap()),
            name.as_str()
        );
        let init = stdout(&host.exec(["cat", "/proc/1/cmdline"]).unwrap());
        assert!(init.starts_with("migrate-host-init\0own-"), "{init}");
        // Its memory-backed directories, and what is written there, are its own.
        for directory in ["/run", "/srv", "/dev/shm"] {
            let kind = host.exec(["stat", "-f", "-c", "%T", directory]).unwrap();
            assert_eq!(stdout(&kind), "tmpfs", "{directory}");
        }
        stdout(
            &host
                .exec(["sh", "-c", "test ! -e /srv/here && echo > /srv/here"])
                .unwrap(),
        );
        // What is pinned there goes with the host.
        stdout(
            &host
                .exec(["sh", "-c", "test ! -e /sys/fs/bpf/d && mkdir /sys/fs/bpf/d"])
                .unwrap(),
        );
        // It sees its own interfaces only, and no way out.
        let interfaces = stdout(&host.exec(["ls", "/sys/class/net"]).unwrap());
        assert_eq!(interfaces, "eth0\nlo");
        assert_eq!(
            stdout(&host.exec(["ip", "route", "show", "default"]).unwrap()),
            ""
        );
        // The cgroups are as on a machine.
        let cgroups = stdout(&host.exec(["cat", "/proc/self/cgroup"]).unwrap());
        assert!(
            cgroups.lines().all(|line| !line.contains("..")),
            "{cgroups}"
        );
    }
    assert!(!Path::new("/srv/here").exists() && !Path::new("/sys/fs/bpf/d").exists());
    let namespaces = Namespaces::of(&lab);
    assert!(namespaces.names.len() >= 3 * 5, "{:?}", namespaces.names);
}

#[test]
fn the_hosts_reach_each_other() {
    require_root!("the_hosts_reach_each_other");
    let lab = Lab::scoped(&lab_name("reach")).unwrap();
    let host1 = lab.host(HostName::Host1);
    let addresses: [SocketAddr; 4] = [
        (HostName::Host1.ipv4(), 7777).into(),
        (HostName::Host1.ipv6(), 7777).into(),
        (WORKLOAD_V4, 7777).into(),
        (WORKLOAD_V6, 7777).into(),
    ];
    let listener = host1
        .in_network(|| TcpListener::bind("[::]:7777").unwrap())
        .unwrap();
    for name in [HostName::Client, HostName::Host2] {
        for address in addresses {
            let stream = lab
                .host(name)
                .in_network(|| TcpStream::connect_timeout(&address, SETTLE_WITHIN));
            let mut stream = stream.unwrap().unwrap();
            stream.write_all(b"x").unwrap();
            let (mut accepted, from) = listener.accept().unwrap();
            accepted.read_exact(&mut [0]).unwrap();
            let expected = match address {
                SocketAddr::V4(_) => name.ipv4().to_string(),
                SocketAddr::V6(_) => name.ipv6().to_string(),
            };
            assert_eq!(from.ip().to_canonical().to_string(), expected);
        }
    }
    // The workload's address is a second one: the host's own connections come from its own.
    let listener = lab
        .host(HostName::Host2)
        .in_network(|| TcpListener::bind("[::]:7778").unwrap())
        .unwrap();
    for (to, own) in [
        (
            SocketAddr::from((HostName::Host2.ipv4(), 7778)),
            HostName::Host1.ipv4().to_string(),
        ),
        (
            SocketAddr::from((HostName::Host2.ipv6(), 7778)),
            HostName::Host1.ipv6().to_string(),
        ),
    ] {
        let _stream = host1
            .in_network(|| TcpStream::connect(to).unwrap())
            .unwrap();
        let (_, from) = listener.accept().unwrap();
        assert_eq!(from.ip().to_canonical().to_string(), own);
    }
}

#[test]
fn ssh_asks_nothing_and_trusts_no_stranger() {
    use HostName::{Client, Host1, Host2};
    require_root!("ssh_asks_nothing_and_trusts_no_stranger");
    let lab = Lab::scoped(&lab_name("ssh")).unwrap();
    let ssh = |from: HostName, to: &str, command: &str| {
        lab.host(from)
            .exec(["ssh", "-o", "BatchMode=yes", to, command])
            .unwrap()
    };
    for (from, to, expected) in [
        (Host1, "host2", "host2"),
        (Host2, "host1", "host1"),
        (Client, "root@host1", "host1"),
        (Client, "10.77.0.12", "host2"),
        (Host1, "fd77::12", "host2"),
        (Host1, "host2-6", "host2"),
    ] {
        assert_eq!(
            stdout(&ssh(from, to, "hostname")),
            expected,
            "{from} to {to}"
        );
    }
    let refused = ssh(Host1, "stranger", "hostname");
    assert_eq!(refused.status.code(), Some(255));
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(
        message.contains("Host key verification failed"),
        "{message}"
    );

    // `migrate` is first on the path of every session.
    for command in ["echo $PATH", "bash -lc 'echo $PATH'"] {
        let path = stdout(&ssh(Host1, "host2", command));
        assert!(
            path.split(':')
                .any(|directory| directory == "/usr/local/sbin"),
            "{path}"
        );
    }
    let link = stdout(&ssh(Host1, "host2", "readlink /usr/local/sbin/migrate"));
    assert!(
        link.ends_with("/migrate") || std::env::var("MIGRATE_BIN").is_ok(),
        "{link}"
    );
    let tty = lab
        .host(Host1)
        .exec(["ssh", "-tt", "host2", "tty"])
        .unwrap();
    assert_eq!(stdout(&tty), "/dev/pts/0");
}

#[test]
fn a_command_ends_as_its_program_does() {
    require_root!("a_command_ends_as_its_program_does");
    let lab = Lab::scoped(&lab_name("ends")).unwrap();
    let host = lab.host(HostName::Host1);
    assert_eq!(
        host.exec(["sh", "-c", "exit 7"]).unwrap().status.code(),
        Some(7)
    );
    assert_eq!(
        host.exec(["no-such-program"]).unwrap().status.code(),
        Some(127)
    );
    let killed = host.exec(["sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(killed.status.signal(), Some(libc::SIGTERM));

    // The streams, the directory and the environment are the program's.
    let mut child = host
        .command("sh")
        .args(["-c", "read line; echo \"$line $KEY $PWD\"; sleep 1000"])
        .env("KEY", "value")
        .current_dir("/usr")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let mut said = [0; 17];
    child.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello value /usr\n");

    // Killed from outside, it does not stay inside.
    let sleeps = |pattern: &str| {
        let found = host.exec(["pgrep", "-f", "-x", pattern]).unwrap();
        !found.stdout.is_empty()
    };
    assert!(sleeps("sh -c read .*"));
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    eventually("a killed command ends inside", || !sleeps("sh -c read .*"));
}

#[test]
fn daemons_start_at_pids_far_apart() {
    require_root!("daemons_start_at_pids_far_apart");
    let lab = Lab::scoped(&lab_name("daemons")).unwrap();
    let script = "echo started; exec sleep 1000";
    let mut pids = Vec::new();
    for name in [HostName::Host1, HostName::Host2] {
        let host = lab.host(name);
        let pid = host
            .spawn_detached(["sh", "-c", script], "/run/daemon.log")
            .unwrap();
        eventually("the log is written", || {
            fs::read_to_string(host.path("/run/daemon.log")).is_ok_and(|log| log == "started\n")
        });
        // A service: led by itself, reparented to init, away from all terminals.
        let stat = stdout(&host.exec(["cat", &format!("/proc/{pid}/stat")]).unwrap());
        let (_, after) = stat.rsplit_once(") ").unwrap();
        let words: Vec<_> = after.split(' ').collect();
        assert_eq!(
            words[1..4],
            ["1", &pid.to_string(), &pid.to_string()],
            "{stat}"
        );
        assert!(pid.cast_unsigned() > name.last_pid(), "{pid}");

        // Its end leaves no zombie.
        stdout(&host.exec(["kill", &pid.to_string()]).unwrap());
        eventually("the daemon is reaped", || {
            !host.path(format!("/proc/{pid}")).exists()
        });
        pids.push(pid);
    }
    assert!(pids[0].abs_diff(pids[1]) > 10_000, "{pids:?}");

    let error = lab
        .host(HostName::Host1)
        .spawn_detached(["no-such-program"], "/dev/null");
    let message = error.unwrap_err().chain();
    assert!(message.contains("run `no-such-program`"), "{message}");
}

#[test]
fn labs_live_side_by_side() {
    require_root!("labs_live_side_by_side");
    let first = Lab::scoped(&lab_name("left")).unwrap();
    let second = Lab::scoped(&lab_name("right")).unwrap();
    let write = ["sh", "-c", "echo left > /run/side"];
    stdout(&first.host(HostName::Host1).exec(write).unwrap());
    assert!(!second.host(HostName::Host1).path("/run/side").exists());
    drop(first);
    assert_eq!(
        stdout(
            &second
                .host(HostName::Host1)
                .exec(["ssh", "host2", "hostname"])
                .unwrap()
        ),
        "host2"
    );
}

#[test]
fn down_leaves_nothing() {
    require_root!("down_leaves_nothing");
    let name = lab_name("nothing");
    let lab = Lab::up(&name).unwrap();
    let namespaces = Namespaces::of(&lab);
    let host = lab.host(HostName::Host1);
    // Things that are hard to end: a daemon that ignores signals, cgroups, mounts, a visitor.
    let stubborn = "trap '' TERM HUP INT; while :; do sleep 1000; done";
    host.spawn_detached(["sh", "-c", stubborn], "/dev/null")
        .unwrap();
    stdout(
        &host
            .exec(["sh", "-c", "mkdir /run/m && mount -t tmpfs none /run/m"])
            .unwrap(),
    );
    let cgroup =
        "echo inside; c=$(awk '$0 ~ / - cgroup2 /{print $5}' /proc/self/mountinfo | tail -1)
        test -z \"$c\" && exit
        mkdir -p $c/a/b && echo $$ > $c/a/b/cgroup.procs && exec sleep 1000";
    let mut visitor = host
        .command("sh")
        .args(["-c", cgroup])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 7];
    visitor
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"inside\n");
    assert_ne!(Traces::of(&name, &namespaces), Traces::NONE);

    Lab::down(&name).unwrap();
    assert_eq!(visitor.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert_eq!(Traces::of(&name, &namespaces), Traces::NONE);
    assert!(matches!(Lab::attach(&name), Err(Error::NotUp { .. })));
    // Nothing to do is no error.
    Lab::down(&name).unwrap();
    assert_eq!(Traces::of(&name, &namespaces), Traces::NONE);
}

#[test]
fn a_panic_takes_the_lab_down() {
    require_root!("a_panic_takes_the_lab_down");
    let name = lab_name("panic");
    let mut namespaces = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::scoped(&name).unwrap();
        namespaces = Some(Namespaces::of(&lab));
        panic!("on purpose");
    }));
    assert!(outcome.is_err());
    let namespaces = namespaces.unwrap();
    assert_eq!(Traces::of(&name, &namespaces), Traces::NONE);
}
