//! When the rounds stand back for the tree whose memory they read.
//!
//! On a host without a spare CPU the first round, which reads all memory, would take
//! CPUs from the tree for as long as it lasts. What tells is how long the tree's own
//! threads, ready to run, wait for a CPU. Others may be to blame for that: so waiting
//! while we work is compared with waiting while we pause, and pauses become longer only
//! as long as they help. Nothing here reads a clock or `/proc`.
//!
//! ```text
//! stall       = waited / (ran + waited)
//! demand      = ran / time, while we pause
//! excess      = stall while we work - stall while we pause
//! pause, next = longer while excess > 10 %, shorter while it is < 5 %; none where the demand is < 1/3
//! ```

use std::time::Duration;

/// How long work lasts before a look.
pub const WORK: Duration = Duration::from_millis(10);

/// The shortest pause. What is on its way has to arrive before a pause tells anything,
/// and only its second half is looked at.
pub const PAUSE_MIN: Duration = Duration::from_millis(30);

/// Most time in pauses, of that in work: what remains is a tenth.
const RATIO_MAX: f64 = 9.0;

/// What is begun with.
const RATIO_FIRST: f64 = 0.5;

/// Work without a pause, until it is seen again whether others are to blame.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Excess that we are answerable for, and that which is none.
const EXCESS_MAX: f64 = 0.10;
const EXCESS_NONE: f64 = 0.05;

/// A tree that runs for a smaller part of the time, with a CPU to itself, does not need the
/// CPU that it waits for: it does as much as before, a moment later. A round ten times as
/// long would cost it more, for what it writes meanwhile has to be sent again.
const DEMAND_MIN: f64 = 1.0 / 3.0;

/// One that neither runs nor waits for a larger part of the time need not be asked.
const IDLE: f64 = 0.1;

/// Weight of the latest look.
const LATEST: f64 = 0.5;

/// What threads did in some time, all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// On a CPU, in nanoseconds.
    pub ran_ns: u64,
    /// Ready, without a CPU, in nanoseconds.
    pub waited_ns: u64,
}

impl CpuTime {
    /// What has been added since.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            ran_ns: self.ran_ns.saturating_sub(before.ran_ns),
            waited_ns: self.waited_ns.saturating_sub(before.waited_ns),
        }
    }

    /// The part of the time it had work that a tree waited, from 0 to 1.
    fn stall(self, within: Duration) -> f64 {
        let (ran, waited) = (seconds(self.ran_ns), seconds(self.waited_ns));
        if ran + waited <= within.as_secs_f64() * IDLE {
            return 0.0;
        }
        waited / (ran + waited)
    }
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// How much of the time to pause.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    working: Option<f64>,
    pausing: Option<f64>,
    demand: f64,
    ratio: f64,
    /// Worked since the last pause.
    unpaused: Duration,
}

fn average(known: Option<f64>, latest: f64) -> f64 {
    known.map_or(latest, |known| known + LATEST * (latest - known))
}

impl Pace {
    /// After work that lasted so long, in which the tree did this: how long to pause,
    /// from [`PAUSE_MIN`] on, if at all.
    pub fn worked(&mut self, lasted: Duration, tree: CpuTime) -> Option<Duration> {
        let working = average(self.working, tree.stall(lasted));
        self.working = Some(working);
        self.unpaused = self.unpaused.saturating_add(lasted);
        let excess = match self.pausing {
            None => working,
            Some(_) if self.demand < DEMAND_MIN => 0.0,
            // It cannot be ours where there is none.
            Some(pausing) => (working - pausing).min(working),
        };
        let looks = match excess {
            excess if excess > EXCESS_MAX => {
                if self.pausing.is_some() {
                    self.ratio = (self.ratio * 2.0).clamp(RATIO_FIRST, RATIO_MAX);
                }
                true
            }
            excess if excess < EXCESS_NONE => {
                self.ratio /= 2.0;
                if self.ratio < RATIO_FIRST {
                    self.ratio = 0.0;
                }
                working > EXCESS_MAX && self.unpaused >= LOOK_EVERY
            }
            _ => false,
        };
        if self.ratio == 0.0 && !looks {
            return None;
        }
        self.unpaused = Duration::ZERO;
        // Longer work has waited for the network, and whoever is at its other end must not
        // take a pause for silence.
        let lasted = lasted.min(WORK * 2);
        Some(lasted.mul_f64(self.ratio).max(PAUSE_MIN))
    }

    /// After the second half of a pause, which lasted so long.
    pub fn paused(&mut self, lasted: Duration, tree: CpuTime) {
        let ran = seconds(tree.ran_ns) / lasted.as_secs_f64().max(f64::MIN_POSITIVE);
        self.demand = average(self.pausing.map(|_| self.demand), ran);
        self.pausing = Some(average(self.pausing, tree.stall(lasted)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// Of a busy tree that waits for so many percent of the time.
    fn busy(lasted: Duration, percent: u32) -> CpuTime {
        let waited = lasted * percent / 100;
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap();
        CpuTime {
            ran_ns: ns(lasted.saturating_sub(waited)),
            waited_ns: ns(waited),
        }
    }

    /// Works and pauses for a while; the time in either in the second half of it.
    fn run(working: impl Fn(f64) -> u32, pausing: u32) -> (Duration, Duration) {
        let mut pace = Pace::default();
        let (mut works, mut pauses) = (Duration::ZERO, Duration::ZERO);
        for turn in 0..400 {
            let pause = pace.worked(WORK, busy(WORK, working(pace.ratio)));
            if let Some(pause) = pause {
                pace.paused(pause / 2, busy(pause / 2, pausing));
            }
            if turn >= 200 {
                works += WORK;
                pauses += pause.unwrap_or_default();
            }
        }
        (works, pauses)
    }

    #[test]
    fn a_tree_that_waits_for_nothing_or_does_nothing_is_not_paused_for() {
        assert_eq!(run(|_| 5, 0).1, Duration::ZERO);
        let mut pace = Pace::default();
        for _ in 0..100 {
            let hardly = CpuTime {
                ran_ns: 300_000,
                waited_ns: 700_000,
            };
            assert_eq!(pace.worked(WORK, hardly), None);
        }
    }

    #[test]
    fn a_tree_that_waits_for_us_gets_nine_tenths() {
        let (works, pauses) = run(|_| 50, 2);
        assert_eq!(pauses, works * 9);
    }

    #[test]
    fn what_others_take_is_not_given_way_to() {
        let (works, pauses) = run(|_| 50, 48);
        assert!(pauses <= works / 5, "{pauses:?} of {works:?}");
    }

    #[test]
    fn a_tree_that_wants_little_of_a_cpu_is_given_no_more() {
        let mut pace = Pace::default();
        let mut pauses = Duration::ZERO;
        for _ in 0..200 {
            // Ten threads that wait now and then.
            let contended = CpuTime {
                ran_ns: 2_000_000,
                waited_ns: 12_000_000,
            };
            if let Some(pause) = pace.worked(WORK, contended) {
                pauses += pause;
                let alone = CpuTime {
                    ran_ns: 3_000_000,
                    waited_ns: 100_000,
                };
                pace.paused(PAUSE_MIN / 2, alone);
            }
        }
        // Looks, one in half a second.
        assert!(pauses <= WORK * 200 / 10, "{pauses:?}");
    }

    #[test]
    fn work_goes_on_when_the_tree_has_become_quiet() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            if pace.worked(WORK, busy(WORK, 50)).is_some() {
                pace.paused(WORK, busy(WORK, 0));
            }
        }
        let pauses = (0..20).filter(|_| pace.worked(WORK, CpuTime::default()).is_some());
        assert!(pauses.count() < 10);
        assert_eq!(pace.worked(WORK, CpuTime::default()), None);
    }

    proptest! {
        /// Whatever is seen: no pause is longer than agreed, and work comes after each.
        #[test]
        fn a_tenth_of_the_time_is_work(looks in prop::collection::vec(
            (1_u64..10_000, 0_u64..200_000_000, 0_u64..200_000_000, 0_u64..200_000_000, 0_u64..200_000_000), 1..200,
        )) {
            let mut pace = Pace::default();
            for (ms, ran_ns, waited_ns, ran, waited) in looks {
                let lasted = Duration::from_millis(ms);
                if let Some(pause) = pace.worked(lasted, CpuTime { ran_ns, waited_ns }) {
                    prop_assert!(pause >= PAUSE_MIN && pause <= (lasted.min(WORK * 2) * 9).max(PAUSE_MIN));
                    pace.paused(pause / 2, CpuTime { ran_ns: ran, waited_ns: waited });
                }
            }
        }
    }
}
