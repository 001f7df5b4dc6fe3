//! The records that user space and the programs exchange through maps.

use crate::parse::Direction;

/// Version of every map's layout. A gate that another version has pinned is
/// not adopted, only removed.
pub const LAYOUT_VERSION: u64 = 1;

/// What the gate does with the workload's packets in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Packets pass.
    Open = 0,
    /// Packets are dropped.
    Drop = 1,
}

/// Both modes and the epoch in one word, so that one aligned store changes
/// both directions at once and one load sees a whole state.
///
/// ```text
///   63                       16 15       8 7         0
///   | epoch: changes so far    | egress   | ingress  |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u64);

impl State {
    /// Whether packets of this direction are kept back. Modes unknown to this
    /// version count as closed: a lock that does not understand its state
    /// must not let a packet out.
    #[inline(always)]
    #[must_use]
    pub const fn is_closed(self, direction: Direction) -> bool {
        let shift = match direction {
            Direction::Ingress => 0,
            Direction::Egress => 8,
        };
        (self.0 >> shift) & 0xff != Mode::Open as u64
    }

    /// Whether both directions are open.
    #[inline(always)]
    #[must_use]
    pub const fn is_open(self) -> bool {
        self.0 & 0xffff == 0
    }

    /// The next state: these modes, the epoch one higher (wrapping).
    #[must_use]
    pub const fn next(self, ingress: Mode, egress: Mode) -> Self {
        let epoch = (self.0 >> 16).wrapping_add(1);
        Self((epoch << 16) | ((egress as u64) << 8) | ingress as u64)
    }

    /// Whether the programs treat this state as closed for the direction at
    /// the time `now_ns`, given the lease's end (0: no lease).
    #[inline(always)]
    #[must_use]
    pub const fn holds(self, direction: Direction, deadline_ns: u64, now_ns: u64) -> bool {
        self.is_closed(direction) && !expired(deadline_ns, now_ns)
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
    /// RST segments of the workload's flows and listeners that went out.
    pub rst_sent: u64,
    /// RST segments of the workload's flows and listeners kept in.
    pub rst_dropped: u64,
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
        }
    }
}

// SAFETY: `repr(C)` of `u64` only: no padding, every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Control {}
// SAFETY: as for `Control`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}

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
        assert_eq!(open.0 >> 16, 3);
    }

    #[test]
    fn an_unknown_mode_is_closed() {
        assert!(State(0x02).is_closed(Direction::Ingress));
        assert!(State(0xff00).is_closed(Direction::Egress));
    }

    #[test]
    fn a_lease_ends_and_its_absence_never_does() {
        let closed = State(0).next(Mode::Drop, Mode::Drop);
        assert!(closed.holds(Direction::Ingress, 100, 99));
        assert!(!closed.holds(Direction::Ingress, 100, 100));
        assert!(closed.holds(Direction::Ingress, 0, u64::MAX));
    }

    #[test]
    fn the_epoch_wraps_without_touching_the_modes() {
        let last = State(u64::MAX << 16);
        assert_eq!(last.next(Mode::Open, Mode::Open).0, 0);
    }
}
