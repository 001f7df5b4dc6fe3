//! Figures of an agent for whoever collects them; nobody does unless the agent was
//! told to serve them.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use migrate_gate::Counters;

/// Migrations that have ended here.
pub const MIGRATIONS: &str = "migrate_migrations_total";
/// Connections of sources that are served.
pub const UNDER_WAY: &str = "migrate_under_way";
/// How long each step took.
pub const STEP: &str = "migrate_step_seconds";
/// How long trees stood still.
pub const STILL: &str = "migrate_still_seconds";
/// Packets of peers that were held.
pub const HELD: &str = "migrate_held_packets_total";
/// Packets that were dropped.
pub const DROPPED: &str = "migrate_dropped_packets_total";

/// Upper bounds of histograms, in seconds: from the fastest step that is seen to
/// the longest that is waited for.
pub const BUCKETS_S: [f64; 12] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0,
];

/// How a migration ended here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The tree runs here.
    Committed,
    /// It does not, and nothing of it is left.
    Undone,
    /// It failed after the commit.
    Abandoned,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Committed, Self::Undone, Self::Abandoned];

    fn name(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Undone => "undone",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Says what they mean, and begins all at zero, so that the first of them is seen to
/// rise. To be called when there is a collector.
pub fn begin() {
    describe_counter!(MIGRATIONS, "Migrations that have ended here, by outcome");
    describe_gauge!(UNDER_WAY, "Connections of sources that are served now");
    describe_histogram!(STEP, "How long the steps of migrations took here");
    describe_histogram!(
        STILL,
        "From the source's word that the tree stands still until it ran here"
    );
    describe_counter!(HELD, "Packets of peers that were held until the tree ran");
    describe_counter!(DROPPED, "Packets of trees that were dropped");
    for outcome in Outcome::ALL {
        counter!(MIGRATIONS, "outcome" => outcome.name()).absolute(0);
    }
    gauge!(UNDER_WAY).set(0.0);
    for name in [HELD, DROPPED] {
        counter!(name).absolute(0);
    }
}

/// A migration has ended.
pub fn ended(outcome: Outcome) {
    counter!(MIGRATIONS, "outcome" => outcome.name()).increment(1);
}

pub(crate) fn step(name: &'static str, took: Duration) {
    histogram!(STEP, "step" => name).record(took.as_secs_f64());
}

/// The tree runs here, and stood still for so long.
pub(crate) fn runs(still: Option<Duration>, counted: &Counters) {
    ended(Outcome::Committed);
    if let Some(still) = still {
        histogram!(STILL).record(still.as_secs_f64());
    }
    counter!(HELD).increment(counted.held_ingress_packets);
    counter!(DROPPED).increment(crate::dropped_packets(counted));
}

/// Counts a source while it is served.
pub(crate) struct UnderWay;

impl UnderWay {
    pub(crate) fn begin() -> Self {
        gauge!(UNDER_WAY).increment(1.0);
        Self
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        gauge!(UNDER_WAY).decrement(1.0);
    }
}
