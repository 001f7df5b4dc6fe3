//! Track and prepare: everything that can be done while the tree runs.

use std::sync::Arc;
use std::time::Duration;

use migrate_core::journal::{Claims, RECORD_VERSION, Record, Side, Stage};
use migrate_core::report::counted;
use migrate_core::wire::{Message, NetworkLock};
use migrate_criu::WorkerOptions;
use migrate_gate::{Gate, GateOptions, Role};
use migrate_proc::{Fence, HoldDown};
use serde::Serialize;

use super::{CONNECT_LIMIT, Engine, MemoryEngine, Migration, READY_LIMIT, not_yet};
use crate::error::Error;
use crate::guard::Guard;
use crate::images::ImagePlace;
use crate::journal::Journal;

impl Migration {
    /// A gate whose owner is gone opens by itself after this time. Longer than
    /// any delay a live owner has, shorter than TCP peers give up.
    const LEASE: Duration = Duration::from_secs(4);

    /// How often a live owner renews its lease.
    const RENEWAL: Duration = Duration::from_secs(1);

    /// Room for connections that come while the migration runs.
    const SPARE_FLOWS: usize = 4096;

    /// Attaches the gate, open, and teaches it the tree's connections.
    pub(super) async fn track(&mut self) -> Result<String, Error> {
        let record = self.record()?;
        self.journal = Some(Journal::begin(&self.state, record)?);
        self.guard = Guard::start(&self.id, Side::Source);
        if let Some(supervisor) = &self.plan()?.supervisor {
            let held = migrate_proc::hold_down(supervisor)?;
            self.supervisor = Some(held);
        }
        let plan = self.plan()?;
        if plan.interfaces.is_empty() {
            return Ok("no gate: nobody reaches the tree from outside".to_owned());
        }
        let flows = &plan.facts.flows;
        let listeners = &plan.facts.listeners;
        let capacity = flows.len() * 2 + Self::SPARE_FLOWS + Gate::ENDED_MAX;
        let gate = Arc::new(Gate::attach(
            &plan.interfaces,
            &GateOptions {
                id: self.id.clone(),
                role: Role::Source,
                flow_capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
                directory: self.state.gates(),
                hold: (self.request.choices.lock == NetworkLock::Gate)
                    .then(|| crate::held::bounds(plan.facts.windows)),
                is_extensible: false,
            },
        )?);
        let detail = format!(
            "gate on {}, {}, {}",
            counted(plan.interfaces.len(), "interface"),
            counted(flows.len(), "connection"),
            counted(listeners.len(), "listener")
        );
        let filled = gate
            .lease(Some(Self::LEASE))
            .and_then(|()| gate.add_flows(flows))
            .and_then(|()| gate.add_listeners(listeners));
        gate.start_tracking();
        gate.set_progress(self.step.phase().number(), 0);
        self.held = gate.held().ok();
        match (self.request.choices.lock, gate.drop_reason()) {
            (NetworkLock::Gate, None) => {}
            (NetworkLock::Gate, Some(reason)) => self
                .reporter
                .warn(format!("packets are dropped, not held: {reason}")),
            (NetworkLock::Nftables | NetworkLock::Iptables | NetworkLock::Drop, _) => self
                .reporter
                .warn("packets are dropped, not held: peers send them again after 200 ms or more"),
            (NetworkLock::Skip, _) => self.reporter.warn(
                "nothing keeps packets from the frozen tree: what peers send between the dump and \
                 the handover is acknowledged and lost",
            ),
        }
        self.gate = Some(Arc::clone(&gate));
        filled?;
        self.lease = Some(tokio::spawn(async move {
            let mut renewal = tokio::time::interval(Self::RENEWAL);
            loop {
                renewal.tick().await;
                if let Err(error) = gate.lease(Some(Self::LEASE)) {
                    tracing::warn!(error = %crate::error::chain(&error), "could not renew the gate's lease");
                }
            }
        }));
        Ok(detail)
    }

    /// Gets both sides ready, so that the blackout holds nothing that can be
    /// done before it.
    pub(super) async fn prepare(&mut self) -> Result<String, Error> {
        const AWAITED: &str = "the destination's word that it is ready";
        let prepare = Message::Prepare {
            blackout_limit_ms: u64::try_from(self.request.choices.max_blackout.as_millis())
                .unwrap_or(u64::MAX),
            verify: self.request.choices.verify,
            streams: self.request.choices.streams,
            restore: self.request.choices.effective_restore(),
            lock: self.request.choices.lock,
            postcopy: self.request.choices.may_postcopy(),
        };
        self.send(&prepare).await?;

        let images = self.state.image_root()?.join(&self.id);
        let plan = self.plan.as_ref().ok_or_else(|| not_yet("the plan"))?;
        // On record before it is there, for whoever clears up after a crash.
        let intent = Fence::plan(&plan.tree, &self.id)?;
        let net = self.net.as_ref().ok_or_else(|| not_yet("netlink"))?;
        let mut withdrawn = Vec::new();
        for address in self.withdrawing() {
            withdrawn.push(net.plan_withdrawal(address).await?);
        }
        if let Some(journal) = &mut self.journal {
            let fence = encode(&intent)?;
            let withdrawn = encode(&withdrawn)?;
            journal.update(|record| {
                record.fence = Some(fence);
                record.withdrawn = Some(withdrawn);
                record.images = Some(images.display().to_string());
            })?;
        }
        let fence = Fence::prepare(&plan.tree, &self.id)?;
        let made = fence.record();
        let kind = fence.kind();
        self.fence = Some(fence);
        if made != intent
            && let Some(journal) = &mut self.journal
        {
            let fence = encode(&made)?;
            journal.update(|record| record.fence = Some(fence))?;
        }
        self.images = Some(ImagePlace::make(images.clone())?);
        let plan = self.plan()?;
        // CRIU refuses one that the tree opens from here on, unless it is told.
        let tunnel = plan.facts.tunnel.is_some();
        let shim = plan.engine == MemoryEngine::Uffd || tunnel;
        let worker = self
            .criu()?
            .worker(WorkerOptions {
                shim,
                tunnel,
                ..WorkerOptions::default()
            })
            .await?;
        self.engine = Engine::Ready(worker);

        let link = self
            .link
            .as_mut()
            .ok_or_else(|| not_yet("the connection"))?;
        loop {
            match link.inbox.next_within(AWAITED, READY_LIMIT).await? {
                Message::Prepared => break,
                // From here on something of the set is there.
                Message::Store(store) => self.stub.begun(store),
                other => return Err(link.inbox.unexpected(&other, AWAITED)),
            }
        }
        self.open_streams().await?;
        Ok(format!(
            "fence by {kind}, {}",
            counted(self.request.choices.streams as usize, "stream")
        ))
    }

    /// Opens the further connections. From here on everything goes over all of
    /// them, up to `Dumped`.
    async fn open_streams(&mut self) -> Result<(), Error> {
        let (streams, options) = (self.request.choices.streams, self.request.choices.stream);
        let may_postcopy = self.request.choices.may_postcopy();
        let link = self.link()?;
        let broken = |source| Error::Channel {
            peer: link.peer.clone(),
            source,
        };
        let further = link
            .further
            .take()
            .ok_or_else(|| not_yet("the way to further connections"))?;
        let count = streams.saturating_sub(1) + u32::from(may_postcopy);
        let mut lanes = further.open(count, CONNECT_LIMIT).await.map_err(broken)?;
        // The last one is no part of the page stream.
        let late = may_postcopy.then(|| lanes.pop()).flatten();
        let late_lane = late.map(|lane| lane.into_ends(&link.peer));
        let sender = &mut link.sender;
        sender.control(&Message::Streams).await.map_err(broken)?;
        sender.stripe(lanes, options).await.map_err(broken)?;
        self.late_lane = late_lane;
        Ok(())
    }

    fn record(&self) -> Result<Record, Error> {
        let plan = self.plan()?;
        let peer = self
            .link
            .as_ref()
            .map_or_else(String::new, |link| link.peer.clone());
        let owner_pid = std::process::id().cast_signed();
        Ok(Record {
            version: RECORD_VERSION,
            migration_id: self.id.clone(),
            side: Side::Source,
            stage: Stage::Preparing,
            owner_pid,
            owner_start_ticks: migrate_proc::start_ticks(owner_pid).unwrap_or(0),
            root_pid: self.request.pid,
            pids: plan.tree.pids(),
            name: plan
                .facts
                .processes
                .first()
                .map_or_else(String::new, |process| process.name.clone()),
            peer,
            addresses: self.withdrawing().to_vec(),
            images: None,
            fence: None,
            // On record before it is there, as the fence.
            hold_down: plan
                .supervisor
                .as_ref()
                .and_then(HoldDown::plan)
                .map(|held| encode(&held))
                .transpose()?,
            route: Some(self.request.route.clone()),
            withdrawn: None,
            network_lock: self.request.choices.lock,
            home: None,
            claims: Claims::default(),
        })
    }
}

fn encode(record: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(record)
        .map_err(|error| Error::file("encode", "a part of the record")(error.into()))
}
