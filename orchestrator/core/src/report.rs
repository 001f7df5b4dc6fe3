//! What a migration reports at its end.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::convergence::StopReason;
use crate::flow::Flow;
use crate::phase::Phase;
use crate::timeline::Span;

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
        let parts = self.parts().into_iter();
        parts.fold(0, |sum_us, (_, us)| sum_us.saturating_add(us))
    }

    /// Its parts in order, by name.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 5] {
        [
            ("freeze", self.freeze_us),
            ("dump", self.dump_us),
            ("transfer", self.transfer_us),
            ("restore", self.restore_us),
            ("takeover", self.takeover_us),
        ]
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

/// What one host's gate has seen of a connection since shortly before it closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowSeen {
    /// The connection.
    pub flow: Flow,
    /// Packets of the peer that were held back or dropped, segments of merged
    /// ones counted one by one.
    pub kept: u32,
    /// Frames dropped, because there was no room or no means to hold them.
    pub dropped: u32,
    /// Held packets that went in again; merged ones count once.
    pub returned: u32,
    /// Segments of the peer with bytes that the gate had seen before.
    pub repeated_by_peer: u32,
    /// Such segments of the tree.
    pub repeated_by_tree: u32,
    /// RST segments of the peer.
    pub resets_by_peer: u32,
    /// RST segments to the peer, those that were kept in among them.
    pub resets_by_tree: u32,
    /// From the moment at which the destination owned the tree until a packet
    /// left for the peer, in microseconds. Only the destination can tell.
    pub first_out_us: Option<u64>,
}

/// One connection in the report, both hosts together. See [`FlowSeen`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowReport {
    /// The connection.
    #[serde(flatten)]
    pub flow: Flow,
    /// Packets of the peer that were kept back.
    pub held_packets: u64,
    /// Those given to the tree; merged ones count once.
    pub returned_packets: u64,
    /// Those dropped.
    pub dropped_packets: u64,
    /// Segments that the peer has sent again.
    pub repeated_by_peer: u64,
    /// Segments that the tree has sent again.
    pub repeated_by_tree: u64,
    /// RST segments of the peer.
    pub resets_by_peer: u64,
    /// RST segments to the peer; a gate that is closed keeps them in.
    pub resets_by_tree: u64,
    /// From the closing of the source's gate to the first packet that the
    /// destination has sent to the peer, without the time that the commit
    /// message was under way; none when the destination has sent none.
    pub silence_us: Option<u64>,
}

impl FlowReport {
    fn of(flow: Flow) -> Self {
        Self {
            flow,
            held_packets: 0,
            returned_packets: 0,
            dropped_packets: 0,
            repeated_by_peer: 0,
            repeated_by_tree: 0,
            resets_by_peer: 0,
            resets_by_tree: 0,
            silence_us: None,
        }
    }

    fn add(&mut self, seen: &FlowSeen) {
        self.held_packets += u64::from(seen.kept);
        self.returned_packets += u64::from(seen.returned);
        self.dropped_packets += u64::from(seen.dropped);
        self.repeated_by_peer += u64::from(seen.repeated_by_peer);
        self.repeated_by_tree += u64::from(seen.repeated_by_tree);
        self.resets_by_peer += u64::from(seen.resets_by_peer);
        self.resets_by_tree += u64::from(seen.resets_by_tree);
    }

    fn resets(&self) -> u64 {
        self.resets_by_peer + self.resets_by_tree
    }

    fn repeated(&self) -> u64 {
        self.repeated_by_peer + self.repeated_by_tree
    }
}

/// What peers noticed, as far as the gates of both hosts can tell, from shortly
/// before the source's gate closed until both were detached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuity {
    /// Whether the gate closed at a moment without traffic; otherwise the
    /// waiting for one was given up.
    pub was_quiet: bool,
    /// Connections that were watched.
    pub flows: u64,
    /// Whether the destination has told what it saw; the rest is what the
    /// source alone knows if not.
    pub both_hosts: bool,
    /// Segments with bytes that a gate had seen before, of either side.
    pub repeated_segments: u64,
    /// RST segments of either side, those that were kept in among them.
    pub resets: u64,
    /// The longest of [`FlowReport::silence_us`].
    pub silence_us: Option<u64>,
    /// The connections that had most to bear, worst first, at most
    /// [`Self::WORST_MAX`].
    pub worst: Vec<FlowReport>,
}

impl Continuity {
    /// Connections listed one by one.
    pub const WORST_MAX: usize = 100;

    /// Sums up what both hosts have seen. `until_owned_us` is the time from the
    /// closing of the source's gate to the commit.
    #[must_use]
    pub fn of(
        source: &[FlowSeen],
        destination: Option<&[FlowSeen]>,
        until_owned_us: u64,
        was_quiet: bool,
    ) -> Self {
        let mut flows = BTreeMap::<Flow, FlowReport>::new();
        let theirs = destination.unwrap_or_default();
        for seen in source.iter().chain(theirs) {
            flows
                .entry(seen.flow)
                .or_insert_with(|| FlowReport::of(seen.flow))
                .add(seen);
        }
        for seen in theirs {
            if let (Some(report), Some(first_out_us)) =
                (flows.get_mut(&seen.flow), seen.first_out_us)
            {
                report.silence_us = Some(until_owned_us.saturating_add(first_out_us));
            }
        }
        let mut worst: Vec<FlowReport> = flows.into_values().collect();
        let (count, sum) = (worst.len() as u64, |what: fn(&FlowReport) -> u64| {
            worst.iter().map(what).sum()
        });
        let (repeated_segments, resets) = (sum(FlowReport::repeated), sum(FlowReport::resets));
        let silence_us = worst.iter().filter_map(|flow| flow.silence_us).max();
        worst.sort_by_key(|flow| {
            std::cmp::Reverse((
                flow.resets(),
                flow.dropped_packets,
                flow.repeated(),
                flow.silence_us,
            ))
        });
        worst.truncate(Self::WORST_MAX);
        Self {
            was_quiet,
            flows: count,
            both_hosts: destination.is_some(),
            repeated_segments,
            resets,
            silence_us,
            worst,
        }
    }
}

/// One round of pre-copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u32,
    /// When it began, in microseconds since the migration did.
    #[serde(default)]
    pub start_us: u64,
    /// Populated pages looked at.
    pub pages_scanned: u64,
    /// Pages that had changed and were sent.
    pub pages_written: u64,
    /// Pages that had not changed.
    pub pages_skipped: u64,
    /// Pages that are not looked at and move whole while the tree is frozen: of processes
    /// that cannot be tracked, and huge pages. What programs write to private mappings of
    /// files moves so, too; that is little, and does not count.
    #[serde(default)]
    pub pages_whole: u64,
    /// Share of pages that had not changed, in percent, of those looked at and those that
    /// move whole.
    pub skipped_percent: u8,
    /// Bytes of pages sent.
    pub bytes: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
    /// How much of that it stood still so that the tree could have the CPUs, in
    /// microseconds.
    #[serde(default)]
    pub paused_us: u64,
    /// Bytes that change in a second, once that is known.
    pub dirty_bytes_per_s: Option<u64>,
    /// Measured rate of the page stream, in bytes per second.
    pub link_bytes_per_s: u64,
    /// Connections that the gate knows; none where there is no gate.
    pub flows: Option<usize>,
    /// Those of them that had traffic in this round.
    pub dirty_flows: Option<usize>,
    /// How long the blackout would be now, in microseconds, once that is known.
    pub blackout_us_predicted: Option<u64>,
    /// Why this was the last round.
    pub stopped: Option<StopReason>,
}

/// Why a migration did not end in a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReport {
    /// The phase in which it failed.
    pub phase: Phase,
    /// The chain of causes.
    pub error: String,
}

/// Version of [`Report`] as a file: raised when a reader of an older one would
/// take it wrong.
pub const REPORT_VERSION: u32 = 1;

/// The closing block, also written as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`] of the one who wrote it.
    #[serde(default)]
    pub version: u32,
    /// When the migration began, in milliseconds since 1970.
    #[serde(default)]
    pub began_unix_ms: u64,
    /// The migration's id.
    pub migration_id: String,
    /// [`Phase::Committed`], [`Phase::RolledBack`], [`Phase::Undecided`] or
    /// [`Phase::Lost`].
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
    /// Pages that were put in place while the copy already ran.
    #[serde(default)]
    pub lazy_pages: u64,
    /// What came after the commit; none where nothing was to.
    #[serde(default)]
    pub postcopy: Option<Postcopy>,
    /// Bytes sent over the channel up to the commit, pages and images together.
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
    /// How long it took to close the source's gate, in nanoseconds; none where
    /// it is not what kept packets from the frozen tree.
    #[serde(default)]
    pub gate_close_ns: Option<u64>,
    /// How long before the blackout new connections were held already, until those
    /// that had begun were the tree's, in microseconds; none where they were not.
    #[serde(default)]
    pub new_held_us: Option<u64>,
    /// From the command to the end, in microseconds.
    pub total_us: u64,
    /// What peers noticed; none without a gate.
    pub continuity: Option<Continuity>,
    /// The rounds one by one, at most as many as were allowed.
    #[serde(default)]
    pub precopy: Vec<RoundReport>,
    /// The source's phases in order.
    #[serde(default)]
    pub phases: Vec<Span>,
    /// The destination's steps in order, on the source's clock; none where it has
    /// not told.
    #[serde(default)]
    pub destination_steps: Vec<Span>,
    /// What the source's phases of the blackout are made of.
    #[serde(default)]
    pub source_parts: Vec<Span>,
    /// What the destination's steps of the blackout are made of, on the source's clock.
    #[serde(default)]
    pub destination_parts: Vec<Span>,
    /// By how much those may be off, in microseconds.
    #[serde(default)]
    pub clock_error_us: Option<u64>,
    /// When the blackout began, in microseconds since the migration did.
    #[serde(default)]
    pub blackout_start_us: Option<u64>,
    /// The unit of the destination's systemd that the tree runs in now; none where
    /// it has none.
    #[serde(default)]
    pub unit: Option<String>,
    /// Why there was no commit.
    #[serde(default)]
    pub failure: Option<FailureReport>,
}

/// Memory that was still on the source when the copy began to run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Postcopy {
    /// Pages that came after the commit.
    pub pages: u64,
    /// Bytes of them, frames included.
    pub bytes: u64,
    /// Faults of the copy that had to wait for one of them.
    pub waited_faults: u64,
    /// From the word that the destination owns the tree to its word that all
    /// pages have come, in microseconds: for so long the tree depended on both
    /// hosts.
    pub took_us: u64,
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

    fn seen(port: u16) -> FlowSeen {
        FlowSeen {
            flow: Flow::new("10.0.0.1:80".parse().unwrap(), ([10, 0, 0, 2], port).into()),
            kept: 1,
            dropped: 0,
            returned: 0,
            repeated_by_peer: 0,
            repeated_by_tree: 0,
            resets_by_peer: 0,
            resets_by_tree: 0,
            first_out_us: None,
        }
    }

    #[test]
    fn what_both_hosts_saw_is_one_report_with_the_worst_first() {
        let early = FlowSeen {
            // Before the gate closed.
            first_out_us: Some(7),
            ..seen(1)
        };
        let source = [early, seen(2), seen(3)];
        let repeated = FlowSeen {
            repeated_by_peer: 2,
            repeated_by_tree: 1,
            returned: 2,
            first_out_us: Some(10),
            ..seen(2)
        };
        let slow = FlowSeen {
            first_out_us: Some(500),
            ..seen(3)
        };
        let reset = FlowSeen {
            resets_by_tree: 1,
            ..seen(4)
        };
        let all = Continuity::of(&source, Some(&[repeated, slow, reset]), 1000, true);
        assert_eq!((all.flows, all.repeated_segments, all.resets), (4, 3, 1));
        assert_eq!(all.silence_us, Some(1500));
        let ports: Vec<u16> = all.worst.iter().map(|f| f.flow.remote.port()).collect();
        assert_eq!(ports, [4, 2, 3, 1]);
        let second = &all.worst[1];
        assert_eq!((second.held_packets, second.returned_packets), (2, 2));
        assert_eq!(second.silence_us, Some(1010));

        let many: Vec<FlowSeen> = (1..=500).map(seen).collect();
        let alone = Continuity::of(&many, None, 1000, false);
        assert_eq!(
            (alone.flows, alone.worst.len()),
            (500, Continuity::WORST_MAX)
        );
        assert_eq!((alone.silence_us, alone.both_hosts), (None, false));
    }

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
