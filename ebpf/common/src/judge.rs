//! The decision about one packet.

use crate::EXEMPT_MARK;
use crate::key::{FlowKey, ListenerKey};
use crate::parse::{Direction, Layer2, Packet, Parsed, TCP_RST, parse};
use crate::state::State;

/// What the decision needs to know beside the packet: the gate's maps and the
/// clock. Asked in the order in which the answers are needed, so that most
/// packets cost few look-ups.
pub trait World {
    /// The state word, read once.
    fn state(&self) -> State;
    /// The end of the lease, 0 for none.
    fn deadline_ns(&self) -> u64;
    /// `CLOCK_MONOTONIC`; a coarse reading is enough.
    fn now_ns(&self) -> u64;
    /// Whether the flow belongs to the workload.
    fn has_flow(&self, key: &FlowKey) -> bool;
    /// Whether the listener belongs to the workload.
    fn has_listener(&self, key: &ListenerKey) -> bool;
    /// Whether the address is staged: present here, but not to be seen.
    fn is_staged(&self, address: &[u8; 16]) -> bool;
}

/// What to do with a packet, and what to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Let it pass.
    Pass,
    /// Let it pass, and count an RST of the workload that left.
    PassReset,
    /// The gate is closed.
    Drop {
        /// It was an RST on its way out.
        reset: bool,
    },
    /// It would have given a staged address away.
    DropStaged,
}

/// Decides about one packet.
///
/// Marked packets pass. Neighbour traffic of staged addresses is dropped
/// whatever the gate's state and lease. The workload's segments (its flows,
/// then its listeners by address, then by wildcard) follow the state. What is
/// not the workload's passes; what cannot be told apart from it (see
/// [`Parsed::Unreadable`]) is dropped while the gate is closed.
#[inline(always)]
pub fn judge<P: Packet + ?Sized, W: World>(
    packet: &P,
    layer2: Layer2,
    ethertype: u16,
    mark: u32,
    direction: Direction,
    world: &W,
) -> Judgement {
    if mark == EXEMPT_MARK {
        return Judgement::Pass;
    }
    match parse(packet, layer2, ethertype, direction) {
        Parsed::Other => Judgement::Pass,
        Parsed::Unreadable => {
            if holds(direction, world) {
                Judgement::Drop { reset: false }
            } else {
                Judgement::Pass
            }
        }
        Parsed::Neighbour {
            sender,
            target,
            concerns_target,
        } => {
            // Inbound: nobody here may answer or object. Outbound: nothing
            // may speak for the address, nor ask about it (a probe does).
            let speaks = matches!(direction, Direction::Egress) && world.is_staged(&sender);
            if speaks || (concerns_target && world.is_staged(&target)) {
                Judgement::DropStaged
            } else {
                Judgement::Pass
            }
        }
        Parsed::Tcp { key, flags } => {
            let reset = matches!(direction, Direction::Egress) && flags & TCP_RST != 0;
            let closed = holds(direction, world);
            if !(closed || reset) || !is_workload(&key, world) {
                Judgement::Pass
            } else if closed {
                Judgement::Drop { reset }
            } else {
                Judgement::PassReset
            }
        }
    }
}

#[inline(always)]
fn holds<W: World>(direction: Direction, world: &W) -> bool {
    let state = world.state();
    state.is_closed(direction) && {
        let deadline_ns = world.deadline_ns();
        // The clock is read only where there is a lease to compare it with.
        deadline_ns == 0 || state.holds(direction, deadline_ns, world.now_ns())
    }
}

#[inline(always)]
fn is_workload<W: World>(key: &FlowKey, world: &W) -> bool {
    world.has_flow(key)
        || world.has_listener(&key.listener())
        || world.has_listener(&key.wildcard_listener())
}
