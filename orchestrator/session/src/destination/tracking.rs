//! This host's connection tracking learns of the tree's connections before
//! their packets come: a stateful filter would drop them otherwise.

use std::collections::HashMap;

use migrate_conntrack::{Table, is_in_use};
use migrate_core::Flow;
use migrate_core::tracked::Tracked;

use super::Destination;
use crate::error::{Error, chain};

/// Entries that were made here, by the connection as its socket has it.
pub(super) type Made = HashMap<Flow, Tracked>;

impl Destination {
    /// Makes entries that the source's table had, and lets the gate know of
    /// connections that are something else on the wire.
    pub(super) fn track(&mut self, entries: Vec<Tracked>) -> Result<(), Error> {
        let addresses = self.addresses();
        let is_local = |at: std::net::SocketAddr| addresses.contains(&at.ip().to_canonical());
        let mut table = None;
        for entry in entries {
            // A source can name connections of the addresses that it gives
            // away, and no others.
            let Some((flow, wire)) = entry.flows(is_local) else {
                continue;
            };
            if flow != wire
                && let Some(gate) = &self.gate
            {
                gate.add_flows(&[wire])?;
            }
            self.make(&mut table, flow, entry);
        }
        Ok(())
    }

    /// Makes entries for connections of which the source's table knew nothing,
    /// where this host tracks connections.
    pub(super) fn track_untracked(&mut self, flows: &[Flow]) {
        let new: Vec<Flow> = flows
            .iter()
            .filter(|flow| !self.tracked.contains_key(flow))
            .copied()
            .collect();
        if new.is_empty() || !is_in_use() {
            return;
        }
        let listeners = self
            .order
            .as_ref()
            .map_or_else(Vec::new, |order| order.tree.listeners.clone());
        let mut table = None;
        for flow in new {
            let accepted = listeners
                .iter()
                .any(|listener| listener.local.port() == flow.local.port());
            self.make(&mut table, flow, Tracked::established(&flow, accepted));
        }
    }

    fn make(&mut self, table: &mut Option<Table>, flow: Flow, entry: Tracked) {
        // Made up before its source had told what it is.
        let former = self.tracked.get(&flow);
        let put = |table: &mut Table| {
            if let Some(former) = former.filter(|former| former.original != entry.original) {
                table.remove(former)?;
            }
            table.put(&entry)
        };
        let made = match table {
            Some(table) => put(table),
            None => Table::open().and_then(|opened| put(table.insert(opened))),
        };
        match made {
            Ok(()) => drop(self.tracked.insert(flow, entry)),
            // A kernel that tracks nothing has no filter that would ask.
            Err(error) => {
                tracing::warn!(error = %chain(&error), %flow, "not known to connection tracking");
            }
        }
    }

    /// Removes what was made.
    pub(super) fn untrack(&mut self) -> Result<(), String> {
        if self.tracked.is_empty() {
            return Ok(());
        }
        let made = std::mem::take(&mut self.tracked);
        Table::open()
            .and_then(|mut table| made.values().try_for_each(|entry| table.remove(entry)))
            .map_err(|error| chain(&error))
    }
}
