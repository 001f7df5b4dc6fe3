//! The rules, without the machine: whose an address is, where it fits, which
//! listeners collide.

use std::net::{IpAddr, SocketAddr};

use migrate_core::facts::AddressFacts;
use migrate_core::flow::canonical;

use crate::error::NetError;
use crate::route::{Address, Interface, Placement};

/// Whose an address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// The workload's: it may move.
    Workload,
    /// The host's own, with the reason; it moves only when asked for by name.
    Host(&'static str),
    /// It cannot move at all, with the reason.
    Fixed(&'static str),
}

/// Whether `prefix`/`prefix_len` contains `ip`.
#[must_use]
pub fn subnet_contains(prefix: IpAddr, prefix_len: u8, ip: IpAddr) -> bool {
    match (prefix, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let host_bits = 32u32.saturating_sub(prefix_len.into());
            let differ = a.to_bits() ^ b.to_bits();
            differ.checked_shr(host_bits).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let host_bits = 128u32.saturating_sub(prefix_len.into());
            let differ = a.to_bits() ^ b.to_bits();
            differ.checked_shr(host_bits).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// Whether an IPv6 address is valid on one link only.
#[must_use]
pub fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip.to_canonical(), IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// The address as this host has it; by preference on the interface named.
#[must_use]
pub fn find<'a>(addresses: &'a [Address], ip: IpAddr, interface: &str) -> Option<&'a Address> {
    let mut here = addresses.iter().filter(|a| a.ip == ip);
    let first = here.clone().next();
    here.find(|a| a.interface == interface).or(first)
}

/// Whose `address` is. `addresses` are all of the host's in the kernel's
/// order, `default_sources` those from which it speaks by default.
#[must_use]
pub fn owner(address: &Address, addresses: &[Address], default_sources: &[IpAddr]) -> Owner {
    if address.ip.is_loopback() {
        return Owner::Fixed("every host has it");
    }
    if is_link_local(address.ip) || !address.global {
        return Owner::Fixed("it is valid on this host's own link only");
    }
    if address.tentative {
        return Owner::Fixed("the kernel is still checking that nobody else has it");
    }
    if address.dynamic {
        return Owner::Host("it was given to this host by a router or a DHCP server");
    }
    let siblings = || {
        addresses
            .iter()
            .filter(|a| a.ifindex == address.ifindex && a.ip != address.ip && a.global)
    };
    let is_default = default_sources.contains(&address.ip);
    match address.ip {
        IpAddr::V4(_) => {
            if is_default {
                Owner::Host("this host uses it to reach the rest of the network")
            } else if address.secondary || address.prefix_len == 32 {
                Owner::Workload
            } else if addresses
                .iter()
                .take_while(|a| *a != address)
                .filter(|a| a.ifindex == address.ifindex && a.global && !a.secondary)
                .any(|a| subnet_contains(a.ip, a.prefix_len, address.ip))
            {
                // Primary only because its prefix length differs.
                Owner::Workload
            } else {
                Owner::Host("it is this host's own address in its subnet")
            }
        }
        IpAddr::V6(_) => {
            let stays_reachable = siblings().any(|a| {
                !a.dynamic
                    && a.ip.is_ipv6()
                    && (address.prefix_len == 128
                        || subnet_contains(a.ip, a.prefix_len, address.ip))
            });
            if stays_reachable || (address.prefix_len == 128 && !is_default) {
                Owner::Workload
            } else {
                Owner::Host("it is this host's only lasting address in its subnet")
            }
        }
    }
}

/// The secondaries that the kernel drops together with a primary IPv4 address
/// unless told to promote them.
#[must_use]
pub fn dependents(address: &Address, addresses: &[Address]) -> Vec<IpAddr> {
    if address.secondary || address.ip.is_ipv6() {
        return Vec::new();
    }
    addresses
        .iter()
        .filter(|a| {
            a.secondary
                && a.ifindex == address.ifindex
                && a.prefix_len == address.prefix_len
                && subnet_contains(address.ip, address.prefix_len, a.ip)
        })
        .map(|a| a.ip)
        .collect()
}

/// Which interface takes an address that comes from another host.
///
/// # Errors
///
/// The address is here already, or no interface that is up has an address in
/// its network.
pub fn place(
    address: &AddressFacts,
    interfaces: &[Interface],
    addresses: &[Address],
) -> Result<Placement, NetError> {
    let ip = address.ip;
    if let Some(here) = addresses.iter().find(|a| a.ip == ip) {
        return Err(NetError::AlreadyHere {
            ip,
            interface: here.interface.clone(),
        });
    }
    interfaces
        .iter()
        .filter(|i| i.up && !i.loopback)
        .filter_map(|interface| {
            let prefix_len = addresses
                .iter()
                .filter(|a| a.ifindex == interface.index && a.global)
                .filter(|a| subnet_contains(a.ip, a.prefix_len, ip))
                .map(|a| a.prefix_len)
                .max()?;
            Some((interface.name == address.interface, prefix_len, interface))
        })
        // Of equals the first: `max_by_key` would take the last.
        .rev()
        .max_by_key(|(same_name, prefix_len, _)| (*same_name, *prefix_len))
        .map(|(_, _, interface)| Placement {
            ip,
            prefix_len: address.prefix_len,
            ifindex: interface.index,
            interface: interface.name.clone(),
            mac: interface.mac.filter(|_| interface.arp),
        })
        .ok_or_else(|| NetError::NoInterface {
            ip,
            prefix_len: address.prefix_len,
            have: describe(ip, interfaces, addresses),
        })
}

/// `eth0 (10.0.0.2/24), eth1 (down)`, of the family of `ip`.
fn describe(ip: IpAddr, interfaces: &[Interface], addresses: &[Address]) -> String {
    let each: Vec<String> = interfaces
        .iter()
        .filter(|i| !i.loopback)
        .map(|i| {
            let own: Vec<String> = addresses
                .iter()
                .filter(|a| a.ifindex == i.index && a.global && a.ip.is_ipv4() == ip.is_ipv4())
                .map(|a| format!("{}/{}", a.ip, a.prefix_len))
                .collect();
            let state = if i.up { "" } else { " (down)" };
            if own.is_empty() {
                format!("{}{state} without an address", i.name)
            } else {
                format!("{}{state} with {}", i.name, own.join(" and "))
            }
        })
        .collect();
    if each.is_empty() {
        "none but the loopback interface".to_owned()
    } else {
        each.join(", ")
    }
}

/// Whether two TCP sockets cannot be bound at the same time when at least one
/// of them listens: the same port, and an address that both would serve.
#[must_use]
pub fn collide(a: SocketAddr, a_v6only: bool, b: SocketAddr, b_v6only: bool) -> bool {
    let (a, b) = (canonical(a), canonical(b));
    if a.port() != b.port() {
        return false;
    }
    match (a.ip(), b.ip()) {
        (IpAddr::V4(x), IpAddr::V4(y)) => x.is_unspecified() || y.is_unspecified() || x == y,
        (IpAddr::V6(x), IpAddr::V6(y)) => x.is_unspecified() || y.is_unspecified() || x == y,
        (IpAddr::V6(x), IpAddr::V4(_)) => x.is_unspecified() && !a_v6only,
        (IpAddr::V4(_), IpAddr::V6(y)) => y.is_unspecified() && !b_v6only,
    }
}

/// At most this many objects are named in one line; the rest is counted.
const NAMED_MAX: usize = 4;

/// `a, b, c and 12 more`.
pub(crate) fn join<T: ToString>(items: &[T]) -> String {
    let named: Vec<String> = items.iter().take(NAMED_MAX).map(T::to_string).collect();
    match items.len().saturating_sub(NAMED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addr(ip: &str, prefix_len: u8, ifindex: u32) -> Address {
        Address {
            ip: ip.parse().unwrap(),
            prefix_len,
            ifindex,
            interface: format!("eth{ifindex}"),
            secondary: false,
            global: true,
            dynamic: false,
            deprecated: false,
            tentative: false,
            label: None,
        }
    }

    fn link(index: u32) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            up: true,
            loopback: false,
            ethernet: true,
            arp: true,
        }
    }

    fn facts(ip: &str, prefix_len: u8, interface: &str) -> AddressFacts {
        AddressFacts {
            ip: ip.parse().unwrap(),
            prefix_len,
            interface: interface.to_owned(),
        }
    }

    fn secondary(mut address: Address) -> Address {
        address.secondary = true;
        address
    }

    #[test]
    fn a_hosts_own_address_stays_and_a_workloads_may_go() {
        let own = addr("10.77.0.11", 24, 1);
        let extra = secondary(addr("10.77.0.100", 24, 1));
        let single = addr("10.9.9.9", 32, 1);
        let wider = addr("10.77.0.101", 25, 1);
        let all = [own.clone(), single.clone(), wider.clone(), extra.clone()];
        assert!(matches!(owner(&own, &all, &[]), Owner::Host(_)));
        for workload in [&extra, &single, &wider] {
            assert_eq!(owner(workload, &all, &[]), Owner::Workload, "{workload:?}");
            assert!(matches!(
                owner(workload, &all, &[workload.ip]),
                Owner::Host(_)
            ));
        }
    }

    #[test]
    fn ipv6_needs_a_lasting_neighbour() {
        let own = addr("fd00::11", 64, 1);
        let extra = addr("fd00::100", 64, 1);
        let single = addr("fd00:9::9", 128, 1);
        let mut slaac = addr("fd00::abcd", 64, 1);
        slaac.dynamic = true;
        assert!(matches!(
            owner(&own, std::slice::from_ref(&own), &[]),
            Owner::Host(_)
        ));
        assert!(matches!(
            owner(&own, &[own.clone(), slaac.clone()], &[]),
            Owner::Host(_)
        ));
        let all = [extra.clone(), own, slaac.clone(), single.clone()];
        assert_eq!(owner(&extra, &all, &[extra.ip]), Owner::Workload);
        assert_eq!(owner(&single, &all, &[]), Owner::Workload);
        assert!(matches!(owner(&slaac, &all, &[]), Owner::Host(_)));
        let mut link = addr("fe80::1", 64, 1);
        link.global = false;
        assert!(matches!(owner(&link, &all, &[]), Owner::Fixed(_)));
    }

    #[test]
    fn a_primary_has_dependents_only_in_its_own_subnet() {
        let own = addr("10.77.0.11", 24, 1);
        let all = [
            own.clone(),
            secondary(addr("10.77.0.100", 24, 1)),
            secondary(addr("10.77.0.101", 25, 1)),
            secondary(addr("10.77.0.102", 24, 2)),
            addr("10.77.0.103", 32, 1),
        ];
        assert_eq!(
            dependents(&own, &all),
            ["10.77.0.100".parse::<IpAddr>().unwrap()]
        );
        assert!(dependents(&all[1], &all).is_empty());
    }

    #[test]
    fn placement_prefers_the_same_name_and_then_the_narrower_network() {
        let links = [link(1), link(2), link(3)];
        let addresses = [
            addr("10.77.0.12", 24, 1),
            addr("10.77.0.13", 24, 2),
            addr("10.0.0.1", 8, 3),
        ];
        let placed = |facts: &AddressFacts, links: &[Interface]| {
            place(facts, links, &addresses).map(|p| p.interface)
        };
        let want = facts("10.77.0.100", 24, "eth2");
        assert_eq!(placed(&want, &links).unwrap(), "eth2");
        let want = facts("10.77.0.100", 32, "ens3");
        assert_eq!(placed(&want, &links).unwrap(), "eth1");
        let mut down = links.clone();
        down[0].up = false;
        assert_eq!(placed(&want, &down).unwrap(), "eth2");
        let here = facts("10.77.0.13", 24, "eth1");
        assert!(matches!(
            placed(&here, &links),
            Err(NetError::AlreadyHere { interface, .. }) if interface == "eth2"
        ));
        let nowhere = placed(&facts("192.168.1.5", 24, "eth1"), &links).unwrap_err();
        assert!(
            nowhere.to_string().contains("eth1 with 10.77.0.12/24"),
            "{nowhere}"
        );
        assert!(nowhere.help().unwrap().contains("192.168.1.5/24"));
    }

    #[test]
    fn collisions() {
        let s = |text: &str| text.parse::<SocketAddr>().unwrap();
        let collide4 = |a, b| collide(s(a), false, s(b), false);
        assert!(collide4("10.0.0.1:80", "0.0.0.0:80"));
        assert!(collide4("[::]:80", "10.0.0.1:80"));
        assert!(collide4("[::ffff:10.0.0.1]:80", "10.0.0.1:80"));
        assert!(!collide4("10.0.0.1:80", "10.0.0.1:81"));
        assert!(!collide4("10.0.0.1:80", "10.0.0.2:80"));
        assert!(!collide4("[fd00::1]:80", "0.0.0.0:80"));
        assert!(!collide(s("[::]:80"), true, s("0.0.0.0:80"), false));
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(IpAddr::from),
            any::<[u8; 16]>().prop_map(IpAddr::from),
        ]
    }

    proptest! {
        #[test]
        fn an_address_is_in_its_own_subnet(ip in any_ip(), prefix_len: u8) {
            prop_assert!(subnet_contains(ip, prefix_len, ip));
        }

        #[test]
        fn a_shorter_prefix_contains_more(a in any::<[u8; 4]>(), b in any::<[u8; 4]>(), prefix_len in 1u8..=32) {
            let (a, b) = (IpAddr::from(a), IpAddr::from(b));
            if subnet_contains(a, prefix_len, b) {
                prop_assert!(subnet_contains(a, prefix_len - 1, b));
                prop_assert!(subnet_contains(b, prefix_len, a));
            }
        }

        #[test]
        fn collisions_are_mutual(a in any_ip(), b in any_ip(), port: u16, x: bool, y: bool) {
            let (a, b) = (SocketAddr::new(a, port), SocketAddr::new(b, port));
            prop_assert_eq!(collide(a, x, b, y), collide(b, y, a, x));
            prop_assert!(collide(a, x, a, x));
        }

        #[test]
        fn what_is_placed_fits(host in any::<[u8; 4]>(), ip in any::<[u8; 4]>(), prefix_len in 0u8..=32) {
            let addresses = [Address { ip: host.into(), ..addr("10.0.0.1", prefix_len, 1) }];
            let want = AddressFacts { ip: ip.into(), ..facts("10.0.0.9", 24, "eth1") };
            match place(&want, &[link(1)], &addresses) {
                Ok(placement) => {
                    prop_assert!(subnet_contains(host.into(), prefix_len, ip.into()));
                    prop_assert_eq!(placement.prefix_len, 24);
                }
                Err(NetError::AlreadyHere { .. }) => prop_assert_eq!(host, ip),
                Err(NetError::NoInterface { .. }) => {
                    prop_assert!(!subnet_contains(host.into(), prefix_len, ip.into()));
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }

        #[test]
        fn at_least_one_address_of_a_subnet_stays(count in 1usize..6, prefix_len in 8u8..31) {
            // However many there are, the first one is the host's.
            let all: Vec<Address> = (0..count)
                .map(|n| {
                    let a = addr(&format!("10.0.0.{}", n + 1), prefix_len, 1);
                    if n == 0 { a } else { secondary(a) }
                })
                .collect();
            let hosts = all.iter().filter(|a| owner(a, &all, &[]) != Owner::Workload).count();
            prop_assert_eq!(hosts, 1);
        }
    }
}
