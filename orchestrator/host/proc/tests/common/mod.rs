//! Processes that the tests start themselves, and end.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Ends the test where it cannot run, visibly.
macro_rules! require {
    (root) => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP {}: needs root", module_path!());
            return;
        }
    };
    (cgroup2) => {
        if !common::has_cgroup2() {
            println!("SKIP {}: no writable cgroup v2", module_path!());
            return;
        }
    };
}
pub(crate) use require;

/// Whether a cgroup v2 hierarchy is there and can be written.
pub fn has_cgroup2() -> bool {
    cgroup2().is_some_and(|point| {
        let probe = std::path::Path::new(&point).join(format!("probe-{}", std::process::id()));
        std::fs::create_dir(&probe).is_ok() && std::fs::remove_dir(&probe).is_ok()
    })
}

/// Where cgroup v2 is mounted.
pub fn cgroup2() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| fields[1].to_owned())
    })
}

/// A process tree that ends with the test.
pub struct Running {
    pub child: Child,
    lines: Option<BufReader<ChildStdout>>,
}

impl Running {
    /// Starts a command in a session of its own, all streams on /dev/null.
    pub fn start(command: &[&str]) -> Self {
        Self::with(command, |command| {
            command.stdout(Stdio::null());
        })
    }

    /// As `start`, with changes; piped output can be read by `line`.
    pub fn with(command: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut built = Command::new(command[0]);
        built
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        change(&mut built);
        // SAFETY: both calls are async-signal-safe and allocate nothing.
        unsafe {
            built.pre_exec(|| {
                // What whoever started the tests left open is no part of them.
                let flags = libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0);
                libc::close_range(3, libc::c_uint::MAX, flags);
                nix::unistd::setsid().map(drop).map_err(Into::into)
            });
        }
        let mut child = built.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let lines = child.stdout.take().map(BufReader::new);
        let running = Self { child, lines };
        // Whoever starts a program goes on before it has its name and its
        // memory. The words of its command line come last.
        let line = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let (pid, ours) = (running.pid().to_string(), line("self"));
        eventually("the program begins", || {
            let words = line(&pid);
            (!words.is_empty() && words != ours) || state(running.pid()) == 'Z'
        });
        running
    }

    /// A Python program that says `ready` once it is.
    pub fn python(program: &str) -> Self {
        let mut running = Self::with(&["python3", "-c", program], |_| {});
        assert_eq!(running.line(), "ready", "{program}");
        running
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.as_mut().unwrap().read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn tree(&self) -> migrate_proc::Tree {
        migrate_proc::tree(self.pid()).unwrap()
    }

    /// Waits until the tree has this many processes.
    pub fn await_processes(&self, count: usize) -> migrate_proc::Tree {
        let mut tree = self.tree();
        eventually("processes", || {
            tree = self.tree();
            tree.processes.len() == count
        });
        tree
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(tree) = migrate_proc::tree(self.pid()) {
            let _ = migrate_proc::kill_tree(&tree.pids());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a state that no event tells of, bounded.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// User and system time of a process, in ticks.
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// State letter of a thread.
pub fn state(tid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

/// Whether a busy process gets no processor time.
pub fn stands_still(pid: i32) -> bool {
    let before = cpu_ticks(pid);
    // Ten ticks of 10 ms: there is no event for "nothing happens".
    std::thread::sleep(Duration::from_millis(100));
    cpu_ticks(pid) == before
}

/// Waits until a busy process gets processor time.
pub fn await_running(pid: i32) {
    let before = cpu_ticks(pid);
    eventually("runs", || cpu_ticks(pid) > before);
}
