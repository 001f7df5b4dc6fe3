//! The tree's connections while it runs: what the gate learns between the first
//! look and the freeze, and the moment at which the gate closes.

use std::time::{Duration, Instant};

use migrate_core::{Flow, Listener};
use migrate_gate::{FlowCount, Gate};
use tokio::task::JoinHandle;

use super::Migration;
use crate::error::Error;

/// A look at the tree's sockets that runs beside a round: it takes milliseconds
/// for a thousand connections, and the round is not to wait for it.
#[derive(Default)]
pub(super) struct Look {
    under_way: Option<JoinHandle<Result<Found, Error>>>,
}

/// Connections and listeners.
type Found = (Vec<Flow>, Vec<Listener>);

impl Look {
    /// Begins to look, unless the last look is not over.
    pub(super) fn begin(&mut self, pid: i32) {
        if self.under_way.is_none() {
            self.under_way = Some(tokio::task::spawn_blocking(move || {
                let inodes = migrate_proc::tree(pid)?.socket_inodes()?;
                Ok(migrate_net::tree_flows(&inodes)?)
            }));
        }
    }

    /// What was found, once the look is over.
    async fn found(&mut self) -> Option<Found> {
        let over = self.under_way.take_if(|look| look.is_finished())?;
        match over.await {
            Ok(Ok(found)) => Some(found),
            // The look of the frozen tree is the one that counts.
            Ok(Err(error)) => {
                tracing::debug!(error = %error.chain(), "could not look at the tree's sockets");
                None
            }
            Err(_) => None,
        }
    }
}

impl Migration {
    /// Teaches the gate what has come and gone, and counts the flows of the
    /// round that has just ended; none without a gate.
    pub(super) async fn count_flows(&self, look: &mut Look) -> Option<FlowCount> {
        let gate = self.gate.as_deref()?;
        gate.set_progress(self.step.phase().number(), self.rounds);
        let found = look.found().await;
        match teach(gate, found.as_ref()) {
            Ok(count) => Some(count),
            Err(error) => {
                tracing::debug!(error = %crate::error::chain(&error), "flows were not counted");
                None
            }
        }
    }
}

impl Migration {
    /// Waits for a moment at which no connection has traffic, so that few
    /// packets meet a closed gate. The tree runs meanwhile, and nothing is
    /// stopped or promised yet: this is no part of the blackout. Tells whether
    /// there was such a moment.
    pub(super) async fn await_quiet(&self) -> bool {
        /// Between two looks: the shortest time that a timer here keeps.
        const LOOK_AGAIN: Duration = Duration::from_millis(1);
        /// So long nobody must have spoken: a request and its answer over a
        /// local network take less, so that none is under way.
        const QUIET: Duration = Duration::from_millis(2);
        /// Under steady load there is no such moment. What the tree writes to
        /// its memory meanwhile lengthens the dump, so not long.
        const LIMIT: Duration = Duration::from_millis(20);

        let Some(gate) = self.gate() else {
            return true;
        };
        let begun = Instant::now();
        let (mut last, mut since) = (None, begun);
        loop {
            let Ok(packets) = gate.tracked_packets() else {
                return false;
            };
            let now = Instant::now();
            if last != Some(packets) {
                (last, since) = (Some(packets), now);
            }
            if now.duration_since(since) >= QUIET {
                return true;
            }
            if now.duration_since(begun) >= LIMIT {
                return false;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

fn teach(gate: &Gate, found: Option<&Found>) -> Result<FlowCount, migrate_gate::GateError> {
    if let Some((flows, listeners)) = found {
        gate.retain_flows(flows)?;
        gate.add_flows(flows)?;
        gate.add_listeners(listeners)?;
    }
    gate.next_round()
}
