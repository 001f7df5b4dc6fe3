//! A bounded reader of packets: VLAN tags, ARP, IPv4, IPv6, TCP, neighbour
//! discovery. It never panics, never loops longer than its constants say, and
//! reads through [`Packet`], so the kernel and the tests run the same code.

use crate::key::{FlowKey, mapped, mapped_words};

/// VLAN tags read inside the packet. A tag that the device has taken out is
/// not among them; two are QinQ.
const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers read. RFC 8200 names six kinds that a sender may
/// use before TCP, one of them (destination options) twice.
const MAX_EXTENSION_HEADERS: usize = 7;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_IPV6: u16 = 0x86DD;
const ETHERTYPE_QINQ: u16 = 0x88A8;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_ROUTING: u8 = 43;
const PROTOCOL_FRAGMENT: u8 = 44;
const PROTOCOL_AUTHENTICATION: u8 = 51;
const PROTOCOL_ICMPV6: u8 = 58;
const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;

/// Neighbour discovery: router and neighbour solicitation and advertisement,
/// redirect (RFC 4861, section 4).
const ND_FIRST: u8 = 133;
const ND_NEIGHBOUR_SOLICITATION: u8 = 135;
const ND_NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ND_LAST: u8 = 137;

const ARP_REQUEST: u16 = 1;

/// The RST bit of a TCP header's flags.
pub const TCP_RST: u8 = 0x04;
/// The FIN bit.
pub const TCP_FIN: u8 = 0x01;
/// The SYN bit.
pub const TCP_SYN: u8 = 0x02;
/// The ACK bit.
pub const TCP_ACK: u8 = 0x10;

/// Whether a segment with these flags opens a connection.
#[inline(always)]
#[must_use]
pub const fn is_opening(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

/// Which way a packet goes, seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the network to the host.
    Ingress,
    /// From the host to the network.
    Egress,
}

/// What stands in front of the network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer2 {
    /// An Ethernet header of 14 bytes.
    Ethernet,
    /// Nothing: tunnels and TUN devices.
    None,
}

impl Layer2 {
    #[inline(always)]
    const fn header_bytes(self) -> usize {
        match self {
            Self::Ethernet => 14,
            Self::None => 0,
        }
    }
}

/// Where the bytes come from.
pub trait Packet {
    /// `N` bytes at `offset` from the packet's start, `None` past its end.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// `4 * N` bytes at `offset`, in words as they would lie in memory.
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]>;
}

impl Packet for [u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }

    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let (chunks, _) = self.get(offset..)?.as_chunks::<4>();
        chunks
            .first_chunk::<N>()
            .map(|words| words.map(u32::from_ne_bytes))
    }
}

/// What a packet turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Nothing that the gate has a say in, also all that is too short: the
    /// kernel's own stack discards it. A fragment behind the first one is
    /// here too: it has no ports, and without its first fragment, which is
    /// matched, it is never put together.
    Other,
    /// IPv6 with more extension headers than the bound: it may be ours.
    Unreadable,
    /// A TCP segment, or the first fragment of one.
    Tcp {
        /// Its connection.
        key: FlowKey,
        /// The flag byte of its header, 0 when the segment ends before it.
        flags: u8,
        /// The number of its first byte; 0 when the segment ends before it.
        sequence: u32,
        /// What it carries, all segments of a merged packet together; 0 where
        /// the headers contradict each other.
        payload_bytes: u32,
    },
    /// ARP or neighbour discovery.
    Neighbour {
        /// The address that the sender speaks for, zeros for none.
        sender: [u8; 16],
        /// The address that the packet is about.
        target: [u8; 16],
        /// Whether a host that owns `target` would answer or mind: an ARP
        /// request, a neighbour solicitation or advertisement.
        concerns_target: bool,
    },
}

/// Reads one packet. `ethertype` is the protocol that the link layer has
/// found (`skb->protocol`), which is the VLAN tag's when one stands there.
#[inline(always)]
pub fn parse<P: Packet + ?Sized>(
    packet: &P,
    layer2: Layer2,
    ethertype: u16,
    direction: Direction,
) -> Parsed {
    let mut ethertype = ethertype;
    let mut offset = layer2.header_bytes();
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        let Some([_, _, high, low]) = packet.load::<4>(offset) else {
            return Parsed::Other;
        };
        ethertype = u16::from_be_bytes([high, low]);
        offset += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet, offset, direction),
        ETHERTYPE_IPV6 => ipv6(packet, offset, direction),
        ETHERTYPE_ARP => arp(packet, offset),
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn ipv4<P: Packet + ?Sized>(packet: &P, offset: usize, direction: Direction) -> Parsed {
    // Nearly every packet: no options, and a TCP header behind it. One read.
    if let Some(words) = packet.words::<9>(offset) {
        let [version, _, high, low] = words[0].to_ne_bytes();
        let [_, _, fragment_high, fragment_low] = words[1].to_ne_bytes();
        let [_, protocol, _, _] = words[2].to_ne_bytes();
        let fragment_offset = u16::from_be_bytes([fragment_high, fragment_low]) & 0x1fff;
        if version == 0x45 && protocol == PROTOCOL_TCP && fragment_offset == 0 {
            let total_bytes = u32::from(u16::from_be_bytes([high, low]));
            return segment(
                mapped_words(words[3]),
                mapped_words(words[4]),
                [words[5], words[6], words[8]],
                total_bytes.wrapping_sub(20),
                direction,
            );
        }
        if version == 0x45 {
            return Parsed::Other;
        }
    }
    let Some(header) = packet.load::<20>(offset) else {
        return Parsed::Other;
    };
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    let fragment_offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    if header[0] >> 4 != 4 || header_bytes < 20 || header[9] != PROTOCOL_TCP || fragment_offset != 0
    {
        return Parsed::Other;
    }
    let source = mapped([header[12], header[13], header[14], header[15]]);
    let destination = mapped([header[16], header[17], header[18], header[19]]);
    let total_bytes = u32::from(u16::from_be_bytes([header[2], header[3]]));
    tcp(
        packet,
        offset + header_bytes,
        source,
        destination,
        total_bytes.wrapping_sub(u32::from(header[0] & 0x0f) * 4),
        direction,
    )
}

#[inline(always)]
fn ipv6<P: Packet + ?Sized>(packet: &P, offset: usize, direction: Direction) -> Parsed {
    // Nearly every packet of this kind that is TCP. One read.
    if let Some(words) = packet.words::<14>(offset) {
        let [first, ..] = words[0].to_ne_bytes();
        let [high, low, next, _] = words[1].to_ne_bytes();
        if first >> 4 == 6 && next == PROTOCOL_TCP {
            return segment(
                [words[2], words[3], words[4], words[5]],
                [words[6], words[7], words[8], words[9]],
                [words[10], words[11], words[13]],
                u32::from(u16::from_be_bytes([high, low])),
                direction,
            );
        }
    }
    let Some([first, _, _, _, high, low, next, _]) = packet.load::<8>(offset) else {
        return Parsed::Other;
    };
    let network = offset;
    let bytes = u32::from(u16::from_be_bytes([high, low]));
    let Some(source) = packet.load::<16>(offset + 8) else {
        return Parsed::Other;
    };
    let Some(destination) = packet.load::<16>(offset + 24) else {
        return Parsed::Other;
    };
    if first >> 4 != 6 {
        return Parsed::Other;
    }
    let mut next = next;
    let mut offset = offset + 40;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        match next {
            PROTOCOL_TCP => {
                // What the extension headers take is no part of the segment.
                let extensions = u32::try_from(offset - network - 40).unwrap_or(u32::MAX);
                let bytes = bytes.saturating_sub(extensions);
                return tcp(packet, offset, source, destination, bytes, direction);
            }
            PROTOCOL_ICMPV6 => return neighbour_discovery(packet, offset, source),
            PROTOCOL_HOP_BY_HOP
            | PROTOCOL_ROUTING
            | PROTOCOL_DESTINATION_OPTIONS
            | PROTOCOL_AUTHENTICATION
            | PROTOCOL_FRAGMENT => {}
            _ => return Parsed::Other,
        }
        let Some([following, length, high, low]) = packet.load::<4>(offset) else {
            return Parsed::Other;
        };
        let length = usize::from(length);
        offset += match next {
            PROTOCOL_AUTHENTICATION => (length + 2) * 4,
            PROTOCOL_FRAGMENT => {
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    return Parsed::Other;
                }
                8
            }
            _ => (length + 1) * 8,
        };
        next = following;
    }
    Parsed::Unreadable
}

#[inline(always)]
fn tcp<P: Packet + ?Sized>(
    packet: &P,
    offset: usize,
    source: [u8; 16],
    destination: [u8; 16],
    bytes: u32,
    direction: Direction,
) -> Parsed {
    let (ports, sequence, header, flags) = match packet.load::<14>(offset) {
        Some([a, b, c, d, e, f, g, h, .., header, flags]) => (
            [a, b, c, d],
            u32::from_be_bytes([e, f, g, h]),
            header,
            flags,
        ),
        // A first fragment may end behind the ports.
        None => match packet.load::<4>(offset) {
            Some(ports) => (ports, 0, 0xff, 0),
            None => return Parsed::Other,
        },
    };
    let source_port = [ports[0], ports[1]];
    let destination_port = [ports[2], ports[3]];
    let key = match direction {
        Direction::Ingress => FlowKey {
            local: destination,
            remote: source,
            local_port_be: destination_port,
            remote_port_be: source_port,
        },
        Direction::Egress => FlowKey {
            local: source,
            remote: destination,
            local_port_be: source_port,
            remote_port_be: destination_port,
        },
    };
    Parsed::Tcp {
        key,
        flags,
        sequence,
        payload_bytes: payload(bytes, header),
    }
}

/// A segment of `bytes` whose header has been read in words: the ports, the
/// sequence number, and the word with the flags.
#[inline(always)]
const fn segment(
    source: [u32; 4],
    destination: [u32; 4],
    [ports, sequence, offset_flags]: [u32; 3],
    bytes: u32,
    direction: Direction,
) -> Parsed {
    let [header, flags, _, _] = offset_flags.to_ne_bytes();
    let key = match direction {
        // Source and destination port change places.
        Direction::Ingress => FlowKey::of_words(destination, source, ports.rotate_left(16)),
        Direction::Egress => FlowKey::of_words(source, destination, ports),
    };
    Parsed::Tcp {
        key,
        flags,
        sequence: u32::from_be(sequence),
        payload_bytes: payload(bytes, header),
    }
}

/// What a segment of `bytes` carries behind its header, whose length stands in
/// the upper half of a byte in words of four bytes.
#[inline(always)]
const fn payload(bytes: u32, header: u8) -> u32 {
    let header_bytes = (header >> 4) as u32 * 4;
    // A length of 0 is that of a packet too long for the field.
    if bytes > 0xffff || bytes < header_bytes {
        0
    } else {
        bytes - header_bytes
    }
}

#[inline(always)]
fn arp<P: Packet + ?Sized>(packet: &P, offset: usize) -> Parsed {
    // Ethernet (1) and IPv4, with their address lengths: the only ARP that
    // Linux speaks on devices with an Ethernet header.
    let Some([0, 1, 0x08, 0x00, 6, 4, operation_high, operation_low]) = packet.load::<8>(offset)
    else {
        return Parsed::Other;
    };
    let Some(sender) = packet.load::<4>(offset + 14) else {
        return Parsed::Other;
    };
    let Some(target) = packet.load::<4>(offset + 24) else {
        return Parsed::Other;
    };
    Parsed::Neighbour {
        sender: mapped(sender),
        target: mapped(target),
        concerns_target: u16::from_be_bytes([operation_high, operation_low]) == ARP_REQUEST,
    }
}

#[inline(always)]
fn neighbour_discovery<P: Packet + ?Sized>(packet: &P, offset: usize, source: [u8; 16]) -> Parsed {
    let Some([kind]) = packet.load::<1>(offset) else {
        return Parsed::Other;
    };
    if !(ND_FIRST..=ND_LAST).contains(&kind) {
        return Parsed::Other;
    }
    let concerns_target = kind == ND_NEIGHBOUR_SOLICITATION || kind == ND_NEIGHBOUR_ADVERTISEMENT;
    let target = if concerns_target {
        match packet.load::<16>(offset + 8) {
            Some(target) => target,
            None => return Parsed::Other,
        }
    } else {
        [0; 16]
    };
    Parsed::Neighbour {
        sender: source,
        target,
        concerns_target,
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::key::is_mapped;

    const ETHERTYPES: [u16; 6] = [
        ETHERTYPE_IPV4,
        ETHERTYPE_ARP,
        ETHERTYPE_IPV6,
        ETHERTYPE_VLAN,
        ETHERTYPE_QINQ,
        0x88CC,
    ];

    fn ipv4_segment(source: [u8; 4], destination: [u8; 4], ports: [u16; 2], flags: u8) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, PROTOCOL_TCP, 0, 0];
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(tcp_header(ports, flags));
        bytes
    }

    fn ipv6_segment(
        source: [u8; 16],
        destination: [u8; 16],
        extensions: &[u8],
        ports: [u16; 2],
        flags: u8,
    ) -> Vec<u8> {
        let mut chain: Vec<u8> = extensions.to_vec();
        chain.push(PROTOCOL_TCP);
        let length = u8::try_from(20 + 8 * extensions.len()).unwrap();
        let mut bytes = vec![0x60, 0, 0, 0, 0, length, chain[0], 64];
        bytes.extend(source);
        bytes.extend(destination);
        for pair in chain.windows(2) {
            // Eight bytes each, in the header's own way of counting; a
            // fragment header whose offset is zero.
            bytes.extend([pair[1], 0, 0, 0, 0, 0, 0, 0]);
        }
        bytes.extend(tcp_header(ports, flags));
        bytes
    }

    fn tcp_header(ports: [u16; 2], flags: u8) -> Vec<u8> {
        let mut bytes: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        bytes.extend([1, 2, 3, 4, 0, 0, 0, 0, 0x50, flags]);
        bytes.extend([0; 6]);
        bytes
    }

    fn read(bytes: &[u8], ethertype: u16, direction: Direction) -> Parsed {
        parse(bytes, Layer2::None, ethertype, direction)
    }

    #[test]
    fn every_extension_header_up_to_the_bound_is_passed_over() {
        for kind in [
            PROTOCOL_HOP_BY_HOP,
            PROTOCOL_ROUTING,
            PROTOCOL_FRAGMENT,
            PROTOCOL_DESTINATION_OPTIONS,
        ] {
            for (count, is_read) in [
                (0, true),
                (1, true),
                (MAX_EXTENSION_HEADERS, true),
                (MAX_EXTENSION_HEADERS + 1, false),
            ] {
                let bytes = ipv6_segment([1; 16], [2; 16], &vec![kind; count], [1, 2], 0);
                let parsed = read(&bytes, ETHERTYPE_IPV6, Direction::Ingress);
                if is_read {
                    assert!(
                        matches!(parsed, Parsed::Tcp { .. }),
                        "{kind} x {count}: {parsed:?}"
                    );
                } else {
                    assert_eq!(parsed, Parsed::Unreadable, "{kind} x {count}");
                }
            }
        }
    }

    #[test]
    fn a_first_fragment_that_ends_behind_the_ports_is_read() {
        let bytes = ipv4_segment([10, 0, 0, 1], [10, 0, 0, 2], [1, 2], TCP_RST);
        let parsed = read(&bytes[..24], ETHERTYPE_IPV4, Direction::Ingress);
        assert!(matches!(parsed, Parsed::Tcp { flags: 0, .. }), "{parsed:?}");
        assert_eq!(
            read(&bytes[..23], ETHERTYPE_IPV4, Direction::Ingress),
            Parsed::Other
        );
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let mut bytes = ipv4_segment([10, 0, 0, 1], [10, 0, 0, 2], [1, 2], 0);
        bytes[7] = 1;
        assert_eq!(
            read(&bytes, ETHERTYPE_IPV4, Direction::Ingress),
            Parsed::Other
        );
        let mut bytes = ipv6_segment([1; 16], [2; 16], &[PROTOCOL_FRAGMENT], [1, 2], 0);
        bytes[43] = 8;
        assert_eq!(
            read(&bytes, ETHERTYPE_IPV6, Direction::Ingress),
            Parsed::Other
        );
    }

    #[test]
    fn a_third_tag_is_not_read() {
        let tag = |next: u16| [[0, 7], next.to_be_bytes()].concat();
        let segment = ipv4_segment([10, 0, 0, 1], [10, 0, 0, 2], [1, 2], 0);
        let two = [tag(ETHERTYPE_VLAN), tag(ETHERTYPE_IPV4), segment.clone()].concat();
        let three = [
            tag(ETHERTYPE_VLAN),
            tag(ETHERTYPE_VLAN),
            tag(ETHERTYPE_IPV4),
            segment,
        ]
        .concat();
        assert!(matches!(
            read(&two, ETHERTYPE_QINQ, Direction::Ingress),
            Parsed::Tcp { .. }
        ));
        assert_eq!(
            read(&three, ETHERTYPE_QINQ, Direction::Ingress),
            Parsed::Other
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            ethertype in prop_oneof![proptest::sample::select(&ETHERTYPES[..]), any::<u16>()],
            ethernet: bool,
            ingress: bool,
        ) {
            let layer2 = if ethernet { Layer2::Ethernet } else { Layer2::None };
            let direction = if ingress { Direction::Ingress } else { Direction::Egress };
            parse(&bytes[..], layer2, ethertype, direction);
        }

        /// Random bytes seldom get past the first checks: this keeps the
        /// header's start right and everything behind it random, cut anywhere.
        #[test]
        fn damaged_headers_are_read_without_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 40..200),
            cut in 0_usize..200,
            version in prop_oneof![Just(4_u8), Just(6_u8)],
            protocol in prop_oneof![
                Just(PROTOCOL_TCP), Just(PROTOCOL_ICMPV6), Just(PROTOCOL_HOP_BY_HOP),
                Just(PROTOCOL_FRAGMENT), Just(PROTOCOL_AUTHENTICATION), any::<u8>(),
            ],
        ) {
            bytes[0] = (version << 4) | (bytes[0] & 0x0f);
            let ethertype = if version == 4 {
                bytes[9] = protocol;
                ETHERTYPE_IPV4
            } else {
                bytes[6] = protocol;
                ETHERTYPE_IPV6
            };
            bytes.truncate(cut);
            read(&bytes, ethertype, Direction::Egress);
        }

        #[test]
        fn both_directions_of_an_ipv4_flow_have_one_key(
            local: [u8; 4], remote: [u8; 4], ports: [u16; 2], flags: u8,
        ) {
            let inbound = ipv4_segment(remote, local, [ports[1], ports[0]], flags);
            let outbound = ipv4_segment(local, remote, ports, flags);
            let parsed = read(&inbound, ETHERTYPE_IPV4, Direction::Ingress);
            prop_assert_eq!(parsed, read(&outbound, ETHERTYPE_IPV4, Direction::Egress));
            let key = FlowKey {
                local: mapped(local),
                remote: mapped(remote),
                local_port_be: ports[0].to_be_bytes(),
                remote_port_be: ports[1].to_be_bytes(),
            };
            prop_assert!(is_mapped(&key.local));
            prop_assert_eq!(
                parsed,
                Parsed::Tcp { key, flags, sequence: 0x0102_0304, payload_bytes: 0 }
            );
            // With options it is read another way, to the same end.
            let mut optioned = inbound;
            optioned[0] = 0x46;
            optioned[3] += 4;
            optioned.splice(20..20, [1; 4]);
            prop_assert_eq!(parsed, read(&optioned, ETHERTYPE_IPV4, Direction::Ingress));
        }

        #[test]
        fn both_directions_of_an_ipv6_flow_have_one_key(
            local: [u8; 16], remote: [u8; 16], ports: [u16; 2], flags: u8,
            extensions in proptest::collection::vec(
                proptest::sample::select(&[
                    PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, PROTOCOL_DESTINATION_OPTIONS,
                ][..]),
                0..=MAX_EXTENSION_HEADERS,
            ),
        ) {
            let inbound = ipv6_segment(remote, local, &extensions, [ports[1], ports[0]], flags);
            let outbound = ipv6_segment(local, remote, &extensions, ports, flags);
            let parsed = read(&inbound, ETHERTYPE_IPV6, Direction::Ingress);
            prop_assert_eq!(parsed, read(&outbound, ETHERTYPE_IPV6, Direction::Egress));
            prop_assert_eq!(parsed, Parsed::Tcp {
                key: FlowKey {
                    local,
                    remote,
                    local_port_be: ports[0].to_be_bytes(),
                    remote_port_be: ports[1].to_be_bytes(),
                },
                flags,
                sequence: 0x0102_0304,
                payload_bytes: 0,
            });
        }

        #[test]
        fn the_payload_is_what_the_headers_leave(
            payload in 0..60_000_u16, extensions in 0..3_usize, options in 0..2_u8,
        ) {
            let total = |header: u16| (header + payload).to_be_bytes();
            let mut bytes = ipv4_segment([1; 4], [2; 4], [1, 2], 0);
            bytes[2..4].copy_from_slice(&total(40));
            if options > 0 {
                bytes[0] = 0x46;
                bytes[2..4].copy_from_slice(&total(44));
                bytes.splice(20..20, [1; 4]);
            }
            let of = |parsed: Parsed| match parsed {
                Parsed::Tcp { payload_bytes, .. } => Some(payload_bytes),
                _ => None,
            };
            let read_v4 = of(read(&bytes, ETHERTYPE_IPV4, Direction::Egress));
            prop_assert_eq!(read_v4, Some(u32::from(payload)));
            let kinds = vec![PROTOCOL_DESTINATION_OPTIONS; extensions];
            let mut bytes = ipv6_segment([1; 16], [2; 16], &kinds, [1, 2], 0);
            let headers = 20 + u16::try_from(extensions).unwrap() * 8;
            bytes[4..6].copy_from_slice(&total(headers));
            let read_v6 = of(read(&bytes, ETHERTYPE_IPV6, Direction::Egress));
            prop_assert_eq!(read_v6, Some(u32::from(payload)));
        }
    }
}
