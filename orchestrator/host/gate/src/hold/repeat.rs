//! What a peer has said twice while it waited.
//!
//! A peer without an answer sends its segment again, after 200 ms and then ever
//! more seldom, so that after seconds most of what is held for many connections
//! has been held before. Given to the sockets, each copy would be answered with
//! an acknowledgement. The first of those says something: that what the peer has
//! sent twice has come twice, so that it takes back what it has concluded from the
//! silence (Linux `tcp_process_tlp_ack`, `tcp_try_undo_dsack`). The others do not.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use migrate_ebpf_common::{Direction, FlowKey};

use super::frame::{Said, said};

/// One unbroken piece of a flow's bytes that has been kept.
#[derive(Debug)]
struct Kept {
    /// The number of its first byte, and the one behind its last. The end of
    /// a stream (FIN) counts as a byte.
    from: u32,
    to: u32,
    /// What the last kept packet of the flow said of the other direction.
    acknowledged: [u8; 6],
    /// Some of it has been kept a second time.
    is_repeated: bool,
}

/// What peers have said so far in packets that are given to sockets in one go.
#[derive(Debug, Default)]
pub struct Repeats(HashMap<FlowKey, Kept>);

impl Repeats {
    /// Whether a received frame (see [`HeldPacket::frame`]) need not be given to
    /// the socket, for all of its bytes were in earlier ones, it tells nothing else
    /// that is new, and it is not the first such frame of its flow. A network may lose any packet, and with this one nothing
    /// is lost.
    ///
    /// [`HeldPacket::frame`]: crate::HeldPacket::frame
    pub fn is_repeat(&mut self, frame: &[u8]) -> bool {
        said(frame, Direction::Ingress)
            .is_some_and(|(key, said)| is_repeat(&mut self.0, key, &said))
    }
}

fn is_repeat(kept: &mut HashMap<FlowKey, Kept>, key: FlowKey, said: &Said) -> bool {
    let (from, to) = (said.sequence, said.sequence.wrapping_add(said.length));
    match kept.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(Kept {
                from,
                to,
                acknowledged: said.acknowledged,
                is_repeated: false,
            });
            false
        }
        Entry::Occupied(mut entry) => {
            let kept = entry.get_mut();
            let known = kept.to.wrapping_sub(kept.from);
            let begins = from.wrapping_sub(kept.from);
            // What lies before the piece begins far behind its end.
            let adjoins = begins <= known;
            let is_known = adjoins && said.length > 0 && said.length <= known - begins;
            if is_known && said.acknowledged == kept.acknowledged {
                return std::mem::replace(&mut kept.is_repeated, true);
            }
            kept.acknowledged = said.acknowledged;
            // With a gap in front it is not looked at again.
            if adjoins && !is_known {
                kept.to = to;
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ACK: u8 = 0x10;
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;

    fn packet(port: u16, sequence: u32, flags: u8, acknowledged: u32, length: u16) -> Vec<u8> {
        let mut frame = vec![0; 10 + 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + length).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
        frame.extend(port.to_be_bytes());
        frame.extend([0, 80]);
        frame.extend(sequence.to_be_bytes());
        frame.extend(acknowledged.to_be_bytes());
        frame.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
        frame.resize(frame.len() + usize::from(length), 7);
        frame
    }

    fn kept(packets: &[Vec<u8>]) -> Vec<usize> {
        let mut repeats = Repeats::default();
        let all = packets.iter().enumerate();
        all.filter(|(_, frame)| !repeats.is_repeat(frame))
            .map(|(at, _)| at)
            .collect()
    }

    #[test]
    fn what_was_said_twice_is_left_out() {
        let packets = [
            packet(1, u32::MAX - 10, ACK, 5, 100),
            packet(2, u32::MAX - 10, ACK, 5, 100),
            packet(1, 89, ACK, 5, 10),
            // Again, which is kept once; then in one piece and in part.
            packet(1, u32::MAX - 10, ACK, 5, 100),
            packet(1, u32::MAX - 10, ACK, 5, 110),
            packet(1, 50, ACK, 5, 49),
            // One byte more.
            packet(1, 50, ACK, 5, 50),
            // The end, and again.
            packet(1, 100, ACK | FIN, 5, 0),
            packet(1, 100, ACK | FIN, 5, 0),
            packet(2, u32::MAX - 10, ACK, 5, 100),
            packet(2, u32::MAX - 10, ACK, 5, 100),
        ];
        assert_eq!(kept(&packets), [0, 1, 2, 3, 6, 7, 9]);
    }

    #[test]
    fn what_says_something_new_is_kept() {
        let packets = [
            packet(1, 100, ACK, 5, 10),
            // Of the other direction.
            packet(1, 100, ACK, 6, 10),
            // Acknowledgements alone, for they are counted.
            packet(1, 110, ACK, 6, 0),
            packet(1, 110, ACK, 6, 0),
            // Before what came first, and behind a gap.
            packet(1, 95, ACK, 6, 5),
            packet(1, 200, ACK, 6, 5),
            packet(1, 200, ACK, 6, 5),
            packet(1, 7, SYN, 0, 0),
            packet(1, 7, SYN, 0, 0),
        ];
        assert_eq!(kept(&packets), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let mut other = packet(1, 100, ACK, 5, 10);
        other.truncate(30);
        assert_eq!(kept(&[other.clone(), other]), [0, 1]);
    }

    proptest! {
        /// No byte and no acknowledgement is lost.
        #[test]
        fn nothing_is_lost(
            said in prop::collection::vec(
                (0..3_u16, 0..40_u32, 0..2_u32, 0..12_u16, any::<bool>()), 0..60
            ),
            base in any::<u32>(),
        ) {
            let packets: Vec<_> = said
                .iter()
                .map(|&(port, at, acknowledged, length, ends)| {
                    let flags = if ends { ACK | FIN } else { ACK };
                    packet(port, base.wrapping_add(at), flags, acknowledged, length)
                })
                .collect();
            let told = |packets: &[Vec<u8>]| {
                let mut told = std::collections::BTreeSet::new();
                for held in packets {
                    let (key, said) = super::said(held, Direction::Ingress).unwrap();
                    let port = key.remote_port_be;
                    let begins = said.sequence.wrapping_sub(base);
                    told.extend((begins..begins + said.length).map(|at| (port, Some(at), [0; 6])));
                    told.insert((port, None, said.acknowledged));
                }
                told
            };
            let left: Vec<_> = kept(&packets).into_iter().map(|at| packets[at].clone()).collect();
            prop_assert_eq!(told(&left), told(&packets));
        }
    }
}
