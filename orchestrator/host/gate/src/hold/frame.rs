//! Held frames, checked before they go back to the kernel.
//!
//! A frame may come from another host, so nothing in it is believed: lengths,
//! offload fields and headers have to agree with each other before the kernel
//! is asked to take them.
//!
//! ```text
//!   0        10          24                    (tags)
//!   | offload | Ethernet | 0 to 2 VLAN tags | IPv4 or IPv6 | TCP | payload |
//! ```

use migrate_ebpf_common::{Direction, FlowKey, Layer2, Packet, Parsed, Segment, parse};

/// `struct virtio_net_hdr`, little-endian (`TUNSETVNETLE`).
pub(crate) const OFFLOAD_BYTES: usize = 10;
const ETHERNET_BYTES: usize = 14;
const TAG_BYTES: usize = 4;
/// What the gate's programs read, too.
const MAX_TAGS: usize = 2;
/// The longest frame there is: the longest IP packet and all headers before.
pub const FRAME_BYTES_MAX: usize =
    OFFLOAD_BYTES + ETHERNET_BYTES + MAX_TAGS * TAG_BYTES + 40 + 65_535;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86DD;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88A8;

// linux/virtio_net.h
const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// The shortest segments that Linux cuts (`TCP_MIN_GSO_SIZE`): the smallest
/// MSS, 48, less the longest TCP options, 40.
const SEGMENT_BYTES_MIN: u16 = 8;
/// Where a TCP header has its checksum.
const CHECKSUM_OFFSET: u16 = 16;
const TCP_HEADER_BYTES_MIN: usize = 20;

/// Why a frame is not given to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Shorter than its headers, or longer than any packet.
    #[error("{bytes} bytes are no frame")]
    Length {
        /// Its length.
        bytes: usize,
    },
    /// Neither IPv4 nor IPv6 with TCP inside, or too deep inside.
    #[error("no TCP over IPv4 or IPv6 (type {ethertype:#06x})")]
    NoTcp {
        /// The type behind all tags.
        ethertype: u16,
    },
    /// A header says it is longer than the frame.
    #[error("the {header} header does not fit the frame")]
    Header {
        /// Which header.
        header: &'static str,
    },
    /// A field of the offload header contradicts the frame.
    #[error("the offload field {field} has the impossible value {value:#x}")]
    Offload {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u16,
    },
}

/// Finds the flow of a frame that the kernel may be given.
pub(crate) fn check(frame: &[u8], direction: Direction) -> Result<FlowKey, FrameError> {
    let too_short = FrameError::Length { bytes: frame.len() };
    if frame.len() > FRAME_BYTES_MAX {
        return Err(too_short);
    }
    let (offload, packet) = frame
        .split_first_chunk::<OFFLOAD_BYTES>()
        .ok_or(too_short)?;
    let (mut ethertype, mut network) = match packet.get(12..ETHERNET_BYTES) {
        Some(&[high, low]) => (u16::from_be_bytes([high, low]), ETHERNET_BYTES),
        _ => return Err(too_short),
    };
    let Parsed::Tcp { key, .. } = parse(packet, Layer2::Ethernet, ethertype, direction) else {
        return Err(FrameError::NoTcp { ethertype });
    };
    while ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ {
        // As long as `parse` has read on, so these are at most two.
        let [_, _, high, low] = packet.load::<TAG_BYTES>(network).ok_or(too_short)?;
        ethertype = u16::from_be_bytes([high, low]);
        network += TAG_BYTES;
    }
    let ip = read_ip(packet, network, ethertype)?;
    check_offload(*offload, packet, &ip)?;
    Ok(key)
}

/// The flow of a frame and its segment; nothing else is checked.
pub(crate) fn segment_of(frame: &[u8], direction: Direction) -> Option<(FlowKey, Segment)> {
    let packet = frame.get(OFFLOAD_BYTES..)?;
    let [high, low] = packet.load::<2>(12)?;
    let ethertype = u16::from_be_bytes([high, low]);
    match parse(packet, Layer2::Ethernet, ethertype, direction) {
        Parsed::Tcp {
            key,
            flags,
            sequence,
            payload_bytes,
        } => Some((
            key,
            Segment {
                flags,
                sequence,
                payload_bytes,
            },
        )),
        Parsed::Other | Parsed::Unreadable | Parsed::Neighbour { .. } => None,
    }
}

/// What a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    /// The number of its first byte.
    pub(crate) sequence: u32,
    /// How many bytes it has, its stream's end (FIN) as one.
    pub(crate) length: u32,
    /// What it acknowledges, and the window.
    pub(crate) acknowledged: [u8; 6],
}

/// What a segment of an established connection says; `None` for one that opens
/// or resets it, and for what is not a whole packet without tags and extension
/// headers.
pub(crate) fn said(frame: &[u8], direction: Direction) -> Option<(FlowKey, Said)> {
    let (key, segment) = segment_of(frame, direction)?;
    let (_, tcp) = plain(frame.get(OFFLOAD_BYTES..)?)?;
    let unusual = segment.flags & !(TCP_FIN | TCP_PSH | TCP_ACK);
    if unusual != 0 || segment.flags & TCP_ACK == 0 {
        return None;
    }
    let ends = u32::from(segment.flags & TCP_FIN != 0);
    Some((
        key,
        Said {
            sequence: segment.sequence,
            length: segment.payload_bytes.checked_add(ends)?,
            acknowledged: [tcp[8], tcp[9], tcp[10], tcp[11], tcp[14], tcp[15]],
        },
    ))
}

/// Gives a frame a new destination address.
pub(crate) fn set_destination(frame: &mut [u8], hardware_address: [u8; 6]) {
    if let Some(destination) = frame.get_mut(OFFLOAD_BYTES..OFFLOAD_BYTES + 6) {
        destination.copy_from_slice(&hardware_address);
    }
}

const TCP_FIN: u8 = 0x01;
const TCP_RST: u8 = 0x04;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;

/// The acknowledgement of the end (FIN) in a sound frame that was received,
/// as the socket that is no more would send it; `None` where the frame has no
/// end, or is not a whole packet without tags and extension headers.
pub(crate) fn acknowledge_end(frame: &[u8], hardware_address: [u8; 6]) -> Option<Vec<u8>> {
    let packet = frame.get(OFFLOAD_BYTES..)?;
    let (ip, tcp) = plain(packet)?;
    let flags = tcp[13];
    if flags & TCP_FIN == 0 || flags & TCP_RST != 0 {
        return None;
    }
    let payload_bytes = ip.end - ip.tcp - usize::from(tcp[12] >> 4) * 4;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    // Everything up to the end and the end itself.
    let acknowledged = sequence.wrapping_add(u32::try_from(payload_bytes).ok()?.wrapping_add(1));

    let mut answer = vec![0; OFFLOAD_BYTES];
    answer.extend_from_slice(&packet[6..12]);
    answer.extend_from_slice(&hardware_address);
    answer.extend_from_slice(packet.get(12..ETHERNET_BYTES)?);
    let header = packet.get(ETHERNET_BYTES..ip.tcp)?;
    let ip_bytes = header.len();
    let mut answer_ip = header.to_vec();
    let addresses = if ip.is_v4 { 12 } else { 8 };
    let address_bytes = (ip_bytes - addresses) / 2;
    answer_ip[addresses..].rotate_left(address_bytes);
    if ip.is_v4 {
        answer_ip[2..4].copy_from_slice(&40_u16.to_be_bytes());
        // Not a fragment, so its identification means nothing.
        answer_ip[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
        answer_ip[8] = 64;
        answer_ip[10..12].fill(0);
        let sum = checksum(&[&answer_ip]);
        answer_ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        answer_ip[4..6].copy_from_slice(&20_u16.to_be_bytes());
        answer_ip[7] = 64;
    }
    let mut answer_tcp = [0; TCP_HEADER_BYTES_MIN];
    answer_tcp[..2].copy_from_slice(&tcp[2..4]);
    answer_tcp[2..4].copy_from_slice(&tcp[..2]);
    answer_tcp[4..8].copy_from_slice(&tcp[8..12]);
    answer_tcp[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    answer_tcp[12] = 5 << 4;
    answer_tcp[13] = TCP_ACK;
    let pseudo = [0, 6, 0, 20];
    let sum = checksum(&[&answer_ip[addresses..], &pseudo, &answer_tcp]);
    answer_tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    answer.extend_from_slice(&answer_ip);
    answer.extend_from_slice(&answer_tcp);
    Some(answer)
}

/// Whether a frame that was received resets its connection.
pub(crate) fn is_reset(frame: &[u8]) -> bool {
    segment_of(frame, Direction::Ingress).is_some_and(|(_, segment)| segment.flags & TCP_RST != 0)
}

/// The Internet checksum of parts with an even number of bytes each.
fn checksum(parts: &[&[u8]]) -> u16 {
    let sum: u32 = parts
        .iter()
        .flat_map(|part| part.chunks_exact(2))
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let [a, b, c, d] = sum.to_be_bytes();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let (folded, carried) = low.overflowing_add(high);
    !(folded + u16::from(carried))
}

/// The headers of a whole packet without tags and extension headers; `None` for
/// any other.
fn plain(packet: &[u8]) -> Option<(Ip, [u8; TCP_HEADER_BYTES_MIN])> {
    let [high, low] = packet.load::<2>(12)?;
    let ip = read_ip(packet, ETHERNET_BYTES, u16::from_be_bytes([high, low])).ok()?;
    let ip_bytes = if ip.is_v4 { 20 } else { 40 };
    if ip.is_fragment || ip.tcp != ETHERNET_BYTES + ip_bytes {
        return None;
    }
    let tcp = packet.load::<TCP_HEADER_BYTES_MIN>(ip.tcp)?;
    Some((ip, tcp))
}

struct Ip {
    is_v4: bool,
    is_fragment: bool,
    /// Where the TCP header starts.
    tcp: usize,
    /// Where the packet ends; padding may follow.
    end: usize,
}

fn read_ip(packet: &[u8], network: usize, ethertype: u16) -> Result<Ip, FrameError> {
    let bad_ip = FrameError::Header { header: "IP" };
    let ip = match ethertype {
        ETHERTYPE_IPV4 => {
            let header = packet.load::<20>(network).ok_or(bad_ip)?;
            let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
            Ip {
                is_v4: true,
                is_fragment: fragment != 0,
                tcp: network + usize::from(header[0] & 0x0f) * 4,
                end: network + usize::from(u16::from_be_bytes([header[2], header[3]])),
            }
        }
        ETHERTYPE_IPV6 => {
            let header = packet.load::<40>(network).ok_or(bad_ip)?;
            let (tcp, is_fragment) = skip_extensions(packet, network, header[6])?;
            Ip {
                is_v4: false,
                is_fragment,
                tcp,
                end: network + 40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
            }
        }
        _ => return Err(FrameError::NoTcp { ethertype }),
    };
    if ip.end > packet.len() || ip.tcp + TCP_HEADER_BYTES_MIN > ip.end {
        return Err(bad_ip);
    }
    let data_offset = packet.get(ip.tcp + 12).map_or(0, |byte| byte >> 4);
    let tcp_bytes = usize::from(data_offset) * 4;
    if tcp_bytes < TCP_HEADER_BYTES_MIN || ip.tcp + tcp_bytes > ip.end {
        return Err(FrameError::Header { header: "TCP" });
    }
    Ok(ip)
}

/// Where TCP starts behind an IPv6 header whose chain `parse` has followed to
/// a TCP header before.
fn skip_extensions(packet: &[u8], network: usize, first: u8) -> Result<(usize, bool), FrameError> {
    const TCP: u8 = 6;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    let (mut next, mut offset, mut is_fragment) = (first, network + 40, false);
    while next != TCP {
        // Each turn moves on by 8 bytes at least, so the frame's end bounds it.
        let [following, length] = packet
            .load::<2>(offset)
            .ok_or(FrameError::Header { header: "IP" })?;
        let length = usize::from(length);
        offset += match next {
            AUTHENTICATION => (length + 2) * 4,
            FRAGMENT => {
                is_fragment = true;
                8
            }
            _ => (length + 1) * 8,
        };
        next = following;
    }
    Ok((offset, is_fragment))
}

fn check_offload(offload: [u8; OFFLOAD_BYTES], packet: &[u8], ip: &Ip) -> Result<(), FrameError> {
    let [flags, gso, rest @ ..] = offload;
    let word = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
    let (header_bytes, segment_bytes) = (word(0), word(2));
    let (checksum_start, checksum_offset) = (word(4), word(6));
    let bad = |field, value| Err(FrameError::Offload { field, value });

    if flags & !(NEEDS_CHECKSUM | DATA_VALID) != 0 {
        return bad("flags", flags.into());
    }
    if usize::from(header_bytes) > packet.len() {
        return bad("hdr_len", header_bytes);
    }
    if flags & NEEDS_CHECKSUM != 0 {
        if usize::from(checksum_start) != ip.tcp {
            return bad("csum_start", checksum_start);
        }
        if checksum_offset != CHECKSUM_OFFSET {
            return bad("csum_offset", checksum_offset);
        }
    }
    let family = match gso & !GSO_ECN {
        GSO_NONE if gso & GSO_ECN == 0 => None,
        GSO_TCP_V4 => Some(true),
        GSO_TCP_V6 => Some(false),
        _ => return bad("gso_type", gso.into()),
    };
    if family.is_some_and(|is_v4| is_v4 != ip.is_v4) {
        return bad("gso_type", gso.into());
    }
    let is_merged = family.is_some();
    // u16::MAX means something else to the kernel (`GSO_BY_FRAGS`).
    if is_merged && !(SEGMENT_BYTES_MIN..u16::MAX).contains(&segment_bytes) {
        return bad("gso_size", segment_bytes);
    }
    // A fragment's checksum covers more than the fragment.
    if ip.is_fragment && (is_merged || flags & NEEDS_CHECKSUM != 0) {
        return bad("flags", flags.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;
    use crate::tests::packets::{ACK, Packet as Made};

    const V4: (&str, &str) = ("10.0.0.2:5000", "10.0.0.1:7000");
    const V6: (&str, &str) = ("[fd00::2]:5000", "[fd00::1]:7000");
    const INGRESS: Direction = Direction::Ingress;

    fn made((from, to): (&str, &str)) -> Made {
        Made::tcp(from, to, ACK).with_lengths()
    }

    fn frame(packet: &Made) -> Vec<u8> {
        [vec![0; OFFLOAD_BYTES], packet.bytes()].concat()
    }

    /// A frame as a veth device hands on merged packets: the checksum is not
    /// made, the segments are not cut.
    fn merged(addresses: (&str, &str)) -> Vec<u8> {
        let mut frame = frame(&made(addresses));
        let (gso, tcp): (u8, u16) = if addresses == V4 { (1, 34) } else { (4, 54) };
        frame[0] = NEEDS_CHECKSUM;
        frame[1] = gso;
        frame[2..4].copy_from_slice(&(tcp + 20).to_le_bytes());
        frame[4..6].copy_from_slice(&1448_u16.to_le_bytes());
        frame[6..8].copy_from_slice(&tcp.to_le_bytes());
        frame[8..10].copy_from_slice(&CHECKSUM_OFFSET.to_le_bytes());
        frame
    }

    #[test]
    fn an_end_is_acknowledged_behind_its_data() {
        for (from, to) in [V4, V6] {
            let mut end = frame(&Made::tcp(from, to, ACK | TCP_FIN).with_lengths());
            let tcp = if (from, to) == V4 { 44 } else { 64 };
            end[tcp + 4..tcp + 8].copy_from_slice(&u32::MAX.to_be_bytes());
            end[tcp + 8..tcp + 12].copy_from_slice(&7_u32.to_be_bytes());
            let payload = u32::try_from(end.len() - tcp - 20).unwrap();
            let answer = acknowledge_end(&end, [2; 6]).unwrap();
            assert_eq!(answer[OFFLOAD_BYTES..][..6], end[OFFLOAD_BYTES + 6..][..6]);
            assert_eq!(answer[OFFLOAD_BYTES + 6..][..6], [2; 6]);
            // The answer is a sound frame of the same flow, the other way.
            assert_eq!(
                check(&answer, Direction::Egress).unwrap(),
                check(&end, INGRESS).unwrap()
            );
            assert_eq!(answer[tcp + 4..tcp + 8], 7_u32.to_be_bytes());
            assert_eq!(answer[tcp + 8..tcp + 12], payload.to_be_bytes());
            assert_eq!(answer[tcp + 13], TCP_ACK);
            // Sums over what has a right checksum in it are zero.
            let addresses = if (from, to) == V4 { 36..44 } else { 32..64 };
            let pseudo = [0, 6, 0, 20];
            assert_eq!(checksum(&[&answer[addresses], &pseudo, &answer[tcp..]]), 0);
            if (from, to) == V4 {
                assert_eq!(checksum(&[&answer[24..44]]), 0);
            }
        }
    }

    #[test]
    fn only_an_end_is_acknowledged() {
        assert_eq!(acknowledge_end(&frame(&made(V4)), [2; 6]), None);
        let reset = Made::tcp(V4.0, V4.1, TCP_FIN | TCP_RST).with_lengths();
        assert_eq!(acknowledge_end(&frame(&reset), [2; 6]), None);
        let end = frame(&Made::tcp(V4.0, V4.1, TCP_FIN).with_lengths());
        for cut in 0..end.len() {
            let _ = acknowledge_end(&end[..cut], [2; 6]);
        }
    }

    #[test]
    fn sound_frames_of_all_kinds_are_taken() {
        for addresses in [V4, V6] {
            let frames = [
                frame(&made(addresses)),
                frame(&made(addresses).with_vlan_tags(1)),
                frame(&made(addresses).with_vlan_tags(2)),
                merged(addresses),
                // Short frames are padded on the wire.
                [frame(&made(addresses)), vec![0; 6]].concat(),
            ];
            for frame in frames {
                let key = check(&frame, INGRESS).unwrap();
                assert_eq!(key.local_port_be, 7000_u16.to_be_bytes());
                assert_eq!(segment_of(&frame, INGRESS).map(|(key, _)| key), Some(key));
                let reversed = check(&frame, Direction::Egress).unwrap();
                assert_eq!(reversed.remote_port_be, 7000_u16.to_be_bytes());
            }
        }
        let behind = Made::tcp(V6.0, V6.1, ACK)
            .with_ipv6_extensions(&[0, 60, 51])
            .with_lengths();
        check(&frame(&behind), INGRESS).unwrap();
        let options = Made::tcp(V4.0, V4.1, ACK)
            .with_ipv4_options(40)
            .with_lengths();
        check(&frame(&options), INGRESS).unwrap();
    }

    #[test]
    fn contradictions_are_refused() {
        use FrameError::{Header, Length, NoTcp, Offload};
        type Change = (Range<usize>, &'static [u8], FrameError);
        let offload = |field, value| Offload { field, value };
        let changes: [Change; 15] = [
            (0..1, &[4], offload("flags", 4)),
            (1..2, &[3], offload("gso_type", 3)),
            (1..2, &[4], offload("gso_type", 4)),
            (1..2, &[0x80], offload("gso_type", 0x80)),
            (2..4, &[55, 0], offload("hdr_len", 55)),
            (4..6, &[0, 0], offload("gso_size", 0)),
            (4..6, &[7, 0], offload("gso_size", 7)),
            (4..6, &[0xff, 0xff], offload("gso_size", 0xffff)),
            (6..8, &[33, 0], offload("csum_start", 33)),
            (6..8, &[0xff, 0xff], offload("csum_start", 0xffff)),
            (8..10, &[6, 0], offload("csum_offset", 6)),
            (22..24, &[0x08, 0x06], NoTcp { ethertype: 0x0806 }),
            // The packet's length, then that of the TCP header.
            (26..28, &[0, 41], Header { header: "IP" }),
            (56..57, &[0x60], Header { header: "TCP" }),
            (56..57, &[0x40], Header { header: "TCP" }),
        ];
        for (range, bytes, expected) in changes {
            let mut frame = merged(V4);
            frame[range.clone()].copy_from_slice(bytes);
            assert_eq!(check(&frame, INGRESS), Err(expected), "{range:?}");
        }
        let mut fragment = merged(V4);
        fragment[30] = 0x20;
        assert_eq!(check(&fragment, INGRESS), Err(offload("flags", 1)));
        fragment[..2].fill(0);
        check(&fragment, INGRESS).unwrap();

        let whole = merged(V4);
        for length in 0..whole.len() {
            assert!(check(&whole[..length], INGRESS).is_err(), "{length}");
        }
        let endless = vec![0; FRAME_BYTES_MAX + 1];
        let bytes = endless.len();
        assert_eq!(check(&endless, INGRESS), Err(Length { bytes }));
    }

    proptest! {
        /// Whatever is taken keeps the promises that the kernel relies on.
        #[test]
        fn what_is_taken_is_within_bounds(
            is_v4: bool,
            changes in proptest::collection::vec((0..64_usize, any::<u8>()), 0..4),
            cut in 0..20_usize,
        ) {
            let mut frame = merged(if is_v4 { V4 } else { V6 });
            for (position, byte) in changes {
                frame[position] = byte;
            }
            frame.truncate(frame.len() - cut / 10);
            if check(&frame, INGRESS).is_ok() {
                let packet_bytes = frame.len() - OFFLOAD_BYTES;
                let word = |at: usize| usize::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
                prop_assert!(word(2) <= packet_bytes);
                if frame[0] & NEEDS_CHECKSUM != 0 {
                    prop_assert!(word(6) + word(8) + 2 <= packet_bytes);
                }
                if frame[1] != GSO_NONE {
                    prop_assert!(word(4) >= 8);
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            ethertype in proptest::sample::select(vec![0x0800_u16, 0x86DD, 0x8100, 0x88A8]),
        ) {
            let mut bytes = bytes;
            if bytes.len() > 24 {
                bytes[22..24].copy_from_slice(&ethertype.to_be_bytes());
            }
            let _ = check(&bytes, INGRESS);
            let _ = segment_of(&bytes, Direction::Egress);
            set_destination(&mut bytes, [2; 6]);
        }
    }
}
