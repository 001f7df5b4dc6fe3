//! What is held and not yet taken, within its bounds.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use migrate_ebpf_common::{Direction, FlowKey};

use super::{HeldPacket, HeldStats, HoldOptions};

/// Added to every frame's length, so that the bounds bound memory when frames
/// are tiny: the queue's entry, the buffer's own record, the flow's share.
const OVERHEAD_BYTES: usize = 128;

/// One part in so many is for packets that open connections: a flood of them
/// comes from everywhere, so no bound of a single flow stops it, and what
/// established peers send must still find room. With the least of bounds nearly 10,000 fit.
const OPENING_SHARE: usize = 8;

/// Flows whose dropped frames are counted one by one: a listener's packets may
/// come from anywhere.
const FLOWS_DROPPED_MAX: usize = 65_536;

#[derive(Debug)]
pub(crate) struct Store {
    bounds: HoldOptions,
    /// With whether a packet opens a connection.
    queue: VecDeque<(FlowKey, bool, HeldPacket)>,
    /// The sum of all costs in the queue.
    total_bytes: usize,
    /// The part of it that opens connections.
    opening_bytes: usize,
    /// By flow; no entry is 0.
    flow_bytes: HashMap<FlowKey, usize>,
    dropped_frames: u64,
    dropped_bytes: u64,
    /// By flow, for those that had any.
    flow_dropped: HashMap<FlowKey, u32>,
    /// Nothing comes any more.
    has_ended: bool,
}

impl Store {
    pub(crate) fn new(bounds: HoldOptions) -> Self {
        Self {
            bounds,
            queue: VecDeque::new(),
            total_bytes: 0,
            opening_bytes: 0,
            flow_bytes: HashMap::new(),
            dropped_frames: 0,
            dropped_bytes: 0,
            flow_dropped: HashMap::new(),
            has_ended: false,
        }
    }

    /// Keeps a frame, or counts it as dropped where there is no room: the
    /// older ones stay, since TCP sends the newer ones again sooner.
    pub(crate) fn push(
        &mut self,
        key: FlowKey,
        opens: bool,
        direction: Direction,
        interface_index: u32,
        frame: &[u8],
    ) {
        let cost = frame.len() + OVERHEAD_BYTES;
        let of_flow = self.flow_bytes.get(&key).copied().unwrap_or(0);
        if of_flow + cost > self.bounds.flow_bytes_max
            || self.total_bytes + cost > self.bounds.total_bytes_max
            || opens && self.opening_bytes + cost > self.bounds.total_bytes_max / OPENING_SHARE
        {
            self.dropped_frames += 1;
            self.dropped_bytes += u64::try_from(frame.len()).unwrap_or(u64::MAX);
            if self.flow_dropped.len() < FLOWS_DROPPED_MAX || self.flow_dropped.contains_key(&key) {
                *self.flow_dropped.entry(key).or_default() += 1;
            }
            return;
        }
        self.total_bytes += cost;
        if opens {
            self.opening_bytes += cost;
        }
        self.flow_bytes.insert(key, of_flow + cost);
        self.queue.push_back((
            key,
            opens,
            HeldPacket {
                direction,
                interface_index,
                frame: Bytes::copy_from_slice(frame),
            },
        ));
    }

    pub(crate) fn pop(&mut self) -> Option<HeldPacket> {
        let (key, opens, packet) = self.queue.pop_front()?;
        let cost = packet.frame.len() + OVERHEAD_BYTES;
        self.total_bytes -= cost;
        if opens {
            self.opening_bytes -= cost;
        }
        if let Some(of_flow) = self.flow_bytes.get_mut(&key) {
            *of_flow -= cost;
            if *of_flow == 0 {
                self.flow_bytes.remove(&key);
            }
        }
        Some(packet)
    }

    /// Frames of each flow that found no room.
    pub(crate) fn flow_dropped(&self) -> &HashMap<FlowKey, u32> {
        &self.flow_dropped
    }

    pub(crate) fn end(&mut self) {
        self.has_ended = true;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    pub(crate) fn stats(&self) -> HeldStats {
        HeldStats {
            waiting_frames: self.queue.len(),
            waiting_bytes: self
                .total_bytes
                .saturating_sub(self.queue.len() * OVERHEAD_BYTES),
            dropped_frames: self.dropped_frames,
            dropped_bytes: self.dropped_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use migrate_ebpf_common::key::mapped;

    use super::*;

    fn key(port: u8) -> FlowKey {
        FlowKey {
            local: mapped([10, 0, 0, 1]),
            remote: mapped([10, 0, 0, 2]),
            local_port_be: [0, 80],
            remote_port_be: [1, port],
        }
    }

    fn push(store: &mut Store, port: u8, frame: &[u8]) {
        store.push(key(port), false, Direction::Ingress, 7, frame);
    }

    #[test]
    fn a_flood_of_new_connections_leaves_room_for_the_others() {
        let cost = 100 + OVERHEAD_BYTES;
        let mut store = Store::new(HoldOptions {
            total_bytes_max: 16 * cost,
            flow_bytes_max: 16 * cost,
        });
        let open = |store: &mut Store, port| {
            store.push(key(port), true, Direction::Ingress, 7, &[0; 100]);
        };
        (1..=100).for_each(|port| open(&mut store, port));
        assert_eq!(store.stats().waiting_frames, 2);
        assert_eq!(store.stats().dropped_frames, 98);
        (0..14).for_each(|_| push(&mut store, 200, &[1; 100]));
        assert_eq!(store.stats().waiting_frames, 16);
        // What has been taken makes room for them, too.
        assert!(store.pop().is_some());
        open(&mut store, 101);
        assert_eq!(store.stats().waiting_frames, 16);
        while store.pop().is_some() {}
        assert_eq!((store.total_bytes, store.opening_bytes), (0, 0));
    }

    #[test]
    fn the_newest_is_dropped_and_counted_at_either_bound() {
        let cost = 100 + OVERHEAD_BYTES;
        let mut store = Store::new(HoldOptions {
            total_bytes_max: 3 * cost,
            flow_bytes_max: 2 * cost,
        });
        for (port, byte) in [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)] {
            push(&mut store, port, &[byte; 100]);
        }
        assert_eq!(
            store.stats(),
            HeldStats {
                waiting_frames: 3,
                waiting_bytes: 300,
                dropped_frames: 2,
                dropped_bytes: 200,
            }
        );
        assert_eq!(
            (store.flow_dropped()[&key(1)], store.flow_dropped()[&key(2)]),
            (1, 1)
        );
        assert_eq!(store.pop().unwrap().frame[0], 1);
        // What has been taken makes room.
        push(&mut store, 1, &[6; 100]);
        push(&mut store, 1, &[7; 100]);
        let left: Vec<u8> = std::iter::from_fn(|| store.pop())
            .map(|packet| packet.frame[0])
            .collect();
        assert_eq!(left, [2, 4, 6]);
        assert_eq!(store.stats().dropped_frames, 3);
        assert!(store.flow_bytes.is_empty());
        assert_eq!(store.total_bytes, 0);
    }
}
