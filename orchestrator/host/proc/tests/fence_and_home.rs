//! A fence holds what its tracer lets go; a home outlives nobody's login.

#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod common;

use std::path::{Path, PathBuf};

use common::{Running, await_running, cgroup2, eventually, require, stands_still};
use migrate_core::facts::TreeFacts;
use migrate_proc::{Fence, FenceKind, Home, ProcError};
use nix::sys::signal::Signal;

const BUSY: &[&str] = &["sh", "-c", "while :; do :; done"];

/// A tracer that holds a process in a stop, as CRIU does.
const TRACER: &str = "
import ctypes, os, sys, time
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
for pid in map(int, sys.argv[1:]):
    assert ptrace(0x4206, pid, None, None) == 0, ctypes.get_errno()  # SEIZE
    assert ptrace(0x4207, pid, None, None) == 0, ctypes.get_errno()  # INTERRUPT
    os.waitpid(pid, 0x40000000)  # __WALL
print('ready', flush=True)
time.sleep(1000)
";

fn trace(pids: &[i32]) -> Running {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let mut command = vec!["python3", "-c", TRACER];
    command.extend(pids.iter().map(String::as_str));
    let mut tracer = Running::with(&command, |_| {});
    assert_eq!(tracer.line(), "ready");
    tracer
}

fn v2_path(pid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("0::")).unwrap();
    line[3..].to_owned()
}

fn id(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// Both kinds of fence, as far as this machine has them.
fn fences(running: &Running, name: &str) -> Vec<Fence> {
    let tree = running.tree();
    let mut fences = vec![Fence::prepare_signals(&tree).unwrap()];
    if common::has_cgroup2() {
        let fence = Fence::prepare(&tree, &id(name)).unwrap();
        assert_eq!(fence.kind(), FenceKind::CgroupFreezer);
        fences.push(fence);
    } else {
        println!("SKIP {name} by cgroup: no writable cgroup v2");
    }
    fences
}

#[test]
fn a_closed_fence_stops_and_an_open_one_does_not() {
    require!(root);
    let running = Running::start(BUSY);
    for fence in fences(&running, "plain") {
        let kind = fence.kind();
        await_running(running.pid());
        fence.close().unwrap();
        fence.close().unwrap();
        assert!(stands_still(running.pid()), "{kind:?}");
        fence.open().unwrap();
        fence.open().unwrap();
        await_running(running.pid());
        fence.release().unwrap();
        await_running(running.pid());
    }
}

#[test]
fn it_holds_when_the_tracer_is_killed() {
    require!(root);
    let running = Running::start(BUSY);
    for fence in fences(&running, "traced") {
        let kind = fence.kind();
        let tracer = trace(&[running.pid()]);
        assert_eq!(common::state(running.pid()), 't');
        fence.close().unwrap();
        drop(tracer);
        eventually("the tracer lets go", || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid()));
            status.unwrap().contains("TracerPid:\t0\n")
        });
        assert!(stands_still(running.pid()), "{kind:?}");
        fence.open().unwrap();
        await_running(running.pid());
        fence.release().unwrap();
    }
}

#[test]
fn a_tracer_that_goes_after_the_opening_leaves_a_running_tree() {
    require!(root);
    let running = Running::start(BUSY);
    for fence in fences(&running, "vetoed") {
        let tracer = trace(&[running.pid()]);
        fence.close().unwrap();
        fence.open().unwrap();
        drop(tracer);
        await_running(running.pid());
        fence.release().unwrap();
    }
}

#[test]
fn a_fence_outlives_who_made_it() {
    require!(root);
    let running = Running::start(BUSY);
    for fence in fences(&running, "recovered") {
        fence.close().unwrap();
        let bytes = postcard::to_stdvec(&fence.record()).unwrap();
        drop(fence);
        assert!(stands_still(running.pid()));
        let fence = Fence::from_record(postcard::from_bytes(&bytes).unwrap());
        fence.open().unwrap();
        await_running(running.pid());
        fence.release().unwrap();
    }
}

#[test]
fn what_was_stopped_before_stays_stopped() {
    require!(root);
    let running = Running::start(&["sh", "-c", "kill -STOP $$; while :; do :; done"]);
    eventually("a stop", || common::state(running.pid()) == 'T');
    for fence in fences(&running, "stopped") {
        fence.close().unwrap();
        fence.open().unwrap();
        fence.release().unwrap();
        assert_eq!(common::state(running.pid()), 'T');
    }
}

#[test]
fn a_forking_tree_is_caught_whole_and_goes_home() {
    require!(root);
    require!(cgroup2);
    let program = "while :; do for i in 1 2 3 4; do sleep 0.01 & done; wait; done";
    let running = Running::start(&["sh", "-c", program]);
    let before = v2_path(running.pid());
    let fence = Fence::prepare(&running.tree(), &id("forking")).unwrap();
    assert_eq!(fence.kind(), FenceKind::CgroupFreezer);
    let directory = fence.record().directory.unwrap();
    fence.close().unwrap();
    let tree = running.tree();
    assert!(tree.still_same(), "a frozen tree does not change");
    for process in &tree.processes {
        // What has ended before the fence came stays where it was, and stays
        // ended: its parent, which would reap it, stands still.
        let ended = common::state(process.pid) == 'Z';
        assert!(
            ended || v2_path(process.pid).ends_with(&id("forking")),
            "{process:?}"
        );
    }
    assert_eq!(tree.cgroup(), before, "the fence is no part of the path");
    fence.open().unwrap();
    fence.release().unwrap();
    assert_eq!(v2_path(running.pid()), before);
    assert!(!directory.exists());
}

#[test]
fn a_frozen_tree_can_be_killed_and_leaves_nothing() {
    require!(root);
    let running = Running::start(&["sh", "-c", "sleep 1000 & while :; do :; done"]);
    running.await_processes(2);
    for fence in fences(&running, "killed").into_iter().rev().take(1) {
        let directory = fence.record().directory;
        fence.close().unwrap();
        let pids = running.tree().pids();
        migrate_proc::kill_tree(&pids).unwrap();
        fence.release().unwrap();
        assert!(directory.is_none_or(|directory| !directory.exists()));
    }
}

#[test]
fn a_closed_fence_is_not_taken_from_a_living_tree() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(BUSY);
    let fence = Fence::prepare(&running.tree(), &id("held")).unwrap();
    let again = Fence::from_record(fence.record());
    fence.close().unwrap();
    let error = fence.release().unwrap_err();
    assert!(matches!(error, ProcError::FenceHolds { .. }), "{error}");
    assert!(stands_still(running.pid()));
    again.open().unwrap();
    again.release().unwrap();
}

#[test]
fn a_home_of_its_own_and_gone_when_dropped() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(&["sleep", "1000"]);
    let mut facts = running.tree().facts().unwrap();
    for login in [
        "/",
        "/user.slice/user-0.slice/session-9.scope",
        "/user.slice/user-0.slice/user@0.service/app.slice/x.service",
        "/this/path/is/not/here.service",
    ] {
        facts.cgroup = login.into();
        let home = Home::create(&facts, &id("home")).unwrap();
        let path = format!("/migrate/sleep-{}", running.pid());
        assert_eq!(home.path(), path, "{login}");
        let directory = home.directory().unwrap().to_owned();
        assert!(directory.is_dir());
        drop(home);
        assert!(!directory.exists());
    }
}

/// A home in which a process lives that has got a signal.
fn home_of(running: &Running, test: &str, signal: Signal) -> (TreeFacts, Home, PathBuf) {
    let mut facts = running.tree().facts().unwrap();
    facts.cgroup = "/".into();
    let home = Home::create(&facts, &id(test)).unwrap();
    let directory = home.directory().unwrap().to_owned();
    home.place(running.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(running.pid()), signal).unwrap();
    (facts, home, directory)
}

#[test]
fn a_home_goes_with_what_was_killed_in_it() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(BUSY);
    // Not waited for: it may still be there.
    let (facts, home, directory) = home_of(&running, "killed", Signal::SIGKILL);
    home.remove().unwrap();
    assert!(!directory.exists());

    // What a dead agent has left, by name.
    let home = Home::create(&facts, &id("left")).unwrap();
    assert!(directory.is_dir());
    home.keep();
    Home::clear(&facts.processes[0].name, facts.root_pid, &id("left"));
    assert!(!directory.exists());
}

#[test]
fn all_that_was_born_in_a_home_goes_with_a_failed_copy() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(&["sleep", "1000"]);
    // As a helper of a CRIU that was killed: stopped, and none of the copy's.
    let (_, home, directory) = home_of(&running, "helper", Signal::SIGSTOP);
    home.kill(&[]).unwrap();
    home.remove().unwrap();
    assert!(!directory.exists());
}

#[test]
fn a_kept_home_serves_the_next_move_and_goes_with_its_fence() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(&["sleep", "1000"]);
    let facts = running.tree().facts().unwrap();
    let home = Home::create(&facts, &id("kept")).unwrap();
    let (path, directory) = (home.path(), home.directory().unwrap().to_owned());
    home.place(running.pid()).unwrap();
    home.keep();
    assert_eq!(v2_path(running.pid()), path);
    // The same path again, as for a tree that comes back.
    let tree = running.tree();
    assert_eq!(tree.cgroup(), path);
    let back = Home::create(&tree.facts().unwrap(), &id("kept")).unwrap();
    assert_eq!(back.path(), path);
    drop(back);
    assert!(
        directory.exists(),
        "not made by the second, so not removed by it"
    );
    // And away: what was made for the tree goes with it.
    let fence = Fence::prepare(&tree, &id("away")).unwrap();
    fence.close().unwrap();
    migrate_proc::kill_tree(&tree.pids()).unwrap();
    fence.release().unwrap();
    assert!(!directory.exists());
}

#[test]
fn no_home_in_a_frozen_cgroup() {
    require!(root);
    require!(cgroup2);
    let running = Running::start(&["sleep", "1000"]);
    let mut facts = running.tree().facts().unwrap();
    let name = id("frozen-place");
    let place = Path::new(&cgroup2().unwrap()).join(&name);
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("cgroup.freeze"), "1").unwrap();
    facts.cgroup = format!("/{name}");
    let home = Home::create(&facts, "x").unwrap();
    let path = home.path();
    drop(home);
    std::fs::remove_dir(&place).unwrap();
    assert_eq!(path, format!("/migrate/sleep-{}", running.pid()));
}
