//! What a gate has seen of each connection, for the report.

use migrate_core::report::FlowSeen;
use migrate_core::wire::FLOWS_SEEN_MAX;
use migrate_gate::{FlowActivity, Gate};

/// What this host's gate has seen. Where there are more connections than one
/// message takes, those with something to tell come first.
pub(crate) fn seen(gate: &Gate) -> Vec<FlowSeen> {
    let mark_ns = gate.mark_ns();
    let mut seen: Vec<FlowSeen> = match gate.activity() {
        Ok(flows) => flows.iter().map(|flow| of(flow, mark_ns)).collect(),
        Err(error) => {
            tracing::warn!(error = %crate::error::chain(&error), "connections cannot be reported on");
            Vec::new()
        }
    };
    if seen.len() > FLOWS_SEEN_MAX {
        seen.sort_by_key(|flow| {
            let resets = flow.resets_by_peer.saturating_add(flow.resets_by_tree);
            let repeated = flow.repeated_by_peer.saturating_add(flow.repeated_by_tree);
            std::cmp::Reverse((resets, flow.dropped, repeated, flow.first_out_us))
        });
        seen.truncate(FLOWS_SEEN_MAX);
    }
    seen
}

fn of(activity: &FlowActivity, mark_ns: u64) -> FlowSeen {
    let FlowActivity {
        flow,
        ingress,
        egress,
        dropped,
    } = activity;
    FlowSeen {
        flow: *flow,
        kept: ingress.kept,
        dropped: *dropped,
        returned: ingress.returned,
        repeated_by_peer: ingress.repeated,
        repeated_by_tree: egress.repeated,
        resets_by_peer: ingress.resets,
        resets_by_tree: egress.resets,
        first_out_us: egress
            .first_ns
            .checked_sub(mark_ns)
            .filter(|_| mark_ns != 0)
            .map(|ns| ns / 1000),
    }
}
