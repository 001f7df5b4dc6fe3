//! The decision about one packet.

use crate::EXEMPT_MARK;
use crate::key::{FlowKey, ListenerKey};
use crate::parse::{Direction, Layer2, Packet, Parsed, TCP_RST, is_opening, parse};
use crate::state::{Ended, Mode, State, expired};
use crate::track::{Fate, Segment};

/// What the decision needs to know beside the packet: the gate's maps and the
/// clock. Asked in the order in which the answers are needed, so that most
/// packets cost few look-ups.
pub trait World {
    /// The mark of packets that the gate's own user space gives back, never 0.
    fn own_mark(&self) -> u32;
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
    /// What becomes of a flow that the workload has closed; `None` for others.
    fn ended(&self, key: &FlowKey) -> Option<Ended>;
    /// Takes a flow from the closed ones: its peer begins a new one.
    fn forget_ended(&self, key: &FlowKey);
    /// Whether the address is staged: present here, but not to be seen.
    fn is_staged(&self, address: &[u8; 16]) -> bool;
    /// Remembers a packet of the flow, if it is the workload's.
    fn track(
        &self,
        key: &FlowKey,
        segment: &Segment,
        direction: Direction,
        fate: Fate,
        is_watching: bool,
    );
}

/// What to do with a packet, and what to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Let it pass.
    Pass,
    /// It comes back from user space: take the mark off and let it pass.
    PassOwn,
    /// Let it pass, and count an RST of the workload that left.
    PassReset,
    /// Move it to user space, or drop it where that cannot be.
    Hold,
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
/// What user space gives back passes, then everything while the gate is idle,
/// then CRIU's own packets. Neighbour traffic of staged addresses is dropped
/// whatever the gate's modes and lease. The workload's segments (its flows,
/// then its listeners by address, then by wildcard) follow the modes. What is
/// not the workload's passes; what cannot be told apart from it (see
/// [`Parsed::Unreadable`]) is dropped while the gate is closed.
///
/// Flows that the workload has closed are judged before the others, see
/// [`Ended`]; a peer that opens a new connection with the same ports ends that.
///
/// An RST on its way out is never held: it may be the kernel's answer for
/// sockets that have moved, and sent later it would end their connections.
#[inline(always)]
pub fn judge<P: Packet + ?Sized, W: World>(
    packet: &P,
    layer2: Layer2,
    ethertype: u16,
    mark: u32,
    direction: Direction,
    world: &W,
) -> Judgement {
    let is_own = mark != 0 && mark == world.own_mark();
    let state = world.state();
    if is_own && !state.is_tracking() {
        return Judgement::PassOwn;
    }
    if state.is_idle() || mark == EXEMPT_MARK {
        return Judgement::Pass;
    }
    let parsed = parse(packet, layer2, ethertype, direction);
    let segment = match &parsed {
        Parsed::Tcp {
            flags,
            sequence,
            payload_bytes,
            ..
        } => Segment {
            flags: *flags,
            sequence: *sequence,
            payload_bytes: *payload_bytes,
        },
        Parsed::Other | Parsed::Unreadable | Parsed::Neighbour { .. } => Segment {
            flags: 0,
            sequence: 0,
            payload_bytes: 0,
        },
    };
    if state.is_tracking()
        && let Parsed::Tcp { key, .. } = &parsed
    {
        let fate = match mode(state, direction, world) {
            _ if is_own => Fate::Returned,
            Mode::Drop | Mode::Hold => Fate::Kept,
            Mode::HoldBare if segment.waits_with_answers() => Fate::Kept,
            Mode::Mute if is_reset(segment.flags, direction) => Fate::Kept,
            Mode::Open | Mode::HoldNew | Mode::HoldBare | Mode::Mute => Fate::Passes,
        };
        world.track(key, &segment, direction, fate, state.is_watching());
    }
    if is_own {
        return Judgement::PassOwn;
    }
    match parsed {
        Parsed::Other => Judgement::Pass,
        Parsed::Unreadable => match mode(state, direction, world) {
            Mode::Open | Mode::HoldNew | Mode::HoldBare | Mode::Mute => Judgement::Pass,
            Mode::Drop | Mode::Hold => Judgement::Drop { reset: false },
        },
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
        Parsed::Tcp { key, flags, .. } => {
            let reset = is_reset(flags, direction);
            if state.has_ended()
                && let Some(judgement) = judge_ended(&key, flags, direction, world)
            {
                return judgement;
            }
            let mode = mode(state, direction, world);
            if matches!(mode, Mode::HoldNew) {
                let waits = matches!(direction, Direction::Ingress)
                    && is_opening(flags)
                    && has_listener(&key, world);
                return if waits {
                    Judgement::Hold
                } else {
                    Judgement::Pass
                };
            }
            if matches!(mode, Mode::Mute) {
                return if reset {
                    Judgement::Drop { reset }
                } else {
                    Judgement::Pass
                };
            }
            let passes = match mode {
                Mode::Open => !reset || state.is_open(),
                Mode::HoldBare => !reset && !segment.waits_with_answers(),
                Mode::Drop | Mode::Hold | Mode::HoldNew | Mode::Mute => false,
            };
            if passes || !is_workload(&key, world) {
                return Judgement::Pass;
            }
            match mode {
                Mode::Open | Mode::HoldNew => Judgement::PassReset,
                Mode::HoldBare if reset => Judgement::PassReset,
                Mode::HoldBare => Judgement::Hold,
                Mode::Hold if !reset => Judgement::Hold,
                Mode::Drop | Mode::Hold | Mode::Mute => Judgement::Drop { reset },
            }
        }
    }
}

/// About a flow that the workload has closed; `None` for others.
#[inline(always)]
fn judge_ended<W: World>(
    key: &FlowKey,
    flags: u8,
    direction: Direction,
    world: &W,
) -> Option<Judgement> {
    match (world.ended(key)?, direction) {
        (Ended::Pass, _) => Some(Judgement::Pass),
        (Ended::Answer, Direction::Ingress) if is_opening(flags) => {
            world.forget_ended(key);
            None
        }
        (Ended::Answer, Direction::Ingress) => Some(Judgement::Hold),
        (Ended::Answer, Direction::Egress) => None,
    }
}

/// The mode that holds now, the lease considered.
#[inline(always)]
fn mode<W: World>(state: State, direction: Direction, world: &W) -> Mode {
    let mode = state.mode(direction);
    if matches!(mode, Mode::Open) {
        return Mode::Open;
    }
    let deadline_ns = world.deadline_ns();
    // The clock is read only where there is a lease to compare it with.
    if deadline_ns == 0 || !expired(deadline_ns, world.now_ns()) {
        mode
    } else {
        Mode::Open
    }
}

/// Whether a segment resets a connection, on its way out.
#[inline(always)]
fn is_reset(flags: u8, direction: Direction) -> bool {
    matches!(direction, Direction::Egress) && flags & TCP_RST != 0
}

#[inline(always)]
fn is_workload<W: World>(key: &FlowKey, world: &W) -> bool {
    world.has_flow(key) || has_listener(key, world)
}

#[inline(always)]
fn has_listener<W: World>(key: &FlowKey, world: &W) -> bool {
    world.has_listener(&key.listener()) || world.has_listener(&key.wildcard_listener())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::mapped;

    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86DD;
    const OWN_MARK: u32 = 0xabcd_0123;

    /// The maps' answers, the same for every key.
    #[derive(Clone, Copy, Debug)]
    struct Fixed {
        state: State,
        deadline_ns: u64,
        now_ns: u64,
        is_workload: bool,
        is_staged: bool,
        ended: Option<Ended>,
    }

    impl World for Fixed {
        fn own_mark(&self) -> u32 {
            OWN_MARK
        }
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
        fn ended(&self, _: &FlowKey) -> Option<Ended> {
            self.ended
        }
        fn forget_ended(&self, _: &FlowKey) {}
        fn is_staged(&self, address: &[u8; 16]) -> bool {
            self.is_staged && *address == mapped([10, 0, 0, 2])
        }
        fn track(&self, _: &FlowKey, _: &Segment, _: Direction, fate: Fate, is_watching: bool) {
            TRACKED.set(Some((fate, is_watching)));
        }
    }

    std::thread_local! {
        /// What was remembered last.
        static TRACKED: std::cell::Cell<Option<(Fate, bool)>> =
            const { std::cell::Cell::new(None) };
    }

    fn closed() -> Fixed {
        Fixed {
            state: State(0).next(Mode::Drop, Mode::Drop),
            deadline_ns: 0,
            now_ns: 1000,
            is_workload: true,
            is_staged: false,
            ended: None,
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
        let holding = Fixed {
            state: State(0).next(Mode::Hold, Mode::Hold),
            ..closed()
        };
        let held_expired = Fixed {
            deadline_ns: 1000,
            ..holding
        };
        let out_only = Fixed {
            state: State(0).next(Mode::Hold, Mode::Open),
            ..closed()
        };
        let drop = |reset| Judgement::Drop { reset };
        for (flags, direction, world, expected) in [
            (0, Ingress, closed(), drop(false)),
            (0, Egress, closed(), drop(false)),
            (TCP_RST, Ingress, closed(), drop(false)),
            (TCP_RST, Egress, closed(), drop(true)),
            (0, Ingress, holding, Judgement::Hold),
            (0, Egress, holding, Judgement::Hold),
            (TCP_RST, Ingress, holding, Judgement::Hold),
            (TCP_RST, Egress, holding, drop(true)),
            (0, Ingress, held_expired, Judgement::Pass),
            (0, Ingress, out_only, Judgement::Hold),
            (0, Egress, out_only, Judgement::Pass),
            (TCP_RST, Egress, out_only, Judgement::PassReset),
            (TCP_RST, Egress, open, Judgement::Pass),
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
    fn packets_are_remembered_by_what_becomes_of_them() {
        let tracking = |state: State| Fixed {
            state: state.tracking(),
            ..closed()
        };
        let (open, shut) = (State(0), closed().state);
        let expired = Fixed {
            deadline_ns: 1000,
            ..tracking(shut)
        };
        let watching = Fixed {
            state: shut.watching(),
            ..closed()
        };
        for (world, mark, remembered) in [
            (closed(), 0, None),
            (closed(), OWN_MARK, None),
            (tracking(open), 0, Some((Fate::Passes, false))),
            (tracking(open), OWN_MARK, Some((Fate::Returned, false))),
            (tracking(shut), 0, Some((Fate::Kept, false))),
            (expired, 0, Some((Fate::Passes, false))),
            (watching, OWN_MARK, Some((Fate::Returned, true))),
            (tracking(open), EXEMPT_MARK, None),
        ] {
            TRACKED.set(None);
            let bytes = segment(0);
            judge(
                &bytes[..],
                Layer2::None,
                IPV4,
                mark,
                Direction::Ingress,
                &world,
            );
            assert_eq!(TRACKED.get(), remembered, "{mark} {world:?}");
        }
        // Counting alone keeps nothing back, and counts no resets.
        for flags in [0, TCP_RST] {
            let got = verdict(&segment(flags), IPV4, Direction::Egress, tracking(open));
            assert_eq!(got, Judgement::Pass);
        }
    }

    #[test]
    fn acknowledgements_beginnings_and_ends_wait_where_senders_shall_stop() {
        use Direction::{Egress, Ingress};
        let world = Fixed {
            state: State(0).next(Mode::Hold, Mode::HoldBare),
            ..closed()
        };
        let foreign = Fixed {
            is_workload: false,
            ..world
        };
        let expired = Fixed {
            deadline_ns: 1000,
            ..world
        };
        let (ack, push, fin, syn, syn_ack) = (0x10, 0x18, 0x11, 0x02, 0x12);
        let bare = |flags| segment(flags).to_vec();
        let mut data = bare(ack);
        data.push(0);
        (data[3], data[32]) = (41, 0x50);
        let mut empty = bare(ack);
        (empty[3], empty[32]) = (40, 0x50);
        for (bytes, direction, world, expected) in [
            (&empty, Egress, world, Judgement::Hold),
            (&bare(push), Egress, world, Judgement::Hold),
            (&data, Egress, world, Judgement::Pass),
            (&bare(fin), Egress, world, Judgement::Hold),
            (&bare(syn), Egress, world, Judgement::Hold),
            (&bare(syn_ack), Egress, world, Judgement::Hold),
            (&bare(TCP_RST), Egress, world, Judgement::PassReset),
            (&bare(TCP_RST | ack), Egress, world, Judgement::PassReset),
            (&empty, Ingress, world, Judgement::Hold),
            (&empty, Egress, foreign, Judgement::Pass),
            (&empty, Egress, expired, Judgement::Pass),
        ] {
            let got = verdict(bytes, IPV4, direction, world);
            assert_eq!(got, expected, "{bytes:?} {direction:?} {world:?}");
        }
    }

    #[test]
    fn only_new_connections_wait_where_the_others_shall_finish() {
        use Direction::{Egress, Ingress};
        let world = Fixed {
            state: State(0).next(Mode::HoldNew, Mode::Open),
            ..closed()
        };
        let foreign = Fixed {
            is_workload: false,
            ..world
        };
        let (syn, ack, syn_ack) = (0x02, 0x10, 0x12);
        for (flags, direction, world, expected) in [
            (syn, Ingress, world, Judgement::Hold),
            (syn, Ingress, foreign, Judgement::Pass),
            (ack, Ingress, world, Judgement::Pass),
            (syn_ack, Ingress, world, Judgement::Pass),
            (syn, Egress, world, Judgement::Pass),
        ] {
            let got = verdict(&segment(flags), IPV4, direction, world);
            assert_eq!(got, expected, "{flags} {direction:?} {world:?}");
        }
    }

    #[test]
    fn a_mute_host_resets_nobody_and_does_all_else() {
        use Direction::{Egress, Ingress};
        let world = Fixed {
            state: State(0).next(Mode::Open, Mode::Mute),
            is_workload: false,
            ..closed()
        };
        let expired = Fixed {
            deadline_ns: 1000,
            ..world
        };
        let mute = Judgement::Drop { reset: true };
        let (syn, ack, fin) = (0x02, 0x10, 0x11);
        for (flags, direction, world, expected) in [
            (TCP_RST, Egress, world, mute),
            (TCP_RST | ack, Egress, world, mute),
            (TCP_RST, Ingress, world, Judgement::Pass),
            (syn, Ingress, world, Judgement::Pass),
            (syn | ack, Egress, world, Judgement::Pass),
            (fin, Egress, world, Judgement::Pass),
            (TCP_RST, Egress, expired, Judgement::Pass),
        ] {
            let got = verdict(&segment(flags), IPV4, direction, world);
            assert_eq!(got, expected, "{flags} {direction:?} {world:?}");
        }
        // What is no TCP, or cannot be read, is no reset of the kernel's.
        let mut endless = [0; 200];
        endless[0] = 0x60;
        assert_eq!(verdict(&endless, IPV6, Egress, world), Judgement::Pass);
    }

    #[test]
    fn closed_flows_are_judged_before_the_others() {
        use Direction::{Egress, Ingress};
        let holding = State(0).next(Mode::Hold, Mode::Hold).with_ended(true);
        let open = State(0).with_ended(true);
        let world = |state, ended| Fixed {
            state,
            ended: Some(ended),
            ..closed()
        };
        let (syn, fin) = (0x02, 0x11);
        for (flags, direction, world, expected) in [
            (fin, Ingress, world(holding, Ended::Pass), Judgement::Pass),
            (fin, Egress, world(holding, Ended::Pass), Judgement::Pass),
            (fin, Ingress, world(open, Ended::Answer), Judgement::Hold),
            (fin, Ingress, world(holding, Ended::Answer), Judgement::Hold),
            (syn, Ingress, world(open, Ended::Answer), Judgement::Pass),
            (fin, Egress, world(holding, Ended::Answer), Judgement::Hold),
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
        let holding = Fixed {
            state: State(0).next(Mode::Hold, Mode::Hold),
            ..closed()
        };
        assert_eq!(
            verdict(&endless, IPV6, ingress, holding),
            Judgement::Drop { reset: false }
        );
    }

    proptest! {
        #[test]
        fn marked_packets_always_pass(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), ethertype: u16,
        ) {
            let world = Fixed { is_staged: true, ..closed() };
            for (mark, expected) in
                [(EXEMPT_MARK, Judgement::Pass), (OWN_MARK, Judgement::PassOwn)]
            {
                let got = judge(
                    &bytes[..], Layer2::Ethernet, ethertype, mark, Direction::Egress, &world,
                );
                prop_assert_eq!(got, expected);
            }
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
