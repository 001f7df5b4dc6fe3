//! What the gate remembers of a flow.
//!
//! While both directions are open a packet costs one look-up and three stores.
//! From shortly before the gate closes until it is detached it *watches* as
//! well: sequence numbers tell what a peer has had to send again.
//!
//! A record is written without a lock by whichever CPU has the packet. A flow's
//! packets of one direction come one after the other as a rule, so a count is
//! lost only where two CPUs meet; the time of the last packet never is.

use crate::parse::{Direction, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

/// One flow, both directions: the value of a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowRecord {
    /// From the peer.
    pub ingress: Way,
    /// To the peer.
    pub egress: Way,
    /// 1 for a flow that the programs have found themselves, at a listener;
    /// 0 for one that user space has named.
    pub is_newcomer: u32,
    /// Directions that have been closed with a FIN: bit 0 in, bit 1 out.
    pub finished: u32,
}

/// One direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Packets that passed, segments of merged packets counted one by one.
    pub packets: u64,
    /// Their bytes, link-layer headers of merged packets counted once.
    pub bytes: u64,
    /// When the last one passed, on the programs' clock; 0 for never.
    pub last_ns: u64,
    /// When the first one passed after the mark of the watch; 0 for never.
    pub first_ns: u64,
    /// Packets kept back: held, or dropped where they could not be.
    pub kept: u32,
    /// Packets that user space has given back.
    pub returned: u32,
    /// Watched: segments whose bytes the gate had seen before.
    pub repeated: u32,
    /// Watched: RST segments.
    pub resets: u32,
    /// Watched: the number behind the highest byte seen.
    end: u32,
    /// 1 when `end` is one.
    has_end: u32,
}

const _: () = assert!(size_of::<FlowRecord>() == 2 * 56 + 8);

/// One segment, as far as it is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The flag byte.
    pub flags: u8,
    /// The number of its first byte.
    pub sequence: u32,
    /// What it carries.
    pub payload_bytes: u32,
}

/// What becomes of a packet, as far as it is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It passes.
    Passes,
    /// It is held, or dropped where that cannot be.
    Kept,
    /// User space gives it back.
    Returned,
}

impl Segment {
    /// Whether only a host with an established socket sends it, which a flood
    /// of forged segments cannot provoke: those are answered with SYN and ACK,
    /// or with RST.
    #[inline(always)]
    #[must_use]
    pub const fn is_established(&self) -> bool {
        self.flags & (TCP_SYN | TCP_RST | TCP_ACK) == TCP_ACK
    }

    /// Whether it acknowledges and nothing more.
    #[inline(always)]
    #[must_use]
    pub const fn is_bare(&self) -> bool {
        self.payload_bytes == 0 && self.flags & (TCP_SYN | TCP_RST | TCP_FIN | TCP_ACK) == TCP_ACK
    }

    /// Whether it waits where acknowledgements are held. Beginnings and ends do, too: a
    /// connection that could begin, or end, while an acknowledgement of its peer is held
    /// may be over when that is given to its socket. One in TIME_WAIT answers it, and the
    /// peer, which knows nothing of the connection any more, says RST.
    #[inline(always)]
    #[must_use]
    pub const fn waits_with_answers(&self) -> bool {
        self.is_bare() || self.flags & (TCP_SYN | TCP_FIN) != 0 && self.flags & TCP_RST == 0
    }
}

impl FlowRecord {
    /// The half of one direction.
    #[inline(always)]
    #[must_use]
    pub const fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// Remembers a FIN. `true` when the connection has come to its end: both
    /// sides have closed it and this segment acknowledges the last.
    #[inline(always)]
    pub const fn finish(&mut self, segment: &Segment, direction: Direction) -> bool {
        if segment.flags & TCP_RST != 0 {
            return true;
        }
        if segment.flags & TCP_FIN != 0 {
            self.finished |= match direction {
                Direction::Ingress => 1,
                Direction::Egress => 2,
            };
            return false;
        }
        self.finished == 3
    }
}

impl Way {
    /// Remembers sequence numbers and resets. What user space gives back has
    /// been judged when it was held, perhaps on another host: it only tells
    /// how far the peer has come.
    #[inline(always)]
    pub const fn watch(&mut self, segment: &Segment, fate: Fate, segments: u32) {
        let returned = matches!(fate, Fate::Returned);
        if segment.flags & TCP_RST != 0 {
            if !returned {
                self.resets = self.resets.wrapping_add(1);
            }
            return;
        }
        let is_fin = (segment.flags & TCP_FIN != 0) as u32;
        let bytes = segment.payload_bytes.wrapping_add(is_fin);
        // A bare acknowledgement repeats nothing, nor does a probe without
        // data; a SYN is repeated by nobody who is connected.
        if bytes == 0 || segment.flags & TCP_SYN != 0 {
            return;
        }
        let end = segment.sequence.wrapping_add(bytes);
        // Numbers wrap; the nearer way round tells which is ahead.
        if self.has_end == 0 || end.wrapping_sub(self.end).cast_signed() > 0 {
            self.end = end;
            self.has_end = 1;
        } else if !returned {
            self.repeated = self.repeated.wrapping_add(segments);
        }
    }
}

// SAFETY: `repr(C)`; four `u64`, then six `u32`, twice, then two `u32`: the
// asserted size leaves no room for padding, and every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for FlowRecord {}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(sequence: u32, payload_bytes: u32) -> Segment {
        Segment {
            flags: TCP_ACK,
            sequence,
            payload_bytes,
        }
    }

    #[test]
    fn only_bytes_seen_before_count_as_repeated() {
        let mut way = Way::default();
        let start = u32::MAX - 50;
        for (sequence, bytes, repeated) in [
            (start, 100, 0),
            // A bare acknowledgement, and a probe without data.
            (start.wrapping_add(100), 0, 0),
            (start.wrapping_add(99), 0, 0),
            // Across the wrap.
            (start.wrapping_add(100), 100, 0),
            (start.wrapping_add(100), 100, 1),
            (start, 200, 2),
            // Some old bytes and some new ones.
            (start.wrapping_add(150), 100, 2),
            (start.wrapping_add(150), 100, 3),
        ] {
            way.watch(&data(sequence, bytes), Fate::Passes, 1);
            assert_eq!(way.repeated, repeated, "{sequence} {bytes}");
        }
    }

    #[test]
    fn what_comes_back_teaches_and_does_not_count() {
        let mut way = Way::default();
        way.watch(&data(100, 50), Fate::Returned, 1);
        way.watch(&data(100, 50), Fate::Returned, 1);
        assert_eq!(way.repeated, 0);
        way.watch(&data(100, 50), Fate::Passes, 3);
        assert_eq!(way.repeated, 3);
        let reset = Segment {
            flags: TCP_RST,
            ..data(0, 0)
        };
        way.watch(&reset, Fate::Returned, 1);
        assert_eq!(way.resets, 0);
        way.watch(&reset, Fate::Kept, 1);
        assert_eq!(way.resets, 1);
    }

    #[test]
    fn a_fin_counts_as_one_byte() {
        let mut way = Way::default();
        let fin = Segment {
            flags: TCP_ACK | TCP_FIN,
            ..data(100, 0)
        };
        way.watch(&fin, Fate::Passes, 1);
        assert_eq!(way.repeated, 0);
        way.watch(&fin, Fate::Passes, 1);
        assert_eq!(way.repeated, 1);
    }

    #[test]
    fn a_flow_ends_with_the_last_acknowledgement_or_a_reset() {
        use Direction::{Egress, Ingress};
        let fin = Segment {
            flags: TCP_ACK | TCP_FIN,
            ..data(0, 0)
        };
        let mut record = FlowRecord::default();
        for (segment, direction, ends) in [
            (data(0, 0), Ingress, false),
            (fin, Ingress, false),
            (data(0, 0), Egress, false),
            (fin, Egress, false),
            (fin, Egress, false),
            (data(0, 0), Ingress, true),
        ] {
            assert_eq!(record.finish(&segment, direction), ends);
        }
        let reset = Segment {
            flags: TCP_RST,
            ..data(0, 0)
        };
        assert!(FlowRecord::default().finish(&reset, Ingress));
    }

    #[test]
    fn only_an_established_socket_speaks_so() {
        for (flags, expected) in [
            (TCP_ACK, true),
            (TCP_ACK | TCP_FIN, true),
            (TCP_SYN, false),
            (TCP_SYN | TCP_ACK, false),
            (TCP_RST | TCP_ACK, false),
        ] {
            let segment = Segment {
                flags,
                ..data(0, 0)
            };
            assert_eq!(segment.is_established(), expected, "{flags}");
        }
    }
}
