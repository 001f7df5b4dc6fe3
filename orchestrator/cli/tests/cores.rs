//! Our processes see other programs' memory and leave no core dumps.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// A shell in a directory of its own, where core dumps are allowed.
fn shell(script: &str, directory: &Path) -> Child {
    Command::new("sh")
        .args(["-c", &format!("ulimit -c unlimited && {script}")])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn an_aborted_agent_leaves_no_core() {
    if !geteuid().is_root() {
        println!("SKIP an_aborted_agent_leaves_no_core: needs root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let other = shell("kill -ABRT $$", directory.path()).wait().unwrap();
    if !other.core_dumped() {
        println!("SKIP an_aborted_agent_leaves_no_core: no program leaves a core here");
        return;
    }
    let program = format!("exec {} agent --stdio", env!("CARGO_BIN_EXE_migrate"));
    let mut agent = shell(&program, directory.path());
    let pid = Pid::from_raw(i32::try_from(agent.id()).unwrap());
    // It has several threads when it is about to serve, and not before.
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_dir(format!("/proc/{pid}/task")).unwrap().count() < 2 {
        assert!(Instant::now() < deadline, "the agent begins");
        thread::yield_now();
    }
    // What it starts, CRIU for one, has the limit that stops dumps to programs, too.
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .and_then(|line| line.split_whitespace().next());
    assert_eq!(core, Some("1"), "{limits}");
    kill(pid, Signal::SIGABRT).unwrap();
    let agent = agent.wait().unwrap();
    assert_eq!(agent.signal(), Some(Signal::SIGABRT as i32));
    assert!(!agent.core_dumped());
}
