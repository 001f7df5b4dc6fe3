//! When this side did what, for the report.

use std::time::{Duration, Instant};

use migrate_core::timeline::{Span, Timing};

use crate::figures;
use crate::source::micros;

/// The steps so far, on this host's clock.
pub(super) struct Clock {
    step_began: Instant,
    steps: Vec<(&'static str, Instant, u64)>,
    frozen: Option<Instant>,
    go_came: Option<Instant>,
    kept_go_us: u64,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            step_began: Instant::now(),
            steps: Vec::new(),
            frozen: None,
            go_came: None,
            kept_go_us: 0,
        }
    }
}

impl Clock {
    /// A step is over, and the next begins.
    pub(super) fn ended(&mut self, step: &'static str) {
        let began = std::mem::replace(&mut self.step_began, Instant::now());
        let took = self.step_began.saturating_duration_since(began);
        self.steps.push((step, began, micros(took)));
        figures::step(step, took);
    }

    /// The source's tree stands still.
    pub(super) fn frozen(&mut self) {
        self.frozen = Some(Instant::now());
    }

    /// For how long it has; none where nobody has said so.
    pub(super) fn still(&self) -> Option<Duration> {
        self.frozen.map(|frozen| frozen.elapsed())
    }

    /// The commit has come.
    pub(super) fn go_came(&mut self) {
        self.go_came = Some(Instant::now());
    }

    /// The source is about to hear so.
    pub(super) fn go_answered(&mut self) {
        self.kept_go_us = self.go_came.map_or(0, |came| micros(came.elapsed()));
    }

    /// All of it, the step that still lasts included.
    pub(super) fn timing(&self, step: &'static str) -> Timing {
        let Some(zero) = self.go_came else {
            return Timing::default();
        };
        let lasts = (step, self.step_began, micros(self.step_began.elapsed()));
        let spans = self.steps.iter().chain([&lasts]);
        Timing {
            spans: spans
                .map(|&(name, began, took_us)| Span {
                    name: name.to_owned(),
                    start_us: match began.checked_duration_since(zero) {
                        Some(after) => micros(after).cast_signed(),
                        None => -micros(zero.saturating_duration_since(began)).cast_signed(),
                    },
                    took_us,
                })
                .collect(),
            kept_go_us: self.kept_go_us,
        }
    }
}
