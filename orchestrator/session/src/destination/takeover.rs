//! Handover and takeover: the record that makes the tree ours, and the order
//! in which its world opens again.
//!
//! After `Owned` is on record: egress opens, the address is announced, CRIU
//! takes the sockets out of repair mode (their window probes may leave),
//! ingress opens, the tree runs.

use std::time::{Duration, Instant};

use migrate_core::journal::Stage;
use migrate_core::wire::{Message, RunningReport};
use migrate_criu::Notice;
use migrate_proc::Home;

use super::receive::nothing;
use super::{Destination, Engine};
use crate::error::Error;

impl Destination {
    /// CRIU's last steps take milliseconds; this is for a machine in distress.
    const RESUME_LIMIT: Duration = Duration::from_secs(30);

    /// Waits for the commit.
    pub(super) async fn await_go(&mut self, blackout_limit: Duration) -> Result<(), Error> {
        const AWAITED: &str = "the source's go";
        match self
            .message(AWAITED, blackout_limit.max(Self::RESUME_LIMIT))
            .await?
        {
            Message::Go => {}
            Message::Abort { reason } => return Err(Error::Aborted(reason)),
            other => return Err(self.unexpected(&other, AWAITED)),
        }
        let journal = self.journal.as_mut().ok_or_else(|| nothing("the record"))?;
        // Fails when a question of the source has closed the record meanwhile.
        journal.stage(Stage::Owned)?;
        self.owned = true;
        Ok(())
    }

    /// Runs the tree.
    pub(super) async fn take_over(&mut self) -> Result<(), Error> {
        let begun = Instant::now();
        // The source may be gone by now; the tree runs all the same.
        let told = self.send(&Message::Owned).await;
        if let Err(error) = told {
            tracing::warn!(error = %error.chain(), "could not tell the source that the tree is owned");
        }
        let addresses = self.addresses();
        let gate = self.gate.as_ref();
        if let Some(gate) = gate {
            gate.open_egress()?;
            gate.unstage_addresses(&addresses)?;
        }
        let order = self.order.as_ref().ok_or_else(|| nothing("the tree"))?;
        let net = self.net.as_ref().ok_or_else(|| nothing("netlink"))?;
        if let Err(error) = net.announce(&order.placements).await {
            tracing::warn!(error = %crate::error::chain(&error), "could not announce the address");
        }
        let Engine::Held(session) = &mut self.engine else {
            return Err(nothing("CRIU's restore"));
        };
        session.answer(true).await?;
        let mut told = false;
        loop {
            match session.next(Self::RESUME_LIMIT).await? {
                Notice::PreResume => {
                    if let Some(gate) = gate {
                        gate.open()?;
                    }
                    session.answer(true).await?;
                }
                // The tree runs; CRIU only has to end.
                Notice::PostResume => {
                    let counted = gate
                        .and_then(|gate| gate.counters().ok())
                        .unwrap_or_default();
                    let report = Message::Running(RunningReport {
                        root_pid: order.tree.root_pid,
                        takeover_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
                        dropped_packets: crate::dropped_packets(&counted),
                        rst_sent: counted.rst_sent,
                        cgroup: self.home.as_ref().map_or_else(String::new, Home::path),
                    });
                    if let Err(error) = self.sender.control(&report).await {
                        tracing::warn!(error = %crate::error::chain(&error), "could not tell the source that the tree runs");
                    }
                    told = true;
                    session.answer(true).await?;
                }
                Notice::Finished(_) => break,
                _ => session.answer(true).await?,
            }
        }
        if !told {
            return Err(nothing("CRIU's word that the tree runs"));
        }
        self.clean_up().await;
        Ok(())
    }

    /// Nothing here may fail the migration any more.
    async fn clean_up(&mut self) {
        if let Some(home) = self.home.take() {
            home.keep();
        }
        if let Some(gate) = self.gate.take()
            && let Err(error) = gate.detach()
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not detach the gate");
        }
        // Takes a while when there are many.
        if let Some(images) = self.images.take()
            && let Err(error) = images.wipe()
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not wipe the images");
        }
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.stage(Stage::Done)
        {
            tracing::warn!(error = %error.chain(), "could not close the record");
        }
        if let (Some(net), Some(order)) = (&self.net, &self.order)
            && let Err(error) = net.announce_again(order.placements.clone()).await
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not announce the address again");
        }
    }
}
