//! Hand-made frames.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88A8;
const IPV6: u16 = 0x86DD;

/// A frame in the making: what stands behind the Ethernet addresses.
pub(crate) struct Packet {
    ethertypes: Vec<u16>,
    network: Vec<u8>,
    payload: Vec<u8>,
}

impl Packet {
    pub(crate) fn tcp(from: &str, to: &str, flags: u8) -> Self {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut segment = Vec::new();
        segment.extend(from.port().to_be_bytes());
        segment.extend(to.port().to_be_bytes());
        segment.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        Self::ip(from.ip(), to.ip(), 6, segment)
    }

    fn ip(from: IpAddr, to: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        let (ethertype, network) = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
                header.extend(from.octets());
                header.extend(to.octets());
                (IPV4, header)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 255];
                header.extend(from.octets());
                header.extend(to.octets());
                (IPV6, header)
            }
            _ => panic!("one packet has one family"),
        };
        Self {
            ethertypes: vec![ethertype],
            network,
            payload,
        }
    }

    pub(crate) fn arp(operation: u8, sender: &str, target: &str) -> Self {
        let mut network = vec![0, 1, 8, 0, 6, 4, 0, operation];
        network.extend([2, 0, 0, 0, 0, 1]);
        network.extend(sender.parse::<Ipv4Addr>().unwrap().octets());
        network.extend([0; 6]);
        network.extend(target.parse::<Ipv4Addr>().unwrap().octets());
        Self {
            ethertypes: vec![ARP],
            network,
            payload: Vec::new(),
        }
    }

    pub(crate) fn neighbour_discovery(kind: u8, from: &str, to: &str, target: &str) -> Self {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.parse::<Ipv6Addr>().unwrap().octets());
        Self::ip(from.parse().unwrap(), to.parse().unwrap(), 58, message)
    }

    pub(crate) fn with_vlan_tags(mut self, tags: usize) -> Self {
        for tag in 0..tags {
            self.ethertypes
                .insert(0, if tag == 0 { VLAN } else { QINQ });
        }
        self
    }

    pub(crate) fn with_ipv4_options(mut self, bytes: u8) -> Self {
        self.network[0] += bytes / 4;
        self.network.extend(vec![1; bytes.into()]);
        self
    }

    pub(crate) fn with_data(mut self, bytes: usize) -> Self {
        self.payload.extend(vec![0; bytes]);
        self
    }

    /// With the length that an IP header states, which the kernel's own tests
    /// of packets do not look at.
    pub(crate) fn with_lengths(mut self) -> Self {
        let payload = u16::try_from(self.payload.len()).unwrap();
        if self.network[0] >> 4 == 4 {
            let header = u16::try_from(self.network.len()).unwrap();
            self.network[2..4].copy_from_slice(&(header + payload).to_be_bytes());
        } else {
            let extensions = u16::try_from(self.network.len()).unwrap() - 40;
            self.network[4..6].copy_from_slice(&(extensions + payload).to_be_bytes());
        }
        self
    }

    /// In units of 8 bytes.
    pub(crate) fn with_fragment_offset(mut self, offset: u16) -> Self {
        let more = 0x2000;
        self.network[6..8].copy_from_slice(&(offset | more).to_be_bytes());
        self
    }

    /// Puts headers of the given kinds in front of the payload.
    pub(crate) fn with_ipv6_extensions(mut self, kinds: &[u8]) -> Self {
        let last = std::mem::replace(&mut self.network[6], kinds[0]);
        let following = kinds[1..].iter().chain([&last]);
        for (kind, next) in kinds.iter().zip(following) {
            // One unit beyond the shortest: 16 bytes, in the header's own way
            // of counting.
            let length = if *kind == 51 { 2 } else { 1 };
            self.network.extend([*next, length]);
            self.network.extend([0; 14]);
        }
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for (position, ethertype) in self.ethertypes.iter().enumerate() {
            if position > 0 {
                bytes.extend([0, 7]);
            }
            bytes.extend(ethertype.to_be_bytes());
        }
        bytes.extend(&self.network);
        bytes.extend(&self.payload);
        bytes
    }
}
