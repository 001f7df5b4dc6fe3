//! Trees as they are found in the field: what their standard streams lead to,
//! who would start them again, what they share, how their connections stand,
//! and whose they are afterwards.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use migrate_test_hosts::{Host, HostName, Lab, LabGuard, WORKLOAD_V4, WORKLOAD_V6};
use migrate_tests::client::program;
use migrate_tests::field::{
    COUNT, Capture, Running, SOON, Shared, cgroup, cgroups_made, contiguous, grows, output,
    process, processes, read, signal, waiting_criu,
};
use migrate_tests::hosts::{catches, eventually, has_address, listens, process_name, runs};
use migrate_tests::migration::{
    Migration, migrate, moves, no_gate_left, print_logs, serves_old_connections,
};
use migrate_tests::refusals::{Held, driver, guards};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};

const PYTHON: &str = "/usr/bin/python3";

/// A directory that all hosts of a lab see, and the lab, which ends first: its
/// processes write to the directory.
fn set_up(test: &str) -> (Shared, LabGuard, Host, Host) {
    let shared = Shared::new(test).unwrap();
    let lab = Lab::scoped(&format!("field-{test}-{}", std::process::id())).unwrap();
    let (host1, host2) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    (shared, lab, host1, host2)
}

/// Starts a shell script as a daemon on a host.
fn shell(host: &Host, script: &str) -> i32 {
    host.spawn_detached(["/bin/sh", "-c", script], "/dev/null")
        .unwrap()
}

/// The same with job control.
fn bash(host: &Host, script: &str) -> i32 {
    host.spawn_detached(["bash", "-c", script], "/dev/null")
        .unwrap()
}

/// Runs `migrate --to TO PID MORE`.
fn try_move(from: &Host, to: &Host, pid: i32, more: &[&str]) -> Migration {
    let pid = pid.to_string();
    let mut arguments = vec!["--to", to.name().as_str(), pid.as_str()];
    arguments.extend(more);
    migrate(from, arguments).unwrap()
}

/// Moves a tree: it runs there and is not even a zombie here.
#[track_caller]
fn moved(from: &Host, to: &Host, pid: i32, more: &[&str]) -> Migration {
    let migration = try_move(from, to, pid, more);
    if migration.code != Some(0) {
        print_logs(from);
        print_logs(to);
    }
    let _ = migration.expect_committed();
    assert!(runs(to, pid), "{pid} runs on {}", to.name());
    assert!(
        eventually(SOON, || process(from, pid).is_none()),
        "{:?} is left on {}",
        process(from, pid),
        from.name()
    );
    no_gate_left(from);
    no_gate_left(to);
    migration
}

/// A migration that preflight refuses with all of these words in one finding;
/// the tree runs on.
#[track_caller]
fn refused(from: &Host, to: &Host, pid: i32, more: &[&str], words: &[&str]) {
    let migration = try_move(from, to, pid, more);
    assert_eq!(migration.code, Some(3), "{migration:#?}");
    let named = migration.events.iter().any(|event| {
        let line = event.to_string();
        event["severity"] == "refused" && words.iter().all(|word| line.contains(word))
    });
    assert!(named, "no refusal with {words:?}: {migration:#?}");
    assert!(runs(from, pid), "{pid} runs on {}", from.name());
    no_gate_left(from);
    no_gate_left(to);
}

// ---- standard streams

#[test]
fn a_log_on_shared_storage_is_appended_to_without_a_gap() {
    require!("a_log_on_shared_storage_is_appended_to_without_a_gap": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("append");
    let log = shared.path("log");
    let pid = shell(&host1, &format!("exec >>{} 2>&1; {COUNT}", log.display()));
    assert!(grows(&log, 10));
    moved(&host1, &host2, pid, &[]);
    assert!(grows(&log, 10));
    let numbers = contiguous(&read(&log));
    assert_eq!(numbers[0], 1);
}

#[test]
fn a_log_that_is_not_appended_to_keeps_its_place() {
    require!("a_log_that_is_not_appended_to_keeps_its_place": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("truncate");
    let log = shared.path("log");
    let pid = shell(&host1, &format!("exec >{} 2>&1; {COUNT}", log.display()));
    assert!(grows(&log, 10));
    moved(&host1, &host2, pid, &[]);
    assert!(grows(&log, 10));
    let numbers = contiguous(&read(&log));
    assert_eq!(numbers[0], 1);
}

#[test]
fn a_log_that_only_the_source_has_is_led_elsewhere() {
    require!("a_log_that_only_the_source_has_is_led_elsewhere": root, tcx, criu, migrate);
    let (_shared, _lab, host1, host2) = set_up("elsewhere");
    let (here, there) = ("/srv/log", "/srv/other");
    let pid = shell(&host1, &format!("exec >{here} 2>&1; {COUNT}"));
    assert!(grows(&host1.path(here), 10));
    refused(
        &host1,
        &host2,
        pid,
        &[],
        &[here, "does not exist", "--stdio"],
    );
    // A file of that name is not yet the same file.
    std::fs::write(host2.path(here), "").unwrap();
    refused(&host1, &host2, pid, &[], &[here, "0 bytes here", "--stdio"]);

    moved(&host1, &host2, pid, &["--stdio", there]);
    assert!(grows(&host2.path(there), 10));
    let both = read(&host1.path(here)) + &read(&host2.path(there));
    assert_eq!(contiguous(&both)[0], 1);
    assert_eq!(read(&host2.path(here)), "");
}

/// Starts a loop on a terminal whose session leader is not part of its tree.
fn on_a_terminal(host: &Host, shared: &Shared) -> i32 {
    let count = shared.file("count.sh", COUNT).unwrap();
    let line = format!(
        "sh {count} </dev/tty & echo $! >{}; wait",
        shared.text_path("pid")
    );
    host.spawn_detached(
        ["script", "-qfc", &line, &shared.text_path("typescript")],
        "/dev/null",
    )
    .unwrap();
    let pid = shared.pid("pid").unwrap();
    assert!(grows(&shared.path("typescript"), 10));
    pid
}

#[test]
fn a_tree_on_a_terminal_needs_to_be_told_where_its_output_goes() {
    require!("a_tree_on_a_terminal_needs_to_be_told_where_its_output_goes": root, tcx, criu, migrate, script);
    let (shared, _lab, host1, host2) = set_up("terminal");
    let pid = on_a_terminal(&host1, &shared);
    refused(&host1, &host2, pid, &[], &["terminal", "--stdio"]);

    let log = "/srv/log";
    moved(&host1, &host2, pid, &["--stdio", log]);
    assert!(grows(&host2.path(log), 10));
    // The other host's file begins where the terminal's record ends.
    joined(|| read_terminal(&shared), &read(&host2.path(log)));

    // Moved on, it writes to a file like any other tree; its session is one
    // without a leader.
    std::fs::write(host1.path(log), "").unwrap();
    moved(&host2, &host1, pid, &[]);
    assert!(grows(&host1.path(log), 10));
}

/// Numbers that went to two places, in one row. Who writes the first ones down
/// is no part of the tree, and may be behind.
#[track_caller]
fn joined(first: impl Fn() -> String, then: &str) -> Vec<u64> {
    let due = contiguous(then)[0] - 1;
    eventually(SOON, || contiguous(&first()).last() == Some(&due));
    contiguous(&(first() + then))
}

/// What the terminal has shown of the loop.
fn read_terminal(shared: &Shared) -> String {
    let text = shared.read("typescript");
    let lines = text
        .lines()
        // `script` and the shell have their own say.
        .filter(|line| line.trim().parse::<u64>().is_ok());
    lines.map(|line| format!("{}\n", line.trim())).collect()
}

#[test]
fn a_tree_on_a_terminal_moves_to_no_output() {
    require!("a_tree_on_a_terminal_moves_to_no_output": root, tcx, criu, migrate, script);
    let (shared, _lab, host1, host2) = set_up("null");
    let pid = on_a_terminal(&host1, &shared);
    moved(&host1, &host2, pid, &["--stdio", "null"]);
    for fd in 0..3 {
        let link = output(&host2, ["readlink", &format!("/proc/{pid}/fd/{fd}")]);
        assert_eq!(link.trim(), "/dev/null", "fd {fd}");
    }
    // It runs: its children come and go.
    let child = || {
        let all = processes(&host2).unwrap();
        all.into_iter().find(|p| p.parent == pid).map(|p| p.pid)
    };
    let first = child();
    assert!(eventually(SOON, || child().is_some() && child() != first));
}

#[test]
fn a_job_of_an_interactive_shell_is_not_supervised() {
    require!("a_job_of_an_interactive_shell_is_not_supervised": root, tcx, criu, migrate, script);
    let (shared, _lab, host1, host2) = set_up("job");
    let count = shared.file("count.sh", COUNT).unwrap();
    let mut terminal = host1.command("script");
    terminal
        .args(["-qfc", "bash --norc --noprofile -i", "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut terminal = terminal.spawn().unwrap();
    let mut keyboard = terminal.stdin.take().unwrap();
    writeln!(keyboard, "sh {count} &").unwrap();
    writeln!(keyboard, "echo $! >{}", shared.text_path("pid")).unwrap();
    let pid = shared.pid("pid").unwrap();
    let job = process(&host1, pid).unwrap();
    assert_eq!(job.group, pid, "a job has a process group of its own");
    assert_ne!(job.session, pid);
    // The terminal is all that is in the way.
    refused(&host1, &host2, pid, &[], &["terminal", "--stdio"]);
    moved(&host1, &host2, pid, &["--stdio", "/srv/log"]);
    assert!(grows(&host2.path("/srv/log"), 10));
    assert_eq!(process(&host2, pid).unwrap().group, pid);
    // The end of the shell and its terminal is nothing to the tree any more.
    writeln!(keyboard, "exit").unwrap();
    drop(keyboard);
    terminal.wait().unwrap();
    assert!(grows(&host2.path("/srv/log"), 10));
    contiguous(&read(&host2.path("/srv/log")));
}

#[test]
fn one_end_of_a_pipe_moves_when_told_where_to_write() {
    require!("one_end_of_a_pipe_moves_when_told_where_to_write": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("pipe");
    let count = shared.file("count.sh", COUNT).unwrap();
    let log = shared.path("log");
    shell(
        &host1,
        &format!(
            "{{ sh {count} & echo $! >{}; wait; }} | cat >>{}",
            shared.text_path("pid"),
            log.display()
        ),
    );
    let pid = shared.pid("pid").unwrap();
    assert!(grows(&log, 10));
    refused(&host1, &host2, pid, &[], &["pipe", "--stdio"]);
    let there = "/srv/log";
    moved(&host1, &host2, pid, &["--stdio", there]);
    assert!(grows(&host2.path(there), 10));
    // What was in the pipe has reached its reader.
    let both = joined(|| read(&log), &read(&host2.path(there)));
    assert_eq!(both[0], 1);
}

/// Stands for journald: takes streams on its socket, and hands over what
/// comes on each.
fn journal(host: &Host) -> std::sync::mpsc::Receiver<String> {
    let directory = host.path("/run/systemd/journal");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("stdout");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, lines) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            thread::spawn(move || {
                let lines = BufReader::new(stream).lines().map_while(Result::ok);
                lines.map(|line| sender.send(line)).all(|sent| sent.is_ok())
            });
        }
    });
    lines
}

#[test]
fn a_stream_into_the_journal_leads_into_the_other_journal() {
    require!("a_stream_into_the_journal_leads_into_the_other_journal": root, tcx, criu, migrate, python);
    let (_shared, _lab, host1, host2) = set_up("journal");
    let here = journal(&host1);
    // What systemd does for `StandardOutput=journal`.
    let start = "import os, socket, sys\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n\
        s.connect('/run/systemd/journal/stdout')\n\
        s.shutdown(socket.SHUT_RD)\n\
        s.sendall(b'count\\ncount.service\\n6\\n1\\n0\\n0\\n0\\n')\n\
        os.dup2(s.fileno(), 1); os.dup2(s.fileno(), 2); s.close()\n\
        os.execv('/bin/sh', ['sh', '-c', sys.argv[1]])\n";
    let pid = host1
        .spawn_detached([PYTHON, "-c", start, COUNT], "/dev/null")
        .unwrap();
    let received = |lines: &std::sync::mpsc::Receiver<String>, count: usize| -> Vec<String> {
        (0..count)
            .map(|_| lines.recv_timeout(SOON).expect("a line in the journal"))
            .collect()
    };
    let header = received(&here, 7);
    assert_eq!(header[0], "count");
    let numbers = |lines, count| -> Vec<u64> {
        let lines = received(lines, count);
        lines.iter().map(|line| line.parse().unwrap()).collect()
    };
    let mut last = numbers(&here, 10)[9];
    refused(&host1, &host2, pid, &[], &["socket", "--stdio journal"]);
    refused(
        &host1,
        &host2,
        pid,
        &["--stdio", "journal"],
        &["no journal"],
    );

    let there = journal(&host2);
    moved(&host1, &host2, pid, &["--stdio", "journal"]);
    let header = received(&there, 7);
    assert_eq!(header[1..], ["", "6", "1", "0", "0", "0"], "{header:?}");
    let after = numbers(&there, 10);
    assert!(
        after.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "{after:?}"
    );
    while last + 1 < after[0] {
        let next = numbers(&here, 1)[0];
        assert_eq!(next, last + 1);
        last = next;
    }
    assert_eq!(last + 1, after[0]);
    assert_eq!(here.try_iter().next(), None);
}

#[test]
fn a_place_for_output_that_cannot_be_is_refused() {
    require!("a_place_for_output_that_cannot_be_is_refused": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("places");
    let count = shared.file("count.sh", COUNT).unwrap();
    shell(
        &host1,
        &format!(
            "{{ sh {count} & echo $! >{}; wait; }} | cat >/dev/null",
            shared.text_path("pid")
        ),
    );
    let pid = shared.pid("pid").unwrap();
    for bad in ["", "log", "./log", "Null", "keep,null"] {
        let migration = try_move(&host1, &host2, pid, &["--stdio", bad]);
        assert_eq!(migration.code, Some(2), "{bad:?}: {migration:#?}");
        assert!(migration.stderr.contains("--stdio"), "{migration:#?}");
    }
    let missing = ["--stdio", "/srv/not/there/log"];
    refused(
        &host1,
        &host2,
        pid,
        &missing,
        &["/srv/not/there", "create it"],
    );
    refused(
        &host1,
        &host2,
        pid,
        &["--stdio", "/srv"],
        &["/srv", "directory"],
    );
    assert!(runs(&host1, pid));
}

// ---- trees

#[test]
fn a_tree_keeps_its_shape_and_the_pipes_in_it() {
    require!("a_tree_keeps_its_shape_and_the_pipes_in_it": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("shape");
    let log = shared.path("log");
    // Nothing in it comes and goes.
    let count = "exec 9<> <(:); i=0; while :; do i=$((i+1)); echo $i; read -t 0.02 -u 9; done";
    let pid = bash(
        &host1,
        &format!(
            "set -m\n\
             ( {count} ) | while read n; do echo $n >>{}; done &\n\
             setsid -w sleep 1000 &\n\
             ( sleep 1000; : ) &\n\
             wait",
            log.display()
        ),
    );
    assert!(grows(&log, 10));
    let shape = |host: &Host| -> Vec<_> {
        let mut members = vec![pid];
        let mut shape = Vec::new();
        for process in processes(host).unwrap() {
            // Listed by PID, so that a child comes after its parent.
            if members.contains(&process.pid) || members.contains(&process.parent) {
                members.push(process.pid);
                shape.push(process);
            }
        }
        shape
    };
    let asleep = || {
        let all = shape(&host1);
        all.iter()
            .filter(|p| p.command_line == "sleep 1000")
            .count()
    };
    assert!(eventually(SOON, || asleep() == 2), "{:#?}", shape(&host1));
    let known = |host: &Host| -> Vec<_> {
        let all = shape(host).into_iter();
        all.map(|p| (p.pid, p.parent, p.group, p.session, p.name))
            .collect()
    };
    let before = known(&host1);
    assert_eq!(before[0].1, 1, "the host's init is its parent");
    let groups: BTreeSet<i32> = before.iter().map(|p| p.2).collect();
    let sessions: BTreeSet<i32> = before.iter().map(|p| p.3).collect();
    // Itself, both ends of the pipe, what waits for the session, the session,
    // and a job with its child.
    assert_eq!(
        (before.len(), groups.len(), sessions.len()),
        (7, 5, 2),
        "{before:#?}"
    );

    moved(&host1, &host2, pid, &[]);
    let as_before = |host: &Host| {
        // Whoever built it leaves it to init a little later.
        eventually(SOON, || known(host)[0].1 == 1);
        assert_eq!(known(host), before);
    };
    as_before(&host2);
    assert!(grows(&log, 10));
    moved(&host2, &host1, pid, &[]);
    as_before(&host1);
    assert!(grows(&log, 10));
    assert_eq!(contiguous(&read(&log))[0], 1);
}

/// A parent and a child that share memory: what the child counts, the parent
/// writes into a file when asked with a signal.
const SHARED_MEMORY: &str = r"
import mmap, os, signal, struct, sys, time
regions = [mmap.mmap(-1, 1 << 20)]
fd = os.memfd_create('counts')
os.ftruncate(fd, 1 << 20)
regions.append(mmap.mmap(fd, 1 << 20))
def answer(*_):
    counts = [struct.unpack_from('>Q', region, 4096)[0] for region in regions]
    with open(sys.argv[1] + '.new', 'w') as f:
        print(*counts, file=f)
    os.rename(sys.argv[1] + '.new', sys.argv[1])
signal.signal(signal.SIGUSR1, answer)
if os.fork() == 0:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    n = 0
    while True:
        n += 1
        for region in regions:
            struct.pack_into('>Q', region, 4096, n)
        time.sleep(0.005)
while True:
    signal.pause()
";

/// Workers with a lock and a value between them, as Python's own library
/// makes them: unnamed files and semaphores in /dev/shm.
const WORKERS: &str = r"
import multiprocessing, os, signal, sys, time
value = multiprocessing.Value('Q', 0)
def work():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while True:
        with value.get_lock():
            value.value += 1
        time.sleep(0.005)
def answer(*_):
    with open(sys.argv[1] + '.new', 'w') as f:
        print(value.value, file=f)
    os.rename(sys.argv[1] + '.new', sys.argv[1])
context = multiprocessing.get_context('fork')
workers = [context.Process(target=work) for _ in range(2)]
for worker in workers: worker.start()
signal.signal(signal.SIGUSR1, answer)
while True:
    signal.pause()
";

/// Asks one of the programs above for its counts, which all have to be above
/// `least`.
#[track_caller]
fn counts(host: &Host, pid: i32, shared: &Shared, name: &str, least: u64) -> u64 {
    // Its worker counts on between two questions.
    let mut lowest = 0;
    let counted = eventually(SOON, || {
        let _ = std::fs::remove_file(shared.path(name));
        signal(host, "USR1", pid);
        let mut answer = String::new();
        eventually(SOON, || {
            answer = shared.read(name);
            !answer.is_empty()
        });
        lowest = answer
            .split_whitespace()
            .map(|count| count.parse::<u64>().unwrap())
            .min()
            .unwrap_or(0);
        lowest > least
    });
    assert!(counted, "{name} counts: {lowest}, not above {least}");
    lowest
}

#[test]
fn memory_shared_within_the_tree_stays_shared() {
    require!("memory_shared_within_the_tree_stays_shared": root, tcx, criu, migrate, python);
    let (shared, _lab, host1, host2) = set_up("memory");
    for (name, program) in [("regions", SHARED_MEMORY), ("workers", WORKERS)] {
        let answer = shared.text_path(name);
        let pid = host1
            .spawn_detached([PYTHON, "-c", program, &answer], "/dev/null")
            .unwrap();
        // Until its handler is there, the signal would end it.
        let ready = || {
            let all = processes(&host1).unwrap();
            all.iter().any(|p| p.parent == pid) && catches(&host1, pid, Signal::SIGUSR1)
        };
        assert!(eventually(SOON, ready), "{name}");
        let before = counts(&host1, pid, &shared, name, 10);
        moved(&host1, &host2, pid, &[]);
        let there = counts(&host2, pid, &shared, name, before);
        moved(&host2, &host1, pid, &[]);
        counts(&host1, pid, &shared, name, there);
    }
}

#[test]
fn system_v_shared_memory_is_refused_by_name() {
    require!("system_v_shared_memory_is_refused_by_name": root, tcx, criu, migrate, python);
    let (_shared, _lab, host1, host2) = set_up("sysv");
    let program = "import ctypes, signal\n\
        libc = ctypes.CDLL(None)\n\
        libc.shmat.restype = ctypes.c_void_p\n\
        at = libc.shmat(libc.shmget(0x4d4d, 4096, 0o1600), None, 0)\n\
        signal.signal(signal.SIGUSR1, lambda *_: None)\n\
        while True: signal.pause()\n";
    let pid = host1
        .spawn_detached([PYTHON, "-c", program], "/dev/null")
        .unwrap();
    assert!(eventually(SOON, || catches(&host1, pid, Signal::SIGUSR1)));
    refused(
        &host1,
        &host2,
        pid,
        &[],
        &["System V shared memory", "unshare --ipc"],
    );
}

// ---- supervisors

#[test]
fn a_shell_loop_that_would_start_it_again_is_named() {
    require!("a_shell_loop_that_would_start_it_again_is_named": root, tcx, criu, migrate);
    let (shared, _lab, host1, host2) = set_up("loop");
    let log = shared.path("log");
    let stop = shared.text_path("stop");
    let count = shared
        .file(
            "count.sh",
            &format!("echo $$ >{}; {COUNT}", shared.text_path("pid")),
        )
        .unwrap();
    let script = shared
        .file(
            "supervise.sh",
            &format!(
                "while [ ! -e {stop} ]; do sh {count} >>{} 2>&1; done\n",
                log.display()
            ),
        )
        .unwrap();
    let start = || {
        let _ = std::fs::remove_file(shared.path("pid"));
        let supervisor = host1
            .spawn_detached(["sh", script.as_str()], "/dev/null")
            .unwrap();
        (supervisor, shared.pid("pid").unwrap())
    };

    let (supervisor, pid) = start();
    let named = format!("sh (PID {supervisor})");
    let way_out = format!("kill {supervisor}");
    refused(
        &host1,
        &host2,
        pid,
        &[],
        &[&named, &way_out, "--supervisor ignore"],
    );

    // The first way out: to move the loop along.
    moved(&host1, &host2, supervisor, &[]);
    assert!(runs(&host2, pid));
    assert!(grows(&log, 10));

    // The second, there: to end it. The tree goes on.
    refused(&host2, &host1, pid, &[], &[&named, &way_out]);
    signal(&host2, "TERM", supervisor);
    assert!(eventually(SOON, || process(&host2, supervisor).is_none()));
    moved(&host2, &host1, pid, &[]);
    assert!(grows(&log, 10));
    contiguous(&read(&log));
    signal(&host1, "KILL", pid);

    // The third: to see to it oneself and say so.
    let (supervisor, pid) = start();
    std::fs::write(shared.path("stop"), "").unwrap();
    moved(&host1, &host2, pid, &["--supervisor", "ignore"]);
    assert!(eventually(SOON, || process(&host1, supervisor).is_none()));
    assert!(grows(&log, 10));
}

#[test]
fn a_runit_service_is_named_with_its_way_out() {
    require!("a_runit_service_is_named_with_its_way_out": root, tcx, criu, migrate, runsv);
    let (shared, _lab, host1, host2) = set_up("runit");
    let log = shared.path("log");
    std::fs::create_dir(shared.path("count")).unwrap();
    let run = format!(
        "#!/bin/sh\nexec </dev/null >>{} 2>&1; echo $$ >{}; {COUNT}\n",
        log.display(),
        shared.text_path("pid")
    );
    let run = shared.file("count/run", &run).unwrap();
    output(&host1, ["chmod", "755", &run]);
    let service = shared.text_path("count");
    let runsv = host1
        .spawn_detached(["runsv", &service], "/dev/null")
        .unwrap();
    let pid = shared.pid("pid").unwrap();
    let named = format!("runsv (PID {runsv})");
    let way_out = format!("sv once {service}");
    refused(&host1, &host2, pid, &[], &[&named, &way_out]);

    output(&host1, ["sv", "once", &service]);
    let told = || output(&host1, ["sv", "status", &service]);
    assert!(
        eventually(SOON, || told().contains("want down")
            || told().contains("once")),
        "{}",
        told()
    );
    moved(&host1, &host2, pid, &[]);
    assert!(grows(&log, 10));
    contiguous(&read(&log));
    // It is not started a second time.
    assert!(
        eventually(SOON, || told().starts_with("down")),
        "{}",
        told()
    );
    assert_eq!(shared.pid("pid").unwrap(), pid);
    signal(&host1, "TERM", runsv);
}

// ---- whose the tree is

#[test]
fn a_moved_tree_is_its_own_and_nothing_else_is_left() {
    require!("a_moved_tree_is_its_own_and_nothing_else_is_left": root, tcx, criu, migrate);
    let (_shared, lab, host1, host2) = set_up("own");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let pid = workload.pid;
    let mut client = workload.client(&lab, 2, &[]).unwrap();
    let of_tree = cgroup(&host1, pid);
    moves(&lab, &workload, HostName::Host1, HostName::Host2);

    // The agent and its login are gone, the tree is not.
    let visitors = || {
        let all = processes(&host2).unwrap();
        all.into_iter()
            .filter(|p| {
                p.name == "migrate"
                    || p.name == "criu"
                    || p.command_line.contains("sshd: ")
                    || p.command_line.starts_with("sshd-session")
            })
            .filter(|p| !p.command_line.contains("[listener]"))
            .collect::<Vec<_>>()
    };
    assert!(
        eventually(SOON, || visitors().is_empty()),
        "{:?}",
        visitors()
    );
    assert!(runs(&host2, pid));
    serves_old_connections(&mut client);

    // It has a place of its own, and init for a parent.
    assert_eq!(process(&host2, pid).unwrap().parent, 1);
    let home = format!("/migrate/echo-server-{pid}");
    assert_eq!(cgroup(&host2, pid).as_deref(), Some(home.as_str()));
    // Of the source's fence and the tree nothing is left.
    assert_eq!(cgroups_made(&host1), Vec::<String>::new());
    assert!(process(&host1, pid).is_none());
    let left = std::fs::read_dir(host1.path("/run/migrate/journal")).unwrap();
    assert_eq!(left.count(), 0, "records on the source");
    for host in [&host1, &host2] {
        let images = host.path("/run/migrate/images");
        let images = std::fs::read_dir(images).map_or(0, Iterator::count);
        assert_eq!(images, 0, "images on {}", host.name());
    }

    // Moved back, it leaves that place, and the place goes.
    moves(&lab, &workload, HostName::Host2, HostName::Host1);
    serves_old_connections(&mut client);
    assert_eq!(cgroups_made(&host2), Vec::<String>::new());
    let home = cgroup(&host1, pid);
    assert_eq!(
        home.as_deref(),
        Some(format!("/migrate/echo-server-{pid}").as_str()),
        "was {of_tree:?}"
    );
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");

    // Init reaps it.
    signal(&host1, "KILL", pid);
    assert!(
        eventually(SOON, || process(&host1, pid).is_none()),
        "{:?}",
        process(&host1, pid)
    );
}

// ---- connections

#[test]
fn a_client_moves_with_the_connections_it_has_opened() {
    require!("a_client_moves_with_the_connections_it_has_opened": root, tcx, criu, migrate);
    let (shared, lab, host1, host2) = set_up("outgoing");
    let client = lab.host(HostName::Client);
    let server = program("echo-server").display().to_string();
    let server = client
        .spawn_detached([server.as_str(), "10.77.0.1:7000"], "/dev/null")
        .unwrap();
    assert!(eventually(SOON, || listens(&client, 7000)));
    // It speaks from the workload's address, not from the host's.
    for host in [&host1, &host2] {
        let route = ["ip", "route", "add", "10.77.0.1/32", "dev", "eth0"];
        let from = ["src", "10.77.0.100"];
        if host.name() == HostName::Host1 {
            output(host, route.iter().chain(&from));
        }
    }
    let verdict = shared.text_path("verdict");
    let command = format!(
        "exec {} echo --addr 10.77.0.1:7000 --connections 5 --interval-us 2000 >>{verdict} 2>&1",
        program("strict-client").display()
    );
    let pid = shell(&host1, &command);
    let asked = |host: &Host| -> u64 {
        let whole = || shared.read("verdict").matches('\n').count();
        let before = whole();
        signal(host, "USR1", pid);
        assert!(eventually(SOON, || whole() > before));
        let text = shared.read("verdict");
        let snapshot: serde_json::Value =
            serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(snapshot["errors"], 0, "{text}");
        assert_eq!(snapshot["live"], 5, "{text}");
        snapshot["requests_min"].as_u64().unwrap()
    };
    assert!(eventually(SOON, || shared
        .read("verdict")
        .contains("ready")));
    assert!(eventually(SOON, || asked(&host1) > 50));
    let migration = moved(&host1, &host2, pid, &[]);
    assert_eq!(migration.expect_committed().connections, 5);
    assert!(has_address(&host2, WORKLOAD_V4.into()).unwrap());
    assert!(!has_address(&host1, WORKLOAD_V4.into()).unwrap());
    let before = asked(&host2);
    assert!(eventually(SOON, || asked(&host2) > before + 50));
    moved(&host2, &host1, pid, &[]);
    let before = asked(&host1);
    assert!(eventually(SOON, || asked(&host1) > before + 50));
    signal(&host1, "TERM", pid);
    assert!(eventually(SOON, || process(&host1, pid).is_none()));
    let text = shared.read("verdict");
    let verdict: migrate_tests::strict::Verdict =
        serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
    signal(&client, "KILL", server);
}

/// A server whose connections stand in every way a connection can stand: the
/// first byte tells how.
const STANDS: &str = r"
import hashlib, signal, socket, struct, sys, threading, time
go = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: go.set())
PATTERN = b''.join(struct.pack('>Q', n) for n in range(1 << 17))
def digest(c):
    total, hash = 0, hashlib.sha256()
    while chunk := c.recv(1 << 16):
        total += len(chunk); hash.update(chunk)
    return '%d %s\n' % (total, hash.hexdigest())
def serve(c):
    mode = c.recv(1)
    if mode == b'r':                    # reads nothing until told
        go.wait(); c.sendall(digest(c).encode())
    elif mode == b'w':                  # has sent what the peer does not read
        c.sendall(PATTERN); go.wait(); c.sendall(b'end')
    elif mode == b'c':                  # the peer has closed its direction
        assert not c.recv(1)
        c.sendall(b'x'); go.wait(); c.sendall(PATTERN)
    elif mode == b's':                  # this side has closed its direction
        c.shutdown(socket.SHUT_WR)
        text = digest(c)
        with open(sys.argv[1], 'w') as f: f.write(text)
    elif mode == b'u':                  # reads all the time
        c.sendall(digest(c).encode())
    elif mode == b'd':                  # writes all the time
        n = 0
        while not go.is_set():
            c.sendall(struct.pack('>100Q', *range(n, n + 100)))
            n += 100
            time.sleep(0.0005)
    c.close()
def accept(s):
    while True:
        threading.Thread(target=serve, args=(s.accept()[0],)).start()
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)    # SO_RCVBUFFORCE
s.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)    # SO_SNDBUFFORCE
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('10.77.0.100', 7100)); s.listen()
threading.Thread(target=accept, args=(s,)).start()
while True:
    signal.pause()
";

/// That server, and the way to it.
struct Stands {
    pid: i32,
    client: Host,
}

/// Longer than any blackout, and than a peer's patience with one.
const STREAM_WAIT: Duration = Duration::from_secs(40);

impl Stands {
    fn start(lab: &Lab, shared: &Shared) -> Self {
        let (host1, client) = (lab.host(HostName::Host1), lab.host(HostName::Client));
        let half = shared.text_path("half");
        let pid = host1
            .spawn_detached([PYTHON, "-c", STANDS, &half], "/dev/null")
            .unwrap();
        assert!(eventually(SOON, || listens(&host1, 7100)));
        Self { pid, client }
    }

    fn connect(&self, mode: u8) -> TcpStream {
        let address = SocketAddr::new(WORKLOAD_V4.into(), 7100);
        let mut stream = self
            .client
            .in_network(|| TcpStream::connect_timeout(&address, SOON))
            .unwrap()
            .unwrap();
        stream.set_read_timeout(Some(STREAM_WAIT)).unwrap();
        stream.set_write_timeout(Some(STREAM_WAIT)).unwrap();
        stream.write_all(&[mode]).unwrap();
        stream
    }
}

/// One connection that is written to and one that is read from all the time.
/// Nobody waits for a reply: whatever the kernel takes and then forgets is
/// missed.
struct Streams {
    stop: Arc<AtomicBool>,
    up: thread::JoinHandle<(u64, String, String)>,
    down: thread::JoinHandle<u64>,
    /// Bytes that came down so far.
    received: Arc<AtomicU64>,
}

impl Streams {
    fn start(server: &Stands) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let mut stream = server.connect(b'u');
        let up = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let (mut number, mut hash) = (0_u64, Sha256::new());
                while !stop.load(Ordering::Relaxed) {
                    let block: Vec<u8> =
                        (number..number + 100).flat_map(u64::to_be_bytes).collect();
                    stream.write_all(&block).unwrap();
                    hash.update(&block);
                    number += 100;
                    thread::sleep(Duration::from_micros(500));
                }
                stream.shutdown(Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                (number, hex(&hash.finalize()), answer)
            })
        };
        let stream = server.connect(b'd');
        let down = {
            let received = Arc::clone(&received);
            thread::spawn(move || {
                let mut stream = BufReader::new(stream);
                let mut expected = 0_u64;
                loop {
                    let mut number = [0; 8];
                    match stream.read_exact(&mut number) {
                        Ok(()) => assert_eq!(u64::from_be_bytes(number), expected),
                        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return expected,
                        Err(error) => panic!("after {expected} numbers: {error}"),
                    }
                    expected += 1;
                    received.store(expected * 8, Ordering::Relaxed);
                }
            })
        };
        Self {
            stop,
            up,
            down,
            received,
        }
    }

    /// Waits until more has come down.
    #[track_caller]
    fn flow(&self) {
        let before = self.received.load(Ordering::Relaxed);
        let more = || self.received.load(Ordering::Relaxed) > before + 100_000;
        assert!(eventually(STREAM_WAIT, more) || self.down.is_finished());
    }

    /// Ends both; the server has to have been told to.
    #[track_caller]
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (numbers, due, answer) = self.up.join().unwrap();
        assert_eq!(answer, format!("{} {due}\n", numbers * 8), "what went up");
        assert!(self.down.join().unwrap() > 0, "what came down");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes in the send and the receive queues of a host's connections to a port.
fn queued(host: &Host, port: u16) -> (u64, u64) {
    let table = read(std::path::Path::new(&format!(
        "/proc/{}/net/tcp",
        host.init_pid()
    )));
    let local = format!(":{port:04X}");
    let queues = table.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        // Of a listener these are other numbers.
        if !columns.get(1)?.ends_with(&local) || *columns.get(3)? == "0A" {
            return None;
        }
        let (sent, received) = columns.get(4)?.split_once(':')?;
        let number = |hex| u64::from_str_radix(hex, 16).ok();
        Some((number(sent)?, number(received)?))
    });
    queues.fold((0, 0), |sum, (sent, received)| {
        (sum.0 + sent, sum.1 + received)
    })
}

#[test]
fn half_closed_connections_and_full_queues_move_byte_for_byte() {
    require!("half_closed_connections_and_full_queues_move_byte_for_byte": root, tcx, criu, migrate, python);
    const BYTES: usize = 1 << 20;
    let (shared, lab, host1, host2) = set_up("queues");
    let server = Stands::start(&lab, &shared);
    let pid = server.pid;
    let pattern: Vec<u8> = (0..BYTES as u64 / 8).flat_map(u64::to_be_bytes).collect();
    let due = format!("{BYTES} {}\n", hex(&Sha256::digest(&pattern)));
    let streams = Streams::start(&server);
    let mut unread = server.connect(b'r');
    let writer = {
        let (mut stream, pattern) = (unread.try_clone().unwrap(), pattern.clone());
        thread::spawn(move || {
            stream.write_all(&pattern).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let mut unsent = server.connect(b'w');
    let mut closed_here = server.connect(b'c');
    closed_here.shutdown(Shutdown::Write).unwrap();
    closed_here.read_exact(&mut [0]).unwrap();
    let mut closed_there = server.connect(b's');
    assert_eq!(closed_there.read(&mut [0]).unwrap(), 0);
    closed_there.write_all(&pattern[..1000]).unwrap();
    let half = BYTES as u64 / 2;
    let full = || {
        let (sent, received) = queued(&host1, 7100);
        sent > half && received > half
    };
    assert!(eventually(SOON, full), "queued: {:?}", queued(&host1, 7100));

    streams.flow();
    let migration = moved(&host1, &host2, pid, &[]);
    assert_eq!(migration.expect_committed().connections, 6);
    streams.flow();
    // It asks the peer's window anew.
    closed_there.write_all(&pattern[1000..]).unwrap();
    closed_there.shutdown(Shutdown::Write).unwrap();
    signal(&host2, "USR1", pid);
    streams.end();

    let mut text = String::new();
    writer.join().unwrap();
    unread.read_to_string(&mut text).unwrap();
    assert_eq!(text, due, "what was not read yet");
    let mut bytes = Vec::new();
    unsent.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), BYTES + 3, "what was not sent yet");
    assert!(bytes.starts_with(&pattern) && bytes.ends_with(b"end"));
    let mut bytes = Vec::new();
    closed_here.read_to_end(&mut bytes).unwrap();
    assert!(
        bytes == pattern,
        "{} bytes to a peer that has closed",
        bytes.len()
    );
    assert!(
        eventually(SOON, || shared.read("half") == due),
        "from a peer to one that has closed: {}",
        shared.read("half")
    );
}

/// memcached on three sockets and two addresses, with a client at each.
fn several_listeners(lab: &Lab) -> (i32, Vec<migrate_tests::client::StrictClient>) {
    let host1 = lab.host(HostName::Host1);
    let listen = format!("{WORKLOAD_V4}:11211,{WORKLOAD_V4}:11311,[{WORKLOAD_V6}]:11211");
    let pid = host1
        .spawn_detached(
            [
                "memcached",
                "-u",
                "root",
                "-l",
                &listen,
                "-t",
                "2",
                "-m",
                "64",
            ],
            "/dev/null",
        )
        .unwrap();
    for port in [11211, 11311] {
        assert!(eventually(SOON, || listens(&host1, port)));
    }
    let addresses = [
        SocketAddr::new(WORKLOAD_V4.into(), 11211),
        SocketAddr::new(WORKLOAD_V4.into(), 11311),
        SocketAddr::new(WORKLOAD_V6.into(), 11211),
    ];
    let clients = addresses.iter().map(|address| {
        let client = lab.host(HostName::Client);
        let address = address.to_string();
        let words = ["memcached", "--addr", &address, "--connections", "3"];
        migrate_tests::client::StrictClient::start(&client, words).unwrap()
    });
    (pid, clients.collect())
}

/// Both addresses are on the one host and not on the other.
#[track_caller]
fn addresses_are_on(host: &Host, and_not_on: &Host) {
    for address in [IpAddr::from(WORKLOAD_V4), WORKLOAD_V6.into()] {
        for (host, expected) in [(host, true), (and_not_on, false)] {
            let has = has_address(host, address).unwrap();
            assert_eq!(has, expected, "{address} on {}", host.name());
        }
    }
}

#[test]
fn several_listeners_and_both_addresses_move() {
    require!("several_listeners_and_both_addresses_move": root, tcx, criu, migrate, memcached);
    let (_shared, lab, host1, host2) = set_up("several");
    let (pid, mut clients) = several_listeners(&lab);
    for (from, to) in [(&host1, &host2), (&host2, &host1)] {
        clients.iter_mut().for_each(serves_old_connections);
        let migration = moved(from, to, pid, &[]);
        assert_eq!(migration.expect_committed().connections, 9);
        addresses_are_on(to, from);
        clients.iter_mut().for_each(serves_old_connections);
        // Those that come now find it, too.
        for address in [IpAddr::from(WORKLOAD_V4), WORKLOAD_V6.into()] {
            let client = lab.host(HostName::Client);
            let address = SocketAddr::new(address, 11211);
            let mut stream = client
                .in_network(|| TcpStream::connect_timeout(&address, SOON))
                .unwrap()
                .unwrap();
            stream.write_all(b"version\r\n").unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            let mut reply = [0; 7];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(&reply, b"VERSION");
        }
    }
    for client in clients {
        let verdict = client.stop().unwrap();
        assert!(verdict.is_clean(), "{verdict:?}");
    }
}

// ---- a standing agent

/// An authority and certificates from it.
struct Authority<'a> {
    shared: &'a Shared,
    name: &'static str,
}

impl<'a> Authority<'a> {
    fn new(shared: &'a Shared, name: &'static str) -> Self {
        let authority = Self { shared, name };
        let (key, certificate) = (authority.path("key"), authority.path("pem"));
        openssl(&format!(
            "req -x509 {NEW_KEY} -days 2 -subj /CN={name} -keyout {key} -out {certificate}"
        ));
        authority
    }

    fn path(&self, what: &str) -> String {
        self.shared.text_path(&format!("{}.{what}", self.name))
    }

    /// `--ca`, `--cert` and `--key` for a host.
    fn options(&self, host: &str) -> Vec<String> {
        let of_host = |what: &str| self.path(&format!("{host}.{what}"));
        let (key, request, certificate) = (of_host("key"), of_host("csr"), of_host("pem"));
        openssl(&format!(
            "req -new {NEW_KEY} -subj /CN={host} -addext subjectAltName=DNS:{host} -keyout {key} -out {request}"
        ));
        let (ca, ca_key) = (self.path("pem"), self.path("key"));
        openssl(&format!(
            "x509 -req -in {request} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 2 \
             -copy_extensions copy -out {certificate}"
        ));
        ["--ca", &ca, "--cert", &certificate, "--key", &key]
            .map(str::to_owned)
            .to_vec()
    }
}

const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

fn openssl(arguments: &str) {
    let output = std::process::Command::new("openssl")
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "openssl {arguments}: {output:?}");
}

/// Starts a standing agent on `host2`.
fn standing_agent(host2: &Host, options: &[String], criu: Option<&str>) -> i32 {
    let listen = format!("{}:7700", host2.ipv4());
    let criu = criu.map(|path| format!("MIGRATE_CRIU={path}"));
    let mut words: Vec<&str> = vec!["env"];
    words.extend(criu.as_deref());
    words.extend(["migrate", "agent", "--listen", &listen]);
    words.extend(options.iter().map(String::as_str));
    let pid = host2.spawn_detached(words, "/run/agent.log").unwrap();
    assert!(
        eventually(SOON, || listens(host2, 7700)),
        "{}",
        read(&host2.path("/run/agent.log"))
    );
    pid
}

#[test]
fn a_standing_agent_takes_trees_from_its_own_authority_only() {
    require!("a_standing_agent_takes_trees_from_its_own_authority_only": root, tcx, criu, migrate, openssl);
    let (shared, lab, host1, host2) = set_up("standing");
    let (ours, theirs) = (
        Authority::new(&shared, "ours"),
        Authority::new(&shared, "theirs"),
    );
    let own = ours.options("host2");
    let with_metrics = |place: &str| {
        let options = ["--metrics", place].map(str::to_owned);
        standing_agent(&host2, &[&own[..], &options].concat(), None)
    };
    let agent = with_metrics("127.0.0.1:9464");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let pid = workload.pid.to_string();
    let mut client = workload.client(&lab, 3, &[]).unwrap();
    let (mine, strange) = (ours.options("host1"), theirs.options("host1"));
    let try_with = |to: &str, options: &[String]| {
        let mut arguments = vec!["--to", to];
        arguments.extend(options.iter().map(String::as_str));
        arguments.push(&pid);
        migrate(&host1, arguments).unwrap()
    };

    // No certificates, some certificates, certificates without a port.
    for (to, options) in [
        ("host2:7700", &mine[..0]),
        ("host2:7700", &mine[..4]),
        ("host2", &mine[..]),
    ] {
        let migration = try_with(to, options);
        assert_eq!(migration.code, Some(2), "{to} {options:?}: {migration:#?}");
        assert!(
            migration.stderr.contains("--cert") || migration.stderr.contains("port"),
            "{migration:#?}"
        );
    }
    // A stranger to it, a stranger to us, and one who is not who we asked for.
    let mixed = [&mine[..2], &strange[2..]].concat();
    let mistrusting = [&strange[..2], &mine[2..]].concat();
    for (to, options) in [
        ("host2:7700", &mixed),
        ("host2:7700", &mistrusting),
        ("10.77.0.12:7700", &mine),
    ] {
        let migration = try_with(to, options);
        assert_eq!(migration.code, Some(4), "{to} {options:?}: {migration:#?}");
        serves_old_connections(&mut client);
    }

    let migration = try_with("host2:7700", &mine);
    let report = migration.expect_committed();
    assert_eq!(report.connections, 3);
    serves_old_connections(&mut client);
    let figures = host2
        .in_network(|| scrape(TcpStream::connect("127.0.0.1:9464").unwrap()))
        .unwrap();
    let figure = |name: &str| figure(&figures, name);
    assert_eq!(
        figure("migrate_migrations_total{outcome=\"committed\"}"),
        1.0
    );
    assert_eq!(figure("migrate_migrations_total{outcome=\"undone\"}"), 0.0);
    assert_eq!(figure("migrate_step_seconds_count{step=\"restore\"}"), 1.0);
    // It stood still from its freezing on, and peers waited from before that.
    let still_s = figure("migrate_still_seconds_sum");
    let blackout_s = Duration::from_micros(report.blackout.total_us()).as_secs_f64();
    assert!(
        still_s > 0.0 && still_s <= blackout_s,
        "{still_s} of {blackout_s}"
    );
    assert_eq!(figure("migrate_still_seconds_bucket{le=\"+Inf\"}"), 1.0);
    // The agent's end is not the tree's.
    let home = format!("/migrate/echo-server-{pid}");
    assert_eq!(cgroup(&host2, workload.pid), Some(home));
    assert_ne!(cgroup(&host2, agent), cgroup(&host2, workload.pid));
    signal(&host2, "TERM", agent);
    assert!(eventually(SOON, || process(&host2, agent).is_none()));
    serves_old_connections(&mut client);
    assert_eq!(process(&host2, workload.pid).unwrap().parent, 1);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");

    // The same over a socket, also one that a dead agent has left.
    for _ in 0..2 {
        let agent = with_metrics("unix:/run/metrics.sock");
        let socket = UnixStream::connect(host2.path("/run/metrics.sock")).unwrap();
        let figures = scrape(socket);
        assert_eq!(self::figure(&figures, "migrate_under_way"), 0.0);
        signal(&host2, "KILL", agent);
        assert!(eventually(SOON, || process(&host2, agent).is_none()));
    }
}

/// What Prometheus would read.
fn scrape(mut stream: impl std::io::Read + std::io::Write) -> String {
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    said
}

fn figure(figures: &str, name: &str) -> f64 {
    let value = figures.lines().find_map(|line| line.strip_prefix(name));
    let value = value.unwrap_or_else(|| panic!("no {name}: {figures}"));
    value.trim().parse().unwrap()
}

// ---- the gate

/// The hardware address of a host's interface.
fn hardware_address(host: &Host) -> String {
    output(host, ["cat", "/sys/class/net/eth0/address"])
        .trim()
        .to_owned()
}

#[test]
fn the_destination_is_silent_until_the_tree_is_its_own() {
    require!("the_destination_is_silent_until_the_tree_is_its_own": root, tcx, criu, migrate, memcached, openssl, tcpdump);
    let (shared, lab, host1, host2) = set_up("silent");
    let client = lab.host(HostName::Client);
    let authority = Authority::new(&shared, "ours");
    let criu = waiting_criu(&shared, "go").unwrap();
    standing_agent(&host2, &authority.options("host2"), Some(&criu));
    let (pid, mut clients) = several_listeners(&lab);

    let mut resets = Capture::start(
        &client,
        "tcp[tcpflags] & tcp-rst != 0 or (ip6 and ip6[6] == 6 and ip6[53] & 4 != 0)",
    )
    .unwrap();
    let mut neighbours = Capture::start(&client, "arp or icmp6").unwrap();
    let addresses = [WORKLOAD_V4.to_string(), WORKLOAD_V6.to_string()];
    let told_by = |lines: &[String], host: &Host| -> Vec<String> {
        let from = format!("{} >", hardware_address(host));
        let about_it = |line: &str| addresses.iter().any(|address| line.contains(address));
        let of_host = lines
            .iter()
            .filter(|line| line.contains(&from) && about_it(line));
        of_host.cloned().collect()
    };
    // A question that nobody answers, about an address that is nobody's.
    let ask = |last: u8| {
        let nobody = SocketAddr::from(([10, 77, 0, last], 9));
        client
            .in_network(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
                socket.send_to(b"?", nobody)
            })
            .unwrap()
            .unwrap();
        format!("who-has 10.77.0.{last} ")
    };

    let mut arguments = vec!["--to".to_owned(), "host2:7700".to_owned()];
    arguments.extend(authority.options("host1"));
    arguments.push(pid.to_string());
    let migration = Running::start(&host1, &[], arguments).unwrap();
    assert!(eventually(SOON, || shared.path("go.waits").exists()));
    // Both hosts have the addresses now, and everybody asks who does.
    for address in [IpAddr::from(WORKLOAD_V4), WORKLOAD_V6.into()] {
        assert!(has_address(&host1, address).unwrap() && has_address(&host2, address).unwrap());
    }
    for _ in 0..5 {
        for address in &addresses {
            let _ = client
                .exec(["ip", "neigh", "del", address, "dev", "eth0"])
                .unwrap();
        }
        clients.iter_mut().for_each(serves_old_connections);
    }
    let before = neighbours.up_to(&ask(250)).unwrap();
    assert_eq!(told_by(&before, &host2), Vec::<String>::new());
    let answers = told_by(&before, &host1);
    for address in &addresses {
        assert!(
            answers.iter().any(|line| line.contains(address)),
            "{address}: {before:#?}"
        );
    }

    std::fs::write(shared.path("go"), "").unwrap();
    let (code, events, stderr) = migration.end().unwrap();
    assert_eq!(code, Some(0), "{events:#?} {stderr}");
    addresses_are_on(&host2, &host1);
    clients.iter_mut().for_each(serves_old_connections);
    let after = neighbours.up_to(&ask(251)).unwrap();
    let announced = told_by(&after, &host2);
    for address in &addresses {
        assert!(
            announced.iter().any(|line| line.contains(address)),
            "{address}: {after:#?}"
        );
    }
    for client in clients {
        let verdict = client.stop().unwrap();
        assert!(verdict.is_clean(), "{verdict:?}");
    }
    // The one reset of the whole test is the test's own.
    let refused = SocketAddr::new(host1.ipv4().into(), 9);
    let outcome = client.in_network(|| TcpStream::connect(refused)).unwrap();
    assert!(outcome.is_err());
    let seen = resets.up_to("10.77.0.11.9 > ").unwrap();
    assert_eq!(seen, Vec::<String>::new());
    no_gate_left(&host1);
    no_gate_left(&host2);
}

/// Has it stand still when the tree is frozen and the gate closed.
const AT_DUMP: (&str, &str) = ("MIGRATE_STOP_AT", "dump");
/// Has it stand still when the rounds are over and the tree still runs.
const AT_FREEZE: (&str, &str) = ("MIGRATE_STOP_AT", "freeze");

/// Kills a `migrate` and the guard that would clear up after it.
fn kill_with_guard(migration: Running, host: &Host) {
    let guards = guards(host);
    assert!(!guards.is_empty());
    for guard in guards {
        nix::sys::signal::kill(guard, Signal::SIGKILL).unwrap();
    }
    migration.kill(host).unwrap();
}

#[test]
fn a_killed_owner_leaves_an_open_gate_that_unlock_removes() {
    require!("a_killed_owner_leaves_an_open_gate_that_unlock_removes": root, tcx, criu, migrate);
    let (shared, lab, host1, host2) = set_up("killed");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, 3, &[]).unwrap();
    let pid = workload.pid.to_string();
    let criu = waiting_criu(&shared, "go").unwrap();
    let migration =
        Running::start(&host1, &[("MIGRATE_CRIU", &criu)], ["--to", "host2", &pid]).unwrap();
    assert!(eventually(SOON, || shared.path("go.waits").exists()));
    kill_with_guard(migration, &host1);
    std::fs::write(shared.path("go"), "").unwrap();
    serves_old_connections(&mut client);

    let status = output(&host1, ["migrate", "status"]);
    assert!(status.contains("owner is dead"), "{status}");
    assert!(status.contains("migrate unlock"), "{status}");
    assert!(!migrate_tests::hosts::gates(&host1).unwrap().is_empty());
    // The other side undoes what it has done, by itself.
    let undone = || {
        !has_address(&host2, WORKLOAD_V4.into()).unwrap()
            && migrate_tests::hosts::gates(&host2).unwrap().is_empty()
    };
    assert!(eventually(SOON, undone));

    output(&host1, ["migrate", "unlock"]);
    no_gate_left(&host1);
    assert_eq!(cgroups_made(&host1), Vec::<String>::new());
    let status = output(&host1, ["migrate", "status"]);
    assert!(status.contains("nothing was left behind"), "{status}");
    serves_old_connections(&mut client);
    moves(&lab, &workload, HostName::Host1, HostName::Host2);
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

/// Where the vDSO is after exec nobody has sent it from, and CRIU takes it for sent.
#[test]
fn a_process_that_calls_exec_after_the_last_round_moves() {
    require!("a_process_that_calls_exec_after_the_last_round_moves": root, tcx, criu, migrate, python);
    let (_shared, _lab, host1, host2) = set_up("exec");
    let script = "import os, signal\n\
                  become = lambda *_: os.execv('/bin/sleep', ['sleep', '1000'])\n\
                  signal.signal(signal.SIGUSR1, become)\n\
                  while True: signal.pause()";
    let pid = host1
        .spawn_detached([PYTHON, "-c", script], "/dev/null")
        .unwrap();
    assert!(eventually(SOON, || catches(&host1, pid, Signal::SIGUSR1)));
    let arguments = ["--to", "host2", &pid.to_string()];
    let migration = Running::start(&host1, &[AT_FREEZE], arguments).unwrap();
    let held = Held::by_itself(driver(&host1));
    signal(&host1, "USR1", pid);
    assert!(eventually(SOON, || process_name(&host1, pid) == "sleep"));
    drop(held);
    let (code, events, stderr) = migration.end().unwrap();
    assert_eq!(code, Some(0), "{events:#?} {stderr}");
    assert!(runs(&host2, pid) && !runs(&host1, pid));
    assert_eq!(process_name(&host2, pid), "sleep");
}

#[test]
fn a_gate_that_its_dead_owner_left_closed_opens_by_itself() {
    require!("a_gate_that_its_dead_owner_left_closed_opens_by_itself": root, tcx, criu, migrate, redis);
    let (_shared, lab, host1, host2) = set_up("lease");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload.client(&lab, 3, &[]).unwrap();
    let pid = workload.pid.to_string();
    let migration = Running::start(&host1, &[AT_DUMP], ["--to", "host2", &pid]).unwrap();
    let held = Held::by_itself(driver(&host1));
    kill_with_guard(migration, &host1);
    drop(held);
    // Nobody renews the lease; the connections go on when it has run out.
    assert!(runs(&host1, workload.pid));
    serves_old_connections(&mut client);
    let status = output(&host1, ["migrate", "status"]);
    assert!(status.contains("owner is dead"), "{status}");
    let undone = || {
        !has_address(&host2, WORKLOAD_V4.into()).unwrap()
            && migrate_tests::hosts::gates(&host2).unwrap().is_empty()
    };
    assert!(eventually(SOON, undone));
    // The same command sweeps and succeeds.
    moved(&host1, &host2, workload.pid, &["--max-blackout", "60"]);
    serves_old_connections(&mut client);
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn a_gate_that_opened_by_itself_is_no_way_to_a_commit() {
    require!("a_gate_that_opened_by_itself_is_no_way_to_a_commit": root, tcx, criu, migrate, python, tcpdump);
    /// Longer than the lease of the gate.
    const STOPPED: Duration = Duration::from_secs(5);
    let (shared, lab, host1, host2) = set_up("expired");
    let server = Stands::start(&lab, &shared);
    let pid = server.pid;
    let client = lab.host(HostName::Client);
    let streams = Streams::start(&server);
    let mut unsent = server.connect(b'w');
    assert!(eventually(SOON, || queued(&host1, 7100).0 > 500_000));
    // Whatever the other host would say in the name of the tree.
    let filter = format!(
        "tcp and ether src {} and (src host {WORKLOAD_V4} or dst port 9)",
        hardware_address(&host2)
    );
    let mut spoken = Capture::start(&client, &filter).unwrap();

    let arguments = ["--to", "host2", "--max-blackout", "60", &pid.to_string()];
    let migration = Running::start(&host1, &[AT_DUMP], arguments).unwrap();
    let held = Held::by_itself(driver(&host1));
    // The lease itself is under test, so time must pass.
    thread::sleep(STOPPED);
    drop(held);
    let (code, events, stderr) = migration.end().unwrap();
    assert_eq!(code, Some(6), "{events:#?} {stderr}");
    assert!(
        events.iter().any(|event| event.contains("lease")),
        "{events:#?}"
    );
    assert!(runs(&host1, pid));
    no_gate_left(&host1);
    no_gate_left(&host2);
    streams.flow();

    let of_host2 = SocketAddr::new(client.ipv4().into(), 9);
    let outcome = host2.in_network(|| TcpStream::connect(of_host2)).unwrap();
    assert!(outcome.is_err());
    let said = spoken.up_to("10.77.0.1.9: ").unwrap();
    assert_eq!(said, Vec::<String>::new());

    signal(&host1, "USR1", pid);
    streams.end();
    let mut bytes = Vec::new();
    unsent.read_to_end(&mut bytes).unwrap();
    let pattern: Vec<u8> = (0..1_u64 << 17).flat_map(u64::to_be_bytes).collect();
    assert!(bytes.starts_with(&pattern) && bytes.ends_with(b"end"));
    assert_eq!(bytes.len(), pattern.len() + 3);
}
