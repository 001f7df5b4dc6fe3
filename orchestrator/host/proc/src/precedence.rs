//! Precedence over what else runs on a host, for the time in which a tree stands still.

use std::sync::{Mutex, PoisonError};

use rustix::process::{Pid, getpriority_process, setpriority_process};

use crate::error::ProcError;
use crate::read;

/// Processes with this adjustment are never killed for memory (`OOM_SCORE_ADJ_MIN` of
/// `include/uapi/linux/oom.h`).
const NEVER_KILLED: &str = "-1000";

/// The highest of the priorities that `nice` knows.
const FIRST: i32 = -20;

/// A tenth of what a thread of the usual priority gets of a CPU that both want
/// (`sched_prio_to_weight` of `kernel/sched/core.c`).
const BEHIND: i32 = 10;

/// Looks at the threads of a process that may have started others meanwhile.
const LOOKS_MAX: usize = 4;

/// What this process had before, and for how many it goes first.
static TAKEN: Mutex<Option<(i32, usize)>> = Mutex::new(None);

/// This process, and those that are named, go before others on a busy host. Peers of a
/// tree that stands still wait for nobody else there; and a task that CRIU makes gets the
/// priority it had from its image at the end (`restore_sched_info` in CRIU 4.2).
///
/// Dropped, this process is as it was before; the others are expected to end soon.
/// Without `CAP_SYS_NICE` nothing changes.
#[derive(Debug)]
pub struct Precedence(());

impl Precedence {
    /// Takes it.
    #[must_use]
    pub fn take(others: &[i32]) -> Self {
        let own = std::process::id().cast_signed();
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.as_mut() {
            Some((_, holders)) => *holders += 1,
            None => {
                // Every process has one.
                let before = getpriority_process(None).unwrap_or(0);
                *taken = Some((before, 1));
                set(own, |_| FIRST);
            }
        }
        for pid in others {
            set(*pid, |_| FIRST);
        }
        Self(())
    }
}

impl Drop for Precedence {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.as_mut() {
            Some((_, holders)) if *holders > 1 => *holders -= 1,
            Some((before, _)) => {
                let before = *before;
                set(std::process::id().cast_signed(), |_| before);
                *taken = None;
            }
            None => {}
        }
    }
}

/// Whatever else runs short of memory, neither these processes nor this one are killed
/// for it, until they end: not for processes that may run again.
///
/// # Errors
/// The first one with which that cannot be done; the others are tried all the same. Those
/// that have ended are no error.
pub fn never_killed_for_memory(pids: &[i32]) -> Result<(), ProcError> {
    let own = std::process::id().cast_signed();
    let mut done = Ok(());
    for &pid in pids.iter().chain([&own]) {
        let path = read::of(pid, "oom_score_adj");
        match std::fs::write(&path, NEVER_KILLED) {
            Err(source) if !read::is_gone(&source) => {
                done = done.and(Err(ProcError::Write {
                    attempt: "write",
                    path,
                    source,
                }));
            }
            _ => {}
        }
    }
    done
}

/// These processes, which are about to be killed, go behind others on a busy host: to give
/// back 4 GiB keeps a CPU busy for a third of a second.
pub fn end_behind_others(pids: &[i32]) {
    for &pid in pids {
        set(pid, |now| now.max(BEHIND));
    }
}

/// For all threads of a process: Linux knows priorities of threads alone.
fn set(pid: i32, priority: impl Fn(i32) -> i32) {
    for _ in 0..LOOKS_MAX {
        let mut changed = false;
        for thread in threads(pid) {
            let now = getpriority_process(Some(thread));
            let then = now.map(&priority);
            if let (Ok(now), Ok(then)) = (now, then)
                && now != then
            {
                if let Err(error) = setpriority_process(Some(thread), then) {
                    tracing::debug!(%error, pid, "others on this host go first");
                    return;
                }
                changed = true;
            }
        }
        if !changed {
            return;
        }
    }
}

fn threads(pid: i32) -> Vec<Pid> {
    let entries = std::fs::read_dir(read::of(pid, "task"));
    let names = entries.into_iter().flatten().flatten();
    names
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn priorities(pid: i32) -> Vec<i32> {
        let of = |thread| getpriority_process(Some(thread)).ok();
        threads(pid).into_iter().filter_map(of).collect()
    }

    /// One test, for all of them are about this process.
    #[test]
    fn all_threads_go_first_until_the_last_holder_has_done() {
        let own = std::process::id().cast_signed();
        let (end, ended) = mpsc::channel::<()>();
        let waiting = thread::spawn(move || ended.recv());
        let before = getpriority_process(None).unwrap();

        let first = Precedence::take(&[]);
        if priorities(own).contains(&before) {
            println!("SKIP all_threads_go_first_until_the_last_holder_has_done: no CAP_SYS_NICE");
            return;
        }
        // It begins with the priority of whoever starts it.
        let late = thread::spawn(|| getpriority_process(None).unwrap());
        assert_eq!(late.join().unwrap(), FIRST);
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        setpriority_process(Pid::from_raw(pid), before).unwrap();
        let second = Precedence::take(&[pid]);
        assert_eq!(priorities(pid), [FIRST]);
        drop(first);
        assert!(priorities(own).iter().all(|&now| now == FIRST));
        drop(second);
        assert!(priorities(own).iter().all(|&now| now == before));
        drop(end);
        assert!(waiting.join().unwrap().is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_about_to_end_goes_behind_others() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let before = priorities(pid);
        end_behind_others(&[pid]);
        let after = priorities(pid);
        // What is further behind already stays there.
        end_behind_others(&[pid]);
        assert_eq!(priorities(pid), after);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(after, [before[0].max(BEHIND)]);
    }
}
