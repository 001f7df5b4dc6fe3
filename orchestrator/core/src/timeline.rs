//! When each host did what, on one clock.
//!
//! The source's clock is the one. What the destination did is placed on it by
//! the commit: `Go` and the answer to it are one round trip, of which the
//! destination knows how long it kept the message. What remains was spent under
//! way, half of it before `Go` came, as far as anybody can tell; the other half
//! is how far off that may be.

use serde::{Deserialize, Serialize};

/// Something that a host did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The phase, or the step of the destination.
    pub name: String,
    /// When it began, in microseconds since the migration did; in messages of the
    /// destination, since `Go` had come.
    pub start_us: i64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

impl Span {
    /// When it ended.
    #[must_use]
    pub fn end_us(&self) -> i64 {
        self.start_us.saturating_add_unsigned(self.took_us)
    }
}

/// What the destination tells of its time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// What it did, from the first message up to the running copy.
    pub spans: Vec<Span>,
    /// What those of the blackout are made of, by when it ended.
    pub parts: Vec<Span>,
    /// How long it kept `Go` before it answered, in microseconds.
    pub kept_go_us: u64,
}

impl Timing {
    /// Spans of the destination that are taken notice of; it has fewer steps.
    pub const SPANS_MAX: usize = 32;

    /// The longest name of one, in bytes; no step has half as many.
    pub const NAME_BYTES_MAX: usize = 32;

    /// The destination's spans, and their parts, on the source's clock, without those whose
    /// names are like none of a step, and by how much all of them
    /// may be off, in microseconds. `go_us` and `owned_us` are when `Go` left the
    /// source and the answer had come, in microseconds since the migration began.
    #[must_use]
    pub fn placed(&self, go_us: u64, owned_us: u64) -> (Vec<Span>, Vec<Span>, u64) {
        let under_way_us = owned_us
            .saturating_sub(go_us)
            .saturating_sub(self.kept_go_us);
        let error_us = under_way_us / 2;
        let came_us = i64::try_from(go_us.saturating_add(error_us)).unwrap_or(i64::MAX);
        let like_a_step = |span: &&Span| {
            span.name.len() <= Self::NAME_BYTES_MAX
                && span
                    .name
                    .bytes()
                    .all(|byte| byte == b'_' || byte.is_ascii_lowercase())
        };
        let placed = |spans: &[Span]| {
            let spans = spans.iter().take(Self::SPANS_MAX).filter(like_a_step);
            let placed = spans.map(|span| Span {
                start_us: span.start_us.saturating_add(came_us),
                ..span.clone()
            });
            placed.collect()
        };
        (placed(&self.spans), placed(&self.parts), error_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str, start_us: i64, took_us: u64) -> Span {
        Span {
            name: name.to_owned(),
            start_us,
            took_us,
        }
    }

    #[test]
    fn the_commit_places_the_destination_on_the_sources_clock() {
        let timing = Timing {
            spans: vec![span("restore", -50_000, 40_000), span("open", 300, 700)],
            parts: vec![span("criu_released", -49_000, 1000)],
            kept_go_us: 300,
        };
        let (placed, parts, error_us) = timing.placed(1_000_000, 1_000_500);
        assert_eq!(error_us, 100);
        assert_eq!(parts, [span("criu_released", 951_100, 1000)]);
        assert_eq!(
            placed,
            [
                span("restore", 950_100, 40_000),
                span("open", 1_000_400, 700)
            ]
        );
        assert_eq!(placed[1].end_us(), 1_001_100);
    }

    #[test]
    fn a_destination_that_tells_nonsense_breaks_nothing() {
        let timing = Timing {
            spans: vec![span("x", i64::MIN, u64::MAX); 1000],
            parts: vec![span("y", i64::MAX, u64::MAX); 1000],
            kept_go_us: u64::MAX,
        };
        let (placed, parts, error_us) = timing.placed(u64::MAX, 0);
        assert_eq!((placed.len(), error_us), (Timing::SPANS_MAX, 0));
        assert_eq!(parts.len(), Timing::SPANS_MAX);
        let timing = Timing {
            spans: [
                "\x1b[2J",
                "a\nb",
                "x".repeat(Timing::NAME_BYTES_MAX + 1).as_str(),
                "take_over",
            ]
            .map(|name| span(name, 0, 1))
            .to_vec(),
            parts: Vec::new(),
            kept_go_us: 0,
        };
        assert_eq!(timing.placed(0, 0).0, [span("take_over", 0, 1)]);
        assert_eq!(span("y", i64::MAX, u64::MAX).end_us(), i64::MAX);
    }
}
