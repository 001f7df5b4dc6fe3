//! The records that user space and the programs exchange through maps.

use crate::parse::Direction;

/// Version of every map's layout. A gate that another version has pinned is
/// not adopted, only removed.
pub const LAYOUT_VERSION: u64 = 6;

/// What the gate does with the workload's packets in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Packets pass.
    Open = 0,
    /// Packets are dropped.
    Drop = 1,
    /// Packets are moved to user space, which gives them back later. Where
    /// that is not possible they are dropped.
    Hold = 2,
    /// New connections wait, as with `Hold`; everything else passes. For the
    /// way in only.
    HoldNew = 3,
    /// Segments that acknowledge and nothing more wait, as with `Hold`, and so
    /// do the beginning and the end of a connection, which must not overtake
    /// them; everything else passes. For the way out only: without answers senders
    /// come to a stop at their windows.
    HoldBare = 4,
    /// The host resets nothing, whosever connection it is; everything else
    /// passes. For the way out only, where nobody knows which flows are the
    /// workload's: of those that it has no socket for the kernel says nothing
    /// but RST.
    Mute = 5,
}

/// Both modes, a flag and the epoch in one word, so that one aligned store
/// changes both directions at once and one load sees a whole state.
///
/// ```text
///   63                 24 23      16 15       8 7         0
///   | epoch              | flags    | egress   | ingress  |
/// ```
///
/// The epoch counts changes of the modes. Bit 16 says that there are staged
/// addresses, bit 17 that there are flows which the workload has closed, bit 18
/// that flows are counted, bit 19 that they are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u64);

/// Bit of [`State`]: there are staged addresses.
const STAGED: u64 = 1 << 16;
/// Bit of [`State`]: there are closed flows, see [`Ended`].
const ENDED: u64 = 1 << 17;
/// Bit of [`State`]: packets of flows are counted.
const TRACKED: u64 = 1 << 18;
/// Bit of [`State`]: sequence numbers are looked at as well.
const WATCHED: u64 = 1 << 19;
const FLAGS: u64 = 0xff << 16;
const EPOCH_SHIFT: u32 = 24;

impl State {
    /// What happens to packets of this direction. Modes unknown to this
    /// version count as [`Mode::Drop`]: a lock that does not understand its
    /// state must not let a packet out.
    #[inline(always)]
    #[must_use]
    pub const fn mode(self, direction: Direction) -> Mode {
        let shift = match direction {
            Direction::Ingress => 0,
            Direction::Egress => 8,
        };
        match (self.0 >> shift) & 0xff {
            0 => Mode::Open,
            2 => Mode::Hold,
            3 => Mode::HoldNew,
            4 => Mode::HoldBare,
            5 => Mode::Mute,
            _ => Mode::Drop,
        }
    }

    /// Whether packets of this direction are kept back.
    #[inline(always)]
    #[must_use]
    pub const fn is_closed(self, direction: Direction) -> bool {
        !matches!(self.mode(direction), Mode::Open)
    }

    /// Whether both directions are open.
    #[inline(always)]
    #[must_use]
    pub const fn is_open(self) -> bool {
        self.0 & 0xffff == 0
    }

    /// Whether no packet whatever concerns the gate: both directions are open,
    /// no address is staged and nothing is counted.
    #[inline(always)]
    #[must_use]
    pub const fn is_idle(self) -> bool {
        self.0 & (0xffff | FLAGS) == 0
    }

    /// Whether packets of flows are counted.
    #[inline(always)]
    #[must_use]
    pub const fn is_tracking(self) -> bool {
        self.0 & TRACKED != 0
    }

    /// Whether their sequence numbers are looked at as well.
    #[inline(always)]
    #[must_use]
    pub const fn is_watching(self) -> bool {
        self.0 & WATCHED != 0
    }

    /// This state, with flows counted from now on.
    #[must_use]
    pub const fn tracking(self) -> Self {
        Self(self.0 | TRACKED)
    }

    /// This state, with flows counted and watched from now on.
    #[must_use]
    pub const fn watching(self) -> Self {
        Self(self.0 | TRACKED | WATCHED)
    }

    /// Whether there are flows that the workload has closed.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(self) -> bool {
        self.0 & ENDED != 0
    }

    /// This state, with or without closed flows.
    #[must_use]
    pub const fn with_ended(self, has_ended: bool) -> Self {
        if has_ended {
            Self(self.0 | ENDED)
        } else {
            Self(self.0 & !ENDED)
        }
    }

    /// The next state: these modes, the epoch one higher (wrapping).
    #[must_use]
    pub const fn next(self, ingress: Mode, egress: Mode) -> Self {
        let epoch = (self.0 >> EPOCH_SHIFT).wrapping_add(1);
        Self((epoch << EPOCH_SHIFT) | (self.0 & FLAGS) | ((egress as u64) << 8) | ingress as u64)
    }

    /// This state, with or without staged addresses.
    #[must_use]
    pub const fn with_staged(self, is_staged: bool) -> Self {
        if is_staged {
            Self(self.0 | STAGED)
        } else {
            Self(self.0 & !STAGED)
        }
    }
}

/// What becomes of a flow that the workload has closed and the kernel has not
/// done with: the value of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Ended {
    /// The host that has the socket: its packets pass whatever the mode, so
    /// that it can come to its end while the workload stands still.
    Pass = 1,
    /// The host without the socket: what the peer still sends goes to user
    /// space in every mode, for the kernel would answer with an RST.
    Answer = 2,
}

impl Ended {
    /// Of the map's value.
    #[inline(always)]
    #[must_use]
    pub const fn read(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Pass),
            2 => Some(Self::Answer),
            _ => None,
        }
    }
}

/// Whether a lease has run out. 0 is no lease: it never runs out.
#[inline(always)]
#[must_use]
pub const fn expired(deadline_ns: u64, now_ns: u64) -> bool {
    deadline_ns != 0 && now_ns >= deadline_ns
}

/// The one record of the control map. User space maps it into memory and
/// writes each field with one atomic store.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Control {
    /// See [`State`].
    pub state: u64,
    /// End of the lease on `CLOCK_MONOTONIC`, in nanoseconds; 0 for none.
    pub deadline_ns: u64,
    /// The process that answers for the gate.
    pub owner_pid: u64,
    /// When that process started, in clock ticks after boot (field 22 of
    /// `/proc/PID/stat`), so that a reused PID is not taken for the owner.
    pub owner_start_ticks: u64,
    /// [`LAYOUT_VERSION`] of the writer.
    pub layout_version: u64,
    /// When the present round began, on the programs' clock: a flow whose last
    /// packet is not older is dirty.
    pub round_ns: u64,
    /// Where the migration stands, for whoever looks: its phase, and from bit
    /// 8 on the number of rounds.
    pub progress: u64,
    /// When the watch was marked: what passes first after it is noted.
    pub mark_ns: u64,
    /// Flows that the programs have found themselves and not yet dropped,
    /// nearly; user space puts the number right at every round.
    pub newcomers: u64,
}

/// How many flows the programs put in by themselves: connections that come
/// between two looks of user space. Those beyond are counted, and kept back by
/// their listener like any other.
pub const NEWCOMERS_MAX: u32 = 16_384;

/// Where held packets go and come back from, one record per interface, by
/// interface index. 0 stands for nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Of a gated interface: the TAP device that takes what it receives. Of
    /// such a TAP device: the interface that receives what is written to it.
    pub ingress: u32,
    /// Of a gated interface: the TAP device that takes what it would send. Of
    /// such a TAP device: the interface that sends what is written to it.
    pub egress: u32,
}

/// What the gate has done since it was attached. One record per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets of the workload dropped on their way in, segments of merged
    /// packets counted one by one.
    pub ingress_dropped_packets: u64,
    /// Their bytes, link-layer headers of merged packets counted once.
    pub ingress_dropped_bytes: u64,
    /// Packets of the workload dropped on their way out.
    pub egress_dropped_packets: u64,
    /// Their bytes.
    pub egress_dropped_bytes: u64,
    /// ARP and neighbour discovery packets kept quiet for staged addresses.
    pub staged_dropped_packets: u64,
    /// RST segments of the workload's flows and listeners that went out while
    /// the gate was not open in both directions. An open gate does not look.
    pub rst_sent: u64,
    /// RST segments of the workload's flows and listeners kept in.
    pub rst_dropped: u64,
    /// Packets of the workload held on their way in, segments of merged
    /// packets counted one by one.
    pub held_ingress_packets: u64,
    /// Their bytes, link-layer headers of merged packets counted once.
    pub held_ingress_bytes: u64,
    /// Packets of the workload held on their way out.
    pub held_egress_packets: u64,
    /// Their bytes.
    pub held_egress_bytes: u64,
    /// Frames given back to the stack that have passed the gate. Merged
    /// packets count once here and below.
    pub injected: u64,
    /// Frames sent in the workload's stead that have passed the gate.
    pub emitted: u64,
    /// Packets of flows that were counted one by one, merged packets once.
    pub tracked_packets: u64,
    /// New connections for which there was no room in the flow table.
    pub newcomers_missed: u64,
    /// Frames that were to be held and found no room. Counted outside the
    /// programs; they are among the held ones above.
    pub hold_dropped: u64,
}

impl Counters {
    /// The sum of two records.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            ingress_dropped_packets: self.ingress_dropped_packets + other.ingress_dropped_packets,
            ingress_dropped_bytes: self.ingress_dropped_bytes + other.ingress_dropped_bytes,
            egress_dropped_packets: self.egress_dropped_packets + other.egress_dropped_packets,
            egress_dropped_bytes: self.egress_dropped_bytes + other.egress_dropped_bytes,
            staged_dropped_packets: self.staged_dropped_packets + other.staged_dropped_packets,
            rst_sent: self.rst_sent + other.rst_sent,
            rst_dropped: self.rst_dropped + other.rst_dropped,
            held_ingress_packets: self.held_ingress_packets + other.held_ingress_packets,
            held_ingress_bytes: self.held_ingress_bytes + other.held_ingress_bytes,
            held_egress_packets: self.held_egress_packets + other.held_egress_packets,
            held_egress_bytes: self.held_egress_bytes + other.held_egress_bytes,
            injected: self.injected + other.injected,
            emitted: self.emitted + other.emitted,
            tracked_packets: self.tracked_packets + other.tracked_packets,
            newcomers_missed: self.newcomers_missed + other.newcomers_missed,
            hold_dropped: self.hold_dropped + other.hold_dropped,
        }
    }
}

// SAFETY: `repr(C)` of `u64` only: no padding, every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Control {}
// SAFETY: as for `Control`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}
// SAFETY: `repr(C)` of two `u32`: no padding, every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Route {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_the_two_directions_are_separate() {
        let start = State(0);
        assert!(start.is_open());
        let closed = start.next(Mode::Drop, Mode::Drop);
        assert!(closed.is_closed(Direction::Ingress) && closed.is_closed(Direction::Egress));
        let releasing = closed.next(Mode::Drop, Mode::Open);
        assert!(releasing.is_closed(Direction::Ingress) && !releasing.is_closed(Direction::Egress));
        let open = releasing.next(Mode::Open, Mode::Open);
        assert!(open.is_open());
        assert_eq!(open.0 >> EPOCH_SHIFT, 3);
    }

    #[test]
    fn an_unknown_mode_is_closed() {
        assert_eq!(State(0x06).mode(Direction::Ingress), Mode::Drop);
        assert_eq!(State(0xff00).mode(Direction::Egress), Mode::Drop);
        assert!(State(0xff00).is_closed(Direction::Egress));
    }

    #[test]
    fn every_mode_is_read_as_written() {
        let modes = [
            Mode::Open,
            Mode::Drop,
            Mode::Hold,
            Mode::HoldNew,
            Mode::HoldBare,
            Mode::Mute,
        ];
        for ingress in modes {
            for egress in modes {
                let state = State(0).with_staged(true).next(ingress, egress);
                assert_eq!(state.mode(Direction::Ingress), ingress);
                assert_eq!(state.mode(Direction::Egress), egress);
                assert!(!state.is_idle(), "an address is staged");
                let open = ingress == Mode::Open && egress == Mode::Open;
                assert_eq!(state.with_staged(false).is_idle(), open);
            }
        }
    }

    #[test]
    fn a_lease_ends_and_its_absence_never_does() {
        assert!(!expired(100, 99));
        assert!(expired(100, 100));
        assert!(!expired(0, u64::MAX));
    }

    #[test]
    fn the_epoch_wraps_without_touching_the_modes() {
        let last = State(u64::MAX << EPOCH_SHIFT);
        assert_eq!(last.next(Mode::Open, Mode::Open).0, 0);
    }
}
