//! Pauses in the first round, where the tree would wait for CPUs because of it.
//!
//! Only there: it reads everything, and is as long as all others together as a rule.
//! Those race against a tree that writes, and a longer blackout is worse than a slow
//! moment before it.

use std::time::{Duration, Instant};

use migrate_core::pace::{CpuTime, Pace, WORK};
use migrate_proc::CpuWatch;

/// Pauses when it is time to.
#[derive(Debug)]
pub(super) struct Pacer {
    watch: CpuWatch,
    pace: Pace,
    /// No pauses after that: rounds that may not last for ever have better use for the time.
    until: Option<Instant>,
    /// When it was last looked, and what the tree had done until then. None before the first
    /// pages: the tree is made to run what tracks it until then, and waits for a CPU with that.
    last: Option<(Instant, CpuTime)>,
    paused: Duration,
}

impl Pacer {
    /// For a tree of these processes. Pauses until half of `timeout` is over, where there
    /// is one.
    pub(super) fn new(pids: &[i32], timeout: Option<Duration>) -> Self {
        Self {
            watch: CpuWatch::of(pids),
            pace: Pace::default(),
            // One that is further away than any clock goes is none.
            until: timeout.and_then(|timeout| Instant::now().checked_add(timeout / 2)),
            last: None,
            paused: Duration::ZERO,
        }
    }

    /// What the tree has done since the last look, and how long ago that was, unless this is
    /// the first.
    fn look(&mut self) -> Option<(Duration, CpuTime)> {
        let now = Instant::now();
        let time = self.watch.look();
        let (since, before) = self.last.replace((now, time))?;
        Some((now - since, time.since(before)))
    }

    /// Call this often while at work; pauses if it has to be. Nothing is lost when this is
    /// dropped.
    pub(super) async fn pause(&mut self) {
        if self.last.is_some_and(|(since, _)| since.elapsed() < WORK)
            || self.until.is_some_and(|until| Instant::now() >= until)
        {
            return;
        }
        let worked = self.look();
        let Some(pause) = worked.and_then(|(worked, tree)| self.pace.worked(worked, tree)) else {
            return;
        };
        let begun = Instant::now();
        tokio::time::sleep(pause / 2).await;
        self.look();
        tokio::time::sleep(pause / 2).await;
        if let Some((rested, tree)) = self.look() {
            self.pace.paused(rested, tree);
        }
        self.paused += begun.elapsed();
    }

    /// How long it has paused.
    pub(super) fn paused(&self) -> Duration {
        self.paused
    }
}
