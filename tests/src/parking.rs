//! Trees that are parked, a boot that is played, and what must hold afterwards.
//!
//! A boot is played on a test host: its link goes down, everything that
//! `migrate` has in memory and in the kernel goes, and its addresses. Then the
//! guard, the addresses, the link and the resume come in the order of a boot.

#![allow(clippy::unwrap_used, reason = "a fixture panics for its backtrace")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use migrate_test_hosts::{Host, HostName, INTERFACE, Lab, WORKLOAD_V4};
use nix::unistd::Pid;

use crate::client::StrictClient;
use crate::hosts::{eventually, reset_connections};
use crate::refusals::{Ended, Running, is_stopped, runner, shell};

/// On a host: memory that outlives everything that is played here.
pub const DIR: &str = "/srv/parked";

/// To hold a process at a moment, to end, to settle.
pub const WITHIN: Duration = Duration::from_secs(60);

/// Clients that wait for as long as a boot may take on a busy machine, and for
/// the timers of their kernel, which may run for as long again.
pub const PATIENT: [&str; 2] = ["--reply-timeout-ms", "300000"];

/// Makes [`DIR`], root's alone.
///
/// # Panics
///
/// When that fails.
#[track_caller]
pub fn make_directory(host: &Host) {
    shell(host, &format!("mkdir -m 700 {DIR}"));
}

/// Runs `migrate` on a host to its end.
///
/// # Panics
///
/// When it cannot be started.
#[track_caller]
#[must_use]
pub fn run(host: &Host, arguments: &[&str]) -> Ended {
    let mut command = host.command("migrate");
    command.args(arguments);
    Running::start(command).finish()
}

/// The same, and it has to succeed.
///
/// # Panics
///
/// When it does not.
#[track_caller]
pub fn succeeds(host: &Host, arguments: &[&str]) -> Ended {
    let ended = run(host, arguments);
    assert_eq!(ended.status.code(), Some(0), "{arguments:?}: {ended:#?}");
    ended
}

/// The host as it is before its network comes up after a boot.
///
/// # Panics
///
/// When a step of it fails.
#[track_caller]
pub fn goes_down(host: &Host) {
    shell(host, &format!("ip link set {INTERFACE} down"));
    shell(host, "migrate unlock --force");
    shell(host, "rm -rf /run/migrate");
    shell(host, &format!("ip address flush dev {INTERFACE}"));
}

/// Its network comes up.
///
/// # Panics
///
/// When a step of it fails.
#[track_caller]
pub fn comes_up(host: &Host) {
    let (own, interface) = (host.ipv4(), INTERFACE);
    shell(host, &format!("ip address add {own}/24 dev {interface}"));
    shell(
        host,
        &format!("ip address add {WORKLOAD_V4}/24 dev {interface}"),
    );
    shell(host, &format!("ip link set {interface} up"));
}

/// What must hold after all of it.
///
/// # Panics
///
/// When it does not.
#[track_caller]
pub fn clean_client(lab: &Lab, client: StrictClient, resets: u64) {
    let verdict = client.stop().unwrap();
    println!("{verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
    let client = lab.host(HostName::Client);
    assert_eq!(reset_connections(&client).unwrap(), resets);
}

/// Waits until a `migrate` has stopped itself, and names it.
///
/// # Panics
///
/// When it does not.
#[track_caller]
#[must_use]
pub fn held(host: &Host, verb: &str) -> Pid {
    // It must be there before it can be asked for.
    let running = || {
        let ps = host
            .exec(["pgrep", "-f", &format!("migrate {verb}")])
            .unwrap();
        ps.status.success()
    };
    assert!(eventually(WITHIN, running));
    let pid = runner(host, verb);
    assert!(eventually(WITHIN, || is_stopped(pid)));
    pid
}

/// A file of the set, changed and put back.
///
/// # Panics
///
/// When it cannot be read or written.
#[track_caller]
pub fn with<T>(path: &Path, change: impl FnOnce(&mut Vec<u8>), test: impl FnOnce() -> T) -> T {
    let content = fs::read(path).unwrap();
    let mut changed = content.clone();
    change(&mut changed);
    fs::write(path, changed).unwrap();
    let result = test();
    fs::write(path, content).unwrap();
    result
}

/// A change for [`with`]: one text for another, where it stands first.
pub fn edit(from: &str, to: &str) -> impl FnOnce(&mut Vec<u8>) + use<> {
    let (from, to) = (from.to_owned(), to.to_owned());
    move |content| {
        let text = String::from_utf8(content.clone()).unwrap();
        assert!(text.contains(&from), "{text}");
        *content = text.replacen(&from, &to, 1).into_bytes();
    }
}

/// A change for [`with`]: a manifest that was written on another machine.
pub fn another_machine(manifest: &Path) -> impl FnOnce(&mut Vec<u8>) + use<> {
    let parsed: serde_json::Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    let machine = format!("\"machine_id\":{}", parsed["machine_id"]);
    edit(&machine, "\"machine_id\":\"another\"")
}
