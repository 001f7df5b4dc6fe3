//! How long a tree stands still whatever rounds have done.
//!
//! Straight lines through what was measured on two cores: docs/benchmarks.md, tables
//! "what that comes to". What the tree has changed since the last round comes on top,
//! see [`crate::convergence`]; a large address space that is hardly populated, and much
//! that sockets have not delivered, take longer than this says.

/// Freeze, CRIU's own steps, handover and takeover of one process, in microseconds:
/// 39.4 ms with ten connections, whose share is [`FLOW_US`] each.
pub const FIXED_US: u64 = 37_500;

/// One established connection, in microseconds.
pub const FLOW_US: u64 = 192;

/// Each process beyond the first, in microseconds.
pub const PROCESS_US: u64 = 7_252;

/// What a populated page of 4 KiB costs although it is not sent, in nanoseconds: 7.3 ms a
/// GiB.
pub const POPULATED_PAGE_NS: u64 = 28;

/// The same where the frozen tree's pages are compared with what rounds have sent, in
/// nanoseconds: CRIU hands each over, and it is hashed. 0.75 to 0.9 s a GiB, method
/// "engine full".
pub const COMPARED_PAGE_NS: u64 = 3_000;

/// What a page costs on top where it is put in place before the copy runs, in nanoseconds:
/// 1.6 s a GiB. Not in docs/benchmarks.md: single runs of 64 MiB to 1 GiB, which the test
/// below lists, came to 4,700 to 7,400 on the same two cores, others at work beside them.
pub const EAGER_PAGE_NS: u64 = 6_000;

/// What a page of a shared segment costs on top, in nanoseconds: it is read and compared on
/// all cores (0.2 s a GiB), and CRIU reads it into the copy (0.4 s a GiB). An estimate.
pub const SHARED_PAGE_NS: u64 = 2_400;

/// What there is to a tree for as long as it stands still. Pages are those of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Its processes.
    pub processes: u64,
    /// Established connections.
    pub flows: u64,
    /// Populated pages, shared ones included.
    pub pages: u64,
    /// Those of them in shared segments.
    pub pages_shared: u64,
    /// The frozen tree's pages are compared.
    pub is_compared: bool,
    /// The copy has its memory before it runs.
    pub is_eager: bool,
}

impl Standing {
    /// How long that takes, in microseconds.
    #[must_use]
    pub fn us(&self) -> u64 {
        let page_ns = if self.is_compared {
            COMPARED_PAGE_NS
        } else {
            POPULATED_PAGE_NS
        };
        let private = self.pages.saturating_sub(self.pages_shared);
        let pages_ns = [
            (self.pages, page_ns),
            (self.pages_shared, SHARED_PAGE_NS),
            (if self.is_eager { private } else { 0 }, EAGER_PAGE_NS),
        ]
        .into_iter()
        .fold(0u64, |sum, (pages, ns)| {
            sum.saturating_add(pages.saturating_mul(ns))
        });
        FIXED_US
            .saturating_add(self.flows.saturating_mul(FLOW_US))
            .saturating_add(self.processes.saturating_sub(1).saturating_mul(PROCESS_US))
            .saturating_add(pages_ns / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eager(processes: u64, flows: u64, pages: u64) -> Standing {
        Standing {
            processes,
            flows,
            pages,
            is_eager: true,
            ..Standing::default()
        }
    }

    fn lazy(flows: u64, pages: u64) -> Standing {
        Standing {
            is_eager: false,
            ..eager(1, flows, pages)
        }
    }

    fn compared(pages: u64) -> Standing {
        Standing {
            is_compared: true,
            ..lazy(10, pages)
        }
    }

    /// Within 1.5 of medians of ten runs, docs/benchmarks/runs, and of the single runs of
    /// [`EAGER_PAGE_NS`]; nothing, or next to nothing, was written to their memory.
    #[test]
    fn what_was_measured_is_predicted() {
        for (what, tree, measured_us) in [
            ("64 MiB", lazy(10, 16_493), 39_100),
            ("256 MiB", lazy(10, 65_644), 40_100),
            ("1024 MiB", lazy(10, 262_254), 51_300),
            ("4096 MiB", lazy(10, 1_048_685), 66_200),
            ("64 MiB, engine full", compared(16_518), 96_000),
            ("256 MiB, engine full", compared(65_667), 273_100),
            ("1024 MiB, engine full", compared(262_278), 868_700),
            ("4096 MiB, engine full", compared(1_048_709), 3_008_400),
            ("memcached, 1 conn", eager(1, 1, 1_939), 44_500),
            ("memcached, 100 conn", eager(1, 100, 2_056), 64_600),
            ("memcached, 1000 conn", eager(1, 1_000, 2_218), 247_700),
            ("memcached, 10000 conn", lazy(10_000, 3_560), 2_041_800),
            ("redis 100000 keys", lazy(20, 5_105), 46_800),
            ("redis pub/sub", eager(1, 10, 435), 38_100),
            ("1 process", eager(1, 10, 105), 31_100),
            ("10 processes", eager(10, 10, 244), 81_500),
            ("100 processes", eager(100, 10, 1_611), 715_000),
            ("1000 processes", eager(1_000, 10, 15_298), 7_273_200),
            ("64 MiB, eager", eager(1, 0, 17_026), 136_700),
            ("256 MiB, eager", eager(1, 0, 66_178), 415_600),
            ("1024 MiB, eager", eager(1, 0, 262_786), 1_756_600),
            ("2 processes, 256 MiB", eager(2, 0, 66_820), 348_900),
            ("6 processes, 256 MiB", eager(6, 0, 69_394), 613_900),
        ] {
            let predicted_us = tree.us();
            assert!(
                predicted_us * 2 <= measured_us * 3 && measured_us * 2 <= predicted_us * 3,
                "{what}: {predicted_us} us predicted, {measured_us} us measured"
            );
        }
    }

    #[test]
    fn no_tree_is_too_large() {
        let all = Standing {
            processes: u64::MAX,
            flows: u64::MAX,
            pages: u64::MAX,
            pages_shared: u64::MAX,
            is_compared: true,
            is_eager: true,
        };
        assert_eq!(all.us(), u64::MAX);
        assert_eq!(Standing::default().us(), FIXED_US);
    }
}
