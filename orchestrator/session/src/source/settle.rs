//! What is beginning or ending at the tree's addresses comes to its end before
//! the tree stands still, for CRIU carries neither.
//!
//! ```text
//!   CRIU loaded   new connections wait; handshakes finish, the tree accepts
//!                 what has come, closed connections deliver their last bytes
//!   gate closed
//!   frozen        connections closed a moment ago may go on to deliver, past
//!                 the closed gate: they need no tree
//!   handover      that ends; the destination acknowledges what their peers
//!                 still send, and the source forgets them
//! ```
//!
//! Established connections are served all the while up to the closed gate.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use migrate_core::Flow;
use migrate_core::report::counted;
use migrate_core::wire::{Message, NetworkLock};
use migrate_gate::Gate;
use migrate_net::{EndedFlows, Unsettled};

use super::{Migration, not_yet};
use crate::error::Error;

/// How long a peer's half of a handshake is waited for. It takes one round
/// trip; peers that have not answered by then have lost a packet or never will.
const HANDSHAKE_LIMIT: Duration = Duration::from_millis(250);

/// How long the tree has to accept connections and peers to take the rest of
/// closed ones. New peers wait meanwhile, and ask again after a second.
const SETTLE_LIMIT: Duration = Duration::from_millis(900);

/// The same while the tree stands still, for connections closed in the
/// milliseconds before.
const END_LIMIT: Duration = Duration::from_millis(200);

/// Between two looks; the kernel announces none of this.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// How many closed connections the destination hears of whose peers have closed them
/// as well: a storm of short ones leaves ten thousands, and must not take the place of
/// those whose peers are still to be answered.
const OVER_MAX: usize = Gate::ENDED_MAX / 4 * 3;

/// What the destination knows of the peer of a connection that the tree has
/// closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// It may close it, too, at any time.
    Open,
    /// The same, and no socket of this host tells of it: the tree has closed it before
    /// it came here.
    OpenElsewhere,
    /// It has.
    Closed,
}

/// Those that were open when the destination heard of them and of which the kernel knows
/// nothing any more: their peers have reset them, for one. `alive` are the tree's own.
fn vanished(known: &BTreeMap<Flow, Peer>, ended: &EndedFlows, alive: &[Flow]) -> Vec<Flow> {
    let listed: HashSet<&Flow> = [&ended.open, &ended.over]
        .into_iter()
        .flatten()
        .chain(alive)
        .collect();
    let open = known.iter().filter(|(_, peer)| **peer == Peer::Open);
    let gone = open.filter(|(flow, _)| !listed.contains(flow));
    gone.map(|(flow, _)| *flow).collect()
}

impl Migration {
    /// The addresses that move.
    pub(super) fn moved(&self) -> Vec<IpAddr> {
        self.plan.as_ref().map_or_else(Vec::new, |plan| {
            plan.facts.addresses.iter().map(|a| a.ip).collect()
        })
    }

    /// Lets new connections wait until those that have begun are the tree's.
    pub(super) async fn settle(&mut self) -> Result<(), Error> {
        if self.gate().is_none() {
            return Ok(());
        }
        // What there is to tell is told while nobody waits for it; the rest once the
        // tree stands still.
        self.tell_of_the_past().await?;
        self.go_first();
        if let Some(gate) = self.gate()
            && self.request.choices.lock == NetworkLock::Gate
        {
            gate.hold_new()?;
            self.moments.new_held = Some(Instant::now());
        }
        let listeners = self.plan()?.facts.listeners.clone();
        let addresses = self.moved();
        let begun = Instant::now();
        let left = loop {
            // What another CPU has let in a moment ago does not show yet.
            tokio::time::sleep(LOOK_AGAIN).await;
            let found = migrate_net::unsettled(&listeners, &addresses)?;
            let waited = begun.elapsed();
            let only_handshakes = found.unaccepted.is_empty() && found.closing.is_empty();
            if found.is_settled()
                || waited >= SETTLE_LIMIT
                || (only_handshakes && waited >= HANDSHAKE_LIMIT)
            {
                break found;
            }
            // What is waited for now is the tree, and needs the CPU itself.
            self.precedence = None;
        };
        let waited = begun.elapsed();
        tracing::debug!(?waited, "handshakes and closed connections have settled");
        if let Some(&(listener, waiting)) = left.unaccepted.first() {
            return Err(Error::NotAccepted {
                listener,
                waiting,
                waited,
            });
        }
        if left.handshakes > 0 {
            self.reporter.warn(format!(
                "{} not answered by the peer within {} ms: it has to connect again",
                counted(left.handshakes, "handshake"),
                waited.as_millis()
            ));
        }
        // Nobody makes up entries for those that have ended since.
        self.tell_tracked().await
    }

    /// Lets the destination know of what is over, and what the kernel tracks.
    async fn tell_of_the_past(&mut self) -> Result<(), Error> {
        let addresses = self.moved();
        let ended = migrate_net::ended(&addresses)?;
        self.tell_ended(&ended, &[]).await?;
        let answered = migrate_gate::answered_flows(&self.state.gates())?;
        let at = |flow: &Flow| addresses.contains(&flow.local.ip().to_canonical());
        let elsewhere: Vec<Flow> = answered.into_iter().filter(at).collect();
        self.tell_open(&elsewhere, Peer::OpenElsewhere).await?;
        self.tell_tracked().await
    }

    /// Lets the destination know of connections that the tree has closed, and
    /// the gate, too: later none of them may say a word here. `ended` are all that
    /// there are, `alive` those that the tree holds.
    pub(super) async fn tell_ended(
        &mut self,
        ended: &EndedFlows,
        alive: &[Flow],
    ) -> Result<(), Error> {
        if self.gate().is_none() {
            return Ok(());
        }
        // Those first that will need to be answered.
        self.tell_open(&ended.open, Peer::Open).await?;
        let mut room = OVER_MAX.saturating_sub(self.ended.len());
        let mut over = Vec::new();
        for flow in vanished(&self.ended, ended, alive)
            .into_iter()
            .chain(ended.over.iter().copied())
        {
            let known = self.ended.get(&flow);
            if known == Some(&Peer::Closed) || (known.is_none() && room == 0) {
                continue;
            }
            room -= usize::from(known.is_none());
            self.ended.insert(flow, Peer::Closed);
            over.push(flow);
        }
        self.tell(EndedFlows {
            open: Vec::new(),
            over,
        })
        .await
    }

    /// The same of those whose peers have not closed them.
    async fn tell_open(&mut self, flows: &[Flow], peer: Peer) -> Result<(), Error> {
        let room = Gate::ENDED_MAX.saturating_sub(self.ended.len());
        let new = flows.iter().filter(|flow| !self.ended.contains_key(flow));
        let open: Vec<Flow> = new.take(room).copied().collect();
        self.ended.extend(open.iter().map(|flow| (*flow, peer)));
        self.tell(EndedFlows {
            open,
            over: Vec::new(),
        })
        .await
    }

    async fn tell(&mut self, new: EndedFlows) -> Result<(), Error> {
        let EndedFlows { open, over } = new;
        let Some(gate) = self.gate() else {
            return Ok(());
        };
        if open.is_empty() && over.is_empty() {
            return Ok(());
        }
        gate.add_flows(&open)?;
        gate.add_flows(&over)?;
        self.send(&Message::Ended { open, over }).await
    }

    /// Lets closed connections deliver the rest while the tree stands still.
    pub(super) fn let_end(&mut self, closing: &[Flow]) -> Result<(), Error> {
        let Some(gate) = self.gate.as_ref() else {
            return Ok(());
        };
        let closing = &closing[..closing.len().min(Gate::ENDED_MAX)];
        if closing.is_empty() {
            return Ok(());
        }
        self.closing = true;
        let closing_flows: HashSet<Flow> = closing.iter().copied().collect();
        let others = crate::held::let_end(
            &closing_flows,
            || crate::held::drain(&mut self.held),
            |packets| crate::held::hand_on(gate, packets),
            || gate.let_end(closing),
        )?;
        self.waiting.extend(others);
        Ok(())
    }

    /// The last moment for closed connections: the address leaves this host.
    pub(super) async fn end(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.closing) {
            return Ok(());
        }
        let addresses = self.moved();
        let begun = Instant::now();
        let left = loop {
            let found = migrate_net::unsettled(&[], &addresses)?;
            if found.closing.is_empty() || begun.elapsed() >= END_LIMIT {
                break found;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        self.gate().ok_or_else(|| not_yet("the gate"))?.end_all();
        self.warn_of(&left);
        // Their peers may have closed them meanwhile, and need nobody then who
        // waits for that on the destination.
        let alive = self.plan()?.facts.flows.clone();
        self.tell_ended(&migrate_net::ended(&addresses)?, &alive)
            .await
    }

    fn warn_of(&self, left: &Unsettled) {
        if left.unsent_bytes == 0 {
            return;
        }
        let peers: BTreeSet<IpAddr> = left.closing.iter().map(|flow| flow.remote.ip()).collect();
        let peers: Vec<String> = peers.iter().take(4).map(IpAddr::to_string).collect();
        self.reporter.warn(format!(
            "{} bytes are lost that the tree has written to connections which it then closed and \
             whose peers ({}) did not take them in time",
            left.unsent_bytes,
            peers.join(", ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(port: u16) -> Flow {
        let at = |host, port| std::net::SocketAddr::from(([10, 0, 0, host], port));
        Flow::new(at(1, 6379), at(2, port))
    }

    #[test]
    fn what_no_socket_tells_of_any_more_has_vanished() {
        let known = BTreeMap::from([
            (flow(1), Peer::Open),
            (flow(2), Peer::Open),
            (flow(3), Peer::Open),
            (flow(4), Peer::Open),
            (flow(5), Peer::OpenElsewhere),
            (flow(6), Peer::Closed),
        ]);
        let ended = EndedFlows {
            open: vec![flow(2)],
            over: vec![flow(3)],
        };
        // The fourth is a connection again, by the same ports.
        assert_eq!(vanished(&known, &ended, &[flow(4)]), [flow(1)]);
    }
}
