//! A bounded reader of packets: VLAN tags, ARP, IPv4, IPv6, TCP, neighbour
//! discovery. It never panics, never loops longer than its constants say, and
//! reads through [`Packet`], so the kernel and the tests run the same code.

use crate::key::{FlowKey, mapped};

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
}

impl Packet for [u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
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
    tcp(
        packet,
        offset + header_bytes,
        source,
        destination,
        direction,
    )
}

#[inline(always)]
fn ipv6<P: Packet + ?Sized>(packet: &P, offset: usize, direction: Direction) -> Parsed {
    let Some([first, _, _, _, _, _, next, _]) = packet.load::<8>(offset) else {
        return Parsed::Other;
    };
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
            PROTOCOL_TCP => return tcp(packet, offset, source, destination, direction),
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
    direction: Direction,
) -> Parsed {
    let (ports, flags) = match packet.load::<14>(offset) {
        Some([a, b, c, d, .., flags]) => ([a, b, c, d], flags),
        // A first fragment may end behind the ports.
        None => match packet.load::<4>(offset) {
            Some(ports) => (ports, 0),
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
    Parsed::Tcp { key, flags }
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
