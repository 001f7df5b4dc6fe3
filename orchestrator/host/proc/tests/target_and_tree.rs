//! Which PIDs are refused, and what a tree is seen to be.

#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod common;

use common::{Running, eventually, require};
use migrate_core::facts::ProcessFacts;
use migrate_proc::{ProcError, validate_target};

#[test]
fn no_such_process() {
    require!(root);
    let pid = 4_194_303;
    let error = validate_target(pid).unwrap_err();
    assert!(
        matches!(error, ProcError::NoSuchProcess { pid: p } if p == pid),
        "{error}"
    );
    assert!(error.help().is_some());
    assert!(matches!(
        validate_target(0),
        Err(ProcError::NotAPid { pid: 0 })
    ));
    assert!(matches!(
        validate_target(-7),
        Err(ProcError::NotAPid { pid: -7 })
    ));
}

#[test]
fn init_ourselves_and_those_who_started_us() {
    require!(root);
    assert!(matches!(validate_target(1), Err(ProcError::Init)));
    let own = nix::unistd::getpid().as_raw();
    assert!(matches!(validate_target(own), Err(ProcError::Own { .. })));
    let parent = nix::unistd::getppid().as_raw();
    if parent > 1 {
        let error = validate_target(parent).unwrap_err();
        assert!(matches!(error, ProcError::Ancestor { .. }), "{error}");
    }
}

#[test]
fn a_kernel_thread() {
    require!(root);
    // Kernel threads are seen only from the first PID namespace.
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm == "kthreadd\n") {
        let error = validate_target(2).unwrap_err();
        assert!(matches!(error, ProcError::KernelThread { .. }), "{error}");
    } else {
        println!("SKIP a_kernel_thread: none in this PID namespace");
    }
}

#[test]
fn a_zombie() {
    require!(root);
    let running = Running::start(&["true"]);
    eventually("a zombie", || common::state(running.pid()) == 'Z');
    let error = validate_target(running.pid()).unwrap_err();
    assert!(matches!(error, ProcError::Zombie { .. }), "{error}");
}

#[test]
fn a_thread_is_no_process() {
    require!(root);
    let running = Running::python(
        "import threading, time\n\
         threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n\
         print('ready', flush=True)\n\
         time.sleep(1000)",
    );
    let tree = running.tree();
    assert_eq!(tree.processes.len(), 1);
    assert_eq!(tree.tids().len(), 2);
    let thread = tree.tids()[1];
    let error = validate_target(thread).unwrap_err();
    assert!(
        matches!(error, ProcError::ThreadId { leader, .. } if leader == running.pid()),
        "{error}"
    );
    assert!(validate_target(running.pid()).is_ok());
}

#[test]
fn without_root() {
    require!(root);
    let running = Running::start(&["sleep", "1000"]);
    let pid = running.pid();
    // Credentials are per thread in the kernel; the raw call changes only ours.
    let answer = std::thread::spawn(move || {
        // SAFETY: changes the effective user of this thread alone.
        let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
        assert_eq!(done, 0);
        validate_target(pid)
    });
    let error = answer.join().unwrap().unwrap_err();
    assert!(matches!(error, ProcError::NotRoot), "{error}");
}

#[test]
fn a_tree_lists_parents_first_and_notices_change() {
    require!(root);
    let running = Running::start(&["sh", "-c", "(sleep 1000; :) & sleep 1000 & wait"]);
    running.await_processes(4);
    // Until it is another program, a child has its parent's name.
    let sleep = |p: &ProcessFacts| p.name == "sleep";
    eventually("both sleep", || {
        let processes = running.tree().processes;
        processes.into_iter().filter(sleep).count() == 2
    });
    let tree = running.tree();
    assert_eq!(tree.pids()[0], running.pid());
    for (index, process) in tree.processes.iter().enumerate().skip(1) {
        let parent = tree.pids().iter().position(|pid| *pid == process.parent);
        assert!(parent.unwrap() < index);
    }
    assert!(tree.still_same());
    assert!(!tree.shell_job(), "leads its own session");
    assert!(tree.resident_memory().unwrap().bytes > 0);
    assert_eq!(tree.frozen().unwrap().processes, tree.processes);
    let child = tree.processes.iter().rfind(|p| sleep(p)).unwrap();
    migrate_proc::kill_tree(&[child.pid]).unwrap();
    eventually("a change", || !tree.still_same());
    eventually("the same change at one look", || {
        !tree.frozen().unwrap().pids().contains(&child.pid)
    });
}

/// Memory of a process and of its child, when each has `make`.
fn memory_of_a_family(make: &str) -> migrate_proc::ResidentMemory {
    let running = Running::python(&format!(
        "import mmap, os, time\n\
         {make}\n\
         if os.fork() > 0: print('ready', flush=True)\n\
         time.sleep(1000)"
    ));
    running.await_processes(2).resident_memory().unwrap()
}

#[test]
fn what_is_shared_since_a_fork_is_carried_for_each() {
    require!(root);
    const BYTES: u64 = 64 << 20;
    let copied = memory_of_a_family("held = b'x' * (64 << 20)");
    assert!((2 * BYTES..3 * BYTES).contains(&copied.bytes), "{copied:?}");
    assert!(
        (BYTES..2 * BYTES).contains(&copied.common_bytes),
        "{copied:?}"
    );
    let shared =
        memory_of_a_family("held = mmap.mmap(-1, 64 << 20); held.write(b'x' * (64 << 20))");
    assert!((BYTES..2 * BYTES).contains(&shared.bytes), "{shared:?}");
    assert!(shared.common_bytes < BYTES / 2, "{shared:?}");
}

#[test]
fn a_name_of_parentheses() {
    require!(root);
    let running = Running::python(
        "import time\n\
         open('/proc/self/comm', 'w').write('a) S 1 (')\n\
         print('ready', flush=True)\n\
         time.sleep(1000)",
    );
    let tree = running.tree();
    assert_eq!(tree.processes[0].name, "a) S 1 (");
    assert_eq!(tree.processes[0].session, running.pid());
}

#[test]
fn the_end_of_a_root_is_told() {
    require!(root);
    let mut running = Running::start(&["true"]);
    let pid = running.pid();
    running.child.wait().unwrap();
    let error = migrate_proc::tree(pid).unwrap_err();
    assert!(matches!(error, ProcError::NoSuchProcess { .. }), "{error}");
}

#[test]
fn killing_spares_nobody_asked_for_and_minds_no_absence() {
    require!(root);
    let running = Running::start(&["sh", "-c", "sleep 1000 & trap '' TERM; wait"]);
    let tree = running.await_processes(2);
    migrate_proc::kill_tree(&tree.pids()).unwrap();
    // Ended and, being our child, collected.
    assert!(!std::path::Path::new(&format!("/proc/{}", running.pid())).exists());
    migrate_proc::kill_tree(&tree.pids()).unwrap();
}

#[test]
fn a_tree_that_forks_all_the_time_is_one_moment_of_it() {
    require!(root);
    // Many at once, so that no two reads of /proc are the same.
    let program = "while :; do for i in 1 2 3 4 5 6 7 8; do sleep 0.001 & done; wait; done";
    let running = Running::start(&["sh", "-c", program]);
    for _ in 0..5 {
        let tree = migrate_proc::tree(running.pid()).unwrap();
        assert_eq!(tree.root(), running.pid());
        let inside = |pid| tree.processes.iter().any(|process| process.pid == pid);
        let mut below = tree.processes.iter().skip(1);
        assert!(below.all(|process| inside(process.parent)));
    }
}
