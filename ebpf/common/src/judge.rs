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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::mapped;
    use crate::state::Mode;

    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86DD;

    /// The maps' answers, the same for every key.
    #[derive(Clone, Copy, Debug)]
    struct Fixed {
        state: State,
        deadline_ns: u64,
        now_ns: u64,
        is_workload: bool,
        is_staged: bool,
    }

    impl World for Fixed {
        fn state(&self) -> State {
            self.state
        }
        fn deadline_ns(&self) -> u64 {
            self.deadline_ns
        }
        fn now_ns(&self) -> u64 {
            self.now_ns
        }
        fn has_flow(&self, _: &FlowKey) -> bool {
            false
        }
        fn has_listener(&self, key: &ListenerKey) -> bool {
            // Reached last, so the look-ups before it have been made.
            self.is_workload && key.local == crate::key::ANY_V4
        }
        fn is_staged(&self, address: &[u8; 16]) -> bool {
            self.is_staged && *address == mapped([10, 0, 0, 2])
        }
    }

    fn closed() -> Fixed {
        Fixed {
            state: State(0).next(Mode::Drop, Mode::Drop),
            deadline_ns: 0,
            now_ns: 1000,
            is_workload: true,
            is_staged: false,
        }
    }

    fn segment(flags: u8) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[0] = 0x45;
        bytes[9] = 6;
        bytes[33] = flags;
        bytes
    }

    fn verdict(bytes: &[u8], ethertype: u16, direction: Direction, world: Fixed) -> Judgement {
        judge(bytes, Layer2::None, ethertype, 0, direction, &world)
    }

    #[test]
    fn the_workloads_segments_follow_the_state() {
        use Direction::{Egress, Ingress};
        let (open, expired, foreign) = (
            Fixed {
                state: State(0),
                ..closed()
            },
            Fixed {
                deadline_ns: 1000,
                ..closed()
            },
            Fixed {
                is_workload: false,
                ..closed()
            },
        );
        let drop = |reset| Judgement::Drop { reset };
        for (flags, direction, world, expected) in [
            (0, Ingress, closed(), drop(false)),
            (0, Egress, closed(), drop(false)),
            (TCP_RST, Ingress, closed(), drop(false)),
            (TCP_RST, Egress, closed(), drop(true)),
            (TCP_RST, Egress, open, Judgement::PassReset),
            (TCP_RST, Egress, expired, Judgement::PassReset),
            (TCP_RST, Ingress, open, Judgement::Pass),
            (0, Egress, open, Judgement::Pass),
            (0, Ingress, expired, Judgement::Pass),
            (TCP_RST, Egress, foreign, Judgement::Pass),
            (0, Ingress, foreign, Judgement::Pass),
        ] {
            let got = verdict(&segment(flags), IPV4, direction, world);
            assert_eq!(got, expected, "{flags} {direction:?} {world:?}");
        }
    }

    #[test]
    fn what_cannot_be_told_apart_is_dropped_only_while_closed() {
        let mut endless = [0; 200];
        endless[0] = 0x60;
        let ingress = Direction::Ingress;
        let open = Fixed {
            state: State(0),
            ..closed()
        };
        assert_eq!(
            verdict(&endless, IPV6, ingress, closed()),
            Judgement::Drop { reset: false }
        );
        assert_eq!(verdict(&endless, IPV6, ingress, open), Judgement::Pass);
    }

    proptest! {
        #[test]
        fn marked_packets_always_pass(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), ethertype: u16,
        ) {
            let world = Fixed { is_staged: true, ..closed() };
            let got = judge(
                &bytes[..], Layer2::Ethernet, ethertype, EXEMPT_MARK, Direction::Egress, &world,
            );
            prop_assert_eq!(got, Judgement::Pass);
        }

        #[test]
        fn an_open_gate_without_staged_addresses_drops_nothing(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), ethertype: u16,
        ) {
            let world = Fixed { state: State(0), ..closed() };
            let got = verdict(&bytes, ethertype, Direction::Egress, world);
            prop_assert!(matches!(got, Judgement::Pass | Judgement::PassReset));
        }
    }
}
