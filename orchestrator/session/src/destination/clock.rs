//! When this side did what, for the report.

use std::time::{Duration, Instant};

use migrate_core::timeline::{Span, Timing};

use crate::figures;
use crate::source::micros;

/// The steps so far, on this host's clock.
pub(super) struct Clock {
    step_began: Instant,
    steps: Vec<(&'static str, Instant, u64)>,
    parts: Vec<(&'static str, Instant, u64)>,
    frozen: Option<Instant>,
    go_came: Option<Instant>,
    kept_go_us: u64,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            step_began: Instant::now(),
            steps: Vec::new(),
            parts: Vec::new(),
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

    /// A part of the step that lasts is over, and the next begins now.
    pub(super) fn part(&mut self, part: &'static str, began: Instant) -> Instant {
        let now = Instant::now();
        let took = now.saturating_duration_since(began);
        self.parts.push((part, began, micros(took)));
        now
    }

    /// Since when the source's tree stands still; the start of this step where nobody has
    /// said so.
    pub(super) fn still_since(&self) -> Instant {
        self.frozen.unwrap_or(self.step_began)
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
        let span = |&(name, began, took_us): &(&'static str, Instant, u64)| Span {
            name: name.to_owned(),
            start_us: match began.checked_duration_since(zero) {
                Some(after) => micros(after).cast_signed(),
                None => -micros(zero.saturating_duration_since(began)).cast_signed(),
            },
            took_us,
        };
        Timing {
            spans: self.steps.iter().chain([&lasts]).map(span).collect(),
            parts: self.parts.iter().map(span).collect(),
            kept_go_us: self.kept_go_us,
        }
    }
}
