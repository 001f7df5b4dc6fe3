//! Entries as netlink attributes (linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use migrate_core::tracked::{Tracked, Way};
use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NlasIterator};

use crate::{FAMILY_BYTES, family_head};

/// `enum ctattr_type`.
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const NAT_SOURCE: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const NAT_DESTINATION: u16 = 13;
const ZONE: u16 = 18;
/// `enum ctattr_tuple`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
/// `enum ctattr_ip`.
const V4_FROM: u16 = 1;
const V4_TO: u16 = 2;
const V6_FROM: u16 = 3;
const V6_TO: u16 = 4;
/// `enum ctattr_l4proto`.
const PROTOCOL_NUMBER: u16 = 1;
const PORT_FROM: u16 = 2;
const PORT_TO: u16 = 3;
/// `enum ctattr_protoinfo` and `ctattr_protoinfo_tcp`.
const INFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_SCALES: [u16; 2] = [2, 3];
const TCP_FLAGS: [u16; 2] = [4, 5];
/// `enum ctattr_nat` and `ctattr_protonat`.
const NAT_V4: [u16; 2] = [1, 2];
const NAT_PROTOCOL: u16 = 3;
const NAT_V6: [u16; 2] = [4, 5];
const NAT_PORTS: [u16; 2] = [1, 2];

const PROTOCOL_TCP: u8 = 6;
/// `IPS_EXPECTED` and `IPS_DYING`: of the entry's own host only.
const STATUS_LOCAL: u32 = 1 | 1 << 9;
/// `IPS_CONFIRMED`.
const STATUS_CONFIRMED: u32 = 1 << 3;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`: windows are not checked.
const FLAG_LIBERAL: u8 = 0x08;

/// The entry in the body of a reply; `None` for what is not TCP.
pub(crate) fn parse(body: &[u8]) -> Option<Tracked> {
    let attributes = body.get(FAMILY_BYTES..)?;
    let word = |kind| {
        let value = value(attributes, kind)?;
        Some(u32::from_be_bytes(value.try_into().ok()?))
    };
    let info = value(attributes, PROTOCOL_INFO);
    let tcp = info.and_then(|info| value(&info, INFO_TCP));
    let of_tcp = |kind| {
        let value = value(tcp.as_deref()?, kind)?;
        value.first().copied()
    };
    Some(Tracked {
        original: way(&value(attributes, TUPLE_ORIGINAL)?)?,
        reply: way(&value(attributes, TUPLE_REPLY)?)?,
        tcp_state: of_tcp(TCP_STATE)?,
        window_scales: TCP_SCALES.map(|kind| of_tcp(kind).unwrap_or(0)),
        tcp_flags: TCP_FLAGS.map(|kind| of_tcp(kind).unwrap_or(0)),
        status: word(STATUS).unwrap_or(0),
        timeout_s: word(TIMEOUT).unwrap_or(0),
        mark: word(MARK).unwrap_or(0),
        zone: value(attributes, ZONE)
            .and_then(|zone| Some(u16::from_be_bytes(zone.try_into().ok()?)))
            .unwrap_or(0),
    })
}

/// The value of the first attribute of a kind.
fn value(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == kind)
        .map(|attribute| attribute.value().to_vec())
}

fn way(tuple: &[u8]) -> Option<Way> {
    let ip = value(tuple, TUPLE_IP)?;
    let protocol = value(tuple, TUPLE_PROTOCOL)?;
    if value(&protocol, PROTOCOL_NUMBER)? != [PROTOCOL_TCP] {
        return None;
    }
    let port = |kind| {
        let port = value(&protocol, kind)?;
        Some(u16::from_be_bytes(port.try_into().ok()?))
    };
    let address = |v4, v6| -> Option<IpAddr> {
        if let Some(octets) = value(&ip, v4) {
            let octets: [u8; 4] = octets.try_into().ok()?;
            return Some(Ipv4Addr::from(octets).into());
        }
        let octets: [u8; 16] = value(&ip, v6)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    Some(Way {
        from: SocketAddr::new(address(V4_FROM, V6_FROM)?, port(PORT_FROM)?),
        to: SocketAddr::new(address(V4_TO, V6_TO)?, port(PORT_TO)?),
    })
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, emitted(inner))
}

fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut out = vec![0; attributes.buffer_len()];
    attributes.emit(&mut out);
    out
}

fn tuple(kind: u16, way: Way) -> DefaultNla {
    let address = |ip: IpAddr, v4, v6| match ip {
        IpAddr::V4(ip) => DefaultNla::new(v4, ip.octets().to_vec()),
        IpAddr::V6(ip) => DefaultNla::new(v6, ip.octets().to_vec()),
    };
    let port = |kind, port: u16| DefaultNla::new(kind, port.to_be_bytes().to_vec());
    let ip = [
        address(way.from.ip(), V4_FROM, V6_FROM),
        address(way.to.ip(), V4_TO, V6_TO),
    ];
    let protocol = [
        DefaultNla::new(PROTOCOL_NUMBER, vec![PROTOCOL_TCP]),
        port(PORT_FROM, way.from.port()),
        port(PORT_TO, way.to.port()),
    ];
    nested(
        kind,
        &[nested(TUPLE_IP, &ip), nested(TUPLE_PROTOCOL, &protocol)],
    )
}

/// A translation to exactly this address and port.
fn translation(kind: u16, to: SocketAddr) -> DefaultNla {
    let (kinds, octets) = match to.ip() {
        IpAddr::V4(ip) => (NAT_V4, ip.octets().to_vec()),
        IpAddr::V6(ip) => (NAT_V6, ip.octets().to_vec()),
    };
    let ports = NAT_PORTS.map(|kind| DefaultNla::new(kind, to.port().to_be_bytes().to_vec()));
    nested(
        kind,
        &[
            DefaultNla::new(kinds[0], octets.clone()),
            DefaultNla::new(kinds[1], octets),
            nested(NAT_PROTOCOL, &ports),
        ],
    )
}

fn head(entry: &Tracked) -> Vec<u8> {
    family_head(if entry.original.from.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    })
}

fn zone(entry: &Tracked) -> Option<DefaultNla> {
    (entry.zone != 0).then(|| DefaultNla::new(ZONE, entry.zone.to_be_bytes().to_vec()))
}

/// What names an entry.
pub(crate) fn original(entry: &Tracked) -> Vec<u8> {
    let mut attributes = vec![tuple(TUPLE_ORIGINAL, entry.original)];
    attributes.extend(zone(entry));
    [head(entry), emitted(&attributes)].concat()
}

/// Everything that makes an entry.
pub(crate) fn whole(entry: &Tracked) -> Vec<u8> {
    let word = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let flags = |flags: u8| {
        let flags = flags | FLAG_LIBERAL;
        // The flags and which of them are meant.
        vec![flags, flags]
    };
    let tcp = [
        DefaultNla::new(TCP_STATE, vec![entry.tcp_state]),
        DefaultNla::new(TCP_SCALES[0], vec![entry.window_scales[0]]),
        DefaultNla::new(TCP_SCALES[1], vec![entry.window_scales[1]]),
        DefaultNla::new(TCP_FLAGS[0], flags(entry.tcp_flags[0])),
        DefaultNla::new(TCP_FLAGS[1], flags(entry.tcp_flags[1])),
    ];
    let mut attributes = vec![
        tuple(TUPLE_ORIGINAL, entry.original),
        // The kernel makes the translated one from this and what follows.
        tuple(TUPLE_REPLY, entry.original.reversed()),
        word(STATUS, entry.status & !STATUS_LOCAL | STATUS_CONFIRMED),
        nested(PROTOCOL_INFO, &[nested(INFO_TCP, &tcp)]),
        word(TIMEOUT, entry.timeout_s),
    ];
    if entry.reply.to != entry.original.from {
        attributes.push(translation(NAT_SOURCE, entry.reply.to));
    }
    if entry.reply.from != entry.original.to {
        attributes.push(translation(NAT_DESTINATION, entry.reply.from));
    }
    if entry.mark != 0 {
        attributes.push(word(MARK, entry.mark));
    }
    attributes.extend(zone(entry));
    [head(entry), emitted(&attributes)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Tracked {
        let way = |from: &str, to: &str| Way {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        Tracked {
            original: way("10.0.0.1:4000", "10.0.0.9:80"),
            reply: way("10.0.0.9:7000", "10.0.0.1:4000"),
            tcp_state: 3,
            window_scales: [7, 9],
            tcp_flags: [0x23, 0x23],
            status: 0x18e,
            timeout_s: 100,
            mark: 5,
            zone: 2,
        }
    }

    #[test]
    fn what_is_asked_for_is_read_back() {
        let parsed = parse(&whole(&entry())).unwrap();
        let asked = Tracked {
            reply: entry().original.reversed(),
            tcp_flags: [0x2b, 0x2b],
            ..entry()
        };
        assert_eq!(parsed, asked);
    }

    #[test]
    fn a_reply_cut_anywhere_is_no_entry_or_a_part_of_it() {
        let whole = whole(&entry());
        for cut in 0..whole.len() {
            let _ = parse(&whole[..cut]);
        }
    }
}
