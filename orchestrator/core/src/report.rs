//! What a migration reports at its end.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::phase::Phase;

/// The blackout, split by phase, in microseconds. The parts add up to the whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blackout {
    /// From the closed gate until CRIU holds the whole tree.
    pub freeze_us: u64,
    /// From there until CRIU has written pages and images.
    pub dump_us: u64,
    /// Sending the small images and the end mark.
    pub transfer_us: u64,
    /// The destination builds the copy.
    pub restore_us: u64,
    /// From the commit until the copy runs and its gate is open.
    pub takeover_us: u64,
}

impl Blackout {
    /// The time in which no peer is served.
    #[must_use]
    pub fn total_us(&self) -> u64 {
        self.freeze_us + self.dump_us + self.transfer_us + self.restore_us + self.takeover_us
    }
}

impl fmt::Display for Blackout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (freeze {}, dump {}, transfer {}, restore {}, takeover {})",
            Millis(self.total_us()),
            Millis(self.freeze_us),
            Millis(self.dump_us),
            Millis(self.transfer_us),
            Millis(self.restore_us),
            Millis(self.takeover_us),
        )
    }
}

/// Microseconds, printed as milliseconds with one decimal.
struct Millis(u64);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} ms", self.0 / 1000, self.0 % 1000 / 100)
    }
}

/// The closing block, also written as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The migration's id.
    pub migration_id: String,
    /// [`Phase::Committed`], [`Phase::RolledBack`] or [`Phase::Undecided`].
    pub outcome: Phase,
    /// Root PID.
    pub pid: i32,
    /// Name of the root process.
    pub name: String,
    /// Source host.
    pub source: String,
    /// Destination host.
    pub destination: String,
    /// Pages whose content was moved.
    pub pages: u64,
    /// Those of them that moved while the tree stood still.
    pub frozen_pages: u64,
    /// Rounds of pre-copy; zero when all memory moved while the tree stood still.
    pub rounds: u32,
    /// Bytes sent over the channel, pages and images together.
    pub bytes: u64,
    /// How long the tree did not run, in microseconds.
    pub frozen_us: u64,
    /// How long peers were not served.
    pub blackout: Blackout,
    /// TCP connections that moved.
    pub connections: u64,
    /// Packets of peers that the gates of both hosts have held back and given
    /// to the tree.
    pub held_packets: u64,
    /// Packets dropped by the gates of both hosts.
    pub dropped_packets: u64,
    /// RST segments that left either host for the tree's flows.
    pub rst_sent: u64,
    /// From the command to the end, in microseconds.
    pub total_us: u64,
}

/// A number of things in words: `1 process`, `2 processes`, `0 connections`.
#[must_use]
pub fn counted(number: usize, thing: &str) -> String {
    let ending = match (number, thing.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{number} {thing}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_are_counted_in_words() {
        assert_eq!(counted(1, "process"), "1 process");
        assert_eq!(counted(2, "process"), "2 processes");
        assert_eq!(counted(0, "connection"), "0 connections");
    }

    #[test]
    fn blackout_adds_up_and_reads_in_milliseconds() {
        let blackout = Blackout {
            freeze_us: 1_950,
            dump_us: 31_000,
            transfer_us: 50,
            restore_us: 24_000,
            takeover_us: 4_000,
        };
        assert_eq!(blackout.total_us(), 61_000);
        assert_eq!(
            blackout.to_string(),
            "61.0 ms (freeze 1.9 ms, dump 31.0 ms, transfer 0.0 ms, restore 24.0 ms, takeover 4.0 ms)"
        );
    }
}
