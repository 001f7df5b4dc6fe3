//! How long a tree's threads run, and wait to.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use migrate_core::pace::CpuTime;

use crate::read;

/// Threads that are looked at. The busiest tell; a look at each takes some 2 µs, and there
/// are a hundred looks a second.
const THREADS_MAX: usize = 16;

/// The accounts of a tree's busiest threads.
#[derive(Debug)]
pub struct CpuWatch {
    accounts: Vec<File>,
}

impl CpuWatch {
    /// Of those threads of these processes that have run longest until now.
    #[must_use]
    pub fn of(pids: &[i32]) -> Self {
        let mut threads: Vec<(u64, File)> = Vec::new();
        for pid in pids {
            // What has ended does not run.
            for thread in read::numbers(read::of(*pid, "task")).unwrap_or_default() {
                let path = read::of(*pid, "task").join(format!("{thread}/schedstat"));
                let Ok(account) = File::open(path) else {
                    continue;
                };
                if let Some(time) = look(&account) {
                    let at = threads.partition_point(|(ran_ns, _)| *ran_ns >= time.ran_ns);
                    threads.insert(at, (time.ran_ns, account));
                    threads.truncate(THREADS_MAX);
                }
            }
        }
        Self {
            accounts: threads.into_iter().map(|(_, account)| account).collect(),
        }
    }

    /// What they have done in all; less than before when one has ended.
    #[must_use]
    pub fn look(&self) -> CpuTime {
        let times = self.accounts.iter().filter_map(look);
        times.fold(CpuTime::default(), |sum, time| CpuTime {
            ran_ns: sum.ran_ns.saturating_add(time.ran_ns),
            waited_ns: sum.waited_ns.saturating_add(time.waited_ns),
        })
    }
}

/// Reads `schedstat`: time on a CPU, time in a run queue, turns. All zeros where the
/// kernel keeps no account.
fn look(account: &File) -> Option<CpuTime> {
    let mut text = [0; 64];
    let length = account.read_at(&mut text, 0).ok()?;
    let mut numbers = std::str::from_utf8(text.get(..length)?)
        .ok()?
        .split_ascii_whitespace()
        .map(|number| number.parse().ok());
    Some(CpuTime {
        ran_ns: numbers.next()??,
        waited_ns: numbers.next()??,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn what_runs_is_seen_to_run() {
        static OVER: AtomicBool = AtomicBool::new(false);
        let running = thread::spawn(|| {
            while !OVER.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let own = std::process::id().cast_signed();
        let watch = CpuWatch::of(&[own, i32::MAX]);
        assert!((1..=THREADS_MAX).contains(&watch.accounts.len()));
        let before = watch.look();
        while watch.look().since(before).ran_ns == 0 {
            thread::yield_now();
        }
        OVER.store(true, Ordering::Relaxed);
        running.join().unwrap();
        assert_eq!(CpuWatch::of(&[i32::MAX]).look(), CpuTime::default());
    }
}
