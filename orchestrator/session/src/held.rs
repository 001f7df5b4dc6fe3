//! Held packets on their way back to a socket.
//!
//! ```text
//!   source                                  destination
//!   closed: holds what peers send
//!   Dumped, then packets as they come --->  keeps them
//!   Go ---------------------------------->  egress opens, but for acknowledgements
//!                                           sockets live: the source's packets,
//!                                           then those held here, then ingress opens,
//!                                           then the acknowledgements
//!   stragglers, until the end ----------->  given to the sockets as they come
//! ```
//!
//! A rollback gives everything back on the source, also what was carried away.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use migrate_core::Flow;
use migrate_core::facts::WindowFacts;
use migrate_ebpf_common::Direction;
use migrate_gate::{Gate, GateError, HeldPacket, HeldPackets, HoldOptions, Repeats};

/// The most that one host ever holds.
pub(crate) const BYTES_CAP: usize = 256 << 20;
const _: () = assert!(BYTES_CAP as u64 == WindowFacts::HELD_BYTES_CAP);

/// How much a gate may hold for connections with these windows.
pub(crate) fn bounds(windows: WindowFacts) -> HoldOptions {
    let (total, flow) = windows.held_bytes_max();
    let bytes = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
    HoldOptions {
        total_bytes_max: bytes(total),
        flow_bytes_max: bytes(flow),
    }
}

/// Waits for a held packet; for ever where nothing is held.
pub(crate) async fn next(held: &mut Option<HeldPackets>) -> HeldPacket {
    if let Some(packets) = held {
        if let Some(packet) = packets.next().await {
            return packet;
        }
        *held = None;
    }
    std::future::pending().await
}

/// What is held at this moment.
pub(crate) fn drain(held: &mut Option<HeldPackets>) -> Vec<HeldPacket> {
    held.as_mut().map_or_else(Vec::new, HeldPackets::try_drain)
}

/// Packets on their way in, and those on their way out, each in order.
pub(crate) fn parted(
    packets: impl IntoIterator<Item = HeldPacket>,
) -> (Vec<HeldPacket>, Vec<HeldPacket>) {
    packets
        .into_iter()
        .partition(|packet| packet.direction == Direction::Ingress)
}

/// Gives packets back that were held on this host, in order. One that cannot be
/// given back is a lost packet and no more: its sender sends it again.
pub(crate) fn give_back(gate: &Gate, packets: &[HeldPacket]) {
    for packet in packets {
        let given = match packet.direction {
            Direction::Ingress => gate.inject_ingress(packet.interface_index, &packet.frame),
            Direction::Egress => gate.emit_egress(packet.interface_index, &packet.frame),
        };
        if let Err(error) = given {
            tracing::warn!(error = %crate::error::chain(&error), "a held packet was lost");
        }
    }
}

/// How often packets that have come meanwhile are put in, before the gate opens
/// all the same. Without answers a sender stops when its window is full; the
/// first look finds most of that.
const RELEASE_ROUNDS_MAX: usize = 16;

/// Opens a gate in front of sockets that live: `waiting` goes in first, then
/// what is held, without what `repeats` knows to be in already. The gate has been told to hold answers, without which nobody
/// has a reason to send more, so that the last of it is in before the gate
/// opens: a sender takes for lost what is overtaken, and sends it again.
pub(crate) fn release(
    gate: &Gate,
    held: &mut Option<HeldPackets>,
    mut waiting: Vec<HeldPacket>,
    mut repeats: Repeats,
) -> Result<(), GateError> {
    let mut answers = Vec::new();
    for _ in 0..RELEASE_ROUNDS_MAX {
        waiting.extend(drain(held));
        let (mut inward, outward) = parted(waiting.drain(..));
        answers.extend(outward);
        // Acknowledgements may overtake each other.
        let was_last = inward.iter().all(HeldPacket::is_bare);
        inward.retain(|packet| !repeats.is_repeat(&packet.frame));
        hand_on(gate, &inward);
        // What comes again from here on may have found no room in its socket.
        repeats = Repeats::default();
        if was_last {
            break;
        }
    }
    gate.open_ingress();
    // What goes out keeps its order, and is gone before anything may overtake it.
    for _ in 0..RELEASE_ROUNDS_MAX {
        let (inward, outward) = parted(drain(held));
        give_back(gate, &inward);
        answers.extend(outward);
        if answers.is_empty() {
            break;
        }
        hand_on(gate, &std::mem::take(&mut answers));
    }
    gate.open()?;
    // The next acknowledgement says the same.
    let mut late = drain(held);
    late.retain(|packet| packet.direction == Direction::Ingress || !packet.is_bare());
    give_back(gate, &late);
    Ok(())
}

/// How long the kernel may take to hand on the next of what it was given; the
/// machine may be busy.
const HAND_ON_LIMIT: Duration = Duration::from_millis(50);
/// Between two looks at the gate's counter.
const HAND_ON_LOOK: Duration = Duration::from_micros(50);
/// So many may be on their way at once: a CPU's queue takes a thousand
/// (`net.core.netdev_max_backlog`), others' packets among them, and drops the rest.
const HAND_ON_PACKETS_MAX: usize = 256;

/// Gives packets back, as [`give_back`], and waits until they have passed the gate:
/// another CPU may be slower with them than with a packet that comes later on its own.
pub(crate) fn hand_on(gate: &Gate, packets: &[HeldPacket]) {
    by_and_by(gate, packets, |some| give_back(gate, some));
}

/// Gives packets to the sockets that another host has held for them, as
/// [`give_over`], and waits as [`hand_on`].
pub(crate) fn hand_over(
    gate: &Gate,
    frames: &[impl AsRef<[u8]>],
    home: impl Fn(IpAddr) -> Option<u32>,
) {
    by_and_by(gate, frames, |some| give_over(gate, some, &home));
}

fn by_and_by<T>(gate: &Gate, packets: &[T], give: impl Fn(&[T])) {
    // What cannot be told is not waited for.
    let underway = || gate.underway().unwrap_or_default();
    let mut lost = underway();
    for some in packets.chunks(HAND_ON_PACKETS_MAX) {
        give(some);
        let (mut left, mut since) = (underway(), Instant::now());
        while left > lost {
            if since.elapsed() > HAND_ON_LIMIT {
                lost = left;
                break;
            }
            std::thread::sleep(HAND_ON_LOOK);
            let now_left = underway();
            if now_left < left {
                (left, since) = (now_left, Instant::now());
            }
        }
    }
}

/// Lets closed connections of this host go on past a closed gate: what their
/// peers have said meanwhile goes in first, and `open` lets pass what comes.
/// Returns the packets of others.
///
/// What is found held after that may have been overtaken on its way. An end
/// that has overtaken an acknowledgement leaves a socket in TIME_WAIT, which
/// answers the acknowledgement with one of its own (RFC 9293, 3.10.7.4), and a
/// peer that has forgotten the connection answers that with an RST. So a late
/// acknowledgement is dropped: whoever needs it asks again.
pub(crate) fn let_end<E>(
    flows: &HashSet<Flow>,
    mut drain: impl FnMut() -> Vec<HeldPacket>,
    hand_on: impl Fn(&[HeldPacket]),
    open: impl FnOnce() -> Result<(), E>,
) -> Result<Vec<HeldPacket>, E> {
    let mut others = Vec::new();
    let mut theirs = || {
        let (theirs, more): (Vec<_>, Vec<_>) = drain()
            .into_iter()
            .partition(|packet| packet.flow().is_some_and(|flow| flows.contains(&flow)));
        others.extend(more);
        theirs
    };
    for _ in 0..RELEASE_ROUNDS_MAX {
        let theirs = theirs();
        if theirs.is_empty() {
            break;
        }
        hand_on(&theirs);
    }
    open()?;
    let mut late = theirs();
    late.retain(|packet| !packet.is_bare());
    hand_on(&late);
    Ok(others)
}

/// Gives packets to the sockets that another host has held for them. `home`
/// names the interface of a local address.
fn give_over(gate: &Gate, frames: &[impl AsRef<[u8]>], home: &impl Fn(IpAddr) -> Option<u32>) {
    for frame in frames {
        let frame = frame.as_ref();
        let Some(interface) = receiver(frame).and_then(home) else {
            tracing::warn!(bytes = frame.len(), "a held packet is for nobody here");
            continue;
        };
        if let Err(error) = gate.inject_ingress(interface, frame) {
            tracing::warn!(error = %crate::error::chain(&error), "a held packet was lost");
        }
    }
}

/// `struct virtio_net_hdr` and an Ethernet header without tag.
const HEADERS_BYTES: usize = 10 + 14;

/// Whom a held frame is for. The gate looks at everything else about it.
fn receiver(frame: &[u8]) -> Option<IpAddr> {
    let (headers, mut packet) = frame.split_at_checked(HEADERS_BYTES)?;
    let mut kind = [headers[22], headers[23]];
    // 802.1Q and 802.1ad: the type follows the tag.
    while matches!(kind, [0x81, 0x00] | [0x88, 0xa8]) {
        let (tag, rest) = packet.split_at_checked(4)?;
        kind = [tag[2], tag[3]];
        packet = rest;
    }
    match kind {
        [0x08, 0x00] => {
            let octets: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        }
        [0x86, 0xdd] => {
            let octets: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: &[u8], packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; HEADERS_BYTES - 2];
        frame.extend_from_slice(kind);
        frame.extend_from_slice(packet);
        frame
    }

    const ACK: u8 = 0x10;
    const FIN: u8 = 0x01;

    /// What a peer at 10.0.0.2 has sent from this port.
    fn said(port: u16, flags: u8) -> HeldPacket {
        let mut segment = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        segment.extend([10, 0, 0, 2, 10, 0, 0, 1]);
        segment.extend(port.to_be_bytes());
        segment.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0, 9, 0, 0, 0, 0]);
        HeldPacket {
            direction: Direction::Ingress,
            interface_index: 2,
            frame: frame(&[8, 0], &segment).into(),
        }
    }

    #[test]
    fn no_acknowledgement_is_given_to_a_connection_that_has_gone_on() {
        let ending = Flow::new("10.0.0.1:80".parse().unwrap(), ([10, 0, 0, 2], 7).into());
        let held = [
            vec![said(7, ACK), said(8, ACK)],
            vec![said(7, ACK | FIN)],
            vec![],
            vec![said(7, ACK), said(8, FIN | ACK), said(7, ACK | FIN)],
        ];
        let mut drains = held.into_iter();
        let given = std::cell::RefCell::new(Vec::new());
        let others = let_end(
            &HashSet::from([ending]),
            || drains.next().unwrap(),
            |packets| given.borrow_mut().extend(packets.iter().cloned().map(Some)),
            || {
                given.borrow_mut().push(None);
                Ok::<_, GateError>(())
            },
        )
        .unwrap();
        let (ack, fin) = (Some(said(7, ACK)), Some(said(7, ACK | FIN)));
        assert_eq!(given.into_inner(), [ack, fin.clone(), None, fin]);
        assert_eq!(others, [said(8, ACK), said(8, FIN | ACK)]);
    }

    #[test]
    fn receivers_are_found_behind_tags() {
        let mut v4 = [0; 20];
        v4[16..].copy_from_slice(&[10, 77, 0, 100]);
        let ip = Some("10.77.0.100".parse().unwrap());
        assert_eq!(receiver(&frame(&[8, 0], &v4)), ip);
        let tagged = [&[0, 5, 8, 0], &v4[..]].concat();
        assert_eq!(receiver(&frame(&[0x81, 0], &tagged)), ip);
        let mut v6 = [0; 40];
        v6[39] = 1;
        assert_eq!(
            receiver(&frame(&[0x86, 0xdd], &v6)),
            Some("::1".parse().unwrap())
        );
    }

    #[test]
    fn what_is_cut_short_is_for_nobody() {
        let whole = frame(&[0x81, 0], &[0, 5, 0x86, 0xdd]);
        for cut in 0..whole.len() {
            assert_eq!(receiver(&whole[..cut]), None);
        }
        assert_eq!(receiver(&frame(&[8, 6], &[0; 60])), None);
    }
}
