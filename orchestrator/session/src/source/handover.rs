//! Handover, takeover, finish: the commit and what follows it.
//!
//! The order of the steps (`migrate_core::protocol::source`) is the safety
//! argument of the whole tool:
//!
//! 1. The destination has a complete copy that has not run an instruction.
//! 2. The fence is closed: from here on the tree does not run even when CRIU
//!    dies. That CRIU is alive *after* the fence has closed proves that the
//!    tree has not run since the dump, for only CRIU held it.
//! 3. `HandedOver` goes on record. From here on this host runs the tree again
//!    only when the destination has put on record that it never will.
//! 4. The gate stays closed for good, the address is withdrawn: nothing on
//!    this host answers a peer any more.
//! 5. `Go` is sent. An error of that send proves nothing about its arrival.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::facts::AddressFacts;
use migrate_core::journal::Stage;
use migrate_core::protocol::Machine as _;
use migrate_core::protocol::source::{Event, Step};
use migrate_core::report::{Continuity, FlowSeen};
use migrate_core::wire::Message;
use migrate_criu::{Notice, Session};
use migrate_gate::Gate;

use super::{Engine, Migration, STEP_LIMIT, Target, detach, micros, not_yet, verdict};
use crate::cancel::Cancel;
use crate::error::Error;
use crate::park::Place;

impl Migration {
    /// How long the destination may take to put the ownership on record, at
    /// least and at most: what is left of `--max-blackout` lies between. After
    /// that it is asked who owns the tree, which ends the doubt.
    const OWNED_LIMIT: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

    /// How often a lost answer is asked for.
    const VERDICT_TRIES: u32 = 5;

    /// Closes the fence.
    pub(super) fn close_fence(&mut self) -> Result<(), Error> {
        let fence = self.fence.as_ref().ok_or_else(|| not_yet("the fence"))?;
        fence.close()?;
        crate::pause::at("fenced");
        fence.holds(&self.plan()?.tree)?;
        Ok(())
    }

    /// Makes sure that the tree has not run since it was dumped, and that
    /// nothing here answers for it.
    pub(super) async fn prove(&mut self) -> Result<(), Error> {
        let Engine::Dumping(session) = &mut self.engine else {
            return Err(not_yet("CRIU's dump"));
        };
        if !session.alive() {
            return Err(Error::Changed(
                "CRIU has died, and the tree may have run since it was dumped".to_owned(),
            ));
        }
        if let Some(delivery) = &mut self.delivery {
            delivery.holds().await?;
        }
        if let Some(lease) = self.lease.take() {
            lease.abort();
            let _ = lease.await;
        }
        self.end().await?;
        if let Some(gate) = self.gate() {
            if !self.request.choices.lock.is_gate() {
                // From here on nothing on this host may answer, whoever locked
                // the network so far.
                gate.close()?;
            }
            gate.lease(None)?;
            if !gate.is_in_place() {
                return Err(Error::Changed(
                    "somebody has removed the gate or put a tc program in front of it: peers may have been answered that the copy knows nothing of"
                        .to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// Puts `HandedOver` on record.
    pub(super) fn record_handover(&mut self, cancel: &Cancel) -> Result<(), Error> {
        // The last moment at which that is possible.
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let journal = self.journal.as_mut().ok_or_else(|| not_yet("the record"))?;
        journal.stage(Stage::HandedOver)
    }

    /// Takes the addresses away, and sends what has been held meanwhile.
    pub(super) async fn withdraw(&mut self) -> Result<(), Error> {
        let net = self.net.as_ref().ok_or_else(|| not_yet("netlink"))?;
        for address in self.withdrawing().to_vec() {
            self.withdrawn.push(net.withdraw(&address).await?);
        }
        let limit = self.owned_limit();
        // A peer that takes nothing must not keep the tree standing still.
        match tokio::time::timeout(limit, self.carry(Vec::new())).await {
            Ok(carried) => carried,
            Err(_) => Err(self.silent("the reception of held packets", limit)),
        }
    }

    /// What is left of `--max-blackout`, within reason.
    fn owned_limit(&self) -> Duration {
        let until = *self.frozen_until.borrow();
        let left = until.map_or(Duration::ZERO, |until| {
            until.saturating_duration_since(Instant::now())
        });
        let [least, most] = Self::OWNED_LIMIT;
        left.clamp(least, most)
    }

    /// Sends `Go` and waits for the word that the destination owns the tree.
    pub(super) async fn go(&mut self) -> Result<(), Error> {
        const AWAITED: &str = "the destination's word that it owns the tree";
        crate::pause::at("sealed");
        self.moments.committed = Some(Instant::now());
        let limit = self.owned_limit();
        // A peer that takes nothing must not keep the tree in doubt.
        let sent = tokio::time::timeout(limit, self.send(&Message::Go)).await;
        // Whatever came of that: it may have arrived.
        self.begin_delivery();
        match sent {
            Ok(sent) => sent?,
            Err(_) => return Err(self.silent(AWAITED, limit)),
        }
        match self.next_while_carrying(AWAITED, limit).await? {
            Message::Owned => {
                self.moments.owned = Some(Instant::now());
                Ok(())
            }
            other => Err(self.unexpected(&other, AWAITED)),
        }
    }

    /// The addresses that leave this host with the tree.
    pub(super) fn withdrawing(&self) -> &[AddressFacts] {
        match &self.plan {
            Some(plan) if !self.request.choices.in_place => &plan.facts.addresses,
            Some(_) | None => &[],
        }
    }

    /// Asks the destination what its record says, until its answer is one that
    /// the step has a use for. Where the copy has provably never run, the
    /// destination has given it up by the time it answers.
    pub(super) async fn ask(&mut self, step: Step, lost: Option<&Error>) -> Result<Event, Error> {
        let because = lost.map_or_else(String::new, |lost| format!(", because {}", lost.chain()));
        self.reporter
            .warn(format!("asking the destination who owns the tree{because}"));
        // The old connection is closed first, so that nothing of it arrives later.
        if let Some(mut link) = self.link.take() {
            let _ = tokio::time::timeout(Self::FAREWELL_LIMIT, link.sender.close()).await;
        }
        let peer = self
            .journal
            .as_ref()
            .map_or_else(String::new, |journal| journal.record().peer.clone());
        let mut last = None;
        let host = match &self.request.target {
            Target::Host(host) => host,
            // What lies there is the answer.
            Target::Directory(place) => return self.ask_directory(step, place.clone(), 1).await,
            Target::Keeper(keeper) => {
                let stub = keeper.stub.clone();
                return self.ask_directory(step, stub, Self::VERDICT_TRIES).await;
            }
        };
        for _ in 0..Self::VERDICT_TRIES {
            let asked = verdict::ask(host, &self.id, &peer, &self.reporter);
            match asked.await {
                Ok((link, stage)) => match Event::says(stage) {
                    Some(event) if step.on(event).is_ok() => {
                        self.link = Some(link);
                        self.disowned = event == Event::SaysNever;
                        if !self.disowned {
                            self.reporter
                                .warn(format!("the destination's record says {stage:?}"));
                        }
                        return Ok(event);
                    }
                    _ => {
                        last = Some(Error::Changed(format!("the destination answers {stage:?}")));
                    }
                },
                Err(error) => last = Some(error),
            }
            tokio::time::sleep(verdict::PAUSE).await;
        }
        Err(Error::Undecided(Box::new(
            last.unwrap_or_else(|| not_yet("an answer")),
        )))
    }

    /// The same where a manifest is the answer, here or with the keeper of a stub.
    async fn ask_directory(
        &mut self,
        step: Step,
        place: Place,
        tries: u32,
    ) -> Result<Event, Error> {
        let mut last = not_yet("an answer");
        for tried in 1..=tries {
            match crate::park::verdict(&place, &self.id)
                .await
                .map(Event::says)
            {
                Ok(Some(event)) if step.on(event).is_ok() => {
                    self.disowned = event == Event::SaysNever;
                    return Ok(event);
                }
                Ok(_) => last = not_yet("an answer"),
                Err(error) => last = error,
            }
            if tried < tries {
                tokio::time::sleep(verdict::PAUSE).await;
            }
        }
        Err(Error::Undecided(Box::new(last)))
    }

    /// Waits for the running copy; how it runs.
    pub(super) async fn await_running(&mut self) -> Result<String, Error> {
        const AWAITED: &str = "the running copy";
        match self.next_while_carrying(AWAITED, STEP_LIMIT).await? {
            Message::Running(report) => self.running = report,
            other => return Err(self.unexpected(&other, AWAITED)),
        }
        self.moments.running = Some(Instant::now());
        self.precedence = None;
        let cgroup = match self.running.cgroup.as_str() {
            "" => "/",
            path => path,
        };
        Ok(match &self.request.target {
            Target::Host(_) => format!("runs as {} in cgroup {cgroup}", self.running.root_pid),
            Target::Directory(_) => "waits on the disk".to_owned(),
            Target::Keeper(_) => "waits on the keeper's disk".to_owned(),
        })
    }

    /// Peers have heard the announcement by now; what was under way to the old place is
    /// the last that comes here. Done once.
    pub(super) async fn end_stream(&mut self) {
        if std::mem::replace(&mut self.stream_ended, true) {
            return;
        }
        if let Err(error) = self.carry(Vec::new()).await {
            tracing::warn!(error = %error.chain(), "stragglers were lost");
        }
        self.held = None;
        if let Some(link) = &mut self.link {
            // The destination waits for stragglers until this end.
            let _ = link.sender.close().await;
        }
    }

    /// Removes what is left of the tree here. CRIU kills it with its sockets
    /// in repair mode, so that no FIN and no RST leaves.
    pub(super) async fn remove(&mut self) -> String {
        let mut leftovers = Vec::new();
        let mut removed = true;
        let mut seen = None;
        // From here on CRIU's end means nothing.
        if let Some(watch) = self.watch.take() {
            watch.end();
        }
        if let Some(plan) = &self.plan {
            let pids: Vec<i32> = plan.tree.processes.iter().map(|task| task.pid).collect();
            migrate_proc::end_behind_others(&pids);
        }
        if let Engine::Dumping(session) = std::mem::replace(&mut self.engine, Engine::None)
            && let Err(error) = kill(session).await
        {
            // A CRIU that has died leaves the tree to the fence.
            tracing::warn!(error = %error.chain(), "CRIU has not ended the frozen tree");
            if let Some(fence) = &self.fence
                && let Err(error) = crate::recover::end_silently(fence)
            {
                removed = false;
                leftovers.push(format!(
                    "could not remove the frozen tree: {}",
                    crate::error::chain(&error)
                ));
            }
        }
        self.end_stream().await;
        if let Some(fence) = self.fence.take()
            && let Err(error) = fence.release()
        {
            leftovers.push(format!(
                "could not remove the fence: {}",
                crate::error::chain(&error)
            ));
        }
        if let Some(hold) = self.supervisor.take() {
            // Waits for systemd to notice the end, which it does by polling.
            let released = tokio::task::spawn_blocking(|| hold.release_after_end()).await;
            match released {
                Ok(Ok(())) => {}
                Ok(Err(error)) => leftovers.push(format!(
                    "could not give the unit back to systemd: {}",
                    crate::error::chain(&error)
                )),
                Err(error) => leftovers.push(error.to_string()),
            }
        }
        if let Some(gate) = self.gate.take() {
            // Closed connections would go on to speak for an address that is
            // another host's now. The gate keeps in what their removal says.
            let addresses: Vec<IpAddr> = self.withdrawing().iter().map(|a| a.ip).collect();
            match migrate_net::remove_closed(&addresses) {
                Ok(0) => {}
                Ok(removed) => tracing::debug!(removed, "closed connections removed"),
                Err(error) => {
                    leftovers.push(format!(
                        "could not remove closed connections: {}",
                        crate::error::chain(&error)
                    ));
                }
            }
            self.forget_tracked();
            if let Err(why) = self.clear_lock() {
                leftovers.push(format!("could not remove CRIU's network lock: {why}"));
            }
            if let Ok(counted) = gate.counters() {
                self.counted = counted;
            }
            seen = Some(crate::seen::seen(&gate));
            // What the kernel has to say for a tree that is left is not for
            // its peers: they talk to the copy.
            if self.request.choices.in_place {
                // Nobody may answer for the tree until it is back.
                if let Err(error) = leave(gate) {
                    leftovers.push(format!("could not leave the gate closed: {error}"));
                }
            } else if removed && let Err(error) = detach(gate) {
                leftovers.push(format!("could not detach the gate: {error}"));
            }
        }
        self.images = None;
        // Without it the keeper is asked before a resume.
        if let Err(error) = std::mem::take(&mut self.stub).kept() {
            leftovers.push(format!(
                "could not note who keeps the tree: {}",
                error.chain()
            ));
        }
        if let Some(seen) = seen {
            self.continuity = Some(self.sum_up(&seen).await);
        }
        if let Some(mut journal) = self.journal.take() {
            if leftovers.is_empty() {
                journal.discard();
            } else if let Err(error) = journal.stage(Stage::Done) {
                tracing::warn!(error = %error.chain(), "could not close the record");
            }
        }
        self.dismiss_guard();
        for leftover in leftovers {
            self.reporter.warn(leftover);
        }
        self.await_unit().await
    }
}

impl Migration {
    /// How long the destination may take for its last word. It is for the
    /// report only; the destination has no more to do than to wipe images.
    const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);

    /// Waits for the word which unit has the tree; how it reads. Nothing depends on it.
    async fn await_unit(&mut self) -> String {
        if !self.running.adopting {
            return String::new();
        }
        let Some(link) = &mut self.link else {
            return String::new();
        };
        let adopted = match link.inbox.adopted().await {
            Ok(adopted) => adopted,
            Err(error) => {
                self.reporter.warn(format!(
                    "the tree runs, and the destination has not said in which unit: {}; `systemctl \
                     status {}` there does",
                    error.chain(),
                    self.running.root_pid
                ));
                return String::new();
            }
        };
        if let Some(warning) = adopted.warning {
            self.reporter.warn(warning);
        }
        let detail = match &adopted.unit {
            Some(unit) => format!("{unit} has the tree"),
            None => String::new(),
        };
        self.unit = adopted.unit;
        detail
    }

    /// What peers noticed: what this host's gate has seen, and the other's.
    async fn sum_up(&mut self, seen: &[FlowSeen]) -> Continuity {
        let closed = self.moments.gate_closed;
        let until_owned = match (closed, self.moments.committed) {
            (Some(closed), Some(committed)) => committed.saturating_duration_since(closed),
            _ => Duration::ZERO,
        };
        // Only on the connection over which it has said that the tree runs.
        let theirs = match (&mut self.link, self.moments.running) {
            (Some(link), Some(_)) => {
                let last = link.inbox.next_within("what it saw", Self::LAST_WORD_LIMIT);
                match last.await {
                    Ok(Message::Seen(seen)) => Some(seen),
                    Ok(_) | Err(_) => None,
                }
            }
            _ => None,
        };
        Continuity::of(seen, theirs.as_deref(), micros(until_owned), self.was_quiet)
    }
}

/// Leaves a gate closed that nobody else holds.
fn leave(gate: Arc<Gate>) -> Result<(), String> {
    match Arc::into_inner(gate) {
        Some(gate) => gate.leave().map_err(|e| crate::error::chain(&e)),
        None => Err("it is still in use".to_owned()),
    }
}

/// Lets CRIU end the dump and with it the tree.
async fn kill(mut session: Session) -> Result<(), Error> {
    session.answer(true).await?;
    loop {
        match session.next(Migration::THAW_LIMIT).await? {
            Notice::Finished(_) => return Ok(()),
            _ => session.answer(true).await?,
        }
    }
}
