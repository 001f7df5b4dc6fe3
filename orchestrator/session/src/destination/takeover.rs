//! Handover and takeover: the record that makes the tree ours, and the order
//! in which its world opens again.
//!
//! After `Owned` is on record: egress opens for all but acknowledgements, the
//! address is announced, CRIU takes the sockets out of repair mode, held packets
//! go in, ingress opens, acknowledgements go out, the tree runs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use migrate_core::Flow;
use migrate_core::facts::TreeFacts;
use migrate_core::journal::Stage;
use migrate_core::protocol::Machine as _;
use migrate_core::wire::{Adopted, Message, RunningReport};
use migrate_criu::Notice;
use migrate_gate::{Gate, HeldPackets, Repeats};
use migrate_net::{Net, Placement};
use migrate_proc::{Adoption, Home};
use tokio::task::{JoinError, JoinHandle};

use super::receive::nothing;
use super::{Destination, Engine, Incoming, lazy};
use crate::cancel::Cancel;
use crate::error::Error;
use crate::figures;
use crate::held;

impl Destination {
    /// CRIU's last steps take milliseconds; this is for a machine in distress.
    const RESUME_LIMIT: Duration = Duration::from_secs(30);

    /// Waits for the commit.
    pub(super) async fn await_go(&mut self, blackout_limit: Duration) -> Result<(), Error> {
        const AWAITED: &str = "the source's go";
        loop {
            match self
                .message(AWAITED, blackout_limit.max(Self::RESUME_LIMIT))
                .await?
            {
                Message::Go => {
                    self.clock.go_came();
                    break;
                }
                Message::Ended { open, over } => self.has_ended(&open, &over)?,
                Message::Abort { reason } => return Err(Error::Aborted(reason)),
                other => return Err(self.unexpected(&other, AWAITED)),
            }
        }
        // Before anything is decided: a copy without its memory is none.
        self.lazy.handed_over().await?;
        self.lazy.is_coming()
    }

    /// The commit of this side.
    pub(super) fn own(&mut self) -> Result<(), Error> {
        self.copy_lives()?;
        let journal = self.journal.as_mut().ok_or_else(|| nothing("the record"))?;
        // Fails when a question of the source has closed the record meanwhile.
        journal.stage(Stage::Owned)?;
        self.lazy.is_owned();
        self.go_at = Some(Instant::now());
        crate::pause::at("owned");
        Ok(())
    }

    /// Tells the source, and lets the copy's world hear of it.
    pub(super) async fn open(&mut self) -> Result<(), Error> {
        if let Some(gate) = &self.gate {
            // What leaves from here on is what peers have waited for.
            gate.start_watching();
        }
        self.clock.go_answered();
        // The source may be gone by now; the tree runs all the same.
        let told = self.send(&Message::Owned).await;
        if let Err(error) = told {
            tracing::warn!(error = %error.chain(), "could not tell the source that the tree is owned");
        }
        if let Some(parked) = &self.parked
            && let Err(error) = crate::park::disarm(&self.state, parked)
        {
            // The tree runs, and nobody would hear it.
            tracing::error!(error = %crate::error::chain(&error), gate = parked, "could not remove the gate that has waited");
        }
        let addresses = self.addresses();
        let gate = self.gate.as_ref();
        if let Some(gate) = gate {
            gate.hold_answers();
            gate.unstage_addresses(&addresses)?;
        }
        let order = self.order.as_ref().ok_or_else(|| nothing("the tree"))?;
        let net = self.net.as_ref().ok_or_else(|| nothing("netlink"))?;
        if let Err(error) = net.announce(&order.placements).await {
            tracing::warn!(error = %crate::error::chain(&error), "could not announce the address");
        }
        // What the sockets have said while they were built may go out now.
        let (waiting, mut unsent) = held::parted(held::drain(&mut self.held));
        // A socket that is being built does not know its window yet.
        unsent.retain(|packet| !packet.is_bare());
        if let Some(gate) = gate {
            held::give_back(gate, &unsent);
        }
        self.waiting = waiting;
        Ok(())
    }

    /// Without CRIU, or whoever serves its memory, the copy is lost, and nothing but
    /// the source's tree is left.
    fn copy_lives(&mut self) -> Result<(), Error> {
        let Engine::Held(session) = &mut self.engine else {
            return Err(nothing("CRIU's restore"));
        };
        if !session.alive() {
            return Err(Error::Changed(
                "CRIU has died with the copy in its hands".to_owned(),
            ));
        }
        self.lazy.is_served()
    }

    /// Until here the copy can be proved never to have run.
    pub(super) fn note(&mut self) -> Result<(), Error> {
        self.copy_lives()?;
        let journal = self.journal.as_ref().ok_or_else(|| nothing("the record"))?;
        journal.let_go()
    }

    /// Lets the copy go.
    pub(super) async fn resume(&mut self) -> Result<(), Error> {
        let begun = self.go_at.unwrap_or_else(Instant::now);
        let mut waiting = std::mem::take(&mut self.waiting);
        let gate = self.gate.as_ref();
        let order = self.order.as_ref().ok_or_else(|| nothing("the tree"))?;
        let interface = |ip| interface_of(&order.placements, ip);
        let Engine::Held(session) = &mut self.engine else {
            return Err(nothing("CRIU's restore"));
        };
        if let Err(error) = session.answer(true).await {
            // What could not be said was not heard: the copy has never run.
            if let Some(journal) = &self.journal {
                journal.not_let_go()?;
            }
            return Err(error.into());
        }
        crate::pause::at("let-go");
        let mut at = Instant::now();
        let (mut told, mut repeats) = (false, Repeats::default());
        loop {
            match session.next(Self::RESUME_LIMIT).await? {
                // The sockets live. In the order in which peers have sent:
                // what the source held, what this host held, what comes now.
                Notice::PreResume => {
                    at = self.clock.part("criu_ends_repair", at);
                    if let Some(gate) = gate {
                        if let Incoming::Messages(inbox) = &mut self.incoming {
                            // After seconds most of it has been said twice.
                            let mut packets = inbox.take_packets();
                            packets.retain(|frame| !repeats.is_repeat(frame));
                            held::hand_over(gate, &packets, interface);
                        }
                        let waiting = std::mem::take(&mut waiting);
                        let repeats = std::mem::take(&mut repeats);
                        held::release(gate, &mut self.held, waiting, repeats)?;
                    }
                    at = self.clock.part("held_given_back", at);
                    session.answer(true).await?;
                }
                // The tree runs; CRIU only has to end.
                Notice::PostResume => {
                    at = self.clock.part("criu_lets_go", at);
                    let counted = gate
                        .and_then(|gate| gate.counters().ok())
                        .unwrap_or_default();
                    let unheld = match &self.incoming {
                        Incoming::Messages(inbox) => inbox.dropped_packets(),
                        Incoming::Frames(_) | Incoming::Closed => 0,
                    };
                    let report = Message::Running(RunningReport {
                        root_pid: order.tree.root_pid,
                        takeover_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
                        held_packets: counted.held_ingress_packets,
                        dropped_packets: crate::dropped_packets(&counted) + unheld,
                        rst_sent: counted.rst_sent,
                        lazy_pages: self.lazy.pages(),
                        cgroup: self.home.as_ref().map_or_else(String::new, Home::path),
                        timing: self.clock.timing(self.step.name()),
                        adopting: order.adoption != Adoption::Stays,
                    });
                    figures::runs(self.clock.still(), &counted);
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
        crate::pause::at("running");
        Ok(())
    }

    /// Puts `Done` on record and clears up. Nothing may fail the migration any more,
    /// but that the tree does not get its memory, without which it is lost.
    pub(super) async fn close(&mut self) -> Result<(), Error> {
        self.precedence = None;
        // First, for a source that has lost the connection asks for it.
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.stage(Stage::Done)
        {
            tracing::warn!(error = %error.chain(), "could not close the record");
        }
        let mut cgroup = String::new();
        if let Some(home) = self.home.take() {
            cgroup = home.path();
            home.keep();
        }
        // Takes a while when there are many.
        if let Some(images) = self.images.take()
            && let Err(error) = images.wipe()
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not wipe the images");
        }
        self.place = None;
        let again = match (&self.net, &self.order) {
            (Some(net), Some(order)) => {
                Some(tokio::spawn(net.announce_again(order.placements.clone())))
            }
            _ => None,
        };
        let ended = tokio::time::timeout(Self::STRAGGLER_LIMIT, self.stragglers()).await;
        if ended.is_err() {
            tracing::warn!("the source has not closed the connection");
        }
        if let Some(gate) = &self.gate {
            let seen = Message::Seen(crate::seen::seen(gate));
            // For the report only; the source may be gone.
            let told = tokio::time::timeout(Self::LAST_WORD_LIMIT, self.send(&seen)).await;
            if !matches!(told, Ok(Ok(()))) {
                tracing::debug!("the source does not hear what the gate has seen");
            }
        }
        let adoption = self.order.as_ref().and_then(|order| {
            let adopts = order.adoption != Adoption::Stays;
            adopts.then(|| (order.adoption.clone(), order.tree.clone()))
        });
        let memory = std::mem::take(&mut self.lazy);
        let mut settling = tokio::spawn(settled(memory, adoption, cgroup));
        let settled = self.answer_and_tell(&mut settling).await;
        self.held = None;
        if let Some(gate) = self.gate.take()
            && let Err(error) = gate.detach()
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not detach the gate");
        }
        if let Some(again) = again
            && let Ok(Err(error)) = again.await
        {
            tracing::warn!(error = %crate::error::chain(&error), "could not announce the address again");
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        match settled {
            Some(settled) => settled,
            None => joined(settling.await).map(drop),
        }
    }

    /// How long the peer of a connection that both sides have closed is
    /// answered: an end whose acknowledgement was lost is sent again after
    /// 200 ms, 400 ms and so on.
    const OVER_LIMIT: Duration = Duration::from_secs(3);

    /// How long the kernel remembers a connection that only its own side has
    /// closed, unless it says otherwise (`net.ipv4.tcp_fin_timeout`).
    const FIN_TIMEOUT: Duration = Duration::from_secs(60);

    /// How often it is looked whether the address has moved on: nothing comes
    /// here for it then, and whoever took it answers.
    const LOOK_FOR_ADDRESS: Duration = Duration::from_secs(1);

    /// How long it may take until the tree has all its memory and its unit, before
    /// the gate goes without it.
    const SETTLE_LIMIT: Duration = Duration::from_secs(180);

    /// Answers for ended connections, and tells the source meanwhile which unit has
    /// the tree; none where that takes too long.
    async fn answer_and_tell(&mut self, settling: &mut Settling) -> Option<Result<(), Error>> {
        let Self {
            gate,
            net,
            held,
            ended,
            stop,
            order,
            sender,
            ..
        } = self;
        let tell = async {
            let settled = tokio::time::timeout(Self::SETTLE_LIMIT, settling).await;
            let adopted = match joined(settled.ok()?) {
                Ok(adopted) => adopted,
                Err(error) => return Some(Err(error)),
            };
            if let Some(adopted) = adopted {
                let word = Message::Adopted(adopted);
                let told = tokio::time::timeout(Self::LAST_WORD_LIMIT, sender.control(&word));
                if !matches!(told.await, Ok(Ok(()))) {
                    tracing::debug!("the source does not hear which unit has the tree");
                }
            }
            Some(Ok(()))
        };
        let placements = order.as_ref().map_or(&[][..], |order| &order.placements);
        let answer = async {
            if let (Some(gate), Some(net)) = (gate.as_ref(), net.as_ref()) {
                answer_ended(gate, net, held, std::mem::take(ended), stop, placements).await;
            }
        };
        tokio::join!(tell, answer).0
    }

    /// How long the source may take to remove its tree and to close. Killing
    /// takes 22 ms a GiB.
    const STRAGGLER_LIMIT: Duration = Duration::from_secs(30);

    /// How long the source may take to hear the last word.
    const LAST_WORD_LIMIT: Duration = Duration::from_secs(2);

    /// Gives the sockets what still comes to the old host, and what this host
    /// held at the moment of opening, until the source closes.
    async fn stragglers(&mut self) {
        let Incoming::Messages(inbox) = &mut self.incoming else {
            return;
        };
        let (Some(gate), Some(order)) = (&self.gate, &self.order) else {
            return inbox.closed(Self::STRAGGLER_LIMIT).await;
        };
        loop {
            tokio::select! {
                packets = inbox.packets() => match packets {
                    Some(packets) => {
                        held::hand_over(gate, &packets, |ip| interface_of(&order.placements, ip));
                    }
                    None => return,
                },
                packet = held::next(&mut self.held) => {
                    held::give_back(gate, &[packet]);
                }
            }
        }
    }
}

/// Acknowledges the ends that peers of closed connections still send, for as long as
/// the kernel would had the tree closed them here.
async fn answer_ended(
    gate: &Gate,
    net: &Net,
    held: &mut Option<HeldPackets>,
    ended: BTreeMap<Flow, bool>,
    stop: &Cancel,
    placements: &[Placement],
) {
    let begun = Instant::now();
    let fin_timeout = fin_timeout().unwrap_or(Destination::FIN_TIMEOUT);
    let mut waiting: Vec<(Flow, Instant)> = ended
        .into_iter()
        .map(|(flow, is_open)| {
            let limit = if is_open {
                fin_timeout
            } else {
                Destination::OVER_LIMIT
            };
            (flow, begun + limit)
        })
        .collect();
    let mut look = tokio::time::interval(Destination::LOOK_FOR_ADDRESS);
    let mut told = false;
    loop {
        tokio::select! {
            packet = held::next(held) => {
                held::give_back(gate, &[packet]);
            }
            // A peer that closes later gets an RST then, and nothing else
            // is lost: who stops an agent is not kept waiting for a minute.
            () = stop.cancelled() => return,
            _ = look.tick() => {
                let now = Instant::now();
                waiting.retain(|(flow, limit)| {
                    // Its peer has come again, and the kernel has forgotten the old one.
                    if matches!(gate.answers_for(flow), Ok(false)) {
                        return false;
                    }
                    let limit = match gate.end_heard_at(flow) {
                        Some(at) => (at + Destination::OVER_LIMIT).min(*limit),
                        None => *limit,
                    };
                    if limit <= now && let Err(error) = gate.answer_no_more(flow) {
                        tracing::debug!(error = %crate::error::chain(&error), %flow, "is answered until the gate is detached");
                    }
                    limit > now
                });
                if !told && now - begun > Destination::OVER_LIMIT && let Some((flow, _)) = waiting.first() {
                    told = true;
                    tracing::info!(
                        flows = waiting.len(),
                        for_example = %flow,
                        limit = ?fin_timeout,
                        "the gate stays for peers of connections that the tree has closed and they have not"
                    );
                }
                let mut here = false;
                for placement in placements {
                    here |= !matches!(net.placed(placement.ip).await, Ok(None));
                }
                if waiting.is_empty() || !here {
                    return;
                }
            }
        }
    }
}

/// What is left to be done for a tree that runs, by a task of its own.
type Settling = JoinHandle<Result<Option<Adopted>, Error>>;

/// Waits for the memory of the tree and lets its unit take it: not before, for one
/// who misses memory looks for the copy in the cgroup that it was restored in.
async fn settled(
    memory: lazy::Memory,
    adoption: Option<(Adoption, TreeFacts)>,
    cgroup: String,
) -> Result<Option<Adopted>, Error> {
    let is_complete = memory.complete().await?;
    let Some((adoption, tree)) = adoption else {
        return Ok(None);
    };
    let refused = |why: &str| Adopted {
        unit: None,
        warning: Some(format!("no unit has the tree, which runs on: {why}")),
    };
    if !is_complete {
        return Ok(Some(refused("its memory is still arriving")));
    }
    let adopted = tokio::task::spawn_blocking(move || {
        let adopted = migrate_proc::adopt(&adoption, &tree, &cgroup);
        adopted.unwrap_or_default()
    });
    let adopted = adopted.await.unwrap_or_else(|e| refused(&e.to_string()));
    if let Some(warning) = &adopted.warning {
        tracing::warn!("{warning}");
    }
    tracing::info!(unit = adopted.unit, "which unit has the tree");
    Ok(Some(adopted))
}

fn joined<T>(settled: Result<Result<T, Error>, JoinError>) -> Result<T, Error> {
    settled.unwrap_or_else(|_| Err(nothing("what was left to do for the tree")))
}

/// What the kernel here has been told about connections that only its own side
/// has closed.
fn fin_timeout() -> Option<Duration> {
    let seconds = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_fin_timeout").ok()?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// The interface that a moved address has come to.
fn interface_of(placements: &[Placement], ip: IpAddr) -> Option<u32> {
    placements
        .iter()
        .find(|placement| placement.ip == ip)
        .map(|placement| placement.ifindex)
}
