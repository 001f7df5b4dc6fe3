//! When pre-copy has done its work.
//!
//! After each round the driver hands in what the round did and what was
//! measured on the way; the answer is another round, or to stop and why.
//! Nothing here reads a clock: the same numbers always give the same answer.
//!
//! ```text
//! skipped %          = 100 * skipped / (skipped + written + whole)
//! dirty at freeze    = dirty rate * length of this round, at most all, + untracked
//! predicted blackout = standing + dirty at freeze / link rate
//! ```
//!
//! Rounds shorten the second term alone. Where the first is longer than the blackout may
//! be ([`crate::blackout`]), they end when the second is not.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::wire::PAGE_BYTES;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Share of pages, in percent, that a round has to find unchanged. Reaching
    /// it counts. Above 100 it is never reached.
    pub goal_percent: u8,
    /// The longest blackout that is acceptable, in microseconds. `None`: the
    /// goal alone decides.
    pub downtime_limit_us: Option<u64>,
    /// Most rounds; at least one is made.
    pub max_iterations: u32,
    /// Longest time for all rounds together, in microseconds.
    pub timeout_us: Option<u64>,
    /// What follows when the goal is not reached.
    pub on_timeout: OnTimeout,
}

impl Default for Policy {
    /// `--goal 90 --downtime-limit 100ms --max-iterations 10 --on-timeout freeze`.
    fn default() -> Self {
        Self {
            goal_percent: 90,
            downtime_limit_us: Some(100_000),
            max_iterations: 10,
            timeout_us: None,
            on_timeout: OnTimeout::Freeze,
        }
    }
}

/// What to do when rounds do not lead to the goal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// Freeze all the same; the blackout is longer.
    #[default]
    Freeze,
    /// Give up; the source runs on.
    Cancel,
    /// Hand over before all pages have arrived.
    Postcopy,
}

/// What one round did, and what was measured up to its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that had changed and were sent.
    pub pages_written: u64,
    /// Pages that had not changed.
    pub pages_skipped: u64,
    /// Pages that move while the tree is frozen in any case.
    pub pages_untracked: u64,
    /// Those of them that count as changed, see [`RoundReport::pages_whole`].
    ///
    /// [`RoundReport::pages_whole`]: crate::report::RoundReport::pages_whole
    pub pages_whole: u64,
    /// How long the written pages had to change: from the start of the round
    /// before to the start of this one, in microseconds. Zero in the first.
    pub since_previous_us: u64,
    /// How long the round took, in microseconds: pages change again meanwhile.
    pub took_us: u64,
    /// Since the first round began, in microseconds.
    pub elapsed_us: u64,
    /// Measured rate of the page stream, in bytes per second. Zero: not known.
    pub link_bytes_per_s: u64,
    /// How long the tree stands still although nothing has changed, in microseconds.
    pub standing_us: u64,
    /// What has changed follows the commit, and the blackout does not wait for it.
    pub is_postcopy: bool,
}

/// Why rounds end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// Goal and downtime limit are both met.
    Converged,
    /// As many rounds as are allowed have been made.
    MaxIterations,
    /// The latest rounds wrote as many pages as the best before them.
    NotImproving,
    /// The time allowed has passed.
    Timeout,
    /// The goal is met, and what rounds can shorten is within the downtime limit; the
    /// rest of the blackout alone is beyond it.
    LimitOutOfReach,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Converged => "goal reached",
            Self::MaxIterations => "as many rounds as allowed",
            Self::NotImproving => "rounds no longer improve",
            Self::Timeout => "no more time",
            Self::LimitOutOfReach => "no round can bring the blackout within --downtime-limit",
        })
    }
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// One more round.
    Another,
    /// No more rounds.
    Stop {
        /// Why.
        reason: StopReason,
        /// What follows; always [`OnTimeout::Freeze`] when converged.
        then: OnTimeout,
    },
}

/// The decision and what it rests on, for the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Number of the round, from 1.
    pub iteration: u32,
    /// What to do now.
    pub decision: Decision,
    /// Share of pages found unchanged, in percent, rounded down.
    pub skipped_percent: u8,
    /// Bytes that change in a second. `None` after the first round.
    pub dirty_bytes_per_s: Option<u64>,
    /// Pages that a freeze at this moment would have to move.
    pub dirty_pages_predicted: u64,
    /// How long the blackout would be, in microseconds. `None` while the rate
    /// of the link is not known.
    pub blackout_us_predicted: Option<u64>,
}

/// Decides round after round.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    iteration: u32,
    best_written: Option<u64>,
    stale_rounds: u32,
}

impl Convergence {
    /// So many rounds in a row without improvement end pre-copy: one may be
    /// chance.
    pub const STALE_ROUNDS_MAX: u32 = 3;

    /// A round improves when it writes at least so many percent less than the
    /// best before it.
    pub const IMPROVEMENT_PERCENT: u64 = 5;

    /// Starts before the first round.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            iteration: 0,
            best_written: None,
            stale_rounds: 0,
        }
    }

    /// Takes in a round that has ended and decides.
    pub fn after_round(&mut self, round: &Round) -> Verdict {
        self.iteration = self.iteration.saturating_add(1);
        self.note_improvement(round.pages_written);
        let dirty_pages_predicted = round.dirty_pages_predicted();
        let blackout_us_predicted = round.blackout_us_predicted(dirty_pages_predicted);
        Verdict {
            iteration: self.iteration,
            decision: self.decide(round, blackout_us_predicted),
            skipped_percent: round.skipped_percent(),
            dirty_bytes_per_s: round.dirty_bytes_per_s(),
            dirty_pages_predicted,
            blackout_us_predicted,
        }
    }

    fn note_improvement(&mut self, written: u64) {
        let improved = self.best_written.is_none_or(|best| {
            let bound = u128::from(best) * u128::from(100 - Self::IMPROVEMENT_PERCENT);
            u128::from(written) * 100 <= bound && written < best
        });
        if improved {
            self.best_written = Some(written);
            self.stale_rounds = 0;
        } else {
            self.stale_rounds += 1;
        }
    }

    fn decide(&self, round: &Round, blackout_us: Option<u64>) -> Decision {
        let Policy {
            goal_percent,
            downtime_limit_us,
            max_iterations,
            timeout_us,
            on_timeout,
        } = self.policy;
        let reaches = round.reaches(goal_percent);
        let within_limit = |us: u64| downtime_limit_us.is_none_or(|limit| us <= limit);
        if reaches && (downtime_limit_us.is_none() || blackout_us.is_some_and(within_limit)) {
            return Decision::Stop {
                reason: StopReason::Converged,
                then: OnTimeout::Freeze,
            };
        }
        let shortest = !within_limit(round.standing_us)
            && blackout_us.is_some_and(|us| within_limit(us - round.standing_us));
        let reason = if reaches && shortest {
            StopReason::LimitOutOfReach
        } else if timeout_us.is_some_and(|limit| round.elapsed_us >= limit) {
            StopReason::Timeout
        } else if self.iteration >= max_iterations {
            StopReason::MaxIterations
        } else if self.stale_rounds >= Self::STALE_ROUNDS_MAX {
            StopReason::NotImproving
        } else {
            return Decision::Another;
        };
        Decision::Stop {
            reason,
            then: on_timeout,
        }
    }
}

impl Round {
    /// Those looked at.
    fn pages(&self) -> u128 {
        u128::from(self.pages_skipped) + u128::from(self.pages_written)
    }

    /// Those of which the goal speaks.
    fn pages_counted(&self) -> u128 {
        self.pages() + u128::from(self.pages_whole)
    }

    /// Exactly the goal is enough; a tree without pages has nothing to copy.
    fn reaches(&self, goal_percent: u8) -> bool {
        100 * u128::from(self.pages_skipped) >= u128::from(goal_percent) * self.pages_counted()
    }

    fn skipped_percent(&self) -> u8 {
        let percent = (100 * u128::from(self.pages_skipped))
            .checked_div(self.pages_counted())
            .unwrap_or(100);
        u8::try_from(percent).unwrap_or(100)
    }

    fn dirty_bytes_per_s(&self) -> Option<u64> {
        let bytes = u128::from(self.pages_written) * PAGE_BYTES as u128;
        (bytes * 1_000_000)
            .checked_div(u128::from(self.since_previous_us))
            .map(saturating)
    }

    /// Pages change while a round is made as they did before it. After the
    /// first round nothing is known, and as many as it wrote are assumed.
    fn dirty_pages_predicted(&self) -> u64 {
        let again = (u128::from(self.pages_written) * u128::from(self.took_us))
            .checked_div(u128::from(self.since_previous_us))
            .unwrap_or(u128::from(self.pages_written));
        saturating(again.min(self.pages()) + u128::from(self.pages_untracked))
    }

    fn blackout_us_predicted(&self, dirty_pages: u64) -> Option<u64> {
        if self.is_postcopy {
            return Some(self.standing_us);
        }
        let sending_us = (u128::from(dirty_pages) * PAGE_BYTES as u128 * 1_000_000)
            .checked_div(u128::from(self.link_bytes_per_s))?;
        Some(saturating(
            sending_us.saturating_add(u128::from(self.standing_us)),
        ))
    }
}

fn saturating(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(written: u64, skipped: u64) -> Round {
        Round {
            pages_written: written,
            pages_skipped: skipped,
            since_previous_us: 100_000,
            took_us: 100_000,
            link_bytes_per_s: 1 << 30,
            standing_us: 36_214,
            ..Round::default()
        }
    }

    fn goal(goal_percent: u8) -> Policy {
        Policy {
            goal_percent,
            downtime_limit_us: None,
            ..Policy::default()
        }
    }

    const CONVERGED: Decision = Decision::Stop {
        reason: StopReason::Converged,
        then: OnTimeout::Freeze,
    };

    /// Rounds made for a series; the last one is repeated.
    fn rounds_made(policy: Policy, series: &[Round]) -> (u32, StopReason) {
        let mut convergence = Convergence::new(policy);
        for at in 0..u32::MAX {
            let round = series[usize::try_from(at).unwrap().min(series.len() - 1)];
            if let Decision::Stop { reason, .. } = convergence.after_round(&round).decision {
                return (at + 1, reason);
            }
        }
        unreachable!("the series has an end")
    }

    #[test]
    fn exactly_the_goal_is_enough_and_one_page_less_is_not() {
        let decide = |written, skipped| {
            Convergence::new(goal(90))
                .after_round(&round(written, skipped))
                .decision
        };
        assert_eq!(decide(10, 90), CONVERGED);
        assert_eq!(decide(100_001, 900_000), Decision::Another);
        assert_eq!(decide(100_000, 900_000), CONVERGED);
        assert_eq!(decide(0, 0), CONVERGED);
    }

    #[test]
    fn a_lower_goal_takes_fewer_rounds() {
        let series: Vec<Round> = [1000, 700, 500, 300, 200, 90, 50]
            .map(|written| round(written, 1000 - written))
            .to_vec();
        assert_eq!(rounds_made(goal(40), &series), (3, StopReason::Converged));
        assert_eq!(rounds_made(goal(90), &series), (6, StopReason::Converged));
    }

    #[test]
    fn the_downtime_limit_has_to_be_met_as_well() {
        let policy = Policy {
            downtime_limit_us: Some(50_000),
            ..Policy::default()
        };
        // It stands still for 36 ms in any case; the rest of the limit is 14 ms of link.
        let series = [
            round(1 << 18, 0),
            round(20_000, (1 << 18) - 20_000),
            round(3000, (1 << 18) - 3000),
        ];
        let mut convergence = Convergence::new(policy);
        assert_eq!(
            convergence.after_round(&series[0]).decision,
            Decision::Another
        );
        let second = convergence.after_round(&series[1]);
        assert_eq!(
            (second.decision, second.skipped_percent),
            (Decision::Another, 92)
        );
        let third = convergence.after_round(&series[2]);
        assert_eq!(third.decision, CONVERGED);
        // And 3000 pages at 1 GiB/s.
        assert_eq!(third.blackout_us_predicted, Some(36_214 + 11_444));
        assert_eq!(third.dirty_bytes_per_s, Some(3000 * 4096 * 10));
    }

    #[test]
    fn an_unknown_link_never_meets_a_limit() {
        let mut convergence = Convergence::new(Policy::default());
        let verdict = convergence.after_round(&Round {
            link_bytes_per_s: 0,
            ..round(0, 100)
        });
        assert_eq!(verdict.blackout_us_predicted, None);
        assert_eq!(verdict.decision, Decision::Another);
    }

    #[test]
    fn a_limit_below_what_rounds_can_shorten_does_not_keep_them_going() {
        let limit_us = Policy::default().downtime_limit_us.unwrap();
        let decide = |link_bytes_per_s, on_timeout, standing_us| {
            let policy = Policy {
                on_timeout,
                ..Policy::default()
            };
            let round = Round {
                link_bytes_per_s,
                standing_us,
                ..round(20_000, (1 << 18) - 20_000)
            };
            Convergence::new(policy).after_round(&round).decision
        };
        for then in [OnTimeout::Freeze, OnTimeout::Cancel, OnTimeout::Postcopy] {
            let stop = Decision::Stop {
                reason: StopReason::LimitOutOfReach,
                then,
            };
            // What has changed takes 76 ms, or twice as long.
            assert_eq!(decide(1 << 30, then, limit_us + 1), stop);
            assert_eq!(decide(1 << 29, then, limit_us + 1), Decision::Another);
            assert_eq!(decide(1 << 30, then, limit_us), Decision::Another);
            assert_eq!(decide(1 << 30, then, 10_000), CONVERGED);
        }
    }

    #[test]
    fn what_is_not_looked_at_is_not_found_unchanged() {
        let verdict = Convergence::new(goal(50)).after_round(&Round {
            pages_untracked: 150,
            pages_whole: 100,
            ..round(0, 80)
        });
        assert_eq!(verdict.skipped_percent, 44);
        assert_eq!(verdict.decision, Decision::Another);
        assert_eq!(verdict.dirty_pages_predicted, 150);
    }

    #[test]
    fn what_follows_the_commit_is_not_waited_for() {
        let verdict = Convergence::new(Policy::default()).after_round(&Round {
            is_postcopy: true,
            ..round(1 << 18, 0)
        });
        assert_eq!(verdict.blackout_us_predicted, Some(36_214));
        assert_eq!(verdict.decision, Decision::Another);
    }

    #[test]
    fn steady_writers_end_as_not_improving() {
        let policy = Policy {
            on_timeout: OnTimeout::Cancel,
            ..goal(90)
        };
        let mut convergence = Convergence::new(policy);
        for _ in 0..3 {
            let decision = convergence.after_round(&round(500, 500)).decision;
            assert_eq!(decision, Decision::Another);
        }
        assert_eq!(
            convergence.after_round(&round(490, 510)).decision,
            Decision::Stop {
                reason: StopReason::NotImproving,
                then: OnTimeout::Cancel
            }
        );
    }

    #[test]
    fn time_runs_out_at_the_limit() {
        let policy = Policy {
            timeout_us: Some(1000),
            ..goal(90)
        };
        let at = |elapsed_us| {
            Convergence::new(policy)
                .after_round(&Round {
                    elapsed_us,
                    ..round(1, 0)
                })
                .decision
        };
        assert_eq!(at(999), Decision::Another);
        assert_eq!(
            at(1000),
            Decision::Stop {
                reason: StopReason::Timeout,
                then: OnTimeout::Freeze
            }
        );
    }

    prop_compose! {
        fn any_round()(
            pages_written: u64, pages_skipped: u64, pages_untracked: u64, pages_whole: u64,
            since_previous_us: u64, took_us: u64, elapsed_us: u64, link_bytes_per_s: u64,
            standing_us: u64, is_postcopy: bool,
        ) -> Round {
            Round {
                pages_written, pages_skipped, pages_untracked, pages_whole, since_previous_us,
                took_us, elapsed_us, link_bytes_per_s, standing_us, is_postcopy,
            }
        }
    }

    fn any_series() -> impl Strategy<Value = Vec<Round>> {
        let small = (0u64..1000, 0u64..1000, 0u64..100_000_000, 1u64..1 << 34).prop_map(
            |(written, skipped, took_us, link_bytes_per_s)| Round {
                took_us,
                link_bytes_per_s,
                ..round(written, skipped)
            },
        );
        prop::collection::vec(prop_oneof![any_round(), small], 1..20)
    }

    proptest! {
        #[test]
        fn always_ends_within_the_allowed_rounds(
            series in any_series(),
            goal_percent: u8,
            max_iterations in 0u32..30,
            downtime_limit_us: Option<u64>,
            timeout_us: Option<u64>,
        ) {
            let policy = Policy {
                goal_percent, downtime_limit_us, max_iterations, timeout_us,
                on_timeout: OnTimeout::Freeze,
            };
            prop_assert!(rounds_made(policy, &series).0 <= max_iterations.max(1));
        }

        #[test]
        fn a_higher_goal_never_takes_fewer_rounds(
            series in any_series(), low in 0u8..=101, high in 0u8..=101, limit: Option<u64>,
        ) {
            let (low, high) = (low.min(high), low.max(high));
            let made = |goal_percent| {
                rounds_made(Policy { downtime_limit_us: limit, ..goal(goal_percent) }, &series).0
            };
            prop_assert!(made(low) <= made(high));
        }

        #[test]
        fn converged_means_goal_and_limit_are_met(
            series in any_series(), goal_percent in 1u8..=100, limit: Option<u64>,
        ) {
            let policy = Policy { downtime_limit_us: limit, ..goal(goal_percent) };
            let mut convergence = Convergence::new(policy);
            for round in &series {
                let verdict = convergence.after_round(round);
                let met = u128::from(round.pages_skipped) * 100
                    >= u128::from(goal_percent) * round.pages_counted()
                    && limit.is_none_or(|limit| {
                        verdict.blackout_us_predicted.is_some_and(|us| us <= limit)
                    });
                prop_assert_eq!(verdict.decision == CONVERGED, met);
                prop_assert!(verdict.skipped_percent <= 100);
            }
        }

        #[test]
        fn more_dirty_pages_never_predict_a_shorter_blackout(round in any_round(), more: u64) {
            let other = Round {
                pages_untracked: round.pages_untracked.saturating_add(more),
                ..round
            };
            let predict = |round: &Round| {
                round.blackout_us_predicted(round.dirty_pages_predicted())
            };
            prop_assert!(predict(&round) <= predict(&other));
        }
    }
}
