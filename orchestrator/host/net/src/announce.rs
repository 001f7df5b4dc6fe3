//! Telling the network where an address is now.
//!
//! IPv4: a gratuitous ARP request and reply, because some peers update on the
//! one and some on the other (RFC 5227, section 3; RFC 5944, section 4.6).
//! IPv6: an unsolicited Neighbor Advertisement with the override flag (RFC
//! 4861, section 7.2.6). Without it a peer keeps the old neighbour for longer
//! than a connection lives.
//!
//! The frames leave through a packet socket that bypasses queueing discipline
//! and traffic control (`PACKET_QDISC_BYPASS`): a gate that is still closed on
//! egress lets exactly these pass, and nothing else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, send, socket,
};

use crate::error::NetError;
use crate::route::Placement;

/// When the announcement is repeated, in milliseconds after the first one:
/// one frame may get lost.
pub const FOLLOW_UPS_MS: [u64; 2] = [50, 200];

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Ethernet's address for ff02::1, all nodes (RFC 2464, section 7).
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;
/// Neighbor Advertisement, RFC 4861 section 4.4.
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const NA_ROUTER: u8 = 0x80;
const NA_OVERRIDE: u8 = 0x20;

/// The Ethernet frames that announce `ip` at `mac`.
///
/// `router` says that the host forwards IPv6: a Neighbor Advertisement that
/// did not say so would make peers drop it as a router.
#[must_use]
pub fn announcement_frames(ip: IpAddr, mac: [u8; 6], router: bool) -> Vec<Vec<u8>> {
    match ip {
        IpAddr::V4(ip) => [1, 2].map(|op| arp(ip, mac, op)).to_vec(),
        IpAddr::V6(ip) => vec![neighbor_advertisement(ip, mac, router)],
    }
}

/// `operation` 1 is a request, 2 a reply.
fn arp(ip: Ipv4Addr, mac: [u8; 6], operation: u8) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETHERTYPE_ARP);
    // Ethernet, IPv4, lengths of both addresses.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(if operation == 1 { &[0; 6] } else { &BROADCAST });
    frame.extend_from_slice(&ip.octets());
    frame
}

fn neighbor_advertisement(ip: Ipv6Addr, mac: [u8; 6], router: bool) -> Vec<u8> {
    let flags = NA_OVERRIDE | if router { NA_ROUTER } else { 0 };
    let mut icmp = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    icmp.extend_from_slice(&ip.octets());
    // Option 2, target link-layer address, one unit of eight bytes.
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let checksum = icmpv6_checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = Vec::with_capacity(86);
    frame.extend_from_slice(&ALL_NODES_MAC);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETHERTYPE_IPV6);
    // Version 6, payload of 32 bytes, ICMPv6, hop limit 255 as receivers demand.
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&ALL_NODES.octets());
    frame.extend_from_slice(&icmp);
    frame
}

/// RFC 1071 over the pseudo header (RFC 8200, section 8.1) and the message.
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut sum = u64::from(ICMPV6) + message.len() as u64;
    for bytes in [&source.octets()[..], &destination.octets()[..], message] {
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// Sends the announcement of every placement once.
///
/// An interface without Ethernet addresses has nobody to tell and is skipped.
///
/// # Errors
///
/// One of them could not be sent; all others were.
pub fn announce(placements: &[Placement]) -> Result<(), NetError> {
    let mut first_failure = None;
    for placement in placements {
        let Some(mac) = placement.mac else {
            tracing::debug!(ip = %placement.ip, interface = placement.interface, "no link-layer address to announce");
            continue;
        };
        if let Err(source) = announce_one(placement, mac) {
            // The others are announced all the same.
            first_failure.get_or_insert(NetError::Announce {
                ip: placement.ip,
                interface: placement.interface.clone(),
                source,
            });
        }
    }
    first_failure.map_or(Ok(()), Err)
}

fn announce_one(placement: &Placement, mac: [u8; 6]) -> io::Result<()> {
    let router = placement.ip.is_ipv6() && forwards_ipv6(&placement.interface);
    let socket = packet_socket(placement.ifindex)?;
    for frame in announcement_frames(placement.ip, mac, router) {
        let sent = send(socket.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT)?;
        if sent != frame.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    close_elsewhere(socket);
    Ok(())
}

/// Closes a packet socket on a thread of its own: the kernel waits there until
/// no CPU can be receiving for it any more (`synchronize_net` in
/// `packet_release`), 9 to 16 ms measured, in which peers would wait, too.
fn close_elsewhere(socket: OwnedFd) {
    let closing = std::thread::Builder::new().name("announced".to_owned());
    // Where there is no thread to be had it is closed here.
    let _ = closing.spawn(move || drop(socket));
}

/// A packet socket that sends on one interface and receives nothing.
fn packet_socket(ifindex: u32) -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let index = i32::try_from(ifindex).map_err(io::Error::other)?;
    bind(fd.as_raw_fd(), &link_address(index, 0)?)?;
    bypass_qdisc(&fd)?;
    Ok(fd)
}

/// `PACKET_QDISC_BYPASS`, since Linux 3.14.
fn bypass_qdisc(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes, which is the size of `on`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const on).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `protocol` in network byte order; zero receives nothing.
pub(crate) fn link_address(ifindex: i32, protocol: u16) -> io::Result<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: protocol,
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&raw)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a complete `sockaddr_ll` whose family says so,
    // and it is read before `raw` goes out of scope.
    unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(length)) }
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn forwards_ipv6(interface: &str) -> bool {
    std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/forwarding"))
        .is_ok_and(|text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn arp_frames_say_the_same_address_twice() {
        let frames = announcement_frames("10.77.0.100".parse().unwrap(), MAC, false);
        assert_eq!(frames.len(), 2);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            assert_eq!(frame.len(), 42);
            assert_eq!(frame[..6], BROADCAST);
            assert_eq!(frame[6..12], MAC);
            assert_eq!(frame[20..22], [0, operation]);
            assert_eq!(frame[22..28], MAC, "sender");
            assert_eq!(frame[28..32], [10, 77, 0, 100]);
            assert_eq!(frame[38..42], [10, 77, 0, 100]);
        }
    }

    #[test]
    fn checksum_of_a_known_message() {
        // RFC 1071's own property: a message with its checksum in place sums to zero.
        let source = "fe80::1".parse().unwrap();
        let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0, 1, 2, 3];
        let sum = icmpv6_checksum(source, ALL_NODES, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(icmpv6_checksum(source, ALL_NODES, &message), 0);
    }

    proptest! {
        #[test]
        fn every_advertisement_is_valid(ip: [u8; 16], mac: [u8; 6], router: bool) {
            let ip = Ipv6Addr::from(ip);
            let frame = &announcement_frames(ip.into(), mac, router)[0];
            prop_assert_eq!(frame.len(), 86);
            prop_assert_eq!(icmpv6_checksum(ip, ALL_NODES, &frame[54..]), 0);
            prop_assert_eq!(frame[21], 255, "hop limit");
            prop_assert_eq!(frame[58] & NA_ROUTER != 0, router);
            prop_assert_eq!(frame[58] & NA_OVERRIDE, NA_OVERRIDE);
            prop_assert_eq!(&frame[80..86], &mac);
        }
    }
}
