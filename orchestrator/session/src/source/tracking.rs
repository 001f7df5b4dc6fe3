//! What this host's connection tracking knows of the tree's connections goes
//! with them: a filter on the destination would drop packets of connections
//! that it has never seen begin.

use std::net::{IpAddr, SocketAddr};

use migrate_conntrack::{Table, entries, is_in_use};
use migrate_core::Flow;
use migrate_core::preflight::Finding;
use migrate_core::report::counted;
use migrate_core::tracked::Tracked;
use migrate_core::wire::Message;

use super::Migration;
use crate::error::{Error, chain};

/// Entries in one message, which may have 4 MiB; one takes 100 bytes at most.
const ENTRIES_MAX: usize = 16 << 10;

/// The kernel's states of connections that are there: SYN_RECV to LAST_ACK.
const LIVE_STATES: std::ops::RangeInclusive<u8> = 2..=6;

/// Live connections at these addresses.
fn at(addresses: &[IpAddr]) -> Result<Vec<Tracked>, migrate_conntrack::ConntrackError> {
    entries(|entry| {
        LIVE_STATES.contains(&entry.tcp_state) && entry.flows(|at| is_at(addresses, at)).is_some()
    })
}

fn is_at(addresses: &[IpAddr], at: SocketAddr) -> bool {
    addresses.contains(&at.ip().to_canonical())
}

/// What is to be said about connections that this host translates.
pub(super) fn findings(addresses: &[IpAddr]) -> Vec<Finding> {
    let subject = "address translation";
    if addresses.is_empty() || !is_in_use() {
        return Vec::new();
    }
    let translated: Vec<(Flow, Flow)> = match at(addresses) {
        Ok(entries) => entries
            .iter()
            .filter(|entry| entry.is_translated())
            .filter_map(|entry| entry.flows(|at| is_at(addresses, at)))
            .collect(),
        Err(error) => {
            return vec![Finding::note(
                subject,
                chain(&error),
                "a stateful filter on the destination may drop the connections",
            )];
        }
    };
    let mut findings = Vec::new();
    if let Some((flow, wire)) = translated
        .iter()
        .find(|(_, wire)| !is_at(addresses, wire.local))
    {
        findings.push(Finding::refused(
            subject,
            format!(
                "peers reach {flow} as {}, an address that stays on this host",
                wire.local
            ),
            "let the clients use the workload's own address, or pass `--address` for the one they use",
        ));
    } else if !translated.is_empty() {
        findings.push(Finding::note(
            subject,
            format!(
                "{} translated by this host's rules; they move, and new ones need the same rules \
                 on the destination",
                counted(translated.len(), "connection")
            ),
            "",
        ));
    }
    findings
}

impl Migration {
    /// Sends what is known before the tree stands still.
    pub(super) async fn tell_tracked(&mut self) -> Result<(), Error> {
        if self.gate().is_none() || !is_in_use() {
            return Ok(());
        }
        match at(&self.moved()) {
            Ok(entries) => self.send_tracked(entries).await,
            Err(error) => {
                self.reporter.warn(format!(
                    "a stateful filter on the destination may drop the connections: {}",
                    chain(&error)
                ));
                Ok(())
            }
        }
    }

    /// Sends what is known of connections that have come since.
    pub(super) async fn tell_tracked_of(&mut self, flows: &[Flow]) -> Result<(), Error> {
        let new: Vec<&Flow> = flows
            .iter()
            .filter(|flow| !self.tracked_flows.contains(flow))
            .collect();
        if new.is_empty() || self.gate().is_none() || !is_in_use() {
            return Ok(());
        }
        // Not found, they are made up by the destination.
        let Ok(mut table) = Table::open() else {
            return Ok(());
        };
        let found = new
            .into_iter()
            .filter_map(|flow| table.find(flow).ok().flatten())
            .collect();
        self.send_tracked(found).await
    }

    async fn send_tracked(&mut self, entries: Vec<Tracked>) -> Result<(), Error> {
        let addresses = self.moved();
        let flows: Vec<(Flow, Flow)> = entries
            .iter()
            .filter_map(|entry| entry.flows(|at| is_at(&addresses, at)))
            .collect();
        let translated: Vec<Flow> = flows
            .iter()
            .filter(|(flow, wire)| flow != wire)
            .map(|(_, wire)| *wire)
            .collect();
        if let Some(gate) = self.gate() {
            // The gate stands outside the translation.
            gate.add_flows(&translated)?;
        }
        self.tracked_flows
            .extend(flows.iter().map(|(flow, _)| *flow));
        for part in entries.chunks(ENTRIES_MAX) {
            self.send(&Message::Tracked(part.to_vec())).await?;
        }
        self.tracked.extend(entries);
        Ok(())
    }

    /// What has moved is not this host's to know any more. Failing that, it is
    /// forgotten in time.
    pub(super) fn forget_tracked(&mut self) {
        let entries = std::mem::take(&mut self.tracked);
        if entries.is_empty() {
            return;
        }
        let removed = Table::open()
            .and_then(|mut table| entries.iter().try_for_each(|entry| table.remove(entry)));
        if let Err(error) = removed {
            tracing::debug!(error = %chain(&error), "entries of moved connections stay");
        }
    }
}
