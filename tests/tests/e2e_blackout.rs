//! What the time in which peers wait is not spent on, by the kernel's own account.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use migrate_test_hosts::{Host, HostName, Lab};
use migrate_tests::migration::{migrate_as_given, serves_old_connections};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};
use nix::time::{ClockId, clock_gettime};

/// Tells who is whose child: others on the machine may do what they like.
const FORK: &str = "sched_process_fork";

/// What would be work for before the freeze, or for after the copy runs: programs that are
/// started, and waits for a disk. CRIU forks, for the copy has to come from somewhere.
const EVENTS: [&str; 6] = [
    "sched/sched_process_fork",
    "sched/sched_process_exec",
    "syscalls/sys_enter_fsync",
    "syscalls/sys_enter_fdatasync",
    "syscalls/sys_enter_sync",
    "syscalls/sys_enter_syncfs",
];

/// The kernel's record of such events, of all processes of the machine.
struct Trace {
    /// Where the file system is mounted if that had to be done.
    mount: Option<tempfile::TempDir>,
    instance: PathBuf,
}

/// One event.
#[derive(Debug)]
struct Event {
    /// By the clock that counts from the boot on.
    at: Duration,
    pid: i32,
    /// What that process did: the kernel's name for it, and more.
    what: String,
}

impl Event {
    /// `COMM-PID [CPU] FLAGS SECONDS.MICROS: WHAT`; the name of a program may be anything.
    fn read(line: &str) -> Option<Self> {
        let (who, rest) = line.rsplit_once(" [")?;
        let (_, pid) = who.trim().rsplit_once('-')?;
        let (_, rest) = rest.split_once("] ")?;
        let (head, what) = rest.split_once(": ")?;
        let seconds: f64 = head.rsplit(' ').next()?.parse().ok()?;
        Some(Self {
            at: Duration::from_secs_f64(seconds),
            pid: pid.parse().ok()?,
            what: what.to_owned(),
        })
    }

    /// Whom it has forked.
    fn child(&self) -> Option<i32> {
        let told = self.what.strip_prefix(FORK)?;
        told.rsplit_once("child_pid=")?.1.trim().parse().ok()
    }
}

/// Those of the processes of these hosts.
fn of_hosts(events: Vec<Event>, mut pids: BTreeSet<i32>) -> Vec<Event> {
    let mut ours = Vec::new();
    for event in events {
        if pids.contains(&event.pid) {
            match event.child() {
                Some(child) => drop(pids.insert(child)),
                None => ours.push(event),
            }
        }
    }
    ours
}

/// The processes of hosts, as the machine numbers them.
fn pids_of(hosts: &[Host]) -> BTreeSet<i32> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let theirs: Vec<_> = hosts
        .iter()
        .filter_map(|host| namespace(host.init_pid()))
        .collect();
    assert_eq!(theirs.len(), hosts.len());
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| namespace(pid).is_some_and(|one| theirs.contains(&one)))
        .collect()
}

impl Trace {
    fn start() -> Self {
        let here = Path::new("/sys/kernel/tracing");
        let mount = (!here.join("instances").is_dir()).then(|| {
            let directory = tempfile::tempdir().unwrap();
            let mut mount = Command::new("mount");
            mount
                .args(["-t", "tracefs", "tracefs"])
                .arg(directory.path());
            assert!(mount.status().unwrap().success());
            directory
        });
        let root = mount.as_ref().map_or(here, |directory| directory.path());
        let instance = root
            .join("instances")
            .join(format!("migrate-test-{}", std::process::id()));
        fs::create_dir(&instance).unwrap();
        let trace = Self { mount, instance };
        trace.write("trace_clock", "mono");
        for event in EVENTS {
            trace.write(&format!("events/{event}/enable"), "1");
        }
        trace
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.instance.join(file), value).unwrap();
    }

    /// All until now.
    fn events(&self) -> Vec<Event> {
        self.write("tracing_on", "0");
        let text = fs::read_to_string(self.instance.join("trace")).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(Event::read).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // A test that fails leaves no record that goes on.
        let _ = fs::remove_dir(&self.instance);
        if let Some(directory) = &self.mount {
            let _ = Command::new("umount").arg(directory.path()).status();
        }
    }
}

/// The clock that counts from the boot on, at this moment since 1970.
fn boot_unix() -> Duration {
    let mono = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - mono
}

#[test]
fn nothing_is_started_and_no_disk_is_waited_for() {
    require!("nothing_is_started_and_no_disk_is_waited_for": root, tcx, criu, migrate, redis);
    let lab = Lab::scoped(&format!("blackout-{}", std::process::id())).unwrap();
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload.client(&lab, 10, &[]).unwrap();
    serves_old_connections(&mut client);
    let hosts = [HostName::Host1, HostName::Host2].map(|name| lab.host(name));
    let trace = Trace::start();
    let pids = pids_of(&hosts);
    let boot = boot_unix();
    let to = ["--to", "host2", &workload.pid.to_string()];
    let moved = migrate_as_given(&hosts[0], to).unwrap();
    let report = moved.expect_committed();
    let events = of_hosts(trace.events(), pids);
    serves_old_connections(&mut client);
    assert!(client.stop().unwrap().is_clean());

    let start_us = report.blackout_start_us.unwrap();
    let began =
        Duration::from_millis(report.began_unix_ms) + Duration::from_micros(start_us) - boot;
    // The report tells the beginning in whole milliseconds.
    let within =
        began + Duration::from_millis(1)..began + Duration::from_micros(report.blackout.total_us());
    // The agent was started, for one, or nothing of this is seen.
    assert!(
        events.iter().any(|event| event.at < within.start),
        "{events:?}"
    );
    let (seen, others): (Vec<_>, Vec<_>) =
        events.iter().partition(|event| within.contains(&event.at));
    println!("{within:?}: {seen:?}, at other times {}", others.len());
    assert!(seen.is_empty(), "{seen:#?}");
}
