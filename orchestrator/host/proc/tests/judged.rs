//! What a tree has open and mapped, as real processes have it.

#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod common;

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use common::{Running, eventually, require};
use migrate_core::facts::{FileRole, StdioKind};
use migrate_core::preflight::{Finding, Severity, refused};
use migrate_proc::{Supervisor, compare_files, compare_pids, supervisor};

/// What a Python process has to say before and after its own part.
fn python(part: &str) -> Running {
    Running::python(&format!(
        "import ctypes, fcntl, mmap, os, socket, sys, threading, time\n\
         syscall = ctypes.CDLL(None, use_errno=True).syscall\n\
         {part}\n\
         print('ready', flush=True)\n\
         null = os.open('/dev/null', os.O_RDWR)\n\
         os.dup2(null, 1)\n\
         time.sleep(1000)"
    ))
}

fn findings(running: &Running) -> Vec<Finding> {
    // The process says `ready` before it leaves its pipe to us.
    eventually("no pipe to us", || {
        running.tree().stdio().unwrap().is_empty()
    });
    running.tree().findings().unwrap()
}

fn stops(findings: &[Finding], word: &str) -> bool {
    findings.iter().any(|finding| {
        finding.severity == Severity::Refused
            && finding.finding.contains(word)
            && !finding.way_out.is_empty()
    })
}

#[test]
fn a_plain_process_has_nothing_against_it() {
    require!(root);
    let running =
        python("os.pipe(); os.eventfd(0); socket.socketpair(); e = __import__('select').epoll()");
    let findings = findings(&running);
    assert!(!refused(&findings), "{findings:#?}");
    assert_eq!(findings[0].severity, Severity::Ok);
}

#[test]
fn descriptors_that_cannot_be_carried() {
    require!(root);
    // Numbers from asm/unistd_64.h.
    if !cfg!(target_arch = "x86_64") {
        println!("SKIP descriptors_that_cannot_be_carried: system call numbers are x86-64's");
        return;
    }
    for (call, word) in [
        ("syscall(323, 0)", "userfaultfd"),
        (
            "syscall(425, 4, ctypes.create_string_buffer(256))",
            "is an io_uring",
        ),
        ("syscall(434, os.getppid(), 0)", "not moved"),
    ] {
        let running = python(&format!(
            "fd = {call}\nif fd < 0: print('errno', ctypes.get_errno(), flush=True); sys.exit()"
        ));
        let findings = findings(&running);
        assert!(stops(&findings, word), "{call}: {findings:#?}");
    }
}

#[test]
fn a_ring_whose_descriptor_is_closed() {
    require!(root);
    // The number of io_uring_setup, from asm-generic/unistd.h; 1, 3: shared, for reading
    // and writing.
    let running = python(
        "libc = ctypes.CDLL(None)\n\
         libc.mmap.restype = ctypes.c_void_p\n\
         libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\n\
         fd = syscall(425, 4, ctypes.create_string_buffer(256))\n\
         assert libc.mmap(None, 4096, 3, 1, fd, 0) != ctypes.c_void_p(-1).value\n\
         os.close(fd)",
    );
    let findings = findings(&running);
    assert!(
        stops(&findings, "mapped that CRIU cannot carry over (io_uring)"),
        "{findings:#?}"
    );
    assert!(!stops(&findings, "is an io_uring"), "{findings:#?}");
}

#[test]
fn a_pidfd_within_the_tree_is_fine() {
    require!(root);
    let running = python("fd = os.pidfd_open(os.getpid())");
    let findings = findings(&running);
    assert!(!refused(&findings), "{findings:#?}");
}

#[test]
fn system_v_shared_memory() {
    require!(root);
    let running = python(
        "libc = ctypes.CDLL(None)\n\
         libc.shmat.restype = ctypes.c_void_p\n\
         id = libc.shmget(0, 4096, 0o1600)\n\
         assert libc.shmat(id, None, 0) != -1\n\
         libc.shmctl(id, 0, None)",
    );
    let findings = findings(&running);
    assert!(stops(&findings, "System V"), "{findings:#?}");
}

#[test]
fn files_that_lost_their_name() {
    require!(root);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    for (size, stopped) in [(1000, false), (2 << 20, true)] {
        let running = python(&format!(
            "f = open('{0}', 'wb+')\nf.truncate({size})\nm = mmap.mmap(f.fileno(), {size})\n\
             os.unlink('{0}')",
            path.display()
        ));
        let findings = findings(&running);
        assert!(
            findings.iter().any(|f| f.finding.contains("was deleted")),
            "{findings:#?}"
        );
        assert_eq!(refused(&findings), stopped, "{findings:#?}");
        let files = running.tree().files().unwrap();
        assert!(
            !files
                .iter()
                .any(|file| file.path.contains(path.to_str().unwrap()))
        );
    }
}

#[test]
fn a_tracer_and_another_namespace() {
    require!(root);
    let running = Running::start(&["unshare", "--net", "--ipc", "sleep", "1000"]);
    eventually("exec", || running.tree().processes[0].name == "sleep");
    let found = running.tree().findings().unwrap();
    assert!(stops(&found, "network namespace"), "{found:#?}");
    // That one moves along.
    assert!(!stops(&found, "IPC namespace"), "{found:#?}");
    assert!(
        found.iter().any(|f| f.finding.contains("IPC namespace")),
        "{found:#?}"
    );

    let running = Running::start(&["sleep", "1000"]);
    let tracer = Running::with(
        &[
            "python3",
            "-c",
            &format!(
                "import ctypes, time\n\
                 p = ctypes.CDLL(None).ptrace\n\
                 p.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]\n\
                 assert p(0x4206, {}, None, None) == 0\n\
                 print('ready', flush=True)\n\
                 time.sleep(1000)",
                running.pid()
            ),
        ],
        |_| {},
    );
    eventually("a tracer", || {
        stops(
            &running.tree().findings().unwrap(),
            &format!("PID {}", tracer.pid()),
        )
    });
}

#[test]
fn files_by_role_and_how_they_may_differ() {
    require!(root);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("data"), b"0123456789").unwrap();
    let running = python(&format!(
        "os.chdir('{}')\ndata = open('data', 'rb+')\nlog = open('log', 'ab')\nos.mkfifo('fifo')\n\
         fifo = os.open('fifo', os.O_RDWR)",
        directory.path().display()
    ));
    let files = running.tree().files().unwrap();
    let role = |path: &str| files.iter().find(|f| f.path == path).map(|f| f.role);
    assert_eq!(role(&at("data")), Some(FileRole::Open), "{files:#?}");
    assert_eq!(role(&at("log")), Some(FileRole::Appended));
    assert_eq!(role(&at("fifo")), Some(FileRole::Appended));
    assert_eq!(
        role(directory.path().to_str().unwrap()),
        Some(FileRole::Directory)
    );
    assert_eq!(role("/"), Some(FileRole::Directory));
    assert!(files.iter().any(|f| f.role == FileRole::Executable));
    let libc = files.iter().find(|f| f.path.contains("/libc.so")).unwrap();
    assert_eq!(libc.role, FileRole::Mapped);
    assert!(libc.build_id.is_some());
    assert!(!files.iter().any(|f| f.path == "/dev/null"));

    let unlike = compare_files(&files);
    assert!(!refused(&unlike), "{unlike:#?}");
    assert_eq!(unlike[0].severity, Severity::Ok);

    // Appended to: the size may differ, the mode may not.
    std::fs::write(at("log"), b"more than before").unwrap();
    // Written to, on storage that both hosts share: it may have grown meanwhile.
    std::fs::write(at("data"), b"0123456789 and more").unwrap();
    assert!(!refused(&compare_files(&files)));
    let mut elsewhere = files.clone();
    for file in &mut elsewhere {
        file.inode += 1;
    }
    assert!(stops(&compare_files(&elsewhere), "19 bytes here and 10"));
    std::fs::write(at("data"), b"short").unwrap();
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(at("log"), mode).unwrap();
    std::fs::remove_file(at("fifo")).unwrap();
    let unlike = compare_files(&files);
    let of = |name: &str| {
        unlike
            .iter()
            .find(|f| f.subject == format!("file {}", at(name)))
            .unwrap_or_else(|| panic!("{name}: {unlike:#?}"))
    };
    assert_eq!(unlike.len(), 3, "all at once: {unlike:#?}");
    assert!(of("data").finding.contains("5 bytes here and 10"));
    assert!(of("log").finding.contains("0600 here"));
    assert!(of("fifo").finding.contains("does not exist"));
    assert!(unlike.iter().all(|f| !f.way_out.is_empty()));

    let mut other = files.clone();
    for file in &mut other {
        if let Some(id) = &mut file.build_id {
            id[0] ^= 1;
        }
    }
    assert!(stops(&compare_files(&other), "another build"));
}

#[test]
fn streams_that_lead_nowhere_outside() {
    require!(root);
    let running = Running::start(&["sh", "-c", "sleep 1000 | sleep 1001 2>&1"]);
    let tree = running.await_processes(3);
    assert!(tree.stdio().unwrap().is_empty(), "{:?}", tree.stdio());
    let findings = tree.findings().unwrap();
    assert!(!refused(&findings), "{findings:#?}");
}

#[test]
fn a_pipe_to_us() {
    require!(root);
    let running = Running::with(&["sh", "-c", "sleep 1000 & wait"], |_| {});
    let tree = running.await_processes(2);
    let stdio = tree.stdio().unwrap();
    assert_eq!(stdio.len(), 1, "{stdio:?}");
    assert_eq!(stdio[0].kind, StdioKind::Pipe);
    assert!(stdio[0].resource.starts_with("pipe:["));
    assert!(stdio[0].writable);
    let expected: Vec<(i32, i32)> = tree.pids().into_iter().map(|pid| (pid, 1)).collect();
    assert_eq!(stdio[0].holders, expected);
    assert!(
        !refused(&tree.findings().unwrap()),
        "standard streams have their own flag"
    );
}

#[test]
fn a_pipe_to_us_that_is_no_standard_stream() {
    require!(root);
    let running = Running::with(
        &["sh", "-c", "exec 7>&1 >/dev/null; sleep 1000 & wait"],
        |_| {},
    );
    running.await_processes(2);
    let tree = running.tree();
    assert!(tree.stdio().unwrap().is_empty());
    let findings = tree.findings().unwrap();
    assert!(
        stops(&findings, &format!("PID {}", std::process::id())),
        "{findings:#?}"
    );
}

#[test]
fn a_stream_socket_as_a_service_has() {
    require!(root);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let errors = theirs.try_clone().unwrap();
    let running = Running::with(&["sleep", "1000"], |command| {
        command.stdout(Stdio::from(OwnedFd::from(theirs)));
        command.stderr(Stdio::from(OwnedFd::from(errors)));
    });
    eventually("exec", || running.tree().processes[0].name == "sleep");
    let tree = running.tree();
    let stdio = tree.stdio().unwrap();
    assert_eq!(stdio.len(), 1, "{stdio:?}");
    assert_eq!(stdio[0].kind, StdioKind::UnixStream);
    assert_eq!(stdio[0].holders, [(running.pid(), 1), (running.pid(), 2)]);
    let inode: u64 = stdio[0].resource["unix[".len()..]
        .trim_end_matches(']')
        .parse()
        .unwrap();
    assert!(tree.socket_inodes().unwrap().contains_key(&inode));
    drop(ours);
}

#[test]
fn a_terminal_outside_and_one_of_its_own() {
    require!(root);
    let running = Running::with(
        &[
            "python3",
            "-c",
            "import os, pty, time\n\
             pid, fd = pty.fork()\n\
             if pid == 0: os.execvp('sleep', ['sleep', '1000'])\n\
             print(pid, flush=True)\n\
             null = os.open('/dev/null', os.O_RDWR)\n\
             os.dup2(null, 1)\n\
             time.sleep(1000)",
        ],
        |_| {},
    );
    let mut running = running;
    let inner: i32 = running.line().parse().unwrap();
    eventually("exec", || {
        std::fs::read_to_string(format!("/proc/{inner}/comm")).unwrap() == "sleep\n"
    });
    // Without who holds the terminal's other end.
    let tree = migrate_proc::tree(inner).unwrap();
    let stdio = tree.stdio().unwrap();
    assert_eq!(stdio.len(), 1, "{stdio:?}");
    assert_eq!(stdio[0].kind, StdioKind::Terminal);
    assert!(
        stdio[0].resource.starts_with("tty[88"),
        "{}",
        stdio[0].resource
    );
    assert_eq!(stdio[0].holders, [(inner, 0), (inner, 1), (inner, 2)]);
    // With it.
    eventually("a terminal of its own", || {
        running.tree().stdio().unwrap().is_empty()
    });
}

#[test]
fn shell_loops_are_named_and_plain_shells_are_not() {
    require!(root);
    let looping = Running::start(&["sh", "-c", "while :; do sleep 1000; done"]);
    let child = looping.await_processes(2).pids()[1];
    let found = supervisor(&migrate_proc::tree(child).unwrap()).unwrap();
    assert!(
        matches!(&found, Some(Supervisor::ShellLoop { pid, .. }) if *pid == looping.pid()),
        "{found:?}"
    );
    // The loop itself has nobody above it that would.
    assert_eq!(supervisor(&looping.tree()).unwrap(), None);

    let plain = Running::start(&["sh", "-c", "sleep 1000; echo over"]);
    let child = plain.await_processes(2).pids()[1];
    assert_eq!(
        supervisor(&migrate_proc::tree(child).unwrap()).unwrap(),
        None
    );

    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("run");
    std::fs::write(
        &script,
        "#!/bin/sh\n# forever\nuntil false\ndo sleep 1000\ndone\n",
    )
    .unwrap();
    let scripted = Running::start(&["sh", script.to_str().unwrap()]);
    let child = scripted.await_processes(2).pids()[1];
    assert!(
        supervisor(&migrate_proc::tree(child).unwrap())
            .unwrap()
            .is_some()
    );
}

#[test]
fn ids_that_are_taken_and_ids_that_only_name_a_session() {
    require!(root);
    let running = Running::start(&["sh", "-c", "sleep 1000 & wait"]);
    let tree = running.await_processes(2);
    let facts = tree.facts().unwrap();
    let found = compare_pids(&facts);
    assert_eq!(
        found
            .iter()
            .filter(|f| f.severity == Severity::Refused)
            .count(),
        2,
        "{found:#?}"
    );

    // The leader ends; its number goes on as the name of the child's session.
    let child = tree.pids()[1];
    migrate_proc::kill_tree(&[running.pid()]).unwrap();
    let mut facts = facts;
    facts.processes.truncate(1);
    let found = compare_pids(&facts);
    assert!(stops(&found, "names the session"), "{found:#?}");
    migrate_proc::kill_tree(&[child]).unwrap();
    eventually("free ids", || !refused(&compare_pids(&facts)));
}
